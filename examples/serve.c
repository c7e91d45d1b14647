/* serve.c - a serving loop with a paged cache: prompts in chunks, speculative decoding with roll back, a shared
 * prefix.  Entries are kept as the published models keep them, FP8 rows with their scales, in pages of 64. A
 * sequence has a table of pages; each step is one call of dsv4_compress with a segment from every sequence, which
 * writes its entries straight into their pages: entry_rows says where. Guesses that turn out wrong are rolled back,
 * their entries overwritten by the next ones. One sequence continues another's prompt: it copies the state and
 * points at the same pages. At the end every sequence's rows are compared with those of one call over all of its
 * tokens. */
#define _POSIX_C_SOURCE 200809L
#define DSV4_COMPRESSOR_IMPLEMENTATION
#include "dsv4_compressor.h"

#include "demo.h"

#include <string.h>

enum { SEQUENCES = 5, LENGTH = 700, DRAFTS = 5, CHUNK = 100, HIDDEN = 128, HEAD = 128, ROPE = 64 };
enum { PAGE = 64, TABLE = LENGTH / PAGE + 2, PAGES = SEQUENCES * TABLE };

typedef struct sequence {
    uint64_t seed;
    int64_t prompt, accepted;      /* tokens */
    const struct sequence *parent; /* whose first `shared` tokens these are too */
    int64_t shared;
    dsv4_state *state;
    int64_t table[TABLE], pages; /* entry e is row e % PAGE of page table[e / PAGE] */
} sequence;

typedef struct server {
    dsv4_config config;
    dsv4_compressor *compressor;
    dsv4_workspace *workspace;
    size_t row_bytes, scale_bytes;
    unsigned char *rows, *scales; /* [PAGES * PAGE]: every page's rows, every page's scales */
    int64_t pages;                /* taken */
    sequence sequences[SEQUENCES];
    int64_t calls, tokens, rolled_back;
} server;

/* One call: tokens of some sequences, and the cache's row for each entry that they complete. */
typedef struct step {
    dsv4_bf16 x[SEQUENCES * CHUNK][HIDDEN];
    dsv4_segment segments[SEQUENCES];
    int64_t right[SEQUENCES]; /* tokens of the segment that turn out true */
    sequence *owner[SEQUENCES];
    int64_t entry_rows[SEQUENCES * CHUNK];
    int64_t count, tokens, entries;
} step;

static int check(dsv4_status status, const dsv4_error *error) {
    if (status != DSV4_OK) fprintf(stderr, "serve: %s\n", error->text);
    return status != DSV4_OK;
}

/* ---- The model's part: hidden states of the true tokens, and of guesses that are wrong ---------------------- */

static void true_token(const sequence *s, int64_t t, dsv4_bf16 *row) {
    demo_hidden_state(row, HIDDEN, t < s->shared ? s->parent->seed : s->seed, t);
}

static void wrong_token(const sequence *s, int64_t t, dsv4_bf16 *row) {
    demo_hidden_state(row, HIDDEN, s->seed + 1000, t);
}

/* How many of `drafts` guesses the model finds right. */
static int64_t right_guesses(const sequence *s, int64_t drafts) {
    return (int64_t)(demo_bits(s->seed * 1000 + (uint64_t)s->accepted) >> 40) % (drafts + 1);
}

/* ---- The cache ---------------------------------------------------------------------------------------------- */

/* The cache's row of a sequence's entry, on a new page where it is the first of one. */
static int64_t cache_row(server *v, sequence *s, int64_t entry) {
    if (entry / PAGE == s->pages) s->table[s->pages++] = v->pages++;
    return s->table[entry / PAGE] * PAGE + entry % PAGE;
}

