/* dsv4_compressor.h - hidden states in, DeepSeek-V4's compressed KV entries out; C99, one file, no dependency.
 *
 * DeepSeek-V4 attends to compressed entries: every `ratio` tokens of a sequence become one row of head_dim numbers.
 * This header is the part that makes them, the token Compressor: of Heavily Compressed Attention (HCA, 128 tokens to
 * one entry, disjoint windows), of Compressed Sparse Attention (CSA, 4 to 1, overlapping windows), of CSA's lightning
 * indexer, and of DeepSeek-V4.1 (2 to 1 and 1 to 1). For inference and for training.
 *
 * USE. In every file that calls it: #include "dsv4_compressor.h". In exactly one of them, before that line:
 *     #define DSV4_COMPRESSOR_IMPLEMENTATION
 *
 *     dsv4_config config = dsv4_preset_config(DSV4_V4_FLASH_CSA);
 *     dsv4_allocator heap = dsv4_heap();
 *     dsv4_compressor *c; dsv4_workspace *ws; dsv4_error error;
 *     dsv4_batch batch = {0};                                               // one whole sequence:
 *     batch.x.data = x; batch.x.dtype = DSV4_BF16; batch.tokens = tokens;   // x [tokens, hidden_dim]
 *     batch.out.data = out; batch.out.dtype = DSV4_BF16; batch.entries = tokens / config.ratio;
 *     if (dsv4_compressor_create(&config, &params, NULL, &heap, &c, &error) // packs the weights, once
 *         || dsv4_workspace_create(c, NULL, &heap, &ws, &error)             // scratch, one per calling thread
 *         || dsv4_compress(c, &batch, ws, &error))                          // out [entries, head_dim]
 *         puts(error.text);
 *
 * OPTIONS, macros to define before the implementation (the first two the same in every file that includes this one):
 *     DSV4_API                   linkage of the public functions                 default: extern
 *     DSV4_COMPRESSOR_STATIC     every function static, in each file that implements
 *     DSV4_COMPRESSOR_HEADER     this file's name in quotes, where it was renamed (it includes itself)
 *     DSV4_COMPRESSOR_SIMDE      1: also build the `simde` kernels; 0: never. Default: where no native kernels exist
 *                                and <simde/x86/sse4.1.h> is found
 *     DSV4_COMPRESSOR_SCALAR     only the scalar kernels
 *     DSV4_COMPRESSOR_NO_AMX     leave out the `amx` kernels, and with them the one question to Linux: for AMX's tiles,
 *                                when kernel sets are marked or a compressor with DSV4_SUMS_TILES is created
 *     DSV4_COMPRESSOR_NO_HEAP    leave out dsv4_heap(), and with it <stdlib.h>
 *     DSV4_COMPRESSOR_FAST_MATH  compile under -ffast-math or x87 all the same; equal bits are then not guaranteed
 *     DSV4_ASSERT(condition)     what the library believes of itself             default: assert
 *
 * GUARANTEES. The output's bits depend on inputs, configuration and dtypes alone: not on the CPU, the kernel set, the
 * number of threads, how tokens were cut into calls, the compiler or its flags. (NaN payloads and results with
 * subnormal or overflowing intermediates are excluded.) Nothing is allocated but through the allocator passed in, and
 * nothing at all by dsv4_compress and dsv4_backward. No thread is started. No function aborts, prints or touches global
 * mutable state. Every function that can fail says so by a status, and then leaves outputs and states as they were.
 *
 * THE MATHEMATICS (DeepSeek-V4 report, CSA and HCA; class Compressor of its inference code). Shapes are row-major:
 * tokens S, hidden_dim H, head_dim D, rope_dim R, ratio m, and coff = 2 with overlap, 1 without. t counts tokens from
 * the sequence's first.
 *     kv = x wkv^T,  gate = x wgate^T                           [S, coff D]
 *     score[t] = gate[t] + ape[t mod m]
 *     window w pools, channel by channel, kv with the weights softmax(score) over its rows. Disjoint: the m rows of
 *     its tokens. Overlap: the previous window's m rows, columns [0, D), then its own, columns [D, 2D); window 0 has
 *     no previous one: kv = 0 and score = pad_gate stand there.
 *     latent = norm * pooled / sqrt(mean(pooled^2) + eps)       [D]
 *     out = latent, its last R channels turned by RoPE (interleaved pairs) at the position of the window's first token
 *
 * CONTENTS.  1 this page.  2 API: a status, b numbers, c configuration, d memory and threads, e compressor, f state,
 *     g the operation, h gradients.  3 implementation, which begins with a map: a compiler and options, b checks and
 *     memory, c numbers, d scalar mathematics, e rows of caches, f the kernels' jobs, g vector layer, h row kernels,
 *     i matrix product, j kernel sets, k presets and checks, l the compressor, m streams, n what calls work on, and,
 *     forward and back side by side, o projections, p windows, q entries, r calls.  4 licence (MIT). */

#ifndef DSV4_COMPRESSOR_H
#define DSV4_COMPRESSOR_H

#include <stddef.h>
#include <stdint.h>

/* A change of the third number keeps API and bits; of the second may add to the API; of the first may change both. */
#define DSV4_COMPRESSOR_VERSION "2.0.0"

#ifndef DSV4_API
#if defined(DSV4_COMPRESSOR_STATIC) && (defined(__GNUC__) || defined(__clang__))
#define DSV4_API __attribute__((unused)) static
#elif defined(DSV4_COMPRESSOR_STATIC)
#define DSV4_API static
#else
#define DSV4_API extern
#endif
#endif

/* Marks the functions that can fail: compilers warn where a status is ignored. */
#if (defined(__cplusplus) && __cplusplus >= 201703L) || (defined(__STDC_VERSION__) && __STDC_VERSION__ >= 202311L)
#define DSV4_CHECKED [[nodiscard]]
#elif defined(__GNUC__) || defined(__clang__)
#define DSV4_CHECKED __attribute__((warn_unused_result))
#elif defined(_MSC_VER)
#include <sal.h>
#define DSV4_CHECKED _Check_return_
#else
#define DSV4_CHECKED
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ============================================================================================================
 * 2a. Status and message
 * ============================================================================================================ */

#define DSV4_STATUSES(X)                                                                  \
    X(DSV4_OK, "success")                                                                 \
    X(DSV4_ERROR_NULL, "a required pointer is null")                                      \
    X(DSV4_ERROR_CONFIG, "the configuration is not one of a compressor")                  \
    X(DSV4_ERROR_ARGUMENT, "an argument is out of its range")                             \
    X(DSV4_ERROR_OVERFLOW, "a size does not fit the machine's integers")                  \
    X(DSV4_ERROR_LENGTH, "the ratio does not divide the length of a whole sequence")      \
    X(DSV4_ERROR_BOUNDS, "a segment reaches outside of its arrays")                       \
    X(DSV4_ERROR_ALIGNMENT, "a pointer is not aligned for its type")                      \
    X(DSV4_ERROR_MEMORY, "the allocator gave no memory")                                  \
    X(DSV4_ERROR_BUFFER, "a buffer is too small")                                         \
    X(DSV4_ERROR_STATE, "a state does not belong to this compressor, position or call")   \
    X(DSV4_ERROR_DEPTH, "a roll-back goes further than the state remembers")              \
    X(DSV4_ERROR_DATA, "saved bytes are damaged, or of another version or configuration") \
    X(DSV4_ERROR_ISA, "the kernel set is unknown, or this CPU cannot run it")

typedef enum dsv4_status {
#define DSV4_STATUS_NAME(name, text) name,
    DSV4_STATUSES(DSV4_STATUS_NAME)
#undef DSV4_STATUS_NAME
        DSV4_STATUS_COUNT
} dsv4_status;

/* What went wrong, in one line that names the argument and its numbers. Where a function takes a `dsv4_error *`, NULL
 * is fine. It is written on failure only. */
typedef struct dsv4_error {
    dsv4_status status;
    char text[232];
} dsv4_error;

/* The text of a status, e.g. "a buffer is too small"; "unknown status" for any other number. Never NULL. */
DSV4_API const char *dsv4_status_text(dsv4_status status);

/* ============================================================================================================
 * 2b. Numbers: bf16 and fp32, and matrices of them
 * ============================================================================================================ */

/* 0 is none of them: a type that was not given is an error wherever the numbers beside it are used. DSV4_PACKED is for
 * entries alone: bytes as caches keep them, see dsv4_rows. */
typedef enum dsv4_dtype { DSV4_F32 = 1, DSV4_BF16 = 2, DSV4_PACKED = 3 } dsv4_dtype;

/* The caller's rows of numbers: the first kind is read, the second written. How many and how wide they are stands where
 * a matrix is asked for. */
typedef struct dsv4_const_matrix {
    const void *data;
    dsv4_dtype dtype;
    int64_t stride; /* numbers from row to row, at least the width of one; 0: no gaps */
} dsv4_const_matrix;

typedef struct dsv4_matrix {
    void *data;
    dsv4_dtype dtype;
    int64_t stride;
} dsv4_matrix;

/* A bf16 number by its bits: the upper half of an IEEE binary32. */
typedef uint16_t dsv4_bf16;

/* Bytes of one number: 4 or 2; 1 for DSV4_PACKED; 0 for any other value. */
DSV4_API size_t dsv4_dtype_size(dsv4_dtype dtype);

/* Round to nearest, ties to even. NaN stays a (quiet) NaN; infinities and signed zeros survive; what lies beyond the
 * largest bf16 by half a step or more becomes infinite; subnormals are rounded like the rest. */
DSV4_API dsv4_bf16 dsv4_bf16_from_f32(float value);

/* Exact. */
DSV4_API float dsv4_bf16_to_f32(dsv4_bf16 value);

/* The same for `count` numbers, many of them by this CPU's best kernels. Source and destination must not overlap, and
 * may be NULL only where count is 0. */
DSV4_API void dsv4_bf16_from_f32_array(dsv4_bf16 *destination, const float *source, size_t count);
DSV4_API void dsv4_bf16_to_f32_array(float *destination, const dsv4_bf16 *source, size_t count);

/* Eight bits of E4M3, the finite kind (no infinity; S.1111.111 is NaN; the largest is 448), and four of E2M1 (no NaN;
 * the largest is 6), which stand in the low bits. Rounded to nearest, ties to even; subnormals and the sign of 0 are
 * kept; infinities and all that is beyond the largest become the largest. NaN stays NaN in E4M3 and becomes 6 in E2M1,
 * as GPUs have it. Back is exact. (OCP 8-bit Floating Point and Microscaling Formats specifications.) */
DSV4_API uint8_t dsv4_e4m3_from_f32(float value);
DSV4_API float dsv4_e4m3_to_f32(uint8_t code);
DSV4_API uint8_t dsv4_e2m1_from_f32(float value);
DSV4_API float dsv4_e2m1_to_f32(uint8_t code);

/* ============================================================================================================
 * 2c. Configuration, and the parameters it asks for
 * ============================================================================================================ */

/* Where a result is rounded to bf16 (and kept as fp32), in the order of the pipeline. An output in bf16 is rounded at
 * its end in any case. */
#define DSV4_ROUNDING_POINTS(X)                                                                            \
    X(DSV4_ROUND_PARAMS, "params", 1 << 8)         /* wkv, wgate and norm, where they are given in fp32 */ \
    X(DSV4_ROUND_PROJECTION, "projection", 1 << 0) /* kv and gate after the projections */                 \
    X(DSV4_ROUND_SCORE, "score", 1 << 1)           /* ape, gate + ape, and pad_gate */                     \
    X(DSV4_ROUND_WEIGHT, "weight", 1 << 2)         /* the softmax weights, computed in fp32 always */      \
    X(DSV4_ROUND_PRODUCT, "product", 1 << 3)       /* each kv * weight */                                  \
    X(DSV4_ROUND_POOLED, "pooled", 1 << 4)         /* the pooled row */                                    \
    X(DSV4_ROUND_NORMED, "normed", 1 << 5)         /* the normalised row, before norm's scale */           \
    X(DSV4_ROUND_SCALED, "scaled", 1 << 6)         /* and after it */                                      \
    X(DSV4_ROUND_TRIG, "trig", 1 << 7)             /* cos and sin */                                       \
    X(DSV4_ROUND_ROTATED, "rotated", 1 << 9)       /* in RoPE each product, then their sum */              \
    X(DSV4_ROUND_ROW, "row", 1 << 10)              /* the entry after RoPE, after Hadamard and as read back */

/* The pipelines that these points were read from, as sums of them. References change: a preset keeps its meaning, a
 * pipeline that moves gets a new one. */
#define DSV4_ROUNDINGS(X)                                                                                        \
    X(DSV4_ROUNDING_NONE, "none", 0)                                                                             \
    X(DSV4_ROUNDING_DEEPSEEK, "deepseek", /* DeepSeek's inference code */                                        \
      DSV4_ROUND_POOLED | DSV4_ROUND_SCALED | DSV4_ROUND_ROW)                                                    \
    X(DSV4_ROUNDING_MAXTEXT, "maxtext", /* MaxText's pre-training, operation by operation */                     \
      DSV4_ROUND_PARAMS | DSV4_ROUND_PROJECTION | DSV4_ROUND_WEIGHT | DSV4_ROUND_PRODUCT | DSV4_ROUND_POOLED |   \
          DSV4_ROUND_NORMED | DSV4_ROUND_SCALED | DSV4_ROUND_ROW)                                                \
    X(DSV4_ROUNDING_TRANSFORMERS, "transformers", /* Hugging Face's, a model loaded as bf16, 5.20.2 and later */ \
      DSV4_ROUND_PROJECTION | DSV4_ROUND_WEIGHT | DSV4_ROUND_PRODUCT | DSV4_ROUND_POOLED | DSV4_ROUND_SCALED |   \
          DSV4_ROUND_TRIG | DSV4_ROUND_ROW)                                                                      \
    X(DSV4_ROUNDING_TRANSFORMERS_5_8, "transformers-5.8", /* as it was in 5.8 */                                 \
      DSV4_ROUND_PROJECTION | DSV4_ROUND_SCORE | DSV4_ROUND_WEIGHT | DSV4_ROUND_PRODUCT | DSV4_ROUND_POOLED |    \
          DSV4_ROUND_NORMED | DSV4_ROUND_SCALED | DSV4_ROUND_TRIG | DSV4_ROUND_ROW)                              \
    X(DSV4_ROUNDING_VLLM, "vllm", DSV4_ROUND_ROW) /* also SGLang, llama.cpp: fp32 up to the entry */             \
    X(DSV4_ROUNDING_NEMO, "nemo",                 /* NeMo Automodel */                                           \
      DSV4_ROUND_POOLED | DSV4_ROUND_SCALED | DSV4_ROUND_TRIG | DSV4_ROUND_ROW)                                  \
    X(DSV4_ROUNDING_MEGATRON, "megatron", DSV4_ROUNDING_TRANSFORMERS | DSV4_ROUND_ROTATED) /* Megatron Core */

/* (A name, since bindgen before 0.62 cannot do without.) */
enum dsv4_rounding {
#define DSV4_ROUNDING_VALUE(name, text, bits) name = bits,
    DSV4_ROUNDING_POINTS(DSV4_ROUNDING_VALUE) DSV4_ROUNDINGS(DSV4_ROUNDING_VALUE)
#undef DSV4_ROUNDING_VALUE
        DSV4_ROUNDING_TEXT_SIZE = 96 /* bytes that the name of any sum of points fits in */
};

/* The name of a rounding: of a preset, "transformers", or of its points, "projection+weight+pooled". DSV4_ERROR_BUFFER
 * where `size` bytes of `text` do not hold it (DSV4_ROUNDING_TEXT_SIZE do), DSV4_ERROR_ARGUMENT for unknown bits. */
DSV4_CHECKED DSV4_API dsv4_status dsv4_rounding_name(uint32_t rounding, char *text, size_t size, dsv4_error *error);

/* And back: names of presets and points, joined by '+'. DSV4_ERROR_ARGUMENT for an unknown name; the message lists
 * those that there are. */
DSV4_CHECKED DSV4_API dsv4_status dsv4_rounding_parse(const char *text, uint32_t *rounding, dsv4_error *error);

/* What caches make of an entry: blocks of channels as codes that share a scale. `out` holds what is read back from
 * them, code * scale, or, as DSV4_PACKED, the codes themselves. Bytes of a row and of its scales: dsv4_row_sizes.
 *
 *             channels          block  code  scale of a block                            a row / its scales
 *   FP8       all but RoPE's    64     E4M3  2^ceil(log2(amax / 448)), amax >= 1e-4      D - R codes, R bf16 / UE8M0
 *   FP8_KEYS  all               128    E4M3  the same                                    D codes / fp32
 *   FP4       all, turned by H  32     E2M1  2^ceil(log2(amax / 6)), amax >= 6 * 2^-126  D / 2 pairs / UE8M0
 *   FP4_E4M3  all               16     E2M1  E4M3 nearest to amax / 6, amax >= 6 * 2^-9  D / 2 pairs / E4M3
 *
 * amax is a block's greatest magnitude; the row's end may cut a block short. The code is that of y / scale. A block
 * with a NaN or an infinity reads back as NaN, its neighbours as if it were not there. UE8M0: exponent + 127. A pair
 * has the even channel in its low four bits. bf16 and fp32 are little-endian. H: the Walsh-Hadamard transform in
 * natural order, times D^-1/2. (DeepSeek-V4's and V4.1's inference code; FP8_KEYS: vLLM, SGLang.) */
#define DSV4_ROW_FORMATS(X)           \
    X(DSV4_ROWS_PLAIN, "plain")       \
    X(DSV4_ROWS_FP8, "fp8")           \
    X(DSV4_ROWS_FP8_KEYS, "fp8-keys") \
    X(DSV4_ROWS_FP4, "fp4")           \
    X(DSV4_ROWS_FP4_E4M3, "fp4-e4m3")

typedef enum dsv4_rows {
#define DSV4_ROWS_VALUE(name, text) name,
    DSV4_ROW_FORMATS(DSV4_ROWS_VALUE)
#undef DSV4_ROWS_VALUE
        DSV4_ROWS_COUNT
} dsv4_rows;

/* The format's name, e.g. "fp8-keys", or NULL. */
DSV4_API const char *dsv4_rows_name(dsv4_rows rows);

/* In which order the terms of dot products of bf16 with bf16 are added. The two kinds of CPU that have an instruction
 * for these add differently: each order gives the same bits on every CPU, and is the fastest one on its own kind. */
typedef enum dsv4_sums {
    DSV4_SUMS_PAIRS = 0, /* as AVX512-BF16's VDPBF16PS: AMD's, and wherever there is no such instruction */
    DSV4_SUMS_TILES = 1  /* as AMX's TDPBF16PS: Intel's Xeons */
} dsv4_sums;

/* What a compressor is. A field of 0 takes the default that its comment names; the first three have none. Dimensions
 * and ratio are under 2^31, flags 0 or 1, numbers at most 1e30. */
typedef struct dsv4_config {
    int64_t hidden_dim;    /* H, width of a hidden state, >= 1 */
    int64_t head_dim;      /* D, width of an entry, >= 1 */
    int64_t ratio;         /* m, tokens per entry, >= 1 */
    int64_t rope_dim;      /* R, how many last channels RoPE turns; even, <= head_dim; 0: none */
    int overlap;           /* 1: windows look back at the previous one's rows (CSA); 0: disjoint (HCA) */
    int no_ape;            /* 1: no position bias (DeepSeek-V4.1) */
    int no_gate;           /* 1: no gate projection; only where a window has one row (ratio 1, no overlap) */
    uint32_t rounding;     /* DSV4_ROUND_... bits or a DSV4_ROUNDING_... preset; 0: none */
    dsv4_rows rows;        /* what caches make of entries; 0: nothing. FP4 needs a head_dim that is a power of two */
    dsv4_sums sums;        /* order of sums of bf16 products; 0: DSV4_SUMS_PAIRS */
    float eps;             /* RMSNorm's, > 0; 0: 1e-6 */
    float pad_gate;        /* score of the rows that window 0 lacks, < 0; 0: -INFINITY, which weighs exactly 0 */
    double rope_theta;     /* > 1; 0: 160000 */
    double yarn_factor;    /* >= 1; 0 or 1: no YaRN */
    double yarn_orig_ctx;  /* original context in tokens; 0: 65536 */
    double yarn_beta_fast; /* 0: 32 */
    double yarn_beta_slow; /* 0: 1 */
} dsv4_config;

#define DSV4_PRESETS(X)                                                       \
    /* name, text, hidden_dim, head_dim, ratio, overlap, no_ape, eps */       \
    X(DSV4_V4_FLASH_CSA, "v4-flash-csa", 4096, 512, 4, 1, 0, 1e-6f)           \
    X(DSV4_V4_FLASH_HCA, "v4-flash-hca", 4096, 512, 128, 0, 0, 1e-6f)         \
    X(DSV4_V4_FLASH_INDEXER, "v4-flash-indexer", 4096, 128, 4, 1, 0, 1e-6f)   \
    X(DSV4_V4_PRO_CSA, "v4-pro-csa", 7168, 512, 4, 1, 0, 1e-6f)               \
    X(DSV4_V4_PRO_HCA, "v4-pro-hca", 7168, 512, 128, 0, 0, 1e-6f)             \
    X(DSV4_V4_PRO_INDEXER, "v4-pro-indexer", 7168, 128, 4, 1, 0, 1e-6f)       \
    X(DSV4_V41_FLASH_RATIO2, "v4.1-flash-ratio2", 5120, 512, 2, 0, 1, 1e-20f) \
    X(DSV4_V41_FLASH_RATIO1, "v4.1-flash-ratio1", 5120, 512, 1, 0, 1, 1e-20f)

typedef enum dsv4_preset {
#define DSV4_PRESET_NAME(name, text, h, d, m, overlap, no_ape, eps) name,
    DSV4_PRESETS(DSV4_PRESET_NAME)
#undef DSV4_PRESET_NAME
        DSV4_PRESET_COUNT
} dsv4_preset;

/* The configuration of a published model: R 64, theta 160000, YaRN factor 16 over 65536, rounding `deepseek`. Any other
 * value of `preset` gives a zeroed configuration, which every function refuses. */
DSV4_API dsv4_config dsv4_preset_config(dsv4_preset preset);

/* The preset's name, e.g. "v4-flash-csa", or NULL. */
DSV4_API const char *dsv4_preset_name(dsv4_preset preset);

/* config.rows as the published model's inference code keeps its entries: FP8, FP4 for indexers, FP4_E4M3 for V4.1.
 * The presets leave rows PLAIN: a model is trained on, and compared by, entries as they are. */
DSV4_API dsv4_rows dsv4_preset_rows(dsv4_preset preset);

/* Whether `config` describes a compressor; if not, DSV4_ERROR_CONFIG (or _NULL) and a message. */
DSV4_CHECKED DSV4_API dsv4_status dsv4_config_check(const dsv4_config *config, dsv4_error *error);

/* Bytes that DSV4_PACKED takes of `out` and of `scales` for each entry. DSV4_ERROR_CONFIG where rows are PLAIN, or
 * pairs of an odd head_dim. */
DSV4_CHECKED DSV4_API dsv4_status dsv4_row_sizes(const dsv4_config *config, size_t *row, size_t *scales,
                                                 dsv4_error *error);

typedef enum dsv4_param { DSV4_WKV = 0, DSV4_WGATE, DSV4_APE, DSV4_NORM, DSV4_PARAM_COUNT } dsv4_param;

/* One parameter array of a configuration. rows * columns numbers, row-major; all 0 where the configuration has none. */
typedef struct dsv4_param_info {
    const char *name; /* "wkv", "wgate", "ape", "norm" */
    int64_t rows;     /* wkv, wgate: coff * head_dim; ape: ratio; norm: 1 */
    int64_t columns;  /* wkv, wgate: hidden_dim; ape: coff * head_dim; norm: head_dim */
    int64_t count;    /* rows * columns */
} dsv4_param_info;

/* Lists the parameter arrays: info[DSV4_WKV] ... info[DSV4_NORM]. */
DSV4_CHECKED DSV4_API dsv4_status dsv4_config_params(const dsv4_config *config, dsv4_param_info info[DSV4_PARAM_COUNT],
                                                     dsv4_error *error);

/* Fills one parameter array, of the shape that dsv4_config_params lists, from a seed: wkv and wgate uniform with
 * variance 1 / hidden_dim, ape uniform in [-1/2, 1/2), norm all 1. Element i, counted row by row, depends on seed,
 * param and i alone: the same bits on every machine. An array that the configuration lacks is DSV4_ERROR_ARGUMENT. */
DSV4_CHECKED DSV4_API dsv4_status dsv4_param_init(const dsv4_config *config, dsv4_param param, uint64_t seed,
                                                  dsv4_matrix array, dsv4_error *error);

/* The caller's parameter arrays, of the shapes that dsv4_config_params lists. */
typedef struct dsv4_params {
    dsv4_const_matrix wkv, wgate, ape, norm; /* wgate, ape: no data exactly with no_gate, no_ape; norm is one row */
} dsv4_params;

/* RoPE's frequencies, rope_dim / 2 of them: angle = fp32(position) * inv_freq[i] in fp32. They are 1 / theta^(2i / R);
 * with YaRN those of pairs that turn fewer than yarn_beta_slow times within yarn_orig_ctx tokens are divided by
 * yarn_factor, those that turn more than yarn_beta_fast times stay, and between the two a ramp leads. DSV4_ERROR_BUFFER
 * where `capacity` numbers do not hold them. (DeepSeek-V4 report; precompute_freqs_cis of its inference code.) */
DSV4_CHECKED DSV4_API dsv4_status dsv4_rope_frequencies(const dsv4_config *config, float *inv_freq, int64_t capacity,
                                                        dsv4_error *error);

/* cos and sin of an angle >= 0 in radians, as RoPE uses them: any finite fp32, within 1 ulp; NaN for others. Both
 * places are required. */
DSV4_API void dsv4_cos_sin(float angle, float *cos_out, float *sin_out);

/* ============================================================================================================
 * 2d. Memory and threads: the caller's
 * ============================================================================================================ */

/* alloc: `size` > 0 bytes aligned to `alignment` (a power of two), or NULL. free: what alloc gave, with its size. Both
 * are called by create and destroy functions only, on the calling thread. */
typedef struct dsv4_allocator {
    void *(*alloc)(void *context, size_t size, size_t alignment);
    void (*free)(void *context, void *pointer, size_t size);
    void *context;
} dsv4_allocator;

#ifndef DSV4_COMPRESSOR_NO_HEAP
/* malloc and free as such an allocator. */
DSV4_API dsv4_allocator dsv4_heap(void);
#endif

/* Every object asks its allocator for one block, of the size its _size function names, aligned to this. */
#define DSV4_ALIGNMENT ((size_t)64)

/* One caller-owned buffer as an allocator: blocks are laid one after another; freeing the last one gives its room back.
 * A buffer aligned to DSV4_ALIGNMENT holds objects whose sizes, each rounded up to it, sum to `size`. */
typedef struct dsv4_arena {
    unsigned char *buffer;
    size_t size, used;
} dsv4_arena;

DSV4_API dsv4_arena dsv4_arena_init(void *buffer, size_t size);

/* The allocator draws on `arena`, which must outlive it. Not for two threads at once. */
DSV4_API dsv4_allocator dsv4_arena_allocator(dsv4_arena *arena);

/* A parallel-for: run(context, count, task, argument) must call task(argument, i) once for each i in [0, count), on
 * any threads, in any order, and return when all have returned. It is never called from within a task. Tasks do not
 * block and do not depend on each other. `threads` is how many it can keep busy (less than 1 counts as 1); with run
 * = NULL all runs on the caller's. */
typedef void dsv4_task(void *argument, int64_t index);
typedef struct dsv4_parallel {
    void (*run)(void *context, int64_t count, dsv4_task *task, void *argument);
    void *context;
    int threads;
} dsv4_parallel;

/* ============================================================================================================
 * 2e. The compressor, and scratch to run it
 * ============================================================================================================ */

/* Name of the i-th kernel set this CPU can run, the best first, the last always "scalar"; NULL past the end. */
DSV4_API const char *dsv4_isa_name(int index);

/* All fields may stay 0. */
typedef struct dsv4_options {
    const char *isa;    /* kernel set by name; NULL: the best */
    int training;       /* 1: also pack what dsv4_backward needs (as many bytes again) */
    int bf16_gradients; /* 1: with training, dwkv and dwgate may be bf16: workspaces have room for their fp32 sums */
} dsv4_options;

/* Configuration and weights, packed for the kernels. Immutable: any number of threads may share it. */
typedef struct dsv4_compressor dsv4_compressor;

/* The bytes that dsv4_compressor_create will ask for. Of `params` no number is looked at. */
DSV4_CHECKED DSV4_API dsv4_status dsv4_compressor_size(const dsv4_config *config, const dsv4_params *params,
                                                       const dsv4_options *options, size_t *bytes, dsv4_error *error);

/* Packs the parameters; they are not needed afterwards. The allocator's functions and context must stay valid until
 * destroy. options may be NULL. On failure *compressor is not written. */
DSV4_CHECKED DSV4_API dsv4_status dsv4_compressor_create(const dsv4_config *config, const dsv4_params *params,
                                                         const dsv4_options *options, const dsv4_allocator *allocator,
                                                         dsv4_compressor **compressor, dsv4_error *error);
DSV4_API void dsv4_compressor_destroy(dsv4_compressor *compressor); /* NULL is fine */

/* Its configuration with every default filled in, and its kernel set. NULL for NULL. */
DSV4_API const dsv4_config *dsv4_compressor_config(const dsv4_compressor *compressor);
DSV4_API const char *dsv4_compressor_isa(const dsv4_compressor *compressor);

/* Scratch for one call at a time, of a size that no call's length changes, and the threads to use. It serves every
 * compressor of the same configuration, kernel set and options (with the kernel set amx, of the same types of weights
 * too): the layers of a model can share one. */
typedef struct dsv4_workspace dsv4_workspace;

/* threads < 1 counts as 1. */
DSV4_CHECKED DSV4_API dsv4_status dsv4_workspace_size(const dsv4_compressor *compressor, int threads, size_t *bytes,
                                                      dsv4_error *error);

/* parallel may be NULL; it is copied, its context must outlive the workspace, as must the compressor. */
DSV4_CHECKED DSV4_API dsv4_status dsv4_workspace_create(const dsv4_compressor *compressor,
                                                        const dsv4_parallel *parallel, const dsv4_allocator *allocator,
                                                        dsv4_workspace **workspace, dsv4_error *error);
DSV4_API void dsv4_workspace_destroy(dsv4_workspace *workspace); /* NULL is fine */

/* ============================================================================================================
 * 2f. Stream state: what a sequence carries from call to call
 * ============================================================================================================ */

/* What windows yet to close will need of the tokens seen: three numbers a channel for each open window (one; with
 * overlap two), however many tokens it has had, and the projected rows of the last `depth` tokens, so that up to that
 * many can be taken back. The open windows' rows are kept instead where they are needed one by one, by rounded softmax
 * weights (DSV4_ROUND_WEIGHT, _PRODUCT) and by a compressor for training, and where they are fewer numbers (V4.1's
 * windows of two); states of the two kinds are not each other's. */
typedef struct dsv4_state dsv4_state;

DSV4_CHECKED DSV4_API dsv4_status dsv4_state_size(const dsv4_compressor *compressor, int64_t depth, size_t *bytes,
                                                  dsv4_error *error);

/* An empty state: no token seen. depth >= 0 is the greatest number of tokens that roll_back can take back. */
DSV4_CHECKED DSV4_API dsv4_status dsv4_state_create(const dsv4_compressor *compressor, int64_t depth,
                                                    const dsv4_allocator *allocator, dsv4_state **state,
                                                    dsv4_error *error);
DSV4_API void dsv4_state_destroy(dsv4_state *state); /* NULL is fine */

/* Back to no token seen; the next segment's position then says where the sequence begins. */
DSV4_CHECKED DSV4_API dsv4_status dsv4_state_reset(dsv4_state *state, dsv4_error *error);

/* Tokens seen since the sequence's first (0 for NULL), and the position that the next one must have. Where no token was
 * seen, or all were taken back, the next segment may begin anywhere: where, is the caller's to remember. */
DSV4_API int64_t dsv4_state_tokens(const dsv4_state *state);
DSV4_API int64_t dsv4_state_position(const dsv4_state *state);

/* How many tokens roll_back could take back now: at most depth, never past a reset, and after a copy or restore no
 * further than the state that it came from. */
DSV4_API int64_t dsv4_state_reach(const dsv4_state *state);

/* destination becomes the same stream as source. Both must be of one configuration, and of compressors for training or
 * not (else DSV4_ERROR_STATE); depths may differ: the destination reaches back as far as both allow. */
DSV4_CHECKED DSV4_API dsv4_status dsv4_state_copy(dsv4_state *destination, const dsv4_state *source, dsv4_error *error);

/* As if the last `tokens` had never come; their entries are the caller's to forget. Across closed windows too.
 * DSV4_ERROR_DEPTH beyond dsv4_state_reach. */
DSV4_CHECKED DSV4_API dsv4_status dsv4_state_roll_back(dsv4_state *state, int64_t tokens, dsv4_error *error);

/* Bytes that save will write now: a header, what is folded and the live rows as little-endian fp32, a checksum. */
DSV4_API size_t dsv4_state_save_size(const dsv4_state *state);

/* DSV4_ERROR_BUFFER where `size` bytes do not hold it; *written (may be NULL) is the number of bytes used. */
DSV4_CHECKED DSV4_API dsv4_status dsv4_state_save(const dsv4_state *state, void *bytes, size_t size, size_t *written,
                                                  dsv4_error *error);

/* Takes over what save wrote, on any machine, for the same configuration; depths may differ. Everything is checked
 * before the state changes: DSV4_ERROR_DATA for any bytes that save did not write. */
DSV4_CHECKED DSV4_API dsv4_status dsv4_state_restore(dsv4_state *state, const void *bytes, size_t size,
                                                     dsv4_error *error);

/* ============================================================================================================
 * 2g. The operation
 * ============================================================================================================ */

/* A run of consecutive tokens of one sequence. Batch rows, packed documents, rows padded on either side, chunks of a
 * prompt, one decoded token: each is a segment that begins and ends where the real tokens do. */
typedef struct dsv4_segment {
    int64_t token;     /* its first row in x (or kv, gate) */
    int64_t count;     /* tokens, >= 0 */
    int64_t position;  /* RoPE position of its first token, 0 <= position, position + count < 2^62; with a state that
                          has seen tokens, exactly dsv4_state_position */
    int64_t entry;     /* row of out for its first entry */
    dsv4_state *state; /* NULL: the segment is a whole sequence; else it continues this one, which is advanced. One
                          state must not stand in two segments of a call */
} dsv4_segment;

/* Intermediate results on request, fp32 but for latent; each may be NULL. Rows of kv and gate are those of x, rows of
 * the others those of out, without gaps; rows of no segment, or of a dropped tail, are not written. */
typedef struct dsv4_stages {
    float *kv, *gate; /* [tokens, coff * D] after the projection's rounding */
    float *weights;   /* [entries, coff * ratio, D]: softmax weights by window row. Of windows that were open before the
                         call they need a state whose depth still holds their rows; DSV4_ERROR_STATE says how deep */
    float *pooled;    /* [entries, D] */
    void *latent; /* [entries, D] in out.dtype, bf16 where that is PACKED: the entry before RoPE, V4.1's indexer key */
} dsv4_stages;

/* One call. Pointers need the alignment of their numbers, no more. Inputs and outputs must not overlap, nor the
 * entries of two segments, nor, for dsv4_backward, their tokens (none of which is checked). Where kv is given,
 * dsv4_compress does not read x. */
typedef struct dsv4_batch {
    dsv4_const_matrix x;    /* [tokens, hidden_dim]; or NULL data, with kv and gate given */
    int64_t tokens;         /* rows of x (or of kv and gate) */
    const float *kv, *gate; /* projections from elsewhere, [tokens, coff * D], instead of x (gate NULL with no_gate) */
    dsv4_matrix out;        /* [entries, head_dim]; PACKED: [entries, bytes of a row], its stride in bytes */
    dsv4_matrix scales;     /* with out PACKED: [entries, bytes of a row's scales], PACKED too; else not looked at */
    int64_t entries;        /* rows of out */
    const int64_t *entry_rows; /* the row of each entry of the call, in the order of segments, instead of segment.entry:
                                  in out, scales, dout and the stages by entry. No two are the same (not checked); what
                                  has a negative one is not stored. NULL: a segment's entries follow one another */
    const dsv4_segment *segments; /* NULL, with segment_count 0: all tokens are one whole sequence, */
    int64_t segment_count;        /* from position 0 and with entries from row 0 on */
    int drop_tail; /* 1: tokens of a stateless segment after its last whole window are ignored; 0: an error */
    dsv4_stages stages;
} dsv4_batch;

/* Compresses every segment. Segments may come in any order and mix lengths, states and none. DSV4_ERROR_LENGTH,
 * _BOUNDS, _STATE, _NULL, _ALIGNMENT, _ARGUMENT, _CONFIG (PACKED where rows are PLAIN), _OVERFLOW as their texts say;
 * nothing is written then. */
DSV4_CHECKED DSV4_API dsv4_status dsv4_compress(const dsv4_compressor *compressor, const dsv4_batch *batch,
                                                dsv4_workspace *workspace, dsv4_error *error);

/* Where quantised rows go: out and scales have `count` rows, of the shapes that those of a batch have. */
typedef struct dsv4_quantised {
    int64_t count;
    dsv4_matrix out, scales;
} dsv4_quantised;

/* Rows that exist already, plain [count, head_dim], into config.rows: what dsv4_compress does after RoPE. Nothing may
 * overlap. */
DSV4_CHECKED DSV4_API dsv4_status dsv4_quantise(const dsv4_compressor *compressor, dsv4_const_matrix plain,
                                                const dsv4_quantised *rows, dsv4_workspace *workspace,
                                                dsv4_error *error);

/* PACKED rows back to numbers [count, head_dim] in bf16 or fp32: what dsv4_compress gives as such, and a value for
 * any other bytes. The rounding point `row` rounds here too. (Without it, an fp32 out has FP8's RoPE channels in
 * fp32; packed rows hold them in bf16.) */
DSV4_CHECKED DSV4_API dsv4_status dsv4_unpack(const dsv4_config *config, int64_t count, dsv4_const_matrix rows,
                                              dsv4_const_matrix scales, dsv4_matrix numbers, dsv4_error *error);

/* Entries that a segment of `count` tokens gives, after what `state` (may be NULL) has seen. The tail is not counted.
 * 0 where ratio < 1 or count < 0. */
DSV4_API int64_t dsv4_entry_count(const dsv4_config *config, const dsv4_state *state, int64_t count);

/* Entries that the query at token t of a sequence may see: (t + 1) / ratio, INT64_MAX at most. 0 where ratio < 1 or
 * t < 0. */
DSV4_API int64_t dsv4_visible_entries(int64_t t, int64_t ratio);

/* An additive attention mask [queries, entries]: 0 where query t = first + row sees the entry, else `hidden`. */
typedef struct dsv4_mask_spec {
    int64_t ratio;            /* m, tokens per entry, >= 1 */
    int64_t first;            /* t of the first query */
    int64_t queries, entries; /* rows and columns */
    float hidden;             /* what says "not seen", e.g. -1e4; 0: -INFINITY */
} dsv4_mask_spec;

/* Writes such a mask. */
DSV4_CHECKED DSV4_API dsv4_status dsv4_mask(const dsv4_mask_spec *spec, dsv4_matrix mask, dsv4_error *error);

/* ============================================================================================================
 * 2h. Gradients
 * ============================================================================================================ */

/* The gradient of a sequence's parts. A part that does not end its sequence needs `next`: the gradient with respect to
 * the state after it, which is what the following part gave as `previous`. So parts go last to first. Each is a
 * dsv4_state of the compressor, of any depth, used as a container: its rows hold gradients. */
typedef struct dsv4_segment_gradient {
    const dsv4_state *next; /* gradient of the state after the segment; NULL: nothing follows */
    dsv4_state *previous;   /* receives the gradient of the state before it, and is no other state of the call;
                               NULL: not wanted */
} dsv4_segment_gradient;

/* NULL data: that gradient is not wanted. */
typedef struct dsv4_gradients {
    dsv4_const_matrix dout; /* [entries, head_dim]: gradient of out, rows as in out */
    dsv4_matrix dx; /* [tokens, hidden_dim], rows as in x; written for the segments' tokens, always overwritten */
    dsv4_matrix dwkv, dwgate, dape, dnorm; /* shapes of the parameters; dwkv, dwgate in bf16: see bf16_gradients */
    int accumulate;                        /* 1: the four sums go on from what the arrays hold; 0: they start anew */
    const dsv4_segment_gradient *segments; /* one for each segment of the batch, or NULL */
} dsv4_gradients;

/* The backward pass of dsv4_compress on the same batch (its out and stages are not looked at). The compressor must
 * have been made with options.training. States are those from before the forward call and are not advanced (but no
 * other call may use them meanwhile). The projections are recomputed, or taken from batch->kv and batch->gate where
 * these are given beside x (what the forward call wrote to stages.kv and stages.gate). Rounding counts as the
 * identity. Where x and weights are bf16, dkv and dgate are rounded to bf16 before the products that give dx, dwkv and
 * dwgate. Sums over tokens and entries run in blocks of 256 tokens from each sequence's first (an entry counts with
 * its last token), in order, segments in the order given: cutting a sequence at multiples of 256 and accumulating part
 * by part gives the same bits. Memory: see dsv4_workspace_size; nothing grows with the sequence. Errors as
 * dsv4_compress, and DSV4_ERROR_ARGUMENT for a gradient that the configuration has not. */
DSV4_CHECKED DSV4_API dsv4_status dsv4_backward(const dsv4_compressor *compressor, const dsv4_batch *batch,
                                                const dsv4_gradients *gradients, dsv4_workspace *workspace,
                                                dsv4_error *error);

#ifdef __cplusplus
}
#endif
#endif /* DSV4_COMPRESSOR_H */

/* ============================================================================================================
 * 3. Implementation
 * ============================================================================================================ */
#if defined(DSV4_COMPRESSOR_IMPLEMENTATION) && !defined(DSV4__IMPLEMENTED) && !defined(DSV4__STAMP)

/* ============================================================================================================
 * 3. The implementation: a map
 *
 * THE LOOPS of dsv4_compress, outermost first, and where each is:
 *     block     up to 224 tokens of any segments, cut into pieces, whose projections fit the second cache     (3n)
 *       terms     as many of hidden_dim as let their part of x fit there too: x is packed (pack_task)         (3o)
 *         group     32 channels of every series; groups are shared out among threads (project_task)           (3o)
 *           KBLOCK    256 terms: those of a panel fit the first cache                                          (3o)
 *             panel     32 columns of kv or gate                                                               (3o)
 *               tile      up to 14 x 32 sums in registers, over all terms of the KBLOCK                        (3i)
 *     (On AMX, in the order TILES: 256 tokens, 2,048 terms at a time, by 32 x 32 sums in tile registers.)
 *       group     windows that close are pooled, open ones folded into their states (pool_task)               (3p, 3h)
 *       entry     norm, RoPE, row format, store (finish_task)                                                  (3q, 3h)
 * dsv4_backward goes through chunks of 256 tokens instead: recompute, entries, windows, products               (3n)
 *
 * PACKED OPERANDS of a product: sum[rows, 32] += x[rows, terms] w[terms, 32], at most 256 terms at a time.
 *     left    [blocks of 256 terms][rows][256]     one row's terms side by side: fp32, or bf16 for the bf16 product
 *     right   a panel: fp32 [terms][32], or bf16 [terms / 2][32][2], the two terms of a pair side by side:
 *                 w(0,0) w(1,0) | w(0,1) w(1,1) | ... | w(0,31) w(1,31)     w(term, column)
 *                 w(2,0) w(3,0) | w(2,1) w(3,1) | ...
 *     sums    [groups][rows of the block][panels of a group][32]
 *     A compressor's panels: [groups][blocks of terms][series x (kv, gate)][terms of the block][32]            (3l)
 *
 * WORDS
 *     segment   the caller's tokens of one sequence            series   Ca and Cb of overlapping windows, or one
 *     stretch   some of these, side by side                    group    32 channels of every series
 *     piece     a stretch in a block                           panel    32 columns of a packed right operand
 *     part      a stretch in a chunk of the backward pass      job      what a kernel is given
 *     run       rows of a window that lie evenly in memory     set      the kernels of one instruction set
 *     fold      what three numbers a channel hold of a window  stamp    this file read once for a set
 *     ring      rows that a state may have to take back        slot     a pooled row of a block or chunk
 *
 * TO ADD
 *     a kernel set       a block in 3g, a stamp behind 3i, a row in 3j; then check-cross or a CPU that runs it
 *     a rounding point   DSV4_ROUNDING_POINTS (2c), the kernel that rounds there (3h), tests/support/oracle.h
 *     a row format       DSV4_ROW_FORMATS (2c), dsv4__row_formats (3e), store and unpack (3h), oracle_rows.h
 *     a stage            dsv4_stages (2g), check_outputs (3r) and its task (3o to 3q), tests/support/support.h
 *     a gradient         dsv4_gradients (2h), its part of 3o, 3p or 3q, tests/support/oracle_backward.h
 * ============================================================================================================ */

/* ------------------------------------------------------------------------------------------------------------
 * 3a. Compiler, CPU, options
 * ------------------------------------------------------------------------------------------------------------ */

#if !defined(DSV4_COMPRESSOR_FAST_MATH) &&                                                                             \
    (defined(__FAST_MATH__) || defined(_M_FP_FAST) || defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || \
     (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__ > 0))
#error \
    "dsv4_compressor.h: -ffast-math and its parts break NaN, -INFINITY and the guarantee of equal bits. Compile this \
file without them, or define DSV4_COMPRESSOR_FAST_MATH to give the guarantee up."
#endif

#if !defined(DSV4_COMPRESSOR_FAST_MATH)
/* -fsingle-precision-constant (clang: -cl-single-precision-constant) shows by no macro, but by this: compile without
 * it, or define DSV4_COMPRESSOR_FAST_MATH. The name is what a compiler prints. */
typedef char
    dsv4__no_single_precision_constants_or_define_DSV4_COMPRESSOR_FAST_MATH[sizeof(1.0) == sizeof(double) ? 1 : -1];

/* Parts of -ffast-math that clang shows by no macro: what follows is compiled as it is written, up to the end of the
 * implementation. Intrinsics that a file has included before keep the rules of that file, so sums, products and
 * quotients of vectors are operators. */
#if defined(__clang__) && __clang_major__ >= 12
#define DSV4__PRECISE 1
#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Wignored-pragmas" /* for some CPUs it has the last two of these rules alone */
#if __has_warning("-Wnan-infinity-disabled")         /* it means the command line, as if there were no such rules */
#pragma clang diagnostic ignored "-Wnan-infinity-disabled"
#endif
#pragma float_control(precise, on, push)
#pragma clang fp reassociate(off)
#pragma STDC FP_CONTRACT OFF
#endif
#endif

#include <float.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#ifndef DSV4_COMPRESSOR_NO_HEAP
#include <stdlib.h>
#endif

#if !defined(DSV4_COMPRESSOR_FAST_MATH) && defined(FLT_EVAL_METHOD) && (FLT_EVAL_METHOD < 0 || FLT_EVAL_METHOD == 2)
#error \
    "dsv4_compressor.h: double expressions are evaluated in a wider type here (x87?), which changes bits. Compile with \
-msse2 -mfpmath=sse or the like, or define DSV4_COMPRESSOR_FAST_MATH to give the guarantee up."
#endif

#ifndef DSV4_ASSERT
#include <assert.h>
#define DSV4_ASSERT(condition) assert(condition)
#endif
#ifndef DSV4_COMPRESSOR_HEADER
#define DSV4_COMPRESSOR_HEADER "dsv4_compressor.h"
#endif

#if defined(__clang__)
#define DSV4__CLANG 1
#elif defined(__GNUC__)
#define DSV4__GCC __GNUC__
#endif
#if defined(DSV4__CLANG) || defined(DSV4__GCC)
#define DSV4__GNU 1 /* GNU's attributes, builtins and assembler: clang for Windows has them, but no __GNUC__ */
#endif

/* GCC on Windows keeps the stack at 16 bytes and yet spills wider vectors with aligned stores (its bug 54412), so it
 * gets vectors of 128 bits there. */
#if !defined(DSV4_COMPRESSOR_SCALAR) && defined(__x86_64__) && \
    ((defined(DSV4__CLANG) && __clang_major__ >= 9) || (defined(DSV4__GCC) && DSV4__GCC >= 9))
#if defined(DSV4__GCC) && (defined(_WIN32) || defined(__CYGWIN__))
#define DSV4__X86_128 1
#else
#define DSV4__X86 1
#endif
#include <immintrin.h>
#endif

/* Where clang stands in for MSVC, its <immintrin.h> leaves out what the command line does not allow everywhere. */
#if defined(DSV4__X86) && defined(_MSC_VER)
#include <smmintrin.h>
#include <avxintrin.h>
#include <avx2intrin.h>
#include <fmaintrin.h>
#include <avx512fintrin.h>
#include <avx512bwintrin.h>
#include <avx512dqintrin.h>
#include <avx512vlintrin.h>
#if __clang_major__ < 16 || __clang_major__ > 17
#include <avx512bf16intrin.h>
#endif
#endif

#if defined(DSV4__X86) || defined(DSV4__X86_128)
#define DSV4__CPUID 1
#endif

/* clang 16 and 17 crash where both operands of VDPBF16PS are the same pair in all lanes. Apple counts otherwise, and
 * its CPUs of this family have no bf16. */
#if defined(DSV4__X86) &&                 \
    (defined(DSV4__GCC) ? DSV4__GCC >= 10 \
                        : !defined(__apple_build_version__) && (__clang_major__ < 16 || __clang_major__ > 17))
#define DSV4__X86_BF16 1
#endif

/* AMX, by inline assembly. Linux gives a process tiles on request, and what other systems do is not known here. x32 has
 * other system calls; the memory sanitizer would not see what tiles store. */
#if defined(DSV4__X86) && !defined(DSV4_COMPRESSOR_NO_AMX) && defined(__linux__) && !defined(__ANDROID__) && \
    !defined(__ILP32__) && (defined(DSV4__GCC) ? DSV4__GCC >= 11 : __clang_major__ >= 12)
#define DSV4__AMX 1
#if defined(__has_feature)
#if __has_feature(memory_sanitizer)
#undef DSV4__AMX
#endif
#endif
#endif

#if !defined(DSV4_COMPRESSOR_SCALAR) && defined(__aarch64__) && defined(__ARM_NEON) && !defined(__AARCH64EB__) && \
    defined(DSV4__GNU)
#define DSV4__NEON 1
#include <arm_neon.h>
#endif

/* SIMDe's 128-bit vectors. Big-endian machines keep to scalar, as the kernels take bf16 pairs apart by their words; so
 * does 32-bit NEON, which has no IEEE division and flushes subnormals. */
#if !defined(DSV4_COMPRESSOR_SCALAR) && !(defined(__ARM_NEON) && !defined(__aarch64__)) && \
    (!defined(__BYTE_ORDER__) || __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__)
#if !defined(DSV4_COMPRESSOR_SIMDE) && !defined(DSV4__CPUID) && !defined(DSV4__NEON) && defined(__has_include)
#if __has_include(<simde/x86/sse4.1.h>)
#define DSV4_COMPRESSOR_SIMDE 1
#endif
#endif
#if defined(DSV4_COMPRESSOR_SIMDE) && DSV4_COMPRESSOR_SIMDE
#define DSV4__SIMDE 1
#include <simde/x86/sse4.1.h>
#include <simde/x86/fma.h>
#endif
#endif

/* Functions between these two are compiled for the instruction sets named. g++ 12 finds uninitialised variables in
 * its own intrinsics (GCC bug 105593). */
#define DSV4__PRAGMA(text) _Pragma(#text)
#if defined(DSV4__CLANG)
#define DSV4__BEGIN_TARGET(names) \
    DSV4__PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#define DSV4__END_TARGET DSV4__PRAGMA(clang attribute pop)
#else
#define DSV4__BEGIN_TARGET(names)                                \
    DSV4__PRAGMA(GCC push_options)                               \
    DSV4__PRAGMA(GCC diagnostic push)                            \
    DSV4__PRAGMA(GCC diagnostic ignored "-Wuninitialized")       \
    DSV4__PRAGMA(GCC diagnostic ignored "-Wmaybe-uninitialized") \
    DSV4__PRAGMA(GCC target(names))
#define DSV4__END_TARGET DSV4__PRAGMA(GCC pop_options) DSV4__PRAGMA(GCC diagnostic pop)
#endif

/* clang 18 to 21 let vectors of 512 bits be forbidden on their own, which zig does; others do not know the word. */
#if defined(DSV4__GCC)
#define DSV4__AVX512 "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512"
#elif !defined(__apple_build_version__) && __clang_major__ >= 18 && __clang_major__ <= 21
#define DSV4__AVX512 "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,evex512"
#else
#define DSV4__AVX512 "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"
#endif

/* Compiled as written, neither inlined nor unrolled, is what a sanitizer watches: with the checks of every access, the
 * kernels would take a compiler minutes. And what is not optimised: a kernel's frame would have room for every variable
 * of every copy of a tile, half a megabyte. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) || !defined(__OPTIMIZE__)
#define DSV4__AS_WRITTEN 1
#elif defined(DSV4__CLANG) && defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(undefined_behavior_sanitizer) || \
    __has_feature(memory_sanitizer) || __has_feature(thread_sanitizer)
#define DSV4__AS_WRITTEN 1
#endif
#endif

#if defined(DSV4__GNU) && !defined(DSV4__AS_WRITTEN)
#define DSV4__INLINE __attribute__((always_inline)) static inline
#else
#define DSV4__INLINE static inline
#endif

/* A vector of which clang does not see how it came about. Lanes that are kept out of an operation would else be chosen
 * behind it, when it has raised their exceptions. */
#if defined(DSV4__CLANG)
#define DSV4__UNSEEN(vector) __asm__("" : "+" DSV4__REGISTER(vector))
#else
#define DSV4__UNSEEN(vector) ((void)(vector))
#endif

#if defined(DSV4__GNU)
#define DSV4__UNUSED                __attribute__((unused))
#define DSV4__PREFETCH(pointer)     __builtin_prefetch((pointer), 0, 3)
#define DSV4__PREFETCH_L2(pointer)  __builtin_prefetch((pointer), 0, 2)
#define DSV4__PREFETCH_SUM(pointer) __builtin_prefetch((pointer), 1, 3)
#else
#define DSV4__UNUSED
#define DSV4__PREFETCH(pointer)     ((void)(pointer))
#define DSV4__PREFETCH_L2(pointer)  ((void)(pointer))
#define DSV4__PREFETCH_SUM(pointer) ((void)(pointer))
#endif

/* Register tiles are loops of constant length over arrays of vectors: only fully unrolled do they stay in registers. */
#if defined(DSV4__AS_WRITTEN)
#define DSV4__UNROLL
#elif defined(DSV4__CLANG)
#define DSV4__UNROLL _Pragma("clang loop unroll(full)")
#elif defined(DSV4__GCC) && DSV4__GCC >= 8
#define DSV4__UNROLL _Pragma("GCC unroll 32")
#else
#define DSV4__UNROLL
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum {
    DSV4__PANEL = 32,        /* output columns of a packed weight panel, and channels of a group */
    DSV4__KBLOCK = 256,      /* terms that share an accumulator, bf16 with bf16; part of the numeric contract */
    DSV4__FBLOCK = 128,      /* the same where an operand is fp32 */
    DSV4__STEP = 32,         /* and in the order TILES, half of them each; part of it too; divides DSV4__KBLOCK */
    DSV4__TILE = 16,         /* rows of an AMX tile, and its columns, numbers or pairs */
    DSV4__SPAN = 2048,       /* terms that tiles add up before they store their sums; a multiple of DSV4__KBLOCK */
    DSV4__ROWS_AT_ONCE = 16, /* of a long window from memory */
    DSV4__ROWS_AHEAD = 16,   /* how far ahead such rows are fetched */
    DSV4__LANES = 16,        /* partial sums of a mean of squares; part of the numeric contract */
    DSV4__MAX_RUNS = 12      /* places in memory that a window's rows can be spread over, with room to spare */
};

DSV4__INLINE int64_t dsv4__min(int64_t a, int64_t b) { return a < b ? a : b; }
DSV4__INLINE int64_t dsv4__max(int64_t a, int64_t b) { return a > b ? a : b; }
DSV4__INLINE int64_t dsv4__ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* ------------------------------------------------------------------------------------------------------------
 * 3b. Status, checks, allocator, arena
 * ------------------------------------------------------------------------------------------------------------ */

DSV4_API const char *dsv4_status_text(dsv4_status status) {
    static const char *const texts[] = {
#define DSV4__STATUS_TEXT(name, text) text,
        DSV4_STATUSES(DSV4__STATUS_TEXT)
#undef DSV4__STATUS_TEXT
    };
    return (unsigned)status < (unsigned)DSV4_STATUS_COUNT ? texts[status] : "unknown status";
}

#if defined(DSV4__CLANG) || (defined(DSV4__GCC) && !defined(_WIN32))
static dsv4_status dsv4__fail(dsv4_error *error, dsv4_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
#endif

/* Writes the message and hands the status on, so that a failing check is one return statement. */
static dsv4_status dsv4__fail(dsv4_error *error, dsv4_status status, const char *format, ...) {
    if (error != NULL) {
        va_list arguments;
        va_start(arguments, format);
        error->status = status;
        (void)vsnprintf(error->text, sizeof error->text, format, arguments);
        va_end(arguments);
    }
    return status;
}

#define DSV4__TRY(expression)                             \
    do {                                                  \
        dsv4_status dsv4__result = (expression);          \
        if (dsv4__result != DSV4_OK) return dsv4__result; \
    } while (0)

static dsv4_status dsv4__need(const void *pointer, const char *name, dsv4_error *error) {
    return pointer != NULL ? DSV4_OK : dsv4__fail(error, DSV4_ERROR_NULL, "%s is null", name);
}

static dsv4_status dsv4__need_aligned(const void *pointer, size_t alignment, const char *name, dsv4_error *error) {
    DSV4__TRY(dsv4__need(pointer, name, error));
    if ((uintptr_t)pointer % alignment == 0) return DSV4_OK;
    return dsv4__fail(error, DSV4_ERROR_ALIGNMENT, "%s is at %llu past a multiple of %llu bytes", name,
                      (unsigned long long)((uintptr_t)pointer % alignment), (unsigned long long)alignment);
}

static dsv4_status dsv4__need_array(const void *pointer, dsv4_dtype dtype, const char *name, dsv4_error *error) {
    if ((int)dtype == 0) return dsv4__fail(error, DSV4_ERROR_ARGUMENT, "dtype of %s is not given", name);
    if (dtype != DSV4_F32 && dtype != DSV4_BF16)
        return dsv4__fail(error, DSV4_ERROR_ARGUMENT, "dtype of %s is %d, neither F32 nor BF16", name, (int)dtype);
    return dsv4__need_aligned(pointer, dsv4_dtype_size(dtype), name, error);
}

/* Sizes are built in this: a sum of products that remembers whether it ever left the range of size_t and int64_t. */
typedef struct dsv4__size {
    uint64_t bytes;
    int overflow;
} dsv4__size;

/* Where a thread's share of `count` things begins; it ends where the next thread's begins. */
static int64_t dsv4__share(int64_t count, int64_t thread, int64_t threads) { return count * thread / threads; }

static uint64_t dsv4__size_mul(dsv4__size *size, uint64_t a, uint64_t b) {
    const uint64_t limit = (uint64_t)(SIZE_MAX / 2 < INT64_MAX / 2 ? SIZE_MAX / 2 : INT64_MAX / 2);
    if (a != 0 && b > limit / a) size->overflow = 1;
    return size->overflow ? 0 : a * b;
}

/* Reserves rows * columns numbers of `bytes` each, aligned; returns where they begin. */
static uint64_t dsv4__reserve(dsv4__size *size, int64_t rows, int64_t columns, size_t bytes) {
    const uint64_t begin = size->bytes;
    const uint64_t length = dsv4__size_mul(size, dsv4__size_mul(size, (uint64_t)rows, (uint64_t)columns), bytes);
    const uint64_t rounded = (length + (DSV4_ALIGNMENT - 1)) / DSV4_ALIGNMENT * DSV4_ALIGNMENT;
    size->bytes = dsv4__size_mul(size, begin + rounded, 1);
    return begin;
}

/* Lays out a block, an array after the other. The same functions run over it twice: without memory, to learn its size,
 * and then to place the arrays. */
typedef struct dsv4__cursor {
    unsigned char *base; /* NULL: no memory yet */
    dsv4__size size;
} dsv4__cursor;

static dsv4__cursor dsv4__cursor_at(void *block) {
    dsv4__cursor cursor = {NULL, {0, 0}};
    cursor.base = (unsigned char *)block;
    return cursor;
}

static void *dsv4__lay(dsv4__cursor *cursor, int64_t rows, int64_t columns, size_t bytes) {
    const uint64_t begin = dsv4__reserve(&cursor->size, rows, columns, bytes);
    return cursor->base != NULL ? cursor->base + begin : NULL;
}

static float *dsv4__lay_floats(dsv4__cursor *cursor, int64_t rows, int64_t columns) {
    return (float *)dsv4__lay(cursor, rows, columns, sizeof(float));
}

static dsv4_status dsv4__size_check(const dsv4__size *size, const char *what, dsv4_error *error) {
    if (!size->overflow) return DSV4_OK;
    return dsv4__fail(error, DSV4_ERROR_OVERFLOW, "the size of the %s does not fit in %d bits", what,
                      (int)(8 * sizeof(size_t)));
}

/* Whether rows * columns numbers can be addressed. */
static dsv4_status dsv4__check_extent(int64_t rows, int64_t columns, const char *name, dsv4_error *error) {
    dsv4__size size = {0, 0};
    (void)dsv4__reserve(&size, rows, columns, sizeof(float));
    return dsv4__size_check(&size, name, error);
}

/* A stride's default, and its bounds. */
static dsv4_status dsv4__check_stride(int64_t *stride, int64_t rows, int64_t width, const char *name,
                                      dsv4_error *error) {
    if (*stride == 0) *stride = width;
    if (*stride < width)
        return dsv4__fail(error, DSV4_ERROR_ARGUMENT, "stride of %s is %lld for rows of %lld", name, (long long)*stride,
                          (long long)width);
    if (dsv4__check_extent(rows, *stride, name, error) == DSV4_OK) return DSV4_OK;
    return dsv4__fail(error, DSV4_ERROR_OVERFLOW, "%lld rows at a stride of %s of %lld do not fit in %d bits",
                      (long long)rows, name, (long long)*stride, (int)(8 * sizeof(size_t)));
}

/* A matrix that is used: its stride's default, and whether it can hold [rows, width]. */
static dsv4_status dsv4__check_const_matrix(dsv4_const_matrix *matrix, int64_t rows, int64_t width, const char *name,
                                            dsv4_error *error) {
    DSV4__TRY(dsv4__check_stride(&matrix->stride, rows, width, name, error));
    return dsv4__need_array(matrix->data, matrix->dtype, name, error);
}

static dsv4_status dsv4__check_matrix(dsv4_matrix *matrix, int64_t rows, int64_t width, const char *name,
                                      dsv4_error *error) {
    DSV4__TRY(dsv4__check_stride(&matrix->stride, rows, width, name, error));
    return dsv4__need_array(matrix->data, matrix->dtype, name, error);
}

/* One block for an object and everything it holds. */
static dsv4_status dsv4__allocate(const dsv4_allocator *allocator, size_t bytes, const char *what, void **block,
                                  dsv4_error *error) {
    DSV4__TRY(dsv4__need(allocator, "allocator", error));
    if (allocator->alloc == NULL || allocator->free == NULL)
        return dsv4__fail(error, DSV4_ERROR_NULL, "allocator->%s is null", allocator->alloc ? "free" : "alloc");
    *block = allocator->alloc(allocator->context, bytes, DSV4_ALIGNMENT);
    if (*block == NULL)
        return dsv4__fail(error, DSV4_ERROR_MEMORY, "no %llu bytes for the %s", (unsigned long long)bytes, what);
    if ((uintptr_t)*block % DSV4_ALIGNMENT != 0) {
        (allocator->free)(allocator->context, *block, bytes);
        return dsv4__fail(error, DSV4_ERROR_ALIGNMENT, "the allocator's block for the %s is not aligned to %d bytes",
                          what, (int)DSV4_ALIGNMENT);
    }
    return DSV4_OK;
}

#ifndef DSV4_COMPRESSOR_NO_HEAP
/* malloc aligns to less than asked: the block's own address is kept just below what is handed out. */
static void *dsv4__heap_alloc(void *context, size_t size, size_t alignment) {
    (void)context;
    if (size > SIZE_MAX - alignment - sizeof(void *)) return NULL;
    unsigned char *base = (unsigned char *)malloc(size + alignment + sizeof base);
    if (base == NULL) return NULL;
    const uintptr_t first = (uintptr_t)base + sizeof base;
    unsigned char *block = base + sizeof base + (alignment - first % alignment) % alignment;
    memcpy(block - sizeof base, &base, sizeof base);
    return block;
}

static void dsv4__heap_free(void *context, void *pointer, size_t size) {
    void *base;
    (void)context;
    (void)size;
    memcpy(&base, (unsigned char *)pointer - sizeof base, sizeof base);
    free(base);
}

DSV4_API dsv4_allocator dsv4_heap(void) {
    dsv4_allocator heap = {dsv4__heap_alloc, dsv4__heap_free, NULL};
    return heap;
}
#endif

static void *dsv4__arena_alloc(void *context, size_t size, size_t alignment) {
    dsv4_arena *arena = (dsv4_arena *)context;
    if (arena == NULL || arena->buffer == NULL) return NULL;
    const size_t gap = (size_t)((alignment - ((uintptr_t)arena->buffer + arena->used) % alignment) % alignment);
    if (gap > arena->size - arena->used || size > arena->size - arena->used - gap) return NULL;
    arena->used += gap + size;
    return arena->buffer + arena->used - size;
}

static void dsv4__arena_free(void *context, void *pointer, size_t size) {
    dsv4_arena *arena = (dsv4_arena *)context;
    if ((unsigned char *)pointer + size == arena->buffer + arena->used) arena->used -= size;
}

DSV4_API dsv4_arena dsv4_arena_init(void *buffer, size_t size) {
    dsv4_arena arena = {(unsigned char *)buffer, size, 0};
    return arena;
}

DSV4_API dsv4_allocator dsv4_arena_allocator(dsv4_arena *arena) {
    dsv4_allocator allocator = {dsv4__arena_alloc, dsv4__arena_free, arena};
    return allocator;
}

/* ------------------------------------------------------------------------------------------------------------
 * 3c. Numbers: bf16, E4M3 and E2M1 beside fp32, matrices
 * ------------------------------------------------------------------------------------------------------------ */

DSV4__INLINE uint32_t dsv4__bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

DSV4__INLINE float dsv4__from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

DSV4_API size_t dsv4_dtype_size(dsv4_dtype dtype) {
    return dtype == DSV4_F32 ? 4 : dtype == DSV4_BF16 ? 2 : dtype == DSV4_PACKED ? 1 : 0;
}

/* Adding just under half a step, and the last kept bit to break ties, carries into the upper half where it must. */
DSV4__INLINE uint32_t dsv4__rounded_bits(uint32_t bits) {
    const uint32_t not_nan = 0u - (((bits & 0x7fffffffu) - 0x7f800001u) >> 31);
    return ((bits + ((0x7fffu + ((bits >> 16) & 1u)) & not_nan)) | (0x400000u & ~not_nan)) >> 16;
}

DSV4_API dsv4_bf16 dsv4_bf16_from_f32(float value) { return (dsv4_bf16)dsv4__rounded_bits(dsv4__bits(value)); }

DSV4_API float dsv4_bf16_to_f32(dsv4_bf16 value) { return dsv4__from_bits((uint32_t)value << 16); }

/* Both without vectors of our own: 32 numbers at a time through arrays of constant length, without branches, which
 * compilers turn into what vectors they have; then the rest. (Inlined, as gcc leaves the upper halves of AVX's
 * registers dirty where a kernel ends with a call, and SSE code is slow then.) */
DSV4__INLINE void dsv4__widen(float *to, const dsv4_bf16 *from, int64_t count) {
    for (; count >= 32; count -= 32, from += 32, to += 32) {
        uint32_t bits[32];
        for (int i = 0; i < 32; i++) bits[i] = (uint32_t)from[i] << 16;
        memcpy(to, bits, sizeof bits);
    }
    for (int64_t i = 0; i < count; i++) to[i] = dsv4_bf16_to_f32(from[i]);
}

DSV4__INLINE void dsv4__narrow(dsv4_bf16 *to, const float *from, int64_t count) {
    for (; count >= 32; count -= 32, from += 32, to += 32) {
        uint32_t bits[32];
        dsv4_bf16 rounded[32];
        memcpy(bits, from, sizeof bits);
        for (int i = 0; i < 32; i++) rounded[i] = (dsv4_bf16)dsv4__rounded_bits(bits[i]);
        memcpy(to, rounded, sizeof rounded);
    }
    for (int64_t i = 0; i < count; i++) to[i] = dsv4_bf16_from_f32(from[i]);
}

/* A floating-point format of few bits. */
typedef struct dsv4__small {
    uint32_t mantissa; /* its bits */
    uint32_t bias;     /* fp32's exponent field at exponent field 0 */
    uint32_t nan;      /* what NaN becomes; without its sign, all bits but that */
    int has_nan;       /* and whether it is one */
    float least;       /* normal number */
    float greatest;
    float
        power; /* of two: exponent fields of fp32 that end in those of codes stand for numbers so many times smaller */
    float magic; /* 1.5 * 2^(23 - mantissa): times a power of two 2^e, the unit in the last place is that of 2^e here */
} dsv4__small;

static const dsv4__small dsv4__e4m3 = {3, 120, 0x7f, 1, 0.015625f, 448.0f, 256.0f, 1572864.0f};
static const dsv4__small dsv4__e2m1 = {1, 126, 0x7, 0, 1.0f, 6.0f, 4.0f, 6291456.0f};

/* The code of a number that the format has. Subnormals, made normal by adding the least normal number, differ from
 * it in their mantissa alone. */
DSV4__INLINE uint32_t dsv4__small_code(const dsv4__small *f, float value) {
    const uint32_t bits = dsv4__bits(value), sign = bits >> 31, magnitude = bits & 0x7fffffffu;
    const uint32_t low = dsv4__from_bits(magnitude) < f->least;
    const uint32_t normal = dsv4__bits(dsv4__from_bits(magnitude) + (low ? f->least : 0.0f));
    const uint32_t code = (normal >> (23 - f->mantissa)) - ((f->bias + low) << f->mantissa);
    return magnitude > 0x7f800000u ? f->nan : code | sign * (f->nan + 1);
}

DSV4__INLINE float dsv4__small_value(const dsv4__small *f, uint32_t code) {
    const uint32_t magnitude = code & f->nan, low = magnitude >> f->mantissa == 0;
    const float normal = dsv4__from_bits((magnitude << (23 - f->mantissa)) + ((f->bias + low) << 23));
    const uint32_t sign = (uint32_t)((code & (f->nan + 1)) != 0) << 31;
    const uint32_t nan = f->has_nan && magnitude == f->nan ? 0x7fc00000u : 0;
    return dsv4__from_bits(dsv4__bits((float)(normal - (low ? f->least : 0.0f))) | sign | nan);
}

/* bf16 at any address, the low byte first. */
DSV4__INLINE void dsv4__put_halves(unsigned char *to, const float *from, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        const dsv4_bf16 half = dsv4_bf16_from_f32(from[i]);
        to[2 * i] = (unsigned char)(half & 0xff);
        to[2 * i + 1] = (unsigned char)(half >> 8);
    }
}

DSV4__INLINE void dsv4__get_bf16(dsv4_bf16 *to, const unsigned char *from, int64_t count) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    if (count > 0) memcpy(to, from, (size_t)count * sizeof *to);
#else
    for (int64_t i = 0; i < count; i++) to[i] = (dsv4_bf16)(from[2 * i] | from[2 * i + 1] << 8);
#endif
}

DSV4__INLINE void dsv4__get_halves(float *to, const unsigned char *from, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        to[i] = dsv4__from_bits((uint32_t)from[2 * i] << 16 | (uint32_t)from[2 * i + 1] << 24);
}

/* Number i of an array of either type. */
static float dsv4__get(const void *data, dsv4_dtype dtype, int64_t i) {
    return dtype == DSV4_BF16 ? dsv4_bf16_to_f32(((const dsv4_bf16 *)data)[i]) : ((const float *)data)[i];
}

static void dsv4__put(void *data, dsv4_dtype dtype, int64_t i, float value) {
    if (dtype == DSV4_BF16)
        ((dsv4_bf16 *)data)[i] = dsv4_bf16_from_f32(value);
    else
        ((float *)data)[i] = value;
}

/* Address of number i, for arrays whose type is known at run time only. */
DSV4__INLINE const void *dsv4__at(const void *data, dsv4_dtype dtype, int64_t i) {
    return (const unsigned char *)data + (size_t)i * dsv4_dtype_size(dtype);
}

DSV4__INLINE void *dsv4__at_mutable(void *data, dsv4_dtype dtype, int64_t i) {
    return (unsigned char *)data + (size_t)i * dsv4_dtype_size(dtype);
}

/* A matrix with its stride's default in place. */
static dsv4_const_matrix dsv4__with_stride(dsv4_const_matrix matrix, int64_t columns) {
    if (matrix.stride == 0) matrix.stride = columns;
    return matrix;
}

static dsv4_const_matrix dsv4__as_const(dsv4_matrix matrix) {
    const dsv4_const_matrix same = {matrix.data, matrix.dtype, matrix.stride};
    return same;
}

/* Address of a row's number `column`, where the stride is known. */
DSV4__INLINE const void *dsv4__in(dsv4_const_matrix matrix, int64_t row, int64_t column) {
    return dsv4__at(matrix.data, matrix.dtype, row * matrix.stride + column);
}

DSV4__INLINE void *dsv4__in_mutable(dsv4_matrix matrix, int64_t row, int64_t column) {
    return dsv4__at_mutable(matrix.data, matrix.dtype, row * matrix.stride + column);
}

/* A matrix [rows, columns] of either type to rows of fp32, `stride` apart; and back. */
static void dsv4__read_matrix(dsv4_const_matrix from, float *to, int64_t stride, int64_t rows, int64_t columns) {
    from = dsv4__with_stride(from, columns);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < columns; i++)
            to[r * stride + i] = dsv4__get(from.data, from.dtype, r * from.stride + i);
}

static void dsv4__write_matrix(dsv4_matrix to, const float *from, int64_t stride, int64_t rows, int64_t columns) {
    for (int64_t r = 0; r < rows; r++) /* its stride has been filled in by the checks */
        for (int64_t i = 0; i < columns; i++) dsv4__put(to.data, to.dtype, r * to.stride + i, from[r * stride + i]);
}

/* ------------------------------------------------------------------------------------------------------------
 * 3d. Scalar mathematics: products that stay products, fma, logarithm, power, sine and cosine, frequencies
 * ------------------------------------------------------------------------------------------------------------ */

/* The same value, of which the compiler does not see how it came about: told to fuse, it would take the product behind
 * it into a following sum, and change the last bit. */
DSV4__INLINE double dsv4__kept(double value) {
#if defined(DSV4__GNU) && defined(__x86_64__)
    __asm__("" : "+x"(value));
    return value;
#elif defined(DSV4__GNU) && defined(__aarch64__)
    __asm__("" : "+w"(value));
    return value;
#else
    volatile double memory = value;
    return memory;
#endif
}

/* a * b rounded, whatever follows. */
DSV4__INLINE double dsv4__mul(double a, double b) { return dsv4__kept(a * b); }

/* Fused multiply-add. Without the instruction: the product is exact in double, and the sum is rounded to odd there,
 * so that rounding it once more to float rounds the exact value. (c may be a product itself, which is kept out of
 * the sum.) */
DSV4__INLINE float dsv4__fma(float a, float b, float c) {
#if defined(DSV4__GNU) && (defined(FP_FAST_FMAF) || defined(__FMA__))
    return __builtin_fmaf(a, b, c);
#else
    const double product = (double)a * (double)b, addend = dsv4__kept((double)c);
    double sum = product + addend;
    const double back = sum - product;
    const double lost = (product - (sum - back)) + (addend - back);
    if (lost > 0 || lost < 0) { /* false for NaN: an infinite sum needs no care */
        uint64_t bits;
        memcpy(&bits, &sum, sizeof bits);
        if ((bits & 1u) == 0) bits = ((lost > 0) == (sum > 0)) ? bits + 1 : bits - 1;
        memcpy(&sum, &bits, sizeof sum);
    }
    return (float)sum;
#endif
}

#define DSV4__LN2 0.6931471805599453094
#define DSV4__PI  3.14159265358979323846

/* ln x for a positive normal x: x = f 2^k with f in [sqrt(1/2), sqrt(2)), ln f = 2 atanh((f - 1) / (f + 1)). */
static double dsv4__log(double x) {
    uint64_t bits;
    double f, sum = 0;
    memcpy(&bits, &x, sizeof bits);
    int64_t k = (int64_t)(bits >> 52) - 1023;
    bits = (bits & 0xfffffffffffffu) | ((uint64_t)1023 << 52);
    memcpy(&f, &bits, sizeof f);
    if (f > 1.41421356237309504880) {
        f /= 2;
        k++;
    }
    const double s = (f - 1) / (f + 1), square = dsv4__mul(s, s);
    for (int n = 25; n >= 1; n -= 2) sum = dsv4__mul(sum, square) + 1.0 / n;
    return dsv4__mul((double)k, DSV4__LN2) + dsv4__mul(2 * s, sum);
}

/* e^x for 0 <= x < 700. */
static double dsv4__exp(double x) {
    const double ratio = x / DSV4__LN2;
    const int64_t k = (int64_t)(ratio + 0.5);
    const double r =
        (x - dsv4__mul((double)k, 6.93147180369123816490e-01)) - dsv4__mul((double)k, 1.90821492927058770002e-10);
    double sum = 1, power;
    for (int n = 18; n >= 1; n--) sum = 1 + dsv4__mul(sum, r) / n;
    const uint64_t bits = (uint64_t)(k + 1023) << 52;
    memcpy(&power, &bits, sizeof power);
    return dsv4__mul(sum, power);
}

/* Series of cosine and sine in the square of the angle. */
static const double dsv4__cosine[] = {1.0,
                                      -1.0 / 2,
                                      1.0 / 24,
                                      -1.0 / 720,
                                      1.0 / 40320,
                                      -1.0 / 3628800,
                                      1.0 / 479001600,
                                      -1.0 / 87178291200.0,
                                      1.0 / 20922789888000.0};
static const double dsv4__sine[] = {1.0,          -1.0 / 6,        1.0 / 120,          -1.0 / 5040,
                                    1.0 / 362880, -1.0 / 39916800, 1.0 / 6227020800.0, -1.0 / 1307674368000.0,
                                    0.0};
#define DSV4__EIGHTH 0.78539816f                            /* of a turn: up to it angles stay as they are */
#define DSV4__RADIAN (DSV4__PI / 2 / 4611686018427387904.0) /* of a quarter turn's 2^62 parts, one */

/* 64 bits of 2/pi, from its word `word` on; the first one stands for 32 leading zeros. */
DSV4__INLINE uint64_t dsv4__two_over_pi(unsigned word) {
    static const uint32_t words[] = {0,           0xa2f9836eu, 0x4e441529u, 0xfc2757d1u,
                                     0xf534ddc0u, 0xdb629599u, 0x3c439041u, 0xfe5163abu};
    return (uint64_t)words[word] << 32 | words[word + 1];
}

/* angle * 2/pi modulo 4, angle >= pi/4, as *quadrant and the rest in radians, at most pi/4 either way. The angle is
 * M 2^e with an integer M of 24 bits, so only the 96 bits of 2/pi from the one worth 2 / 2^e on matter. */
static double dsv4__reduce(float angle, unsigned *quadrant) {
    const uint32_t bits = dsv4__bits(angle);
    const uint64_t mantissa = (bits & 0x7fffffu) | 0x800000u;
    const unsigned start =
        (bits >> 23) - 150u + 30u; /* bit of the table, whose first word stands for 32 leading zeros */
    const unsigned word = start / 32, shift = start % 32;
    uint32_t window[3];
    DSV4__UNROLL
    for (unsigned i = 0; i < 3; i++) window[i] = (uint32_t)((dsv4__two_over_pi(word + i) << shift) >> 32);
    const uint64_t turns = ((mantissa * window[0]) << 32) + mantissa * window[1] + ((mantissa * window[2]) >> 32);
    const uint64_t nearest = (turns + ((uint64_t)1 << 61)) >> 62;
    const uint64_t rest = turns - (nearest << 62);
    int64_t quarter; /* of two's complement: no branch, which angles at random would mispredict */
    memcpy(&quarter, &rest, sizeof quarter);
    *quadrant = (unsigned)(nearest & 3u);
    return dsv4__mul((double)quarter, DSV4__RADIAN);
}

DSV4_API void dsv4_cos_sin(float angle, float *cos_out, float *sin_out) {
    unsigned quadrant = 0;
    double rest = (double)angle;
    if (!(angle >= 0 && angle < INFINITY)) {
        *cos_out = *sin_out = NAN;
        return;
    }
    if (angle > DSV4__EIGHTH) rest = dsv4__reduce(angle, &quadrant);
    const double square = dsv4__mul(rest, rest);
    double even = dsv4__cosine[8], odd = dsv4__sine[8]; /* Horner's rule */
    DSV4__UNROLL
    for (int i = 7; i >= 0; i--) {
        even = dsv4__mul(even, square) + dsv4__cosine[i];
        odd = dsv4__mul(odd, square) + dsv4__sine[i];
    }
    const uint32_t c = dsv4__bits((float)even), s = dsv4__bits((float)dsv4__mul(rest, odd));
    const uint32_t exchange = (c ^ s) & (0u - (quadrant & 1u)); /* without branches here too */
    *cos_out = dsv4__from_bits(c ^ exchange ^ (((quadrant + 1u) & 2u) << 30));
    *sin_out = dsv4__from_bits(s ^ exchange ^ ((quadrant & 2u) << 30));
}

/* The pair index at which a frequency turns `rotations` times within the original context (YaRN's
 * find_correction_dim). */
static double dsv4__yarn_dim(const dsv4_config *config, double rotations) {
    const double turns = config->yarn_orig_ctx / dsv4__mul(2 * DSV4__PI, rotations);
    return dsv4__mul((double)config->rope_dim, dsv4__log(turns)) / (2 * dsv4__log(config->rope_theta));
}

typedef struct dsv4__yarn {
    float low, width; /* the ramp over pair indices: 0 up to low, 1 from low + width on */
    float factor;
} dsv4__yarn;

static dsv4__yarn dsv4__yarn_ramp(const dsv4_config *config) {
    dsv4__yarn yarn;
    const double limit = 1e9; /* far beyond any rope_dim, and safe to convert */
    const double fast = dsv4__yarn_dim(config, config->yarn_beta_fast);
    const double slow = dsv4__yarn_dim(config, config->yarn_beta_slow);
    int64_t low = (int64_t)(fast < 0 ? 0 : fast > limit ? limit : fast);
    int64_t high = (int64_t)(slow < -limit ? -limit : slow > limit ? limit : slow);
    if ((double)high < slow) high++;
    high = dsv4__min(high, config->rope_dim - 1);
    yarn.low = (float)low;
    yarn.width = high == low ? 0.001f : (float)(high - low);
    yarn.factor = (float)config->yarn_factor;
    return yarn;
}

/* `config` has its defaults filled in. Every step is rounded to fp32, as the reference's tensors are. */
static void dsv4__frequencies(const dsv4_config *config, float *inv_freq) {
    const double log_theta = config->rope_dim > 0 ? dsv4__log(config->rope_theta) : 0;
    const dsv4__yarn yarn = dsv4__yarn_ramp(config);
    for (int64_t i = 0; i < config->rope_dim / 2; i++) {
        const float power = (float)dsv4__exp(dsv4__mul(log_theta, (double)(2 * i)) / (double)config->rope_dim);
        const float base = 1.0f / power;
        const float above = (float)i - yarn.low;
        float ramp = above / yarn.width;
        ramp = ramp < 0 ? 0 : ramp > 1 ? 1 : ramp;
        const float scaled = base / yarn.factor, rest = 1.0f - ramp;
        const float slow = (float)dsv4__mul((double)scaled, (double)ramp);
        const float fast = (float)dsv4__mul((double)base, (double)rest);
        inv_freq[i] = config->yarn_factor > 1 ? slow + fast : base;
    }
}

/* ------------------------------------------------------------------------------------------------------------
 * 3e. Rows as caches hold them
 * ------------------------------------------------------------------------------------------------------------ */

typedef struct dsv4__row_format {
    const dsv4__small *code; /* NULL: rows stay as they are */
    int64_t block;           /* channels that share a scale */
    int64_t scale_bytes;     /* 4: fp32; 1: E4M3, or a power of two by its exponent */
    float least;             /* what a block's greatest magnitude is at least taken for */
    float inverse;           /* of the code's greatest number; 0: scales are E4M3, not powers of two */
    int keeps_rope;          /* RoPE's channels stay bf16 */
    int hadamard;
} dsv4__row_format;

static const dsv4__row_format dsv4__row_formats[DSV4_ROWS_COUNT] = {
    {NULL, 1, 0, 0, 0, 0, 0},
    {&dsv4__e4m3, 64, 1, 1e-4f, 1.0f / 448, 1, 0},
    {&dsv4__e4m3, 128, 4, 1e-4f, 1.0f / 448, 0, 0},
    {&dsv4__e2m1, 32, 1, 6.0f * FLT_MIN, 1.0f / 6, 0, 1},
    {&dsv4__e2m1, 16, 1, 6.0f / 512, 0, 0, 0},
};

static const dsv4__row_format *dsv4__format_of(const dsv4_config *config) { return &dsv4__row_formats[config->rows]; }

/* How many channels, from the first on, become codes. */
static int64_t dsv4__coded(const dsv4_config *config) {
    const dsv4__row_format *format = dsv4__format_of(config);
    if (format->code == NULL) return 0;
    return config->head_dim - (format->keeps_rope ? config->rope_dim : 0);
}

static int64_t dsv4__row_bytes(const dsv4_config *config) {
    const int64_t coded = dsv4__coded(config);
    return (dsv4__format_of(config)->code == &dsv4__e4m3 ? coded : coded / 2) + 2 * (config->head_dim - coded);
}

static int64_t dsv4__scale_bytes(const dsv4_config *config) {
    const dsv4__row_format *format = dsv4__format_of(config);
    return dsv4__ceil_div(dsv4__coded(config), format->block) * format->scale_bytes;
}

/* The least power of two that is not below a positive normal number: its exponent, plus 1 where a mantissa carries. */
DSV4__INLINE float dsv4__power_above(float value) {
    return dsv4__from_bits(((dsv4__bits(value) + 0x7fffffu) >> 23) << 23);
}

DSV4__INLINE void dsv4__put_scale(const dsv4__row_format *format, unsigned char *to, float scale) {
    const uint32_t bits = dsv4__bits(scale);
    if (format->scale_bytes == 4)
        for (int i = 0; i < 4; i++) to[i] = (unsigned char)(bits >> (8 * i) & 0xff);
    else
        *to = (unsigned char)(format->inverse > 0 ? bits >> 23 : dsv4__small_code(&dsv4__e4m3, scale));
}

/* Any bytes: UE8M0's 0 is 2^-127, its 255 NaN. */
DSV4__INLINE float dsv4__get_scale(const dsv4__row_format *format, const unsigned char *from) {
    if (format->scale_bytes == 4)
        return dsv4__from_bits((uint32_t)from[0] | (uint32_t)from[1] << 8 | (uint32_t)from[2] << 16 |
                               (uint32_t)from[3] << 24);
    if (format->inverse == 0) return dsv4__small_value(&dsv4__e4m3, *from);
    return dsv4__from_bits(*from == 0 ? 0x400000u : *from == 255 ? 0x7fc00000u : (uint32_t)*from << 23);
}

/* D^-1/2 of a power of two. */
static float dsv4__hadamard_scale(int64_t dim) {
    float scale = 1;
    for (; dim > 1; dim /= 4) scale *= dim == 2 ? 0.707106781f : 0.5f;
    return scale;
}

/* ------------------------------------------------------------------------------------------------------------
 * 3f. What kernels are given. Each job is one call's worth of work on arrays that the caller of the kernel owns.
 * ------------------------------------------------------------------------------------------------------------ */

/* How a product adds its terms up: one after another where an operand is fp32; where both came as bf16, so that
 * products are exact, as the configuration says: in pairs, the odd term first, or in steps of 32, even and odd terms
 * apart. */
typedef enum dsv4__order { DSV4__FUSED_TERMS, DSV4__PAIRS, DSV4__STEPS } dsv4__order;

/* sum[rows, 32] (+)= x[rows, terms] w[terms, 32], one block of at most DSV4__KBLOCK terms, padded to pairs of terms. On
 * tiles: as many blocks as DSV4__SPAN holds, padded to steps; beyond 16 rows there is room, in x and in sum, for rows
 * up to a multiple of 16. */
typedef struct dsv4__product_job {
    const void *x; /* packed rows, DSV4__KBLOCK numbers each: fp32, or bf16 where `dot` */
    const void *w; /* fp32 [terms][32], or bf16 [terms / 2][32][2] */
    int w_bf16;
    dsv4__order order;
    int dot; /* the kernel set multiplies bf16 pairs itself */
    int64_t pairs, rows;
    int64_t x_block; /* on tiles: bytes from block to block of x; those of w lie one behind another */
    float *sum;
    int64_t sum_stride;
    int first;          /* the block starts the sum instead of being added */
    int sums_in_memory; /* not in a cache: fetched early */
    uintptr_t next;     /* address of what a later call will read, if it reaches that far: fetched meanwhile */
    int64_t next_bytes;
    float *wide; /* scratch for one widened block, [DSV4__KBLOCK][32] */
} dsv4__product_job;

/* A tile's share of job->next, spread evenly over its rounds of two pairs: `step` bytes in each. */
typedef struct dsv4__ahead {
    uintptr_t from;
    int64_t step;
} dsv4__ahead;

DSV4__INLINE dsv4__ahead dsv4__fetch_ahead(const dsv4__product_job *job, int64_t row, int64_t rows) {
    dsv4__ahead ahead;
    ahead.from = job->next + (uintptr_t)(job->next_bytes * row / job->rows);
    ahead.step = job->next_bytes * rows / job->rows / ((job->pairs + 1) / 2);
    return ahead;
}

/* How many tiles of `height` rows to begin with: as many as fit, or up to three fewer where tiles of `small_height`
 * rows then leave less, since those that are lower still keep the multipliers waiting for their own sums. */
DSV4__INLINE int64_t dsv4__large_tiles(int64_t rows, int64_t height, int64_t small_height) {
    const int64_t most = rows / height;
    int64_t best = most;
    for (int64_t tiles = most - 1; tiles >= 0 && tiles >= most - 3; tiles--)
        if ((rows - tiles * height) % small_height < (rows - best * height) % small_height) best = tiles;
    return best;
}

/* Rows of one window that lie evenly in memory. kv NULL: the rows that window 0 lacks; gate, ape NULL: 0. */
typedef struct dsv4__run {
    const float *kv, *gate, *ape;
    int64_t stride, ape_stride, count;
    float *dkv, *dgate; /* where the rows' gradients go; NULL: nowhere */
    int64_t d_stride;
} dsv4__run;

typedef struct dsv4__window {
    dsv4__run runs[DSV4__MAX_RUNS];
    int run_count;
} dsv4__window;

typedef struct dsv4__pool_job {
    const dsv4__window *window;
    int64_t channels;
    uint32_t rounding;
    float pad_gate;
    float *scores;     /* scratch, [rows of the window, 32] */
    const float *from; /* what is folded already: top, den and num, fold_stride apart; NULL: nothing is */
    float *to;         /* where the fold is left for rows to come; NULL: the window closes, and `pooled` is written */
    int64_t fold_stride;
    float *pooled;  /* [channels] */
    float *weights; /* [rows of the window, weights_stride] or NULL */
    int64_t weights_stride;
    const float *dpooled; /* [channels], on the way back */
    int64_t rows_ahead;   /* rows come from memory: as many, so much further on, are fetched meanwhile; 0: nothing */
} dsv4__pool_job;

/* Asks for memory that will be read soon, and may not exist. */
DSV4__INLINE void dsv4__fetch(uintptr_t from, uintptr_t bytes) {
    for (uintptr_t line = 0; line < bytes; line += 64) DSV4__PREFETCH((const void *)(from + line));
}

/* The same into the second cache: memory that is read later, and more of it than the first cache's queues take. */
DSV4__INLINE void dsv4__fetch_far_ahead(uintptr_t from, uintptr_t bytes) {
    for (uintptr_t line = 0; line < bytes; line += 64) DSV4__PREFETCH_L2((const void *)(from + line));
}

/* One pooled row to one entry. `row` is scratch of head_dim numbers, `swapped` of rope_dim. */
typedef struct dsv4__finish_job {
    const dsv4_config *config;
    const float *norm, *cos_row, *sin_row;
    float *pooled, *row, *swapped;
    float *dpooled; /* [head_dim], on the way back */
    void *out, *latent;
    unsigned char *scales; /* where out_dtype is PACKED */
    dsv4_dtype out_dtype, latent_dtype;
} dsv4__finish_job;

/* One packed row to numbers. */
typedef struct dsv4__unpack_job {
    const dsv4_config *config;
    const unsigned char *row, *scales;
    void *to;
    dsv4_dtype dtype;
} dsv4__unpack_job;

/* The kernels of a set, in the order of its row in 3j. */
#define DSV4__KERNELS(X, set)                                                         \
    X(set, product, (const dsv4__product_job *))                                      \
    X(set, pool, (const dsv4__pool_job *))                                            \
    X(set, pool_back, (const dsv4__pool_job *))                                       \
    X(set, rope_row, (const dsv4_config *, const float *, int64_t, float *, float *)) \
    X(set, finish, (const dsv4__finish_job *))                                        \
    X(set, finish_back, (const dsv4__finish_job *))                                   \
    X(set, store, (const dsv4__finish_job *))                                         \
    X(set, unpack, (const dsv4__unpack_job *))                                        \
    X(set, add, (float *, const float *, const float *, int64_t))                     \
    X(set, round_array, (float *, int64_t))                                           \
    X(set, widen, (float *, const dsv4_bf16 *, int64_t))                              \
    X(set, narrow, (dsv4_bf16 *, const float *, int64_t))
#define DSV4__KERNEL_FIELD(set, name, arguments) void(*name) arguments;
#define DSV4__KERNEL_OF(set, name, arguments)    dsv4__##set##_##name,

/* A kernel set. */
typedef struct dsv4__kernels {
    const char *name;
    unsigned needs;    /* of the CPU */
    int dot;           /* has the bf16 dot product */
    int64_t tile_rows; /* rows of the register tile: blocks of a multiple of it waste nothing */
    DSV4__KERNELS(DSV4__KERNEL_FIELD, any)
    /* NULL, or how it multiplies on tiles: bf16 by bf16, in the order TILES. A task begins with jobs of `rows` rows, or
     * with any of them where that is 16 or more, and ends. */
    void (*tile_begin)(int64_t rows);
    void (*tile_product)(const dsv4__product_job *);
    void (*tile_end)(void);
} dsv4__kernels;

#define DSV4__ROUND_BIAS 12582912.0f /* 1.5 * 2^23: adding it leaves the nearest integer in the low bits */

/* The bits of 2^(i / 8), less i << 20: adding n << 20 at i = n mod 8 gives those of 2^(n / 8). Twice, for 16 lanes. */
static const uint32_t dsv4__eighths[16] = {0x3f800000u, 0x3f7b95c2u, 0x3f7837f0u, 0x3f75fed7u, 0x3f7504f3u, 0x3f75672au,
                                           0x3f7744fdu, 0x3f7ac0c7u, 0x3f800000u, 0x3f7b95c2u, 0x3f7837f0u, 0x3f75fed7u,
                                           0x3f7504f3u, 0x3f75672au, 0x3f7744fdu, 0x3f7ac0c7u};

/* What this file is read for once more each: a set of vector kernels, or, from AMX on, a product on tile registers. */
#define DSV4__FOR_SCALAR     1
#define DSV4__FOR_AVX2       2
#define DSV4__FOR_AVX512     3
#define DSV4__FOR_AVX512BF16 4
#define DSV4__FOR_NEON       5
#define DSV4__FOR_SIMDE      6
#define DSV4__FOR_FMA128     7
#define DSV4__FOR_AMX        8
#define DSV4__FOR_TILE_MODEL 9

#define DSV4__JOIN2(a, b) a##b
#define DSV4__JOIN(a, b)  DSV4__JOIN2(a, b)
#define DSV4__FN(name)    DSV4__JOIN(DSV4__JOIN(dsv4__, DSV4__SET), DSV4__JOIN(_, name))

#endif /* DSV4_COMPRESSOR_IMPLEMENTATION, first part */

#if defined(DSV4__STAMP) && DSV4__STAMP < DSV4__FOR_AMX
/* ------------------------------------------------------------------------------------------------------------
 * 3g. Vector layer: one block an instruction set, the same names in each. This room and the two behind it are read
 * once for each kernel set, by this file including itself.
 *
 *   DSV4__SET        name of the set             DSV4__VF           a vector of DSV4__VL floats
 *   DSV4__FUSED      fma is one instruction     DSV4__REGISTER     how assembly asks for a register of it, or memory
 *   DSV4__TILE_ROWS, DSV4__TILE_VECTORS          the register tile: rows, and vectors across (dividing 32 columns)
 *   v_zero() v_set(f) v_load(p) v_store(p, v)    pointers need no alignment
 *   v_load_n(p, n) v_store_n(p, v, n)            the first n < VL lanes; the rest reads as 0, is not written
 *   v_add v_sub v_mul v_div v_max                v_fma(a, b, c) = a b + c rounded once
 *   v_madd(a, b, c)                              the same where a b is exact, so that it may be rounded twice
 *   v_below(x, limit, v)                         0 in lanes where x < limit, else v
 *   v_above(a, b, x, y)                          x in lanes where a > b, else y
 *   v_gap(a, b)                                  a - b; 0 in lanes where they are equal, infinite too, and no exception
 *   v_power(t)                                   2^(n / 8), t = n + DSV4__ROUND_BIAS
 *   v_masked(v, bits) v_or(a, b)                 of the lanes' bits; v_left(v, n), v_right(v, n) move them
 *   v_bytes(p) v_put_bytes(p, v)                 VL bytes from and to memory, as the lanes' low bits
 *   v_round(v)                                   to bf16, nearest even, NaN quiet
 *   v_widen(p) v_narrow(p, v)                    VL bf16 from / to memory; v_narrow rounds
 *   v_cut(p, v)                                  as v_narrow, of numbers that are bf16 already
 *   v_even(p) v_odd(p)                           of VL pairs of bf16, widened
 *   v_pair(p) v_dot(sum, x, w)                   with DSV4__DOT: a pair of bf16 in all lanes; sum + odd + even product
 * ------------------------------------------------------------------------------------------------------------ */
/* What the compiler may use in this set, where that is more than the command line says. */
#if DSV4__STAMP == DSV4__FOR_AVX2
#define DSV4__TARGET "avx2,fma"
#elif DSV4__STAMP == DSV4__FOR_AVX512
#define DSV4__TARGET DSV4__AVX512
#elif DSV4__STAMP == DSV4__FOR_AVX512BF16
#define DSV4__TARGET "avx512bf16," DSV4__AVX512
#elif DSV4__STAMP == DSV4__FOR_FMA128
#define DSV4__TARGET "avx2,fma,prefer-vector-width=128"
#endif
#if defined(DSV4__TARGET)
DSV4__BEGIN_TARGET(DSV4__TARGET)
#endif

#if DSV4__STAMP == DSV4__FOR_SCALAR /* the definition that the others must equal */
#define DSV4__SET                  scalar
#define DSV4__VF                   float
#define DSV4__VL                   1
#define DSV4__REGISTER             "m"
#define DSV4__TILE_ROWS            4
#define DSV4__TILE_VECTORS         4
#define dsv4__v_zero()             0.0f
#define dsv4__v_set(f)             (f)
#define dsv4__v_load(p)            (*(p))
#define dsv4__v_store(p, v)        (*(p) = (v))
#define dsv4__v_load_n(p, n)       ((void)(p), (void)(n), 0.0f)
#define dsv4__v_store_n(p, v, n)   ((void)(p), (void)(v), (void)(n))
#define dsv4__v_add(a, b)          ((float)((a) + (b))) /* casts, as some machines evaluate float in double */
#define dsv4__v_sub(a, b)          ((float)((a) - (b)))
#define dsv4__v_mul(a, b)          ((float)((a) * (b)))
#define dsv4__v_div(a, b)          ((float)((a) / (b)))
#define dsv4__v_max(a, b)          ((a) > (b) ? (a) : (b))
#define dsv4__v_fma(a, b, c)       dsv4__fma(a, b, c)
#define dsv4__v_madd(a, b, c)      ((float)((a) * (b) + (c)))
#define dsv4__v_below(x, limit, v) ((x) < (limit) ? 0.0f : (v))
#define dsv4__v_above(a, b, x, y)  ((a) > (b) ? (x) : (y))
#define dsv4__v_gap(a, b)          DSV4__FN(gap)(a, b)
#define dsv4__v_masked(v, m)       dsv4__from_bits(dsv4__bits(v) & (m))
#define dsv4__v_left(v, n)         dsv4__from_bits(dsv4__bits(v) << (n))
#define dsv4__v_right(v, n)        dsv4__from_bits(dsv4__bits(v) >> (n))
#define dsv4__v_bytes(p)           dsv4__from_bits(*(p))
#define dsv4__v_put_bytes(p, v)    (*(p) = (unsigned char)dsv4__bits(v))
#define dsv4__v_cut(p, v)          (*(p) = (dsv4_bf16)(dsv4__bits(v) >> 16))
#define dsv4__v_or(a, b)           dsv4__from_bits(dsv4__bits(a) | dsv4__bits(b))
#define dsv4__v_power(t)           dsv4__from_bits((dsv4__bits(t) << 20) + dsv4__eighths[dsv4__bits(t) & 7u])
#define dsv4__v_round(v)           dsv4_bf16_to_f32(dsv4_bf16_from_f32(v))
#define dsv4__v_widen(p)           dsv4_bf16_to_f32(*(p))
#define dsv4__v_narrow(p, v)       (*(p) = dsv4_bf16_from_f32(v))
#define dsv4__v_even(p)            dsv4_bf16_to_f32((p)[0])
#define dsv4__v_odd(p)             dsv4_bf16_to_f32((p)[1])

static inline float DSV4__FN(gap)(float a, float b) {
    float less = a == b ? 0.0f : b;
    DSV4__UNSEEN(less);
    return a == b ? 0.0f : dsv4__v_sub(a, less);
}

#elif DSV4__STAMP == DSV4__FOR_AVX2 /* AVX2 with FMA: Haswell, Zen and later */
#define DSV4__SET                  avx2
#define DSV4__VF                   __m256
#define DSV4__VL                   8
#define DSV4__REGISTER             "x"
#define DSV4__FUSED                1
#define DSV4__TILE_ROWS            6
#define DSV4__TILE_VECTORS         2
#define dsv4__v_zero()             _mm256_setzero_ps()
#define dsv4__v_set(f)             _mm256_set1_ps(f)
#define dsv4__v_load(p)            _mm256_loadu_ps(p)
#define dsv4__v_store(p, v)        _mm256_storeu_ps(p, v)
#define dsv4__v_load_n(p, n)       _mm256_maskload_ps(p, DSV4__FN(mask)(n))
#define dsv4__v_store_n(p, v, n)   _mm256_maskstore_ps(p, DSV4__FN(mask)(n), v)
#define dsv4__v_add(a, b)          ((DSV4__VF)((a) + (b)))
#define dsv4__v_sub(a, b)          ((DSV4__VF)((a) - (b)))
#define dsv4__v_mul(a, b)          ((DSV4__VF)((a) * (b)))
#define dsv4__v_div(a, b)          ((DSV4__VF)((a) / (b)))
#define dsv4__v_max(a, b)          _mm256_max_ps(a, b)
#define dsv4__v_fma(a, b, c)       _mm256_fmadd_ps(a, b, c)
#define dsv4__v_madd(a, b, c)      _mm256_fmadd_ps(a, b, c)
#define dsv4__v_below(x, limit, v) _mm256_andnot_ps(_mm256_cmp_ps(x, limit, _CMP_LT_OQ), v)
#define dsv4__v_above(a, b, x, y)  _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_GT_OQ))
#define dsv4__v_gap(a, b)          DSV4__FN(gap)(a, b, _mm256_cmp_ps(a, b, _CMP_NEQ_UQ))
#define dsv4__v_masked(v, m)       _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_set1_epi32((int)(m))))
#define dsv4__v_left(v, n)         _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(v), n))
#define dsv4__v_right(v, n)        _mm256_castsi256_ps(_mm256_srli_epi32(_mm256_castps_si256(v), n))
#define dsv4__v_bytes(p)           DSV4__FN(bytes)(p)
#define dsv4__v_put_bytes(p, v)    DSV4__FN(put_bytes)(p, v)
#define dsv4__v_cut(p, v)                                                                                    \
    _mm_storeu_si128((__m128i *)(void *)(p),                                                                 \
                     _mm_packus_epi32(_mm256_castsi256_si128(_mm256_srli_epi32(_mm256_castps_si256(v), 16)), \
                                      _mm256_extracti128_si256(_mm256_srli_epi32(_mm256_castps_si256(v), 16), 1)))
#define dsv4__v_or(a, b) _mm256_or_ps(a, b)
#define dsv4__v_power(t) DSV4__FN(power)(_mm256_castps_si256(t))
#define dsv4__v_round(v) _mm256_castsi256_ps(_mm256_slli_epi32(DSV4__FN(upper)(v), 16))
#define dsv4__v_widen(p) \
    _mm256_castsi256_ps( \
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)(p))), 16))
#define dsv4__v_narrow(p, v)                                          \
    _mm_storeu_si128((__m128i *)(void *)(p),                          \
                     _mm256_castsi256_si128(_mm256_permute4x64_epi64( \
                         _mm256_packus_epi32(DSV4__FN(upper)(v), _mm256_setzero_si256()), 0xd8)))
#define dsv4__v_even(p) \
    _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256((const __m256i *)(const void *)(p)), 16))
#define dsv4__v_odd(p)   \
    _mm256_castsi256_ps( \
        _mm256_and_si256(_mm256_loadu_si256((const __m256i *)(const void *)(p)), _mm256_set1_epi32((int)0xffff0000u)))

static inline __m256 DSV4__FN(bytes)(const unsigned char *p) {
    return _mm256_castsi256_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)p)));
}

static inline void DSV4__FN(put_bytes)(unsigned char *p, __m256 v) {
    const __m256i lanes = _mm256_castps_si256(v);
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
    _mm_storel_epi64((__m128i *)(void *)p, _mm_packus_epi16(words, words));
}

static inline __m256 DSV4__FN(gap)(__m256 a, __m256 b, __m256 apart) {
    __m256 less = _mm256_and_ps(b, apart);
    DSV4__UNSEEN(less);
    return _mm256_and_ps(dsv4__v_sub(a, less), apart);
}

static inline __m256 DSV4__FN(power)(__m256i t) {
    const __m256i eighths = _mm256_loadu_si256((const __m256i *)(const void *)dsv4__eighths);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(t, 20), _mm256_permutevar8x32_epi32(eighths, t)));
}

static inline __m256i DSV4__FN(mask)(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

/* The upper halves after rounding, in the lower half of each lane. */
static inline __m256i DSV4__FN(upper)(__m256 v) {
    const __m256i bits = _mm256_castps_si256(v), up = _mm256_srli_epi32(bits, 16);
    const __m256i half = _mm256_add_epi32(_mm256_set1_epi32(0x7fff), _mm256_and_si256(up, _mm256_set1_epi32(1)));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, _mm256_or_si256(up, _mm256_set1_epi32(0x40)), nan);
}

#elif DSV4__STAMP == DSV4__FOR_AVX512 || DSV4__STAMP == DSV4__FOR_AVX512BF16
/* AVX-512: F, BW, VL, DQ; and the same with AVX512-BF16 */
#if DSV4__STAMP == DSV4__FOR_AVX512
#define DSV4__SET avx512
#else
#define DSV4__SET              avx512bf16
#define DSV4__DOT              1
#define dsv4__v_pair(p)        ((__m512bh)_mm512_set1_epi32(DSV4__FN(word)(p)))
#define dsv4__v_dot(sum, x, w) _mm512_dpbf16_ps(sum, x, (__m512bh)_mm512_loadu_si512((const void *)(w)))
#endif
#define DSV4__VF                   __m512
#define DSV4__VL                   16
#define DSV4__REGISTER             "v"
#define DSV4__FUSED                1
#define DSV4__TILE_ROWS            14
#define DSV4__TILE_VECTORS         2
#define dsv4__v_zero()             _mm512_setzero_ps()
#define dsv4__v_set(f)             _mm512_set1_ps(f)
#define dsv4__v_load(p)            _mm512_loadu_ps(p)
#define dsv4__v_store(p, v)        _mm512_storeu_ps(p, v)
#define dsv4__v_load_n(p, n)       _mm512_maskz_loadu_ps((__mmask16)((1u << (n)) - 1u), p)
#define dsv4__v_store_n(p, v, n)   _mm512_mask_storeu_ps(p, (__mmask16)((1u << (n)) - 1u), v)
#define dsv4__v_add(a, b)          ((DSV4__VF)((a) + (b)))
#define dsv4__v_sub(a, b)          ((DSV4__VF)((a) - (b)))
#define dsv4__v_mul(a, b)          ((DSV4__VF)((a) * (b)))
#define dsv4__v_div(a, b)          ((DSV4__VF)((a) / (b)))
#define dsv4__v_max(a, b)          _mm512_max_ps(a, b)
#define dsv4__v_fma(a, b, c)       _mm512_fmadd_ps(a, b, c)
#define dsv4__v_madd(a, b, c)      _mm512_fmadd_ps(a, b, c)
#define dsv4__v_below(x, limit, v) _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ), v)
#define dsv4__v_above(a, b, x, y)  _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), y, x)
#define dsv4__v_gap(a, b)          DSV4__FN(gap)(a, b, _mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ))
#define dsv4__v_masked(v, m)       _mm512_and_ps(v, _mm512_castsi512_ps(_mm512_set1_epi32((int)(m))))
#define dsv4__v_left(v, n)         _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(v), n))
#define dsv4__v_right(v, n)        _mm512_castsi512_ps(_mm512_srli_epi32(_mm512_castps_si512(v), n))
#define dsv4__v_bytes(p)           DSV4__FN(bytes)(p)
#define dsv4__v_put_bytes(p, v)    DSV4__FN(put_bytes)(p, v)
#define dsv4__v_cut(p, v) \
    _mm256_storeu_si256((__m256i *)(void *)(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(v), 16)))
#define dsv4__v_or(a, b) _mm512_or_ps(a, b)
#define dsv4__v_power(t) DSV4__FN(power)(_mm512_castps_si512(t))
#define dsv4__v_round(v) _mm512_castsi512_ps(_mm512_slli_epi32(DSV4__FN(upper)(v), 16))
#define dsv4__v_widen(p) \
    _mm512_castsi512_ps( \
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)(p))), 16))
#define dsv4__v_narrow(p, v) _mm256_storeu_si256((__m256i *)(void *)(p), _mm512_cvtepi32_epi16(DSV4__FN(upper)(v)))
#define dsv4__v_even(p)      _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512((const void *)(p)), 16))
#define dsv4__v_odd(p) \
    _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512((const void *)(p)), _mm512_set1_epi32((int)0xffff0000u)))

static inline __m512 DSV4__FN(bytes)(const unsigned char *p) {
    return _mm512_castsi512_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(const void *)p)));
}

static inline void DSV4__FN(put_bytes)(unsigned char *p, __m512 v) {
    _mm_storeu_si128((__m128i *)(void *)p, _mm512_cvtepi32_epi8(_mm512_castps_si512(v)));
}

static inline __m512 DSV4__FN(gap)(__m512 a, __m512 b, __mmask16 apart) {
    __m512 gap;
    __asm__("vsubps {%2, %1, %0%{%3%}%{z%}|%0%{%3%}%{z%}, %1, %2}" : "=v"(gap) : "v"(a), "v"(b), "Yk"(apart));
    return gap;
}

static inline __m512 DSV4__FN(power)(__m512i t) {
    const __m512i eighths = _mm512_loadu_si512((const void *)dsv4__eighths);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32(t, 20), _mm512_permutexvar_epi32(t, eighths)));
}

static inline __m512i DSV4__FN(upper)(__m512 v) {
    const __m512i bits = _mm512_castps_si512(v), up = _mm512_srli_epi32(bits, 16);
    const __m512i half = _mm512_add_epi32(_mm512_set1_epi32(0x7fff), _mm512_and_si512(up, _mm512_set1_epi32(1)));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_mask_or_epi32(rounded, nan, up, _mm512_set1_epi32(0x40));
}

#elif DSV4__STAMP == DSV4__FOR_NEON /* NEON, aarch64 */
#define DSV4__SET                  neon
#define DSV4__FUSED                1
#define DSV4__VF                   float32x4_t
#define DSV4__VL                   4
#define DSV4__REGISTER             "w"
#define DSV4__TILE_ROWS            6
#define DSV4__TILE_VECTORS         4
#define dsv4__v_zero()             vdupq_n_f32(0)
#define dsv4__v_set(f)             vdupq_n_f32(f)
#define dsv4__v_load(p)            vld1q_f32(p)
#define dsv4__v_store(p, v)        vst1q_f32(p, v)
#define dsv4__v_add(a, b)          ((DSV4__VF)((a) + (b)))
#define dsv4__v_sub(a, b)          ((DSV4__VF)((a) - (b)))
#define dsv4__v_mul(a, b)          ((DSV4__VF)((a) * (b)))
#define dsv4__v_div(a, b)          ((DSV4__VF)((a) / (b)))
#define dsv4__v_max(a, b)          vmaxq_f32(a, b)
#define dsv4__v_fma(a, b, c)       vfmaq_f32(c, a, b)
#define dsv4__v_madd(a, b, c)      vfmaq_f32(c, a, b)
#define dsv4__v_below(x, limit, v) vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(v), vcltq_f32(x, limit)))
#define dsv4__v_above(a, b, x, y)  vbslq_f32(vcgtq_f32(a, b), x, y)
#define dsv4__v_gap(a, b)          DSV4__FN(gap)(a, b, vceqq_f32(a, b))
#define dsv4__v_masked(v, m)       vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(v), vdupq_n_u32(m)))
#define dsv4__v_left(v, n)         vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(v), n))
#define dsv4__v_right(v, n)        vreinterpretq_f32_u32(vshrq_n_u32(vreinterpretq_u32_f32(v), n))
#define dsv4__v_bytes(p)           DSV4__FN(bytes)(p)
#define dsv4__v_put_bytes(p, v)    DSV4__FN(put_bytes)(p, v)
#define dsv4__v_cut(p, v)          vst1_u16(p, vshrn_n_u32(vreinterpretq_u32_f32(v), 16))
#define dsv4__v_or(a, b)           vreinterpretq_f32_u32(vorrq_u32(vreinterpretq_u32_f32(a), vreinterpretq_u32_f32(b)))
#define dsv4__v_power(t)           DSV4__FN(power)(vreinterpretq_u32_f32(t))
#define dsv4__v_round(v)           vreinterpretq_f32_u32(vshlq_n_u32(DSV4__FN(upper)(v), 16))
#define dsv4__v_widen(p)           vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16))
#define dsv4__v_narrow(p, v)       vst1_u16(p, vmovn_u32(DSV4__FN(upper)(v)))
#define dsv4__v_even(p)            vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_u16(vld1q_u16(p)), 16))
#define dsv4__v_high(p)            vandq_u16(vld1q_u16(p), vreinterpretq_u16_u32(vdupq_n_u32(~0xffffu)))
#define dsv4__v_odd(p)             vreinterpretq_f32_u16(dsv4__v_high(p))

static inline float32x4_t DSV4__FN(bytes)(const unsigned char *p) {
    uint32_t word;
    memcpy(&word, p, sizeof word);
    const uint16x8_t halves = vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(word)));
    return vreinterpretq_f32_u32(vmovl_u16(vget_low_u16(halves)));
}

static inline void DSV4__FN(put_bytes)(unsigned char *p, float32x4_t v) {
    const uint16x4_t halves = vmovn_u32(vreinterpretq_u32_f32(v));
    const uint32_t word = vget_lane_u32(vreinterpret_u32_u8(vmovn_u16(vcombine_u16(halves, halves))), 0);
    memcpy(p, &word, sizeof word);
}

static inline float32x4_t DSV4__FN(gap)(float32x4_t a, float32x4_t b, uint32x4_t equal) {
    float32x4_t less = vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(b), equal));
    DSV4__UNSEEN(less);
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(dsv4__v_sub(a, less)), equal));
}

/* Each lane's number of an eighth as the places of its four bytes. */
static inline float32x4_t DSV4__FN(power)(uint32x4_t t) {
    const uint32x4_t first = vandq_u32(vshlq_n_u32(t, 2), vdupq_n_u32(0x1cu));
    const uint32x4_t places = vmlaq_u32(vdupq_n_u32(0x03020100u), first, vdupq_n_u32(0x01010101u));
    uint8x16x2_t eighths;
    eighths.val[0] = vreinterpretq_u8_u32(vld1q_u32(dsv4__eighths));
    eighths.val[1] = vreinterpretq_u8_u32(vld1q_u32(dsv4__eighths + 4));
    const uint32x4_t eighth = vreinterpretq_u32_u8(vqtbl2q_u8(eighths, vreinterpretq_u8_u32(places)));
    return vreinterpretq_f32_u32(vaddq_u32(vshlq_n_u32(t, 20), eighth));
}

static inline uint32x4_t DSV4__FN(upper)(float32x4_t v) {
    const uint32x4_t bits = vreinterpretq_u32_f32(v), up = vshrq_n_u32(bits, 16);
    const uint32x4_t half = vaddq_u32(vdupq_n_u32(0x7fffu), vandq_u32(up, vdupq_n_u32(1u)));
    const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(bits, half), 16);
    return vbslq_u32(vceqq_f32(v, v), rounded, vorrq_u32(up, vdupq_n_u32(0x40u)));
}

#elif DSV4__STAMP == DSV4__FOR_SIMDE || DSV4__STAMP == DSV4__FOR_FMA128 /* four lanes, as SSE4.1 has them */
#if DSV4__STAMP == DSV4__FOR_SIMDE /* any CPU with 128-bit vectors, and plain C loops for the others */
#define DSV4__SET        simde
#define DSV4__VF         simde__m128
#define DSV4__VI         simde__m128i
#define DSV4__TILE_ROWS  4
#define dsv4__v_mm(name) simde_mm_##name
#else /* itself, with FMA: for GCC on Windows. No wider vectors by the compiler's own choice either */
#define DSV4__SET        fma128
#define DSV4__VF         __m128
#define DSV4__VI         __m128i
#define DSV4__TILE_ROWS  6
#define dsv4__v_mm(name) _mm_##name
#endif
#define DSV4__VL            4
#define DSV4__REGISTER      "m"
#define DSV4__TILE_VECTORS  2
#define dsv4__v_zero()      dsv4__v_mm(setzero_ps)()
#define dsv4__v_set(f)      dsv4__v_mm(set1_ps)(f)
#define dsv4__v_load(p)     dsv4__v_mm(loadu_ps)(p)
#define dsv4__v_store(p, v) dsv4__v_mm(storeu_ps)(p, v)
#if DSV4__STAMP == DSV4__FOR_FMA128 || defined(SIMDE_X86_SSE_NATIVE)
#define dsv4__v_add(a, b) ((DSV4__VF)((a) + (b)))
#define dsv4__v_sub(a, b) ((DSV4__VF)((a) - (b)))
#define dsv4__v_mul(a, b) ((DSV4__VF)((a) * (b)))
#define dsv4__v_div(a, b) ((DSV4__VF)((a) / (b)))
#else /* SIMDe's vectors may be structures */
#define dsv4__v_add(a, b) dsv4__v_mm(add_ps)(a, b)
#define dsv4__v_sub(a, b) dsv4__v_mm(sub_ps)(a, b)
#define dsv4__v_mul(a, b) dsv4__v_mm(mul_ps)(a, b)
#define dsv4__v_div(a, b) dsv4__v_mm(div_ps)(a, b)
#endif
#define dsv4__v_max(a, b) dsv4__v_mm(max_ps)(a, b)
#if DSV4__STAMP == DSV4__FOR_FMA128 || defined(SIMDE_X86_FMA_NATIVE) || defined(SIMDE_ARM_NEON_A64V8_NATIVE)
#define DSV4__FUSED          1
#define dsv4__v_fma(a, b, c) dsv4__v_mm(fmadd_ps)(a, b, c)
#else /* SIMDe would round the product here */
#define dsv4__v_fma(a, b, c) DSV4__FN(fma)(a, b, c)
#endif
#define dsv4__v_madd(a, b, c)      dsv4__v_add(dsv4__v_mul(a, b), c)
#define dsv4__v_below(x, limit, v) dsv4__v_mm(andnot_ps)(dsv4__v_mm(cmplt_ps)(x, limit), v)
#define dsv4__v_above(a, b, x, y)  dsv4__v_mm(blendv_ps)(y, x, dsv4__v_mm(cmpgt_ps)(a, b))
#define dsv4__v_gap(a, b)          DSV4__FN(gap)(a, b, dsv4__v_mm(cmpneq_ps)(a, b))
#define dsv4__v_masked(v, m)       dsv4__v_mm(and_ps)(v, dsv4__v_mm(castsi128_ps)(dsv4__v_mm(set1_epi32)((int32_t)(m))))
#define dsv4__v_left(v, n)         dsv4__v_mm(castsi128_ps)(dsv4__v_mm(slli_epi32)(dsv4__v_mm(castps_si128)(v), n))
#define dsv4__v_right(v, n)        dsv4__v_mm(castsi128_ps)(dsv4__v_mm(srli_epi32)(dsv4__v_mm(castps_si128)(v), n))
#define dsv4__v_bytes(p)           DSV4__FN(bytes)(p)
#define dsv4__v_put_bytes(p, v)    DSV4__FN(put_bytes)(p, v)
#define dsv4__v_cut(p, v)                                                                                      \
    dsv4__v_mm(storel_epi64)((DSV4__VI *)(void *)(p),                                                          \
                             dsv4__v_mm(packus_epi32)(dsv4__v_mm(srli_epi32)(dsv4__v_mm(castps_si128)(v), 16), \
                                                      dsv4__v_mm(setzero_si128)()))
#define dsv4__v_or(a, b) dsv4__v_mm(or_ps)(a, b)
#define dsv4__v_power(t) DSV4__FN(power)(dsv4__v_mm(castps_si128)(t))
#define dsv4__v_round(v) dsv4__v_mm(castsi128_ps)(dsv4__v_mm(slli_epi32)(DSV4__FN(upper)(v), 16))
#define dsv4__v_widen(p)                                                             \
    dsv4__v_mm(castsi128_ps)(dsv4__v_mm(unpacklo_epi16)(dsv4__v_mm(setzero_si128)(), \
                                                        dsv4__v_mm(loadl_epi64)((const DSV4__VI *)(const void *)(p))))
#define dsv4__v_narrow(p, v)                          \
    dsv4__v_mm(storel_epi64)((DSV4__VI *)(void *)(p), \
                             dsv4__v_mm(packus_epi32)(DSV4__FN(upper)(v), dsv4__v_mm(setzero_si128)()))
#define dsv4__v_even(p) \
    dsv4__v_mm(castsi128_ps)(dsv4__v_mm(slli_epi32)(dsv4__v_mm(loadu_si128)((const DSV4__VI *)(const void *)(p)), 16))
#define dsv4__v_odd(p)                                                                                           \
    dsv4__v_mm(castsi128_ps)(dsv4__v_mm(and_si128)(dsv4__v_mm(loadu_si128)((const DSV4__VI *)(const void *)(p)), \
                                                   dsv4__v_mm(set1_epi32)((int32_t)0xffff0000u)))

static inline DSV4__VF DSV4__FN(bytes)(const unsigned char *p) {
    int32_t word;
    memcpy(&word, p, sizeof word);
    return dsv4__v_mm(castsi128_ps)(dsv4__v_mm(cvtepu8_epi32)(dsv4__v_mm(cvtsi32_si128)(word)));
}

static inline void DSV4__FN(put_bytes)(unsigned char *p, DSV4__VF v) {
    const DSV4__VI lanes = dsv4__v_mm(castps_si128)(v), words = dsv4__v_mm(packus_epi32)(lanes, lanes);
    const int32_t word = dsv4__v_mm(cvtsi128_si32)(dsv4__v_mm(packus_epi16)(words, words));
    memcpy(p, &word, sizeof word);
}

static inline DSV4__VF DSV4__FN(gap)(DSV4__VF a, DSV4__VF b, DSV4__VF apart) {
    DSV4__VF less = dsv4__v_mm(and_ps)(b, apart);
    DSV4__UNSEEN(less);
    return dsv4__v_mm(and_ps)(dsv4__v_sub(a, less), apart);
}

static inline DSV4__VF DSV4__FN(power)(DSV4__VI t) {
    const DSV4__VF low = dsv4__v_mm(permutevar_ps)(dsv4__v_load((const float *)(const void *)dsv4__eighths), t);
    const DSV4__VF high = dsv4__v_mm(permutevar_ps)(dsv4__v_load((const float *)(const void *)(dsv4__eighths + 4)), t);
    const DSV4__VF which = dsv4__v_mm(castsi128_ps)(dsv4__v_mm(slli_epi32)(t, 29));
    const DSV4__VI eighth = dsv4__v_mm(castps_si128)(dsv4__v_mm(blendv_ps)(low, high, which));
    return dsv4__v_mm(castsi128_ps)(dsv4__v_mm(add_epi32)(dsv4__v_mm(slli_epi32)(t, 20), eighth));
}

static inline DSV4__VI DSV4__FN(upper)(DSV4__VF v) {
    const DSV4__VI bits = dsv4__v_mm(castps_si128)(v), up = dsv4__v_mm(srli_epi32)(bits, 16);
    const DSV4__VI half =
        dsv4__v_mm(add_epi32)(dsv4__v_mm(set1_epi32)(0x7fff), dsv4__v_mm(and_si128)(up, dsv4__v_mm(set1_epi32)(1)));
    const DSV4__VI rounded = dsv4__v_mm(srli_epi32)(dsv4__v_mm(add_epi32)(bits, half), 16);
    const DSV4__VI nan = dsv4__v_mm(castps_si128)(dsv4__v_mm(cmpunord_ps)(v, v));
    return dsv4__v_mm(blendv_epi8)(rounded, dsv4__v_mm(or_si128)(up, dsv4__v_mm(set1_epi32)(0x40)), nan);
}

DSV4__UNUSED static inline DSV4__VF DSV4__FN(fma)(DSV4__VF a, DSV4__VF b, DSV4__VF c) {
    float x[4], y[4], z[4];
    dsv4__v_mm(storeu_ps)(x, a);
    dsv4__v_mm(storeu_ps)(y, b);
    dsv4__v_mm(storeu_ps)(z, c);
    for (int i = 0; i < 4; i++) z[i] = dsv4__fma(x[i], y[i], z[i]);
    return dsv4__v_mm(loadu_ps)(z);
}
#endif

/* Four lanes go through memory. */
#if DSV4__STAMP == DSV4__FOR_NEON || DSV4__STAMP == DSV4__FOR_SIMDE || DSV4__STAMP == DSV4__FOR_FMA128
#define dsv4__v_load_n(p, n)     DSV4__FN(load_n)(p, n)
#define dsv4__v_store_n(p, v, n) DSV4__FN(store_n)(p, v, n)

static inline DSV4__VF DSV4__FN(load_n)(const float *p, int64_t n) {
    float lanes[DSV4__VL] = {0};
    for (int64_t i = 0; i < n; i++) lanes[i] = p[i];
    return dsv4__v_load(lanes);
}

static inline void DSV4__FN(store_n)(float *p, DSV4__VF v, int64_t n) {
    float lanes[DSV4__VL];
    dsv4__v_store(lanes, v);
    for (int64_t i = 0; i < n; i++) p[i] = lanes[i];
}
#endif

/* ------------------------------------------------------------------------------------------------------------
 * 3h. Row kernels, over the vector layer alone
 * ------------------------------------------------------------------------------------------------------------ */

DSV4__INLINE DSV4__VF DSV4__FN(load_some)(const float *p, int64_t n) {
    return n >= DSV4__VL ? dsv4__v_load(p) : dsv4__v_load_n(p, n);
}

DSV4__INLINE void DSV4__FN(store_some)(float *p, DSV4__VF v, int64_t n) {
    if (n >= DSV4__VL)
        dsv4__v_store(p, v);
    else
        dsv4__v_store_n(p, v, n);
}

/* ---- Windows: softmax and pooling --------------------------------------------------------------------------- */

/* Pooling works on DSV4__POOL_VECTORS vectors of channels side by side, and on one where fewer are left: `vectors` of
 * them, a constant at every call, over each of which goes DSV4__EACH. */
#define DSV4__POOL_VECTORS (DSV4__PANEL / DSV4__VL < 4 ? DSV4__PANEL / DSV4__VL : 4)
#define DSV4__EACH(v)      DSV4__UNROLL for (int v = 0; v < vectors; v++)

/* e^x for x <= 0, within 2 ulp: x = n ln 2 / 8 + r, e^r = 1 + r + r^2 q(r), q fitted so that the greatest error is
 * least. 0 where the result would be subnormal; what is there, -INFINITY above all, is kept out of the arithmetic. Of
 * some vectors side by side, a step of all of them after the other. */
DSV4__INLINE void DSV4__FN(exp)(DSV4__VF *x, const int vectors) {
    const DSV4__VF least = dsv4__v_set(-87.3365402f), magic = dsv4__v_set(DSV4__ROUND_BIAS);
    DSV4__VF within[DSV4__POOL_VECTORS], t[DSV4__POOL_VECTORS], n[DSV4__POOL_VECTORS];
    DSV4__VF r[DSV4__POOL_VECTORS], q[DSV4__POOL_VECTORS];
    DSV4__EACH (v) {
        within[v] = dsv4__v_below(x[v], least, x[v]);
        DSV4__UNSEEN(within[v]);
    }
    DSV4__EACH (v) {
        t[v] = dsv4__v_fma(within[v], dsv4__v_set(11.5415602f), magic);
        n[v] = dsv4__v_sub(t[v], magic);
    }
    DSV4__EACH (v) r[v] = dsv4__v_fma(n[v], dsv4__v_set(-0.0866433978f), within[v]);
    DSV4__EACH (v) r[v] = dsv4__v_fma(n[v], dsv4__v_set(2.3808179e-10f), r[v]);
    DSV4__EACH (v) q[v] = dsv4__v_fma(dsv4__v_set(0.166668236f), r[v], dsv4__v_set(0.500064492f));
    DSV4__EACH (v) q[v] = dsv4__v_fma(dsv4__v_mul(q[v], r[v]), r[v], r[v]);
    DSV4__EACH (v) {
        const DSV4__VF power = dsv4__v_power(t[v]);
        x[v] = dsv4__v_below(x[v], least, dsv4__v_fma(power, q[v], power));
    }
}

/* The vectors of channels from c on: `vectors` of them, or n < VL channels of one. */
#define DSV4__CHANNELS DSV4__FN(channels)
typedef struct DSV4__CHANNELS {
    int64_t c, n;
} DSV4__CHANNELS;

/* One pass over a window's rows in order: the greatest score so far, and the sums of e^(score - top) and of that times
 * kv. What it holds is all that an open window needs of the rows it has seen. */
#define DSV4__FOLD DSV4__FN(fold)
typedef struct DSV4__FOLD {
    DSV4__VF top[DSV4__POOL_VECTORS], den[DSV4__POOL_VECTORS], num[DSV4__POOL_VECTORS];
} DSV4__FOLD;

/* Softmax in two passes, where weights are needed one by one: maximum, and the sums of e and of e kv in row order. */
#define DSV4__SOFTMAX DSV4__FN(softmax)
typedef struct DSV4__SOFTMAX {
    DSV4__VF top[DSV4__POOL_VECTORS], den[DSV4__POOL_VECTORS], sum[DSV4__POOL_VECTORS];
} DSV4__SOFTMAX;

/* Of the rows that are fetched: the next one, and its channels from c on. */
#define DSV4__FETCH DSV4__FN(fetch)
typedef struct DSV4__FETCH {
    int run;
    int64_t row, c;
} DSV4__FETCH;

/* Asks for as much as one row's span of channels, beside the arithmetic of one: in one go, rows would be more than a
 * core can wait for. And row by row, in whatever order they are folded, as memory likes it best. */
DSV4__INLINE void DSV4__FN(fetch_some)(const dsv4__pool_job *job, DSV4__FETCH *next, const int vectors) {
    if (job->rows_ahead == 0 || next->run == job->window->run_count) return;
    const dsv4__run *run = &job->window->runs[next->run];
    const uintptr_t offset = (uintptr_t)((next->row + job->rows_ahead) * run->stride + next->c) * sizeof(float);
    const uintptr_t bytes = (uintptr_t)(vectors * DSV4__VL) * sizeof(float);
    if (run->kv != NULL) dsv4__fetch_far_ahead((uintptr_t)run->kv + offset, bytes);
    if (run->gate != NULL) dsv4__fetch_far_ahead((uintptr_t)run->gate + offset, bytes);
    next->c += vectors * DSV4__VL;
    if (next->c < job->channels) return;
    next->c = 0;
    if (++next->row < run->count) return;
    next->row = 0;
    next->run++;
}

/* Whether a run's scores are its gates and ape, not rounded: what most are, and quickest. */
static int DSV4__FN(is_plain)(const dsv4__pool_job *job, const dsv4__run *run) {
    return run->kv != NULL && run->gate != NULL && run->ape != NULL && !(job->rounding & DSV4_ROUND_SCORE);
}

/* The scores of one row of a run. */
DSV4__INLINE void DSV4__FN(score_row)(const dsv4__pool_job *job, const dsv4__run *run, int64_t row, DSV4__CHANNELS at,
                                      const int vectors, const int plain, DSV4__VF *score) {
    const int gated = plain || (run->kv != NULL && run->gate != NULL), added = plain || (gated && run->ape != NULL);
    const float *gate = gated ? run->gate + row * run->stride + at.c : NULL;
    const float *ape = added ? run->ape + row * run->ape_stride + at.c : NULL;
    DSV4__EACH (v)
        score[v] = gated ? DSV4__FN(load_some)(gate + v * DSV4__VL, at.n)
                         : dsv4__v_set(run->kv == NULL ? job->pad_gate : 0.0f);
    if (added) {
        DSV4__EACH (v) score[v] = dsv4__v_add(score[v], DSV4__FN(load_some)(ape + v * DSV4__VL, at.n));
    }
    if (!plain && gated && (job->rounding & DSV4_ROUND_SCORE)) {
        DSV4__EACH (v) score[v] = dsv4__v_round(score[v]);
    }
}

DSV4__INLINE DSV4__VF DSV4__FN(value)(const dsv4__run *run, int64_t row, int64_t c, int64_t n) {
    return run->kv == NULL ? dsv4__v_zero() : DSV4__FN(load_some)(run->kv + row * run->stride + c, n);
}

/* One more row. Whichever of score and top is the smaller brings e^-|score - top| to its side of the sums. Equal ones,
 * both -INFINITY among them, never meet in a subtraction. */
DSV4__INLINE void DSV4__FN(fold_row)(DSV4__FOLD *f, const DSV4__VF *score, const DSV4__VF *value, const int vectors) {
    const DSV4__VF one = dsv4__v_set(1.0f);
    DSV4__VF e[DSV4__POOL_VECTORS];
    DSV4__EACH (v) e[v] = dsv4__v_or(dsv4__v_gap(score[v], f->top[v]), dsv4__v_set(-0.0f));
    DSV4__FN(exp)(e, vectors);
    DSV4__EACH (v) {
        const DSV4__VF s = score[v], top = f->top[v], den = f->den[v], num = f->num[v];
        f->den[v] = dsv4__v_fma(dsv4__v_above(s, top, den, one), e[v], dsv4__v_above(s, top, one, den));
        f->num[v] = dsv4__v_fma(dsv4__v_above(s, top, num, value[v]), e[v], dsv4__v_above(s, top, value[v], num));
        f->top[v] = dsv4__v_above(s, top, s, top);
    }
}

/* Where the fold starts: at what the job goes on from, or at nothing. */
DSV4__INLINE void DSV4__FN(fold_begin)(const dsv4__pool_job *job, DSV4__CHANNELS at, const int vectors, DSV4__FOLD *f) {
    DSV4__EACH (v) {
        const float *from = job->from == NULL ? NULL : job->from + at.c + v * DSV4__VL;
        f->top[v] = from == NULL ? dsv4__v_zero() : DSV4__FN(load_some)(from, at.n);
        f->den[v] = from == NULL ? dsv4__v_zero() : DSV4__FN(load_some)(from + job->fold_stride, at.n);
        f->num[v] = from == NULL ? dsv4__v_zero() : DSV4__FN(load_some)(from + 2 * job->fold_stride, at.n);
    }
}

DSV4__INLINE void DSV4__FN(fold_store)(const dsv4__pool_job *job, DSV4__CHANNELS at, const int vectors,
                                       const DSV4__FOLD *f) {
    DSV4__EACH (v) {
        float *to = job->to + at.c + v * DSV4__VL;
        DSV4__FN(store_some)(to, f->top[v], at.n);
        DSV4__FN(store_some)(to + job->fold_stride, f->den[v], at.n);
        DSV4__FN(store_some)(to + 2 * job->fold_stride, f->num[v], at.n);
    }
}

/* Folds the rows of a run into what has been folded; `begun`: that is something. */
DSV4__INLINE void DSV4__FN(fold_run)(const dsv4__pool_job *job, const dsv4__run *run, DSV4__CHANNELS at,
                                     const int vectors, const int plain, int begun, DSV4__FETCH *next,
                                     DSV4__FOLD *folded) {
    DSV4__FOLD f = *folded;
    for (int64_t row = 0; row < run->count; row++) {
        DSV4__VF score[DSV4__POOL_VECTORS], value[DSV4__POOL_VECTORS];
        DSV4__FN(fetch_some)(job, next, vectors);
        DSV4__FN(score_row)(job, run, row, at, vectors, plain, score);
        DSV4__EACH (v) value[v] = DSV4__FN(value)(run, row, at.c + v * DSV4__VL, at.n);
        if (begun || row > 0) {
            DSV4__FN(fold_row)(&f, score, value, vectors);
            continue;
        }
        DSV4__EACH (v) {
            f.top[v] = score[v];
            f.den[v] = dsv4__v_set(1.0f);
            f.num[v] = value[v];
        }
    }
    *folded = f;
}

/* Folds the job's rows, and closes the window or leaves it open. A pad of -INFINITY is left out; a channel of nothing
 * but -INFINITY has no mean. */
DSV4__INLINE void DSV4__FN(fold_span)(const dsv4__pool_job *job, DSV4__CHANNELS at, const int vectors,
                                      DSV4__FETCH *next) {
    DSV4__FOLD f;
    int begun = job->from != NULL;
    DSV4__FN(fold_begin)(job, at, vectors, &f);
    for (int i = 0; i < job->window->run_count; i++) {
        const dsv4__run run = job->window->runs[i];
        if (run.kv == NULL && job->pad_gate < -FLT_MAX) continue;
        if (DSV4__FN(is_plain)(job, &run))
            DSV4__FN(fold_run)(job, &run, at, vectors, 1, begun, next, &f);
        else
            DSV4__FN(fold_run)(job, &run, at, vectors, 0, begun, next, &f);
        begun |= run.count > 0;
    }
    if (job->to != NULL) {
        DSV4__FN(fold_store)(job, at, vectors, &f);
        return;
    }
    DSV4__EACH (v) {
        const DSV4__VF mean =
            dsv4__v_above(f.top[v], dsv4__v_set(-INFINITY), dsv4__v_div(f.num[v], f.den[v]), dsv4__v_set(NAN));
        DSV4__FN(store_some)(job->pooled + at.c + v * DSV4__VL, mean, at.n);
    }
}

/* Writes the scores to job->scores [rows, vectors * VL]; their maximum to s->top. */
DSV4__INLINE void DSV4__FN(scores)(const dsv4__pool_job *job, DSV4__CHANNELS at, const int vectors, DSV4__FETCH *next,
                                   DSV4__SOFTMAX *s) {
    float *scores = job->scores;
    DSV4__EACH (v) s->top[v] = dsv4__v_set(-INFINITY);
    for (int i = 0; i < job->window->run_count; i++) {
        const dsv4__run run = job->window->runs[i];
        for (int64_t row = 0; row < run.count; row++) {
            DSV4__VF score[DSV4__POOL_VECTORS];
            DSV4__FN(fetch_some)(job, next, vectors);
            DSV4__FN(score_row)(job, &run, row, at, vectors, 0, score);
            DSV4__UNROLL
            for (int v = 0; v < vectors; v++, scores += DSV4__VL) {
                dsv4__v_store(scores, score[v]);
                s->top[v] = dsv4__v_max(s->top[v], score[v]);
            }
        }
    }
}

/* Sums the scores' exponentials, and puts these where the scores were. */
DSV4__INLINE void DSV4__FN(exponentials)(const dsv4__pool_job *job, DSV4__CHANNELS at, const int vectors,
                                         DSV4__SOFTMAX *s) {
    float *scores = job->scores;
    DSV4__EACH (v) s->den[v] = s->sum[v] = dsv4__v_zero();
    for (int i = 0; i < job->window->run_count; i++) {
        const dsv4__run run = job->window->runs[i];
        for (int64_t row = 0; row < run.count; row++) {
            DSV4__VF e[DSV4__POOL_VECTORS];
            DSV4__EACH (v) e[v] = dsv4__v_sub(dsv4__v_load(scores + v * DSV4__VL), s->top[v]);
            DSV4__FN(exp)(e, vectors);
            DSV4__UNROLL
            for (int v = 0; v < vectors; v++, scores += DSV4__VL) {
                dsv4__v_store(scores, e[v]);
                s->den[v] = dsv4__v_add(s->den[v], e[v]);
                s->sum[v] = dsv4__v_fma(e[v], DSV4__FN(value)(&run, row, at.c + v * DSV4__VL, at.n), s->sum[v]);
            }
        }
    }
}

/* Where softmax weights are wanted one by one, rounded presets and the stage: sum becomes that of the rounded ones. On
 * arrays of its own, so that the other steps' stay in registers. */
DSV4__INLINE void DSV4__FN(weigh_rows)(const dsv4__pool_job *job, DSV4__CHANNELS at, const int vectors,
                                       DSV4__SOFTMAX *s) {
    const float *e = job->scores;
    float *weights = job->weights;
    DSV4__SOFTMAX own = *s;
    for (int v = 0; v < vectors; v++) own.sum[v] = dsv4__v_zero();
    for (int i = 0; i < job->window->run_count; i++) {
        const dsv4__run run = job->window->runs[i];
        for (int64_t row = 0; row < run.count; row++) {
            for (int v = 0; v < vectors; v++, e += DSV4__VL) {
                const DSV4__VF value = DSV4__FN(value)(&run, row, at.c + v * DSV4__VL, at.n);
                DSV4__VF weight = dsv4__v_div(dsv4__v_load(e), own.den[v]);
                if (job->rounding & DSV4_ROUND_WEIGHT) weight = dsv4__v_round(weight);
                if (job->rounding & DSV4_ROUND_PRODUCT)
                    own.sum[v] = dsv4__v_add(own.sum[v], dsv4__v_round(dsv4__v_mul(weight, value)));
                else
                    own.sum[v] = dsv4__v_fma(weight, value, own.sum[v]);
                if (weights != NULL) DSV4__FN(store_some)(weights + at.c + v * DSV4__VL, weight, at.n);
            }
            if (weights != NULL) weights += job->weights_stride;
        }
    }
    *s = own;
}

/* Rounded weights need both passes; so does the stage, beside the fold. */
DSV4__INLINE void DSV4__FN(pool_span)(const dsv4__pool_job *job, DSV4__CHANNELS at, const int vectors,
                                      DSV4__FETCH *next) {
    const int weighted = (job->rounding & (DSV4_ROUND_WEIGHT | DSV4_ROUND_PRODUCT)) != 0;
    if (!weighted) DSV4__FN(fold_span)(job, at, vectors, next);
    if (!weighted && job->weights == NULL) return;
    DSV4__SOFTMAX s;
    DSV4__FN(scores)(job, at, vectors, next, &s);
    DSV4__FN(exponentials)(job, at, vectors, &s);
    DSV4__FN(weigh_rows)(job, at, vectors, &s);
    DSV4__UNROLL
    for (int v = 0; v < vectors && weighted; v++)
        DSV4__FN(store_some)(job->pooled + at.c + v * DSV4__VL, s.sum[v], at.n);
}

/* The same weights on the way back: dkv_j = p_j dpooled and dgate_j = p_j dpooled (kv_j - mean), mean = sum p kv. */
DSV4__INLINE void DSV4__FN(pool_back_span)(const dsv4__pool_job *job, DSV4__CHANNELS at, const int vectors,
                                           DSV4__FETCH *next) {
    const float *e = job->scores;
    DSV4__SOFTMAX s;
    DSV4__FN(scores)(job, at, vectors, next, &s);
    DSV4__FN(exponentials)(job, at, vectors, &s);
    DSV4__EACH (v) s.sum[v] = dsv4__v_div(s.sum[v], s.den[v]);
    for (int i = 0; i < job->window->run_count; i++) {
        const dsv4__run run = job->window->runs[i];
        for (int64_t row = 0; row < run.count; row++)
            for (int v = 0; v < vectors; v++, e += DSV4__VL) {
                const int64_t c = at.c + v * DSV4__VL;
                if (run.dkv == NULL) continue;
                const DSV4__VF p = dsv4__v_div(dsv4__v_load(e), s.den[v]),
                               dpooled = DSV4__FN(load_some)(job->dpooled + c, at.n);
                const DSV4__VF weight = job->rounding & DSV4_ROUND_WEIGHT ? dsv4__v_round(p) : p;
                const DSV4__VF aside = dsv4__v_sub(DSV4__FN(value)(&run, row, c, at.n), s.sum[v]);
                DSV4__FN(store_some)(run.dkv + row * run.d_stride + c, dsv4__v_mul(weight, dpooled), at.n);
                if (run.dgate != NULL) DSV4__FN(store_some)
                (run.dgate + row * run.d_stride + c, dsv4__v_mul(dsv4__v_mul(p, dpooled), aside), at.n);
            }
    }
}

/* The pooled row of a window, or its gradient. */
DSV4__INLINE void DSV4__FN(spans)(const dsv4__pool_job *job, const int back) {
    const int64_t wide = DSV4__POOL_VECTORS * DSV4__VL;
    DSV4__FETCH next = {0, 0, 0};
    DSV4__CHANNELS at;
    at.n = DSV4__VL;
    for (at.c = 0; at.c + wide <= job->channels; at.c += wide) {
        if (back)
            DSV4__FN(pool_back_span)(job, at, DSV4__POOL_VECTORS, &next);
        else
            DSV4__FN(pool_span)(job, at, DSV4__POOL_VECTORS, &next);
    }
    for (; at.c < job->channels; at.c += DSV4__VL) {
        at.n = dsv4__min(job->channels - at.c, DSV4__VL);
        if (back)
            DSV4__FN(pool_back_span)(job, at, 1, &next);
        else
            DSV4__FN(pool_span)(job, at, 1, &next);
    }
}

static void DSV4__FN(pool)(const dsv4__pool_job *job) { DSV4__FN(spans)(job, 0); }
static void DSV4__FN(pool_back)(const dsv4__pool_job *job) { DSV4__FN(spans)(job, 1); }

/* ---- Rows: conversions, sums, norm, RoPE -------------------------------------------------------------------- */

/* Rounds in place. */
static void DSV4__FN(round_array)(float *data, int64_t count) {
    for (int64_t i = 0; i < count; i += DSV4__VL) {
        const int64_t n = dsv4__min(count - i, DSV4__VL);
        DSV4__FN(store_some)(data + i, dsv4__v_round(DSV4__FN(load_some)(data + i, n)), n);
    }
}

static void DSV4__FN(widen)(float *to, const dsv4_bf16 *from, int64_t count) {
    int64_t i = 0;
    for (; DSV4__VL > 1 && i + DSV4__VL <= count; i += DSV4__VL) dsv4__v_store(to + i, dsv4__v_widen(from + i));
    dsv4__widen(to + i, from + i, count - i);
}

static void DSV4__FN(narrow)(dsv4_bf16 *to, const float *from, int64_t count) {
    int64_t i = 0;
    for (; DSV4__VL > 1 && i + DSV4__VL <= count; i += DSV4__VL) dsv4__v_narrow(to + i, dsv4__v_load(from + i));
    dsv4__narrow(to + i, from + i, count - i);
}

static void DSV4__FN(put_row)(void *to, dsv4_dtype dtype, const float *from, int64_t count) {
    if (dtype == DSV4_BF16)
        DSV4__FN(narrow)((dsv4_bf16 *)to, from, count);
    else
        memcpy(to, from, (size_t)count * sizeof *from);
}

/* Sum of a b: lane l takes the elements l, l + 16, ...; then a fixed tree. */
static float DSV4__FN(dot_product)(const float *a, const float *b, int64_t count) {
    DSV4__VF sums[DSV4__LANES / DSV4__VL];
    float lanes[DSV4__LANES];
    for (int v = 0; v < DSV4__LANES / DSV4__VL; v++) sums[v] = dsv4__v_zero();
    for (int64_t i = 0; i < count; i += DSV4__LANES)
        for (int v = 0; v < DSV4__LANES / DSV4__VL; v++) {
            const int64_t n = count - i - v * DSV4__VL;
            if (n <= 0) break;
            const DSV4__VF x = DSV4__FN(load_some)(a + i + v * DSV4__VL, n);
            sums[v] = dsv4__v_fma(x, DSV4__FN(load_some)(b + i + v * DSV4__VL, n), sums[v]);
        }
    for (int v = 0; v < DSV4__LANES / DSV4__VL; v++) dsv4__v_store(lanes + v * DSV4__VL, sums[v]);
    for (int half = DSV4__LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

/* 1 / sqrt(mean(row^2) + eps). */
static float DSV4__FN(scale)(const float *row, int64_t count, float eps) {
    const float mean = DSV4__FN(dot_product)(row, row, count) / (float)count;
    const float root = sqrtf((float)(mean + eps));
    return 1.0f / root;
}

/* RMSNorm's two multiplications: to = (row * scale) * norm. */
static void DSV4__FN(normalise)(const dsv4__finish_job *job, float scale) {
    const int64_t count = job->config->head_dim;
    const uint32_t rounding = job->config->rounding;
    for (int64_t c = 0; c < count; c += DSV4__VL) {
        const int64_t n = dsv4__min(count - c, DSV4__VL);
        DSV4__VF y = dsv4__v_mul(DSV4__FN(load_some)(job->pooled + c, n), dsv4__v_set(scale));
        if (rounding & DSV4_ROUND_NORMED) y = dsv4__v_round(y);
        y = dsv4__v_mul(y, DSV4__FN(load_some)(job->norm + c, n));
        if (rounding & DSV4_ROUND_SCALED) y = dsv4__v_round(y);
        DSV4__FN(store_some)(job->row + c, y, n);
    }
}

#if DSV4__VL > 4
/* Doubles (VD) and words of 64 bits (VQ, signed VS), half as many lanes as VF has; and so many floats (VH) and words of
 * 32 bits (VW). Vectors of the compiler's own: what is done to them is one text for all sets. */
#define DSV4__VD DSV4__FN(doubles)
#define DSV4__VQ DSV4__FN(long_words)
#define DSV4__VS DSV4__FN(signed_words)
#define DSV4__VH DSV4__FN(halves)
#define DSV4__VW DSV4__FN(words)
typedef double DSV4__VD __attribute__((vector_size(4 * DSV4__VL)));
typedef uint64_t DSV4__VQ __attribute__((vector_size(4 * DSV4__VL)));
typedef int64_t DSV4__VS __attribute__((vector_size(4 * DSV4__VL)));
typedef float DSV4__VH __attribute__((vector_size(2 * DSV4__VL)));
typedef uint32_t DSV4__VW __attribute__((vector_size(2 * DSV4__VL)));

/* As dsv4__mul: a product that no sum takes in. */
DSV4__INLINE DSV4__VD DSV4__FN(multiply)(DSV4__VD a, DSV4__VD b) {
    DSV4__VD kept = a * b;
    __asm__("" : "+x"(kept));
    return kept;
}

/* As dsv4__reduce, below 2^25: the bits of 2/pi that matter begin in its first word then. */
DSV4__INLINE DSV4__VD DSV4__FN(reduce)(DSV4__VQ angle, DSV4__VQ *quadrant) {
    const DSV4__VQ zero = {0}, mantissa = (angle & (uint64_t)0x7fffff) | (uint64_t)0x800000;
    const DSV4__VQ shift = ((angle >> 23) - (uint64_t)120) & (uint64_t)31;
    const DSV4__VQ first = ((zero + dsv4__two_over_pi(0)) << shift) >> 32;
    const DSV4__VQ second = ((zero + dsv4__two_over_pi(1)) << shift) >> 32;
    const DSV4__VQ third = ((zero + dsv4__two_over_pi(2)) << shift) >> 32;
    const DSV4__VQ turns = ((mantissa * first) << 32) + mantissa * second + ((mantissa * third) >> 32);
    const DSV4__VQ nearest = (turns + ((uint64_t)1 << 61)) >> 62;
    const DSV4__VS quarter = (DSV4__VS)(turns - (nearest << 62));
    const DSV4__VD none = {0};
    *quadrant = nearest & (uint64_t)3;
    return DSV4__FN(multiply)(__builtin_convertvector(quarter, DSV4__VD), none + DSV4__RADIAN);
}

/* As dsv4_cos_sin, for DSV4__VL / 2 angles in [0, 2^25). */
static void DSV4__FN(cos_sin)(const float *angles, float *cosines, float *sines) {
    DSV4__VH narrow;
    DSV4__VQ turned;
    memcpy(&narrow, angles, sizeof narrow);
    const DSV4__VD angle = __builtin_convertvector(narrow, DSV4__VD), none = {0};
    const DSV4__VQ within = (DSV4__VQ)(angle <= none + (double)DSV4__EIGHTH);
    const DSV4__VD reduced = DSV4__FN(reduce)(__builtin_convertvector((DSV4__VW)narrow, DSV4__VQ), &turned);
    const DSV4__VD rest = (DSV4__VD)(((DSV4__VQ)angle & within) | ((DSV4__VQ)reduced & ~within));
    const DSV4__VD square = DSV4__FN(multiply)(rest, rest);
    DSV4__VD even = none + dsv4__cosine[8], odd = none + dsv4__sine[8];
    DSV4__UNROLL
    for (int i = 7; i >= 0; i--) {
        even = DSV4__FN(multiply)(even, square) + dsv4__cosine[i];
        odd = DSV4__FN(multiply)(odd, square) + dsv4__sine[i];
    }
    const DSV4__VH cosine = __builtin_convertvector(even, DSV4__VH);
    const DSV4__VH sine = __builtin_convertvector(DSV4__FN(multiply)(rest, odd), DSV4__VH);
    const DSV4__VW quadrant = __builtin_convertvector(turned & ~within, DSV4__VW);
    const DSV4__VW exchange = ((DSV4__VW)cosine ^ (DSV4__VW)sine) & -(quadrant & 1u);
    const DSV4__VW c = (DSV4__VW)cosine ^ exchange ^ (((quadrant + 1u) & 2u) << 30);
    const DSV4__VW s = (DSV4__VW)sine ^ exchange ^ ((quadrant & 2u) << 30);
    memcpy(cosines, &c, sizeof c);
    memcpy(sines, &s, sizeof s);
}
#undef DSV4__VD
#undef DSV4__VQ
#undef DSV4__VS
#undef DSV4__VH
#undef DSV4__VW
#define DSV4__ANGLES (DSV4__VL / 2)
#else
static void DSV4__FN(cos_sin)(const float *angles, float *cosines, float *sines) {
    dsv4_cos_sin(*angles, cosines, sines);
}
#define DSV4__ANGLES 1
#endif

/* cos and sin of rope_dim / 2 angles at a position, as `rotate` takes them: interleaved RoPE as two multiplications,
 * even lanes with (cos, -sin), odd ones with (cos, sin) against the swapped row. */
static void DSV4__FN(rope_row)(const dsv4_config *config, const float *inv_freq, int64_t position, float *cos_row,
                               float *sin_row) {
    float angles[DSV4__ANGLES] = {0}, cosines[DSV4__ANGLES], sines[DSV4__ANGLES];
    for (int64_t i = 0; i < config->rope_dim / 2; i += DSV4__ANGLES) {
        const int64_t count = dsv4__min(config->rope_dim / 2 - i, DSV4__ANGLES);
        for (int64_t j = 0; j < count; j++) angles[j] = (float)position * inv_freq[i + j];
        if (position <= 1 << 24) /* no frequency is above 1 */
            DSV4__FN(cos_sin)(angles, cosines, sines);
        else
            for (int64_t j = 0; j < count; j++) dsv4_cos_sin(angles[j], &cosines[j], &sines[j]);
        if (config->rounding & DSV4_ROUND_TRIG) {
            DSV4__FN(round_array)(cosines, count);
            DSV4__FN(round_array)(sines, count);
        }
        for (int64_t j = 0; j < count; j++) {
            cos_row[2 * (i + j)] = cos_row[2 * (i + j) + 1] = cosines[j];
            sin_row[2 * (i + j)] = -sines[j];
            sin_row[2 * (i + j) + 1] = sines[j];
        }
    }
}

/* The last rope_dim channels of `row` turn: row * cos + swapped * sin, in place, sin signed per lane. `rounded`: each
 * product and their sum are. */
static void DSV4__FN(rotate)(const dsv4__finish_job *job, int rounded) {
    const int64_t count = job->config->rope_dim;
    float *row = job->row + job->config->head_dim - count;
    for (int64_t i = 0; i < count; i++) job->swapped[i] = row[i ^ 1];
    for (int64_t i = 0; i < count; i += DSV4__VL) {
        const int64_t n = dsv4__min(count - i, DSV4__VL);
        const DSV4__VF straight = DSV4__FN(load_some)(row + i, n), cosine = DSV4__FN(load_some)(job->cos_row + i, n);
        const DSV4__VF side =
            dsv4__v_mul(DSV4__FN(load_some)(job->swapped + i, n), DSV4__FN(load_some)(job->sin_row + i, n));
        const DSV4__VF turned =
            rounded ? dsv4__v_round(dsv4__v_add(dsv4__v_round(dsv4__v_mul(straight, cosine)), dsv4__v_round(side)))
                    : dsv4__v_fma(straight, cosine, side);
        DSV4__FN(store_some)(row + i, turned, n);
    }
}

/* ---- Rows as caches hold them ------------------------------------------------------------------------------- */

/* The nearest number of a small format, ties to even: among the multiples of a step that the exponent of |x| names, or
 * that of the least normal number. */
DSV4__INLINE DSV4__VF DSV4__FN(nearest)(const dsv4__small *f, DSV4__VF x) {
    const DSV4__VF magnitude = dsv4__v_masked(x, 0x7fffffffu), limit = dsv4__v_set(f->greatest);
    const DSV4__VF most = dsv4__v_above(magnitude, limit, limit, magnitude);
    const DSV4__VF power = dsv4__v_max(dsv4__v_masked(most, 0x7f800000u), dsv4__v_set(f->least));
    const DSV4__VF big = dsv4__v_mul(power, dsv4__v_set(f->magic));
    return dsv4__v_or(dsv4__v_sub(dsv4__v_add(most, big), big), dsv4__v_masked(x, 0x80000000u));
}

/* The number that a code stands for, of which fp32 has exponent and mantissa already, the exponent too small by
 * `power`. With an exponent field of 0 codes have no leading 1. */
DSV4__INLINE DSV4__VF DSV4__FN(decoded)(const dsv4__small *f, DSV4__VF bits, DSV4__VF sign) {
    const DSV4__VF x = dsv4__v_mul(bits, dsv4__v_set(f->power)), least = dsv4__v_set(f->least);
    const DSV4__VF twice = dsv4__v_madd(x, dsv4__v_set(2.0f), dsv4__v_set(-f->least)); /* exact */
    DSV4__VF value = dsv4__v_above(least, x, twice, x);
    if (f->has_nan) value = dsv4__v_above(value, dsv4__v_set(f->greatest), dsv4__v_set(NAN), value);
    return dsv4__v_or(value, sign);
}

DSV4__INLINE DSV4__VF DSV4__FN(from_codes)(int wide, DSV4__VF code) {
    return wide ? DSV4__FN(decoded)(&dsv4__e4m3,
                                    dsv4__v_or(dsv4__v_masked(dsv4__v_left(code, 20), 0x07f00000u),
                                               dsv4__v_set(0.000030517578125f)), /* exponent field 112 */
                                    dsv4__v_masked(dsv4__v_left(code, 24), 0x80000000u))
                : DSV4__FN(decoded)(&dsv4__e2m1,
                                    dsv4__v_or(dsv4__v_masked(dsv4__v_left(code, 22), 0x01c00000u),
                                               dsv4__v_set(0.125f)), /* exponent field 124 */
                                    dsv4__v_masked(dsv4__v_left(code, 28), 0x80000000u));
}

/* And back, exponent and mantissa of a number that the format has, or that follows its greatest. */
DSV4__INLINE DSV4__VF DSV4__FN(encoded)(const dsv4__small *f, DSV4__VF value) {
    const DSV4__VF x = dsv4__v_masked(value, 0x7fffffffu), least = dsv4__v_set(f->least), half = dsv4__v_set(0.5f);
    const DSV4__VF normal = dsv4__v_above(least, x, dsv4__v_mul(dsv4__v_add(x, least), half), x);
    return dsv4__v_mul(normal, dsv4__v_set(1.0f / f->power));
}

DSV4__INLINE DSV4__VF DSV4__FN(to_codes)(int wide, DSV4__VF value) {
    return wide ? dsv4__v_or(dsv4__v_masked(dsv4__v_right(DSV4__FN(encoded)(&dsv4__e4m3, value), 20), 0x7fu),
                             dsv4__v_masked(dsv4__v_right(value, 24), 0x80u))
                : dsv4__v_or(dsv4__v_masked(dsv4__v_right(DSV4__FN(encoded)(&dsv4__e2m1, value), 22), 0x7u),
                             dsv4__v_masked(dsv4__v_right(value, 28), 0x8u));
}

/* The scale of a block: NaN where any of its numbers is NaN or infinite, since 0 times those is NaN. */
DSV4__INLINE float DSV4__FN(block_scale)(const dsv4__row_format *format, const float *row, int64_t count) {
    DSV4__VF top = dsv4__v_set(format->least), bad = dsv4__v_zero();
    float tops[DSV4__VL], bads[DSV4__VL];
    for (int64_t i = 0; i < count; i += DSV4__VL) {
        const DSV4__VF x = dsv4__v_masked(DSV4__FN(load_some)(row + i, dsv4__min(count - i, DSV4__VL)), 0x7fffffffu);
        top = dsv4__v_max(x, top);
        bad = dsv4__v_fma(x, dsv4__v_zero(), bad);
    }
    dsv4__v_store(tops, top);
    dsv4__v_store(bads, bad);
    float amax = tops[0], sum = bads[0];
    for (int i = 1; i < DSV4__VL; i++) {
        amax = tops[i] > amax ? tops[i] : amax;
        sum = sum + bads[i];
    }
    if (!(sum < 1)) return NAN;
    if (format->inverse > 0) return dsv4__power_above((float)(amax * format->inverse));
    return dsv4__scalar_nearest(&dsv4__e4m3, (float)(amax / 6));
}

/* A block of a row to numbers of the code, or, `back`, to what is read back from them. Where it cannot be read back the
 * codes are those of NaN, or of the greatest number. */
DSV4__INLINE float DSV4__FN(code_block)(const dsv4__row_format *format, const dsv4__small *f, float *row, int64_t count,
                                        int back) {
    const float scale = DSV4__FN(block_scale)(format, row, count);
    const DSV4__VF all = dsv4__v_set(scale), read = dsv4__v_set(back ? scale : 1.0f);
    const DSV4__VF no_number = dsv4__v_set(back ? NAN : f->has_nan ? 480.0f : f->greatest);
    const int bad = !(scale < INFINITY);
    for (int64_t i = 0; i < count; i += DSV4__VL) {
        const int64_t n = dsv4__min(count - i, DSV4__VL);
        const DSV4__VF y = dsv4__v_div(DSV4__FN(load_some)(row + i, n), all);
        DSV4__FN(store_some)(row + i, bad ? no_number : dsv4__v_mul(DSV4__FN(nearest)(f, y), read), n);
    }
    return scale;
}

/* H of a row whose length is a power of two: sums and differences of numbers 1, 2, 4 ... apart, then the scale. */
static void DSV4__FN(hadamard)(float *row, int64_t dim) {
    const DSV4__VF scale = dsv4__v_set(dsv4__hadamard_scale(dim));
    for (int64_t step = 1; step < dim; step *= 2)
        for (float *a = row; a < row + dim; a += 2 * step)
            if (step >= DSV4__VL)
                for (int64_t i = 0; i < step; i += DSV4__VL) {
                    const DSV4__VF x = dsv4__v_load(a + i), y = dsv4__v_load(a + step + i);
                    dsv4__v_store(a + i, dsv4__v_add(x, y));
                    dsv4__v_store(a + step + i, dsv4__v_sub(x, y));
                }
            else
                for (int64_t i = 0; i < step; i++) {
                    const float x = a[i], y = a[i + step];
                    a[i] = x + y;
                    a[i + step] = x - y;
                }
    for (int64_t i = 0; i < dim; i += DSV4__VL) {
        const int64_t n = dsv4__min(dim - i, DSV4__VL);
        DSV4__FN(store_some)(row + i, dsv4__v_mul(DSV4__FN(load_some)(row + i, n), scale), n);
    }
}

/* Up to 128 numbers of the code to bytes, one each or two in one. */
DSV4__INLINE void DSV4__FN(put_codes)(int wide, unsigned char *to, const float *from, int64_t count) {
    unsigned char codes[128] = {0};
    int64_t i = 0;
    for (; i + DSV4__VL <= count; i += DSV4__VL)
        dsv4__v_put_bytes(wide ? to + i : codes + i, DSV4__FN(to_codes)(wide, dsv4__v_load(from + i)));
    if (i < count) dsv4__v_put_bytes(codes + i, DSV4__FN(to_codes)(wide, DSV4__FN(load_some)(from + i, count - i)));
    if (wide) memcpy(to + i, codes + i, (size_t)(count - i));
    for (i = 0; i < count && !wide; i += 2) to[i / 2] = (unsigned char)(codes[i] | codes[i + 1] << 4);
}

DSV4__INLINE DSV4__VF DSV4__FN(byte_numbers)(const unsigned char *from, DSV4__VF scale) {
    return dsv4__v_mul(DSV4__FN(from_codes)(1, dsv4__v_bytes(from)), scale);
}

/* And back, times the block's scale: scales of eight bits make bf16 numbers, others are rounded as they are stored. */
DSV4__INLINE void DSV4__FN(get_codes)(int wide, const dsv4__unpack_job *job, int64_t c, int64_t count, float scale) {
    const int exact = dsv4__format_of(job->config)->scale_bytes == 1;
    const int narrow = job->dtype == DSV4_BF16, rounded = !narrow && (job->config->rounding & DSV4_ROUND_ROW) != 0;
    const unsigned char *from = job->row + (wide ? c : c / 2);
    const DSV4__VF all = dsv4__v_set(scale);
    float *numbers = (float *)job->to + c;
    dsv4_bf16 *halves = (dsv4_bf16 *)job->to + c;
    unsigned char codes[128 + DSV4__VL] = {0};
    const int64_t whole = wide ? count / DSV4__VL * DSV4__VL : 0;
    int64_t i = 0;
    if (narrow && exact) /* a loop for each, as not every compiler takes what does not change out of one */
        for (; i < whole; i += DSV4__VL) dsv4__v_cut(halves + i, DSV4__FN(byte_numbers)(from + i, all));
    else if (narrow)
        for (; i < whole; i += DSV4__VL) dsv4__v_narrow(halves + i, DSV4__FN(byte_numbers)(from + i, all));
    else if (rounded)
        for (; i < whole; i += DSV4__VL)
            dsv4__v_store(numbers + i, dsv4__v_round(DSV4__FN(byte_numbers)(from + i, all)));
    else
        for (; i < whole; i += DSV4__VL) dsv4__v_store(numbers + i, DSV4__FN(byte_numbers)(from + i, all));
    if (i == count) return;
    for (int64_t k = i; k < count; k++) codes[k] = (unsigned char)(wide ? from[k] : from[k / 2] >> (4 * (k % 2)) & 15);
    for (; i < count; i += DSV4__VL) {
        const int64_t n = dsv4__min(count - i, DSV4__VL);
        const DSV4__VF value = dsv4__v_mul(DSV4__FN(from_codes)(wide, dsv4__v_bytes(codes + i)), all);
        float values[DSV4__VL];
        dsv4__v_store(values, rounded ? dsv4__v_round(value) : value);
        DSV4__FN(put_row)(narrow ? (void *)(halves + i) : (void *)(numbers + i), job->dtype, values, n);
    }
}

/* The entry after RoPE to where it goes, by way of its row format. */
static void DSV4__FN(store)(const dsv4__finish_job *job) {
    const dsv4__row_format *format = dsv4__format_of(job->config);
    const int64_t dim = job->config->head_dim, coded = dsv4__coded(job->config), block = format->block;
    const int rounded = (job->config->rounding & DSV4_ROUND_ROW) != 0, packed = job->out_dtype == DSV4_PACKED;
    const int wide = format->code == &dsv4__e4m3;
    unsigned char *bytes = (unsigned char *)job->out, *scales = job->scales;
    if (rounded) DSV4__FN(round_array)(job->row, dim);
    if (format->hadamard) DSV4__FN(hadamard)(job->row, dim);
    if (format->hadamard && rounded) DSV4__FN(round_array)(job->row, dim);
    for (int64_t c = 0; c < coded; c += block) {
        const int64_t count = dsv4__min(coded - c, block);
        const float scale = wide ? DSV4__FN(code_block)(format, &dsv4__e4m3, job->row + c, count, !packed)
                                 : DSV4__FN(code_block)(format, &dsv4__e2m1, job->row + c, count, !packed);
        if (!packed) continue;
        dsv4__put_scale(format, scales + c / block * format->scale_bytes, scale);
        if (wide)
            DSV4__FN(put_codes)(1, bytes + c, job->row + c, count);
        else
            DSV4__FN(put_codes)(0, bytes + c / 2, job->row + c, count);
    }
    if (packed) {
        dsv4__put_halves(bytes + coded, job->row + coded, dim - coded); /* where there are any, codes are bytes */
        return;
    }
    if (rounded) DSV4__FN(round_array)(job->row, coded);
    DSV4__FN(put_row)(job->out, job->out_dtype, job->row, dim);
}

/* And back, a block at a time. */
static void DSV4__FN(unpack)(const dsv4__unpack_job *job) {
    const dsv4__row_format *format = dsv4__format_of(job->config);
    const int64_t dim = job->config->head_dim, coded = dsv4__coded(job->config), block = format->block;
    for (int64_t c = 0; c < coded; c += block) {
        const int64_t count = dsv4__min(coded - c, block);
        const float scale = dsv4__get_scale(format, job->scales + c / block * format->scale_bytes);
        if (format->code == &dsv4__e4m3)
            DSV4__FN(get_codes)(1, job, c, count, scale);
        else
            DSV4__FN(get_codes)(0, job, c, count, scale);
    }
    if (job->dtype == DSV4_BF16)
        dsv4__get_bf16((dsv4_bf16 *)job->to + coded, job->row + coded, dim - coded);
    else
        dsv4__get_halves((float *)job->to + coded, job->row + coded, dim - coded);
}

/* ---- Entries ------------------------------------------------------------------------------------------------ */

/* RMSNorm, norm's scale, RoPE, store. */
static void DSV4__FN(finish)(const dsv4__finish_job *job) {
    const int64_t dim = job->config->head_dim;
    const uint32_t rounding = job->config->rounding;
    if (rounding & DSV4_ROUND_POOLED) DSV4__FN(round_array)(job->pooled, dim);
    DSV4__FN(normalise)(job, DSV4__FN(scale)(job->pooled, dim, job->config->eps));
    if (job->latent != NULL) DSV4__FN(put_row)(job->latent, job->latent_dtype, job->row, dim);
    DSV4__FN(rotate)(job, (rounding & DSV4_ROUND_ROTATED) != 0);
    DSV4__FN(store)(job);
}

/* RMSNorm on the way back. `row` holds dout; after: row = gradient of the scaled row, pooled = the normalised row
 * (which dnorm needs), dpooled = r (dn - n mean(dn n)), dn = dy norm. */
static void DSV4__FN(finish_back)(const dsv4__finish_job *job) {
    const int64_t dim = job->config->head_dim;
    float *n_row = job->pooled, *dn_row = job->dpooled;
    if (job->config->rounding & DSV4_ROUND_POOLED) DSV4__FN(round_array)(n_row, dim);
    const float scale = DSV4__FN(scale)(n_row, dim, job->config->eps);
    if (dsv4__format_of(job->config)->hadamard) DSV4__FN(hadamard)(job->row, dim); /* it is its own inverse */
    DSV4__FN(rotate)(job, 0);
    for (int64_t c = 0; c < dim; c += DSV4__VL) {
        const int64_t n = dsv4__min(dim - c, DSV4__VL);
        const DSV4__VF dy = DSV4__FN(load_some)(job->row + c, n), norm = DSV4__FN(load_some)(job->norm + c, n);
        DSV4__FN(store_some)(n_row + c, dsv4__v_mul(DSV4__FN(load_some)(n_row + c, n), dsv4__v_set(scale)), n);
        DSV4__FN(store_some)(dn_row + c, dsv4__v_mul(dy, norm), n);
    }
    const float mean = DSV4__FN(dot_product)(dn_row, n_row, dim) / (float)dim;
    for (int64_t c = 0; c < dim; c += DSV4__VL) {
        const int64_t n = dsv4__min(dim - c, DSV4__VL);
        const DSV4__VF inner =
            dsv4__v_fma(DSV4__FN(load_some)(n_row + c, n), dsv4__v_set(-mean), DSV4__FN(load_some)(dn_row + c, n));
        DSV4__FN(store_some)(dn_row + c, dsv4__v_mul(inner, dsv4__v_set(scale)), n);
    }
    if (job->config->rounding & DSV4_ROUND_NORMED) DSV4__FN(round_array)(n_row, dim);
}

/* sum += a b, or sum += a where b is NULL. */
static void DSV4__FN(add)(float *sum, const float *a, const float *b, int64_t count) {
    for (int64_t i = 0; i < count; i += DSV4__VL) {
        const int64_t n = dsv4__min(count - i, DSV4__VL);
        const DSV4__VF x = DSV4__FN(load_some)(a + i, n), old = DSV4__FN(load_some)(sum + i, n);
        DSV4__FN(store_some)
        (sum + i, b != NULL ? dsv4__v_fma(x, DSV4__FN(load_some)(b + i, n), old) : dsv4__v_add(old, x), n);
    }
}

/* ------------------------------------------------------------------------------------------------------------
 * 3i. Matrix product: sum[rows, 32] += x[rows, terms] w[terms, 32], of packed operands as the map draws them. Here the
 * product on vector registers, then on tile registers, then packing and what chooses between the two. Nothing in this
 * room knows of compressors, calls or the way back.
 * ------------------------------------------------------------------------------------------------------------ */

/* ---- On vector registers ------------------------------------------------------------------------------------ */

#if defined(DSV4__DOT)
DSV4__INLINE int DSV4__FN(word)(const void *pair) {
    int word;
    memcpy(&word, pair, sizeof word);
    return word;
}
#endif

#if DSV4__TILE_ROWS > 8
#define DSV4__SMALL_ROWS 8
#else
#define DSV4__SMALL_ROWS 4
#endif
#define DSV4__STEP_ROWS (DSV4__TILE_ROWS / 2)

/* How a register tile reads its operands. */
enum DSV4__FN(mode) {
    DSV4__FN(chain),  /* x and w fp32, one fused chain */
    DSV4__FN(exact),  /* the same where both came from bf16: products are exact */
    DSV4__FN(direct), /* w in bf16 pairs, widened on the way: for few rows, where widening it first does not pay */
    DSV4__FN(dots)    /* x and w in bf16 pairs */
};

/* Adds one term to a tile. x points at the first row's value; w at the term's columns, or, in mode direct, at its
 * pairs. */
DSV4__INLINE void DSV4__FN(term)(DSV4__VF acc[][DSV4__TILE_VECTORS], const int rows, const int mode, const float *x,
                                 const void *w, const int odd) {
    DSV4__VF column[DSV4__TILE_VECTORS];
    DSV4__UNROLL
    for (int v = 0; v < DSV4__TILE_VECTORS; v++) {
        const dsv4_bf16 *pairs = (const dsv4_bf16 *)w + 2 * v * DSV4__VL;
        if (mode != DSV4__FN(direct))
            column[v] = dsv4__v_load((const float *)w + v * DSV4__VL);
        else
            column[v] = odd ? dsv4__v_odd(pairs) : dsv4__v_even(pairs);
    }
    DSV4__UNROLL
    for (int r = 0; r < rows; r++) {
        const DSV4__VF value = dsv4__v_set(x[r * DSV4__KBLOCK]);
        DSV4__UNROLL
        for (int v = 0; v < DSV4__TILE_VECTORS; v++)
            acc[r][v] = mode == DSV4__FN(exact) ? dsv4__v_madd(value, column[v], acc[r][v])
                                                : dsv4__v_fma(value, column[v], acc[r][v]);
    }
}

/* Adds pair k of terms to a tile, in the order that the contract asks for. x and w are those of pair 0. */
DSV4__INLINE void DSV4__FN(pair)(DSV4__VF acc[][DSV4__TILE_VECTORS], const int rows, const int mode,
                                 const int odd_first, const void *x, const void *w, int64_t k) {
#if defined(DSV4__DOT)
    if (mode == DSV4__FN(dots)) {
        DSV4__UNROLL
        for (int r = 0; r < rows; r++) {
            DSV4__UNROLL
            for (int v = 0; v < DSV4__TILE_VECTORS; v++)
                acc[r][v] = dsv4__v_dot(acc[r][v], dsv4__v_pair((const dsv4_bf16 *)x + 2 * k + r * DSV4__KBLOCK),
                                        (const dsv4_bf16 *)w + 2 * (k * DSV4__PANEL + v * DSV4__VL));
        }
        return;
    }
#endif
    const float *values = (const float *)x + 2 * k, *panel = (const float *)w + 2 * k * DSV4__PANEL;
    const dsv4_bf16 *pairs = (const dsv4_bf16 *)w + 2 * k * DSV4__PANEL;
    const void *one = mode == DSV4__FN(direct) ? (const void *)pairs : (const void *)(panel + odd_first * DSV4__PANEL);
    const void *two = mode == DSV4__FN(direct) ? (const void *)pairs : (const void *)(panel + !odd_first * DSV4__PANEL);
    DSV4__FN(term)(acc, rows, mode, values + odd_first, one, odd_first);
    DSV4__FN(term)(acc, rows, mode, values + !odd_first, two, !odd_first);
}

/* Fetches the sums that a tile will be added to while it is being multiplied. */
DSV4__INLINE void DSV4__FN(fetch_sums)(const float *sum, int64_t stride, const int rows) {
    DSV4__UNROLL
    for (int r = 0; r < rows; r++) {
        DSV4__UNROLL
        for (int v = 0; v < DSV4__TILE_VECTORS * DSV4__VL; v += 16) DSV4__PREFETCH_SUM(sum + r * stride + v);
    }
}

/* One register tile: `rows` rows by TILE_VECTORS * VL columns, from `column` on. rows, mode and odd_first are constants
 * at every call, so that each call becomes a loop of its own with all sums in registers. Two pairs a round: every
 * instruction that counts or steps takes a place from a multiplication. */
DSV4__INLINE void DSV4__FN(tile)(const dsv4__product_job *job, int64_t row, int64_t column, const int rows,
                                 const int mode, const int odd_first, const void *panel) {
    const int x_size = mode == DSV4__FN(dots) ? 2 : 4,
              w_size = mode == DSV4__FN(dots) || mode == DSV4__FN(direct) ? 2 : 4;
    const char *x = (const char *)job->x + row * DSV4__KBLOCK * x_size;
    const char *w = (const char *)panel + 4 * column; /* one number, or a pair of bf16 */
    float *sum = job->sum + row * job->sum_stride + column;
    const dsv4__ahead ahead = dsv4__fetch_ahead(job, row, rows);
    uintptr_t fetch = ahead.from;
    DSV4__VF acc[DSV4__TILE_ROWS][DSV4__TILE_VECTORS];
    if (job->sums_in_memory) DSV4__FN(fetch_sums)(sum, job->sum_stride, rows);
    DSV4__UNROLL
    for (int r = 0; r < rows; r++) {
        DSV4__UNROLL
        for (int v = 0; v < DSV4__TILE_VECTORS; v++) acc[r][v] = dsv4__v_zero();
    }
    int64_t k = job->pairs;
    for (; k >= 2; k -= 2, x += 4 * x_size, w += 4 * DSV4__PANEL * w_size, fetch += (uintptr_t)ahead.step) {
        for (int64_t line = 0; line < ahead.step; line += 64) DSV4__PREFETCH((const void *)(fetch + (uintptr_t)line));
        DSV4__FN(pair)(acc, rows, mode, odd_first, x, w, 0);
        DSV4__FN(pair)(acc, rows, mode, odd_first, x, w, 1);
    }
    if (k > 0) DSV4__FN(pair)(acc, rows, mode, odd_first, x, w, 0);
    if (!job->first) {
        DSV4__UNROLL
        for (int r = 0; r < rows; r++) {
            DSV4__UNROLL
            for (int v = 0; v < DSV4__TILE_VECTORS; v++)
                acc[r][v] = dsv4__v_add(dsv4__v_load(sum + r * job->sum_stride + v * DSV4__VL), acc[r][v]);
        }
    }
    DSV4__UNROLL
    for (int r = 0; r < rows; r++) {
        DSV4__UNROLL
        for (int v = 0; v < DSV4__TILE_VECTORS; v++) dsv4__v_store(sum + r * job->sum_stride + v * DSV4__VL, acc[r][v]);
    }
}

/* A tile's blocks of terms: one, or two with an fp32 operand, for a smaller error. */
DSV4__INLINE void DSV4__FN(tile_blocks)(const dsv4__product_job *block, int64_t row, int64_t column, const int rows,
                                        const int mode, const int odd_first, const void *w) {
    DSV4__FN(tile)(block, row, column, rows, mode, odd_first, w);
    if (odd_first || block[1].pairs == 0) return;
    const int64_t term_bytes = DSV4__PANEL * (mode == DSV4__FN(direct) ? 2 : 4);
    DSV4__FN(tile)(&block[1], row, column, rows, mode, odd_first, (const char *)w + DSV4__FBLOCK * term_bytes);
}

/* One register tile of the order TILES: two chains for each sum, so half as many rows. The sums themselves stay in the
 * first cache from step to step. */
DSV4__INLINE void DSV4__FN(step_tile)(const dsv4__product_job *job, int64_t row, int64_t column, const int rows,
                                      const int mode, const void *panel) {
    const int64_t w_size = mode == DSV4__FN(direct) ? 2 : 4;
    const float *x = (const float *)job->x + row * DSV4__KBLOCK;
    const char *w = (const char *)panel + 4 * column;
    float *sum = job->sum + row * job->sum_stride + column;
    const dsv4__ahead ahead = dsv4__fetch_ahead(job, row, rows);
    uintptr_t fetch = ahead.from;
    if (job->sums_in_memory) DSV4__FN(fetch_sums)(sum, job->sum_stride, rows);
    for (int64_t done = 0; done < job->pairs; done += DSV4__STEP / 2) {
        DSV4__VF even[DSV4__STEP_ROWS][DSV4__TILE_VECTORS], odd[DSV4__STEP_ROWS][DSV4__TILE_VECTORS];
        const int64_t end = dsv4__min(done + DSV4__STEP / 2, job->pairs);
        DSV4__UNROLL
        for (int r = 0; r < rows; r++) {
            DSV4__UNROLL
            for (int v = 0; v < DSV4__TILE_VECTORS; v++) even[r][v] = odd[r][v] = dsv4__v_zero();
        }
        for (int64_t k = done; k < end; k++, x += 2, w += 2 * DSV4__PANEL * w_size) {
            if (k % 2 == 0)
                for (int64_t line = 0; line < ahead.step; line += 64)
                    DSV4__PREFETCH((const void *)(fetch + (uintptr_t)line));
            fetch += (uintptr_t)(k % 2 * ahead.step);
            DSV4__FN(term)(even, rows, mode, x, w, 0);
            DSV4__FN(term)(odd, rows, mode, x + 1, mode == DSV4__FN(direct) ? w : w + DSV4__PANEL * w_size, 1);
        }
        DSV4__UNROLL
        for (int r = 0; r < rows; r++) {
            DSV4__UNROLL
            for (int v = 0; v < DSV4__TILE_VECTORS; v++) {
                float *to = sum + r * job->sum_stride + v * DSV4__VL;
                const DSV4__VF step = dsv4__v_add(even[r][v], odd[r][v]);
                dsv4__v_store(to, job->first && done == 0 ? step : dsv4__v_add(dsv4__v_load(to), step));
            }
        }
    }
}

DSV4__INLINE void DSV4__FN(step_tiles)(const dsv4__product_job *job, const int mode, const void *w) {
    const int64_t large = dsv4__large_tiles(job->rows, DSV4__STEP_ROWS, 2) * DSV4__STEP_ROWS;
    for (int64_t column = 0; column < DSV4__PANEL; column += DSV4__TILE_VECTORS * DSV4__VL) {
        int64_t row = 0;
        for (; row < large; row += DSV4__STEP_ROWS) DSV4__FN(step_tile)(job, row, column, DSV4__STEP_ROWS, mode, w);
#if DSV4__STEP_ROWS > 4
        for (; job->rows - row >= 4; row += 4) DSV4__FN(step_tile)(job, row, column, 4, mode, w);
#endif
        for (; job->rows - row >= 2; row += 2) DSV4__FN(step_tile)(job, row, column, 2, mode, w);
        for (; job->rows - row >= 1; row += 1) DSV4__FN(step_tile)(job, row, column, 1, mode, w);
    }
}

/* All rows by all columns of a panel, the largest tiles first: the first one meets the weights as they come from
 * memory, and the more it has to do meanwhile the better. */
DSV4__INLINE void DSV4__FN(tiles)(const dsv4__product_job *job, const int mode, const int odd_first, const void *w) {
    const int64_t large = dsv4__large_tiles(job->rows, DSV4__TILE_ROWS, DSV4__SMALL_ROWS) * DSV4__TILE_ROWS;
    for (int64_t column = 0; column < DSV4__PANEL; column += DSV4__TILE_VECTORS * DSV4__VL) {
        int64_t row = 0;
        if (mode != DSV4__FN(direct))
            for (; row < large; row += DSV4__TILE_ROWS)
                DSV4__FN(tile_blocks)(job, row, column, DSV4__TILE_ROWS, mode, odd_first, w);
#if DSV4__SMALL_ROWS > 4
        for (; job->rows - row >= 8; row += 8) DSV4__FN(tile_blocks)(job, row, column, 8, mode, odd_first, w);
#endif
        for (; job->rows - row >= 4; row += 4) DSV4__FN(tile_blocks)(job, row, column, 4, mode, odd_first, w);
        for (; job->rows - row >= 2; row += 2) DSV4__FN(tile_blocks)(job, row, column, 2, mode, odd_first, w);
        for (; job->rows - row >= 1; row += 1) DSV4__FN(tile_blocks)(job, row, column, 1, mode, odd_first, w);
    }
}

/* bf16 pairs [pairs][32][2] to fp32 [2 pairs][32]. */
static void DSV4__FN(widen_panel)(const dsv4_bf16 *w, int64_t pairs, float *wide) {
    for (int64_t k = 0; k < pairs; k++, wide += 2 * DSV4__PANEL)
        for (int64_t c = 0; c < DSV4__PANEL; c += DSV4__VL, w += 2 * DSV4__VL) {
            dsv4__v_store(wide + c, dsv4__v_even(w));
            dsv4__v_store(wide + DSV4__PANEL + c, dsv4__v_odd(w));
        }
}

/* With an fp32 operand: a tile's two blocks as jobs of their own. */
DSV4__INLINE void DSV4__FN(fused)(const dsv4__product_job *job, const int mode, const void *w) {
    dsv4__product_job block[2] = {*job, *job};
    block[0].pairs = dsv4__min(job->pairs, DSV4__FBLOCK / 2);
    block[0].next_bytes = job->next_bytes * block[0].pairs / job->pairs;
    block[1].x = (const float *)job->x + DSV4__FBLOCK;
    block[1].pairs = job->pairs - block[0].pairs;
    block[1].first = 0;
    block[1].sums_in_memory = 0;
    block[1].next = job->next + (uintptr_t)block[0].next_bytes;
    block[1].next_bytes = job->next_bytes - block[0].next_bytes;
    DSV4__FN(tiles)(block, mode, 0, w);
}

static void DSV4__FN(product)(const dsv4__product_job *job) {
    const void *w = job->w;
#if defined(DSV4__DOT)
    if (job->dot) {
        DSV4__FN(tiles)(job, DSV4__FN(dots), 1, w);
        return;
    }
#endif
#if defined(DSV4__FUSED)
    if (job->w_bf16 && job->rows <= DSV4__SMALL_ROWS) {
        if (job->order == DSV4__STEPS)
            DSV4__FN(step_tiles)(job, DSV4__FN(direct), w);
        else if (job->order == DSV4__PAIRS)
            DSV4__FN(tiles)(job, DSV4__FN(direct), 1, w);
        else
            DSV4__FN(fused)(job, DSV4__FN(direct), w);
        return;
    }
#endif
    if (job->w_bf16) {
        DSV4__FN(widen_panel)((const dsv4_bf16 *)w, job->pairs, job->wide);
        w = job->wide;
    }
#if defined(DSV4__FUSED)
    const int exact = DSV4__FN(chain);
#else
    const int exact = DSV4__FN(exact);
#endif
    if (job->order == DSV4__FUSED_TERMS)
        DSV4__FN(fused)(job, DSV4__FN(chain), w);
    else if (job->order == DSV4__PAIRS)
        DSV4__FN(tiles)(job, exact, 1, w);
    else
        DSV4__FN(step_tiles)(job, exact, w);
}

#if defined(DSV4__TARGET)
DSV4__END_TARGET
#undef DSV4__TARGET
#endif

/* For the table of kernel sets. */
#if defined(DSV4__DOT)
enum { DSV4__FN(has_dot) = 1, DSV4__FN(tile_rows) = DSV4__TILE_ROWS };
#else
enum { DSV4__FN(has_dot) = 0, DSV4__FN(tile_rows) = DSV4__TILE_ROWS };
#endif

#undef DSV4__SET
#undef DSV4__VF
#undef DSV4__VI
#undef DSV4__VL
#undef DSV4__REGISTER
#undef DSV4__FUSED
#undef DSV4__DOT
#undef DSV4__TILE_ROWS
#undef DSV4__SMALL_ROWS
#undef DSV4__ANGLES
#undef DSV4__STEP_ROWS
#undef DSV4__POOL_VECTORS
#undef DSV4__EACH
#undef DSV4__FETCH
#undef DSV4__CHANNELS
#undef DSV4__FOLD
#undef DSV4__SOFTMAX
#undef DSV4__TILE_VECTORS
#undef dsv4__v_mm
#undef dsv4__v_zero
#undef dsv4__v_set
#undef dsv4__v_load
#undef dsv4__v_store
#undef dsv4__v_load_n
#undef dsv4__v_store_n
#undef dsv4__v_add
#undef dsv4__v_sub
#undef dsv4__v_mul
#undef dsv4__v_div
#undef dsv4__v_max
#undef dsv4__v_fma
#undef dsv4__v_madd
#undef dsv4__v_below
#undef dsv4__v_above
#undef dsv4__v_gap
#undef dsv4__v_power
#undef dsv4__v_masked
#undef dsv4__v_or
#undef dsv4__v_cut
#undef dsv4__v_left
#undef dsv4__v_right
#undef dsv4__v_bytes
#undef dsv4__v_put_bytes
#undef dsv4__v_round
#undef dsv4__v_widen
#undef dsv4__v_narrow
#undef dsv4__v_even
#undef dsv4__v_odd
#undef dsv4__v_high
#undef dsv4__v_pair
#undef dsv4__v_dot
#endif /* DSV4__STAMP */

#if defined(DSV4__STAMP) && DSV4__STAMP >= DSV4__FOR_AMX
/* ---- On tile registers -----------------------------------------------------------------------------------------
 * Over a handful of operations. Tiles 0 ... 3 are 2 x 2 of sums, 4 and 5 rows of x [16][16 pairs], 6 and 7 columns of w
 * [16 pairs][16].
 *
 *   dsv4__t_configure(config) dsv4__t_release()  registers' shapes; without one they cannot be used
 *   dsv4__t_zero(t) dsv4__t_load(t, p, stride) dsv4__t_store(t, p, stride)
 *   dsv4__t_multiply(c, a, b)                    c += a b: even terms in one chain from 0, odd in another, then both */
#if DSV4__STAMP == DSV4__FOR_AMX /* Xeons from Sapphire Rapids on */
#define DSV4__SET amx
#define dsv4__t_configure(config) \
    __asm__ volatile("ldtilecfg %0" : : "m"(*(const unsigned char(*)[64])(const void *)(config)))
#define dsv4__t_release() __asm__ volatile("tilerelease" : : : "memory")
#define dsv4__t_zero(t)   __asm__ volatile("tilezero {%%|}tmm" #t : :)
#define dsv4__t_load(t, p, stride)                                                       \
    __asm__ volatile("{tileloadd (%0,%1,1), %%tmm" #t "|tileloadd tmm" #t ", [%0+%1*1]}" \
                     :                                                                   \
                     : "r"((const void *)(p)), "r"((int64_t)(stride))                    \
                     : "memory")
#define dsv4__t_store(t, p, stride)                                                        \
    __asm__ volatile("{tilestored %%tmm" #t ", (%0,%1,1)|tilestored [%0+%1*1], tmm" #t "}" \
                     :                                                                     \
                     : "r"((void *)(p)), "r"((int64_t)(stride))                            \
                     : "memory")
#define dsv4__t_multiply(c, a, b) \
    __asm__ volatile("{tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c "|tdpbf16ps tmm" #c ", tmm" #a ", tmm" #b "}" : :)
#else /* a model of it, for tests on any CPU */
#define DSV4__SET amx_model
#include "tile_model.h"
#endif

enum { DSV4__FN(x_stride) = DSV4__KBLOCK * 2, DSV4__FN(w_stride) = DSV4__PANEL * 4, DSV4__FN(half) = DSV4__TILE * 4 };

/* Registers for `rows` rows at a time, 16 at most. */
static void DSV4__FN(tile_begin)(int64_t rows) {
    unsigned char config[64] = {1}; /* palette 1; bytes of a row from byte 16 on, two each; rows from 48 on */
    for (int t = 0; t < 8; t++) {
        config[16 + 2 * t] = DSV4__TILE * 4;
        config[48 + t] = (unsigned char)dsv4__min(t < 6 ? rows : (int64_t)DSV4__TILE, DSV4__TILE);
    }
    dsv4__t_configure(config);
}

static void DSV4__FN(tile_end)(void) { dsv4__t_release(); }

/* A share of job->next for each step, into the second cache. */
DSV4__INLINE void DSV4__FN(fetch_step)(uintptr_t from, int64_t bytes) {
    for (int64_t line = 0; line < bytes; line += 64) DSV4__PREFETCH_L2((const void *)(from + (uintptr_t)line));
}

/* 32 rows by a panel's 32 columns. */
static void DSV4__FN(four_tiles)(const dsv4__product_job *job, int64_t row) {
    const char *x = (const char *)job->x + row * DSV4__FN(x_stride), *w = (const char *)job->w;
    const int64_t lower = (int64_t)DSV4__TILE * DSV4__FN(x_stride), stride = job->sum_stride * (int64_t)sizeof(float);
    float *sum = job->sum + row * job->sum_stride, *lower_sum = sum + DSV4__TILE * job->sum_stride;
    const int64_t steps = job->pairs / DSV4__TILE, share = job->next_bytes * 2 * DSV4__TILE / job->rows / steps;
    uintptr_t fetch = job->next + (uintptr_t)(job->next_bytes * row / job->rows);
    if (job->first) {
        dsv4__t_zero(0);
        dsv4__t_zero(1);
        dsv4__t_zero(2);
        dsv4__t_zero(3);
    } else {
        dsv4__t_load(0, sum, stride);
        dsv4__t_load(1, sum + DSV4__TILE, stride);
        dsv4__t_load(2, lower_sum, stride);
        dsv4__t_load(3, lower_sum + DSV4__TILE, stride);
    }
    for (int64_t step = 0; step < steps;
         step++, w += (int64_t)DSV4__TILE * DSV4__FN(w_stride), fetch += (uintptr_t)share) {
        const int64_t term = step * DSV4__STEP;
        const char *rows = x + term / DSV4__KBLOCK * job->x_block + term % DSV4__KBLOCK * 2;
        DSV4__FN(fetch_step)(fetch, share);
        dsv4__t_load(6, w, DSV4__FN(w_stride));
        dsv4__t_load(4, rows, DSV4__FN(x_stride));
        dsv4__t_multiply(0, 4, 6);
        dsv4__t_load(7, w + DSV4__FN(half), DSV4__FN(w_stride));
        dsv4__t_multiply(1, 4, 7);
        dsv4__t_load(5, rows + lower, DSV4__FN(x_stride));
        dsv4__t_multiply(2, 5, 6);
        dsv4__t_multiply(3, 5, 7);
    }
    dsv4__t_store(0, sum, stride);
    dsv4__t_store(1, sum + DSV4__TILE, stride);
    dsv4__t_store(2, lower_sum, stride);
    dsv4__t_store(3, lower_sum + DSV4__TILE, stride);
}

/* Up to 16 rows. */
static void DSV4__FN(two_tiles)(const dsv4__product_job *job, int64_t row) {
    const char *x = (const char *)job->x + row * DSV4__FN(x_stride), *w = (const char *)job->w;
    const int64_t stride = job->sum_stride * (int64_t)sizeof(float), left = job->rows - row;
    float *sum = job->sum + row * job->sum_stride;
    const int64_t steps = job->pairs / DSV4__TILE, share = job->next_bytes * left / job->rows / steps;
    uintptr_t fetch = job->next + (uintptr_t)(job->next_bytes * row / job->rows);
    if (job->first) {
        dsv4__t_zero(0);
        dsv4__t_zero(1);
    } else {
        dsv4__t_load(0, sum, stride);
        dsv4__t_load(1, sum + DSV4__TILE, stride);
    }
    for (int64_t step = 0; step < steps;
         step++, w += (int64_t)DSV4__TILE * DSV4__FN(w_stride), fetch += (uintptr_t)share) {
        const int64_t term = step * DSV4__STEP;
        const char *rows = x + term / DSV4__KBLOCK * job->x_block + term % DSV4__KBLOCK * 2;
        DSV4__FN(fetch_step)(fetch, share);
        dsv4__t_load(4, rows, DSV4__FN(x_stride));
        dsv4__t_load(6, w, DSV4__FN(w_stride));
        dsv4__t_multiply(0, 4, 6);
        dsv4__t_load(7, w + DSV4__FN(half), DSV4__FN(w_stride));
        dsv4__t_multiply(1, 4, 7);
    }
    dsv4__t_store(0, sum, stride);
    dsv4__t_store(1, sum + DSV4__TILE, stride);
}

static void DSV4__FN(tile_product)(const dsv4__product_job *job) {
    int64_t row = 0;
    DSV4_ASSERT(job->pairs % DSV4__TILE == 0);
    for (; row + DSV4__TILE < job->rows; row += 2 * DSV4__TILE) DSV4__FN(four_tiles)(job, row);
    if (row < job->rows) DSV4__FN(two_tiles)(job, row);
}

#undef DSV4__SET
#undef dsv4__t_configure
#undef dsv4__t_release
#undef dsv4__t_zero
#undef dsv4__t_load
#undef dsv4__t_store
#undef dsv4__t_multiply
#endif

#if defined(DSV4_COMPRESSOR_IMPLEMENTATION) && !defined(DSV4__IMPLEMENTED) && !defined(DSV4__STAMP)

#define DSV4__STAMP DSV4__FOR_SCALAR
#include DSV4_COMPRESSOR_HEADER
#undef DSV4__STAMP
#if defined(DSV4__X86)
#define DSV4__STAMP DSV4__FOR_AVX2
#include DSV4_COMPRESSOR_HEADER
#undef DSV4__STAMP
#define DSV4__STAMP DSV4__FOR_AVX512
#include DSV4_COMPRESSOR_HEADER
#undef DSV4__STAMP
#if defined(DSV4__X86_BF16)
#define DSV4__STAMP DSV4__FOR_AVX512BF16
#include DSV4_COMPRESSOR_HEADER
#undef DSV4__STAMP
#endif
#endif
#if defined(DSV4__NEON)
#define DSV4__STAMP DSV4__FOR_NEON
#include DSV4_COMPRESSOR_HEADER
#undef DSV4__STAMP
#endif
#if defined(DSV4__SIMDE)
#define DSV4__STAMP DSV4__FOR_SIMDE
#include DSV4_COMPRESSOR_HEADER
#undef DSV4__STAMP
#endif
#if defined(DSV4__X86_128)
#define DSV4__STAMP DSV4__FOR_FMA128
#include DSV4_COMPRESSOR_HEADER
#undef DSV4__STAMP
#endif

#if defined(DSV4__AMX)
#define DSV4__STAMP DSV4__FOR_AMX
#include DSV4_COMPRESSOR_HEADER
#undef DSV4__STAMP
#endif
#if defined(DSV4__TILE_MODEL)
#define DSV4__STAMP DSV4__FOR_TILE_MODEL
#include DSV4_COMPRESSOR_HEADER
#undef DSV4__STAMP
#endif

/* ---- Packing and multiplying -------------------------------------------------------------------------------- */

static int64_t dsv4__padded(int64_t count) { return (count + 1) / 2 * 2; }

/* A matrix [rows, columns] of either type, and the part of it that one block of one panel holds. */
typedef struct dsv4__panel_source {
    dsv4_const_matrix matrix;
    int64_t row, rows;           /* the panel's columns are these rows of the matrix; the missing ones up to 32 are 0 */
    int64_t term, terms, padded; /* and its terms these columns; from `terms` to `padded` 0 */
} dsv4__panel_source;

/* bf16: pairs of terms stay together, so that pairs are what is transposed; 16 at a time, a cache line of each row. */
static void dsv4__pack_bf16(const dsv4__panel_source *source, dsv4_bf16 *to) {
    const dsv4_bf16 *from = (const dsv4_bf16 *)dsv4__in(source->matrix, source->row, source->term);
    const int64_t stride = source->matrix.stride;
    memset(to, 0, (size_t)(source->padded * DSV4__PANEL) * sizeof *to);
    for (int64_t first = 0; first < source->terms; first += 32)
        for (int64_t r = 0; r < source->rows; r++) {
            const int64_t end = dsv4__min(first + 32, source->terms);
            for (int64_t k = first; k + 1 < end; k += 2)
                memcpy(to + k * DSV4__PANEL + 2 * r, from + r * stride + k, 2 * sizeof *to);
            if ((end - first) % 2 != 0) to[(end - 1) * DSV4__PANEL + 2 * r] = from[r * stride + end - 1];
        }
}

/* The same from fp32, rounded: parameters of a preset that rounds them. */
static void dsv4__pack_rounded(const dsv4__panel_source *source, dsv4_bf16 *to) {
    const float *from = (const float *)dsv4__in(source->matrix, source->row, source->term);
    memset(to, 0, (size_t)(source->padded * DSV4__PANEL) * sizeof *to);
    for (int64_t first = 0; first < source->terms; first += 16)
        for (int64_t r = 0; r < source->rows; r++)
            for (int64_t k = first; k < dsv4__min(first + 16, source->terms); k++)
                to[k / 2 * 2 * DSV4__PANEL + 2 * r + k % 2] = dsv4_bf16_from_f32(from[r * source->matrix.stride + k]);
}

static void dsv4__pack_f32(const dsv4__panel_source *source, float *to) {
    const float *from = (const float *)dsv4__in(source->matrix, source->row, source->term);
    memset(to, 0, (size_t)(source->padded * DSV4__PANEL) * sizeof *to);
    for (int64_t first = 0; first < source->terms; first += 16)
        for (int64_t r = 0; r < source->rows; r++)
            for (int64_t k = first; k < dsv4__min(first + 16, source->terms); k++)
                to[k * DSV4__PANEL + r] = from[r * source->matrix.stride + k];
}

static void dsv4__pack_panel(const dsv4__panel_source *source, int to_bf16, void *to) {
    if (source->matrix.dtype == DSV4_BF16)
        dsv4__pack_bf16(source, (dsv4_bf16 *)to);
    else if (to_bf16)
        dsv4__pack_rounded(source, (dsv4_bf16 *)to);
    else
        dsv4__pack_f32(source, (float *)to);
}

/* Rows of a matrix that are the terms of a product, and up to 32 of their columns. */
typedef struct dsv4__terms {
    const dsv4__kernels *kernels;
    const void *first; /* first number of the first term */
    dsv4_dtype dtype;
    int64_t stride; /* numbers from term to term */
    int64_t terms, columns;
    int64_t lead, padded; /* terms of 0 before the first; all, with those behind the last */
} dsv4__terms;

/* A whole panel's pairs of two terms. Through an array of its own, so that compilers see that nothing overlaps. */
static void dsv4__interleave(dsv4_bf16 *pairs, const dsv4_bf16 *even, const dsv4_bf16 *odd) {
    dsv4_bf16 whole[2 * DSV4__PANEL];
    for (int i = 0; i < DSV4__PANEL; i++) {
        whole[2 * i] = even[i];
        whole[2 * i + 1] = odd[i];
    }
    memcpy(pairs, whole, sizeof whole);
}

/* Asks for a term some way behind the k-th: terms lie too far apart for the CPU to guess. */
static void dsv4__fetch_term(const dsv4__terms *source, int64_t k) {
    const uintptr_t number = dsv4_dtype_size(source->dtype);
    dsv4__fetch((uintptr_t)source->first + (uintptr_t)((k + 16) * source->stride) * number,
                (uintptr_t)source->columns * number);
}

/* The k-th of all terms; NULL: 0. */
static const void *dsv4__term(const dsv4__terms *source, int64_t k) {
    const int64_t i = k - source->lead;
    return i < 0 || i >= source->terms ? NULL : dsv4__at(source->first, source->dtype, i * source->stride);
}

/* Two terms of a panel, rounded where they are fp32; NULL: 0. */
static void dsv4__pack_pair(const dsv4__terms *source, const void *even, const void *odd, dsv4_bf16 *pairs) {
    const void *const terms[2] = {even, odd};
    if (source->columns == DSV4__PANEL && source->dtype == DSV4_BF16 && even != NULL && odd != NULL) {
        dsv4__interleave(pairs, (const dsv4_bf16 *)even, (const dsv4_bf16 *)odd);
        return;
    }
    for (int64_t i = 0; i < source->columns; i++)
        for (int k = 0; k < 2; k++)
            pairs[2 * i + k] = terms[k] == NULL ? 0 : dsv4_bf16_from_f32(dsv4__get(terms[k], source->dtype, i));
}

/* As a right operand: fp32 [padded][32], or bf16 [padded / 2][32][2]; made 32 wide with zeros. */
static void dsv4__pack_terms(const dsv4__terms *source, dsv4_dtype dtype, void *to) {
    const int64_t n = source->columns;
    if (source->padded > source->terms || n < DSV4__PANEL)
        memset(to, 0, (size_t)(source->padded * DSV4__PANEL) * dsv4_dtype_size(dtype));
    for (int64_t k = source->lead; k < source->lead + source->terms && dtype == DSV4_F32; k++) {
        const void *from = dsv4__term(source, k);
        float *row = (float *)to + k * DSV4__PANEL;
        dsv4__fetch_term(source, k - source->lead);
        if (source->dtype == DSV4_F32)
            memcpy(row, from, (size_t)n * sizeof *row);
        else
            source->kernels->widen(row, (const dsv4_bf16 *)from, n);
    }
    for (int64_t k = 0; k < source->padded && dtype == DSV4_BF16; k += 2) {
        dsv4__fetch_term(source, k - source->lead);
        dsv4__fetch_term(source, k - source->lead + 1);
        dsv4__pack_pair(source, dsv4__term(source, k), dsv4__term(source, k + 1), (dsv4_bf16 *)to + k * DSV4__PANEL);
    }
}

/* How rows become left operands of products: [blocks of terms][rows][256]. */
typedef struct dsv4__row_packer {
    const dsv4__kernels *kernels;
    dsv4_dtype from, to;
    int64_t terms, padded, rows; /* terms up to `padded` are 0 */
    void *packed;
} dsv4__row_packer;

/* The numbers that a row takes there: its last block has the length of the others. */
static int64_t dsv4__packed_terms(int64_t terms) { return dsv4__ceil_div(terms, DSV4__KBLOCK) * DSV4__KBLOCK; }

/* One row into its place in each block of terms. */
static void dsv4__pack_row(const dsv4__row_packer *packer, const void *from, int64_t row) {
    for (int64_t k = 0; k < packer->terms; k += DSV4__KBLOCK) {
        const int64_t count = dsv4__min(packer->terms - k, DSV4__KBLOCK);
        const void *source = dsv4__at(from, packer->from, k);
        void *to = dsv4__at_mutable(packer->packed, packer->to, k * packer->rows + row * DSV4__KBLOCK);
        if (packer->from == packer->to)
            memcpy(to, source, (size_t)count * dsv4_dtype_size(packer->to));
        else if (packer->to == DSV4_F32)
            packer->kernels->widen((float *)to, (const dsv4_bf16 *)source, count);
        else
            packer->kernels->narrow((dsv4_bf16 *)to, (const float *)source, count);
        for (int64_t i = count; i < dsv4__min(packer->padded - k, DSV4__KBLOCK); i++) dsv4__put(to, packer->to, i, 0);
    }
}

/* to[column][row] = from[row][column], for rows [row, row_end) and up to 256 columns; both lie 256 numbers apart. Some
 * rows at a time, so that what is written are not single numbers. */
#define DSV4__TRANSPOSE(NAME, NUMBER)                                                                 \
    static void NAME(const NUMBER *from, NUMBER *to, int64_t row, int64_t row_end, int64_t columns) { \
        enum { ROWS = 8 };                                                                            \
        for (; row + ROWS <= row_end; row += ROWS)                                                    \
            for (int64_t column = 0; column < columns; column++) {                                    \
                NUMBER numbers[ROWS];                                                                 \
                DSV4__UNROLL                                                                          \
                for (int r = 0; r < ROWS; r++) numbers[r] = from[(row + r) * DSV4__KBLOCK + column];  \
                memcpy(to + column * DSV4__KBLOCK + row, numbers, sizeof numbers);                    \
            }                                                                                         \
        for (; row < row_end; row++)                                                                  \
            for (int64_t column = 0; column < columns; column++)                                      \
                to[column * DSV4__KBLOCK + row] = from[row * DSV4__KBLOCK + column];                  \
    }
DSV4__TRANSPOSE(dsv4__transpose_bf16, dsv4_bf16)
DSV4__TRANSPOSE(dsv4__transpose_f32, float)

/* Copies rows of n numbers from one matrix to another. */
static void dsv4__copy_rows(float *to, int64_t to_stride, const float *from, int64_t from_stride, int64_t rows,
                            int64_t n) {
    for (int64_t r = 0; r < rows; r++) memcpy(to + r * to_stride, from + r * from_stride, (size_t)n * sizeof(float));
}

/* The product of a job, on tiles or not. A task that has any begins and ends with the tiles. */
static void dsv4__multiply(const dsv4__kernels *kernels, int tiles, const dsv4__product_job *job) {
    if (tiles)
        kernels->tile_product(job);
    else
        kernels->product(job);
}

static void dsv4__begin_tiles(const dsv4__kernels *kernels, int tiles, int64_t rows) {
    if (tiles) kernels->tile_begin(rows);
}

static void dsv4__end_tiles(const dsv4__kernels *kernels, int tiles) {
    if (tiles) kernels->tile_end();
}

/* ------------------------------------------------------------------------------------------------------------
 * 3j. Kernel sets: which of them this CPU can run
 * ------------------------------------------------------------------------------------------------------------ */

/* What a kernel set needs of the CPU; each bit stands for all that the set is made of. */
enum {
    DSV4__CPU_AVX2 = 1 << 0,      /* AVX2, FMA */
    DSV4__CPU_AVX512 = 1 << 1,    /* and AVX-512 F, BW, VL, DQ */
    DSV4__CPU_BF16 = 1 << 2,      /* and AVX512-BF16 */
    DSV4__CPU_SLOW_BF16 = 1 << 3, /* but, Intel's: VDPBF16PS has half the rate of FMA there */
    DSV4__CPU_AMX = 1 << 4,       /* AVX-512, AMX-TILE and AMX-BF16 */
    DSV4__BY_NAME = 1 << 5        /* nothing, but to be asked for */
};

DSV4__INLINE unsigned dsv4__all_of(uint64_t word, uint64_t bits) { return (word & bits) == bits; }

#if defined(DSV4__CPUID)
typedef struct dsv4__cpuid {
    uint32_t a, b, c, d;
} dsv4__cpuid;

/* What the CPU says of itself, by the leaves of its manual, and what the system keeps of it. */
typedef struct dsv4__cpu {
    dsv4__cpuid leaf_0, leaf_1, leaf_7, leaf_7_1;
    uint64_t kept; /* XCR0: the registers that survive a change of threads */
} dsv4__cpu;

static dsv4__cpuid dsv4__ask_cpu(uint32_t leaf, uint32_t part) {
    dsv4__cpuid says;
    __asm__ volatile("cpuid" : "=a"(says.a), "=b"(says.b), "=c"(says.c), "=d"(says.d) : "0"(leaf), "2"(part));
    return says;
}

/* Without the compiler's runtime, which not every C library has, and which is not ready for constructors. In a virtual
 * machine each leaf takes microseconds. */
static dsv4__cpu dsv4__this_cpu(void) {
    dsv4__cpu cpu;
    uint32_t low = 0, high = 0;
    cpu.leaf_0 = dsv4__ask_cpu(0, 0);
    cpu.leaf_1 = dsv4__ask_cpu(1, 0);
    cpu.leaf_7 = dsv4__ask_cpu(7, 0);
    cpu.leaf_7_1 = dsv4__ask_cpu(7, 1);
    if (cpu.leaf_1.c >> 27 & 1u) __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    cpu.kept = (uint64_t)high << 32 | low;
#if defined(__APPLE__)
    cpu.kept |= (cpu.kept & 0x4u) * 0x38u; /* it keeps AVX-512's from their first use on */
#endif
    return cpu;
}

/* The DSV4__CPU_... bits. Leaves beyond the CPU's last one say what another does. */
static unsigned dsv4__cpu_offers(const dsv4__cpu *cpu) {
    const unsigned has_7 = cpu->leaf_0.a >= 7, has_7_1 = cpu->leaf_7.a >= 1;
    const unsigned intel =
        (cpu->leaf_0.b == 0x756e6547u) & (cpu->leaf_0.d == 0x49656e69u) & (cpu->leaf_0.c == 0x6c65746eu);
    const unsigned avx2 = dsv4__all_of(cpu->kept, 0x6) & dsv4__all_of(cpu->leaf_1.c, 1u << 12 | 1u << 27 | 1u << 28) &
                          has_7 & dsv4__all_of(cpu->leaf_7.b, 1u << 5);
    const unsigned avx512 =
        avx2 & dsv4__all_of(cpu->kept, 0xe6) & dsv4__all_of(cpu->leaf_7.b, 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31);
    const unsigned bf16 = avx512 & has_7_1 & dsv4__all_of(cpu->leaf_7_1.a, 1u << 5);
    const unsigned amx = avx512 & dsv4__all_of(cpu->kept, 0x60000) & dsv4__all_of(cpu->leaf_7.d, 1u << 22 | 1u << 24);
    return avx2 * DSV4__CPU_AVX2 | avx512 * DSV4__CPU_AVX512 | bf16 * DSV4__CPU_BF16 |
           (bf16 & intel) * DSV4__CPU_SLOW_BF16 | amx * DSV4__CPU_AMX;
}
#endif

/* What the system grants of the tiles that a CPU has: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA), as often as one
 * likes. */
#if defined(DSV4__AMX)
static unsigned dsv4__tiles_granted(unsigned amx) {
    int64_t status = 158;
    if (amx == 0) return 0;
    __asm__ volatile("syscall" : "+a"(status) : "D"((int64_t)0x1023), "S"((int64_t)18) : "rcx", "r11", "memory");
    return status == 0 ? amx : 0;
}
#else
#define dsv4__tiles_granted(amx) 0u
#endif

/* What this CPU offers; tiles only where they are wanted, as the system has to be asked for them. */
static unsigned dsv4__offers(int tiles) {
#if defined(DSV4__CPUID)
    const dsv4__cpu cpu = dsv4__this_cpu();
    const unsigned offers = dsv4__cpu_offers(&cpu), amx = tiles ? offers & DSV4__CPU_AMX : 0;
    (void)amx;
    return (offers & ~(unsigned)DSV4__CPU_AMX) | dsv4__tiles_granted(amx);
#else
    (void)tiles;
    return 0;
#endif
}

#define DSV4__SET_WITH(name, set, needs, begin, product, end)                                                   \
    {                                                                                                           \
        name, needs, dsv4__##set##_has_dot, dsv4__##set##_tile_rows, DSV4__KERNELS(DSV4__KERNEL_OF, set) begin, \
            product, end                                                                                        \
    }
#define DSV4__SET_ROW(set, needs) DSV4__SET_WITH(#set, set, needs, NULL, NULL, NULL)
/* One set's kernels, and the product on tiles. */
#define DSV4__SET_TILES(name, tiles, set, needs) \
    DSV4__SET_WITH(name, set, needs, dsv4__##tiles##_tile_begin, dsv4__##tiles##_tile_product, dsv4__##tiles##_tile_end)

/* The fastest first. The last one needs nothing. */
static const dsv4__kernels dsv4__sets[] = {
#if defined(DSV4__AMX)
    DSV4__SET_TILES("amx", amx, avx512, DSV4__CPU_AMX),
#endif
#if defined(DSV4__X86_BF16)
    DSV4__SET_ROW(avx512bf16, DSV4__CPU_BF16),
#endif
#if defined(DSV4__X86)
    DSV4__SET_ROW(avx512, DSV4__CPU_AVX512),
    DSV4__SET_ROW(avx2, DSV4__CPU_AVX2),
#endif
#if defined(DSV4__X86_128)
    DSV4__SET_ROW(fma128, DSV4__CPU_AVX2),
#endif
#if defined(DSV4__NEON)
    DSV4__SET_ROW(neon, 0),
#endif
#if defined(DSV4__SIMDE)
    DSV4__SET_ROW(simde, 0),
#endif
#if defined(DSV4__TILE_MODEL)
    DSV4__SET_TILES("amx-model", amx_model, scalar, DSV4__BY_NAME),
#endif
    DSV4__SET_ROW(scalar, 0),
};

enum { DSV4__SET_COUNT = (int)(sizeof dsv4__sets / sizeof dsv4__sets[0]) };

/* The definition, for what is not worth a choice. */
static const dsv4__kernels *dsv4__plain_set(void) { return &dsv4__sets[DSV4__SET_COUNT - 1]; }

/* The set of that rank by speed: its row, but that a slow VDPBF16PS exchanges its set with the one behind. */
static const dsv4__kernels *dsv4__ranked(unsigned offers, int rank) {
    const int slow = (offers & DSV4__CPU_SLOW_BF16) != 0, before = rank > 0 && dsv4__sets[rank - 1].dot;
    return &dsv4__sets[rank + slow * (dsv4__sets[rank].dot - before)];
}

/* The index-th of the sets that a CPU can run. */
static const dsv4__kernels *dsv4__set_at(unsigned offers, int index) {
    for (int rank = 0; rank < DSV4__SET_COUNT; rank++) {
        const dsv4__kernels *set = dsv4__ranked(offers, rank);
        if (dsv4__all_of(offers, set->needs) && index-- == 0) return set;
    }
    return NULL;
}

DSV4_API const char *dsv4_isa_name(int index) {
    const dsv4__kernels *set = index < 0 ? NULL : dsv4__set_at(dsv4__offers(1) | DSV4__BY_NAME, index);
    return set != NULL ? set->name : NULL;
}

/* The set of that name; NULL: the best one for an order of sums. */
static dsv4_status dsv4__set_by_name(const char *name, dsv4_sums sums, const dsv4__kernels **set, dsv4_error *error) {
    const int tiles = name != NULL ? strcmp(name, "amx") == 0 : sums == DSV4_SUMS_TILES;
    const unsigned offers = dsv4__offers(tiles) | (name != NULL ? (unsigned)DSV4__BY_NAME : 0u);
    *set = dsv4__set_at(offers, 0);
    for (int i = 1; name != NULL && *set != NULL && strcmp((*set)->name, name) != 0; i++)
        *set = dsv4__set_at(offers, i);
    if (*set != NULL) return DSV4_OK;
    return dsv4__fail(error, DSV4_ERROR_ISA, "no kernel set \"%.40s\" on this CPU", name);
}

/* Asking an x86 takes as long, in a virtual machine, as converting some rows by the scalar set. */
static const dsv4__kernels *dsv4__set_for_arrays(size_t count) {
#if defined(DSV4__CPUID)
    if (count < 16384) return dsv4__plain_set();
#endif
    (void)count;
    return dsv4__set_at(dsv4__offers(0), 0);
}

DSV4_API void dsv4_bf16_from_f32_array(dsv4_bf16 *destination, const float *source, size_t count) {
    dsv4__set_for_arrays(count)->narrow(destination, source, (int64_t)count);
}

DSV4_API void dsv4_bf16_to_f32_array(float *destination, const dsv4_bf16 *source, size_t count) {
    dsv4__set_for_arrays(count)->widen(destination, source, (int64_t)count);
}

DSV4_API uint8_t dsv4_e4m3_from_f32(float value) {
    const uint32_t nan = dsv4__e4m3.nan | (dsv4__bits(value) >> 31) << 7;
    return (uint8_t)(value != value ? nan : dsv4__small_code(&dsv4__e4m3, dsv4__scalar_nearest(&dsv4__e4m3, value)));
}

DSV4_API float dsv4_e4m3_to_f32(uint8_t code) { return dsv4__small_value(&dsv4__e4m3, code); }

DSV4_API uint8_t dsv4_e2m1_from_f32(float value) {
    return (uint8_t)dsv4__small_code(&dsv4__e2m1, value != value ? value : dsv4__scalar_nearest(&dsv4__e2m1, value));
}

DSV4_API float dsv4_e2m1_to_f32(uint8_t code) { return dsv4__small_value(&dsv4__e2m1, code & 15u); }

/* ------------------------------------------------------------------------------------------------------------
 * 3k. Presets, checks and initial values of a configuration
 * ------------------------------------------------------------------------------------------------------------ */

DSV4_API dsv4_config dsv4_preset_config(dsv4_preset preset) {
    static const struct {
        int64_t hidden_dim, head_dim, ratio;
        int overlap, no_ape;
        float eps;
    } rows[] = {
#define DSV4__PRESET_ROW(name, text, h, d, m, overlap, no_ape, eps) {h, d, m, overlap, no_ape, eps},
        DSV4_PRESETS(DSV4__PRESET_ROW)
#undef DSV4__PRESET_ROW
    };
    dsv4_config config;
    memset(&config, 0, sizeof config);
    if ((unsigned)preset >= (unsigned)DSV4_PRESET_COUNT) return config;
    config.hidden_dim = rows[preset].hidden_dim;
    config.head_dim = rows[preset].head_dim;
    config.ratio = rows[preset].ratio;
    config.rope_dim = 64;
    config.overlap = rows[preset].overlap;
    config.no_ape = rows[preset].no_ape;
    config.no_gate = config.ratio == 1;
    config.rounding = DSV4_ROUNDING_DEEPSEEK;
    config.eps = rows[preset].eps;
    config.yarn_factor = 16;
    return config;
}

DSV4_API const char *dsv4_preset_name(dsv4_preset preset) {
    static const char *const names[] = {
#define DSV4__PRESET_TEXT(name, text, h, d, m, overlap, no_ape, eps) text,
        DSV4_PRESETS(DSV4__PRESET_TEXT)
#undef DSV4__PRESET_TEXT
    };
    return (unsigned)preset < (unsigned)DSV4_PRESET_COUNT ? names[preset] : NULL;
}

DSV4_API dsv4_rows dsv4_preset_rows(dsv4_preset preset) {
    const dsv4_config config = dsv4_preset_config(preset);
    if (config.head_dim == 0) return DSV4_ROWS_PLAIN;
    if (config.no_ape) return DSV4_ROWS_FP4_E4M3;
    return config.head_dim == 128 ? DSV4_ROWS_FP4 : DSV4_ROWS_FP8;
}

DSV4_API const char *dsv4_rows_name(dsv4_rows rows) {
    static const char *const names[] = {
#define DSV4__ROWS_TEXT(name, text) text,
        DSV4_ROW_FORMATS(DSV4__ROWS_TEXT)
#undef DSV4__ROWS_TEXT
    };
    return (unsigned)rows < (unsigned)DSV4_ROWS_COUNT ? names[rows] : NULL;
}

/* Roundings by name: presets first, so that a sum which has a name of its own gets it, then points. */
static const struct {
    const char *name;
    uint32_t bits;
} dsv4__roundings[] = {
#define DSV4__ROUNDING_ROW(name, text, bits) {text, name},
    DSV4_ROUNDINGS(DSV4__ROUNDING_ROW) DSV4_ROUNDING_POINTS(DSV4__ROUNDING_ROW)};

enum {
#define DSV4__ROUNDING_COUNT(name, text, bits) +1
    DSV4__ROUNDING_PRESETS = 0 DSV4_ROUNDINGS(DSV4__ROUNDING_COUNT),
    DSV4__ROUNDING_NAMES = DSV4__ROUNDING_PRESETS DSV4_ROUNDING_POINTS(DSV4__ROUNDING_COUNT)
};

#define DSV4__ROUNDING_SUM(name, text, bits) | (name)
static const uint32_t dsv4__all_points = 0 DSV4_ROUNDING_POINTS(DSV4__ROUNDING_SUM);

DSV4_API dsv4_status dsv4_rounding_name(uint32_t rounding, char *text, size_t size, dsv4_error *error) {
    size_t used = 0;
    DSV4__TRY(dsv4__need(text, "text", error));
    if ((rounding & ~dsv4__all_points) != 0)
        return dsv4__fail(error, DSV4_ERROR_ARGUMENT, "rounding is 0x%lx, beyond the points that are known",
                          (unsigned long)rounding);
    for (int i = 0; i < DSV4__ROUNDING_NAMES; i++) {
        const int preset = i < DSV4__ROUNDING_PRESETS;
        const uint32_t bits = dsv4__roundings[i].bits;
        if (preset ? rounding != bits : (rounding & bits) == 0) continue;
        const size_t length = strlen(dsv4__roundings[i].name), joint = used > 0;
        if (size < used + joint + length + 1)
            return dsv4__fail(error, DSV4_ERROR_BUFFER, "%llu bytes do not hold the name of rounding 0x%lx",
                              (unsigned long long)size, (unsigned long)rounding);
        if (joint) text[used++] = '+';
        memcpy(text + used, dsv4__roundings[i].name, length + 1);
        used += length;
        if (preset) break;
    }
    return DSV4_OK;
}

/* The rounding that the first `length` characters name, or -1. */
static int64_t dsv4__rounding_term(const char *text, size_t length) {
    for (int i = 0; i < DSV4__ROUNDING_NAMES; i++)
        if (strlen(dsv4__roundings[i].name) == length && memcmp(dsv4__roundings[i].name, text, length) == 0)
            return dsv4__roundings[i].bits;
    return -1;
}

DSV4_API dsv4_status dsv4_rounding_parse(const char *text, uint32_t *rounding, dsv4_error *error) {
#define DSV4__ROUNDING_LIST(name, text, bits) " " text
    uint32_t sum = 0;
    DSV4__TRY(dsv4__need(text, "text", error));
    DSV4__TRY(dsv4__need(rounding, "rounding", error));
    for (const char *rest = text;;) {
        size_t length = 0;
        while (rest[length] != '\0' && rest[length] != '+') length++;
        const int64_t bits = dsv4__rounding_term(rest, length);
        if (bits < 0)
            return dsv4__fail(
                error, DSV4_ERROR_ARGUMENT,
                "no rounding \"%.*s\"; presets:" DSV4_ROUNDINGS(
                    DSV4__ROUNDING_LIST) "; points, joined by +:" DSV4_ROUNDING_POINTS(DSV4__ROUNDING_LIST),
                (int)(length < 24 ? length : 24), rest);
        sum |= (uint32_t)bits;
        if (rest[length] == '\0') break;
        rest += length + 1;
    }
    *rounding = sum;
    return DSV4_OK;
}

/* The configuration with its defaults in place. */
static dsv4_config dsv4__resolve(const dsv4_config *config) {
    dsv4_config full = *config;
    if (full.eps == 0) full.eps = 1e-6f;
    if (full.pad_gate == 0) full.pad_gate = -INFINITY;
    if (full.rope_theta == 0) full.rope_theta = 160000;
    if (full.yarn_factor == 0) full.yarn_factor = 1;
    if (full.yarn_orig_ctx == 0) full.yarn_orig_ctx = 65536;
    if (full.yarn_beta_fast == 0) full.yarn_beta_fast = 32;
    if (full.yarn_beta_slow == 0) full.yarn_beta_slow = 1;
    return full;
}

/* A dimension: 1 ... 2^31 - 1. */
static dsv4_status dsv4__check_dim(int64_t value, const char *name, dsv4_error *error) {
    if (value >= 1 && value <= INT32_MAX) return DSV4_OK;
    return dsv4__fail(error, DSV4_ERROR_CONFIG, "%s is %lld, not in 1 ... 2147483647", name, (long long)value);
}

static dsv4_status dsv4__check_flag(int value, const char *name, dsv4_error *error) {
    if (value == 0 || value == 1) return DSV4_OK;
    return dsv4__fail(error, DSV4_ERROR_CONFIG, "%s is %d, neither 0 nor 1", name, value);
}

/* A real setting: at least `least` (or above it), and not beyond what arithmetic on it can bear. */
static dsv4_status dsv4__check_real(double value, double least, int above, const char *name, dsv4_error *error) {
    if ((above ? value > least : value >= least) && value <= 1e30) return DSV4_OK;
    return dsv4__fail(error, DSV4_ERROR_CONFIG, "%s is %g, not %s %g and at most 1e30", name, value,
                      above ? "above" : "at least", least);
}

DSV4_API dsv4_status dsv4_config_check(const dsv4_config *config, dsv4_error *error) {
    DSV4__TRY(dsv4__need(config, "config", error));
    const dsv4_config full = dsv4__resolve(config);
    DSV4__TRY(dsv4__check_dim(full.hidden_dim, "hidden_dim", error));
    DSV4__TRY(dsv4__check_dim(full.head_dim, "head_dim", error));
    DSV4__TRY(dsv4__check_dim(full.ratio, "ratio", error));
    DSV4__TRY(dsv4__check_flag(full.overlap, "overlap", error));
    DSV4__TRY(dsv4__check_flag(full.no_ape, "no_ape", error));
    DSV4__TRY(dsv4__check_flag(full.no_gate, "no_gate", error));
    if (full.rope_dim < 0 || full.rope_dim > full.head_dim || full.rope_dim % 2 != 0)
        return dsv4__fail(error, DSV4_ERROR_CONFIG, "rope_dim is %lld, not an even number in 0 ... head_dim %lld",
                          (long long)full.rope_dim, (long long)full.head_dim);
    if (full.no_gate && (full.ratio != 1 || full.overlap))
        return dsv4__fail(error, DSV4_ERROR_CONFIG, "no_gate with windows of %lld rows to weigh",
                          (long long)(full.ratio * (1 + full.overlap)));
    if ((full.rounding & ~dsv4__all_points) != 0)
        return dsv4__fail(error, DSV4_ERROR_CONFIG, "rounding is 0x%lx, beyond the points that are known",
                          (unsigned long)full.rounding);
    if ((unsigned)full.rows >= (unsigned)DSV4_ROWS_COUNT)
        return dsv4__fail(error, DSV4_ERROR_CONFIG, "rows is %d, beyond the formats that are known", (int)full.rows);
    if (dsv4__format_of(&full)->hadamard && (full.head_dim & (full.head_dim - 1)) != 0)
        return dsv4__fail(error, DSV4_ERROR_CONFIG, "rows are FP4, but head_dim %lld is no power of two",
                          (long long)full.head_dim);
    if (full.sums != DSV4_SUMS_PAIRS && full.sums != DSV4_SUMS_TILES)
        return dsv4__fail(error, DSV4_ERROR_CONFIG, "sums is %d, neither PAIRS (0) nor TILES (1)", (int)full.sums);
    if (!(full.pad_gate < 0)) return dsv4__fail(error, DSV4_ERROR_CONFIG, "pad_gate is %g, not below 0", full.pad_gate);
    DSV4__TRY(dsv4__check_real(full.eps, 0, 1, "eps", error));
    DSV4__TRY(dsv4__check_real(full.rope_theta, 1, 1, "rope_theta", error));
    DSV4__TRY(dsv4__check_real(full.yarn_factor, 1, 0, "yarn_factor", error));
    DSV4__TRY(dsv4__check_real(full.yarn_orig_ctx, 1, 0, "yarn_orig_ctx", error));
    DSV4__TRY(dsv4__check_real(full.yarn_beta_fast, 0, 1, "yarn_beta_fast", error));
    DSV4__TRY(dsv4__check_real(full.yarn_beta_slow, 0, 1, "yarn_beta_slow", error));
    return DSV4_OK;
}

DSV4_API dsv4_status dsv4_config_params(const dsv4_config *config, dsv4_param_info info[DSV4_PARAM_COUNT],
                                        dsv4_error *error) {
    static const char *const names[DSV4_PARAM_COUNT] = {"wkv", "wgate", "ape", "norm"};
    DSV4__TRY(dsv4_config_check(config, error));
    DSV4__TRY(dsv4__need(info, "info", error));
    const int64_t columns = config->head_dim * (config->overlap ? 2 : 1);
    const int64_t rows[DSV4_PARAM_COUNT] = {columns, config->no_gate ? 0 : columns, config->no_ape ? 0 : config->ratio,
                                            1};
    const int64_t widths[DSV4_PARAM_COUNT] = {config->hidden_dim, config->no_gate ? 0 : config->hidden_dim,
                                              config->no_ape ? 0 : columns, config->head_dim};
    for (int i = 0; i < DSV4_PARAM_COUNT; i++) {
        info[i].name = names[i];
        info[i].rows = rows[i];
        info[i].columns = widths[i];
        info[i].count = rows[i] * widths[i];
    }
    return DSV4_OK;
}

DSV4_API dsv4_status dsv4_row_sizes(const dsv4_config *config, size_t *row, size_t *scales, dsv4_error *error) {
    DSV4__TRY(dsv4_config_check(config, error));
    DSV4__TRY(dsv4__need(row, "row", error));
    DSV4__TRY(dsv4__need(scales, "scales", error));
    const dsv4__small *code = dsv4__format_of(config)->code;
    if (code == NULL) return dsv4__fail(error, DSV4_ERROR_CONFIG, "rows are plain: nothing to pack");
    if (code == &dsv4__e2m1 && config->head_dim % 2 != 0)
        return dsv4__fail(error, DSV4_ERROR_CONFIG, "rows are packed in pairs, but head_dim is %lld",
                          (long long)config->head_dim);
    *row = (size_t)dsv4__row_bytes(config);
    *scales = (size_t)dsv4__scale_bytes(config);
    return DSV4_OK;
}

/* Uniform in [-1, 1) on a grid of 2^-23, from a counter: SplitMix64's finaliser. */
static float dsv4__uniform(uint64_t seed, uint64_t stream, uint64_t index) {
    uint64_t z = seed + (stream + 1) * 0xd1b54a32d192ed03u + (index + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    return (float)((int32_t)(z >> 40) - 8388608) / 8388608.0f;
}

DSV4_API dsv4_status dsv4_param_init(const dsv4_config *config, dsv4_param param, uint64_t seed, dsv4_matrix array,
                                     dsv4_error *error) {
    dsv4_param_info info[DSV4_PARAM_COUNT];
    DSV4__TRY(dsv4_config_params(config, info, error));
    if ((unsigned)param >= (unsigned)DSV4_PARAM_COUNT || info[param].count == 0)
        return dsv4__fail(error, DSV4_ERROR_ARGUMENT, "parameter %d is none of this configuration", (int)param);
    const int64_t rows = info[param].rows, columns = info[param].columns;
    DSV4__TRY(dsv4__check_matrix(&array, rows, columns, info[param].name, error));
    const float range = param == DSV4_APE ? 0.5f : sqrtf(3.0f / (float)config->hidden_dim);
    for (int64_t row = 0, i = 0; row < rows; row++)
        for (int64_t k = 0; k < columns; k++, i++)
            dsv4__put(array.data, array.dtype, row * array.stride + k,
                      param == DSV4_NORM ? 1.0f : range * dsv4__uniform(seed, (uint64_t)param, (uint64_t)i));
    return DSV4_OK;
}

DSV4_API dsv4_status dsv4_rope_frequencies(const dsv4_config *config, float *inv_freq, int64_t capacity,
                                           dsv4_error *error) {
    DSV4__TRY(dsv4_config_check(config, error));
    if (capacity < config->rope_dim / 2)
        return dsv4__fail(error, DSV4_ERROR_BUFFER, "room for %lld frequencies of %lld", (long long)capacity,
                          (long long)(config->rope_dim / 2));
    const dsv4_config full = dsv4__resolve(config);
    if (full.rope_dim > 0) DSV4__TRY(dsv4__need_aligned(inv_freq, sizeof *inv_freq, "inv_freq", error));
    dsv4__frequencies(&full, inv_freq);
    return DSV4_OK;
}

/* ------------------------------------------------------------------------------------------------------------
 * 3l. The compressor: weights packed in panels
 *
 * A group is 32 channels of every series: the columns that pooling needs together. Its panels are, for each series,
 * kv's 32 columns and gate's. Memory runs group, block of 256 terms, panel, pair of terms, column, term of the pair:
 * decoding reads it once from end to end, and prefill keeps one block of one panel in the first cache for many rows.
 * ------------------------------------------------------------------------------------------------------------ */

struct dsv4_compressor {
    dsv4_config config;
    dsv4_allocator allocator;
    size_t bytes;
    const dsv4__kernels *kernels;
    uint64_t fingerprint;
    int64_t series;   /* coff: rows of a window come from this many windows */
    int64_t matrices; /* wkv alone, or wkv and wgate */
    int64_t columns;  /* series * head_dim */
    int64_t groups;
    int w_bf16[2];      /* type of each matrix */
    int tiles;          /* multiplied on tiles, where x is bf16 too */
    int64_t span;       /* terms of a panel that lie together */
    int64_t terms;      /* hidden_dim, made even, or whole steps for tiles */
    int64_t back_terms; /* the same of columns, for dx */
    int training;       /* DSV4__BACK, DSV4__BF16_SUMS */
    int keeps_rows;     /* states keep an open window's rows: needed one by one, or less than what is folded of them */
    float *ape;         /* [ratio, columns] or NULL */
    float *norm;        /* [head_dim] */
    float *inv_freq;    /* [rope_dim / 2] */
    unsigned char *panels;
    unsigned char *back_panels; /* for dx: by 32 hidden columns, the matrices' rows as terms */
};

enum { DSV4__BACK = 1, DSV4__BF16_SUMS = 2 };

/* FNV-1a, for fingerprints and checksums. */
static uint64_t dsv4__hash(uint64_t hash, const void *data, size_t size) {
    const unsigned char *bytes = (const unsigned char *)data;
    for (size_t i = 0; i < size; i++) hash = (hash ^ bytes[i]) * 0x100000001b3u;
    return hash;
}

static uint64_t dsv4__hash_number(uint64_t hash, uint64_t number) {
    unsigned char bytes[8];
    for (int i = 0; i < 8; i++) bytes[i] = (unsigned char)(number >> (8 * i));
    return dsv4__hash(hash, bytes, sizeof bytes);
}

static uint64_t dsv4__hash_real(uint64_t hash, double number) {
    uint64_t bits;
    memcpy(&bits, &number, sizeof bits);
    return dsv4__hash_number(hash, bits);
}

static const uint64_t dsv4__hash_start = 0xcbf29ce484222325u;

static uint64_t dsv4__config_fingerprint(const dsv4_config *config) {
    const int64_t numbers[] = {config->hidden_dim, config->head_dim, config->ratio,   config->rope_dim,
                               config->overlap,    config->no_ape,   config->no_gate, (int64_t)config->rounding};
    const double reals[] = {config->eps,           config->pad_gate,       config->rope_theta,    config->yarn_factor,
                            config->yarn_orig_ctx, config->yarn_beta_fast, config->yarn_beta_slow};
    uint64_t hash = dsv4__hash_start;
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++)
        hash = dsv4__hash_number(hash, (uint64_t)numbers[i]);
    for (size_t i = 0; i < sizeof reals / sizeof reals[0]; i++) hash = dsv4__hash_real(hash, reals[i]);
    /* These came later. */
    if (config->rows != DSV4_ROWS_PLAIN) hash = dsv4__hash_number(hash, (uint64_t)config->rows << 8);
    if (config->sums != DSV4_SUMS_PAIRS) hash = dsv4__hash_number(hash, (uint64_t)config->sums);
    return hash;
}

/* Bytes of a term of all panels of a group before panel `panel`. */
static int64_t dsv4__panel_offset(const dsv4_compressor *c, int64_t panel) {
    int64_t bytes = 0;
    for (int64_t p = 0; p < panel; p++) bytes += DSV4__PANEL * (c->w_bf16[p % c->matrices] ? 2 : 4);
    return bytes;
}

/* A panel's terms from `term` on. Group by group, each from its first term to its last. */
static unsigned char *dsv4__panel(const dsv4_compressor *c, int64_t group, int64_t term, int64_t panel) {
    const int64_t first = term / c->span * c->span, span = dsv4__min(c->terms - first, c->span);
    const int64_t term_bytes = dsv4__panel_offset(c, c->series * c->matrices);
    return c->panels + (group * c->terms + first) * term_bytes + span * dsv4__panel_offset(c, panel) +
           (term - first) * DSV4__PANEL * (c->w_bf16[panel % c->matrices] ? 2 : 4);
}

/* The block of `matrix` from term (its row) `term` on, for the hidden columns of a group of 32. */
static unsigned char *dsv4__back_panel(const dsv4_compressor *c, int64_t group, int64_t matrix, int64_t term) {
    const int64_t columns = group * dsv4__panel_offset(c, c->matrices) + dsv4__panel_offset(c, matrix);
    return c->back_panels + columns * c->back_terms + term * DSV4__PANEL * (c->w_bf16[matrix] ? 2 : 4);
}

/* Lays a planned compressor out in a block, or, without one, adds up what that takes. */
static dsv4__size dsv4__compressor_lay(dsv4_compressor *c, void *block) {
    const int64_t back = c->training ? dsv4__ceil_div(c->config.hidden_dim, DSV4__PANEL) : 0;
    dsv4__cursor cursor = dsv4__cursor_at(block);
    (void)dsv4__lay(&cursor, 1, 1, sizeof *c);
    c->ape = dsv4__lay_floats(&cursor, c->config.no_ape ? 0 : c->config.ratio, c->columns);
    c->norm = dsv4__lay_floats(&cursor, 1, c->config.head_dim);
    c->inv_freq = dsv4__lay_floats(&cursor, 1, c->config.rope_dim / 2);
    c->panels =
        (unsigned char *)dsv4__lay(&cursor, c->groups * c->terms, dsv4__panel_offset(c, c->series * c->matrices), 1);
    c->back_panels = (unsigned char *)dsv4__lay(&cursor, back, c->back_terms * dsv4__panel_offset(c, c->matrices), 1);
    if (c->config.no_ape) c->ape = NULL;
    return cursor.size;
}

static dsv4_status dsv4__check_param(dsv4_const_matrix array, const dsv4_param_info *info, dsv4_error *error) {
    if (info->count > 0) return dsv4__check_const_matrix(&array, info->rows, info->columns, info->name, error);
    if (array.data == NULL) return DSV4_OK;
    return dsv4__fail(error, DSV4_ERROR_ARGUMENT, "%s is given, but the configuration has none", info->name);
}

/* Rounded weights and gradients need an open window's rows; of few of them (disjoint windows of two, overlapping
 * ones of one) kv and gate are fewer numbers than the three that are folded of each open window. */
static int dsv4__keeps_rows(const dsv4_compressor *c) {
    const int64_t waiting = c->series == 2 ? 3 * c->config.ratio - 2 : c->config.ratio - 1;
    return c->training != 0 || (c->config.rounding & (DSV4_ROUND_WEIGHT | DSV4_ROUND_PRODUCT)) != 0 ||
           2 * waiting <= 3 * c->series;
}

/* Checks everything that size and create are given and fills in all but the arrays. */
static dsv4_status dsv4__compressor_plan(const dsv4_config *config, const dsv4_params *params,
                                         const dsv4_options *options, dsv4_compressor *c, dsv4_error *error) {
    dsv4_param_info info[DSV4_PARAM_COUNT];
    memset(c, 0, sizeof *c);
    DSV4__TRY(dsv4_config_params(config, info, error));
    DSV4__TRY(dsv4__need(params, "params", error));
    const dsv4_const_matrix arrays[DSV4_PARAM_COUNT] = {params->wkv, params->wgate, params->ape, params->norm};
    for (int i = 0; i < DSV4_PARAM_COUNT; i++) DSV4__TRY(dsv4__check_param(arrays[i], &info[i], error));
    DSV4__TRY(dsv4__set_by_name(options != NULL ? options->isa : NULL, config->sums, &c->kernels, error));
    c->config = dsv4__resolve(config);
    c->series = c->config.overlap ? 2 : 1;
    c->matrices = c->config.no_gate ? 1 : 2;
    c->columns = c->series * c->config.head_dim;
    c->groups = dsv4__ceil_div(c->config.head_dim, DSV4__PANEL);
    const int rounded = (c->config.rounding & DSV4_ROUND_PARAMS) != 0; /* as if they had been given in bf16 */
    c->w_bf16[0] = rounded || params->wkv.dtype == DSV4_BF16;
    c->w_bf16[1] = rounded || params->wgate.dtype == DSV4_BF16;
    c->tiles = c->kernels->tile_product != NULL && c->config.sums == DSV4_SUMS_TILES && c->w_bf16[0] &&
               (c->config.no_gate || c->w_bf16[1]);
    const int64_t step = c->tiles ? DSV4__STEP : 2;
    c->span = c->tiles ? DSV4__SPAN : DSV4__KBLOCK;
    c->terms = dsv4__ceil_div(c->config.hidden_dim, step) * step;
    c->back_terms = dsv4__ceil_div(c->columns, step) * step;
    if (options != NULL && options->training)
        c->training = DSV4__BACK | (options->bf16_gradients ? DSV4__BF16_SUMS : 0);
    c->keeps_rows = dsv4__keeps_rows(c);
    c->fingerprint = dsv4__hash_number(dsv4__config_fingerprint(&c->config), (uint64_t)c->keeps_rows);
    return DSV4_OK;
}

DSV4_API dsv4_status dsv4_compressor_size(const dsv4_config *config, const dsv4_params *params,
                                          const dsv4_options *options, size_t *bytes, dsv4_error *error) {
    dsv4_compressor plan;
    DSV4__TRY(dsv4__compressor_plan(config, params, options, &plan, error));
    DSV4__TRY(dsv4__need(bytes, "bytes", error));
    const dsv4__size size = dsv4__compressor_lay(&plan, NULL);
    DSV4__TRY(dsv4__size_check(&size, "compressor", error));
    *bytes = (size_t)size.bytes;
    return DSV4_OK;
}

static void dsv4__pack_weights(const dsv4_compressor *c, const dsv4_const_matrix matrices[2]) {
    dsv4__panel_source source;
    memset(&source, 0, sizeof source);
    for (source.term = 0; source.term < c->terms; source.term += DSV4__KBLOCK)
        for (int64_t group = 0; group < c->groups; group++)
            for (int64_t panel = 0; panel < c->series * c->matrices; panel++) {
                source.matrix = matrices[panel % c->matrices];
                source.row = panel / c->matrices * c->config.head_dim + group * DSV4__PANEL;
                source.rows = dsv4__min(c->config.head_dim - group * DSV4__PANEL, DSV4__PANEL);
                source.padded = dsv4__min(c->terms - source.term, DSV4__KBLOCK);
                source.terms = dsv4__min(c->config.hidden_dim - source.term, DSV4__KBLOCK);
                dsv4__pack_panel(&source, c->w_bf16[panel % c->matrices], dsv4__panel(c, group, source.term, panel));
            }
}

/* The matrices once more, their rows as terms. */
static void dsv4__pack_back_weights(const dsv4_compressor *c, const dsv4_const_matrix matrices[2]) {
    dsv4__terms source;
    source.kernels = c->kernels;
    source.terms = c->columns;
    source.lead = 0;
    source.padded = c->back_terms;
    for (int64_t h = 0; h < c->config.hidden_dim; h += DSV4__PANEL)
        for (int64_t m = 0; m < c->matrices; m++) {
            source.first = dsv4__in(matrices[m], 0, h);
            source.dtype = matrices[m].dtype;
            source.stride = matrices[m].stride;
            source.columns = dsv4__min(c->config.hidden_dim - h, DSV4__PANEL);
            dsv4__pack_terms(&source, c->w_bf16[m] ? DSV4_BF16 : DSV4_F32, dsv4__back_panel(c, h / DSV4__PANEL, m, 0));
        }
}

DSV4_API dsv4_status dsv4_compressor_create(const dsv4_config *config, const dsv4_params *params,
                                            const dsv4_options *options, const dsv4_allocator *allocator,
                                            dsv4_compressor **compressor, dsv4_error *error) {
    void *block = NULL;
    size_t bytes = 0;
    DSV4__TRY(dsv4__need(compressor, "compressor", error));
    DSV4__TRY(dsv4_compressor_size(config, params, options, &bytes, error));
    DSV4__TRY(dsv4__allocate(allocator, bytes, "compressor", &block, error));
    dsv4_compressor *c = (dsv4_compressor *)block;
    (void)dsv4__compressor_plan(config, params, options, c, NULL);
    (void)dsv4__compressor_lay(c, block);
    c->allocator = *allocator;
    c->bytes = bytes;
    if (c->ape != NULL) dsv4__read_matrix(params->ape, c->ape, c->columns, c->config.ratio, c->columns);
    if (c->ape != NULL && (c->config.rounding & DSV4_ROUND_SCORE))
        c->kernels->round_array(c->ape, c->config.ratio * c->columns);
    dsv4__read_matrix(params->norm, c->norm, c->config.head_dim, 1, c->config.head_dim);
    if (c->config.rounding & DSV4_ROUND_PARAMS) c->kernels->round_array(c->norm, c->config.head_dim);
    dsv4__frequencies(&c->config, c->inv_freq);
    const dsv4_const_matrix matrices[2] = {dsv4__with_stride(params->wkv, c->config.hidden_dim),
                                           dsv4__with_stride(params->wgate, c->config.hidden_dim)};
    dsv4__pack_weights(c, matrices);
    if (c->training) dsv4__pack_back_weights(c, matrices);
    *compressor = c;
    return DSV4_OK;
}

DSV4_API void dsv4_compressor_destroy(dsv4_compressor *compressor) {
    if (compressor != NULL) (compressor->allocator.free)(compressor->allocator.context, compressor, compressor->bytes);
}

DSV4_API const dsv4_config *dsv4_compressor_config(const dsv4_compressor *compressor) {
    return compressor != NULL ? &compressor->config : NULL;
}

DSV4_API const char *dsv4_compressor_isa(const dsv4_compressor *compressor) {
    return compressor != NULL ? compressor->kernels->name : NULL;
}

/* ------------------------------------------------------------------------------------------------------------
 * 3m. Streams
 *
 * A state stands at `floor`, the furthest that a roll-back can go, with what has been folded of the windows open there:
 * the one that token `floor` falls in and, with overlap, the next. The rows of the tokens since, at most `depth`, wait
 * in one ring per series, at their token's index modulo the ring's capacity, so that a roll-back only has to move
 * `tokens` back. They hold scores, ape included, where compressors have gates: what folds them need not know the
 * compressor.
 *
 * A state that keeps rows has no folds, but rings that reach back to the first row of the first open window: gates as
 * projected, for the backward pass.
 * ------------------------------------------------------------------------------------------------------------ */

struct dsv4_state {
    dsv4_allocator allocator;
    size_t bytes;
    uint64_t fingerprint;
    int64_t ratio, row; /* row: numbers of one token in one ring: kv, then gate, head_dim each */
    int64_t head_dim, series, depth;
    int64_t origin;  /* position of the sequence's first token */
    int64_t tokens;  /* seen since */
    int64_t floor;   /* the least number of tokens that a roll-back can leave */
    int marked;      /* met among the segments of the call that is being checked */
    int64_t windows; /* open windows that are folded; 0: rows are kept */
    float pad_gate;
    float *folds; /* [windows, 3, head_dim]: top, den, num, of the tokens before floor */
    int64_t capacity[2];
    float *rings[2];
};

/* The series that is pooled one window later than the last one. */
static int64_t dsv4__lag(const dsv4_state *state, int64_t series) { return series + 1 < state->series ? 1 : 0; }

/* The pad of window 0 as pooling takes it. */
static float dsv4__pad_gate(const dsv4_config *config) {
    const float pad = config->pad_gate;
    return config->rounding & DSV4_ROUND_SCORE ? dsv4_bf16_to_f32(dsv4_bf16_from_f32(pad)) : pad;
}

static void dsv4__state_plan(const dsv4_compressor *c, int64_t depth, int keeps_rows, dsv4_state *state) {
    memset(state, 0, sizeof *state);
    state->fingerprint = c->fingerprint;
    state->ratio = c->config.ratio;
    state->head_dim = c->config.head_dim;
    state->series = c->series;
    state->row = c->matrices * c->config.head_dim;
    state->depth = depth;
    state->pad_gate = dsv4__pad_gate(&c->config);
    if (c->series == 1 && state->ratio == 1) return; /* every window closes with its token: nothing waits */
    state->windows = keeps_rows ? 0 : c->series;
    for (int64_t s = 0; s < c->series; s++)
        state->capacity[s] = depth + (keeps_rows ? state->ratio - 1 + dsv4__lag(state, s) * state->ratio : 0);
}

/* Lays a planned state out in a block, or, without one, adds up what that takes. */
static dsv4__size dsv4__state_lay(dsv4_state *state, void *block) {
    dsv4__cursor cursor = dsv4__cursor_at(block);
    (void)dsv4__lay(&cursor, 1, 1, sizeof *state);
    state->folds = dsv4__lay_floats(&cursor, 3 * state->windows, state->head_dim);
    for (int64_t s = 0; s < state->series; s++)
        state->rings[s] = dsv4__lay_floats(&cursor, state->capacity[s], state->row);
    return cursor.size;
}

DSV4_API dsv4_status dsv4_state_size(const dsv4_compressor *compressor, int64_t depth, size_t *bytes,
                                     dsv4_error *error) {
    dsv4_state plan;
    DSV4__TRY(dsv4__need(compressor, "compressor", error));
    DSV4__TRY(dsv4__need(bytes, "bytes", error));
    if (depth < 0 || depth > INT64_MAX / 4)
        return dsv4__fail(error, DSV4_ERROR_ARGUMENT, "depth is %lld, not in 0 ... 2^61 - 1", (long long)depth);
    dsv4__state_plan(compressor, depth, compressor->keeps_rows, &plan);
    const dsv4__size size = dsv4__state_lay(&plan, NULL);
    DSV4__TRY(dsv4__size_check(&size, "state", error));
    *bytes = (size_t)size.bytes;
    return DSV4_OK;
}

/* A state in memory of the size that it takes. */
static dsv4_state *dsv4__state_place(const dsv4_compressor *c, int64_t depth, int keeps_rows, void *block) {
    dsv4_state *state = (dsv4_state *)block;
    dsv4__state_plan(c, depth, keeps_rows, state);
    state->bytes = (size_t)dsv4__state_lay(state, block).bytes;
    return state;
}

DSV4_API dsv4_status dsv4_state_create(const dsv4_compressor *compressor, int64_t depth,
                                       const dsv4_allocator *allocator, dsv4_state **state, dsv4_error *error) {
    void *block = NULL;
    size_t bytes = 0;
    DSV4__TRY(dsv4_state_size(compressor, depth, &bytes, error));
    DSV4__TRY(dsv4__need(state, "state", error));
    DSV4__TRY(dsv4__allocate(allocator, bytes, "state", &block, error));
    *state = dsv4__state_place(compressor, depth, compressor->keeps_rows, block);
    (*state)->allocator = *allocator;
    return DSV4_OK;
}

DSV4_API void dsv4_state_destroy(dsv4_state *state) {
    if (state != NULL) (state->allocator.free)(state->allocator.context, state, state->bytes);
}

DSV4_API dsv4_status dsv4_state_reset(dsv4_state *state, dsv4_error *error) {
    DSV4__TRY(dsv4__need(state, "state", error));
    state->origin = state->tokens = state->floor = 0;
    return DSV4_OK;
}

DSV4_API int64_t dsv4_state_tokens(const dsv4_state *state) { return state != NULL ? state->tokens : 0; }
DSV4_API int64_t dsv4_state_position(const dsv4_state *state) {
    return state != NULL ? state->origin + state->tokens : 0;
}
DSV4_API int64_t dsv4_state_reach(const dsv4_state *state) { return state != NULL ? state->tokens - state->floor : 0; }

static float *dsv4__state_row(const dsv4_state *state, int64_t series, int64_t t) {
    return state->rings[series] + t % state->capacity[series] * state->row;
}

/* The first token whose row of a series is kept where roll-backs go no further than `floor`. */
static int64_t dsv4__state_first(const dsv4_state *state, int64_t series, int64_t floor) {
    if (state->ratio == 1 && state->series == 1) return INT64_MAX;
    if (state->windows > 0) return floor;
    return dsv4__max((floor / state->ratio - dsv4__lag(state, series)) * state->ratio, 0);
}

/* ---- What is folded, and copying and rolling back ----------------------------------------------------------- */

/* What is folded of a window: 0 is the one that token t falls in, 1 the next; t tokens have been. NULL: nothing is. */
static float *dsv4__fold_at(const dsv4_state *state, int64_t window, int64_t t) {
    const int begun = t % state->ratio != 0 || (window == 0 && state->series == 2 && t > 0);
    return window < state->windows && begun ? state->folds + window * 3 * state->head_dim : NULL;
}

/* One token as it is folded: of each series kv and gate, and ape where the gate is without it. */
typedef struct dsv4__token_rows {
    const float *kv[2], *gate[2], *ape[2];
    int64_t channel, channels; /* which channels these are */
    uint32_t rounding;         /* of scores */
    int fresh; /* its own window has not been folded from its start, and closes before it is asked for */
} dsv4__token_rows;

/* Folds token t, the first that is not, into the windows that pool it: each series its own. */
static void dsv4__fold_token(const dsv4_state *state, const dsv4__kernels *kernels, int64_t t,
                             const dsv4__token_rows *rows) {
    const int64_t dim = state->head_dim;
    dsv4__window window;
    dsv4__pool_job job;
    DSV4_ASSERT(state->folds != NULL && state->windows == state->series);
    memset(&job, 0, sizeof job);
    job.window = &window;
    job.channels = rows->channels;
    job.rounding = rows->rounding;
    job.pad_gate = state->pad_gate;
    job.fold_stride = dim;
    for (int64_t s = 0; s < state->series; s++) {
        const int64_t ahead = dsv4__lag(state, s);
        const float *from = dsv4__fold_at(state, ahead, t);
        if (ahead == 0 && rows->fresh) continue;
        memset(window.runs, 0, 2 * sizeof window.runs[0]);
        window.run_count = 0;
        if (ahead == 0 && state->series == 2 && t == 0) window.runs[window.run_count++].count = state->ratio;
        dsv4__run *run = &window.runs[window.run_count++];
        run->kv = rows->kv[s];
        run->gate = rows->gate[s];
        run->ape = rows->ape[s];
        run->count = 1;
        job.from = from == NULL ? NULL : from + rows->channel;
        job.to = state->folds + ahead * 3 * dim + rows->channel;
        kernels->pool(&job);
    }
    for (int i = 0; i < 3 && state->series == 2 && (t + 1) % state->ratio == 0; i++) /* the next is the open one */
        memcpy(state->folds + i * dim + rows->channel, state->folds + (3 + i) * dim + rows->channel,
               (size_t)rows->channels * sizeof(float));
}

static void dsv4__state_advance(dsv4_state *state, int64_t position, int64_t count) {
    if (state->tokens == 0) state->origin = position;
    state->tokens += count;
    state->floor = dsv4__max(state->floor, state->tokens - state->depth);
}

/* Takes over what `source` has folded, and folds its rows up to `floor`. */
static void dsv4__copy_folds(dsv4_state *state, const dsv4_state *source, int64_t floor) {
    const int64_t dim = state->head_dim;
    for (int64_t w = 0; w < state->windows; w++)
        if (dsv4__fold_at(source, w, source->floor) != NULL)
            memcpy(state->folds + w * 3 * dim, source->folds + w * 3 * dim, (size_t)(3 * dim) * sizeof(float));
    for (int64_t t = source->floor; t < floor && state->windows > 0; t++) {
        dsv4__token_rows rows;
        memset(&rows, 0, sizeof rows);
        rows.channels = dim;
        for (int64_t s = 0; s < state->series; s++) {
            rows.kv[s] = dsv4__state_row(source, s, t);
            rows.gate[s] = rows.kv[s] + dim;
        }
        dsv4__fold_token(state, dsv4__plain_set(), t, &rows);
    }
}

DSV4_API dsv4_status dsv4_state_copy(dsv4_state *destination, const dsv4_state *source, dsv4_error *error) {
    DSV4__TRY(dsv4__need(destination, "destination", error));
    DSV4__TRY(dsv4__need(source, "source", error));
    if (destination->fingerprint != source->fingerprint)
        return dsv4__fail(error, DSV4_ERROR_STATE,
                          "the states are of configurations %016llx and %016llx (training counts)",
                          (unsigned long long)destination->fingerprint, (unsigned long long)source->fingerprint);
    if (destination == source) return DSV4_OK;
    const int64_t floor = dsv4__max(source->floor, source->tokens - destination->depth);
    dsv4__copy_folds(destination, source, floor);
    for (int64_t s = 0; s < source->series; s++)
        for (int64_t t = dsv4__state_first(source, s, floor); t < source->tokens; t++)
            memcpy(dsv4__state_row(destination, s, t), dsv4__state_row(source, s, t),
                   (size_t)source->row * sizeof(float));
    destination->origin = source->origin;
    destination->tokens = source->tokens;
    destination->floor = floor;
    return DSV4_OK;
}

DSV4_API dsv4_status dsv4_state_roll_back(dsv4_state *state, int64_t tokens, dsv4_error *error) {
    DSV4__TRY(dsv4__need(state, "state", error));
    if (tokens < 0 || tokens > dsv4_state_reach(state))
        return dsv4__fail(error, DSV4_ERROR_DEPTH, "cannot take %lld tokens back: the state reaches %lld",
                          (long long)tokens, (long long)dsv4_state_reach(state));
    state->tokens -= tokens;
    if (state->tokens == 0) state->origin = 0;
    return DSV4_OK;
}

/* ---- Saved form --------------------------------------------------------------------------------------------- */

/* Saved form: 8 numbers of 8 bytes, the folds, the live rows series by series, a checksum; all little-endian.
 *     magic and version, fingerprint, row, origin, tokens, floor, number of rows, number of folds */
enum { DSV4__SAVE_HEADER = 64, DSV4__SAVE_CHECK = 8 };
static const uint64_t dsv4__save_magic = 0x0231764353345644u; /* "DV4SCv1", then version 2 */

static void dsv4__write64(unsigned char *bytes, uint64_t number) {
    for (int i = 0; i < 8; i++) bytes[i] = (unsigned char)(number >> (8 * i));
}

static uint64_t dsv4__read64(const unsigned char *bytes) {
    uint64_t number = 0;
    for (int i = 0; i < 8; i++) number |= (uint64_t)bytes[i] << (8 * i);
    return number;
}

static unsigned char *dsv4__write_floats(unsigned char *to, const float *from, int64_t count) {
    for (int64_t i = 0; i < count; i++, to += 4) {
        const uint32_t bits = dsv4__bits(from[i]);
        for (int b = 0; b < 4; b++) to[b] = (unsigned char)(bits >> (8 * b));
    }
    return to;
}

static void dsv4__read_floats(float *to, const unsigned char *from, int64_t count) {
    for (int64_t i = 0; i < count; i++, from += 4)
        to[i] = dsv4__from_bits((uint32_t)from[0] | (uint32_t)from[1] << 8 | (uint32_t)from[2] << 16 |
                                (uint32_t)from[3] << 24);
}

/* Rows of all series, and windows folded, that a state at (tokens, floor) has. */
static int64_t dsv4__live_rows(const dsv4_state *state, int64_t tokens, int64_t floor) {
    int64_t rows = 0;
    for (int64_t s = 0; s < state->series; s++) rows += dsv4__max(tokens - dsv4__state_first(state, s, floor), 0);
    return rows;
}

static int64_t dsv4__live_folds(const dsv4_state *state, int64_t floor) {
    return (dsv4__fold_at(state, 0, floor) != NULL) + (dsv4__fold_at(state, 1, floor) != NULL);
}

/* Bytes of so many folds. */
static size_t dsv4__fold_bytes(const dsv4_state *state, int64_t folds) {
    return (size_t)(folds * 3 * state->head_dim) * sizeof(float);
}

DSV4_API size_t dsv4_state_save_size(const dsv4_state *state) {
    if (state == NULL) return 0;
    const int64_t rows = dsv4__live_rows(state, state->tokens, state->floor);
    return DSV4__SAVE_HEADER + dsv4__fold_bytes(state, dsv4__live_folds(state, state->floor)) +
           (size_t)(rows * state->row) * sizeof(float) + DSV4__SAVE_CHECK;
}

DSV4_API dsv4_status dsv4_state_save(const dsv4_state *state, void *bytes, size_t size, size_t *written,
                                     dsv4_error *error) {
    DSV4__TRY(dsv4__need(state, "state", error));
    DSV4__TRY(dsv4__need(bytes, "bytes", error));
    const size_t needed = dsv4_state_save_size(state);
    if (size < needed)
        return dsv4__fail(error, DSV4_ERROR_BUFFER, "the saved state takes %llu bytes, the buffer has %llu",
                          (unsigned long long)needed, (unsigned long long)size);
    const uint64_t header[8] = {dsv4__save_magic,
                                state->fingerprint,
                                (uint64_t)state->row,
                                (uint64_t)state->origin,
                                (uint64_t)state->tokens,
                                (uint64_t)state->floor,
                                (uint64_t)dsv4__live_rows(state, state->tokens, state->floor),
                                (uint64_t)dsv4__live_folds(state, state->floor)};
    unsigned char *to = (unsigned char *)bytes;
    for (int i = 0; i < 8; i++, to += 8) dsv4__write64(to, header[i]);
    for (int64_t w = 0; w < 2; w++) {
        const float *fold = dsv4__fold_at(state, w, state->floor);
        if (fold != NULL) to = dsv4__write_floats(to, fold, 3 * state->head_dim);
    }
    for (int64_t s = 0; s < state->series; s++)
        for (int64_t t = dsv4__state_first(state, s, state->floor); t < state->tokens; t++)
            to = dsv4__write_floats(to, dsv4__state_row(state, s, t), state->row);
    dsv4__write64(to, dsv4__hash(dsv4__hash_start, bytes, needed - DSV4__SAVE_CHECK));
    if (written != NULL) *written = needed;
    return DSV4_OK;
}

/* Whether a state at (tokens, floor) has the rows and folds that the header names, and `room` bytes of them. */
static int dsv4__saved_lengths_fit(const dsv4_state *state, int64_t tokens, int64_t floor, const unsigned char *header,
                                   uint64_t room) {
    const uint64_t rows = (uint64_t)dsv4__live_rows(state, tokens, floor), row = (uint64_t)state->row * sizeof(float);
    const uint64_t folds = (uint64_t)dsv4__live_folds(state, floor);
    return dsv4__read64(header + 48) == rows && dsv4__read64(header + 56) == folds && rows <= room / row &&
           rows * row + dsv4__fold_bytes(state, (int64_t)folds) == room;
}

/* Whether the bytes are what save wrote for a state like this one. */
static dsv4_status dsv4__check_saved(const dsv4_state *state, const unsigned char *bytes, size_t size,
                                     dsv4_error *error) {
    if (size < DSV4__SAVE_HEADER + DSV4__SAVE_CHECK)
        return dsv4__fail(error, DSV4_ERROR_DATA, "%llu bytes are too few for a saved state", (unsigned long long)size);
    if (dsv4__read64(bytes) != dsv4__save_magic)
        return dsv4__fail(error, DSV4_ERROR_DATA, "no saved state of version 2: it begins with 0x%016llx",
                          (unsigned long long)dsv4__read64(bytes));
    if (dsv4__read64(bytes + size - DSV4__SAVE_CHECK) != dsv4__hash(dsv4__hash_start, bytes, size - DSV4__SAVE_CHECK))
        return dsv4__fail(error, DSV4_ERROR_DATA, "the checksum over %llu bytes does not fit",
                          (unsigned long long)size);
    if (dsv4__read64(bytes + 8) != state->fingerprint)
        return dsv4__fail(error, DSV4_ERROR_DATA, "saved under configuration %016llx, not %016llx",
                          (unsigned long long)dsv4__read64(bytes + 8), (unsigned long long)state->fingerprint);
    const uint64_t limit = (uint64_t)1 << 62, origin = dsv4__read64(bytes + 24), tokens = dsv4__read64(bytes + 32);
    const uint64_t floor = dsv4__read64(bytes + 40);
    const uint64_t room = size - DSV4__SAVE_HEADER - DSV4__SAVE_CHECK;
    if (origin >= limit || tokens >= limit - origin || floor > tokens ||
        dsv4__read64(bytes + 16) != (uint64_t)state->row ||
        !dsv4__saved_lengths_fit(state, (int64_t)tokens, (int64_t)floor, bytes, room))
        return dsv4__fail(error, DSV4_ERROR_DATA, "the numbers of the saved state do not fit its %llu bytes",
                          (unsigned long long)size);
    return DSV4_OK;
}

/* Folds saved tokens that the state does not reach back to, a panel of channels at a time: `bytes` holds `saved`
 * rows of each series, from token `from` on. */
static void dsv4__restore_folded(const dsv4_state *state, const unsigned char *bytes, int64_t saved, int64_t from) {
    float kv[2][DSV4__PANEL], gate[2][DSV4__PANEL];
    dsv4__token_rows rows;
    memset(&rows, 0, sizeof rows);
    for (int64_t t = from; t < state->floor && state->windows > 0; t++)
        for (rows.channel = 0; rows.channel < state->head_dim; rows.channel += DSV4__PANEL) {
            rows.channels = dsv4__min(state->head_dim - rows.channel, DSV4__PANEL);
            for (int64_t s = 0; s < state->series; s++) {
                const unsigned char *row = bytes + ((s * saved + t - from) * state->row + rows.channel) * 4;
                dsv4__read_floats(kv[s], row, rows.channels);
                dsv4__read_floats(gate[s], row + state->head_dim * 4, rows.channels);
                rows.kv[s] = kv[s];
                rows.gate[s] = gate[s];
            }
            dsv4__fold_token(state, dsv4__plain_set(), t, &rows);
        }
}

DSV4_API dsv4_status dsv4_state_restore(dsv4_state *state, const void *bytes, size_t size, dsv4_error *error) {
    const unsigned char *from = (const unsigned char *)bytes;
    DSV4__TRY(dsv4__need(state, "state", error));
    DSV4__TRY(dsv4__need(bytes, "bytes", error));
    DSV4__TRY(dsv4__check_saved(state, from, size, error));
    const int64_t saved_floor = (int64_t)dsv4__read64(from + 40);
    state->origin = (int64_t)dsv4__read64(from + 24);
    state->tokens = (int64_t)dsv4__read64(from + 32);
    state->floor = dsv4__max(saved_floor, state->tokens - state->depth);
    from += DSV4__SAVE_HEADER;
    for (int64_t w = 0; w < 2; w++) {
        float *fold = dsv4__fold_at(state, w, saved_floor);
        if (fold == NULL) continue;
        dsv4__read_floats(fold, from, 3 * state->head_dim);
        from += dsv4__fold_bytes(state, 1);
    }
    dsv4__restore_folded(state, from, state->tokens - saved_floor, saved_floor);
    for (int64_t s = 0; s < state->series; s++)
        for (int64_t t = dsv4__state_first(state, s, saved_floor); t < state->tokens; t++, from += state->row * 4)
            if (t >= dsv4__state_first(state, s, state->floor))
                dsv4__read_floats(dsv4__state_row(state, s, t), from, state->row);
    return DSV4_OK;
}

/* ------------------------------------------------------------------------------------------------------------
 * 3n. What calls work on: workspace, blocks and chunks of tokens
 *
 * Tokens are worked on in blocks of up to 224 rows (256 on tiles), whose projections onto all groups stay in the second
 * cache. Some blocks of terms are outermost: their part of x is packed and, while it too is in that cache, all weights
 * for these terms pass by once, group by group. Then each task pools the closing windows over some groups of channels,
 * and then finishes some entries.
 *
 * The way back takes chunks of up to 256 tokens, made of parts: the tokens of one segment in one block of 256 of its
 * sequence, so that a part's sums are whole blocks of the numeric contract. What a part needs is a function of the
 * windows that touch it, so parts do not depend on each other:
 *     recompute  kv and gate of these windows' rows (unless they are given), and pool them                  (3o, 3p)
 *     entries    from dout back through RoPE and RMSNorm to dpooled                                             (3q)
 *     windows    from dpooled back through softmax to dkv and dgate of the part's rows                          (3p)
 *     products   dx = dkv wkv + dgate wgate;  dwkv += dkv^T x;  dwgate += dgate^T x                             (3o)
 * The weights' gradients are too large for any cache: what they need of some chunks is laid by in slabs, so that each
 * of their numbers is fetched once for all of these.
 * ------------------------------------------------------------------------------------------------------------ */

enum {
    DSV4__BLOCK_ROWS = 224,          /* at most, in one block */
    DSV4__BLOCK_BYTES = 1664 * 1024, /* of a block's projections and packed x, for each thread */
    DSV4__TILED_ROWS = 256,          /* the same on tiles, which need more rows for a weight's way from memory */
    DSV4__TILED_BYTES = 3328 * 1024,
    DSV4__CHUNK_PARTS = 64, /* at most, in one chunk of the backward pass */
    DSV4__SLABS = 8,        /* chunks whose tokens are added to the weights' gradients in one go */
    DSV4__DX_PANELS = 8     /* panels of dx that a thread works on at a time */
};

/* Some tokens of one segment, side by side. What follows from this is computed: see "Stretches" below. Windows have
 * their number in the sequence; those of a piece, which close in it, are [t / ratio, end / ratio). */
typedef struct dsv4__stretch {
    const dsv4_segment *segment;
    int64_t emitted;  /* entries of the segments before, which would take long to count again */
    int64_t t, count; /* tokens [t, t + count) of the sequence */
    int64_t row;      /* of the first: in the block or chunk, or in arrays of kv and gate that are there already */
    int64_t slot;     /* slot + w is the row of window w among the pooled ones of the block or chunk */
} dsv4__stretch;

/* What a chunk has of a segment. Its windows, those that pool any of these tokens and close in the segment, are
 * [t / ratio of tokens, end / ratio of context). */
typedef struct dsv4__part {
    dsv4__stretch tokens;  /* whose gradients are computed; further rows of the chunk fill pairs or steps up */
    dsv4__stretch context; /* whose kv and gate the windows pool, besides those that the segment's state keeps */
} dsv4__part;

/* A part that is still to be added to the weights' gradients: a block of their sums. */
typedef struct dsv4__token_block {
    int64_t slab, row, count; /* tokens from `row` of the slab on, padded */
} dsv4__token_block;

/* What dsv4_backward works in. */
typedef struct dsv4__training {
    int64_t context_rows, windows;     /* rows and windows that a chunk can need */
    int64_t d_stride;                  /* of dkv and dgate: their rows do not fall on the same cache sets */
    dsv4__part *parts;                 /* [DSV4__CHUNK_PARTS] */
    dsv4__token_block *blocks;         /* [DSV4__SLABS * DSV4__CHUNK_PARTS] */
    float *kv, *gate;                  /* [context_rows, columns] recomputed */
    float *normed, *dscaled, *dpooled; /* [windows, head_dim] */
    float *dkv, *dgate;                /* [DSV4__KBLOCK, d_stride] */
    float *d_rows;                     /* dkv and dgate as left operands: [blocks of columns][rows][256] */
    float *d_columns; /* [DSV4__SLABS, matrices, columns, DSV4__KBLOCK]; for the weights' gradients; and a tile more */
    float *dape, *dape_block;   /* [ratio, columns] */
    float *dnorm, *dnorm_block; /* [head_dim] */
    float *dx_sums;             /* [threads, DSV4__KBLOCK, DSV4__DX_PANELS, 32] */
    float *x_panels;            /* [DSV4__SLABS, panels of hidden columns, DSV4__KBLOCK, 32] */
    float *weight_sums;         /* [matrices, columns, hidden_dim made a multiple of 32] for bf16 gradients */
} dsv4__training;

struct dsv4_workspace {
    dsv4_allocator allocator;
    size_t bytes;
    const dsv4_compressor *compressor;
    dsv4_parallel parallel;
    int threads;
    int64_t slots;      /* entries that a block can hold */
    int64_t block_rows; /* rows that a block can hold */
    int64_t x_bytes;
    int64_t scratch_numbers; /* of one thread */
    dsv4_state *carry;       /* rows that the next block goes on with, of a segment whose state does not hold them */
    dsv4__stretch *pieces;   /* [block_rows] */
    float *pooled;           /* [slots, head_dim] */
    unsigned char *x;        /* packed x for some blocks of terms */
    float *sums;             /* [groups, block_rows, panels, 32] projections */
    float *scratch;          /* [threads, scratch_numbers] */
    dsv4__training training;
};

/* A thread's scratch. */
typedef struct dsv4__scratch {
    float *wide;  /* [DSV4__KBLOCK, 32], or the scores of a window, [rows, 32] */
    float *spare; /* [DSV4__KBLOCK, 32] on the way back, for sums that are not added up where they lie */
    float *row, *swapped, *cos_row, *sin_row; /* share the space of both */
} dsv4__scratch;

/* What the backward pass needs of a workspace, behind what has been laid out so far. */
static void dsv4__training_lay(const dsv4_compressor *c, int threads, dsv4__training *t, dsv4__cursor *cursor) {
    const int64_t ratio = c->config.ratio, dim = c->config.head_dim, terms = DSV4__KBLOCK;
    const int64_t width = dsv4__ceil_div(c->config.hidden_dim, DSV4__PANEL) * DSV4__PANEL;
    const int64_t sums = c->training & DSV4__BF16_SUMS ? c->matrices * c->columns : 0;
    const int64_t spare_rows = c->tiles ? DSV4__TILE : 0;
    t->context_rows = 2 * DSV4__KBLOCK + 4 * ratio;
    t->windows = 2 * DSV4__KBLOCK / ratio + 64;
    t->d_stride = c->columns + 16;
    t->kv = dsv4__lay_floats(cursor, t->context_rows, c->columns);
    t->gate = dsv4__lay_floats(cursor, t->context_rows, c->columns);
    t->normed = dsv4__lay_floats(cursor, t->windows, dim);
    t->dscaled = dsv4__lay_floats(cursor, t->windows, dim);
    t->dpooled = dsv4__lay_floats(cursor, t->windows, dim);
    t->dkv = dsv4__lay_floats(cursor, terms, t->d_stride);
    t->dgate = dsv4__lay_floats(cursor, terms, t->d_stride);
    t->d_rows = dsv4__lay_floats(cursor, c->matrices * dsv4__packed_terms(c->columns), terms);
    t->d_columns = dsv4__lay_floats(cursor, DSV4__SLABS * c->matrices * c->columns + spare_rows, terms);
    t->dape = dsv4__lay_floats(cursor, ratio, c->columns);
    t->dape_block = dsv4__lay_floats(cursor, ratio, c->columns);
    t->dnorm = dsv4__lay_floats(cursor, 1, dim);
    t->dnorm_block = dsv4__lay_floats(cursor, 1, dim);
    t->dx_sums = dsv4__lay_floats(cursor, (int64_t)threads * DSV4__DX_PANELS * terms, DSV4__PANEL);
    t->x_panels = dsv4__lay_floats(cursor, DSV4__SLABS * terms, width);
    t->weight_sums = dsv4__lay_floats(cursor, sums, width);
    t->parts = (dsv4__part *)dsv4__lay(cursor, DSV4__CHUNK_PARTS, 1, sizeof(dsv4__part));
    t->blocks = (dsv4__token_block *)dsv4__lay(cursor, DSV4__SLABS * DSV4__CHUNK_PARTS, 1, sizeof(dsv4__token_block));
}

/* Rows that a product is given at most, and that it likes a multiple of. */
static int64_t dsv4__rows_most(const dsv4_compressor *c) { return c->tiles ? DSV4__TILED_ROWS : DSV4__BLOCK_ROWS; }

static int64_t dsv4__rows_unit(const dsv4_compressor *c) { return c->tiles ? 2 * DSV4__TILE : c->kernels->tile_rows; }

/* What follows from compressor and threads. */
static void dsv4__workspace_plan(dsv4_workspace *ws) {
    const dsv4_compressor *c = ws->compressor;
    const int64_t sums = c->groups * c->series * c->matrices * DSV4__PANEL, unit = dsv4__rows_unit(c);
    const int64_t kept = sums + dsv4__ceil_div(c->config.head_dim, c->config.ratio); /* projections and pooled rows */
    const int64_t x_bytes =
        c->tiles ? dsv4__packed_terms(dsv4__min(c->terms, DSV4__SPAN)) * 2 : DSV4__KBLOCK * (int64_t)sizeof(float);
    const int64_t row_bytes = kept * (int64_t)sizeof(float) + x_bytes;
    const int64_t rows = (c->tiles ? DSV4__TILED_BYTES : DSV4__BLOCK_BYTES) / row_bytes;
    ws->block_rows = dsv4__max(dsv4__min(rows, dsv4__rows_most(c)) / unit, 1) * unit;
    ws->slots = ws->block_rows / c->config.ratio + 32;
    ws->x_bytes = ws->block_rows * dsv4__max(x_bytes, DSV4__KBLOCK * (int64_t)sizeof(float));
    ws->scratch_numbers = (c->training ? 2 : 1) * DSV4__KBLOCK * DSV4__PANEL;
    ws->scratch_numbers = dsv4__max(ws->scratch_numbers, c->config.head_dim + 3 * c->config.rope_dim);
    ws->scratch_numbers = dsv4__max(ws->scratch_numbers, 3 * c->config.head_dim); /* a window that is being folded */
    ws->scratch_numbers = dsv4__max(ws->scratch_numbers, c->series * c->config.ratio * DSV4__PANEL);
    ws->scratch_numbers = dsv4__ceil_div(ws->scratch_numbers, 16) * 16;
}

/* Lays a planned workspace out in a block, or, without one, adds up what that takes. */
static dsv4__size dsv4__workspace_lay(dsv4_workspace *ws, void *block) {
    const dsv4_compressor *c = ws->compressor;
    dsv4__cursor cursor = dsv4__cursor_at(block);
    dsv4_state carry;
    dsv4__state_plan(c, 0, 1, &carry);
    const dsv4__size carried = dsv4__state_lay(&carry, NULL);
    (void)dsv4__lay(&cursor, 1, 1, sizeof *ws);
    cursor.size.overflow |= carried.overflow;
    ws->carry = (dsv4_state *)dsv4__lay(&cursor, 1, (int64_t)carried.bytes, 1);
    ws->pieces = (dsv4__stretch *)dsv4__lay(&cursor, ws->block_rows, 1, sizeof(dsv4__stretch));
    ws->pooled = dsv4__lay_floats(&cursor, ws->slots, c->config.head_dim);
    ws->x = (unsigned char *)dsv4__lay(&cursor, 1, ws->x_bytes, 1);
    ws->sums = dsv4__lay_floats(&cursor, ws->block_rows, c->groups * c->series * c->matrices * DSV4__PANEL);
    ws->scratch = dsv4__lay_floats(&cursor, ws->threads, ws->scratch_numbers);
    if (c->training) dsv4__training_lay(c, ws->threads, &ws->training, &cursor);
    return cursor.size;
}

/* A workspace without memory, and the size of that. */
static dsv4_status dsv4__workspace_begin(const dsv4_compressor *c, int threads, dsv4_workspace *ws, dsv4_error *error) {
    memset(ws, 0, sizeof *ws);
    DSV4__TRY(dsv4__need(c, "compressor", error));
    ws->compressor = c;
    ws->threads = threads < 1 ? 1 : threads;
    dsv4__workspace_plan(ws);
    const dsv4__size size = dsv4__workspace_lay(ws, NULL);
    ws->bytes = (size_t)size.bytes;
    return dsv4__size_check(&size, "workspace", error);
}

DSV4_API dsv4_status dsv4_workspace_size(const dsv4_compressor *compressor, int threads, size_t *bytes,
                                         dsv4_error *error) {
    dsv4_workspace plan;
    DSV4__TRY(dsv4__workspace_begin(compressor, threads, &plan, error));
    DSV4__TRY(dsv4__need(bytes, "bytes", error));
    *bytes = plan.bytes;
    return DSV4_OK;
}

DSV4_API dsv4_status dsv4_workspace_create(const dsv4_compressor *compressor, const dsv4_parallel *parallel,
                                           const dsv4_allocator *allocator, dsv4_workspace **workspace,
                                           dsv4_error *error) {
    dsv4_workspace plan;
    void *block = NULL;
    const int threads = parallel != NULL && parallel->run != NULL ? parallel->threads : 1;
    DSV4__TRY(dsv4__need(workspace, "workspace", error));
    DSV4__TRY(dsv4__workspace_begin(compressor, threads, &plan, error));
    DSV4__TRY(dsv4__allocate(allocator, plan.bytes, "workspace", &block, error));
    dsv4_workspace *ws = (dsv4_workspace *)block;
    *ws = plan;
    (void)dsv4__workspace_lay(ws, block);
    ws->allocator = *allocator;
    if (parallel != NULL) ws->parallel = *parallel;
    (void)dsv4__state_place(compressor, 0, 1, ws->carry);
    *workspace = ws;
    return DSV4_OK;
}

DSV4_API void dsv4_workspace_destroy(dsv4_workspace *workspace) {
    if (workspace != NULL) (workspace->allocator.free)(workspace->allocator.context, workspace, workspace->bytes);
}

static dsv4__scratch dsv4__scratch_of(const dsv4_workspace *ws, int64_t thread) {
    const dsv4_config *config = &ws->compressor->config;
    dsv4__scratch scratch;
    scratch.wide = ws->scratch + thread * ws->scratch_numbers;
    scratch.spare = scratch.wide + DSV4__KBLOCK * DSV4__PANEL;
    scratch.row = scratch.wide;
    scratch.swapped = scratch.row + config->head_dim;
    scratch.cos_row = scratch.swapped + config->rope_dim;
    scratch.sin_row = scratch.cos_row + config->rope_dim;
    return scratch;
}

/* ---- What a call works on ----------------------------------------------------------------------------------- */

/* A batch with its defaults in place, and the block that is being worked on. */
typedef struct dsv4__call {
    const dsv4_compressor *c;
    dsv4_workspace *ws;
    dsv4_batch batch;
    dsv4_segment whole;            /* all tokens, where the batch came without segments */
    int x_bf16;                    /* x came as bf16 */
    int dot;                       /* and is packed so, for the bf16 dot product */
    int tiles;                     /* on tiles */
    int64_t rows, pieces, entries; /* of the current block */
    int64_t term, term_end;        /* terms of x that are packed */
    int64_t segment, done;         /* where the next block or chunk begins: segment, tokens of it already taken */
    int64_t emitted;               /* entries of the segments before that one */
} dsv4__call;

/* Runs one task for each thread; on the calling thread where `work` (numbers touched) is not worth waking others. */
static void dsv4__for_threads(const dsv4__call *call, dsv4_task *task, void *argument, int64_t work) {
    const dsv4_workspace *ws = call->ws;
    if (ws->threads > 1 && work >= 65536)
        ws->parallel.run(ws->parallel.context, ws->threads, task, argument);
    else
        for (int64_t thread = 0; thread < ws->threads; thread++) task(argument, thread);
}

/* ---- Stretches ---------------------------------------------------------------------------------------------- */

/* Tokens of the sequence before the segment: states advance when a call is done. */
static int64_t dsv4__seen(const dsv4__stretch *stretch) { return dsv4_state_tokens(stretch->segment->state); }

static int64_t dsv4__end_of(const dsv4__stretch *stretch) { return stretch->t + stretch->count; }

static int64_t dsv4__row_of(const dsv4__stretch *stretch, int64_t t) { return stretch->row + t - stretch->t; }

/* The row of its first token in x. */
static int64_t dsv4__token_of(const dsv4__stretch *stretch) {
    return stretch->segment->token + stretch->t - dsv4__seen(stretch);
}

/* The position of window w's entry. */
static int64_t dsv4__position_of(const dsv4__call *call, const dsv4__stretch *stretch, int64_t w) {
    return stretch->segment->position + w * call->c->config.ratio - dsv4__seen(stretch);
}

/* The row of window w's entry: in out, scales, dout and the stages; negative: it is not stored. */
static int64_t dsv4__entry_row(const dsv4__call *call, const dsv4__stretch *stretch, int64_t w) {
    const int64_t *rows = call->batch.entry_rows, entry = w - dsv4__seen(stretch) / call->c->config.ratio;
    return rows != NULL ? rows[stretch->emitted + entry] : stretch->segment->entry + entry;
}

/* Tokens of a segment that are worked on. */
static int64_t dsv4__tokens_used(const dsv4__call *call, const dsv4_segment *segment) {
    const int dropped = segment->state == NULL && call->batch.drop_tail;
    return segment->count - (dropped ? segment->count % call->c->config.ratio : 0);
}

/* Whether its segment goes on behind it. */
static int dsv4__continues(const dsv4__call *call, const dsv4__stretch *stretch) {
    return dsv4__end_of(stretch) < dsv4__seen(stretch) + dsv4__tokens_used(call, stretch->segment);
}

/* Finds which tokens are left of the current segment, or of the next that has any; 0 when none are. */
static int dsv4__rest(dsv4__call *call, dsv4__stretch *rest) {
    for (; call->segment < call->batch.segment_count; call->segment++, call->done = 0) {
        const dsv4_segment *segment = &call->batch.segments[call->segment];
        rest->segment = segment;
        rest->emitted = call->emitted;
        rest->t = dsv4__seen(rest) + call->done;
        rest->count = dsv4__tokens_used(call, segment) - call->done;
        if (rest->count > 0) return 1;
        call->emitted += dsv4_entry_count(&call->c->config, segment->state, segment->count);
    }
    return 0;
}

/* Lays out the next block, in which no more windows close than there are slots; 0 when nothing is left. */
static int dsv4__next_block(dsv4__call *call) {
    const int64_t ratio = call->c->config.ratio, most = call->ws->block_rows, slots = call->ws->slots;
    dsv4__stretch piece;
    call->rows = call->pieces = call->entries = 0;
    while (call->rows < most && call->entries < slots && dsv4__rest(call, &piece)) {
        piece.count = dsv4__min(piece.count, most - call->rows);
        piece.count = dsv4__min(piece.count, (slots - call->entries + 1) * ratio - 1 - piece.t % ratio);
        piece.row = call->batch.kv != NULL ? dsv4__token_of(&piece) : call->rows;
        piece.slot = call->entries - piece.t / ratio;
        call->ws->pieces[call->pieces++] = piece;
        call->rows += piece.count;
        call->entries = piece.slot + dsv4__end_of(&piece) / ratio;
        call->done += piece.count;
        DSV4_ASSERT(call->entries <= slots);
    }
    return call->rows > 0;
}

/* ---- What a backward call works on -------------------------------------------------------------------------- */

/* What a backward call adds to a call. The arrays are parts of the workspace. */
typedef struct dsv4__back {
    dsv4__call call; /* where the next chunk begins; its pieces describe blocks of rows to recompute */
    dsv4_gradients g;
    const dsv4__training *train;
    int recompute;
    int round;           /* dkv and dgate are rounded to bf16: x and weights are */
    int steps;           /* and sums over tokens go in steps of 32 of their sequence */
    int started;         /* some part has been added to the weights' gradients */
    int64_t parts, rows; /* of the chunk; rows padded to pairs */
    int64_t context, windows;
    int64_t recomputed;    /* rows of the context, by the blocks before */
    int64_t slabs, blocks; /* laid by for the weights' gradients */
} dsv4__back;

/* Whether anything but `previous` is wanted. */
static int dsv4__wants_tokens(const dsv4_gradients *g) {
    return g->dx.data != NULL || g->dwkv.data != NULL || g->dwgate.data != NULL || g->dape.data != NULL ||
           g->dnorm.data != NULL;
}

static int dsv4__wants_weights(const dsv4__back *back) {
    return back->g.dwkv.data != NULL || back->g.dwgate.data != NULL;
}

/* Rows of 0 that a part has in the chunk before its tokens', and all of its rows: whole pairs, or whole steps. */
static int64_t dsv4__lead(const dsv4__back *back, const dsv4__stretch *tokens) {
    return back->steps ? tokens->t % DSV4__STEP : 0;
}

static int64_t dsv4__padded_rows(const dsv4__back *back, const dsv4__stretch *tokens) {
    if (!back->steps) return dsv4__padded(tokens->count);
    return dsv4__ceil_div(dsv4__lead(back, tokens) + tokens->count, DSV4__STEP) * DSV4__STEP;
}

/* The part that the rest of a segment begins with. */
static dsv4__part dsv4__part_of(const dsv4__back *back, const dsv4__stretch *rest) {
    const int64_t ratio = back->call.c->config.ratio, lag = back->call.c->series - 1;
    dsv4__part part;
    part.tokens = *rest;
    part.tokens.count = dsv4__min(rest->count, DSV4__KBLOCK - rest->t % DSV4__KBLOCK);
    part.tokens.row = back->rows + dsv4__lead(back, rest);
    part.tokens.slot = back->windows - rest->t / ratio;
    part.context = part.tokens;
    const int64_t first = rest->t / ratio, last = (dsv4__end_of(&part.tokens) - 1) / ratio + lag; /* that pool any */
    const int64_t closed = dsv4__min(last + 1, dsv4__end_of(rest) / ratio);
    part.context.count = 0; /* unless a window closes */
    if (closed > first) {
        part.context.t = dsv4__max(dsv4__seen(rest), (first - lag) * ratio);
        part.context.count = closed * ratio - part.context.t;
    }
    part.context.row = back->recompute ? back->context : dsv4__token_of(&part.context);
    return part;
}

/* Lays out the next chunk; 0 when nothing is left. */
static int dsv4__next_chunk(dsv4__back *back) {
    const dsv4__training *train = back->train;
    dsv4__stretch rest;
    back->parts = back->rows = back->context = back->windows = 0;
    while (back->parts < DSV4__CHUNK_PARTS && dsv4__rest(&back->call, &rest)) {
        const dsv4__part part = dsv4__part_of(back, &rest);
        const int64_t rows = back->rows + dsv4__padded_rows(back, &part.tokens);
        const int64_t context = back->context + part.context.count;
        const int64_t windows = part.tokens.slot + dsv4__end_of(&part.context) / back->call.c->config.ratio;
        if (back->parts > 0 && (rows > DSV4__KBLOCK || context > train->context_rows || windows > train->windows))
            break;
        train->parts[back->parts++] = part;
        back->rows = rows;
        back->context = context;
        back->windows = windows;
        /* Without sums over tokens a segment's first part is all that `previous` needs. */
        back->call.done += dsv4__wants_tokens(&back->g) ? part.tokens.count : rest.count;
    }
    return back->parts > 0;
}

/* ------------------------------------------------------------------------------------------------------------
 * 3o. Projections: kv and gate of tokens; their way back to dx and the weights
 * ------------------------------------------------------------------------------------------------------------ */

/* Rows as they are packed: tiles, unless one is enough, are whole. */
static int64_t dsv4__packed_rows(const dsv4__call *call) {
    if (!call->tiles || call->rows <= DSV4__TILE) return call->rows;
    return dsv4__ceil_div(call->rows, DSV4__TILE) * DSV4__TILE;
}

/* Task: packs the current terms of this thread's share of the block's rows, asking for what lies two rows on. */
static void dsv4__pack_task(void *argument, int64_t thread) {
    const dsv4__call *call = (const dsv4__call *)argument;
    const int64_t first = dsv4__share(call->rows, thread, call->ws->threads),
                  end = dsv4__share(call->rows, thread + 1, call->ws->threads);
    const dsv4_batch *batch = &call->batch;
    dsv4__row_packer packer;
    packer.kernels = call->c->kernels;
    packer.from = batch->x.dtype;
    packer.to = call->dot ? DSV4_BF16 : DSV4_F32;
    packer.terms = dsv4__min(call->term_end, call->c->config.hidden_dim) - call->term;
    packer.padded = call->term_end - call->term;
    packer.rows = dsv4__packed_rows(call);
    packer.packed = call->ws->x;
    const uintptr_t number = dsv4_dtype_size(batch->x.dtype), stride = number * (uintptr_t)batch->x.stride;
    const uintptr_t bytes = number * (uintptr_t)packer.terms;
    for (int64_t i = 0; i < call->pieces; i++) {
        const dsv4__stretch *piece = &call->ws->pieces[i];
        const int64_t token = dsv4__token_of(piece), last = dsv4__min(end, piece->row + piece->count);
        for (int64_t row = dsv4__max(first, piece->row); row < last; row++) {
            const void *from = dsv4__in(batch->x, token + row - piece->row, call->term);
            dsv4__fetch((uintptr_t)from + 2 * stride, bytes);
            dsv4__pack_row(&packer, from, row);
        }
    }
}

static float *dsv4__group_sums(const dsv4__call *call, int64_t group) {
    const dsv4_compressor *c = call->c;
    return call->ws->sums + group * call->ws->block_rows * c->series * c->matrices * DSV4__PANEL;
}

/* The order of a product, by whether both operands came as bf16. */
static dsv4__order dsv4__order_of(const dsv4_compressor *c, int bf16) {
    return !bf16 ? DSV4__FUSED_TERMS : c->config.sums == DSV4_SUMS_TILES ? DSV4__STEPS : DSV4__PAIRS;
}

/* Terms of one product: a block of them, or what tiles take. */
static int64_t dsv4__product_terms(const dsv4__call *call) {
    return call->tiles ? call->c->span : (int64_t)DSV4__KBLOCK;
}

/* Adds one product's terms to the projections onto one group: sums [rows, panels, 32]. `after` is what the last panel's
 * weights are followed by. */
static void dsv4__project_group(const dsv4__call *call, int64_t group, int64_t term, const void *after, float *wide) {
    const dsv4_compressor *c = call->c;
    const int64_t panels = c->series * c->matrices;
    dsv4__product_job job;
    memset(&job, 0, sizeof job);
    job.dot = call->dot;
    job.rows = call->rows;
    const int64_t packed = dsv4__packed_rows(call);
    job.x = dsv4__at(call->ws->x, call->dot ? DSV4_BF16 : DSV4_F32, (term - call->term) * packed);
    job.x_block = packed * DSV4__KBLOCK * 2;
    job.pairs = dsv4__min(c->terms - term, dsv4__product_terms(call)) / 2;
    job.sum_stride = panels * DSV4__PANEL;
    job.first = term == 0;
    job.wide = wide;
    for (int64_t p = 0; p < panels; p++) {
        job.w = dsv4__panel(c, group, term, p);
        job.w_bf16 = c->w_bf16[p % c->matrices];
        job.order = dsv4__order_of(c, job.w_bf16 && call->x_bf16);
        job.sum = dsv4__group_sums(call, group) + p * DSV4__PANEL;
        job.next_bytes = job.pairs * 2 * DSV4__PANEL * (job.w_bf16 ? 2 : 4);
        job.next = p + 1 < panels ? (uintptr_t)dsv4__panel(c, group, term, p + 1) : (uintptr_t)after;
        dsv4__multiply(call->c->kernels, call->tiles, &job);
    }
}

/* Task: projects the packed terms of the block's rows onto this thread's share of the groups. */
static void dsv4__project_task(void *argument, int64_t thread) {
    const dsv4__call *call = (const dsv4__call *)argument;
    const dsv4_compressor *c = call->c;
    const int64_t threads = call->ws->threads;
    const int64_t first = dsv4__share(c->groups, thread, threads), end = dsv4__share(c->groups, thread + 1, threads);
    const int64_t step = dsv4__product_terms(call);
    const dsv4__scratch scratch = dsv4__scratch_of(call->ws, thread);
    dsv4__begin_tiles(call->c->kernels, call->tiles, call->rows);
    for (int64_t group = first; group < end; group++)
        for (int64_t term = call->term; term < call->term_end; term += step) {
            const int64_t next_group = group + 1 < end ? group + 1 : first;
            const int64_t next_term = group + 1 < end ? call->term : call->term_end < c->terms ? call->term_end : 0;
            const void *after = term + step < call->term_end ? dsv4__panel(c, group, term + step, 0)
                                                             : dsv4__panel(c, next_group, next_term, 0);
            dsv4__project_group(call, group, term, after, scratch.wide);
        }
    dsv4__end_tiles(call->c->kernels, call->tiles);
    if (call->term_end < c->terms || !(c->config.rounding & DSV4_ROUND_PROJECTION)) return;
    for (int64_t group = first; group < end; group++)
        c->kernels->round_array(dsv4__group_sums(call, group), call->rows * c->series * c->matrices * DSV4__PANEL);
}

/* kv and gate of the block's rows, for all groups. */
static void dsv4__project_block(dsv4__call *call) {
    const dsv4_compressor *c = call->c;
    const int64_t terms = dsv4__packed_terms(dsv4__min(c->terms, dsv4__product_terms(call)));
    const int64_t bytes = dsv4__packed_rows(call) * terms * (call->dot ? 2 : 4);
    const int64_t step = call->ws->x_bytes / bytes * terms;
    DSV4_ASSERT(step > 0);
    for (call->term = 0; call->term < c->terms; call->term = call->term_end) {
        call->term_end = dsv4__min(call->term + step, c->terms);
        const int64_t numbers = call->rows * (call->term_end - call->term);
        dsv4__for_threads(call, dsv4__pack_task, call, numbers);
        dsv4__for_threads(call, dsv4__project_task, call, numbers * c->columns);
    }
}

/* ---- Back: dkv and dgate as left operands, by rows for dx and by columns for the weights -------------------- */

/* dkv or dgate of the chunk, packed by rows. */
static float *dsv4__d_rows(const dsv4__back *back, int64_t matrix) {
    return back->train->d_rows + matrix * dsv4__packed_terms(back->call.c->columns) * DSV4__KBLOCK;
}

/* dkv or dgate of a slab, by columns. */
static float *dsv4__d_columns(const dsv4__back *back, int64_t slab, int64_t matrix) {
    const dsv4_compressor *c = back->call.c;
    return back->train->d_columns + (slab * c->matrices + matrix) * c->columns * DSV4__KBLOCK;
}

/* x of a slab from row `row` on, over panel i of the hidden columns. */
static void *dsv4__x_panel(const dsv4__back *back, int64_t slab, int64_t i, int64_t row) {
    const int64_t panels = dsv4__ceil_div(back->call.c->config.hidden_dim, DSV4__PANEL);
    return dsv4__at_mutable(back->train->x_panels, back->call.dot ? DSV4_BF16 : DSV4_F32,
                            ((slab * panels + i) * DSV4__KBLOCK + row) * DSV4__PANEL);
}

/* Lays rows [row, end) of packed dkv or dgate out by columns. */
static void dsv4__transpose(const dsv4__back *back, int64_t matrix, int64_t row, int64_t end) {
    const dsv4_dtype dtype = back->call.dot ? DSV4_BF16 : DSV4_F32;
    for (int64_t first = 0; first < back->call.c->columns; first += DSV4__KBLOCK) {
        const int64_t columns = dsv4__min(back->call.c->columns - first, DSV4__KBLOCK);
        const void *from = dsv4__at(dsv4__d_rows(back, matrix), dtype, first * back->rows);
        void *to = dsv4__at_mutable(dsv4__d_columns(back, back->slabs, matrix), dtype, first * DSV4__KBLOCK);
        if (dtype == DSV4_BF16)
            dsv4__transpose_bf16((const dsv4_bf16 *)from, (dsv4_bf16 *)to, row, end, columns);
        else
            dsv4__transpose_f32((const float *)from, (float *)to, row, end, columns);
    }
}

/* Task: lays this thread's rows of dkv and dgate out for the products: by rows for dx, by columns for the weights. */
static void dsv4__pack_back_task(void *argument, int64_t thread) {
    const dsv4__back *back = (const dsv4__back *)argument;
    const dsv4_compressor *c = back->call.c;
    const int64_t threads = back->call.ws->threads;
    const int64_t row = dsv4__share(back->rows, thread, threads), end = dsv4__share(back->rows, thread + 1, threads);
    for (int64_t m = 0; m < c->matrices; m++) {
        const float *from = m == 0 ? back->train->dkv : back->train->dgate;
        dsv4__row_packer packer;
        packer.kernels = c->kernels;
        packer.from = DSV4_F32;
        packer.to = back->call.dot ? DSV4_BF16 : DSV4_F32;
        packer.terms = c->columns;
        packer.padded = c->back_terms;
        packer.rows = back->rows;
        packer.packed = dsv4__d_rows(back, m);
        for (int64_t r = row; r < end; r++) dsv4__pack_row(&packer, from + r * back->train->d_stride, r);
        if (dsv4__wants_weights(back)) dsv4__transpose(back, m, row, end);
    }
}

/* ---- Back: dx ----------------------------------------------------------------------------------------------- */

/* Writes the chunk's dx over panels [first, end) from the sums of it: rows of DSV4__DX_PANELS panels. */
static void dsv4__put_dx(const dsv4__back *back, const float *sums, int64_t first, int64_t end) {
    const dsv4_matrix dx = back->g.dx;
    const int64_t h = first * DSV4__PANEL;
    const int64_t n = dsv4__min(end * DSV4__PANEL, back->call.c->config.hidden_dim) - h;
    for (int64_t p = 0; p < back->parts; p++) {
        const dsv4__stretch *tokens = &back->train->parts[p].tokens;
        const int64_t token = dsv4__token_of(tokens);
        for (int64_t i = 0; i < tokens->count; i++) {
            const float *from = sums + (tokens->row + i) * DSV4__DX_PANELS * DSV4__PANEL;
            void *to = dsv4__in_mutable(dx, token + i, h);
            if (dx.dtype == DSV4_BF16)
                back->call.c->kernels->narrow((dsv4_bf16 *)to, from, n);
            else
                memcpy(to, from, (size_t)n * sizeof(float));
        }
    }
}

/* dx over a few panels [first, end) of hidden columns: dkv wkv, then dgate wgate. Their sums, and the block of dkv
 * or dgate that is multiplied, stay in the second cache. */
static void dsv4__dx_panels(const dsv4__back *back, float *sums, int64_t first, int64_t end, dsv4__product_job *job) {
    const dsv4_compressor *c = back->call.c;
    job->rows = back->rows;
    job->sum_stride = (int64_t)DSV4__DX_PANELS * DSV4__PANEL;
    for (int64_t m = 0; m < c->matrices; m++)
        for (int64_t k = 0; k < c->columns; k += DSV4__KBLOCK)
            for (int64_t i = first; i < end; i++) {
                job->x = dsv4__at(dsv4__d_rows(back, m), back->call.dot ? DSV4_BF16 : DSV4_F32, k * back->rows);
                job->w = dsv4__back_panel(c, i, m, k);
                job->w_bf16 = c->w_bf16[m];
                job->pairs = dsv4__min(c->back_terms - k, DSV4__KBLOCK) / 2;
                job->first = m == 0 && k == 0;
                job->sum = sums + (i - first) * DSV4__PANEL;
                job->next_bytes = job->pairs * 2 * DSV4__PANEL * (job->w_bf16 ? 2 : 4);
                job->next = (uintptr_t)(i + 1 < end ? dsv4__back_panel(c, i + 1, m, k)
                                                    : dsv4__back_panel(c, first, m, k) + job->next_bytes);
                dsv4__multiply(back->call.c->kernels, back->call.tiles, job);
            }
    dsv4__put_dx(back, sums, first, end);
}

/* ---- Back: the weights' gradients --------------------------------------------------------------------------- */

/* The hidden columns of panel i of every part's x, as right operands: terms are tokens. */
static void dsv4__pack_x_panel(const dsv4__back *back, int64_t i) {
    const dsv4_batch *batch = &back->call.batch;
    const dsv4_dtype dtype = back->call.dot ? DSV4_BF16 : DSV4_F32;
    for (int64_t p = 0; p < back->parts; p++) {
        const dsv4__stretch *tokens = &back->train->parts[p].tokens;
        dsv4__terms source;
        source.kernels = back->call.c->kernels;
        source.first = dsv4__in(batch->x, dsv4__token_of(tokens), i * DSV4__PANEL);
        source.dtype = batch->x.dtype;
        source.stride = batch->x.stride;
        source.terms = tokens->count;
        source.columns = dsv4__min(back->call.c->config.hidden_dim - i * DSV4__PANEL, DSV4__PANEL);
        source.lead = dsv4__lead(back, tokens);
        source.padded = dsv4__padded_rows(back, tokens);
        dsv4__pack_terms(&source, dtype, dsv4__x_panel(back, back->slabs, i, tokens->row - source.lead));
    }
}

/* Where the sums of a weight's gradient live: the caller's fp32 array, or, for bf16, the workspace. */
static float *dsv4__weight_sums(const dsv4__back *back, int64_t matrix, int64_t *stride) {
    const dsv4_matrix *target = matrix == 0 ? &back->g.dwkv : &back->g.dwgate;
    const dsv4_compressor *c = back->call.c;
    *stride =
        target->dtype == DSV4_F32 ? target->stride : dsv4__ceil_div(c->config.hidden_dim, DSV4__PANEL) * DSV4__PANEL;
    return target->dtype == DSV4_F32 ? (float *)target->data : back->train->weight_sums + matrix * c->columns * *stride;
}

/* Rows [row, row + rows) of one weight's gradient over panel i of the hidden columns: adds the blocks laid by. Sums
 * that many blocks are added to are copied: their rows fall on few sets of the caches. */
static void dsv4__dw_tile(const dsv4__back *back, int64_t matrix, int64_t row, int64_t i, dsv4__product_job *job,
                          float *spare) {
    const dsv4_dtype dtype = back->call.dot ? DSV4_BF16 : DSV4_F32;
    int64_t stride;
    float *sums = dsv4__weight_sums(back, matrix, &stride) + row * stride + i * DSV4__PANEL;
    const int64_t n = dsv4__min(back->call.c->config.hidden_dim - i * DSV4__PANEL, DSV4__PANEL);
    const int apart = n < DSV4__PANEL || back->blocks > 2 || back->call.tiles;
    job->sum = apart ? spare : sums;
    job->sum_stride = apart ? (int64_t)DSV4__PANEL : stride;
    if (apart && (back->started || back->g.accumulate)) dsv4__copy_rows(spare, DSV4__PANEL, sums, stride, job->rows, n);
    for (int64_t b = 0; b < back->blocks; b++) {
        const dsv4__token_block *block = &back->train->blocks[b];
        job->x = dsv4__at(dsv4__d_columns(back, block->slab, matrix), dtype, row * DSV4__KBLOCK + block->row);
        job->w = dsv4__x_panel(back, block->slab, i, block->row);
        job->pairs = block->count / 2;
        job->first = !back->started && b == 0 && !back->g.accumulate;
        job->sums_in_memory = !apart && b == 0;
        const dsv4__token_block *after = &back->train->blocks[(b + 1) % back->blocks];
        job->next = (uintptr_t)dsv4__x_panel(back, after->slab, i, after->row);
        if (b + 1 == back->blocks) job->next += DSV4__KBLOCK * DSV4__PANEL * dsv4_dtype_size(dtype);
        job->next_bytes = after->count * DSV4__PANEL * (job->w_bf16 ? 2 : 4);
        dsv4__multiply(back->call.c->kernels, back->call.tiles, job);
    }
    if (apart) dsv4__copy_rows(sums, stride, spare, DSV4__PANEL, job->rows, n);
}

/* A weight's gradient over the panels [first, end): some rows at a time, which stay in the second cache while the
 * panels of x pass by. */
static void dsv4__dw_panels(const dsv4__back *back, int64_t matrix, int64_t first, int64_t end, dsv4__product_job *job,
                            float *spare) {
    const int64_t columns = back->call.c->columns, unit = dsv4__rows_unit(back->call.c);
    job->w_bf16 = back->call.dot;
    for (int64_t row = 0; row < columns; row += job->rows) {
        job->rows = dsv4__min(columns - row, dsv4__rows_most(back->call.c) / unit * unit);
        DSV4_ASSERT(job->rows <= DSV4__KBLOCK); /* what spare holds */
        for (int64_t i = first; i < end; i++) dsv4__dw_tile(back, matrix, row, i, job, spare);
    }
}

/* A thread's share of the hidden columns, as panels, and what it multiplies in. */
typedef struct dsv4__hidden_share {
    int64_t first, end;
    dsv4__scratch scratch;
    dsv4__product_job job;
} dsv4__hidden_share;

static dsv4__hidden_share dsv4__hidden_share_of(const dsv4__back *back, int64_t thread) {
    const int64_t panels = dsv4__ceil_div(back->call.c->config.hidden_dim, DSV4__PANEL);
    const int64_t threads = back->call.ws->threads;
    dsv4__hidden_share share;
    memset(&share, 0, sizeof share);
    share.first = dsv4__share(panels, thread, threads);
    share.end = dsv4__share(panels, thread + 1, threads);
    share.scratch = dsv4__scratch_of(back->call.ws, thread);
    share.job.dot = back->call.dot;
    share.job.order = dsv4__order_of(back->call.c, back->round);
    share.job.wide = share.scratch.wide;
    return share;
}

/* Task: over this thread's hidden columns, dx, and x laid by for the weights' gradients. */
static void dsv4__tokens_task(void *argument, int64_t thread) {
    const dsv4__back *back = (const dsv4__back *)argument;
    dsv4__hidden_share share = dsv4__hidden_share_of(back, thread);
    float *sums = back->train->dx_sums + thread * DSV4__DX_PANELS * DSV4__KBLOCK * DSV4__PANEL;
    dsv4__begin_tiles(back->call.c->kernels, back->call.tiles, back->rows);
    for (int64_t i = share.first; i < share.end && back->g.dx.data != NULL; i += DSV4__DX_PANELS)
        dsv4__dx_panels(back, sums, i, dsv4__min(i + DSV4__DX_PANELS, share.end), &share.job);
    dsv4__end_tiles(back->call.c->kernels, back->call.tiles);
    for (int64_t i = share.first; i < share.end && dsv4__wants_weights(back); i++) dsv4__pack_x_panel(back, i);
}

/* Task: adds what is laid by to the weights' gradients, over this thread's hidden columns. */
static void dsv4__weights_task(void *argument, int64_t thread) {
    const dsv4__back *back = (const dsv4__back *)argument;
    dsv4__hidden_share share = dsv4__hidden_share_of(back, thread);
    dsv4__begin_tiles(back->call.c->kernels, back->call.tiles, DSV4__TILE);
    for (int64_t m = 0; m < back->call.c->matrices; m++)
        if ((m == 0 ? back->g.dwkv.data : back->g.dwgate.data) != NULL)
            dsv4__dw_panels(back, m, share.first, share.end, &share.job, share.scratch.spare);
    dsv4__end_tiles(back->call.c->kernels, back->call.tiles);
}

static void dsv4__add_weights(dsv4__back *back) {
    const int64_t work = back->slabs * DSV4__KBLOCK * back->call.c->columns * back->call.c->config.hidden_dim;
    if (back->slabs == 0) return;
    dsv4__for_threads(&back->call, dsv4__weights_task, back, work);
    back->started = 1;
    back->slabs = back->blocks = 0;
}

/* The chunk's tokens are laid by as one slab. */
static void dsv4__queue_for_weights(dsv4__back *back) {
    for (int64_t p = 0; p < back->parts; p++) {
        const dsv4__stretch *tokens = &back->train->parts[p].tokens;
        dsv4__token_block *block = &back->train->blocks[back->blocks++];
        block->slab = back->slabs;
        block->row = tokens->row - dsv4__lead(back, tokens);
        block->count = dsv4__padded_rows(back, tokens);
    }
    back->slabs++;
    if (back->slabs == DSV4__SLABS) dsv4__add_weights(back);
}

/* Where sums, `stride` apart in the workspace or in `target` itself, start: at what `target` holds, or at 0. */
static void dsv4__begin_sums(const dsv4__back *back, dsv4_matrix target, float *sums, int64_t stride, int64_t rows,
                             int64_t columns) {
    if (target.data == NULL) return;
    if (back->g.accumulate)
        dsv4__read_matrix(dsv4__as_const(target), sums, stride, rows, columns);
    else
        for (int64_t r = 0; r < rows; r++) memset(sums + r * stride, 0, (size_t)columns * sizeof *sums);
}

static void dsv4__end_sums(dsv4_matrix target, const float *sums, int64_t stride, int64_t rows, int64_t columns) {
    if (target.data != NULL) dsv4__write_matrix(target, sums, stride, rows, columns);
}

/* Where the weights' sums start: bf16 ones go on in the workspace, fp32 ones where they are. Sums that start anew do so
 * with their first block, or here where there was none. */
static void dsv4__begin_weights(const dsv4__back *back, int64_t matrix) {
    const dsv4_matrix target = matrix == 0 ? back->g.dwkv : back->g.dwgate;
    int64_t stride;
    if (target.data == NULL || (target.dtype == DSV4_F32 && back->g.accumulate)) return;
    float *sums = dsv4__weight_sums(back, matrix, &stride);
    dsv4__begin_sums(back, target, sums, stride, back->call.c->columns, back->call.c->config.hidden_dim);
}

static void dsv4__end_weights(const dsv4__back *back, int64_t matrix) {
    const dsv4_matrix target = matrix == 0 ? back->g.dwkv : back->g.dwgate;
    int64_t stride;
    if (target.data == NULL || target.dtype == DSV4_F32) return;
    const float *sums = dsv4__weight_sums(back, matrix, &stride);
    dsv4__write_matrix(target, sums, stride, back->call.c->columns, back->call.c->config.hidden_dim);
}

/* ------------------------------------------------------------------------------------------------------------
 * 3p. Windows: from the rows of kv and gate to pooled rows; their way back to dkv, dgate and dape
 * ------------------------------------------------------------------------------------------------------------ */

/* Where a task finds the projections of the current block: channel `channel` of kv and gate of (row, series). */
typedef struct dsv4__source {
    const float *kv, *gate;    /* of row 0, series 0, the task's first channel; gate NULL with no_gate */
    int64_t stride;            /* numbers from row to row */
    int64_t series;            /* numbers from series to series */
    int64_t channel, channels; /* the task's channels: first and how many */
} dsv4__source;

static dsv4__source dsv4__sums_source(const dsv4__call *call, int64_t group) {
    const dsv4_compressor *c = call->c;
    dsv4__source source;
    source.kv = dsv4__group_sums(call, group);
    source.gate = c->config.no_gate ? NULL : source.kv + DSV4__PANEL;
    source.series = c->matrices * DSV4__PANEL;
    source.stride = c->series * source.series;
    source.channel = group * DSV4__PANEL;
    source.channels = dsv4__min(c->config.head_dim - source.channel, DSV4__PANEL);
    return source;
}

/* Projections that lie in arrays: given ones, or recomputed; the channels of a thread's share of the groups. */
static dsv4__source dsv4__thread_source(const dsv4__call *call, int64_t thread) {
    const dsv4_compressor *c = call->c;
    const int64_t threads = call->ws->threads, end = dsv4__share(c->groups, thread + 1, threads) * DSV4__PANEL;
    dsv4__source source;
    source.channel = dsv4__min(dsv4__share(c->groups, thread, threads) * DSV4__PANEL, c->config.head_dim);
    source.channels = dsv4__min(end, c->config.head_dim) - source.channel;
    source.kv = call->batch.kv + source.channel;
    source.gate = c->config.no_gate ? NULL : call->batch.gate + source.channel;
    source.series = c->config.head_dim;
    source.stride = c->columns;
    return source;
}

/* Whether a state is there and folds what it has seen: its rows, where it has any, then hold scores. */
static int dsv4__folds(const dsv4_state *state) { return state != NULL && state->windows > 0; }

/* The first token whose projections the source has: given ones of the whole segment, or those of the stretch. */
static int64_t dsv4__at_hand(const dsv4__call *call, const dsv4__stretch *stretch) {
    return call->batch.kv != NULL ? dsv4__seen(stretch) : stretch->t;
}

/* Whether rows of a piece that continues have to wait in the workspace: those of a segment without a state, unless they
 * were given, and, where weights are asked for, of one whose state folds. */
static int dsv4__carries(const dsv4__call *call, const dsv4__stretch *stretch) {
    if (stretch->segment->state == NULL) return call->batch.kv == NULL;
    return dsv4__folds(stretch->segment->state) && call->batch.stages.weights != NULL;
}

/* Where the rows before those at hand wait. A part's windows need none before its context but those of the state. */
static const dsv4_state *dsv4__holder(const dsv4__call *call, const dsv4__stretch *stretch) {
    const int carried = stretch->t > dsv4__seen(stretch) && dsv4__carries(call, stretch);
    return carried ? call->ws->carry : stretch->segment->state;
}

/* Row 0's ape of a series, for rows from token t on. */
static const float *dsv4__ape_from(const dsv4__call *call, const dsv4__source *source, int64_t series, int64_t t) {
    const dsv4_compressor *c = call->c;
    if (c->ape == NULL) return NULL;
    return c->ape + t % c->config.ratio * c->columns + series * c->config.head_dim + source->channel;
}

/* Rows from token t on, how many is left open: at hand, or of the ring of `holder`. */
static dsv4__run dsv4__run_from(const dsv4__call *call, const dsv4__stretch *stretch, const dsv4_state *holder,
                                const dsv4__source *source, int64_t series, int64_t t) {
    dsv4__run run;
    memset(&run, 0, sizeof run);
    run.ape = dsv4__ape_from(call, source, series, t);
    run.ape_stride = call->c->columns;
    if (t >= dsv4__at_hand(call, stretch)) {
        const int64_t offset = dsv4__row_of(stretch, t) * source->stride + series * source->series;
        run.kv = source->kv + offset;
        run.gate = source->gate == NULL ? NULL : source->gate + offset;
        run.stride = source->stride;
    } else {
        run.kv = dsv4__state_row(holder, series, t) + source->channel;
        run.gate = run.kv + call->c->config.head_dim; /* windows without a gate have one row, which does not wait */
        run.stride = holder->row;
        if (dsv4__folds(stretch->segment->state)) run.ape = NULL;
    }
    return run;
}

/* Rows [done, done + count) of a run. */
static dsv4__run dsv4__run_part(const dsv4__run *whole, int64_t done, int64_t count) {
    dsv4__run run = *whole;
    run.count = count;
    if (run.kv != NULL) run.kv += done * run.stride;
    if (run.gate != NULL) run.gate += done * run.stride;
    if (run.ape != NULL) run.ape += done * run.ape_stride;
    return run;
}

/* Appends the rows [t, end) of a series: from the ring, twice where it wraps, then those at hand. */
static void dsv4__add_series(const dsv4__call *call, const dsv4__stretch *stretch, const dsv4__source *source,
                             int64_t series, int64_t t, int64_t end, dsv4__window *window) {
    const dsv4_state *holder = dsv4__holder(call, stretch);
    const int64_t at_hand = dsv4__at_hand(call, stretch);
    while (t < end) {
        dsv4__run run = dsv4__run_from(call, stretch, holder, source, series, t);
        run.count = end - t;
        if (t < at_hand) {
            const int64_t capacity = holder->capacity[series];
            run.count = dsv4__min(dsv4__min(end, at_hand) - t, capacity - t % capacity);
        }
        DSV4_ASSERT(window->run_count < DSV4__MAX_RUNS);
        window->runs[window->run_count++] = run;
        t += run.count;
    }
}

/* The rows that window w of a stretch pools, in order, but for those of tokens before `from`. */
static dsv4__window dsv4__window_rows(const dsv4__call *call, const dsv4__stretch *stretch, const dsv4__source *source,
                                      int64_t w, int64_t from) {
    const int64_t ratio = call->c->config.ratio, lag = call->c->series - 1;
    dsv4__window window;
    window.run_count = 0;
    if (lag == 1 && w > 0)
        dsv4__add_series(call, stretch, source, 0, dsv4__max((w - 1) * ratio, from), w * ratio, &window);
    if (lag == 1 && w == 0 && from == 0) {
        memset(&window.runs[0], 0, sizeof window.runs[0]);
        window.runs[window.run_count++].count = ratio;
    }
    dsv4__add_series(call, stretch, source, lag, dsv4__max(w * ratio, from), (w + 1) * ratio, &window);
    return window;
}

/* What all pooling of a thread has in common. */
static dsv4__pool_job dsv4__pool_settings(const dsv4__call *call, const dsv4__source *source, int64_t thread) {
    const dsv4_config *config = &call->c->config;
    dsv4__pool_job job;
    memset(&job, 0, sizeof job);
    job.channels = source->channels;
    job.rounding = config->rounding;
    job.pad_gate = dsv4__pad_gate(config);
    job.scores = dsv4__scratch_of(call->ws, thread).wide;
    job.fold_stride = config->head_dim;
    return job;
}

/* ---- Pooling ------------------------------------------------------------------------------------------------ */

/* Pools a window of many rows that come from memory: some rows of all channels at a time, so that these are read as
 * they lie and the next ones are fetched meanwhile. `fold` holds what is folded in between: never nothing, so rows that
 * weigh nothing are left out here. */
static void dsv4__pool_by_rows(const dsv4__call *call, dsv4__pool_job job, float *fold) {
    const dsv4__window whole = *job.window;
    dsv4__window part;
    part.run_count = 1;
    job.window = &part;
    for (int i = 0; i < whole.run_count; i++) {
        const dsv4__run *run = &whole.runs[i];
        if (run->kv == NULL && job.pad_gate < -FLT_MAX) continue;
        for (int64_t done = 0; done < run->count; done += part.runs[0].count) {
            part.runs[0] = dsv4__run_part(run, done, dsv4__min(run->count - done, DSV4__ROWS_AT_ONCE));
            job.to = i + 1 == whole.run_count && done + part.runs[0].count == run->count ? NULL : fold;
            call->c->kernels->pool(&job);
            job.from = job.to;
        }
    }
}

/* Pools the windows of the block that close, over the source's channels. */
static void dsv4__pool_block(const dsv4__call *call, const dsv4__source *source, int64_t thread) {
    const dsv4_compressor *c = call->c;
    const int64_t dim = c->config.head_dim, ratio = c->config.ratio;
    dsv4__pool_job job = dsv4__pool_settings(call, source, thread);
    dsv4__window window;
    float *const weights = call->batch.stages.weights;
    const int by_rows = call->batch.kv != NULL && weights == NULL && !c->keeps_rows && ratio >= 4 * DSV4__ROWS_AT_ONCE;
    job.window = &window;
    job.weights_stride = dim;
    if (call->batch.kv != NULL)
        job.rows_ahead = by_rows ? (int64_t)DSV4__ROWS_AHEAD : dsv4__max(ratio, DSV4__ROWS_AHEAD);
    for (int64_t i = 0; i < call->pieces; i++) {
        const dsv4__stretch *piece = &call->ws->pieces[i];
        const dsv4_state *state = piece->segment->state;
        const int goes_on = dsv4__folds(state) && weights == NULL; /* weights need all rows */
        const int64_t folded = goes_on ? state->floor : 0, end = dsv4__end_of(piece) / ratio;
        for (int64_t w = piece->t / ratio; w < end; w++) {
            const float *fold = goes_on ? dsv4__fold_at(state, w - folded / ratio, folded) : NULL;
            job.from = fold == NULL ? NULL : fold + source->channel;
            window = dsv4__window_rows(call, piece, source, w, folded);
            job.pooled = call->ws->pooled + (piece->slot + w) * dim + source->channel;
            const int64_t entry = weights == NULL ? -1 : dsv4__entry_row(call, piece, w);
            job.weights = entry < 0 ? NULL : weights + entry * c->series * ratio * dim + source->channel;
            if (by_rows)
                dsv4__pool_by_rows(call, job, dsv4__scratch_of(call->ws, thread).wide);
            else
                c->kernels->pool(&job);
        }
    }
}

/* ---- What stays of rows: in states, in the stages ----------------------------------------------------------- */

/* Copies the source's channels of one row of one series: kv and, where there is one, gate. */
static void dsv4__copy_row(const dsv4__source *source, int64_t row, int64_t series, float *kv, float *gate) {
    const int64_t offset = row * source->stride + series * source->series;
    const size_t bytes = (size_t)source->channels * sizeof(float);
    if (kv != NULL) memcpy(kv, source->kv + offset, bytes);
    if (gate != NULL && source->gate != NULL) memcpy(gate, source->gate + offset, bytes);
}

/* Puts the last rows of a piece into a ring, as scores where its state folds. */
static void dsv4__put_rows(const dsv4__call *call, const dsv4__stretch *piece, const dsv4__source *source,
                           const dsv4_state *holder) {
    const dsv4_compressor *c = call->c;
    const int64_t end = dsv4__end_of(piece);
    for (int64_t s = 0; s < c->series; s++)
        for (int64_t t = dsv4__max(piece->t, end - holder->capacity[s]); t < end; t++) {
            float *row = dsv4__state_row(holder, s, t) + source->channel, *gate = row + c->config.head_dim;
            dsv4__copy_row(source, dsv4__row_of(piece, t), s, row, gate);
            if (!dsv4__folds(piece->segment->state)) continue;
            if (c->ape != NULL) c->kernels->add(gate, dsv4__ape_from(call, source, s, t), NULL, source->channels);
            if (c->config.rounding & DSV4_ROUND_SCORE) c->kernels->round_array(gate, source->channels);
        }
}

/* Lets the rows of the state that the first open window needs wait with those of its segment's first piece: those that
 * it has, as windows that need others do not close in a call that asks for weights. */
static void dsv4__carry_state_rows(const dsv4__call *call, const dsv4__stretch *piece, const dsv4__source *source) {
    const dsv4_state *carry = call->ws->carry, *state = piece->segment->state;
    for (int64_t s = 0; s < call->c->series; s++)
        for (int64_t t = dsv4__max(dsv4__state_first(carry, s, piece->t), state->floor); t < piece->t; t++) {
            const float *from = dsv4__state_row(state, s, t) + source->channel;
            float *to = dsv4__state_row(carry, s, t) + source->channel;
            memcpy(to, from, (size_t)source->channels * sizeof *to);
            memcpy(to + carry->head_dim, from + carry->head_dim, (size_t)source->channels * sizeof *to);
        }
}

/* The floor of a piece's state once it has taken the piece in. */
static int64_t dsv4__floor_after(const dsv4__stretch *piece) {
    const dsv4_state *state = piece->segment->state;
    return dsv4__max(state->floor, dsv4__end_of(piece) - state->depth);
}

/* Folds what falls out of a roll-back's reach: from where the state stands, or, where all windows open there close,
 * from the first row of those that are open in the end. */
static void dsv4__fold_piece(const dsv4__call *call, const dsv4__stretch *piece, const dsv4__source *source) {
    const dsv4_compressor *c = call->c;
    const dsv4_state *state = piece->segment->state;
    const int64_t ratio = c->config.ratio, lag = c->series - 1;
    const int64_t floor = dsv4__floor_after(piece), start = dsv4__max(state->floor, (floor / ratio - lag) * ratio);
    dsv4__token_rows rows;
    memset(&rows, 0, sizeof rows);
    rows.channel = source->channel;
    rows.channels = source->channels;
    rows.rounding = c->config.rounding & DSV4_ROUND_SCORE;
    for (int64_t t = start; t < floor; t++) {
        rows.fresh = lag == 1 && start > state->floor && t < start + ratio;
        for (int64_t s = 0; s < c->series; s++) {
            const dsv4__run one = dsv4__run_from(call, piece, state, source, s, t);
            rows.kv[s] = one.kv;
            rows.gate[s] = one.gate;
            rows.ape[s] = one.ape;
        }
        dsv4__fold_token(state, c->kernels, t, &rows);
    }
}

/* Leaves of each piece what its sequence goes on with. After pooling: rings and folds may still hold what a window of
 * this block begins with. */
static void dsv4__keep_rows(const dsv4__call *call, const dsv4__source *source) {
    for (int64_t i = 0; i < call->pieces; i++) {
        const dsv4__stretch *piece = &call->ws->pieces[i];
        const dsv4_state *state = piece->segment->state;
        if (dsv4__carries(call, piece) && dsv4__continues(call, piece)) {
            if (state != NULL && piece->t == dsv4__seen(piece)) dsv4__carry_state_rows(call, piece, source);
            if (call->batch.kv == NULL) dsv4__put_rows(call, piece, source, call->ws->carry);
        }
        if (state == NULL) continue;
        if (dsv4__folds(state)) dsv4__fold_piece(call, piece, source);
        dsv4__put_rows(call, piece, source, state);
    }
}

/* Copies `count` of the source's rows to the stages kv and gate. */
static void dsv4__write_rows(const dsv4__call *call, const dsv4__source *source, int64_t row, int64_t to,
                             int64_t count) {
    const dsv4_stages *stages = &call->batch.stages;
    for (int64_t i = 0; i < count; i++)
        for (int64_t s = 0; s < call->c->series; s++) {
            const int64_t at = (to + i) * call->c->columns + s * call->c->config.head_dim + source->channel;
            dsv4__copy_row(source, row + i, s, stages->kv == NULL ? NULL : stages->kv + at,
                           stages->gate == NULL ? NULL : stages->gate + at);
        }
}

static void dsv4__write_projections(const dsv4__call *call, const dsv4__source *source) {
    if (call->batch.stages.kv == NULL && call->batch.stages.gate == NULL) return;
    for (int64_t i = 0; i < call->pieces; i++) {
        const dsv4__stretch *piece = &call->ws->pieces[i];
        dsv4__write_rows(call, source, piece->row, dsv4__token_of(piece), piece->count);
    }
}

static void dsv4__take_source(const dsv4__call *call, const dsv4__source *source, int64_t thread) {
    dsv4__write_projections(call, source);
    dsv4__pool_block(call, source, thread);
    dsv4__keep_rows(call, source);
}

/* Task: pools this thread's share of the channels. */
static void dsv4__pool_task(void *argument, int64_t thread) {
    const dsv4__call *call = (const dsv4__call *)argument;
    const int64_t groups = call->c->groups, threads = call->ws->threads;
    if (call->batch.kv != NULL) {
        const dsv4__source source = dsv4__thread_source(call, thread);
        dsv4__take_source(call, &source, thread);
        return;
    }
    for (int64_t group = dsv4__share(groups, thread, threads); group < dsv4__share(groups, thread + 1, threads);
         group++) {
        const dsv4__source source = dsv4__sums_source(call, group);
        dsv4__take_source(call, &source, thread);
    }
}

/* ---- Back: the windows that touch a part, recomputed -------------------------------------------------------- */

/* Task: copies the projections of a block onto this thread's groups to the arrays of recomputed rows. */
static void dsv4__recompute_task(void *argument, int64_t thread) {
    const dsv4__back *back = (const dsv4__back *)argument;
    const dsv4__call *call = &back->call;
    const int64_t groups = call->c->groups, threads = call->ws->threads;
    for (int64_t group = dsv4__share(groups, thread, threads); group < dsv4__share(groups, thread + 1, threads);
         group++) {
        const dsv4__source source = dsv4__sums_source(call, group);
        dsv4__write_rows(call, &source, 0, back->recomputed, call->rows);
    }
}

/* Lays out the next block of the context's rows. */
static void dsv4__context_block(dsv4__back *back) {
    dsv4__call *call = &back->call;
    call->rows = dsv4__min(back->context - back->recomputed, call->ws->block_rows);
    call->pieces = 0;
    for (int64_t p = 0; p < back->parts; p++) {
        dsv4__stretch piece = back->train->parts[p].context;
        const int64_t row = dsv4__max(piece.row, back->recomputed);
        const int64_t end = dsv4__min(piece.row + piece.count, back->recomputed + call->rows);
        piece.t += row - piece.row;
        piece.row = row - back->recomputed;
        piece.count = end - row;
        if (piece.count > 0) call->ws->pieces[call->pieces++] = piece;
    }
}

/* Projects the context of all parts, block by block. */
static void dsv4__recompute(dsv4__back *back) {
    dsv4__call *call = &back->call;
    for (back->recomputed = 0; back->recomputed < back->context; back->recomputed += call->rows) {
        dsv4__context_block(back);
        dsv4__project_block(call);
        dsv4__for_threads(call, dsv4__recompute_task, back, call->rows * call->c->columns);
    }
}

/* Task: pools the chunk's windows, over this thread's channels. */
static void dsv4__repool_task(void *argument, int64_t thread) {
    const dsv4__back *back = (const dsv4__back *)argument;
    const dsv4__source source = dsv4__thread_source(&back->call, thread);
    const int64_t dim = back->call.c->config.head_dim, ratio = back->call.c->config.ratio;
    dsv4__pool_job job = dsv4__pool_settings(&back->call, &source, thread);
    dsv4__window window;
    job.window = &window;
    for (int64_t p = 0; p < back->parts; p++) {
        const dsv4__part *part = &back->train->parts[p];
        const int64_t end = dsv4__end_of(&part->context) / ratio;
        for (int64_t w = part->tokens.t / ratio; w < end; w++) {
            window = dsv4__window_rows(&back->call, &part->context, &source, w, 0);
            job.pooled = back->train->normed + (part->tokens.slot + w) * dim + source.channel;
            back->call.c->kernels->pool(&job);
        }
    }
}

/* ---- Back: dkv, dgate and dape ------------------------------------------------------------------------------ */

/* The gradients of the states around a segment; NULL: there is none. */
static dsv4_segment_gradient dsv4__gradients_around(const dsv4__back *back, const dsv4_segment *segment) {
    const dsv4_segment_gradient none = {NULL, NULL};
    return back->g.segments == NULL ? none : back->g.segments[segment - back->call.batch.segments];
}

/* Tells a run of `count` rows from token t on where its gradients go: to the chunk's rows, to the state before the
 * segment, or nowhere; and returns after how many rows that changes. */
static int64_t dsv4__run_target(const dsv4__back *back, const dsv4__stretch *tokens, const dsv4__source *source,
                                int64_t series, int64_t t, int64_t count, dsv4__run *run) {
    const int64_t dim = back->call.c->config.head_dim, stride = back->train->d_stride;
    const int64_t offset = series * dim + source->channel, end = dsv4__end_of(tokens);
    dsv4_state *previous = dsv4__gradients_around(back, tokens->segment).previous;
    run->dkv = run->dgate = NULL;
    if (t < dsv4__seen(tokens)) {
        if (previous == NULL) return count;
        const int64_t capacity = previous->capacity[series];
        run->dkv = dsv4__state_row(previous, series, t) + source->channel;
        run->dgate = run->dkv + dim;
        run->d_stride = previous->row;
        count = dsv4__min(count, capacity - t % capacity);
    } else if (t < tokens->t) {
        count = dsv4__min(count, tokens->t - t);
    } else if (t < end) {
        run->dkv = back->train->dkv + dsv4__row_of(tokens, t) * stride + offset;
        run->dgate = back->train->dgate + dsv4__row_of(tokens, t) * stride + offset;
        run->d_stride = stride;
        count = dsv4__min(count, end - t);
    }
    if (back->call.c->config.no_gate) run->dgate = NULL;
    return count;
}

/* A window's runs, each cut where its gradients' place changes. */
static dsv4__window dsv4__window_back(const dsv4__back *back, const dsv4__part *part, const dsv4__source *source,
                                      int64_t w) {
    const int64_t ratio = back->call.c->config.ratio, lag = back->call.c->series - 1;
    const dsv4__window whole = dsv4__window_rows(&back->call, &part->context, source, w, 0);
    dsv4__window cut;
    int64_t t = (w - lag) * ratio;
    cut.run_count = 0;
    for (int i = 0; i < whole.run_count; i++)
        for (int64_t done = 0; done < whole.runs[i].count;) {
            dsv4__run *run = &cut.runs[cut.run_count++];
            DSV4_ASSERT(cut.run_count <= DSV4__MAX_RUNS);
            *run = dsv4__run_part(&whole.runs[i], done, whole.runs[i].count - done);
            if (run->kv != NULL)
                run->count =
                    dsv4__run_target(back, &part->tokens, source, lag > 0 && t >= w * ratio, t, run->count, run);
            done += run->count;
            t += run->count;
        }
    return cut;
}

static void dsv4__copy_or_clear(float *to, const float *from, size_t bytes) {
    if (from != NULL)
        memcpy(to, from, bytes);
    else
        memset(to, 0, bytes);
}

/* Rows of the part whose window closes after the segment, and so is none of the part's, get what the following part
 * says, or 0; so do the rows around it that fill pairs or steps up. */
static void dsv4__open_rows(const dsv4__back *back, const dsv4__part *part, const dsv4__source *source) {
    const dsv4_compressor *c = back->call.c;
    const int64_t dim = c->config.head_dim, ratio = c->config.ratio;
    const dsv4__stretch *tokens = &part->tokens;
    const dsv4_state *next = dsv4__gradients_around(back, tokens->segment).next;
    const size_t bytes = (size_t)source->channels * sizeof(float);
    const int64_t begin = tokens->t - dsv4__lead(back, tokens), end = begin + dsv4__padded_rows(back, tokens);
    for (int64_t s = 0; s < c->series; s++) {
        const int64_t lag = c->series - 1 - s, first = (dsv4__end_of(&part->context) / ratio - lag) * ratio;
        const int64_t open = dsv4__min(dsv4__max(first, tokens->t), dsv4__end_of(tokens));
        for (int64_t t = begin < tokens->t ? begin : open; t < end; t = t + 1 == tokens->t ? open : t + 1) {
            const int64_t to = dsv4__row_of(tokens, t) * back->train->d_stride + s * dim + source->channel;
            const int known =
                next != NULL && t >= tokens->t && t < dsv4__end_of(tokens); /* never without a gate: ratio is 1 then */
            const float *from = known ? dsv4__state_row(next, s, t) + source->channel : NULL;
            dsv4__copy_or_clear(back->train->dkv + to, from, bytes);
            dsv4__copy_or_clear(back->train->dgate + to, known ? from + dim : NULL, bytes);
        }
    }
}

/* Adds a part's rows of dgate to dape, as one block, over the source's channels. */
static void dsv4__sum_ape(const dsv4__back *back, const dsv4__stretch *tokens, const dsv4__source *source) {
    const dsv4_compressor *c = back->call.c;
    const int64_t ratio = c->config.ratio, dim = c->config.head_dim;
    for (int64_t s = 0; s < c->series; s++) {
        const int64_t offset = s * dim + source->channel;
        for (int64_t i = 0; i < tokens->count; i++) {
            float *block = back->train->dape_block + (tokens->t + i) % ratio * c->columns + offset;
            if (i < ratio) memset(block, 0, (size_t)source->channels * sizeof(float));
            c->kernels->add(block, back->train->dgate + (tokens->row + i) * back->train->d_stride + offset, NULL,
                            source->channels);
        }
        for (int64_t i = 0; i < dsv4__min(tokens->count, ratio); i++) {
            const int64_t row = (tokens->t + i) % ratio * c->columns + offset;
            c->kernels->add(back->train->dape + row, back->train->dape_block + row, NULL, source->channels);
        }
    }
}

/* Adds the entries that close within a part to dnorm, as one block. */
static void dsv4__sum_norm(const dsv4__back *back, const dsv4__stretch *tokens, const dsv4__source *source) {
    const dsv4_compressor *c = back->call.c;
    const int64_t ratio = c->config.ratio, end = dsv4__end_of(tokens) / ratio;
    float *block = back->train->dnorm_block + source->channel;
    memset(block, 0, (size_t)source->channels * sizeof(float));
    for (int64_t w = tokens->t / ratio; w < end; w++) {
        const int64_t at = (tokens->slot + w) * c->config.head_dim + source->channel;
        c->kernels->add(block, back->train->dscaled + at, back->train->normed + at, source->channels);
    }
    c->kernels->add(back->train->dnorm + source->channel, block, NULL, source->channels);
}

/* Task: dkv and dgate of the chunk's rows over this thread's channels, and the sums that need nothing else. */
static void dsv4__windows_back_task(void *argument, int64_t thread) {
    const dsv4__back *back = (const dsv4__back *)argument;
    const dsv4_compressor *c = back->call.c;
    const int64_t dim = c->config.head_dim, ratio = c->config.ratio;
    const dsv4__source source = dsv4__thread_source(&back->call, thread);
    dsv4__pool_job job = dsv4__pool_settings(&back->call, &source, thread);
    dsv4__window window;
    job.window = &window;
    for (int64_t p = 0; p < back->parts && source.channels > 0; p++) {
        const dsv4__part *part = &back->train->parts[p];
        const int64_t end = dsv4__end_of(&part->context) / ratio;
        for (int64_t w = part->tokens.t / ratio; w < end; w++) {
            window = dsv4__window_back(back, part, &source, w);
            job.dpooled = back->train->dpooled + (part->tokens.slot + w) * dim + source.channel;
            c->kernels->pool_back(&job);
        }
        dsv4__open_rows(back, part, &source);
        if (back->g.dape.data != NULL && !c->config.no_gate) dsv4__sum_ape(back, &part->tokens, &source); /* else 0 */
        if (back->g.dnorm.data != NULL) dsv4__sum_norm(back, &part->tokens, &source);
    }
    for (int64_t row = 0; row < back->rows && back->round; row++)
        for (int64_t s = 0; s < c->series; s++) {
            const int64_t at = row * back->train->d_stride + s * dim + source.channel;
            c->kernels->round_array(back->train->dkv + at, source.channels);
            if (!c->config.no_gate) c->kernels->round_array(back->train->dgate + at, source.channels);
        }
}

/* ------------------------------------------------------------------------------------------------------------
 * 3q. Entries: norm, RoPE and row format; their way back to dpooled and dnorm
 * ------------------------------------------------------------------------------------------------------------ */

/* The entry of window w, from its pooled row to out. */
static void dsv4__finish_entry(const dsv4__call *call, const dsv4__stretch *piece, int64_t w,
                               const dsv4__scratch *scratch) {
    const dsv4_config *config = &call->c->config;
    const dsv4_batch *batch = &call->batch;
    const int64_t dim = config->head_dim, entry = dsv4__entry_row(call, piece, w);
    dsv4__finish_job job;
    if (entry < 0) return;
    memset(&job, 0, sizeof job);
    call->c->kernels->rope_row(config, call->c->inv_freq, dsv4__position_of(call, piece, w), scratch->cos_row,
                               scratch->sin_row);
    job.config = config;
    job.norm = call->c->norm;
    job.cos_row = scratch->cos_row;
    job.sin_row = scratch->sin_row;
    job.pooled = call->ws->pooled + (piece->slot + w) * dim;
    job.row = scratch->row;
    job.swapped = scratch->swapped;
    job.out_dtype = batch->out.dtype;
    job.out = dsv4__in_mutable(batch->out, entry, 0);
    if (job.out_dtype == DSV4_PACKED && batch->scales.data != NULL)
        job.scales = (unsigned char *)dsv4__in_mutable(batch->scales, entry, 0);
    job.latent_dtype = job.out_dtype == DSV4_F32 ? DSV4_F32 : DSV4_BF16;
    job.latent = batch->stages.latent;
    if (job.latent != NULL) job.latent = dsv4__at_mutable(job.latent, job.latent_dtype, entry * dim);
    call->c->kernels->finish(&job);
    if (batch->stages.pooled != NULL)
        memcpy(batch->stages.pooled + entry * dim, job.pooled, (size_t)dim * sizeof(float));
}

/* Task: finishes this thread's share of the block's entries. */
static void dsv4__finish_task(void *argument, int64_t thread) {
    const dsv4__call *call = (const dsv4__call *)argument;
    const int64_t threads = call->ws->threads, ratio = call->c->config.ratio;
    const int64_t first = dsv4__share(call->entries, thread, threads),
                  end = dsv4__share(call->entries, thread + 1, threads);
    const dsv4__scratch scratch = dsv4__scratch_of(call->ws, thread);
    for (int64_t i = 0; i < call->pieces; i++) {
        const dsv4__stretch *piece = &call->ws->pieces[i];
        const int64_t last = dsv4__min(end - piece->slot, dsv4__end_of(piece) / ratio);
        for (int64_t w = dsv4__max(first - piece->slot, piece->t / ratio); w < last; w++)
            dsv4__finish_entry(call, piece, w, &scratch);
    }
}

/* ---- Back --------------------------------------------------------------------------------------------------- */

/* The entry of window w: dout to dpooled, leaving the scaled row's gradient and the normalised row for dnorm. */
static void dsv4__entry_back(const dsv4__back *back, const dsv4__stretch *tokens, int64_t w,
                             const dsv4__scratch *scratch) {
    const dsv4_compressor *c = back->call.c;
    const int64_t dim = c->config.head_dim, at = (tokens->slot + w) * dim;
    const int64_t entry = dsv4__entry_row(&back->call, tokens, w);
    dsv4__finish_job job;
    memset(&job, 0, sizeof job);
    c->kernels->rope_row(&c->config, c->inv_freq, dsv4__position_of(&back->call, tokens, w), scratch->cos_row,
                         scratch->sin_row);
    for (int64_t i = 0; i < c->config.rope_dim; i++) scratch->sin_row[i] = -scratch->sin_row[i];
    job.config = &c->config;
    job.norm = c->norm;
    job.cos_row = scratch->cos_row;
    job.sin_row = scratch->sin_row;
    job.swapped = scratch->swapped;
    job.pooled = back->train->normed + at;
    job.row = back->train->dscaled + at;
    job.dpooled = back->train->dpooled + at;
    if (entry < 0)
        memset(job.row, 0, (size_t)dim * sizeof(float)); /* not stored, so nothing hangs on it */
    else if (back->g.dout.dtype == DSV4_BF16)
        c->kernels->widen(job.row, (const dsv4_bf16 *)dsv4__in(back->g.dout, entry, 0), dim);
    else
        memcpy(job.row, dsv4__in(back->g.dout, entry, 0), (size_t)dim * sizeof(float));
    c->kernels->finish_back(&job);
}

/* Task: this thread's share of the chunk's windows. */
static void dsv4__entries_back_task(void *argument, int64_t thread) {
    const dsv4__back *back = (const dsv4__back *)argument;
    const int64_t threads = back->call.ws->threads, ratio = back->call.c->config.ratio;
    const int64_t first = dsv4__share(back->windows, thread, threads),
                  end = dsv4__share(back->windows, thread + 1, threads);
    const dsv4__scratch scratch = dsv4__scratch_of(back->call.ws, thread);
    for (int64_t p = 0; p < back->parts; p++) {
        const dsv4__part *part = &back->train->parts[p];
        const int64_t last = dsv4__min(end - part->tokens.slot, dsv4__end_of(&part->context) / ratio);
        for (int64_t w = dsv4__max(first - part->tokens.slot, part->tokens.t / ratio); w < last; w++)
            dsv4__entry_back(back, &part->tokens, w, &scratch);
    }
}

/* ------------------------------------------------------------------------------------------------------------
 * 3r. Calls: what they may be, and what they do
 * ------------------------------------------------------------------------------------------------------------ */

DSV4_API int64_t dsv4_visible_entries(int64_t t, int64_t ratio) {
    if (ratio == 1) return t < 0 ? 0 : dsv4__min(t, INT64_MAX - 1) + 1;
    return ratio < 1 || t < 0 ? 0 : t / ratio + (t % ratio == ratio - 1);
}

DSV4_API int64_t dsv4_entry_count(const dsv4_config *config, const dsv4_state *state, int64_t count) {
    if (config == NULL || config->ratio < 1 || count < 0) return 0;
    const int64_t ratio = config->ratio, open = dsv4_state_tokens(state) % ratio;
    return count / ratio + (open >= ratio - count % ratio); /* one more closes; their sum might not fit */
}

DSV4_API dsv4_status dsv4_mask(const dsv4_mask_spec *spec, dsv4_matrix mask, dsv4_error *error) {
    DSV4__TRY(dsv4__need(spec, "spec", error));
    const int64_t ratio = spec->ratio, first = spec->first, queries = spec->queries, entries = spec->entries;
    if (ratio < 1 || first < 0 || queries < 0 || entries < 0 || first > INT64_MAX / 2 || queries > INT64_MAX / 2)
        return dsv4__fail(error, DSV4_ERROR_ARGUMENT, "ratio %lld, first %lld, queries %lld, entries %lld",
                          (long long)ratio, (long long)first, (long long)queries, (long long)entries);
    DSV4__TRY(dsv4__check_matrix(&mask, queries, entries, "mask", error));
    const float hidden = spec->hidden != 0 ? spec->hidden : -INFINITY;
    for (int64_t q = 0; q < queries; q++) {
        const int64_t visible = dsv4_visible_entries(first + q, ratio);
        for (int64_t e = 0; e < entries; e++)
            dsv4__put(mask.data, mask.dtype, q * mask.stride + e, e < visible ? 0.0f : hidden);
    }
    return DSV4_OK;
}

/* ---- What a call may be ------------------------------------------------------------------------------------- */

static dsv4_status dsv4__check_span(int64_t first, int64_t count, int64_t limit, int64_t segment, const char *what,
                                    dsv4_error *error) {
    if (first >= 0 && count >= 0 && count <= limit && first <= limit - count) return DSV4_OK;
    return dsv4__fail(error, DSV4_ERROR_BOUNDS, "segment %lld: %s %lld ... %lld + %lld, of %lld", (long long)segment,
                      what, (long long)first, (long long)first, (long long)count, (long long)limit);
}

static dsv4_status dsv4__check_state(const dsv4_compressor *c, const dsv4_segment *segment, int64_t index,
                                     dsv4_error *error) {
    const dsv4_state *state = segment->state;
    if (state->fingerprint != c->fingerprint)
        return dsv4__fail(error, DSV4_ERROR_STATE,
                          "segment %lld: its state is of configuration %016llx, not %016llx (training counts)",
                          (long long)index, (unsigned long long)state->fingerprint, (unsigned long long)c->fingerprint);
    if (state->marked)
        return dsv4__fail(error, DSV4_ERROR_STATE, "segment %lld: its state stands in an earlier segment too",
                          (long long)index);
    if (state->tokens > 0 && segment->position != dsv4_state_position(state))
        return dsv4__fail(error, DSV4_ERROR_STATE, "segment %lld: position %lld, but its state continues at %lld",
                          (long long)index, (long long)segment->position, (long long)dsv4_state_position(state));
    return DSV4_OK;
}

/* Whether a state has the rows of the windows that close, one by one. */
static dsv4_status dsv4__check_weights(const dsv4_state *state, int64_t count, int64_t index, dsv4_error *error) {
    const int64_t ratio = state->ratio, lag = state->series - 1, first = state->tokens / ratio;
    if (state->windows == 0 || count < ratio - state->tokens % ratio || state->floor <= (first - lag) * ratio ||
        state->floor == 0)
        return DSV4_OK;
    return dsv4__fail(
        error, DSV4_ERROR_STATE,
        "segment %lld: stages.weights of a window whose rows its state has not kept; depth %lld keeps them",
        (long long)index, (long long)((1 + lag) * ratio - 1));
}

/* `entries`: of the segments before, in; and of this one too, out. */
static dsv4_status dsv4__check_segment(const dsv4_compressor *c, const dsv4_batch *batch, int64_t index,
                                       int64_t *entries, dsv4_error *error) {
    const dsv4_segment *segment = &batch->segments[index];
    const int64_t ratio = c->config.ratio, limit = (int64_t)1 << 62;
    DSV4__TRY(dsv4__check_span(segment->token, segment->count, batch->tokens, index, "tokens", error));
    if (segment->position < 0 || segment->position >= limit || segment->count >= limit - segment->position)
        return dsv4__fail(error, DSV4_ERROR_BOUNDS, "segment %lld: positions %lld + %lld, not in 0 ... 2^62 - 1",
                          (long long)index, (long long)segment->position, (long long)segment->count);
    if (segment->state == NULL && !batch->drop_tail && segment->count % ratio != 0)
        return dsv4__fail(error, DSV4_ERROR_LENGTH, "segment %lld: %lld tokens, which the ratio %lld does not divide",
                          (long long)index, (long long)segment->count, (long long)ratio);
    if (segment->state != NULL) DSV4__TRY(dsv4__check_state(c, segment, index, error));
    if (segment->state != NULL && batch->stages.weights != NULL)
        DSV4__TRY(dsv4__check_weights(segment->state, segment->count, index, error));
    const int64_t count = dsv4_entry_count(&c->config, segment->state, segment->count);
    if (batch->entry_rows == NULL)
        return dsv4__check_span(segment->entry, count, batch->entries, index, "entries", error);
    for (int64_t i = *entries; i < *entries + count; i++)
        if (batch->entry_rows[i] >= batch->entries)
            return dsv4__fail(error, DSV4_ERROR_BOUNDS, "segment %lld: entry_rows[%lld] is %lld, of %lld",
                              (long long)index, (long long)i, (long long)batch->entry_rows[i],
                              (long long)batch->entries);
    *entries += count;
    return DSV4_OK;
}

/* Each state is marked while the segments are gone through, so that a second appearance shows. */
static dsv4_status dsv4__check_segments(const dsv4_compressor *c, const dsv4_batch *batch, dsv4_error *error) {
    dsv4_status status = DSV4_OK;
    int64_t checked = 0, entries = 0;
    for (; checked < batch->segment_count && status == DSV4_OK; checked++) {
        status = dsv4__check_segment(c, batch, checked, &entries, error);
        if (status == DSV4_OK && batch->segments[checked].state != NULL) batch->segments[checked].state->marked = 1;
    }
    for (int64_t i = 0; i < checked; i++)
        if (batch->segments[i].state != NULL) batch->segments[i].state->marked = 0;
    return status;
}

static dsv4_status dsv4__check_optional(const void *pointer, size_t alignment, const char *name, dsv4_error *error) {
    return pointer == NULL ? DSV4_OK : dsv4__need_aligned(pointer, alignment, name, error);
}

/* Which tokens are whose: a batch without segments is one whole sequence. */
static dsv4_status dsv4__begin_segments(dsv4__call *call, dsv4_error *error) {
    dsv4_batch *batch = &call->batch;
    if (batch->tokens < 0 || batch->segment_count < 0)
        return dsv4__fail(error, DSV4_ERROR_ARGUMENT, "tokens is %lld, segment_count %lld", (long long)batch->tokens,
                          (long long)batch->segment_count);
    if (batch->segment_count > 0) return dsv4__need(batch->segments, "segments", error);
    if (batch->tokens == 0) return DSV4_OK;
    if (batch->segments != NULL)
        return dsv4__fail(error, DSV4_ERROR_ARGUMENT, "segment_count is 0, but segments are given for %lld tokens",
                          (long long)batch->tokens);
    call->whole.count = batch->tokens;
    batch->segments = &call->whole;
    batch->segment_count = 1;
    return DSV4_OK;
}

/* Where tokens come from: x, or kv and gate. */
static dsv4_status dsv4__check_inputs(const dsv4_compressor *c, dsv4_batch *batch, dsv4_error *error) {
    DSV4__TRY(dsv4__check_extent(batch->tokens, c->columns, "kv", error));
    if (batch->kv != NULL) {
        DSV4__TRY(dsv4__need_aligned(batch->kv, sizeof(float), "kv", error));
        if (!c->config.no_gate) DSV4__TRY(dsv4__need_aligned(batch->gate, sizeof(float), "gate", error));
    } else if (batch->tokens > 0) {
        DSV4__TRY(dsv4__check_const_matrix(&batch->x, batch->tokens, c->config.hidden_dim, "x", error));
    }
    return DSV4_OK;
}

/* Where packed bytes are: any address, a row of at least `bytes`. */
static dsv4_status dsv4__check_const_packed(dsv4_const_matrix *matrix, int64_t rows, int64_t bytes, const char *name,
                                            dsv4_error *error) {
    if (bytes == 0) return DSV4_OK;
    DSV4__TRY(dsv4__need(matrix->data, name, error));
    if (matrix->dtype != DSV4_PACKED)
        return dsv4__fail(error, DSV4_ERROR_ARGUMENT, "dtype of %s is %d, not PACKED", name, (int)matrix->dtype);
    return dsv4__check_stride(&matrix->stride, rows, bytes, name, error);
}

static dsv4_status dsv4__check_packed(dsv4_matrix *matrix, int64_t rows, int64_t bytes, const char *name,
                                      dsv4_error *error) {
    dsv4_const_matrix same = dsv4__as_const(*matrix);
    DSV4__TRY(dsv4__check_const_packed(&same, rows, bytes, name, error));
    matrix->stride = same.stride;
    return DSV4_OK;
}

/* Where entries go, as numbers or packed. */
static dsv4_status dsv4__check_rows(const dsv4_config *config, int64_t rows, dsv4_matrix *out, dsv4_matrix *scales,
                                    dsv4_error *error) {
    size_t row_bytes = 0, scale_bytes = 0;
    if (out->dtype != DSV4_PACKED) return dsv4__check_matrix(out, rows, config->head_dim, "out", error);
    DSV4__TRY(dsv4_row_sizes(config, &row_bytes, &scale_bytes, error));
    DSV4__TRY(dsv4__check_packed(out, rows, (int64_t)row_bytes, "out", error));
    if (scale_bytes == 0) scales->data = NULL;
    return dsv4__check_packed(scales, rows, (int64_t)scale_bytes, "scales", error);
}

static dsv4_status dsv4__check_outputs(const dsv4_compressor *c, dsv4_batch *batch, dsv4_error *error) {
    const dsv4_stages *stages = &batch->stages;
    if (batch->entries < 0) return dsv4__fail(error, DSV4_ERROR_ARGUMENT, "entries is %lld", (long long)batch->entries);
    if (batch->entries > 0) DSV4__TRY(dsv4__check_rows(&c->config, batch->entries, &batch->out, &batch->scales, error));
    if (stages->weights != NULL)
        DSV4__TRY(dsv4__check_extent(batch->entries, c->columns * c->config.ratio, "stages.weights", error));
    DSV4__TRY(dsv4__check_optional(stages->kv, sizeof(float), "stages.kv", error));
    DSV4__TRY(dsv4__check_optional(stages->gate, sizeof(float), "stages.gate", error));
    DSV4__TRY(dsv4__check_optional(stages->weights, sizeof(float), "stages.weights", error));
    DSV4__TRY(dsv4__check_optional(stages->pooled, sizeof(float), "stages.pooled", error));
    return dsv4__check_optional(stages->latent, batch->out.dtype == DSV4_F32 ? 4 : 2, "stages.latent", error);
}

/* ---- Forward ------------------------------------------------------------------------------------------------ */

/* States have folded what this block put out of their roll-backs' reach. */
static void dsv4__end_block(const dsv4__call *call) {
    for (int64_t i = 0; i < call->pieces; i++) {
        const dsv4__stretch *piece = &call->ws->pieces[i];
        if (piece->segment->state != NULL) piece->segment->state->floor = dsv4__floor_after(piece);
    }
}

/* Whether one compressor's workspaces serve the other: the layers of a model can share them. */
static int dsv4__same_layout(const dsv4_compressor *a, const dsv4_compressor *b) {
    return a == b || (a->fingerprint == b->fingerprint && a->kernels == b->kernels && a->training == b->training &&
                      a->tiles == b->tiles);
}

static dsv4_status dsv4__begin_call(const dsv4_compressor *c, const dsv4_batch *batch, dsv4_workspace *ws,
                                    dsv4__call *call, dsv4_error *error) {
    memset(call, 0, sizeof *call);
    DSV4__TRY(dsv4__need(c, "compressor", error));
    DSV4__TRY(dsv4__need(batch, "batch", error));
    DSV4__TRY(dsv4__need(ws, "workspace", error));
    if (!dsv4__same_layout(ws->compressor, c))
        return dsv4__fail(error, DSV4_ERROR_ARGUMENT,
                          "the workspace is of a compressor of another configuration, kernel set, options.training "
                          "or, with tiles, types of weights");
    call->c = c;
    call->ws = ws;
    call->batch = *batch;
    DSV4__TRY(dsv4__begin_segments(call, error));
    DSV4__TRY(dsv4__check_inputs(c, &call->batch, error));
    call->x_bf16 = batch->x.dtype == DSV4_BF16;
    call->tiles = c->tiles && call->x_bf16;
    call->dot = call->tiles || (c->kernels->dot && c->config.sums == DSV4_SUMS_PAIRS && call->x_bf16 && c->w_bf16[0] &&
                                (c->config.no_gate || c->w_bf16[1]));
    return DSV4_OK;
}

DSV4_API dsv4_status dsv4_compress(const dsv4_compressor *compressor, const dsv4_batch *batch,
                                   dsv4_workspace *workspace, dsv4_error *error) {
    dsv4__call call;
    DSV4__TRY(dsv4__begin_call(compressor, batch, workspace, &call, error));
    DSV4__TRY(dsv4__check_outputs(compressor, &call.batch, error));
    DSV4__TRY(dsv4__check_segments(compressor, &call.batch, error));
    const int64_t dim = compressor->config.head_dim;
    while (dsv4__next_block(&call)) {
        if (call.batch.kv == NULL) dsv4__project_block(&call);
        dsv4__for_threads(&call, dsv4__pool_task, &call, call.rows * compressor->columns * 16);
        dsv4__end_block(&call);
        dsv4__for_threads(&call, dsv4__finish_task, &call, call.entries * (dim + 64 * compressor->config.rope_dim));
    }
    for (int64_t i = 0; i < batch->segment_count; i++)
        if (batch->segments[i].state != NULL && batch->segments[i].count > 0)
            dsv4__state_advance(batch->segments[i].state, batch->segments[i].position, batch->segments[i].count);
    return DSV4_OK;
}

/* ---- Rows alone --------------------------------------------------------------------------------------------- */

DSV4_API dsv4_status dsv4_quantise(const dsv4_compressor *compressor, dsv4_const_matrix plain,
                                   const dsv4_quantised *rows, dsv4_workspace *workspace, dsv4_error *error) {
    dsv4__call call;
    dsv4_batch none;
    dsv4__finish_job job;
    memset(&none, 0, sizeof none);
    memset(&job, 0, sizeof job);
    DSV4__TRY(dsv4__begin_call(compressor, &none, workspace, &call, error));
    DSV4__TRY(dsv4__need(rows, "rows", error));
    if (rows->count < 0) return dsv4__fail(error, DSV4_ERROR_ARGUMENT, "count is %lld", (long long)rows->count);
    if (rows->count == 0) return DSV4_OK;
    const int64_t dim = compressor->config.head_dim;
    dsv4_matrix out = rows->out, scales = rows->scales;
    DSV4__TRY(dsv4__check_const_matrix(&plain, rows->count, dim, "plain", error));
    DSV4__TRY(dsv4__check_rows(&compressor->config, rows->count, &out, &scales, error));
    job.config = &compressor->config;
    job.row = dsv4__scratch_of(workspace, 0).row;
    job.out_dtype = out.dtype;
    for (int64_t i = 0; i < rows->count; i++) {
        dsv4_const_matrix row = plain;
        row.data = dsv4__in(plain, i, 0);
        dsv4__read_matrix(row, job.row, dim, 1, dim);
        job.out = dsv4__in_mutable(out, i, 0);
        job.scales =
            out.dtype == DSV4_PACKED && scales.data != NULL ? (unsigned char *)dsv4__in_mutable(scales, i, 0) : NULL;
        compressor->kernels->store(&job);
    }
    return DSV4_OK;
}

DSV4_API dsv4_status dsv4_unpack(const dsv4_config *config, int64_t count, dsv4_const_matrix rows,
                                 dsv4_const_matrix scales, dsv4_matrix numbers, dsv4_error *error) {
    size_t row_bytes = 0, scale_bytes = 0;
    dsv4__unpack_job job;
    DSV4__TRY(dsv4_row_sizes(config, &row_bytes, &scale_bytes, error));
    if (count < 0) return dsv4__fail(error, DSV4_ERROR_ARGUMENT, "count is %lld", (long long)count);
    if (count == 0) return DSV4_OK;
    DSV4__TRY(dsv4__check_const_packed(&rows, count, (int64_t)row_bytes, "rows", error));
    DSV4__TRY(dsv4__check_const_packed(&scales, count, (int64_t)scale_bytes, "scales", error));
    DSV4__TRY(dsv4__check_matrix(&numbers, count, config->head_dim, "numbers", error));
    const dsv4__kernels *kernels = dsv4__set_for_arrays((size_t)count * (size_t)config->head_dim);
    job.config = config;
    job.dtype = numbers.dtype;
    for (int64_t i = 0; i < count; i++) {
        job.row = (const unsigned char *)dsv4__in(rows, i, 0);
        job.scales = scale_bytes > 0 ? (const unsigned char *)dsv4__in(scales, i, 0) : NULL;
        job.to = dsv4__in_mutable(numbers, i, 0);
        kernels->unpack(&job);
    }
    return DSV4_OK;
}

/* ---- What a backward call may be ---------------------------------------------------------------------------- */

/* Where a parameter's gradient is wanted: its type and place, and that the configuration has it. */
static dsv4_status dsv4__check_gradient(dsv4_matrix *target, const dsv4_param_info *info, const char *name,
                                        dsv4_error *error) {
    if (target->data == NULL) return DSV4_OK;
    if (info->count > 0) return dsv4__check_matrix(target, info->rows, info->columns, name, error);
    return dsv4__fail(error, DSV4_ERROR_ARGUMENT, "%s is wanted, but the configuration has none", name);
}

static dsv4_status dsv4__check_param_gradients(dsv4__back *back, dsv4_error *error) {
    static const char *const names[DSV4_PARAM_COUNT] = {"dwkv", "dwgate", "dape", "dnorm"};
    dsv4_gradients *g = &back->g;
    dsv4_matrix *const targets[DSV4_PARAM_COUNT] = {&g->dwkv, &g->dwgate, &g->dape, &g->dnorm};
    dsv4_param_info info[DSV4_PARAM_COUNT];
    const dsv4_status marked = dsv4_config_params(&back->call.c->config, info, NULL);
    DSV4_ASSERT(marked == DSV4_OK);
    (void)marked;
    for (int i = 0; i < DSV4_PARAM_COUNT; i++) {
        DSV4__TRY(dsv4__check_gradient(targets[i], &info[i], names[i], error));
        if (i <= DSV4_WGATE && targets[i]->data != NULL && targets[i]->dtype == DSV4_BF16 &&
            !(back->call.c->training & DSV4__BF16_SUMS))
            return dsv4__fail(error, DSV4_ERROR_ARGUMENT,
                              "%s is BF16, but the compressor was made without options.bf16_gradients", names[i]);
    }
    return DSV4_OK;
}

/* The states that carry gradients from part to part of a sequence. */
static dsv4_status dsv4__check_carried(const dsv4_compressor *c, const dsv4_segment *segment,
                                       const dsv4_segment_gradient *gradient, int64_t index, dsv4_error *error) {
    const dsv4_state *next = gradient->next, *previous = gradient->previous;
    if (next == NULL && previous == NULL) return DSV4_OK;
    if (segment->state == NULL || previous == segment->state || next == segment->state || next == previous)
        return dsv4__fail(error, DSV4_ERROR_STATE,
                          "segment %lld: next and previous need a state, and to be others than it", (long long)index);
    if ((next != NULL && next->fingerprint != c->fingerprint) ||
        (previous != NULL && previous->fingerprint != c->fingerprint))
        return dsv4__fail(error, DSV4_ERROR_STATE, "segment %lld: next or previous is of another configuration",
                          (long long)index);
    if (next != NULL && dsv4_state_tokens(next) != dsv4_state_tokens(segment->state) + segment->count)
        return dsv4__fail(error, DSV4_ERROR_STATE, "segment %lld: next is of a state after %lld tokens, not %lld",
                          (long long)index, (long long)dsv4_state_tokens(next),
                          (long long)(dsv4_state_tokens(segment->state) + segment->count));
    if (previous != NULL && previous->marked)
        return dsv4__fail(error, DSV4_ERROR_STATE, "segment %lld: its previous stands in an earlier segment too",
                          (long long)index);
    return DSV4_OK;
}

static dsv4_status dsv4__check_all_carried(const dsv4__back *back, dsv4_error *error) {
    const dsv4_batch *batch = &back->call.batch;
    dsv4_status status = DSV4_OK;
    int64_t checked = 0;
    if (back->g.segments == NULL) return DSV4_OK;
    for (; checked < batch->segment_count && status == DSV4_OK; checked++) {
        const dsv4_segment_gradient *gradient = &back->g.segments[checked];
        status = dsv4__check_carried(back->call.c, &batch->segments[checked], gradient, checked, error);
        if (status == DSV4_OK && gradient->previous != NULL) gradient->previous->marked = 1;
    }
    for (int64_t i = 0; i < batch->segment_count && status == DSV4_OK; i++) {
        const dsv4_state *state = batch->segments[i].state, *next = back->g.segments[i].next;
        if ((state != NULL && state->marked) || (next != NULL && next->marked))
            status = dsv4__fail(error, DSV4_ERROR_STATE, "segment %lld: its state or next is a previous of this call",
                                (long long)i);
    }
    for (int64_t i = 0; i < checked; i++)
        if (back->g.segments[i].previous != NULL) back->g.segments[i].previous->marked = 0;
    return status;
}

static dsv4_status dsv4__check_gradients(dsv4__back *back, dsv4_error *error) {
    const dsv4_compressor *c = back->call.c;
    dsv4_batch *batch = &back->call.batch;
    dsv4_gradients *g = &back->g;
    if (batch->entries < 0) return dsv4__fail(error, DSV4_ERROR_ARGUMENT, "entries is %lld", (long long)batch->entries);
    if (batch->tokens > 0)
        DSV4__TRY(dsv4__check_const_matrix(&batch->x, batch->tokens, c->config.hidden_dim, "x", error));
    if (batch->entries > 0)
        DSV4__TRY(dsv4__check_const_matrix(&g->dout, batch->entries, c->config.head_dim, "dout", error));
    if (g->dx.data != NULL) DSV4__TRY(dsv4__check_matrix(&g->dx, batch->tokens, c->config.hidden_dim, "dx", error));
    DSV4__TRY(dsv4__check_param_gradients(back, error));
    DSV4__TRY(dsv4__check_segments(c, batch, error));
    return dsv4__check_all_carried(back, error);
}

/* ---- Backward ----------------------------------------------------------------------------------------------- */

static void dsv4__run_chunk(dsv4__back *back) {
    const dsv4_compressor *c = back->call.c;
    const int64_t rows = dsv4__max(back->rows, back->context), work = rows * c->columns;
    dsv4__call *call = &back->call;
    if (back->recompute) dsv4__recompute(back);
    dsv4__for_threads(call, dsv4__repool_task, back, work * 16);
    dsv4__for_threads(call, dsv4__entries_back_task, back, back->windows * c->config.head_dim * 16);
    dsv4__for_threads(call, dsv4__windows_back_task, back, work * 16);
    if (back->g.dx.data == NULL && !dsv4__wants_weights(back)) return;
    dsv4__for_threads(call, dsv4__pack_back_task, back, work * 4);
    dsv4__for_threads(call, dsv4__tokens_task, back, work * c->config.hidden_dim);
    if (dsv4__wants_weights(back)) dsv4__queue_for_weights(back);
}

/* The gradient of the state before a segment: rows whose window closes later still are those of the state after it; the
 * others are written with the windows. */
static void dsv4__begin_previous(const dsv4__back *back, int64_t index) {
    const dsv4_compressor *c = back->call.c;
    const dsv4_segment *segment = &back->call.batch.segments[index];
    const dsv4_segment_gradient *gradient = &back->g.segments[index];
    const int64_t seen = dsv4_state_tokens(segment->state), closed = (seen + segment->count) / c->config.ratio;
    dsv4_state *previous = gradient->previous;
    previous->origin = segment->state->origin;
    previous->tokens = previous->floor = seen;
    for (int64_t s = 0; s < c->series; s++)
        for (int64_t t = dsv4__state_first(previous, s, seen); t < seen; t++) {
            float *row = dsv4__state_row(previous, s, t);
            if (t / c->config.ratio + dsv4__lag(previous, s) < closed) continue;
            dsv4__copy_or_clear(row, gradient->next != NULL ? dsv4__state_row(gradient->next, s, t) : NULL,
                                (size_t)previous->row * sizeof(float));
        }
}

/* dx of the tokens that drop_tail left out. */
static void dsv4__clear_tails(const dsv4__back *back) {
    const dsv4_matrix dx = back->g.dx;
    const size_t bytes = (size_t)back->call.c->config.hidden_dim * dsv4_dtype_size(dx.dtype);
    for (int64_t i = 0; i < back->call.batch.segment_count && dx.data != NULL; i++) {
        const dsv4_segment *segment = &back->call.batch.segments[i];
        int64_t t = dsv4__tokens_used(&back->call, segment);
        for (; t < segment->count; t++) memset(dsv4__in_mutable(dx, segment->token + t, 0), 0, bytes);
    }
}

DSV4_API dsv4_status dsv4_backward(const dsv4_compressor *compressor, const dsv4_batch *batch,
                                   const dsv4_gradients *gradients, dsv4_workspace *workspace, dsv4_error *error) {
    dsv4__back back;
    memset(&back, 0, sizeof back);
    DSV4__TRY(dsv4__need(compressor, "compressor", error));
    if (!compressor->training)
        return dsv4__fail(error, DSV4_ERROR_ARGUMENT, "the compressor was made without options.training");
    DSV4__TRY(dsv4__begin_call(compressor, batch, workspace, &back.call, error));
    DSV4__TRY(dsv4__need(gradients, "gradients", error));
    back.g = *gradients;
    DSV4__TRY(dsv4__check_gradients(&back, error));
    const dsv4_compressor *c = compressor;
    back.train = &workspace->training;
    back.recompute = batch->kv == NULL;
    back.round = back.call.x_bf16 && c->w_bf16[0] && (c->config.no_gate || c->w_bf16[1]);
    back.steps = back.round && c->config.sums == DSV4_SUMS_TILES;
    memset(&back.call.batch.stages, 0, sizeof back.call.batch.stages);
    if (back.recompute) {
        back.call.batch.kv = back.call.batch.stages.kv = back.train->kv;
        back.call.batch.gate = back.call.batch.stages.gate = back.train->gate;
    }
    for (int64_t i = 0; i < back.call.batch.segment_count && back.g.segments != NULL; i++)
        if (back.g.segments[i].previous != NULL) dsv4__begin_previous(&back, i);
    dsv4__begin_sums(&back, back.g.dape, back.train->dape, c->columns, c->config.ratio, c->columns);
    dsv4__begin_sums(&back, back.g.dnorm, back.train->dnorm, c->config.head_dim, 1, c->config.head_dim);
    for (int64_t m = 0; m < c->matrices && back.g.accumulate; m++) dsv4__begin_weights(&back, m);
    while (dsv4__next_chunk(&back)) dsv4__run_chunk(&back);
    dsv4__add_weights(&back);
    for (int64_t m = 0; m < c->matrices && !back.g.accumulate && !back.started; m++) dsv4__begin_weights(&back, m);
    dsv4__clear_tails(&back);
    dsv4__end_sums(back.g.dape, back.train->dape, c->columns, c->config.ratio, c->columns);
    dsv4__end_sums(back.g.dnorm, back.train->dnorm, c->config.head_dim, 1, c->config.head_dim);
    for (int64_t m = 0; m < c->matrices; m++) dsv4__end_weights(&back, m);
    return DSV4_OK;
}

#ifdef __cplusplus
}
#endif
#if defined(DSV4__PRECISE)
#pragma STDC FP_CONTRACT DEFAULT
#pragma float_control(pop)
#pragma clang diagnostic pop
#endif
#define DSV4__IMPLEMENTED 1
#endif /* DSV4_COMPRESSOR_IMPLEMENTATION */

/* ============================================================================================================
 * 4. Licence: MIT
 *
 * Copyright (c) 2026 the dsv4_compressor.h authors
 *
 * Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
 * documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
 * rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to
 * permit persons to whom the Software is furnished to do so, subject to the following conditions:
 *
 * The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
 * Software.
 *
 * THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
 * WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
 * COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
 * OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
 * ============================================================================================================ */
