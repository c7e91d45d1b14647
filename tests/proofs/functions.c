/* The scalar e^x for every fp32 number, and cos and sin for every angle but NaN, with which Eva
 * takes both ways at a comparison: by powers of two, as the words of 2 / pi that are read hang on the exponent. */
// mutant: dsv4_compressor.h
// - for (unsigned i = 0; i < 3; i++)
// + for (unsigned i = 0; i < 4; i++)
// eva: -eva-precision 3
#include "proof.h"

static void of_angle(float angle) {
    float c, s;
    dsv4_cos_sin(angle, &c, &s);
    //@ check \initialized(&c) && \initialized(&s);
    if (c > 0) REACHED(cosine);
}

int main(void) {
    float number, least = 1;
    ANY(number);
    dsv4__scalar_exp(&number, 1);
    if (number > 0) REACHED(exponential);
    of_angle(Frama_C_float_interval(-FLT_MAX, 1));
    //@ loop unroll 128;
    for (int exponent = 0; exponent < 128; exponent++, least *= 2)
        of_angle(Frama_C_float_interval(least, least * 0x1.fffffep0f));
    of_angle(INFINITY);
    of_angle(-INFINITY);
    REACHED(end);
    return 0;
}
