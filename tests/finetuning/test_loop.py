"""Fine-tuning: the loss over groups, what is trained, runs that are killed, disks that are full, and what is said of bad input."""

import json
import math
import os
import subprocess
import sys
import warnings
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import nn

from minidiff import load, schedules
from minidiff.checkpoints import lora as lora_files
from minidiff.conditioners import ClassLabels, LabelsConfig
from minidiff.data.latents import Example
from minidiff.denoiser import Denoiser
from minidiff.errors import UserError
from minidiff.exercises import checks
from minidiff.finetuning import estimate
from minidiff.finetuning.estimate import Settings
from minidiff.finetuning.groups import Group, GroupLoss, batches, pieces, split
from minidiff.finetuning.loop import averaged, check, finetune, settle, shares, targets, to_train
from minidiff.finetuning.recorder.recorder import Recorder
from minidiff.finetuning.run import best_folder, check_weights, write
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.losses import LEVELS, LR_MULTIPLIER
from minidiff.methods import lora
from minidiff.options.finetuning import FineTuneConfig, LoRAConfig
from minidiff.text import CLIPText, TextConfig
from minidiff.train import EMA
from minidiff.training.resume import checkpoints
from minidiff.unet import UNet, UNetConfig
from minidiff.vae import VAE, VAEConfig

NAMES = ["a cat", "a dog"]


def tiny(target="eps", weighting=None, text=None, **how):
    """A model of 20,000 numbers; its random weights are such that no branch starts at zero."""
    torch.manual_seed(3)
    unet = UNet(UNetConfig(4, 4, (8, 16), 1, (0, 1), (1, 2), 8, groups=4, **how))
    for p in unet.parameters():
        nn.init.normal_(p, std=0.1)
    vae, text = (
        VAE(VAEConfig(3, 4, (8, 8), 1, groups=0)),
        text or ClassLabels(LabelsConfig(NAMES, 8)),
    )
    return LatentDiffusion(
        vae, text, Denoiser(unet, schedules.linear(), target, weighting), 16
    ).eval()


def examples(n, seed=0, shape=(4, 8, 8)):
    generator = torch.Generator().manual_seed(seed)
    return [Example(torch.randn(shape, generator=generator), NAMES[i % 2]) for i in range(n)]


def two_groups():
    return [Group("subject", examples(3, 1)), Group("class", examples(5, 2), 0.7)]


def run(out, model=None, groups=None, recorder=None, resume=False, **how):
    how = dict(steps=6, lr=1e-3, every=2, warmup=2, batch=2) | how
    how["lora"] = LoRAConfig(**{name: how.pop(name) for name in ("rank",) if name in how})
    groups = groups or [Group("data", examples(6))]
    return finetune(model or tiny(), groups, out, FineTuneConfig(**how), recorder, resume)


class Recording(Recorder):
    """A recorder that only calls back."""

    def __init__(self, call, best=None):
        self.call, self.best = call, lambda: best

    def measure(self, step, losses, lr=None):
        self.call(step, losses)

    def due(self, step):
        return step % 2 == 0

    def last(self):
        return None


def stop_at_4(step, losses):
    if step == 4:
        raise InterruptedError


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def moved(before, model):
    return {
        name
        for name, value in model.state_dict().items()
        if name not in before or not torch.equal(before[name], value)
    }


# Batches.


def test_a_batch_follows_from_its_number_alone():
    groups, schedule = two_groups(), schedules.linear()
    whole = list(islice(batches(groups, schedule, 2, 0.3, 0, 0), 12))
    later = list(islice(batches(groups, schedule, 2, 0.3, 0, 7), 5))
    for a, b in zip(whole[7:], later, strict=True):
        for p, q in zip(a, b, strict=True):
            assert p.captions == q.captions and all(
                torch.equal(getattr(p, name), getattr(q, name)) for name in ("latents", "t", "eps")
            )
    other = next(batches(groups, schedule, 2, 0.3, 1, 0))
    assert not torch.equal(other[0].eps, whole[0][0].eps)
    assert [(part.group, part.weight, len(part.captions)) for part in whole[0]] == [
        ("subject", 1.0, 2),
        ("class", 0.7, 2),
    ]


def test_captions_are_hidden_as_often_as_asked():
    for dropout, least, most in (
        (0.0, 0, 0),
        (0.25, 160, 240),
    ):  # of 800; three standard deviations
        found = islice(
            batches([Group("data", examples(8))], schedules.linear(), 8, dropout, 0, 0), 100
        )
        assert (
            least <= sum(caption == "" for batch in found for caption in batch[0].captions) <= most
        )


def test_every_batch_is_of_one_shape_and_every_picture_is_met():
    group = Group("data", examples(5) + examples(3, 9, (4, 4, 16)))
    found = [
        part
        for batch in islice(batches([group], schedules.linear(), 2, 0.0, 0, 0), 5)
        for part in batch
    ]
    rows = [z for part in found for z in part.latents]
    assert all(
        any(torch.equal(e.latents, z) for z in rows) for e in group.examples
    )  # ceil(5 / 2) + ceil(3 / 2) batches are an epoch
    assert {tuple(part.latents.shape) for part in found} == {(2, 4, 8, 8), (2, 4, 4, 16)}


