/* oracle_backward.h - gradients of the compressor in double precision, twice over: by the chain rule from given stages,
 * and by central differences of the forward oracle, which know nothing of the chain rule. */

#ifndef TESTS_ORACLE_BACKWARD_H
#define TESTS_ORACLE_BACKWARD_H

#include "oracle.h"

enum { ORACLE_DX, ORACLE_DWKV, ORACLE_DWGATE, ORACLE_DAPE, ORACLE_DNORM, ORACLE_GRADIENTS };

/* What one sequence gives. `slack` is how far an fp32 computation may stray for reasons that do not shrink with the
 * result: differences of large terms, as RMSNorm takes them, and numbers next to a bf16 boundary that fall to its other
 * side. */
typedef struct oracle_gradients {
    int64_t count[ORACLE_GRADIENTS];
    double *value[ORACLE_GRADIENTS], *slack[ORACLE_GRADIENTS];
} oracle_gradients;

/* A whole sequence and the gradient of its entries. */
typedef struct oracle_backward_call {
    const double *x;    /* [tokens, H] */
    const double *dout; /* [entries, D] */
    int64_t tokens, entries, start;
    int narrow; /* dkv and dgate are rounded to bf16 before the products */
} oracle_backward_call;

ORACLE_FN oracle_gradients oracle_gradients_new(const oracle_config *c, int64_t tokens) {
    const int64_t weights = oracle_columns(c) * c->hidden_dim;
    oracle_gradients g = {{tokens * c->hidden_dim, weights, c->no_gate ? 0 : weights,
                           c->no_ape ? 0 : c->ratio * oracle_columns(c), c->head_dim},
                          {0},
                          {0}};
    for (int i = 0; i < ORACLE_GRADIENTS; i++) {
        g.value[i] = oracle_array(g.count[i]);
        g.slack[i] = oracle_array(g.count[i]);
    }
    return g;
}

ORACLE_FN void oracle_gradients_free(oracle_gradients *g) {
    for (int i = 0; i < ORACLE_GRADIENTS; i++) {
        free(g->value[i]);
        free(g->slack[i]);
    }
    *g = (oracle_gradients){0};
}

/* ---- By the chain rule ------------------------------------------------------------------------------------- */

/* How far apart the bf16 roundings of v - stray and v + stray are. */
ORACLE_FN double oracle_bf16_slack(double v, double stray) { return oracle_bf16(v + stray) - oracle_bf16(v - stray); }

/* row [D] = gradient of the entry before RoPE: RoPE turns (1, 0) to (cos, sin), so it shows what to turn back by. */
ORACLE_FN void oracle_rope_back(const oracle_config *c, const double *dout, int64_t position, double *row) {
    double *basis = oracle_array(c->head_dim), *turned = oracle_array(c->head_dim);
    const int64_t plain = c->head_dim - c->rope_dim;
    oracle_config exact = *c;
    exact.rounding &= ORACLE_TRIG; /* the other points are the identity on the way back */
    for (int64_t d = plain; d < c->head_dim; d += 2) basis[d] = 1;
    oracle_rope(&exact, basis, 1, position, turned);
    for (int64_t d = 0; d < plain; d++) row[d] = dout[d];
    for (int64_t d = plain; d < c->head_dim; d += 2) {
        row[d] = dout[d] * turned[d] + dout[d + 1] * turned[d + 1];
        row[d + 1] = dout[d + 1] * turned[d] - dout[d] * turned[d + 1];
    }
    free(basis);
    free(turned);
}

