/* Rows as caches hold them: numbers of eight and four bits, every format against its definition and PyTorch, packed
 * rows anywhere in memory, pages, and gradients through them. */

#define _POSIX_C_SOURCE 200809L
#define _DEFAULT_SOURCE

#include "runner.h"
#include "fences.h"
#include "golden_file.h"
#include "gradient_support.h"
#include "implementation.h"
#include "oracle_rows.h"

static const dsv4_rows formats[] = {DSV4_ROWS_FP8, DSV4_ROWS_FP8_KEYS, DSV4_ROWS_FP4, DSV4_ROWS_FP4_E4M3};

/* ---- Single numbers ---------------------------------------------------------------------------------------- */

TEST every_code_of_e4m3_has_its_value_and_comes_back(void) {
    for (int code = 0; code < 256; code++) {
        float value = dsv4_e4m3_to_f32((uint8_t)code);
        ASSERT(same_number(value, (float)signed_value(code, e4m3_value)));
        ASSERT_EQ_FMT(code, (int)dsv4_e4m3_from_f32(value), "0x%x");
    }
    PASS();
}

TEST every_code_of_e2m1_has_its_value_and_comes_back(void) {
    for (int code = 0; code < 256; code++) {
        float value = dsv4_e2m1_to_f32((uint8_t)code);
        ASSERT(same_number(value, (float)signed_value(code & 15, e2m1_value)));
        ASSERT_EQ_FMT(code & 15, (int)dsv4_e2m1_from_f32(value), "0x%x");
    }
    PASS();
}

/* NaN keeps its sign in E4M3, as PyTorch has it; infinities become the largest number. */
TEST every_bf16_becomes_the_nearest_code(void) {
    for (uint32_t bits = 0; bits < 65536; bits++) {
        float value = dsv4_bf16_to_f32((dsv4_bf16)bits);
        double clamped = isinf(value) ? copysign(1e30, value) : value;
        int wide = isnan(value) ? 0x7F | (int)(bits >> 15) << 7 : e4m3_code(clamped);
        ASSERT_EQ_FMT(wide, (int)dsv4_e4m3_from_f32(value), "0x%x");
        ASSERT_EQ_FMT(isnan(value) ? 0x7 : e2m1_code(clamped), (int)dsv4_e2m1_from_f32(value), "0x%x");
    }
    PASS();
}

/* Halfway between neighbours, and one fp32 step to either side of it. */
TEST ties_go_to_the_even_code(void) {
    for (int code = 0; code < 0x7E; code++) {
        float middle = (float)((e4m3_value(code) + e4m3_value(code + 1)) / 2);
        for (int step = -1; step <= 1; step++) {
            float value = float_of_bits(bits_of_float(middle) + (uint32_t)step);
            ASSERT_EQ_FMT(e4m3_code(value), (int)dsv4_e4m3_from_f32(value), "0x%x");
            ASSERT_EQ_FMT(e4m3_code(-value), (int)dsv4_e4m3_from_f32(-value), "0x%x");
        }
    }
    for (int code = 0; code < 0x7; code++) {
        float middle = (float)((e2m1_value(code) + e2m1_value(code + 1)) / 2);
        for (int step = -1; step <= 1; step++) {
            float value = float_of_bits(bits_of_float(middle) + (uint32_t)step);
            ASSERT_EQ_FMT(e2m1_code(value), (int)dsv4_e2m1_from_f32(value), "0x%x");
        }
    }
    PASS();
}

/* ---- Arrays of rows ---------------------------------------------------------------------------------------- */

/* Rows of one configuration, as numbers and packed, with room between them. */
typedef struct row_arrays {
    int64_t count, row_stride, scale_stride; /* bytes */
    size_t row_bytes, scale_bytes;
    void *numbers; /* [count, D] */
    dsv4_dtype dtype;
    unsigned char *rows, *scales;
} row_arrays;

static void *poisoned(workbench *w, size_t bytes) { return memset(workbench_memory(w, bytes), POISON, bytes); }

static row_arrays row_arrays_new(workbench *w, const dsv4_config *c, dsv4_dtype dtype, int64_t count, int gap) {
    row_arrays a = {0};
    a.count = count;
    a.dtype = dtype;
    if (dsv4_row_sizes(c, &a.row_bytes, &a.scale_bytes, NULL) != DSV4_OK) exit(1);
    a.row_stride = (int64_t)a.row_bytes + gap;
    a.scale_stride = (int64_t)a.scale_bytes + gap;
    a.numbers = poisoned(w, (size_t)(count * c->head_dim) * dsv4_dtype_size(dtype));
    a.rows = poisoned(w, (size_t)(count * a.row_stride));
    a.scales = poisoned(w, (size_t)(count * a.scale_stride));
    return a;
}

static dsv4_matrix packed_matrix(void *data, int64_t stride) { return (dsv4_matrix){data, DSV4_PACKED, stride}; }

static dsv4_const_matrix const_matrix(const void *data, dsv4_dtype dtype, int64_t stride) {
    return (dsv4_const_matrix){data, dtype, stride};
}

static dsv4_status quantise(const engine *e, const void *plain, dsv4_dtype dtype, const row_arrays *a, int packed) {
    dsv4_quantised to = {a->count, matrix_of(a->numbers, a->dtype), {0}};
    if (packed) {
        to.out = packed_matrix(a->rows, a->row_stride);
        to.scales = packed_matrix(a->scales, a->scale_stride);
    }
    return dsv4_quantise(e->compressor, const_matrix(plain, dtype, 0), &to, e->workspace, NULL);
}

static dsv4_status unpack(const dsv4_config *c, const row_arrays *a, void *to, dsv4_dtype dtype) {
    return dsv4_unpack(c, a->count, const_matrix(a->rows, DSV4_PACKED, a->row_stride),
                       const_matrix(a->scales, DSV4_PACKED, a->scale_stride), matrix_of(to, dtype), NULL);
}

