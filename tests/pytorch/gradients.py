"""Gradients against float64 autograd."""

import torch

from cases import BOTH, draw
from closeness import expect
from formulas import PRESETS, points_of
from runner import test


def by_autograd(case, points=(), dtype=torch.float64):
    """The gradients of sum(out * dout)."""
    module, x = case.reference(points, dtype), case.x.to(dtype).requires_grad_(True)
    given = [x, *module.parameters()]
    out = module(x)["out"]
    gradients = torch.autograd.grad(out, given, case.dout.to(dtype))
    return dict(zip(["dx", *("d" + name for name, _ in module.named_parameters())], gradients))


def strays(got, want):
    """The furthest element, as a share of the tensor's largest magnitude."""
    return ((got.double() - want).abs().max() / want.abs().max().clamp(min=1e-6)).item()  # 0: a gate of one row


def agree(context, case, preset, limit):
    got = context.program.compress(case, preset, "--backward", "dout")
    furthest = 0.0
    for name, want in by_autograd(case, points_of(preset)).items():
        far = strays(got[name], want)
        expect(far <= limit, f"{name} strays by {far:.2g} of its largest: {case}")
        furthest = max(furthest, far)
    return furthest


@test(1, 4, 32, 128)
def fp32_gradients_are_within_5e_6_of_the_largest_at_scores_of_size_1(context, ratio):
    """The size of a score here: gate about 1 and ape about 1/2. (Larger ones make softmax itself worse conditioned:
    accuracy.py has them, beside PyTorch's own error.)"""
    furthest = 0.0
    for overlap in (False, True):
        case = draw(context.random, weight_dtype=torch.float32, ratio=ratio, overlap=overlap)
        furthest = max(furthest, agree(context, case, "none", 5e-6))
    context.say(f"{furthest:.1e}")


@test(2, 1)
def deepseek_v41_gradients_are_as_near(context, ratio):
    case = draw(context.random, weight_dtype=torch.float32, ratio=ratio, overlap=False)
    del case.params["ape"]
    if ratio == 1:
        del case.params["wgate"]
    context.say(f"{agree(context, case, 'none', 5e-6):.1e}")


@test(*PRESETS)
def rounding_to_bf16_counts_as_the_identity(context, preset):
    """The gradients are those of the rounded pipeline with each rounding's gradient passed on, to bf16's accuracy."""
    furthest = 0.0
    for x_dtype in BOTH:
        case = draw(context.random, x_dtype)
        furthest = max(furthest, agree(context, case, preset, 1e-2))
    context.say(f"{furthest:.1e}")
