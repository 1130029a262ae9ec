"""What a pipeline takes and gives, as records that print like the source."""

from __future__ import annotations

from stagefuse.compiler.plan import PipelinePlan
from stagefuse.dsl.frozen import frozen


@frozen
class Argument:
    """An input or a result; `name` is None for a result without one."""

    name: str | None
    dtype: str
    shape: tuple[str, ...]

    @property
    def type(self) -> str:
        """Such as `f32[B, 384]`; `f32` for a scalar."""
        return type_text(self.dtype, self.shape)

    def __str__(self) -> str:
        return f"{self.name}: {self.type}" if self.name else self.type


@frozen
class Signature:
    """Inputs and results of a pipeline, the inclusive range of each dimension variable, and what a
    session keeps."""

    name: str
    inputs: tuple[Argument, ...]
    results: tuple[Argument, ...]
    ranges: tuple[tuple[str, str, str | None], ...]
    doc: str = ""
    states: tuple[Argument, ...] = ()

    def __str__(self) -> str:
        inputs = ", ".join(map(str, self.inputs))
        results = ", ".join(map(str, self.results))
        if len(self.results) != 1 or self.results[0].name:
            results = f"({results})"
        where = ", ".join(
            range_text(name, low, high)
            for name, low, high in self.ranges
            if high is not None or low != "0"
        )
        kept = f" state ({', '.join(map(str, self.states))})" if self.states else ""
        return f"{self.name}({inputs}) -> {results}{kept}" + (f" where {where}" if where else "")


def range_text(name: str, low: object, high: object) -> str:
    """A size's range as a source has it; None for an end that is not known, of one at most."""
    if high is None:
        return f"{name} >= {low}"
    return f"{name} <= {high}" if low is None else f"{name} in {low}..={high}"


def type_text(dtype: str, shape: tuple[object, ...]) -> str:
    """A tensor type as the source writes it."""
    return f"{dtype}[{', '.join(map(str, shape))}]" if shape else dtype


def of_plan(plan: PipelinePlan) -> Signature:
    """The signature of a pipeline."""
    return Signature(
        plan.name,
        tuple(Argument(a.name, a.dtype, a.shape) for a in plan.inputs),
        tuple(Argument(a.name, a.dtype, a.shape) for a in plan.results),
        tuple((d.name, d.low, d.high) for d in plan.dims),
        plan.doc,
        tuple(Argument(s.name, s.dtype, s.shape) for s in plan.states),
    )
