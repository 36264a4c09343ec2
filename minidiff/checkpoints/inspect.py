"""What a checkpoint is, told from names, shapes and settings alone: no tensor is read, and torch is not needed for files of safetensors."""

from collections import Counter
from pathlib import Path

from minidiff.checkpoints import files, layouts, names, sizes
from minidiff.errors import UserError

Rows = list[tuple[str, str]]
LISTED = {"unet": sizes.unet_names, "vae": sizes.vae_names, "text": sizes.text_names}
WORDS = {
    "eps": "eps, the noise",
    "v": "v",
    "x0": "x0, the clean data",
    None: "eps (base, 512) or v (768): no tensor says which; --target says it",
}


def inspect(path: Path) -> Rows:
    """Pairs of what and how, in the order to print them."""
    if (path / "model.json").is_file():
        return _ours(path)
    size = sum(
        file.stat().st_size
        for file in ([path] if path.is_file() else path.rglob("*"))
        if file.is_file()
    )
    rows: Rows = [("file", f"{path}, {_short(size, 1000)}B")]
    if path.is_file():
        state = files.stored(path)
        if pairs := _lora(state):
            return rows + pairs
        if any(
            name.startswith(("conditioner.embedders.", "label_emb.")) or ".label_emb." in name
            for name in state
        ):
            return [
                *rows,
                ("layout", "CompVis"),
                ("version", "Stable Diffusion XL"),
                ("cannot", "be used here: versions 1.x and 2.x can"),
            ]
    found = layouts.read(path, files.stored)
    rows += [
        ("layout", found.layout + ("" if path.is_dir() else " single file")),
        ("version", version(found)),
    ]
    if "unet" in found.parts:
        rows.append(("predicts", WORDS.get(found.target, str(found.target))))
        rows.append(
            (
                "resolution",
                f"{found.size} pixels"
                if found.size
                else "512 or 768 pixels, as it predicts eps or v",
            )
        )
        rows.append(
            (
                "averaged (EMA)",
                next(
                    (note for note in found.notes if "EMA" in note), "no, or not beside live ones"
                ),
            )
        )
    for name, what in layouts.KINDS.items():
        rows.append((what, _described(name, found.parts[name]) if name in found.parts else "none"))
    cannot = _cannot(found)
    for name, part in found.parts.items():
        expected = set(LISTED[name](part.numbers)) - {"latent_scale"}
        for kind, keys in (
            ("missing", expected - part.state.keys()),
            ("extra", part.state.keys() - expected),
        ):
            rows.append((f"{layouts.KINDS[name]}, {kind} keys", _some(sorted(keys))))
            if keys:
                cannot.append(
                    f"be loaded: {len(keys)} keys of the {layouts.KINDS[name]} are {kind}"
                )
    rows.append(("keys of no part", _some(found.unknown)))
    rows += [("note", note) for note in found.notes if "EMA" not in note]
    return rows + [("cannot", reason) for reason in cannot]


def version(found: layouts.Checkpoint) -> str:
    """Of Stable Diffusion, by the U-Net: projections are linear in 2.x, and what comes in beside the latents tells the use."""
    if "unet" not in found.parts:
        return "unknown: no U-Net in it"
    numbers = found.parts["unet"].numbers
    name = "Stable Diffusion 2.x" if numbers["linear_projection"] else "Stable Diffusion 1.x"
    use = {
        4: "",
        9: ", inpainting",
        5: ", depth",
        8: ", instructions (InstructPix2Pix)",
        7: ", upscaling",
    }
    full = numbers["channels"] == (320, 640, 1280, 1280) and numbers["blocks"] == 2
    other = use.get(numbers["in_channels"], f", {numbers['in_channels']} input channels")
    return name + other + ("" if full else ", of other sizes (pruned or small)")


def _described(name: str, part: layouts.Part) -> str:
    n = part.numbers
    parameters = sum(
        value.numel() for value in part.state.values() if value.dtype.startswith(("F", "BF"))
    )
    kinds = Counter(value.dtype for value in part.state.values())
    line = f"{_short(parameters, 1000)} parameters in {len(part.state)} tensors, {', '.join(kinds)}"
    if name == "unet":
        line += f"; widths {', '.join(map(str, n['channels']))}; {n['in_channels']} channels in; words of width {n['context_dim']}"
        line += "" if n["middle"] else "; no middle"
    elif name == "vae":
        line += f"; {n['latent_channels']} latent channels, {2 ** (len(n['channels']) - 1)} times smaller, latent scale {n['latent_scale']:g}"
    else:
        tower = {768: "OpenAI's ViT-L/14", 1024: "OpenCLIP's ViT-H/14"}.get(
            n["width"], f"width {n['width']}"
        )
        line += f"; {tower}: {n['layers']} blocks, {n['activation']}, {n['context_length']} tokens padded with {n['pad']}"
    return line


