"""The training loop: resuming bit for bit, Ctrl-C, accumulation, averages, what is said when numbers go bad, and checkpoints nobody should trust."""

import copy
import hashlib
import json
import math
import os
import pickle
import signal
import threading
import weakref
from itertools import count

import pytest
import torch
from torch import nn

from minidiff.errors import UserError
from minidiff.train import EMA, NonFiniteError, TrainConfig, by_bin, seed_of, train
from minidiff.training.resume import checkpoints

STEPS = 12


def net(dtype=torch.float32):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.SiLU(), nn.Linear(8, 4)).to(dtype)


def batches(start):
    """Batch k follows from k alone."""
    for k in count(start):
        yield torch.randn(6, 4, generator=torch.Generator().manual_seed(k))


def noisy_loss(module):
    """A denoising loss in small: noise and a place on the axis are drawn for every example."""

    def loss_fn(x):
        place = torch.rand(len(x))
        noise = torch.randn_like(x)
        return {
            "loss": (module(x + place[:, None] * noise) - noise).pow(2).mean(1),
            "progress": place,
        }

    return loss_fn


def go(loss_fn, module, batches, steps, lr, ema=None, folder=None, resume=False, **how):
    return train(loss_fn, module, batches, TrainConfig(steps, lr, **how), ema, folder, resume)


def newest(folder):
    """What stands in the newest checkpoint."""
    return torch.load(checkpoints(folder)[0], weights_only=True)


class Run:
    """A run of STEPS steps on the toy, stopped after `stop` of them as a kill would: nothing is saved on the way out."""

    def __init__(self, folder, stop=STEPS, resume=False, loss=noisy_loss, **how):
        self.module = net()
        self.ema, self.folder, self.done = EMA(self.module, 0.5), folder, []
        how = (
            dict(steps=STEPS, lr=1e-2, warmup=3, weight_decay=0.1, accumulate=2, save_every=5) | how
        )
        steps = go(
            loss(self.module),
            self.module,
            batches,
            **how,
            ema=self.ema,
            folder=folder,
            resume=resume,
        )
        for step in steps:
            self.done.append(step)
            torch.rand(step.step)  # what the caller does in between is not the run's business
            if step.step == stop:
                break
        steps.close()

    def everything(self):
        """Weights, averages, optimizer and log: all that should not depend on whether the run was interrupted."""
        state = newest(self.folder)
        moments = [v for s in state["optimizer"]["state"].values() for v in s.values()]
        tensors = [
            *self.module.parameters(),
            *self.ema.average.parameters(),
            *state["module"].values(),
            *state["ema"].values(),
            *moments,
        ]
        return [
            state["step"],
            (self.folder / "log.jsonl").read_text(),
            *(t.detach().numpy().tobytes() for t in tensors),
        ]


@pytest.mark.parametrize("stop", [5, 8], ids=["at a checkpoint", "between checkpoints"])
def test_killed_and_resumed_is_uninterrupted_bit_for_bit(tmp_path, stop):
    whole = Run(tmp_path / "whole").everything()
    first = Run(tmp_path / "parts", stop=stop)
    assert newest(first.folder)["step"] == 5
    second = Run(tmp_path / "parts", resume=True)
    assert [step.step for step in second.done] == list(
        range(5, STEPS + 1)
    )  # the step of the checkpoint once more
    assert second.everything() == whole


def test_resuming_a_finished_run_does_nothing_and_a_fresh_one_starts_over(tmp_path):
    whole = Run(tmp_path)
    again = Run(tmp_path, resume=True)
    assert again.done == whole.done[-1:] and again.everything() == whole.everything()
    assert (
        len(Run(tmp_path, stop=2).done) == 2
        and len((tmp_path / "log.jsonl").read_text().splitlines()) == 2
    )


def test_resuming_without_a_checkpoint_starts_at_the_beginning(tmp_path):
    assert Run(tmp_path / "a", resume=True).everything() == Run(tmp_path / "b").everything()


