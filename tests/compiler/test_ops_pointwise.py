"""Pointwise operations equal NumPy for every dtype, and refuse what they should."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from stagefuse.compiler import scalar
from stagefuse.compiler.graph import Map
from stagefuse.compiler.graph_builder import Builder
from stagefuse.compiler.ops import BUILTINS
from stagefuse.dsl.dims import const, sym
from stagefuse.dsl.dtypes import BOOL, DTYPES, F16, F32, I8, I32, I64, U8, DType
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.signature import OpError
from stagefuse.dsl.types import TensorType
from tests.compiler.ops_support import agree, reference, run, sample

POINTWISE = [op for op in BUILTINS.values() if op.pointwise and op.name not in (
    "cast", "access", "position")]  # fmt: skip
NUMPY: dict[str, Any] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "neg": np.negative,
    "abs": np.abs, "exp": np.exp, "log": np.log, "sqrt": np.sqrt, "tanh": np.tanh, "sin": np.sin,
    "rsqrt": lambda x: 1 / np.sqrt(x), "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "erf": np.vectorize(math.erf, otypes=[float]), "round": np.round, "maximum": np.maximum,
    "floordiv": np.floor_divide, "mod": np.mod, "clamp": np.clip, "isfinite": np.isfinite,
    "exp2": np.exp2, "log10": np.log10, "select": np.where, "sign": np.sign,
}  # fmt: skip


def accepted(name: str) -> list[DType]:
    """The dtypes for which the type rule gives a result."""
    found = []
    for dtype in DTYPES.values():
        try:
            BUILTINS[name].infer(types(name, dtype, ()), Facts())
        except OpError:
            continue
        found.append(dtype)
    return found


def types(name: str, dtype: DType, shape: tuple[int, ...]) -> dict[str, Any]:
    sizes = tuple(map(const, shape))
    return {p.name: TensorType(BOOL if p.name == "c" else dtype, sizes)
            for p in BUILTINS[name].params}  # fmt: skip


@pytest.mark.parametrize("op", POINTWISE, ids=lambda op: op.name)
def test_lowering_equals_the_reference_for_every_dtype(op) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(len(op.name))
    assert accepted(op.name)
    for dtype in accepted(op.name):
        for shape in ((), (1,), (0, 3), (7, 1, 13)):
            tensors = {p.name: sample(rng, shape, BOOL if p.name == "c" else dtype)
                       for p in op.params}  # fmt: skip
            (found,) = run(op.name, tensors)
            rel = {8: 0.3, 16: 0.02}.get(dtype.bits, 1e-6) if op.name == "log10" else 1e-12
            expected = reference(op.name, tensors)[0]
            if op.name == "log10":
                expected = scalar.round_to(expected, dtype)
            agree(found, expected, rel)
            if op.name in NUMPY and not dtype.is_int and rel < 1e-5:
                with np.errstate(all="ignore"):
                    wide = [scalar.wide(t) for t in tensors.values()]
                    agree(found, NUMPY[op.name](*wide), rel)
            (narrow,) = run(op.name, tensors, wide=False)
            if dtype.is_float and found.dtype.kind == "f":
                with np.errstate(all="ignore"):
                    once = scalar.round_to(found, dtype)
                    near = np.isclose(narrow, once, {8: 0.3, 16: 0.02}.get(dtype.bits, 1e-5), 1e-5,
                                      equal_nan=True)  # fmt: skip
                assert near.all(), (dtype, tensors, narrow, once)


@pytest.mark.parametrize("shapes", [((7, 1), (1, 5)), ((), (3,)), ((2, 3), (3,)), ((0, 1), (1, 4))])
def test_operands_broadcast_as_numpys_do(shapes: tuple[tuple[int, ...], ...]) -> None:
    rng = np.random.default_rng(1)
    a, b = (sample(rng, s, F32, False) for s in shapes)
    agree(run("add", {"a": a, "b": b})[0], a.astype(float) + b)
    c = rng.integers(0, 2, (1,)).astype(bool)
    agree(run("select", {"c": c, "a": a, "b": b})[0], np.where(c, a, b).astype(float))


def test_symbolic_sizes_broadcast_when_they_are_equal_for_all_values() -> None:
    a, b = np.ones((5, 7), np.float32), np.ones(7, np.float32)
    agree(run("mul", {"a": a, "b": b}, dims={"T": 7, "B": 5})[0], np.ones((5, 7)))


def test_integers_wrap_and_divide_by_zero_to_zero() -> None:
    a = np.array([100, -128, 7, -7], np.int8)
    b = np.array([100, -1, 0, 2], np.int8)
    assert run("add", {"a": a, "b": b})[0].tolist() == [-56, 127, 7, -5]
    assert run("floordiv", {"a": a, "b": b})[0].tolist() == [1, -128, 0, -4]
    assert run("mod", {"a": a, "b": b})[0].tolist() == [0, 0, 0, 1]
    assert run("abs", {"x": a})[0].tolist() == [100, -128, 7, 7]


def test_integer_powers_are_exact_and_wrap() -> None:
    a = np.array([3, -2, 0, 1, -1, 2, -1], np.int64)
    b = np.array([4, 3, 0, -5, -3, -1, -2], np.int64)
    assert run("pow", {"a": a, "b": b})[0].tolist() == [81, -8, 1, 1, -1, 0, 1]
    u = np.array([2, 255], np.uint8)
    assert run("pow", {"a": u, "b": np.array([8, 2], np.uint8)})[0].tolist() == [0, 1]


def test_a_float_to_a_half_is_no_root_of_minus_infinity_and_minus_0() -> None:
    """By one exponent or many: NumPy makes square roots of the former."""
    for b in (np.full((), 0.5, np.float32), np.full(3, 0.5, np.float32)):
        found = run("pow", {"a": np.array([-np.inf, -0.0, 9.0], np.float32), "b": b})[0]
        assert found.tolist() == [np.inf, 0.0, 3.0] and not np.signbit(found).any()


def test_shifts_beyond_the_width_leave_the_sign() -> None:
    a = np.array([1, -8, -8, 5], np.int32)
    n = np.array([31, 1, 40, -1], np.int32)
    assert run("shl", {"a": a, "b": n})[0].tolist() == [-(2**31), -16, 0, 0]
    assert run("shr", {"a": a, "b": n})[0].tolist() == [0, -4, -1, 0]


def test_small_literal_powers_are_products() -> None:
    b = Builder(Facts())
    type = TensorType(F32, (sym("N"),))
    x = b.input("x", type)
    (found,) = BUILTINS["pow"].lower(b, [x, b.scalar(2, F32)], {}, (type,))
    assert b.graph.nodes[found.node].primitive == Map("mul")
    (found,) = BUILTINS["pow"].lower(b, [x, b.scalar(0.5, F32)], {}, (type,))
    assert b.graph.nodes[found.node].primitive == Map("pow")


CASTS = {
    ("f32", "i8"): ([300.0, -300.0, math.nan, 1.9, -1.9], [127, -128, 0, 1, -1]),
    ("f32", "u8"): ([300.0, -1.0, math.inf, 254.9, -0.5], [255, 0, 255, 254, 0]),
    ("f64", "i64"): ([1e30, -1e30, 2.0**62, -0.0, math.nan],
                     [2**63 - 1, -(2**63), 2**62, 0, 0]),
    ("i32", "i8"): ([300, -129, 127, 255, 0], [44, 127, 127, -1, 0]),
    ("i64", "bool"): ([0, 1, -3, 256, 0], [False, True, True, True, False]),
    ("f32", "bool"): ([0.0, -0.0, math.nan, 0.5, 1.0], [False, False, True, True, True]),
    ("f32", "f8e4m3"): ([1e9, -math.inf, 17.0, 449.0, 0.01], [448, -448, 16, 448, 0.009765625]),
    ("f32", "f8e5m2"): ([1e9, -math.inf, 9.0, 1.125, 0.0], [57344, -57344, 8, 1, 0]),
    ("f64", "bf16"): ([1 + 2**-8, 1 + 2**-8 + 2**-40, 3e38, 1.0, 0.0],
                      [1, 1 + 2**-7, 3.0042e38, 1, 0]),
    ("f32", "f16"): ([65520.0, 65519.0, 1e-8, 2049.0, 0.1], [math.inf, 65504, 0, 2048, 0.09997559]),
    ("bool", "f32"): ([True, False, True, True, False], [1, 0, 1, 1, 0]),
}  # fmt: skip


@pytest.mark.parametrize("pair", CASTS, ids="-".join)
def test_conversions_saturate_wrap_and_round_once(pair: tuple[str, str]) -> None:
    values, expected = CASTS[pair]
    x = np.array(values, DTYPES[pair[0]].numpy)
    (found,) = run("cast", {"x": x}, {"dtype": DTYPES[pair[1]]})
    agree(found, np.array(expected, found.dtype), 1e-4)


@pytest.mark.parametrize("source", DTYPES.values(), ids=str)
def test_any_dtype_converts_to_any_other(source: DType) -> None:
    x = sample(np.random.default_rng(0), (11,), source)
    for target in DTYPES.values():
        (found,) = run("cast", {"x": x}, {"dtype": target})
        agree(found, reference("cast", {"x": x}, {"dtype": target})[0])
        if source.is_int or source.is_bool or target.bits >= source.bits > 8:
            if target.is_float and target.bits > 8:
                with np.errstate(all="ignore"):
                    agree(found, x.astype(target.numpy).astype(float))


def refusal(name: str, facts: Facts | None = None, **args: Any) -> OpError:
    with pytest.raises(OpError) as caught:
        BUILTINS[name].infer(args, facts or Facts())
    return caught.value


def test_shapes_that_may_differ_are_refused_with_the_reason() -> None:
    facts = Facts({"T": (1, 512)})
    a = TensorType(F32, (sym("B"), sym("T"), const(384)))
    b = TensorType(F32, (const(512), const(384)))
    error = refusal("add", facts, a=a, b=b)
    assert error.message == "these two shapes do not broadcast" and error.param == "b"
    assert error.notes[0] == (
        "dimension 1 is T on the left and 512 on the right; T is in 1..=512, so they differ for"
        " some sizes"
    )


def test_dtypes_do_not_convert_by_themselves() -> None:
    error = refusal("mul", a=TensorType(F32, ()), b=TensorType(I64, ()))
    assert "f32 and i64" in error.message and error.help == "convert one side, such as `f32(...)`"


def test_division_of_integers_suggests_both_fixes() -> None:
    error = refusal("div", a=TensorType(I32, ()), b=TensorType(I32, ()))
    assert error.help and "`//`" in error.help and "f32(" in error.help


def test_functions_refuse_other_dtypes_with_a_fix() -> None:
    assert refusal("exp", x=TensorType(I64, ())).help == "convert: `f32(x)`"
    assert refusal("add", a=TensorType(BOOL, ()), b=TensorType(BOOL, ())).help
    assert "x != 0" in str(refusal("and", a=TensorType(I8, ()), b=TensorType(I8, ())).help)
    assert "i64" in str(refusal("bitand", a=TensorType(F16, ()), b=TensorType(F16, ())).help)
    error = refusal("select", c=TensorType(U8, ()), a=TensorType(F32, ()), b=TensorType(F32, ()))
    assert error.param == "c"


@pytest.mark.parametrize(
    "name, numbers, expected",
    [
        ("add", (1, 2), 3), ("div", (1, 4), 0.25), ("div", (1, 0), None), ("floordiv", (-7, 2), -4),
        ("floordiv", (1, 0), 0), ("mod", (1, 0), 0), ("pow", (2, 10), 1024), ("pow", (2, -1), 0.5),
        ("sqrt", (16,), 4.0), ("neg", (1.5,), -1.5), ("lt", (1, 2.5), True),
        ("not", (True,), False),
        ("and", (True, False), False), ("shl", (1, 4), 16), ("shl", (1, 400), None),
        ("maximum", (1, 2), 2), ("round", (2.5,), 2.0), ("round", (3,), 3), ("exp2", (3,), 8.0),
        ("sum", (1,), None), ("clamp", (9, 0, 6), 6), ("pow", (-8.0, 0.5), None),
        ("log", (0.0,), -math.inf), ("bitand", (6, 3), 2), ("bitand", (True, False), False),
    ],
)  # fmt: skip
def test_literals_fold_as_python_computes(name: str, numbers: Any, expected: Any) -> None:
    found = BUILTINS[name].fold(*numbers)
    assert found == expected and type(found) is type(expected)


def test_the_result_of_a_comparison_is_bool() -> None:
    (type,) = BUILTINS["lt"].infer(types("lt", F32, (3,)), Facts())
    assert type == TensorType(BOOL, (const(3),))
    assert BUILTINS["maximum"].infer(types("maximum", I64, ()), Facts())[0].dtype == I64
