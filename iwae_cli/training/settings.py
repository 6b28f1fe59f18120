"""Settings of the training besides objective, optimizer and schedule."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

from iwae_cli.objectives.base import BoundObjective, Objective

Backward = Literal["all", "roulette"]


@dataclass(frozen=True)
class Validation:
    """L_k of the validation split during training. This is what a yaml of ``conf/validation`` names.

    Args:
        k: samples per image, the same for every objective.
        every: passes between two validations; the last pass is always validated.

    Raises:
        ValueError: a number out of range.
    """

    k: int
    every: int

    def __post_init__(self) -> None:
        for name, most in (("k", 100_000_000), ("every", sys.maxsize)):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
            if value > most:
                raise ValueError(f"{name} must be <= {most:,}, got {value:,}")


@dataclass(frozen=True)
class Training:
    """How a step differentiates its draws. This is what a yaml of ``conf/training`` names.

    Args:
        backward: differentiate ``all`` draws, or the survivors of a Russian ``roulette``: the same expected gradient.
        tau: roulette threshold; draws with at least this share of the weight always survive.

    Raises:
        ValueError: tau outside (0, 1].
    """

    backward: Backward = "all"
    tau: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.tau <= 1:
            raise ValueError(f"tau must be in (0, 1], got {self.tau}")

    def check(self, objective: Objective) -> str | None:
        """Return why the roulette cannot be used with this objective, naming what can; None if it can."""
        if self.backward == "all" or rests_on_weights(objective):
            return None
        return (
            "training.backward=roulette needs a bound that is differentiated through the weights of its draws; "
            f"{type(objective).__name__} as chosen is not: use objective=iwae, ciwae, miwae, vr or jvi with "
            "objective.gradient=total, or training.backward=all"
        )


def rests_on_weights(objective: Objective) -> bool:
    """Return whether the gradient is sum_i a_i dlog w_i for both networks, with a = ``objective.weights``.

    Not with ``stl`` and ``dreg``, which give the two networks different gradients, nor for a class that overrides
    ``losses``: ELBO, whose weights are all equal anyway, TVO, and objectives that are no bound.
    """
    return (
        isinstance(objective, BoundObjective)
        and objective.gradient == "total"
        and type(objective).losses is BoundObjective.losses
    )
