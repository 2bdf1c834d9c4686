"""mPLUG's tasks train by the same recipes; the queues of retrieval are part of a save."""

import numpy as np
import pytest
import torch

from mplug2_fast.datasets import Item
from mplug2_fast.errors import ConfigError
from mplug2_fast.training import Sample, Trainer, make_recipe
from tests.training.data import Noise

SIZES = {
    "vision": {"width": 64, "layers": 1, "image_size": 16},
    "text": {
        "hidden_size": 64,
        "num_attention_heads": 2,
        "intermediate_size": 96,
        "vocab_size": 700,
        "text_encoder_layers": 1,
        "stored_layers": 2,
        "fusion_layers": 2,
        "stride_layer": 1,
        "text_decode_layers": 1,
    },
    "contrast": {"embed_dim": 8},
}


class Pictures(Noise):
    """Noise with a caption, a phrase and a box for each picture."""

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        box = (0.5, 0.5, 0.2, 0.1)
        item = Item(str(index), image=f"{index}.png", caption=(f"word {index}",), text="a dog", box=box)
        frames = rng.integers(0, 256, (1, self._size, self._size, 3), dtype=np.uint8)
        return Sample(item, frames)


def trainer_of(out, tmp_path, **changes):
    vocabulary = tmp_path / "vocab.txt"
    words = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += [f"[unused{i}]" for i in range(99, 700 - 5)]
    vocabulary.write_text("\n".join(words[:700]) + "\n")
    sizes = {**SIZES, "text": {name: value for name, value in SIZES["text"].items() if name != "vocab_size"}}
    values = {
        "out": str(out),
        "model": {"family": "mplug", "preset": "tiny", "vocabulary": str(vocabulary), "config": sizes},
        "sources": [
            {"data": "tests.training.test_mplug:Pictures", "task": "retrieval", "batch_size": 4},
            {
                "data": "tests.training.test_mplug:Pictures",
                "task": "grounding",
                "batch_size": 2,
                "options": {"weighting": "per_sample"},
            },
        ],
        "sources_per_step": "all",
        "steps": 4,
        "workers": 0,
        "save_every": 2,
        "tensorboard": False,
        "queues": {"size": 8, "momentum": 0.9},
        "device": "cpu",
        **changes,
    }
    return Trainer(make_recipe(values), note=lambda line: None)


def test_queues_go_on_after_a_stop(tmp_path):
    whole = trainer_of(tmp_path / "whole", tmp_path)
    whole.train()
    state = whole._module.states["retrieval"]
    assert int(state.queue_ptr) == 0
    assert (state.idx_queue >= 0).all()
    assert not torch.equal(state.copy.model.text.embeddings.word.weight, whole.model.text.embeddings.word.weight)

    stopped = trainer_of(tmp_path / "again", tmp_path)
    between, stopped._between_steps = stopped._between_steps, lambda: (between(), _stop_after(stopped, 3))
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = trainer_of(tmp_path / "again", tmp_path)
    resumed.train()
    for name, tensor in whole._module.state_dict().items():
        assert torch.equal(tensor, resumed._module.state_dict()[name]), name


def _stop_after(trainer, step):
    if trainer.state.step == step:
        raise KeyboardInterrupt


def test_the_copy_keeps_its_weights_when_activations_are_recomputed(tmp_path):
    features, fast = [], {"optimizer": {"learning_rate": 0.05}, "schedule": {"warmup_steps": 0}}
    for recomputed in (False, True):
        out = tmp_path / str(recomputed)
        trainer = trainer_of(out, tmp_path, activation_checkpointing=recomputed, steps=4, **fast)
        trainer.train()
        features.append(trainer._module.states["retrieval"].image_queue)
    torch.testing.assert_close(*features)


@pytest.mark.parametrize("part", ["queues", "distillation"])
def test_parts_that_no_task_uses_are_refused(tmp_path, part):
    source = {"data": "tests.training.test_mplug:Pictures", "task": "grounding", "batch_size": 2}
    trainer = trainer_of(tmp_path / "run", tmp_path, sources=[source], **{"queues": None, part: {}})
    with pytest.raises(ConfigError, match=rf"^{part}: grounding has no"):
        trainer.prepare()


def test_a_queue_that_no_batch_fits_is_refused(tmp_path):
    trainer = trainer_of(tmp_path / "run", tmp_path, queues={"size": 10})
    with pytest.raises(ConfigError, match=r"queues.size 10 is not a multiple of the batch_size 4"):
        trainer.prepare()
