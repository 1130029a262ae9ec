"""Three conversations with one decoder, turn by turn: each has a session with its keys and values.

The weights are random, so what it says means nothing; the same model without states, in NumPy,
says the same.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np

import stagefuse as sf

HERE = Path(__file__).resolve().parent
HEADS, GROUPS, WIDTH, LAYERS, TOKENS, HIDDEN = 8, 2, 16, 2, 256, 192
EMBEDDING = HEADS * WIDTH
Weights = dict[str, np.ndarray[Any, Any]]


def random_weights(rng: np.random.Generator) -> Weights:
    """Weights under which values stay near 1."""

    def matrix(rows: int, columns: int) -> np.ndarray[Any, Any]:
        return (rng.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)

    def scale() -> np.ndarray[Any, Any]:
        return (1 + rng.standard_normal(EMBEDDING) / 10).astype(np.float32)

    found = {"embedding.weight": matrix(TOKENS, EMBEDDING) * np.float32(np.sqrt(EMBEDDING)),
             "norm.weight": scale(), "head.weight": matrix(TOKENS, EMBEDDING)}  # fmt: skip
    shapes = {
        "query": (EMBEDDING, EMBEDDING), "key": (GROUPS * WIDTH, EMBEDDING),
        "value": (GROUPS * WIDTH, EMBEDDING), "output": (EMBEDDING, EMBEDDING),
        "gate": (HIDDEN, EMBEDDING), "up": (HIDDEN, EMBEDDING), "down": (EMBEDDING, HIDDEN),
    }  # fmt: skip
    for layer in range(LAYERS):
        own = {f"{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        own |= {"attention_norm.weight": scale(), "feed_norm.weight": scale()}
        found |= {f"layers.{layer}.{name}": array for name, array in own.items()}
    return found


def reference(weights: Weights, tokens: list[int]) -> np.ndarray[Any, Any]:
    """The scores of the next token, from all tokens at once and without a cache, in float64."""
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    count = len(tokens)

    def norm(x: Any, scale: Any) -> Any:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale

    def heads(x: Any, number: int) -> Any:
        return x.reshape(count, number, WIDTH).transpose(1, 0, 2)

    def turned(x: Any) -> Any:
        half = WIDTH // 2
        angle = np.arange(count)[:, None] * 10000.0 ** (-np.arange(half) * 2 / WIDTH)
        a, b, c, s = x[..., :half], x[..., half:], np.cos(angle), np.sin(angle)
        return np.concatenate([a * c - b * s, b * c + a * s], -1)

    x = w["embedding.weight"][tokens]
    for layer in range(LAYERS):
        p = {k.partition(f"layers.{layer}.")[2]: v for k, v in w.items()}
        h = norm(x, p["attention_norm.weight"])
        q = turned(heads(h @ p["query.weight"].T, HEADS))
        k = turned(heads(h @ p["key.weight"].T, GROUPS)).repeat(HEADS // GROUPS, 0)
        v = heads(h @ p["value.weight"].T, GROUPS).repeat(HEADS // GROUPS, 0)
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(WIDTH)
        scores[:, ~np.tri(count, dtype=bool)] = -np.inf
        chances = np.exp(scores - scores.max(-1, keepdims=True))
        found = chances / chances.sum(-1, keepdims=True) @ v
        x = x + found.transpose(1, 0, 2).reshape(count, EMBEDDING) @ p["output.weight"].T
        h = norm(x, p["feed_norm.weight"])
        gate = h @ p["gate.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ p["up.weight"].T)) @ p["down.weight"].T
    last: np.ndarray[Any, Any] = norm(x[-1], w["norm.weight"]) @ w["head.weight"].T
    return last


def main() -> None:
    """Talk three times at once, and say how long a token takes and how far NumPy is away."""
    rng = np.random.default_rng(0)
    weights = random_weights(rng)
    pipe = sf.compile(HERE / "decoder.pipe", weights={"w": weights})
    sessions = [pipe.session(S=1024) for _ in range(3)]
    talks = [rng.integers(0, TOKENS, 5 + 3 * n).tolist() for n in range(3)]
    given = [np.array(talk) for talk in talks]
    seconds, furthest = 0.0, 0.0
    for _ in range(12):
        for number, session in enumerate(sessions):
            begin = time.perf_counter()
            found = session(tokens=given[number])
            seconds += time.perf_counter() - begin
            error = np.abs(found.scores - reference(weights, talks[number])).max()
            furthest = max(furthest, float(error))
            talks[number].append(int(found.token))
            given[number] = np.array([found.token])
    for number, talk in enumerate(talks):
        print(f"conversation {number}:", *talk)
    print(f"{seconds / 36 * 1e3:.2f} ms a turn; scores are within {furthest:.1e} of NumPy's")


if __name__ == "__main__":
    main()
