/* bench.c - how fast this machine compresses, as shares of what it could do at most.
 *
 * The limits (multiply-adds per second, bytes read per second) and the cases are measured in alternation, so that both
 * meet the same clock frequency and the same neighbours; what is printed are medians. */

#define _POSIX_C_SOURCE 200809L
#define DSV4_COMPRESSOR_IMPLEMENTATION
#include "dsv4_compressor.h"

#include <fnmatch.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench_limits.h"
#include "bench_cases.h"
#include "bench_chart.h"
#include "pool.h"

typedef struct bench_settings {
    const char *only, *isa, *svg;
    int threads, json, list, quick, full, cpu_time, help;
} bench_settings;

typedef struct bench {
    bench_settings settings;
    bench_cold cold;
    pool *pool; /* of the row being measured; NULL for one thread */
    dsv4_parallel parallel;
    bench_result results[BENCH_CASES * 8];
    int count;
    char machine[160];
} bench;

static void print_help(void) {
    puts(
        "usage: bench [options]\n"
        "\n"
        "  --only NAME    the cases of that name; * and ? stand for any text, any character\n"
        "  --threads N    run on N threads; the limits are then those of N threads (1)\n"
        "  --isa NAME     kernel set, one of those this CPU can run (the best)\n"
        "  --full         also on twice the threads, and by the CPU's other vector kernels, where these matter\n"
        "  --quick        three rounds instead of seven (five where a run takes over half a second)\n"
        "  --cpu-time     count the processor's time instead of the clock's: for a machine that others keep busy, and\n"
        "                 one thread only\n"
        "  --svg FILE     draw the shares as a bar chart\n"
        "  --json         one JSON object a line\n"
        "  --list         names of the cases\n"
        "\n"
        "A case is measured against the limit that it could reach at best, in the same seconds:\n"
        "  prefill, backward, decode-32   GFLOP/s of the multiply-add that the kernel set uses for these operands:\n"
        "                                 avx512bf16: VDPBF16PS for bf16, FMA 512-bit for f32; avx512: FMA 512-bit;\n"
        "                                 avx2: FMA 256-bit; neon, simde: FMA 128-bit; scalar: FMA scalar;\n"
        "                                 for `tiles` amx: TDPBF16PS, avx512bf16: FMA 512-bit\n"
        "  decode-1, decode-8             GB/s of reading, for the bytes of wkv and wgate\n"
        "  pool                           GB/s of reading, for the bytes of kv and gate\n"
        "FLOPs are those of the projections: forward 4 T H coff D, backward 8 T H coff D (for dx and the weights'\n"
        "gradients; the projections themselves are kept from the forward pass, not recomputed); pool: 2 T coff D.\n"
        "Cold data is cycled through more memory than the last-level cache holds.");
}

/* ============================================================================================================
 * Measuring
 * ============================================================================================================ */

enum { ROUNDS = 7, LONG_ROUNDS = 5, QUICK_ROUNDS = 3 };

static int compare_numbers(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *numbers, int count) {
    qsort(numbers, (size_t)count, sizeof *numbers, compare_numbers);
    return 0.5 * (numbers[(count - 1) / 2] + numbers[count / 2]);
}

static const dsv4_parallel *parallel_of(const bench *b) { return b->pool ? &b->parallel : NULL; }

/* At least twice the last-level cache, but no more than an eighth of the memory. */
static int prepare_cold(bench *b) {
    const size_t block = BENCH_READ_BLOCK, least = (size_t)256 << 20, cache = bench_last_level_cache();
    size_t size = cache / 2 * 5;
    if (b->cold.bytes) return 0;
    size = size > least ? size : least;
#ifdef _SC_PHYS_PAGES
    const size_t eighth = (size_t)sysconf(_SC_PHYS_PAGES) / 8 * (size_t)sysconf(_SC_PAGESIZE);
    size = size < eighth ? size : eighth;
#endif
    b->cold.size = size / block * block;
    if (posix_memalign((void **)&b->cold.bytes, BENCH_PAGE, b->cold.size + BENCH_AHEAD_MOST + block) != 0) return -1;
    bench_random_f32((float *)(void *)b->cold.bytes, (b->cold.size + BENCH_AHEAD_MOST + block) / sizeof(float), 4);
    bench_read_choose(&b->cold);
    if (b->cold.size < 2 * cache)
        fprintf(stderr, "bench: %zu MiB of memory for %zu MiB of cache: cold data may be partly cached\n",
                b->cold.size >> 20, cache >> 20);
    return 0;
}