/* Whether the kernels of a set give the numbers that dsv4_unpack gave, in fp32 and as bf16. */
static const char *sets_unpack_alike(workbench *w, const char *isa, const row_arrays *a, const float *numbers) {
    const dsv4_config *c = &w->config;
    const int64_t count = a->count * c->head_dim;
    float *wide = workbench_memory(w, (size_t)count * sizeof *wide);
    dsv4_bf16 *narrow = workbench_memory(w, (size_t)count * sizeof *narrow);
    const char *fault = NULL;
    const dsv4_const_matrix rows = const_matrix(a->rows, DSV4_PACKED, a->row_stride);
    const dsv4_const_matrix scales = const_matrix(a->scales, DSV4_PACKED, a->scale_stride);
    const dsv4_matrix to_wide = {wide, DSV4_F32, c->head_dim}, to_narrow = {narrow, DSV4_BF16, c->head_dim};
    unpack_by(isa, c, a->count, rows, scales, to_wide);
    unpack_by(isa, c, a->count, rows, scales, to_narrow);
    for (int64_t i = 0; i < count; i++) {
        if (!same_number(wide[i], numbers[i])) fault = "what this set unpacks";
        if (!same_number(dsv4_bf16_to_f32(narrow[i]), bf16_of(numbers[i]))) fault = "what this set unpacks as bf16";
    }
    return fault;
}

/* Whether quantised `plain`, packed, read back at once and unpacked, is what the definition says. */
static const char *rows_fault(const dsv4_config *c, const char *isa, const void *plain, dsv4_dtype dtype,
                              int64_t count) {
    workbench w = workbench_with(model_of(c, DSV4_F32, 3), (sequence){0}, dtype); /* its weights are of no use */
    engine e = workbench_engine(&w, isa, NULL);
    row_arrays a = row_arrays_new(&w, c, dtype, count, 3);
    unsigned char *row = workbench_memory(&w, a.row_bytes), *scales = workbench_memory(&w, a.scale_bytes);
    float *back = workbench_memory(&w, (size_t)(count * c->head_dim) * sizeof *back);
    const char *fault = NULL;
    if (quantise(&e, plain, dtype, &a, 0) || quantise(&e, plain, dtype, &a, 1) || unpack(c, &a, back, DSV4_F32))
        fault = "refused";
    else
        fault = sets_unpack_alike(&w, isa, &a, back);
    for (int64_t r = 0; r < count && !fault; r++) {
        const char *from = (const char *)plain + (size_t)(r * c->head_dim) * dsv4_dtype_size(dtype);
        row_truth t = row_truth_of(c, from, dtype);
        memset(row, 0, a.row_bytes);
        row_truth_pack(c, &t, row, scales);
        if (memcmp(row, a.rows + r * a.row_stride, a.row_bytes) != 0) fault = "codes";
        if (memcmp(scales, a.scales + r * a.scale_stride, a.scale_bytes) != 0) fault = "scales";
        if (!memory_untouched(a.rows + r * a.row_stride + a.row_bytes, 3) ||
            !memory_untouched(a.scales + r * a.scale_stride + a.scale_bytes, 3))
            fault = "bytes between rows";
        for (int64_t i = 0; i < c->head_dim && !fault; i++) {
            const float read = (float)number(a.numbers, dtype, r * c->head_dim + i);
            const float expected = dtype == DSV4_BF16 ? bf16_of(t.read[i]) : t.read[i];
            const float unpacked = i < t.coded ? t.read[i] : bf16_of(t.read[i]);
            if (!same_number(read, expected)) fault = "what is read back";
            if (!same_number(back[r * c->head_dim + i], unpacked)) fault = "what is unpacked";
        }
        row_truth_free(&t);
    }
    workbench_free(&w);
    return fault;
}

/* Rows of any size: blocks that the row's end cuts short, one channel, odd ones, RoPE over all or nothing. */
TEST rows_of_every_size_are_as_defined(const char *isa) {
    static const int64_t dims[] = {1, 2, 4, 16, 30, 64, 100, 128, 150, 192, 256, 512, 1024};
    dice d = {11};
    for (size_t k = 0; k < sizeof formats / sizeof *formats; k++)
        for (size_t i = 0; i < sizeof dims / sizeof *dims; i++)
            for (int narrow = 0; narrow < 2; narrow++) {
                dsv4_config c = {.hidden_dim = 2, .head_dim = dims[i], .ratio = 1, .rows = formats[k]};
                c.rope_dim = dice_below(&d, dims[i] / 2 + 1) * 2;
                c.rounding = dice_below(&d, 2) ? DSV4_ROUND_ROW : 0;
                if (c.head_dim % 2 && formats[k] == DSV4_ROWS_FP4_E4M3) continue;
                if ((c.head_dim % 2 || c.head_dim & (c.head_dim - 1)) && formats[k] == DSV4_ROWS_FP4) continue;
                void *plain = random_array(narrow ? DSV4_BF16 : DSV4_F32, 5 * c.head_dim, dice_next(&d), 3);
                const char *fault = rows_fault(&c, isa, plain, narrow ? DSV4_BF16 : DSV4_F32, 5);
                free(plain);
                ASSERTm(fault, !fault);
            }
    PASS();
}

