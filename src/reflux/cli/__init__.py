"""What the command line prints; the work is done elsewhere."""
