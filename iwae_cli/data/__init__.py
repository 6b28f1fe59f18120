"""Data sets: what is observed, how it is split, and how it is binarized."""
