"""AMX in software, for machines that have AVX-512 alone: every product that would use tiles does.

The modules of kernels call plain functions in place of the instructions. Each thread has its own
eight tiles of 16 rows of 64 bytes, the only configuration that our code asks for. Sources: Intel
64 and IA-32 Architectures Software Developer's Manual, volume 2, LDTILECFG, TDPBF16PS, TDPBSSD;
`bf16` is multiplied and added in f32, even and odd ones apart, denormals as zeros, in and out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

from stagefuse.compiler.cpu import build, emit
from stagefuse.compiler.kernel_ir import Kernel
from stagefuse.runtime import native

THREADS = 256
"""Threads that an object's code may run on, of which each has its tiles for good."""
FLOATS, INTS = "<16 x float>", "<16 x i32>"
EXTENDED = {"s": "ashr", "u": "lshr"}
_CALLED = re.compile(r"@llvm\.x86\.(ldtilecfg|t\w+)\(")
_DECLARED = re.compile(r"^declare void @soft\..*\n", re.MULTILINE)


def use(patch: pytest.MonkeyPatch) -> None:
    """Have kernels compiled from now on use tiles in software, and objects be told of tiles."""

    def module_text(kernels: Sequence[Kernel], level: str) -> str:
        return in_software(emit.module_text(kernels, level))

    patch.setattr(build, "module_text", module_text)
    patch.setattr(native, "may_use_tiles", lambda: True)  # asked on machines with AVX-512 alone


def in_software(text: str) -> str:
    """A module's text, with functions for instructions of tiles."""
    first, *rest = text.split(emit.AS_WRITTEN)
    if not _CALLED.search(text):
        return text
    calls = [_CALLED.sub(r"@soft.\1(", part).replace("i8 immarg", "i8") for part in (first, *rest)]
    if not rest:
        return _DECLARED.sub("", calls[0]) + _functions()
    return calls[0] + emit.AS_WRITTEN + _DECLARED.sub("", calls[1]) + _functions()


def _functions() -> str:
    bytes_ = "".join(_dot_bytes(a, b) for a in EXTENDED for b in EXTENDED)
    return _STATE + _MOVES + _DOT_HALVES + bytes_


# Each thread's tiles, found by the address of its control block (System V ABI: at %fs:0).
_STATE = f"""
@soft.owners = internal global [{THREADS} x i64] zeroinitializer, align 64
@soft.registers = internal global [{THREADS} x [8192 x i8]] zeroinitializer, align 64

define ptr @soft.own() noinline {{
  %self = load i64, ptr addrspace(257) null
  br label %look
look:
  %n = phi i64 [ 0, %0 ], [ %next, %other ]
  %at = getelementptr [{THREADS} x i64], ptr @soft.owners, i64 0, i64 %n
  %pair = cmpxchg ptr %at, i64 0, i64 %self seq_cst seq_cst
  %was = extractvalue {{ i64, i1 }} %pair, 0
  %mine = icmp eq i64 %was, %self
  %free = icmp eq i64 %was, 0
  %found = or i1 %mine, %free
  br i1 %found, label %done, label %other
other:
  %next = add i64 %n, 1
  %left = icmp ult i64 %next, {THREADS}
  br i1 %left, label %look, label %none
none:
  call void @llvm.trap()
  unreachable
done:
  %tiles = getelementptr [{THREADS} x [8192 x i8]], ptr @soft.registers, i64 0, i64 %n
  ret ptr %tiles
}}

define ptr @soft.tile(i8 %number) noinline {{
  %own = call ptr @soft.own()
  %wide = zext i8 %number to i64
  %skip = shl i64 %wide, 10
  %at = getelementptr i8, ptr %own, i64 %skip
  ret ptr %at
}}

define {FLOATS} @soft.flushed({FLOATS} %x) {{
  %bits = bitcast {FLOATS} %x to {INTS}
  %size = and {INTS} %bits, splat (i32 2147483647)
  %small = icmp ult {INTS} %size, splat (i32 8388608)
  %sign = and {INTS} %bits, splat (i32 -2147483648)
  %kept = select <16 x i1> %small, {INTS} %sign, {INTS} %bits
  %y = bitcast {INTS} %kept to {FLOATS}
  ret {FLOATS} %y
}}
declare void @llvm.trap()
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1 immarg)
declare {FLOATS} @llvm.fma.v16f32({FLOATS}, {FLOATS}, {FLOATS})
"""


def _rows(body: str) -> str:
    """Sixteen times: `%r` is a row."""
    return f"""  br label %row
row:
  %r = phi i64 [ 0, %0 ], [ %after, %row.end ]
  %skip = shl i64 %r, 6
{body}
  br label %row.end
row.end:
  %after = add i64 %r, 1
  %more = icmp ult i64 %after, 16
  br i1 %more, label %row, label %out
out:
  ret void
}}
"""


