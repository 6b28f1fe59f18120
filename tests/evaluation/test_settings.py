"""Settings of an evaluation that are refused by name."""

from __future__ import annotations

import builtins
import io
import os
from typing import Any

import pytest
import torch
from evaluations import evaluation

from iwae_cli.evaluation import workers


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("k", 0),
        ("k", 10**9),
        ("seed", -1),
        ("binarization_seed", -1),
        ("rows", 63),
        ("workers", 0),
        ("splits", []),
        ("splits", ["test", "test"]),
    ],
)
def test_a_wrong_setting_is_refused(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{argument} "):
        evaluation(**{argument: value})


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"/sys/fs/cgroup/cpu.max": "150000 100000"}, 2),
        ({"/sys/fs/cgroup/cpu.max": "max 100000"}, 64),
        ({"/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000", "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 64),
    ],
)
def test_the_quota_of_a_container_bounds_the_workers(
    files: dict[str, str], cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of both versions of cgroups, on a machine of 64 cores."""
    exists, opened = os.path.exists, builtins.open

    def there(path: Any) -> bool:
        return path in files if str(path).startswith("/sys/fs/cgroup") else exists(path)

    monkeypatch.setattr("os.path.exists", there)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(
        "builtins.open", lambda path, *rest: io.StringIO(files[path]) if path in files else opened(path, *rest)
    )
    assert workers.threads(None, torch.device("cpu")) == cores
