"""TfIdfVectorizer on numbers: weighed counts of sequences, which the node tests do not weigh."""

from __future__ import annotations

import numpy as np
import pytest

import stagefuse as sf
from stagefuse.onnx import OnnxError, import_model

from .models import model, node

I64 = 7
POOL = [[(3,), (0,)], [(1, 2), (2, 2), (0, 1)], [(1, 2, 0), (2, 2, 2)]]
"""Sequences by length."""
PLACES, WEIGHTS = [4, 0, 1, 6, 3, 2, 5], [0.5, 2.0, 1.5, 0.25, 3.0, 0.75, 1.25]


def attributes(**more: object) -> dict[str, object]:
    return {
        "pool_int64s": [v for grams in POOL for gram in grams for v in gram],
        "ngram_counts": [0, 2, 8], "ngram_indexes": PLACES, "weights": WEIGHTS, **more,
    }  # fmt: skip


def counted(row: list[int], low: int, high: int, skip: int) -> list[int]:
    """How often each sequence of the pool is in a row, in the pool's order."""
    found = []
    for length, grams in enumerate(POOL, 1):
        windows = [
            tuple(row[p + k * apart] for k in range(length))
            for apart in range(1, (skip if length > 1 else 0) + 2)
            for p in range(len(row) - (length - 1) * apart)
        ]
        found += [windows.count(gram) if low <= length <= high else 0 for gram in grams]
    return found


@pytest.mark.parametrize("low, high, skip", [(1, 1, 0), (1, 3, 2), (2, 3, 5), (2, 2, 1)])
@pytest.mark.parametrize("mode", ["TF", "IDF", "TFIDF"])
def test_sequences_are_counted_and_weighed(
    mode: str, low: int, high: int, skip: int, rng: np.random.Generator
) -> None:
    x = rng.integers(0, 4, (3, 9))
    made = model(
        [node("TfIdfVectorizer", ["x"], ["y"], mode=mode, min_gram_length=low,
              max_gram_length=high, max_skip_count=skip, **attributes())],
        {"x": (I64, ["n", 9])}, ["y"],
    )  # fmt: skip
    found = import_model(made)
    y = sf.compile(found.text, weights={"w": found.arrays})(x=x)
    wanted = np.zeros((3, 7), np.float32)
    counts = np.array([counted(list(row), low, high, skip) for row in x.tolist()])
    terms = {"TF": counts, "IDF": (counts > 0) * WEIGHTS, "TFIDF": counts * WEIGHTS}[mode]
    wanted[:, PLACES] = terms
    np.testing.assert_array_equal(y, wanted)


@pytest.mark.parametrize(
    "more, words",
    [({"ngram_indexes": [0] * 7}, "two in one place"), ({"weights": [1.0]}, "1 weights for 7"),
     ({"pool_strings": ["a"]}, "strings are out of scope"),
     ({"ngram_indexes": [0, 1]}, "fewer places than sequences"),
     ({"ngram_indexes": [0, 1, 2, 3, 4, 5, 1 << 40]}, "a result of 1099511627777 columns"),
     ({"max_skip_count": 1 << 40}, "sequences with 8999 distances")],
)  # fmt: skip
def test_a_pool_that_does_not_fit_is_refused(more: dict[str, object], words: str) -> None:
    made = model(
        [node("TfIdfVectorizer", ["x"], ["y"], mode="TFIDF", min_gram_length=1, max_gram_length=2,
              **{"max_skip_count": 0, **attributes(), **more})],
        {"x": (I64, [9000])}, ["y"],
    )  # fmt: skip
    with pytest.raises(OnnxError, match=words):
        import_model(made)
