"""The matmul micro-kernel as LLVM IR: explicit vectors, the accumulators held in registers.

One function serves any number of rows of a tile. It walks register tiles, chosen so that
accumulators, a row of the panel and one broadcast fit the registers: a register tile of every
height up to the highest has its own loop over k. Columns left over are done a vector at a time.
"""

from __future__ import annotations

import re

from stagefuse.dsl.frozen import frozen

REGISTERS = {"v3": (16, 32), "v4": (32, 64)}  # vector registers, bytes of each
WIDTH = {"float": 4, "double": 8, "i32": 4}
MOST_VECTORS = {"v3": 2, "v4": 4}
"""Vectors a row of the tile, where there are rows enough. On AVX2, 6 x 16 read one line of the
panel for each step of the sum, 4 x 24 two: 1.2 times as fast on Zen 3. With AVX-512, 6 x 64 are
1.05 times as fast as 14 x 32 on Zen 4 with packed panels, and 1.27 times where the rows of panels
are 4 KB apart."""
MOST_ROWS, SUMS = 8, 12
"""Rows of a tile where that leaves so many sums that do not wait for each other. Rows that lie a
multiple of 4 KB apart share a set of the first-level cache, whose ways are eight at least: with 16
rows of 4096, 16 x 4096 x 16 takes 2.2 times as long on Zen 4."""
LEAST_SUMS = 8
"""Sums that do not wait for each other which AVX2's units take to be busy: two multiply-adds in a
clock, four clocks each. Tiles of a row or two have fewer, and add up several steps side by side."""
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


def lanes_of(element: str, columns: int, level: str) -> int:
    """Lanes of the widest vector that divides a panel's row."""
    lanes = REGISTERS[level][1] // WIDTH[element]
    while columns % lanes:
        lanes //= 2
    return lanes


def register_tile(element: str, columns: int, level: str, rows: int) -> tuple[int, int]:
    """Vectors a row and lanes of a vector of the register tile of some rows.

    The widest that leaves registers for the panel's vectors, each read once for all rows, and
    for a broadcast. A row or two read them one at a time.
    """
    lanes = lanes_of(element, columns, level)
    vectors = columns // lanes

    def fits(wide: int) -> bool:
        others = 1 + rows if rows <= 2 else 1 + wide
        return rows * wide + others <= REGISTERS[level][0]

    return max(v for v in range(1, vectors + 1) if vectors % v == 0 and fits(v)), lanes


