"""The loop: what it averages, with which learning rate it steps, what it calls best, and where it can be resumed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any

import pytest
import torch

from iwae_cli.core.errors import Interrupted, RunFailed
from iwae_cli.core.interfaces import Model, Particles
from iwae_cli.core.noise import Noise
from iwae_cli.data.base import Data
from iwae_cli.models.architectures.linear_gaussian import LinearGaussianModel
from iwae_cli.models.base import LatentVariableModel
from iwae_cli.objectives.base import Losses, Objective
from iwae_cli.objectives.iwae import IWAE
from iwae_cli.training import trainer as trainer_module
from iwae_cli.training.checkpoint import State
from iwae_cli.training.schedule import Burda, Constant, Schedule
from iwae_cli.training.trainer import Trainer

N, BATCH = 7, 3  # three steps a pass, the last with one image


class SeesFirstPixel(Objective):
    """Its bound is the first pixel, its loss is a parameter times nothing."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    @property
    def num_samples(self) -> int:
        return 1

    def bound(self, log_w: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def losses(self, model: Model, x: torch.Tensor, particles: Particles, noise: Noise) -> Losses:
        self.seen.append(x[:, 0].tolist())
        loss = 0 * particles.log_w.sum()
        return Losses(loss, loss, x[:, 0].detach())


@dataclass
class Recorder:
    """Hooks that keep all they are told; ``stop_at`` is the step at which a signal comes."""

    stop_at: int | None = None
    steps: list[int] = field(default_factory=list)
    passes: list[tuple[int, dict[str, float | None]]] = field(default_factory=list)
    best: list[dict[str, float]] = field(default_factory=list)
    saved: list[State] = field(default_factory=list)

    def on_step(self, step: int) -> None:
        self.steps.append(step)

    def on_best(self, state: State) -> None:
        self.best.append(dict(state.best))

    def on_pass(self, step: int, metrics: dict[str, float | None]) -> None:
        self.passes.append((step, metrics))

    def on_save(self, state: State) -> None:
        self.saved.append(copy.deepcopy(state))

    def interrupted(self) -> bool:
        return self.stop_at is not None and self.steps[-1] >= self.stop_at


def data() -> Data:
    x = torch.randn(N, 4, generator=torch.Generator().manual_seed(0))
    x[:, 0] = torch.arange(N) ** 2
    return Data("toy", "", x, x[:2].clone(), x[:2].clone(), None, "none", (4,))


def new_state() -> State:
    return State("toy", {}, "", (4,), None, {})


def make(
    objective: Objective,
    schedule: Schedule,
    validate: Callable[[], float] = lambda: 0.0,
    validation_every: int = 1,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    lr: float = 0.01,
) -> Trainer:
    toy = data()
    model = LinearGaussianModel([2]).build((4,), toy.mean(), torch.Generator().manual_seed(0))
    return Trainer(
        model, objective, optimizer(model.parameters(), lr=lr), schedule, toy, 0, BATCH, validate, validation_every
    )


def test_the_last_uneven_batch_counts_by_its_images() -> None:
    """The mean over images of i^2 is (0 + 1 + 4 + ... + 36) / 7 = 13 in any order; means over batches are not."""
    objective, hooks = SeesFirstPixel(), Recorder()
    assert make(objective, Constant(3)).run(new_state(), hooks)
    assert [metrics["train/bound"] for _, metrics in hooks.passes] == [13.0, 13.0, 13.0]
    assert [len(batch) for batch in objective.seen] == [3, 3, 1] * 3
    batches = [list(chain(*objective.seen[3 * i : 3 * i + 3])) for i in range(3)]
    assert all(sorted(seen) == [float(i**2) for i in range(N)] for seen in batches), "every image once a pass"
    assert batches[0] != batches[1] != batches[2], "each pass has its own order"
    assert [step for step, _ in hooks.passes] == [3, 6, 9] and hooks.steps == list(range(1, 10))


def test_the_recorded_learning_rates_are_those_of_the_steps() -> None:
    trainer, hooks = make(SeesFirstPixel(), Burda(2), lr=0.05), Recorder()
    used: list[float] = []
    trainer.optimizer.register_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
    trainer.run(new_state(), hooks)
    expected = [0.05] + 3 * [0.05 * 10 ** (-1 / 7)]
    assert [metrics["learning_rate"] for _, metrics in hooks.passes] == pytest.approx(expected, rel=1e-12)
    assert used == [metrics["learning_rate"] for _, metrics in hooks.passes for _ in range(3)]


def values(*bounds: float) -> Callable[[], float]:
    rest = iter(bounds)
    return lambda: next(rest)


def test_best_is_the_best_validation_and_the_last_pass_is_always_validated() -> None:
    hooks, state = Recorder(), new_state()
    make(SeesFirstPixel(), Constant(5), values(-3.0, -1.0, -2.0), validation_every=2).run(state, hooks)
    found = [metrics.get("validation/bound", "not validated") for _, metrics in hooks.passes]
    assert found == ["not validated", -3.0, "not validated", -1.0, -2.0]
    assert hooks.best == [{"step": 6, "bound": -3.0}, {"step": 12, "bound": -1.0}]
    assert state.best == {"step": 12, "bound": -1.0}


def test_a_bound_that_is_not_finite_is_recorded_as_null_and_never_best() -> None:
    hooks = Recorder()
    make(SeesFirstPixel(), Constant(3), values(math.nan, -math.inf, -5.0)).run(new_state(), hooks)
    assert [metrics["validation/bound"] for _, metrics in hooks.passes] == [None, None, -5.0]
    assert hooks.best == [{"step": 9, "bound": -5.0}]


def test_the_model_is_in_evaluation_mode_where_it_is_validated_and_only_there() -> None:
    modes: list[tuple[str, bool]] = []
    trainer = make(SeesFirstPixel(), Constant(2), lambda: modes.append(("validate", trainer.model.training)) or 0.0)
    trainer.optimizer.register_step_pre_hook(lambda *_: modes.append(("step", trainer.model.training)))
    trainer.run(new_state(), Recorder())
    assert set(modes) == {("validate", False), ("step", True)}


def test_divergence_says_what_to_do() -> None:
    trainer = make(IWAE(2), Constant(5), optimizer=torch.optim.SGD, lr=1e20)
    hooks = Recorder()
    with pytest.raises(RunFailed, match=r"^training diverged in pass \d: .*smaller optimizer\.lr") as caught:
        trainer.run(new_state(), hooks)
    assert caught.value.exit_code == 1 and "\n" not in str(caught.value)
    assert all(math.isfinite(metrics["train/bound"] or math.nan) for _, metrics in hooks.passes)


def outcome(model: LatentVariableModel, hooks: list[Recorder]) -> tuple[Any, ...]:
    """What must not depend on interruptions: weights, optimizer, record, best."""
    last = hooks[-1].saved[-1]
    weights = {name: p.numpy().tobytes() for name, p in model.state_dict().items()}
    adam = {i: {key: v.numpy().tobytes() for key, v in s.items()} for i, s in last.optimizer["state"].items()}
    passes = [row for recorder in hooks for row in recorder.passes]
    return weights, adam, last.optimizer["param_groups"], passes, last.best, last.step, last.bound_sum


def train_in_pieces(stops: list[int]) -> tuple[Any, ...]:
    """Everything made anew for each piece, as in another process; validation is the norm of the weights."""
    state, hooks = new_state(), []
    for stop in [*stops, None]:
        trainer = make(IWAE(3, "dreg"), Burda(2), validation_every=2)
        model = trainer.model

        def norm(model: LatentVariableModel = model) -> float:
            return float(sum(p.detach().double().square().sum() for p in model.parameters()))

        trainer.validate = norm
        if state.step:
            model.load_state_dict(state.model)
        hooks.append(Recorder(stop))
        assert trainer.run(state, hooks[-1]) is (stop is None)
        state = copy.deepcopy(hooks[-1].saved[-1])
    return outcome(model, hooks)


@pytest.fixture(scope="module")
def in_one_go() -> tuple[Any, ...]:
    return train_in_pieces([])


@pytest.mark.parametrize("stop", range(1, 12))
def test_interrupted_at_any_step_it_ends_the_same_bit_for_bit(stop: int, in_one_go: tuple[Any, ...]) -> None:
    """T11: 1 + 3 passes of 3 steps, two learning rates."""
    assert train_in_pieces([stop]) == in_one_go


def test_interrupted_at_every_step_it_ends_the_same(in_one_go: tuple[Any, ...]) -> None:
    assert train_in_pieces(list(range(1, 12))) == in_one_go


def test_a_signal_at_the_last_step_does_not_make_it_unfinished() -> None:
    hooks = Recorder(stop_at=6)
    assert make(SeesFirstPixel(), Constant(2)).run(new_state(), hooks) is True
    assert hooks.saved[-1].step == 6


def test_it_saves_at_the_end_and_as_often_as_said(monkeypatch: pytest.MonkeyPatch) -> None:
    hooks = Recorder()
    make(SeesFirstPixel(), Constant(2)).run(new_state(), hooks)
    assert [state.step for state in hooks.saved] == [6]
    monkeypatch.setattr(trainer_module, "SAVE_EVERY_SECONDS", -1.0)
    hooks = Recorder()
    make(SeesFirstPixel(), Constant(2)).run(new_state(), hooks)
    assert [state.step for state in hooks.saved] == [1, 2, 3, 4, 5, 6]
    assert [state.bound_sum > 0 for state in hooks.saved] == [True, True, False] * 2, "of the running pass only"
    assert all(a.seconds <= b.seconds for a, b in pairwise(hooks.saved))


@pytest.mark.parametrize("stopped_in", [1, 2, 3])
def test_a_validation_that_is_interrupted_is_done_when_it_goes_on(stopped_in: int) -> None:
    """Three passes are validated; nothing is recorded of the one that was not, and no step is lost or done twice."""
    whole, whole_state, whole_hooks = make(IWAE(2), Constant(3), lambda: -5.0), new_state(), Recorder()
    assert whole.run(whole_state, whole_hooks)
    calls = 0

    def validate() -> float:
        nonlocal calls
        calls += 1
        if calls == stopped_in:
            raise Interrupted(15)
        return -5.0

    first, state, hooks = make(IWAE(2), Constant(3), validate), new_state(), Recorder()
    assert not first.run(state, hooks)
    saved = hooks.saved[-1]
    assert saved.step == 3 * stopped_in and len(hooks.passes) == stopped_in - 1
    assert not first.is_done(saved)

    second = make(IWAE(2), Constant(3), lambda: -5.0)
    second.model.load_state_dict(saved.model)
    assert second.run(saved, hooks)
    assert second.is_done(saved)
    assert hooks.steps == whole_hooks.steps
    assert hooks.passes == whole_hooks.passes
    assert saved.best == whole_state.best and hooks.best == whole_hooks.best
    for name, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name
