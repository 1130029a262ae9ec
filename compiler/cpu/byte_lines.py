"""Operands of products of 8 bits, put in order for the units that multiply them, as LLVM IR.

A unit takes the elements of four bytes of the depth at once: four of 8 bits ("quads"), or two that
were widened to 16 bits ("pairs"). So rows become lines of whole 64 bytes, zeros behind their end,
and a panel its columns side by side, of each those four bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

STEP = 64
"""Elements of a sum that lines are made of."""
BYTES, HALVES = "<64 x i8>", "<64 x i16>"
LINES = {"plain": "", "flipped": "", "wide.s": "sext", "wide.u": "zext"}
"""What lines may become: as they are; with their highest bits flipped, which adds 128 or takes it
away; widened."""
ZEROS = "@sf.bytes.zeros = internal constant [64 x i8] zeroinitializer, align 64"
PANELS = {"quads": "", "pairs.s": "sext", "pairs.u": "zext"}


def loop(
    name: str, before: str, count: str, step: int, body: Sequence[str], after: str
) -> list[str]:
    """A loop at least once over i64 `%name` from 0 below `count`, from the block `before` on."""
    return [
        f"{name}.do:",
        f"  %{name} = phi i64 [ 0, %{before} ], [ %{name}.next, %{name}.latch ]",
        *body,
        f"  br label %{name}.latch",
        f"{name}.latch:",
        f"  %{name}.next = add i64 %{name}, {step}",
        f"  %{name}.more = icmp slt i64 %{name}.next, {count}",
        f"  br i1 %{name}.more, label %{name}.do, label %{after}",
    ]


def lines_symbol(kind: str) -> str:
    return f"sf.bytes.lines.{kind}"


def lines_text(kind: str) -> str:
    """The function `symbol(from, from_row, rows, depth, to, to_row, spare)`: at least one row, of
    at least one element, in steps of bytes; `spare` has 64."""
    widen = LINES[kind]
    made = [f"  %x = load {BYTES}, ptr %here, align 1"]
    if kind == "flipped":
        made.append(f"  %y = xor {BYTES} %x, splat (i8 -128)")
    elif widen:
        made.append(f"  %y = {widen} {BYTES} %x to {HALVES}")
    vector, value = (HALVES if widen else BYTES), ("%x" if kind == "plain" else "%y")
    body = [
        "  %end = add i64 %k, 64",
        "  %inside = icmp sle i64 %end, %depth",
        "  %at = getelementptr i8, ptr %row, i64 %k",
        "  br i1 %inside, label %ready, label %part",
        "part:",
        "  %left = sub i64 %depth, %k",
        f"  store {BYTES} zeroinitializer, ptr %spare, align 1",
        "  call void @llvm.memcpy.p0.p0.i64(ptr %spare, ptr %at, i64 %left, i1 false)",
        "  br label %ready",
        "ready:",
        "  %here = phi ptr [ %at, %k.do ], [ %spare, %part ]",
        *made,
        f"  %wide = shl i64 %k, {int(bool(widen))}",
        "  %put = getelementptr i8, ptr %out, i64 %wide",
        f"  store {vector} {value}, ptr %put, align 1",
    ]
    rows = [
        "  %skip = mul i64 %r, %from_row",
        "  %row = getelementptr i8, ptr %from, i64 %skip",
        "  %out_skip = mul i64 %r, %to_row",
        "  %out = getelementptr i8, ptr %to, i64 %out_skip",
        "  br label %k.do",
        *loop("k", "r.do", "%depth", STEP, body, "row_done"),
        "row_done:",
    ]
    return "\n".join([
        f"define void @{lines_symbol(kind)}(ptr readonly %from, i64 %from_row, i64 %rows,"
        " i64 %depth, ptr noalias %to, i64 %to_row, ptr noalias %spare) noinline nounwind {",
        "entry:",
        "  br label %r.do",
        *loop("r", "entry", "%rows", 1, rows, "return"),
        "return:",
        "  ret void",
        "}",
    ])  # fmt: skip


def panel_symbol(kind: str, columns: int, rows: str) -> str:
    return f"sf.bytes.panel.{kind}.{columns}.{rows}"


def panel_text(kind: str, columns: int, rows: str) -> str:
    """The function `symbol(panel, step, places, depth, padded, width, to, spare)`: rows up to
    `padded`, of which those from `depth` on are zeros. Rows lie as in `tile.TileShape`; of those in
    steps no more than `width` columns are read. `spare` has 64 bytes for each row of a group."""
    group = 4 if kind == "quads" else 2
    body: list[str] = []
    before = "k.do"
    for n in range(group):
        body += _row(n, columns, rows, before)
        before = f"row{n}"
    for g in range(columns // 16):
        body += _side_by_side(g, kind, columns)
    return "\n".join([
        f"define void @{panel_symbol(kind, columns, rows)}(ptr readonly %panel, i64 %step,"
        " ptr readonly %places, i64 %depth, i64 %padded, i64 %width, ptr noalias %to,"
        " ptr noalias %spare) noinline nounwind {",
        "entry:",
        f"  %cut = icmp slt i64 %width, {columns}",
        "  br label %k.do",
        *loop("k", "entry", "%padded", group, body, "return"),
        "return:",
        "  ret void",
        "}",
    ])  # fmt: skip


def _row(n: int, columns: int, rows: str, before: str) -> list[str]:
    """The pointer `%p{n}` to row k + n of a panel, or to zeros behind the last one."""
    out = [
        f"  %k{n} = add i64 %k, {n}",
        f"  %in{n} = icmp slt i64 %k{n}, %depth",
        f"  br i1 %in{n}, label %found{n}, label %row{n}",
        f"found{n}:",
    ]
    if rows == "places":
        out += [
            f"  %at{n} = getelementptr i64, ptr %places, i64 %k{n}",
            f"  %skip{n} = load i64, ptr %at{n}, align 8",
        ]
    else:
        out.append(f"  %skip{n} = mul i64 %k{n}, {columns if rows == 'packed' else '%step'}")
    out.append(f"  %q{n} = getelementptr i8, ptr %panel, i64 %skip{n}")
    ends = [f"[ %q{n}, %found{n} ]"]
    if rows == "steps":
        out += [
            f"  br i1 %cut, label %part{n}, label %row{n}",
            f"part{n}:",
            f"  %s{n} = getelementptr i8, ptr %spare, i64 {64 * n}",
            f"  call void @llvm.memcpy.p0.p0.i64(ptr %s{n}, ptr %q{n}, i64 %width, i1 false)",
        ]
        ends.append(f"[ %s{n}, %part{n} ]")
    return [
        *out,
        f"  br label %row{n}",
        f"row{n}:",
        f"  %p{n} = phi ptr [ @sf.bytes.zeros, %{before} ], {', '.join(ends)}",
    ]


def _side_by_side(g: int, kind: str, columns: int) -> list[str]:
    """16 columns of a group of rows, the bytes of each column one after the other."""
    quarter, widen = "<16 x i8>", PANELS[kind]
    out = []
    for n in range(4 if kind == "quads" else 2):
        out += [
            f"  %x{g}.{n}p = getelementptr i8, ptr %p{n}, i64 {16 * g}",
            f"  %x{g}.{n} = load {quarter}, ptr %x{g}.{n}p, align 1",
        ]
    # four bytes of a column for every four of the depth, or for every two that are widened
    out += [
        f"  %t{g}.skip = mul i64 %k, {columns if kind == 'quads' else 2 * columns}",
        f"  %t{g}.row = getelementptr i8, ptr %to, i64 %t{g}.skip",
        f"  %t{g} = getelementptr i8, ptr %t{g}.row, i64 {64 * g}",
    ]
    halves = [(n, half) for n in range(2 if kind == "quads" else 1) for half in (0, 1)]
    for n, half in halves:
        x, y = f"%x{g}.{2 * n}", f"%x{g}.{2 * n + 1}"
        out.append(_zipped(f"%y{g}.{n}{half}", quarter, 16, x, y, half))
    if kind != "quads":
        for half in (0, 1):
            out += [
                f"  %z{g}.{half} = {widen} {quarter} %y{g}.0{half} to <16 x i16>",
                f"  %z{g}.{half}p = getelementptr i8, ptr %t{g}, i64 {32 * half}",
                f"  store <16 x i16> %z{g}.{half}, ptr %z{g}.{half}p, align 1",
            ]
        return out
    words = "<8 x i16>"
    for n, half in halves:
        out.append(f"  %y{g}.{n}{half}w = bitcast {quarter} %y{g}.{n}{half} to {words}")
    for half in (0, 1):
        for part in (0, 1):
            name, place = f"%z{g}.{half}{part}", 32 * half + 16 * part
            out += [
                _zipped(name, words, 8, f"%y{g}.0{half}w", f"%y{g}.1{half}w", part),
                f"  {name}p = getelementptr i8, ptr %t{g}, i64 {place}",
                f"  store {words} {name}, ptr {name}p, align 1",
            ]
    return out


def _zipped(name: str, vector: str, lanes: int, x: str, y: str, half: int) -> str:
    """The elements of one half of two vectors in turns."""
    first = half * lanes // 2
    order = ", ".join(f"i32 {first + n}, i32 {lanes + first + n}" for n in range(lanes // 2))
    return f"  {name} = shufflevector {vector} {x}, {vector} {y}, <{lanes} x i32> <{order}>"
