"""Launches that a driver refuses."""

from __future__ import annotations

from typing import Any

import pytest

from stagefuse.runtime import emulator

KERNEL = """.version 8.0\n.target {target}\n.address_size 64
.extern .shared .align 16 .b8 more[];
.visible .entry k() {directives} {{ .reg .b32 %r; {body} ret; }}"""


def launch(
    target: str = "sm_90a", directives: str = "", body: str = "", static: int = 0,
    grid: Any = 1, block: Any = 1, **options: Any,
) -> None:  # fmt: skip
    if static:
        body = f".shared .b8 s[{static}]; mov.u32 %r, s; {body}"
    text = KERNEL.format(target=target, directives=directives, body=body)
    emulator.load(text).launch("k", grid=grid, block=block, **options)


@pytest.mark.parametrize(
    ("target", "kib"), [("sm_75", 64), ("sm_80", 163), ("sm_86", 99), ("sm_89", 99),
                        ("sm_90", 227), ("sm_90a", 227)],
)  # fmt: skip
def test_shared_memory_of_each_target(target: str, kib: int) -> None:
    launch(target, shared_bytes=kib << 10)
    launch(target, shared_bytes=(kib << 10) - 4096, static=4096)
    for options in ({"shared_bytes": (kib << 10) + 1}, {"shared_bytes": kib << 10, "static": 1}):
        with pytest.raises(ValueError, match=f"{target} has {kib << 10} for a block"):
            launch(target, **options)


def test_shared_variables() -> None:
    launch(static=48 << 10)
    with pytest.raises(ValueError, match="bytes of shared variables"):
        launch(static=(48 << 10) + 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": (1, 65536)}, "a grid of"),
        ({"grid": (1, 1, 65536)}, "a grid of"),
        ({"grid": 2**31}, "a grid of"),
        ({"grid": 0}, "a grid of"),
        ({"block": (1, 1, 65)}, "a block of"),
        ({"block": 1025}, "a block of 1025 threads"),
        ({"block": (32, 33)}, "a block of 1056 threads"),
        ({"block": 64, "directives": ".maxntid 8, 4, 1"}, "allows 32"),
        ({"block": 64, "directives": ".reqntid 32"}, "for blocks of"),
        ({"grid": 32, "cluster": 32}, "at most 16"),
        ({"grid": 8, "cluster": 8, "directives": ".maxclusterrank 4"}, "at most 4"),
        ({"grid": 3, "cluster": 2}, "in clusters of"),
        ({"grid": 4, "cluster": 4, "directives": ".reqnctapercluster 2"}, "is for clusters of"),
        ({"grid": 2, "cluster": 2, "target": "sm_89"}, "sm_89 has no clusters"),
    ],
)
def test_sizes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launch(**options)


def test_clusters_that_the_kernel_says() -> None:
    launch(grid=4, directives=".reqnctapercluster 2")
    launch(grid=4, cluster=2, directives=".reqnctapercluster 2")
    with pytest.raises(ValueError, match="in clusters of"):
        launch(grid=3, directives=".reqnctapercluster 2")
