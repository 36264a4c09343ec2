"""What a model is worth: figures against their floors, the verb, and the sweep that goes on where it stopped."""

import csv
import json
import weakref
from functools import partial

import pytest
import torch

from minidiff import pipeline, schedules
from minidiff.data.world import World
from minidiff.denoiser import Denoiser
from minidiff.errors import UserError
from minidiff.evaluation import bench as evaluate
from minidiff.evaluation import sweep as trilemma
from minidiff.evaluation.bench import Drawn
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.options.sampling import SampleConfig
from minidiff.recipes import quickstart

WORLD = World(32, quickstart.SHAPES, quickstart.COLOURS)
NETWORKS = ["pixels-8x8", "critic-attributes"]


@pytest.fixture(scope="module")
def model():
    """Of the quickstart's sizes, with random weights."""
    torch.manual_seed(0)
    text, unet = quickstart.text_quickstart(), quickstart.unet_quickstart()
    torch.nn.init.normal_(
        unet.conv_out.weight, std=0.1
    )  # else it starts at zero and no prompt, no step makes a difference
    return LatentDiffusion(
        quickstart.vae_quickstart(),
        text,
        Denoiser(unet, schedules.cosine(), "x0"),
        32,
        guidance=2.0,
    ).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model):
    return model.save(tmp_path_factory.mktemp("evaluate") / "model")


@pytest.fixture(scope="module")
def bench():
    return evaluate.of_world(WORLD, 40, 0, NETWORKS)


def by_metric(figures):
    return {(row.metric, row.features): row for row in figures}


def seen(bench, pictures, repeated):
    """As if a model had drawn these."""
    return Drawn(
        bench.look([(pictures, bench.prompts)]),
        bench.look([(repeated, bench.repeated[: len(repeated)])]),
        0.0,
        0.0,
    )


def alive_at_most(most, batches):
    """The same batches, as long as no more than so many of them are held at a time."""
    held = []
    for pictures, captions in batches:
        held = [batch for batch in held if batch() is not None] + [weakref.ref(pictures)]
        assert len(held) <= most
        yield pictures, captions
        del pictures


def test_real_pictures_in_the_models_place_score_their_floors(bench):
    """The floors are no other computation: given the very pictures they are measured on, every figure is its floor."""
    rows = evaluate.figures(bench, Drawn(bench.instead, bench.repeated_instead, 0.0, 0.0))
    measured = [row for row in rows if row.floor is not None]
    assert len(measured) == 3 + 7 * len(NETWORKS)
    assert [row.value for row in measured] == pytest.approx(
        [row.floor for row in measured], rel=1e-12
    )
    found = by_metric(rows)
    assert (
        found["accuracy", "critic"].value > 0.95
        and found["accuracy, two objects", "critic"].n == 20
    )
    assert (
        0 < found["diversity per prompt", "pixels-8x8"].value < 1
    )  # pictures of one prompt are more alike than of two


def test_bad_pictures_score_worse_than_their_floors(bench):
    """The same picture for every prompt, and noise: each is caught where it should be."""
    one, noise = WORLD.batch(1, "one")[0].expand(40, -1, -1, -1), torch.rand(40, 3, 32, 32) * 2 - 1
    frozen = by_metric(evaluate.figures(bench, seen(bench, one, one[:10])))
    assert (
        frozen["recall", "pixels-8x8"].value < 0.1
        and frozen["diversity per prompt", "pixels-8x8"].value < 1e-6
    )
    random = by_metric(evaluate.figures(bench, seen(bench, noise, noise[:10])))
    assert random["accuracy", "critic"].value == 0
    for found in (frozen, random):
        assert found["frechet", "pixels-8x8"].value > 2 * found["frechet", "pixels-8x8"].floor
        assert found["kid", "pixels-8x8"].low > 0
        assert found["coverage", "pixels-8x8"].value < 0.5 < found["coverage", "pixels-8x8"].floor


