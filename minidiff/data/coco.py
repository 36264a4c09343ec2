"""A captioned folder from COCO's files: choose images and captions, download and write them.

folder.py and Hugging Face's image-folder loader read the written folder.

[1] Chen et al. Microsoft COCO Captions: Data Collection and Evaluation Server. 2015.
    arXiv:1504.00325
"""

import contextlib
import difflib
import hashlib
import io
import json
import os
import random
import re
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from itertools import islice
from pathlib import Path

from PIL import Image, ImageOps
from tqdm import tqdm

from minidiff.data.coco_config import CocoConfig
from minidiff.data.folder import Fault, images_in, load_image
from minidiff.errors import UserError
from minidiff.training import atomic

PAUSES = (0, 1, 4)  # seconds before each try to download an image
GONE, DAMAGED = "pictures that are not at their address", "damaged pictures"
REPEATED = "pictures seen before"
SELECTION = ("contains", "category", "crop", "pixels", "seed")  # in selection.json


@dataclass
class Source:
    """The content of the annotation files, and the choice of images.

    names: by an image's id, its file without folders: annotations must not say where to write.
    about: by an image's id, the columns of metadata.jsonl about its licence and addresses.
    captions: by an image's id, in the order of the files.
    matches: the ids of the images that have the words and show the categories.
    counts: what was left out.
    """

    config: CocoConfig
    names: dict[int, str] = field(default_factory=dict)
    about: dict[int, dict[str, str]] = field(default_factory=dict)
    captions: dict[int, list[str]] = field(default_factory=dict)
    matches: list[int] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)


def read(config: CocoConfig) -> Source:
    """Read the annotation files and choose the images that fit the config."""
    source = Source(config)
    needs = "images, and annotations with captions"
    for path in config.annotations:
        with coco_file(path, "captions_val2017.json", needs) as index:
            _add(source, index)
    items = source.captions.items()
    matches = {i for i, own in items if any(has(caption, config.contains) for caption in own)}
    if not matches:
        raise UserError(_no_such_words(source.captions, config.contains))
    if config.category:
        matches &= _showing(config.instances, config.category)
    source.matches = sorted(matches)
    return source


def _add(source: Source, index) -> None:
    """Add a pycocotools COCO: its images, its captions, and counts of captions left out."""
    licenses = {one["id"]: (one["name"], one["url"]) for one in index.dataset.get("licenses", [])}
    for i, image in index.imgs.items():
        license, license_url = map(str, licenses.get(image.get("license"), ("unknown",) * 2))
        urls = {"source_url": "flickr_url", "coco_url": "coco_url"}
        urls = {name: str(image.get(key, "")) for name, key in urls.items()}
        source.names[int(i)] = Path(str(image["file_name"])).name
        source.about[int(i)] = {"license": license, "license_url": license_url} | urls
    for i, annotations in index.imgToAnns.items():
        captions = source.captions.setdefault(int(i), [])
        for one in annotations:
            # Halves of characters are valid in JSON, but not in UTF-8.
            caption = " ".join(one["caption"].split()).encode("utf-8", "replace").decode()
            if not caption:
                source.counts["empty captions"] += 1
            elif caption in captions:
                source.counts["captions seen before"] += 1
            elif int(i) not in source.about:
                source.counts["captions without a picture"] += 1
            else:
                captions.append(caption)


@contextlib.contextmanager
def coco_file(path: Path, example: str, needs: str):  # yields a pycocotools COCO
    """Open an annotation file. A fault found while it is in use is raised as one line."""
    from pycocotools.coco import COCO

    try:
        index = COCO()
        index.dataset = json.loads(path.read_bytes())
        for number, one in enumerate(index.dataset["annotations"]):
            one.setdefault("id", number)  # only the index needs ids
        with contextlib.redirect_stdout(io.StringIO()):  # it reports to stdout
            index.createIndex()
        yield index
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:100]
        message = f"{path}: not a COCO file such as {example} ({reason}); it needs {needs}."
        raise UserError(message) from None


