"""The base of the models of all families: their modules, tasks, losses, predictions and generation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mplug2_fast.devices import INT8
from mplug2_fast.errors import ConfigError
from mplug2_fast.generation.beam_search import Hypotheses, beam_search, output
from mplug2_fast.generation.cuda_graphs import CudaGraphRunner
from mplug2_fast.models.config import CLS_TOKEN_ID, PAD_TOKEN_ID, SEP_TOKEN_ID
from mplug2_fast.models.eight_bit import FORMATS, Quantisation, eight_bit_names, require_matches, units_of
from mplug2_fast.models.names import CONTRAST, MATCHING, VISION, OfficialNames, with_heads
from mplug2_fast.modes import in_eval_mode
from mplug2_fast.nn import MLP, LocalTemporal, SelfAttention
from mplug2_fast.nn.clip_text import ClipText
from mplug2_fast.nn.contrast import Contrast
from mplug2_fast.nn.parts import plain
from mplug2_fast.nn.text_decoder import Memory
from mplug2_fast.ops import pack_weight, unpack_weight
from mplug2_fast.outputs import GenerationOutput
from mplug2_fast.tasks import Task, get

if TYPE_CHECKING:
    from typing_extensions import Self


_NO_GRADIENTS = "a model with 8-bit weights cannot be trained: train the original, then quantise the result"


class Fused(NamedTuple):
    """The fusion encoder's result for a text and a video.

    Attributes:
        visual: `(B, S, D)`. text: `(B, tokens, D)`.
        memory: both, `(B, S + tokens, D)`, as the decoder attends to them. memory_mask: `(B, S + tokens)`.
    """

    visual: Tensor
    text: Tensor
    memory: Tensor
    memory_mask: Tensor


class Model(nn.Module, ABC):
    """A model with exactly the modules that its tasks need. Families add the modules and how an input passes them.

    Args:
        config: sizes and defaults.
        tasks: names of tasks in `mplug2_fast.tasks.TASKS`, or tasks.
        device, dtype: of the parameters; `device="meta"` allocates nothing.

    Attributes:
        tasks: name -> task.
        heads: name -> head, of the tasks that have one.
        quantisation: of a model with 8-bit weights, their format and the patterns of layers that are not rounded: see
            `quantise`. Otherwise None.

    Raises:
        ConfigError: the configuration is another family's; a task does not exist, or needs a module that the family
            does not have. ValueError: no task, or two of the same name.
    """

    family: ClassVar[str]
    """The `family` of its configurations."""
    quantisation: Quantisation | None = None
    start_token_id, end_token_id, pad_token_id = CLS_TOKEN_ID, SEP_TOKEN_ID, PAD_TOKEN_ID

    def __init__(
        self,
        config: Any,
        tasks: Sequence[Task | str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if config.family != self.family:
            raise ConfigError(f"{type(self).__name__} cannot be built from a {type(config).__name__}: use its own")
        found = [get(task) for task in tasks]
        self.config = config
        self.tasks: dict[str, Task] = {task.name: task for task in found}
        if not found or len(self.tasks) < len(found):
            raise ValueError(f"tasks must be one or more different tasks, got {[task.name for task in found]}")
        self._graphs = CudaGraphRunner()
        device = torch.get_default_device() if device is None else torch.device(device)
        needed, width = self.module_names, config.text.hidden_size
        with torch.device("meta"):
            self._add_modules(config, needed)
            if CONTRAST in needed:
                self.contrast = Contrast(width, config.contrast.embed_dim)
            if MATCHING in needed:
                self.matching = nn.Linear(width, 2)
            heads = {name: head for name, task in self.tasks.items() if (head := task.head(config)) is not None}
            self.heads = nn.ModuleDict(heads)
        self.to(dtype=dtype or torch.get_default_dtype())
        if device.type != "meta":
            self.to_empty(device=device)
            self.reset_parameters()

    @abstractmethod
    def _add_modules(self, config: Any, needed: frozenset[str]) -> None:
        """Adds the modules of these names, on the meta device."""

    @abstractmethod
    def _names(self) -> OfficialNames:
        """The official names of the modules, without heads."""

    @abstractmethod
    def encode_text(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """input_ids and mask `(B, tokens)`, mask 1 for tokens and 0 for padding, to `(B, tokens, D)`."""

    @abstractmethod
    def visual_features(self, image_embeds: Tensor) -> Tensor:
        """image_embeds `(B, S, D)` to features for comparison with texts `(B, embed_dim)`, of norm 1."""

    @abstractmethod
    def _visual(self, video: Tensor) -> Tensor:
        """The vision encoder's tokens, brought to the BERT width."""

    @abstractmethod
    def _image_embeds(self, video: Tensor) -> Tensor:
        """What text and decoder attend to."""

    @abstractmethod
    def pooled(self, image_embeds: Tensor) -> Tensor:
        """The class token of image_embeds `(B, S, D)`: `(B, D)`."""

    def text_features(self, text: Tensor) -> Tensor:
        """Text `(B, tokens, D)` of `encode_text` to features for comparison `(B, embed_dim)`, of norm 1."""
        return self.contrast.text(text[:, 0])

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """New weights: normal with `initializer_range`, norms one, biases zero, temporal modules the identity."""
        self._reset(self)

    def _reset(self, new: nn.Module) -> None:
        std = self.config.text.initializer_range
        for module in new.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim > 1 or "embedding" in name:
                    parameter.normal_(std=std)
                else:
                    parameter.zero_()
            if isinstance(module, nn.LayerNorm):
                module.weight.fill_(1.0)
        for module in new.modules():
            if isinstance(module, (LocalTemporal, Contrast, ClipText)):
                module.reset_parameters()

    @property
    def task(self) -> str:
        """The name of the first task."""
        return next(iter(self.tasks))

    @property
    def module_names(self) -> frozenset[str]:
        """The modules that the model has, of `config.modules`."""
        return self.config.modules_for(self.tasks.values())

    def modules_of(self, task: Task | str) -> frozenset[str]:
        """The modules that one of the model's tasks computes with. Raises `ConfigError` for a task it does not have."""
        return self.config.modules_for([self._task(task)])

    @torch.no_grad()
    def add_task(self, task: Task | str) -> Self:
        """Adds a task with a new head. The other weights stay.

        Raises:
            ValueError: the model lacks a module that the task needs, or has a task of that name.
        """
        task = get(task)
        missing = self.config.modules_for([task]) - self.module_names
        if missing:
            raise ValueError(
                f"{task.name} needs {', '.join(sorted(missing))}, and this model has only "
                f"{', '.join(sorted(self.module_names))}: name {task.name} among the tasks when you build it"
            )
        if task.name in self.tasks:
            raise ValueError(f"the model already has a task {task.name}")
        self.tasks[task.name] = task
        weight = next(self.parameters())
        with torch.device("meta"):
            head = task.head(self.config)
        if head is not None:
            head = head.to(weight.dtype).to_empty(device=weight.device).train(self.training)
            if not weight.is_meta:
                self._reset(head)
            self.heads[task.name] = head
        return self

    def loss(self, task: Task | str | Mapping[str, Any], batch: Mapping[str, Any] | None = None, **options: Any) -> Any:
        """The training loss of a batch, one number: see the task's `loss` for what a batch holds, and for options.

        `loss({"captioning": b1, "question_answering": b2})` gives a dict of losses, for one step over several tasks.
        """
        if self.quantisation is not None:
            raise ConfigError(_NO_GRADIENTS)
        if isinstance(task, Mapping):
            return {name: self.loss(name, each) for name, each in task.items()}
        if batch is None:
            raise TypeError("loss takes a task and its batch, or one dict of both")
        return self._task(task).loss(self, batch, **options)

    @torch.no_grad()
    @in_eval_mode
    def predict(self, task: Task | str, *args: Any, **inputs: Any) -> Any:
        """The results for a batch, without dropout and gradients: see the task's `predict` for inputs and results."""
        return self._task(task).predict(self, *args, **inputs)

    def _task(self, task: Task | str) -> Task:
        name = task if isinstance(task, str) else task.name
        if name not in self.tasks:
            get(task)  # a name that does not exist at all
            raise ValueError(f"the model was not built for {name}, only for {', '.join(self.tasks)}: use add_task")
        return self.tasks[name]

    @property
    def official_names(self) -> OfficialNames:
        """The official name of every parameter."""
        names = with_heads(self._names(), self.heads)
        return names if self.quantisation is None else eight_bit_names(names, self)

    def official_parameters(self) -> dict[str, Tensor]:
        """Official name -> view into this model's parameters, detached."""
        return self.official_names.views(self)

    def official_gradients(self) -> dict[str, Tensor]:
        """Official name -> view into the gradient. Every parameter must have one."""
        return self.official_names.views(self, lambda parameter: parameter.grad)

    def wide_weights(self) -> Iterator[nn.Parameter]:
        """The vision encoder's weights: most of the products are theirs, with all visual tokens at once."""
        yield self.visual.patch_weight
        for module in self.visual.modules():
            layers: tuple[nn.Module, ...] = ()
            if isinstance(module, SelfAttention):
                if module.in_proj_weight is not None:  # an 8-bit weight is not packed
                    yield module.in_proj_weight
                layers = (module.out_proj,)
            elif isinstance(module, MLP):
                layers = (module.c_fc, module.c_proj)
            elif isinstance(module, LocalTemporal):
                layers = (module.down_proj, module.up_proj)
            yield from (layer.weight for layer in layers if plain(layer))

    def pack(self) -> Self:
        """Keeps copies of the vision encoder's weights in the layout of the CPU's matrix products, for inference.

        These weights, half of the captioning model's, then take twice their memory. `state_dict()` does not change.
        Weights may change afterwards in any way: each product compares a checksum and packs a changed weight again.
        Weights that are not on a CPU are not packed.
        """
        if VISION in self.module_names:
            vision = self.config.vision
            for weight in self.wide_weights():
                pack_weight(weight, vision.num_frames * (1 + vision.num_patches))
        return self

    def unpack(self) -> Self:
        """Drops the copies that `pack` keeps."""
        if VISION in self.module_names:
            for weight in self.wide_weights():
                unpack_weight(weight)
        return self

    @torch.no_grad()
    def quantise(self, keep: Sequence[str] = (), dtype: str = INT8, *, check: bool = True) -> Self:
        """Rounds the weights of linear layers to 8 bits, in place, for inference.

        In int8, which is for CPUs, these are the layers of the vision encoder, the universal layers, the text encoder,
        the fusion encoder and the decoder. In fp8 (e4m3), which is for GPUs, they are the same but for the text encoder
        and the decoder, of which only the projections of the visual tokens are rounded. Norms in front of them may be
        scaled, see `nn.quantise.smooth`. The other weights do not change: convert them with `to`. No parameter requires
        gradients afterwards.

        Args:
            keep: patterns of layers that are not rounded, such as `"decoder.*"` or `"visual.blocks.*.mlp"`. A pattern
                that matches a module stands for all of its layers.
            dtype: "int8" or "fp8", the format of the weights. check: whether a pattern that matches no layer is an
                error.

        Raises:
            ConfigError: the model is in training mode, is not on a CPU (int8), or has 8-bit weights already; or a
                pattern matches no layer.
        """
        if self.training:
            raise ConfigError("8-bit weights are for inference only: call eval() first")
        if self.quantisation is not None:
            raise ConfigError("the model has 8-bit weights already: load the original")
        if dtype not in FORMATS:
            raise ConfigError(f"weights cannot be rounded to {dtype}: choose from {', '.join(FORMATS)}")
        if (device := next(self.parameters()).device).type not in ("cpu", "meta") and dtype == INT8:
            raise ConfigError(f"int8 weights are for the CPU, and the model is on {device}: use fp8 or bfloat16")
        if check:
            require_matches(self, keep, dtype)
        for unit in units_of(self.unpack().requires_grad_(False), dtype):
            unit.quantise(keep)
        self.quantisation = Quantisation(dtype, tuple(keep))
        return self

    @property
    def precision(self) -> str:
        """The dtype of the parameters by name; with 8-bit weights, their format and the layers that are not rounded."""
        if self.quantisation is None:
            return str(next(self.parameters()).dtype).removeprefix("torch.")
        return str(self.quantisation)

    def train(self, mode: bool = True) -> Self:
        if mode and self.quantisation is not None:
            raise ConfigError(_NO_GRADIENTS)
        return super().train(mode)

    @property
    def cuda_graphs(self) -> bool:
        """Whether inference on a GPU is captured in CUDA graphs, from the second call with the same shapes on. Setting
        it to False drops the captured ones."""
        return self._graphs.enabled

    @cuda_graphs.setter
    def cuda_graphs(self, wanted: bool) -> None:
        self._graphs.enabled = wanted
        if not wanted:
            self._graphs.clear()

    def encode_visual(self, video: Tensor) -> Tensor:
        """Video `(B, 3, T, H, W)` to the vision encoder's tokens `(B, S, D)`, projected to the BERT width."""
        return self._encode(self._visual, video)

    def encode_video(self, video: Tensor) -> Tensor:
        """Video `(B, 3, T, H, W)`, normalised, any floating dtype, to image_embeds `(B, S, D)`, S = 1 + T'·L."""
        return self._encode(self._image_embeds, _checked(video))

    def encode_image(self, image: Tensor) -> Tensor:
        """Image `(B, 3, H, W)`, normalised, to image_embeds `(B, 1 + L, D)`: a video of one frame."""
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(f"image must be (batch, 3, height, width), got {tuple(image.shape)}")
        return self.encode_video(image[:, :, None])

    def fuse(self, text: Tensor, text_mask: Tensor, visual: Tensor) -> Fused:
        """Text `(B, tokens, D)` of `encode_text`, its mask `(B, tokens)`, and visual `(B, S, D)` of `encode_video`.

        Text and mask may have an axis of several texts for each visual input: `(B, texts, tokens, D)`. The result has
        it too.
        """
        visual, text = self.fusion(text, text_mask, visual)
        mask = torch.cat([text_mask.new_ones(visual.shape[:-1]), text_mask], dim=-1)
        return Fused(visual, text, torch.cat([visual, text], dim=-2), mask)

    @torch.no_grad()
    @in_eval_mode
    def generate(
        self,
        memory: Tensor,
        memory_mask: Tensor | None = None,
        *,
        num_beams: int | None = None,
        min_length: int = 1,
        max_length: int = 20,
        num_return: int = 1,
    ) -> GenerationOutput:
        """Texts by beam search.

        Args:
            memory: what the decoder attends to, `(B, tokens, D)`. memory_mask: `(B, tokens)`; None for no padding.
            num_beams: None takes the configuration's.
            min_length, max_length: tokens after [CLS], the end token included.
            num_return: texts per row, at most num_beams.
        """
        options = {"min_length": min_length, "max_length": max_length, "num_return": num_return}
        beams = self.config.generation.num_beams if num_beams is None else num_beams
        return self.search("generate", self.decoder.remember, [memory, memory_mask], num_beams=beams, **options)

    def search(
        self,
        name: str,
        remember: Callable[..., Memory],
        inputs: Sequence[Tensor | None],
        *,
        prefix: Sequence[int] | None = None,
        **options: int,
    ) -> GenerationOutput:
        """Beam search over the memory that `remember` makes of the inputs, as one program for CUDA graphs.

        Args:
            name: distinguishes programs whose inputs have the same shapes.
            remember: from the inputs to the decoder's memory.
            prefix: ids that every text starts with; None for [CLS] alone. Lengths do not count it.
            options: num_beams, num_return, min_length and max_length.
        """
        longest, positions = options["max_length"], self.config.text.max_position_embeddings
        if min(options["num_beams"], options["num_return"], longest) < 1:
            raise ValueError(f"num_beams, num_return and max_length must be at least 1, got {options}")
        start = (self.start_token_id,) if prefix is None else tuple(prefix)
        if len(start) + longest - 1 > positions:
            raise ValueError(
                f"max_length {longest} after {len(start)} tokens is more than the {positions} positions of the decoder"
            )
        tokens = {"start": start, "end_token_id": self.end_token_id}

        def program(*tensors: Tensor | None) -> Iterator[tuple[Tensor, Hypotheses]]:
            yield from beam_search(self.decoder, remember(*tensors), **tokens, **options)

        return output(self._graphs.run(self, (name, start, *options.values()), program, inputs, longest), start)

    def embed(self, video: Tensor | None, image_embeds: Tensor | None) -> Tensor:
        """image_embeds `(B, S, D)`, given or computed from the video."""
        if (video is None) == (image_embeds is None):
            raise ValueError("give either video or image_embeds")
        if image_embeds is None:
            return self._image_embeds(_checked(video))
        return image_embeds

    def _encode(self, function: Callable[[Tensor], Tensor], video: Tensor) -> Tensor:
        def program(video: Tensor) -> Iterator[tuple[None, tuple[Tensor]]]:
            yield None, (function(video),)

        (encoded,) = self._graphs.run(self, function.__name__, program, [video], 1)
        return encoded


def _checked(video: Tensor) -> Tensor:
    if video.ndim != 5 or video.shape[1] != 3:
        raise ValueError(f"video must be (batch, 3, frames, height, width), got {tuple(video.shape)}")
    return video
