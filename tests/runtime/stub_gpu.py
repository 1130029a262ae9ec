"""The stub of libcuda as a GPU: its launches run in the emulator.

Memory of the stub is this machine's, so a kernel's buffers are arrays over it, from the pointer to
the end of what was allocated there.
"""

from __future__ import annotations

import ctypes
import re
import traceback
from functools import cache
from typing import Any

import numpy as np

from stagefuse.runtime import emulator
from stagefuse.runtime.drivers import MAP_BYTES
from stagefuse.runtime.emulator.tensor_map import decode

_PARAMETER = re.compile(r"\.param \.(\w+)")
_THREE = ctypes.POINTER(ctypes.c_uint)
_RUNNER = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, _THREE, _THREE, _THREE, ctypes.c_uint,
    ctypes.POINTER(ctypes.c_uint64),
)  # fmt: skip
_LAUNCH_FAILED = 719
_kept: list[Any] = []
foreign: dict[int, int] = {}  # bytes by address, of arrays that are no memory of the stub


def install() -> None:
    """Have the stub run launches in the emulator, in this process."""
    library = ctypes.CDLL("libcuda.so.1")
    room = library.stub_room
    room.restype, room.argtypes = ctypes.c_uint64, [ctypes.c_uint64]

    def run(
        text: bytes, name: bytes, grid: Any, block: Any, cluster: Any, shared: int, values: Any
    ) -> int:
        try:
            module, kinds = _loaded(text), _kinds(text, name.decode())
            plain = len(kinds) - kinds.count("align")
            arguments = [_argument(kind, values[i], room) for i, kind in enumerate(kinds[:plain])]
            for i in range(plain, len(kinds)):
                at = plain + (i - plain) * MAP_BYTES // 8
                encoded = np.array(values[at : at + MAP_BYTES // 8], np.uint64).tobytes()
                arguments.append(_map(encoded, arguments, values))
            module.launch(
                name.decode(), grid=grid[:3], block=block[:3], cluster=cluster[:3],
                shared_bytes=shared, args=arguments,
            )  # fmt: skip
        except Exception:
            traceback.print_exc()
            return _LAUNCH_FAILED
        return 0

    _kept.append(_RUNNER(run))
    library.stub_runner(_kept[-1])


@cache
def _loaded(text: bytes) -> emulator.Module:
    return emulator.load(text.decode())


@cache
def _kinds(text: bytes, name: str) -> list[str]:
    found = re.search(rf"\.entry {re.escape(name)}\s*\(([^)]*)\)", text.decode())
    assert found is not None
    return _PARAMETER.findall(found[1])


def _map(encoded: bytes, arguments: list[Any], values: Any) -> Any:
    """The emulator's map for one in the memory of an argument."""
    map = decode(encoded)
    if map is None:
        return encoded
    for i, memory in enumerate(arguments):
        offset = map.address - values[i]
        if isinstance(memory, np.ndarray) and 0 <= offset < memory.nbytes:
            part = memory, offset, map.dtype, map.shape[::-1], map.strides[:0:-1]
            if map.lower:
                corners = map.lower[::-1], map.upper[::-1]
                return emulator.Im2colMap.of_part(
                    *part, map.box[1::-1], map.swizzle, *corners, map.steps[::-1]
                )
            return emulator.TensorMap.of_part(*part, map.box[::-1], map.swizzle)
    raise ValueError(f"a tensor map of {map.address:#x}, where no argument is")


def _argument(kind: str, value: int, room: Any) -> Any:
    if kind == "s64":
        return np.uint64(value).astype(np.int64)
    size = foreign.get(value) or room(value)
    if not size:
        return np.zeros(0, np.uint8)
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(value))
