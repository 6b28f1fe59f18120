"""The forms of a training step."""
