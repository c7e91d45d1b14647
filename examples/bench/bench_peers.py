#!/usr/bin/env python3
"""The compressor beside PyTorch (all of it) and oneDNN (its matrix product alone), one thread each, in one run.

    python3 examples/bench/bench_peers.py [BUILD]         BUILD holds `bench` (default: build)

Each case goes round all contestants three times; the table shows medians of processor time. Peers that are not
installed are named with the Debian package that brings them. Where the CPU has AMX, oneDNN multiplies bf16 by it; a
second pair of columns shows the peers held to AVX512-BF16 (ONEDNN_MAX_CPU_ISA).
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROUNDS = 3
TOKENS, HIDDEN, HEAD, ROPE = 2048, 4096, 512, 64
ATTENTION = {"csa": (4, 2), "hca": (128, 1)}  # ratio, and series of projections (2 with overlapping windows)
CASES = [f"{attention}-flash-{dtype}-{work}" for work in ("prefill", "backward") for attention in ("csa", "hca")
         for dtype in ("bf16", "tiles", "f32")]  # tiles: bf16 in the order of AMX


# --- the compressor in PyTorch: the child process ------------------------------------------------------------------

def torch_rows(torch, projected, ratio, series, pad):
    """[tokens, series * HEAD] to the rows that each window pools, [entries, series * ratio, HEAD]."""
    windows = projected.view(-1, ratio, series * HEAD)
    if series == 1:
        return windows
    first = windows.new_full((1, ratio, HEAD), pad)
    return torch.cat([torch.cat([first, windows[:-1, :, :HEAD]]), windows[:, :, HEAD:]], 1)


def torch_entries(torch, x, params, angles, ratio, series):
    """The compressor: both projections as one product, the rest in fp32 as DeepSeek's inference code has it."""
    weights, ape, norm = params
    kv, gate = torch.nn.functional.linear(x, weights).split(series * HEAD, 1)
    score = (gate.float().view(-1, ratio, series * HEAD) + ape).view(-1, series * HEAD)
    share = torch_rows(torch, score, ratio, series, -1e4).softmax(1)
    pooled = (torch_rows(torch, kv.float(), ratio, series, 0.0) * share).sum(1)
    normed = norm * pooled * torch.rsqrt(pooled.square().mean(1, keepdim=True) + 1e-6)
    pairs = torch.view_as_complex(normed[:, HEAD - ROPE:].reshape(-1, ROPE // 2, 2))
    turned = torch.view_as_real(pairs * angles).flatten(1)
    return torch.cat([normed[:, :HEAD - ROPE], turned], 1).to(x.dtype)


def torch_case(torch, name):
    """A function that runs the case once; the gradients' forward pass is done beforehand."""
    attention, _, dtype_name, work = name.split("-")
    ratio, series = ATTENTION[attention]
    dtype = torch.float32 if dtype_name == "f32" else torch.bfloat16
    wanted = work == "backward"
    torch.manual_seed(1)
    x = torch.randn(TOKENS, HIDDEN).to(dtype).requires_grad_(wanted)
    weights = (torch.randn(2 * series * HEAD, HIDDEN) / HIDDEN ** 0.5).to(dtype).requires_grad_(wanted)
    params = weights, torch.randn(ratio, series * HEAD).requires_grad_(wanted), torch.ones(HEAD, requires_grad=wanted)
    frequencies = 160000.0 ** (-torch.arange(0, ROPE, 2) / ROPE)
    positions = torch.arange(0, TOKENS, ratio).float()[:, None]
    angles = torch.polar(torch.ones(len(positions), ROPE // 2), positions * frequencies)

    if not wanted:
        def forward():
            with torch.no_grad():
                torch_entries(torch, x, params, angles, ratio, series)
        return forward

    entries = torch_entries(torch, x, params, angles, ratio, series)
    gradient = torch.randn(entries.shape).to(dtype)

    def backward():
        torch.autograd.grad(entries, (x, *params), gradient, retain_graph=True)
    return backward


def torch_child():
    """Reads names of cases, answers each with the median seconds of a few runs."""
    import time
    import torch
    torch.set_num_threads(1)
    with open("/proc/self/maps") as maps:
        fast = re.search("openblas|mkl_|blis|atlas", maps.read()) is not None
    print(f"{torch.__version__} {'fast' if fast else 'reference'}", flush=True)
    cases = {}
    for line in sys.stdin:
        name = line.strip()
        if name not in cases:
            cases.clear()
            cases[name] = torch_case(torch, name)
            cases[name]()
        seconds = []
        while not seconds or (len(seconds) < 5 and sum(seconds) < 0.7):
            start = time.process_time()
            cases[name]()
            seconds.append(time.process_time() - start)
        print(statistics.median(seconds), flush=True)


# --- contestants: each has a title and seconds(case), None where it has no such case ----------------------------------

def environment(isa):
    return dict(os.environ, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1",
                **({"ONEDNN_MAX_CPU_ISA": isa} if isa else {}))


class Ours:
    title = "ours"

    def __init__(self, build):
        self.program = os.path.join(build, "bench")

    def seconds(self, case):
        line = subprocess.run([self.program, "--json", "--quick", "--cpu-time", "--only", case], capture_output=True,
                              text=True)
        if line.returncode != 0:
            return None
        self.last = json.loads(line.stdout)
        return TOKENS / self.last["tokens_per_s"]


class Torch:
    def __init__(self, python, isa=None):
        self.title = "PyTorch" + (" w/o AMX" if isa else "")
        self.child = subprocess.Popen([python, os.path.abspath(__file__), "--torch-child"], stdin=subprocess.PIPE,
                                      stdout=subprocess.PIPE, text=True, env=environment(isa))
        self.version, self.blas = self.child.stdout.readline().split()
        self.isa = isa

    def seconds(self, case):
        if "f32" in case and (self.isa or self.blas == "reference"):
            return None  # the limit on instruction sets is about bf16; the reference BLAS would take minutes
        self.child.stdin.write(case + "\n")
        self.child.stdin.flush()
        answer = self.child.stdout.readline()
        return float(answer) if answer else None

    def close(self):
        self.child.stdin.close()
        self.child.wait()


class OneDNN:
    def __init__(self, program, isa=None):
        self.title = "oneDNN" + (" w/o AMX" if isa else "")
        self.program, self.isa = program, isa

    def seconds(self, case):
        attention, _, dtype, work = case.split("-")
        if work != "prefill" or (self.isa and dtype == "f32"):
            return None
        shape = [TOKENS, HIDDEN, 2 * ATTENTION[attention][1] * HEAD]
        run = subprocess.run([self.program, *map(str, shape), "f32" if dtype == "f32" else "bf16"], capture_output=True, text=True,
                             env=environment(self.isa))
        return float(run.stdout) if run.returncode == 0 else None


def find_torch():
    """A Python that has PyTorch: the one that runs this, or the system's."""
    for python in (sys.executable, "/usr/bin/python3"):
        probe = [python, "-c", "import torch"]
        if os.path.exists(python) and subprocess.run(probe, capture_output=True).returncode == 0:
            return python
    print("PyTorch is left out: not installed (Debian: python3-torch)")
    return None


def build_onednn(build):
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if not compiler:
        print("oneDNN is left out: no C++ compiler (Debian: g++)")
        return None
    program = os.path.join(build, "bench_onednn")
    command = [compiler, "-O2", os.path.join(HERE, "bench_onednn.cpp"), "-ldnnl", "-o", program]
    if subprocess.run(command, capture_output=True).returncode == 0:
        return program
    print("oneDNN is left out: not installed, or not one that bench_onednn.cpp compiles with (Debian: libdnnl-dev)")
    return None


def has_amx():
    try:
        with open("/proc/cpuinfo") as info:
            return "amx_bf16" in info.read()
    except OSError:
        return False


def contestants(build):
    isas = [None, "AVX512_CORE_BF16"] if has_amx() else [None]
    python, program = find_torch(), build_onednn(build)
    peers = [Torch(python, isa) for isa in isas if python]
    if peers and peers[0].blas == "reference":
        print("PyTorch's f32 rows are left out: no fast BLAS is installed (Debian: libopenblas0-pthread)")
    return [Ours(build)] + peers + [OneDNN(program, isa) for isa in isas if program]


# --- the table ----------------------------------------------------------------------------------------------------

def measure(case, players):
    rounds = [[player.seconds(case) for player in players] for _ in range(ROUNDS)]
    return [statistics.median(column) if None not in column else None for column in zip(*rounds)]


def row(case, players, seconds):
    mine, cells = seconds[0], []
    for time in seconds:
        rate = f"{TOKENS / time:,.0f}" if time else "-"
        times = f"{time / mine:.2f}" if time and mine else ""
        cells.append(f"{rate:>9}" if time is mine else f"{rate:>11}{times:>7}")
    share = f"{players[0].last['ratio']:7.2f} of {players[0].last['limit_name']:<18}" if mine else " " * 29
    return f"{case:<24}" + cells[0] + share + "".join(cells[1:])


def main():
    build = sys.argv[1] if len(sys.argv) > 1 else "build"
    if not os.access(os.path.join(build, "bench"), os.X_OK):
        sys.exit(f"bench_peers: {build}/bench is missing: run `make bench` first")
    players = contestants(build)
    print("Tokens per second of processor time, one thread; beside each peer how many times as fast ours is.\n"
          "oneDNN: its matrix product alone, without pooling.\n")
    print(f"{'':<24}{'ours':>9}{'share':>7} of limit{'':<13}" +
          "".join(f"{player.title:>18}" for player in players[1:]))
    for case in CASES:
        print(row(case, players, measure(case, players)), flush=True)
    for player in players:
        if isinstance(player, Torch):
            player.close()


if __name__ == "__main__":
    torch_child() if sys.argv[1:] == ["--torch-child"] else main()
