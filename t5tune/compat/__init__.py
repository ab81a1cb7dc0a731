"""Minimum versions of dependencies."""
