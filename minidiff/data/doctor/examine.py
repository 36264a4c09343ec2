"""The data doctor: one pass over a folder of images, and its report as text and JSON.

An error is what the loader (folder.py) refuses: the doctor calls the same functions. What the
loader takes, but you may not have meant, is a warning or a note, from the table in traps.py.
"""

import itertools
import json
import os
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from minidiff.data import captions as loader
from minidiff.data.captions import Fault, images_in
from minidiff.data.doctor import traps
from minidiff.data.doctor.traps import TRAPS, Entry, Folder, ImageInfo, examine_image
from minidiff.data.folder import ClassFolder
from minidiff.errors import UserError, printable
from minidiff.options.sampling import check_size
from minidiff.text import token_ids
from minidiff.training import atomic

LEVELS = {"error": "errors, cannot be trained on", "warning": "warnings"}
LEVELS["note"] = "notes, dealt with by the loader"
LAYOUTS = ("captions", "classes", "pictures")
# What to do about a fault, where the loader does not say it.
ADVICE = {name: trap.advice for name, trap in TRAPS.items()}
ADVICE["no metadata.jsonl"] = (
    "a folder that needs none: `layout=classes` (a folder for each), "
    "or `layout=pictures` (a DreamBooth subject)"
)


class Finding(NamedTuple):
    level: str
    trap: str
    where: str
    what: str


@dataclass
class Report:
    """What was found in a folder, errors first, and its figures."""

    data: Folder
    findings: list[Finding]
    summary: dict[str, object]

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "error"]


def examine(
    folder: Path,
    layout: str = "captions",
    caption_column: str = "text",
    size: int = 512,
    multiple: int = 64,
) -> Report:
    """Read a whole folder and report on it. size: of the images in training, in pixels; multiple:
    what the model's sizes are divisible by.

    Raises UserError for a missing or empty folder, an unknown layout, or a size no network takes.
    """
    if layout not in LAYOUTS:
        raise UserError(f'no layout "{layout}"; there is {", ".join(LAYOUTS)}.')
    check_size(size, 8)
    folder = loader.check_folder(folder)
    findings: list[Finding] = []
    paths = images_in(folder)
    if layout == "captions":
        entries = _captioned(folder, paths, caption_column, findings)
    else:
        entries = _without_metadata(folder, layout, paths, findings)
    named = {entry.name: entry.path for entry in entries if entry.path is not None}
    unlisted = {}
    if layout == "captions":
        unlisted = {os.path.relpath(path, folder): path for path in paths}
        for entry in entries:
            unlisted.pop(entry.name, None)

    images, files = {}, named | unlisted
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
        results = pool.map(_image_or_fault, files.values())
        results = tqdm(results, "reading pictures", len(files), unit="", leave=False)
        for name, result in zip(files, results, strict=True):
            if isinstance(result, Fault):  # an image that no line names stops nothing
                level = "error" if name in named else "warning"
                findings.append(Finding(level, result.trap, name, str(result)))
            elif name in named:
                images[name] = result

    data = Folder(folder, size, multiple, list(_names(folder)), list(unlisted), entries, images)
    for name, trap in TRAPS.items():
        findings += (Finding(trap.level, name, where, str(what)) for where, what in trap.find(data))
    # A stable sort: within a level, the loader's order, then the table's.
    findings.sort(key=lambda finding: list(LEVELS).index(finding.level))
    return Report(data, findings, _summary(data, findings))


def _captioned(
    folder: Path, paths: list[Path], caption_column: str, findings: list[Finding]
) -> list[Entry]:
    """The lines of metadata.jsonl. A line may have two faults, its image and its caption."""
    entries: list[Entry] = []
    # Suggesting a name is slow: only the first 20 missing images get one.
    candidates = itertools.repeat(paths, 20)
    checked = partial(_checked, findings)
    for where, line in checked(str(folder), lambda: list(loader.caption_lines(folder))) or []:
        if (row := checked(where, loader.parse_row, where, line)) is None:
            continue
        path = checked(where, loader.image_of, folder, where, row, lambda: next(candidates, []))
        caption = checked(where, loader.caption_of, where, row, caption_column)
        name = os.path.relpath(path, folder) if path else row.get("file_name")
        name = os.path.normpath(name) if isinstance(name, str) else None
        entries.append(Entry(where, name, path, caption, line))
    return entries


def _checked(findings: list[Finding], where: str, function: Callable, *args: object) -> object:
    """What the loader's function returns; None, and a finding, if it raises a Fault."""
    try:
        return function(*args)
    except Fault as fault:
        findings.append(Finding("error", fault.trap, where, str(fault)))
        return None


