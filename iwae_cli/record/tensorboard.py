"""TensorBoard as a logger."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, final

import numpy as np

from iwae_cli.record.loggers import Logger, Metrics, RunInfo, Status, flat

FILES = "tensorboard/events.out.tfevents.*"


@final
class TensorBoardLogger(Logger):
    """Write the events of a run into ``<run folder>/tensorboard``; after a resume, its whole history again.

    Raises:
        ValueError: TensorBoard is not installed.
    """

    def __init__(self) -> None:
        if find_spec("tensorboard") is None:
            raise ValueError("TensorBoard is not installed: pip install 'iwae-cli[tensorboard]'")
        self._writer: Any = None
        self._step = 0

    def open(self, run: RunInfo, history: Sequence[tuple[int, Metrics]]) -> None:
        """Replace the events of the run by ``history``."""
        from torch.utils.tensorboard import SummaryWriter

        for former in run.folder.glob(FILES):
            former.unlink()
        self._writer = SummaryWriter(str(run.folder / "tensorboard"))
        self._writer.add_text("config", f"```\n{json.dumps(run.config, indent=2)}\n```")
        for step, metrics in history:
            self.log(step, metrics)

    def log(self, step: int, metrics: Metrics) -> None:
        self._step = step
        self.summary({name: value for name, value in metrics.items() if name != "pass"})

    def image(self, step: int, name: str, path: Path) -> None:
        from PIL import Image

        with Image.open(path) as picture:
            self._writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        """Record a histogram of the finite ``values``."""
        if finite := [value for value in map(float, values) if math.isfinite(value)]:
            self._writer.add_histogram(name, np.array(finite), step)

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        lines = [columns, ["---"] * len(columns), *rows]
        self._writer.add_text(name, "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines), step)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Record the final numbers at the last step."""
        for name, value in flat(values).items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, self._step)

    def close(self, status: Status) -> None:
        if self._writer is not None:
            self._writer.close()

    def recorded(self, run: RunInfo) -> bool:
        """Return whether the events of the run are newer than its result."""
        written = [path.stat().st_mtime for path in run.folder.glob(FILES)]
        return max(written, default=0) >= (run.folder / "result.json").stat().st_mtime
