"""The records of ONNX ops: one file per family."""
