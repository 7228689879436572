import pytest
from pictures import picture


@pytest.fixture
def folder(tmp_path):
    """An empty folder for pictures, with something outside of it."""
    picture(tmp_path / "outside.png", 99)
    (tmp_path / "pictures").mkdir()
    return tmp_path / "pictures"
