"""What training and evaluation need beyond the network: recipes, losses, metrics, checkpoints and commands."""
