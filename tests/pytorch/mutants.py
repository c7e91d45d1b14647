"""Are wrong rounding points noticed? For each point a copy of the header that ignores it, and a copy of `compress` from
it, which the tests of presets, points and (where transformers is there) its own modules run on."""

import concurrent.futures
import contextlib
import io
import os
import re
import subprocess

import runner
from cases import Program
from formulas import POINTS, PRESETS, points_of

IMPLEMENTATION = "#if defined(DSV4_COMPRESSOR_IMPLEMENTATION)"


def build(build_folder, point):
    """The path of a `compress` that does not know the point."""
    folder = os.path.join(build_folder, "pytorch-mutants", point)
    os.makedirs(folder, exist_ok=True)
    with open("dsv4_compressor.h") as file:
        public, found, implementation = file.read().partition(IMPLEMENTATION)
    implementation, uses = re.subn(rf"\bDSV4_ROUND_{point.upper()}\b", "0u", implementation)
    if not found or not uses:
        raise SystemExit(f"mutants: the header's implementation does not mention DSV4_ROUND_{point.upper()}")
    with open(os.path.join(folder, "dsv4_compressor.h"), "w") as file:
        file.write(public + found + implementation)
    program = os.path.join(folder, "compress")
    subprocess.run([os.environ.get("CC", "cc"), "-std=c99", "-O1", "-I", folder, "-Iexamples", "-pthread",
                    "examples/compress.c", "-lm", "-o", program], check=True)
    return program


def ought_to_fail(point):
    """The tests that may pass on no `compress` without the point: of the point, and of every preset where it shows.
    (An entry whose channels were all rounded by `scaled` and `rotated` shows no `row`.)"""
    presets = [name for name in PRESETS if point in points_of(name)
               and not (point == "row" and {"scaled", "rotated"} <= points_of(name))]
    return {f"a_point_rounds_there_alone [{point}]",
            *(f"a_preset_rounds_where_its_reference_does [{name}]" for name in presets)}


def run(build_folder, folder, seed):
    """[passed, failed]: points whose absence every test that has them noticed, and those where one did not."""
    counts = [0, 0]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        programs = list(pool.map(lambda point: build(build_folder, point), POINTS))
    for point, path in zip(POINTS, programs):
        told = io.StringIO()
        with contextlib.redirect_stdout(told):
            for name in ("rounds", "transformers"):
                runner.run(Program(path, folder), seed, name)
        failed = set(re.findall(r"^FAILED (\w+(?: \[.*?\])?)", told.getvalue(), re.M))
        passed = set(re.findall(r"^ok +(\w+(?: \[.*?\])?)", told.getvalue(), re.M))
        missed = sorted(ought_to_fail(point) - failed)
        counts[bool(missed)] += 1
        print(f"{'MISSED' if missed else 'ok':6} without {point}: {len(failed)} tests fail, {len(passed)} pass" +
              "".join(f"\n       not noticed by {name}" for name in missed), flush=True)
    return counts
