"""A run: its folder, its checkpoints, its checks, and how it resumes."""
