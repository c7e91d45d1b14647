/* compress.c - hidden states and weights in safetensors files to compressed entries in another: compress --help
 *
 * The output is a function of the input files and the numeric options alone: threads, kernels and chunks leave its
 * bytes the same. */
#define _POSIX_C_SOURCE 200809L
#define DSV4_COMPRESSOR_IMPLEMENTATION
#include "dsv4_compressor.h"

#include "demo.h"
#include "gate_map.h"
#include "paths.h"
#include "pool.h"
#include "safetensors.h"

#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <signal.h>
#include <unistd.h>

static const char usage[] =
    "compress --weights FILE [--prefix P] --input FILE [--tensor x] --output FILE [options]\n"
    "\n"
    "Reads weights (wkv, wgate, ape, norm; checkpoint spellings are known) and hidden states x [B, S, H] or [S, H],\n"
    "writes the compressed entries `out` [B, S / ratio, D]. Settings not given come from the weights file's metadata.\n"
    "\n"
    "  --preset NAME        where to round to bf16: none, deepseek, maxtext, transformers, transformers-5.8, vllm,\n"
    "                       nemo, megatron, or points such as projection+weight+pooled; default: deepseek for BF16 x,\n"
    "                       none for F32\n"
    "  --ratio M            tokens per entry, where there is no ape to tell\n"
    "  --rope-dim R         channels turned by RoPE (64)      --rope-theta T       its base (160000)\n"
    "  --yarn-factor F      1: no YaRN (16)                   --yarn-orig-ctx N    original context (65536)\n"
    "  --yarn-beta-fast X   (32)                              --yarn-beta-slow X   (1)\n"
    "  --eps E              RMSNorm's (1e-6)                  --pad-gate G         of rows before the first (-inf)\n"
    "  --start POSITION     of each row's first token (0)     --drop-tail          ignore what fills no window\n"
    "  --stages             also write kv, gate, pooled, latent\n"
    "  --backward NAME      read out's gradient from the input file, write dx, dwkv, dwgate, dape, dnorm\n"
    "  --chunk TOKENS       feed that many tokens of each row at a time\n"
    "  --threads N          default: as many as the machine has\n"
    "  --isa NAME           kernel set; --list-isa prints those that this CPU can run, best first\n"
    "  --plot FILE.svg      draw the gate weights\n"
    "  --json               report as one JSON object\n"
    "  --version\n"
    "\n"
    "--option=VALUE is --option VALUE.\n";

enum { TROUBLE = 1, USAGE = 2, OWN_CHUNK = 8192, LEAST_CHUNK = 256, PLOT_NUMBERS = 1 << 24 };

#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
static void
complain(const char *format, ...) {
    char line[2048];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    for (char *c = line; *c; c++) { /* what a name or a file's metadata holds must not make a second line */
        *c = (unsigned char)*c < 0x20 || *c == 0x7F ? '?' : *c;
    }
    fprintf(stderr, "compress: %s\n", line);
}

/* The line that a failure owes its user, and the exit status. */
#define fail(status, ...) (complain(__VA_ARGS__), (status))

/* ---- The command line -------------------------------------------------------------------------------------- */

/* Numbers that come from the command line, else from the weights file's metadata, else from `standard`. */
enum {
    RATIO,
    ROPE_DIM,
    START,
    THETA,
    YARN_FACTOR,
    YARN_CONTEXT,
    YARN_FAST,
    YARN_SLOW,
    EPS,
    PAD_GATE,
    CHUNK,
    THREADS,
    SETTINGS
};

static const struct setting {
    const char *option, *key;
    int whole;
    double low, high, standard; /* `high` belongs to the range of real numbers, not of whole ones */
    const char *range;
} settings[SETTINGS] = {
    {"--ratio", "ratio", 1, 1, 0x1p40, 0, "1 to 2^40 exclusive"},
    {"--rope-dim", "rope_dim", 1, 0, 0x1p40, 64, "0 to 2^40 exclusive"},
    {"--start", "start", 1, 0, 0x1p62, 0, "0 to 2^62 exclusive"},
    {"--rope-theta", "rope_theta", 0, 1, DBL_MAX, 160000, "1 and more"},
    {"--yarn-factor", "yarn_factor", 0, 0, DBL_MAX, 16, "0 and more"},
    {"--yarn-orig-ctx", "yarn_orig_ctx", 0, 0, DBL_MAX, 65536, "0 and more"},
    {"--yarn-beta-fast", "yarn_beta_fast", 0, DBL_MIN, DBL_MAX, 32, "above 0"},
    {"--yarn-beta-slow", "yarn_beta_slow", 0, DBL_MIN, DBL_MAX, 1, "above 0"},
    {"--eps", "eps", 0, FLT_MIN, FLT_MAX, 1e-6, "above 0, in fp32"},
    {"--pad-gate", NULL, 0, -HUGE_VAL, -FLT_MIN, -HUGE_VAL, "below 0, in fp32"},
    {"--chunk", NULL, 1, 1, 0x1p62, 0, "1 to 2^62 exclusive"},
    {"--threads", NULL, 1, 1, POOL_THREADS + 1, 0, "1 to 1024"},
};

