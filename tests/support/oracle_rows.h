/* oracle_rows.h - rows as caches hold them, by the definitions: every code is looked up among all there are, scales
 * come from frexp. Shares nothing with the library. */

#ifndef TESTS_ORACLE_ROWS_H
#define TESTS_ORACLE_ROWS_H

#include "support.h"

/* The value of a code with `mantissa` bits of it, of 1 + exponent + mantissa bits; the sign apart. */
SUPPORT double small_value(int code, int mantissa, int bias) {
    int exponent = code >> mantissa, rest = code & ((1 << mantissa) - 1);
    return exponent ? ldexp((1 << mantissa) + rest, exponent - bias - mantissa) : ldexp(rest, 1 - bias - mantissa);
}
SUPPORT double e4m3_value(int code) { return code == 0x7F ? NAN : small_value(code, 3, 7); }
SUPPORT double e2m1_value(int code) { return small_value(code, 1, 1); }

/* The code nearest to a finite number, the even one of two that are as near. */
SUPPORT int nearest_code(double y, int largest, double (*value)(int)) {
    int best = fabs(y) > value(largest) ? largest : 0, sign = signbit(y) ? largest + (value == e4m3_value ? 2 : 1) : 0;
    for (int code = best + 1; code <= largest; code++) {
        double closer = fabs(fabs(y) - value(best)) - fabs(fabs(y) - value(code));
        if (closer > 0 || (closer == 0 && code % 2 == 0)) best = code;
    }
    return sign | best;
}
SUPPORT int e4m3_code(double y) { return nearest_code(y, 0x7E, e4m3_value); }
SUPPORT int e2m1_code(double y) { return nearest_code(y, 0x7, e2m1_value); }
SUPPORT double signed_value(int code, double (*value)(int)) {
    int sign = value == e4m3_value ? 0x80 : 0x8;
    return code & sign ? -value(code & ~sign) : value(code);
}

SUPPORT float bf16_of(float value) { return dsv4_bf16_to_f32(dsv4_bf16_from_f32(value)); }

/* One format's numbers. */
typedef struct row_rule {
    int block, wide;        /* wide: E4M3 codes */
    double least, greatest; /* of a block's magnitudes; of the code */
    int e4m3_scale, scale_bytes;
} row_rule;

SUPPORT row_rule rule_of(dsv4_rows rows) {
    static const row_rule rules[DSV4_ROWS_COUNT] = {
        {1, 0, 0, 0, 0, 0},           {64, 1, 1e-4, 448, 0, 1},
        {128, 1, 1e-4, 448, 0, 4},    {32, 0, 6 * 0x1p-126, 6, 0, 1},
        {16, 0, 6 * 0x1p-9, 6, 1, 1},
    };
    return rules[rows];
}

/* Subnormal scales and products are nobody's promise. */
SUPPORT int is_promised(double value) { return value == 0 || !(fabs(value) < 0x1p-126); }

/* What channel i of a packed row holds, its code times its block's scale; 0 where nothing is promised. */
SUPPORT int packed_number(const dsv4_config *c, const unsigned char *row, const unsigned char *scales, int64_t i,
                          float *number) {
    const row_rule rule = rule_of(c->rows);
    const int64_t coded = c->head_dim - (c->rows == DSV4_ROWS_FP8 ? c->rope_dim : 0);
    const unsigned char *s = scales + i / rule.block * rule.scale_bytes, *half = row + coded + 2 * (i - coded);
    if (i >= coded) {
        *number = float_of_bits((uint32_t)half[0] << 16 | (uint32_t)half[1] << 24);
        return 1;
    }
    double scale = rule.e4m3_scale ? signed_value(*s, e4m3_value) : *s == 255 ? NAN : ldexp(1, *s - 127);
    if (rule.scale_bytes == 4)
        scale = float_of_bits((uint32_t)s[0] | (uint32_t)s[1] << 8 | (uint32_t)s[2] << 16 | (uint32_t)s[3] << 24);
    const int code = rule.wide ? row[i] : row[i / 2] >> (4 * (i % 2)) & 15;
    const double product = signed_value(code, rule.wide ? e4m3_value : e2m1_value) * scale;
    *number = c->rounding & DSV4_ROUND_ROW ? bf16_of((float)product) : (float)product;
    return is_promised(scale) && is_promised(product);
}

/* A row, by channel: what is read back, codes; and its scales. */
typedef struct row_truth {
    int64_t dim, coded, blocks;
    float *read, *scales;
    int *codes;
} row_truth;

SUPPORT void row_truth_free(row_truth *t) {
    free(t->read);
    free(t->scales);
    free(t->codes);
    memset(t, 0, sizeof *t);
}

