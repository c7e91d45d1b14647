/* train.c - a small compressor learns which token to keep: train [DIRECTORY]
 *
 * One token in each window of 4 is marked. Half of an entry's channels must carry what the marked token of its own
 * window says, the other half what that of the window before says; the other tokens are to be ignored. Only gates that
 * find the mark, and an overlap that reaches back, can do that. From seeded weights, by Adam, on fresh sequences in
 * every step. Leaves train.svg, the loss and the gates before and after, and train.safetensors, a checkpoint with the
 * names that DeepSeek's have, and a sequence to run it on. */
#define _POSIX_C_SOURCE 200809L
#define DSV4_COMPRESSOR_IMPLEMENTATION
#include "dsv4_compressor.h"

#include "demo.h"
#include "safetensors.h"
#include "svg.h"

#include <math.h>
#include <string.h>
#include <unistd.h>

enum { HIDDEN = 64, HEAD = 32, RATIO = 4, ROPE = 8, WINDOWS = 32, TOKENS = WINDOWS * RATIO, SEQUENCES = 8 };
enum { ENTRIES = SEQUENCES * WINDOWS, ROWS = 2 * RATIO, STEPS = 1000, SEED = 20 };

static int failed(dsv4_status status, const dsv4_error *error) {
    if (status != DSV4_OK) fprintf(stderr, "train: %s\n", error->text);
    return status != DSV4_OK;
}

/* ---- The task ------------------------------------------------------------------------------------------------- */

typedef struct task {
    float x[SEQUENCES * TOKENS][HIDDEN];
    float target[ENTRIES][HEAD];
    int marked[ENTRIES]; /* which token of the window */
} task;

/* A hidden state is a sum of orthogonal directions, Walsh's: HEAD carry the token's message, one the mark, the rest
 * noise. */
static void fill_token(float *x, const float *message, int marked, uint64_t seed) {
    for (int i = 0; i < HIDDEN; i++) x[i] = i < HEAD ? message[i] : demo_noise(seed * HIDDEN + (uint64_t)i);
    x[HEAD] = marked ? 1 : -1;
    for (int span = 1; span < HIDDEN; span *= 2) { /* from coefficients to the sum, in place */
        for (int i = 0; i < HIDDEN; i++) {
            const float a = x[i], b = x[i ^ span];
            if (i & span) continue;
            x[i] = a + b;
            x[i ^ span] = a - b;
        }
    }
    for (int i = 0; i < HIDDEN; i++) x[i] /= 8;
}

/* The entry carries its message turned by RoPE, as the compressor will turn it. */
static void turn(float *row, const float *inv_freq, int64_t position) {
    for (int i = 0; i < ROPE / 2; i++) {
        float *pair = row + HEAD - ROPE + 2 * i, a = pair[0], b = pair[1], c, s;
        dsv4_cos_sin((float)position * inv_freq[i], &c, &s);
        pair[0] = a * c - b * s;
        pair[1] = b * c + a * s;
    }
}

/* Channels that the window before has to fill; the first window has none before. */
static int is_wanted(int window, int channel) { return channel >= HEAD / 2 || window > 0; }

static void fill_window(task *t, int entry, const float *inv_freq, uint64_t seed) {
    const int window = entry % WINDOWS;
    float message[HEAD];
    t->marked[entry] = (int)(demo_bits(seed * ENTRIES + (uint64_t)entry) >> 32 & (RATIO - 1));
    for (int j = 0; j < RATIO; j++) {
        const int token = entry * RATIO + j;
        const uint64_t token_seed = seed * SEQUENCES * TOKENS + (uint64_t)token;
        const uint64_t signs = demo_bits(~token_seed);
        for (int i = 0; i < HEAD; i++) message[i] = signs >> i & 1 ? 1 : -1;
        fill_token(t->x[token], message, j == t->marked[entry], token_seed);
        if (j != t->marked[entry]) continue;
        for (int c = HEAD / 2; c < HEAD; c++) t->target[entry][c] = message[c];
        for (int c = 0; c < HEAD / 2 && window + 1 < WINDOWS; c++) t->target[entry + 1][c] = message[c];
    }
    turn(t->target[entry], inv_freq, (int64_t)window * RATIO);
}

static void fill_task(task *t, const float *inv_freq, uint64_t seed) {
    for (int entry = 0; entry < ENTRIES; entry++) fill_window(t, entry, inv_freq, seed);
}

/* ---- The model ------------------------------------------------------------------------------------------------ */

