"""Find where someone speaks in a recording, with Silero VAD."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import gallery
import numpy as np

import stagefuse as sf

RATE, STEP = 16000, 512  # samples a second, and of a call
SPEECH, SILENCE = 0.5, 0.35  # speech begins above the first, and ends below the second
GAP, LEAST = 0.1, 0.25  # seconds of silence within speech, and of speech at least
Array = np.ndarray[Any, Any]


def pipeline(threads: int | None = 1) -> sf.Pipeline:
    """The model, imported and compiled."""
    model = gallery.imported(
        "silero", "silero-vad", "silero_vad_op18_ifless.onnx", fixed={"sr": RATE},
        sizes={"batch": (1, 4096), "sequence": 576},
    )  # fmt: skip
    return sf.load(gallery.compiled("speech.pipe", [model.name]), threads=threads)


def probabilities(pipe: sf.Pipeline, recording: Array) -> Array:
    """How likely each step of a recording is speech: f32 [steps], from f32 [samples]."""
    steps = -(-len(recording) // STEP)
    padded = np.zeros((steps, 1, STEP), np.float32)
    padded.reshape(-1)[: len(recording)] = recording
    session = pipe.session(B=1)
    return np.concatenate([session(samples=samples) for samples in padded])


def spoken(found: Array) -> list[tuple[float, float]]:
    """Where speech begins and ends, in seconds."""
    spans: list[list[float]] = []
    speaks = False
    for step, p in enumerate(found):
        at = step * STEP / RATE
        if not speaks and p >= SPEECH:
            if spans and at - spans[-1][1] < GAP:
                spans[-1][1] = at
            else:
                spans.append([at, at])
        speaks = p >= (SILENCE if speaks else SPEECH)
        if speaks:
            spans[-1][1] = at + STEP / RATE
    return [(begin, end) for begin, end in spans if end - begin >= LEAST]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recording", type=Path, nargs="?", help=".wav; default: someone reading")
    options = parser.parse_args()
    path = options.recording or gallery.package_file("useful-moonshine-onnx", "beckett.wav")
    recording, pipe = gallery.sound(path, RATE), pipeline()
    started = time.perf_counter()
    found = probabilities(pipe, recording)
    taken = time.perf_counter() - started
    spans = spoken(found)
    for begin, end in spans:
        print(f"{begin:6.2f} s to {end:6.2f} s")
    seconds = len(recording) / RATE
    print(f"{sum(end - begin for begin, end in spans):.1f} of {seconds:.1f} s are speech; "
          f"{len(found)} calls of {taken / len(found) * 1e3:.2f} ms, "
          f"{seconds / taken:.0f} times as fast as it is spoken")  # fmt: skip


if __name__ == "__main__":
    main()
