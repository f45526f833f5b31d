"""Jumps along the student's path."""

ACCELERATORS = {"extrapolate": "reflux.accelerators.extrapolate:Extrapolate"}
