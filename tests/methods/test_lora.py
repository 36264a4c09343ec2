"""LoRA: it begins as nothing, trains two small matrices alone, goes into the weights and out again to the bit; files, names and errors."""

import copy
import json
import re

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import minidiff
from minidiff import schedules
from minidiff.checkpoints import lora as lora_files
from minidiff.checkpoints import names, write
from minidiff.conditioners import ClassLabels, LabelsConfig
from minidiff.denoiser import Denoiser
from minidiff.errors import UserError
from minidiff.exercises import checks
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.methods import lora
from minidiff.unet import UNet, UNetConfig, unet_sd1
from minidiff.vae import Pixels, PixelsConfig

EVERY = (
    *lora.ATTENTION,
    "conv1",
    "proj_in",
    "resample.conv",
)  # linear layers, convolutions of 1x1, 3x3, and of stride 2


@torch.no_grad()
def randomized(model):
    """No weight is zero, so that everything shows at the output; and B is not zero."""
    for p in model.parameters():
        p.copy_(torch.randn_like(p) / max(p[0].numel(), 16) ** 0.5)
    return model


def with_lora(model, rank=3, alpha=2.0, targets=EVERY):
    """The model, with LoRAs in U-Net and text tower that do something."""
    adapted = lora.add(model.unet, rank, alpha, targets), lora.add(model.text, rank, alpha)
    for module in (model.unet, model.text):
        for name, value in lora.state(module).items():
            if name.endswith(".B"):
                value.normal_()
    return [f"unet.{name}" for name in adapted[0]] + [f"text.{name}" for name in adapted[1]]


@pytest.fixture
def model(sd):
    return randomized(sd())


def output(model, seed=0, dtype=torch.float32):
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)
    with torch.no_grad():
        return model.unet(
            x, torch.tensor([7, 830]), model.text(torch.arange(77)[None].expand(2, -1))
        )


@pytest.mark.parametrize("layer", [nn.Linear(48, 5), nn.Conv2d(6, 5, 3)], ids=["linear", "conv"])
def test_A_begins_as_torchs_own_layers(layer):
    """Uniform in +-1 / sqrt(fan in), and B is 0."""
    bound = layer.weight[0].numel() ** -0.5
    for ours in (lora.LoRA(layer, 200, 1.0).A, layer.weight):
        assert 0.9 * bound < ours.abs().max() <= bound
    assert lora.LoRA(layer, 200, 1.0).A.abs().max() > 0.995 * bound
    assert not lora.LoRA(layer, 2, 1.0).B.any()


def test_it_begins_as_nothing_and_trains_alone(model):
    before, weights = output(model), copy.deepcopy(model.unet.state_dict())
    layers = lora.add(model.unet, rank=2, targets=["q"]) + lora.add(
        model.unet, rank=1, targets=set(EVERY) - {"q"}
    )
    assert torch.equal(output(model), before)
    assert (
        "encoder.0.attention.0.blocks.0.cross_attention.k" in layers
        and "encoder.0.resample.conv" in layers
    )
    optimizer = torch.optim.SGD([p for p in model.unet.parameters() if p.requires_grad], lr=10)
    for _ in range(2):  # at the first step B is zero, and A has no gradient yet
        model.unet(
            torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 7, 64)
        ).square().mean().backward()
        optimizer.step()
    moved = {
        name for name, p in model.unet.named_parameters() if p.grad is not None and p.grad.any()
    }
    assert (
        moved
        == {f"{name}.lora.{half}" for name in layers for half in "AB"}
        == set(lora.state(model.unet))
    )
    assert all(torch.equal(value, model.unet.state_dict()[name]) for name, value in weights.items())
    assert (output(model) - before).abs().max() > 1e-3


