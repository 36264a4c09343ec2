"""CLIP's text towers from elsewhere: by an open_clip name and tag, or from a folder of transformers."""

from pathlib import Path

from minidiff.checkpoints import files, layouts, names
from minidiff.errors import UserError

SEPARATOR = ":"  # as in ViT-H-14:laion2b_s32b_b79k, or ViT-L-14:openai


def text_part(source: str | Path) -> layouts.Part:
    """The text tower that a source means, before it is built: MODEL:TAG of open_clip (TAG can be a file), a folder of transformers'
    CLIPTextModel or CLIPModel, a file of a tower, or a whole checkpoint."""
    name, separator, tag = str(source).partition(SEPARATOR)
    if separator and not Path(source).exists():
        return _by_name(name, tag)
    path = Path(source)
    if path.is_dir() and not (path / "model_index.json").is_file():
        return layouts.transformers_tower(path, path, files.tensors)
    found = layouts.read(path, files.tensors)
    if "text" not in found.parts:
        raise UserError(f"{path} has no text tower.")
    return found.parts["text"]


def _by_name(name: str, tag: str) -> layouts.Part:
    """Fetched by open_clip, into its cache. OpenAI's weights, and models whose configuration says so, need QuickGELU."""
    import open_clip

    if name not in open_clip.list_models():
        raise UserError(
            f'open_clip knows no model "{name}"; SD 1.x reads ViT-L-14{SEPARATOR}openai, SD 2.x ViT-H-14{SEPARATOR}laion2b_s32b_b79k.'
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag not in tags and not Path(tag).is_file():
        raise UserError(
            f'open_clip has no weights "{tag}" of {name}; there is {", ".join(tags) or "none"}, or a file.'
        )
    try:
        model = open_clip.create_model(name, pretrained=tag)
    except (
        Exception
    ) as error:  # no network, or a damaged download, in whatever words the transport has for it
        why = " ".join(str(error).split())[:200]
        raise UserError(
            f"{name}{SEPARATOR}{tag} cannot be had: {type(error).__name__}: {why}."
        ) from error
    quick = tag == "openai" or bool((open_clip.get_model_config(name) or {}).get("quick_gelu"))
    state = {
        key: value for key, value in model.state_dict().items() if not key.startswith("visual.")
    }
    part = layouts.text(
        state, f"{name}{SEPARATOR}{tag}", names.CLIP_OPEN, penultimate=name == "ViT-H-14"
    )
    return part._replace(numbers=part.numbers | {"activation": "quick_gelu" if quick else "gelu"})