static double limit_rate(bench *b, const bench_case *what, const bench_peak *peak) {
    if (what->kind == BENCH_UNPACK) return bench_copy_rate(&b->cold);
    if (what->cold) return bench_read_rate(&b->cold, &b->cold.best, parallel_of(b), (size_t)96 << 20);
    return bench_peak_rate(peak, parallel_of(b), 0.03);
}

/* Limit, case, limit, case, ...: medians of both. */
static dsv4_status measure(bench *b, bench_work *work, bench_result *result) {
    const bench_peak *peak = bench_peak_of_isa(result->isa, result->what->dtype, result->what->sums);
    double limits[ROUNDS + 1], seconds[ROUNDS];
    double start = bench_now();
    dsv4_status status = bench_run_once(work); /* warms up, and tells how many runs make a sample worth timing */
    const double once = bench_now() - start;
    const int rounds = b->settings.quick ? QUICK_ROUNDS : once > 0.5 ? LONG_ROUNDS : ROUNDS;
    const int runs = once < 0.03 ? 1 + (int)(0.03 / (once > 1e-4 ? once : 1e-4)) : 1;
    for (int warm = 0; warm < 4; warm++) (void)limit_rate(b, result->what, peak); /* idle memory is slow at first */
    for (int round = 0; round < rounds && status == DSV4_OK; round++) {
        limits[round] = limit_rate(b, result->what, peak);
        start = bench_now();
        for (int run = 0; run < runs && status == DSV4_OK; run++) status = bench_run_once(work);
        seconds[round] = (bench_now() - start) / runs;
    }
    limits[rounds] = limit_rate(b, result->what, peak);
    if (status != DSV4_OK) return status;
    const double time = median(seconds, rounds);
    result->tokens_per_s = work->tokens / time;
    result->gflops = 1e-9 * work->flops / time;
    result->gbytes_per_s = 1e-9 * work->bytes / time;
    result->limit = median(limits, rounds + 1);
    result->limit_name = !result->what->cold                  ? peak->name
                         : result->what->kind == BENCH_UNPACK ? "read and write"
                                                              : "read";
    result->ratio = (result->what->cold ? result->gbytes_per_s : result->gflops) / result->limit;
    return DSV4_OK;
}

/* ============================================================================================================
 * Printing
 * ============================================================================================================ */

static void describe_machine(bench *b) {
    char line[256], model[100] = "";
    FILE *file = fopen("/proc/cpuinfo", "r");
    while (file && !*model && fgets(line, sizeof line, file))
        if (sscanf(line, "model name : %99[^\n]", model) != 1) *model = 0;
    if (file) fclose(file);
    snprintf(b->machine, sizeof b->machine, "%s, %d thread%s", *model ? model : "CPU of unknown name",
             b->settings.threads, b->settings.threads > 1 ? "s" : "");
}

static void use_threads(bench *b, int threads) {
    pool_destroy(b->pool);
    b->pool = threads > 1 ? pool_create(threads) : NULL;
    if (b->pool) b->parallel = pool_parallel(b->pool);
}

static void print_machine(bench *b) {
    printf("%s; last-level cache %zu MiB\n", b->machine, bench_last_level_cache() >> 20);
    use_threads(b, b->settings.threads);
    for (int i = 0; i < BENCH_PEAKS; i++)
        if (bench_has_isa(bench_peaks[i].needs))
            printf("  %-20s %8.1f GFLOP/s\n", bench_peaks[i].name,
                   bench_peak_rate(&bench_peaks[i], parallel_of(b), 0.03));
    if (b->cold.bytes)
        printf("  %-20s %8.1f GB/s (%s, %zu bytes ahead)\n", "cold read",
               bench_read_rate(&b->cold, &b->cold.best, parallel_of(b), (size_t)128 << 20), b->cold.best.name,
               b->cold.best.ahead);
    printf("\n%-28s %-11s %7s %10s %16s   %-28s %6s\n", "case", "kernels", "threads", "tokens/s", "achieved", "limit",
           "share");
}

