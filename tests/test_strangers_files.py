"""Whatever a verb writes, the files of somebody else that lie there are found byte for byte afterwards."""

import functools
import importlib
import io
import json
import re
import sys
from pathlib import Path

import pytest
from PIL import Image

import minidiff
from minidiff.cli import script
from minidiff.cli.main import main
from minidiff.errors import UserError

HARMLESS = [
    "model.old/precious",
    "model.new/precious",
    "m.old/precious",
    "m.new/precious",
    "m.new.safetensors",
    "fresh.safetensors",
    "run.json.new",
    "results.json.new",
    "record.jsonl.new",
    "report.html.new",
    ".report.json.new",
    "evaluate.csv.new",
    "trilemma.csv.new",
    "embedding.safetensors.new",
    "notes.txt",
    ".hidden/a",
    ".grid.png.1",
    ".out.minidiff-12345678/precious",
    "best_step_final/a",
    "cache/notes",
    "cache/latents.safetensors.new",
    "training.old/a",
    "class/a.png",
    "class/9999.png",
    "class/deep/c.png",
    "class/deep/0000.png",
    "grids/mine.png",
    "sub/results.json",
    "checkpoint.pt.new",
]
RUN = [
    "model/precious",
    "model/model.json",
    "model",
    "training/log.jsonl",
    "lora.safetensors",
    "embedding.safetensors",
    "run.json",
    "report.html",
    "record.jsonl",
    "grids/step_000000.png",
    "grids/step_000001.png",
    "cache/contexts.safetensors",
    "cache/latents.safetensors",
    "best_step_1/precious",
]
DRAWN = ["samples.png", "forward.png", "forward.gif", "reverse.png", "reverse.gif", "loss.png"]
QUICKSTART = ["model/precious", "model", "training/a", *DRAWN, "index.html", "results.json"]


def content(name: str) -> bytes:
    kinds = {".png": "PNG", ".gif": "GIF"}
    if (kind := kinds.get(Path(name).suffix)) is None:
        return {".json": b'{"mine": 1}', ".csv": b"a,b\n1,2\n"}.get(
            Path(name).suffix, f"{name} of a stranger".encode()
        )
    Image.new("RGB", (32, 32), "orange").save(data := io.BytesIO(), kind)
    return data.getvalue()


def plant(folder: Path, names: list[str]) -> dict[Path, bytes]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content(name))
    return {folder / name: content(name) for name in names}


def intact(planted: dict[Path, bytes]) -> None:
    changed = [
        str(path)
        for path, before in planted.items()
        if not path.is_file() or path.read_bytes() != before
    ]
    assert not changed, f"lost or changed: {changed}"


def code(args: list) -> int:
    try:
        main([str(arg) for arg in args])
    except SystemExit as end:
        return end.code or 0
    return 0