/* Magnitudes from subnormal scales' neighbourhood to overflow, zeros of both signs, numbers at the edges of codes. */
TEST rows_of_every_magnitude_are_as_defined(const char *isa) {
    dice d = {5};
    for (size_t k = 0; k < sizeof formats / sizeof *formats; k++)
        for (int exponent = -120; exponent <= 120; exponent += 6) {
            const dsv4_config c = {.hidden_dim = 2, .head_dim = 128, .ratio = 1, .rope_dim = 16, .rows = formats[k]};
            float plain[3 * 128];
            for (int i = 0; i < 3 * 128; i++) {
                plain[i] = (float)ldexp(dice_real(&d), exponent - (int)dice_below(&d, 12) * (i / 128));
                if (fabsf(plain[i]) < 0x1p-126f) plain[i] = dice_below(&d, 2) ? -0.0f : 0.0f;
                if (dice_below(&d, 3) == 0) plain[i] = (float)ldexp((double)dice_below(&d, 17) / 2, exponent);
            }
            const char *fault = rows_fault(&c, isa, plain, DSV4_F32, 3);
            ASSERTm(fault, !fault);
        }
    PASS();
}

/* Other blocks are as if the block were not there. */
TEST a_block_with_a_nan_or_an_infinity_reads_back_as_nan(const char *isa) {
    static const float odd[] = {NAN, INFINITY, -INFINITY};
    for (size_t k = 0; k < sizeof formats / sizeof *formats; k++) {
        const int block = rule_of(formats[k]).block;
        for (int where = 0; where < 2 * block; where += block - 1) {
            dsv4_config c = {.hidden_dim = 2, .head_dim = 512, .ratio = 1, .rows = formats[k]};
            if (c.rows == DSV4_ROWS_FP4) c.head_dim = 32; /* Hadamard spreads it over the whole row */
            float *plain = random_array(DSV4_F32, c.head_dim, 4, 1);
            plain[where % (int)c.head_dim] = odd[where % 3];
            const char *fault = rows_fault(&c, isa, plain, DSV4_F32, 1);
            row_truth t = row_truth_of(&c, plain, DSV4_F32);
            const int first = where % (int)c.head_dim / block * block;
            int nans = 0;
            for (int64_t i = 0; i < c.head_dim; i++) nans += isnan(t.read[i]) && i >= first && i < first + block;
            free(plain);
            row_truth_free(&t);
            ASSERTm(fault, !fault);
            ASSERT_EQ_FMT(block, nans, "%d");
        }
    }
    PASS();
}

/* Any bytes: each number is code times scale. Few rows go through the scalar kernels, many through the best. */
TEST any_bytes_unpack_to_code_times_scale(dsv4_rows rows, int64_t count) {
    dsv4_config c = {.hidden_dim = 1, .head_dim = 150, .ratio = 1, .rope_dim = 22, .rows = rows};
    if (rows == DSV4_ROWS_FP4) c.head_dim = 128;
    workbench w = {0};
    row_arrays a = row_arrays_new(&w, &c, DSV4_F32, count, 1);
    dice d = {(uint64_t)rows};
    for (int64_t i = 0; i < count * a.row_stride; i++) a.rows[i] = (unsigned char)dice_below(&d, 256);
    for (int64_t i = 0; i < count * a.scale_stride; i++) a.scales[i] = (unsigned char)dice_below(&d, 256);
    ASSERT_EQ(DSV4_OK, unpack(&c, &a, a.numbers, DSV4_F32));
    for (int64_t r = 0; r < count; r++)
        for (int64_t i = 0; i < c.head_dim; i++) {
            const unsigned char *row = a.rows + r * a.row_stride, *scales = a.scales + r * a.scale_stride;
            float expected;
            if (!packed_number(&c, row, scales, i, &expected)) continue;
            ASSERT(same_number(expected, ((const float *)a.numbers)[r * c.head_dim + i]));
        }
    workbench_free(&w);
    PASS();
}

/* ---- PyTorch's rows ---------------------------------------------------------------------------------------- */

static const char *const files[] = {
    "rows_fp4",          "rows_fp4_e4m3", "rows_fp4_none", "rows_fp8",     "rows_fp8_keys",
    "rows_fp8_keys_odd", "rows_fp8_none", "rows_fp8_odd",  "rows_fp8_row",
};

static golden rows_open(const char *file, const st_tensor **plain) {
    golden g = golden_open(file);
    *plain = st_find(&g.file, "plain");
    return g;
}

/* The codes and scales of packed rows, by number, beside the file's. */
static int packed_agrees(const golden *g, const row_arrays *a) {
    const unsigned char *codes = st_find(&g->file, "codes")->data, *scales = st_find(&g->file, "scales")->data;
    const row_rule rule = rule_of(g->w.config.rows);
    const int64_t coded = st_find(&g->file, "codes")->shape[2], blocks = st_find(&g->file, "scales")->shape[2];
    for (int64_t r = 0; r < a->count; r++) {
        const unsigned char *row = a->rows + r * a->row_stride, *scale = a->scales + r * a->scale_stride;
        for (int64_t i = 0; i < coded; i++)
            if (codes[r * coded + i] != (rule.wide ? row[i] : row[i / 2] >> (4 * (i % 2)) & 15)) return 0;
        for (int64_t b = 0; b < blocks; b++) {
            const unsigned char *s = scale + b * rule.scale_bytes;
            const int number_of = rule.scale_bytes == 4 ? (s[3] << 1 | s[2] >> 7) & 0xFF : *s;
            if (scales[r * blocks + b] != number_of) return 0;
        }
    }
    return 1;
}

TEST pytorchs_entries_quantise_to_pytorchs_rows(const char *file, const char *isa) {
    const st_tensor *plain;
    golden g = rows_open(file, &plain);
    engine e = workbench_engine(&g.w, isa, NULL);
    row_arrays a = row_arrays_new(&g.w, &g.w.config, g.w.out_dtype, g.w.entries, 0);
    ASSERT_EQ(DSV4_OK, quantise(&e, plain->data, g.w.out_dtype, &a, 0));
    ASSERT_EQ(DSV4_OK, quantise(&e, plain->data, g.w.out_dtype, &a, 1));
    const st_tensor *out = st_find(&g.file, "out");
    ASSERT_MEM_EQ(out->data, a.numbers, (size_t)out->count * dsv4_dtype_size(g.w.out_dtype));
    ASSERT(packed_agrees(&g, &a));
    golden_close(&g);
    PASS();
}

