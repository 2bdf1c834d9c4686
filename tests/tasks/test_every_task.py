"""What holds for the head of every task: gradients of the reference, compilation, rows by themselves, files."""

import pytest
import torch
from torch.nn import functional as F

import mplug2_fast as mf
from mplug2_fast.reference import MPlug, MPlug2ForCaptioning, MPlug2ForPreTraining, MPlug2ForQuestionAnswering
from mplug2_fast.reference.clip import ClipText
from mplug2_fast.reference.decoder import shifted_labels
from mplug2_fast.reference.retrieval import Retrieval
from mplug2_fast.tasks import PRETRAINING, TASKS, Classification, Regression
from mplug2_fast.tasks.features import SPACES
from mplug2_fast.tasks.matching import matched
from mplug2_fast.tasks.retrieval import MomentumContrast
from mplug2_fast.tasks.text_generation import cut
from tests.models.test_mplug import SMALL as MPLUG
from tests.tiny import SMALL, random_text, randomise

CONFIG = SMALL.replace(
    vocab_size=700, clip={"token_width": 64, "token_layers": 1, "token_heads": 1, "joint_dim": 32, "bpe_size": 99}
)
CLASSES = [Classification(["no", "yes", "maybe"], on, on) for on in ("visual", "text", "fused", "two_images")]
EVERY = {task.name: task for task in (*TASKS.values(), *PRETRAINING.values(), *CLASSES, Regression("text", "number"))}
PLACES = torch.tensor([2, 3, 1])
BOXES = torch.tensor([[0.5, 0.5, 0.3, 0.2], [0.3, 0.6, 0.4, 0.4], [0.7, 0.2, 0.1, 0.3]])
CLIP_IDS = torch.tensor([[97, 1, 2, 3, 98], [97, 4, 5, 98, 0], [97, 6, 98, 0, 0]])


class Twin(Retrieval, MPlug2ForPreTraining):
    """The reference with all heads. In place of videos it also takes their tokens."""

    memory, box_logits = MPlug.memory, MPlug.box_logits

    def encode_video(self, video):
        return video if video.dim() == 3 else super().encode_video(video)


@pytest.fixture(scope="module")
def model():
    return randomise(mf.MPlug2(CONFIG, list(EVERY.values())))


@pytest.fixture(scope="module")
def double():
    return randomise(mf.MPlug2(CONFIG, list(EVERY.values()))).double()


@pytest.fixture(scope="module")
def twin():
    return randomise(Twin(CONFIG)).double()


def batch_of(model, name):
    """Three rows for a task, whose texts have 7, 6 and 5 tokens."""
    (ids, mask), (answers, answers_mask) = random_text(CONFIG, 3, 7), random_text(CONFIG, 3, 6, seed=1)
    labels = torch.where((torch.arange(7) % 3 == 1) & mask.bool(), ids, -100) if "mlm" in name else torch.arange(3)
    batch = {f"{what}_ids": ids for what in ("text", "caption", "question")}
    batch |= {f"{what}_mask": mask for what in ("text", "caption", "question")}
    batch |= {"answer_ids": answers, "answer_mask": answers_mask, "answers_per_question": torch.ones(3).long()}
    batch |= {"answer_weights": torch.tensor([1.0, 0.5, 2.0]), "target_boxes": BOXES, "labels": labels}
    batch |= {"clip_ids": CLIP_IDS, "ids": torch.arange(3)}
    if EVERY[name].reads_files:
        size = model.config.vision.image_size
        batch["video"] = torch.randn(3, 3, 2, size, size, generator=torch.Generator().manual_seed(0))
        batch["video"] = batch["video"].to(next(model.parameters()).dtype)
    return batch


def tokens_of(model, task, batch):
    """The batch with the tokens of its videos, which are `(B, 2, S, D)` for two images."""
    if "video" not in batch:
        return batch
    with torch.no_grad():
        tokens = task.encode(model, batch["video"])
    tokens = torch.stack([tokens, tokens.flip(0)], dim=1) if task.num_files == 2 else tokens
    return {name: each for name, each in batch.items() if name != "video"} | {"image_embeds": tokens}


