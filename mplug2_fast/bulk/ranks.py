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
# At the beginning the others come soon, or never.
_START_PATIENCE = timedelta(minutes=10)


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
        self.local_size = _number(environment, "LOCAL_WORLD_SIZE", 1) if "LOCAL_WORLD_SIZE" in environment else 1
        """How many of the programs are on this machine."""
        if "RANK" not in environment and "WORLD_SIZE" not in environment:
            self.rank, self.size, self.local_rank = 0, 1, None
            return
        if missing := [name for name in _VARIABLES if name not in given]:
            raise ConfigError(f"{', '.join(missing)}: not set, while {', '.join(given)} are: start it with torchrun")
        self.size = _number(environment, "WORLD_SIZE", 1)
        self.rank = _number(environment, "RANK", 0, self.size - 1)
        self.local_rank = _number(environment, "LOCAL_RANK", 0)
        _number(environment, "MASTER_PORT", 0, 65535)

    def __enter__(self) -> Self:
        if self.size > 1:
            with _talking("the programs of this run do not find one another") as distributed:
                options = {"rank": self.rank, "world_size": self.size}
                distributed.init_process_group("gloo", timeout=_START_PATIENCE, **options)
                self._group = distributed.new_group(backend="gloo", timeout=_PATIENCE)
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
            distributed.broadcast_object_list(made, src=0, group=self._group)
        if made[1] is not None:
            raise made[1]
        return made[0]

    def gather(self, value: _T) -> list[_T]:
        """The values of all programs, once each has one."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _talking() as distributed:
            distributed.all_gather_object(values, value, group=self._group)
        return values


def _number(environment: Any, name: str, least: int, most: int | None = None) -> int:
    """The number in one of torchrun's variables. Raises `ConfigError`."""
    text = environment[name]
    allowed = f"at least {least}" if most is None else f"from {least} to {most}"
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least or (most is not None and number > most):
        raise ConfigError(f"{name} must be a number, {allowed}, as torchrun sets it, not {text!r}: correct or unset it")
    return number


@contextmanager
def _talking(problem: str = "another program of this run is gone") -> Iterator[Any]:
    """torch.distributed; what it raises when there is a problem with another program becomes one line."""
    import torch.distributed

    try:
        yield torch.distributed
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise MPlug2Error(f"{problem} ({reason}): the same command, started again, goes on") from error
