"""Gradient checkpointing: the same gradients to the bit, from far less kept."""
from itertools import count

import pytest
import torch
from torch import nn

from minidiff import lora
from minidiff.clip import CLIPText
from minidiff.train import TrainConfig, train
from minidiff.unet import UNet


def unet(**how):
    return UNet(4, 4, (16, 32), 2, (1, 0), (2, 2), 8, groups=4, **how)


def clip(**how):
    return CLIPText(16, 4, 2, context_length=12, **how)


@pytest.fixture(autouse=True)
def without_zeros(monkeypatch):
    """Branches that start at zero would hide gradients that are wrong."""
    for kind in (UNet, CLIPText):
        monkeypatch.setattr(kind, "_init_weights", lambda self: [nn.init.normal_(p, std=0.1) for p in self.parameters()])


def inputs(network):
    noise = torch.Generator().manual_seed(4)
    if isinstance(network, CLIPText):
        return (torch.randint(0, 49408, (3, 12), generator=noise),)
    return torch.randn(3, 4, 16, 16, generator=noise), torch.tensor([1, 500, 1000]), torch.randn(3, 5, 8, generator=noise)


def gradients(network, checkpointing, autocast=False):
    """The loss and every gradient, from the same random numbers."""
    network.checkpointing = checkpointing
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = network(*inputs(network)).float().pow(2).mean()
    rest = torch.rand(1)  # what is drawn after the forward pass is drawn in both
    trained = [p for p in network.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, trained, allow_unused=True)
    return [loss, rest, torch.rand(1), *(g for g in grads if g is not None)]


def saved(network, checkpointing):
    """Bytes that the forward pass keeps for the backward pass, the weights apart; each storage counted once."""
    network.checkpointing = checkpointing
    weights, kept = {p.untyped_storage().data_ptr() for p in network.parameters()}, {}

    def keep(value):
        kept[value.untyped_storage().data_ptr()] = value.untyped_storage()  # held, so that no address is used twice
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        network(*inputs(network)).sum()
    return sum(storage.nbytes() for address, storage in kept.items() if address not in weights)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("make", [unet, clip, lambda: unet(dropout=0.3), lambda: unet(pooled=True, scale_shift=True, middle=False)])
def test_the_same_gradients_to_the_bit(make, autocast):
    network = make()
    plain, recomputed = gradients(network, False, autocast), gradients(network, True, autocast)
    assert len(plain) > 40 and all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))
    assert any(a.abs().sum() > 0 for a in plain[3:])


@pytest.mark.parametrize(("make", "share"), [(unet, 0.4), (clip, 0.25)])
def test_far_less_is_kept(make, share):
    network = make()
    assert saved(network, True) < share * saved(network, False)


@pytest.mark.parametrize("make", [unet, clip])
def test_with_a_lora(make):
    """Its hooks run again with the layer; what is frozen gets no gradient."""
    network = make()
    lora.add(network, rank=2)
    for layer in lora.adapted(network).values():
        nn.init.normal_(layer.lora.B)
    plain, recomputed = gradients(network, False), gradients(network, True)
    assert len(plain) == 3 + 2 * len(lora.adapted(network)) and all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))
    assert all(g.abs().sum() > 0 for g in plain[3:])
    assert saved(network, True) < 0.5 * saved(network, False)


def test_two_threads_in_one_training():
    """Parts of a batch at a time: the same weights to the bit as without."""

    def batches(start):
        for k in count(start):
            noise = torch.Generator().manual_seed(k)
            yield torch.randn(2, 4, 8, 8, generator=noise), torch.randint(0, 1000, (2,), generator=noise), torch.randn(2, 5, 8, generator=noise)

    ends = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        network = unet()
        network.checkpointing = checkpointing
        for _ in train(
            lambda batch, of=network: {"loss": of(*batch).pow(2).mean((1, 2, 3))}, network, batches, TrainConfig(4, 1e-2, accumulate=2, threads=2)
        ):
            pass
        ends.append(network.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_drawing_is_as_before():
    """Where no gradient is asked for, nothing is different."""
    network = unet().eval()
    with torch.no_grad():
        plain = network(*inputs(network))
        network.checkpointing = True
        assert torch.equal(network(*inputs(network)), plain)
