"""Verbs about checkpoints: inspect and convert."""
from pathlib import Path
from typing import Annotated, Literal

import tyro

from minidiff import atomic
from minidiff.errors import UserError
from minidiff.verbs import options
from minidiff.verbs.options import Device, Embeddings, File, Loras, Target

Source = tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="FILE_OR_DIR")]]
Stored = Annotated[str | None, tyro.conf.arg(metavar="fp32|bf16|fp16")]


def inspect(path: Source, seed: int = 0, device: Device = "auto", out: File = None) -> None:
    """Say what a checkpoint is: layout, version, what it predicts, parts, sizes, keys that are missing or extra, what it cannot do.

    Args:
        path: a folder of ours, a diffusers folder, one .safetensors or .ckpt file, or a name on the Hugging Face Hub.
        seed: accepted as everywhere; nothing here is random.
        device: accepted as everywhere; no tensor is read.
        out: also write it there, as inspect.json.
    """
    import json

    from minidiff.weights import hub
    from minidiff.weights.inspect import inspect as told

    options.check_seed(seed)
    if out is not None:
        options.check_out(out)
        atomic.check(out / "inspect.json", foreign)
    path = hub.resolve(path)
    if not path.exists():
        raise UserError(f'no file or folder "{path}".')
    rows = told(path)
    width = max(len(what) for what, _ in rows)
    print(*(f"{what:{width}}  {how}" for what, how in rows), sep="\n")
    if out is not None:
        with atomic.write(out / "inspect.json", foreign) as new:
            new.write_text(json.dumps([{"what": what, "how": how} for what, how in rows], indent=2) + "\n", encoding="utf-8")
        print(out / "inspect.json")


def foreign(path: Path) -> Path | None:
    """path, where it is not an inspect.json of ours; see atomic.Stranger."""
    import json

    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return path
    ours = isinstance(rows, list) and rows and all(isinstance(row, dict) and row.keys() == {"what", "how"} for row in rows)
    return None if ours else path


def convert(
    source: Source,
    destination: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="DST")]],
    to: Literal["minidiff", "diffusers", "compvis"],
    dtype: Stored = None,
    target: Target = None,
    vae: File = None,
    text: File = None,
    unet: File = None,
    lora: Loras = (),
    embedding: Embeddings = (),
    seed: int = 0,
    device: Device = "auto",
    out: Path = Path("."),
) -> None:
    """Write a checkpoint in another layout: the same tensors under other names.

    Args:
        source: what to read: a folder of ours, a diffusers folder, one .safetensors or .ckpt file, or a name on the Hugging Face Hub.
        destination: what to write; a folder, or for compvis a file that ends in .safetensors. It must not exist.
        to: the layout to write.
        dtype: the precision to write; left out, it stays as it is.
        target: what the U-Net predicts, where the source does not say: single files of SD 2.x predict v at 768 pixels, eps at 512.
        vae: take the VAE from this checkpoint instead.
        text: take the text tower from this checkpoint instead; or MODEL:TAG of open_clip, as in ViT-L-14:openai.
        unet: take the U-Net from this checkpoint instead.
        lora: low-rank weights to add to the model's, and how much of them, as in style.safetensors:0.8; give it again for more.
        embedding: the vector of a word to write into the text tower; with :WORD, the word of the vocabulary that is to mean it.
        seed: accepted as everywhere; nothing here is random.
        device: accepted as everywhere; this is quick on the CPU.
        out: the folder that the destination is in.
    """
    options.check_seed(seed)
    options.pick_device(device)
    options.check_out(out)
    destination = out / destination
    if destination.exists():
        raise UserError(f'"{destination}" exists; nothing is written over it: name another place, or remove it.')
    options.check_out(destination.parent)
    if to == "compvis" and destination.suffix != ".safetensors":
        raise UserError(f"{destination} should end in .safetensors; pickles are not written.")
    loras = options.parsed_loras(lora)
    from minidiff import load
    from minidiff.weights import write

    model = load(source, dtype=dtype, target=target, vae=vae, text=text, unet=unet)
    options.put_in(model, loras)
    options.put_words_in(model, embedding)
    writers = {"minidiff": model.save, "diffusers": lambda place: write.save_diffusers(model, place)}
    print(writers.get(to, lambda place: write.save_compvis(model, place))(destination))
