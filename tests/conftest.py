"""While the tests run, every shape written in a signature of minidiff is checked by beartype."""
import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# before anything imports minidiff; the tower lets a float parameter take an int, as PEP 484 and callers do
install_import_hook("minidiff", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random numbers, alone or among others: one that fails, fails again. On tensors this small a
    second thread costs more than it gives, and several times more where the cores are busy."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real pictures (MINIDIFF_DATA, or shared/data beside the checkout); tests that need it skip without it."""
    folder = Path(os.environ.get("MINIDIFF_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no real pictures here; set MINIDIFF_DATA to their folder")
    return folder


@pytest.fixture
def ran(capsys):
    """What a command prints."""

    def run(*args):
        from minidiff.cli import main

        main([str(arg) for arg in args])
        return capsys.readouterr()

    return run


@pytest.fixture
def refused(capsys):
    """What is said of bad input: one line on stderr, nothing on stdout, exit code 2."""

    def run(*args):
        from minidiff.cli import main

        with pytest.raises(SystemExit) as end:
            main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        assert (end.value.code, out) == (2, "")
        assert err.startswith("minidiff: ") and err.endswith("\n") and err.count("\n") == 1 and "\r" not in err, err
        return err.removeprefix("minidiff: ").removesuffix("\n")

    return run
