"""Write down the notes of a recording, with basic-pitch; without one, of a tune made here."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gallery
import numpy as np

import stagefuse as sf

RATE, FRAME, WINDOW, STEP, OVERLAP = 22050, 256, 43844, 36164, 7680  # samples
BEGINS, SOUNDS = 0.5, 0.3  # how likely a note must be to begin, and to go on
LEAST, PATIENCE = 11, 11  # frames of a note, and of silence before it has ended
LOWEST = 21  # the MIDI number of a piano's first key
KEYS = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
TUNE = ((60, 0.1, 0.5), (62, 0.6, 0.5), (64, 1.1, 0.5), (60, 1.6, 0.5), (64, 2.1, 0.5),
        (65, 2.6, 0.5), (60, 3.1, 0.9), (64, 3.1, 0.9), (67, 3.1, 0.9))  # fmt: skip
"""Keys as MIDI numbers, when they are struck, and how long they sound, in seconds."""

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, order=True)
class Note:
    """A key that sounds from `begin` to `end`, in seconds, and how likely it does."""

    begin: float
    end: float
    midi: int
    probability: float

    @property
    def name(self) -> str:
        return f"{KEYS[self.midi % 12]}{self.midi // 12 - 1}"


def tune() -> Array:
    """The tune, struck strings of eight harmonics: f32 [samples]."""
    played = np.zeros(int(RATE * max(at + lasts for _, at, lasts in TUNE)))
    for midi, at, lasts in TUNE:
        t = np.arange(int(lasts * RATE)) / RATE
        base = 2 * np.pi * 440 * 2 ** ((midi - 69) / 12)
        tone = sum(np.sin(base * h * t) / h**1.5 for h in range(1, 9))
        fade = np.minimum(1, np.minimum(t, t[::-1]) / 0.01)  # no clicks
        played[int(at * RATE) :][: len(t)] += np.exp(-2 * t) * fade * tone
    return np.asarray(0.7 * played / np.abs(played).max(), np.float32)


def pipeline(threads: int | None = None) -> sf.Pipeline:
    """The model, imported and compiled."""
    model = gallery.imported("basic_pitch", "basic-pitch", "icassp_2022/nmp.onnx",
                             sizes={"unk__749": (1, 1024)})  # fmt: skip
    return sf.load(gallery.compiled("transcribe.pipe", [model.name]), threads=threads)


def maps(pipe: sf.Pipeline, recording: Array) -> tuple[Array, Array]:
    """How likely each key sounds, and begins to: two of f32 [frames, 88]."""
    before = OVERLAP // 2
    windows = -(-(len(recording) + before) // STEP)
    audio = np.zeros(windows * STEP + OVERLAP, np.float32)
    audio[before : before + len(recording)] = recording
    found = pipe(audio=audio)
    frames = len(recording) // FRAME
    return found.note[:frames], found.onset[:frames]


def notes(note: Array, onset: Array) -> list[Note]:
    """The notes of the two maps: each from a peak of `onset` on, as long as `note` is high.

    A rise of `note` over two frames counts as an onset too.
    """
    frames = len(note)
    rise = np.zeros_like(note)
    rise[2:] = np.minimum(note[2:] - note[1:-1], note[2:] - note[:-2]).clip(0)
    begins = np.maximum(onset, rise * (onset.max() / max(rise.max(), 1e-9)))
    peak = np.zeros(note.shape, bool)
    peak[1:-1] = (begins[1:-1] > begins[:-2]) & (begins[1:-1] > begins[2:])
    left, found = note.copy(), []
    for begin, key in sorted(np.argwhere(peak & (begins >= BEGINS)).tolist(), reverse=True):
        end, quiet = begin + 1, 0
        while end < frames - 1 and quiet < PATIENCE:
            quiet = quiet + 1 if left[end, key] < SOUNDS else 0
            end += 1
        end -= quiet
        if end - begin > LEAST:
            left[begin:end, max(key - 1, 0) : key + 2] = 0  # and what rings beside it
            probability = float(note[begin:end, key].mean())
            seconds = FRAME / RATE
            found.append(Note(begin * seconds, end * seconds, key + LOWEST, probability))
    return sorted(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recording", type=Path, nargs="?", help=".wav; default: a tune made here")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    pipe = pipeline(options.threads)
    recording = gallery.sound(options.recording, RATE) if options.recording else tune()
    for note in notes(*maps(pipe, recording)):
        print(f"{note.begin:6.2f} s  {note.name:<4}{note.end - note.begin:5.2f} s long, "
              f"probability {note.probability:.2f}")  # fmt: skip
    if not options.recording:
        played = (f"{at:.2f} s {Note(at, at, midi, 1).name}" for midi, at, _ in TUNE)
        print("played: " + ", ".join(played))
    seconds = len(recording) / RATE
    ms = gallery.milliseconds(lambda: maps(pipe, recording), 5)
    print(f"{ms:.0f} ms for {seconds:.1f} s of music, on {pipe.threads} threads")


if __name__ == "__main__":
    main()
