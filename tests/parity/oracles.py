"""The libraries that the parity tests compare with: that they are the pinned ones, and that they work together without us.

A year from now one of them may refuse another, as transformers 5.24 refused every peft that was out. Nothing in minidiff can
mend that, so it must not look like a difference between their numbers and ours.
"""

import functools
import importlib
import importlib.metadata
import re
import tomllib
from pathlib import Path

IMPORTS = {
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "scipy",
    "torch-fidelity",
    "torchmetrics",
}


def pins() -> dict[str, str]:
    """The exact versions that pyproject.toml names in the extra "test"."""
    project = tomllib.loads(
        (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    )
    lines = project["project"]["optional-dependencies"]["test"]
    exact = (re.fullmatch(r"([\w-]+)==([\w.]+)", line) for line in lines)
    return {match[1]: match[2] for match in exact if match}


@functools.cache
def complaint() -> str | None:
    """What is wrong with the oracles as they are installed here, or None."""
    for name, version in pins().items():
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return f"the oracle {name} is not installed; pip install -e '.[test]'"
        if installed != version:
            return (
                f"the oracle {name} is {installed}, pinned is {version}; pip install -e '.[test]'"
            )
    try:
        for name in sorted(IMPORTS):
            importlib.import_module(name.replace("-", "_"))
        _lora_in_a_text_encoder()
    except Exception as error:  # whatever it is, it is theirs: none of our code has run
        return f"the oracles do not work together ({type(error).__name__}: {error}); pin others in pyproject.toml"
    return None


def _lora_in_a_text_encoder() -> None:
    """What the LoRA tests ask of three libraries at once: peft puts a LoRA into transformers' CLIP, beside diffusers."""
    import peft
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    text = transformers.CLIPTextModel(config)
    text.add_adapter(peft.LoraConfig(r=1, target_modules=["q_proj"]))
