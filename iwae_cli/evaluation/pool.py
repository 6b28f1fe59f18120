"""Work over batches of images, shared by threads, gathered in the order of the images."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker() -> None:
    # Both are per thread. One intra-op thread each: products this small lose by being split.
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def map_batches(
    work: Callable[[Sequence[int]], T],
    n: int,
    *,
    batch: int,
    workers: int,
    on_progress: Callable[[int], None] | None = None,
) -> list[T]:
    """``work(indices)`` for consecutive batches of ``n`` images; results in the order of the batches.

    Every batch is computed whole by one worker with one intra-op thread, so that the results do not depend on
    the number of workers.

    Args:
        work: takes the image indices of one batch; called without gradients.
        n: number of images.
        batch: images per call.
        workers: threads.
        on_progress: called in the calling thread with the number of images done; may raise to stop.
    """

    def run(indices: Sequence[int]) -> T:
        with torch.inference_mode():
            return work(indices)

    batches = [range(start, min(start + batch, n)) for start in range(0, n, batch)]
    pool = ThreadPoolExecutor(workers, thread_name_prefix="evaluation", initializer=_start_worker)
    try:
        results = []
        for future in [pool.submit(run, indices) for indices in batches]:
            results.append(future.result())
            if on_progress is not None:
                on_progress(min(n, batch * len(results)))
        return results
    finally:
        pool.shutdown(cancel_futures=True)
