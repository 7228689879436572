from pathlib import Path

import pytest

from diffjax.data.emoji import load_emoji


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> Path:
    """A folder with the emoji pictures at 64 px; a test that damages it must copy it first."""
    folder = tmp_path_factory.mktemp("emoji")
    load_emoji(folder, resolution=64)
    return folder
