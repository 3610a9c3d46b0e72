"""Expert weights that the tests of this folder share."""

from __future__ import annotations

import pytest

from . import models


@pytest.fixture(scope="session")
def weights():
    """Experts whose values quantize to themselves, gate and up sharing a global scale."""
    return models.experts(seed=3)


@pytest.fixture(scope="session")
def split_weights():
    """Experts whose gate and up have different global scales."""
    return models.experts(seed=4, gate_up_gs=(2.0**-14, 2.0**-15))
