"""Structures that are found in a graph, whatever they were written as: products, attention."""
