"""mPLUG: what the kinds `mplug_*` expect, computed by either implementation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import mplug2_fast as mf
from mplug2_fast.evaluation.recall import recalls
from mplug2_fast.nn.momentum import MomentumCopy
from mplug2_fast.tasks import grounding
from mplug2_fast.tasks.retrieval import MomentumContrast
from mplug2_fast.training.scst import weighted_loss
from tests.golden.cases import GoldenCase
from tests.golden.mplug_pictures import pictures_of

Quantities = dict[str, Tensor]
QUEUES = ("image_queue", "text_queue", "idx_queue", "queue_ptr")


class Adapter:
    """A model of either implementation, with the interface of the reference."""

    def __init__(self, case: GoldenCase, implementation: str, tasks: list[str]) -> None:
        description = case.description
        self.fast = implementation == "fast"
        self.case = case
        self.config = mf.MPlugConfig.from_official(
            bert=description["bert"], model=description["config"], clip=description["clip"]
        )
        self.model: Any = (mf.MPlug if self.fast else mf.reference.MPlug)(self.config, tasks).eval()
        mf.load_official(self.model, case.state_dict)

    def tower(self, video: Tensor) -> Tensor:
        if self.fast:
            return self.model.visual(video)
        batch = video.shape[0]
        tokens = self.model.visual_encoder.visual(video.transpose(1, 2).flatten(0, 1))
        return tokens.view(batch, -1, tokens.shape[-1])

    def text(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model.encode_text(ids, mask) if self.fast else self.model.text_encoder(ids, mask)

    def fuse(self, text: Tensor, mask: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.fuse(text, mask, visual)[:2]

    def features(self, visual: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        if self.fast:
            return self.model.visual_features(visual), self.model.text_features(text)
        return self.model.image_feature(visual), self.model.text_feature(text)

    @torch.no_grad()
    def beams(self, memory: Tensor, mask: Tensor | None, start: list[int] | None = None) -> Quantities:
        defaults = self.config.generation
        lengths = {"min_length": defaults.min_length, "max_length": defaults.max_length}
        beams = defaults.num_beams
        if self.fast:
            found = self.model.search(
                "golden",
                self.model.decoder.remember,
                [memory, mask],
                prefix=start,
                num_beams=beams,
                num_return=beams,
                **lengths,
            )
        else:
            found = self.model.search(memory, mask, num_beams=beams, start=start or [101], **lengths)
        return {"beam_ids": found.sequences, "beam_scores": found.scores}

    def memory(self, visual: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        if self.fast:
            return self.model.fuse(self.model.encode_text(ids, mask), mask, visual)[2:]
        return self.model.memory(visual, ids, mask)

    def rank(self, visual: Tensor, question: list[Tensor], k: int) -> Quantities:
        inputs = self.case.inputs
        answers = [inputs["answer_list_ids"], inputs["answer_list_mask"]]
        if self.fast:
            names = ("question_ids", "question_mask", "answer_ids", "answer_mask")
            given = dict(zip(names, [*question, *answers], strict=True))
            found = self.model.predict("answer_ranking", image_embeds=visual, **given, k=k)
        else:
            found = self.model.rank_answers(visual, *question, *answers, k)
        return {"rank_ids": found[0], "rank_probs": found[1]}

    def step(self, loss_of: Any, prefix: str = "") -> Quantities:
        """The loss and every gradient, without dropout."""
        model = self.model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0
        model.zero_grad(set_to_none=True)
        loss = loss_of()
        loss.backward()
        if self.fast:
            with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
            gradients = model.official_names.views(model, lambda parameter: parameter.grad, only=with_gradient)
        else:
            gradients = {name: grad for name, grad in model.official_gradients().items() if grad is not None}
        model.eval()
        return {f"{prefix}loss": loss.detach(), **{f"{prefix}grad:{name}": grad for name, grad in gradients.items()}}


def vqa(case: GoldenCase, implementation: str) -> Quantities:
    adapter = Adapter(case, implementation, ["question_answering", "answer_ranking"])
    model, inputs = adapter.model, case.inputs
    question = [inputs["question_ids"], inputs["question_mask"]]
    with torch.no_grad():
        computed = _seen(adapter) | _fused(adapter, *question)
        computed |= adapter.beams(*adapter.memory(computed["image_embeds"], *question))
        computed |= adapter.rank(computed["image_embeds"], question, case.expected["rank_ids"].shape[1])
        computed["resized_positions"] = _resized(case)
    targets = ("answer_ids", "answer_mask", "answers_per_question", "answer_weights")

    def loss() -> Tensor:
        if adapter.fast:
            names = ("question_ids", "question_mask", *targets)
            return model.loss("question_answering", {"video": case.video, **{name: inputs[name] for name in names}})
        visual = model.encode_video(case.video)
        return model.answer_loss(visual, *question, *(inputs[name] for name in targets))

    if case.description["config"].get("distill"):
        computed |= _momentum(case, adapter, without=("fusion",))
    return computed | adapter.step(loss) | pictures_of(case)


def captioning(case: GoldenCase, implementation: str) -> Quantities:
    adapter = Adapter(case, implementation, ["captioning"])
    model, inputs = adapter.model, case.inputs
    ids, mask = inputs["teacher_ids"], inputs["teacher_mask"]
    with torch.no_grad():
        computed = _seen(adapter)
        visual = computed["image_embeds"]
        if adapter.fast:
            logits = model.decoder(ids[:, None], mask[:, None], model.decoder.remember(visual))[:, 0]
        else:
            logits = model.text_decoder(ids, mask, visual, None)
        computed |= {"teacher_logits": logits, **adapter.beams(visual, None)}
    rewards = inputs["scst_rewards"]

    def scst() -> Tensor:
        visual, sequences = model.encode_video(case.video), computed["beam_ids"]
        if adapter.fast:
            return weighted_loss(model, model.decoder.remember(visual), sequences, rewards)
        return model.scst_loss(visual, sequences, rewards)

    computed |= adapter.step(scst, "scst_")
    return computed | adapter.step(lambda: _caption_loss(adapter)) | pictures_of(case)


def retrieval(case: GoldenCase, implementation: str) -> Quantities:
    adapter = Adapter(case, implementation, ["retrieval"])
    model, inputs, settings = adapter.model, case.inputs, case.description["config"]
    ids, mask, owner = inputs["text_ids"], inputs["text_mask"], inputs["text_image"]
    with torch.no_grad():
        computed = _seen(adapter)
        visual, text = computed["image_embeds"], adapter.text(ids, mask)
        image_feat, text_feat = adapter.features(visual, text)
        count = len(visual)
        fusion_image, fusion_text = adapter.fuse(text[:count], mask[:count], visual)
        head = model.matching if adapter.fast else model.itm_head
        computed |= {"text": text, "image_feat": image_feat, "text_feat": text_feat, "sims": image_feat @ text_feat.T}
        computed |= {"fusion_image": fusion_image, "fusion_text": fusion_text, "itm_logits": head(fusion_text[:, 0])}
    computed |= _scores(adapter, visual, ids, mask, owner, ("i2t", "t2i"), ("txt", "img"))
    train = inputs["train_image"]
    batch = {
        "video": case.video[train],
        "text_ids": inputs["train_text_ids"],
        "text_mask": inputs["train_text_mask"],
        "ids": inputs["train_idx"],
    }
    drawn = inputs["negative_image"], inputs["negative_text"]
    alpha, rate = settings["alpha"] if settings["distill"] else 0.0, settings["momentum"]
    queues = {name: case.state_dict[name].clone() for name in QUEUES}
    parts: Quantities = {}

    def loss() -> Tensor:
        if adapter.fast:
            state = MomentumContrast(model, settings["queue_size"], rate)
            _load_momentum(state.copy, case)
            state.load_state_dict(queues, strict=False)
            state.update(model)
            found = model.tasks["retrieval"].losses(model, batch, state=state, alpha=alpha, negatives=drawn)
            parts.update(loss_ita=found.contrast, loss_itm=found.matching)
            parts.update(negative_image_weights=found.image_weights, negative_text_weights=found.text_weights)
            parts.update({f"after:{name}": getattr(state, name) for name in QUEUES})
            parts.update({f"momentum:{name}": each for name, each in state.copy.official_parameters().items()})
            return found.total
        twin = _reference_twin(case, adapter, rate, parts)
        texts = batch["text_ids"], batch["text_mask"], batch["ids"]
        parts.update(model.retrieval_losses(batch["video"], *texts, twin, queues, alpha, drawn))
        return parts["loss_ita"] + parts["loss_itm"]

    gradients = adapter.step(loss)
    gradients.pop("loss")
    return computed | parts | gradients


def ground(case: GoldenCase, implementation: str) -> Quantities:
    adapter = Adapter(case, implementation, ["grounding"])
    model, inputs = adapter.model, case.inputs
    text = [inputs["text_ids"], inputs["text_mask"]]
    targets = inputs["target_boxes"]
    with torch.no_grad():
        computed = _seen(adapter) | _fused(adapter, *text)
        visual = computed["image_embeds"]
        if adapter.fast:
            found = model.predict("grounding", image_embeds=visual, text_ids=text[0], text_mask=text[1])
            boxes, ids, logits = found.boxes, found.ids, found.logits
        else:
            boxes, ids, logits = model.ground(visual, *text)
        overlaps = grounding.iou(grounding.corners(boxes).clamp(0, 1), grounding.corners(targets))
        hits = (overlaps >= 0.5).sum()
    computed |= {"boxes": boxes, "box_ids": ids, "bin_logits": logits, "iou": overlaps}
    computed |= {"hits": hits, "accuracy": hits.float() / len(targets)}

    def loss() -> Tensor:
        if adapter.fast:
            batch = {"text_ids": text[0], "text_mask": text[1], "target_boxes": targets}
            return model.loss("grounding", {"video": case.video, **batch})
        return model.grounding_loss(model.encode_video(case.video), *text, targets)

    return computed | adapter.step(loss) | pictures_of(case)


def video(case: GoldenCase, implementation: str) -> Quantities:
    adapter = Adapter(case, implementation, ["captioning", "question_answering", "answer_ranking", "retrieval"])
    inputs = case.inputs
    text_ids, text_mask = inputs["text_ids"], inputs["text_mask"]
    question = [inputs["question_ids"], inputs["question_mask"]]
    with torch.no_grad():
        computed = _seen(adapter)
        visual = computed.pop("image_embeds")
        computed["visual"] = computed["visual"].unflatten(1, (case.video.shape[2], -1))
        features = adapter.features(visual, adapter.text(text_ids, text_mask))
        computed |= {"video_embeds": visual, "video_feat": features[0], "text_feat": features[1]}
        computed["sims"] = features[0] @ features[1].T
        computed["qa_memory"] = adapter.memory(visual, *question)[0]
    owner = torch.arange(len(text_ids))
    computed |= _scores(adapter, visual, text_ids, text_mask, owner, ("v2t", "t2v"), ("txt", "vid"))
    computed |= adapter.rank(visual, question, case.description["rank_k"])
    computed |= adapter.beams(visual, None, inputs["prompt_ids"][:-1].tolist())
    found = adapter.step(lambda: _caption_loss(adapter))
    return computed | {"caption_loss": found.pop("loss"), **found}


def _seen(adapter: Adapter) -> Quantities:
    video = adapter.case.video
    return {"visual": adapter.tower(video), "image_embeds": adapter.model.encode_video(video)}


def _fused(adapter: Adapter, ids: Tensor, mask: Tensor) -> Quantities:
    text = adapter.text(ids, mask)
    fusion_image, fusion_text = adapter.fuse(text, mask, adapter.model.encode_video(adapter.case.video))
    return {"text": text, "fusion_image": fusion_image, "fusion_text": fusion_text}


def _caption_loss(adapter: Adapter) -> Tensor:
    model, case = adapter.model, adapter.case
    ids, mask = case.inputs["caption_ids"], case.inputs["caption_mask"]
    if adapter.fast:
        return model.loss("captioning", {"video": case.video, "caption_ids": ids, "caption_mask": mask})
    return model.caption_loss(model.encode_video(case.video), ids, mask)


def _scores(
    adapter: Adapter,
    visual: Tensor,
    ids: Tensor,
    mask: Tensor,
    owner: Tensor,
    ways: tuple[str, str],
    sides: tuple[str, str],
) -> Quantities:
    """The scores of both directions, and the metrics."""
    model, k = adapter.model, adapter.case.description["config"]["k_test"]
    if adapter.fast:
        found = model.predict("retrieval", image_embeds=visual, text_ids=ids, text_mask=mask, k=k)
        scores = found.by_visual, found.by_text
    else:
        add = adapter.config.frames_of(visual.shape[1]) > 1
        scores = model.retrieval_scores(visual, ids, mask, k, add_similarity=add)
    texts_of = owner == torch.arange(len(visual))[:, None]
    to_text, to_visual = recalls(scores[0], texts_of), recalls(scores[1], texts_of.T)
    metrics = {}
    for side, found in zip(sides, (to_text, to_visual), strict=True):
        metrics |= {f"{side}_r{cutoff}": found[f"recall@{cutoff}"] for cutoff in (1, 5, 10)}
        metrics[f"{side}_r_mean"] = found["recall_mean"]
    metrics["r_mean"] = (to_text["recall_mean"] + to_visual["recall_mean"]) / 2
    if "vid" in sides:
        metrics["vid_mdR"] = to_visual["median_rank"]
    named = {f"metric:{name}": torch.tensor(value, dtype=torch.float64) for name, value in metrics.items()}
    return {f"scores_{ways[0]}": scores[0], f"scores_{ways[1]}": scores[1], **named}


def _resized(case: GoldenCase) -> Tensor:
    """The position embedding, resized by loading for another image size."""
    description = case.description
    config = mf.MPlugConfig.from_official(
        bert=description["bert"],
        model=description["config"] | {"image_res": description["resize_to"]},
        clip=description["clip"],
    )
    model = mf.MPlug(config, ["captioning"])
    mf.load_official(model, case.state_dict)
    return model.official_parameters()["visual_encoder.visual.positional_embedding"]


def _load_momentum(copy: MomentumCopy, case: GoldenCase) -> None:
    for name, view in copy.official_parameters().items():
        view.copy_(case.state_dict[name])


def _momentum(case: GoldenCase, adapter: Adapter, without: tuple[str, ...]) -> Quantities:
    rate = case.description["config"].get("momentum", 0.995)
    if adapter.fast:
        copy = MomentumCopy(adapter.model, without=without, momentum=rate)
        _load_momentum(copy, case)
        copy.update(adapter.model)
        return {f"momentum:{name}": view for name, view in copy.official_parameters().items()}
    found: Quantities = {}
    _reference_twin(case, adapter, rate, found, without)
    return found


def _reference_twin(
    case: GoldenCase,
    adapter: Adapter,
    rate: float,
    found: Quantities,
    without: tuple[str, ...] = ("fusion", "itm_head", "text_decoder"),
) -> Any:
    """A reference model with the momentum weights of the case after an update, which go into `found`."""
    twin = mf.reference.MPlug(adapter.config, list(adapter.model.tasks))
    own = adapter.model.official_parameters()
    for name, parameter in twin.official_parameters().items():
        stored = "_m.".join(name.split(".", 1))
        if "." in name and not name.startswith(without):
            parameter.copy_(rate * case.state_dict[stored] + (1 - rate) * own[name])
            found[f"momentum:{stored}"] = parameter
    for module in twin.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return twin.requires_grad_(False)


KINDS = {
    "mplug_vqa": vqa,
    "mplug_caption": captioning,
    "mplug_retrieval": retrieval,
    "mplug_grounding": ground,
    "mplug_video": video,
}
