#!/bin/sh
# The header compiles alone and without a warning in every language it promises, links from many files, and leaks nothing.
. tests/checks/lib.sh

# Without TESTS_SLOW: the oldest and the newest standard, and one version of each compiler.
C=$(compilers "$CC" gcc clang ${slow:+clang-16 clang-17 clang-18 clang-19})
CXX=$(compilers c++ g++ clang++)
C_STANDARDS="c99 ${slow:+c11 c17} c2x"
[ -n "$slow" ] && kernels= || kernels=-DDSV4_COMPRESSOR_SCALAR # where what is built matters less than how it links
header=dsv4_compressor.h
implement=-DDSV4_COMPRESSOR_IMPLEMENTATION

compiles() { # compiles COMPILER FLAGS...: the header as a translation unit of its own
    compiler=$1
    shift
    echo '#include "dsv4_compressor.h"' | "$compiler" $WARN -I. "$@" -fsyntax-only -
}
becomes_code() { # becomes_code COMPILER FLAGS...: the implementation, down to machine code
    compiler=$1
    shift
    echo '#include "dsv4_compressor.h"' | "$compiler" $WARN -I. -x c $implement "$@" -O1 -c - -o /dev/null
}

# What headers of systems and others define as macros: windows.h and what it draws in, Xlib.h, complex.h, termios.h,
# sys/sysmacros.h, sys/reg.h, math.h, tgmath.h, strings.h, Arduino.h, and compilers in their GNU modes. After these the
# header still compiles, with every kernel set; its own includes come before, as those names are for their makers to mind.
objects='far near huge small interface hyper boolean pascal cdecl IN OUT OPTIONAL CONST VOID TRUE FALSE ERROR DELETE IGNORE
STRICT NEAR FAR THIS PURE None Bool True False Status Success Always Above Below Unsorted Convex Complex Nonconvex
Expose FocusIn I complex imaginary B0 B50 ECHO CR0 CS5 CS6 NL0 TAB0 BS0 FF0 VT0 CSIZE VMIN VTIME ES CS SS DS FS GS ERR EIP
ESP EBP R0 R1 rad1 edt1 unix linux i386 arm vax sun mips sparc hpux hppa OVERFLOW UNDERFLOW DOMAIN SING PLOSS TLOSS HUGE
PI DEFAULT INTERNAL errno min max major minor makedev howmany roundup powerof2 isset isclr setbit clrbit MIN MAX vector
pixel _A _B _C _L _N _P _S _U _X F HIGH LOW sq bit degrees radians constrain check verify require clear erase move timeout
border box scroll filter nil Nil YES NO ABSOLUTE RELATIVE OPAQUE TRANSPARENT DIFFERENCE'
functions='abs clamp swap word index rindex bcopy bzero exp log round floor ceil fma sqrt pow fabs sin cos'
{
    echo '#include <assert.h>'
    for name in float math stdarg stdint stdio stdlib string; do echo "#include <$name.h>"; done
    printf '#if %s\n#include <%s.h>\n#endif\n' 'defined(__x86_64__)' immintrin 'defined(__aarch64__)' arm_neon \
        'defined(DSV4_COMPRESSOR_SIMDE)' simde/x86/sse4.1 'defined(DSV4_COMPRESSOR_SIMDE)' simde/x86/fma
    for name in $objects; do printf '#undef %s\n#define %s @\n' "$name" "$name"; done
    for name in $functions; do printf '#undef %s\n#define %s(...) @\n' "$name" "$name"; done
    echo '#include "dsv4_compressor.h"'
} >"$tmp/after.c"
compiles_after_others() { # compiles_after_others COMPILER FLAGS...
    "$@" $WARN -I. $implement $(simde_flag) -fsyntax-only "$tmp/after.c"
}

for compiler in $C; do
    spawn "$compiler, after others' macros" compiles_after_others "$compiler" -std=gnu99 -x c
    for std in $C_STANDARDS; do
        spawn "$compiler -std=$std, declarations" compiles "$compiler" -std=$std -x c
        spawn "$compiler -std=$std, implementation" compiles "$compiler" -std=$std -x c $implement
    done
    spawn "$compiler, every option" compiles "$compiler" -std=c99 -x c $implement -DDSV4_COMPRESSOR_SCALAR \
        -DDSV4_COMPRESSOR_NO_HEAP -DDSV4_COMPRESSOR_STATIC '-DDSV4_ASSERT(condition)=((void)0)'
    [ -z "$slow" ] || spawn "$compiler -std=gnu99 -DNDEBUG" compiles "$compiler" -std=gnu99 -x c -DNDEBUG $implement
    [ -z "$slow" ] || [ -z "$(simde_flag)" ] || spawn "$compiler, simde" compiles "$compiler" -std=c99 -x c $implement $(simde_flag)
    [ "${compiler#clang}" = "$compiler" ] ||
        spawn "$compiler in place of MSVC" compiles "$compiler" -std=c99 -x c $implement $(msvc_flags)
    # What some versions of clang crash at, and what zig forbids them, shows in machine code alone.
    [ -z "$slow" ] || spawn "$compiler, machine code" becomes_code "$compiler"
    ! echo | "$compiler" -Werror -mno-evex512 -x c -c - -o /dev/null 2>/dev/null ||
        spawn "$compiler -mno-evex512" becomes_code "$compiler" -mno-evex512
