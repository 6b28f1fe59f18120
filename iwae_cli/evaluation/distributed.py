"""One run shared by several processes (``torchrun``): rank 0 does all of it, the others help it with what is long.

Rank 0 alone writes and speaks. Whenever it has batches of images to evaluate, it sends the work to all ranks; each does
every n-th batch whole, and the results come back in the order of the images, so that one process or eight give the same
numbers bit for bit. Where it pays they also train together, each on its share of every minibatch. What is exchanged is
a model, gradients, and a few float64 numbers an image, in the memory of the CPU: gloo serves for GPUs as well, of which
each rank sees one.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, final

from iwae_cli.core.errors import RunFailed

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
Work = Callable[[Sequence[int]], T]
Serial = Callable[[Work[Any], list[range], int], list[Any]]
Task = Callable[["Ranks"], object]
"""What rank 0 sends for the others to do."""


@final
class Ranks:
    """The processes that share a run, this one among them.

    To be made before torch looks for GPUs: afterwards this process sees one of them.

    Args:
        serial: does batches of an evaluation by this process alone.
    """

    def __init__(self, serial: Serial) -> None:
        self._serial = serial
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._here = int(os.environ["LOCAL_WORLD_SIZE"])
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = [str(gpu) for gpu in range(self._here)] if visible is None else visible.split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[int(os.environ["LOCAL_RANK"]) % len(gpus)]

        import torch.distributed as dist

        # The others wait as long as rank 0 does what cannot be shared.
        dist.init_process_group("gloo", timeout=timedelta(days=365))

    def share(self, work: Work[T], batches: list[range], workers: int, serial: Serial) -> list[T]:
        """The results of ``work`` on all ``batches``, in their order; called by rank 0, the others are in ``help``.

        Args:
            work: what to do with one batch.
            batches: all of them.
            workers: threads on this machine; its ranks share them.
            serial: does the batches of this rank.

        Raises:
            RunFailed: one of the others is gone.
        """
        self.ask(lambda ranks: ranks._together(work, batches, workers, ranks._serial))
        return self._together(work, batches, workers, serial)

    def ask(self, task: Task) -> None:
        """Have the others do this; called by rank 0, which then does its part."""
        import cloudpickle

        self._broadcast(cloudpickle.dumps(task))

    def help(self) -> None:
        """Do all that rank 0 asks for, until it is done or gone."""
        for number in (signal.SIGINT, signal.SIGTERM):
            # torchrun tells all ranks; rank 0 decides what becomes of the run, and there is nothing here to be saved.
            signal.signal(number, signal.SIG_IGN)
        # Where rank 0 has ended, its connection has.
        with suppress(RunFailed):
            self.attend()

    def attend(self) -> None:
        """Do all that rank 0 asks for, until it calls ``dismiss``.

        Raises:
            RunFailed: it is gone.
        """
        import cloudpickle

        while (message := self._broadcast(None)) is not None:
            cloudpickle.loads(message)(self)

    def dismiss(self) -> None:
        """The others may go on with what they did before they came to ``attend``."""
        self._broadcast(None)

    def sum(self, tensor: Tensor) -> None:
        """Over all ranks, in place: the same bits on each.

        Raises:
            RunFailed: one of them is gone.
        """
        import torch.distributed as dist

        here = tensor.cpu()
        with _all_there():
            dist.all_reduce(here)
        tensor.copy_(here)

    def _together(self, work: Work[T], batches: list[range], workers: int, serial: Serial) -> list[T]:
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        mine = serial(work, batches[self.rank :: self.size], max(1, workers // self._here))
        with _all_there():
            dist.all_gather_object(found, mine)
        return [found[number % self.size][number // self.size] for number in range(len(batches))]

    def _broadcast(self, message: bytes | None) -> bytes | None:
        import torch.distributed as dist

        box = [message]
        with _all_there():
            dist.broadcast_object_list(box, src=0)
        return box[0]


@contextmanager
def _all_there() -> Iterator[None]:
    """Meanwhile, a process that is gone is told in one line."""
    try:
        yield
    except RuntimeError as error:
        raise RunFailed(
            "another process of torchrun has ended; the same command goes on from the last saved step"
        ) from error


def are_several() -> bool:
    """Whether torchrun has started this process as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def leave(code: int) -> NoReturn:
    """End this process, one of several, at once: everything is written and flushed.

    gloo's threads let go of their last exchange in their own time. Where that comes while the process group is taken
    apart, or Python, the process aborts, about once in ten runs on a busy machine.
    """
    os._exit(code)
