"""examples/dsv4.py as a torch.autograd.Function, trained beside the module written in torch."""

import os
import sys

import torch

from cases import draw
from closeness import expect
from gradients import strays
from runner import test

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "examples"))

NAMES = ("wkv", "wgate", "ape", "norm")
STEPS = 5


def train(forward, params, x, target):
    """Losses, and the gradients of the last step, of plain descent."""
    params = {name: value.detach().clone().requires_grad_(True) for name, value in params.items()}
    losses = []
    for _ in range(STEPS):
        loss = (forward(params, x) - target).square().mean()
        gradients = torch.autograd.grad(loss, list(params.values()))
        losses.append(loss.item())
        with torch.no_grad():
            for value, gradient in zip(params.values(), gradients):
                value -= 0.3 * gradient
    return losses, dict(zip(params, gradients))


def by_formulas(case):
    module = case.reference()
    return lambda params, x: torch.func.functional_call(module, params, (x,))["out"]


def by_header(case):
    import dsv4

    s = case.settings
    compressor = dsv4.Compressor(
        *(case.params[name] for name in NAMES), rope_dim=s.rope_dim, eps=s.eps, rope_theta=s.rope_theta,
        yarn_factor=s.yarn_factor, yarn_orig_ctx=s.yarn_orig_ctx, rounding="none", training=True)
    function = dsv4.torch_function(compressor)
    return lambda params, x: function.apply(x, *(params[name] for name in NAMES))


@test(4, 32)
def a_module_of_dsv4_py_trains_as_one_in_torch(context, ratio):
    case = draw(context.random, weight_dtype=torch.float32, ratio=ratio, settings={"start": 0})
    got, got_gradients = train(by_header(case), case.params, case.x, case.dout)
    want, want_gradients = train(by_formulas(case), case.params, case.x, case.dout)
    for step, (a, b) in enumerate(zip(got, want)):
        expect(abs(a - b) <= 1e-4 * b, f"loss {a:.7g}, not {b:.7g} in step {step}: {case}")
    expect(want[-1] < want[0], f"nothing is learned: {want}")
    furthest = max(strays(got_gradients[name], want_gradients[name].double()) for name in NAMES)
    expect(furthest <= 1e-3, f"gradients stray by {furthest:.2g}: {case}")
    context.say(f"{want[0]:.3f} -> {want[-1]:.3f}, gradients within {furthest:.1e}")


@test()
def gradients_reach_what_made_x(context):
    """dx flows on; bf16 parameters get bf16 gradients."""
    case = draw(context.random, torch.bfloat16, torch.bfloat16, ratio=4, overlap=True, settings={"start": 0})
    scale = torch.ones((), requires_grad=True)
    params = {name: value.clone().requires_grad_(True) for name, value in case.params.items()}
    by_header(case)(params, case.x * scale).backward(case.dout)
    expect(scale.grad is not None and scale.grad.abs() > 0, "no gradient of what x was made from")
    for name, value in params.items():
        expect(value.grad.dtype == torch.bfloat16 and value.grad.abs().max() > 0, f"no gradient of {name}")
