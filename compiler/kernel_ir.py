"""Kernel IR: one kernel as loops, scalar values, loads and stores; what every backend prints.

Values are pure and hash-consed by value: equal values are equal objects, and a backend computes
each once per scope. Index values are i64. 16- and 8-bit floats are converted to f32 by loads and
rounded by stores. Statements run in order; the outermost `parallel` indices run in any order.
"""

from __future__ import annotations

from dataclasses import field
from functools import cached_property
from typing import ClassVar, TypeAlias

from stagefuse.dsl.dims import Expr, const, floordiv, mod
from stagefuse.dsl.dtypes import I64, DType
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.frozen import frozen


@frozen
class Const:
    """A number of a compute dtype."""

    value: float | int | bool
    dtype: DType


@frozen
class Index:
    """The i64 value of an expression over loop indices and dimensions."""

    expr: Expr

    @property
    def dtype(self) -> DType:
        return I64


@frozen
class Load:
    """An element of a buffer, in its compute dtype; `fill` unless every guard (bool) holds.

    Indices are in bounds wherever the guards hold. Nothing is read where they do not.
    """

    buffer: str
    indices: tuple[Value, ...]
    stored: DType
    guard: tuple[Value, ...] = ()
    fill: float | int | bool = 0

    @property
    def dtype(self) -> DType:
        return self.stored.compute

    @cached_property
    def _hash(self) -> int:
        return hash((self.buffer, self.indices, self.guard))

    def __hash__(self) -> int:
        return self._hash


@frozen
class Op:
    """A scalar function of `compiler.scalar`; `cast` converts to `dtype`, `round_to` rounds.

    `round_to` (argument and result f32) rounds to the storage dtype `to` and back. The result of
    another need be no more exact than `to`, where there is one.
    """

    fn: str
    args: tuple[Value, ...]
    dtype: DType
    to: DType | None = None

    @cached_property
    def _hash(self) -> int:
        return hash((self.fn, self.args, self.dtype, self.to))

    def __hash__(self) -> int:
        return self._hash


@frozen
class Local:
    """A scalar bound by Let or Fold."""

    name: str
    dtype: DType


@frozen
class Checked:
    """A position read from data: negative counts from the end of `extent`.

    One from which fewer than `length` positions follow is noted in the status (site + 1 and the
    value, the first wins) and becomes 0. One that is `proved` to be in 0..extent needs none of it.
    """

    value: Value
    extent: Expr
    site: int
    proved: bool = False
    length: Expr = const(1)

    @property
    def dtype(self) -> DType:
        return I64


Value: TypeAlias = Const | Index | Load | Op | Local | Checked


@frozen
class Let:
    """Binds a scalar for the statements after it in this block."""

    FORM: ClassVar[str] = "let {name} = {value}"
    name: str
    value: Value


@frozen
class Store:
    """Writes one element, rounded to the buffer's dtype.

    With `by`, add or max, it combines the element, of i32, i64 or u32, with the value; other steps
    may do so at the same time, in any order. For GPUs only.
    """

    FORM: ClassVar[str] = "store {buffer}{indices:places} = {value}[[ by {by}]]"
    buffer: str
    indices: tuple[Value, ...]
    value: Value
    by: str = ""


@frozen
class For:
    """index from lo while below hi. `vector` promises that iterations are independent."""

    FORM: ClassVar[str] = "for {index} in {lo}..{hi}[[ {vector:flag}]]"
    index: str
    lo: Expr
    hi: Expr
    body: tuple[Statement, ...]
    vector: bool = False


@frozen
class Fold:
    """Binds `name` to the reduction of `value` over the nest of `loops` (index, extent).

    kind is sum, prod, max, min, any, all, argmax or argmin; the arg forms bind the row-major
    position (i64) of the first extreme; NaN counts as the extreme. Nothing gives the identity:
    0, 1, lowest, highest, false, true. A sum or product may be reassociated. `dtype` is the
    accumulator's.
    """

    FORM: ClassVar[str] = "fold {name} = {kind} over {loops} : {dtype} of {value}"
    name: str
    kind: str
    loops: tuple[tuple[str, Expr], ...]
    value: Value
    dtype: DType


