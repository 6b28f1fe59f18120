"""Try an optimizer before any work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from iwae_cli.config.build import show
from iwae_cli.core.errors import UserError, one_line


def try_optimizer(cls: Callable[..., Any], arguments: Mapping[str, Any], path: str, on_cpu: bool) -> None:
    """Raise a UserError if an optimizer of two small parameters on the processor refuses to take a step.

    Where the run does not use it ``on_cpu``, what ``capturable`` requires of the device is ignored.
    """

    def refusal(kept: Mapping[str, Any]) -> str | None:
        try:
            # A matrix and a vector, since some optimizers take only one of them.
            tried = [torch.nn.Parameter(torch.zeros(1, 1)), torch.nn.Parameter(torch.zeros(1))]
            optimizer = cls(tried, **kept)
            for parameter in tried:
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
        except (ValueError, TypeError, RuntimeError, AssertionError) as error:
            of_the_device = isinstance(error, AssertionError) and "capturable" in str(error)
            return None if of_the_device and not on_cpu else one_line(error)
        except OSError as error:
            # The first optimizer imports torch's compiler, which makes its folder.
            raise UserError(
                f"torch cannot make the folder {error.filename} for compiled code ({error.strerror}): "
                "set TORCHINDUCTOR_CACHE_DIR to one that can be written to"
            ) from error
        return None

    message = refusal(arguments)
    if message is not None:
        # torch names the quantity ("learning rate"), not the key: the key is the one whose default would do.
        guilty = [key for key in arguments if refusal({k: v for k, v in arguments.items() if k != key}) is None]
        where = f"{path}.{guilty[0]}={show(arguments[guilty[0]])}" if guilty else path
        raise UserError(f"{where} is refused by {cls.__name__}: {message}")
