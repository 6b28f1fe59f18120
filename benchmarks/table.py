"""The record of one run of the benchmark as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from benchmarks.cases import BIAS, BIAS_IMAGES
from benchmarks.reach import ERRORS, REFERENCE_ESTIMATES

BASE = "ours"
"""The row that the others are divided by."""

BUSY = 0.05
"""Share of a round without the processor above which the times are unreliable."""

Cell = Callable[[dict[str, Any]], str]


def markdown(record: dict[str, Any]) -> str:
    """Return tables of times with ratios, memory, set-up and checks, and of whole runs if there were any."""
    machine = record["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    parts = [
        f"`{record['command']}`, {machine['date']}, {machine['processor']}, {machine['cores']} cores, "
        f"commit {machine['commit']}; {versions}. {record['data']}. Load {record['load_before'][0]:.1f} before"
        + (f", {record['load_after'][0]:.1f} after." if "load_after" in record else ", unfinished."),
    ]
    cases = record["cases"]
    if cases:
        parts += _cases(record, cases)
    for case, measured in record["reach"].items():
        parts += _reach(case, measured)
    if record["whole"]:
        parts.append(_whole(record["whole"]))
    parts += [
        f"{label} is missing: not installed ({', '.join(names)}); pip install '.[bench]'"
        for label, names in record["missing"].items()
    ]
    return "\n\n".join(parts)


def one_line(case: str, results: dict[str, Any]) -> str:
    """Return the times of one case, such as ``20x5: ours 3.80 (1.00), JAX 3.49 (0.92) ms``."""
    return (
        f"{case}: " + ", ".join(f"{label} {_time(result, results, 'ms')}" for label, result in results.items()) + " ms"
    )


def _time(result: dict[str, Any], results: dict[str, Any], key: str) -> str:
    value, base = _median(result, key), _median(results.get(BASE, {}), key)
    if value is None:
        return "failed" if "failed" in result else ""
    more = "" if result.get("reached", True) else "more than "
    return more + _number(value) + (f" ({value / base:.2f})" if base else "")


def _cases(record: dict[str, Any], cases: dict[str, Any]) -> list[str]:
    """Return tables with a row for every contender and a column for every case."""

    def timed(key: str) -> Callable[[str], Cell]:
        return lambda case: lambda result: _time(result, cases[case], key)

    labels = record["rows"]
    parts = [
        f"Milliseconds a step of training (batch x k) or, for NLL_k, an image: medians of {record['rounds']} rounds of "
        f"{record['round_seconds']} s in turn; in brackets the time divided by that of {BASE}.",
        _table(labels, cases, timed("ms")),
    ]
    away = max((_away(result) for results in cases.values() for result in results.values()), default=0.0)
    if away > BUSY:
        parts += [
            f"**Up to {away:.0%} of a round processes waited for a processor: the machine was busy, and times above "
            "are unreliable.** Milliseconds of processor time:",
            _table(labels, cases, timed("cpu_ms")),
        ]
    parts += [
        "Peak memory of the process, MB; in brackets without imports, data and weights.",
        _table(
            labels, cases, lambda _: lambda r: f"{r['peak_mb']:.0f} ({r['beyond_mb']:.0f})" if "peak_mb" in r else ""
        ),
        "Seconds from the start of the process to the end of the first unit of work: imports, data, check, choice of "
        "shapes, compilation.",
        _table(labels, cases, lambda _: lambda r: f"{r['set_up']:.0f}" if "set_up" in r else ""),
        "Checks. Training: after three steps from the same weights on the same images with the same noise, distance of "
        f"the weights from those of {BASE}, divided by the distance that they moved (and the largest difference of the "
        "bound, nats). Evaluation: NLL of the same images with other noise, minus that of ours, nats, with its "
        "Monte Carlo error.",
        _table(labels, cases, lambda _: _check),
    ]
    return parts


def _table(labels: Sequence[str], cases: dict[str, Any], cell_of: Callable[[str], Cell]) -> str:
    cells = {case: cell_of(case) for case in cases}
    rows = [[label, *(cells[case](results.get(label, {})) for case, results in cases.items())] for label in labels]
    return _rows(["", *cases], [row for row in rows if any(row[1:])])


def _rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(header), ["---", *["---:"] * (len(header) - 1)], *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _check(result: dict[str, Any]) -> str:
    check = result.get("check")
    if not check:
        return ""
    if "none" in check:
        return str(check["none"])
    if "above" in check:
        shown = f"{check['above']:+.3f} ± {check['error']:.3f}"
    elif "nll" in check:
        shown = f"{check['nll']:+.2f} ± {check['error']:.2f}"
    else:
        shown = f"{check['update']:.0e}" + (f" ({check['bound']:.0e})" if "bound" in check else "")
    return shown if check["same"] else f"**other work**: {shown}"


def _reach(case: str, measured: dict[str, Any]) -> list[str]:
    """Return what the table means, the table, and how well the reference agrees with the other methods."""
    results, reference = measured["results"], measured.get("reference")
    if reference is None:
        return [f"{case}: ours failed, so there is no reference."]
    rows = []
    for label, result in results.items():
        if "failed" in result:
            rows.append([label, "failed", "", "", ""])
            continue
        times = [_time(result, results, key) for key in ("ms", "cpu_ms")]
        rows.append([label, result["shown"], *times, f"{result['bias']:+.3f} ± {result['error']:.3f}"])
    agreement = ", ".join(f"{label} {_check(result)}" for label, result in results.items() if "check" in result)
    return [
        f"{case}: milliseconds an image, medians, at the first effort that shows the mean log p(x) of {BIAS_IMAGES} "
        f"images to be within {BIAS} nats of the reference by {ERRORS} standard errors, as the next effort does; in "
        f"brackets divided by that of {BASE}. 'More than': the last effort within {measured['limit']:g} processor "
        f"seconds of a program did not show it. The reference is {REFERENCE_ESTIMATES} x {reference['k']:,} samples of "
        f"refined proposals with other noise, {reference['log_px']:.3f} ± {reference['error']:.3f} nats.",
        _rows(["", "effort", "ms", "ms of the processor", "bias, nats"], rows),
        "Log p(x) by all estimates of the last effort together, minus the reference, nats. All methods estimate from "
        f"below, so none may be far above it: {agreement}.",
    ]


def _whole(whole: dict[str, Any]) -> str:
    header = ["", "seconds training", "seconds from the start of the process", "steps", "runs"]
    rows = []
    for label, result in whole["results"].items():
        if "failed" in result:
            rows.append([label, "failed", "", "", ""])
            continue
        ours = whole["results"].get(BASE, {})
        values = [_number(median(result[key])) for key in ("seconds", "from_start")]
        if "seconds" in ours:
            values = [
                f"{value} ({median(result[key]) / median(ours[key]):.2f})"
                for value, key in zip(values, ("seconds", "from_start"), strict=True)
            ]
        rows.append([label, *values, f"{median(result['steps']):,.0f}", str(len(result["seconds"]))])
    return (
        f"Whole runs of {whole['case']} from the same weights to a validation bound L_50 of {whole['target']} nats, "
        f"without its evaluation; medians over seeds, in brackets divided by {BASE}.\n\n" + _rows(header, rows)
    )


def _median(result: dict[str, Any], key: str) -> float | None:
    values = result.get(key)
    return median(values) if values else None


def _away(result: dict[str, Any]) -> float:
    """Return the share of the rounds' wall time that was not processor time; 0 where several cores worked."""
    wall, cpu = _median(result, "ms"), _median(result, "cpu_ms")
    return max(0.0, 1 - cpu / wall) if wall and cpu else 0.0


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"
