#!/bin/sh
# The header from Python: examples/dsv4.py, copied beside the header as its users do. By the scalar kernels, which are
# compiled soonest; all give the same bits.
. tests/checks/lib.sh
folder=$BUILD/tests/python
[ -n "$slow" ] && kernels= || kernels='-O1 -DDSV4_COMPRESSOR_SCALAR'
export CC CFLAGS="$kernels $WARN"

mkdir -p "$folder" && cp examples/dsv4.py dsv4_compressor.h "$folder" || exit 1
for python in "${PYTHON:-python3}" python3 /usr/bin/python3; do
    "$python" -c 'import numpy' 2>/dev/null || continue
    "$python" tests/checks/check_python.py "$BUILD/tests/compress" "$folder"
    exit
done
echo 'SKIP python: no python3 with numpy here (Debian: apt-get install python3-numpy)'
