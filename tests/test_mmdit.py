"""The multimodal transformer by itself: where it starts, what it is given, and that the rest of the house takes it as a network."""

import dataclasses

import pytest
import torch

import minidiff
from minidiff import schedules
from minidiff.condition import Condition
from minidiff.conditioners import FluxText, T5TextConfig
from minidiff.denoiser import Denoiser
from minidiff.errors import UserError
from minidiff.finetuning.estimate import Settings, estimate
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.methods import lora
from minidiff.mmdit import JointBlock, MMDiT, MMDiTConfig, SingleBlock
from minidiff.text import CLIPText, TextConfig
from minidiff.vae import VAE, VAEConfig

F64 = torch.float64
SD3 = MMDiTConfig(32, 2, 4, 24, 20, 4, 4, table=8, qk_norm=True, dual=1)
FLUX = MMDiTConfig(32, 1, 2, 24, 20, 4, 4, single=2, qk_norm=True, axes=(4, 6, 6), guidance=True)
PLAIN = MMDiTConfig(32, 2, 4, 24, None, 4, 4, table=8)  # a context alone
CONFIGS = {"sd3": SD3, "flux": FLUX, "plain": PLAIN}


def random(config):
    """Of random weights, in float64."""
    network = MMDiT(config).double()
    for p in network.parameters():
        p.data = torch.randn_like(p) / p[0].numel() ** 0.5
    return network


