"""Evaluation: estimates of log p(x), what is known of their errors, and the units a model uses."""
