"""The manual's pages do what they say: Python blocks run and print what stands below them, and
commands are ones that the command line takes.

A page's Python blocks run in order, in one namespace, in an empty folder with stand-ins for the
files that they name. What a block prints stands below it in a block marked `text`, which
`python -m tests.test_pages` writes anew.
"""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from minidiff.cli import console
from minidiff.cli.main import VERBS

from .test_docs import PAGES, ROOT

BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(
    r"^(?:    |\$ )((?:minidiff|python experiments/\S+\.py)(?: [^#\n]*)?)(?:#.*)?$", re.M
)
FILE = re.compile(r"([\w./-]+\.(?:json|safetensors|ckpt|jpg|png))(?::[\d.]+)?")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
PUBLISHED = "each line needs the files that it names"  # a first line that says: weights of others
SHORTER = {"steps=300": "steps=2"}  # a training of minutes
END = "--- end of a block ---"
NEAR = {"rel": 0.02, "abs": 2e-3}  # other processors round otherwise


def stand_ins(folder: Path) -> None:
    """What the pages call "of yours", and a model of the quickstart."""
    from minidiff.data.world import World
    from minidiff.figures import plots

    from . import readers

    shutil.copytree(ROOT / "minidiff" / "box", folder / "out" / "quickstart" / "model")
    readers.shards(folder)  # of coco100's pictures
    (folder / "data").rename(folder / "coco100")
    (folder / "photos").mkdir()
    (folder / "a.tar").rename(folder / "photos" / "a.tar")
    images = World(64).batch(4, seed=0)[0]
    for k, name in enumerate(("cat", "cat", "dog", "dog")):
        (folder / "pets" / name).mkdir(parents=True, exist_ok=True)
        plots.save_png(images[k], folder / "pets" / name / f"{k}.png")


def printed(page: Path, folder: Path) -> list[tuple[str, str]]:
    """Each block's output and what the page says of it."""
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    blocks = [(code, said) for code, said in blocks if PUBLISHED not in code]
    script = f'print("{END}")\n'.join([*(code for code, _ in blocks), ""])
    for long, short in SHORTER.items():
        script = script.replace(long, short)
    (folder / "page.py").write_text(script, encoding="utf-8")
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, "-W", "ignore", "page.py"]
    run = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    outputs = run.stdout.split(f"{END}\n")[:-1]
    return [(out, said) for out, (_, said) in zip(outputs, blocks, strict=True)]


def with_blocks() -> list[Path]:
    return [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]


@pytest.mark.parametrize("page", with_blocks(), ids=lambda page: page.stem)
def test_blocks_print_what_the_page_says(page, tmp_path):
    stand_ins(tmp_path)
    for got, said in printed(page, tmp_path):
        assert NUMBER.sub("#", got) == NUMBER.sub("#", said), got
        numbers = [float(number) for number in NUMBER.findall(said)]
        assert [float(number) for number in NUMBER.findall(got)] == pytest.approx(numbers, **NEAR)


def commands():
    for page in PAGES:
        for line in COMMAND.findall(page.read_text(encoding="utf-8")):
            for command in map(str.strip, line.split("&&")):
                yield pytest.param(command, id=f"{page.stem}: {command}")


@pytest.mark.parametrize("command", commands())
def test_the_command_line_takes_it(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, *words = shlex.split(command)
    for file in filter(None, map(FILE.fullmatch, words)):  # the files that it names are there
        Path(file[1]).parent.mkdir(parents=True, exist_ok=True)
        Path(file[1]).touch()
    if "--images" in words:
        Path(words[words.index("--images") + 1]).mkdir()
    if first == "python":
        sys.path.insert(0, str(ROOT / "experiments"))
        verb, args = importlib.import_module(Path(words[0]).stem).main, words[1:]
    else:
        name = next((" ".join(words[:n]) for n in (2, 1) if " ".join(words[:n]) in VERBS), None)
        assert name or words[:1] in (["--help"], ["--version"]), words
        verb, args = VERBS.get(name), words[len((name or "").split()) :]
    if verb:
        console.parsed(verb, args, first)


def refresh() -> None:
    """Write what each block prints below it."""
    for page in with_blocks():
        with tempfile.TemporaryDirectory() as folder:
            stand_ins(Path(folder))
            outputs = iter(out for out, _ in printed(page, Path(folder)))

        def below(match: re.Match, outputs=outputs) -> str:
            code = f"```python\n{match[1]}```\n"
            out = "" if PUBLISHED in match[1] else next(outputs)
            return code + (f"\n```text\n{out}```\n" if out else "")

        page.write_text(BLOCK.sub(below, page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    refresh()
