"""Computes the loss of a micro-batch from attempts and targets."""
