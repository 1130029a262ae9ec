"""A stable sort of keys with their positions, as LLVM IR, one function per dtype and order.

Few elements are sorted by merging: runs of doubling width, back and forth between the arrays and
two spare ones. More are sorted by digits of eight bits, the lowest first: all digits are counted
in one go over the keys; one that all keys share is left out, by each other they are moved to the
other arrays. NaN comes after every number, before every number if descending.
"""

from __future__ import annotations

from stagefuse.dsl.dtypes import DType

from ..operators import BITS
from ..sort_order import DIGITS, number_of
from .ir import Code
from .scalars import MEMORY

MERGED = 256
"""Elements up to which merging is quicker."""


def sort_symbol(dtype: DType, descending: bool) -> str:
    return f"sf.sort.{dtype.name}.{'down' if descending else 'up'}"


def sort_text(dtype: DType, descending: bool) -> str:
    """The function `symbol(keys, order, spare_keys, spare_order, count)`."""
    code = Code()
    kind = MEMORY[dtype.name]
    right, left = code.value("%right", kind), code.value("%left", kind)
    unsigned = dtype.kind == "uint" or dtype.is_bool
    before = right.compare("gt" if descending else "lt", left, unsigned)
    if dtype.is_float:
        first, second = (right, left) if descending else (left, right)
        before = before | (first.is_nan() & (second.is_nan() ^ 1))
    text = _MERGE.replace("$COMPARE", "\n".join(code.lines)).replace("$BEFORE", before.text)
    text = _by_digits(dtype, descending) + text.replace("$MERGED", str(MERGED))
    text = text.replace("$FINISH", _FINISH.lstrip())
    return text.replace("$NAME", sort_symbol(dtype, descending)).replace("$T", kind)


def _by_digits(dtype: DType, descending: bool) -> str:
    """The function that sorts by digits."""
    code, kind, digits = Code(), MEMORY[dtype.name], dtype.itemsize
    wide = f"i{BITS[kind]}"

    def digit(key: str, shift: str, name: str) -> str:
        """The lines that bind `name` to a digit of a key, as i64."""
        begin = len(code.lines)
        number = number_of(code, code.value(key, kind).bits(), dtype, descending)
        lines = code.lines[begin:]
        mask = DIGITS - 1 if digits > 1 else -1
        lines.append(f"  {name}s = lshr {wide} {number.text}, {shift}")
        lines.append(f"  {name}l = and {wide} {name}s, {mask}")
        if digits == 8:
            return "\n".join([*lines, f"  {name} = or i64 {name}l, 0"])
        return "\n".join([*lines, f"  {name} = zext {wide} {name}l to i64"])

    counted = []
    for n in range(digits):
        counted += [
            digit("%key", str(8 * n), f"%d{n}"),
            f"  %at{n} = getelementptr [{DIGITS} x i64], ptr %counts, i64 {n}, i64 %d{n}",
            f"  %o{n} = load i64, ptr %at{n}, align 8",
            f"  %i{n} = add i64 %o{n}, 1",
            f"  store i64 %i{n}, ptr %at{n}, align 8",
        ]
    shift = "%digit8 = shl i64 %digit, 3\n" + (
        "  %shift = or i64 %digit8, 0" if digits == 8 else f"  %shift = trunc i64 %digit8 to {wide}"
    )
    parts = {
        "$COUNTED": "\n".join(counted), "$SHIFT": shift,
        "$FIRST": digit("%first", "%shift", "%f"), "$MOVED": digit("%moving", "%shift", "%m"),
        "$CELLS": str(digits * DIGITS), "$DIGITS": str(digits),
    }  # fmt: skip
    text = _DIGITS
    for name, lines in parts.items():
        text = text.replace(name, lines)
    return text


