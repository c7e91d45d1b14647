/* Numbers to bf16, E4M3 and E2M1 and back, for every bit pattern; scales as rows keep them, for every byte. Arrays as
 * the scalar kernels convert them, for every length of up to 70. */
// mutant: dsv4_compressor.h
// - for (int64_t i = 0; i < count; i++) to[i] = dsv4_bf16_to_f32(from[i]);
// + for (int64_t i = 0; i <= count; i++) to[i] = dsv4_bf16_to_f32(from[i]);
#include "proof.h"

enum { LONGEST = 70 };

static void of_numbers(void) {
    float number;
    ANY(number);
    const uint16_t half = Frama_C_unsigned_short_interval(0, UINT16_MAX);
    const uint8_t byte = Frama_C_unsigned_char_interval(0, UINT8_MAX);
    if (dsv4_bf16_to_f32(half) > 0) REACHED(from_bf);
    if (dsv4_bf16_from_f32(number) > 0) REACHED(to_bf);
    if (dsv4_e4m3_to_f32(byte) > 0) REACHED(from_wide);
    if (dsv4_e4m3_from_f32(number) > 0) REACHED(to_wide);
    if (dsv4_e2m1_to_f32(byte) > 0) REACHED(from_narrow);
    if (dsv4_e2m1_from_f32(number) > 0) REACHED(to_narrow);
}

static void of_scales(void) {
    for (int rows = DSV4_ROWS_FP8; rows < DSV4_ROWS_COUNT; rows++) {
        const dsv4__row_format *format = &dsv4__row_formats[rows];
        unsigned char bytes[4];
        float scale;
        ANY(scale);
        ANY(bytes);
        if (dsv4__get_scale(format, bytes) > 0) REACHED(scale_read);
        dsv4__put_scale(format, bytes, scale);
        REACHED(scale_put);
    }
}

/* A length at a time, at the end of memory that has no more. */
static void of_arrays(void) {
    float numbers[LONGEST];
    dsv4_bf16 halves[LONGEST];
    for (size_t count = 0; count <= LONGEST; count++) {
        ANY(numbers);
        dsv4_bf16_from_f32_array(halves + LONGEST - count, numbers + LONGEST - count, count);
        ANY(halves);
        dsv4_bf16_to_f32_array(numbers + LONGEST - count, halves + LONGEST - count, count);
        REACHED(arrays);
    }
}

int main(void) {
    of_numbers();
    of_scales();
    of_arrays();
    REACHED(end);
    return 0;
}
