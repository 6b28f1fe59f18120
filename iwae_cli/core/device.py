"""Device, precision, threads, and the errors of missing hardware or memory."""

from __future__ import annotations

import functools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, final

import torch

from iwae_cli.core.errors import RunFailed, UserError, check_range

Kind = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["float32", "float64"]
Compile = Literal["auto", "on", "off"]
MAX_THREADS = 1024
"""More than any machine has cores for; operating systems limit the threads of a process."""


@final
@dataclass
class Device:
    """A choice of device; ``resolve`` looks for it, so that a configuration can be read on any machine.

    Args:
        kind: ``auto`` is cuda where available, else cpu; never mps, which has not been tested.
        precision: of the weights and the training; evaluation always sums in float64.
        threads: intra-op threads. One is fastest for networks of this size, and the last bits of sums depend on it.
        compile: whether to compile the training step into one graph. ``auto``: on the CPU, where there is a C++
            compiler and the planned training is long enough to gain from it.

    Raises:
        ValueError: threads outside 1 to ``MAX_THREADS``, or float64 on mps, which does not support it.
    """

    kind: Kind
    precision: Precision = "float32"
    threads: int = 1
    compile: Compile = "auto"
    _index: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        check_range("threads", self.threads, 1, MAX_THREADS)
        if self.kind == "mps" and self.precision == "float64":
            raise ValueError("precision must be float32 with device=mps, which has no float64")

    def assign_gpu(self, number: int) -> None:
        """Use GPU ``number`` modulo their count, for job ``number`` of several that run at once; no-op without GPUs."""
        count = torch.cuda.device_count()
        self._index = number % count if count else None

    @property
    def dtype(self) -> torch.dtype:
        """``precision`` as a torch dtype."""
        return torch.float64 if self.precision == "float64" else torch.float32

    def resolve(self) -> torch.device:
        """Return the torch device.

        Raises:
            UserError: the requested kind is not available.
        """
        found = available()
        kind = self.kind if self.kind != "auto" else "cuda" if "cuda" in found else "cpu"
        if kind not in found:
            raise UserError(f"device={kind} is not there; this machine has {', '.join(found)}: write device=auto")
        return torch.device(kind, self._index) if kind == "cuda" and self._index is not None else torch.device(kind)

    def setup(self) -> None:
        """Set threads, flushing of denormals and the precision of float32 products, which may change the last bits.

        Flushing is per thread and does not reach threads that exist already, so call this before any work, and in
        every worker process. Repeated calls change nothing.
        """
        torch.set_flush_denormal(True)
        torch.set_num_threads(self.threads)
        torch.set_float32_matmul_precision("highest")
        # "highest" applies to matrix products only: convolutions on a GPU would keep ten bits of each factor.
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True


@contextmanager
def oom_as_run_failed() -> Iterator[None]:
    """Convert out-of-memory errors into RunFailed."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch.OutOfMemoryError exists for GPUs only.
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        size = re.search(r"allocate ([\d.]+ \w+)", str(error))
        raise RunFailed(
            f"memory ran out{f' (in an allocation of {size[1]})' if size else ''}: reduce the sizes of model or data, "
            "batch_size, objective.k or evaluation.rows"
        ) from error


@functools.cache
def compiler() -> str | None:
    """Return the version line of torch's C++ compiler, such as ``g++ (Debian 12.2.0-14) 12.2.0``, or None."""
    command = shlex.split(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))
    try:
        version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, IndexError, subprocess.SubprocessError):
        return None
    return version.partition("\n")[0].strip()


def available() -> list[str]:
    """Return the kinds of device of this machine, best first."""
    kinds = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [kind for kind, found in kinds.items() if found]
