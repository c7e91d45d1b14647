#!/usr/bin/env python3
"""dsv4_compressor.h from Python. Copy this file and the header; it takes NumPy and a C compiler.

    import dsv4
    c = dsv4.Compressor(wkv=wkv, wgate=wgate, ape=ape, norm=norm)    # as they stand in a checkpoint
    out = c(x).out                                                   # x [B, S, H] or [S, H]; out [B, N, D] or [N, D]

Arrays are NumPy's, float32 or uint16 holding bf16, or torch tensors, float32 or bfloat16; results are of x's kind. H is
hidden_dim, D head_dim, m the ratio, N = S // m entries; coff is 2 where windows overlap (CSA) and 1 where not (HCA).
What the library refuses is a ValueError with its message. No call holds the interpreter's lock; calls of one compressor
and of its streams take turns.

The header (DSV4_HEADER, else beside this file or one folder up) is compiled on first use by CC with CFLAGS, and kept in
__pycache__ here, or in ~/.cache/dsv4, until it changes.
"""

import atexit
import ctypes
import functools
import hashlib
import operator
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import typing
import weakref
from pathlib import Path

import numpy as np

SUMS, ROWS = ("pairs", "tiles"), ("plain", "fp8", "fp8-keys", "fp4", "fp4-e4m3")  # as the header counts them

# What the shim is told, by name: n[NAME] in C. An array is its address, and behind that the bytes of a number.
NUMBERS = ("hidden_dim head_dim ratio rope_dim overlap no_ape no_gate rounding sums rows training threads "
           "batch tokens entries start drop_tail").split()
ARRAYS = "wkv wgate ape norm x out dout dx dwkv dwgate dape dnorm kv gate weights pooled latent".split()
FIELDS = NUMBERS + [field for name in ARRAYS for field in (name, name + "_size")]

