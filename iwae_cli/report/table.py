"""Runs in a table: rows and columns by any key of the configuration, one cell for runs that differ by seed alone."""

from __future__ import annotations

import difflib
import math
import shlex
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iwae_cli.core.errors import UserError
from iwae_cli.report.published import Published, deviations, published
from iwae_cli.report.reader import LeftOut, Run, Score

if TYPE_CHECKING:
    from iwae_cli.report.paired import Paired

ROWS = ("model", "objective.k")
COLUMNS = ("objective",)
MISSING = "\N{EN DASH}"

Label = tuple[str, ...]


@dataclass(frozen=True)
class Scored:
    """A run with the evaluation that counts in its table."""

    run: Run
    score: Score
    split: str

    @property
    def numbers(self) -> Mapping[str, Any]:
        """Of the split, as in ``result.json``."""
        return self.score.splits[self.split]


@dataclass(frozen=True)
class Cell:
    """Runs that differ by their seed alone, in the order of seeds.

    Attributes:
        row, column: values of the table's keys, as they are printed.
        runs: at least one.
        published: what a paper has for exactly this, if any.
        deviations: how these were trained otherwise than there.
        against: the paired difference from the cell that the table is against, if there is one.
    """

    row: Label
    column: Label
    runs: tuple[Scored, ...]
    published: Published | None
    deviations: tuple[str, ...]
    against: Paired | None = None

    @property
    def name(self) -> str:
        """One line for legends and lists."""
        return " ".join((*self.column, *self.row))

    @property
    def nll(self) -> float:
        """Mean over seeds, nats."""
        return statistics.fmean(scored.numbers["nll"] for scored in self.runs)

    @property
    def stderr(self) -> float | None:
        """Standard error of the mean over seeds, nats; None for one seed."""
        return standard_error([scored.numbers["nll"] for scored in self.runs])

    def mean(self, key: str) -> float | None:
        """Mean over seeds of another number of ``result.json``, such as ``bias_mc``; None where a run has none."""
        values = [scored.numbers[key] for scored in self.runs]
        return None if None in values else statistics.fmean(values)

    @property
    def units(self) -> tuple[float, ...] | None:
        """Mean number of active units, one a layer; None where a run has none."""
        units = [scored.score.active_units for scored in self.runs]
        if any(u is None for u in units) or len({len(u) for u in units if u is not None}) != 1:
            return None
        return tuple(map(statistics.fmean, zip(*[u for u in units if u is not None], strict=True)))

    @property
    def bounds(self) -> dict[int, float]:
        """Mean bound by level m that all runs have, nats."""
        levels = [scored.numbers["bounds"] for scored in self.runs]
        shared = [m for m in levels[0] if all(level.get(m) is not None for level in levels)]
        return {int(m): statistics.fmean(level[m] for level in levels) for m in sorted(shared, key=int)}


