"""What is written for names that other languages and libraries have."""

_BUILT_IN = "operations are built in, as `exp(x)`; layers are in `nn`"
OTHER_NAMES = {
    **dict.fromkeys(("np", "numpy", "torch", "jnp", "jax", "tf", "F"), _BUILT_IN),
    "range": "a range is written `0..n`",
    "arange": "write `iota(n)`",
    **dict.fromkeys(("cast", "float", "int"), "write the dtype as a function: `f32(x)`"),
    "pow": "write `a ** b`",
    "matmul": "write `a @ b`",
    "einsum": "write index notation: `y[i, j] = sum[k] a[i, k] * b[k, j]`",
    "argsort": "`topk(x, k)` gives the positions of the k greatest too",
    "gather": "write `x[ids]`",
    "take": "write `x[ids]`",
    "squeeze": "write `x[:, 0]` or `reshape(x, [...])`",
    "unsqueeze": "write `x[:, None]`",
    "expand_dims": "write `x[:, None]`",
    "permute": "write `transpose(x, [...])`",
    "cat": "write `concat([a, b], axis=0)`",
    "concatenate": "write `concat([a, b], axis=0)`",
    "expand": "write `broadcast_to(x, [...])`",
    "zeros_like": "write `zeros([...])` with the sizes of the type",
    "ones_like": "write `ones([...])` with the sizes of the type",
    "full_like": "write `full([...], value)` with the sizes of the type",
    "print": "a pipeline has no effects: make the value one of its results",
    "dropout": "leave it out: pipelines compute, they are not trained",
}
