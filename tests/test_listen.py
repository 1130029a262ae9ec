"""Whisper at small sizes, with random weights: NumPy in f64 and without a cache says the same.

tests/test_gallery.py compares the whole of it with CTranslate2.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import erf
from typing import Any

import numpy as np
import pytest

import stagefuse as sf

from .test_examples import EXAMPLES, softmax
from .test_gallery import references

SIZES = {"SAMPLES": 1920, "LAYERS": 2, "HEADS": 2, "WIDTH": 8, "TOKENS": 97, "LONGEST": 9}
LAYERS, HEADS, TOKENS, LONGEST = (SIZES[n] for n in ("LAYERS", "HEADS", "TOKENS", "LONGEST"))
WIDTH, PLACES = HEADS * SIZES["WIDTH"], SIZES["SAMPLES"] // 320
TOLERANCE = 5 * LAYERS * 4 * WIDTH * float(np.finfo(np.float32).eps)
"""Two layers after two, in each five products behind each other, of at most 64 terms near 1."""
Array = np.ndarray[Any, Any]


def source() -> str:
    """The example with small sizes."""
    text = (EXAMPLES / "listen.pipe").read_text()
    for name, size in SIZES.items():
        text, count = re.subn(rf"^const {name} = \d+", f"const {name} = {size}", text, flags=re.M)
        assert count == 1
    return text


@pytest.fixture
def weights(rng: np.random.Generator) -> dict[str, Array]:
    """Weights under which values stay near 1."""
    found: dict[str, Array] = {}

    def layer(name: str, out: int, *inside: int) -> None:
        scale = 1 / np.sqrt(np.prod(inside))
        found[f"{name}.weight"] = rng.standard_normal((out, *inside), np.float32) * scale
        found[f"{name}.bias"] = rng.standard_normal(out, np.float32) / 10

    def norm(name: str) -> None:
        found[f"{name}.weight"] = 1 + rng.standard_normal(WIDTH, np.float32) / 10
        found[f"{name}.bias"] = rng.standard_normal(WIDTH, np.float32) / 10

    layer("encoder.conv1", WIDTH, 80, 3)
    layer("encoder.conv2", WIDTH, WIDTH, 3)
    for half, places in (("encoder", PLACES), ("decoder", LONGEST)):
        position = rng.standard_normal((places, WIDTH), np.float32)
        found[f"{half}.position_encodings.encodings"] = position
        norm(f"{half}.layer_norm")
        for at in (f"{half}.layers.{n}" for n in range(LAYERS)):
            for part in ("self_attention", "attention", "ffn"):
                norm(f"{at}.{part}.layer_norm")
            layer(f"{at}.self_attention.linear_0", 3 * WIDTH, WIDTH)
            layer(f"{at}.self_attention.linear_1", WIDTH, WIDTH)
            layer(f"{at}.attention.linear_0", WIDTH, WIDTH)
            layer(f"{at}.attention.linear_1", 2 * WIDTH, WIDTH)
            layer(f"{at}.attention.linear_2", WIDTH, WIDTH)
            layer(f"{at}.ffn.linear_0", 4 * WIDTH, WIDTH)
            layer(f"{at}.ffn.linear_1", WIDTH, 4 * WIDTH)
    found["decoder.embeddings.weight"] = rng.standard_normal((TOKENS, WIDTH), np.float32)
    return {name: np.asarray(array, np.float32) for name, array in found.items()}


class Whisper:
    """The model in f64, all tokens at once."""

    def __init__(self, weights: dict[str, Array]) -> None:
        self.w = {name: array.astype(float) for name, array in weights.items()}

    def linear(self, x: Array, at: str) -> Array:
        return np.asarray(x @ self.w[f"{at}.weight"].T + self.w[f"{at}.bias"])

    def norm(self, x: Array, at: str) -> Array:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
        return np.asarray(x * self.w[f"{at}.weight"] + self.w[f"{at}.bias"])

    def conv(self, x: Array, at: str, stride: int) -> Array:
        """Three places around each, of x [channels, places]; gelu after it."""
        seen = np.lib.stride_tricks.sliding_window_view(np.pad(x, ((0, 0), (1, 1))), 3, axis=1)
        y = np.einsum("ctk,ock->ot", seen[:, ::stride], self.w[f"{at}.weight"])
        return gelu(y + self.w[f"{at}.bias"][:, None])

    def attention(self, x: Array, at: str, causal: bool) -> Array:
        q, k, v = np.split(self.linear(self.norm(x, f"{at}.layer_norm"), f"{at}.linear_0"), 3, 1)
        return self.linear(attend(q, k, v, causal), f"{at}.linear_1")

    def feed_forward(self, x: Array, at: str) -> Array:
        y = gelu(self.linear(self.norm(x, f"{at}.layer_norm"), f"{at}.linear_0"))
        return self.linear(y, f"{at}.linear_1")

    def hear(self, samples: Array) -> list[tuple[Array, Array]]:
        """Keys and values of each layer: [places, width]."""
        x = references.log_mel(samples, SIZES["SAMPLES"])
        x = self.conv(self.conv(x, "encoder.conv1", 1), "encoder.conv2", 2).T
        x = x + self.w["encoder.position_encodings.encodings"]
        for at in (f"encoder.layers.{n}" for n in range(LAYERS)):
            x = x + self.attention(x, f"{at}.self_attention", False)
            x = x + self.feed_forward(x, f"{at}.ffn")
        x = self.norm(x, "encoder.layer_norm")
        both = (self.linear(x, f"decoder.layers.{n}.attention.linear_1") for n in range(LAYERS))
        return [(y[:, :WIDTH], y[:, WIDTH:]) for y in both]

    def say(self, tokens: list[int], heard: list[tuple[Array, Array]]) -> Array:
        """The scores of the token after these."""
        table = self.w["decoder.embeddings.weight"]
        x = table[tokens] + self.w["decoder.position_encodings.encodings"][: len(tokens)]
        for n, (keys, values) in enumerate(heard):
            at = f"decoder.layers.{n}"
            x = x + self.attention(x, f"{at}.self_attention", True)
            y = self.norm(x, f"{at}.attention.layer_norm")
            y = attend(self.linear(y, f"{at}.attention.linear_0"), keys, values, False)
            x = x + self.linear(y, f"{at}.attention.linear_2")
            x = x + self.feed_forward(x, f"{at}.ffn")
        return np.asarray(self.norm(x[-1], "decoder.layer_norm") @ table.T)


def gelu(x: Array) -> Array:
    return np.asarray(x * 0.5 * (1 + np.vectorize(erf)(x / np.sqrt(2))))


def heads(x: Array) -> Array:
    """[places, width] to [heads, places, width of a head]."""
    return x.reshape(len(x), HEADS, -1).transpose(1, 0, 2)


def attend(q: Array, k: Array, v: Array, causal: bool) -> Array:
    scores = heads(q) @ heads(k).transpose(0, 2, 1) / np.sqrt(WIDTH // HEADS)
    if causal:
        scores[:, ~np.tri(len(q), dtype=bool)] = -np.inf
    return (softmax(scores) @ heads(v)).transpose(1, 0, 2).reshape(len(q), WIDTH)


def check(pipes: list[Any], weights: dict[str, Array], rng: np.random.Generator) -> None:
    """A recording of some length, and a text in a few calls, and again in one."""
    hear, say = pipes
    model = Whisper(weights)
    samples = rng.standard_normal(int(rng.integers(1, SIZES["SAMPLES"])), np.float32)
    found, heard = hear(samples=samples), model.hear(samples)
    for place, values in enumerate((found.keys, found.values)):
        wanted = np.stack([heads(both[place]) for both in heard])
        np.testing.assert_allclose(values, wanted, rtol=0, atol=TOLERANCE)
    tokens = rng.integers(0, TOKENS, LONGEST).tolist()
    allowed = rng.random(TOKENS) < 0.5
    allowed[0] = True
    for ranges in ([(0, 3), (3, 4), (4, LONGEST)], [(0, LONGEST)]):
        session = say.session(S=LONGEST)
        for begin, end in ranges:
            said = session(tokens=np.array(tokens[begin:end]), allowed=allowed,
                           heard_keys=found.keys, heard_values=found.values)  # fmt: skip
            scores = model.say(tokens[:end], heard)
            np.testing.assert_allclose(said.scores, scores, rtol=0, atol=TOLERANCE)
            assert said.token == np.where(allowed, said.scores, -np.inf).argmax()


def compiled(weights: dict[str, Array], **options: Any) -> Iterator[sf.Pipeline]:
    for name in ("hear", "say"):
        yield sf.compile(source(), pipeline=name, weights={"w": weights}, **options)


def test_on_the_cpu(weights: dict[str, Array], rng: np.random.Generator) -> None:
    check(list(compiled(weights, device="cpu")), weights, rng)


@pytest.mark.slow
def test_in_the_emulator(weights: dict[str, Array], rng: np.random.Generator) -> None:
    check(list(compiled(weights, device="emulator", target="h200")), weights, rng)
