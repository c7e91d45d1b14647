/* examples/safetensors.h, as far as Eva gets: the refusal of any file of up to 48 bytes whose header would reach beyond
 * its end; UTF-8 characters of any bytes, with any number of them left; F16 numbers by any bits. (Of a whole header Eva
 * follows neither that strings take no more room than their source, nor how many ways there are to read it.) */
// mutant: examples/safetensors.h
// - if (length > ST_HEADER_SIZE || length > size - 8) {
// + if (length > ST_HEADER_SIZE || length > size) {
// eva: -eva-precision 2 -eva-slevel 2000
#include "safetensors.h" /* first: it is left its volatile */

#include "proof.h"

enum { SIZE = 48, CHARACTER = 5 };

/* A message is NULL: what printf writes ends in a zero, of which Eva is not told. */
static void of_files(void) {
    unsigned char bytes[SIZE];
    st_file file;
    ANY(bytes);
    for (size_t size = 0; size < 8; size++)
        if (st_parse(&file, bytes + SIZE - size, size, NULL, 0)) REACHED(too_short);
    for (size_t size = 8; size <= SIZE; size++) {
        unsigned char *from = bytes + SIZE - size;
        for (int byte = 0; byte < 8;
             byte++) { /* the length's highest that is not 0, or, of the first, not within the file */
            ANY(bytes);
            for (int i = byte + 1; i < 8; i++) from[i] = 0;
            from[byte] = Frama_C_unsigned_char_interval(byte == 0 ? (unsigned char)(size - 7) : 1, UINT8_MAX);
            if (st_parse(&file, from, size, NULL, 0)) REACHED(too_long);
        }
    }
}

static void of_characters(void) {
    unsigned char bytes[CHARACTER];
    for (int left = 1; left <= CHARACTER; left++) {
        ANY(bytes);
        const int length = json__utf8_length(bytes + CHARACTER - left, bytes + CHARACTER);
        //@ check 0 <= length <= left;
        if (length > 0) REACHED(character);
    }
}

int main(void) {
    of_files();
    of_characters();
    if (st__widened(Frama_C_unsigned_short_interval(0, UINT16_MAX)) > 0) REACHED(half);
    REACHED(end);
    return 0;
}