def has(caption: str, words: Sequence[str]) -> bool:
    """Whether a caption has all words, in upper or lower case; of three letters, plurals too."""
    patterns = (re.escape(word) + ("(?:e?s)?" if len(word) > 2 else "") for word in words)
    return all(re.search(rf"(?<!\w){pattern}(?!\w)", caption, re.I) for pattern in patterns)


def _no_such_words(captions: dict[int, list[str]], words: Sequence[str]) -> str:
    """The message if no caption has all words, with counts and suggestions."""
    if not any(captions.values()):
        return "the annotations hold no captions; name a captions_*.json of COCO."
    texts = ["\n".join(own) for own in captions.values()]
    counts = {word: sum(has(text, [word]) for text in texts) for word in words}
    each = ", ".join(f'"{word}" in those of {count} pictures' for word, count in counts.items())
    frequency = Counter(word for text in texts for word in re.findall(r"\w+", text.lower()))
    missing = [word.lower() for word, count in counts.items() if not count]
    nears = [difflib.get_close_matches(word, frequency) for word in missing]
    close = [max(near, key=frequency.__getitem__) for near in nears if near]
    advice = f"perhaps you meant {', '.join(close)}." if close else "ask for fewer at once."
    return f"no caption has all of the words: {each}; {advice}"


def _showing(instances: Path, categories: Sequence[str]) -> set[int]:
    """The ids of the images that show all categories."""
    needs = "images, categories, and annotations with category_id"
    with coco_file(instances, "instances_val2017.json", needs) as index:
        names = {category["name"]: category["id"] for category in index.dataset["categories"]}
        for name in categories:
            if name not in names:
                near = difflib.get_close_matches(name, names, 1)
                advice = f"perhaps you meant {near[0]}" if near else f"there is {', '.join(names)}"
                raise UserError(f'{instances}: no category "{name}"; {advice}.')
        return set(index.getImgIds(catIds=[names[name] for name in categories]))


def check_new(out: Path) -> None:
    """Refuse to write where something is."""
    atomic.clean(out.parent)
    if os.path.lexists(out):
        raise UserError(f"`out` {out} is there already; name a new folder, or remove that one.")


def write(source: Source, out: Path) -> dict[str, object]:
    """Write as many images as the config asks for, or as there are, and their captions.

    Returns the content of selection.json. The seed determines which images; the seed and the image
    alone determine which of its captions is its text.
    """
    config, counts = source.config, source.counts.copy()
    files = images_in(config.images) if config.images else []
    by_name = {path.name: path for path in reversed(files)}
    captioned = {source.names[i] for i, own in source.captions.items() if own}
    absent = 0 if config.download else len(captioned - by_name.keys())
    counts["captioned pictures that are not in the folder of images"] = absent
    counts["pictures without captions"] = len(by_name.keys() - captioned)
    counts["pictures of the same name"] = len(files) - len(by_name)
    order = [i for i in source.matches if config.download or source.names[i] in by_name]
    if not order:
        none = f"none of the {len(source.matches)} pictures that were asked for"
        remedy = "the names must be those in the annotations, or set download"
        raise UserError(f"{none} is in {config.images}; {remedy}.")
    random.Random(config.seed).shuffle(order)

    rows, enlarged = [], 0
    check_new(out)
    bar = tqdm(desc="pictures", total=min(config.size, len(order)), unit="", leave=False)
    with atomic.write(out) as new, bar:
        (new / "images").mkdir(parents=True)
        readable = _readable(source, order, by_name, new / "fetched", counts)
        for i, path, shorter in islice(readable, config.size):
            save_image(config, path, new / "images" / source.names[i])
            enlarged += shorter < (config.pixels or 0)
            rows.append(row(source, i, config.seed))
            bar.update()
        if not rows:
            reasons = {what: counts[what] for what in (GONE, DAMAGED, REPEATED) if counts[what]}
            every = f"all of the {len(order)} pictures that were asked for"
            raise UserError(f"nothing to write: {every} are left out: {_listed(reasons)}.")
        rows.sort(key=lambda one: one["coco_id"])
        selection = {
            "annotations": [path.name for path in config.annotations],
            **{name: getattr(config, name) for name in SELECTION},
            "asked for": config.size,
            "pictures": len(rows),
            "captions": sum(len(one["captions"]) for one in rows),
            "enlarged": enlarged,
            "left out": dict(+counts),
            "licenses": dict(Counter(one["license"] for one in rows).most_common()),
        }
        (new / "fetched").unlink(missing_ok=True)
        lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows)
        (new / "metadata.jsonl").write_text(lines, encoding="utf-8")
        text = json.dumps(selection, indent=2, ensure_ascii=False) + "\n"
        (new / "selection.json").write_text(text, encoding="utf-8")
    return selection


