/* oracle.h - the compressor's formulas once more, in double precision and in the plainest way: what the header's
 * results are held against. It shares no code with the header and does not include it.  Rounding points are applied
 * to the double results. `lean` tells how far an honest fp32 computation may stray: at 0 an oracle function gives
 * the formula's value; at -1 and +1 it gives the least and the greatest value that fp32 arithmetic may end at, each
 * error bound leaning that way before the next rounding. Rounding is monotone, so what lies between the two is
 * right, and there is no tolerance to tune where a value stands next to a rounding boundary. Errors are leant within
 * one stage: to check a pipeline, give each function the measured result of the stage before it. */

#ifndef TESTS_ORACLE_H
#define TESTS_ORACLE_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

enum {
    ORACLE_PROJECTION = 1,
    ORACLE_SCORE = 2,
    ORACLE_WEIGHT = 4,
    ORACLE_PRODUCT = 8,
    ORACLE_POOLED = 16,
    ORACLE_NORMED = 32,
    ORACLE_SCALED = 64,
    ORACLE_TRIG = 128,
    ORACLE_PARAMS = 256, /* the caller of these functions rounds the parameters */
    ORACLE_ROTATED = 512,
    ORACLE_ROW = 1024,

    ORACLE_NONE = 0,
    ORACLE_DEEPSEEK = 16 + 64 + 1024,
    ORACLE_MAXTEXT = 256 + 1 + 4 + 8 + 16 + 32 + 64 + 1024,
    ORACLE_TRANSFORMERS = 1 + 4 + 8 + 16 + 64 + 128 + 1024,
    ORACLE_TRANSFORMERS_5_8 = 255 + 1024,
    ORACLE_VLLM = 1024,
    ORACLE_NEMO = 16 + 64 + 128 + 1024,
    ORACLE_MEGATRON = 1 + 4 + 8 + 16 + 64 + 128 + 512 + 1024
};

typedef struct oracle_config {
    int64_t hidden_dim, head_dim, ratio, rope_dim;
    int overlap, no_ape, no_gate;
    unsigned rounding;
    double eps, pad_gate, rope_theta, yarn_factor, yarn_orig_ctx, yarn_beta_fast, yarn_beta_slow;
    int lean; /* -1, 0 or +1; more errs further */
} oracle_config;

typedef struct oracle_params {
    const double *wkv, *wgate; /* [coff D, H]; wgate NULL with no_gate */
    const double *ape;         /* [m, coff D]; NULL with no_ape */
    const double *norm;        /* [D] */
} oracle_params;

/* Everything a whole sequence of `tokens` gives; its tail after the last whole window gives kv and gate only. */
typedef struct oracle_stages {
    int64_t tokens, entries;
    double *kv, *gate;    /* [tokens, coff D] */
    double *weights;      /* [entries, coff m, D] */
    double *pooled;       /* [entries, D] */
    double *latent, *out; /* [entries, D] */
} oracle_stages;

#if defined(__GNUC__)
#define ORACLE_FN __attribute__((unused)) static
#else
#define ORACLE_FN static
#endif

/* Half a step of fp32 at 1: the relative error of one rounding. */
static const double oracle_unit = 1.0 / 16777216.0;

/* ---- Numbers ----------------------------------------------------------------------------------------------- */

/* Rounds to `digits` significant bits (fewer below least_exponent), ties to even; past the largest: infinity. */
ORACLE_FN double oracle_round_to(double v, int digits, int least_exponent) {
    if (v == 0 || isnan(v) || isinf(v)) return v;
    int exponent;
    frexp(v, &exponent);
    int step = exponent - digits;
    if (step < least_exponent) step = least_exponent;
    double rounded = ldexp(nearbyint(ldexp(v, -step)), step);
    return fabs(rounded) >= ldexp(1, 128) ? copysign(INFINITY, v) : rounded;
}

ORACLE_FN double oracle_bf16(double v) { return oracle_round_to(v, 8, -133); }
ORACLE_FN double oracle_f32(double v) { return oracle_round_to(v, 24, -149); }

ORACLE_FN double oracle_round(const oracle_config *c, unsigned point, double v) {
    return c->rounding & point ? oracle_bf16(v) : v;
}

