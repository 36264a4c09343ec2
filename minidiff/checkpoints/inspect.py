"""What a checkpoint is, from names, shapes and settings alone: no tensor is read. Files of
safetensors with the published networks' names need no torch."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from minidiff.checkpoints import files, flow_models, kinds, layouts
from minidiff.errors import UserError

Rows = list[tuple[str, str]]
WORDS = {
    "eps": "eps, the noise",
    "v": "v",
    "x0": "x0, the clean data",
    None: "eps (base, 512) or v (768): no tensor says which; name the target when it is loaded",
    "xl": "eps (most) or v: nothing in it says which; eps is assumed unless you name the target",
}
# By the channels of the U-Net's input.
USES = {4: "", 9: ", inpainting", 5: ", depth", 7: ", upscaling"}
USES[8] = ", instructions (InstructPix2Pix)"
ENCODERS = {768: "OpenAI's ViT-L/14", 1024: "OpenCLIP's ViT-H/14", 1280: "OpenCLIP's ViT-bigG/14"}
COMPLETE = {  # of the published networks: what _hash gives for all their names
    "U-Net of 1.x and 2.x": "98fb8441fe906cb1",
    "VAE": "364ad53349a9dd74",
    "ViT-L/14": "dcf9d66814d1b245",
    "ViT-H/14 without its last block": "ed0ffccd584df66a",
    "U-Net of XL": "0dfc373baa04e749",
    "U-Net of XL's refiner": "909a8090ec81ca61",
    "text encoders of XL": "9d50fec5a7c8f8ad",
}


def inspect(path: Path) -> Rows:
    """Pairs of a property and its description, in the order to print them."""
    if (path / "model.json").is_file():
        return _ours(path)
    everything = [path] if path.is_file() else path.rglob("*")
    size = sum(file.stat().st_size for file in everything if file.is_file())
    rows: Rows = [("file", f"{path}, {_short(size)}B")]
    if flow_models.family_of(path) is not None:
        from minidiff.checkpoints import flow_inspect

        return rows + flow_inspect.rows(path)
    if path.is_file():
        state = files.stored(path)
        if more := _stranger(state, path):
            return rows + more
    checkpoint = layouts.read(path, files.stored)
    layout = checkpoint.layout + ("" if path.is_dir() else " single file")
    rows += [("layout", layout), ("version", version(checkpoint))]
    if "unet" in checkpoint.parts:
        rows += _prediction(checkpoint)
    for name, kind in layouts.KINDS.items():
        part = checkpoint.parts.get(name)
        rows.append((kind, "none" if part is None else _description(name, part)))
    cannot = _cannot(checkpoint)
    for name, part in checkpoint.parts.items():
        kind = layouts.KINDS[name]
        try:
            missing, extra = _differences(name, part)
        except UserError as error:
            cannot.append(f"be loaded: {error}")
            continue
        for word, keys in (("missing", missing), ("extra", extra)):
            rows.append((f"{kind}, {word} keys", _some(keys)))
            if keys:
                cannot.append(f"be loaded: {len(keys)} keys of the {kind} are {word}")
    rows.append(("keys of no part", _some(checkpoint.unknown)))
    rows += [("note", note) for note in checkpoint.notes if "EMA" not in note]
    return rows + [("cannot", reason) for reason in cannot]


def version(checkpoint: layouts.Checkpoint) -> str:
    """Of Stable Diffusion, by the U-Net: projections are linear in 2.x, and the number of channels
    beside the latents tells the use."""
    if "unet" not in checkpoint.parts:
        return "unknown: no U-Net in it"
    config = checkpoint.parts["unet"].config
    if config["added"]:
        return _xl(config)
    name = "Stable Diffusion 2.x" if config["linear_projection"] else "Stable Diffusion 1.x"
    channels = config["in_channels"]
    full = config["channels"] == (320, 640, 1280, 1280) and config["blocks"] == 2
    name += USES.get(channels, f", {channels} input channels")
    return name if full else f"{name}, of other sizes (pruned or small)"


def _xl(config: dict) -> str:
    """The member of SDXL's family, by the width of what its U-Net adds, and its levels."""
    is_refiner = config["added"] == 2560
    name = "Stable Diffusion XL" + (", refiner" if is_refiner else "")
    channels = (384, 768, 1536, 1536) if is_refiner else (320, 640, 1280)
    name += USES.get(config["in_channels"], f", {config['in_channels']} input channels")
    depth = (0, 4, 4, 0) if is_refiner else (0, 2, 10)
    full = (config["channels"], config["depth"], config["blocks"]) == (channels, depth, 2)
    return name if full else f"{name}, of other sizes (pruned or small)"


def _prediction(checkpoint: layouts.Checkpoint) -> Rows:
    size, target = checkpoint.size, checkpoint.target
    if target is None and checkpoint.parts["unet"].config["added"]:
        target = "xl"
    averaged = [note for note in checkpoint.notes if "EMA" in note]
    resolution = f"{size} pixels" if size else "512 or 768 pixels, as it predicts eps or v"
    return [
        ("predicts", WORDS.get(target, str(target)) + _terminal(checkpoint)),
        ("resolution", resolution),
        ("averaged (EMA)", averaged[0] if averaged else "no, or not beside live ones"),
    ]


def _terminal(checkpoint: layouts.Checkpoint) -> str:
    zero = (checkpoint.schedule or {}).get("zero_terminal_snr")
    return ", zero terminal SNR" if zero else ""


