"""The plans of `handmade` for GPUs, with kernels in hand-written PTX: one thread an element."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from stagefuse.compiler.plan import (
    GPU_ARCHES,
    AliasPlan,
    BufferPlan,
    Cubin,
    GpuLaunchPlan,
    GpuPlan,
    PipelinePlan,
    Plan,
)

from . import handmade

ENTRY = """
.visible .entry {name}(
{parameters}
)
{{
    .reg .pred %p<4>;
    .reg .b32 %r<4>;
    .reg .b64 %rd<16>;
    .reg .f32 %f<4>;
    mov.u32 %r0, %ctaid.x;
    mov.u32 %r1, %ntid.x;
    mov.u32 %r2, %tid.x;
    mad.lo.s32 %r3, %r0, %r1, %r2;
    cvt.s64.s32 %rd0, %r3;
    ld.param.s64 %rd1, [p_count];
    setp.ge.s64 %p0, %rd0, %rd1;
    @%p0 bra DONE;
    shl.b64 %rd2, %rd0, 2;
{body}
DONE:
    ret;
}}
"""
POINTER = """    ld.param.u64 {to}, [{name}];
    cvta.to.global.u64 {to}, {to};
"""


def _entry(name: str, pointers: tuple[str, ...], dims: tuple[str, ...], body: str) -> str:
    parameters = [f"    .param .u64 {p}" for p in pointers]
    parameters += [f"    .param .s64 {d}" for d in dims] + ["    .param .u64 p_status"]
    load = "".join(POINTER.format(to=f"%rd{4 + i}", name=p) for i, p in enumerate(pointers))
    return ENTRY.format(name=name, parameters=",\n".join(parameters), body=load + body)


# t[i] = x[i] + w[i % 3]
ADD = _entry(
    "add", ("p_x", "p_w", "p_t"), ("p_count",),
    """    rem.s64 %rd8, %rd0, 3;
    shl.b64 %rd8, %rd8, 2;
    add.s64 %rd4, %rd4, %rd2;
    add.s64 %rd5, %rd5, %rd8;
    add.s64 %rd6, %rd6, %rd2;
    ld.global.f32 %f0, [%rd4];
    ld.global.f32 %f1, [%rd5];
    add.rn.f32 %f2, %f0, %f1;
    st.global.f32 [%rd6], %f2;""",
)  # fmt: skip
# y[i] = x[i] * n, n a dim
SCALE = _entry(
    "scale", ("p_x", "p_y"), ("p_count", "p_n"),
    """    ld.param.s64 %rd8, [p_n];
    cvt.rn.f32.s64 %f1, %rd8;
    add.s64 %rd4, %rd4, %rd2;
    add.s64 %rd5, %rd5, %rd2;
    ld.global.f32 %f0, [%rd4];
    mul.rn.f32 %f2, %f0, %f1;
    st.global.f32 [%rd5], %f2;""",
)  # fmt: skip
# y[i] = table[ids[i]], a bad id reported as site 0 by the thread that finds the status empty
TAKE = _entry(
    "take", ("p_table", "p_ids", "p_y"), ("p_count", "p_n"),
    """    ld.param.s64 %rd8, [p_n];
    shl.b64 %rd9, %rd0, 3;
    add.s64 %rd5, %rd5, %rd9;
    add.s64 %rd6, %rd6, %rd2;
    ld.global.s64 %rd10, [%rd5];
    setp.lt.u64 %p1, %rd10, %rd8;
    @%p1 bra GOOD;
    ld.param.u64 %rd11, [p_status];
    cvta.to.global.u64 %rd11, %rd11;
    atom.global.cas.b64 %rd12, [%rd11], 0, 1;
    setp.ne.s64 %p2, %rd12, 0;
    @%p2 bra DONE;
    st.global.s64 [%rd11+8], %rd10;
    bra DONE;
