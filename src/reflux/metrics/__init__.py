"""Metrics: values that can be merged, FLOP, confidence intervals, the metrics of a step, trackers, alarms."""
