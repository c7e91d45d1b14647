/* gate_map.h - draws which tokens the entries are made of: the softmax weights of windows, as SVG.
 *
 * Above, each token's weight, averaged over the channels, in its own window and in the next one. Below, the first
 * windows one by one: rows of the window down, channels across. */

#ifndef GATE_MAP_H
#define GATE_MAP_H

#include "svg.h"

#include <math.h>

typedef struct gate_map {
    const float *weights; /* [windows, coff * ratio, head_dim], from the sequence's first window on */
    int64_t windows, ratio, head_dim, rope_dim;
    int overlap;
    const char *source; /* what the title's second line says */
} gate_map;

/* 0, or -1 and nothing is left of it. */
static inline int gate_map_write(const gate_map *map, const char *path);

enum { GATE_MAP_TOKENS = 256, GATE_MAP_CELLS = 4096 }; /* most tokens above; most cells of a picture's side */

static const double gate_map__left = 96, gate_map__across = 768, gate_map__side = 130; /* labels, channels, bars */
static const double gate_map__head = 96, gate_map__overview_height = 110;
static const double gate_map__maps = 860, gate_map__gap = 30; /* height for the windows, and above each for a caption */

/* Where the windows go, and how weight becomes colour. */
typedef struct gate_map__layout {
    int64_t rows;  /* of a window */
    int64_t shown; /* windows drawn one by one */
    int64_t cell_rows, cell_columns;
    double row_height, top, height;
    double full; /* the weight that is darkest */
} gate_map__layout;

static inline const float *gate_map__row(const gate_map *map, int64_t window, int64_t row) {
    return map->weights + (window * (1 + map->overlap) * map->ratio + row) * map->head_dim;
}

static inline double gate_map__mean(const gate_map *map, int64_t window, int64_t row) {
    const float *weights = gate_map__row(map, window, row);
    double sum = 0;
    for (int64_t c = 0; c < map->head_dim; c++) sum += (double)weights[c];
    return sum / (double)map->head_dim;
}

/* How many rows a channel draws on, averaged over channels: 1 / sum of squares is n for n equal weights. */
static inline double gate_map__breadth(const gate_map *map, int64_t window) {
    double total = 0;
    for (int64_t c = 0; c < map->head_dim; c++) {
        double squares = 0;
        for (int64_t row = 0; row < (1 + map->overlap) * map->ratio; row++) {
            const double weight = (double)gate_map__row(map, window, row)[c];
            squares += weight * weight;
        }
        total += 1 / squares;
    }
    return total / (double)map->head_dim;
}

/* The darkest colour's weight: the smallest of these steps that no more than one weight in 200 exceeds. */
static inline double gate_map__full(const gate_map *map, int64_t windows) {
    static const double steps[] = {1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001};
    const int64_t count = windows * (1 + map->overlap) * map->ratio * map->head_dim;
    size_t step = 1;
    for (; step < sizeof steps / sizeof *steps; step++) {
        int64_t above = 0;
        for (int64_t i = 0; i < count; i++) above += (double)map->weights[i] > steps[step];
        if (above * 200 > count) break;
    }
    return steps[step - 1];
}

/* Cells for `count` rows or columns: sampled where there are too many for a picture, each repeated where there are few,
 * so that viewers that smooth pictures do not blur one into the next. */
static inline int64_t gate_map__cells(int64_t count, int64_t repeats) {
    if (count > GATE_MAP_CELLS) return GATE_MAP_CELLS;
    return repeats > 1 && count * repeats <= GATE_MAP_CELLS ? count * repeats : count;
}

static inline gate_map__layout gate_map__lay_out(const gate_map *map) {
    gate_map__layout l = {0};
    l.rows = (1 + map->overlap) * map->ratio;
    l.row_height = l.rows <= 16 ? 13 : l.rows <= 64 ? 6 : l.rows <= 256 ? 3 : 600.0 / (double)l.rows;
    l.shown = (int64_t)(gate_map__maps / ((double)l.rows * l.row_height + gate_map__gap));
    if (l.shown < 1) l.shown = 1;
    if (l.shown > 6) l.shown = 6;
    if (l.shown > map->windows) l.shown = map->windows;
    l.cell_rows = gate_map__cells(l.rows, l.rows <= 16 ? 6 : 2);
    l.cell_columns = gate_map__cells(map->head_dim, (int64_t)gate_map__across / map->head_dim);
    l.top = gate_map__head + gate_map__overview_height + 70;
    l.height = l.top + (double)l.shown * ((double)l.rows * l.row_height + gate_map__gap) + 56;
    l.full = gate_map__full(map, l.shown);
    return l;
}

