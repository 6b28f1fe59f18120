"""The grid of a report: rows and columns by any configuration key, one cell for runs that differ by their seed only."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from iwae_cli.core.errors import UserError
from iwae_cli.record.summary import NO_GAP, PLUS_MINUS, decimals, measured
from iwae_cli.record.units import REMEDY, collapsed, layer_sizes, units_text
from iwae_cli.report.paired import BY_Q, BY_REFINED, SEEN, Paired, better_fit, difference
from iwae_cli.report.published import RECALLED, Published, deviations, published
from iwae_cli.report.selection import (
    MISSING,
    Kind,
    Label,
    Scored,
    agrees,
    by_refined,
    first,
    known_key,
    label,
    mean,
    mixed_fits,
    number,
    telling_apart,
    unrefined,
)

ROWS = ("model", "objective.k")
COLUMNS = ("objective",)
OTHERWISE = "\N{DAGGER}"  # behind a published value whose runs were trained otherwise
WITHIN = "\N{DOUBLE DAGGER}"  # behind a difference that the error of the estimates may explain
WAYS = 4  # ways of training otherwise that a footnote lists
UNITS = {"evaluations": "draws", "seconds": "seconds"}
"""Of training budgets: an evaluation is that of p and q at one draw, forward and backward."""
SHARES = {"an eighth": 1 / 8, "a quarter": 1 / 4, "half": 1 / 2, "all": 1.0}
"""Of the budget that every run of a table has."""


@dataclass(frozen=True)
class Budget:
    """What the columns of validation bounds at equal training budgets share."""

    unit: str  # one of UNITS
    k: int  # samples per image of the validation bound
    levels: tuple[float, ...]  # budgets that a run has validated within
    shares: tuple[str, ...]  # of the training of the run with the smallest, for each level
    cautions: tuple[str, ...]  # what is not equal


@dataclass(frozen=True)
class Cell:
    """Runs that differ by their seed only, at least one, sorted by seed."""

    row: Label  # values of the table's keys, as printed; likewise the column
    column: Label
    runs: tuple[Scored, ...]
    published: Published | None  # value of a paper for exactly this setting
    deviations: tuple[str, ...]  # how the training differs from the paper's
    against: Paired | None = None  # difference from the table's reference cell
    # The validation bound of each seed at every level of the table's budget, nats; None before the first validation.
    at_budgets: tuple[tuple[float, ...] | None, ...] = ()

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
        """Standard error of the mean over seeds, nats."""
        return stderr([scored.numbers["nll"] for scored in self.runs])

    @property
    def cost(self) -> dict[str, float | None]:
        """Draws of q and seconds of the training, means over seeds; None if a run lacks it."""
        runs = [scored.run for scored in self.runs]
        return {"draws": mean(run.draws for run in runs), "seconds": mean(run.seconds for run in runs)}

    def mean(self, key: str) -> float | None:
        """Return the mean over seeds of a number in ``result.json``, such as ``bias_mc``; None if a run lacks it."""
        return mean(scored.numbers.get(key) for scored in self.runs)

    @property
    def refined(self) -> Cell | None:
        """The cell by the refined proposals; None unless all of its runs have them for the whole split."""
        runs = by_refined(self.runs)
        return None if runs is None else replace(self, runs=runs)

    @property
    def units(self) -> tuple[float, ...] | None:
        """Mean number of active units, one per layer; None if a run lacks it."""
        units = [scored.score.active_units for scored in self.runs]
        known = [u for u in units if u is not None]
        if len(known) < len(units) or len({len(u) for u in known}) != 1:
            return None
        return tuple(map(statistics.fmean, zip(*known, strict=True)))

    @property
    def units_of_sizes(self) -> str:
        """``26 of 100 + 7 of 50``; ``26 + 7`` where the sizes are unknown."""
        return units_text(self.units, layer_sizes(self.runs[0].run.config["model"])) if self.units else MISSING

    @property
    def bounds(self) -> dict[int, float]:
        """Mean bound of each level that all runs have, nats."""
        levels = [scored.numbers["bounds"] for scored in self.runs]
        shared = [m for m in levels[0] if all(level.get(m) is not None for level in levels)]
        return {int(m): statistics.fmean(level[m] for level in levels) for m in sorted(shared, key=int)}


class Field(NamedTuple):
    """One printed number of a cell: heading, the value to sort by, and text."""

    name: str
    value: float | None
    text: str


@dataclass(frozen=True)
class Table:
    """Cells that may be compared: one data set (or a key that names it), one split, k and kind of weights."""

    title: str
    split: str
    k: int
    weights: str
    images: Mapping[str, int]  # their number by data set
    rows: Label  # keys; likewise the columns
    columns: Label
    cells: tuple[Cell, ...]  # at least one, sorted by row, then column
    notes: tuple[str, ...]
    against: str | None = None  # name of the reference of the paired differences
    budget: Budget | None = None

    @property
    def precision(self) -> str:
        """Precision of the matrix products of L_k, which all cells share."""
        return self.cells[0].runs[0].kind.precision

    @property
    def images_sha256(self) -> dict[str, str]:
        """Hash of the images of the split by data set."""
        return {s.run.dataset: s.kind.images for cell in self.cells for s in cell.runs}

    @cached_property
    def refined(self) -> bool:
        """Whether all runs have an estimate by the refined proposals, which the differences then compare."""
        return all(cell.refined for cell in self.cells)

    def compared(self, cell: Cell) -> Cell:
        """Return a cell by the estimates that the differences compare."""
        return (self.refined and cell.refined) or cell

    def keyed(self, cell: Cell) -> dict[str, str]:
        """Return the values of the keys at a cell."""
        return dict(zip((*self.rows, *self.columns), (*cell.row, *cell.column), strict=True))

    @property
    def row_labels(self) -> list[Label]:
        """Labels of the rows, in order."""
        return list(dict.fromkeys(cell.row for cell in self.cells))

    @property
    def column_labels(self) -> list[Label]:
        """Labels of the columns, in order."""
        return sorted({cell.column for cell in self.cells}, key=_order)

    @property
    def grid(self) -> list[tuple[Label, list[Cell | None]]]:
        """Rows: label, and a cell per column label; None where there is no run."""
        at = {(cell.row, cell.column): cell for cell in self.cells}
        return [(row, [at.get((row, column)) for column in self.column_labels]) for row in self.row_labels]

    @property
    def body(self) -> list[list[str]]:
        """Text of every row: its label, then the fields of every column."""
        empty = [MISSING, *[""] * (len(self.names) - 1)]
        return [
            [*row, *(t for cell in cells for t in (empty if cell is None else [f.text for f in self.fields(cell)]))]
            for row, cells in self.grid
        ]

    @cached_property
    def names(self) -> list[str]:
        """Headings of the fields, which all cells share."""
        return [field.name for field in self.fields(self.cells[0])]

    def fields(self, cell: Cell) -> list[Field]:
        """Return the numbers that are printed of a cell."""
        by_row = not self.columns  # a row of several cells has no room for the errors of each
        refined, paired, paper = self.compared(cell), cell.against, cell.published
        of_seeds, units, papers, exact = self._any
        found = [Field(f"NLL_{self.k}", cell.nll, self._nll_text(cell))]
        if self._gaps and by_row:
            gap = cell.mean("gap_q")
            text = "" if gap is None else measured(gap, cell.mean("gap_q_stderr"))
            found.append(Field("gap_q", gap, re.sub(r"^-\S+", NO_GAP, text)))
        if exact:
            form = f"{{:.{decimals(cell.mean('stderr_images'))}f}}"
            found.append(number_field("exact NLL", cell.mean("exact_nll"), form))
        if self.refined:
            found.append(Field(f"refined NLL_{self.k}", refined.nll, self._nll_text(refined)))
        if self._seeds != {1}:
            found.append(Field("seeds", len(cell.runs), f"{len(cell.runs)}"))
        if self.against is not None:
            text = MISSING
            if paired:
                text = f"{paired.difference:+.{decimals(paired.stderr, 4)}f}{WITHIN if paired.within else ''}"
            found.append(Field(f"over {self.against}", paired and paired.difference, text))
            found.append(_error_field(f"{PLUS_MINUS} images", paired and paired.stderr_images))
            if of_seeds:
                found.append(_error_field(f"{PLUS_MINUS} seeds", paired and paired.stderr_seeds))
        if by_row:
            found += [_error_field(key, cell.mean(key)) for key in ("stderr_images", "stderr_mc")]
            found.append(number_field("bias_mc", cell.mean("bias_mc"), "{:+.4f}"))
        if units:
            found.append(Field("active units", sum(cell.units) if cell.units else None, cell.units_of_sizes))
        if by_row:
            draws, seconds = cell.cost.values()
            found.append(number_field("million draws", draws and draws / 1e6, "{:,.4g}"))
            found.append(number_field("training, s", seconds, "{:,.0f}"))
        if self.budget is not None:
            for level, held in zip(self.budget.levels, cell.at_budgets, strict=True):
                amount = f"{level / 1e6:,.3g}M draws" if self.budget.unit == "evaluations" else f"{level:,.3g} s"
                text = measured(statistics.fmean(held), stderr(held)) if held else MISSING
                found.append(Field(f"L_{self.budget.k} at {amount}", mean(held or (None,)), text))
        if papers:
            text = f"{paper}{OTHERWISE if cell.deviations else ''}" if paper else ""
            found.append(Field("paper", paper and paper.nll, text))
        return found

    def _nll_text(self, cell: Cell) -> str:
        if cell.stderr is None and not self.columns:  # the error over images stands beside it
            return f"{cell.nll:.{decimals(cell.mean('stderr_images'))}f}"
        return measured(cell.nll, cell.mean("stderr_images") if self._seeds == {1} else cell.stderr)

    @cached_property
    def _seeds(self) -> set[int]:
        return {len(cell.runs) for cell in self.cells}

    @cached_property
    def _any(self) -> tuple[bool, bool, bool, bool]:
        """Whether any cell has a paired error over seeds, active units, a published value, an exact NLL."""
        paired = [cell.against for cell in self.cells if cell.against is not None]
        of_seeds = any(pair.stderr_seeds is not None for pair in paired)
        units, papers = (any(getattr(cell, name) for cell in self.cells) for name in ("units", "published"))
        return of_seeds, units, papers, any(cell.mean("exact_nll") is not None for cell in self.cells)

    @cached_property
    def _gaps(self) -> list[tuple[float, int]]:
        """Of every run that has it: gap_q, at least 0, and the number of images."""
        numbers = [scored.numbers for cell in self.cells for scored in cell.runs]
        return [(max(0.0, f["gap_q"]), f["refined"]["n"]) for f in numbers if f.get("gap_q") is not None]

    @property
    def notes_below(self) -> list[str]:
        """What the numbers are, and what the marks behind them mean, one line each."""
        return [*self._notes(), *self.notes]

    def _notes(self) -> Iterator[str]:
        seeds, by = self._seeds, BY_REFINED if self.refined else BY_Q
        of_data = [f"{n:,} images" + (f" of {name}" if len(self.images) > 1 else "") for name, n in self.images.items()]
        number = f"{min(seeds)} " if len(seeds) == 1 else ""
        errors = f"mean and standard error over {number}seeds"
        if seeds == {1}:
            errors = "one seed each" + (f", {PLUS_MINUS} over images" if self.columns else "")
        where = f"{self.split} ({', '.join(of_data)})"
        yield f"NLL_{self.k} in nats on {where}, lower is better; {self.weights} weights; {errors}"
        yield from _published_notes([cell for cell in self.cells if cell.published is not None])
        blocks = {s.run.keys["objective"] for cell in self.cells for s in cell.runs if "objective.m" in s.run.keys}
        if blocks and "objective.k" in (*self.rows, *self.columns):
            yield f"objective.k of {', '.join(sorted(blocks))}: draws in each of objective.m groups"
        if self._gaps:
            sizes, counts = zip(*self._gaps, strict=True)
            runs = sum(len(cell.runs) for cell in self.cells)
            some = f", of {len(sizes)} of {runs} runs" if len(sizes) < runs else ""
            error = "" if self.columns else f", {PLUS_MINUS} over those"
            yield (
                f"gap_q: NLL_{self.k}, by the trained q, is too high by at least so much, {_range(sizes, '{:.3f}')} "
                f"nats by run{some}; measured on {_range(counts, '{:,}')} images{error}"
            )
        if self.refined:
            yield (
                f"refined NLL_{self.k}: by the refined proposals; the paper's values compare with NLL_{self.k}, by the "
                "trained q"
            )
        if self.against is not None:
            yield (
                f"over {self.against}: how much higher log p(x) is than there by {by}, paired image by image, nats; "
                f"beside it the standard error over images{' and that over seeds' if self._any[0] else ''}"
            )
        if not self.columns:
            of_seeds = "" if seeds == {1} else "; their mean over seeds"
            yield f"stderr_images, stderr_mc, bias_mc: of NLL_{self.k}, nats, of one run{of_seeds}"
        if unseen := [cell.name for cell in self.cells if cell.against is not None and not cell.against.seen]:
            yield f"no difference is seen (below {SEEN} standard errors): {', '.join(unseen)}"
        if self.budget is not None:
            draws = "draws of q scored in training, each an evaluation of p and q forward and backward"
            yield (
                f"L_{self.budget.k} at equal {self.budget.unit}: the bound on the validation split, nats, higher is "
                f"better, at {', '.join(self.budget.shares).replace(', all', ' and all')} of the training of the run "
                "with the fewest "
                f"{draws if self.budget.unit == 'evaluations' else 'seconds'}; between two validations by linear "
                "interpolation"
            )
            if len(self.budget.shares) < len(SHARES) or any(None in cell.at_budgets for cell in self.cells):
                late = any(scored.run.keys["validation.every"] > 1 for cell in self.cells for scored in cell.runs)
                earlier = "; validation.every=1 is earliest" if late else ""
                yield f"{MISSING}, or no column: this budget ends before the first validation of a run{earlier}"
            yield from (f"caution: {caution}" for caution in self.budget.cautions)
        passes = {s.run.result["epochs"] for cell in self.cells for s in cell.runs}
        if self.against is not None and len(passes) > 1:
            yield f"caution: these are trainings of {min(passes):,} to {max(passes):,} passes"
        paired = [cell.against for cell in self.cells if cell.against is not None]
        if within := dict.fromkeys(p.within for p in paired if p.within):
            yield f"{WITHIN} {' or '.join(within)}: {better_fit(by)}"
        yield from dict.fromkeys(f"caution: {p.few_seeds}" for p in paired if p.few_seeds)
        if lost := [f"{cell.name} in {where}" for cell in self.cells if (where := collapsed(cell.units or ()))]:
            yield f"q has collapsed, a layer has no active unit: {', '.join(lost)}; {REMEDY}"


def tables(
    scored: Sequence[Scored], rows: Sequence[str] | None = None, columns: Sequence[str] | None = None
) -> list[Table]:
    """Return one table per data set and kind of evaluation; one for all data sets where a key names the data.

    Where ``rows`` and ``columns`` leave runs in one cell that differ by more than their seed, the keys that tell
    them apart are added to the rows: nothing but seeds is averaged.

    Raises:
        UserError: a key that no run has, or one that is in both.
    """
    runs = [s.run for s in scored]
    if columns is None:
        columns = [key for key in COLUMNS if key not in (rows or ())]
    if rows is None:  # an objective from outside may have no k
        rows = [key for key in ROWS if key not in columns and any(key in run.keys for run in runs)]
    for key in (*rows, *columns) if runs else ():
        known_key(key, runs)
    for key in rows:
        if key in columns:
            raise UserError(f"{key} is in --rows and in --columns; write it in one")
    groups: dict[str, dict[Kind, list[Scored]]] = {}
    hashes: dict[str, list[str]] = {}
    for s in scored:
        known = hashes.setdefault(s.run.dataset, [])
        if s.kind.images not in known:
            known.append(s.kind.images)
        # By number, since every data set of a table has other images; two binarizations of one are never mixed.
        kind = s.kind._replace(images=str(known.index(s.kind.images)))
        if "evaluation.seed" in (*rows, *columns):
            kind = kind._replace(evaluation_seed="")
        name = "" if "data" in (*rows, *columns) else s.run.dataset
        groups.setdefault(name, {}).setdefault(kind, []).append(s)
    return [
        _table(
            kinds[kind],
            tuple(rows),
            tuple(columns),
            [i for i in range(1, len(Kind._fields)) if len({k[i] for k in kinds}) > 1],
        )
        for kinds in groups.values()
        for kind in sorted(kinds, key=lambda kind: (-kind.k, kind))
    ]


def _table(scored: Sequence[Scored], rows: Label, columns: Label, differ: Sequence[int]) -> Table:
    """Return a table; ``differ`` are the fields of ``Kind`` in which another table of the same data differs."""
    added = telling_apart(scored, (*rows, *columns))
    rows += added
    members: dict[tuple[Label, Label], list[Scored]] = {}
    for s in scored:
        members.setdefault((label(s, rows), label(s, columns)), []).append(s)
    cells = []
    for row, column in sorted(members, key=lambda place: (_order(place[0]), _order(place[1]))):
        group = tuple(sorted(members[row, column], key=lambda s: s.run.seed))
        beside = published(group[0].run, group[0].score, group[0].split)
        cells.append(Cell(row, column, group, beside, tuple(deviations(group[0].run)) if beside else ()))
    notes = [f"rows also by {key}: runs of one cell differ by their seed alone" for key in added]
    unread = list(dict.fromkeys(s.run.unread_first_stage for s in scored if s.run.unread_first_stage))
    if unread and "init_from.training" in (*rows, *columns):
        notes.append(
            "the run that init_from names cannot be read, so seeds of one first stage have a row each until it is back "
            f"there: {first(unread)}"
        )
    if mixed := mixed_fits(scored):
        notes.append(mixed)
    if any(by_refined([s]) for s in scored) and (lacking := unrefined(scored)):
        notes.append(f"compared by the trained q: {lacking}")
    one = scored[0]
    images = {s.run.dataset: int(s.numbers["n"]) for s in scored}
    title = [", ".join(images), one.split, f"k = {one.score.k}"]
    shared = one.kind._replace(images=one.kind.images[:8])
    title += [f"{Kind._fields[i].replace('_', ' ')} {shared[i]}" for i in differ]
    return Table(
        ", ".join(title), one.split, one.score.k, one.score.weights, images, rows, columns, tuple(cells), tuple(notes)
    )


def against(table: Table, wanted: Mapping[str, str], name: str) -> Table | None:
    """Return the table with the difference of every cell from the cell whose runs are ``wanted``; None without one.

    Of several such cells, the reference is the one with the cell's own values of the keys that tell them apart:
    objectives at three values of k against the ELBO at the same k.

    Raises:
        UserError: as ``paired.difference``.
    """
    references = [cell for cell in table.cells if all(agrees(s.keys, wanted) for s in cell.runs)]
    if not references:
        return None

    def values(cell: Cell, keys: Sequence[str]) -> Label:
        return label(cell.runs[0], keys)

    # Always by data: other data are other images.
    apart = ["data"]
    apart += [key for key in (*table.rows, *table.columns) if len({values(cell, [key]) for cell in references}) > 1]

    def paired(cell: Cell) -> Paired | None:
        same = [r for r in references if values(r, apart) == values(cell, apart)]
        if not same or same[0] is cell:
            return None
        return difference(cell.name, table.compared(cell).runs, name, table.compared(same[0]).runs)

    return replace(table, against=name, cells=tuple(replace(cell, against=paired(cell)) for cell in table.cells))


def stderr(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean: sd / sqrt(n), n - 1 in the variance; None for one value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _order(values: Label) -> list[tuple[int, float, str]]:
    """Return a sort key: numbers by size before words by letter."""
    return [(1, 0.0, n) if isinstance(n := number(text), str) else (0, n, text) for text in values]


def _range(values: Sequence[float], form: str) -> str:
    return " to ".join(dict.fromkeys((form.format(min(values)), form.format(max(values)))))


def _error_field(name: str, error: float | None) -> Field:
    return number_field(name, error, f"{{:.{decimals(error)}f}}")


def number_field(name: str, value: float | None, form: str) -> Field:
    """Return a number as ``form`` writes it, with a dash where there is none."""
    return Field(name, value, MISSING if value is None else form.format(value))


def _published_notes(cells: Sequence[Cell]) -> Iterator[str]:
    if not cells:
        return
    sources = dict.fromkeys(cell.published.source for cell in cells if cell.published)
    yield f"paper: NLL_5000 / active units; {'; '.join(sources)}"
    if any(RECALLED in str(cell.published) for cell in cells):
        yield f"{RECALLED} quoted from memory of the paper"
    ways = Counter(way for cell in cells for way in cell.deviations).most_common()
    named = [way if n == len(cells) else f"{way} in {n} of {len(cells)} cells" for way, n in ways[:WAYS]]
    named += [f"and in {len(ways) - WAYS} more ways"] if len(ways) > WAYS else []
    if named:
        yield f"{OTHERWISE} trained otherwise than in the paper: {', '.join(named)}"
