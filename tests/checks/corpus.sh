#!/bin/sh
# The fuzzing harnesses, without a fuzzer, on the inputs kept in tests/fuzz/corpus.
. tests/checks/lib.sh

holds() {
    $CC ${FLAGS:--I. -Iexamples -Itests/support} "tests/fuzz/$1.c" tests/fuzz/standalone.c "$BUILD/dsv4.o" -lm -o "$tmp/$1" &&
        "$tmp/$1" "tests/fuzz/corpus/$1"/*
}
for folder in tests/fuzz/corpus/*; do
    spawn "$folder" holds "$(basename "$folder")"
done
finish
