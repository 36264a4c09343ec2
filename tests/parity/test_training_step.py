"""One optimizer step of fine-tuning beside the same step of diffusers' U-Net, scheduler and torch's AdamW."""

import pytest
import torch
import torch.nn.functional as F

import minidiff
from minidiff.checkpoints import names
from minidiff.data.latents import Example
from minidiff.denoiser import Denoiser
from minidiff.finetuning.groups import Group, GroupLoss, batches
from minidiff.finetuning.loop import to_train
from minidiff.options.finetuning import FineTuneConfig
from minidiff.train import TrainConfig, train

LEVELS = 2  # of the U-Net: what is compared here does not depend on them
diffusers = pytest.importorskip("diffusers")
CAPTIONS, LR = ["a bowl of green apples", "a red circle", "苹果"], 1e-3


def published_loss(pipe, batch, scheduler, min_snr):
    """Noise added by their scheduler, the loss as their training scripts compute it; a batch's parts are summed with their weights."""
    total = 0.0
    for part in batch:
        t = part.t - 1  # they count noise levels from 0
        noisy = scheduler.add_noise(part.latents, part.eps, t)
        ids = pipe.tokenizer(
            part.captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        said = pipe.unet(noisy, t, pipe.text_encoder(ids)[0]).sample
        v = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(part.latents, part.eps, t) if v else part.eps
        each = F.mse_loss(said.float(), target.float(), reduction="none").flatten(1).mean(1)
        if min_snr:
            snr = diffusers.training_utils.compute_snr(scheduler, t)
            each = each * snr.clamp(max=5) / (snr + 1 if v else snr)
        total = total + part.weight * each.mean()
    return total


@pytest.mark.parametrize("pipeline", ["sd1", "sd2-v"], indirect=True)
@pytest.mark.parametrize("min_snr", [False, True], ids=["plain", "min-snr"])
def test_a_step_is_theirs(pipeline, min_snr):
    """Same weights, batch, noise and t; loss and weights agree to 1e-5 after the step, which moves weights by up to the rate of 1e-3.

    eps of AdamW is 1e-4 and not 1e-8: Adam's first step is g / (|g| + eps), the sign of a gradient however small; where a true
    gradient is 0 up to rounding, that sign is rounding's too, and no two programs agree on it.
    """
    pipe, folder = pipeline
    model = minidiff.load(folder)
    latents = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    examples = [Example(z, CAPTIONS[k % 3]) for k, z in enumerate(latents)]
    groups = [Group("subject", examples[:2]), Group("class", examples[2:], 0.7)]
    batch = next(batches(groups, model.schedule, 2, 0.5, 0, 0))
    batch = [
        part._replace(t=torch.tensor(t))
        for part, t in zip(batch, ([30, 900], [1, 500]), strict=True)
    ]

    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    scheduler = diffusers.DDPMScheduler(
        **config, prediction_type=pipe.scheduler.config.prediction_type
    )
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    pipe.unet.requires_grad_(True).train()
    expected = published_loss(pipe, batch, scheduler, min_snr)
    expected.backward()
    optimizer = torch.optim.AdamW(
        pipe.unet.parameters(), lr=LR, betas=(0.9, 0.99), weight_decay=0.0, eps=1e-4
    )
    torch.nn.utils.clip_grad_norm_(pipe.unet.parameters(), 1.0)
    optimizer.step()
    after = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    optimizer.zero_grad()
    pipe.unet.load_state_dict(before)
    pipe.unet.eval()

    denoiser = (
        Denoiser(model.unet, model.schedule, model.denoiser.target, "min-snr")
        if min_snr
        else model.denoiser
    )
    trained = to_train(model, denoiser, FineTuneConfig())
    with pytest.MonkeyPatch.context() as patch:
        real = torch.optim.AdamW
        patch.setattr(torch.optim, "AdamW", lambda *args, **how: real(*args, **how, eps=1e-4))
        (step,) = train(
            GroupLoss(model, None, denoiser),
            trained,
            lambda start: iter([batch]),
            TrainConfig(1, LR, warmup=0),
        )
    assert abs(step.loss - expected.item()) < 1e-5 * expected.item()
    ours = names.to_published(model.unet.state_dict(), names.UNET_DIFFUSERS)
    assert ours.keys() == after.keys()
    furthest = max((ours[name] - value).abs().max().item() for name, value in after.items())
    walked = max((before[name] - value).abs().max().item() for name, value in after.items())
    assert furthest < 1e-5 and walked > 50 * furthest and walked > 1e-4
