"""Runs on grey levels and with discrete latents, from the command line."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from small_runs import TINY, finished, read_json, run

import iwae_cli
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


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (("data.binarization=none",), "model=one_layer"),
        (("model.likelihood=discretized_logistic",), "data.binarization=none"),
        (("model=discrete", "data.binarization=none", "objective=vimco"), "model.likelihood=discretized_logistic"),
        (("model=discrete",), "objective=vimco"),
        (("model=conv", "model.channels=[8]"), "model.channels"),
    ],
)
def test_what_does_not_go_together_is_refused_with_what_does(
    tmp_path: Path, overrides: tuple[str, ...], named: str
) -> None:
    code, _, err = run(*overrides, f"output_dir={tmp_path / 'runs'}")
    assert code == 2
    assert named in err
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
