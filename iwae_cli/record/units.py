"""Active units as text: how many of how many in every layer, and where q has collapsed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

REMEDY = "a larger objective.k with objective=iwae, or a longer schedule=, may help"


def layer_sizes(model: Mapping[str, Any]) -> list[int]:
    """Return the sizes of the stochastic layers in the ``model`` node of a configuration, nearest to x first.

    Empty for a model whose keys are neither ``latent_sizes`` nor ``latent_size``.
    """
    sizes = model.get("latent_sizes", model.get("latent_size", []))
    sizes = sizes if isinstance(sizes, list) else [sizes]
    return sizes if all(type(size) is int for size in sizes) else []


def units_text(units: Sequence[float], sizes: Sequence[int]) -> str:
    """Return ``25 of 50 + 7 of 50``, means over seeds with one decimal; ``25 + 7`` where ``sizes`` are unknown."""
    counts = [f"{n:.0f}" if n == int(n) else f"{n:.1f}" for n in units]
    if len(sizes) == len(units):
        counts = [f"{count} of {size}" for count, size in zip(counts, sizes, strict=True)]
    return " + ".join(counts)


def collapsed(units: Sequence[float]) -> str:
    """Return the layers in which q has collapsed, such as ``h_2``: those without an active unit; empty if none."""
    return " and ".join(f"h_{layer}" for layer, n in enumerate(units, start=1) if n == 0)
