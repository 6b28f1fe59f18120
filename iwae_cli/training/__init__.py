"""Training: one step, the schedule of learning rates, checkpoints, and the loop that joins them."""
