"""The training loop, its minibatches and schedule, the forms of a step, and checkpoints."""
