/* bench_limits.h - what this machine can do at most: multiply-adds per second, and bytes read per second.
 *
 * Every kernel here does nothing but the one thing that it measures. A peak kernel keeps independent chains of one
 * instruction in registers, enough to hide its latency on every CPU we know of (two a cycle: twelve for FMA's 4 or 5
 * cycles; VDPBF16PS takes 6, and twelve would just miss its peak). A read
 * kernel sums a buffer; several orders and prefetch distances are tried, and the best of them is the machine's. */

#ifndef BENCH_LIMITS_H
#define BENCH_LIMITS_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#define BENCH_TARGET(features) __attribute__((noinline, target(features)))
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#define BENCH_ANY_TARGET __attribute__((noinline))

/* Seconds: of the clock on the wall, or of the processor's work for this program. */
static clockid_t bench_clock = CLOCK_MONOTONIC;

static double bench_now(void) {
    struct timespec now;
    clock_gettime(bench_clock, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* Whether this CPU can run the library's kernel set of that name. */
static int bench_has_isa(const char *isa) {
    for (int i = 0; dsv4_isa_name(i); i++)
        if (strcmp(dsv4_isa_name(i), isa) == 0) return 1;
    return 0;
}

/* ============================================================================================================
 * Multiply-add peaks
 * ============================================================================================================ */

enum { BENCH_CHAINS = 12, BENCH_CHAINS_DPBF16 = 20, BENCH_CHAINS_MOST = 20 };

/* A peak kernel. `numbers` holds two vectors of operands and one for each chain, kept alive by writing them back. */
typedef void bench_peak_kernel(float *numbers, int64_t steps);

/* KEEP hides a scalar chain from the vectoriser, which would otherwise merge several into one vector. */
#define BENCH_EACH_CHAIN(CHAINS) _Pragma("GCC unroll 32") for (int i = 0; i < (CHAINS); i++)
#define BENCH_PEAK_KERNEL(NAME, TARGET, CHAINS, VECTOR, LANES, LOAD, STORE, OPERAND, MULTIPLY_ADD, KEEP) \
    TARGET static void NAME(float *numbers, int64_t steps) {                                             \
        const VECTOR a = LOAD(numbers), b = LOAD(numbers + LANES);                                       \
        VECTOR chain[CHAINS];                                                                            \
        BENCH_EACH_CHAIN(CHAINS) chain[i] = LOAD(numbers + (i + 2) * LANES);                             \
        for (int64_t step = 0; step < steps; step++) {                                                   \
            BENCH_EACH_CHAIN(CHAINS) {                                                                   \
                chain[i] = MULTIPLY_ADD(OPERAND(a), OPERAND(b), chain[i]);                               \
                KEEP(chain[i]);                                                                          \
            }                                                                                            \
        }                                                                                                \
        BENCH_EACH_CHAIN(CHAINS) STORE(numbers + (i + 2) * LANES, chain[i]);                             \
    }

#define BENCH_SCALAR_LOAD(p)             (*(p))
#define BENCH_SCALAR_STORE(p, v)         (*(p) = (v))
#define BENCH_SAME(v)                    (v)
#define BENCH_IGNORE(v)                  ((void)(v))
#define BENCH_MULTIPLY_THEN_ADD(a, b, c) ((a) * (c) + (b)) /* the product must depend on the chain */

#if defined(__x86_64__) || defined(__i386__)
#define BENCH_KEEP(v)         __asm__ volatile("" : "+x"(v))
#define BENCH_AS_BF16(v)      ((__m512bh)_mm512_castps_si512(v))
#define BENCH_DPBF16(a, b, c) _mm512_dpbf16_ps(c, a, b)
BENCH_PEAK_KERNEL(bench_peak_fma_scalar, BENCH_TARGET("fma"), BENCH_CHAINS, float, 1, BENCH_SCALAR_LOAD,
                  BENCH_SCALAR_STORE, BENCH_SAME, __builtin_fmaf, BENCH_KEEP)
BENCH_PEAK_KERNEL(bench_peak_fma_128, BENCH_TARGET("fma"), BENCH_CHAINS, __m128, 4, _mm_loadu_ps, _mm_storeu_ps,
                  BENCH_SAME, _mm_fmadd_ps, BENCH_IGNORE)
BENCH_PEAK_KERNEL(bench_peak_fma_256, BENCH_TARGET("fma"), BENCH_CHAINS, __m256, 8, _mm256_loadu_ps, _mm256_storeu_ps,
                  BENCH_SAME, _mm256_fmadd_ps, BENCH_IGNORE)
BENCH_PEAK_KERNEL(bench_peak_fma_512, BENCH_TARGET("avx512f"), BENCH_CHAINS, __m512, 16, _mm512_loadu_ps,
                  _mm512_storeu_ps, BENCH_SAME, _mm512_fmadd_ps, BENCH_IGNORE)
#if defined(__clang__) || __GNUC__ >= 10
#define BENCH_HAS_DPBF16 1
BENCH_PEAK_KERNEL(bench_peak_dpbf16, BENCH_TARGET("avx512f,avx512bf16"), BENCH_CHAINS_DPBF16, __m512, 16,
                  _mm512_loadu_ps, _mm512_storeu_ps, BENCH_AS_BF16, BENCH_DPBF16, BENCH_IGNORE)
#endif
#if defined(__x86_64__) && defined(DSV4__AMX)
#define BENCH_HAS_TILES 1
/* Six tiles of sums, [16][16], and two operands; 16 rows of 64 bytes each. What they hold are zeros: as fast. */
static BENCH_ANY_TARGET void bench_peak_tiles(float *numbers, int64_t steps) {
    unsigned char shapes[64] = {1};
    (void)numbers;
    for (int t = 0; t < 8; t++) {
        shapes[16 + 2 * t] = 64;
        shapes[48 + t] = 16;
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(shapes));
    for (int64_t step = 0; step < steps; step++)
        __asm__ volatile(
            "tdpbf16ps %tmm7, %tmm6, %tmm0\n\ttdpbf16ps %tmm7, %tmm6, %tmm1\n\ttdpbf16ps %tmm7, %tmm6, %tmm2\n\t"
            "tdpbf16ps %tmm7, %tmm6, %tmm3\n\ttdpbf16ps %tmm7, %tmm6, %tmm4\n\ttdpbf16ps %tmm7, %tmm6, %tmm5");
    __asm__ volatile("tilerelease");
}
#endif
#elif defined(__aarch64__)
#define BENCH_KEEP(v)           __asm__ volatile("" : "+w"(v))
#define BENCH_NEON_FMA(a, b, c) vfmaq_f32(c, a, b)
BENCH_PEAK_KERNEL(bench_peak_fma_scalar, BENCH_ANY_TARGET, BENCH_CHAINS, float, 1, BENCH_SCALAR_LOAD,
                  BENCH_SCALAR_STORE, BENCH_SAME, __builtin_fmaf, BENCH_KEEP)
BENCH_PEAK_KERNEL(bench_peak_fma_128, BENCH_ANY_TARGET, BENCH_CHAINS, float32x4_t, 4, vld1q_f32, vst1q_f32, BENCH_SAME,
                  BENCH_NEON_FMA, BENCH_IGNORE)
#else
#define BENCH_KEEP(v) BENCH_IGNORE(v)
#endif
BENCH_PEAK_KERNEL(bench_peak_portable, BENCH_ANY_TARGET, BENCH_CHAINS, float, 1, BENCH_SCALAR_LOAD, BENCH_SCALAR_STORE,
                  BENCH_SAME, BENCH_MULTIPLY_THEN_ADD, BENCH_KEEP)

typedef struct bench_peak {
    const char *name;
    const char *needs; /* kernel set that the CPU must be able to run */
    bench_peak_kernel *kernel;
    int chains;
    int flops; /* of one instruction */
} bench_peak;

/* Widest last. */
static const bench_peak bench_peaks[] = {
    {"multiply, then add", "scalar", bench_peak_portable, BENCH_CHAINS, 2},
#if defined(__x86_64__) || defined(__i386__)
    {"FMA scalar", "avx2", bench_peak_fma_scalar, BENCH_CHAINS, 2},
    {"FMA 128-bit", "avx2", bench_peak_fma_128, BENCH_CHAINS, 8},
    {"FMA 256-bit", "avx2", bench_peak_fma_256, BENCH_CHAINS, 16},
    {"FMA 512-bit", "avx512", bench_peak_fma_512, BENCH_CHAINS, 32},
#ifdef BENCH_HAS_DPBF16
    {"VDPBF16PS 512-bit", "avx512bf16", bench_peak_dpbf16, BENCH_CHAINS_DPBF16, 64},
#endif
#ifdef BENCH_HAS_TILES
    {"TDPBF16PS", "amx", bench_peak_tiles, 6, 2 * 16 * 16 * 32},
#endif
#elif defined(__aarch64__)
    {"FMA scalar", "neon", bench_peak_fma_scalar, BENCH_CHAINS, 2},
    {"FMA 128-bit", "neon", bench_peak_fma_128, BENCH_CHAINS, 8},
#endif
};
enum { BENCH_PEAKS = sizeof bench_peaks / sizeof bench_peaks[0] };

/* The peak of that name, or the portable one where this CPU (or build) does not have it. */
static const bench_peak *bench_peak_named(const char *name) {
    for (int i = 1; i < BENCH_PEAKS; i++)
        if (strcmp(bench_peaks[i].name, name) == 0 && bench_has_isa(bench_peaks[i].needs)) return &bench_peaks[i];
    return &bench_peaks[0];
}

/* The instruction that a kernel set multiplies with: bf16 in the order `sums` by its own, where it has one. */
static const bench_peak *bench_peak_of_isa(const char *isa, dsv4_dtype dtype, dsv4_sums sums) {
    static const char *const instructions[][2] = {{"avx2", "FMA 256-bit"},
                                                  {"avx512", "FMA 512-bit"},
                                                  {"neon", "FMA 128-bit"},
                                                  {"simde", "FMA 128-bit"},
                                                  {"scalar", "FMA scalar"}};
    const int pairs = dtype == DSV4_BF16 && sums == DSV4_SUMS_PAIRS, tiles = dtype == DSV4_BF16 && !pairs;
    if (strcmp(isa, "avx512bf16") == 0) return bench_peak_named(pairs ? "VDPBF16PS 512-bit" : "FMA 512-bit");
    if (strcmp(isa, "amx") == 0) return bench_peak_named(tiles ? "TDPBF16PS" : "FMA 512-bit");
    for (size_t i = 0; i < sizeof instructions / sizeof instructions[0]; i++)
        if (strcmp(isa, instructions[i][0]) == 0) return bench_peak_named(instructions[i][1]);
    return &bench_peaks[0];
}

typedef struct bench_peak_job {
    const bench_peak *peak;
    int64_t steps;
} bench_peak_job;

static void bench_peak_task(void *argument, int64_t index) {
    const bench_peak_job *job = (const bench_peak_job *)argument;
    float numbers[(BENCH_CHAINS_MOST + 2) * 16];
    for (int i = 0; i < (BENCH_CHAINS_MOST + 2) * 16; i++)
        numbers[i] = 0.5f + (float)((i * 37 + (int)index) % 101) / 256.0f;
    job->peak->kernel(numbers, job->steps);
}

/* Runs `count` tasks, on the pool's threads where there is one. */
static void bench_run_tasks(const dsv4_parallel *parallel, int64_t count, dsv4_task *task, void *argument) {
    if (parallel && parallel->run) {
        parallel->run(parallel->context, count, task, argument);
        return;
    }
    for (int64_t i = 0; i < count; i++) task(argument, i);
}

static int bench_threads(const dsv4_parallel *parallel) {
    return parallel && parallel->run && parallel->threads > 1 ? parallel->threads : 1;
}

/* GFLOP/s of all threads together over about `seconds`. */
static double bench_peak_rate(const bench_peak *peak, const dsv4_parallel *parallel, double seconds) {
    bench_peak_job job = {peak, 20000};
    const int threads = bench_threads(parallel);
    for (;;) {
        const double start = bench_now();
        bench_run_tasks(parallel, threads, bench_peak_task, &job);
        const double elapsed = bench_now() - start;
        if (elapsed >= 0.7 * seconds) return 1e-9 * (double)job.steps * peak->chains * peak->flops * threads / elapsed;
        job.steps = (int64_t)((double)job.steps * (elapsed > 0.01 * seconds ? 1.1 * seconds / elapsed : 8.0));
    }
}

/* ============================================================================================================
 * Read bandwidth
 * ============================================================================================================ */

enum { BENCH_PAGE = 4096, BENCH_READ_BLOCK = 4 * BENCH_PAGE };

/* Sums whole blocks of BENCH_READ_BLOCK bytes; `ahead` bytes is how far it prefetches. */
typedef uint64_t bench_read_kernel(const unsigned char *bytes, size_t size, size_t ahead);

typedef uint64_t bench_line __attribute__((vector_size(64))); /* one cache line; the compiler cuts it to size */

/* STREAMS pages are read side by side. LEVEL is __builtin_prefetch's: 3 all caches, 2 the second, 0 passing through. */
#define BENCH_READ_KERNEL(NAME, TARGET, STREAMS, LEVEL)                                       \
    TARGET static uint64_t NAME(const unsigned char *bytes, size_t size, size_t ahead) {      \
        bench_line sum = {0};                                                                 \
        for (size_t block = 0; block < size; block += STREAMS * BENCH_PAGE)                   \
            for (size_t at = block; at < block + BENCH_PAGE; at += sizeof(bench_line))        \
                _Pragma("GCC unroll 4") for (size_t stream = 0; stream < STREAMS; stream++) { \
                    const unsigned char *line = bytes + at + stream * BENCH_PAGE;             \
                    __builtin_prefetch(line + ahead, 0, LEVEL);                               \
                    sum += *(const bench_line *)(const void *)line;                           \
                }                                                                             \
        return sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];         \
    }

/* The kernels of one target: name, text, pages side by side, prefetch level. */
#define BENCH_READERS(X, TARGET, SUFFIX, NEEDS, WIDTH)                                                     \
    X(bench_read_1_l1_##SUFFIX, TARGET, NEEDS, WIDTH " loads, 1 page at a time, prefetch to L1", 1, 3)     \
    X(bench_read_1_l2_##SUFFIX, TARGET, NEEDS, WIDTH " loads, 1 page at a time, prefetch to L2", 1, 2)     \
    X(bench_read_1_nt_##SUFFIX, TARGET, NEEDS, WIDTH " loads, 1 page at a time, prefetch passing", 1, 0)   \
    X(bench_read_2_l1_##SUFFIX, TARGET, NEEDS, WIDTH " loads, 2 pages side by side, prefetch to L1", 2, 3) \
    X(bench_read_2_l2_##SUFFIX, TARGET, NEEDS, WIDTH " loads, 2 pages side by side, prefetch to L2", 2, 2) \
    X(bench_read_4_l1_##SUFFIX, TARGET, NEEDS, WIDTH " loads, 4 pages side by side, prefetch to L1", 4, 3) \
    X(bench_read_4_l2_##SUFFIX, TARGET, NEEDS, WIDTH " loads, 4 pages side by side, prefetch to L2", 4, 2) \
    X(bench_read_4_nt_##SUFFIX, TARGET, NEEDS, WIDTH " loads, 4 pages side by side, prefetch passing", 4, 0)

#define BENCH_READERS_PLAIN(X) BENCH_READERS(X, BENCH_ANY_TARGET, plain, "scalar", "plain")
#if defined(__x86_64__) || defined(__i386__)
#define BENCH_READERS_256(X) BENCH_READERS(X, BENCH_TARGET("avx2"), 256, "avx2", "256-bit")
#define BENCH_READERS_512(X) BENCH_READERS(X, BENCH_TARGET("avx512f"), 512, "avx512", "512-bit")
#else
#define BENCH_READERS_256(X)
#define BENCH_READERS_512(X)
#endif

#define BENCH_READER_KERNEL(NAME, TARGET, NEEDS, TEXT, STREAMS, LEVEL) BENCH_READ_KERNEL(NAME, TARGET, STREAMS, LEVEL)
BENCH_READERS_PLAIN(BENCH_READER_KERNEL)
BENCH_READERS_256(BENCH_READER_KERNEL)
BENCH_READERS_512(BENCH_READER_KERNEL)

typedef struct bench_reader {
    const char *name, *needs;
    bench_read_kernel *kernel;
    size_t ahead;
} bench_reader;

#define BENCH_READER_ROW(NAME, TARGET, NEEDS, TEXT, STREAMS, LEVEL) {TEXT, NEEDS, NAME, 0},
static const bench_reader bench_readers[] = {BENCH_READERS_PLAIN(BENCH_READER_ROW) BENCH_READERS_256(BENCH_READER_ROW)
                                                 BENCH_READERS_512(BENCH_READER_ROW)};
enum { BENCH_READER_COUNT = sizeof bench_readers / sizeof bench_readers[0] };

/* Memory larger than the last-level cache, read in slices one after another, so that each slice is cold when it comes
 * round again. Cases that need cold data take their slices from it too. */
typedef struct bench_cold {
    unsigned char *bytes;
    size_t size; /* a multiple of BENCH_READ_BLOCK; as much again as the greatest prefetch distance lies behind */
    size_t at;
    bench_reader best;
} bench_cold;

enum { BENCH_AHEAD_MOST = 16384 };

static const unsigned char *bench_cold_slice(bench_cold *cold, size_t size) {
    if (cold->at + size > cold->size) cold->at = 0;
    cold->at += size;
    return cold->bytes + cold->at - size;
}

/* Bytes read and written per second, in 1e9, by the C library's copy from cold memory to cold memory. */
static double bench_copy_rate(bench_cold *cold) {
    const size_t size = (size_t)48 << 20;
    const unsigned char *from = bench_cold_slice(cold, size);
    unsigned char *to = (unsigned char *)(uintptr_t)bench_cold_slice(cold, size);
    const double start = bench_now();
    memcpy(to, from, size);
    return 2e-9 * (double)size / (bench_now() - start);
}

typedef struct bench_read_job {
    const bench_reader *reader;
    const unsigned char *bytes;
    size_t share;
    volatile uint64_t sink;
} bench_read_job;

static void bench_read_task(void *argument, int64_t index) {
    bench_read_job *job = (bench_read_job *)argument;
    job->sink = job->reader->kernel(job->bytes + (size_t)index * job->share, job->share, job->reader->ahead);
}

/* GB/s of all threads together over the next `size` bytes. */
static double bench_read_rate(bench_cold *cold, const bench_reader *reader, const dsv4_parallel *parallel,
                              size_t size) {
    const size_t threads = (size_t)bench_threads(parallel);
    bench_read_job job = {reader, NULL, size / threads / BENCH_READ_BLOCK * BENCH_READ_BLOCK, 0};
    double start;
    job.bytes = bench_cold_slice(cold, threads * job.share);
    start = bench_now();
    bench_run_tasks(parallel, (int64_t)threads, bench_read_task, &job);
    return 1e-9 * (double)(threads * job.share) / (bench_now() - start);
}

/* Finds the fastest reader on one thread: each once, and of each that came close the best of some more runs. */
static void bench_read_choose(bench_cold *cold) {
    static const size_t distances[] = {0, 1024, 4096, BENCH_AHEAD_MOST};
    double best = 0.0;
    for (int round = 0; round < 3; round++)
        for (int i = 0; i < BENCH_READER_COUNT * 4; i++) {
            static double rates[BENCH_READER_COUNT * 4];
            bench_reader reader = bench_readers[i / 4];
            reader.ahead = distances[i % 4];
            if (!bench_has_isa(reader.needs) || (round > 0 && rates[i] < 0.93 * best)) continue;
            const double rate = bench_read_rate(cold, &reader, NULL, (size_t)32 << 20);
            rates[i] = rate > rates[i] ? rate : rates[i];
            if (rate > best) {
                best = rate;
                cold->best = reader;
            }
        }
}

/* Bytes of the largest cache that the system tells of; 64 MiB where it tells nothing. */
static size_t bench_last_level_cache(void) {
    size_t largest = 0;
    for (int i = 0; i < 8; i++) {
        char path[80], unit = 0;
        unsigned long size = 0;
        FILE *file;
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/size", i);
        file = fopen(path, "r");
        if (!file) continue;
        if (fscanf(file, "%lu%c", &size, &unit) == 2)
            size *= unit == 'K' ? 1024UL : unit == 'M' ? 1024UL * 1024UL : 1UL;
        largest = size > largest ? size : largest;
        fclose(file);
    }
    return largest ? largest : (size_t)64 << 20;
}

#endif /* BENCH_LIMITS_H */
