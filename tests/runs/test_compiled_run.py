"""Runs with a compiled step: resumed in the same bits (T11), recorded; plain where compiling fails or cannot be."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import TINY, bits, finished, read_json, run, run_folders

from iwae_cli.core.device import compiler
from iwae_cli.runs import runner
from iwae_cli.training import trainer
from iwae_cli.training.steps.compiled import CannotCompileError

COMMAND = (*TINY, "objective.gradient=dreg")

KILLED = """
import os, signal, sys
from iwae_cli.cli import train as cli
from iwae_cli.runs import runner
from iwae_cli.training import trainer

trainer.SAVE_EVERY_SECONDS = -1.0
def on_step(self, step):
    if step == 18:
        os.kill(os.getpid(), signal.SIGKILL)
runner.Runner.on_step = on_step
sys.exit(cli.train(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return bits(finished(tmp_path_factory.mktemp("plain"), *COMMAND))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model: dict[str, torch.Tensor] = torch.load(folder / "checkpoint.pt", weights_only=True)["model"]
    return model


def read_log(folder: Path) -> str:
    return (folder / "train.log").read_text()


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
def test_killed_and_resumed_a_compiled_run_ends_in_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two processes make the code anew: it must not depend on what is found from an earlier time."""
    compiled = finished(tmp_path / "undisturbed", *COMMAND, "device.compile=on")
    assert read_json(compiled / "result.json")["device"]["train_compiler"] == compiler()
    assert "the step is compiled" in read_log(compiled)

    monkeypatch.setenv("TORCHINDUCTOR_FX_GRAPH_CACHE", "0")
    arguments = [*COMMAND, "device.compile=on", f"output_dir={tmp_path / 'killed'}"]
    process = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, timeout=600)
    assert process.returncode == -signal.SIGKILL, process.stderr
    (killed,) = run_folders(tmp_path / "killed")
    assert torch.load(killed / "checkpoint.pt", weights_only=True)["step"] == 17
    # What was decided when it began holds, whatever is asked for now.
    code, _, err = run(*COMMAND, "device.compile=off", f"output_dir={tmp_path / 'killed'}")
    assert code == 0, err
    assert bits(killed) == bits(compiled)
    assert read_log(killed).count("the step is compiled") == 2

    # The same training but for rounding, in a folder of the same name.
    plain = finished(tmp_path / "plain", *COMMAND, "device.compile=off")
    assert plain.name == compiled.name
    assert read_json(plain / "result.json")["device"]["train_compiler"] is None
    torch.testing.assert_close(weights(compiled), weights(plain), rtol=1e-3, atol=1e-5)
    assert any(not torch.equal(value, weights(plain)[name]) for name, value in weights(compiled).items())


def test_a_run_too_short_to_gain_is_not_compiled(plain: dict[str, Any]) -> None:
    assert plain["checkpoint"]["plan"]["compiler"] is None


@pytest.fixture
def worthwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "pays", lambda *_: True)


def test_without_a_compiler_the_step_is_plain(
    tmp_path: Path, plain: dict[str, Any], worthwhile: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    compiler.cache_clear()
    try:
        assert compiler() is None
        assert bits(finished(tmp_path / "auto", *COMMAND)) == plain
        code, _, err = run(*COMMAND, "device.compile=on", f"output_dir={tmp_path / 'on'}")
    finally:
        compiler.cache_clear()
    assert code == 2 and not (tmp_path / "on").exists()
    (line,) = err.strip().splitlines()
    assert "device.compile=on needs a C++ compiler" in line and "device.compile=auto" in line


class Fails:
    def __init__(self, *_: Any, **__: Any) -> None:
        raise CannotCompileError("CppCompileError: Python.h: no such file")


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
def test_where_compiling_fails_auto_goes_on_and_on_does_not(
    tmp_path: Path, plain: dict[str, Any], worthwhile: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "CompiledStep", Fails)
    folder = finished(tmp_path / "auto", *COMMAND)
    assert bits(folder) == plain
    assert read_json(folder / "result.json")["device"]["train_compiler"] is None
    assert "the step is not compiled" in read_log(folder) and "Python.h" in read_log(folder)
    code, _, err = run(*COMMAND, "device.compile=on", f"output_dir={tmp_path / 'on'}")
    assert code == 1
    (line,) = err.strip().splitlines()
    assert "device.compile=on: CppCompileError" in line and "device.compile=auto" in line


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
def test_a_run_that_lost_its_compiler_says_until_when_it_was_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (*COMMAND, "device.compile=on", f"output_dir={tmp_path}")
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "compile", lambda self: None)
        patch.setattr(runner.Runner, "on_step", lambda self, step: step == 18 and signal.raise_signal(signal.SIGINT))
        assert run(*arguments)[0] == 130
    monkeypatch.setattr(trainer, "CompiledStep", Fails)
    code, _, err = run(*COMMAND, f"output_dir={tmp_path}")
    (folder,) = run_folders(tmp_path)
    assert code == 0 and "resuming is not exact" in err
    assert read_json(folder / "result.json")["device"]["train_compiler"] == f"{compiler()} until step 18"


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
def test_a_run_from_before_there_was_a_choice_stays_plain(
    tmp_path: Path, plain: dict[str, Any], worthwhile: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(session, "pays", lambda *_: False)
        patch.setattr(runner.Runner, "on_step", lambda self, step: step == 18 and signal.raise_signal(signal.SIGINT))
        assert run(*COMMAND, f"output_dir={tmp_path}")[0] == 130
    (folder,) = run_folders(tmp_path)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["plan"].pop("compiler") is None
    torch.save(state, folder / "checkpoint.pt")
    monkeypatch.setattr(trainer, "CompiledStep", Fails)
    code, _, err = run(*COMMAND, f"output_dir={tmp_path}")
    assert code == 0 and "not exact" not in err, err
    assert bits(folder) == plain


@pytest.mark.parametrize("value", ["yes", "true", "1"])
def test_an_unknown_choice_is_one_line(value: str, tmp_path: Path) -> None:
    code, _, err = run(*COMMAND, f"device.compile={value}", f"output_dir={tmp_path / 'none'}")
    assert code == 2 and len(err.strip().splitlines()) == 1
    assert "device.compile must be one of auto, on, off" in err
