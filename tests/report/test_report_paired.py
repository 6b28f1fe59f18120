from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_runs import config, write

from iwae_cli.core.errors import UserError
from iwae_cli.report.paired import Paired, compare
from iwae_cli.report.reader import Run, read

IWAE, ELBO = ("one_layer", "iwae"), ("one_layer", "elbo")


def runs(place: Path) -> tuple[list[Run], list[Run]]:
    found = read([place]).runs
    return tuple([run for run in found if run.keys["objective"] == name] for name in ("iwae", "elbo"))  # type: ignore[return-value]


def paired(place: Path, split: str = "test") -> Paired:
    a, b = runs(place)
    return compare("a", a, "b", b, split)


def test_two_runs_by_hand(tmp_path: Path) -> None:
    write(tmp_path, config(), np.array([-80.0, -90.0, -70.0, -60.0]), names=IWAE)
    write(tmp_path, config(objective="elbo"), np.array([-81.0, -92.0, -70.0, -59.0]), names=ELBO)
    found = paired(tmp_path)
    # Differences 1, 2, 0, -1: mean .5, variance (.25 + 2.25 + .25 + 2.25) / 3.
    assert found.difference == pytest.approx(0.5)
    assert found.stderr_images == pytest.approx((5 / 3 / 4) ** 0.5)
    assert (found.wins_a, found.wins_b, found.ties) == (2, 1, 1)
    assert found.stderr_seeds is None and "one seed" in found.cautions[0]


def test_two_groups_of_seeds_by_hand(tmp_path: Path) -> None:
    base = np.array([-80.0, -90.0, -70.0, -60.0])
    for seed, shift in enumerate((0.0, 0.2, 0.4)):
        write(tmp_path, config(seed=seed), base + shift, names=IWAE)
    for seed, shift in enumerate((-1.0, -2.0)):
        write(tmp_path, config(objective="elbo", seed=seed), base + shift + np.array([0, 0, 0, 4.0]), names=ELBO)
    found = paired(tmp_path)
    # Over seeds .2, and -1.5 + (0, 0, 0, 4): differences 1.7, 1.7, 1.7, -2.3.
    assert found.difference == pytest.approx(0.7)
    assert found.stderr_images == pytest.approx(1.0)
    # Variances .04 of 3 means and .5 of 2.
    assert found.stderr_seeds == pytest.approx((0.04 / 3 + 0.5 / 2) ** 0.5)
    assert (found.wins_a, found.wins_b, found.ties) == (3, 1, 0)
    assert found.seeds_a == (0, 1, 2) and "fewer than 3 seeds" in found.cautions[0]


def test_a_difference_within_the_noise_of_the_estimate_has_a_caution(tmp_path: Path) -> None:
    for seed in range(3):
        write(tmp_path, config(seed=seed), np.array([-80.0, -90.0]) + seed * 1e-3, names=IWAE)
        write(tmp_path, config(objective="elbo", seed=seed), np.array([-80.0, -90.004]), names=ELBO)
    assert [caution[:17] for caution in paired(tmp_path).cautions] == ["below three times"]


@pytest.mark.parametrize(
    ("changed", "images", "why"),
    [
        ({}, "others", "not scored on the same images"),
        ({"evaluation__k": 500}, "one binarization", "not scored on the same k: 5000 and 500"),
        ({"evaluation__weights": "best"}, "one binarization", "not scored on the same weights: last and best"),
    ],
)
def test_other_images_or_another_estimate_are_refused(
    tmp_path: Path, changed: dict[str, object], images: str, why: str
) -> None:
    write(tmp_path, config(), np.array([-80.0, -90.0]), names=IWAE)
    write(tmp_path, config(objective="elbo", **changed), np.array([-80.0, -91.0]), names=ELBO, images=images)
    with pytest.raises(UserError, match=why):
        paired(tmp_path)


def test_groups_of_several_trainings_are_refused(tmp_path: Path) -> None:
    write(tmp_path, config(), np.array([-80.0, -90.0]), names=IWAE)
    write(tmp_path, config(seed=1, objective__k=5), np.array([-80.0, -90.0]), names=IWAE)
    write(tmp_path, config(objective="elbo"), np.array([-80.0, -91.0]), names=ELBO)
    a, b = runs(tmp_path)
    with pytest.raises(UserError, match=r"more than their seed; choose objective.k=5 or objective.k=50$"):
        compare("a", a, "b", b, "test")
    with pytest.raises(UserError, match="both hold"):
        compare("a", b, "b", b, "test")
    with pytest.raises(UserError, match="has no NLL of the validation split"):
        compare("a", a[:1], "b", b, "validation")


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "missing": Path.unlink,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "other name": lambda path: np.savez(path, values=np.zeros(2)),
    "short": lambda path: np.savez(path, log_px=np.array([-80.0])),
    "not finite": lambda path: np.savez(path, log_px=np.array([-80.0, -np.inf])),
    "other evaluation": lambda path: np.savez(path, log_px=np.array([-80.0, -90.1])),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_values_are_refused(tmp_path: Path, how: str) -> None:
    folder = write(tmp_path, config(), np.array([-80.0, -90.0]), names=IWAE)
    write(tmp_path, config(objective="elbo"), np.array([-80.0, -91.0]), names=ELBO)
    DAMAGES[how](folder / "log_likelihood.npz")
    with pytest.raises(UserError, match=r"^[^\n]*log_likelihood\.npz is (damaged|not there|of another)[^\n]*$"):
        paired(tmp_path)


def test_an_evaluation_that_both_have_is_found(tmp_path: Path) -> None:
    """A was evaluated at k = 500 last, and at 5,000 before, as B."""
    late = write(tmp_path, config(evaluation__k=500), np.array([-81.0, -91.0]), names=IWAE)
    first = write(tmp_path / "first", config(), np.array([-80.0, -90.0]), names=IWAE)
    (late / "evaluations").mkdir()
    first.rename(late / "evaluations" / "k5000")
    write(tmp_path, config(objective="elbo"), np.array([-80.0, -91.0]), names=ELBO)
    found = paired(tmp_path)
    assert (found.k, found.difference) == (5000, 0.5)