SHIM = """
#define DSV4_COMPRESSOR_IMPLEMENTATION
#include DSV4_COMPRESSOR_HEADER
#include <pthread.h>

enum { %s };
#define ARRAY(type, name) (type){(void *)(intptr_t)n[name], n[name + 1] == 4 ? DSV4_F32 : DSV4_BF16, 0}
#define POINTER(name) ((void *)(intptr_t)n[name])

typedef struct { dsv4_compressor *compressor; dsv4_workspace *workspace; int threads; } engine;
typedef struct { dsv4_task *task; void *argument; int64_t count, next; } work;

static void *take_tasks(void *argument) {
    work *w = argument;
    for (int64_t i; (i = __atomic_fetch_add(&w->next, 1, __ATOMIC_RELAXED)) < w->count;) w->task(w->argument, i);
    return NULL;
}
static void run_tasks(void *context, int64_t count, dsv4_task *task, void *argument) {
    pthread_t helper[255];
    work w = {task, argument, count, 0};
    int wanted = ((engine *)context)->threads - 1, started = 0;
    if (wanted >= count) wanted = (int)count - 1;
    while (started < wanted && !pthread_create(&helper[started], NULL, take_tasks, &w)) started++;
    take_tasks(&w);
    while (started > 0) pthread_join(helper[--started], NULL);
}

size_t shim_error_size(void) { return sizeof(dsv4_error); }
const char *shim_text(const dsv4_error *error) { return error->text; }
const char *shim_isa(const engine *e) { return dsv4_compressor_isa(e->compressor); }

static void *zeroed(int64_t count, size_t size, dsv4_error *error) {
    void *block = calloc((size_t)count, size);
    if (!block) snprintf(error->text, sizeof error->text, "%%s", dsv4_status_text(DSV4_ERROR_MEMORY));
    return block;
}
void shim_destroy(engine *e) {
    dsv4_workspace_destroy(e->workspace);
    dsv4_compressor_destroy(e->compressor);
    free(e);
}
dsv4_status shim_create(const int64_t *n, const double *real, engine **made, dsv4_error *error) {
    dsv4_config config = {.hidden_dim = n[HIDDEN_DIM], .head_dim = n[HEAD_DIM], .ratio = n[RATIO],
                          .rope_dim = n[ROPE_DIM], .overlap = (int)n[OVERLAP], .no_ape = (int)n[NO_APE],
                          .no_gate = (int)n[NO_GATE], .rounding = (uint32_t)n[ROUNDING],
                          .sums = (dsv4_sums)n[SUMS], .rows = (dsv4_rows)n[ROWS], .eps = (float)real[0],
                          .rope_theta = real[1], .yarn_factor = real[2], .yarn_orig_ctx = real[3]};
    dsv4_params params = {ARRAY(dsv4_const_matrix, WKV), ARRAY(dsv4_const_matrix, WGATE),
                          ARRAY(dsv4_const_matrix, APE), ARRAY(dsv4_const_matrix, NORM)};
    dsv4_options options = {.training = n[TRAINING] != 0};
    dsv4_allocator heap = dsv4_heap();
    engine *e = zeroed(1, sizeof *e, error);
    if (!e) return DSV4_ERROR_MEMORY;
    e->threads = n[THREADS] < 1 ? 1 : n[THREADS] > 256 ? 256 : (int)n[THREADS];
    dsv4_parallel parallel = {run_tasks, e, e->threads};
    dsv4_status status = dsv4_compressor_create(&config, &params, &options, &heap, &e->compressor, error);
    if (!status) status = dsv4_workspace_create(e->compressor, &parallel, &heap, &e->workspace, error);
    if (status) shim_destroy(e);
    else *made = e;
    return status;
}
dsv4_status shim_stream(const engine *e, int64_t depth, dsv4_state **state, dsv4_error *error) {
    dsv4_allocator heap = dsv4_heap();
    return dsv4_state_create(e->compressor, depth, &heap, state, error);
}

/* x [batch, tokens, H]: a segment for each row. Backward where there is a dout. */
dsv4_status shim_run(engine *e, dsv4_state *state, const int64_t *n, dsv4_error *error) {
    dsv4_segment *segments = zeroed(n[BATCH] + 1, sizeof *segments, error);
    if (!segments) return DSV4_ERROR_MEMORY;
    for (int64_t i = 0; i < n[BATCH]; i++)
        segments[i] = (dsv4_segment){i * n[TOKENS], n[TOKENS], n[START], i * n[ENTRIES], state};
    dsv4_batch batch = {.x = ARRAY(dsv4_const_matrix, X), .tokens = n[BATCH] * n[TOKENS],
                        .out = ARRAY(dsv4_matrix, OUT), .entries = n[BATCH] * n[ENTRIES],
                        .segments = n[BATCH] ? segments : NULL, .segment_count = n[BATCH],
                        .drop_tail = (int)n[DROP_TAIL],
                        .stages = {POINTER(KV), POINTER(GATE), POINTER(WEIGHTS), POINTER(POOLED), POINTER(LATENT)}};
    dsv4_gradients gradients = {.dout = ARRAY(dsv4_const_matrix, DOUT), .dx = ARRAY(dsv4_matrix, DX),
                                .dwkv = ARRAY(dsv4_matrix, DWKV), .dwgate = ARRAY(dsv4_matrix, DWGATE),
                                .dape = ARRAY(dsv4_matrix, DAPE), .dnorm = ARRAY(dsv4_matrix, DNORM)};
    dsv4_status status = n[DOUT] ? dsv4_backward(e->compressor, &batch, &gradients, e->workspace, error)
                                 : dsv4_compress(e->compressor, &batch, e->workspace, error);
    free(segments);
    return status;
}
""" % ", ".join(field.upper() for field in FIELDS)


# ---- The library ------------------------------------------------------------------------------------------------

def _header():
    here = Path(__file__).resolve().parent
    given = os.environ.get("DSV4_HEADER")
    places = [Path(given)] if given else [folder / "dsv4_compressor.h" for folder in (here, here.parent)]
    for place in places:
        if place.is_file():
            return place.resolve()
    raise FileNotFoundError(f"no header at {' or '.join(map(str, places))}: DSV4_HEADER may say where it is")


