/* dsv4_unpack of two rows of any bytes in each format, to bf16 and fp32: head_dim 1 to 9, 16, 66 and 130 (blocks cut
 * short, more than one block, a half of a pair), any rope_dim up to 4, rounded or not; rows, scales and numbers at
 * the end of memory that has no more. Arguments of any bits with any configuration: refused, or no rows to unpack. */
// mutant: dsv4_compressor.h
// - dsv4__get_bf16((dsv4_bf16 *)job->to + coded, job->row + coded, dim - coded);
// + dsv4__get_bf16((dsv4_bf16 *)job->to + coded, job->row + coded, dim);
// eva: -eva-precision 2 -eva-slevel 2000 -eva-split-return-function fits:full
#include "config.h"

enum { ROWS = 2, MOST = 130, BYTES = ROWS * 2 * MOST };

static unsigned char bytes[BYTES], scale_bytes[BYTES];
static float numbers[ROWS * MOST];

static void of_rows(const dsv4_config *config, dsv4_dtype dtype) {
    dsv4_error error;
    size_t row, scales;
    if (dsv4_row_sizes(config, &row, &scales, &error) != DSV4_OK) return;
    ANY(bytes);
    ANY(scale_bytes);
    const size_t size = ROWS * (size_t)config->head_dim * dsv4_dtype_size(dtype);
    const dsv4_const_matrix rows = {bytes + BYTES - ROWS * row, DSV4_PACKED, 0};
    const dsv4_const_matrix scale_rows = {scale_bytes + BYTES - ROWS * scales, DSV4_PACKED, 0};
    const dsv4_matrix to = {(unsigned char *)numbers + sizeof numbers - size, dtype, 0};
    if (dsv4_unpack(config, ROWS, rows, scale_rows, to, &error) == DSV4_OK) REACHED(unpacked);
}

static void of_formats(int64_t head_dim) {
    for (int rows = DSV4_ROWS_FP8; rows < DSV4_ROWS_COUNT; rows++)
        for (int64_t rope_dim = 0; rope_dim <= 4; rope_dim += 2)
            for (int dtype = DSV4_F32; dtype <= DSV4_BF16; dtype++) {
                dsv4_config config;
                memset(&config, 0, sizeof config);
                config.hidden_dim = config.ratio = 1;
                config.head_dim = head_dim;
                config.rope_dim = rope_dim;
                config.rows = (dsv4_rows)rows;
                config.rounding = Frama_C_interval(0, 1) ? DSV4_ROUND_ROW : 0;
                of_rows(&config, (dsv4_dtype)dtype);
            }
}

/* Without a place for what comes out there is nothing that could be unpacked. */
static void of_arguments(void) {
    dsv4_config config;
    dsv4_const_matrix rows, scales;
    dsv4_matrix to;
    dsv4_error error;
    if (!any_config(&config)) return;
    ANY(rows);
    ANY(scales);
    ANY(to);
    const int64_t count = any_from(INT64_MIN, INT64_MAX);
    if (count > 0) to.data = NULL;
    if (dsv4_unpack(&config, count, rows, scales, to, &error) == DSV4_OK)
        REACHED(nothing_to_unpack);
    else
        REACHED(refused);
}

int main(void) {
    for (int64_t head_dim = 1; head_dim <= 9; head_dim++) of_formats(head_dim);
    of_formats(16);
    of_formats(66);
    of_formats(MOST);
    of_arguments();
    REACHED(end);
    return 0;
}
