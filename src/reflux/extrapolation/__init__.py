"""Jumps along the student's path."""

ACCELERATORS = {"extrapolate": "reflux.extrapolation.extrapolate:Extrapolate"}