def _compile(command, path):
    """Beside `path` first, then to it: whoever finds it there finds it whole."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        source, made = Path(folder, "shim.c"), Path(folder, "shim.so")
        source.write_text(SHIM)
        done = subprocess.run([*command, "-o", str(made), str(source), "-lm"], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}")
        os.replace(made, path)


def _built():
    """The path of the compiled library, in the first folder that has it or takes it."""
    header = _header()
    command = shlex.split(os.environ.get("CC") or "cc") + ["-O3", *shlex.split(os.environ.get("CFLAGS", ""))]
    if not shutil.which(command[0]):
        raise RuntimeError(f"no C compiler '{command[0]}' here: CC may name another")
    made_of = "\0".join([SHIM, *command, platform.system(), platform.machine()]).encode() + header.read_bytes()
    name = f"dsv4-{hashlib.sha256(made_of).hexdigest()[:16]}.so"
    command += ["-shared", "-fPIC", "-pthread", f'-DDSV4_COMPRESSOR_HEADER="{header}"']
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    for folder in (Path(__file__).resolve().parent / "__pycache__", cache / "dsv4"):
        path = folder / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                _compile(command, path)
            return path
        except OSError:  # may not write there
            continue
    folder = tempfile.mkdtemp()  # for this process alone
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _compile(command, Path(folder, "dsv4.so"))
    return Path(folder, "dsv4.so")


@functools.lru_cache(maxsize=None)
def _library():
    library = ctypes.CDLL(str(_built()))  # whose calls let go of the interpreter's lock
    for name in ("shim_error_size", "dsv4_state_save_size"):
        getattr(library, name).restype = ctypes.c_size_t
    for name in ("dsv4_state_tokens", "dsv4_state_position"):
        getattr(library, name).restype = ctypes.c_int64
    for name in ("shim_text", "shim_isa"):
        getattr(library, name).restype = ctypes.c_char_p
    return library


def _call(name, *arguments):
    library = _library()
    error = ctypes.create_string_buffer(library.shim_error_size())
    if getattr(library, name)(*arguments, error):
        raise ValueError(library.shim_text(error).decode())


def _made(owner, create, destroy, *arguments):
    """A handle from `create`, given back by `destroy` when its owner goes."""
    handle = ctypes.c_void_p()
    _call(create, *arguments, ctypes.byref(handle))
    weakref.finalize(owner, getattr(_library(), destroy), handle)
    return handle


# ---- Numbers and arrays -----------------------------------------------------------------------------------------

def _int64(name, value):
    value = operator.index(value)
    if not -2**63 <= value < 2**63:
        raise ValueError(f"{name} {value} is out of range")
    return ctypes.c_int64(value)


def _numbers(**given):
    """The n[] of the shim. The arrays must outlive it."""
    n = (ctypes.c_int64 * len(FIELDS))()
    for name, value in given.items():
        at = FIELDS.index(name)
        if name in NUMBERS:
            n[at] = _int64(name, value)
        elif value is not None:
            n[at], n[at + 1] = value.ctypes.data, value.itemsize
    return n


def _text(shape):
    return f"[{', '.join(map(str, shape))}]"


def _array(name, given, *shape):
    """`given` in NumPy, contiguous. Lengths that may be any are named in `shape`."""
    if hasattr(given, "data_ptr"):  # torch's, and bf16 by its bits
        given = given.detach().cpu()
        bf16 = str(given.dtype) == "torch.bfloat16"
        given = given.view(sys.modules["torch"].int16).numpy().view(np.uint16) if bf16 else given.numpy()
    dtype = getattr(given, "dtype", type(given).__name__)
    if dtype not in (np.float32, np.uint16) or not isinstance(given, np.ndarray):
        raise ValueError(f"{name} is {dtype}, not an array of float32, or of uint16 or bfloat16 for bf16")
    if given.ndim != len(shape) or any(is_ != want for is_, want in zip(given.shape, shape) if isinstance(want, int)):
        raise ValueError(f"{name} is {_text(given.shape)}, not {_text(shape)}")
    return np.require(given, requirements="CA")


def _like(x, array):
    """In x's kind: where x is torch's, so is the result."""
    if array is None or not hasattr(x, "data_ptr"):
        return array
    torch = sys.modules["torch"]
    bf16 = array.dtype == np.uint16
    tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if bf16 else torch.from_numpy(array)
    return tensor.to(x.device)


class Result(typing.NamedTuple):
    """Without [B, ...] where x had none. Stages are None where not asked for, float32 but for latent."""
    out: typing.Any  # [B, N, D], x's type
    kv: typing.Any = None  # [B, S, coff D], 0 in a dropped tail
    gate: typing.Any = None  # the same
    weights: typing.Any = None  # [B, N, coff m, D], softmax weights by the window's rows
    pooled: typing.Any = None  # [B, N, D]
    latent: typing.Any = None  # [B, N, D], x's type: the entry before RoPE


class Gradients(typing.NamedTuple):
    """float32, of the parameters' shapes, but for dx; None where there is no such parameter."""
    dx: typing.Any  # [B, S, H] or [S, H], x's type
    dwkv: typing.Any
    dwgate: typing.Any
    dape: typing.Any
    dnorm: typing.Any


