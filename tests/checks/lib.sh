# lib.sh: what the shell tests share. To be sourced from the top directory; $tmp is a directory that goes away.
#
#   try NAME COMMAND...       runs it; success counts as passed, failure prints NAME and the output
#   spawn NAME COMMAND...     the same beside others, $JOBS at a time; `finish` waits for all
#   finish                    prints `N passed, N failed`; its status is the script's
set -u
CC=${CC:-cc}
BUILD=${BUILD:-build}
JOBS=${JOBS:-2}
WARN='-Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror'
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' INT TERM
serial=0
slow=${TESTS_SLOW:-} # not empty: also what takes long and seldom finds anything
: >"$tmp/verdicts"

# A line in this pipe is leave to run one process beside the others. (Opened both ways, neither end waits for the other.)
mkfifo "$tmp/leaves" && exec 9<>"$tmp/leaves" || exit 1
while [ $serial -lt "$JOBS" ]; do
    echo leave >&9
    serial=$((serial + 1))
done

try() {
    try_name=$1
    try_log=$tmp/log.$serial
    shift
    if "$@" >"$try_log" 2>&1; then
        echo passed >>"$tmp/verdicts"
    else
        { echo "FAILED: $try_name"; sed 's/^/    /' "$try_log" | head -30; }
        echo failed >>"$tmp/verdicts"
    fi
}

spawn() {
    serial=$((serial + 1))
    read -r leave <&9
    { (try "$@"); echo "$leave" >&9; } &
}

finish() {
    wait
    passed=$(grep -c passed "$tmp/verdicts")
    failed=$(grep -c failed "$tmp/verdicts")
    echo "$passed passed, $failed failed"
    [ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
}

have() { command -v "$1" >/dev/null 2>&1; }

# The first of the given commands' names that exist, without repetition of one compiler under two names.
compilers() {
    for name in "$@"; do
        have "$name" && readlink -f "$(command -v "$name")" | sed "s|^|$name |"
    done | awk '!seen[$2]++ { print $1 }'
}

# Flags with which clang stands in for MSVC, with declarations in $tmp/msvc of what the header calls.
msvc_flags() {
    mkdir -p "$tmp/msvc"
    cat >"$tmp/msvc/all.h" <<'END'
#include <stdarg.h>
#include <stddef.h>
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define assert(condition) ((void)0)
float sqrtf(float);
int vsnprintf(char *, size_t, const char *, va_list), snprintf(char *, size_t, const char *, ...);
void *malloc(size_t), free(void *), *memset(void *, int, size_t);
void *memcpy(void *, const void *, size_t), *memmove(void *, const void *, size_t);
int memcmp(const void *, const void *, size_t), strcmp(const char *, const char *);
size_t strlen(const char *);
END
    for name in assert math stdio stdlib string; do
        printf '#pragma once\n#include "all.h"\n' >"$tmp/msvc/$name.h"
    done
    echo --target=x86_64-pc-windows-msvc -ffreestanding -nostdlibinc -isystem "$tmp/msvc"
}

simde_flag() {
    printf '#if !__has_include(<simde/x86/sse4.1.h>)\n#error\n#endif\n' | $CC -E - >/dev/null 2>&1 &&
        echo -DDSV4_COMPRESSOR_SIMDE=1
}