/* Rows of the window before, where there are some, are amber; a window's own are blue. */
static inline const char *gate_map__colour(const gate_map *map, int64_t row) {
    return map->overlap && row < map->ratio ? SVG_AMBER : SVG_BLUE;
}

static inline void gate_map__title(svg *s, const gate_map *map, const gate_map__layout *l) {
    const svg_axes bar = {gate_map__left + gate_map__across - 200, 30, 200, 12, 0, 1, 0, 1};
    svg_rgb cells[200];
    svg_text(s, gate_map__left, 32, 20, SVG_LEFT, SVG_INK, "What each entry keeps");
    svg_text(s, gate_map__left, 54, 13, SVG_LEFT, SVG_GREY, "gate weights of %s", map->source);
    svg_text(s, gate_map__left, 72, 13, SVG_LEFT, SVG_GREY, "%lld token%s to an entry of %lld channels%s",
             (long long)map->ratio, map->ratio > 1 ? "s" : "", (long long)map->head_dim,
             map->overlap ? ", windows look back at the one before" : "");
    for (int i = 0; i < 200; i++) cells[i] = svg_heat(i / 199.0);
    svg_image(s, &bar, cells, 200, 1);
    svg_frame(s, bar.left, bar.top, bar.width, bar.height, SVG_FAINT);
    svg_text(s, bar.left - 6, 40, 11, SVG_RIGHT, SVG_GREY, "0");
    svg_text(s, bar.left + 206, 40, 11, SVG_LEFT, SVG_GREY, l->full < 1 ? "%g and more" : "%g", l->full);
    svg_text(s, bar.left + 100, 24, 11, SVG_CENTRE, SVG_GREY, "weight in the entry, channel by channel");
    const double even = 1 / (double)l->rows / l->full;
    if (even <= 1 && l->rows > 1) {
        const svg_point from = {bar.left + 200 * even, 42}, to = {from.x, 48};
        svg_line(s, from, to, (svg_stroke){SVG_INK, 1, NULL});
        svg_text(s, from.x, 60, 11, SVG_CENTRE, SVG_INK, "1/%lld: no choice", (long long)l->rows);
    }
}

/* ---- Above: every token's weight ---------------------------------------------------------------------------- */

/* A token's mean weight in its own window, and in the next one where windows overlap. */
static inline void gate_map__token(const gate_map *map, int64_t token, double *own, double *next) {
    const int64_t window = token / map->ratio, row = token % map->ratio;
    *own = gate_map__mean(map, window, map->overlap ? map->ratio + row : row);
    *next = map->overlap && window + 1 < map->windows ? gate_map__mean(map, window + 1, row) : 0;
}

static inline int64_t gate_map__label_step(double spacing, double wanted) {
    int64_t step = 1;
    while ((double)step * spacing < wanted) step *= 2;
    return step;
}

static inline void gate_map__key(svg *s, const gate_map *map, int64_t tokens, double y) {
    const double right = gate_map__left + gate_map__across;
    svg_text(s, gate_map__left, y, 13, SVG_LEFT, SVG_INK, "Mean weight over channels of the first %lld tokens",
             (long long)tokens);
    svg_rect(s, right - 105, y - 9, 10, 10, SVG_BLUE);
    svg_text(s, right - 91, y, 11, SVG_LEFT, SVG_GREY, "in its own entry");
    if (map->overlap) {
        svg_rect(s, right - 220, y - 9, 10, 10, SVG_AMBER);
        svg_text(s, right - 206, y, 11, SVG_LEFT, SVG_GREY, "in the next entry");
    }
}

