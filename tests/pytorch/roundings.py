"""Presets and rounding points."""

from cases import draw, BOTH
from closeness import Tally
from formulas import POINTS, PRESETS, points_of
from runner import test


def cases(random):
    """Every dtype of x beside every dtype of weights, where a point could show or hide; CSA, HCA and others."""
    for x_dtype in BOTH:
        for weight_dtype in (*BOTH, None):
            yield draw(random, x_dtype, weight_dtype, ratio=4, overlap=True)
            yield draw(random, x_dtype, weight_dtype)
    yield draw(random, BOTH[1], BOTH[1], ratio=128, overlap=False)


def agrees(context, preset):
    tally, points = Tally(), points_of(preset)
    for case in cases(context.random):
        tally.add(case, points, context.program.compress(case, preset))
    context.say(tally)


@test(*PRESETS)
def a_preset_rounds_where_its_reference_does(context, preset):
    agrees(context, preset)


@test(*POINTS)
def a_point_rounds_there_alone(context, point):
    agrees(context, point)


@test(1, 2, 3, 4)
def any_sum_of_points_rounds_at_those(context, _):
    agrees(context, "+".join(context.random.sample(POINTS, context.random.randint(2, 6))))
