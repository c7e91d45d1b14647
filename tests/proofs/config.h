/* config.h - the configurations that dsv4_config_check accepts, as far as each field alone decides (pad_gate: any).
 * That it accepts no others is what config_check.c proves; that nothing goes wrong with these, the drivers that
 * include this. */
#include "proof.h"

enum { CONFIG_FIELDS = 16, ROUNDING_FIELD = 7 };

/* A macro, so that Eva learns of the field itself. */
#define FITS_REAL(value, least) \
    ((value) >= 0 && (value) <= 1e30 && !((value) > 0 && (value) < (least))) /* 0 is the default */

static int fits(const dsv4_config *c, int field) {
    switch (field) {
    case 0:
        return c->hidden_dim >= 1 && c->hidden_dim <= INT32_MAX;
    case 1:
        return c->head_dim >= 1 && c->head_dim <= INT32_MAX;
    case 2:
        return c->ratio >= 1 && c->ratio <= INT32_MAX;
    case 3:
        return c->rope_dim >= 0 && c->rope_dim <= INT32_MAX;
    case 4:
        return c->overlap >= 0 && c->overlap <= 1;
    case 5:
        return c->no_ape >= 0 && c->no_ape <= 1;
    case 6:
        return c->no_gate >= 0 && c->no_gate <= 1;
    case ROUNDING_FIELD:
        return c->rounding <= dsv4__all_points ? 1 : 0;
    case 8:
        return (unsigned)c->rows < (unsigned)DSV4_ROWS_COUNT ? 1 : 0; /* a branch, for Eva to follow */
    case 9:
        return (unsigned)c->sums <= 1 ? 1 : 0;
    case 10:
        return FITS_REAL(c->eps, 0);
    case 11:
        return FITS_REAL(c->rope_theta, 1);
    case 12:
        return FITS_REAL(c->yarn_factor, 1);
    case 13:
        return FITS_REAL(c->yarn_orig_ctx, 1);
    case 14:
        return FITS_REAL(c->yarn_beta_fast, 0);
    default:
        return FITS_REAL(c->yarn_beta_slow, 0);
    }
}

/* Any configuration with all fields in their ranges; 0 where Eva is to leave this execution. */
static int any_config(dsv4_config *config) {
    Frama_C_make_unknown((char *)config, sizeof *config);
    for (int field = 0; field < CONFIG_FIELDS; field++)
        if (!fits(config, field)) return 0;
    return 1;
}