done
for compiler in $CXX; do
    spawn "$compiler, after others' macros" compiles_after_others "$compiler" -std=gnu++11 -x c++
    for std in c++11 c++20; do
        spawn "$compiler -std=$std, declarations" compiles "$compiler" -std=$std -x c++
        spawn "$compiler -std=$std, implementation" compiles "$compiler" -std=$std -x c++ $implement
    done
done

windows=x86_64-w64-mingw32-gcc
[ -z "$slow" ] || ! have $windows || spawn 'behind windows.h' compiles $windows -std=gnu99 -include windows.h -x c $implement

# A compiler that knows neither vector extensions nor builtins still gets the scalar kernels.
echo '#include "dsv4_compressor.h"' >"$tmp/alone.c"
! have tcc || spawn 'tcc, implementation' tcc -I. $implement -c -o "$tmp/tcc.o" "$tmp/alone.c"

fast_math_is_refused() {
    ! compiles $CC -x c -ffast-math $implement 2>"$tmp/fast.txt" && grep -q 'DSV4_COMPRESSOR_FAST_MATH' "$tmp/fast.txt"
}
try '-ffast-math is refused, naming the way out' fast_math_is_refused
try '-ffast-math with DSV4_COMPRESSOR_FAST_MATH' compiles $CC -x c -ffast-math $implement -DDSV4_COMPRESSOR_FAST_MATH

# A status that nobody looks at is a warning, one that is looked at is none.
status_use() { printf '#include "dsv4_compressor.h"\nint use(dsv4_state *s);\nint use(dsv4_state *s) { %s }\n' "$1"; }
status_use 'return dsv4_state_reset(s, NULL) == DSV4_OK;' >"$tmp/checked.c"
status_use 'dsv4_state_reset(s, NULL); return 0;' >"$tmp/ignored.c"
ignored_status_warns() { # ignored_status_warns COMPILER FLAGS...
    "$@" $WARN -I. -c "$tmp/checked.c" -o /dev/null && ! said=$("$@" $WARN -I. -c "$tmp/ignored.c" -o /dev/null 2>&1) &&
        echo "$said" | grep -Eq 'unused-(result|value)'
}
for std in c99 c2x; do
    for compiler in $C; do spawn "$compiler -std=$std, a status ignored" ignored_status_warns "$compiler" -std=$std; done
done
for std in c++11 c++17; do
    for compiler in $CXX; do
        spawn "$compiler -std=$std, a status ignored" ignored_status_warns "$compiler" -std=$std -x c++
    done
done
every_function_that_can_fail_is_marked() {
    sed '/ 3\. Implementation$/q' $header >"$tmp/declarations.h"
    grep -q '^DSV4_CHECKED DSV4_API dsv4_status ' "$tmp/declarations.h" && ! grep '^DSV4_API dsv4_status ' "$tmp/declarations.h"
}
try 'every function that can fail is marked' every_function_that_can_fail_is_marked

# A program of three files: one implements, one includes it twice, one is C++ where there is a compiler for that.
cat >"$tmp/user.c" <<'END'
#include "dsv4_compressor.h"
#include "dsv4_compressor.h"
const char *user_text(void);
const char *user_text(void) { return dsv4_status_text(DSV4_OK); }
END
cat >"$tmp/main.c" <<'END'
#include "dsv4_compressor.h"
#include <string.h>
#ifdef __cplusplus
extern "C"
#endif
const char *user_text(void);
int main(void) {
    dsv4_config config = dsv4_preset_config(DSV4_V4_FLASH_CSA);
    return strcmp(user_text(), dsv4_status_text(DSV4_OK)) != 0 || dsv4_config_check(&config, NULL) != DSV4_OK;
}
END
echo "#ifndef DSV4_COMPRESSOR_IMPLEMENTATION
#define DSV4_COMPRESSOR_IMPLEMENTATION
#endif
#include \"$header\"
#include \"$header\"" >"$tmp/implementation.c"

