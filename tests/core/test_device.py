from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

from iwae_cli.core import device
from iwae_cli.core.device import Device
from iwae_cli.core.errors import RunFailed, UserError, warn_once


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


@pytest.fixture
def gpu(machine, monkeypatch: pytest.MonkeyPatch):
    """Pretend that there is a GPU of an architecture, and a torch with code for others."""

    def have(capability: tuple[int, int], *built: str) -> None:
        machine("cuda")
        monkeypatch.setattr(torch.version, "cuda", "12.8")
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(built))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)

    warn_once.cache_clear()
    return have


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((9, 0), ("sm_80", "sm_90"), True),
        ((9, 0), ("sm_90a",), True),
        ((8, 6), ("sm_80",), True),  # code of the same generation
        ((12, 0), ("sm_90", "compute_90"), True),  # compiled by the driver
        ((6, 1), ("sm_70", "sm_80", "compute_90"), False),
        ((12, 0), ("sm_80", "sm_90"), False),
    ],
)
def test_a_gpu_without_code_for_it_is_refused_or_left_alone(gpu, capability, built, runs, caplog) -> None:
    gpu(capability, *built)
    if runs:
        assert Device("cuda").resolve() == Device("auto").resolve() == torch.device("cuda")
        return
    with pytest.raises(UserError, match=f"device=cuda: .* sm_{capability[0]}{capability[1]}.*device=cpu"):
        Device("cuda").resolve()
    assert [Device("auto").resolve() for _ in range(2)] == [torch.device("cpu")] * 2
    assert len(caplog.records) == 1 and "sm_" in caplog.text


def test_a_driver_that_is_too_old_is_one_line(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    def unavailable() -> bool:
        warnings.warn(
            "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040). Please",
            stacklevel=2,
        )
        return False

    warn_once.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", unavailable)
    with pytest.raises(UserError, match=r"device=cuda: .*driver on your system is too old \(found version 11040\)\):"):
        Device("cuda").resolve()
    assert Device("auto").resolve() == torch.device("cpu") and "too old" in caplog.text


def test_an_error_of_a_gpu_that_cannot_run_is_one_line() -> None:
    with pytest.raises(RunFailed, match=r"no kernel image.*device=cpu"), device.oom_as_run_failed():
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors")


def test_bf16_needs_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    for capabilities, there in (({"avx2": True, "avx512_bf16": False}, False), ({"amx_bf16": True}, True), ({}, True)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert device.has_bf16() == there


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
