#!/bin/sh
# What make install writes, as pkg-config and CMake find it, and README.md's lines for CMake, Meson, Zig and Rust, as
# far as these are installed: what is not is named and left out. No network: README's URL is a local repository here.
. tests/checks/lib.sh
top=$PWD
make_() { ${MAKE:-make} -s "$@" >&2; }
left_out() { echo "SKIP $1: no $2 here ($3)"; }

# A user's program, in a folder with a space as all of this is.
work="$tmp/a folder"
mkdir -p "$work"
cat >"$work/app.c" <<'END'
#define DSV4_COMPRESSOR_SCALAR
#define DSV4_COMPRESSOR_IMPLEMENTATION
#include <dsv4_compressor.h>
int main(void) {
    dsv4_config config = dsv4_preset_config(DSV4_V4_FLASH_CSA);
    return dsv4_config_check(&config, NULL) != DSV4_OK;
}
END

# README.md's lines in a language, with what stands for URL.
block() {
    awk -v fence="\`\`\`$1" '$0 == fence { inside = 1; next } /^```$/ { inside = 0 } inside' README.md |
        sed "s|URL|$url|"
}

# ---- make install -----------------------------------------------------------------------------------------------

# Its files, and the prefix moved afterwards: nothing in them says where it was.
make_ install DESTDIR="$work/root" PREFIX=/opt/some && mv "$work/root/opt/some" "$work/prefix" || exit 1
files='include/dsv4_compressor.h
share/cmake/dsv4_compressor/dsv4_compressor-config-version.cmake
share/cmake/dsv4_compressor/dsv4_compressor-config.cmake
share/pkgconfig/dsv4_compressor.pc'
files_of() { (cd "$1" && find . ! -type d | sed 's|^\./||' | LC_ALL=C sort); }
installs_four_files() {
    [ "$(files_of "$work/prefix")" = "$files" ] &&
        cmp dsv4_compressor.h "$work/prefix/include/dsv4_compressor.h" &&
        ! grep -r "@VERSION@\|opt/some" "$work/prefix/share"
}
# Once below a relative prefix.
uninstalls_what_it_installed() {
    place=$(basename "$tmp")
    trap 'rm -rf "$top/$place"' EXIT
    mkdir -p "$place/share/cmake/dsv4_compressor" "$place/include"
    : >"$place/include/other.h"
    : >"$place/share/cmake/dsv4_compressor/other.cmake"
    make_ install PREFIX="$place" && [ "$(files_of "$place" | wc -l)" -eq 6 ] && make_ uninstall PREFIX="$place" &&
        [ "$(files_of "$place" | xargs)" = 'include/other.h share/cmake/dsv4_compressor/other.cmake' ] &&
        rm -r "$place/share/cmake/dsv4_compressor" &&
        make_ install PREFIX="$place" && make_ uninstall PREFIX="$place" &&
        [ ! -e "$place/share/cmake/dsv4_compressor" ]
}
try 'make install writes four files, which may be moved' installs_four_files
try 'make uninstall removes those and leaves others' uninstalls_what_it_installed

by_pkg_config() {
    export PKG_CONFIG_PATH="$work/prefix/share/pkgconfig"
    [ "$(pkg-config --modversion dsv4_compressor)" = "$version" ] &&
        flags=$(pkg-config --cflags dsv4_compressor) libraries=$(pkg-config --libs dsv4_compressor) &&
        eval "$CC $flags '$work/app.c' $libraries -o '$work/by_pkg_config'" && "$work/by_pkg_config"
}
version=$(sed -n 's/^#define DSV4_COMPRESSOR_VERSION "\(.*\)"/\1/p' dsv4_compressor.h)
if have pkg-config; then try 'pkg-config' by_pkg_config; else left_out pkg-config pkg-config 'Debian: pkg-config'; fi

# ---- CMake ------------------------------------------------------------------------------------------------------

# cmake_project NAME OPTIONS...: a project of app.c with the lines of standard input, configured, built and run
cmake_project() {
    project=$work/$1
    shift
    mkdir -p "$project"
    cp "$work/app.c" "$project"
    {
        printf 'cmake_minimum_required(VERSION 3.18)\nproject(app LANGUAGES C)\n'
        cat
        printf 'add_executable(app app.c)\ntarget_link_libraries(app PRIVATE dsv4_compressor::dsv4_compressor)\n'
    } >"$project/CMakeLists.txt"
    cmake -S "$project" -B "$project/build" -DCMAKE_C_COMPILER="$CC" "$@" >"$project/log" 2>&1 &&
        cmake --build "$project/build" >>"$project/log" 2>&1 && "$project/build/app" ||
        { cat "$project/log"; return 1; }
}
finds() { # finds NAME VERSION
    echo "find_package(dsv4_compressor $2 REQUIRED)
find_package(dsv4_compressor REQUIRED)" | cmake_project "$1" -DCMAKE_PREFIX_PATH="$work/prefix"
}
refuses_version() { # refuses_version NAME VERSION
    ! finds "$1" "$2" >"$work/$1.log" && grep -q "$version" "$work/$1.log"
}
fetches() { block cmake | cmake_project fetched; }

