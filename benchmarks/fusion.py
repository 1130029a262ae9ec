"""Each fused form beside its unfused one: what fusion gains, and where it would cost.

A form is left out by refusing it where the compiler decides; both codes then take turns in one
process, and the ratio is the fused one's time over the other's. Below 1.00 fusion pays.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any
from unittest.mock import patch

from .bench import level, shapes
from .engines import Bound, Stagefuse
from .workload import Workload
from .workloads import chosen

WORKLOADS = "W1,W2a,W2b,W3a,W3b,W5a,W5d,W6,W7,W8a,W9,W11"
BATCH = 5e-3  # seconds of calls between two readings of the clock


@dataclass(frozen=True)
class Form:
    """What is fused, and the name and replacement of what decides it."""

    what: str
    place: str
    instead: Callable[[Any], Any]


def _refused(_: Any) -> Callable[..., str]:
    return lambda *_: "the benchmark keeps it apart"


def _without(name: str) -> Callable[[Any], Any]:
    """`join` without one of its ways."""
    ways = tuple(way for way in ("placed", "chained", "packed", "thin") if way != name)
    return lambda join: partial(join, joins=ways)


RULES, JOIN = "stagefuse.compiler.fusion.fuse_rules.Rules", "stagefuse.compiler.fusion.join.join"
FORMS = {
    "elements": Form(
        "elements computed where they are used", f"{RULES}._map_refusal", _refused
    ),
    "rows": Form(
        "reductions of rows with what reads them", f"{RULES}._reduce_refusal", _refused
    ),
    "tiles": Form(
        "what follows a product, on its tiles", f"{RULES}._contract_refusal", _refused
    ),
    "placed": Form("results stored in another order", JOIN, _without("placed")),
    "chained": Form("rows between two products", JOIN, _without("chained")),
    "packed": Form("panels packed by who multiplies", JOIN, _without("packed")),
    "layers": Form(
        "layers of one input as one product",
        "stagefuse.compiler.passes.join_products.JoinProducts.run",
        lambda _: lambda self, graph: graph,
    ),
    "sums": Form(
        "a loop and the sum of what it stores",
        "stagefuse.compiler.cpu.folds.FoldWriter._joins",
        lambda _: lambda *_: False,
    ),
}  # fmt: skip


@contextmanager
def without(form: Form) -> Iterator[None]:
    """Inside, the compiler leaves a form out."""
    owner, _, name = form.place.rpartition(".")
    try:
        holder: Any = importlib.import_module(owner)
    except ModuleNotFoundError:
        module, _, cls = owner.rpartition(".")
        holder = getattr(importlib.import_module(module), cls)
    with patch.object(holder, name, form.instead(getattr(holder, name))):
        yield


def compiled(workload: Workload, isa: str, form: Form | None = None) -> tuple[Bound, bytes]:
    """A workload for one thread, with a form left out or with all, and its machine code."""
    engine = Stagefuse(1, isa)
    with without(form) if form is not None else nullcontext():
        plan = engine.plan(workload)
    return engine.bind_plan(plan, workload), b"".join(plan.objects.values())


def ratio(fused: Bound, apart: Bound, rounds: int) -> float:
    """The median over rounds of the first one's processor time over the other's."""
    start = time.process_time()
    apart.run()
    calls = max(1, int(BATCH / max(time.process_time() - start, 1e-6)))

    def seconds(code: Bound) -> float:
        start = time.process_time()
        for _ in range(calls):
            code.run()
        return time.process_time() - start

    both = (fused, apart)
    taken = []
    for number in range(rounds):
        order = both if number % 2 else both[::-1]
        found = {id(code): seconds(code) for code in order}
        taken.append(found[id(fused)] / found[id(apart)])
    return median(taken)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="benchmarks.fusion", description=__doc__)
    made.add_argument("--only", metavar="W1,W5a", default=WORKLOADS, help="these workloads")
    made.add_argument("--forms", default=",".join(FORMS), help=f"of {', '.join(FORMS)}")
    made.add_argument("--rounds", type=int, default=15)
    made.add_argument("--isa", choices=("avx2", "avx512"), help="default: what the machine has")
    made.add_argument(
        "--size", default="table", metavar="table|others|tiny|M=64,K=100",
        help="the table's shapes, more shapes of the same families, or one of your own",
    )  # fmt: skip
    return made


def lines(options: argparse.Namespace) -> Iterator[str]:
    """The table, row by row: a dash where a form makes no difference to the code."""
    forms = {name: FORMS[name] for name in options.forms.split(",")}
    yield "| workload | " + " | ".join(form.what for form in forms.values()) + " |"
    yield "| --- |" + " --- |" * len(forms)
    isa = level(options.isa)
    for family in chosen(options.only):
        for sizes in shapes(family, options.size):
            workload = family.workload(1, sizes)
            fused, code = compiled(workload, isa)
            cells = []
            for form in forms.values():
                apart, other = compiled(workload, isa, form)
                same = code == other
                cells.append("-" if same else f"{ratio(fused, apart, options.rounds):.2f}")
            shape = " ".join(f"{name}={size}" for name, size in sizes.items())
            yield f"| {family.name} {family.title} ({shape}) | " + " | ".join(cells) + " |"


def main() -> None:
    for line in lines(parser().parse_args()):
        print(line, flush=True)


if __name__ == "__main__":
    main()
