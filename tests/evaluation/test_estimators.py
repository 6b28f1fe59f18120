"""What holds for every estimator: refused settings, a signal, one image, and numbers that nothing else changes."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from draws import built, drawn, split_of
from evaluations import evaluation

from iwae_cli.config.build import build
from iwae_cli.core.errors import Interrupted, UserError
from iwae_cli.data.base import Data
from iwae_cli.evaluation.ais.estimator import AIS
from iwae_cli.evaluation.estimator import Estimator, EstimatorInput
from iwae_cli.evaluation.gaps import Gaps
from iwae_cli.evaluation.gradient_snr import GradientSNR
from iwae_cli.evaluation.grid import Grid
from iwae_cli.evaluation.likelihood import LogLikelihood, log_likelihood
from iwae_cli.evaluation.sandwich import Sandwich
from iwae_cli.evaluation.thermodynamic import Thermodynamic
from iwae_cli.models.architectures.linear_gaussian import LinearGaussianModel
from iwae_cli.objectives.iwae import IWAE

N = 19


def subject(name: str, **changed: Any) -> EstimatorInput:
    """A chain, for the grid one of two latents, and draws of it."""
    model = built(LinearGaussianModel([2] if name == "grid" else [3, 2]), 4, mean=0.0)
    x = drawn(model, N)
    data = Data("drawn", "", x, x, x, None, "none", (4,))
    return EstimatorInput(
        model, data, evaluation(**{"splits": ["test"], "workers": 1, "k": 300, "refine": 5} | changed), IWAE
    )


def ais(**changed: Any) -> AIS:
    return AIS(**{"temperatures": 4, "max_temperatures": 4, "leapfrog_steps": 2, "simulated": 0} | changed)


ESTIMATORS: dict[str, Estimator] = {
    "likelihood": LogLikelihood(),
    "ais": ais(),
    "gaps": Gaps(300),
    "grid": Grid(k=100, points=41),
    "sandwich": Sandwich(1000, N),
    "thermodynamic": Thermodynamic(300, 4),
    "gradient_snr": GradientSNR(ks=[1, 4], draws=12, images=5),
}


def flat(numbers: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in numbers.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        elif value is None or isinstance(value, int | float):
            yield prefix + key, value


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("name", ESTIMATORS)
def test_neither_rows_nor_workers_nor_other_images_change_a_number(name: str) -> None:
    """And the model stays as it was."""
    asked = subject(name, rows=20_000)
    before = {key: value.clone() for key, value in asked.model.state_dict().items()}
    whole = ESTIMATORS[name].estimate(asked, lambda: None)
    assert all(p.grad is None and p.requires_grad for p in asked.model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in asked.model.state_dict().items())
    for rows, workers in ((64, 2), (300, 1)):
        other = ESTIMATORS[name].estimate(subject(name, rows=rows, workers=workers), lambda: None)
        assert dict(flat(other.numbers)) == pytest.approx(dict(flat(whole.numbers)), rel=1e-7, abs=1e-9, nan_ok=True)
        for key, values in whole.arrays.items():
            np.testing.assert_allclose(other.arrays[key], values, rtol=1e-9, atol=1e-12, err_msg=key)
    fewer = Sandwich(1000, 7) if name == "sandwich" else ESTIMATORS[name]
    first = fewer.estimate(subject(name, images=7), lambda: None)
    again = ESTIMATORS[name].estimate(subject(name, seed=1), lambda: None)
    for key, values in whole.arrays.items():
        np.testing.assert_allclose(first.arrays[key], values[:7], rtol=1e-9, atol=1e-12, err_msg=key)
        assert (again.arrays[key] != values).all() or "exact" in key or name == "grid", "other noise"


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name != "gradient_snr"])
def test_one_image_has_no_standard_error(name: str) -> None:
    asked = Sandwich(2, 1) if name == "sandwich" else ESTIMATORS[name]
    found = asked.estimate(subject(name, images=1), lambda: None)
    missing = {key for key, value in flat(found.numbers) if value is None}
    assert missing == set(found.reasons) and missing
    assert all("stderr" in key and not key.endswith("stderr_mc") for key in missing)
    assert all(reason.endswith("has no standard error") for reason in found.reasons.values())


class Alarm:
    """Raises Interrupted from its third call on; counts the calls."""

    def __init__(self) -> None:
        self.calls = 0
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self.calls += 1
            if self.calls >= 3:
                raise Interrupted(signal.SIGTERM)


ENDLESS: dict[str, Estimator] = {
    **{"gaps": Gaps(10**6), "grid": Grid(k=10**6, points=20_001), "sandwich": Sandwich(10**6, N)},
    **{"thermodynamic": Thermodynamic(10**6), "gradient_snr": GradientSNR(ks=[2], draws=10**6)},
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_signal_ends_an_estimator_after_one_piece_of_work(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iwae_cli.evaluation.proposals.STEPS", 10**6)
    alarm = Alarm()
    with pytest.raises(Interrupted):
        ENDLESS[name].estimate(subject(name), alarm)
    assert 3 <= alarm.calls <= 3 + N, "an image that has begun sees it once"


@pytest.mark.parametrize("start", ["prior", "inference"])
def test_a_signal_ends_one_transition_of_annealing(start: str) -> None:
    alarm, asked = Alarm(), ais(temperatures=1, max_temperatures=1, leapfrog_steps=10**6, start=start)
    with pytest.raises(Interrupted):
        asked.anneal(subject("ais").model, torch.zeros(1, 4).double(), seed=0, stream="test", workers=1, check=alarm)
    assert alarm.calls == 3


def test_a_signal_ends_an_evaluation_in_every_worker() -> None:
    """40 images of 100,000 samples, one image a batch, would take minutes; it ends after three pieces of 512."""
    alarm, began = Alarm(), time.monotonic()
    with pytest.raises(Interrupted):
        log_likelihood(
            subject("").model, split_of(torch.zeros(40, 4).double()), k=10**5, seed=0, rows=512, workers=2, check=alarm
        )
    # Each other worker may begin a piece before it sees the error: few of the 40 x 196 pieces are done.
    assert 3 <= alarm.calls <= 50
    assert time.monotonic() - began < 20


SETTINGS: dict[type[Estimator], dict[str, Any]] = {
    AIS: {"temperatures": 4},
    GradientSNR: {"ks": [1]},
    Grid: {"k": 5},
    Sandwich: {"k": 5, "simulated": 3},
}


@pytest.mark.parametrize(
    ("kind", "changed", "message"),
    [
        (AIS, {"chains": 1}, "chains must be >= 2, got 1"),
        (AIS, {"temperatures": 0}, "temperatures must be >= 1, got 0"),
        (AIS, {"leapfrog_steps": 0}, "leapfrog_steps must be >= 1, got 0"),
        (AIS, {"max_temperatures": 3}, "max_temperatures must be >= temperatures = 4, got 3"),
        (AIS, {"tolerance": math.nan}, "tolerance must be finite and > 0, got nan"),
        (AIS, {"start": "posterior"}, "start must be one of prior, inference, got posterior"),
        (AIS, {"images": 0}, "images must be >= 1, got 0"),
        (AIS, {"simulated": -1}, "simulated must be >= 0, got -1"),
        (GradientSNR, {"ks": []}, r"ks must hold at least one k, got \[\]"),
        (GradientSNR, {"ks": [0, 1]}, r"ks must be >= 1 and rise, got \[0, 1\]"),
        (GradientSNR, {"ks": [5, 1]}, r"ks must be >= 1 and rise, got \[5, 1\]"),
        (GradientSNR, {"draws": 7}, "draws must be >= 8, got 7"),
        (GradientSNR, {"images": 0}, "images must be >= 1, got 0"),
        (Grid, {"k": 0}, "k must be >= 1, got 0"),
        (Grid, {"span": 0}, "span must be finite and > 0, got 0"),
        (Grid, {"points": 560}, "points must be odd, got 560"),
        (Grid, {"points": 1}, "points must be >= 3, got 1"),
        (Grid, {"images": 0}, "images must be >= 1, got 0"),
        (Sandwich, {"k": 1}, "k must be >= 2, got 1"),
        (Sandwich, {"simulated": 0}, "simulated must be >= 1, got 0"),
    ],
)
def test_wrong_settings_are_named(kind: type[Estimator], changed: dict[str, Any], message: str) -> None:
    node = {"_target_": f"{kind.__module__}.{kind.__name__}"} | SETTINGS[kind]
    with pytest.raises(UserError, match=f"^estimator.{message}"):
        build(node | changed, Estimator, "estimator")
