"""The kernels of Triton that `benchmarks.sass` puts ours beside, as its tutorials write them."""

# mypy: ignore-errors
import triton
import triton.language as tl


@triton.jit
def gelu(x, r, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = at < n
    v = tl.load(x + at, mask=keep).to(tl.float32) * 1.5 + 0.5
    inner = 0.7978845608028654 * (v + 0.044715 * v * v * v)
    tanh = 1.0 - 2.0 / (tl.exp(2.0 * inner) + 1.0)
    found = 0.5 * v * (1.0 + tanh) + tl.load(r + at, mask=keep).to(tl.float32)
    tl.store(y + at, found.to(tl.bfloat16), mask=keep)


@triton.jit
def softmax(x, y, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    v = tl.load(x + at).to(tl.float32)
    e = tl.exp(v - tl.max(v, axis=0))
    tl.store(y + at, (e / tl.sum(e, axis=0)).to(y.dtype.element_ty))


@triton.jit
def rms_norm(x, g, y, N: tl.constexpr):
    column = tl.arange(0, N)
    at = tl.program_id(0) * N + column
    v = tl.load(x + at).to(tl.float32)
    scale = tl.rsqrt(tl.sum(v * v, axis=0) / N + 1e-6)
    found = v * scale * tl.load(g + column).to(tl.float32)
    tl.store(y + at, found.to(y.dtype.element_ty))


@triton.jit
def layer_norm(x, g, b, y, N: tl.constexpr):
    column = tl.arange(0, N)
    at = tl.program_id(0) * N + column
    v = tl.load(x + at).to(tl.float32)
    c = v - tl.sum(v, axis=0) / N
    scale = tl.rsqrt(tl.sum(c * c, axis=0) / N + 1e-5)
    tl.store(y + at, c * scale * tl.load(g + column) + tl.load(b + column))


@triton.jit
def masked_softmax(x, m, y, N: tl.constexpr):
    column = tl.arange(0, N)
    at = tl.program_id(0) * N + column
    keep = tl.load(m + column) != 0
    v = tl.where(keep, tl.load(x + at).to(tl.float32), float("-inf"))
    e = tl.where(keep, tl.exp(v - tl.max(v, axis=0)), 0.0)
    tl.store(y + at, (e / tl.sum(e, axis=0)).to(y.dtype.element_ty))


@triton.jit
def cross_entropy(x, label, y, N: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(x + row * N + column, mask=column < N, other=float("-inf")).to(tl.float32)
    most = tl.max(v, axis=0)
    total = most + tl.log(tl.sum(tl.exp(v - most), axis=0))
    tl.store(y + row, total - tl.load(x + row * N + tl.load(label + row)).to(tl.float32))


@triton.jit
def swiglu(x, y, N: tl.constexpr):
    column = tl.arange(0, N)
    at = tl.program_id(0) * 2 * N + column
    a, b = tl.load(x + at).to(tl.float32), tl.load(x + N + at).to(tl.float32)
    found = a / (1.0 + tl.exp(-a)) * b
    tl.store(y + tl.program_id(0) * N + column, found.to(y.dtype.element_ty))


@triton.jit
def quantise(x, q, s, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    v = tl.load(x + at).to(tl.float32)
    scale = tl.max(tl.abs(v), axis=0) / 127.0 + 1e-6
    tl.store(q + at, tl.extra.libdevice.rint(v / scale).to(tl.int8))
    tl.store(s + tl.program_id(0), scale)


@triton.jit
def dequantise(q, s, y, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    found = tl.load(q + at).to(tl.float32) * tl.load(s + tl.program_id(0))
    tl.store(y + at, found.to(y.dtype.element_ty))


@triton.jit
def matmul(a, b, c, m, N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
           BK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    left = a + row[:, None] * K + k[None, :]
    right = b + k[:, None] * N + column[None, :]
    total = tl.zeros((BM, BN), tl.float32)
    for _ in range(0, K, BK):
        x = tl.load(left, mask=row[:, None] < m, other=0.0)
        total = tl.dot(x, tl.load(right), total)
        left += BK
        right += BK * N
    place = c + row[:, None] * N + column[None, :]
    tl.store(place, total.to(tl.bfloat16), mask=row[:, None] < m)


@triton.jit
def attend(q, k, v, o, rows, keys, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    head = tl.program_id(1)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    feature = tl.arange(0, D)
    at = head * rows * D + row[:, None] * D + feature[None, :]
    query = tl.load(q + at, mask=row[:, None] < rows, other=0.0)
    most = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    sums = tl.zeros([BM, D], tl.float32)
    scale: tl.constexpr = 0.08838834764831845 * 1.44269504
    for begin in range(0, keys, BN):
        key = begin + tl.arange(0, BN)
        near = head * keys * D + key[:, None] * D + feature[None, :]
        there = key[:, None] < keys
        scores = tl.dot(query, tl.trans(tl.load(k + near, mask=there, other=0.0))) * scale
        scores = tl.where(key[None, :] < keys, scores, float("-inf"))
        after = tl.maximum(most, tl.max(scores, axis=1))
        weights = tl.exp2(scores - after[:, None])
        factor = tl.exp2(most - after)
        total = total * factor + tl.sum(weights, axis=1)
        sums = sums * factor[:, None]
        sums = tl.dot(weights.to(tl.bfloat16), tl.load(v + near, mask=there, other=0.0), sums)
        most = after
    tl.store(o + at, (sums / total[:, None]).to(tl.bfloat16), mask=row[:, None] < rows)
