"""One network of a checkpoint before it is built: its tensors under our names, and its config.
Without torch."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from minidiff.checkpoints import names, sizes
from minidiff.errors import UserError

State = dict  # by name: Tensor or Stored
Read = Callable[[Path], State]


class Part(NamedTuple):
    """One network, before it is built."""

    state: State  # by our names
    config: dict  # the arguments of UNetConfig, VAEConfig, TextConfig or PairConfig
    where: str  # the file, for messages
    latent_scale: float | None = None  # of a VAE; None: it does not say


@dataclass
class Checkpoint:
    """What a folder or file holds. None: it does not say."""

    layout: str
    parts: dict[str, Part] = field(default_factory=dict)  # by a key of KINDS
    schedule: dict | None = None  # the arguments of schedules.Discrete
    target: str | None = None
    sampler: str = "ddim"
    spacing: str | None = None
    guidance: float = 7.5
    size: int | None = None  # side of the training images in pixels
    notes: list[str] = field(default_factory=list)  # what was chosen or ignored
    unknown: list[str] = field(default_factory=list)  # names of tensors that belong to no part


def unet(state: State, where: str, table: names.Table) -> Part:
    state = names.to_ours(state, table)
    return Part(state, config_of(sizes.unet_config, state, where), where)


def vae(state: State, where: str, table: names.Table) -> Part:
    """The attention of CompVis, and of old diffusers files, is made of 1x1 convolutions: the same
    weights with two axes more."""
    state = names.to_ours(state, table)
    for name, value in state.items():
        if ".attention." in name and value.ndim == 4:
            state[name] = value.flatten(1)
    return Part(state, config_of(sizes.vae_config, state, where), where)


def text(
    state: State,
    where: str,
    table: names.Table,
    penultimate: bool = False,
    projection: bool = False,
) -> Part:
    """penultimate: leave out the last block, whose output SD 2.x does not use. projection: keep the
    linear map of the pooled vector, which SDXL alone uses."""
    state = {name.removeprefix("text_model."): value for name, value in state.items()}
    state = names.to_ours(state, table)
    if not projection:
        state = without(state, ("projection.",))
    elif table is names.CLIP_OPEN and "projection.weight" in state:  # x @ P, not a linear layer
        state["projection.weight"] = state["projection.weight"].T
    for name in [name for name in state if ".qkv." in name]:
        for letter, value in zip("qkv", state.pop(name).chunk(3), strict=True):
            state[name.replace(".qkv.", f".{letter}.")] = value
    config = config_of(sizes.text_config, state, where)
    if penultimate:
        config["layers"] -= 1
        state = without(state, (f"blocks.{config['layers']}.",))
    return Part(state, config, where)


def pair(clip_l: Part | None, clip_g: Part, empty: str) -> Part:
    """SDXL's two text encoders as one part; its refiner has the second alone."""
    state, config = {}, dict(clip_l=None, empty=empty)
    for name, each in (("clip_l", clip_l), ("clip_g", clip_g)):
        if each is not None:
            state |= {f"{name}.{key}": value for key, value in each.state.items()}
            config[name] = each.config | dict(penultimate=True)
    return Part(state, config, clip_g.where)


def config_of(count: Callable[[sizes.Shapes], dict], state: State, where: str) -> dict:
    try:
        return count({name: tuple(value.shape) for name, value in state.items()})
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def without(state: State, prefixes: tuple[str, ...]) -> State:
    return {name: value for name, value in state.items() if not name.startswith(prefixes)}
