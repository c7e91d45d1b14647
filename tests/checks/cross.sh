#!/bin/sh
# cross.sh DIRECTORY: tests/hashes.c on other CPUs and systems, under emulation; each must reproduce tests/hashes.txt
# with every kernel set it offers. Installs nothing: what is not here is named and skipped.
. tests/checks/lib.sh
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
    "$@" -std=c99 -I. -Iexamples -Itests/support tests/hashes.c -o "$program" -lm || return 1
    $runner "$program" >"$program.txt" 2>"$program.err" || { tail -5 "$program.err" "$program.txt"; return 1; }
    tr -d '\r' <"$program.txt" | same_hashes && { [ "${program%.exe}" = "$program" ] || has_vectors "$program.err"; }
}

# Windows, on a CPU that has them, is to get more than the scalar kernels.
has_vectors() {
    ! grep -qw avx2 /proc/cpuinfo || grep -q '^avx2\|^fma128' "$1" || { echo 'scalar kernels alone'; false; }
}

# Every line of tests/hashes.txt must come for each kernel set that the program says it ran.
same_hashes() { diff tests/hashes.txt -; }

# in_place_of_msvc FLAGS...: the header by clang in MSVC's place, the hash program and the C library by MinGW
in_place_of_msvc() {
    echo 'int _fltused;' >"$tmp/msvc.c" # an MSVC object asks for it where it has floating-point
    clang $(msvc_flags) $WARN -std=c99 -O2 -DDSV4_COMPRESSOR_IMPLEMENTATION -x c -c dsv4_compressor.h -o "$tmp/msvc.obj" &&
        $mingw -O2 -static -DDSV4__IMPLEMENTED "$@" "$tmp/msvc.c" "$tmp/msvc.obj"
}

simde=$(simde_flag)
mingw=x86_64-w64-mingw32-gcc
windows='gcc-mingw-w64-x86-64 wine64'
export NODE_PATH="${NODE_PATH:-/usr/share/nodejs}" # where Debian keeps the modules that emcc needs
qemu=qemu-user-static
x86=x86_64-linux-gnu-gcc

on aarch64 "gcc-aarch64-linux-gnu $qemu" qemu-aarch64-static aarch64-linux-gnu-gcc -O2 -static
on aarch64-O3-contract "gcc-aarch64-linux-gnu $qemu" qemu-aarch64-static aarch64-linux-gnu-gcc -O3 -ffp-contract=fast -static
on riscv64 "gcc-riscv64-linux-gnu $qemu" qemu-riscv64-static riscv64-linux-gnu-gcc -O2 -static $simde
on s390x-big-endian "gcc-s390x-linux-gnu $qemu" qemu-s390x-static s390x-linux-gnu-gcc -O2 -static
on powerpc64le "gcc-powerpc64le-linux-gnu $qemu" qemu-ppc64le-static powerpc64le-linux-gnu-gcc -O2 -static
on powerpc64le-O3-contract "gcc-powerpc64le-linux-gnu $qemu" qemu-ppc64le-static powerpc64le-linux-gnu-gcc \
    -O3 -ffp-contract=fast -static
# clang with musl: fma without an instruction that its C library owns up to.
have zig && zig=zig || zig="${PYTHON:-python3} -m ziglang" # pip install ziglang
! $zig version >/dev/null 2>&1 ||
    on powerpc64le-musl "$qemu" qemu-ppc64le-static $zig cc -target powerpc64le-linux-musl -O2 -ffp-contract=fast -static
on arm-32-bit "gcc-arm-linux-gnueabihf $qemu" qemu-arm-static arm-linux-gnueabihf-gcc -O2 -static
on i386-sse2 "gcc-i686-linux-gnu $qemu" qemu-i386-static i686-linux-gnu-gcc -O2 -msse2 -mfpmath=sse -static
on x86-without-avx "gcc $qemu" 'qemu-x86_64-static -cpu Nehalem' $x86 -O2 -static
on x86-avx2-only "gcc $qemu" 'qemu-x86_64-static -cpu Haswell' $x86 -O2 -static
on wasm.js emscripten node emcc -O2 -s SINGLE_FILE=1 -s ALLOW_MEMORY_GROWTH=1
on musl musl-tools '' musl-gcc -O2 -static
! $zig version >/dev/null 2>&1 || on zig '' '' $zig cc -O2
on windows.exe "$windows" wine $mingw -O2 -static
on windows-O3.exe "$windows" wine $mingw -O3 -static
if have clang && have $mingw; then
    on windows-clang.exe "$windows" wine clang --target=x86_64-w64-mingw32 -O2 -static \
        -L"$(dirname "$($mingw -print-libgcc-file-name)")"
    on windows-msvc.exe "$windows" wine in_place_of_msvc
fi
finish
