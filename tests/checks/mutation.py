#!/usr/bin/env python3
"""Changes the header in one place at a time - an operator, a constant, an index - and asks the tests whether they notice.

    tests/checks/mutation.py [--seed 1] [--first 0] [--count 400] [--jobs 2] [--seconds 3600] [--only LINE:COLUMN] [test_api ...]

The seed puts the places of the implementation into an order of which --count are tried from --first on. Where a place
stands in it depends on its line's text alone, so that edits elsewhere leave the rest of the order as it is. Asserts are
left alone: they state what cannot happen.

A change is first compiled with the scalar kernels alone, which takes a second; one that the tests do not notice there
is tried with all kernel sets of this machine. It counts as caught where a test fails, crashes, or runs for ever. A change
after which the compiler makes the same code is none, and is not counted. tests/checks/mutation_survivors.txt lists those that
no test can notice, with the reason: --only tries these too; all others that survive are printed. The last line is `caught NN.N % (N of N)`."""

import argparse
import collections
import concurrent.futures
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time

HEADER = "dsv4_compressor.h"
IMPLEMENTATION = os.path.abspath("tests/support/implementation.c")
WITH_ITS_OWN = ["test_cpu"]  # the header included as a static copy too
KNOWN = "tests/checks/mutation_survivors.txt"
START = "#if defined(DSV4_COMPRESSOR_IMPLEMENTATION)"

# The quick suites, those first that take least time for what they notice; then what wants all kernel sets.
SCALAR_TESTS = ["test_hashes", "test_api", "test_seed", "test_sums", "test_golden", "test_oracle", "test_rows",
                "test_streams", "test_gradients", "test_cpu"]
ALL_TESTS = ["test_serving", "test_bits -t multiply_adds_are_rounded_once", "test_bits -t objects_take_the_memory",
             "test_bits -t every_kernel_set", "test_bits -t published_models",
             "test_extremes -t nothing_is_read_or_written_past_the_end", "test_extremes -t gradients_do_not_pass_the_end",
             *SCALAR_TESTS]

# What a token may become.
SWAPS = {
    "+": ["-"], "-": ["+"], "*": ["+"], "/": ["*"], "%": ["/"],
    "<": ["<=", ">"], "<=": ["<", ">="], ">": [">=", "<"], ">=": [">", "<="],
    "==": ["!="], "!=": ["=="], "&&": ["||"], "||": ["&&"], "!": [""],
    "<<": [">>"], ">>": ["<<"], "&": ["|"], "|": ["&"], "^": ["&"],
    "++": ["--"], "--": ["++"], "+=": ["-="], "-=": ["+="], "*=": ["+="], "|=": ["&="], "&=": ["|="],
    "break": ["continue"], "continue": ["break"], "dsv4__min": ["dsv4__max"], "dsv4__max": ["dsv4__min"],
}
TOKEN = re.compile(r"""
    (?P<skip>/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|^[ \t]*\#(?:[^\n]*\\\n)*[^\n]*
      |DSV4_ASSERT\([^\n]*)
  | (?P<number>0[xX][0-9a-fA-F.]+(?:[pP][-+]?\d+)?[uUlLfF]*|\d+\.?\d*(?:[eE][-+]?\d+)?[uUlLfF]*)
  | (?P<word>[A-Za-z_]\w*)
  | (?P<operator><<=|>>=|->|\+\+|--|<<|>>|<=|>=|==|!=|&&|\|\||[-+*/%&|^]=|[-+*/%<>=!&|^~?:;,.(){}\[\]])
""", re.VERBOSE | re.DOTALL | re.MULTILINE)

Place = collections.namedtuple("Place", "offset old new line column text")


def other_numbers(text):
    """A whole number's neighbours, not below 0; a real one a thousandth larger."""
    if re.fullmatch(r"\d+[uUlL]*|0[xX][0-9a-fA-F]+[uUlL]*", text):
        digits = re.match(r"0[xX][0-9a-fA-F]+|\d+", text)
        value, suffix = int(digits.group(), 0), text[digits.end():]
        return [str(value + 1) + suffix] + ([str(value - 1) + suffix] if value else [])
    if re.fullmatch(r"[\d.]+(?:[eE][-+]?\d+)?[fF]?", text):
        value, suffix = float(text.rstrip("fF")), "f" if text[-1] in "fF" else ""
        return [(repr(value * 1.001) if value else "1.0") + suffix]
    return []


