"""Tasks: each is an object with a head, a loss and predictions. `TASKS` has those that come with the package."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path

from mplug2_fast.errors import ConfigError, printable
from mplug2_fast.tasks.base import Alternative, Respond, Task, Texts, best_labels
from mplug2_fast.tasks.captioning import Captioning
from mplug2_fast.tasks.question_answering import AnswerRanking, QuestionAnswering

TASKS: dict[str, Task] = {task.name: task for task in (Captioning(), QuestionAnswering(), AnswerRanking())}
"""Name to task."""

__all__ = [
    "TASKS",
    "Alternative",
    "AnswerRanking",
    "Captioning",
    "QuestionAnswering",
    "Respond",
    "Task",
    "Texts",
    "best_labels",
    "get",
    "load",
    "title_of",
]


def get(task: Task | str) -> Task:
    """The task of that name, or the task itself.

    Raises:
        ConfigError: no task has the name.
    """
    if isinstance(task, Task):
        return task
    if task not in TASKS:
        raise ConfigError(f"no task {printable(repr(task))}: choose one of {', '.join(TASKS)}, or pass a Task object")
    return TASKS[task]


def title_of(tasks: Iterable[Task]) -> str:
    """Tasks in words, for messages. A task that needs nothing beyond the tasks before it is left out."""
    words: list[str] = []
    modules: set[str] = set()
    for task in tasks:
        if not words or task.modules - modules or type(task).head is not Task.head:
            words.append(task.name.replace("_", " "))
        modules |= task.modules
    return " and ".join(words)


def load(name: str) -> Task:
    """The task that a command line names: a name in `TASKS`, `module:Name` or `file.py:Name`.

    Runs the module's code: take such names from a user, never from a file.

    Raises:
        ConfigError: there is no such task, module or file, or what it names is no task.
    """
    where, colon, attribute = name.rpartition(":")
    if not colon:
        return get(name)
    try:
        module = _from_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
        found = getattr(module, attribute)
    except (ImportError, AttributeError, OSError, SyntaxError) as error:
        raise ConfigError(f"the task {name} cannot be imported: {error}") from error
    found = found() if isinstance(found, type) and issubclass(found, Task) else found
    if not isinstance(found, Task):
        raise ConfigError(f"{name} is a {type(found).__name__}, not a mplug2_fast.tasks.Task")
    return found


def _from_file(path: Path) -> object:
    spec = importlib.util.spec_from_file_location(f"mplug2_fast_task_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
