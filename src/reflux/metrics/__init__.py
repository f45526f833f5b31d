"""Numbers: values that merge, costs, intervals, the line of a step, trackers."""
