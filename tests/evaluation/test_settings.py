"""Settings of an evaluation: refused by name, and the first images of a split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluations import evaluation
from small_runs import TINY, arrays, finished, read_json, run

from iwae_cli.evaluation import workers
from iwae_cli.report.cells import tables
from iwae_cli.report.reader import read
from iwae_cli.report.selection import comparable


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("k", 0),
        ("k", 10**9),
        ("seed", -1),
        ("binarization_seed", -1),
        ("rows", 63),
        ("workers", 0),
        ("images", 0),
        ("splits", []),
        ("splits", ["test", "test"]),
        ("jackknife", True),
    ],
)
def test_a_wrong_setting_is_refused(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{argument} "):
        evaluation(**{"k": 1, argument: value})


def test_the_first_images_have_their_values_and_are_another_test_set(tmp_path: Path) -> None:
    few = finished(tmp_path, *TINY, "evaluation.images=30")
    result, log_px = read_json(few / "result.json"), arrays(few / "log_likelihood.npz")["log_px"]
    assert result["test"]["n"] == len(log_px) == 30
    assert result["evaluation"]["name"].startswith("k50-first30+test-last-")
    assert result["dataset"]["protocol"].endswith("; evaluated: the first 30 images of each split")
    whole = finished(tmp_path, *TINY, "seed=1")
    kept, left_out = comparable(read([tmp_path]).runs, "test")
    of_both = [[len(cell.runs) for cell in table.cells] for table in tables(kept)]
    assert of_both == [[1], [1]] and not left_out, "never compared"
    # The same command without it evaluates the same training again, and the first values stay.
    code, out, err = run(*TINY, f"output_dir={tmp_path}")
    assert code == 0 and "trained already" in out, err
    again = arrays(few / "log_likelihood.npz")["log_px"]
    assert len(again) == len(arrays(whole / "log_likelihood.npz")["log_px"]) == 250
    np.testing.assert_allclose(again[:30], log_px, atol=1e-5)
    assert len(list((few / "evaluations").iterdir())) == 2
    kept, _ = comparable(read([tmp_path]).runs, "test")
    assert [[len(cell.runs) for cell in table.cells] for table in tables(kept)] == [[2], [1]]


def test_the_quota_of_a_container_bounds_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """joblib reads it, and the cores that the process may use."""
    monkeypatch.setattr("joblib.cpu_count", lambda: 3)
    assert workers.threads(None, torch.device("cpu")) == 3
