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
            assert f"{name} is damaged: {named}" in lines[0] and len(lines) == 1, (key, how, lines)
            assert " must be " in lines[0] and "\n" not in lines[0]
            refused.add((key, how))
        else:
            assert report([str(folder.parent)]) == 0
            assert numbers(capsys.readouterr().out) <= shown, (key, how)
    assert {how for _, how in refused} == {"removed", "mistyped"} and len(refused) > 8


@pytest.mark.parametrize("file", ["result.json", "status.json"])
def test_the_command_of_a_run_names_the_key_or_prints_the_same_numbers(folder: Path, file: str) -> None:
    """A damaged status is written again; nothing else of a result is needed."""
    command = (*OPTIONS, f"output_dir={folder.parent}")
    expected = numbers(run(*command)[1])
    codes = []
    for key, how in damages(folder / file):
        # The report reads the same files by the same schema, key by key; here what the command itself asks for.
        if "." in key and (
            key.partition(".")[0] not in ("evaluation", "test") or how == "removed" or key.count(".") > 1
        ):
            continue
        code, out, err = run(*command)
        codes.append(code)
        if code == 2:
            assert err.count("\n") == 1 and f"{file} is damaged: {key.partition('.')[0]}" in err, (key, how, err)
        else:
            assert code == 0 and numbers(out) <= expected, (key, how, err)
    assert set(codes) == ({0, 2} if file == "result.json" else {0})


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


@pytest.mark.parametrize("key", ["evaluation.step", "test.nll_ais", "rows"])
def test_a_damaged_evaluation_is_done_again(folder: Path, key: str, caplog: pytest.LogCaptureFixture) -> None:
    (path,) = folder.glob("evaluations/ais*/result.json")
    good = {name: value for name, value in load(path).items() if name not in VARYING}
    next(found for found, how in damages(path) if (found, how) == (key, "mistyped"))
    assert evaluate([str(folder), *AIS]) == 0
    assert f"is damaged: {key} must be " in caplog.text and "it is evaluated again" in caplog.text
    assert {name: load(path)[name] for name in good} == good


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
