"""Text to checked program: syntax, types, dimensions, diagnostics."""
