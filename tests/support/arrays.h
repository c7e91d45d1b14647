/* arrays.h - every array that a caller hands to the compressor, forward and backward, as a list of places: each can be
 * put at another address, and the calls made again. To be included after _DEFAULT_SOURCE, as fences.h. */

#ifndef TESTS_ARRAYS_H
#define TESTS_ARRAYS_H

#include "fences.h"
#include "gradient_support.h"

/* The call that reads or writes an array first. */
typedef enum array_call { CALL_CREATE, CALL_COMPRESS, CALL_POOL, CALL_BACKWARD } array_call;

/* Where the pointer to an array is kept, and what it points to. */
typedef struct place {
    const char *name;
    void **pointer;
    size_t bytes, number; /* number: bytes of one */
    array_call call;
    int written;
} place;

enum { PLACES = DSV4_PARAM_COUNT + 4 + STAGE_COUNT + GRADIENTS };

typedef struct caller_arrays {
    workbench w;           /* its x, parameters and dout are the inputs */
    results r, expected;   /* of the forward call */
    gradient_set g, whole; /* of the backward call */
    void *kv, *gate;       /* what the forward call gave, as inputs of later ones */
    place places[PLACES];
    int count;
} caller_arrays;

SUPPORT void caller_arrays_add(caller_arrays *o, const char *name, void **pointer, size_t bytes, size_t number_size,
                               array_call call, int written) {
    if (bytes > 0) o->places[o->count++] = (place){name, pointer, bytes, number_size, call, written};
}

SUPPORT void caller_arrays_list(caller_arrays *o) {
    workbench *w = &o->w;
    for (int i = 0; i < DSV4_PARAM_COUNT; i++) {
        const dsv4_param_info *info = &w->m.info[i];
        const size_t size = dsv4_dtype_size(model_array(&w->m.params, i)->dtype);
        caller_arrays_add(o, info->name, &w->m.data[i], (size_t)info->count * size, size, CALL_CREATE, 0);
    }
    const size_t x = dsv4_dtype_size(w->s.dtype), dout = dsv4_dtype_size(w->out_dtype);
    caller_arrays_add(o, "x", &w->s.x, (size_t)(w->s.tokens * w->config.hidden_dim) * x, x, CALL_COMPRESS, 0);
    caller_arrays_add(o, "kv", &o->kv, o->r.bytes[STAGE_KV], 4, CALL_POOL, 0);
    caller_arrays_add(o, "gate", &o->gate, o->r.bytes[STAGE_GATE], 4, CALL_POOL, 0);
    caller_arrays_add(o, "dout", &w->dout, (size_t)(w->entries * w->config.head_dim) * dout, dout, CALL_BACKWARD, 0);
    for (int i = 0; i < STAGE_COUNT; i++) {
        const size_t size = i < STAGE_LATENT ? 4 : dsv4_dtype_size(o->r.out_dtype);
        caller_arrays_add(o, stage_name(i), &o->r.stage[i], o->r.bytes[i], size, CALL_COMPRESS, 1);
    }
    for (int i = 0; i < GRADIENTS; i++)
        caller_arrays_add(o, gradient_name(i), &o->g.data[i], o->g.bytes[i], dsv4_dtype_size(o->g.dtype), CALL_BACKWARD,
                          1);
}

/* The parameters from where they lie now. */
SUPPORT dsv4_status caller_arrays_create(caller_arrays *o, const char *isa, engine *e) {
    const dsv4_options options = {isa, 1, 1};
    const dsv4_allocator heap = nan_heap();
    for (int i = 0; i < DSV4_PARAM_COUNT; i++) model_array(&o->w.m.params, i)->data = o->w.m.data[i];
    dsv4_status status = dsv4_compressor_create(&o->w.config, &o->w.m.params, &options, &heap, &e->compressor, NULL);
    if (status == DSV4_OK) status = dsv4_workspace_create(e->compressor, NULL, &heap, &e->workspace, NULL);
    return status;
}

SUPPORT dsv4_status caller_arrays_compress(const caller_arrays *o, const engine *e) {
    return compress_whole(e, &o->w.s, &o->r, NULL);
}

