"""The part sample of gpu.py: the U-Net and whole images, eager, compiled and as CUDA graphs."""

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import diffusers_side
import torch
from measuring import (
    Limits,
    Row,
    Setup,
    compared,
    limits_of,
    stable_diffusion,
    tried,
    turns,
    weights_of,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from minidiff import pipeline
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.options.sampling import SampleConfig
from minidiff.unet import UNet
from minidiff.vae import VAE

CAPTIONS = [f"photograph number {k}" for k in range(16)]


class Replayed(nn.Module):
    """A network's forward pass, recorded once as a CUDA graph for one shape."""

    def __init__(self, network: nn.Module, inputs: tuple[torch.Tensor, ...]):
        super().__init__()
        self.config, self.multiple = network.config, network.multiple
        self.inputs, self.graph = [each.clone() for each in inputs], torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # the default device: a table made on the CPU would have to be copied, which waits
        with torch.cuda.stream(stream), torch.device(inputs[0].device):
            for _ in range(3):
                network(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.device(inputs[0].device), torch.cuda.graph(self.graph):
            self.output = network(*self.inputs)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.output.clone()


@torch.no_grad()
def sample(setup: Setup) -> Iterator[Row]:
    """The U-Net under guidance, and whole pictures, in bf16: eager, CUDA graphs, then compiled."""
    limits, device = limits_of(setup)[0], setup.device
    model = stable_diffusion(setup, torch.bfloat16)
    pipe, missing = diffusers_side.pipeline_of(setup.tiny, device)
    if missing:
        yield Row("diffusers", error=missing)
    for way in ("eager", "compiled"):
        if way == "compiled":
            backend = "eager" if setup.tiny else "inductor"
            for unet in [model.unet, *([pipe.unet] if pipe else [])]:
                unet.compile(backend=backend, dynamic=False)
        for batch in setup.batches:
            rows = sampled(setup, limits, model, pipe, batch, way)
            yield from tried(f"{way}, batch {batch}", rows, device)
        if way == "compiled":
            continue  # to record that, it would have to be compiled once more
        for batch in setup.batches:
            what = f"CUDA graphs, batch {batch}"
            if device.startswith("cuda"):
                yield from tried(what, replayed(setup, limits, model, batch), device)
            else:
                yield Row(what, error="needs a GPU")


def inputs_of(model: LatentDiffusion, batch: int) -> tuple[torch.Tensor, ...]:
    """The U-Net's, for so many pictures under guidance, as the sampler gives them."""
    side, like = model.size // model.vae.factor, {"device": model.device}
    x, t = torch.randn(2 * batch, 4, side, side, **like), torch.full((2 * batch,), 500.0, **like)
    return x, t, model.text.encode([""] * (2 * batch))


def sampled(
    setup: Setup, limits: Limits, model: LatentDiffusion, pipe: object, batch: int, way: str
) -> Iterator[Row]:
    inputs, half = inputs_of(model, batch), torch.bfloat16
    steps = 2 if setup.tiny else 25
    draw = partial(pipeline.generate, model, CAPTIONS[:batch], SampleConfig(steps, sampler="ddim"))
    unet, picture = {"minidiff": lambda: model.unet(*inputs)}, {"minidiff": draw}
    if pipe:
        x, t, context = inputs[0].to(half), inputs[1], inputs[2]
        unet["diffusers"] = lambda: pipe.unet(x, t, context).sample
        picture["diffusers"] = partial(diffusers_side.draw, pipe, batch, steps, model.size)
    unet_floor, picture_floor = floors(limits, model, batch, steps)
    begun = time.perf_counter()
    timings = turns(unet, setup, 3)
    note = f"first calls {time.perf_counter() - begun - sum(sum(t[0]) for t in timings.values()):.0f} s"
    for made in compared(f"U-Net, {way}", timings, batch, unet_floor, weights_of(model.unet)):
        yield replace(made, note=note)
    timings = turns(picture, setup, 8)
    what = f"picture of {steps} steps, {way}"
    yield from compared(what, timings, batch, picture_floor, weights_of(model))


def replayed(setup: Setup, limits: Limits, model: LatentDiffusion, batch: int) -> Iterator[Row]:
    """The same from CUDA graphs."""
    inputs, steps, own = inputs_of(model, batch), 2 if setup.tiny else 25, model.unet
    floor, picture_floor = floors(limits, model, batch, steps)
    graph = Replayed(own, inputs)
    made = {"minidiff": lambda: graph(*inputs)}
    what = "U-Net, CUDA graphs"
    yield from compared(what, turns(made, setup, 2), batch, floor, weights_of(own))
    model.denoiser.network = graph
    try:
        config = SampleConfig(steps, sampler="ddim")
        draw = {"minidiff": partial(pipeline.generate, model, CAPTIONS[:batch], config)}
        what, timings = f"picture of {steps} steps, CUDA graphs", turns(draw, setup, 4)
    finally:
        model.denoiser.network = own
    yield from compared(what, timings, batch, picture_floor, weights_of(model))


def floors(limits: Limits, model: LatentDiffusion, batch: int, steps: int) -> tuple[float, float]:
    """The least seconds of a pass of the U-Net, and of a picture: its multiplications at the speed
    of the matrix product, or reading its weights, whichever takes longer."""
    with torch.device("meta"):
        parts = UNet(model.unet.config), VAE(model.vae.config)
        side = model.size // model.vae.factor
        x, t = torch.empty(2 * batch, 4, side, side), torch.empty(2 * batch)
        context = torch.empty(2 * batch, 77, model.unet.context_dim)
        with FlopCounterMode(display=False) as unet:
            parts[0](x, t, context)
        with FlopCounterMode(display=False) as vae:
            parts[1].decoder(x[:batch])
    reading = weights_of(model.unet) / limits.bandwidth
    step = max(unet.get_total_flops() / limits.flops, reading)
    return step, steps * step + vae.get_total_flops() / limits.flops
