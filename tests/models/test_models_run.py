"""Runs on grey levels and with discrete latents, from the command line."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import TINY, finished, read_json, run

import iwae_cli
from iwae_cli.cli.evaluate import evaluate
from iwae_cli.core.noise import GeneratorNoise
from iwae_cli.data.digits import Digits

GREY = ("data.binarization=none", "model.likelihood=discretized_logistic")


def test_grey_levels_have_honest_bits_per_dimension(tmp_path: Path) -> None:
    folder = finished(tmp_path, *GREY, *TINY)
    result = read_json(folder / "result.json")
    assert result["dataset"]["name"] == "digits_grey"
    test = result["test"]
    assert test["bits_per_dim"] == pytest.approx(test["nll"] / (64 * math.log(2)))
    # Better than 17 levels at equal odds, and a probability of grey levels: far above what binary pixels cost.
    assert 1.5 < test["bits_per_dim"] < math.log2(17)
    # The loaded model knows the levels: its draws use all of them and its scores are those of the run.
    model, _ = iwae_cli.load(folder)
    _, x = model.generative.sample(500, GeneratorNoise(torch.Generator().manual_seed(0)))
    assert set(x.unique().tolist()) == set(range(17))
    scored = model(Digits(binarization="none").load().test.float(), 50, GeneratorNoise(torch.Generator()))
    bound = (torch.logsumexp(scored, 0) - math.log(50)).mean().item()
    assert -bound == pytest.approx(test["nll"], abs=0.5)


@pytest.mark.usefixtures("drawn_pictures", "coarse")
def test_real_images_have_nats_no_bits_and_every_estimator(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], generator: torch.Generator
) -> None:
    np.save("x.npy", 7 + 3 * torch.randn(90, 4, 4, generator=generator).numpy())
    own = ("data=file", "data.path=x.npy", "data.levels=real", "data.splits=[0.6,0.2,0.2]", "model.likelihood=gaussian")
    sizes = ("model.latent_sizes=[2]", *TINY[1:], "evaluation.refine=10")
    folder = finished(tmp_path, *own, *sizes, "evaluation.images=12")
    result = read_json(folder / "result.json")
    test = result["test"]
    assert test["n"] == 12 and "bits_per_dim" not in test and "bits_per_dim" not in test["refined"]
    assert (folder / "figures" / "reconstructions.png").is_file() and "figures" not in result["reasons"]
    assert any("in nats" in note for note in result["notes"])
    # The data are noise of scale 3 in 16 dimensions: no model is below their entropy, and the start is near.
    assert test["nll"] == pytest.approx(16 * (math.log(3) + 0.5 * math.log(2 * math.pi * math.e)), abs=4)
    for estimator in (
        ("ais", "images=3", "chains=2", "temperatures=4", "max_temperatures=4", "leapfrog_steps=1", "simulated=2"),
        ("grid", "images=2", "points=33", "k=5"),
        ("sandwich", "simulated=3", "k=10"),
        ("gaps", "images=3"),
        ("gradient_snr", "images=2", "draws=8", "ks=[2,4]"),
    ):
        name, *keys = estimator
        capsys.readouterr()
        assert evaluate([str(folder), f"estimator={name}", *(f"estimator.{key}" for key in keys)]) == 0, estimator
        assert "bits per dimension  " not in capsys.readouterr().out
    code, _, err = run(*own, *sizes, "evaluation.precision=bf16", f"output_dir={tmp_path}")
    assert code == 2 and "evaluation.precision=float32" in err


REFUSED = {
    "data=linear_gaussian": "model.likelihood=gaussian",
    "data=linear_gaussian model=discrete objective=vimco": "model=linear_gaussian",
    "model.likelihood=gaussian": "model.likelihood=bernoulli",
    "model.noise_std=0.5": "with likelihood=gaussian",
    "model.likelihood=gaussian model.noise_std=fixed": "model.noise_std",
    "data.binarization=none": "model=one_layer",
    "model.likelihood=discretized_logistic": "data.binarization=none",
    "model=discrete data.binarization=none objective=vimco": "model.likelihood=discretized_logistic",
    "model=discrete": "objective=vimco",
    "model=conv model.channels=[8]": "model.channels",
    "training.backward=some": "training.backward must be one of all, roulette, got some",
    "training.tau=0": "training.tau must be in (0, 1], got 0.0",
    "training.backward=roulette objective=elbo": "ELBO as chosen is not",
    "evaluation.images=251": "more than the 250 images of test",
    "evaluation.refine=-1": "evaluation.refine must be >= 0, got -1",
    "evaluation.refine=some": "evaluation.refine must be an integer or all, got some",
    "evaluation.refine=10 evaluation.images=9": "evaluation.refine=10 is more than the 9 images of test",
    "evaluation.refine=51 evaluation.images=50": "write evaluation.refine=all",
    "evaluation.refine=1000 evaluation.images=50 evaluation.splits=[train,validation]": "the 50 images of train",
    "evaluation.refine=all model=discrete objective=vimco": "a Gaussian is fitted to real latents",
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_does_not_go_together_is_refused_with_what_does(tmp_path: Path, line: str) -> None:
    code, _, err = run(*TINY[2:], *line.split(), f"output_dir={tmp_path / 'runs'}")
    assert code == 2 and REFUSED[line] in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_a_discrete_run_knows_its_exact_nll(tmp_path: Path) -> None:
    model = ("model=categorical", "model.categories=5", "objective=rws")
    result = read_json(finished(tmp_path, *model, *TINY[2:], "evaluation.k=500") / "result.json")
    test = result["test"]
    assert abs(test["nll"] - test["exact_nll"]) < 3 * test["stderr_mc"] + 2 * abs(test["bias_mc"])
    assert result["active_units"] is None
    assert result["active_units_authors_rule"] is None
    assert result["reasons"]["active_units"]
