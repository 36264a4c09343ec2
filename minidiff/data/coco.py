"""A captioned folder from COCO's files: choose images and captions, download and write them.

pycocotools reads the annotations. The written folder is what folder.py and Hugging Face's
image-folder loader read.

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


@dataclass
class Source:
    """The content of the annotation files, and the choice of images.

    about: by an image's id, COCO's file_name, coco_url and flickr_url, and license_name and
        license_url.
    captions: by an image's id, in the order of the files.
    matches: the ids of the images that have the words and show the categories.
    counts: what was left out.
    """

    config: CocoConfig
    about: dict[int, dict[str, str]] = field(default_factory=dict)
    captions: dict[int, list[str]] = field(default_factory=dict)
    matches: list[int] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)

    def file_name(self, i: int) -> str:
        """The name of an image's file, without folders: annotations must not say where to write."""
        return Path(self.about[i]["file_name"]).name


def read(config: CocoConfig) -> Source:
    """Read the annotation files and choose the images that fit the config."""
    source = Source(config)
    needs = "images, and annotations with captions"
    for path in config.annotations:
        with coco_file(path, "captions_val2017.json", needs) as index:
            _add(source, index)
    for i, captions in source.captions.items():
        if any(has(caption, config.contains) for caption in captions):
            source.matches.append(i)
    if not source.matches:
        raise UserError(_no_such_words(source.captions, config.contains))
    if config.category:
        source.matches = list(set(source.matches) & _showing(config.instances, config.category))
    source.matches.sort()
    return source


def _add(source: Source, index) -> None:
    """Add a pycocotools COCO: its images, its captions, and counts of captions left out."""
    licenses = {
        one["id"]: {"license_name": one["name"], "license_url": one["url"]}
        for one in index.dataset.get("licenses", [])
    }
    unknown = {"license_name": "unknown", "license_url": "unknown"}
    for i, image in index.imgs.items():
        urls = {url: str(image.get(url, "")) for url in ("coco_url", "flickr_url")}
        terms = licenses.get(image.get("license"), unknown)
        source.about[int(i)] = {"file_name": str(image["file_name"])} | urls | terms
    for i, annotations in index.imgToAnns.items():
        captions = source.captions.setdefault(int(i), [])
        for caption in (one_line(one["caption"]) for one in annotations):
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
    """Open an annotation file with its index.

    Whatever is wrong with it, also where it is used, is raised as one line.
    """
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
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"{path}: not a COCO file such as {example} ({reason:.100}); it needs {needs}."
        ) from None


def one_line(caption: str) -> str:
    """The caption on one line, without halves of characters (valid in JSON, not in UTF-8)."""
    return " ".join(caption.split()).encode("utf-8", "replace").decode()


def has(caption: str, words: Sequence[str]) -> bool:
    """Whether a caption has all words, in upper or lower case.

    Words of three letters or more also match with a plural's s or es.
    """
    return all(
        re.search(
            rf"(?<!\w){re.escape(word)}{'(?:e?s)?' if len(word) > 2 else ''}(?!\w)", caption, re.I
        )
        for word in words
    )


def _no_such_words(captions: dict[int, list[str]], words: Sequence[str]) -> str:
    """The message if no caption has all words, with counts and suggestions."""
    if not any(captions.values()):
        return "the annotations hold no captions; name a captions_*.json of COCO."
    counts = {
        word: sum(any(has(caption, [word]) for caption in own) for own in captions.values())
        for word in words
    }
    each = ", ".join(f'"{word}" in those of {count} pictures' for word, count in counts.items())
    every = (caption.lower() for own in captions.values() for caption in own)
    frequency = Counter(word for caption in every for word in re.findall(r"\w+", caption))
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


# Writing.


def check_new(out: Path) -> None:
    """Refuse to write where something is."""
    if os.path.lexists(out):
        raise UserError(f"--out {out} is there already; name a new folder, or remove that one.")


