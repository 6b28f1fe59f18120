"""The table of a result: from its rows alone, with warnings, notes and reasons."""

from __future__ import annotations

import contextlib
import io
import re
from typing import Any

import pytest

from iwae_cli.record import summary


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


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
        summary.result_table(result, folder="outputs/" + "x" * 100, sync="wandb sync outputs/" + "y" * 100)
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


@pytest.mark.parametrize(
    "changed", [{"bias_mc": -0.0501}, {"ess_share_below_10": 0.051}, {"top_weight_share_above_0.5": 0.011}]
)
def test_an_unreliable_number_has_a_warning_and_one_sample_has_none(changed: dict[str, float]) -> None:
    text = table(test=split(**changed), validation=split(**changed))
    (warning,) = [line for line in text.splitlines() if line.startswith("warning: ")]
    assert "of test" in warning and "of validation" in warning and "evaluation.refine=200" in warning
    assert summary.reliability_warning({"test": split(**{**changed, "k": 1, "bias_mc": None})}) is None


def test_a_measured_gap_is_the_warning_and_a_small_one_is_none() -> None:
    """Weak signs of q do not matter once its gap is known."""
    weak = {"bias_mc": -0.11, "ess_share_below_10": 0.6}
    measured = weak | {"gap_q": 0.98, "gap_q_stderr": 0.15, "refined": split(n=200)}
    text = table(test=split(**measured), validation=split(**measured | {"gap_q": 0.04, "gap_q_stderr": 0.004}))
    (warning,) = [line for line in text.splitlines() if line.startswith("warning: ")]
    assert "NLL_5000 by q is too high by at least 0.98 ± 0.15 nats on the first 200 images of test:" in warning
    assert "evaluation.refine=all" in warning and "bias_mc" not in warning and "validation" not in warning
    whole = measured | {"nll_refined": 85.5}
    text = table(test=split(**whole))
    assert "compare models by nll_refined" in text
    assert "NLL_5000 by refined proposals, nats 85.50" in squeezed(text)
    # Where even the refined proposals are weak, another estimator is needed.
    text = table(test=split(**measured | {"refined": split(bias_mc=-0.2)}))
    assert "estimator=ais" in text and "nll_refined" not in text


@pytest.mark.parametrize("error", [0.1, None])
def test_a_gap_of_few_images_settles_nothing(error: float | None) -> None:
    """Then the signs of q count; a gap that its error may explain is no warning by itself."""
    gap = {"gap_q": 0.06, "gap_q_stderr": error, "refined": split(n=2)}
    assert "warning" not in table(test=split(**gap))
    none = table(test=split(**gap | {"gap_q": -0.03}), validation=split(**gap))
    assert any(line.startswith("too high by at least: gap_q none seen 0.06") for line in squeezed(none))
    assert "an effective sample size below 10 in 60.0% of the images of test" in table(
        test=split(**gap, ess_share_below_10=0.6)
    )


def test_without_refined_proposals_the_advice_is_another_estimator() -> None:
    text = table(test=split(bias_mc=-0.2, gap_q=None), reasons={"test.gap_q": "discrete"})
    assert "estimator=ais measures by how much" in text


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


def test_a_layer_without_active_units_has_a_warning() -> None:
    assert "warning: q has collapsed, no unit of h_2 is active; " in table(active_units=[26, 0])
    assert "warning: q has collapsed, no unit of h_1 and h_2 is active; " in table(active_units=[0, 0])


@pytest.mark.parametrize("terminal", [True, False])
def test_a_warning_is_broken_between_words_at_a_terminal_and_is_one_line_in_a_file(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    split_of = split(bias_mc=-0.2, ess_share_below_10=0.5, **{"top_weight_share_above_0.5": 0.5})
    sentence = f"warning: {summary.reliability_warning({'test': split_of})}"
    file = Terminal() if terminal else io.StringIO()
    with contextlib.redirect_stdout(file):
        summary.result_table({"identity": "x", "test": split_of}, folder="outputs/x")
    lines = [line.rstrip() for line in re.sub("\x1b\\[[0-9;]*m", "", file.getvalue()).splitlines()]
    assert len(sentence) > 70
    if terminal:
        assert all(len(line) <= 70 for line in lines)
        assert sentence in " ".join(lines)
    else:
        assert sentence in lines
