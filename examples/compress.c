/* compress.c - hidden states and weights in safetensors files to compressed entries in another: compress --help
 *
 * The output is a function of the input files and the numeric options alone: threads, kernels and chunks leave its
 * bytes the same. */
#define _POSIX_C_SOURCE 200809L
#define DSV4_COMPRESSOR_IMPLEMENTATION
#include "dsv4_compressor.h"

#include "checkpoint.h"
#include "demo.h"
#include "gate_map.h"
#include "model_config.h"
#include "paths.h"
#include "pool.h"
#include "safetensors.h"
#include "compress_options.h"

#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <signal.h>
#include <unistd.h>

/* ---- What is done, and what it needs ----------------------------------------------------------------------- */

/* Where a setting comes from. */
typedef enum origin { STANDARD, CONFIG, METADATA, OPTION, FROM_APE, FROM_X, ORIGINS } origin;
static const char *const origins[ORIGINS] = {"standard", "config.json", "metadata", "option", "ape", "dtype of x"};

/* What one compressor does. */
typedef struct job {
    options o;
    struct run *run;
    checkpoint_compressor at;
    number values[SETTINGS];
    origin from[SETTINGS], named_from[NAMED];
    char preset[DSV4_ROUNDING_TEXT_SIZE];
    st_tensor *param[DSV4_PARAM_COUNT];
    const st_tensor *x, *dout;
    dsv4_config config;
    int64_t rows, tokens, entries; /* batch rows; tokens and entries of each */
    size_t row_bytes, scale_bytes; /* of an entry, packed */
    dsv4_compressor *compressor;
    dsv4_workspace *workspace;
    dsv4_segment *segments; /* one a row; none where rows are shorter than a window */
    dsv4_state **states;    /* one a segment, with chunks */
    int64_t segment_count;
    st_tensor results[12];
    int result_count;
    const char *isa;
    double pack_seconds, seconds;
} job;

/* All that one call of the program does: a job, or with --all one for each compressor. */
typedef struct run {
    options o;
    checkpoint weights;
    model_config config;
    char *config_path; /* NULL: none beside the weights */
    st_file input;
    pool *threads;
    job *jobs;
    int job_count;
} run;

/* What is not needed once the results are there. */
static void close_engine(job *j) {
    dsv4_workspace_destroy(j->workspace);
    for (int64_t i = 0; j->states && i < j->segment_count; i++) dsv4_state_destroy(j->states[i]);
    dsv4_compressor_destroy(j->compressor);
    free(j->states);
    j->workspace = NULL;
    j->states = NULL;
    j->compressor = NULL;
}

