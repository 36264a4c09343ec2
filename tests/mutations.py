"""Files changed in every way: bytes, JSON values, tensors. A mutant follows from its seed alone."""

import io
import json
import random
import struct
import zlib
from pathlib import Path

import torch
from safetensors.torch import save

DEEP, LONG = "put a deep list here", "put a long number here"
VALUES = [None, True, False, -1, 0, 1, 2, 3.5, 10**9, 10**400, float("nan"), float("inf"), 1e-320]
VALUES += ["", "1", "x" * 10**5, "\ud800", "\x1b[31mred", "a\rb\nc", "../../secret", "\0", "é"]
VALUES += [[], {}, [[]], [1, 2, 3], {"a": 1}, [None], DEEP, LONG]
BITS = (b"9999999999", b"-1", b"null", b"{", b"]", b'"', b"1e999", b"true", b"\xff" * 4, b"\x1b[2J")


def mutated(file: Path, draw: random.Random) -> bytes:
    """Another content for a file, of the kind that its name tells."""
    content = file.read_bytes()
    change = CHANGES.get(file.suffix)
    if change is None or draw.random() < 0.4:
        return changed_bytes(content, draw)
    try:
        return change(content, draw)
    except (RuntimeError, ValueError, LookupError, TypeError):  # nobody can write such a file
        return changed_bytes(content, draw)


