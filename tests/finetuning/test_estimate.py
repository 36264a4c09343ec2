"""Memory and time before the first step: the ledger by hand, the step against what autograd really keeps, advice, warnings; optimizers by name."""

import sys
import types
from functools import cache

import pytest
import torch
from torch import nn

from minidiff import schedules
from minidiff.denoiser import Denoiser
from minidiff.errors import UserError
from minidiff.finetuning import estimate as module
from minidiff.finetuning.estimate import Ledger, Settings, advice, duration, forecast, human
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.methods import lora
from minidiff.text import CLIPText, TextConfig
from minidiff.train import TrainConfig, train
from minidiff.training import optimizers
from minidiff.unet import UNet, UNetConfig
from minidiff.vae import VAE, VAEConfig

HOW = Settings(batch=4, size=(32, 32))
estimate = cache(module.estimate)  # each takes a second or two


@pytest.fixture(autouse=True)
def once(monkeypatch):
    monkeypatch.setattr(module, "estimate", estimate)


@pytest.fixture(scope="module")
def model():
    unet = UNet(UNetConfig(4, 4, (32, 64), 1, (0, 1), (2, 2), 16, middle=False))
    return LatentDiffusion(
        VAE(VAEConfig(3, 4, (8, 16), 1, groups=0)),
        CLIPText(TextConfig(16, 2, 2, vocabulary=49408)),
        Denoiser(unet, schedules.linear()),
        32,
    )


@pytest.fixture(scope="module")
def plain(model):
    return estimate(model, HOW)


def test_the_ledger_by_hand():
    """Real tensors this time. Views are of their storage, what dies is taken off, and a product of 8x16 and 16x4 has 2 * 8 * 16 * 4 FLOPs."""
    with Ledger() as ledger:
        a, b = torch.zeros(8, 16), torch.zeros(16, 4)
        assert ledger.now == 4 * (8 * 16 + 16 * 4)
        views = a[1:], a.T
        c = a @ b
        assert (
            ledger.now == 4 * (8 * 16 + 16 * 4 + 8 * 4) == ledger.peak
            and ledger.flops == 2 * 8 * 16 * 4
        )
        del a, views
        assert ledger.now == 4 * (16 * 4 + 8 * 4)
        (c + 1).sum()
    assert ledger.now == 4 * (16 * 4 + 8 * 4) and ledger.peak == 4 * (8 * 16 + 16 * 4 + 8 * 4)


def test_counts(model, plain):
    """Weights and moments are counts; nothing of the model is touched."""
    weights, trained = (sum(p.numel() for p in part.parameters()) for part in (model, model.unet))
    latent_scale = 4
    assert plain.weights == 4 * weights + latent_scale and plain.trained == trained
    assert plain.moments == 8 * trained and plain.average == 0
    assert estimate(model, HOW._replace(ema=True)).average == 4 * trained
    assert plain.total == plain.weights + plain.step + plain.moments
    assert (
        not lora.adapted(model)
        and not model.unet.checkpointing
        and next(model.unet.parameters()).untyped_storage().nbytes()
    )
    assert (
        type(model.schedule.alpha_bar) is torch.Tensor
    )  # what a schedule keeps of its first use must not be a fake


def real_peak(model, how):
    """The same step on tensors that are really there, counted by the same ledger from the weights on."""
    latents, context = torch.randn(how.batch, 4, 16, 16), torch.randn(how.batch, 77, 16)
    model.unet.checkpointing = how.checkpointing
    with Ledger() as ledger:
        for p in model.parameters():
            ledger.note(p.untyped_storage())
        start = ledger.now
        for _ in range(how.accumulate):
            with torch.autocast("cpu", torch.bfloat16, enabled=how.bf16):
                loss = model.denoiser.loss(
                    latents.clone(), context.clone(), torch.ones(how.batch, dtype=torch.long)
                )
            loss.mean().backward()
            del loss
    model.unet.checkpointing = False
    model.unet.zero_grad()
    return ledger.peak - start, ledger.flops


