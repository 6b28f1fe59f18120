"""Annealed importance sampling against models with a known log p(x), and against its theory."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import cloudpickle
import numpy as np
import pytest
import torch
from draws import built, linear_gaussian, sigmoid_belief_network
from evaluations import evaluation
from every_architecture import Categorical, GaussianMLP
from torch import Tensor

from iwae_cli.core.errors import UserError
from iwae_cli.core.noise import GeneratorNoise
from iwae_cli.core.progress import Progress
from iwae_cli.data.linear_gaussian import LinearGaussian
from iwae_cli.evaluation.ais import paths
from iwae_cli.evaluation.ais.estimator import AIS, Annealed, Sandwich
from iwae_cli.evaluation.ais.moves import Chains, gibbs_sweep, hamiltonian_move
from iwae_cli.evaluation.ais.paths import ImageNoise, Tally
from iwae_cli.evaluation.estimator import EstimatorInput
from iwae_cli.models.base import LatentVariableModel
from iwae_cli.record.summary import table_of

N = 24
CPU = torch.device("cpu")


def settings(**changed: object) -> AIS:
    chosen = {"temperatures": 60, "max_temperatures": 60, "leapfrog_steps": 5, "simulated": N} | changed
    return AIS(**chosen)  # type: ignore[arg-type]


def anneal(settings: AIS, model: LatentVariableModel, x: Tensor) -> list[Annealed]:
    return settings.anneal(model, x, seed=0, stream="test", workers=1)


def sandwich(settings: AIS, model: LatentVariableModel, temperatures: int | None = None) -> Sandwich:
    return settings.sandwich(model, seed=0, temperatures=temperatures, workers=1)


def observed(model: LatentVariableModel) -> tuple[LatentVariableModel, Tensor]:
    model = model.float().eval()
    with torch.no_grad():
        _, x = model.generative.sample(N, GeneratorNoise(torch.Generator().manual_seed(2)))
    return model, x


FIXTURES: dict[str, Callable[[], tuple[LatentVariableModel, Tensor]]] = {
    "one layer": lambda: observed(linear_gaussian(2)),
    "two layers": lambda: observed(linear_gaussian(3, 2)),
    "bits": lambda: observed(sigmoid_belief_network()),
}


def exact(model: LatentVariableModel, x: Tensor) -> np.ndarray:
    log_px = model.generative.exact_log_px(x)
    assert log_px is not None
    return log_px.detach().double().numpy()


@pytest.mark.parametrize(
    ("name", "start"), [("one layer", "prior"), ("two layers", "inference"), ("bits", "prior"), ("bits", "inference")]
)
def test_the_estimate_lies_within_its_error_of_the_truth(name: str, start: str) -> None:
    model, x = FIXTURES[name]()
    (found,) = anneal(settings(start=start), model, x)
    truth = exact(model, x)
    error = found.log_px - truth
    assert truth.std() > 0.5
    assert found.stderr.mean() < 0.3
    bias = (found.stderr**2).mean() / 2
    assert abs(error.mean()) < 3 * math.sqrt((found.stderr**2).sum()) / N + 2 * bias
    assert (np.abs(error) < 4 * found.stderr + 0.02).all()
    # The stated error has the size of the observed error.
    assert 0.5 < np.sqrt((error**2).mean() / (found.stderr**2).mean()) < 1.7
    assert ((found.acceptance > 0.2) & (found.acceptance < 0.99)).all()


@pytest.mark.parametrize("name", FIXTURES)
def test_lower_truth_upper(name: str) -> None:
    model, _ = FIXTURES[name]()
    few = 3 if name == "bits" else 20
    found = sandwich(settings(temperatures=few, max_temperatures=few, simulated=200, chains=4), model)
    assert found.exact is not None
    for below, above in ((found.lower, found.exact), (found.exact, found.upper)):
        gap = above - below
        stderr = gap.std(ddof=1) / math.sqrt(len(gap))
        assert gap.mean() > -2 * stderr
        # Few temperatures on purpose, so that the gap of each bound is visible.
        assert gap.mean() > 0.002
    assert (found.upper - found.lower).mean() < 0.5


def test_more_temperatures_tighten_both_sides() -> None:
    model, x = observed(linear_gaussian(3, 2))
    truth = exact(model, x).mean()
    ladder = settings(temperatures=2, max_temperatures=32, chains=2, tolerance=1e-9, simulated=60)
    levels = anneal(ladder, model, x)
    assert [level.temperatures for level in levels] == [2, 4, 8, 16, 32]
    gaps = [truth - level.log_px.mean() for level in levels]
    assert gaps[0] > 0.5 and gaps[0] > 2 * abs(gaps[3]) and gaps[0] > 3 * abs(gaps[-1])
    widths = [sandwich(ladder, model, t) for t in (2, 32)]
    wide, narrow = ((s.upper - s.lower).mean() for s in widths)
    assert wide > 4 * narrow > 0


def test_doubling_ends_where_the_change_is_small() -> None:
    model, x = observed(linear_gaussian(2))
    ladder = settings(temperatures=5, max_temperatures=1280, tolerance=0.1)
    levels = anneal(ladder, model, x)
    means = [level.log_px.mean() for level in levels]
    assert len(levels) < 6
    assert abs(means[-1] - means[-2]) < 0.1
    assert all(abs(b - a) >= 0.1 for a, b in pairwise(means[:-1]))
    assert ladder.converged(levels) and not ladder.converged(levels[:1])


def gaussian_target(loc: Tensor, scale: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    """base = log N(0, I), gap such that at beta = 1 the target is N(loc, scale^2), split over two layers."""

    def scores(latents: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        h = torch.cat(latents, -1)
        base = -0.5 * h.square().sum(-1)
        return base, -0.5 * ((h - loc) / scale).square().sum(-1) - base

    return scores


def test_hmc_leaves_its_target_invariant() -> None:
    """Chains that begin at exact draws keep their distribution, with a step so large that many moves are rejected."""
    loc, scale = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.5, 1.0, 2.0])
    scores = gaussian_target(loc, scale)
    noise = GeneratorNoise(torch.Generator().manual_seed(0))
    h = loc + scale * noise.normal(0, 4000, 2, 3)
    latents = (h[..., :1], h[..., 1:])
    chains = Chains(latents, *scores(latents))
    step = torch.tensor([0.7, 0.95])
    accepted = 0.0
    for _ in range(10):
        chains, probability = hamiltonian_move(scores, chains, 1.0, step, 3, noise)
        accepted += probability.mean(0) / 10
    assert (accepted < 0.85).all()
    end = torch.cat(chains.latents, -1)
    assert torch.equal(chains.base, scores(chains.latents)[0])
    for image in range(2):
        torch.testing.assert_close(end[:, image].mean(0), loc, atol=0.1, rtol=0)
        torch.testing.assert_close(end[:, image].std(0), scale, atol=0, rtol=0.05)
    assert ((end - h).abs() > 1e-3).float().mean() > 0.9


def test_a_sweep_leaves_its_target_invariant_and_its_reversal_undoes_its_order() -> None:
    """Probability of every pair of bits before and after, from exact draws of a correlated target."""
    weight = torch.tensor([[0.0, 1.0], [2.0, -1.0]])  # log f of (h_1, h_2), not normalized

    def scores(latents: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        first, second = (h[..., 0] for h in latents)
        gap = sum(weight[a, b] * (first == a) * (second == b) for a in (0, 1) for b in (0, 1))
        return torch.zeros_like(first), gap

    beta = 0.7
    target = torch.softmax(beta * weight.flatten(), 0)
    noise = GeneratorNoise(torch.Generator().manual_seed(0))
    n = 40_000
    state = torch.multinomial(target, n, replacement=True, generator=torch.Generator().manual_seed(1))
    latents = ((state // 2).float().view(n, 1, 1), (state % 2).float().view(n, 1, 1))
    joint = []
    for backwards in (False, True):
        start = Chains(latents, *scores(latents))
        end, changed = gibbs_sweep(scores, start, beta, noise, backwards)
        after = (2 * end.latents[0] + end.latents[1])[:, 0, 0].long()
        counts = torch.bincount(after, minlength=4) / n
        torch.testing.assert_close(counts, target, atol=0.01, rtol=0)
        assert 0.1 < changed.mean() < 0.9
        joint.append(torch.bincount(4 * state + after, minlength=16).view(4, 4) / n)
    # pi(h) K(h, h') = pi(h') K~(h', h); the sweep itself is not reversible, so that this can fail.
    torch.testing.assert_close(joint[0], joint[1].T, atol=0.01, rtol=0)
    assert (joint[0] - joint[0].T).abs().max() > 0.02


def test_step_sizes_are_frozen_before_the_measured_chains_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured chains use the tuned step sizes and do not adapt them."""
    model, x = observed(linear_gaussian(2))
    used: list[Tensor] = []
    move = hamiltonian_move

    def recorded(scores: object, chains: Chains, beta: float, step: Tensor, *rest: object) -> object:
        used.append(step.clone())
        return move(scores, chains, beta, step, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(paths, "hamiltonian_move", recorded)
    chosen = settings(temperatures=20, max_temperatures=40, tolerance=1e-9)
    anneal(chosen, model, x[: paths.GROUP])
    tuned, measured, finer = used[paths.WARM_UP : paths.WARM_UP + 20], used[paths.WARM_UP + 20 :][:20], used[-40:]
    assert len(used) == paths.WARM_UP + 20 + 20 + 40
    # A step is kept as it is after its own transition; the last one was tried by no chain yet.
    for kept, next_tried in zip(measured[:-1], tuned[1:], strict=True):
        assert torch.equal(kept, next_tried)
    assert torch.stack(measured).std(0).min() > 0.01
    for t in range(40):
        assert torch.equal(finer[t], measured[t // 2])


def test_one_temperature_from_q_is_the_importance_weighted_bound() -> None:
    """Annealing in a single step is importance sampling: L_16 of the chains' starts."""
    model, x = observed(linear_gaussian(3, 2))
    (found,) = anneal(settings(temperatures=1, max_temperatures=1, start="inference"), model, x)
    noise = ImageNoise((0, "ais", "test", "forward 1"), range(N), torch.float32, CPU)
    with torch.no_grad():
        bound = torch.logsumexp(model(x, 16, noise).double(), 0) - math.log(16)
    np.testing.assert_allclose(found.log_px, bound.numpy(), rtol=1e-6)


@pytest.mark.parametrize("images", [10, 23])
def test_the_number_of_workers_changes_no_bit(images: int) -> None:
    """Of sharp posteriors, where the last bit of a product would turn a path."""
    model = built(GaussianMLP([20], [[50, 50]]), 36).float()
    with torch.no_grad():
        for p in model.parameters():
            p *= 3
    x = (torch.rand(images, 36, generator=torch.Generator().manual_seed(1)) < 0.4).float()
    settings = AIS(temperatures=40, max_temperatures=40, chains=4, simulated=0)
    found = [settings.anneal(model, x, seed=0, stream="test", workers=workers)[-1].log_px for workers in (1, 2, 8)]
    assert (found[0] == found[1]).all() and (found[0] == found[2]).all()


def test_a_categorical_latent_is_refused() -> None:
    model, x = observed(Categorical(3).build((6,), np.full(6, 0.4), torch.Generator().manual_seed(0)))
    with pytest.raises(UserError, match="categorical"):
        anneal(settings(), model, x)


def test_a_neural_decoder_agrees_with_a_plain_mean_over_the_prior() -> None:
    """A Bernoulli decoder with two Gaussian layers, small enough that draws of p(h) find every posterior."""
    architecture = GaussianMLP([5, 3], [[12], [8]])
    model, x = observed(architecture.build((10,), np.full(10, 0.3), torch.Generator().manual_seed(0)))
    (found,) = anneal(settings(), model, x)
    with torch.no_grad():
        h, _ = model.generative.sample(20_000, GeneratorNoise(torch.Generator().manual_seed(3)))
        draws = tuple(layer.transpose(0, 1).expand(-1, N, -1) for layer in h)
        log_w = model.generative.log_likelihood(x, draws).double()
    plain = (torch.logsumexp(log_w, 0) - math.log(len(log_w))).numpy()
    assert abs((found.log_px - plain).mean()) < 3 * math.sqrt((found.stderr**2).sum()) / N + 0.03


def subject(**changed: object) -> EstimatorInput:
    data = LinearGaussian(pixels=4, n_test=N, n_validation=10).load()
    model = linear_gaussian(2).float()
    return EstimatorInput(model, data, evaluation(**{"splits": ["test"], "workers": 1} | changed))


def test_the_report_agrees_with_its_arrays_and_with_the_exact_value() -> None:
    chosen = settings(images=20, simulated=8, temperatures=12, max_temperatures=12)
    seen: list[None] = []
    found = chosen.estimate(subject(splits=["validation", "test"]), lambda: seen.append(None))
    test = found.numbers["test"]
    assert found.numbers["validation"]["n"] == 10 and test["n"] == 20
    assert {key: array.shape for key, array in found.arrays.items()} == {
        **{
            f"{prefix}{key}": (n,)
            for prefix, n in (("", 20), ("validation_", 10))
            for key in ("log_px", "log_px_q", "stderr", "ess", "acceptance")
        },
        "simulated_lower": (8,),
        "simulated_upper": (8,),
    }
    assert test["nll_ais"] == pytest.approx(-found.arrays["log_px"].mean(), rel=1e-12)
    assert abs(test["nll_ais"] - test["exact_nll"]) < 3 * test["stderr_mc"] + 2 * abs(test["bias_mc"])
    assert test["stderr_mc"] == pytest.approx(math.sqrt((found.arrays["stderr"] ** 2).sum()) / 20)
    assert test["by_temperatures"] == {"12": -test["nll_ais"]}
    assert not test["converged"] and any("estimator.max_temperatures=48" in note for note in found.notes)
    assert found.numbers["simulated"]["gap"] == pytest.approx(
        found.numbers["simulated"]["upper"] - found.numbers["simulated"]["lower"]
    )
    assert found.reasons == {}
    columns, lines = table_of({**found.numbers, "rows": found.rows})
    assert columns == ["test", "validation"]
    assert float(lines["NLL_AIS, nats"][0]) == pytest.approx(test["nll_ais"], abs=0.051)
    assert float(lines["simulated: upper - lower, nats"][0]) == pytest.approx(
        found.numbers["simulated"]["gap"], abs=0.051
    )
    assert len(seen) > 12


def test_a_tally_displays_nothing_in_another_process(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("annealing", total=9, unit="transition") as progress:
        there = cloudpickle.loads(cloudpickle.dumps(Tally(progress, 9)))
        there.start("annealing test", 5)
        there.add(3)
    assert capsys.readouterr().err == ""
