"""Checkpoints of Stable Diffusion 1.x, 2.x and XL, in any layout, as three parts under our names.
Without torch.

A layout is read the same way from tensors and from headers alone (`Stored`): loading reads the
tensors, inspecting the headers.

    diffusers   a folder with model_index.json, and one folder each for U-Net, VAE, text encoders,
                tokenizers and scheduler
    CompVis     a single file: its networks stand behind prefixes. A file of one network alone may
                have none
"""

import re
from itertools import count, takewhile
from pathlib import Path

from minidiff.checkpoints import files, kinds, names, schedulers, sizes
from minidiff.checkpoints.parts import Checkpoint, Part, Read, State, pair, text, unet, vae, without
from minidiff.errors import UserError

KINDS = {"unet": "U-Net", "vae": "VAE", "text": "text encoder"}
CLASSES = {"UNet2DConditionModel": "unet", "AutoencoderKL": "vae"}
CLASSES |= {"CLIPTextModel": "text", "CLIPModel": "text"}  # of folders of one part
CLASSES |= {"CLIPTextModelWithProjection": "text"}
PADDING = {"<|endoftext|>": 49407, "!": 0}  # SD 1.x repeats the end, SD 2.x writes "!"
STABLE_DIFFUSION = dict(betas="scaled_linear", T=1000, beta_1=0.00085, beta_T=0.012, final=1)
UNET, VAE = ("model.diffusion_model.", "diffusion_model."), ("first_stage_model.",)
SCALES = {False: 0.18215, True: 0.13025}  # of the latents: of Stable Diffusion 1 and 2, of XL
AVERAGE = "model_ema.diffusion_model"
TEXT_1, TEXT_2 = ("cond_stage_model.transformer.",), ("cond_stage_model.model.",)
# SDXL's first and second text encoder; its refiner's only one
XL_L = ("conditioner.embedders.0.transformer.",)
XL_G = ("conditioner.embedders.1.model.", "conditioner.embedders.0.model.")
IMAGE_ENCODER = ("vision_model.", "visual_projection.")  # of a whole CLIPModel; not needed

DAMAGED = (
    TypeError,
    AttributeError,
    LookupError,
    ValueError,
)  # by a number in place of a list, and the like


def read(path: Path, reader: Read) -> Checkpoint:
    """The checkpoint at a path: `reader` opens a file of tensors, as files.tensors does."""
    if not path.is_dir():
        return _single_file(path, reader)
    if not (path / "model_index.json").is_file():
        return _one_part(path, reader)
    return _diffusers(path, reader)


# A folder of diffusers. Its JSON files say what tensors do not: heads, groups, activation, padding,
# latent scale, target, spacing.


def _diffusers(folder: Path, reader: Read) -> Checkpoint:
    index = files.read_json(files.inside(folder, folder / "model_index.json"))
    kind = str(index.get("_class_name", "StableDiffusionPipeline"))
    if not kind.startswith("StableDiffusion") or "3" in kind:
        raise UserError(f"{folder} is a {kind}; Stable Diffusion 1.x, 2.x and XL are read here.")
    checkpoint, tokenizer = Checkpoint("diffusers"), folder / "tokenizer"
    try:
        scheduler = schedulers.read(_settings(folder / "scheduler", "scheduler_config.json"))
        checkpoint.schedule, checkpoint.target = scheduler.schedule, scheduler.target
        checkpoint.sampler, checkpoint.spacing = scheduler.sampler, scheduler.spacing
        checkpoint.notes += scheduler.notes
        for name in ("unet", "vae"):
            checkpoint.parts[name] = _part(folder / name, name, tokenizer, reader)
        if "XL" in kind:
            checkpoint.parts["text"] = _pair(folder, index, reader, checkpoint.notes)
            checkpoint.guidance = 5.0
        else:
            checkpoint.parts["text"] = _part(folder / "text_encoder", "text", tokenizer, reader)
            checkpoint.notes += _add_words(checkpoint.parts["text"].config, tokenizer)
        factor = 2 ** (len(checkpoint.parts["vae"].config["channels"]) - 1)
        checkpoint.size = int(_settings(folder / "unet").get("sample_size", 64)) * factor
    except UserError:
        raise
    except DAMAGED as error:
        raise _damaged(folder, error) from error
    return checkpoint