@pytest.mark.equation("lora-3")
@pytest.mark.parametrize(
    "layer, x",
    [
        (nn.Linear(6, 5), torch.randn(2, 7, 6)),
        (nn.Conv2d(6, 5, 3, stride=2, padding=1), torch.randn(2, 6, 8, 8)),
        (nn.Conv2d(6, 5, 1), torch.randn(2, 6, 8, 8)),
    ],
    ids=["linear", "conv 3x3", "conv 1x1"],
)
def test_the_equation(layer, x):
    """W x + b + (alpha / r) B A x, with the product of the matrices written out."""
    network = nn.Sequential(layer).double()
    lora.add(network, rank=2, alpha=3.0, targets=["0"])
    nn.init.normal_(layer.lora.B)
    change = 1.5 * torch.einsum("or, r... -> o...", layer.lora.B.flatten(1), layer.lora.A)
    plain = copy.deepcopy(layer)
    plain._forward_hooks.clear()
    plain.weight.data += change
    torch.testing.assert_close(network(x.double()), plain(x.double()), rtol=1e-12, atol=1e-12)
    lora.scale(network, 0.0)
    assert torch.equal(
        network(x.double()),
        layer.double()._conv_forward(x.double(), layer.weight, layer.bias)
        if x.ndim == 4
        else nn.functional.linear(x.double(), layer.weight, layer.bias),
    )


test_lora_is_the_product_of_its_matrices = checks.lora_is_the_product_of_its_matrices


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_and_unmerge(model, dtype):
    model.to(dtype)
    bare, weights = (
        output(model, dtype=dtype),
        {name: value.clone() for name, value in model.state_dict().items()},
    )
    layers = with_lora(model)
    assert {v.dtype for v in lora.state(model).values()} == {torch.float32} and output(
        model, dtype=dtype
    ).dtype == dtype
    beside = output(model, dtype=dtype)
    lora.merge(model)
    lora.merge(model)  # a second time changes nothing
    inside = output(model, dtype=dtype)
    # fp32: rounding; bfloat16 has 8 bits, here and in every layer on the way
    assert (
        (inside - beside).norm() / beside.norm()
        < (1e-5 if dtype == torch.float32 else 0.05)
        < (beside - bare).norm() / bare.norm()
    )
    lora.scale(model, 0.5)
    half = output(model, dtype=dtype)
    lora.unmerge(model)
    assert (output(model, dtype=dtype) - half).norm() / half.norm() < (
        1e-5 if dtype == torch.float32 else 0.05
    )
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())
    assert len(lora.adapted(model)) == len(layers)
    lora.remove(model)
    assert model.state_dict().keys() == weights.keys() and torch.equal(
        output(model, dtype=dtype), bare
    )
    assert all(p.requires_grad for p in model.parameters())


def test_merging_in_bfloat16_costs_no_more_than_bfloat16(model):
    """The change is rounded together with the weight, to 8 bits, as the weight was. Against float32, either way."""
    with_lora(model, rank=4, alpha=4.0)
    for name, value in lora.state(model).items():
        value.mul_(
            0.05 if name.endswith(".B") else 1
        )  # as large as training makes it: it moves the output by a few percent
    true = output(model)
    for layer in [layer for layer in model.modules() if not isinstance(layer, lora.LoRA)]:
        for p in layer.parameters(recurse=False):
            p.data = p.data.bfloat16()
    beside = (output(model) - true).norm()
    lora.merge(model)
    inside = (output(model) - true).norm()
    lora.scale(model, 0)
    without = (output(model) - true).norm()
    assert inside < 1.3 * beside and 2 * inside < without


def test_removed_while_merged_it_stays_in_the_weights(model):
    with_lora(model)
    lora.merge(model)
    merged = output(model)
    lora.remove(model)
    assert torch.equal(output(model), merged) and not lora.adapted(model)


def test_a_copy_has_a_lora_of_its_own(model):
    """As an average of weights takes one."""
    with_lora(model)
    before, other = output(model), copy.deepcopy(model)
    for value in lora.state(other).values():
        value.zero_()
    assert torch.equal(output(model), before) and not torch.equal(output(other), before)
    lora.remove(other)
    assert lora.adapted(model) and torch.equal(output(model), before)


