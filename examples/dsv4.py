"""DeepSeek-V4's KV compressor from Python: copy this file and dsv4_compressor.h, have a C compiler and NumPy.

    import dsv4
    c = dsv4.Compressor(wkv, wgate, ape, norm, rounding="deepseek")
    entries = c(x).out                    # x [tokens, hidden_dim] -> [tokens / ratio, head_dim]

Arrays are NumPy float32, NumPy uint16 that hold bf16, or torch tensors of float32 or bfloat16; results are of x's kind.
The header is compiled once, by $CC or cc, into __pycache__ or a cache folder. `python3 dsv4.py` shows itself.
"""

import ctypes
import hashlib
import os
import subprocess
import sys
import tempfile
import threading
from types import SimpleNamespace

import numpy as np

SHIM = r"""
#define DSV4_COMPRESSOR_IMPLEMENTATION
#include "dsv4_compressor.h"
#include <pthread.h>

/* What ctypes calls: numbers and pointers alone. A NULL or nonzero result has its reason in `error`. */
typedef struct engine { dsv4_compressor *compressor; dsv4_workspace *workspace; int threads; } engine;
typedef struct share { dsv4_task *task; void *argument; int64_t index, count, step; } share;

static void *work(void *argument) {
    const share *s = (const share *)argument;
    for (int64_t i = s->index; i < s->count; i += s->step) s->task(s->argument, i);
    return NULL;
}
static void run(void *context, int64_t count, dsv4_task *task, void *argument) {
    const int threads = ((const engine *)context)->threads;
    pthread_t ids[64];
    share shares[64];
    int started[64];
    for (int i = threads - 1; i >= 0; i--) {
        shares[i] = (share){task, argument, i, count, threads};
        started[i] = i > 0 && pthread_create(&ids[i], NULL, work, &shares[i]) == 0;
        if (!started[i]) work(&shares[i]);
    }
    for (int i = 1; i < threads; i++) if (started[i]) pthread_join(ids[i], NULL);
}

static int rows_of(const char *name) {
    int rows = 0;
    while (rows < DSV4_ROWS_COUNT && strcmp(dsv4_rows_name((dsv4_rows)rows), name) != 0) rows++;
    return rows;
}
void destroy(engine *e) {
    dsv4_workspace_destroy(e->workspace);
    dsv4_compressor_destroy(e->compressor);
    free(e);
}
engine *create(const int64_t *sizes, const double *reals, const char *rounding, const char *rows,
               const dsv4_const_matrix *params, dsv4_error *error) {
    dsv4_config c = {.hidden_dim = sizes[0], .head_dim = sizes[1], .ratio = sizes[2], .rope_dim = sizes[3]};
    const dsv4_params arrays = {params[0], params[1], params[2], params[3]};
    const dsv4_options options = {NULL, (int)sizes[7], 0};
    const dsv4_allocator heap = dsv4_heap();
    engine *e = (engine *)calloc(1, sizeof *e);
    const dsv4_parallel parallel = {run, e, (int)sizes[8]};
    if (!e) return NULL;
    e->threads = (int)sizes[8];
    c.overlap = (int)sizes[4];
    c.no_ape = (int)sizes[5];
    c.no_gate = (int)sizes[6];
    c.rows = (dsv4_rows)rows_of(rows);
    c.eps = (float)reals[0];
    c.rope_theta = reals[1];
    c.yarn_factor = reals[2];
    c.yarn_orig_ctx = reals[3];
    if (dsv4_rounding_parse(rounding, &c.rounding, error) ||
        dsv4_compressor_create(&c, &arrays, &options, &heap, &e->compressor, error) ||
        dsv4_workspace_create(e->compressor, &parallel, &heap, &e->workspace, error)) {
        destroy(e);
        return NULL;
    }
    return e;
}

/* sizes: batch rows, tokens and entries of each, position of the first token, drop_tail. */
static dsv4_status lay(const engine *e, const int64_t *sizes, dsv4_state *state, dsv4_batch *b, dsv4_error *error) {
    dsv4_segment *segments = (dsv4_segment *)calloc((size_t)sizes[0] + 1, sizeof *segments);
    (void)e;
    if (!segments) { strcpy(error->text, "out of memory"); return DSV4_ERROR_MEMORY; }
    for (int64_t i = 0; i < sizes[0]; i++)
        segments[i] = (dsv4_segment){i * sizes[1], sizes[1], sizes[3], i * sizes[2], state};
    b->tokens = sizes[0] * sizes[1];
    b->entries = sizes[0] * sizes[2];
    b->segments = segments;
    b->segment_count = sizes[0];
    b->drop_tail = (int)sizes[4];
    return DSV4_OK;
}
int compress(const engine *e, const int64_t *sizes, dsv4_state *state, dsv4_const_matrix x, dsv4_matrix out,
             void **stages, dsv4_error *error) {
    dsv4_batch b = {0};
    dsv4_status status = lay(e, sizes, state, &b, error);
    b.x = x;
    b.out = out;
    b.stages = (dsv4_stages){stages[0], stages[1], stages[2], stages[3], stages[4]};
    if (!status) status = dsv4_compress(e->compressor, &b, e->workspace, error);
    free((void *)b.segments);
    return status;
}
int backward(const engine *e, const int64_t *sizes, dsv4_const_matrix x, dsv4_const_matrix dout,
             const dsv4_matrix *to, dsv4_error *error) {
    const dsv4_gradients g = {dout, to[0], to[1], to[2], to[3], to[4], 0, NULL};
    dsv4_batch b = {0};
    dsv4_status status = lay(e, sizes, NULL, &b, error);
    b.x = x;
    if (!status) status = dsv4_backward(e->compressor, &b, &g, e->workspace, error);
    free((void *)b.segments);
    return status;
}
dsv4_state *state_create(const engine *e, int64_t depth, dsv4_error *error) {
    const dsv4_allocator heap = dsv4_heap();
    dsv4_state *state = NULL;
    return dsv4_state_create(e->compressor, depth, &heap, &state, error) ? NULL : state;
}
int64_t entries(const engine *e, const dsv4_state *state, int64_t tokens) {
    return dsv4_entry_count(dsv4_compressor_config(e->compressor), state, tokens);
}
"""

