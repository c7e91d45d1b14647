/* What can fail is made to fail, and what arrays may do they do: allocations, arenas, addresses, guard pages,
 * numbers that are none in the backward pass, one compressor in many threads (pthread). */

#define _DEFAULT_SOURCE /* MAP_ANONYMOUS */
#define _POSIX_C_SOURCE 200809L

#include "arrays.h"
#include "runner.h"
#include "threads.h"

/* ---- Allocations ------------------------------------------------------------------------------------------- */

/* Everything that changes what a creating call asks for. */
static const struct making {
    const char *name;
    int training, bf16_gradients, threads;
    int64_t depth;
} makings[] = {{"plain", 0, 0, 1, 0},
               {"deep", 0, 0, 1, 9},
               {"threads_5", 0, 0, 5, 1},
               {"training", 1, 0, 1, 2},
               {"training_threads_3", 1, 0, 3, 0},
               {"bf16_gradients", 1, 1, 2, 3}};
enum { MAKING_COUNT = sizeof makings / sizeof *makings, OBJECTS = 3 };

/* The three objects, in the order in which they are made. */
typedef struct objects {
    dsv4_compressor *compressor;
    dsv4_workspace *workspace;
    dsv4_state *state;
} objects;

static dsv4_status make_object(objects *o, int which, const workbench *w, const struct making *how,
                               const dsv4_allocator *a) {
    static team c;
    const dsv4_options options = {NULL, how->training, how->bf16_gradients};
    const dsv4_parallel parallel = {forward_run, &c, how->threads};
    if (which == 0) return dsv4_compressor_create(&w->config, &w->m.params, &options, a, &o->compressor, NULL);
    if (which == 1) return dsv4_workspace_create(o->compressor, &parallel, a, &o->workspace, NULL);
    return dsv4_state_create(o->compressor, how->depth, a, &o->state, NULL);
}

static dsv4_status object_size(const objects *o, int which, const workbench *w, const struct making *how,
                               size_t *bytes) {
    const dsv4_options options = {NULL, how->training, how->bf16_gradients};
    if (which == 0) return dsv4_compressor_size(&w->config, &w->m.params, &options, bytes, NULL);
    if (which == 1) return dsv4_workspace_size(o->compressor, how->threads, bytes, NULL);
    return dsv4_state_size(o->compressor, how->depth, bytes, NULL);
}

static void destroy_objects(objects *o) {
    dsv4_state_destroy(o->state);
    dsv4_workspace_destroy(o->workspace);
    dsv4_compressor_destroy(o->compressor);
}

/* Whether the objects do their work as well as any. */
static int objects_work(const objects *o, workbench *w) {
    engine e = {o->compressor, o->workspace};
    results r = workbench_results(w);
    dsv4_status status = compress_part(&e, &w->s, &r, o->state, 0, w->s.tokens, NULL);
    return status == DSV4_OK && results_difference(&w->whole, &r) == STAGE_COUNT;
}

/* Each object's allocations fail one after another; nothing is written or kept, and the next attempt succeeds. */
TEST each_allocation_that_fails_changes_nothing(const shape *of, const struct making *how) {
    workbench w = workbench_new(of, 3, 71);
    ledger l = {0};
    const dsv4_allocator a = ledger_allocator(&l);
    objects o = {0};
    int64_t failures = 0;
    for (int which = 0; which < OBJECTS; which++) {
        dsv4_status status = DSV4_ERROR_MEMORY;
        const int64_t before = l.live, calls = l.calls;
        for (int64_t nth = 1; status != DSV4_OK; nth++) {
            const objects untouched = o;
            l.fail_at = l.calls + nth;
            status = make_object(&o, which, &w, how, &a);
            if (status == DSV4_OK) break;
            ASSERT_EQ(DSV4_ERROR_MEMORY, status);
            ASSERT_MEM_EQ(&untouched, &o, sizeof o);
            ASSERT_EQ_FMT((int)before, (int)l.live, "%d");
            ASSERTm("it goes on failing", ++failures < 100);
        }
        ASSERTm("an allocation failed", l.calls > calls + 1);
    }
    ASSERT(objects_work(&o, &w));
    destroy_objects(&o);
    ASSERT_EQ_FMT(0, (int)l.live, "%d");
    ASSERT_FALSE(l.wrong);
    workbench_free(&w);
    PASS();
}