def test_the_bench_of_the_world_is_held_out_and_follows_from_its_seed(bench):
    again, other = (evaluate.of_world(WORLD, 40, seed, NETWORKS) for seed in (0, 1))
    assert (
        torch.equal(again.real[NETWORKS[0]], bench.real[NETWORKS[0]])
        and again.prompts == bench.prompts != other.prompts
    )
    assert not torch.equal(bench.real[NETWORKS[0]], bench.instead[NETWORKS[0]])
    assert len(bench.repeated) == len(bench.repeated_instead["accuracy"]) == 2 * evaluate.EACH
    assert bench.repeated[0] == bench.repeated[evaluate.EACH - 1] != bench.repeated[evaluate.EACH]


def test_pictures_go_by_and_are_not_held(model, tmp_path, monkeypatch):
    """Memory does not grow by n pictures: of real ones, of a folder's and of the model's, no more than two batches are there at a time."""
    looked, look = [], evaluate.look

    def watched(batches, **how):
        looked.append(look(alive_at_most(2, batches), **how))
        return looked[-1]

    monkeypatch.setattr(evaluate, "look", watched)
    monkeypatch.setattr(evaluate, "AT_ONCE", 7)
    bench = evaluate.of_world(WORLD, 20, 0, NETWORKS[:1])
    monkeypatch.setattr(pipeline, "draw", partial(pipeline.draw, batch=8))
    evaluate.draw(model, bench, SampleConfig(steps=1, guidance=1.0))
    folder = captioned(tmp_path / "data", WORLD.batch(30, "folder")[0])
    evaluate.of_folder(folder, 32, 15, 0, NETWORKS[:1])
    assert [len(seen["pixels-8x8"]) for seen in looked] == [10, 20, 20, 30, 30]


def test_real_pictures_do_not_depend_on_how_many_are_drawn_at_once_where_they_are_few(bench):
    whole = WORLD.batch(20, ("real", 0), 1, "held-out", full=True)[0]
    torch.testing.assert_close(
        bench.look([(whole, bench.prompts[:20])])["pixels-8x8"], bench.real["pixels-8x8"][:20]
    )


@pytest.mark.parametrize(("guidance", "evaluations"), [(1.0, 3), (2.0, 6)])
def test_evaluations_are_counted(model, bench, guidance, evaluations):
    few = bench._replace(prompts=bench.prompts[:3], repeated=bench.repeated[:2])
    config = SampleConfig(steps=3, guidance=guidance, sampler="ddim")
    drawn = evaluate.draw(model, few, config)
    first = drawn.pictures["pixels-8x8"]
    assert (len(first), len(drawn.repeated["pixels-8x8"]), drawn.evaluations) == (3, 2, evaluations)
    assert torch.equal(first, evaluate.draw(model, few, config).pictures["pixels-8x8"])
    assert (
        evaluate.draw(model, few, SampleConfig(3, 1.0, "heun")).evaluations == 5
    )  # two a step, but for the last


def captioned(place, pictures):
    from minidiff.figures import plots

    place.mkdir()
    for k, picture in enumerate(pictures):
        plots.save_png(picture, place / f"{k}.png")
    lines = [
        json.dumps({"file_name": f"{k}.png", "text": f"picture {k}"}) for k in range(len(pictures))
    ]
    (place / "metadata.jsonl").write_text("\n".join(lines))
    return place


