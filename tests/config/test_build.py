"""Values of a config against annotations: nothing is coerced but an int to a float and a list to a tuple."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch

from iwae_cli.config.build import convert
from iwae_cli.core.errors import UserError
from iwae_cli.training.settings import Training


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (3, float, 3.0),
        ([1, 2], tuple[float, float], (1.0, 2.0)),
        ([[1], [2, 3]], list[int] | list[list[int]], [[1], [2, 3]]),
        (None, int | None, None),
        (0.5, float | torch.Tensor, 0.5),
        ({"a": 1}, dict[str, Any] | None, {"a": 1}),
    ],
)
def test_values_that_fit(value: Any, hint: Any, expected: Any) -> None:
    found = convert(value, hint, "key")
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        (True, int, "key must be an integer, got true"),
        (True, float, "key must be a number, got true"),
        (1, bool, "key must be true or false, got 1"),
        (2.0, int, "key must be an integer, got 2.0"),
        (5, str | None, "key must be text, got 5"),
        ("x", float | torch.Tensor, "key must be a number, got x"),
        ([1, 2, 3], tuple[float, float], "key must be a list of 2, got [1, 2, 3]"),
        ([1], tuple[float, float], "key[1] must be given, got [1]"),
        ([[1], ["a"]], list[int] | list[list[int]], "key[1][0] must be an integer, got a"),
        (10**400, float, "key must be a number, got a number of 401 digits"),
        ("tset", Literal["train", "test"], "key must be one of train, test, got tset; did you mean test?"),
        ("3", int, "key must be an integer, got 3"),
        (5, Training, "key must hold a _target_, the dotted name of a class, got 5"),
    ],
)
def test_values_that_do_not_fit_are_named(value: Any, hint: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        convert(value, hint, "key")
    assert str(caught.value) == message
