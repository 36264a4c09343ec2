"""Commands that are killed, resumed, and compared with the same command left alone.

    python -m tests.kills FOLDER PER_MILLE [NAME ...]

Each command is first run whole. Then it is killed again and again, at file operations that are
drawn from a fixed seed (a child process counts what it opens for writing, renames, removes, makes
and flushes, and kills itself) and at moments in between (a signal from outside), resumed until it
has ended, and every file is compared, names, bytes and all. Prints JSON.
"""

import csv
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from minidiff import schedules
from minidiff.cli.main import main
from minidiff.denoiser import Denoiser
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.recipes import quickstart
from minidiff.text import CLIPText, TextConfig
from minidiff.unet import UNet, UNetConfig
from minidiff.vae import VAE, VAEConfig

SIGNALS = {"SIGKILL": (-9,), "SIGTERM": (143, -15), "SIGINT": (130,)}
EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
PER_FOLDER = 4  # kills before a folder's command may end
PLACES = {  # what a function on the stack says of the moment
    "class_pictures": "class pictures",
    "_entries": "caching",
    "measure": "measuring",
    "save": "saving",
    "_write": "saving",
    "write_best": "saving",
    "train": "training",
}


class Command(NamedTuple):
    args: list[str]
    again: list[str]  # what is added to go on
    kills: int  # of 100
    alone: bool = True  # whether it may refuse, once it is done


def commands(place: Path) -> dict[str, Command]:
    """Every command that takes long or writes much; OUT is in the folder where it runs."""
    model, resume, out = ["--model", str(place / "tiny")], ["--resume"], ["--out", "out"]
    train = [*model, *out, "--steps", "5", "--every", "2", "--batch", "2", "--ema", "0.9"]
    tune = ["finetune", "--data", str(place / "data"), "--size", "16", *train]
    booth = ["dreambooth", "--subject", str(place / "subject"), "--prompt", "a sks heart", *train]
    booth += ["--size", "16"]
    drawn = ["--class-prompt", "a heart", "--class-pictures", "10", "--shift", "0"]
    coco = ["data", "coco", "--annotations", str(place / "captions.json")]
    coco += ["--images", str(place / "data" / "images"), "--pixels", "16", *out]
    sweep = ["evaluate", "--model", "box", "--n", "10", *out, "--trilemma", "--samplers", "ddim"]
    sweep += ["--sweep-steps", "1,2,3", "--sweep-guidance", "1"]
    convert = ["convert", str(place / "tiny")]
    return {
        "finetune": Command(tune, resume, 20),
        "finetune lora": Command([*tune, "--method", "lora", "--save-every", "3"], resume, 8),
        "dreambooth": Command([*booth, *drawn, "--method", "lora"], resume, 18),
        "inversion": Command([*booth, "--method", "inversion"], resume, 10),
        "data coco": Command(coco, [], 10, False),
        "convert diffusers": Command([*convert, "out", "--to", "diffusers"], [], 5, False),
        "convert compvis": Command([*convert, "out.safetensors", "--to", "compvis"], [], 5, False),
        "evaluate --trilemma": Command(sweep, [], 12),
        "quickstart": Command(["quickstart", *out], resume, 12),
    }