builds() { # builds NAME FLAGS...: objects and program NAME from the three files, then runs it
    program=$tmp/$1
    shift
    for file in user implementation; do
        $CC -I. "$@" -c "$tmp/$file.c" -o "$program.$file.o" || return 1
    done
    $CC -I. "$@" "$tmp/main.c" "$program.user.o" "$program.implementation.o" -lm -o "$program" && "$program"
}
builds_for_cpp() {
    $1 -I. -c -x c++ "$tmp/main.c" -o "$tmp/cpp.main.o" &&
        $1 "$tmp/cpp.main.o" "$tmp/shared.user.o" "$tmp/shared.implementation.o" -lm -o "$tmp/cpp" && "$tmp/cpp"
}
renamed_builds() {
    cp $header "$tmp/other_name.h"
    printf '#define DSV4_COMPRESSOR_IMPLEMENTATION\n#include "other_name.h"\n' >"$tmp/renamed.c"
    $CC -DDSV4_COMPRESSOR_HEADER='"other_name.h"' -fsyntax-only "$tmp/renamed.c"
}
try 'three files, one implements' builds shared
for compiler in $(echo $CXX | cut -d' ' -f1); do
    spawn "a C++ program with the C implementation" builds_for_cpp "$compiler"
done
spawn 'three files, each with a static copy' builds static -DDSV4_COMPRESSOR_STATIC -DDSV4_COMPRESSOR_IMPLEMENTATION \
    $kernels
spawn 'under another name' renamed_builds
wait

# What the object shows to the linker, keeps to itself, and asks for.
symbols() { nm "$tmp/shared.implementation.o" | awk "$1"; }
nothing() { # nothing FILE: fails, showing it, unless the file is empty
    cat "$1"
    [ ! -s "$1" ]
}
public_names_have_the_prefix() {
    symbols 'NF == 3 && $2 ~ /^[A-Z]$/ && $3 !~ /^dsv4_[^_]/ { print }' >"$tmp/public.txt"
    nothing "$tmp/public.txt"
}
# clang gives the constants of a function the name function.constant.
private_names_have_the_prefix() {
    symbols 'NF == 3 && $2 ~ /^[a-z]$/ && $3 !~ /^(dsv4__|simde_|\.|dsv4_[a-z0-9_]+\.)|\.[0-9]+$/ { print }' >"$tmp/private.txt"
    nothing "$tmp/private.txt"
}
every_declared_function_exists() {
    sed -n 's/^DSV4_API [^(]*[ *]\(dsv4_[a-z0-9_]*\)(.*/\1/p' $header | sort -u >"$tmp/declared.txt"
    symbols '$2 == "T" { print $3 }' | sort -u >"$tmp/defined.txt"
    [ -s "$tmp/declared.txt" ] && diff "$tmp/declared.txt" "$tmp/defined.txt"
}
# No files, threads, clocks, environment or locale: memory, text, arithmetic that some CPUs lack, and assert.
asks_for_little() {
    symbols '$1 == "U" && $2 !~ /^(malloc|free|mem(cpy|set|move|cmp)|str(cmp|len)|v?snprintf|(sqrt|fma)f?)$/ &&
        $2 !~ /^_?_(assert|stack_chk|GLOBAL_OFFSET_TABLE_)/ { print }' >"$tmp/asked.txt"
    nothing "$tmp/asked.txt"
}
# Macros by the file that defines them: the preprocessor's output marks where each line comes from.
macros_have_the_prefix() {
    $CC -I. "$@" -E -dD "$tmp/alone.c" | awk '
        /^# [0-9]+ "/ { inside = $3 ~ /dsv4_compressor\.h"$/ }
        inside && /^#define / { split($2, name, "("); defined[name[1]] = 1 }
        inside && /^#undef / { delete defined[$2] }
        END { for (macro in defined) if (macro !~ /^DSV4_/) print macro }' >"$tmp/macros.txt"
    nothing "$tmp/macros.txt"
}
try 'public symbols begin with dsv4_' public_names_have_the_prefix
try 'private symbols begin with dsv4__' private_names_have_the_prefix
try 'every declared function is defined, and no other' every_declared_function_exists
try 'nothing is asked of the system but memory, text and arithmetic' asks_for_little
try 'macros of the declarations begin with DSV4_' macros_have_the_prefix
try 'macros of the implementation begin with DSV4_' macros_have_the_prefix $implement
finish