def tallest(element: str, columns: int, level: str) -> int:
    """The rows of the register tile that most of a product is done in."""
    vectors = columns // lanes_of(element, columns, level)
    most = MOST_VECTORS[level]
    wide = max(v for v in range(1, min(vectors, most) + 1) if vectors % v == 0)
    return min((REGISTERS[level][0] - 1 - wide) // wide, max(MOST_ROWS, SUMS // wide))


def tile_text(shape: TileShape, level: str) -> str:
    """The function `symbol(dst, dst_row, a, a_row, a_col, panel, step, places, rows, depth, width,
    add)`.

    The sums start at 0, or where `add` at what dst holds. The rows are divided evenly: first
    register tiles with a row more, all of them for a stretch of columns before the next, so that
    its part of the panel stays in the first-level cache; then the others. `step` and `places`
    (i64, one for each k) say where the rows of the panel begin, where they are not packed.
    """
    height = tallest(shape.element, shape.columns, level)
    out = [
        f"define void @{shape.symbol}(ptr noalias %dst, i64 %dst_row, ptr readonly %a,"
        " i64 %a_row, i64 %a_col, ptr noalias readonly %panel, i64 %step,"
        " ptr noalias readonly %places, i64 %rows, i64 %depth, i64 %width, i1 %add)"
        f" noinline noduplicate nounwind{_features(shape)} {{",
        "entry:",
        "  %any = icmp sgt i64 %rows, 0",
        "  br i1 %any, label %divide, label %return",
        "divide:",
        f"  %up = add i64 %rows, {height - 1}",
        f"  %tiles = udiv i64 %up, {height}",
        "  %low = udiv i64 %rows, %tiles",
        "  %higher = urem i64 %rows, %tiles",
        "  %high = add i64 %low, 1",
        "  %split = mul i64 %higher, %high",
        "  %even = icmp eq i64 %higher, 0",
        "  br i1 %even, label %second, label %choose",
        "second:",
        "  br label %choose",
        "choose:",
        "  %from = phi i64 [ 0, %divide ], [ %split, %second ]",
        "  %to = phi i64 [ %split, %divide ], [ %rows, %second ]",
        "  %each = phi i64 [ %high, %divide ], [ %low, %second ]",
        "  switch i64 %each, label %return [",
        *(f"    i64 {rows}, label %enter{rows}" for rows in range(1, height + 1)),
        "  ]",
    ]
    for rows in range(1, height + 1):
        out += _columns(shape, level, rows)
    out += [
        "done:",
        "  %more = icmp slt i64 %to, %rows",
        "  br i1 %more, label %second, label %return",
    ]
    return "\n".join([*out, "return:", "  ret void", "}"])


def _features(shape: TileShape) -> str:
    wanted = UNITS.get(shape.unit)
    return f' "target-features"="{wanted}"' if wanted else ""


def declaration(text: str) -> str:
    """What a module needs of a function of another, given that function's text."""
    head = text[: text.index("{")].strip().replace("define", "declare", 1)
    return re.sub(r" %\w+(?=[,)])", "", head)


@frozen
class _Stretch:
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
    def cells(self) -> list[tuple[int, int]]:
        """Row and vector of each accumulator."""
        return [(r, c) for r in range(self.rows) for c in range(self.wide)]


def _columns(shape: TileShape, level: str, rows: int) -> list[str]:
    """The loops over columns and over register tiles of some rows."""
    wide, lanes = register_tile(shape.element, shape.columns, level, rows)
    main = _Stretch(shape, rows, wide, lanes, beside=_beside(shape, level, rows * wide))
    out = [f"enter{rows}:"]
    if not shape.tails:
        out.append(f"  br label %column{rows}")
        return [*out, *_stretches(main, "0", f"%enter{rows}", "%width")]
    tail = _Stretch(shape, rows, 1, lanes, True)
    # a vector may reach beyond the width where what lies there is still the panel's
    most = 0 if shape.rows == "steps" else lanes - 1
    out += [
        f"  %main_up{rows} = add i64 %width, {most}",
        f"  %main_rest{rows} = urem i64 %main_up{rows}, {wide * lanes}",
        f"  %main{rows} = sub i64 %main_up{rows}, %main_rest{rows}",
        f"  %main_any{rows} = icmp sgt i64 %main{rows}, 0",
        f"  br i1 %main_any{rows}, label %column{rows}, label %turn{rows}",
        *_stretches(main, "0", f"%enter{rows}", f"%main{rows}", f"turn{rows}"),
        f"turn{rows}:",
        f"  %tail_any{rows} = icmp slt i64 %main{rows}, %width",
        f"  br i1 %tail_any{rows}, label %column{rows}t, label %done",
        *_stretches(tail, f"%main{rows}", f"%turn{rows}", "%width"),
    ]
    return out


def _beside(shape: TileShape, level: str, sums: int) -> int:
    """Steps of the sum of a register tile of so many sums that are added up side by side."""
    if level != "v3" or shape.rows != "packed" or shape.unit:
        return 1
    return max(n for n in (4, 2, 1) if n == 1 or n * sums <= LEAST_SUMS)


def _stretches(s: _Stretch, begin: str, entry: str, stop: str, after: str = "done") -> list[str]:
    """Stretches of columns from `begin` to `stop`, all rows of one before the next."""
    element, n = s.shape.element, s.name
    return [
        f"column{n}:",
        f"  %col{n} = phi i64 [ {begin}, {entry} ], [ %col_next{n}, %row_done{n} ]",
        f"  %d_col{n} = getelementptr {element}, ptr %dst, i64 %col{n}",
        f"  %p_base{n} = getelementptr {element}, ptr %panel, i64 %col{n}",
        *_mask(s),
        f"  br label %start{n}",
        f"start{n}:",
        f"  %row{n} = phi i64 [ %from, %column{n} ], [ %row_next{n}, %next{n} ]",
        f"  %a_skip{n} = mul i64 %row{n}, %a_row",
        f"  %a_base{n} = getelementptr {element}, ptr %a, i64 %a_skip{n}",
        f"  %d_skip{n} = mul i64 %row{n}, %dst_row",
        f"  %d_base{n} = getelementptr {element}, ptr %d_col{n}, i64 %d_skip{n}",
        *_product(s),
        f"next{n}:",
        f"  %row_next{n} = add i64 %row{n}, {s.rows}",
        f"  %more_rows{n} = icmp slt i64 %row_next{n}, %to",
        f"  br i1 %more_rows{n}, label %start{n}, label %row_done{n}",
        f"row_done{n}:",
        f"  %col_next{n} = add i64 %col{n}, {s.wide * s.lanes}",
        f"  %more{n} = icmp slt i64 %col_next{n}, {stop}",
        f"  br i1 %more{n}, label %column{n}, label %{after}",
    ]


def _reads_part(s: _Stretch) -> bool:
    """Whether what lies behind the wanted columns may not be read."""
    return s.tail and s.shape.rows == "steps"


def _mask(s: _Stretch) -> list[str]:
    """The lanes of a tail's vector within the width."""
    if not _reads_part(s):
        return []
    n = s.name
    return [  # as bits of an integer: LLVM would compare vectors in each step of the loop
        f"  %left{n} = sub i64 %width, %col{n}",
        f"  %less{n} = icmp slt i64 %left{n}, {s.lanes}",
        f"  %some{n} = select i1 %less{n}, i64 %left{n}, i64 {s.lanes}",
        f"  %none{n} = shl nsw i64 -1, %some{n}",
        f"  %long{n} = xor i64 %none{n}, -1",
        f"  %bits{n} = trunc i64 %long{n} to i{s.lanes}",
        f"  %mask{n} = bitcast i{s.lanes} %bits{n} to <{s.lanes} x i1>",
    ]


def _row_of_panel(s: _Stretch) -> list[str]:
    """The pointer to the panel's row k."""
    element, n, t = s.shape.element, s.name, s.prefix
    if s.shape.rows == "places":
        at = [
            f"  %{t}pp = getelementptr i64, ptr %places, i64 %{t}k",
            f"  %{t}pk = load i64, ptr %{t}pp, align 8",
        ]
    else:
        step = "%step" if s.shape.rows == "steps" else str(s.shape.columns)
        at = [f"  %{t}pk = mul i64 %{t}k, {step}"]
    return [*at, f"  %{t}p = getelementptr {element}, ptr %p_base{n}, i64 %{t}pk"]


def _product(s: _Stretch) -> list[str]:
    """The loop over k for a register tile, then its stores."""
    n, t = s.name, s.prefix
    stores = [
        f"  store {s.vector} %{t}z{r}_{c}, ptr %{t}w{r}_{c}, align {s.size}" for r, c in s.cells
    ]
    before, sums, first = ("rest", "j", f"%{t}k0") if s.beside > 1 else ("begin", "h", "0")
    return [
        *_addresses(s),
        *_start(s),
        *_side_by_side(s),
        f"loop{n}:",
        f"  %{t}k = phi i64 [ {first}, %{before}{n} ], [ %{t}k1, %loop{n} ]",
        *_phis(s, "s", f"[ %{t}{sums}{{}}, %{before}{n} ], [ %{t}n{{}}, %loop{n} ]"),
        *_one_step(s),
        f"  %{t}k1 = add nuw nsw i64 %{t}k, 1",
        f"  %{t}m = icmp slt i64 %{t}k1, %depth",
        f"  br i1 %{t}m, label %loop{n}, label %stop{n}",
        f"stop{n}:",
        *_phis(s, "z", f"[ %{t}{sums}{{}}, %{before}{n} ], [ %{t}n{{}}, %loop{n} ]"),
        *stores,
        f"  br label %next{n}",
    ]


def _phis(s: _Stretch, name: str, incoming: str) -> list[str]:
    """One for each vector of the tile."""
    cells = (f"{r}_{c}" for r, c in s.cells)
    return [f"  %{s.prefix}{name}{x} = phi {s.vector} {incoming.format(x, x)}" for x in cells]


def _addresses(s: _Stretch) -> list[str]:
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


def _start(s: _Stretch) -> list[str]:
    """The sums before the first step: what dst holds, or zeros."""
    n, t = s.name, s.prefix
    loads = [
        f"  %{t}g{r}_{c} = load {s.vector}, ptr %{t}w{r}_{c}, align {s.size}" for r, c in s.cells
    ]
    return [
        f"  br i1 %add, label %add{n}, label %begin{n}",
        f"add{n}:",
        *loads,
        f"  br label %begin{n}",
        f"begin{n}:",
        *_phis(s, "h", f"[ zeroinitializer, %start{n} ], [ %{t}g{{}}, %add{n} ]"),
        *([] if s.beside > 1 else _enter(s, "0")),
    ]


def _enter(s: _Stretch, first: str) -> list[str]:
    """Into the loop over k, if there are steps from `first` on."""
    n, t = s.name, s.prefix
    return [
        f"  %{t}some = icmp sgt i64 %depth, {first}",
        f"  br i1 %{t}some, label %loop{n}, label %stop{n}",
    ]


def _one_step(s: _Stretch) -> list[str]:
    """The products of step k, added to the sums."""
    return [*_row_of_panel(s), *_vectors_of_panel(s), *_multiply_add(s)]


def _side_by_side(s: _Stretch) -> list[str]:
    """A loop over as many steps at a time as are added up side by side, before the others; its sums
    are then added in pairs to what the tile began with."""
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
        f"  %{t}many = and i64 %depth, {-count}",
        f"  %{t}wide = icmp sgt i64 %{t}many, 0",
        f"  br i1 %{t}wide, label %beside{n}, label %rest{n}",
        f"beside{n}:",
        f"  %{t}k.0 = phi i64 [ 0, %begin{n} ], [ %{t}kn, %beside{n} ]",
    ]
    for u in range(count):
        begun = f"[ %{t}h{{}}, %begin{n} ]" if u == 0 else f"[ zeroinitializer, %begin{n} ]"
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
        *_phis(s, "j", f"[ %{t}h{{}}, %begin{n} ], [ %{t}y{{}}, %pairs{n} ]"),
        *_enter(s, f"%{t}k0"),
    ]


