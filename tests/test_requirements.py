"""What users run has ranges in pyproject.toml: both ends of them work. Gigabytes and minutes."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = "test_ddpm.py test_samplers.py test_train.py test_pipeline.py cli checkpoints data figures".split()


def ranges() -> dict[str, str]:
    """The lower end of each requirement, by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pairs = (re.fullmatch(r"([\w-]+)>=([\w.]+)", line) for line in project["dependencies"])
    return {pair[1]: pair[2] for pair in pairs}


def test_every_requirement_is_a_range_without_an_upper_end():
    assert {"torch", "torchvision", "numpy", "tyro"} <= ranges().keys()


@pytest.mark.nightly
@pytest.mark.parametrize("end", ["oldest", "newest"])
def test_both_ends_of_the_ranges(tmp_path, end):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    exact = "==" if end == "oldest" else ">="
    wanted = [f"{name}{exact}{version}" for name, version in ranges().items()]
    tools = ["setuptools", "pytest", "beartype", "hypothesis"]
    subprocess.run([python, "-m", "pip", "install", "-q", *wanted, *tools], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "-e", ROOT], check=True)
    paths = [ROOT / "tests" / name for name in TESTS]
    subprocess.run([python, "-m", "pytest", "-q", *paths], check=True, cwd=ROOT)
