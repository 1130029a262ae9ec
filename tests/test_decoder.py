"""The decoder of the examples: sessions, token by token, equal the model without a cache."""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import stagefuse as sf

from .test_examples import EXAMPLES

TOLERANCE = 4 * 2 * 192 * float(np.finfo(np.float32).eps)
"""Two layers, in each four products behind each other, of at most 192 terms near 1."""


@pytest.fixture(scope="module")
def decoder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("example_decoder", EXAMPLES / "decoder.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(found: Any, scores: Any) -> None:
    assert np.abs(found.scores - scores).max() < TOLERANCE
    best = np.sort(scores)
    assert found.token == scores.argmax() or best[-1] - best[-2] < 2 * TOLERANCE


def test_three_conversations_in_turn(decoder: ModuleType, rng: np.random.Generator) -> None:
    weights = decoder.random_weights(rng)
    with sf.compile(EXAMPLES / "decoder.pipe", weights={"w": weights}, device="cpu") as pipe:
        sessions = [pipe.session(S=64 + n) for n in range(3)]
        talks: list[list[int]] = [[], [], []]
        for turn in range(24):
            number = int(rng.integers(3))
            talk = talks[number]
            new = talk[-1:]
            if turn % 5 == 0 or not talk:
                new = [*new, *rng.integers(0, 256, 7).tolist()]
            talk[-1:] = new
            found = sessions[number](tokens=np.array(new))
            check(found, decoder.reference(weights, talk))
            talk.append(int(found.token))  # not yet given to the session
        for session, talk in zip(sessions, talks, strict=True):
            assert session.state["length"] == max(len(talk) - 1, 0)
        full = sessions[0]
        full.restore({**full.snapshot(), "length": np.array(64)})
        before = full.snapshot()
        with pytest.raises(sf.IndexOutOfRange, match="start of this slice of T positions"):
            full(tokens=np.array([1]))
        for name, value in full.snapshot().items():
            np.testing.assert_array_equal(value, before[name])
        for step in pipe._plan.steps:  # what a turn adds is all that is written
            if step.label == "turn.update":
                assert "S" not in step.report["bytes"]


@pytest.mark.slow
def test_two_conversations_in_the_emulator(decoder: ModuleType, rng: np.random.Generator) -> None:
    weights = decoder.random_weights(rng)
    with sf.compile(EXAMPLES / "decoder.pipe", weights={"w": weights}, device="emulator") as pipe:
        for size in (64, 67):
            session, talk = pipe.session(S=size), list[int]()
            for count in (3, 1):
                new = rng.integers(0, 256, count).tolist()
                talk += new
                check(session(tokens=np.array(new)), decoder.reference(weights, talk))
