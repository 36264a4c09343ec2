"""From a path, or a name on the Hugging Face Hub, to a LatentDiffusion ready to sample."""

import warnings
from pathlib import Path

import torch
from torch import nn

from minidiff import schedules
from minidiff.checkpoints import files, flow_load, flow_models, folder, hub, layouts, names
from minidiff.checkpoints.folder import dtype_named, empty, fill, precision_of
from minidiff.checkpoints.layouts import SCALES
from minidiff.conditioners import CLIPPair
from minidiff.denoiser import TARGETS, Denoiser
from minidiff.errors import UserError
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.text import CLIPText
from minidiff.unet import UNet
from minidiff.vae import VAE

NETWORKS = {"unet": UNet, "vae": VAE, "text": CLIPText}


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = "fp32",
    target: str | None = None,
    vae: str | Path | None = None,
    text: str | Path | None = None,
    unet: str | Path | None = None,
    zero_terminal_snr: bool = False,
) -> LatentDiffusion:
    """The model at a path: a folder of ours, a diffusers folder, a single file of Stable Diffusion,
    or a Hub id such as owner/name.

    dtype: torch's, or fp32, bf16, fp16; None keeps what is stored. target: what the U-Net predicts
    ("eps", "v"), where the file does not say. vae, text, unet: take this part from another
    checkpoint. zero_terminal_snr: it was trained so, and the file does not say.
    """
    dtype, path = dtype_named(dtype), hub.resolve(path)
    others = {"vae": vae, "text": text, "unet": unet}
    others = {name: place for name, place in others.items() if place is not None}
    is_ours = (path / "model.json").is_file()
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not is_ours):
        if flow_models.family_of(path) is None:
            model = _stable_diffusion(path, target, others, dtype, zero_terminal_snr)
            return model.to(device).eval()
        if target not in (None, "flow"):
            raise UserError(f"{path} predicts flow, as all of its family; leave target out.")
        return flow_load.load(path, others, dtype, part).to(device).eval()
    model = folder.load(path, dtype=dtype)
    if zero_terminal_snr and not model.schedule.zero_terminal_snr:
        raise UserError(f"{path} says itself what its schedule is; leave zero_terminal_snr out.")
    if target not in (None, model.denoiser.target):
        what = f"says itself what it predicts, {model.denoiser.target}"
        raise UserError(f"{path} {what}; leave target out.")
    for name, place in others.items():
        owner, attribute = (model.denoiser, "network") if name == "unet" else (model, name)
        setattr(owner, attribute, part(place, name, dtype, model.vae.latent_scale.item()))
    model.check_widths()
    return model.to(device).eval()


def part(
    path: str | Path,
    name: str,
    dtype: str | torch.dtype | None = None,
    latent_scale: float = SCALES[False],
) -> nn.Module:
    """One network of a checkpoint: name is unet, vae or text. It may be all there is in a file, or
    in a folder with config.json; text may be MODEL:TAG of open_clip, as in ViT-L-14:openai (TAG can
    be a file). latent_scale: of a VAE whose file does not say, as single files do not."""
    path, dtype = hub.resolve(path), dtype_named(dtype)
    if (path / "model.json").is_file():
        return getattr(folder.load(path, dtype=dtype), name)
    if flow_models.family_of(path) is not None:
        return flow_load.part(path, name, dtype)
    if name == "text" and ":" in str(path) and not path.exists():
        return _built(name, _open_clip_text(*str(path).split(":", 1)), dtype)
    if path.is_dir() and not (path / "model_index.json").is_file():
        return _built(name, layouts.part_folder(path, name, files.tensors), dtype, latent_scale)
    parts = layouts.read(path, files.tensors).parts
    if name not in parts:
        raise UserError(f"{path} has no {layouts.KINDS[name]}.")
    return _built(name, parts[name], dtype, latent_scale)


def outline(name: str, part: layouts.Part) -> nn.Module:
    """The network of a part, whose tensors have shapes and no memory."""
    network = CLIPPair if "clip_g" in part.config else NETWORKS[name]
    try:
        return empty(network, part.config)
    except (ValueError, TypeError, ZeroDivisionError, KeyError, RuntimeError) as error:
        kind = layouts.KINDS[name]
        raise UserError(f"{part.where}: no {kind} has such sizes ({error}).") from error