def _pair(folder: Path, index: dict, reader: Read, notes: list[str]) -> Part:
    """SDXL's text encoders, each with its tokenizer; of a refiner the second alone."""
    encoders = []
    for place, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        encoders.append(None)
        if (folder / place).is_dir():
            encoders[-1] = _part(folder / place, "text", folder / tokenizer, reader)
            notes += _add_words(encoders[-1].config, folder / tokenizer)
    if encoders[1] is None:
        raise UserError(f"{folder} has no text_encoder_2, which SDXL needs.")
    zeros = index.get("force_zeros_for_empty_prompt", True)
    return pair(*encoders, empty="zeros" if zeros else "encoded")


def _one_part(folder: Path, reader: Read) -> Checkpoint:
    """A folder of one network, which its config.json names."""
    if (folder / "adapter_config.json").is_file():
        kind = kinds.LORA
        raise UserError(f"{folder} is {kind.name}; {kind.use.format(folder)}.")
    settings = _settings(folder, optional=True)
    classes = settings.get("architectures") or [settings.get("_class_name")]
    if not classes[0]:
        why = "neither model.json (ours) nor model_index.json (diffusers) is in it"
        raise UserError(f'"{folder}" is no checkpoint: {why}.')
    if classes[0] not in CLASSES:
        raise UserError(f"{folder} is a {classes[0]}; {kinds.NOT_READ}.")
    name = CLASSES[classes[0]]
    return Checkpoint("diffusers, one part", {name: part_folder(folder, name, reader)})


def part_folder(folder: Path, name: str, reader: Read) -> Part:
    """One network as diffusers or transformers saves it, in a folder with config.json."""
    try:
        return _part(folder, name, folder, reader)
    except UserError:
        raise
    except DAMAGED as error:
        raise _damaged(folder, error) from error


def _damaged(folder: Path, error: Exception) -> UserError:
    why = f"{type(error).__name__}: {error}"
    return UserError(f"{folder}: a configuration is damaged ({why}); {files.AGAIN}.")


def _settings(folder: Path, name: str = "config.json", optional: bool = False) -> dict:
    """A JSON file of a part, whose folder is inside of the checkpoint's."""
    file = folder / name
    if optional and not file.is_file():
        return {}
    return files.read_json(files.inside(folder.parent, file))


def _part(folder: Path, name: str, tokenizer: Path, reader: Read) -> Part:
    settings = _settings(folder)
    if name == "text":
        return _transformers_text(
            folder, tokenizer, settings.get("text_config") or settings, reader
        )
    state, file = _weights(folder, "diffusion_pytorch_model", reader)
    if name == "unet":
        part = unet(state, str(file), names.UNET_DIFFUSERS)
        # "attention_head_dim" means the number of heads, too.
        heads = settings.get("num_attention_heads") or settings.get("attention_head_dim", 8)
        levels = len(settings.get("block_out_channels", (320, 640, 1280, 1280)))
        part.config["heads"] = tuple(heads) if isinstance(heads, list) else (heads,) * levels
    else:
        part = vae(state, str(file), names.VAE_OLD_ATTENTION + names.VAE_DIFFUSERS)
        part = part._replace(latent_scale=float(settings.get("scaling_factor", 0.18215)))
        part.config["latent_shift"] = float(settings.get("shift_factor") or 0)
    part.config["groups"] = settings.get("norm_num_groups", 32)
    return part


def _transformers_text(folder: Path, tokenizer: Path, settings: dict, reader: Read) -> Part:
    """CLIPTextModel as transformers saves it; a whole CLIPModel's image encoder is left out."""
    state, file = _weights(folder, "model", reader)
    second = settings.get("hidden_size") == 1280 or folder.name == "text_encoder_2"
    part = text(
        without(state, IMAGE_ENCODER), str(file), names.CLIP_TRANSFORMERS, projection=second
    )
    activation = settings.get("hidden_act", "quick_gelu")
    if activation not in ("quick_gelu", "gelu"):
        where = f'{folder / "config.json"}: hidden_act "{activation}"'
        raise UserError(f"{where}; CLIP has quick_gelu or gelu.")
    part.config.update(heads=settings.get("num_attention_heads", 12), activation=activation)
    if (pad := _padding(tokenizer)) is not None:
        part.config["pad"] = pad
    return part


def _padding(tokenizer: Path) -> int | None:
    """The token that fills prompts up. Where two files differ, as in SD 2.x, the map of special
    tokens counts."""
    settings = _settings(tokenizer, "tokenizer_config.json", optional=True)
    special = _settings(tokenizer, "special_tokens_map.json", optional=True)
    token = special.get("pad_token") or settings.get("pad_token")
    token = token.get("content") if isinstance(token, dict) else token
    if token is None and not settings:
        return None
    if token not in PADDING:
        expected = f"one of {', '.join(PADDING)} is expected"
        raise UserError(f"{tokenizer}/tokenizer_config.json: pad_token is {token!r}; {expected}.")
    return PADDING[token]


