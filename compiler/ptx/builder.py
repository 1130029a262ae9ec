"""A typed builder of modules: every instruction is checked against the table where it is built.

    b = ModuleBuilder("sm_80")
    k = b.entry("scale", [("x", "u64"), ("n", "u32")], block=(256, 1, 1))
    i = k.op("mad.lo.u32", k.special("ctaid.x"), 256, k.special("tid.x"))
    with k.when(k.op("setp.lt.u32", i, k.param("n"))):
        at = k.op("add.u64", k.param("x"), k.op("mul.wide.u32", i, 4))
        k.op("st.global.f32", at, k.op("mul.rn.f32", k.op("ld.global.f32", at), 2.0))
    text = print_module(b.module())

`op` takes the instruction as it is written, then its sources: registers, numbers, lists for
braces, predicates (`~p` inverts one). It gives the result: a register, a list for a vector, a
pair where the form has a second result and `pair=True`. `into=` writes registers that exist.
`k.add.f32(a, b)` is `k.op("add.f32", a, b)`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from . import syntax as s
from .check import check, is_needed, target_number
from .errors import PtxError
from .table import Match, OperandSpec, matches
from .types import TYPES, register_type

VERSIONS = {80: (8, 0), 89: (8, 4), 90: (8, 3)}
"""The first PTX version that has what we emit for a target."""


@dataclass(frozen=True, slots=True)
class Reg:
    """A register of a kernel that is being built. `~p` is the inverse of a predicate."""

    register: s.Register
    inverted: bool = False

    @property
    def type(self) -> str:
        return self.register.type

    @property
    def name(self) -> str:
        return self.register.name

    def __invert__(self) -> Reg:
        if self.type != "pred":
            raise PtxError(f"{self.name} is a {self.type}, and only predicates are inverted")
        return Reg(self.register, not self.inverted)


Value = Reg | int | float | s.Operand
Source = Value | Sequence[Value]
Result = Reg | list[Reg] | tuple[Reg, Reg] | None


class ModuleBuilder:
    """A module for one target. `version` is the PTX version, by default the first that serves."""

    def __init__(
        self, target: str = "sm_90a", version: tuple[int, int] | None = None,
        comments: Sequence[str] = (),
    ) -> None:  # fmt: skip
        number = target_number(target)[0]
        known = max((n for n in VERSIONS if n <= number), default=80)
        self.target, self.version = target, version or VERSIONS[known]
        self._comments = tuple(comments)
        self._variables: list[s.Variable] = []
        self._functions: list[Kernel | s.Function] = []
        self._files: dict[str, int] = {}

    def file(self, name: str) -> int:
        """The number of a source file in `.loc`."""
        return self._files.setdefault(name, len(self._files) + 1)

    def entry(
        self, name: str, params: Sequence[tuple[str, str]], *,
        block: tuple[int, int, int] | None = None, min_blocks: int = 0, max_registers: int = 0,
        cluster: tuple[int, int, int] | None = None,
    ) -> Kernel:  # fmt: skip
        """A kernel. A parameter's type may be `b8[128]` for a struct by value, aligned to 64."""
        directives: list[tuple[str, tuple[int | str, ...]]] = []
        if block is not None:
            directives.append(("reqntid", block))
        if min_blocks:
            directives.append(("minnctapersm", (min_blocks,)))
        if max_registers:
            directives.append(("maxnreg", (max_registers,)))
        if cluster is not None:
            directives += [("explicitcluster", ()), ("reqnctapercluster", cluster)]
        made = Kernel(self, name, [_parameter(name, *p) for p in params], tuple(directives))
        self._functions.append(made)
        return made

    def variable(
        self, name: str, type: str, values: Sequence[int | float] | int, *, space: str = "global",
        align: int | None = None,
    ) -> s.Symbol:  # fmt: skip
        """A variable of the module, with its values or only their number."""
        initial: tuple[s.Initial, ...] = ()
        if not isinstance(values, int):
            initial = tuple(_constant(v, type) for v in values)
        size = values if isinstance(values, int) else len(values)
        self._variables.append(s.Variable(space, type, name, (size,), align, 1, initial))
        return s.Symbol(name)

    def dynamic_shared(self, name: str = "dynamic_shared", align: int = 128) -> s.Symbol:
        """Shared memory whose size the launch says."""
        if all(v.name != name for v in self._variables):
            self._variables.append(
                s.Variable("shared", "b8", name, (0,), align, 1, (), ("extern",))
            )
        return s.Symbol(name)

    def declare(self, function: s.Function) -> None:
        """A function that is defined elsewhere, or was made otherwise."""
        self._functions.append(function)

    def module(self) -> s.Module:
        """The module as it is now."""
        return s.Module(
            self.version, (self.target,), 64, tuple(self._variables),
            tuple(f.function() if isinstance(f, Kernel) else f for f in self._functions),
            tuple((number, name) for name, number in self._files.items()), (), self._comments,
        )  # fmt: skip


