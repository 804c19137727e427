# SPDX-License-Identifier: Apache-2.0
"""A comparison small enough for a test."""

import pytest

from slimtorch.experiments.compare import Settings
from slimtorch.experiments.training import Recipe


@pytest.fixture(scope="session")
def tiny() -> Settings:
    """LeNet-300-100 at two sparsities, a hundred images, about one epoch."""
    recipe = Recipe(train=100, validation=50, test=100, epochs=0.25)
    return Settings(
        networks=("lenet300",),
        sparsities=(0.5, 0.9),
        seeds=1,
        batches=(1, 4),
        samples=2,
        pack_seconds=0.02,
        recipe=recipe,
    )
