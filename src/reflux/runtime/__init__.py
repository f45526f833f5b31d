"""Objects that the parts of one process share, and the order of their work."""
