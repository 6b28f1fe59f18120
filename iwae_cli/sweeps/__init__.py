"""Sweeps: plans of jobs, launchers, searches."""