/* dpooled [D] of one entry, and the size [D] of the terms that it is the difference of; adds to dnorm. */
ORACLE_FN void oracle_norm_back(const oracle_config *c, const oracle_params *p, const double *pooled, const double *dy,
                                double *dpooled, double *size, oracle_gradients *g) {
    double squares = 0, mean = 0, mean_size = 0;
    for (int64_t d = 0; d < c->head_dim; d++) squares += pooled[d] * pooled[d];
    const double r = 1 / sqrt(squares / (double)c->head_dim + c->eps);
    for (int64_t d = 0; d < c->head_dim; d++) {
        const double n = pooled[d] * r, term = dy[d] * p->norm[d] * n / (double)c->head_dim;
        mean += term;
        mean_size += fabs(term);
        g->value[ORACLE_DNORM][d] += dy[d] * oracle_round(c, ORACLE_NORMED, n);
        if (c->rounding & ORACLE_NORMED)
            g->slack[ORACLE_DNORM][d] += fabs(dy[d]) * oracle_bf16_slack(n, 16 * oracle_unit * fabs(n));
    }
    for (int64_t d = 0; d < c->head_dim; d++) {
        const double dn = dy[d] * p->norm[d], n = pooled[d] * r;
        dpooled[d] = r * (dn - n * mean);
        size[d] = r * (fabs(dn) + fabs(n) * mean_size);
    }
}

/* Gradients of the projections, [tokens, coff D] each, and how far their roundings may stray. */
typedef struct oracle_rows_back {
    double *dkv, *dgate, *kv_slack, *gate_slack;
} oracle_rows_back;

/* One channel of one window: its rows' dkv and dgate. */
ORACLE_FN void oracle_pool_back(const oracle_config *c, const oracle_row *rows, const double *weights, double dpooled,
                                double size, oracle_row *back, oracle_row *stray) {
    const int64_t n = oracle_rows(c);
    double most = -INFINITY, den = 0, mean = 0, mean_size = 0;
    for (int64_t j = 0; j < n; j++) most = fmax(most, rows[j].score);
    for (int64_t j = 0; j < n; j++) den += exp(rows[j].score - most);
    for (int64_t j = 0; j < n; j++) {
        mean += exp(rows[j].score - most) / den * rows[j].kv;
        mean_size += exp(rows[j].score - most) / den * fabs(rows[j].kv);
    }
    for (int64_t j = 0; j < n; j++) {
        const double p = exp(rows[j].score - most) / den, unit = 16 * oracle_unit * p * size;
        back[j].kv = weights[j * c->head_dim] * dpooled;
        back[j].score = p * dpooled * (rows[j].kv - mean);
        stray[j].kv = unit;
        stray[j].score = unit * (fabs(rows[j].kv) + mean_size);
    }
}

/* Spreads one window's dpooled [D] over its rows. Each row of a series belongs to one window alone. */
ORACLE_FN void oracle_window_back(const oracle_config *c, const oracle_params *p, const oracle_stages *s,
                                  int64_t window, const double *dpooled, const double *size,
                                  const oracle_rows_back *to) {
    const int64_t n = oracle_rows(c), columns = oracle_columns(c);
    oracle_row *rows = calloc((size_t)n * 3, sizeof *rows);
    if (!rows) abort();
    oracle_row *const back = rows + n, *const stray = back + n;
    for (int64_t d = 0; d < c->head_dim; d++) {
        for (int64_t j = 0; j < n; j++) rows[j] = oracle_window_row(c, p, s->kv, s->gate, window, j, d);
        oracle_pool_back(c, rows, s->weights + window * n * c->head_dim + d, dpooled[d], size[d], back, stray);
        for (int64_t j = 0; j < n; j++) {
            const int64_t token = window * c->ratio + j - (c->overlap ? c->ratio : 0);
            const int64_t at = token * columns + d + (c->overlap && j >= c->ratio ? c->head_dim : 0);
            if (token < 0) continue;
            to->dkv[at] = back[j].kv;
            to->dgate[at] = back[j].score;
            to->kv_slack[at] = stray[j].kv;
            to->gate_slack[at] = stray[j].score;
        }
    }
    free(rows);
}

/* dx += d w and dw += d^T x; slack alike. */
ORACLE_FN void oracle_products(const oracle_config *c, const oracle_backward_call *l, const double *w, const double *d,
                               const double *slack, double *const dx[2], double *const dw[2]) {
    for (int64_t t = 0; t < l->tokens; t++)
        for (int64_t o = 0; o < oracle_columns(c); o++)
            for (int64_t k = 0; k < c->hidden_dim; k++) {
                const int64_t row = t * oracle_columns(c) + o;
                const int64_t in_x = t * c->hidden_dim + k, in_w = o * c->hidden_dim + k;
                dx[0][in_x] += d[row] * w[in_w];
                dw[0][in_w] += d[row] * l->x[in_x];
                dx[1][in_x] += slack[row] * fabs(w[in_w]);
                dw[1][in_w] += slack[row] * fabs(l->x[in_x]);
            }
}