# ---- The compressor ---------------------------------------------------------------------------------------------

class Compressor:
    """wkv, wgate [coff D, H], ape [m, coff D], norm [D]; packed here and not needed afterwards. DeepSeek-V4.1 has no
    ape (give ratio and eps, 1e-20) and at ratio 1 no wgate.

    rounding   where results are rounded to bf16, whatever x is: "none", "deepseek", "transformers" ... or points,
               "pooled+scaled+row"
    eps        1e-6 where there is an ape
    yarn_factor  1: no YaRN
    sums       order in which products of bf16 are added: "pairs", "tiles"
    rows       what a cache makes of entries: "plain", "fp8", "fp8-keys", "fp4", "fp4-e4m3"; out is what is read back
    training   True: for `backward`
    """

    def __init__(self, wkv, wgate=None, ape=None, norm=None, ratio=None, rope_dim=64, eps=None, rope_theta=160000,
                 yarn_factor=16, yarn_orig_ctx=65536, rounding="deepseek", sums="pairs", rows="plain", training=False,
                 threads=1):
        norm, wkv = _array("norm", norm, "head_dim"), _array("wkv", wkv, "coff * head_dim", "hidden_dim")
        columns, self.head_dim, self.hidden_dim = wkv.shape[0], norm.shape[0], wkv.shape[1]
        if columns not in (self.head_dim, 2 * self.head_dim):
            raise ValueError(f"wkv is {_text(wkv.shape)}: norm's {self.head_dim} or twice as many rows are wanted")
        if ape is None and (ratio is None or eps is None):
            raise ValueError("without an ape, ratio and eps must be given (DeepSeek-V4.1's eps is 1e-20)")
        ratio = None if ratio is None else operator.index(ratio)
        if ape is not None:
            ape = _array("ape", ape, "ratio" if ratio is None else ratio, columns)
        if wgate is not None:
            wgate = _array("wgate", wgate, columns, self.hidden_dim)
        reals = dict(eps=1e-6 if eps is None else eps, rope_theta=rope_theta, yarn_factor=yarn_factor,
                     yarn_orig_ctx=yarn_orig_ctx)
        for name, value in reals.items():  # 0 would be the library's default
            if not np.float32(value) > 0:
                raise ValueError(f"{name} {value} is not above 0")
        for name, value, known in (("sums", sums, SUMS), ("rows", rows, ROWS)):
            if value not in known:
                raise ValueError(f"{name} '{value}' is none of {', '.join(known)}")
        self.ratio, self.overlap = len(ape) if ratio is None else ratio, columns != self.head_dim
        self._shapes = {"d" + name: None if array is None else array.shape
                        for name, array in (("wkv", wkv), ("wgate", wgate), ("ape", ape), ("norm", norm))}
        self.settings = dict(reals, ratio=ratio, rope_dim=rope_dim, rounding=rounding, sums=sums, rows=rows,
                             training=training, threads=threads)
        bits = ctypes.c_uint32()
        _call("dsv4_rounding_parse", str(rounding).encode(), ctypes.byref(bits))
        n = _numbers(hidden_dim=self.hidden_dim, head_dim=self.head_dim, ratio=self.ratio, rope_dim=rope_dim,
                     overlap=self.overlap, no_ape=ape is None, no_gate=wgate is None, rounding=bits.value,
                     sums=SUMS.index(sums), rows=ROWS.index(rows), training=training, threads=threads,
                     wkv=wkv, wgate=wgate, ape=ape, norm=norm)
        reals = (ctypes.c_double * len(reals))(*reals.values())
        self._engine, self._turn = _made(self, "shim_create", "shim_destroy", n, reals), threading.Lock()

    @property
    def isa(self):
        """The name of the kernels in use."""
        return _library().shim_isa(self._engine).decode()

    def __call__(self, x, start=0, stages=False, drop_tail=False):
        """x [B, S, H] or [S, H], whole sequences whose first tokens stand at position `start`, to a Result. An S that
        the ratio does not divide is refused; with `drop_tail` what is too many is ignored."""
        return self._compress(x, start, stages, drop_tail, None)

    def _x(self, x):
        return _array("x", x, *["B", "S", self.hidden_dim][-3 if getattr(x, "ndim", 2) == 3 else -2:])

    def _run(self, state, x, entries, start, drop_tail, **arrays):
        n = _numbers(batch=x.shape[0] if x.ndim == 3 else 1, tokens=x.shape[-2], entries=entries, start=start,
                     drop_tail=drop_tail, x=x, **arrays)
        _call("shim_run", self._engine, state, n)

    def _compress(self, x, start, stages, drop_tail, state):
        given, coff, rows = x, 1 + self.overlap, self._x(x)
        with self._turn:
            entries = (_library().dsv4_state_tokens(state) % self.ratio + rows.shape[-2]) // self.ratio
            result = {"out": np.zeros((*rows.shape[:-2], entries, self.head_dim), rows.dtype)}
            if stages:
                result["kv"] = np.zeros((*rows.shape[:-1], coff * self.head_dim), np.float32)
                result["gate"] = np.zeros_like(result["kv"]) if self._shapes["dwgate"] else None
                result["weights"] = np.zeros((*rows.shape[:-2], entries, coff * self.ratio, self.head_dim), np.float32)
                result["pooled"] = np.zeros(result["out"].shape, np.float32)
                result["latent"] = np.zeros_like(result["out"])
            self._run(state, rows, entries, start, drop_tail, **result)
        return Result(**{name: _like(given, array) for name, array in result.items()})

    def backward(self, x, dout, start=0, drop_tail=False):
        """Of the call c(x, start, drop_tail=drop_tail) and the gradient of its out, [B, N, D] or [N, D] in any type, to
        Gradients."""
        rows = self._x(x)
        entries = rows.shape[-2] // self.ratio
        dout = _array("dout", dout, *rows.shape[:-2], entries, self.head_dim)
        result = {name: np.zeros(shape, np.float32) if shape else None for name, shape in self._shapes.items()}
        with self._turn:
            result["dx"] = np.zeros_like(rows)
            self._run(None, rows, entries, start, drop_tail, dout=dout, **result)
        return Gradients(**{name: _like(x, array) for name, array in result.items()})

    def with_params(self, wkv, wgate, ape, norm, **changes):
        """The same compressor with other numbers, and other settings where `changes` name them."""
        return Compressor(wkv, wgate, ape, norm, **{**self.settings, **changes})

    def stream(self, depth=0, start=0):
        """A sequence that comes piece by piece, its first token at position `start`. The last `depth` tokens can be
        taken back."""
        return Stream(self, depth, start)


