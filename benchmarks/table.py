"""Measurements as tables: on a terminal, as Markdown, and as JSON."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from .engines import ENGINES
from .harness import Row, Settings


def machine() -> str:
    """The processor, its cores and what vector instructions it has."""
    model, flags = platform.machine(), set[str]()
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                model = value.strip()
            elif name.strip() == "flags":
                flags = set(value.split())
                break
    vectors = [v for v in ("avx2", "avx512f", "amx_tile") if v in flags]
    return f"{model}, {len(os.sched_getaffinity(0))} cores usable, {' '.join(vectors)}"


def heading(settings: Settings) -> list[str]:
    """What was measured with what; absent engines are named."""
    present = [name for name in settings.engines if ENGINES[name].present]
    absent = [name for name in settings.engines if name not in present]
    versions = ", ".join(f"{name} {ENGINES[name].version}" for name in present)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    lines = [
        f"Machine: {machine()}; load average at the start {load}.",
        f"Engines: {versions}" + (f"; absent: {', '.join(absent)}." if absent else "."),
        f"{settings.threads} thread(s), x86-64-{settings.level}, {settings.rounds} rounds of "
        f"{settings.seconds:g} s, {settings.clock} time, seed {settings.seed}.",
    ]
    return lines


def shape(row: Row) -> str:
    return " ".join(f"{name}={value}" for name, value in row.sizes.items())


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}"


def header(engines: Sequence[str]) -> list[str]:
    cells = ["workload", *engines, "best peer", "ms", "ours, ms", "quickest calls", "disturbed"]
    return ["| " + " | ".join(cells) + " |", "| " + " | ".join("---" for _ in cells) + " |"]


def line(row: Row, engines: Sequence[str]) -> str:
    """A row of Markdown: times over the best peer's, and what is behind them."""
    best, ours = row.best, row.engines.get("stagefuse")
    cells = [f"{row.name} {row.title}" + (f" ({shape(row)})" if row.sizes else "")]
    for name in engines:
        ratio = row.ratio(name)
        text = "failed" if row.engines[name].failure else f"{ratio:.2f}"
        cells.append(f"**{text}**" if name == "stagefuse" else text)
    cells += [best or "-", milliseconds(median(row.engines[best].times)) if best else "-"]
    measured = ours is not None and bool(ours.times)
    cells.append(milliseconds(median(ours.times)) if ours and measured else "-")
    cells.append(f"{row.least_ratio('stagefuse'):.2f}" if measured else "-")
    batches = sum(len(m.times) for m in row.engines.values())
    cells.append(f"{sum(m.disturbed for m in row.engines.values())}/{batches}")
    return "| " + " | ".join(cells) + " |"


def failures(row: Row) -> list[str]:
    found = row.engines.items()
    return [f"{row.name}: {name}: {m.failure}" for name, m in found if m.failure]


def as_json(settings: Settings, rows: Sequence[Row]) -> dict[str, Any]:
    """Everything, so that other tables can be made of it."""
    return {
        "machine": machine(),
        "settings": asdict(settings),
        "versions": {k: ENGINES[k].version for k in settings.engines if ENGINES[k].present},
        "rows": [asdict(row) | {"best": row.best} for row in rows],
    }
