/* dsv4_unpack on arbitrary bytes: every number is its code times its block's scale, in fp32 and in bf16, and nothing is
 * read or written beside the rows, which stand in blocks of exactly their size. */

#include "fuzz.h"
#include "oracle_rows.h"

/* A few rows are unpacked by the scalar kernels, so many numbers by the CPU's best. */
enum { MANY_NUMBERS = 16384 };

typedef struct packed {
    dsv4_config config;
    int64_t count, row_stride, scale_stride, number_stride;
    size_t row_bytes, scale_bytes;
    unsigned char *rows, *scales; /* the last one without the gap behind it */
} packed;

/* Bytes from the input, then from a counter. */
static unsigned char *take(choices *c, int64_t count, int64_t stride, size_t bytes) {
    const size_t size = bytes ? (size_t)((count - 1) * stride) + bytes : 0;
    unsigned char *taken = (unsigned char *)reserve(size);
    for (size_t i = 0; i < size; i++) taken[i] = c->at < c->end ? *c->at++ : (unsigned char)(i * 37);
    return taken;
}

static int make(choices *c, packed *p) {
    memset(p, 0, sizeof *p);
    p->config.hidden_dim = p->config.ratio = 1;
    p->config.rows = (dsv4_rows)choose(c, DSV4_ROWS_COUNT - 1);
    p->config.head_dim = 1 + choose(c, 255) + 256 * choose(c, 2);
    while (p->config.rows == DSV4_ROWS_FP4 && (p->config.head_dim & (p->config.head_dim - 1)) != 0)
        p->config.head_dim &= p->config.head_dim - 1;
    p->config.rope_dim = 2 * (choose(c, 255) % (p->config.head_dim / 2 + 1));
    p->config.rounding = choose(c, 1) ? DSV4_ROUND_ROW : 0;
    p->count = 1 + choose(c, 7);
    if (choose(c, 1)) p->count += MANY_NUMBERS / p->config.head_dim;
    if (dsv4_row_sizes(&p->config, &p->row_bytes, &p->scale_bytes, NULL) != DSV4_OK) return 0;
    p->row_stride = (int64_t)p->row_bytes + choose(c, 20);
    p->scale_stride = (int64_t)p->scale_bytes + choose(c, 20);
    p->number_stride = p->config.head_dim + choose(c, 20);
    p->rows = take(c, p->count, p->row_stride, p->row_bytes);
    p->scales = take(c, p->count, p->scale_stride, p->scale_bytes);
    return 1;
}

static void check_row(const packed *p, dsv4_dtype dtype, int64_t r, const void *numbers) {
    for (int64_t i = 0; i < p->config.head_dim; i++) {
        const float got = (float)number(numbers, dtype, r * p->number_stride + i);
        float expected;
        if (!packed_number(&p->config, p->rows + r * p->row_stride, p->scales + r * p->scale_stride, i, &expected))
            continue;
        if (dtype == DSV4_BF16) expected = bf16_of(expected);
        REQUIRE(isnan(expected) ? isnan(got) : bits_of_float(expected) == bits_of_float(got));
    }
}

static void check(const packed *p, dsv4_dtype dtype) {
    const dsv4_const_matrix rows = {p->rows, DSV4_PACKED, p->row_stride},
                            scales = {p->scales, DSV4_PACKED, p->scale_stride};
    const size_t size = dsv4_dtype_size(dtype), row = (size_t)p->config.head_dim * size;
    const size_t stride = (size_t)p->number_stride * size, bytes = (size_t)(p->count - 1) * stride + row;
    dsv4_matrix numbers = {reserve(bytes), dtype, p->number_stride};
    memset(numbers.data, POISON, bytes);
    REQUIRE(dsv4_unpack(&p->config, p->count, rows, scales, numbers, NULL) == DSV4_OK);
    for (int64_t r = 0; r < p->count; r++) {
        const unsigned char *end = (const unsigned char *)numbers.data + (size_t)r * stride + row;
        check_row(p, dtype, r, numbers.data);
        for (size_t i = 0; i < stride - row && r + 1 < p->count; i++) REQUIRE(end[i] == POISON);
    }
    free(numbers.data);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    choices c = {data, data + size};
    packed p;
    if (!make(&c, &p)) return 0;
    check(&p, DSV4_F32);
    check(&p, DSV4_BF16);
    free(p.rows);
    free(p.scales);
    return 0;
}
