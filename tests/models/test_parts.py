"""Parts of the fast models count, whatever changes or watches them: in training, generation and ranking."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

import mplug2_fast as mf
from mplug2_fast.nn import TemporalBlock
from mplug2_fast.nn.bert_layer import BertLayer
from tests.nn.changes import CALLS, replace
from tests.tiny import SMALL, random_text, random_video, randomise
from tests.tolerance import relative

KINDS = {"captioning": mf.MPlug2ForCaptioning, "question_answering": mf.MPlug2ForQuestionAnswering}
VIDEO = random_video(SMALL, batch=2)
TEXT, ANSWERS = random_text(SMALL, 2, 6), random_text(SMALL, 3, 5, seed=1)
# The width of the vision encoder is another, so that there is a projection.
CONFIG = SMALL.replace(width=128)


def make(task="captioning"):
    return randomise(KINDS[task](CONFIG))


def loss(model):
    if model.task == "captioning":
        return model(VIDEO, *TEXT)
    return model(VIDEO, *TEXT, *ANSWERS, [1, 2], torch.tensor([0.5, 1.0, 2.0]))


def generate(model):
    inputs = {} if model.task == "captioning" else {"question_ids": TEXT[0], "question_mask": TEXT[1]}
    return model.generate(VIDEO, num_beams=3, max_length=6, min_length=3, **inputs)


def outcomes(model):
    """The loss, scores of generated sequences, and those of ranked answers; and the sequences and ranks."""
    generated = generate(model)
    values, words = [loss(model).reshape(1), generated.scores.flatten()], [generated.sequences.tolist()]
    if model.task == "question_answering":
        ranks, probabilities = model.rank_answers(VIDEO, *TEXT, *ANSWERS, 3)
        values.append(probabilities.flatten())
        words.append(ranks.tolist())
    return torch.cat(values), words


def assert_same(actual, expected):
    torch.testing.assert_close(actual[0], expected[0], atol=1e-4, rtol=1e-4)
    assert actual[1] == expected[1]


def parts(model):
    """The names of all modules that are called; that of several is the first."""
    return [
        name for name, part in model.named_modules() if name and not isinstance(part, (nn.ModuleList, nn.ModuleDict))
    ]


def inner(model):
    """Those without modules inside."""
    return [name for name in parts(model) if not list(model.get_submodule(name).children())]


@pytest.mark.parametrize(
    ("task", "which", "kind"),
    [
        ("captioning", inner, "forward hook"),
        ("captioning", parts, "wrapper"),
        ("question_answering", inner, "wrapper"),
        ("question_answering", inner, "forward on the instance"),
        ("question_answering", parts, "forward hook"),
    ],
)
def test_every_part_is_called(task, which, kind):
    """With the innermost parts, generation caches keys and values; with all, whole sequences are decoded."""
    model = make(task)
    expected = outcomes(model)
    names, calls = which(model), []
    if kind == "wrapper":  # the model calls other methods of these two than their forward
        names = [name for name in names if name not in ("universal", "decoder")]
    for name in sorted(names, key=lambda name: -name.count(".")):
        CALLS[kind](model, name, calls)
    assert_same(outcomes(model), expected)
    for call in (loss, generate):
        calls.clear()
        call(model)
        assert set(calls) == set(names), call


def test_a_hook_that_is_removed_leaves_nothing():
    model = make()
    expected = outcomes(model)
    handles = [part.register_forward_hook(lambda part, given, result: 0 * result) for part in model.modules()]
    assert outcomes(model)[1] != expected[1] or not torch.equal(outcomes(model)[0], expected[0])
    for handle in handles:
        handle.remove()
    assert all(map(torch.equal, outcomes(model)[0], expected[0]))


@pytest.mark.parametrize(
    "name",
    [
        "visual.norm_pre",
        "visual.blocks.0",
        "visual.blocks.1.attn",
        "visual.blocks.1.mlp.c_fc",
        "visual.blocks.0.lmhra1.conv",
        "visual_projection",
        "visual_norm",
        "universal.layers.0.attention",
        "universal.layers.0.crossattention",
        "universal.layers.1.output.LayerNorm",
        "decoder.embeddings.position",
        "decoder.embeddings.token_type",
        "decoder.layers.0",
        "decoder.layers.0.attention.output.dense",
        "decoder.layers.1.crossattention",
        "decoder.layers.1.intermediate",
        "decoder.head",
        "decoder.head_norm",
    ],
)
def test_a_result_that_a_hook_replaces_counts(name):
    model = make()
    expected = outcomes(model)
    model.get_submodule(name).register_forward_hook(
        lambda part, given, result: result * torch.linspace(0.5, 1.5, result.shape[-1])
    )
    value, scores = outcomes(model)[0].split([1, len(expected[0]) - 1])
    assert relative(value, expected[0][:1].double()) > 1e-6
    assert relative(scores, expected[0][1:].double()) > 1e-6


class LowRank(nn.Module):
    """An adapter beside a layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, 3, bias=False)
        self.up = nn.Linear(3, layer.out_features, bias=False)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))

    def merged(self):
        with torch.no_grad():
            self.layer.weight += self.up.weight @ self.down.weight
        return self.layer


def linears(model):
    return [name for name, part in model.named_modules() if type(part) is nn.Linear]


def without_dropout(model):
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return model


