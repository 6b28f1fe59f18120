from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from iwae_cli.core import device
from iwae_cli.core.device import Device
from iwae_cli.core.errors import RunFailed, UserError


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Pretend that the machine has the named accelerators."""

    def have(*kinds: str) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in kinds)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in kinds)

    return have


@pytest.mark.parametrize(
    ("kinds", "best"), [((), "cpu"), (("mps",), "cpu"), (("cuda",), "cuda"), (("cuda", "mps"), "cuda")]
)
def test_auto_is_the_best_kind(machine, kinds, best) -> None:
    machine(*kinds)
    assert Device("auto").resolve() == torch.device(best)
    assert Device("cpu").resolve() == torch.device("cpu")
    assert device.available()[-1] == "cpu"


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_a_missing_device_is_refused(machine, kind) -> None:
    machine()
    with pytest.raises(UserError, match=f"device={kind} .*device=auto"):
        Device(kind).resolve()


@pytest.mark.parametrize(
    ("argument", "settings"),
    [("threads", {"kind": "cpu", "threads": 0}), ("precision", {"kind": "mps", "precision": "float64"})],
)
def test_invalid_settings_are_refused(argument, settings) -> None:
    with pytest.raises(ValueError, match=f"^{argument} "):
        Device(**settings)


@pytest.mark.parametrize(
    ("error", "size"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8000 bytes."), "8000 bytes"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has"), "20.00 GiB"),
        (MemoryError("Unable to allocate 7.45 GiB for an array with shape (1,)"), "7.45 GiB"),
        (MemoryError(), None),
    ],
)
def test_out_of_memory_errors_become_one_line(error: Exception, size: str | None) -> None:
    with pytest.raises(RunFailed) as failure, device.oom_as_run_failed():
        raise error
    assert (size or "") in str(failure.value) and "\n" not in str(failure.value)
    with pytest.raises(RunFailed), device.oom_as_run_failed():
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="another"), device.oom_as_run_failed():
        raise RuntimeError("another")


def test_setup_can_be_repeated() -> None:
    # In another process, because the settings belong to the process.
    code = """
import torch
from iwae_cli.core.device import Device
tiny = torch.tensor([1e-39], dtype=torch.float32)
assert (tiny * 0.5).item() != 0, "the test needs a machine with denormals"
for _ in range(2):
    Device("cpu", threads=2).setup()
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.allow_tf32
    flushed = torch.full((100_000,), 1e-39) * 0.5
    print(torch.get_num_threads(), int((flushed != 0).sum()), torch.get_float32_matmul_precision())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["2", "0", "highest"] * 2, done.stderr
