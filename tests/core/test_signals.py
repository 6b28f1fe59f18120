"""A signal is heard wherever a run is at work, and a second one ends it at once; nothing is lost by either."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import TINY, TINY_TWO_LAYERS, bits, finished, read_json, run, run_folders

from iwae_cli.core import signals
from iwae_cli.core.errors import Interrupted
from iwae_cli.data.base import Split
from iwae_cli.evaluation.ais import AIS
from iwae_cli.evaluation.gradient_snr import gradient_snr
from iwae_cli.evaluation.likelihood import log_likelihood
from iwae_cli.models.architectures.mlp import GaussianMLP
from iwae_cli.models.base import LatentVariableModel
from iwae_cli.objectives.iwae import IWAE
from iwae_cli.runs.runner import Runner

PAUSES = """
import sys, time
from iwae_cli.cli import train as cli
from iwae_cli.runs import runner

def on_step(self, step):
    if step == 20:
        print("at step 20", flush=True)
        time.sleep(60)
runner.Runner.on_step = on_step
sys.exit(cli.train(sys.argv[1:]))
"""


@pytest.fixture
def model() -> LatentVariableModel:
    built = GaussianMLP([3], [[8]]).build(
        (4, 4), torch.full((16,), 0.5).double().numpy(), torch.Generator().manual_seed(0)
    )
    return built.eval()


class Alarm:
    """Raises at its third call, and counts them all."""

    def __init__(self) -> None:
        self.calls = 0
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self.calls += 1
            if self.calls >= 3:
                raise Interrupted(signal.SIGTERM)


def test_every_worker_hears_it_within_an_evaluation(model: LatentVariableModel) -> None:
    """40 images of 100,000 samples, one image a batch: the work of minutes, left after three pieces of 512."""
    alarm, began = Alarm(), time.monotonic()
    split = Split("test", torch.zeros(40, 16, dtype=torch.uint8), "")
    with pytest.raises(Interrupted):
        log_likelihood(model, split, k=100_000, seed=0, rows=512, workers=2, check=alarm)
    # Images that a worker begins before all are called off are left at once: of 40 x 196 pieces hardly any is done.
    assert 3 <= alarm.calls <= 50
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("start", ["prior", "inference"])
def test_it_is_heard_within_one_transition_of_annealing(model: LatentVariableModel, start: Any) -> None:
    alarm = Alarm()
    ais = AIS(chains=2, temperatures=1, max_temperatures=1, leapfrog_steps=1_000_000, start=start)
    with pytest.raises(Interrupted):
        ais.anneal(model, torch.zeros(1, 16, dtype=torch.uint8), seed=0, stream="test", workers=1, check=alarm)
    assert alarm.calls == 3


def test_it_is_heard_between_two_gradients(model: LatentVariableModel) -> None:
    alarm = Alarm()
    with pytest.raises(Interrupted):
        gradient_snr(model, IWAE(2), torch.zeros(5, 16), draws=1_000_000, seed=0, check=alarm)
    assert alarm.calls == 3


@pytest.mark.parametrize("at_pass", [2, 3])
def test_a_validation_that_is_interrupted(at_pass: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of training, and after its last step."""
    command = [*TINY, f"output_dir={tmp_path / 'interrupted'}"]
    command[command.index("schedule.passes=2")] = "schedule.passes=3"
    undisturbed = [o for o in command if not o.startswith("output_dir")]
    original, calls = Runner._validate, 0

    def validate(self: Runner) -> float:
        nonlocal calls
        calls += 1
        if calls == at_pass:
            signal.raise_signal(signal.SIGTERM)
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "_validate", validate)
        code, _, err = run(*command)
    assert code == 143, err
    (folder,) = run_folders(tmp_path / "interrupted")
    status = read_json(folder / "status.json")
    assert (status["status"], status["step"]) == ("interrupted", 13 * at_pass)
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 13 * at_pass
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == at_pass - 1
    code, _, err = run(*command)
    assert code == 0 and "has no row" not in err, err
    assert bits(folder) == bits(finished(tmp_path / "undisturbed", *undisturbed))


def test_a_second_ctrl_c_ends_it_at_once_and_nothing_is_lost(tmp_path: Path) -> None:
    """In a step that takes a minute; two within a moment are one."""
    command = [*TINY_TWO_LAYERS, f"output_dir={tmp_path / 'interrupted'}"]
    process = subprocess.Popen(
        [sys.executable, "-c", PAUSES, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "at step 20\n"
        for _ in range(2):
            os.kill(process.pid, signal.SIGINT)
            time.sleep(0.2)
        assert process.poll() is None
        time.sleep(signals.REPEATED_SECONDS)
        began = time.monotonic()
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=30)
        assert time.monotonic() - began < 2
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, "Traceback" in err) == (-signal.SIGINT, False)
    code, _, err = run(*command)
    assert code == 0, err
    (folder,) = run_folders(tmp_path / "interrupted")
    assert bits(folder) == bits(finished(tmp_path / "undisturbed", *TINY_TWO_LAYERS))
