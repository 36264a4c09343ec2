"""Every format that minidiff reads: functions that write its files into a folder, and return those
that are to be mutated and a function that opens them as a verb would."""

import contextlib
import json
import random
import tarfile
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from unittest import mock

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from minidiff import load
from minidiff.checkpoints import embedding, folder, write
from minidiff.checkpoints import lora as lora_files
from minidiff.cli.evaluate import trilemma
from minidiff.cli.generate import image_of, mask_of
from minidiff.cli.main import main
from minidiff.data import latents
from minidiff.data.folder import CaptionedFolder
from minidiff.data.shards import Shards
from minidiff.errors import UserError
from minidiff.evaluation import sweep
from minidiff.evaluation.bench import Figure
from minidiff.finetuning import run
from minidiff.finetuning.recorder.recorder import Recorder
from minidiff.methods import lora
from minidiff.options.finetuning import RecorderConfig
from minidiff.options.sampling import SampleConfig
from minidiff.text import CLIPText, TextConfig
from minidiff.train import TrainConfig, train
from minidiff.training.resume import checkpoints, read_log
from tests.checkpoints.test_hostile import tiny
from tests.finetuning import test_loop as small


def verb(*args: object) -> None:
    main([str(arg) for arg in args])


def a_model(path: Path, draw: random.Random) -> None:
    """Loaded, or described."""
    load(path) if draw.random() < 0.6 else verb("inspect", path, "--out", path.parent / "seen")


def ours(place: Path):
    model = tiny()
    folder.save(model, place / "model")
    settings = [place / "model" / "model.json"] * 4
    return settings + sorted((place / "model").glob("*.safetensors")), partial(
        a_model, place / "model"
    )


def published(save: Callable, name: str, place: Path):
    """A single file or a folder with the names of others."""
    # the text encoder is too small for them
    with mock.patch.multiple(write, check=mock.DEFAULT, check_single_file=mock.DEFAULT):
        path = save(tiny(), place / name)
    return files_of(path), partial(a_model, path)


def ckpt(place: Path):
    (single,), _ = published(write.save_compvis, "model.safetensors", place)
    torch.save({"state_dict": load_file(single)}, place / "model.ckpt")
    return [place / "model.ckpt"], partial(a_model, place / "model.ckpt")


def files_of(path: Path) -> list[Path]:
    """The file; or of a folder those of settings, oftener, and those of weights."""
    if path.is_file():
        return [path]
    files = [file for file in sorted(path.rglob("*")) if file.suffix in (".json", ".safetensors")]
    files = [file for file in files if file.name != "vocab.json"]
    return files + 2 * [file for file in files if file.suffix == ".json"]


def with_lora(model, file: Path, draw: random.Random) -> None:
    if draw.random() < 0.3:
        return verb("inspect", file, "--out", file.parent / "seen")
    try:
        lora_files.load(model, file)
    finally:
        lora.remove(model)


def loras(place: Path):
    model = tiny()
    lora.add(model.unet, 2)
    for layer in lora.adapted(model).values():
        torch.nn.init.normal_(layer.lora.B)
    files = [
        lora_files.save(model, place / f"{layout}.safetensors", layout)
        for layout in ("diffusers", "kohya")
    ]
    (place / "peft").mkdir()
    peft = place / "peft" / "adapter_model.safetensors"
    state = {f"base_model.model.{name}": value for name, value in load_file(files[0]).items()}
    save_file(state, peft)
    config = {"r": 2, "lora_alpha": 2, "alpha_pattern": {"to_q": 1}, "use_rslora": False}
    (place / "peft" / "adapter_config.json").write_text(json.dumps(config))
    target = tiny()
    forms = [partial(with_lora, target, file) for file in (*files, peft)]
    files = [
        *files,
        peft,
        place / "peft" / "adapter_config.json",
        peft.parent / "adapter_config.json",
    ]
    return files, lambda draw: [form(draw) for form in forms]


