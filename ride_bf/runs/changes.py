"""What may change between the starts of a run. It needs no torch, so the command line reads it too."""

# Settings that --allow_changes can name. Another one would be another run.
SOUND_CHANGES = ("num_processes", "num_workers", "mixed_precision", "data_dir", "epochs")
