"""The rule that gives every parameter of a golden case its value, so that no case stores weights."""

from __future__ import annotations

import zlib

import numpy as np

END_OF_SEQUENCE = 102
EMBEDDING_PARTS = ("embeddings.", "token_embedding", "positional_embedding", "class_embedding", "latents")
HEAD = "cls.predictions"
WORD_EMBEDDINGS = "bert.embeddings.word_embeddings.weight"


def weight(key: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """The value stored under `key`. It comes from NumPy's legacy generator, which is the same in every version."""
    normal = np.random.RandomState((zlib.crc32(key.encode()) + seed) % 2**32).standard_normal(shape).astype(np.float32)
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


def state_dict(keys: dict[str, list[int]], seed: int, eos_bias: float) -> dict[str, np.ndarray]:
    """Every entry of the official state dict. A decoder's head shares its weight with the word embeddings."""
    weights = {key: weight(key, tuple(shape), seed) for key, shape in keys.items()}
    for key in [key for key in weights if key.endswith(f"{HEAD}.bias")]:
        weights[key][END_OF_SEQUENCE] = eos_bias
        decoder = key.removesuffix(f"{HEAD}.bias")
        if f"{decoder}{HEAD}.decoder.bias" in weights:
            weights[f"{decoder}{HEAD}.decoder.bias"] = weights[key]
        if f"{decoder}{HEAD}.decoder.weight" in weights:
            weights[f"{decoder}{HEAD}.decoder.weight"] = weights[decoder + WORD_EMBEDDINGS]
    return weights