ORACLE_FN int64_t oracle_columns(const oracle_config *c) { return c->head_dim * (c->overlap ? 2 : 1); }
ORACLE_FN int64_t oracle_rows(const oracle_config *c) { return c->ratio * (c->overlap ? 2 : 1); }

/* ---- Projections ------------------------------------------------------------------------------------------- */

/* result [tokens, coff D] = x [tokens, H] w^T */
ORACLE_FN void oracle_project(const oracle_config *c, const double *w, const double *x, int64_t tokens,
                              double *result) {
    for (int64_t t = 0; t < tokens; t++) {
        for (int64_t o = 0; o < oracle_columns(c); o++) {
            double sum = 0, size = 0;
            for (int64_t k = 0; k < c->hidden_dim; k++) {
                double product = x[t * c->hidden_dim + k] * w[o * c->hidden_dim + k];
                sum += product;
                size += fabs(product);
            }
            sum += c->lean * 4 * oracle_unit * size;
            result[t * oracle_columns(c) + o] = oracle_round(c, ORACLE_PROJECTION, sum);
        }
    }
}

/* ---- Pooling ----------------------------------------------------------------------------------------------- */

/* One row of a window as one channel sees it. */
typedef struct oracle_row {
    double kv, score;
} oracle_row;

ORACLE_FN oracle_row oracle_window_row(const oracle_config *c, const oracle_params *p, const double *kv,
                                       const double *gate, int64_t window, int64_t row, int64_t channel) {
    int64_t columns = oracle_columns(c), token = window * c->ratio + row, column = channel;
    if (c->overlap) {
        token -= c->ratio;
        if (row >= c->ratio) column += c->head_dim;
    }
    if (token < 0) return (oracle_row){0, oracle_round(c, ORACLE_SCORE, c->pad_gate)};
    oracle_row result = {kv[token * columns + column], 0};
    if (!c->no_gate) result.score = gate[token * columns + column];
    if (!c->no_ape) result.score += oracle_round(c, ORACLE_SCORE, p->ape[token % c->ratio * columns + column]);
    result.score = oracle_round(c, ORACLE_SCORE, result.score);
    return result;
}

/* The weight `exact` after its rounding, its fp32 error (relative; a subnormal exp is 0) leaning to one side. */
ORACLE_FN double oracle_weight(const oracle_config *c, double exact, double stray, double lean) {
    double smallest_exp = 1.2e-38;
    if (stray > 0) exact += lean * (exact * stray + smallest_exp);
    return oracle_round(c, ORACLE_WEIGHT, fmax(0, exact));
}

/* Writes one channel's weights [coff m] and returns its pooled value. An error of a score is a relative one of its
 * weight, so large scores make weights stray further. */
ORACLE_FN double oracle_pool_channel(const oracle_config *c, const oracle_row *rows, double *weights) {
    int64_t n = oracle_rows(c);
    double most = -INFINITY, den = 0, heaviest = 0, sum = 0, size = 0;
    for (int64_t j = 0; j < n; j++) most = fmax(most, rows[j].score);
    for (int64_t j = 0; j < n; j++) {
        weights[j] = exp(rows[j].score - most);
        den += weights[j];
        if (weights[j] > 1e-9) heaviest = fmax(heaviest, fabs(rows[j].score));
    }
    for (int64_t j = 0; j < n; j++) {
        double exact = weights[j] / den, kv = rows[j].kv, stray = 0;
        if (exact > 0 && n > 1) stray = oracle_unit * (8 + (double)n + 4 * heaviest + 3 * fabs(rows[j].score - most));
        weights[j] = oracle_weight(c, exact, stray, c->lean);
        double term = kv * oracle_weight(c, exact, stray, kv < 0 ? -c->lean : c->lean);
        if (stray > 0) term += c->lean * oracle_unit * fabs(term);
        term = oracle_round(c, ORACLE_PRODUCT, term);
        sum += term;
        size += fabs(term);
    }
    if (n > 1) sum += c->lean * oracle_unit * (double)n * size;
    return oracle_round(c, ORACLE_POOLED, sum);
}

