"""The contact sheet of the data doctor."""

import random
from pathlib import Path

import torch

from minidiff.data.doctor.traps import Folder
from minidiff.data.folder import load_image, to_model
from minidiff.errors import printable
from minidiff.figures.plots import grid

SHEET = 48  # images on the sheet at most


def contact_sheet(data: Folder, path: Path, seed: int = 0) -> list[Path]:
    """Write up to SHEET images, chosen by the seed, as training sees them; no file for none."""
    entries = [entry for entry in data.entries if entry.name in data.images]
    if not entries:
        return []
    count = min(SHEET, len(entries))
    chosen = [entries[i] for i in sorted(random.Random(seed).sample(range(len(entries)), count))]
    images = torch.stack([load_image(entry.path, 200) for entry in chosen])
    captions = [Path(e.name).name if e.caption is None else e.caption for e in chosen]
    name = data.folder.resolve().name
    title = printable(f"{count} of {len(entries)} pictures of {name}, as training sees them")
    columns = 8 if count > 16 else None
    return [grid(to_model(images), list(map(printable, captions)), path, columns, title)]
