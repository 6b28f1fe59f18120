"""Runs with a compiled step: resumed in the same bits (T11), recorded; plain where compiling fails or cannot be."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import killed_at
from small_runs import TINY, bits, finished, read_json, run, run_folders

from iwae_cli.core.device import compiler
from iwae_cli.core.noise import Noise
from iwae_cli.runs import runner
from iwae_cli.training.steps.graph import CannotCompileError
from iwae_cli.training.steps.plain import PlainStep

COMMAND = (*TINY, "objective.gradient=dreg")


CHOOSE = "iwae_cli.training.steps.choose."
needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("plain"), *COMMAND)


@pytest.fixture
def worthwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{CHOOSE}compiling_pays", lambda *_: True)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model: dict[str, torch.Tensor] = torch.load(folder / "checkpoint.pt", weights_only=True)["model"]
    return model


def plan(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / "checkpoint.pt", weights_only=True)["plan"]
    return found


def read_log(folder: Path) -> str:
    return (folder / "train.log").read_text()


def interrupt_at_18(self: runner.Runner, step: int) -> None:
    if step == 18:
        signal.raise_signal(signal.SIGINT)


@needs_compiler
def test_killed_and_resumed_a_compiled_run_ends_in_the_same_bits(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both processes compile without a cache: the bits must not depend on code from an earlier run."""
    compiled = finished(tmp_path / "undisturbed", *COMMAND, "device.compile=on")
    assert read_json(compiled / "result.json")["device"]["train_compiler"] == compiler()
    assert plan(compiled)["step"] == "compiled"

    monkeypatch.setenv("TORCHINDUCTOR_FX_GRAPH_CACHE", "0")
    arguments = [*COMMAND, "device.compile=on", f"output_dir={tmp_path / 'killed'}"]
    killed_at(18, arguments)
    (killed,) = run_folders(tmp_path / "killed")
    assert torch.load(killed / "checkpoint.pt", weights_only=True)["step"] == 17
    # The form that the run began with is kept, also where another one is asked for now.
    code, _, err = run(*COMMAND, "device.compile=off", f"output_dir={tmp_path / 'killed'}")
    assert code == 0, err
    assert bits(killed) == bits(compiled)

    # The plain form is the same training except for rounding, in a folder of the same name.
    assert plain.name == compiled.name
    assert read_json(plain / "result.json")["device"]["train_compiler"] is None
    torch.testing.assert_close(weights(compiled), weights(plain), rtol=1e-3, atol=1e-5)
    assert any(not torch.equal(value, weights(plain)[name]) for name, value in weights(compiled).items())


def test_without_a_compiler_the_step_is_plain(
    tmp_path: Path, plain: Path, worthwhile: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    compiler.cache_clear()
    try:
        assert compiler() is None
        assert bits(finished(tmp_path / "auto", *COMMAND)) == bits(plain)
        code, _, err = run(*COMMAND, "device.compile=on", f"output_dir={tmp_path / 'on'}")
    finally:
        compiler.cache_clear()
    assert code == 2 and not (tmp_path / "on").exists()
    (line,) = err.strip().splitlines()
    assert "device.compile=on needs a C++ compiler" in line and "device.compile=auto" in line


class Fails:
    def __init__(self, *_: Any, **__: Any) -> None:
        raise CannotCompileError("CppCompileError: Python.h: no such file")


class Pretends:
    """A step with the name of the compiled one that works like the plain one."""

    name = "compiled"

    def __init__(self, plain: PlainStep, x: torch.Tensor) -> None:
        self._plain = plain

    def __call__(self, x: torch.Tensor, noise: Noise) -> torch.Tensor:
        return self._plain(x, noise)


@needs_compiler
def test_where_compiling_fails_auto_continues_and_on_does_not(
    tmp_path: Path, plain: Path, worthwhile: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{CHOOSE}CompiledStep", Fails)
    folder = finished(tmp_path / "auto", *COMMAND)
    assert bits(folder) == bits(plain)
    assert read_json(folder / "result.json")["device"]["train_compiler"] is None
    assert "the step is not compiled" in read_log(folder) and "Python.h" in read_log(folder)
    code, _, err = run(*COMMAND, "device.compile=on", f"output_dir={tmp_path / 'on'}")
    assert code == 1
    *_, line = err.strip().splitlines()
    assert "device.compile=on: CppCompileError" in line and "device.compile=auto" in line


@needs_compiler
def test_a_run_that_lost_its_compiler_says_until_when_it_was_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (*COMMAND, "device.compile=on", f"output_dir={tmp_path}")
    with monkeypatch.context() as patch:
        patch.setattr(f"{CHOOSE}CompiledStep", Pretends)
        patch.setattr(runner.Runner, "on_step", interrupt_at_18)
        assert run(*arguments)[0] == 130
    monkeypatch.setattr(f"{CHOOSE}CompiledStep", Fails)
    code, _, err = run(*COMMAND, f"output_dir={tmp_path}")
    (folder,) = run_folders(tmp_path)
    assert code == 0 and "resuming is not exact: step was compiled and is plain" in err
    device = read_json(folder / "result.json")["device"]
    assert device["train_compiler"] == f"{compiler()} until step 18, then None"
    assert plan(folder)["step"] == "compiled until step 18, then plain"


@needs_compiler
@pytest.mark.parametrize("version", ["without a choice", "0.2.0"])
def test_a_checkpoint_of_an_earlier_version_keeps_its_plain_step(
    version: str, tmp_path: Path, plain: Path, worthwhile: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(f"{CHOOSE}compiling_pays", lambda *_: False)
        patch.setattr(runner.Runner, "on_step", interrupt_at_18)
        assert run(*COMMAND, f"output_dir={tmp_path}")[0] == 130
    (folder,) = run_folders(tmp_path)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["plan"].pop("step") == "plain"
    if version == "0.2.0":
        state["plan"]["processes"] = 1
    else:
        assert state["plan"].pop("compiler") is None
    torch.save(state, folder / "checkpoint.pt")
    monkeypatch.setattr(f"{CHOOSE}CompiledStep", Fails)
    code, _, err = run(*COMMAND, f"output_dir={tmp_path}")
    assert code == 0 and "not exact" not in err, err
    found, expected = bits(folder), bits(plain)
    for each in (found, expected):
        each["checkpoint"].pop("plan")
    assert found == expected


def test_runs_of_a_model_with_a_part_of_a_user_train_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``hydra/launcher=batched`` maps only classes of this package over several models."""
    file = tmp_path / "conf" / "model" / "own.yaml"
    file.parent.mkdir(parents=True)
    prior = "{_target_: own_parts.OwnPrior}"
    file.write_text(
        "_target_: iwae_cli.models.architectures.mlp.GaussianMLP\n"
        f"latent_sizes: [3]\nhidden_sizes: [[8]]\nprior: {prior}\n"
    )
    monkeypatch.setenv("IWAE_ALLOW_TARGETS", "own_parts")
    sweep = ("model=own", *TINY[2:], "seed=0,1", "hydra/launcher=batched", f"output_dir={tmp_path / 'outputs'}")
    code, _, err = run("-m", *sweep, "--config-dir", str(tmp_path / "conf"))
    assert code == 0, err
    assert [plan(folder)["runs_at_once"] for folder in run_folders(tmp_path / "outputs")] == [1, 1]