def outputs(model, task, batch):
    """What the head of a task gives, row by row."""
    text = {name: batch[name] for name in ("text_ids", "text_mask")}
    if "image_embeds" in batch:
        text["image_embeds"] = batch["image_embeds"]
    if hasattr(task, "logits"):
        return task.logits(model, batch)
    if task.name == "grounding":
        return task.predict(model, **text).logits
    if task.name == "retrieval":
        states = model.encode_text(text["text_ids"], text["text_mask"])
        pairs = matched(model, text["image_embeds"], states[:, None], text["text_mask"][:, None])[:, 0]
        similarities = model.visual_features(text["image_embeds"]) * model.text_features(states)
        return torch.cat([pairs, similarities], dim=1)
    if task.name == "clip":
        return SPACES["clip"].visual(model, batch["image_embeds"]) * model.clip.text(batch["clip_ids"])
    return task.predict(model, **text)


@torch.no_grad()
def test_heads_compile_as_one_graph(model):
    """Encoders and decoder are compiled with whole models."""
    words, two_images = model.text.embeddings.word.weight, EVERY["two_images"]

    def heads(visual, text, clip_ids):
        features = model.visual_features(visual), model.text_features(text), model.clip.text(clip_ids)
        classes = [head(text[:, 0]) for head in (*model.heads.values(), model.matching)]
        marked = two_images._both(model, None, torch.stack([visual, visual], dim=1))
        return [*features, *classes, marked, model.text_mlm(text, words), model.fusion_mlm(text, words)]

    batch = batch_of(model, "retrieval")
    inputs = model.encode_video(batch["video"]), model.encode_text(batch["text_ids"], batch["text_mask"]), CLIP_IDS
    compiled = torch.compile(heads, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), heads(*inputs), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("family", ["mPLUG-2", "mPLUG"])
def test_a_row_does_not_depend_on_the_others(model, family, name):
    """Nor on the padding of its texts."""
    task = EVERY[name]
    if family == "mPLUG":
        if not MPLUG.has_modules_for(task):
            pytest.skip("mPLUG has no such modules")
        model = randomise(mf.MPlug(MPLUG, [task]))
    batch = tokens_of(model, task, batch_of(model, name))
    together = outputs(model, task, batch)
    for row in range(3):
        alone = {name: each[row : row + 1] for name, each in batch.items()}
        for kind in ("text", "caption", "question", "answer"):
            length = int(alone[f"{kind}_mask"].sum())
            alone |= {f"{kind}_{part}": alone[f"{kind}_{part}"][:, :length] for part in ("ids", "mask")}
        alone["clip_ids"] = alone["clip_ids"][:, : 5 - row]
        found = outputs(model, task, alone)[0]
        torch.testing.assert_close(found, together[row, : len(found)], rtol=1e-4, atol=1e-4)


def loss_of_twin(twin, name, batch, visual, head):
    """The loss as the reference computes it. `visual` are the tokens of the videos, `head` the parameters of a head."""
    text, answers = (batch["text_ids"], batch["text_mask"]), (batch["answer_ids"], batch["answer_mask"])
    if name == "captioning":
        return MPlug2ForCaptioning.forward(twin, visual, *text)
    if name in ("question_answering", "answer_ranking"):
        rest = batch["answers_per_question"], batch["answer_weights"]
        return MPlug2ForQuestionAnswering.forward(twin, visual, *text, *answers, *rest)
    if name == "text_generation":
        logits = twin.text_decoder(*answers, twin.text_encoder(*text), batch["text_mask"])
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), shifted_labels(answers[0]), reduction="none")
        return (losses.sum(dim=1) * batch["answer_weights"]).sum() / 3
    if name == "grounding":
        return MPlug.grounding_loss(twin, visual, *text, batch["target_boxes"])
    if "mlm" in name:
        return twin.masked_loss(visual, *text, batch["labels"])
    if "prefix" in name:
        return twin.prefix_loss(visual, *cut(*text, PLACES))
    if name == "visual":
        pooled = visual[:, 0]
    elif name in ("text", "number"):
        pooled = twin.text_encoder(*text)[:, 0]
    else:
        if name == "two_images":
            visual = torch.cat([visual[:, n] + head["types"][n] for n in (0, 1)], dim=1)
        pooled = twin.fuse(twin.text_encoder(*text), text[1], visual)[1][:, 0]
    weight, bias = (next(each for key, each in head.items() if key.endswith(kind)) for kind in ("weight", "bias"))
    logits = F.linear(pooled, weight, bias)
    if name == "number":
        return (logits[:, 0] - batch["labels"]).square().mean()
    return F.cross_entropy(logits, batch["labels"])