_FINISH = """
finish:
  %home = icmp eq ptr %ka, %keys
  br i1 %home, label %return, label %copy
copy:
  %c = phi i64 [ 0, %finish ], [ %c1, %copy ]
  %sk = getelementptr $T, ptr %spare, i64 %c
  %so = getelementptr i64, ptr %spare_order, i64 %c
  %dk = getelementptr $T, ptr %keys, i64 %c
  %do = getelementptr i64, ptr %order, i64 %c
  %vk = load $T, ptr %sk, align 1
  %vo = load i64, ptr %so, align 8
  store $T %vk, ptr %dk, align 1
  store i64 %vo, ptr %do, align 8
  %c1 = add i64 %c, 1
  %uncopied = icmp slt i64 %c1, %count
  br i1 %uncopied, label %copy, label %return
return:
  ret void
}
"""
"""The end of either function, which has what is sorted home."""

_DIGITS = """
define internal void @$NAME.digits(ptr noalias %keys, ptr noalias %order, ptr noalias %spare,
    ptr noalias %spare_order, i64 %count) noinline nounwind {
entry:
  %counts = alloca [$CELLS x i64], align 64
  br label %clear
clear:
  %z = phi i64 [ 0, %entry ], [ %z1, %clear ]
  %cell = getelementptr i64, ptr %counts, i64 %z
  store i64 0, ptr %cell, align 8
  %z1 = add i64 %z, 1
  %unclear = icmp slt i64 %z1, $CELLS
  br i1 %unclear, label %clear, label %number
number:
  %p = phi i64 [ 0, %clear ], [ %p1, %number ]
  %kp = getelementptr $T, ptr %keys, i64 %p
  %key = load $T, ptr %kp, align 1
  %slot = getelementptr i64, ptr %order, i64 %p
  store i64 %p, ptr %slot, align 8
$COUNTED
  %p1 = add i64 %p, 1
  %more = icmp slt i64 %p1, %count
  br i1 %more, label %number, label %digits
digits:
  %digit = phi i64 [ 0, %number ], [ %digit1, %next ]
  %ka = phi ptr [ %keys, %number ], [ %kn, %next ]
  %kb = phi ptr [ %spare, %number ], [ %km, %next ]
  %oa = phi ptr [ %order, %number ], [ %on, %next ]
  %ob = phi ptr [ %spare_order, %number ], [ %om, %next ]
  %done = icmp eq i64 %digit, $DIGITS
  br i1 %done, label %finish, label %look
look:
  $SHIFT
  %own = getelementptr [256 x i64], ptr %counts, i64 %digit
  %first = load $T, ptr %ka, align 1
$FIRST
  %fc = getelementptr i64, ptr %own, i64 %f
  %alike = load i64, ptr %fc, align 8
  %all = icmp eq i64 %alike, %count
  br i1 %all, label %next, label %sums
sums:
  %s = phi i64 [ 0, %look ], [ %s1, %sums ]
  %total = phi i64 [ 0, %look ], [ %total1, %sums ]
  %sp = getelementptr i64, ptr %own, i64 %s
  %sv = load i64, ptr %sp, align 8
  store i64 %total, ptr %sp, align 8
  %total1 = add i64 %total, %sv
  %s1 = add i64 %s, 1
  %unsummed = icmp slt i64 %s1, 256
  br i1 %unsummed, label %sums, label %move
move:
  %q = phi i64 [ 0, %sums ], [ %q1, %move ]
  %mk = getelementptr $T, ptr %ka, i64 %q
  %moving = load $T, ptr %mk, align 1
  %mo = getelementptr i64, ptr %oa, i64 %q
  %position = load i64, ptr %mo, align 8
$MOVED
  %mc = getelementptr i64, ptr %own, i64 %m
  %to = load i64, ptr %mc, align 8
  %to1 = add i64 %to, 1
  store i64 %to1, ptr %mc, align 8
  %tk = getelementptr $T, ptr %kb, i64 %to
  store $T %moving, ptr %tk, align 1
  %tp = getelementptr i64, ptr %ob, i64 %to
  store i64 %position, ptr %tp, align 8
  %q1 = add i64 %q, 1
  %unmoved = icmp slt i64 %q1, %count
  br i1 %unmoved, label %move, label %next
next:
  %kn = phi ptr [ %ka, %look ], [ %kb, %move ]
  %km = phi ptr [ %kb, %look ], [ %ka, %move ]
  %on = phi ptr [ %oa, %look ], [ %ob, %move ]
  %om = phi ptr [ %ob, %look ], [ %oa, %move ]
  %digit1 = add i64 %digit, 1
  br label %digits
$FINISH"""

