"""Functions that a device has without a definition: printf, assertions, heap memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .access import places
from .errors import Stop
from .memory import ALLOCATION_BITS, Arena

if TYPE_CHECKING:
    from .machine import Group

Array = NDArray[Any]

_FORMAT = re.compile(r"%([-+ #0]*\d*(?:\.\d+)?)(hh|h|ll|l|z|t|j)?([diouxXeEfFgGcspaA%])")


def _bytes_at(g: Group, address: int, thread: int, size: int) -> bytes:
    addresses, who = np.array([address], np.int64), np.array([thread])
    part = places(g, "generic", addresses, 1, who)[0]
    at = int(part.index[0])
    return bytes(part.arena.bytes[at : at + size])


def _text_at(g: Group, address: int, thread: int) -> str:
    return _bytes_at(g, address, thread, 1 << 16).split(b"\0")[0].decode("utf-8", "replace")


def vprintf(g: Group, arguments: list[Array]) -> Array:
    """`vprintf(format, buffer)`: each argument lies in the buffer at its own alignment."""
    machine = g.batch.machine
    for i, thread in enumerate(g.threads()):
        text = _text_at(g, int(arguments[0][i]), int(thread))
        buffer, offset = int(arguments[1][i]), 0
        out, last = "", 0
        for m in _FORMAT.finditer(text):
            out += text[last : m.start()]
            last = m.end()
            if m[3] == "%":
                out += "%"
                continue
            size = 8 if m[3] in "eEfFgGaAsp" or m[2] in ("ll", "l", "z", "t", "j") else 4
            offset = -(-offset // size) * size
            raw = _bytes_at(g, buffer + offset, int(thread), size)
            offset += size
            out += _formatted(g, m, raw, int(thread))
        machine.printed.append(out + text[last:])
    return np.zeros(g.n, np.uint64)


def _formatted(g: Group, m: re.Match[str], raw: bytes, thread: int) -> str:
    if m[3] in "eEfFgGaA":
        letter = m[3] if m[3] not in "aA" else "g"
        return str(f"%{m[1]}{letter}" % float(np.frombuffer(raw, "<f8")[0]))
    signed = int.from_bytes(raw, "little", signed=True)
    unsigned = int.from_bytes(raw, "little")
    if m[3] == "s":
        return f"%{m[1]}s" % _text_at(g, unsigned, thread)
    if m[3] == "c":
        return chr(unsigned & 0xFF)
    if m[3] == "p":
        return f"0x{unsigned:x}"
    return f"%{m[1]}{m[3]}" % (signed if m[3] in "di" else unsigned)


def assertfail(g: Group, arguments: list[Array]) -> Array:
    """`__assertfail(message, file, line, function, char size)`."""
    thread = int(g.threads()[0])
    message, file, function = (_text_at(g, int(arguments[i][0]), thread) for i in (0, 1, 3))
    line = int(arguments[2][0])
    raise Stop("trap", f"assertion `{message}` failed in {function} ({file}:{line})", thread)


def malloc(g: Group, arguments: list[Array]) -> Array:
    """An allocation of its own for each thread, with exact bounds, which nothing wrote."""
    heap = g.batch.machine.heap
    sizes = [int(n) for n in arguments[0]]
    made = [heap.add(Arena("memory of malloc", n, limit=n)) if n else 0 for n in sizes]
    return np.array(made, np.uint64)


def free(g: Group, arguments: list[Array]) -> None:
    """Later accesses are out of bounds.

    Raises: Stop where the address is not one that `malloc` gave, or is freed already.
    """
    heap = g.batch.machine.heap
    for address, thread in zip(arguments[0].tolist(), g.threads().tolist(), strict=True):
        if address == 0:
            continue
        number, rest = address >> ALLOCATION_BITS, address & ((1 << ALLOCATION_BITS) - 1)
        arena = heap.arenas[number - 1] if 0 < number <= len(heap.arenas) else None
        if arena is None or rest or arena.name != "memory of malloc":
            raise Stop("out-of-bounds", f"free of {address:#x}, which malloc did not give", thread)
        arena.name, arena.limit = "memory that was freed", 0


EXTERNALS: dict[str, Callable[[Group, list[Array]], Array | None]] = {
    "vprintf": vprintf,
    "__assertfail": assertfail,
    "malloc": malloc,
    "free": free,
}
