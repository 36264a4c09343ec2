"""docs/_static/train2d.html: its JavaScript computes what minidiff computes, and every control of
the page does what it says, by mouse and keyboard, on a desktop and on a phone."""

import json
import math
import re
import sys
import time

import pytest
import torch
import torch.nn.functional as F

from minidiff.denoiser import Denoiser
from minidiff.methods.exact import Mixture
from minidiff.samplers import euler, sample
from minidiff.schedules import Flow

from .test_docs import ROOT

PAGE = ROOT / "docs" / "_static" / "train2d.html"
CURVES, TARGETS = ("ring", "moons", "spiral"), ("flow", "eps", "x0")
CONTROLS = ("data", "target", "seed", "train", "reset", "play", "t", "steps")


class Tab:
    """The page in a tab of its own; `complaints` are those of the console and of its scripts."""

    def __init__(self, browser, width=1280, height=900, dark=False):
        scheme = "dark" if dark else "light"
        size = {"width": width, "height": height}
        self.context = browser.new_context(
            viewport=size, color_scheme=scheme, has_touch=width < 600, is_mobile=width < 600
        )
        self.context.set_offline(True)
        self.tab = self.context.new_page()
        self.tab.set_default_timeout(60_000)
        self.complaints, self.requests = [], []
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.on("console", lambda message: self.complaints.append(message.text))
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.goto(PAGE.as_uri())

    def run(self, script):
        """The value of a JavaScript expression in the page."""
        return self.tab.evaluate(script)

    def act(self, script):
        """Statements; their value may be large, or a function."""
        self.tab.evaluate(f"{script}; null")

    def wait(self, script, seconds=60):
        """Until the expression is true."""
        end = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < end, f"never true: {script}"
            self.tab.wait_for_timeout(50)


@pytest.fixture
def page(browser):
    page = Tab(browser)
    yield page
    page.context.close()
    assert page.complaints == [] and page.requests == [PAGE.as_uri()]


def points(values):
    return torch.tensor(values, dtype=torch.float64).view(-1, 2)


def flat(x):
    """A tensor as JavaScript."""
    return f"Float64Array.from({json.dumps(x.flatten().tolist())})"


def mixture(page, curve):
    data = page.run(f"(({{means, std}}) => ({{means: [...means], std}}))(mixture('{curve}'))")
    return Mixture(points(data["means"]), data["std"])


def network(page, target):
    """Its 5,506 weights as torch's, and the same function of them."""
    weights = page.run(f"[...(net = new Network('{target}', uniforms(3))).weights]")
    parts, at = [], 0
    for width, out in ((18, 64), (64, 64), (64, 2)):
        for shape in ((width, out), (out,)):
            part = torch.tensor(weights[at : at + math.prod(shape)], dtype=torch.float64)
            parts.append(part.view(shape).requires_grad_())
            at += part.numel()
    assert at == len(weights)
    return parts


def output(parts, x, t):
    waves = torch.cat([math.pi * torch.stack([t / 2, t], 1), x, 2 * x, 4 * x], dim=1)
    h = torch.cat([x, torch.stack([waves.sin(), waves.cos()], dim=2).flatten(1)], dim=1)
    for k in range(3):
        h = (h if k == 0 else F.silu(h)) @ parts[2 * k] + parts[2 * k + 1]
    return h


def test_the_file_is_all_there_is():
    text = PAGE.read_text(encoding="utf-8")
    assert "http:" not in text and "https:" not in text and "default-src 'none'" in text
    assert 'lang="en"' in text and "<noscript>" in text


@pytest.mark.parametrize("curve", CURVES)
def test_the_data_are_scaled_and_those_of_the_experiment(page, curve, monkeypatch):
    data = mixture(page, curve)
    assert data.means.mean(0).abs().max() < 1e-12
    assert (data.means.pow(2).mean() + data.std[0, 0] ** 2).item() == pytest.approx(1, abs=1e-12)
    if curve != "spiral":
        monkeypatch.setattr(sys, "path", [str(ROOT / "experiments"), *sys.path])
        from toy_2d import Curve

        assert torch.allclose(data.means, Curve(curve).means, rtol=0, atol=1e-12)


