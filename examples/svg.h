/* svg.h - write small SVG pictures: shapes, text, axes, images. Header-only, C99.
 *
 *     svg s;
 *     if (svg_open(&s, "build/picture.svg", 800, 400) == 0) {
 *         svg_rect(&s, 10, 10, 100, 20, "#4477aa");
 *         svg_text(&s, 10, 50, 14, SVG_LEFT, SVG_INK, "%d entries", 12);
 *     }
 *     if (svg_close(&s) != 0) ...                       nothing is left behind under that name
 *
 * Coordinates are pixels, y grows downwards. The file appears under its name only when svg_close succeeds; until then
 * it is written beside it. The drawing functions need no check: an error is remembered and svg_close reports it. */

#ifndef SVG_H
#define SVG_H

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__GNUC__) || defined(__clang__)
#define SVG_UNUSED              __attribute__((unused))
#define SVG_PRINTF(text, first) __attribute__((format(printf, text, first)))
#else
#define SVG_UNUSED
#define SVG_PRINTF(text, first)
#endif

/* Colours that read on white, also for the colour-blind. */
#define SVG_INK   "#24292f"
#define SVG_GREY  "#6e7781"
#define SVG_FAINT "#d8dee4"
#define SVG_BLUE  "#3b6fb6"
#define SVG_TEAL  "#2a9d8f"
#define SVG_AMBER "#e09f3e"
#define SVG_RED   "#c8553d"
#define SVG_PAPER "#ffffff"

typedef enum svg_anchor { SVG_LEFT, SVG_CENTRE, SVG_RIGHT } svg_anchor;

typedef struct svg {
    FILE *file;
    char path[1024], partial[1040];
    int failed;
} svg;

/* A drawing area: data from (x0, y0) to (x1, y1) is shown in the rectangle left, top, width, height. */
typedef struct svg_axes {
    double left, top, width, height;
    double x0, x1, y0, y1;
} svg_axes;

/* 0, or -1 where the file cannot be made; the drawing functions then do nothing. */
SVG_UNUSED static int svg_open(svg *s, const char *path, double width, double height) {
    memset(s, 0, sizeof *s);
    s->failed = 1;
    if (strlen(path) >= sizeof s->path) return -1;
    strcpy(s->path, path);
    snprintf(s->partial, sizeof s->partial, "%s.partial", path);
    s->file = fopen(s->partial, "wb");
    if (!s->file) return -1;
    s->failed = 0;
    fprintf(s->file,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%g\" height=\"%g\" viewBox=\"0 0 %g %g\" "
            "font-family=\"Helvetica, Arial, 'DejaVu Sans', sans-serif\">\n"
            "<rect width=\"%g\" height=\"%g\" fill=\"" SVG_PAPER "\"/>\n",
            width, height, width, height, width, height);
    return 0;
}

/* 0 where the whole picture is on disk under its name; else -1, and nothing of it is left. */
SVG_UNUSED static int svg_close(svg *s) {
    if (!s->file) return -1;
    fputs("</svg>\n", s->file);
    s->failed |= ferror(s->file) != 0;
    s->failed |= fclose(s->file) != 0;
    s->file = NULL;
    if (!s->failed && rename(s->partial, s->path) == 0) return 0;
    remove(s->partial);
    return -1;
}

/* Not drawn where its size is no number. */
SVG_UNUSED static void svg_rect(svg *s, double x, double y, double width, double height, const char *fill) {
    if (s->file && width >= 0 && height >= 0)
        fprintf(s->file, "<rect x=\"%.2f\" y=\"%.2f\" width=\"%.2f\" height=\"%.2f\" fill=\"%s\"/>\n", x, y, width,
                height, fill);
}

/* An outline without filling. */
SVG_UNUSED static void svg_frame(svg *s, double x, double y, double width, double height, const char *stroke) {
    if (s->file)
        fprintf(s->file, "<rect x=\"%.2f\" y=\"%.2f\" width=\"%.2f\" height=\"%.2f\" fill=\"none\" stroke=\"%s\"/>\n",
                x, y, width, height, stroke);
}

typedef struct svg_stroke {
    const char *colour;
    double width;
    const char *dashes; /* e.g. "4 3"; NULL: solid */
} svg_stroke;

SVG_UNUSED static void svg__stroke(svg *s, svg_stroke stroke) {
    fprintf(s->file, " fill=\"none\" stroke=\"%s\" stroke-width=\"%.2f\"", stroke.colour, stroke.width);
    if (stroke.dashes) fprintf(s->file, " stroke-dasharray=\"%s\"", stroke.dashes);
    fputs("/>\n", s->file);
}

typedef struct svg_point {
    double x, y;
} svg_point;

