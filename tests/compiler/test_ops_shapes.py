"""Reductions, views, products, gathers, scans and sorts equal NumPy on odd shapes."""

from __future__ import annotations

import itertools
import zlib
from typing import Any

import numpy as np
import pytest

from stagefuse.compiler import scalar
from stagefuse.compiler.graph import Gather, Indirect, Map, Reduce, Sort, View
from stagefuse.compiler.graph_builder import Builder
from stagefuse.compiler.interpret import OutOfRange, evaluate
from stagefuse.compiler.ops import BUILTINS
from stagefuse.dsl.dims import const, floordiv, sym
from stagefuse.dsl.dtypes import BOOL, DTYPES, F16, F32, I8, I32, I64, U8, DType
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.signature import OpError
from stagefuse.dsl.types import TensorType
from tests.compiler.ops_support import agree, reference, run, sample

SHAPES = [(1,), (7,), (0,), (5, 3), (0, 3), (2, 0, 3), (3, 1, 13), (2, 3, 5, 7)]
FLOAT_TOLERANCE = 1e-6
REDUCTIONS = ("sum", "prod", "mean", "max", "min", "any", "all", "argmax", "argmin", "var")


def rng_of(*key: object) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


def refusal(name: str, facts: Facts | None = None, **args: Any) -> OpError:
    defaults = {p.name: p.default for p in BUILTINS[name].params}
    with pytest.raises(OpError) as caught:
        BUILTINS[name].infer({**defaults, **args}, facts or Facts())
    return caught.value


# Reductions


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_equal_the_reference(name: str, dtype: DType) -> None:
    if (name in ("any", "all")) != dtype.is_bool and (name in ("any", "all") or name == "var"):
        assert refusal(name, x=TensorType(dtype, (const(3),))).param == "x"
        return
    rng = rng_of(name, dtype)
    for shape, keepdims in itertools.product(SHAPES, (False, True)):
        rank = len(shape)
        for axis in (None, 0, -1, tuple(range(rank))[1:], (-1, 0) if rank > 1 else (0,), ()):
            x = sample(rng, shape, dtype, special=name not in ("prod", "var"))
            static = {"axis": axis, "keepdims": keepdims}
            axes = range(rank) if axis is None else [axis] if isinstance(axis, int) else axis
            if name.startswith("arg") and any(shape[a] == 0 for a in axes):
                assert "empty" in refusal(name, x=TensorType(dtype, tuple(map(const, shape))),
                                          **static).message  # fmt: skip
                continue
            expected = reference(name, {"x": x}, static)[0]
            rounds = name in ("mean", "var")
            if dtype.bits == 8 and dtype.is_float and name in ("mean", "var", "max", "min"):
                expected = scalar.round_to(expected, dtype)
            # means and variances are cast from f32, so compare accordingly
            rel = {8: 0.3, 16: 0.02}.get(dtype.bits, 1e-5) if rounds else 1e-12
            agree(run(name, {"x": x}, static)[0], expected, rel, 0.01 if rounds else 1e-12)


def test_reductions_equal_numpys_own() -> None:
    x = rng_of(1).standard_normal((3, 5, 7)).astype(np.float32)
    wide = x.astype(float)
    for name, fn in (("sum", np.sum), ("prod", np.prod), ("max", np.max), ("min", np.min)):
        for axis in (None, 1, (0, 2), (-1,)):
            agree(run(name, {"x": x}, {"axis": axis})[0], fn(wide, axis=axis))
    agree(run("mean", {"x": x}, {"axis": 1})[0], wide.mean(1), FLOAT_TOLERANCE)
    agree(run("var", {"x": x}, {"axis": (1, 2)})[0], wide.var((1, 2)), FLOAT_TOLERANCE)
    agree(run("var", {"x": x}, {"axis": 0, "ddof": 1})[0], wide.var(0, ddof=1), FLOAT_TOLERANCE)
    agree(run("argmax", {"x": x}, {"axis": 2})[0], wide.argmax(2))
    agree(run("argmin", {"x": x})[0], wide.argmin())


