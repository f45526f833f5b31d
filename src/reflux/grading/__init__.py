"""Verdicts of tasks in worker processes, and whether an answer is right."""
