"""Quadrature on a grid, and the picture of posteriors on it."""

from iwae_cli.evaluation.grid.estimator import Grid as Grid
