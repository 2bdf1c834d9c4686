import pytest
import torch

from mplug2_fast import ops
from mplug2_fast.ops.decoder_layer import LINEAR, PARTS
from tests.ops.suite import OpSuite


class TestSpecification(OpSuite):
    operator = ops.decoder_layer


def public(given):
    """Makes the function's arguments from the operator's."""
    parts = {part: (given[f"{part}_weight"], given[f"{part}_bias"]) for part in PARTS}
    if given["qkv_scale"] is not None:
        parts |= {part: (*parts[part], given[f"{part}_scale"]) for part in LINEAR}
    others = {name: value for name, value in given.items() if not name.endswith(("_weight", "_bias", "_scale"))}
    scales = {name: given[name] for name in ("memory_key_scale", "memory_value_scale")}
    return {**parts, **others, **scales}


@pytest.fixture
def given():
    return ops.decoder_layer.op.spec.inputs({"batch": 2, "beams": 3, "length": 4, "step": 2, "keys": 9, "masked": True})


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_only_the_newest_position_is_written(given, backend, native_module):
    before = {name: given[name].clone() for name in ("keys", "values", "ancestors")}
    with ops.use_backend(backend):
        ops.decoder_layer(**public(given))
    for name, was in before.items():
        new = given[name]
        changed = (new != was).movedim(-1 if name == "ancestors" else 2, 0).flatten(1).any(dim=1)
        assert not changed[[0, 1, 3]].any()
    assert not torch.equal(given["keys"], before["keys"])
    assert torch.equal(given["ancestors"][:, 2], torch.arange(6, dtype=torch.int32))


def test_many_rows_go_to_one_operator_each(native_module):
    spec = ops.decoder_layer.op.spec
    sizes = {"batch": 13, "beams": 5, "length": 2, "step": 1, "keys": 5}
    explanation = ops.explain(ops.decoder_layer, **public(spec.inputs(sizes)))
    assert explanation.chosen != "cpu"
    assert "65 rows" in explanation.reasons["cpu"][0]
    assert ops.explain(ops.decoder_layer, **public(spec.inputs({**sizes, "batch": 12}))).chosen == "cpu"


def test_8_bit_weights_have_no_limit_of_rows(native_module):
    sizes = {"batch": 13, "beams": 5, "length": 2, "step": 1, "keys": 5, "int8": True}
    assert ops.explain(ops.decoder_layer, **public(ops.decoder_layer.op.spec.inputs(sizes))).chosen == "cpu"


def test_bad_scales():
    sizes = {"batch": 1, "beams": 3, "length": 2, "step": 1, "keys": 5, "int8": True}
    arguments = public(ops.decoder_layer.op.spec.inputs(sizes))
    weight, bias, scale = arguments["fc"]
    for change, kind, error in (
        ((weight, bias), ValueError, "either all linear layers have a scale or none: fc"),
        ((weight.float(), bias, scale), TypeError, "fc must have a scale if its weight is int8, and only then"),
        ((weight, bias, scale.double()), TypeError, r"the scale of fc must be \(48,\) in float32"),
        ((weight, bias, scale[1:]), TypeError, r"the scale of fc must be \(48,\) in float32, got \(47,\)"),
    ):
        with pytest.raises(kind, match=error):
            ops.decoder_layer(**{**arguments, "fc": change})


def test_under_autocast_operators_choose_their_types(given):
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.explain(ops.decoder_layer, **public(given)).chosen != "cpu"
        narrow = ops.decoder_layer(**public(given))
    wide = ops.decoder_layer(**public(given))
    assert narrow.dtype == torch.float32  # the residuals'
    assert not torch.equal(narrow, wide)
    torch.testing.assert_close(narrow, wide, atol=0.1, rtol=0.1)


def test_an_ancestor_that_is_no_row_is_refused(given, native_module):
    given["ancestors"][4, 1] = 6
    for operator, arguments in (
        (ops.decoder_layer, public(given)),
        (
            ops.step_attention,
            {
                **dict.fromkeys(("query", "key", "value"), given["keys"][:, :, 0]),
                **{name: given[name] for name in ("keys", "values", "ancestors", "step")},
            },
        ),
    ):
        with ops.use_backend("cpu"), pytest.raises(ValueError, match="ancestor is not one of the rows"):
            operator(**arguments)


def test_bad_arguments(given):
    for name, change, error in (
        ("x", lambda t: t[0], "x must be"),
        ("x", lambda t: t[..., :7], "x must have heads·head_dim channels, got 7"),
        ("memory_key", lambda t: t[:1], "memory_key and memory_value"),
        ("qkv", lambda pair: (pair[0][:32], pair[1]), "qkv must have shapes"),
        ("proj", lambda pair: (pair[0], pair[1][:3]), "proj must have shapes"),
        ("key_padding_mask", lambda t: t[:, :3], "key_padding_mask must be"),
        ("activation", lambda _: "relu", "activation is 'relu'"),
        ("keys", lambda t: t[:2], "keys and values"),
        ("step", lambda _: 4, "step must be from 0 to 3, got 4"),
    ):
        arguments = public(given)
        with pytest.raises(ValueError, match=error):
            ops.decoder_layer(**{**arguments, name: change(arguments[name])})
    with pytest.raises(TypeError, match="int32"):
        ops.decoder_layer(**{**public(given), "ancestors": given["ancestors"].long()})
