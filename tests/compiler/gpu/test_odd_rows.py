"""Products of 16-bit operands whose rows do not begin at multiples of 16 bytes: each operand that
is not in order is stored so once, in 16 bits, and tensor cores multiply 16 bits."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from .gpu_run import Emulated, check_legal, compiled, launches, of_parts

DTYPES = {"f16": (np.dtype(np.float16), 2.0**-11), "bf16": (np.dtype(ml_dtypes.bfloat16), 2.0**-8)}
FORMS = {
    "odd depth": ("x: T[M, 77], w: T[77, 40]", "x @ w", "M, 40", 2),
    "odd columns": ("x: T[M, 72], w: T[72, 51]", "x @ w", "M, 51", 1),
    "along the depth": ("x: T[M, 77], w: T[51, 77]", "x @ transpose(w, [1, 0])", "M, 51", 2),
    "no size is known": ("x: T[M, K], w: T[K, N]", "x @ w", "M, N", 2),
    "a batch, turned": (
        "x: T[2, 77, M], w: T[2, 77, 56]", "transpose(x, [0, 2, 1]) @ w", "2, M, 56", 1),
}  # fmt: skip
"""Inputs, the product, the shape of the result, and how many operands are out of order."""
SIZES = {"K": 77, "N": 51}


CASES = [
    *((f, ("f16", "bf16")[n % 2], ("sm_80", "sm_89")[n // 2 % 2]) for n, f in enumerate(FORMS)),
    *((form, ("bf16", "f16")[n % 2], "sm_90a") for n, form in enumerate(FORMS)),
]


@pytest.mark.parametrize(("form", "dtype", "arch"), CASES)
def test_operands_out_of_order_are_stored_once(
    form: str, dtype: str, arch: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    inputs, product, shape, copies = FORMS[form]
    text = f"""pipeline p({inputs.replace("T[", f"{dtype}[")}) -> {dtype}[{shape}]
where M in 1..=4096, N in 1..=4096, K in 1..=4096:
    {product}
"""
    names = [n for n in "KN" if f"{n}]" in inputs or f"{n}," in inputs]
    for name in {"K", "N"} - set(names):
        text = text.replace(f", {name} in 1..=4096", "")
    plan = compiled(tmp_path / "p.pipe", text, (arch,))
    check_legal(plan)
    listed = launches(plan)
    buffers = plan.pipelines[0].gpu[0].buffers
    for launch in listed[:copies]:
        assert {buffers[n].dtype for n in launch.buffers} == {dtype}
    sums = of_parts(listed)[1]
    for launch in [x for x in listed[copies:] if x not in sums]:
        entry = plan.ptx[arch].split(f"{launch.kernel}(")[1].split(".entry")[0]
        assert f"f32.{dtype}.{dtype}" in entry and "tf32" not in entry
    stored, unit = DTYPES[dtype]
    for rows in (1, 131):
        sizes = {"M": rows, **{n: SIZES[n] for n in names}}
        given = {}
        for part in inputs.split("], "):
            name, extents = part.rstrip("]").split(": T[")
            axes = [int(e) if e.isdigit() else sizes[e] for e in extents.split(", ")]
            given[name] = rng.standard_normal(axes).astype(stored)
        (found,) = Emulated(plan, arch)(given, sizes)
        x, w = (given[n].astype(np.float64) for n in "xw")
        x = x.swapaxes(-1, -2) if "turned" in form else x
        w = w.T if "along" in form else w
        wanted, total = x @ w, abs(x) @ abs(w)
        # 80 roundings of sums in f32, one of the result to 16 bits
        lost = 80 * 2.0**-24 * total + unit * abs(wanted) + 2.0**-24
        assert (abs(found.astype(np.float64) - wanted) <= lost).all()


def test_weights_are_stored_in_order_while_compiling(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    from stagefuse.compiler.driver import compile_file

    source = tmp_path / "p.pipe"
    source.write_text(
        'weights w = "w.npz"\n\npipeline p(x: f16[M, 520]) -> f16[M, 51]:\n    x @ w.w\n'
    )
    w = rng.standard_normal((520, 51)).astype(np.float16)
    plan = compile_file(source, weights={"w": {"w": w}}, targets=("sm_90a",), levels=())
    assert not any("tf32" in text for text in plan.ptx.values())
    assert sum(a.nbytes for a in plan.arrays.values()) == w.nbytes
    x = rng.standard_normal((70, 520)).astype(np.float16)
    (found,) = Emulated(plan)({"x": x}, {"M": 70})
    wanted, total = x.astype(float) @ w.astype(float), abs(x.astype(float)) @ abs(w.astype(float))
    lost = 520 * 2.0**-24 * total + 2.0**-11 * abs(wanted) + 2.0**-24
    assert (abs(found.astype(float) - wanted) <= lost).all()
