"""The folder of a run on disk."""