def test_a_folder_is_halved_and_copies_of_it_are_memorised(tmp_path):
    place = captioned(tmp_path / "data", WORLD.batch(30, "folder")[0])
    halves = evaluate.of_folder(place, 32, 15, 0, NETWORKS[:1])
    real, instead = halves.real["pixels-8x8"], halves.instead["pixels-8x8"]
    assert (
        len(real) == len(instead) == len(halves.prompts) == 15
        and len(halves.training["pixels-8x8"]) == 30
    )
    assert not any((a == b).all() for a in real for b in instead)
    fresh = halves.look([(WORLD.batch(15, "fresh")[0], halves.prompts)])
    found = {}
    for what, drawn in (("copies", halves.instead), ("fresh", fresh)):
        rows = by_metric(
            evaluate.figures(halves, Drawn(drawn, evaluate.only(drawn, slice(10)), 0.0, 0.0))
        )
        found[what], floor = (
            rows["memorised", "pixels-8x8"].value,
            rows["memorised", "pixels-8x8"].floor,
        )
        assert not any(metric.startswith("accuracy") for metric, _ in rows)
    assert (
        found["copies"] == 1 and max(found["fresh"], floor) <= 0.2
    )  # by chance the one or other stands where another stood
    with pytest.raises(UserError, match=r"holds 30 pictures; .* pass --n 15 or less"):
        evaluate.of_folder(place, 32, 16, 0, NETWORKS[:1])


# The verb.


def test_the_verb_writes_a_table_results_and_a_row(ran, folder, tmp_path):
    out = tmp_path / "out"
    args = (
        "evaluate",
        "--model",
        folder,
        "--n",
        12,
        "--steps",
        1,
        "--features",
        "pixels-8x8",
        "--device",
        "cpu",
        "--out",
        out,
    )
    said = ran(*args).out
    assert "accuracy, two objects" in said and "no Fréchet distance here is an FID" in said
    assert "FID" not in said.replace("is an FID", "")
    results = json.loads((out / "results.json").read_text())
    assert {"metric", "features", "value", "low", "high", "floor", "n"} == set(
        results["figures"][0]
    )
    assert (results["n"], results["steps"], results["sampler"], results["guidance"]) == (
        "12",
        "1",
        "ddim",
        "2",
    )
    ran(*args)
    rows = list(csv.DictReader((out / "evaluate.csv").open()))
    assert len(rows) == 2
    timed = "seconds per picture"
    assert {k: v for k, v in rows[0].items() if k != timed} == {
        k: v for k, v in rows[1].items() if k != timed
    }  # one seed, the same figures