def _add_words(config: dict, tokenizer: Path) -> list[str]:
    """Enter the words that were added to CLIP's vocabulary into a text encoder's config; of one
    with several vectors the tokens are word, word_1, ... Returns a note for each without a vector.
    """
    settings = _settings(tokenizer, "tokenizer_config.json", optional=True)
    listed = _settings(tokenizer, "tokenizer.json", optional=True).get("added_tokens") or []
    words = {entry["content"]: int(entry["id"]) for entry in listed}
    decoder = settings.get("added_tokens_decoder") or {}
    words |= {entry["content"]: int(number) for number, entry in decoder.items()}
    words |= _settings(tokenizer, "added_tokens.json", optional=True)
    words = {word: token for word, token in words.items() if token > sizes.END}
    read = {word: token for word, token in words.items() if token < config["vocabulary"]}
    config["added"] = {}
    for word, token in read.items():
        base, _, number = word.rpartition("_")
        if base in read and number.isdecimal():
            continue  # a further vector of that word
        more = takewhile(read.__contains__, (f"{word}_{k}" for k in count(1)))
        config["added"][word.lower()] = [token, *(read[name] for name in more)]
    absent = sorted(words.keys() - read)
    return [f'the tokenizer\'s own word "{word}" has no vector, and is not read' for word in absent]


def _weights(folder: Path, stem: str, reader: Read) -> tuple[State, Path]:
    """The tensors of one part, and the first of its files."""
    listed = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    chosen = [name for name in weight_files(stem, listed) if not name.endswith(".json")]
    if not chosen:
        why = f"no {stem}.safetensors, nor any other spelling of it"
        raise UserError(f"{folder} has no weights: {why}.")
    state: State = {}
    for name in chosen:
        state |= reader(files.inside(folder.parent, folder / name))
    return state, folder / chosen[0]


def weight_files(stem: str, listed: list[str]) -> list[str]:
    """One spelling of a part's weights among the names of a folder: full precision before half,
    safetensors before pickles. It is one file, or pieces with their index."""
    stems = {"safetensors": stem, "bin": "pytorch_model" if stem == "model" else stem}
    for variant in ("", ".fp16"):
        for suffix, base in stems.items():
            if (single := f"{base}{variant}.{suffix}") in listed:
                return [single]
            v = re.escape(variant)
            piece = rf"{base}({v}-\d+-of-\d+|-\d+-of-\d+{v})\.{suffix}"
            index = rf"{base}\.{suffix}\.index{v}\.json"
            if pieces := [name for name in listed if re.fullmatch(f"{piece}|{index}", name)]:
                return pieces
    return []


# A single file. It may hold fewer than three networks, or one without a prefix ("bare").


def _single_file(file: Path, reader: Read) -> Checkpoint:
    state, checkpoint = reader(file), Checkpoint("CompVis")
    kinds.check(file, state)
    others = without(state, (*UNET, *VAE, *TEXT_1, *TEXT_2, *XL_L, *XL_G))
    bare = len(others) == len(state)
    if not bare:
        checkpoint.unknown = sorted(names.to_ours(others, names.COMPVIS_DROPPED))
    if weights := _behind(state, UNET, bare, ("input_blocks.", "down_blocks.")):
        _add_unet(checkpoint, weights, state, file)
    if weights := _behind(state, VAE, bare, ("encoder.down", "decoder.up")):
        checkpoint.parts["vae"] = _compvis_vae(weights, str(file))
    if weights := _behind(state, XL_G, False, ()):
        clip_l = _behind(state, XL_L, False, ())
        checkpoint.parts["text"] = _xl_text(clip_l, weights, str(file))
    elif weights := _behind(state, TEXT_2, bare, ("transformer.resblocks.",)):
        checkpoint.parts["text"] = _openclip_text(weights, str(file), bare)
    elif weights := _behind(state, TEXT_1, bare, ("text_model.", "encoder.layers.")):
        weights = without(weights, IMAGE_ENCODER)
        checkpoint.parts["text"] = text(weights, str(file), names.CLIP_TRANSFORMERS)
    if {"unet", "vae"} <= checkpoint.parts.keys():
        is_xl = bool(checkpoint.parts["unet"].config["added"])
        own = checkpoint.parts["vae"]
        checkpoint.parts["vae"] = own._replace(latent_scale=SCALES[is_xl])
    if not checkpoint.parts:
        first = min(state, default="none")
        raise UserError(f'{file} holds no part of Stable Diffusion; its first tensor is "{first}".')
    return checkpoint


