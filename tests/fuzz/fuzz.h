/* fuzz.h - what the harnesses share: an input read as a sequence of choices, and the word for a broken promise. */

#ifndef FUZZ_H
#define FUZZ_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* A broken promise ends the run, so that the fuzzer keeps the input. */
#define REQUIRE(condition)                                                          \
    do {                                                                            \
        if (!(condition)) {                                                         \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
            abort();                                                                \
        }                                                                           \
    } while (0)

typedef struct choices {
    const uint8_t *at, *end;
} choices;

/* A number from 0 to `most` <= 255; 0 once the input is used up. */
static inline int choose(choices *c, int most) {
    REQUIRE(most >= 0);
    return c->at < c->end ? *c->at++ % (most + 1) : 0;
}

#endif /* FUZZ_H */
