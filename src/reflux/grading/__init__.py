"""Runs the verifiers of tasks in worker processes, and compares answers."""
