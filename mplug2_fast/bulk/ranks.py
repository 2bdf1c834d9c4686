"""Several programs that work on one run, as torchrun starts them: who each is, and how they wait for one another."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from mplug2_fast.errors import ConfigError, MPlug2Error

if TYPE_CHECKING:
    from typing_extensions import Self

_T = TypeVar("_T")

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

# Ranks wait for the slowest of them at the end. One that dies is torchrun's to notice, which ends the others.
_PATIENCE = timedelta(days=30)


class Ranks:
    """The programs of a run; alone, unless torchrun started this one.

    They talk over gloo, on CPUs, and only at the beginning and at the end. To be used in a `with` statement.

    Args:
        environment: where torchrun's variables are.

    Raises:
        ConfigError: some of torchrun's variables are there and others are not, or make no sense.
    """

    def __init__(self, environment: Any = os.environ) -> None:
        given = [name for name in _VARIABLES if name in environment]
        if "RANK" not in environment and "WORLD_SIZE" not in environment:
            self.rank, self.size, self.local_rank = 0, 1, None
            return
        if missing := [name for name in _VARIABLES if name not in given]:
            raise ConfigError(f"{', '.join(missing)}: not set, while {', '.join(given)} are: start it with torchrun")
        try:
            self.rank, self.size, self.local_rank = (int(environment[name]) for name in _VARIABLES[:3])
        except ValueError as error:
            raise ConfigError(f"{', '.join(_VARIABLES[:3])} must be numbers, as torchrun sets them: {error}") from error

    def __enter__(self) -> Self:
        if self.size > 1:
            with _talking() as distributed:
                distributed.init_process_group("gloo", rank=self.rank, world_size=self.size, timeout=_PATIENCE)
        return self

    def __exit__(self, *_: object) -> None:
        if self.size > 1:
            import torch.distributed

            torch.distributed.destroy_process_group()

    def device(self, device: str) -> str:
        """The device of a name, "auto" being this program's own GPU where there are any."""
        if device != "auto" or self.local_rank is None:
            return device
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return f"cuda:{self.local_rank % count}" if count else "cpu"

    def first_makes(self, make: Callable[[], _T]) -> _T:
        """What `make` gives to the first of the programs, in all of them; an `MPlug2Error` there is one everywhere."""
        if self.size == 1:
            return make()
        made: list[Any] = [None, None]
        if self.rank == 0:
            try:
                made[0] = make()
            except MPlug2Error as error:
                made[1] = error
        with _talking() as distributed:
            distributed.broadcast_object_list(made, src=0)
        if made[1] is not None:
            raise made[1]
        return made[0]

    def gather(self, value: _T) -> list[_T]:
        """The values of all programs, once each has one."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _talking() as distributed:
            distributed.all_gather_object(values, value)
        return values


@contextmanager
def _talking() -> Iterator[Any]:
    """torch.distributed; what it raises when another program is gone becomes one line."""
    import torch.distributed

    try:
        yield torch.distributed
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise MPlug2Error(
            f"another program of this run is gone ({reason}): the same command, started again, goes on"
        ) from error
