"""A stable sort of keys with their positions, as LLVM IR, one function per dtype and order.

Few elements are sorted by merging: runs of doubling width, back and forth between the arrays and
two spare ones. More are sorted by digits of eight bits, the lowest first: all digits are counted
in one go over the keys; one that all keys share is left out, by each other they are moved to the
other arrays. NaN comes after every number, before every number if descending.

Where only the first few are wanted, the others are compared with the last of the best so far, a
vector of them at a time. What comes before it is inserted among up to 64, or kept behind more until
there are twice as many, which are then sorted together. Whatever is found later has a later
position, so that equal keys keep their order.
"""

from __future__ import annotations

from stagefuse.compiler.operators import BITS
from stagefuse.compiler.sort_order import DIGITS, number_of
from stagefuse.dsl.dtypes import DType

from .ir import Code
from .scalars import MEMORY

MERGED = 256
"""Elements up to which merging is quicker."""
INSERTED = 64
"""Elements up to which those that come later are inserted one by one."""


def sort_symbol(dtype: DType, descending: bool) -> str:
    return f"sf.sort.{dtype.name}.{'down' if descending else 'up'}"


def first_symbol(dtype: DType, descending: bool) -> str:
    return f"{sort_symbol(dtype, descending)}.first"


def first_text(dtype: DType, descending: bool, lanes: int = 16) -> str:
    """The function `symbol(keys, order, spare_keys, spare_order, count, wanted)`: of the sorted
    keys and their positions the first `wanted`, 1 at least; what lies behind may be anything."""
    kind = MEMORY[dtype.name]
    bits = f"i{BITS[kind]}"

    def number(code: Code, key: str, name: str) -> str:
        """The lines that bind `name` to the number of a key, or to those of a vector."""
        begin = len(code.lines)
        found = number_of(code, code.value(key, kind).bits(), dtype, descending)
        zero = "0" if code.lanes == 1 else "zeroinitializer"
        line = f"  {name} = or {found.listed_text}, {zero}"
        text = "\n".join([*code.lines[begin:], line])
        return text if code.lanes == 1 else text.replace("%v", "%w")  # names of their own

    one, vector = Code(), f"<{lanes} x {bits}>"
    found = {
        "$SEEN": number(Code(lanes), "%seen", "%numbers"),
        "$OWN": number(one, "%key", "%new"),
        "$EARLIER": number(one, "%earlier", "%old"),
    }
    for name, place in (("first", "$BOUNDING"), ("next", "$REBOUND")):
        found[place] = "\n".join([
            f"  %{name}.key = load {kind}, ptr %end_at, align 1",
            number(one, f"%{name}.key", f"%{name}.n"),
            f"  store {bits} %{name}.n, ptr %bound, align 8",
            f"  %{name}.one = insertelement {vector} poison, {bits} %{name}.n, i64 0",
            f"  %{name}.all = shufflevector {vector} %{name}.one, {vector} poison,"
            f" <{lanes} x i32> zeroinitializer",
            f"  store {vector} %{name}.all, ptr %bounds, align 64",
        ])  # fmt: skip
    symbols = {"$FIRST": first_symbol(dtype, descending), "$NAME": sort_symbol(dtype, descending)}
    sizes = {"$INSERTED": str(INSERTED), "$LANES": str(lanes), "$N": bits, "$T": kind}
    text = _FIRST
    for place, words in {**found, **symbols, **sizes}.items():
        text = text.replace(place, words)
    return text


