"""mPLUG-2: what the kinds `caption` and `qa` expect, computed by either implementation."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn

import mplug2_fast as mf
from tests.golden.cases import GoldenCase

Quantities = dict[str, Tensor]


def caption(case: GoldenCase, implementation: str) -> Quantities:
    model = build(case, implementation, "MPlug2ForCaptioning")
    with torch.no_grad():
        computed = _video_side(model, case)
        ids, mask, embeds = case.inputs["teacher_ids"], case.inputs["teacher_mask"], computed["image_embeds"]
        if implementation == "fast":
            computed["teacher_logits"] = model.decoder(ids[:, None], mask[:, None], model.decoder.remember(embeds))[
                :, 0
            ]
        else:
            computed["teacher_logits"] = model.text_decoder(ids, mask, embeds, None)
    return computed | _beams(model, case) | _training_step(model, case, ["caption_ids", "caption_mask"])


def question_answering(case: GoldenCase, implementation: str) -> Quantities:
    model = build(case, implementation, "MPlug2ForQuestionAnswering")
    ids, mask = question = [case.inputs["question_ids"], case.inputs["question_mask"]]
    with torch.no_grad():
        computed = _video_side(model, case)
        embeds = computed["image_embeds"]
        if implementation == "fast":
            text = model.text(ids, mask, model.universal)
            fusion_image, fusion_text = model.fusion(text, mask, embeds)
        else:
            text = model.text_encoder(ids, mask)
            fusion_image, fusion_text = model.fusion_encoder(text, mask, embeds, mask.new_ones(embeds.shape[:2]))
    answers = [case.inputs["answer_list_ids"], case.inputs["answer_list_mask"]]
    k = min(_columns(case, "rank_ids"), answers[0].shape[0])
    rank_ids, rank_probs = model.rank_answers(case.video, *question, *answers, k=k)
    computed |= {"text": text, "fusion_image": fusion_image, "fusion_text": fusion_text}
    computed |= {"rank_ids": rank_ids, "rank_probs": rank_probs}
    targets = ["answer_ids", "answer_mask", "answers_per_question", "answer_weights"]
    computed |= _beams(model, case, question_ids=ids, question_mask=mask)
    return computed | _training_step(model, case, ["question_ids", "question_mask", *targets])


def build(case: GoldenCase, implementation: str, class_name: str) -> nn.Module:
    """The model in eval mode with the case's weights."""
    library: ModuleType = mf if implementation == "fast" else mf.reference
    description = case.description
    config = mf.MPlug2Config.from_official(
        bert=description["bert"], model=description["config"], clip=description["clip"]
    )
    model = getattr(library, class_name)(config).eval()
    mf.load_official(model, case.state_dict)
    return model


def _video_side(model: nn.Module, case: GoldenCase) -> Quantities:
    fast = hasattr(model, "universal")
    visual = (model.visual if fast else model.visual_encoder.visual)(case.video)
    universal = (model.universal if fast else model.text_encoder.v_module)(model.encode_visual(case.video))
    return {"visual": visual, "universal": universal, "image_embeds": model.encode_video(case.video)}


def _beams(model: nn.Module, case: GoldenCase, **question: Tensor) -> Quantities:
    out = model.generate(case.video, **question, num_return=_columns(case, "beam_ids"))
    return {"beam_ids": out.sequences, "beam_scores": out.scores}


def _columns(case: GoldenCase, name: str) -> int:
    """How many results per video the case expects; 1 if it has none."""
    shape = case.expected[name].shape if name in case.expected else ()
    return shape[1] if len(shape) > 1 and shape[1] else 1


def _training_step(model: nn.Module, case: GoldenCase, inputs: list[str]) -> Quantities:
    """The loss and every gradient, without dropout."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    loss = model(case.video, *(case.inputs[name] for name in inputs))
    loss.backward()
    gradients = {name: gradient for name, gradient in model.official_gradients().items() if gradient is not None}
    return {"loss": loss, **{f"grad:{key}": gradient for key, gradient in gradients.items()}}


KINDS = {"caption": caption, "qa": question_answering}
