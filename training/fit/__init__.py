"""Training itself: the loop over epochs or days, its state and checkpoints, and what it starts from."""