/* An arena with one byte less than an object's size refuses it and stays as it is; with that byte it holds it. */
TEST one_byte_too_few_is_too_few(const shape *of, const struct making *how) {
    workbench w = workbench_new(of, 3, 72);
    objects o = {0};
    dsv4_arena arena[OBJECTS]; /* an object's allocator must outlive it */
    for (int which = 0; which < OBJECTS; which++) {
        size_t bytes = 0;
        ASSERT_EQ(DSV4_OK, object_size(&o, which, &w, how, &bytes));
        unsigned char *base = workbench_memory(&w, bytes + DSV4_ALIGNMENT);
        base += (DSV4_ALIGNMENT - (uintptr_t)base % DSV4_ALIGNMENT) % DSV4_ALIGNMENT;
        memset(base, POISON, bytes);
        arena[which] = dsv4_arena_init(base, bytes - 1);
        const dsv4_allocator a = dsv4_arena_allocator(&arena[which]);
        const objects untouched = o;
        ASSERT_EQ(DSV4_ERROR_MEMORY, make_object(&o, which, &w, how, &a));
        ASSERT_MEM_EQ(&untouched, &o, sizeof o);
        ASSERT_EQ(0, arena[which].used);
        ASSERT(memory_untouched(base, bytes));
        arena[which] = dsv4_arena_init(base, bytes);
        ASSERT_EQ(DSV4_OK, make_object(&o, which, &w, how, &a));
        ASSERT_EQ(bytes, arena[which].used);
    }
    ASSERT(objects_work(&o, &w));
    destroy_objects(&o);
    for (int which = 0; which < OBJECTS; which++) ASSERT_EQ(0, arena[which].used); /* all was given back */
    workbench_free(&w);
    PASS();
}

/* ---- Addresses --------------------------------------------------------------------------------------------- */

/* Every array, inputs and outputs, each at another multiple of its number's size, forward and backward. */
TEST any_address_that_the_type_allows_gives_the_same_bits(const shape *of) {
    enum { ROUNDS = 16, AROUND = 128 };
    const int sets = isa_count();
    caller_arrays o = caller_arrays_new(of, 3 * of->config.ratio, of->out, 73);
    caller_arrays_list(&o);
    for (int round = 0; round < ROUNDS; round++) {
        unsigned char *memory[PLACES] = {0}, *base[PLACES] = {0};
        void *kept[PLACES] = {0};
        for (int i = 0; i < o.count; i++) {
            const place *p = &o.places[i];
            memory[i] = reserve(p->bytes + 4 * AROUND);
            memset(memory[i], POISON, p->bytes + 4 * AROUND);
            base[i] =
                memory[i] + AROUND + (64 - (uintptr_t)memory[i] % 64) + (size_t)((round + 5 * i) % 16) * p->number;
            kept[i] = *p->pointer;
            ASSERT(kept[i] != NULL);
            *p->pointer = memcpy(base[i], kept[i], p->bytes);
        }
        const char *wrong = caller_arrays_run(&o, dsv4_isa_name(round % sets));
        for (int i = 0; i < o.count; i++) {
            const place *p = &o.places[i];
            ASSERT(memory_untouched(memory[i], (size_t)(base[i] - memory[i])));
            ASSERT(
                memory_untouched(base[i] + p->bytes, p->bytes + 4 * AROUND - (size_t)(base[i] - memory[i]) - p->bytes));
            *p->pointer = kept[i];
            free(memory[i]);
        }
        ASSERTm(note("round %d: %s", round, wrong ? wrong : ""), !wrong);
    }
    workbench_free(&o.w);
    PASS();
}

