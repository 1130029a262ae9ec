"""Runs PTX text on the CPU, and finds what is wrong with it.

    from stagefuse.runtime import emulator

    module = emulator.load(ptx_text)
    record = module.launch("name", grid=(x, y, z), block=(x, y, z), args=[array, np.int32(3)])

A NumPy array is a device buffer, updated in place, an allocation of its own with exact bounds;
`Pointer(array, byte_offset)` points into one; `uninitialised(shape, dtype)` is a buffer that
nothing wrote yet; a NumPy scalar is a scalar, `bytes` a struct by value. `module.globals["name"]`
are `.global` and `.const` variables as arrays. `TensorMap(array, box=(rows, columns), swizzle=128)`
is a descriptor for tensor copies, `Im2colMap` one for columns of pixels. A kernel that does
something wrong raises `Fault`.

How to add a family of instructions: rows in a module of `compiler/ptx/table/` whose `meaning`
names a function, and that function in a module of `meanings/` (found by itself; see its docstring
for the three kinds). What a function has to work with:

- `Site` while it is decoded: `getter(site, operand, type)` and `putter` for registers,
  `address(site, name)` for `[a]`, `site.word(slot)` for modifiers.
- `Group` when it runs: `g.n` threads, `g.threads()` their indices in the batch, `g.of(array)` their
  part of an array over the batch; `g.batch.block_of`, `g.batch.state` (a dictionary that a family
  keeps what it wants in, for the blocks of the batch, such as barriers or copies on their way).
- Memory: `access.load` and `access.store` with all checks; `access.places` gives arenas and byte
  positions. `shared::cluster` addresses of `mapa` are `(rank + 1) << RANK_BITS | offset`
  (`memory.py`; `access.peer_blocks` finds the block), generic ones have `SHARED_WINDOW` added;
  a cluster is always within one batch.
- Waiting: a `control` function gives False after it put the group away with `batch.park(g, step)`,
  until `batch.unpark(meaning)` lets it look again (`mbarrier.try_wait`); or a function sets
  `g.looks = True` and the loop around it comes round: other groups run first. What changes
  something that others may wait for adds to `machine.progress`, or the launch may be taken for a
  deadlock. `batch.converge` brings the lanes of a mask together, `converge_warpgroups` four warps.
- Asynchronous work: done when it is issued, by an `Agent` (`order.py`) that reads and writes a
  `Region`; threads are ordered after it where they `acquire` the agent's clock. Copies by
  `cp.async` land where a thread waits for them (`meanings/copies.py`).
- An argument with a method `parameter_bytes(heap)` gives its own bytes (a tensor map), and
  `heap.address_of(array, name)` the address of an array.
"""

from __future__ import annotations

from .errors import KINDS, Fault
from .im2col import Im2colMap
from .launch import Module, Record, load
from .memory import Pointer, uninitialised
from .tensor_map import TensorMap

__all__ = [
    "KINDS",
    "Fault",
    "Im2colMap",
    "Module",
    "Pointer",
    "Record",
    "TensorMap",
    "load",
    "uninitialised",
]
