"""mPLUG-2 for captioning and for question answering."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mplug2_fast.generation.beam_search import Hypotheses, beam_search, output
from mplug2_fast.generation.cuda_graphs import CudaGraphRunner
from mplug2_fast.models.mplug2 import official_names
from mplug2_fast.models.mplug2.config import CLS_TOKEN_ID, PAD_TOKEN_ID, SEP_TOKEN_ID, MPlug2Config, Task
from mplug2_fast.models.mplug2.encoders import FusionEncoder, TextEncoder, UniversalLayers
from mplug2_fast.modes import in_eval_mode
from mplug2_fast.nn import MLP, LayerNorm, LocalTemporal, SelfAttention
from mplug2_fast.nn.layer_norm import norm_of_sum
from mplug2_fast.nn.parts import linear, plain
from mplug2_fast.nn.text_decoder import Memory, TextDecoder
from mplug2_fast.nn.vision_transformer import VisionTransformer
from mplug2_fast.ops import pack_weight, unpack_weight
from mplug2_fast.outputs import GenerationOutput

if TYPE_CHECKING:
    from typing_extensions import Self

BEFORE_LAST = slice(None, -1)
"""The positions of a sequence that predict another token of it."""


class _MPlug2(nn.Module):
    """What both tasks share: the video side, the decoder, generation.

    Args:
        config: sizes. device, dtype: of the parameters; `device="meta"` allocates nothing.
    """

    task: Task

    def __init__(
        self, config: MPlug2Config, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self._graphs = CudaGraphRunner()
        text = config.text
        self.dropout = nn.Dropout(text.hidden_dropout_prob)
        device = torch.get_default_device() if device is None else torch.device(device)
        with torch.device("meta"):
            self.visual = VisionTransformer(config.vision)
            self.visual_projection = self.visual_projection_norm = None
            if config.vision.width != text.hidden_size:
                self.visual_projection = nn.Linear(config.vision.width, text.hidden_size)
                self.visual_projection_norm = LayerNorm(text.hidden_size, eps=1e-12)
            self.visual_norm = LayerNorm(text.hidden_size, eps=1e-12)
            self.universal = UniversalLayers(text)
            if self.task == "question_answering":
                self.text = TextEncoder(text)
                self.fusion = FusionEncoder(text)
            self.decoder = TextDecoder(text, text.text_decode_layers)
        self.to(dtype=dtype or torch.get_default_dtype())
        if device.type != "meta":
            self.to_empty(device=device)
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh weights: normal with `initializer_range`, norms one, biases zero, temporal modules the identity."""
        std = self.config.text.initializer_range
        for module in self.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim > 1 or "embedding" in name:
                    parameter.normal_(std=std)
                else:
                    parameter.zero_()
            if isinstance(module, nn.LayerNorm):
                module.weight.fill_(1.0)
        for block in self.visual.blocks:
            for temporal in (block.lmhra1, block.lmhra2):
                temporal.reset_parameters()

    def released_parameters(self) -> dict[str, Tensor]:
        """Released key to a view into this model's parameters, detached: for exactly the keys that the task uses."""
        return dict(official_names.model(self, Tensor.detach))

    def released_gradients(self) -> dict[str, Tensor]:
        """Released key to a view of the gradient. Every parameter must have one."""
        return dict(official_names.model(self, lambda parameter: parameter.grad))

    def wide_weights(self) -> Iterator[nn.Parameter]:
        """The vision encoder's weights: five sixths of the products are theirs, with all visual tokens at once."""
        yield self.visual.patch_weight
        for module in self.visual.modules():
            layers: tuple[nn.Module, ...] = ()
            if isinstance(module, SelfAttention):
                yield module.in_proj_weight
                layers = (module.out_proj,)
            elif isinstance(module, MLP):
                layers = (module.c_fc, module.c_proj)
            elif isinstance(module, LocalTemporal):
                layers = (module.down_proj, module.up_proj)
            yield from (layer.weight for layer in layers if plain(layer))

    def pack(self) -> Self:
        """Keeps copies of the vision encoder's weights in the layout of the CPU's matrix products, for inference.

        These weights (half of the captioning model's) take their memory twice then. `state_dict()` does not change.
        Weights may change afterwards in any way: each product compares a checksum, and packs a weight again that has
        changed. On other devices than a CPU nothing is packed.
        """
        vision = self.config.vision
        for weight in self.wide_weights():
            pack_weight(weight, vision.num_frames * (1 + vision.num_patches))
        return self

    def unpack(self) -> Self:
        """Drops what `pack` keeps."""
        for weight in self.wide_weights():
            unpack_weight(weight)
        return self

    @property
    def cuda_graphs(self) -> bool:
        """Whether inference on a GPU is captured in CUDA graphs, from the second call with the same shapes on. False
        drops those that there are."""
        return self._graphs.enabled

    @cuda_graphs.setter
    def cuda_graphs(self, wanted: bool) -> None:
        self._graphs.enabled = wanted
        if not wanted:
            self._graphs.clear()

    def encode_visual(self, video: Tensor) -> Tensor:
        """Video `(B, 3, T, H, W)` to the vision encoder's tokens `(B, S, D)`, brought to the BERT width."""
        return self._encode(self._visual, video)

    def encode_video(self, video: Tensor) -> Tensor:
        """Video `(B, 3, T, H, W)`, normalised, any floating dtype, to image_embeds `(B, S, D)`, S = 1 + T'·L."""
        return self._encode(self._image_embeds, _checked(video))

    def _encode(self, function: Callable[[Tensor], Tensor], video: Tensor) -> Tensor:
        def program(video: Tensor) -> Iterator[tuple[None, tuple[Tensor]]]:
            yield None, (function(video),)

        (encoded,) = self._graphs.run(self, function.__name__, program, [video], 1)
        return encoded

    def _visual(self, video: Tensor) -> Tensor:
        x = self.visual(video)
        if self.visual_projection is not None:
            x = self.dropout(self.visual_projection_norm(linear(self.visual_projection, x)))
        return x

    def _image_embeds(self, video: Tensor) -> Tensor:
        x = self._visual(video)
        return self.dropout(norm_of_sum(self.visual_norm, x, self.universal(x)))

    def _embeds(self, video: Tensor | None, image_embeds: Tensor | None) -> Tensor:
        if (video is None) == (image_embeds is None):
            raise ValueError("give either video or image_embeds")
        if image_embeds is None:
            return self._image_embeds(_checked(video))
        return image_embeds

    def _generate(
        self,
        remember: Callable[..., Memory],
        inputs: Sequence[Tensor | None],
        num_beams: int | None,
        min_length: int | None,
        max_length: int | None,
        num_return: int,
    ) -> GenerationOutput:
        defaults, text = self.config.generation, self.config.text
        low, high = defaults.lengths(self.task)
        num_beams = defaults.num_beams if num_beams is None else num_beams
        min_length = low if min_length is None else min_length
        max_length = high if max_length is None else max_length
        if num_beams < 1 or num_return < 1 or max_length < 1:
            raise ValueError(
                f"num_beams, num_return and max_length must be at least 1, got {num_beams}, {num_return}, {max_length}"
            )
        if max_length > text.max_position_embeddings:
            raise ValueError(
                f"max_length {max_length} is more than the {text.max_position_embeddings} positions of the decoder"
            )
        options = {
            "start_token_id": CLS_TOKEN_ID,
            "end_token_id": SEP_TOKEN_ID,
            "num_beams": num_beams,
            "min_length": min_length,
            "max_length": max_length,
            "num_return": num_return,
        }

        def program(*tensors: Tensor | None) -> Iterator[tuple[Tensor, Hypotheses]]:
            yield from beam_search(self.decoder, remember(*tensors), **options)

        return output(self._graphs.run(self, ("generate", *options.values()), program, inputs, max_length))


