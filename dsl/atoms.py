"""What expressions are made of: symbols, and quotients, remainders, minima and maxima."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakValueDictionary

from .dims_print import wrapped

if TYPE_CHECKING:
    from .dims import Expr


class Atom:
    """A symbol (`kind` is "sym", `name` set) or a function of expressions.

    Equal ones are one object, so that comparing and hashing what is made of them is quick.
    """

    __slots__ = ("__weakref__", "args", "key", "kind", "length", "name", "symbols", "text")
    key: tuple[str, str, tuple[Expr, ...]]
    kind: str
    name: str
    args: tuple[Expr, ...]
    length: int  # terms inside
    symbols: frozenset[str]
    text: str | None

    def __new__(cls, kind: str, name: str = "", args: tuple[Expr, ...] = ()) -> Atom:
        key = (kind, name, args)
        found = _atoms.get(key)
        if found is None:
            with _making:
                found = _atoms.get(key)
                if found is None:
                    found = super().__new__(cls)
                    found.key = found.kind, found.name, found.args = key
                    found.text = name or None
                    found.length = sum(arg.length() for arg in args)
                    found.symbols = NONE.union([name] if name else (), *(x.symbols() for x in args))
                    _atoms[key] = found
        return found

    def __lt__(self, other: Atom) -> bool:
        return self.key < other.key

    def __reduce__(self) -> tuple[Any, ...]:
        return Atom, self.key

    def __repr__(self) -> str:
        return f"Atom({self})"

    def __str__(self) -> str:
        if self.text is None:
            a, b = self.args
            if self.kind in ("min", "max"):
                self.text = f"{self.kind}({a}, {b})"
            else:
                self.text = f"{wrapped(a)} {self.kind} {wrapped(b)}"
        return self.text


_atoms: WeakValueDictionary[tuple[str, str, tuple[Expr, ...]], Atom] = WeakValueDictionary()
_making = Lock()
NONE: frozenset[str] = frozenset()
Monomial: TypeAlias = tuple[tuple[Atom, int], ...]
