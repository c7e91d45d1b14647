/* mpi.c - one long sequence over several processes: mpirun -n 4 build/mpi
 *
 * Each rank has a run of tokens that may begin and end anywhere. What crosses a boundary is the state that the sequence
 * carries there, saved to bytes: the open window's projected rows, with overlap also the previous window's. On the way
 * back the same number of rows returns, as the gradient of that state. Neither grows with the sequence. The costly
 * part, the projections and their products, runs on all ranks at once; only pooling waits for the state.
 *
 * The entries and dx have the bits of one process for any boundaries, the weights' gradients where boundaries are
 * multiples of 256 tokens. For that their sums go from rank to rank, each adding its own; who does without equal bits
 * may sum up all ranks' gradients with MPI_Allreduce instead. */
#define _POSIX_C_SOURCE 200809L
#define DSV4_COMPRESSOR_IMPLEMENTATION
#include "dsv4_compressor.h"

#include "demo.h"

#include <math.h>
#include <mpi.h>
#include <string.h>

enum { HIDDEN = 256, HEAD = 64, SEED = 5, MOST_RANKS = 8 };

static int rank, ranks;

static void check(dsv4_status status, const dsv4_error *error) {
    if (status == DSV4_OK) return;
    fprintf(stderr, "mpi: rank %d: %s\n", rank, error->text);
    MPI_Abort(MPI_COMM_WORLD, 1);
}

static void *room(int64_t count, size_t size) {
    void *memory = calloc((size_t)count + 1, size);
    if (memory) return memory;
    fprintf(stderr, "mpi: rank %d: out of memory\n", rank);
    MPI_Abort(MPI_COMM_WORLD, 1);
    return NULL;
}

/* ---- The model, the same on all ranks ---------------------------------------------------------------------------- */

typedef struct model {
    const char *name;
    dsv4_config config;
    int64_t columns;   /* of a row of kv, and of gate */
    int64_t sum_count; /* numbers in all parameters' gradients, one after another */
    dsv4_param_info info[DSV4_PARAM_COUNT];
    dsv4_compressor *compressor;
    dsv4_workspace *workspace;
} model;

static model model_new(const char *name, int64_t ratio, int overlap) {
    const dsv4_allocator heap = dsv4_heap();
    const dsv4_options options = {.training = 1};
    dsv4_params params;
    dsv4_error error = {DSV4_ERROR_MEMORY, "out of memory"};
    model m = {.name = name, .columns = (1 + overlap) * HEAD};
    m.config =
        (dsv4_config){.hidden_dim = HIDDEN, .head_dim = HEAD, .ratio = ratio, .rope_dim = 16, .overlap = overlap};
    m.config.rounding = DSV4_ROUNDING_DEEPSEEK;
    if (demo_params(&m.config, SEED, &params)) check(DSV4_ERROR_MEMORY, &error);
    check(dsv4_config_params(&m.config, m.info, &error), &error);
    check(dsv4_compressor_create(&m.config, &params, &options, &heap, &m.compressor, &error), &error);
    check(dsv4_workspace_create(m.compressor, NULL, &heap, &m.workspace, &error), &error);
    for (int i = 0; i < DSV4_PARAM_COUNT; i++) m.sum_count += m.info[i].count;
    demo_free_params(&params);
    return m;
}

static void model_free(model *m) {
    dsv4_workspace_destroy(m->workspace);
    dsv4_compressor_destroy(m->compressor);
}

static dsv4_state *state_new(const model *m) {
    const dsv4_allocator heap = dsv4_heap();
    dsv4_state *state = NULL;
    dsv4_error error;
    check(dsv4_state_create(m->compressor, 0, &heap, &state, &error), &error);
    return state;
}

/* ---- A rank's share of the sequence ------------------------------------------------------------------------------ */

typedef struct share {
    int64_t from, tokens, entries; /* entries whose windows close here */
    dsv4_bf16 *x;                  /* [tokens, HIDDEN] */
    float *dout, *out;             /* [entries, HEAD] */
    float *kv, *gate;              /* [tokens, columns], kept for the way back */
    float *dx;                     /* [tokens, HIDDEN] */
    float *sums;                   /* gradients of all parameters */
} share;