static inline void gate_map__overview(svg *s, const gate_map *map) {
    const int64_t all = map->windows * map->ratio, tokens = all < GATE_MAP_TOKENS ? all : GATE_MAP_TOKENS;
    const double width = gate_map__across / (double)tokens, gap = width > 3 ? 1 : 0;
    svg_axes axes = {
        gate_map__left, gate_map__head + 20, gate_map__across, gate_map__overview_height, 0, (double)tokens, 0, 0};
    double own, next;
    char label[32];
    for (int64_t t = 0; t < tokens; t++) {
        gate_map__token(map, t, &own, &next);
        if (own + next > axes.y1) axes.y1 = own + next;
    }
    if (!(axes.y1 > 0)) axes.y1 = 1; /* NaN gates */
    gate_map__key(s, map, tokens, gate_map__head + 6);
    for (int64_t t = 0; t < tokens; t += gate_map__label_step(width, 60)) {
        snprintf(label, sizeof label, "%s%lld", t ? "" : "token ", (long long)t);
        svg_tick_x(s, &axes, (double)t, label);
    }
    for (int64_t t = 0; t < tokens; t++) {
        gate_map__token(map, t, &own, &next);
        const svg_point middle = svg_place(&axes, (double)t, own), high = svg_place(&axes, (double)t, own + next);
        svg_rect(s, middle.x, middle.y, width - gap, axes.top + axes.height - middle.y, SVG_BLUE);
        if (next > 0) svg_rect(s, middle.x, high.y, width - gap, middle.y - high.y, SVG_AMBER);
    }
    const double even = 1 / (double)map->ratio;
    if (even <= axes.y1 && map->ratio > 1) {
        const svg_point left = svg_place(&axes, 0, even), right = svg_place(&axes, axes.x1, even);
        svg_line(s, left, right, (svg_stroke){SVG_INK, 1, "4 3"});
        svg_text(s, right.x + 8, right.y + 4, 11, SVG_LEFT, SVG_INK, "1/%lld: no choice", (long long)map->ratio);
    }
}

/* ---- Below: window by window ---------------------------------------------------------------------------------- */

static inline void gate_map__caption(svg *s, const gate_map *map, int64_t window, double y) {
    const long long ratio = map->ratio, first = window * ratio;
    char before[64] = "", own[48] = "";
    if (ratio > 1) snprintf(own, sizeof own, "s %lld to %lld", first, first + ratio - 1);
    if (ratio == 1) snprintf(own, sizeof own, " %lld", first);
    if (map->overlap && window) snprintf(before, sizeof before, ", with %lld to %lld before", first - ratio, first - 1);
    if (map->overlap && window && ratio == 1) snprintf(before, sizeof before, ", with %lld before", first - 1);
    if (map->overlap && !window) snprintf(before, sizeof before, ", none before");
    svg_text(s, gate_map__left, y, 13, SVG_LEFT, SVG_INK, "Entry %lld: token%s%s", (long long)window, own, before);
    if (!map->overlap && ratio == 1) return; /* one row: nothing is chosen */
    const double breadth = gate_map__breadth(map, window);
    if (isnan(breadth)) {
        svg_text(s, gate_map__left + gate_map__across, y, 11, SVG_RIGHT, SVG_RED, "holds a NaN");
        return;
    }
    svg_text(s, gate_map__left + gate_map__across, y, 11, SVG_RIGHT, SVG_GREY,
             "a channel draws on %.1f of its %lld rows", breadth, (long long)((1 + map->overlap) * map->ratio));
}

static inline void gate_map__rows(svg *s, const gate_map *map, const gate_map__layout *l, int64_t window, double top) {
    const double x = gate_map__left + gate_map__across + 12,
                 bar = l->row_height > 4 ? l->row_height - 2 : l->row_height;
    const int64_t step = gate_map__label_step(l->row_height, l->rows <= 16 ? 12 : 22);
    double most = 0;
    for (int64_t w = 0; w < l->shown; w++) {
        for (int64_t row = 0; row < l->rows; row++) most = fmax(most, gate_map__mean(map, w, row));
    }
    for (int64_t row = 0; row < l->rows; row++) {
        const double mean = gate_map__mean(map, window, row), y = top + (double)row * l->row_height;
        const int64_t token = window * map->ratio + row - (map->overlap ? map->ratio : 0);
        if (most > 0) svg_rect(s, x, y, gate_map__side * mean / most, bar, gate_map__colour(map, row));
        if (row % step) continue;
        const double base = y + (l->row_height > 8 ? l->row_height / 2 : 0) + 4;
        if (token < 0) {
            svg_text(s, gate_map__left - 8, base, 11, SVG_RIGHT, SVG_GREY, "none");
        } else {
            svg_text(s, gate_map__left - 8, base, 11, SVG_RIGHT, gate_map__colour(map, row), "token %lld",
                     (long long)token);
        }
    }
}

