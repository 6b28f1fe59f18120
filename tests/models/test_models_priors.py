"""KL as a property of q and prior, priors and models of a user's own package, and shared parameters."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from draws import built, noise
from every_objective import ELBO, IWAE, PIWAE, RWS, TVO, VIMCO
from own_models import Mixture, MixturePrior, VampMLP
from small_runs import TINY, finished, read_json, run, snapshot

from iwae_cli.cli.evaluate import evaluate
from iwae_cli.models import kl
from iwae_cli.models.architectures.mlp import GaussianMLP
from iwae_cli.models.base import LatentVariableModel
from iwae_cli.models.conditionals import GaussianConditional
from iwae_cli.models.priors import StandardNormal
from iwae_cli.objectives.base import BoundObjective
from iwae_cli.training.steps.plain import PlainStep

wild = partial(built, shape=4, seed=0, plus=0.3)


@pytest.fixture
def mixture() -> LatentVariableModel:
    return wild(GaussianMLP([2], [[6]], prior=MixturePrior(3)))


class Wide(StandardNormal):
    """A subclass, which may have another density."""


class Flow(GaussianConditional):
    """A subclass, which may have another density."""


def test_an_unknown_pair_of_q_and_prior_has_no_analytic_kl(mixture: LatentVariableModel) -> None:
    analytic = ELBO(analytic_kl=True)
    models = [wild(GaussianMLP([2], [[6]])) for _ in range(3)]
    models[1].generative.prior = Wide(2)
    models[2].inference.layers[0] = Flow(4, [6], 2)
    for model, known in zip((*models, mixture), (True, False, False, False), strict=True):
        assert model.has_kl == known
        assert (analytic.check_networks(model) is None) == known
        assert ELBO().check_networks(model) is None


def test_a_pair_can_be_registered_by_its_user(mixture: LatentVariableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kl, "_KNOWN", dict(kl._KNOWN))
    kl.register_kl(GaussianConditional, Mixture)(lambda q, p, given: q(given)[0].sum(-1))
    assert mixture.has_kl
    x = torch.ones(3, 4, dtype=torch.float64)
    torch.testing.assert_close(mixture.kl(x), mixture.inference.layers[0].mean(x).sum(-1))


MIXTURE = {
    "_target_": "iwae_cli.models.architectures.mlp.GaussianMLP",
    "latent_sizes": [3],
    "hidden_sizes": [[8]],
    "prior": {"_target_": "own_models.MixturePrior", "components": 4},
}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Arguments with which the command line knows the models and data of ``own_models``."""
    nodes = {
        "model/mixture": MIXTURE,
        "model/vamp": {key: value for key, value in MIXTURE.items() if key != "prior"}
        | {"_target_": "own_models.VampMLP"},
        "data/colours": {"_target_": "own_models.Colours"},
    }
    for name, node in nodes.items():
        path = tmp_path / "conf" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(node))
    monkeypatch.setenv("IWAE_ALLOW_TARGETS", "own_models")
    return ("--config-dir", str(tmp_path / "conf"), *TINY[2:])


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (("model=mixture", "objective=elbo", "objective.analytic_kl=true"), "objective.analytic_kl=false"),
        (("model=vamp", "objective=iwae", "objective.gradient=stl"), "prior.q.body.0.weight"),
        (("model=mixture", "model.prior.components=0"), "model.prior.components"),
        (("model=conv", "data=colours", "+data.height=6"), "(3, 6, 8)"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_any_work(
    own: tuple[str, ...], tmp_path: Path, overrides: tuple[str, ...], named: str
) -> None:
    code, _, err = run(*own, *overrides, f"output_dir={tmp_path / 'runs'}")
    assert code == 2, err
    assert named in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("model", ["mixture", "vamp"])
def test_a_model_with_a_prior_of_its_user_is_trained_and_evaluated(
    own: tuple[str, ...], tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished(tmp_path / "runs", *own, f"model={model}", "objective=iwae")
    assert np.isfinite(read_json(folder / "result.json")["test"]["nll"])
    refused = {"mixture": "objective=elbo objective.analytic_kl=true", "vamp": "objective.gradient=dreg"}[model]
    before = snapshot(folder)
    assert evaluate([str(folder), *own[:2], "estimator=gradient_snr", *refused.split()]) == 2
    assert {"mixture": "objective.analytic_kl=false", "vamp": "share parameters"}[model] in capsys.readouterr().err
    assert snapshot(folder) == before
    if model == "vamp":
        again = (*own, f"model={model}", "train=inference", f"init_from={folder}", f"output_dir={tmp_path / 'again'}")
        code, _, err = run(*again)
        assert code == 2 and "train=inference" in err
        assert not (tmp_path / "again").exists()


def test_a_run_on_pictures_in_colour(own: tuple[str, ...], tmp_path: Path) -> None:
    sizes = ("model=conv", "model.latent_size=3", "model.channels=[2,3]", "model.hidden_size=8")
    result = read_json(finished(tmp_path / "runs", *own, *sizes, "data=colours") / "result.json")
    assert np.isfinite(result["test"]["nll"])
    assert len(result["active_units"]) == 1


class Landing(BoundObjective):
    """An objective from outside that has no choice of gradients."""

    def __init__(self, k: int) -> None:
        super().__init__(k, "stl")

    def bound(self, log_w: Tensor) -> Tensor:
        return log_w.tanh().mean(0)


def test_shared_parameters_need_the_whole_derivative_of_one_loss() -> None:
    vamp, plain = wild(VampMLP([2], [[6]])), wild(GaussianMLP([2], [[6]]))
    assert "prior.q.loc.weight" in vamp.shared and plain.shared == ()
    for objective in (IWAE(3), ELBO(2), TVO(3)):
        assert objective.check_networks(vamp) is None
    for objective in (IWAE(3, "stl"), IWAE(3, "dreg"), PIWAE(2, 2), TVO(3, gradient="covariance"), RWS(3), VIMCO(3)):
        assert "prior.q.body.0.weight" in (objective.check_networks(vamp) or ""), objective
        assert objective.check_networks(plain) is None
    assert "write objective=iwae" in (Landing(1).check_networks(vamp) or "") and "biased" in Landing(1).caveats[0]


def test_a_shared_parameter_is_trained_by_the_derivative_of_the_bound() -> None:
    """Against the difference quotient of the bound on the same noise, which no rule of sharing has touched."""
    model = wild(VampMLP([2], [[6]]))
    x = torch.tensor([[0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    weight = model.inference.layers[0].loc.weight
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-300)
    PlainStep(model, IWAE(3), optimizer)(x, noise())
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[0, 0] += sign * 1e-5
            values.append(IWAE(3).bound(model(x, 3, noise())).mean().item())
            weight[0, 0] -= sign * 1e-5
    assert weight.grad is not None
    assert -weight.grad[0, 0].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)


def test_every_pixel_of_the_images_of_a_vampprior_is_trained_from_the_start() -> None:
    """Where an image is outside of [0, 1], its gradient is 0 and no optimizer moves it."""
    mean = np.linspace(0, 1, 50)
    model = GaussianMLP([2], [[6]], prior="vamp", prior_components=40).build((50,), mean, torch.Generator())
    images = model.generative.prior.get_parameter("images")
    assert (images > 0).all() and (images < 1).all()
    assert (images.mean(0) - torch.from_numpy(mean)).abs().max() < 0.06 and images.var(0).min() > 0
    x = torch.bernoulli(torch.from_numpy(mean).float().expand(8, -1), generator=torch.Generator().manual_seed(0))
    (-model(x, 5).mean()).backward()
    assert images.grad is not None and (images.grad != 0).all()
