/* dsv4_state_restore on arbitrary bytes, and on saved bytes that were tampered with: it takes only what save could have
 * written, and a state that refuses is as it was. */

#include "fuzz.h"
#include "workbench.h"

enum { TOKENS = 40, DEPTH = 7 };

static workbench make_bench(void) {
    const dsv4_config config = {.hidden_dim = 5, .head_dim = 6, .ratio = 3, .rope_dim = 4, .overlap = 1};
    model m = model_of(&config, DSV4_F32, 1);
    workbench w = workbench_with(m, sequence_new(&config, DSV4_F32, TOKENS, 1), DSV4_F32);
    w.e = workbench_engine(&w, NULL, NULL);
    w.whole = workbench_results(&w);
    return w;
}

static dsv4_state *state_after(const workbench *w, int64_t tokens) {
    dsv4_state *state = state_new(&w->e, DEPTH);
    REQUIRE(compress_part(&w->e, &w->s, &w->whole, state, 0, tokens, NULL) == DSV4_OK);
    return state;
}

/* Honest bytes, edited: some overwritten, the end cut off. */
static saved tampered(const workbench *w, choices *c) {
    dsv4_state *state = state_after(w, choose(c, TOKENS));
    saved b = saved_of(state);
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

static saved arbitrary(const choices *c) {
    saved b = {NULL, (size_t)(c->end - c->at)};
    b.bytes = (unsigned char *)reserve(b.size);
    memcpy(b.bytes, c->at, b.size);
    return b;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static workbench w;
    choices c = {data, data + size};
    if (!w.e.compressor) {
        w = make_bench();
    }
    dsv4_state *state = state_after(&w, choose(&c, TOKENS));
    saved before = saved_of(state), offered = choose(&c, 1) ? tampered(&w, &c) : arbitrary(&c);
    dsv4_status status = dsv4_state_restore(state, offered.bytes, offered.size, NULL);
    saved after = saved_of(state);
    REQUIRE(status == DSV4_OK || status == DSV4_ERROR_DATA);
    REQUIRE(same_bytes(&after, status == DSV4_OK ? &offered : &before));
    dsv4_state_destroy(state);
    free(before.bytes);
    free(offered.bytes);
    free(after.bytes);
    return 0;
}
