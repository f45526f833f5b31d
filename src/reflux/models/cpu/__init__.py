"""Faster modules of text models on a CPU."""
