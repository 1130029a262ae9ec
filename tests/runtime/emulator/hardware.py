"""Launches of the emulator, made on a GPU too: `pytest tests/runtime/emulator --hardware`.

A launch that the emulator finds no fault in runs on GPU 0 with the same memory. What the two leave
there must be the same, bit for bit but for NaN's payload, unless the kernel executed something
whose result the PTX ISA leaves open: an approximation, a tensor core's order of sums, the order
of atomic operations. Then memory gets what the GPU left, so the test's own assertions judge that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stagefuse.compiler.ptx import print_module
from stagefuse.compiler.ptx import syntax as s
from stagefuse.dsl.dtypes import DTYPES
from stagefuse.runtime import emulator
from stagefuse.runtime.emulator.launch import _dim
from stagefuse.runtime.emulator.memory import Arena
from stagefuse.runtime.emulator.program import Place

from .device_process import DeviceProcess

Array = NDArray[Any]
OPEN = re.compile(
    r"approx|^(mma|wgmma|wmma|atom|div\.full)|^red.*\.b?f|^(tanh|ex2|lg2|sin|cos)\."
    r"|^cvt\.\w+\.b?f16\.f64|^(mul|add|sub)\.(ftz\.)?(sat\.)?(b?f16(x2)?|f32|f64)$"
)
"""Names of instructions whose results, or their order, the ISA leaves open: among them arithmetic
without a rounding modifier, which may be contracted, and NaN narrowed from f64."""


class Hardware:
    """GPU 0 as a place for the emulator's launches; `report` gets a line for each."""

    def __init__(self, report: Path | None, device: DeviceProcess | None = None) -> None:
        self.report = report
        self.device = device or DeviceProcess()
        self._modules: dict[tuple[int, int], tuple[emulator.Module, int]] = {}

    def wrap(self, emulated: Callable[..., Any], test: str, left_open: bool) -> Callable[..., Any]:
        """`emulator.Module.launch`, with the launch on the GPU behind it."""

        def launch(module: emulator.Module, name: str, **given: Any) -> Any:
            memory = _Memory(self.device)
            try:
                variables = self._variables(module, memory)
                raw = self._parameters(module, name, given, memory)
                record = emulated(module, name, **given)
                if raw is not None:
                    self._run(module, name, given, raw)
                    found = memory.compared() + self._globals(variables)
                    self._judge(test, name, record, found, left_open)
                return record
            finally:
                memory.close()

        return launch

    def _module(self, module: emulator.Module) -> int:
        """The module in the GPU's process, by its number there."""
        key = (id(module), self.device.life)
        if key not in self._modules:
            number = self.device.call("load", print_module(module.syntax))
            key = (id(module), self.device.life)
            self._modules[key] = module, number
        return self._modules[key][1]

    def _variables(self, module: emulator.Module, memory: _Memory) -> list[tuple[int, Array]]:
        """Where the module's variables lie, which get the values that they have here; but for
        those that hold addresses, which differ."""
        plain = {
            v.name: v.space
            for v in module.syntax.variables
            if all(isinstance(x, s.Immediate | s.FloatImmediate) for x in v.initial)
        }
        found = []
        for name, array in module.globals.items():
            if name in plain:
                address = self.device.call("variable", self._module(module), name)
                memory.put(address, array)
                if plain[name] == "global":
                    found.append((address, array))
        return found

    def _globals(self, variables: list[tuple[int, Array]]) -> list[tuple[Array, Array]]:
        return [(array, _fetched(self.device, at, array)) for at, array in variables]

    def _parameters(
        self, module: emulator.Module, name: str, given: dict[str, Any], memory: _Memory
    ) -> tuple[Array, list[int]] | None:
        """The kernel's parameters and where each begins; None where the launch is refused."""
        try:
            code = module._entry(name)
            args = [memory.encoded(a) for a in given.get("args", ())]
            arena = module._params(code, memory, args)  # type: ignore[arg-type]
        except ValueError:  # as the emulator will say
            return None
        return arena.bytes, [f.offset for f in code.formals if isinstance(f, Place)]

    def _run(
        self, module: emulator.Module, name: str, given: dict[str, Any],
        raw: tuple[Array, list[int]],
    ) -> None:  # fmt: skip
        said = module._entry(name).function.directive("reqnctapercluster")
        grid, block, cluster = (_dim(given.get(k, 1)) for k in ("grid", "block", "cluster"))
        data, offsets = raw
        self.device.call(
            "launch", self._module(module), name, grid, block,
            cluster if said is None and cluster != (1, 1, 1) else None,
            int(given.get("shared_bytes", 0)), data.tobytes(), offsets,
        )  # fmt: skip

    def _judge(
        self, test: str, name: str, record: Any, pairs: list[tuple[Array, Array]], is_open: bool
    ) -> None:
        different = sum(int(np.count_nonzero(_differ(a, b))) for a, b in pairs)
        samples = _samples(pairs)
        left_open = sorted({n for n in record.instructions if OPEN.search(n)})
        if is_open:  # the test says so
            left_open.append("undefined values")
        for held, found in pairs:
            if held.flags.writeable:
                held.view(np.ndarray)[...] = found
        if self.report is not None:
            line = {"test": test, "kernel": name, "elements": sum(a.size for a, _ in pairs),
                    "different": different, "open": left_open, "samples": samples}  # fmt: skip
            with self.report.open("a") as file:
                file.write(json.dumps(line) + "\n")
        assert not different or left_open, "\n".join(
            [f"{different} elements differ on the GPU", *samples]
        )


