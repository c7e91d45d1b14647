/* examples/safetensors.h: the list of a file of any bytes. */
// mutant: examples/safetensors.h
// - if (length > ST_HEADER_SIZE || length > size - 8) {
// + if (length > ST_HEADER_SIZE) {
// eva: -eva-precision 3 -eva-alloc-builtin fresh
#include "safetensors.h" /* first: it is left its volatile */

#include "proof.h"

enum { SIZE = 56 };

int main(void) {
    unsigned char bytes[SIZE];
    char message[256];
    st_file file;
    const size_t size = (size_t)any_from(0, SIZE);
    ANY(bytes);
    if (st_parse(&file, bytes + SIZE - size, size, message, sizeof message) == 0) {
        REACHED(parsed);
        st_close(&file);
    }
    REACHED(end);
    return 0;
}
