"""Fold adapters into a base checkpoint, and verify the result."""