def save_image(config: CocoConfig, source: Path, to: Path) -> None:
    """Crop and scale an image as the config says; with neither, copy its file as it is."""
    if config.crop == "none" and config.pixels is None:
        shutil.copyfile(source, to)
        return
    image = Image.fromarray(load_image(source).permute(1, 2, 0).numpy())
    side, lanczos = config.pixels or min(image.size), Image.Resampling.LANCZOS
    if config.crop == "centre":
        image = ImageOps.fit(image, (side, side), lanczos)
    else:
        image = image.resize([round(side * n / min(image.size)) for n in image.size], lanczos)
    image.save(to, quality=95, subsampling=0)


def _readable(
    source: Source, order: list[int], by_name: dict[str, Path], download: Path, counts: Counter
) -> Iterator[tuple[int, Path, int]]:
    """Yield id, file and shorter side of each image that can be read, once; count the others.

    Images that are not in `by_name` are downloaded, all to one file.
    """
    used: set[bytes | str] = set()
    for i in order:
        name = source.names[i]
        path = by_name.get(name) or fetch(source.about[i]["coco_url"], download)
        if path is None:
            counts[GONE] += 1
            continue
        try:
            pixels = load_image(path)
        except Fault as fault:
            tqdm.write(f"left out: {fault}", file=sys.stderr)
            counts[DAMAGED] += 1
            continue
        digest = hashlib.sha256(pixels.numpy().tobytes()).digest()
        if name in used or digest in used:
            counts[REPEATED] += 1
            continue
        used |= {name, digest}
        yield i, path, min(pixels.shape[1:])


def row(source: Source, i: int, seed: int) -> dict[str, object]:
    """A line of metadata.jsonl; `text` is one of the image's five captions, [1], with the words."""
    captions, words = source.captions[i], source.config.contains
    matching = [k for k, caption in enumerate(captions) if has(caption, words)]
    k = random.Random(f"{seed} {i}").choice(matching)
    row = {"file_name": f"images/{source.names[i]}", "text": captions[k], "text_index": k}
    return row | {"captions": captions, "coco_id": i} | source.about[i]


def fetch(url: str, to: Path) -> Path | None:
    """Download a file; None if it is not at its address. Raises UserError without a network."""
    if not url.startswith(("http://", "https://")):  # not file://
        return None
    for pause in PAUSES:
        time.sleep(pause)
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                to.write_bytes(answer.read())
            return to
        except (urllib.error.HTTPError, HTTPException):
            return None
        except OSError as error:
            reason = getattr(error, "reason", error)
    remedy = "downloading needs the network: without it, name a folder of images"
    raise UserError(f"{url}: cannot be fetched ({reason}); {remedy}.")


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {what}" for what, count in counts.items())


def summary(selection: dict) -> str:
    """The selection as lines to print."""
    words = ", ".join(f'"{word}"' for word in selection["contains"])
    text = f"a picture's text is one of its own{f' that has {words}' if words else ''}"
    enlarged = f"{selection['enlarged']} to {selection['pixels']} pixels"
    lines = {
        "pictures": f"{selection['pictures']} of {selection['asked for']} asked for",
        "captions": f"{selection['captions']}; {text}, chosen by seed {selection['seed']}",
        "enlarged": enlarged if selection["enlarged"] else "",
        "left out": _listed(selection["left out"]) or "nothing",
        "licences": _listed(selection["licenses"]),
    }
    return "\n".join(f"{name}: {value}" for name, value in lines.items() if value)
