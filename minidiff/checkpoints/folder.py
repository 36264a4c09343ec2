"""Our own format, the model folder: model.json (kinds and configs) and one safetensors file for
each part. Also how tensors of any file come into a network: nothing is initialized, nothing is
copied that need not be, and every tensor has its place."""

import ctypes
import json
import mmap
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minidiff.checkpoints import files
from minidiff.conditioners import (
    ClassLabels,
    CLIPPair,
    FluxText,
    PairConfig,
    SD3Text,
    T5TextConfig,
    Unconditional,
)
from minidiff.denoiser import Denoiser
from minidiff.errors import UserError
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.methods.lora import merged_state
from minidiff.mmdit import MMDiT, MMDiTConfig
from minidiff.schedules import Discrete, Flow, Karras, NoiseSchedule
from minidiff.text import CLIPText, TextConfig
from minidiff.training import atomic
from minidiff.unet import UNet, UNetConfig
from minidiff.vae import VAE, Pixels, VAEConfig

FORMAT = "minidiff 1"
PART_CLASSES = (VAE, Pixels, CLIPText, CLIPPair, SD3Text, FluxText)
PART_CLASSES += (ClassLabels, Unconditional, UNet, MMDiT)
KINDS = {cls.__name__: cls for cls in PART_CLASSES}
PARTS = ("vae", "text", "unet")
SCHEDULES = {"discrete": Discrete, "flow": Flow, "karras": Karras}
SETTINGS = ("size", "dropout", "guidance", "sampler", "spacing")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DAMAGED = (ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError)
VOCABULARY = "tokenizer.json"  # of T5, which comes with no library
MOST_BLOCKS = 500  # of a network, counted as in _blocks, which gives 66 for SDXL's U-Net


def save(model: LatentDiffusion, path: str | Path) -> Path:
    """Write the model folder whole or not at all; what LoRAs change is written into the weights.

    An existing folder is replaced only if it is a model folder with nothing else in it.
    """
    path = Path(path)
    parts = {name: getattr(model, name) for name in PARTS}
    denoiser, schedule = model.denoiser, schedule_to_json(model.schedule)
    whole = {"format": FORMAT, **{name: getattr(model, name) for name in SETTINGS}}
    whole["denoiser"] = dict(
        target=denoiser.target, weighting=denoiser.weighting, schedule=schedule
    )
    for name, part in parts.items():
        whole[name] = {"kind": type(part).__name__, **asdict(part.config)}
    with atomic.write(path, foreign) as new:
        new.mkdir()
        for name, part in parts.items():
            state = {key: value.contiguous() for key, value in merged_state(part).items()}
            save_file(state, new / f"{name}.safetensors")
        if (t5 := getattr(model.text, "t5", None)) is not None:
            (new / VOCABULARY).write_text(t5.vocabulary, encoding="utf-8")
        (new / "model.json").write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    return path


def foreign(path: Path) -> Path | None:
    """What in path is not a part of a model folder; see atomic.Stranger."""
    names = {"model.json", VOCABULARY, *(f"{name}.safetensors" for name in PARTS)}
    if not path.is_dir():
        return path
    for entry in sorted(path.iterdir()):
        if entry.name not in names or not entry.is_file():
            return entry
    try:
        whole = files.read_json(path / "model.json")
    except (UserError, OSError):
        return path
    ours = isinstance(whole, dict) and str(whole.get("format", "")).startswith("minidiff")
    return None if ours else path / "model.json"


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = torch.float32,
) -> LatentDiffusion:
    """Read a model folder, in this precision or as stored (None). Every problem is a UserError that
    names the file."""
    path, dtype = Path(path), dtype_named(dtype)
    if not path.exists():
        atomic.recover(path)  # a save that was killed
    if not path.is_dir():
        fix = "`minidiff quickstart` makes one, or name another model"
        raise UserError(f'no model folder "{path}"; {fix}.')
    if not (path / "model.json").is_file():
        why = "it has no model.json (`minidiff quickstart` writes one)"
        raise UserError(f'"{path}" is no model folder: {why}.')
    whole = files.read_json(path / "model.json")
    try:
        model = _model(whole)
    except DAMAGED as error:
        raise damaged(path, error, "save the model again") from error
    for name in PARTS:
        file = path / f"{name}.safetensors"
        if not file.is_file():
            fix = "copy the whole folder, or save the model again"
            raise UserError(f"{path} has no weights: {file.name} is missing; {fix}.")
        state = files.tensors(files.inside(path, file))
        where = f"{file} does not fit model.json"
        module = getattr(model, name)
        fill(module, state, where, precision_of(name, dtype, module))
    if (t5 := getattr(model.text, "t5", None)) is not None:
        files.read_json(files.inside(path, path / VOCABULARY))
        t5.vocabulary = (path / VOCABULARY).read_text(encoding="utf-8")
    return model.to(device).eval()


def damaged(path: Path, error: Exception, fix: str) -> UserError:
    why = f"{type(error).__name__}: {files.first_line(error)}"
    return UserError(f"{path / 'model.json'} is damaged ({why}); {fix}.")


def schedule_to_json(schedule: NoiseSchedule) -> dict:
    """A schedule's kind and fields."""
    kind = next(name for name, cls in SCHEDULES.items() if type(schedule) is cls)
    return {"kind": kind, **asdict(schedule)}


def schedule_from_json(described: dict) -> NoiseSchedule:
    """The inverse of schedule_to_json."""
    config = config_of(described)
    if isinstance(config.get("betas"), list):
        config["betas"] = tuple(map(float, config["betas"]))  # JSON has lists
    return SCHEDULES[described["kind"]](**config)