/* s goes on where `parent` stands: full pages are both's, the one that is being filled is copied. */
static int share_prefix(server *v, sequence *s, const sequence *parent) {
    dsv4_error error;
    const int64_t entries = dsv4_visible_entries(parent->accepted - 1, v->config.ratio), full = entries / PAGE;
    s->parent = parent;
    s->shared = s->accepted = parent->accepted;
    memcpy(s->table, parent->table, (size_t)full * sizeof *s->table);
    s->pages = full;
    for (int64_t e = full * PAGE; e < entries; e++) {
        const size_t to = (size_t)cache_row(v, s, e), from = (size_t)(parent->table[full] * PAGE + e % PAGE);
        memcpy(v->rows + to * v->row_bytes, v->rows + from * v->row_bytes, v->row_bytes);
        memcpy(v->scales + to * v->scale_bytes, v->scales + from * v->scale_bytes, v->scale_bytes);
    }
    return check(dsv4_state_copy(s->state, parent->state, &error), &error);
}

/* ---- A step ------------------------------------------------------------------------------------------------- */

/* Adds the tokens that sequence s sends into this step: a chunk of its prompt, or its last token and guesses. */
static void add_segment(server *v, step *r, sequence *s) {
    const int in_prompt = s->accepted < s->prompt;
    const int64_t wanted = !in_prompt ? 1 + DRAFTS : s->prompt - s->accepted < CHUNK ? s->prompt - s->accepted : CHUNK;
    const int64_t count = wanted < LENGTH - s->accepted ? wanted : LENGTH - s->accepted;
    const int64_t first = s->accepted / v->config.ratio, entries = dsv4_entry_count(&v->config, s->state, count);
    if (count == 0) return;
    r->right[r->count] = in_prompt ? count : 1 + right_guesses(s, count - 1);
    for (int64_t i = 0; i < count; i++) {
        (i < r->right[r->count] ? true_token : wrong_token)(s, s->accepted + i, r->x[r->tokens + i]);
    }
    for (int64_t i = 0; i < entries; i++) r->entry_rows[r->entries++] = cache_row(v, s, first + i);
    r->owner[r->count] = s;
    r->segments[r->count++] =
        (dsv4_segment){.token = r->tokens, .count = count, .position = s->accepted, .state = s->state};
    r->tokens += count;
}

static int compress(server *v, const step *r) {
    dsv4_error error;
    const dsv4_batch batch = {.x = {r->x, DSV4_BF16, 0},
                              .tokens = r->tokens,
                              .out = {v->rows, DSV4_PACKED, (int64_t)v->row_bytes},
                              .scales = {v->scales, DSV4_PACKED, (int64_t)v->scale_bytes},
                              .entries = (int64_t)PAGES * PAGE,
                              .entry_rows = r->entry_rows,
                              .segments = r->segments,
                              .segment_count = r->count};
    v->calls++;
    v->tokens += r->tokens;
    return check(dsv4_compress(v->compressor, &batch, v->workspace, &error), &error);
}

/* One call for all sequences; *busy says whether any had something to do. */
static int serve_step(server *v, step *r, int *busy) {
    dsv4_error error;
    r->count = r->tokens = r->entries = 0;
    for (int i = 0; i < SEQUENCES; i++) {
        sequence *s = &v->sequences[i];
        if (s->parent != NULL && s->shared == 0) { /* waits for the prompt that it goes on with */
            if (s->parent->accepted >= s->parent->prompt && share_prefix(v, s, s->parent)) return 1;
            continue;
        }
        add_segment(v, r, s);
    }
    *busy = r->count > 0;
    if (*busy && compress(v, r)) return 1;
    for (int64_t i = 0; i < r->count; i++) {
        const int64_t wrong = r->segments[i].count - r->right[i];
        r->owner[i]->accepted += r->right[i];
        v->rolled_back += wrong;
        if (check(dsv4_state_roll_back(r->owner[i]->state, wrong, &error), &error)) return 1;
    }
    return 0;
}

/* ---- Beginning and end -------------------------------------------------------------------------------------- */

static int start(server *v) {
    const dsv4_allocator heap = dsv4_heap();
    dsv4_error error;
    v->compressor = demo_compressor(&v->config, 1);
    if (!v->compressor || check(dsv4_workspace_create(v->compressor, NULL, &heap, &v->workspace, &error), &error) ||
        check(dsv4_row_sizes(&v->config, &v->row_bytes, &v->scale_bytes, &error), &error))
        return 1;
    v->rows = (unsigned char *)calloc((size_t)PAGES * PAGE, v->row_bytes);
    v->scales = (unsigned char *)calloc((size_t)PAGES * PAGE, v->scale_bytes);
    for (int i = 0; i < SEQUENCES; i++) {
        sequence *s = &v->sequences[i];
        s->seed = (uint64_t)i + 1;
        s->prompt = 350 + 61 * i; /* of different lengths, so that windows close at different times */
        if (check(dsv4_state_create(v->compressor, DRAFTS, &heap, &s->state, &error), &error)) return 1;
    }
    v->sequences[SEQUENCES - 1].parent = &v->sequences[0];
    return !v->rows || !v->scales;
}