/* A parameter with its gradient and Adam's moments, all in one block that begins with `value`. */
typedef struct parameter {
    dsv4_param_info info;
    float *value, *gradient, *mean, *square;
} parameter;

typedef struct student {
    dsv4_config config;
    float inv_freq[ROPE / 2];
    parameter parameters[DSV4_PARAM_COUNT];
    dsv4_compressor *compressor;
    dsv4_workspace *workspace;
} student;

/* What a forward pass leaves. */
typedef struct answer {
    float kv[SEQUENCES * TOKENS][2 * HEAD], gate[SEQUENCES * TOKENS][2 * HEAD];
    float weights[ENTRIES][ROWS][HEAD];
    float out[ENTRIES][HEAD];
} answer;

static int student_init(student *s) {
    dsv4_param_info info[DSV4_PARAM_COUNT];
    dsv4_error error;
    s->config = (dsv4_config){.hidden_dim = HIDDEN, .head_dim = HEAD, .ratio = RATIO, .rope_dim = ROPE, .overlap = 1};
    if (failed(dsv4_config_params(&s->config, info, &error), &error)) return 1;
    if (failed(dsv4_rope_frequencies(&s->config, s->inv_freq, ROPE / 2, &error), &error)) return 1;
    for (int i = 0; i < DSV4_PARAM_COUNT; i++) {
        parameter *p = &s->parameters[i];
        p->info = info[i];
        p->value = (float *)calloc((size_t)info[i].count * 4, sizeof(float));
        if (!p->value) {
            fprintf(stderr, "train: out of memory\n");
            return 1;
        }
        p->gradient = p->value + info[i].count;
        p->mean = p->gradient + info[i].count;
        p->square = p->mean + info[i].count;
        const dsv4_matrix value = {p->value, DSV4_F32, 0};
        if (failed(dsv4_param_init(&s->config, (dsv4_param)i, SEED, value, &error), &error)) return 1;
    }
    return 0;
}

/* A compressor is packed from weights that stay; new weights make a new one. */
static int student_pack(student *s) {
    const dsv4_allocator heap = dsv4_heap();
    const dsv4_options options = {.training = 1};
    const parameter *p = s->parameters;
    const dsv4_params params = {.wkv = {p[DSV4_WKV].value, DSV4_F32, 0},
                                .wgate = {p[DSV4_WGATE].value, DSV4_F32, 0},
                                .ape = {p[DSV4_APE].value, DSV4_F32, 0},
                                .norm = {p[DSV4_NORM].value, DSV4_F32, 0}};
    dsv4_error error;
    dsv4_workspace_destroy(s->workspace);
    dsv4_compressor_destroy(s->compressor);
    s->workspace = NULL;
    s->compressor = NULL;
    return failed(dsv4_compressor_create(&s->config, &params, &options, &heap, &s->compressor, &error), &error) ||
           failed(dsv4_workspace_create(s->compressor, NULL, &heap, &s->workspace, &error), &error);
}

static void student_free(student *s) {
    for (int i = 0; i < DSV4_PARAM_COUNT; i++) free(s->parameters[i].value);
    dsv4_workspace_destroy(s->workspace);
    dsv4_compressor_destroy(s->compressor);
}

/* A batch over the task's sequences, a segment each. */
static dsv4_batch batch_of(const task *t, answer *a, dsv4_segment segments[SEQUENCES]) {
    for (int i = 0; i < SEQUENCES; i++)
        segments[i] = (dsv4_segment){.token = i * TOKENS, .count = TOKENS, .entry = (int64_t)i * WINDOWS};
    return (dsv4_batch){.x = {t->x, DSV4_F32, 0},
                        .tokens = SEQUENCES * TOKENS,
                        .out = {a->out, DSV4_F32, 0},
                        .entries = ENTRIES,
                        .segments = segments,
                        .segment_count = SEQUENCES};
}

static int forward(const student *s, const task *t, answer *a) {
    dsv4_segment segments[SEQUENCES];
    dsv4_error error;
    dsv4_batch batch = batch_of(t, a, segments);
    batch.stages = (dsv4_stages){.kv = a->kv[0], .gate = a->gate[0], .weights = a->weights[0][0]};
    return failed(dsv4_compress(s->compressor, &batch, s->workspace, &error), &error);
}

