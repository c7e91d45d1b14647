#!/bin/sh
# coverage.sh DIRECTORY: lines and branches of the header that the tests reach (gcc, gcov, python3), over all kernel sets
# of this machine: a branch of a kernel counts as taken where one set takes it. The last line is `branch coverage NN.N %`,
# with what was left out.
. tests/checks/lib.sh
out=${1:-$BUILD/coverage}
mkdir -p "$out/header"
find "$out" -name '*.gc??' -exec rm -f {} +

# Asserts state what cannot happen, so they are no branches. Nor are copies of a function for constant arguments: nothing
# is inlined, so that a line of the source is one line of the count.
sed 's/__attribute__((always_inline)) //' dsv4_compressor.h >"$out/header/dsv4_compressor.h"
${MAKE:-make} -s check BUILD="$out" CC="${GCC:-gcc}" SCRIPTS= SIMDE="$(simde_flag)" HEADER="$out/header/dsv4_compressor.h" \
    HEADER_FLAGS="-iquote $out/header -O0 -DNDEBUG --coverage" LDFLAGS=--coverage
status=$?
# How lesser CPUs choose their kernels, for compressors and for arrays.
cpus='Nehalem Haswell' without=
have qemu-x86_64-static ||
    cpus= without='without lesser CPUs: no qemu-x86_64-static here (Debian: apt-get install qemu-user-static)'
for cpu in $cpus; do
    for test in 'test_seed' 'test_api -t arrays_of_any_length'; do
        qemu-x86_64-static -cpu $cpu "$out/tests/"$test >"$out/$cpu.log" 2>&1 || status=1
    done
done
"${GCOV:-gcov}" --json-format --branch-probabilities --stdout "$out/dsv4.gcda" >"$out/coverage.json" 2>"$out/gcov.err" &&
    python3 tests/checks/coverage.py "$out/coverage.json" "$out/header/dsv4_compressor.h" "$without" && exit $status
