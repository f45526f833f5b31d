"""Rows of hidden states through output heads."""
