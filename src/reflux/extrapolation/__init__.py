"""Extrapolation: the parts that move the student's weights further along their latest displacement."""

EXTRAPOLATIONS = {"extrapolate": "reflux.extrapolation.extrapolate:Extrapolate"}
