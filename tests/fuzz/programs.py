"""Random well-typed programs of all kinds, run on arrays of all kinds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from stagefuse.compiler import driver, front, plan_check
from stagefuse.compiler.plan import Plan
from stagefuse.dsl.diagnostics import CompileError
from stagefuse.dsl.source import Source

from . import measured as m
from .elements import Elements
from .growing import Node
from .layers import Layers
from .positions import Positions
from .products import Products
from .recurrences import Recurrences
from .reductions import Reductions
from .views import Views


class Program(Elements, Reductions, Views, Positions, Products, Recurrences, Layers):
    """A random program of a seed; the results are of its last names."""

    def results(self, most: int = 4) -> list[Node]:
        """Up to so many, none of which has sizes that no input gives; the program grows until
        there is one."""
        found: list[Node] = []
        while not found:
            ends = [n for n in self.nodes if n.meaning is not None][-8:]
            self.rng.shuffle(ends)
            for node in ends:
                if len(found) < most and not self.needs([*found, node]):
                    found.append(node)
            if not found:
                self.step()
        return found


def compiled(text: str, targets: Sequence[str], levels: Sequence[str]) -> Plan:
    """The plan of a text for several targets, checked."""
    program, found, load = front.check_text(Source("<text>", text), front.Path.cwd(), {})
    if found:
        raise CompileError(found)
    plan = driver.compile_program(program, load, None, levels=levels, targets=tuple(targets))
    plan_check.check(plan)
    return plan


def array(rng: np.random.Generator, shape: Sequence[int], dtype: str, special: bool) -> Any:
    """Random numbers; `special` ones are at times infinite, no numbers, tiny or the greatest."""
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    if dtype in m.INTS:
        kind = m.INTS[dtype]
        info = np.iinfo(kind)
        small = rng.integers(max(-9, info.min), 10, shape).astype(kind)
        if not special:
            return small
        edges = rng.choice(np.array([info.min, info.max, 0, 1], kind), shape)
        wide = rng.integers(info.min, info.max, shape, dtype=kind, endpoint=True)
        which = rng.random(shape)
        return np.where(which < 0.15, edges, np.where(which < 0.5, wide, small)).astype(kind)
    kind, _, least, greatest = m.FLOATS[dtype]
    found = rng.standard_normal(shape)
    if special:
        values = [np.nan, -0.0, 0.0, 1.0, 2.0**least, -(2.0 ** (least + 1)), greatest]
        values += [] if dtype == "f8e4m3" else [np.inf, -np.inf]
        found = np.where(rng.random(shape) < 0.15, rng.choice(np.array(values), shape), found)
    return np.asarray(found).astype(kind)


def laid_out(rng: np.random.Generator, a: Any) -> Any:
    """The same numbers in another layout, perhaps: strided, reversed, unaligned, read-only."""
    kind = rng.integers(6)
    if kind == 0 and a.ndim:
        wide = np.zeros(tuple(2 * n + 1 for n in a.shape), a.dtype)
        view = wide[tuple(slice(1, 2 * n + 1, 2) for n in a.shape)]
        view[...] = a
        return view
    if kind == 1 and a.ndim:
        return np.asfortranarray(a)
    if kind == 2 and a.ndim:
        return np.ascontiguousarray(a[::-1])[::-1]
    if kind == 3 and a.size:
        raw = bytearray(a.nbytes + 1)
        view = np.frombuffer(raw, a.dtype, a.size, 1).reshape(a.shape)
        view[...] = a
        return view
    found = a.copy()
    found.flags.writeable = kind != 4
    return found