SUPPORT float block_scale(const row_rule *rule, float amax) {
    float least = (float)rule->least, top = amax > least ? amax : least;
    if (rule->e4m3_scale) return (float)e4m3_value(e4m3_code((float)((double)top / 6)));
    float share = (float)((double)top * (float)(1 / rule->greatest));
    int exponent;
    double half = frexp((double)share, &exponent);
    return (float)ldexp(1, half == 0.5 ? exponent - 1 : exponent);
}

SUPPORT void hadamard(float *row, int64_t dim) {
    for (int64_t step = 1; step < dim; step *= 2)
        for (int64_t i = 0; i < dim; i++) {
            if (i & step) continue;
            float a = row[i], b = row[i + step];
            row[i] = (float)((double)a + b);
            row[i + step] = (float)((double)a - b);
        }
    for (int64_t i = 0; i < dim; i++) row[i] = (float)((double)row[i] * (float)(1 / sqrt((double)dim)));
}

SUPPORT void code_block(const row_rule *rule, row_truth *t, int64_t block) {
    int64_t from = block * rule->block, to = from + rule->block < t->coded ? from + rule->block : t->coded;
    float amax = 0;
    int finite = 1;
    for (int64_t c = from; c < to; c++) {
        finite &= isfinite(t->read[c]) != 0;
        if (fabsf(t->read[c]) > amax) amax = fabsf(t->read[c]);
    }
    const float scale = t->scales[block] = finite ? block_scale(rule, amax) : NAN;
    for (int64_t c = from; c < to; c++) {
        if (!finite) {
            t->codes[c] = rule->wide ? 0x7F : 0x7;
            t->read[c] = NAN;
            continue;
        }
        const float y = (float)((double)t->read[c] / scale);
        t->codes[c] = rule->wide ? e4m3_code(y) : e2m1_code(y);
        t->read[c] = (float)(signed_value(t->codes[c], rule->wide ? e4m3_value : e2m1_value) * (double)scale);
    }
}

/* From the entry as it is after RoPE. */
SUPPORT row_truth row_truth_of(const dsv4_config *c, const void *plain, dsv4_dtype dtype) {
    const row_rule rule = rule_of(c->rows);
    const int rounded = (c->rounding & DSV4_ROUND_ROW) != 0;
    row_truth t = {c->head_dim, c->rows == DSV4_ROWS_FP8 ? c->head_dim - c->rope_dim : c->head_dim, 0, NULL, NULL,
                   NULL};
    t.blocks = (t.coded + rule.block - 1) / rule.block;
    t.read = reserve((size_t)t.dim * sizeof *t.read);
    t.codes = reserve((size_t)t.dim * sizeof *t.codes);
    t.scales = reserve((size_t)t.blocks * sizeof *t.scales);
    for (int64_t i = 0; i < t.dim; i++) t.read[i] = (float)number(plain, dtype, i);
    for (int64_t i = 0; i < t.dim && rounded; i++) t.read[i] = bf16_of(t.read[i]);
    if (c->rows == DSV4_ROWS_FP4) hadamard(t.read, t.dim);
    for (int64_t i = 0; i < t.dim && rounded; i++) t.read[i] = bf16_of(t.read[i]);
    for (int64_t b = 0; b < t.blocks; b++) code_block(&rule, &t, b);
    for (int64_t i = 0; i < t.coded && rounded; i++) t.read[i] = bf16_of(t.read[i]);
    return t;
}

/* The bytes of the packed row, and of its scales. */
SUPPORT void row_truth_pack(const dsv4_config *c, const row_truth *t, unsigned char *row, unsigned char *scales) {
    const row_rule rule = rule_of(c->rows);
    for (int64_t i = 0; i < t->coded; i++) {
        if (rule.wide)
            row[i] = (unsigned char)t->codes[i];
        else
            row[i / 2] = (unsigned char)(i % 2 ? row[i / 2] | t->codes[i] << 4 : t->codes[i]);
    }
    for (int64_t i = t->coded; i < t->dim; i++) {
        const dsv4_bf16 half = dsv4_bf16_from_f32(t->read[i]);
        row[t->coded + 2 * (i - t->coded)] = (unsigned char)(half & 0xFF);
        row[t->coded + 2 * (i - t->coded) + 1] = (unsigned char)(half >> 8);
    }
    for (int64_t b = 0; b < t->blocks; b++) {
        const uint32_t bits = isnan(t->scales[b]) ? 0x7FC00000u : bits_of_float(t->scales[b]);
        if (rule.scale_bytes == 4) {
            for (int i = 0; i < 4; i++) scales[4 * b + i] = (unsigned char)(bits >> (8 * i) & 0xFF);
        } else if (rule.e4m3_scale) {
            scales[b] = (unsigned char)(isnan(t->scales[b]) ? 0x7F : e4m3_code(t->scales[b]));
        } else {
            scales[b] = (unsigned char)(bits >> 23 & 0xFF);
        }
    }
}

#endif /* TESTS_ORACLE_ROWS_H */