def an_embedding(place: Path):
    text = CLIPText(TextConfig(8, 1, 1, pad=49407))
    embedding.save("sks", torch.randn(text.dim), place / "e.safetensors")
    torch.save({"string_to_param": {"*": torch.randn(1, text.dim)}, "name": "sks"}, place / "e.pt")
    files = [place / "e.safetensors", place / "e.pt"]
    with contextlib.suppress(UserError):  # a list of vectors, which only some versions read
        embedding.load(text, files.pop(), "a")
        files.append(place / "e.pt")

    def read(draw: random.Random) -> None:
        if draw.random() < 0.2:
            verb("inspect", draw.choice(files), "--out", place / "seen")
        for file in files:
            embedding.load(text, file, draw.choice(("a", None)))

    return files, read


def run_json(place: Path):
    groups = small.two_groups()
    config = small.FineTuneConfig(steps=2, lr=1e-3, dropout=0.1)
    identity = run.identity(small.tiny(), groups, config)
    run.start(place / "out", identity, False)
    (place / "out" / "training").mkdir()
    return [place / "out" / "run.json"], lambda draw: run.start(place / "out", identity, True)


def trained(place: Path, resume: bool = False, stop: int | None = None) -> None:
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 2)
    config = TrainConfig(6, 1e-3, save_every=2, seed=0)
    loss = partial(loss_of, module)
    with contextlib.closing(train(loss, module, numbered, config, None, place, resume)) as steps:
        list(islice(steps, stop))


def numbered(start: int) -> list[torch.Tensor]:
    return [torch.ones(1, 3) * k for k in range(start, 20)]


def loss_of(module: torch.nn.Module, batch: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"loss": module(batch).pow(2).mean(1)}


def checkpoint(place: Path):
    trained(place / "run", stop=4)

    def go_on(draw: random.Random) -> None:
        for file in (place / "run").glob("*.sha256"):
            if draw.random() < 0.7:  # as an earlier version left it
                file.unlink()
        if draw.random() < 0.5 and len(both := checkpoints(place / "run")) > 1:
            both[1].unlink()
        trained(place / "run", True)
        read_log(place / "run")

    files = [*checkpoints(place / "run"), place / "run" / "log.jsonl"]
    return files + sorted((place / "run").glob("*.sha256")), go_on


def caches(place: Path):
    model = small.tiny()
    for k, colour in enumerate(("red", "blue")):
        Image.new("RGB", (16, 16), colour).save(place / f"{k}.png")
    paths, sizes = [place / "0.png", place / "1.png"], [(16, 16)] * 2

    def cached(draw: random.Random) -> None:
        latents.encode_images(model.vae, paths, sizes, place / "cache")
        latents.encode_captions(model.text, small.NAMES, place / "cache")

    cached(random.Random())
    return sorted((place / "cache").iterdir()), cached


def record(place: Path):
    model, pictures = small.tiny(), torch.rand(3, 3, 16, 16)
    config = RecorderConfig(every=2, n=2, steps=2, probe=2, noises=1, network="pixels-8x8")
    prompts = {"training caption": "a cat", "unrelated": "a dog"}

    def recorder() -> Recorder:
        return Recorder(model, place, prompts, pictures, examples=small.examples(2), config=config)

    def go_on(draw: random.Random) -> None:
        watcher = recorder()
        watcher.best(), watcher.advice(), watcher.report()
        if draw.random() < 0.2:
            watcher.measure(6, {"data": 0.5}, 1e-3)

    first = recorder()
    for step in (0, 2, 4):
        first.measure(step, {"data": 0.5}, 1e-3)
    files = [place / "record.jsonl"] * 4 + sorted((place / "grids").glob("*.png"))
    return [*files, place / "report.html"], go_on


def table(place: Path):
    configs = [SampleConfig(steps, 1.0, sampler="ddim", spacing="trailing") for steps in (1, 2)]
    kinds = [
        ("accuracy", "critic"),
        ("diversity per prompt", "pixels-8x8"),
        ("evaluations per picture", ""),
    ]
    rows = [Figure(*kind, value=0.5, low=None, high=None, floor=0.25, n=10) for kind in kinds]
    sweep.draw, sweep.figures = lambda *_, **__: None, lambda *_: rows
    own = {"model": "box", "weights": "abcdefgh", "data": "world", "n": "10", "seed": "0"}
    file = place / "trilemma.csv"

    def go_on(draw: random.Random) -> None:
        trilemma(None, None, configs, file, own)
        sweep.append(file, own | sweep.columns(configs[0]) | sweep.flat(rows))

    trilemma(None, None, configs, file, own)
    return [file, file, file, place / "trilemma.png"], go_on