def _description(name: str, part: layouts.Part) -> str:
    config, line = part.config, _counts(part.state)
    if name == "unet":
        widths = ", ".join(map(str, config["channels"]))
        line += f"; widths {widths}; {config['in_channels']} channels in"
        line += f"; context of width {config['context_dim']}"
        return line if config["middle"] else f"{line}; no middle"
    if name == "vae":
        factor = 2 ** (len(config["channels"]) - 1)
        line += f"; {config['latent_channels']} latent channels, {factor} times smaller"
        if part.latent_scale is None:
            return f"{line}; the latent scale is not said: 0.18215, with the U-Net of XL 0.13025"
        return f"{line}, latent scale {part.latent_scale:g}"
    if "clip_g" in config:
        return f"{line}; {'; '.join(_encoder(each) for each in _encoders(config))}"
    return f"{line}; {_encoder(config)}"


def _encoders(config: dict) -> list[dict]:
    return [config[name] for name in ("clip_l", "clip_g") if config[name]]


def _encoder(config: dict) -> str:
    encoder = ENCODERS.get(config["width"], f"width {config['width']}")
    line = f"{encoder}: {config['layers']} blocks, {config['activation']}"
    return f"{line}, {config['context_length']} tokens padded with {config['pad']}"


def _counts(state: dict[str, files.Stored]) -> str:
    numbers = [value.numel() for value in state.values() if value.dtype.startswith(("F", "BF"))]
    dtypes = ", ".join(Counter(value.dtype for value in state.values())) or "none"
    return f"{_short(sum(numbers))} parameters in {len(state)} tensors, {dtypes}"


def _cannot(checkpoint: layouts.Checkpoint) -> list[str]:
    parts, reasons = checkpoint.parts, []
    absent = [kind for name, kind in layouts.KINDS.items() if name not in parts]
    if absent:
        fix = "name other checkpoints for unet, vae or text"
        reasons.append(f"draw by itself: no {' and no '.join(absent)} in it; {fix}")
    if "unet" not in parts:
        return reasons
    channels, context = parts["unet"].config["in_channels"], parts["unet"].config["context_dim"]
    if channels == 9:
        reasons.append("draw from words alone: an inpainting U-Net needs an image and a mask")
    elif channels != 4:
        known = "only 4 and 9 (inpainting) are known"
        reasons.append(f"draw here: its U-Net takes {channels} channels, and {known}")
    text = parts["text"].config if "text" in parts else {}
    encoders = _encoders(text) if "clip_g" in text else [text]
    if text and (width := sum(each["width"] for each in encoders)) != context:
        reasons.append(f"draw: its text encoder gives width {width}, its U-Net expects {context}")
    return reasons


def _differences(name: str, part: layouts.Part) -> tuple[list[str], list[str]]:
    """The tensors that the network of this part has and the file lacks, and the other way round.
    All but a complete published network is built for this, without memory."""
    if _hash(part.state) in COMPLETE.values():
        return [], []
    from minidiff.checkpoints.load import outline

    expected = outline(name, part).state_dict().keys() - {"latent_scale"}
    return sorted(expected - part.state.keys()), sorted(part.state.keys() - expected)


def _hash(keys: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()[:16]


def _stranger(state: dict[str, files.Stored], path: Path) -> Rows:
    """A file that is no model, and no part of one."""
    if (kind := kinds.of(state)) is None:
        return []
    use = ("use", kind.use.format(path))
    if kind is kinds.LORA:
        return [("kind", kind.name), *kinds.lora_rows(state, files.metadata(path)), use]
    rows = [("kind", kind.name), ("tensors", _counts(state))]
    if kind is kinds.EMBEDDING:
        shapes = (f"{name}: {' x '.join(map(str, v.shape))}" for name, v in state.items())
        rows.append(("vectors", ", ".join(shapes)))
        width = sum(v.shape[-1] for v in state.values())
        rows += [("for", kinds.VERSIONS[width])] if width in kinds.VERSIONS else []
    return [*rows, use]


def _ours(path: Path) -> Rows:
    """A folder of ours says everything; its networks are built, without memory, to see whether the
    tensors fit."""
    from minidiff.checkpoints import folder

    whole = files.read_json(path / "model.json")
    layout = f"minidiff folder ({whole.get('format')}, this version reads {folder.FORMAT})"
    try:
        described = whole["denoiser"]
        folder.schedule_from_json(described["schedule"])
        rows: Rows = [("file", str(path)), ("layout", layout)]
        rows.append(("predicts", str(described["target"])))
        rows.append(("noise levels", _listed(described["schedule"])))
        rows.append(("resolution", f"{whole['size']} pixels"))
        networks = {name: folder.network(whole[name]) for name in layouts.KINDS}
    except folder.DAMAGED as error:
        raise folder.damaged(path, error, files.AGAIN) from error
    for name, kind in layouts.KINDS.items():
        expected = networks[name].state_dict().keys()
        state = files.stored(files.inside(path, path / f"{name}.safetensors"))
        rows.append((kind, f"{whole[name]['kind']}, {_counts(state)}"))
        rows.append((f"{kind}, config", _listed(folder.config_of(whole[name]))))
        rows.append((f"{kind}, missing keys", _some(sorted(expected - state.keys()))))
        rows.append((f"{kind}, extra keys", _some(sorted(state.keys() - expected))))
    return rows


def _listed(settings: dict) -> str:
    """channels 32 64, blocks 1, ..."""
    pairs = []
    for key, value in settings.items():
        several = [str(each) for each in value][:12] if isinstance(value, list | dict) else []
        one = "none" if isinstance(value, list | dict) else value
        pairs.append(f"{key} {' '.join(several) or one}")
    return ", ".join(pairs)


def _some(keys: list[str]) -> str:
    more = ", ..." if len(keys) > 3 else ""
    return f"{len(keys)}: {', '.join(keys[:3])}{more}" if keys else "none"


def _short(number: float) -> str:
    """1.23 G, 456 M: three digits."""
    for unit in ("", "k", "M"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} G"
