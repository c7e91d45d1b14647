#!/bin/sh
# The command line: its output's bytes do not depend on kernels, threads or chunks, and no bad file or option gets through.
. tests/checks/lib.sh
compress=$BUILD/tests/compress
isas=$("$compress" --list-isa) || exit 1

# ---- Equal bytes ------------------------------------------------------------------------------------------------

# The rows of the table are threads and tokens a call; 0 means: all at once.
ways='1 0
2 1
3 7
2 64'

same_bytes() { # same_bytes FILE OPTIONS...: over every kernel set and way
    golden=$1 name=$tmp/$(basename "$1" .safetensors).$#
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

same_rows() { same_bytes "$1" --stages && same_bytes "$1" --packed; }

for golden in tests/golden/*.safetensors; do
    case $golden in
    */rows_*) spawn "$golden: the same bytes, read back and packed" same_rows "$golden" ;;
    */grad_*) spawn "$golden: the same gradients from every kernel set, any threads" same_gradients "$golden" ;;
    *) spawn "$golden: the same bytes from every kernel set, any threads, any chunks" same_bytes "$golden" --stages ;;
    esac
    case $golden in
    *_deepseek.* | */v41_*) spawn "$golden: the same bytes in the order of tiles" same_bytes "$golden" --stages --sums tiles ;;
    esac
done
wait

# ---- No window at all --------------------------------------------------------------------------------------------

short_rows() { # rows of fewer tokens than a window has, their tails dropped
    for fed in '' '--chunk 1' '--chunk 5 --threads 2'; do
        "$compress" --weights tests/golden/hca_none.safetensors --input tests/golden/csa_none.safetensors --drop-tail \
            --stages $fed --output "$tmp/short.out" || return 1
        [ -n "$fed" ] || mv "$tmp/short.out" "$tmp/short"
        [ -z "$fed" ] || cmp "$tmp/short" "$tmp/short.out" || return 1
    done
}
try 'rows shorter than a window, however they are fed' short_rows

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
--sums tile 1
--sums Pairs 1
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
# ---- Checkpoints ------------------------------------------------------------------------------------------------

# Two compressors of one hidden_dim as released checkpoints hold them: in shards, beside tensors of other kinds, some of
# them in shards that are not there.
$CC ${FLAGS:--Iexamples} tests/checks/tensors.c -o "$tmp/tensors" || exit 1
csa=tests/golden/csa_none.safetensors hca=tests/golden/hca_none.safetensors v41=tests/golden/v41_ratio2.safetensors
model=$tmp/model
params_of() { # params_of GOLDEN PREFIX: as DeepSeek spells them
    echo "$1:wkv=$2.wkv.weight $1:wgate=$2.wgate.weight $1:ape=$2.ape $1:norm=$2.norm.weight"
}
index_of() { # index_of FOLDER: of its shards, and of one that is not there
    for file in "$1"/shard-*; do
        head -c 4000 "$file" | LC_ALL=C grep -ao '"[^"]*":{"dtype' | sed "s|:{\"dtype|: \"$(basename "$file")\",|"
    done | { echo '{"metadata": {"total_size": 1}, "weight_map": {'; cat; echo '"embed.weight": "shard-9"}}'; } \
        >"$1/model.safetensors.index.json"
}
rm -rf "$model" && mkdir "$model" || exit 1
"$tmp/tensors" "$model/shard-1" $csa:wkv=layers.2.attn.compressor.wkv.weight $csa:wgate=layers.2.attn.compressor.wgate.weight \
    $csa:ape=layers.2.attn.compressor.ape $csa:wkv=layers.2.attn.wkv.weight,F8_E4M3 $csa:norm=layers.2.attn.kv_norm.weight &&
    "$tmp/tensors" "$model/shard-2" $csa:norm=layers.2.attn.compressor.norm.weight $(params_of $hca layers.10.attn.compressor) &&
    index_of "$model" || exit 1
