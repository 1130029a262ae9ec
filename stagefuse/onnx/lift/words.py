"""Names for values that the model gives none."""

from __future__ import annotations

import re

from .program import Compute, Value

_WORDS = {
    "nn.softmax": "probs", "nn.attend": "attended", "nn.embedding": "x", "nn.layer_norm": "h",
    "nn.rms_norm": "h", "iota": "positions", "concat": "joined", "sum": "total", "mean": "average",
    "exp": "e", "argmax": "best", "cos": "cosine", "sin": "sine",
}  # fmt: skip
_THROUGH = ("nn.split_heads", "nn.gelu", "nn.gelu_tanh", "nn.silu", "nn.relu", "reshape")
"""What does not change what a value is called."""
_PLAIN = re.compile(r"[A-Za-z][A-Za-z_]*[0-9]*\Z")


def suggestion(value: Value) -> str:
    """A name for a value: of its layer, or of what it is."""
    maker = value.maker
    if maker is None:
        return value.hint or "x"
    if isinstance(maker, Compute):
        term = maker.term
        scopes = [v for v in maker.reads if v.is_scope and v.path]
        if scopes and not term.is_call("nn.embedding", "nn.layer_norm", "nn.rms_norm"):
            words = [p for p in (scopes[0].path or "").split(".") if _PLAIN.match(p)]
            if words and 1 < len(words[-1]) <= 16:
                return words[-1].lower()
        if term.kind == "call" and term.value[0] in _WORDS:
            return _WORDS[term.value[0]]
        if term.kind == "binary" and term.value == "@":
            return "product"
        if value.type is not None and value.type.dtype.is_bool:
            return "mask"
        if term.is_call(*_THROUGH) and maker.reads:
            return suggestion(maker.reads[0])
    return "x"