SVG_UNUSED static void svg_polyline(svg *s, const svg_point *points, size_t count, svg_stroke stroke) {
    if (!s->file) return;
    fputs("<polyline stroke-linejoin=\"round\" points=\"", s->file);
    for (size_t i = 0; i < count; i++) fprintf(s->file, "%s%.2f,%.2f", i ? " " : "", points[i].x, points[i].y);
    fputc('"', s->file);
    svg__stroke(s, stroke);
}

SVG_UNUSED static void svg_line(svg *s, svg_point from, svg_point to, svg_stroke stroke) {
    if (!s->file) return;
    fprintf(s->file, "<line x1=\"%.2f\" y1=\"%.2f\" x2=\"%.2f\" y2=\"%.2f\"", from.x, from.y, to.x, to.y);
    svg__stroke(s, stroke);
}

SVG_UNUSED static void svg__characters(svg *s, const char *text) {
    for (; *text; text++) {
        switch (*text) {
        case '&':
            fputs("&amp;", s->file);
            break;
        case '<':
            fputs("&lt;", s->file);
            break;
        case '>':
            fputs("&gt;", s->file);
            break;
        default:
            if ((unsigned char)*text >= 0x20) /* control characters are not XML */
                fputc(*text, s->file);
        }
    }
}

SVG_UNUSED static void svg__text(svg *s, const char *placement, svg_anchor anchor, const char *fill, const char *text) {
    static const char *const names[] = {"start", "middle", "end"};
    fprintf(s->file, "<text %s text-anchor=\"%s\" fill=\"%s\">", placement, names[anchor], fill);
    svg__characters(s, text);
    fputs("</text>\n", s->file);
}

/* y is the baseline; the text is a printf format. Texts over 511 bytes are cut. */
SVG_UNUSED SVG_PRINTF(7, 8) static void svg_text(svg *s, double x, double y, double size, svg_anchor anchor,
                                                 const char *fill, const char *format, ...) {
    char text[512], placement[96];
    va_list arguments;
    if (!s->file) return;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    snprintf(placement, sizeof placement, "x=\"%.2f\" y=\"%.2f\" font-size=\"%.4g\"", x, y, size);
    svg__text(s, placement, anchor, fill, text);
}

/* Reads upwards, centred on (x, y): the name of a vertical axis. */
SVG_UNUSED static void svg_text_up(svg *s, double x, double y, double size, const char *fill, const char *text) {
    char placement[128];
    if (!s->file) return;
    snprintf(placement, sizeof placement, "transform=\"translate(%.2f %.2f) rotate(-90)\" font-size=\"%.4g\"", x, y,
             size);
    svg__text(s, placement, SVG_CENTRE, fill, text);
}

/* --- axes ---------------------------------------------------------------------------------------------------- */

SVG_UNUSED static svg_point svg_place(const svg_axes *axes, double x, double y) {
    svg_point point;
    point.x = axes->left + axes->width * (x - axes->x0) / (axes->x1 - axes->x0);
    point.y = axes->top + axes->height * (axes->y1 - y) / (axes->y1 - axes->y0);
    return point;
}

/* A grid line and its label at data coordinate `value`: across the area for the y axis, up it for the x axis. */
SVG_UNUSED static void svg_tick_x(svg *s, const svg_axes *axes, double value, const char *label) {
    const svg_stroke faint = {SVG_FAINT, 1.0, NULL};
    const svg_point low = svg_place(axes, value, axes->y0), high = svg_place(axes, value, axes->y1);
    svg_line(s, low, high, faint);
    svg_text(s, low.x, axes->top + axes->height + 16, 11, SVG_CENTRE, SVG_GREY, "%s", label);
}

SVG_UNUSED static void svg_tick_y(svg *s, const svg_axes *axes, double value, const char *label) {
    const svg_stroke faint = {SVG_FAINT, 1.0, NULL};
    const svg_point from = svg_place(axes, axes->x0, value), to = svg_place(axes, axes->x1, value);
    svg_line(s, from, to, faint);
    svg_text(s, axes->left - 6, from.y + 4, 11, SVG_RIGHT, SVG_GREY, "%s", label);
}

/* --- heat maps: an image of one pixel a cell ------------------------------------------------------------------ */

typedef struct svg_rgb {
    uint8_t r, g, b;
} svg_rgb;

/* 0 is paper-light, 1 is dark: even steps of lightness, so that it reads in print and for the colour-blind. */
SVG_UNUSED static svg_rgb svg_heat(double value) {
    static const double stops[6][3] = {{252, 250, 242}, {253, 218, 150}, {240, 146, 84},
                                       {200, 72, 86},   {115, 34, 100},  {30, 12, 56}};
    const double at = value > 0 ? (value < 1 ? value : 1) * 5 : 0; /* NaN counts as 0 */
    const int i = at < 5 ? (int)at : 4;
    double mixed[3];
    svg_rgb colour;
    for (int c = 0; c < 3; c++) mixed[c] = stops[i][c] + (at - i) * (stops[i + 1][c] - stops[i][c]) + 0.5;
    colour.r = (uint8_t)mixed[0];
    colour.g = (uint8_t)mixed[1];
    colour.b = (uint8_t)mixed[2];
    return colour;
}

