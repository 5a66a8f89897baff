"""Setting up a run: arguments, optimizer, averages, frozen parts, start weights, interruption, cost."""
