"""Checkpoints on disk, tensor by tensor. Nothing here builds a model or imports torch."""
