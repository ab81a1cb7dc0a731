"""Prepare a cache in parts, by several processes or machines."""