def changed_bytes(content: bytes, draw: random.Random) -> bytes:
    """Bytes changed, cut out, repeated or put in; mostly at the ends, where files say what they
    are."""
    content = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 5, 20))):
        end = draw.choice((min(len(content), 40), min(len(content), 3000), len(content)))
        at = draw.randrange(max(end, 1))
        if draw.random() < 0.3:
            at = max(0, len(content) - 1 - at)
        kind, length = draw.randrange(7), draw.choice((1, 8, 1000))
        if kind == 0 and content:
            content[at % len(content)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del content[at : at + length]
        elif kind == 2:
            content[at:at] = draw.randbytes(length)
        elif kind == 3:
            content[at:at] = content[at : at + 200]
        elif kind in (4, 5):
            content[at : at + 1] = draw.choice(BITS)
        elif draw.random() < 0.2:
            del content[at:]
    return bytes(content)


def places(tree: object) -> list[tuple[dict | list, object]]:
    """Every (container, key) of a tree of dicts and lists."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    found = [(tree, key) for key in keys]
    for key in keys:
        if isinstance(tree[key], dict | list):
            found += places(tree[key])
    return found


def changed_tree(tree: dict | list, draw: random.Random, values: list) -> None:
    """A value replaced, removed, renamed, wrapped or exchanged with another; sometimes several."""
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        if not (all_places := places(tree)):
            return
        container, key = draw.choice(all_places)
        kind = draw.randrange(8)
        if kind == 0:
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container[draw.choice((str(key) + "x", "\ud800", "\x1b[31m", ""))] = container.pop(key)
        elif kind == 2:
            container[key] = [container[key]]
        elif kind == 3:
            container[key] = draw.choice(all_places)[1]
        elif kind == 4 and type(container[key]) in (int, float):
            container[key] *= draw.choice((-1, 0.5, 2, 1000, 10**9))
        else:
            container[key] = draw.choice(values)


def changed_json(content: bytes, draw: random.Random) -> bytes:
    tree = [json.loads(content)]
    changed_tree(tree, draw, VALUES)
    return as_json(tree[0] if tree else None)


def changed_lines(content: bytes, draw: random.Random) -> bytes:
    """JSON lines: values changed in some lines, or lines exchanged, repeated or dropped."""
    rows = [json.loads(line) for line in content.splitlines()]
    if draw.random() < 0.2:
        rows = draw.choices(rows, k=draw.randrange(len(rows) + 2))
    else:
        changed_tree(rows, draw, VALUES)
    return b"".join(as_json(row) + b"\n" for row in rows)


def as_json(tree: object) -> bytes:
    text = json.dumps(tree).replace(f'"{DEEP}"', "[" * 10**5 + "]" * 10**5)
    return text.replace(f'"{LONG}"', "9" * 5000).encode()


def changed_table(content: bytes, draw: random.Random) -> bytes:
    """CSV: cells replaced."""
    rows = [line.split(",") for line in content.decode().splitlines()]
    for _ in range(draw.choice((1, 1, 3))):
        row = draw.choice(rows)
        row[draw.randrange(len(row))] = draw.choice(
            ("", "nan", "inf", "-1", "1e999", "word", '"', "9" * 5000, "\x1b[31m", "\ud800", "0")
        )
    return "\n".join(map(",".join, rows)).encode("utf-8", "surrogatepass")


def strange_tensors(value: torch.Tensor, draw: random.Random) -> torch.Tensor:
    """A tensor in a given one's place."""
    value = value.detach().clone()
    return draw.choice(
        (
            lambda: value.flatten(),
            lambda: value[None],
            lambda: (
                value.T.contiguous() if value.ndim == 2 else value.flip(0) if value.ndim else value
            ),
            lambda: torch.cat([value, value]) if value.ndim else value[None],
            lambda: value[:0] if value.ndim else value[None][:0],
            lambda: torch.tensor(1.0),
            lambda: torch.full_like(value, torch.nan),
            lambda: value.float().fill_(1e30),
            lambda: torch.zeros_like(value),
            lambda: value.to(draw.choice((torch.int64, torch.bool, torch.uint8))),
            lambda: value.to(draw.choice((torch.float16, torch.bfloat16, torch.float64))),
            lambda: value.to(torch.float8_e4m3fn),
            lambda: torch.zeros(2000, 3),
        )
    )()


def only_pickled(value: torch.Tensor, draw: random.Random) -> object:
    """What a pickle can hold and safetensors cannot."""
    return draw.choice(
        (
            lambda: torch.zeros(1).expand(10**10),  # four bytes in the file
            lambda: torch.tensor(0.0).expand(value.shape),
            lambda: value.to_sparse(),
            lambda: value.to(torch.complex64),
            lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
            lambda: torch.nn.Parameter(value.float()),
            lambda: draw.choice(VALUES),
        )
    )()


def changed_names(state: dict, draw: random.Random) -> None:
    name, other = draw.choice(list(state)), draw.choice(list(state))
    kind = draw.randrange(4)
    if kind == 0:
        del state[name]
    elif kind == 1:
        state[name[: draw.randrange(len(name) + 1)] + draw.choice(("", "x", "\x1b[31m", "\n"))] = (
            state.pop(name)
        )
    elif kind == 2:
        state[name], state[other] = state[other], state[name]
    else:
        state[draw.choice(("model.x", name + ".alpha", "9" * 300, "\x1b]0;title\7"))] = state[name]


def changed_safetensors(content: bytes, draw: random.Random) -> bytes:
    """Other tensors; or another header, which may lie."""
    length = struct.unpack("<Q", content[:8])[0]
    if draw.random() < 0.4:
        header = json.loads(content[8 : 8 + length])
        changed_tree(header, draw, VALUES)
        header = as_json(header)
        return struct.pack("<Q", len(header)) + header + content[8 + length :]
    metadata = json.loads(content[8 : 8 + length]).get("__metadata__")
    state = {name: value.clone() for name, value in opened(content).items()}
    for _ in range(draw.choice((1, 1, 3))):
        if draw.random() < 0.4 and state:
            changed_names(state, draw)
        elif state:
            name = draw.choice(list(state))
            state[name] = strange_tensors(state[name], draw)
    state = {name: value.clone().contiguous() for name, value in state.items()}
    return save(state, metadata)


def opened(content: bytes) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    return load(content)


def changed_pickle(content: bytes, draw: random.Random) -> bytes:
    """Other values and tensors in the same archive."""
    tree = [torch.load(io.BytesIO(content), weights_only=True)]
    for _ in range(draw.choice((1, 1, 3))):
        tensors = [(box, key) for box, key in places(tree) if torch.is_tensor(box[key])]
        if not tensors or draw.random() < 0.4:
            changed_tree(tree, draw, VALUES)
        else:
            box, key = draw.choice(tensors)
            change = draw.choice((strange_tensors, strange_tensors, only_pickled))
            box[key] = change(box[key], draw)
    torch.save(tree[0] if tree else None, buffer := io.BytesIO())
    return buffer.getvalue()


def changed_png(content: bytes, draw: random.Random) -> bytes:
    """A header that claims another size or kind of pixels, with the right checksum."""
    header = bytearray(content[12:29])  # IHDR, width, height, depth, colour, and so on
    side = draw.choice((0, 1, 31, 10**5, 2**31 - 1))
    if draw.random() < 0.5:
        header[4:12] = struct.pack(">II", side, draw.choice((1, 32, side)))
    else:
        header[draw.randrange(12, 17)] = draw.randrange(8)
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


CHANGES = {
    ".json": changed_json,
    ".jsonl": changed_lines,
    ".csv": changed_table,
    ".safetensors": changed_safetensors,
    ".ckpt": changed_pickle,
    ".pt": changed_pickle,
    ".png": changed_png,
}
