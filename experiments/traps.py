"""The traps of the family: what loads in silence from SDXL's, SD3's and ControlNets' files and draws
something wrong, each a switch as in the bug museum, and its picture beside the right one.

    python experiments/traps.py [--traps positions,time]

Two small models learn first, in nine minutes on one core, and are kept in --out. Then each trap is
drawn from the same noise without and with it. Writes NAME.png for each, traps.png with all of them,
and results.json.
"""

import time
from dataclasses import replace
from pathlib import Path

import torch
from switches import Bug, Change, gallery, names_of
from trap_models import Toys

from minidiff.cli.script import run
from minidiff.training.progress import write_results

TRAPS = {
    "last_norm": Bug(
        "The last LayerNorm left out",
        "The context is taken before the text encoder's last LayerNorm, and the model was trained "
        "with it; or the other way round.",
        "Print the length of a few context vectors, and compare with the published encoder's.",
        "tests/parity/test_networks.py::test_clip_equals_transformers",
        Toys.box,
        (Change("minidiff.text:CLIPText._vectors", "h = self.norm_out(h)", "pass"),),
    ),
    "halves": Bug(
        "Halves of the last layer exchanged",
        "The last modulation is (scale, shift) in diffusers' file, and is read as (shift, scale).",
        "Compare the network's output on one input with the published network's.",
        "tests/parity/test_published_flow.py::test_diffusers_own_conversion_gives_the_same",
        Toys.asked,
        (
            Change(
                "minidiff.checkpoints.names_flow:_ordered",
                "value.roll(width, 0)",
                "value",
            ),
        ),
    ),
    "patches": Bug(
        "Patches in another order",
        "SD3's last layer gives a patch as row, column, channel, and it is read as channel, row, "
        "column.",
        "Compare the network's output on one input with the published network's.",
        "tests/parity/test_published_flow.py::test_published_equals_ours_in_both_layouts",
        Toys.asked,
        (
            Change(
                "minidiff.checkpoints.names_flow:_ordered",
                'name.startswith("patch_out.") and not layout.flux',
                "False",
            ),
        ),
    ),
    "spacing": Bug(
        "SD3's times shifted once",
        "Sampling takes `Flow(shift=3)` in equal strides down to 0, and SD3's last time is shifted "
        "twice.",
        "Print the times of ten steps: the last before 0 must be 0.0089, not 0.25.",
        "tests/parity/test_flow_parts.py::test_sd3_times_as_published",
        Toys.asked,
        (
            Change(
                "minidiff.schedules:Flow.timesteps",
                "visited = self._shifted(_line(1, last, steps))",
                "visited = self._shifted(_line(1, 0, steps + 1))[:-1]",
            ),
        ),
    ),
    "positions": Bug(
        "Positions from the table's corner",
        "The positions of patches are cut from the table's corner, and must be cut from its middle.",
        "Compare the network's output on one input with the published network's.",
        "tests/test_mmdit.py::test_the_table_is_cut_at_its_middle",
        Toys.asked,
        (
            Change(
                "minidiff.mmdit:MMDiT.cropped",
                "top, left = (side - height) // 2, (side - width) // 2",
                "top, left = 0, 0",
            ),
        ),
    ),
    "time": Bug(
        "The network shown t, not 1000 t",
        "The network is shown t in [0, 1], and was trained on 1000 t.",
        "Print what the network is given at the first step: it must be 1000.",
        "tests/test_schedules.py::test_c_noise",
        Toys.asked,
        (Change("minidiff.schedules:Flow.c_noise", "return 1000 * t", "return t"),),
    ),
    "projection": Bug(
        "The text projection transposed",
        "open_clip multiplies the pooled vector by a bare matrix, x P, and it is loaded as a "
        "linear layer's weight, which is P transposed.",
        "Compare the pooled vector of one prompt with the published encoder's.",
        "tests/parity/test_sdxl_pipeline.py::test_a_single_file_draws_the_same",
        Toys.asked,
        (
            Change(
                "minidiff.checkpoints.parts:text",
                'state["projection.weight"] = state["projection.weight"].T',
                "pass",
            ),
        ),
    ),
    "hint": Bug(
        "A hint from -1 to 1",
        "A ControlNet is shown its hint in [-1, 1], as images are, and was trained on [0, 1].",
        "Print `hint.min()`: it must be 0.",
        "tests/methods/test_controlnet.py::test_a_hint_must_be_in_0_to_1",
        Toys.outlined,
        (
            Change("minidiff.cli.generate:controlled_by", "[None] / 255", "[None] / 127.5 - 1"),
            Change(
                "minidiff.methods.controlnet:Control.__post_init__",
                "not 0 <= low <= high <= 1",
                "False",
            ),
        ),
    ),
}
OUTPUTS = ("traps.png", *(f"{name}.png" for name in TRAPS))  # beside results.json


def table_of(toys: Toys) -> dict[str, Bug]:
    """The traps, drawn by these models."""
    return {name: replace(bug, picture=bug.picture.__get__(toys)) for name, bug in TRAPS.items()}


def main(
    traps: str = ",".join(TRAPS),
    out: Path = Path("out/traps"),
    controlnet: Path | None = None,
    share: float = 1.0,
    seed: int = 0,
) -> None:
    """Draw each trap beside what is right; models that `out` does not hold learn first.

    Args:
        traps: names with commas.
        out: folder for everything written; a training that was stopped goes on.
        controlnet: a file of experiments/controlnet.py, in place of one that learns here.
        share: of the images and the steps of training, to try it out.
        seed: everything random in training follows from it.
    """
    torch.set_num_threads(1)
    started, names = time.process_time(), names_of(traps, TRAPS)
    toys = Toys(out, share, seed, controlnet)
    print(f"about {toys.minutes() + 0.1 * len(names):.1f} minutes of one core")
    differences = gallery(names, table_of(toys), out / "traps.png")
    minutes = round((time.process_time() - started) / 60, 2)
    print(write_results(out, mean_difference=differences, processor_minutes=minutes, seed=seed))


if __name__ == "__main__":
    run(main, OUTPUTS)
