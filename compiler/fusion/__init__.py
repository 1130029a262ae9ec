"""Which kernel computes each node, and in what order kernels run."""
