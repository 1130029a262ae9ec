"""Programs that are wrong: the code, the place and the words of each diagnostic."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from stagefuse.compiler.ops import BUILTINS
from stagefuse.dsl.check import check
from stagefuse.dsl.diagnostics import Diagnostic, render, render_all
from stagefuse.dsl.dtypes import F32, DType
from stagefuse.dsl.parser import parse
from stagefuse.dsl.source import Source
from stagefuse.dsl.weights import WeightsError

STD = Path(__file__).parents[2] / "dsl" / "std"
WEIGHTS: Mapping[str, tuple[DType, tuple[int, ...]]] = {
    "embeddings.word_embeddings.weight": (F32, (100, 384)),
    "embeddings.position_embeddings.weight": (F32, (512, 384)),
    "layer.0.weight": (F32, (384,)),
    "layer.1.weight": (F32, (384,)),
}


def headers(path: str) -> Mapping[str, tuple[DType, tuple[int, ...]]]:
    if path == "missing.npz":
        raise WeightsError("there is no file `missing.npz`")
    return WEIGHTS


def load(name: str) -> Source | None:
    path = STD / f"{name}.pipe"
    if not path.exists():
        return None
    return Source(f"std/{name}.pipe", path.read_text(), is_standard=True)


def errors(text: str, **options: object) -> list[Diagnostic]:
    source = Source("t.pipe", text)
    tree, problems = parse(source)
    assert not problems, render_all(problems)
    _, found = check(
        tree,
        source,
        builtins=BUILTINS,
        load_module=load,
        weights=headers,
        **options,  # type: ignore[arg-type]
    )
    return list(found)


def only(text: str) -> Diagnostic:
    found = errors(text)
    assert len(found) == 1, render_all(found)
    return found[0]


def body(lines: str, inputs: str = "x: f32[B, 4], ids: i64[N]") -> Diagnostic:
    return only(f"pipeline p({inputs}):\n    {lines}\n")


def test_the_example_of_the_design() -> None:
    text = (
        "import nn\n"
        'weights w = "minilm.safetensors"\n'
        "pipeline embed(ids: i64[B, T]) -> f32[B, T, 384]\n"
        "where B in 1..=256, T in 1..=512:\n"
        "    x = nn.embedding(ids, w.embeddings.word_embeddings)\n"
        "        + w.embeddings.position_embeddings.weight\n"
        "    x\n"
    )
    shown = render(only("\n" * 15 + text)).replace("t.pipe", "examples/minilm.pipe")
    assert (
        shown
        == """\
error[E0203]: these two shapes do not broadcast
  --> examples/minilm.pipe:20:9
   |
20 |     x = nn.embedding(ids, w.embeddings.word_embeddings)
   |         ----------------------------------------------- f32[B, T, 384]
21 |         + w.embeddings.position_embeddings.weight
   |           ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^ f32[512, 384]
   = note: dimension 1 is T on the left and 512 on the right; T is in 1..=512, so they differ \
