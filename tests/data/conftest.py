"""An image."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def scene():
    """A small image in which every corner has its own colour."""
    x, y = np.meshgrid(np.linspace(0, 255, 40), np.linspace(0, 255, 30))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))