static void stop(server *v) {
    for (int i = 0; i < SEQUENCES; i++) dsv4_state_destroy(v->sequences[i].state);
    dsv4_workspace_destroy(v->workspace);
    dsv4_compressor_destroy(v->compressor);
    free(v->rows);
    free(v->scales);
}

/* Compresses a whole sequence in one call, and counts its rows in the cache that differ. */
static int compare(server *v, sequence *s, int64_t *differ) {
    static dsv4_bf16 x[LENGTH][HIDDEN];
    static unsigned char rows[LENGTH][2 * HEAD], scales[LENGTH][HEAD];
    dsv4_error error;
    const dsv4_batch whole = {.x = {x, DSV4_BF16, 0},
                              .tokens = LENGTH,
                              .out = {rows, DSV4_PACKED, sizeof *rows},
                              .scales = {scales, DSV4_PACKED, sizeof *scales},
                              .entries = LENGTH,
                              .segments = &(dsv4_segment){.count = LENGTH},
                              .segment_count = 1,
                              .drop_tail = 1};
    for (int64_t t = 0; t < LENGTH; t++) true_token(s, t, x[t]);
    if (check(dsv4_compress(v->compressor, &whole, v->workspace, &error), &error)) return 1;
    for (int64_t e = 0; e < LENGTH / v->config.ratio; e++) {
        const size_t row = (size_t)cache_row(v, s, e);
        *differ += memcmp(rows[e], v->rows + row * v->row_bytes, v->row_bytes) != 0 ||
                   memcmp(scales[e], v->scales + row * v->scale_bytes, v->scale_bytes) != 0;
    }
    return 0;
}

static void report(const server *v, const char *name, int64_t differ) {
    const int64_t entries = SEQUENCES * (LENGTH / v->config.ratio);
    const double packed = (double)(v->row_bytes + v->scale_bytes) / (double)v->config.ratio;
    printf("%s, %d sequences: %lld tokens in %lld calls, %lld of them guesses rolled back; ", name, SEQUENCES,
           (long long)v->tokens, (long long)v->calls, (long long)v->rolled_back);
    if (differ) {
        printf("%lld of %lld entries DIFFER from the one call's\n", (long long)differ, (long long)entries);
    } else {
        printf("all %lld entries equal the one call's\n", (long long)entries);
    }
    printf("    %lld pages of %d; cache: %.2f bytes a token, %.2f in bf16; a state: %lld bytes\n", (long long)v->pages,
           PAGE, packed, 2.0 * HEAD / (double)v->config.ratio, (long long)dsv4_state_save_size(v->sequences[0].state));
}

static int serve(const char *name, int64_t ratio, int overlap) {
    static server v;
    static step r;
    int busy = 1;
    int64_t differ = 0;
    memset(&v, 0, sizeof v);
    v.config =
        (dsv4_config){.hidden_dim = HIDDEN, .head_dim = HEAD, .ratio = ratio, .rope_dim = ROPE, .overlap = overlap};
    v.config.rounding = DSV4_ROUNDING_DEEPSEEK;
    v.config.rows = dsv4_preset_rows(DSV4_V4_FLASH_CSA);
    int failed = start(&v);
    while (!failed && busy) failed = serve_step(&v, &r, &busy);
    for (int i = 0; i < SEQUENCES && !failed; i++) failed = compare(&v, &v.sequences[i], &differ);
    if (!failed) report(&v, name, differ);
    stop(&v);
    return failed || differ;
}

int main(void) {
    const int csa = serve("CSA, ratio 4", 4, 1), hca = serve("HCA, ratio 16", 16, 0);
    return csa || hca;
}
