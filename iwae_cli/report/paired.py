"""Two runs, or two groups of seeds, image by image on the same evaluation split."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from iwae_cli.core.errors import UserError
from iwae_cli.report.reader import Run, Score
from iwae_cli.report.table import Cell, Scored, Table, agrees, label, telling_apart

ENOUGH_SEEDS = 3
"""A difference that is to hold for new seeds needs as many of each."""
OPTIONS = 4
"""Ways to say it otherwise that a message has."""


@dataclass(frozen=True)
class Paired:
    """What the same images say about two models.

    Attributes:
        a, b: what they are called.
        seeds_a, seeds_b: training seeds, one a run.
        split, k, images: what both were evaluated on, and how.
        difference: mean over images of log p^(x) under A minus that under B, nats, each a mean over its seeds;
            positive: A has the lower NLL.
        stderr_images: other images, the same trained weights: sd of the differences / sqrt(images).
        stderr_seeds: other seeds, the same images: sqrt(var_A / n_A + var_B / n_B) of the means of each seed; None
            with one seed on either side.
        wins_a, wins_b, ties: images on which A, B or neither has the higher log p^(x).
        bias_mc: the larger of the two biases of the estimates by Jensen's inequality, nats; None where unknown.
    """

    a: str
    b: str
    seeds_a: tuple[int, ...]
    seeds_b: tuple[int, ...]
    split: str
    k: int
    images: int
    difference: float
    stderr_images: float
    stderr_seeds: float | None
    wins_a: int
    wins_b: int
    ties: int
    bias_mc: float | None

    @property
    def few_seeds(self) -> str | None:
        """What is not known of other training seeds; None if there are enough."""
        if self.stderr_seeds is None:
            return "one seed on a side: nothing is said of other training seeds"
        if min(len(self.seeds_a), len(self.seeds_b)) < ENOUGH_SEEDS:
            return f"fewer than {ENOUGH_SEEDS} seeds on a side: stderr over seeds is itself hardly known"
        return None

    @property
    def within_bias(self) -> bool:
        """Whether the bias of the estimates may be all of the difference."""
        return self.bias_mc is not None and abs(self.difference) < 3 * abs(self.bias_mc)

    @property
    def cautions(self) -> list[str]:
        """What the difference does not show."""
        found = [self.few_seeds] if self.few_seeds else []
        if self.within_bias:
            found.append(
                f"below three times the bias of the estimate ({self.bias_mc:+.4f} nats): "
                "a better fit of q may be all of it; estimator=ais tells p and q apart"
            )
        return found


def compare(name_a: str, a: Sequence[Run], name_b: str, b: Sequence[Run], split: str) -> Paired:
    """Compare two groups of finished runs, each of which differs by its seed alone.

    Raises:
        UserError: a group is empty or mixes trainings, both hold the same run, or they were not scored on the same
            images with the same k, weights and precision, or a file of per-image values is missing or damaged.
    """
    sides = ((name_a, a), (name_b, b))
    for name, group in sides:
        if not group:
            raise UserError(f"--compare {name}: no finished run is that")
        # Before the evaluations: two trainings in one group are often evaluated in two ways.
        _one_training(name, [Scored(run, run.scores[0], split) for run in group])
    both = {run.identity for run in a} & {run.identity for run in b}
    if both:
        raise UserError(f"--compare {name_a} {name_b}: both hold {min(both)}")
    scores = _shared(name_a, a, name_b, b, split)
    scored = [[Scored(run, scores[run.identity], split) for run in group] for _, group in sides]
    for name, one in zip((name_a, name_b), scored, strict=True):
        _one_training(name, one)
    return difference(name_a, scored[0], name_b, scored[1])


def _one_training(name: str, scored: Sequence[Scored]) -> None:
    keys = telling_apart(scored)
    if not keys:
        return
    found = sorted({label(s.run, keys) for s in scored})
    options = [" ".join(f"{key}={value}" for key, value in zip(keys, values, strict=True)) for values in found]
    if "=" in name:
        options = [f'"{name} {option}"' for option in options]
    more = f" or one of {len(options) - OPTIONS} more" if len(options) > OPTIONS else ""
    raise UserError(
        f"--compare {name}: its runs differ by more than their seed; choose {' or '.join(options[:OPTIONS])}{more}"
    )


def difference(name_a: str, a: Sequence[Scored], name_b: str, b: Sequence[Scored]) -> Paired:
    """A minus B, where each is one training at several seeds and all are scored on the same images in the same way.

    Raises:
        UserError: a file of per-image values is missing or damaged.
    """
    mine, theirs = (np.stack([log_px(s) for s in group]) for group in (a, b))
    gain = mine.mean(0) - theirs.mean(0)
    n = len(gain)
    spread = None
    if min(len(a), len(b)) > 1:
        spread = math.sqrt(sum(float(v.mean(1).var(ddof=1)) / len(v) for v in (mine, theirs)))
    biases = [s.numbers["bias_mc"] for s in (*a, *b)]
    known = [abs(bias) for bias in biases if bias is not None]
    return Paired(
        a=name_a,
        b=name_b,
        seeds_a=tuple(s.run.seed for s in a),
        seeds_b=tuple(s.run.seed for s in b),
        split=a[0].split,
        k=a[0].score.k,
        images=n,
        difference=float(gain.mean()),
        stderr_images=float(gain.std(ddof=1)) / math.sqrt(n) if n > 1 else 0.0,
        stderr_seeds=spread,
        wins_a=int((gain > 0).sum()),
        wins_b=int((gain < 0).sum()),
        ties=int((gain == 0).sum()),
        bias_mc=-max(known) if len(known) == len(biases) else None,
    )


def against(table: Table, wanted: Mapping[str, str], name: str) -> Table | None:
    """Every cell with its difference from the cell whose runs are ``wanted``; None if there is no such cell.

    Of several such cells, that counts which has the cell's own values of the keys that tell them apart: objectives at
    three values of k against the ELBO at the same k.

    Args:
        table: of runs scored on the same images in the same way, data set by data set.
        wanted: keys of the configuration and their values.
        name: what that is called.

    Raises:
        UserError: as ``difference``.
    """
    references = [cell for cell in table.cells if all(agrees(s.run, wanted) for s in cell.runs)]
    if not references:
        return None
    keys = ("data", *table.rows, *table.columns)
    apart = [key for key in keys if len({_values(cell, [key]) for cell in references}) > 1]

    def paired(cell: Cell) -> Paired | None:
        # Other data are other images, whatever tells the references apart.
        same = [r for r in references if _values(r, ["data", *apart]) == _values(cell, ["data", *apart])]
        if not same or same[0] is cell:
            return None
        return difference(cell.name, cell.runs, name, same[0].runs)

    return replace(table, against=name, cells=tuple(replace(cell, against=paired(cell)) for cell in table.cells))


def _values(cell: Cell, keys: Sequence[str]) -> tuple[str, ...]:
    return label(cell.runs[0].run, keys)


def log_px(scored: Scored) -> Float64[np.ndarray, " images"]:
    """Per-image log p^(x) of one run, nats, in the order of the data set.

    Raises:
        UserError: the file is missing, damaged, or of another evaluation than ``result.json``.
    """
    path, numbers = scored.score.arrays, scored.numbers
    name = "log_px" if scored.split == "test" else f"{scored.split}_log_px"
    try:
        # Opened here: numpy leaves a file open that is no archive.
        with path.open("rb") as opened, np.load(opened) as file:
            values = np.asarray(file[name], dtype=np.float64)
    except FileNotFoundError:
        raise UserError(f"{path} is not there, and a paired comparison needs it; {_again(path)}") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        raise UserError(f"{path} is damaged: it holds no {name}; remove it, {_again(path)}") from None
    if values.shape != (numbers["n"],) or not np.isfinite(values).all():
        raise UserError(f"{path} is damaged: {name} should hold {numbers['n']} finite values, one an image")
    # The sum may have been taken in another order, no more.
    if abs(values.mean() + numbers["nll"]) > 1e-6 * max(1.0, abs(numbers["nll"])):
        raise UserError(f"{path} is of another evaluation than result.json: its mean is not -{numbers['nll']:.4f}")
    return values


def _again(path: Path) -> str:
    """Who makes a file of per-image values again."""
    who = "iwae-eval" if path.parent.parent.name == "evaluations" else "the command of the run"
    return f"{who} writes it again"


def _shared(name_a: str, a: Sequence[Run], name_b: str, b: Sequence[Run], split: str) -> dict[str, Score]:
    """For every run the evaluation that all of them have: of the same images, k, weights, precision."""
    by_kind: dict[tuple[int, str, str, str], dict[str, Score]] = {}
    for run in (*a, *b):
        for score in run.scores:
            if score.splits.get(split, {}).get("nll") is not None and split in score.sha256:
                kind = (score.k, score.weights, score.precision, score.sha256[split])
                by_kind.setdefault(kind, {}).setdefault(run.identity, score)
    shared = [kind for kind, scores in by_kind.items() if len(scores) == len(a) + len(b)]
    if shared:
        return by_kind[max(shared)]
    for run in (*a, *b):
        if not any(run.identity in scores for scores in by_kind.values()):
            raise UserError(f"{run.identity} has no NLL of the {split} split; iwae-eval computes it")
    first, second = (next(k for k, scores in by_kind.items() if g[0].identity in scores) for g in (a, b))
    for i, what in ((3, "images of the split (sha256)"), (0, "k"), (1, "weights"), (2, "precision")):
        if first[i] != second[i]:
            mine, theirs = (str(kind[i])[:12] for kind in (first, second))
            raise UserError(
                f"--compare {name_a} {name_b}: not scored on the same {what}: {mine} and {theirs}; "
                "evaluate both alike with iwae-eval"
            )
    raise UserError(f"--compare {name_a} {name_b}: no evaluation is shared by all of their runs; see iwae-eval")
