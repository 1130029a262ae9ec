"""The gallery's Whisper beside CTranslate2, from the same weights, both in f32.

Needs what `examples/packages.txt` lists, and ctranslate2. Ten seconds of reading: `hear` is ours
from samples to the keys and values of every layer, of CTranslate2 the encoder alone, from mel bands
to what keys and values are made of. `say` is the whole text, one token after the other. That both
say the same is checked first; how near their numbers are is for tests/test_gallery.py.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from statistics import median
from typing import Any

from .table import machine
from .worker import CLOCKS

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
Calls = dict[str, Callable[[], Any]]


def calls(threads: int) -> tuple[Calls, Calls]:
    """What is timed, by name, of stagefuse and of CTranslate2. Raises ValueError if they differ."""
    sys.path.insert(0, str(EXAMPLES))
    gallery, listen, references = (import_module(n) for n in ("gallery", "listen", "references"))
    import ctranslate2
    import numpy as np

    path = gallery.package_file("useful-moonshine-onnx", "beckett.wav")
    recording, listener = gallery.sound(path, listen.RATE), listen.Listener(threads)
    start = [listener.ids[f"<|{name}|>"] for name in (listen.TASK[0], "en", *listen.TASK[1:])]
    end, heard = listener.ids["<|endoftext|>"], listener.hear(samples=recording)

    def ours() -> list[int]:
        session, given, allowed = listener.say.session(S=listen.TEXT), start, listener.at_first
        found: list[int] = []
        while True:
            new = int(listener.after(session, heard, given, allowed).token)
            if new == end:
                return found
            found.append(new)
            given, allowed = [new], listener.allowed

    model = references.whisper(threads)
    mel = references.log_mel(recording).astype(np.float32)
    bands = ctranslate2.StorageView.from_array(mel[None])
    encoded = model.encode(bands)

    def theirs() -> list[int]:
        (found,) = model.generate(encoded, [start], beam_size=1)
        return list(found.sequences_ids[0])

    if ours() != theirs():
        raise ValueError(f"CTranslate2 says {theirs()}, and stagefuse {ours()}")
    return (
        {"hear": lambda: listener.hear(samples=recording), "say": ours},
        {"hear": lambda: model.encode(bands), "say": theirs},
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.listen", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    engines, clock = calls(options.threads), CLOCKS[options.clock]
    print(f"Machine: {machine()}; {options.threads} thread(s), {options.rounds} rounds, "
          f"{options.clock} time, ctranslate2 {metadata.version('ctranslate2')}.")  # fmt: skip
    print("\n| call | time over ctranslate2's | ctranslate2, ms | ours, ms | quickest calls |")
    print("| --- | --- | --- | --- | --- |")
    for name in engines[0]:
        times: tuple[list[float], list[float]] = ([], [])
        for number in range(options.rounds):
            for engine in (0, 1) if number % 2 else (1, 0):
                time.sleep(0.02)  # threads of the other, still spinning, come to rest
                began = clock()
                engines[engine][name]()
                times[engine].append((clock() - began) * 1e3)
        ratio = median(a / b for a, b in zip(*times, strict=True))
        ours, theirs = (median(found) for found in times)
        print(f"| {name} | **{ratio:.2f}** | {theirs:.0f} | {ours:.0f} "
              f"| {min(times[0]) / min(times[1]):.2f} |")  # fmt: skip


if __name__ == "__main__":
    main()
