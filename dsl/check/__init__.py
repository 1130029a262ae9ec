"""The checker: from a syntax tree to a checked program, or diagnostics (see `check.run`)."""
