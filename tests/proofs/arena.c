/* An arena over 24 bytes at an address 8 past a multiple of 64, however many of them are used: a block of any 64-bit
 * size at any alignment that is a power of two lies in what was free, aligned, or there is none; giving it back.
 * (Eva knows no relation between two variables, such as used <= size: the small numbers are gone through one by
 * one.) */
// mutant: dsv4_compressor.h
// - if (gap > arena->size - arena->used || size > arena->size - arena->used - gap) return NULL;
// + if (gap > arena->size - arena->used || size > arena->size - arena->used) return NULL;
// eva: -absolute-valid-range 0x1008-0x101f -eva-precision 2 -eva-slevel 100000
#include "proof.h"

enum { ROOM = 24 };
static unsigned char *const buffer = (unsigned char *)0x1008;

static void asks(size_t used, size_t size, size_t alignment) {
    dsv4_arena arena = dsv4_arena_init(buffer, ROOM);
    const dsv4_allocator allocator = dsv4_arena_allocator(&arena);
    arena.used = used;
    unsigned char *block = (unsigned char *)allocator.alloc(allocator.context, size, alignment);
    //@ check used <= arena.used <= ROOM;
    if (block == NULL) return;
    //@ check (unsigned long)block % alignment == 0;
    //@ check buffer + used <= block && block + size <= buffer + ROOM;
    if (size > 0) block[0] = block[size - 1] = 1;
    REACHED(used);
    allocator.free(allocator.context, block, size);
    //@ check used <= arena.used <= ROOM;
    REACHED(given_back);
}

int main(void) {
    for (size_t used = 0; used <= ROOM; used++)
        for (int bit = 0; bit < 64; bit++) {
            const size_t alignment = (size_t)1 << bit;
            for (size_t size = 0; size <= ROOM && bit < 7; size++) asks(used, size, alignment);
            if (bit >= 7) asks(used, Frama_C_unsigned_long_interval(0, ROOM), alignment);
            asks(used, Frama_C_unsigned_long_interval(ROOM + 1, SIZE_MAX), alignment);
        }
    dsv4_arena none = dsv4_arena_init(NULL, 0);
    if (dsv4_arena_allocator(&none).alloc(&none, 1, 64) == NULL) REACHED(end);
    return 0;
}
