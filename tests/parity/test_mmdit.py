"""Our transformer against diffusers' SD3Transformer2DModel and FluxTransformer2DModel, tiny and with random weights.

fp64 agrees to 1e-12 where all of theirs is fp64, which patches see to. As it stands, to 1e-6 at small times: the angles of
its sinusoids are fp32 whatever the dtype of the weights, so their error grows with the time; and so are its rotary positions and the
squares of SD3.5's qk-norm.
"""

import dataclasses

import pytest
import torch

from minidiff import mmdit
from minidiff.checkpoints import folder, names_flow
from minidiff.checkpoints.files import Stored
from minidiff.condition import Condition
from minidiff.mmdit import MMDiT, MMDiTConfig

from .test_networks import gap, randomized

diffusers = pytest.importorskip("diffusers")
F64 = torch.float64
SD3 = dict(
    sample_size=16,
    in_channels=4,
    out_channels=4,
    num_layers=3,
    attention_head_dim=8,
    num_attention_heads=4,
    joint_attention_dim=24,
    caption_projection_dim=32,
    pooled_projection_dim=20,
    pos_embed_max_size=12,
)
SD35 = SD3 | dict(qk_norm="rms_norm", dual_attention_layers=(0, 1))
FLUX = dict(
    in_channels=16,
    num_layers=2,
    num_single_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=24,
    pooled_projection_dim=20,
    axes_dims_rope=(4, 6, 6),
)
OURS = {
    "sd3": MMDiTConfig(32, 3, 4, 24, 20, 4, 4, table=12),
    "sd35": MMDiTConfig(32, 3, 4, 24, 20, 4, 4, table=12, qk_norm=True, dual=2),
    "flux": MMDiTConfig(32, 2, 2, 24, 20, 4, 4, single=3, qk_norm=True, axes=(4, 6, 6)),
    "flux-guided": MMDiTConfig(
        32, 2, 2, 24, 20, 4, 4, single=3, qk_norm=True, axes=(4, 6, 6), guidance=True
    ),
}


def theirs_of(kind):
    if kind.startswith("sd3"):
        settings = SD35 if kind == "sd35" else SD3
        network = diffusers.SD3Transformer2DModel(**settings)
    else:
        network = diffusers.FluxTransformer2DModel(**FLUX, guidance_embeds=kind == "flux-guided")
    return randomized(network, F64)


def inputs(height=12, width=8, length=7):
    condition = Condition(
        torch.randn(2, length, 24, dtype=F64),
        torch.randn(2, 20, dtype=F64),
        torch.tensor([[3.5], [1.0]], dtype=F64),
    )
    return torch.randn(2, 4, height, width, dtype=F64), condition


def output_of(network, x, t, condition):
    """Of diffusers' network at t in [0, 1]."""
    if isinstance(network, diffusers.SD3Transformer2DModel):
        return network(x, condition.context, condition.pooled, 1000 * t).sample
    height, width = x.shape[2:]
    pipe = diffusers.FluxPipeline
    ids = pipe._prepare_latent_image_ids(2, height // 2, width // 2, "cpu", F64)
    packed = network(
        pipe._pack_latents(x, 2, 4, height, width),
        condition.context,
        condition.pooled,
        t,
        ids,
        torch.zeros(condition.context.shape[1], 3),
        condition.numbers[:, 0] if network.config.guidance_embeds else None,
    ).sample
    return pipe._unpack_latents(packed, 8 * height, 8 * width, 8)


def loaded(kind, theirs):
    layout = names_flow.layout_of(theirs.state_dict())
    ours = MMDiT(OURS[kind]).double().eval()
    ours.load_state_dict(names_flow.read(theirs.state_dict(), layout))
    return ours


@pytest.fixture
def precise(monkeypatch):
    """Diffusers' sinusoids of time and position, and the squares of its qk-norm, in fp64."""
    from diffusers.models import embeddings, normalization

    from minidiff.layers import timestep_embedding

    monkeypatch.setattr(
        embeddings.Timesteps, "forward", lambda self, t: timestep_embedding(t.double(), 256)
    )
    # their rotary angles are fp64, and rounded by .float()
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(
        normalization.RMSNorm,
        "forward",
        lambda self, x: torch.nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.eps),
    )


