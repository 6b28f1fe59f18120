"""What becomes of a run folder on a disk: full, read-only, damaged, in the way, gone. One line, and nothing is lost."""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy.io import savemat
from small_runs import TINY, arrays, bits, finished, read_json, run, run_folders

from iwae_cli.cli import train as cli
from iwae_cli.core.errors import UserError
from iwae_cli.record.folder import RunFolder
from iwae_cli.runs.runner import Runner

pytestmark = pytest.mark.usefixtures("drawn_pictures")


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sound")


@pytest.fixture
def folder(template: Path, tmp_path: Path) -> Path:
    """A finished run of its own for every test."""
    if not run_folders(template):
        finished(template, *TINY)
    shutil.copytree(template, tmp_path / "outputs")
    (found,) = run_folders(tmp_path / "outputs")
    return found


def again(output_dir: Path, *overrides: str) -> tuple[int, str, str]:
    return run(*TINY, f"output_dir={output_dir}", *overrides)


def refused(output_dir: Path, *overrides: str, code: int = 2) -> str:
    """The one line that ends it."""
    ended, out, err = again(output_dir, *overrides)
    lines = [line for line in err.splitlines() if not line.startswith(("training  ", "evaluating "))]
    assert (ended, out, len(lines)) == (code, "", 1), err
    return lines[0]


