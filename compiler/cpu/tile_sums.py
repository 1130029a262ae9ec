"""The sums of a register tile over the depth, as LLVM IR.

They are in registers for a stretch of the depth, and then added to those of the stretches before
it, where the tile is stored.
"""

from __future__ import annotations

import re

from stagefuse.dsl.frozen import frozen

STRETCH = 1024
"""Steps of a sum that starts at 0, before it is added to those before it. Of random products the
error grows with the root of the depth times this, in one accumulator with the depth."""
WIDTH = {"float": 4, "double": 8, "i32": 4}
SUFFIX = {"float": "f32", "double": "f64", "i32": "i32"}
UNITS = {"quads.us": "+avx512vnni", "quads.su": "+avx512vnni", "pairs": ""}
"""How 4 bytes of a row are multiplied by those of each column of a panel, and their products added
to an i32; and what else that takes of a processor. They are two integers of 16 bits, or four of 8,
of which the row's or the column's are unsigned."""

PAIRS = {
    4: "llvm.x86.sse2.pmadd.wd",
    8: "llvm.x86.avx2.pmadd.wd",
    16: "llvm.x86.avx512.pmaddw.d.512",
}
QUADS = {lanes: f"llvm.x86.avx512.vpdpbusd.{32 * lanes}" for lanes in (4, 8, 16)}
"""The instructions of those units, by lanes of a vector."""


@frozen
class TileShape:
    """A micro-kernel: element type and columns of a panel's row.

    `rows`: where the rows of a panel lie. They are "packed", one after the other; or in equal
    "steps", the last one at the end of its buffer perhaps; or at "places" from a table. `tails`:
    whether fewer columns may be wanted than a panel has. `unit`: of elements that are several
    integers, what multiplies them.
    """

    element: str
    columns: int
    rows: str = "packed"
    tails: bool = True
    unit: str = ""

    @property
    def symbol(self) -> str:
        whole = "" if self.tails else ".whole"
        element = self.unit or SUFFIX[self.element]
        return f"sf.tile.{element}.{self.columns}.{self.rows}{whole}"


@frozen
class RegisterTile:
    """Register tiles of one size, `rows` by `wide` vectors. `tail`: only lanes within the width
    are read."""

    shape: TileShape
    rows: int
    wide: int
    lanes: int
    tail: bool = False
    beside: int = 1

    @property
    def name(self) -> str:
        """What its labels and values end with."""
        return f"{self.rows}{'t' if self.tail else ''}"

    @property
    def prefix(self) -> str:
        """What the names of the register tile's values begin with."""
        return f"r{self.name}_"

    @property
    def vector(self) -> str:
        return f"<{self.lanes} x {self.shape.element}>"

    @property
    def size(self) -> int:
        """Bytes of an element."""
        return WIDTH[self.shape.element]

    @property
    def suffix(self) -> str:
        """Of the names of intrinsics on its vectors."""
        return f"v{self.lanes}f{8 * self.size}"

    @property
    def step(self) -> str:
        """Elements from a row of the panel to the next, where they are in equal steps."""
        return "%step" if self.shape.rows == "steps" else str(self.shape.columns)

    @property
    def cells(self) -> list[tuple[int, int]]:
        """Row and vector of each accumulator."""
        return [(r, c) for r in range(self.rows) for c in range(self.wide)]


def reads_part(s: RegisterTile) -> bool:
    """Whether what lies behind the wanted columns may not be read."""
    return s.tail and s.shape.rows == "steps"


def _row_of_panel(s: RegisterTile) -> list[str]:
    """The pointer to the panel's row k."""
    element, t = s.shape.element, s.prefix
    if s.shape.rows == "places":
        base = f"%p_base{s.name}"
        at = [
            f"  %{t}pp = getelementptr i64, ptr %{t}at, i64 %{t}k",
            f"  %{t}pk = load i64, ptr %{t}pp, align 8",
        ]
    else:
        base = f"%{t}at"
        at = [f"  %{t}pk = mul i64 %{t}k, {s.step}"]
    return [*at, f"  %{t}p = getelementptr {element}, ptr {base}, i64 %{t}pk"]