def network(described: dict) -> nn.Module:
    """A part as model.json describes it. Its tensors have no memory yet."""
    return empty(KINDS[described["kind"]], config_of(described))


def config_of(described: dict) -> dict:
    return {key: value for key, value in described.items() if key != "kind"}


def _model(whole: dict) -> LatentDiffusion:
    """The model that model.json describes, without weights."""
    if whole["format"] != FORMAT:
        raise ValueError(f'format "{whole["format"]}", but this version reads "{FORMAT}"')
    vae, text, unet = (network(whole[name]) for name in PARTS)
    described = whole["denoiser"]
    schedule = schedule_from_json(described["schedule"])
    schedule.timesteps(1)  # values of the wrong kind fail here, not in the middle of an image
    return LatentDiffusion(
        vae,
        text,
        Denoiser(unet, schedule, described["target"], described["weighting"]),
        int(whole["size"]),
        float(whole["dropout"]),
        float(whole["guidance"]),
        str(whole.get("sampler", "ddim")),
        whole.get("spacing", "trailing"),
    )


# Tensors into networks.


class Uninitialized(TorchFunctionMode):
    """nn.init does nothing. On tensors without memory it would import torch._dynamo: a second."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def empty(network: type[nn.Module], config: dict) -> nn.Module:
    """A network of this config whose tensors have shapes and no memory."""
    settings = network.Config(**config)
    if (count := _blocks(settings)) > MOST_BLOCKS:
        raise UserError(f"a network of {count} blocks would take for ever; {MOST_BLOCKS} are known")
    with torch.device("meta"), Uninitialized():
        return network(settings)


def _blocks(config: object) -> int:
    """About how many blocks a network of this config has."""
    if isinstance(config, UNetConfig | VAEConfig):
        depth = max(getattr(config, "depth", (0,)))
        return len(config.channels) * config.blocks * (1 + depth)
    if isinstance(config, PairConfig | T5TextConfig):
        encoders = (config.clip_l, config.clip_g, getattr(config, "t5", None))
        return sum(each.layers for each in encoders if each)
    if isinstance(config, MMDiTConfig):
        return config.joint + config.single
    return config.layers if isinstance(config, TextConfig) else 1


def fill(
    module: nn.Module, state: dict[str, Tensor], where: str, dtype: torch.dtype | None = None
) -> nn.Module:
    """The module, holding these very tensors, or its parameters in another precision.

    A tensor that is missing, left over, of another shape or kind, or not finite is a UserError that
    names it, and the file: `where`. What is converted is used up: nobody may read `state`
    afterwards.
    """
    expected = module.state_dict()
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or extra:
        kind, first = ("missing", missing[0]) if missing else ("left over", extra[0])
        counts = f"{len(missing)} tensors are missing and {len(extra)} left over"
        raise UserError(f'{where}: {counts}; the first {kind} is "{first}".')
    state, parameters = dict(state), dict(module.named_parameters())
    for name, value in state.items():
        _check(value, expected[name].shape, f'{where}: "{name}"')
        if dtype in (None, value.dtype):
            continue
        if name in parameters:
            state[name] = value.to(dtype)
            _forget(value)
        else:  # the latent scale: measured anew, it must not round to half precision
            state[name] = value.to(torch.promote_types(value.dtype, torch.float32))
    module.load_state_dict(state, assign=True)
    return module.eval()


def _check(value: Tensor, shape: torch.Size, where: str) -> None:
    if value.shape != shape:
        fitting = f"where {tuple(shape)} would fit the other tensors"
        raise UserError(f"{where} is {tuple(value.shape)}, {fitting}.")
    if not value.is_floating_point() or value.itemsize < 2:
        kind = str(value.dtype).removeprefix("torch.")
        raise UserError(
            f"{where} is made of {kind}; weights are floating-point, of 16 bits or more."
        )
    if not value.sum(dtype=torch.promote_types(value.dtype, torch.float32)).isfinite():
        what = "numbers that are not finite (NaN or infinity)"
        raise UserError(f"{where} holds {what}; training broke before it was saved.")


def _forget(value: Tensor) -> None:
    """Tell the system that a tensor will not be read again. A map of a file then leaves memory at
    once; without this, a file that is converted stands in memory whole beside the result."""
    if not hasattr(mmap, "MADV_DONTNEED") or not value.is_contiguous():
        return
    madvise, page = getattr(ctypes.CDLL(None), "madvise", None), mmap.PAGESIZE
    # Its whole pages: it shares the first and the last with other tensors.
    first, end = -(-value.data_ptr() // page), (value.data_ptr() + value.nbytes) // page
    if madvise is not None and end > first:
        size = ctypes.c_size_t((end - first) * page)
        madvise(ctypes.c_void_p(first * page), size, mmap.MADV_DONTNEED)


def precision_of(
    part: str, dtype: torch.dtype | None, module: nn.Module | None = None
) -> torch.dtype | None:
    """The precision of one part. In float16 the VAE stays in float32: Stable Diffusion's overflows
    and gives black images. T5 overflows, too: its text encoders are bfloat16."""
    if dtype == torch.float16 and getattr(module, "t5", None) is not None:
        return torch.bfloat16
    return torch.float32 if part == "vae" and dtype == torch.float16 else dtype


def dtype_named(name: str | torch.dtype | None) -> torch.dtype | None:
    """A torch.dtype, from its short name where it is one. None: as stored."""
    if name is None or isinstance(name, torch.dtype):
        return name
    if name not in DTYPES:
        raise UserError(f'no dtype "{name}"; there is {", ".join(DTYPES)}.')
    return DTYPES[name]
