"""The rule that gives every parameter of a golden case its value, so that no case stores weights."""

from __future__ import annotations

import zlib

import numpy as np

END_OF_SEQUENCE = 102
EMBEDDING_PARTS = ("embeddings.", "token_embedding", "positional_embedding", "class_embedding", "latents")
HEAD = "cls.predictions"
WORD_EMBEDDINGS = "bert.embeddings.word_embeddings.weight"


BOX_START, FIRST_BIN, BINS = 344, 345, 337
"""Tokens of mPLUG's boxes."""


def _queue(generator: np.random.RandomState, shape: tuple[int, ...]) -> np.ndarray:
    columns = generator.standard_normal(shape)
    return (columns / np.linalg.norm(columns, axis=0)).astype(np.float32)


def _allowed(_: np.random.RandomState, shape: tuple[int, ...]) -> np.ndarray:
    mask = np.full(shape, -10000.0, dtype=np.float32)
    mask[FIRST_BIN : FIRST_BIN + BINS] = -0.0
    return mask


BUFFERS = {
    "temp": lambda _, shape: np.full(shape, 0.07, dtype=np.float32),
    "image_queue": _queue,
    "text_queue": _queue,
    "idx_queue": lambda _, shape: np.where(np.arange(shape[1]) % 3, -100, np.arange(shape[1]))[None],
    "queue_ptr": lambda _, shape: np.zeros(shape, dtype=np.int64),
    "prefix_ids": lambda _, shape: np.full(shape, BOX_START, dtype=np.int64),
    "target_ids": lambda _, shape: FIRST_BIN + np.arange(BINS, dtype=np.int64),
    "bbox_prob_mask": _allowed,
}
"""mPLUG's scalars and buffers."""


def weight(key: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """The value stored under `key`. It comes from NumPy's legacy generator, which is the same in every version."""
    generator = np.random.RandomState((zlib.crc32(key.encode()) + seed) % 2**32)
    if key in BUFFERS:
        return np.asarray(BUFFERS[key](generator, shape))
    normal = generator.standard_normal(shape).astype(np.float32)
    is_vector = len(shape) == 1
    if key.endswith("logit_scale"):
        return np.asarray(np.log(1 / 0.07), dtype=np.float32)
    if key.endswith("position_ids"):
        return np.arange(shape[-1], dtype=np.int64)[None]
    if is_vector and key.endswith(".weight"):  # a layer norm
        return 1 + 0.1 * normal
    if "word_embeddings" in key:
        return normal * np.float32(0.2 * np.sqrt(128) / np.sqrt(shape[1]))
    if "position_embeddings" in key:
        return 0.7 * normal
    if any(part in key for part in EMBEDDING_PARTS):
        return 0.5 * normal
    if is_vector:  # a bias
        return 0.1 * normal
    if "lmhra" in key and ".conv.weight" in key:
        return 0.5 * normal
    return normal / np.sqrt(np.prod(shape[1:])).astype(np.float32)


def state_dict(keys: dict[str, list[int]], seed: int, eos_bias: float, queue_ptr: int = 0) -> dict[str, np.ndarray]:
    """Every entry of the official state dict. A decoder's head shares its weight with the word embeddings."""
    weights = {key: weight(key, tuple(shape), seed) for key, shape in keys.items()}
    for key in [key for key in weights if key.endswith(f"{HEAD}.bias")]:
        weights[key][END_OF_SEQUENCE] = eos_bias
        decoder = key.removesuffix(f"{HEAD}.bias")
        if f"{decoder}{HEAD}.decoder.bias" in weights:
            weights[f"{decoder}{HEAD}.decoder.bias"] = weights[key]
        if f"{decoder}{HEAD}.decoder.weight" in weights:
            weights[f"{decoder}{HEAD}.decoder.weight"] = weights[decoder + WORD_EMBEDDINGS]
    if "queue_ptr" in weights:
        weights["queue_ptr"][0] = queue_ptr
    return weights
