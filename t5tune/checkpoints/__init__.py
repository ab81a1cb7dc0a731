"""Read and write checkpoints on disk, one tensor at a time. No module here builds a model or imports torch."""