typedef struct options {
    const char *weights, *prefix, *input, *tensor, *output, *preset, *isa, *backward, *plot;
    const char *settings[SETTINGS];
    int drop_tail, stages, json, list_isa, version, help;
} options;

typedef struct number {
    int64_t whole;
    double real;
} number;

/* An option's name and its place in `options`. */
typedef struct option_place {
    const char *name;
    size_t place;
} option_place;

#define OPTION(name, field) \
    { name, offsetof(options, field) }
static const option_place text_options[] = {
    OPTION("--weights", weights), OPTION("--prefix", prefix), OPTION("--input", input),
    OPTION("--tensor", tensor),   OPTION("--output", output), OPTION("--preset", preset),
    OPTION("--isa", isa),         OPTION("--plot", plot),     OPTION("--backward", backward),
};
static const option_place flags[] = {
    OPTION("--drop-tail", drop_tail),
    OPTION("--stages", stages),
    OPTION("--json", json),
    OPTION("--list-isa", list_isa),
    OPTION("--version", version),
    OPTION("--help", help),
    OPTION("-h", help),
};
#undef OPTION

enum { FLAGS = sizeof flags / sizeof *flags, TEXT_OPTIONS = sizeof text_options / sizeof *text_options };

/* The field of the option that `name` of `length` characters is, NULL for none. */
static void *find_option(options *o, const option_place *list, int count, const char *name, size_t length) {
    for (int i = 0; i < count; i++) {
        const int same = strlen(list[i].name) == length && memcmp(name, list[i].name, length) == 0;
        if (same) return (char *)o + list[i].place;
    }
    return NULL;
}

static const char **text_option(options *o, const char *name, size_t length) {
    for (int i = 0; i < SETTINGS; i++) {
        const char *option = settings[i].option;
        if (strlen(option) == length && memcmp(name, option, length) == 0) return &o->settings[i];
    }
    return (const char **)find_option(o, text_options, TEXT_OPTIONS, name, length);
}

/* --option value, --option=value and --flag. */
static int parse_options(int argc, char **argv, options *o) {
    for (int i = 1; i < argc; i++) {
        const char *name = argv[i], *equals = strchr(name, '=');
        const size_t length = equals ? (size_t)(equals - name) : strlen(name);
        int *flag = (int *)find_option(o, flags, FLAGS, name, length);
        const char **text = text_option(o, name, length);
        if (flag && equals) return fail(USAGE, "option '%.*s' takes no value", (int)length, name);
        if (!flag && !text) return fail(USAGE, "unknown option '%s'; --help lists them", name);
        if (text && !equals && i + 1 == argc) return fail(USAGE, "option '%s' needs a value", name);
        if (flag) *flag = 1;
        if (text) *text = equals ? equals + 1 : argv[++i];
    }
    return 0;
}

/* Reads setting `i` from `text`, which stood at `where`. */
static int parse_number(int i, const char *text, const char *where, number *value) {
    const struct setting *s = &settings[i];
    char *end = NULL;
    int inside;
    errno = 0;
    if (s->whole) {
        value->whole = strtoll(text, &end, 10);
        value->real = (double)value->whole;
        if (end != text && *end == '.') end += 1 + strspn(end + 1, "0"); /* metadata may spell 4 as 4.0 */
        inside = errno != ERANGE && value->whole >= (int64_t)s->low && value->whole < (int64_t)s->high;
    } else {
        value->real = strtod(text, &end);
        inside = value->real >= s->low && value->real <= s->high;
    }
    if (end == text || *end) {
        return fail(TROUBLE, "%s: '%.40s' is not a %snumber", where, text, s->whole ? "whole " : "");
    }
    return inside ? 0 : fail(TROUBLE, "%s: %.40s is out of range: %s", where, text, s->range);
}

/* ---- What is done, and what it needs ----------------------------------------------------------------------- */

typedef struct job {
    options o;
    number values[SETTINGS];
    char preset[DSV4_ROUNDING_TEXT_SIZE];
    st_file weights, input;
    const st_tensor *param[DSV4_PARAM_COUNT];
    const st_tensor *x, *dout;
    dsv4_config config;
    int64_t rows, tokens, entries; /* batch rows; tokens and entries of each */
    pool *threads;
    dsv4_compressor *compressor;
    dsv4_workspace *workspace;
    dsv4_segment *segments; /* one a row; none where rows are shorter than a window */
    dsv4_state **states;    /* one a segment, with chunks */
    int64_t segment_count;
    st_tensor results[10];
    int result_count;
    double pack_seconds, seconds;
} job;