# ---- Meson, Zig, Rust -------------------------------------------------------------------------------------------

by_meson() {
    project=$work/by_meson
    mkdir -p "$project/subprojects/packagefiles/dsv4_compressor"
    cp "$work/app.c" "$project"
    cp examples/packages/meson.build "$project/subprojects/packagefiles/dsv4_compressor"
    block ini >"$project/subprojects/dsv4_compressor.wrap"
    printf '%s\n' "project('app', 'c')" "executable('app', 'app.c', dependencies: dependency('dsv4_compressor'))" \
        >"$project/meson.build"
    meson setup "$project/build" "$project" && ninja -C "$project/build" && "$project/build/app"
}

# said COMMAND: README's line that begins with it, run in the folder with the header and an app
said() {
    line=$(block sh | grep "^$1 ")
    [ -n "$line" ] && (cd "$work" && PATH="$work/bin:$PATH" && eval "$line")
}
cp dsv4_compressor.h "$work"
mkdir "$work/bin"
python=$(command -v "${PYTHON:-python3}")
case $python in /*) ;; *) python=$PWD/$python ;; esac # the lines run in another folder
have zig || { ! "$python" -m ziglang version >/dev/null 2>&1 ||
    printf '#!/bin/sh\nexec "%s" -m ziglang "$@"\n' "$python" >"$work/bin/zig"; }
chmod +x "$work/bin"/* 2>/dev/null
cat >"$work/app.zig" <<'END'
const dsv4 = @cImport(@cInclude("dsv4_compressor.h"));
pub fn main() u8 {
    const config = dsv4.dsv4_preset_config(dsv4.DSV4_V4_FLASH_CSA);
    return @intCast(dsv4.dsv4_config_check(&config, null));
}
END
cat >"$work/app.rs" <<'END'
#[allow(warnings)]
mod dsv4;
fn main() {
    let status = unsafe {
        let config = dsv4::dsv4_preset_config(dsv4::dsv4_preset_DSV4_V4_FLASH_CSA);
        dsv4::dsv4_config_check(&config, std::ptr::null_mut())
    };
    std::process::exit(status as i32);
}
END
export ZIG_GLOBAL_CACHE_DIR="$work/zig-cache" ZIG_LOCAL_CACHE_DIR="$work/zig-cache"
by_zig() {
    said 'zig build-exe' >"$work/zig.log" 2>&1 || {
        cat "$work/zig.log"
        grep -q "invalid builtin function: '@cImport'" "$work/zig.log" && said 'zig translate-c' &&
            sed -i.old '1s/.*/const dsv4 = @import("dsv4.zig");/' "$work/app.zig" && said 'zig build-exe'
    } && mv "$work/app" "$work/app-zig" && "$work/app-zig"
}
by_rust() { said bindgen && said rustc && "$work/app"; }

# ---- All of them ------------------------------------------------------------------------------------------------

# The repository that is fetched from: this tree, as it is.
url=$tmp/repository.git
if have git; then
    mkdir -p "$work/tree/examples"
    cp dsv4_compressor.h "$work/tree"
    cp -r examples/packages "$work/tree/examples"
    (cd "$work/tree" && git init -q && git add . && git -c user.name=x -c user.email=x@x commit -qm x &&
        git tag "v$version") && git clone -q --bare "$work/tree" "$url" || exit 1
fi

if have cmake; then
    spawn 'CMake, find_package' finds found ''
    spawn 'CMake, find_package, a version' finds found_version "${version%.*}"
    spawn 'CMake, find_package refuses a newer version' refuses_version newer "${version%%.*}.99"
    spawn 'CMake, find_package refuses another first number' refuses_version older 1.0
    ! have git || spawn "CMake, README's lines" fetches
else
    left_out CMake cmake 'Debian: cmake'
fi
if have meson && have ninja && have git; then
    spawn "Meson, README's lines" by_meson
else
    left_out Meson 'meson, ninja or git' 'Debian: meson ninja-build git'
fi
said cc || exit 1
if have zig || [ -x "$work/bin/zig" ]; then spawn "Zig, README's lines" by_zig; else left_out Zig zig 'pip: ziglang'; fi
if have bindgen && have rustc; then
    wait # for Zig's app
    spawn "Rust, README's lines" by_rust
else
    left_out Rust 'bindgen or rustc' 'Debian: bindgen rustc'
fi
finish
