"""Where the numbers are computed: device, precision, threads."""

from __future__ import annotations

import functools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, final, get_args

import torch

from iwae_cli.core.errors import RunFailed, UserError

Kind = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["float32", "float64"]
Compile = Literal["auto", "on", "off"]
MAX_THREADS = 1024
"""More than any machine has cores for; a process may not have many more."""


@final
class Device:
    """A choice of device; it is looked for by ``resolve``, not here, so that a config reads the same everywhere.

    Args:
        kind: ``auto`` takes cuda where it is, else cpu; mps only by name, since nothing has been tested there.
        precision: of the weights and the training; evaluation sums in float64 whatever this is.
        threads: intra-op threads. One is best for networks of this size, and sums differ in their last bits
            between numbers of threads.
        compile: whether a training step becomes one compiled graph. ``auto``: on the processor, where there is a C++
            compiler and the whole planned training is long enough to gain by it.

    Raises:
        ValueError: unknown choice, threads outside 1 to ``MAX_THREADS``, float64 on mps (which has none).
    """

    def __init__(
        self, kind: Kind, precision: Precision = "float32", threads: int = 1, compile: Compile = "auto"
    ) -> None:
        if kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
        if precision not in get_args(Precision):
            raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, got {precision!r}")
        if threads < 1:
            raise ValueError(f"threads must be >= 1, got {threads}")
        if threads > MAX_THREADS:
            raise ValueError(f"threads must be <= {MAX_THREADS}, got {threads}")
        if compile not in get_args(Compile):
            raise ValueError(f"compile must be one of {', '.join(get_args(Compile))}, got {compile!r}")
        if kind == "mps" and precision == "float64":
            raise ValueError("precision must be float32 with device=mps, which has no float64")
        self.kind: Kind = kind
        self.precision: Precision = precision
        self.threads = threads
        self.compile: Compile = compile
        self._index: int | None = None

    def assign_gpu(self, number: int) -> None:
        """One of several jobs side by side, the ``number``-th: take a GPU in turn, where there are some."""
        count = torch.cuda.device_count()
        self._index = number % count if count else None

    @property
    def dtype(self) -> torch.dtype:
        """``precision`` as torch names it."""
        return torch.float64 if self.precision == "float64" else torch.float32

    def resolve(self) -> torch.device:
        """The device itself.

        Raises:
            UserError: the kind that was asked for is not there.
        """
        there = available()
        kind = self.kind
        if kind == "auto":
            kind = "cuda" if "cuda" in there else "cpu"
        if kind not in there:
            raise UserError(f"device={self.kind} is not there; this machine has {', '.join(there)}: write device=auto")
        return torch.device(kind, self._index) if kind == "cuda" and self._index is not None else torch.device(kind)

    def setup(self) -> None:
        """Set what may change the last bits: threads, flushing of denormals, float32 products and convolutions.

        Flushing is per thread and is inherited by no thread that exists already, so this comes before any
        work, and each worker process calls it too. Calling it again changes nothing.
        """
        torch.set_flush_denormal(True)
        torch.set_num_threads(self.threads)
        torch.set_float32_matmul_precision("highest")
        # "highest" is about products of matrices alone: convolutions on a GPU would keep ten bits of each factor.
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True


@contextmanager
def oom_as_run_failed() -> Iterator[None]:
    """Meanwhile, memory that runs out is told in one line.

    Raises:
        RunFailed: it ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch has an error of its own for GPUs alone.
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        size = re.search(r"allocate ([\d.]+ \w+)", str(error))
        raise RunFailed(
            f"memory ran out{f' ({size[1]} were asked for at once)' if size else ''}: smaller sizes of model or data, "
            "batch_size, objective.k or evaluation.rows take less"
        ) from error


@functools.cache
def compiler() -> str | None:
    """The C++ compiler that torch uses, such as ``g++ (Debian 12.2.0-14) 12.2.0``; None where there is none."""
    command = shlex.split(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))
    try:
        told = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, IndexError, subprocess.SubprocessError):
        return None
    return told.partition("\n")[0].strip()


def available() -> list[str]:
    """The kinds of device of this machine, best first."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [kind for kind, here in there.items() if here]