@torch.no_grad()
@pytest.mark.equation("dit-adaln", "rope-34")
@pytest.mark.parametrize("kind", OURS)
def test_equals_diffusers(kind, precise):
    theirs = theirs_of(kind)
    ours = loaded(kind, theirs)
    t = torch.tensor([0.25, 0.8], dtype=F64)
    for sides in ((12, 8), (6, 24)):
        x, condition = inputs(*sides)
        expected = output_of(theirs, x, t, condition)
        assert expected.std() > 0.1
        assert gap(ours(x, 1000 * t, condition), expected) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("kind", OURS)
def test_equals_diffusers_as_it_stands(kind):
    theirs = theirs_of(kind)
    ours = loaded(kind, theirs)
    t = torch.tensor([0.25, 0.8], dtype=F64)
    x, condition = inputs()
    largest = 3500 if kind == "flux-guided" else 800  # of the numbers that become sinusoids
    fp32 = largest * torch.finfo(torch.float32).eps / 10  # their angles' error, as it arrives
    assert gap(ours(x, 1000 * t, condition), output_of(theirs, x, t, condition)) < fp32
    small = torch.tensor([0.01, 0.06], dtype=F64)
    condition = dataclasses.replace(condition, numbers=condition.numbers / 100)
    expected = output_of(theirs, x, small, condition)
    assert gap(ours(x, 1000 * small, condition), expected) < 1e-6


@pytest.mark.parametrize(
    "builder, tensors, millions",
    [
        (mmdit.sd3_medium, 683, 2084.95),
        (mmdit.sd35_medium, 909, 2469.66),
        (mmdit.sd35_large, 1227, 8146.28),
        (mmdit.flux_dev, 1160, 11901.41),
        (mmdit.flux_schnell, 1156, 11891.18),
    ],
)
def test_true_shapes_in_both_layouts(builder, tensors, millions):
    """Every tensor of diffusers' network has its place, and every one of ours in both layouts, there and back."""
    with torch.device("meta"), folder.Uninitialized():
        ours = builder()
        flux = ours.config.axes is not None
        theirs = (diffusers.FluxTransformer2DModel if flux else diffusers.SD3Transformer2DModel)(
            **settings_of(ours.config)
        )
    state = ours.state_dict()
    assert len(state) == tensors
    assert round(sum(v.numel() for v in state.values()) / 1e6, 2) == millions
    both = (
        (names_flow.FLUX, names_flow.FLUX_DIFFUSERS)
        if flux
        else (names_flow.SD3, names_flow.SD3_DIFFUSERS)
    )
    for layout in both:
        published = names_flow.write(state, layout)
        assert names_flow.layout_of(published) is layout
        back = names_flow.read(published, layout)
        assert shapes(back) == shapes(state)
        stored = {name: Stored("F16", tuple(v.shape)) for name, v in published.items()}
        headers = names_flow.read(stored, layout)
        assert shapes(headers) == shapes(state)
        assert MMDiTConfig(**names_flow.config(headers)) == ours.config
    assert shapes(published) == shapes(theirs.state_dict())


def shapes(state):
    return {name: tuple(value.shape) for name, value in state.items()}


def settings_of(config):
    """Of diffusers' network."""
    settings = dict(
        num_layers=config.joint,
        num_attention_heads=config.heads,
        attention_head_dim=config.width // config.heads,
        joint_attention_dim=config.context_dim,
        pooled_projection_dim=config.pooled_dim,
    )
    if config.axes is not None:
        return settings | dict(num_single_layers=config.single, guidance_embeds=config.guidance)
    return settings | dict(
        caption_projection_dim=config.width,
        pos_embed_max_size=config.table,
        qk_norm="rms_norm" if config.qk_norm else None,
        dual_attention_layers=tuple(range(config.dual)),
    )