def write(source: Source, out: Path) -> dict[str, object]:
    """Write the images and their captions; return the content of selection.json.

    There are as many images as the config asks for, or as there are. The seed determines which; the
    seed and the image alone determine which of its captions is its text.
    """
    config = source.config
    files = images_in(config.images) if config.images else []
    by_name = {path.name: path for path in reversed(files)}
    captioned = {source.file_name(i) for i, own in source.captions.items() if own}
    absent = 0 if config.download else len(captioned - by_name.keys())
    counts = source.counts + Counter(
        {
            "captioned pictures that are not in --images": absent,
            "pictures without captions": len(by_name.keys() - captioned),
            "pictures of the same name": len(files) - len(by_name),
        }
    )
    order = [i for i in source.matches if config.download or source.file_name(i) in by_name]
    if not order:
        raise UserError(
            f"none of the {len(source.matches)} pictures that were asked for is in "
            f"{config.images}; the names must be those in the annotations, or set download."
        )
    random.Random(config.seed).shuffle(order)

    rows, enlarged, total = [], 0, min(config.size, len(order))
    check_new(out)
    with (
        atomic.write(out) as new,
        tqdm(desc="pictures", total=total, unit="", leave=False) as bar,
    ):
        (new / "images").mkdir(parents=True)
        readable = _readable(source, order, by_name, new / "fetched", counts)
        for i, path, shorter in islice(readable, config.size):
            save_image(config, path, new / "images" / source.file_name(i))
            enlarged += shorter < (config.pixels or 0)
            rows.append(row(source, i, config.seed))
            bar.update()
        if not rows:
            reasons = (GONE, DAMAGED, REPEATED)
            left_out = ", ".join(f"{counts[what]} {what}" for what in reasons if counts[what])
            raise UserError(
                f"nothing to write: all of the {len(order)} pictures that were asked for are "
                f"left out: {left_out}."
            )
        rows.sort(key=lambda one: one["coco_id"])
        selection = {
            "annotations": [path.name for path in config.annotations],
            "contains": config.contains,
            "category": config.category,
            "crop": config.crop,
            "pixels": config.pixels,
            "seed": config.seed,
            "asked for": config.size,
            "pictures": len(rows),
            "captions": sum(len(one["captions"]) for one in rows),
            "enlarged": enlarged,
            "left out": dict(+counts),
            "licenses": dict(Counter(one["license"] for one in rows).most_common()),
        }
        (new / "fetched").unlink(missing_ok=True)
        (new / "metadata.jsonl").write_text(
            "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows), encoding="utf-8"
        )
        (new / "selection.json").write_text(
            json.dumps(selection, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
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
        sides = [round(side * length / min(image.size)) for length in image.size]
        image = image.resize(sides, lanczos)
    image.save(to, quality=95, subsampling=0)


def _readable(
    source: Source, order: list[int], by_name: dict[str, Path], download: Path, counts: Counter
) -> Iterator[tuple[int, Path, int]]:
    """Yield id, file and shorter side of each image that can be read, each image once.

    The others are counted. Images that are not in `by_name` are downloaded, all to one file.
    """
    used: set[bytes | str] = set()
    for i in order:
        name = source.file_name(i)
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
    """A line of metadata.jsonl.

    People wrote five captions for each image, [1]. `text` is one that has the words, and
    `text_index` says which.
    """
    about, captions, words = source.about[i], source.captions[i], source.config.contains
    matching = [k for k, caption in enumerate(captions) if has(caption, words)]
    k = random.Random(f"{seed} {i}").choice(matching)
    return {
        "file_name": f"images/{source.file_name(i)}",
        "text": captions[k],
        "text_index": k,
        "captions": captions,
        "coco_id": i,
        "license": about["license_name"],
        "license_url": about["license_url"],
        "source_url": about["flickr_url"],
        "coco_url": about["coco_url"],
    }


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
    raise UserError(
        f"{url}: cannot be fetched ({reason}); downloading needs the network: without it, "
        "name a folder of images."
    )


def summary(selection: dict) -> str:
    """The selection as lines to print."""
    words = ", ".join(f'"{word}"' for word in selection["contains"])
    text = f"a picture's text is one of its own{f' that has {words}' if words else ''}"
    left_out, licenses = (
        ", ".join(f"{count} {what}" for what, count in selection[name].items())
        for name in ("left out", "licenses")
    )
    enlarged = f"{selection['enlarged']} to --pixels {selection['pixels']}"
    lines = {
        "pictures": f"{selection['pictures']} of {selection['asked for']} asked for",
        "captions": f"{selection['captions']}; {text}, chosen by seed {selection['seed']}",
        "enlarged": enlarged if selection["enlarged"] else "",
        "left out": left_out or "nothing",
        "licences": licenses,
    }
    return "\n".join(f"{name}: {value}" for name, value in lines.items() if value)