class Stream:
    """One sequence's state: s(x) gives the entries that x completes, with the bits of the one call."""

    def __init__(self, compressor, depth=0, start=0):
        self._compressor, self._depth, self._start = compressor, depth, start
        self._state = _made(self, "shim_stream", "dsv4_state_destroy", compressor._engine, _int64("depth", depth))

    def __call__(self, x, stages=False):
        """x [S, H], the sequence's next tokens, to a Result."""
        if getattr(x, "ndim", 2) != 2:
            raise ValueError(f"x is {_text(x.shape)}, not {_text(['S', self._compressor.hidden_dim])}")
        return self._compressor._compress(x, self.position, stages, False, self._state)

    @property
    def position(self):
        """Of the next token."""
        seen = _library().dsv4_state_tokens(self._state)
        return _library().dsv4_state_position(self._state) if seen else self._start

    def roll_back(self, tokens):
        """As if the last `tokens` had never come; their entries are the caller's to forget."""
        _call("dsv4_state_roll_back", self._state, _int64("tokens", tokens))

    def save(self):
        """The state as bytes, for `restore` on any machine."""
        size = _library().dsv4_state_save_size(self._state)
        saved = ctypes.create_string_buffer(size)
        _call("dsv4_state_save", self._state, saved, ctypes.c_size_t(size), None)
        return saved.raw

    def restore(self, saved):
        """Becomes the stream that `saved` came from, of a compressor with the same settings, training among them; where
        that one had no token yet, this one's own `start` stays."""
        saved = bytes(saved)
        _call("dsv4_state_restore", self._state, saved, ctypes.c_size_t(len(saved)))
        self._start = self.position - _library().dsv4_state_tokens(self._state)

    def copy(self):
        """A stream of its own that goes on from here."""
        other = Stream(self._compressor, self._depth, self._start)
        _call("dsv4_state_copy", other._state, self._state)
        return other


