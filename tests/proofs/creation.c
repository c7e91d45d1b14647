/* Creation of a small compressor of each kind (overlap, ape, gate, training, types of the weights, any numbers in
 * them), its workspace and a state, where the allocator gives memory of exactly the size asked for, none, or, as far
 * as Eva can tell, memory that is not aligned; and destruction. */
// mutant: dsv4_compressor.h
// - if (*block == NULL)
// + if (block == NULL)
// eva: -eva-alloc-builtin fresh -absolute-valid-range 0x1000-0x13ff
#include "proof.h"

enum { HIDDEN = 3, DIM = 2, RATIO = 2, ROOM = 256 };

static void *maybe_alloc(void *context, size_t size, size_t alignment) {
    (void)context;
    (void)alignment;
    return Frama_C_interval(0, 1) ? malloc(size) : NULL;
}

static void give_back(void *context, void *pointer, size_t size) {
    (void)context;
    (void)size;
    free(pointer);
}

static const dsv4_allocator allocator = {maybe_alloc, give_back, NULL};
/* At addresses that Eva knows, as the alignment of arrays is checked twice. */
static unsigned char *const numbers = (unsigned char *)0x1000;

static void make_all(const dsv4_config *config, const dsv4_params *params, const dsv4_options *options) {
    dsv4_compressor *compressor = NULL;
    dsv4_workspace *workspace = NULL;
    dsv4_state *state = NULL;
    dsv4_error error;
    if (dsv4_compressor_create(config, params, options, &allocator, &compressor, &error) != DSV4_OK) {
        REACHED(refused);
        return;
    }
    REACHED(compressor);
    if (dsv4_workspace_create(compressor, NULL, &allocator, &workspace, &error) == DSV4_OK) REACHED(workspace);
    if (dsv4_state_create(compressor, 3, &allocator, &state, &error) == DSV4_OK) REACHED(state);
    dsv4_state_destroy(state);
    dsv4_workspace_destroy(workspace);
    dsv4_compressor_destroy(compressor);
    REACHED(destroyed);
}

int main(void) {
    for (int kind = 0; kind < 8; kind++) {
        dsv4_config config;
        dsv4_options options = {NULL, kind >> 1 & 1, 1};
        const dsv4_dtype dtype = kind & 1 ? DSV4_BF16 : DSV4_F32;
        memset(&config, 0, sizeof config);
        config.hidden_dim = HIDDEN;
        config.head_dim = DIM;
        config.ratio = RATIO;
        config.overlap = kind >> 2;
        Frama_C_make_unknown((char *)numbers, 4 * ROOM);
        const dsv4_params params = {{numbers, dtype, 0},
                                    {numbers + ROOM, dtype, 0},
                                    {numbers + 2 * ROOM, dtype, 0},
                                    {numbers + 3 * ROOM, dtype, 0}};
        make_all(&config, &params, &options);
    }
    REACHED(end);
    return 0;
}