/* From the gradient of the entries to those of the parameters, with the projections that the forward pass kept. */
static int backward(const student *s, const task *t, answer *a, const float *dout) {
    dsv4_segment segments[SEQUENCES];
    dsv4_error error;
    dsv4_batch batch = batch_of(t, a, segments);
    const dsv4_gradients gradients = {.dout = {dout, DSV4_F32, 0},
                                      .dwkv = {s->parameters[DSV4_WKV].gradient, DSV4_F32, 0},
                                      .dwgate = {s->parameters[DSV4_WGATE].gradient, DSV4_F32, 0},
                                      .dape = {s->parameters[DSV4_APE].gradient, DSV4_F32, 0},
                                      .dnorm = {s->parameters[DSV4_NORM].gradient, DSV4_F32, 0}};
    batch.kv = a->kv[0];
    batch.gate = a->gate[0];
    return failed(dsv4_backward(s->compressor, &batch, &gradients, s->workspace, &error), &error);
}

/* ---- Learning ------------------------------------------------------------------------------------------------- */

/* Mean square of the entries' errors, and its gradient where `dout` is not NULL. */
static double loss_of(const task *t, const answer *a, float (*dout)[HEAD]) {
    const double count = (double)ENTRIES * HEAD - SEQUENCES * HEAD / 2.0;
    double loss = 0;
    for (int e = 0; e < ENTRIES; e++) {
        for (int c = 0; c < HEAD; c++) {
            const double wrong = is_wanted(e % WINDOWS, c) ? (double)(a->out[e][c] - t->target[e][c]) : 0;
            loss += wrong * wrong / count;
            if (dout) dout[e][c] = (float)(2 * wrong / count);
        }
    }
    return loss;
}

static void adam(parameter *p, int step, double rate) {
    const double keep_mean = 0.9, keep_square = 0.99;
    for (int64_t i = 0; i < p->info.count; i++) {
        const double g = (double)p->gradient[i];
        p->mean[i] = (float)(keep_mean * (double)p->mean[i] + (1 - keep_mean) * g);
        p->square[i] = (float)(keep_square * (double)p->square[i] + (1 - keep_square) * g * g);
        const double mean = (double)p->mean[i] / (1 - pow(keep_mean, step));
        const double square = (double)p->square[i] / (1 - pow(keep_square, step));
        p->value[i] -= (float)(rate * mean / (sqrt(square) + 1e-8));
    }
}

/* Over one line on a terminal; now and then a line elsewhere. */
static void report(int step, double loss) {
    const int terminal = isatty(STDOUT_FILENO), last = step == STEPS;
    if (!terminal && step % (STEPS / 10) != 0) return;
    printf("%sstep %4d of %d   loss %-10.3g%s", terminal ? "\r" : "", step, STEPS, loss, terminal && !last ? "" : "\n");
    fflush(stdout);
}

static int learn(student *s, task *t, answer *a, double losses[STEPS]) {
    static float dout[ENTRIES][HEAD];
    for (int step = 1; step <= STEPS; step++) {
        fill_task(t, s->inv_freq, (uint64_t)step);
        if (student_pack(s) || forward(s, t, a)) return 1;
        losses[step - 1] = loss_of(t, a, dout);
        if (backward(s, t, a, dout[0])) return 1;
        for (int i = 0; i < DSV4_PARAM_COUNT; i++)
            adam(&s->parameters[i], step, 0.03 * (1 - (double)step / (STEPS + 1)));
        report(step, losses[step - 1]);
    }
    return student_pack(s);
}

/* ---- Before and after ------------------------------------------------------------------------------------------- */

/* Row of its window's 2 RATIO that a channel should keep. */
static int row_wanted(const task *t, int entry, int channel) {
    return channel < HEAD / 2 ? t->marked[entry - 1] : RATIO + t->marked[entry];
}

/* Shares of right signs, and of the weight that lies on the marked tokens. */
static void print_answer(const char *when, const task *t, const answer *a) {
    double right = 0, weight = 0, count = 0;
    for (int e = 0; e < ENTRIES; e++) {
        for (int c = 0; c < HEAD; c++) {
            if (!is_wanted(e % WINDOWS, c)) continue;
            right += a->out[e][c] * t->target[e][c] > 0;
            weight += (double)a->weights[e][row_wanted(t, e, c)][c];
            count++;
        }
    }
    printf("%s   loss %-9.3g   right signs %5.1f %%   weight on the marked token %5.1f %%\n", when, loss_of(t, a, NULL),
           100 * right / count, 100 * weight / count);
}

enum { SHOWN = 4, CELL = 12, MAP_LEFT = 112, MAP_TOP = 496, MAP_PITCH = ROWS * CELL + 36, PAGE = 1080 };
enum { DOTS = 4 }; /* of a cell's side, so that viewers that smooth pictures do not blur one cell into the next */

