"""Settings of an evaluation that are refused, and the messages."""

from __future__ import annotations

from typing import Any

import pytest

from iwae_cli.evaluation.settings import Evaluation

GOOD: dict[str, Any] = {
    "k": 5000,
    "splits": ["test"],
    "weights": "last",
    "seed": 0,
    "binarization_seed": 0,
    "rows": 2000,
    "workers": None,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k must be >= 1, got 0"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"binarization_seed": -1}, "binarization_seed must be >= 0, got -1"),
        ({"rows": 63}, "rows must be >= 64, got 63"),
        ({"workers": 0}, "workers must be >= 1, got 0"),
        ({"splits": []}, "splits must name at least one of train, validation, test"),
        ({"splits": ["test", "test"]}, "splits must not repeat"),
    ],
)
def test_a_wrong_setting_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Evaluation(**GOOD | change)