static share share_new(const model *m, int64_t from, int64_t to) {
    const int64_t ratio = m->config.ratio, first = from / ratio;
    share s = {.from = from, .tokens = to - from, .entries = to / ratio - first};
    s.x = (dsv4_bf16 *)room(s.tokens * HIDDEN, sizeof *s.x);
    s.dout = (float *)room(s.entries * HEAD, sizeof *s.dout);
    s.out = (float *)room((s.entries + 1) * HEAD, sizeof *s.out);
    s.kv = (float *)room(s.tokens * m->columns, sizeof *s.kv);
    s.gate = (float *)room(s.tokens * m->columns, sizeof *s.gate);
    s.dx = (float *)room(s.tokens * HIDDEN, sizeof *s.dx);
    s.sums = (float *)room(m->sum_count, sizeof *s.sums);
    for (int64_t t = 0; t < s.tokens; t++) demo_hidden_state(s.x + t * HIDDEN, HIDDEN, SEED, from + t);
    for (int64_t i = 0; i < s.entries * HEAD; i++)
        s.dout[i] = demo_noise((uint64_t)(first * HEAD + i) | (uint64_t)1 << 62);
    return s;
}

static void share_free(share *s) {
    free(s->x);
    free(s->dout);
    free(s->out);
    free(s->kv);
    free(s->gate);
    free(s->dx);
    free(s->sums);
}

/* A call on this share, which `segment` spans. */
static dsv4_batch batch_of(const share *s, const dsv4_segment *segment, float *out, int64_t entries) {
    return (dsv4_batch){.x = {s->x, DSV4_BF16, 0},
                        .tokens = s->tokens,
                        .out = {out, DSV4_F32, 0},
                        .entries = entries,
                        .segments = segment,
                        .segment_count = 1};
}

/* ---- What crosses a boundary ------------------------------------------------------------------------------------- */

/* Returns the bytes sent. */
static int64_t send_state(const dsv4_state *state, int to) {
    dsv4_error error;
    const size_t size = dsv4_state_save_size(state);
    void *bytes = room((int64_t)size, 1);
    check(dsv4_state_save(state, bytes, size, NULL, &error), &error);
    MPI_Send(bytes, (int)size, MPI_BYTE, to, 0, MPI_COMM_WORLD);
    free(bytes);
    return (int64_t)size;
}

