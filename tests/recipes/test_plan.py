"""How long a recipe takes: counted, and fitted to the minutes that were asked for."""

import pytest
import torch
from torch import nn

from minidiff.errors import UserError
from minidiff.recipes import plan as plans
from minidiff.recipes.plan import Act, Cost, Plan
from minidiff.train import TrainConfig

COSTS = [Cost(0.1, 5), Cost(0.2, 7)]


def test_a_step_costs_its_matrix_products():
    module = nn.Linear(16, 32, bias=False)

    def batches(start):
        while True:
            yield torch.ones(8, 16)

    loss = lambda x: {"loss": module(x).pow(2).mean(1)}  # noqa: E731
    act = Act("a line", module, loss, batches, TrainConfig(50, 1e-3, accumulate=3, threads=2))
    seconds, flops = plans.cost(act)
    assert seconds > 0
    assert flops == 3 * 2 * (2 * 8 * 16 * 32)  # 3 batches, forward and for the weights


def test_without_minutes_the_steps_are_the_recipes():
    assert plans.fitted([100, 200], COSTS, 10, None) == Plan([100, 200], None)


def test_minutes_share_the_steps_out():
    plan = plans.fitted([100, 200], COSTS, 10, 0.5)  # 20 of 50 seconds
    assert plan == Plan([40, 80], 0.5)
    assert plans.fitted([100, 200], COSTS, 10, 60).steps == [400, 800]  # no more than four times


def test_too_few_minutes_are_refused_with_the_least():
    with pytest.raises(UserError, match=r"0\.1 minutes are too few .* at least 0\.3"):
        plans.fitted([100, 200], COSTS, 10, 0.1)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"steps": [1], "minutes": null}',
        '{"steps": [1, 0], "minutes": null}',
        '{"steps": [1, 2], "minutes": "five"}',
        '{"steps": "12", "minutes": 1}',
        "[" * 10**5,
    ],
)
def test_a_damaged_plan_is_refused(tmp_path, content):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(UserError, match="is damaged"):
        plans.read(tmp_path / "plan.json", 2)


def test_a_plan_comes_back(tmp_path):
    for plan in (Plan([3, 4], None), Plan([3, 4], 2.5)):
        plan.write(tmp_path / "plan.json")
        assert plans.read(tmp_path / "plan.json", 2) == plan
    with pytest.raises(UserError, match="another version"):
        plans.read(tmp_path / "other.json", 2)


def test_a_run_that_is_resumed_keeps_its_plan(tmp_path):
    file = tmp_path / "training" / "plan.json"
    plan = plans.of_run(file, [100, 200], COSTS, 10, 0.5, begun=False)
    assert plan == plans.read(file, 2) == Plan([40, 80], 0.5)
    slower = [Cost(1.0, 5), Cost(2.0, 7)]
    for minutes in (None, 0.5):
        assert plans.of_run(file, [100, 200], slower, 10, minutes, begun=True) == plan
    with pytest.raises(UserError, match=r"was begun for 0\.5 minutes"):
        plans.of_run(file, [100, 200], COSTS, 10, 0.7, begun=True)