def prepare(place: Path) -> None:
    """A tiny model, captioned images, a subject, COCO's files; and a quickstart of a few steps."""
    torch.manual_seed(3)
    unet = UNet(UNetConfig(4, 4, (32, 64), 1, (1, 0), (8, 8), 64))
    text = CLIPText(TextConfig(64, 1, 1, pad=49407))
    vae = VAE(VAEConfig(3, 4, (32, 32), 1), latent_scale=0.18215)
    schedule = schedules.scaled_linear()
    LatentDiffusion(vae, text, Denoiser(unet, schedule), 16).save(place / "tiny")
    for folder, count in (("data/images", 6), ("subject", 3)):
        (place / folder).mkdir(parents=True)
        for k in range(count):
            pixels = torch.randint(0, 255, (20, 20, 3), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(place / folder / f"{k}.png")
    rows = [{"file_name": f"images/{k}.png", "text": f"square {k}"} for k in range(6)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (place / "data" / "metadata.jsonl").write_text(lines)
    images = [{"id": k, "file_name": f"{k}.png"} for k in range(6)]
    captions = [{"id": k, "image_id": k, "caption": f"square {k}"} for k in range(6)]
    content = {"images": images, "annotations": captions}
    (place / "captions.json").write_text(json.dumps(content))
    small = {"VAE_STEPS": 2, "TEXT_STEPS": 2, "STEPS": 3, "VAE_BATCH": 4}
    small |= {"TEXT_BATCH": 4, "BATCH": 4, "POOL": 64, "CAPTIONS": 4}
    for name, value in small.items():
        setattr(quickstart, name, value)
    quickstart.PROMPTS = quickstart.PROMPTS[:1]


class Counted:
    """Counts file operations below a folder; at the number `last` it sends itself a signal."""

    def __init__(self, folder: Path, last: int | None, number: int, notes: Path):
        self.folder, self.last, self.number, self.notes = str(folder), last, number, notes
        self.count, self.fsync = 0, os.fsync
        sys.addaudithook(self.hook)
        os.fsync = self.flush

    def hook(self, event: str, args: tuple) -> None:
        opened = event == "open" and isinstance(args[2], int) and args[2] & WRITING
        if (opened or event in EVENTS) and isinstance(args[0], str | os.PathLike):
            if os.path.abspath(args[0]).startswith(self.folder):
                self.add()

    def flush(self, file: int) -> None:
        self.add()
        self.fsync(file)

    def add(self) -> None:
        self.count += 1
        if self.count == self.last:
            names, frame = set(), sys._getframe()
            while frame := frame.f_back:
                names.add(frame.f_code.co_name)
            moment = next((label for name, label in PLACES.items() if name in names), "else")
            self.notes.write_text(moment)
            os.kill(os.getpid(), self.number)


def forked(folder: Path, args: list[str], job: Callable[[], object]) -> int:
    """Run a command in the folder, in a process of its own; returns its number."""
    if process := os.fork():
        return process
    code = 1
    try:
        torch.set_num_threads(1)  # renews its thread pool, before two threads do so at once
        os.chdir(folder)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["minidiff", *args]
        sys.stdout, sys.stderr = io.TextIOWrapper(io.BytesIO(), "utf-8"), open("../said", "w")
        job()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


class Killer:
    """Kills one command in every way, and compares what it leaves."""

    def __init__(self, name: str, command: Command, place: Path, draw: random.Random):
        self.name, self.command, self.draw = name, command, draw
        self.place = place / name.replace(" ", "-")
        self.notes, self.tally, self.moments = self.place / "notes", Counter(), Counter()
        self.faults: list[str] = []
        (self.place / "whole").mkdir(parents=True)

    def whole(self) -> None:
        """The uninterrupted run; counts its file operations, and takes its time."""
        folder, start = self.place / "whole", time.perf_counter()

        def job() -> None:
            counted = Counted(folder, None, 0, self.notes)
            main(self.command.args)
            self.notes.write_text(str(counted.count))

        code = ended(forked(folder, self.command.args, job))
        if code:
            raise SystemExit(f"{self.name}: {code}: {(self.place / 'said').read_text()[-2000:]}")
        self.operations = int(self.notes.read_text())
        self.seconds = time.perf_counter() - start

    def kill(self, folder: Path, name: str, inside: bool) -> bool:
        """Run, and kill it: at an operation, or from outside. Returns whether it is now done."""
        number, self.args = getattr(signal, name), self.command.args + self.command.again
        last = self.draw.randint(1, self.operations) if inside else None
        delay = self.draw.uniform(0.02, self.seconds)
        self.notes.write_text("")

        def job() -> None:
            Counted(folder, last, number, self.notes)
            main(self.args)

        process = forked(folder, self.args, job)
        if not inside:
            time.sleep(delay)
            os.kill(process, number)
        code = ended(process)
        said = (self.place / "said").read_text()
        if code in SIGNALS[name]:
            self.tally[name] += 1
            self.moments[self.notes.read_text() or "from outside"] += 1
        elif code and (self.command.alone or ("there" not in said and "exists" not in said)):
            self.faults.append(f"{name} at {last or delay}: exit code {code}: {said[-1500:]}")
        if "Traceback" in said:
            self.faults.append(f"{name} at {last or delay}: {said[-1500:]}")
        return code not in SIGNALS[name]

    def run(self, kills: int) -> dict[str, object]:
        """So many kills, at most PER_FOLDER in one folder."""
        self.whole()
        names, turn = list(SIGNALS), 0
        while sum(self.tally.values()) < kills and turn < 10 * kills and not self.faults:
            folder = self.place / f"killed-{turn}"
            folder.mkdir()
            for _ in range(PER_FOLDER):
                turn += 1
                if sum(self.tally.values()) >= kills:
                    break
                if self.kill(folder, names[turn % 3], self.draw.random() < 0.7):
                    break
            self.finish(folder)
        counts = {"signals": self.tally, "moments": self.moments, "operations": self.operations}
        return counts | {"faults": self.faults}

    def finish(self, folder: Path) -> None:
        """Let it end, and compare."""
        args = self.command.args + self.command.again
        code = ended(forked(folder, args, lambda: main(args)))
        said = (self.place / "said").read_text()
        if code and (self.command.alone or ("there" not in said and "exists" not in said)):
            self.faults.append(f"{folder.name} does not end: {code}: {said[-1500:]}")
        else:
            self.faults += differences(self.place / "whole", folder)
        if not self.faults:
            shutil.rmtree(folder)


def differences(whole: Path, killed: Path) -> list[str]:
    """What differs between two folders, but for measured times."""
    here, there = ({p.relative_to(f) for p in f.rglob("*")} for f in (whole, killed))
    faults = [f"{killed.name}: missing {path}" for path in sorted(here - there)]
    faults += [f"{killed.name}: left over {path}" for path in sorted(there - here)]
    for path in sorted(here & there):
        if (whole / path).is_file() and timeless(whole / path) != timeless(killed / path):
            faults.append(f"{killed.name}: {path} differs")
    return faults


def timeless(file: Path) -> object:
    """The content of a file without the seconds and the memory that were measured."""
    if file.name == "record.jsonl":
        times = {"seconds_per_step", "seconds", "memory_gb"}
        lines = map(json.loads, file.read_text().splitlines())
        return [{k: v for k, v in line.items() if k not in times} for line in lines]
    if file.name == "results.json":
        times = {"minutes", "minutes_told", "resumed", "peak_memory_gb"}
        return {k: v for k, v in json.loads(file.read_text()).items() if k not in times}
    if file.name == "index.html":
        return re.sub(r"\d\d:\d\d:\d\d|done in [\d.]+ minutes", "", file.read_text())
    if file.name == "report.html":  # of a measurement: step, two losses, and what it cost
        text = re.sub(r" --resume", "", file.read_text())
        return re.sub(r"(<tr><td>\d+</td>(<td>[^<]*</td>){2}).*?</tr>", r"\1", text)
    if file.suffix == ".csv":
        rows = list(csv.DictReader(io.StringIO(file.read_text())))
        return [{k: v for k, v in row.items() if "second" not in k} for row in rows]
    return file.read_bytes()


if __name__ == "__main__":
    torch.set_num_threads(1)
    place, share, *only = Path(sys.argv[1]).absolute(), int(sys.argv[2]) / 1000, *sys.argv[3:]
    prepare(place)
    outcomes = {}
    for name, command in commands(place).items():
        if not only or name in only:
            killer = Killer(name, command, place, random.Random(f"kills {name}"))
            outcomes[name] = killer.run(max(1, round(share * command.kills)))
    print(json.dumps(outcomes, indent=1))
