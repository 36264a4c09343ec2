"""A captioned folder out of COCO's files: reading annotations, choosing pictures and captions, fetching and writing, are all in this file.

pycocotools reads the annotations. What is written is the folder that folder.py and Hugging Face's image-folder loader read.

[1] Chen et al. Microsoft COCO Captions: Data Collection and Evaluation Server. 2015. arXiv:1504.00325
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
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from itertools import islice
from pathlib import Path

from PIL import Image, ImageOps
from tqdm import tqdm

from minidiff import atomic
from minidiff.data.folder import Fault, load_picture, pictures_in
from minidiff.errors import UserError

PAUSES = (0, 1, 4)  # seconds before each try to fetch a picture
GONE, DAMAGED, SEEN = "pictures that are not at their address", "damaged pictures", "pictures seen before"


@dataclass
class Shape:
    """What is done to a picture. With neither a crop nor a number of pixels, its file is copied as it is."""

    crop: str = "none"  # or centre: the middle square
    pixels: int | None = None  # of the shorter side

    def __post_init__(self):
        if self.crop not in ("centre", "none"):
            raise UserError(f'no crop "{self.crop}"; --crop is centre or none.')

    def save(self, source: Path, to: Path) -> None:
        if self == Shape():
            shutil.copyfile(source, to)
            return
        image = Image.fromarray(load_picture(source).permute(1, 2, 0).numpy())
        side = self.pixels or min(image.size)
        if self.crop == "centre":
            image = ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)
        else:
            image = image.resize([round(side * length / min(image.size)) for length in image.size], Image.Resampling.LANCZOS)
        image.save(to, quality=95, subsampling=0)


@dataclass
class Source:
    """What the annotation files say."""

    about: dict[int, dict]  # COCO's record of a picture by its id: file_name, coco_url, flickr_url, and here license_name and license_url
    captions: dict[int, list[str]]  # by picture, in the files' order
    words: list[str]
    wanted: list[int]  # the captioned pictures that have the words and show the categories
    counts: Counter  # what was met on the way
    settings: dict[str, object]


def read(annotations: tuple[Path, ...], words: list[str], instances: Path | None = None, categories: list[str] | None = None) -> Source:
    """Read caption files, and choose the pictures of which one caption has all the words, and that show all the categories."""
    about: dict[int, dict] = {}
    captions: dict[int, list[str]] = {}
    counts: Counter = Counter()
    for path in annotations:
        with coco_file(path, "captions_val2017.json", "images, and annotations with captions") as index:
            licenses = {one["id"]: {"license_name": one["name"], "license_url": one["url"]} for one in index.dataset.get("licenses", [])}
            for i, image in index.imgs.items():
                unknown = {"license_name": "unknown", "license_url": "unknown"}
                urls = {url: str(image.get(url, "")) for url in ("coco_url", "flickr_url")}
                about[int(i)] = {"file_name": str(image["file_name"])} | urls | licenses.get(image.get("license"), unknown)
            for i, found in index.imgToAnns.items():
                for caption in (one_line(one["caption"]) for one in found):
                    before = captions.setdefault(int(i), [])
                    if int(i) in about and caption and caption not in before:
                        before.append(caption)
                    else:
                        what = "empty captions" if not caption else "captions seen before" if caption in before else "captions without a picture"
                        counts[what] += 1
    wanted = sorted(i for i, own in captions.items() if any(has(caption, words) for caption in own))
    if not wanted:
        raise UserError(no_such_words(captions, words))
    if categories:
        wanted = sorted(set(wanted) & showing(instances, categories))
    settings = {"annotations": [path.name for path in annotations], "contains": words, "category": categories or []}
    return Source(about, captions, words, wanted, counts, settings)


@contextlib.contextmanager
def coco_file(path: Path, example: str, needs: str):  # yields a pycocotools COCO
    """An annotation file with its index; whatever is not as it should be, in the file or in the block, is one line."""
    from pycocotools.coco import COCO

    try:
        index = COCO()
        index.dataset = json.loads(path.read_bytes())
        for number, one in enumerate(index.dataset["annotations"]):
            one.setdefault("id", number)  # the index asks for it, nobody else does
        with contextlib.redirect_stdout(io.StringIO()):  # it reports to stdout
            index.createIndex()
        yield index
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{path}: not a COCO file such as {example} ({reason:.100}); it needs {needs}.") from None


def one_line(caption: str) -> str:
    """On one line, and without the halves of characters that JSON can hold and UTF-8 cannot."""
    return " ".join(caption.split()).encode("utf-8", "replace").decode()


def has(caption: str, words: list[str]) -> bool:
    """All words, as whole words, upper and lower case alike; of three letters or more also with the s or es of a plural."""
    return all(re.search(rf"(?<!\w){re.escape(word)}{'(?:e?s)?' if len(word) > 2 else ''}(?!\w)", caption, re.I) for word in words)


def no_such_words(captions: dict[int, list[str]], words: list[str]) -> str:
    if not any(captions.values()):
        return "the annotations hold no captions; name a captions_*.json of COCO."
    counts = {word: sum(any(has(caption, [word]) for caption in own) for own in captions.values()) for word in words}
    said = ", ".join(f'"{word}" in those of {count} pictures' for word, count in counts.items())
    known = Counter(word for own in captions.values() for caption in own for word in re.findall(r"\w+", caption.lower()))
    nears = [difflib.get_close_matches(word.lower(), known) for word, count in counts.items() if not count]
    close = [max(near, key=known.__getitem__) for near in nears if near]  # the most usual of three
    return f"no caption has all of the words: {said}; " + (f"perhaps you meant {', '.join(close)}." if close else "ask for fewer at once.")


def showing(instances: Path | None, categories: list[str]) -> set[int]:
    """The ids of the pictures that show all these."""
    if instances is None:
        raise UserError("--category needs --instances: the COCO file that says what is where, such as instances_val2017.json.")
    with coco_file(instances, "instances_val2017.json", "images, categories, and annotations with category_id") as index:
        names = {category["name"]: category["id"] for category in index.dataset["categories"]}
        for name in categories:
            if name not in names:
                near = difflib.get_close_matches(name, names, 1)
                advice = f"perhaps you meant {near[0]}" if near else f"there is {', '.join(names)}"
                raise UserError(f'{instances}: no category "{name}"; {advice}.')
        found = set(index.getImgIds(catIds=[names[name] for name in categories]))
    return found


# Writing.


def check_new(out: Path) -> None:
    if os.path.lexists(out):
        raise UserError(f"--out {out} is there already; name a new folder, or remove that one.")


def write(source: Source, images: Path | None, out: Path, size: int, shape: Shape, download: bool = False, seed: int = 0) -> dict[str, object]:
    """Write `size` of the wanted pictures, or as many as there are, and return what selection.json holds. Which pictures, follows from the seed;
    which caption is a picture's text, from the seed and the picture alone."""
    if images is None and not download:
        raise UserError("no --images; name the folder of COCO's pictures, or pass --download.")
    if images is not None and not images.is_dir():
        raise UserError(f"--images {images}: no such folder.")
    files = pictures_in(images) if images else []
    there = {path.name: path for path in reversed(files)}
    captioned = {picture_name(source, i) for i, own in source.captions.items() if own}
    counts = source.counts + Counter({
        "captioned pictures that are not in --images": 0 if download else len(captioned - there.keys()),
        "pictures without captions": len(there.keys() - captioned),
        "pictures of the same name": len(files) - len(there),
    })
    order = [i for i in source.wanted if download or picture_name(source, i) in there]
    if not order:
        wanted = f"none of the {len(source.wanted)} pictures that were asked for is in {images}"
        raise UserError(f"{wanted}; the names must be those in the annotations, or pass --download.")
    random.Random(seed).shuffle(order)

    rows, enlarged = [], 0
    check_new(out)
    with atomic.write(out) as new, tqdm(desc="pictures", total=min(size, len(order)), unit="", leave=False) as bar:
        (new / "images").mkdir(parents=True)
        for i, path, shorter in islice(sound(source, order, there, new / "fetched", counts), size):
            shape.save(path, new / "images" / picture_name(source, i))
            enlarged += shorter < (shape.pixels or 0)
            rows.append(row(source, i, seed))
            bar.update()
        if not rows:
            met = ", ".join(f"{counts[what]} {what}" for what in (GONE, DAMAGED, SEEN) if counts[what])
            raise UserError(f"nothing to write: all of the {len(order)} pictures that were asked for are left out: {met}.")
        rows.sort(key=lambda one: one["coco_id"])
        how = {"crop": shape.crop, "pixels": shape.pixels, "seed": seed, "asked for": size}
        found = {"pictures": len(rows), "captions": sum(len(one["captions"]) for one in rows), "enlarged": enlarged, "left out": dict(+counts)}
        selection = {**source.settings, **how, **found, "licenses": dict(Counter(one["license"] for one in rows).most_common())}
        (new / "fetched").unlink(missing_ok=True)
        (new / "metadata.jsonl").write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows), encoding="utf-8")
        (new / "selection.json").write_text(json.dumps(selection, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return selection


def sound(source: Source, order: list[int], there: dict[str, Path], fetched: Path, counts: Counter) -> Iterator[tuple[int, Path, int]]:
    """Yield id, file and shorter side of each picture that can be read and was not seen before; the others are counted."""
    seen: set[bytes | str] = set()
    for i in order:
        name = picture_name(source, i)
        path = there.get(name) or fetch(source.about[i]["coco_url"], fetched)
        if path is None:
            counts[GONE] += 1
            continue
        try:
            pixels = load_picture(path)
        except Fault as fault:
            tqdm.write(f"left out: {fault}", file=sys.stderr)
            counts[DAMAGED] += 1
            continue
        digest = hashlib.sha256(pixels.numpy().tobytes()).digest()
        if name in seen or digest in seen:
            counts[SEEN] += 1
            continue
        seen |= {name, digest}
        yield i, path, min(pixels.shape[1:])


def picture_name(source: Source, i: int) -> str:
    """The file's name without folders: an annotation file must not say where to write."""
    return Path(source.about[i]["file_name"]).name


def row(source: Source, i: int, seed: int) -> dict[str, object]:
    """A line of metadata.jsonl. People wrote five captions to a picture, [1]; `text` is one that has the words, and text_index says which."""
    about, captions = source.about[i], source.captions[i]
    k = random.Random(f"{seed} {i}").choice([k for k, caption in enumerate(captions) if has(caption, source.words)])
    line = {"file_name": f"images/{picture_name(source, i)}", "text": captions[k], "text_index": k, "captions": captions, "coco_id": i}
    urls = {"source_url": about["flickr_url"], "coco_url": about["coco_url"]}
    return line | {"license": about["license_name"], "license_url": about["license_url"]} | urls


def fetch(url: str, to: Path) -> Path | None:
    """The file at an address, or None if that is not there. Without a network there is nothing to do but to say so."""
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
    raise UserError(f"{url}: cannot be fetched ({reason}); --download needs the network: without it, name a folder of pictures with --images.")


def summary(selection: dict) -> str:
    """What is printed at the end."""
    words = " that has " + ", ".join(f'"{word}"' for word in selection["contains"]) if selection["contains"] else ""
    left_out, licenses = (", ".join(f"{count} {what}" for what, count in selection[name].items()) for name in ("left out", "licenses"))
    lines = {
        "pictures": f"{selection['pictures']} of {selection['asked for']} asked for",
        "captions": f"{selection['captions']}; a picture's text is one of its own{words}, chosen by seed {selection['seed']}",
        "enlarged": f"{selection['enlarged']} to --pixels {selection['pixels']}" if selection["enlarged"] else "",
        "left out": left_out or "nothing",
        "licences": licenses,
    }
    return "\n".join(f"{name}: {value}" for name, value in lines.items() if value)
