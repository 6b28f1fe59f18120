"""A run folder that is read-only, damaged or in the way ends in one line on standard error, and no data are lost."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import Fault
from scipy.io import savemat
from small_runs import TINY, bits, evaluate, finished, read_json, run

from iwae_cli.core.errors import UserError
from iwae_cli.record.folder import RunFolder


def again(output_dir: Path, *overrides: str) -> tuple[int, str, str]:
    return run(*TINY, f"output_dir={output_dir}", *overrides)


def refused(output_dir: Path, *overrides: str, code: int = 2) -> str:
    """The one line that ends it."""
    ended, out, err = again(output_dir, *overrides)
    lines = [line for line in err.splitlines() if not line.startswith(("training  ", "evaluating "))]
    assert (ended, out, len(lines)) == (code, "", 1), err
    return lines[0]


def nothing_computed(folder: Path) -> ExitStack:
    """While entered, training or evaluating fails the test."""

    def fail(_: Path) -> None:
        raise AssertionError("computed again")

    stack = ExitStack()
    for event in ("checkpoint.pt", "best.pt", "evaluations/*"):
        stack.enter_context(Fault(fail, [event], folder.parent))
    return stack


# A path that cannot hold the run folder.


PLACES: dict[str, tuple[Callable[[Path], object], str]] = {
    "below a file": (lambda place: place.write_text("mine"), "deeper"),
    "a dangling link": (lambda place: place.symlink_to("nowhere"), ""),
    "too long": (lambda place: None, "x" * 300),
    "a file, for a sweep": (lambda place: place.write_text("mine"), ""),
}


@pytest.mark.parametrize("how", PLACES)
def test_an_output_dir_that_cannot_be_created(tmp_path: Path, how: str) -> None:
    make, deeper = PLACES[how]
    make(tmp_path / "there")
    before = sorted(tmp_path.rglob("*"))
    output_dir = tmp_path / "there" / deeper
    line = refused(output_dir, *(("-m", "seed=7,8") if "sweep" in how else ()))
    # A name that is too long for a file is too long for a line; its reason is not.
    named = "(File name too long" if how == "too long" else str(output_dir)
    assert named in line and str(output_dir)[:20] in line
    assert line.endswith("choose another folder with output_dir=...") and len(line) <= 300
    assert sorted(tmp_path.rglob("*")) in (before, [*before, tmp_path / "there"])


# A disk that cannot be written to.


def test_a_finished_run_can_be_read_where_nothing_can_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def read_only(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and str(path).startswith(str(folder)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return opened(path, flags, *rest, **more)

    monkeypatch.setattr("os.open", read_only)
    code, out, _ = again(folder.parent)
    assert code == 0 and f"{read_json(folder / 'result.json')['test']['nll']:.2f}" in out
    assert f"{folder} cannot be used (Read-only file system: .lock)" in refused(folder.parent, "evaluation.k=60")
    assert f"{folder} cannot be used (Read-only file system: .lock)" in refused(folder.parent, "restart=true")


def test_a_file_system_without_locks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", none)
    assert again(folder.parent)[0] == 0
    assert "cannot be locked: No locks available" in refused(folder.parent, "seed=1")


# Damaged files.


def test_a_damaged_result(folder: Path) -> None:
    before = bits(folder)
    for content in ("{}", "[]", "null", '{"evaluation": 3}', "{"):
        (folder / "result.json").write_text(content)
        with pytest.raises(UserError) as refusal:
            RunFolder(folder).result()
        assert str(folder / "result.json") in str(refusal.value)
    assert str(folder / "result.json") in refused(folder.parent)
    (folder / "status.json").write_text('{"status": 3}')
    (folder / "result.json").unlink()
    with nothing_computed(folder):
        assert again(folder.parent)[0] == 0
    assert bits(folder) == before


def test_a_damaged_evaluation_is_repeated(folder: Path) -> None:
    (kept,) = (folder / "evaluations").iterdir()
    result, values = read_json(kept / "result.json"), (kept / "log_likelihood.npz").read_bytes()
    flipped = bytearray(values)
    flipped[len(flipped) // 2] ^= 4
    for name, content in (
        ("log_likelihood.npz", None),
        ("log_likelihood.npz", b"PK\x03\x04 rubbish"),
        ("log_likelihood.npz", flipped),
        ("result.json", None),
        ("result.json", b"[]"),
    ):
        (kept / name).unlink() if content is None else (kept / name).write_bytes(content)
        code, out, err = evaluate(folder)
        assert code == 0 and "NLL_50" in out, (name, content, err)
        assert read_json(kept / "result.json")["test"] == result["test"]
        assert (kept / "log_likelihood.npz").read_bytes() == values


def test_derived_files_are_regenerated_and_nothing_else(folder: Path) -> None:
    before = bits(folder)
    pictures = {path.name: path.read_bytes() for path in (folder / "figures").iterdir()}
    assert pictures.keys() >= {"training.png", "bound_vs_k.png", "samples.png", "reconstructions.png"}
    scores, table, samples = (folder / n for n in ("log_likelihood.npz", "metrics.csv", "figures/samples.png"))
    sound = scores.read_bytes()
    for path in (scores, table, samples):
        path.unlink()
    for names in (("metrics.csv", "log_likelihood.npz", "figures/samples.png"), ("log_likelihood.npz",)):
        with nothing_computed(folder):
            code, out, err = again(folder.parent)
        assert code == 0 and "NLL_50" in out and all(name in err for name in names), err
        assert bits(folder) == before
        assert {path.name: path.read_bytes() for path in (folder / "figures").iterdir()} == pictures
        scores.write_bytes(sound[:200] + bytes(50) + sound[250:])
    for path in (table, samples):
        path.write_bytes(path.read_bytes()[:60])
    _, _, err = again(folder.parent)
    assert all(name in err for name in ("metrics.csv", "log_likelihood.npz", "figures/samples.png")), err
    assert bits(folder) == before and {p.name: p.read_bytes() for p in (folder / "figures").iterdir()} == pictures
    assert again(folder.parent)[2] == ""


def test_without_a_checkpoint_nothing_is_retrained(folder: Path) -> None:
    for name in ("checkpoint.pt", "best.pt", "figures/samples.png"):
        (folder / name).unlink()
    before = {path: path.read_bytes() for path in folder.rglob("*.json")}
    with nothing_computed(folder):
        code, out, err = again(folder.parent)
        assert code == 0 and "NLL_50" in out and err.count("\n") == 1
        assert "figures/samples.png" in err and "checkpoint.pt" in err and "restart=true" in err
        line = refused(folder.parent, "evaluation.k=51")
        assert str(folder) in line and "checkpoint.pt" in line and "restart=true" in line
        assert {path: path.read_bytes() for path in folder.rglob("*.json")} == before
        (folder / "result.json").write_text("{")
        line = refused(folder.parent)
        assert "evaluations/" in line and "restart=true" in line and "remove it" not in line
        (kept,) = folder.glob("evaluations/*/result.json")
        shutil.copyfile(kept, folder / "result.json")
        assert again(folder.parent)[0] == 0
        (folder / "result.json").unlink()
        assert "checkpoint.pt" in refused(folder.parent)


def test_files_where_folders_belong(folder: Path) -> None:
    shutil.rmtree(folder / "evaluations")
    shutil.rmtree(folder / "figures")
    (folder / "evaluations").write_text("mine")
    code, out, err = evaluate(folder)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{folder} cannot be used (Not a directory: evaluations" in err
    (folder / "evaluations").unlink()
    (folder / "figures").write_text("mine")
    code, out, err = again(folder.parent)
    assert code == 0 and "NLL_50" in out and "figures" in err and "Traceback" not in err
    assert (folder / "figures").read_text() == "mine"


# Files outside the run folder.


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda source: source.parent / "nowhere", "nowhere"),
        (lambda source: (source / "checkpoint.pt").unlink() or source, "checkpoint.pt"),
        (lambda source: (source / "checkpoint.pt").write_bytes(b"x") and source, "restart=true"),
    ],
)
def test_an_invalid_source(folder: Path, damage: Callable[[Path], Path], named: str) -> None:
    line = refused(folder.parent.parent / "new", f"init_from={damage(folder)}")
    # The middle of a long path is left out.
    assert line.startswith(f"iwae-train: init_from: {str(folder.parent)[:20]}") and named in line
    assert not (folder.parent.parent / "new").exists()


def test_data_that_were_moved(tmp_path: Path) -> None:
    """Recorded paths are absolute, so that they mean the same from any folder."""
    images = np.random.default_rng(0).integers(0, 256, (784, 60), dtype=np.uint8)
    savemat(tmp_path / "old.mat", {"data": images[:, :40] / 255.0, "testdata": images[:, 40:] / 255.0})
    data = ("data=omniglot", f"data.path={tmp_path / 'old.mat'}", "evaluation.k=5")
    folder = finished(Path("outputs"), *TINY, *data)
    config = RunFolder(folder).config()
    assert (config["output_dir"], config["data_dir"]) == (str(tmp_path / "outputs"), str(tmp_path / "data"))
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
    assert code == 2 and err.count("\n") == 1 and list(folder.glob("evaluations/*/result.json")) == [kept]
    code, _, err = evaluate(folder, "data.binarization=none")
    assert code == 2 and "data.binarization" in err
