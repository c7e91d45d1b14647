/* RoPE's frequencies for any rope_dim, theta and YaRN settings that dsv4_config_check accepts, into memory of their
 * number. Theta in three parts, since YaRN divides by its logarithm, of which Eva must see that it
 * is not 0. */
// mutant: dsv4_compressor.h
// - int64_t low = (int64_t)(fast < 0 ? 0 : fast > limit ? limit : fast);
// + int64_t low = (int64_t)(fast < 0 ? 0 : fast);
// eva: -eva-precision 3 -absolute-valid-range 0x10000-0x10000ffff
#include "proof.h"

/* Memory for 2^30 numbers; Eva knows no objects of a size that varies, and this one begins at a known address. */
static float *const inv_freq = (float *)0x10000;

static void of_thetas(double least, double most) {
    dsv4_config config;
    ANY(config);
    config.rope_dim = 2 * any_from(0, INT32_MAX / 2);
    config.rope_theta = Frama_C_double_interval(least, most);
    config.yarn_factor = Frama_C_double_interval(1, 1e30);
    config.yarn_orig_ctx = Frama_C_double_interval(1, 1e30);
    config.yarn_beta_fast = Frama_C_double_interval(0x1p-1074, 1e30);
    config.yarn_beta_slow = Frama_C_double_interval(0x1p-1074, 1e30);
    dsv4__frequencies(&config, inv_freq);
    REACHED(frequencies);
}

int main(void) {
    const double root = 0x1.6a09e667f3bcdp0, step = 0x1p-52; /* of 2, where dsv4__log takes the next power */
    of_thetas(1 + step, root);
    of_thetas(root + step, 2 - step);
    of_thetas(2, 1e30);
    REACHED(end);
    return 0;
}