GOOD:
    shl.b64 %rd10, %rd10, 2;
    add.s64 %rd4, %rd4, %rd10;
    ld.global.f32 %f0, [%rd4];
    st.global.f32 [%rd6], %f0;""",
)  # fmt: skip

BLOCK = (64, 1, 1)
NONE = (1, 1, 1)
COUNT = "3*B*T"


def ptx(arch: str) -> str:
    """One module with the kernels above."""
    header = f".version 8.0\n.target {arch}\n.address_size 64\n"
    return header + ADD + SCALE + TAKE


def _grid(count: str) -> tuple[str, str, str]:
    return (f"({count} + 63) // 64", "1", "1")


def _launch(
    kernel: str, buffers: tuple[int, ...], dims: tuple[str, ...], writes: int, label: str
) -> GpuLaunchPlan:
    return GpuLaunchPlan(
        kernel, _grid(dims[0]), BLOCK, NONE, "0", buffers, dims, label, {}, (writes,)
    )


def affine(arch: str) -> GpuPlan:
    """`handmade.affine` with a second scaling that does not wait for the first."""
    shape = handmade.F32_BT
    return GpuPlan(
        arch,
        (
            BufferPlan("x", "f32", shape, "input"),
            BufferPlan("w", "f32", ("3",), "weight", array="w"),
            BufferPlan("t", "f32", shape, "arena", slot=0),
            BufferPlan("y", "f32", shape, "result"),
            BufferPlan("z", "f32", shape, "result"),
        ),
        (
            _launch("add", (0, 1, 2), (COUNT,), 2, "affine.add"),
            _launch("scale", (2, 3), (COUNT, "B"), 3, "affine.scale"),
            _launch("scale", (2, 4), (COUNT, "B*T"), 4, "affine.scale"),
        ),
        ("12*B*T",),
    )


def aliased(arch: str) -> GpuPlan:
    """`affine` by way of t times B, which is t where B is 1."""
    plan = affine(arch)
    return replace(
        plan,
        buffers=(*plan.buffers, BufferPlan("u", "f32", handmade.F32_BT, "arena", slot=1)),
        launches=(
            plan.launches[0],
            _launch("scale", (2, 5), (COUNT, "B"), 5, "affine.scale"),
            _launch("scale", (5, 3), (COUNT, "1"), 3, "affine.scale"),
            _launch("scale", (5, 4), (COUNT, "T"), 4, "affine.scale"),
        ),
        slots=("12*B*T", "12*B*T"),
        aliases=(AliasPlan(5, 2, "1 - min(B - 1, 1)"),),
    )


def lookup(arch: str) -> GpuPlan:
    """`handmade.lookup`."""
    return GpuPlan(
        arch,
        handmade.lookup().buffers,
        (_launch("take", (0, 1, 2), ("K", "N"), 2, "lookup.take"),),
    )


def cubins(arch: str) -> tuple[Cubin, ...]:
    """All kernels of an arch, as the fake GPU's machine code."""
    return (Cubin(("add", "scale", "take"), b"\x7fELF" + ptx(arch).encode()),)


def plan(*pipelines: PipelinePlan, **changes: Any) -> Plan:
    """The handmade plan, its pipelines for all arches too."""
    arches = GPU_ARCHES
    both = (
        replace(handmade.affine(), gpu=tuple(affine(a) for a in arches)),
        replace(handmade.lookup(), gpu=tuple(lookup(a) for a in arches)),
    )
    fields: dict[str, Any] = {
        "ptx": {a: ptx(a) for a in arches},
        "cubins": {"sm_90a": cubins("sm_90a")},
    }
    return handmade.plan(*(pipelines or both), **{**fields, **changes})


def expected(x: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """What `affine` gives: (x + w) * B and (x + w) * (B * T)."""
    batch, width = x.shape
    w = np.tile(np.array([1, 2, 3], np.float32), width // 3)
    return (x + w) * np.float32(batch), (x + w) * np.float32(batch * (width // 3))
