"""While the tests run, every shape written in a signature of minidiff is checked by beartype."""
import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

install_import_hook("minidiff", "beartype.beartype")  # before anything imports minidiff


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real pictures (MINIDIFF_DATA, or shared/data beside the checkout); tests that need it skip without it."""
    folder = Path(os.environ.get("MINIDIFF_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no real pictures here; set MINIDIFF_DATA to their folder")
    return folder
