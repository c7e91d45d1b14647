"""Tests are functions with the name of what they hold; `@test("a", "b")` runs one for each of the values."""

import random
import time
import traceback

from cases import Refused
from closeness import Failure

TESTS = []


def test(*values):
    def add(function):
        for value in values or (None,):
            name = function.__name__ + ("" if value is None else f" [{value}]")
            TESTS.append((name, function, () if value is None else (value,)))
        return function
    return add


class Context:
    """What a test is given: the program, a source of random numbers of its own, and a word for its line."""

    def __init__(self, program, seed, name):
        self.program, self.random, self.said = program, random.Random(f"{seed} {name}"), ""

    def say(self, text):
        self.said = str(text)


def run(program, seed, only=""):
    """[passed, failed]"""
    counts = [0, 0]
    for name, function, arguments in TESTS:
        if only not in name:
            continue
        context, begun, verdict = Context(program, seed, name), time.time(), "ok"
        try:
            function(context, *arguments)
        except (Failure, Refused) as failure:
            verdict, context.said = "FAILED", str(failure)
        except Exception:  # a test that breaks is a failed test; the others still run
            verdict, context.said = "FAILED", traceback.format_exc()
        counts[verdict != "ok"] += 1
        print(f"{verdict:6} {name} ({time.time() - begun:.1f} s) {context.said}", flush=True)
    return counts
