"""The recipe: how it is read, merged and validated, and what a part is told of it."""