def test_another_seed_is_another_run(tmp_path):
    a, b = Run(tmp_path / "a"), Run(tmp_path / "b", seed=1)
    assert a.done[0].loss != b.done[0].loss
    assert len({seed_of(seed, step) for seed in range(20) for step in range(2000)}) == 20 * 2000


def test_log_says_what_the_caller_saw(tmp_path):
    run = Run(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == [step._asdict() for step in run.done]
    assert list(lines[0]) == ["step", "loss", "bins", "lr", "grad_norm", "parts"] and [
        line["step"] for line in lines
    ] == list(range(1, STEPS + 1))


@pytest.fixture
def foreground():
    """Python's own answer to Ctrl-C: a process started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupting(times, at=7):
    """Ctrl-C, once or twice, in the middle of the at-th step (of two batches each)."""

    def loss(module):
        plain, calls = noisy_loss(module), count(1)

        def loss_fn(x):
            if next(calls) == 2 * at:
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)
            return plain(x)

        return loss_fn

    return loss


def test_ctrl_c_saves_and_the_run_resumes(tmp_path, foreground):
    with pytest.raises(KeyboardInterrupt):
        Run(tmp_path / "parts", loss=interrupting(1))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert newest(tmp_path / "parts")["step"] == 7  # the step was finished first
    assert Run(tmp_path / "parts", resume=True).everything() == Run(tmp_path / "whole").everything()


def test_a_second_ctrl_c_does_not_wait(tmp_path, foreground):
    with pytest.raises(KeyboardInterrupt):
        Run(tmp_path / "parts", loss=interrupting(2))
    assert newest(tmp_path / "parts")["step"] == 5
    assert Run(tmp_path / "parts", resume=True).everything() == Run(tmp_path / "whole").everything()


def test_ctrl_c_while_the_caller_has_the_last_step_is_not_lost(foreground):
    module = net()
    steps = go(noisy_loss(module), module, batches, 1, 1e-2)
    next(steps)
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        next(steps)


def test_training_works_outside_the_main_thread(tmp_path):
    runs = []
    thread = threading.Thread(target=lambda: runs.append(Run(tmp_path / "thread")))
    thread.start()
    thread.join()
    assert runs[0].everything() == Run(tmp_path / "main").everything()


def test_two_half_batches_are_one_whole_batch():
    """The same gradient, so the same weights, loss and learning rate, up to the order of additions in float64."""
    data = torch.randn(10, 8, 4, dtype=torch.float64)

    def run(pieces):
        module = net(torch.float64).eval()
        module[1].p = 0.0  # no dropout: it would draw other masks

        def loss_fn(x):
            return {"loss": (module(x) - x.flip(1)).pow(2).mean(1)}

        parts = [part for batch in data for part in batch.chunk(pieces)]
        done = list(
            go(loss_fn, module, lambda start: parts[start:], 10, 1e-2, warmup=3, accumulate=pieces)
        )
        return torch.cat([p.detach().flatten() for p in module.parameters()]), torch.tensor(
            [(s.loss, s.lr, s.grad_norm) for s in done]
        )

    (weights1, numbers1), (weights2, numbers2) = run(1), run(2)
    torch.testing.assert_close(weights2, weights1, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(numbers2, numbers1, rtol=1e-5, atol=0)  # losses are logged in fp32


def test_threads_give_the_numbers_of_one_after_the_other():
    """Parts differentiated at once add up in their own order: the same bits, however the threads were scheduled."""

    def run(threads):
        module = net().eval()
        module[1].p = 0.0  # all that is random comes with the batch

        def loss_fn(x):
            return {"loss": (module(x) - x.flip(1)).pow(2).mean(1)}

        done = list(go(loss_fn, module, batches, 10, 1e-2, warmup=3, accumulate=4, threads=threads))
        return torch.cat([p.detach().flatten() for p in module.parameters()]), [
            (s.loss, s.grad_norm) for s in done
        ]

    cores = torch.get_num_threads()
    (weights1, numbers1), (weights2, numbers2), (weights3, numbers3) = run(1), run(2), run(3)
    assert numbers2 == numbers3 == numbers1
    assert torch.equal(weights2, weights1) and torch.equal(weights3, weights1)
    assert torch.get_num_threads() == cores


def test_threads_pass_errors_on():
    module = net()

    def loss_fn(x):
        raise ValueError("no such picture")

    with pytest.raises(ValueError, match="no such picture"):
        next(go(loss_fn, module, batches, 10, 1e-2, accumulate=2, threads=2))


def test_ema_formula():
    """average <- d average + (1 - d) weight, d = min(decay, step / (step + 9)): 0.1 at first, the full decay from step 81 on."""
    module = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    ema, expected = EMA(module, 0.9), module.weight.item()
    for step in range(1, 101):
        module.weight.data.fill_(math.sin(step))
        ema.update(step)
        d = min(0.9, step / (step + 9))
        expected = d * expected + (1 - d) * math.sin(step)
        assert abs(ema.average.weight.item() - expected) < 1e-14
    assert d == 0.9 and not ema.average.weight.requires_grad and not ema.average.training


def test_every_step_of_a_run_moves_the_average():
    """After each step the average is the formula's, of the weights so far: train has updated it once."""
    module = net()
    ema, expected = EMA(module, 0.9), [p.detach().clone() for p in module.parameters()]
    for done in go(noisy_loss(module), module, batches, 5, 1e-2, ema=ema, warmup=0):
        d = min(0.9, done.step / (done.step + 9))
        expected = [
            d * e + (1 - d) * p.detach() for e, p in zip(expected, module.parameters(), strict=True)
        ]
        for average, value in zip(ema.average.parameters(), expected, strict=True):
            torch.testing.assert_close(average, value, rtol=1e-5, atol=1e-7)  # fp32


def test_learning_rate_curve(tmp_path):
    def learning_rate(k, steps, lr, warmup, schedule="cosine"):
        return TrainConfig(steps, lr, warmup, schedule).learning_rate(k)

    assert [learning_rate(k, 100, 1.0, 10) for k in (0, 4, 9, 10)] == [0.1, 0.5, 1.0, 1.0]
    assert [learning_rate(k, 100, 1.0, 10, "constant") for k in (0, 4, 9, 10, 99)] == [
        0.1,
        0.5,
        1.0,
        1.0,
        1.0,
    ]
    for k, share in ((10, 0.0), (40, 1 / 3), (55, 0.5), (100, 1.0)):
        assert abs(learning_rate(k, 100, 2.0, 10) - (1 + math.cos(math.pi * share))) < 1e-15
    assert (
        learning_rate(0, 5, 1.0, 0) == 1.0 and learning_rate(4, 5, 1.0, 100) == 0.05
    )  # no warm-up; nothing but warm-up
    for accumulate in (1, 2):  # counted in optimizer steps, not in batches
        assert [s.lr for s in Run(tmp_path, accumulate=accumulate).done] == [
            learning_rate(k, STEPS, 1e-2, 3) for k in range(STEPS)
        ]


def test_only_matrices_decay():
    module = net(torch.float64)
    before = [p.detach().clone() for p in module.parameters()]
    list(
        go(
            lambda x: {"loss": 0 * module(x.double()).mean(1)},
            module,
            batches,
            1,
            0.1,
            warmup=0,
            weight_decay=0.5,
        )
    )
    for p, old in zip(module.parameters(), before, strict=True):
        torch.testing.assert_close(
            p.detach(), old * (1 - 0.1 * 0.5) if p.ndim > 1 else old, rtol=1e-15, atol=0
        )


def test_gradients_are_clipped_and_the_norm_before_is_reported(tmp_path):
    """Adam's first moment after one step is (1 - 0.9) times the gradient it was given."""
    module = net()
    (step,) = go(
        lambda x: {"loss": 1000 * module(x).pow(2).mean(1)},
        module,
        batches,
        1,
        1e-3,
        clip=0.5,
        folder=tmp_path,
    )
    moments = newest(tmp_path)["optimizer"]["state"].values()
    given = sum((m["exp_avg"] / 0.1).pow(2).sum().item() for m in moments) ** 0.5
    assert step.grad_norm > 100 and abs(given - 0.5) < 1e-5  # fp32


def test_by_bin():
    loss, places = (
        torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0]),
        [torch.tensor([0.0, 0.05, 0.1]), torch.tensor([0.999, 1.0])],
    )
    assert by_bin(loss, [{"progress": place} for place in places]) == [2.0, 5.0, *[None] * 7, 8.0]
    assert by_bin(loss, [{"progress": torch.tensor([0.5])}, {}]) == [None] * 10


