#!/bin/sh
# The same bits from every compiler and at every optimisation: tests/hashes.c, built so, reproduces tests/hashes.txt with
# each kernel set of this CPU. (At -O2 with the compiler of the other tests, test_hashes does.) TESTS_SLOW: all of both.
. tests/lib.sh
simde=${slow:+$(simde_flag)} # else in test_hashes alone

reproduces() { # reproduces COMPILER FLAGS...
    program=$tmp/hashes.$serial
    "$@" -std=c99 -I. -Itests $simde tests/hashes.c -o "$program" -lm &&
        "$program" 2>"$program.sets" | diff tests/hashes.txt - && grep -q '^scalar$' "$program.sets"
}

set -- $(compilers $CC gcc clang)
for compiler; do
    spawn "$compiler -O3 -march=native -ffp-contract=fast" reproduces "$compiler" -O3 -march=native -ffp-contract=fast
    last=$compiler
done
# Without TESTS_SLOW one compiler is enough where nothing is optimised, and -O2 is left to test_hashes.
for compiler; do
    [ -z "$slow" ] && [ "$compiler" != "$last" ] || spawn "$compiler -O0" reproduces "$compiler" -O0
    [ -z "$slow" ] || spawn "$compiler -O2" reproduces "$compiler" -O2
done
finish