def test_means_over_symbolic_sizes_divide_by_the_size() -> None:
    x = np.arange(35, dtype=np.float32).reshape(5, 7)
    agree(run("mean", {"x": x}, {"axis": -1}, dims={"T": 7})[0], x.mean(-1).astype(float))
    agree(run("var", {"x": x}, dims={"T": 7, "B": 5})[0], np.float64(x.var()), FLOAT_TOLERANCE)


def test_sums_of_narrow_integers_and_bools_are_i64() -> None:
    assert run("sum", {"x": np.full(300, 100, np.int8)})[0] == 30000
    assert run("prod", {"x": np.full(5, 100, np.uint8)})[0] == 10**10
    found = run("sum", {"x": np.ones(7, bool)})[0]
    assert found == 7 and found.dtype == np.int64
    assert run("mean", {"x": np.array([1, 2], np.int8)})[0] == 1.5


def test_means_of_integers_of_64_bits_do_not_wrap() -> None:
    for dtype in (np.int64, np.uint64):
        x = np.full(8, np.iinfo(dtype).max - 7, dtype)
        agree(run("mean", {"x": x})[0], x.astype(float).mean(), 2.0**-23)
        agree(run("var", {"x": x})[0], 0.0)


def test_means_of_f16_do_not_overflow() -> None:
    x = np.full(1000, 1000, np.float16)
    assert run("mean", {"x": x}, wide=False)[0] == 1000
    assert run("var", {"x": np.array([300, -300], np.float16)}, wide=False)[0] == np.inf


def test_extremes_of_nothing_are_the_ends_of_the_dtype() -> None:
    def empty(name: str, dtype: DType) -> Any:
        return run(name, {"x": np.zeros((0,), dtype.numpy)})[0].item()

    assert (empty("max", F32), empty("min", F32)) == (-np.inf, np.inf)
    assert (empty("max", I8), empty("min", U8)) == (-128, 255)
    assert (empty("max", BOOL), empty("min", BOOL)) == (False, True)


def test_positions_in_axes_that_may_be_empty_are_checked_at_the_call() -> None:
    x, facts = TensorType(F32, (sym("B"), sym("T"))), Facts({"T": (1, 9)})
    checks = BUILTINS["argmax"].checks
    assert checks({"x": x, "axis": 1}, facts) == []
    ((expr, relation, message),) = checks({"x": x, "axis": None}, facts)
    assert (expr, relation) == (sym("B") - 1, ">=0") and "empty" in message


def test_nan_wins_extremes_and_their_positions() -> None:
    x = np.array([1, np.nan, 3, np.nan], np.float32)
    assert np.isnan(run("max", {"x": x})[0]) and np.isnan(run("min", {"x": x})[0])
    assert run("argmax", {"x": x})[0] == 1 == run("argmin", {"x": x})[0]


def test_wrong_axes_are_refused() -> None:
    x = TensorType(F32, (sym("B"), sym("T")))
    assert refusal("sum", x=x, axis=2).param == "axis"
    assert refusal("max", x=x, axis=(0, -2)).message.startswith("an axis is given twice")
    assert "bools" in refusal("any", x=x).message


