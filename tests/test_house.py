"""The rooms stand in one order, and imports run one way; and no file, function or line is larger than a reader's."""

import ast
import subprocess
import sys

import pytest

from . import house

CORE = (
    "ddpm schedules condition denoiser losses guidance steps samplers layers unet mmdit vae text t5 conditioners "
    "latent_diffusion train"
).split()
ORDER = [
    ["errors"], ["options"], ["training"], CORE, ["methods"], ["pipeline"], ["checkpoints"], ["data"],
    ["figures"], ["evaluation"], ["finetuning", "recipes"], ["exercises"], ["cli"],
]  # fmt: skip
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
DOORS = {("latent_diffusion", "checkpoints")}  # LatentDiffusion.save and load, opened when called


def imported(source):
    """The modules of minidiff that a module imports, inside functions too, as "room" or "core file"."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "minidiff":
            below = node.module.split(".")[1:]
            yield from below[:1] or (alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            names = (alias.name.split(".") for alias in node.names)
            yield from (name[1] for name in names if name[0] == "minidiff" and len(name) > 1)


@pytest.mark.parametrize("name", [name for name in house.files() if name != "__init__.py"])
def test_imports_run_one_way(name):
    room = name.split("/")[0].removesuffix(".py")
    for other in set(imported(house.files()[name])) - {"load", "__version__"}:
        same = other == room or (room in CORE and other in CORE)
        allowed = same or RANK[other] < RANK[room] or (room, other) in DOORS
        assert allowed, f"{name} imports minidiff.{other}, which stands above it"


@pytest.mark.parametrize("module, absent", [
    ("minidiff.methods.lora", {"checkpoints", "data", "figures", "finetuning", "cli"}),
    ("minidiff.denoiser", {"latent_diffusion", "methods", "checkpoints", "data", "figures", "cli"}),
    ("minidiff.finetuning.loop", {"cli", "recipes"}),
])  # fmt: skip
def test_a_room_loads_nothing_above_it(module, absent):
    code = f"import sys, {module}; print(*(m for m in sys.modules if m.startswith('minidiff.')))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {name.split(".")[1] for name in ran.stdout.split()} & absent


def test_the_networks_are_small():
    files = (f"{name}.py" for name in "layers unet mmdit vae text t5".split())
    assert sum(len(house.files()[name].splitlines()) for name in files) <= 1300


def test_the_house_is_small():
    counts = house.count()
    assert counts.core_files <= 20 and counts.core_lines <= 3430
    assert counts.longest_file[0] <= house.LONGEST_FILE, counts.longest_file
    assert counts.most_arguments[0] <= house.MOST_ARGUMENTS, counts.most_arguments
    assert counts.long_lines == 0
