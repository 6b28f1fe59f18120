"""Annealed importance sampling."""

from iwae_cli.evaluation.ais.estimator import AIS as AIS
