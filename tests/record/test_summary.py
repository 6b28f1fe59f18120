"""The table of a result: from its rows alone, with warnings, notes and reasons."""

from __future__ import annotations

import contextlib
import io
import re
from typing import Any

import pytest

from iwae_cli.record import summary


def split(**changed: Any) -> dict[str, Any]:
    return {
        "nll": 86.5512,
        "k": 5000,
        "n": 250,
        "stderr_images": 0.2712,
        "stderr_mc": 0.00432,
        "bias_mc": -0.0102,
        "bounds": {"1": -91.2, "50": -86.9, "5000": -86.5512},
        "ess_median": 812.3,
        "ess_min": 13.2,
        "ess_share_below_10": 0.05,
        "khat_share_above_0.7": 0.04,
        "top_weight_share_above_0.5": 0.01,
        "bits_per_dim": 1.9511,
        **changed,
    }


def table(**changed: Any) -> str:
    result = {
        "identity": "digits-one_layer-iwae-k50-s0-1a2b3c4d",
        "dataset": {"name": "digits", "protocol": "1,297/250/250, binarized at every access [8x8]"},
        "active_units": [20, 5],
        "seconds": {"train": 12.34, "evaluate": 4.5},
        "test": split(),
        "validation": None,
        **changed,
    }
    file = io.StringIO()
    with contextlib.redirect_stdout(file):
        summary.result_table(
            result, folder="outputs/" + "x" * 100, upload={"upload": "wandb sync outputs/" + "y" * 100}
        )
    return file.getvalue()


