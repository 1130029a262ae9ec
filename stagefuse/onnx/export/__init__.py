"""A checked pipeline as an ONNX model, in the standard's own domain.

`lower.py` walks the dataflow graph before any pass, where a reshape is still a reshape. Each node
gets a *form*: what it needs, and how it is written. Forms are found by structure, as in the rest
of the compiler: a softmax is a Softmax whoever wrote it. What repeats along an axis stays small
(ONNX broadcasts as NumPy does) until something needs it whole.
"""