def _cannot(found: layouts.Checkpoint) -> list[str]:
    absent = [what for name, what in layouts.KINDS.items() if name not in found.parts]
    reasons = (
        [
            f"draw by itself: no {' and no '.join(absent)} in it; name others by --unet, --vae or --text"
        ]
        if absent
        else []
    )
    if "unet" in found.parts:
        numbers = found.parts["unet"].numbers
        if numbers["in_channels"] == 9:
            reasons.append("draw from words alone: an inpainting U-Net needs --image and --mask")
        elif numbers["in_channels"] not in (4, 9):
            reasons.append(
                f"draw here: its U-Net takes {numbers['in_channels']} channels, and only 4 and 9 (inpainting) are known"
            )
        if "text" in found.parts and found.parts["text"].numbers["width"] != numbers["context_dim"]:
            reasons.append(
                f"draw: its text tower gives width {found.parts['text'].numbers['width']}, its U-Net expects {numbers['context_dim']}"
            )
    return reasons


def _lora(state: dict[str, files.Stored]) -> Rows:
    """Low-rank weights: which naming, of what rank, for how many layers."""
    matches = ((names.LORA.fullmatch(name), value) for name, value in state.items())
    found = {
        match["layer"]: value
        for match, value in matches
        if match and match["half"] in ("A", "down")
    }
    if not found:
        return []
    kohya = any(name.startswith("lora_") for name in found)
    ranks = Counter(value.shape[0] for value in found.values() if value.shape)
    text = sum("text_encoder" in name or name.startswith("lora_te") for name in found)
    return [
        ("layout", f"LoRA, {'kohya' if kohya else 'diffusers or PEFT'} names"),
        ("rank", ", ".join(f"{rank} ({count} layers)" for rank, count in sorted(ranks.items()))),
        ("layers", f"{len(found) - text} of the U-Net, {text} of the text tower"),
        ("dtype", ", ".join(Counter(value.dtype for value in state.values()))),
        ("cannot", "draw by itself: it changes a model that it was trained for"),
    ]


def _ours(path: Path) -> Rows:
    """A folder of ours says everything; its networks are built, without memory, to see whether the tensors fit."""
    from minidiff.checkpoints.folder import FORMAT, network

    whole = files.read_json(path / "model.json")
    rows: Rows = [
        ("file", str(path)),
        ("layout", f"minidiff folder ({whole.get('format')}, this version reads {FORMAT})"),
    ]
    try:
        rows.append(
            (
                "predicts",
                f"{whole['denoiser']['target']}; noise levels {whole['denoiser']['schedule']}",
            )
        )
        rows.append(("resolution", f"{whole['size']} pixels"))
        for name in layouts.KINDS:
            numbers = {key: value for key, value in whole[name].items() if key != "kind"}
            expected = network(whole[name]).state_dict().keys()
            state = files.stored(files.inside(path, path / f"{name}.safetensors"))
            parameters, kinds = (
                sum(value.numel() for value in state.values()),
                Counter(value.dtype for value in state.values()),
            )
            line = f"{whole[name]['kind']}, {_short(parameters, 1000)} parameters in {len(state)} tensors, {', '.join(kinds) or 'none'}; {numbers}"
            rows.append((layouts.KINDS[name], line))
            rows.append(
                (f"{layouts.KINDS[name]}, missing keys", _some(sorted(expected - state.keys())))
            )
            rows.append(
                (f"{layouts.KINDS[name]}, extra keys", _some(sorted(state.keys() - expected)))
            )
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{path / 'model.json'} is damaged ({type(error).__name__}: {error}); {files.AGAIN}."
        ) from error
    return rows


def _some(keys: list[str]) -> str:
    return (
        "none"
        if not keys
        else f"{len(keys)}: {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"
    )


def _short(number: float, thousand: int) -> str:
    """1.23 G, 456 M: three digits."""
    for unit in ("", "k", "M"):
        if number < thousand:
            return f"{number:.3g} {unit}"
        number /= thousand
    return f"{number:.3g} G"
