#!/bin/sh
# The small example programs run to their end and say by their exit status that all went well.
. tests/checks/lib.sh
export OMP_NUM_THREADS=2

# As their readers would build them, in one call.
builds_alone() { $CC -I. -Iexamples -pthread examples/shortest.c -lm -o "$tmp/alone" && "$tmp/alone"; }
# The others share the tests' object of the implementation, which they would else compile each on their own.
goes_well() {
    $CC ${FLAGS:--I. -Iexamples} $2 -DDSV4__IMPLEMENTED=1 "examples/$1.c" "$BUILD/dsv4.o" -lm -o "$tmp/$1" && "$tmp/$1"
}

# The use that the header's first page and README.md show, as somebody would paste it; whatever the kernels.
first_page() { # first_page COMPILER FLAGS...
    {
        printf '#include "dsv4_compressor.h"\n#include <stdio.h>\n'
        echo 'void use(dsv4_params params, const dsv4_bf16 *x, int64_t tokens, dsv4_bf16 *out) {'
        sed -n '/^ \*     dsv4_config config/,/^ \*$/s/^ \*//p' dsv4_compressor.h
        echo '}'
    } >"$tmp/first_page.c" && grep -q 'dsv4_compress(' "$tmp/first_page.c" && "$@" -DDSV4_COMPRESSOR_SCALAR -I. -c "$tmp/first_page.c" -o "$tmp/first_page.o"
}
readme() {
    sed -n '/^```c$/,/^```$/p' README.md | grep -v '^```' >"$tmp/readme.c" && grep -q 'dsv4_compress(' "$tmp/readme.c" &&
        $CC -DDSV4_COMPRESSOR_SCALAR -I. -c "$tmp/readme.c" -o "$tmp/readme.o"
}
try "the use on the header's first page, in C" first_page $CC -Wall -Wextra -Werror
! have c++ || try "the use on the header's first page, in C++" first_page c++ -x c++ -std=c++11 -Wall -Werror
spawn 'the use in README.md' readme

spawn 'shortest, built in one call' builds_alone
spawn serve goes_well serve ''
spawn threads goes_well threads ''
! echo 'int main(void) { return 0; }' | $CC -fopenmp -x c - -o "$tmp/has_openmp" 2>/dev/null || spawn openmp goes_well openmp -fopenmp
finish