def _vectors_of_panel(s: _Stretch) -> list[str]:
    """Loads of the panel's row k."""
    element, t, suffix = s.shape.element, s.prefix, s.suffix
    out = []
    for c in range(s.wide):
        out.append(f"  %{t}q{c} = getelementptr {element}, ptr %{t}p, i64 {c * s.lanes}")
        if _reads_part(s):
            out.append(
                f"  %{t}b{c} = call {s.vector} @llvm.masked.load.{suffix}.p0(ptr align {s.size}"
                f" %{t}q{c}, <{s.lanes} x i1> %mask{s.name}, {s.vector} zeroinitializer)"
            )
        else:
            out.append(f"  %{t}b{c} = load {s.vector}, ptr %{t}q{c}, align {s.size}")
    return out


def _multiply_add(s: _Stretch) -> list[str]:
    """An element of each row, repeated, times the panel's vectors."""
    element, t, vector = s.shape.element, s.prefix, s.vector
    align = 1 if s.shape.unit else s.size  # several integers may begin anywhere
    out = [f"  %{t}ak = mul i64 %{t}k, %a_col"]
    for r in range(s.rows):
        out += [
            f"  %{t}f{r} = getelementptr {element}, ptr %{t}a{r}, i64 %{t}ak",
            f"  %{t}x{r} = load {element}, ptr %{t}f{r}, align {align}",
            f"  %{t}i{r} = insertelement {vector} poison, {element} %{t}x{r}, i64 0",
            f"  %{t}v{r} = shufflevector {vector} %{t}i{r}, {vector} poison,"
            f" <{s.lanes} x i32> zeroinitializer",
        ]
        for c in range(s.wide):
            out += _multiply_vector(s, r, c)
    return out


def _multiply_vector(s: _Stretch, r: int, c: int) -> list[str]:
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