/* The PNG inside of an image is stored, not compressed; base64 takes its bytes as they come. */
typedef struct svg__png {
    FILE *file;
    uint32_t held, crc;
    int held_bytes;
} svg__png;

SVG_UNUSED static void svg__base64(svg__png *png, int flush) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    if (png->held_bytes < 3 && !(flush && png->held_bytes)) return;
    for (int i = 0; i < 4; i++) {
        const uint32_t bits = png->held << (8 * (3 - png->held_bytes));
        fputc(i <= png->held_bytes ? digits[bits >> (18 - 6 * i) & 63] : '=', png->file);
    }
    png->held = 0;
    png->held_bytes = 0;
}

SVG_UNUSED static void svg__byte(svg__png *png, uint32_t byte) {
    png->crc ^= byte;
    for (int bit = 0; bit < 8; bit++) png->crc = png->crc >> 1 ^ (png->crc & 1 ? 0xEDB88320u : 0);
    png->held = png->held << 8 | byte;
    png->held_bytes++;
    svg__base64(png, 0);
}

SVG_UNUSED static void svg__word(svg__png *png, uint32_t word) {
    for (int shift = 24; shift >= 0; shift -= 8) svg__byte(png, word >> shift & 255);
}

SVG_UNUSED static void svg__chunk_begin(svg__png *png, uint32_t size, const char *type) {
    svg__word(png, size);
    png->crc = 0xFFFFFFFFu;
    for (int i = 0; i < 4; i++) svg__byte(png, (uint8_t)type[i]);
}

SVG_UNUSED static void svg__chunk_end(svg__png *png) { svg__word(png, png->crc ^ 0xFFFFFFFFu); }

/* One stored block a row: filter byte 0, then the pixels. */
SVG_UNUSED static void svg__pixels(svg__png *png, const svg_rgb *cells, uint32_t columns, uint32_t rows) {
    const uint32_t row_bytes = 1 + 3 * columns;
    uint32_t low = 1, high = 0; /* Adler-32 */
    svg__chunk_begin(png, 2 + rows * (5 + row_bytes) + 4, "IDAT");
    svg__byte(png, 0x78);
    svg__byte(png, 0x01);
    for (uint32_t row = 0; row < rows; row++) {
        svg__byte(png, row + 1 == rows);
        svg__byte(png, row_bytes & 255);
        svg__byte(png, row_bytes >> 8);
        svg__byte(png, ~row_bytes & 255);
        svg__byte(png, ~row_bytes >> 8 & 255);
        for (uint32_t i = 0; i < row_bytes; i++) {
            const svg_rgb *cell = &cells[(size_t)row * columns + (i ? (i - 1) / 3 : 0)];
            const uint8_t value[3] = {cell->r, cell->g, cell->b};
            const uint32_t byte = i ? value[(i - 1) % 3] : 0;
            svg__byte(png, byte);
            low = (low + byte) % 65521;
            high = (high + low) % 65521;
        }
    }
    svg__word(png, high << 16 | low);
    svg__chunk_end(png);
}

/* Draws cells [rows, columns], each a plain rectangle, into the rectangle of `area` (its data range is not looked at).
 * columns <= 21844; anything larger is an error that svg_close reports. */
SVG_UNUSED static void svg_image(svg *s, const svg_axes *area, const svg_rgb *cells, uint32_t columns, uint32_t rows) {
    static const uint8_t signature[8] = {0x89, 'P', 'N', 'G', '\r', '\n', 0x1A, '\n'};
    svg__png png = {0};
    if (!s->file || !columns || !rows) return;
    if (columns > 21844 || rows > 32768) {
        s->failed = 1;
        return;
    }
    png.file = s->file;
    fprintf(s->file,
            "<image x=\"%.2f\" y=\"%.2f\" width=\"%.2f\" height=\"%.2f\" preserveAspectRatio=\"none\" "
            "style=\"image-rendering:pixelated\" href=\"data:image/png;base64,",
            area->left, area->top, area->width, area->height);
    for (int i = 0; i < 8; i++) svg__byte(&png, signature[i]);
    svg__chunk_begin(&png, 13, "IHDR");
    svg__word(&png, columns);
    svg__word(&png, rows);
    svg__word(&png, 0x08020000u); /* 8 bits, RGB, deflate, no filter choice */
    svg__byte(&png, 0);           /* not interlaced */
    svg__chunk_end(&png);
    svg__pixels(&png, cells, columns, rows);
    svg__chunk_begin(&png, 0, "IEND");
    svg__chunk_end(&png);
    svg__base64(&png, 1);
    fputs("\"/>\n", s->file);
}

#endif /* SVG_H */
