"""Recipes: reading, merging and validation, and the context that each part gets."""
