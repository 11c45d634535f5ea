import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported
SHARED_VIDEOS = Path(__file__).parents[2] / "shared" / "videos"


@pytest.fixture(scope="session")
def shared_videos() -> Path:
    """The folder of real test videos, which lies beside the repository."""
    if not (SHARED_VIDEOS / "manifest.csv").is_file():
        reason = f"the real test videos are not at {SHARED_VIDEOS}"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    return SHARED_VIDEOS
