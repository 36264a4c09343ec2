"""The verb that says what a checkpoint is. It imports no torch."""

import json
from pathlib import Path

from minidiff.cli import options
from minidiff.cli.flags import in_flags
from minidiff.cli.options import File, Source
from minidiff.errors import UserError, printable
from minidiff.training import atomic


def inspect(path: Source, out: File = None, offline: bool = False) -> None:
    """Say what a checkpoint is: layout, version, parts, sizes, keys that are missing or extra.

    Example: minidiff inspect sd15.safetensors

    Args:
        path: a folder of ours, a diffusers folder, one .safetensors or .ckpt file, or a name on the
            Hugging Face Hub.
        out: also write it there, as inspect.json.
        offline: ask the Hugging Face Hub for nothing; what its cache has is used.
    """
    from minidiff.checkpoints import hub
    from minidiff.checkpoints.inspect import inspect as rows_of

    if out is not None:
        options.check_out(out)
        atomic.check(out / "inspect.json", foreign)
    if offline:
        hub.go_offline()
    path = hub.resolve(path)
    if not path.exists():
        raise UserError(f'no file or folder "{path}".')
    rows = rows_of(path)
    width = max(len(what) for what, _ in rows)
    print(*(printable(f"{what:{width}}  {in_flags(how)}") for what, how in rows), sep="\n")
    if out is not None:
        text = json.dumps([{"what": what, "how": how} for what, how in rows], indent=2)
        with atomic.write(out / "inspect.json", foreign) as new:
            new.write_text(text + "\n", encoding="utf-8")
        print(out / "inspect.json")


def foreign(path: Path) -> Path | None:
    """path, where it is not an inspect.json of ours; see atomic.Stranger."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return path
    is_table = isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)
    return None if is_table and all(row.keys() == {"what", "how"} for row in rows) else path
