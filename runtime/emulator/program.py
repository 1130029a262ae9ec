"""A module decoded once: functions as flat lists of steps, names as places.

Each step holds a Python function that runs the instruction for a group of threads; what it does
comes from the meaning that the instruction table names (`meanings`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from stagefuse.compiler.ptx import PtxError, bind, check, print_instruction
from stagefuse.compiler.ptx import syntax as s
from stagefuse.compiler.ptx.check import check_function, kinds, unmet
from stagefuse.compiler.ptx.table import Match, OperandSpec
from stagefuse.compiler.ptx.types import TYPES
from stagefuse.dsl.frozen import frozen

from .granules import Granules
from .turns import releases

if TYPE_CHECKING:
    from .machine import Group, Machine

Run = Callable[["Group"], None]
Control = Callable[["Machine", "Group", "Step"], bool]
"""Runs a step that may move or stop a group; gives whether the group goes on at its pc."""


@dataclass(slots=True, eq=False)
class Step:
    """One instruction, ready to run: `run` for those that just go on, else `control`."""

    instruction: s.Instruction
    match: Match
    run: Run | None = None
    control: Control | None = None
    is_leader: bool = False
    is_release: bool = False
    """Whether it tells other blocks of what was done before: they run before it."""
    lanes: int = 0
    """How many threads executed it, in the current launch."""
    traffic: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return print_instruction(self.instruction)


@frozen
class Place:
    """Where a variable lies: its space, its offset or address, its declaration."""

    space: str
    offset: int
    variable: s.Variable
    key: str = ""
    """For shared memory, whose offsets depend on the kernel: what tells the variable apart."""


@dataclass(eq=False)
class Code:
    """A function: its steps, how many registers it has, where its variables lie."""

    function: s.Function
    number: int
    steps: list[Step] = field(default_factory=list)
    registers: list[str] = field(default_factory=list)
    """The type of each register, by its number."""
    labels: list[int] = field(default_factory=list)
    """The steps that labels stand before."""
    tables: dict[str, s.Targets] = field(default_factory=dict)
    prototypes: dict[str, s.Prototype] = field(default_factory=dict)
    param_sizes: list[int] = field(default_factory=list)
    """Bytes of each parameter variable: formal ones, then those of calls."""
    formals: list[Place | int] = field(default_factory=list)
    """Results, then parameters: a place, or the number of a register."""
    local_bytes: int = 0
    shared: list[Place] = field(default_factory=list)
    """Its own variables in shared memory."""
    dynamic: list[Place] = field(default_factory=list)
    mentions: set[str] = field(default_factory=set)
    """Names of variables and functions that it uses."""
    calls_pointers: bool = False
    swapped: set[s.Address] = field(default_factory=set)
    """Addresses, as they are written, of its compare-and-swaps."""
    symbols: dict[str, s.Operand] = field(default_factory=dict)
    """Names that registers were given the addresses of, by register."""
    uses_stack: bool = False
    uses_reserved: bool = False
    """Whether it looks for the shared memory that the system keeps for itself."""
    granules: Granules = field(default_factory=Granules)
    pending: list[tuple[Step, Scope, Decoded]] = field(default_factory=list)
    """Steps that are made ready when the function is first used."""

    def make_ready(self, program: Program) -> None:
        """Gives each step what it runs."""
        from .meanings import compile_step, load_families
        from .passed_by import note_steps_behind
        from .unwritten import find_open

        load_families()
        pending, self.pending = self.pending, []
        if pending:
            self.ready, self.open = pending, find_open(self, pending)
        for step, scope, known in pending:
            x = step.instruction
            compile_step(Site(program, self, scope, x, known, known.bound(x)), step)
        if pending:
            note_steps_behind(program, self, [scope for _, scope, _ in pending])

    barrier_sites: dict[int, int] = field(default_factory=dict)
    """Steps that wait for threads of the block or the warp, with a number for each."""
    ready: list[tuple[Step, Scope, Decoded]] = field(default_factory=list)
    """Steps that were made ready."""
    open: frozenset[str] = frozenset()
    """Registers that may be read where nothing wrote them, and what is computed from them."""
    loaded: frozenset[str] = frozenset()
    """Those among them that came from loads of what nothing wrote, once there was one."""
    loaded_only: set[int] = field(default_factory=set)
    """Registers that are open for no other reason than such a load, by number."""
    watched: frozenset[str] | None = None
    """Registers that belong to asynchronous products, once they were looked for."""
    reads: frozenset[str] | None = None
    """Registers that are read, and those below that are not only put into words in memory."""
    looked_at: frozenset[str] | None = None

    @property
    def name(self) -> str:
        return self.function.name

    def swaps_at(self, x: s.Operand) -> bool:
        """Whether a compare-and-swap is at an address, in the same words or by its name's."""
        return x in self.swapped or any(self._named(x) == self._named(o) for o in self.swapped)

    def _named(self, x: s.Operand) -> s.Operand:
        """An address by a name where its register holds that."""
        if not isinstance(x, s.Address) or not isinstance(x.base, s.Register):
            return x
        symbol = self.symbols.get(x.base.name)
        return replace(x, base=symbol) if isinstance(symbol, s.Symbol) else x