static void print_row(const bench_result *r) {
    const char *unit = r->what->cold ? "GB/s" : "GFLOP/s";
    char tokens[32];
    printf("%-28s %-11s %7d %10s %8.1f %-7s   %8.1f %-19s %6.3f\n", r->what->name, r->isa, r->threads,
           bench_thousands(r->tokens_per_s, tokens), r->what->cold ? r->gbytes_per_s : r->gflops, unit, r->limit,
           r->limit_name, r->ratio);
    fflush(stdout);
}

static void print_json(const bench_result *r) {
    printf(
        "{\"name\": \"%s\", \"isa\": \"%s\", \"threads\": %d, \"tokens_per_s\": %.1f, \"gflops\": %.3f, "
        "\"limit\": %.3f, \"ratio\": %.4f, \"gbytes_per_s\": %.3f, \"limit_unit\": \"%s\", \"limit_name\": \"%s\"}\n",
        r->what->name, r->isa, r->threads, r->tokens_per_s, r->gflops, r->limit, r->ratio, r->gbytes_per_s,
        r->what->cold ? "GB/s" : "GFLOP/s", r->limit_name);
    fflush(stdout);
}

/* The row of that case on so many threads with the plan's first kernel set, or NULL. */
static const bench_result *find_result(const bench *b, const char *name, int threads) {
    for (int i = 0; i < b->count; i++)
        if (strcmp(b->results[i].what->name, name) == 0 && b->results[i].threads == threads &&
            strcmp(b->results[i].isa, b->results[0].isa) == 0)
            return &b->results[i];
    return NULL;
}

/* What only two rows together say. */
static void print_comparisons(const bench *b) {
    const int threads = b->settings.threads;
    const bench_result *one = find_result(b, "csa-flash-bf16-decode-1", threads);
    const bench_result *eight = find_result(b, "csa-flash-bf16-decode-8", threads);
    puts("");
    if (one && eight)
        printf("8 sequences, one token each, take %.2f times as long as 1\n",
               8.0 * one->tokens_per_s / eight->tokens_per_s);
    for (int i = 0; i < b->count; i++) {
        const bench_result *more = &b->results[i];
        one = find_result(b, more->what->name, threads);
        if (more->threads > threads && one)
            printf("%d threads do %.2f times the work of %d: %s\n", more->threads,
                   more->tokens_per_s / one->tokens_per_s, threads, more->what->name);
    }
}

/* ============================================================================================================
 * The plan
 * ============================================================================================================ */

static int add_row(bench *b, bench_work *work, int threads, int extra) {
    bench_result *result = &b->results[b->count];
    memset(result, 0, sizeof *result);
    result->what = work->what;
    result->isa = dsv4_compressor_isa(work->layers[0]);
    result->threads = threads;
    result->extra = extra;
    use_threads(b, threads);
    bench_work_threads(work, parallel_of(b));
    if (work->failed || measure(b, work, result) != DSV4_OK) return -1;
    b->count++;
    if (b->settings.json)
        print_json(result);
    else
        print_row(result);
    return 0;
}

/* One kernel set's rows of a case: on the threads asked for, and with --full on twice as many. */
static int run_case(bench *b, const bench_case *what, const char *isa, int extra) {
    bench_work work;
    int status = -1;
    bench_work_make(&work, what, isa, &b->cold);
    if (!work.failed) status = add_row(b, &work, b->settings.threads, extra);
    if (status == 0 && b->settings.full && what->more && !extra) status = add_row(b, &work, 2 * b->settings.threads, 1);
    if (status != 0) fprintf(stderr, "bench: %s: %s\n", what->name, work.error.text);
    bench_work_free(&work);
    return status;
}

static int is_selected(const bench *b, const bench_case *what) {
    return !b->settings.only || fnmatch(b->settings.only, what->name, 0) == 0;
}

/* The vector kernels that are not this plan's first; the scalar and portable ones are no contest. */
static int run_other_kernels(bench *b, const bench_case *what) {
    int failed = 0;
    for (int i = 0; dsv4_isa_name(i); i++) {
        const char *isa = dsv4_isa_name(i);
        if (strcmp(isa, b->results[0].isa) != 0 && strcmp(isa, "scalar") != 0 && strcmp(isa, "simde") != 0)
            failed |= run_case(b, what, isa, 1);
    }
    return failed;
}

