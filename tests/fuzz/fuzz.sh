#!/bin/sh
# fuzz.sh DIRECTORY SECONDS: each harness under libFuzzer with address and undefined sanitizers, from the kept corpus on.
# What it finds is left in DIRECTORY as HARNESS-crash-*, HARNESS-timeout-* or HARNESS-oom-*.
. tests/checks/lib.sh
out=$1 seconds=$2
fuzzer=${FUZZ_CC:-clang}
have "$fuzzer" || { echo "no $fuzzer here (Debian: apt-get install clang libclang-rt-14-dev)"; exit 1; }
mkdir -p "$out"

# Comparisons of numbers are no branches worth tracing; in the oracle's loops that would take all the time.
flags='-std=c99 -g -O1 -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all
    -I. -Iexamples -Itests/support -Itests/fuzz -pthread'
numeric=-fno-sanitize-coverage=trace-cmp
"$fuzzer" $flags -fsanitize=fuzzer-no-link $numeric -DDSV4_COMPRESSOR_IMPLEMENTATION -x c -c dsv4_compressor.h \
    -o "$out/dsv4.o" || exit 1

fuzzes() {
    harness=$1
    mkdir -p "$out/corpus/$harness"
    parts=
    [ "$harness" = safetensors ] || parts="$numeric $out/dsv4.o"
    "$fuzzer" $flags -fsanitize=fuzzer "tests/fuzz/$harness.c" $parts -lm -o "$out/$harness" || return 1
    "$out/$harness" -max_total_time="$seconds" -timeout=20 -rss_limit_mb=2048 -max_len=512 \
        -artifact_prefix="$out/$harness-" -print_final_stats=1 "$out/corpus/$harness" "tests/fuzz/corpus/$harness" \
        >"$out/$harness.log" 2>&1 || { tail -40 "$out/$harness.log"; return 1; }
}

for source in tests/fuzz/*.c; do
    harness=$(basename "$source" .c)
    [ "$harness" = standalone ] || spawn "$harness" fuzzes "$harness"
done
wait
grep -H stat::number_of_executed_units "$out"/*.log | sed 's|.*/\(.*\).log:stat::number_of_executed_units: *|\1: inputs tried |'
finish
