"""Steps that compute each element from those at its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import measured as m
from .growing import Growing
from .meanings import COMPARE, INT_BINARY, INT_UNARY, LOGIC, UNARY, pointwise
from .measured import FLOATS, INTS, Measured
from .sizes import Sizes


class Elements(Growing):
    """Operators, functions and conversions."""

    def make_unary(self) -> None:
        if x := self.pick(*FLOATS):
            name = self.rng.choice(list(UNARY))
            if name.endswith("_raw") and self.rng.random() < 0.7:
                return
            self.add(
                UNARY[name][0].format(x=x.name),
                x.shape,
                x.dtype,
                [x],
                lambda s, a: pointwise(name, a),
            )

    def make_binary(self) -> None:
        x = self.pick(*FLOATS)
        if not x or not (found := self.partner(x)):
            return
        y, shape = found
        text = self.rng.choice(
            [
                "{x} + {y}",
                "{x} - {y}",
                "{x} * {y}",
                "maximum({x}, {y})",
                "minimum({x}, {y})",
                "{x} / {y}",
                "{y} - {x}",
                "{x} / (1.0 + abs({y}))",
                "{x} * sigmoid({y})",
            ]
        )
        f: dict[str, Callable[..., Any]] = {
            "{x} + {y}": np.add,
            "{x} - {y}": np.subtract,
            "{x} * {y}": np.multiply,
            "maximum({x}, {y})": np.maximum,
            "minimum({x}, {y})": np.minimum,
            "{x} / {y}": np.divide,
            "{y} - {x}": lambda a, b: b - a,
        }

        def meaning(s: Sizes, a: Measured, b: Measured) -> Measured:
            if text in f:
                v, e = m.corners(f[text], a, b)
                if "/" in text:
                    e = np.where((np.abs(b.v) <= b.e) & (b.e > 0), m.UNKNOWN, e)
                return m.rounded(v, e, a.dtype, 2.0)
            if "sigmoid" in text:
                c = pointwise("sigmoid", b)
                v, e = m.corners(np.multiply, a, c)
                return m.rounded(v, e, a.dtype, 2.0)
            c = m.rounded(*m.lipschitz(lambda z: 1 + np.abs(z), b), b.dtype, 2.0)
            v, e = m.corners(np.divide, a, c)
            return m.rounded(v, e, a.dtype, 2.0)

        self.add(text.format(x=x.name, y=y.name), shape, x.dtype, [x, y], meaning)

    def make_int_binary(self) -> None:
        x = self.pick(*INTS)
        if not x or not (found := self.partner(x)):
            return
        y, shape = found
        text = self.rng.choice(list(INT_BINARY))
        self.add(
            text.format(x=x.name, y=y.name),
            shape,
            x.dtype,
            [x, y],
            lambda s, a, b: m.integers(INT_BINARY[text], a, b, dtype=a.dtype),
        )

    def make_int_unary(self) -> None:
        if x := self.pick(*INTS):
            text = self.rng.choice(list(INT_UNARY))
            if text.startswith("100") and x.dtype == "i8":
                return
            self.add(
                text.format(x=x.name),
                x.shape,
                x.dtype,
                [x],
                lambda s, a: m.integers(INT_UNARY[text], a, dtype=a.dtype),
            )

    def make_compare(self) -> None:
        x = self.pick()
        if not x or not (found := self.partner(x)) or x.dtype == "bool":
            return
        y, shape = found
        sign = self.rng.choice(list(COMPARE))

        def meaning(s: Sizes, a: Measured, b: Measured) -> Measured:
            if a.dtype not in FLOATS:
                return m.integers(COMPARE[sign], a, b, dtype="bool")
            v, e = m.corners(COMPARE[sign], a, b, steps=True)
            with np.errstate(all="ignore"):
                near = (np.abs(a.v - b.v) <= a.e + b.e) & (a.e + b.e > 0)
            if x is not y:
                e = np.where(near, m.UNKNOWN, e)
            else:
                e = np.where(np.isinf(a.e), m.UNKNOWN, 0.0)
            return Measured(v, e, "bool")

        self.add(f"{x.name} {sign} {y.name}", shape, "bool", [x, y], meaning)

    def make_logic(self) -> None:
        x = self.pick("bool")
        if not x or not (found := self.partner(x)):
            return
        y, shape = found
        sign = self.rng.choice(list(LOGIC))
        self.add(
            f"{x.name} {sign} (not {y.name})",
            shape,
            "bool",
            [x, y],
            lambda s, a, b: m.integers(lambda p, q: LOGIC[sign](p, ~q), a, b, dtype="bool"),
        )

    def make_select(self) -> None:
        c, x = self.pick("bool"), self.pick()
        if not c or not x or not (found := self.partner(x)):
            return
        y, shape = found
        whole = self.fits(shape, c.shape)
        if whole is None:
            return

        def meaning(s: Sizes, p: Measured, a: Measured, b: Measured) -> Measured:
            v = np.where(p.v, a.v, b.v)
            e = np.where(p.v, a.e, b.e)
            return Measured(v, np.where(p.e > 0, m.UNKNOWN, e), a.dtype)

        self.add(f"select({c.name}, {x.name}, {y.name})", whole, x.dtype, [c, x, y], meaning)

    def make_cast(self) -> None:
        if x := self.pick():
            options = [
                self.float,
                self.int,
                "f32",
                "i64",
                "bool",
                "f16",
                "u8",
                "i32",
                "bf16",
                "f8e4m3",
                "u64",
                "f64",
            ]
            dtype = self.rng.choice(options)
            if dtype != x.dtype:
                self.add(f"{dtype}({x.name})", x.shape, dtype, [x], lambda s, a: m.cast(a, dtype))

    def make_function(self) -> None:
        x = self.pick("f32", "f64", self.float, least=1)
        if not x or x.dtype not in FLOATS:
            return
        name = f"f{len(self.functions)}"
        first, second = (
            self.rng.choice(["tanh", "half", "relu", "abs"]),
            self.rng.choice(["sigmoid", "shift"]),
        )
        one, two = UNARY[first][0].format(x="x"), UNARY[second][0].format(x="x")
        self.functions.append(
            f"fn {name}[E: float](x: E[*S], twice: bool = False) -> E[*S]:\n"
            f"    x = {one}\n    if twice:\n        x = {one}\n"
            f"    for i in 0..2:\n        x = {two}\n    x\n"
        )
        twice = self.rng.random() < 0.5

        def meaning(s: Sizes, a: Measured) -> Measured:
            for step in [first] * (1 + twice) + [second] * 2:
                a = pointwise(step, a)
            return a

        self.add(f"{x.name} |> {name}(twice={twice})", x.shape, x.dtype, [x], meaning)

    def make_numbers(self) -> None:
        d = self.rng.choice(self.dims)
        kind = self.rng.choice(["i64", self.float])
        if kind == "i64":
            self.add(
                f"iota({d}) * 3 - 4",
                [d],
                "i64",
                [],
                lambda s: m.given(np.arange(d.at(s)) * 3 - 4, "i64"),
            )
        else:
            self.add(
                f"{kind}(iota({d}) % 7) * 0.25",
                [d],
                kind,
                [],
                lambda s: m.given(np.arange(d.at(s)) % 7 * 0.25, kind),
            )
