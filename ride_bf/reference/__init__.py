"""The authors' configurations and checkpoints."""
