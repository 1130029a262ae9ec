"""What is written for names that other languages and libraries have."""


def _each(names: str, advice: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), advice)


OTHER_NAMES = {
    **_each("np numpy torch jnp jax tf F", "operations are built in: `exp(x)`; layers are in `nn`"),
    "range": "a range is written `0..n`",
    "print": "a pipeline has no effects: make the value one of its results",
    "dropout": "leave it out: pipelines compute, they are not trained",
    **_each("contiguous detach clone", "leave it out: values have no storage of their own"),
    **_each("size shape ndim", "name the size in the type: `x: f32[B, T]` makes `B` and `T` known"),
    **_each("rand randn random", "make random numbers an input: calls of a pipeline repeat"),
    **_each("nonzero unique", "no size depends on data: keep the shape, and mark what counts"),
    # from numbers
    **_each("tensor array asarray", "write `stack([1.0, 2.0])`, or give it as weights"),
    **_each("cast float int astype to type", "write the dtype as a function: `f32(x)`"),
    "arange": "write `iota(n)`",
    "linspace": "write `a + (b - a) * f32(iota(n)) / f32(n - 1)`",
    "empty": "write `zeros([...])`",
    "zeros_like": "write `zeros([...])` with the sizes of the type",
    "ones_like": "write `ones([...])` with the sizes of the type",
    "full_like": "write `full([...], value)` with the sizes of the type",
    "eye": "write `y[i in 0..N, j in 0..N] = f32(i == j)`",
    # element by element
    **_each("pow power", "write `a ** b`"),
    **_each("add", "write `a + b`"),
    **_each("sub subtract", "write `a - b`"),
    **_each("mul multiply", "write `a * b`"),
    **_each("div divide true_divide", "write `a / b`"),
    "floor_divide": "write `a // b`",
    **_each("mod remainder", "write `a % b`"),
    **_each("neg negative", "write `-x`"),
    **_each("eq equal", "write `a == b`"),
    **_each("ne not_equal", "write `a != b`"),
    **_each("lt less", "write `a < b`"),
    **_each("le less_equal", "write `a <= b`"),
    **_each("gt greater", "write `a > b`"),
    **_each("ge greater_equal", "write `a >= b`"),
    **_each("logical_and bitwise_and", "write `a & b`"),
    **_each("logical_or bitwise_or", "write `a | b`"),
    **_each("logical_xor bitwise_xor", "write `a ^ b`"),
    **_each("logical_not bitwise_not", "write `~x`"),
    "clip": "write `clamp(x, lo, hi)`",
    "clamp_min": "write `maximum(x, lo)`",
    "clamp_max": "write `minimum(x, hi)`",
    "masked_fill": "write `select(mask, value, x)`",
    **_each("tril triu", "compare positions: `select(iota(N)[:, None] >= iota(M), x, 0)`"),
    "swish": "`nn` has it: `nn.silu`, after `import nn`",
    **{
        f"arc{name}": f"`math` has it: `math.a{name}`, after `import math`"
        for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh")
    },
    # products and sums
    **_each("matmul mm bmm", "write `a @ b`"),
    **_each("einsum tensordot", "write index notation: `y[i, j] = sum[k] a[i, k] * b[k, j]`"),
    "cdist": "`math` has it: `math.distances`, after `import math`",
    "median": "sort and take the middle: `sort(x)[..., N // 2]`",
    "diff": "write `x[1:] - x[:-1]`",
    **_each("diag diagonal trace", "write index notation: `y[i] = x[i, i]`, `sum[i] x[i, i]`"),
    # positions
    "argsort": "`topk(x, k)` gives the positions of the k greatest too",
    **_each("gather take", "write `x[ids]`"),
    **_each("take_along_axis take_along_dim", "write index notation: `y[b, k] = x[b, at[b, k]]`"),
    "index_select": "write `x[:, ids]`",
    "one_hot": "compare: `ids[:, None] == iota(n)`",
    "index_add": "write `scatter_add(base, indices, updates)`",
    **_each("bincount histc", "write `scatter_add(zeros([n], i64), ids, ones([N], i64))`"),
    "interpolate": "`image` has `resize_bilinear` and `resize_nearest`",
    # shapes
    "squeeze": "write `x[:, 0]` or `reshape(x, [...])`",
    **_each("unsqueeze expand_dims", "write `x[:, None]`"),
    **_each("flatten ravel", "write `reshape(x, [-1])`, or `reshape(x, [B, -1])`"),
    "view": "write `reshape(x, [...])`",
    **_each("permute swapaxes moveaxis", "write `transpose(x, [...])`"),
    **_each("cat concatenate hstack vstack", "write `concat([a, b], axis=0)`"),
    "chunk": "write `split(x, n, axis=-1)`",
    "expand": "write `broadcast_to(x, [...])`",
    **_each("repeat tile", "write index notation: `y[i in 0..3 * N] = x[i % N]`"),
    "repeat_interleave": "write index notation: `y[i in 0..3 * N] = x[i // 3]`",
    "roll": "write `concat([x[-n:], x[:-n]])`",
}

OTHER_PARAMETERS = {"dim": "axis", "dims": "axis", "input": "x", "correction": "ddof"}
"""Of calls: what a parameter is called here, where there is one of that name."""
