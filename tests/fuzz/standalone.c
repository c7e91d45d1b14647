/* Runs a harness on files, or on standard input, without libFuzzer: for gcc, for AFL, for looking at one input.
 *     cc -DDSV4_COMPRESSOR_IMPLEMENTATION -I. -Iexamples -Itests/support tests/fuzz/api.c tests/fuzz/standalone.c -lm
 *     ./a.out FILE... */

#include "fuzz.h"

enum { STANDALONE_LIMIT = 1 << 24 };

static int run_stream(FILE *file) {
    uint8_t *bytes = (uint8_t *)malloc(STANDALONE_LIMIT);
    if (!bytes) {
        return 1;
    }
    size_t size = fread(bytes, 1, STANDALONE_LIMIT, file);
    uint8_t *exact = (uint8_t *)malloc(size ? size : 1); /* a read past the end is then past a block's end */
    if (exact) {
        memcpy(exact, bytes, size);
        LLVMFuzzerTestOneInput(exact, size);
    }
    free(bytes);
    free(exact);
    return exact == NULL;
}

int main(int argc, char **argv) {
    int failed = 0;
    if (argc < 2) {
        return run_stream(stdin);
    }
    for (int i = 1; i < argc; i++) {
        FILE *file = fopen(argv[i], "rb");
        if (!file) {
            perror(argv[i]);
            return 1;
        }
        failed += run_stream(file);
        fclose(file);
    }
    printf("%d passed, %d failed\n", argc - 1 - failed, failed);
    return failed != 0;
}