def sums_of(s: RegisterTile) -> list[str]:
    """The loops over k for a register tile, stretch by stretch, each with its stores."""
    n, t = s.name, s.prefix
    before, first = ("rest", f"%{t}k0") if s.beside > 1 else ("begin", "0")
    begun = f"%{t}j{{0}}" if s.beside > 1 else "zeroinitializer"
    incoming = f"[ {begun}, %{before}{n} ], [ %{t}n{{0}}, %loop{n} ]"
    return [
        *_addresses(s),
        *_start(s),
        *_side_by_side(s),
        f"loop{n}:",
        f"  %{t}k = phi i64 [ {first}, %{before}{n} ], [ %{t}k1, %loop{n} ]",
        *_phis(s, "s", incoming),
        *_one_step(s),
        f"  %{t}k1 = add nuw nsw i64 %{t}k, 1",
        f"  %{t}m = icmp slt i64 %{t}k1, %{t}steps",
        f"  br i1 %{t}m, label %loop{n}, label %stop{n}",
        f"stop{n}:",
        *_phis(s, "z", incoming),
        *_stop(s),
    ]


def _phis(s: RegisterTile, name: str, incoming: str) -> list[str]:
    """One for each vector of the tile."""
    cells = (f"{r}_{c}" for r, c in s.cells)
    return [f"  %{s.prefix}{name}{x} = phi {s.vector} {incoming.format(x, x)}" for x in cells]


def _addresses(s: RegisterTile) -> list[str]:
    """Where the rows of the left matrix begin, and where the tile's vectors go."""
    element, n, t = s.shape.element, s.name, s.prefix
    out = []
    for r in range(s.rows):
        out += [
            f"  %{t}o{r} = mul i64 %a_row, {r}",
            f"  %{t}a{r} = getelementptr {element}, ptr %a_base{n}, i64 %{t}o{r}",
            f"  %{t}e{r} = mul i64 %dst_row, {r}",
            f"  %{t}d{r} = getelementptr {element}, ptr %d_base{n}, i64 %{t}e{r}",
        ]
    for r, c in s.cells:
        out.append(f"  %{t}w{r}_{c} = getelementptr {element}, ptr %{t}d{r}, i64 {c * s.lanes}")
    return out


def _moving(s: RegisterTile) -> list[tuple[str, str, str, str]]:
    """What lies elsewhere for each stretch: a name, where it is for the first, what is at it, and
    how many of those a step goes on."""
    n, t, element = s.name, s.prefix, s.shape.element
    rows = [(f"%{t}b_a{r}", f"%{t}a{r}", element, "%a_col") for r in range(s.rows)]
    if s.shape.rows == "places":
        return [*rows, (f"%{t}at", "%places", "i64", "1")]
    return [*rows, (f"%{t}at", f"%p_base{n}", element, s.step)]


def _start(s: RegisterTile) -> list[str]:
    """A stretch of the depth: its sums start at 0."""
    n, t = s.name, s.prefix
    return [
        f"  br label %begin{n}",
        f"begin{n}:",
        f"  %{t}adds = phi i1 [ %add, %start{n} ], [ true, %again{n} ]",
        f"  %{t}left = phi i64 [ %depth, %start{n} ], [ %{t}rest, %again{n} ]",
        f"  %{t}steps = phi i64 [ %stretch, %start{n} ], [ %{t}few, %again{n} ]",
        *(f"  {x} = phi ptr [ {y}, %start{n} ], [ {x}n, %again{n} ]" for x, y, *_ in _moving(s)),
        *([] if s.beside > 1 else _enter(s, "0", "%depth")),
    ]


