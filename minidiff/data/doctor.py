"""The data doctor: one pass over a folder, what it found as text, as report.json and as a sheet of pictures, are all in this file.

A finding is an error where the loader (folder.py) refuses the picture, the line or the folder: the doctor asks the same functions. What the
loader takes, but you may not have meant, is a warning or a note from the table in traps.py.
"""
import json
import os
import random
import statistics
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from minidiff import atomic, plots
from minidiff.clip import token_ids
from minidiff.data import folder as loader
from minidiff.data.folder import Fault, pictures_in
from minidiff.data.traps import JUNK, ROOM, TRAPS, Picture, Row, Seen, look
from minidiff.errors import UserError

LEVELS = {"error": "errors, cannot be trained on", "warning": "warnings", "note": "notes, dealt with by the loader"}
LAYOUTS = ("captions", "classes", "pictures")
WITHOUT_CAPTIONS = "a folder that needs none: --layout classes (a folder for each), or --layout pictures (a DreamBooth subject)"
SHEET = 48  # pictures on the sheet at most


class Finding(NamedTuple):
    level: str
    trap: str
    where: str
    what: str


@dataclass
class Report:
    seen: Seen
    findings: list[Finding]
    summary: dict[str, object]

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "error"]


def examine(folder: Path, layout: str = "captions", caption_column: str = "text", size: int = 512) -> Report:
    """One pass over the folder. Refused at once are only a folder that is not there or empty, a layout there is not, and a size no network takes."""
    if layout not in LAYOUTS:
        raise UserError(f'no layout "{layout}"; there is {", ".join(LAYOUTS)}.')
    loader.check_size(size, 8)
    folder = loader.existing(folder)
    findings: list[Finding] = []
    there = pictures_in(folder)
    if layout == "captions":
        rows = captioned_rows(folder, there, caption_column, findings)
    else:
        rows = class_rows(folder, findings) if layout == "classes" else bare_rows(folder, there, findings)
    paths = {row.name: row.path for row in rows if row.path is not None}
    names = {row.name for row in rows}
    loose = {name: path for path in there if layout == "captions" and (name := os.path.relpath(path, folder)) not in names}

    pictures = {}
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
        looked = pool.map(look_or_fault, [*paths.values(), *loose.values()])
        for name, result in zip([*paths, *loose], tqdm(looked, "reading pictures", len(paths) + len(loose), unit="", leave=False), strict=True):
            if isinstance(result, Fault):  # a picture that is never read stops nothing
                findings.append(Finding("error" if name in paths else "warning", result.trap, name, str(result)))
            elif name in paths:
                pictures[name] = result

    seen = Seen(folder, size, list(entries(folder)), list(loose), rows, pictures)
    findings += [Finding(trap.level, name, *place) for name, trap in TRAPS.items() for place in trap.find(seen)]
    findings.sort(key=lambda finding: list(LEVELS).index(finding.level))  # stable: the loader's order, then the table's
    return Report(seen, findings, summary(seen, findings))


def captioned_rows(folder: Path, there: list[Path], caption_column: str, findings: list[Finding]) -> list[Row]:
    """The lines of metadata.jsonl. A line has up to two faults, its picture and its caption; the loader stops at the first."""
    rows: list[Row] = []
    missing: list[str] = []  # looking for a better name is slow: not for ten thousand of them

    def known() -> list[Path]:
        missing.append("")
        return there if len(missing) <= 20 else []

    def unless_fault(where: str, function, *args):
        try:
            return function(*args)
        except Fault as fault:
            findings.append(Finding("error", fault.trap, where, str(fault)))

    lines = unless_fault(str(folder), lambda: list(loader.metadata_lines(folder)))
    for where, line in lines or []:
        if (row := unless_fault(where, loader.row_of, where, line)) is None:
            continue
        path = unless_fault(where, loader.picture_of, folder, where, row, known)
        caption = unless_fault(where, loader.caption_of, where, row, caption_column)
        name = row.get("file_name")
        name = os.path.relpath(path, folder) if path else os.path.normpath(name) if isinstance(name, str) else None
        rows.append(Row(where, name, path, caption, line))
    return rows


def class_rows(folder: Path, findings: list[Finding]) -> list[Row]:
    """Every picture of every class; the caption is the name of the class."""
    try:
        data = loader.ClassFolder(folder)
    except Fault as fault:
        findings.append(Finding("error", fault.trap, str(folder), str(fault)))
        return []
    names = [os.path.relpath(path, folder) for path in data.paths]
    return [Row(name, name, path, caption, b"") for name, path, caption in zip(names, data.paths, data.captions, strict=True)]


def bare_rows(folder: Path, there: list[Path], findings: list[Finding]) -> list[Row]:
    """Pictures without captions: those of a DreamBooth subject."""
    if not there:
        findings.append(Finding("error", "no pictures", str(folder), f"{folder}: there are no pictures below it"))
    return [Row(name, name, path, None, b"") for path in there for name in [os.path.relpath(path, folder)]]


