"""Inference servers of other projects: how the library starts, supervises, updates and stops them."""