bare='--rope-dim 16 --yarn-factor 1' # what golden files say in metadata

expect_entries() { # expect_entries GOLDEN OPTIONS...: the output that the golden file's own weights give, to $tmp/expected
    golden=$1
    shift
    "$compress" --weights "$golden" --input $hca --output "$tmp/expected" "$@" >/dev/null
}
finds_in() { # finds_in WEIGHTS PREFIX GOLDEN: the same file byte for byte
    expect_entries "$3" && "$compress" --weights "$1" --prefix "$2" --input $hca --output "$tmp/entries" $bare &&
        cmp "$tmp/expected" "$tmp/entries"
}
try 'a compressor spread over shards, by the index' finds_in "$model/model.safetensors.index.json" layers.2.attn.compressor $csa
try 'by the folder' finds_in "$model" layers.2.attn.compressor. $csa
try 'one in a single shard' finds_in "$model/" layers.10.attn.compressor $hca
try 'a shard by itself' finds_in "$model/shard-2" layers.10.attn.compressor $hca
mkdir "$tmp/single" && "$tmp/tensors" "$tmp/single/model.safetensors" $csa:wkv=model.layers.2.self_attn.compressor.kv_proj.weight \
    $csa:wgate=model.layers.2.self_attn.compressor.gate_proj.weight $csa:ape=model.layers.2.self_attn.compressor.position_bias \
    $csa:norm=model.layers.2.self_attn.compressor.kv_norm.weight $csa:wkv=model.layers.2.self_attn.kv_proj.weight \
    $csa:norm=model.layers.2.self_attn.kv_norm.weight || exit 1
try "a folder of one file, transformers' names" finds_in "$tmp/single" model.layers.2.self_attn.compressor $csa

refuses_weights() { # refuses_weights PATTERN WEIGHTS OPTIONS...
    pattern=$1 weights=$2
    shift 2
    refuses 1 "$pattern" --weights "$weights" --input $hca $bare "$@"
}
without_shard() { # without_shard NUMBER OPTIONS...: refused by the shard's name
    shard=$model/shard-$1
    shift
    mv "$shard" "$tmp/away" && refuses_weights "$shard" "$model" "$@"
    result=$?
    mv "$tmp/away" "$shard"
    return $result
}
needs_no_other() {
    mv "$model/shard-1" "$tmp/away" && finds_in "$model" layers.10.attn.compressor $hca
    result=$?
    mv "$tmp/away" "$model/shard-1"
    return $result
}
try 'a shard that is not needed need not be there' needs_no_other
try 'a shard that is needed' without_shard 2 --prefix layers.2.attn.compressor
try 'a folder without weights' refuses_weights 'model.safetensors.index.json or' "$tmp/files/folder"

bad_index() { # bad_index PATTERN TEXT: refused, in one line that names the index
    mkdir -p "$tmp/bad" && printf '%s' "$2" >"$tmp/bad/an.index.json" && refuses_weights "an.index.json.*$1" "$tmp/bad/an.index.json"
}
while IFS='|' read -r pattern text; do
    try "an index: $text" bad_index "$pattern" "$text"