class Kernel:
    """A kernel that is being built: its instructions so far."""

    def __init__(
        self, module: ModuleBuilder, name: str, parameters: list[s.Variable],
        directives: tuple[tuple[str, tuple[int | str, ...]], ...],
    ) -> None:  # fmt: skip
        self._module, self.name = module, name
        self._parameters, self._directives = parameters, directives
        self._start: list[s.Statement] = []
        self._body: list[s.Statement] = []
        self._variables: list[s.Variable] = []
        self._counts: dict[tuple[str, str], int] = {}
        self._labels: dict[str, int] = {}
        self._placed: set[str] = set()
        self._loaded: dict[str, Reg] = {}
        self._guard: s.Guard | None = None
        self._loc: s.Loc | None = None

    # values

    def reg(self, type: str) -> Reg:
        """A new register for values of a type."""
        declared = register_type(type)
        prefix = TYPES[declared].prefix
        count = self._counts.get((prefix, declared), 0)
        self._counts[prefix, declared] = count + 1
        shown = prefix if self._owns(prefix, declared) else f"{prefix}_{declared}_"
        return Reg(s.Register(f"{shown}{count}", declared))

    def _owns(self, prefix: str, declared: str) -> bool:
        """Whether plain numbers after a prefix belong to this type: the first that used it."""
        return next(kind for pre, kind in self._counts if pre == prefix) == declared

    def special(self, name: str) -> Reg:
        """A special register, read once a kernel: `tid.x`."""
        if name not in self._loaded:
            wide = name in ("clock64", "globaltimer", "gridid")
            opcode = "mov.u64" if wide else "mov.u32"
            made: Reg = self.op(opcode, s.Special(f"%{name}"), at_start=True)
            self._loaded[name] = made
        return self._loaded[name]

    def param(self, name: str) -> Reg:
        """A parameter's value, read once a kernel at its start."""
        if name not in self._loaded:
            variable = next((p for p in self._parameters if p.name == f"{self.name}_{name}"), None)
            if variable is None:
                raise PtxError(f"`{self.name}` has no parameter `{name}`")
            made: Reg = self.op(f"ld.param.{variable.type}", s.Symbol(variable.name), at_start=True)
            self._loaded[name] = made
        return self._loaded[name]

    def param_address(self, name: str) -> s.Symbol:
        """A parameter's name in param space, for `mov` and `ld.param` of a struct."""
        return s.Symbol(f"{self.name}_{name}")

    def shared(self, name: str, type: str, count: int, align: int = 16) -> s.Symbol:
        """A shared array of the kernel."""
        return self._array("shared", name, type, count, align)

    def local(self, name: str, type: str, count: int, align: int = 16) -> s.Symbol:
        """An array of each thread."""
        return self._array("local", name, type, count, align)

    def _array(self, space: str, name: str, type: str, count: int, align: int) -> s.Symbol:
        unique = f"{self.name}_{name}"
        if any(v.name == unique for v in (*self._variables, *self._parameters)):
            raise PtxError(f"`{self.name}` has two arrays or parameters `{name}`")
        self._variables.append(s.Variable(space, type, unique, (count,), align))
        return s.Symbol(unique)

    def addr(self, base: Reg | s.Symbol | s.Address, offset: int = 0) -> s.Address:
        """An address: a base and a number of bytes."""
        if isinstance(base, s.Address):
            return replace(base, offset=base.offset + offset)
        if isinstance(base, Reg):
            return s.Address(base.register, offset)
        return s.Address(base, offset)

    # instructions

    def __getattr__(self, opcode: str) -> Opcode:
        if opcode.startswith("_"):
            raise AttributeError(opcode)
        return Opcode(self, (opcode.rstrip("_"),))

    def op(
        self, name: str, *sources: Source, into: Reg | Sequence[Reg] | None = None,
        guard: Reg | None = None, pair: bool = False, at_start: bool = False,
    ) -> Any:  # fmt: skip
        """Adds an instruction and gives its result: `Result`, by the form.

        Raises: PtxError where the table has no such instruction, an operand is not what its
        form takes, or the target lacks it.
        """
        opcode, *modifiers = name.split(".")
        reasons: list[PtxError] = []
        for match in matches(opcode, tuple(modifiers)):
            before = dict(self._counts)
            try:
                operands, result = self._operands(match, sources, into, pair)
                made = s.Instruction(
                    opcode, tuple(modifiers), operands,
                    None if at_start else self._guarded(guard), loc=self._loc,
                )  # fmt: skip
                check(made, self._module.version, self._module.target)
            except PtxError as error:
                self._counts = before
                reasons.append(error)
                continue
            (self._start if at_start else self._body).append(made)
            return result
        raise reasons[0]

    def r(
        self, name: str, *sources: Source, into: Reg | None = None, guard: Reg | None = None
    ) -> Reg:
        """`op` for the many instructions whose result is one register."""
        result = self.op(name, *sources, into=into, guard=guard)
        if not isinstance(result, Reg):
            raise PtxError(f"`{name}` has no single result")
        return result

    def _guarded(self, guard: Reg | None) -> s.Guard | None:
        if guard is None:
            return self._guard
        if self._guard is not None:
            raise PtxError("a guarded instruction inside a guard")
        return s.Guard(guard.register, guard.inverted)

    def _operands(
        self, match: Match, sources: tuple[Source, ...], into: Reg | Sequence[Reg] | None,
        pair: bool,
    ) -> tuple[tuple[s.Operand, ...], Result]:  # fmt: skip
        rest, operands = list(sources), []
        result: Result = None
        for at, spec in enumerate(match.form.specs):
            if spec.is_result:
                operand, result = self._result(match, spec, into, pair)
                operands.append(operand)
                continue
            needed = sum(is_needed(match, x) for x in _sources(match.form.specs[at + 1 :]))
            if spec.optional and (len(rest) <= needed or spec.name == "h" and "hint" not in match):
                continue
            if not rest:
                raise PtxError(f"`{match.form.pattern()}` takes {match.form.operands}")
            operands.append(self._source(match, spec, rest.pop(0)))
        if rest:
            raise PtxError(f"`{match.form.pattern()}` takes {match.form.operands}")
        return tuple(operands), result

    def _result(
        self, match: Match, spec: OperandSpec, into: Reg | Sequence[Reg] | None, pair: bool
    ) -> tuple[s.Operand, Result]:
        if spec.name == "_":
            return s.Sink(), None
        count = match.count_of(spec)
        if spec.type == "any" and count == 0:
            if into is None or isinstance(into, Reg):
                raise PtxError("say with `into=` what to take the value apart into")
            return _vector(list(into)), list(into)
        kind = match.type_of(spec)
        if TYPES[kind].bits < 16 and kind != "pred":
            kind = "b16"
        if count:
            made = [self.reg(kind) for _ in range(count)] if into is None else into
            many = [made] if isinstance(made, Reg) else list(made)
            return _vector(many), many
        if into is not None and not isinstance(into, Reg):
            first, second = into
        else:
            first, second = into or self.reg(kind), None
        if pair and spec.paired:
            second = second or self.reg("pred")
            return s.Pair(first.register, second.register), (first, second)
        return first.register, first

    def _source(self, match: Match, spec: OperandSpec, x: Source) -> s.Operand:
        if spec.kind == "address":
            return x if isinstance(x, s.Address) else self.addr(_base(x))
        if spec.kind == "label":
            return s.Symbol(x) if isinstance(x, str) else _operand(x, "b64")
        if spec.kind == "arguments":
            return x if isinstance(x, s.Arguments) else s.Arguments(tuple(_each(x, "b64")))
        kind = "pred" if spec.kind == "predicate" else spec.type
        kind = kind if kind in ("any", "pred") else match.resolve(kind)
        if isinstance(x, Sequence) and not isinstance(x, str):
            return s.Vector(tuple(_each(x, kind)))
        return _operand(x, kind)

    # control flow and readability

    def label(self, stem: str = "L") -> str:
        """A new label's name; `place` puts it."""
        count = self._labels.get(stem, 0)
        self._labels[stem] = count + 1
        return f"${self.name}_{stem}_{count}" if count else f"${self.name}_{stem}"

    def place(self, label: str) -> None:
        """Puts a label here."""
        if label in self._placed:
            raise PtxError(f"the label {label} stands twice")
        self._placed.add(label)
        self._body.append(s.Label(label))

    def branch(self, label: str, if_: Reg | None = None) -> None:
        """Goes to a label, always or where a predicate holds."""
        self.op("bra", s.Symbol(label), guard=if_)

    @contextmanager
    def when(self, p: Reg) -> Iterator[None]:
        """A part that runs where a predicate holds, by a branch around it."""
        end = self.label("end")
        self.branch(end, ~p)
        yield
        self.place(end)

    @contextmanager
    def guarded(self, p: Reg) -> Iterator[None]:
        """A part whose instructions are all predicated."""
        if self._guard is not None:
            raise PtxError("a guard inside a guard")
        self._guard = s.Guard(p.register, p.inverted)
        yield
        self._guard = None

    @contextmanager
    def loop(self, counter: Reg, end: Source, step: Source = 1) -> Iterator[str]:
        """A loop that counts a register up to `end`; gives the label behind the loop."""
        top, out = self.label("loop"), self.label("done")
        kind = counter.type if counter.type[0] in "su" else f"s{TYPES[counter.type].bits}"
        self.branch(out, self.r(f"setp.ge.{kind}", counter, end))
        self.place(top)
        yield out
        self.op(f"add.{kind}", counter, step, into=counter)
        self.branch(top, self.r(f"setp.lt.{kind}", counter, end))
        self.place(out)

    def comment(self, text: str) -> None:
        """A comment line."""
        self._body += [s.Comment(line) for line in text.splitlines()]

    def at(self, file: str, line: int, column: int = 1) -> None:
        """What follows comes from this source position."""
        loc = s.Loc(self._module.file(file), line, column)
        if loc != self._loc:
            self._loc = loc
            self._body.append(loc)

    def function(self) -> s.Function:
        """The kernel as it is now; a `ret` ends it if nothing else does."""
        counts: list[s.Statement] = []
        for (prefix, declared), count in self._counts.items():
            shown = prefix if self._owns(prefix, declared) else f"{prefix}_{declared}_"
            counts.append(s.Registers(declared, ((shown, count),)))
        body = self._body
        if not body or not (isinstance(body[-1], s.Instruction) and body[-1].name in _ENDS):
            body = [*body, s.Instruction("ret", ())]
        used = {o.name for x in body if isinstance(x, s.Instruction) and x.opcode == "bra"
                for o in x.operands if isinstance(o, s.Symbol)}  # fmt: skip
        missing = sorted(used - self._placed)
        if missing:
            raise PtxError(f"`{self.name}` goes to {missing[0]}, which is nowhere")
        return s.Function(
            self.name, True, tuple(self._parameters), (), self._directives,
            (*counts, *self._variables, *self._start, *body), ("visible",),
        )  # fmt: skip


