from __future__ import annotations

import csv
import json
import logging
import os
import threading
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
from small_runs import TINY, finished, read_json, run, run_folders, snapshot

from iwae_cli.core.errors import Interrupted, UserError
from iwae_cli.record.jsonl import JsonlLogger, read_history
from iwae_cli.record.loggers import FanOut, Logger, Metrics, RunInfo, Status


def info(folder: Path) -> RunInfo:
    return RunInfo(folder=folder, identity="digits-iwae", config={})


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rows_are_on_disk_at_once_and_the_table_at_the_end(tmp_path: Path) -> None:
    logger = JsonlLogger()
    logger.open(info(tmp_path), [])
    logger.log(1, {"train/bound": -1 / 3})
    logger.log(2, {"train/bound": -0.1, "validation/bound": None, "validation/k": 50})
    assert rows(tmp_path) == [
        {"step": 1, "train/bound": -1 / 3},
        {"step": 2, "train/bound": -0.1, "validation/bound": None, "validation/k": 50},
    ]
    logger.close("finished")
    with (tmp_path / "metrics.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["step", "train/bound", "validation/bound", "validation/k"],
            ["1", repr(-1 / 3), "", ""],
            ["2", "-0.1", "", "50"],
        ]


@pytest.mark.parametrize(
    "row",
    [
        *("x", "[]", "{}", "\udcff", '{"step": 2, "a"', '{"step": "2"}', '{"step": 2.5}', '{"step": 2, "a": "x"}'),
        *('{"step": 2, "a": NaN}', '{"step": 2, "a": true}', '{"step": 2, "a": [1]}'),
    ],
)
def test_a_row_that_is_none_is_named_with_what_to_do(tmp_path: Path, row: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{row}\n', errors="surrogateescape")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: "):
        read_history(tmp_path, up_to_step=5)


def test_a_row_is_on_the_disk_before_a_checkpoint_can_speak_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bytes] = []
    sync = os.fsync

    def noted(descriptor: int) -> None:
        sync(descriptor)
        synced.append((tmp_path / "metrics.jsonl").read_bytes())

    logger = JsonlLogger()
    logger.open(info(tmp_path), [])
    monkeypatch.setattr("os.fsync", noted)
    logger.log(1, {"a": 1})
    assert synced == [b'{"step": 1, "a": 1}\n']
    logger.close("failed")


@pytest.mark.parametrize("metrics", [{"a": float("nan")}, {"a": float("inf")}, {"step": 3}])
def test_what_cannot_be_kept_is_an_error_and_not_half_a_row(tmp_path: Path, metrics: Metrics) -> None:
    logger = JsonlLogger()
    logger.open(info(tmp_path), [])
    with pytest.raises(ValueError, match=r"a must be finite or null|'step'"):
        logger.log(1, metrics)
    logger.close("failed")
    assert rows(tmp_path) == []


FAULTY = """
import time
from iwae_cli.record.loggers import Logger

class Faulty(Logger):
    def open(self, run, history):
        pass

    def log(self, step, metrics):
        {fault}

    def close(self, status):
        pass
"""


@pytest.mark.parametrize(("name", "fault"), [("raises", "raise OSError('no luck')"), ("hangs", "time.sleep(60)")])
def test_a_logger_that_raises_or_hangs_leaves_the_run_as_it_is(
    tmp_path: Path, name: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "conf" / "logger").mkdir(parents=True)
    (tmp_path / "conf" / "logger" / "faulty.yaml").write_text(f"faulty: {{_target_: {name}.Faulty}}\n")
    (tmp_path / f"{name}.py").write_text(FAULTY.format(fault=fault))
    monkeypatch.setattr("iwae_cli.record.loggers.CLOSE_SECONDS", 0.1)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("IWAE_ALLOW_TARGETS", name)
    code, _, err = run(*TINY, "schedule.passes=1", "--config-dir=conf", "logger=faulty", f"output_dir={tmp_path / 'c'}")
    (folder,) = run_folders(tmp_path / "c")
    assert (code, read_json(folder / "status.json")["status"]) == (0, "finished")
    assert len(rows(folder)) == 1 and err.count("Faulty ") == 1


class Broken(Logger):
    """Raises ``error`` in the method ``where``."""

    def __init__(self, where: str, error: Exception | None = None) -> None:
        self.where = where
        self.error = error or RuntimeError("no luck")
        self.calls: list[str] = []

    def _call(self, name: str, *_: Any) -> None:
        self.calls.append(name)
        if name == self.where:
            raise self.error

    open = partialmethod(_call, "open")
    log = partialmethod(_call, "log")
    image = partialmethod(_call, "image")
    histogram = partialmethod(_call, "histogram")
    summary = partialmethod(_call, "summary")

    def close(self, status: Status) -> None:
        self.status = status
        self._call("close")