F32, BF16 = 1, 2


class _Matrix(ctypes.Structure):
    """dsv4_matrix and dsv4_const_matrix: an array whose rows have no gaps."""

    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int), ("stride", ctypes.c_int64)]


class _Error(ctypes.Structure):
    _fields_ = [("status", ctypes.c_int), ("text", ctypes.c_char * 232)]


# ---- The compiled header ----------------------------------------------------------------------------------------


def _header():
    here = os.path.dirname(os.path.abspath(__file__))
    for folder in (os.environ.get("DSV4_HEADER_DIR"), here, os.path.dirname(here)):
        if folder and os.path.isfile(os.path.join(folder, "dsv4_compressor.h")):
            return folder
    raise ImportError("dsv4_compressor.h is neither beside dsv4.py, nor above, nor in $DSV4_HEADER_DIR")


def _cache():
    here = os.path.join(os.path.dirname(os.path.abspath(__file__)), "__pycache__")
    home = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "dsv4")
    for folder in (here, home):
        try:
            os.makedirs(folder, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            continue
    return tempfile.mkdtemp(prefix="dsv4-")


def _build():
    """The path of the shared library: compiled anew wherever the header, this file or the command has changed."""
    folder = _header()
    command = os.environ.get("CC", "cc").split() + ["-std=c99", "-O3", "-w", "-fPIC", "-shared", "-pthread", "-I", folder]
    with open(os.path.join(folder, "dsv4_compressor.h"), "rb") as file:
        name = hashlib.sha256(file.read() + SHIM.encode() + repr(command).encode()).hexdigest()[:16]
    path = os.path.join(_cache(), f"dsv4-{name}.so")
    if not os.path.exists(path):
        with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as work:
            built = os.path.join(work, "dsv4.so")
            done = subprocess.run(command + ["-x", "c", "-", "-o", built, "-lm"], input=SHIM, text=True, capture_output=True)
            if done.returncode:
                raise ImportError(f"{' '.join(command)}: {done.stderr.strip()}")
            os.replace(built, path)
    return path


def _load():
    library, pointer, whole, error = ctypes.CDLL(_build()), ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(_Error)
    for name, result, *arguments in (
        ("create", pointer, pointer, pointer, ctypes.c_char_p, ctypes.c_char_p, pointer, error),
        ("destroy", None, pointer),
        ("compress", ctypes.c_int, pointer, pointer, pointer, _Matrix, _Matrix, pointer, error),
        ("backward", ctypes.c_int, pointer, pointer, _Matrix, _Matrix, pointer, error),
        ("entries", whole, pointer, pointer, whole),
        ("state_create", pointer, pointer, whole, error),
        ("dsv4_state_destroy", None, pointer),
        ("dsv4_state_position", whole, pointer),
        ("dsv4_state_tokens", whole, pointer),
        ("dsv4_state_copy", ctypes.c_int, pointer, pointer, error),
        ("dsv4_state_roll_back", ctypes.c_int, pointer, whole, error),
        ("dsv4_state_save_size", ctypes.c_size_t, pointer),
        ("dsv4_state_save", ctypes.c_int, pointer, pointer, ctypes.c_size_t, pointer, error),
        ("dsv4_state_restore", ctypes.c_int, pointer, ctypes.c_char_p, ctypes.c_size_t, error),
        ("dsv4_rows_name", ctypes.c_char_p, ctypes.c_int),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


_library = _load()


def _check(status, error):
    if status:
        raise ValueError(error.text.decode())


# ---- Arrays ---------------------------------------------------------------------------------------------------------


def _array(value, name):
    """A NumPy array of float32, or of uint16 that are bf16, whose rows lie one after another."""
    if hasattr(value, "detach"):
        torch = sys.modules["torch"]
        value = value.detach().cpu().contiguous()
        value = value.view(torch.int16).numpy().view(np.uint16) if value.dtype == torch.bfloat16 else value.numpy()
    if not isinstance(value, np.ndarray) or value.dtype not in (np.float32, np.uint16):
        kind = getattr(value, "dtype", type(value).__name__)
        raise ValueError(f"{name} is {kind}, not float32, nor bf16 as uint16 or as a torch tensor")
    return np.ascontiguousarray(value)


def _like(array, value):
    """`array` as `value` is: a torch tensor or NumPy's."""
    if array is None or not hasattr(value, "detach"):
        return array
    torch = sys.modules["torch"]
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _matrix(array):
    if array is None:
        return _Matrix()
    return _Matrix(array.ctypes.data, F32 if array.dtype == np.float32 else BF16, 0)


def _pointers(arrays):
    return (ctypes.c_void_p * len(arrays))(*(None if a is None else a.ctypes.data for a in arrays))


def _numbers(kind, values):
    return (kind * len(values))(*values)


# ---- The compressor -------------------------------------------------------------------------------------------------


class Compressor:
    """wkv, wgate [coff * D, H], ape [ratio, coff * D], norm [D], coff = 2 with overlapping windows, else 1. Without ape
    (DeepSeek-V4.1) ratio and eps must be given; wgate may be None where ratio is 1. rounding: a preset ("none",
    "deepseek", "maxtext", "transformers", ...) or points joined by '+'. rows: "plain", "fp8", "fp8-keys", "fp4" or
    "fp4-e4m3", what caches make of entries; results are what is read back. training: backward can be called.
    """

    def __init__(self, wkv, wgate, ape, norm, ratio=None, rope_dim=64, eps=None, rope_theta=160000.0, yarn_factor=16.0,
                 yarn_orig_ctx=65536, rounding="deepseek", sums="pairs", rows="plain", training=False, threads=1):
        self.settings = dict(ratio=ratio, rope_dim=rope_dim, eps=eps, rope_theta=rope_theta, yarn_factor=yarn_factor,
                             yarn_orig_ctx=yarn_orig_ctx, rounding=rounding, sums=sums, rows=rows, training=training,
                             threads=threads)  # fmt: skip
        given = dict(wkv=wkv, wgate=wgate, ape=ape, norm=norm)
        params = {name: None if value is None else _array(value, name) for name, value in given.items()}
        self.head_dim, self.hidden_dim, self.coff = self._shapes(params)
        self.ratio = params["ape"].shape[0] if ratio is None and ape is not None else ratio
        if ape is None and (ratio is None or eps is None):
            raise ValueError("without an ape, ratio and eps must be given (DeepSeek-V4.1: 2 or 1, and 1e-20)")
        if ape is not None and self.ratio != params["ape"].shape[0]:
            raise ValueError(f"ape has {params['ape'].shape[0]} rows, but ratio is {ratio}")
        if sums != "pairs":
            raise ValueError(f"sums '{sums}' is not pairs")
        if rows.encode() not in [_library.dsv4_rows_name(i) for i in range(5)]:
            raise ValueError(f"rows '{rows}' is none of plain, fp8, fp8-keys, fp4, fp4-e4m3")
        if not 1 <= threads <= 64:
            raise ValueError(f"threads is {threads}, not in 1 ... 64")
        sizes = [self.hidden_dim, self.head_dim, self.ratio, rope_dim, self.coff - 1, ape is None, wgate is None]
        reals = [1e-6 if eps is None else eps, rope_theta, yarn_factor, yarn_orig_ctx]
        matrices = (_Matrix * 4)(*(_matrix(params[name]) for name in given))
        error = _Error(text=b"out of memory")
        self._params, self._lock = params, threading.Lock()  # one workspace: one call at a time
        self._engine = _library.create(_numbers(ctypes.c_int64, sizes + [bool(training), threads]),
                                       _numbers(ctypes.c_double, reals), rounding.encode(), rows.encode(), matrices,
                                       error)  # fmt: skip
        _check(not self._engine, error)

    def __del__(self):
        if getattr(self, "_engine", None):
            _library.destroy(self._engine)

    @staticmethod
    def _shapes(params):
        """head_dim, hidden_dim and coff, which every array has to agree with."""
        wkv, norm = params["wkv"], params["norm"]
        if wkv is None or norm is None:
            raise ValueError("wkv and norm are required")
        head_dim = norm.size
        if norm.ndim != 1 or wkv.ndim != 2 or wkv.shape[0] not in (head_dim, 2 * head_dim):
            raise ValueError(f"wkv is {wkv.shape} beside norm {norm.shape}, not (D or 2 D, hidden_dim) and (D,)")
        for name, shape in (("wgate", wkv.shape), ("ape", (None, wkv.shape[0]))):
            array = params[name]
            if array is not None and (array.ndim != 2 or array.shape[1] != shape[1] or shape[0] not in (None, array.shape[0])):
                raise ValueError(f"{name} is {array.shape}, which does not fit wkv {wkv.shape}")
        return head_dim, wkv.shape[1], wkv.shape[0] // head_dim

    def _batch(self, x):
        """x as an array, and its leading dimension if it has one."""
        array = _array(x, "x")
        if array.ndim not in (2, 3) or array.shape[-1] != self.hidden_dim:
            raise ValueError(f"x is {array.shape}, not (tokens, {self.hidden_dim}) or (batch, tokens, {self.hidden_dim})")
        return array, array.shape[:-2]

    def _run(self, x, state, start, stages, drop_tail):
        array, batch = self._batch(x)
        tokens, width, rows = array.shape[-2], self.coff * self.head_dim, self.coff * self.ratio
        count = _library.entries(self._engine, state, tokens)
        shapes = dict(kv=(tokens, width), gate=(tokens, width), weights=(count, rows, self.head_dim),
                      pooled=(count, self.head_dim), latent=(count, self.head_dim), out=(count, self.head_dim))  # fmt: skip
        if self._params["wgate"] is None:
            del shapes["gate"]
        types = dict(latent=array.dtype, out=array.dtype)
        made = {name: np.zeros(batch + shape, types.get(name, np.float32)) for name, shape in shapes.items()
                if stages or name == "out"}  # fmt: skip
        places = _pointers([made.get(name) for name in ("kv", "gate", "weights", "pooled", "latent")])
        sizes = [batch[0] if batch else 1, tokens, count, start, bool(drop_tail)]
        error = _Error()
        with self._lock:
            status = _library.compress(self._engine, _numbers(ctypes.c_int64, sizes), state, _matrix(array),
                                       _matrix(made["out"]), places, error)  # fmt: skip
        _check(status, error)
        return SimpleNamespace(**{name: _like(value, x) for name, value in made.items()})

    def __call__(self, x, start=0, stages=False, drop_tail=False):
        """x [S, H] or [B, S, H], whole sequences whose first tokens are at position `start`. The result has out
        [..., S / ratio, D] in x's type and, with stages, fp32 kv, gate [..., S, coff * D], weights [..., S / ratio,
        coff * ratio, D], pooled [..., S / ratio, D], and latent like out. drop_tail: tokens that fill no window are
        ignored; otherwise they are an error.
        """
        return self._run(x, None, start, stages, drop_tail)

    def backward(self, x, dout, start=0):
        """The gradients of sum(out * dout): dx in x's type; dwkv, dwgate, dape, dnorm in fp32, None where there is no
        such parameter. dout [..., S / ratio, D] in fp32 or bf16.
        """
        array, batch = self._batch(x)
        gradient, tokens = _array(dout, "dout"), array.shape[-2]
        if gradient.shape != batch + (tokens // self.ratio, self.head_dim):
            raise ValueError(f"dout is {gradient.shape}, not {batch + (tokens // self.ratio, self.head_dim)}")
        made = {"dx": np.zeros_like(array)}
        for name, param in self._params.items():
            made["d" + name] = None if param is None else np.zeros(param.shape, np.float32)
        sizes, error = [batch[0] if batch else 1, tokens, tokens // self.ratio, start, 0], _Error()
        with self._lock:
            status = _library.backward(self._engine, _numbers(ctypes.c_int64, sizes), _matrix(array), _matrix(gradient),
                                       (_Matrix * 5)(*map(_matrix, made.values())), error)  # fmt: skip
        _check(status, error)
        return SimpleNamespace(**{name: _like(value, x) for name, value in made.items()})

    def stream(self, depth=0, start=0):
        """A sequence that comes piece by piece, the last `depth` tokens of which can be taken back."""
        return Stream(self, depth, start)

    def with_params(self, wkv, wgate, ape, norm):
        """The same compressor with other numbers."""
        return Compressor(wkv, wgate, ape, norm, **self.settings)


class Stream:
    """The state of one sequence: s(x) takes the next tokens and gives the entries of the windows that they close."""

    def __init__(self, compressor, depth=0, start=0):
        error = _Error()
        self._compressor, self._depth, self._start = compressor, depth, start
        self._state = _library.state_create(compressor._engine, depth, error)
        _check(not self._state, error)

    def __del__(self):
        if getattr(self, "_state", None):
            _library.dsv4_state_destroy(self._state)

    def __call__(self, x, stages=False):
        """x [S, H], any S. Results as the compressor's own."""
        if _array(x, "x").ndim != 2:
            raise ValueError("x is a batch, but a stream is one sequence")
        return self._compressor._run(x, self._state, self.position, stages, False)

    @property
    def position(self):
        """Of the next token."""
        seen = _library.dsv4_state_tokens(self._state)
        return _library.dsv4_state_position(self._state) if seen else self._start

    def roll_back(self, tokens):
        """As if the last `tokens` had never come."""
        error = _Error()
        _check(_library.dsv4_state_roll_back(self._state, tokens, error), error)

    def copy(self):
        """Another stream that goes on from here."""
        other, error = Stream(self._compressor, self._depth, self._start), _Error()
        _check(_library.dsv4_state_copy(other._state, self._state, error), error)
        return other

    def save(self):
        """The state as bytes, for any machine."""
        size, error = _library.dsv4_state_save_size(self._state), _Error()
        saved = ctypes.create_string_buffer(size)
        _check(_library.dsv4_state_save(self._state, saved, size, None, error), error)
        return saved.raw

    def restore(self, saved):
        """Becomes what save gave."""
        error = _Error()
        _check(_library.dsv4_state_restore(self._state, bytes(saved), len(saved), error), error)


def torch_function(compressor):
    """A torch.autograd.Function: apply(x, wkv, wgate, ape, norm) compresses x with these parameters and the
    compressor's settings, and is differentiated in all of them. The compressor must be one for training.
    """
    import torch

    class Compress(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, wkv, wgate, ape, norm):
            ctx.compressor = compressor.with_params(wkv, wgate, ape, norm)
            ctx.save_for_backward(x)
            ctx.types = [None if p is None else p.dtype for p in (wkv, wgate, ape, norm)]
            return ctx.compressor(x).out

        @staticmethod
        def backward(ctx, dout):
            (x,) = ctx.saved_tensors
            g = ctx.compressor.backward(x, dout)
            params = zip((g.dwkv, g.dwgate, g.dape, g.dnorm), ctx.types)
            return (g.dx, *(None if d is None else d.to(t) for d, t in params))

    return Compress


def _demo():
    """A compressor of CSA's kind on random tokens: at once, as a stream, and backwards."""
    rng = np.random.default_rng(1)
    hidden_dim, head_dim, ratio, tokens = 256, 128, 4, 64
    real = lambda *shape: rng.standard_normal(shape, np.float32)
    scale = np.float32(hidden_dim**-0.5)
    c = Compressor(real(2 * head_dim, hidden_dim) * scale, real(2 * head_dim, hidden_dim) * scale,
                   real(ratio, 2 * head_dim), real(head_dim), rounding="none", training=True)  # fmt: skip
    x = real(tokens, hidden_dim)
    whole = c(x, stages=True)
    print(f"x {x.shape} -> out {whole.out.shape}; pooled by weights {whole.weights.shape}")
    s = c.stream(depth=3)
    parts = np.concatenate([s(x[:10]).out, s(x[10:21]).out, s(x[21:]).out])
    print(f"as a stream of 10, 11 and 43 tokens: {'the same bits' if np.array_equal(parts, whole.out) else 'other bits'}")
    s.roll_back(3)
    again = s(x[-3:]).out
    print(f"three tokens taken back and given again: {'the same entry' if np.array_equal(again, whole.out[-1:]) else 'another'}")
    print(f"saved state: {len(s.save())} bytes at position {s.position}")
    g = c.backward(x, np.ones_like(whole.out))
    step = np.float32(1e-2) * g.dx
    gain = float(c(x + step).out.astype(np.float64).sum() - whole.out.astype(np.float64).sum())
    print(f"a step along dx promises {float((step * g.dx).sum()):.4f}, gives {gain:.4f}")
    print("gradients: " + ", ".join(f"{name} {value.shape}" for name, value in vars(g).items()))


if __name__ == "__main__":
    _demo()