/* weights [entries, coff m, D] and pooled [entries, D] from a sequence's kv and gate [tokens, coff D]. */
ORACLE_FN void oracle_pool(const oracle_config *c, const oracle_params *p, const double *kv, const double *gate,
                           int64_t entries, double *weights, double *pooled) {
    int64_t n = oracle_rows(c);
    oracle_row *rows = calloc((size_t)n, sizeof *rows);
    double *channel_weights = calloc((size_t)n, sizeof *channel_weights);
    if (!rows || !channel_weights) abort();
    for (int64_t w = 0; w < entries; w++) {
        for (int64_t d = 0; d < c->head_dim; d++) {
            for (int64_t j = 0; j < n; j++) rows[j] = oracle_window_row(c, p, kv, gate, w, j, d);
            pooled[w * c->head_dim + d] = oracle_pool_channel(c, rows, channel_weights);
            for (int64_t j = 0; j < n; j++) weights[(w * n + j) * c->head_dim + d] = channel_weights[j];
        }
    }
    free(channel_weights);
    free(rows);
}

/* ---- RMSNorm ----------------------------------------------------------------------------------------------- */

/* latent [entries, D] from pooled [entries, D] */
ORACLE_FN void oracle_norm(const oracle_config *c, const oracle_params *p, const double *pooled, int64_t entries,
                           double *latent) {
    for (int64_t e = 0; e < entries; e++) {
        const double *row = pooled + e * c->head_dim;
        double squares = 0;
        for (int64_t d = 0; d < c->head_dim; d++) squares += row[d] * row[d];
        double r = 1 / sqrt(squares / (double)c->head_dim + c->eps);
        double stray = oracle_unit * (4 + (double)c->head_dim / 16);
        for (int64_t d = 0; d < c->head_dim; d++) {
            double lean = p->norm[d] < 0 ? -c->lean : c->lean;
            double normed = row[d] * r;
            normed = oracle_round(c, ORACLE_NORMED, normed + lean * stray * fabs(normed));
            double scaled = normed * p->norm[d];
            scaled += c->lean * oracle_unit * fabs(scaled);
            latent[e * c->head_dim + d] = oracle_round(c, ORACLE_SCALED, scaled);
        }
    }
}

/* ---- RoPE -------------------------------------------------------------------------------------------------- */

/* The pair of channels, counted as a real number, that turns `rotations` times over the original context. */
ORACLE_FN double oracle_yarn_pair(const oracle_config *c, double rotations) {
    const double pi = 3.14159265358979323846;
    return (double)c->rope_dim * log(c->yarn_orig_ctx / (2 * pi * rotations)) / (2 * log(c->rope_theta));
}

/* inv_freq [R / 2], every operation rounded to fp32 */
ORACLE_FN void oracle_frequencies(const oracle_config *c, double *inv_freq) {
    double low = fmax(floor(oracle_yarn_pair(c, c->yarn_beta_fast)), 0);
    double high = fmin(ceil(oracle_yarn_pair(c, c->yarn_beta_slow)), (double)(c->rope_dim - 1));
    if (low == high) high += 0.001;
    for (int64_t i = 0; i < c->rope_dim / 2; i++) {
        double f = oracle_f32(1 / oracle_f32(pow(c->rope_theta, 2 * (double)i / (double)c->rope_dim)));
        if (c->yarn_factor > 1) {
            double ramp = oracle_f32(oracle_f32((double)i - low) / oracle_f32(high - low));
            ramp = fmin(fmax(ramp, 0), 1);
            double slow = oracle_f32(oracle_f32(f / oracle_f32(c->yarn_factor)) * ramp);
            f = oracle_f32(slow + oracle_f32(f * oracle_f32(1 - ramp)));
        }
        inv_freq[i] = f;
    }
}

/* The sum of two products in RoPE, rounded where the point `rotated` asks for it; the error of each leans up. */
ORACLE_FN double oracle_turn(const oracle_config *c, double a, double b) {
    double lean = c->lean * oracle_unit, stray = 2 * lean * (fabs(a) + fabs(b));
    if (!(c->rounding & ORACLE_ROTATED)) return a + b + stray;
    a = oracle_bf16(a + lean * fabs(a));
    b = oracle_bf16(b + lean * fabs(b));
    return oracle_bf16(a + b + lean * fabs(a + b));
}

