#!/bin/sh
# sanitize.sh DIRECTORY: all tests under address + undefined (gcc, clang) and memory (clang) sanitizers; those that use
# threads also under the thread sanitizer.
. tests/checks/lib.sh
out=${1:-$BUILD/san}

# under NAME COMPILER SANITIZERS [TESTS]
under() {
    have "$2" || { echo "SKIP $1: no $2 here"; return; }
    tests=${4:-$(ls tests/test_*.c)}
    tests=$(echo "$tests" | grep -v test_stack) # sanitizers make frames of their own
    tests=$(for test in $tests; do basename "$test" .c | sed "s|^|$out/$1/tests/|"; done)
    echo "--- $1"
    ${MAKE:-make} -s check BUILD="$out/$1" CC="$2" SCRIPTS= SIMDE="$(simde_flag)" TESTS="$(echo $tests)" \
        CFLAGS="-O1 -g -fno-omit-frame-pointer -fsanitize=$3 -fno-sanitize-recover=all" >"$out/$1.log" 2>&1
    status=$?
    grep '^[0-9]* passed, ' "$out/$1.log" | tail -1 >>"$tmp/sums"
    if [ $status -eq 0 ]; then tail -1 "$out/$1.log"; else cat "$out/$1.log"; failed=1; fi
}

mkdir -p "$out"
failed=0
: >"$tmp/sums"
export ASAN_OPTIONS=detect_stack_use_after_return=1:strict_string_checks=1 UBSAN_OPTIONS=print_stacktrace=1
under address clang address,undefined,float-cast-overflow
under address-gcc gcc address,undefined,float-cast-overflow
under memory clang memory
under thread clang thread "$(grep -l pthread tests/test_*.c)"
echo '--- all sanitizers'
awk '{ passed += $1; failed += $3 } END { print passed + 0 " passed, " failed + 0 " failed" }' "$tmp/sums"
exit $failed
