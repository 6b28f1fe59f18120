"""The loop: what it averages, with which learning rate it steps, what it calls best, and where it can be resumed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, pairwise
from typing import Any

import pytest
import torch

from iwae_cli.core.errors import RunFailed
from iwae_cli.core.interfaces import Model, Particles
from iwae_cli.core.noise import Noise
from iwae_cli.data.base import Data
from iwae_cli.models.architectures.linear_gaussian import LinearGaussianModel
from iwae_cli.models.base import LatentVariableModel
from iwae_cli.objectives.base import Losses, Objective
from iwae_cli.objectives.iwae import IWAE
from iwae_cli.training import settings as settings_module
from iwae_cli.training import trainer as trainer_module
from iwae_cli.training.checkpoint import State
from iwae_cli.training.diagnostics import diagnostics
from iwae_cli.training.minibatches import Minibatches
from iwae_cli.training.schedule import Burda, Constant, Schedule
from iwae_cli.training.steps.compiled import CompiledStep
from iwae_cli.training.steps.plain import PlainStep
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
    """Hooks that keep all their arguments; ``stop_at`` is the step at which a signal comes."""

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


class Training:
    """A trainer and its plain step."""

    def __init__(
        self,
        objective: Objective,
        schedule: Schedule,
        validate: Callable[[], float] = lambda: 0.0,
        validation_every: int = 1,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
        lr: float = 0.01,
        state: State | None = None,
        hooks: Recorder | None = None,
        settings: settings_module.Training = settings_module.PLAIN,
    ) -> None:
        toy = data()
        self.model = LinearGaussianModel([2]).build((4,), toy.mean(), torch.Generator().manual_seed(0))
        self.optimizer = optimizer(self.model.parameters(), lr=lr)
        self.objective = objective
        self.hooks = hooks or Recorder()
        self.state = state or new_state()
        minibatches = Minibatches(toy, BATCH, 0, torch.device("cpu"), torch.float32)
        self.trainer = Trainer(
            *(self.model, objective, self.optimizer, schedule, minibatches),
            *(validate, validation_every, self.state, self.hooks, settings),
        )
        if self.state.step:
            self.model.load_state_dict(self.state.model)

    def run(self) -> bool:
        return self.trainer.run(PlainStep(self.trainer.model, self.objective, self.optimizer))


def test_the_last_uneven_batch_counts_by_its_images() -> None:
    """The mean over images of i^2 is (0 + 1 + 4 + ... + 36) / 7 = 13 in any order; means over batches are not."""
    objective = SeesFirstPixel()
    training = Training(objective, Constant(3))
    hooks = training.hooks
    assert training.run()
    assert [metrics["train/bound"] for _, metrics in hooks.passes] == [13.0, 13.0, 13.0]
    assert [len(batch) for batch in objective.seen] == [3, 3, 1] * 3
    batches = [list(chain(*objective.seen[3 * i : 3 * i + 3])) for i in range(3)]
    assert all(sorted(seen) == [float(i**2) for i in range(N)] for seen in batches), "every image once a pass"
    assert batches[0] != batches[1] != batches[2], "each pass has its own order"
    assert [step for step, _ in hooks.passes] == [3, 6, 9] and hooks.steps == list(range(1, 10))


def test_a_minibatch_and_its_noise_depend_on_the_step_alone() -> None:
    def minibatches() -> Minibatches:
        return Minibatches(data(), BATCH, 0, torch.device("cpu"), torch.float64)

    def drawn(minibatches: Minibatches, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, noise = minibatches[step]
        return x, noise.normal(1, 2, len(x), 3)

    one = minibatches()
    in_order = [drawn(one, step) for step in range(7)]
    for step in (6, 0, 4):
        for found, expected in zip(drawn(minibatches(), step), in_order[step], strict=True):
            assert found.dtype == torch.float64 and torch.equal(found, expected)
        assert torch.equal(drawn(one, step)[1], in_order[step][1])
    assert one.per_pass == 3 and one.shape == (BATCH, 4)


def test_the_recorded_learning_rates_are_those_of_the_steps() -> None:
    training = Training(SeesFirstPixel(), Burda(2), lr=0.05)
    used: list[float] = []
    training.optimizer.register_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
    training.run()
    expected = [0.05] + 3 * [0.05 * 10 ** (-1 / 7)]
    recorded = [metrics["learning_rate"] for _, metrics in training.hooks.passes]
    assert recorded == pytest.approx(expected, rel=1e-12)
    assert used == [rate for rate in recorded for _ in range(3)]


def values(*bounds: float) -> Callable[[], float]:
    rest = iter(bounds)
    return lambda: next(rest)


def test_best_is_the_best_validation_and_the_last_pass_is_always_validated() -> None:
    training = Training(SeesFirstPixel(), Constant(5), values(-3.0, -1.0, -2.0), validation_every=2)
    training.run()
    found = [metrics.get("validation/bound", "not validated") for _, metrics in training.hooks.passes]
    assert found == ["not validated", -3.0, "not validated", -1.0, -2.0]
    assert training.hooks.best == [{"step": 6, "bound": -3.0}, {"step": 12, "bound": -1.0}]
    assert training.state.best == {"step": 12, "bound": -1.0}


def test_a_bound_that_is_not_finite_is_recorded_as_null_and_never_best() -> None:
    training = Training(SeesFirstPixel(), Constant(3), values(math.nan, -math.inf, -5.0))
    training.run()
    assert [metrics["validation/bound"] for _, metrics in training.hooks.passes] == [None, None, -5.0]
    assert training.hooks.best == [{"step": 9, "bound": -5.0}]


def test_the_model_is_in_evaluation_mode_while_it_is_validated_and_only_then() -> None:
    modes: list[tuple[str, bool]] = []
    training = Training(SeesFirstPixel(), Constant(2), lambda: modes.append(("validate", training.model.training)) or 0)
    training.optimizer.register_step_pre_hook(lambda *_: modes.append(("step", training.model.training)))
    training.run()
    assert set(modes) == {("validate", False), ("step", True)}


def test_divergence_says_what_to_do() -> None:
    training = Training(IWAE(2), Constant(5), optimizer=torch.optim.SGD, lr=1e20)
    with pytest.raises(RunFailed) as caught:
        training.run()
    assert str(caught.value).startswith("training diverged in pass") and "smaller optimizer.lr" in str(caught.value)
    assert caught.value.exit_code == 1 and "\n" not in str(caught.value)
    assert all(math.isfinite(metrics["train/bound"] or math.nan) for _, metrics in training.hooks.passes)


def test_what_is_not_finite_is_not_saved_when_a_signal_comes() -> None:
    training = Training(IWAE(2), Constant(5), optimizer=torch.optim.SGD, lr=1e20, hooks=Recorder(stop_at=2))
    with pytest.raises(RunFailed, match="diverged in pass 1 before step 3: non-finite weights"):
        training.run()
    assert not training.hooks.saved


def outcome(model: LatentVariableModel, hooks: list[Recorder]) -> tuple[Any, ...]:
    """Everything that must not depend on interruptions: weights, optimizer, record, best."""
    last = hooks[-1].saved[-1]
    weights = {name: p.numpy().tobytes() for name, p in model.state_dict().items()}
    adam = {i: {key: v.numpy().tobytes() for key, v in s.items()} for i, s in last.optimizer["state"].items()}
    passes = [row for recorder in hooks for row in recorder.passes]
    average = {name: value.numpy().tobytes() for name, value in last.average.items()}
    return weights, adam, average, last.optimizer["param_groups"], passes, last.best, last.step, last.bound_sum


def norm(model: LatentVariableModel) -> float:
    return float(sum(p.detach().double().square().sum() for p in model.parameters()))


def train_in_pieces(
    stops: list[int], objective: Objective, schedule: Schedule, settings: settings_module.Training
) -> tuple[Any, ...]:
    """Build everything again for each piece, as another process does; validation is the norm of the weights."""
    state, hooks = new_state(), []
    for stop in [*stops, None]:
        training = Training(
            objective, schedule, validation_every=2, state=state, hooks=Recorder(stop), settings=settings
        )
        training.trainer.validate = partial(norm, training.trainer.evaluated)
        hooks.append(training.hooks)
        assert training.run() is (stop is None)
        state = copy.deepcopy(hooks[-1].saved[-1])
    return outcome(training.model, hooks)


@pytest.mark.parametrize("stops", [list(range(1, 12)), [1], [3], [8], [11]])
@pytest.mark.parametrize("with_protocols", [False, True])
def test_interrupted_at_every_step_it_ends_the_same(
    stops: list[int], with_protocols: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T11, bit for bit: 1 + 3 passes of 3 steps, two learning rates; diagnostics of every step.

    Stopped after every step, and once: after the first and the last step but one, within a pass and at the end of one.
    """
    monkeypatch.setattr(trainer_module, "EVERY", 1)
    settings = settings_module.Training(kl_warmup=3, clip=0.5, ema=0.8) if with_protocols else settings_module.PLAIN
    how = IWAE(3, "stl" if with_protocols else "dreg"), Burda(2, patience=3), settings
    assert train_in_pieces(stops, *how) == train_in_pieces([], *how)