static void close_job(job *j) {
    dsv4_workspace_destroy(j->workspace);
    for (int64_t i = 0; j->states && i < j->segment_count; i++) dsv4_state_destroy(j->states[i]);
    dsv4_compressor_destroy(j->compressor);
    pool_destroy(j->threads);
    for (int i = 0; i < j->result_count; i++) free((void *)(uintptr_t)j->results[i].data);
    free(j->states);
    free(j->segments);
    st_close(&j->weights);
    st_close(&j->input);
}

static const char *shape_text(const st_tensor *t, char *text, size_t size) {
    size_t used = (size_t)snprintf(text, size, "[");
    for (int i = 0; i < t->ndim; i++) {
        used += (size_t)snprintf(text + used, size - used, "%s%" PRId64, i ? ", " : "", t->shape[i]);
    }
    snprintf(text + used, size - used, "]");
    return text;
}

static int wrong_shape(const char *path, const st_tensor *t, const char *wanted) {
    char shape[256];
    return fail(TROUBLE, "%s: tensor '%s' is %s, not %s", path, t->name, shape_text(t, shape, sizeof shape), wanted);
}

static int has_shape(const st_tensor *t, int64_t rows, int64_t columns) {
    return t->ndim == 2 && t->shape[0] == rows && t->shape[1] == columns;
}

/* ---- Settings ---------------------------------------------------------------------------------------------- */

static int read_settings(job *j) {
    char where[512];
    for (int i = 0; i < SETTINGS; i++) {
        const char *text = j->o.settings[i];
        snprintf(where, sizeof where, "%s", settings[i].option);
        if (!text && settings[i].key) {
            text = st_metadata(&j->weights, settings[i].key);
            snprintf(where, sizeof where, "%s: metadata '%s'", j->o.weights, settings[i].key);
        }
        j->values[i].real = settings[i].standard;
        j->values[i].whole = (int64_t)(settings[i].whole ? settings[i].standard : 0);
        if (text && parse_number(i, text, where, &j->values[i])) return TROUBLE;
    }
    return 0;
}

static int read_preset(job *j) {
    dsv4_error error = {DSV4_OK, ""};
    const char *wanted = j->o.preset ? j->o.preset : st_metadata(&j->weights, "preset");
    if (!wanted) wanted = j->x->dtype == ST_BF16 ? "deepseek" : "none";
    if (dsv4_rounding_parse(wanted, &j->config.rounding, &error) == DSV4_OK &&
        dsv4_rounding_name(j->config.rounding, j->preset, sizeof j->preset, &error) == DSV4_OK) {
        return 0;
    }
    return fail(TROUBLE, "%s%s: %s", j->o.preset ? "--preset" : j->o.weights, j->o.preset ? "" : ": metadata 'preset'",
                error.text);
}

/* What the shapes do not tell. */
static void configure(job *j) {
    dsv4_config *c = &j->config;
    const number *v = j->values;
    c->rope_dim = v[ROPE_DIM].whole;
    c->eps = (float)v[EPS].real;
    c->pad_gate = v[PAD_GATE].real < -FLT_MAX ? -INFINITY : (float)v[PAD_GATE].real;
    c->rope_theta = v[THETA].real;
    c->yarn_factor = v[YARN_FACTOR].real;
    c->yarn_orig_ctx = v[YARN_CONTEXT].real;
    c->yarn_beta_fast = v[YARN_FAST].real;
    c->yarn_beta_slow = v[YARN_SLOW].real;
}

/* ---- Tensors ----------------------------------------------------------------------------------------------- */

static const char *const spellings[DSV4_PARAM_COUNT][3] = {
    {"wkv", "wkv.weight", "kv_proj.weight"},
    {"wgate", "wgate.weight", "gate_proj.weight"},
    {"ape", "ape", "position_bias"},
    {"norm", "norm.weight", "kv_norm.weight"},
};

/* The prefix may end in its dot or not. NULL where the file has no such parameter. */
static const st_tensor *find_param(const job *j, int param) {
    const char *prefix = j->o.prefix ? j->o.prefix : "";
    for (int i = 0; i < 6; i++) {
        char name[2 * ST_NAME_SIZE];
        snprintf(name, sizeof name, "%.*s%s%s", ST_NAME_SIZE, prefix, i < 3 ? "" : ".", spellings[param][i % 3]);
        const st_tensor *found = st_find(&j->weights, name);
        if (found) return found;
    }
    return NULL;
}

static int missing_param(const job *j, int param) {
    const char *const *s = spellings[param];
    return fail(TROUBLE, "%s: no tensor '%s', '%s' or '%s' under prefix '%.80s'", j->o.weights, s[0], s[1], s[2],
                j->o.prefix ? j->o.prefix : "");
}

static int check_dtype(const char *path, const st_tensor *t) {
    return t->dtype != ST_OTHER ? 0 : fail(TROUBLE, "%s: tensor '%s' is neither F32 nor BF16", path, t->name);
}

