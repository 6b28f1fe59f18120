"""The shape of every further estimate that ``iwae-eval RUN estimator=...`` makes of a trained model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from iwae_cli.data.base import Data
from iwae_cli.evaluation.settings import Evaluation
from iwae_cli.models.base import LatentVariableModel
from iwae_cli.objectives.base import Objective


@dataclass(frozen=True)
class EstimatorInput:
    """What is looked at.

    Attributes:
        model: in evaluation mode, on its device; its dtype is the dtype of the computation.
        data: what it was trained on.
        evaluation: splits, seeds, and the bound on memory.
        objective: the objective of the run, or the one asked for instead, with ``k`` put in its place.
    """

    model: LatentVariableModel
    data: Data
    evaluation: Evaluation
    objective: Callable[[int], Objective]


@dataclass(frozen=True)
class Estimates:
    """What was found.

    Attributes:
        numbers: for ``result.json``: plain JSON, no NaN or infinity.
        hashes: of the splits that were looked at, by name.
        reasons: why a number is None, by its dotted name.
        arrays: per-image values for ``estimates.npz``, float64.
    """

    numbers: dict[str, Any]
    hashes: dict[str, str]
    reasons: dict[str, str]
    arrays: dict[str, np.ndarray]


class Estimator(ABC):
    """A way to look at a model. This is what a yaml of ``conf/estimator`` names."""

    @abstractmethod
    def estimate(self, subject: EstimatorInput, check: Callable[[], None]) -> Estimates:
        """Everything that goes into the record.

        Args:
            subject: what is looked at.
            check: called often; may raise to stop.

        Raises:
            UserError: it cannot be had of this model.
        """

    @abstractmethod
    def table(self, numbers: Mapping[str, Any]) -> list[list[str]]:
        """Rows of text to print, headings first, of a result that holds the numbers of ``estimate``."""

    @abstractmethod
    def notes(self, numbers: Mapping[str, Any]) -> list[str]:
        """What whoever reads the table should know, one line each."""
