"""``--config-dir``: classes in it and beside it may be named, its place is recorded, faults in them are one line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from small_runs import TINY, finished, read_json, run, run_folders

import iwae_cli
from iwae_cli.cli.evaluate import evaluate
from iwae_cli.config.build import trust
from iwae_cli.core.errors import UserError
from iwae_cli.record.folder import RunFolder

OBJECTIVE = """
from iwae_cli.core.numerics import log_mean_exp
from iwae_cli.objectives.base import BoundObjective

from mine import helper


class Own(BoundObjective):
    def bound(self, log_w):
        return helper.half * (log_w.mean(0) + log_mean_exp(log_w))


class HalfRenyi(BoundObjective):
    def weights(self, log_w):
        return log_w.softmax(0)
"""
MODEL = """
from iwae_cli.models.architectures.mlp import GaussianMLP

class Own(GaussianMLP):
    pass
"""
ESTIMATOR = """
from iwae_cli.evaluation.estimator import Estimates, Estimator

class One(Estimator):
    def estimate(self, subject, check):
        return Estimates({"test": {"one": 1.0}}, [("one", "test.one", "{:.0f}")])
"""


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Path]:
    """A config folder with an objective beside it, in a package, and a model in it; nothing is on the path."""
    files = {
        "user/mine/__init__.py": "",
        "user/mine/helper.py": "half = 0.5\n",
        "user/mine/own.py": OBJECTIVE,
        "user/conf/own_model.py": MODEL,
        "user/estimators.py": ESTIMATOR,
        "user/broken.py": "import nowhere_to_be_found\n",
        "user/fails.py": "value = 1 / 0\n",
        "user/conf/objective/own.yaml": "{_target_: mine.own.Own, k: 5}\n",
        "user/conf/objective/lacking.yaml": "{_target_: mine.own.HalfRenyi, k: 5}\n",
        "user/conf/objective/broken.yaml": "{_target_: broken.Own, k: 5}\n",
        "user/conf/objective/fails.yaml": "{_target_: fails.Own, k: 5}\n",
        "user/conf/objective/foreign.yaml": "{_target_: json.JSONEncoder}\n",
        "user/conf/model/own.yaml": "{_target_: own_model.Own, latent_sizes: [3], hidden_sizes: [[8]]}\n",
        "user/conf/estimator/one.yaml": "{_target_: estimators.One}\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    before, path = set(sys.modules), list(sys.path)
    yield tmp_path / "user" / "conf"
    trust(None)
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("mine", "own_model", "estimators", "broken", "fails"):
            del sys.modules[name]


def test_it_is_consent_enough_and_recorded(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own.parent)
    wanted = ("--config-dir=conf", "objective=own", "model=own", *TINY[2:])
    folder = finished(tmp_path / "runs", *wanted)
    assert yaml.safe_load((folder / "config.yaml").read_text())["config_dir"] == str(own)
    monkeypatch.chdir(tmp_path)
    model, config = iwae_cli.load(folder)
    assert config["model"]["_target_"] == "own_model.Own" and len(model.inference.layers) == 1
    assert evaluate([str(folder), "evaluation.k=7"]) == 0
    assert evaluate([str(folder), "estimator=one"]) == 0
    assert len(list((folder / "evaluations").iterdir())) == 3
    # The same training without --config-dir is the same run; it is found by what decides its weights.
    assert read_json(folder / "result.json")["objective"]["name"] == "own"
    code, _, err = run(*wanted, f"--config-dir={own}", f"output_dir={tmp_path / 'runs'}")
    assert code == 0 and run_folders(tmp_path / "runs") == [folder], err


def test_a_sweep_in_other_processes_knows_it(own: Path, tmp_path: Path) -> None:
    joblib = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    wanted = ("-m", f"--config-dir={own}", "objective=own", "seed=1", *joblib, *TINY)
    code, _, err = run(*wanted, f"output_dir={tmp_path / 'runs'}")
    assert code == 0, err
    assert [RunFolder(folder).config()["config_dir"] for folder in run_folders(tmp_path / "runs")] == [str(own)]


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ("lacking", "mine.own.HalfRenyi: HalfRenyi lacks bound, needed for every class derived from Objective"),
        ("broken", "broken.Own cannot be imported: ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        ("fails", "fails.Own cannot be imported: ZeroDivisionError: division by zero (fails.py, line 1)"),
        ("foreign", "must name a class of iwae_cli or torch.optim derived from Objective, got json.JSONEncoder"),
    ],
)
def test_what_cannot_be_used_is_one_line(own: Path, tmp_path: Path, objective: str, expected: str) -> None:
    code, _, err = run(f"--config-dir={own}", f"objective={objective}", f"output_dir={tmp_path / 'runs'}")
    assert code == 2 and expected in err
    assert err.count("\n") == 1 and len(err) <= 320 and not (tmp_path / "runs").exists()


def test_a_record_trusts_no_other_place(own: Path, tmp_path: Path) -> None:
    folder = finished(tmp_path / "runs", f"--config-dir={own}", "model=own", *TINY[2:])
    text = (folder / "config.yaml").read_text()
    for other, named in (("user", "got own_model.Own"), (str(tmp_path / "gone"), f"{tmp_path / 'gone'} is gone")):
        (folder / "config.yaml").write_text(text.replace(str(own), other))
        with pytest.raises(UserError, match="must name a class of iwae_cli") as caught:
            iwae_cli.load(folder)
        assert named in str(caught.value) and len(str(caught.value)) <= 300
    (folder / "config.yaml").write_text(text.replace(f"config_dir: {own}", "config_dir: 5"))
    with pytest.raises(UserError, match="config_dir must be"):
        iwae_cli.load(folder)


def test_modules_of_another_folder_with_the_same_name_are_not_taken(own: Path, tmp_path: Path) -> None:
    """Python keeps the first one for the whole process; a run must not get the class of another run."""
    first = finished(tmp_path / "runs", f"--config-dir={own}", "model=own", *TINY[2:])
    text = (first / "config.yaml").read_text()
    other = tmp_path / "other" / "conf"
    other.mkdir(parents=True)
    (other / "own_model.py").write_text(MODEL)
    (first / "config.yaml").write_text(text.replace(str(own), str(other)))
    with pytest.raises(UserError, match=r"got own_model\.Own"):
        iwae_cli.load(first)
