"""Programs that grow line by line, with what every name of theirs means."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import measured as m
from .measured import FLOATS, INTS, Measured
from .sizes import LARGEST, MOST, ONE, Dim, Shape, Sizes, points, sized


@dataclass
class Node:
    """A name that lines bind, and how its value follows from those of `parents`."""

    name: str
    lines: list[str]
    shape: Shape
    dtype: str
    parents: list[Node]
    meaning: Callable[..., Measured] | None = None  # of the sizes and the parents' values

    @property
    def rank(self) -> int:
        return len(self.shape)


class Growing:
    """A program: inputs, then nodes by random steps, the methods `make_...` of its classes."""

    def __init__(
        self,
        seed: int,
        steps: int = 12,
        floats: str | None = None,
        consts: Sequence[int] = (1, 2, 3, 5, 8),
        first: Sequence[str] = (),
    ) -> None:
        self.rng = random.Random(seed)
        self.names = ("M", "N", "K")
        self.multiple = {
            name: self.rng.choice([1, 1, 1, *(k for k in (2, 4, 16) if k <= LARGEST[name])])
            for name in self.names
        }
        self.least = {
            name: self.rng.choice([0, 0, 0, 1, 2, k]) for name, k in self.multiple.items()
        }
        self.order = self.rng.random() < 0.2  # N <= M
        self.dims = [*map(Dim.of, self.names), *(Dim.of(n) for n in consts)]
        self.float = floats or self.rng.choices(list(FLOATS), (3, 12, 4, 4, 1, 1))[0]
        self.int = self.rng.choice(list(INTS))
        self.nodes: list[Node] = []
        self.functions: list[str] = []
        self.inputs: list[Node] = []
        self.count = 0
        for _ in range(self.rng.randint(2, 5)):
            dtype = self.rng.choices([self.float, self.int, "bool", "i64"], (8, 2, 1, 1))[0]
            self.input(self.shape(), dtype)
        if not any(n.dtype == self.float for n in self.inputs):
            self.input(self.shape(), self.float)
        wanted = len(self.nodes) + steps
        for name in first:
            getattr(self, "begin_" + name)()
        for _ in range(8 * steps):
            if len(self.nodes) >= wanted:
                break
            self.step()

    def shape(self) -> Shape:
        rank = self.rng.choices((0, 1, 2, 3, 4), (1, 4, 8, 5, 2))[0]
        found = tuple(self.rng.choice(self.dims) for _ in range(rank))
        return found if points(found) <= MOST else found[:2]

    def input(self, shape: Shape, dtype: str) -> Node:
        node = Node(f"x{len(self.inputs)}", [], shape, dtype, [])
        self.inputs.append(node)
        self.nodes.append(node)
        return node

    def add(
        self,
        text: str,
        shape: Sequence[Dim],
        dtype: str,
        parents: Sequence[Node],
        meaning: Callable[..., Measured],
    ) -> Node:
        """A node `name = text`; in `text`, `{name}` is the name, and a line break a new line."""
        name = f"v{self.count}"
        self.count += 1
        lines = text.replace("{name}", name).split("\n")
        if "{name}" not in text:
            lines = [f"{name} = {text}"]
        node = Node(name, lines, tuple(shape), dtype, list(parents), meaning)
        self.nodes.append(node)
        return node

    def pick(self, *dtypes: str, least: int = 0, most: int = 5) -> Node | None:
        fits = [
            n for n in self.nodes if (not dtypes or n.dtype in dtypes) and least <= n.rank <= most
        ]
        if not fits:
            return None
        return self.rng.choice(fits[-5:] if self.rng.random() < 0.6 else fits)

    def fits(self, a: Shape, b: Shape) -> Shape | None:
        """The broadcast shape of two, if they do for all sizes."""
        found = []
        for i in range(max(len(a), len(b))):
            x = a[len(a) - 1 - i] if i < len(a) else ONE
            y = b[len(b) - 1 - i] if i < len(b) else ONE
            if x != y and ONE not in (x, y):
                return None
            found.append(y if x == ONE else x)
        return tuple(reversed(found))

    def partner(self, x: Node, *dtypes: str) -> tuple[Node, Shape] | None:
        """Another node that broadcasts with x; x itself at times."""
        fits = [
            (n, s)
            for n in self.nodes
            if n.dtype in (dtypes or (x.dtype,))
            and (s := self.fits(x.shape, n.shape)) is not None
            and len(s) <= 5
        ]
        return self.rng.choice(fits[-6:]) if fits else None

    def axes(self, x: Node) -> list[int]:
        return sorted(self.rng.sample(range(x.rank), self.rng.randint(1, x.rank)))

    def step(self, kind: str | None = None) -> None:
        """A line or a few, or none where nothing fits or what they make is too large."""
        before = len(self.nodes)
        kinds = [name for name in dir(self) if name.startswith("make_")]
        getattr(self, kind or self.rng.choice(kinds))()
        if any(points(n.shape) > MOST for n in self.nodes[before:]):
            del self.nodes[before:]

    def sizes(self, wanted: Sizes) -> Sizes:
        """Sizes that meet the facts of `where`, near those that are wanted."""
        found = {}
        for name, step in self.multiple.items():
            up = -(-wanted[name] // step) * step
            found[name] = max(self._least(name), up if up <= LARGEST[name] else up - step)
        if self.order and found["N"] > found["M"]:
            found["M"] = -(-found["N"] // self.multiple["M"]) * self.multiple["M"]
        return found

    def _least(self, name: str) -> int:
        step = self.multiple[name]
        return -(-self.least[name] // step) * step

    def spare(self, d: Dim) -> int:
        """What may be taken from a size that is no number, whatever its names are."""
        return 0 if d.number is not None else d.at({name: self._least(name) for name in self.names})

    def _where(self, named: set[str]) -> str:
        """What is said of the sizes that the inputs name."""
        facts = [f"{n} in {self.least[n]}..=600" for n in self.names if n in named]
        facts += [f"{n} % {k} == 0" for n, k in self.multiple.items() if n in named and k > 1]
        facts += ["N <= M"] if self.order and {"M", "N"} <= named else []
        return f"\nwhere {', '.join(facts)}:\n" if facts else ":\n"

    def source(self, results: Sequence[Node]) -> str:
        """The text of a program with these results."""
        live = self.live(results)
        used = self.used(live)
        params = ", ".join(f"{n.name}: {_type(n)}" for n in used)
        types = ", ".join(map(_type, results))
        types = f"({types})" if len(results) > 1 else types
        named = {name for n in used for d in n.shape for names, _ in d.terms for name in names}
        where = self._where(named)
        body = "".join(f"    {line}\n" for n in live for line in n.lines)
        last = ", ".join(n.name for n in results)
        head = "".join(["import nn\n\n", *(f"{f}\n" for f in self.functions)])
        return f"{head}pipeline p({params}) -> {types}{where}{body}    {last}\n"

    def live(self, results: Sequence[Node]) -> list[Node]:
        wanted = {id(n) for n in results}
        for n in reversed(self.nodes):
            if id(n) in wanted:
                wanted.update(id(p) for p in n.parents)
        return [n for n in self.nodes if id(n) in wanted]

    def used(self, live: Sequence[Node]) -> list[Node]:
        """The inputs that are read, and those that give sizes."""
        return [n for n in self.inputs if any(n is p for p in live)] or self.inputs[:1]

    def needs(self, results: Sequence[Node]) -> set[str]:
        """Names of sizes that the results speak of and no read input has."""
        live = self.live(results)
        text = " ".join(
            [str(d) for n in live for d in n.shape] + [line for n in live for line in n.lines]
        )
        has = {
            d.terms[0][0][0]
            for n in self.used(live)
            for d in n.shape
            if len(d.terms) == 1 and len(d.terms[0][0]) == 1 and d.terms[0][1] == 1
        }
        return {name for name in self.names if name in text} - has

    def values(
        self, sizes: Sizes, inputs: Mapping[str, Any], results: Sequence[Node]
    ) -> dict[str, Measured]:
        """What the results mean, and all that they follow from."""
        found: dict[str, Measured] = {}
        for n in self.live(results):
            if n.meaning is None:
                found[n.name] = m.given(inputs[n.name], n.dtype)
            else:
                found[n.name] = n.meaning(sizes, *[found[p.name] for p in n.parents])
                assert found[n.name].v.shape == sized(n.shape, sizes), (
                    n.lines,
                    found[n.name].v.shape,
                )
                assert found[n.name].dtype == n.dtype, n.lines
        return found


def _type(node: Node) -> str:
    return f"{node.dtype}[{', '.join(map(str, node.shape))}]"
