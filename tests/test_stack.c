/* How much stack a call takes, so that small threads can be planned for: each runs on a painted stack of its own, and
 * what is no longer paint was used. */

#if !defined(_XOPEN_SOURCE)
#define _XOPEN_SOURCE 600 /* pthread_attr_setstack */
#endif
#include <pthread.h>

#include "runner.h"
#include "gradient_support.h"

enum { STACK = 1 << 20, PAGE = 1 << 16, PAINT = 0x5C };

#if defined(TESTS_SANITIZED)
enum { WATCHED = 1 };
#else
enum { WATCHED = 0 };
#endif

/* Without optimisation every variable has a place of its own. */
#if defined(__OPTIMIZE__)
enum { LIMIT = 16 << 10 };
#else
enum { LIMIT = 32 << 10 };
#endif

/* A compressor of one kernel set at work, and what its calls need. */
typedef struct site {
    workbench w;
    const char *isa;
    engine e;
    results r;
    gradient_set g;
    dsv4_state *state;
    dsv4_status status;
} site;

static site site_new(const shape *of, const char *isa) {
    site s = {0};
    s.w = training_new(of, 300 / of->config.ratio * of->config.ratio, 7);
    s.isa = isa;
    s.e = workbench_trainer(&s.w, isa, NULL);
    s.r = workbench_results(&s.w);
    s.g = workbench_gradients(&s.w, DSV4_F32);
    s.state = keep_state(&s.w, state_new(&s.e, 0));
    return s;
}

/* ---- The calls --------------------------------------------------------------------------------------------- */

static void creates(site *s) {
    const dsv4_options options = {s->isa, 1, 1};
    dsv4_compressor *compressor = NULL;
    dsv4_workspace *workspace = NULL;
    const dsv4_allocator heap = dsv4_heap();
    s->status = dsv4_compressor_create(&s->w.config, &s->w.m.params, &options, &heap, &compressor, NULL);
    if (s->status == DSV4_OK) s->status = dsv4_workspace_create(compressor, NULL, &heap, &workspace, NULL);
    dsv4_workspace_destroy(workspace);
    dsv4_compressor_destroy(compressor);
}

static void compresses(site *s) { s->status = compress_whole(&s->e, &s->w.s, &s->r, NULL); }

/* Tokens one by one until a window closes, in steps of 1 to 15 tokens afterwards: every height of a tile. */
static void decodes(site *s) {
    s->status = dsv4_state_reset(s->state, NULL);
    for (int64_t from = 0, count; from < s->w.s.tokens && s->status == DSV4_OK; from += count) {
        count = from < 2 * s->w.config.ratio ? 1 : from % 15 + 1;
        if (count > s->w.s.tokens - from) count = s->w.s.tokens - from;
        s->status = compress_part(&s->e, &s->w.s, &s->r, s->state, from, from + count, NULL);
    }
}

static void goes_back(site *s) { s->status = backward_whole(&s->w, &s->e, &s->g); }

/* ---- Their depth ------------------------------------------------------------------------------------------- */

typedef struct dive {
    void (*call)(site *);
    site *s;
    const unsigned char *top; /* somewhere in the frame that makes the call */
} dive;

static void *dive_down(void *argument) {
    dive *d = argument;
    unsigned char here;
    d->top = &here;
    d->call(d->s);
    return NULL;
}

/* Bytes of stack below the frame of the caller; -1 where the call failed. It has run once before: the first call of a
 * library's function goes through the dynamic linker, which saves all registers. */
static int64_t depth_of(void (*call)(site *), site *s) {
    unsigned char *memory = reserve(STACK + PAGE), *stack = memory + (PAGE - (uintptr_t)memory % PAGE);
    dive d = {call, s, NULL};
    pthread_attr_t attributes;
    pthread_t thread;
    int64_t untouched = 0;
    call(s);
    memset(stack, PAINT, STACK);
    pthread_attr_init(&attributes);
    if (s->status != DSV4_OK || pthread_attr_setstack(&attributes, stack, STACK) != 0 ||
        pthread_create(&thread, &attributes, dive_down, &d) != 0 || pthread_join(thread, NULL) != 0 ||
        s->status != DSV4_OK) {
        free(memory);
        return -1;
    }
    pthread_attr_destroy(&attributes);
    while (stack[untouched] == PAINT) untouched++;
    const int64_t depth = d.top - (stack + untouched);
    free(memory);
    return depth;
}

static const struct {
    const char *name;
    void (*call)(site *);
} calls[] = {
    {"create", creates},
    {"compress", compresses},
    {"decode", decodes},
    {"backward", goes_back},
};

/* bf16, and fp32 */
static const shape *const kinds[] = {&long_shapes[0], &long_shapes[1]};

TEST calls_need_little_stack(const char *isa) {
    int64_t most = 0;
    if (WATCHED) SKIPm("sanitizers make frames of their own");
    for (size_t k = 0; k < sizeof kinds / sizeof kinds[0]; k++) {
        site s = site_new(kinds[k], isa);
        for (size_t i = 0; i < sizeof calls / sizeof calls[0]; i++) {
            const int64_t depth = depth_of(calls[i].call, &s);
            ASSERTm(note("%s of %s: %lld bytes", calls[i].name, kinds[k]->name, (long long)depth),
                    depth > 0 && depth <= LIMIT);
            if (depth > most) most = depth;
        }
        workbench_free(&s.w);
    }
    printf("%s: at most %lld bytes of stack\n", isa, (long long)most);
    PASS();
}

SUITE(stack) {
    for (const char *isa = dsv4_isa_name(0); isa; isa = isa_after(isa)) {
        RUN_NAMED(isa, calls_need_little_stack, isa);
    }
}

TESTS_MAIN(stack);
