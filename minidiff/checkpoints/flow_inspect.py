"""Which member of Stable Diffusion 3, 3.5 and FLUX.1 a checkpoint is, from headers alone."""

from pathlib import Path

from minidiff.checkpoints import files, flow_models
from minidiff.checkpoints.flow_models import FLUX, Checkpoint
from minidiff.checkpoints.inspect import Rows, _counts, _some
from minidiff.errors import UserError

# width, joint blocks, of them dual, single blocks
MEMBERS = {
    (1536, 24, 0, 0): "Stable Diffusion 3 medium",
    (1536, 24, 13, 0): "Stable Diffusion 3.5 medium",
    (2432, 38, 0, 0): "Stable Diffusion 3.5 large, or its turbo",
    (3072, 19, 0, 38): "FLUX.1",
}


def rows(path: Path) -> Rows:
    """All that inspect says of such a checkpoint, but the file's name."""
    try:
        checkpoint = flow_models.read(path, files.stored)
    except UserError as error:
        family = flow_models.family_of(path)
        return [("version", family.name), ("cannot", f"be loaded: {error}")]
    from minidiff.checkpoints.flow_load import KINDS, outline

    found: Rows = [("layout", checkpoint.layout), ("version", version(checkpoint))]
    found += [("predicts", "flow, eps - x0"), ("resolution", f"{checkpoint.size} pixels")]
    if "unet" in checkpoint.parts:
        found.append(("usual", usual(checkpoint)))
    cannot = []
    for name, kind in KINDS.items():
        part = checkpoint.parts.get(name)
        found.append((kind, "none" if part is None else description(name, checkpoint)))
        if part is None:
            continue
        expected = outline(name, part, checkpoint.family).state_dict().keys()
        expected -= {"latent_scale"}
        pairs = (("missing", expected - part.state.keys()), ("extra", part.state.keys() - expected))
        for word, keys in pairs:
            found.append((f"{kind}, {word} keys", _some(sorted(keys))))
            if keys:
                cannot.append(f"be loaded: {len(keys)} keys of the {kind} are {word}")
    found.append(("keys of no part", _some(checkpoint.unknown)))
    found += [("note", note) for note in checkpoint.notes]
    if absent := [kind for name, kind in KINDS.items() if name not in checkpoint.parts]:
        fix = "name a diffusers folder for unet, vae or text"
        cannot.append(f"draw by itself: no {' and no '.join(absent)} in it; {fix}")
    return found + [("cannot", reason) for reason in cannot]


def version(checkpoint: Checkpoint) -> str:
    if "unet" not in checkpoint.parts:
        return f"{checkpoint.family.name}, which of them is unknown: no transformer in it"
    config = checkpoint.parts["unet"].config
    name = MEMBERS.get(tuple(config[key] for key in ("width", "joint", "dual", "single")))
    name = name or f"{checkpoint.family.name}, of other sizes"
    if checkpoint.family is FLUX:
        name = name.replace("FLUX.1", "FLUX.1-dev" if config["guidance"] else "FLUX.1-schnell", 1)
    return name


def usual(checkpoint: Checkpoint) -> str:
    """How such a model is drawn with."""
    if checkpoint.family is not FLUX:
        return "28 steps, guidance 7"
    return "28 steps, guidance 3.5" if checkpoint.guided else "4 steps, no guidance"


def description(name: str, checkpoint: Checkpoint) -> str:
    part = checkpoint.parts[name]
    config, line = part.config, _counts(part.state)
    if name == "unet":
        line += f"; width {config['width']}, {config['joint']} joint and {config['single']} single"
        return f"{line} blocks; {config['in_channels']} channels in"
    if name == "vae":
        latent = f"scale {part.latent_scale:g}, shift {config['latent_shift']:g}"
        return f"{line}; {config['latent_channels']} latent channels, {latent}"
    encoders = [key for key in ("clip_l", "clip_g", "t5") if config[key]]
    return f"{line}; {', '.join(encoders)}; {config['length']} tokens of T5"
