"""Convert a checkpoint for another tool."""
