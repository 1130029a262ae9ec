"""Modules that are loaded, launches, and the record of what ran."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from time import monotonic
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stagefuse.compiler.ptx import PtxError, read_module
from stagefuse.compiler.ptx import syntax as s
from stagefuse.compiler.ptx.check import target_number
from stagefuse.compiler.ptx.types import TYPES
from stagefuse.dsl.collector import collector_rests
from stagefuse.dsl.frozen import frozen

from .layout import Layout, lay_out
from .limits import check_launch, cluster_of
from .machine import Dim, Machine
from .memory import Arena, Heap, Pointer
from .program import Code, Place, Program, alignment, byte_size
from .races import Races
from .values import DTYPES

Array = NDArray[Any]
NEWEST = 90
"""The newest GPUs that are emulated, as targets number them."""
Argument = Any
"""An array or `Pointer` (an address), a NumPy scalar, or `bytes` (a struct by value)."""


@frozen
class Record:
    """What a launch ran.

    `instructions` counts executions by a thread, by the instruction's name; `lines` by the line of
    the PTX text. `bytes` counts bytes by space and by `read`, `written` or `atomic`.
    `bank_conflicts` is how many more cycles shared memory took than without them. `printed` is
    what `printf` gave, one entry a call.
    """

    instructions: Mapping[str, int]
    lines: Mapping[int, int]
    bytes: Mapping[tuple[str, str], int]
    bank_conflicts: int = 0
    printed: tuple[str, ...] = ()

    def bytes_in(self, space: str) -> int:
        """All bytes that accesses to a memory space moved."""
        return sum(n for (where, _), n in self.bytes.items() if where == space)

    @property
    def total(self) -> int:
        """All instructions that threads executed."""
        return sum(self.instructions.values())


@dataclass(eq=False)
class Module:
    """A PTX module that is ready to run. Its variables keep their values between launches."""

    syntax: s.Module
    program: Program
    globals: dict[str, Array] = field(default_factory=dict)
    """The `.global` and `.const` variables as arrays."""
    _arenas: dict[str, Arena] = field(default_factory=dict)
    _layouts: dict[str, Layout] = field(default_factory=dict)

    def launch(
        self, name: str, *, grid: int | Sequence[int], block: int | Sequence[int],
        cluster: int | Sequence[int] = 1, shared_bytes: int = 0, args: Sequence[Argument] = (),
        races: bool = True, unwritten: bool = True, time_limit: float | None = None,
    ) -> Record:  # fmt: skip
        """Runs a kernel to its end. Arrays among the arguments are changed in place.

        `races=False` leaves out the search for races, which makes it faster. `unwritten=False`
        lets kernels read shared memory that nothing wrote, as some do that ignore what they read.

        Raises: Fault where the kernel does something wrong; ValueError where the launch does;
        TimeoutError, which says where threads stand, after `time_limit` seconds.
        """
        code = self._entry(name)
        sizes = _dim(grid), _dim(block), cluster_of(code, _dim(cluster))
        _settle_allocator()
        layout = self._layout(code)
        check_launch(self.syntax.target[0], code, layout, *sizes, shared_bytes)
        heap = Heap()
        for arena in self._arenas.values():
            arena.shadow, arena.maps = None, {}
        variables = {v: heap.add(arena) for v, arena in self._arenas.items()}
        params = self._params(code, heap, args)
        search = Races(layout.granules) if races else None
        machine = Machine(
            self.program, code, layout, *sizes, params, variables, heap, shared_bytes, search
        )
        machine.looks_for_unwritten = unwritten
        if time_limit is not None:
            machine.deadline = monotonic() + time_limit
        self._initialise(variables, machine)
        with collector_rests():
            for each in layout.codes:
                each.make_ready(self.program)
        for step in (step for each in layout.codes for step in each.steps):
            step.lanes = 0
        with np.errstate(all="ignore"):
            try:
                machine.run()
            finally:
                heap.copy_back()
        return self._record(machine)

    def _layout(self, code: Code) -> Layout:
        if code.name not in self._layouts:
            self._layouts[code.name] = lay_out(self.program, code)
        return self._layouts[code.name]

    def _entry(self, name: str) -> Code:
        code = self.program.codes.get(name)
        if code is None or not code.function.is_entry:
            names = [n for n, c in self.program.codes.items() if c.function.is_entry]
            raise ValueError(f"no kernel `{name}`; there is {', '.join(names) or 'none'}")
        return code

    def _params(self, code: Code, heap: Heap, args: Sequence[Argument]) -> Arena:
        formals = [f for f in code.formals if isinstance(f, Place)]
        if len(formals) != len(args):
            listed = ", ".join(f"{f.variable.name}: {_kind(f.variable)}" for f in formals)
            raise ValueError(f"`{code.name}` has {len(formals)} parameters ({listed}), and "
                             f"{len(args)} arguments were given")  # fmt: skip
        size = max([f.offset + byte_size(f.variable) for f in formals], default=0)
        data = np.zeros(max(-(-size // 16) * 16, 16), np.uint8)
        for formal, value in zip(formals, args, strict=True):
            raw = _packed(formal, value, heap)
            data[formal.offset : formal.offset + len(raw)] = np.frombuffer(raw, np.uint8)
        return Arena("param", len(data), data=data, limit=size)

    def _initialise(self, variables: dict[str, int], machine: Machine) -> None:
        """Writes addresses into variables that hold the addresses of others."""
        for v in self.syntax.variables:
            arena = self._arenas.get(v.name)
            if arena is None:
                continue
            size = TYPES[v.type].size_bytes
            for i, x in enumerate(v.initial):
                of = x.address if isinstance(x, s.ByteOf) else x
                if not isinstance(of, s.Symbol | s.GenericOf):
                    continue
                if of.name in variables:
                    address = variables[of.name] + of.offset
                elif of.name in self.program.codes:
                    address = machine.function_address(of.name)
                else:
                    continue
                first = x.number if isinstance(x, s.ByteOf) else 0
                raw = struct.pack("<Q", address)[first : first + size]
                arena.bytes[size * i : size * (i + 1)] = np.frombuffer(raw, "u1")

    def _record(self, machine: Machine) -> Record:
        instructions: dict[str, int] = {}
        lines: dict[int, int] = {}
        for code in machine.layout.codes:
            for step in code.steps:
                if step.lanes:
                    name, line = step.instruction.name, step.instruction.line
                    instructions[name] = instructions.get(name, 0) + step.lanes
                    lines[line] = lines.get(line, 0) + step.lanes
        return Record(instructions, lines, machine.traffic, machine.conflicts,
                      tuple(machine.printed))  # fmt: skip


def load(text: str | s.Module) -> Module:
    """A module from PTX text.

    Raises: PtxError with the line of what is no PTX, or of an instruction that is not known; and
    for a target that has instructions which work in ways that are not emulated.
    """
    with collector_rests():
        module = read_module(text) if isinstance(text, str) else text
        number, _ = target_number(module.target[0])
        if number > NEWEST:
            raise PtxError(f"the target is {module.target[0]}, and the emulator knows GPUs up to "
                           f"sm_{NEWEST}a")  # fmt: skip
        loaded = Module(module, Program(module))
    for place in loaded.program.globals.places.values():
        v = place.variable
        if v.space not in ("global", "const") or "extern" in v.linkage and not byte_size(v):
            continue
        array = _initial(v)
        arena = Arena(v.name, array.nbytes, data=array.view(np.uint8).reshape(-1))
        arena.constant = v.space == "const"
        loaded._arenas[v.name] = arena
        loaded.globals[v.name] = array
    return loaded


def _initial(v: s.Variable) -> Array:
    """A variable's values: what it says, then zeros (PTX ISA, "Initializers")."""
    dtype = DTYPES[v.type]
    shape = (*v.shape, v.vector) if v.vector > 1 else v.shape or (1,)
    array = np.zeros(shape, dtype)
    flat = array.reshape(-1)
    for i, x in enumerate(v.initial):
        if isinstance(x, s.Immediate):
            mask = (1 << TYPES[v.type].bits) - 1
            flat.view(f"u{dtype.itemsize}")[i] = x.value & mask
        elif isinstance(x, s.FloatImmediate):
            if dtype.kind == "f":
                flat[i] = x.value
            else:
                flat.view(f"u{dtype.itemsize}")[i] = x.bits
    return array