@pytest.fixture(scope="module")
def place(sd, tmp_path_factory) -> Path:
    """A model, a captioned folder, a subject, and COCO files."""
    folder = tmp_path_factory.mktemp("place")
    sd().save(folder / "tiny")
    for kind in ("data", "subject"):
        (folder / kind).mkdir()
        for k, colour in enumerate(("red", "green", "blue")):
            Image.new("RGB", (32, 32), colour).save(folder / kind / f"{k}.png")
    lines = [json.dumps({"file_name": f"{k}.png", "text": f"square {k}"}) for k in range(3)]
    (folder / "data" / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    images = [{"id": k, "file_name": f"{k}.png"} for k in range(3)]
    captions = [{"id": k, "image_id": k, "caption": f"square {k}"} for k in range(3)]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    return folder


def verbs(place: Path, out: Path) -> dict[str, tuple[list, list[str]]]:
    """The arguments of every verb that writes, and the names that it gives to what it writes."""
    small = ["--model", place / "tiny", "--steps", 1, "--out", out]
    train = [*small, "--every", 1, "--batch", 1]
    coco = ["data", "coco", "--annotations", place / "captions.json"]
    word = ["--method", "inversion", "--word", "sks"]
    booth = [
        "dreambooth",
        "--subject",
        place / "subject",
        "--prompt",
        "sks heart",
        "--class-prompt",
        "heart",
        "--class-pictures",
        1,
        *train,
    ]
    figures = ["evaluate", "--model", "box", "--n", 10, "--out", out]
    sweep = ["--trilemma", "--samplers", "ddim", "--sweep-steps", 1, "--sweep-guidance", 1]
    return {
        "generate": (
            ["generate", "x", *small],
            ["000-x.png", "000-another.png", "grid.png", "grid-001.png"],
        ),
        "plot forward": (
            ["plot", "forward", "--size", 32, "--out", out],
            ["forward.png", "forward.gif"],
        ),
        "plot reverse": (["plot", "reverse", "x", *small], ["reverse.png", "reverse.gif"]),
        "plot attention": (
            ["plot", "attention", "x", *small],
            ["attention.png", "attention_steps.png"],
        ),
        "step": (["step", "x", *small], ["step.png"]),
        "explore": (["explore", "x", *small, "--scales", "1"], ["explore.html"]),
        "plot schedules": (["plot", "schedules", "--out", out], ["schedules.png"]),
        "data check": (
            ["data", "check", place / "data", "--size", 16, "--out", out],
            ["report.json", "contact.png"],
        ),
        "data coco": (
            [*coco, "--images", place / "data", "--out", out / "c"],
            ["c", "c/precious", "c/metadata.jsonl"],
        ),
        "inspect": (["inspect", place / "tiny", "--out", out], ["inspect.json"]),
        "convert minidiff": (
            ["convert", place / "tiny", "m", "--to", "minidiff", "--out", out],
            ["m", "m/precious", "m/model.json"],
        ),
        "convert diffusers": (
            ["convert", place / "tiny", "m", "--to", "diffusers", "--out", out],
            ["m", "m/precious", "m/model_index.json"],
        ),
        "convert compvis": (
            ["convert", place / "tiny", "m.safetensors", "--to", "compvis", "--out", out],
            ["m.safetensors"],
        ),
        "finetune full": (["finetune", "--data", place / "data", *train], RUN),
        "finetune lora": (["finetune", "--data", place / "data", "--method", "lora", *train], RUN),
        "finetune inversion": (["finetune", "--data", place / "data", *word, *train], RUN),
        "dreambooth full": ([*booth, "--method", "full"], [*RUN, "class/0000.png"]),
        "dreambooth lora": ([*booth, "--method", "lora"], [*RUN, "class/0000.png"]),
        "dreambooth inversion": ([*booth, "--method", "inversion"], RUN),
        "evaluate": ([*figures, "--steps", 1], ["results.json", "evaluate.csv"]),
        "evaluate trilemma": ([*figures, *sweep], ["trilemma.csv", "trilemma.png"]),
    }


NAMES = {verb: names for verb, (_, names) in verbs(Path("place"), Path("out")).items()}
LONG = {
    "finetune lora",
    "finetune inversion",
    "dreambooth full",
    "evaluate trilemma",
    "dreambooth inversion",
}


def marked(verb: str, *values: object):
    return pytest.param(verb, *values, marks=pytest.mark.slow if verb in LONG else ())


@pytest.mark.parametrize("verb", map(marked, NAMES))
def test_what_is_not_in_the_way_stays_and_the_verb_works(verb, place, tmp_path):
    planted = plant(tmp_path / "out", HARMLESS) | plant(
        tmp_path, ["out.old/a", "out.new/a", ".out.1/a"]
    )
    args, _ = verbs(place, tmp_path / "out")[verb]
    assert code(args) == 0
    intact(planted)
    left = {path.relative_to(tmp_path) for path in tmp_path.rglob(".*.minidiff-*")} - {
        Path("out/.out.minidiff-12345678")
    }
    assert not left, "hidden folders are left"


@pytest.mark.parametrize(
    "verb, name", [marked(verb, name) for verb, names in NAMES.items() for name in names]
)
def test_what_is_in_the_way_is_named_or_written_beside(verb, name, place, tmp_path, capsys):
    planted = plant(tmp_path / "out", [name])
    args, _ = verbs(place, tmp_path / "out")[verb]
    ended = code(args)
    intact(planted)
    if ended:
        assert ended == 2 and str(tmp_path / "out") in capsys.readouterr().err
    if not verb.startswith(("finetune", "dreambooth", "convert")):
        assert ended == (0 if verb == "generate" else 2)


@pytest.mark.parametrize(
    "verb",
    [
        verb
        for verb in NAMES
        if not verb.startswith(("finetune", "dreambooth", "convert", "data coco"))
        and verb not in LONG
    ],
)
def test_what_is_ours_is_replaced(verb, place, tmp_path):
    args, _ = verbs(place, tmp_path / "out")[verb]
    assert code(args) == 0
    assert code(args) == 0


def test_generate_numbers_on(place, tmp_path):
    args, _ = verbs(place, tmp_path)["generate"]
    for _ in range(3):
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        assert code(args) == 0
        intact(before)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "000-x.png",
        "001-x.png",
        "002-x.png",
        "grid-001.png",
        "grid-002.png",
        "grid.png",
    ]


def test_backup_beside_a_missing_model_is_not_renamed(place, tmp_path):
    planted = {}
    for name in ("b.old", "b.new"):
        for file in (place / "tiny").iterdir():
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
            planted[tmp_path / name / file.name] = file.read_bytes()
    assert (
        code(["generate", "x", "--model", tmp_path / "b", "--steps", 1, "--out", tmp_path / "g"])
        == 2
    )
    intact(planted)


def test_pictures_that_generate_drew_are_no_class_pictures_of_ours(place, tmp_path):
    """The user drew them for the class, and put them there."""
    assert code(verbs(place, tmp_path)["generate"][0]) == 0
    picture = (tmp_path / "000-x.png").read_bytes()
    planted = {tmp_path / "out" / "class" / name: picture for name in ("0000.png", "0007.png")}
    for path, data in planted.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    assert code(verbs(place, tmp_path / "out")["dreambooth lora"][0]) == 2
    intact(planted)


