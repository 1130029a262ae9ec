"""Proofs about sizes, positions and the elements of integer tensors."""
