"""Tasks. Each is an object with a head, a loss and predictions. `TASKS` has the ones in this package."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mplug2_fast.errors import ConfigError, printable
from mplug2_fast.imports import imported
from mplug2_fast.tasks.base import Alternative, Respond, Task, Texts, best_labels
from mplug2_fast.tasks.captioning import Captioning
from mplug2_fast.tasks.classification import Classification, Regression
from mplug2_fast.tasks.grounding import Grounding
from mplug2_fast.tasks.masked_words import MaskedWords
from mplug2_fast.tasks.question_answering import AnswerRanking, QuestionAnswering
from mplug2_fast.tasks.retrieval import Retrieval
from mplug2_fast.tasks.text_generation import PrefixModelling, TextGeneration, TextPrefixModelling
from mplug2_fast.tasks.zero_shot import Clip, ZeroShot

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Captioning(),
        QuestionAnswering(),
        AnswerRanking(),
        Grounding(),
        Retrieval(),
        Clip(),
        TextGeneration(),
    )
}
"""Name to task."""

PRETRAINING: dict[str, Task] = {
    task.name: task for task in (MaskedWords(), MaskedWords(fused=True), PrefixModelling(), TextPrefixModelling())
}
"""Tasks for pre-training. A checkpoint offers them only if it names them."""

KINDS: dict[str, type[Task]] = {kind.kind: kind for kind in (Classification, Regression, ZeroShot)}
"""Classes of tasks with settings, such as labels."""

Stated = str | Mapping[str, Any]
"""A task in a checkpoint: its name, or its kind with its settings."""

__all__ = [
    "KINDS",
    "PRETRAINING",
    "TASKS",
    "Alternative",
    "AnswerRanking",
    "Captioning",
    "Classification",
    "Clip",
    "Grounding",
    "MaskedWords",
    "PrefixModelling",
    "QuestionAnswering",
    "Regression",
    "Respond",
    "Retrieval",
    "Stated",
    "Task",
    "TextGeneration",
    "TextPrefixModelling",
    "Texts",
    "ZeroShot",
    "best_labels",
    "get",
    "load",
    "stated",
    "title_of",
]


def get(task: Task | Stated) -> Task:
    """The task with this name, or the one that a checkpoint describes. A `Task` is returned unchanged.

    Raises:
        ConfigError: no task has the name, or the settings are wrong.
    """
    if isinstance(task, Task):
        return task
    if not isinstance(task, str):
        settings = dict(task)
        kind = settings.pop("kind", None)
        if kind not in KINDS:
            raise ConfigError(f"no kind of task {printable(repr(kind))}: choose one of {', '.join(KINDS)}")
        try:
            return KINDS[kind](**settings)
        except TypeError:
            raise ConfigError(f"a {kind} cannot have the settings {printable(', '.join(map(str, settings)))}") from None
    known = TASKS | PRETRAINING
    if task not in known:
        raise ConfigError(f"no task {printable(repr(task))}: choose one of {', '.join(known)}, or pass a Task object")
    return known[task]


def stated(task: Task) -> Stated:
    """How a checkpoint describes a task; the inverse of `get`."""
    settings = task.settings()
    return {"kind": task.kind, **settings} if settings else task.name


def title_of(tasks: Iterable[Task]) -> str:
    """The names of tasks, for messages. Leaves out tasks that need no module beyond those of the tasks before them."""
    words: list[str] = []
    modules: set[str] = set()
    for task in tasks:
        if not words or task.modules - modules or type(task).head is not Task.head:
            words.append(task.name.replace("_", " "))
        modules |= task.modules
    return " and ".join(words)


def load(name: str) -> Task:
    """The task of a command line's name: a name in `TASKS`, `module:Name` or `file.py:Name`.

    Runs the module's code: take such names from a user, or from a file that the user trusts.

    Raises:
        ConfigError: there is no such task, module or file, or the object is not a task.
    """
    where, colon, attribute = name.rpartition(":")
    if not colon:
        return get(name)
    found = imported(where, attribute, "task")
    found = found() if isinstance(found, type) and issubclass(found, Task) else found
    if not isinstance(found, Task):
        raise ConfigError(f"{name} is a {type(found).__name__}, not a mplug2_fast.tasks.Task")
    return found
