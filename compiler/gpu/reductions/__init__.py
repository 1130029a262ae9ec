"""Reductions on GPUs that rows of a team do not cover: columns, long rows, small windows."""
