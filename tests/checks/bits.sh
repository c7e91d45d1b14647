#!/bin/sh
# The same bits from every compiler and at every optimisation: tests/hashes.c, built so, reproduces tests/hashes.txt with
# each kernel set of this CPU. (At -O2 with the compiler of the other tests, test_hashes does.) TESTS_SLOW: all of both.
. tests/checks/lib.sh
simde=${slow:+$(simde_flag)} # else in test_hashes alone

reproduces() { # reproduces COMPILER FLAGS...
    program=$tmp/hashes.$serial
    "$@" -std=c99 -I. -Itests/support $simde tests/hashes.c -o "$program" -lm &&
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

# Flags that change arithmetic: the same bits, or no object and an error that names the way out. The implementation alone
# gets the flag, behind intrinsics that have it too; linking with some of them would flush the process's subnormals.
cat >"$tmp/implementation.c" <<'END'
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#define DSV4_COMPRESSOR_IMPLEMENTATION
#include "dsv4_compressor.h"
END
$CC -O2 -std=c99 -I. -Itests/support -DDSV4__IMPLEMENTED=1 -c tests/hashes.c -o "$tmp/hashes.o" || exit 1

same_bits_or_refused() { # same_bits_or_refused COMPILER FLAGS...
    program=$tmp/flags.$serial
    compiler=$1
    shift
    "$compiler" -O2 -std=c99 -I. "$@" -c "$tmp/implementation.c" -o "$program.o" 2>"$program.txt" || {
        cat "$program.txt"
        grep -q DSV4_COMPRESSOR_FAST_MATH "$program.txt"
        return
    }
    case "$*" in *-flto*) link=-flto ;; *) link= ;; esac
    "$compiler" $link "$tmp/hashes.o" "$program.o" -o "$program" -lm && "$program" 2>/dev/null | diff tests/hashes.txt -
}
takes() { ! "$@" -Werror -x c -c /dev/null -o /dev/null 2>&1 | grep -q .; }

few='-fsingle-precision-constant
-Xclang -cl-single-precision-constant
-funsafe-math-optimizations -fno-honor-nans'
many='-ffast-math
-Ofast
-O3 -funsafe-math-optimizations
-funsafe-math-optimizations -march=native
-freciprocal-math
-fassociative-math -fno-signed-zeros -fno-trapping-math
-ffinite-math-only
-fno-honor-nans
-fno-honor-infinities
-fno-signed-zeros
-fno-trapping-math
-fno-math-errno
-fapprox-func
-mrecip
-fcx-limited-range
-fexcess-precision=fast
-ffloat-store
-ffp-contract=fast
-ffp-contract=on -march=native
-ffp-contract=off -march=native
-ffp-model=fast
-ffp-model=strict
-ffp-eval-method=double
-ffp-exception-behavior=strict
-frounding-math
-fsignaling-nans
-ftrapping-math
-flto
-Xclang -cl-mad-enable
-Xclang -cl-fast-relaxed-math
-mllvm -enable-unsafe-fp-math'
for compiler in $(compilers $CC ${slow:+gcc} clang ${slow:+clang-16 clang-19}); do
    while read -r flags; do
        ! takes "$compiler" $flags || spawn "$compiler $flags" same_bits_or_refused "$compiler" $flags
    done <<END
$few${slow:+
$many}
END
done
finish