static dsv4_status run_call(caller_arrays *o, array_call call, engine *e) {
    engine other = {0};
    dsv4_status status;
    switch (call) {
    case CALL_CREATE:
        status = caller_arrays_create(o, NULL, &other);
        engine_free(&other);
        return status;
    case CALL_COMPRESS:
        return caller_arrays_compress(o, e);
    case CALL_POOL:
        return caller_arrays_pool(o, e);
    default:
        return caller_arrays_backward(o, e, 0);
    }
}

/* Every array, one at a time, at each address between two that its type allows. */
TEST a_crooked_pointer_is_refused_and_nothing_written(const shape *of) {
    caller_arrays o = caller_arrays_new(of, 3 * of->config.ratio, of->out, 74);
    engine e = {0};
    caller_arrays_list(&o);
    ASSERT_EQ(DSV4_OK, caller_arrays_create(&o, NULL, &e));
    for (int i = 0; i < o.count; i++) {
        const place *p = &o.places[i];
        void *straight = *p->pointer;
        for (size_t crooked = 1; crooked < p->number; crooked++) {
            caller_arrays_poison(&o);
            *p->pointer = (char *)straight + crooked;
            dsv4_status status = run_call(&o, p->call, &e);
            const int read_again = !p->written && (p->call == CALL_COMPRESS || p->call == CALL_POOL); /* by backward */
            dsv4_status again = read_again ? caller_arrays_backward(&o, &e, 1) : status;
            *p->pointer = straight;
            ASSERTm(note("%s, %d bytes off", p->name, (int)crooked), status == DSV4_ERROR_ALIGNMENT && again == status);
            for (int k = 0; k < o.count; k++)
                if (o.places[k].written) ASSERT(memory_untouched(*o.places[k].pointer, o.places[k].bytes));
        }
    }
    const char *wrong = caller_arrays_run(&o, NULL); /* and the next calls work */
    ASSERTm(wrong, !wrong);
    engine_free(&e);
    workbench_free(&o.w);
    PASS();
}

/* ---- Guard pages ------------------------------------------------------------------------------------------- */

/* Every array ends where memory ends, for every width from one vector to three, with every mix of types. */
TEST no_call_passes_the_end_of_an_array(const char *isa, int narrow) {
    for (int tail = 0; tail <= 34; tail++) {
        const dsv4_dtype type = narrow ? DSV4_BF16 : DSV4_F32;
        shape of = tail_shape(tail, 2, (17 + tail) / 2 * 2, type, type);
        for (int i = 0; i < DSV4_PARAM_COUNT; i++) of.param[i] = (narrow + tail + i) % 3 ? DSV4_BF16 : DSV4_F32;
        caller_arrays o = caller_arrays_new(&of, 10, type, 75);
        caller_arrays_list(&o);
        const char *wrong = caller_arrays_run_fenced(&o, isa);
        ASSERTm(note("tail %d: %s", tail, wrong ? wrong : ""), !wrong);
        workbench_free(&o.w);
    }
    PASS();
}

/* ---- Numbers that are none, backward ------------------------------------------------------------------------- */

/* A special number in the gradient of an entry reaches dx of the windows that it pooled, and no other. */
TEST a_special_gradient_reaches_its_own_tokens_alone(const shape *of) {
    enum { WINDOWS = 6 };
    workbench w = training_new(of, WINDOWS * of->config.ratio, 76);
    const int64_t window_numbers = of->config.ratio * w.config.hidden_dim;
    for (int64_t entry = 0; entry < WINDOWS; entry++) {
        for (int special = 0; special < SPECIAL_COUNT; special++) {
            const int64_t at = entry * w.config.head_dim;
            const float kept = (float)number(w.dout, w.out_dtype, at);
            gradient_set got = workbench_gradients(&w, DSV4_F32);
            set_number(w.dout, w.out_dtype, at, float_of_bits(specials[special].bits));
            ASSERT_EQ(DSV4_OK, backward_whole(&w, &w.e, &got));
            set_number(w.dout, w.out_dtype, at, kept);
            for (int64_t window = 0; window < WINDOWS; window++) {
                if (window == entry || (of->config.overlap && window + 1 == entry)) continue;
                ASSERT_MEM_EQ((float *)w.gradients.data[ORACLE_DX] + window * window_numbers,
                              (float *)got.data[ORACLE_DX] + window * window_numbers, (size_t)window_numbers * 4);
            }
            for (int64_t i = 0; i < got.count[ORACLE_DX] && special >= SPECIAL_SUBNORMAL; i++)
                ASSERT(isfinite(number(got.data[ORACLE_DX], DSV4_F32, i)));
        }
    }
    workbench_free(&w);
    PASS();
}

