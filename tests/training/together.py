"""What the processes of tests/training/test_distributed.py run under torchrun: a small training, whose weights and log are written.

torchrun --nproc-per-node 2 -m tests.training.together OUT '{"steps": 20, ...}'
"""

import json
import os
import sys
from itertools import count
from pathlib import Path

import torch

from minidiff.denoiser import Denoiser
from minidiff.schedules import cosine
from minidiff.train import EMA, TrainConfig, train
from minidiff.training import distributed, ranks
from minidiff.training.seeds import generator_of
from minidiff.unet import UNet, UNetConfig

SCHEDULE = cosine()


def network():
    torch.manual_seed(1)
    unet = UNet(
        UNetConfig(
            3, 3, channels=(8, 16), blocks=1, depth=(0, 1), heads=(1, 2), context_dim=8, groups=4
        )
    )
    for parameter in unet.parameters():  # the last layers of a new one are zero
        parameter.data += 0.02 * torch.randn_like(parameter)
    return Denoiser(unet, SCHEDULE, "v")


def batches(batch, start):
    """All that is random is in the batch, (x0, t, eps, context)."""
    for k in count(start):
        generator = generator_of(5, k)
        x0, eps = torch.randn(2, batch, 3, 8, 8, generator=generator)
        context = torch.randn(batch, 2, 8, generator=generator)
        yield x0, SCHEDULE.sample_t(batch, generator), eps, context


def run(
    out,
    steps=20,
    batch=8,
    accumulate=1,
    shard=False,
    folder=False,
    resume=False,
    save_every=4,
    kill=None,
    ema=None,
):
    """kill: [rank, step, signal]: what happens to one process, the first time."""
    torch.set_num_threads(1)
    denoiser = network()
    average = EMA(denoiser, ema) if ema else None
    calls = count(1)

    def loss_fn(parts):
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if (
            kill
            and first
            and ranks.rank() == kill[0]
            and next(calls) == kill[1] * max(1, accumulate // ranks.size())
        ):
            os.kill(os.getpid(), kill[2])
        x0, t, eps, context = parts
        return {"loss": denoiser.loss(x0, context, t, eps), "progress": SCHEDULE.progress(t)}

    config = TrainConfig(
        steps, 1e-3, warmup=2, accumulate=accumulate, shard=shard, save_every=save_every, clip=0.05
    )
    place = out / "training" if folder and ranks.is_main() else None
    done = [
        step._asdict()
        for step in train(
            loss_fn, denoiser, lambda k: batches(batch, k), config, average, place, resume
        )
    ]
    state = distributed.whole(
        {"module": denoiser.state_dict(), "ema": average and average.average.state_dict()}
    )
    torch.save(state, out / f"weights-{ranks.rank()}.pt")
    (out / f"steps-{ranks.rank()}.json").write_text(json.dumps(done))


if __name__ == "__main__":
    run(Path(sys.argv[1]), **json.loads(sys.argv[2]))
