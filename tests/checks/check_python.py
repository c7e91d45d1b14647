#!/usr/bin/env python3
"""examples/dsv4.py beside build/tests/compress, and what it promises itself; see python.sh.

    python3 check_python.py COMPRESS FOLDER    FOLDER holds copies of dsv4.py and the header

The last line is `N passed, N failed`."""

import glob
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import unittest

import numpy as np

COMPRESS, FOLDER = os.path.abspath(sys.argv[1]), os.path.abspath(sys.argv[2])
sys.path.insert(0, FOLDER)
import dsv4  # noqa: E402

TYPES = {"F32": np.dtype("<f4"), "BF16": np.dtype("<u2"), "U8": np.dtype("u1")}


def threads_now():
    return len(os.listdir("/proc/self/task"))


THREADS = threads_now() if os.path.isdir("/proc/self/task") else 0  # NumPy's and the main one


def tensors_of(path):
    """A safetensors file: arrays by name, and the metadata."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        numbers = file.read()
    metadata = header.pop("__metadata__", {})
    return {name: np.frombuffer(numbers[slice(*entry["data_offsets"])], TYPES[entry["dtype"]]).reshape(entry["shape"])
            for name, entry in header.items()}, metadata


def compressor_of(tensors, metadata, **more):
    """Of a golden file, with its settings."""
    return dsv4.Compressor(
        **{name: tensors.get(name) for name in ("wkv", "wgate", "ape", "norm")}, ratio=int(metadata["ratio"]),
        rope_dim=int(metadata["rope_dim"]), eps=float(metadata["eps"]), rope_theta=float(metadata["rope_theta"]),
        yarn_factor=float(metadata["yarn_factor"]), yarn_orig_ctx=float(metadata["yarn_orig_ctx"]) or 65536,
        rounding=metadata["preset"], rows=metadata.get("rows", "plain"), **more)


def compressed(path, *options):
    """What the command line makes of a golden file."""
    with tempfile.TemporaryDirectory() as folder:
        output = os.path.join(folder, "output")
        subprocess.run([COMPRESS, "--weights", path, "--input", path, "--output", output, *options], check=True,
                       stdout=subprocess.DEVNULL)
        return tensors_of(output)[0]


def drawn(ratio=4, coff=2, head_dim=32, hidden_dim=48, seed=0):
    """Parameters, and a function for arrays of normal numbers."""
    random = np.random.default_rng(seed)

    def normal(*shape):
        return random.standard_normal(shape, np.float32)

    columns = coff * head_dim
    return dict(wkv=normal(columns, hidden_dim) / 7, wgate=normal(columns, hidden_dim) / 7, ape=normal(ratio, columns),
                norm=1 + normal(head_dim) / 4, rope_dim=head_dim // 2), normal


class Python(unittest.TestCase):
    def same(self, got, want, text=None):
        self.assertEqual((got.dtype, got.shape), (want.dtype, want.shape), text)
        self.assertEqual(got.tobytes(), want.tobytes(), text)

    def test_gives_the_bits_of_the_command_line(self):
        paths = sorted(glob.glob("tests/golden/*.safetensors"))
        self.assertGreater(len(paths), 20)
        for path in paths:
            tensors, metadata = tensors_of(path)
            got = compressor_of(tensors, metadata)(tensors["x"], int(metadata["start"]), stages=True)
            for name, want in compressed(path, "--stages").items():
                self.same(getattr(got, name), want, f"{path}: {name}")

    def test_gives_the_gradients_of_the_command_line(self):
        paths = sorted(glob.glob("tests/golden/grad_*.safetensors"))
        self.assertEqual(len(paths), 2)
        for path in paths:
            tensors, metadata = tensors_of(path)
            c = compressor_of(tensors, metadata, training=True)
            got = c.backward(tensors["x"], tensors["dout"], int(metadata["start"]))
            want = compressed(path, "--backward", "dout")
            for name in got._fields:
                self.same(getattr(got, name), want[name], f"{path}: {name}")

    def test_weights_are_those_that_pooled_draws_on(self):
        for coff, ratio in ((2, 4), (1, 8)):
            given, normal = drawn(ratio, coff)
            r = dsv4.Compressor(rounding="none", **given)(normal(2, 5 * ratio, 48), stages=True)
            self.assertEqual(r.weights.shape, (2, 5, coff * ratio, 32))
            kv = r.kv.reshape(2, 5, ratio, coff, 32)
            rows = kv[:, :, :, -1]
            if coff == 2:
                before = np.concatenate([np.zeros_like(kv[:, :1, :, 0]), kv[:, :-1, :, 0]], 1)
                rows = np.concatenate([before, rows], 2)
            self.assertLess(np.abs((r.weights * rows).sum(2) - r.pooled).max(), 1e-5)

    def test_x_may_be_one_sequence_or_a_batch_bf16_or_strided(self):
        given, normal = drawn()
        c, x = dsv4.Compressor(training=True, **given), normal(3, 8, 48)
        out, dout = c(x).out, normal(3, 2, 32)
        dx = c.backward(x, dout).dx
        for row in range(3):
            self.same(c(x[row]).out, out[row])
            self.same(c.backward(x[row], dout[row]).dx, dx[row])
        wide = np.repeat(x, 2, 2)
        self.same(c(wide[..., ::2]).out, out)
        self.same(c(np.flip(np.flip(x, 1).copy(), 1)).out, out)
        narrow = (x.view(np.uint32) >> 16).astype(np.uint16)
        self.assertEqual(c(narrow).out.dtype, np.uint16)
        self.assertEqual(c.backward(narrow, dout).dx.dtype, np.uint16)
        self.assertEqual(c(x[:0]).out.shape, (0, 2, 32))
        self.assertEqual(c(x[:, :0]).out.shape, (3, 0, 32))

    def test_a_tail_is_dropped_where_that_is_asked_for(self):
        given, normal = drawn()
        c, x = dsv4.Compressor(training=True, **given), normal(2, 11, 48)
        r, dout = c(x, stages=True, drop_tail=True), normal(2, 2, 32)
        self.same(r.out, c(x[:, :8]).out)
        self.assertFalse(r.kv[:, 8:].any())
        self.same(c.backward(x, dout, drop_tail=True).dx[:, :8], c.backward(x[:, :8], dout).dx)

    def test_a_stream_cut_anywhere_gives_the_bits_of_the_one_call(self):
        given, normal = drawn()
        for rounding in ("deepseek", "maxtext"):
            c, x = dsv4.Compressor(rounding=rounding, **given), normal(24, 48)
            want = c(x, start=1000).out
            for cut in range(25):
                s = c.stream(start=1000)
                pieces = [s(x[:cut]).out, s(x[cut:]).out]
                self.same(np.concatenate(pieces), want, f"cut at {cut}")
                self.assertEqual(s.position, 1024)

    def test_a_stream_takes_tokens_back(self):
        given, normal = drawn()
        c, x = dsv4.Compressor(**given), normal(24, 48)
        want = c(x).out
        for back in range(9):
            s = c.stream(depth=8)
            s(x[:18 - back])
            s(normal(back, 48))
            s.roll_back(back)
            self.assertEqual(s.position, 18 - back)
            self.same(s(x[18 - back:]).out, want[(18 - back) // 4:])

    def test_a_stream_saved_restored_or_copied_goes_on_as_the_old_one(self):
        given, normal = drawn()
        c, x = dsv4.Compressor(**given), normal(24, 48)
        s = c.stream(depth=2)
        s(x[:10])
        restored, copied = dsv4.Compressor(**given).stream(), s.copy()
        restored.restore(s.save())
        s(x[10:])
        for other in (restored, copied):
            self.assertEqual(other.position, 10)
            self.same(other(x[10:]).out, c(x).out[2:])
        copied.roll_back(2)

    def test_a_restored_stream_knows_where_it_began(self):
        given, normal = drawn()
        c, x = dsv4.Compressor(**given), normal(8, 48)
        s, restored, never_run = c.stream(depth=4, start=100), c.stream(depth=4), c.stream(start=7)
        s(x[:4])
        restored.restore(s.save())
        restored.roll_back(4)
        self.assertEqual(restored.position, 100)
        self.same(restored(x).out, c(x, start=100).out)
        never_run.restore(c.stream().save())
        self.assertEqual(never_run.position, 7)

    def test_stages_of_a_stream_need_its_rows(self):
        given, normal = drawn()
        c, x = dsv4.Compressor(**given), normal(8, 48)
        deep, want = c.stream(depth=8), c(x, stages=True)
        deep(x[:3])
        self.same(deep(x[3:], stages=True).weights, want.weights)
        shallow = c.stream()
        shallow(x[:3])
        with self.assertRaisesRegex(ValueError, "depth"):
            shallow(x[3:], stages=True)
        self.same(shallow(x[3:]).out, want.out)

    def test_sums_and_rows_are_the_headers(self):
        library, count = dsv4._library(), len(dsv4.ROWS)
        library.dsv4_rows_name.restype = dsv4.ctypes.c_char_p
        self.assertEqual([library.dsv4_rows_name(i).decode() for i in range(count)], list(dsv4.ROWS))
        self.assertIsNone(library.dsv4_rows_name(count))
        given, normal = drawn(hidden_dim=300)
        x = (normal(64, 300).view(np.uint32) >> 16).astype(np.uint16)
        for name in ("wkv", "wgate"):
            given[name] = (given[name].view(np.uint32) >> 16).astype(np.uint16)
        pairs, tiles, fp8 = (dsv4.Compressor(rounding="none", **given, **more)(x, stages=True)
                             for more in ({}, {"sums": "tiles"}, {"rows": "fp8"}))
        self.assertLess(np.abs(tiles.kv - pairs.kv).max(), 1e-4)
        self.assertFalse(np.array_equal(tiles.kv, pairs.kv))
        self.same(fp8.kv, pairs.kv)
        self.assertFalse(np.array_equal(fp8.out, pairs.out))

    def test_threads_change_no_bit(self):
        given, normal = drawn(hidden_dim=256)
        x, dout = normal(2, 128, 256), normal(2, 32, 32)
        one, two = (dsv4.Compressor(training=True, threads=threads, **given) for threads in (1, 2))
        self.same(two(x).out, one(x).out)
        for got, want in zip(two.backward(x, dout), one.backward(x, dout)):
            self.same(got, want)

    def test_one_compressor_serves_several_python_threads(self):
        given, normal = drawn()
        c, xs = dsv4.Compressor(**given), [normal(256, 48) for _ in range(4)]
        want, wrong = [c(x).out for x in xs], []

        def work(i):
            for _ in range(10):
                if not np.array_equal(c(xs[i]).out, want[i]):
                    wrong.append(i)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(wrong, [])

    def watch(self, look, **settings):
        """What look() sees, millisecond by millisecond, while another thread is in a call of 50 or more of them."""
        given, normal = drawn(hidden_dim=512, head_dim=128)
        c, x, begun, seen, seconds = dsv4.Compressor(**given, **settings), normal(16, 512), threading.Event(), [], 0
        while seconds < 0.05:
            x, began = np.concatenate([x, x]), time.perf_counter()
            c(x)
            seconds = time.perf_counter() - began
        thread = threading.Thread(target=lambda: (begun.set(), c(x)))
        thread.start()
        begun.wait()
        while thread.is_alive():
            thread.join(0.001)
            seen.append(look())
        return seen

    def test_a_call_does_not_hold_the_interpreters_lock(self):
        self.assertGreater(len(self.watch(lambda: None)), 5)

    @unittest.skipUnless(os.path.isdir("/proc/self/task"), "needs Linux")
    def test_a_call_works_on_as_many_threads_as_asked_for(self):
        while threads_now() > THREADS:  # those of the test before take a moment to go
            time.sleep(0.001)
        self.assertEqual(max(self.watch(threads_now, threads=1)), THREADS + 1)
        self.assertGreaterEqual(max(self.watch(threads_now, threads=3)), THREADS + 3)

    def test_objects_free_themselves(self):
        given, normal = drawn(hidden_dim=2048, head_dim=128)

        def use():
            c = dsv4.Compressor(**given)
            c.stream(depth=256).copy()(normal(4, 2048))

        use()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(40):
            use()
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        self.assertLess(grown, 80000 if sys.platform != "darwin" else 80000 * 1024)  # each has 4 MB of weights

    def test_bad_calls_are_value_errors_that_say_why(self):
        given, normal = drawn()
        c, x = dsv4.Compressor(**given), normal(8, 48)

        def make(**changes):
            return lambda: dsv4.Compressor(**{**given, **changes})

        for call, text in (
                (make(norm=None), "norm is NoneType"),
                (make(norm=given["norm"][:-1]), r"wkv is \[64, 48\]: norm's 31"),
                (make(wkv=given["wkv"].astype(np.float64)), "wkv is float64"),
                (make(wkv=given["wkv"].astype(">f4")), "wkv is >f4"),
                (make(wkv=given["wkv"].tolist()), "wkv is list"),
                (make(wgate=given["wgate"][:, 1:]), r"wgate is \[64, 47\], not \[64, 48\]"),
                (make(wgate=None), "no_gate"),
                (make(ape=given["ape"].T), r"ape is \[64, 4\], not \[ratio, 64\]"),
                (make(ratio=np.int64(8)), r"ape is \[4, 64\], not \[8, 64\]"),
                (make(ape=None), "without an ape"),
                (make(ape=None, ratio=4), "1e-20"),
                (make(ape=None, ratio=0, eps=1e-6), "ratio"),
                (make(rope_dim=7), "rope_dim"),
                (make(rope_dim=34), "rope_dim"),
                (make(eps=0), "eps 0 is not above 0"),
                (make(eps=1e-60), "eps 1e-60 is not above 0"),
                (make(eps=-1.0), "eps -1.0"),
                (make(rope_theta=0.5), "rope_theta"),
                (make(yarn_factor=0), "yarn_factor 0"),
                (make(rounding="deepsek"), "deepsek.*transformers"),
                (make(sums="triples"), "sums 'triples' is none of pairs, tiles"),
                (make(rows="round"), "rows 'round' is none of plain, fp8"),
                (lambda: c(x[0]), r"x is \[48\], not \[S, 48\]"),
                (lambda: c(x[:, 1:]), r"x is \[8, 47\]"),
                (lambda: c(x[None, None]), r"x is \[1, 1, 8, 48\]"),
                (lambda: c(x.astype(np.float16)), "x is float16"),
                (lambda: c(x[:7]), "7.*4"),
                (lambda: c(x, start=-1), "position"),
                (lambda: c(x, start=1 << 62), "position"),
                (lambda: c(x, start=1 << 70), "start .* out of range"),
                (lambda: c.backward(x, normal(2, 32)), "training"),
                (lambda: c.backward(x, normal(3, 32)), r"dout is \[3, 32\], not \[2, 32\]"),
                (lambda: c.stream(-1), "depth"),
                (lambda: c.stream()(x[None]), r"x is \[1, 8, 48\], not \[S, 48\]"),
                (lambda: c.stream().roll_back(1), "1"),
                (lambda: c.stream().roll_back((1 << 64) + 1), "out of range"),
                (lambda: c.stream().restore(b"no state"), "state"),
                (lambda: c.stream().restore(c.stream().save()[:-1]), "bytes")):
            with self.assertRaisesRegex(ValueError, text):
                call()

    def test_a_refused_piece_leaves_the_stream_as_it_was(self):
        given, normal = drawn()
        c, x = dsv4.Compressor(**given), normal(8, 48)
        s = c.stream()
        s(x[:3])
        for bad in (x[3:, 1:], x[3:].astype(np.float64)):
            with self.assertRaises(ValueError):
                s(bad)
        self.same(s(x[3:]).out, c(x).out)

    def test_the_use_that_readme_shows_runs(self):
        with open("README.md") as file:
            use = file.read().split("```python\n")[1].split("```")[0]
        given, normal = drawn(head_dim=64)
        del given["rope_dim"]
        names = dict(given, x=normal(2, 8, 48), dout=normal(2, 2, 64))
        try:
            exec(use, names)
        except ImportError as error:
            self.assertEqual(error.name, "torch")
        self.assertEqual(names["r"].out.shape, names["dout"].shape)
        self.assertEqual(names["g"].dwkv.shape, given["wkv"].shape)
        self.assertEqual(names["s"].position, 0)

    def test_runs_as_a_program(self):
        done = subprocess.run([sys.executable, os.path.join(FOLDER, "dsv4.py")], capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertIn("the same bits: True", done.stdout)
        self.assertLessEqual(done.stdout.count("\n"), 12)


class Cache(unittest.TestCase):
    """The compiler here notes each call and copies what is compiled already."""

    def setUp(self):
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder)
        for name in ("dsv4.py", "dsv4_compressor.h"):
            shutil.copy(os.path.join(FOLDER, name), self.folder)
        self.compiler, self.calls = self.path("compiler"), self.path("calls")
        with open(self.compiler, "w") as file:
            file.write(f'#!/bin/sh\necho call >>"{self.calls}"\nwhile [ "$1" != -o ]; do shift; done\n'
                       f'cp "{dsv4._library()._name}" "$2"\n')
        os.chmod(self.compiler, 0o755)

    def path(self, *names):
        return os.path.join(self.folder, *names)

    def load(self, **environment):
        """Where a process of its own finds the library, and how often the compiler was called until now."""
        environment = {"CC": self.compiler, "XDG_CACHE_HOME": self.path("cache"), **environment}
        done = subprocess.run([sys.executable, "-B", "-c", "import dsv4; print(dsv4._library()._name)"],
                              cwd=self.folder, env={**os.environ, **environment}, capture_output=True, text=True)
        if done.returncode:
            self.fail(done.stderr)
        with open(self.calls) as file:
            return os.path.dirname(done.stdout.strip()), file.read().count("call")

    def test_the_header_is_compiled_once_and_again_when_it_changes(self):
        beside = self.path("__pycache__")
        self.assertEqual(self.load(), (beside, 1))
        self.assertEqual(self.load(), (beside, 1))
        with open(self.path("dsv4_compressor.h"), "a") as file:
            file.write("/* edited */\n")
        self.assertEqual(self.load(), (beside, 2))
        self.assertEqual(self.load(CFLAGS="-O1"), (beside, 3))
        self.assertEqual(self.load(), (beside, 3))
        self.assertEqual([name for name in os.listdir(beside) if not name.startswith("dsv4-")], [])

    def test_where_it_may_not_write_the_library_goes_to_the_users_cache_or_a_folder_that_goes(self):
        open(self.path("__pycache__"), "w").close()
        self.assertEqual(self.load(), (self.path("cache", "dsv4"), 1))
        self.assertEqual(self.load(), (self.path("cache", "dsv4"), 1))
        place, calls = self.load(XDG_CACHE_HOME=self.path("__pycache__"))
        self.assertEqual((os.path.exists(place), calls), (False, 2))

    def test_the_header_is_found_one_folder_up_or_where_it_is_said_to_be(self):
        os.mkdir(self.path("examples"))
        os.rename(self.path("dsv4.py"), self.path("examples", "dsv4.py"))
        self.assertEqual(self.load(PYTHONPATH=self.path("examples"))[1], 1)
        os.rename(self.path("dsv4_compressor.h"), self.path("other.h"))
        with self.assertRaisesRegex(AssertionError, "DSV4_HEADER may say"):
            self.load(PYTHONPATH=self.path("examples"))
        self.assertEqual(self.load(PYTHONPATH=self.path("examples"), DSV4_HEADER=self.path("other.h"))[1], 1)

    def test_a_compiler_that_is_missing_or_fails_is_named(self):
        for compiler, text in (("no-such-compiler", "no C compiler 'no-such-comp"), ("false", "false -O3.* failed")):
            with self.assertRaisesRegex(AssertionError, text):
                self.load(CC=compiler)
        self.assertEqual(os.listdir(self.path("__pycache__")), [])


if __name__ == "__main__":
    result = unittest.main(argv=sys.argv[:1] + sys.argv[3:], exit=False).result
    failed = len(result.failures) + len(result.errors)
    print(f"{result.testsRun - failed} passed, {failed} failed")
    sys.exit(failed > 0)
