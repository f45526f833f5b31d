"""Inspect a recipe before training: the plan of a run, and measurements on its models."""
