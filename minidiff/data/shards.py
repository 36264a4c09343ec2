"""Captioned images in WebDataset shards [1]: tar files in which NAME.jpg stands beside NAME.json or
NAME.txt with its caption.

The headers of a shard are listed once; then any sample is one read. So sample n of the endless
stream follows from (seed, n) alone: a run resumes at its step with no position to save, and any
number of processes share the stream without overlap or loss. Nothing is ever unpickled.

[1] Aizman, Maltby, Breuel. High Performance I/O for Large Scale Deep Learning. 2019.
    arXiv:2001.01858
"""

import io
import json
import random
import tarfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import chain, count, islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import Dataset

from minidiff.data.captions import SIDECARS, SUFFIXES, Fault, caption_of, parse_row
from minidiff.data.folder import ahead, load_image
from minidiff.errors import UserError

PICKLES = {".pyd", ".pickle", ".pkl", ".pk", ".pth", ".pt"}
LARGEST = {".json": 2**20, ".txt": 2**20, ".caption": 2**20}  # bytes
LARGEST_IMAGE = 2**28
WINDOW = 10_000  # samples shuffled together: many shards of this course, one of a large data set


class Member(NamedTuple):
    suffix: str
    offset: int
    size: int


class Sample(NamedTuple):
    shard: Path
    key: str
    image: Member
    caption: Member

    def __str__(self) -> str:
        return f"{self.shard}, {self.key}"


class Shards(Dataset):
    """The images and captions of shards; a sample is read when it is asked for.

    paths: the shards, or the folder of *.tar that they lie in. A sample that cannot be trained on
    is a Fault that names shard and key; with skip_damaged it is left out, and a warning says so.
    """

    def __init__(
        self,
        paths: str | Path | Sequence[Path],
        size: int | None = None,
        caption_column: str = "text",
        skip_damaged: bool = False,
    ):
        self.size, self.caption_column, self.skip_damaged = size, caption_column, skip_damaged
        self.skipped: dict[str, str] = {}  # shard and key of each sample left out, and why
        shards = shards_in(paths) if isinstance(paths, str | Path) else list(paths)
        self.by_shard = [self._listed(shard) for shard in shards]
        self.samples = list(chain.from_iterable(self.by_shard))
        if not self.samples:
            names = ", ".join(map(str, shards)) or "no shards"
            raise UserError(f"{names[:300]}: no images with captions; pass *.tar that have some.")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[UInt8[Tensor, "3 H W"], str]:
        """Sample i. With skip_damaged, the next good one stands in for one that cannot be read."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        for place in range(i, i + len(self)):
            sample = self.samples[place % len(self)]
            try:
                return self._read(sample)
            except Fault as fault:
                self._skip(str(sample), fault)
        raise UserError(f"{self.samples[0].shard.parent}: none of {len(self)} samples can be read.")

    def batches(
        self, batch: int, seed: int, start: int = 0, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[UInt8[Tensor, "B 3 S S"], list[str]]]:
        """Yield the batches start, start + 1, ... of one of `world` processes, without end.

        Batch k of all processes, in the order of their ranks, is batch k of one process with
        `world` times the batch. Samples are read ahead in threads.
        """
        if self.size is None or not 0 <= rank < world:
            raise ValueError(f"batches need a size, and a rank below {world}, not {rank}")
        every = self.stream(seed, start * batch * world)
        own = (i for k, i in enumerate(every) if k // batch % world == rank)
        with closing(ahead(self.__getitem__, own, 2 * batch)) as samples:
            while True:
                images, captions = zip(*islice(samples, batch), strict=True)
                yield torch.stack(images), list(captions)

    def stream(self, seed: int, start: int = 0) -> Iterator[int]:
        """Yield the samples from place `start` on, as indices. Each epoch has all of them once."""
        first, skip = divmod(start, len(self))
        for epoch in count(first):
            yield from self._order(random.Random(f"{seed} {epoch}"))[skip:]
            skip = 0

    def _order(self, rng: random.Random) -> list[int]:
        """Shards in random order, then their samples shuffled by windows: reads stay local."""
        firsts = [0]
        for members in self.by_shard:
            firsts.append(firsts[-1] + len(members))
        order = []
        for shard in rng.sample(range(len(self.by_shard)), len(self.by_shard)):
            order.extend(range(firsts[shard], firsts[shard + 1]))
        windows = [order[i : i + WINDOW] for i in range(0, len(order), WINDOW)]
        return [i for window in windows for i in rng.sample(window, len(window))]

    def _read(self, sample: Sample) -> tuple[UInt8[Tensor, "3 H W"], str]:
        with sample.shard.open("rb") as file:
            content, text = (_bytes(file, sample, each) for each in (sample.image, sample.caption))
        if sample.caption.suffix != ".json":
            line = text.decode("utf-8-sig", "surrogateescape").strip().split("\n")[0].strip()
            text = json.dumps({self.caption_column: line}).encode()
        caption = caption_of(str(sample), parse_row(str(sample), text), self.caption_column)
        return load_image(
            io.BytesIO(content), self.size, name=f"{sample}{sample.image.suffix}"
        ), caption

    def _listed(self, shard: Path) -> list[Sample]:
        """The samples of a shard, from its headers."""
        samples, members = [], {}
        try:
            for key, suffix, info in _members(shard):
                members.setdefault(key, {}).setdefault(suffix, []).append(info)
        except Fault as fault:
            self._skip(str(shard), fault)
        for key, by_suffix in members.items():
            try:
                samples.append(_sample(shard, key, by_suffix))
            except Fault as fault:
                self._skip(f"{shard}, {key}", fault)
        return samples

    def _skip(self, name: str, fault: Fault) -> None:
        """Leave it out, and say so once; or raise the fault."""
        if not self.skip_damaged:
            raise fault
        if name not in self.skipped:
            self.skipped[name] = str(fault)
            warnings.warn(f"{fault} (left out; {len(self.skipped)} so far)", stacklevel=2)


def shards_in(folder: str | Path) -> list[Path]:
    """The shards of a folder, sorted; or the one shard."""
    folder = Path(folder)
    shards = [folder] if folder.is_file() else sorted(folder.glob("*.tar"))
    if not shards:
        raise UserError(f"{folder}: no shards there; pass a folder of *.tar, or one of them.")
    return shards


def _members(shard: Path) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Yield (key, suffix, header) of the files of a shard: of "a/b.x.jpg" a/b and .x.jpg."""
    try:
        with tarfile.open(shard, "r:") as file:
            for info in file:
                folder, slash, name = info.name.rpartition("/")
                stem, dot, suffix = name.partition(".")
                if stem and not info.isdir():  # without hidden files
                    yield folder + slash + stem, dot + suffix.lower(), info
            file.fileobj.seek(file.offset)
            rest = file.fileobj.read(2**20)
    except OSError as error:
        raise UserError(f"{shard}: {error.strerror or error}; check the path.") from None
    except tarfile.TarError as error:
        remedy = "unpack it if it is compressed, or fetch it again"
        raise Fault("damaged shard", f"{shard}: not a whole tar file ({error}); {remedy}") from None
    # tarfile takes a damaged header, and the end of the first of two joined files, for the end
    if len(rest) < tarfile.BLOCKSIZE or rest.strip(b"\0"):
        message = f"{shard}: damaged, or cut off, at byte {file.offset}; fetch it again"
        raise Fault("damaged shard", message)