@pytest.mark.parametrize("save", ["ours", "diffusers", "compvis"])
@pytest.mark.parametrize("merged", [False, True])
def test_a_model_is_saved_with_its_lora_in_the_weights(model, tmp_path, save, merged):
    """No strange names: what is loaded again draws as the model did, and has no LoRA."""
    with_lora(model)
    lora.scale(model, 0.7)
    expected = output(model)
    if merged:
        lora.merge(model)
    writers = {
        "ours": (model.save, "m"),
        "diffusers": (lambda p: write.save_diffusers(model, p), "m"),
        "compvis": (lambda p: write.save_compvis(model, p), "m.safetensors"),
    }
    writer, name = writers[save]
    loaded = minidiff.load(writer(tmp_path / name))
    assert (
        not lora.adapted(loaded) and (output(loaded) - expected).norm() / expected.norm() < 1e-5
    )  # fp32
    assert lora.adapted(model)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_files_there_and_back(sd, model, ran, tmp_path, layout):
    other, bare = copy.deepcopy(model), output(model)
    layers = with_lora(model)
    expected = output(model)
    lora.scale(model, 0.3)  # a knob of sampling: not saved
    file = lora_files.save(model, tmp_path / "l.safetensors", layout)
    found = lora_files.load(other, file)
    assert sorted(found.layers) == sorted(layers) and found.moved > 0.01
    torch.testing.assert_close(
        output(other), expected, rtol=1e-4, atol=1e-5
    )  # fp32; alpha / r = 2/3 went into B, or not
    lora.scale(other, 0)
    assert torch.equal(output(other), bare)
    said = ran("inspect", file).out
    assert (
        f"3 ({len(layers)} layers)" in said
        and f"{'kohya' if layout == 'kohya' else 'diffusers or PEFT'} names" in said
    )
    again = sd(), lora_files.load(randomized(sd()), file, scale=0.5)
    assert again[1].layers == found.layers
    with pytest.raises(UserError, match="exists and is not overwritten"):
        lora_files.save(other, file)


def test_kohya_keeps_alpha(model, tmp_path):
    with_lora(model, alpha=1.0)
    file = lora_files.save(model, tmp_path / "l.safetensors", "kohya")
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    state = load_file(file)
    assert state[f"{stem}.alpha"] == 1 and state[f"{stem}.lora_down.weight"].shape == (3, 32)
    assert state["lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight"].shape == (
        64,
        3,
    )
    assert state["lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight"].shape == (3, 32, 3, 3)
    lora.remove(model)
    lora_files.load(model, file)
    assert {layer.lora.alpha for layer in lora.adapted(model).values()} == {1.0}


def test_every_name_of_stable_diffusion_is_its_own():
    """kohya's names lose their dots; still no two of SD 1.5's layers share one."""
    with torch.device("meta"):
        unet = unet_sd1()
    layers = [name for name, layer in unet.named_modules() if isinstance(layer, lora.Layer)]
    published = names.to_published({name: name for name in layers}, names.UNET_DIFFUSERS)
    assert len({name.replace(".", "_") for name in published}) == len(layers) == 282


SPELLINGS = {  # of the same two layers: (A, B) of the U-Net's, (A, B) of the text tower's
    "peft": (
        "unet.{}attn1.to_q.lora_A.weight",
        "unet.{}attn1.to_out.0.lora_A.weight",
        "text_encoder.text_model.{}q_proj.lora_A.weight",
    ),
    "default": (
        "unet.{}attn1.to_q.lora_A.default.weight",
        "unet.{}attn1.to_out.0.lora_A.default.weight",
        "text_encoder.{}q_proj.lora_A.default.weight",
    ),
    "scripts": (
        "unet.{}attn1.to_q.lora.down.weight",
        "unet.{}attn1.to_out.0.lora.down.weight",
        "text_encoder.text_model.{}q_proj.lora_linear_layer.down.weight",
    ),
    "processor": (
        "unet.{}attn1.processor.to_q_lora.down.weight",
        "unet.{}attn1.processor.to_out_lora.down.weight",
        "text_encoder.text_model.{}to_q_lora.down.weight",
    ),
    "bare": (
        "{}attn1.processor.to_q_lora.down.weight",
        "{}attn1.processor.to_out_lora.down.weight",
        "text_model.{}q_proj.lora_A.weight",
    ),
    "adapter": (
        "base_model.model.{}attn1.to_q.lora_A.weight",
        "base_model.model.{}attn1.to_out.0.lora_A.weight",
        "base_model.model.text_model.{}q_proj.lora_A.weight",
    ),
}