@pytest.mark.parametrize(
    "how",
    [
        HOW,
        HOW._replace(checkpointing=True),
        HOW._replace(batch=1, accumulate=4),
        HOW._replace(bf16=True),
    ],
)
def test_the_step_is_that_of_real_tensors(model, how):
    """FLOPs to the last one; the peak to 5 %: kernels of some operations are taken apart on fake tensors and not on real ones."""
    said, (peak, flops) = estimate(model, how), real_peak(model, how)
    assert said.flops == flops and said.step == pytest.approx(peak, rel=0.05)


def test_every_switch_saves_what_it_should(model, plain):
    by_lora = estimate(model, HOW._replace(rank=8))
    unet = UNet(model.unet.config)
    lora.add(unet, rank=8)
    numbers = sum(value.numel() for value in lora.state(unet).values())
    assert (
        by_lora.trained == numbers
        and by_lora.moments == 8 * numbers
        and by_lora.weights == plain.weights + 4 * numbers
    )
    assert by_lora.step < plain.step
    assert estimate(model, HOW._replace(checkpointing=True)).step < 0.75 * plain.step
    assert estimate(model, HOW._replace(checkpointing=True)).flops > 1.2 * plain.flops
    assert estimate(model, HOW._replace(bf16=True)).step < plain.step
    assert estimate(model, HOW._replace(batch=1, accumulate=4)).step < 0.6 * plain.step
    assert estimate(model, HOW._replace(batch=1, accumulate=4)).flops == pytest.approx(
        plain.flops, rel=1e-3
    )
    eight = estimate(model, HOW._replace(optimizer="adamw8bit"))
    assert (
        0.25 * plain.moments < eight.moments < 0.4 * plain.moments
        and eight.step == pytest.approx(plain.step, rel=1e-2)
    )
    muon = estimate(model, HOW._replace(optimizer="muon"))  # a number for each weight of a matrix
    assert 0.5 * plain.moments < muon.moments < 0.55 * plain.moments
    more = estimate(model, HOW._replace(text=True, cached=False))
    assert (
        more.trained == plain.trained + sum(p.numel() for p in model.text.parameters())
        and more.flops > plain.flops
    )


def test_half_precision_weights_are_counted_as_such(model):
    half = LatentDiffusion(
        model.vae,
        model.text,
        Denoiser(UNet(model.unet.config).bfloat16(), schedules.linear()),
        32,
    )
    full, low = estimate(model, HOW._replace(rank=8)), estimate(half, HOW._replace(rank=8))
    assert (
        full.weights - low.weights == 2 * sum(p.numel() for p in model.unet.parameters())
        and low.step < full.step
    )


def test_advice(model, plain):
    """The switch named is the one that saves most, by the estimates themselves; where none helps, none is named."""
    ways = module.alternatives(HOW)
    saved = {name: plain.total - estimate(model, way).total for name, way in ways.items()}
    best = max(saved, key=saved.get)
    assert (
        advice(model, HOW, plain.total)
        == f"{best} would save {human(saved[best])} of {human(plain.total)}"
    )
    second = max(saved.keys() - {best}, key=saved.get)
    assert advice(model, HOW, plain.total, without=[best]).startswith(second)
    least = Settings(1, (32, 32), rank=8, checkpointing=True, bf16=True, optimizer="adamw8bit")
    assert module.alternatives(least) == {}
    assert advice(model, least, 10**6) == "no option would save more than a twentieth of it"


def test_forecast(model, plain, monkeypatch, recwarn):
    monkeypatch.setattr(module, "forward_seconds", lambda *_: 2 * plain.forward / plain.flops)
    text = forecast(model, HOW, 60)
    weights = f"memory: about {human(plain.total)} (weights {human(plain.weights)} + gradients and "
    assert text.startswith(weights) and not recwarn
    assert "\ntime: about 2.0 s a step, 2.0 min in all, from a pass of the U-Net" in text
    available = plain.total + 1
    monkeypatch.setattr(module, "room", lambda _: available - plain.weights)
    text = forecast(model, HOW, 60)
    assert " would save " in text and "adamw8bit" not in text and not recwarn
    monkeypatch.setattr(module, "room", lambda _: plain.total - 1 - plain.weights)
    with pytest.warns(
        UserWarning, match=r"^this needs about .* MB, and the device has .* MB; `.* would save"
    ) as warned:
        forecast(model, HOW, 60)
    assert len(warned) == 1