def _sample(shard: Path, key: str, by_suffix: dict[str, list[tarfile.TarInfo]]) -> Sample:
    """The image and the caption among the files of one key; more, such as .cls, are not read."""
    where = f"{shard}, {key}"
    for suffix, infos in by_suffix.items():
        if "." + suffix.rpartition(".")[2] in PICKLES:
            problem = f"{where}{suffix}: a pickle can run programs; take it out of the shard"
            raise Fault("not a plain file", problem)
        if not all(info.isreg() and not info.issparse() for info in infos):
            problem = f"{where}{suffix}: a link or a device; write the file itself"
            raise Fault("not a plain file", problem)
    images = [suffix for suffix in by_suffix if suffix in SUFFIXES]
    captions = [suffix for suffix in (*SIDECARS, ".json") if suffix in by_suffix]
    if not images:
        raise Fault("missing picture", f"{where}: no image; add {key}.jpg")
    if not captions:
        raise Fault("picture without a caption", f"{where}: no caption; add {key}.json or .txt")
    pair = images[0], captions[0]
    if len(images) > 1 or any(len(by_suffix[suffix]) > 1 for suffix in pair):
        raise Fault("one name twice", f"{where}: several images or captions; leave one of each")
    members = [
        Member(suffix, info.offset_data, info.size) for suffix in pair for info in by_suffix[suffix]
    ]
    for member in members:
        if member.size > (limit := LARGEST.get(member.suffix, LARGEST_IMAGE)):
            problem = f"{key}{member.suffix} has {member.size:,} bytes; at most {limit:,} are read"
            raise Fault("too large", f"{where}: {problem}")
    return Sample(shard, key, *members)


def _bytes(file: BinaryIO, sample: Sample, member: Member) -> bytes:
    file.seek(member.offset)
    content = file.read(member.size)
    if len(content) < member.size:
        raise Fault("damaged shard", f"{sample}: the shard was cut off meanwhile; fetch it again")
    return content
