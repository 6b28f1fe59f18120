"""Start a training from a finished one with the same settings and a shorter schedule."""

from __future__ import annotations

import logging
import math
from contextlib import suppress
from dataclasses import replace

from iwae_cli.core import progress
from iwae_cli.core.errors import UserError
from iwae_cli.data.base import Data
from iwae_cli.record.folder import RunFolder
from iwae_cli.record.identity import changed, sources
from iwae_cli.record.jsonl import JsonlLogger, read_history
from iwae_cli.record.loggers import RunInfo
from iwae_cli.runs.experiment import Experiment
from iwae_cli.training import checkpoint
from iwae_cli.training.steps.choose import should_compile

log = logging.getLogger("iwae_cli")


def extend(experiment: Experiment, data: Data, folder: RunFolder) -> None:
    """Copy the end of the longest such training in ``output_dir`` into the folder of a run that has not begun.

    The run resumes from there and ends in the bits of an uninterrupted one. Where that cannot be, nothing is copied.
    """
    if checkpoint.exists(folder.checkpoint) or folder.result() is not None:
        return
    for passes, shorter in experiment.shorter():
        with suppress(UserError, KeyError):
            if _copy(experiment, data, shorter, passes, folder):
                line = f"starts from pass {passes:,} of {shorter.identity}, whose schedule is the beginning of this one"
                progress.announce(line)
                log.info(line)
                return


def _copy(experiment: Experiment, data: Data, shorter: RunFolder, passes: int, folder: RunFolder) -> bool:
    """Return whether ``shorter`` ended in a state that this training passes through, and was copied."""
    state = checkpoint.load(shorter.checkpoint, shorter.identity)
    model = experiment.model.outline(data.image_shape, data.levels)
    rows, per_pass = min(experiment.batch_size, len(data.train)), math.ceil(len(data.train) / experiment.batch_size)
    total = per_pass * experiment.schedule.passes
    # The last pass is always validated, and the longer training may not do that there: it continues from before it.
    extra = passes % experiment.validation.every != 0
    if (
        not state.step == state.total_steps == passes * per_pass
        or state.bound_sum != 0
        or state.data_sha256 != data.sha256()
        or changed(state.sources, sources(experiment.config))
        or state.compiled != should_compile(model, experiment.objective, experiment.device, total, rows, None)
        or (extra and "row" not in state.before_extra)
    ):
        return False
    history, best, file = read_history(shorter.path, state.step), state.best, shorter.best
    if extra:
        history = [*read_history(shorter.path, state.step - 1), (state.step, state.before_extra["row"])]
        best = state.before_extra["best"]
        file = file if best == state.best else checkpoint.previous(file)
    longer = replace(state, identity=folder.identity, names=experiment.names, total_steps=total)
    longer.best, longer.before_extra = best, {}
    if best:
        checkpoint.save_best(longer, checkpoint.load_best(file, state)[1], folder.best)
    record = JsonlLogger()
    record.open(RunInfo(folder.path, folder.identity, experiment.config, experiment.group, []), history)
    record.close("interrupted")
    # Last of all: until then the run has not begun.
    checkpoint.save(longer, folder.checkpoint)
    return True