@pytest.mark.parametrize(
    "name", [*QUICKSTART[:3], "samples-000100.png", "loss.png", "vae.png", "run.json"]
)
def test_train_refuses_before_it_reads_an_image(name, tmp_path, capsys):
    planted = plant(tmp_path, [name])
    assert code(["train", "nowhere", "--out", tmp_path]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    intact(planted)


@pytest.mark.parametrize("name", QUICKSTART)
def test_quickstart_refuses_before_it_trains(name, tmp_path, capsys, monkeypatch):
    from minidiff.recipes import quickstart

    monkeypatch.setattr(quickstart, "measured", lambda *_: pytest.fail("it trains"))
    planted = plant(tmp_path, [name])
    assert code(["quickstart", "--out", tmp_path]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    intact(planted)


@pytest.mark.parametrize(
    "name", ["model/precious", "model", "lora.safetensors", "best_step_1/precious"]
)
def test_resume_does_not_begin_over_what_is_there(name, place, tmp_path):
    planted = plant(tmp_path, [name])
    args, _ = verbs(place, tmp_path)["finetune full"]
    assert code([*args, "--resume"]) == 2
    intact(planted)


def test_best_steps_of_others_stay(place, tmp_path):
    """A folder with our name for it, in which something else lies as well."""
    args, _ = verbs(place, tmp_path / "out")["finetune full"]
    assert code(args) == 0
    planted = plant(
        tmp_path / "out",
        [
            "best_step_7/model/precious",
            "best_step_8/precious",
            "best_step_9/lora.safetensors",
            "best_step_x/a",
        ],
    )
    from minidiff.finetuning.run import write_best
    from minidiff.latent_diffusion import LatentDiffusion
    from minidiff.options.finetuning import FineTuneConfig

    for step in (1, 2):
        model = LatentDiffusion.load(place / "tiny")
        write_best(model, FineTuneConfig(steps=2), tmp_path / "out", None, step)
    intact(planted)
    assert not (tmp_path / "out" / "best_step_1").exists()


def test_model_folder_with_other_files_in_it(place, tmp_path):
    from minidiff.errors import UserError
    from minidiff.latent_diffusion import LatentDiffusion

    model = LatentDiffusion.load(place / "tiny")
    model.save(tmp_path / "m")
    model.save(tmp_path / "m")
    planted = plant(tmp_path, ["m/README.md"])
    with pytest.raises(UserError, match=r"README\.md"):
        model.save(tmp_path / "m")
    intact(planted)


FILES = (Path(__file__).parents[1] / "experiments").glob("*.py")
STUDIES = {path.stem: path for path in FILES if "\ndef main(" in path.read_text(encoding="utf-8")}


@pytest.mark.parametrize("study", STUDIES)
def test_experiments_refuse(study, tmp_path, monkeypatch):
    """Every file that a study writes, before it computes anything; and the study names them all."""
    monkeypatch.syspath_prepend(str(STUDIES[study].parent))
    module = importlib.import_module(study)
    outputs = getattr(module, "OUTPUTS", ())
    source = STUDIES[study].read_text(encoding="utf-8")
    own = ("trilemma.csv", "table.csv", "targets.csv", "steps.csv")  # refused by what reads them
    assert {*re.findall(r'out / "([^"]+\.[^"]+)"', source)} <= {*outputs, *own}
    assert f"run(main{', OUTPUTS' if outputs else ''})" in source
    calls = []
    main = functools.wraps(module.main)(lambda **options: calls.append(options))
    for name in ("results.json", *outputs):
        names = [name if Path(name).suffix else f"{name}/a.txt"]
        planted = plant(tmp_path / name.replace("/", "-"), names)
        out = str(tmp_path / name.replace("/", "-"))
        monkeypatch.setattr(sys, "argv", [f"{study}.py", "--out", out])
        with pytest.raises(SystemExit) as end:
            script.run(main, outputs)
        assert end.value.code == 2 and not calls
        intact(planted)


def test_folders_of_experiments_refuse(tmp_path, monkeypatch):
    """Files that a study writes below its folder."""
    monkeypatch.syspath_prepend(str(STUDIES["distill"].parent))
    import distill_walks
    import dreambooth

    model, world, walk = minidiff.load(), minidiff.World(), distill_walks.TEACHER_WALK
    planted = plant(tmp_path, ["a/metadata.jsonl", "b/3.png", "c/000.pt"])
    for name in ("a", "b"):
        with pytest.raises(UserError, match="was not written by minidiff"):
            dreambooth.subject_folder(tmp_path / name, 0)
    for resume in (False, True):
        with pytest.raises(UserError, match="was not written by minidiff"):
            distill_walks.all_walks(model, world, walk, 1, tmp_path / "c", resume, "walks")
    intact(planted)