/* A call gives the rows of the entries that it would give without a format. */
TEST a_call_quantises_its_own_entries(const char *file, const char *isa) {
    const st_tensor *plain;
    golden g = rows_open(file, &plain);
    results entries = {0}, r = {0};
    ASSERT_EQ(DSV4_OK, golden_compress(&g, isa, &r, NULL));
    g.w.m.config.rows = DSV4_ROWS_PLAIN;
    ASSERT_EQ(DSV4_OK, golden_compress(&g, isa, &entries, NULL));
    for (int stage = 0; stage < STAGE_OUT; stage++) ASSERT_MEM_EQ(entries.stage[stage], r.stage[stage], r.bytes[stage]);
    int64_t equal = 0, most = 0;
    for (int64_t i = 0; i < plain->count; i++) {
        const double expected = number(plain->data, g.w.out_dtype, i), got = result(&entries, STAGE_OUT, i);
        const int64_t steps = bf16_steps(expected, got);
        equal += expected == got;
        most = steps > most ? steps : most;
        if (g.w.out_dtype == DSV4_F32) ASSERT_IN_RANGE(expected, got, 2e-5);
    }
    if (g.w.out_dtype == DSV4_BF16) ASSERT(most <= 2 && (double)equal >= 0.985 * (double)plain->count);
    for (int64_t row = 0; row < r.entries; row++) {
        const size_t size = dsv4_dtype_size(g.w.out_dtype), offset = (size_t)(row * g.w.config.head_dim) * size;
        const char *entry = (const char *)entries.stage[STAGE_OUT] + offset;
        row_truth t = row_truth_of(&g.w.config, entry, g.w.out_dtype);
        for (int64_t i = 0; i < g.w.config.head_dim && g.w.config.rounding & DSV4_ROUND_ROW; i++)
            ASSERT(same_number(t.read[i], (float)result(&r, STAGE_OUT, row * g.w.config.head_dim + i)));
        row_truth_free(&t);
    }
    golden_close(&g);
    PASS();
}

/* ---- Calls ------------------------------------------------------------------------------------------------- */

/* A sequence compressed with a format, in one call of whole rows. */
typedef struct row_call {
    workbench w;
    row_arrays a;
} row_call;

/* ... by one kernel set. */
static row_call row_call_by(const char *isa, dsv4_rows rows, int gap) {
    const dsv4_config c = {.hidden_dim = 40,
                           .head_dim = 128,
                           .ratio = 4,
                           .overlap = 1,
                           .rope_dim = 32,
                           .rows = rows,
                           .rounding = DSV4_ROUNDING_DEEPSEEK};
    row_call r = {.w = workbench_with(model_of(&c, DSV4_BF16, 21), sequence_new(&c, DSV4_BF16, 400, 22), DSV4_BF16)};
    r.w.e = workbench_engine(&r.w, isa, NULL);
    r.a = row_arrays_new(&r.w, &c, DSV4_BF16, r.w.entries, gap);
    return r;
}

static row_call row_call_new(dsv4_rows rows, int gap) { return row_call_by(NULL, rows, gap); }

static dsv4_batch packed_batch(const row_call *r, const row_arrays *a) {
    dsv4_batch b = batch_reading(&r->w.s, a->count, NULL, 0);
    b.out = packed_matrix(a->rows, a->row_stride);
    b.scales = packed_matrix(a->scales, a->scale_stride);
    return b;
}

TEST packed_and_unpacked_is_what_is_read_back(dsv4_rows rows) {
    row_call r = row_call_new(rows, 5);
    dsv4_batch packed = packed_batch(&r, &r.a), read = packed;
    read.out = matrix_of(r.a.numbers, DSV4_BF16);
    void *latent[2] = {workbench_memory(&r.w, 400 * 128), workbench_memory(&r.w, 400 * 128)};
    void *back = workbench_memory(&r.w, 100 * 128 * 2);
    packed.stages.latent = latent[0];
    read.stages.latent = latent[1];
    ASSERT_EQ(DSV4_OK, workbench_compress(&r.w, &packed));
    ASSERT_EQ(DSV4_OK, workbench_compress(&r.w, &read));
    ASSERT_EQ(DSV4_OK, unpack(&r.w.config, &r.a, back, DSV4_BF16));
    ASSERT_MEM_EQ(r.a.numbers, back, 100 * 128 * 2);
    ASSERT_MEM_EQ(latent[0], latent[1], 100 * 128 * 2); /* bf16 beside packed rows */
    workbench_free(&r.w);
    PASS();
}

