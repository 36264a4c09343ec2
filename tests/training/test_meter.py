"""How fast a run is: what is counted, what is measured, and that it changes no bit of the run."""

import time
from functools import partial
from itertools import repeat

import pytest
import torch
from torch import nn
from torch.nn import functional

from minidiff.train import TrainConfig, train
from minidiff.training import lock, meter
from minidiff.training.backward import UNSCALED
from minidiff.training.meter import Operations, peak
from minidiff.training.workers import workers

CPU = torch.device("cpu")
# a convolution of 3 to 8 channels on 8x8 pixels with 3x3 kernels, and a matrix of 512 by 4
CONVOLUTION, MATRIX = 2 * 3 * 8 * 9 * 64, 2 * 512 * 4


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(512, 4))


def loss_fn(net, images):
    return {"loss": net(images).square().mean(1)}


def images(count=2):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def batches(_start):
    return repeat(images())


def test_operations_are_counted_forward_and_backward():
    net, x = network(), images()
    with Operations() as operations, torch.no_grad():
        net(x)
    assert operations.count == 2 * (CONVOLUTION + MATRIX)
    with Operations() as operations:
        net(x).sum().backward()
    # backward: the gradient of the weights, and of the matrix's input; the images need none
    assert operations.count == 2 * (2 * CONVOLUTION + 3 * MATRIX)


def test_attention_counts_on_a_cpu_too():
    q = torch.randn(2, 4, 16, 8)
    with Operations() as operations:
        functional.scaled_dot_product_attention(q, q, q)
    assert operations.count == 2 * (2 * 2 * 4 * 16 * 16 * 8)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_step_counts_the_same_in_threads(tmp_path, threads):
    net = network()
    config = TrainConfig(steps=9, lr=1e-3, accumulate=2, threads=threads)
    counter = meter.Meter(tmp_path, config, net)
    with workers(threads) as pool:
        parts = partial(loss_fn, net), list(net.parameters()), [images(), images()]
        losses = counter.backward_all(*parts, pool, UNSCALED)
    assert len(losses) == 2 and counter.examples == 4
    assert counter.operations == 4 * (2 * CONVOLUTION + 3 * MATRIX)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_metered_run_ends_at_the_same_bits(tmp_path, threads):
    ends = []
    for folder in (None, tmp_path):
        net = network()
        config = TrainConfig(steps=4, lr=1e-2, accumulate=2, threads=threads)
        for _ in train(partial(loss_fn, net), net, batches, config, None, folder):
            pass
        ends.append([p.detach().clone() for p in net.parameters()])
    assert all(map(torch.equal, *ends))


@pytest.mark.parametrize("whole", [False, True])
def test_a_compiled_network_is_not_counted_but_runs_compiled_from_the_first_step(tmp_path, whole):
    torch._dynamo.reset()
    net, graphs = network(), []
    backend = partial(note, graphs)
    if whole:
        net = torch.compile(net, backend=backend)
    else:
        net.compile(backend=backend)
    config, loss = TrainConfig(steps=2, lr=1e-3), partial(loss_fn, net)
    for step in train(loss, net, batches, config, None, tmp_path):
        assert len(graphs) == 1, step
    counter = meter.Meter(tmp_path, config, net)
    counter.backward_all(loss, list(net.parameters()), [images()], None, UNSCALED)
    assert counter.operations == 0 and counter.examples == 2


def note(graphs, graph, _inputs):
    graphs.append(graph)
    return graph


def test_a_run_tells_how_it_is_doing_while_it_is_locked(tmp_path, monkeypatch):
    monkeypatch.setattr(meter, "EVERY", 0.0)
    net, told = network(), []
    config = TrainConfig(steps=5, lr=1e-3)
    for _ in train(partial(loss_fn, net), net, batches, config, None, tmp_path):
        told.append(lock.told(tmp_path))
        time.sleep(0.01)
    assert told[0][1] == {}  # nothing is known before the second step
    holder, status = told[-1]
    assert lock.is_held(holder)
    assert status["steps"] == 5 and status["examples_per_step"] == 2
    assert status["operations_per_step"] == 2 * (2 * CONVOLUTION + 3 * MATRIX)
    assert 0.01 <= status["seconds_per_step"] < 10 and status["memory_gb"] > 0
    assert status["peak_per_second"] == peak(CPU, torch.float32) > 1e8
    assert lock.told(tmp_path) == ({}, {})  # it goes with the lock
    assert not (tmp_path / lock.LOCK).exists()


def test_half_a_lock_file_says_nothing(tmp_path):
    file = tmp_path / lock.LOCK
    for content in (b"", b"{", b"[1]\n", b"\xff\n{}"):
        file.write_bytes(content)
        assert lock.told(tmp_path) == ({}, {})
    for more in (b"", b'{"steps": '):
        file.write_bytes(b'{"process": 1}\n' + more)
        assert lock.told(tmp_path) == ({"process": 1}, {})


def test_a_process_that_is_gone_holds_nothing(tmp_path):
    with lock.locked(tmp_path):
        holder, _ = lock.told(tmp_path)
        assert lock.is_held(holder)
        lock.tell(tmp_path, {"steps": 1})
        lock.tell(tmp_path, {"steps": 23})
        assert lock.told(tmp_path) == (holder, {"steps": 23})
    assert not lock.is_held(holder | {"process": 2**22 + 1})
    assert lock.is_held(holder | {"process": 2**22 + 1, "host": "elsewhere"})
    assert not lock.is_held({}) and not lock.is_held(holder | {"process": "x"})
    lock.tell(tmp_path, {"steps": 24})  # without a lock: nothing happens
    assert not list(tmp_path.iterdir())
