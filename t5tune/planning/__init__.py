"""Predict the memory and the time of a run."""
