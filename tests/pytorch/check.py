#!/usr/bin/env python3
"""build/compress beside PyTorch, on random shapes and inputs: the compressor's formulas as a PyTorch module, and, where
transformers is installed, its own modules.

    python3 tests/pytorch/check.py [--build BUILD] [--seed N] [--only TEXT] [--mutants]

The last line is `N passed, N failed`. --only runs the tests whose names contain TEXT, --seed repeats a run, --mutants
counts the rounding points whose absence from the header the tests notice.
"""

import argparse
import os
import secrets
import sys
import tempfile


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", default="build", help="folder that holds `compress`")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 32))
    parser.add_argument("--only", default="", metavar="TEXT")
    parser.add_argument("--mutants", action="store_true")
    return parser.parse_args()


def main():
    given = arguments()
    try:
        import torch
    except ImportError as error:
        print(f"!!! NOTHING WAS COMPARED WITH PYTORCH: {sys.executable} has none ({error}).")
        print("!!! Debian: python3-torch; or pip install torch numpy, and make check-pytorch PYTHON=...")
        print("0 passed, 1 failed")
        return 1
    import cases
    import mutants
    import runner
    import nine, shapes, roundings, gradients, accuracy, trainable, real  # noqa: E401, F401 (each adds its tests)
    versions = f"PyTorch {torch.__version__}, {real.found()}, Python {sys.version.split()[0]}"
    print(f"{versions}, seed {given.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if given.mutants:
            passed, failed = mutants.run(given.build, folder, given.seed)
        else:
            program = cases.Program(os.path.join(given.build, "compress"), folder)
            passed, failed = runner.run(program, given.seed, given.only)
    if failed:
        print(f"the same again: make check-pytorch PYTORCH='--seed {given.seed}'")
    if not real.INSTALLED:
        print(f"!!! {real.found()}: ITS OWN MODULES WERE NOT COMPARED, THE FORMULAS ALONE WERE.")
    print(f"{passed} passed, {failed} failed")
    return failed > 0 or not passed


if __name__ == "__main__":
    sys.exit(main())
