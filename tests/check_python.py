"""examples/dsv4.py beside build/compress, and what it promises: check_python.py COMPRESS. The last line counts."""

import glob
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading

import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "examples"))
import dsv4  # noqa: E402

COMPRESS = sys.argv[1]
GOLDEN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "golden")


def read(path):
    """The tensors of a safetensors file, bf16 as uint16, and its metadata."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        data = file.read()
    metadata = header.pop("__metadata__", {})
    types = {"F32": np.float32, "BF16": np.uint16, "U8": np.uint8}
    return {
        name: np.frombuffer(data[slice(*t["data_offsets"])], types[t["dtype"]]).reshape(t["shape"])
        for name, t in header.items()
    }, metadata


def compressor(tensors, metadata, **more):
    """As build/compress makes it of a golden file."""
    return dsv4.Compressor(
        tensors["wkv"], tensors.get("wgate"), tensors.get("ape"), tensors["norm"],
        ratio=int(metadata["ratio"]), rope_dim=int(metadata["rope_dim"]), eps=float(metadata["eps"]),
        rope_theta=float(metadata["rope_theta"]), yarn_factor=float(metadata["yarn_factor"]),
        yarn_orig_ctx=float(metadata["yarn_orig_ctx"]), rounding=metadata["preset"],
        rows=metadata.get("rows", "plain"), **more,
    )  # fmt: skip


def small(**more):
    rng = np.random.default_rng(3)
    settings = dict(rope_dim=8, rounding="none", training=True)
    settings.update(more)
    arrays = [rng.standard_normal(shape, np.float32) for shape in ((48, 40), (48, 40), (4, 48), (24,), (64, 40))]
    return dsv4.Compressor(*arrays[:4], **settings), arrays[4], arrays[:4]


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def refused(text, call):
    """Whether `call` raises ValueError with a message that begins so."""
    try:
        call()
    except ValueError as error:
        assert str(error).startswith(text), f"'{error}' does not begin with '{text}'"
        return
    raise AssertionError(f"nothing was refused: {text}")


def test_every_golden_file_gives_the_bytes_of_the_command_line():
    for path in sorted(glob.glob(os.path.join(GOLDEN, "*.safetensors"))):
        tensors, metadata = read(path)
        with tempfile.TemporaryDirectory() as folder:
            out = os.path.join(folder, "out")
            backward = ["--backward", "dout"] if "dout" in tensors else []
            subprocess.run([COMPRESS, "--weights", path, "--input", path, "--output", out, "--stages", *backward],
                           check=True, capture_output=True)  # fmt: skip
            expected, _ = read(out)
        c = compressor(tensors, metadata, training=bool(backward), threads=2)
        got = vars(c(tensors["x"], start=int(metadata["start"]), stages=True))
        if backward:
            got.update(vars(c.backward(tensors["x"], tensors["dout"], start=int(metadata["start"]))))
        for name, value in expected.items():
            assert same(value, got[name]), f"{path}: {name}"


def test_a_stream_gives_the_one_calls_bits_however_it_is_cut():
    c, x, _ = small()
    whole = c(x, start=7).out
    s = c.stream(start=7)
    parts = [s(x[i : i + 5]).out for i in range(0, 64, 5)]
    assert same(np.concatenate(parts), whole)
    assert s.position == 71


def test_tokens_can_be_taken_back():
    c, x, _ = small()
    s = c.stream(depth=6)
    s(x[:30])
    s(x[:6])
    s.roll_back(6)
    assert s.position == 30
    assert same(s(x[30:]).out, c(x).out[7:])
    refused("", lambda: s.roll_back(7))


def test_streams_are_copied_saved_and_restored():
    c, x, _ = small()
    s = c.stream()
    s(x[:30])
    other, third = s.copy(), c.stream()
    third.restore(s.save())
    expected = s(x[30:]).out
    assert same(other(x[30:]).out, expected)
    assert same(third(x[30:]).out, expected)
    refused("", lambda: third.restore(b"no state"))


def test_batches_are_sequences_side_by_side():
    c, x, _ = small()
    r = c(x.reshape(2, 32, 40), stages=True)
    assert r.out.shape == (2, 8, 24) and r.weights.shape == (2, 8, 8, 24) and r.kv.shape == (2, 32, 48)
    assert same(r.out[1], c(x[32:]).out)


def test_rows_that_are_not_contiguous_are_taken_as_they_read():
    c, x, _ = small()
    assert same(c(np.asfortranarray(x)).out, c(x).out)
    assert same(c(x[::2]).out, c(x[::2].copy()).out)


def test_tails_are_refused_or_dropped():
    c, x, _ = small()
    refused("segment 0: 63 tokens, which the ratio 4 does not divide", lambda: c(x[:63]))
    assert same(c(x[:63], drop_tail=True).out, c(x[:60]).out)


def test_what_does_not_fit_is_refused():
    c, x, (wkv, wgate, ape, norm) = small()
    refused("x is (64, 39)", lambda: c(x[:, :39]))
    refused("x is float64", lambda: c(x.astype(np.float64)))
    refused("x is list", lambda: c([[0.0]]))
    refused("dout is (3, 24), not (16, 24)", lambda: c.backward(x, np.zeros((3, 24), np.float32)))
    refused("wgate is (47, 40)", lambda: dsv4.Compressor(wkv, wgate[:47], ape, norm))
    refused("ape is (4, 47)", lambda: dsv4.Compressor(wkv, wgate, ape[:, :47], norm))
    refused("wkv is (48, 40) beside norm (23,)", lambda: dsv4.Compressor(wkv, wgate, ape, norm[:23]))
    refused("wkv and norm are required", lambda: dsv4.Compressor(wkv, wgate, ape, None))
    refused("ape has 4 rows, but ratio is 8", lambda: dsv4.Compressor(wkv, wgate, ape, norm, ratio=8, rope_dim=8))
    refused("without an ape", lambda: dsv4.Compressor(wkv, wgate, None, norm, ratio=2))
    refused("rope_dim is 64", lambda: dsv4.Compressor(wkv, wgate, ape, norm))
    refused("rows 'fp9'", lambda: small(rows="fp9"))
    refused("rows are FP4", lambda: small(rows="fp4"))
    refused("sums 'squares'", lambda: small(sums="squares"))
    refused("threads is 0", lambda: small(threads=0))
    refused("", lambda: small(rounding="deepsea"))
    refused("the compressor was made without", lambda: small(training=False)[0].backward(x, c(x).out))
    refused("x is a batch", lambda: c.stream()(x[None]))


def test_one_compressor_serves_many_python_threads():
    c, x, _ = small(threads=2)
    expected, wrong = c(x).out, []

    def work():
        for _ in range(20):
            wrong.extend([] if same(c(x).out, expected) else [1])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_two_files_suffice_and_a_changed_header_is_compiled_anew():
    here = os.path.dirname(os.path.abspath(dsv4.__file__))
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(os.path.join(here, "dsv4.py"), folder)
        header = os.path.join(folder, "dsv4_compressor.h")
        shutil.copy(os.path.join(here, "..", "dsv4_compressor.h"), header)
        command = [sys.executable, os.path.join(folder, "dsv4.py")]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert "the same bits" in lines and "the same entry" in lines, lines
        cache = os.path.join(folder, "__pycache__")
        built = [name for name in os.listdir(cache) if name.endswith(".so")]
        with open(header, "a") as file:
            file.write("/* changed */\n")
        subprocess.run(command, check=True, capture_output=True)
        assert len(built) == 1 and len([name for name in os.listdir(cache) if name.endswith(".so")]) == 2


def main():
    passed = failed = 0
    for name, test in list(globals().items()):
        if not name.startswith("test_"):
            continue
        try:
            test()
            passed += 1
        except Exception as error:  # noqa: BLE001: every failure is counted
            print(f"FAILED: {name}: {type(error).__name__}: {error}")
            failed += 1
    print(f"{passed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
