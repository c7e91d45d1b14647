#!/bin/sh
# examples/dsv4.py: its C, and, where there is a Python with NumPy ($PYTHON, or python3), all that it promises.
. tests/lib.sh
python=${PYTHON:-python3}

sed -n '/^SHIM = r"""/,/^"""/{/"""/!p}' examples/dsv4.py >"$tmp/shim.c"
compiles() { grep -q dsv4_compress "$tmp/shim.c" && "$@" -std=c99 -Wall -Wextra -Werror -fsyntax-only -I. "$tmp/shim.c"; }
try 'the C in dsv4.py compiles' compiles $CC
if "$python" -c 'import numpy' 2>/dev/null; then
    export XDG_CACHE_HOME="$tmp" PYTHONDONTWRITEBYTECODE=1
    "$python" tests/check_python.py "$BUILD/tests/compress" >"$tmp/said" || echo failed >>"$tmp/verdicts"
    grep -v ' passed, ' "$tmp/said"
    sed -n 's/^\([0-9]*\) passed, .*/\1/p' "$tmp/said" | while read -r count; do yes passed | head -n "$count"; done >>"$tmp/verdicts"
else
    echo "$python has no NumPy (Debian: python3-numpy): dsv4.py itself is left out"
fi
finish