def look_or_fault(path: Path) -> Picture | Fault:
    try:
        return look(path)
    except Fault as fault:
        return fault


def entries(folder: Path) -> Iterator[str]:
    """The names of everything below the folder; of junk folders not what is in them."""
    for place, folders, names in os.walk(folder):
        folders.sort()
        yield from sorted(os.path.relpath(os.path.join(place, name), folder) for name in folders + names)
        folders[:] = [name for name in folders if name not in JUNK]


def summary(seen: Seen, findings: list[Finding]) -> dict[str, object]:
    """The figures of report.json."""
    captions = [row.caption for row in seen.rows if row.caption is not None]
    tokens = [len(token_ids(caption)) for caption in captions]
    sides = [min(picture.width, picture.height) for picture in seen.pictures.values()]
    counts = {trap: sum(finding.trap == trap for finding in findings) for trap in ("the same picture twice", "near-duplicate")}
    return {
        "pictures": len(seen.pictures),
        "pictures that no line names": len(seen.unlisted),
        "captions": len(captions),
        "different captions": len(set(captions)),
        "shorter side in pixels": spread(sides),
        "tokens of a caption": spread(tokens),
        f"captions over {ROOM} tokens": sum(count > ROOM for count in tokens),
        **counts,
    }


def spread(values: list[int]) -> dict[str, float] | None:
    return {"least": min(values), "median": statistics.median(values), "most": max(values)} if values else None


# The report.


def by_trap(findings: list[Finding]) -> dict[tuple[str, str], list[Finding]]:
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.level, finding.trap), []).append(finding)
    return groups


def advice(trap: str) -> str:
    """The loader's faults say by themselves what to do."""
    return TRAPS[trap].advice if trap in TRAPS else WITHOUT_CAPTIONS if trap == "no metadata.jsonl" else ""


def as_text(report: Report, examples: int = 3) -> str:
    """What is printed: the figures, then each trap with the first places it was seen in."""
    lines = [f"{report.seen.folder}"]
    for name, value in report.summary.items():
        value = "{least:g} to {most:g}, median {median:g}".format(**value) if isinstance(value, dict) else "-" if value is None else value
        lines.append(f"  {name + ':':32}{value}")
    level = ""
    for (this, trap), group in by_trap(report.findings).items():
        if this != level:
            lines += ["", LEVELS[this]]
        level = this
        lines.append(f"  {trap}: {len(group)}" + (f" ({said})" if (said := advice(trap)) else ""))
        shown = [finding.what if this == "error" or trap not in TRAPS else f"{finding.where}  {finding.what}" for finding in group[:examples]]
        lines += [f"      {line:.300}" for line in shown]
        if len(group) > examples:
            lines.append(f"      and {len(group) - examples} more")
    end = f"{report.seen.folder}: {'cannot' if report.errors else 'can'} be trained on"
    return "\n".join(printable(line) for line in [*lines, "", end])


def verdict(report: Report) -> str:
    """Why it cannot be trained on, in one line: the first fault as the loader says it."""
    traps = ", ".join(f"{trap}: {len(group)}" for (_, trap), group in by_trap(report.errors).items())
    first = report.errors[0]
    more = f"; {said}" if (said := advice(first.trap)) else ""
    return printable(f"cannot be trained on ({traps}): {first.what}{more}")


def printable(text: str) -> str:
    """Names and captions are strangers': what is no character, or would move the cursor, is written as its escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def write(report: Report, out: Path, seed: int = 0) -> list[Path]:
    """report.json with every finding, and contact.png: up to 48 pictures, chosen by the seed, cut as training at a square size cuts them."""
    groups = [
        {"trap": trap, "level": level, "count": len(group), "advice": advice(trap), "places": [{"where": f.where, "what": f.what} for f in group]}
        for (level, trap), group in by_trap(report.findings).items()
    ]
    about = {"about": atomic.SIGNATURE, "folder": str(report.seen.folder), "size": report.seen.size, "trainable": not report.errors}
    whole = about | {"summary": report.summary, "findings": groups}
    with atomic.write(out / "report.json", atomic.unsigned) as new:
        new.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    return [out / "report.json", *sheet(report.seen, out / "contact.png", seed)]


def sheet(seen: Seen, path: Path, seed: int) -> list[Path]:
    rows = [row for row in seen.rows if row.name in seen.pictures]
    if not rows:
        return []
    chosen = [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), min(SHEET, len(rows))))]
    pictures = loader.to_model(torch.stack([loader.load_picture(row.path, 200) for row in chosen]))
    captions = [printable(Path(row.name).name if row.caption is None else row.caption) for row in chosen]
    title = printable(f"{len(chosen)} of {len(rows)} pictures of {seen.folder.resolve().name}, as training sees them")
    return [plots.grid(pictures, captions, path, columns=8 if len(chosen) > 16 else None, title=title)]
