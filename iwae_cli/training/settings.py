"""How a step goes back through its draws."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Literal, get_args

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


class Training:
    """What of a training is neither its objective nor its optimizer. This is what a yaml of ``conf/training`` names.

    Args:
        backward: ``all`` draws, or those that a Russian ``roulette`` leaves: the same gradient in expectation.
        tau: with ``roulette``, draws with at least this share of the weight are always sent back.

    Raises:
        ValueError: unknown ``backward``, or tau outside (0, 1].
    """

    def __init__(self, backward: Backward = "all", tau: float = 0.01) -> None:
        if backward not in get_args(Backward):
            raise ValueError(f"backward must be one of {', '.join(get_args(Backward))}, got {backward!r}")
        if not (math.isfinite(tau) and 0 < tau <= 1):
            raise ValueError(f"tau must be in (0, 1], got {tau}")
        self.backward: Backward = backward
        self.tau = tau

    def check(self, objective: Objective) -> str | None:
        """Why draws of this objective cannot be left out, in words that name what can; None if they can."""
        if self.backward == "all" or rests_on_weights(objective):
            return None
        return (
            "training.backward=roulette leaves out draws of a bound that is differentiated through their weights; "
            f"{type(objective).__name__} as chosen is not: use objective=iwae, ciwae, miwae, vr or jvi with "
            "objective.gradient=total, or training.backward=all"
        )


def rests_on_weights(objective: Objective) -> bool:
    """Whether the gradient is sum_i a_i dlog w_i for both networks, with a = ``objective.weights``.

    Not so with ``stl`` and ``dreg``, which give the two networks different gradients, nor where a class has losses
    of its own: ELBO's, whose weights are all equal anyway, TVO's and those that are not of a bound.
    """
    return (
        isinstance(objective, BoundObjective)
        and objective.gradient == "total"
        and type(objective).losses is BoundObjective.losses
    )