@pytest.mark.parametrize("kind", SPELLINGS)
def test_every_spelling_is_read(model, tmp_path, kind):
    places = (
        "down_blocks.0.attentions.0.transformer_blocks.0.",
        "down_blocks.0.attentions.0.transformer_blocks.0.",
        "encoder.layers.0.self_attn.",
    )
    widths, state = (32, 32, 64), {}
    for spelling, place, width in zip(SPELLINGS[kind], places, widths, strict=True):
        down = spelling.format(place)
        state |= {
            down: torch.randn(2, width),
            down.replace("lora_A", "lora_B").replace("down.weight", "up.weight"): torch.randn(
                width, 2
            ),
        }
    save_file(state, tmp_path / "l.safetensors")
    found = lora_files.load(model, tmp_path / "l.safetensors")
    q, out = (
        f"unet.encoder.0.attention.0.blocks.0.self_attention.{piece}" for piece in ("q", "out")
    )
    assert set(found.layers) == {q, out, "text.blocks.0.attention.q"} and found.moved > 0


def peft_file(folder, metadata=None, name="l.safetensors"):
    place = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1."
    state = {
        f"{place}{piece}.lora_{half}.weight": torch.randn(4, 32).T
        if half == "B"
        else torch.randn(4, 32)
        for piece in ("to_q", "to_k")
        for half in "AB"
    }
    save_file({key: value.contiguous() for key, value in state.items()}, folder / name, metadata)
    return folder / name


@pytest.mark.parametrize(
    "config, q, k",
    [
        ({}, 4, 4),
        ({"lora_alpha": 8}, 8, 8),
        ({"lora_alpha": 8, "use_rslora": True}, 16, 16),
        ({"lora_alpha": 8, "alpha_pattern": {"attn1.to_k": 2}}, 8, 2),
    ],
)
def test_alpha_from_the_metadata(model, tmp_path, config, q, k):
    said = {f"unet.{key}": value for key, value in config.items()}
    lora_files.load(
        model, peft_file(tmp_path, {"lora_adapter_metadata": json.dumps(said)} if said else None)
    )
    attention = model.unet.encoder[0].attention[0].blocks[0].self_attention
    assert (attention.q.lora.alpha, attention.k.lora.alpha) == (q, k)


def test_alpha_from_pefts_own_folder(model, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 12, "r": 4}')
    lora_files.load(model, peft_file(tmp_path, name="adapter_model.safetensors"))
    assert model.unet.encoder[0].attention[0].blocks[0].self_attention.q.lora.alpha == 12


def test_a_lora_that_does_nothing_is_said(model, tmp_path):
    lora.add(model.unet, 2)
    file = lora_files.save(model, tmp_path / "l.safetensors")
    lora.remove(model)
    with pytest.warns(UserWarning, match="changes nothing: all its B are zero"):
        assert lora_files.load(model, file).moved == 0
    lora.remove(model)
    with pytest.warns(UserWarning, match="changes nothing: its scale is 0"):
        lora_files.load(model, peft_file(tmp_path, name="other.safetensors"), scale=0)


