"""GPU code: kernel IR to PTX, ptxas, and what is known of a launch without running it."""
