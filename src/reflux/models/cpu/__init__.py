"""Faster modules for text models on a CPU."""