@pytest.mark.parametrize(
    "how, complaint",
    [
        (dict(steps=0), "steps is 0; it must be at least 1"),
        (dict(lr=0.0), "lr is 0; it must be above 0"),
        (dict(lr=math.nan), "lr is nan; it must be above 0"),
        (dict(warmup=-1), "warmup is -1; it must be at least 0"),
        (dict(accumulate=0), "accumulate is 0"),
        (dict(threads=0), "threads is 0"),
        (dict(pieces=0), "pieces is 0"),
        (dict(save_every=0), "save_every is 0"),
        (dict(betas=(0.9, 1.0)), r"betas are \(0.9, 1.0\); both must be from 0 to below 1"),
        (dict(weight_decay=-0.1), "weight_decay is -0.1; it must be 0 or above"),
        (dict(clip=math.nan), "clip is nan; it must be above 0"),
        (dict(lr_schedule="linear"), 'no lr_schedule "linear"; there is cosine, constant'),
        (dict(optimizer="sgd"), 'no optimizer "sgd"; there is adamw, adamw8bit'),
        (
            dict(autocast=torch.float64),
            "autocast is torch.float64; it must be torch.bfloat16, torch.float16 or None",
        ),
    ],
)
def test_a_config_that_cannot_be_is_refused(how, complaint):
    with pytest.raises(UserError, match=complaint):
        TrainConfig(**(dict(steps=1, lr=1e-2) | how))
    with pytest.raises(AttributeError):
        TrainConfig(1, 1e-2).lr = 1.0