@frozen
class Alloc:
    """Scratch of this thread until the kernel ends, row-major, 64-byte aligned."""

    FORM: ClassVar[str] = "alloc {name} : {dtype}{shape}"
    name: str
    dtype: DType
    shape: tuple[Expr, ...]


@frozen
class If:
    """Runs the body where the condition (bool) holds."""

    FORM: ClassVar[str] = "if {condition}"
    condition: Value
    body: tuple[Statement, ...]


@frozen
class TileProduct:
    """The matmul micro-kernel: dst[r, c] (=|+=) sum over k of a[r, k] * panel[k, c].

    r < `rows` (at most `mr`, which may be many register tiles: the backend cuts it into tiles that
    fit its registers, the last one partial), c < `nr` (48: three AVX-512 vectors, or 2 x 3 AVX2
    ones in two passes), k < `depth`. Offsets are in elements from the start of
    each buffer. `a`: row stride `a_row`, column stride `a_col`. `panel`: [depth][nr] contiguous,
    64-byte aligned at its offset. `dst`: row stride `dst_row`, whole rows of nr are written.
    Of the columns only the first `width` are wanted, if given; the others may stay as they are.
    A panel that lies elsewhere in steps has `panel_row` and `panel_col`, its strides along k and
    along c; only its first `width` columns are there. The CPU takes steps of 1 along one of them,
    and also a `panel_place` instead: where row k begins, an expression over `k` and dimensions; all
    nr columns are there.
    An `a` that is no matrix has `a_indices` instead: where its element of row `i` and depth `k` is
    in the buffer, one for each axis; it is 0 unless every `a_guard` is at least 0. Each is a part
    that depends on i plus one that depends on k. For GPUs only.
    All three buffers have the same dtype, f32 or f64; backends for GPUs also take f16 and bf16
    operands of an f32 `dst`.
    The names `chosen` in `a_indices` and in `panel_offset` stand for `positions` from data, each a
    `Checked` of `i64`; those of `a_indices` may depend on i. For GPUs only.
    A panel that no memory holds has an `element` instead, an f32 value in which `k` and `c` are
    the indices of its row and column; it is rounded to the dtype of `a`. For GPUs only.
    """

    dst: str
    dst_offset: Expr
    dst_row: Expr
    a: str
    a_offset: Expr
    a_row: Expr
    a_col: Expr
    panel: str
    panel_offset: Expr
    rows: Expr
    depth: Expr
    mr: int
    nr: int
    accumulate: bool = False
    width: Expr | None = None
    panel_row: Expr | None = None
    panel_col: Expr | None = None
    panel_place: Expr | None = None
    a_indices: tuple[Expr, ...] = ()
    a_guard: tuple[Expr, ...] = ()
    element: Value | None = None
    k: str = ""
    c: str = ""
    chosen: tuple[str, ...] = ()
    positions: tuple[Value, ...] = ()


@frozen
class Operand:
    """A matrix in a buffer: its element (i, j) lies at offset + i * along + j * across. Where it
    is cut into panels of so many columns, j is the column in its panel, and the panels lie `step`
    apart. Where its rows come in runs of so many, i is the number of the run, and the rows of one
    lie `step` apart."""

    buffer: str
    offset: Expr
    along: Expr
    across: Expr
    panel: int = 0
    step: Expr = field(default_factory=lambda: const(0))
    run: int = 0

    def place(self, i: Expr, j: Expr, facts: Facts | None = None) -> Expr:
        """Where an element lies."""
        start = self.offset + i * self.along
        if self.run:
            run, inside = floordiv(i, self.run, facts), mod(i, self.run, facts)
            start = self.offset + run * self.along + inside * self.step
        if not self.panel:
            return start + j * self.across
        inside = mod(j, self.panel, facts) * self.across
        return start + floordiv(j, self.panel, facts) * self.step + inside


COMPUTED = Operand("computed", const(0), const(0), const(1))
"""Stands for what no buffer holds."""