for some sizes
   = help: take the first T rows: `w.embeddings.position_embeddings.weight[:T]`"""
    )


@pytest.mark.parametrize(
    ("line", "code", "place", "words", "advice"),
    [
        ("sqr(x)", "E0201", "sqr", "unknown name `sqr`", "`sqrt`"),
        ("x + Q", "E0201", "Q", "unknown name `Q`", ""),
        ("softmax(x)", "E0201", "softmax", "unknown name", "`nn.softmax`"),
        ("f32(ids) + ids", "E0202", "ids", "f32 and i64", "f32(ids)"),
        ("x + ids[0]", "E0202", "ids[0]", "f32 and i64", "`f32(ids[0])`"),
        ("x * B", "E0202", "B", "f32 and i64", "`f32(B)`"),
        ("u8(ids) + 300", "E0202", "300", "does not fit u8", ""),
        ("f16(x) * 65520", "E0202", "65520", "does not fit f16", "math.INF"),
        ("f8e4m3(x) + -1e3", "E0202", "-1e3", "does not fit f8e4m3", "-math.INF"),
        ("x * 1e39", "E0202", "1e39", "does not fit f32", "math.INF"),
        ("ids + 0.5", "E0202", "0.5", "not an integer", ""),
        ("x * True", "E0202", "True", "is a bool", ""),
        ("x + sum(x, axis=1)", "E0203", "sum(x, axis=1)", "do not broadcast", ""),
        ("x + y", "E0201", "y", "unknown name `y`", ""),
        ("np.exp(x)", "E0201", "np", "unknown name `np`", "built in"),
        ("float(ids)", "E0201", "float", "unknown name `float`", "`f32(x)`"),
        ("cat([x, x])", "E0201", "cat", "unknown name `cat`", "`concat("),
        ("atan(x)", "E0201", "atan", "unknown name", "`math.atan`, after `import math`"),
        ("arctan(x)", "E0201", "arctan", "unknown name", "`math.atan`, after `import math`"),
        ("clip(x, 0, 1)", "E0201", "clip", "unknown name", "`clamp(x, lo, hi)`"),
        ("x.masked_fill(x > 0, 0)", "E0220", "masked_fill", "no attribute", "`select("),
        ("x - [1, 2]", "E0204", "[1, 2]", "must be a tensor", "`stack([1, 2])`"),
        ("x[:, [0, 2]]", "E0216", "[0, 2]", "not an index", "`stack([0, 2])`"),
        ("x - split(x, 4, axis=1)", "E0204", "split(x, 4, axis=1)", "must be a tensor", ""),
        ("zeros([sum(ids)])", "E0208", "[sum(ids)]", "a list of sizes", ""),
        ("x + None", "E0204", "None", "must be a tensor", ""),
        ("x + \"a\"", "E0204", "\"a\"", "must be a tensor", ""),
        ("exp", "E0205", "exp", "the result of a pipeline", ""),
        ("exp()", "E0206", "exp()", "needs `x`", ""),
        ("exp(x, x)", "E0206", "x", "1 positional argument; 2 given", ""),
        ("sum(x, axs=1)", "E0206", "axs=1", "no parameter `axs`", "`axis=`"),
        ("ids / 2", "E0207", "ids / 2", "`/` on integers", "`ids // 2`"),
        ("B / 2", "E0207", "B / 2", "`/` on integers", "`B // 2`"),
        ("exp(ids)", "E0207", "ids", "takes floats", "`f32(ids)`"),
        ("1 / 0", "E0207", "0", "division by zero", "math.INF"),
        ("pad(x, [(0, -1)])", "E0207", "[(0, -1)]", "cannot take away", "x[1:]"),
        ("pad(x, [(B, B - 9)])", "E0207", "[(B, B - 9)]", "cannot take", "B - 9 >= 0"),
        ("reshape(x, [3, 5])", "E0207", "[3, 5]", "number of elements", ""),
        ("sum(x, dim=1)", "E0206", "dim=1", "no parameter `dim`", "`axis=`"),
        ("sum(x, keepdim=True)", "E0206", "keepdim=True", "no parameter", "`keepdims=`"),
        ("sum(x, axis=5)", "E0207", "5", "axis 5 is out of range", ""),
        ("concat(x)", "E0204", "x", "a list of tensors", "`[x]`"),
        ("concat(x, x)", "E0204", "x, x", "a list of tensors", "`concat([x, x], ...)`"),
        ("sum(x, axis=ids)", "E0208", "ids", "an axis", ""),
        ("x(3)", "E0204", "x", "cannot be called", ""),
        ("p(x, ids)", "E0211", "p(x, ids)", "`p` calls itself", ""),
        ("topk(x, 2) * x", "E0204", "topk(x, 2)", "must be a tensor", "`a, b = topk(x, 2)`"),
        ("x ^ 2", "E0207", "x", "`^` takes integers", "`x ** 2`"),
        ("x.relu()", "E0220", "relu", "no attribute", "`nn.relu`"),
        ("x.shape", "E0220", "shape", "no attribute `shape`", "f32[B, T]"),
        ("x[:, 4]", "E0216", "4", "index 4 is out of bounds", ""),
        ("x[:, -5]", "E0216", "-5", "index -5 is out of bounds", ""),
        ("x[B]", "E0216", "B", "index B is out of bounds", ""),
        ("x[0, 0, 0]", "E0216", "x[0, 0, 0]", "too many indices: 3 for 2 dimensions", ""),
        ("x[x > 0]", "E0216", "x > 0", "a tensor index holds integers", "select"),
        ("x[..., ...]", "E0216", "...", "`...` can stand once", ""),
        ("x[::0]", "E0216", "0", "the step of a slice", ""),
        ("x[0.5]", "E0216", "0.5", "not an index", ""),
        ("x[sum(x)]", "E0216", "sum(x)", "a tensor index holds integers", "i64(sum(x))"),
        ("y[b] = x[b]", "E0215", "x[b]", "1 index for 2 dimensions", ""),
        ("y[b, i] = x[b, i] + ids[i]", "E0215", "ids[i]", "`i` has two sizes", "in 0..min(4, N)"),
        ("y[b, i] = x[b, i - 1]", "E0215", "x[b, i - 1]", "does not start at 0", "`i in a..b`"),
        ("y[b, i in 0..5] = x[b, i]", "E0215", "x[b, i]", "leaves the bounds of `x`", ""),
        ("y[b, i, j] = x[b, i]", "E0215", "j", "the range of `j` cannot be found", "0..N"),
        ("y[b, i] = x[b, (i + 1) % 4]", "E0215", "i", "cannot be found", "in 0..4"),
        # no k has both at their ends, and no end of the sum is known
        ("y[b, i] = sum[k in 0..5] x[b, i + k // 3 + k % 3]", "E0215", "i", "not be found", ""),
        ("y[b, i] = sum[k in 0..2] x[b, i + k % 3]", "E0215", "i", "cannot be found", "0..4"),
        ("y[b, b] = x[b, b]", "E0215", "b", "named twice", ""),
        ("y[b, i] = x[b][i]", "E0215", "x[b]", "", "`x[i, j]`"),
        ("y[b, i] = sum(x[b, i])", "E0215", "sum(x[b, i])", "cannot be applied inside", ""),
        ("y[n] = ids[n] + ids", "E0215", "ids", "needs an index for each", ""),
        ("y[n] = sum[k in 0..n] ids[k]", "E0215", "0..n", "another index", ""),
        ("y[n] = ids[n, :]", "E0215", "ids[n, :]", "2 indices for 1 dimension", ""),
        ("full([2], x)", "E0207", "x", "one number", "`broadcast_to`"),
        ("full([2], N, 3)", "E0204", "3", "a dtype", ""),
        ("full(x, N)", "E0208", "x", "`shape` of `full`", ""),
        ("max = x", "E0210", "max", "built in", ""),
        ("f32 = x", "E0210", "f32", "built in", ""),
        ("a, b, c = x, x", "E0204", "a, b, c", "3 names need a tuple of 3", ""),
    ],
)  # fmt: skip
def test_one_wrong_line(line: str, code: str, place: str, words: str, advice: str) -> None:
    found = body(line)
    assert (found.code, found.primary.span.text) == (code, place), render(found)
    assert words in found.message
    assert advice in (found.help.text if found.help else "")


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("const exp = 1", "E0210", "`exp` is built in and cannot be redefined"),
        ("const A = 1\nconst A = 2", "E0210", "`A` is defined twice"),
        ("fn f16(x: f32[N]):\n    x\npipeline p(x: i8[B]) -> i8[B]:\n    f16(x)", "E0210", "f16"),
        ("fn sum(x: f32[N]):\n    x\npipeline p(x: i8[B]) -> i8[B]:\n    sum(x)", "E0210", "sum"),
        ("pipeline p(x: f32[B], class: f32[B]):\n    x + class", "E0210", "be called `class`"),
        ("pipeline p(x: f32[B], out: f32[B]):\n    x + out", "E0210", "be called `out`"),
        ("pipeline p(x: f32[B], at: f32):\n    x[at] = 1.0\n    x", "E0216", "holds integers"),
        ("pipeline p(x: f32[B], at: f32[C]):\n    x[at] = 1.0\n    x", "E0216", "holds integers"),
        ("pipeline p(x: f32[B]):\n    at = 0.5\n    x[at] = 1.0\n    x", "E0216", "not an index"),
        ("pipeline p(x: f32[B]):\n    at = no\n    x[at] = 1.0\n    x", "E0201", "name `no`"),
        ("const A = B\nconst B = A", "E0211", "defined by itself"),
        ("const A = zeros([3])", "E0208", "`A` must be a constant"),
        ("import nowhere", "E0213", "there is no module `nowhere`"),
        ('weights w = "missing.npz"', "E0214", "there is no file"),
        ("pipeline p(x: f32[B], x: f32[B]):\n    x", "E0210", "`x` is named twice"),
        ("fn f(x: f32[B], x: f32[B]):\n    x", "E0210", "`x` is named twice"),
        ("pipeline p(x: f32[B]) -> (a: f32[B], a: f32[B]):\n    x, x", "E0210", "named twice"),
        ("pipeline p(x: f32[B]) -> f32[Q]:\n    x", "E0219", "the size `Q` does not follow"),
        ("fn f(x: f32[B]) -> f32[*Q]:\n    x", "E0219", "the size `Q` does not follow"),
        ("pipeline p(x: f32[B]) where B >= 5, B <= 3:\n    x", "E0217", "no size is left"),
        ("pipeline p(x: f32[B, -1]):\n    x", "E0219", "the size -1 is negative"),
        (f"pipeline p(x: f32[{'1, ' * 33}]):\n    x", "E0207", "at most 32 dimensions"),
        ("pipeline p(n: int):\n    n", "E0219", "the inputs of a pipeline are tensors"),
        ("pipeline p(x: f32[*S]):\n    x", "E0219", "a fixed number of dimensions"),
        ("pipeline p(x: f32[2 * A * B]):\n    x", "E0219", "`A` does not follow"),
        ("pipeline p(x: float[3]):\n    x", "E0219", "unknown type `float`"),
        ("pipeline p(x: f32[n]):\n    x", "E0201", "unknown size `n`"),
        ("import nn\npipeline p(x: f32[nn]):\n    x", "E0219", "cannot be a dimension"),
        ("fn f[E: real](x: E[N]):\n    x", "E0219", "unknown class of dtypes `real`"),
        ("pipeline p(x: f32[B]) where C in 1..3:\n    x", "E0217", "no dimension"),
        ("pipeline p(x: f32[B]) where B in 3..3:\n    x", "E0217", "empty range"),
        ("pipeline p(x: f32[B]):\n    y = x", "E0218", "has no result"),
        ("pipeline p(x: f32[B]):\n    x + 1\n    x", "E0209", "nothing uses the value"),
        ("pipeline p(x: f32[B]) -> f32[B, 2]:\n    x", "E0205", "must be f32[B, 2]"),
        ("pipeline p(x: f32[B, C]) -> f32[C, B]:\n    x", "E0205", "must be f32[C, B]"),
        ("pipeline p(x: f32[B]) -> i64[B]:\n    x", "E0205", "must be i64[B]"),
        ("pipeline p(x: f32[B]) -> (a: f32[B], b: f32[B]):\n    x", "E0205", "2 results"),
        ("fn f(x: f32[N]):\n    f(x)", "E0211", "`f` calls itself"),
        ("fn f(x: f32[N]):\n    x + nope", "E0201", "unknown name `nope`"),
        ("fn f(x: f32[N], n: int):\n    x\npipeline p(x: f32[B], n: i64):\n    f(x, n)",
         "E0208", "an integer known while compiling"),
        ("fn f(x: f32[N], y: f32[N]):\n    x\npipeline p(x: f32[3], y: f32[5]):\n    f(x, y)",
         "E0205", "`y` of `f` must be f32[N]"),
        ("fn f(x: f32[N]):\n    x\npipeline p(x: f16[3]):\n    f(x)", "E0204", "must be f32[N]"),
        ("fn f[E: float](x: E[N]):\n    x\npipeline p(x: i8[3]):\n    f(x)", "E0204", "float"),
        ("fn f[E: any](x: E[N], y: E[N]):\n    x\npipeline p(x: i8[3], y: u8[3]):\n    f(x, y)",
         "E0202", "i8 and u8"),
        ("fn f(x: f32[N]) where N % 4 == 0:\n    x\npipeline p(x: f32[6]):\n    f(x)",
         "E0217", "`f` needs `N % 4 == 0`"),
        ("fn f(x: f32[2*N]):\n    x\npipeline p(x: f32[5]):\n    f(x)", "E0205", "f32[2*N]"),
        ("fn f(x: f32[N + 6]):\n    x\npipeline p(x: f32[5]):\n    f(x)", "E0205", "f32[N + 6]"),
        ("pipeline p(x: f32[B]):\n    if max(x) > 0:\n        x\n    else:\n        -x",
         "E0208", "known while compiling"),
        ("pipeline p(x: f32[B]):\n    for i in 0..B:\n        x = x + 1\n    x",
         "E0208", "not known while compiling"),
        ("pipeline p(x: f32[B]):\n    for i in 0..100000000:\n        x = x + 1\n    x",
         "E0208", "unrolls"),
        ("fn f(x: f32[N]) -> (f32[N]):\n    x, x\npipeline p(x: f32[B]):\n    f(x)",
         "E0205", "declares 1 result"),
        ("pipeline p(x: f32[B]):\n    for i in x:\n        y = i\n    x", "E0204", "a loop runs"),
        ("pipeline p(x: f32[B]):\n    x + 9 ** 9999", "E0207", "64 bits"),
        ("pipeline p(x: f32[99999999999999999999]):\n    x", "E0219", "does not fit 64 bits"),
        ("pipeline p(x: f32[B]):\n    sum = x\n    y = sum + sum(x)\n    y", "E0210", "`sum`"),
    ],
)  # fmt: skip
def test_one_wrong_program(text: str, code: str, words: str) -> None:
    found = only(text + "\n")
    assert found.code == code, render(found)
    assert words in found.message


@pytest.mark.parametrize(
    ("lines", "code", "help"),
    [
        ("x.sum()", "E0220", "write `sum(x)`"),
        ("x.T", "E0220", "write `transpose(x)`"),
        ("x.astype(f64)", "E0220", "the dtype as a function"),
        ("float64(x)", "E0201", "`f64`"),
        ("concat(x, x, axis=1)", "E0204", "write `concat([x, x], ...)`"),
    ],
)
def test_what_is_written_otherwise_in_other_languages(lines: str, code: str, help: str) -> None:
    found = body(lines)
    assert found.code == code and found.help is not None
    assert help in found.help.text


def test_a_chain_of_calls_has_an_end() -> None:
    text = "fn g0(x: f64[N]):\n    x\n"
    text += "".join(f"fn g{n}(x: f64[N]):\n    g{n - 1}(x)\n" for n in range(1, 64))
    found = errors(text)
    assert {d.code for d in found} == {"E0211"} and len(found) < 5
    assert "more than 60 deep" in found[0].message and found[0].help is not None


def test_dtypes_of_other_libraries() -> None:
    found = only("pipeline p(x: float32[B]):\n    x\n")
    assert found.help is not None and found.help.text == "the dtype is `f32`"


def test_a_program_of_too_many_statements_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stagefuse.dsl.check.modules.MAX_STEPS", 500)
    found = only(
        "pipeline p(x: f32[B]):\n    for i in 0..30:\n        for j in 0..30:\n"
        "            x = x + 1.0\n    x\npipeline q(x: f32[B]):\n    x + 1.0\n"
    )
    assert found.code == "E0208" and "unrolls to more than 500" in found.message


def test_functions_that_double_are_refused_before_they_are_unrolled() -> None:
    functions = ["fn g0(x: f32[N]) -> f32[N]:\n    x + 1.0\n"]
    functions += [
        f"fn g{i}(x: f32[N]) -> f32[N]:\n    g{i - 1}(g{i - 1}(x))\n" for i in range(1, 41)
    ]
    begin = time.process_time()
    found = only("".join(functions) + "pipeline p(x: f32[B]):\n    g40(x)\n")
    assert found.code == "E0208" and "unrolls to more than 100000" in found.message
    assert found.primary.span.text == "g40(x)"
    assert time.process_time() - begin < 5


def test_calls_that_may_not_be_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stagefuse.dsl.check.modules.MAX_STEPS", 20)
    doubled = "".join(
        f"fn g{i}(x: f32[N]) -> f32[N]:\n    g{i - 1}(g{i - 1}(x))\n" for i in range(1, 9)
    )
    assert not errors(
        "fn g0(x: f32[N]) -> f32[N]:\n    x + 1.0\n"
        + doubled
        + "fn some(x: f32[N], deep: bool) -> f32[N]:\n    if deep:\n        x = g8(x)\n"
        "    for i in 0..0:\n        x = g8(x)\n    x\n"
        "pipeline p(x: f32[B]):\n    g2(some(x, False))\n"
    )


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("w.layr", "E0214", "have no `layr`"),
        ("w.layer[2]", "E0214", "have no `2` at `layer`"),
        ("w.layer[0].weight.bias", "E0214", "have no `bias`"),
        ("w + 1", "E0204", "must be a tensor"),
        ("w.layer(x)", "E0204", "cannot be called"),
        ("w[0.5]", "E0214", "by a text or a number"),
        ("w", "E0205", "result"),
    ],
)
def test_wrong_weights(line: str, code: str, words: str) -> None:
    found = only(f'weights w = "a.npz"\npipeline p(x: f32[384]):\n    {line}\n')
    assert found.code == code, render(found)
    assert words in found.message


def test_an_override_that_nothing_names() -> None:
    text = 'weights w = "a.npz"\npipeline p(x: f32[384]):\n    x\n'
    (found,) = errors(text, overrides={"v": "b.npz"})
    assert found.code == "E0214" and "no weights `v`" in found.message


def test_all_independent_errors_in_order_and_nothing_that_follows() -> None:
    found = errors(
        "import nn\n"
        "const A = nope\n"
        "fn unused(x: f32[N]) -> f32[N]:\n"
        "    x + A + missing\n"
        "pipeline first(x: f32[B]) -> f32[B]:\n"
        "    y = x + undefined\n"
        "    z = y * 2 + y\n"
        "    for i in 0..3:\n"
        "        z = z + exp(i, i)\n"
        "    u[b] = z[b] + y[b]\n"
        "    u\n"
        "pipeline second(x: i64[B]) -> f32[B]:\n"
        "    nn.relu(x) / 2\n"
    )
    assert [(d.primary.span.line, d.primary.span.text) for d in found] == [
        (2, "nope"), (4, "missing"), (6, "undefined"), (9, "i"), (13, "nn.relu(x) / 2"),
    ]  # fmt: skip


def test_the_same_error_of_a_function_is_said_once_with_its_call() -> None:
    found = only(
        "fn f(x: f32[A], y: f32[B]) -> f32[A]:\n"
        "    x + y\n"
        "pipeline p(x: f32[3], y: f32[4]):\n"
        "    f(x, y) + f(x, y)\n"
    )
    assert found.primary.span.line == 2
    assert "in the call `f(x, y)` at t.pipe:4:5" in found.notes


def test_what_is_wrong_in_the_library_is_shown_at_the_call_of_it() -> None:
    found = errors(
        "import math\n"
        "fn long(x: f32[A, 3]):\n"
        "    math.norm(x, axis=2) + math.std(x, axis=3)\n"
        "pipeline p(x: f32[B, 3]):\n"
        "    long(x)\n"
    )
    calls = ["math.norm(x, axis=2)", "math.std(x, axis=3)"]
    assert [d.primary.span.text for d in found] == calls
    assert found[0].secondary[0].span.source.name == "std/math.pipe"
    assert found[0].notes[1:] == ("in the call `long(x)` at t.pipe:5:5",)


@pytest.mark.parametrize(
    ("lines", "code", "where", "words", "help"),
    [
        ("scan t in 0..4 with s = 0.0:\n        s = x[0] * s", "E0221", "s = x[0] * s",
         "`s` would change its type", "zeros([...], f32)"),
        ("scan t in 0..4 with s = 0:\n        s = 0.5", "E0202", "s = 0.5", "", ""),
        ("scan t in 0..4 with s = 0:\n        s = f32(s)", "E0221", "s = f32(s)",
         "`s` would change its type", "`f32(...)`"),
        ("scan t in 0..4 with s = 0.0:\n        r = s", "E0221", "s = 0.0",
         "never gets a next value", "s = ..."),
        ("scan t in 0..4 with s = 0.0, s = 1.0:\n        s = s", "E0221", "s", "twice", ""),
        ("scan t in 0..4 with s = ids:\n        s = s + 1\n        y[t] = s\n        y[t] = s",
         "E0221", "y", "gathered twice", ""),
        ("scan t in 0..4 with s = 0.0:\n        s = s + 1.0\n        y[2 * t] = s", "E0221",
         "2 * t", "every position of `y`", "`y[4 - 1 - t]`"),
        ("scan t in 1..4 with s = 0.0:\n        s = s + 1.0\n        y[t] = s", "E0221", "t",
         "every position of `y`", "`y[t - 1]`"),
        ("scan t in 0..4 with s = 0.0:\n        s = s + sum(x[:t])", "E0221", "x[:t]",
         "changes from step to step", "index notation"),
        ("scan t in 0..4 with s = 0.0:\n        s = s + f32(ids[t - 1])", "E0216", "t - 1",
         "index t - 1 is out of bounds", ""),
        ("scan t in 0..5 with s = 0.0:\n        s = s + x[0, t]", "E0216", "t",
         "index t is out of bounds", ""),
        ("scan t in 0..4 with s = 0.0:\n        s = s + f32(ids[t % N])", "E0221", "t % N",
         "may fail at some step", ""),
        ("scan t in 1..4 with s = 0.0:\n        s = s + sum(topk(ids, t)[0])", "E0207", "t",
         "`topk` needs t of N elements", ""),
        ("scan t in x with s = 0.0:\n        s = s + 1.0", "E0204", "x", "over a range", "0..N"),
        ("scan t in 0..4 with s = zeros([4], i64):\n        s[t % 2] = ids[t % N]", "E0221",
         "t % N", "may fail at some step", ""),
        ("scan t in 0..4 with s = zeros:\n        s = s", "E0204", "zeros", "carries tensors", ""),
        ("y[B - i] = x", "E0113", "B - i", "an index is a name", ""),
    ],
)  # fmt: skip
def test_recurrences(lines: str, code: str, where: str, words: str, help: str) -> None:
    found = body(lines + "\n    x")
    text = found.primary.span.source.text
    span = found.primary.span
    assert (found.code, text[span.start : span.end]) == (code, where)
    assert words in found.message
    assert help in (found.help.text if found.help else "")


def test_an_error_in_a_step_is_reported_once() -> None:
    found = only(
        "pipeline p(x: f32[T]) -> f32[T]:\n"
        "    scan t in 0..T with s = 0.0:\n        s = s + nothing\n        y[t] = s\n    y + s\n"
    )
    assert found.code == "E0201"


@pytest.mark.parametrize(
    ("line", "stated"),
    [
        ("x != concat([[0], x[: N - 1]])", "N in 1..=4096"),
        ("x[1 : N - 1] + x[: N - 2]", "N in 2..=4096"),
        ("y[i in 0..N] = sum[j in 0..3] x[(i + j + N - 1) % N]", "N in 1..=4096"),
        ("y[i in 0..5] = x[i]", "N in 5..=4096"),
        ("topk(reshape(x[:, None] * z, [N * M]), N)", "M in 1..=4096"),
        ("y[i in 0..N, j in 0..M] = x[(i + 1) % N] + z[j - j % 2]", "N in 1..=4096"),
    ],
)
def test_the_range_that_is_missing_is_proposed(line: str, stated: str) -> None:
    inputs = "x: i64[N], z: i64[M]"
    found = only(f"pipeline p({inputs}):\n    {line}\n")
    assert found.help is not None and found.help.text.endswith(f"such as `where {stated}`")
    assert not errors(f"pipeline p({inputs}) where {stated}:\n    {line}\n")


@pytest.mark.parametrize(
    ("line", "where", "note"),
    [
        ("y[i] = x[i + 2]", "", "where no size is 0 they differ"),
        ("y[i] = x[i + 2]", "\nwhere N in 1..=9", "N is in 1..=9"),
    ],
)
def test_a_length_that_is_less_for_all_sizes_is_wrong(line: str, where: str, note: str) -> None:
    found = only(f"pipeline p(x: f32[N]) -> f32[N]{where}:\n    {line}\n")
    assert (found.code, found.notes[-1]) == ("E0205", note), render(found)


@pytest.mark.parametrize("line", ["x[1:] - x[:-1]", "y[i] = x[i + 1] - x[i]", "x[:-1]"])
def test_a_result_that_is_right_for_empty_inputs_alone_is_wrong(line: str) -> None:
    found = only(f"pipeline p(x: f32[N]) -> f32[N]:\n    {line}\n")
    assert found.code == "E0205"
    assert found.notes[-1] == "where no size is 0 it must be N and is N - 1"
    assert not errors("pipeline p(x: f32[N]) -> f32[N]:\n    x[:9]\n")


def test_what_a_module_lacks_is_where_it_is() -> None:
    of = "import math\npipeline p(x: f32[N]):\n    "
    assert "help: it is built in: write `exp`" in render(only(of + "math.exp(x)\n"))
    assert "help: `nn` has it: `nn.relu`, after" in render(only(of + "math.relu(x)\n"))