def test_split_is_seeded_and_rounds_down():
    kept, held = split(range(20), 0.1, 0)
    assert len(held) == 2 and sorted(kept + held) == list(range(20))
    assert split(range(20), 0.1, 0) == (kept, held) != split(range(20), 0.1, 1)
    assert split(range(5), 0.1, 0) == ([0, 1, 2, 3, 4], [])


def test_an_image_with_several_captions_is_held_out_with_all_of_them():
    images = [f"{k // 5}.png" for k in range(100)]
    training, held_out = split(images, 0.1, 0)
    assert sorted(training + held_out) == list(range(100)) and len(held_out) == 10
    assert not {images[i] for i in training} & {images[i] for i in held_out}


# The loss.


@pytest.mark.equation("dreambooth-2")
def test_loss_of_groups_is_the_sum_it_claims_to_be():
    model = tiny().double()
    groups = [
        Group(g.name, [Example(e.latents.double(), e.caption) for e in g.examples], g.weight)
        for g in two_groups()
    ]
    for batch in islice(batches(groups, model.schedule, 2, 0.2, 0, 0), 5):
        batch = [part._replace(eps=part.eps.double()) for part in batch]
        checks.loss_of_groups_is_the_sum_it_claims_to_be(model, batch)


def test_groups_of_different_shapes_take_a_pass_each():
    model, groups = (
        tiny(),
        [Group("subject", examples(2)), Group("class", examples(2, 5, (4, 4, 16)), 0.5)],
    )
    batch = next(batches(groups, model.schedule, 2, 0.0, 0, 0))
    each = GroupLoss(model)(batch)["loss"]
    first, second = (GroupLoss(model)([part._replace(weight=1.0)])["loss"].mean() for part in batch)
    assert torch.equal(each[0], first + 0.5 * second)


def test_the_losses_of_pieces_are_those_of_the_whole():
    """The same examples with the same noise; the mean of the pieces' losses is the loss."""
    model = tiny().double()
    groups = [
        Group(g.name, [Example(e.latents.double(), e.caption) for e in g.examples], g.weight)
        for g in two_groups()
    ]
    batch = [
        part._replace(eps=part.eps.double())
        for part in next(batches(groups, model.schedule, 4, 0.2, 0, 0))
    ]
    whole, parts = GroupLoss(model)(batch), [GroupLoss(model)(piece) for piece in pieces(batch, 2)]
    for name, value in whole.items():
        torch.testing.assert_close(
            torch.cat([part[name] for part in parts]).mean(), value.mean(), rtol=1e-12, atol=0
        )


def test_loss_of_one_group_is_each_example_s_and_says_where():
    model = tiny()
    batch = next(batches([Group("data", examples(6))], model.schedule, 4, 0.0, 0, 0))
    (part,) = batch
    contexts = {name: model.text.encode([name])[0] for name in ("", *NAMES)}
    found = GroupLoss(model, contexts)(batch)
    each, where = found["loss"], found["progress"]
    assert torch.equal(found["data"], each)
    assert torch.equal(
        each, model.denoiser.loss(part.latents, model.text.encode(part.captions), part.t, part.eps)
    ) and each.shape == (4,)
    assert torch.equal(where, part.t.double() / 1000)


@pytest.mark.parametrize(
    "target, published",
    [
        ("eps", lambda snr: snr.clamp(max=5) / snr),
        ("v", lambda snr: snr.clamp(max=5) / (snr + 1)),
        ("x0", lambda snr: snr.clamp(max=5)),
    ],
)
def test_min_snr_weighs_the_output_s_error_as_published(target, published, tmp_path):
    """Hang et al. section 3.4, for each target: the weight of || target - F ||^2. The squared error is 1 where F misses every number by 1."""
    schedule, t = schedules.linear(), torch.tensor([1, 50, 200, 250, 600, 1000])
    x0, eps = (
        torch.randn(6, 1, 2, 2, dtype=torch.float64),
        torch.randn(6, 1, 2, 2, dtype=torch.float64),
    )
    alpha, sigma = (scale.view(-1, 1, 1, 1) for scale in schedule.alpha_sigma(t))
    right = {"eps": eps, "v": alpha * eps - sigma * x0, "x0": x0}[target]

    class Misses(nn.Module):
        def forward(self, x, t, context):
            return right + 1

    found = Denoiser(Misses(), schedule, target, "min-snr").loss(x0, None, t, eps)
    torch.testing.assert_close(
        found, published((alpha / sigma).pow(2).flatten()), rtol=1e-9, atol=0
    )


