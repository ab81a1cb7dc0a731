"""Convert a checkpoint for other tools."""