def _without_metadata(
    folder: Path, layout: str, paths: list[Path], findings: list[Finding]
) -> list[Entry]:
    captions = [None] * len(paths)
    if layout == "classes":
        data = _checked(findings, str(folder), ClassFolder, folder)
        paths, captions = (data.paths, data.captions) if data else ([], [])
    elif not paths:
        message = f"{folder}: there are no pictures below it"
        findings.append(Finding("error", "no pictures", str(folder), message))
    names = [os.path.relpath(path, folder) for path in paths]
    return [Entry(*row, line=b"") for row in zip(names, names, paths, captions, strict=True)]


def _image_or_fault(path: Path) -> ImageInfo | Fault:
    try:
        return examine_image(path)
    except Fault as fault:
        return fault


def _names(folder: Path) -> Iterator[str]:
    """The names of everything below the folder, but not of what is in junk folders."""
    for place, folders, files in os.walk(folder):
        folders.sort()
        paths = (os.path.join(place, name) for name in folders + files)
        yield from sorted(os.path.relpath(path, folder) for path in paths)
        folders[:] = [name for name in folders if name not in traps.JUNK]


def _summary(data: Folder, findings: list[Finding]) -> dict[str, object]:
    """The figures of report.json."""
    captions = [entry.caption for entry in data.entries if entry.caption is not None]
    tokens = [len(token_ids(caption)) for caption in captions]
    sides = [min(image.width, image.height) for image in data.images.values()]
    return {
        "pictures": len(data.images),
        "pictures that no line names": len(data.unlisted),
        "captions": len(captions),
        "different captions": len(set(captions)),
        "shorter side in pixels": _spread(sides),
        "tokens of a caption": _spread(tokens),
        f"captions over {traps.ROOM} tokens": sum(count > traps.ROOM for count in tokens),
    } | {
        trap: sum(finding.trap == trap for finding in findings)
        for trap in ("the same picture twice", "near-duplicate")
    }


def _spread(values: list[int]) -> dict[str, float] | None:
    if not values:
        return None
    return {"least": min(values), "median": statistics.median(values), "most": max(values)}


def _by_trap(findings: list[Finding]) -> dict[tuple[str, str], list[Finding]]:
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.level, finding.trap), []).append(finding)
    return groups


def as_text(report: Report, examples: int = 3) -> str:
    """The report as text: the figures, then each trap with its first places."""
    lines = [f"{report.data.folder}"]
    for name, value in report.summary.items():
        if isinstance(value, dict):
            value = "{least:g} to {most:g}, median {median:g}".format(**value)
        lines.append(f"  {name + ':':32}{'-' if value is None else value}")
    last_level = ""
    for (level, trap), group in _by_trap(report.findings).items():
        if level != last_level:
            lines += ["", LEVELS[level]]
        last_level = level
        advice = f" ({ADVICE[trap]})" if trap in ADVICE else ""
        lines.append(f"  {trap}: {len(group)}{advice}")
        for _, _, where, what in group[:examples]:  # the loader's messages name the place
            lines.append(f"      {f'{where}  {what}' if trap in TRAPS else what:.300}")
        if len(group) > examples:
            lines.append(f"      and {len(group) - examples} more")
    end = f"{report.data.folder}: {'cannot' if report.errors else 'can'} be trained on"
    return "\n".join(printable(line) for line in [*lines, "", end])


def verdict(report: Report) -> str:
    """Why the folder cannot be trained on, in one line, with the first fault in full."""
    by_trap, first = Counter(finding.trap for finding in report.errors), report.errors[0]
    counts = ", ".join(f"{trap}: {count}" for trap, count in by_trap.items())
    advice = f"; {ADVICE[first.trap]}" if first.trap in ADVICE else ""
    return printable(f"cannot be trained on ({counts}): {first.what}{advice}")


def write(report: Report, out: Path) -> Path:
    """Write report.json, with every finding."""
    groups = [
        {
            "trap": trap,
            "level": level,
            "count": len(group),
            "advice": ADVICE.get(trap, ""),
            "places": [{"where": where, "what": what} for _, _, where, what in group],
        }
        for (level, trap), group in _by_trap(report.findings).items()
    ]
    whole = {"about": atomic.SIGNATURE, "folder": str(report.data.folder)}
    whole |= {"size": report.data.size, "trainable": not report.errors}
    whole |= {"summary": report.summary, "findings": groups}
    with atomic.write(out / "report.json", atomic.unsigned) as new:
        new.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    return out / "report.json"