class _Memory:
    """The GPU's memory of a launch, where the emulator has a heap."""

    def __init__(self, device: DeviceProcess) -> None:
        self.device = device
        self._life = 0
        self._known: dict[tuple[int, int], tuple[int, Array]] = {}
        self._addresses: list[int] = []
        self._views: list[Array] = []

    def put(self, address: int, array: Array) -> None:
        self.device.call("put", address, np.ascontiguousarray(array.view(np.ndarray)).tobytes())

    def _new(self, size: int) -> int:
        address: int = self.device.call("allocate", size)
        self._life = self.device.life
        self._addresses.append(address)
        return address

    def add(self, arena: Arena) -> int:
        address = self._new(len(arena.bytes))
        self.put(address, arena.bytes)
        return address

    def address_of(self, array: Array, name: str) -> int:
        key = (array.__array_interface__["data"][0], array.nbytes)
        if key not in self._known:
            self._known[key] = self._new(array.nbytes), array
            self.put(self._known[key][0], array)
        return self._known[key][0]

    def address_of_view(self, array: Array) -> int:
        if array.flags.c_contiguous:
            return self.address_of(array, "array")
        low, _ = np.lib.array_utils.byte_bounds(array)
        whole = array.base
        assert isinstance(whole, np.ndarray) and whole.flags.c_contiguous
        return self.address_of(whole, "array") + low - whole.__array_interface__["data"][0]

    def encoded(self, value: Any) -> Any:
        """An argument, with a tensor map as the driver encodes it."""
        if isinstance(value, emulator.TensorMap):
            return _Encoded(self.device.call("tensor_map", *self._tiles(value)))
        if isinstance(value, emulator.Im2colMap):
            return _Encoded(self.device.call("im2col_map", *self._columns(value)))
        return value

    def _tiles(self, given: emulator.TensorMap) -> tuple[Any, ...]:
        """A tensor map as `calls.tensor_map` takes it."""
        steps = given.element_strides
        return (
            *self._view(given.array), given.box[::-1], given.swizzle,
            None if steps is None else steps[::-1], given.fill == "nan",
        )  # fmt: skip

    def _columns(self, given: emulator.Im2colMap) -> tuple[Any, ...]:
        """A map for im2col as `Device.im2col_map` takes it."""
        steps = given.element_strides or (1,) * given.array.ndim
        return (
            *self._view(given.array), given.lower[::-1], given.upper[::-1],
            (given.channels, given.pixels), given.swizzle, steps[::-1], given.fill == "nan",
        )  # fmt: skip

    def _view(self, array: Array) -> tuple[Any, ...]:
        """Its dtype, address, sizes and strides, innermost dimension first."""
        name = next((d.name for d in DTYPES.values() if d.numpy == array.dtype), "u8")
        return name, self.address_of_view(array), array.shape[::-1], array.strides[:-1][::-1]

    def compared(self) -> list[tuple[Array, Array]]:
        return [(array, _fetched(self.device, at, array)) for at, array in self._known.values()]

    def close(self) -> None:
        """Frees it, unless it went with the process it was in."""
        if self.device.is_running and self.device.life == self._life:
            for address in self._addresses:
                self.device.call("free", address)


class _Encoded:
    def __init__(self, raw: bytes) -> None:
        self.raw = raw

    def parameter_bytes(self, heap: Any) -> bytes:
        return self.raw


def _fetched(device: DeviceProcess, address: int, array: Array) -> Array:
    raw: bytes = device.call("fetch", address, array.nbytes)
    return np.frombuffer(raw, array.dtype).reshape(array.shape)


def _differ(a: Array, b: Array) -> Array:
    """Which elements differ in a bit; NaN are all the same."""
    one, two = (np.ascontiguousarray(x.view(np.ndarray)) for x in (a, b))
    if one.dtype.itemsize not in (1, 2, 4, 8) or one.dtype.names:
        return np.asarray(one.reshape(-1).view("u1") != two.reshape(-1).view("u1"))
    raw = f"u{one.dtype.itemsize}"
    return np.asarray((one.view(raw) != two.view(raw)) & ~((one != one) & (two != two)))


def _samples(pairs: list[tuple[Array, Array]], most: int = 4) -> list[str]:
    """The first elements that differ, in words, with what stands there in arrays of that size."""
    found = []
    for here, there in pairs:
        for at in np.flatnonzero(_differ(here, there))[:most].tolist():
            same = [a.reshape(-1)[at] for a, _ in pairs if a is not here and a.size == here.size]
            one, two = (x.view(np.ndarray).reshape(-1)[at : at + 1] for x in (here, there))
            given = f" of {', '.join(map(str, same))}" if same else ""
            found.append(
                f"element {at}{given}: {one[0]} ({one.tobytes()[::-1].hex()}) in the emulator, "
                f"{two[0]} ({two.tobytes()[::-1].hex()}) on the GPU"
            )
    return found
