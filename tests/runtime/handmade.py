"""Plans written by hand with kernels in LLVM IR, to test the runtime without a compiler."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from stagefuse.compiler.plan import (
    ArgumentPlan,
    BufferPlan,
    CheckPlan,
    DimPlan,
    PipelinePlan,
    Plan,
    SitePlan,
    StepPlan,
)

RUN = """
define i64 @sf_run(ptr %steps, i64 %n, i64 %threads) {
entry:
  br label %head
head:
  %i = phi i64 [0, %entry], [%i1, %body]
  %more = icmp slt i64 %i, %n
  br i1 %more, label %body, label %done
body:
  %s = getelementptr [7 x i64], ptr %steps, i64 %i
  %fn = load ptr, ptr %s
  %p1 = getelementptr i64, ptr %s, i64 1
  %args = load ptr, ptr %p1
  %p2 = getelementptr i64, ptr %s, i64 2
  %count = load i64, ptr %p2
  %p4 = getelementptr i64, ptr %s, i64 4
  %scratch = load ptr, ptr %p4
  %p6 = getelementptr i64, ptr %s, i64 6
  %status = load ptr, ptr %p6
  call void %fn(ptr %args, i64 0, i64 %count, ptr %scratch, ptr %status)
  %i1 = add i64 %i, 1
  br label %head
done:
  ret i64 %n
}
"""

HEADER = """
define void @{name}(ptr %args, i64 %begin, i64 %end, ptr %scratch, ptr %status) {{
entry:
  br label %head
head:
  %i = phi i64 [%begin, %entry], [%i1, %next]
  %more = icmp slt i64 %i, %end
  br i1 %more, label %body, label %done
body:
{body}
  br label %next
next:
  %i1 = add i64 %i, 1
  br label %head
done:
  ret void
}}
"""


def _slot(number: int) -> str:
    return (
        f"  %s{number} = getelementptr i64, ptr %args, i64 {number}\n"
        f"  %p{number} = load ptr, ptr %s{number}\n"
    )


# y[i] = x[i] + w[i % 3], through scratch memory
ADD = HEADER.format(
    name="add",
    body=_slot(0)
    + _slot(1)
    + _slot(2)
    + """
  %r = urem i64 %i, 3
  %xa = getelementptr float, ptr %p0, i64 %i
  %x = load float, ptr %xa
  %wa = getelementptr float, ptr %p1, i64 %r
  %w = load float, ptr %wa
  %v = fadd float %x, %w
  store float %v, ptr %scratch
  %v2 = load float, ptr %scratch
  %ya = getelementptr float, ptr %p2, i64 %i
  store float %v2, ptr %ya
""",
)
# y[i] = x[i] * n, n a dim
SCALE = HEADER.format(
    name="scale",
    body=_slot(0)
    + _slot(1)
    + """
  %s2 = getelementptr i64, ptr %args, i64 2
  %n = load i64, ptr %s2
  %f = sitofp i64 %n to float
  %xa = getelementptr float, ptr %p0, i64 %i
  %x = load float, ptr %xa
  %v = fmul float %x, %f
  %ya = getelementptr float, ptr %p1, i64 %i
  store float %v, ptr %ya
""",
)
# y[i] = x[ids[i]], a bad id reported as site 0 and read as 0
TAKE = HEADER.format(
    name="take",
    body=_slot(0)
    + _slot(1)
    + _slot(2)
    + """
  %s3 = getelementptr i64, ptr %args, i64 3
  %n = load i64, ptr %s3
  %ia = getelementptr i64, ptr %p1, i64 %i
  %id = load i64, ptr %ia
  %ok = icmp ult i64 %id, %n
  br i1 %ok, label %good, label %bad
bad:
  store i64 1, ptr %status
  %st1 = getelementptr i64, ptr %status, i64 1
  store i64 %id, ptr %st1
  br label %good
good:
  %j = phi i64 [%id, %body], [0, %bad]
  %xa = getelementptr float, ptr %p0, i64 %j
  %x = load float, ptr %xa
  %ya = getelementptr float, ptr %p2, i64 %i
  store float %x, ptr %ya
