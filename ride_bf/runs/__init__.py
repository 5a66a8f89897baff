"""What a run leaves on disk: its folder, its checkpoints, and the record of its data and environment."""