done <<'END'
outside of its folder|{"weight_map":{"wkv":"../shard"}}
outside of its folder|{"weight_map":{"wkv":"a/../../shard"}}
outside of its folder|{"weight_map":{"wkv":".."}}
outside of its folder|{"weight_map":{"wkv":"/shard"}}
outside of its folder|{"weight_map":{"wkv":"C:shard"}}
outside of its folder|{"weight_map":{"wkv":"..\\shard"}}
outside of its folder|{"weight_map":{"wkv":""}}
stands twice|{"weight_map":{"wkv":"a","wkv":"b"}}
stands twice|{"weight_map":{"wkv":"a"},"weight_map":{"ape":"a"}}
no tensors|{"metadata":{}}
no tensors|{"weight_map":{}}
byte 14: expected '{'|{"weight_map":["a"]}
byte 21: expected '"'|{"weight_map":{"wkv":7}}
byte 17: something follows|{"weight_map":{}}}
nested too deep|{"a":[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[
expected a value|{"a":nul,"weight_map":{"wkv":"a"}}
expected '}'|{"weight_map":{"wkv":"a"}
END
printf '{"weight_map":{"wkv":"shard-1","norm":"shard-1"}}' >"$model/wrong.json" || exit 1
try 'an index of tensors that are elsewhere' refuses_weights "shard-1.*no tensor 'wkv'" "$model/wrong.json"
rm "$model/wrong.json"
for name in shard-1 shard-2 shard-9 model.safetensors.index.json; do
    try "--output onto $name of the checkpoint" refuses_weights 'would be lost' "$model" --prefix layers.10.attn.compressor \
        --output "$model/$name"
done

# ---- config.json ------------------------------------------------------------------------------------------------

configured() { # configured CONFIG OPTIONS INSTEAD: OPTIONS beside a config.json give what OPTIONS INSTEAD give without
    printf '%s' "$1" >"$model/config.json"
    "$compress" --weights "$model" --prefix layers.2.attn.compressor --input $hca --output "$tmp/entries" $2 &&
        rm "$model/config.json" &&
        "$compress" --weights "$model" --prefix layers.2.attn.compressor --input $hca --output "$tmp/expected" $2 $3 &&
        cmp "$tmp/expected" "$tmp/entries"
}
while IFS='|' read -r config options instead; do
    try "config.json: $config" configured "$config" "$options" "$instead"
done <<'END'
{}|--rope-dim 16|--yarn-factor 1
{"rope_scaling":null,"rope_parameters":null,"rms_norm_eps":null}|--rope-dim 16|--yarn-factor 1
{"compress_rope_theta":20000,"rope_theta":10000}|--rope-dim 16|--rope-theta 20000 --yarn-factor 1
{"rms_norm_eps":1e-3,"qk_rope_head_dim":8}||--eps 1e-3 --rope-dim 8 --yarn-factor 1
{"head_dim":64,"partial_rotary_factor":0.125}||--rope-dim 8 --yarn-factor 1
{"rope_scaling":{"type":"yarn","factor":4,"original_max_position_embeddings":4096}}|--rope-dim 16|--yarn-factor 4 --yarn-orig-ctx 4096
{"rope_scaling":{"rope_type":"yarn","factor":4,"original_max_position_embeddings":64,"beta_fast":16,"beta_slow":2}}|--rope-dim 16|--yarn-factor 4 --yarn-orig-ctx 64 --yarn-beta-fast 16 --yarn-beta-slow 2
{"rope_parameters":{"rope_type":"yarn","factor":8,"original_max_position_embeddings":64,"rope_theta":5,"attention_factor":1.0}}|--rope-dim 16|--yarn-factor 8 --yarn-orig-ctx 64
{"rope_parameters":{"rope_type":"default","factor":null},"rope_scaling":{"type":"yarn","factor":4,"original_max_position_embeddings":64}}|--rope-dim 16|--yarn-factor 1
{"rope_head_dim":16,"norm_eps":1e-3,"rope_factor":8,"original_seq_len":64,"beta_fast":30,"beta_slow":2,"compress_rope_theta":9}||--rope-dim 16 --eps 1e-3 --yarn-factor 8 --yarn-orig-ctx 64 --yarn-beta-fast 30 --yarn-beta-slow 2 --rope-theta 9
{"rope_head_dim":16,"rope_factor":8,"original_seq_len":0}||--rope-dim 16 --yarn-factor 1
{"head_dim":32,"rope_parameters":{"compress":{"rope_type":"yarn","factor":8,"original_max_position_embeddings":64,"rope_theta":5000,"partial_rotary_factor":0.5},"main":{"rope_type":"default","rope_theta":7}}}||--rope-dim 16 --rope-theta 5000 --yarn-factor 8 --yarn-orig-ctx 64
{"rms_norm_eps":1,"text_config":{"rms_norm_eps":1e-3,"qk_rope_head_dim":8},"vision_config":{"rms_norm_eps":5}}||--eps 1e-3 --rope-dim 8 --yarn-factor 1
{"a":[{"rms_norm_eps":5},[],{}, -1.5e+3, true, false, "\u00e9\ud83d\ude00"],"rms_norm_eps":1e-3}|--rope-dim 16|--eps 1e-3 --yarn-factor 1
{"rms_norm_eps":1e-3,"compress_rope_theta":20000}|--rope-dim 16 --eps 1e-2 --rope-theta 30000|--yarn-factor 1
END
refuses_config() { # refuses_config PATTERN CONFIG
    printf '%s' "$2" >"$model/config.json" && refuses 1 "config.json.*$1" --weights "$model" --input $hca --prefix layers.2.attn.compressor
    result=$?
    rm "$model/config.json"
    return $result
}
while IFS='|' read -r pattern config; do
    try "config.json: $config" refuses_config "$pattern" "$config"
done <<'END'
rope_type 'llama3'|{"rope_scaling":{"rope_type":"llama3","factor":8}}
rope_type 'longrope'|{"rope_parameters":{"compress":{"type":"longrope"}}}
parts, but no `compress`|{"rope_parameters":{"main":{"rope_type":"default"},"compressed":{"rope_type":"yarn"}}}
factor without|{"rope_factor":8}
yarn without a factor|{"original_seq_len":64}
attention_factor 1.2|{"rope_scaling":{"type":"yarn","factor":4,"original_max_position_embeddings":64,"attention_factor":1.2}}
without a rope_type|{"rope_scaling":{"factor":4,"original_max_position_embeddings":64}}
yarn without a factor|{"rope_scaling":{"type":"yarn","original_max_position_embeddings":64}}
yarn without original_max|{"rope_scaling":{"type":"yarn","factor":4}}
compress_rope_theta 5.*7|{"compress_rope_theta":5,"rope_parameters":{"compress":{"rope_type":"default","rope_theta":7}}}
without a head_dim|{"partial_rotary_factor":0.125}
is not a whole number|{"partial_rotary_factor":0.3,"head_dim":64}
is not 16|{"partial_rotary_factor":0.125,"head_dim":64,"qk_rope_head_dim":16}
byte 16: expected a number|{"rms_norm_eps":"1e-6"}
this stands twice|{"rms_norm_eps":1,"rms_norm_eps":2}
this stands twice|{"text_config":{},"text_config":{}}
expected a number|{"rms_norm_eps":01}
expected a number|{"rms_norm_eps":1.}
eps: 0 is out of range|{"rms_norm_eps":0}
rope_theta: 1e999 is out of range|{"compress_rope_theta":1e999}
rope_dim: '1.5' is not a whole number|{"qk_rope_head_dim":1.5}
expected|{"rms_norm_eps":1e-6
something follows|{} {}
END
try '--output onto config.json' eval 'echo "{}" >"$model/config.json"; refuses_weights "would be lost" "$model" --prefix layers.2.attn.compressor --output "$model/config.json"'
rm -f "$model/config.json"

told_settings() { # told_settings PATTERN OPTIONS...: of weights whose metadata and config.json contradict each other
    pattern=$1
    shift
    "$compress" --weights "$tmp/told" --prefix p --input $hca --output "$tmp/entries" "$@" >"$tmp/told/report" || return 1
    cat "$tmp/told/report"
    grep -q -e "$pattern" "$tmp/told/report"
}
mkdir "$tmp/told" && "$tmp/tensors" "$tmp/told/model.safetensors" $(params_of $csa p) @rope_theta=20000 @eps=1e-3 &&
    echo '{"compress_rope_theta": 30000, "rms_norm_eps": 1e-2, "qk_rope_head_dim": 16}' >"$tmp/told/config.json" || exit 1
while IFS='|' read -r pattern options; do
    try "settings are told: $pattern" told_settings "$pattern" $options
done <<'END'
^settings, option: eps 0.0625$|--eps 0.0625
^settings, metadata: rope_theta 20000$|--eps 0.0625
^settings, metadata: eps 0.001, rope_theta 20000$|
^settings, config.json: rope_dim 16, yarn_factor 1$|
^settings, ape: ratio 4$|
^settings, standard: start 0, .*pad_gate -inf, sums pairs, rows plain$|
^settings, option: sums tiles$|--sums tiles
^settings, dtype of x: preset none$|
"ratio": {"value": 4, "from": "ape"}|--json
"rope_theta": {"value": 20000, "from": "metadata"}|--json
"rope_dim": {"value": 16, "from": "config.json"}|--json
"start": {"value": 8, "from": "option"}|--json --start 8
"pad_gate": {"value": "-inf", "from": "standard"}|--json
"preset": {"value": "deepseek", "from": "option"}|--json --preset deepseek
"sums": {"value": "pairs", "from": "standard"}|--json
"sums": {"value": "tiles", "from": "option"}|--json --sums tiles
END

# ---- --list and --all -------------------------------------------------------------------------------------------

lists_compressors() { # lists_compressors EXPECTED WEIGHTS OPTIONS...
    expected=$1 weights=$2
    shift 2
    "$compress" --weights "$weights" --list "$@" >"$tmp/list" || return 1
    cat "$tmp/list"
    printf '%s\n' "$expected" | cmp - "$tmp/list"
}
sizes='head_dim 32, hidden_dim 48, wkv F32, wgate F32, ape F32, norm F32; no preset'
try '--list, in the order of layers' lists_compressors "layers.2.attn.compressor: ratio 4, overlap 1, $sizes
layers.10.attn.compressor: ratio 128, overlap 0, $sizes" "$model"
try '--list below a prefix' lists_compressors "layers.10.attn.compressor: ratio 128, overlap 0, $sizes" "$model" --prefix layers.10
try "--list of transformers' names" lists_compressors "model.layers.2.self_attn.compressor: ratio 4, overlap 1, $sizes" "$tmp/single"
try '--list --json' lists_compressors '{"prefix": "layers.10.attn.compressor", "ratio": 128, "overlap": false, "head_dim": 32, "hidden_dim": 48, "dtypes": {"wkv": "F32", "wgate": "F32", "ape": "F32", "norm": "F32"}, "preset": null}' \
    "$model" --prefix layers.10 --json
try '--list without prefix, ape or gate' lists_compressors 'no prefix: ratio 1, overlap 0, head_dim 64, hidden_dim 80, wkv BF16, norm BF16; no preset' \
    tests/golden/v41_ratio1.safetensors
lists_what_is_there() {
    mv "$model/shard-1" "$tmp/away"
    lists_compressors "layers.2.attn.compressor: in $model/shard-1, which is not there
layers.10.attn.compressor: ratio 128, overlap 0, $sizes" "$model"
    result=$?
    mv "$tmp/away" "$model/shard-1"
    return $result
}
try '--list where a shard is not there' lists_what_is_there
try '--list of a file without compressors' refuses 1 'no compressor is there' --list --weights "$tmp/files/other-shape"
try '--list of nothing' refuses 2 --weights --list
published() { # published SHAPES PRESET: a file of those shapes, and of zeros
    header=$(echo "$1" | tr , '\n' | awk '{
        numbers = NF > 2 ? $2 * $3 : $2
        shape = NF > 2 ? $2 "," $3 : $2
        printf "%s\"%s\":{\"dtype\":\"BF16\",\"shape\":[%s],\"data_offsets\":[%d,%d]}", (NR > 1) ? "," : "{", $1, shape, at, at + 2 * numbers
        at += 2 * numbers
    }
    END { printf "} %d", at }')
    bytes=${header##* } header=${header% *}
    printf "\\$(printf %o $((${#header} % 256)))\\$(printf %o $((${#header} / 256)))\\0\\0\\0\\0\\0\\0%s" "$header" >"$tmp/published" &&
        dd if=/dev/zero of="$tmp/published" bs=1 count=1 seek=$((7 + ${#header} + bytes)) conv=notrunc 2>/dev/null &&
        "$compress" --weights "$tmp/published" --list >"$tmp/list" && cat "$tmp/list" && [ "$(sed 's/.*; //' "$tmp/list")" = "preset $2" ]
}
while IFS='|' read -r shapes preset; do
    try "--list knows $preset" published "$shapes" "$preset"
done <<'END'
wkv 1024 4096,wgate 1024 4096,ape 4 1024,norm 512|v4-flash-csa
wkv 512 4096,wgate 512 4096,ape 128 512,norm 512|v4-flash-hca
wkv 256 7168,wgate 256 7168,ape 4 256,norm 128|v4-pro-indexer
wkv 512 5120,wgate 512 5120,norm 512|v4.1-flash-ratio2
wkv 512 5120,norm 512|v4.1-flash-ratio1
END
rm -f "$tmp/published"

single_of_all() { # single_of_all PREFIX NAME...: those results of an --all's output, renamed as one compressor's are
    prefix=$1 items=
    shift
    for name in "$@"; do items="$items $tmp/entries:$prefix.$name=$name"; done
    "$tmp/tensors" "$tmp/got" $items
    items=
    for name in "$@"; do items="$items $tmp/expected:$name=$name"; done
    "$tmp/tensors" "$tmp/wanted" $items && cmp "$tmp/wanted" "$tmp/got"
}
compresses_all() {
    "$compress" --weights "$model" --all --input $hca --output "$tmp/entries" --stages $bare || return 1
    expect_entries $csa --stages && single_of_all layers.2.attn.compressor out kv gate pooled latent || return 1
    expect_entries $hca --stages && single_of_all layers.10.attn.compressor out kv gate pooled latent || return 1
    head -c 4000 "$tmp/entries" | LC_ALL=C grep -aq '"layers.10.attn.compressor.ratio":"128"'
}
grad=tests/golden/grad_csa.safetensors
differentiates_all() {
    "$tmp/tensors" "$tmp/own/grad" $(params_of $grad p) $grad:x=x $grad:dout=p.dout @rope_dim=8 @yarn_factor=1 &&
        "$compress" --weights "$tmp/own/grad" --input "$tmp/own/grad" --output "$tmp/entries" --all --backward dout &&
        "$compress" --weights "$grad" --input "$grad" --output "$tmp/expected" --backward dout --rope-dim 8 --yarn-factor 1 &&
        single_of_all p out dx dwkv dwgate dape dnorm
}
reports_all() {
    "$compress" --weights "$model" --all --input $hca --output "$tmp/entries" --json $bare >"$tmp/list" && cat "$tmp/list" &&
        [ "$(wc -l <"$tmp/list")" -eq 2 ] && head -1 "$tmp/list" | grep -q '^{"prefix": "layers.2.attn.compressor", .*"entries": 64,'
}
try '--all' compresses_all
try '--all, gradients' differentiates_all
try '--all, a report for each' reports_all
try '--all below a prefix that has none' refuses_weights "no compressor under prefix 'layers.7'; compressors there: 'layers.2" "$model" \
    --all --prefix layers.7
try '--all where a shard is not there' without_shard 1 --all
try '--all and --plot' refuses 2 '--plot.*--all' --weights "$model" --input $hca --all --plot "$tmp/place/plot.svg"
try '--all of other widths' refuses 1 "48.*hidden_dim of compressor layers.2" --weights "$model" --input $v41 --all $bare

# ---- What would be silently wrong -------------------------------------------------------------------------------

many_compressors() {
    items=
    for layer in 1 2 3 4 5 6 7; do items="$items $(params_of $csa "layers.$layer.attn.compressor")"; done
    "$tmp/tensors" "$tmp/own/many" $items &&
        refuses_weights "'layers.1.attn.compressor', .*'layers.5.attn.compressor' and 2 more" "$tmp/own/many" "$@"
}
try 'a prefix that has none names five' many_compressors --prefix layers.9
try 'no prefix where there is one names five' many_compressors
try "the attention around a compressor names it" refuses_weights "both 'layers.2.attn.wkv.weight' and 'layers.2.attn.kv_norm" "$model" \
    --prefix layers.2.attn
refuses_made() { # refuses_made PATTERN OPTIONS -- ITEMS...: a file of those tensors
    pattern=$1 options=$2
    shift 3
    "$tmp/tensors" "$tmp/own/made" "$@" && refuses_weights "$pattern" "$tmp/own/made" $options
}
params=$(params_of $csa p)
try 'both namespaces' refuses_made "both 'p.wkv.weight' and 'p.kv_proj.weight'" '--prefix p' -- $params $csa:wkv=p.kv_proj.weight
try 'one parameter in two spellings' refuses_made "both 'p.wkv' and 'p.wkv.weight'" '--prefix p' -- $params $csa:wkv=p.wkv
try 'an ape that is lost' refuses_made "no-ape" '--prefix p --ratio 4' -- $csa:wkv=p.wkv $csa:wgate=p.wgate $csa:norm=p.norm
try 'an ape that is not wanted' refuses_made "no-ape, but 'p.ape' is there" '--prefix p --no-ape' -- $params
try 'neither ape nor ratio' refuses_made '--ratio' '--no-ape' -- $csa:wkv=wkv $csa:wgate=wgate $csa:norm=norm
try 'neither ape nor eps' refuses_made '--eps .*1e-20' '--no-ape --ratio 4' -- $csa:wkv=wkv $csa:wgate=wgate $csa:norm=norm
try 'FP8 weights' refuses_made "'p.wkv.weight' is F8_E4M3.*BF16" '--prefix p' -- $csa:wkv=p.wkv.weight,F8_E4M3 $csa:wgate=p.wgate.weight \
    $csa:ape=p.ape $csa:norm=p.norm.weight
for scale in wkv.scale wkv.weight_scale wkv.weight_scale_inv; do
    try "weights with scales beside them: $scale" refuses_made "'p.wkv.weight' is quantised.*'p.$scale'" '--prefix p' -- $params \
        "$csa:norm=p.$scale"
done
try 'weights with a bias' refuses_made "'p.wgate.bias' has no place" '--prefix p' -- $params "$csa:norm=p.wgate.bias"
not_told() { # what was to be told does not arrive
    "$compress" "$@" >/dev/full 2>"$tmp/stderr"
    status=$?
    cat "$tmp/stderr"
    [ $status -eq 1 ] && grep -q 'standard output' "$tmp/stderr"
}
if [ -c /dev/full ]; then
    try 'a report that does not arrive' not_told --weights $csa --input $csa --output "$tmp/entries"
    try 'a version that does not arrive' not_told --version
fi
needs_no_ape_said() { # DeepSeek-V4.1, from a file that says nothing
    "$tmp/tensors" "$tmp/own/v41" $v41:wkv=wkv $v41:wgate=wgate $v41:norm=norm &&
        "$compress" --weights $v41 --input $v41 --output "$tmp/expected" &&
        "$compress" --weights "$tmp/own/v41" --input $v41 --output "$tmp/entries" --ratio 2 --no-ape --eps 1e-20 --rope-dim 32 &&
        cmp "$tmp/expected" "$tmp/entries"
}
try 'no ape, as --no-ape says' needs_no_ape_said
reads_f16() { # as the same numbers in F32
    for type in F16 CUT; do
        "$tmp/tensors" "$tmp/own/$type" $csa:wkv=wkv,$type $csa:wgate=wgate,$type $csa:ape=ape,$type $csa:norm=norm,$type $hca:x=x,$type &&
            "$compress" --weights "$tmp/own/$type" --input "$tmp/own/$type" --output "$tmp/own/$type.out" $bare || return 1
    done
    cmp "$tmp/own/F16.out" "$tmp/own/CUT.out" && ! cmp -s "$tmp/own/F16" "$tmp/own/CUT"
}
try 'F16 weights and hidden states' reads_f16

# ---- Rows -------------------------------------------------------------------------------------------------------

rows_of() { # rows_of NAME FILE OPTIONS...: compresses a golden file to $tmp/NAME
    name=$1 file=$2
    shift 2
    "$compress" --weights "$file" --input "$file" --output "$tmp/$name" "$@"
}
fp8=tests/golden/rows_fp8.safetensors
same_entries() { # same_entries NAME NAME: one tensor `out`, whatever the metadata
    for name in "$1" "$2"; do "$tmp/tensors" "$tmp/$name.out" "$tmp/$name:out=out" || return 1; done
    cmp "$tmp/$1.out" "$tmp/$2.out"
}
metadata_gives_rows() { rows_of by-file $fp8 && rows_of by-option $fp8 --rows fp8 && same_entries by-file by-option; }
option_wins() { rows_of plain $fp8 --rows plain && rows_of by-file $fp8 && ! same_entries plain by-file; }
told_rows() { rows_of told-rows $fp8 --json | grep -q '"rows": {"value": "fp8", "from": "metadata"}'; }
packed_size() { # 8 entries of 192 channels: 128 codes, 64 halves, 2 scales each
    rows_of packed $fp8 --packed --json | grep -q '"bytes_after": 2064,' &&
        LC_ALL=C grep -aq '"rows":{"dtype":"U8","shape":\[1,8,256\]' "$tmp/packed" &&
        LC_ALL=C grep -aq '"scales":{"dtype":"U8","shape":\[1,8,2\]' "$tmp/packed"
}
try 'the file says how its rows are kept' metadata_gives_rows
try '--rows wins over the file' option_wins
try 'the report tells the rows' told_rows
try '--packed writes codes and scales' packed_size
refuses_rows() { pattern=$1 file=$2 && shift 2 && refuses 1 "$pattern" --weights $file --input $file "$@"; }
try 'a format of rows that there is not' refuses_rows "--rows: 'fp16' is none of plain, fp8" $good --rows fp16
try '--packed of plain rows' refuses_rows '--packed: plain rows are not packed' $good --packed
try 'FP4 rows of a head_dim that is no power of two' refuses_rows 'rows are FP4, but head_dim 192' $fp8 --rows fp4
"$tmp/tensors" "$tmp/bad-rows" $(params_of $fp8 p) $fp8:x=x @rows=fp9 @ratio=4
try 'metadata of rows that there are not' refuses_rows "metadata 'rows': 'fp9'" "$tmp/bad-rows" --prefix p

# ---- The order of sums, by a file's metadata ---------------------------------------------------------------------
in_order() { "$tmp/tensors" "$tmp/sums-$1" $(params_of $fp8 p) $fp8:x=x @sums=$1 @ratio=4; }
told_sums() { # told_sums FILE VALUE FROM OPTIONS...
    file=$tmp/sums-$1 value=$2 from=$3 && shift 3
    "$compress" --weights "$file" --input "$file" --prefix p --output "$tmp/told-sums" --json "$@" |
        grep -q "\"sums\": {\"value\": \"$value\", \"from\": \"$from\"}"
}
for order in tiles pairs triples; do in_order $order; done
try 'the file says in which order it adds' told_sums tiles tiles metadata
try '--sums wins over the file' told_sums tiles pairs option --sums pairs
try 'an order that there is not' refuses_rows "metadata 'sums': no order of sums 'triples'" "$tmp/sums-triples" --prefix p
finish
