/* compress_options.h - the command line of compress.c: its help, its options, and how a failure is told. */

#ifndef COMPRESS_OPTIONS_H
#define COMPRESS_OPTIONS_H

#include "dsv4_compressor.h"
#include "pool.h"

#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char usage[] =
    "compress --weights FILE [--prefix P | --all] --input FILE [--tensor x] --output FILE [options]\n"
    "compress --weights FILE [--prefix P] --list [--json]\n"
    "\n"
    "Reads weights (wkv, wgate, ape, norm; checkpoint spellings are known) and hidden states x [B, S, H] or [S, H],\n"
    "writes the compressed entries `out` [B, S / ratio, D]. Weights are a safetensors file, a checkpoint's\n"
    "model.safetensors.index.json, or its folder. Settings not given come from the weights file's metadata, else from\n"
    "the config.json beside it.\n"
    "\n"
    "  --list               print the compressors there, and the published models' whose sizes they have\n"
    "  --all                compress with each of them (below the prefix), results named by their prefixes\n"
    "  --preset NAME        where to round to bf16: none, deepseek, maxtext, transformers, transformers-5.8, vllm,\n"
    "                       nemo, megatron, or points such as projection+weight+pooled; default: deepseek for BF16 x,\n"
    "                       none for F32\n"
    "  --sums ORDER         in which bf16 products are added: pairs, or tiles, made for Xeons with AMX; each gives\n"
    "                       the same bytes on every CPU (pairs)\n"
    "  --rows FORMAT        what caches make of entries, fp8, fp8-keys, fp4 or fp4-e4m3; out is what is read back\n"
    "  --packed             write their bytes instead: rows and scales\n"
    "  --ratio M            tokens per entry, where there is no ape to tell\n"
    "  --no-ape             there is none (DeepSeek-V4.1)\n"
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
    "  --json               report as one JSON object; with --all and --list, one a line\n"
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

/* The line that a failure owes its user, and the exit status: as a macro, so that analysers see that it is not 0. */
#define fail(status, ...) (complain(__VA_ARGS__), (status))

/* ---- The command line -------------------------------------------------------------------------------------- */

/* Numbers that come from the command line, else from the weights file's metadata, else from config.json, else from
 * `standard`. The first ones make the result what it is, and are told with it. */
enum {
    RATIO,
    ROPE_DIM,
    START,
    EPS,
    THETA,
    YARN_FACTOR,
    YARN_CONTEXT,
    YARN_FAST,
    YARN_SLOW,
    PAD_GATE,
    TOLD,
    CHUNK = TOLD,
    THREADS,
    SETTINGS
};

/* And those that are names, which are told behind them. */
enum { PRESET, SUMS, ROWS, NAMED, ALL_TOLD = TOLD + NAMED };

static const struct setting {
    const char *option, *key;
    int stored, whole;          /* stored: files may give it under its key */
    double low, high, standard; /* `high` belongs to the range of real numbers, not of whole ones */
    const char *range;
} settings[SETTINGS] = {
    {"--ratio", "ratio", 1, 1, 1, 0x1p40, 0, "1 to 2^40 exclusive"},
    {"--rope-dim", "rope_dim", 1, 1, 0, 0x1p40, 64, "0 to 2^40 exclusive"},
    {"--start", "start", 1, 1, 0, 0x1p62, 0, "0 to 2^62 exclusive"},
    {"--eps", "eps", 1, 0, FLT_MIN, FLT_MAX, 1e-6, "above 0, in fp32"},
    {"--rope-theta", "rope_theta", 1, 0, 1, DBL_MAX, 160000, "1 and more"},
    {"--yarn-factor", "yarn_factor", 1, 0, 0, DBL_MAX, 16, "0 and more"},
    {"--yarn-orig-ctx", "yarn_orig_ctx", 1, 0, 0, DBL_MAX, 65536, "0 and more"},
    {"--yarn-beta-fast", "yarn_beta_fast", 1, 0, DBL_MIN, DBL_MAX, 32, "above 0"},
    {"--yarn-beta-slow", "yarn_beta_slow", 1, 0, DBL_MIN, DBL_MAX, 1, "above 0"},
    {"--pad-gate", "pad_gate", 0, 0, -HUGE_VAL, -FLT_MIN, -HUGE_VAL, "below 0, in fp32"},
    {"--chunk", "chunk", 0, 1, 1, 0x1p62, 0, "1 to 2^62 exclusive"},
    {"--threads", "threads", 0, 1, 1, POOL_THREADS + 1, 0, "1 to 1024"},
};

typedef struct options {
    const char *weights, *prefix, *input, *tensor, *output, *preset, *sums, *rows, *isa, *backward, *plot;
    const char *settings[SETTINGS];
    int no_ape, drop_tail, stages, packed, all, list, json, list_isa, version, help;
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
    OPTION("--weights", weights), OPTION("--prefix", prefix),     OPTION("--input", input), OPTION("--tensor", tensor),
    OPTION("--output", output),   OPTION("--preset", preset),     OPTION("--sums", sums),   OPTION("--isa", isa),
    OPTION("--plot", plot),       OPTION("--backward", backward), OPTION("--rows", rows),
};
static const option_place flags[] = {
    OPTION("--no-ape", no_ape),   OPTION("--drop-tail", drop_tail),
    OPTION("--stages", stages),   OPTION("--all", all),
    OPTION("--packed", packed),   OPTION("--list", list),
    OPTION("--json", json),       OPTION("--list-isa", list_isa),
    OPTION("--version", version), OPTION("--help", help),
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

#endif /* COMPRESS_OPTIONS_H */