static int find_params(job *j) {
    for (int i = 0; i < DSV4_PARAM_COUNT; i++) {
        j->param[i] = find_param(j, i);
        if (j->param[i] && check_dtype(j->o.weights, j->param[i])) return TROUBLE;
    }
    if (!j->param[DSV4_WKV]) return missing_param(j, DSV4_WKV);
    if (!j->param[DSV4_NORM]) return missing_param(j, DSV4_NORM);
    return 0;
}

/* head_dim, hidden_dim and overlap from norm [D] and wkv [coff * D, H]. */
static int read_widths(job *j) {
    const st_tensor *wkv = j->param[DSV4_WKV], *norm = j->param[DSV4_NORM];
    if (norm->ndim != 1 || norm->shape[0] < 1) return wrong_shape(j->o.weights, norm, "[head_dim]");
    const int64_t head_dim = norm->shape[0];
    if (wkv->ndim != 2 || (wkv->shape[0] != head_dim && wkv->shape[0] / 2 != head_dim) || wkv->shape[0] % head_dim) {
        return wrong_shape(j->o.weights, wkv, "[head_dim or 2 * head_dim, hidden_dim], by the length of norm");
    }
    j->config.head_dim = head_dim;
    j->config.hidden_dim = wkv->shape[1];
    j->config.overlap = wkv->shape[0] != head_dim;
    return 0;
}

/* The ratio from ape [ratio, coff * D], or from the settings where there is none. An option must not contradict ape;
 * metadata may, as a file can hold compressors of several ratios. */
static int read_ratio(job *j) {
    const st_tensor *ape = j->param[DSV4_APE];
    const int64_t width = j->param[DSV4_WKV]->shape[0], said = j->values[RATIO].whole;
    if (!ape && !said) {
        return fail(TROUBLE, "%s: neither an ape nor metadata tell the ratio; give --ratio", j->o.weights);
    }
    if (ape && (ape->ndim != 2 || ape->shape[1] != width || ape->shape[0] < 1)) {
        return wrong_shape(j->o.weights, ape, "[ratio, as many as wkv has rows]");
    }
    if (ape && j->o.settings[RATIO] && ape->shape[0] != said) {
        return fail(TROUBLE, "%s: ape has %" PRId64 " rows, but --ratio is %" PRId64, j->o.weights, ape->shape[0],
                    said);
    }
    j->config.ratio = ape ? ape->shape[0] : said;
    j->config.no_ape = !ape;
    return 0;
}

static int read_gate(job *j) {
    const st_tensor *wkv = j->param[DSV4_WKV], *wgate = j->param[DSV4_WGATE];
    if (wgate && !has_shape(wgate, wkv->shape[0], wkv->shape[1])) {
        return wrong_shape(j->o.weights, wgate, "of wkv's shape");
    }
    j->config.no_gate = !wgate;
    if (!wgate && (j->config.ratio != 1 || j->config.overlap)) return missing_param(j, DSV4_WGATE);
    return 0;
}

static int read_input(job *j) {
    const char *name = j->o.tensor ? j->o.tensor : "x";
    const int64_t hidden_dim = j->param[DSV4_WKV]->shape[1], ratio = j->config.ratio;
    const st_tensor *x = j->x = st_find(&j->input, name);
    if (!x) return fail(TROUBLE, "%s: no tensor '%.80s'", j->o.input, name);
    if (check_dtype(j->o.input, x)) return TROUBLE;
    if ((x->ndim != 2 && x->ndim != 3) || x->shape[x->ndim - 1] != hidden_dim) {
        char wanted[80];
        snprintf(wanted, sizeof wanted, "[batch, tokens, %" PRId64 "] or [tokens, %" PRId64 "]", hidden_dim,
                 hidden_dim);
        return wrong_shape(j->o.input, x, wanted);
    }
    j->rows = x->ndim == 3 ? x->shape[0] : 1;
    j->tokens = x->shape[x->ndim - 2];
    j->entries = j->tokens / ratio;
    if (j->tokens % ratio && !j->o.drop_tail) {
        return fail(TROUBLE,
                    "%s: tensor '%s' has %" PRId64 " tokens a row, which ratio %" PRId64
                    " does not divide; --drop-tail ignores the last %" PRId64,
                    j->o.input, x->name, j->tokens, ratio, j->tokens % ratio);
    }
    return 0;
}

static int read_gradient(job *j) {
    if (!j->o.backward) return 0;
    const st_tensor *dout = j->dout = st_find(&j->input, j->o.backward);
    if (!dout) return fail(TROUBLE, "%s: no tensor '%.80s'", j->o.input, j->o.backward);
    if (check_dtype(j->o.input, dout)) return TROUBLE;
    const int64_t shape[3] = {j->rows, j->entries, j->config.head_dim};
    const int skipped = dout->ndim == 2 && j->rows == 1;
    if (dout->ndim != 3 - skipped || memcmp(dout->shape, shape + skipped, (size_t)dout->ndim * sizeof *shape) != 0) {
        return wrong_shape(j->o.input, dout, "of the shape of out");
    }
    return 0;
}

/* ---- Files ------------------------------------------------------------------------------------------------- */

