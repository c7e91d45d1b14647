/* bench_chart.h - the measured shares of the limit as a bar chart. */

#ifndef BENCH_CHART_H
#define BENCH_CHART_H

#include "svg.h"

typedef struct bench_result {
    const bench_case *what;
    const char *isa, *limit_name;
    int threads, extra; /* extra: beyond the one row a case has without --full */
    double tokens_per_s, gflops, gbytes_per_s, limit, ratio;
} bench_result;

typedef struct bench_group {
    const char *title;
    int extra;
    unsigned kinds; /* bits by bench_kind */
} bench_group;

static const bench_group bench_groups[] = {
    {"Prefill, 2,048 tokens", 0, 1u << BENCH_PREFILL},
    {"Backward, 2,048 tokens", 0, 1u << BENCH_BACKWARD},
    {"Decoding, one token a sequence; pooling alone", 0, 1u << BENCH_DECODE | 1u << BENCH_POOL},
    {"More threads, other kernel sets", 1, ~0u},
};
enum { BENCH_GROUPS = sizeof bench_groups / sizeof bench_groups[0] };

enum { BENCH_CHART_WIDTH = 960, BENCH_CHART_TOP = 84, BENCH_ROW = 21, BENCH_GROUP_GAP = 34 };

static int bench_in_group(const bench_group *group, const bench_result *result) {
    return result->extra == group->extra && (group->kinds >> result->what->kind & 1u);
}

static int bench_group_rows(const bench_group *group, const bench_result *results, int count) {
    int rows = 0;
    for (int i = 0; i < count; i++) rows += bench_in_group(group, &results[i]);
    return rows;
}

/* 12345.6 -> "12,346" */
static const char *bench_thousands(double value, char text[32]) {
    char digits[24];
    int at = 0;
    const int length = snprintf(digits, sizeof digits, "%.0f", value > 0 && value < 1e15 ? value : 0.0);
    for (int i = 0; i < length; i++) {
        if (i > 0 && (length - i) % 3 == 0) text[at++] = ',';
        text[at++] = digits[i];
    }
    text[at] = 0;
    return text;
}

static const char *bench_colour(const bench_case *what) {
    return what->cold ? SVG_AMBER : what->dtype == DSV4_BF16 ? SVG_BLUE : SVG_TEAL;
}

static void bench_chart_legend(svg *s) {
    static const char *const entries[][2] = {{SVG_BLUE, "bf16, share of the multiply-add peak"},
                                             {SVG_TEAL, "f32, share of the multiply-add peak"},
                                             {SVG_AMBER, "share of the read bandwidth"}};
    double x = 24;
    for (int i = 0; i < 3; i++) {
        svg_rect(s, x, 52, 11, 11, entries[i][0]);
        svg_text(s, x + 17, 62, 12, SVG_LEFT, SVG_GREY, "%s", entries[i][1]);
        x += 34 + 6.3 * (double)strlen(entries[i][1]);
    }
}

static void bench_chart_row(svg *s, const svg_axes *axes, const bench_result *result, double y) {
    const double right = svg_place(axes, result->ratio < axes->x1 ? result->ratio : axes->x1, 0).x;
    const int narrow = right < axes->left + 36;
    char number[32], name[80];
    snprintf(name, sizeof name, "%s", result->what->name);
    if (result->extra)
        snprintf(name, sizeof name, "%s, %s, %d thread%s", result->what->name, result->isa, result->threads,
                 result->threads > 1 ? "s" : "");
    svg_text(s, axes->left - 10, y + 12, 12, SVG_RIGHT, SVG_INK, "%s", name);
    svg_rect(s, axes->left, y + 1, right - axes->left, BENCH_ROW - 6, bench_colour(result->what));
    svg_text(s, narrow ? right + 5 : axes->left + 7, y + 12.5, 11, SVG_LEFT, narrow ? SVG_INK : SVG_PAPER, "%.2f",
             result->ratio);
    svg_text(s, BENCH_CHART_WIDTH - 24, y + 12, 12, SVG_RIGHT, SVG_GREY, "%s tokens/s",
             bench_thousands(result->tokens_per_s, number));
}

/* 0, or -1 where the file could not be written. */
static int bench_chart(const char *path, const bench_result *results, int count, const char *machine) {
    const svg_stroke limit = {SVG_RED, 1.5, NULL};
    svg_axes axes = {316, BENCH_CHART_TOP, 500, 0, 0, 1.05, 0, 1};
    double y = BENCH_CHART_TOP;
    svg s;
    for (int g = 0; g < BENCH_GROUPS; g++)
        if (bench_group_rows(&bench_groups[g], results, count))
            axes.height += BENCH_GROUP_GAP + BENCH_ROW * bench_group_rows(&bench_groups[g], results, count);
    if (svg_open(&s, path, BENCH_CHART_WIDTH, axes.top + axes.height + 34) != 0) return -1;
    svg_text(&s, 24, 28, 17, SVG_LEFT, SVG_INK, "How close to this machine's limit");
    svg_text(&s, BENCH_CHART_WIDTH - 24, 28, 12, SVG_RIGHT, SVG_GREY, "%s", machine);
    bench_chart_legend(&s);
    for (int i = 0; i <= 10; i += 2) {
        char label[16];
        snprintf(label, sizeof label, "%d %%", 10 * i);
        svg_tick_x(&s, &axes, 0.1 * i, label);
    }
    svg_line(&s, svg_place(&axes, 1, 0), svg_place(&axes, 1, 1), limit);
    svg_text(&s, svg_place(&axes, 1, 1).x, axes.top - 5, 11, SVG_CENTRE, SVG_RED, "the limit");
    for (int g = 0; g < BENCH_GROUPS; g++) {
        if (!bench_group_rows(&bench_groups[g], results, count)) continue;
        y += (double)BENCH_GROUP_GAP;
        svg_text(&s, 24, y - 10, 13, SVG_LEFT, SVG_INK, "%s", bench_groups[g].title);
        for (int i = 0; i < count; i++)
            if (bench_in_group(&bench_groups[g], &results[i])) {
                bench_chart_row(&s, &axes, &results[i], y);
                y += (double)BENCH_ROW;
            }
    }
    return svg_close(&s);
}

#endif /* BENCH_CHART_H */