@dataclass(frozen=True)
class Table:
    """Cells that may be compared: one data set (or a key that names it), one split, one k, one kind of weights.

    Attributes:
        title: the data.
        split, k, weights: what was evaluated.
        images: in the split, by data set.
        rows, columns: keys.
        cells: in the order of rows, then columns.
        notes: what should be known of it, one line each.
        against: what the cells' paired differences are from, as it was asked for; None if it was not.
    """

    title: str
    split: str
    k: int
    weights: str
    images: Mapping[str, int]
    rows: Label
    columns: Label
    cells: tuple[Cell, ...]
    notes: tuple[str, ...]
    against: str | None = None

    @property
    def row_labels(self) -> list[Label]:
        """In order."""
        return list(dict.fromkeys(cell.row for cell in self.cells))

    @property
    def column_labels(self) -> list[Label]:
        """In order."""
        return sorted({cell.column for cell in self.cells}, key=_order)

    def keyed(self, cell: Cell) -> dict[str, str]:
        """Where a cell stands."""
        return dict(zip((*self.rows, *self.columns), (*cell.row, *cell.column), strict=True))

    @cached_property
    def grid(self) -> dict[tuple[Label, Label], Cell]:
        """Cells by row and column; where no run is there is none."""
        return {(cell.row, cell.column): cell for cell in self.cells}


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean: sd / sqrt(n) with n - 1 in the variance; None for one value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def shown(value: Any) -> str:
    """A value of a key, as it is printed and as ``--compare`` asks for it."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def agrees(run: Run, wanted: Mapping[str, str]) -> bool:
    """Whether a run has these values; numbers are compared as numbers, lists without their spaces."""

    def same(value: str, given: str) -> bool:
        return value.replace(" ", "") == given.replace(" ", "") or _number(value) == _number(given)

    return all(same(shown(run.keys.get(key)), value) for key, value in wanted.items())


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def known_key(key: str, runs: Iterable[Run]) -> str:
    """``key``, if any run has it.

    Raises:
        UserError: none has.
    """
    keys = dict.fromkeys(name for run in runs for name in run.keys)
    if key not in keys:
        near = difflib.get_close_matches(key, keys, 1)
        hint = f"; did you mean {near[0]}?" if near else "; such as model, objective.k, optimizer.lr"
        raise UserError(f"no run has the key {key}{hint}")
    return key


def comparable(runs: Sequence[Run], split: str) -> tuple[list[Scored], list[LeftOut]]:
    """For every data set what most of its runs share (k, images, weights, precision), and the runs that lack it."""
    kept, left_out = [], []
    for dataset in dict.fromkeys(run.dataset for run in runs):
        group = [run for run in runs if run.dataset == dataset]
        counts = Counter(kind for run in group for kind in {_kind(score, split) for score in run.scores} if kind)
        if not counts:
            left_out += [LeftOut(run.path, "not comparable", _lacks_split(run, split)) for run in group]
            continue
        # Of two that as many have, that of more samples; the rest makes the choice the same every time.
        wanted = max(counts, key=lambda kind: (counts[kind], kind))
        for run in group:
            score = next((score for score in run.scores if _kind(score, split) == wanted), None)
            if score is None:
                left_out.append(LeftOut(run.path, "not comparable", _why(run, split, wanted)))
            elif score.splits[split]["nll"] is None:
                reason = score.reasons.get(f"{split}.nll") or score.reasons.get("nll") or "result.json says null"
                left_out.append(LeftOut(run.path, "no number", f"NLL_{score.k} of {split}: {reason}"))
            else:
                kept.append(Scored(run, score, split))
    return kept, left_out


def tables(
    scored: Sequence[Scored], rows: Sequence[str] | None = None, columns: Sequence[str] | None = None
) -> list[Table]:
    """One table a data set, or one for all where a key names the data.

    Where ``rows`` and ``columns`` leave runs in one cell that differ by more than their seed, the keys that tell
    them apart are added to the rows: nothing is averaged but seeds.

    Args:
        scored: from ``comparable``.
        rows, columns: keys; None takes ``ROWS`` without those among the columns, and ``COLUMNS``.

    Raises:
        UserError: a key that no run has, or one that is in both.
    """
    runs = [s.run for s in scored]
    if columns is None:
        columns = [key for key in COLUMNS if key not in (rows or ())]
    if rows is None:
        rows = [key for key in ROWS if key not in columns]
    for key in (*rows, *columns) if runs else ():
        known_key(key, runs)
    for key in rows:
        if key in columns:
            raise UserError(f"{key} is in --rows and in --columns; write it in one")
    together = "data" in (*rows, *columns)
    groups = (
        [list(scored)]
        if together
        else [[s for s in scored if s.run.dataset == name] for name in dict.fromkeys(run.dataset for run in runs)]
    )
    return [_table(group, tuple(rows), tuple(columns)) for group in groups if group]


def _table(scored: Sequence[Scored], rows: Label, columns: Label) -> Table:
    added = telling_apart(scored, (*rows, *columns))
    rows += added
    members: dict[tuple[Label, Label], list[Scored]] = {}
    for s in scored:
        place = (label(s.run, rows), label(s.run, columns))
        members.setdefault(place, []).append(s)
    cells = []
    for row, column in sorted(members, key=lambda place: (_order(place[0]), _order(place[1]))):
        group = tuple(sorted(members[row, column], key=lambda s: s.run.seed))
        of_paper = published(group[0].run, group[0].score, group[0].split)
        ways = tuple(deviations(group[0].run)) if of_paper else ()
        cells.append(Cell(row, column, group, of_paper, ways))
    notes = [f"rows also by {key}: runs of one cell differ by their seed alone" for key in added]
    first = scored[0]
    data = {s.run.dataset: int(s.numbers["n"]) for s in scored}
    for what, values in (("k", {s.score.k for s in scored}), ("weights", {s.score.weights for s in scored})):
        if len(values) > 1:
            notes.append(f"the data sets differ in {what}: {', '.join(map(str, sorted(values)))}")
    return Table(
        title=", ".join(data),
        split=first.split,
        k=first.score.k,
        weights=first.score.weights,
        images=data,
        rows=rows,
        columns=columns,
        cells=tuple(cells),
        notes=tuple(notes),
    )


def training(scored: Scored) -> dict[str, Any]:
    """What decides the evaluated weights, but for the seed; how often it was validated decides only the best ones."""
    decides = {"data": scored.run.dataset, **scored.run.training}
    if scored.score.weights == "last":
        decides = {key: value for key, value in decides.items() if not key.startswith("validation.")}
    return decides


def varying(scored: Sequence[Scored]) -> dict[str, list[str]]:
    """Keys in which the trainings differ by more than the seed, with their values as printed."""
    # A run for which a key decides nothing has it all the same: training.tau without a roulette.
    keys = dict.fromkeys(key for s in scored for key in training(s))
    found = {key: list(dict.fromkeys(shown(s.run.keys.get(key)) for s in scored)) for key in keys}
    found = {key: values for key, values in found.items() if len(values) > 1}
    # Two names of the same settings are no difference: schedule=smoke is schedule=constant with three passes.
    same = [group for group in ("optimizer", "schedule") if not any(key.startswith(f"{group}.") for key in found)]
    return {key: values for key, values in found.items() if key not in same}


def telling_apart(scored: Sequence[Scored], keys: Label = ()) -> Label:
    """Keys to add so that runs which agree in all of them differ by their seed alone."""
    added: Label = ()
    while True:
        cells: dict[Label, list[Scored]] = {}
        for s in scored:
            cells.setdefault(label(s.run, (*keys, *added)), []).append(s)
        differing = next((different for group in cells.values() if (different := varying(group))), None)
        if differing is None:
            return added
        # A name says more than the sizes behind it, and k more than a constant of the optimizer.
        first = min(
            differing,
            key=lambda key: (
                "." in key,
                not key.startswith("objective"),
                not key.startswith("model"),
                key.endswith("._target_"),
            ),
        )
        added += (first,)


def label(run: Run, keys: Sequence[str]) -> Label:
    """The run's values of ``keys``, as they are printed."""
    return tuple(shown(run.keys.get(key)) for key in keys)


