"""The table of a ``result.json``, printed from the file alone, and the warnings that belong to an estimate."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich import table
from rich.console import Console
from rich.text import Text

from iwae_cli.record.units import REMEDY, collapsed, layer_sizes, units_text

SPLITS = ("test", "validation", "train")
COLUMNS = (*SPLITS, "inference", "generative")
"""Parts of a key that become a column: rows with one label and different columns are printed side by side."""

PLUS_MINUS = "\N{PLUS-MINUS SIGN}"
LIMIT = 0.05
"""Nats of bias that have a warning."""
NO_GAP = "none seen"
"""Instead of a gap_q that is not above 0: few images may not show it."""
DISCRETE_UNITS = "active units are not defined for discrete layers"
ENOUGH = 50
"""Samples from which on their effective size is judged."""

Row = tuple[str, str, str]
"""(label, dotted key in ``result.json``, format); a list of them is ``result["rows"]``."""

SPLIT_ROWS: Sequence[Row] = (
    ("NLL_{k}, nats", "nll", "{:.2f}"),
    ("NLL_AIS, nats", "nll_ais", "{:.2f}"),
    ("  another test set: stderr_images", "stderr_images", "± {:.2f}"),
    ("  other noise: stderr_mc", "stderr_mc", "± {:.4f}"),
    ("  Jensen's bias: bias_mc", "bias_mc", "{:+.4f}"),
    ("NLL_{level} by q, same images, nats", "nll_q", "{:.2f}"),
    ("  above NLL_AIS", "above_ais", "{:+.3f}"),
    ("    paired: stderr", "above_ais_stderr", "± {:.3f}"),
    ("  too high by at least: gap_q", "gap_q", "{:.3f}"),
    ("    standard error, paired", "gap_q_stderr", "± {:.3f}"),
    ("    first images, refined", "refined.n", "{:,}"),
    ("NLL_{k} by refined proposals, nats", "nll_refined", "{:.2f}"),
    ("  refined: stderr_images", "refined.stderr_images", "± {:.2f}"),
    ("  refined: stderr_mc", "refined.stderr_mc", "± {:.4f}"),
    ("  refined: bias_mc", "refined.bias_mc", "{:+.4f}"),
    ("  refined: effective sample size, median", "refined.ess_median", "{:,.1f}"),
    ("  refined: images below 10", "refined.ess_share_below_10", "{:.1%}"),
    ("  refined: images with k-hat above 0.7", "refined.khat_share_above_0.7", "{:.1%}"),
    ("  products of bfloat16: bf16_shift", "bf16_shift", "{:+.4f}"),
    ("    measured on some images", "bf16_shift_stderr", "± {:.4f}"),
    ("exact NLL, nats", "exact_nll", "{:.2f}"),
    ("jackknife of NLL_{k}, nats", "nll_jackknife", "{:.2f}"),
    ("bound L_{level}, nats", "bounds", "{:.2f}"),
    ("mean log p(x), {level} temperatures", "by_temperatures", "{:.2f}"),
    ("bits per dimension", "bits_per_dim", "{:.4f}"),
    ("images", "n", "{:,}"),
    ("effective sample size, median", "ess_median", "{:,.1f}"),
    ("effective sample size, least", "ess_min", "{:,.1f}"),
    ("  images below 10", "ess_share_below_10", "{:.1%}"),
    ("images with k-hat above 0.7", "khat_share_above_0.7", "{:.1%}"),
    ("images with a top weight above 0.5", "top_weight_share_above_0.5", "{:.1%}"),
    ("acceptance", "acceptance", "{:.2f}"),
)
"""Labels and formats of all numbers that estimators of log p(x) report for each split."""


def split_rows(numbers: Mapping[str, Any]) -> list[Row]:
    """Return the rows of an estimator of log p(x): those of ``SPLIT_ROWS`` whose numbers a split holds.

    A number for each level, such as ``bounds``, gives a row for each level.

    Args:
        numbers: ``{"test": {"nll": ..., "k": ..., "bounds": {"1": ..., "50": ...}}}``; other keys are ignored.
    """
    rows = []
    for label, key, form in SPLIT_ROWS:
        for split in SPLITS:
            held = numbers.get(split) or {}
            if key.startswith("refined."):
                # Those of some images would be read beside those of all.
                if key != "refined.n" and "nll_refined" not in held:
                    continue
                held = held.get("refined") or {}
            inner = key.removeprefix("refined.")
            if inner not in held:
                continue
            levels = list(held[inner]) if isinstance(held[inner], Mapping) else [""]
            for level in levels:
                named = label.format(k=held.get("k"), level=level)
                rows.append((named, f"{split}.{key}.{level}".rstrip("."), form))
    return rows


def number_at(numbers: Mapping[str, Any], key: str, missing: Any = None) -> Any:
    """Return the number at a dotted key, else ``missing``; names may contain dots, as ``khat_share_above_0.7``."""
    if key in numbers:
        return numbers[key]
    parts = key.split(".")
    for n in range(1, len(parts)):
        inner = numbers.get(".".join(parts[:n]))
        if isinstance(inner, Mapping):
            return number_at(inner, ".".join(parts[n:]), missing)
    return missing


def decimals(error: float | None, otherwise: int = 2) -> int:
    """Return how many decimals show two significant digits of an error; ``otherwise`` if it is unknown or rounding."""
    return min(max(0, 1 - int(f"{error:.1e}".partition("e")[2])), 6) if error and error > 1e-9 else otherwise


def measured(value: float, error: float | None, sign: str = "") -> str:
    """Return ``84.851 ± 0.014``: two significant digits of the error decide both; the value alone without one."""
    n = decimals(error)
    return f"{value:{sign}.{n}f}" + ("" if error is None else f" {PLUS_MINUS} {error:.{n}f}")


def table_of(result: Mapping[str, Any]) -> tuple[list[str], dict[str, list[str]]]:
    """Return the headings of the columns of a ``result.json``, and for every label its formatted numbers.

    An error, whose format begins with ±, has two significant digits, and the number a line before as many decimals.
    """
    rows = result.get("rows") or split_rows(result)  # before 0.3 there are no rows
    parts = [next((part for part in key.split(".") if part in COLUMNS), "") for _, key, _ in rows]
    columns = [name for name in COLUMNS if name in parts] or [""]
    labels = list(dict.fromkeys(label for label, _, _ in rows))
    next_label = dict(pairwise(labels))
    errors = {
        (label, part): number_at(result, key)
        for (label, key, form), part in zip(rows, parts, strict=True)
        if form.startswith(PLUS_MINUS)
    }
    lines: dict[str, list[str]] = {label: [""] * len(columns) for label in labels}
    for (label, key, form), part in zip(rows, parts, strict=True):
        value, error = number_at(result, key), errors.get((label, part), errors.get((next_label.get(label), part)))
        if error and form.endswith("f}"):
            form = re.sub(r"\.\d+f", f".{decimals(error)}f", form)
        form = NO_GAP if key in {f"{split}.gap_q" for split in SPLITS} and (value or 0) <= 0 else form
        lines[label][columns.index(part) if part else 0] = "\N{EN DASH}" if value is None else form.format(value)
    return columns, lines


def reliability_warning(splits: Mapping[str, Mapping[str, Any]], by: str = "q") -> str | None:
    """Return one sentence that says by how much L_k is not reliable, and what to type; None if nothing is wrong.

    Where refined proposals have measured how much too high NLL_k by q is, that decides, unless the error is too large.
    Elsewhere signs do: bias, and shares of images, not k-hat, since good models have many images with a high k-hat and
    hardly any bias.

    Args:
        splits: the numbers of L_k by split, as in ``result.json``.
        by: the proposals of these numbers.
    """
    exact = all(split.get("exact_nll") is not None for split in splits.values())
    advice = "its exact NLL says by how much" if exact else "estimator=ais measures by how much"
    high, signs = [], []
    for name, split in splits.items():
        gap, error = split.get("gap_q"), split.get("gap_q_stderr")
        if "gap_q" not in split and by == "q" and not exact:
            advice = "evaluation.refine=200 measures by how much"
        if gap is not None and error is not None and gap > max(LIMIT, 2 * error):
            n = "all" if "nll_refined" in split else f"the first {split['refined']['n']:,}"
            high.append(f"{measured(gap, error)} nats on {n} images of {name}")
        elif gap is None or error is None or gap + 2 * error > LIMIT or _signs(split["refined"]):
            signs += [f"{sign} of {name}" for sign in _signs(split)]
    if not high:
        return f"NLL_{_k(splits)} by {by} may be too high, with {' and '.join(signs)}: {advice}" if signs else None
    refined = [split for split in splits.values() if split.get("refined")]
    if any(_signs(split["refined"]) for split in refined):
        advice = "so few draws do not show the whole gap, estimator=ais does"
    elif all("nll_refined" in split for split in refined):
        advice = "compare models by nll_refined, since smaller differences say nothing"
    else:
        advice = "evaluation.refine=all measures every image, since smaller differences between models say nothing"
    return f"NLL_{_k(splits)} by {by} is too high by at least {' and '.join(high)}: {advice}"


def _k(splits: Mapping[str, Mapping[str, Any]]) -> int:
    return int(next(split["k"] for split in splits.values()))


def _signs(split: Mapping[str, Any]) -> list[str]:
    """Return what shows that L_k of a split is far below log p(x)."""
    bias, ess, top = (split.get(key) for key in ("bias_mc", "ess_share_below_10", "top_weight_share_above_0.5"))
    if bias is not None and abs(bias) > LIMIT:
        return [f"a bias_mc of {bias:+.2f}"]
    # Few samples always have a small effective size, and one of them much of the weight.
    if split["k"] < ENOUGH:
        return []
    if ess is not None and ess > 0.05:
        return [f"an effective sample size below 10 in {ess:.1%} of the images"]
    if top is not None and top > 0.01:
        return [f"a top weight above 0.5 in {top:.1%} of the images"]
    return []


def result_table(
    result: Mapping[str, Any],
    *,
    folder: str | Path,
    upload: Mapping[str, str] | None = None,
    since: str | None = None,
) -> None:
    """Print a ``result.json`` in short to standard output: its rows, warnings, notes and reasons for missing numbers.

    ``upload`` is what ``left_to_upload`` returns; ``since`` is given if the training ended before this command.
    """
    out = Console(highlight=False, markup=False, force_jupyter=False)  # plain text in a notebook too
    columns, lines = table_of(result)
    sheet = table.Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    sheet.add_column("", no_wrap=True)
    for heading in columns:
        sheet.add_column(heading, justify="right", no_wrap=True)
    for number, (label, cells) in enumerate(lines.items()):
        sheet.add_row(Text(label), *map(Text, cells), style="" if number else "bold")
    out.print()
    out.print(str(result["identity"]), style="bold", soft_wrap=True)
    if since is not None:
        out.print(f"trained already, finished at {since}: nothing was trained now, this is its result", soft_wrap=True)
    out.print(sheet)
    if warning := reliability_warning({name: split for name in SPLITS if "k" in (split := result.get(name) or {})}):
        _print_sentence(out, f"warning: {warning}", "yellow")
    for note in result.get("notes", ()):
        _print_sentence(out, note)
    keys: dict[str, list[str]] = {}
    for key, reason in (result.get("reasons") or {}).items():
        keys.setdefault(reason, []).append(key)
    for reason, missing in keys.items():
        _print_sentence(out, f"{', '.join(missing)} not available: {reason}")
    units, seconds = result.get("active_units"), result.get("seconds") or {}
    if units and (where := collapsed(units)):
        _print_sentence(out, f"warning: q has collapsed, no unit of {where} is active; {REMEDY}", "yellow")
    out.print()
    facts = {
        "data": result.get("dataset", {}).get("protocol"),
        "training": _training_text(result),
        "active units": None if units is None else units_text(units, layer_sizes(result.get("model") or {})),
        "seconds": ", ".join(f"{name} {value:,.1f}" for name, value in seconds.items() if value is not None),
        "device": _device_text(result.get("device") or {}),
        "folder": folder,
        **(upload or {}),
    }
    for label, fact in facts.items():
        if fact:
            # On one line even in a narrow terminal, so that a path or a command can be copied.
            out.print(f"{label:<14}{fact}", soft_wrap=True)


def _training_text(result: Mapping[str, Any]) -> str | None:
    """Return how much was trained; None in results of versions before 0.6."""
    passes, steps, draws = (result.get(key) for key in ("epochs", "steps", "draws"))
    return draws and f"{passes:,} passes, {steps:,} steps, {draws:,} draws of q"


def _device_text(device: Mapping[str, Any]) -> str:
    """Return on what the evaluation ran, such as ``cpu, 1 thread``; runs of earlier versions lack some of it."""
    threads = device.get("threads")
    counted = threads and f"{threads} thread{'s' * (threads > 1)}"
    return ", ".join(str(part) for part in (device.get("kind"), device.get("name"), counted) if part)


def _print_sentence(out: Console, sentence: str, style: str = "") -> None:
    # At a terminal it is broken between words; in a file it is one line.
    out.print(Text(sentence, style=style), soft_wrap=not out.is_terminal)
