/* The caller's floating-point environment: healthy input, scores of -INFINITY among it, raises no exception but
 * "inexact" and "underflow", so that a caller who traps the others is not stopped. */

#define _GNU_SOURCE /* feenableexcept */

#include <fenv.h>
#include <float.h>

#include "runner.h"
#include "gradient_support.h"
#include "shapes.h"

/* What stops a caller who traps. On CPUs that have no such flags the set is empty. */
static const int alarming = 0
#ifdef FE_INVALID
                            | FE_INVALID
#endif
#ifdef FE_DIVBYZERO
                            | FE_DIVBYZERO
#endif
#ifdef FE_OVERFLOW
                            | FE_OVERFLOW
#endif
    ;

typedef struct scores {
    float pad_gate;
    int masked; /* ape is -INFINITY for so many tokens of each window, from its first */
} scores;

static void mask_first_tokens(model *m, int tokens) {
    for (int64_t i = 0; i < tokens * m->info[DSV4_APE].columns; i++)
        set_number(m->data[DSV4_APE], m->params.ape.dtype, i, -INFINITY);
}

/* A shape at work: creation, one call forward, one in cuts through a state, one back. */
static int everything_works(const shape *of, const char *isa, scores what) {
    static const int64_t cuts[] = {1, 3, 7};
    model m = shape_model(of, 11);
    m.config.pad_gate = what.pad_gate;
    if (what.masked > 0) mask_first_tokens(&m, what.masked);
    sequence s = shape_sequence(of, 5 * of->config.ratio, 12);
    s.position = 4711;
    workbench w = training_with(m, s, of->out, 13);
    results r = workbench_results(&w);
    gradient_set got = workbench_gradients(&w, DSV4_F32);
    engine e = workbench_trainer(&w, isa, NULL);
    int works = compress_whole(&e, &s, &r, NULL) == DSV4_OK && compress_cut(&e, &s, &r, cuts, 3, NULL) == DSV4_OK &&
                backward_whole(&w, &e, &got) == DSV4_OK;
    for (int64_t i = 0; i < r.count[STAGE_OUT]; i++) works &= isfinite(result(&r, STAGE_OUT, i)) != 0;
    workbench_free(&w);
    return works;
}

TEST healthy_input_raises_no_flag(const shape *of, const char *isa) {
    static const scores all[] = {{0, 0}, {-1e4f, 0}, {0, 1}, {-FLT_MAX, 1}, {0, 2}};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        if (all[i].masked > 0 && (of->config.ratio <= all[i].masked || of->config.no_ape))
            continue; /* nothing is left to weigh, or nothing to mask by */
        feclearexcept(FE_ALL_EXCEPT);
        ASSERT(everything_works(of, isa, all[i]));
        const int raised = fetestexcept(alarming);
        ASSERTm(note("pad_gate %g, masked %d: flags %#x", (double)all[i].pad_gate, all[i].masked, (unsigned)raised),
                raised == 0);
    }
    PASS();
}

#if defined(__GLIBC__) && !defined(TESTS_SANITIZED)
TEST healthy_input_does_not_stop_a_caller_who_traps(const char *isa) {
    feclearexcept(FE_ALL_EXCEPT);
    feenableexcept(alarming);
    int works = 1;
    for (int i = 0; i < SHAPE_COUNT; i++) works &= everything_works(&shapes[i], isa, (scores){0, 0});
    fedisableexcept(alarming);
    ASSERT(works);
    PASS();
}
#endif

SUITE(environment) {
    for (const char *isa = dsv4_isa_name(0); isa; isa = isa_after(isa)) {
        for (int i = 0; i < SHAPE_COUNT; i++)
            RUN_NAMED(note("%s_%s", shapes[i].name, isa), healthy_input_raises_no_flag, &shapes[i], isa);
#if defined(__GLIBC__) && !defined(TESTS_SANITIZED)
        RUN_NAMED(isa, healthy_input_does_not_stop_a_caller_who_traps, isa);
#endif
    }
}

TESTS_MAIN(environment);
