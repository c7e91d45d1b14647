/* implementation.h - what tests/support/implementation.c gives away of the implementation that the tests are linked
 * with. */

#ifndef IMPLEMENTATION_H
#define IMPLEMENTATION_H

#include "dsv4_compressor.h"

/* dsv4_unpack of arguments that it takes, strides named, by the kernels of one set; it takes the CPU's best ones
 * itself. */
void unpack_by(const char *isa, const dsv4_config *config, int64_t count, dsv4_const_matrix rows,
               dsv4_const_matrix scales, dsv4_matrix numbers);

/* The exponential of softmax, x <= 0, by the scalar kernels; every set has its bits. */
float softmax_exp(float x);

/* The name of the index-th set for a CPU that offers this (DSV4__CPU_...), NULL beyond the last one. */
const char *isa_offered(unsigned offers, int index);

#endif /* IMPLEMENTATION_H */
