"""Russian roulette on the differentiated draws: unbiased, with the variance of the theory; refused elsewhere."""

from __future__ import annotations

import copy
import itertools
import signal
from collections.abc import Iterator
from pathlib import Path

import draws
import pytest
import torch
from every_objective import CIWAE, ELBO, IWAE, JVI, MIWAE, PIWAE, TVO, VIMCO, VR
from small_runs import TINY, bits, finished, read_json, run, run_folders

from iwae_cli.cli.compose import plan
from iwae_cli.core.noise import GeneratorNoise, Noise
from iwae_cli.models.architectures.mlp import GaussianMLP
from iwae_cli.models.base import LatentVariableModel
from iwae_cli.objectives.base import BoundObjective, Objective
from iwae_cli.record.identity import training_config
from iwae_cli.runs import runner
from iwae_cli.training.settings import Training
from iwae_cli.training.steps import compiled
from iwae_cli.training.steps.compiled import CompiledRouletteStep
from iwae_cli.training.steps.plain import PlainStep
from iwae_cli.training.steps.roulette import RouletteStep, survivors

K, BATCH, PIXELS, TAU = 4, 2, 6, 0.45
OBJECTIVES: dict[str, BoundObjective] = {
    "IWAE": IWAE(K),
    "CIWAE": CIWAE(K, 0.3),
    "MIWAE": MIWAE(2, K // 2),
    "VR": VR(K, 0.5),
    "JVI": JVI(K),  # some of its weights are negative
}


def built() -> LatentVariableModel:
    return draws.built(GaussianMLP([3, 2], [[5], [4]]), PIXELS, seed=3, mean=0.3).train()


def frozen(model: LatentVariableModel) -> torch.optim.Optimizer:
    """It leaves the gradients where they can be read, and the weights as they are."""
    return torch.optim.SGD(model.parameters(), lr=0.0)


class Chosen(Noise):
    """Always the same normal draws; the chances of the roulette as given."""

    def __init__(self, chances: torch.Tensor | None = None) -> None:
        self._noise = GeneratorNoise(torch.Generator().manual_seed(5), torch.float64)
        self._chances = chances

    def normal(self, layer: int, k: int, batch: int, size: int) -> torch.Tensor:
        return self._noise.normal(layer, k, batch, size)

    def uniform(self, layer: int, k: int, batch: int, size: int) -> torch.Tensor:
        assert self._chances is not None and (k, batch, size) == (K, BATCH, 1)
        return self._chances[..., None]


@pytest.fixture
def x() -> torch.Tensor:
    return (torch.rand(BATCH, PIXELS) < 0.5).double()


def gradient(model: LatentVariableModel) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def outcomes(weights: torch.Tensor) -> Iterator[tuple[float, torch.Tensor]]:
    """Every outcome of the roulette: its probability, and chances that lead to it."""
    kept = (weights.abs() / TAU).clamp(max=1).flatten()
    open_ = [i for i in range(len(kept)) if kept[i] < 1]
    for survives in itertools.product((True, False), repeat=len(open_)):
        u, probability = torch.zeros_like(kept), 1.0
        for i, survived in zip(open_, survives, strict=True):
            u[i] = kept[i] * 0.5 if survived else (1 + kept[i]) / 2
            probability *= float(kept[i] if survived else 1 - kept[i])
        yield probability, u.view_as(weights)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_mean_and_variance_over_every_outcome(name: str, x: torch.Tensor) -> None:
    """The mean is the gradient of all draws; the variance is what independent roulettes have, draw by draw."""
    model, objective = built(), OBJECTIVES[name]
    expected_bound = PlainStep(model, objective, frozen(model))(x, Chosen())
    full = gradient(model)
    log_w = model(x, K, Chosen()).detach()
    weights = objective.weights(log_w)
    assert int((weights.abs() < TAU).sum()) > 0, "nothing to leave out"

    mean, square, total = torch.zeros_like(full), 0.0, 0.0
    for probability, u in outcomes(weights):
        bound = RouletteStep(model, objective, frozen(model), TAU)(x, Chosen(u))
        torch.testing.assert_close(bound, expected_bound, rtol=1e-12, atol=0)
        found = gradient(model)
        mean += probability * found
        square += probability * float((found - full).square().sum())
        total += probability
    assert total == pytest.approx(1)
    torch.testing.assert_close(mean, full, rtol=1e-10, atol=1e-12)

    # a / p in place of a has the variance a^2 (1 - p) / p = |a| (tau - |a|) where p = |a| / tau < 1.
    each = model(x, K, Chosen())
    variance = 0.0
    for i, b in itertools.product(range(K), range(BATCH)):
        own = torch.autograd.grad(each[i, b] / BATCH, list(model.parameters()), retain_graph=True)
        a = float(weights[i, b].abs())
        variance += max(0.0, a * (TAU - a)) * sum(float(g.square().sum()) for g in own)
    assert square == pytest.approx(variance, rel=1e-9)


def test_it_is_the_plain_step_where_every_draw_survives(x: torch.Tensor) -> None:
    plain, thinned = built(), built()
    PlainStep(plain, IWAE(K), frozen(plain))(x, Chosen())
    RouletteStep(thinned, IWAE(K), frozen(thinned), 1e-300)(x, Chosen(torch.full((K, BATCH), 0.999)))
    torch.testing.assert_close(gradient(thinned), gradient(plain), rtol=1e-12, atol=1e-14)


def test_zero_weights_never_survive() -> None:
    weights = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    assert survivors(weights, torch.zeros(2, 2), 0.01).tolist() == [[0, 0], [1, 0]]


@pytest.mark.parametrize("share", [1, 3, 8])
def test_the_compiled_step_is_the_same(share: int, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one graph for all draws, or by several calls of one for a part of them."""
    monkeypatch.setattr("torch._inductor.compile", lambda graph, inputs, options: graph)
    monkeypatch.setattr(compiled, "ROULETTE_SHARE", share)
    plain = built()
    model = copy.deepcopy(plain)
    step = CompiledRouletteStep(RouletteStep(model, IWAE(K), frozen(model), TAU), torch.zeros_like(x))
    chances = torch.rand(K, BATCH, dtype=torch.float64)
    for u in (chances, torch.zeros_like(chances), 1 - chances):
        expected = RouletteStep(plain, IWAE(K), frozen(plain), TAU)(x, Chosen(u))
        torch.testing.assert_close(step(x, Chosen(u)), expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient(model), gradient(plain), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    "objective",
    [
        ELBO(5),
        ELBO(5, analytic_kl=True),
        IWAE(5, "stl"),
        IWAE(5, "dreg"),
        VR(5, 0.5, "dreg"),
        PIWAE(2, 5),
        TVO(5),
        TVO(5, gradient="covariance"),
        VIMCO(5),
    ],
    ids=lambda o: f"{type(o).__name__} {getattr(o, 'gradient', '')}",
)
def test_it_is_refused_where_it_is_wrong_or_useless(objective: Objective) -> None:
    refusal = Training("roulette").check(objective)
    assert refusal is not None and "training.backward=all" in refusal and type(objective).__name__ in refusal
    assert Training("all").check(objective) is None
    assert all(Training("roulette").check(accepted) is None for accepted in OBJECTIVES.values())


COMMAND = (*TINY, "objective.k=20", "training.backward=roulette")


def test_a_roulette_run_has_its_own_folder_and_resumes_in_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = finished(tmp_path / "undisturbed", *COMMAND)
    with monkeypatch.context() as patch:
        patch.setattr(runner.Runner, "on_step", lambda self, step: step == 18 and signal.raise_signal(signal.SIGINT))
        assert run(*COMMAND, f"output_dir={tmp_path / 'interrupted'}")[0] == 130
    assert run(*COMMAND, f"output_dir={tmp_path / 'interrupted'}")[0] == 0
    (folder,) = run_folders(tmp_path / "interrupted")
    assert bits(folder) == bits(undisturbed)

    everything = finished(tmp_path / "all", *COMMAND[:-1])
    assert everything.name != undisturbed.name
    nll = [read_json(path / "result.json")["test"]["nll"] for path in (everything, undisturbed)]
    assert nll[0] != nll[1] and nll[0] == pytest.approx(nll[1], abs=0.5)


def test_the_identity_ignores_the_group_without_roulette() -> None:
    """Runs from before there was a choice have no such key; tau means nothing to those without roulette."""
    config = plan([*TINY], False, None).jobs[0].config
    before = {key: value for key, value in config.items() if key != "training"}
    assert training_config(config, {}) == training_config(before, {})
    assert "training" not in training_config(config, {})
    other = config | {"training": config["training"] | {"tau": 0.5}}
    assert training_config(other, {}) == training_config(before, {})
    roulette = config | {"training": config["training"] | {"backward": "roulette"}}
    assert training_config(roulette, {})["training"] == {"_target_": "Training", "backward": "roulette"}