/* Standard input and output are no files that could be mapped, or replaced as a whole. */
static int check_names(const options *o) {
    const char *const named[][2] = {
        {"--weights", o->weights}, {"--input", o->input}, {"--output", o->output}, {"--plot", o->plot}};
    for (size_t i = 0; i < sizeof named / sizeof *named; i++) {
        if (!named[i][1]) continue;
        if (!*named[i][1]) return fail(TROUBLE, "%s: an empty file name", named[i][0]);
        if (strcmp(named[i][1], "-") == 0) return fail(TROUBLE, "%s: '-' is not a file's name here", named[i][0]);
    }
    return 0;
}

/* Whether writing to `path`, which `option` gave, would destroy what is read. */
static int check_output(const options *o, const char *option, const char *path) {
    const char *const inputs[][2] = {{"--weights", o->weights}, {"--input", o->input}};
    for (int i = 0; i < 2; i++) {
        if (path_same_file(path, inputs[i][1])) {
            return fail(TROUBLE, "%s: '%s' is the file that %s reads, and would be lost", option, path, inputs[i][0]);
        }
    }
    return 0;
}

static int check_outputs(const options *o) {
    if (check_output(o, "--output", o->output)) return TROUBLE;
    if (!o->plot) return 0;
    char *partial = (char *)malloc(strlen(o->plot) + sizeof ".partial"); /* where a picture is drawn first */
    if (!partial) return fail(TROUBLE, "out of memory");
    sprintf(partial, "%s.partial", o->plot);
    const int status = check_output(o, "--plot", o->plot) || check_output(o, "--plot", partial);
    free(partial);
    if (!status && path_same_file(o->plot, o->output)) {
        return fail(TROUBLE, "--plot and --output name one file, '%s'", o->output);
    }
    return status ? TROUBLE : 0;
}

static int open_files(job *j) {
    const options *o = &j->o;
    const char *missing = !o->weights ? "--weights" : !o->input ? "--input" : !o->output ? "--output" : NULL;
    char message[1024];
    if (missing) return fail(USAGE, "%s is missing; --help lists the options", missing);
    if (o->plot && strcmp(o->plot, o->output) == 0) {
        return fail(USAGE, "--plot and --output name one file, '%s'", o->output);
    }
    if (check_names(o)) return TROUBLE;
    if (st_open(&j->weights, o->weights, message, sizeof message) ||
        st_open(&j->input, o->input, message, sizeof message)) {
        return fail(TROUBLE, "%s", message);
    }
    return check_outputs(o);
}

static int load(job *j) {
    int status = open_files(j);
    if (!status) status = read_settings(j);
    if (!status) configure(j);
    if (!status) status = find_params(j);
    if (!status) status = read_widths(j);
    if (!status) status = read_ratio(j);
    if (!status) status = read_gate(j);
    if (!status) status = read_input(j);
    if (!status) status = read_gradient(j);
    if (!status) status = read_preset(j);
    return status;
}

/* ---- Compressing ------------------------------------------------------------------------------------------- */

static dsv4_dtype library_dtype(const st_tensor *t) { return t->dtype == ST_BF16 ? DSV4_BF16 : DSV4_F32; }

static dsv4_const_matrix library_matrix(const st_tensor *t) {
    dsv4_const_matrix matrix = {0};
    if (t) {
        matrix.data = t->data;
        matrix.dtype = library_dtype(t);
    }
    return matrix;
}

static int64_t processors(void) {
#ifdef _SC_NPROCESSORS_ONLN
    const long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online < 1 ? 1 : online > POOL_THREADS ? POOL_THREADS : online;
#else
    return 1;
#endif
}

/* Makes requests to stop wait, for the calling thread and those that it starts, or lets them through. */
static void hold_stops(int hold) {
#ifdef SIGHUP /* POSIX, not Windows */
    sigset_t stops;
    sigemptyset(&stops);
    sigaddset(&stops, SIGHUP);
    sigaddset(&stops, SIGINT);
    sigaddset(&stops, SIGTERM);
    sigprocmask(hold ? SIG_BLOCK : SIG_UNBLOCK, &stops, NULL);
#else
    (void)hold;
#endif
}

static int prepare(job *j) {
    const double start = demo_seconds();
    const dsv4_allocator heap = dsv4_heap();
    const dsv4_options choices = {.isa = j->o.isa, .training = j->o.backward != NULL};
    const dsv4_params params = {library_matrix(j->param[DSV4_WKV]), library_matrix(j->param[DSV4_WGATE]),
                                library_matrix(j->param[DSV4_APE]), library_matrix(j->param[DSV4_NORM])};
    const int64_t wanted = j->values[THREADS].whole ? j->values[THREADS].whole : processors();
    dsv4_error error = {DSV4_OK, ""};
    hold_stops(1); /* the workers never take them: they are the main thread's */
    j->threads = pool_create((int)wanted);
    hold_stops(0);
    if (!j->threads) return fail(TROUBLE, "out of memory");
    const dsv4_parallel parallel = pool_parallel(j->threads);
    if (dsv4_compressor_create(&j->config, &params, &choices, &heap, &j->compressor, &error) != DSV4_OK ||
        dsv4_workspace_create(j->compressor, &parallel, &heap, &j->workspace, &error) != DSV4_OK) {
        return fail(TROUBLE, "%s", error.text);
    }
    j->pack_seconds = demo_seconds() - start;
    return 0;
}