def byte_size(v: s.Variable) -> int:
    """How many bytes a variable has; 0 where its size is not said."""
    size = TYPES[v.type].size_bytes * v.vector
    for dimension in v.shape:
        size *= dimension
    return size


def alignment(v: s.Variable) -> int:
    """The alignment of a variable: what it says, else its element's size."""
    return v.align or TYPES[v.type].size_bytes * v.vector


def aligned(offset: int, to: int) -> int:
    """The first multiple of `to` from `offset` on."""
    return -(-offset // to) * to


@dataclass
class Site:
    """An instruction while it is decoded, with what its names stand for."""

    program: Program
    code: Code
    scope: Scope
    instruction: s.Instruction
    known: Decoded
    bound: dict[str, s.Operand | None]

    @property
    def match(self) -> Match:
        return self.known.match

    @property
    def specs(self) -> dict[str, OperandSpec]:
        """The operands of the form by their names."""
        return self.known.specs

    def word(self, slot: str, default: str = "") -> str:
        """The word in a slot of the form."""
        return self.match.get(slot, default)

    def has(self, operand: str) -> bool:
        """Whether an optional operand is there."""
        return self.bound.get(operand) is not None

    def operand(self, name: str) -> s.Operand:
        found = self.bound[name]
        if found is None:
            raise self.error(f"no operand {name}")
        return found

    def type_of(self, name: str) -> str:
        """The type of an operand."""
        return self.known.type_of(name)

    def error(self, message: str) -> PtxError:
        """An error that names this instruction."""
        shown = print_instruction(self.instruction)
        return PtxError(f"`{shown}`: {message}", line=self.instruction.line)


@dataclass
class Scope:
    """Names of one pair of braces, and of those around it."""

    number: int
    outer: Scope | None = None
    names: set[str] = field(default_factory=set)
    slots: dict[str, int] = field(default_factory=dict)
    """The numbers of its registers that are used."""
    families: dict[str, int] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)

    def owner(self, name: str) -> Scope | None:
        """The scope whose declaration a register's name means."""
        if name in self.slots or name in self.names:
            return self
        stem = name.rstrip("0123456789")
        while len(stem) < len(name):
            if int(name[len(stem) :]) < self.families.get(stem, 0):
                return self
            stem = name[: len(stem) + 1]
        return self.outer.owner(name) if self.outer else None

    def slot(self, name: str, type: str, registers: list[str]) -> int:
        """The number of a register of this scope, which joins its function's when first seen."""
        found = self.slots.get(name)
        if found is None:
            found = self.slots[name] = len(registers)
            registers.append(type)
        return found

    def label(self, name: str) -> int | None:
        """The step that a label stands before; braces within a function may have their own."""
        found = self.labels.get(name)
        return found if found is not None or self.outer is None else self.outer.label(name)

    def place(self, name: str) -> Place | None:
        found = self.places.get(name)
        return found if found or self.outer is None else self.outer.place(name)


