"""``python -m tests.fuzz [--inputs 100000] [--start 0] [READER ...]``: exit code 1 after a finding."""

from __future__ import annotations

import argparse
import sys
import time

from tests.fuzz.readers import READERS
from tests.fuzz.run import fuzz

BATCH = 5_000
"""Inputs a child process."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--start", type=int, default=0, help="number of the first input")
    parser.add_argument("readers", nargs="*", metavar="READER", help=", ".join(READERS))
    options = parser.parse_args()
    for name in options.readers:
        if name not in READERS:
            parser.error(f"no reader {name}; there are {', '.join(READERS)}")
    code = 0
    for name in options.readers or READERS:
        begin, valid, refused, findings = time.monotonic(), 0, 0, []
        end = options.start + options.inputs
        for start in range(options.start, end, BATCH):
            outcome = fuzz(name, start, min(start + BATCH, end))
            valid, refused = valid + outcome.valid, refused + outcome.refused
            findings += outcome.findings
        seconds = time.monotonic() - begin
        print(
            f"{name}: {options.inputs:,} inputs, {valid:,} valid, {refused:,} refused,"
            f" {len(findings)} findings, {seconds:.0f} s",
            flush=True,
        )
        for number, what in findings[:20]:
            print(f"  input {number}: {what}", flush=True)
        code = code or int(bool(findings))
    return code


if __name__ == "__main__":
    sys.exit(main())
