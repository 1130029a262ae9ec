"""Attention on GPUs: how it is cut into blocks, and the tiles of warps and warpgroups."""
