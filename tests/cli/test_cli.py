"""The command line: help, what is written, the same bytes for the same seed, and one line for
everything that is wrong."""

import json
import logging
import os
import shutil
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from tqdm import tqdm

from minidiff.cli import console
from minidiff.cli.main import VERBS, main
from minidiff.cli.options import EXAMPLE
from minidiff.errors import UserError

PROMPT = "a small blue circle"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model folder with random weights."""
    from minidiff import schedules
    from minidiff.denoiser import Denoiser
    from minidiff.latent_diffusion import LatentDiffusion
    from minidiff.text import CLIPText, TextConfig
    from minidiff.unet import UNet, UNetConfig
    from minidiff.vae import VAE, VAEConfig

    torch.manual_seed(0)
    unet = UNet(
        UNetConfig(
            4,
            4,
            channels=(32, 32, 32, 32),
            blocks=1,
            depth=(0, 0, 0, 1),
            heads=(1, 1, 1, 1),
            context_dim=32,
            groups=8,
        )
    )
    text = CLIPText(TextConfig(width=32, layers=1, heads=2, context_length=32))
    torch.nn.init.normal_(
        unet.conv_out.weight, std=0.1
    )  # else it starts at zero and no prompt, no step makes a difference
    model = LatentDiffusion(
        VAE(VAEConfig(3, 4, channels=(8, 16), blocks=1, groups=4)),
        text,
        Denoiser(unet, schedules.cosine(), "v"),
        size=32,
    )
    return model.save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def copy(tiny, tmp_path):
    """A model folder to be damaged."""
    return shutil.copytree(tiny, tmp_path / "model")


def shell(*args, **how):
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, **how)


# Help.

SEED, DEVICE = {"--seed INT"}, {"--device auto|cpu|cuda|mps"}
IDLE = {  # what would do nothing there
    "plot forward": DEVICE,
    "plot schedules": SEED | DEVICE,
    "data coco": DEVICE,
    "data check": DEVICE,
    "watch": SEED | DEVICE | {"--out PATH"},
    "inspect": SEED | DEVICE,
    "convert": SEED | DEVICE,
}


def test_help_lists_every_verb_and_imports_nothing_heavy():
    heavy = ("torch", "numpy", "matplotlib", "PIL", "open_clip")
    code = "from minidiff.cli.main import main; main(['--help']); import sys; "
    code += f"sys.exit(str([m for m in {heavy} if m in sys.modules] or ''))"
    ran = shell("-c", code)
    assert ran.stderr.strip() == ""
    for name, verb in VERBS.items():
        assert f"  {name}  " in ran.stdout and verb.__doc__.split()[0] in ran.stdout
    assert max(len(line) for line in ran.stdout.splitlines()) <= 100


def test_no_arguments_print_the_help(ran):
    assert ran().out == ran("--help").out == ran("-h").out != ""


def test_help_of_a_group(ran):
    said = ran("plot", "--help").out
    assert (
        "plot forward" in said
        and "plot reverse" in said
        and "plot schedules" in said
        and "generate" not in said
    )


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(ran, verb):
    said = ran(*verb.split(), "--help").out
    assert f"usage: minidiff {verb} " in said and VERBS[verb].__doc__.splitlines()[0].rstrip(
        "."
    ) in " ".join(said.split())
    options = {"--seed INT", "--device auto|cpu|cuda|mps", "--out PATH"}
    assert {option for option in options if option in said} == options - IDLE.get(verb, set())


# What the verbs do.


def test_quickstart_passes_its_arguments_on(ran, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setitem(
        sys.modules,
        "minidiff.recipes.quickstart",
        types.SimpleNamespace(quickstart=lambda *args: calls.append(args)),
    )
    ran("quickstart", "--out", tmp_path, "--seed", 3, "--resume")
    ran("quickstart", "--out", tmp_path, "--device", "cpu", "--minutes", 2.5)
    assert calls == [(tmp_path, 3, "cpu", True, None), (tmp_path, 0, "cpu", False, 2.5)]


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_generate_gives_the_same_bytes_for_the_same_seed(ran, tiny, tmp_path, sampler):
    names = [
        "000-a-small-blue-circle.png",
        "001-a-small-blue-circle.png",
        "002-苹果.png",
        "003-苹果.png",
        "grid.png",
    ]
    folders = {}
    for name, seed in (("first", 5), ("again", 5), ("other", 6)):
        out = tmp_path / name
        said = ran(
            "generate",
            PROMPT,
            "苹果",
            "--n",
            2,
            "--steps",
            3,
            "--model",
            tiny,
            "--sampler",
            sampler,
            "--seed",
            seed,
            "--out",
            out,
        )
        assert said.out.splitlines() == [str(out / n) for n in names]
        folders[name] = [(out / n).read_bytes() for n in names]
    assert folders["first"] == folders["again"]
    assert all(a != b for a, b in zip(folders["first"], folders["other"], strict=True))


def test_a_picture_carries_its_settings(ran, tiny, tmp_path):
    prompt = "苹果 on white"
    ran(
        "generate",
        prompt,
        "--steps",
        2,
        "--model",
        tiny,
        "--guidance",
        2.5,
        "--interval",
        "0.6,1",
        "--size",
        48,
        "--seed",
        7,
        "--out",
        tmp_path,
    )
    with Image.open(tmp_path / "000-苹果-on-white.png") as picture:
        assert picture.size == (48, 48)
        settings = {
            "seed": "7",
            "steps": "2",
            "guidance": "2.5",
            "sampler": "ddim",
            "size": "48x48",
            "model": "tiny",
        }
        settings |= {"spacing": "trailing", "dtype": "fp32", "interval": "0.6,1"}
        carried = {"prompt": "苹果 on white", "picture": "1 of 1", "first": "0", **settings}
        assert picture.text == carried


def test_generate_takes_the_models_own_guidance_and_shows_progress(
    ran, tiny, tmp_path, monkeypatch
):
    seen = []

    class Bar(tqdm):
        def close(self):
            seen.append((self.n, self.total))
            super().close()

    monkeypatch.setattr("minidiff.pipeline.tqdm", Bar)
    ran("generate", PROMPT, "--n", 65, "--steps", 2, "--model", tiny, "--out", tmp_path)
    assert seen[0] == (4, 4)  # 65 pictures are two batches
    with Image.open(tmp_path / "064-a-small-blue-circle.png") as picture:
        assert picture.text["guidance"] == str(
            json.loads((tiny / "model.json").read_text())["guidance"]
        )


def test_plot_forward(ran, tmp_path):
    Image.new("RGB", (50, 40), "red").save(tmp_path / "red.png")
    for options in ([], ["--schedule", "karras"], ["--image", tmp_path / "red.png", "--size", 16]):
        said = ran("plot", "forward", "--out", tmp_path / "plots", *options)
        assert said.out.splitlines() == [
            str(tmp_path / "plots" / name) for name in ("forward.png", "forward.gif")
        ]
    with Image.open(tmp_path / "plots" / "forward.png") as strip:
        colours = {
            colour: count
            for count, colour in strip.convert("RGB").getcolors(strip.width * strip.height)
        }
        assert colours[255, 0, 0] >= 128 * 128  # the first column is the picture itself


def test_plot_reverse(ran, tiny, tmp_path):
    said = ran("plot", "reverse", PROMPT, "苹果", "--model", tiny, "--steps", 3, "--out", tmp_path)
    assert said.out.splitlines() == [str(tmp_path / "reverse.png"), str(tmp_path / "reverse.gif")]
    with Image.open(tmp_path / "reverse.gif") as film:
        assert film.n_frames == 4


def test_plot_attention(ran, refused, tiny, tmp_path):
    settings = ["--model", tiny, "--steps", 2, "--out", tmp_path]
    files = [str(tmp_path / name) for name in ("attention.png", "attention_steps.png")]
    assert ran("plot", "attention", PROMPT, *settings).out.splitlines() == files
    assert "attention takes one prompt, not 2;" in refused("plot", "attention", "a", "b", *settings)
    assert "--guidance is 0, which ignores the prompt" in refused(
        "plot", "attention", PROMPT, *settings, "--guidance", 0
    )


def test_plot_schedules(ran, tmp_path):
    for names in ([], ["karras", "flow"]):
        assert ran("plot", "schedules", *names, "--out", tmp_path).out.splitlines() == [
            str(tmp_path / "schedules.png")
        ]


def test_a_long_prompt_says_in_one_line_which_words_fell_off(ran, tiny, tmp_path):
    words = "one two three four five six seven eight nine ten".split() * 4
    said = ran(
        "generate", " ".join(words), "--n", 2, "--steps", 1, "--model", tiny, "--out", tmp_path
    ).err
    lines = [line for line in said.replace("\r", "\n").splitlines() if line.startswith("minidiff:")]
    assert lines == [
        f'minidiff: prompt cut after 30 tokens; the model does not see: "{" ".join(words[30:])}"'
    ]


# What is wrong with the input, in one line.


@pytest.mark.parametrize("args, said", [
    (["genrate", PROMPT],
     'no verb "genrate"; perhaps you meant generate; there is quickstart, generate, plot forward,'),
    (["--seed", "3"], 'no verb "--seed"; there is quickstart,'),
    (["plot"], "plot what? There is plot forward, plot reverse, plot attention, plot schedules."),
    (["plot", "forwards"], 'no verb "plot forwards"; perhaps you meant plot forward;'),
    (["plot", "--out", "x"], 'no verb "plot --out"; there is plot forward,'),
    (["generate", PROMPT, "--seeed", "3"],
     "--seeed, 3; perhaps you meant --seed; see minidiff generate --help."),
    (["generate", PROMPT, "--stepps", "3", "--gidance", "2"],
     "perhaps you meant --guidance, --steps; see minidiff generate --help."),
    (["generate", PROMPT, "--seed", "x"],
     '--seed takes a whole number, not "x"; see minidiff generate --help.'),
    (["generate", PROMPT, "--seed", "1.5"], '--seed takes a whole number, not "1.5"; see'),
    (["generate", PROMPT, "--size", "big"],
     '--size takes a side in pixels, or a width and a height as in 768x512; not "big".'),
    (["generate", PROMPT, "--guidance", "it's"], '--guidance takes a number, not "it\'s"; see'),
    (["plot", "reverse", "--seed"], "--seed"),
    (["data"], "data what? There is data coco, data check."),
    (["data", "check"], "missing from minidiff data check: DIR; see minidiff data check --help."),
    (["data", "coco", "--size", "3"], "missing from minidiff data coco: --annotations; see"),
    (["data", "coco", "--annotations"], "no annotations; name a COCO caption file, such as captions_val2017.json."),
    (["generate", PROMPT, "--n", "2", PROMPT], f"{PROMPT}; see minidiff generate --help."),
    (["generate"], "no prompt; say what to draw, as in: minidiff generate"),
    (["generate", "\udcff"], r"the argument '\udcff' is not valid UTF-8;"),
])  # fmt: skip
def test_arguments_that_cannot_be_understood(refused, args, said):
    assert said in refused(*args)


@pytest.mark.parametrize("options, said", [
    (["--n", 0], "--n is 0; it must be at least 1."),
    (["--steps", 0], "--steps is 0; it must be at least 1."),
    (["--steps", -3], "--steps is -3; it must be at least 1."),
    (["--steps", 1001], "steps is 1001; it must be at least 1 and at most 1000."),
    (["--guidance", "nan"], "--guidance is nan; it must be finite, as in 4."),
    (["--guidance", "inf"], "--guidance is inf; it must be finite"),
    (["--sampler", "dimm"], 'no sampler "dimm"; there is ddim, ddpm'),
    (["--size", 33], "size 33 is not divisible by 2; the nearest valid sizes are 32 and 34"),
    (["--size", 0], "size 0 is not divisible by 2; the nearest valid size is 2"),
    (["--device", "tpu"], 'no device "tpu"; there is auto, cpu, cuda, mps; perhaps'),
    (["--seed", -1], "--seed is -1; it must be from 0 to 9223372036854775807."),
    (["--seed", 2**63], "it must be from 0 to 9223372036854775807."),
])  # fmt: skip
def test_settings_that_cannot_be(refused, tiny, tmp_path, options, said):
    assert said in refused("generate", PROMPT, "--model", tiny, "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there(refused, monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for verb in (["quickstart"], ["generate", PROMPT], ["plot", "reverse"], ["evaluate"]):
        assert (
            refused(*verb, "--device", device)
            == f'no "{device}" on this machine; choose the device cpu, or auto.'
        )


def test_a_model_that_is_not_there_or_not_whole(refused, copy, tmp_path):
    def said(model):
        return refused(
            "generate", PROMPT, "--steps", 1, "--model", model, "--out", tmp_path / "out"
        )

    assert f'no model folder "{tmp_path / "nowhere"}"' in said(tmp_path / "nowhere")
    assert "neither model.json (ours) nor model_index.json" in said(tmp_path)
    whole = (copy / "unet.safetensors").read_bytes()
    for damaged in (whole[:1000], b"", b"not a checkpoint at all"):
        (copy / "unet.safetensors").write_bytes(damaged)
        assert f"{copy / 'unet.safetensors'} is damaged" in said(copy)
    (copy / "unet.safetensors").write_bytes((copy / "vae.safetensors").read_bytes())
    assert f"{copy / 'unet.safetensors'} does not fit model.json" in said(copy)
    (copy / "unet.safetensors").unlink()
    assert f"{copy} has no weights: unet.safetensors is missing" in said(copy)
    (copy / "model.json").write_text("{")
    assert f"{copy / 'model.json'} is damaged" in said(copy)
    assert refused("plot", "reverse", "--model", tmp_path / "nowhere").startswith("no model folder")


def test_a_place_that_cannot_be_written(refused, tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    verbs = (
        ["quickstart"],
        ["generate", PROMPT, "--model", tiny],
        ["plot", "forward"],
        ["plot", "reverse", "--model", tiny],
        ["plot", "schedules"],
    )
    for verb in (
        *verbs,
        ["data", "check", "."],
        ["data", "coco", "--annotations", "captions.json", "--download"],
    ):
        for out in (tmp_path / "file", tmp_path / "file" / "below"):
            assert (
                refused(*verb, "--out", out)
                == f'--out {out}: "{tmp_path / "file"}" is a file; name a folder.'
            )
    long = tmp_path / ("x" * 300)
    assert (
        refused("plot", "schedules", "--out", long)
        == f"{long}: File name too long; check the path, its permissions and the free space."
    )
    monkeypatch.setattr(
        "os.access", lambda *_: False
    )  # the tests may run as root, who may write anywhere
    assert refused("generate", PROMPT, "--out", tmp_path / "new") == (
        f'--out {tmp_path / "new"}: no permission to write in "{tmp_path}"; name another folder.'
    )


def test_what_cannot_be_plotted(refused, tmp_path):
    (tmp_path / "text.png").write_text("hello")
    assert f"{tmp_path / 'no.png'}: no such picture" in refused(
        "plot", "forward", "--image", tmp_path / "no.png"
    )
    assert f"{tmp_path / 'text.png'}: not a readable picture" in refused(
        "plot", "forward", "--image", tmp_path / "text.png"
    )
    assert "--size is 0; it must be at least 1." in refused("plot", "forward", "--size", 0)
    assert "too small" in refused("plot", "forward", "--size", 16)
    assert 'no schedule "x"; there is linear, scaled_linear, cosine,' in refused(
        "plot", "forward", "--schedule", "x"
    )
    assert 'no schedule "x"; there is linear, scaled_linear, cosine,' in refused(
        "plot", "schedules", "cosine", "x"
    )


def test_a_disk_that_fills_up(refused, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minidiff.figures.chains.plot_schedules", full)
    assert "No space left on device" in refused("plot", "schedules", "--out", tmp_path)


# How it ends otherwise.


def test_interrupted(capsys, monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(
        sys.modules, "minidiff.recipes.quickstart", types.SimpleNamespace(quickstart=interrupted)
    )
    with pytest.raises(SystemExit) as end:
        main(["quickstart", "--out", str(tmp_path)])
    assert (
        end.value.code == 130
        and capsys.readouterr().err
        == "minidiff: interrupted; the same command with --resume goes on from there.\n"
    )


def test_a_reader_that_has_seen_enough():
    for args in (["--help"], ["generate", "--help"]):
        with subprocess.Popen(
            [sys.executable, "-m", "minidiff.cli.main", *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as command:
            command.stdout.close()
            assert (command.wait(60), command.stderr.read()) == (0, b"")


def test_as_a_process():
    ran = shell("-m", "minidiff.cli.main", "generate", PROMPT, "--steps", "many")
    assert (ran.returncode, ran.stdout, ran.stderr) == (
        2,
        "",
        'minidiff: --steps takes a whole number, not "many"; see minidiff generate --help.\n',
    )
    ran = shell(
        "-m",
        "minidiff.cli.main",
        "generate",
        PROMPT,
        "--seeed",
        "3",
        env=os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "40"},
    )
    assert (
        ran.stderr == "minidiff: unrecognized options: --seeed, 3; perhaps you meant --seed; "
        "see minidiff generate --help.\n"
    )


def test_a_complaint_of_no_known_kind_is_still_one_line():
    box = "╭─ Error ───╮\n│ \x1b[31mSomething\x1b[0m new │\n│  is wrong.  │\n╰───────────╯\n"
    assert console.plain(box) == "Error Something new is wrong"


# What is asked for by its number, and what is read in another way than it may be meant.


def test_image_k_of_a_run_is_made_alone(ran, tiny, tmp_path):
    """The settings inside a PNG draw it again."""
    args = ("generate", PROMPT, "--model", tiny, "--steps", 2, "--seed", 5, "--sampler", "ddpm")
    ran(*args, "--n", 3, "--out", tmp_path / "all")
    third = tmp_path / "all" / "002-a-small-blue-circle.png"
    with Image.open(third) as picture:
        assert picture.text["first"] == "2"
        ran(*args, "--first", picture.text["first"], "--out", tmp_path / "one")
        with Image.open(tmp_path / "one" / "000-a-small-blue-circle.png") as again:
            assert again.tobytes() == picture.tobytes()
            assert again.text["first"] == "2" and again.text["picture"] == "1 of 1"


@pytest.mark.parametrize("prompts, warning", [
    (["a", "small", "blue", "circle"],
     '4 words are 4 prompts; put one prompt in quotes, as in "a small blue circle"'),
    (["a (red:1.5) circle"], '"(red:1.5)" is read as it stands: prompts have no weights here'),
    (["a circle BREAK a square"], '"BREAK" is read as it stands'),
    (["a circle", "a square", "a triangle"], ""),
    (["a circle (small, red)"], ""),
    (["cat", "dog"], ""),
])  # fmt: skip
def test_generate_warns_of_prompts_that_may_be_meant_otherwise(
    ran, tiny, tmp_path, prompts, warning
):
    said = ran("generate", *prompts, "--model", tiny, "--steps", 1, "--out", tmp_path).err
    lines = [line for line in said.replace("\r", "\n").splitlines() if "minidiff:" in line]
    assert any(warning in line for line in lines) if warning else not lines


@pytest.mark.parametrize("native", [True, False])
def test_generate_warns_of_bf16_that_is_imitated(ran, tiny, tmp_path, monkeypatch, native):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native, raising=False)
    args = ("generate", PROMPT, "--model", tiny, "--steps", 1, "--device", "cpu", "--out", tmp_path)
    assert ("does not compute in bf16" in ran(*args, "--dtype", "bf16").err) is not native
    assert "does not compute in bf16" not in ran(*args).err


@pytest.mark.parametrize("args, nearest", [
    (["generate", PROMPT, "--sampler", "dpm_2m"], "dpmpp_2m"),
    (["generate", PROMPT, "--spacing", "karas"], "karras"),
    (["plot", "forward", "--schedule", "cosin"], "cosine"),
    (["plot", "schedules", "linear", "sigmiod"], "sigmoid"),
    (["convert", "a", "b", "--to", "difusers"], "diffusers"),
    (["evaluate", "--trilemma", "--samplers", "ddim,hein"], "heun"),
])  # fmt: skip
def test_an_unknown_name_has_the_nearest_proposed(refused, args, nearest):
    assert refused(*args).endswith(f"; perhaps you meant {nearest}.")


@pytest.mark.parametrize("args, said", [
    (["--size", "3"], "--size does nothing here"),
    (["--trilemma", "--steps", "4"], "--steps does nothing beside --trilemma"),
    (["--trilemma", "--guidance", "3"], "--guidance does nothing beside --trilemma"),
    (["--rescale", "7"], "--rescale is 7; it must be from 0 to 1."),
])  # fmt: skip
def test_what_evaluate_refuses_before_it_loads_anything(refused, args, said):
    assert said in refused("evaluate", "--model", "nowhere", *args)


def test_every_help_has_an_example(ran):
    for verb in VERBS:
        assert f"Example: minidiff {verb} " in ran(*verb.split(), "--help").out


@pytest.mark.parametrize("args", [
    ["--version"], ["inspect", "--help"], ["generate", "--help"], ["evaluate", "--help"],
    ["finetune", "--help"], ["generate", "--stepps", "3"], ["generate", "x", "--sampler", "dimm"],
    ["generate", "x", "--steps", "0"],
])  # fmt: skip
def test_what_needs_no_torch_imports_none(args):
    code = "import sys; from minidiff.cli.main import main\ntry: main(sys.argv[1:])\n"
    code += "finally: print('torch' in sys.modules)"
    assert shell("-c", code, *args).stdout.splitlines()[-1] == "False"


def test_version(ran):
    from importlib.metadata import version

    import minidiff

    assert minidiff.__version__ == version("minidiff")
    assert ran("--version").out == f"minidiff {version('minidiff')}\n"


# The package itself.


def test_every_name_is_there_after_import_minidiff():
    code = (
        "import sys, minidiff; assert 'torch' not in sys.modules\n"
        "assert set(minidiff.__all__) <= set(dir(minidiff)) and '__version__' in dir(minidiff)\n"
        "for name in minidiff.__all__: assert getattr(minidiff, name) is not None, name\n"
        "assert minidiff.plots.__name__ == 'minidiff.figures.plots'\n"
        "assert minidiff.UNet.__name__ == 'UNet'\n"
        "import minidiff.finetuning.loop; assert minidiff.finetuning.loop.__name__"
    )
    ran = shell("-c", code)
    assert ran.returncode == 0, ran.stderr
    with pytest.raises(AttributeError, match="no attribute 'unett'"):
        __import__("minidiff").unett  # noqa: B018


def test_type_checkers_read_the_package():
    import minidiff

    assert (Path(minidiff.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize(
    "args, near",
    [
        (["finetune", "--data", "d", "--learning-rate", "1"], "--lr;"),
        (["finetune", "--dataset", "d"], "--data;"),
        (["finetune", "--data", "d", "--max_train_steps", "9"], "--steps;"),
        (["dreambooth", "--subject", "d", "--instance_prompt", "x"], "--prompt;"),
        (["generate", "x", "--num-inference-steps", "9"], "--steps;"),
    ],
)
def test_flags_of_other_programs_are_translated(refused, args, near):
    assert f"perhaps you meant {near}" in refused(*args)


def test_new_choices_propose_the_nearest(refused):
    base = ("finetune", "--data", "d")
    assert "perhaps you meant constant" in refused(*base, "--lr-schedule", "constatn")
    assert 'no captions "any"; there is first, random' in refused(*base, "--captions", "any")
    assert "--size is 65536; it must be from 1 to 8192" in refused(*base, "--size", 65536)


def test_nothing_that_is_printed_moves_the_cursor(capsys):
    def verb(text: str) -> None:
        """Print.

        Args:
            text: what.
        """
        print(text, "\ttwo\nlines")
        warnings.warn(text, stacklevel=2)
        logging.getLogger("minidiff").info(text)
        raise UserError(text)

    with pytest.raises(SystemExit):
        console.run("minidiff", "", {"verb": verb}, ["verb", "--text", "a\x1b[2J\x9bc\u202e"])
    out, err = capsys.readouterr()
    assert out == "a\\x1b[2J\\x9bc\\u202e \\ttwo\nlines\n"
    assert err.count("a\\x1b[2J\\x9bc\\u202e") == 3 and "\x1b" not in err


def test_out_of_memory_is_one_line(capsys):
    with pytest.raises(SystemExit) as end, console.one_line("minidiff"):
        raise MemoryError("12 GiB")
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        "minidiff: out of memory (12 GiB); a smaller size or batch takes less.\n"
    )


def test_words_that_the_box_does_not_know_are_named(tmp_path, ran):
    few = ("--steps", 1, "--out", tmp_path)
    said = ran("generate", "a dragon above a heart", "a RED circle", *few).err
    assert "the model in the box does not know dragon, heart; all that it knows: a, above" in said
    assert "does not know" not in ran("generate", EXAMPLE, *few).err
