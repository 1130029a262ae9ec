"""Sequences of numbers counted in rows of numbers.

Source: the definition of TfIdfVectorizer in the ONNX operator reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from stagefuse.onnx.beyond import STRINGS
from stagefuse.onnx.errors import Refused
from stagefuse.onnx.node import Node, Val
from stagefuse.onnx.record import Written, op

MOST_COLUMNS = 1 << 22
MOST_DISTANCES = 256


@op("TfIdfVectorizer", unread=["max_skip_count"])
def _tf_idf(n: Node) -> Written:
    """How often each sequence of a pool is in a row, its elements up to a distance apart."""
    if n.attr("pool_strings"):
        raise Refused(f"a pool of strings, and {STRINGS}", attribute="pool_strings")
    text = f"i64({n.x(0)})" + ("[None]" if n.val(0).rank == 1 else "")
    rows, places, counts = n.let("tokens", text), list[int](), list[str]()
    for own, grams in _pools(n):
        places += own
        counts.append(_counted(n, rows, grams))
    indexes = n.attr("ngram_indexes")
    if len(set(indexes)) != len(indexes) or min(indexes, default=-1) < 0:
        raise Refused("no sequences, or two in one place", attribute="ngram_indexes")
    columns = max(indexes) + 1
    if columns > MOST_COLUMNS:
        raise Refused(f"a result of {columns} columns", attribute="ngram_indexes")
    counts = counts or [f"zeros([{rows.shape[0]}, 0], f32)"]
    table = n.let("counts", f"concat([{', '.join(counts)}], axis=1)").text
    at = {place: k for k, place in enumerate(places)}
    order = [at.get(k, len(places)) for k in range(columns)]
    if len(places) in order:  # a sequence of a length that is not counted
        table = n.let("counts", f"pad({table}, [(0, 0), (0, 1)])").text
    if order != list(range(len(places))):
        table = f"{table}[:, {n.x_of(n.constant(f'{n.hint}.places', np.array(order)))}]"
    y = n.let("found", _weighed(n, table, columns)).text
    return y if n.val(0).rank == 2 else f"{y}[0]"


def _pools(n: Node) -> Iterator[tuple[list[int], np.ndarray[tuple[int, ...], np.dtype[np.int64]]]]:
    """For each length that is counted: places in the result, and sequences [G, length]."""
    pool, starts, places = n.attr("pool_int64s"), n.attr("ngram_counts"), n.attr("ngram_indexes")
    low, high = n.attr("min_gram_length"), n.attr("max_gram_length")
    for length, (start, end) in enumerate(pairwise([*starts, len(pool)]), 1):
        grams = np.array(pool[start:end], np.int64).reshape(-1, length)
        own, places = places[: len(grams)], places[len(grams) :]
        if len(own) != len(grams):
            raise Refused("fewer places than sequences", attribute="ngram_indexes")
        if low <= length <= high and own:
            yield list(own), grams


def _counted(n: Node, rows: Val, grams: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> str:
    """How often each of the sequences is in each row, [B, G]. Single elements have no distance."""
    length, size = grams.shape[1], rows.shape[1].as_int()
    if size is None:
        raise Refused("rows of a length that varies", "a constant length")
    table = n.bound(n.constant(f"{n.hint}.grams{length}", grams), "grams")
    terms = []
    distances = min(n.attr("max_skip_count") + 1, (size - 1) // (length - 1)) if length > 1 else 1
    if distances > MOST_DISTANCES:
        raise Refused(f"sequences with {distances} distances", attribute="max_skip_count")
    for apart in range(1, distances + 1):
        same = " and ".join(
            f"{rows.text}[b, p + {k * apart}] == {table}[g, {k}]" for k in range(length)
        )
        count = f"sum[p in 0..{size - (length - 1) * apart}] f32({same})"
        terms.append(n.define("count", ["b", "g"], count).text)
    return " + ".join(terms) or f"zeros([{rows.shape[0]}, {len(grams)}], f32)"


def _weighed(n: Node, counts: str, columns: int) -> str:
    """Counts, or whether there are any, times the weights, given in the order of the pool."""
    mode, indexes = n.one_of("mode", "TF", "TF", "IDF", "TFIDF"), n.attr("ngram_indexes")
    given = n.attr("weights") or [1.0] * len(indexes)
    if len(given) != len(indexes):
        raise Refused(f"{len(given)} weights for {len(indexes)} sequences", attribute="weights")
    if mode == "TF":
        return counts
    weights = np.zeros(columns, np.float32)
    weights[indexes] = given
    weight = n.x_of(n.constant(f"{n.hint}.weights", weights))
    return f"{counts} * {weight}" if mode == "TFIDF" else f"select({counts} > 0.0, {weight}, 0.0)"
