"""What the compiler decided about a pipeline, as a value that prints as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stagefuse.compiler.plan import PipelinePlan

from .signature import of_plan


@dataclass(frozen=True)
class Kernel:
    """One step: its symbol, the source's name for it, its iterations, and the compiler's notes."""

    symbol: str
    label: str
    count: str
    grain: str
    notes: dict[str, Any]


@dataclass(frozen=True)
class Report:
    """The kernels of a pipeline in order, its arena's parts in bytes, and notes."""

    signature: str
    level: str
    kernels: tuple[Kernel, ...]
    slots: tuple[str, ...]
    notes: dict[str, Any]

    @staticmethod
    def of_plan(plan: PipelinePlan, level: str) -> Report:
        return Report(
            str(of_plan(plan)),
            level,
            tuple(Kernel(s.symbol, s.label, s.count, s.grain, s.report) for s in plan.steps),
            plan.slots,
            plan.report,
        )

    def __str__(self) -> str:
        lines = [self.signature, f"x86-64-{self.level}, {len(self.kernels)} kernels"]
        width = max((len(k.symbol) for k in self.kernels), default=0)
        for kernel in self.kernels:
            lines.append(f"  {kernel.symbol:<{width}}  {kernel.label}  [{kernel.count}]")
            lines += [f"  {'':<{width}}    {key}: {note}" for key, note in kernel.notes.items()]
        lines += [f"{key}: {note}" for key, note in self.notes.items()]
        return "\n".join(lines)