static void receive_state(dsv4_state *state, int from) {
    dsv4_error error;
    MPI_Status status;
    int size = 0;
    MPI_Probe(from, 0, MPI_COMM_WORLD, &status);
    MPI_Get_count(&status, MPI_BYTE, &size);
    void *bytes = room(size, 1);
    MPI_Recv(bytes, size, MPI_BYTE, from, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
    check(dsv4_state_restore(state, bytes, (size_t)size, &error), &error);
    free(bytes);
}

/* ---- Forward ----------------------------------------------------------------------------------------------------- */

/* kv and gate of the share's tokens: no neighbour is needed for these, and they are nearly all of the work. The entries
 * that come with them stand for a sequence that begins here, and are not used. */
static void project(const model *m, share *s) {
    dsv4_state *alone = state_new(m);
    const dsv4_segment segment = {.count = s->tokens, .state = alone};
    dsv4_batch batch = batch_of(s, &segment, s->out, s->entries + 1);
    dsv4_error error;
    batch.stages.kv = s->kv;
    batch.stages.gate = s->gate;
    check(dsv4_compress(m->compressor, &batch, m->workspace, &error), &error);
    dsv4_state_destroy(alone);
}

/* Pools the projections into entries. `before` becomes the state before the share. Returns the bytes sent. */
static int64_t forward(const model *m, share *s, dsv4_state *before) {
    dsv4_state *state = state_new(m);
    const dsv4_segment segment = {.count = s->tokens, .position = s->from, .state = state};
    dsv4_batch batch = batch_of(s, &segment, s->out, s->entries);
    dsv4_error error;
    int64_t sent = 0;
    project(m, s);
    batch.kv = s->kv;
    batch.gate = s->gate;
    if (rank > 0) receive_state(before, rank - 1);
    check(dsv4_state_copy(state, before, &error), &error);
    check(dsv4_compress(m->compressor, &batch, m->workspace, &error), &error);
    if (rank + 1 < ranks) sent = send_state(state, rank + 1);
    dsv4_state_destroy(state);
    return sent;
}

/* ---- Backward ---------------------------------------------------------------------------------------------------- */

/* A share on the way back: between the state before it, and the gradient of the state after it. */
typedef struct way_back {
    const model *m;
    share *s;
    dsv4_state *before;
    const dsv4_state *next; /* NULL: the sequence ends here */
} way_back;

/* Computes what `wanted` and `previous` name, and no more. */
static void backward(const way_back *w, dsv4_gradients wanted, dsv4_state *previous) {
    const dsv4_segment segment = {.count = w->s->tokens, .position = w->s->from, .state = w->before};
    const dsv4_segment_gradient carried = {w->next, previous};
    dsv4_batch batch = batch_of(w->s, &segment, NULL, w->s->entries);
    dsv4_error error;
    batch.kv = w->s->kv;
    batch.gate = w->s->gate;
    wanted.dout = (dsv4_const_matrix){w->s->dout, DSV4_F32, 0};
    wanted.segments = &carried;
    check(dsv4_backward(w->m->compressor, &batch, &wanted, w->m->workspace, &error), &error);
}

/* The parameters' gradients lie one after another, so that one message holds them all. */
static dsv4_gradients sums_of(const model *m, float *sums) {
    dsv4_gradients g = {0};
    dsv4_matrix *const targets[DSV4_PARAM_COUNT] = {&g.dwkv, &g.dwgate, &g.dape, &g.dnorm};
    for (int i = 0; i < DSV4_PARAM_COUNT; sums += m->info[i++].count) *targets[i] = (dsv4_matrix){sums, DSV4_F32, 0};
    return g;
}

/* Adds this share's part to what the ranks before have summed up; the last rank's sums are the sequence's. */
static void add_sums(const way_back *w) {
    const int count = (int)w->m->sum_count;
    dsv4_gradients wanted = sums_of(w->m, w->s->sums);
    wanted.accumulate = rank > 0;
    if (rank > 0) MPI_Recv(w->s->sums, count, MPI_FLOAT, rank - 1, 1, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
    backward(w, wanted, NULL);
    if (rank + 1 < ranks) MPI_Send(w->s->sums, count, MPI_FLOAT, rank + 1, 1, MPI_COMM_WORLD);
}

/* First the carried gradient, which a neighbour waits for and which costs next to nothing; then dx, on all ranks at
 * once; then the sums, rank by rank. Returns the bytes sent for the carried gradient. */
static int64_t go_back(const model *m, share *s, dsv4_state *before) {
    dsv4_state *next = state_new(m), *previous = state_new(m);
    way_back w = {m, s, before, NULL};
    int64_t sent = 0;
    if (rank + 1 < ranks) {
        receive_state(next, rank + 1);
        w.next = next;
    }
    if (rank > 0) {
        backward(&w, (dsv4_gradients){.accumulate = 0}, previous);
        sent = send_state(previous, rank - 1);
    }
    backward(&w, (dsv4_gradients){.dx = {s->dx, DSV4_F32, 0}}, NULL);
    add_sums(&w);
    dsv4_state_destroy(next);
    dsv4_state_destroy(previous);
    return sent;
}

/* ---- One process, and what the ranks made of it ------------------------------------------------------------------ */

/* The whole sequence in two plain calls, without states. */
static share alone(const model *m, int64_t tokens) {
    share s = share_new(m, 0, tokens);
    const dsv4_segment segment = {.count = tokens};
    const dsv4_batch batch = batch_of(&s, &segment, s.out, s.entries);
    dsv4_gradients wanted = sums_of(m, s.sums);
    dsv4_error error;
    wanted.dout = (dsv4_const_matrix){s.dout, DSV4_F32, 0};
    wanted.dx = (dsv4_matrix){s.dx, DSV4_F32, 0};
    check(dsv4_compress(m->compressor, &batch, m->workspace, &error), &error);
    check(dsv4_backward(m->compressor, &batch, &wanted, m->workspace, &error), &error);
    return s;
}

/* Rows of all ranks, [count of all, width], at rank 0; NULL elsewhere. */
static float *gather(const float *rows, int64_t count, int width) {
    const int own = (int)count * width;
    int counts[MOST_RANKS], starts[MOST_RANKS + 1] = {0};
    MPI_Gather(&own, 1, MPI_INT, counts, 1, MPI_INT, 0, MPI_COMM_WORLD);
    for (int i = 0; i < ranks && rank == 0; i++) starts[i + 1] = starts[i] + counts[i];
    float *all = rank == 0 ? (float *)room(starts[ranks], sizeof *all) : NULL;
    MPI_Gatherv(rows, own, MPI_FLOAT, all, counts, starts, MPI_FLOAT, 0, MPI_COMM_WORLD);
    return all;
}

/* The last rank's sums, at rank 0. */
static void fetch_sums(const model *m, float *sums) {
    const int count = (int)m->sum_count, last = ranks - 1;
    if (ranks > 1 && rank == last) MPI_Send(sums, count, MPI_FLOAT, 0, 2, MPI_COMM_WORLD);
    if (ranks > 1 && rank == 0) MPI_Recv(sums, count, MPI_FLOAT, last, 2, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
}

static int64_t most(int64_t bytes) {
    int64_t result = 0;
    MPI_Reduce(&bytes, &result, 1, MPI_INT64_T, MPI_MAX, 0, MPI_COMM_WORLD);
    return result;
}

static double furthest(const float *a, const float *b, int64_t count) {
    double distance = 0, largest = 0;
    for (int64_t i = 0; i < count; i++) {
        distance = fmax(distance, fabs((double)a[i] - (double)b[i]));
        largest = fmax(largest, fabs((double)b[i]));
    }
    return distance / largest;
}

/* Prints the verdict over some numbers; returns whether it is bad. */
static int judge(const char *what, const float *got, const float *expected, int64_t count, int need_bits) {
    const int same = memcmp(got, expected, (size_t)count * sizeof *got) == 0;
    const double distance = same ? 0 : furthest(got, expected, count);
    const int bad = need_bits ? !same : !(distance < 1e-6);
    if (same)
        printf("   %s: same bits", what);
    else
        printf("   %s: %.0e of the largest apart%s", what, distance, bad ? ", WRONG" : "");
    return bad;
}

/* ---- The cases --------------------------------------------------------------------------------------------------- */

typedef enum cut { CUT_256, CUT_ANYWHERE, CUT_SHORT, CUTS } cut;

/* Where rank i begins. */
static int64_t boundary(cut kind, int i, int64_t tokens) {
    if (i == 0 || i == ranks) return i == 0 ? 0 : tokens;
    if (kind == CUT_SHORT) return 2 * i - 1; /* shares of one or two tokens: what is carried passes through them */
    const int64_t even = tokens * i / ranks / 256 * 256;
    return kind == CUT_256 ? even : even + 1 + (int64_t)(demo_bits((uint64_t)i) >> 40) % 255;
}

/* Runs the ranks on a sequence whose results rank 0 knows. *bytes is the most that any boundary took, one way. */
static int run_case(const model *m, cut kind, int64_t tokens, const share *expected, int64_t *bytes) {
    share s = share_new(m, boundary(kind, rank, tokens), boundary(kind, rank + 1, tokens));
    dsv4_state *before = state_new(m);
    int bad = 0;
    const int64_t forth = most(forward(m, &s, before)), back = most(go_back(m, &s, before));
    float *out = gather(s.out, s.entries, HEAD), *dx = gather(s.dx, s.tokens, HIDDEN);
    fetch_sums(m, s.sums);
    if (rank == 0) {
        printf("%s, %lld tokens, boundaries", m->name, (long long)tokens);
        for (int i = 1; i < ranks; i++) printf(" %lld", (long long)boundary(kind, i, tokens));
        printf("%s: %lld bytes over each at most, %lld back\n", ranks > 1 ? "" : " none", (long long)forth,
               (long long)back);
        bad |= judge("entries", out, expected->out, expected->entries * HEAD, 1);
        bad |= judge("dx", dx, expected->dx, tokens * HIDDEN, 1);
        bad |= judge("weights' gradients", s.sums, expected->sums, m->sum_count, kind == CUT_256);
        printf("\n");
    }
    free(out);
    free(dx);
    dsv4_state_destroy(before);
    share_free(&s);
    *bytes = forth > back ? forth : back;
    return bad;
}

/* Each kind of boundaries at two lengths: what is exchanged must not depend on the length. */
static int run_model(const char *name, int64_t ratio, int overlap) {
    static const int64_t lengths[2] = {2048, 8192};
    model m = model_new(name, ratio, overlap);
    int64_t bytes[2][CUTS] = {{0}};
    int bad = 0;
    for (int i = 0; i < 2; i++) {
        share expected = {.tokens = 0};
        if (rank == 0) expected = alone(&m, lengths[i]);
        for (int kind = 0; kind < (ranks > 1 ? CUTS : 1); kind++)
            bad |= run_case(&m, (cut)kind, lengths[i], &expected, &bytes[i][kind]);
        share_free(&expected);
    }
    if (rank == 0 && memcmp(bytes[0], bytes[1], sizeof bytes[0]) != 0) {
        printf("%s: the bytes exchanged are not those of the shorter sequence, WRONG\n", name);
        bad = 1;
    }
    model_free(&m);
    return bad;
}

int main(int argc, char **argv) {
    int bad = 0;
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    if (ranks > MOST_RANKS) { /* 2048 tokens have no more blocks of 256 */
        if (rank == 0) fprintf(stderr, "mpi: at most %d processes\n", MOST_RANKS);
        MPI_Finalize();
        return 2;
    }
    if (rank == 0) printf("--- %d process%s\n", ranks, ranks > 1 ? "es" : "");
    bad |= run_model("CSA", 4, 1);
    bad |= run_model("HCA", 128, 0);
    if (rank == 0) printf("%s\n", bad ? "WRONG" : "as one process");
    MPI_Bcast(&bad, 1, MPI_INT, 0, MPI_COMM_WORLD);
    MPI_Finalize();
    return bad;
}