_MOVES = f"""
define void @soft.ldtilecfg(ptr %config) noinline {{
  %own = call ptr @soft.own()
  call void @llvm.memset.p0.i64(ptr %own, i8 0, i64 8192, i1 false)
  ret void
}}

define void @soft.tilerelease() noinline {{
  %own = call ptr @soft.own()
  call void @llvm.memset.p0.i64(ptr %own, i8 123, i64 8192, i1 false)
  ret void
}}

define void @soft.tilezero(i8 %number) noinline {{
  %tile = call ptr @soft.tile(i8 %number)
  call void @llvm.memset.p0.i64(ptr %tile, i8 0, i64 1024, i1 false)
  ret void
}}

define void @soft.tileloadd64(i8 %number, ptr %from, i64 %stride) noinline {{
  %tile = call ptr @soft.tile(i8 %number)
{_rows(f'''  %to = getelementptr i8, ptr %tile, i64 %skip
  %down = mul i64 %r, %stride
  %at = getelementptr i8, ptr %from, i64 %down
  %line = load {INTS}, ptr %at, align 1
  store {INTS} %line, ptr %to, align 64''')}
define void @soft.tilestored64(i8 %number, ptr %to, i64 %stride) noinline {{
  %tile = call ptr @soft.tile(i8 %number)
{_rows(f'''  %from = getelementptr i8, ptr %tile, i64 %skip
  %down = mul i64 %r, %stride
  %at = getelementptr i8, ptr %to, i64 %down
  %line = load {INTS}, ptr %from, align 64
  store {INTS} %line, ptr %at, align 1''')}"""


def _depth(start: str, body: str, carried: str) -> str:
    """Sixteen times within a row: `%k` is a row of b and an element of a, `%word` that element
    in every lane, `%line` that row; `carried` are the phis."""
    return f"""  %a.row = getelementptr i8, ptr %ta, i64 %skip
  %d.row = getelementptr i8, ptr %td, i64 %skip
  %old = load {start}, ptr %d.row, align 64
  br label %step
step:
  %k = phi i64 [ 0, %row ], [ %k1, %step ]
{carried}
  %k.skip = shl i64 %k, 6
  %a.at = getelementptr i32, ptr %a.row, i64 %k
  %one = load i32, ptr %a.at, align 4
  %first = insertelement {INTS} poison, i32 %one, i64 0
  %word = shufflevector {INTS} %first, {INTS} poison, {INTS} zeroinitializer
  %b.row = getelementptr i8, ptr %tb, i64 %k.skip
  %line = load {INTS}, ptr %b.row, align 64
{body}
  %k1 = add i64 %k, 1
  %deeper = icmp ult i64 %k1, 16
  br i1 %deeper, label %step, label %sum
sum:"""


_TILES = """  %td = call ptr @soft.tile(i8 %d)
  %ta = call ptr @soft.tile(i8 %a)
  %tb = call ptr @soft.tile(i8 %b)
"""


def _half(name: str, source: str, high: bool) -> str:
    """A bf16 of each word as an f32, denormals as zeros."""
    move = "and" if high else "shl"
    by = "splat (i32 -65536)" if high else "splat (i32 16)"
    return f"""  %{name}.bits = {move} {INTS} %{source}, {by}
  %{name}.any = bitcast {INTS} %{name}.bits to {FLOATS}
  %{name} = call {FLOATS} @soft.flushed({FLOATS} %{name}.any)
"""


_HALVES = "".join(
    _half(side + part, source, part == "h")
    for side, source in (("a", "word"), ("b", "line")) for part in "lh"
)  # fmt: skip
_HALVES += "\n".join(
    f"""  %{sums}.any = call {FLOATS} @llvm.fma.v16f32({FLOATS} %a{x}, {FLOATS} %b{x},
      {FLOATS} %{sums}0)
  %{sums} = call {FLOATS} @soft.flushed({FLOATS} %{sums}.any)"""
    for sums, x in (("even", "l"), ("odd", "h"))
)
_SUMS = "\n".join(
    f"  %{sums}0 = phi {FLOATS} [ zeroinitializer, %row ], [ %{sums}, %step ]"
    for sums in ("even", "odd")
)
_ADDED = f"""
  %both.any = fadd {FLOATS} %even, %odd
  %both = call {FLOATS} @soft.flushed({FLOATS} %both.any)
  %old.kept = call {FLOATS} @soft.flushed({FLOATS} %old)
  %new.any = fadd {FLOATS} %old.kept, %both
  %new = call {FLOATS} @soft.flushed({FLOATS} %new.any)
  store {FLOATS} %new, ptr %d.row, align 64"""
_DOT_HALVES = f"""
define void @soft.tdpbf16ps(i8 %d, i8 %a, i8 %b) noinline {{
{_TILES}{_rows(_depth(FLOATS, _HALVES, _SUMS) + _ADDED)}"""


def _dot_bytes(left: str, right: str) -> str:
    """Four products of bytes, which have signs or none, added to each element."""
    parts, total = [], "%sum0"
    for n in range(4):
        for name, source, sign in (("a", "word", left), ("b", "line", right)):
            parts += [
                f"  %{name}{n}.up = shl {INTS} %{source}, splat (i32 {24 - 8 * n})",
                f"  %{name}{n} = {EXTENDED[sign]} {INTS} %{name}{n}.up, splat (i32 24)",
            ]
        parts += [
            f"  %p{n} = mul {INTS} %a{n}, %b{n}",
            f"  %t{n} = add {INTS} {total}, %p{n}",
        ]
        total = f"%t{n}"
    carried = f"  %sum0 = phi {INTS} [ %old, %row ], [ %t3, %step ]"
    stored = f"\n  store {INTS} %t3, ptr %d.row, align 64"
    whole = _rows(_depth(INTS, "\n".join(parts), carried) + stored)
    return f"""
define void @soft.tdpb{left}{right}d(i8 %d, i8 %a, i8 %b) noinline {{
{_TILES}{whole}"""
