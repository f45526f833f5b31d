"""Applies output heads to rows of hidden states."""