def _stop(s: RegisterTile) -> list[str]:
    """The end of a stretch: its sums are added to what dst holds, if that is to be, and stored."""
    n, t, add = s.name, s.prefix, "add" if s.shape.unit else "fadd"
    out = [f"  br i1 %{t}adds, label %sum{n}, label %store{n}", f"sum{n}:"]
    for r, c in s.cells:
        x = f"{r}_{c}"
        out += [
            f"  %{t}g{x} = load {s.vector}, ptr %{t}w{x}, align {s.size}",
            f"  %{t}h{x} = {add} {s.vector} %{t}g{x}, %{t}z{x}",
        ]
    out += [f"  br label %store{n}", f"store{n}:"]
    out += _phis(s, "l", f"[ %{t}z{{0}}, %stop{n} ], [ %{t}h{{0}}, %sum{n} ]")
    for r, c in s.cells:
        out.append(f"  store {s.vector} %{t}l{r}_{c}, ptr %{t}w{r}_{c}, align {s.size}")
    on = []
    for at, _, element, step in _moving(s):
        on.append(f"  {at}s = mul i64 {step}, {STRETCH}")
        on.append(f"  {at}n = getelementptr {element}, ptr {at}, i64 {at}s")
    return [
        *out,
        f"  %{t}more = icmp sgt i64 %{t}left, {STRETCH}",
        f"  br i1 %{t}more, label %again{n}, label %next{n}",
        f"again{n}:",
        f"  %{t}rest = sub i64 %{t}left, {STRETCH}",
        f"  %{t}few = call i64 @llvm.smin.i64(i64 %{t}rest, i64 {STRETCH})",
        *on,
        f"  br label %begin{n}",
    ]


def _enter(s: RegisterTile, first: str, end: str) -> list[str]:
    """Into the loop over k, if there are steps from `first` on before `end`. A stretch is empty
    where the depth is."""
    n, t = s.name, s.prefix
    return [
        f"  %{t}some = icmp sgt i64 {end}, {first}",
        f"  br i1 %{t}some, label %loop{n}, label %stop{n}",
    ]


def _one_step(s: RegisterTile) -> list[str]:
    """The products of step k, added to the sums."""
    return [*_row_of_panel(s), *_vectors_of_panel(s), *_multiply_add(s)]


def _side_by_side(s: RegisterTile) -> list[str]:
    """A loop over as many steps at a time as are added up side by side, before the others; its sums
    are then added in pairs."""
    n, t, count = s.name, s.prefix, s.beside
    if count == 1:
        return []
    step = _one_step(s)
    own = {line.split(" = ")[0].strip() for line in step}
    own |= {f"%{t}k", *(f"%{t}s{r}_{c}" for r, c in s.cells)}

    def copy(lines: list[str], u: int) -> list[str]:
        name = re.compile(r"%[\w.]+")
        return [name.sub(lambda m: f"{m[0]}.{u}" if m[0] in own else m[0], x) for x in lines]

    out = [
        f"  %{t}many = and i64 %{t}steps, {-count}",
        f"  %{t}wide = icmp sgt i64 %{t}many, 0",
        f"  br i1 %{t}wide, label %beside{n}, label %rest{n}",
        f"beside{n}:",
        f"  %{t}k.0 = phi i64 [ 0, %begin{n} ], [ %{t}kn, %beside{n} ]",
    ]
    for u in range(count):
        begun = f"[ zeroinitializer, %begin{n} ]"
        out += copy(_phis(s, "s", f"{begun}, [ %{t}n{{}}.{u}, %beside{n} ]"), u)
    for u in range(count):
        out += [f"  %{t}k.{u} = add nuw nsw i64 %{t}k.0, {u}"] if u else []
        out += copy(step, u)
    out += [
        f"  %{t}kn = add nuw nsw i64 %{t}k.0, {count}",
        f"  %{t}again = icmp slt i64 %{t}kn, %{t}many",
        f"  br i1 %{t}again, label %beside{n}, label %pairs{n}",
        f"pairs{n}:",
    ]
    for r, c in s.cells:
        found = [f"%{t}n{r}_{c}.{u}" for u in range(count)]
        while len(found) > 1:
            total = f"%{t}y{r}_{c}.{len(found)}"
            one, other, *found = found
            out.append(f"  {total} = fadd {s.vector} {one}, {other}")
            found.append(total)
        out.append(f"  %{t}y{r}_{c} = bitcast {s.vector} {found[0]} to {s.vector}")
    return [
        *out,
        f"  br label %rest{n}",
        f"rest{n}:",
        f"  %{t}k0 = phi i64 [ 0, %begin{n} ], [ %{t}many, %pairs{n} ]",
        *_phis(s, "j", f"[ zeroinitializer, %begin{n} ], [ %{t}y{{}}, %pairs{n} ]"),
        *_enter(s, f"%{t}k0", f"%{t}steps"),
    ]


