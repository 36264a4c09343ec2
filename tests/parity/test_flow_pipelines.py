"""Whole pictures of SD 3 and FLUX.1 beside diffusers' pipelines, with small random weights.

20 steps at guidance 1 within 1e-4 of diffusers', whose schedule and sinusoids are float32.
"""

import pytest
import torch

import minidiff
from minidiff.options.sampling import SampleConfig, Size

from . import flow_pipelines

PROMPT, SIZE = "a red cat on a mat", 64


@pytest.fixture(scope="module", params=["sd3", "sd3-t5", "sd35-medium", "dev", "schnell"])
def pipeline(request, tmp_path_factory):
    folder, kind = tmp_path_factory.mktemp(request.param), request.param
    if kind.startswith("sd3"):
        t5, medium35 = kind == "sd3-t5", kind == "sd35-medium"
        return flow_pipelines.sd3(folder, t5, medium35), folder / "model"
    return flow_pipelines.flux(folder, kind == "dev"), folder / "model"


def latents() -> torch.Tensor:
    return torch.randn(1, 16, SIZE // 8, SIZE // 8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def theirs(pipeline, guidance: float, steps: int = 20) -> torch.Tensor:
    noise, settings = latents(), dict(height=SIZE, width=SIZE, output_type="pt")
    if "Flux" in type(pipeline).__name__:
        noise = pipeline._pack_latents(noise, 1, 16, SIZE // 8, SIZE // 8)
        settings["max_sequence_length"] = (
            512 if pipeline.transformer.config.guidance_embeds else 256
        )
    images = pipeline(
        PROMPT, latents=noise, guidance_scale=guidance, num_inference_steps=steps, **settings
    )
    return images.images * 2 - 1


@torch.no_grad()
def ours(model, guidance: float, steps: int = 20) -> torch.Tensor:
    config = SampleConfig(size=Size(SIZE, SIZE))
    *_, last = model.sample([PROMPT], steps, guidance, x_T=latents(), config=config)
    return model.decode(last.x0).clamp(-1, 1)


def difference(model, pipeline, guidance: float, steps: int = 20) -> float:
    return (ours(model, guidance, steps) - theirs(pipeline, guidance, steps)).abs().max().item()


def test_a_picture_is_diffusers(pipeline):
    pipeline, folder = pipeline
    model = minidiff.load(folder)
    assert theirs(pipeline, 1.0).std() > 0.1
    assert difference(model, pipeline, 1.0) < 1e-4
