"""A stable merge sort of keys with their positions, as LLVM IR, one function per dtype and order.

Runs of doubling width are merged back and forth between the arrays and two spare ones. NaN comes
after every number, before every number if descending.
"""

from __future__ import annotations

from stagefuse.dsl.dtypes import DType

from .ir import Code
from .scalars import MEMORY


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
    text = _TEXT.replace("$COMPARE", "\n".join(code.lines)).replace("$BEFORE", before.text)
    return text.replace("$NAME", sort_symbol(dtype, descending)).replace("$T", kind)


_TEXT = """
define internal void @$NAME(ptr noalias %keys, ptr noalias %order, ptr noalias %spare,
    ptr noalias %spare_order, i64 %count) noinline nounwind {
entry:
  %some = icmp sgt i64 %count, 0
  br i1 %some, label %number, label %return
number:
  %p = phi i64 [ 0, %entry ], [ %p1, %number ]
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
