"""Checked program to plan: dataflow graph, fusion, kernel IR, native code."""