static void draw_losses(svg *s, const double losses[STEPS]) {
    svg_axes axes = {MAP_LEFT, 120, PAGE - MAP_LEFT - 40, 220, 0, STEPS, 0, 1};
    svg_point points[STEPS];
    char label[32];
    for (int i = 0; i < STEPS; i++) axes.y0 = fmin(axes.y0, floor(log10(losses[i])));
    for (int y = (int)axes.y0; y <= 1; y++) {
        snprintf(label, sizeof label, "%g", pow(10, y));
        svg_tick_y(s, &axes, y, label);
    }
    for (int x = 0; x <= STEPS; x += STEPS / 10) {
        snprintf(label, sizeof label, "%s%d", x ? "" : "step ", x);
        svg_tick_x(s, &axes, x, label);
    }
    for (int i = 0; i < STEPS; i++) points[i] = svg_place(&axes, i + 1, log10(losses[i]));
    svg_polyline(s, points, STEPS, (svg_stroke){SVG_BLUE, 2, NULL});
    svg_text(s, axes.left, axes.top - 10, 13, SVG_LEFT, SVG_INK, "Loss: mean square of the entries' error");
}

/* One window's weights, [rows, channels]; frames where they should lie, and which tokens are marked. */
static void draw_window(svg *s, const task *t, const answer *a, int entry, double left, double top) {
    const svg_axes area = {left, top, HEAD * CELL, ROWS * CELL, 0, 1, 0, 1};
    svg_rgb dots[ROWS * DOTS][HEAD * DOTS];
    for (int y = 0; y < ROWS * DOTS; y++)
        for (int x = 0; x < HEAD * DOTS; x++) dots[y][x] = svg_heat((double)a->weights[entry][y / DOTS][x / DOTS]);
    svg_image(s, &area, dots[0], HEAD * DOTS, ROWS * DOTS);
    svg_frame(s, left, top, area.width, area.height, SVG_FAINT);
    svg_line(s, (svg_point){left - 4, top + RATIO * CELL}, (svg_point){left + area.width + 4, top + RATIO * CELL},
             (svg_stroke){SVG_INK, 1, NULL});
    for (int half = 0; half < 2; half++) {
        const double x = left + half * area.width / 2, y = top + row_wanted(t, entry, half * HEAD / 2) * CELL;
        svg_frame(s, x, y, area.width / 2, CELL, SVG_TEAL);
        svg_frame(s, x - 1, y - 1, area.width / 2 + 2, CELL + 2, SVG_TEAL);
    }
    for (int row = 0; row < ROWS; row++) {
        const int kept = row == row_wanted(t, entry, 0) || row == row_wanted(t, entry, HEAD - 1);
        svg_text(s, left - 8, top + row * CELL + CELL - 2, 10, SVG_RIGHT, kept ? SVG_TEAL : SVG_GREY, "%stoken %d",
                 kept ? "marked " : "", (entry - 1) * RATIO + row);
    }
    svg_text(s, left, top - 7, 12, SVG_LEFT, SVG_INK, "Entry %d", entry);
}

static void draw_gates(svg *s, const task *t, const answer *a, const char *title, double left) {
    const double width = HEAD * CELL, bottom = MAP_TOP + SHOWN * MAP_PITCH - 36;
    svg_text(s, left, MAP_TOP - 28, 14, SVG_LEFT, SVG_INK, "%s", title);
    for (int i = 0; i < SHOWN; i++) draw_window(s, t, a, 1 + i, left, MAP_TOP + i * MAP_PITCH);
    svg_text(s, left + width / 4, bottom + 18, 11, SVG_CENTRE, SVG_GREY, "channels for the window before");
    svg_text(s, left + 3 * width / 4, bottom + 18, 11, SVG_CENTRE, SVG_GREY, "channels for its own window");
}

static void draw_key(svg *s) {
    const svg_axes bar = {PAGE - 40 - 200, MAP_TOP - 92, 200, 10, 0, 1, 0, 1};
    svg_rgb cells[200];
    for (int i = 0; i < 200; i++) cells[i] = svg_heat(i / 199.0);
    svg_text(s, MAP_LEFT, MAP_TOP - 82, 16, SVG_LEFT, SVG_INK, "Gates of a sequence that was not learned from");
    svg_text(s, MAP_LEFT, MAP_TOP - 62, 13, SVG_LEFT, SVG_GREY,
             "Above the line: tokens of the window before. Below it: the entry's own window.");
    svg_image(s, &bar, cells, 200, 1);
    svg_frame(s, bar.left, bar.top, bar.width, bar.height, SVG_FAINT);
    svg_text(s, bar.left - 6, bar.top + 9, 11, SVG_RIGHT, SVG_GREY, "weight 0");
    svg_text(s, bar.left + 206, bar.top + 9, 11, SVG_LEFT, SVG_GREY, "1");
    svg_frame(s, bar.left, bar.top + 18, 24, 10, SVG_TEAL);
    svg_text(s, bar.left + 30, bar.top + 27, 11, SVG_LEFT, SVG_GREY, "where the weight should lie");
}