def test_what_else_the_loss_names_is_reported_by_its_mean(tmp_path):
    """A loss that sums two groups, and how it is split between them; over all batches of a step."""
    module = net().eval()

    def loss_fn(x):
        each = module(x).pow(2).mean(1)
        return {
            "loss": (each[:2].mean() + each[2:].mean())[None],
            "subject": each[:2],
            "class": each[2:],
        }

    with torch.no_grad():
        first = [loss_fn(x) for x, _ in zip(batches(0), range(2), strict=False)]
    module[1].p = 0.0
    step = next(go(loss_fn, module, batches, 3, 1e-2, accumulate=2, folder=tmp_path))
    for name in ("subject", "class"):
        assert step.parts[name] == pytest.approx(
            torch.cat([each[name] for each in first]).mean().item(), rel=1e-6
        )  # fp32
    assert list(step.parts) == ["subject", "class"] and step.loss == pytest.approx(
        sum(step.parts.values()), rel=1e-6
    )
    assert json.loads((tmp_path / "log.jsonl").read_text())["parts"] == step.parts


def test_pieces_are_no_part_of_what_a_run_is(tmp_path):
    """Each batch whole, or in two pieces one after another: the k-th batch is the k-th batch, and one resumes the other."""

    def cut(start):
        for batch in batches(start):
            yield from batch.chunk(2)

    def run(folder, data, pieces, stop=6, resume=False):
        module = net().double().eval()
        module[1].p = 0.0

        def loss_fn(x):
            return {"loss": (module(x.double()) - x.double().flip(1)).pow(2).mean(1)}

        for step in go(
            loss_fn,
            module,
            data,
            6,
            1e-2,
            folder=folder,
            resume=resume,
            accumulate=2,
            pieces=pieces,
            save_every=3,
        ):
            if step.step == stop:
                break
        return torch.cat([p.detach().flatten() for p in module.parameters()])

    whole = run(tmp_path / "whole", batches, 1)
    run(tmp_path / "parts", cut, 2, stop=4)
    torch.testing.assert_close(
        run(tmp_path / "parts", batches, 1, resume=True), whole, rtol=1e-10, atol=1e-12
    )