/* A case that fails is told on stderr and left out; the others go on. */
static int run_plan(bench *b) {
    int failed = 0;
    for (int i = 0; i < BENCH_CASES; i++)
        if (is_selected(b, &bench_cases[i]) && (bench_cases[i].cold || bench_cases[i].kind == BENCH_DECODE) &&
            prepare_cold(b) != 0) {
            fputs("bench: not enough memory for cold data\n", stderr);
            return -1;
        }
    if (!b->settings.json) print_machine(b);
    for (int i = 0; i < BENCH_CASES; i++)
        if (is_selected(b, &bench_cases[i])) failed |= run_case(b, &bench_cases[i], b->settings.isa, 0);
    for (int i = 0; i < BENCH_CASES && b->settings.full && b->count; i++)
        if (is_selected(b, &bench_cases[i]) && bench_cases[i].more && bench_cases[i].kind == BENCH_PREFILL)
            failed |= run_other_kernels(b, &bench_cases[i]);
    if (!b->settings.json) print_comparisons(b);
    return failed;
}

/* ============================================================================================================
 * The command line
 * ============================================================================================================ */

static int usage_error(const char *text, const char *what) {
    fprintf(stderr, "bench: %s%s (--help lists the options)\n", text, what);
    return 2;
}

static int parse_flag(bench_settings *settings, const char *option) {
    const struct {
        const char *name;
        int *value;
    } flags[] = {{"--json", &settings->json}, {"--list", &settings->list},         {"--quick", &settings->quick},
                 {"--full", &settings->full}, {"--cpu-time", &settings->cpu_time}, {"--help", &settings->help}};
    for (size_t i = 0; i < sizeof flags / sizeof flags[0]; i++)
        if (strcmp(option, flags[i].name) == 0) return *flags[i].value = 1;
    return 0;
}

static int parse(bench_settings *settings, int count, char **arguments) {
    const char *threads = NULL;
    const struct {
        const char *name, **value;
    } options[] = {
        {"--only", &settings->only}, {"--isa", &settings->isa}, {"--svg", &settings->svg}, {"--threads", &threads}};
    for (int i = 1; i < count; i++) {
        size_t which = 0;
        if (parse_flag(settings, arguments[i])) continue;
        while (which < 4 && strcmp(arguments[i], options[which].name) != 0) which++;
        if (which == 4) return usage_error("unknown option ", arguments[i]);
        if (++i == count) return usage_error("a value is missing after ", options[which].name);
        *options[which].value = arguments[i];
    }
    settings->threads = 1;
    if (threads) {
        char *end = NULL;
        const long value = strtol(threads, &end, 10);
        if (*end || end == threads || value < 1 || value > POOL_THREADS / 2)
            return usage_error("--threads wants a number from 1 to 512, not ", threads);
        settings->threads = (int)value;
    }
    return 0;
}

static int check(const bench *b) {
    int selected = 0;
    for (int i = 0; i < BENCH_CASES; i++) selected += is_selected(b, &bench_cases[i]);
    if (!selected) return usage_error("no case (--list names them) is called ", b->settings.only);
    if (b->settings.cpu_time && (b->settings.threads > 1 || b->settings.full))
        return usage_error("--cpu-time is for one thread", "");
    if (b->settings.isa && !bench_has_isa(b->settings.isa))
        return usage_error("this CPU cannot run the kernel set ", b->settings.isa);
    return 0;
}

int main(int count, char **arguments) {
    static bench b;
    int status = parse(&b.settings, count, arguments);
    if (status == 0) status = check(&b);
    if (status != 0) return status;
    if (b.settings.help) {
        print_help();
        return 0;
    }
    for (int i = 0; i < BENCH_CASES && b.settings.list; i++)
        if (is_selected(&b, &bench_cases[i])) puts(bench_cases[i].name);
    if (b.settings.list) return 0;
    if (b.settings.cpu_time) bench_clock = CLOCK_PROCESS_CPUTIME_ID;
    describe_machine(&b);
    status = run_plan(&b) != 0;
    if (status == 0 && b.settings.svg && bench_chart(b.settings.svg, b.results, b.count, b.machine) != 0) {
        fprintf(stderr, "bench: cannot write %s\n", b.settings.svg);
        status = 1;
    }
    use_threads(&b, 1);
    free(b.cold.bytes);
    return status;
}
