"""Training: one step as a pure function, the loop around it, checkpoints, and resuming."""