def pointer_or_unary(text, match, before):
    """A `*` of a type or a dereference, a `&` of an address, a sign: changing these gives no program."""
    if match.group() not in "*&-+":
        return False
    spaced = text[match.start() - 1] == " " and text[match.end()] == " "
    return not spaced or before in ("(", ",", "=", "return", "[", "?", ":", ";", "{", "}")


def places(text, seed):
    """The changes, in the order of the seed; which of its alternatives a place takes is the seed's choice too."""
    before, found, seen = ";", [], collections.Counter()
    for match in TOKEN.finditer(text, text.index(START)):
        token, alternatives = match.group(), []
        if match.lastgroup == "skip":
            continue
        if match.lastgroup == "number":
            alternatives = other_numbers(token)
        elif token in SWAPS and not pointer_or_unary(text, match, before):
            alternatives = SWAPS[token]
        before = token
        if not alternatives:
            continue
        begin = text.rfind("\n", 0, match.start()) + 1
        line = text[begin:text.index("\n", begin)].strip()
        key = (token, line)
        seen[key] += 1
        digest = hashlib.sha256(f"{seed} {seen[key]} {token} {line}".encode()).digest()
        place = Place(match.start(), token, alternatives[digest[0] % len(alternatives)],
                      text.count("\n", 0, begin) + 1, match.start() - begin + 1, line)
        found.append((digest[1:], place))
    return [place for _, place in sorted(found)]


def run(command, cpu_seconds, **options):
    """Exit status, or None for a command that outlives its time; its whole process group then ends. Processor time is
    what counts, so that a busy machine does not catch anything; threads that wait for each other get 20 times that."""
    limited = ["sh", "-c", f'ulimit -t {int(cpu_seconds)}; ulimit -v 16000000; exec "$0" "$@"', *command]
    process = subprocess.Popen(limited, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
                               **options)
    try:
        return process.wait(timeout=20 * cpu_seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


class Bench:
    """Compiles headers one way, and runs the quick tests on them."""

    def __init__(self, options, name, flags, tests):
        self.options, self.name, self.flags, self.tests = options, name, flags, tests
        self.original, self.patience = None, {}

    def compile(self, text, folder):
        """The object file of a header of this text, None where it does not compile. It is compiled under one name
        whatever the folder, so that equal code gives equal bytes."""
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, HEADER), "w") as file:
            file.write(text)
        command = [self.options.cc, "-std=c99", "-w", "-O1", "-I.", "-I" + os.path.dirname(IMPLEMENTATION),
                   *self.flags, "-c", IMPLEMENTATION, "-o", self.name + ".o"]
        return os.path.join(folder, self.name + ".o") if run(command, 300, cwd=folder) == 0 else None

    def prepare(self, text):
        original = self.compile(text, os.path.join(self.options.build, "original"))
        if not original:
            sys.exit("the header does not compile")
        self.original = digest(original)
        for test in self.tests:
            before = os.times().children_user
            if self.run_test(test, original, os.path.dirname(original), 600) != 0:
                sys.exit(f"{test} fails on the unchanged header ({self.name})")
            self.patience[test] = 4 + 4 * (os.times().children_user - before)

    def run_test(self, test, implementation, folder, cpu_seconds):
        program = os.path.abspath(os.path.join(folder, "program"))
        name, *arguments = test.split()
        parts = [os.path.join(self.options.build, name + ".o"), implementation]
        if name in WITH_ITS_OWN:
            parts = ["-std=c99", "-w", f"-I{folder}", "-Iexamples", "-Itests/support", f"tests/{name}.c",
                     implementation]
        subprocess.run([self.options.cc, *parts, "-pthread", "-lm", "-o", program], check=True)
        return run([program, "-f", *arguments], cpu_seconds)

    def failing(self, implementation, folder):
        """Name of the first test that fails with this implementation, None where all pass."""
        return next((test for test in self.tests
                     if self.run_test(test, implementation, folder, self.patience[test]) != 0), None)

    def judge(self, text, folder):
        """The verdict on a header: it does not compile, is the same code, was caught by a test, or survived."""
        target = self.compile(text, folder)
        if not target:
            return "does not compile"
        if digest(target) == self.original:
            return "same code"
        test = self.failing(target, folder)
        return "survived" if test is None else "caught by " + test