class Divides(nn.Module):
    by = 1.0

    def forward(self, x):
        return x / self.by


def test_nan_stops_and_names_the_first_bad_module(tmp_path):
    """Everything after the culprit is bad too, and so is every module around it; the innermost first one is named."""
    divides = Divides()
    module = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.SiLU(), divides), nn.Linear(4, 4))

    def loss_fn(k):
        divides.by = 0.0 if k == 3 else 1.0
        return {"loss": module(torch.ones(2, 4)).mean(1)}

    steps = go(loss_fn, module, count, 10, 1e-2, folder=tmp_path)
    assert [next(steps).step for _ in range(3)] == [1, 2, 3]
    before = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(
        NonFiniteError, match=r'step 4: the output of "1\.1" is the first that is not finite'
    ):
        next(steps)
    assert all(
        torch.equal(p, old) for p, old in zip(module.parameters(), before, strict=True)
    )  # the bad step was not taken
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3 and not any(
        m._forward_hooks for m in module.modules()
    )


def test_bad_gradient_and_bad_weight_are_named():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1, bias=False))
    with pytest.raises(NonFiniteError, match=r'step 1: the gradient of "0\.weight" is not finite'):
        next(
            go(lambda x: {"loss": (0 * module(x)).sqrt().mean(1)}, module, batches, 1, 1e-2)
        )  # sqrt is steep at 0
    module[1].weight.data[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r'the weight "1\.weight" is not finite'):
        next(go(lambda x: {"loss": module(x).mean(1)}, module, batches, 1, 1e-2))


