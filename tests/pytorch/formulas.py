"""The compressor's formulas as a PyTorch module, from the paper's text and the table of rounding points in README.

Rounding to bf16 is torch.bfloat16's own. The same module runs in fp32, as the pipelines do, and in fp64, as the truth
that both fp32 implementations are held against.
"""

import dataclasses
import math

import torch

POINTS = ("params", "projection", "score", "weight", "product", "pooled", "normed", "scaled", "trig", "rotated", "row")
PRESETS = {
    "none": "",
    "deepseek": "pooled+scaled+row",
    "maxtext": "params+projection+weight+product+pooled+normed+scaled+row",
    "transformers": "projection+weight+product+pooled+scaled+trig+row",
    "transformers-5.8": "projection+score+weight+product+pooled+normed+scaled+trig+row",
    "vllm": "row",
    "nemo": "pooled+scaled+trig+row",
    "megatron": "projection+weight+product+pooled+scaled+trig+rotated+row",
}


def points_of(preset):
    """The set of points that a preset's name, a point's, or a sum of such names stands for."""
    points = set()
    for name in preset.split("+"):
        points |= {name} if name in POINTS else points_of(PRESETS[name]) if PRESETS[name] else set()
    return points


@dataclasses.dataclass
class Settings:
    """What the shapes of the parameters do not tell; the defaults are build/compress's."""
    ratio: int
    rope_dim: int = 64
    eps: float = 1e-6
    pad_gate: float = -math.inf
    start: int = 0
    rope_theta: float = 160000
    yarn_factor: float = 16
    yarn_orig_ctx: float = 65536
    yarn_beta_fast: float = 32
    yarn_beta_slow: float = 1


class Bf16(torch.autograd.Function):
    """To bf16 and back. The gradient passes as it is: rounding counts as the identity."""

    @staticmethod
    def forward(_, value):
        return value.to(torch.bfloat16).to(value.dtype)

    @staticmethod
    def backward(_, gradient):
        return gradient


class Compressor(torch.nn.Module):
    """params: wkv [coff D, H]; wgate alike, or None; ape [ratio, coff D], or None; norm [D]."""

    def __init__(self, params, settings, points=(), dtype=torch.float32):
        super().__init__()
        for name in ("wkv", "wgate", "ape", "norm"):
            given = params.get(name)
            self.register_parameter(name, None if given is None else torch.nn.Parameter(given.to(dtype)))
        self.settings, self.points, self.dtype = settings, points, dtype

    def round(self, point, value):
        return Bf16.apply(value) if point in self.points else value

    def forward(self, x):
        """x [B, S, H] to the stages by name; a tail that fills no window is left out of the entries."""
        x = x.to(self.dtype)
        kv, gate = self.project(self.wkv, x), self.project(self.wgate, x)
        pooled = self.round("pooled", self.pool(kv, gate))
        latent = self.scale(pooled)
        stages = {"kv": kv, "gate": gate, "pooled": pooled, "latent": latent,
                  "out": self.round("row", self.rope(latent))}
        return {name: stage for name, stage in stages.items() if stage is not None}

    def project(self, weight, x):
        if weight is None:
            return None
        return self.round("projection", torch.nn.functional.linear(x, self.round("params", weight)))

    def pool(self, kv, gate):
        ratio = self.settings.ratio
        batch, tokens, columns = kv.shape
        shape = batch, tokens // ratio, ratio, columns
        whole = tokens // ratio * ratio
        kv = kv[:, :whole].reshape(shape)
        score = torch.zeros_like(kv) if gate is None else gate[:, :whole].reshape(shape)
        if self.ape is not None:
            score = score + self.round("score", self.ape)
        pad = self.round("score", torch.tensor(self.settings.pad_gate, dtype=self.dtype))
        score = self.windows(self.round("score", score), pad)
        weight = self.round("weight", score.softmax(2))
        return self.round("product", self.windows(kv, 0) * weight).sum(2)

    def windows(self, rows, pad):
        """[B, N, ratio, coff D] to the rows that each entry pools, [B, N, coff ratio, D]: with two series, the first
        one of the window before (`pad` before window 0), then the second one of this window."""
        head_dim = self.norm.shape[0]
        if rows.shape[3] == head_dim:
            return rows
        first = torch.ones_like(rows[:, :1, :, :head_dim]) * pad
        before = torch.cat([first, rows[:, :-1, :, :head_dim]], 1)[:, :rows.shape[1]]
        return torch.cat([before, rows[..., head_dim:]], 2)

    def scale(self, pooled):
        reciprocal = 1 / (pooled.square().mean(-1, keepdim=True) + self.settings.eps).sqrt()
        normed = self.round("normed", pooled * reciprocal)
        return self.round("scaled", normed * self.round("params", self.norm))

    def rope(self, latent):
        """Turns the last rope_dim channels, in pairs (2i, 2i + 1), by the position of the window's first token."""
        settings = self.settings
        if settings.rope_dim == 0:
            return latent
        still, turned = latent[..., :-settings.rope_dim], latent[..., -settings.rope_dim:]
        positions = settings.start + torch.arange(latent.shape[1]) * settings.ratio
        angles = (positions.float()[:, None] * frequencies(settings)).to(self.dtype)
        cos, sin = self.round("trig", angles.cos()), self.round("trig", angles.sin())
        a, b = turned[..., 0::2], turned[..., 1::2]
        pairs = self.sum_of_products(a, cos, b, -sin), self.sum_of_products(b, cos, a, sin)
        return torch.cat([still, torch.stack(pairs, -1).flatten(-2)], -1)

    def sum_of_products(self, a, b, c, d):
        return self.round("rotated", self.round("rotated", a * b) + self.round("rotated", c * d))


def frequencies(settings):
    """[rope_dim / 2] in fp32, the power and its reciprocal each rounded once; YaRN's ramp where its factor is not 1."""
    rope_dim, theta = settings.rope_dim, settings.rope_theta
    pair = torch.arange(rope_dim // 2)
    plain = 1 / (theta ** (2 * pair.double() / rope_dim)).float()
    if settings.yarn_factor == 1:
        return plain

    def pair_that_turns(rotations):
        turn = 2 * math.pi * rotations
        return rope_dim * math.log(settings.yarn_orig_ctx / turn) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(settings.yarn_beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(settings.yarn_beta_slow)), rope_dim - 1)
    ramp = ((pair.float() - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    return plain / settings.yarn_factor * ramp + plain * (1 - ramp)