/* Entries from projections. */
SUPPORT dsv4_status caller_arrays_pool(caller_arrays *o, const engine *e) {
    dsv4_batch b = workbench_batch(&o->w, &o->r);
    b.x.data = NULL;
    b.kv = o->kv;
    b.gate = o->r.bytes[STAGE_GATE] ? o->gate : NULL;
    return dsv4_compress(e->compressor, &b, e->workspace, NULL);
}

/* Gradients, the projections recomputed or, with `kept`, given. */
SUPPORT dsv4_status caller_arrays_backward(caller_arrays *o, const engine *e, int kept) {
    dsv4_batch b = backward_whole_batch(&o->w);
    dsv4_gradients to = gradients_into(&o->g, o->w.dout, o->w.out_dtype);
    b.kv = kept ? o->kv : NULL;
    b.gate = kept && o->r.bytes[STAGE_GATE] ? o->gate : NULL;
    return dsv4_backward(e->compressor, &b, &to, e->workspace, NULL);
}

SUPPORT void caller_arrays_poison(caller_arrays *o) {
    for (int i = 0; i < o->count; i++)
        if (o->places[i].written) memset(*o->places[i].pointer, POISON, o->places[i].bytes);
}

/* All calls by one kernel set. NULL, or what went wrong. */
SUPPORT const char *caller_arrays_run(caller_arrays *o, const char *isa) {
    engine e = {0};
    const char *wrong = NULL;
    caller_arrays_poison(o);
    if (caller_arrays_create(o, isa, &e) != DSV4_OK) wrong = "create";
    if (!wrong && caller_arrays_compress(o, &e) != DSV4_OK) wrong = "compress";
    if (!wrong && results_difference(&o->expected, &o->r) != STAGE_COUNT) wrong = "compress gives other bits";
    caller_arrays_poison(o);
    if (!wrong && caller_arrays_pool(o, &e) != DSV4_OK) wrong = "pooling";
    if (!wrong && results_difference(&o->expected, &o->r) != STAGE_COUNT) wrong = "pooling gives other bits";
    for (int kept = 0; kept <= 1 && !wrong; kept++) {
        caller_arrays_poison(o);
        if (caller_arrays_backward(o, &e, kept) != DSV4_OK)
            wrong = "backward";
        else if (gradient_difference(&o->whole, &o->g, 0) != GRADIENTS)
            wrong = "backward gives other bits";
    }
    engine_free(&e);
    return wrong;
}

/* The same with every array in fenced memory. */
SUPPORT const char *caller_arrays_run_fenced(caller_arrays *o, const char *isa) {
    fenced fences[PLACES];
    void *kept[PLACES] = {0};
    for (int i = 0; i < o->count; i++) {
        kept[i] = *o->places[i].pointer;
        fences[i] = fenced_copy(kept[i], o->places[i].bytes);
        *o->places[i].pointer = fences[i].data;
    }
    const char *wrong = caller_arrays_run(o, isa);
    for (int i = 0; i < o->count; i++) {
        *o->places[i].pointer = kept[i];
        fenced_free(&fences[i]);
    }
    return wrong;
}

/* The arrays as malloc gives them, and what the calls come to there. */
SUPPORT caller_arrays caller_arrays_new(const shape *of, int64_t tokens, dsv4_dtype gradient_dtype, uint64_t seed) {
    caller_arrays o = {0};
    o.w = training_new(of, tokens, seed);
    o.expected = workbench_results(&o.w);
    o.r = workbench_results(&o.w);
    o.whole = workbench_gradients(&o.w, gradient_dtype);
    o.g = workbench_gradients(&o.w, gradient_dtype);
    if (compress_whole(&o.w.e, &o.w.s, &o.expected, NULL) != DSV4_OK ||
        backward_whole(&o.w, &o.w.e, &o.whole) != DSV4_OK)
        exit(1);
    o.kv = memcpy(workbench_memory(&o.w, o.r.bytes[STAGE_KV]), o.expected.stage[STAGE_KV], o.r.bytes[STAGE_KV]);
    o.gate = memcpy(workbench_memory(&o.w, o.r.bytes[STAGE_GATE]), o.expected.stage[STAGE_GATE], o.r.bytes[STAGE_GATE]);
    return o;
}

#endif /* TESTS_ARRAYS_H */