static void close_run(run *r) {
    for (int k = 0; k < r->job_count; k++) {
        job *j = &r->jobs[k];
        close_engine(j);
        for (int i = 0; i < j->result_count; i++) free((void *)(uintptr_t)j->results[i].data);
        free(j->segments);
    }
    pool_destroy(r->threads);
    free(r->jobs);
    checkpoint_close(&r->weights);
    model_config_close(&r->config);
    free(r->config_path);
    st_close(&r->input);
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

/* ---- Tensors ----------------------------------------------------------------------------------------------- */

enum { FULL_NAME_SIZE = 2 * ST_NAME_SIZE + 2, LONGEST_RESULT = sizeof ".latent" };

/* Whether hidden states or weights can be of the type. */
static int is_real(const st_tensor *t) { return t->dtype == ST_F32 || t->dtype == ST_BF16; }

/* The name of a result, or of a gradient that is read: with --all that of its compressor stands before it. */
static const char *full_name(const job *j, const char *name, char text[FULL_NAME_SIZE]) {
    const int dotted = j->o.all && *j->at.prefix;
    snprintf(text, FULL_NAME_SIZE, "%s%s%.*s", dotted ? j->at.prefix : "", dotted ? "." : "", ST_NAME_SIZE, name);
    return text;
}

/* The file that holds a parameter; wkv's stands for those that there are not. */
static checkpoint_shard *shard_of(const job *j, int param) {
    const checkpoint_name *name = j->at.param[j->at.param[param] ? param : DSV4_WKV];
    return &j->run->weights.shards[name->shard];
}

static const char *metadata(const job *j, const char *key) { return st_metadata(&shard_of(j, DSV4_WKV)->file, key); }

/* "; compressors there: 'a', 'b' and 7 more", those below the prefix if there are any. Nothing if it is one of them. */
static const char *other_compressors(const run *r, char *text, size_t size) {
    enum { SHOWN = 5 };
    const char *prefix = r->o.prefix ? r->o.prefix : "";
    checkpoint_compressor *list = NULL;
    int count = checkpoint_list(&r->weights, prefix, &list);
    const int itself = count > 0 && strncmp(list[0].prefix, prefix, strlen(list[0].prefix)) == 0;
    if (count == 0) count = checkpoint_list(&r->weights, "", &list);
    size_t used = (size_t)snprintf(text, size, count > 0 ? "; compressors there:" : "; no compressor is there");
    for (int i = 0; i < count && i < SHOWN && used < size; i++) {
        used += (size_t)snprintf(text + used, size - used, "%s '%.120s'", i ? "," : "", list[i].prefix);
    }
    if (count > SHOWN && used < size) snprintf(text + used, size - used, " and %d more", count - SHOWN);
    if (itself) *text = 0;
    free(list);
    return text;
}

static int missing_param(const job *j, int param) {
    const char *const *s = checkpoint_spellings[param];
    char others[1024];
    return fail(TROUBLE, "%s: no tensor '%s', '%s' or '%s' under prefix '%.80s'%s", j->run->weights.path, s[0], s[1],
                s[2], j->at.prefix, other_compressors(j->run, others, sizeof others));
}

/* Names and shapes; the numbers are not looked at. */
static int find_params(job *j) {
    char message[1024], prefix[ST_NAME_SIZE];
    memcpy(prefix, j->at.prefix, sizeof prefix);
    if (checkpoint_params(&j->run->weights, prefix, &j->at, message, sizeof message)) {
        return fail(TROUBLE, "%s", message);
    }
    if (!j->at.param[DSV4_WKV]) return missing_param(j, DSV4_WKV);
    if (!j->at.param[DSV4_NORM]) return missing_param(j, DSV4_NORM);
    for (int i = 0; i < DSV4_PARAM_COUNT; i++) {
        if (!j->at.param[i]) continue;
        j->param[i] = checkpoint_tensor(&j->run->weights, j->at.param[i], message, sizeof message);
        if (!j->param[i]) return fail(TROUBLE, "%s", message);
    }
    return 0;
}

/* The tensor beside `name` whose name ends so instead, NULL for none. */
static const checkpoint_name *beside(const checkpoint *c, const char *name, const char *ending) {
    const size_t whole = strlen(name), weight = strlen(".weight");
    const int dotted = whole > weight && strcmp(name + whole - weight, ".weight") == 0;
    char other[2 * ST_NAME_SIZE];
    snprintf(other, sizeof other, "%.*s%s", (int)(dotted ? whole - weight : whole), name, ending);
    return checkpoint_find(c, other);
}

/* The tensor of scales that makes `name` a quantised one, NULL for none. */
static const checkpoint_name *scales_of(const checkpoint *c, const char *name) {
    static const char *const endings[] = {".scale", ".weight_scale", ".weight_scale_inv", ".scales"};
    const checkpoint_name *found = NULL;
    for (size_t i = 0; i < sizeof endings / sizeof *endings && !found; i++) found = beside(c, name, endings[i]);
    return found;
}

static int check_param(const job *j, int param) {
    const st_tensor *t = j->param[param];
    const char *path = shard_of(j, param)->path;
    const checkpoint_name *scales = scales_of(&j->run->weights, t->name);
    const checkpoint_name *bias = beside(&j->run->weights, t->name, ".bias");
    if (bias) return fail(TROUBLE, "%s: '%s' has no place in a compressor", path, bias->name);
    if (scales) {
        return fail(TROUBLE,
                    "%s: tensor '%s' is quantised, %s with '%s'; the published models keep compressors in BF16", path,
                    t->name, t->type, scales->name);
    }
    if (!is_real(t)) {
        return fail(TROUBLE,
                    "%s: tensor '%s' is %.20s, not BF16, F32 or F16; the published models keep compressors in BF16",
                    path, t->name, t->type);
    }
    return 0;
}

/* head_dim, hidden_dim and overlap from norm [D] and wkv [coff * D, H]. */
static int read_widths(job *j) {
    const st_tensor *wkv = j->param[DSV4_WKV], *norm = j->param[DSV4_NORM];
    if (norm->ndim != 1 || norm->shape[0] < 1) return wrong_shape(shard_of(j, DSV4_NORM)->path, norm, "[head_dim]");
    const int64_t head_dim = norm->shape[0];
    if (wkv->ndim != 2 || (wkv->shape[0] != head_dim && wkv->shape[0] / 2 != head_dim) || wkv->shape[0] % head_dim) {
        return wrong_shape(shard_of(j, DSV4_WKV)->path, wkv,
                           "[head_dim or 2 * head_dim, hidden_dim], by the length of norm");
    }
    j->config.head_dim = head_dim;
    j->config.hidden_dim = wkv->shape[1];
    j->config.overlap = wkv->shape[0] != head_dim;
    return 0;
}

/* The ratio from ape [ratio, coff * D], or from the settings where there is none. An option must not contradict ape;
 * metadata may, as a file can hold compressors of several ratios. */
static int read_ape(job *j) {
    const st_tensor *ape = j->param[DSV4_APE];
    const int64_t width = j->param[DSV4_WKV]->shape[0], said = j->values[RATIO].whole;
    j->config.no_ape = !ape;
    j->config.ratio = said;
    if (!ape) return 0;
    if (ape->ndim != 2 || ape->shape[1] != width || ape->shape[0] < 1) {
        return wrong_shape(shard_of(j, DSV4_APE)->path, ape, "[ratio, as many as wkv has rows]");
    }
    if (j->o.settings[RATIO] && ape->shape[0] != said) {
        return fail(TROUBLE, "%s: '%s' has %" PRId64 " rows, but --ratio is %" PRId64, shard_of(j, DSV4_APE)->path,
                    ape->name, ape->shape[0], said);
    }
    j->config.ratio = ape->shape[0];
    j->from[RATIO] = FROM_APE;
    return 0;
}

/* An ape that has been lost must not be taken for one that never was. */
static int check_no_ape(const job *j) {
    const char *path = j->run->weights.path, *const *s = checkpoint_spellings[DSV4_APE];
    char others[1024];
    if (j->param[DSV4_APE]) {
        return j->o.no_ape ? fail(TROUBLE, "%s: --no-ape, but '%s' is there", path, j->param[DSV4_APE]->name) : 0;
    }
    if (!j->config.ratio) {
        return fail(TROUBLE, "%s: neither an ape nor metadata tell the ratio; give --ratio (and --no-ape)%s", path,
                    other_compressors(j->run, others, sizeof others));
    }
    if (!j->o.no_ape && !metadata(j, "ratio")) {
        return fail(TROUBLE, "%s: neither '%s' nor '%s' under prefix '%.80s'; --no-ape says that there is none%s", path,
                    s[0], s[2], j->at.prefix, other_compressors(j->run, others, sizeof others));
    }
    if (j->from[EPS] == STANDARD) {
        return fail(TROUBLE, "%s: neither an ape nor an eps; give --eps (DeepSeek-V4.1's is 1e-20)", path);
    }
    return 0;
}

static int read_gate(job *j) {
    const st_tensor *wkv = j->param[DSV4_WKV], *wgate = j->param[DSV4_WGATE];
    if (wgate && !has_shape(wgate, wkv->shape[0], wkv->shape[1])) {
        return wrong_shape(shard_of(j, DSV4_WGATE)->path, wgate, "of wkv's shape");
    }
    j->config.no_gate = !wgate;
    return 0;
}

/* ---- Settings ---------------------------------------------------------------------------------------------- */

/* All settings, those that are names behind the others: their keys. */
static const char *told_key(int i) {
    static const char *const names[NAMED] = {[PRESET] = "preset", [SUMS] = "sums", [ROWS] = "rows"};
    return i < TOLD ? settings[i].key : names[i - TOLD];
}

/* What is said of setting `i`, by whoever has the last word; `where` is the line's beginning if it is wrong. */
static const char *said_of(const job *j, int i, origin *from, char *where, size_t where_size) {
    const struct setting *s = &settings[i];
    const char *text = j->o.settings[i];
    *from = OPTION;
    snprintf(where, where_size, "%s", s->option);
    if (!text && s->stored && (text = metadata(j, s->key))) {
        *from = METADATA;
        snprintf(where, where_size, "%s: metadata '%s'", shard_of(j, DSV4_WKV)->path, s->key);
    }
    if (!text && s->stored && (text = model_config_setting(&j->run->config, s->key))) {
        *from = CONFIG;
        snprintf(where, where_size, "%s: %s", j->run->config_path, s->key);
    }
    return text;
}

static int read_settings(job *j) {
    char where[512];
    for (int i = 0; i < SETTINGS; i++) {
        const char *text = said_of(j, i, &j->from[i], where, sizeof where);
        j->values[i].real = settings[i].standard;
        j->values[i].whole = (int64_t)(settings[i].whole ? settings[i].standard : 0);
        if (!text) j->from[i] = STANDARD;
        if (text && parse_number(i, text, where, &j->values[i])) return TROUBLE;
    }
    return 0;
}

static int read_preset(job *j) {
    dsv4_error error = {DSV4_OK, ""};
    const char *wanted = j->o.preset, *path = shard_of(j, DSV4_WKV)->path;
    j->named_from[PRESET] = OPTION;
    if (!wanted && (wanted = metadata(j, "preset"))) j->named_from[PRESET] = METADATA;
    if (!wanted) {
        j->named_from[PRESET] = FROM_X;
        wanted = j->x->dtype == ST_BF16 ? "deepseek" : "none";
    }
    if (dsv4_rounding_parse(wanted, &j->config.rounding, &error) == DSV4_OK &&
        dsv4_rounding_name(j->config.rounding, j->preset, sizeof j->preset, &error) == DSV4_OK) {
        return 0;
    }
    return fail(TROUBLE, "%s%s: %s", j->o.preset ? "--preset" : path, j->o.preset ? "" : ": metadata 'preset'",
                error.text);
}

static const char *const sums_names[] = {[DSV4_SUMS_PAIRS] = "pairs", [DSV4_SUMS_TILES] = "tiles"};

/* What is said of a choice that has a name, by the option or the file; `where` is the line's beginning if it is
 * wrong. */
static const char *said_name(job *j, int which, const char *option, const char *standard, char *where, size_t size) {
    const char *key = told_key(TOLD + which), *text = option;
    j->named_from[which] = OPTION;
    snprintf(where, size, "--%s", key);
    if (text) return text;
    j->named_from[which] = METADATA;
    snprintf(where, size, "%s: metadata '%s'", shard_of(j, DSV4_WKV)->path, key);
    if ((text = metadata(j, key))) return text;
    j->named_from[which] = STANDARD;
    return standard;
}

static int read_sums(job *j) {
    char where[512];
    const char *wanted = said_name(j, SUMS, j->o.sums, sums_names[DSV4_SUMS_PAIRS], where, sizeof where);
    j->config.sums = strcmp(wanted, sums_names[DSV4_SUMS_TILES]) == 0 ? DSV4_SUMS_TILES : DSV4_SUMS_PAIRS;
    if (strcmp(wanted, sums_names[j->config.sums]) == 0) return 0;
    return fail(TROUBLE, "%s: no order of sums '%.40s'; there are pairs and tiles", where, wanted);
}

static int read_rows(job *j) {
    char where[512];
    const char *wanted = said_name(j, ROWS, j->o.rows, dsv4_rows_name(DSV4_ROWS_PLAIN), where, sizeof where);
    int rows = DSV4_ROWS_PLAIN;
    while (rows < DSV4_ROWS_COUNT && strcmp(wanted, dsv4_rows_name((dsv4_rows)rows)) != 0) rows++;
    if (rows == DSV4_ROWS_COUNT) {
        return fail(TROUBLE, "%s: '%.40s' is none of plain, fp8, fp8-keys, fp4, fp4-e4m3", where, wanted);
    }
    j->config.rows = (dsv4_rows)rows;
    if (j->o.packed && rows == DSV4_ROWS_PLAIN) {
        return fail(TROUBLE, "--packed: plain rows are not packed; --rows names a format");
    }
    return 0;
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

/* ---- Hidden states ----------------------------------------------------------------------------------------- */

/* A tensor of the input file, ready; NULL, and a line, where there is none. */
static const st_tensor *input_tensor(const job *j, const char *name) {
    const st_tensor *t = st_find(&j->run->input, name);
    if (!t) {
        complain("%s: no tensor '%.120s'", j->o.input, name);
    } else if (!is_real(t)) {
        complain("%s: tensor '%s' is %.20s, not BF16, F32 or F16", j->o.input, t->name, t->type);
    } else if (!t->data) {
        complain("%s: not enough memory for tensor '%s'", j->o.input, t->name);
    }
    return t && t->data ? t : NULL;
}

static int read_input(job *j) {
    const int64_t hidden_dim = j->config.hidden_dim, ratio = j->config.ratio;
    const st_tensor *x = j->x = input_tensor(j, j->o.tensor ? j->o.tensor : "x");
    if (!x) return TROUBLE;
    if ((x->ndim != 2 && x->ndim != 3) || x->shape[x->ndim - 1] != hidden_dim) {
        char wanted[128 + ST_NAME_SIZE];
        snprintf(wanted, sizeof wanted, "[batch, tokens, %" PRId64 "] or [tokens, %" PRId64 "]%s%s", hidden_dim,
                 hidden_dim, *j->at.prefix ? ", the hidden_dim of compressor " : "", j->at.prefix);
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
    char name[FULL_NAME_SIZE];
    if (!j->o.backward) return 0;
    const st_tensor *dout = j->dout = input_tensor(j, full_name(j, j->o.backward, name));
    if (!dout) return TROUBLE;
    const int64_t shape[3] = {j->rows, j->entries, j->config.head_dim};
    const int skipped = dout->ndim == 2 && j->rows == 1;
    if (dout->ndim != 3 - skipped || memcmp(dout->shape, shape + skipped, (size_t)dout->ndim * sizeof *shape) != 0) {
        return wrong_shape(j->o.input, dout, "of the shape of out");
    }
    return 0;
}

/* What the weights say, of dtypes that may not be read too. */
static int describe(job *j) {
    int status = find_params(j);
    if (!status) status = read_settings(j);
    if (!status) configure(j);
    if (!status) status = read_widths(j);
    if (!status) status = read_ape(j);
    if (!status) status = read_gate(j);
    return status;
}

static int load(job *j) {
    if (strlen(j->at.prefix) + LONGEST_RESULT > ST_NAME_SIZE) {
        return fail(TROUBLE, "--prefix: a name of %d characters is too long", (int)strlen(j->at.prefix));
    }
    int status = describe(j);
    for (int i = 0; i < DSV4_PARAM_COUNT && !status; i++) status = j->param[i] ? check_param(j, i) : 0;
    if (!status) status = check_no_ape(j);
    if (!status && j->config.no_gate && (j->config.ratio != 1 || j->config.overlap))
        status = missing_param(j, DSV4_WGATE);
    if (!status) status = read_input(j);
    if (!status) status = read_gradient(j);
    if (!status) status = read_preset(j);
    if (!status) status = read_sums(j);
    if (!status) status = read_rows(j);
    return status;
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

static int check_usage(const options *o) {
    const char *missing = !o->weights ? "--weights" : !o->input ? "--input" : !o->output ? "--output" : NULL;
    if (o->list && o->weights) missing = NULL;
    if (missing) return fail(USAGE, "%s is missing; --help lists the options", missing);
    if (o->list) return 0;
    if (o->plot && o->all) return fail(USAGE, "--plot draws one compressor, --all is for many");
    if (o->plot && strcmp(o->plot, o->output) == 0) {
        return fail(USAGE, "--plot and --output name one file, '%s'", o->output);
    }
    return 0;
}

static int is_output(const char *path, const char *input, const char *option, const char *reader) {
    if (!path_same_file(path, input)) return 0;
    return fail(TROUBLE, "%s: '%s' is a file that %s reads, and would be lost", option, path, reader);
}

/* Whether writing to `path`, which `option` gave, would destroy what is read, or could be: any shard is precious. */
static int check_output(const run *r, const char *option, const char *path) {
    int status = is_output(path, r->o.input, option, "--input");
    if (!status) status = is_output(path, r->weights.path, option, "--weights");
    if (!status && r->config_path) status = is_output(path, r->config_path, option, "--weights");
    for (int i = 0; i < r->weights.shard_count && !status; i++) {
        status = is_output(path, r->weights.shards[i].path, option, "--weights");
    }
    return status;
}

static int check_outputs(const run *r) {
    const options *o = &r->o;
    if (check_output(r, "--output", o->output)) return TROUBLE;
    if (!o->plot) return 0;
    char *partial = (char *)malloc(strlen(o->plot) + sizeof ".partial"); /* where a picture is drawn first */
    if (!partial) return fail(TROUBLE, "out of memory");
    sprintf(partial, "%s.partial", o->plot);
    const int status = check_output(r, "--plot", o->plot) || check_output(r, "--plot", partial);
    free(partial);
    if (!status && path_same_file(o->plot, o->output)) {
        return fail(TROUBLE, "--plot and --output name one file, '%s'", o->output);
    }
    return status ? TROUBLE : 0;
}

static int open_files(run *r) {
    const options *o = &r->o;
    char message[1024];
    int status = check_usage(o);
    if (!status) status = check_names(o);
    if (status) return status;
    if (checkpoint_open(&r->weights, o->weights, message, sizeof message)) return fail(TROUBLE, "%s", message);
    char *config = path_beside(r->weights.path, "config.json");
    if (config && path_exists(config)) {
        r->config_path = config;
    } else {
        free(config);
    }
    if (r->config_path && model_config_open(&r->config, r->config_path, message, sizeof message)) {
        return fail(TROUBLE, "%s", message);
    }
    if (o->list) return 0;
    if (st_open(&r->input, o->input, message, sizeof message)) return fail(TROUBLE, "%s", message);
    return check_outputs(r);
}

/* One job for the prefix, or one for each compressor at it or below. */
static int choose_compressors(run *r) {
    const char *prefix = r->o.prefix ? r->o.prefix : "";
    const int many = r->o.all || r->o.list;
    char others[1024];
    checkpoint_compressor *list = NULL;
    const int count = many ? checkpoint_list(&r->weights, prefix, &list) : 1;
    r->jobs = count < 1 ? NULL : (job *)calloc((size_t)count, sizeof *r->jobs);
    r->job_count = r->jobs ? count : 0;
    for (int i = 0; i < r->job_count; i++) {
        r->jobs[i].o = r->o;
        r->jobs[i].run = r;
        if (many) r->jobs[i].at = list[i];
        if (!many) snprintf(r->jobs[i].at.prefix, ST_NAME_SIZE, "%s", prefix);
    }
    free(list);
    if (r->jobs) return 0;
    if (count) return fail(TROUBLE, "out of memory");
    if (!*prefix) return fail(TROUBLE, "%s: no compressor is there", r->weights.path);
    return fail(TROUBLE, "%s: no compressor under prefix '%.80s'%s", r->weights.path, prefix,
                other_compressors(r, others, sizeof others));
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

static int start_threads(run *r) {
    const int64_t wanted = r->jobs->values[THREADS].whole ? r->jobs->values[THREADS].whole : processors();
    hold_stops(1); /* the workers never take them: they are the main thread's */
    r->threads = pool_create((int)wanted);
    hold_stops(0);
    return r->threads ? 0 : fail(TROUBLE, "out of memory");
}

/* Numbers are read as late as this, so that those of one compressor at a time are converted. */
static int ready_params(job *j) {
    for (int i = 0; i < DSV4_PARAM_COUNT; i++) {
        if (j->param[i] && st_ready(j->param[i])) return fail(TROUBLE, "not enough memory for '%s'", j->param[i]->name);
    }
    return 0;
}

static int prepare(job *j) {
    const double start = demo_seconds();
    const dsv4_allocator heap = dsv4_heap();
    const dsv4_options choices = {.isa = j->o.isa, .training = j->o.backward != NULL};
    const dsv4_params params = {library_matrix(j->param[DSV4_WKV]), library_matrix(j->param[DSV4_WGATE]),
                                library_matrix(j->param[DSV4_APE]), library_matrix(j->param[DSV4_NORM])};
    const dsv4_parallel parallel = pool_parallel(j->run->threads);
    dsv4_error error = {DSV4_OK, ""};
    if (dsv4_compressor_create(&j->config, &params, &choices, &heap, &j->compressor, &error) != DSV4_OK ||
        dsv4_workspace_create(j->compressor, &parallel, &heap, &j->workspace, &error) != DSV4_OK ||
        (j->o.packed && dsv4_row_sizes(&j->config, &j->row_bytes, &j->scale_bytes, &error) != DSV4_OK)) {
        return fail(TROUBLE, "%s", error.text);
    }
    j->config = *dsv4_compressor_config(j->compressor); /* with its defaults */
    j->isa = dsv4_compressor_isa(j->compressor);
    j->pack_seconds = demo_seconds() - start;
    return 0;
}

/* A tensor of zeros to write to and to be written, NULL where memory lacks. */
static void *add_result(job *j, const char *name, st_dtype dtype, int ndim, const int64_t *shape) {
    char full[FULL_NAME_SIZE];
    st_tensor *t = &j->results[j->result_count];
    *t = st_make(full_name(j, name, full), dtype, NULL, ndim, shape);
    void *data = t->count < 0 ? NULL : calloc((size_t)t->count + 1, st__size(dtype));
    if (!data) return NULL;
    t->data = data;
    j->result_count++;
    return data;
}

/* Rows and scales, as bytes; nonzero where memory lacks. */
static int add_packed(job *j, dsv4_batch *batch) {
    const int64_t rows_shape[3] = {j->rows, j->entries, (int64_t)j->row_bytes};
    const int64_t scales_shape[3] = {j->rows, j->entries, (int64_t)j->scale_bytes};
    batch->out.dtype = batch->scales.dtype = DSV4_PACKED;
    batch->out.data = add_result(j, "rows", ST_U8, 3, rows_shape);
    batch->scales.data = add_result(j, "scales", ST_U8, 3, scales_shape);
    return !batch->out.data || !batch->scales.data;
}

static int add_outputs(job *j, dsv4_batch *batch) {
    const dsv4_config *c = &j->config;
    const int64_t out[3] = {j->rows, j->entries, c->head_dim};
    const int64_t projected[3] = {j->rows, j->tokens, (1 + c->overlap) * c->head_dim};
    dsv4_stages *s = &batch->stages;
    int missing = j->o.packed ? add_packed(j, batch) : !(batch->out.data = add_result(j, "out", j->x->dtype, 3, out));
    if (j->o.stages) {
        missing |= !(s->kv = (float *)add_result(j, "kv", ST_F32, 3, projected));
        missing |= !c->no_gate && !(s->gate = (float *)add_result(j, "gate", ST_F32, 3, projected));
        missing |= !(s->pooled = (float *)add_result(j, "pooled", ST_F32, 3, out));
        missing |= !(s->latent = add_result(j, "latent", j->o.packed ? ST_BF16 : j->x->dtype, 3, out));
    }
    return missing ? fail(TROUBLE, "not enough memory for the results") : 0;
}

static void describe_batch(const job *j, dsv4_batch *batch) {
    batch->x = library_matrix(j->x);
    if (!batch->out.dtype) batch->out.dtype = batch->x.dtype;
    batch->tokens = j->rows * j->tokens;
    batch->entries = j->rows * j->entries;
    batch->segments = j->segments;
    batch->segment_count = j->segment_count;
}

/* Rows of x as segments: whole windows only, so that a dropped tail is not looked at however tokens are fed. */
static int lay_segments(job *j) {
    j->segment_count = j->rows;
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

/* A setting as it was used, with defaults filled in. */
static const char *setting_text(const job *j, int setting, char *text, size_t size) {
    const dsv4_config *c = &j->config;
    const int64_t whole[TOLD] = {[RATIO] = c->ratio, [ROPE_DIM] = c->rope_dim, [START] = j->values[START].whole};
    const double real[TOLD] = {[EPS] = (double)c->eps,          [THETA] = c->rope_theta,
                               [YARN_FACTOR] = c->yarn_factor,  [YARN_CONTEXT] = c->yarn_orig_ctx,
                               [YARN_FAST] = c->yarn_beta_fast, [YARN_SLOW] = c->yarn_beta_slow,
                               [PAD_GATE] = (double)c->pad_gate};
    if (settings[setting].whole) {
        snprintf(text, size, "%" PRId64, whole[setting]);
    } else {
        shortest_text(text, size, real[setting], setting == EPS || setting == PAD_GATE);
    }
    return text;
}

/* Its text and origin. */
static const char *told_text(const job *j, int i, char *text, size_t size) {
    if (i < TOLD) return setting_text(j, i, text, size);
    if (i == TOLD + PRESET) return j->preset;
    return i == TOLD + SUMS ? sums_names[j->config.sums] : dsv4_rows_name(j->config.rows);
}

static origin told_from(const job *j, int i) { return i < TOLD ? j->from[i] : j->named_from[i - TOLD]; }

/* What is written, of all jobs together. */
typedef struct harvest {
    st_tensor *results;
    int result_count;
    const char *(*metadata)[2];
    int metadata_count;
    char (*keys)[FULL_NAME_SIZE], (*values)[40];
} harvest;

/* The settings as metadata, so that the file says how it came about. */
static void gather(harvest *h, const job *j) {
    for (int i = 0; i < ALL_TOLD; i++) {
        char *key = h->keys[h->metadata_count], *value = h->values[h->metadata_count];
        const char **pair = h->metadata[h->metadata_count++];
        pair[0] = full_name(j, told_key(i), key);
        pair[1] = told_text(j, i, value, sizeof *h->values);
    }
    for (int i = 0; i < j->result_count; i++) h->results[h->result_count++] = j->results[i];
}

static int write_results(const run *r) {
    const size_t count = (size_t)r->job_count, pairs = count * ALL_TOLD;
    harvest h = {0};
    char message[1024] = "out of memory";
    h.results = (st_tensor *)calloc(count, sizeof r->jobs->results);
    h.metadata = (const char *(*)[2])calloc(pairs, sizeof *h.metadata);
    h.keys = (char(*)[FULL_NAME_SIZE])calloc(pairs, sizeof *h.keys);
    h.values = (char(*)[40])calloc(pairs, sizeof *h.values);
    int failed = 1;
    if (h.results && h.metadata && h.keys && h.values) {
        for (int i = 0; i < r->job_count; i++) gather(&h, &r->jobs[i]);
        failed = st_write(r->o.output, h.results, h.result_count, (const char *const(*)[2])h.metadata, h.metadata_count,
                          message, sizeof message);
    }
    free(h.results);
    free(h.metadata);
    free(h.keys);
    free(h.values);
    if (failed && r->o.plot) remove(r->o.plot);
    return failed ? fail(TROUBLE, "%s", message) : 0;
}

/* The gate weights of the first row's first windows, which are compressed once more for it. */
static int draw_gates(job *j) {
    const dsv4_config *c = &j->config;
    const int64_t window_rows = (1 + c->overlap) * c->ratio, most = PLOT_NUMBERS / c->head_dim / window_rows;
    const int64_t windows = j->entries < most ? j->entries : most > 1 ? most : 1;
    gate_map map = {0};
    dsv4_batch batch = {0};
    if (!j->o.plot) return 0;
    if (!j->entries) return fail(TROUBLE, "--plot: no whole window to draw");
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
static int write_files(run *r) {
    hold_stops(1);
    int status = draw_gates(r->jobs);
    if (!status) status = write_results(r);
    hold_stops(0);
    return status;
}

#include "compress_report.h"

static void list_isas(void) {
    for (int i = 0; dsv4_isa_name(i); i++) puts(dsv4_isa_name(i));
}

/* What was told has to have arrived. */
static int told(int status) {
    if (!fflush(stdout) && !ferror(stdout)) return status;
    return status ? status : fail(TROUBLE, "standard output: %s", strerror(errno));
}

/* With --all an engine goes when its results are there: weights are packed one compressor at a time. */
static int work(job *j) {
    int status = ready_params(j);
    if (!status) status = prepare(j);
    if (!status) status = compress_rows(j);
    if (!status) status = differentiate(j);
    if (j->o.all) close_engine(j);
    return status;
}

int main(int argc, char **argv) {
    run r = {0};
#ifdef SIGXFSZ
    signal(SIGXFSZ, SIG_IGN); /* a file-size limit is a failed write, to be reported and cleaned up */
#endif
    int status = parse_options(argc, argv, &r.o);
    if (!status && (r.o.help || r.o.version || r.o.list_isa)) {
        if (r.o.help) fputs(usage, stdout);
        if (r.o.version) puts("compress " DSV4_COMPRESSOR_VERSION);
        if (r.o.list_isa) list_isas();
        return told(0);
    }
    if (!status) status = open_files(&r);
    if (!status) status = choose_compressors(&r);
    if (!status && r.o.list) {
        status = list_compressors(&r);
    } else if (!status) {
        for (int i = 0; i < r.job_count && !status; i++) status = load(&r.jobs[i]);
        if (!status) status = start_threads(&r);
        for (int i = 0; i < r.job_count && !status; i++) status = work(&r.jobs[i]);
        if (!status) status = write_files(&r);
        if (!status) report(&r);
    }
    close_run(&r);
    return told(status);
}
