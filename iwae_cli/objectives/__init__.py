"""Objectives: bounds on log p(x), and the gradient estimators that maximize them."""
