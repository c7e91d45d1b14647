/* hashes: prints what every machine must come to, after making sure that all kernel sets of this one agree.
 *
 *     cc -I. -Itests/support tests/hashes.c -o hashes -lm && ./hashes | diff tests/hashes.txt -
 *     hashes --write       writes tests/hashes.txt anew: for a deliberate change of numerics only */

#ifndef DSV4_COMPRESSOR_IMPLEMENTATION
#define DSV4_COMPRESSOR_IMPLEMENTATION
#endif
#include "dsv4_compressor.h"
#include "hashes.h"

int main(int argc, char **argv) {
    static hash_list first, other;
    int write = argc == 2 && strcmp(argv[1], "--write") == 0;
    if (argc > 1 && !write) {
        fprintf(stderr, "usage: hashes [--write]\n");
        return 2;
    }
    const char *isa;
    for (int i = 0; (isa = dsv4_isa_name(i)) != NULL; i++) {
        fprintf(stderr, "%s\n", isa);
        hash_all(isa, i == 0 ? &first : &other);
        int line = i == 0 ? -1 : hash_difference(&first, &other);
        if (line >= 0) {
            fprintf(stderr, "%s and %s differ: %s\n", dsv4_isa_name(0), isa, other.lines[line].name);
            return 1;
        }
    }
    FILE *to = write ? fopen("tests/hashes.txt", "wb") : stdout;
    if (!to) {
        perror("tests/hashes.txt");
        return 1;
    }
    hash_print(to, &first);
    return ferror(to) || fclose(to) != 0;
}