/* At every offset from the pages before and behind, which may not be touched. */
TEST packed_rows_stay_within_their_bytes(dsv4_rows rows, const char *isa) {
    row_call r = row_call_by(isa, rows, 0);
    dsv4_batch expected = packed_batch(&r, &r.a);
    ASSERT_EQ(DSV4_OK, workbench_compress(&r.w, &expected));
    const size_t rows_size = (size_t)r.w.entries * r.a.row_bytes, scales_size = (size_t)r.w.entries * r.a.scale_bytes;
    const size_t numbers_size = (size_t)(r.w.entries * r.w.config.head_dim) * sizeof(float);
    for (int k = 0; k < 16; k++) {
        const size_t offset = (size_t)k / 2;
        const int behind = k % 2; /* they begin `offset` bytes behind a fence, or end so far before one */
        fenced place = fenced_new(rows_size + offset), scales = fenced_new(scales_size + offset);
        fenced numbers = fenced_new(numbers_size);
        dsv4_batch b = expected;
        b.out.data = behind ? place.first + offset : place.data;
        b.scales.data = behind ? scales.first + offset : scales.data;
        ASSERT_EQ(DSV4_OK, workbench_compress(&r.w, &b));
        ASSERT_MEM_EQ(r.a.rows, b.out.data, rows_size);
        ASSERT_MEM_EQ(r.a.scales, b.scales.data, scales_size);
        unpack_by(isa, &r.w.config, r.w.entries, const_matrix(b.out.data, DSV4_PACKED, (int64_t)r.a.row_bytes),
                  const_matrix(b.scales.data, DSV4_PACKED, (int64_t)r.a.scale_bytes),
                  (dsv4_matrix){behind ? numbers.first : numbers.data, DSV4_F32, r.w.config.head_dim});
        fenced_free(&place);
        fenced_free(&scales);
        fenced_free(&numbers);
    }
    workbench_free(&r.w);
    PASS();
}

/* Pages of eight rows in any order, two sequences, chunks across the ends of pages; some entries not stored at all. */
TEST entries_go_to_the_rows_that_they_are_given(dsv4_rows rows) {
    row_call r = row_call_new(rows, 0);
    dsv4_batch whole = packed_batch(&r, &r.a);
    ASSERT_EQ(DSV4_OK, workbench_compress(&r.w, &whole));
    row_arrays paged = row_arrays_new(&r.w, &r.w.config, DSV4_BF16, 128, 9);
    dsv4_state *state = workbench_state(&r.w, 0);
    int64_t done = 0, entry_rows[128];
    for (int64_t count = 1; done < 400; done += count, count = count * 3 % 101) {
        if (count > 400 - done) count = 400 - done;
        const int64_t first = done / 4, last = (done + count) / 4;
        for (int64_t i = first; i < last; i++) {
            const int64_t page = 15 - i / 8;
            entry_rows[i - first] = i % 7 == 3 ? -1 - i : page * 8 + i % 8;
        }
        dsv4_segment part = segment_new(done, count, done, INT64_MIN, state); /* its `entry` is not looked at */
        dsv4_batch b = packed_batch(&r, &paged);
        b.segments = &part;
        b.segment_count = 1;
        b.entry_rows = entry_rows;
        ASSERT_EQ(DSV4_OK, workbench_compress(&r.w, &b));
    }
    for (int64_t i = 0; i < 100; i++) {
        const int64_t row = (15 - i / 8) * 8 + i % 8;
        if (i % 7 == 3) {
            ASSERT(memory_untouched(paged.rows + row * paged.row_stride, paged.row_bytes));
            ASSERT(memory_untouched(paged.scales + row * paged.scale_stride, paged.scale_bytes));
            continue;
        }
        ASSERT_MEM_EQ(r.a.rows + i * r.a.row_stride, paged.rows + row * paged.row_stride, r.a.row_bytes);
        ASSERT_MEM_EQ(r.a.scales + i * r.a.scale_stride, paged.scales + row * paged.scale_stride, r.a.scale_bytes);
    }
    workbench_free(&r.w);
    PASS();
}

/* Plain entries and every stage by entry, of many short sequences in one call. */
TEST stages_follow_the_rows_of_their_entries(void) {
    enum { SEQUENCES = 60, ENTRIES = 3 * SEQUENCES };
    const dsv4_config c = {.hidden_dim = 16, .head_dim = 20, .ratio = 3, .overlap = 1, .rope_dim = 4};
    workbench w = workbench_for(&c, DSV4_F32, 3 * ENTRIES, 8);
    results apart = workbench_results(&w), r = workbench_results(&w);
    dsv4_segment segments[SEQUENCES];
    int64_t entry_rows[ENTRIES];
    for (int64_t i = 0; i < SEQUENCES; i++) segments[i] = segment_new(9 * i, 9, 0, 3 * i, NULL);
    for (int64_t i = 0; i < ENTRIES; i++) entry_rows[i] = i * 7 % ENTRIES;
    dsv4_batch b = batch_new(&w.s, &r, segments, SEQUENCES);
    ASSERT_EQ(DSV4_OK, workbench_compress(&w, &b));
    b = batch_new(&w.s, &apart, segments, SEQUENCES);
    b.entry_rows = entry_rows;
    ASSERT_EQ(DSV4_OK, workbench_compress(&w, &b));
    for (int stage = STAGE_WEIGHTS; stage < STAGE_COUNT; stage++) {
        const size_t bytes = r.bytes[stage] / ENTRIES;
        for (int64_t i = 0; i < ENTRIES; i++)
            ASSERT_MEM_EQ((const char *)r.stage[stage] + (size_t)i * bytes,
                          (const char *)apart.stage[stage] + (size_t)entry_rows[i] * bytes, bytes);
    }
    workbench_free(&w);
    PASS();
}

TEST a_row_beyond_the_arrays_is_refused_before_anything_is_written(void) {
    row_call r = row_call_new(DSV4_ROWS_FP8, 0);
    dsv4_batch b = packed_batch(&r, &r.a);
    int64_t entry_rows[100];
    for (int64_t i = 0; i < 100; i++) entry_rows[i] = i;
    entry_rows[99] = 100;
    b.entry_rows = entry_rows;
    dsv4_error error = {0};
    ASSERT_EQ(DSV4_ERROR_BOUNDS, dsv4_compress(r.w.e.compressor, &b, r.w.e.workspace, &error));
    ASSERT_STR_EQ("segment 0: entry_rows[99] is 100, of 100", error.text);
    ASSERT(memory_untouched(r.a.rows, 100 * r.a.row_bytes));
    workbench_free(&r.w);
    PASS();
}

