"""LoRA files between diffusers with PEFT and us: pictures of whole pipelines, as in test_pipeline and to its tolerance."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import minidiff
from minidiff import samplers
from minidiff.checkpoints import lora as lora_files
from minidiff.checkpoints import names
from minidiff.methods import lora

diffusers, peft = pytest.importorskip("diffusers"), pytest.importorskip("peft")
PROMPTS, TOLERANCE = ["a small blue circle above a large red square", "苹果"], 1e-4
LATENTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
pytestmark = pytest.mark.parametrize(
    "pipeline", ["sd1", "sd2"], indirect=True
)  # what is predicted makes no difference here
CONVOLUTIONS = ("conv1", "conv_shortcut", "proj_in", "downsamplers.0.conv", "conv_in")


@pytest.fixture
def both(pipeline):
    """Theirs and ours, of the same weights; without LoRA again when the test is over."""
    yield pipeline[0], minidiff.load(pipeline[1])
    pipeline[0].unload_lora_weights()


def theirs(pipe, **how):
    return pipe(
        PROMPTS,
        latents=LATENTS.clone(),
        num_inference_steps=3,
        guidance_scale=4.0,
        output_type="np",
        **how,
    ).images


def ours(model):
    *_, last = model.sample(PROMPTS, 3, guidance=4.0, step=samplers.by_name("ddim"), x_T=LATENTS)
    return (model.decode(last.x0).clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1).numpy()


def trained(model, alpha):
    """A few steps of training in U-Net and text tower, in strides that show in the picture; convolutions of 1x1, 3x3 and stride 2 among them."""
    lora.add(
        model.unet,
        4,
        alpha,
        (*lora.ATTENTION, "ff.up", "conv1", "skip", "proj_in", "resample.conv", "conv_in"),
    )
    lora.add(model.text, 4, alpha)
    optimizer = torch.optim.Adam(
        [p for part in (model.unet, model.text) for p in part.parameters() if p.requires_grad],
        lr=0.02,
    )
    for _ in range(3):
        optimizer.zero_grad()
        model.loss(torch.rand(2, 3, 64, 64) * 2 - 1, PROMPTS).mean().backward()
        optimizer.step()


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_what_is_trained_here_draws_there(both, tmp_path, layout):
    pipe, model = both
    bare = ours(model)
    trained(model, alpha=2.0)
    expected = ours(model)
    assert abs(expected - bare).max() > 0.02
    pipe.load_lora_weights(lora_files.save(model, tmp_path / "l.safetensors", layout))
    assert abs(theirs(pipe) - expected).max() < TOLERANCE
    lora.merge(model)
    assert abs(ours(model) - expected).max() < TOLERANCE


def with_peft(pipe, alpha):
    """Adapters of PEFT in their U-Net and text tower, of random numbers."""
    config = {"r": 4, "lora_alpha": alpha, "init_lora_weights": False}
    pipe.unet.add_adapter(
        peft.LoraConfig(
            target_modules=["to_q", "to_k", "to_v", "to_out.0", *CONVOLUTIONS], **config
        )
    )
    pipe.text_encoder.add_adapter(
        peft.LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "out_proj"], **config)
    )
    for module in (pipe.unet, pipe.text_encoder):
        for name, p in module.named_parameters():
            if ".lora_" in name:
                torch.nn.init.normal_(p, std=0.1)


def saved(pipe, folder, kind):
    """Their LoRA as their own code writes it: with metadata that carry alpha, as training scripts long did, and for kohya's tools."""
    from diffusers import training_utils, utils

    parts = {part: getattr(pipe, part) for part in ("unet", "text_encoder")}
    layers = {part: peft.get_peft_model_state_dict(network) for part, network in parts.items()}
    if kind == "kohya":
        whole = {
            f"{part}.{name}": value
            for part, state in layers.items()
            for name, value in state.items()
        }
        save_file(utils.convert_state_dict_to_kohya(whole), folder / "l.safetensors")
        return folder / "l.safetensors"
    if kind == "scripts":
        layers, metadata = (
            {part: utils.convert_state_dict_to_diffusers(state) for part, state in layers.items()},
            {},
        )
    else:
        metadata = training_utils._collate_lora_metadata(parts)
    pipe.save_lora_weights(folder, layers["unet"], layers["text_encoder"], **metadata)
    return folder / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("kind, alpha", [("peft", 10), ("scripts", 4), ("kohya", 4)])
def test_what_is_made_there_draws_here(both, tmp_path, kind, alpha):
    pipe, model = both
    bare = ours(model)
    with_peft(pipe, alpha)
    expected = theirs(pipe)
    file = saved(pipe, tmp_path, kind)
    with safe_open(file, "pt") as opened:
        keys, said = list(opened.keys()), (opened.metadata() or {}).get("lora_adapter_metadata")
    assert (kind == "peft") == (said is not None) and (
        said is None or json.loads(said)["unet.lora_alpha"] == alpha
    )
    found = lora_files.load(model, file)
    assert (
        len(found.layers) == sum(not key.endswith("alpha") for key in keys) // 2
        and found.moved > 0.01
    )
    assert abs(expected - bare).max() > 0.02 and abs(ours(model) - expected).max() < TOLERANCE


def test_scale(both, tmp_path):
    pipe, model = both
    trained(model, alpha=4.0)
    pipe.load_lora_weights(lora_files.save(model, tmp_path / "l.safetensors"), adapter_name="l")
    pipe.set_adapters("l", 0.6)
    full = ours(model)
    lora.scale(model, 0.6)
    assert (
        abs(ours(model) - full).max() > 0.01 and abs(theirs(pipe) - ours(model)).max() < TOLERANCE
    )


def test_gradients_are_pefts(pipeline):
    """Of A and of B, to fp64's rounding through the whole U-Net."""
    pipe, model = copy.deepcopy(pipeline[0].unet).double(), minidiff.load(pipeline[1]).unet.double()
    pipe.add_adapter(
        peft.LoraConfig(r=3, lora_alpha=6, target_modules=["attn2.to_k"], init_lora_weights=False)
    )
    pipe.double()
    lora.add(model, 3, 6.0, ["cross_attention.k"])
    halves = names.to_ours(
        {name: p for name, p in pipe.named_parameters() if p.requires_grad}, names.UNET_DIFFUSERS
    )
    halves = {
        name.replace(".lora_", ".lora.").removesuffix(".default.weight"): p
        for name, p in halves.items()
    }
    mine = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert halves.keys() == mine.keys() == lora.state(model).keys() != set()
    model.load_state_dict(halves, strict=False)
    x, t, context = (
        torch.randn(1, 4, 8, 8).double(),
        torch.tensor([40]),
        torch.randn(1, 5, 64).double(),
    )
    pipe(x, t, context).sample.square().sum().backward()
    model(x, t, context).square().sum().backward()
    for name, p in halves.items():
        torch.testing.assert_close(
            mine[name].grad, p.grad, rtol=0, atol=1e-10 * p.grad.abs().max().item()
        )
