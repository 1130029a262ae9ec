"""The kernels of a pipeline as rows and as a table: what each fused, moves and computes."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stagefuse.dsl.frozen import frozen

if TYPE_CHECKING:
    from rich.console import JustifyMethod
    from rich.table import Table

    from stagefuse.runtime.report import Kernel, Report


@frozen
class Row:
    """The launches of one kernel: how many, where it comes from, and totals over the launches.

    `lines` are those of the source that it computes. `turns` is how often the recurrences around it
    run, "" for a kernel in none.

    `bytes` and `flops` are what its buffers hold and what its operations count, for given sizes;
    None without sizes. `gpu` holds what is known of the launches on a GPU: registers of a thread,
    bytes of shared memory of a block, the share of an SM's threads that fit at once, predicted
    microseconds over the launches on each of the arch's devices, and what bounds the longest of
    them there; "" for what is not known.
    """

    symbol: str
    label: str
    launches: int
    fused: str
    lines: tuple[int, ...]
    bytes: int | None
    flops: int | None
    gpu: tuple[str, ...] = ()
    turns: str = ""


_WIDTH = 160
"""Characters of a line in files and pipes."""
FUSES = "what it fuses"
_GPU_TITLES = ("regs", "shared", "occupancy", "us", "bound by")


def rows(report: Report, sizes: Mapping[str, int] | None = None) -> list[Row]:
    """One row a kernel, in the order of the first launch, without those of `idle`."""
    launches = _by_symbol(filter(_runs, report.kernels))
    return [_row(symbol, found, sizes, report.level) for symbol, found in launches.items()]


def idle(report: Report) -> list[str]:
    """Kernels of which nothing is launched at the sizes: others do their work there."""
    launches = _by_symbol(report.kernels)
    return [symbol for symbol, found in launches.items() if not any(map(_runs, found))]


def _by_symbol(kernels: Iterable[Kernel]) -> dict[str, list[Kernel]]:
    found: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        found.setdefault(kernel.symbol, []).append(kernel)
    return found


def _runs(kernel: Kernel) -> bool:
    """Whether the launch has blocks at the sizes for which times are predicted, if any are."""
    devices = kernel.notes.get("predicted", {}).get("devices", {})
    return not devices or any(one["microseconds"] for one in devices.values())


def _row(
    symbol: str, launches: list[Kernel], sizes: Mapping[str, int] | None, level: str
) -> Row:
    first = launches[0]
    return Row(
        symbol,
        first.label,
        len(launches),
        _counted(first.notes.get("fused", ())),
        _lines(launches),
        _total(launches, "bytes", sizes),
        _total(launches, "flops", sizes),
        _gpu(launches) if "sm_" in level else (),
        str(first.notes.get("turns", "")),
    )


def _lines(launches: Sequence[Kernel]) -> tuple[int, ...]:
    return tuple(sorted({n for kernel in launches for n in kernel.notes.get("lines", ())}))


def _ranges(lines: Sequence[int]) -> str:
    """`19, 22-24` for (19, 22, 23, 24)."""
    found: list[list[int]] = []
    for line in lines:
        if found and line == found[-1][1] + 1:
            found[-1][1] = line
        else:
            found.append([line, line])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def _gpu(launches: list[Kernel]) -> tuple[str, ...]:
    notes = [kernel.notes for kernel in launches]
    if any("predicted" not in note for note in notes):
        return ("",) * len(_GPU_TITLES)
    first = notes[0]
    spilled = f" +{first['spill bytes']} B spilled" if first.get("spill bytes") else ""
    times = _times(launches)
    bounds = [
        max((note["predicted"]["devices"][device] for note in notes), key=_microseconds)["bound"]
        for device in times
    ]
    return (
        f"{first['registers']}{spilled}",
        str(first.get("shared bytes", "")),
        f"{100 * first.get('occupancy', 0):.0f} %",
        "/".join(f"{time:.1f}" for time in times.values()) if any(times.values()) else "",
        bounds[0] if len(set(bounds)) == 1 else "/".join(bounds),
    )


def _microseconds(one: Mapping[str, Any]) -> float:
    return float(one["microseconds"])


def _times(launches: Sequence[Kernel]) -> dict[str, float]:
    """Microseconds predicted over launches, by device."""
    from stagefuse.dsl.dims_text import parse

    found: dict[str, float] = {}
    for kernel in launches:
        notes = kernel.notes.get("predicted")
        if notes is None:
            continue
        turns = max(parse(str(kernel.notes.get("turns", "1"))).evaluate(notes["sizes"]), 0)
        for name, one in notes["devices"].items():
            found[name] = found.get(name, 0.0) + one["microseconds"] * turns
    return found


def _total(launches: list[Kernel], note: str, sizes: Mapping[str, int] | None) -> int | None:
    from stagefuse.dsl.dims_text import parse

    if sizes is None or any(note not in kernel.notes for kernel in launches):
        return None
    known = dict(sizes)

    def value(kernel: Kernel) -> int:
        one = parse(str(kernel.notes[note])).evaluate(known)
        return one * max(parse(str(kernel.notes.get("turns", "1"))).evaluate(known), 0)

    return sum(map(value, launches))


def _counted(names: Any) -> str:
    """`mul add add` as `mul, 2 add`, in order of first appearance."""
    counts: dict[str, int] = {}
    for name in names:
        counts[str(name)] = counts.get(str(name), 0) + 1
    return ", ".join(name if n == 1 else f"{n} {name}" for name, n in counts.items())


def reasons(report: Report) -> list[str]:
    """Lines of text: for each kernel its place in the source, how it computes products, what was
    fused into it and what was not, and why."""
    return [line for found in _by_symbol(report.kernels).values() for line in _reasons(found)]


def _reasons(launches: Sequence[Kernel]) -> Iterator[str]:
    first, lines = launches[0], _lines(launches)
    where = f", line{'s' * (len(lines) > 1)} {_ranges(lines)}" if lines else ""
    yield f"{first.symbol}  {first.label}{where}"
    if first.notes.get("structure"):
        yield f"    how: {first.notes['structure']}"
    changes = first.notes.get("tuned", {})
    if changes:
        said = ", ".join(f"{n} = {v}" for n, v in changes.items())
        yield f"    tuned: {said}, from the lock file"
    grouped: dict[tuple[bool, str], list[str]] = {}
    for reason in first.notes.get("reasons", ()):
        key = (bool(reason["fused"]), str(reason["because"]))
        grouped.setdefault(key, []).append(reason["node"])
    for (fused, because), names in grouped.items():
        verb = "fused because" if fused else "not fused because"
        yield f"    {_counted(names)}: {verb} {because}"


def show(report: Report, sizes: Mapping[str, int]) -> None:
    """Prints what is known of a pipeline's kernels at some sizes; on a terminal that is too narrow
    for the table, lines go on in the next one, and nothing is left out."""
    from rich.console import Console
    from rich.measure import Measurement

    console = Console(highlight=False)
    found = table(report, sizes)
    endless = console.options.update(max_width=1 << 16)
    least = Measurement.get(console, endless, found).minimum
    console.width = max(console.width if sys.stdout.isatty() else _WIDTH, least)
    console.print(report.signature, markup=False, style="bold", soft_wrap=True)
    console.print(heading(report, sizes), markup=False, soft_wrap=True)
    console.print(found)
    others = idle(report)
    if others:
        console.print(f"at other sizes: {', '.join(others)}", markup=False, soft_wrap=True)
    console.print()
    for line in reasons(report):
        console.print(line, markup=False, soft_wrap=True)
    console.print()


def table(
    report: Report,
    sizes: Mapping[str, int] | None = None,
    seconds: Mapping[str, float] | None = None,
) -> Table:
    """The rows as a rich table; `seconds` are times by kernel symbol, over its launches."""
    from rich.table import Table

    on_gpu = report.level.startswith("sm_")
    titles = ["kernel", *([] if on_gpu else ["computes"]), "lines", "launches", FUSES]
    titles += ("MB", "MFLOP") * (sizes is not None) + ("us",) * (seconds is not None)
    titles += _gpu_titles(report) if on_gpu else ()
    lines: list[list[str]] = []
    for row in rows(report, sizes):
        count = f"{row.launches} x {row.turns}" if row.turns else str(row.launches)
        cells = [row.symbol, _ranges(row.lines), count, row.fused or "copy"]
        if not on_gpu:
            cells.insert(1, row.label.partition(".")[2])
        if sizes is not None:
            cells += [_millions(row.bytes), _millions(row.flops)]
        if seconds is not None:
            cells.append(f"{seconds.get(row.symbol, 0.0) * 1e6:.0f}")
        lines.append([*cells, *row.gpu])
    found = Table(box=None, pad_edge=False, header_style="bold")
    for title, *cells in zip(titles, *lines, strict=True):
        if title == FUSES:
            found.add_column(title, overflow="fold", min_width=len(FUSES))
        else:  # without a least width they are cut where the console is narrow
            justify: JustifyMethod = "left" if title in ("kernel", "computes", "lines") else "right"
            width = max(map(len, (title, *cells)))
            found.add_column(title, justify=justify, no_wrap=True, min_width=width)
    for cells in lines:
        found.add_row(*cells)
    return found


def _millions(count: int | None) -> str:
    if count is None:
        return ""
    small = 0 < count < 10_000  # of which two digits would say little or nothing
    return f"{count / 1e6:.6f}".rstrip("0") if small else f"{count / 1e6:.2f}"


def _gpu_titles(report: Report) -> list[str]:
    named = {"us": f"us {'/'.join(_times(report.kernels))}".rstrip()}
    return [named.get(title, title) for title in _GPU_TITLES]


def heading(report: Report, sizes: Mapping[str, int]) -> str:
    """What the code is for, the sizes of the table, and the times predicted at them."""
    on_gpu = report.level.startswith("sm_")
    where = f"on {report.level}" if on_gpu else f"on x86-64-{report.level}"
    where += "".join(
        f", {count} of {len(report.kernels)} by the code of {arch}"
        for arch, count in Counter(k.notes.get("code of") for k in report.kernels).items()
        if arch is not None
    )
    times = ", ".join(f"{t:.0f} us on {name}" for name, t in _times(report.kernels).items())
    at = ", ".join(f"{name} = {size}" for name, size in sizes.items())
    return where + (f", predicted: {times}" if times else "") + (f" with {at}" if at else "")