def _built(
    name: str, part: layouts.Part, dtype: torch.dtype | None, latent_scale: float = SCALES[False]
) -> nn.Module:
    """A VAE's latent scale is a tensor with us, and a number or nothing in other layouts."""
    state, module = part.state, outline(name, part)
    if name == "vae":
        state = state | {"latent_scale": torch.tensor(part.latent_scale or latent_scale)}
    return fill(module, state, part.where, precision_of(name, dtype))


def _stable_diffusion(
    path: Path,
    target: str | None,
    others: dict[str, str | Path],
    dtype: torch.dtype | None,
    zero_terminal_snr: bool,
) -> LatentDiffusion:
    """The parts of one checkpoint, or of several: others names the file of a part by the part."""
    checkpoint = layouts.read(path, files.tensors)
    notes, unknown = list(checkpoint.notes), checkpoint.unknown
    if unknown:
        left_out = f"{len(unknown)} tensors belong to no part and are left out"
        notes.append(f'{left_out}; the first is "{unknown[0]}"')
    for note in notes:
        warnings.warn(f"{path.name}: {note}", stacklevel=3)
    absent = [name for name in NETWORKS if name not in checkpoint.parts and name not in others]
    if absent:
        missing = " and no ".join(layouts.KINDS[name] for name in absent)
        fix = f"name a checkpoint that has one, as in `{absent[0]}=PATH`"
        if len(checkpoint.parts) == 1:
            (only,) = checkpoint.parts
            kind = layouts.KINDS[only]
            fix += f". It is a {kind} alone: a whole model takes it with `{only}={path}`"
        raise UserError(f"{path} has no {missing}; {fix}.")
    networks: dict[str, nn.Module] = {}
    for name in NETWORKS:  # the U-Net first: it tells the latent scale
        scale = SCALES[bool(networks["unet"].config.added)] if networks else SCALES[False]
        if name in others:
            networks[name] = part(others[name], name, dtype, scale)
        else:
            networks[name] = _built(name, checkpoint.parts[name], dtype, scale)
    is_xl = bool(networks["unet"].config.added)
    if target is not None and target not in TARGETS:
        raise UserError(f'no target "{target}"; there is {", ".join(TARGETS)}.')
    target = target or checkpoint.target
    if target is None:
        target, of = (
            ("eps", "eps (as most) or v") if is_xl else ("v", "v (768 pixels) or eps (512)")
        )
        why = f"nothing in it says whether it predicts {of}"
        warnings.warn(f"{path.name}: {why}; {target} is assumed", stacklevel=3)
    try:
        told = dict(zero_terminal_snr=True) if zero_terminal_snr else {}
        schedule = schedules.Discrete(**(checkpoint.schedule or layouts.STABLE_DIFFUSION) | told)
    except UserError as error:
        raise UserError(f"{path}: its scheduler: {error}") from None
    return LatentDiffusion(
        networks["vae"],
        networks["text"],
        Denoiser(networks["unet"], schedule, target),
        checkpoint.size or (768 if target == "v" else 512),
        guidance=checkpoint.guidance,
        sampler=checkpoint.sampler,
        spacing="trailing" if zero_terminal_snr else checkpoint.spacing,
    )


def _open_clip_text(name: str, tag: str) -> layouts.Part:
    """A text encoder fetched by open_clip, into its cache. OpenAI's weights, and models whose
    configuration says so, need QuickGELU."""
    import open_clip

    if name not in open_clip.list_models():
        known = "SD 1.x reads ViT-L-14:openai, SD 2.x ViT-H-14:laion2b_s32b_b79k"
        raise UserError(f'open_clip knows no model "{name}"; {known}.')
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag not in tags and not Path(tag).is_file():
        known = f"{', '.join(tags) or 'none'}, or a file"
        raise UserError(f'open_clip has no weights "{tag}" of {name}; there is {known}.')
    try:
        model = open_clip.create_model(name, pretrained=tag)
    except Exception as error:  # no network, or a damaged download: whatever the transport raises
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{name}:{tag} cannot be had: {type(error).__name__}: {why}.") from error
    quick = tag == "openai" or bool((open_clip.get_model_config(name) or {}).get("quick_gelu"))
    state = model.state_dict()
    state = {key: value for key, value in state.items() if not key.startswith("visual.")}
    part = layouts.text(state, f"{name}:{tag}", names.CLIP_OPEN, penultimate=name == "ViT-H-14")
    part.config["activation"] = "quick_gelu" if quick else "gelu"
    return part