# Views


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_views_equal_numpy(dtype: DType) -> None:
    rng = rng_of(dtype)
    for shape in SHAPES:
        x = sample(rng, shape, dtype)
        rank = len(shape)
        cases: list[tuple[str, dict[str, Any]]] = [
            ("reshape", {"shape": (-1,) if 0 not in shape else (0,)}),
            ("reshape", {"shape": (1, *reversed(shape), 1)}),
            ("transpose", {"perm": None}),
            ("transpose", {"perm": tuple((n + 1) % rank - rank for n in range(rank))}),
            ("flip", {"axis": None}), ("flip", {"axis": -1}),
            ("flip", {"axis": tuple(range(rank))[::2]}),
            ("broadcast_to", {"shape": (2, *(4 if d == 1 else d for d in shape))}),
            ("pad", {"widths": ((1, 2),), "value": 3}),
            ("pad", {"widths": tuple((n, 0) for n in range(rank))}),
            ("split", {"sections": 1, "axis": -1}),
            ("split", {"sections": (0, shape[0] // 2), "axis": 0}),
        ]  # fmt: skip
        for name, static in cases:
            if dtype.is_bool and static.get("value"):
                static["value"] = True
            found, expected = (f(name, {"x": x}, static) for f in (run, reference))
            for a, b in zip(found, expected, strict=True):
                agree(a, b)
                np.testing.assert_array_equal(np.signbit(a), np.signbit(b))


def test_tensors_join_along_old_and_new_axes() -> None:
    rng = rng_of(2)
    for axis in (0, 1, -1):
        parts = []
        for size in (1, 0, 7):
            shape = [3, 5]
            shape[axis] = size
            parts.append(sample(rng, shape, F16))
        agree(run("concat", {"xs": parts}, {"axis": axis})[0],
              np.concatenate(parts, axis).astype(float))  # fmt: skip
        same = [sample(rng, (3, 2), I32) for _ in range(3)]
        agree(run("stack", {"xs": same}, {"axis": axis})[0], np.stack(same, axis))
    parts = [np.ones((2, 7), np.float32), np.zeros((5, 7), np.float32)]
    agree(run("concat", {"xs": parts}, {"axis": 0}, dims={"T": 7, "B": 5})[0],
          np.concatenate(parts).astype(float))  # fmt: skip


def test_reshape_finds_the_symbolic_size_that_is_left() -> None:
    b, t, h = sym("B"), sym("T"), const(12)
    x = TensorType(F32, (b, t, const(384)))
    infer = BUILTINS["reshape"].infer
    assert infer({"x": x, "shape": (b, t, h, const(-1))}, Facts())[0].shape[3] == const(32)
    assert infer({"x": x, "shape": (b, const(-1))}, Facts())[0].shape[1] == t * 384
    assert infer({"x": x, "shape": (-1,)}, Facts())[0].shape == (b * t * 384,)
    facts = Facts(divisible=((sym("D"), 12),))
    wide = TensorType(F32, (t, sym("D")))
    found = infer({"x": wide, "shape": (t, 12, floordiv(sym("D"), 12))}, facts)
    assert found[0].rank == 3
    assert refusal("reshape", x=wide, shape=(t, 12, -1)).param == "shape"
    assert "number of elements" in refusal("reshape", x=x, shape=(t, const(384))).message
    assert refusal("reshape", x=x, shape=(-1, -1)).param == "shape"


def test_reshapes_of_sizes_that_may_be_0_divide_by_none_of_them() -> None:
    t, n = sym("T"), sym("N")
    for own, new in (
        ((n, t, const(12)), (n, t, const(3), const(4))),
        ((n, t, const(3), const(4)), (n, t, const(12))),
        ((n, const(1), t), (n, t)), ((n, t), (const(1), n, const(1), t)), ((n, t), (n * t,)),
    ):  # fmt: skip
        b = Builder(Facts())
        x = b.input("x", TensorType(F32, own))
        (found,) = BUILTINS["reshape"].lower(b, [x], {}, (TensorType(F32, new),))
        view = b.graph.nodes[found.node].primitive
        assert isinstance(view, View)
        if new != (n * t,):
            assert "T" not in "".join(map(str, view.indices))


def test_symbolic_reshapes_and_pads_keep_the_elements() -> None:
    x = np.arange(5 * 7 * 6, dtype=np.float32).reshape(5, 7, 6)
    dims = {"B": 5, "T": 7}
    found = run("reshape", {"x": x}, {"shape": (sym("B"), sym("T"), 2, 3)}, dims)[0]
    agree(found, x.reshape(5, 7, 2, 3).astype(float))
    found = run("reshape", {"x": x}, {"shape": (sym("T") * 6, -1)}, dims)[0]
    agree(found, x.reshape(42, 5).astype(float))
    found = run("pad", {"x": x}, {"widths": ((1, 1), (0, 2), (0, 0)), "value": 1.5}, dims)[0]
    agree(found, np.pad(x, [(1, 1), (0, 2), (0, 0)], constant_values=1.5).astype(float))


@pytest.mark.parametrize(
    "name, args",
    [
        ("transpose", {"perm": (0, 0)}), ("transpose", {"perm": (0,)}), ("flip", {"axis": 5}),
        ("broadcast_to", {"shape": (sym("N"),)}), ("broadcast_to", {"shape": (3, sym("M"))}),
        ("pad", {"widths": ((-1, 0),)}), ("pad", {"widths": ((1, 1),) * 3}),
        ("split", {"sections": 2}), ("split", {"sections": 0}), ("split", {"sections": (5, 3)}),
        ("pad", {"widths": ((1, 0),), "value": 0.5, "x": TensorType(I64, (sym("N"),))}),
    ],
)  # fmt: skip
def test_views_refuse_what_does_not_fit(name: str, args: dict[str, Any]) -> None:
    x = TensorType(F32, (sym("N"), sym("M")))
    error = refusal(name, **{"x": x, **args})
    assert error.message and (error.param in {p.name for p in BUILTINS[name].params})


def test_joining_needs_equal_shapes_and_dtypes() -> None:
    a, b = TensorType(F32, (sym("N"), const(3))), TensorType(F32, (sym("N"), const(4)))
    assert "dimension 1" in refusal("concat", xs=[a, b]).notes[0]
    assert refusal("concat", xs=[]).param == "xs"
    assert "one dtype" in refusal("stack", xs=[a, a.with_dtype(F16)]).message


# Products


@pytest.mark.parametrize(
    "left, right",
    [((3, 5), (5, 7)), ((5,), (5, 7)), ((3, 5), (5,)), ((5,), (5,)), ((2, 3, 5), (5, 7)),
     ((2, 1, 3, 5), (4, 5, 1)), ((1, 3, 5), (6, 5, 7)), ((3, 0), (0, 7)), ((0, 5), (5, 7)),
     ((1, 1), (1, 1)), ((4, 2, 5), (5,)), ((5,), (4, 5, 2))],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [d for d in DTYPES.values() if not d.is_bool], ids=str)
def test_matrix_products_equal_numpys(left: Any, right: Any, dtype: DType) -> None:
    rng = rng_of(left, right)
    a, b = (sample(rng, shape, dtype, special=False) for shape in (left, right))
    (found,) = run("matmul", {"a": a, "b": b})
    agree(found, reference("matmul", {"a": a, "b": b})[0], 1e-10)
    if dtype.is_int and dtype.bits == 8:
        assert found.dtype == np.int32


def test_a_product_is_two_views_a_product_and_a_sum() -> None:
    b = Builder(Facts())
    types = TensorType(F32, (sym("B"), sym("T"), const(8))), TensorType(F32, (const(8), const(5)))
    refs = [b.input(n, t) for n, t in zip("xw", types, strict=True)]
    result = BUILTINS["matmul"].infer(dict(zip("ab", types, strict=True)), Facts())
    (found,) = BUILTINS["matmul"].lower(b, refs, {}, result)
    total = b.graph.nodes[found.node]
    assert isinstance(total.primitive, Reduce) and total.primitive.kind == "sum"
    product = b.graph.nodes[total.operands[0].node]
    assert product.primitive == Map("mul")
    assert all(isinstance(b.graph.nodes[r.node].primitive, View) for r in product.operands)


def test_products_refuse_sizes_that_differ_and_suggest_a_transpose() -> None:
    a, b = TensorType(F32, (sym("T"), const(8))), TensorType(F32, (const(5), const(8)))
    error = refusal("matmul", a=a, b=b)
    assert error.help == "transpose the right side: `transpose(b, [1, 0])`"
    assert refusal("matmul", a=TensorType(F32, ()), b=b).param == "a"
    assert refusal("matmul", a=a.with_dtype(BOOL), b=b.with_dtype(BOOL)).param == "a"


# Access


def access(x: Any, ids: list[Any], shape: Any, symbols: Any, indices: Any) -> Any:
    static = {"shape": tuple(map(const, shape)), "symbols": symbols, "indices": indices}
    return run("access", {"x": x, "ids": ids}, static)[0]


def test_accesses_are_views_where_positions_are_known() -> None:
    x = np.arange(35, dtype=np.float32).reshape(5, 7)
    i, j = sym("i"), sym("j")
    agree(access(x, [], (3, 5), ("i", "j"), (j, i * 2 + 1)), x.T[1::2].astype(float))
    agree(access(x, [], (7, 2), ("i", "j"), (const(4), i)),
          np.repeat(x[4][:, None], 2, 1).astype(float))  # fmt: skip
    agree(access(x, [], (5,), ("i",), (4 - i, i)), x[::-1].diagonal().astype(float))
    agree(access(x, [], (35,), ("i",), (floordiv(i, 7), i - floordiv(i, 7) * 7)),
          x.ravel().astype(float))  # fmt: skip


def test_gathers_count_negative_ids_from_the_end() -> None:
    x = np.arange(35, dtype=np.int64).reshape(5, 7)
    ids = np.array([[0, -1, 3], [4, 2, -5]])
    a, b, d = sym("a"), sym("b"), sym("d")
    found = access(x, [ids], (2, 3, 7), ("a", "b", "d"), (("tensor", 1, (a, b)), d))
    agree(found, x[ids])
    narrow = access(
        x,
        [ids.astype(np.int8)],
        (2, 3),
        ("a", "b"),
        (("tensor", 1, (a, b)), ("tensor", 1, (a, b), const(-1), const(1))),
    )
    agree(narrow, x[ids, 1 - ids])


def test_ids_out_of_range_are_reported_with_value_and_extent() -> None:
    x, ids = np.zeros((5, 7)), np.array([1, 5, 0])
    with pytest.raises(OutOfRange) as caught:
        access(x, [ids], (3, 7), ("i", "d"), (("tensor", 1, (sym("i"),)), sym("d")))
    assert (caught.value.value, caught.value.extent) == (5, 5)
    assert isinstance(caught.value, IndexError) and isinstance(caught.value.node.primitive, Gather)
    empty = access(x[:, :0], [ids], (3, 0), ("i", "d"), (("tensor", 1, (sym("i"),)), sym("d")))
    assert empty.shape == (3, 0)


def test_user_symbols_may_be_named_as_the_canonical_ones() -> None:
    x = np.arange(6.0).reshape(2, 3)
    agree(access(x, [], (3, 2), ("i1", "i0"), (sym("i0"), sym("i1"))), x.T)


@pytest.mark.parametrize("dtype", [F32, I64, U8], ids=str)
@pytest.mark.parametrize("name, fn", [("scatter_add", np.add), ("scatter_max", np.maximum)])
def test_scatters_combine_repeated_positions(name: str, fn: Any, dtype: DType) -> None:
    rng = rng_of(name, dtype)
    for shape, axis, count in (((5,), 0, 9), ((5, 3), 0, 0), ((2, 5, 3), 1, 7), ((3, 5), -1, 4)):
        base = sample(rng, shape, dtype, False)
        ids = rng.integers(-5, 5, count)
        want = list(shape)
        want[axis] = count
        updates = sample(rng, want, dtype, False)
        expected = np.moveaxis(scalar.wide(base).copy(), axis, 0)
        fn.at(expected, ids, np.moveaxis(scalar.wide(updates), axis, 0))
        tensors = {"base": base, "indices": ids, "updates": updates}
        found = run(name, tensors, {"axis": axis})[0]
        expected = np.moveaxis(expected, 0, axis)
        agree(found, expected.astype(found.dtype), 1e-6)
        agree(found, reference(name, tensors, {"axis": axis})[0])


def test_scatters_check_their_positions_and_shapes() -> None:
    tensors = {"base": np.zeros(3), "indices": np.array([3]), "updates": np.ones(1)}
    with pytest.raises(OutOfRange):
        run("scatter_add", tensors)
    base, ids = TensorType(F32, (sym("N"), const(3))), TensorType(I64, (sym("K"),))
    error = refusal("scatter_add", base=base, indices=ids, updates=TensorType(F32, (sym("K"),)))
    assert error.message == "`scatter_add` needs updates of shape f32[K, 3]"


# Scans and sorts


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_scans_and_sorts_equal_numpy(dtype: DType) -> None:
    rng = rng_of(dtype)
    for shape in SHAPES:
        for axis in (0, -1):
            x = sample(rng, shape, dtype)
            for name, static in (
                ("cumsum", {"axis": axis}), ("cumsum", {"axis": None}),
                ("cumprod", {"axis": axis}), ("sort", {"axis": axis}),
                ("sort", {"axis": axis, "descending": True}),
                ("topk", {"k": shape[axis] // 2, "axis": axis}),
                ("topk", {"k": shape[axis], "axis": axis}),
            ):  # fmt: skip
                found, expected = (f(name, {"x": x}, static) for f in (run, reference))
                for a, b in zip(found, expected, strict=True):
                    agree(a, b)
            wide = x.astype(float) if dtype.is_float else x
            agree(run("sort", {"x": x}, {"axis": axis})[0], np.sort(wide, axis))


def test_topk_prefers_the_first_of_equal_elements_and_nan() -> None:
    x = np.array([1, 3, np.nan, 3, 2], np.float32)
    values, places = run("topk", {"x": x}, {"k": 4})
    assert places.tolist() == [2, 1, 3, 4] and np.isnan(values[0])
    assert refusal("topk", x=TensorType(F32, (sym("N"),)), k=5, axis=-1).help
    facts = Facts({"N": (5, None)})
    x_type = TensorType(F32, (sym("N"),))
    both = BUILTINS["topk"].infer({"x": x_type, "k": 5, "axis": -1}, facts)
    assert [t.dtype for t in both] == [F32, I64]


def test_a_sort_with_its_places_is_one_node() -> None:
    b = Builder(Facts())
    type = TensorType(F32, (const(9),))
    results = BUILTINS["topk"].infer({"x": type, "k": 3, "axis": 0}, Facts())
    BUILTINS["topk"].lower(b, [b.input("x", type)], {"k": const(3), "axis": 0}, results)
    assert sum(isinstance(n.primitive, Sort) for n in b.graph.nodes.values()) == 1


# Creation, and the interpreter itself


def test_created_tensors_have_the_dtype_that_is_asked_for() -> None:
    agree(run("full", {}, {"shape": (2, 3), "value": 0.1, "dtype": F32})[0],
          np.full((2, 3), np.float32(0.1), float))  # fmt: skip
    assert run("full", {}, {"shape": (2,), "value": 7})[0].dtype == np.int64
    assert run("full", {}, {"shape": (2,), "value": True})[0].dtype == bool
    assert run("zeros", {}, {"shape": (0, 3)})[0].shape == (0, 3)
    assert run("ones", {}, {"shape": (), "dtype": I8})[0] == 1
    assert run("iota", {}, {"n": sym("N")}, dims={"N": 4})[0].tolist() == [0, 1, 2, 3]
    assert refusal("full", shape=(2,), value=0.5, dtype=I64).param == "value"
    assert refusal("zeros", shape=(-2,)).param == "shape"


def test_positions_and_sizes_are_i64() -> None:
    static = {"expr": sym("i") * 2 + sym("N"), "symbols": ("i", "j"), "shape": (3, 2)}
    found = run("position", {}, static, dims={"N": 5})[0]
    assert found.tolist() == [[5, 5], [7, 7], [9, 9]]
    assert run("dim", {}, {"expr": sym("N") + 1}, dims={"N": 5})[0] == 6
    assert run("dim", {}, {"expr": const(4)})[0] == 4


def test_sums_of_products_do_not_build_the_product() -> None:
    n = 300
    b = Builder(Facts())
    type = TensorType(F32, (const(n), const(n)))
    a = b.input("a", type)
    (found,) = BUILTINS["matmul"].lower(b, [a, a], {}, (type,))
    b.graph.results = (found,)
    x = np.random.default_rng(0).standard_normal((n, n)).astype(np.float32)
    agree(evaluate(b.graph, {"a": x}, {})[0], x.astype(float) @ x, 1e-9)


def test_rounding_each_operation_differs_from_wide_values() -> None:
    b = Builder(Facts())
    x = b.input("x", TensorType(F16, ()))
    b.graph.results = (b.map("sub", b.map("add", x, b.scalar(2048, F16)), b.scalar(2048, F16)),)
    one = np.float16(1.0)
    assert evaluate(b.graph, {"x": one}, {})[0] == 1.0
    assert evaluate(b.graph, {"x": one}, {}, wide=False)[0] == 0.0


def test_indirect_defaults_are_the_plain_value() -> None:
    assert Indirect(1, (sym("i0"),)).scale == const(1)
