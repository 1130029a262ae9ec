"""What the compiler decided about a pipeline, as a value that prints as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stagefuse.compiler.plan import GpuPlan, PipelinePlan
from stagefuse.dsl.frozen import frozen

from .aliases import in_place, stand_ins
from .signature import of_plan


@frozen
class Kernel:
    """One step: its symbol, the source's name for it, its iterations, and the compiler's notes.

    On a GPU `count` is the grid in blocks and `grain` the threads of a block.
    """

    symbol: str
    label: str
    count: str
    grain: str
    notes: dict[str, Any]


@frozen
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

    @staticmethod
    def of_gpu(
        plan: PipelinePlan, gpu: GpuPlan, sizes: Mapping[str, int] | None = None
    ) -> Report:
        """With times predicted at sizes, or else at the largest that the pipeline takes."""
        from stagefuse.compiler.gpu.predict import largest, predict
        from stagefuse.runtime.prepared import Evaluator

        at = largest(plan.dims) if sizes is None else dict(sizes)
        kernels = []
        evaluate = Evaluator(at)
        for n, launched in zip(gpu.launches, in_place(gpu, stand_ins(gpu, evaluate)), strict=True):
            found, notes = predict(gpu, launched, at), dict(n.report)
            if found is not None:
                notes["predicted"] = {
                    "sizes": at, "bytes": found.bytes, "flops": found.flops,
                    "devices": {
                        name: {"microseconds": round(time, 2), "bound": bound}
                        for name, (time, bound) in found.devices.items()
                    },
                }  # fmt: skip
            kernels.append(Kernel(n.kernel, n.label, _sides(n.grid), _sides(n.block), notes))
        return Report(str(of_plan(plan)), gpu.arch, tuple(kernels), gpu.slots, plan.report)

    def __str__(self) -> str:
        count = f"{len(self.kernels)} kernel" + ("" if len(self.kernels) == 1 else "s")
        level = self.level if self.level.startswith("sm_") else f"x86-64-{self.level}"
        lines = [self.signature, f"{level}, {count}"]
        for kernel in self.kernels:
            lines += _lines_of(kernel, self.level.startswith("sm_"))
        lines += [f"{key}: {_text(note)}" for key, note in self.notes.items()]
        return "\n".join(lines)


def _sides(sides: tuple[object, ...]) -> str:
    """`n` for (n, 1, 1), else `x * y * z`, each in parentheses where it is more than a name."""
    texts = [str(s) for s in sides]
    while len(texts) > 1 and texts[-1] == "1":
        texts.pop()
    return texts[0] if len(texts) == 1 else " * ".join(
        t if t.isalnum() else f"({t})" for t in texts
    )


def _lines_of(kernel: Kernel, on_gpu: bool) -> list[str]:
    notes = dict(kernel.notes)
    reasons = notes.pop("reasons", ())
    predicted = notes.pop("predicted", None)
    lines = ["", f"{kernel.symbol}  {kernel.label}".rstrip()]
    if on_gpu:
        lines.append(f"  blocks: {kernel.count}, of {kernel.grain} threads")
    else:
        lines.append(f"  iterations: {kernel.count}, {kernel.grain} at a time")
    lines += [f"  {key}: {_text(note)}" for key, note in notes.items() if note not in ("", [])]
    if isinstance(predicted, dict):
        lines.append(f"  predicted: {_prediction(predicted)}")
    for reason in reasons if isinstance(reasons, (list, tuple)) else ():
        if isinstance(reason, dict):
            verb = "fused" if reason.get("fused") else "not fused"
            lines.append(f"  {reason.get('node', '')}: {verb} because {reason.get('because', '')}")
    return lines


def _prediction(notes: dict[str, Any]) -> str:
    sizes = ", ".join(f"{name} = {size}" for name, size in notes["sizes"].items())
    times = ", ".join(
        f"{one['microseconds']} us on {name} (bound by {one['bound']})"
        for name, one in notes["devices"].items()
    )
    return times + (f" with {sizes}" if sizes else "")


def _text(note: object) -> str:
    return ", ".join(map(str, note)) if isinstance(note, (list, tuple)) else str(note)
