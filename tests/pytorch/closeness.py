"""How near build/compress has to come to the formulas, stage by stage.

Where nothing was rounded to bf16 yet: 2e-5. Behind a rounding point a number now and then lies at a tie, which another
order of summing decides the other way: 98.5 % of a stage's elements are to be equal, the others within 2 steps of bf16
at the largest magnitude of their row. Equal is to the bit where the stage is in bf16, else within 1e-4: through the
norm one channel at a tie moves its whole row by almost as much, and a point forgotten moves most numbers by more.
"""

import torch

STAGES = ("kv", "gate", "pooled", "latent", "out")
NEAR, EQUAL, SHARE = 2e-5, 1e-4, 0.985
STEPS = 2 / 128  # a step of bf16 is at most 1 / 128 of a number
BEHIND = {"kv": {"projection"}, "gate": {"projection"}}  # the points that a stage lies behind, `params` apart
BEHIND["pooled"] = BEHIND["kv"] | {"score", "weight", "product", "pooled"}
BEHIND["latent"] = BEHIND["pooled"] | {"normed", "scaled"}
BEHIND["out"] = BEHIND["latent"] | {"trig", "rotated", "row"}
ENDS = {"kv": {"projection"}, "gate": {"projection"}, "pooled": {"pooled"}, "latent": {"scaled"}, "out": {"row"}}


class Failure(Exception):
    pass


def expect(condition, text):
    if not condition:
        raise Failure(text)


def distance(got, want):
    """Each element's distance in units of its row's largest magnitude, at least 1."""
    got, want = got.double(), want.double()
    return (got - want).abs() / want.abs().amax(-1, keepdim=True).clamp(min=1)


class Tally:
    """Holds the stages of cases against the formulas, and adds up the equal ones to be told."""

    def __init__(self):
        self.equal, self.count, self.furthest = dict.fromkeys(STAGES, 0), dict.fromkeys(STAGES, 0), 0.0

    def add(self, case, points, got):
        with torch.no_grad():
            want = case.reference(points)(case.x)
        for stage, expected in want.items():
            self.add_stage(stage, points, got[stage], expected, case)

    def add_stage(self, stage, points, got, want, case):
        expect(got.shape == want.shape, f"{stage} is {list(got.shape)}, not {list(want.shape)}: {case}")
        if not got.numel():
            return
        narrow = bool(ENDS[stage] & points) or got.dtype == torch.bfloat16
        rounded = narrow or bool(BEHIND[stage] & points)
        want = want.to(got.dtype)
        away, limit = distance(got, want), STEPS if rounded else NEAR
        expect(away.max() <= limit, f"{stage} is {away.max():.2g} away, more than {limit:.2g}: {case}")
        equal = ((got == want) if narrow else (away <= EQUAL)).sum().item()
        expect(equal >= SHARE * got.numel(), f"only {equal / got.numel():.4f} of {stage} is equal: {case}")
        self.equal[stage] += equal
        self.count[stage] += got.numel()
        self.furthest = max(self.furthest, away.max().item())

    def __str__(self):
        shares = [f"{stage} {self.equal[stage] / count:.4f}" for stage, count in self.count.items() if count]
        return " ".join([*shares, f"furthest {self.furthest:.1e}"])