_MERGE = """
define internal void @$NAME(ptr noalias %keys, ptr noalias %order, ptr noalias %spare,
    ptr noalias %spare_order, i64 %count) noinline nounwind {
entry:
  %many = icmp sgt i64 %count, $MERGED
  br i1 %many, label %radix, label %few
radix:
  call void @$NAME.digits(ptr %keys, ptr %order, ptr %spare, ptr %spare_order, i64 %count)
  ret void
few:
  %some = icmp sgt i64 %count, 0
  br i1 %some, label %number, label %return
number:
  %p = phi i64 [ 0, %few ], [ %p1, %number ]
  %slot = getelementptr i64, ptr %order, i64 %p
  store i64 %p, ptr %slot, align 8
  %p1 = add i64 %p, 1
  %more = icmp slt i64 %p1, %count
  br i1 %more, label %number, label %widths
widths:
  %width = phi i64 [ 1, %number ], [ %twice, %swap ]
  %ka = phi ptr [ %keys, %number ], [ %kb, %swap ]
  %kb = phi ptr [ %spare, %number ], [ %ka, %swap ]
  %oa = phi ptr [ %order, %number ], [ %ob, %swap ]
  %ob = phi ptr [ %spare_order, %number ], [ %oa, %swap ]
  %sorted = icmp sge i64 %width, %count
  br i1 %sorted, label %finish, label %runs
runs:
  %lo = phi i64 [ 0, %widths ], [ %hi, %merged ]
  %mid0 = add i64 %lo, %width
  %mid = call i64 @llvm.smin.i64(i64 %mid0, i64 %count)
  %hi0 = add i64 %mid, %width
  %hi = call i64 @llvm.smin.i64(i64 %hi0, i64 %count)
  %midm = sub i64 %mid, 1
  %him = sub i64 %hi, 1
  br label %take
take:
  %k = phi i64 [ %lo, %runs ], [ %k1, %take ]
  %i = phi i64 [ %lo, %runs ], [ %i1, %take ]
  %j = phi i64 [ %mid, %runs ], [ %j1, %take ]
  %is = call i64 @llvm.smin.i64(i64 %i, i64 %midm)
  %js = call i64 @llvm.smin.i64(i64 %j, i64 %him)
  %lp = getelementptr $T, ptr %ka, i64 %is
  %rp = getelementptr $T, ptr %ka, i64 %js
  %left = load $T, ptr %lp, align 1
  %right = load $T, ptr %rp, align 1
$COMPARE
  %has_right = icmp slt i64 %j, %hi
  %no_left = icmp sge i64 %i, %mid
  %wants = or i1 %no_left, $BEFORE
  %second = and i1 %has_right, %wants
  %from = select i1 %second, i64 %js, i64 %is
  %key = select i1 %second, $T %right, $T %left
  %fp = getelementptr i64, ptr %oa, i64 %from
  %position = load i64, ptr %fp, align 8
  %tk = getelementptr $T, ptr %kb, i64 %k
  store $T %key, ptr %tk, align 1
  %to = getelementptr i64, ptr %ob, i64 %k
  store i64 %position, ptr %to, align 8
  %step = zext i1 %second to i64
  %j1 = add i64 %j, %step
  %other = xor i64 %step, 1
  %i1 = add i64 %i, %other
  %k1 = add i64 %k, 1
  %within = icmp slt i64 %k1, %hi
  br i1 %within, label %take, label %merged
merged:
  %rest = icmp slt i64 %hi, %count
  br i1 %rest, label %runs, label %swap
swap:
  %twice = shl i64 %width, 1
  br label %widths
$FINISH"""
