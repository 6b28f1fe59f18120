"""``iwae-eval RUN estimator=...``: from the command line to what is kept and printed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from small_runs import TINY, finished, read_json, snapshot

from iwae_cli.cli.evaluate import evaluate
from iwae_cli.cli.report import report
from iwae_cli.record.summary import number_at

AIS = (
    *("estimator=ais", "estimator.k=50", "estimator.temperatures=4", "estimator.max_temperatures=4"),
    "estimator.leapfrog_steps=2",
)
FEW = ("estimator.images=6", "estimator.simulated=4", "evaluation.splits=[test,validation]", "evaluation.workers=1")
GRID = (
    "estimator=grid",
    "estimator.points=61",
    "estimator.images=4",
    "evaluation.splits=[test]",
    "evaluation.workers=1",
)
SNR = ("estimator=gradient_snr", "estimator.ks=[2,4]", "estimator.draws=8", "estimator.images=5")


@pytest.fixture(scope="module")
def run_folder(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(tiny_run, tmp_path_factory.mktemp("runs") / tiny_run.name))


def kept(run_folder: Path, name: str) -> list[Path]:
    return sorted((run_folder / "evaluations").glob(f"{name}-*"))


def numbers_shown(result: dict[str, Any], out: str) -> dict[str, list[str]]:
    """The printed numbers of every row, which must be those of ``result`` up to rounding, errors with two digits."""
    values: dict[str, list[float]] = {}
    for label, key, _ in result["rows"]:
        values.setdefault(label, []).append(number_at(result, key))
    lines, found = [" ".join(line.split()) for line in out.splitlines()], {}
    for label, expected in values.items():
        (rest,) = [
            line[len(label.strip()) + 1 :]
            for line in lines
            if re.fullmatch(rf"{re.escape(label.strip())}( (± )?[-+]?[\d,]+(\.\d+)?%?)+", line)
        ]
        found[label] = rest.replace("± ", "±").split()
        for text, value in zip(found[label], expected, strict=True):
            scale = 100 if text.endswith("%") else 1
            last = 10.0 ** -len(text.strip("%").partition(".")[2])
            assert float(text.strip("±%").replace(",", "")) == pytest.approx(value * scale, abs=0.501 * last), label
            if text.startswith("±"):
                assert len(text.lstrip("±0.").replace(".", "")) == 2, (label, text)
        found[label] = [text.replace("±", "± ") for text in found[label]]
    return found


def test_annealing(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(run_folder)
    assert evaluate([str(run_folder), *AIS, *FEW]) == 0
    out = capsys.readouterr().out
    (folder,) = kept(run_folder, "ais")
    result = read_json(folder / "result.json")
    assert result["estimator"]["name"] == "ais" and result["estimator"]["temperatures"] == 4
    assert result["evaluation"]["name"] == folder.name
    assert set(result["dataset"]["evaluation_sha256"]) == {"test", "validation"}
    assert {result[split]["n"] for split in ("test", "validation")} == {6} and result["simulated"]["n"] == 4
    assert "NLL_AIS" in out and str(folder.name) in out
    # L_k of the same images, by the noise of the run's own evaluation.
    with np.load(folder / "estimates.npz") as arrays, np.load(run_folder / "log_likelihood.npz") as own:
        np.testing.assert_array_equal(arrays["log_px_q"], own["log_px"][:6])
        assert arrays["validation_log_px"].shape == (6,)
    after = snapshot(run_folder)
    assert {path: after[path] for path in before} == before
    # The second time it is read, not computed.
    assert evaluate([str(run_folder), *AIS, *FEW]) == 0
    assert snapshot(run_folder) == after
    assert capsys.readouterr().out == out
    # Another setting is another evaluation.
    assert evaluate([str(run_folder), *AIS, *FEW, "estimator.start=inference"]) == 0
    assert len(kept(run_folder, "ais")) == 2


def test_a_refused_estimator_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    discrete = ("model=discrete", "model.latent_sizes=[3]", "objective=vimco", "objective.k=5")
    folder = finished(tmp_path, *discrete, *(item for item in TINY if not item.startswith("model.")))
    for earlier in ("an evaluation", "none"):
        before = snapshot(folder)
        assert evaluate([str(folder), "estimator=gaps"]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
        assert snapshot(folder) == before and not kept(folder, "gaps")
        assert (folder / "evaluations").exists() == (earlier == "an evaluation")
        shutil.rmtree(folder / "evaluations", ignore_errors=True)


WHAT = {
    "ais": (*AIS, *FEW),
    "gaps": ("estimator=gaps", "estimator.k=50", "estimator.images=3", *FEW[2:]),
    "gradient_snr": SNR,
    "sandwich": ("estimator=sandwich", "estimator.k=50", "estimator.simulated=4", "evaluation.workers=1"),
    "thermodynamic": ("estimator=thermodynamic", "estimator.k=10", "estimator.images=3", *FEW[2:]),
}


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("name", WHAT)
def test_what_an_estimator_found_is_printed_and_reported(
    name: str, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder = Path(shutil.copytree(tiny_run, tmp_path / tiny_run.name))
    assert evaluate([str(run_folder), *WHAT[name]]) == 0
    out, err = capsys.readouterr()
    assert re.search(r" ([\d,]+)/\1\b", err.splitlines()[-1]), "what was announced was done"
    (folder,) = kept(run_folder, name)
    result = read_json(folder / "result.json")
    printed = [" ".join(row.split()) for row in out.splitlines()]
    assert all(note in printed for note in result["notes"])
    shown = numbers_shown(result, out)
    assert shown and report([str(tmp_path)]) == 0
    reported = capsys.readouterr().out
    assert f"{run_folder.name}, {folder.name}" in reported
    for label, texts in shown.items():
        line = ", ".join(rf"([a-z]\w* )?{re.escape(text)}" for text in texts)
        assert re.search(rf"(?m)^  {re.escape(label.strip())}: {line}$", reported), label


def test_gradients_of_the_runs_objective_and_of_another(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate([str(run_folder), *SNR]) == 0
    assert "signal-to-noise" in capsys.readouterr().out
    (own,) = kept(run_folder, "gradient_snr")
    assert evaluate([str(run_folder), *SNR, "objective=elbo"]) == 0
    assert evaluate([str(run_folder), *SNR, "objective.gradient=dreg"]) == 0
    folders = kept(run_folder, "gradient_snr")
    assert len(folders) == 3
    results = {folder.name: read_json(folder / "result.json") for folder in folders}
    nodes = [result["estimator"]["objective"] for result in results.values()]
    asked = {(node["_target_"].rpartition(".")[2], node["gradient"]) for node in nodes}
    assert asked == {("IWAE", "total"), ("ELBO", "total"), ("IWAE", "dreg")}
    # The record of the training is the same in all; the numbers differ.
    assert {r["objective"]["name"] for r in results.values()} == {"iwae"}
    found = [json.dumps(r["gradient_snr"]["inference"]) for r in results.values()]
    assert len(set(found)) == 3
    assert list(results[own.name]["gradient_snr"]["generative"]) == ["2", "4", "slope", "slope_stderr"]


@pytest.mark.usefixtures("coarse")
def test_the_choices_of_the_objective_are_named(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate([str(run_folder), *SNR, "objective=miwae", "objective.m=3"]) == 0
    out, err = capsys.readouterr()
    assert "of the gradients of MIWAE, gradient=total, m=3\n" in out and "\n3 groups of k = 2 " in out
    assert f"{8 * 3 * (2 + 4) * 5:,} samples, each" in err
    assert report([str(run_folder)]) == 0
    assert " of MIWAE m=3 gradient=total:\n  3 groups of k = 2: inference " in capsys.readouterr().out


def test_gradients_of_another_objective_have_the_k_of_the_estimator(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished(tmp_path, *TINY, "model.posterior=mixture", "model.posterior_size=2", "objective.k=2")
    assert evaluate([str(folder), *SNR, "objective=iwae"]) == 0
    assert evaluate([str(folder), SNR[0], "estimator.ks=[2,3]", *SNR[2:], "objective=iwae"]) == 2
    err = capsys.readouterr().err
    assert "estimator.ks holds 3" in err and err.endswith(": write estimator.ks=[2,4]\n")
    assert evaluate([str(folder), *SNR, "objective=dreg"]) == 2
    assert capsys.readouterr().err.endswith(": write objective.gradient=total\n")


def test_a_grid_with_its_picture(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = finished(tmp_path, *TINY, "model.latent_sizes=[2]")
    capsys.readouterr()
    blank = Figure.savefig
    request.getfixturevalue("drawn_pictures")
    assert evaluate([str(folder), *GRID]) == 0
    out = capsys.readouterr().out
    monkeypatch.setattr(Figure, "savefig", blank)
    (place,) = kept(folder, "grid")
    result = read_json(place / "result.json")
    # The images of the run's own evaluation, by the same noise.
    with np.load(place / "estimates.npz") as found, np.load(folder / "log_likelihood.npz") as own:
        np.testing.assert_array_equal(found["log_px_q"], own["log_px"][:4])
        assert result["test"]["nll_grid"] == pytest.approx(-found["log_px"].mean())
    assert result["estimator"]["k"] == 50 and "NLL_50 by q" in out and f"{result['test']['nll_grid']:.4f}" in out
    assert result["figures"] == ["posteriors.png"] and "posteriors.png" in out
    pixels = imread(place / "posteriors.png")[..., :3]
    assert pixels.std() > 0.1 and pixels.shape[1] > 1.5 * pixels.shape[0]
    # The second time it is read; a picture that is gone is drawn again.
    before = snapshot(folder)
    assert evaluate([str(folder), *GRID]) == 0 and snapshot(folder) == before
    (place / "posteriors.png").unlink()
    assert evaluate([str(folder), *GRID]) == 0 and (place / "posteriors.png").is_file()
    # Another k is another evaluation. No picture: the numbers are there, and the reason, and what to do about it.
    with monkeypatch.context() as broken:
        broken.setattr(Figure, "savefig", lambda *_, **__: 1 / 0)
        assert evaluate([str(folder), *GRID, "evaluation.k=20"]) == 0
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    (other,) = set(kept(folder, "grid")) - {place}
    result = read_json(other / "result.json")
    assert result["test"]["k"] == 20 and result["figures"] == [] and "ZeroDivisionError" in result["reasons"]["figures"]
    assert sorted(path.name for path in other.iterdir()) == ["estimates.npz", "result.json"]
    advised = "ZeroDivisionError: division by zero; it is drawn again by the same command once "
    assert advised in warning and f"{other.name}/result.json is removed" in warning
    (other / "result.json").unlink()
    assert evaluate([str(folder), *GRID, "evaluation.k=20"]) == 0 and (other / "posteriors.png").is_file()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("estimator=asi", "estimator ais?"),
        ("estimator.images=5", "estimator.images estimator=ais"),
        ("estimator=ais estimator.chain=5", "estimator.chain estimator.chains?"),
        ("estimator=ais estimator.chains=1", "estimator.chains 2"),
        ("estimator=sandwich estimator.k=1", "estimator.k 2"),
        ("estimator=grid", "latents 3 estimator=ais model.latent_sizes=[2]"),
        ("estimator=grid estimator.points=10", "estimator.points odd"),
        ("estimator=ais estimator._target_=os.system", "estimator._target_"),
        ("estimator=ais objective=elbo", "objective"),
        ("estimator=gradient_snr objective=vimco estimator.ks=[1,2]", "objective.k 2"),
        ("objective.k=3", "objective.k evaluation"),
        ("evalaution.k=3", "evalaution.k evaluation?"),
        ("evaluation.k=0", "evaluation.k 1"),
        ("evaluation.k=1,5", "evaluation.k=1,5"),
        ("data_dir=5", "data_dir text"),
        ("~evaluation", "~evaluation"),
        ("--foo", "--foo"),
    ],
)
def test_wrong_input_is_one_line(
    run_folder: Path, capsys: pytest.CaptureFixture[str], override: str, words: str
) -> None:
    before = snapshot(run_folder)
    assert evaluate([str(run_folder), *override.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("iwae-eval: ")
    assert not [word for word in words.split() if word not in err], err
    assert snapshot(run_folder) == before


def test_a_forgotten_run_folder_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "k=5").mkdir()
    for words, answer in {
        "": "which run?",
        "evaluation.k=5 k=5": "which run? Write iwae-eval RUN_FOLDER evaluation.k=5",
        "data_dir=a/b evaluation.k=5": "which run?",
        # These are meant as folders.
        "k=5": "k=5 is no run folder",
        "outputs/lr=0.1": "outputs/lr=0.1 is not there",
    }.items():
        assert evaluate(words.split()) == 2
        assert capsys.readouterr().err.startswith(f"iwae-eval: {answer}"), words


MINE = """
from iwae_cli.evaluation.estimator import Estimates, Estimator