/* ---- Refusals ---------------------------------------------------------------------------------------------- */

#define ASSERT_REFUSED(status, message, call) \
    do {                                      \
        dsv4_error refused = {0};             \
        dsv4_error *error = &refused;         \
        ASSERT_EQ(status, call);              \
        ASSERT_STR_EQ(message, refused.text); \
    } while (0)

TEST rows_that_a_format_cannot_have_are_refused(void) {
    dsv4_config c = dsv4_preset_config(DSV4_V4_FLASH_CSA);
    size_t row, scales;
    ASSERT_REFUSED(DSV4_ERROR_CONFIG, "rows are plain: nothing to pack", dsv4_row_sizes(&c, &row, &scales, error));
    c.rows = DSV4_ROWS_COUNT;
    ASSERT_REFUSED(DSV4_ERROR_CONFIG, "rows is 5, beyond the formats that are known", dsv4_config_check(&c, error));
    c.rows = DSV4_ROWS_FP4;
    c.head_dim = 96;
    ASSERT_REFUSED(DSV4_ERROR_CONFIG, "rows are FP4, but head_dim 96 is no power of two", dsv4_config_check(&c, error));
    c.head_dim = 1;
    c.rope_dim = 0;
    ASSERT_REFUSED(DSV4_ERROR_CONFIG, "rows are packed in pairs, but head_dim is 1",
                   dsv4_row_sizes(&c, &row, &scales, error));
    c.rows = DSV4_ROWS_FP8;
    ASSERT_REFUSED(DSV4_ERROR_NULL, "row is null", dsv4_row_sizes(&c, NULL, &scales, error));
    ASSERT_REFUSED(DSV4_ERROR_NULL, "scales is null", dsv4_row_sizes(&c, &row, NULL, error));
    PASS();
}

TEST packed_arrays_are_checked_before_anything_is_written(void) {
    row_call r = row_call_new(DSV4_ROWS_FP8, 0);
    const dsv4_batch good = packed_batch(&r, &r.a);
    dsv4_batch b = good;
    b.out.data = NULL;
    ASSERT_REFUSED(DSV4_ERROR_NULL, "out is null", dsv4_compress(r.w.e.compressor, &b, r.w.e.workspace, error));
    b = good;
    b.scales.data = NULL;
    ASSERT_REFUSED(DSV4_ERROR_NULL, "scales is null", dsv4_compress(r.w.e.compressor, &b, r.w.e.workspace, error));
    b = good;
    b.scales.dtype = DSV4_F32;
    ASSERT_REFUSED(DSV4_ERROR_ARGUMENT, "dtype of scales is 1, not PACKED",
                   dsv4_compress(r.w.e.compressor, &b, r.w.e.workspace, error));
    b = good;
    b.out.stride = (int64_t)r.a.row_bytes - 1;
    ASSERT_REFUSED(DSV4_ERROR_ARGUMENT, "stride of out is 159 for rows of 160",
                   dsv4_compress(r.w.e.compressor, &b, r.w.e.workspace, error));
    b = good;
    b.x.dtype = DSV4_PACKED;
    ASSERT_REFUSED(DSV4_ERROR_ARGUMENT, "dtype of x is 3, neither F32 nor BF16",
                   dsv4_compress(r.w.e.compressor, &b, r.w.e.workspace, error));
    ASSERT(memory_untouched(r.a.rows, 100 * r.a.row_bytes));
    ASSERT(memory_untouched(r.a.scales, 100 * r.a.scale_bytes));
    r.w.m.config.rows = DSV4_ROWS_PLAIN;
    r.w.e = workbench_engine(&r.w, NULL, NULL);
    b = good;
    ASSERT_REFUSED(DSV4_ERROR_CONFIG, "rows are plain: nothing to pack",
                   dsv4_compress(r.w.e.compressor, &b, r.w.e.workspace, error));
    workbench_free(&r.w);
    PASS();
}

TEST rows_of_the_callers_own_are_checked_too(void) {
    row_call r = row_call_new(DSV4_ROWS_FP8, 0);
    const dsv4_config *c = &r.w.config;
    const dsv4_const_matrix plain = const_matrix(r.a.numbers, DSV4_BF16, 0);
    const dsv4_const_matrix rows = const_matrix(r.a.rows, DSV4_PACKED, 0),
                            scales = const_matrix(r.a.scales, DSV4_PACKED, 0);
    const dsv4_matrix numbers = matrix_of(r.a.numbers, DSV4_BF16);
    dsv4_quantised to = {-1, packed_matrix(r.a.rows, 0), packed_matrix(r.a.scales, 0)};
    ASSERT_REFUSED(DSV4_ERROR_ARGUMENT, "count is -1",
                   dsv4_quantise(r.w.e.compressor, plain, &to, r.w.e.workspace, error));
    ASSERT_REFUSED(DSV4_ERROR_NULL, "rows is null",
                   dsv4_quantise(r.w.e.compressor, plain, NULL, r.w.e.workspace, error));
    ASSERT_REFUSED(DSV4_ERROR_NULL, "workspace is null", dsv4_quantise(r.w.e.compressor, plain, &to, NULL, error));
    to.count = 1;
    ASSERT_REFUSED(DSV4_ERROR_NULL, "plain is null",
                   dsv4_quantise(r.w.e.compressor, const_matrix(NULL, DSV4_F32, 0), &to, r.w.e.workspace, error));
    to.out.data = NULL;
    ASSERT_REFUSED(DSV4_ERROR_NULL, "out is null", dsv4_quantise(r.w.e.compressor, plain, &to, r.w.e.workspace, error));
    to.count = 0;
    ASSERT_EQ(DSV4_OK, dsv4_quantise(r.w.e.compressor, plain, &to, r.w.e.workspace, NULL));
    ASSERT_REFUSED(DSV4_ERROR_ARGUMENT, "count is -1", dsv4_unpack(c, -1, rows, scales, numbers, error));
    ASSERT_REFUSED(DSV4_ERROR_ARGUMENT, "dtype of rows is 2, not PACKED",
                   dsv4_unpack(c, 1, plain, scales, numbers, error));
    ASSERT_REFUSED(DSV4_ERROR_ARGUMENT, "dtype of scales is 2, not PACKED",
                   dsv4_unpack(c, 1, rows, plain, numbers, error));
    ASSERT_REFUSED(DSV4_ERROR_NULL, "numbers is null",
                   dsv4_unpack(c, 1, rows, scales, matrix_of(NULL, DSV4_BF16), error));
    ASSERT_REFUSED(DSV4_ERROR_NULL, "config is null", dsv4_unpack(NULL, 1, rows, scales, numbers, error));
    ASSERT_EQ(DSV4_OK, dsv4_unpack(c, 0, rows, scales, numbers, NULL));
    workbench_free(&r.w);
    PASS();
}

