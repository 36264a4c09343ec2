"""The chain in the terminal: equal to generate's image, the lines that ran, keys, and colours."""

import inspect
import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest
import torch

from minidiff import load, pipeline, steps
from minidiff.cli import picture
from minidiff.data.folder import load_image, to_uint8
from minidiff.figures.walk import walk
from minidiff.options.sampling import SampleConfig

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, sd):
    model = sd()
    torch.nn.init.normal_(model.unet.conv_out.weight, std=0.1)
    return model.save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "heun", "dpmpp_2m", "unipc", "lcm"])
def test_the_image_is_generates(ran, tiny, tmp_path, sampler):
    settings = ["--model", tiny, "--steps", 4, "--sampler", sampler, "--seed", 3, "--out", tmp_path]
    printed = ran("step", PROMPT, *settings).out
    config = SampleConfig(steps=4, sampler=sampler, seed=3)
    expected = pipeline.generate(load(tiny), [PROMPT], config)[0]
    assert torch.equal(load_image(tmp_path / "step.png"), to_uint8(expected))
    assert len(re.findall(r"^step \d of 4, ", printed, re.MULTILINE)) == 4
    assert "\x1b" not in printed and printed.splitlines()[-1] == str(tmp_path / "step.png")


def test_the_lines_that_ran_are_those_of_the_files(tiny):
    config = SampleConfig(steps=2, sampler="ddim", seed=0)
    first = next(walk(load(tiny), PROMPT, config))
    functions = [ran.function for ran in first.source]
    assert functions[:2] == ["DDIM.__call__", "Guided.__call__"]
    assert {"Denoiser.forward", "Denoiser.solve", "Guided._pair"} <= set(functions)
    lines, start = inspect.getsourcelines(inspect.unwrap(steps.DDIM.__call__))
    ran = first.source[0]
    assert ran.file.as_posix() == "minidiff/steps.py"
    text = {start + k: line.rstrip("\n") for k, line in enumerate(lines)}
    assert all(text[number] == line for number, line in ran.lines.items())
    assert any("x_s = alpha_s.item() * x0" in line for line in ran.lines.values())
    assert not any("noise(x)" in line for line in ran.lines.values())  # eta is 0: it did not run
    assert sys.gettrace() is None or "walk" not in repr(sys.gettrace())


def test_values_solve_the_equation(tiny):
    model, config = load(tiny), SampleConfig(steps=3, sampler="ddim", seed=1, guidance=3.0)
    for walked in walk(model, PROMPT, config):
        t = torch.tensor(walked.t, dtype=torch.float64)
        alpha, sigma = model.schedule.alpha_sigma(t)
        x = alpha.item() * walked.x0 + sigma.item() * walked.eps
        assert torch.allclose(x, walked.x, atol=1e-4)  # fp32
        (evaluation,) = walked.evaluations
        empty, prompt = evaluation.F.split(1)
        assert torch.allclose(walked.F, empty + 3 * (prompt - empty), atol=1e-3)  # fp32, solved


def test_what_is_printed(ran, tmp_path):
    printed = ran("step", PROMPT, "--steps", 2, "--sampler", "euler", "--out", tmp_path).out
    for text in (
        "step 1 of 2, euler: from t = 1000 to s = 500",
        "log SNR",
        "F, empty prompt",
        "F, prompt",
        "minidiff/guidance.py  Guided.__call__",
        "minidiff/denoiser.py  Denoiser.solve",
        "the same lines ran as in step 1",
    ):
        assert text in printed, text


def test_what_cannot_be_stepped(refused, tiny, tmp_path):
    settings = ["--model", tiny, "--out", tmp_path]
    assert "--steps is 0; it must be at least 1." in refused(
        "step", PROMPT, *settings, "--steps", 0
    )
    assert 'no sampler "x"' in refused("step", PROMPT, *settings, "--sampler", "x")
    assert "see minidiff step --help" in refused("step", "a", "b", *settings)
    (tmp_path / "step.png").write_text("mine")
    assert "step.png" in refused("step", PROMPT, *settings)


def test_pictures_as_text():
    image = torch.tensor([-1.0, 1.0]).expand(3, 4, 2)
    assert picture.as_text(image, 4, colour=False) == "\n".join(["  @@"] * 4)
    coloured = picture.as_text(image, 2, colour=True).splitlines()
    black, white = "\x1b[38;2;0;0;0;48;2;0;0;0m▀", "\x1b[38;2;255;255;255;48;2;255;255;255m▀"
    assert coloured == [f"{black}{white}\x1b[0m"] * 2


def in_terminal(keys, tiny, out, columns, **variables):
    """What the command prints in a terminal of so many columns, with these keys pressed."""
    import fcntl
    import struct
    import termios

    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    arguments = ["step", PROMPT, "--model", str(tiny), "--steps", "4", "--out", str(out)]
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    environment |= {"TERM": "xterm", "PYTHONUTF8": "1", **variables}
    process = subprocess.Popen(
        [sys.executable, "-m", "minidiff.cli", *arguments],
        stdin=slave, stdout=slave, stderr=slave, env=environment,
    )  # fmt: skip
    os.close(slave)
    printed, waiting, end = b"", list(keys), time.monotonic() + 120
    while time.monotonic() < end:
        if not select.select([master], [], [], 0.2)[0]:
            if process.poll() is not None:
                break
            continue
        try:
            chunk = os.read(master, 65536)
        except OSError:  # it has ended
            break
        printed += chunk
        if printed.count(b"[Enter") > len(keys) - len(waiting) and waiting:
            os.write(master, waiting.pop(0).encode())
    try:
        code = process.wait(timeout=60)
    finally:
        process.kill()
        os.close(master)
    return printed.decode().replace("\r\n", "\n"), code


def test_keys(tiny, tmp_path):
    """Next, back to step 1, then two steps, then the last."""
    printed, code = in_terminal(["\n", "b", "2\n", "\n", "\n"], tiny, tmp_path, 100)
    shown = re.findall(r"^step (\d) of 4", printed, re.MULTILINE)
    assert shown == ["1", "2", "1", "2", "3", "4"] and code == 0
    assert (tmp_path / "step.png").exists() and "▀" in printed
    printed, code = in_terminal(["q"], tiny, tmp_path / "quit", 100)
    assert printed.count(" of 4, ") == 1 and code == 0 and not (tmp_path / "quit").exists()


def test_a_narrow_terminal_without_colours(tiny, tmp_path):
    printed, code = in_terminal(["4\n", "\n"], tiny, tmp_path, 40, NO_COLOR="1")
    lines = printed.splitlines()
    assert code == 0 and "\x1b" not in printed and "▀" not in printed
    assert max(map(len, lines[:-1])) < 40 and lines[-1].endswith("step.png")
