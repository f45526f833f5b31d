"""From attempts and targets to the loss of a micro-batch."""
