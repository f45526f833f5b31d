"""Parts from outside the library, one a file; docs/extending.md walks through them."""
