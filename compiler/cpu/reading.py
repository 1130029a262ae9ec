"""Values of kernel IR, each computed once per scope where it is first needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from functools import cached_property

from stagefuse.compiler.kernel_ir import (
    Checked,
    Const,
    Load,
    Op,
)
from stagefuse.compiler.kernel_ir import Value as KernelValue
from stagefuse.dsl.dims import Expr, const
from stagefuse.dsl.dtypes import F32

from . import scalars
from .ir import Value
from .memory import Memory, Scope
from .values import post_order
from .words import WordWriter

WHOLE = frozenset({"floor", "ceil", "round", "trunc"})
"""Functions that LLVM would make ones of f16 where that is converted first, of which it has no
vectors. A multiplication in between, by a 1 that LLVM does not know, keeps them."""

LONG = 8
"""Sizes that are added up wherever their sum is needed; a sum of more is kept."""


class ValueWriter(WordWriter):
    """The function of a kernel, as far as its values go."""

    @contextmanager
    def _scope(self) -> Iterator[None]:
        self.scopes.append(Scope())
        with self.code.scope():
            yield
        self.scopes.pop()

    @contextmanager
    def _inner_scope(self) -> Iterator[None]:
        """A scope for other bindings in the same block: written values stay usable after."""
        self.scopes.append(Scope())
        yield
        self.scopes.pop()

    def index(self, expr: Expr) -> Value:
        """The i64 value of an expression."""
        if len(expr.terms) > LONG:
            if expr not in self._parted:
                self._parted[expr] = self._part(expr)
            sizes, rest = self._parted[expr]
            if len(sizes.terms) > LONG:
                return self._sum_of_sizes(sizes) + self.index(rest)
        return self._in_full(expr)

    @cached_property
    def _parted(self) -> dict[Expr, tuple[Expr, Expr]]:
        """Sums of many terms: the sizes in them, and the rest."""
        return {}

    def _part(self, expr: Expr) -> tuple[Expr, Expr]:
        names = frozenset(self.kernel.dims)
        own = [t for t in expr.terms if len(t[0]) == 1 and t[0][0][0].name in names]
        sizes = Expr(tuple(own))
        return sizes, expr - sizes

    def _sum_of_sizes(self, expr: Expr) -> Value:
        """What many sizes add up to, from the latest sum that differs by few: the parts of a
        concatenation begin one after the other. LLVM sees a number without parts, since its own
        analysis of addresses takes time with the square of their lengths."""
        if expr.terms[0][1] < 0:
            return -self._sum_of_sizes(-expr)
        for scope in reversed(self.scopes):
            if expr in scope.sums:
                return scope.sums[expr]
        latest = next((s.sums for s in reversed(self.scopes) if s.sums), {})
        total: Value | None = None
        for known, value in [*latest.items()][-1:]:
            step = expr - known
            if len(step.terms) <= LONG:
                total = value + self._in_full(step)
        total = self._in_full(expr) if total is None else total
        total = self.code.pure(f"freeze {total.listed_text}", total.type)
        self.scopes[-1].sums[expr] = total
        return total

    def _in_full(self, expr: Expr) -> Value:
        """The same, term by term."""
        code = self.code
        total: Value | None = None
        for monomial, coefficient in expr.terms:
            factor: Value | None = None
            for atom, power in monomial:
                if atom.kind == "sym":
                    value = self._symbol(atom.name)
                else:
                    a, b = (self.index(arg) for arg in atom.args)
                    value = self._atom(atom.kind, a, b, atom.args[1].as_int())
                for _ in range(power):
                    factor = value if factor is None else factor * value
            if factor is None:
                factor = code.const(coefficient, "i64")
            elif coefficient != 1:
                factor = factor * coefficient
            total = factor if total is None else total + factor
        return total or code.const(0, "i64")

    def _symbol(self, name: str) -> Value:
        for scope in reversed(self.scopes):
            if name in scope.indices:
                return scope.indices[name]
        raise KeyError(f"kernel {self.kernel.name} binds no index {name}")

    def _atom(self, kind: str, a: Value, b: Value, divisor: int | None) -> Value:
        if kind in ("min", "max"):
            return self.code.intrinsic(f"s{kind}", a, b)
        if divisor is not None and divisor > 0 and divisor & (divisor - 1) == 0:
            return a.ashr(divisor.bit_length() - 1) if kind == "//" else a & (divisor - 1)
        if divisor is not None and divisor > 0:
            quotient, rest = a / divisor, self.code.pure(f"srem i64 {a.text}, {divisor}", "i64")
            low = rest.compare("lt", 0)
            if kind == "//":
                return low.select(quotient - 1, quotient)
            return low.select(rest + divisor, rest)
        quotient, rest = scalars.integer_division(self.code, a, b, unsigned=False)
        return quotient if kind == "//" else rest

    def _constant(self, value: Const) -> Value:
        return self.code.const(value.value, scalars.REGISTER[value.dtype.compute.name])

    def _position(self, expr: Expr) -> Value:
        return self.index(expr)

    def _compute(self, value: KernelValue) -> Value:
        if isinstance(value, Load):
            return self._load(value)
        if isinstance(value, Checked):
            return self._checked(value, [])
        assert isinstance(value, Op)
        args = [self.value(a) for a in value.args]
        if value.fn == "cast":
            return scalars.convert(self.code, args[0], value.args[0].dtype, value.dtype)
        if value.fn == "round_to":
            return scalars.round_to(self.code, args[0], value.to or value.dtype)
        if value.fn == "div" and self._divides_all(value):
            return scalars.times_reciprocal(args[0], args[1])
        if value.fn in WHOLE and self._is_f16(value.args[0]):
            one = self.code.const(1.0, args[0].type)
            args[0] = args[0] * self.code.intrinsic("arithmetic.fence", one)
        return scalars.apply(self.code, value.fn, args, value.args[-1].dtype.compute)

    @staticmethod
    def _is_f16(value: KernelValue) -> bool:
        """Whether an f32 is an element of f16 as it was read."""
        return isinstance(value, Load) and value.stored.name == "f16"

    def _divides_all(self, quotient: Op) -> bool:
        """Whether its divisor is that of every iteration of the loop around, and what is divided is
        multiplied by a reciprocal from before the loop.

        A vector of 512 bits is divided in 16 cycles by Intel's processors, and multiplied in f64
        in 6; by those of Zen 4 in 7 and 11. Shorter vectors gain nothing.
        """
        inner = max((n for n, s in enumerate(self.scopes) if s.indices), default=0)
        if self.quick_quotients or not inner:
            return False
        return self._is_over(quotient, self._bound_in(self.scopes[:inner]))

    def _divides_by_one(self, values: Sequence[KernelValue], bound: Set[str]) -> bool:
        """Whether they have quotients whose divisor is the same whatever the indices `bound`."""
        if self.quick_quotients is not None:
            return False
        known = self._bound_in(self.scopes) - bound
        parts = (p for value in values for p in post_order(self._unique(value)))
        return any(isinstance(p, Op) and p.fn == "div" and self._is_over(p, known) for p in parts)

    @contextmanager
    def _dividing(self, quick: bool) -> Iterator[None]:
        """Inside, vectors are divided quickly, or not."""
        self.quick_quotients = quick
        yield
        self.quick_quotients = None

    def _is_over(self, quotient: Op, known: Set[str]) -> bool:
        """Whether it is one of f32 in vectors of 512 bits, and its divisor is of such names."""
        divisor = quotient.args[1]
        if self.module.level != "v4" or quotient.dtype != F32 or self._is_volatile(divisor):
            return False
        return self.names(divisor) <= known

    def _load(self, load: Load) -> Value:
        memory = self.memory[load.buffer]
        guard = [c for c in load.guard if id(self._unique(c)) not in self.sound]
        if not guard:
            return self._read(memory, load.indices)
        code = self.code
        holds = self.value(guard[0])
        for condition in guard[1:]:
            holds = holds & self.value(condition)
        inside, after = code.label("load"), code.label("loaded")
        kind = scalars.REGISTER[memory.dtype.name]
        fill = code.const(load.fill, kind)
        before = code.block
        code.branch_if(holds, inside, after)
        code.start(inside)
        with self._scope():
            found = self._read(memory, load.indices)
        end = code.block
        code.branch(after)
        code.start(after)
        return code.emit(f"phi {kind} [ {fill.text}, %{before} ], [ {found.text}, %{end} ]", kind)

    def _read(self, memory: Memory, indices: Sequence[KernelValue]) -> Value:
        if self.groups and memory.pointer.text in self.words and self._is_scattered(indices):
            return scalars.from_memory(self.code, self._byte(memory, indices), memory.dtype)
        at = self._address(memory, indices)
        kind = scalars.MEMORY[memory.dtype.name]
        raw = self.code.emit(
            f"load {kind}, ptr {at.text}, align {memory.dtype.itemsize}"
            f"{memory.alias}{self._access()}",
            kind,
        )
        return scalars.from_memory(self.code, raw, memory.dtype)

    def _checked(self, checked: Checked, guards: Sequence[KernelValue]) -> Value:
        """The position, after noting one out of range unless a guard fails."""
        if checked.proved:
            return self.value(checked.value)
        code = self.code
        given, place, inside = self._wrapped(checked)
        if id(checked) in self.sound:
            return place
        fine = inside
        for guard in guards:
            fine = fine | (self.value(guard) ^ 1)
        self.module.helpers["sf.report"] = REPORT
        report, after = code.label("report"), code.label("checked")
        code.branch_if(fine, after, report)
        code.start(report)
        code.line(f"call void @sf.report(ptr %status, i64 {checked.site + 1}, i64 {given.text})")
        code.branch(after)
        code.start(after)
        return inside.select(place, 0)

    def _wrapped(self, checked: Checked) -> tuple[Value, Value, Value]:
        """A position as it is given, counted from the start, and whether it is in range."""
        given, extent = self.value(checked.value), self.index(checked.extent)
        place = given.compare("lt", 0).select(given + extent, given)
        if checked.length != const(1):
            extent = extent - self.index(checked.length - 1)
        inside = place.compare("lt", extent, unsigned=True) & extent.compare("gt", 0)
        return given, place, inside


REPORT = """
define internal void @sf.report(ptr %status, i64 %site, i64 %value) noinline cold nounwind {
entry:
  %swapped = cmpxchg ptr %status, i64 0, i64 %site seq_cst seq_cst, align 8
  %first = extractvalue { i64, i1 } %swapped, 1
  br i1 %first, label %note, label %done
note:
  %slot = getelementptr i64, ptr %status, i64 1
  store i64 %value, ptr %slot, align 8
  br label %done
done:
  ret void
}
"""