def test_min_snr_is_what_the_switch_turns_on(tmp_path):
    logs = []
    for on in (False, True):
        run(tmp_path / str(on), min_snr=on, steps=1, batch=8)
        logs.append(json.loads((tmp_path / str(on) / "training" / "log.jsonl").read_text())["loss"])
    batch = next(batches([Group("data", examples(6))], schedules.linear(), 8, 0.1, 0, 0))
    model = tiny()
    weighted = Denoiser(model.unet, model.schedule, "eps", "min-snr")
    for logged, denoiser in zip(logs, (model.denoiser, weighted), strict=True):
        assert logged == pytest.approx(
            GroupLoss(model, None, denoiser)(batch)["loss"].mean().item(), rel=1e-5
        )
    assert (
        logs[0] != logs[1] and load(tmp_path / "True" / "model").denoiser.weighting == "eps"
    )  # the model stays what it was


def test_learned_weighting_begins_at_its_optimum():
    """u = log of the mean error in each stretch of t, so that every stretch's loss is 1 + u."""
    model = tiny("x0", "learned")
    data = list(islice(batches([Group("data", examples(16))], model.schedule, 64, 0.0, 0, 0), 10))
    with torch.no_grad():
        settle(model.denoiser, GroupLoss(model), iter(data), count=640)
        u = LR_MULTIPLIER * model.denoiser.log_error
        losses = [GroupLoss(model)(batch) for batch in data]
        each, where = zip(*((loss["loss"], loss["progress"]) for loss in losses), strict=True)
    level = (torch.cat(where) * LEVELS).long().clamp(max=LEVELS - 1)
    for k in range(LEVELS):
        assert (
            torch.cat(each)[level == k].mean() - (1 + u[k])
        ).abs() < 1e-5  # of 20 numbers or more in fp32
    assert u.abs().max() > 0.01


# What is trained.


def test_full_trains_the_unet_and_nothing_else(tmp_path):
    model = tiny()
    before = weights(model)
    run(tmp_path, model)
    found = moved(before, model)
    assert found and all(name.startswith("denoiser.network.") for name in found)
    again = load(tmp_path / "model")
    assert all(
        torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items()
    )


def test_with_text_the_text_encoder_learns_too(tmp_path):
    model = tiny()
    before = weights(model)
    run(tmp_path, model, text=True)
    assert "text.embedding.weight" in moved(before, model) and not any(
        name.startswith("vae") for name in moved(before, model)
    )


