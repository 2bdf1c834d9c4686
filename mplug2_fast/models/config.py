"""What the configurations of all families share: checked fields, presets, conversion to and from plain values."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from mplug2_fast.errors import ConfigError, printable
from mplug2_fast.models.wording import Wording
from mplug2_fast.video.preparation import MPLUG2, Preparation

if TYPE_CHECKING:
    from typing_extensions import Self

    from mplug2_fast.tasks import Task

CLS_TOKEN_ID, SEP_TOKEN_ID, PAD_TOKEN_ID = 101, 102, 0

CLIP_TOWERS = {"ViT-L-14": (1024, 24, 14), "ViT-B-16": (768, 12, 16)}
"""Image towers in the official configurations: name to (width, layers, patch size)."""

MAX_IMAGE_SIDE = 400
"""Patches along one side of a frame."""

MAX_LAYERS = 1000
MAX_TEXT = 1000
"""Characters of a text field."""
# Larger values are mistakes, or attempts to fill the memory. No model comes near them.
_DEFAULT_MAX = 2**20
_MAY_BE_ZERO = frozenset(("num_uni_layer",))
_MAX: dict[str, int] = {
    **dict.fromkeys(("layers", "stored_layers", "text_encoder_layers", "text_decode_layers"), MAX_LAYERS),
    **dict.fromkeys(("width", "hidden_size", "head_dim", "num_attention_heads"), 2**16),
    **dict.fromkeys(("num_beams", "mlp_ratio", "temporal_kernel_size", "patch_size"), 1024),
    **dict.fromkeys(("num_frames", "temporal_stride"), 2**14),
    "vocab_size": 2**24,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """A configuration of one family. Its fields are parts, each a dataclass of plain values.

    Raises `ConfigError` for values that no model can have.
    """

    if TYPE_CHECKING:  # each family has its own kinds of these parts
        vision: Any
        text: Any

    family: ClassVar[str]
    """Key of the family in `mplug2_fast.models.FAMILIES`."""
    title: ClassVar[str]
    """The family's name for people."""
    modules: ClassVar[tuple[str, ...]]
    """The modules that a model of the family can have."""
    implied: ClassVar[Mapping[str, frozenset[str]]] = {}
    """Module -> further modules that it needs in this family."""
    lengths: ClassVar[Mapping[str, tuple[int, int]]] = {}
    """Name of a task -> (min_length, max_length) where the family's default is not the task's."""
    wording: ClassVar[Wording]
    """How texts become token ids."""
    presets: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Name to the parts, in the order of the fields."""
    official_vision: ClassVar[Mapping[str, str]]
    """Field of `vision` -> its name in the official YAML."""

    def __post_init__(self) -> None:
        for part in dataclasses.fields(self):
            values = getattr(self, part.name)
            for f in dataclasses.fields(values):
                _check_field(f"{type(values).__name__}.{f.name}", f, getattr(values, f.name))

    def visual_tokens(self, num_frames: int) -> int:
        """Tokens that the vision encoder makes of frames."""
        return num_frames * (1 + self.vision.num_patches)

    def frames_of(self, tokens: int) -> int:
        """The number of frames that `tokens` visual tokens were made of."""
        return max(1, tokens // (1 + self.vision.num_patches))

    def has_modules_for(self, task: Task) -> bool:
        """Whether the family has the modules that a task needs."""
        return task.modules <= set(self.modules)

    def modules_for(self, tasks: Iterable[Task]) -> frozenset[str]:
        """The modules that tasks need.

        Raises `ConfigError` for a task with a module that the family does not have.
        """
        needed: set[str] = set()
        for task in tasks:
            if not self.has_modules_for(task):
                names = ", ".join(sorted(task.modules - set(self.modules)))
                raise ConfigError(f"{task.name} needs {names}, and {self.title} has only {', '.join(self.modules)}")
            needed |= task.modules
        return frozenset(needed).union(*(self.implied.get(name, ()) for name in needed))

    @classmethod
    def preset(cls, name: str) -> Self:
        """The configuration of a published size. Raises `ConfigError` for a name that does not exist."""
        if name not in cls.presets:
            raise ConfigError(f"no preset {name!r}: choose one of {', '.join(cls.presets)}")
        return cls(*cls.presets[name])

    @classmethod
    def from_official(
        cls,
        *,
        bert: Mapping[str, Any],
        model: Mapping[str, Any] | None = None,
        clip: Mapping[str, Any] | None = None,
    ) -> Self:
        """Reads the official files: `config_bert*.json`, the task's YAML, and the CLIP sizes.

        Args:
            bert: the BERT JSON.
            model: the YAML fields; absent ones have the official default.
            clip: `width`, `layers` and `patch` of the image tower. None takes them from the YAML's `clip_name`.
        """
        model = model or {}
        tower = _official_tower(model, clip)
        vision = {"width": tower["width"], "layers": tower["layers"], "patch_size": tower["patch"]}
        vision |= {name: model[official] for name, official in cls.official_vision.items() if official in model}
        kinds = {part.name: part.default_factory for part in _parts(cls)}
        fields = {f.name for f in dataclasses.fields(kinds["text"])}
        text = {key: value for key, value in bert.items() if key in fields}
        if "num_hidden_layers" in bert:
            text["stored_layers"] = bert["num_hidden_layers"]
        generation = {f.name: model[f.name] for f in dataclasses.fields(GenerationConfig) if f.name in model}
        if "beam_size" in model:
            generation["num_beams"] = model["beam_size"]
        contrast = {"embed_dim": model["embed_dim"]} if "embed_dim" in model else {}
        parts = {"vision": vision, "text": text, "generation": generation, "contrast": contrast}
        return cls(**{name: kinds[name](**values) for name, values in parts.items()})

    @property
    def preparation(self) -> Preparation:
        """How files become the model's input."""
        return MPLUG2

    @property
    def grounding_preparation(self) -> Preparation:
        """How files become the model's input for visual grounding."""
        return self.preparation

    def replace(self, **changes: Any) -> Self:
        """A copy with fields changed: `replace(text={"num_latents": 8}, vision={"num_frames": 4})`.

        A field's name alone works too, `replace(num_frames=4)`, if only one part has it.

        Raises `ConfigError` for a name that no part has, or that several have.
        """
        names = {part.name: {f.name for f in dataclasses.fields(getattr(self, part.name))} for part in _parts(self)}
        wanted: dict[str, dict[str, Any]] = {part: dict(changes.pop(part, {})) for part in names}
        for name, value in changes.items():
            owners = [part for part, fields in names.items() if name in fields]
            if len(owners) > 1:
                ways = " or ".join(f"{part}={{{name!r}: ...}}" for part in owners)
                raise ConfigError(f"{name} is a field of {' and '.join(owners)}: use {ways}")
            if not owners:
                raise ConfigError(f"no such configuration field: {name}")
            wanted[owners[0]][name] = value
        unknown = [f"{part}.{name}" for part, values in wanted.items() for name in values if name not in names[part]]
        if unknown:
            raise ConfigError(f"no such configuration field: {', '.join(unknown)}")
        return type(self)(
            **{part: dataclasses.replace(getattr(self, part), **values) for part, values in wanted.items()}
        )

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts of plain values, as `config.json` stores them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`. Raises `ConfigError` for unknown fields."""
        kinds = {part.name: part.default_factory for part in _parts(cls)}
        if not isinstance(values, Mapping):
            raise ConfigError(f"a configuration is an object with {', '.join(kinds)}, got {type(values).__name__}")
        unknown = {str(key) for key in values} - set(kinds)
        parts = {}
        for part, kind in kinds.items():
            known = {f.name for f in dataclasses.fields(kind)}
            given = values.get(part, {})
            if not isinstance(given, Mapping):
                raise ConfigError(f"{part} must be an object with the fields of {kind.__name__}, got {_shown(given)}")
            unknown |= {f"{part}.{key}" for key in given if key not in known}
            parts[part] = {key: value for key, value in given.items() if key in known}
        if unknown:
            raise ConfigError(f"unknown configuration fields: {printable(', '.join(sorted(unknown)))}")
        return cls(**{part: kind(**parts[part]) for part, kind in kinds.items()})


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Defaults of `generate`. A length of None means the official default of the task."""

    num_beams: int = 5
    min_length: int | None = None
    max_length: int | None = None
    prompt: str = ""
    prompt_length: int | None = None
    """Tokens of the prompt without [CLS]. None counts words and punctuation marks, which is exact if the vocabulary
    holds each of them whole. It holds those of the official prompt."""

    @property
    def prompt_tokens(self) -> int:
        """Number of targets after [CLS] that the captioning loss ignores: all tokens of the prompt but the last.

        The official code ignores positions 0 to prompt_length - 1 of the input ids. Position 0 is [CLS], which is no
        target, so the last token of the prompt is learned.
        """
        counted = len(re.findall(r"\w+|[^\w\s]", self.prompt)) if self.prompt_length is None else self.prompt_length
        return max(counted - 1, 0)


@dataclasses.dataclass(frozen=True)
class ContrastConfig:
    """Sizes of the features that visual inputs and texts are compared by."""

    embed_dim: int = 256


def check_towers(vision: Any, text: Any) -> None:
    """Raises `ConfigError` for sizes of an image tower and of BERT layers that no model can have."""
    if vision.width % vision.head_dim:
        raise ConfigError(f"the vision width {vision.width} is not a multiple of the head dimension {vision.head_dim}")
    if text.hidden_size % text.num_attention_heads:
        raise ConfigError(
            f"hidden_size {text.hidden_size} is not a multiple of num_attention_heads {text.num_attention_heads}"
        )
    if vision.image_size % vision.patch_size:
        raise ConfigError(
            f"image_size {vision.image_size} is not a multiple of the patch size {vision.patch_size}: "
            f"use {vision.image_size // vision.patch_size * vision.patch_size}"
        )
    if vision.image_size > MAX_IMAGE_SIDE * vision.patch_size:
        raise ConfigError(
            f"image_size {vision.image_size} is more than {MAX_IMAGE_SIDE} patches of {vision.patch_size} pixels"
        )
    if text.fusion_layers > text.stored_layers:
        raise ConfigError(f"fusion_layers {text.fusion_layers} is more than the stored layers {text.stored_layers}")


def _official_tower(model: Mapping[str, Any], clip: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """`width`, `layers` and `patch` of the image tower: as given, or else by the YAML's `clip_name`."""
    if clip is None:
        name = model.get("clip_name", "ViT-L-14")
        if name not in CLIP_TOWERS:
            raise ConfigError(
                f"clip_name {name!r} is not one of {', '.join(CLIP_TOWERS)}: "
                "pass clip, a dict of width, layers and patch"
            )
        clip = dict(zip(("width", "layers", "patch"), CLIP_TOWERS[name], strict=True))
    missing = [key for key in ("width", "layers", "patch") if key not in clip]
    if missing:
        raise ConfigError(f"clip lacks {', '.join(missing)}")
    return clip


def _parts(config: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(config)


def _check_field(name: str, field: dataclasses.Field[Any], value: Any) -> None:
    """Raises `ConfigError` unless the value has the field's type and a size that a model can have."""
    largest = _MAX.get(field.name, _DEFAULT_MAX)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if field.type == "int":
        if not whole or value < (field.name not in _MAY_BE_ZERO):
            raise ConfigError(f"{name} must be a positive whole number, got {_shown(value)}")
        if value > largest:
            raise ConfigError(f"{name} must be at most {largest:,}, got {_shown(value)}")
    elif field.type == "int | None":
        if value is not None and not (whole and 0 <= value <= largest):
            raise ConfigError(f"{name} must be null or a whole number from 0 to {largest:,}, got {_shown(value)}")
    elif field.type == "bool":
        if not isinstance(value, bool):
            raise ConfigError(f"{name} must be true or false, got {_shown(value)}")
    elif field.type == "float":
        if not ((whole or isinstance(value, float)) and 0 <= value <= 1):
            raise ConfigError(f"{name} must be a number from 0 to 1, got {_shown(value)}")
    elif not isinstance(value, str) or len(value) > MAX_TEXT or not value.isprintable():
        raise ConfigError(f"{name} must be a printable text of up to {MAX_TEXT} characters, got {_shown(value)}")


def _shown(value: Any) -> str:
    """A value for messages."""
    try:
        return printable(repr(value), longest=60)
    except (ValueError, RecursionError):  # too many digits, too deep
        return f"a {type(value).__name__} that is too large to print"