static int draw(const char *path, const double losses[STEPS], const task *t, const answer *before,
                const answer *after) {
    svg s;
    if (svg_open(&s, path, PAGE, MAP_TOP + SHOWN * MAP_PITCH + 10) == 0) {
        svg_text(&s, MAP_LEFT, 36, 20, SVG_LEFT, SVG_INK, "A compressor learns which token to keep");
        svg_text(
            &s, MAP_LEFT, 58, 13, SVG_LEFT, SVG_GREY,
            "One token in each window of %d is marked. The left half of an entry's %d channels must carry what the "
            "marked token of the window before",
            RATIO, HEAD);
        svg_text(&s, MAP_LEFT, 76, 13, SVG_LEFT, SVG_GREY,
                 "says, the right half what that of its own window says. All other tokens are noise.");
        draw_losses(&s, losses);
        draw_key(&s);
        draw_gates(&s, t, before, "Before: seeded weights", MAP_LEFT);
        draw_gates(&s, t, after, "After", PAGE - 40 - HEAD * CELL);
    }
    if (svg_close(&s) == 0) return 0;
    fprintf(stderr, "train: cannot write %s\n", path);
    return 1;
}

/* The parameters under DeepSeek's names, and the test's first sequence. */
static int save(const char *path, const student *s, const task *t) {
    static const char *const names[] = {"wkv.weight", "wgate.weight", "ape", "norm.weight"};
    static const char *const metadata[][2] = {{"kind", "csa"},      {"preset", "none"}, {"ratio", "4"},
                                              {"rope_dim", "8"},    {"eps", "1e-06"},   {"rope_theta", "160000"},
                                              {"yarn_factor", "1"}, {"start", "0"}};
    const int64_t x_shape[3] = {1, TOKENS, HIDDEN};
    st_tensor tensors[DSV4_PARAM_COUNT + 1];
    char message[1024];
    for (int i = 0; i < DSV4_PARAM_COUNT; i++) {
        const parameter *p = &s->parameters[i];
        const int64_t shape[2] = {p->info.rows, p->info.columns};
        const int vector = i == DSV4_NORM;
        tensors[i] = st_make(names[i], ST_F32, p->value, vector ? 1 : 2, shape + vector);
    }
    tensors[DSV4_PARAM_COUNT] = st_make("x", ST_F32, t->x, 3, x_shape);
    if (st_write(path, tensors, DSV4_PARAM_COUNT + 1, metadata, 8, message, sizeof message) == 0) return 0;
    fprintf(stderr, "train: %s\n", message);
    return 1;
}

int main(int argc, char **argv) {
    static student s;
    static task lessons, test;
    static answer scratch, before, after;
    static double losses[STEPS];
    char picture[1024], checkpoint[1024];
    const char *directory = argc > 1 ? argv[1] : ".";
    const double start = demo_seconds();
    if (argc > 2 || strlen(directory) > 1000) {
        fprintf(stderr, "usage: train [DIRECTORY]\n");
        return 2;
    }
    snprintf(picture, sizeof picture, "%s/train.svg", directory);
    snprintf(checkpoint, sizeof checkpoint, "%s/train.safetensors", directory);
    int wrong = student_init(&s) || student_pack(&s);
    if (!wrong) fill_task(&test, s.inv_freq, 0);
    wrong = wrong || forward(&s, &test, &before) || learn(&s, &lessons, &scratch, losses) || forward(&s, &test, &after);
    wrong = wrong || draw(picture, losses, &test, &before, &after) || save(checkpoint, &s, &test);
    student_free(&s);
    if (wrong) return 1;
    const double fell = loss_of(&test, &before, NULL) / loss_of(&test, &after, NULL);
    print_answer("before", &test, &before);
    print_answer("after ", &test, &after);
    printf("the loss fell by %.0f x in %.1f s; see %s and %s\n", fell, demo_seconds() - start, picture, checkpoint);
    return fell < 100;
}