class Brightness(Estimator):
    def __init__(self, images: int) -> None:
        self.images = images

    def estimate(self, subject, check):
        split = subject.data.evaluation_split("test", subject.evaluation.binarization_seed)
        x = split.x[: self.images].double()
        numbers = {"test": {"brightness": x.mean().item() * subject.objective(3).num_samples}}
        return Estimates(numbers, [("mean pixel", "test.brightness", "{:.3f}")], {"test": split.sha256})
"""


def test_an_estimator_from_outside_is_a_file_and_a_yaml(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "estimators_of_a_user.py").write_text(MINE)
    choice = tmp_path / "conf" / "estimator" / "mine.yaml"
    choice.parent.mkdir(parents=True)
    choice.write_text("_target_: estimators_of_a_user.Brightness\nobjective: null\nimages: 5\n")
    choice.with_name("without.yaml").write_text("_target_: estimators_of_a_user.Brightness\nimages: 5\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("IWAE_ALLOW_TARGETS", "estimators_of_a_user")
    line = [str(run_folder), "--config-dir", str(tmp_path / "conf"), "estimator=mine"]
    assert evaluate(line) == 0
    out = capsys.readouterr().out
    result = read_json(kept(run_folder, "brightness")[0] / "result.json")
    assert result["estimator"]["images"] == 5 and result["estimator"]["objective"]["k"] == 5
    assert f"{result['test']['brightness']:.3f}" in out
    written = (kept(run_folder, "brightness")[0] / "result.json").stat().st_mtime_ns
    for text, again in ((MINE, False), (f"{MINE}# edited", True)):
        (tmp_path / "estimators_of_a_user.py").write_text(text)
        assert evaluate(line) == 0
        now = (kept(run_folder, "brightness")[0] / "result.json").stat().st_mtime_ns
        assert (now != written) is again, "an estimator that was edited estimates again"
    capsys.readouterr()
    assert evaluate([*line, "objective=elbo", "estimator.images=6"]) == 0
    assert len(kept(run_folder, "brightness")) == 2
    assert evaluate([*line[:3], "estimator=without", "objective=elbo"]) == 2
    assert evaluate(["--help", *line[1:3]]) == 0
    assert "mine sandwich thermodynamic without" in capsys.readouterr().out
