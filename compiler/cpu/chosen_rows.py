"""Rows that positions from data choose: those of the next step are asked for before this one.

The hardware follows the addresses of a row, and not to the next one when that begins wherever data
say, as in a lookup of embeddings or a resize of an image, of which some rows are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stagefuse.compiler.kernel_ir import Checked, For, Index, Load, Statement
from stagefuse.compiler.kernel_ir import Value as KernelValue
from stagefuse.compiler.proofs.bounds import size_of

from .ahead import AheadWriter
from .bodies import is_loop, values_of, walk
from .ir import Value
from .values import post_order

Steps = Sequence[tuple[str, Value]]
"""Parallel indices and their extents."""
SMALL_BYTES = 1 << 20
"""What is known to be no larger stays in the second-level cache."""
MOST_BYTES = 16 << 10
"""Of a row that is asked for: what it begins with."""
LINE_SHIFT = 6
SECOND_LEVEL = 2
"""Of `llvm.prefetch`: the lines of some rows would push others out of the first-level cache."""


class ChosenRowWriter(AheadWriter):
    """The function of a kernel, with what its steps ask for of the next step's rows."""

    def _ask_next(self, body: Sequence[Statement], following: Value, steps: Steps) -> None:
        """Asks for the rows that loops right in the body of a step read in the step of a number."""
        loops = [s for s in body if isinstance(s, For) and not any(map(is_loop, walk(s.body)))]
        chosen = [(s, row) for s in loops for row in self._chosen(s)]
        if not chosen:
            return
        with self._scope():
            self._bind(following, steps)
            for s, row in chosen:
                self._ask_row(row, s.index, self.index(s.lo), self.index(s.hi))

    def _bind(self, flat: Value, steps: Steps) -> None:
        """The parallel indices at a position of the flattened loop around them."""
        code, rest = self.code, flat
        for name, extent in reversed(steps[1:]):
            quotient = code.pure(f"udiv i64 {rest.text}, {extent.text}", "i64")
            self.scopes[-1].indices[name] = rest - quotient * extent
            rest = quotient
        self.scopes[-1].indices[steps[0][0]] = rest

    def _chosen(self, s: For) -> list[Load]:
        """What a loop reads along rows that data choose for each step, one load for each row."""
        found: dict[tuple[str, tuple[int, ...]], Load] = {}
        for value in values_of(s.body):
            for part in post_order(self._unique(value)):
                if isinstance(part, Load) and self._may_be_large(part):
                    row = tuple(self._row_of(part, s.index))
                    if any(self._is_chosen(v) for v in row):
                        found.setdefault((part.buffer, tuple(map(id, row))), part)
        return list(found.values())

    def _may_be_large(self, load: Load) -> bool:
        memory = self.memory[load.buffer]
        known = (size_of(memory.shape) * memory.dtype.itemsize).as_int()
        return load.buffer not in self.written and (known is None or known > SMALL_BYTES)

    def _row_of(self, load: Load, index: str) -> Iterator[KernelValue]:
        """The positions of a load ahead of those that depend on a loop's index; none where they
        can't be told before the step."""
        values = [self._unique(v) for v in load.indices]
        if load.guard or any(map(self._is_unknown, values)):
            return
        for value in values:
            if index in self.names(value):
                return
            yield value

    def _is_unknown(self, value: KernelValue) -> bool:
        """Whether a position takes what is computed in a step, or may be out of range."""
        place = value.value if isinstance(value, Checked) else value
        return any(n.startswith("%") for n in self.names(value)) or any(
            isinstance(part, Checked)
            and not part.proved
            or isinstance(part, Load)
            and (part.guard or part.buffer in self.written)
            for part in post_order(place)
        )

    def _is_chosen(self, value: KernelValue) -> bool:
        """Whether a position comes from data that differ between steps."""
        steps = {name for name, _ in self.kernel.parallel}
        return not isinstance(value, Index) and bool(self.names(value) & steps)

    def _ask_row(self, row: Load, index: str, lo: Value, hi: Value) -> None:
        """Asks for the lines from the first to the last place of a loop that is not empty."""
        code = self.code
        ask, after = code.label("ask"), code.label("asked")
        code.branch_if(lo.compare("lt", hi), ask, after)
        code.start(ask)
        with self._scope():
            first, last = (self._place_in_row(row, index, at) for at in (lo, hi - 1))
            span = code.intrinsic("smin", last - first, code.const(MOST_BYTES - 1, "i64"))
            count = (span + (1 << LINE_SHIFT)).ashr(LINE_SHIFT)

            def line(i: Value, _: list[Value]) -> list[Value]:
                at = code.pure(f"inttoptr i64 {(first + i.shl(LINE_SHIFT)).text} to ptr", "ptr")
                code.line(
                    f"call void @llvm.prefetch.p0(ptr {at.text}, i32 0, i32 {SECOND_LEVEL}, i32 1)"
                )
                return []

            self._loop(code.const(0, "i64"), count, [], line, [], {index}, False, False)
        code.branch(after)
        code.start(after)

    def _place_in_row(self, row: Load, index: str, at: Value) -> Value:
        """The address of what a loop's step reads of a row, as an integer."""
        places = [v.value if isinstance(v, Checked) else v for v in row.indices]
        with self._scope():
            self.scopes[-1].indices[index] = at
            address = self._address(self.memory[row.buffer], places)
            return self.code.pure(f"ptrtoint ptr {address.text} to i64", "i64")
