"""Names on the Hugging Face Hub wherever a path is taken: what is needed is fetched once, into its
cache; what is cached needs no network."""

import difflib
import os
import re
from pathlib import Path

from minidiff.checkpoints.files import SUFFIXES, read_json
from minidiff.checkpoints.layouts import weight_files
from minidiff.errors import UserError

SHIPPED = ("box", "photos")
HOST = "https://huggingface.co/"
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
PARTS = dict(unet="diffusion_pytorch_model", vae="diffusion_pytorch_model", text_encoder="model")
PARTS |= dict(text_encoder_2="model")  # of SDXL
FLOW_PARTS = PARTS | dict(text_encoder_3="model", transformer="diffusion_pytorch_model")
SETTINGS = "config scheduler_config tokenizer_config special_tokens_map added_tokens tokenizer"
SETTINGS = ["model_index.json", *(f"*/{name}.json" for name in SETTINGS.split())]


def resolve(path: str | Path) -> Path:
    """The path itself, or the folder of a repository such as
    stable-diffusion-v1-5/stable-diffusion-v1-5 in the cache. "box" and "photos" are the models that
    ship with minidiff; a folder of that name is meant by its whole path. What looks like a mistyped
    path is not asked for there; a whole address, https://huggingface.co/owner/name, always is."""
    if str(path) in SHIPPED:
        return Path(__file__).parents[1] / path
    name = re.sub("^https:/+huggingface.co/", HOST, str(path))  # Path takes one of the two slashes
    if name.startswith(HOST) and REPOSITORY.fullmatch(name := name.removeprefix(HOST)):
        return fetched(name)
    path = Path(path)
    if path.exists() or path.suffix in SUFFIXES or not REPOSITORY.fullmatch(name):
        return path
    if path.parent.is_dir():  # a folder that is here: the rest is mistyped, not a name elsewhere
        return path
    folders = [place.name for place in Path().iterdir() if place.is_dir()]
    if near := difflib.get_close_matches(path.parent.name, folders, 1, cutoff=0.75):
        address = f"for a repository of the Hugging Face Hub write {HOST}{name}"
        raise UserError(f'no "{name}" here; perhaps you meant {near[0]}/{path.name}; {address}.')
    return fetched(name)


def go_offline() -> None:
    """Ask the Hub for nothing in this process, as with HF_HUB_OFFLINE=1."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True  # it may have been imported before


def is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def fetched(name: str) -> Path:
    """The folder of a repository in the cache; fetched if it is not whole there."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    if is_offline():
        return _cached(name, UserError("offline, as asked for"))
    try:
        listed = [item.rfilename for item in HfApi().model_info(name).siblings or []]
        return Path(snapshot_download(name, allow_patterns=SETTINGS + needed(listed)))
    except RepositoryNotFoundError:
        what = "neither a path here nor a repository on the Hugging Face Hub"
        raise UserError(f'"{name}" is {what} (a private one needs `hf auth login`).') from None
    except Exception as error:  # no network: each version's transport raises its own kind
        return _cached(name, error)


def needed(listed: list[str]) -> list[str]:
    """Of a repository's files, one spelling of each part's weights."""
    chosen = []
    is_flow = any(file.startswith("transformer/") for file in listed)  # SD 3 and FLUX.1
    for part, stem in (FLOW_PARTS if is_flow else PARTS).items():
        names = [file.removeprefix(f"{part}/") for file in listed if file.startswith(f"{part}/")]
        chosen += [f"{part}/{name}" for name in weight_files(stem, names)]
    return chosen


def _cached(name: str, error: Exception) -> Path:
    """The repository's folder in the cache, where the Hub cannot be reached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        why = " ".join(str(error).split())[:120] or type(error).__name__
        why = f"the Hub cannot be reached ({why})"
        raise UserError(f'"{name}" is no path here, and {why}; {_cache_content()}.') from None
    weights, index = ("*.safetensors", "*.bin"), folder / "model_index.json"
    listed = read_json(index) if index.is_file() else {part: (part,) for part in tuple(PARTS)[:3]}
    parts = [part for part in FLOW_PARTS if any(listed.get(part) or ())]
    absent = [
        part for part in parts if not any(any((folder / part).glob(kind)) for kind in weights)
    ]
    if not absent and not index.is_file():
        absent = ["model_index.json"]
    if absent:
        what = f"only partly cached ({', '.join(absent)} missing)"
        why = "the Hub cannot be reached; connect once to fetch the rest"
        raise UserError(f'"{name}" is {what}, and {why}.')
    return folder


def _cache_content() -> str:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        repositories = []
    models = sorted(repo.repo_id for repo in repositories if repo.repo_type == "model")
    return f"the cache has {', '.join(models)}" if models else "the cache is empty"
