"""Matrix products and convolutions on GPUs: tiles, operands on their way, epilogues, splits."""
