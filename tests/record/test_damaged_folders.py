"""Every key of every file of a run folder, removed and mistyped: one line names it, or no number changes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_runs import TINY, VARYING, finished, last_of_each, run

import iwae_cli
from iwae_cli.cli.evaluate import evaluate
from iwae_cli.cli.report import report
from iwae_cli.core.errors import UserError
from iwae_cli.report.reader import read

OPTIONS = last_of_each(*TINY, "evaluation.refine=10", "evaluation.workers=1")
AIS = (
    *("estimator=ais", "estimator.temperatures=2", "estimator.max_temperatures=2", "estimator.leapfrog_steps=1"),
    *("estimator.images=3", "estimator.simulated=2", "estimator.chains=2", "evaluation.workers=1"),
)
NUMBER = re.compile(r"[-+]?\d+\.\d+")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with another evaluation by L_k and one by AIS."""
    made = finished(tmp_path_factory.mktemp("runs"), *OPTIONS)
    for options in (AIS, ("evaluation.k=20", "evaluation.workers=1")):
        assert evaluate([str(made), *options]) == 0
    return made


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "runs" / original.name))


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text()) if path.suffix == ".yaml" else json.loads(path.read_text())


def damages(path: Path) -> Iterator[tuple[str, str]]:
    """Damage a file in place, one key after the other; yield the key and how."""
    good = load(path)

    def keys(value: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
        for key, inner in value.items() if isinstance(value, dict) else ():
            yield (*at, key)
            yield from keys(inner, (*at, key))

    for *groups, last in keys(good):
        for how in ("removed", "mistyped"):
            value = json.loads(json.dumps(good))
            node = value
            for group in groups:
                node = node[group]
            if how == "removed":
                del node[last]
            else:
                node[last] = 7 if isinstance(node[last], str) else "small"
            path.write_text(yaml.safe_dump(value) if path.suffix == ".yaml" else json.dumps(value))
            yield ".".join((*groups, last)), how
    path.write_text(yaml.safe_dump(good) if path.suffix == ".yaml" else json.dumps(good))


def numbers(text: str) -> set[str]:
    """What looks like a number with decimals, but for the seconds that a command took."""
    return set(NUMBER.findall("\n".join(line for line in text.splitlines() if not line.startswith("seconds"))))


@pytest.mark.parametrize("file", ["config.yaml", "result.json", "status.json", "evaluations/ais*", "evaluations/k20*"])
def test_a_report_names_the_key_or_shows_the_same_numbers(
    folder: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = folder.glob(file if "." in file else f"{file}/result.json")
    name = str(path.relative_to(folder))
    assert report([str(folder.parent)]) == 0
    shown, refused = numbers(capsys.readouterr().out), set()
    for key, how in damages(path):
        found = read([folder])
        lines = [left.why for left in found.left_out] + found.notes
        if lines:
            # Without its estimator a result is read as one of L_k, which has a k.
            named = "evaluation.k" if key == "estimator" and how == "removed" else key.partition(".")[0]
            two_files = f"config.yaml is damaged: {key} must be " in lines[0] and "as in result.json" in lines[0]
            assert f"{name} is damaged: {named}" in lines[0] or two_files, (key, how, lines)
            assert len(lines) == 1
            assert " must be " in lines[0] and "\n" not in lines[0]
            refused.add((key, how))
        else:
            assert report([str(folder.parent)]) == 0
            assert numbers(capsys.readouterr().out) <= shown, (key, how)
    assert {how for _, how in refused} == {"removed", "mistyped"} and len(refused) > 8


def test_load_and_iwae_eval_name_the_key_of_a_configuration(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = {name: value.tolist() for name, value in iwae_cli.load(folder)[0].state_dict().items()}
    refused = set()
    for key, how in damages(folder / "config.yaml"):
        try:
            model, _ = iwae_cli.load(folder)
            assert {name: value.tolist() for name, value in model.state_dict().items()} == weights, (key, how)
        except UserError as error:
            assert key.rpartition(".")[2] in str(error) and "\n" not in str(error), (key, how, error)
            refused.add((key, how))
            assert evaluate([str(folder), "evaluation.k=20", "evaluation.workers=1"]) == 2
            assert capsys.readouterr().err == f"iwae-eval: {error}\n"
    wanted = ("seed", "evaluation.k", "validation.every", "device.precision", "model.latent_sizes", "data")
    assert refused >= {(key, how) for key in wanted for how in ("removed", "mistyped")}


@pytest.mark.parametrize(
    ("key", "wrong"),
    [("evaluation.step", "small"), ("test.nll_ais", "small"), ("rows", "small"), ("test.acceptance", 1.5)],
)
def test_a_damaged_evaluation_is_left_out_and_done_again(
    folder: Path, key: str, wrong: Any, caplog: pytest.LogCaptureFixture
) -> None:
    (path,) = folder.glob("evaluations/ais*/result.json")
    good = {name: value for name, value in load(path).items() if name not in VARYING}
    set_key(path, key, wrong)
    found = read([folder])
    assert not found.runs[0].estimates and f"{key} must be " in found.notes[0] and "is left out" in found.notes[0]
    assert evaluate([str(folder), *AIS]) == 0
    assert f"is damaged: {key} must be " in caplog.text and "it is evaluated again" in caplog.text
    assert {name: load(path)[name] for name in good} == good


IMPOSSIBLE: dict[str, Any] = {
    "test.stderr_images must be at least 0": {"test.stderr_images": -0.1},
    "test.gap_q_stderr must be at least 0": {"test.gap_q_stderr": -1e-3},
    "test.bias_mc must be at most 0": {"test.bias_mc": 0.5},
    "test.ess_share_below_10 must be at least 0 and at most 1": {"test.ess_share_below_10": 1.5},
    "test.refined.ess_share_below_10 must be at least 0 and at most 1": {"test.refined.ess_share_below_10": -0.1},
    "test.khat_share_above_0.7 must be at least 0 and at most 1": {"test.khat_share_above_0.7": -0.1},
    "test.bounds do not rise up to k = 50": {"test.bounds.1": 5.0},
    "test.nll must be -test.bounds.50, which is -2": {"test.nll": -5},
    "test.nll must be -test.bounds.50, which is None": {"test.bounds.50": None},
    "test.refined.nll must be -test.refined.bounds.50, which is -2": {"test.refined.nll": 3},
    "test.n must be greater than or equal to 1": {"test.n": 0},
    "test.refined is of k = 50, n = 300": {"test.refined.n": 300},
    "test.refined is of k = 3, n = 10": {"test.refined.k": 3},
    "test.nll_refined is 25.0, not test.refined.nll of all images": {"test.nll_refined": 25.0},
    "test.ess_min must be at least 0.999999": {"test.ess_min": 0.5},
    "test.ess_median must be at least 0.999999 and at most 50.00005, got 51": {"test.ess_median": 51},
    "test.nll must be a number": {"test.nll": "1e999"},
    "seconds.train must be greater than or equal to 0": {"seconds.train": -1.0},
    "steps must be greater than or equal to 0": {"steps": -5},
    "active_units.0 must be greater than or equal to 0": {"active_units": [-1]},
    "evaluation.k must be greater than or equal to 1": {"evaluation.k": 0},
}


@pytest.mark.parametrize("words", IMPOSSIBLE)
def test_impossible_numbers_are_one_line(folder: Path, words: str) -> None:
    ((key, wrong),) = IMPOSSIBLE[words].items()
    set_key(folder / "result.json", key, wrong)
    (left,) = read([folder]).left_out
    assert words in left.why and "\n" not in left.why and left.state == "damaged", left.why
    with pytest.raises(UserError, match=re.escape(words)):
        iwae_cli.open(folder).result  # noqa: B018
    if key == "test.stderr_images":
        code, out, err = run(*OPTIONS, f"output_dir={folder.parent}")
        assert (code, out, err.count("\n")) == (2, "", 1) and words in err


def test_the_gap_is_the_difference_on_the_same_images(folder: Path) -> None:
    """Of ten of 250 images nothing can be checked; of all of them it can."""
    path = folder / "result.json"
    set_key(path, "test.gap_q", 0.7)
    assert not read([folder]).left_out
    test = load(path)["test"]
    set_key(path, "test.refined.n", test["n"])
    set_key(path, "test.nll_refined", test["refined"]["nll"])
    set_key(path, "test.gap_q", test["nll"] - test["refined"]["nll"])
    assert not read([folder]).left_out
    set_key(path, "test.gap_q", 0.7)
    assert "test.gap_q is 0.7, not test.nll - test.refined.nll" in read([folder]).left_out[0].why


def set_key(path: Path, key: str, wrong: Any) -> None:
    value = load(path)
    node, (*groups, last) = value, re.split(r"(?<!above_0)\.", key)
    for group in groups:
        node = node[group]
    node[last] = wrong
    # 1e999 is JSON, and infinite in Python.
    text = yaml.safe_dump(value) if path.suffix == ".yaml" else json.dumps(value).replace('"1e999"', "1e999")
    path.write_text(text)


CONFIGURED: dict[str, list[Any]] = {
    "training.ema": ["x", 1.0, -0.1],
    "training.clip": ["x", 0],
    "training.kl_warmup": [-1, 1.5],
    "training._target_": ["iwae_cli.training.settings.Nosuch"],
    "schedule.patience": ["x", 0],
    "schedule.passes": [0, "2"],
    "schedule._target_": ["iwae_cli.training.schedule.Nosuch", "nosuch.Class", "Constant"],
    "optimizer._target_": ["torch.optim.Nosuch", "torch.nosuch.Adam", "nosuch.Class"],
    "optimizer.lr": ["x", -1e-3],
    "objective._target_": ["iwae_cli.objectives.nosuch.IWAE", "nosuch.Class"],
    "objective.k": [0],
    "model._target_": ["os.system"],
    "model.posterior": ["full"],
    "model.latent_sizes": [[50], "x"],
    "validation.every": [0],
    "evaluation.images": ["x", 0],
    "batch_size": [0, 7],
    "seed": [1, "x"],
    "train": ["inference"],
    "init_from": ["another run"],
}


@pytest.mark.parametrize("key", CONFIGURED)
def test_a_configuration_that_no_run_has_is_one_line(
    folder: Path, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "config.yaml"
    good = path.read_text()
    for wrong in CONFIGURED[key]:
        path.write_text(good)
        set_key(path, key, wrong)
        (left,) = read([folder]).left_out
        assert left.state == "damaged" and "\n" not in left.why and f"config.yaml is damaged: {key} " in left.why
        with pytest.raises(UserError) as load_error:
            iwae_cli.load(folder)
        assert evaluate([str(folder), "evaluation.k=7"]) == 2
        assert capsys.readouterr().err == f"iwae-eval: {load_error.value}\n"
        assert left.why in str(load_error.value).replace(f"{folder}/", "")


def test_a_broken_line_of_metrics_is_said_on_the_page(folder: Path, tmp_path: Path) -> None:
    """Which lines are broken: tests/record/test_loggers.py."""
    page, curve = tmp_path / "page.html", 'aria-label="Training, table 1"'
    number = len((folder / "metrics.jsonl").read_text().splitlines()) + 1
    for added, broken in (('{"step": 9, "pass"', False), ("\n", True)):
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(added)
        assert report([str(folder), "--html", str(page)]) == 0
        assert (f"line {number}: not a row of metrics" in page.read_text()) == broken != (curve in page.read_text())


SWEEPS = {
    "jobs is missing, must be a list": {},
    "jobs must be a list": {"jobs": "all"},
    "jobs.0.overrides must be a list": {"jobs": [{"overrides": "seed=1"}]},
    "jobs.0.folder must be text": {"jobs": [{"folder": 3}]},
    "the content must be keys and values": [],
}


@pytest.mark.parametrize("words", SWEEPS)
def test_a_damaged_sweep_is_one_line(tmp_path: Path, words: str) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps(SWEEPS[words]))
    (left,) = read([tmp_path]).left_out
    assert left.state == "damaged" and left.why.startswith(f"sweep.json is damaged: {words}")


def test_a_first_run_may_have_moved(folder: Path) -> None:
    change = {"init_from": "/then/first-run-seed0-01234567"}
    (folder / "result.json").write_text(json.dumps(load(folder / "result.json") | change))
    for place in ("/now/first-run-seed0-01234567", "/now/renamed"):
        set_key(folder / "config.yaml", "init_from", place)
        assert not read([folder]).left_out
    set_key(folder / "config.yaml", "init_from", None)
    assert "init_from must be" in read([folder]).left_out[0].why
