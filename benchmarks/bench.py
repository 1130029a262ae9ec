"""stagefuse's CPU code and its peers on the same work, side by side.

Prints a table of times over the time of the best peer: below 1.00 is faster than all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from . import table
from .engines import ENGINES
from .harness import Row, Settings, measure, processes
from .workload import Family, Sizes
from .workloads import chosen


def parser() -> argparse.ArgumentParser:
    known = ",".join(ENGINES)
    made = argparse.ArgumentParser(prog="benchmarks.bench", description=__doc__)
    made.add_argument("--only", metavar="W1,W5a", help="these workloads, by name or its beginning")
    made.add_argument("--engines", default=known, help=f"of {known}")
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    made.add_argument("--isa", choices=("avx2", "avx512"), help="default: what the machine has")
    made.add_argument(
        "--size", default="table", metavar="table|others|tiny|M=64,K=100",
        help="the table's shapes, more shapes of the same families, or one of your own",
    )  # fmt: skip
    made.add_argument("--seconds", type=float, default=0.1, help="of one batch")
    made.add_argument("--tries", type=int, default=3, help="for a batch that nothing disturbs")
    made.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall",
        help="cpu: time of the process, for one thread on a busy machine",
    )  # fmt: skip
    made.add_argument("--seed", type=int, help="of the data; random unless given")
    made.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    made.add_argument("--markdown", type=Path, metavar="FILE", help="write the table")
    made.add_argument("--verbose", action="store_true", help="show what the engines print")
    return made


def settings_of(options: argparse.Namespace) -> Settings:
    if options.clock == "cpu" and options.threads != 1:
        raise SystemExit("--clock cpu needs --threads 1: threads that wait would count")
    engines = tuple(options.engines.split(","))
    for name in engines:
        if name not in ENGINES:
            raise SystemExit(f"no engine is called {name!r}; there are {', '.join(ENGINES)}")
    return Settings(
        engines, options.threads, level(options.isa), options.rounds, options.seconds,
        options.tries, secrets.randbits(31) if options.seed is None else options.seed,
        clock=options.clock, verbose=options.verbose,
    )  # fmt: skip


def level(isa: str | None) -> str:
    """The level of x86-64 to compile for, and whether with AMX: "v3", "v4" or "v4-amx"."""
    from stagefuse.runtime.native import detect_level, may_use_tiles

    has = detect_level()
    if has is None:
        raise SystemExit("this machine has no AVX2, which stagefuse's CPU code needs")
    wanted = {"avx2": "v3", "avx512": "v4", None: has}[isa]
    if wanted > has:
        raise SystemExit(f"this machine has no {isa}")
    return f"{wanted}-amx" if isa is None and may_use_tiles() else wanted


def shapes(family: Family, size: str) -> Sequence[Sizes]:
    """What `--size` asks for in this family."""
    if size == "table":
        return [family.sizes]
    if size == "others":
        return family.others
    if size == "tiny":
        return [family.tiny]
    sizes = dict(family.sizes)
    for pair in size.split(","):
        name, _, value = pair.partition("=")
        if name not in sizes or not value.isdigit():
            raise SystemExit(f"{family.name} has the sizes {', '.join(sizes)}, found {pair!r}")
        sizes[name] = int(value)
    return [sizes]


def main() -> None:
    options = parser().parse_args()
    settings = settings_of(options)
    present = [name for name in settings.engines if ENGINES[name].present]
    lines, rows = [*table.heading(settings), "", *table.header(present)], list[Row]()
    print("\n".join(lines), flush=True)
    with processes(settings) as running:
        for family in chosen(options.only):
            for sizes in shapes(family, options.size):
                row = measure(family, sizes, running, settings, progress)
                rows.append(row)
                added = [table.line(row, present)]
                print("\n".join(added), flush=True)
                lines += added
                for failure in table.failures(row):
                    print(failure, file=sys.stderr)
                if options.json:
                    text = json.dumps(table.as_json(settings, rows), indent=1)
                    options.json.write_text(text, encoding="utf-8")
                if options.markdown:
                    options.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")


def progress(text: str) -> None:
    """A line that the next one replaces, where someone watches."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}\r", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
