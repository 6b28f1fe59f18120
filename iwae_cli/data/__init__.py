"""Data sets: observations, splits, binarization."""