def sort_text(dtype: DType, descending: bool) -> str:
    """The function `symbol(keys, order, spare_keys, spare_order, count, placed)`: `placed` says
    whether `order` has the keys' positions, instead of which they are 0, 1, ..."""
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
    ptr noalias %spare_order, i64 %count, i1 %placed) noinline nounwind {
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
  %given = load i64, ptr %slot, align 8
  %position0 = select i1 %placed, i64 %given, i64 %p
  store i64 %position0, ptr %slot, align 8
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
    ptr noalias %spare_order, i64 %count, i1 %placed) noinline nounwind {
entry:
  %many = icmp sgt i64 %count, $MERGED
  br i1 %many, label %radix, label %few
radix:
  call void @$NAME.digits(ptr %keys, ptr %order, ptr %spare, ptr %spare_order, i64 %count,
    i1 %placed)
  ret void
few:
  %some = icmp sgt i64 %count, 0
  br i1 %some, label %number, label %return
number:
  %p = phi i64 [ 0, %few ], [ %p1, %number ]
  %slot = getelementptr i64, ptr %order, i64 %p
  %given = load i64, ptr %slot, align 8
  %position0 = select i1 %placed, i64 %given, i64 %p
  store i64 %position0, ptr %slot, align 8
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

_FIRST = """
define internal void @$FIRST(ptr noalias %keys, ptr noalias %order, ptr noalias %spare,
    ptr noalias %spare_order, i64 %count, i64 %wanted) noinline nounwind {
entry:
  %fill = alloca i64, align 8
  %bound = alloca $N, align 8
  %bounds = alloca <$LANES x $N>, align 64
  %inserts = icmp sle i64 %wanted, $INSERTED
  %twice = shl i64 %wanted, 1
  %room = select i1 %inserts, i64 %wanted, i64 %twice
  %end = sub i64 %wanted, 1
  %end_at = getelementptr $T, ptr %keys, i64 %end
  %all = icmp sge i64 %room, %count
  br i1 %all, label %whole, label %begin
whole:
  call void @$NAME(ptr %keys, ptr %order, ptr %spare, ptr %spare_order, i64 %count, i1 false)
  ret void
begin:
  call void @$NAME(ptr %keys, ptr %order, ptr %spare, ptr %spare_order, i64 %room, i1 false)
  store i64 %wanted, ptr %fill, align 8
$BOUNDING
  br label %scan
scan:
  %i = phi i64 [ %room, %begin ], [ %stop, %vector ], [ %stop, %laned ]
  %stop = add i64 %i, $LANES
  %fits = icmp sle i64 %stop, %count
  br i1 %fits, label %vector, label %tail
vector:
  %seen_at = getelementptr $T, ptr %keys, i64 %i
  %seen = load <$LANES x $T>, ptr %seen_at, align 1
$SEEN
  %limits = load <$LANES x $N>, ptr %bounds, align 64
  %before = icmp ult <$LANES x $N> %numbers, %limits
  %found = bitcast <$LANES x i1> %before to i$LANES
  %none = icmp eq i$LANES %found, 0
  br i1 %none, label %scan, label %lanes
tail:
  %some = icmp slt i64 %i, %count
  br i1 %some, label %lanes, label %finish
lanes:
  %to = call i64 @llvm.smin.i64(i64 %stop, i64 %count)
  br label %lane
lane:
  %j = phi i64 [ %i, %lanes ], [ %j1, %laned ]
  %key_at = getelementptr $T, ptr %keys, i64 %j
  %key = load $T, ptr %key_at, align 1
$OWN
  %limit = load $N, ptr %bound, align 8
  %better = icmp ult $N %new, %limit
  br i1 %better, label %take, label %laned
take:
  br i1 %inserts, label %shift, label %append
shift:
  %h = phi i64 [ %end, %take ], [ %h1, %moved ]
  %h1 = sub i64 %h, 1
  %h_at = getelementptr $T, ptr %keys, i64 %h
  %ho_at = getelementptr i64, ptr %order, i64 %h
  %inner = icmp sgt i64 %h, 0
  br i1 %inner, label %compare, label %place
compare:
  %earlier_at = getelementptr $T, ptr %keys, i64 %h1
  %earlier = load $T, ptr %earlier_at, align 1
$EARLIER
  %goes = icmp ugt $N %old, %new
  br i1 %goes, label %moved, label %place
moved:
  %eo_at = getelementptr i64, ptr %order, i64 %h1
  %eo = load i64, ptr %eo_at, align 8
  store $T %earlier, ptr %h_at, align 1
  store i64 %eo, ptr %ho_at, align 8
  br label %shift
place:
  store $T %key, ptr %h_at, align 1
  store i64 %j, ptr %ho_at, align 8
  br label %rebound
append:
  %f = load i64, ptr %fill, align 8
  %f_at = getelementptr $T, ptr %keys, i64 %f
  %fo_at = getelementptr i64, ptr %order, i64 %f
  store $T %key, ptr %f_at, align 1
  store i64 %j, ptr %fo_at, align 8
  %f1 = add i64 %f, 1
  store i64 %f1, ptr %fill, align 8
  %full = icmp eq i64 %f1, %room
  br i1 %full, label %resort, label %laned
resort:
  call void @$NAME(ptr %keys, ptr %order, ptr %spare, ptr %spare_order, i64 %room, i1 true)
  store i64 %wanted, ptr %fill, align 8
  br label %rebound
rebound:
$REBOUND
  br label %laned
laned:
  %j1 = add i64 %j, 1
  %on = icmp slt i64 %j1, %to
  br i1 %on, label %lane, label %scan
finish:
  br i1 %inserts, label %return, label %settle
settle:
  %kept = load i64, ptr %fill, align 8
  call void @$NAME(ptr %keys, ptr %order, ptr %spare, ptr %spare_order, i64 %kept, i1 true)
  br label %return
return:
  ret void
}
"""
