"""A picture to ask about."""

import pytest

from tests.tiny import picture


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.png"
    picture(70, 40).save(path)
    return path
