"""The sides of bench.py that start processes and read files: each function gives the call that is
timed. Not a study: nothing runs here.
"""

import importlib.util
import json
import random
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import diffusers_side
import torch
from bench_sides import CAPTIONS, SIDE, Side
from measuring import Setup, stable_diffusion
from PIL import Image

from minidiff.checkpoints.folder import DTYPES
from minidiff.checkpoints.write import save_diffusers
from minidiff.data.folder import CaptionedImages, load_all
from minidiff.data.latents import encode_images
from minidiff.training.progress import peak_memory_gb

PHOTOS, CACHED = 64, 4  # images read, and encoded
OPENING = """
import json
import torch
{library}


def memory(what):  # of this process, in bytes; the peak of getrusage counts its parent's too
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024


before = memory("VmRSS")
model = {call}
parameters = [p for part in ({parts}) for p in part.parameters()]
weights = sum(p.numel() * p.element_size() + 0 * p.sum().item() for p in parameters)  # reads all
peak = memory("VmHWM") - before
print(json.dumps({{"weights_gb": weights / 1e9, "peak_by_weights": peak / weights}}))
"""


def peak_gb() -> float | None:
    """Of this process alone; the peak of getrusage counts its parent's too."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return peak_memory_gb()
    lines = status.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


# Processes.


def python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def started(code: str, setup: Setup, tuned: bool) -> Side:
    """A process of this import; ImportError where it is not installed."""
    module = code.split()[1]
    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(f"No module named {module}", name=module)
    return Side(partial(python, code))


def helped(setup: Setup, tuned: bool) -> Side:
    return Side(partial(python, "from minidiff.cli.main import main; main(['--help'])"))


def generated(setup: Setup, tuned: bool) -> Side:
    """`minidiff generate`, one image of the model in the box."""
    arguments = ["generate", CAPTIONS[0], "--out", str(setup.data / "drawn")]
    return Side(partial(python, f"from minidiff.cli.main import main; main({arguments})"))


def opening(library: str, setup: Setup, tuned: bool) -> Side:
    """Stable Diffusion from a folder in diffusers' layout, every weight read, in a new process."""
    if library == "diffusers":
        import diffusers  # noqa: F401 (ImportError, where there is none)
    folder = setup.data / "sd"
    if not folder.exists():
        save_diffusers(stable_diffusion(setup, torch.float32), folder)
    return Side(partial(opened, library, folder, "fp32"))


def opened(library: str, path: Path, dtype: str) -> dict[str, float]:
    """Open a whole model in a new process and read all of it: its size, and the peak of memory by
    it, beyond that of the imports. Linux only."""
    if library == "diffusers":
        pipeline, kind = "StableDiffusionPipeline", DTYPES[dtype]
        code = OPENING.format(
            library=f"from diffusers import {pipeline}",
            call=f"{pipeline}.from_pretrained({str(path)!r}, torch_dtype={kind})",
            parts="model.unet, model.vae, model.text_encoder",
        )
    else:
        code = OPENING.format(
            library="import minidiff",
            call=f"minidiff.load({str(path)!r}, dtype={dtype!r})",
            parts="model,",
        )
    return json.loads(python(code).splitlines()[-1])


# Photographs: reading them, and caching their latents.


def photographs(setup: Setup, count: int) -> list[Path]:
    """JPEG files of random colours, no two alike."""
    folder, size = setup.data / "photographs", (64, 48) if setup.tiny else (1024, 768)
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{k}.jpg" for k in range(4 if setup.tiny else count)]
    for k, path in enumerate(paths):
        if not path.exists():
            few = Image.frombytes("RGB", (32, 24), random.Random(k).randbytes(32 * 24 * 3))
            few.resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
    return paths


def side_of(setup: Setup) -> int:
    return 32 if setup.tiny else SIDE


def read(setup: Setup, tuned: bool) -> Side:
    paths = photographs(setup, PHOTOS)
    return Side(partial(load_all, CaptionedImages(paths, [""] * len(paths)), side_of(setup)))


def transformed(paths: list[Path], side: int) -> torch.Tensor:
    """As diffusers' examples/text_to_image reads images, without the mirror."""
    from torchvision import transforms

    steps = [
        transforms.Resize(side, transforms.InterpolationMode.BILINEAR),
        transforms.CenterCrop(side),
        transforms.ToTensor(),
        transforms.Normalize([0.5], [0.5]),
    ]
    transform = transforms.Compose(steps)
    return torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])


def diffusers_read(setup: Setup, tuned: bool) -> Side:
    return Side(partial(transformed, photographs(setup, PHOTOS), side_of(setup)))


def ddp_read(setup: Setup, tuned: bool) -> Side:
    from denoising_diffusion_pytorch.denoising_diffusion_pytorch import Dataset

    folder = photographs(setup, PHOTOS)[0].parent
    return Side(partial(every, Dataset(folder, side_of(setup), convert_image_to="RGB")))


def every(data: torch.utils.data.Dataset) -> torch.Tensor:
    return torch.stack([data[k] for k in range(len(data))])


def cache(setup: Setup, tuned: bool) -> Side:
    vae = stable_diffusion(setup, torch.float32).vae
    return Side(partial(cached, vae, photographs(setup, CACHED)[:CACHED], setup))


def cached(vae: torch.nn.Module, paths: list[Path], setup: Setup) -> None:
    """Into a new file each time."""
    folder = setup.data / "cache"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    encode_images(vae, paths, [(side_of(setup), side_of(setup))] * len(paths), folder)


def diffusers_cache(setup: Setup, tuned: bool) -> Side:
    """All of them as one batch, as its examples encode the batches that they train on."""
    vae, paths = diffusers_side.vae_of(setup.tiny).eval(), photographs(setup, CACHED)[:CACHED]
    return Side(partial(diffusers_cached, vae, paths, setup))


@torch.no_grad()
def diffusers_cached(vae: torch.nn.Module, paths: list[Path], setup: Setup) -> None:
    latents = vae.encode(transformed(paths, side_of(setup))).latent_dist.mean
    torch.save(latents, setup.data / "latents.pt")
