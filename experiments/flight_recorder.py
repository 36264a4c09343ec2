"""Three fine-tunes of the model in the box, and what the flight recorder says of each: one that goes well, one too fast, one that learns by heart.

    python experiments/flight_recorder.py

The box has never seen a heart. Each flight shows it pictures of single hearts and trains the whole U-Net; what differs is one row of FLIGHTS.
Writes a folder with report.html for each flight, flights.png and results.json. Look at the advice: it must tell the three apart.
"""

import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

import minidiff
from minidiff.cli.script import run
from minidiff.data.folder import to_model
from minidiff.data.world import World
from minidiff.errors import UserError
from minidiff.figures import plots
from minidiff.finetuning.recorder.recorder import Recorder
from minidiff.options.finetuning import RecorderConfig
from minidiff.train import NonFiniteError, TrainConfig, train
from minidiff.training.progress import write_results
from minidiff.training.seeds import generator_of

KNOWN = ("red", "yellow", "green", "blue")  # the colours of the box
KEPT = {
    "class": "a large blue square on white",
    "unrelated": "a large red circle above a small blue square",
}
BATCH, HIDDEN, HELD_OUT = 8, 0.1, 8


class Flight(NamedTuple):
    pictures: int
    lr: float
    steps: int


FLIGHTS = {
    "sensible": Flight(40, 3e-4, 300),
    "too fast": Flight(40, 1e-2, 300),
    "by heart": Flight(3, 1e-3, 300),
}
Batch = tuple[Float[Tensor, "B Z h w"], Float[Tensor, "B L D"]]

OUTPUTS = ("flights.png",)  # beside results.json


def main(
    flights: tuple[str, ...] = tuple(FLIGHTS),
    every: int = 50,
    steps: int | None = None,
    sampling_steps: int = 25,
    seed: int = 0,
    out: Path = Path("out/flight_recorder"),
) -> None:
    """Fly, and compare what the recorder advises.

    Args:
        flights: which: sensible, too fast, by heart.
        every: steps between two measures.
        steps: of training, for all; left out, each flight's own.
        sampling_steps: of the pictures that are measured.
        seed: of the pictures, the noise and the order.
        out: folder for everything written.
    """
    if unknown := set(flights) - set(FLIGHTS):
        raise UserError(f'no flight "{min(unknown)}"; there is {", ".join(FLIGHTS)}.')
    rows, results = {}, {}
    for name in flights:
        flight = FLIGHTS[name] if steps is None else FLIGHTS[name]._replace(steps=steps)
        start = time.perf_counter()
        recorder = fly(flight, every, sampling_steps, seed, out / name.replace(" ", "_"))
        last = recorder.records[-1]
        drawn = [to_model(recorder.pictures(step)["caption"][:2]) for step in (0, last.step)]
        rows[name] = torch.cat(
            [*drawn, recorder.training[[which for _, which in last.nearest["caption"][:2]]]]
        )
        results[name] = {
            **flight._asdict(),
            "advice": recorder.advice(),
            "seconds": round(time.perf_counter() - start, 1),
        }
        results[name]["seconds_to_measure"] = round(
            sum(r.seconds for r in recorder.records) / len(recorder.records), 2
        )
        print(f"{name}: {recorder.advice()}\n  {recorder.report()}")
    plots.strip(
        rows, ["before"] * 2 + ["after"] * 2 + ["nearest training picture"] * 2, out / "flights.png"
    )
    print(f"wrote {write_results(out, **results, seed=seed, every=every)}")


def fly(flight: Flight, every: int, sampling_steps: int, seed: int, folder: Path) -> Recorder:
    """One fine-tune with a recorder on board."""
    model = minidiff.load("box")
    world = World(model.size, shapes=("heart",), colours=KNOWN)
    pictures, captions, _ = world.batch(flight.pictures, seed=f"{seed} hearts", objects=1)
    others, descriptions, _ = world.batch(
        HELD_OUT, seed=f"{seed} other hearts", objects=1, split="held-out"
    )
    with torch.no_grad():
        latents, contexts, null = (
            model.vae.encode(pictures),
            model.text.encode(captions),
            model.text.null(1)[0],
        )
        validation = list(
            zip(model.vae.encode(others), model.text.encode(descriptions), strict=True)
        )

    def batches(start: int) -> Iterator[Batch]:
        for k in count(start):
            generator = generator_of(seed, k)
            chosen = torch.randint(len(latents), (BATCH,), generator=generator)
            hidden = torch.rand(BATCH, generator=generator) < HIDDEN
            yield latents[chosen], torch.where(hidden[:, None, None], null, contexts[chosen])

    examples = list(zip(latents, contexts, strict=True))
    prompts = {
        "caption": captions[0],
        "new caption": "a large blue heart on a pink background",
        **KEPT,
    }
    config = RecorderConfig(
        every=every, steps=sampling_steps, seed=seed, network="critic-attributes"
    )
    recorder = Recorder(
        model, folder, prompts, pictures, validation, examples, config, flight._asdict()
    )
    recorder.measure(0, {})
    losses: list[float] = []
    config = TrainConfig(flight.steps, flight.lr, warmup=10, seed=seed)
    training = train(
        lambda batch: {"loss": model.denoiser.loss(*batch)}, model.denoiser, batches, config
    )
    try:
        for step in training:
            losses.append(step.loss)
            if recorder.due(step.step):
                recorder.measure(step.step, {"loss": sum(losses) / len(losses)}, step.lr)
                losses.clear()
    except NonFiniteError:  # the loop has said so and stopped; the recorder is to know it too
        recorder.measure(recorder.records[-1].step + 1, {"loss": float("nan")})
    return recorder


if __name__ == "__main__":
    run(main, OUTPUTS)
