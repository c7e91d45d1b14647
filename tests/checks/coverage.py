#!/usr/bin/env python3
"""Lines and branches of dsv4_compressor.h from gcov's JSON; see coverage.sh. Lists what is not reached.

    coverage.py JSON HEADER WITHOUT    WITHOUT, for the last line, names what was left out; may be empty

A kernel is compiled once for each instruction set, as dsv4__SET_name. All of its instances have the same branches on a
line, in the same order; a branch is taken where one of them takes it. The question to the system for AMX's tiles is
asked on CPUs alone that have them; on others its function is left out."""

import collections
import json
import sys

HEADER = "dsv4_compressor.h"


def main():
    with open(sys.argv[1]) as file:
        files = json.load(file)["files"]
    lines = collections.Counter()
    branches = collections.defaultdict(dict)  # line -> instances' shape -> counts of each branch
    for line in next(entry for entry in files if entry["file"].endswith(HEADER))["lines"]:
        number, taken = line["line_number"], [branch["count"] for branch in line["branches"]]
        lines[number] += line["count"]
        sums = branches[number].setdefault(len(taken), [0] * len(taken))
        branches[number][len(taken)] = [a + b for a, b in zip(sums, taken)]

    with open(sys.argv[2]) as file:
        source = file.read().splitlines()
    with open("/proc/cpuinfo") as file:
        amx = "amx_bf16" in file.read()
    first = next(i for i, line in enumerate(source, 1) if "unsigned dsv4__tiles_granted(" in line)
    total = reached = 0
    for number in sorted(lines):
        if not amx and first <= number <= source.index("}", first) + 1:
            del lines[number]
            continue
        counts = [count for shape in branches[number].values() for count in shape]
        total += len(counts)
        reached += sum(count > 0 for count in counts)
        missing = [str(i) for i, count in enumerate(counts) if not count]
        if lines[number] == 0:
            print(f"{HEADER}:{number}: never: {source[number - 1].strip()}")
        elif missing:
            print(f"{HEADER}:{number}: branch {', '.join(missing)} of {len(counts)}: {source[number - 1].strip()}")
    executed = sum(count > 0 for count in lines.values())
    print(f"line coverage {100 * executed / len(lines):.1f} % ({executed} of {len(lines)})")
    print(f"{reached} of {total} branches")
    print(f"branch coverage {100 * reached / total:.1f} %" + (f" ({sys.argv[3]})" if sys.argv[3] else ""))


if __name__ == "__main__":
    main()
