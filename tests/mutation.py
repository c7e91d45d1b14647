#!/usr/bin/env python3
"""Changes the header in one place at a time - an operator, a constant, an index - and asks the tests whether they notice.

    tests/mutation.py [--seed 1] [--count 400] [--jobs 2] [--seconds 3600] [--build build/mutation] [--only LINE:COLUMN]

The places are drawn from the implementation by the seed. A change after which the compiler makes the same code is no
change and is not counted. Survivors are listed; tests/mutation_survivors.txt says of each known one why it is
equivalent. Prints as last line: `caught NN.N % (N of N)`.
"""

import argparse
import concurrent.futures
import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

HEADER = "dsv4_compressor.h"
KNOWN = "tests/mutation_survivors.txt"

# What a token may become. Several alternatives: the seed picks one.
SWAPS = {
    "+": ["-"], "-": ["+"], "*": ["+"], "/": ["*"], "%": ["/"],
    "<": ["<=", ">"], "<=": ["<", ">="], ">": [">=", "<"], ">=": [">", "<="],
    "==": ["!="], "!=": ["=="], "&&": ["||"], "||": ["&&"], "!": [""],
    "<<": [">>"], ">>": ["<<"], "&": ["|"], "|": ["&"], "^": ["&"],
    "++": ["--"], "--": ["++"], "+=": ["-="], "-=": ["+="], "*=": ["+="], "|=": ["&="], "&=": ["|="],
    "break": ["continue"], "continue": ["break"], "min": ["max"], "max": ["min"],
}
TOKEN = re.compile(r"""
    (?P<skip>/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|^[ \t]*\#(?:[^\n]*\\\n)*[^\n]*)
  | (?P<number>0[xX][0-9a-fA-F.]+(?:[pP][-+]?\d+)?[uUlLfF]*|\d+\.?\d*(?:[eE][-+]?\d+)?[uUlLfF]*)
  | (?P<word>[A-Za-z_]\w*)
  | (?P<operator><<=|>>=|->|\+\+|--|<<|>>|<=|>=|==|!=|&&|\|\||[-+*/%&|^]=|[-+*/%<>=!&|^~?:;,.(){}\[\]])
""", re.VERBOSE | re.DOTALL | re.MULTILINE)


def other_number(text, choose):
    digits = re.match(r"0[xX][0-9a-fA-F]+|\d+", text)
    if re.fullmatch(r"\d+[uUlL]*|0[xX][0-9a-fA-F]+[uUlL]*", text):
        suffix = text[digits.end():]
        value = int(digits.group(), 0)
        return str(max(value + choose.choice([-1, 1]), 0) if value else 1) + suffix
    if re.fullmatch(r"[\d.]+(?:[eE][-+]?\d+)?[fF]?", text):
        value = float(text.rstrip("fF"))
        return repr(value * 1.001 if value else 1.0) + ("f" if text[-1] in "fF" else "")
    return None


def places(text, choose):
    """(offset, old, new) for every token of the implementation that can be changed."""
    start = text.index("#ifdef DSV4_COMPRESSOR_IMPLEMENTATION")
    before = ";"
    for match in TOKEN.finditer(text, start):
        token, new = match.group(), None
        if match.lastgroup == "skip":
            continue
        if match.lastgroup == "number":
            new = other_number(token, choose)
        elif token in SWAPS and not pointer_or_unary(text, match, before):
            new = choose.choice(SWAPS[token])
        before = token
        if new is not None:
            yield match.start(), token, new


def pointer_or_unary(text, match, before):
    """A `*` of a type or a dereference, a `&` of an address, a sign: changing these gives no program."""
    if match.group() not in "*&-+":
        return False
    spaced = text[match.start() - 1] == " " and text[match.end()] == " "
    return not spaced or before in ("(", ",", "=", "return", "[", "?", ":", ";", "{", "}")


