"""Reports: one self-contained HTML page per run, and the table of accuracies at the end of a run."""
