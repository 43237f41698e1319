"""How weights change in a step: optimizers, learning rates, and the average of the weights."""
