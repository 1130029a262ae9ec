"""Index notation: the range of every index, from where its accesses are in bounds."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from stagefuse.dsl.dims import Expr, as_expr, const, expr_of, floordiv, maximum, minimum, mod, sym
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.frozen import frozen
from stagefuse.dsl.source import Span

from .unify import larger_sizes, range_notes

Range = tuple[Expr, Expr]
"""First position and the one after the last."""


@frozen
class Index:
    """One index: its symbol, and its range if the program states one."""

    symbol: str
    name: str
    span: Span
    stated: Range | None = None


@frozen
class Use:
    """One axis of one access: the index expression and the length of the axis."""

    expr: Expr
    extent: Expr
    span: Span
    base: str

    def unwrapped(self) -> Use:
        """The use with `// k` moved to the other side: p // k < n where p < k*n."""
        if len(self.expr.terms) == 1:
            monomial, coefficient = self.expr.terms[0]
            if coefficient == 1 and len(monomial) == 1 and monomial[0][1] == 1:
                atom = monomial[0][0]
                divisor = atom.args[1].as_int() if atom.kind == "//" else None
                if divisor is not None and divisor > 0:
                    return Use(atom.args[0], self.extent * divisor, self.span, self.base)
        return self


class RangeProblem(Exception):
    """No range, two ranges, or one that leaves the bounds."""

    def __init__(
        self,
        message: str,
        span: Span,
        label: str = "",
        other: tuple[Span, str] | None = None,
        notes: list[str] | None = None,
        help: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.span, self.label, self.other = message, span, label, other
        self.notes, self.help = notes or [], help


@frozen
class Later:
    """A condition that only the call can decide: the expression must not be negative."""

    expr: Expr
    message: str
    span: Span


class Ranges:
    """The ranges of the indices of one definition."""

    def __init__(
        self,
        indices: list[Index],
        uses: list[Use],
        facts: Facts,
        steps: Collection[str] = (),
    ) -> None:
        self.facts, self.steps = facts, steps
        self.indices = {index.symbol: index for index in indices}
        self.uses = [use.unwrapped() for use in uses]
        self.found: dict[str, Range] = {}
        self.kept: set[int] = set()
        self.later: list[Later] = []

    def infer(self) -> dict[str, Range]:
        """The range of every index. Raises RangeProblem."""
        for symbol, index in self.indices.items():
            if index.stated is not None:
                self.found[symbol] = index.stated
        stated = set(self.found)
        for symbol in self.indices:
            if symbol not in self.found:
                self._from_plain_uses(symbol)
        for symbol in self.indices:
            if symbol in self.found and symbol not in stated:
                self._narrow(symbol, stated)
        while self._resolve_one():
            pass
        for symbol, index in self.indices.items():
            if symbol not in self.found:
                raise self._not_found(index)
        for number, use in enumerate(self.uses):
            if number not in self.kept:
                self._verify(use)
        return self.found

    def _not_found(self, index: Index) -> RangeProblem:
        """No use bounds the index; one that has it, as `x[(i + 1) % N]`, shows a likely end."""
        use = next((use for use in self.uses if index.symbol in use.expr.symbols()), None)
        return RangeProblem(
            f"the range of `{index.name}` cannot be found",
            index.span,
            "no access says how far it runs",
            (use.span, f"no end of `{index.name}` follows from this") if use is not None else None,
            help=f"state it: `{index.name} in 0..{use.extent if use is not None else 'N'}`",
        )

    def _in(self, use: Use) -> set[str]:
        return {name for name in use.expr.symbols() if name in self.indices}

    def _from_plain_uses(self, symbol: str) -> None:
        plain = [(n, use) for n, use in enumerate(self.uses) if use.expr == sym(symbol)]
        if not plain:
            return
        _, first = plain[0]
        for number, use in plain:
            if not self.facts.prove_eq(first.extent, use.extent):
                name = self.indices[symbol].name
                least = minimum(first.extent, use.extent, self.facts)
                raise RangeProblem(
                    f"the index `{name}` has two sizes",
                    use.span,
                    f"{use.extent} here",
                    (first.span, f"{first.extent} here"),
                    range_notes(self.facts, first.extent, use.extent),
                    f"state its range: `{name} in 0..{least}`",
                )
            self.kept.add(number)
        self.found[symbol] = (const(0), first.extent)

    def _narrow(self, symbol: str, stated: set[str]) -> None:
        """x[i + 1] - x[i]: the plain use gives a first range, the other a smaller one."""
        for number, use in enumerate(self.uses):
            if number in self.kept or symbol not in use.expr.symbols():
                continue
            if self._in(use) - {symbol} <= stated:
                stop = self._stop(use, symbol)
                if stop is not None:
                    low, high = self.found[symbol]
                    self.found[symbol] = (low, minimum(high, stop, self.facts))
                    self.kept.add(number)

    def _resolve_one(self) -> bool:
        for symbol in self.indices:
            if symbol in self.found:
                continue
            stop: Expr | None = None
            for number, use in enumerate(self.uses):
                others = self._in(use) - {symbol}
                if symbol not in use.expr.symbols() or not others <= self.found.keys():
                    continue
                limit = self._stop(use, symbol)
                if limit is not None:
                    stop = limit if stop is None else minimum(stop, limit, self.facts)
                    self.kept.add(number)
            if stop is not None:
                self.found[symbol] = (const(0), stop)
                return True
        return False

    def _stop(self, use: Use, symbol: str) -> Expr | None:
        """The first position from 0 that is out of bounds; None if the use is not linear."""
        slope = use.expr.coefficient(symbol)
        factor = slope.as_int() if slope is not None else None
        if not factor:
            return None
        rest = use.expr.substitute({symbol: 0}, self.facts)
        low, high = self._extreme(rest, False), self._extreme(rest, True)
        if low is None or high is None:
            return None
        last = use.extent - 1
        if factor > 0:
            starts, bound = self.facts.is_nonneg(low), last - high
        else:
            starts, bound = self.facts.prove_le(high, last), low
        if not starts:
            name = self.indices[symbol].name
            raise RangeProblem(
                f"the range of `{name}` does not start at 0",
                use.span,
                f"out of bounds at `{name}` = 0: the axis has {use.extent} "
                f"{'position' if use.extent.as_int() == 1 else 'positions'}",
                help=f"state the range of `{name}`, such as `{name} in a..b`",
            )
        steps = floordiv(bound, abs(factor), self.facts)
        return maximum(steps + 1, 0, self.facts)

    def _ends(self, symbol: str) -> Range:
        if symbol in self.indices:
            return self.found[symbol]
        low, high = self.facts.ranges[symbol]
        return as_expr(low), as_expr(high or 0) + 1

    def _extreme(self, expr: Expr, highest: bool) -> Expr | None:
        """The expression at the end of the known ranges that makes it highest or lowest."""
        for symbol in sorted(expr.symbols()):
            if symbol not in self.indices and symbol not in self.steps:
                continue
            if symbol not in expr.symbols():
                continue  # went with a quotient of several
            slope = expr.coefficient(symbol)
            factor = slope.as_int() if slope is not None else None
            if factor is None:
                found = self._quotient_extreme(expr, symbol, highest)
                if found is None:
                    return None
                expr = found
                continue
            low, stop = self._ends(symbol)
            at = stop - 1 if (factor > 0) == highest else low
            expr = expr.substitute({symbol: at}, self.facts)
        return expr

    def _quotient_extreme(self, expr: Expr, symbol: str, highest: bool) -> Expr | None:
        """The expression with its one quotient or remainder of the symbol at its end, which it
        reaches whatever the rest of the expression is; None where that is not known."""
        terms = [
            (monomial, coefficient)
            for monomial, coefficient in expr.terms
            if any(symbol in atom.symbols for atom, _ in monomial)
        ]
        atom = terms[0][0][0][0]
        if len(terms) != 1 or terms[0][0] != ((atom, 1),) or atom.kind not in ("//", "%"):
            return None
        inside, divisor = atom.args[0], atom.args[1].as_int()
        rest = expr - terms[0][1] * expr_of(atom)
        if divisor is None or divisor <= 0 or rest.symbols() & atom.symbols & self._running():
            return None
        upper = (terms[0][1] > 0) == highest
        end: Expr | None
        if atom.kind == "//":
            end = self._extreme(inside, upper)
            end = None if end is None else floordiv(end, divisor, self.facts)
        else:  # all remainders, if the symbol runs over as many positions, or a multiple of them
            low, stop = self._ends(symbol)
            slope, count = inside.coefficient(symbol), self.facts.simplify(stop - low)
            whole = slope in (const(1), const(-1)) and (
                self.facts.prove_le(divisor, count) or mod(count, divisor) == const(0)
            )
            end = const(divisor - 1 if upper else 0) if whole else None
        return None if end is None else rest + terms[0][1] * end

    def _running(self) -> set[str]:
        return {*self.indices, *self.steps}

    def _verify(self, use: Use) -> None:
        inner = self._within(self.facts)
        last = use.extent - 1
        for highest, gap in ((False, use.expr), (True, last - use.expr)):
            if inner.is_nonneg(gap):
                continue
            worst = self._extreme(use.expr, highest)
            margin = None
            if worst is not None:
                margin = self.facts.simplify(last - worst if highest else worst)
                if self.facts.is_nonneg(margin):
                    continue
            names = sorted(self._in(use))
            indices = [self.indices[name] for name in names]
            undecided = margin is not None and any(
                atom.kind != "sym" for monomial, _ in margin.terms for atom, _ in monomial
            )
            if not indices or undecided:
                at = worst if worst is not None else use.expr
                message = f"index {at} leaves the bounds of `{use.base}`, 0..{use.extent}"
                if margin is not None and not (margin.as_int() is not None):
                    self.later.append(Later(margin, message, use.span))
                    continue
            self._refuse(use, indices, worst, highest, gap)

    def _refuse(
        self, use: Use, indices: list[Index], worst: Expr | None, highest: bool, gap: Expr
    ) -> None:
        if not indices:
            raise RangeProblem(
                f"index {use.expr} is out of bounds", use.span, f"the axis has {use.extent}"
            )
        index = indices[0]
        low, stop = self.found[index.symbol]
        end = "reaches" if highest else "starts at"
        label = f"the axis has {use.extent}"
        if worst is not None:
            label = f"{end} {worst}; {label}"
        verb = "leaves" if len(indices) == 1 else "leave"
        names = " and ".join(f"`{i.name}`" for i in indices)
        noun = "range" if len(indices) == 1 else "ranges"
        raise RangeProblem(
            f"the {noun} of {names} {verb} the bounds of `{use.base}`",
            use.span,
            label,
            (index.span, f"`{index.name}` runs over {low}..{stop}"),
            range_notes(self.facts, use.extent, *([worst] if worst is not None else [])),
            larger_sizes(self.facts, gap.symbols(), lambda f: self._within(f).is_nonneg(gap))
            or f"state a range of `{index.name}` within the bounds",
        )

    def _within(self, facts: Facts) -> Facts:
        """Facts with the indices in their ranges."""
        return facts.with_ranges({s: (low, stop - 1) for s, (low, stop) in self.found.items()})


def positions(found: Mapping[str, Range]) -> dict[str, Expr]:
    """Each index in terms of its symbol counted from 0."""
    return {symbol: sym(symbol) + low for symbol, (low, _) in found.items()}
