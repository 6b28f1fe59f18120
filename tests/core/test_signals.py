"""A signal ends every long computation after one piece of work; signals to whole runs are in runs/test_resume.py."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

import pytest
import torch

from iwae_cli.core.errors import Interrupted
from iwae_cli.data.base import Split
from iwae_cli.evaluation.ais import AIS
from iwae_cli.evaluation.gradient_snr import gradient_snr
from iwae_cli.evaluation.likelihood import log_likelihood
from iwae_cli.models.architectures.mlp import GaussianMLP
from iwae_cli.models.base import LatentVariableModel
from iwae_cli.objectives.iwae import IWAE


@pytest.fixture
def model() -> LatentVariableModel:
    built = GaussianMLP([3], [[8]]).build(
        (4, 4), torch.full((16,), 0.5).double().numpy(), torch.Generator().manual_seed(0)
    )
    return built.eval()


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


def test_it_ends_an_evaluation_in_every_worker(model: LatentVariableModel) -> None:
    """40 images of 100,000 samples, one image a batch, would take minutes; it ends after three pieces of 512."""
    alarm, began = Alarm(), time.monotonic()
    split = Split("test", torch.zeros(40, 16, dtype=torch.uint8), "")
    with pytest.raises(Interrupted):
        log_likelihood(model, split, k=100_000, seed=0, rows=512, workers=2, check=alarm)
    # Each other worker may begin a piece before it sees the error: few of the 40 x 196 pieces are done.
    assert 3 <= alarm.calls <= 50
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("start", ["prior", "inference"])
def test_it_ends_one_transition_of_annealing(model: LatentVariableModel, start: Any) -> None:
    alarm = Alarm()
    ais = AIS(chains=2, temperatures=1, max_temperatures=1, leapfrog_steps=1_000_000, start=start)
    with pytest.raises(Interrupted):
        ais.anneal(model, torch.zeros(1, 16, dtype=torch.uint8), seed=0, stream="test", workers=1, check=alarm)
    assert alarm.calls == 3


def test_it_ends_between_two_gradients(model: LatentVariableModel) -> None:
    alarm = Alarm()
    with pytest.raises(Interrupted):
        gradient_snr(model, IWAE(2), torch.zeros(5, 16), draws=1_000_000, seed=0, check=alarm)
    assert alarm.calls == 3