class Program:
    """All functions of a module, and where its variables lie."""

    def __init__(self, module: s.Module) -> None:
        self.module = module
        self.codes: dict[str, Code] = {}
        self.externals: set[str] = set()
        self.globals, self._scopes = Scope(0), 0
        self.that_wait: set[str] | None = None  # functions, found when first needed
        for v in module.variables:
            self._module_variable(v)
        for function in module.functions:
            if function.body is None:
                self.externals.add(function.name)
            else:
                self.codes[function.name] = Code(function, len(self.codes))
        for name, target in module.aliases:
            if target not in self.codes:
                raise PtxError(f"`{name}` stands for `{target}`, which no function is")
            self.codes[name] = self.codes[target]
        self.externals -= set(self.codes)
        for code in dict.fromkeys(self.codes.values()):
            _Decode(self, code).run()

    def _module_variable(self, v: s.Variable) -> None:
        if v.space == "shared" and (v.shape and v.shape[0] == 0):
            self.globals.places[v.name] = Place("dynamic", 0, v)
        elif v.space == "shared":
            self.globals.places[v.name] = Place("shared", 0, v, v.name)
        else:
            self.globals.places[v.name] = Place(v.space, 0, v)

    def new_scope(self, outer: Scope) -> Scope:
        self._scopes += 1
        return Scope(self._scopes, outer)


@dataclass(slots=True, eq=False)
class Decoded:
    """What instructions of one name with operands of the same kinds are."""

    match: Match
    present: tuple[str, ...]
    """Names of the form's operands that are there, in order."""
    specs: dict[str, OperandSpec]
    has_names: bool
    """Whether operands are names of variables, functions, labels or special registers."""
    types: dict[str, str] = field(default_factory=dict)
    """Types of operands that were asked for."""
    values: Any = None
    """What pure instructions of this kind compute, once one was made ready."""

    def bound(self, x: s.Instruction) -> dict[str, s.Operand | None]:
        """Operands by the names of the form, `None` for one that is left out."""
        return dict.fromkeys(self.specs) | dict(zip(self.present, x.operands, strict=True))

    def type_of(self, name: str) -> str:
        """The type of an operand."""
        found = self.types.get(name)
        if found is None:
            spec = self.specs[name]
            found = "pred" if spec.kind == "predicate" else self.match.type_of(spec)
            self.types[name] = found
        return found


_SIGNALS = frozenset(("barrier.arrive", "mbarrier.arrive", "atomic.atom", "atomic.red",
                      "atomic.cas"))  # fmt: skip
"""Meanings of what may let others go on, who then get their turn."""


