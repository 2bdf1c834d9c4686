"""BERT attention and BERT layers, post-norm, under the names that BERT's checkpoints gave them.

Implementations differ in the arguments and results of these modules. The names of arguments tell what those are; trials
tell what is returned, and what their modes do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mplug2_fast.acceleration import trial
from mplug2_fast.acceleration.basic import ACTIVATIONS, run_mlp
from mplug2_fast.acceleration.cache import Call
from mplug2_fast.acceleration.masks import Mask, understand
from mplug2_fast.acceleration.products import product
from mplug2_fast.acceleration.steps import decode
from mplug2_fast.acceleration.structure import (
    Signature,
    dropout_of,
    has,
    require,
    require_children,
    require_dropout,
    require_linear,
    require_norm,
)
from mplug2_fast.acceleration.swap import Kind, State, Unserved, Unsuitable
from mplug2_fast.ops import add_layer_norm, attention_with_dropout, layer_norm
from mplug2_fast.ops.linear_act import Activation


class Projections:
    """An attention module `self` and `output`, as functions of tensors."""

    def __init__(self, attention: Any) -> None:
        self.inner, self.output = attention.self, attention.output
        self.heads = _heads(self.inner)

    def _project(self, linear: nn.Linear, x: Tensor) -> Tensor:
        return product(x, linear.weight, linear.bias).unflatten(-1, (self.heads, -1))

    def query(self, x: Tensor) -> Tensor:
        """`(batch, tokens, channels)` to `(batch, tokens, heads, head_dim)`."""
        return self._project(self.inner.query, x)

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._project(self.inner.key, x), self._project(self.inner.value, x)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
        return attention_with_dropout(
            query, key, value, dropout_of(self.inner), key_padding_mask=mask.visible, causal=mask.causal
        )

    def finish(self, context: Tensor, residual: Tensor) -> Tensor:
        """The projection of what was attended to, residual, layer norm."""
        return add_norm(self.output, residual, product, context, self.output.dense.weight, self.output.dense.bias)


def add_norm(output: Any, residual: Tensor, sublayer: Any, *args: Any) -> Tensor:
    """layer_norm(residual + dropout(sublayer(*args))), where a sublayer can add the residual itself."""
    norm, dropout = output.LayerNorm, dropout_of(output)
    if dropout > 0:
        update = F.dropout(sublayer(*args), dropout)
        return add_layer_norm(residual.to(update.dtype), update, norm.weight, norm.bias, eps=norm.eps)
    return layer_norm(sublayer(*args, residual=residual), norm.weight, norm.bias, eps=norm.eps)


def _heads(inner: nn.Module) -> int:
    return int(getattr(inner, "num_attention_heads", getattr(inner, "num_heads", 0)))


def require_bert_attention(module: nn.Module, name: str) -> None:
    """Raises `Unsuitable` where the parts of an attention module are not those of BERT."""
    attention = module.get_submodule(name)
    prefix = f"{name}." if name else ""
    for part in ("self.query", "self.key", "self.value", "output.dense"):
        require_linear(module, prefix + part)
    require_norm(module, f"{prefix}output.LayerNorm")
    inner, output = attention.self, attention.output
    kind = getattr(inner, "position_embedding_type", None) or "absolute"
    require(kind == "absolute", f"{prefix}self has relative position embeddings ({kind})")
    require_children(inner, {"query", "key", "value", "dropout"})  # type: ignore[arg-type]
    require_children(output, {"dense", "LayerNorm", "dropout"})  # type: ignore[arg-type]
    for part in (inner, output):
        require_dropout(part)  # type: ignore[arg-type]
    heads = _heads(inner)  # type: ignore[arg-type]
    require(heads > 0, f"{prefix}self does not tell its number of heads")
    require(inner.query.weight.shape[0] % heads == 0, f"{prefix}self has heads that do not divide its channels")


def _require_unsaved(attention: Any) -> None:
    if getattr(attention.self, "save_attention", False):
        raise Unserved("it saves its attention (save_attention)")


# --- what a module returns


def result_forms(out: Tensor, key: Tensor, value: Tensor) -> dict[str, Any]:
    """The forms in which implementations return a result, with keys and values `(batch, heads, tokens, head_dim)`."""
    return {
        "tensor": out,
        "(tensor,)": (out,),
        "(tensor, keys, values)": (out, key, value),
        "(tensor, (keys, values))": (out, (key, value)),
    }


def form_of(expected: Any, result: tuple[Tensor, Tensor, Tensor]) -> str | None:
    """The form in which `expected` is the result; None where it is another result."""
    return next((name for name, form in result_forms(*result).items() if trial.agree(expected, form)), None)


@dataclass(frozen=True)
class FoundAttention:
    signature: Signature
    form: str


class BertAttention(Kind):
    """Self- or cross-attention with its output layer."""

    @staticmethod
    def looks_like(module: nn.Module) -> bool:
        if not has(module, "self", "output"):
            return False
        return has(module.self, "query", "key", "value") and has(module.output, "dense", "LayerNorm")

    @staticmethod
    def recognise(module: nn.Module) -> FoundAttention:
        require_children(module, {"self", "output"})
        require_bert_attention(module, "")
        signature = Signature.of(module.forward)
        width, other = module.self.query.in_features, module.self.key.in_features
        forms = set()
        with trial.conditions(module):
            x, memory = trial.random(2, 3, width), trial.random(2, 5, other, seed=1)
            calls = []
            if "memory" in signature.roles:
                mask = "memory_mask" if "memory_mask" in signature.roles else "mask"
                calls.append(signature.arguments(x=x, memory=memory, **{mask: trial.padding(2, 5)}))
            if width == other:
                own = {"memory": x} if "memory" in signature.roles and "memory_mask" not in signature.roles else {}
                calls.append(signature.arguments(x=x, mask=trial.padding(2, 3), **own))
            for call in calls:
                expected = trial.outcome(type(module).forward, module, **call)
                forms.add(form_of(expected, _attention(module, signature.bind((), call))))
        require(
            None not in forms and len(forms) == 1, "on a trial input it computes something else than BERT's attention"
        )
        return FoundAttention(signature, forms.pop())

    @staticmethod
    def forward(module: Any, state: State, *args: Any, **kwargs: Any) -> Any:
        _require_unsaved(module)
        found = state.found
        out, key, value = _attention(module, found.signature.bind(args, kwargs))
        return result_forms(out, key, value)[found.form]


def _attention(module: Any, bound: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    x, memory = bound["x"], bound.get("memory")
    mask = bound["memory_mask"] if memory is not None and "memory_mask" in bound else bound.get("mask")
    memory = x if memory is None else memory
    understood = understand(mask, x.shape[1], memory.shape[1])
    projections = Projections(module)
    key, value = projections.key_value(memory)
    out = projections.finish(projections.attend(projections.query(x), key, value, understood), x)
    return out.to(x.dtype), key.transpose(1, 2), value.transpose(1, 2)


# --- layers


@dataclass(frozen=True)
class FoundLayer:
    """signature: of its forward. form: in which it returns. uses: kind of call -> what the layer does then."""

    activation: Activation
    signature: Signature
    form: str
    uses: dict[str, str] = field(hash=False)


class BertLayer(Kind):
    """Self-attention, cross-attention where there is a memory, feed-forward part; in a decoder with cached keys."""

    @staticmethod
    def looks_like(module: nn.Module) -> bool:
        if not has(module, "attention", "intermediate", "output"):
            return False
        return BertAttention.looks_like(module.attention) and has(module.intermediate, "dense")  # type: ignore[arg-type]

    @staticmethod
    def recognise(module: nn.Module) -> FoundLayer:
        require_children(
            module, {"attention", "crossattention", "intermediate", "output", "intermediate_vision", "output_vision"}
        )
        for name in ("attention", "crossattention"):
            if has(module, name):
                require_children(module.get_submodule(name), {"self", "output"})
                require_bert_attention(module, name)
        for name in ("intermediate.dense", "output.dense"):
            require_linear(module, name)
        require_norm(module, "output.LayerNorm")
        require_dropout(module.output)  # type: ignore[arg-type]
        signature = Signature.of(module.forward)
        with trial.conditions(module):
            activation = _activation(module)
            uses, form = _try_out(module, signature, activation)
        return FoundLayer(activation, signature, form, uses)

    @staticmethod
    def forward(module: Any, state: State, *args: Any, **kwargs: Any) -> Any:
        found = state.found
        bound = found.signature.bind(args, kwargs)
        use = found.uses.get(_kind_of_call(bound))
        if use is None:
            raise Unserved(f"it was not tried in this way: {_kind_of_call(bound)}")
        for name in ("attention", "crossattention"):
            if has(module, name):
                _require_unsaved(module.get_submodule(name))
        out, key, value = _layer(module, bound, use, found.activation, Call.current(state.session))
        return result_forms(out.to(bound["x"].dtype), key, value)[found.form]


def _activation(module: Any) -> Activation:
    """The activation of the feed-forward part, which may be a module, an attribute or a line of code."""
    intermediate = module.intermediate
    # 2.5 times a unit normal reaches where the forms of GELU differ most.
    x = trial.random(64, intermediate.dense.in_features) * 2.5
    expected = trial.outcome(intermediate, x)
    hidden = F.linear(x, intermediate.dense.weight, intermediate.dense.bias)
    for name, function in ACTIVATIONS.items():
        if trial.agree(expected, function(hidden)):
            return name  # type: ignore[return-value]
    raise Unsuitable(f"the activation of intermediate is none of {', '.join(ACTIVATIONS)}")


def _kind_of_call(bound: dict[str, Any]) -> str:
    memory = "with" if bound.get("memory") is not None else "without"
    return f"{memory} memory, mode {bound.get('mode', 'norm')}"


def _try_out(module: Any, signature: Signature, activation: Activation) -> tuple[dict[str, str], str]:
    """What the layer does in each kind of call that it accepts, and the form in which it returns."""
    width = module.attention.self.query.in_features
    x = trial.random(2, 5, width)
    calls = [{"x": x, "mask": trial.padding(2, 5)}]
    if has(module, "crossattention") and "memory" in signature.roles:
        other = module.crossattention.self.key.in_features
        given = {"memory": trial.random(2, 7, other, seed=1), "memory_mask": trial.padding(2, 7)}
        calls.append({**calls[0], **given})
        if "mode" in signature.roles:
            calls.append({**calls[-1], "mode": "v_module"})
    uses, forms, refusal = {}, set(), None
    for call in calls:
        try:
            expected = trial.outcome(type(module).forward, module, **signature.arguments(**call))
        except Unsuitable as why:  # such as a decoder's layer without a memory
            refusal = why
            continue
        for use in _uses(module, call):
            form = form_of(expected, _layer(module, call, use, activation, None))
            if form is not None:
                uses[_kind_of_call(call)] = use
                forms.add(form)
                break
        else:
            raise Unsuitable(f"on a trial input it computes something else than a BERT layer ({_kind_of_call(call)})")
    if not uses:
        raise refusal or Unsuitable("it does not run on a trial input")
    require(len(forms) == 1, f"it returns now {', now '.join(sorted(forms))}")
    return uses, forms.pop()


def _uses(module: Any, call: dict[str, Any]) -> list[str]:
    if "memory" not in call:
        return ["self-attention"]
    if "mode" not in call:
        return ["cross-attention", "self-attention"]
    latents = getattr(module, "latents", None)
    return [*(["latents"] if isinstance(latents, Tensor) else []), "roles swapped", "cross-attention", "self-attention"]


def _layer(
    module: Any, bound: dict[str, Any], use: str, activation: Activation, call: Call | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(result, keys, values) of the layer; keys and values are those of self-attention."""
    x, memory, mask, memory_mask = (bound.get(role) for role in ("x", "memory", "mask", "memory_mask"))
    if use == "latents":
        x, mask = module.latents.expand(x.shape[0], -1, -1), None
    elif use == "roles swapped":
        x, memory, mask, memory_mask = memory, x, None, None
    elif use == "self-attention":
        memory = None
    seen = understand(mask, x.shape[1], x.shape[1])
    memory_seen = Mask() if memory is None else understand(memory_mask, x.shape[1], memory.shape[1])

    def feed_forward(x: Tensor) -> Tensor:
        return add_norm(module.output, x, _mlp, x, module, activation)

    own = Projections(module.attention)
    if memory is None:
        x, key, value = attend_self(own, x, seen)
        return feed_forward(x), key.transpose(1, 2), value.transpose(1, 2)
    cross = Projections(module.crossattention)
    if call is not None and (seen.causal or x.shape[1] == 1):
        step = decode(call, module, own, cross, feed_forward, x, seen.visible, memory, memory_seen.visible)
        if step is not None:
            return step
    x, key, value = attend_self(own, x, seen)
    query = cross.query(x[:1]).expand(x.shape[0], -1, -1, -1) if is_constant(x) else cross.query(x)
    x = cross.finish(cross.attend(query, *cross.key_value(memory), memory_seen), x)
    return feed_forward(x), key.transpose(1, 2), value.transpose(1, 2)


def _mlp(x: Tensor, module: Any, activation: Activation, residual: Tensor | None = None) -> Tensor:
    return run_mlp(x, module.intermediate.dense, module.output.dense, activation, add=residual is not None)


def attend_self(attention: Projections, x: Tensor, mask: Mask) -> tuple[Tensor, Tensor, Tensor]:
    """(result, keys, values). Rows that are all one row, as latents are before they meet a video, are computed once."""
    rows = x.shape[0]
    once = is_constant(x) and mask.visible is None and not (dropout_of(attention.inner) or dropout_of(attention.output))
    x = x[:1] if once else x
    key, value = attention.key_value(x)
    out = attention.finish(attention.attend(attention.query(x), key, value, mask), x)
    if once:
        out, key, value = (t.expand(rows, *t.shape[1:]) for t in (out, key, value))
    return out, key, value


def is_constant(x: Tensor) -> bool:
    """Whether all rows of x are the same memory."""
    return x.shape[0] > 1 and x.stride(0) == 0