def digest(path):
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def compile_tests(options):
    """Objects of the tests, made once: they see the declarations alone, which no mutation touches."""
    for test in {test.split()[0] for test in options.tests or ALL_TESTS} - set(WITH_ITS_OWN):
        subprocess.run([options.cc, "-std=c99", "-w", "-O1", "-I.", "-Iexamples", "-Itests/support", "-pthread", "-c",
                        f"tests/{test}.c", "-o", os.path.join(options.build, test + ".o")], check=True)


def benches(options):
    """Scalar kernels alone, by the FMA instruction where there is one; then all kernel sets, without it."""
    simde = ["-DDSV4_COMPRESSOR_SIMDE=1"] if os.path.exists("/usr/include/simde/x86/sse4.1.h") else []
    with open("/proc/cpuinfo") as file:
        fma = ["-mfma"] if re.search(r"^flags\b.* fma\b", file.read(), re.MULTILINE) else []
    return [Bench(options, "scalar", ["-DDSV4_COMPRESSOR_SCALAR", *fma], options.tests or SCALAR_TESTS),
            Bench(options, "all", simde, options.tests or ALL_TESTS)]


def judge(tries, number, text, place):
    """The verdict of the first bench that catches a change, else of the last one."""
    folder = os.path.join(tries[0].options.build, str(number))
    changed = text[:place.offset] + place.new + text[place.offset + len(place.old):]
    verdict = ""
    for bench in tries:
        verdict = bench.judge(changed, folder)
        if verdict.startswith("caught") or verdict == "does not compile":
            break
    shutil.rmtree(folder)
    return verdict


def described(place):
    return f"{place.old} -> {place.new or 'nothing'}: {place.text}"


def known_survivors():
    """Lines `old -> new: line of the header` of KNOWN; `any: line` for all changes of a line."""
    if not os.path.exists(KNOWN):
        return set()
    with open(KNOWN) as file:
        return {line.rstrip("\n") for line in file if line.strip() and not line.startswith("#")}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="changes of the seed's order to leave out")
    parser.add_argument("--count", type=int, default=400, help="changes to try")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=3600, help="no new change is begun after that time")
    parser.add_argument("--build", default="build/mutation")
    parser.add_argument("--cc", default="gcc")
    parser.add_argument("--only", help="LINE:COLUMN of one change, whose verdict is printed")
    parser.add_argument("--verbose", action="store_true", help="print all verdicts")
    parser.add_argument("tests", nargs="*", help="suites to run instead, in that order: test_api, 'test_bits -t NAME'")
    return parser.parse_args()


def main():
    options = arguments()
    with open(HEADER) as file:
        text = file.read()
    chosen = places(text, options.seed)
    total = len(chosen)
    if options.only:
        chosen = [place for place in chosen if f"{place.line}:{place.column}" == options.only]
    else:
        chosen = chosen[options.first:options.first + options.count]

    os.makedirs(options.build, exist_ok=True)
    compile_tests(options)
    tries = benches(options)
    for bench in tries:
        bench.prepare(text)
    deadline = time.monotonic() + options.seconds
    known = known_survivors()
    counts = collections.Counter()

    def is_known(place):
        return described(place) in known or "any: " + place.text in known

    def task(numbered):
        if is_known(numbered[1]) and not options.only:
            return "known"
        return None if time.monotonic() > deadline else judge(tries, numbered[0], text, numbered[1])

    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for place, verdict in zip(chosen, pool.map(task, enumerate(chosen, options.first))):
            kind = verdict.split(" by ")[0] if verdict else "not tried"
            change = described(place)
            if kind == "survived" and is_known(place):
                verdict = kind = "known"
            counts[kind] += 1
            if kind == "survived" or (verdict and (options.only or options.verbose)):
                print(f"{verdict}  {HEADER}:{place.line}:{place.column}: {change}", flush=True)

    counted = counts["caught"] + counts["survived"]
    print(f"seed {options.seed}, places {options.first} to {options.first + len(chosen) - counts['not tried']} of {total}: "
          f"{counts['same code']} made no difference to the compiler, {counts['does not compile']} did not compile, "
          f"{counts['known']} are known to be equivalent")
    print(f"caught {100 * counts['caught'] / max(counted, 1):.1f} % ({counts['caught']} of {counted})")
    return 0 if counted and counts["caught"] >= 0.95 * counted else 1


if __name__ == "__main__":
    sys.exit(main())