def test_patience_ends_the_training_and_a_finished_one_stays_so() -> None:
    values = [1.0, 3.0, 2.0, math.nan, 2.5, 9.0]
    validate = iter(values)
    training = Training(IWAE(2), Constant(6, patience=3), lambda: next(validate))
    assert training.run() and training.trainer.is_done
    saved = training.hooks.saved[-1]
    assert (saved.step, saved.total_steps, saved.best) == (15, 15, {"step": 6, "bound": 3.0})
    again = Training(IWAE(2), Constant(6, patience=3), state=copy.deepcopy(saved))
    again.trainer.state = copy.deepcopy(saved)
    assert again.trainer.is_done and again.run() and not again.hooks.steps
    validate = iter(values)
    assert Training(IWAE(2), Constant(6, patience=4), lambda: next(validate)).run() and not [*validate]
    # The passes of a warm-up do not count.
    falling = iter([5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
    warmed = Training(
        IWAE(2), Constant(6, patience=2), lambda: next(falling), settings=settings_module.Training(kl_warmup=3)
    )
    assert warmed.run() and warmed.hooks.saved[-1].step == 15


def test_averaged_weights_are_what_is_validated() -> None:
    seen: list[torch.Tensor] = []
    ends: list[torch.Tensor] = []

    class Keeps(Recorder):
        def on_step(self, step: int) -> None:
            super().on_step(step)
            ends.append(torch.nn.utils.parameters_to_vector(training.model.parameters()).detach().clone())

    training = Training(IWAE(2), Constant(2), hooks=Keeps(), settings=settings_module.Training(ema=0.7))
    evaluated = training.trainer.evaluated
    training.trainer.validate = lambda: seen.append(torch.nn.utils.parameters_to_vector(evaluated.parameters())) or 0.0
    assert training.run() and evaluated is not training.model
    average = ends[0]
    for weights in ends[1:]:
        average = 0.7 * average + 0.3 * weights
    torch.testing.assert_close(seen[-1].detach(), average, rtol=1e-5, atol=1e-6)
    saved = training.hooks.saved[-1]
    assert saved.weights is saved.average
    for name, value in evaluated.state_dict().items():
        assert torch.equal(saved.average[name], value)
    assert not torch.allclose(average, ends[-1], rtol=1e-3)


def test_a_compiled_step_has_the_weight_of_the_moment_and_a_clipped_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.compile", lambda graph, inputs, options: graph)
    ends = []
    for compiled in (False, True):
        settings = settings_module.Training(kl_warmup=3, clip=0.5)
        training = Training(IWAE(3), Constant(4), settings=settings)
        step = PlainStep(training.trainer.model, training.objective, training.optimizer)
        assert training.trainer.run(CompiledStep(step, torch.zeros(BATCH, 4)) if compiled else step)
        assert [metrics["train/kl_weight"] for _, metrics in training.hooks.passes] == [1 / 3, 2 / 3, 1, 1]
        ends.append(torch.nn.utils.parameters_to_vector(training.model.parameters()).detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-3, atol=1e-5)
    plain = Training(IWAE(3), Constant(4))
    assert plain.run()
    assert not torch.allclose(torch.nn.utils.parameters_to_vector(plain.model.parameters()), ends[0], rtol=1e-3)


@pytest.mark.parametrize("clip", [0.1, 1e6])
def test_a_gradient_longer_than_clip_is_scaled_to_it(clip: float) -> None:
    moved = []
    for settings in (settings_module.PLAIN, settings_module.Training(clip=clip)):
        training = Training(IWAE(3), Constant(1), optimizer=torch.optim.SGD, lr=0.1, settings=settings)
        before = torch.nn.utils.parameters_to_vector(training.model.parameters()).detach().clone()
        x, noise = training.trainer.minibatches[0]
        PlainStep(training.model, training.objective, training.optimizer)(x, noise)
        moved.append(torch.nn.utils.parameters_to_vector(training.model.parameters()).detach() - before)
    whole, clipped = moved
    assert whole.norm() > 0.1 * 0.1
    torch.testing.assert_close(clipped, whole * min(1.0, 0.1 * clip / float(whole.norm())), rtol=1e-3, atol=1e-6)


def measured(training: Training) -> list[dict[str, float | None]]:
    """Return of every pass the diagnostics."""
    own = ("pass", "train/bound", "learning_rate", "validation/bound")
    return [{k: v for k, v in metrics.items() if k not in own} for _, metrics in training.hooks.passes]


@pytest.mark.parametrize(("every", "steps"), [(500, [[], [4], [7]]), (1, [[0, 1], [3, 4], [6, 7]])])
def test_the_diagnostics_of_a_pass_are_the_mean_over_its_measured_steps(
    every: int, steps: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step in so many, and the last whole minibatch of a validated pass; before the update, on its own numbers.

    The third and last minibatch of every pass is smaller, and is not measured.
    """
    monkeypatch.setattr(trainer_module, "EVERY", every)
    training = Training(IWAE(3), Constant(3), validation_every=2)
    kept: list[dict[str, float]] = []
    plain = PlainStep(training.model, training.objective, training.optimizer)

    def step(x: torch.Tensor, noise: Noise) -> torch.Tensor:
        x, noise = training.trainer.minibatches[training.state.step]
        kept.append(diagnostics(training.model, training.objective, x, noise))
        return plain(*training.trainer.minibatches[training.state.step])

    step.name = "plain"  # type: ignore[attr-defined]
    assert training.trainer.run(step)  # type: ignore[arg-type]
    for found, of in zip(measured(training), steps, strict=True):
        assert found == ({key: sum(kept[s][key] for s in of) / len(of) for key in kept[0]} if of else {})
    assert set(kept[0]) >= {"train/kl/1", "train/reconstruction", "train/ess", "train/gradient_norm/p"}


def test_measuring_changes_no_bit_of_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    how = IWAE(3, "dreg"), Burda(2), settings_module.PLAIN
    whole = train_in_pieces([], *how)
    monkeypatch.setattr(trainer_module.Trainer, "_measure", lambda trainer, step: None)
    weights, adam, *_ = train_in_pieces([], *how)
    assert (weights, adam) == whole[:2]


class RefusesACopy(SeesFirstPixel):
    def __deepcopy__(self, memo: object) -> None:
        raise TypeError("cannot copy an open file")


def test_without_diagnostics_a_run_trains_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    training = Training(RefusesACopy(), Constant(3))
    assert training.run() and measured(training) == [{}, {}, {}]
    (record,) = caplog.records
    assert record.message.endswith("from here on: TypeError: cannot copy an open file")


class NoGradient(SeesFirstPixel):
    """Its gradient is not finite, and its bound is."""

    def losses(self, model: Model, x: torch.Tensor, particles: Particles, noise: Noise) -> Losses:
        found = super().losses(model, x, particles, noise)
        return Losses(found.generative * math.inf, found.inference * math.inf, found.bound)


def test_a_diagnostic_that_is_not_finite_is_null() -> None:
    training = Training(NoGradient(), Constant(1), optimizer=torch.optim.SGD)
    with pytest.raises(RunFailed, match="pass 1 at step 1: non-finite gradient of p and gradient of q"):
        training.run()
    assert not training.hooks.saved
    assert [found["train/gradient_norm/p"] for found in measured(training)] == [None]


def test_it_saves_at_the_end_and_whenever_the_clock_says(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(SeesFirstPixel(), Constant(2), hooks=Recorder(stop_at=6))
    assert training.run(), "a signal at the last step does not make it unfinished"
    assert [state.step for state in training.hooks.saved] == [6]
    monkeypatch.setattr(trainer_module, "SAVE_EVERY_SECONDS", -1.0)
    training = Training(SeesFirstPixel(), Constant(2))
    training.run()
    saved = training.hooks.saved
    assert [state.step for state in saved] == [1, 2, 3, 4, 5, 6]
    assert [state.bound_sum > 0 for state in saved] == [True, True, False] * 2, "of the current pass only"
    assert all(a.seconds <= b.seconds for a, b in pairwise(saved))