def inputs(side=8):
    condition = Condition(
        torch.randn(2, 5, 24, dtype=F64),
        torch.randn(2, 20, dtype=F64),
        torch.tensor([[3.5], [1.0]], dtype=F64),
    )
    return torch.randn(2, 4, side, side, dtype=F64), torch.tensor([20.0, 900.0]).double(), condition


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_starts_as_the_identity_and_every_weight_learns(config):
    """adaLN-zero: at first blocks change nothing and the output is zero, so gradients reach the last
    layer alone; a few steps later they reach all, but for what is not used."""
    network, (x, t, condition) = MMDiT(config).double(), inputs()
    assert network(x, t, condition).abs().max() == 0
    tokens, emb = torch.randn(2, 12, 32, dtype=F64), torch.randn(2, 32, dtype=F64)
    for block in network.modules():
        if isinstance(block, JointBlock | SingleBlock):
            assert torch.equal(block(tokens, emb, 5, None), tokens)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for _ in range(6):
        optimizer.zero_grad()
        (network(x, t, condition) - x).pow(2).mean().backward()
        optimizer.step()
    unused = {name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()}
    last = f"joint.{config.joint - 1}.text."  # its queries meet nobody who reads the result
    assert all(n.startswith(last) and (".q." in n or "norm_q" in n) for n in unused), unused


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_recomputing_changes_no_bit(config):
    network, (x, t, condition) = random(config), inputs()
    gradients = []
    for network.checkpointing in (False, True):
        network.zero_grad()
        network(x, t, condition).pow(2).mean().backward()
        gradients.append([p.grad for p in network.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@torch.no_grad()
def test_an_ordinary_context():
    """Its sum stands for the pooled vector, where the transformer takes one."""
    x, t, condition = inputs()
    context = condition.context
    assert torch.equal(random(PLAIN)(x, t, context).isfinite().all(), torch.tensor(True))
    network = random(dataclasses.replace(PLAIN, pooled_dim=24))
    condition = Condition(context, context.sum(dim=1), torch.zeros(2, 0, dtype=F64))
    assert torch.equal(network(x, t, context), network(x, t, condition))


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_bfloat16_is_near(config):
    network, (x, t, condition) = random(config), inputs()
    exact = network(x, t, condition)
    parts = (condition.context, condition.pooled, condition.numbers)
    rounded = network.bfloat16()(x.float(), t.float(), Condition(*(p.float() for p in parts)))
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() / exact.norm() < 0.05


@pytest.mark.equation("rope-34")
@torch.no_grad()
def test_rotary_positions_know_differences_alone():
    """An image whose rows and columns all stand one further gives the same products: with no text,
    which stands at 0, the same image."""
    network, (x, t, condition) = random(FLUX), inputs()
    network.single, network.joint = network.single, torch.nn.ModuleList()
    condition = dataclasses.replace(condition, context=condition.context[:, :0])
    own, before = MMDiT.rotary, network(x, t, condition)

    def moved(length, height, width):
        whole = own(network, length, height + 1, width + 1)
        return whole.unflatten(1, (height + 1, width + 1))[:, 1:, 1:].flatten(1, 2)

    network.rotary = moved
    assert (network(x, t, condition) - before).abs().max() < 1e-12


@torch.no_grad()
def test_the_table_is_cut_at_its_middle():
    network = random(SD3)
    table = network.table.view(8, 8, 32)
    assert torch.equal(network.cropped(4, 2)[0], table[2:6, 3:5].reshape(8, 32))


def test_what_cannot_be():
    x, t, condition = inputs()
    with pytest.raises(UserError, match="needed: a context"):
        MMDiT(SD3)(x, t)
    with pytest.raises(UserError, match="sides divisible by 2"):
        MMDiT(SD3).double()(x[:, :, :7], t, condition)
    with pytest.raises(UserError, match="12x12 patches; the table of positions is 8x8"):
        MMDiT(SD3).double()(*inputs(24))
    for wrong, why in (
        (dict(heads=3), "no multiple of 4 x 3 heads"),
        (dict(table=None), "a table or rotary axes"),
        (dict(axes=(2, 2, 4)), "a table or rotary axes"),
        (dict(table=None, axes=(2, 2, 4)), "with dual a table"),
        (dict(table=None, axes=(2, 2, 2), dual=0), "do not add up to 8"),
    ):
        with pytest.raises(UserError, match=why):
            dataclasses.replace(SD3, **wrong)


def small_model(schedule=None):
    """A text-to-image model whose network is a small transformer."""
    text = CLIPText(TextConfig(24, 1, 2))
    vae = VAE(VAEConfig(3, 4, (32, 32), 1, quant=False, latent_shift=0.1), 0.5)
    flow = schedule or schedules.Flow()
    return LatentDiffusion(vae, text, Denoiser(MMDiT(PLAIN), flow, "flow"), 16, guidance=2.0)


def test_learns_draws_and_is_saved(tmp_path):
    model = small_model()
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    optimizer = torch.optim.Adam(model.unet.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        torch.manual_seed(0)
        loss = model.loss(images, ["a", "b", "c", "d"]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    back = minidiff.load(model.save(tmp_path / "m"))
    assert back.unet.config == PLAIN
    drawn = [
        list(m.sample(["a red square"], 3, generator=torch.Generator().manual_seed(1)))[-1].x0
        for m in (model.eval(), back)
    ]
    assert torch.equal(*drawn)


@torch.no_grad()
def test_lora_is_added_to_attention_alone():
    network, (x, t, condition) = random(FLUX), inputs()
    names = lora.add(network, 2)
    joint = [
        f"joint.0.{s}.attention.{l}" for s in ("text", "image") for l in ("q", "k", "v", "out")
    ]
    single = [f"single.{k}.attention.{letter}" for k in range(2) for letter in "qkv"]
    assert sorted(names) == sorted(joint + single)
    before = network(x, t, condition)
    for layer in lora.adapted(network).values():
        torch.nn.init.normal_(layer.lora.B)
    assert (network(x, t, condition) - before).abs().max() > 0.01
    lora.remove(network)
    assert (network(x, t, condition) - before).abs().max() < 1e-12


@pytest.mark.parametrize("rank", [None, 2])
def test_memory_and_time_are_estimated(rank):
    settings = Settings(batch=2, size=(16, 16), rank=rank, optimizer="adamw")
    whole = estimate(small_model(), settings)
    assert whole.flops > whole.forward > 0 and whole.step > 0
    less = estimate(small_model(), settings._replace(checkpointing=True))
    assert less.step <= whole.step and less.flops >= whole.flops


def test_the_guidance_that_flux_is_told_has_all_its_digits_in_bfloat16():
    clip = TextConfig(width=8, layers=1, heads=2, context_length=8)
    text = FluxText(T5TextConfig(clip, None, None, length=4, dim=8)).bfloat16()
    numbers = text.encode(["a"]).numbers
    assert numbers.new_tensor([3.3]).item() == pytest.approx(3.3, rel=1e-6)