/* NaN and the infinities anywhere in the inputs: no kernel set crashes, all agree on every gradient. */
TEST special_inputs_give_one_gradient(const shape *of) {
    caller_arrays o = caller_arrays_new(of, 3 * of->config.ratio, DSV4_F32, 77);
    gradient_set *scalar = &o.whole, *got = &o.g;
    caller_arrays_list(&o);
    for (int i = 0; i < o.count; i++) {
        const place *p = &o.places[i];
        const dsv4_dtype dtype = p->number == 4 ? DSV4_F32 : DSV4_BF16;
        const int64_t at = (int64_t)(p->bytes / p->number / 2);
        for (int special = 0; special < SPECIAL_LARGEST && !p->written; special++) {
            const float kept = (float)number(*p->pointer, dtype, at);
            const char *isa = "scalar";
            set_number(*p->pointer, dtype, at, float_of_bits(specials[special].bits));
            for (int k = -1; isa; isa = dsv4_isa_name(++k)) {
                engine e = {0};
                ASSERT_EQ(DSV4_OK, caller_arrays_create(&o, isa, &e));
                ASSERT_EQ(DSV4_OK, caller_arrays_backward(&o, &e, p->call == CALL_POOL));
                engine_free(&e);
                for (int which = 0; which < GRADIENTS; which++) {
                    if (k < 0 && got->bytes[which]) memcpy(scalar->data[which], got->data[which], got->bytes[which]);
                    for (int64_t n = 0; n < got->count[which]; n++)
                        ASSERTm(note("%s in %s, %s[%d]", isa, p->name, gradient_name(which), (int)n),
                                same_number(number(scalar->data[which], DSV4_F32, n),
                                            number(got->data[which], DSV4_F32, n)));
                }
            }
            set_number(*p->pointer, dtype, at, kept);
        }
    }
    workbench_free(&o.w);
    PASS();
}

/* ---- Sizes, backward ----------------------------------------------------------------------------------------- */

TEST the_oddest_sizes_have_gradients(const shape *of) {
    caller_arrays o = caller_arrays_new(of, of->config.ratio * (of->config.ratio > 1000 ? 2 : 20), DSV4_F32, 78);
    const char *isa;
    caller_arrays_list(&o);
    for (int k = (int)(of - odd_shapes) % 2; (isa = dsv4_isa_name(k)) != NULL; k += 2) { /* the others have the next */
        const char *wrong = caller_arrays_run(&o, isa);
        ASSERTm(note("%s: %s", isa, wrong ? wrong : ""), !wrong);
    }
    oracle_gradients expected = oracle_gradients_of(&o.w);
    for (int which = 0; which < GRADIENTS; which++) {
        const double far = gradient_stray(&o.w.gradients, &expected, which);
        ASSERTm(note("%s strays by %.3g of its largest", gradient_name(which), far), far <= 5e-6);
    }
    workbench_free(&o.w);
    PASS();
}

/* Ten thousand sequences of nought to five tokens in one backward call: dx is that of each alone. */
TEST thousands_of_short_sequences_share_a_backward_call(void) {
    enum { COUNT = 10000, MOST = 5 };
    workbench w = training_new(&shapes[10], COUNT * MOST, 79); /* ratio 2 */
    const dsv4_segment *segments = short_segments(&w, COUNT, MOST, 80);
    gradient_set all = workbench_gradients(&w, DSV4_F32), one = workbench_gradients(&w, DSV4_F32);
    dsv4_batch b = backward_batch(&w, segments, COUNT);
    dsv4_gradients to = gradients_into(&all, w.dout, w.out_dtype);
    ASSERT_EQ(DSV4_OK, workbench_backward(&w, &b, &to));
    to = gradients_into(&one, w.dout, w.out_dtype);
    for (int i = 0; i < COUNT; i += 97) {
        const size_t row = (size_t)w.config.hidden_dim * 4, from = (size_t)segments[i].token * row;
        b = backward_batch(&w, &segments[i], 1);
        ASSERT_EQ(DSV4_OK, workbench_backward(&w, &b, &to));
        ASSERT_MEM_EQ((char *)one.data[ORACLE_DX] + from, (char *)all.data[ORACLE_DX] + from,
                      (size_t)segments[i].count * row);
    }
    workbench_free(&w);
    PASS();
}