/* Colours of a window, cells [cell_rows, cell_columns]. */
static inline void gate_map__fill(const gate_map *map, const gate_map__layout *l, int64_t window, svg_rgb *cells) {
    for (int64_t row = 0; row < l->cell_rows; row++) {
        const float *weights = gate_map__row(map, window, row * l->rows / l->cell_rows);
        for (int64_t i = 0; i < l->cell_columns; i++) {
            const float weight = weights[i * map->head_dim / l->cell_columns];
            cells[row * l->cell_columns + i] = svg_heat((double)weight / l->full);
        }
    }
}

static inline int gate_map__window(svg *s, const gate_map *map, const gate_map__layout *l, int64_t window, double top) {
    const svg_axes area = {gate_map__left, top, gate_map__across, (double)l->rows * l->row_height, 0, 1, 0, 1};
    svg_rgb *cells = (svg_rgb *)malloc((size_t)(l->cell_rows * l->cell_columns) * sizeof *cells);
    if (!cells) return -1;
    gate_map__fill(map, l, window, cells);
    svg_image(s, &area, cells, (uint32_t)l->cell_columns, (uint32_t)l->cell_rows);
    free(cells);
    svg_frame(s, area.left, area.top, area.width, area.height, SVG_FAINT);
    if (map->overlap) {
        const svg_point from = {area.left - 4, top + area.height / 2}, to = {area.left + area.width + 4, from.y};
        svg_line(s, from, to, (svg_stroke){SVG_INK, 1, NULL});
    }
    gate_map__caption(s, map, window, top - 8);
    gate_map__rows(s, map, l, window, top);
    return 0;
}

/* The channel axis below the last window at y. */
static inline void gate_map__channels(svg *s, const gate_map *map, double y) {
    const double spacing = gate_map__across / (double)map->head_dim;
    for (int64_t c = 0; c < map->head_dim; c += gate_map__label_step(spacing, 90)) {
        svg_text(s, gate_map__left + (double)c * spacing, y + 16, 11, SVG_LEFT, SVG_GREY, "%s%lld", c ? "" : "channel ",
                 (long long)c);
    }
    if (map->rope_dim) {
        const svg_point from = {gate_map__left + (double)(map->head_dim - map->rope_dim) * spacing, y + 24};
        const svg_point to = {gate_map__left + gate_map__across, y + 24};
        svg_line(s, from, to, (svg_stroke){SVG_TEAL, 3, NULL});
        svg_text(s, to.x, y + 40, 11, SVG_RIGHT, SVG_TEAL, "RoPE turns these %lld", (long long)map->rope_dim);
    }
    svg_text(s, gate_map__left + gate_map__across + 12, y + 16, 11, SVG_LEFT, SVG_GREY, "mean over channels");
}

static inline int gate_map_write(const gate_map *map, const char *path) {
    const gate_map__layout l = gate_map__lay_out(map);
    const double pitch = (double)l.rows * l.row_height + gate_map__gap;
    svg s;
    if (svg_open(&s, path, gate_map__left + gate_map__across + gate_map__side + 86, l.height)) return -1;
    gate_map__title(&s, map, &l);
    gate_map__overview(&s, map);
    for (int64_t window = 0; window < l.shown; window++) {
        if (gate_map__window(&s, map, &l, window, l.top + (double)window * pitch)) s.failed = 1;
    }
    gate_map__channels(&s, map, l.top + (double)l.shown * pitch - gate_map__gap);
    return svg_close(&s);
}

#endif /* GATE_MAP_H */
