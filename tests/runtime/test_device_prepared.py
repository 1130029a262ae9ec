"""Memory and order of launches on a device: nothing shares a byte in its life, nothing races."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from stagefuse.compiler.plan import GpuLaunchPlan, GpuPlan
from stagefuse.runtime.device_prepared import DevicePreparer, order, pack
from stagefuse.runtime.errors import PlanError

from . import handmade, handmade_gpu


def test_tenants_that_live_at_once_do_not_overlap(chance: random.Random) -> None:
    for _ in range(200):
        tenants = []
        for _ in range(chance.randrange(12)):
            first = chance.randrange(10)
            last = first + chance.randrange(5)
            tenants.append((256 * chance.randrange(4), first, last))
        offsets = pack(tenants)
        for i, (size, first, last) in enumerate(tenants):
            for j, (theirs, begin, end) in enumerate(tenants[:i]):
                if first <= end and begin <= last:
                    assert offsets[i] + size <= offsets[j] or offsets[j] + theirs <= offsets[i]


def test_memory_is_used_again() -> None:
    assert pack([(512, 0, 1), (256, 2, 3), (256, 2, 4)]) == [0, 0, 256]


def test_order_is_what_conflicts_ask_for_and_no_more(chance: random.Random) -> None:
    for _ in range(200):
        launches = [
            [
                (begin, begin + chance.randrange(3), chance.random() < 0.4)
                for begin in (chance.randrange(8) for _ in range(3))
            ]
            for _ in range(8)
        ]
        waits = order(launches)
        before: list[set[int]] = []
        for mine in waits:
            before.append(set(mine).union(*(before[i] for i in mine)))
        for j, mine in enumerate(launches):
            for i in range(j):
                conflict = any(
                    (w or v) and max(a, c) < min(b, d)
                    for a, b, w in mine
                    for c, d, v in launches[i]
                )
                assert not conflict or i in before[j]
            for i in waits[j]:  # each edge is needed: no other way leads there
                others = [k for k in waits[j] if k != i]
                assert not any(i == k or i in before[k] for k in others)


def test_branches_do_not_wait_for_each_other() -> None:
    bucket = DevicePreparer(handmade.affine(), handmade_gpu.affine("sm_80")).prepare(
        {"B": 2, "T": 5}
    )
    assert [n.after for n in bucket.launches] == [(), (0,), (0,)]
    assert [n.grid for n in bucket.launches] == [(1, 1, 1)] * 3
    assert [n.dims for n in bucket.launches] == [(30,), (30, 2), (30, 10)]
    assert sorted(bucket.places) == [0, 2, 3, 4]
    assert all(offset % 256 == 0 for offset, _ in bucket.places.values())


def test_launches_use_what_stands_for_a_buffer() -> None:
    preparer = DevicePreparer(handmade.affine(), handmade_gpu.aliased("sm_80"))
    there, stored = (preparer.prepare({"B": b, "T": 5}) for b in (1, 2))
    assert [n.plan.buffers for n in there.launches] == [(0, 1, 2), (2, 3), (2, 4)]
    assert [n.after for n in there.launches] == [(), (0,), (0,)]
    assert 5 not in there.places
    assert [n.plan.buffers for n in stored.launches] == [(0, 1, 2), (2, 5), (5, 3), (5, 4)]
    assert [n.after for n in stored.launches] == [(), (0,), (1,), (1,)]


def test_what_stands_for_a_buffer_is_as_large() -> None:
    plan = handmade_gpu.aliased("sm_80")
    small = replace(plan.buffers[2], shape=("B", "T"))
    wrong = replace(plan, buffers=(*plan.buffers[:2], small, *plan.buffers[3:]))
    with pytest.raises(PlanError, match="u is larger than t, which stands for it"):
        DevicePreparer(handmade.affine(), wrong).prepare({"B": 1, "T": 5})


def test_empty_launches_are_left_out() -> None:
    bucket = DevicePreparer(handmade.affine(), handmade_gpu.affine("sm_80")).prepare(
        {"B": 0, "T": 5}
    )
    assert bucket.launches == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": ("1", "70000", "1")}, "more than a GPU takes"),
        ({"grid": ("3", "1", "1"), "cluster": (2, 1, 1)}, "don't divide"),
        ({"shared_bytes": "B - 1000"}, "absurd amount of shared"),
    ],
)
def test_launches_that_no_gpu_takes(changes: dict[str, object], message: str) -> None:
    fields: dict[str, object] = {
        "kernel": "add", "grid": ("1", "1", "1"), "block": (1, 1, 1), "cluster": (1, 1, 1),
        "shared_bytes": "0", "buffers": (), "dims": (),
    }  # fmt: skip
    plan = handmade_gpu.affine("sm_90a")
    launch = GpuLaunchPlan(**{**fields, **changes})  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=message):
        DevicePreparer(
            handmade.affine(), GpuPlan(plan.arch, plan.buffers, (launch,), plan.slots)
        ).prepare({"B": 1, "T": 1})


def test_a_buffer_larger_than_its_slot() -> None:
    plan = handmade_gpu.affine("sm_80")
    small = GpuPlan(plan.arch, plan.buffers, plan.launches, ("8*B*T",))
    with pytest.raises(PlanError, match="t is larger than its slot"):
        DevicePreparer(handmade.affine(), small).prepare({"B": 1, "T": 1})
