"""Muon: its direction by a singular value decomposition, PyTorch's own, and Adam for the rest."""

import copy

import pytest
import torch
from torch import nn

from minidiff.train import TrainConfig, train
from minidiff.training.muon import ITERATIONS, A, B, C, Muon, orthogonal
from minidiff.training.optimizers import grouped

SHAPES = [(8, 30), (30, 8), (16, 16)]


def polynomial(s):
    for _ in range(ITERATIONS):
        s = A * s + B * s**3 + C * s**5
    return s


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_go_through_the_polynomial(shape):
    g = torch.randn(3, *shape, dtype=torch.float64)
    u, s, v = torch.linalg.svd(g / g.norm(dim=(1, 2), keepdim=True), full_matrices=False)
    expected = u @ torch.diag_embed(polynomial(s)) @ v
    torch.testing.assert_close(orthogonal(g), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(orthogonal(g.float()).double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has no Muon")
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_matrices_move_as_in_pytorch(weight_decay):
    """PyTorch's computes in bfloat16: its updates agree to about one in a hundred."""
    start = [torch.randn(shape) for shape in SHAPES]
    ours, theirs = ([nn.Parameter(w.clone()) for w in start] for _ in range(2))
    muon = Muon(grouped(ours, weight_decay), 1e-2, (0.95, 0.99))
    reference = torch.optim.Muon(
        theirs, lr=1e-2, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        muon.step()
        reference.step()
    for a, b, w in zip(ours, theirs, start, strict=True):
        assert (a - b).norm() < 0.02 * (b - w).norm()


def test_a_convolution_is_a_matrix_in_any_memory_format():
    w = torch.randn(8, 4, 3, 3)
    parameters = [nn.Parameter(w.clone()), nn.Parameter(w.flatten(1).clone())]
    parameters.append(nn.Parameter(w.to(memory_format=torch.channels_last)))
    g = torch.randn_like(w)
    for p in parameters:
        p.grad = g.reshape(p.shape).clone()
        Muon(grouped([p], 0.0), 1e-2, (0.95, 0.99)).step()
    for p in parameters[1:]:
        torch.testing.assert_close(p.reshape(w.shape), parameters[0], rtol=0, atol=1e-6)


def test_vectors_follow_adamw():
    a = nn.Parameter(torch.randn(20))
    b = copy.deepcopy(a)
    muon = Muon(grouped([a], 0.0), 1e-2, (0.9, 0.99))
    adam = torch.optim.AdamW([b], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0)
    for _ in range(5):
        a.grad = torch.randn(20)
        b.grad = a.grad.clone()
        muon.step()
        adam.step()
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    def run(folder, stop, resume=False):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 2))

        def batches(start):
            k = start
            while True:
                yield torch.randn(6, 4, generator=torch.Generator().manual_seed(k))
                k += 1

        config = TrainConfig(8, 1e-2, warmup=2, optimizer="muon", save_every=4)
        loss = lambda x: {"loss": (module(x) - x[:, :2]).pow(2).mean(1)}  # noqa: E731
        for step in train(loss, module, batches, config, folder=folder, resume=resume):
            if step.step == stop:
                break
        return module

    whole = run(tmp_path / "whole", 8)
    run(tmp_path / "halves", 5)
    again = run(tmp_path / "halves", 8, resume=True)
    assert all(map(torch.equal, whole.parameters(), again.parameters()))
