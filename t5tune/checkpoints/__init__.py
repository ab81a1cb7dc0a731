"""Read and write checkpoints on disk, one tensor at a time. No module here builds a model or imports torch.

If a file is missing, broken or can't be trusted, its reader raises a CheckpointError that names the file.
"""