/* out [entries, D] from latent [entries, D]; `start` is the position of the sequence's first token */
ORACLE_FN void oracle_rope(const oracle_config *c, const double *latent, int64_t entries, int64_t start, double *out) {
    double *inv_freq = calloc((size_t)c->rope_dim / 2 + 1, sizeof *inv_freq);
    if (!inv_freq) abort();
    oracle_frequencies(c, inv_freq);
    int64_t plain = c->head_dim - c->rope_dim;
    for (int64_t e = 0; e < entries; e++) {
        const double *row = latent + e * c->head_dim;
        double *turned = out + e * c->head_dim, position = oracle_f32((double)(start + e * c->ratio));
        for (int64_t d = 0; d < plain; d++) turned[d] = oracle_round(c, ORACLE_ROW, row[d]);
        for (int64_t i = 0; i < c->rope_dim / 2; i++) {
            double angle = oracle_f32(position * inv_freq[i]), cosine = cos(angle), sine = sin(angle);
            double stray_cos = c->lean * 2 * oracle_unit * fabs(cosine);
            double stray_sin = c->lean * 2 * oracle_unit * fabs(sine);
            double a = row[plain + 2 * i], b = row[plain + 2 * i + 1];
            double sign_a = a < 0 ? -1 : 1, sign_b = b < 0 ? -1 : 1;
            double ac = a * oracle_round(c, ORACLE_TRIG, cosine + sign_a * stray_cos);
            double bs = b * oracle_round(c, ORACLE_TRIG, sine - sign_b * stray_sin);
            double bc = b * oracle_round(c, ORACLE_TRIG, cosine + sign_b * stray_cos);
            double as = a * oracle_round(c, ORACLE_TRIG, sine + sign_a * stray_sin);
            turned[plain + 2 * i] = oracle_round(c, ORACLE_ROW, oracle_turn(c, ac, -bs));
            turned[plain + 2 * i + 1] = oracle_round(c, ORACLE_ROW, oracle_turn(c, bc, as));
        }
    }
    free(inv_freq);
}

/* ---- The whole --------------------------------------------------------------------------------------------- */

ORACLE_FN double *oracle_array(int64_t count) {
    double *array = calloc((size_t)(count > 0 ? count : 1), sizeof *array);
    if (!array) abort();
    return array;
}

ORACLE_FN oracle_stages oracle_stages_new(const oracle_config *c, int64_t tokens) {
    oracle_stages s = {0};
    s.tokens = tokens;
    s.entries = tokens / c->ratio;
    s.kv = oracle_array(tokens * oracle_columns(c));
    s.gate = oracle_array(tokens * oracle_columns(c));
    s.weights = oracle_array(s.entries * oracle_rows(c) * c->head_dim);
    s.pooled = oracle_array(s.entries * c->head_dim);
    s.latent = oracle_array(s.entries * c->head_dim);
    s.out = oracle_array(s.entries * c->head_dim);
    return s;
}

ORACLE_FN void oracle_stages_free(oracle_stages *s) {
    free(s->kv);
    free(s->gate);
    free(s->weights);
    free(s->pooled);
    free(s->latent);
    free(s->out);
    *s = (oracle_stages){0};
}

/* x [s->tokens, H], all of one sequence whose first token stands at position `start`. The stages are the oracle's
 * own. */
ORACLE_FN void oracle_forward(const oracle_config *c, const oracle_params *p, const double *x, int64_t start,
                              oracle_stages *s) {
    oracle_project(c, p->wkv, x, s->tokens, s->kv);
    if (!c->no_gate) oracle_project(c, p->wgate, x, s->tokens, s->gate);
    oracle_pool(c, p, s->kv, s->gate, s->entries, s->weights, s->pooled);
    oracle_norm(c, p, s->pooled, s->entries, s->latent);
    oracle_rope(c, s->latent, s->entries, start, s->out);
}

#endif /* TESTS_ORACLE_H */
