"""A small writer of PTX bodies: typed values with operators, loops, reuse and placement.

It has the interface of `compiler.cpu.ir`, so that formulas over scalars are written once for both.
Equal pure instructions are written once, each in the outermost loop around it in which its
operands exist (`lines`). Types have LLVM's names. Narrow integers live in 32-bit registers as
sign-extended patterns, whatever their sign; an i1 is a predicate. Reference: PTX ISA 8.7, chapter
9, "Instruction Set".
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TypeAlias, Union

from stagefuse.compiler.cpu.ir import round_to_single
from stagefuse.compiler.operators import BITS, FLOATS, Operators
from stagefuse.dsl.dims import Expr

from .fields import Fields
from .lines import Line, Lines

Operand: TypeAlias = Union["Value", int, float]

CLASS = {
    "i1": "p", "half": "h", "i8": "r", "i16": "r", "i32": "r", "i64": "rd", "float": "f",
    "double": "fd",
}  # fmt: skip
"""The register class of a type."""
DECLARED = {"p": "pred", "h": "b16", "r": "b32", "rd": "b64", "f": "f32", "fd": "f64"}
TYPE = {"half": "f16", "i8": "32", "i16": "32", "i32": "32", "i64": "64", "float": "f32",
        "double": "f64"}  # fmt: skip
NARROW = ("i8", "i16")


def constant_text(value: float | int, kind: str) -> str:
    """How PTX writes a constant of a type; floats are rounded to it."""
    if kind == "i1":
        return "true" if value else "false"
    if kind == "double":
        return f"0d{struct.unpack('<Q', struct.pack('<d', value))[0]:016X}"
    if kind == "float":
        bits = struct.unpack("<I", struct.pack("<f", round_to_single(float(value))))[0]
        return f"0f{bits:08X}"
    bits = BITS[kind]
    wrapped = int(value) & ((1 << bits) - 1)
    return str(wrapped - (1 << bits) if wrapped >> (bits - 1) else wrapped)


class Value(Operators):
    """A register or constant, its type, and the depth of the loop in which it is set. Immutable.

    `known` is the value of an integer constant, else None.
    """

    __slots__ = ("code", "depth", "known", "text", "type")

    def __init__(self, code: Code, text: str, type: str, depth: int = 0) -> None:
        self.code, self.text, self.type, self.depth = code, text, type, depth
        self.known: int | None = None
        if text in ("true", "false"):
            self.known = int(text == "true")
        elif text[0] in "-0123456789" and type not in FLOATS:
            self.known = int(text)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Value) and self._key() == other._key())

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[str, str, int]:
        return self.text, self.type, self.depth

    def __repr__(self) -> str:
        return f"Value({self.text}, {self.type})"

    def binary(self, op: str, other: Operand, swap: bool = False) -> Value:
        right = other if isinstance(other, Value) else self.code.const(other, self.type)
        a, b = (right, self) if swap else (self, right)
        if self.is_float:
            rounding = "" if op != "div" and self.code.contract else ".rn"
            return self.code.pure(f"{op}{rounding}.{TYPE[self.type]}", self.type, a, b)
        return self.code.integer(op, a, b)

    def __neg__(self) -> Value:
        if self.is_float:
            return self.code.pure(f"neg.{TYPE[self.type]}", self.type, self)
        return 0 - self

    def compare(self, relation: str, other: Operand, unsigned: bool = False) -> Value:
        return self.code.compare(relation, self, self.code.operand(other, self.type), unsigned)

    def select(self, yes: Value, no: Operand) -> Value:
        other = self.code.operand(no, yes.type)
        if self.known is not None:
            return yes if self.known else other
        if yes.text == other.text:
            return yes
        if yes.type == "i1":
            return (self & yes) | ((self ^ 1) & other)
        kind = "b16" if yes.type == "half" else TYPE[yes.type]
        kind = f"b{kind}" if kind.isdigit() else kind
        return self.code.pure(f"selp.{kind}", yes.type, yes, other, self)

    def to(self, word: str, kind: str) -> Value:
        return self if self.type == kind else self.code.converted(self, word, kind)

    def is_nan(self) -> Value:
        return self.code.pure(f"setp.nan.{TYPE[self.type]}", "i1", self, self)


class Code(Lines):
    """The body of one function being written."""

    converts_long = False
    """As the CPU's writer has it: i64 is divided as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.contract = False  # whether a product and a sum may become one instruction
        self.tables: set[str] = set()
        self.turns: dict[str, Expr] = {}
        """How often the body of a loop runs, by the label of its head, where sizes tell."""
        self.stored: dict[str, tuple[str, Value]] = {}
        """Registers whose value is that of another one, with an element as it is stored."""
        self.wholes: dict[str, Value] = {}
        """f32 registers that are integers, as those of 32 bits that they are converted to."""
        self.clamped: dict[str, Value] = {}
        """Registers that are others of 32 bits, clamped to what i8 has."""
        self.fields = Fields(self)
        self._counts: dict[str, int] = {}
        self._integers: dict[tuple[int, str], Value] = {}

    def registers(self) -> list[str]:
        """Declarations of all registers."""
        return [
            f"\t.reg .{DECLARED[c]} %{c}<{count + 1}>;"
            for c, count in sorted(self._counts.items())
        ]  # fmt: skip

    # Values

    def operand(self, value: Operand, kind: str) -> Value:
        return value if isinstance(value, Value) else self.const(value, kind)

    def const(self, value: float | int, kind: str) -> Value:
        if type(value) is not int:  # 0 and -0.0 are equal keys
            return Value(self, constant_text(value, kind), kind)
        key = (value, kind)
        if key not in self._integers:
            self._integers[key] = Value(self, constant_text(value, kind), kind)
        return self._integers[key]

    def fresh(self, kind: str, depth: int | None = None) -> Value:
        """A new register, set at a depth, or at this one."""
        c = CLASS[kind]
        count = self._counts[c] = self._counts.get(c, 0) + 1
        return Value(self, f"%{c}{count}", kind, len(self.scopes) - 1 if depth is None else depth)

    def pure(self, op: str, kind: str, *operands: Value) -> Value:
        """The result of an instruction without effects, written once, as far out as can be."""
        key = (op, kind, *[o.text for o in operands])
        for scope in self.scopes:
            known = scope.known.get(key)
            if known is not None:
                return known
        at = self.place(operands)
        result = self.fresh(kind, at)
        texts = [o.text if o.type != "i1" else self._held(o).text for o in operands]
        scope = self.scopes[at]
        scope.lines.append(Line(f"\t{op} {', '.join([result.text, *texts])};", self.loc))
        scope.known[key] = result
        return result

    def _held(self, value: Value) -> Value:
        """The operand; a constant predicate becomes a register."""
        if value.type != "i1" or value.known is None:
            return value
        return self.pure("setp.eq.s32", "i1", self.const(1 - value.known, "i32"),
                         self.const(0, "i32"))  # fmt: skip

    def emit(self, op: str, kind: str, *operands: Value, guard: Value | None = None) -> Value:
        """The result of an instruction that must be written here."""
        result = self.fresh(kind)
        self.write(op, result, *operands, guard=guard)
        return result

    def write(self, op: str, *operands: Value | str, guard: Value | None = None) -> None:
        """An instruction with its operands, that of the result first."""
        listed = ", ".join(o if isinstance(o, str) else self._held(o).text for o in operands)
        self.line(f"{self.guarded(guard)}{op} {listed};")

    def guarded(self, guard: Value | None) -> str:
        """The predicate before an instruction."""
        if guard is None or guard.known == 1:
            return ""
        return f"@{self._held(guard).text} "

    def variable(self, kind: str, start: Value) -> Value:
        """A register that will be set again, holding `start` now."""
        result = self.fresh(kind)
        self.set(result, start)
        return result

    def set(self, target: Value, value: Value, guard: Value | None = None) -> None:
        if target.text == value.text:
            return
        kind = {"i1": "pred", "half": "b16"}.get(target.type) or TYPE[target.type]
        kind = f"b{kind}" if kind.isdigit() else kind
        self.write(f"mov.{kind}", target, value, guard=guard)

    # Integers

    def integer(self, op: str, a: Value, b: Value) -> Value:
        """An integer instruction, with constants computed here."""
        if a.known is not None or b.known is not None:
            folded = self._folded(op, a, b) or self.fields.integer(op, a, b)
            if folded is not None:
                return Value(self, folded.text, a.type, folded.depth)
        if a.type == "i1":
            return self.pure(f"{op}.pred", "i1", a, b)
        wide = a.type == "i64"
        name = _INTEGER[op] + ("64" if wide else "32")
        if op == "lshr":
            a = self.zero_extended(a)
        if op in ("shl", "lshr", "ashr") and wide:
            b = self.converted(b, "trunc", "i32") if b.known is None else b
        result = self.pure(name, a.type, a, b)
        if a.type == "i32":
            self.fields.note(op, a, b, result)
        return self.narrowed(result, op)

    def _folded(self, op: str, a: Value, b: Value) -> Value | None:
        x, y = a.known, b.known
        if x is not None and y is not None and op in _FOLD:
            return self.const(_FOLD[op](x, y), a.type)
        if y == 0 and op in ("add", "sub", "or", "xor", "shl", "lshr", "ashr"):
            return a
        if x == 0 and op in ("add", "or", "xor"):
            return b
        if op == "mul" and 1 in (x, y):
            return b if x == 1 else a
        if op in ("mul", "and") and 0 in (x, y):
            return self.const(0, a.type)
        if a.type == "i1" and op in ("and", "or") and None in (x, y) and x != y:
            other, this = (b, x) if x is not None else (a, y)
            return other if this == (op == "and") else self.const(int(op == "or"), "i1")
        if op == "mul" and a.type in ("i32", "i64") and y is not None and y > 0 and not y & (y - 1):
            return self.integer("shl", a, self.const(y.bit_length() - 1, a.type))
        if a.type == "i1" and op == "xor" and y == 1:
            return self.pure("not.pred", "i1", a)
        return None

    def narrowed(self, value: Value, op: str = "") -> Value:
        """A narrow integer made a sign-extended pattern again after an operation."""
        if value.type not in NARROW or op in ("and", "or", "xor", "ashr", "rem"):
            return value
        if self.fields.fits(value, BITS[value.type]):
            return value
        by = self.const(32 - BITS[value.type], "i32")
        return self.pure("shr.s32", value.type, self.pure("shl.b32", "i32", value, by), by)

    def zero_extended(self, value: Value) -> Value:
        """The unsigned value of a narrow integer's pattern, in the same register type."""
        if value.type not in NARROW:
            return value
        known = self.fields.unsigned(value)
        if known is not None:
            return Value(self, known.text, value.type, known.depth)
        mask = self.const((1 << BITS[value.type]) - 1, "i32")
        return self.pure("and.b32", value.type, value, mask)

    def unsigned_division(self, a: Value, b: Value) -> Value:
        if a.type == "i64" and a.known is None and b.known is None:
            from .conversions import long_division

            return long_division(self, a, b)
        bits = 64 if a.type == "i64" else 32
        return self.narrowed(
            self.pure(f"div.u{bits}", a.type, self.zero_extended(a), self.zero_extended(b))
        )

    def remainder(self, a: Value, b: Value) -> Value:
        """The exact remainder of floats, with the sign of `a`."""
        from .conversions import remainder

        if a.type == "float":
            return remainder(self, a.to("fpext", "double"), b.to("fpext", "double")).to(
                "fptrunc", "float"
            )
        return remainder(self, a, b)

    def two_over_pi(self, at: Value) -> Value:
        """An entry (i64) of the table of 2/pi."""
        self.tables.add("two_over_pi")
        start = self.pure("mov.u64", "i64", Value(self, "sf_two_over_pi", "i64"))
        place = start + at.shl(3)
        at = Value(self, f"[{place.text}]", "i64", place.depth)
        return self.pure("ld.global.f64", "double", at)

    def compare(self, relation: str, a: Value, b: Value, unsigned: bool) -> Value:
        if a.is_float:
            name = "neu" if relation == "ne" else relation
            return self.pure(f"setp.{name}.{TYPE[a.type]}", "i1", a, b)
        x, y = a.known, b.known
        if x is not None and y is not None and (not unsigned or min(x, y) >= 0):
            return self.const(int(_RELATION[relation](x, y)), "i1")
        if a.type == "i1":
            return self._compare_bits(relation, a, b)
        bits = 64 if a.type == "i64" else 32
        if relation in ("eq", "ne"):
            return self.pure(f"setp.{relation}.s{bits}", "i1", a, b)
        return self.pure(f"setp.{relation}.{'u' if unsigned else 's'}{bits}", "i1", a, b)

    def _compare_bits(self, relation: str, a: Value, b: Value) -> Value:
        if relation == "ne":
            return a ^ b
        if relation == "eq":
            return (a ^ b) ^ 1
        if relation in ("lt", "ge"):
            less = (a ^ 1) & b
            return less if relation == "lt" else less ^ 1
        return self._compare_bits({"gt": "lt", "le": "ge"}[relation], b, a)

    # Conversions

    def converted(self, value: Value, word: str, kind: str) -> Value:
        if value.known is not None and word in ("sext", "trunc") and value.type != "i1":
            return self.const(value.known, kind)
        from .conversions import CONVERT

        return CONVERT[word](self, value, kind)

    # What formulas call

    def call(self, name: str, kind: str, *args: Value) -> Value:
        """The helper functions of `compiler.cpu.vector_math`."""
        assert name.startswith("sf.scale."), name
        p, k = args
        least, bias, mantissa = (-252, 127, 23) if kind == "float" else (-2044, 1023, 52)
        k = self.extreme("smax", k, self.const(least, k.type))
        half = k.ashr(1)
        low, high = ((n + bias).shl(mantissa).as_float(kind) for n in (half, k - half))
        return (p * low) * high

    def intrinsic(self, name: str, *args: Value) -> Value:
        """LLVM's intrinsic of this name."""
        kind = args[0].type
        if name in ROUND:
            return self.pure(f"cvt.{ROUND[name]}.{TYPE[kind]}.{TYPE[kind]}", kind, *args)
        if name == "copysign":
            top = 1 << (BITS[kind] - 1)
            size, sign = args[0].bits() & (top - 1), args[1].bits() & top
            return (size | sign).as_float(kind)
        if name in ("smin", "smax", "umin", "umax"):
            return self.extreme(name, *args)
        if name in ("maximum", "minimum"):
            return self._float_extreme(name[:3], *args)
        op = {"fabs": "abs", "sqrt": "sqrt.rn", "fma": "fma.rn"}[name]
        return self.pure(f"{op}.{TYPE[kind]}", kind, *args)

    def extreme(self, name: str, a: Value, b: Value) -> Value:
        x, y = a.known, b.known
        if x is not None and y is not None and name[0] == "s":
            return self.const(min(x, y) if name == "smin" else max(x, y), a.type)
        bits = 64 if a.type == "i64" else 32
        return self.pure(f"{name[1:]}.{name[0]}{bits}", a.type, a, b)

    def _float_extreme(self, name: str, a: Value, b: Value) -> Value:
        if a.type == "float":
            return self.pure(f"{name}.NaN.f32", "float", a, b)
        found = self.pure(f"{name}.f64", "double", a, b)  # there is no .NaN for f64
        odd = self.pure("setp.nan.f64", "i1", a, b)
        return odd.select(self.const(float("nan"), "double"), found)

    def fma(self, a: Value, b: Operand, c: Operand) -> Value:
        return self.intrinsic("fma", a, self.operand(b, a.type), self.operand(c, a.type))

    def own_exp(self, x: Value) -> Value | None:
        """e^x of an f32, within 2 ulp."""
        from .exponent import exp_f32

        return exp_f32(self, x) if x.type == "float" else None

    def quotient(self, a: Operand, b: Value) -> Value:
        """a / b, where b is in 1 .. 2^100 or NaN."""
        from .quotients import quotient

        a = self.operand(a, b.type)
        return quotient(self, a, b) if b.type == "float" else a / b

    def polynomial(self, x: Value, coefficients: Sequence[float]) -> Value:
        """Horner's rule; the lowest coefficient comes first."""
        total = self.const(coefficients[-1], x.type)
        for coefficient in reversed(coefficients[:-1]):
            total = self.fma(total, x, coefficient)
        return total


_FOLD = {
    "add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y,
    "and": lambda x, y: x & y, "or": lambda x, y: x | y, "xor": lambda x, y: x ^ y,
}  # fmt: skip
_INTEGER = {
    "add": "add.s", "sub": "sub.s", "mul": "mul.lo.s", "div": "div.s", "rem": "rem.s",
    "shl": "shl.b", "and": "and.b", "or": "or.b", "xor": "xor.b", "lshr": "shr.u", "ashr": "shr.s",
}  # fmt: skip
"""Instructions on integers, without their bits."""
_RELATION = {
    "eq": lambda x, y: x == y, "ne": lambda x, y: x != y, "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y, "gt": lambda x, y: x > y, "ge": lambda x, y: x >= y,
}  # fmt: skip
ROUND = {"rint": "rni", "floor": "rmi", "ceil": "rpi", "trunc": "rzi"}