/* All of it is RoPE's: nothing to code, no scales, which may then be missing, or be anything. */
TEST fp8_rows_of_rope_alone_have_no_scales(void) {
    row_call r = row_call_new(DSV4_ROWS_FP8, 0);
    r.w.config.rope_dim = r.w.m.config.rope_dim = 128;
    r.w.e = workbench_engine(&r.w, NULL, NULL);
    row_arrays a = row_arrays_new(&r.w, &r.w.config, DSV4_BF16, r.w.entries, 0);
    ASSERT_EQ(0, a.scale_bytes);
    dsv4_batch b = packed_batch(&r, &a);
    memset(&b.scales, 0, sizeof b.scales);
    ASSERT_EQ(DSV4_OK, workbench_compress(&r.w, &b));
    b.scales = (dsv4_matrix){a.rows, DSV4_PACKED, INT64_MAX};
    ASSERT_EQ(DSV4_OK, workbench_compress(&r.w, &b));
    ASSERT_EQ(DSV4_OK, dsv4_unpack(&r.w.config, r.w.entries, const_matrix(a.rows, DSV4_PACKED, 0),
                                   const_matrix(NULL, DSV4_PACKED, 0), matrix_of(a.numbers, DSV4_BF16), NULL));
    dsv4_quantised to = {r.w.entries, packed_matrix(r.a.rows, 2 * 128), {a.rows, DSV4_PACKED, INT64_MAX}};
    r.a.rows = workbench_memory(&r.w, 2 * 128 * 100);
    to.out.data = r.a.rows;
    ASSERT_EQ(DSV4_OK,
              dsv4_quantise(r.w.e.compressor, const_matrix(a.numbers, DSV4_BF16, 0), &to, r.w.e.workspace, NULL));
    ASSERT_MEM_EQ(a.rows, r.a.rows, 2 * 128 * 100);
    workbench_free(&r.w);
    PASS();
}

/* What the published models use: entries FP8, their indexers' keys FP4, V4.1's entries FP4 with E4M3 scales; in the
 * sizes that engines' caches have. */
TEST presets_know_their_rows(void) {
    static const struct {
        dsv4_preset preset;
        dsv4_rows rows;
        size_t row, scales;
    } published[] = {
        {DSV4_V4_FLASH_CSA, DSV4_ROWS_FP8, 576 - 64, 0},      {DSV4_V4_PRO_HCA, DSV4_ROWS_FP8, 0, 0},
        {DSV4_V4_FLASH_INDEXER, DSV4_ROWS_FP4, 64, 4},        {DSV4_V4_PRO_INDEXER, DSV4_ROWS_FP4, 64, 4},
        {DSV4_V41_FLASH_RATIO2, DSV4_ROWS_FP4_E4M3, 256, 32}, {DSV4_V41_FLASH_RATIO1, DSV4_ROWS_FP4_E4M3, 256, 32},
    };
    for (size_t i = 0; i < sizeof published / sizeof *published; i++) {
        dsv4_config c = dsv4_preset_config(published[i].preset);
        size_t row, scales;
        ASSERT_EQ(DSV4_ROWS_PLAIN, c.rows);
        c.rows = dsv4_preset_rows(published[i].preset);
        ASSERT_EQ(published[i].rows, c.rows);
        ASSERT_EQ(DSV4_OK, dsv4_row_sizes(&c, &row, &scales, NULL));
        ASSERT_EQ(c.rows == DSV4_ROWS_FP8 ? 576 : published[i].row, row);
        ASSERT_EQ(c.rows == DSV4_ROWS_FP8 ? 7 : published[i].scales, scales);
    }
    dsv4_config keys = dsv4_preset_config(DSV4_V4_FLASH_INDEXER);
    size_t row, scales;
    keys.rows = DSV4_ROWS_FP8_KEYS;
    ASSERT_EQ(DSV4_OK, dsv4_row_sizes(&keys, &row, &scales, NULL));
    ASSERT(row == 128 && scales == 4);
    ASSERT_EQ(DSV4_ROWS_PLAIN, dsv4_preset_rows(DSV4_PRESET_COUNT));
    ASSERT_STR_EQ("fp4-e4m3", dsv4_rows_name(DSV4_ROWS_FP4_E4M3));
    ASSERT_EQ(NULL, dsv4_rows_name(DSV4_ROWS_COUNT));
    ASSERT_EQ(1, dsv4_dtype_size(DSV4_PACKED));
    PASS();
}

/* ---- Gradients --------------------------------------------------------------------------------------------- */