@cache
def _settle_allocator() -> None:
    """Lets the C library keep freed memory of the size of registers.

    It gives memory back to the system that is larger than the largest it has seen, and getting
    that again costs more than the arithmetic on it.
    """
    np.empty(24 << 20, np.uint8)


def _kind(v: s.Variable) -> str:
    """The type of a parameter in words."""
    return f"{byte_size(v)} bytes" if v.shape else v.type


def _dim(x: int | Sequence[int]) -> Dim:
    given = (x,) if isinstance(x, int | np.integer) else tuple(x)
    if not 1 <= len(given) <= 3:
        raise ValueError(f"{x} is no size of a grid or block")
    a, b, c = (*map(int, given), *(1,) * (3 - len(given)))
    return a, b, c


def _packed(formal: Place, value: Argument, heap: Heap) -> bytes:
    """An argument as the bytes of its parameter."""
    v = formal.variable
    size, name = byte_size(v), v.name
    if hasattr(value, "parameter_bytes"):  # what knows its own form, such as a tensor map
        raw = bytes(value.parameter_bytes(heap))
        if size == 8 < len(raw):  # a pointer to it
            data = np.frombuffer(raw, np.uint8).copy()
            raw = struct.pack("<Q", heap.add(Arena(name, len(data), data=data)))
    elif isinstance(value, Pointer):
        raw = struct.pack("<Q", heap.address_of(value.array, name) + value.byte_offset)
    elif isinstance(value, np.ndarray):
        raw = struct.pack("<Q", heap.address_of(value, name))
    elif isinstance(value, bytes | bytearray):
        raw = bytes(value)
    elif isinstance(value, np.generic):
        raw = value.tobytes()
    elif isinstance(value, int | float):
        dtype = DTYPES[v.type]
        kind = f"i{dtype.itemsize}" if isinstance(value, int) and value < 0 else dtype
        raw = np.array(value, kind).tobytes()
    else:
        raise ValueError(f"`{name}` cannot be {type(value).__name__}")
    if len(raw) != size:
        raise ValueError(f"`{name}` has {size} bytes, and the argument has {len(raw)}")
    return raw


__all__ = ["Argument", "Module", "PtxError", "Record", "alignment", "load"]