def evaluate(folder: Path, *overrides: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = cli.evaluate([str(folder), *overrides])
    return code, out.getvalue(), err.getvalue()


def forbidden(*_: Any, **__: Any) -> None:
    raise AssertionError("this is not to be done again")


# A place that is none.


def a_file(place: Path) -> Path:
    place.write_text("mine")
    return place


def below_a_file(place: Path) -> Path:
    place.write_text("mine")
    return place / "deeper"


def dangling(place: Path) -> Path:
    place.symlink_to("nowhere")
    return place


def too_long(place: Path) -> Path:
    return place / ("x" * 300)


@pytest.mark.parametrize(
    ("make", "sweep"),
    [(a_file, ()), (below_a_file, ()), (dangling, ()), (too_long, ()), (a_file, ("-m", "seed=7,8"))],
)
def test_a_place_that_cannot_be_one(tmp_path: Path, make: Callable[[Path], Path], sweep: tuple[str, ...]) -> None:
    output_dir = make(tmp_path / "there")
    before = sorted(tmp_path.rglob("*"))
    line = refused(output_dir, *sweep)
    assert str(output_dir) in line and line.endswith("choose another folder with output_dir=...")
    assert sorted(tmp_path.rglob("*")) in (before, [*before, tmp_path / "there"])


def test_a_file_where_the_run_folder_belongs(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("mine")
    assert f"{folder} cannot be used (File exists: {folder})" in refused(folder.parent)


@pytest.mark.parametrize("key", ["output_dir", "init_from"])
def test_an_empty_name_is_not_the_folder_one_stands_in(key: str, tmp_path: Path) -> None:
    code, _, err = run(f"{key}=")
    assert (code, err) == (2, f"iwae-train: {key} must name a folder, got ''\n")
    assert list(tmp_path.iterdir()) == []


# A disk that takes nothing more.


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


FAILING = {
    "of the checkpoint": "iwae_cli.training.checkpoint.write_bytes",
    "of the table": "iwae_cli.record.jsonl.csv.DictWriter",
}


@pytest.mark.parametrize("where", ["of everything", *FAILING])
def test_a_full_disk(folder: Path, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    output_dir, on_pass = tmp_path / "small", Runner.on_pass

    def then_full(session: Runner, step: int, metrics: dict[str, float | None]) -> None:
        on_pass(session, step, metrics)
        # As after this pass: the row of the second is the first thing that does not go onto the disk.
        context.setattr("os.fsync", full)

    with monkeypatch.context() as context:
        if where == "of everything":
            context.setattr(Runner, "on_pass", then_full)
        else:
            context.setattr(FAILING[where], full)
        line = refused(output_dir, code=1)
    (small,) = run_folders(output_dir)
    assert f"{small} cannot be written to (No space left on device)" in line and "output_dir=..." in line
    status = read_json(small / "status.json")
    assert status["status"] == ("running" if where == "of everything" else "failed")
    assert not list(small.glob(".tmp-*"))
    assert again(output_dir)[0] == 0
    assert bits(small) == bits(folder)


def test_a_finished_run_can_be_read_where_nothing_can_be_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened = os.open

    def read_only(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and str(path).startswith(str(folder)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return opened(path, flags, *rest, **more)

    monkeypatch.setattr("os.open", read_only)
    code, out, _ = again(folder.parent)
    assert code == 0 and f"{read_json(folder / 'result.json')['test']['nll']:.2f}" in out
    assert f"{folder} cannot be written to (Read-only file system)" in caplog.text
    assert f"(Read-only file system: {folder / '.lock'})" in refused(folder.parent, "evaluation.k=60")
    assert f"(Read-only file system: {folder / '.lock'})" in refused(folder.parent, "restart=true")


def test_a_file_system_without_locks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", none)
    assert again(folder.parent)[0] == 0
    assert "cannot be locked: No locks available" in refused(folder.parent, "seed=1")


@pytest.mark.parametrize("what", ["renamed", "removed"])
def test_a_folder_that_is_gone_is_not_made_again(
    folder: Path, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output_dir, on_pass = tmp_path / "elsewhere", Runner.on_pass

    def gone(session: Runner, step: int, metrics: dict[str, float | None]) -> None:
        on_pass(session, step, metrics)
        if step == 13:
            place = session.folder.path
            place.rename(place.with_name("mine")) if what == "renamed" else shutil.rmtree(place)
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as context:
        context.setattr(Runner, "on_pass", gone)
        line = refused(output_dir, code=1)
    assert f"{output_dir / folder.name} is gone: it was renamed or removed" in line
    assert [path.name for path in output_dir.iterdir()] == (["mine"] if what == "renamed" else [])


# Damaged files.


def test_a_damaged_result(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = bits(folder)
    for content in ("{}", "[]", "null", '{"evaluation": 3}', "{"):
        (folder / "result.json").write_text(content)
        with pytest.raises(UserError, match=r"result\.json is damaged .*; remove it, the same command evaluates again"):
            RunFolder(folder).result()
    assert f"{folder / 'result.json'} is damaged" in refused(folder.parent)
    (folder / "result.json").unlink()
    monkeypatch.setattr("iwae_cli.runs.evaluate.log_likelihood", forbidden)
    assert again(folder.parent)[0] == 0
    assert bits(folder) == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("log_likelihood.npz", None),
        ("log_likelihood.npz", b""),
        ("log_likelihood.npz", b"PK\x03\x04 rubbish"),
        ("result.json", None),
        ("result.json", b"[]"),
        ("result.json", b"{}"),
    ],
)
def test_a_kept_evaluation_that_is_damaged_is_done_again(folder: Path, name: str, content: bytes | None) -> None:
    (kept,) = (folder / "evaluations").iterdir()
    result, values = read_json(kept / "result.json"), arrays(kept / "log_likelihood.npz")
    (kept / name).unlink() if content is None else (kept / name).write_bytes(content)
    code, out, err = evaluate(folder)
    assert code == 0 and "NLL_50" in out, err
    assert read_json(kept / "result.json")["test"] == result["test"]
    np.testing.assert_array_equal(arrays(kept / "log_likelihood.npz")["log_px"], values["log_px"])


def test_a_flipped_bit_in_a_kept_evaluation_is_seen(folder: Path) -> None:
    (kept,) = folder.glob("evaluations/*/log_likelihood.npz")
    sound = kept.read_bytes()
    content = bytearray(sound)
    content[len(content) // 2] ^= 4
    kept.write_bytes(content)
    assert evaluate(folder)[0] == 0
    assert kept.read_bytes() == sound


def test_what_can_be_made_again_is_and_nothing_else(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = bits(folder)
    pictures = {path.name: path.read_bytes() for path in (folder / "figures").iterdir()}
    (folder / "log_likelihood.npz").unlink()
    (folder / "metrics.csv").unlink()
    (folder / "figures" / "samples.png").unlink()
    monkeypatch.setattr("iwae_cli.runs.evaluate.log_likelihood", forbidden)
    monkeypatch.setattr("iwae_cli.training.trainer.Trainer.run", forbidden)
    code, out, err = again(folder.parent)
    assert code == 0 and "NLL_50" in out
    assert "made again, since it was gone or damaged: metrics.csv, log_likelihood.npz, figures/samples.png" in err
    assert bits(folder) == before
    assert {path.name: path.read_bytes() for path in (folder / "figures").iterdir()} == pictures
    assert again(folder.parent)[2] == ""

    scores = folder / "log_likelihood.npz"
    sound = scores.read_bytes()
    for damaged in (sound[:-30], sound[:200] + bytes(50) + sound[250:]):
        scores.write_bytes(damaged)
        assert "gone or damaged: log_likelihood.npz\n" in again(folder.parent)[2]
        assert scores.read_bytes() == sound
    for name in ("metrics.csv", "figures/samples.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:60])
    assert "gone or damaged: metrics.csv, figures/samples.png\n" in again(folder.parent)[2]
    assert bits(folder) == before and {p.name: p.read_bytes() for p in (folder / "figures").iterdir()} == pictures
    assert again(folder.parent)[2] == ""


def test_without_a_checkpoint_nothing_is_trained_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iwae_cli.training.trainer.Trainer.run", forbidden)
    for name in ("checkpoint.pt", "best.pt", "figures/samples.png"):
        (folder / name).unlink()
    before = {path: path.read_bytes() for path in folder.rglob("*.json")}
    code, out, err = again(folder.parent)
    assert code == 0 and "NLL_50" in out and err.count("\n") == 1
    assert (
        err.startswith("gone or damaged: figures/samples.png; to be made again they need checkpoint.pt")
        and "restart=true" in err
    )
    line = refused(folder.parent, "evaluation.k=51")
    assert f"{folder} is finished, and for another evaluation it needs its checkpoint.pt" in line
    assert "restart=true trains anew" in line
    assert {path: path.read_bytes() for path in folder.rglob("*.json")} == before
    (folder / "result.json").unlink()
    assert "needs its checkpoint.pt" in refused(folder.parent)


def test_files_where_folders_belong(folder: Path) -> None:
    shutil.rmtree(folder / "evaluations")
    shutil.rmtree(folder / "figures")
    (folder / "evaluations").write_text("mine")
    code, out, err = evaluate(folder)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{folder} cannot be used (Not a directory: {folder / 'evaluations'}" in err
    (folder / "evaluations").unlink()
    (folder / "figures").write_text("mine")
    code, out, err = again(folder.parent)
    assert code == 0 and "NLL_50" in out and "figures are missing: " in err and "Traceback" not in err
    assert (folder / "figures").read_text() == "mine"


def test_the_best_weights_are_told_apart_from_none(folder: Path) -> None:
    (folder / "best.pt").write_bytes((folder / "best.pt").read_bytes()[:-500])
    code, _, err = evaluate(folder, "evaluation.weights=best")
    assert code == 2 and err.count("\n") == 1 and f"{folder / 'best.pt'} cannot be read" in err
    (folder / "best.pt").unlink()
    code, _, err = evaluate(folder, "evaluation.weights=best")
    assert code == 2 and err.count("\n") == 1 and "best.pt is gone; evaluation.weights=last" in err


# What is read from elsewhere.


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda source: source / "config.yaml", "config.yaml is not a run folder: it has no config.yaml"),
        (lambda source: source.parent / "nowhere", "nowhere is not a run folder: it has no config.yaml"),
        (lambda source: rewritten(source, "model"), "config.yaml is damaged: it names no model"),
        (lambda source: (source / "checkpoint.pt").unlink() or source, "checkpoint.pt is not there"),
        (lambda source: (source / "checkpoint.pt").write_bytes(b"x") and source, "the command of the run with restart"),
    ],
)
def test_a_source_that_is_none(folder: Path, damage: Callable[[Path], Path], said: str) -> None:
    line = refused(folder.parent.parent / "new", f"init_from={damage(folder)}")
    assert line.startswith(f"iwae-train: init_from: {folder.parent}") and said in line
    assert not (folder.parent.parent / "new").exists()


def rewritten(source: Path, without: str) -> Path:
    config = yaml.safe_load((source / "config.yaml").read_text())
    del config[without]
    (source / "config.yaml").write_text(yaml.safe_dump(config))
    return source


def test_data_that_were_moved(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (784, 60), dtype=np.uint8)
    savemat(tmp_path / "old.mat", {"data": images[:, :40] / 255.0, "testdata": images[:, 40:] / 255.0})
    data = ("data=omniglot", f"data.path={tmp_path / 'old.mat'}", "evaluation.k=5")
    folder = finished(tmp_path / "outputs", *TINY, *data)
    (tmp_path / "old.mat").rename(tmp_path / "new.mat")
    shutil.rmtree(folder / "evaluations")
    code, _, err = evaluate(folder)
    assert code == 2 and "old.mat" in err
    code, _, err = evaluate(folder, f"data.path={tmp_path / 'new.mat'}")
    assert code == 0, err
    (kept,) = folder.glob("evaluations/*/result.json")
    assert read_json(kept)["test"] == read_json(folder / "result.json")["test"]
    savemat(tmp_path / "new.mat", {"data": images[:, :40] / 255.0, "testdata": images[:, 30:] / 255.0})
    code, _, err = evaluate(folder, f"data.path={tmp_path / 'new.mat'}", "evaluation.k=6")
    assert code == 2 and "are not those that" in err
    code, _, err = evaluate(folder, "data.binarization=none")
    assert code == 2 and "data.binarization cannot be changed after training" in err


def test_one_sample_has_no_error_of_its_own(folder: Path) -> None:
    code, out, err = evaluate(folder, "evaluation.k=1")
    assert code == 0, err
    (kept,) = (r for path in folder.glob("evaluations/*/result.json") if (r := read_json(path))["test"]["k"] == 1)
    assert kept["test"]["stderr_mc"] is kept["test"]["bias_mc"] is None
    assert kept["test"]["nll"] == -kept["test"]["bounds"]["1"]
    for name in ("stderr_mc", "bias_mc"):
        reason = kept["reasons"][f"test.{name}"]
        assert reason.startswith("one sample says nothing of its own error")
        assert f"test.{name} not available: {reason}" in out