/* ---- Threads ----------------------------------------------------------------------------------------------- */

/* A caller's thread: a workspace and a state of its own, the compressor shared. */
typedef struct caller {
    const workbench *w;
    pthread_t thread;
    int same;
} caller;

static void *call_often(void *argument) {
    caller *c = argument;
    const dsv4_allocator heap = nan_heap();
    const int64_t lengths[] = {3, 1, 5};
    engine e = {c->w->e.compressor, NULL};
    c->same = dsv4_workspace_create(e.compressor, NULL, &heap, &e.workspace, NULL) == DSV4_OK;
    for (int round = 0; round < 5 && c->same; round++) {
        results r = results_new(&c->w->config, c->w->out_dtype, c->w->s.tokens, c->w->entries);
        const dsv4_status status =
            round % 2 ? compress_whole(&e, &c->w->s, &r, NULL) : compress_cut(&e, &c->w->s, &r, lengths, 3, NULL);
        c->same = status == DSV4_OK && results_difference(&c->w->whole, &r) == STAGE_COUNT;
        results_free(&r);
    }
    dsv4_workspace_destroy(e.workspace);
    return NULL;
}

TEST many_threads_share_a_compressor(const shape *of) {
    enum { CALLERS = 16 };
    workbench w = workbench_new(of, 8, 81);
    caller callers[CALLERS];
    int started = 0, same = 0;
    for (; started < CALLERS; started++) {
        callers[started] = (caller){&w, 0, 0};
        if (pthread_create(&callers[started].thread, NULL, call_often, &callers[started]) != 0) break;
    }
    for (int i = 0; i < started; i++) {
        pthread_join(callers[i].thread, NULL);
        same += callers[i].same;
    }
    ASSERT(started > 0);
    ASSERT_EQ_FMT(started, same, "%d");
    workbench_free(&w);
    PASS();
}

/* ---- The suite --------------------------------------------------------------------------------------------- */

SUITE(faults) {
    for (int i = 0; i < MAKING_COUNT; i++) {
        for (int k = 0; k < SHAPE_COUNT; k += 5) {
            const shape *of = &shapes[k];
            const char *how = makings[i].name;
            RUN_NAMED(note("%s_%s", how, of->name), each_allocation_that_fails_changes_nothing, of, &makings[i]);
            RUN_NAMED(note("%s_%s", how, of->name), one_byte_too_few_is_too_few, of, &makings[i]);
        }
    }
    FOR_EVERY_SHAPE(any_address_that_the_type_allows_gives_the_same_bits, of);
    FOR_EVERY_SHAPE(a_crooked_pointer_is_refused_and_nothing_written, of);
    for (const char *isa = dsv4_isa_name(0); isa; isa = isa_after(isa)) {
        for (int narrow = 0; narrow <= 1; narrow++) {
            RUN_NAMED(note("%s_%s", isa, narrow ? "bf16" : "f32"), no_call_passes_the_end_of_an_array, isa, narrow);
        }
    }
    FOR_EVERY_SHAPE(a_special_gradient_reaches_its_own_tokens_alone, of);
    FOR_EVERY_SHAPE(special_inputs_give_one_gradient, of);
    FOR_SHAPES(odd_shapes, ODD_SHAPE_COUNT, the_oddest_sizes_have_gradients, of);
    RUN_TEST(thousands_of_short_sequences_share_a_backward_call);
    FOR_EVERY_SHAPE(many_threads_share_a_compressor, of);
}

TESTS_MAIN(faults);
