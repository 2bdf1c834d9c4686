"""Features of PyTorch and of the libraries around it. Each row of docs/torch.md names its test here.

A test gives the subject and its plain PyTorch twin the same treatment and compares results and gradients.
"""

import contextlib
import copy
import io
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import mplug2_fast as mf
from tests.torch.subjects import BLOCKS, SUBJECTS, Ours, Plain

PAGE = Path(__file__).parents[2] / "docs" / "torch.md"


@pytest.fixture(params=SUBJECTS)
def subject(request):
    return SUBJECTS[request.param]


@pytest.fixture(params=BLOCKS)
def block(request):
    return BLOCKS[request.param]


def close(actual, expected, tolerance=2e-5):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def results(model, x, call=None):
    """The result, the gradient of x, and the parameters' gradients by name, of a fixed projection of the result."""
    model.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_()
    out = (model if call is None else call)(x)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype))
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return out.detach(), x.grad, named


def assert_same(ours, twin, tolerance=2e-5):
    """Compares results and gradients, those of parameters if both models have the name."""
    close(ours[0], twin[0], tolerance)
    close(ours[1], twin[1], tolerance)
    scale = max((float(g.abs().max()) for g in twin[2].values()), default=1.0)
    for name in ours[2].keys() & twin[2].keys():
        close(ours[2][name] / scale, twin[2][name] / scale, tolerance)


def both(subject, treat):
    """The results of `treat(model, x)` for the subject and for its twin."""
    ours, twin = subject.make()
    return treat(ours, subject.inputs(0)), treat(twin, subject.inputs(0))


def both_by_formula(subject, treat):
    """As `both`, with the twin's attention as plain operations: some derivatives and the FLOPs of PyTorch's CPU kernel
    are missing."""
    ours, twin = subject.make()
    needs = subject is BLOCKS["accelerated"]
    with sdpa_kernel(SDPBackend.MATH) if needs else contextlib.nullcontext():
        found = treat(ours, subject.inputs(0))
    with sdpa_kernel(SDPBackend.MATH):
        return found, treat(twin, subject.inputs(0))


# --- compilers


def test_compile(subject):
    ours, twin = subject.make()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_same(results(ours, subject.inputs(0), compiled), results(twin, subject.inputs(0)))
    with torch.no_grad():
        close(compiled(subject.inputs(1)), twin(subject.inputs(1)))
    torch.compiler.reset()


def test_compile_dynamic(block):
    ours, twin = block.make()
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="eager")
    with torch.no_grad():
        for tokens in (10, 100, 17):
            x = block.inputs(0)[:, :tokens]
            close(compiled(x), twin(x))
    torch.compiler.reset()


def test_export(subject):
    ours, twin = subject.make()
    x = subject.inputs(0)
    with torch.no_grad():
        program = torch.export.export(ours, (x,))
        close(program.module()(x), twin(x))
    torch.compiler.reset()


def test_trace(subject):
    ours, twin = subject.make()
    with torch.no_grad():
        traced = torch.jit.trace(ours, subject.inputs(0))
        close(traced(subject.inputs(1)), twin(subject.inputs(1)))


# --- derivatives


def loss_of(model):
    return lambda parameters, x: functional_call(model, parameters, (x,)).square().sum()


