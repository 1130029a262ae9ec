"""Scans, sorts and scatters on GPUs."""
