"""How often frames find their captions, and captions their frames."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from examples.proofs.unseen import CAPTIONS, NAMES, UNSEEN, held_out
from mplug2_fast.tasks import ZeroShot
from mplug2_fast.text import Tokenizer
from mplug2_fast.training import Sample
from mplug2_fast.training.data import video_of


@torch.inference_mode()
def features(model: Any, tokenizer: Tokenizer, samples: list[Sample]) -> tuple[Tensor, Tensor, Tensor]:
    """Features of the frames `(frames, dim)` and of all captions `(48, dim)`, and the caption of each frame."""
    visual = []
    for start in range(0, len(samples), 100):
        video = video_of(samples[start : start + 100], model.config.vision.image_size)
        visual.append(model.visual_features(model.encode_video(video)))
    ids, mask = model.config.wording.descriptions(tokenizer, CAPTIONS, video=False, training=False)
    right = torch.tensor([CAPTIONS.index(sample.item.caption[0]) for sample in samples])
    return torch.cat(visual), model.text_features(model.encode_text(ids, mask)), right


def frames_first(similarities: Tensor, right: Tensor, asked: list[int]) -> float:
    """The share of captions for which a frame of theirs is first in a gallery with one frame of each caption.

    Args:
        similarities: `(frames, captions)`. right: `(frames,)`. asked: the captions that are scored.

    Each frame is in one gallery. As many galleries are made as there are frames of the rarest caption.
    """
    of_each = [(right == i).nonzero()[:, 0] for i in range(len(CAPTIONS))]
    count = min(map(len, of_each))
    galleries = torch.stack([found[:count] for found in of_each], dim=1)  # (galleries, captions)
    best = similarities[galleries].argmax(dim=1)  # (galleries, captions)
    return float((best[:, asked] == torch.tensor(asked)).float().mean())


def score(model: Any, tokenizer: Tokenizer) -> tuple[float, dict[str, float]]:
    """Recall at 1 of captions of unseen pairs among all 48, and further scores."""
    samples = held_out(model.config)
    visual, text, right = features(model, tokenizer, samples)
    similarities = visual @ text.T
    new = torch.isin(right, torch.tensor(UNSEEN))
    hit = (similarities.argmax(dim=1) == right).float()
    names = ZeroShot([NAMES[i] for i in UNSEEN], templates=("a {}",)).label_features(model, tokenizer)
    named = torch.tensor(UNSEEN)[(visual[new] @ names.T).argmax(dim=1)]
    return float(hit[new].mean()), {
        "frames_by_captions": frames_first(similarities, right, UNSEEN),
        f"classes_by_names_among_{len(UNSEEN)}": float((named == right[new]).float().mean()),
        "captions_of_trained_pairs": float(hit[~new].mean()),
    }