def parameters_of(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def test_func_grad(block):
    ours, twin = both(block, lambda m, x: grad(loss_of(m))(parameters_of(m), x))
    for name in twin:
        close(ours[name], twin[name], 2e-2)
        assert (ours[name] - twin[name]).norm() <= 1e-4 * twin[name].norm() + 1e-3


def test_func_vmap(block):
    def per_sample(model, x):
        return vmap(grad(loss_of(model)), (None, 0))(parameters_of(model), x[:, None, :4])

    ours, twin = both(block, per_sample)
    for name in twin:
        assert (ours[name] - twin[name]).norm() <= 1e-4 * twin[name].norm() + 1e-3


def test_func_jvp(block):
    ours, twin = both_by_formula(block, lambda m, x: jvp(m, (x,), (torch.ones_like(x),)))
    close(ours[0], twin[0])
    close(ours[1], twin[1], 2e-4)


def test_func_second_order(block):
    """Hessians and Jacobians, forward over reverse."""

    def second(model, x):
        few = x[:1, :2]
        direction = torch.ones(8)

        def along(t):
            moved = few + torch.nn.functional.pad(t, (0, few.shape[-1] - 8))
            return model(moved).square().sum()

        return hessian(along)(0 * direction), jacrev(along)(0 * direction)

    ours, twin = both_by_formula(block, second)
    close(ours[0], twin[0], 1e-2)
    close(ours[1], twin[1], 1e-2)


def test_double_backward(block):
    def penalty(model, x):
        x = x[:, :7].clone().requires_grad_()
        (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        model.zero_grad()
        first.norm().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    ours, twin = both_by_formula(block, penalty)
    assert ours.keys() == twin.keys()
    for name in twin:
        assert (ours[name] - twin[name]).norm() <= 1e-4 * twin[name].norm() + 1e-4, name


def test_checkpointing(subject):
    for reentrant in (False, True):
        ours, twin = subject.make()
        again = lambda x, model=ours, kind=reentrant: checkpoint(model, x, use_reentrant=kind)  # noqa: E731
        assert_same(results(ours, subject.inputs(0), again), results(twin, subject.inputs(0)))


def test_saved_tensor_hooks(subject):
    ours, twin = subject.make()
    with torch.autograd.graph.save_on_cpu():
        found = results(ours, subject.inputs(0))
    assert_same(found, results(twin, subject.inputs(0)))


def test_inference_mode(subject):
    ours, twin = subject.make()
    with torch.inference_mode():
        close(ours(subject.inputs(0)), twin(subject.inputs(0)))


# --- precision


def test_autocast(subject):
    ours, twin = subject.make()
    exact = twin(subject.inputs(0)).detach()
    with torch.autocast("cpu", torch.bfloat16):
        found = results(ours, subject.inputs(0))
        expected = results(twin, subject.inputs(0))
    assert found[2]
    assert all(g.dtype == torch.float32 for g in found[2].values())
    assert (found[0] - exact).norm() <= 2 * (expected[0] - exact).norm() + 2e-3 * exact.norm()


def test_gradient_scaler(subject):
    ours, twin = subject.make()
    for model in (ours, twin):
        scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=256.0), torch.optim.SGD(model.parameters(), lr=0.01)
        scaler.scale(model(subject.inputs(0)).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    close(ours(subject.inputs(1)), twin(subject.inputs(1)), 1e-4)


# --- weights that change


OPTIMIZERS = {
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "fused SGD": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
}


def fill_gradients(model):
    for index, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(index)
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(subject, name):
    ours, _ = subject.make()
    for _ in range(2):
        with torch.no_grad():
            ours(subject.inputs(0))
        fill_gradients(ours)
        OPTIMIZERS[name](ours.parameters()).step()
        assert_current(subject, ours)


def assert_current(subject, model):
    """Checks that the model uses its current weights, by comparison with a new model with the same weights."""
    fresh, _ = subject.make()
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        close(model(subject.inputs(1)), fresh(subject.inputs(1)))


WRITES = {
    "data.copy_": lambda p, value: p.data.copy_(value),
    "data assigned": lambda p, value: setattr(p, "data", value),
    "numpy": lambda p, value: p.detach().numpy().__setitem__(..., value.numpy()),
    "dlpack": lambda p, value: torch.from_dlpack(p.detach()).copy_(value),
    "storage": lambda p, value: p.untyped_storage().copy_(value.clone().untyped_storage()),
}


@pytest.mark.parametrize("write", WRITES)
def test_ema(subject, write):
    """Weights are swapped for their average and back, without the version counter."""
    ours, _ = subject.make()
    average = AveragedModel(ours, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(ours)
    fill_gradients(ours)
    torch.optim.SGD(ours.parameters(), lr=0.05).step()
    average.update_parameters(ours)
    own = [p.detach().clone() for p in ours.parameters()]
    averaged = [p.detach().clone() for p in average.module.parameters()]
    for values in (averaged, own, averaged):
        with torch.no_grad():
            ours(subject.inputs(0))
        for parameter, value in zip(ours.parameters(), values, strict=True):
            WRITES[write](parameter, value.clone())
        assert_current(subject, ours)


# --- parts that are changed


def treated(change):
    """A treatment that changes the block's parts and then computes results and gradients."""

    def run(model, x):
        torch.manual_seed(3)
        model = change(model) or model
        return results(model, x)

    return run


def test_hooks(block):
    def run(model, x):
        seen = []
        model.mlp.c_fc.register_forward_hook(lambda *_: seen.append("forward"))
        model.mlp.c_proj.register_forward_pre_hook(lambda *_: seen.append("before"))
        model.norm.register_full_backward_hook(lambda *_: seen.append("backward"))
        model.mlp.c_proj.register_forward_hook(lambda module, inputs, out: 2 * out)
        return results(model, x), seen

    (ours, seen), (twin, expected) = both(block, run)
    assert seen == expected
    assert_same(ours, twin)


CHANGES = {
    "pruning": lambda m: prune.l1_unstructured(m.mlp.c_fc, "weight", 0.5) and None,
    "spectral norm": lambda m: parametrizations.spectral_norm(m.mlp.c_fc) and None,
    "weight norm": lambda m: parametrizations.weight_norm(m.mlp.c_proj) and None,
    "orthogonal": lambda m: parametrizations.orthogonal(m.attn.out_proj) and None,
    "old weight norm": lambda m: torch.nn.utils.weight_norm(m.mlp.c_fc) and None,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_parametrisations(block, change):
    if change == "orthogonal" and block is BLOCKS["accelerated"]:
        pytest.skip("nn.MultiheadAttention reads out_proj.weight once more in its own fast path")
    assert_same(*both(block, treated(CHANGES[change])), 1e-4)


def test_replaced_parts(block):
    class Scaled(nn.Linear):
        def forward(self, x):
            return 3 * super().forward(x)

    def change(model):
        old = model.mlp.c_proj
        model.mlp.c_proj = Scaled(old.in_features, old.out_features)
        model.mlp.c_proj.load_state_dict(old.state_dict())

    assert_same(*both(block, treated(change)))


@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantisation(block):
    def run(model, x):
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        with torch.no_grad():
            return quantised(x)

    ours, twin = both(block, run)
    # The twin's output projection is one that PyTorch leaves alone, and accelerated layers keep their precision.
    assert (ours - twin).norm() <= 0.03 * twin.norm()


def test_peft(block):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["c_fc", "c_proj"], init_lora_weights=False)

    def run(model, x):
        with torch.no_grad():
            plain = model(x)
        torch.manual_seed(5)
        adapted = peft.get_peft_model(model, config)
        found = results(adapted.base_model.model, x)
        with torch.no_grad():
            merged = adapted.merge_and_unload()(x)
        return found, plain, merged

    (ours, plain, merged), (twin, *_) = both(block, run)
    assert_same(ours, twin)
    assert any("lora" in name for name in ours[2])
    assert not torch.allclose(ours[0], plain, atol=1e-2)
    close(merged, twin[0], 1e-4)


@pytest.mark.parametrize("first", [True, False], ids=["before accelerate", "after"])
def test_torchao(first):
    quantisation = pytest.importorskip("torchao.quantization")
    ours, twin = SUBJECTS["modules"].make()
    fast = copy.deepcopy(twin)
    for model in (ours, twin):
        quantisation.quantize_(model, quantisation.Int8WeightOnlyConfig())
    for treat in (
        lambda: quantisation.quantize_(fast, quantisation.Int8WeightOnlyConfig()),
        lambda: mf.accelerate(fast),
    )[:: 1 if first else -1]:
        treat()
    x = SUBJECTS["modules"].inputs(0)
    with torch.no_grad():
        for rows in (x, x[:1, :3]):
            expected = twin(rows)
            close(fast(rows), expected, 1e-4)
            # torchao leaves the output projection of the twin's attention alone, and quantises ours.
            assert (ours(rows) - expected).norm() <= 0.01 * expected.norm()


# --- devices, copies, counts


def test_meta(block):
    ours, _ = block.make()
    ours.to("meta")
    x = block.inputs(0).to("meta")
    assert ours(x).shape == x.shape
    with torch.no_grad(), torch.device("meta"):
        assert (Ours() if block is BLOCKS["modules"] else Plain())(x).shape == x.shape


def test_fake_tensors(subject):
    ours, twin = subject.make()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert ours(mode.from_tensor(subject.inputs(0))).shape == twin(mode.from_tensor(subject.inputs(0))).shape


def test_copies(subject):
    ours, twin = subject.make()
    x = subject.inputs(0)
    with torch.no_grad():
        expected = twin(x)
        close(ours(x), expected)
        close(copy.deepcopy(ours)(x), expected)
        buffer = io.BytesIO()
        torch.save(ours, buffer)
        buffer.seek(0)
        close(torch.load(buffer, weights_only=False)(x), expected)


def test_flop_counter(block):
    def count(model, x):
        x = x.clone().requires_grad_()
        with FlopCounterMode(display=False) as forward:
            model(x)
        with FlopCounterMode(display=False) as training:
            model(x).sum().backward()
        return forward.get_total_flops(), training.get_total_flops()

    ours, twin = both_by_formula(block, count)
    assert ours == twin


def test_names_and_signatures():
    import inspect

    fast, plain = SUBJECTS["accelerated"].make()
    for module, original in zip(fast.modules(), plain.modules(), strict=True):
        assert type(module).__name__ == type(original).__name__
        assert inspect.signature(module.forward) == inspect.signature(original.forward)


# --- distributed, on one rank


@pytest.fixture
def one_rank(monkeypatch):
    """A process group with one process."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def train_and_evaluate(model, inputs, steps=3):
    """Losses of evaluations between steps of SGD."""
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.05), []
    for step in range(steps):
        with torch.no_grad():
            found.append(model(inputs(step)).square().mean().detach().clone())
        model(inputs(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(found)


def test_ddp(subject, one_rank):
    ours, twin = subject.make()
    wrapped = nn.parallel.DistributedDataParallel(ours, find_unused_parameters=True)
    close(train_and_evaluate(wrapped, subject.inputs), train_and_evaluate(twin, subject.inputs), 1e-4)


def test_fsdp2(subject, one_rank):
    from torch.distributed.fsdp import fully_shard

    ours, twin = subject.make()
    for module in list(ours.modules())[::-1]:
        if isinstance(module, (nn.MultiheadAttention, nn.Sequential, mf.nn.MLP, mf.nn.SelfAttention)):
            fully_shard(module, mesh=one_rank)
    fully_shard(ours, mesh=one_rank)
    close(train_and_evaluate(ours, subject.inputs), train_and_evaluate(twin, subject.inputs), 1e-4)


def test_tensor_parallel(block, one_rank):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    ours, twin = block.make()
    plan = {"mlp.c_fc": ColwiseParallel(), "mlp.c_proj": RowwiseParallel()}
    parallelize_module(ours, one_rank, plan)
    with torch.no_grad():
        close(ours(block.inputs(0)), twin(block.inputs(0)))
    close(train_and_evaluate(ours, block.inputs), train_and_evaluate(twin, block.inputs), 1e-4)


# --- transformers


def test_trainer(tmp_path):
    """Three steps of transformers' Trainer, with its default optimizer, and an evaluation after each."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 50, (64, 12), generator=generator)
    rows = [{"input_ids": row, "attention_mask": torch.ones(12, dtype=torch.long), "labels": row[0] % 2} for row in ids]
    losses = []
    for fast in (False, True):
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(config)
        if fast:
            mf.accelerate(model)
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=64,
            eval_strategy="steps",
            eval_steps=1,
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            seed=0,
            disable_tqdm=True,
            logging_strategy="no",
            save_strategy="no",
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        losses.append(torch.tensor([entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]))
    assert len(losses[0]) == 3
    close(losses[1], losses[0], 1e-4)


# --- the page


def test_the_page_lists_exactly_these_tests():
    rows = set(re.findall(r"\| `(test_\w+)` \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    tests = {name for name, value in globals().items() if name.startswith("test_") and callable(value)}
    assert rows == tests - {"test_the_page_lists_exactly_these_tests"}