def _vectors_of_panel(s: RegisterTile) -> list[str]:
    """Loads of the panel's row k."""
    element, t, suffix = s.shape.element, s.prefix, s.suffix
    out = []
    for c in range(s.wide):
        out.append(f"  %{t}q{c} = getelementptr {element}, ptr %{t}p, i64 {c * s.lanes}")
        if reads_part(s):
            out.append(
                f"  %{t}b{c} = call {s.vector} @llvm.masked.load.{suffix}.p0(ptr align {s.size}"
                f" %{t}q{c}, <{s.lanes} x i1> %mask{s.name}, {s.vector} zeroinitializer)"
            )
        else:
            out.append(f"  %{t}b{c} = load {s.vector}, ptr %{t}q{c}, align {s.size}")
    return out


def _multiply_add(s: RegisterTile) -> list[str]:
    """An element of each row, repeated, times the panel's vectors."""
    element, t, vector = s.shape.element, s.prefix, s.vector
    align = 1 if s.shape.unit else s.size  # several integers may begin anywhere
    out = [f"  %{t}ak = mul i64 %{t}k, %a_col"]
    for r in range(s.rows):
        out += [
            f"  %{t}f{r} = getelementptr {element}, ptr %{t}b_a{r}, i64 %{t}ak",
            f"  %{t}x{r} = load {element}, ptr %{t}f{r}, align {align}",
            f"  %{t}i{r} = insertelement {vector} poison, {element} %{t}x{r}, i64 0",
            f"  %{t}v{r} = shufflevector {vector} %{t}i{r}, {vector} poison,"
            f" <{s.lanes} x i32> zeroinitializer",
        ]
        for c in range(s.wide):
            out += _multiply_vector(s, r, c)
    return out


def _multiply_vector(s: RegisterTile, r: int, c: int) -> list[str]:
    """Adds the product of row r's element by a vector of the panel to their sum."""
    t, vector, unit = s.prefix, s.vector, s.shape.unit
    left, right, total, new = f"%{t}v{r}", f"%{t}b{c}", f"%{t}s{r}_{c}", f"%{t}n{r}_{c}"
    if not unit:
        return [
            f"  {new} = call {vector} @llvm.fma.{s.suffix}({vector} {left}, {vector} {right},"
            f" {vector} {total})"
        ]
    lanes = s.lanes * (2 if unit == "pairs" else 4)
    small = f"<{lanes} x i{16 if unit == 'pairs' else 8}>"
    x, y = (left, right) if unit != "quads.su" else (right, left)
    out = [
        f"  {new}x = bitcast {vector} {x} to {small}",
        f"  {new}y = bitcast {vector} {y} to {small}",
    ]
    if unit == "pairs":
        name = PAIRS[s.lanes]
        return [
            *out,
            f"  {new}p = call {vector} @{name}({small} {new}x, {small} {new}y)",
            f"  {new} = add {vector} {new}p, {total}",
        ]
    return [
        *out,
        f"  {new} = call {vector} @{QUADS[s.lanes]}({vector} {total}, {small} {new}x,"
        f" {small} {new}y)",
    ]
