"""examples/dsv4.py with torch's tensors, and as a part of a model that torch trains."""

import functools
import os
import shutil
import sys

import torch

from cases import BOTH, draw, generator
from closeness import expect
from gradients import strays
from runner import test

NAMES = ("wkv", "wgate", "ape", "norm")


@functools.lru_cache
def python_interface(compress):
    """dsv4.py, copied beside the header into the folder with `compress`, as its users copy it."""
    root = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
    folder = os.path.join(os.path.dirname(os.path.abspath(compress)), "tests", "python-torch")
    os.makedirs(folder, exist_ok=True)
    for file in ("examples/dsv4.py", "dsv4_compressor.h"):
        shutil.copy(os.path.join(root, file), folder)
    sys.path.insert(0, folder)
    import dsv4
    return dsv4


def compressor(dsv4, case, **more):
    settings = case.settings
    return dsv4.Compressor(**{name: case.params.get(name) for name in NAMES}, ratio=settings.ratio,
                           rope_dim=settings.rope_dim, eps=settings.eps, rope_theta=settings.rope_theta,
                           yarn_factor=settings.yarn_factor, yarn_orig_ctx=settings.yarn_orig_ctx, **more)


def drawn(context, *arguments, **shape):
    """With the standard betas of YaRN, which dsv4.py has no names for."""
    return draw(context.random, *arguments, settings={"start": context.random.randint(0, 100_000)}, **shape)


class Layer(torch.nn.Module):
    """What a user would write: parameters, and the function over them."""

    def __init__(self, dsv4, case, **more):
        super().__init__()
        self.params = torch.nn.ParameterDict({name: value.clone() for name, value in case.params.items()})
        self.start, self.function = case.settings.start, dsv4.torch_function(compressor(dsv4, case, **more)).apply

    def forward(self, x):
        return self.function(x, *(self.params[name] if name in self.params else None for name in NAMES), self.start)


def train(layer, project, x, target, steps=6):
    """Of each step the loss, and the gradients of x and the layer's parameters by their names."""
    optimizer, seen = torch.optim.SGD([*layer.parameters(), project], lr=0.05, momentum=0.9), []
    for _ in range(steps):
        optimizer.zero_grad()
        out = layer(x)
        loss = ((out["out"] if isinstance(out, dict) else out) @ project - target).square().mean()
        loss.backward()
        named = {name.split(".")[-1]: value for name, value in layer.named_parameters()}
        seen.append((loss.item(), {name: value.grad.clone() for name, value in {**named, "x": x}.items()}))
        optimizer.step()
        x.grad = None
    return seen


@test("overlap", "disjoint", "DeepSeek-V4.1")
def a_module_over_dsv4_py_trains_as_the_one_written_in_torch(context, kind):
    """SGD with momentum, losses and gradients step by step, beside the formulas in float64."""
    dsv4 = python_interface(context.program.path)
    case = drawn(context, weight_dtype=torch.float32, overlap=kind == "overlap",
                 ratio=1 if kind == "DeepSeek-V4.1" else context.random.choice((4, 8)))
    if kind == "DeepSeek-V4.1":
        del case.params["ape"], case.params["wgate"]
    source, runs = generator(context.random), []
    project = torch.randn(case.params["norm"].shape[0], 8, generator=source) / 8
    target = torch.randn(*case.dout.shape[:2], 8, generator=source)
    for layer, dtype in ((Layer(dsv4, case, rounding="none"), torch.float32),
                         (case.reference(dtype=torch.float64), torch.float64)):
        leaves = [torch.nn.Parameter(tensor.to(dtype, copy=True)) for tensor in (project, case.x)]
        runs.append(train(layer, *leaves, target.to(dtype)))
    furthest = 0.0
    for step, ((loss, got), (want_loss, want)) in enumerate(zip(*runs)):
        expect(abs(loss - want_loss) <= 1e-5 * want_loss, f"step {step}: loss {loss}, not {want_loss}: {case}")
        expect(got.keys() == want.keys(), f"gradients of {', '.join(got)}, not of {', '.join(want)}")
        furthest = max([furthest, *(strays(got[name], want[name]) for name in got)])
        expect(furthest <= 2e-5, f"step {step}: a gradient strays by {furthest:.2g} of its largest: {case}")
    first, last = runs[0][0][0], runs[0][-1][0]
    expect(last < 0.99 * first, f"the loss goes from {first} to {last}: {case}")
    context.say(f"loss {first:.3f} to {last:.3f}, gradients within {furthest:.1e}")


@test("none", "deepseek", "transformers")
def torch_tensors_give_torch_tensors_with_the_bits_of_the_command_line(context, preset):
    dsv4 = python_interface(context.program.path)
    for x_dtype in BOTH:
        case = drawn(context, x_dtype)
        got = compressor(dsv4, case, rounding=preset)(case.x, case.settings.start, stages=True)
        for name, want in context.program.compress(case, preset).items():
            mine = getattr(got, name)
            expect(mine.dtype == want.dtype and torch.equal(mine, want), f"{name}: {case}")


@test(*BOTH)
def gradients_have_the_types_of_their_tensors_and_are_made_where_wanted(context, dtype):
    dsv4 = python_interface(context.program.path)
    case = drawn(context, dtype, weight_dtype=dtype)
    layer, x = Layer(dsv4, case, rounding="deepseek"), case.x.clone().requires_grad_(True)
    out = layer(x)
    expect(out.dtype == dtype, f"out is {out.dtype}")
    out.backward(case.dout)
    want = context.program.compress(case, "deepseek", "--backward", "dout")
    for name, tensor in [("x", x), *layer.params.items()]:
        expect(torch.equal(tensor.grad, want["d" + name].to(dtype)), f"d{name}: {case}")
    for parameter in layer.parameters():
        parameter.grad = None
    layer.params["wkv"].requires_grad_(False)
    layer(case.x).backward(case.dout)
    expect(layer.params["wkv"].grad is None, "a frozen parameter got a gradient")
    expect(torch.equal(layer.params["norm"].grad, want["dnorm"].to(dtype)), "dnorm beside a frozen wkv")
    scale = torch.ones((), requires_grad=True)
    layer(case.x * scale).backward(case.dout)
    expect(scale.grad is not None and scale.grad.abs() > 0, "no gradient of what x was made from")
    with torch.no_grad():
        expect(torch.equal(layer(case.x), out), "without gradients the entries are the same")
