"""A checkpoint is read back as it was written; damaged and foreign files are refused in one line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from iwae_cli.core.errors import UserError
from iwae_cli.training import checkpoint
from iwae_cli.training.checkpoint import State


def state() -> State:
    linear = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(linear.parameters())
    linear(torch.ones(3)).sum().backward()
    optimizer.step()
    return State(
        identity="digits-0123",
        names={"data": "digits"},
        data_sha256="0" * 64,
        image_shape=(8, 8),
        levels=17,
        plan={"device": "cpu", "threads": 1},
        model=linear.state_dict(),
        optimizer=optimizer.state_dict(),
        step=7,
        bound_sum=-12.34567890123456789,
        diagnostics={"train/kl/1": 12.34567890123456789},
        measured=2,
        best={"step": 5, "bound": -80.5},
        seconds=1.5,
    )


def test_it_comes_back_as_it_was(tmp_path: Path) -> None:
    written = state()
    checkpoint.save(written, tmp_path / "checkpoint.pt")
    read = checkpoint.load(tmp_path / "checkpoint.pt", "digits-0123")
    plain = vars(written).keys() - {"model", "optimizer"}
    assert {key: getattr(read, key) for key in plain} == {key: getattr(written, key) for key in plain}
    torch.testing.assert_close(read.model, written.model, rtol=0, atol=0)
    torch.testing.assert_close(read.optimizer["state"], written.optimizer["state"], rtol=0, atol=0)
    assert read.optimizer["param_groups"] == written.optimizer["param_groups"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_one_of_an_earlier_version_has_no_sums_of_diagnostics(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    held = {key: value for key, value in vars(state()).items() if key not in ("diagnostics", "measured")}
    torch.save(held, path)
    read = checkpoint.load(path)
    assert (read.diagnostics, read.measured, read.step) == ({}, 0, 7)


def refused(path: Path, identity: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        checkpoint.load(path, identity)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(path))
    return str(caught.value)


def test_a_missing_file_and_one_of_another_run(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    assert "has no checkpoint yet" in refused(path)
    checkpoint.save(state(), path)
    assert refused(path, "digits-4567").endswith("is a checkpoint of digits-0123, not of digits-4567")


def test_cut_files_and_rubbish(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(state(), path)
    whole = path.read_bytes()
    torch.save({"weights": torch.zeros(3)}, path)
    other = path.read_bytes()
    for content in (*(whole[:size] for size in (0, 1, 1000, -1, -200)), b"PK\x03\x04 no archive", other):
        path.write_bytes(content)
        assert "cannot be read as a checkpoint" in refused(path)


def test_one_flipped_bit(tmp_path: Path) -> None:
    """torch itself reads it as another weight."""
    path = tmp_path / "checkpoint.pt"
    written = state()
    checkpoint.save(written, path)
    weight = written.model["weight"]
    content = bytearray(path.read_bytes())
    content[content.index(weight.numpy().tobytes()) + 5] ^= 4
    path.write_bytes(content)
    assert not torch.equal(torch.load(path, weights_only=True)["model"]["weight"], weight)
    assert "it is damaged" in refused(path) and "restart=true" in refused(path)


def test_a_damaged_checkpoint_falls_back_to_the_previous_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A damaged one never replaces it; once the newest has been read back it may go."""
    path, written = tmp_path / "checkpoint.pt", state()
    for step in (7, 8, 9):
        written.step = step
        checkpoint.save(written, path)
    (tmp_path / "status.json").write_text('{"step": 9}')
    path.write_bytes(path.read_bytes()[:1000])
    checkpoint.drop_previous(path)
    assert checkpoint.load(path, "digits-0123").step == 8
    (line,) = caplog.messages
    assert str(path) in line and "step 9" in line and "step 8" in line
    written.step = 10
    checkpoint.save(written, path)
    assert checkpoint.load(checkpoint.previous(path)).step == 8
    checkpoint.drop_previous(path)
    assert checkpoint.load(path).step == 10
    assert not checkpoint.previous(path).exists()


def refused_best(path: Path, of: State) -> str:
    with pytest.raises(UserError) as caught:
        checkpoint.load_best(path, of)
    return str(caught.value)


def test_the_best_weights(tmp_path: Path) -> None:
    path, run = tmp_path / "best.pt", state()
    checkpoint.save_best(run, run.model, path)
    step, weights = checkpoint.load_best(path, run)
    assert step == 5
    torch.testing.assert_close(weights, dict(run.model), rtol=0, atol=0)
    other = state()
    other.identity = "digits-4567"
    assert refused_best(path, other).endswith("is a checkpoint of digits-0123, not of digits-4567")
    for content in (b"", path.read_bytes()[:1000], b"rubbish"):
        path.write_bytes(content)
        assert "it is damaged" in refused_best(path, run)
    torch.save([1, 2], path)
    assert "it is damaged" in refused_best(path, run)
    path.unlink()
    last = "; use iwae-eval RUN_FOLDER evaluation.weights=last"
    assert f"best.pt is gone{last}" in refused_best(path, run)
    run.best = {}
    assert f"no validation bound was finite yet{last}" in refused_best(path, run)


class Harmful:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_a_file_that_would_run_something_is_refused_before_it_does(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save(vars(state()) | {"plan": Harmful(f"touch {tmp_path / 'harm'}")}, path)
    assert "cannot be read as a checkpoint" in refused(path)
    assert not (tmp_path / "harm").exists()