def test_the_forecast_counts_the_recorder(model, plain, monkeypatch):
    """60 passes of a batch of 4 images are 240 evaluations."""
    monkeypatch.setattr(module, "forward_seconds", lambda *_: 1.0)
    steps = 60 * plain.flops / plain.forward
    text = forecast(model, HOW, 60, evaluations=240)
    assert f"{duration(steps + 60)} in all, 60 s of it for the flight recorder" in text


def test_nothing_is_counted_that_is_not_asked_for(model, plain, monkeypatch):
    """On a machine with room for twice the need, one estimate rather than one for every option."""
    asked = []
    monkeypatch.setattr(
        module, "estimate", lambda model, how: asked.append(how) or estimate(model, how)
    )
    forecast(model, HOW, 60)
    assert asked == [HOW]


def test_the_forward_pass_is_timed_and_counted(model, plain):
    """FLOPs of a pass to the last one; time: of this machine, somewhere between a watch and the fastest of today's."""
    with torch.no_grad(), Ledger() as ledger:
        latents, context = torch.randn(4, 4, 16, 16), torch.randn(4, 77, 16)
        model.denoiser.output(latents, torch.ones(4, dtype=torch.long), context)
    assert plain.forward == ledger.flops and 2 * plain.forward < plain.flops < 4 * plain.forward
    for how in (HOW, HOW._replace(bf16=True, size=(16, 32))):
        assert 1e-16 < module.forward_seconds(model, how) / plain.forward < 1e-8
    half = LatentDiffusion(
        model.vae, model.text, Denoiser(UNet(model.unet.config).bfloat16(), schedules.linear()), 32
    )
    assert module.forward_seconds(half, HOW) and module.room(torch.device("cpu")) > 1e8


def test_human():
    assert [human(n) for n in (14_900_000_000, 94_700_000, 3_180_000)] == [
        "14.9 GB",
        "95 MB",
        "3.2 MB",
    ]
    assert [duration(s) for s in (0.0042, 0.238, 1.25, 42, 720, 12600)] == [
        "4.2 ms",
        "238 ms",
        "1.2 s",
        "42 s",
        "12 min",
        "3.5 h",
    ]


# Optimizers by name.


def toy(**how):
    network = nn.Linear(2, 2)
    return list(
        train(
            lambda x: {"loss": network(x).pow(2).mean(1)},
            network,
            lambda _: iter([torch.ones(3, 2)]),
            TrainConfig(1, 1e-3, **how),
        )
    )


def test_an_unknown_optimizer():
    with pytest.raises(UserError, match='no optimizer "sgd"; there is adamw, adamw8bit'):
        toy(optimizer="sgd")


def test_eight_bits_need_a_gpu_and_bitsandbytes(monkeypatch):
    with pytest.raises(UserError, match="adamw8bit computes on a GPU, and this is cpu"):
        toy(optimizer="adamw8bit")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match="adamw8bit needs bitsandbytes, which is not installed"):
        optimizers.named(
            "adamw8bit",
            [{"params": [nn.Parameter(torch.ones(1))]}],
            1e-3,
            (0.9, 0.99),
            torch.device("cuda"),
        )


def test_eight_bits_are_those_of_bitsandbytes(monkeypatch):
    """What it is asked for; the library itself is not here."""
    asked = {}
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    library = types.SimpleNamespace(
        AdamW8bit=lambda groups, **how: asked.update(how) or torch.optim.SGD(groups)
    )
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", library)
    groups = [{"params": [nn.Parameter(torch.ones(1))], "weight_decay": 0.1}]
    made = optimizers.named("adamw8bit", groups, 1e-3, (0.9, 0.99), torch.device("cuda"))
    assert (
        asked == {"lr": 1e-3, "betas": (0.9, 0.99)} and made.param_groups[0]["weight_decay"] == 0.1
    )


def test_a_model_on_a_gpu_is_estimated_without_one(model, monkeypatch):
    """Tensors without memory need no GPU; only the backward pass asks for one. The schedule's
    tables are real ones, on the CPU."""
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_: None)
    expected = estimate(model, HOW)
    monkeypatch.setattr(model.denoiser, "schedule", schedules.cosine())  # its tables are not there
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    found = estimate.__wrapped__(model, HOW)
    assert (found.weights, found.moments) == (expected.weights, expected.moments)
