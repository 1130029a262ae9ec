"""Positions from data that may be out of range: where they are checked.

A loop with a check in it goes element by element, since a check may report. What a loop does not
change is checked before it, and what it reads from data it first looks through.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from stagefuse.compiler.kernel_ir import Checked, For, Let, Load, Store
from stagefuse.compiler.kernel_ir import Value as KernelValue

from .bodies import at_most, values_of
from .ir import Value
from .reading import ValueWriter
from .values import parts, post_order

FEW = 8
"""Iterations that are not looked through first."""


class CheckWriter(ValueWriter):
    """The function of a kernel, as far as it checks positions ahead."""

    def _scanned(self, loop: For) -> list[KernelValue]:
        """The checks of a vector loop that it can look through before it, if they are all that vary
        in it and of positions that lie in memory as they are, and the conditions of its loads, if
        the loop does not change them."""
        checks: dict[int, KernelValue] = {}
        conditions: dict[int, KernelValue] = {}
        if not loop.vector or not all(isinstance(s, Let | Store) for s in loop.body):
            return []
        if at_most(loop.hi - loop.lo, FEW):
            return []
        for value in values_of(loop.body):
            for part in post_order(self._unique(value)):
                if isinstance(part, Load):
                    conditions |= {id(c): c for c in part.guard}
                elif isinstance(part, Checked) and not part.proved and self._is_within(part, loop):
                    known = self._is_fixed(part, set(), loop.index)
                    if not isinstance(part.value, Load) or not known:
                        return []
                    checks[id(part)] = part
        fixed = all(
            self._is_fixed(c, {loop.index}) and not any(isinstance(p, Load) for p in post_order(c))
            for c in conditions.values()
        )
        return [*checks.values(), *conditions.values()] if checks and fixed else []

    def _is_within(self, value: KernelValue, loop: For) -> bool:
        """Whether a value takes a loop's index or what is computed in the loop."""
        made = {f"%{s.name}" for s in loop.body if isinstance(s, Let)}
        return bool(self.names(value) & {loop.index, *made})

    def _out_of_range(
        self, index: str, checks: Sequence[Checked], i: Value, bad: list[Value]
    ) -> list[Value]:
        """Whether one of the positions is, in an iteration or in one before it."""
        self.scopes[-1].indices[index] = i
        found = bad[0]
        for checked in checks:
            _, _, inside = self._wrapped(checked)
            found = found | (inside ^ 1).to("zext", "i64")
        return [found]

    @contextmanager
    def _holding(self, values: Sequence[KernelValue], hold: bool) -> Iterator[None]:
        """A loop of whose checks and conditions it is known that they all hold, or not."""
        before = self.sound
        if hold:
            self.sound = before | {id(value) for value in values}
        yield
        self.sound = before

    def _hoist(self, ahead: Sequence[KernelValue], bound: set[str]) -> None:
        """Computes the checks that a loop would repeat, each under the guards around it."""
        done: set[int] = set()
        stack: list[tuple[KernelValue, tuple[KernelValue, ...]]] = [
            (self._unique(value), ()) for value in ahead
        ]
        checks: list[tuple[Checked, tuple[KernelValue, ...]]] = []
        while stack:
            value, guards = stack.pop()
            if id(value) in done:
                continue
            done.add(id(value))
            if isinstance(value, Checked) and not value.proved:
                checks.append((value, guards))
            inner = guards
            if isinstance(value, Load):
                inner = (*guards, *value.guard)
                stack.extend((part, guards) for part in value.guard)
            rest = value.indices if isinstance(value, Load) else parts(value)
            stack.extend((part, inner) for part in rest)
        for value, guards in reversed(checks):
            fixed = all(self._is_fixed(v, bound) for v in (value, *guards))
            if fixed and self._known(value) is None:
                self.scopes[-1].values[id(value)] = self._checked(value, guards)
