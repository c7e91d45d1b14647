#!/bin/sh
# The command line: its output's bytes do not depend on kernels, threads or chunks, and no bad file or option gets through.
. tests/lib.sh
compress=$BUILD/tests/compress
isas=$("$compress" --list-isa) || exit 1

# ---- Equal bytes ------------------------------------------------------------------------------------------------

# The rows of the table are threads and tokens a call; 0 means: all at once.
ways='1 0
2 1
3 7
2 64'

same_bytes() { # same_bytes FILE OPTIONS...: over every kernel set and way
    golden=$1 name=$tmp/$(basename "$1" .safetensors)
    shift
    "$compress" --weights "$golden" --input "$golden" --output "$name.ref" --isa scalar --threads 1 "$@" || return 1
    for isa in $isas; do
        echo "$ways" | while read -r threads chunk; do
            [ "$chunk" = 0 ] && chunk= || chunk="--chunk $chunk"
            "$compress" --weights "$golden" --input "$golden" --output "$name.out" --isa "$isa" --threads "$threads" \
                $chunk "$@" && cmp "$name.ref" "$name.out" || exit 1
        done || return 1
    done
}
same_gradients() { # kernel sets and threads; sums over tokens are not promised for cuts at any token
    golden=$1 ways='1 0
2 0'
    same_bytes "$golden" --backward dout
}

for golden in tests/golden/*.safetensors; do
    case $golden in
    */grad_*) spawn "$golden: the same gradients from every kernel set, any threads" same_gradients "$golden" ;;
    *) spawn "$golden: the same bytes from every kernel set, any threads, any chunks" same_bytes "$golden" --stages ;;
    esac
done
wait

# ---- Refusals ---------------------------------------------------------------------------------------------------

good=tests/golden/csa_none.safetensors
mkdir "$tmp/files" "$tmp/place"

refuses() { # refuses STATUS PATTERN OPTIONS...: that exit status, one line matching the pattern, and no file
    wanted=$1 pattern=$2
    shift 2
    "$compress" --output "$tmp/place/out" "$@" >"$tmp/stdout" 2>"$tmp/stderr"
    status=$?
    echo "exit status $status: $(cat "$tmp/stderr")"
    ls "$tmp/place"
    [ $status -eq "$wanted" ] && [ ! -s "$tmp/stdout" ] && [ "$(wc -l <"$tmp/stderr")" -eq 1 ] &&
        grep -q -e "$pattern" "$tmp/stderr" && [ -z "$(ls "$tmp/place")" ]
}
bad_file() { # bad_file NAME PATTERN: the file of that name, as weights and as input
    file=$tmp/files/$1
    try "as weights: $1" refuses 1 "$2" --weights "$file" --input $good
    try "as input: $1" refuses 1 "$2" --weights $good --input "$file"
}
written() { # written NAME HEADER: a safetensors file of that header (under 256 bytes) and 64 bytes of zeros
    printf "\\$(printf %o ${#2})\\0\\0\\0\\0\\0\\0\\0%s" "$2" >"$tmp/files/$1"
    head -c 64 /dev/zero >>"$tmp/files/$1"
}

: >"$tmp/files/empty"
echo 'not a safetensors file at all' >"$tmp/files/text"
head -c 5 $good >"$tmp/files/five-bytes"
head -c 900 $good >"$tmp/files/cut-in-the-header"
head -c 20000 $good >"$tmp/files/cut-in-the-numbers"
{ cat $good; echo; } >"$tmp/files/one-byte-more"
printf '\377\377\377\377\377\377\377\177{}' >"$tmp/files/endless-header"
written broken-json '{"x":{"dtype":"F32","shape":[16],"data_offsets":[0,64}}'
written beyond-the-end '{"x":{"dtype":"F32","shape":[17],"data_offsets":[0,68]}}'
written shape-overflow '{"x":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,64]}}'
written negative-shape '{"x":{"dtype":"F32","shape":[-4,-4],"data_offsets":[0,64]}}'
written overlapping '{"x":{"dtype":"F32","shape":[16],"data_offsets":[0,64]},"y":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
written other-type '{"x":{"dtype":"F64","shape":[8],"data_offsets":[0,64]},"wkv":{"dtype":"I8","shape":[0],"data_offsets":[64,64]}}'
written two-lines-of-metadata '{"__metadata__":{"eps":"1\n2"},"x":{"dtype":"F32","shape":[16],"data_offsets":[0,64]}}'
written other-shape '{"x":{"dtype":"F32","shape":[16],"data_offsets":[0,64]}}'
mkdir "$tmp/files/folder"
for name in $(ls "$tmp/files"); do
    bad_file "$name" "$name"
