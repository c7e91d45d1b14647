#!/bin/sh
# The small example programs run to their end and say by their exit status that all went well.
. tests/lib.sh
export OMP_NUM_THREADS=2

# As their readers would build them, in one call.
builds_alone() { $CC -I. -Iexamples -pthread examples/shortest.c -lm -o "$tmp/alone" && "$tmp/alone"; }
# The others share the tests' object of the implementation, which they would else compile each on their own.
goes_well() {
    $CC ${FLAGS:--I. -Iexamples} $2 -DDSV4__IMPLEMENTED=1 "examples/$1.c" "$BUILD/dsv4.o" -lm -o "$tmp/$1" && "$tmp/$1"
}

spawn 'shortest, built in one call' builds_alone
spawn serve goes_well serve ''
spawn threads goes_well threads ''
! echo 'int main(void) { return 0; }' | $CC -fopenmp -x c - -o "$tmp/has_openmp" 2>/dev/null || spawn openmp goes_well openmp -fopenmp
finish
