#!/bin/sh
# all.sh DIRECTORY: every check there is, one after another; the last line is `N passed, N failed`. FUZZ_SECONDS (60) each
# for the fuzzers, SOAK_SECONDS (600) for the soak, MUTATE for make mutate, ALL_SKIP="name name" leaves steps out.
. tests/checks/lib.sh
out=${1:-$BUILD/all}
seconds=${FUZZ_SECONDS:-60}
mkdir -p "$out"
: >"$out/sums"

# step NAME COMMAND...: counts its last `N passed, N failed` line, or, without one, its exit status.
step() {
    name=$1
    shift
    case " ${ALL_SKIP:-} " in *" $name "*) echo "=== $name: left out"; return ;; esac
    echo "=== $name"
    begun=$(date +%s)
    "$@" >"$out/$name.log" 2>&1
    status=$?
    sum=$(grep -E '^[0-9]+ passed, [0-9]+ failed$' "$out/$name.log" | tail -1)
    [ -n "$sum" ] || { [ $status -eq 0 ] && sum='1 passed, 0 failed' || sum='0 passed, 1 failed'; }
    [ $status -eq 0 ] || case $sum in *' 0 failed') sum='0 passed, 1 failed' ;; esac
    if [ $status -eq 0 ]; then tail -3 "$out/$name.log"; else tail -60 "$out/$name.log"; fi
    echo "$sum" >>"$out/sums"
    echo "=== $name: exit status $status, $(($(date +%s) - begun)) s"
}
make_() { ${MAKE:-make} -s "$@"; }

# TEST [OPTIONS]
valgrind_on() {
    spawn "$*" env SOAK_SECONDS=5 valgrind --quiet --error-exitcode=9 --leak-check=full "$out/valgrind/tests/"$*
}
under_valgrind() {
    make_ tests BUILD="$out/valgrind" CFLAGS='-O2 -g' || return 1
    # What moves memory about. The sanitizers see all of the suites, these too where they would take a quarter of an hour
    # here. (Stacks are painted where valgrind watches.)
    for some in transferred close_in_one_call taking_back a_failed; do valgrind_on test_streams -t $some; done
    for some in carried thousands refused; do valgrind_on test_gradients -t $some; done
    for some in layers_of segments strides objects; do valgrind_on test_bits -t $some; done
    for some in allocation one_byte crooked thousands; do valgrind_on test_faults -t $some; done
    for some in stay_within entries_go any_bytes refused; do valgrind_on test_rows -t $some; done
    for some in steps_are tiles_are; do valgrind_on test_sums -t $some; done
    for test in tests/test_*.c; do
        program=$(basename "$test" .c)
        case $program in
            test_extremes | test_gradients | test_streams | test_bits | test_stack) ;;
            test_faults | test_rows | test_sums | test_oracle | test_hashes) ;;
            *) valgrind_on "$program" ;;
        esac
    done
    finish
}

step check make_ check SIMDE="$(simde_flag)"
step check-clang make_ check CC=clang BUILD="$out/clang" SIMDE="$(simde_flag)"
# Where there is another runner to have been used before.
if echo '#include <greatest.h>' | ${CC:-cc} -E -x c - >/dev/null 2>&1; then
    step check-own-runner make_ check BUILD="$out/own" CPPFLAGS=-DTESTS_OWN_RUNNER SCRIPTS=
fi
# What TESTS_SLOW makes longer, and nothing else.
step check-slow env TESTS_SLOW=1 ${MAKE:-make} -s check SCRIPTS='bits headers' \
    SIMDE="$(simde_flag)" TESTS="$BUILD/tests/test_exhaustive $BUILD/tests/test_extremes"
step soak make_ soak SOAK_SECONDS="${SOAK_SECONDS:-600}"
step examples make_ examples
step build-systems sh tests/checks/build_systems.sh
step run make_ run
step run-train make_ run-train
step run-mpi make_ run-mpi
step lint make_ lint
if have frama-c; then
    step prove make_ prove
    step prove-mutants make_ prove-mutants
fi
step coverage make_ coverage
step check-san make_ check-san
step check-cross make_ check-cross
# A seed of its own for what has to pass in the same way twice; make check-pytorch draws another each time.
step check-pytorch make_ check-pytorch PYTORCH="${PYTORCH:---seed 7}"
step fuzz make_ fuzz FUZZ_SECONDS="$seconds"
step mutate make_ mutate MUTATE="${MUTATE:---seconds 150}"
! have valgrind || step valgrind under_valgrind
awk '{ passed += $1; failed += $3 } END { print passed + 0 " passed, " failed + 0 " failed"; exit failed > 0 }' "$out/sums"