done
bad_file none-there none-there

try 'output to a folder that is not there' refuses 1 nowhere --weights $good --input $good --output "$tmp/nowhere/out"
try 'output onto a folder' refuses 1 files --weights $good --input $good --output "$tmp/files"
try 'output to a full disk' refuses 1 /dev/full --weights $good --input $good --output /dev/full
try 'a picture in a folder that is not there' refuses 1 nowhere --weights $good --input $good --plot "$tmp/nowhere/plot.svg"

# An option, its value (- for none), the exit status; the message names the option.
while read -r option value status; do
    [ "$value" = - ] && value=
    try "$option $value" refuses "$status" "$option" --weights $good --input $good "$option" $value
done <<END
--no-such-option - 2
--threads - 2
--threads none 1
--threads 0 1
--threads 9999999999 1
--chunk -1 1
--chunk 99999999999999999999 1
--chunk 4611686018427387904 1
--start 4611686018427387904 1
--ratio 0 1
--ratio 4x 1
--rope-dim -2 1
--rope-theta nan 1
--rope-theta 0.5 1
--yarn-factor x 1
--eps -1 1
--pad-gate 3 1
--start -1 1
--start 1.5 1
--start .0 1
--preset best 1
END
try 'a kernel set of no machine' refuses 1 pdp11 --weights $good --input $good --isa pdp11
try 'a ratio other than the ape has' refuses 1 ratio --weights $good --input $good --ratio 5
try 'a rope_dim beyond head_dim' refuses 1 rope_dim --weights $good --input $good --rope-dim 4096
try 'an odd rope_dim' refuses 1 rope_dim --weights $good --input $good --rope-dim 3
try 'a tensor that is not there' refuses 1 absent --weights $good --input $good --tensor absent
try 'a prefix that is not there' refuses 1 layers.7 --weights $good --input $good --prefix layers.7
try 'a gradient that is not there' refuses 1 absent --weights $good --input $good --backward absent
try 'no weights' refuses 2 --weights --input $good
try 'no input' refuses 2 --input --weights $good
for option in --start --chunk; do
    try "$option beyond 2^62" refuses 1 "$option: 4611686018427387904 is out of range: . to 2^62 exclusive" --weights $good --input $good \
        $option 4611686018427387904
    try "$option beyond 2^64" refuses 1 "$option: 99999999999999999999 is out of range" --weights $good --input $good \
        $option 99999999999999999999
done
for option in --weights --input --output --plot; do
    try "$option -" refuses 1 "$option: '-' is not" --weights $good --input $good $option -
    try "$option without a name" refuses 1 "$option: an empty file name" --weights $good --input $good $option ''
done
try 'a flag with a value' refuses 2 "'--stages' takes no value" --weights $good --input $good --stages=1
try 'an unknown option with a value' refuses 2 "'--no-such=1'" --weights $good --input $good --no-such=1
try 'one file for entries and picture' refuses 2 one --weights $good --input $good --plot "$tmp/place/out"

# ---- What must not be overwritten --------------------------------------------------------------------------------

mkdir "$tmp/own" "$tmp/own/below" && ln -s own "$tmp/alias" && cp $good "$tmp/own/weights" && cp $good "$tmp/own/x" &&
    ln -s weights "$tmp/own/link" && ln "$tmp/own/x" "$tmp/own/hard" && cp $good "$tmp/own/picture.partial" || exit 1

keeps_inputs() { # keeps_inputs PATTERN OPTIONS...: refused with such a line, and the inputs are as they were
    pattern=$1
    shift
    "$compress" --weights "$tmp/own/weights" --input "$tmp/own/x" --output "$tmp/place/out" "$@" 2>"$tmp/stderr"
    status=$?
    echo "exit status $status: $(cat "$tmp/stderr")"
    [ $status -eq 1 ] && [ "$(wc -l <"$tmp/stderr")" -eq 1 ] && grep -q -e "$pattern" "$tmp/stderr" &&
        cmp $good "$tmp/own/weights" && cmp $good "$tmp/own/x" && cmp $good "$tmp/own/picture.partial" &&
        [ -h "$tmp/own/link" ] && [ -z "$(ls "$tmp/place")" ]
}
while read -r option name input; do
    try "$option onto the file of $input: $name" keeps_inputs "$option.*$input" $option "$tmp/$name"
