"""Attention of ONNX Runtime's own domain, which its transformer optimizer and its model builder
write, with rotary positions and caches.

Source: "Contrib Operators" of ONNX Runtime (domain com.microsoft), and what its CPU kernels compute
where that page leaves it open.
"""

from __future__ import annotations

from stagefuse.dsl.dims import Expr
from stagefuse.dsl.frozen import frozen
from stagefuse.onnx.errors import Refused
from stagefuse.onnx.node import Node, Val
from stagefuse.onnx.record import Written, op
from stagefuse.onnx.text import literal, size_text

from .contrib import DOMAIN
from .quantised import less_zero, scale_of


@frozen
class Heads:
    """Queries, keys and values by heads, [B, H, T, D], and what keys have been cached as."""

    q: Val
    k: Val
    v: Val

    @property
    def batch(self) -> Expr:
        return self.q.shape[0]

    @property
    def keys(self) -> Expr:
        return self.k.shape[2]


def by_heads(n: Node, text: str, heads: int, name: str) -> Val:
    return n.let(name, f"nn.split_heads({text}, {heads})")


def with_past(n: Node, past: str, new: Val, name: str) -> Val:
    return n.let(name, f"concat([{past}, {new.text}], axis=2)")


def attended(n: Node, heads: Heads, bias: str | None, causal: bool) -> str:
    """The heads' results, merged."""
    options = [f"bias={bias}"] if bias is not None else []
    options += ["causal=True"] if causal else []
    if n.attr("scale", 0.0):
        options.append(f"scale={literal(float(n.attr('scale')))}")
    inside = ", ".join([heads.q.text, heads.k.text, heads.v.text, *options])
    return n.let("attended", f"nn.merge_heads(nn.attend({inside}))").text


def masked(n: Node, index: int, heads: Heads) -> str | None:
    """A mask as what is added to scores, [B, 1, T, S]: 0 where a key counts, else a low number.

    It is of keys, of queries by keys, or tells the lengths of sequences (and where they start).
    """
    mask, low = n.maybe(index), literal(float(n.attr("mask_filter_value", -10000.0)))
    if mask is None:
        return None
    text, dtype = n.bound(mask, "mask"), heads.q.dtype
    if mask.rank == 1:
        at, batch = f"iota({size_text(heads.keys)})[None, :]", size_text(heads.batch)
        text = f"i64({text})"
        if n.body.same(mask.shape[0], heads.batch):
            keep = f"{at} < {text}[:, None]"
        elif n.body.same(mask.shape[0], heads.batch * 2):
            keep = f"({at} < {text}[:{batch}, None]) & ({at} >= {text}[{batch}:, None])"
        else:
            raise Refused("lengths of sequences packed together", "a mask of each sequence")
    elif mask.rank == 2 and mask.shape[1].as_int() == 1 and heads.keys.as_int() != 1:
        return None  # a mask of no key at all stands for none
    else:
        keep = text if mask.dtype.is_bool else f"{text} > 0"
    if mask.rank == 4:
        low_row = size_text(heads.keys - heads.q.shape[2])
        high = size_text(heads.keys)
        keep = f"({keep})[:, :, {low_row}:{high}, :{high}]"
    kept = n.let("kept", keep).text
    spread = {1: "[:, None, None, :]", 2: "[:, None, None, :]", 3: "[:, None]", 4: ""}[mask.rank]
    return n.let("mask_bias", f"select({kept}, {dtype}(0.0), {dtype}({low})){spread}").text


def biased(n: Node, mask: str | None, index: int) -> str | None:
    """A mask and the bias of scores that an input gives, together."""
    if n.maybe(index) is None:
        return mask
    return n.x(index) if mask is None else n.let("bias", f"{mask} + {n.x(index)}").text


def refuse_shared_cache(n: Node, *others: int) -> None:
    """Raises Refused where past and present are one buffer, and for inputs of beam search."""
    if n.attr("past_present_share_buffer", 0):
        raise Refused("a cache that is one buffer with its result", "past and present apart",
                      "past_present_share_buffer")  # fmt: skip
    if any(n.maybe(k) is not None for k in others):
        raise Refused("a cache in a shared buffer, or of beams", "past and present apart")


def _cut(n: Node, text: str, sizes: list[int]) -> list[str]:
    """Parts of the last axis."""
    ends = [sum(sizes[: k + 1]) for k in range(len(sizes))]
    return [f"{text}[..., {e - s}:{e}]" for s, e in zip(sizes, ends, strict=True)]


def _projected(n: Node, whole: str, sizes: list[int], mask: int, past: int, more: int) -> Written:
    """Attention on queries, keys and values side by side, [B, T, sizes]."""
    count = n.attr("num_heads")
    if n.attr("do_rotary", 0):
        raise Refused("rotary positions in `Attention`", "`RotaryEmbedding`", "do_rotary")
    q, k, v = (by_heads(n, t, count, name)
               for t, name in zip(_cut(n, whole, sizes), "qkv", strict=True))  # fmt: skip
    if n.maybe(past) is not None:
        kept = n.bound(n.val(past), "past")
        k, v = with_past(n, f"{kept}[0]", k, "keys"), with_past(n, f"{kept}[1]", v, "values")
    heads = Heads(q, k, v)
    bias = masked(n, mask, heads)
    bias = biased(n, bias, more) if more else bias
    y = attended(n, heads, bias, bool(n.attr("unidirectional", 0)))
    return [y, f"stack([{k.text}, {v.text}])"] if len(n.outputs) > 1 else y


