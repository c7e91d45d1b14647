#!/bin/sh
# cross.sh DIRECTORY: tests/hashes.c on other CPUs and systems, under emulation; each must reproduce tests/hashes.txt
# with every kernel set it offers. Installs nothing: what is not here is named and skipped.
. tests/lib.sh
out=${1:-$BUILD/cross}
mkdir -p "$out"

# on NAME 'PACKAGES' 'RUNNER' COMPILER FLAGS...: builds the hash program, runs it by RUNNER, compares
on() {
    name=$1 packages=$2 runner=$3
    shift 3
    for command in "$1" ${runner%% *}; do
        have "$command" && continue
        echo "SKIP $name: no $command here (Debian: apt-get install $packages)"
        return
    done
    spawn "$name" reproduces "$name" "$runner" "$@"
    echo "     $name"
}

reproduces() {
    program=$out/$1
    runner=$2
    shift 2
    [ "${program%.exe}" = "$program" ] && [ "${program%.js}" = "$program" ] && set -- "$@" -pthread
    "$@" -std=c99 -I. -Iexamples -Itests tests/hashes.c -o "$program" -lm || return 1
    $runner "$program" >"$program.txt" 2>"$program.err" || { tail -5 "$program.err" "$program.txt"; return 1; }
    tr -d '\r' <"$program.txt" | same_hashes
}

# Every line of tests/hashes.txt must come for each kernel set that the program says it ran.
same_hashes() { diff tests/hashes.txt -; }

simde=$(simde_flag)
export NODE_PATH="${NODE_PATH:-/usr/share/nodejs}" # where Debian keeps the modules that emcc needs
qemu=qemu-user-static
x86=x86_64-linux-gnu-gcc

on aarch64 "gcc-aarch64-linux-gnu $qemu" qemu-aarch64-static aarch64-linux-gnu-gcc -O2 -static
on aarch64-O3-contract "gcc-aarch64-linux-gnu $qemu" qemu-aarch64-static aarch64-linux-gnu-gcc -O3 -ffp-contract=fast -static
on riscv64 "gcc-riscv64-linux-gnu $qemu" qemu-riscv64-static riscv64-linux-gnu-gcc -O2 -static $simde
on s390x-big-endian "gcc-s390x-linux-gnu $qemu" qemu-s390x-static s390x-linux-gnu-gcc -O2 -static
on arm-32-bit "gcc-arm-linux-gnueabihf $qemu" qemu-arm-static arm-linux-gnueabihf-gcc -O2 -static
on i386-sse2 "gcc-i686-linux-gnu $qemu" qemu-i386-static i686-linux-gnu-gcc -O2 -msse2 -mfpmath=sse -static
on x86-without-avx "gcc $qemu" 'qemu-x86_64-static -cpu Nehalem' $x86 -O2 -static
on x86-avx2-only "gcc $qemu" 'qemu-x86_64-static -cpu Haswell' $x86 -O2 -static
on wasm.js emscripten node emcc -O2 -s SINGLE_FILE=1 -s ALLOW_MEMORY_GROWTH=1
on windows.exe 'gcc-mingw-w64-x86-64 wine64' wine x86_64-w64-mingw32-gcc -O2 -static
finish