def test_lora_trains_a_and_b_alone_and_writes_what_load_reads(tmp_path):
    model, fresh = tiny(), tiny()
    before = weights(model)
    run(tmp_path, model, method="lora", rank=2)
    assert moved(before, model) and all(".lora." in name for name in moved(before, model))
    assert lora_files.load(fresh, tmp_path / "lora.safetensors").moved > 0
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([100, 900])
    for a, b in zip(
        model.denoiser(x, t, model.text.encode(NAMES)),
        fresh.denoiser(x, t, fresh.text.encode(NAMES)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # the file has alpha / rank in B
    state = torch.load(checkpoints(tmp_path / "training")[0], weights_only=True)
    assert sum(v.numel() for v in state["module"].values()) == sum(
        p.numel() for p in lora.state(model).values()
    )  # no frozen weight in it


def test_lora_on_text_and_on_named_layers(tmp_path):
    text = CLIPText(TextConfig(8, 1, 1, context_length=8))
    model = tiny(text=text)
    config = FineTuneConfig(method="lora", lora=LoRAConfig(2, layers="conv1"), text=True)
    trained = to_train(model, model.denoiser, config)
    names = set(lora.adapted(model))
    assert {name.rsplit(".", 1)[-1] for name in names if name.startswith("denoiser")} == {"conv1"}
    assert {name.rsplit(".", 1)[-1] for name in names if name.startswith("text")} == set(
        lora.ATTENTION
    )
    assert sum(p.numel() for p in trained.parameters()) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )


def test_lora_goes_where_a_unet_reads_the_text():
    config = FineTuneConfig(method="lora")
    assert targets(tiny().unet, config) == lora.ATTENTION
    assert targets(tiny(pooled=True).unet, config) == (*lora.ATTENTION, "pool", "conv1", "conv2")


def test_the_noise_levels_trained_on_can_be_chosen(tmp_path, monkeypatch):
    """t comes from the distribution asked for, and is a part of the run; a schedule that draws sigma has none to choose."""
    times, drawn = [], batches

    def spied(*how):
        for batch in drawn(*how):
            times.extend(batch[0].t.tolist())
            yield batch

    monkeypatch.setattr("minidiff.finetuning.loop.batches", spied)
    run(tmp_path / "a", t_mean=3.0, t_std=0.1, batch=8)
    middle = 1000 / (1 + math.exp(-3))
    assert len(times) >= 48 and all(abs(t - middle) < 50 for t in times)
    with pytest.raises(UserError, match="t_mean"):
        run(tmp_path / "a", t_mean=2.0, t_std=0.1, batch=8, resume=True)
    model = tiny()
    model.denoiser.schedule = schedules.Karras()
    with pytest.raises(
        UserError, match="t_mean and t_std cannot be chosen for a schedule of the kind Karras"
    ):
        run(tmp_path / "b", model, t_mean=2.0, t_std=0.1)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_weights_that_advice_goes_back_to_are_kept(method, tmp_path):
    """Of steps 2, 4, 6 the recorder likes 2, then 4, then none: what lies there at the end is what the recorder saw at step 4, and only that."""

    def trained(model):
        layers = {name.replace(".", "-"): layer.lora for name, layer in lora.adapted(model).items()}
        return weights(nn.ModuleDict(layers) if layers else model.unet)

    def look(step, losses):
        recorder.best, seen[step] = lambda: likes[step], trained(model)

    model, seen, likes = tiny(), {}, {0: None, 2: 2, 4: 4, 6: 4}
    recorder = Recording(look)
    run(tmp_path / "a", model, method=method, ema=0.9, recorder=recorder)
    assert [folder.name for folder in (tmp_path / "a").glob("best*")] == ["best_step_4"]
    folder, found = best_folder(tmp_path / "a", 4), tiny()
    if method == "full":
        found = LatentDiffusion.load(folder / "model")
    else:
        lora_files.load(found, folder / "lora.safetensors")
    assert all(torch.equal(value, trained(found)[name]) for name, value in seen[4].items())
    assert any(not torch.equal(value, seen[6][name]) for name, value in seen[4].items())
    model, likes[6] = tiny(), 6
    run(tmp_path / "b", model, method=method, ema=0.9, recorder=recorder)
    assert not list((tmp_path / "b").glob("best*"))  # the last step's weights are the run's


def test_average_is_what_is_written_and_what_the_recorder_sees(tmp_path):
    seen, model = [], tiny()

    run(
        tmp_path,
        model,
        ema=0.9,
        recorder=Recording(lambda step, losses: seen.append((step, losses, weights(model)))),
    )
    state = torch.load(checkpoints(tmp_path / "training")[0], weights_only=True)
    name = "0.network.conv_in.weight"
    assert (
        [step for step, _, _ in seen] == [0, 2, 4, 6]
        and seen[0][1] == {}
        and list(seen[1][1]) == ["data"]
    )
    assert not torch.equal(state["ema"][name], state["module"][name])
    for found in (model.unet.conv_in.weight, seen[-1][2]["denoiser.network.conv_in.weight"]):
        assert torch.equal(found, state["ema"][name])
    log = [
        json.loads(line)["loss"]
        for line in (tmp_path / "training" / "log.jsonl").read_text().splitlines()
    ]
    assert seen[-1][1]["data"] == pytest.approx(
        (log[4] + log[5]) / 2, rel=1e-5
    )  # the mean since the last record


def test_averages_are_taken_out_again():
    module = nn.Linear(2, 2)
    ema, before = EMA(module, 0.5), weights(module)
    ema.averages[0].fill_(7.0)
    with averaged(ema):
        assert (module.weight == 7).all()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_bf16_checkpointing_and_accumulation(tmp_path):
    """bfloat16 computes in three digits and keeps float32 weights; checkpointing changes no bit; a step is all its batches."""
    plain = run(tmp_path / "plain", steps=2)
    again = run(tmp_path / "checkpointing", steps=2, checkpointing=True)
    assert again.unet.checkpointing and not moved(weights(plain), again)
    seen, model = set(), tiny()
    model.unet.conv_in.register_forward_hook(lambda m, x, y: seen.add(y.dtype))
    run(tmp_path / "bf16", model, steps=2, dtype="bf16")
    assert (
        seen == {torch.bfloat16}
        and {p.dtype for p in model.parameters()} == {torch.float32}
        and moved(weights(plain), model)
    )
    losses = []
    for name, how in (("two", dict(batch=2, accumulate=2)), ("one", dict(batch=2, accumulate=1))):
        run(tmp_path / name, steps=1, **how)
        losses.append(json.loads((tmp_path / name / "training" / "log.jsonl").read_text())["loss"])
    data = islice(batches([Group("data", examples(6))], schedules.linear(), 2, 0.1, 0, 0), 2)
    each = [GroupLoss(tiny())(batch)["loss"].mean().item() for batch in data]
    assert losses == pytest.approx([sum(each) / 2, each[0]], rel=1e-5)


def test_a_half_precision_model_trains_in_float32(tmp_path):
    model = tiny().half()
    run(tmp_path, model)
    assert {p.dtype for p in model.unet.parameters()} == {torch.float32}


def test_cores_share_a_batch_by_pictures_where_that_is_safe():
    model = tiny()
    assert [shares(model, model.unet, batch) for batch in (1, 2, 3, 4)] == [1, 2, 1, 2]
    assert (
        shares(tiny(dropout=0.1), model.unet, 4) == 1
    )  # two threads would draw masks in any order
    assert shares(model, nn.Linear(50_000, 1001, device="meta"), 4) == 1


# Interrupted runs.

KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from tests.finetuning.test_loop import run, two_groups
torch.set_num_threads(1)
out, kills = Path(sys.argv[1]), int(sys.argv[2])
how = dict(groups=two_groups(), method="lora", rank=2, steps=24, ema=0.9, every=3)
run(out / "whole", **how)
log, dice = out / "killed" / "training" / "log.jsonl", random.Random(5)
for moment in [*sorted(dice.sample(range(22), kills)), None]:
    child = os.fork()
    if not child:
        sys.stderr = open(os.devnull, "w")
        run(out / "killed", resume=True, **how)
        os._exit(0)
    if moment is not None:
        while not log.exists() or log.read_bytes().count(b"\\n") <= moment:
            time.sleep(0.001)
        time.sleep(dice.uniform(0, 0.02))  # before, while or after the step's checkpoint is written
        os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (0 if moment is None else -signal.SIGKILL)
"""


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_any_moment_and_resumed_is_uninterrupted_bit_for_bit(tmp_path, kills):
    """kill -9 leaves no time to save; a killed run may be killed again before it has made up for what was lost."""
    subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path, str(kills)],
        check=True,
        timeout=200,
        cwd=Path(__file__).parents[2],
    )
    files = [(tmp_path / kind / "lora.safetensors").read_bytes() for kind in ("whole", "killed")]
    assert files[0] == files[1]
    logs = [
        (tmp_path / kind / "training" / "log.jsonl").read_text() for kind in ("whole", "killed")
    ]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) == 24


def test_resuming_a_full_run_is_uninterrupted_bit_for_bit(tmp_path):
    whole = run(tmp_path / "whole", text=True, min_snr=True)
    with pytest.raises(InterruptedError):
        run(tmp_path / "parts", text=True, min_snr=True, recorder=Recording(stop_at_4))
    parts = run(tmp_path / "parts", text=True, min_snr=True, resume=True)
    assert not moved(weights(whole), parts)
    assert not moved(
        weights(whole), run(tmp_path / "parts", text=True, min_snr=True, resume=True)
    )  # it was done already: written again


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of a run that came to its end."""
    run(folder := tmp_path_factory.mktemp("done"), steps=6)
    return folder


@pytest.mark.parametrize(
    "change, complaint",
    [
        (dict(steps=7), "with steps 6, not 7"),
        (dict(lr=2e-3), "with lr 0.001, not 0.002"),
        (dict(batch=4), "with batch 2, not 4"),
        (dict(seed=1), "with seed 0, not 1"),
        (dict(ema=0.9), "with ema None, not 0.9"),
        (dict(method="lora"), "with method full, not lora"),
        (dict(model=tiny("v")), "from a model with another denoiser"),
        (
            dict(model=tiny(text=ClassLabels(LabelsConfig(NAMES, 8)).requires_grad_(False))),
            "from a model with another text encoder",
        ),
        (
            dict(groups=[Group("data", examples(6)[:5])]),
            r'of "data" there were 6 images, now 5; the first difference is "a dog"',
        ),
        (
            dict(groups=[Group("data", [*examples(5), examples(1, 8)[0]])]),
            r'of "data" there were 6 images, now 6; the first difference is "a dog"',
        ),
        (dict(groups=[Group("data", examples(6), 0.5)]), "the first difference is weight 1"),
        (dict(groups=[Group("data", examples(6)[::-1])]), "are in another order"),
    ],
)
def test_another_run_is_not_resumed(done, change, complaint):
    before = {file: file.read_bytes() for file in done.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match=complaint) as refused:
        run(done, resume=True, **change)
    assert "run.json" in str(refused.value) and "another `out`" in str(refused.value)
    assert {file: file.read_bytes() for file in done.rglob("*") if file.is_file()} == before


def test_a_run_is_not_written_over(done):
    with pytest.raises(
        UserError,
        match="holds a training already; pass `resume` to go on with it, or another `out`",
    ):
        run(done)


def old(settings):
    """The settings of a run.json as the version before this one wrote them."""
    names = "method steps lr batch accumulate warmup every text dropout min_snr ema dtype optimizer"
    old = {name: settings[name] for name in [*names.split(), "seed"]}
    old |= {name: settings[name] for name in ("rank", "alpha", "layers") if name in settings}
    old |= {"levels": [settings["t_mean"], settings["t_std"]]}
    return old | {name: settings[name] for name in ("word", "word_lr", "like") if name in settings}


def test_a_run_of_the_last_version_goes_on(tmp_path):
    text = CLIPText(TextConfig(8, 1, 1, context_length=8))
    how = dict(method="lora", rank=2, t_mean=1.0, t_std=2.0, word="cat", word_lr=1e-2, like="dog")
    with pytest.raises(InterruptedError):
        run(tmp_path, tiny(text=text), recorder=Recording(stop_at_4), **how)
    file = tmp_path / "run.json"
    before = json.loads(file.read_text())
    weights = before["weights"]
    weights = {"VAE": weights["VAE"], "text tower": weights.pop("text encoder")} | weights
    before |= {"settings": old(before["settings"]), "weights": weights}
    file.write_text(json.dumps(before, indent=1) + "\n")
    with pytest.raises(UserError, match=r"with t_mean 1\.0, not 1\.5; resume it with `t_mean=1.0`"):
        run(tmp_path, tiny(text=text), resume=True, **how | {"t_mean": 1.5})
    run(tmp_path, tiny(text=text), resume=True, **how)
    assert (tmp_path / "lora.safetensors").exists()


FULL = """
import resource, sys
from pathlib import Path
import torch
from minidiff.cli import console
from tests.finetuning.test_loop import run
torch.set_num_threads(1)
out, limit = Path(sys.argv[1]), int(sys.argv[2])
with console.one_line("minidiff"):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    run(out, resume=True, steps=8)
"""


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path):
    """No file may grow beyond half of what a checkpoint takes: as where the disk is full."""
    whole = run(tmp_path / "whole", steps=8)
    need = checkpoints(tmp_path / "whole" / "training")[0].stat().st_size

    with pytest.raises(InterruptedError):
        run(tmp_path / "parts", steps=8, recorder=Recording(stop_at_4))
    before = checkpoints(tmp_path / "parts" / "training")[0].read_bytes()
    script = [sys.executable, "-c", FULL, tmp_path / "parts", str(need // 2)]
    ended = subprocess.run(
        script, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    said = ended.stderr.splitlines()[-1]
    assert (
        ended.returncode == 2
        and said.startswith("minidiff: ")
        and "checkpoint-000006.pt: step 6 could not be saved" in said
        and "resume" in said
    )
    assert "Traceback" not in ended.stderr and not [
        file for pattern in ("*.new", ".*") for file in tmp_path.rglob(pattern)
    ]
    assert checkpoints(tmp_path / "parts" / "training")[0].read_bytes() == before
    assert not moved(weights(whole), run(tmp_path / "parts", steps=8, resume=True))


def test_a_result_that_cannot_be_written_can_be_later(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match=r"model could not be written .*No space left.*`resume`"),
    ):
        patch.setattr(
            os,
            "replace",
            lambda a, b, real=os.replace: full() if Path(b).name == "model" else real(a, b),
        )
        run(tmp_path)
    assert not moved(weights(run(tmp_path / "whole")), run(tmp_path, resume=True))


# The command line.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten captioned pictures, half of them wide, and a model of their size that reads words."""
    from PIL import Image

    place = tmp_path_factory.mktemp("data")
    for k in range(10):
        Image.effect_noise((32, 16) if k % 2 else (16, 16), 50 + k).convert("RGB").save(
            place / f"{k}.png"
        )
    lines = [
        json.dumps({"file_name": f"{k}.png", "text": f"a picture of {k}"}) + "\n" for k in range(10)
    ]
    (place / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    tiny(text=CLIPText(TextConfig(8, 1, 1, context_length=8))).save(place / "model")
    return place


BRIEF = ("--steps", 2, "--every", 2, "--batch", 2)


@pytest.fixture
def forecasts(monkeypatch):
    """What was asked of estimate.forecast, which takes seconds and has tests of its own."""
    asked = []
    monkeypatch.setattr(
        estimate,
        "forecast",
        lambda model, how, steps, more: (
            asked.append((how._replace(recorder=None), steps)) or "memory: some"
        ),
    )
    return asked


def test_finetune_from_the_command_line(folder, tmp_path, ran, forecasts):
    said = ran(
        "finetune", "--model", folder / "model", "--data", folder, "--out", tmp_path, *BRIEF
    ).out
    assert (
        "9 pictures to train on, 1 held out, 16x16 pixels\nmemory: some\n" in said
        and forecasts == [(Settings(2, (16, 16), pieces=2, background=True), 2)]
    )
    assert f"minidiff generate 'a picture of 0' --model {tmp_path / 'model'}" in said
    assert "--to diffusers" not in said  # other tools have no word for a VAE without GroupNorm
    assert {file.name for file in tmp_path.iterdir()} >= {
        "model",
        "report.html",
        "run.json",
        "training",
        "cache",
        "record.jsonl",
    }
    assert moved(weights(load(folder / "model")), load(tmp_path / "model"))
    assert len((tmp_path / "record.jsonl").read_text().splitlines()) == 2
    command = next(
        line.split("minidiff ", 1)[1] for line in said.splitlines() if "generate" in line
    )
    ran(
        *command.replace("'a picture of 0'", "x").split(), "--steps", 1, "--out", tmp_path / "drawn"
    )
    with pytest.raises(SystemExit):
        ran("finetune", "--model", folder / "model", "--data", folder, "--out", tmp_path, *BRIEF)
    again = ran(
        "finetune",
        "--model",
        folder / "model",
        "--data",
        folder,
        "--out",
        tmp_path,
        *BRIEF,
        "--resume",
    ).out
    assert str(tmp_path / "model") in again


def test_a_lora_of_wide_and_mirrored_pictures_and_its_commands(folder, tmp_path, ran, forecasts):
    said = ran(
        "finetune",
        "--model",
        folder / "model",
        "--data",
        folder,
        "--out",
        tmp_path,
        *BRIEF,
        "--method",
        "lora",
        "--rank",
        2,
        "--buckets",
        "--flip",
        "--validation",
        0,
        "--text",
        "--dtype",
        "bf16",
        "--ema",
        0.9,
        "--checkpointing",
        "--accumulate",
        2,
    ).out
    assert "10 pictures to train on, 0 held out" in said
    assert forecasts == [
        (
            Settings(
                2,
                (16, 16),
                rank=2,
                text=True,
                bf16=True,
                ema=True,
                checkpointing=True,
                accumulate=2,
                pieces=2,
                background=True,
            ),
            2,
        )
    ]
    lines = dict(line.split(": ", 1) for line in said.splitlines() if "minidiff " in line)
    assert lines["draw with it"].endswith(
        f"--model {folder / 'model'} --lora {tmp_path / 'lora.safetensors'}"
    )
    convert = lines["one model of both"].split()
    ran(*convert[1:])
    assert load(tmp_path / "merged").size == 16
    data = json.loads((tmp_path / "run.json").read_text())["data"]["data"]
    assert (
        len(data) == 1 + 20 and len(set(data)) == 21
    )  # a weight; every picture and its mirror image


def test_without_a_recorder(folder, tmp_path, ran, forecasts):
    """No report and no measurement; and a word's vector is trained beside a LoRA."""
    word = ("--method", "lora", "--word", "sks", "--word-lr", 1e-2)
    said = ran(
        *("finetune", "--model", folder / "model", "--data", folder, "--out", tmp_path),
        *(*BRIEF, *word, "--no-recorder"),
    ).out
    files = {file.name for file in tmp_path.iterdir()}
    assert {"lora.safetensors", "embedding.safetensors"} < files
    assert not {"report.html", "record.jsonl", "grids"} & files and "draw with it" in said


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["--alpha", 0], "--alpha is 0; it must be above 0"),
        (["--method", "inversion"], "say which (--word)"),
        (["--word", "zwx"], "is 2 tokens of the vocabulary"),
        (["--method", "half"], 'no method "half"; there is full, lora'),
        (["--rank", 0], "--rank is 0; it must be at least 1"),
        (
            ["--method", "lora", "--layers", "nose"],
            "no layer is named nose; names of this network end in",
        ),
        (["--lr", 0], "lr is 0; it must be above 0"),
        (["--lr", "nan"], "lr is nan; it must be above 0"),
        (["--steps", 0], "steps is 0; it must be at least 1"),
        (["--batch", 0], "batch is 0"),
        (["--every", 0], "every is 0"),
        (["--accumulate", 0], "accumulate is 0"),
        (["--warmup", -1], "warmup is -1; it must be at least 0"),
        (["--ema", 1], "ema is 1; it must be between 0 and 1"),
        (["--dropout", 1], "dropout is 1; it must be from 0 to below 1"),
        (["--validation", 1], "--validation is 1; it must be a share"),
        (["--dtype", "fp8"], 'no dtype "fp8"; there is fp32, bf16, fp16'),
        (["--optimizer", "sgd"], 'no optimizer "sgd"; there is adamw, adamw8bit'),
        (["--device", "abacus"], 'no device "abacus"'),
        (["--size", 15], "size 15 is not divisible by 4"),
        (["--seed", -1], "--seed is -1"),
        (["--model", "nowhere"], "nowhere"),
        (["--data", "nowhere"], "nowhere: no such folder"),
        (["--caption-column", "txt"], 'no column "txt"'),
        (["--out", __file__], "is a file; name a folder"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(folder, tmp_path, refused, options, complaint):
    base = {"--model": folder / "model", "--data": folder, "--out": tmp_path / "out", "--steps": 1}
    assert complaint in refused(
        "finetune",
        *(part for pair in base.items() if pair[0] not in options for part in pair),
        *options,
    )
    assert not (tmp_path / "out" / "training").exists()


def test_a_folder_without_captions_and_a_folder_that_is_no_model(folder, tmp_path, refused):
    (tmp_path / "empty").mkdir()
    assert "the folder is empty" in refused(
        "finetune", "--data", tmp_path / "empty", "--out", tmp_path / "out"
    )
    (tmp_path / "empty" / "a.png").write_bytes((folder / "0.png").read_bytes())
    assert "metadata.jsonl: not found" in refused(
        "finetune", "--data", tmp_path / "empty", "--out", tmp_path / "out"
    )
    assert "is no checkpoint: neither model.json" in refused(
        "finetune", "--model", tmp_path / "empty", "--data", folder, "--out", tmp_path / "out"
    )


# Rates, captions, buckets, and weights that are worth nothing.


def test_a_constant_learning_rate_and_one_for_the_text_encoder(tmp_path):
    """Adam's first step is as long as the learning rate, for each weight that has a gradient."""
    text = CLIPText(TextConfig(8, 1, 1, context_length=8))
    model = tiny(text=text)
    before = weights(model)
    how = dict(lr=1e-3, text=True, text_lr=1e-5, steps=1, warmup=0, lr_schedule="constant")
    run(tmp_path, model, **how)
    steps = {name: (before[name] - value).abs().max() for name, value in weights(model).items()}
    assert steps["denoiser.network.conv_in.weight"] == pytest.approx(1e-3, rel=0.01)
    assert steps["text.norm_out.weight"] == pytest.approx(1e-5, rel=0.02)
    assert json.loads((tmp_path / "training/log.jsonl").read_text())["lr"] == 1e-3


def test_a_text_encoder_with_its_own_rate_is_resumed_bit_for_bit(tmp_path):
    how = dict(lr=1e-3, text=True, text_lr=1e-5, method="lora", rank=2)
    text = CLIPText(TextConfig(8, 1, 1, context_length=8)).state_dict()

    def model():
        encoder = CLIPText(TextConfig(8, 1, 1, context_length=8))
        encoder.load_state_dict(text)
        return tiny(text=encoder)

    whole = run(tmp_path / "whole", model(), **how)
    with pytest.raises(InterruptedError):
        run(tmp_path / "parts", model(), recorder=Recording(stop_at_4), **how)
    assert not moved(weights(whole), run(tmp_path / "parts", model(), resume=True, **how))


def test_any_of_several_captions_is_seen_and_follows_from_the_batch():
    several = [e._replace(others=("a cat", "a cow")) for e in examples(2)]
    schedule = schedules.linear()

    def captions(group, start):
        batch = islice(batches([Group("data", group)], schedule, 2, 0.0, 0, start), 20 - start)
        return [parts[0].captions for parts in batch]

    assert {caption for row in captions(several, 0) for caption in row} == {*NAMES, "a cow"}
    assert captions(several, 7) == captions(several, 0)[7:]
    one, other = (next(batches([Group("d", g)], schedule, 2, 0.5, 0, 3)) for g in
                  (examples(2), several))  # fmt: skip
    assert torch.equal(one[0].eps, other[0].eps) and torch.equal(one[0].t, other[0].t)


def test_a_bucket_that_is_seen_more_often_is_named(tmp_path):
    """One wide image among eight squares is in a batch of eight eight times."""
    group = [*examples(8), *examples(1, shape=(4, 4, 16))]
    with pytest.warns(
        UserWarning, match="bucket of 16x4 latents has 1 of the 9 images, .* 8 times"
    ):
        check([Group("data", group)], FineTuneConfig(batch=8), schedules.linear())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check([Group("data", group[:-1])], FineTuneConfig(batch=16), schedules.linear())


def test_what_is_worth_nothing_is_not_written_without_a_word(tmp_path):
    model = tiny()
    lora.add(model.unet, 2)
    with pytest.warns(UserWarning, match="the LoRA is zero and changes nothing"):
        check_weights(model, "lora", None)
    layer = next(iter(lora.adapted(model).values()))
    layer.lora.A.data[0] = math.nan
    with pytest.raises(UserError, match="the trained weights are not finite, and are not written"):
        write(model, "lora", tmp_path, None)
    assert not any(tmp_path.iterdir())
    model = tiny()
    next(model.unet.parameters()).data[0] = math.inf
    with pytest.raises(UserError, match="not finite"):
        write(model, "full", tmp_path, None)


@pytest.mark.parametrize(
    "method, further",
    [
        ("full", "--model {0}/model --out {0}-2"),
        (
            "lora",
            "minidiff convert box {0}/merged --to minidiff --lora {0}/lora.safetensors, "
            "then --model {0}/merged --out {0}-2",
        ),
    ],
)
def test_a_run_that_is_over_says_how_to_go_on(folder, tmp_path, ran, capsys, method, further):
    """It said "resume it with that, or choose another --out": no way on."""
    out = tmp_path / "o"
    base = ("finetune", "--data", folder, "--batch", 2, "--no-recorder", "--every", 1)
    base += ("--method", method, "--out", out, "--steps")
    ran(*base, 1)
    with pytest.raises(SystemExit):
        ran(*base, 2, "--resume")
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "started with steps 1, not 2; resume it with --steps 1, or choose another --out" in said
    assert f"train its result further: {further.format(out)} (without --resume)." in said


def test_a_word_of_everyday_is_not_trained_by_finetune(folder, tmp_path, refused):
    options = ("--method", "inversion", "--word", "dog", "--out", tmp_path / "o")
    assert 'the word "dog" is an everyday one' in refused("finetune", "--data", folder, *options)
