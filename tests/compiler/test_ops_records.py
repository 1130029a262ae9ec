"""Every record is complete, and its example is what its reference gives."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from stagefuse.compiler import operations_page
from stagefuse.compiler.ops import BUILTINS
from stagefuse.compiler.scalar import FUNCTIONS
from stagefuse.dsl.dtypes import DTYPES
from stagefuse.dsl.signature import REQUIRED

KINDS = {"tensor", "tensors", "int", "float", "bool", "str", "dtype", "axis", "dims", "ints",
         "pairs", "parts", "scalar", "size"}  # fmt: skip
DESIGN = """exp log log2 log1p expm1 sqrt rsqrt sin cos tan tanh sigmoid erf abs sign floor ceil
round trunc isnan isinf maximum minimum clamp select sum mean prod max min any all argmax argmin
var reshape transpose concat stack split broadcast_to pad flip cumsum sort topk iota zeros ones
full""".split()
OPERATORS = """add sub mul div floordiv mod pow matmul neg eq ne lt le gt ge and or not bitand
bitor bitxor invert shl shr cast input weight constant dim access position within
update""".split()


def test_every_builtin_and_operator_of_the_language_has_a_record() -> None:
    assert {n for n, op in BUILTINS.items() if op.user_callable} >= set(DESIGN)
    assert {n for n, op in BUILTINS.items() if not op.user_callable} == set(OPERATORS)


@pytest.mark.parametrize("name", BUILTINS)
def test_a_record_is_complete(name: str) -> None:
    op = BUILTINS[name]
    assert op.name == name and op.params and {p.kind for p in op.params} <= KINDS
    assert len(op.doc) > 10 and op.doc.endswith(".")
    assert callable(op.rule) and callable(op.lowering) and callable(op.reference)
    optional = [p.default is not REQUIRED for p in op.params]
    assert optional == sorted(optional), "required parameters come first"
    if op.scalar:
        assert op.scalar in FUNCTIONS and op.pointwise and op.ulp == FUNCTIONS[op.scalar].ulp


@pytest.mark.parametrize("name", BUILTINS)
def test_the_example_of_a_record_holds(name: str) -> None:
    call, value = BUILTINS[name].example
    scope = {n + "_" * (n in ("and", "or", "not")): op.reference for n, op in BUILTINS.items()}
    found = eval(call, {"__builtins__": {}}, {**scope, **DTYPES, "inf": math.inf})
    expected = eval(value, {"__builtins__": {}})
    if not isinstance(expected, tuple):
        found, expected = [found], [expected]
    for got, want in zip(found, expected, strict=True):
        assert np.asarray(got).tolist() == want


def test_the_reference_page_is_current_and_whole() -> None:
    path = Path(__file__).parents[2] / "docs" / "operations.md"
    page = path.read_text("utf-8")
    assert page == operations_page.page(), "python -m stagefuse.compiler.operations_page --write"
    written = [name for name in BUILTINS if name not in operations_page.INTERNAL]
    assert page.count("\n### ") == len(written)
    for op in (BUILTINS[name] for name in written):
        assert op.doc in page and f"### `{op.name}(" in page or not op.user_callable


@pytest.mark.parametrize("fn", FUNCTIONS.values(), ids=lambda fn: fn.name)
def test_the_properties_of_a_scalar_function_hold(fn) -> None:  # type: ignore[no-untyped-def]
    dtypes = [d for d in ("f64", "i64", "i8", "u8", "bool") if fn.takes(DTYPES[d])]
    assert dtypes and fn.doc and fn.flops >= 1 and fn.ulp >= 0
    for name in dtypes:
        dtype = DTYPES[name]
        rng = np.random.default_rng(7)
        a, b, c = (rng.integers(0, 2 if dtype.is_bool else 50, 99).astype(dtype.numpy)
                   for _ in range(3))  # fmt: skip
        if fn.commutative:
            np.testing.assert_array_equal(fn.meaning(a, b), fn.meaning(b, a))
        if fn.associative:
            left, right = fn.meaning(fn.meaning(a, b), c), fn.meaning(a, fn.meaning(b, c))
            np.testing.assert_array_equal(left, right)
        if fn.identity is not None and not (dtype.kind == "uint" and fn.identity == -1):
            np.testing.assert_array_equal(fn.meaning(a, np.asarray(fn.identity, a.dtype)), a)
        if fn.idempotent:
            once = fn.meaning(a) if fn.arity == 1 else fn.meaning(a, a)
            expected = fn.meaning(once) if fn.arity == 1 else a
            np.testing.assert_array_equal(once, expected)
