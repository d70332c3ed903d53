"""`python -m faults [CASE ...] [--short] [--seed N] [--out FILE]`; with `-` as the case, names come by standard input
and every result goes to standard output as a line of JSON (tests/faults uses it, to import PyTorch once).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

import orbit.engine
import orbit.plugin
import orbit.trainer  # noqa: F401 (forked cases find everything imported)
from faults.cases import CASES, case
from faults.processes import ChildError, in_child
from faults.result import Result, table

LIMIT = {True: 120.0, False: 1800.0}  # seconds a case may take


def run(name: str, short: bool, seed: int) -> Result:
    """One case, in a process of its own: what it breaks is broken there."""
    try:
        return Result(**in_child(lambda: asdict(case(name)(short, seed)), LIMIT[short]))
    except (ChildError, TimeoutError) as error:
        print(error, file=sys.stderr)
        return Result(name, "did not finish", str(error).strip().splitlines()[-1], False)


def warm() -> None:
    """What takes a second the first time is done here, before anything is forked: the first step imports a lot."""
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 1)).sum().backward()
    optimizer.step()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m faults", description="The fault suite.")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"default: all of {', '.join(CASES)}")
    parser.add_argument("--short", action="store_true", help="seconds a case, as in make test")
    parser.add_argument("--seed", type=int, default=20261121)
    parser.add_argument("--out", type=Path, help="also write the table to this markdown file")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.cases if name not in (*CASES, "-")]:
        parser.error(f"no case {unknown[0]!r}; there are {', '.join(CASES)}")
    torch.set_num_threads(1)
    warm()
    if args.cases == ["-"]:
        with os.fdopen(os.dup(1), "w") as answers:
            os.dup2(2, 1)  # what a case prints is no answer
            for line in sys.stdin:
                print(json.dumps(asdict(run(line.strip(), args.short, args.seed))), file=answers, flush=True)
        return 0
    results = list(_all(args.cases or CASES, args.short, args.seed))
    versions = f"torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}"
    text = (
        f"The fault suite{' (short)' if args.short else ''}; {versions}; seed {args.seed}\n\n{table(results)}"
    )
    print("\n" + text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")
    return 0 if all(result.holds for result in results) else 1


def _all(names: list[str] | tuple[str, ...], short: bool, seed: int) -> Iterator[Result]:
    for name in names:
        began = time.perf_counter()
        result = run(name, short, seed)
        took = time.perf_counter() - began
        print(f"{'holds' if result.holds else 'FAILS'}  {name}: {result.figure}  ({took:.0f} s)", flush=True)
        yield result


if __name__ == "__main__":
    sys.exit(main())