def _checked(video: Tensor) -> Tensor:
    if video.ndim != 5 or video.shape[1] != 3:
        raise ValueError(f"video must be (batch, 3, frames, height, width), got {tuple(video.shape)}")
    return video


def shifted_labels(input_ids: Tensor, prompt_tokens: int = 0) -> Tensor:
    """Targets `(..., tokens - 1)` of teacher forcing. Padding and the first `prompt_tokens` after [CLS] are ignored."""
    labels = input_ids[..., 1:].long()
    labels = labels.masked_fill(labels == PAD_TOKEN_ID, -100)
    labels[..., :prompt_tokens] = -100
    return labels


class MPlug2ForCaptioning(_MPlug2):
    """Video to caption: vision encoder, universal layers, decoder; nothing else is built."""

    task: Task = "captioning"

    def forward(
        self,
        video: Tensor | None,
        caption_ids: Tensor,
        caption_mask: Tensor,
        *,
        image_embeds: Tensor | None = None,
    ) -> Tensor:
        """Training loss: the mean cross-entropy over the targets. All tokens of the prompt but the last are ignored.

        Args:
            video: `(B, 3, T, H, W)`, or None with image_embeds `(B, S, D)` from `encode_video`.
            caption_ids, caption_mask: `(B, tokens)`; from [CLS] on, mask 1 for tokens and 0 for padding.
        """
        memory = self.decoder.remember(self._embeds(video, image_embeds))
        logits = self.decoder(caption_ids[:, None], caption_mask[:, None], memory, positions=BEFORE_LAST)[:, 0]
        labels = shifted_labels(caption_ids, self.config.generation.prompt_tokens)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    @torch.no_grad()
    @in_eval_mode
    def generate(
        self,
        video: Tensor | None = None,
        *,
        image_embeds: Tensor | None = None,
        num_beams: int | None = None,
        min_length: int | None = None,
        max_length: int | None = None,
        num_return: int = 1,
    ) -> GenerationOutput:
        """Captions by beam search; what is None has the configuration's default.

        Args:
            video: `(B, 3, T, H, W)`, or image_embeds `(B, S, D)` from `encode_video`.
            min_length, max_length: tokens after [CLS], the end token included.
        """
        return self._generate(self._remember, [video, image_embeds], num_beams, min_length, max_length, num_return)

    def _remember(self, video: Tensor | None, image_embeds: Tensor | None) -> Memory:
        return self.decoder.remember(self._embeds(video, image_embeds))


