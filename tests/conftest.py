"""One thread, and Hypothesis examples that are the same on every run."""

from __future__ import annotations

import torch
from hypothesis import Phase, settings

torch.set_num_threads(1)

settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,
    print_blob=True,
    max_examples=15,
    # networks do not shrink to anything simpler than what was drawn, and it takes minutes
    phases=(Phase.explicit, Phase.generate),
)
settings.load_profile("default")