def test_gradients_left_over_from_before_do_not_count():
    runs = []
    for leftover in (False, True):
        module = net()
        if leftover:
            module(torch.ones(1, 4)).sum().backward()
        list(go(noisy_loss(module), module, batches, 2, 1e-2))
        runs.append([p.detach() for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_overflow_in_low_precision_is_found_in_low_precision():
    """70,000 does not fit into float16; in float32 there would be nothing to find."""
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    nn.init.constant_(module[0].weight, 7e4)
    with pytest.raises(NonFiniteError, match='the output of "0" is the first'):
        next(
            go(
                lambda x: {"loss": module(x.abs() + 1).mean(1)},
                module,
                batches,
                1,
                1e-2,
                autocast=torch.float16,
            )
        )


def test_autocast_computes_in_bfloat16_and_keeps_float32_weights(tmp_path):
    seen = set()

    def loss(module):
        module[0].register_forward_hook(lambda m, x, y: seen.add(y.dtype))
        return noisy_loss(module)

    run = Run(tmp_path, loss=loss, autocast=torch.bfloat16)
    assert seen == {torch.bfloat16}
    assert (
        {p.dtype for p in run.module.parameters()}
        == {torch.float32}
        == {p.dtype for p in run.ema.average.parameters()}
    )
    plain = Run(tmp_path)
    assert all(
        0 < abs(a.loss - b.loss) < 0.05 * b.loss for a, b in zip(run.done, plain.done, strict=True)
    )  # bfloat16: 3 digits


def loud(module):
    """Its gradients overflow in float16 until their scale has been halved ten times or so."""

    def loss_fn(x):
        return {"loss": 1e3 * (module(x) - x).pow(2).mean(1)}

    return loss_fn


def test_a_step_in_float16_that_overflows_is_skipped(tmp_path):
    """With a smaller scale the next ones do not; the scale is resumed, bit for bit."""
    how = dict(loss=loud, autocast=torch.float16, accumulate=1, steps=24)
    whole = Run(tmp_path / "whole", stop=24, **how)
    overflowed = [step.step for step in whole.done if not math.isfinite(step.grad_norm)]
    assert overflowed == list(range(1, len(overflowed) + 1)) and 2 < len(overflowed) < 20
    assert all(math.isfinite(step.loss) for step in whole.done)
    untouched = Run(tmp_path / "first", stop=1, **how)
    for weight, start in zip(untouched.module.parameters(), net().parameters(), strict=True):
        assert torch.equal(weight, start)
    first = newest(tmp_path / "whole")["scaler"]["scale"]
    assert first == 2.0 ** (16 - len(overflowed))

    Run(tmp_path / "half", stop=6, **how)
    state = newest(tmp_path / "half")
    assert state["step"] == 5 and state["scaler"]["scale"] == 2.0**11
    resumed = Run(tmp_path / "half", stop=24, resume=True, **how)
    assert resumed.done[-1] == whole.done[-1]
    assert_equal = zip(resumed.module.parameters(), whole.module.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in assert_equal)


def test_gradients_that_no_scale_makes_finite_are_an_error():
    module = net()
    steps = go(
        lambda x: {"loss": (0 * module(x)).sqrt().mean(1)},
        module,
        batches,
        40,
        1e-2,
        autocast=torch.float16,
    )
    with pytest.raises(NonFiniteError, match=r'step 17: the gradient of "0.weight" is not finite'):
        list(steps)


def test_a_run_goes_on_in_float16(tmp_path):
    """The precision may change on resume; a checkpoint without a scale begins with a new one."""
    Run(tmp_path, stop=6)
    assert "scaler" not in newest(tmp_path)
    assert len(Run(tmp_path, resume=True, autocast=torch.float16).done) == STEPS - 4


@pytest.mark.parametrize("native", [True, False])
def test_bf16_that_the_processor_imitates_is_warned_of(monkeypatch, native, recwarn):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native, raising=False)
    module = net()
    list(go(noisy_loss(module), module, batches, 1, 1e-2, autocast=torch.bfloat16))
    assert [str(one.message) for one in recwarn if "bf16" in str(one.message)] == (
        []
        if native
        else [
            "this processor does not compute in bf16, and imitates it slowly; fp32 is many times faster"
        ]
    )


def test_the_average_shares_what_is_frozen():
    """And is saved and restored whole."""
    module = net()
    module[0].requires_grad_(False)
    ema = EMA(module, 0.5)
    first, last = ema.average[0].weight, ema.average[-1].weight
    assert first is module[0].weight and last is not module[-1].weight
    assert len(ema.averages) == len(ema.weights) == 2 and len(ema.average.state_dict()) == 4
    list(go(noisy_loss(module), module, batches, 3, 1e-2, ema=ema))
    assert not torch.equal(last, module[-1].weight) and not ema.average[-1].weight.requires_grad
    plain = net()  # the average of a copy that shares nothing
    plain[0].requires_grad_(False)
    whole = EMA(plain, 0.5)
    whole.average[0] = copy.deepcopy(plain[0])
    list(go(noisy_loss(plain), plain, batches, 3, 1e-2, ema=whole))
    for name, value in whole.average.state_dict().items():
        assert torch.equal(value, ema.average.state_dict()[name])


class Code:
    """A pickle that runs a command when it is read."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


NEWEST = "checkpoint-000005.pt"


def bigger(folder):
    state = newest(folder)
    state["module"]["0.weight"] = torch.zeros(9, 9)
    torch.save(state, folder / NEWEST)
    (folder / f"{NEWEST}.sha256").unlink()


def cut(folder):
    data = (folder / NEWEST).read_bytes()
    (folder / NEWEST).write_bytes(data[: len(data) // 2])


def flipped(folder):
    """One bit of one number: as a zip file it would pass."""
    data = bytearray((folder / NEWEST).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / NEWEST).write_bytes(data)


def replaced(content):
    """A checkpoint by somebody else, who can write checksums too."""

    def spoil(folder):
        (folder / f"{NEWEST}.sha256").unlink()
        content(folder)

    return spoil


DAMAGED = (
    "damaged, or no checkpoint of minidiff, and there is no other; start afresh in another folder"
)


@pytest.mark.parametrize(
    "spoil, how, complaint",
    [
        (lambda folder: None, dict(seed=1), "is of a run with seed 0, not 1"),
        (lambda folder: None, dict(steps=13), "is of a run with steps 12, not 13"),
        (lambda folder: None, dict(lr=2e-2), "is of a run with lr 0.01, not 0.02"),
        (lambda folder: None, dict(warmup=4), "is of a run with warmup 3, not 4"),
        (
            lambda folder: None,
            dict(betas=(0.9, 0.999)),
            r"is of a run with betas \(0.9, 0.99\), not \(0.9, 0.999\)",
        ),
        (
            lambda folder: None,
            dict(lr_schedule="constant"),
            "is of a run with lr_schedule cosine, not constant",
        ),
        (lambda folder: None, dict(accumulate=1), "is of a run with accumulate 2, not 1"),
        (bigger, {}, r"does not fit this run \(size mismatch for 0.weight"),
        (cut, {}, DAMAGED),
        (flipped, {}, DAMAGED),
        (replaced(lambda folder: (folder / NEWEST).write_bytes(b"")), {}, DAMAGED),
        (replaced(lambda folder: (folder / NEWEST).write_text("hello")), {}, DAMAGED),
        (replaced(lambda folder: torch.save([1, 2], folder / NEWEST)), {}, DAMAGED),
        (
            replaced(
                lambda folder: torch.save(
                    {"step": 1, "module": Code(folder / "ran")}, folder / NEWEST
                )
            ),
            {},
            DAMAGED,
        ),
        (
            replaced(
                lambda folder: (folder / NEWEST).write_bytes(
                    pickle.dumps(Code(folder / "ran"), protocol=2)
                )
            ),
            {},
            DAMAGED,
        ),
    ],
    ids=[
        "seed",
        "steps",
        "lr",
        "warmup",
        "betas",
        "schedule",
        "accumulate",
        "shape",
        "cut",
        "bit",
        "empty",
        "text",
        "list",
        "code",
        "plain pickle",
    ],
)
def test_bad_checkpoints_are_refused_in_one_line(tmp_path, spoil, how, complaint):
    Run(tmp_path, stop=5)
    spoil(tmp_path)
    with pytest.raises(UserError, match=complaint) as refused:
        Run(tmp_path, resume=True, **how)
    assert "\n" not in str(refused.value) and str(tmp_path / NEWEST) in str(refused.value)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_without_averages_does_not_fit_a_run_with_them(tmp_path):
    module = net()
    list(
        go(
            noisy_loss(module),
            module,
            batches,
            STEPS,
            1e-2,
            warmup=3,
            weight_decay=0.1,
            accumulate=2,
            folder=tmp_path,
        )
    )
    with pytest.raises(UserError, match="does not fit this run"):
        Run(tmp_path, resume=True)


def test_a_failed_save_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch):
    Run(tmp_path / "parts", stop=5)
    before = (tmp_path / "parts" / NEWEST).read_bytes()

    def full_disk(state, file):
        file.write_bytes(b"half of it")
        raise OSError("no space left on device")

    complaint = r"checkpoint-000010.pt: step 10 could not be saved \(no space left on device\); the checkpoint before it is whole"
    with monkeypatch.context() as patch, pytest.raises(UserError, match=complaint):
        patch.setattr(torch, "save", full_disk)
        Run(tmp_path / "parts", resume=True)
    assert (tmp_path / "parts" / NEWEST).read_bytes() == before
    assert sorted(file.name for file in (tmp_path / "parts").iterdir()) == [
        NEWEST,
        f"{NEWEST}.sha256",
        "log.jsonl",
    ]
    assert Run(tmp_path / "parts", resume=True).everything() == Run(tmp_path / "whole").everything()


def test_the_last_two_checkpoints_are_kept(tmp_path):
    Run(tmp_path)
    names = [f"checkpoint-{step:06d}.pt" for step in (10, 12)]
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(
        [*names, *(f"{name}.sha256" for name in names), "log.jsonl"]
    )
    for name in names:
        digest, file = (tmp_path / f"{name}.sha256").read_text().split()
        assert (digest, file) == (hashlib.sha256((tmp_path / name).read_bytes()).hexdigest(), name)


@pytest.mark.parametrize("spoil", [cut, flipped])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, spoil, monkeypatch):
    """Said in one line; and what is damaged never counts as one of the last two."""
    monkeypatch.setitem(globals(), "NEWEST", "checkpoint-000010.pt")
    Run(tmp_path / "parts", stop=11)
    spoil(tmp_path / "parts")
    with pytest.warns(
        UserWarning,
        match=r"checkpoint-000010.pt is damaged; going on from checkpoint-000005.pt, at step 5\.$",
    ):
        Run(tmp_path / "parts", stop=7, resume=True)
    with pytest.warns(UserWarning):
        assert (
            Run(tmp_path / "parts", resume=True).everything()
            == Run(tmp_path / "whole").everything()
        )
    for file in (tmp_path / "parts").glob("checkpoint-*.pt"):
        file.write_bytes(b"")
    with pytest.raises(
        UserError, match=rf"checkpoint-000012.pt and .*checkpoint-000010.pt: {DAMAGED}"
    ):
        Run(tmp_path / "parts", resume=True)


@pytest.mark.parametrize("accumulate", [1, 2], ids=["as now", "pieces counted as batches"])
def test_a_checkpoint_of_the_last_version_is_resumed(tmp_path, accumulate):
    """It was called checkpoint.pt, had no checksum, and knew five numbers of the run."""
    Run(tmp_path / "parts", stop=5)
    state = newest(tmp_path / "parts")
    run = {name: state["run"][name] for name in ("seed", "steps", "lr", "warmup")} | {
        "accumulate": accumulate
    }
    for file in checkpoints(tmp_path / "parts"):
        file.unlink()
    torch.save(
        {name: state[name] for name in ("step", "module", "optimizer", "ema")} | {"run": run},
        tmp_path / "parts" / "checkpoint.pt",
    )
    assert Run(tmp_path / "parts", resume=True).everything() == Run(tmp_path / "whole").everything()
    assert not (tmp_path / "parts" / "checkpoint.pt").exists()


def test_a_log_that_is_cut_is_cut_whole_or_not_at_all(tmp_path, monkeypatch):
    Run(tmp_path, stop=8)
    before = (tmp_path / "log.jsonl").read_text()
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(InterruptedError))
        Run(tmp_path, resume=True)
    assert (tmp_path / "log.jsonl").read_text() == before and len(before.splitlines()) == 8


def test_gradients_are_gone_before_the_next_step():
    """They are as large as the weights: those of the last step must not stand beside those of this one."""
    module, last = net(), []

    def loss_fn(x):
        assert not any(gone() is not None for gone in last)
        return {"loss": module(x).pow(2).mean(1)}

    for p in module.parameters():
        p.register_post_accumulate_grad_hook(
            lambda p: last.append(weakref.ref(p.grad.untyped_storage()))
        )
    assert len(list(go(loss_fn, module, batches, 3, 1e-3))) == 3 and len(last) == 12
