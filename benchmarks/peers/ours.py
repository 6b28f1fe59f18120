"""iwae-cli, by the doors its own command line takes: the same composition, trainer, step and evaluation."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import iwae_cli
from benchmarks.cases import CHECK_STEPS, SIZES, Job
from benchmarks.worker import Tick, serve
from iwae_cli.cli_compose import plan
from iwae_cli.construct import construct
from iwae_cli.data.base import Split
from iwae_cli.evaluation.likelihood import log_likelihood
from iwae_cli.experiment import Experiment
from iwae_cli.run_folder import RunFolder
from iwae_cli.session import Session
from iwae_cli.signals import Signals
from iwae_cli.training.checkpoint import State
from iwae_cli.training.step import train_step


class Ours:
    """A session of ``iwae-train`` whose hooks are the benchmark's."""

    def __init__(self, job: Job) -> None:
        latent, hidden = SIZES[job.case.model]
        overrides = [
            f"model.latent_sizes={latent}",
            f"model.hidden_sizes={hidden}",
            f"model={'one_layer' if len(latent) == 1 else 'two_layer'}",
            f"objective.k={job.case.k if job.case.kind == 'train' else 5}",
            f"batch_size={job.case.batch or 20}",
            f"seed={job.seed}",
            "schedule=constant",
            "schedule.passes=1000",
            "evaluation.validation_every=1000",
            "device=cpu",
            "logger=disabled",
            f"output_dir={tempfile.gettempdir()}",
            *job.overrides,
        ]
        composed = plan(overrides, False, None).jobs[0]
        config = composed.config
        plain = {key: value for key, value in config.items() if not isinstance(value, dict)}
        record = {"config": config, "names": composed.names, "overrides": composed.overrides}
        arguments: dict[str, Any] = {**construct(config), **plain, **record}
        experiment = Experiment(**arguments)
        experiment.check()
        experiment.device.setup()
        self.job = job
        self.evaluation = experiment.evaluation
        self.session = Session(experiment, experiment.data.load(), RunFolder(Path("nowhere")), Signals())
        self.settings = f"iwae-cli {iwae_cli.__version__}, torch {torch.__version__}"

    def train(self, tick: Tick) -> None:
        """The whole of the trainer's loop, a pause between two steps where the clock wants one."""
        self._load_weights()
        self.session.trainer.run(self.session.state, _Hooks(tick))

    def check(self) -> tuple[list[float], dict[str, np.ndarray]]:
        """The trainer's step with noise that is given."""
        self._load_weights()
        trainer, bounds = self.session.trainer, []
        memory = trainer.optimizer.state_dict()
        for step in range(CHECK_STEPS):
            x, draws = self.job.check_batch(step)
            noise = _Given([torch.from_numpy(draw) for draw in draws])
            bound = train_step(trainer.model, trainer.objective, trainer.optimizer, torch.from_numpy(x), noise)
            bounds.append(float(bound.mean()))
        weights = {name: value.numpy().copy() for name, value in trainer.model.state_dict().items()}
        trainer.optimizer.load_state_dict(memory)
        return bounds, weights

    def nll(self, images: np.ndarray, k: int) -> float:
        """As the final evaluation, one worker for every core."""
        if not self.session.state.step:
            self._load_weights()
        model, evaluation = self.session.model, self.evaluation
        model.eval()
        split = Split("test", torch.from_numpy(images), "")
        found = log_likelihood(model, split, k=k, seed=evaluation.seed, rows=evaluation.rows, workers=None)
        model.train()
        return float(-found.log_px.mean())

    def _load_weights(self) -> None:
        weights = {name: torch.from_numpy(value) for name, value in self.job.weights().items()}
        self.session.model.load_state_dict(weights)


class _Hooks:
    """See ``iwae_cli.training.trainer.Hooks``."""

    def __init__(self, tick: Tick) -> None:
        self._tick = tick
        self._stop = False

    def on_step(self, step: int) -> None:
        self._stop = not self._tick(1)

    def on_best(self, state: State) -> None:
        pass

    def on_pass(self, step: int, metrics: dict[str, float | None]) -> None:
        pass

    def on_save(self, state: State) -> None:
        pass

    def interrupted(self) -> bool:
        return self._stop


class _Given:
    """Noise that is given, layer by layer."""

    def __init__(self, draws: list[Tensor]) -> None:
        self._draws = draws

    def normal(self, layer: int, k: int, batch: int, size: int) -> Tensor:
        return self._draws[layer - 1]

    def uniform(self, layer: int, k: int, batch: int, size: int) -> Tensor:
        raise AssertionError("Gaussian layers draw no uniform numbers")


if __name__ == "__main__":
    serve(Ours)
