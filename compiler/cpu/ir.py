"""A small writer of LLVM IR text: typed values with operators, blocks, reuse of pure values.

Equal pure instructions are written once per scope: `Code` remembers the text of what it wrote,
and a scope (a loop body, a branch) forgets on leaving what was written inside it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias, Union

from stagefuse.compiler.operators import BITS, FLOATS, Operators
from stagefuse.dsl.frozen import frozen

Operand: TypeAlias = Union["Value", int, float]


def constant_text(value: float | int, llvm_type: str) -> str:
    """How LLVM writes a constant of a type; floats are rounded to it."""
    if llvm_type == "i1":
        return "true" if value else "false"
    if llvm_type not in FLOATS:
        bits = BITS[llvm_type]
        wrapped = int(value) & ((1 << bits) - 1)
        return str(wrapped - (1 << bits) if wrapped >> (bits - 1) else wrapped)
    if llvm_type == "double":
        return f"0x{struct.unpack('<Q', struct.pack('<d', value))[0]:016X}"
    if llvm_type == "float":
        single = round_to_single(float(value))
        return f"0x{struct.unpack('<Q', struct.pack('<d', single))[0]:016X}"
    if llvm_type == "half":
        return f"0xH{struct.unpack('<H', struct.pack('<e', value))[0]:04X}"
    bits = struct.unpack("<I", struct.pack("<f", round_to_single(float(value))))[0]
    bits += 0x7FFF + (bits >> 16 & 1) if value == value else 0
    return f"0xR{bits >> 16:04X}"


def round_to_single(value: float) -> float:
    """The f32 nearest to a number; beyond the range an infinity."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


@frozen
class Value(Operators):
    """A value of LLVM: its name or constant text, its type, and the code it was written into."""

    code: Code
    text: str
    type: str

    def binary(self, op: str, other: Operand, swap: bool = False) -> Value:
        right = self.code.operand(other, self.type)
        a, b = (right, self) if swap else (self, right)
        if self.is_float:
            word = f"f{op}{self.code.flags}"
        else:
            word = "sdiv" if op == "div" else op
        return self.code.pure(f"{word} {self.listed} {a.text}, {b.text}", self.type)

    @property
    def listed(self) -> str:
        """The type as it stands before the value."""
        return self.code.spelled(self.type)

    @property
    def listed_text(self) -> str:
        """The value as an argument."""
        return f"{self.listed} {self.text}"

    def __neg__(self) -> Value:
        if self.is_float:
            return self.code.pure(f"fneg {self.listed} {self.text}", self.type)
        return 0 - self

    def compare(self, relation: str, other: Operand, unsigned: bool = False) -> Value:
        right = self.code.operand(other, self.type)
        if self.is_float:
            word = f"fcmp {'une' if relation == 'ne' else 'o' + relation}"
        elif relation in ("eq", "ne"):
            word = f"icmp {relation}"
        else:
            word = f"icmp {'u' if unsigned or self.type == 'i1' else 's'}{relation}"
        return self.code.pure(f"{word} {self.listed} {self.text}, {right.text}", "i1")

    def select(self, yes: Value, no: Operand) -> Value:
        other = self.code.operand(no, yes.type)
        if self.text in ("true", "false"):
            return yes if self.text == "true" else other
        return self.code.pure(
            f"select {self.listed} {self.text}, {yes.listed} {yes.text}, {yes.listed} {other.text}",
            yes.type,
        )

    def to(self, word: str, llvm_type: str) -> Value:
        if self.type == llvm_type:
            return self
        target = self.code.spelled(llvm_type)
        return self.code.pure(f"{word} {self.listed} {self.text} to {target}", llvm_type)

    def is_nan(self) -> Value:
        return self.code.pure(f"fcmp uno {self.listed} {self.text}, {self.text}", "i1")


