"""Parts from outside the library, one per file. docs/extending.md explains them."""
