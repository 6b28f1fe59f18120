"""A run folder in Python, for notebooks and scripts: its model, data and numbers."""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Shaped
from torch import Tensor

from iwae_cli.config.build import construct
from iwae_cli.core.errors import check_range
from iwae_cli.core.noise import GeneratorNoise, generator
from iwae_cli.data.base import Data, Split
from iwae_cli.evaluation.active_units import RULES, posterior_means
from iwae_cli.evaluation.estimator import EstimatorInput
from iwae_cli.evaluation.likelihood import log_likelihood
from iwae_cli.evaluation.settings import MAX_K, Evaluation
from iwae_cli.models.base import LatentVariableModel
from iwae_cli.objectives.base import Objective
from iwae_cli.record.folder import RunFolder
from iwae_cli.record.jsonl import read_history
from iwae_cli.runs.evaluate import trained
from iwae_cli.training import checkpoint

Observations = Shaped[Tensor, "n *_"] | Shaped[np.ndarray, "n *_"]
"""(n, pixels) or (n, *image_shape), any dtype: {0, 1} for binary data, grey levels, or real values."""


class Run:
    """A run folder, see ``open_run``. Model and data are read when they are first used.

    Attributes:
        path: the folder.
        config: the resolved configuration. Where the files of a data set lie elsewhere now, set
            ``config["data"]["data_dir"]`` (or ``["path"]``) before the first ``split``.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self.path = folder.path
        self.config = folder.config()

    def __repr__(self) -> str:
        return f"<run {self.path.name}>"

    @property
    def result(self) -> dict[str, Any] | None:
        """The content of ``result.json``; None unless the run is finished."""
        return self._folder.result()

    @property
    def metrics(self) -> list[dict[str, float | int | None]]:
        """The rows of ``metrics.jsonl``: one dict for every pass, with ``step``; ``pandas.DataFrame`` takes them."""
        return [{"step": step, **row} for step, row in read_history(self.path)]

    @cached_property
    def model(self) -> LatentVariableModel:
        """The model with the weights that the run was evaluated with, on the CPU, in evaluation mode.

        ``model(x, k)`` is log w, (k, n), nats; ``model.generative`` is p(x, h) and ``model.inference`` q(h|x).
        """
        best = self._evaluation.weights == "best"
        weights = checkpoint.load_best(self._folder.best, self._state)[1] if best else self._state.weights
        return trained(self._folder, self.config, self._state, weights)

    @cached_property
    def objective(self) -> Objective:
        """The objective that was trained; ``objective.bound(log_w)`` takes log w of (k, n) to (n,), nats."""
        objective: Objective = construct(self.config, ("objective",))["objective"]
        return objective

    @cached_property
    def data(self) -> Data:
        """The data set, all splits in memory, with grey levels as they are stored.

        Raises:
            UserError: its files are missing, or are not those that the run was trained on.
        """
        data: Data = construct(self.config, ("data",))["data"].load()
        checkpoint.require_data(self._state.identity, self._state.data_sha256, data.sha256(), data.name)
        return data

    def split(self, name: str) -> Split:
        """Return ``train``, ``validation`` or ``test`` as it was evaluated: ``x``, (n, pixels), and ``labels``, (n,).

        ``x`` is binarized with the seed of the evaluation where the run binarizes: uint8 in {0, 1}; else it is uint8
        grey levels, or float32. ``labels`` is None where the data set gives no classes. ``UserError`` as for ``data``.
        """
        return EstimatorInput(self.model, self.data, self._evaluation).split(name)

    def encode(self, x: Observations, seed: int = 0) -> tuple[Float[Tensor, "n _"], ...]:
        """Return E[h_l|x] under q for every stochastic layer, nearest to x first, (n, d_l) each, float64.

        A first layer with a closed form has exact means. Other means are over 500 draws, which ``seed`` decides.

        Raises:
            ValueError: x has another number of pixels, or values that p(x|h) has not (grey levels of binary data).
        """
        draws = RULES["active_units"][2]
        means = posterior_means(self.model, self._checked(x), draws, seed, "encode", self._evaluation.rows)
        return tuple(map(torch.from_numpy, means))

    def sample(self, n: int, seed: int = 0) -> Float[Tensor, "n pixels"]:
        """Return ``n`` draws of x ~ p(x), (n, pixels), which ``seed`` decides."""
        check_range("n", n, 1)
        parameter = next(self.model.parameters())
        noise = GeneratorNoise(generator(parameter.device, seed, "sample"), parameter.dtype)
        with torch.no_grad():
            return self.model.generative.sample(n, noise)[1]

    def log_px(self, x: Observations | Split, k: int, seed: int = 0) -> Float64[Tensor, " n"]:
        """Return L_k of every observation, the estimate of log p(x) from ``k`` draws of q, (n,), nats.

        The noise depends on (seed, split, position of x, draw): on the CPU ``log_px(run.split("test"), k)``, or of its
        ``x``, has the values in ``log_likelihood.npz``, for ``evaluation.k`` and ``evaluation.seed`` (0 by default) of
        the run. An ``x`` without its split has the noise of ``test``.

        Raises:
            ValueError: as ``encode``.
            RunFailed: a probability above 1, of integers.
        """
        check_range("k", k, 1, MAX_K)
        split = x if isinstance(x, Split) else Split("test", self._checked(x), "")
        found = log_likelihood(self.model, split, k=k, seed=seed, rows=self._evaluation.rows)
        return torch.from_numpy(found.log_px)

    @cached_property
    def _state(self) -> checkpoint.State:
        return checkpoint.load(self._folder.checkpoint)

    @cached_property
    def _evaluation(self) -> Evaluation:
        evaluation: Evaluation = construct(self.config, ("evaluation",))["evaluation"]
        return evaluation

    def _checked(self, x: Observations) -> Shaped[Tensor, "n pixels"]:
        shape, rows = self._state.image_shape, torch.as_tensor(x)
        pixels = math.prod(shape)
        if tuple(rows.shape[1:]) not in ((pixels,), shape) or len(rows) == 0:
            raise ValueError(f"x must be (n, {pixels}) or (n, {', '.join(map(str, shape))}), got {tuple(rows.shape)}")
        rows = rows.reshape(-1, pixels)
        self.model.generative.require_observable(rows)
        return rows


def open_run(run_folder: str | Path) -> Run:
    """Return a run folder as an object: ``run = iwae_cli.open("outputs/<run>")``.

    Raises:
        UserError: no run folder, or a damaged one. Without a checkpoint, or without data, only what needs them fails.
    """
    return Run(RunFolder(Path(run_folder).expanduser()))