def _order(values: Label) -> list[tuple[int, float, str]]:
    """Numbers by size before words by letter."""
    numbers = map(_number, values)
    return [(1, 0.0, n) if isinstance(n, str) else (0, n, text) for n, text in zip(numbers, values, strict=True)]


Kind = tuple[int, str, str, str]


def _kind(score: Score, split: str) -> Kind | None:
    """What two evaluations must share to be compared: k, the images, which weights, their precision."""
    if split not in score.splits or split not in score.sha256:
        return None
    return score.k, score.weights, score.precision, score.sha256[split]


def _lacks_split(run: Run, split: str) -> str:
    has = ", ".join(run.scores[0].splits) or "none"
    return f"its {split} split was not evaluated (but {has}); iwae-eval {_typed(run.path)} evaluation.splits=[{split}]"


def _why(run: Run, split: str, wanted: Kind) -> str:
    """Why a run does not go with the others, in one line, from its nearest evaluation."""
    kinds = [kind for score in run.scores if (kind := _kind(score, split))]
    if not kinds:
        return _lacks_split(run, split)
    names = ("k", "weights", "precision", "images")
    kind = max(kinds, key=lambda kind: sum(a == b for a, b in zip(kind, wanted, strict=True)))
    differing = [
        f"other {name} ({_short(mine)}, most have {_short(theirs)})"
        for name, mine, theirs in zip(names, kind, wanted, strict=True)
        if mine != theirs
    ]
    k, weights, _, _ = wanted
    repair = f"; iwae-eval {_typed(run.path)} evaluation.k={k} evaluation.weights={weights}"
    return ", ".join(differing) + (repair if kind[2:] == wanted[2:] else "")


def _typed(path: Path) -> str:
    """As it would be typed here."""
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))


def _short(value: object) -> str:
    return f"sha256 {value[:8]}" if isinstance(value, str) and len(value) == 64 else str(value)
