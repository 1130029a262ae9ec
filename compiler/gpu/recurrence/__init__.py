"""Recurrences as one kernel on GPUs."""