def test_the_sweep_goes_on_where_it_stopped(ran, folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    args = [
        "evaluate",
        "--model",
        folder,
        "--n",
        10,
        "--trilemma",
        "--sweep-steps",
        "1,2",
        "--sweep-guidance",
        "1",
        "--device",
        "cpu",
        "--out",
        out,
    ]
    ran(*args, "--samplers", "ddim")
    before = (out / "trilemma.csv").read_text()
    drawn = []
    monkeypatch.setattr(
        trilemma,
        "draw",
        lambda *a, **how: drawn.append((a[2].sampler, a[2].steps)) or evaluate.draw(*a, **how),
    )
    said = ran(*args, "--samplers", "ddim,dpmpp_2m").out
    assert drawn == [("dpmpp_2m", 1), ("dpmpp_2m", 2)]
    after = (out / "trilemma.csv").read_text()
    assert after.startswith(before) and after.count("\n") == 5
    assert (
        "99 % of the best quality at the fewest evaluations: " in said
        and (out / "trilemma.png").stat().st_size > 10_000
    )
    ran(*args, "--samplers", "ddim", "--seed", "1")
    assert (out / "trilemma.csv").read_text().count(
        "\n"
    ) == 7  # another seed is another line, and so is another grid
    said = ran(
        *args,
        "--samplers",
        "ddim",
        "--sweep-steps",
        "2",
        "--sweep-guidance",
        "2",
        "--spacing",
        "shifted",
        "--interval",
        "0.8,1",
    ).out
    assert (
        "ddim, 2 steps, shifted, guidance 2 in 0.8-1" in said
        and "at 3 evaluations per picture" in said
    )


@pytest.mark.parametrize(("args", "said"), [
    (["--n", "3"], "--n is 3; it must be at least 10."),
    (["--world", "mars"], 'no world "mars"; --world is quickstart or whole.'),
    (["--features", "vgg"], 'no features "vgg"; there is pixels-8x8'),
    (["--interval", "0.8"], '--interval is "0.8"; write two numbers from 0 (data) to 1 (noise), the smaller one first'),
    (["--interval", "1,0"], '--interval is "1,0"; write'),
    (["--spacing", "odd"], 'no spacing "odd" for this schedule; there is'),
    (["--trilemma", "--sweep-steps", "5,x"], '--sweep-steps is "5,x"; write numbers'),
    (["--trilemma", "--sweep-steps", "2.5"], "--sweep-steps holds 2.5; steps are whole numbers."),
    (["--trilemma", "--samplers", "magic"], 'no sampler "magic"; there is ddim'),
    (["--trilemma", "--sampler", "lcm"], "--sampler does nothing beside --trilemma, which takes --samplers, --sweep-steps"),
    (["--sweep-steps", "5"], "--sweep-steps does nothing without --trilemma"),
    (["--data", "nowhere"], "nowhere: no such folder"),
])  # fmt: skip
def test_what_the_verb_refuses(refused, folder, tmp_path, args, said):
    assert refused("evaluate", "--model", folder, "--out", tmp_path / "out", *args).startswith(said)
    assert not (tmp_path / "out").exists()


# Of the sweep's lines.


def lines(*points):
    """Lines with this quality, diversity and number of evaluations."""
    return [
        {trilemma.QUALITY[0]: str(q), trilemma.DIVERSITY: str(d), trilemma.SPEED: str(e)}
        for q, d, e in points
    ]


def test_the_front_is_what_nothing_beats():
    rows = lines(
        (0.9, 0.5, 50),
        (0.9, 0.4, 50),
        (0.8, 0.9, 50),
        (0.5, 0.1, 2),
        (0.9, 0.5, 100),
        (0.8, 0.9, 50),
    )
    assert [rows.index(row) for row in trilemma.front(rows)] == [
        0,
        2,
        3,
        2,
    ]  # of two that are equal, both
    with_floor = [row | {f"{trilemma.DIVERSITY} floor": "0.5"} for row in rows]
    assert [with_floor.index(row) for row in trilemma.front(with_floor)] == [
        0,
        3,
    ]  # 0.9 is no better than 0.5 where real pictures have 0.5
    assert (
        trilemma.cheapest(lines((1.0, 0, 50), (0.99, 0, 20), (0.995, 0, 20), (0.98, 0, 5)))[
            trilemma.QUALITY[0]
        ]
        == "0.995"
    )


def test_lines_with_other_columns_share_a_file(tmp_path):
    """Two evaluations with different features, one after the other, into the same folder."""
    one, other = (
        {"sampler": "ddim", "steps": "5", "guidance": "1", name: "0.5"}
        for name in ("kid a", "kid b")
    )
    trilemma.append(trilemma.append(tmp_path / "a.csv", one), other)
    assert trilemma.read(tmp_path / "a.csv") == [one | {"kid b": ""}, {"kid a": ""} | other]


@pytest.mark.parametrize("text", [
    b"x\n1\n",
    b"x\n",
    b"sampler,steps,guidance\nddim,5,1,9\n",
    b"sampler,steps,guidance\nddim,5\n",
    b"sampler,steps,guidance,model\nddim,5,1,mod\xe8le\n",
])  # fmt: skip
def test_a_file_that_is_not_ours_is_left_alone(tmp_path, text):
    (tmp_path / "a.csv").write_bytes(text)
    with pytest.raises(UserError, match=r"a\.csv is not a table of evaluations"):
        trilemma.append(tmp_path / "a.csv", {"sampler": "ddim", "steps": "5", "guidance": "1"})
    assert (tmp_path / "a.csv").read_bytes() == text


def test_the_fingerprint_changes_with_the_weights(model):
    before = trilemma.fingerprint(model)
    assert before == trilemma.fingerprint(model)
    with torch.no_grad():
        model.unet.conv_out.bias += 1e-3
        after = trilemma.fingerprint(model)
        model.unet.conv_out.bias -= 1e-3
    assert before != after