def captioned(place: Path) -> Path:
    (place / "data" / "images").mkdir(parents=True)
    rows = []
    for k, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (32, 32), colour).save(place / "data" / "images" / f"{k}.png")
        row = {"file_name": f"images/{k}.png", "text": f"a {colour} square", "coco_id": k}
        rows.append(row | {"captions": [f"a {colour} square", "a square"]})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (place / "data" / "metadata.jsonl").write_text(lines)
    return place / "data"


def metadata(place: Path):
    data = captioned(place)

    def read(draw: random.Random) -> None:
        if draw.random() < 0.5:
            return verb("data", "check", data, "--size", "16", "--out", place / "seen")
        list(CaptionedFolder(data, 16, draw.choice(("text", "captions"))))

    return [data / "metadata.jsonl"], read


def shards(place: Path):
    with tarfile.open(place / "a.tar", "w") as tar:
        for image in sorted((captioned(place) / "images").iterdir()):
            image.with_suffix(".json").write_text(json.dumps({"text": image.stem}))
            for file in (image, image.with_suffix(".json")):
                tar.add(file, file.name)

    def read(draw: random.Random) -> None:
        shards = Shards(place / "a.tar", 16, skip_damaged=draw.random() < 0.5)
        for i in range(len(shards)):  # a mutant may have fewer
            _ = shards[i]

    return [place / "a.tar"], read


def coco(place: Path):
    data = captioned(place)
    images = [
        {"id": k, "file_name": f"{k}.png", "license": 1, "coco_url": "", "flickr_url": ""}
        for k in range(3)
    ]
    about = {"licenses": [{"id": 1, "name": "CC", "url": "https://example.org"}], "images": images}
    captions = [{"id": k, "image_id": k % 3, "caption": f"square {k}"} for k in range(6)]
    (place / "captions.json").write_text(json.dumps(about | {"annotations": captions}))
    boxes = [{"id": k, "image_id": k, "category_id": 1, "bbox": [0, 0, 9, 9]} for k in range(3)]
    boxes = {"annotations": boxes, "categories": [{"id": 1, "name": "apple"}]}
    (place / "instances.json").write_text(json.dumps(about | boxes))
    args = ["data", "coco", "--annotations", place / "captions.json", "--images", data / "images"]
    args += ["--category", "apple", "--instances", place / "instances.json", "--size", 2]
    files = [place / "captions.json", place / "captions.json", place / "instances.json"]
    return files, lambda draw: verb(*args, "--out", place / "out")


def pictures(place: Path):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 255, (32, 32, 3), dtype=torch.uint8, generator=generator)
    image, model = Image.fromarray(pixels.numpy()), small.tiny()
    (data := place / "data").mkdir()
    for name in ("a.jpg", "a.gif", "a.webp", "a.tif", "a.bmp"):
        image.save(data / name)
    image.convert("RGBA").save(data / "a.png")
    image.convert("L").save(data / "b.png")
    exif = Image.Exif()
    exif[274] = 6
    image.save(data / "b.jpg", exif=exif, icc_profile=b"not a profile" * 9)
    paths = sorted(data.iterdir())

    def read(draw: random.Random) -> None:
        for path in paths:
            image_of(path, None, model)
            mask_of(path, 16, 16)
        if draw.random() < 0.2:
            verb("data", "check", data, "--layout", "pictures", "--out", place / "seen")

    return paths, read


Opener = Callable[[random.Random], object]
READERS: dict[str, Callable[[Path], tuple[list[Path], Opener]]] = {
    "model folder": ours,
    "diffusers folder": partial(published, write.save_diffusers, "sd"),
    "CompVis file": partial(published, write.save_compvis, "sd.safetensors"),
    ".ckpt": ckpt,
    "LoRA": loras,
    "embedding": an_embedding,
    "run.json": run_json,
    "checkpoint and log": checkpoint,
    "caches": caches,
    "record": record,
    "CSV": table,
    "metadata.jsonl": metadata,
    "shards": shards,
    "COCO": coco,
    "pictures": pictures,
}