done <<END
--output own/weights --weights
--output own/below/../weights --weights
--output alias/weights --weights
--output own/link --weights
--output own/x --input
--output own/hard --input
--plot own/weights --weights
--plot alias/x --input
--plot own/hard --input
END
try 'a picture drawn where the input lies' keeps_inputs '--plot.*--input' --input "$tmp/own/picture.partial" --plot "$tmp/own/picture"
try 'entries and picture in one new file, by two paths' keeps_inputs 'one file' --output "$tmp/own/new" --plot "$tmp/alias/./new"
: >"$tmp/own/old" && ln "$tmp/own/old" "$tmp/own/older" || exit 1
try 'entries and picture in one old file, by two names' keeps_inputs 'one file' --output "$tmp/own/old" --plot "$tmp/own/older"

keeps_the_old_file() {
    echo old >"$tmp/kept"
    ! "$compress" --weights $good --input $good --tensor absent --output "$tmp/kept" 2>/dev/null && [ "$(cat "$tmp/kept")" = old ]
}
helps() {
    for option in --help -h; do
        "$compress" $option >"$tmp/help" && grep -q -e --weights "$tmp/help" || return 1
    done
}
entries_of() { # entries_of WEIGHTS OPTIONS...: to $tmp/entries
    weights=$1
    shift
    "$compress" --weights "$weights" --input $good --output "$tmp/entries" "$@"
}
takes_the_ratio_from_ape() { # whatever metadata says: a file may hold compressors of several ratios
    LC_ALL=C sed 's/"ratio": *"4"/"ratio":"8"/' $good >"$tmp/several-ratios" && ! cmp -s $good "$tmp/several-ratios" &&
        entries_of $good && mv "$tmp/entries" "$tmp/expected" && entries_of "$tmp/several-ratios" &&
        cmp "$tmp/expected" "$tmp/entries"
}
reads_whole_numbers() { # 4.0 is one
    entries_of $good --start 8 && mv "$tmp/entries" "$tmp/expected" && entries_of $good --start 8.0 --ratio 4.00 &&
        cmp "$tmp/expected" "$tmp/entries"
}
writes_short_numbers() {
    entries_of $good && head -c 600 "$tmp/entries" | grep -a -q '"eps":"1e-06","rope_theta":"160000"'
}
takes_equals() { # --option=value, whatever the value holds
    cp $good "$tmp/a=b" && entries_of $good --start 8 && mv "$tmp/entries" "$tmp/expected" && entries_of "$tmp/a=b" --start=8 &&
        cmp "$tmp/expected" "$tmp/entries" && "$compress" "--weights=$tmp/a=b" "--input=$good" "--output=$tmp/entries" --start=8 &&
        cmp "$tmp/expected" "$tmp/entries"
}
tells_its_version() {
    version=$(sed -n 's/^#define DSV4_COMPRESSOR_VERSION "\(.*\)"/\1/p' dsv4_compressor.h)
    [ -n "$version" ] && [ "$("$compress" --version)" = "compress $version" ]
}
lists() { [ "$(echo "$isas" | tail -1)" = scalar ]; }
draws() {
    "$compress" --weights $good --input $good --output "$tmp/drawn" --plot "$tmp/plot.svg" && grep -q '^<svg\|^<?xml' "$tmp/plot.svg" &&
        [ "$(tail -1 "$tmp/plot.svg")" = '</svg>' ]
}
draws_nan() { # a picture without numbers that are none, though the first token of x is
    header=$(od -An -tu8 -N8 $good | tr -d ' ')
    cp $good "$tmp/nan" && printf '\377\377\377\377' | dd of="$tmp/nan" bs=1 seek=$((header + 8)) conv=notrunc &&
        "$compress" --weights $good --input "$tmp/nan" --output "$tmp/drawn" --plot "$tmp/plot.svg" &&
        grep -q 'holds a NaN' "$tmp/plot.svg" && ! grep -q '"-*nan"' "$tmp/plot.svg"
}
try 'what stood at the output stays after a failure' keeps_the_old_file
try '--help' helps
try 'the ratio of ape against the metadata' takes_the_ratio_from_ape
try 'whole numbers written with a point' reads_whole_numbers
try 'metadata in few digits' writes_short_numbers
try '--option=value' takes_equals
try '--version' tells_its_version
try '--list-isa ends in scalar' lists
try '--plot' draws
try '--plot of a NaN' draws_nan
finish
