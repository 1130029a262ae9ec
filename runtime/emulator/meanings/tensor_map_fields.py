"""Tensor maps that a kernel changes, field by field, in shared or global memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stagefuse.runtime.emulator.access import places
from stagefuse.runtime.emulator.errors import Stop
from stagefuse.runtime.emulator.operands import address, getter
from stagefuse.runtime.emulator.program import Run, Site
from stagefuse.runtime.emulator.region import Region, span
from stagefuse.runtime.emulator.tensor_map import SIZE, replace

from . import effect
from .bulk import one_by_one, values
from .tensor_copy import note_seen

if TYPE_CHECKING:
    from stagefuse.runtime.emulator.machine import Group

Array = NDArray[Any]


def _map_bytes(g: Group, space: str, at: int, thread: int) -> Region:
    (part,) = places(g, space, np.array([at], np.int64), 8, np.array([thread]))
    start = int(part.index[0])
    if start + SIZE > part.arena.bytes.size:
        raise Stop("out-of-bounds", "a tensor map has 128 bytes", thread)
    return span(part.arena, start, SIZE)


@effect("bulk.replace_field")
def _replace(site: Site) -> Run:
    where, field = address(site, "a"), site.word("F")
    name = "mode" if site.has("mode") else "n"
    value = getter(site, site.operand(name), "b64" if "global_" in field and name == "n" and
                   field != "global_dim" else "b32")  # fmt: skip
    ordinal = getter(site, site.operand("ord"), "u32") if site.has("ord") else None
    space = site.word("S") or "generic"

    def run(g: Group) -> None:
        at, new = where(g), values(value, g)
        which = values(ordinal, g) if ordinal is not None else np.zeros(g.n, np.uint32)
        for i, thread in one_by_one(g):
            place = _map_bytes(g, space, int(at[i]), thread)
            changed = replace(place.read().tobytes(), field, int(which[i]), int(new[i]))
            _write(place, np.frombuffer(changed, np.uint8), thread)

    return run


@effect("bulk.publish_map")
def _publish(site: Site) -> Run:
    to, source = address(site, "d"), address(site, "a")

    def run(g: Group) -> None:
        to_, from_ = to(g), source(g)
        # a whole warp copies one map: every lane says the same addresses
        for i, thread in one_by_one(g):
            if i and int(to_[i]) == int(to_[i - 1]):
                continue
            place = _map_bytes(g, "shared", int(from_[i]), thread)
            _write(_map_bytes(g, "global", int(to_[i]), thread), place.read(), thread)

    return run


@effect("bulk.fence_map")
def _fence(site: Site) -> Run:
    """One that acquires lets the block's copies use what the map is now; see `map_at`."""
    if not site.has("a"):
        return lambda g: None
    where = address(site, "a")

    def run(g: Group) -> None:
        at = where(g)
        for i, thread in one_by_one(g):
            if not i or int(at[i]) != int(at[i - 1]):
                note_seen(g, _map_bytes(g, "generic", int(at[i]), thread), thread)

    return run


def _write(place: Region, values: Array, thread: int) -> None:
    """Writes a tensor map, whole or with a field changed."""
    place.write(values, thread)
    start = int(place.index[0])
    place.arena.maps[start] = place.arena.maps.get(start, 0) + 1
