"""Training: recipes, and the `Trainer` that runs them. See `docs/training.md`."""

from mplug2_fast.training.data import Dataset, ItemDataset, Sample
from mplug2_fast.training.recipe import Recipe, load_recipe, make_recipe
from mplug2_fast.training.trainer import Trainer

__all__ = ["Dataset", "ItemDataset", "Recipe", "Sample", "Trainer", "load_recipe", "make_recipe"]