def _behind(state: State, prefixes: tuple[str, ...], bare: bool, starts: tuple[str, ...]) -> State:
    """A network's tensors, without the first of the prefixes that occurs. In a bare file: all, if
    there is a name with one of these starts."""
    part = state if bare and any(name.startswith(starts) for name in state) else {}
    for prefix in prefixes:
        part = part or {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
    return names.to_ours(part, names.COMPVIS_DROPPED)


def _add_unet(checkpoint: Checkpoint, weights: State, whole: State, file: Path) -> None:
    """The U-Net, and what it and Stability's ModelSpec tell of target and size. Averaged weights
    are taken where both stand in the file; their names lost their dots."""
    averages = {name: whole.get(AVERAGE + name.replace(".", "")) for name in weights}
    if all(value is not None for value in averages.values()):
        note = "live and averaged (EMA) weights of the U-Net are in it; the averaged are taken"
        checkpoint.notes.append(note)
        weights = averages
    part = checkpoint.parts["unet"] = unet(weights, str(file), _unet_table(weights))
    checkpoint.schedule = dict(STABLE_DIFFUSION)
    # SD 2.x predicts v at 768 pixels and eps at 512: no tensor says which.
    if not part.config["linear_projection"]:
        checkpoint.target, checkpoint.size = "eps", 512
    if part.config["added"]:  # SDXL, of which most predict eps, and some v: no tensor says which
        checkpoint.size, checkpoint.guidance = 1024, 5.0
        checkpoint.sampler, checkpoint.spacing = "euler", "leading"
        _read_marks(checkpoint, whole, file)
    targets, metadata = {"epsilon": "eps", "v": "v", "v_prediction": "v"}, files.metadata(file)
    prediction = metadata.get("modelspec.prediction_type", "")
    size = re.fullmatch(r"(\d{2,4})x\d{2,4}", str(metadata.get("modelspec.resolution")))
    checkpoint.target = targets.get(prediction, checkpoint.target)
    checkpoint.size = int(size[1]) if size else checkpoint.size


def _read_marks(checkpoint: Checkpoint, whole: State, file: Path) -> None:
    """What descendants of SDXL say of their target by a tensor without meaning."""
    if any(name.startswith("edm_") for name in whole):
        raise UserError(f"{file} predicts as EDM does (Playground 2.5), which is not read here.")
    if "v_pred" in whole:
        checkpoint.target = "v"
    if "ztsnr" in whole:
        checkpoint.schedule["zero_terminal_snr"], checkpoint.spacing = True, "trailing"


def _unet_table(state: State) -> names.Table:
    """The table for this U-Net: its numbering tells how many levels and blocks it has, and which
    levels have transformers."""
    if any(name.startswith("down_blocks.") for name in state):
        return names.UNET_DIFFUSERS
    numbers = [name.split(".")[1] for name in state if name.startswith("input_blocks.")]
    total = 1 + max((int(number) for number in numbers if number.isdecimal()), default=0)
    levels = 1 + sum(name.endswith(".0.op.weight") for name in state)
    blocks = total // levels - 1
    firsts = [1 + level * (blocks + 1) for level in range(levels)]
    return names.unet_compvis([f"input_blocks.{k}.1.norm.weight" in state for k in firsts], blocks)


def _compvis_vae(state: State, where: str) -> Part:
    numbers = {name.split(".")[2] for name in state if name.startswith("encoder.down.")}
    diffusers = names.VAE_OLD_ATTENTION + names.VAE_DIFFUSERS
    return vae(state, where, names.vae_compvis(len(numbers)) if numbers else diffusers)


def _xl_text(clip_l: State, clip_g: State, where: str) -> Part:
    first = text(clip_l, where, names.CLIP_TRANSFORMERS) if clip_l else None
    second = text(clip_g, where, names.CLIP_OPEN, projection=True)
    second.config.update(activation="gelu", pad=0)
    return pair(first, second, empty="zeros" if clip_l else "encoded")


def _openclip_text(state: State, where: str, bare: bool) -> Part:
    """A bare file may hold another text encoder than SD 2.x's, whose width is 1024."""
    embedding = state.get("token_embedding.weight")
    second = not bare or (embedding is not None and tuple(embedding.shape[1:]) == (1024,))
    part = text(without(state, ("visual.",)), where, names.CLIP_OPEN, penultimate=second)
    if second:
        part.config.update(activation="gelu", pad=0)
    return part
