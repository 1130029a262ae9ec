"""From lines, one for each node of a model, to source as a person would write it.

The lines become terms, equal ones shared, which rules rewrite to functions of the library; weights
get the names of their layers; what repeats becomes `fn` and `for`; the rest is layout.
"""
