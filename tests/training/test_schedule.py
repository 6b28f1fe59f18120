from __future__ import annotations

import math
from itertools import pairwise

import pytest

from iwae_cli.training.schedule import Burda, Constant, Cosine, Exponential


@pytest.mark.parametrize(
    ("stages", "passes"), [(1, 1), (2, 4), (3, 13), (4, 40), (5, 121), (6, 364), (7, 1093), (8, 3280)]
)
def test_burda_passes_are_the_papers(stages: int, passes: int) -> None:
    assert Burda(stages).passes == passes


def test_burda_factors_are_the_authors_before_rounding() -> None:
    # Their code lists 1, .72, .52, .37, .27, .19, .14, .10 (x 1e-3), the stages written out one after the other.
    rounded = [1, 0.72, 0.52, 0.37, 0.27, 0.19, 0.14, 0.10]
    written_out = [factor for stage, factor in enumerate(rounded) for _ in range(3**stage)]
    schedule = Burda(8)
    factors = [schedule.factor(i) for i in range(schedule.passes)]
    assert factors == pytest.approx(written_out, abs=0.005)
    assert len(set(factors)) == 8
    assert factors[-1] == pytest.approx(0.1, rel=1e-15)


def test_exponential_goes_from_one_to_final_by_equal_ratios() -> None:
    factors = [Exponential(passes=5, final=0.1).factor(i) for i in range(5)]
    assert factors == pytest.approx([1, 10**-0.25, 10**-0.5, 10**-0.75, 0.1], rel=1e-14)
    assert Exponential(passes=1, final=0.1).factor(0) == 1.0


def test_cosine_falls_from_one_to_just_above_final() -> None:
    assert [Cosine(4).factor(i) for i in range(4)] == pytest.approx(
        [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]
    )
    half = Cosine(1000, final=0.5)
    factors = [half.factor(i) for i in range(1000)]
    assert all(later < sooner for sooner, later in pairwise(factors))
    assert 0.5 < factors[-1] < 0.50001


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Burda(0), "stages must be 1 to 8, got 0"),
        (lambda: Constant(0), "passes must be >= 1, got 0"),
        (lambda: Exponential(5, final=0.0), "final must be in (0, 1], got 0.0"),
        (lambda: Cosine(5, final=1.5), "final must be in [0, 1], got 1.5"),
        (lambda: Cosine(5, final=math.inf), "final must be in [0, 1], got inf"),
    ],
)
def test_what_cannot_be_is_refused(wrong, message) -> None:
    with pytest.raises(ValueError) as refusal:
        wrong()
    assert str(refusal.value) == message