def test_adapters_train_and_can_be_merged():
    model = make().requires_grad_(False)
    before, names = outcomes(model), linears(model)
    for name in names:
        torch.manual_seed(0)
        replace(model, name, LowRank(model.get_submodule(name)))
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.SGD(adapters, lr=0.01), []
    without_dropout(model).train()
    for _ in range(2):
        optimizer.zero_grad()
        found = loss(model)
        found.backward()
        optimizer.step()
        losses.append(found.item())
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in adapters)
    assert losses[1] < losses[0]
    adapted = outcomes(model.eval())
    assert relative(adapted[0], before[0].double()) > 1e-3
    for name in names:
        replace(model, name, model.get_submodule(name).merged())
    assert_same(outcomes(model), adapted)


def test_peft():
    peft = pytest.importorskip("peft")
    model = make()
    before = outcomes(model)
    wanted = ["c_fc", "c_proj", "out_proj", "dense", "head", "visual_projection", "position"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=wanted, init_lora_weights=False))
    found = adapted(VIDEO, *TEXT)
    found.backward()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.grad is not None for parameter in trained)
    with_adapters = outcomes(adapted.base_model.model)
    assert relative(with_adapters[0], before[0].double()) > 1e-3
    assert_same(outcomes(adapted.merge_and_unload()), with_adapters)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning")
def test_quantised_layers():
    """The quantised layers' weights, put back into ordinary layers, give nearly the same captions' scores."""
    model = make()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    with torch.no_grad():
        found = loss(quantised)
        for name in linears(model):
            model.get_submodule(name).weight.copy_(quantised.get_submodule(name).weight().dequantize())
        assert found.item() == pytest.approx(loss(model).item(), rel=0.02)
        assert generate(quantised).scores.isfinite().all()


def test_offloaded_parameters():
    """The weights are on the meta device except during calls of their modules."""
    accelerate = pytest.importorskip("accelerate")
    expected = outcomes(make("question_answering"))
    offloaded = accelerate.cpu_offload(make("question_answering"), execution_device="cpu")
    assert {parameter.device.type for parameter in offloaded.parameters()} == {"meta"}
    with torch.no_grad():
        assert_same(outcomes(offloaded), expected)


def test_checkpoint_wrappers():
    model, twin = (without_dropout(make("question_answering")).train() for _ in range(2))
    apply_activation_checkpointing(model, check_fn=lambda part: isinstance(part, (TemporalBlock, BertLayer)))
    for changed in (model, twin):
        loss(changed).backward()
    found = [parameter.grad for parameter in model.parameters()]
    for (name, parameter), gradient in zip(twin.named_parameters(), found, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-5, rtol=1e-4, msg=name)
    assert_same(outcomes(model.eval()), outcomes(twin.eval()))


@pytest.fixture
def mesh():
    """A mesh of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sharded_parts(mesh):
    """Parameters of a sharded part are whole only while it is called."""
    model, twin = (without_dropout(make()).train() for _ in range(2))
    for part in (*model.visual.blocks, *model.decoder.layers, *model.universal.layers):
        fully_shard(part, mesh=mesh)
    sharded = make()
    for part in (sharded.visual, sharded.universal, sharded.decoder):
        fully_shard(part, mesh=mesh)
    losses = [loss(model), loss(twin)]
    for found in losses:
        found.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for part, other in zip(model.parameters(), twin.parameters(), strict=True):
        gradient = part.grad.full_tensor() if hasattr(part.grad, "full_tensor") else part.grad
        torch.testing.assert_close(gradient, other.grad, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        expected = outcomes(twin.eval())
        assert_same(outcomes(model.eval()), expected)
        assert_same(outcomes(sharded), expected)
    whole = fully_shard(make(), mesh=mesh)
    register_fsdp_forward_method(whole, "generate")
    with torch.no_grad():
        assert_same(outcomes(whole), expected)


def test_norms_of_different_eps():
    """A step with one operator per layer has a single eps."""
    model = make()
    reference = randomise(mf.reference.MPlug2ForCaptioning(CONFIG))
    model.decoder.layers[0].crossattention.output.LayerNorm.eps = 0.5
    reference.text_decoder.bert.encoder.layer["0"].crossattention.output.LayerNorm.eps = 0.5
    torch.testing.assert_close(generate(model).scores, generate(reference).scores, atol=1e-4, rtol=1e-4)


def test_dropout_that_stays_on_in_evaluation_counts():
    """Dropout stays active, as for estimates of uncertainty."""
    model = randomise(mf.MPlug2ForCaptioning(CONFIG.replace(hidden_dropout_prob=0.5)))
    assert torch.equal(loss(model), loss(model))
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.train()
    assert loss(model) != loss(model)
    assert not torch.equal(generate(model).scores, generate(model).scores)


def test_ways_of_an_image():
    """A frame skips the temporal modules, a clip repeats the image, and a text may end before the universal layers."""
    model = randomise(mf.MPlug2(SMALL, ["question_answering"]))
    image = random_video(SMALL, frames=1)[:, :, 0]
    clip = image[:, :, None].expand(-1, -1, SMALL.vision.num_frames, -1, -1)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(image, "clip"), model.encode_video(clip))
        torch.testing.assert_close(model.encode_image(image), model.encode_video(image[:, :, None]))
        frame = model.encode_image(image, "frame")
        ids, mask = random_text(SMALL, 2, 5)
        before = model.encode_text(ids, mask, universal=False)
        shared = model.universal
        after = shared.layers[1](shared.layers[0](before, key_padding_mask=mask), key_padding_mask=mask)
        torch.testing.assert_close(after, model.encode_text(ids, mask))
        assert not torch.allclose(frame, model.encode_image(image), atol=1e-3)
        for block in model.visual.blocks:
            for module in (block.lmhra1, block.lmhra2):
                module.reset_parameters()  # the identity
        torch.testing.assert_close(frame, model.encode_image(image))
    with pytest.raises(ValueError, match="image_as must be single, clip or frame"):
        model.encode_image(image, "video")
