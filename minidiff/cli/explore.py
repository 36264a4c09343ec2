"""The verb that writes a page to look inside a run."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from minidiff.cli import options
from minidiff.cli.generate import check_sides, warn_of_words
from minidiff.cli.options import EXAMPLE, MODEL, SAMPLE, Device, Numbers, Parts
from minidiff.cli.step import Prompt
from minidiff.errors import UserError
from minidiff.options.sampling import SampleConfig, SamplerName, Size

if TYPE_CHECKING:
    from minidiff.figures.explored import Other
    from minidiff.latent_diffusion import LatentDiffusion

Text = Annotated[str | None, tyro.conf.arg(metavar="PROMPT")]
Lora = Annotated[str | None, tyro.conf.arg(metavar="FILE[:SCALE]")]


@dataclass(frozen=True)
class Against:
    """A second run beside the first, which differs in one thing."""

    # another prompt
    against: Text = None
    # another seed
    against_seed: int | None = None
    # another sampler
    against_sampler: SamplerName | None = None
    # another guidance
    against_guidance: float | None = None
    # the same model with a LoRA
    against_lora: Lora = None

    def __post_init__(self) -> None:
        given = [name for name, value in vars(self).items() if value is not None]
        if len(given) > 1:
            flags = " and ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UserError(f"{flags}: two runs differ in one thing; take one of them.")
        if self.against_lora is not None:
            Parts(lora=(self.against_lora,))  # its check

    def other(self, prompt: str, config: SampleConfig, model: "LatentDiffusion") -> "Other | None":
        """The second run, of the first one's prompt and config."""
        from minidiff.figures.explored import Other

        own = options.completed(config, model)
        for name in ("seed", "sampler", "guidance"):
            value = getattr(self, f"against_{name}")
            if value is not None and value == getattr(own, name):
                raise UserError(f"against_{name} is {value}, as in the first run; take another.")
            if value is not None:
                changed = options.completed(replace(config, **{name: value}), model)
                return Other(
                    *(f"{name} {getattr(c, name)}" for c in (own, changed)), prompt, changed
                )
        if self.against is not None:
            return Other(prompt, self.against, self.against, own)
        if self.against_lora is not None:
            ((file, scale),) = Parts(lora=(self.against_lora,)).loras()
            labels = f"without {file.name}", f"with {file.name} x {scale:g}"
            return Other(*labels, prompt, own, file, scale)
        return None


ALONE = Against()


def explore(
    prompt: Prompt = EXAMPLE,
    model: Path = MODEL,
    config: SampleConfig = SAMPLE,
    against: Against = ALONE,
    scales: Numbers = "0,1,2,3,5,8",
    device: Device = "auto",
    out: Path = Path("out/explore.html"),
) -> None:
    """One HTML file to look inside a run: steps, U-Net, words, guidance, and a second run.

    Example: minidiff explore "a small blue circle" --seed 7 --against-seed 8

    Open it in a browser, here or on a phone; it needs no network.

    Args:
        prompt: what to show, in quotes.
        model: box, the small model that ships with minidiff; or our folder, a diffusers folder, one
            .safetensors or .ckpt file of Stable Diffusion.
        scales: guidance of further runs, for the guidance slider.
        device: where to compute; auto takes a GPU if there is one.
        out: the file to write; or a folder, for explore.html in it.
    """
    out = out if out.suffix.lower() == ".html" else out / "explore.html"
    options.check_out(out.parent, out.name)
    guidances = options.numbers("scales", scales)
    if model == MODEL:
        warn_of_words((prompt,) if against.against is None else (prompt, against.against))
    device = options.pick_device(device)
    from minidiff import load
    from minidiff.figures import explored, explorer
    from minidiff.training.progress import duration, human

    loaded = load(model, device)
    other = against.other(prompt, config, loaded)
    config = options.completed(config, loaded)
    check_sides(config.size or Size(loaded.size, loaded.size), loaded)
    request = explored.Request(loaded, prompt, config, guidances, other)
    rows, seconds = explored.first_step(request)
    runs = "1 run" if request.runs == 1 else f"{request.runs} runs"
    print(f"{runs} of {config.steps} steps: about {duration(seconds)}", flush=True)
    path = explorer.write(explored.collect(request, rows, progress=True), out)
    print(f"{path} ({human(path.stat().st_size)}); open it in a browser")