""",
)


@lru_cache(maxsize=1)
def machine_code() -> bytes:
    """One object with the kernels above and a single-threaded `sf_run`."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_triple("x86_64-unknown-linux-gnu")
    machine = target.create_target_machine(cpu="x86-64", opt=2, reloc="pic", codemodel="small")
    module = llvm.parse_assembly(RUN + ADD + SCALE + TAKE)
    module.verify()
    return bytes(machine.emit_object(module))


F32_BT = ("B", "3*T")


def affine() -> PipelinePlan:
    """affine(x: f32[B, 3*T]) -> (y: f32[B, 3*T], z: f32[B, 3*T]): y = (x + w) * B, z = y * T."""
    return PipelinePlan(
        name="affine",
        doc="Adds w, scales.",
        inputs=(ArgumentPlan("x", "f32", F32_BT, 0),),
        results=(ArgumentPlan("y", "f32", F32_BT, 3), ArgumentPlan("z", "f32", F32_BT, 4)),
        dims=(DimPlan("B", "0", "64"), DimPlan("T", "0", None)),
        checks=(CheckPlan("1000 - B*T", ">=0", "B*T is at most 1000", "a.pipe", 3, 5),),
        buffers=(
            BufferPlan("x", "f32", F32_BT, "input"),
            BufferPlan("w", "f32", ("3",), "weight", array="w"),
            BufferPlan("t", "f32", F32_BT, "arena", slot=0),
            BufferPlan("y", "f32", F32_BT, "result"),
            BufferPlan("z", "f32", F32_BT, "result"),
        ),
        slots=("12*B*T",),
        steps=(
            StepPlan("add", (0, 1, 2), (), "3*B*T", "64", "8", "affine.add", {"fused": "no"}),
            StepPlan("scale", (2, 3), ("B",), "3*B*T", label="affine.scale"),
            StepPlan("scale", (3, 4), ("T",), "3*B*T", label="affine.scale"),
        ),
    )


def lookup() -> PipelinePlan:
    """lookup(table: f32[N], ids: i64[K]) -> f32[K]: table[ids]."""
    return PipelinePlan(
        name="lookup",
        doc="",
        inputs=(ArgumentPlan("table", "f32", ("N",), 0), ArgumentPlan("ids", "i64", ("K",), 1)),
        results=(ArgumentPlan(None, "f32", ("K",), 2),),
        dims=(DimPlan("N", "1"), DimPlan("K")),
        buffers=(
            BufferPlan("table", "f32", ("N",), "input"),
            BufferPlan("ids", "i64", ("K",), "input"),
            BufferPlan("y", "f32", ("K",), "result"),
        ),
        steps=(StepPlan("take", (0, 1, 2), ("N",), "K", label="lookup.take"),),
        sites=(SitePlan("t.pipe", 7, 5, "    table[ids]", "an id is out of range", "N"),),
    )


@lru_cache(maxsize=1)
def native_call() -> bytes:
    from stagefuse.compiler.cpu.build import compile_text
    from stagefuse.compiler.cpu.native_calls import calls_text

    return compile_text(calls_text(), "v3")


def plan(*pipelines: PipelinePlan, **changes: Any) -> Plan:
    """A plan of the pipelines above, or of given ones."""
    fields: dict[str, Any] = {
        "pipelines": pipelines or (affine(), lookup()),
        "arrays": {"w": np.array([1, 2, 3], np.float32)},
        "source": "pipeline affine ...\n",
        "source_name": "a.pipe",
        "report": {"kernels": 3},
    }
    if "objects" not in changes:
        fields["objects"] = {"v3": machine_code(), "v4": machine_code()}
        fields["call"] = native_call()
    return Plan(**{**fields, **changes})


def expected(x: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """What `affine` gives."""
    batch, width = x.shape
    w = np.resize(np.array([1, 2, 3], np.float32), width) if width else np.zeros(0, np.float32)
    y = (x + w) * np.float32(batch)
    return y, y * np.float32(width // 3)
