"""The nine properties that the compressor's first implementation, in MaxText, is tested for, by the same names."""

import os
import subprocess

import torch

import files
from cases import BOTH, Refused, draw
from closeness import Tally, expect
from formulas import PRESETS, points_of
from runner import test

CSA, HCA = dict(ratio=4, overlap=True), dict(ratio=128, overlap=False)


def has_shapes(context, case, preset="none"):
    """Every stage is there, of its shape, and finite."""
    got = context.program.compress(case, preset)
    batch, tokens, _ = case.x.shape
    columns, head_dim = len(case.params["wkv"]), len(case.params["norm"])
    by_token, by_entry = [batch, tokens, columns], [batch, tokens // case.settings.ratio, head_dim]
    expected = dict(kv=by_token, gate=by_token, pooled=by_entry, latent=by_entry, out=by_entry)
    expect({name: list(tensor.shape) for name, tensor in got.items()} == expected, f"shapes of {case}")
    expect(all(tensor.isfinite().all() for tensor in got.values()), f"not finite: {case}")
    expect(got["out"].dtype == case.x.dtype, f"{got['out'].dtype} out: {case}")


def agrees(context, **shape):
    tally = Tally()
    for preset in PRESETS:
        for x_dtype in BOTH:
            case = draw(context.random, x_dtype, **shape)
            tally.add(case, points_of(preset), context.program.compress(case, preset))
    context.say(tally)


@test()
def csa_shapes(context):
    for batch in (1, 2, 3):
        for entries in (1, 2, 7, 16):
            has_shapes(context, draw(context.random, context.random.choice(BOTH), batch=batch, entries=entries, **CSA))


@test()
def hca_shapes(context):
    for batch in (1, 2):
        for entries in (1, 2, 3):
            has_shapes(context, draw(context.random, context.random.choice(BOTH), batch=batch, entries=entries, **HCA))


@test()
def csa_equivalence_with_pytorch(context):
    agrees(context, **CSA)


@test()
def hca_equivalence_with_pytorch(context):
    agrees(context, **HCA)


@test()
def extreme_batch_sizes(context):
    """No row, one, and a thousand: each row as if it were alone."""
    many = draw(context.random, batch=1000, entries=2, hidden_dim=40, head_dim=24, **CSA)
    tally, together = Tally(), context.program.compress(many, "none")
    tally.add(many, set(), together)
    for rows in (slice(0, 0), slice(0, 1), slice(617, 618)):
        many.x, all_rows = many.x[rows], many.x
        alone = context.program.compress(many, "none")
        many.x = all_rows
        for stage in alone:
            expect(torch.equal(alone[stage], together[stage][rows]), f"{stage} of rows {rows} differs from the batch's")


@test()
def state_splitting(context):
    """Settings and parameters are separate things: the same settings run with other parameters, and neither keeps
    anything of the run before."""
    first = draw(context.random, **CSA)
    shape = dict(hidden_dim=first.x.shape[2], head_dim=len(first.params["norm"]), **CSA)
    second = draw(context.random, **shape)
    second.x, second.settings = first.x, first.settings
    tally, of_first = Tally(), context.program.compress(first, "none")
    of_second = context.program.compress(second, "none")
    tally.add(first, set(), of_first)
    tally.add(second, set(), of_second)
    again = context.program.compress(first, "none")
    expect(all(torch.equal(of_first[stage], again[stage]) for stage in again), "the first parameters' bits changed")
    expect(not torch.equal(of_first["kv"], of_second["kv"]), "other parameters, the same kv")


@test(2, 3, 4, 128)
def lengths_the_ratio_does_not_divide(context, ratio):
    """An error that names both numbers, or, where that is asked for, the entries of the whole windows alone."""
    case = draw(context.random, ratio=ratio, entries=3)
    case.dout, whole = None, case.x
    case.x = whole[:, :-(ratio // 2)]
    try:
        context.program.compress(case, "none")
        expect(False, "a tail was accepted")
    except Refused as refused:
        tokens = case.x.shape[1]
        expect(f" {tokens} " in refused.text and f" {ratio} " in refused.text, refused.text)
        expect(refused.text.count("\n") == 0 and not os.path.exists(context.program.output), "more than one line left")
    dropped = context.program.compress(case, "none", "--drop-tail")
    case.x = whole[:, :2 * ratio]
    without = context.program.compress(case, "none")
    Tally().add(case, set(), without)
    expect(torch.equal(dropped["out"], without["out"]), f"the tail changed an entry: {case}")


def initial(context, seed, hidden_dim=300, head_dim=64, ratio=32):
    """The parameters that dsv4_param_init gives, by tests/pytorch/init.c."""
    path, program = context.program.output, os.path.join(os.path.dirname(context.program.path), "tests", "init")
    subprocess.run([program, path, *map(str, (seed, hidden_dim, head_dim, ratio, 1))], check=True)
    return files.read(path)[0]


def furthest_apart(a, b):
    """Between the shares of `a` and `b` that lie below any number (Kolmogorov and Smirnov's statistic)."""
    both = torch.cat([a.flatten(), b.flatten()])
    steps = torch.cat([torch.full((a.numel(),), 1 / a.numel()), torch.full((b.numel(),), -1 / b.numel())])
    return steps[both.argsort()].double().cumsum(0).abs().max().item()


@test()
def reproducible_random_initialisation(context):
    """A seed's parameters are the same every time, another seed's are others, and they are spread as PyTorch's uniform
    numbers of the same variance."""
    seed = context.random.getrandbits(60)
    first, again, other = initial(context, seed), initial(context, seed), initial(context, seed + 1)
    torch.manual_seed(seed)
    for name, bound in (("wkv", (3 / 300) ** 0.5), ("wgate", (3 / 300) ** 0.5), ("ape", 0.5)):
        expect(torch.equal(first[name], again[name]), f"{name} differs between two runs")
        expect((first[name] == other[name]).float().mean() < 0.01, f"{name} is the same for two seeds")
        drawn = torch.empty_like(first[name]).uniform_(-bound, bound)
        limit = 2.5 * (2 / drawn.numel()) ** 0.5  # exceeded once in 100,000 times
        expect(furthest_apart(first[name], drawn) < limit, f"{name} is not spread as uniform numbers within {bound}")
    expect((first["norm"] == 1).all(), "norm is not 1")


@test()
def varying_hyper_parameters(context):
    tally = Tally()
    for hidden_dim in (1, 7, 64, 300):
        for head_dim in (1, 2, 22, 64, 130):
            for ratio in (1, 2, 5, 32):
                case = draw(context.random, hidden_dim=hidden_dim, head_dim=head_dim, ratio=ratio, batch=2, entries=3,
                            rope_dim=2 * context.random.randint(0, head_dim // 2))
                case.settings.eps = 1e-6 if head_dim > 2 else 1e-2  # one channel near 0 alone is mostly its own error
                tally.add(case, set(), context.program.compress(case, "none"))
    context.say(tally)