@op(f"{DOMAIN}::Attention", unread=["rotary_embedding_dim"])
def _attention(n: Node) -> Written:
    """Projection and attention in one. Inputs: x, weights, bias, mask, past, bias of scores."""
    refuse_shared_cache(n, 6)
    width = n.val(1).shape[1].as_int()
    if width is None:
        raise Refused("weights of a size that varies", "constant sizes")
    sizes = list(n.attr("qkv_hidden_sizes") or [width // 3] * 3)
    bias = f" + {n.x(2)}" if n.maybe(2) is not None else ""
    whole = n.let("qkv", f"{n.x(0)} @ {n.x(1)}{bias}").text
    return _projected(n, whole, sizes, 3, 4, 5)


@op(f"{DOMAIN}::QAttention")
def _quantised_attention(n: Node) -> Written:
    """The same, of integers with scales; scores and results are floats."""
    refuse_shared_cache(n)
    width = n.val(1).shape[1].as_int()
    if width is None:
        raise Refused("weights of a size that varies", "constant sizes")
    a, b = (n.let("whole", less_zero(n, k, k + 6)).text for k in (0, 1))
    scale = f"{scale_of(n, 3)} * {scale_of(n, 4)}"
    whole = n.let("qkv", f"f32({a} @ {b}) * ({scale}) + f32({n.x(2)})").text
    return _projected(n, whole, [width // 3] * 3, 5, 8, 0)


@op(f"{DOMAIN}::MultiHeadAttention")
def _multi_head(n: Node) -> Written:
    """Attention on what is projected. Inputs: q, k, v, bias of all three, mask of keys, bias of
    scores, past keys and values. k and v may be packed with q, with each other, or be by heads."""
    refuse_shared_cache(n, 8, 9)
    if len(n.outputs) > 3 and n.outputs[3]:
        raise Refused("scores as a result", "three results")
    q, k, v = _three(n)
    if n.maybe(6) is not None:
        k, v = with_past(n, n.x(6), k, "keys"), with_past(n, n.x(7), v, "values")
    heads = Heads(q, k, v)
    bias = biased(n, masked(n, 4, heads), 5)
    return [attended(n, heads, bias, bool(n.attr("unidirectional", 0))), k, v]


def _three(n: Node) -> list[Val]:
    """Queries, keys and values by heads, with their biases."""
    count, first = n.attr("num_heads"), n.val(0)
    if first.rank == 5 or (n.maybe(1) is not None and n.val(1).rank == 5):
        packed = n.bound(first if first.rank == 5 else n.val(1), "packed")
        names = "qkv" if first.rank == 5 else "kv"
        made = [n.let(c, f"transpose({packed}[:, :, :, {k}], [0, 2, 1, 3])")
                for k, c in enumerate(names)]  # fmt: skip
        return made if first.rank == 5 else [by_heads(n, n.x(0), count, "q"), *made]
    if n.maybe(1) is None:
        raise Refused("queries that hold keys and values", "five dimensions, or `key`")
    widths = [n.val(k).shape[-1].as_int() or 0 for k in range(3)]
    biases = [""] * 3
    if n.maybe(3) is not None:
        sizes = [w * count if n.val(k).rank == 4 else w for k, w in enumerate(widths)]
        biases = [f" + {t}" for t in _cut(n, n.bound(n.val(3), "bias"), sizes)]
    return [
        n.val(k) if n.val(k).rank == 4 else by_heads(n, f"{n.x(k)}{biases[k]}", count, "qkv"[k])
        for k in range(3)
    ]


# Rotary positions


def rotated(x: str, cosine: str, sine: str, interleaved: bool) -> str:
    return f"onnx.rotated({x}, {cosine}, {sine}{', interleaved=True' if interleaved else ''})"


@op(f"{DOMAIN}::RotaryEmbedding", unread=["num_heads", "rotary_embedding_dim", "scale"])
def _rotary(n: Node) -> str:
    """Pairs of elements turned by their position's angle. Inputs: x, positions, cos, sin."""
    if n.attr("is_packed_batching", 0):
        raise Refused("sequences packed together", "a batch", "is_packed_batching")
    value, flat = n.val(0), n.val(0).rank == 3
    steps = value.shape[1] if flat else value.shape[2]
    text = n.x(0)
    if flat:
        wide = n.attr("num_heads", 0)
        width = (n.val(2).shape[1] * 2).as_int()
        total = value.shape[2].as_int()
        if not wide and (not width or total is None):
            raise Refused("heads of a size that varies", "`num_heads`", "num_heads")
        text = by_heads(n, text, wide or (total or 0) // (width or 1), "x").text
    at = f"i64({n.x(1)})"
    if n.val(1).rank == 2:
        turns = [n.let(c, f"{n.x(k)}[{at}][:, None]").text for k, c in ((2, "cosine"), (3, "sine"))]
    else:
        at = n.let("at", f"{at}[0] + iota({size_text(steps)})").text
        turns = [n.let(c, f"{n.x(k)}[{at}]").text for k, c in ((2, "cosine"), (3, "sine"))]
    y = rotated(text, turns[0], turns[1], bool(n.attr("interleaved", 0)))
    return f"nn.merge_heads({y})" if flat else y


@op(f"{DOMAIN}::GroupQueryAttention",
    unread=["k_quant_type", "v_quant_type", "qk_norm_epsilon"])  # fmt: skip
def _grouped(n: Node) -> Written:
    """Causal attention of a cache whose sequences have lengths of their own.

    Inputs: q, k, v (or all in q), past keys and values, lengths - 1, the greatest length, cos, sin,
    positions, bias of scores, sinks.
    """
    for index, what in ((11, "sinks"), (12, "a quantised cache"), (14, "norms of queries and keys"),
                        (16, "queries of several lengths")):  # fmt: skip
        if any(n.maybe(k) is not None for k in (index, index + 1)):
            raise Refused(f"{what} in `GroupQueryAttention`", "inputs up to the bias of scores")
    for name, usual in (("softcap", 0.0), ("smooth_softmax", 0), ("qk_output", 0), ("causal", 1),
                        ("kv_cache_bit_width", 0), ("sliding_window_cache", 0)):  # fmt: skip
        if n.attr(name, usual) not in (usual, -1):
            raise Refused(f"`{name}` is {n.attr(name)}", f"{usual}", name)
    q, k, v = _grouped_heads(n)
    steps, total = q.shape[2], n.sizes(6, "total_sequence_length")[0]
    first = n.body.same(total, steps)
    lengths = n.let("lengths", f"i64({n.bound(n.val(5), 'c')}) + 1").text
    before = f"{lengths} * 0" if first else f"{lengths} - {size_text(steps)}"
    before = n.let("before", before).text
    at = n.let("at", f"{before}[:, None] + iota({size_text(steps)})[None, :]").text
    if n.attr("do_rotary", 0):
        places = f"i64({n.x(9)})" if n.maybe(9) is not None else at
        turns = [n.let(c, f"{n.x(i)}[{places}][:, None]").text
                 for i, c in ((7, "cosine"), (8, "sine"))]  # fmt: skip
        back = bool(n.attr("rotary_interleaved", 0))
        q, k = (n.let(t.text, rotated(t.text, turns[0], turns[1], back)) for t in (q, k))
    if n.maybe(3) is not None and not first:
        k, v = (_appended(n, n.val(i), t, before, total, name)
                for i, t, name in ((3, k, "keys"), (4, v, "values")))  # fmt: skip
    keys = f"iota({size_text(k.shape[2])})[None, None, :]"
    seen = f"{keys} <= {at}[:, :, None]"
    window = n.attr("local_window_size", -1)
    if window > 0:
        seen = f"({seen}) & ({keys} > {at}[:, :, None] - {window})"
    mask = n.let("seen", f"({seen})[:, None]").text
    options = [f"mask={mask}"]
    options += [f"bias={n.x(10)}"] if n.maybe(10) is not None else []
    options += [f"scale={literal(float(n.attr('scale')))}"] if n.attr("scale", 0.0) else []
    inside = ", ".join([q.text, k.text, v.text, *options])
    return [f"nn.merge_heads(nn.attend({inside}))", k, v]


def _grouped_heads(n: Node) -> list[Val]:
    """Queries by heads, keys and values by fewer."""
    heads, groups = n.attr("num_heads"), n.attr("kv_num_heads")
    texts = [n.x(0)] * 3
    if n.maybe(1) is None:
        width = n.val(0).shape[2].as_int()
        if width is None:
            raise Refused("heads of a size that varies", "constant sizes")
        each = width // (heads + 2 * groups)
        texts = _cut(n, n.bound(n.val(0), "qkv"), [heads * each, groups * each, groups * each])
    else:
        texts = [n.x(0), n.x(1), n.x(2)]
    counts = (heads, groups, groups)
    return [by_heads(n, t, c, name) for t, c, name in zip(texts, counts, "qkv", strict=True)]


def _appended(n: Node, past: Val, new: Val, before: str, total: Expr, name: str) -> Val:
    """New keys after those before them, of which each sequence has a number of its own."""
    old, end = past.shape[2], size_text(new.shape[2] - 1)
    text, length = n.bound(past, "past"), size_text(total)
    is_old = f"i < {before}[b]"
    was = f"{text}[b, h, min(i, {size_text(old - 1)}), d]"
    now = f"{new.text}[b, h, clamp(i - {before}[b], 0, {end}), d]"
    return n.define(name, ["b", "h", f"i in 0..{length}", "d"], f"select({is_old}, {was}, {now})")