@pytest.mark.parametrize("curve", CURVES)
def test_the_truth_is_the_mixtures(page, curve):
    """Mean, variance, density and velocity at points from far away, at any time but 0."""
    data, x, t = mixture(page, curve), 2 * torch.randn(50, 2).double(), torch.rand(50).double()
    got = page.run(
        f"(() => {{ const x = {flat(x)}, data = mixture('{curve}');"
        f"return [...{flat(t)}].map((t, i) => {{const p = posterior(data, x[2*i], x[2*i+1], t);"
        "return [...p.x0, p.variance, p.logDensity,"
        "        ...exactVelocity(data, x.slice(2*i, 2*i+2), t)]}) })()"
    )
    exact = data.denoiser(Flow())(x, t)
    expected = torch.cat(
        [
            exact.x0,
            data.posterior_variance(Flow(), x, t)[:, None],
            data.log_likelihood(x, Flow(), t)[:, None],
            exact.eps - exact.x0,
        ],
        dim=1,
    )
    assert torch.allclose(torch.tensor(got, dtype=torch.float64), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("target", TARGETS)
def test_the_least_loss(page, target):
    """At the page's own points it is the mean of minidiff's least errors there; and these points
    stand for what minidiff trains on: its optimal loss, over its times."""
    page.act(f"found = probes(mixture('moons'), '{target}', 16384)")
    x, best = points(page.run("[...found.x]")), points(page.run("[...found.best]"))
    t = torch.tensor(page.run("[...found.t]"), dtype=torch.float64)
    data, denoiser = mixture(page, "moons"), Denoiser(torch.nn.Identity(), Flow(), target)
    exact = data.denoiser(Flow())(x, t)
    assert torch.allclose(best, denoiser.unsolve(exact, t), rtol=1e-9, atol=1e-9)

    factor = {"flow": lambda t: t**-2, "eps": lambda t: (1 / t - 1) ** 2, "x0": torch.ones_like}
    left = factor[target](t) * data.posterior_variance(Flow(), x, t)
    least = page.run("found.least")
    assert least == pytest.approx(left.mean().item(), rel=1e-9)

    x0, t = data.draw(40_000), Flow().sample_t(40_000)
    x = Flow().mix(x0, torch.randn_like(x0), t)
    left = factor[target](t) * data.posterior_variance(Flow(), x, t)
    error = left.std().item() / len(left) ** 0.5
    assert abs(least - left.mean().item()) < 4 * error + 0.002 * least  # chance; the page's points


@pytest.mark.parametrize("target", TARGETS)
def test_the_network_its_gradient_and_adam(page, target):
    """Equal to autograd's gradient and torch's Adam, over three steps; and the velocity is that of
    Denoiser.solve."""
    parts = network(page, target)
    x, goal = torch.randn(21, 2).double(), torch.randn(21, 2).double()
    t = 0.05 + 0.9 * torch.rand(21).double()
    adam = torch.optim.Adam(parts, lr=0.01)
    page.act(f"[x, t, goal] = [{flat(x)}, {flat(t)}, {flat(goal)}]")
    for _ in range(3):
        loss = (output(parts, x, t) - goal).pow(2).mean()
        adam.zero_grad()
        loss.backward()
        got = page.run("net.forward(x, t, 21); net.backward(goal, 21)")
        assert got == pytest.approx(loss.item(), rel=1e-10)
        gradient = torch.cat([part.grad.flatten() for part in parts])
        assert torch.allclose(
            gradient, torch.tensor(page.run("[...net.gradient]"), dtype=torch.float64), atol=1e-6
        )
        adam.step()
        page.act("net.adam(0.01)")
    F_out, time = (
        output(parts, x, torch.full((21,), 0.3, dtype=torch.float64)),
        torch.full((21,), 0.3, dtype=torch.float64),
    )
    solved = Denoiser(torch.nn.Identity(), Flow(), target).solve(x, time, F_out)
    got = points(page.run("[...net.velocity(x, 0.3)]"))
    assert torch.allclose(got, solved.eps - solved.x0, rtol=1e-8, atol=1e-8)


def test_the_gradient_is_that_of_finite_differences(page):
    page.act("net = new Network('flow', uniforms(1)); x = Float64Array.of(1, -0.5, 0.3, 2)")
    page.act("[t, goal] = [Float64Array.of(0.2, 0.9), Float64Array.of(0, 1, -1, 0.5)]")
    worst = page.run(
        "(() => { const loss = () => { net.forward(x, t, 2); return net.backward(goal, 2) };"
        "loss(); const gradient = net.gradient.slice(); let worst = 0;"
        "for (let i = 0; i < net.weights.length; i += 7) { const w = net.weights[i], h = 1e-5;"
        "  net.weights[i] = w + h; const up = loss(); net.weights[i] = w - h; const down = loss();"
        "  net.weights[i] = w;"
        "  worst = Math.max(worst, Math.abs((up - down) / (2 * h) - gradient[i])) }"
        "return worst })()"
    )
    assert worst < 1e-8


@pytest.mark.parametrize("steps", [1, 7, 50])
@pytest.mark.parametrize("target", TARGETS)
def test_the_sampler_is_euler(page, target, steps):
    data, noise = mixture(page, "ring"), torch.randn(30, 2).double()
    page.act(f"times = timesteps({steps}, '{target}'); data = mixture('ring')")
    page.act(f"path = samplePath((x, t) => exactVelocity(data, x, t), {flat(noise)}, times)")
    times = torch.tensor(page.run("times"), dtype=torch.float64)
    if target != "eps":
        assert torch.allclose(times, Flow().timesteps(steps), rtol=0, atol=1e-12)
    frames = [*sample(data.denoiser(Flow()), Flow(), noise, times, euler())]
    got = page.run("path.map((x) => [...x])")
    for frame, x in zip(frames, got, strict=True):
        assert torch.allclose(points(x), frame.x, rtol=1e-9, atol=1e-9)
    halfway = points(page.run("[...positions(path, times, (times[0] + times[1]) / 2)]"))
    assert torch.allclose(halfway, (frames[0].x + frames[1].x) / 2, rtol=1e-9, atol=1e-9)
    if steps == 50:
        assert page.run("strays(data, path.at(-1))") < 0.02


@pytest.mark.parametrize("target, share", [("flow", 0.04), ("eps", 0.08), ("x0", 0.04)])
def test_training_comes_near_the_least_loss(page, target, share):
    """A fifth of the page's training; and the same seed is the same run."""
    page.act(f"run2 = () => {{ const r = new Training('moons', '{target}', 5, 400);"
             "while (r.step < r.steps) r.advance(); return r }")  # fmt: skip
    first, again = (page.run("(r => [r.losses.at(-1), r.gap(probes(r.data, r.target, 2048))])(run2())")
                    for _ in range(2))  # fmt: skip
    least = page.run(f"probes(mixture('moons'), '{target}', 16384).least")
    assert first == again and 0 < first[1] < share * least


def pictures(page):
    names = ("exact", "learnt", "loss", "gap")
    return {name: page.run(f"document.getElementById('{name}').toDataURL()") for name in names}


CHANGES = {
    "data": ("value = 'spiral'", "change", {"exact", "learnt", "loss"}),
    "target": ("value = 'eps'", "change", {"learnt", "loss"}),
    "seed": ("value = '7'", "change", {"learnt"}),
    "t": ("value = 0.6", "input", {"exact", "learnt"}),
    "steps": ("value = 3", "input", {"exact", "learnt"}),
}


@pytest.mark.parametrize("control", CHANGES)
def test_a_control_changes_what_it_should(page, control):
    before = pictures(page)
    change, event, expected = CHANGES[control]
    page.run(f"$('{control}').{change}; $('{control}').dispatchEvent(new Event('{event}'))")
    after = pictures(page)
    changed = {name for name in before if before[name] != after[name]}
    # noise at the start differs for eps, whose first time is 0.99: so do the exact samples
    assert changed - {"exact"} == expected - {"exact"} and changed >= expected


def test_training_by_keyboard(page):
    """Every control is reached by Tab, in the order of the page, and has a name."""
    focused = []
    for _ in CONTROLS:
        page.tab.keyboard.press("Tab")
        focused.append(page.run("document.activeElement.id"))
    assert tuple(focused) == CONTROLS
    session = page.context.new_cdp_session(page.tab)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    roles = {"combobox", "spinbutton", "button", "slider", "progressbar", "image"}
    named = [(node["role"]["value"], node["name"]["value"]) for node in nodes
             if node.get("role", {}).get("value") in roles and not node["ignored"]]  # fmt: skip
    assert len(named) == len(CONTROLS) + 1 + 4 and all(name for _, name in named), named

    page.run("$('train').focus()")
    page.tab.keyboard.press(" ")
    page.wait("run.step > 20")
    assert page.run("$('train').textContent") == "Stop"
    page.tab.keyboard.press("Enter")
    step = page.run("run.step")
    assert page.run("$('train').textContent") == "Go on"
    assert f"step {step} of 2000" in page.run("$('status').textContent")
    page.wait("new Promise((done) => setTimeout(() => done(true), 200))")
    assert page.run("run.step") == step > 0 and page.run("$('progress').value") > 0
    page.tab.keyboard.press("Enter")
    page.wait(f"run.step > {step}")
    page.run("$('reset').focus()")
    page.tab.keyboard.press("Enter")
    assert page.run("[run.step, running, $('progress').value]") == [0, False, 0]

    page.run("$('t').focus()")
    page.tab.keyboard.press("ArrowRight")
    assert page.run("$('t-value').textContent") == "0.01"
    page.run("$('play').focus()")
    page.tab.keyboard.press("Enter")
    assert page.run("Number($('t').value)") > 0.5
    page.wait("Number($('t').value) === 0")


def test_training_to_its_end(page):
    page.act("run.steps = 60; toggle()")
    page.wait("run.step === run.steps && !running")
    assert re.fullmatch(
        r"Trained: 60 steps in [\d.]+ s of computing\.", page.run("$('status').textContent")
    )
    assert page.run("$('train').textContent") == "Train again"
    least, learnt = (
        float(page.run(f"$('loss-{name}').textContent")) for name in ("exact", "learnt")
    )
    assert least < learnt < 1.25 * least
    page.act("toggle()")
    page.wait("run.steps === 2000 && run.step > 0")


def test_reduced_motion(page):
    page.tab.emulate_media(reduced_motion="reduce")
    page.run("$('t').value = 0.5; play()")
    assert page.run("$('t').value") == "0"


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_the_screen(browser, width, dark):
    page = Tab(browser, width, dark=dark)
    assert page.run("document.documentElement.scrollWidth") == width
    sides = page.run("['exact', 'learnt'].map((id) => $(id).getBoundingClientRect().top)")
    assert sides[0] == sides[1]  # beside each other, on a phone too
    assert page.run("$('train').getBoundingClientRect().height") >= 40  # a finger's width
    text, back = (
        ("rgb(230, 237, 243)", "rgb(13, 17, 23)")
        if dark
        else ("rgb(27, 31, 36)", "rgb(255, 255, 255)")
    )
    style = page.run("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
    assert style == [text, back] and page.complaints == []
    page.context.close()
