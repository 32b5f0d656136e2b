"""What changes the weights: optimizers, their rates over time, and what is done to weights after a step."""
