"""Runs: one training and its evaluation."""
