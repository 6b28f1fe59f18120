"""Schedules: the number of passes over the data, and a factor on the learning rate for each."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import final

from iwae_cli.core.errors import check_range


class Schedule(ABC):
    """A number of passes and a factor for each. This is what a yaml of ``conf/schedule`` names.

    Args:
        passes: over the training split.
        patience: passes without a better validation bound, those of a KL warm-up not counted, after which the training
            ends; None: never.

    Raises:
        ValueError: passes or patience < 1.
    """

    def __init__(self, passes: int, patience: int | None = None) -> None:
        check_range("passes", passes, 1)
        check_range("patience", patience, 1)
        self.passes = passes
        self.patience = patience

    @abstractmethod
    def factor(self, pass_index: int) -> float:
        """Return the factor on the optimizer's learning rate in pass ``pass_index`` = 0, 1, ..."""


@final
class Burda(Schedule):
    """Stage i = 0, 1, ... has 3^i passes at 10^(-i/7) (Burda, Grosse, Salakhutdinov 2016, arXiv 1509.00519).

    All eight stages are the paper's 3,280 passes, from lr to lr / 10; the authors' code rounds the factors.

    Args:
        stages: how many of the eight, from the first.

    Raises:
        ValueError: stages outside 1 to 8.
    """

    def __init__(self, stages: int = 8, patience: int | None = None) -> None:
        if not 1 <= stages <= 8:
            raise ValueError(f"stages must be 1 to 8, got {stages}")
        super().__init__((3**stages - 1) // 2, patience)

    def factor(self, pass_index: int) -> float:
        """Return 10^(-i/7) in stage i, whose first pass is (3^i - 1) / 2."""
        stage = 0
        while pass_index >= (3 ** (stage + 1) - 1) // 2:
            stage += 1
        return float(10 ** (-stage / 7))


@final
class Constant(Schedule):
    """The optimizer's own learning rate throughout."""

    def factor(self, pass_index: int) -> float:
        """Return 1."""
        return 1.0


@final
class Exponential(Schedule):
    """final^(t / (passes - 1)): from 1 in the first pass to ``final`` in the last, by equal ratios.

    Raises:
        ValueError: passes < 1 or final outside (0, 1].
    """

    def __init__(self, passes: int, final: float = 0.1, patience: int | None = None) -> None:
        super().__init__(passes, patience)
        if not 0 < final <= 1:
            raise ValueError(f"final must be in (0, 1], got {final}")
        self.final = final

    def factor(self, pass_index: int) -> float:
        """See the class; 1 where there is one pass only."""
        return float(self.final ** (pass_index / max(1, self.passes - 1)))


@final
class Cosine(Schedule):
    """Half a cosine without restarts (Loshchilov and Hutter 2017, arXiv 1608.03983).

    final + (1 - final) (1 + cos(pi t / passes)) / 2: 1 in the first pass, just above ``final`` in the last,
    so that no pass is spent at a learning rate of zero.

    Raises:
        ValueError: passes < 1 or final outside [0, 1].
    """

    def __init__(self, passes: int, final: float = 0.0, patience: int | None = None) -> None:
        super().__init__(passes, patience)
        if not 0 <= final <= 1:
            raise ValueError(f"final must be in [0, 1], got {final}")
        self.final = final

    def factor(self, pass_index: int) -> float:
        """See the class."""
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * pass_index / self.passes)) / 2
