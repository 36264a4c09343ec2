"""LoRA files between diffusers with PEFT and us: pictures of whole pipelines, as in test_pipeline and to its tolerance."""
import copy
import json

import pytest
import torch
from safetensors import safe_open

import minidiff
from minidiff import lora, samplers
from minidiff.weights import names

diffusers, peft = pytest.importorskip("diffusers"), pytest.importorskip("peft")
PROMPTS, TOLERANCE = ["a small blue circle above a large red square", "苹果"], 1e-4
LATENTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
pytestmark = pytest.mark.parametrize("pipeline", ["sd1", "sd2"], indirect=True)  # what is predicted makes no difference here
CONVOLUTIONS = ("conv1", "conv_shortcut", "proj_in", "downsamplers.0.conv", "conv_in")


@pytest.fixture
def both(pipeline):
    """Theirs and ours, of the same weights; without LoRA again when the test is over."""
    yield pipeline[0], minidiff.load(pipeline[1])
    pipeline[0].unload_lora_weights()


def theirs(pipe, **how):
    return pipe(PROMPTS, latents=LATENTS.clone(), num_inference_steps=3, guidance_scale=4.0, output_type="np", **how).images


def ours(model):
    *_, last = model.sample(PROMPTS, 3, guidance=4.0, step=samplers.by_name("ddim"), x_T=LATENTS)
    return (model.decode(last.x0).clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1).numpy()


def trained(model, alpha, convolutions):
    """A few steps of training in U-Net and text tower, long enough strides to show in the picture."""
    targets = (*lora.ATTENTION, "ff.up", *(("conv1", "skip", "proj_in", "resample.conv", "conv_in") if convolutions else ()))
    layers = [*lora.add(model.unet, 4, alpha, targets), *lora.add(model.text, 4, alpha)]
    optimizer = torch.optim.Adam([p for part in (model.unet, model.text) for p in part.parameters() if p.requires_grad], lr=0.02)
    for _ in range(5):
        optimizer.zero_grad()
        model.loss(torch.rand(2, 3, 64, 64) * 2 - 1, PROMPTS).mean().backward()
        optimizer.step()
    return layers


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("convolutions", [False, True], ids=["attention", "convolutions"])
def test_what_is_trained_here_draws_there(both, tmp_path, layout, convolutions):
    pipe, model = both
    bare = ours(model)
    trained(model, alpha=2.0, convolutions=convolutions)
    expected = ours(model)
    assert abs(expected - bare).max() > 0.02
    pipe.load_lora_weights(lora.save(model, tmp_path / "l.safetensors", layout))
    assert abs(theirs(pipe) - expected).max() < TOLERANCE
    lora.merge(model)
    assert abs(ours(model) - expected).max() < TOLERANCE


def with_peft(pipe, alpha, convolutions):
    """Adapters of PEFT in their U-Net and text tower, of random numbers."""
    config = {"r": 4, "lora_alpha": alpha, "init_lora_weights": False}
    pipe.unet.add_adapter(peft.LoraConfig(target_modules=["to_q", "to_k", "to_v", "to_out.0", *(CONVOLUTIONS if convolutions else ())], **config))
    pipe.text_encoder.add_adapter(peft.LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "out_proj"], **config))
    for module in (pipe.unet, pipe.text_encoder):
        for name, p in module.named_parameters():
            if ".lora_" in name:
                torch.nn.init.normal_(p, std=0.1)


@pytest.mark.parametrize("alpha", [4, 10])
@pytest.mark.parametrize("convolutions", [False, True], ids=["attention", "convolutions"])
def test_what_is_made_there_draws_here(both, tmp_path, alpha, convolutions):
    """Saved as its training scripts do, with the metadata that carries alpha."""
    from diffusers.training_utils import _collate_lora_metadata

    pipe, model = both
    bare = ours(model)
    with_peft(pipe, alpha, convolutions)
    expected = theirs(pipe)
    layers = {f"{part}_lora_layers": peft.get_peft_model_state_dict(getattr(pipe, part)) for part in ("unet", "text_encoder")}
    metadata = _collate_lora_metadata({part: getattr(pipe, part) for part in ("unet", "text_encoder")})
    pipe.save_lora_weights(tmp_path, **layers, **metadata)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["lora_adapter_metadata"])["unet.lora_alpha"] == alpha
    found = lora.load(model, file)
    assert len(found.layers) == sum(len(layers) for layers in layers.values()) // 2 and found.moved > 0.01
    assert abs(expected - bare).max() > 0.02 and abs(ours(model) - expected).max() < TOLERANCE


def test_scale(both, tmp_path):
    pipe, model = both
    trained(model, alpha=4.0, convolutions=False)
    pipe.load_lora_weights(lora.save(model, tmp_path / "l.safetensors"), adapter_name="l")
    pipe.set_adapters("l", 0.6)
    full = ours(model)
    lora.scale(model, 0.6)
    assert abs(ours(model) - full).max() > 0.01 and abs(theirs(pipe) - ours(model)).max() < TOLERANCE


def test_gradients_are_pefts(pipeline):
    """Of A and of B, to fp64's rounding through the whole U-Net."""
    pipe, model = copy.deepcopy(pipeline[0].unet).double(), minidiff.load(pipeline[1]).unet.double()
    pipe.add_adapter(peft.LoraConfig(r=3, lora_alpha=6, target_modules=["attn2.to_k"], init_lora_weights=False))
    pipe.double()
    lora.add(model, 3, 6.0, ["cross_attention.k"])
    halves = names.to_ours({name: p for name, p in pipe.named_parameters() if p.requires_grad}, names.UNET_DIFFUSERS)
    halves = {name.replace(".lora_", ".lora.").removesuffix(".default.weight"): p for name, p in halves.items()}
    mine = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert halves.keys() == mine.keys() == lora.state(model).keys() != set()
    model.load_state_dict(halves, strict=False)
    x, t, context = torch.randn(1, 4, 8, 8).double(), torch.tensor([40]), torch.randn(1, 5, 64).double()
    pipe(x, t, context).sample.square().sum().backward()
    model(x, t, context).square().sum().backward()
    for name, p in halves.items():
        torch.testing.assert_close(mine[name].grad, p.grad, rtol=0, atol=1e-10 * p.grad.abs().max().item())