_ENDS = ("ret", "exit")


class Opcode:
    """`k.ld.global_.f32`: an instruction's name so far; calling it adds the instruction."""

    def __init__(self, kernel: Kernel, words: tuple[str, ...]) -> None:
        self._kernel, self._words = kernel, words

    def __getattr__(self, word: str) -> Opcode:
        if word.startswith("__"):
            raise AttributeError(word)
        return Opcode(self._kernel, (*self._words, word.rstrip("_")))

    def __call__(
        self, *sources: Source, into: Reg | Sequence[Reg] | None = None,
        guard: Reg | None = None, pair: bool = False,
    ) -> Any:  # fmt: skip
        return self._kernel.op(".".join(self._words), *sources, into=into, guard=guard, pair=pair)


def _parameter(kernel: str, name: str, type: str) -> s.Variable:
    if "[" in type:
        element, count = type.rstrip("]").split("[")
        return s.Variable("param", element, f"{kernel}_{name}", (int(count),), 64)
    return s.Variable("param", type, f"{kernel}_{name}")


def _sources(specs: Sequence[OperandSpec]) -> list[OperandSpec]:
    return [spec for spec in specs if not spec.is_result]


def _base(x: Source) -> Reg | s.Symbol:
    if isinstance(x, Reg | s.Symbol):
        return x
    raise PtxError("an address is a register, a variable, or made by `addr`")


