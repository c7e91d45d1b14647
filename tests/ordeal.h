/* ordeal.h - every array that a caller hands to the compressor, forward and backward, as a list of places: each can be put
 * at another address, and the calls made again. */

#ifndef TESTS_ORDEAL_H
#define TESTS_ORDEAL_H

#include "gradient_support.h"

/* The call that reads or writes an array first. */
typedef enum ordeal_call { CALL_CREATE, CALL_COMPRESS, CALL_POOL, CALL_BACKWARD } ordeal_call;

/* Where the pointer to an array is kept, and what it points to. */
typedef struct place {
    const char *name;
    void **pointer;
    size_t bytes, number; /* number: bytes of one */
    ordeal_call call;
    int written;
} place;

enum { PLACES = DSV4_PARAM_COUNT + 4 + STAGE_COUNT + GRADIENTS };

typedef struct ordeal {
    lesson l;              /* its x, parameters and dout are the inputs */
    results r, expected;   /* of the forward call */
    gradient_set g, whole; /* of the backward call */
    void *kv, *gate;       /* what the forward call gave, as inputs of later ones */
    place places[PLACES];
    int count;
} ordeal;

SUPPORT void ordeal_add(ordeal *o, const char *name, void **pointer, size_t bytes, size_t number_size, ordeal_call call,
                        int written) {
    if (bytes > 0) o->places[o->count++] = (place){name, pointer, bytes, number_size, call, written};
}

SUPPORT void ordeal_list(ordeal *o) {
    static const char *const params[] = {"wkv", "wgate", "ape", "norm"};
    const lesson *l = &o->l;
    const dsv4_const_matrix *const arrays[] = {&l->m.params.wkv, &l->m.params.wgate, &l->m.params.ape, &l->m.params.norm};
    for (int i = 0; i < DSV4_PARAM_COUNT; i++) {
        const size_t size = dsv4_dtype_size(arrays[i]->dtype);
        ordeal_add(o, params[i], &o->l.m.data[i], (size_t)l->m.info[i].count * size, size, CALL_CREATE, 0);
    }
    const size_t x = dsv4_dtype_size(l->s.dtype), dout = dsv4_dtype_size(l->dout_dtype);
    ordeal_add(o, "x", &o->l.s.x, (size_t)(l->s.tokens * l->config.hidden_dim) * x, x, CALL_COMPRESS, 0);
    ordeal_add(o, "kv", &o->kv, o->r.bytes[STAGE_KV], 4, CALL_POOL, 0);
    ordeal_add(o, "gate", &o->gate, o->r.bytes[STAGE_GATE], 4, CALL_POOL, 0);
    ordeal_add(o, "dout", &o->l.dout, (size_t)(l->entries * l->config.head_dim) * dout, dout, CALL_BACKWARD, 0);
    for (int i = 0; i < STAGE_COUNT; i++) {
        const size_t size = i < STAGE_LATENT ? 4 : dsv4_dtype_size(o->r.out_dtype);
        ordeal_add(o, stage_name(i), &o->r.stage[i], o->r.bytes[i], size, CALL_COMPRESS, 1);
    }
    for (int i = 0; i < GRADIENTS; i++)
        ordeal_add(o, gradient_name(i), &o->g.data[i], o->g.bytes[i], dsv4_dtype_size(o->g.dtype), CALL_BACKWARD, 1);
}

/* The parameters from where they lie now. */
SUPPORT dsv4_status ordeal_create(ordeal *o, const char *isa, engine *e) {
    const dsv4_options options = {isa, 1, 1};
    const dsv4_allocator heap = nan_heap();
    for (int i = 0; i < DSV4_PARAM_COUNT; i++) model_array(&o->l.m.params, i)->data = o->l.m.data[i];
    dsv4_status status = dsv4_compressor_create(&o->l.config, &o->l.m.params, &options, &heap, &e->compressor, NULL);
    if (status == DSV4_OK) status = dsv4_workspace_create(e->compressor, NULL, &heap, &e->workspace, NULL);
    return status;
}

SUPPORT dsv4_status ordeal_compress(const ordeal *o, const engine *e) {
    return compress_whole(e, &o->l.s, &o->r, NULL);
}

