"""Several views of a video: clips at other times, and crops at other places."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mplug2_fast.images.transforms import resize
from mplug2_fast.video.preparation import Preparation, Resampling

if TYPE_CHECKING:
    import torch

    from mplug2_fast.video.limits import Guard


@dataclass(frozen=True)
class Views(Preparation):
    """Clips times crops of each file, as another preparation makes one clip.

    The clips interleave: each spreads over the whole video, one a little later than the other. With one crop, frames
    become squares as the other preparation makes them. With several, the short side of a frame becomes the side of the
    square, and the crops are spread over the long side.

    Args:
        base: the other preparation. clips, crops: at least 1 each.
    """

    base: Preparation
    clips: int = 1
    crops: int = 1

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.base.name}, {self.clips} x {self.crops} views"

    @property
    def sampling(self) -> str:  # type: ignore[override]
        return self.base.sampling

    @property
    def views(self) -> int:
        return self.clips * self.crops

    def frames(self, total: int, count: int) -> list[int]:
        return self.base.frames(total, count * self.clips)

    def resampling(self, total: int) -> Resampling | None:
        return self.base.resampling(total) if self.crops == 1 else None

    def still(self, path: str, count: int, guard: Guard) -> np.ndarray | None:
        return self.base.still(path, count, guard)

    def square(self, pixels: np.ndarray, size: int) -> np.ndarray:
        """The crops side by side: (size, crops * size, 3)."""
        if self.crops == 1:
            return self.base.square(pixels, size)
        height, width = pixels.shape[:2]
        short = min(height, width)
        pixels = resize(pixels, max(size, round(width * size / short)), max(size, round(height * size / short)))
        spare = [side - size for side in pixels.shape[:2]]
        places = [[round(room * crop / (self.crops - 1)) for room in spare] for crop in range(self.crops)]
        return np.concatenate([pixels[top : top + size, left : left + size] for top, left in places], axis=1)

    def tensor(self, frames: torch.Tensor, dtype: torch.dtype, picture_size: tuple[int, int]) -> torch.Tensor:
        """(clips * frames, size, crops * size, 3), uint8, to (views, 3, frames, size, size)."""
        import torch

        crops = frames.unflatten(2, (self.crops, -1)).unbind(2)
        made = torch.stack([self.base.tensor(crop.contiguous(), dtype, picture_size) for crop in crops])
        return made.unflatten(2, (-1, self.clips)).permute(3, 0, 1, 2, 4, 5).flatten(0, 1)
