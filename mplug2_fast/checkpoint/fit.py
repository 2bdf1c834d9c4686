"""Compares the entries of a state dict with what a model needs, and reports differences."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from mplug2_fast.errors import CheckpointError
from mplug2_fast.models.names import KeyKind, OfficialNames, Shape

_HEAD_PREFIXES = (
    "heads.",
    *(f"{head}." for head in ("itm_head", "vision_proj", "text_proj")),
    "temp",
    "text_encoder.cls.",
    "fusion_encoder.cls.",
)

_EXAMPLES = 3
_GROUPS = 8


@dataclass(frozen=True)
class Fit:
    """The entries of a state dict, by their role in a model.

    Attributes:
        title: the tasks of the model, for messages.
        needed: keys that the model uses and that fit.
        missing: keys that the model uses and that are missing, with their shapes.
        mismatched: key -> (shape found, shape needed).
        unexpected: keys that no checkpoint of this family and size has.
        unused: known keys that the model does not use.
        tied: second names of needed tensors (tied weights).
        momentum: momentum copies from training.
        resized: key -> (shape found, shape needed), for position embeddings that are resized while loading.
        servable: tasks whose weights are complete.
    """

    title: str
    needed: tuple[str, ...] = ()
    missing: dict[str, Shape] = field(default_factory=dict)
    mismatched: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    unexpected: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()
    momentum: tuple[str, ...] = ()
    resized: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    servable: tuple[str, ...] = ()

    def missing_heads(self) -> frozenset[str]:
        """The missing keys that belong to heads, which can be trained from new weights."""
        return frozenset(key for key in self.missing if key.startswith(_HEAD_PREFIXES))

    @property
    def ok(self) -> bool:
        """Whether the state dict has everything that the model needs, and nothing unexpected."""
        return not (self.missing or self.mismatched or self.unexpected)

    def require(self, name: str) -> None:
        """Raises `CheckpointError` with the grouped report, unless `ok`. The message begins with `name`, the file."""
        if not self.ok:
            raise CheckpointError(self.report(name))

    def report(self, name: str) -> str:
        """Lists what does not fit, by subtree, with counts, examples and the remedy."""
        lines = [f"{name} does not fit a {self.title} model of these sizes; nothing was loaded"]
        lines += _section("missing", {key: f"{key} {list(shape)}" for key, shape in self.missing.items()})
        lines += _section("unexpected", {key: key for key in self.unexpected})
        lines += _section(
            "of another shape",
            {k: f"{k} {list(found)}, needed {list(wanted)}" for k, (found, wanted) in self.mismatched.items()},
        )
        return "\n".join([*lines, f"  remedy: {self._remedy()}"])

    def _lacks_a_whole_part(self) -> bool:
        """Whether a file without these entries may be one of another task. A single lost entry makes it incomplete."""
        return not {_part_of(key) for key in self.missing} <= {_part_of(key) for key in self.needed}

    def _remedy(self) -> str:
        if not (self.needed or self.mismatched):
            return "this is another kind of checkpoint: use one of this family"
        if self.missing and not self.mismatched:
            heads = sorted({key.split(".")[1] for key in self.missing if key.startswith("heads.")})
            if heads and all(key.startswith("heads.") for key in self.missing):
                return f"no weights for the head of {', '.join(heads)}: load the other tasks, then add it with add_task"
            if self.missing.keys() == self.missing_heads():
                parts = sorted({_head_of(key) for key in self.missing})
                each = "it" if len(parts) == 1 else "them"
                return f"no weights for {', '.join(parts)}: train {each}, or pass a file that has {each}"
            if self.servable and self._lacks_a_whole_part():
                return (
                    f'the parts that only {self.title} uses are missing: load it with task="{self.servable[0]}", '
                    f"or use a {self.title} checkpoint"
                )
        if self.mismatched:
            return "build the model with the sizes of this checkpoint (without config= its shapes determine them)"
        if self.missing:
            return "the file is incomplete, or its keys were renamed: use the complete official checkpoint"
        return "remove the unexpected entries if they are known to be harmless, or use the checkpoint of this model"


def _part_of(key: str) -> str:
    return key.partition(".")[0]


def check_fit(shapes: Mapping[str, Shape], names: OfficialNames, title: str, servable: tuple[str, ...] = ()) -> Fit:
    """Sorts the entries of a state dict by their role.

    Args:
        shapes: official key -> shape, without prefixes of wrappers.
        names: the model's official names. title: the tasks of the model, for messages.
        servable: tasks whose weights are complete, for messages.
    """
    needed = names.needed
    sorted_keys: dict[KeyKind, list[str]] = {kind: [] for kind in KeyKind}
    mismatched: dict[str, tuple[Shape, Shape]] = {}
    resized: dict[str, tuple[Shape, Shape]] = {}
    for key, shape in shapes.items():
        kind = names.classify(key)
        wanted = needed.get(names.tied.get(key, key))
        if kind in (KeyKind.NEEDED, KeyKind.TIED) and wanted is not None and shape != wanted:
            if key in names.resizable and _is_resizable(shape, wanted):
                resized[key] = (shape, wanted)
            else:
                mismatched[key] = (shape, wanted)
                continue
        sorted_keys[kind].append(key)
    return Fit(
        title=title,
        needed=tuple(sorted_keys[KeyKind.NEEDED]),
        missing={key: shape for key, shape in needed.items() if key not in shapes},
        mismatched=mismatched,
        unexpected=tuple(sorted_keys[KeyKind.UNEXPECTED]),
        unused=tuple(sorted_keys[KeyKind.UNUSED]),
        tied=tuple(sorted_keys[KeyKind.TIED]),
        momentum=tuple(sorted_keys[KeyKind.MOMENTUM]),
        resized=resized,
        servable=servable,
    )


def group_of(key: str) -> str:
    """The subtree under which a key is reported: up to its layer number, otherwise its module."""
    layer = re.match(r"(.+?)\.[0-9]+\.", key)
    return f"{layer[1]}.*" if layer else ".".join(key.split(".")[:-1][:2]) or key


def _head_of(key: str) -> str:
    """The name of the head that a key belongs to."""
    parts = key.split(".")
    return ".".join(parts[:2]) if parts[0] in ("heads", "text_encoder", "fusion_encoder") else parts[0]


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