def run(command, seconds, **options):
    """Exit status, or None for a command that outlives its time; its whole process group then ends."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
                               **options)
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


class Bench:
    """Compiles headers and runs the quick tests on them."""

    def __init__(self, options):
        self.options = options
        self.simde = ["-DDSV4_COMPRESSOR_SIMDE=1"] if os.path.exists("/usr/include/simde/x86/sse4.1.h") else []
        self.tests = []

    def compile(self, text, folder):
        """The object file of a header of this text, None where it does not compile. It is compiled under one name
        whatever the folder, so that equal code gives equal bytes."""
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, HEADER), "w") as file:
            file.write(text)
        command = [self.options.cc, "-std=c99", "-w", "-O1", "-DDSV4_COMPRESSOR_IMPLEMENTATION", *self.simde, "-x", "c",
                   "-c", HEADER, "-o", "implementation.o"]
        return os.path.join(folder, "implementation.o") if run(command, 300, cwd=folder) == 0 else None

    def prepare(self, text):
        """Objects of the tests, made once: they see the declarations alone, which no mutation touches."""
        build = self.options.build
        for source in self.options.tests:
            name = os.path.join(build, os.path.basename(source)[:-2])
            subprocess.run([self.options.cc, "-std=c99", "-w", "-O2", "-I.", "-Iexamples", "-Itests", "-pthread", "-c",
                            source, "-o", name + ".o"], check=True)
            self.tests.append(name + ".o")
        original = self.compile(text, os.path.join(build, "original"))
        if not original:
            sys.exit("the header does not compile")
        self.original = self.digest(original)
        started = time.monotonic()
        if self.failing(original, build, 600) is not None:
            sys.exit("the tests fail on the unchanged header")
        self.patience = 10 + 5 * (time.monotonic() - started)

    @staticmethod
    def digest(path):
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()

    def failing(self, implementation, folder, seconds):
        """Name of the first test that fails with this implementation, None where all pass."""
        program = os.path.join(folder, "program")
        for test in self.tests:
            subprocess.run([self.options.cc, test, implementation, "-pthread", "-lm", "-o", program], check=True)
            if run([os.path.abspath(program)], seconds) != 0:
                return os.path.basename(test)[:-2]
        return None

    def judge(self, number, text, place):
        offset, old, new = place
        folder = os.path.join(self.options.build, str(number))
        target = self.compile(text[:offset] + new + text[offset + len(old):], folder)
        if not target:
            verdict = "does not compile"
        elif self.digest(target) == self.original:
            verdict = "same code"
        else:
            test = self.failing(target, folder, self.patience)
            verdict = "survived" if test is None else "caught by " + test
        shutil.rmtree(folder)
        return verdict


def describe(text, place):
    offset, old, new = place
    start = text.rfind("\n", 0, offset) + 1
    line = text[start:text.index("\n", offset)].strip()
    return f"{text.count(chr(10), 0, offset) + 1}:{offset - start + 1}: {old} -> {new or 'nothing'}: {line}"


def known_survivors():
    """Changes that no test can notice: `old -> new: line`, by what stands there rather than by where."""
    if not os.path.exists(KNOWN):
        return set()
    with open(KNOWN) as file:
        return {line.rstrip("\n") for line in file if line.strip() and not line.startswith("#")}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=400, help="changes to try")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=3600, help="no new change is begun after that time")
    parser.add_argument("--build", default="build/mutation")
    parser.add_argument("--cc", default="gcc")
    parser.add_argument("--only", help="LINE:COLUMN of one change")
    parser.add_argument("tests", nargs="*", help="test sources; quick ones first")
    return parser.parse_args()


def main():
    options = arguments()
    options.tests = options.tests or sorted(
        os.path.join("tests", name) for name in os.listdir("tests") if re.fullmatch(r"test_\w+\.c", name))
    with open(HEADER) as file:
        text = file.read()
    choose = random.Random(options.seed)
    chosen = list(places(text, choose))
    choose.shuffle(chosen)
    if options.only:
        chosen = [place for place in chosen if describe(text, place).startswith(options.only + ":")]
    chosen = chosen[:options.count]

    os.makedirs(options.build, exist_ok=True)
    bench = Bench(options)
    bench.prepare(text)
    deadline = time.monotonic() + options.seconds
    known = known_survivors()
    counts = {"caught": 0, "survived": 0, "known": 0, "same code": 0, "does not compile": 0}

    def task(numbered):
        return None if time.monotonic() > deadline else bench.judge(numbered[0], text, numbered[1])

    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for place, verdict in zip(chosen, pool.map(task, enumerate(chosen))):
            if verdict is None:
                continue
            what = describe(text, place)
            kind = verdict.split(" by ")[0]
            if kind == "survived" and what.split(": ", 1)[1] in known:
                kind = "known"
            counts[kind] += 1
            if kind == "survived" or options.only:
                print(f"{verdict}  {HEADER}:{what}", flush=True)

    tried = counts["caught"] + counts["survived"]
    print(f"{counts['same code']} made no difference to the compiler, {counts['does not compile']} did not compile, "
          f"{counts['known']} survived and are known to be equivalent")
    print(f"caught {100 * counts['caught'] / max(tried, 1):.1f} % ({counts['caught']} of {tried})")
    return 0 if tried and counts["caught"] >= 0.95 * tried else 1


if __name__ == "__main__":
    sys.exit(main())