class Essential(Broken):
    essential = True


def use(logger: Logger, folder: Path) -> None:
    logger.open(info(folder), [])
    for step in (1, 2):
        logger.log(step, {"a": 1})
    logger.image(2, "samples", folder / "samples.png")
    logger.histogram(2, "log_w", [1.0])
    logger.summary({"nll": 1.0})
    logger.close("finished")


CALLS = ["open", "log", "log", "image", "histogram", "summary", "close"]


@pytest.mark.parametrize("where", sorted(set(CALLS)))
def test_one_failing_logger_stops_neither_the_others_nor_the_run(
    tmp_path: Path, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    broken, other = Broken(where), Broken("nowhere")
    with caplog.at_level(logging.WARNING, "iwae_cli"):
        use(FanOut([broken, other, JsonlLogger()]), tmp_path)
    assert other.calls == CALLS
    assert broken.calls == [*CALLS[: CALLS.index(where) + 1], *(["close"] if where != "close" else [])]
    assert rows(tmp_path) == [{"step": 1, "a": 1}, {"step": 2, "a": 1}]
    assert (tmp_path / "metrics.csv").exists()
    (warning,) = (record.getMessage() for record in caplog.records)
    assert "Broken" in warning and warning.endswith("RuntimeError: no luck")


def test_only_the_end_waits_for_a_slow_logger(tmp_path: Path) -> None:
    may_open = threading.Event()

    class Slow(Broken):
        def open(self, *_: Any) -> None:
            assert may_open.wait(60)
            super().open()

        def log(self, step: int, metrics: Metrics) -> None:
            super().log()
            assert metrics == {"a": 1}

    slow = Slow("nowhere")
    both = FanOut([slow])
    row = {"a": 1}
    both.open(info(tmp_path), [])
    both.log(1, row)
    row["a"] = 2
    assert slow.calls == []
    may_open.set()
    both.close("finished")
    assert slow.calls == ["open", "log", "close"]


@pytest.mark.parametrize("where", sorted(set(CALLS)))
@pytest.mark.parametrize("error", [RuntimeError("no luck"), Interrupted(15)])
def test_the_failure_of_the_essential_record_is_the_failure_of_the_run(
    tmp_path: Path, where: str, error: Exception
) -> None:
    other = Broken("nowhere")
    both = FanOut([other, Essential(where, error)])
    with pytest.raises(type(error)):
        use(both, tmp_path)
    if where != "close":
        both.close("failed")
    # Where the local record could not be written, no other logger may claim to have it.
    assert other.calls == [*CALLS[: CALLS.index(where)], "close"] and other.status != "finished"


def test_tensorboard_beside_another_logger(tmp_path: Path) -> None:
    """Read back by TensorBoard's own reader, after a finished run and after another evaluation of it."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = finished(tmp_path, *TINY, "logger=[offline,tensorboard]")
    assert len(list((folder / "wandb").glob("offline-run-*"))) == 1
    code, _, err = run(*TINY, "logger=tensorboard", "evaluation.k=60", f"output_dir={tmp_path}")
    assert code == 0, err
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    curve = [(event.step, event.value) for event in events.Scalars("train/bound")]
    assert curve == [(row["step"], pytest.approx(row["train/bound"])) for row in rows(folder)], "each row once"
    (nll,) = events.Scalars("test/nll")
    assert nll.value == pytest.approx(read_json(folder / "result.json")["test"]["nll"]) and nll.step == 26
    tags = events.Tags()
    assert set(tags["images"]) == {f"figures/{path.stem}" for path in folder.glob("figures/*.png")}
    assert tags["histograms"] == ["log_w minus its mean"] and {"step", "pass"}.isdisjoint(tags["scalars"])
    assert set(tags["tensors"]) == {"config/text_summary", "bounds/text_summary"}

    before = snapshot(folder)
    assert run(*TINY, "logger=tensorboard", "evaluation.k=60", f"output_dir={tmp_path}")[0] == 0
    assert snapshot(folder) == before, "recorded once"
    for path in folder.glob("tensorboard/*"):
        path.unlink()
    assert run(*TINY, "logger=tensorboard", "evaluation.k=60", f"output_dir={tmp_path}")[0] == 0
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/bound")] == curve


def test_a_missing_tensorboard_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iwae_cli.record.tensorboard.find_spec", lambda name: None)
    code, _, err = run(*TINY, "logger=tensorboard", f"output_dir={tmp_path / 'out'}")
    assert code == 2 and err.count("\n") == 1 and "pip install 'iwae-cli[tensorboard]'" in err
    assert not (tmp_path / "out").exists()
