/* implementation.c - the implementation as the tests are linked with it: with a model of AMX's tiles as one more kernel
 * set, and a way to kernels of each set that the library takes of the best one alone, and to what else is within. */

#define DSV4__TILE_MODEL
#define DSV4_COMPRESSOR_IMPLEMENTATION
#include "implementation.h"

void unpack_by(const char *isa, const dsv4_config *config, int64_t count, dsv4_const_matrix rows,
               dsv4_const_matrix scales, dsv4_matrix numbers) {
    const dsv4__kernels *kernels = NULL;
    dsv4__unpack_job job;
    const dsv4_status found = dsv4__set_by_name(isa, DSV4_SUMS_TILES, &kernels, NULL);
    assert(found == DSV4_OK);
    (void)found;
    job.config = config;
    job.dtype = numbers.dtype;
    for (int64_t i = 0; i < count; i++) {
        job.row = (const unsigned char *)rows.data + i * rows.stride;
        job.scales = (const unsigned char *)scales.data + i * scales.stride;
        job.to = (unsigned char *)numbers.data + (size_t)(i * numbers.stride) * dsv4_dtype_size(numbers.dtype);
        kernels->unpack(&job);
    }
}

float softmax_exp(float x) {
    dsv4__scalar_exp(&x, 1);
    return x;
}

const char *isa_offered(unsigned offers, int index) {
    const dsv4__kernels *set = dsv4__set_at(offers, index);
    return set != NULL ? set->name : NULL;
}
