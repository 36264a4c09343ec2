"""The figure of attention maps: a heat map over the image for each word of the prompt."""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from minidiff.figures import plots
from minidiff.methods.attention_maps import AttentionMaps

MOST_STEPS = 6  # rows


def plot_attention(maps: AttentionMaps, out: Path, title: str | None = None) -> list[Path]:
    """attention.png, a row for each level, and attention_steps.png, a row for each of some steps.

    Each map runs from dark, its least weight, to light, its largest. The number at a word is its
    share of all attention."""
    out, times = Path(out), maps.times
    places = torch.linspace(0, len(times) - 1, min(MOST_STEPS, len(times))).round().long()
    levels = {"all": maps.mean()}
    levels |= {f"{size[0]} x {size[1]}": maps.mean(size) for size in maps.sizes}
    steps = {f"t = {times[k]:.4g}": maps.mean(t=times[k]) for k in places.tolist()}
    shares = 100 * levels["all"].mean((1, 2))
    labels = ["image"]
    labels += [f"{word} {share:.1f} %" for word, share in zip(maps.words, shares, strict=True)]
    return [
        plots.strip(
            {
                row: torch.stack([maps.image, *(_over(maps.image, m) for m in means)])
                for row, means in rows.items()
            },
            labels,
            out / name,
            title,
        )
        for name, rows in (("attention.png", levels), ("attention_steps.png", steps))
    ]


def _over(image: Float[Tensor, "3 H W"], weights: Float[Tensor, "H W"]) -> Float[Tensor, "3 H W"]:
    """The weights as colours over the image in grey."""
    from matplotlib import colormaps

    low, high = weights.min(), weights.max()
    heat = colormaps["inferno"](((weights - low) / (high - low).clamp(min=1e-12)).numpy())
    colours = 2 * torch.from_numpy(heat)[..., :3].movedim(-1, 0).float() - 1
    return 0.35 * image.mean(0, keepdim=True) + 0.65 * colours