/* A tensor of zeros to write to and to be written, NULL where memory lacks. */
static void *add_result(job *j, const char *name, st_dtype dtype, int ndim, const int64_t *shape) {
    st_tensor *t = &j->results[j->result_count];
    *t = st_make(name, dtype, NULL, ndim, shape);
    void *data = t->count < 0 ? NULL : calloc((size_t)t->count + 1, st__size(dtype));
    if (!data) return NULL;
    t->data = data;
    j->result_count++;
    return data;
}

static int add_outputs(job *j, dsv4_batch *batch) {
    const dsv4_config *c = &j->config;
    const int64_t out[3] = {j->rows, j->entries, c->head_dim};
    const int64_t projected[3] = {j->rows, j->tokens, (1 + c->overlap) * c->head_dim};
    dsv4_stages *s = &batch->stages;
    int missing = !(batch->out.data = add_result(j, "out", j->x->dtype, 3, out));
    if (j->o.stages) {
        missing |= !(s->kv = (float *)add_result(j, "kv", ST_F32, 3, projected));
        missing |= !c->no_gate && !(s->gate = (float *)add_result(j, "gate", ST_F32, 3, projected));
        missing |= !(s->pooled = (float *)add_result(j, "pooled", ST_F32, 3, out));
        missing |= !(s->latent = add_result(j, "latent", j->x->dtype, 3, out));
    }
    return missing ? fail(TROUBLE, "not enough memory for the results") : 0;
}

static void describe_batch(const job *j, dsv4_batch *batch) {
    batch->x = library_matrix(j->x);
    batch->out.dtype = batch->x.dtype;
    batch->tokens = j->rows * j->tokens;
    batch->entries = j->rows * j->entries;
    batch->segments = j->segments;
    batch->segment_count = j->segment_count;
}

/* Rows of x as segments: whole windows only, so that a dropped tail is not looked at however tokens are fed. */
static int lay_segments(job *j) {
    j->segment_count = j->entries ? j->rows : 0;
    j->segments = (dsv4_segment *)calloc((size_t)j->segment_count + 1, sizeof *j->segments);
    if (!j->segments) return fail(TROUBLE, "out of memory");
    for (int64_t i = 0; i < j->segment_count; i++) {
        j->segments[i].token = i * j->tokens;
        j->segments[i].count = j->entries * j->config.ratio;
        j->segments[i].position = j->values[START].whole;
        j->segments[i].entry = i * j->entries;
    }
    return 0;
}

static int create_states(job *j) {
    const dsv4_allocator heap = dsv4_heap();
    dsv4_error error = {DSV4_OK, ""};
    j->states = (dsv4_state **)calloc((size_t)j->segment_count + 1, sizeof(dsv4_state *));
    if (!j->states) return fail(TROUBLE, "out of memory");
    for (int64_t i = 0; i < j->segment_count; i++) {
        if (dsv4_state_create(j->compressor, 0, &heap, &j->states[i], &error) != DSV4_OK) {
            return fail(TROUBLE, "%s", error.text);
        }
    }
    return 0;
}

static void show_progress(int64_t done, int64_t total) {
    if (done < total) {
        fprintf(stderr, "\rcompressing: %3d %%", (int)(100.0 * (double)done / (double)total));
    } else {
        fputs("\r                 \r", stderr);
    }
}

static int run_batch(job *j, const dsv4_batch *batch) {
    dsv4_error error = {DSV4_OK, ""};
    return dsv4_compress(j->compressor, batch, j->workspace, &error) == DSV4_OK ? 0 : fail(TROUBLE, "%s", error.text);
}

/* All rows side by side, `chunk` tokens of each a call. */
static int run_in_chunks(job *j, const dsv4_batch *whole, int64_t chunk, int progress) {
    const size_t size = ((size_t)j->segment_count + 1) * sizeof *j->segments;
    dsv4_segment *parts = (dsv4_segment *)malloc(size);
    dsv4_batch batch = *whole;
    if (!parts) return fail(TROUBLE, "out of memory");
    int status = create_states(j);
    memcpy(parts, j->segments, size);
    batch.segments = parts;
    const int64_t total = j->segment_count ? j->segments[0].count : 0;
    for (int64_t done = 0, count; done < total && !status; done += count) {
        count = chunk < total - done ? chunk : total - done;
        const int64_t entries = done / j->config.ratio;
        for (int64_t i = 0; i < j->segment_count; i++) {
            parts[i].token = j->segments[i].token + done;
            parts[i].position = j->segments[i].position + done;
            parts[i].entry = j->segments[i].entry + entries;
            parts[i].count = count;
            parts[i].state = j->states[i];
        }
        status = run_batch(j, &batch);
        if (progress) show_progress(done + count, total);
    }
    free(parts);
    return status;
}