/* Rounds to bf16; a stray becomes what rounding makes of it. */
ORACLE_FN void oracle_narrow(double *d, double *stray, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        stray[i] = oracle_bf16_slack(d[i], stray[i]);
        d[i] = oracle_bf16(d[i]);
    }
}

/* `s` holds the forward pass's stages: the oracle's own, or measured ones where these were rounded. */
ORACLE_FN oracle_gradients oracle_backward(const oracle_config *c, const oracle_params *p,
                                           const oracle_backward_call *l, const oracle_stages *s) {
    const int64_t columns = oracle_columns(c), count = l->tokens * columns;
    oracle_gradients g = oracle_gradients_new(c, l->tokens);
    oracle_rows_back rows = {oracle_array(count), oracle_array(count), oracle_array(count), oracle_array(count)};
    double *dy = oracle_array(3 * c->head_dim), *dpooled = dy + c->head_dim, *size = dpooled + c->head_dim;
    for (int64_t w = 0; w < l->entries; w++) {
        oracle_rope_back(c, l->dout + w * c->head_dim, l->start + w * c->ratio, dy);
        oracle_norm_back(c, p, s->pooled + w * c->head_dim, dy, dpooled, size, &g);
        oracle_window_back(c, p, s, w, dpooled, size, &rows);
    }
    for (int64_t i = 0; i < count && !c->no_ape; i++) {
        const int64_t to = i / columns % c->ratio * columns + i % columns;
        g.value[ORACLE_DAPE][to] += rows.dgate[i];
        g.slack[ORACLE_DAPE][to] += rows.gate_slack[i];
    }
    double *const dx[2] = {g.value[ORACLE_DX], g.slack[ORACLE_DX]};
    double *const dwkv[2] = {g.value[ORACLE_DWKV], g.slack[ORACLE_DWKV]};
    double *const dwgate[2] = {g.value[ORACLE_DWGATE], g.slack[ORACLE_DWGATE]};
    if (l->narrow) oracle_narrow(rows.dkv, rows.kv_slack, count);
    if (l->narrow) oracle_narrow(rows.dgate, rows.gate_slack, count);
    oracle_products(c, l, p->wkv, rows.dkv, rows.kv_slack, dx, dwkv);
    if (!c->no_gate) oracle_products(c, l, p->wgate, rows.dgate, rows.gate_slack, dx, dwgate);
    free(rows.dkv);
    free(rows.dgate);
    free(rows.kv_slack);
    free(rows.gate_slack);
    free(dy);
    return g;
}

/* ---- By central differences -------------------------------------------------------------------------------- */

/* The number whose gradient is sought: sum of dout * out. */
ORACLE_FN double oracle_loss(const oracle_config *c, const oracle_params *p, const oracle_backward_call *l) {
    oracle_stages s = oracle_stages_new(c, l->tokens);
    double loss = 0;
    oracle_forward(c, p, l->x, l->start, &s);
    for (int64_t i = 0; i < l->entries * c->head_dim; i++) loss += l->dout[i] * s.out[i];
    oracle_stages_free(&s);
    return loss;
}

/* The derivative by element i of one of the arrays that p and l point to; two steps, so that the error is of their
 * fourth power. */
ORACLE_FN double oracle_difference(const oracle_config *c, const oracle_params *p, const oracle_backward_call *l,
                                   int which, int64_t i) {
    static const double step = 1.0 / 2048, factor[4] = {1, -8, 8, -1}, offset[4] = {-2, -1, 1, 2};
    const double *const arrays[ORACLE_GRADIENTS] = {l->x, p->wkv, p->wgate, p->ape, p->norm};
    double *const element = (double *)(uintptr_t)(arrays[which] + i), value = *element;
    double sum = 0;
    for (int k = 0; k < 4; k++) {
        *element = value + offset[k] * step;
        sum += factor[k] * oracle_loss(c, p, l);
    }
    *element = value;
    return sum / (12 * step);
}

#endif /* TESTS_ORACLE_BACKWARD_H */