static workbench row_training(dsv4_rows rows, uint64_t seed) {
    const dsv4_config c = {.hidden_dim = 24, .head_dim = 32, .ratio = 4, .overlap = 1, .rope_dim = 8, .rows = rows};
    return training_for(&c, DSV4_F32, DSV4_F32, 64, seed);
}

/* Rounding counts as the identity, so the gradients are those of plain rows; behind Hadamard those of dout turned back,
 * which turns as the rows do. */
TEST gradients_go_straight_through_the_rounding(dsv4_rows rows) {
    workbench w = row_training(rows, 31), plain = row_training(DSV4_ROWS_PLAIN, 31);
    const int64_t dim = w.config.head_dim;
    for (int64_t row = 0; row < 16 && rows == DSV4_ROWS_FP4; row++) hadamard((float *)plain.dout + row * dim, dim);
    gradient_set got = workbench_gradients(&w, DSV4_F32), expected = workbench_gradients(&plain, DSV4_F32);
    ASSERT_EQ(DSV4_OK, backward_whole(&w, &w.e, &got));
    ASSERT_EQ(DSV4_OK, backward_whole(&plain, &plain.e, &expected));
    ASSERT_STR_EQ("no gradient", gradient_name(gradient_difference(&got, &expected, 0)));
    workbench_free(&w);
    workbench_free(&plain);
    PASS();
}

/* dout lies where out does; what is not stored has none. */
TEST gradients_come_from_the_rows_of_their_entries(void) {
    workbench w = row_training(DSV4_ROWS_PLAIN, 41);
    gradient_set got = workbench_gradients(&w, DSV4_F32), expected = workbench_gradients(&w, DSV4_F32);
    float *dout = w.dout, *apart = workbench_memory(&w, 16 * 32 * sizeof *apart);
    int64_t entry_rows[16];
    for (int64_t i = 0; i < 16; i++) {
        entry_rows[i] = i == 5 ? -1 : i * 3 % 16;
        if (i == 5) memset(dout + i * 32, 0, 32 * sizeof *dout);
        if (i != 5) memcpy(apart + entry_rows[i] * 32, dout + i * 32, 32 * sizeof *dout);
    }
    ASSERT_EQ(DSV4_OK, backward_whole(&w, &w.e, &expected));
    dsv4_segment halves[2] = {segment_new(0, 32, 0, 0, NULL), segment_new(32, 32, 0, 8, NULL)};
    dsv4_batch b = backward_batch(&w, halves, 2);
    dsv4_gradients to = gradients_into(&expected, dout, DSV4_F32);
    ASSERT_EQ(DSV4_OK, workbench_backward(&w, &b, &to));
    to = gradients_into(&got, apart, DSV4_F32);
    b.entry_rows = entry_rows;
    ASSERT_EQ(DSV4_OK, workbench_backward(&w, &b, &to));
    ASSERT_STR_EQ("no gradient", gradient_name(gradient_difference(&got, &expected, 0)));
    workbench_free(&w);
    PASS();
}

/* ---- Suites ------------------------------------------------------------------------------------------------ */

static void run_numbers(void) {
    RUN_TEST(every_code_of_e4m3_has_its_value_and_comes_back);
    RUN_TEST(every_code_of_e2m1_has_its_value_and_comes_back);
    RUN_TEST(every_bf16_becomes_the_nearest_code);
    RUN_TEST(ties_go_to_the_even_code);
}

static void run_kernels(void) {
    for (const char *isa = dsv4_isa_name(0); isa; isa = isa_after(isa)) {
        RUN_NAMED(isa, rows_of_every_size_are_as_defined, isa);
        RUN_NAMED(isa, rows_of_every_magnitude_are_as_defined, isa);
        RUN_NAMED(isa, a_block_with_a_nan_or_an_infinity_reads_back_as_nan, isa);
        for (size_t f = 0; f < sizeof files / sizeof *files; f++) {
            RUN_NAMED(note("%s_%s", files[f], isa), pytorchs_entries_quantise_to_pytorchs_rows, files[f], isa);
            RUN_NAMED(note("%s_%s", files[f], isa), a_call_quantises_its_own_entries, files[f], isa);
        }
        for (size_t f = 0; f < sizeof formats / sizeof *formats; f++) {
            RUN_NAMED(note("%s_%s", dsv4_rows_name(formats[f]), isa), packed_rows_stay_within_their_bytes, formats[f],
                      isa);
        }
    }
}

static void run_calls(void) {
    for (size_t k = 0; k < sizeof formats / sizeof *formats; k++) {
        const dsv4_rows rows = formats[k];
        RUN_NAMED(dsv4_rows_name(rows), any_bytes_unpack_to_code_times_scale, rows, 3);
        RUN_NAMED(dsv4_rows_name(rows), any_bytes_unpack_to_code_times_scale, rows, 400);
        RUN_NAMED(dsv4_rows_name(rows), packed_and_unpacked_is_what_is_read_back, rows);
        RUN_NAMED(dsv4_rows_name(rows), entries_go_to_the_rows_that_they_are_given, rows);
        RUN_NAMED(dsv4_rows_name(rows), gradients_go_straight_through_the_rounding, rows);
    }
    RUN_TEST(stages_follow_the_rows_of_their_entries);
    RUN_TEST(a_row_beyond_the_arrays_is_refused_before_anything_is_written);
    RUN_TEST(rows_that_a_format_cannot_have_are_refused);
    RUN_TEST(packed_arrays_are_checked_before_anything_is_written);
    RUN_TEST(rows_of_the_callers_own_are_checked_too);
    RUN_TEST(fp8_rows_of_rope_alone_have_no_scales);
    RUN_TEST(presets_know_their_rows);
    RUN_TEST(gradients_come_from_the_rows_of_their_entries);
}

SUITE(rows) {
    run_numbers();
    run_kernels();
    run_calls();
}

TESTS_MAIN(rows);