def squeezed(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def test_the_table_has_the_number_with_its_errors_of_every_split() -> None:
    text = table(validation=split(nll=87.1, exact_nll=87.0), test=split(exact_nll=86.5))
    lines = squeezed(text)
    assert (
        "test validation" in lines and "NLL_5000, nats 86.55 87.10" in lines and "exact NLL, nats 86.50 87.00" in lines
    )
    for number in ("0.27", "0.0043", "-0.0102", "-91.20", "-86.90", "812.3", "5.0%", "4.0%", "20 + 5", "12.3", "[8x8]"):
        assert number in text
    assert "outputs/" + "x" * 100 in text and "wandb sync outputs/" + "y" * 100 in text
    assert "warning" not in text


def test_rows_of_any_estimator_are_printed_from_the_file_alone() -> None:
    rows = [
        ("mean", "test.mean_above_0.5", "{:.2f}"),
        ("mean", "train.mean_above_0.5", "{:.2f}"),
        ("k = 2", "mine.inference.2", "{:.1%}"),
        ("missing", "mine.nothing", "{:.2f}"),
    ]
    numbers = {"test": {"mean_above_0.5": 1}, "train": {"mean_above_0.5": None}, "mine": {"inference": {"2": 0.5}}}
    assert summary.table_of({"rows": rows, **numbers}) == (
        ["test", "train", "inference"],
        {"mean": ["1.00", "\N{EN DASH}", ""], "k = 2": ["", "", "50.0%"], "missing": ["\N{EN DASH}", "", ""]},
    )
    assert "a note" in table(notes=["a note"]).splitlines()


WEAK = {"bias_mc": -0.11, "ess_share_below_10": 0.6}
GAP = {"gap_q": 0.98, "gap_q_stderr": 0.15, "refined": split(n=200)}
FEW = {"gap_q": 0.06, "refined": split(n=2)}
"""A gap of few images, which its error may explain: then the signs of q count."""
WARNINGS: list[tuple[dict[str, Any], list[str]]] = [
    ({"bias_mc": -0.05, "ess_share_below_10": 0.05, "top_weight_share_above_0.5": 0.01}, []),
    ({"bias_mc": -0.0501}, ["bias_mc of -0.05 of test", "evaluation.refine=200 measures"]),
    ({"ess_share_below_10": 0.051}, ["below 10 in 5.1% of the images of test", "evaluation.refine=200 measures"]),
    ({"top_weight_share_above_0.5": 0.011}, ["above 0.5 in 1.1% of the images of test", "evaluation.refine=200"]),
    ({**WEAK, "k": 1, "bias_mc": None}, []),
    ({"bias_mc": -0.2, "gap_q": None}, ["estimator=ais measures by how much"]),
    ({"bias_mc": -0.2, "gap_q": None, "exact_nll": 86.4}, ["its exact NLL says by how much"]),
    # Weak signs of q do not matter once its gap is known.
    (WEAK | GAP, ["too high by at least 0.98 ± 0.15 nats on the first 200 images of test:", "evaluation.refine=all"]),
    (WEAK | GAP | {"gap_q": 0.04, "gap_q_stderr": 0.004}, []),
    (GAP | {"nll_refined": 85.5}, ["on all images of test", "compare models by nll_refined"]),
    # Where even the refined proposals are weak, another estimator is needed.
    (GAP | {"refined": split(bias_mc=-0.2)}, ["too high by at least 0.98", "estimator=ais does"]),
    *((FEW | {"gap_q_stderr": error}, []) for error in (0.1, None)),
    *((FEW | {"gap_q_stderr": error} | WEAK, ["a bias_mc of -0.11 of test"]) for error in (0.1, None)),
]


@pytest.mark.parametrize(("changed", "words"), WARNINGS)
def test_an_unreliable_number_has_one_warning(changed: dict[str, Any], words: list[str]) -> None:
    lines = squeezed(table(test=split(**changed)))
    assert ("NLL_5000 by refined proposals, nats 85.50" in lines) is ("nll_refined" in changed)
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert len(warnings) == bool(words) and all(word in warnings[0] for word in words), warnings


@pytest.mark.parametrize("terminal", [True, False])
def test_a_warning_names_every_split_and_is_one_line_in_a_file(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a terminal it is broken between words."""
    for name, value in {"COLUMNS": "70", "TERM": "xterm", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FORCE_COLOR", "1" if terminal else "")  # a terminal for rich
    both = table(test=split(**WEAK | GAP), validation=split(**WEAK | GAP | {"gap_q": 0.5}))
    lines = re.sub("\x1b\\[[0-9;]*m", "", both).splitlines()
    (first,) = [place for place, line in enumerate(lines) if line.startswith("warning: ")]
    assert not terminal or all(len(line.rstrip()) <= 70 for line in lines[first : first + 4])
    warning = " ".join(" ".join(lines[first : first + 4]).split()) if terminal else lines[first]
    assert "0.98 ± 0.15 nats on the first 200 images of test and 0.50 ± 0.15 nats on" in warning
    assert "of validation: " in warning and "bias_mc" not in warning


def test_a_gap_that_is_not_above_zero_is_not_seen() -> None:
    gap = {"gap_q_stderr": 0.1, "refined": split(n=2)}
    text = table(test=split(**gap, gap_q=-0.03), validation=split(**gap, gap_q=0.06))
    assert any(line.startswith("too high by at least: gap_q none seen 0.06") for line in squeezed(text))


def test_a_missing_number_has_its_reason() -> None:
    reasons = {"test.khat_share_above_0.7": "all weights are equal", "active_units": "discrete layers"}
    text = table(test=split(**{"khat_share_above_0.7": None}), active_units=None, reasons=reasons)
    assert all(f"{key} not available: {reason}" in text for key, reason in reasons.items())
    assert "images with k-hat above 0.7 \N{EN DASH}" in squeezed(text)
    assert "a, b not available: one reason" in table(reasons={"a": "one reason", "b": "one reason"})


@pytest.mark.parametrize(
    ("model", "units", "expected"),
    [
        ({"name": "two_layer", "latent_sizes": [100, 50]}, [26, 7], "active units 26 of 100 + 7 of 50"),
        ({"name": "conv", "latent_size": 50}, [25], "active units 25 of 50"),
        ({"name": "mine", "size": 9}, [7], "active units 7"),
        (None, [26, 7], "active units 26 + 7"),
    ],
)
def test_active_units_are_some_of_all_where_the_sizes_are_known(model: Any, units: list[int], expected: str) -> None:
    text = table(model=model, active_units=units)
    assert expected in squeezed(text) and "collapsed" not in text
    assert "no unit of h_1 and h_2 is active; " in table(active_units=[0, 0])
    collapsed = table(model=model, active_units=[*units[:-1], 0])
    assert f"warning: q has collapsed, no unit of h_{len(units)} is active; " in collapsed