/* A long run on a terminal goes in chunks too, to have progress to show: the bytes are the same. */
static int compress_rows(job *j) {
    dsv4_batch batch = {0};
    const int progress = isatty(STDERR_FILENO) && j->rows * j->tokens > 2 * OWN_CHUNK;
    const int64_t own = progress && OWN_CHUNK / j->rows > LEAST_CHUNK ? OWN_CHUNK / j->rows : LEAST_CHUNK;
    const int64_t chunk = j->values[CHUNK].whole ? j->values[CHUNK].whole : progress ? own : 0;
    if (lay_segments(j) || add_outputs(j, &batch)) return TROUBLE;
    describe_batch(j, &batch);
    const double start = demo_seconds();
    const int status = chunk ? run_in_chunks(j, &batch, chunk, progress) : run_batch(j, &batch);
    j->seconds = demo_seconds() - start;
    return status;
}

/* ---- Gradients --------------------------------------------------------------------------------------------- */

static int add_gradients(job *j, dsv4_gradients *g) {
    static const char *const names[DSV4_PARAM_COUNT] = {"dwkv", "dwgate", "dape", "dnorm"};
    dsv4_matrix *const places[DSV4_PARAM_COUNT] = {&g->dwkv, &g->dwgate, &g->dape, &g->dnorm};
    g->dx.data = add_result(j, "dx", j->x->dtype, j->x->ndim, j->x->shape);
    g->dx.dtype = library_dtype(j->x);
    int missing = !g->dx.data;
    for (int i = 0; i < DSV4_PARAM_COUNT; i++) {
        if (!j->param[i]) continue;
        places[i]->data = add_result(j, names[i], ST_F32, j->param[i]->ndim, j->param[i]->shape);
        places[i]->dtype = DSV4_F32;
        missing |= !places[i]->data;
    }
    return missing ? fail(TROUBLE, "not enough memory for the gradients") : 0;
}

/* Of whole sequences, whatever the chunk: the gradient of one would need its successor's. */
static int differentiate(job *j) {
    dsv4_error error = {DSV4_OK, ""};
    dsv4_gradients gradients = {0};
    dsv4_batch batch = {0};
    if (!j->o.backward) return 0;
    if (add_gradients(j, &gradients)) return TROUBLE;
    gradients.dout = library_matrix(j->dout);
    describe_batch(j, &batch);
    if (dsv4_backward(j->compressor, &batch, &gradients, j->workspace, &error) != DSV4_OK) {
        return fail(TROUBLE, "%s", error.text);
    }
    return 0;
}

/* ---- What is written --------------------------------------------------------------------------------------- */

/* In six digits, or as many more as read back as the same number: 1e-06, not 9.99999997e-07. */
static void shortest_text(char *text, size_t size, double value, int is_float) {
    int digits = 5;
    double back;
    do {
        snprintf(text, size, "%.*g", ++digits, value);
        back = strtod(text, NULL);
    } while (digits < 17 && (is_float ? (double)(float)back : back) != value);
}

/* The same settings as metadata, so that the file says how it came about. */
static int write_results(const job *j) {
    const dsv4_config *c = dsv4_compressor_config(j->compressor);
    char text[10][40], message[1024];
    const char *const metadata[][2] = {
        {"ratio", text[0]},          {"rope_dim", text[1]},    {"start", text[2]},         {"eps", text[3]},
        {"rope_theta", text[4]},     {"yarn_factor", text[5]}, {"yarn_orig_ctx", text[6]}, {"yarn_beta_fast", text[7]},
        {"yarn_beta_slow", text[8]}, {"pad_gate", text[9]},    {"preset", j->preset}};
    const int64_t whole[3] = {c->ratio, c->rope_dim, j->values[START].whole};
    const double real[7] = {(double)c->eps,    c->rope_theta,     c->yarn_factor,     c->yarn_orig_ctx,
                            c->yarn_beta_fast, c->yarn_beta_slow, (double)c->pad_gate};
    for (int i = 0; i < 10; i++) {
        if (i < 3) {
            snprintf(text[i], sizeof *text, "%" PRId64, whole[i]);
        } else {
            shortest_text(text[i], sizeof *text, real[i - 3], i == 3 || i == 9);
        }
    }
    if (st_write(j->o.output, j->results, j->result_count, metadata, 11, message, sizeof message)) {
        if (j->o.plot) remove(j->o.plot);
        return fail(TROUBLE, "%s", message);
    }
    return 0;
}

