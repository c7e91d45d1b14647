/* proof.h - what the drivers for Frama-C's Eva share: inputs that are anything at all, and the header with its scalar
 * kernels. Eva follows all executions at once, a variable being the set of values that it can have. */
#include <__fc_builtin.h>
#include <assert.h>
#include <float.h>
#include <math.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The header's one volatile double keeps compilers from fusing; to Eva, volatile memory would hold anything. */
#define volatile
#define DSV4_COMPRESSOR_SCALAR
#define DSV4_COMPRESSOR_IMPLEMENTATION
#include "dsv4_compressor.h"

/* Eva must get here: else what stands before it would be proved of nothing. */
#define REACHED(place) Frama_C_show_each_##place(1)

/* Any bits at all in a variable. */
#define ANY(variable) Frama_C_make_unknown((char *)&(variable), sizeof(variable))

static int64_t any_from(int64_t least, int64_t most) { return Frama_C_long_long_interval(least, most); }
