"""What a run is: its folder, its checkpoints, its checks, and how it resumes."""