def _each(x: Source, kind: str) -> Iterator[s.Operand]:
    for element in x if isinstance(x, Sequence) else (x,):
        yield _operand(element, kind)


def _vector(registers: Sequence[Reg]) -> s.Vector:
    return s.Vector(tuple(r.register for r in registers))


def _operand(x: Source, kind: str) -> s.Operand:
    if isinstance(x, Reg):
        return s.Negated(x.register) if x.inverted else x.register
    if isinstance(x, int | float) and kind == "any":
        raise PtxError("what is joined are registers")
    if isinstance(x, int | float):
        return _constant(x, kind)
    if isinstance(x, Sequence):
        raise PtxError("a list where one value belongs")
    return x


def _constant(x: int | float, kind: str) -> s.Immediate | s.FloatImmediate:
    """A Python number as a constant of a type; f32 is rounded to it, to nearest even."""
    if kind in ("f32", "f64"):
        code, size = ("<f", 4) if kind == "f32" else ("<d", 8)
        try:
            bits = struct.pack(code, x)
        except OverflowError:
            raise PtxError(f"{x} is not in the range of {kind}") from None
        return s.FloatImmediate(int.from_bytes(bits, "little"), size * 8)
    if isinstance(x, float):
        raise PtxError(f"{x} where a {kind} belongs")
    bits_of = TYPES[kind].bits
    if not -(1 << max(bits_of - 1, 1)) <= x < 1 << bits_of:
        raise PtxError(f"{x} is not in the range of {kind}")
    return s.Immediate(int(x))
