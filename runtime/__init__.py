"""Plans and arrays to arrays: loading, buffers, threads, calls."""