STEM = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    "state, metadata, complaint",
    [
        (
            {"what.is_this": torch.ones(1)},
            None,
            'holds no LoRA; its first tensor is "what.is_this"',
        ),
        (
            {
                f"{STEM}x.lora_A.weight": torch.ones(1, 32),
                f"{STEM}x.lora_B.weight": torch.ones(32, 1),
            },
            None,
            '1 of its 2 layers .*first is ".*to_qx"',
        ),
        (
            {f"{STEM}.lora_magnitude_vector": torch.ones(1)},
            None,
            '1 of its tensors are neither.*magnitude_vector".*DoRA',
        ),
        ({f"{STEM[:-1]}k.lora_A.weight": torch.ones(1, 32)}, None, r'to_k" has no B \(up\)'),
        ({f"{STEM[:-1]}k.lora_B.weight": torch.ones(32, 1)}, None, r'to_k" has no A \(down\)'),
        (
            {f"{STEM}.lora_A.weight": torch.ones(2, 48)},
            None,
            r'to_q": A is \(2, 48\); at rank 2 this model\'s layer takes \(2, 32\)',
        ),
        (
            {
                f"{STEM}.lora_A.weight": torch.ones(0, 32),
                f"{STEM}.lora_B.weight": torch.ones(32, 0),
            },
            None,
            r'to_q": A is \(0, 32\)',
        ),
        (
            {f"{STEM}.lora_B.weight": torch.ones(32, 5)},
            None,
            r'to_q": B is \(32, 5\); at rank 4 this model\'s layer takes \(32, 4\)',
        ),
        (
            {f"{STEM}.lora_A.weight": torch.full((4, 32), torch.nan)},
            None,
            'to_q": A holds what is no finite number',
        ),
        ({f"{STEM}.lora.down.weight": torch.ones(4, 32)}, None, "to_q.*stands in it twice"),
        ({f"{STEM}.alpha": torch.tensor(torch.inf)}, None, 'to_q": alpha is inf'),
        ({f"{STEM}.alpha": torch.ones(4)}, None, r'to_q.alpha" is \(4,\); alpha is one number'),
        (
            {
                STEM.replace("unet.", "lora_unet_").replace(".", "_") + f".lora_{way}.weight": value
                for way, value in (("down", torch.ones(1, 32)), ("up", torch.ones(32, 1)))
            },
            None,
            "two of its layers mean unet.encoder.0.attention.0.blocks.0.self_attention.q",
        ),
        ({}, {"lora_adapter_metadata": "{"}, "its LoRA configuration is damaged"),
        (
            {},
            {"lora_adapter_metadata": '{"unet.lora_alpha": "much"}'},
            "its LoRA configuration is damaged",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused_whole(model, tmp_path, state, metadata, complaint):
    good = (
        {f"{STEM}.lora_A.weight": torch.ones(4, 32), f"{STEM}.lora_B.weight": torch.ones(32, 4)}
        if "holds no" not in complaint
        else {}
    )
    save_file(good | state, tmp_path / "l.safetensors", metadata)
    with pytest.raises(UserError, match=complaint) as refused:
        lora_files.load(model, tmp_path / "l.safetensors")
    assert "l.safetensors" in str(refused.value) and "\n" not in str(refused.value)
    assert not lora.adapted(model) and all(p.requires_grad for p in model.parameters())


def test_what_else_is_refused(model, tmp_path):
    with pytest.raises(
        UserError, match=r"no layer is named Q; names of this network end in .*, q, "
    ):
        lora.add(model.unet, 4, targets=["Q", "k"])
    with pytest.raises(UserError, match="the rank must be at least 1"):
        lora.add(model.unet, 0)
    with pytest.raises(UserError, match=r"0 of the model's 0 LoRAs.*lora\.add"):
        lora_files.save(model, tmp_path / "l.safetensors")
    lora.add(model.vae, 1, targets=["conv1"])
    with pytest.raises(UserError, match="only LoRAs of a U-Net or a CLIPText have names in files"):
        lora_files.save(model, tmp_path / "l.safetensors")
    lora.remove(model)
    lora.add(model.unet, 1)
    with pytest.raises(UserError, match="has a LoRA already"):
        lora.add(model.unet, 1)
    with pytest.raises(
        UserError, match='no layout "peft" of LoRA files; there is diffusers, kohya'
    ):
        lora_files.save(model, tmp_path / "l.safetensors", "peft")
    with pytest.raises(UserError, match=r"should end in \.safetensors"):
        lora_files.save(model, tmp_path / "l.pt")
    with pytest.raises(UserError, match='no file "'):
        lora_files.load(model, tmp_path / "nowhere.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_model_without_text_has_loras_too(tmp_path):
    """Pixels and classes, sizes of any kind: only the U-Net has names in files."""
    unet = UNet(UNetConfig(3, 3, (8, 16), 1, (0, 1), (1, 2), context_dim=12, groups=4, pooled=True))
    model = randomized(
        LatentDiffusion(
            Pixels(PixelsConfig(3)),
            ClassLabels(LabelsConfig(["cat", "dog"], dim=12)),
            Denoiser(unet, schedules.Karras(), "edm"),
            size=8,
        )
    )
    lora.add(model.unet, 2, targets=["pool", "time.0", "cross_attention.out"])
    for value in lora.state(model).values():
        value.normal_()
    file = lora_files.save(model, tmp_path / "l.safetensors", "kohya")
    x, before = (
        torch.randn(1, 3, 8, 8),
        {name: value.clone() for name, value in lora.state(model).items()},
    )
    expected = model.unet(x, torch.tensor([0.3]), model.text.encode(["cat"]))
    lora.remove(model)
    assert lora_files.load(model, file).moved > 0
    assert all(torch.equal(value, before[name]) for name, value in lora.state(model).items())
    assert torch.equal(model.unet(x, torch.tensor([0.3]), model.text.encode(["cat"])), expected)


# The command line.


def test_generate_with_loras(ran, refused, model, tmp_path):
    """What each file did is said, and what was drawn with is written into the picture; two stand on top of one another."""
    where = model.save(tmp_path / "m")
    with_lora(model)
    first = lora_files.save(model, tmp_path / "first.safetensors")
    second = peft_file(tmp_path, name="second.safetensors")

    def drawn(name, *args):
        said = ran(
            "generate",
            "a circle",
            "--model",
            where,
            "--steps",
            2,
            "--size",
            16,
            "--out",
            tmp_path / name,
            *args,
        ).out
        picture = Image.open(tmp_path / name / "000-a-circle.png")
        return said, picture.text.get("lora"), picture.tobytes()

    said, text, both = drawn("both", "--lora", first, "--lora", f"{second}:0.5")
    lines = re.findall(r"^(.*): (\d+) layers, probe moved by ([\d.e+]+) %$", said, re.M)
    assert [(line[0], int(line[1])) for line in lines] == [
        (str(first), len(lora.adapted(model))),
        (str(second), 2),
    ]
    assert (
        all(float(line[2]) > 0 for line in lines)
        and text == "first.safetensors:1, second.safetensors:0.5"
    )
    pictures = [both, drawn("one", "--lora", first)[2], drawn("none")[2]]
    assert (
        len(set(pictures)) == 3
        and drawn("again", "--lora", f"{first}:1", "--lora", f"{second}:0.5")[2] == both
    )
    assert 'no file "' in refused(
        "generate", "a circle", "--model", where, "--lora", tmp_path / "nowhere.safetensors:0.5"
    )
    assert "the scale must be finite" in refused(
        "generate", "a circle", "--model", where, "--lora", f"{first}:nan"
    )
    assert "holds no LoRA" in refused(
        "generate", "a circle", "--model", where, "--lora", where / "vae.safetensors"
    )


def test_convert_with_a_lora(ran, model, tmp_path):
    where = model.save(tmp_path / "m")
    layers = with_lora(model)
    file = lora_files.save(model, tmp_path / "l.safetensors", "kohya")
    lora.scale(model, 0.8)
    expected = output(model)
    said = ran(
        "convert", where, tmp_path / "new", "--to", "diffusers", "--lora", f"{file}:0.8"
    ).out.splitlines()
    assert said[0].startswith(f"{file}: {len(layers)} layers, probe moved by ") and said[1:] == [
        str(tmp_path / "new")
    ]
    assert (
        output(minidiff.load(tmp_path / "new")) - expected
    ).norm() / expected.norm() < 1e-5  # fp32
