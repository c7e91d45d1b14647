/* The arena: any size up to the buffer's own, any alignment that is a power of two, three blocks of any size, and any of
 * them given back. */
// mutant: dsv4_compressor.h
// - if (gap > arena->size - arena->used || size > arena->size - arena->used - gap) return NULL;
// + if (gap > arena->size - arena->used || size > arena->size - arena->used) return NULL;
#include "proof.h"

enum { BUFFER = 4096 };
static unsigned char buffer[BUFFER];

/* Writes a block's first and last byte. */
static void use(unsigned char *block, size_t size) {
    if (block == NULL || size == 0) return;
    block[0] = 1;
    block[size - 1] = 1;
    REACHED(used);
}

int main(void) {
    dsv4_arena arena = dsv4_arena_init(buffer, (size_t)any_from(0, BUFFER));
    const dsv4_allocator allocator = dsv4_arena_allocator(&arena);
    for (int i = 0; i < 3; i++) {
        const size_t alignment = (size_t)1 << Frama_C_interval(0, 63);
        const size_t size = Frama_C_unsigned_long_interval(0, SIZE_MAX);
        unsigned char *block = (unsigned char *)allocator.alloc(allocator.context, size, alignment);
        use(block, size);
        //@ check arena.used <= arena.size;
        if (block != NULL && Frama_C_interval(0, 1)) {
            allocator.free(allocator.context, block, size);
            REACHED(given_back);
        }
        //@ check arena.used <= arena.size;
    }
    dsv4_arena none = dsv4_arena_init(NULL, 0);
    if (dsv4_arena_allocator(&none).alloc(&none, 1, 64) == NULL) REACHED(end);
    return 0;
}
