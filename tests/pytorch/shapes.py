"""Ratios, DeepSeek-V4.1, chunks, positions, window 0."""

import torch

from cases import BOTH, draw
from closeness import Tally, expect
from formulas import PRESETS, points_of
from runner import test


@test(1, 2, 3, 4, 7, 8, 16, 31, 64, 127, 128)
def any_ratio_with_windows_that_overlap_or_not(context, ratio):
    tally = Tally()
    for overlap in (False, True):
        for preset in ("none", context.random.choice(list(PRESETS))):
            case = draw(context.random, context.random.choice(BOTH), ratio=ratio, overlap=overlap)
            tally.add(case, points_of(preset), context.program.compress(case, preset))
    context.say(tally)


@test(2, 1)
def deepseek_v41_has_no_ape_and_at_ratio_1_no_gate(context, ratio):
    tally = Tally()
    for preset in PRESETS:
        for x_dtype in BOTH:
            case = draw(context.random, x_dtype, ratio=ratio, overlap=False)
            case.settings.eps = 1e-20
            del case.params["ape"]
            if ratio == 1:
                del case.params["wgate"]
            tally.add(case, points_of(preset), context.program.compress(case, preset))
    context.say(tally)


@test(*PRESETS)
def chunks_of_any_size_give_the_same_bits(context, preset):
    tally = Tally()
    for shape in (dict(ratio=4, overlap=True), dict(ratio=128, overlap=False), dict()):
        case = draw(context.random, context.random.choice(BOTH), **shape)
        whole = context.program.compress(case, preset)
        tally.add(case, points_of(preset), whole)
        for chunk in (context.random.randint(1, 5), context.random.randint(6, case.x.shape[1])):
            pieces = context.program.compress(case, preset, "--chunk", str(chunk))
            for stage in whole:
                expect(torch.equal(whole[stage], pieces[stage]), f"{stage} in chunks of {chunk}: {case}")
    context.say(tally)


@test(-1e4, -3.0)
def window_0_can_be_padded_with_a_gate_of_any_size(context, pad):
    """MaxText's first version had -1e4; the default, -infinity, is every other test's."""
    tally = Tally()
    for preset in ("none", "score", "transformers"):
        case = draw(context.random, overlap=True, entries=1, batch=3, head_dim=128)
        case.settings.pad_gate = pad
        tally.add(case, points_of(preset), context.program.compress(case, preset))
    context.say(tally)


@test(20.0, 2e4)
def window_0_has_no_row_before_it_however_large_the_gates(context, gate):
    """Gates in fp32 are 1e-7 of themselves off, so that large ones decide wrongly where two are nearly equal: most of
    the first entry is right, and none of it is drawn to 0 by a pad."""
    case = draw(context.random, gate=gate, weight_dtype=torch.float32, overlap=True, ratio=4, entries=1, batch=8)
    got, want = context.program.compress(case, "none")["out"], case.reference()(case.x)["out"]
    near = ((got - want).abs() < 1e-3 * max(1, gate / 1000)).float().mean().item()
    expect(near > 0.98, f"{near:.3f} of the first entries is right: {case}")