@frozen
class Attend:
    """Rows weighted by the exponentials of scores, none of which are stored (softmax).

    raw(r, j) = sum over k of queries[r, k] * keys[k, j]
    weight(r, j) = exp(score(r, j) - max over kept j of score(r, j)), 0 where not `keep`(r, j)
    dst[r, c] = sum over j of weight(r, j) * values[j, c], totals[r] = sum over j of weight(r, j)

    r < `rows` (at most `mr`), k < `depth`, c < `columns`, `lo` <= j < `hi`; if no j is kept, all
    is 0. `score` (f32) and `keep` (bool) are values in which `row` and `key` are the indices r and
    j, and `raw` is a bound f32. Values of keys that are not kept do not count; an infinite one
    gives NaN where operands have 16 bits, as 0 times it does in the graph. If all scores of a row
    are -infinity, the total is NaN where `keep` is always true, and else 0. `dst` is scratch in
    rows of `dst_row` elements, `totals` scratch, both f32; the operands are f32, f16 or bf16. For
    GPUs only.

    With `most`, scratch as `totals` is, the keys are dealt out in so many `ways`, each key to one
    of them. Way w has rows w * mr + r of the results, over its keys alone, and most[w * mr + r] is
    their greatest kept score, -infinity if there is none; then the total is 0. `lo` is a multiple
    of 64 and of the panels, or no key below it is kept.

    `extent`: how many keys there are, `hi` at most; not given where none needs to know.

    Keys or values for which an element (f32) is given are computed: it is a value in which
    `feature` is the index k or c, and `key` j. Their operand is `COMPUTED` then.
    """

    dst: str
    dst_row: Expr
    totals: str
    queries: Operand
    keys: Operand
    values: Operand
    rows: Expr
    mr: int
    lo: Expr
    hi: Expr
    depth: int
    columns: int
    row: str
    key: str
    raw: str
    score: Value
    keep: Value
    most: str = ""
    ways: int = 1
    extent: Expr | None = None
    feature: str = ""
    key_element: Value | None = None
    value_element: Value | None = None


@frozen
class SortRow:
    """Sorts `count` scratch elements of `keys` in place, stably, and `order` (i64) with them.

    NaN goes last, as NumPy's ascending sort puts it; first if descending. `order` is written
    with 0, 1, ... before sorting by this statement. Where only the `first` few are wanted, what
    lies behind them may be anything.
    """

    keys: str
    order: str
    count: Expr
    descending: bool
    first: Expr | None = None


@frozen
class SortDigit:
    """Sorts `count` scratch elements of `keys` in place, stably, by eight bits of each, and `order`
    (u32), if given, with them.

    The bits are those from `shift` on of a key's number in the order of its dtype: its own bits, of
    a signed one with the sign turned; of a float those of its magnitude below or above 0.0, which
    -0.0 is too, and all ones for NaN. If descending, of that number's complement. Sorting by all
    digits, the lowest first, sorts as `SortRow` does.

    `digits` (u8), if given, are the digits of the elements as sorted, and `before` (u32, 257) says
    how many elements have lower digits than each, and than none. For GPUs only.
    """

    keys: str
    order: str
    count: Expr
    shift: Expr
    descending: bool
    digits: str = ""
    before: str = ""


@frozen
class ForEqual:
    """index from `first` (i64) on, in order, for as long as `buffer` holds the same as there.

    The buffer holds `count` elements of u32 along one axis. What the body begins with, as far as it
    reads nothing that the kernel writes, may be computed for so many indices `ahead`. For GPUs.
    """

    FORM: ClassVar[str] = "equal {index} in {count} from {first} of {buffer} ahead {ahead}"
    index: str
    buffer: str
    count: Expr
    first: Value
    ahead: int
    body: tuple[Statement, ...]


Statement: TypeAlias = (
    Let | Store | For | Fold | Alloc | If | TileProduct | Attend | SortRow | SortDigit | ForEqual
)


@frozen
class Buffer:
    """A parameter of a kernel: contiguous, row-major; `mode` is in, out or inout."""

    FORM: ClassVar[str] = "buffer {name} : {mode} {dtype}{shape}"
    name: str
    dtype: DType
    shape: tuple[Expr, ...]
    mode: str


@frozen
class Kernel:
    """A kernel: its buffers and dimensions in ABI order, and the body of one parallel step.

    The parallel indices (name, extent) run row-major as one flattened range. One that is `guarded`
    does nothing where a kernel before it has noted a position in the status.
    """

    name: str
    buffers: tuple[Buffer, ...]
    dims: tuple[str, ...]
    parallel: tuple[tuple[str, Expr], ...]
    body: tuple[Statement, ...]
    label: str = field(default="", compare=False)
    guarded: bool = False