class Code:
    """The text of one function being written.

    `lanes`: how many elements each value is a vector of, constants too; types name one of them.
    """

    def __init__(self, lanes: int = 1) -> None:
        self.lanes = lanes
        self.lines: list[str] = []
        self.flags = ""  # fast-math flags of arithmetic, with a leading space
        self.converts_long = False  # whether vectors of i64 become f64 in an instruction
        self.block = "entry"
        self._count = 0
        self._labels = 0
        self._scopes: list[dict[str, Value]] = [{}]

    def spelled(self, llvm_type: str) -> str:
        """How the type of a value is written whose elements are of a type."""
        return llvm_type if self.lanes == 1 else f"<{self.lanes} x {llvm_type}>"

    def fresh(self, hint: str = "v") -> str:
        self._count += 1
        return f"%{hint}{self._count}"

    def label(self, hint: str) -> str:
        self._labels += 1
        return f"{hint}{self._labels}"

    def line(self, text: str) -> None:
        self.lines.append(f"  {text}")

    def start(self, label: str) -> None:
        """Begin a block."""
        self.lines.append(f"{label}:")
        self.block = label

    def branch(self, label: str) -> None:
        self.line(f"br label %{label}")

    def branch_if(self, condition: Value, yes: str, no: str, metadata: str = "") -> None:
        self.line(f"br i1 {condition.text}, label %{yes}, label %{no}{metadata}")

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Pure values written inside are not reused after."""
        self._scopes.append({})
        try:
            yield
        finally:
            self._scopes.pop()

    def operand(self, value: Operand, llvm_type: str) -> Value:
        return value if isinstance(value, Value) else self.const(value, llvm_type)

    def const(self, value: float | int, llvm_type: str) -> Value:
        text = constant_text(value, llvm_type)
        return Value(self, text if self.lanes == 1 else f"splat ({llvm_type} {text})", llvm_type)

    def value(self, text: str, llvm_type: str) -> Value:
        return Value(self, text, llvm_type)

    def pure(self, text: str, llvm_type: str) -> Value:
        """The result of an instruction without effects, written once per scope."""
        for scope in reversed(self._scopes):
            if text in scope:
                return scope[text]
        result = self.emit(text, llvm_type)
        self._scopes[-1][text] = result
        return result

    def emit(self, text: str, llvm_type: str) -> Value:
        """The result of an instruction that must be written here."""
        name = self.fresh()
        self.line(f"{name} = {text}")
        return Value(self, name, llvm_type)

    def call(self, name: str, llvm_type: str, *args: Value) -> Value:
        """A call without effects."""
        passed = ", ".join(a.listed_text for a in args)
        return self.pure(f"call {self.spelled(llvm_type)} @{name}({passed})", llvm_type)

    def intrinsic(self, name: str, *args: Value) -> Value:
        """`llvm.name.fNN` on arguments of one type."""
        kind = args[0].type
        suffix = f"f{BITS[kind]}" if kind in FLOATS else kind
        suffix = suffix if self.lanes == 1 else f"v{self.lanes}{suffix}"
        return self.call(f"llvm.{name}.{suffix}", kind, *args)

    def unsigned_division(self, a: Value, b: Value) -> Value:
        return self.pure(f"udiv {a.type} {a.text}, {b.text}", a.type)

    def remainder(self, a: Value, b: Value) -> Value:
        """The exact remainder of floats, with the sign of `a`."""
        if a.type == "float" and self.lanes == 1:  # of `wide_math`
            return self.call("sf.rem.f32", a.type, a, b)
        return self.pure(f"frem {a.listed} {a.text}, {b.text}", a.type)

    def two_over_pi(self, at: Value) -> Value:
        """An entry (i64) of the table of 2/pi."""
        slot = self.pure(f"getelementptr double, ptr @sf.two_over_pi, i64 {at.text}", "ptr")
        return self.pure(f"load double, ptr {slot.text}, align 8", "double")

    def fma(self, a: Value, b: Operand, c: Operand) -> Value:
        return self.intrinsic("fma", a, self.operand(b, a.type), self.operand(c, a.type))

    def own_exp(self, x: Value) -> Value | None:
        """e^x by an instruction of the target, if it has one that is exact enough."""
        return None

    def quotient(self, a: Operand, b: Value) -> Value:
        """a / b, where b is in 1 .. 2^100 or NaN."""
        return self.operand(a, b.type) / b

    def polynomial(self, x: Value, coefficients: Sequence[float]) -> Value:
        """Horner's rule; the lowest coefficient comes first."""
        total = self.const(coefficients[-1], x.type)
        for coefficient in reversed(coefficients[:-1]):
            total = self.fma(total, x, coefficient)
        return total
