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

from minidiff.data.captions import SUFFIXES, Fault, images_in, nfc, printable
from minidiff.data.coco_config import CocoConfig
from minidiff.data.folder import load_image
from minidiff.errors import UserError
from minidiff.training import atomic

PAUSES = (0, 1, 4)  # seconds before each try to download an image
GONE, DAMAGED = "pictures that are not at their address", "damaged pictures"
REPEATED, UNCLEAR = "pictures seen before", "pictures whose name fits several files or images"
FORMAT_ERRORS = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
APART = 2**64  # between the keys of images with one id
SELECTION = ("contains", "category", "crop", "pixels", "seed")  # in selection.json


@dataclass
class Source:
    """The content of the annotation files, and the choice of images.

    An image's key is its id. Where an earlier file gave that id to an image of another name, APART
    is added to it: many programs number the images of each file from 1.

    names: by an image's key, its file as the annotations name it, with forward slashes.
    about: by an image's key, the columns of metadata.jsonl about its id, licence and addresses.
    captions: by an image's key, in the order of the files.
    matches: the keys of the images that have the words and show the categories.
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
        showing = _showing(source, config.instances, config.category)
        if not matches & showing:
            words = " and ".join(f'"{word}"' for word in config.contains) or "captions"
            raise UserError(
                f"no picture has both: {len(matches)} have {words}, and {len(showing)} of those in "
                f"the annotations show {' and '.join(config.category)}; ask for fewer at once."
            )
        matches &= showing
    source.matches = sorted(matches)
    return source


def _add(source: Source, index) -> None:
    """Add a pycocotools COCO: its images, its captions, and counts of captions left out."""
    licenses = {one["id"]: one for one in index.dataset.get("licenses") or []}
    keys = {}
    for i, image in index.imgs.items():
        key = keys[i] = _key(source, int(i), name := _name(image))
        license = licenses.get(image.get("license")) or {}
        urls = {"source_url": "flickr_url", "coco_url": "coco_url"}
        source.names[key] = name
        source.about[key] = {
            "coco_id": int(i),
            "license": _text(license.get("name") or "unknown"),
            "license_url": _text(license.get("url") or "unknown"),
        } | {name: _text(image.get(field) or "") for name, field in urls.items()}
    for i, annotations in index.imgToAnns.items():
        captions = source.captions.setdefault(keys.get(i, int(i)), [])
        for one in annotations:
            caption = _text(one["caption"])
            if i not in keys:
                source.counts["captions without a picture"] += 1
            elif not isinstance(one["caption"], str):
                source.counts["captions that are no text"] += 1
            elif not caption:
                source.counts["empty captions"] += 1
            elif caption in captions:
                source.counts["captions seen before"] += 1
            else:
                captions.append(caption)


def _key(source: Source, i: int, name: str) -> int:
    """The key of an image with this id and this name, new or added before."""
    while source.names.get(i, name) != name:
        i += APART
    return i


def _name(image: dict) -> str:
    return _text(image["file_name"]).replace("\\", "/")


def _text(value: object) -> str:
    """In one line. Halves of characters are valid in JSON, but not in UTF-8."""
    return " ".join(str(value).split()).encode("utf-8", "replace").decode()


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
    except FORMAT_ERRORS as error:
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


def _showing(source: Source, instances: Path, categories: Sequence[str]) -> set[int]:
    """The keys of the images that show all categories. Where several images have one id, their
    names decide."""
    needs = "images, categories, and annotations with category_id"
    with coco_file(instances, "instances_val2017.json", needs) as index:
        names = {category["name"]: category["id"] for category in index.dataset["categories"]}
        for name in categories:
            if name not in names:
                near = difflib.get_close_matches(name, names, 1)
                advice = f"perhaps you meant {near[0]}" if near else f"there is {', '.join(names)}"
                raise UserError(f'{instances}: no category "{name}"; {advice}.')
        showing = set(index.getImgIds(catIds=[names[name] for name in categories]))
        by_name = {(int(i), _name(index.imgs[i])) for i in showing if i + APART in source.names}
        alone = {int(i) for i in showing if i + APART not in source.names}
    return {
        key for key, name in source.names.items() if key in alone or (key % APART, name) in by_name
    }


def check_new(out: Path) -> None:
    """Refuse to write where something is."""
    if os.path.lexists(out):
        raise UserError(f"`out` {out} is there already; name a new folder, or remove that one.")


def write(source: Source, out: Path) -> dict[str, object]:
    """Write as many images as the config asks for, or as there are, and their captions.

    Returns the content of selection.json. The seed determines which images; the seed and the image
    alone determine which of its captions is its text.
    """
    config, counts = source.config, source.counts.copy()
    files = images_in(config.images) if config.images else []
    names = {_last(path.name) for path in files}
    paths = _located(source, files)
    captioned = {i: _last(source.names[i]) for i, own in source.captions.items() if own}
    missing = {} if config.download else captioned.keys() - paths.keys()
    without = Counter(captioned[i] in names for i in missing)
    counts["captioned pictures that are not in the folder of images"] = without[False]
    counts[UNCLEAR] = without[True]
    counts["pictures without captions"] = len(names - set(captioned.values()))
    counts["pictures of the same name"] = len(files) - len(names)
    order = [i for i in source.matches if config.download or i in paths]
    if not order:
        none = f"none of the {len(source.matches)} pictures that were asked for"
        remedy = "the names must be those in the annotations, or set download"
        if without[True]:
            remedy = f"{without[True]} {UNCLEAR}: name the folder of one file's pictures at a time"
        raise UserError(f"{none} is in {config.images}; {remedy}.")
    random.Random(config.seed).shuffle(order)

    rows, enlarged = [], 0
    check_new(out)
    bar = tqdm(desc="pictures", total=min(config.size, len(order)), unit="", leave=False)
    with atomic.write(out) as new, bar:
        (new / "images").mkdir(parents=True)
        readable = _readable(source, order, paths, new / "fetched", counts)
        for i, path, shorter in islice(readable, config.size):
            one = row(source, i, config.seed)
            while (new / one["file_name"]).exists():  # another image of this name
                one["file_name"] = one["file_name"].replace("/", f"/{one['coco_id']}-", 1)
            save_image(config, path, new / one["file_name"])
            enlarged += shorter < (config.pixels or 0)
            rows.append(one)
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


def _located(source: Source, files: list[Path]) -> dict[int, Path]:
    """The file of each image: the one whose path ends with the image's name, or the only one of
    its last name. An image that fits several files has none, nor do images that fit one file."""
    images, by_name = source.config.images, {}
    for path in files:
        by_name.setdefault(_last(path.name), []).append(path)
    claims: dict[Path, list[tuple[int, bool]]] = {}  # by file: keys, and whether all of it fits
    for i, name in source.names.items():
        alike = by_name.get(_last(name), [])
        whole = [path for path in alike if nfc(path.as_posix()).endswith(nfc(f"/{name}"))]
        exact = [path for path in whole if path == images / name]
        fits = exact or whole or alike
        if len(fits) == 1:
            claims.setdefault(fits[0], []).append((i, bool(whole)))
    paths = {}
    for path, claim in claims.items():
        best = [i for i, whole in claim if whole] or [i for i, _ in claim]
        if len(best) == 1:
            paths[best[0]] = path
    return paths


def _last(name: str) -> str:
    """A file's name without folders, its accents in one spelling."""
    return nfc(name.rpartition("/")[2])


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
    source: Source, order: list[int], paths: dict[int, Path], download: Path, counts: Counter
) -> Iterator[tuple[int, Path, int]]:
    """Yield key, file and shorter side of each image that can be read, once; count the others.

    Images that are not in `paths` are downloaded, all to one file.
    """
    used: set[bytes] = set()
    for i in order:
        path = paths.get(i) or fetch(source.about[i]["coco_url"], download)
        if path is None:
            counts[GONE] += 1
            continue
        try:
            pixels = load_image(path)
        except Fault as fault:
            tqdm.write(printable(f"left out: {fault}"), file=sys.stderr)
            counts[DAMAGED] += 1
            continue
        digest = hashlib.sha256(pixels.numpy().tobytes()).digest()
        if digest in used:
            counts[REPEATED] += 1
            continue
        used.add(digest)
        yield i, path, min(pixels.shape[1:])


def row(source: Source, i: int, seed: int) -> dict[str, object]:
    """A line of metadata.jsonl; `text` is one of the image's five captions, [1], with the words."""
    captions, words = source.captions[i], source.config.contains
    matching = [k for k, caption in enumerate(captions) if has(caption, words)]
    k = random.Random(f"{seed} {i}").choice(matching)
    name = Path(source.names[i]).name  # annotations must not say where to write
    if not name.isprintable() or Path(name).suffix.lower() not in SUFFIXES or len(name) > 100:
        name = f"{source.about[i]['coco_id']}.jpg"
    row = {"file_name": f"images/{name}", "text": captions[k], "text_index": k}
    return row | {"captions": captions} | source.about[i]


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
