"""The options of fine-tuning check themselves, and need no torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from minidiff.errors import UserError
from minidiff.options.finetuning import (
    DataConfig,
    DreamBoothConfig,
    FineTuneConfig,
    LoRAConfig,
    RecorderConfig,
    SubjectConfig,
)

NAN = float("nan")


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"lr": NAN}, "lr is nan; it must be above 0"),
        ({"word_lr": 0.0}, "word_lr is 0; it must be above 0"),
        ({"warmup": -1}, "warmup is -1; it must be at least 0"),
        ({"ema": 1.0}, "ema is 1; it must be between 0 and 1"),
        ({"dropout": 1.0}, "dropout is 1; it must be from 0 to below 1"),
        ({"seed": -1}, "seed is -1"),
        ({"t_mean": 1.0}, "t_mean and t_std go together"),
        ({"t_mean": 1.0, "t_std": 0.0}, "t_std is 0; it must be above 0"),
        ({"method": "inversion"}, "trains the vector of one word; say which"),
    ],
)
def test_a_fine_tune_that_cannot_be(options, complaint):
    with pytest.raises(UserError, match=complaint):
        FineTuneConfig(**options)


@pytest.mark.parametrize("alpha", [0.0, -1.0, NAN, float("inf")])
def test_an_alpha_that_makes_a_lora_of_nothing(alpha):
    """alpha / rank multiplies the change: with 0 the file has no effect."""
    with pytest.raises(UserError, match=r"alpha is .*; it must be above 0"):
        LoRAConfig(alpha=alpha)
    with pytest.raises(UserError, match=r"alpha is .*; it must be above 0"):
        DreamBoothConfig(prompt="a sks dog", prior=0.0, alpha=alpha)


def test_layers_are_names_with_commas_between():
    assert LoRAConfig(layers="q, k,v,").targets == ("q", "k", "v") and LoRAConfig().targets == ()


def test_a_class_is_preserved_unless_it_is_not_wanted():
    with pytest.raises(UserError, match="what class to preserve"):
        DreamBoothConfig(prompt="a sks dog")
    with pytest.raises(UserError, match="class_pictures is 0, which preserves nothing"):
        DreamBoothConfig(prompt="a sks dog", class_prompt=("a dog",), class_pictures=0)
    assert not DreamBoothConfig(prompt="a sks dog", prior=0.0).preserves
    assert not DreamBoothConfig(prompt="a sks dog", method="inversion").preserves


def test_a_recorder_needs_two_images_of_a_prompt():
    with pytest.raises(UserError, match="no second seed to compare with"):
        RecorderConfig(n=1)


def test_what_suits_the_machine_is_no_part_of_a_run():
    config = FineTuneConfig(method="lora", lora=LoRAConfig(4), checkpointing=True)
    assert config.identity() == FineTuneConfig(method="lora", lora=LoRAConfig(4)).identity()
    assert config.identity()["rank"] == 4 and "word" not in config.identity()
    assert "rank" not in FineTuneConfig().identity()


def test_options_and_help_need_no_torch():
    for code in (
        "import minidiff.options.finetuning",
        "from minidiff.cli.main import main; main(['finetune', '--help'])",
        "from minidiff.cli.main import main; main(['dreambooth', '--help'])",
    ):
        check = f"import sys; {code}; assert 'torch' not in sys.modules"
        subprocess.run([sys.executable, "-c", check], check=True, capture_output=True)


@pytest.mark.parametrize(
    "make, complaint",
    [
        (
            lambda: FineTuneConfig(text_lr=1e-5),
            "the text encoder, which is not trained; set `text`",
        ),
        (lambda: FineTuneConfig(text=True, text_lr=0.0), "text_lr is 0; it must be above 0"),
        (lambda: DreamBoothConfig(prompt="a", prior=0.0, text_lr=1e-5), "with `text=yes`"),
        (
            lambda: DataConfig(data=Path("d"), size=65536),
            "size is 65536; it must be from 1 to 8192",
        ),
        (lambda: SubjectConfig(subject=Path("d"), size=65536), "size is 65536; it must be from 1"),
    ],
)
def test_new_options_check_themselves(make, complaint):
    with pytest.raises(UserError, match=complaint):
        make()


@pytest.mark.parametrize("name", ["steps", "batch", "seed", "every", "warmup", "accumulate"])
@pytest.mark.parametrize("value", [10**400, -(10**400)])
def test_numbers_of_400_digits_are_refused(name, value):
    """They ended in "OverflowError: int too large to convert to float"."""
    with pytest.raises(UserError, match=f"{name} is a number of 40. digits; it must be smaller."):
        FineTuneConfig(**{name: value})


def test_new_options_are_part_of_a_run_where_they_are_used():
    """A run.json of before has none of them, and the run is resumed all the same."""
    names = {"lr_schedule", "text_lr", "validation_prompt"}
    assert not names & FineTuneConfig(validation_prompt=("a cat",)).identity().keys()
    used = FineTuneConfig(lr_schedule="constant", text=True, text_lr=1e-6).identity()
    assert (used["lr_schedule"], used["text_lr"]) == ("constant", 1e-6)
