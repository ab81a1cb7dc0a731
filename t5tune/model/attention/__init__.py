"""Attention over packed rows, by model type."""
