"""Settings of the training besides objective, optimizer and schedule."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Literal

from iwae_cli.core.errors import check_range
from iwae_cli.objectives.base import BoundObjective, Objective

Backward = Literal["all", "roulette"]

LEAST_CLIP = 1e-6
"""A shorter gradient is lost beside the eps of Adam, or in the rounding of the weights."""
EMA = 0.01, 0.999999
"""Decays from that of no average to that of a million steps."""
EXACT_EMA = 0.9999
"""A larger decay adds less to a weight than float32 may hold."""


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
        check_range("k", self.k, 1, 100_000_000)
        check_range("every", self.every, 1, sys.maxsize)


@dataclass(frozen=True)
class Training:
    """How a step is made. This is what the node ``training`` of the configuration names.

    Args:
        backward: differentiate ``all`` draws, or the survivors of a Russian ``roulette``: the same expected gradient.
        tau: roulette threshold; draws with at least this share of the weight always survive.
        kl_warmup: in pass n <= kl_warmup, log p(h) - log q(h|x) is multiplied by n / kl_warmup inside log w.
        clip: largest Euclidean norm of the gradient of all parameters together; a longer one is scaled down to it.
        ema: decay of an exponential moving average of the weights, which is what is validated and evaluated.

    Raises:
        ValueError: a number out of range.
    """

    backward: Backward = "all"
    tau: float = 0.01
    kl_warmup: int = 0
    clip: float | None = None
    ema: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.tau <= 1:
            raise ValueError(f"tau must be in (0, 1], got {self.tau}")
        check_range("kl_warmup", self.kl_warmup, 0, sys.maxsize)
        if self.clip is not None and not LEAST_CLIP <= self.clip < math.inf:
            raise ValueError(f"clip must be null or finite and at least {LEAST_CLIP:g}, got {self.clip}")
        if self.ema is not None and not EMA[0] <= self.ema <= EMA[1]:
            raise ValueError(f"ema must be null or from {EMA[0]} to {EMA[1]} (such as 0.999), got {self.ema}")

    def check(self, objective: Objective) -> str | None:
        """Return why these settings cannot be used with this objective, naming what can; None if they can."""
        name = type(objective).__name__
        if self.backward == "roulette" and not rests_on_weights(objective):
            return (
                "training.backward=roulette needs a bound that is differentiated through the weights of its draws; "
                f"{name} as chosen is not: use objective=iwae, ciwae, miwae, umiwae, vr or jvi with "
                "objective.gradient=total, or training.backward=all"
            )
        if self.kl_warmup and self.backward == "roulette":
            return "training.kl_warmup cannot be combined with training.backward=roulette: leave one of them out"
        if self.kl_warmup and (objective.needs_score or not objective.takes_kl_weight):
            return (
                f"training.kl_warmup changes what the gradient of {name} as chosen rests on: use training.kl_warmup=0, "
                "or for real latents a bound with objective.gradient=total or stl and a sampled KL, as objective=iwae"
            )
        return None


PLAIN = Training()
"""The settings that leave a step as it is."""


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
