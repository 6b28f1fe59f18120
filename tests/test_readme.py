"""What the README gives to be copied works as it stands there."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import finished, read_json, run, run_folders

from iwae_cli.objectives.base import Gradient
from iwae_cli.objectives.ciwae import CIWAE

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
SMALL = ("model.latent_sizes=[3]", "model.hidden_sizes=[[8]]", "evaluation.k=50", "logger=disabled")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files of "Adding your own", each under the name in its first line; the command that runs them."""
    for text in (*blocks("python"), *blocks("yaml")):
        named = re.match(r"# (\S+\.(?:py|yaml))\n", text)
        if named:
            path = tmp_path / named[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    (command,) = re.findall(r"^\S.* IWAE_ALLOW_TARGETS=.* iwae-train .*$", README, re.MULTILINE)
    words = shlex.split(command)
    program = words.index("iwae-train")
    assert dict(word.split("=") for word in words[:program]) == {"PYTHONPATH": ".", "IWAE_ALLOW_TARGETS": "mine"}
    monkeypatch.setenv("IWAE_ALLOW_TARGETS", "mine")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return [*words[program + 1 :], *SMALL]


def test_an_objective_and_a_data_set_of_ones_own(mine: list[str], tmp_path: Path) -> None:
    code, _, err = run(*mine)
    assert code == 0, err
    (folder,) = run_folders(tmp_path / "outputs")
    result = read_json(folder / "result.json")
    assert result["dataset"]["sizes"] == {"train": 800, "validation": 100, "test": 100}
    assert result["dataset"]["name"] == "stripes" and result["dataset"]["stripes"] == 2
    assert result["objective"] == {"name": "halfway", "k": 5, "gradient": "total"}


@pytest.mark.parametrize("gradient", ["total", "stl", "dreg"])
def test_the_objective_is_what_its_docstring_says(mine: list[str], gradient: Gradient) -> None:
    from mine import Halfway  # type: ignore[import-not-found]

    log_w = torch.randn(7, 3, dtype=torch.float64)
    ours, known = Halfway(7, gradient), CIWAE(7, 0.5, gradient)
    for method in ("bound", "weights", "doubly_weights"):
        torch.testing.assert_close(getattr(ours, method)(log_w), getattr(known, method)(log_w))


def test_a_model_in_a_notebook(tmp_path: Path) -> None:
    folder = finished(tmp_path / "outputs", "experiment=smoke", "schedule.passes=1", *SMALL)
    (text,) = (block for block in blocks("python") if "iwae_cli.load(" in block)
    there: dict[str, Any] = {}
    exec(text.replace("outputs/<run>", str(folder)), there)
    assert there["images"].shape == (16, 64) and set(there["images"].unique().tolist()) <= {0.0, 1.0}
    assert there["bound"].shape == (1,) and -60 < float(there["bound"]) < 0
    assert there["config"]["objective"]["k"] == 5
