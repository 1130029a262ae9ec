"""Plans on NVIDIA GPUs, through cuda-python."""