/* The gate weights of the first row's first windows, which are compressed once more for it. */
static int draw_gates(job *j) {
    const dsv4_config *c = &j->config;
    const int64_t window_rows = (1 + c->overlap) * c->ratio, most = PLOT_NUMBERS / c->head_dim / window_rows;
    const int64_t windows = j->entries < most ? j->entries : most > 1 ? most : 1;
    gate_map map = {0};
    dsv4_batch batch = {0};
    if (!j->o.plot) return 0;
    if (!j->segment_count) return fail(TROUBLE, "--plot: no whole window to draw");
    const size_t numbers = (size_t)(windows * window_rows * c->head_dim);
    dsv4_segment first = j->segments[0];
    first.count = windows * c->ratio;
    describe_batch(j, &batch);
    batch.segments = &first;
    batch.segment_count = 1;
    batch.entries = windows;
    batch.out.data = malloc(numbers * sizeof(float));
    batch.stages.weights = (float *)calloc(numbers, sizeof(float));
    int status = batch.out.data && batch.stages.weights ? run_batch(j, &batch) : fail(TROUBLE, "out of memory");
    map.weights = batch.stages.weights;
    map.windows = windows;
    map.ratio = c->ratio;
    map.head_dim = c->head_dim;
    map.rope_dim = c->rope_dim;
    map.overlap = c->overlap;
    map.source = j->o.input;
    if (!status && gate_map_write(&map, j->o.plot)) status = fail(TROUBLE, "%s: %s", j->o.plot, strerror(errno));
    free(batch.stages.weights);
    free(batch.out.data);
    return status;
}

/* Asked to stop, the program does so before it writes or after: nothing half-written stays behind. */
static int write_files(job *j) {
    hold_stops(1);
    int status = draw_gates(j);
    if (!status) status = write_results(j);
    hold_stops(0);
    return status;
}

static void report(const job *j) {
    const double before = (double)j->x->count * (double)st__size(j->x->dtype);
    const double after = (double)j->results[0].count * (double)st__size(j->x->dtype);
    const double tokens = (double)j->rows * (double)j->tokens;
    const char *isa = dsv4_compressor_isa(j->compressor);
    const int threads = j->threads->workers + 1;
    if (j->o.json) {
        printf("{\"batch\": %" PRId64 ", \"tokens\": %.0f, \"entries\": %" PRId64 ", \"bytes_before\": %.0f, "
               "\"bytes_after\": %.0f, \"hidden_dim\": %" PRId64 ", \"head_dim\": %" PRId64 ", \"ratio\": %" PRId64
               ", \"overlap\": %s, \"preset\": \"%s\", \"dtype\": \"%s\", \"pack_seconds\": %.6f, \"seconds\": %.6f, "
               "\"tokens_per_s\": %.1f, \"isa\": \"%s\", \"threads\": %d}\n",
               j->rows, tokens, j->rows * j->entries, before, after, j->config.hidden_dim, j->config.head_dim,
               j->config.ratio, j->config.overlap ? "true" : "false", j->preset,
               j->x->dtype == ST_BF16 ? "BF16" : "F32", j->pack_seconds, j->seconds,
               j->seconds > 0 ? tokens / j->seconds : 0, isa, threads);
        return;
    }
    printf("%" PRId64 " x %" PRId64 " tokens -> %" PRId64 " x %" PRId64 " entries of %" PRId64 " numbers%s\n", j->rows,
           j->tokens, j->rows, j->entries, j->config.head_dim, j->x->dtype == ST_BF16 ? " in bf16" : "");
    printf("%.0f bytes of hidden states -> %.0f bytes of entries", before, after);
    printf(after > 0 ? ", %.0f times fewer\n" : "\n", before / after);
    printf("ratio %" PRId64 "%s, rounding as in preset %s\n", j->config.ratio,
           j->config.overlap ? ", overlapping windows" : "", j->preset);
    printf("%.3f s (%.0f tokens/s), and %.3f s to pack the weights; kernels %s, %d thread%s\n", j->seconds,
           j->seconds > 0 ? tokens / j->seconds : 0, j->pack_seconds, isa, threads, threads > 1 ? "s" : "");
    printf("entries: %s\n", j->o.output);
    if (j->o.plot) printf("picture: %s\n", j->o.plot);
}

static void list_isas(void) {
    for (int i = 0; dsv4_isa_name(i); i++) puts(dsv4_isa_name(i));
}

int main(int argc, char **argv) {
    job j = {0};
#ifdef SIGXFSZ
    signal(SIGXFSZ, SIG_IGN); /* a file-size limit is a failed write, to be reported and cleaned up */
#endif
    int status = parse_options(argc, argv, &j.o);
    if (!status && (j.o.help || j.o.version || j.o.list_isa)) {
        if (j.o.help) fputs(usage, stdout);
        if (j.o.version) puts("compress " DSV4_COMPRESSOR_VERSION);
        if (j.o.list_isa) list_isas();
        return 0;
    }
    if (!status) status = load(&j);
    if (!status) status = prepare(&j);
    if (!status) status = compress_rows(&j);
    if (!status) status = differentiate(&j);
    if (!status) status = write_files(&j);
    if (!status) report(&j);
    close_job(&j);
    return status;
}
