"""Exceptions that the compiler and the reader of plans raise, besides diagnostics."""

from __future__ import annotations


class PlanError(ValueError):
    """A plan file that is damaged, foreign, of another version, or inconsistent in itself."""


class InternalError(RuntimeError):
    """A fault of stagefuse itself, never of the program or its inputs."""