def close(found, expected):
    """Targets of the reference have the precision of float32."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", [name for name in EVERY if name not in ("clip", "retrieval")])
def test_gradients_are_those_of_the_reference(double, twin, name):
    task, batch = EVERY[name], batch_of(double, name)
    batch = tokens_of(double, task, batch)
    visual, options = batch.get("image_embeds"), {"places": PLACES} if "prefix" in name else {}
    copy = None if visual is None else visual.requires_grad_().detach().clone().requires_grad_()
    head = {}
    if name in double.heads:
        named = double.heads[name].named_parameters()
        head = {key: each.detach().clone().requires_grad_() for key, each in named}
    for each in (double, twin):
        each.zero_grad()
    found = double.loss(name, batch, **options)
    expected = loss_of_twin(twin, name, batch, copy, head)
    found.backward()
    expected.backward()
    close(found, expected)
    if visual is not None:
        close(visual.grad, copy.grad)
    for key, parameter in head.items():
        close(double.heads[name].get_parameter(key).grad, parameter.grad)
    if name != "visual":  # it has no parameters after the visual tokens but those of its head
        compare_gradients(double, twin)


def gradients_of(model):
    """By official name; zero for parameters that have none."""
    return model.official_names.views(model, lambda each: torch.zeros_like(each) if each.grad is None else each.grad)


def compare_gradients(double, twin):
    ours = gradients_of(double)
    theirs = {key: each for key, each in twin.official_gradients().items() if each is not None and key in ours}
    assert len(theirs) > 20
    close({key: ours[key] for key in theirs}, theirs)


def test_gradients_of_retrieval(double, twin):
    batch = batch_of(double, "retrieval")
    state = MomentumContrast(double, queue_size=6)
    queues = {name: queue.clone() for name, queue in state.named_buffers() if "queue" in name and "." not in name}
    negatives = torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1])
    inputs = batch["video"], batch["text_ids"], batch["text_mask"], batch["ids"]
    for each in (double, twin):
        each.zero_grad()
    expected = twin.retrieval_losses(*inputs, twin, queues, 0.4, negatives)
    found = double.tasks["retrieval"].losses(double, batch, state=state, alpha=0.4, negatives=negatives)
    close((found.contrast, found.matching), (expected["loss_ita"], expected["loss_itm"]))
    found.total.backward()
    (expected["loss_ita"] + expected["loss_itm"]).backward()
    compare_gradients(double, twin)


def test_gradients_of_clip(double):
    batch = batch_of(double, "clip")
    twin = ClipText(CONFIG.clip, CONFIG.vision.width).double()
    named = {key.removeprefix("visual_encoder."): each for key, each in double.official_parameters().items()}
    twin.load_state_dict({key: named[key] for key in twin.state_dict()})
    double.zero_grad()
    found = double.loss("clip", batch)
    logits = twin(double.visual(batch["video"])[:, 0].detach(), batch["clip_ids"])
    expected = (F.cross_entropy(logits, batch["ids"]) + F.cross_entropy(logits.T, batch["ids"])) / 2
    found.backward()
    expected.backward()
    close(found, expected)
    ours = gradients_of(double)
    for key, parameter in twin.named_parameters():
        close(ours[f"visual_encoder.{key}"], parameter.grad)


@torch.no_grad()
def test_a_file_gives_every_task_back(model, tmp_path):
    mf.checkpoint.save_pretrained(model, tmp_path / "saved")
    found = mf.checkpoint.inspect(tmp_path / "saved")
    assert (found.ok, found.tasks) == (True, tuple(EVERY))
    loaded = mf.from_pretrained(tmp_path / "saved")
    for name, task in loaded.tasks.items():
        batch = tokens_of(model, task, batch_of(model, name))
        torch.testing.assert_close(outputs(loaded, task, batch), outputs(model, task, batch), rtol=1e-4, atol=1e-5)
    for name in ("two_images", "number", "clip"):
        assert mf.from_pretrained(tmp_path / "saved", task=name).module_names == model.modules_of(name)