class MPlug2ForQuestionAnswering(_MPlug2):
    """Video and question to answer: all of the captioning model, text encoder and fusion encoder."""

    task: Task = "question_answering"

    def captioner(self) -> MPlug2ForCaptioning:
        """A captioning model that shares this model's parameters."""
        model = MPlug2ForCaptioning(self.config, device="meta")
        model.visual, model.visual_norm, model.universal = self.visual, self.visual_norm, self.universal
        model.visual_projection = self.visual_projection
        model.visual_projection_norm = self.visual_projection_norm
        model.decoder = self.decoder
        model.dropout = self.dropout
        return model.train(self.training)

    def _remember(
        self, video: Tensor | None, question_ids: Tensor, question_mask: Tensor, image_embeds: Tensor | None = None
    ) -> Memory:
        """The decoder's memory of [fusion visual; fusion text]."""
        visual = self._embeds(video, image_embeds)
        text = self.text(question_ids, question_mask, self.universal)
        visual, text = self.fusion(text, question_mask, visual)
        mask = torch.cat([question_mask.new_ones(visual.shape[:2]), question_mask], dim=1)
        return self.decoder.remember(torch.cat([visual, text], dim=1), mask)

    def forward(
        self,
        video: Tensor | None,
        question_ids: Tensor,
        question_mask: Tensor,
        answer_ids: Tensor,
        answer_mask: Tensor,
        answers_per_question: Tensor | Sequence[int],
        answer_weights: Tensor,
        *,
        image_embeds: Tensor | None = None,
    ) -> Tensor:
        """Training loss: each answer's summed cross-entropy times its weight, summed, over the number of videos.

        Args:
            video: `(B, 3, T, H, W)`, or None with image_embeds `(B, S, D)` from `encode_video`.
            question_ids, question_mask: `(B, tokens)`.
            answer_ids, answer_mask: `(A, tokens)`, the answers of all questions one after another.
            answers_per_question: `(B,)`, summing to A. answer_weights: `(A,)`.
        """
        memory = self._remember(video, question_ids, question_mask, image_embeds)
        batch = question_ids.shape[0]
        counts = torch.as_tensor(answers_per_question, device=answer_ids.device)
        owner = torch.arange(batch, device=answer_ids.device).repeat_interleave(counts)
        if owner.shape[0] != answer_ids.shape[0]:
            raise ValueError(f"answers_per_question sums to {owner.shape[0]}, there are {answer_ids.shape[0]} answers")
        if answer_ids.shape[0] != batch:
            memory = memory.select(owner)
        logits = self.decoder(answer_ids[:, None], answer_mask[:, None], memory, positions=BEFORE_LAST)[:, 0]
        logits = logits.transpose(1, 2).float()
        losses = F.cross_entropy(logits, shifted_labels(answer_ids), reduction="none").sum(dim=1)
        return (losses * answer_weights).sum() / batch

    @torch.no_grad()
    @in_eval_mode
    def generate(
        self,
        video: Tensor | None = None,
        *,
        question_ids: Tensor,
        question_mask: Tensor,
        image_embeds: Tensor | None = None,
        num_beams: int | None = None,
        min_length: int | None = None,
        max_length: int | None = None,
        num_return: int = 1,
    ) -> GenerationOutput:
        """Answers by beam search; what is None has the configuration's default.

        Args:
            video: `(B, 3, T, H, W)`, or image_embeds `(B, S, D)` from `encode_video`.
            question_ids, question_mask: `(B, tokens)`, mask 1 for tokens and 0 for padding.
            min_length, max_length: tokens after [CLS], the end token included.
        """
        inputs = [video, question_ids, question_mask, image_embeds]
        return self._generate(self._remember, inputs, num_beams, min_length, max_length, num_return)

    @torch.no_grad()
    @in_eval_mode
    def rank_answers(
        self,
        video: Tensor | None,
        question_ids: Tensor,
        question_mask: Tensor,
        answer_ids: Tensor,
        answer_mask: Tensor,
        k: int,
        *,
        image_embeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The k likeliest of the given answers: (indices, probabilities among the k), each `(B, k)`, best first.

        Args:
            video: `(B, 3, T, H, W)`, or None with image_embeds `(B, S, D)` from `encode_video`.
            question_ids, question_mask: `(B, tokens)`. answer_ids, answer_mask: `(A, tokens)`, from [CLS] on.
            k: how many, by the probability of their first token, are scored in full. At most A.
        """
        if not 1 <= k <= answer_ids.shape[0]:
            raise ValueError(f"k must be from 1 to the number of answers {answer_ids.shape[0]}, got {k}")
        memory = self._remember(video, question_ids, question_mask, image_embeds)
        start = question_ids.new_full((question_ids.shape[0], 1, 1), CLS_TOKEN_ID)
        first = self.decoder(start, torch.ones_like(start), memory)[:, 0, 0]
        top_probs, top = first.float().softmax(dim=-1)[:, answer_ids[:, 1]].topk(k, dim=-1)

        ids = answer_ids[top]  # (B, k, tokens): the candidates of a video share its memory
        logits = self.decoder(ids, answer_mask[top], memory, positions=BEFORE_LAST).float().permute(0, 3, 1, 2)
        nll = F.cross_entropy(logits, shifted_labels(ids), reduction="none").sum(dim=-1)
        probs, order = (top_probs.log() - nll).softmax(dim=-1).sort(dim=-1, descending=True)
        return top.gather(1, order), probs
