"""What is not imported by design: values that are no tensors of numbers, training, and chance."""

from __future__ import annotations

STRINGS = "strings are out of scope"
KINDS = {"sequence": "sequences are out of scope", "optional": "optionals are out of scope"}
"""By the kind of a value's type."""
TRAINING = "training is out of scope"
CHANCE = "random numbers are out of scope: the same inputs give the same results"
_OPS = {
    STRINGS: ("RegexFullMatch", "StringConcat", "StringNormalizer", "StringSplit"),
    KINDS["sequence"]: (
        "ConcatFromSequence", "SequenceAt", "SequenceConstruct",
        "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength", "SequenceMap",
        "SplitToSequence"),
    KINDS["optional"]: ("Optional",),
    TRAINING: ("Adagrad", "Adam", "Gradient", "Momentum"),
    CHANCE: ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform",
             "RandomUniformLike"),
    "files of images are out of scope: give arrays": ("ImageDecoder",),
}  # fmt: skip


def reason(op: str) -> str:
    """Why an op is not imported; empty where nothing but a record is missing."""
    return next((why for why, ops in _OPS.items() if op in ops), "")
