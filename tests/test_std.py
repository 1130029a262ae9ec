"""Every function of the standard library against NumPy."""

import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import stagefuse as sf

from .std_meanings import (
    ANGLES,
    ATTEND,
    BATCH,
    FAR,
    FLAT,
    FLAT_C,
    IMAGE,
    KEEP,
    LAYER,
    LENGTHS,
    MASK,
    PIXELS,
    POWERS,
    SMALL,
    STATE,
    STD,
    STEPS,
    UNIT,
    Case,
    K,
    Q,
    V,
    X,
    attend,
    bilinear,
    boxes_averaged,
    boxes_largest,
    conv1d,
    conv2d,
    convolved_at,
    erf,
    gru,
    layer,
    layer_normed,
    layered,
    lstm,
    masked_softmax,
    multiplied_at,
    normal,
    pointwise,
    pooled,
    power_near,
    recurrence,
    requantized,
    rnn,
    rope,
    rotated,
    sigmoid,
    softmax,
    wide,
)

CODES = np.array([[-128, 127, 0, 3, -1, 64, 9], [1, 2, -3, 5, 7, -11, 13]] * 2, np.int8)[:3]
STORED = {"l.q": CODES[0], "l.scale": np.float32(0.125), "l.zero": np.int8(3)}
CASES = [
    pointwise("relu", lambda x: np.maximum(x, 0)),
    pointwise("leaky_relu", lambda x: np.where(x > 0, x, 0.1 * x), ", slope=0.1"),
    pointwise("gelu", lambda x: 0.5 * x * (1 + erf(x / np.sqrt(2)))),
    pointwise("gelu_tanh", lambda x: 0.5 * x * (
        1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))),
    pointwise("silu", lambda x: x / (1 + np.exp(-x))),
    pointwise("softplus", lambda x: np.log1p(np.exp(x))),
    pointwise("elu", lambda x: np.where(x > 0, x, np.expm1(x))),
    pointwise("hard_sigmoid", lambda x: np.clip(x / 6 + 0.5, 0, 1)),
    pointwise("hard_swish", lambda x: x * np.clip(x / 6 + 0.5, 0, 1)),
    pointwise("softmax", softmax),
    pointwise("softmax", lambda x: softmax(x, 0), ", axis=0"),
    pointwise("log_softmax", lambda x: np.log(softmax(x))),
    pointwise("l2_normalize", lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)),
    Case("nn.glu", "x: f32[B, 14]", "nn.glu(x)",
         lambda x: x[:, :7] / (1 + np.exp(-x[:, 7:])), {"x": normal(3, 14)}),
    Case("nn.masked_softmax", "x: f32[B, T], m: bool[B, T]", "nn.masked_softmax(x, m)",
         lambda x, m: masked_softmax(x, m), {"x": X, "m": MASK}),
    Case("nn.masked_softmax", "x: f32[B, T], m: bool[B, T]", "nn.masked_softmax(x, m)",
         lambda x, m: masked_softmax(x, m), {"x": X - np.float32(1e38), "m": MASK}),
    Case("nn.layer_norm", "x: f32[B, 7]", "nn.layer_norm(x, w.l)",
         lambda x: layer_normed(x) * LAYER["l.weight"] + LAYER["l.bias"], {"x": X}, LAYER),
    Case("nn.layer_norm", "x: f32[B, 7]", "nn.layer_norm(x, w.l, eps=1e-3)",
         lambda x: layer_normed(x, eps=1e-3) * LAYER["l.weight"], {"x": X},
         {"l.weight": LAYER["l.weight"]}),
    Case("nn.rms_norm", "x: f32[B, 7]", "nn.rms_norm(x, w.l)",
         lambda x: x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * LAYER["l.weight"],
         {"x": X}, LAYER),
    Case("nn.batch_norm", "x: f32[B, 4, H, W]", "nn.batch_norm(x, w.l)",
         lambda x: ((x - BATCH["l.running_mean"][:, None, None])
                    / np.sqrt(BATCH["l.running_var"] + 1e-5)[:, None, None]
                    * BATCH["l.weight"][:, None, None] + BATCH["l.bias"][:, None, None]),
         {"x": IMAGE}, BATCH),
    Case("nn.batch_norm1d", "x: f32[B, 4, T]", "nn.batch_norm1d(x, w.l)",
         lambda x: ((x - BATCH["l.running_mean"][:, None])
                    / np.sqrt(BATCH["l.running_var"] + 1e-5)[:, None]
                    * BATCH["l.weight"][:, None] + BATCH["l.bias"][:, None]),
         {"x": normal(2, 4, 9)}, BATCH),
    Case("nn.group_norm", "x: f32[B, 4, H, W]", "nn.group_norm(x, w.l, groups=2)",
         lambda x: (layer_normed(x.reshape(2, 2, 2, 9, 8), (2, 3, 4)).reshape(x.shape)
                    * BATCH["l.weight"][:, None, None] + BATCH["l.bias"][:, None, None]),
         {"x": IMAGE}, BATCH),
    Case("nn.linear", "x: f32[B, T, 7]", "nn.linear(x, w.l)",
         lambda x: x @ normal(5, 7).T + normal(5), {"x": normal(2, 3, 7)},
         {"l.weight": normal(5, 7), "l.bias": normal(5)}),
    Case("nn.linear", "x: f32[B, 7]", "nn.linear(x, w.l)",
         lambda x: x @ normal(5, 7).T, {"x": X}, {"l.weight": normal(5, 7)}),
    Case("nn.embedding", "x: i64[B, T]", "nn.embedding(x, w.l)",
         lambda x: normal(11, 4)[x], {"x": np.array([[0, 10, 3], [-1, 2, 2]])},
         {"l.weight": normal(11, 4)}),
    Case("nn.quantize", "x: f32[B, 7], z: u8[]", "nn.quantize(x, 0.5, z)",
         lambda x, z: np.clip(np.rint(x / 0.5) + int(z), 0, 255),
         {"x": X * np.float32(90), "z": np.uint8(131)}),
    Case("nn.requantize", "x: i32[B, 7], z: i8[]", "nn.requantize(x, 0.75, 0.25, 0.5, z)",
         lambda x, z: np.clip(np.rint(x * 0.375) + int(z), -128, 127),
         {"x": (X * 90).astype(np.int32), "z": np.int8(-7)}),
    Case("nn.dequantize", "q: i8[B, 7], s: f32[7], z: i8[7]", "nn.dequantize(q, s, z)",
         lambda q, s, z: (q.astype(int) - z) * s, {"q": CODES, "s": normal(7), "z": CODES[0]}),
    Case("nn.dequantize", "q: i8[B, 7], s: f32[]", "nn.dequantize(q, s)",
         lambda q, s: q * s, {"q": CODES, "s": np.float32(0.125)}),
    Case("nn.dequantized", "x: f32[B, 7]", "x * nn.dequantized(w.l)",
         lambda x: x * (CODES[0].astype(int) - 3) * 0.125, {"x": X}, STORED),
    Case("nn.dequantized", "x: f32[B, 7]", "x * nn.dequantized(w.l)",
         lambda x: x * CODES[0] * 0.125, {"x": X},
         {k: v for k, v in STORED.items() if k != "l.zero"}),
    Case("nn.fake_quantize", "x: f32[B, 7]", "nn.fake_quantize(x, w.l)",
         lambda x: (np.clip(np.rint(x / 0.125) + 3, -128, 127) - 3) * 0.125,
         {"x": X * np.float32(20)}, STORED),
    Case("nn.split_heads", "x: f32[B, T, 12]", "nn.split_heads(x, 3)",
         lambda x: x.reshape(2, 5, 3, 4).transpose(0, 2, 1, 3), {"x": normal(2, 5, 12)}),
    Case("nn.merge_heads", "x: f32[B, 4, T, 8]", "nn.merge_heads(x)",
         lambda x: x.transpose(0, 2, 1, 3).reshape(2, 5, 32), {"x": Q}),
    Case("nn.repeat_heads", "x: f32[B, 4, T, 8]", "nn.repeat_heads(x, 3)",
         lambda x: np.repeat(x, 3, 1), {"x": Q}),
    Case("nn.attend", ATTEND.format(g=4), "nn.attend(q, k, v)", attend,
         {"q": Q, "k": K, "v": V}),
    Case("nn.attend", "q: f32[B, H, T, D], k: f32[B, H, S, D], v: f32[B, H, S, D]",
         "nn.attend(q, k, v)", attend, {"q": Q, "k": K, "v": K}),
    Case("nn.attend", ATTEND.format(g=4) + ", m: bool[B, S]",
         "nn.attend(q, k, v, mask=m[:, None, None, :])",
         lambda q, k, v, m: attend(q, k, v, m[:, None, None, :]),
         {"q": Q, "k": K, "v": V, "m": KEEP}),
    Case("nn.attend", ATTEND.format(g=4) + ", m: bool[B, S]",
         "nn.attend(q, k, v, mask=m[:, None, None, :], causal=True)",
         lambda q, k, v, m: attend(q, k, v, m[:, None, None, :], True),
         {"q": Q, "k": K, "v": V, "m": KEEP}),
    Case("nn.attend", ATTEND.format(g=2), "nn.attend(q, k, v, causal=True)",
         lambda q, k, v: attend(q, k, v, causal=True),
         {"q": Q, "k": K[:, :2].copy(), "v": V[:, :2].copy()}),
    Case("nn.attend", ATTEND.format(g=4), "nn.attend(q, k, v, scale=1.0)",
         lambda q, k, v: attend(q * 8**0.5, k, v), {"q": Q, "k": K, "v": V}),
    Case("nn.attend", ATTEND.format(g=4) + ", a: f32[B, 1, 1, S]", "nn.attend(q, k, v, bias=a)",
         lambda q, k, v, a: attend(q, k, v, bias=a),
         {"q": Q, "k": K, "v": V, "a": normal(2, 1, 1, 6)}),
    Case("nn.rope", "x: f32[B, H, T, 8]", "nn.rope(x)", lambda x: rope(x, np.arange(5)),
         {"x": Q}),
    Case("nn.rope", "x: f32[B, H, T, 8], at: i64[T]", "nn.rope(x, at)", rope,
         {"x": Q, "at": np.array([3, 9, 1, 100, 0])}),
    conv2d(normal(6, 4, 3, 3), 1, 1, 1, 1),
    conv2d(normal(6, 4, 3, 2), 2, 0, 1, 1),
    conv2d(normal(6, 4, 2, 3), 1, 2, 2, 1),
    conv2d(normal(6, 2, 3, 3), 1, 1, 1, 2),
    conv2d(normal(4, 1, 3, 3), 2, 1, 1, 4),
    conv2d(normal(4, 1, 5, 5), 1, 2, 1, 4),
    conv2d(normal(8, 1, 7, 7), 1, 3, 1, 4),
    conv2d(normal(34, 2, 3, 3), 1, 1, 1, 2),
    conv1d(normal(5, 4, 3), 1, 0, 1, 1),
    conv1d(normal(5, 4, 4), 3, 2, 2, 1),
    conv1d(normal(4, 2, 3), 1, 1, 1, 2),
    Case("nn.max_pool", "x: f32[B, C, H, W]", "nn.max_pool(x, 3, stride=2, padding=1)",
         lambda x: pooled(x, 3, 2, 1, -1e30, "max"), {"x": IMAGE}, where="H >= 3, W >= 3"),
    Case("nn.max_pool", "x: f32[B, C, H, W]", "nn.max_pool(x, 2)",
         lambda x: pooled(x, 2, 2, 0, 0, "max"), {"x": IMAGE}, where="H >= 2, W >= 2"),
    Case("nn.avg_pool", "x: f32[B, C, H, W]", "nn.avg_pool(x, 3, stride=2, padding=1)",
         lambda x: pooled(x, 3, 2, 1, 0, "mean"), {"x": IMAGE}, where="H >= 3, W >= 3"),
    Case("nn.global_avg_pool", "x: f32[B, C, H, W]", "nn.global_avg_pool(x)",
         lambda x: x.mean((2, 3)), {"x": IMAGE}),
    Case("nn.mean_pool", "x: f32[B, T, D], m: i64[B, T]", "nn.mean_pool(x, m)",
         lambda x, m: (x * m[:, :, None]).sum(1) / np.maximum(m.sum(1), 1e-6)[:, None],
         {"x": normal(3, 7, 4), "m": MASK.astype(np.int64)}),
    Case("nn.mean_pool", "x: f32[B, T, D], m: bool[B, T]", "nn.mean_pool(x, m)",
         lambda x, m: (x * m[:, :, None]).sum(1) / np.maximum(m.sum(1), 1e-6)[:, None],
         {"x": normal(3, 7, 4), "m": MASK}),
    Case("nn.cross_entropy", "x: f32[B, 7], y: i64[B]", "nn.cross_entropy(x, y)",
         lambda x, y: -np.log(softmax(x))[np.arange(3), y].mean(),
         {"x": X, "y": np.array([6, 0, 3])}),
    Case("math.square", "x: f32[B, N]", "math.square(x)", lambda x: x * x, {"x": X}),
    Case("math.reciprocal", "x: f32[B, N]", "math.reciprocal(x)", lambda x: 1 / x, {"x": X}),
    Case("math.lerp", "x: f32[B, N], t: f32[B, N]", "math.lerp(x, x * 2.0, t)",
         lambda x, t: x + x * t, {"x": X, "t": X}),
    Case("math.logsumexp math.zero_where_infinite", "x: f32[B, N]", "math.logsumexp(x)",
         lambda x: np.log(np.exp(x).sum(-1)), {"x": X}),
    Case("math.std", "x: f32[B, N]", "math.std(x)", lambda x: x.std(-1), {"x": X}),
    Case("math.norm", "x: f32[B, N]", "math.norm(x, axis=0)",
         lambda x: np.linalg.norm(x, axis=0), {"x": X}),
    Case("math.standardize", "x: f32[B, N]", "math.standardize(x)", layer_normed, {"x": X}),
    Case("math.dot", "x: f32[N], y: f32[N]", "math.dot(x, y)", np.dot,
         {"x": normal(37), "y": normal(37, seed=1)}),
    Case("math.outer", "x: f32[N], y: f32[M]", "math.outer(x, y)", np.outer,
         {"x": normal(5), "y": normal(6)}),
    Case("math.squared_distances", "x: f32[I, K], y: f32[J, K]", "math.squared_distances(x, y)",
         lambda x, y: ((x[:, None] - y[None]) ** 2).sum(-1), {"x": X, "y": normal(5, 7)}),
    Case("math.distances", "x: f32[I, K], y: f32[J, K]", "math.distances(x, y)",
         lambda x, y: np.sqrt(((x[:, None] - y[None]) ** 2).sum(-1)),
         {"x": X, "y": normal(5, 7)}),
    Case("math.cosine_similarity", "x: f32[I, K], y: f32[J, K]", "math.cosine_similarity(x, y)",
         lambda x, y: (x / np.linalg.norm(x, axis=1, keepdims=True))
         @ (y / np.linalg.norm(y, axis=1, keepdims=True)).T, {"x": X, "y": normal(5, 7)}),
    *(Case(f"math.{name}", "x: f32[N, M]", f"math.{name}(x)", want, {"x": at})
      for name, want, at in (
          ("sinh", np.sinh, ANGLES), ("cosh", np.cosh, ANGLES), ("asinh", np.arcsinh, ANGLES),
          ("acosh", np.arccosh, abs(ANGLES) + 1), ("atanh", np.arctanh, UNIT * np.float32(0.999)),
          ("sinh", np.sinh, FAR), ("cosh", np.cosh, FAR),
          ("asinh", np.arcsinh, FAR * np.float32(3e36)),
          ("acosh", np.arccosh, abs(FAR) * np.float32(3e36) + 1),
          ("atan", np.arctan, ANGLES), ("asin", np.arcsin, UNIT), ("acos", np.arccos, UNIT))),
    Case("nn.softsign", "x: f32[B, 7]", "nn.softsign(x)", lambda x: x / (1 + abs(x)), {"x": X}),
    Case("nn.mish", "x: f32[B, 7]", "nn.mish(x)", lambda x: x * np.tanh(np.log1p(np.exp(x))),
         {"x": X}),
    Case("onnx.fmod", "x: f32[N], y: f32[N]", "onnx.fmod(x, y)", np.fmod,
         {"x": normal(40) * 9, "y": normal(40, seed=3)}),
    Case("onnx.fmod", "x: i32[N], y: i32[N]", "onnx.fmod(x, y)", np.fmod,
         {"x": np.arange(-9, 9, dtype=np.int32), "y": np.array([3, -4, 5] * 6, np.int32)}),
    *(Case("onnx.wrapped", "x: i32[N]", f"onnx.wrapped(x, {bits}, signed={signed})",
           lambda x, kind=kind: x.astype(kind).astype(np.int32),
           {"x": np.arange(-300, 301, 7, dtype=np.int32)})
      for bits, signed, kind in ((4, True, ml_dtypes.int4), (4, False, ml_dtypes.uint4),
                                 (2, True, ml_dtypes.int2), (2, False, ml_dtypes.uint2))),
    Case("onnx.cubic", "x: f32[N]", "onnx.cubic(x, -0.75)", lambda x: np.select(
        [abs(x) <= 1, abs(x) < 2],
        [1.25 * abs(x) ** 3 - 2.25 * x**2 + 1,
         -0.75 * (abs(x) ** 3 - 5 * x**2 + 8 * abs(x) - 4)], 0.0), {"x": UNIT[:, 0] * 2.5}),
    *(Case("onnx.unpacked", "q: u8[N, G, B]", f"onnx.unpacked(q, {bits})",
           lambda q, bits=bits: (q[..., None] >> np.arange(0, 8, bits) & (1 << bits) - 1).reshape(
               *q.shape[:-1], -1), {"q": np.arange(240, dtype=np.uint8).reshape(3, 8, 10)})
      for bits in (2, 4, 8)),
    Case("onnx.unfolded", "q: u8[N, G, B], scale: f32[N, G], zero: f32[N, G]",
         "onnx.unfolded(q, scale, zero, 4)",
         lambda q, s, z: ((np.stack([q & 15, q >> 4], -1).reshape(2, 3, 8) - z[..., None])
                          * s[..., None]).reshape(2, 24),
         {"q": np.arange(0, 240, 10, dtype=np.uint8).reshape(2, 3, 4),
          "scale": normal(2, 3), "zero": normal(2, 3, seed=1)}),
    Case("onnx.roi_align onnx.roi_taps onnx.taps",
         "x: f32[N, C, H, W], rois: f32[R, 4], of: i64[R]",
         "onnx.roi_align(x, rois, of, 2, 3, 2, 0.5, False, False)", boxes_averaged,
         {"x": normal(2, 3, 5, 7),
          "rois": np.array([[1, 2, 9, 8], [0, 0, 14, 10], [4, 3, 4.5, 3.2]], np.float32),
          "of": np.array([1, 0, 1])},
         where="N in 1..=4, H in 1..=9, W in 1..=9"),
    Case("onnx.roi_means onnx.roi_weights", "x: f32[N, C, H, W], rois: f32[R, 4], of: i64[R]",
         "onnx.roi_means(x, rois, of, 2, 3, 0.5, False)",
         lambda x, rois, of: boxes_averaged(x, rois, of, 0),
         {"x": normal(2, 3, 5, 7),
          "rois": np.array([[1, 2, 9, 8], [0, 0, 14, 10], [4, 3, 4.5, 3.2]], np.float32),
          "of": np.array([1, 0, 1])},
         where="N in 1..=4, H in 1..=9, W in 1..=9"),
    Case("onnx.roi_largest onnx.roi_bins", "x: f32[N, C, H, W], rois: f32[R, 5]",
         "onnx.roi_largest(x, rois, 3, 2, 0.5)", boxes_largest,
         {"x": normal(2, 3, 5, 7),
          "rois": np.array([[1, 2, 1, 9, 8], [0, 0, 0, 13, 9], [1, 4, 3, 4, 3], [0, -5, -5, 2, 1],
                            [0, 12, 8, 40, 40], [1, 30, 2, 40, 4]], np.float32)},
         where="N in 1..=4, H in 1..=9, W in 1..=9"),
    Case("onnx.deform_conv", "x: f32[2, 4, 5, 6], w: f32[4, 2, 2, 2],"
         " offset: f32[2, 2, 2, 2, 2, 3, 4], mask: f32[2, 2, 2, 2, 3, 4]",
         "onnx.deform_conv(x, w, offset, mask, step_i=2, apart_l=2, before_i=1)", convolved_at,
         {"x": normal(2, 4, 5, 6), "w": normal(4, 2, 2, 2),
          "offset": normal(2, 2, 2, 2, 2, 3, 4), "mask": normal(2, 2, 2, 2, 3, 4)}),
    Case("onnx.float4e2m1", "x: f32[N]", "onnx.float4e2m1(x)",
         lambda x: x.astype(ml_dtypes.float4_e2m1fn).astype(np.float32),
         {"x": SMALL[abs(SMALL) < 9]}),
    *(Case(f"onnx.{name}", "x: f32[N]", f"onnx.{name}(x, saturate={saturate})",
           lambda x, kind=kind, end=end: np.where(
               abs(x) >= end[0], np.sign(x) * end[1], x.astype(kind).astype(np.float32)),
           {"x": SMALL})
      for name, kind, least, top in (
          ("float8e4m3fnuz", ml_dtypes.float8_e4m3fnuz, 248.0, 240.0),
          ("float8e5m2fnuz", ml_dtypes.float8_e5m2fnuz, 61440.0, 57344.0))
      for saturate, end in ((True, (least, top)), (False, (least, np.nan)))),
    *(Case("onnx.float8e8m0", "x: f32[N]",
           f'log2(onnx.float8e8m0(x, mode="{mode}", saturate={saturate}))',
           lambda x, half=half, ends=ends: power_near(x, half, ends), {"x": POWERS})
      for mode, half in (("up", 0.5 + 2.0**-30), ("down", 1.0), ("nearest", 0.75))
      for saturate, ends in ((True, (-127, 127)), (False, (np.nan, np.nan)))),
    Case("onnx.overflowing", "x: f32[N], y: f32[N]", "onnx.overflowing(x, y, 5.0, 4.0, True)",
         lambda x, y: np.where(abs(x) >= 5, np.sign(x) * 4, y), {"x": SMALL, "y": SMALL}),
    Case("onnx.f8e4m3_or_nan", "x: f32[N]", "f32(onnx.f8e4m3_or_nan(x))",
         lambda x: x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32), {"x": SMALL}),
    Case("onnx.f8e5m2_or_inf", "x: f32[N]", "f32(onnx.f8e5m2_or_inf(x))",
         lambda x: x.astype(ml_dtypes.float8_e5m2).astype(np.float32), {"x": SMALL}),
    Case("onnx.truncated_div", "x: i32[N], y: i32[N]", "onnx.truncated_div(x, y)",
         lambda x, y: np.trunc(x / y),
         {"x": np.arange(-9, 9, dtype=np.int32), "y": np.array([3, -4, 5] * 6, np.int32)}),
    Case("nn.rnn nn.rnn_steps nn.input_gates nn.within", "x: f32[T, B, 4], h: f32[B, 6]",
         f"y, h = nn.rnn(x, w, h=h)\n{FLAT}",
         lambda x, h: layered(rnn, layer(1), (h,), x), {"x": STEPS, "h": STATE}, layer(1)),
    Case("nn.lstm nn.lstm_steps", "x: f32[T, B, 4], h: f32[B, 6], c: f32[B, 6], n: i64[B]",
         f"y, h, c = nn.lstm(x, w, h, c, lengths=n)\n{FLAT_C}",
         lambda x, h, c, n: layered(lambda r: lstm(r, "ifuo"), layer(4), (h, c), x, lengths=n),
         {"x": STEPS, "h": STATE, "c": STATE * 2, "n": LENGTHS}, layer(4)),
    Case("nn.lstm", "x: f32[T, B, 4]",
         f'y, h, c = nn.lstm(x, w, name="l1_reverse", reverse=True)\n{FLAT_C}',
         lambda x: layered(lambda r: lstm(r, "ifuo"), layer(4), (np.zeros((3, 6)),) * 2, x,
                           reverse=True), {"x": STEPS}, layer(4, "l1_reverse")),
    Case("nn.gru nn.gru_steps", "x: f32[T, B, 4], n: i64[B]",
         f"y, h = nn.gru(x, w, reverse=True, lengths=n)\n{FLAT}",
         lambda x, n: layered(rnn, layer(3), (np.zeros((3, 6)),), x, lengths=n, reverse=True),
         {"x": STEPS, "n": LENGTHS}, layer(3)),
    Case("onnx.rnn onnx.clipped onnx.activated",
         "x: f32[T, B, 6], r: f32[6, 6], h: f32[B, 6], n: i64[B]",
         f'y, h = onnx.rnn(x, r, h, n, True, 0.3, "leakyrelu", 0.2)\n{FLAT}',
         lambda x, r, h, n: recurrence(
             rnn(r, lambda v: np.where(v < 0, 0.2, 1) * np.clip(v, -0.3, 0.3)),
             x, (h,), n, True),
         {"x": normal(5, 3, 6), "r": normal(6, 6) * 0.4, "h": STATE, "n": LENGTHS}),
    *(Case("onnx.lstm", "x: f32[T, B, 24], r: f32[24, 6], h: f32[B, 6], c: f32[B, 6], p: f32[18]",
           f"y, h, c = onnx.lstm(x, r, h, c, peepholes=p, coupled={coupled})\n{FLAT_C}",
           lambda x, r, h, c, p, coupled=coupled: recurrence(
               lstm(r, "iofu", p, coupled), x, (h, c)),
           {"x": normal(5, 3, 24), "r": normal(24, 6) * 0.4, "h": STATE, "c": STATE * 2,
            "p": normal(18)})
      for coupled in (False, True)),
    *(Case("onnx.gru", "x: f32[T, B, 18], r: f32[18, 6], b: f32[18], h: f32[B, 6]",
           f"y, h = onnx.gru(x, r, b, h, reset_after={after})\n{FLAT}",
           lambda x, r, b, h, after=after: recurrence(gru(r, b, "zrn", after), x, (h,)),
           {"x": normal(5, 3, 18), "r": normal(18, 6) * 0.4, "b": normal(18), "h": STATE})
      for after in (False, True)),
    *(Case("onnx.activated", "x: f32[B, 7]", f'onnx.activated(x, "{name}", 0.7, 0.3)', want,
           {"x": X})
      for name, want in (
          ("sigmoid", sigmoid), ("tanh", np.tanh), ("relu", lambda x: np.maximum(x, 0)),
          ("thresholdedrelu", lambda x: np.where(x > 0.7, x, 0)),
          ("hardsigmoid", lambda x: np.clip(0.7 * x + 0.3, 0, 1)),
          ("elu", lambda x: np.where(x > 0, x, 0.7 * np.expm1(x))),
          ("softsign", lambda x: x / (1 + abs(x))), ("softplus", lambda x: np.log1p(np.exp(x))),
          ("affine", lambda x: 0.7 * x + 0.3), ("scaledtanh", lambda x: 0.7 * np.tanh(0.3 * x)))),
    Case("image.to_chw", "x: u8[B, H, W, C]", "image.to_chw(x)",
         lambda x: x.transpose(0, 3, 1, 2), {"x": PIXELS}),
    Case("image.to_hwc", "x: u8[B, C, H, W]", "image.to_hwc(x)",
         lambda x: x.transpose(0, 2, 3, 1), {"x": PIXELS}),
    Case("image.normalize", "x: f32[B, 7], m: f32[7], s: f32[7]", "image.normalize(x, m, s)",
         lambda x, m, s: (x - m) / s, {"x": X, "m": normal(7), "s": normal(7, seed=5) + 4}),
    Case("image.resize_bilinear image.centres image.mix", "x: u8[B, H, W, 3]",
         "image.resize_bilinear(x, 5, 7)", lambda x: bilinear(x, 5, 7), {"x": PIXELS}),
    Case("image.resize_bilinear", "x: f32[B, 4, 9, 8]", "image.resize_bilinear(x, 10, 20)",
         lambda x: bilinear(x, 10, 20), {"x": IMAGE}),
    Case("image.resize_nearest", "x: u8[B, H, W, 3]", "image.resize_nearest(x, 5, 20)",
         lambda x: x[:, ((np.arange(5) * 2 + 1) * 11) // 10][
             :, :, ((np.arange(20) * 2 + 1) * 13) // 40], {"x": PIXELS}),
    Case("image.center_crop", "x: u8[B, H, W, 3]", "image.center_crop(x, 6, 9)",
         lambda x: x[:, 2:8, 2:11], {"x": PIXELS}),
    Case("image.center_square", "x: u8[B, H, W, 3]", "image.center_square(x)",
         lambda x: x[:, :, 1:12], {"x": PIXELS}),
    Case("image.center_square", "x: u8[B, H, W, 3]", "image.center_square(x)",
         lambda x: x[:, 2:7], {"x": np.ascontiguousarray(PIXELS[:, :10, :5])}),
    *(Case("nn.pad_same nn.same_widths", "x: f32[B, 4, H, W]", f"nn.pad_same(x, {size}, {stride})",
           lambda x, around=around: np.pad(x, ((0, 0), (0, 0), *around)), {"x": IMAGE})
      for size, stride, around in (
          (3, 1, ((1, 1), (1, 1))), (3, 2, ((1, 1), (0, 1))), (5, 3, ((1, 1), (1, 2))),
          (2, 1, ((0, 1), (0, 1))), (1, 2, ((0, 0), (0, 0))), (2, 2, ((0, 1), (0, 0))),
          (6, 2, ((2, 3), (2, 2))))),
    Case("onnx.scatter_product", "x: f32[B, 7], at: i64[K], u: f32[K, 7]",
         "onnx.scatter_product(x, at, u)", multiplied_at,
         {"x": X, "at": np.array([1, 0, 1]), "u": normal(3, 7, seed=5)}),
    Case("onnx.nonzero_flat", "x: f32[N]",
         "at, n = onnx.nonzero_flat(x)\nf32(concat([at, reshape(n, [1])]))",
         lambda x: np.array([*np.flatnonzero(x), *[0] * (x == 0).sum(), (x != 0).sum()]),
         {"x": np.array([0, 2, 0, -1, 3], np.float32)}),
    *(Case("onnx.rotated", "x: f32[B, H, T, 8], c: f32[T, 3], s: f32[T, 3]",
           f"onnx.rotated(x, c, s, interleaved={beside})",
           lambda x, c, s, beside=beside: rotated(x, c, s, beside),
           {"x": Q, "c": normal(5, 3), "s": normal(5, 3, seed=4)}) for beside in (False, True)),
    *(Case("onnx.leaves", "x: f32[B, 7]",
           "onnx.leaves(x, i32([0, 3]), i32([1, 0, 0, 0]), f32([0.5, 0.0, 0.0, 0.0]), "
           f'i32([1, 1, 2, 3]), i32([2, 1, 2, 3]), 1, compare="{compare}"{missing})',
           lambda x, of=of, missing=missing: np.stack(
               [np.where(of(x[:, 1], 0.5) | (missing != "") & np.isnan(x[:, 1]), 1, 2),
                np.full(len(x), 3)], axis=1),
           {"x": np.append(X, [[0.5] * 7, [np.nan] * 7], axis=0).astype(np.float32)})
      for compare, of in (("<=", np.less_equal), ("<", np.less), (">=", np.greater_equal),
                          (">", np.greater), ("==", np.equal), ("!=", np.not_equal))
      for missing in ("", ", missing=iota(4) == 0")),
    Case("onnx.dynamic_quantized", "x: f32[B, 7]",
         "q, s, z = onnx.dynamic_quantized(x)\n(f32(q) - f32(z)) * s", requantized, {"x": X}),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.covers.split()[0])
def test_agrees_with_numpy(case: Case) -> None:
    weights = {"w": dict(case.weights)} if case.weights else None
    pipe = sf.compile(case.source, weights=weights)
    found = pipe(**case.inputs)
    with np.errstate(all="ignore"):
        want = case.want(*(wide(x) for x in case.inputs.values()))
    assert found.shape == np.shape(want)
    np.testing.assert_allclose(found, want, rtol=2e-5, atol=2e-5)


def test_every_function_is_covered() -> None:
    covered = {name for case in CASES for name in case.covers.split()}
    for path in sorted(STD.glob("*.pipe")):
        if path.stem == "gguf":
            continue  # tests/dsl/test_gguf.py has a block of every kind
        if path.stem == "onnx":  # what counts as it goes: tests/onnx/test_counted.py
            covered |= {"onnx.non_max_suppression", "onnx.unique", "onnx.unique_numbers"}
        names = re.findall(r"^fn (\w+)", path.read_text(), re.MULTILINE)
        missing = [n for n in names if f"{path.stem}.{n}" not in covered]
        assert not missing, f"{path.name}: {missing}"


@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_max_pool_pads_with_what_is_below_everything(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "p.pipe"
    path.write_text(
        f"import nn\npipeline p(x: {dtype}[1, 1, 3, 3]):\n"
        "    nn.max_pool(x, 3, stride=2, padding=1)\n"
    )
    x = np.full((1, 1, 3, 3), -np.inf, {"f32": np.float32, "f64": np.float64}[dtype])
    x[0, 0, 0, 0] = -3e38
    want = np.array([[-3e38, -np.inf], [-np.inf, -np.inf]], x.dtype)
    np.testing.assert_array_equal(sf.compile(path)(x=x)[0, 0], want)


def test_mish_of_numbers_of_any_size(tmp_path: Path) -> None:
    path = tmp_path / "p.pipe"
    path.write_text("import nn\npipeline p(x: f32[N]) -> f32[N]:\n    nn.mish(x)\n")
    x = np.array([0.0, -0.0, 1e-30, -1e-30, 60, 3e38, np.inf, -60, -3e38, np.nan], np.float32)
    wide = np.maximum(x.astype(float), -500)
    with np.errstate(all="ignore"):
        grown = np.exp(np.minimum(wide, 300))
        want = wide * np.tanh(np.log1p(grown))
    found = sf.compile(path)(x=x)
    np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-37)
    assert np.signbit(found[1]) and np.signbit(found[8])
