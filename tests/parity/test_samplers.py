"""Whole trajectories of every sampler against diffusers' schedulers: the same network, the same noise, the same times.

diffusers keeps its tables and some of its sums in fp32, and over 1000 steps that shows. Here its own code computes in float64 (`in_float64`), so
that only the order of roundings differs: 1e-10, relative to the state's size, at every step.
"""

import importlib
import types

import numpy as np
import pytest
import torch

from minidiff import schedules
from minidiff.denoiser import Denoiser
from minidiff.methods.ddim_inversion import invert
from minidiff.samplers import (
    ddim,
    ddpm,
    dpmpp_2m,
    dpmpp_2m_sde,
    euler,
    euler_ancestral,
    heun,
    lcm,
    sample,
    unipc,
)

from ..noise import from_one

diffusers = pytest.importorskip("diffusers")
STEPS = [1, 2, 3, 10, 50, 1000]
DIVISORS = [
    1,
    2,
    10,
    50,
    1000,
]  # for DDIM and DDPM: elsewhere diffusers' stride is not the distance of its own times
TARGETS = [("eps", "epsilon"), ("v", "v_prediction"), ("x0", "sample")]
SCHEDULE, SD = (
    schedules.scaled_linear(),
    dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
)


class Net(torch.nn.Module):
    """A fixed nonlinear function of x and of the time it is shown."""

    def forward(self, x, t, context=None):
        return torch.sin(3 * x) * 0.5 + 0.3 * x * (1 + t.to(x).view(-1, 1, 1, 1) / 1000)


@pytest.fixture
def in_float64(monkeypatch):
    """A scheduler whose code reads float64 wherever it says float32."""

    def scheduler(name, module, **config):
        home = importlib.import_module(f"diffusers.schedulers.{module}")
        for library in (torch, np):
            double = types.SimpleNamespace(**{**vars(library), "float32": library.float64})
            monkeypatch.setattr(home, library.__name__.replace("numpy", "np"), double)
        return getattr(home, name)(**(config if "Flow" in name else SD | config))

    before = torch.get_default_dtype()  # of an integer times 10.0
    torch.set_default_dtype(torch.float64)
    yield scheduler
    torch.set_default_dtype(before)


def cases(counts, targets=2):
    """(steps, target, their name of it): all numbers of steps for eps, two for the others."""
    return [
        (n, *target)
        for target in TARGETS[:targets]
        for n in counts
        if target[0] == "eps" or n in (2, 10)
    ]


