"""One run shared by several processes (``torchrun``): rank 0 does all of it but shares its evaluations with the others.

Rank 0 alone trains, writes and prints. Whenever it has batches of images to evaluate, it sends the work to all ranks;
each computes every n-th batch whole, and the results come back in the order of the images, so that any number of
processes gives the same numbers bit for bit. Only a model and a few float64 numbers for each image are exchanged, in
the memory of the CPU: gloo serves for GPUs as well, of which each rank sees one.
"""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn, TypeVar, final

from iwae_cli.core.errors import Interrupted, RunFailed

T = TypeVar("T")
Work = Callable[[Sequence[int]], T]
OnProgress = Callable[[int], None] | None
Serial = Callable[[Work[Any], list[range], int, OnProgress], list[Any]]


@final
class Ranks:
    """The processes that share a run, this one among them; ``serial`` computes batches by this process alone.

    Create it before torch looks for GPUs: afterwards this process sees one of them.
    """

    def __init__(self, serial: Serial) -> None:
        self._serial = serial
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._local_size = int(os.environ["LOCAL_WORLD_SIZE"])
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = [str(gpu) for gpu in range(self._local_size)] if visible is None else visible.split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[int(os.environ["LOCAL_RANK"]) % len(gpus)]

        import torch.distributed as dist

        # The others wait while rank 0 trains.
        dist.init_process_group("gloo", timeout=timedelta(days=365))

    def share(self, work: Work[T], batches: list[range], workers: int, on_progress: OnProgress = None) -> list[T]:
        """Return the results of ``work`` on all ``batches``, in their order; rank 0 calls it, the others ``serve``.

        ``workers`` threads are divided among the ranks of this machine; ``on_progress`` counts this rank's batches.

        Raises:
            RunFailed: another rank has ended.
            Exception: what ``work`` raised on some rank.
        """
        import cloudpickle

        self._broadcast_task(cloudpickle.dumps((work, batches, workers)))
        return self._gathered(work, batches, workers, on_progress)

    def serve(self) -> None:
        """Compute what rank 0 shares, until it calls ``release`` or has ended."""
        import cloudpickle

        for number in (signal.SIGINT, signal.SIGTERM):
            # torchrun signals all ranks; rank 0 decides how the run ends, and this rank has nothing to save.
            signal.signal(number, signal.SIG_IGN)
        # When rank 0 ends, its connection breaks.
        with suppress(RunFailed):
            while (task := self._broadcast_task(None)) is not None:
                work, batches, workers = cloudpickle.loads(task)
                with suppress(Exception):  # rank 0 raises it too, and may go on
                    self._gathered(work, batches, workers)

    def release(self) -> None:
        """Let the other ranks return from ``serve``."""
        self._broadcast_task(None)

    def _gathered(self, work: Work[T], batches: list[range], workers: int, on_progress: OnProgress = None) -> list[T]:
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        mine, failed = [], None
        try:
            mine = self._serial(work, batches[self.rank :: self.size], max(1, workers // self._local_size), on_progress)
        except Interrupted:
            raise  # rank 0 leaves, and the others with it
        except Exception as error:
            failed = _portable(error)
        with _broken_connection_as_run_failed():
            dist.all_gather_object(found, (mine, failed))
        for _, raised in found:
            if raised is not None:
                # On every rank: one that went on alone would wait for the others for ever.
                raise raised
        return [found[number % self.size][0][number // self.size] for number in range(len(batches))]

    def _broadcast_task(self, task: bytes | None) -> bytes | None:
        import torch.distributed as dist

        box = [task]
        with _broken_connection_as_run_failed():
            dist.broadcast_object_list(box, src=0)
        return box[0]


def _portable(error: Exception) -> Exception:
    """Return the error, or one with its text where it cannot be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


@contextmanager
def _broken_connection_as_run_failed() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RunFailed(
            "another process of torchrun has ended; the same command resumes from the last saved step"
        ) from error


def are_several() -> bool:
    """Return whether torchrun started this process as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def leave(code: int) -> NoReturn:
    """Exit at once, without Python's own clean-up, during which gloo's threads abort about one run in ten."""
    os._exit(code)