class _Decode:
    """Decodes one function."""

    def __init__(self, program: Program, code: Code) -> None:
        self.program, self.code = program, code
        self.available = program.module.version, program.module.target[0]
        self.outside: list[tuple[str, s.Instruction, Scope]] = []
        """Names that no variable has, with the instructions that use them."""
        self.known: dict[tuple[Any, ...], Decoded] = {}

    def run(self) -> None:
        function = self.code.function
        check_function(function, *self.available)
        scope = self.program.new_scope(self.program.globals)
        offset = 0
        for v in (*function.results, *function.parameters):
            if v.space == "reg":
                scope.names.add(v.name)
                self.code.formals.append(scope.slot(v.name, v.type, self.code.registers))
            elif function.is_entry:
                offset = aligned(offset, alignment(v))
                scope.places[v.name] = place = Place("entry", offset, v)
                self.code.formals.append(place)
                offset += byte_size(v)
            else:
                self.code.formals.append(self.param(scope, v))
        self.body(function.body or (), scope)
        line = self.code.steps[-1].instruction.line if self.code.steps else function.line
        self.instruction(s.Instruction("ret", (), line=line), scope)  # who comes to the end returns
        for at in self.code.labels:
            self.code.steps[at].is_leader = True
        for at, step in enumerate(self.code.steps[:-1], 1):
            if step.match.form.meaning in _SIGNALS:
                self.code.steps[at].is_leader = True
        for step in self.code.steps:
            if releases(step.instruction):
                step.is_leader = step.is_release = True
        self.check_names()

    def param(self, scope: Scope, v: s.Variable) -> Place:
        place = Place("call", len(self.code.param_sizes), v)
        self.code.param_sizes.append(max(byte_size(v), 1))
        scope.places[v.name] = place
        return place

    def body(self, statements: tuple[s.Statement, ...], scope: Scope) -> None:
        for x in statements:
            match x:
                case s.Instruction():
                    self.instruction(x, scope)
                case s.Label(name):
                    scope.labels[name] = len(self.code.steps)
                    self.code.labels.append(len(self.code.steps))
                case s.Registers(_, names):
                    for name, count in names:
                        if count is None:
                            scope.names.add(name)
                        else:
                            scope.families[name] = count
                case s.Variable():
                    self.variable(x, scope)
                case s.Targets(name):
                    self.code.tables[name] = x
                case s.Prototype(name):
                    self.code.prototypes[name] = x
                case s.Scope(inner):
                    self.body(inner, self.program.new_scope(scope))
                case _:
                    pass

    def variable(self, v: s.Variable, scope: Scope) -> None:
        if v.space == "param":
            self.param(scope, v)
        elif v.space == "local":
            offset = aligned(self.code.local_bytes, alignment(v))
            self.code.local_bytes = offset + byte_size(v)
            scope.places[v.name] = Place("local", offset, v)
        elif v.space == "shared" and v.shape and v.shape[0] == 0:
            scope.places[v.name] = place = Place("dynamic", 0, v)
            self.code.dynamic.append(place)
        elif v.space == "shared":
            key = f"{self.code.number}:{scope.number}:{v.name}"
            scope.places[v.name] = place = Place("shared", 0, v, key)
            self.code.shared.append(place)
        else:
            scope.places[v.name] = place = Place(v.space, 0, v)
            self.program.globals.places.setdefault(v.name, place)

    def instruction(self, x: s.Instruction, scope: Scope) -> None:
        key = x.opcode, x.modifiers, kinds(x.operands)
        known = self.known.get(key)
        if known is None:
            known = self.known[key] = self.form_of(x)
        code, meaning = self.code, known.match.form.meaning
        step = Step(x, known.match)
        code.steps.append(step)
        code.pending.append((step, scope, known))
        if meaning.startswith("async.copy"):  # their sizes are operands
            code.granules = code.granules.with_access(known.match, known.bound(x))
        if meaning == "atomic.cas":
            code.swapped.update(o for o in x.operands if isinstance(o, s.Address))
        if known.has_names:
            self.mention(x, scope)
            if x.opcode == "mov" and isinstance(x.operands[0], s.Register):
                code.symbols[x.operands[0].name] = x.operands[1]

    def form_of(self, x: s.Instruction) -> Decoded:
        """The form of an instruction, and of all others of its kind, which its code then has."""
        match, bound = bind(x)
        if unmet(x, match.form, *self.available):
            match = check(x, *self.available)
        leaves = [leaf for operand in x.operands for leaf in s.leaves(operand)]
        present = tuple(spec.name for spec, operand in bound if operand is not None)
        made = Decoded(
            match, present, {spec.name: spec for spec, _ in bound},
            any(isinstance(leaf, s.Symbol | s.Special) for leaf in leaves),
        )  # fmt: skip
        self.code.granules = self.code.granules.with_access(match, made.bound(x))
        self.code.uses_stack |= match.form.meaning.startswith("stack.")
        if match.form.opcode == "call":
            self.code.calls_pointers |= isinstance(made.bound(x)["function"], s.Register)
        return made

    def mention(self, x: s.Instruction, scope: Scope) -> None:
        """Notes the names in an instruction that are no registers."""
        for operand in x.operands:
            for leaf in s.leaves(operand):
                if isinstance(leaf, s.Symbol):
                    self.code.mentions.add(leaf.name)
                    if scope.place(leaf.name) is None:
                        self.outside.append((leaf.name, x, scope))
                elif isinstance(leaf, s.Special):
                    self.code.uses_reserved |= leaf.name.startswith("%reserved_smem")

    def check_names(self) -> None:
        """Raises: PtxError for a name that no variable, function, label or list has."""
        code, program = self.code, self.program
        known = {*code.tables, *code.prototypes, *program.codes, *program.externals}
        for name, x, scope in self.outside:
            if name not in known and scope.label(name) is None:
                shown = print_instruction(x)
                raise PtxError(f"`{shown}`: `{name}` is not declared", line=x.line)


def slot_of(site: Site, register: s.Register) -> int:
    """The number of a register."""
    found = site.scope.slots.get(register.name)
    if found is not None:
        return found
    owner = site.scope.owner(register.name)
    if owner is None:
        raise site.error(f"`{register.name}` is not declared here")
    return owner.slot(register.name, register.type, site.code.registers)
