"""Memory on a thread's stack: it grows above all variables of its functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stagefuse.compiler.ptx import syntax as s
from stagefuse.runtime.emulator.errors import Stop
from stagefuse.runtime.emulator.layout import STACK_BYTES
from stagefuse.runtime.emulator.operands import getter, putter
from stagefuse.runtime.emulator.program import Run, Site
from stagefuse.runtime.emulator.values import DTYPES

from . import effect

if TYPE_CHECKING:
    from stagefuse.runtime.emulator.machine import Batch, Group

Array = NDArray[Any]


def _ends(batch: Batch) -> Array:
    """Where the stack of each thread of a batch ends, as offsets in local memory."""
    found = batch.state.get("stack")
    if found is None:
        start = batch.machine.layout.stack_offset
        found = batch.state["stack"] = np.full(batch.threads, start, np.int64)
    assert isinstance(found, np.ndarray)
    return found


@effect("stack.alloca")
def alloca(site: Site) -> Run:
    get, put = getter(site, site.operand("n"), site.word("T")), _result(site)
    align = site.operand("align") if site.has("align") else s.Immediate(8)
    if not isinstance(align, s.Immediate) or align.value & (align.value - 1) or align.value < 1:
        raise site.error("an alignment is a power of two")
    to = align.value

    def run(g: Group) -> None:
        ends, threads, frame = _ends(g.batch), g.threads(), g.frame
        if frame.stack is None:
            frame.stack = np.full(g.batch.threads, -1, np.int64)
        entered = frame.stack[threads]
        frame.stack[threads] = np.where(entered < 0, ends[threads], entered)
        start = -(-ends[threads] // to) * to
        after = start + np.broadcast_to(get(g), (g.n,)).astype(np.int64)
        layout = g.batch.machine.layout
        over = (after > layout.stack_offset + STACK_BYTES) | (after < start)
        if over.any():
            at = int(over.argmax())
            raise Stop("out-of-bounds", f"a stack of more than the {STACK_BYTES} bytes that a "
                       "thread has here", int(threads[at]))  # fmt: skip
        ends[threads] = after
        put(g, start)

    return run


def _result(site: Site) -> Any:
    put, dtype = putter(site, site.operand("d"), site.word("T")), DTYPES[site.word("T")]
    return lambda g, values: put(g, values.astype(dtype))


@effect("stack.stacksave")
def stacksave(site: Site) -> Run:
    put = _result(site)
    return lambda g: put(g, _ends(g.batch)[g.threads()])


@effect("stack.stackrestore")
def stackrestore(site: Site) -> Run:
    get = getter(site, site.operand("a"), site.word("T"))

    def run(g: Group) -> None:
        _ends(g.batch)[g.threads()] = np.broadcast_to(get(g), (g.n,)).astype(np.int64)

    return run


def leave(g: Group) -> None:
    """Frees what a function's call allocated, at its end."""
    stack, threads = g.frame.stack, g.threads()
    if stack is not None:
        entered = stack[threads]
        ends = _ends(g.batch)
        ends[threads] = np.where(entered < 0, ends[threads], entered)
        stack[threads] = -1
