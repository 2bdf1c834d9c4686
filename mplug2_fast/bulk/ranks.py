"""Several programs that share one run, as torchrun starts them: their ranks, and how they synchronise."""

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

# At the end all ranks wait for the slowest one. If a rank dies, torchrun ends the others.
_PATIENCE = timedelta(days=30)
# At the start the other ranks appear soon, or never.
_START_PATIENCE = timedelta(minutes=10)


class Ranks:
    """The programs that share a run: several if torchrun started this one, otherwise only this one.

    They communicate through gloo, on CPUs, and only at the start and at the end. Use it in a `with` statement.

    Args:
        environment: has torchrun's variables.

    Raises:
        ConfigError: some of torchrun's variables are missing or invalid.
    """

    def __init__(self, environment: Any = os.environ) -> None:
        given = [name for name in _VARIABLES if name in environment]
        self.local_size = _number(environment, "LOCAL_WORLD_SIZE", 1) if "LOCAL_WORLD_SIZE" in environment else 1
        """The number of programs on this machine."""
        if "RANK" not in environment and "WORLD_SIZE" not in environment:
            self.rank, self.size, self.local_rank = 0, 1, None
            return
        if missing := [name for name in _VARIABLES if name not in given]:
            raise ConfigError(f"{', '.join(missing)}: not set, although {', '.join(given)} are set: use torchrun")
        self.size = _number(environment, "WORLD_SIZE", 1)
        self.rank = _number(environment, "RANK", 0, self.size - 1)
        self.local_rank = _number(environment, "LOCAL_RANK", 0)
        _number(environment, "MASTER_PORT", 0, 65535)

    def __enter__(self) -> Self:
        if self.size > 1:
            with _talking("the programs of this run cannot connect to one another") as distributed:
                options = {"rank": self.rank, "world_size": self.size}
                distributed.init_process_group("gloo", timeout=_START_PATIENCE, **options)
                self._group = distributed.new_group(backend="gloo", timeout=_PATIENCE)
        return self

    def __exit__(self, *_: object) -> None:
        if self.size > 1:
            import torch.distributed

            torch.distributed.destroy_process_group()

    def device(self, device: str) -> str:
        """The device to use. "auto" is this program's own GPU, or the CPU without a GPU."""
        if device != "auto" or self.local_rank is None:
            return device
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return f"cuda:{self.local_rank % count}" if count else "cpu"

    def first_makes(self, make: Callable[[], _T]) -> _T:
        """Calls `make` in the first program. All programs return its result, or raise its `MPlug2Error`."""
        if self.size == 1:
            return make()
        made: list[Any] = [None, None]
        if self.rank == 0:
            try:
                made[0] = make()
            except MPlug2Error as error:
                made[1] = error
        with _talking() as distributed:
            distributed.broadcast_object_list(made, src=0, group=self._group)
        if made[1] is not None:
            raise made[1]
        return made[0]

    def gather(self, value: _T) -> list[_T]:
        """The values of all programs. Waits until all have called it."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _talking() as distributed:
            distributed.all_gather_object(values, value, group=self._group)
        return values


def _number(environment: Any, name: str, least: int, most: int | None = None) -> int:
    """Reads a number from one of torchrun's variables. Raises `ConfigError`."""
    text = environment[name]
    allowed = f"at least {least}" if most is None else f"from {least} to {most}"
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least or (most is not None and number > most):
        raise ConfigError(
            f"{name} must be a number, {allowed}, not {text!r}: correct it, or unset torchrun's variables"
        )
    return number


@contextmanager
def _talking(problem: str = "another program of this run ended") -> Iterator[Any]:
    """Yields torch.distributed. Its errors become one-line `MPlug2Error`s."""
    import torch.distributed

    try:
        yield torch.distributed
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise MPlug2Error(f"{problem} ({reason}): rerun the same command to resume") from error