def normal(seed):
    return torch.randn(
        2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def close(ours, theirs, tolerance=1e-10):
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() / b.abs().max() < tolerance


def grid(theirs):
    """The times of a scheduler that was set, in our count, where clean data is 0."""
    return torch.cat([theirs.timesteps + 1, torch.zeros(1, dtype=theirs.timesteps.dtype)])


def ours(target, times, step, schedule=SCHEDULE):
    return [
        frame.x
        for frame in sample(
            Denoiser(Net(), schedule, target),
            schedule,
            normal(0),
            times,
            step,
            noise=from_one(generator()),
        )
    ]


def generator():
    return torch.Generator().manual_seed(1)


def their_ddim(scheduler, eta):
    x, z = normal(0), generator()
    states = [x]
    for t in scheduler.timesteps:
        x = scheduler.step(Net()(x, t.expand(2)), t, x, eta=eta, generator=z).prev_sample
        states.append(x)
    return states


@pytest.mark.parametrize("steps, target, theirs", cases(DIVISORS, targets=3))
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim(in_float64, target, theirs, steps, eta):
    scheduler = in_float64(
        "DDIMScheduler",
        "scheduling_ddim",
        prediction_type=theirs,
        clip_sample=False,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(steps)
    expected = their_ddim(scheduler, eta)
    close(ours(target, SCHEDULE.timesteps(steps), ddim(eta)), expected)


@pytest.mark.parametrize("steps, target, theirs", cases(DIVISORS))
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_published_ddim_stops_at_alpha_bar_1(in_float64, target, theirs, steps, eta):
    """Stable Diffusion's settings; euler, which does not stop there, differs."""
    scheduler = in_float64(
        "DDIMScheduler",
        "scheduling_ddim",
        prediction_type=theirs,
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="leading",
        steps_offset=1 if steps < 1000 else 0,
    )
    scheduler.set_timesteps(steps)
    expected = their_ddim(scheduler, eta)
    schedule = schedules.Discrete("scaled_linear", 1000, 0.00085, 0.012, final=1)
    times = schedule.timesteps(steps, "leading")
    assert torch.equal(times, grid(scheduler))
    close(ours(target, times, ddim(eta), schedule), expected)
    if eta == 0:
        assert (ours(target, times, euler(), schedule)[-1] - expected[-1]).abs().max() > 1e-3


@pytest.mark.parametrize("steps, target, prediction", cases(DIVISORS))
def test_ddpm(in_float64, steps, target, prediction):
    scheduler = in_float64(
        "DDPMScheduler",
        "scheduling_ddpm",
        prediction_type=prediction,
        clip_sample=False,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(steps)
    x, z = normal(0), generator()
    expected = [x]
    for t in scheduler.timesteps:
        x = scheduler.step(Net()(x, t.expand(2)), t, x, generator=z).prev_sample
        expected.append(x)
    close(
        ours(target, grid(scheduler), ddpm()), expected, 1e-9
    )  # they keep variances at 1e-20 or above: noise of 1e-10 at the end


SIGMA = [  # diffusers walks x / alpha for these; Karras' grid visits times between levels, where sigma is interpolated
    (
        "EulerDiscreteScheduler",
        "scheduling_euler_discrete",
        {"timestep_spacing": "trailing"},
        lambda: euler(),
        STEPS,
    ),
    (
        "EulerDiscreteScheduler",
        "scheduling_euler_discrete",
        {"use_karras_sigmas": True},
        lambda: euler(),
        [2, 3, 10, 50],
    ),
    (
        "EulerAncestralDiscreteScheduler",
        "scheduling_euler_ancestral_discrete",
        {"timestep_spacing": "trailing"},
        lambda: euler_ancestral(),
        STEPS,
    ),
    (
        "HeunDiscreteScheduler",
        "scheduling_heun_discrete",
        {"timestep_spacing": "trailing"},
        lambda: heun(),
        STEPS,
    ),
]


@pytest.mark.parametrize(
    "name, module, config, step, steps, target, prediction",
    [(*row, *case) for *row, counts in SIGMA for case in cases(counts)],
)
def test_methods_in_sigma(in_float64, name, module, config, step, steps, target, prediction):
    scheduler = in_float64(name, module, prediction_type=prediction, **config)
    scheduler.set_timesteps(steps)
    times = grid(scheduler).unique().flip(0)  # Heun's method lists a time for each evaluation
    alpha = SCHEDULE.alpha_sigma(times)[0]
    x, z = normal(0) / alpha[0], generator()
    expected = [x]
    for k, t in enumerate(scheduler.timesteps, start=1):
        out = Net()(scheduler.scale_model_input(x, t), t.expand(2))
        x = scheduler.step(
            out, t, x, **({"generator": z} if "Ancestral" in name else {})
        ).prev_sample
        if getattr(scheduler, "state_in_first_order", True) or k == len(
            scheduler.timesteps
        ):  # Heun's method halts halfway, but for the last time
            expected.append(x)
    expected = [a * b for a, b in zip(alpha, expected, strict=True)]
    close(ours(target, times, step()), expected)


@pytest.mark.parametrize("steps, target, prediction", cases(STEPS, targets=3))
@pytest.mark.parametrize(
    "kind, step",
    [("dpmsolver++", dpmpp_2m), ("sde-dpmsolver++", dpmpp_2m_sde)],
)
def test_dpm_solver(in_float64, kind, step, steps, target, prediction):
    scheduler = in_float64(
        "DPMSolverMultistepScheduler",
        "scheduling_dpmsolver_multistep",
        prediction_type=prediction,
        algorithm_type=kind,
        timestep_spacing="trailing",
    )  # its linspace visits 501 twice in 1000 steps
    scheduler.set_timesteps(steps)
    x, z = normal(0), generator()
    expected = [x]
    for t in scheduler.timesteps:
        x = scheduler.step(Net()(x, t.expand(2)), t, x, generator=z).prev_sample
        expected.append(x)
    close(ours(target, grid(scheduler), step()), expected)


@pytest.mark.parametrize("steps, target, prediction", cases(STEPS))
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_unipc(in_float64, variant, steps, target, prediction):
    scheduler = in_float64(
        "UniPCMultistepScheduler",
        "scheduling_unipc_multistep",
        prediction_type=prediction,
        solver_type=variant,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(steps)
    x = normal(0)
    expected = [x]
    for t in scheduler.timesteps:
        x = scheduler.step(Net()(x, t.expand(2)), t, x).prev_sample
        expected.append(x)
    if (
        variant == "bh1"
    ):  # B(h) = h is infinite where s is clean, and diffusers multiplies it by 0: its last state is all nan
        assert expected[-1].isnan().all()
        expected[-1] = scheduler.model_outputs[-1]  # x0: a step of first order to clean data
    close(ours(target, grid(scheduler), unipc(variant)), expected)


@pytest.mark.parametrize(
    "steps, target, prediction", cases([1, 2, 3, 10, 50])
)  # it has 50 steps at most, those it was distilled for
def test_lcm(in_float64, steps, target, prediction):
    scheduler = in_float64(
        "LCMScheduler", "scheduling_lcm", prediction_type=prediction, clip_sample=False
    )
    scheduler.set_timesteps(steps)
    x, z = normal(0), generator()
    expected = [x]
    for t in scheduler.timesteps:
        x = scheduler.step(Net()(x, t.expand(2)), t, x, generator=z).prev_sample
        expected.append(x)
    close(ours(target, grid(scheduler), lcm()), expected)


def test_flow_euler_equals_diffusers():
    scheduler, schedule, net = diffusers.FlowMatchEulerDiscreteScheduler(), schedules.Flow(), Net()
    scheduler.set_timesteps(sigmas=schedule.timesteps(20)[:-1].tolist())
    x = x_T = normal(0)
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t.double().expand(2)), t, x).prev_sample
    *_, last = sample(Denoiser(net, schedule, "flow"), schedule, x_T, 20, ddim())
    assert (last.x0 - x).abs().max() / x.abs().max() < 2e-6  # their times and sums are fp32


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50])
@pytest.mark.parametrize(
    "name, module, config, step",
    [
        ("FlowMatchHeunDiscreteScheduler", "scheduling_flow_match_heun_discrete", {}, heun),
        ("DPMSolverMultistepScheduler", "scheduling_dpmsolver_multistep", FLOW, dpmpp_2m),
        ("UniPCMultistepScheduler", "scheduling_unipc_multistep", FLOW, unipc),
    ],
)
def test_higher_orders_on_a_flow(in_float64, name, module, config, step, steps):
    """On their times, of which the multistep methods' begin a little short of pure noise; ours need not."""
    scheduler = in_float64(name, module, **config)
    scheduler.set_timesteps(steps)
    times = scheduler.sigmas.unique().flip(0)
    x = normal(0)
    expected = [x]
    for k, (t, named) in enumerate(
        zip(scheduler.sigmas, scheduler.timesteps, strict=False), start=1
    ):  # named: sometimes rounded
        x = scheduler.step(Net()(x, 1000 * t.expand(2)), named, x).prev_sample
        if getattr(scheduler, "state_in_first_order", True) or k == len(scheduler.timesteps):
            expected.append(x)
    close(ours("flow", times, step(), schedules.Flow()), expected)


@pytest.mark.parametrize("steps", [1, 10, 50])
def test_ddim_inversion_is_the_published_one(in_float64, steps):
    """Stable Diffusion's settings, from clean data to noise."""
    schedule = schedules.Discrete("scaled_linear", 1000, 0.00085, 0.012, final=1)
    scheduler = in_float64(
        "DDIMInverseScheduler",
        "scheduling_ddim_inverse",
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="leading",
        steps_offset=1,
    )
    scheduler.set_timesteps(steps)
    x, expected = normal(0), [normal(0)]
    for t in scheduler.timesteps:
        x = scheduler.step(Net()(x, t.expand(2)), t, x).prev_sample
        expected.append(x)
    denoise = Denoiser(Net(), schedule, "eps")
    frames = invert(denoise, schedule, normal(0), steps, "leading")
    close([frame.x for frame in frames], expected)
