"""Random cases, and build/compress run on them through files."""

import dataclasses
import os
import subprocess

import torch

import files
from formulas import Compressor, Settings

BOTH = (torch.float32, torch.bfloat16)


@dataclasses.dataclass
class Case:
    params: dict
    x: torch.Tensor
    settings: Settings
    dout: torch.Tensor = None

    @property
    def overlap(self):
        return self.params["wkv"].shape[0] != self.params["norm"].shape[0]

    def reference(self, points=(), dtype=torch.float32):
        return Compressor(self.params, self.settings, points, dtype)

    def __str__(self):
        tensors = dict(x=self.x, **self.params)
        shapes = [f"{name} {list(tensor.shape)} {str(tensor.dtype)[6:]}" for name, tensor in tensors.items()]
        return ", ".join([*shapes, "overlap" if self.overlap else "disjoint", str(self.settings)])


def generator(random):
    return torch.Generator().manual_seed(random.getrandbits(62))


@dataclasses.dataclass
class Shape:
    """None: drawn."""
    ratio: int = None
    overlap: bool = None
    hidden_dim: int = None
    head_dim: int = None
    rope_dim: int = None
    batch: int = None
    entries: int = None
    numbers: int = 3000  # at least as many in `out`, where `entries` is drawn

    def drawn(self, random):
        def pick(given, low, high):
            return random.randint(low, high) if given is None else given

        shape = dataclasses.replace(self, ratio=pick(self.ratio, 1, 32), overlap=pick(self.overlap, 0, 1) == 1)
        shape.hidden_dim, shape.head_dim = pick(self.hidden_dim, 24, 300), pick(self.head_dim, 24, 160)
        if shape.rope_dim is None:  # enough of the channels for every point in RoPE to show
            shape.rope_dim = 2 * random.randint(shape.head_dim // 8, shape.head_dim // 2)
        shape.batch = pick(self.batch, 1, 3)
        if shape.entries is None:
            shape.entries = self.numbers // (shape.batch * shape.head_dim) + random.randint(1, 3)
        return shape


def draw(random, x_dtype=torch.float32, weight_dtype=None, gate=1.0, settings=None, **shape):
    """Gates and scores have the size 1, times `gate`. weight_dtype None: each parameter in fp32 or bf16."""
    shape = Shape(**shape).drawn(random)
    source = generator(random)
    columns = shape.head_dim * (2 if shape.overlap else 1)

    def normal(*sizes):
        return torch.randn(*sizes, generator=source)

    params = {"wkv": normal(columns, shape.hidden_dim) / shape.hidden_dim ** 0.5,
              "wgate": normal(columns, shape.hidden_dim) / shape.hidden_dim ** 0.5 * gate,
              "ape": normal(shape.ratio, columns) / 2 * gate,
              "norm": 1 + normal(shape.head_dim) / 4}
    for name in params:
        params[name] = params[name].to(weight_dtype or random.choice(BOTH))
    x = normal(shape.batch, shape.entries * shape.ratio, shape.hidden_dim).to(x_dtype)
    dout = normal(shape.batch, shape.entries, shape.head_dim).to(x_dtype)
    return Case(params, x, Settings(shape.ratio, shape.rope_dim, **(settings or rope_settings(random))), dout)


def rope_settings(random):
    """Of the model, without YaRN, or of neither; from a sequence's first token or far behind it."""
    settings = {"start": random.choice((0, random.randint(1, 100_000), random.randint(1, 1 << 24)))}
    kind = random.choice(("model", "plain", "other"))
    if kind == "plain":
        settings["yarn_factor"] = 1
    if kind == "other":
        settings.update(rope_theta=random.choice((10000, 500000)), yarn_factor=random.choice((4, 40)),
                        yarn_orig_ctx=random.choice((4096, 32768)), yarn_beta_fast=random.choice((16, 32)))
    return settings


class Refused(Exception):
    """build/compress ended with an error: its exit status and what it said."""

    def __init__(self, status, text):
        super().__init__(f"build/compress: exit status {status}: {text}")
        self.status, self.text = status, text


class Program:
    """build/compress, with files in a folder of its own."""

    def __init__(self, path, folder):
        self.path = path
        self.weights, self.input, self.output = (os.path.join(folder, name) for name in ("weights", "input", "output"))

    def run(self, weights, source, *options):
        """Of two files to the output's tensors."""
        if os.path.exists(self.output):
            os.remove(self.output)
        command = [self.path, "--weights", weights, "--input", source, "--output", self.output, *options]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise Refused(done.returncode, done.stderr.strip())
        return files.read(self.output)[0]

    def compress(self, case, preset, *options):
        """All stages; the gradients too, where `options` ask for them."""
        settings = dataclasses.asdict(case.settings)
        words = [word for name, value in settings.items() for word in ("--" + name.replace("_", "-"), f"{value:g}"
                 if isinstance(value, float) else str(value))]
        if case.params.get("ape") is None:
            words.append("--no-ape")
        files.write(self.weights, {name: value for name, value in case.params.items() if value is not None})
        files.write(self.input, {"x": case.x, "dout": case.dout} if case.dout is not None else {"x": case.x})
        return self.run(self.weights, self.input, "--preset", preset, "--stages", *words, *options)
