"""Map a function over batches of images by threads and processes; results in the order of the images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from iwae_cli.evaluation.distributed import Ranks

T = TypeVar("T")
_ranks: Ranks | None = None
"""Other processes that help this one, where there are any."""


def share_with(ranks: Ranks | None) -> None:
    """From here on, share all work with these processes."""
    global _ranks
    _ranks = ranks


def processes() -> int:
    """Return the number of processes that share the work."""
    return 1 if _ranks is None else _ranks.size


def available_cores() -> int:
    """Return the number of cores that this process may use: its affinity, and the quota of its container (cgroup)."""
    from joblib import cpu_count

    return int(cpu_count())


def threads(asked: int | None, device: torch.device) -> int:
    """Return the number of worker threads: as asked for, or one per core on a CPU and one on another device."""
    if asked is not None:
        return asked
    return available_cores() if device.type == "cpu" else 1


def _start_worker() -> None:
    # Both are per thread. One intra-op thread each: matrix products this small are slower on several.
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def map_batches(
    work: Callable[[Sequence[int]], T],
    n: int,
    batch: int,
    workers: int | None,
    device: torch.device,
    on_progress: Callable[[int], None] | None = None,
) -> list[T]:
    """Return ``work(indices)`` for consecutive batches of ``n`` images, in the order of the batches.

    Every batch is computed by one worker (see ``threads``) with one intra-op thread, so that the results do not depend
    on the number of workers. ``work`` is called without gradients. ``on_progress`` is called in the calling thread with
    the number of finished images, and may raise to stop.
    """
    batches = [range(start, min(start + batch, n)) for start in range(0, n, batch)]
    # The other ranks are assumed to be as far as this one.
    report = on_progress and (lambda done: on_progress(min(n, done * batch * processes())))
    return (map_here if _ranks is None else _ranks.share)(work, batches, threads(workers, device), report)


def map_here(
    work: Callable[[Sequence[int]], T],
    batches: list[range],
    workers: int,
    on_progress: Callable[[int], None] | None = None,
) -> list[T]:
    """``map_batches`` by the threads of this process alone; ``on_progress`` gets the number of finished batches."""

    def run(indices: Sequence[int]) -> T:
        with torch.inference_mode():
            return work(indices)

    pool = ThreadPoolExecutor(workers, thread_name_prefix="evaluation", initializer=_start_worker)
    try:
        results = []
        for future in [pool.submit(run, indices) for indices in batches]:
            results.append(future.result())
            if on_progress is not None:
                on_progress(len(results))
        return results
    finally:
        pool.shutdown(cancel_futures=True)