def torch_function(c):
    """A torch.autograd.Function with c's settings: apply(x, wkv, wgate, ape, norm, start=0, drop_tail=False) is out. It
    packs the parameters that it is given, so that a module may hold and train them."""
    import torch

    class Compress(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, wkv, wgate, ape, norm, start=0, drop_tail=False):
            ctx.compressor = c.with_params(wkv, wgate, ape, norm, training=any(ctx.needs_input_grad))
            ctx.save_for_backward(x)
            ctx.where = start, drop_tail
            return ctx.compressor(x, start, drop_tail=drop_tail).out

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, dout):
            return (*ctx.compressor.backward(*ctx.saved_tensors, dout, *ctx.where), None, None)

    return Compress


def main():
    random = np.random.default_rng(0)
    H, D, m = 1024, 128, 4
    wkv, wgate = (random.standard_normal((2 * D, H), np.float32) / np.sqrt(H, dtype=np.float32) for _ in range(2))
    ape, norm = random.standard_normal((m, 2 * D), np.float32), np.ones(D, np.float32)
    x = random.standard_normal((2, 64, H), np.float32)
    c = Compressor(wkv=wkv, wgate=wgate, ape=ape, norm=norm, training=True, threads=2)
    print(f"{_header().name}, kernels {c.isa}, compiled to {_library()._name}")
    print(f"CSA: hidden_dim {H}, head_dim {D}, ratio {c.ratio}")
    r = c(x, stages=True)
    print(f"c(x): x {_text(x.shape)} to out {_text(r.out.shape)}, its first numbers {r.out[0, 0, :4]}")
    for name in ("kv", "gate", "weights", "pooled", "latent"):
        print(f"stages: {name} {_text(getattr(r, name).shape)}")
    s = c.stream(depth=3)
    pieces = [s(x[0, :30]).out, s(x[0, 30:33]).out]
    s.roll_back(3)
    pieces = pieces[:1] + [s(x[0, t:t + 1]).out for t in range(30, 64)]
    print(f"in pieces, three tokens taken back: the same bits: {np.array_equal(np.concatenate(pieces), r.out[0])}")
    g = c.backward(x, np.ones_like(r.out))
    print("c.backward(x, dout):", ", ".join(f"{name} {_text(getattr(g, name).shape)}" for name in g._fields))


if __name__ == "__main__":
    main()
