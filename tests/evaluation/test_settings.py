"""Settings of an evaluation that are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from evaluations import evaluation


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("k", 0),
        ("k", 10**9),
        ("seed", -1),
        ("binarization_seed", -1),
        ("rows", 63),
        ("workers", 0),
        ("splits", []),
        ("splits", ["test", "test"]),
    ],
)
def test_a_wrong_setting_is_refused(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{argument} "):
        evaluation(**{argument: value})
