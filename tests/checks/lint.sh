#!/bin/sh
# lint.sh DIRECTORY: the header, examples and tests through gcc -fanalyzer, clang-tidy and cppcheck. No finding is left:
# what an analyser gets wrong is switched off in .clang-tidy or here, with the reason.
. tests/checks/lib.sh
out=${1:-$BUILD/lint}
mkdir -p "$out"
flags='-std=c99 -I. -Iexamples -Itests/support -pthread'
implement=-DDSV4_COMPRESSOR_IMPLEMENTATION

silent() { # silent COMMAND...: no output but success
    "$@" >"$out/silent.$serial" 2>&1
    silent_status=$?
    cat "$out/silent.$serial"
    [ $silent_status -eq 0 ] && [ ! -s "$out/silent.$serial" ]
}
analyses() { silent gcc $flags -O1 -fanalyzer -c "$@" -o "$out/object.$serial.o"; }
tidies() { # tidies FILE FLAGS...
    file=$1
    shift
    clang-tidy --config-file=.clang-tidy --quiet "$file" -- $flags "$@" 2>"$out/tidy.$serial.err"
}
# pointerSize: the heap allocator stores the pointer itself before its block.
checks() {
    silent cppcheck --quiet --std=c99 --error-exitcode=1 --inline-suppr --enable=warning,performance,portability \
        --suppress=missingIncludeSystem --suppress=pointerSize -I. -Iexamples -Itests/support "$@"
}

# The header as a file of its own. Cppcheck does not follow a header that includes itself, and gets it in one piece.
cp dsv4_compressor.h "$out/implementation.c"
if have gcc; then
    gcc $flags $implement -DDSV4_COMPRESSOR_SCALAR -E "$out/implementation.c" -o "$out/implementation.i"
    spawn 'gcc -fanalyzer dsv4_compressor.h' analyses $implement "$out/implementation.c"
    ! have cppcheck || spawn 'cppcheck dsv4_compressor.h' checks "$out/implementation.i"
fi
! have clang-tidy || spawn 'clang-tidy dsv4_compressor.h' tidies "$out/implementation.c" $implement

# Layout, by the version that all lines were written with (others differ in details).
formatted() { silent clang-format --dry-run -Werror "$@"; }
! have clang-format || ! clang-format --version | grep -q ' 14\.' ||
    spawn 'clang-format' formatted $(ls dsv4_compressor.h examples/*.[ch] examples/bench/*.h tests/*.c tests/*/*.[ch])
narrow() { ! awk 'length > 120 { print FILENAME ":" FNR ": " length " columns" }' "$@" | grep .; }
spawn 'no line over 120 columns' narrow $(ls dsv4_compressor.h examples/*.[ch] examples/bench/*.[ch] tests/*.c tests/*/*.[ch])

# Programs, without the implementation that they include: it has been looked at.
separate='--param logical-op-non-short-circuit=0' # conditions that gcc computes together lose it what each says
programs="$(ls examples/*.c examples/bench/*.c tests/*.c tests/fuzz/*.c | grep -v examples/mpi.c)"
for program in $programs; do
    case $program in
    examples/*) ! have gcc || spawn "gcc -fanalyzer $program" analyses "$program" $separate -DDSV4__IMPLEMENTED=1 ;;
    esac
    case $program in
    tests/test_cpu.c) without= ;; # looks at what the implementation keeps to itself
    *) without=-DDSV4__IMPLEMENTED=1 ;;
    esac
    ! have clang-tidy || spawn "clang-tidy $program" tidies "$program" $without
done
! have cppcheck || spawn 'cppcheck, programs' checks -DDSV4__IMPLEMENTED=1 $programs
finish
