#!/bin/sh
# The same bits from every compiler and at every optimisation: tests/hashes.c, built so, reproduces tests/hashes.txt with
# each kernel set of this CPU. (At -O2 with the compiler of the other tests, test_hashes does.) Without TESTS_SLOW: by
# another compiler alone, optimised for this CPU. (test_header: with nothing optimised.)
. tests/checks/lib.sh
simde=${slow:+$(simde_flag)} # else in test_hashes alone

reproduces() { # reproduces COMPILER FLAGS...
    program=$tmp/hashes.$serial
    "$@" -std=c99 -I. -Itests/support $simde tests/hashes.c -o "$program" -lm &&
        "$program" 2>"$program.sets" | diff tests/hashes.txt - && grep -q '^scalar$' "$program.sets"
}

set -- $(compilers $CC gcc clang)
if [ -n "$slow" ]; then
    for compiler; do
        for flags in '-O3 -march=native -ffp-contract=fast' -O2 -O0; do
            spawn "$compiler $flags" reproduces "$compiler" $flags
        done
    done
else
    for other; do :; done # the last of them
    try "$other -O1 -march=native -ffp-contract=fast" reproduces "$other" -O1 -march=native -ffp-contract=fast
    finish
    exit
fi

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

cat >"$tmp/flags" <<'END'
-masm=intel
-fsingle-precision-constant
-Xclang -cl-single-precision-constant
-funsafe-math-optimizations -fno-honor-nans
-ffast-math
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
-mllvm -enable-unsafe-fp-math
END
each_flag() { # each_flag COMPILER FLAGS-FILE
    while read -r flags; do
        ! takes "$1" $flags || spawn "$1 $flags" same_bits_or_refused "$1" $flags
    done <"$2"
}
# Older compilers: the ones that matter, up to -fno-trapping-math.
sed '/^-fno-trapping-math/q' "$tmp/flags" >"$tmp/some"
newest=$(compilers gcc clang-19 clang-16 clang | head -2)
for compiler in $newest; do each_flag "$compiler" "$tmp/flags"; done
older=$(compilers $newest $CC clang clang-16 | tail -n +$(($(echo "$newest" | wc -l) + 1)))
for compiler in $older; do each_flag "$compiler" "$tmp/some"; done
finish