/* Entries from projections. */
SUPPORT dsv4_status ordeal_pool(const ordeal *o, const engine *e) {
    dsv4_segment whole = segment_new(0, o->l.s.tokens, o->l.s.position, 0, NULL);
    dsv4_batch b = batch_new(&o->l.s, &o->r, &whole, 1);
    b.x.data = NULL;
    b.kv = o->kv;
    b.gate = o->r.bytes[STAGE_GATE] ? o->gate : NULL;
    b.drop_tail = 1;
    return dsv4_compress(e->compressor, &b, e->workspace, NULL);
}

/* Gradients, the projections recomputed or, with `kept`, given. */
SUPPORT dsv4_status ordeal_backward(const ordeal *o, const engine *e, int kept) {
    dsv4_segment whole = segment_new(0, o->l.s.tokens, o->l.s.position, 0, NULL);
    dsv4_batch b = lesson_batch(&o->l, &whole, 1);
    dsv4_gradients to = gradients_into(&o->g, o->l.dout, o->l.dout_dtype);
    b.kv = kept ? o->kv : NULL;
    b.gate = kept && o->r.bytes[STAGE_GATE] ? o->gate : NULL;
    return dsv4_backward(e->compressor, &b, &to, e->workspace, NULL);
}

SUPPORT void ordeal_poison(ordeal *o) {
    for (int i = 0; i < o->count; i++)
        if (o->places[i].written) memset(*o->places[i].pointer, POISON, o->places[i].bytes);
}

/* All calls by one kernel set. NULL, or what went wrong. */
SUPPORT const char *ordeal_run(ordeal *o, const char *isa) {
    engine e = {0};
    const char *wrong = NULL;
    ordeal_poison(o);
    if (ordeal_create(o, isa, &e) != DSV4_OK) wrong = "create";
    if (!wrong && ordeal_compress(o, &e) != DSV4_OK) wrong = "compress";
    if (!wrong && results_difference(&o->expected, &o->r) != STAGE_COUNT) wrong = "compress gives other bits";
    ordeal_poison(o);
    if (!wrong && ordeal_pool(o, &e) != DSV4_OK) wrong = "pooling";
    if (!wrong && results_difference(&o->expected, &o->r) != STAGE_COUNT) wrong = "pooling gives other bits";
    for (int kept = 0; kept <= 1 && !wrong; kept++) {
        ordeal_poison(o);
        if (ordeal_backward(o, &e, kept) != DSV4_OK) wrong = "backward";
        else if (gradient_difference(&o->whole, &o->g, 0) != GRADIENTS) wrong = "backward gives other bits";
    }
    engine_free(&e);
    return wrong;
}

/* The arrays as malloc gives them, and what the calls come to there. */
SUPPORT ordeal ordeal_new(const shape *of, int64_t tokens, dsv4_dtype gradient_dtype, uint64_t seed) {
    ordeal o = {0};
    o.l = lesson_of(of, tokens, seed);
    o.expected = results_new(&o.l.config, of->out, tokens, o.l.entries);
    o.r = results_new(&o.l.config, of->out, tokens, o.l.entries);
    o.whole = gradient_set_new(&o.l.config, gradient_dtype, tokens);
    o.g = gradient_set_new(&o.l.config, gradient_dtype, tokens);
    if (compress_whole(&o.l.e, &o.l.s, &o.expected, NULL) != DSV4_OK || backward_whole(&o.l, &o.l.e, &o.whole) != DSV4_OK)
        exit(1);
    o.kv = memcpy(reserve(o.r.bytes[STAGE_KV]), o.expected.stage[STAGE_KV], o.r.bytes[STAGE_KV]);
    o.gate = memcpy(reserve(o.r.bytes[STAGE_GATE]), o.expected.stage[STAGE_GATE], o.r.bytes[STAGE_GATE]);
    return o;
}

SUPPORT void ordeal_free(ordeal *o) {
    free(o->kv);
    free(o->gate);
    gradient_set_free(&o->whole);
    gradient_set_free(&o->g);
    results_free(&o->expected);
    results_free(&o->r);
    lesson_free(&o->l);
}

#endif /* TESTS_ORDEAL_H */
