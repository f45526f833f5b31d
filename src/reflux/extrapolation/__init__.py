"""Jumps along the student's path."""

EXTRAPOLATIONS = {"extrapolate": "reflux.extrapolation.extrapolate:Extrapolate"}
