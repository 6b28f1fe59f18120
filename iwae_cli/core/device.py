"""Device, precision, threads, and the errors of missing hardware or memory."""

from __future__ import annotations

import functools
import os
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, final

import torch

from iwae_cli.core.errors import RunFailed, UserError, check_range, one_line, warn_once

Kind = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["float32", "float64"]
Compile = Literal["auto", "on", "off"]
MAX_THREADS = 1024
"""More than any machine has cores for; operating systems limit the threads of a process."""


@final
@dataclass
class Device:
    """A choice of device; ``resolve`` looks for it, so that a configuration can be read on any machine.

    ``kind=auto`` is never mps, which has not been tested. ``precision`` is that of the weights and the training;
    evaluation always sums in float64. The last bits of sums depend on ``threads``. ``compile=auto`` compiles the
    training step on the CPU, where there is a C++ compiler and the planned training is long enough to gain from it.

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
        found, fault = available(), gpu_fault() if self.kind in ("auto", "cuda") else None
        kind = self.kind if self.kind != "auto" else "cuda" if "cuda" in found and fault is None else "cpu"
        if fault is not None and kind == "cuda":
            raise UserError(f"device=cuda: the GPU cannot run ({fault}): install the torch for it, or write device=cpu")
        if fault is not None and self.kind == "auto":
            warn_once(f"device=auto takes the processor, since the GPU cannot run: {fault}")
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
    """Convert out-of-memory errors, and those of a GPU that cannot run, into RunFailed."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if fault := re.search(
            r"no kernel image|devices? (is|are|\(s\)).* busy|driver version is insufficient", str(error)
        ):
            raise RunFailed(
                f"the GPU cannot run ({fault[0]}): write device=cpu, or install the torch for it"
            ) from error
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gpu_fault has them
        kinds = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [kind for kind, found in kinds.items() if found]


def gpu_fault() -> str | None:
    """Return why an NVIDIA GPU that is there cannot run: a driver too old, a torch without code for it; None if it can.

    No context is created on the GPU: the process that starts a sweep does not compute.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if not torch.cuda.is_available():
            drivers = [str(warning.message) for warning in caught if "driver" in str(warning.message)]
            return one_line(drivers[0].partition(". ")[0]) if drivers else None
    if torch.version.cuda is None:
        return None  # ROCm
    major, minor = torch.cuda.get_device_capability()
    for name in torch.cuda.get_arch_list():
        code = re.match(r"(sm|compute)_(\d+)(\d)", name)
        version = (int(code[2]), int(code[3])) if code else (0, 0)
        if code and version <= (major, minor) and (code[1] == "compute" or version[0] == major):
            return None
    return f"torch {torch.__version__} has no code for its architecture, sm_{major}{minor}"


def has_bf16() -> bool:
    """Return whether the processor multiplies bfloat16 numbers, rather than emulating that."""
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 lacks it
    return not capabilities or any(there for name, there in capabilities.items() if "bf16" in name)
