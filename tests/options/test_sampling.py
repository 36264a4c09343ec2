"""The options of sampling check themselves, and list what there is."""

import subprocess
import sys
from typing import get_args

import pytest

from minidiff import schedules
from minidiff.errors import UserError
from minidiff.options.sampling import Interval, SampleConfig, SamplerName, Spacing, check_size
from minidiff.samplers import SAMPLERS


def test_names_are_those_that_exist():
    assert get_args(SamplerName) == tuple(SAMPLERS)
    for spacing in get_args(Spacing):
        assert len(schedules.cosine().timesteps(4, spacing)) == 5
    with pytest.raises(UserError, match=f"there is {', '.join(get_args(Spacing))}"):
        schedules.cosine().timesteps(4, "wide")


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"guidance": float("nan")}, "guidance is nan; it must be finite"),
        ({"rescale": 1.5}, "rescale is 1.5; it must be from 0 to 1"),
        ({"interval": Interval(0.6, 0.2)}, "interval is 0.6,0.2; .* the smaller one first"),
        ({"interval": Interval(0.0, 600.0)}, "interval is 0,600; it must be two numbers from 0"),
        ({"seed": -1}, "seed is -1; it must be from 0"),
        ({"seed": 2**63}, "it must be from 0 to 9223372036854775807"),
    ],
)
def test_bad_options_are_refused_on_construction(options, complaint):
    with pytest.raises(UserError, match=complaint) as refused:
        SampleConfig(**options)
    assert "--" not in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("size, nearest", [(18, "sizes are 16 and 20"), (3, "size is 4"), (0, "4")])
def test_sizes(size, nearest):
    check_size(16, 4)
    with pytest.raises(UserError, match=f"size {size} is not divisible by 4; .*{nearest}$"):
        check_size(size, 4)


def test_no_torch_is_needed():
    """So that `minidiff VERB --help` answers at once."""
    code = "import minidiff.options.sampling, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
