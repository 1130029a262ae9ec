"""Measurements and checks that need an NVIDIA GPU; `python -m benchmarks.gpu` takes all of them."""
