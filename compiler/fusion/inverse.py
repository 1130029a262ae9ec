"""Views that only reorder, undone: where each element of what they look at goes."""

from __future__ import annotations

from collections.abc import Sequence

from stagefuse.compiler.buffers import size_of
from stagefuse.compiler.graph import View, flatten_index, split_index
from stagefuse.dsl.dims import Expr, const, sym
from stagefuse.dsl.facts import Facts


def inverse(
    view: View, shape: Sequence[Expr], source: Sequence[Expr], facts: Facts
) -> tuple[Expr, ...] | None:
    """Where each element of the source goes, if a view only reorders: result[at(d...)] = source[d].

    The expressions, one per axis of the result, are over d0, d1... of the source's axes. A view
    is inverted if it leaves no element out and every index is a symbol, a quotient or remainder
    of one (an axis that was joined), or several symbols in row-major order (an axis that was
    split). Both compositions are then proved to be identities; None if that fails.
    """
    if not facts.prove_eq(size_of(shape), size_of(source)):
        return None
    sizes = dict(zip(view.symbols, shape, strict=True))
    at: dict[str, Expr] = {name: const(0) for name in view.symbols}
    for axis, index in enumerate(view.indices):
        here = sym(f"d{axis}")
        parts = _parts(index, sizes)
        if parts is None:
            return None
        names = [name for name, _ in parts]
        if len(parts) == 1:
            ((name, step),) = parts
            at[name] = at[name] + here * step
        else:
            pieces = split_index(here, [sizes[n] for n in names], _ranged(facts, source))
            at.update(zip(names, pieces, strict=True))
    forward = _ranged(facts, source)
    found = {name: forward.simplify(e) for name, e in at.items()}
    for axis, index in enumerate(view.indices):
        whole = const(0) if source[axis].as_int() == 1 else sym(f"d{axis}")
        if not forward.prove_eq(index.substitute(found, forward), whole):
            return None
    back = facts.at_element(view.symbols, shape)
    origin = {f"d{axis}": index for axis, index in enumerate(view.indices)}
    for name, expr in found.items():
        whole = const(0) if sizes[name].as_int() == 1 else sym(name)
        if not back.prove_eq(expr.substitute(origin, back), whole):
            return None
    return tuple(found[name] for name in view.symbols)


def _ranged(facts: Facts, shape: Sequence[Expr]) -> Facts:
    return facts.at_element([f"d{a}" for a in range(len(shape))], shape)


def _parts(index: Expr, sizes: dict[str, Expr]) -> list[tuple[str, Expr]] | None:
    """The symbols of an index, outermost first, with the step of the axis within the symbol."""
    if index == const(0):
        return []
    name = index.as_symbol()
    if name is not None:
        return [(name, const(1))]
    used = [n for n in sizes if n in index.symbols()]
    if len(used) > 1:
        flat = flatten_index([sym(n) for n in used], [sizes[n] for n in used])
        return [(n, const(1)) for n in used] if flat == index else None
    if len(index.terms) != 1 or index.terms[0][1] != 1 or len(index.terms[0][0]) != 1:
        return None
    ((atom, power),) = index.terms[0][0]
    if power != 1 or atom.kind not in ("//", "%"):
        return None
    inner, divisor = atom.args
    if atom.kind == "//":
        name = inner.as_symbol()
        return None if name is None else [(name, divisor)]
    below = _parts(inner, sizes)
    return below if below is not None and len(below) == 1 else None
