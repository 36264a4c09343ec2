"""While the tests run, every shape written in a signature of minidiff is checked by beartype."""

import importlib.util
import os
import shutil
import signal
from pathlib import Path

# before anything imports torch, here and in child processes: the tests run in parallel, and on
# tensors this small a second thread costs more than it gives
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

import pytest
from jaxtyping import install_import_hook

from tests.sockets import offline, pytest_unconfigure  # noqa: F401 (the fixture of every test)

# before anything imports minidiff; the tower lets a float parameter take an int, as PEP 484 and callers do
install_import_hook(
    "minidiff", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
)

os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"  # Hugging Face's loader would tell its maker

# A shell's background jobs ignore Ctrl-C, and so would the tests of it and their child processes.
signal.signal(signal.SIGINT, signal.default_int_handler)

MOST_WORKERS = 8  # each takes up to 2 GB


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The suite runs in a process for each core. Files that are named run here: workers take
    longer to start than most files to run. `-n` decides otherwise; without xdist all run here."""
    option, inside = config.option, hasattr(config, "workerinput")
    named = any(".py" in arg for arg in config.args) or option.usepdb
    if not (inside or named) and getattr(option, "numprocesses", 0) is None:
        cores = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
        option.numprocesses, option.dist = min(len(cores), MOST_WORKERS), "worksteal"


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random numbers, alone or among others: one that fails, fails again."""
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


@pytest.fixture(scope="session")
def browser():
    """Chromium, by playwright. MINIDIFF_BROWSER names its executable; then one that is missing is a
    failure. Without it, tests use the Chromium on PATH, or skip."""
    path = os.environ.get("MINIDIFF_BROWSER")
    if not path:
        names = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
        path = next(filter(None, names), None)
        if not path or not importlib.util.find_spec("playwright"):
            pytest.skip("needs Chromium and playwright; MINIDIFF_BROWSER makes this a failure")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def ran(capsys):
    """What a command prints."""

    def run(*args):
        from minidiff.cli.main import main

        main([str(arg) for arg in args])
        return capsys.readouterr()

    return run


@pytest.fixture
def refused(capsys):
    """What is said of bad input: one line on stderr, nothing on stdout, exit code 2."""

    def run(*args):
        from minidiff.cli.main import main

        with pytest.raises(SystemExit) as end:
            main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        assert (end.value.code, out) == (2, "")
        assert (
            err.startswith("minidiff: ")
            and err.endswith("\n")
            and err.count("\n") == 1
            and "\r" not in err
        ), err
        return err.removeprefix("minidiff: ").removesuffix("\n")

    return run


@pytest.fixture(scope="session")
def sd():
    """Makes a Stable Diffusion of little weight, whose layouts determine it: sd(second=True) is of version 2.x; more are the U-Net's numbers."""
    from minidiff import schedules
    from minidiff.checkpoints.layouts import STABLE_DIFFUSION
    from minidiff.denoiser import Denoiser
    from minidiff.latent_diffusion import LatentDiffusion
    from minidiff.text import CLIPText, TextConfig
    from minidiff.unet import UNet, UNetConfig
    from minidiff.vae import VAE, VAEConfig

    def make(second: bool = False, channels: int = 4, **how) -> LatentDiffusion:
        width = (64, 128) if second else (32, 64)
        unet = UNet(
            UNetConfig(
                channels,
                4,
                width,
                1,
                (1, 0),
                (1, 2) if second else (8, 8),
                64,
                linear_projection=second,
                **how,
            )
        )
        text = CLIPText(
            TextConfig(
                64, 1, 1, activation="gelu" if second else "quick_gelu", pad=0 if second else 49407
            )
        )
        vae, schedule = (
            VAE(VAEConfig(3, 4, (32, 32), 1), latent_scale=0.18215),
            schedules.Discrete(**STABLE_DIFFUSION),
        )
        return LatentDiffusion(
            vae, text, Denoiser(unet, schedule), 16, guidance=7.5, spacing="leading"
        )

    return make
