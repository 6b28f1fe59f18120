"""Latent variable models: a generative network p(x, h) and an inference network q(h|x)."""
