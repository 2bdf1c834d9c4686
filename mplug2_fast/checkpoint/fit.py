"""How the entries of a state dict fit what a model needs, and the report when they do not."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from mplug2_fast.checkpoint.keys import POSITION_KEY, TIED_KEYS, KeyKind, KeyMap, Shape
from mplug2_fast.errors import CheckpointError
from mplug2_fast.models.mplug2.config import MPlug2Config, Task

_EXAMPLES = 3
_GROUPS = 8


@dataclass(frozen=True)
class Fit:
    """Every entry of a state dict, sorted by what it is to a task.

    Attributes:
        task: the task that was asked for.
        needed: keys that the task uses and that fit.
        missing: keys that the task uses and that are not there, with their shapes.
        mismatched: key -> (shape found, shape wanted).
        unexpected: keys that no mPLUG-2 checkpoint of this size has.
        unused: known keys that the task does not use.
        tied: twins of needed keys.
        momentum: momentum copies of question answering's training.
        resized: key -> (shape found, shape wanted), for position embeddings that are resized while loading.
    """

    task: Task
    needed: tuple[str, ...] = ()
    missing: dict[str, Shape] = field(default_factory=dict)
    mismatched: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    unexpected: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()
    momentum: tuple[str, ...] = ()
    resized: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether everything that the task needs is there, and nothing foreign is."""
        return not (self.missing or self.mismatched or self.unexpected)

    def require(self, name: str) -> None:
        """Raise `CheckpointError` with the grouped report, unless `ok`. `name` is what is being read."""
        if not self.ok:
            raise CheckpointError(self.report(name))

    def report(self, name: str) -> str:
        """What does not fit, by subtree, with counts, examples and the remedy."""
        lines = [f"{name} does not fit a {self.task.replace('_', ' ')} model of these sizes; nothing was loaded"]
        lines += _section("missing", {key: f"{key} {list(shape)}" for key, shape in self.missing.items()})
        lines += _section("unexpected", {key: key for key in self.unexpected})
        lines += _section(
            "of another shape",
            {k: f"{k} {list(found)}, needed {list(wanted)}" for k, (found, wanted) in self.mismatched.items()},
        )
        return "\n".join([*lines, f"  remedy: {self._remedy()}"])

    def _remedy(self) -> str:
        if not (self.needed or self.mismatched):
            return "this is not an mPLUG-2 checkpoint: use one that is"
        question_answering = ("text_encoder.", "fusion_encoder.")
        if self.missing and not self.mismatched and all(key.startswith(question_answering) for key in self.missing):
            return (
                'the parts that only question answering uses are not there: load it with task="captioning", '
                "or use a question answering checkpoint"
            )
        if self.mismatched:
            return "build the model with the sizes of this checkpoint (without config= they are read from its shapes)"
        if self.missing:
            return "the file is incomplete, or its keys were renamed: use the released checkpoint, whole"
        return "remove the unexpected entries if they are known to be harmless, or use the checkpoint of this model"


def check_fit(
    shapes: Mapping[str, Shape], config: MPlug2Config, task: Task, needed: Mapping[str, Shape] | None = None
) -> Fit:
    """Sort the entries of a state dict.

    Args:
        shapes: released key -> shape, `module.` prefixes already gone.
        config: the sizes of the model to fill.
        task: the task to serve.
        needed: what the model itself asks for. None: what `config` and `task` imply.
    """
    keys = KeyMap(config, task)
    needed = keys.needed if needed is None else needed
    sorted_keys: dict[KeyKind, list[str]] = {kind: [] for kind in KeyKind}
    mismatched: dict[str, tuple[Shape, Shape]] = {}
    resized: dict[str, tuple[Shape, Shape]] = {}
    for key, shape in shapes.items():
        kind = KeyKind.NEEDED if key in needed else keys.classify(key)
        wanted = needed.get(TIED_KEYS.get(key, key))
        if kind in (KeyKind.NEEDED, KeyKind.TIED) and wanted is not None and shape != wanted:
            if key == POSITION_KEY and _is_resizable(shape, wanted):
                resized[key] = (shape, wanted)
            else:
                mismatched[key] = (shape, wanted)
                continue
        sorted_keys[kind].append(key)
    return Fit(
        task=task,
        needed=tuple(sorted_keys[KeyKind.NEEDED]),
        missing={key: shape for key, shape in needed.items() if key not in shapes},
        mismatched=mismatched,
        unexpected=tuple(sorted_keys[KeyKind.UNEXPECTED]),
        unused=tuple(sorted_keys[KeyKind.UNUSED]),
        tied=tuple(sorted_keys[KeyKind.TIED]),
        momentum=tuple(sorted_keys[KeyKind.MOMENTUM]),
        resized=resized,
    )


def group_of(key: str) -> str:
    """The subtree that a key is reported under: up to its layer number, else its module."""
    layer = re.match(r"(.+?)\.[0-9]+\.", key)
    return f"{layer[1]}.*" if layer else ".".join(key.split(".")[:-1][:2]) or key


def _section(title: str, entries: Mapping[str, str]) -> list[str]:
    if not entries:
        return []
    groups: dict[str, list[str]] = {}
    for key, text in entries.items():
        groups.setdefault(group_of(key), []).append(text)
    lines = [f"  {title}: {len(entries)} {'entry' if len(entries) == 1 else 'entries'}"]
    for group, texts in list(groups.items())[:_GROUPS]:
        lines.append(f"    {group} ({len(texts)})")
        lines += [f"      {text}" for text in texts[:_EXAMPLES]]
        if len(texts) > _EXAMPLES:
            lines.append(f"      and {len(texts) - _EXAMPLES} more")
    if len(groups) > _GROUPS:
        rest = sum(len(texts) for texts in list(groups.values())[_GROUPS:])
        lines.append(f"    and {rest} more in {len(groups) - _GROUPS} other subtrees")
    return lines


def _is_resizable(found: Shape, wanted: Shape) -> bool:
    side = math.isqrt(max(found[0] - 1, 0)) if found else 0
    return len(found) == 2 and side > 0 and side * side == found[0] - 1 and found[1] == wanted[1]
