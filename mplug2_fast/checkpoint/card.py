"""The model card of a checkpoint: the README.md that the Hugging Face Hub shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mplug2_fast.models import FAMILIES
from mplug2_fast.tasks import Task, title_of

CARD_NAME = "README.md"


def model_card(config: Any, tasks: Sequence[Task], details: str = "") -> str:
    """The card of a model for these tasks, with details, such as its training, at the end."""
    title = FAMILIES[config.family].title
    names = [task.name for task in tasks]
    return (
        f"""---
library_name: mplug2-fast
tags: [{", ".join([config.family, *names])}]
---

# {title} for {title_of(tasks)}

{config.vision.num_frames} frames of {config.vision.image_size} px, {config.text.hidden_size} channels.

```python
import mplug2_fast as mf

model = mf.from_pretrained("PATH", task="{names[0]}")
```

{details}
""".rstrip()
        + "\n"
    )
