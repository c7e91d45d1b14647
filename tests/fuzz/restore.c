/* dsv4_state_restore on arbitrary bytes, and on saved bytes that were tampered with: it takes only what save could have
 * written, and a state that refuses is as it was. */

#include "fuzz.h"
#include "support.h"

enum { TOKENS = 40, DEPTH = 7 };

typedef struct scene {
    model model;
    engine engine;
    sequence x;
    results out;
} scene;

static scene make_scene(void) {
    scene s = {0};
    dsv4_config config = {0};
    config.hidden_dim = 5;
    config.head_dim = 6;
    config.ratio = 3;
    config.overlap = 1;
    config.rope_dim = 4;
    s.model = model_of(&config, DSV4_F32, 1);
    s.engine = engine_new(&s.model, NULL, NULL);
    s.x = sequence_new(&config, DSV4_F32, TOKENS, 1);
    s.out = results_new(&config, DSV4_F32, TOKENS, TOKENS);
    return s;
}

static dsv4_state *state_after(const scene *s, int64_t tokens) {
    dsv4_state *state = state_new(&s->engine, DEPTH);
    REQUIRE(compress_part(&s->engine, &s->x, &s->out, state, 0, tokens, NULL) == DSV4_OK);
    return state;
}

typedef struct blob {
    unsigned char *bytes;
    size_t size;
} blob;

static blob save(const dsv4_state *state) {
    size_t size = dsv4_state_save_size(state);
    blob b = {(unsigned char *)reserve(size), 0};
    REQUIRE(dsv4_state_save(state, b.bytes, size, &b.size, NULL) == DSV4_OK);
    return b;
}

static int same(const blob *a, const blob *b) { return a->size == b->size && memcmp(a->bytes, b->bytes, a->size) == 0; }

/* Honest bytes, edited: some overwritten, the end cut off. */
static blob tampered(const scene *s, choices *c) {
    dsv4_state *state = state_after(s, choose(c, TOKENS));
    blob b = save(state);
    dsv4_state_destroy(state);
    while (c->at < c->end) {
        size_t at = ((size_t)choose(c, 255) << 8 | (size_t)choose(c, 255)) % (b.size + 1);
        if (at == b.size) {
            b.size = at - (at > 0);
        } else {
            b.bytes[at] ^= (unsigned char)choose(c, 255);
        }
    }
    return b;
}

static blob arbitrary(const choices *c) {
    blob b = {NULL, (size_t)(c->end - c->at)};
    b.bytes = (unsigned char *)reserve(b.size);
    memcpy(b.bytes, c->at, b.size);
    return b;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static scene s;
    choices c = {data, data + size};
    if (!s.engine.compressor) {
        s = make_scene();
    }
    dsv4_state *state = state_after(&s, choose(&c, TOKENS));
    blob before = save(state), offered = choose(&c, 1) ? tampered(&s, &c) : arbitrary(&c);
    dsv4_status status = dsv4_state_restore(state, offered.bytes, offered.size, NULL);
    blob after = save(state);
    REQUIRE(status == DSV4_OK || status == DSV4_ERROR_DATA);
    REQUIRE(same(&after, status == DSV4_OK ? &offered : &before));
    dsv4_state_destroy(state);
    free(before.bytes);
    free(offered.bytes);
    free(after.bytes);
    return 0;
}
