"""Figures that take minutes and so are no tests: how fast (`speed`), how good on real and planted choices (`accuracy`)."""
