"""What a run leaves on disk: its folder, its checkpoints, what they know, and what it was made with."""
