"""iwae-cli with the configuration, trainer, step and evaluation of its own command line."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import iwae_cli
from benchmarks.cases import CHECK_STEPS, SIZES, Job
from benchmarks.worker import Tick, serve
from iwae_cli.cli.compose import plan
from iwae_cli.core.noise import Noise
from iwae_cli.core.signals import Signals
from iwae_cli.data.base import Split
from iwae_cli.evaluation.likelihood import Likelihood, log_likelihood
from iwae_cli.models.base import LatentVariableModel
from iwae_cli.record.folder import RunFolder
from iwae_cli.runs.runner import Runner
from iwae_cli.sweeps.ensemble import AT_ONCE
from iwae_cli.sweeps.launchers import BATCHED
from iwae_cli.training.checkpoint import State
from iwae_cli.training.ensemble import Member, batched_step, train_ensemble
from iwae_cli.training.minibatches import Minibatches
from iwae_cli.training.steps.choose import Step, choose_step, should_compile
from iwae_cli.training.steps.plain import PlainStep


class Ours:
    """Runs of ``iwae-train`` with hooks of the benchmark."""

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
            "validation.every=1000",
            "device=cpu",
            "logger=disabled",
            f"output_dir={tempfile.gettempdir()}",
            *job.overrides,
        ]
        composed = plan(overrides, False, None).jobs[0]
        experiment = composed.experiment()
        experiment.check()
        experiment.device.setup()
        self.job = job
        self.evaluation = experiment.evaluation
        self.stderr_mc = 0.0
        data, runs = experiment.data.load(), AT_ONCE if f"hydra/launcher={BATCHED}" in overrides else 1
        sessions = [Runner(experiment, data, RunFolder(Path("nowhere")), Signals()) for _ in range(runs)]
        self.session, *self._others = sessions
        for number, session in enumerate(sessions):
            trainer = session.trainer
            parameter = next(session.model.parameters())
            trainer.minibatches = Minibatches(
                data, experiment.batch_size, job.seed + number, parameter.device, parameter.dtype
            )
            trainer.hooks = _Hooks()
        self._step: Step | None = None
        self.settings = f"iwae-cli {iwae_cli.__version__}, torch {torch.__version__}"

    def train(self, tick: Tick) -> None:
        """Run the whole training loop, pausing between two steps where the clock wants a pause."""
        self._load_weights()
        # A unit is a step of one training.
        self.session.trainer.hooks = _Hooks(lambda units: tick(units * (1 + len(self._others))))
        if self._others:
            train_ensemble(self._members(), self._machine_code(), lambda number, error: None, True)
        else:
            self.session.trainer.run(self._step_alone())

    def check(self) -> tuple[list[float] | None, dict[str, np.ndarray] | None]:
        """Make steps with given noise; the roulette cannot be checked, as it leaves out draws at random."""
        if "training.backward=roulette" in self.job.overrides:
            return None, None
        self._load_weights()
        trainer, bounds = self.session.trainer, []
        memory = trainer.optimizer.state_dict()
        step = self._step_with_others() if self._others else self._step_alone()
        for number in range(CHECK_STEPS):
            x, draws = self.job.check_batch(number)
            bounds.append(float(step(torch.from_numpy(x), _Given([torch.from_numpy(draw) for draw in draws])).mean()))
        weights = {name: value.numpy().copy() for name, value in trainer.model.state_dict().items()}
        trainer.optimizer.load_state_dict(memory)
        return bounds, weights

    def _step_alone(self) -> Step:
        if self._step is None:
            experiment, trainer = self.session.experiment, self.session.trainer
            self._step = choose_step(
                self.session.model,
                experiment.objective,
                trainer.optimizer,
                experiment.training,
                experiment.device,
                trainer.total_steps,
                trainer.minibatches.shape,
            )
        return self._step

    def _step_with_others(self) -> Callable[[Tensor, Noise], Tensor]:
        """Return the common step, with the same images and noise for all."""
        members = self._members()
        step = batched_step(members, self._machine_code())
        return lambda x, noise: step([x] * len(members), [noise] * len(members))[0]

    def _members(self) -> list[Member]:
        sessions, objective = (self.session, *self._others), self.session.experiment.objective
        return [Member(s.trainer, PlainStep(s.model, objective, s.trainer.optimizer)) for s in sessions]

    def _machine_code(self) -> bool:
        experiment, trainer = self.session.experiment, self.session.trainer
        rows, _ = trainer.minibatches.shape
        return should_compile(
            self.session.model, experiment.objective, experiment.device, trainer.total_steps, rows, None
        )

    def evaluate(self, images: np.ndarray, tick: Tick) -> None:
        """Evaluate all images as the final evaluation does; its workers wait where the clock wants a pause.

        Workers end what they have begun when a round ends: at most one image for each worker and round.
        """
        gate, done = threading.Event(), 0
        gate.set()

        def held() -> None:
            gate.wait()

        def on_progress(now: int) -> None:
            nonlocal done
            gate.clear()
            go_on = tick(now - done)
            gate.set()
            done = now
            if not go_on:
                raise _Stop

        try:
            while True:
                self._likelihood(images, self.job.case.k, held, on_progress)
                done = 0
        except _Stop:
            return

    def nll(self, images: np.ndarray, k: int) -> float:
        """Return -L_k of all images, and keep its standard error."""
        found = self._likelihood(images, k)
        v = np.maximum(0, 1 / found.ess - 1 / k)
        self.stderr_mc = float(np.sqrt(v.sum()) / len(images))
        return float(-found.log_px.mean())

    def log_px(self, images: np.ndarray, effort: int, seed: int) -> np.ndarray:
        """L_k by refined proposals, or with ``evaluation.refine=0`` by q alone."""
        return self._likelihood(images, effort, seed=seed, refined=self.evaluation.refine != 0).log_px

    def _likelihood(
        self,
        images: np.ndarray,
        k: int,
        check: Callable[[], None] = lambda: None,
        on_progress: Callable[[int], None] | None = None,
        seed: int | None = None,
        refined: bool = False,
    ) -> Likelihood:
        """One worker for every core."""
        model, evaluation = self.model(), self.evaluation
        try:
            return log_likelihood(
                model,
                Split("test", torch.from_numpy(images), ""),
                k=k,
                seed=evaluation.seed if seed is None else seed,
                rows=evaluation.rows,
                workers=None,
                bf16=evaluation.precision == "bf16",
                refined=refined,
                check=check,
                on_progress=on_progress,
            )
        finally:
            model.train()

    def model(self) -> LatentVariableModel:
        """Return the model in evaluation mode."""
        if not self.session.state.step:
            self._load_weights()
        return self.session.model.eval()

    def _load_weights(self) -> None:
        weights = {name: torch.from_numpy(value) for name, value in self.job.weights().items()}
        for session in (self.session, *self._others):
            session.model.load_state_dict(weights)


class _Stop(Exception):
    pass


class _Hooks:
    """Hooks that stop the training when its time is over, and record nothing."""

    def __init__(self, tick: Tick = lambda units: True) -> None:
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


class _Given(Noise):
    """Given noise, layer by layer."""

    def __init__(self, draws: list[Tensor]) -> None:
        self._draws = draws

    def normal(self, layer: int, k: int, batch: int, size: int) -> Tensor:
        return self._draws[layer - 1]


if __name__ == "__main__":
    serve(Ours)
