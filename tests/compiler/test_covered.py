"""Every element of a kernel's results is proved to be stored, and what is left out is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from stagefuse.compiler import run_passes
from stagefuse.compiler.driver import compile_file
from stagefuse.compiler.graph import Graph
from stagefuse.compiler.kernel_ir import Kernel
from stagefuse.compiler.kernel_text import parse_kernel
from stagefuse.compiler.proofs.bounds import Bounds
from stagefuse.dsl.facts import Facts

from .covered import uncovered

FACTS = Facts({"M": (0, 600), "N": (0, 600), "K": (0, 600)})
EXAMPLES = Path(__file__).parents[2] / "examples"


def kernel(parallel: str, body: str, shape: str = "[M, N]") -> Kernel:
    head = f"stagefuse kernel 1\nkernel k for p\nbuffer b0 : out f32{shape}\ndims M N K\n"
    return parse_kernel(head + "".join(f"parallel {p}\n" for p in parallel.split("; ") if p) + body)


TILE = """\
for r in 0..min(32, M - 32*mb)
  for c in 0..min(48, N - 48*nb) vector
    store b0[32*mb + r, 48*nb + c] = f32(0.0)
"""
WHOLE = {
    "rows": ("d0 in M", "for d1 in 0..N vector\n  store b0[d0, d1] = f32(0.0)\n"),
    "columns first": ("d1 in N", "for d0 in 0..M vector\n  store b0[d0, d1] = f32(0.0)\n"),
    "flat": ("i in M*N", "store b0[i // N, i % N] = f32(0.0)\n"),
    "backwards": ("d0 in M", "for d1 in 0..N\n  store b0[M - d0 - 1, d1] = f32(0.0)\n"),
    "tiles with tails": ("mb in (M + 31) // 32; nb in (N + 47) // 48", TILE),
    "lanes": (
        "mb in (M + 63) // 64; rank in 4",
        "for r in 16*rank..min(16*rank + 16, M - 64*mb)\n  for d1 in 0..N\n"
        "    store b0[64*mb + r, d1] = f32(0.0)\n",
    ),
    "two pieces": (
        "d0 in M",
        "for d1 in 0..min(K, N)\n  store b0[d0, d1] = f32(0.0)\n"
        "for d1 in min(K, N)..N\n  store b0[d0, d1] = f32(1.0)\n",
    ),
    "parts of chunks": (
        "chunk in (M*N + 47) // 4096 + 1",
        "for d0 in 4096*chunk..48\n  store b0[d0] = f32(0.0)\n"
        "for d0 in max(48, 4096*chunk)..min(M*N + 48, 4096*chunk + 4096)\n"
        "  store b0[d0] = f32(1.0)\n",
        "[M*N + 48]",
    ),
    "parts along the outer axis": (
        "d0 in M",
        "if ge.bool(index(9 - d0), i64(0))\n  for d1 in 0..N\n    store b0[d0, d1] = f32(0.0)\n"
        "if ge.bool(index(d0 - 10), i64(0))\n  for d1 in 0..N\n    store b0[d0, d1] = f32(1.0)\n",
    ),
    "where it is inside": (
        "d0 in M; nb in (N + 47) // 48",
        "for c in 0..48\n  if lt.bool(index(48*nb + c), index(N))\n"
        "    store b0[d0, 48*nb + c] = f32(0.0)\n",
    ),
}
LESS = {
    "nothing": ("d0 in M", "let x = f32(0.0)\n"),
    "a column": ("d0 in M", "for d1 in 1..N\n  store b0[d0, d1] = f32(0.0)\n"),
    "the last row": ("d0 in M - 1", "for d1 in 0..N\n  store b0[d0, d1] = f32(0.0)\n"),
    "a diagonal": ("d0 in M", "store b0[d0, d0] = f32(0.0)\n"),
    "the last tile": ("mb in M // 32; nb in (N + 47) // 48", TILE),
    "between tiles": (
        "mb in (M + 31) // 32; nb in (N + 47) // 48",
        TILE.replace("min(32, M - 32*mb)", "min(31, M - 32*mb)"),
    ),
    "every other": ("d0 in M", "for d1 in 0..(N + 1) // 2\n  store b0[d0, 2*d1] = f32(0.0)\n"),
    "between pieces": (
        "d0 in M",
        "for d1 in 0..min(K, N)\n  store b0[d0, d1] = f32(0.0)\n"
        "for d1 in min(K, N) + 1..N\n  store b0[d0, d1] = f32(1.0)\n",
    ),
    "all, if there is nothing to go over": (
        "d0 in M",
        "for k in 0..K\n  for d1 in 0..N\n    store b0[d0, d1] = f32(0.0)\n",
    ),
    "where it is beyond": (
        "d0 in M",
        "for d1 in 0..N\n  if lt.bool(index(d1), index(K))\n    store b0[d0, d1] = f32(0.0)\n",
    ),
}


@pytest.mark.parametrize("case", WHOLE)
def test_what_stores_everything_is_proved(case: str) -> None:
    assert uncovered(kernel(*WHOLE[case]), FACTS) == []


@pytest.mark.parametrize("case", LESS)
def test_what_leaves_out_an_element_is_not(case: str) -> None:
    assert uncovered(kernel(*LESS[case]), FACTS) == ["b0"]


def test_intervals_of_no_iterations_make_nothing() -> None:
    """Each iteration stores two elements: one of none stores none."""
    body = "store b0[i] = f32(0.0)\nstore b0[i + 1] = f32(0.0)\n"
    assert uncovered(kernel("i in N", body, "[N + 1]"), FACTS) == ["b0"]
    assert uncovered(kernel("i in N + 1", body, "[N + 2]"), FACTS) == []


@pytest.mark.parametrize("name", ["minilm", "preprocess", "softmax", "distances"])
def test_kernels_of_examples_store_all_of_their_results(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = EXAMPLES / f"{name}.pipe"
    if name == "minilm" and not path.with_suffix(".safetensors").exists():
        pytest.skip("the weights of MiniLM are not here")
    seen: list[tuple[str, list[str]]] = []

    def checked(kernel: Kernel, graph: Graph, bounds: Bounds) -> None:
        seen.append((kernel.label, uncovered(kernel, graph.facts, bounds.given)))

    monkeypatch.setattr(run_passes, "verified_kernel", checked)
    compile_file(path, targets=("cpu", "h200"))
    assert seen and all(names == [] for _, names in seen), seen
