"""Names on the Hugging Face Hub wherever a path is taken: what is needed is fetched once, into its cache; what is cached needs no network."""

import re
from pathlib import Path

from minidiff.errors import UserError

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
PARTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
SETTINGS = [
    "model_index.json",
    "*/config.json",
    "*/scheduler_config.json",
    "*/tokenizer_config.json",
]


def resolve(path: str | Path) -> Path:
    """The path itself, or where the cache keeps a name such as stable-diffusion-v1-5/stable-diffusion-v1-5. "box" is the model that ships
    with minidiff; a folder of that name is meant by its whole path."""
    if str(path) == "box":
        return Path(__file__).parents[1] / "box"
    path = Path(path)
    if (
        path.exists()
        or not REPOSITORY.fullmatch(path.as_posix())
        or path.suffix in (".safetensors", ".ckpt", ".bin", ".pt", ".pth")
    ):
        return path
    if path.parent.is_dir():  # a folder that is here: a slip of the pen, not a name elsewhere
        return path
    return fetched(path.as_posix())


def fetched(name: str) -> Path:
    """The folder of a repository in the cache; fetched if it is not whole there."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        listed = [item.rfilename for item in HfApi().model_info(name).siblings or []]
        return Path(snapshot_download(name, allow_patterns=SETTINGS + needed(listed)))
    except RepositoryNotFoundError:
        raise UserError(
            f'"{name}" is neither a path here nor a repository on the Hugging Face Hub (a private one needs `hf auth login`).'
        ) from None
    except Exception as error:  # no network, in whatever words the library's transport, which changes with its versions, has for it
        return _cached(name, error)


def needed(listed: list[str]) -> list[str]:
    """Of a repository's files, one spelling of each part's weights: safetensors before pickles, full precision before half."""
    chosen = []
    for part, stem in PARTS.items():
        for variant in ("", r"\.fp16"):
            for base, suffix in (
                (stem, "safetensors"),
                (stem if part != "text_encoder" else "pytorch_model", "bin"),
            ):
                pattern = rf"{part}/{base}({variant}(-\d+-of-\d+)?|(-\d+-of-\d+)?{variant})\.{suffix}(\.index{variant}\.json)?"
                if found := [file for file in listed if re.fullmatch(pattern, file)]:
                    chosen += found
                    break
            else:
                continue
            break
    return chosen


def _cached(name: str, error: Exception) -> Path:
    from huggingface_hub import scan_cache_dir, snapshot_download
    from huggingface_hub.errors import CacheNotFound, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        try:
            there = sorted(
                repo.repo_id for repo in scan_cache_dir().repos if repo.repo_type == "model"
            )
        except CacheNotFound:
            there = []
        cached = f"the cache has {', '.join(there)}" if there else "the cache is empty"
        why = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(
            f'"{name}" is no path here, and the Hub cannot be reached ({why}); {cached}.'
        ) from None
    parts = [
        part
        for part in PARTS
        if not any((folder / part).glob("*.safetensors")) and not any((folder / part).glob("*.bin"))
    ]
    if parts or not (folder / "model_index.json").is_file():
        absent = ", ".join(parts) or "model_index.json"
        raise UserError(
            f'"{name}" is only partly cached ({absent} missing), and the Hub cannot be reached; connect once to fetch the rest.'
        )
    return folder
