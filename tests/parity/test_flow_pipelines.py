"""Whole pictures of SD 3 and FLUX.1 beside diffusers' pipelines, with small random weights; and their files.

20 steps within 1e-4 of diffusers', whose schedule and sinusoids are float32.
"""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import minidiff
from minidiff import mmdit, pipeline
from minidiff.checkpoints import files, flow_models, names_flow, write
from minidiff.checkpoints import lora as lora_files
from minidiff.checkpoints.inspect import inspect
from minidiff.conditioners import FluxText, SD3Text
from minidiff.errors import UserError
from minidiff.finetuning import estimate
from minidiff.methods import lora
from minidiff.methods.editing import Edit
from minidiff.options.sampling import SampleConfig, Size

from . import flow_pipelines

PROMPT, SIZE = "a red cat on a mat", 64
KINDS = ["sd3", "sd3-t5", "sd35-medium", "dev", "schnell"]
pytestmark = pytest.mark.filterwarnings("ignore:.*no T5 in it", "ignore:.*transformer alone")


@pytest.fixture(scope="module", params=KINDS)
def published(request, tmp_path_factory):
    return saved(request.param, tmp_path_factory.mktemp(request.param))


def saved(kind: str, folder):
    """diffusers' pipeline, and its folder."""
    if kind.startswith("sd3"):
        found = flow_pipelines.sd3(folder, kind == "sd3-t5", kind == "sd35-medium")
    else:
        found = flow_pipelines.flux(folder, kind == "dev")
    return found, folder / "model"


def latents() -> torch.Tensor:
    return torch.randn(1, 16, SIZE // 8, SIZE // 8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def theirs(pipeline, guidance: float, steps: int = 20) -> torch.Tensor:
    noise, settings = latents(), dict(height=SIZE, width=SIZE, output_type="pt")
    if "Flux" in type(pipeline).__name__:
        noise = pipeline._pack_latents(noise, 1, 16, SIZE // 8, SIZE // 8)
        dev = pipeline.transformer.config.guidance_embeds
        settings["max_sequence_length"] = 512 if dev else 256
    settings |= dict(latents=noise, guidance_scale=guidance, num_inference_steps=steps)
    return pipeline(PROMPT, **settings).images * 2 - 1


@torch.no_grad()
def ours(model, guidance: float, steps: int = 20) -> torch.Tensor:
    config = SampleConfig(size=Size(SIZE, SIZE))
    *_, last = model.sample([PROMPT], steps, guidance, x_T=latents(), config=config)
    return model.decode(last.x0).clamp(-1, 1)


def difference(model, pipeline, guidance: float, steps: int = 20) -> float:
    gap = ours(model, guidance, steps) - theirs(pipeline, guidance, steps)
    return gap.abs().max().item()


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_picture_is_diffusers(published, guidance):
    found, folder = published
    model = minidiff.load(folder)
    assert theirs(found, 1.0, 1).std() > 0.1
    assert difference(model, found, guidance) < 1e-4


def test_our_folder_and_theirs_hold_the_same(published, tmp_path):
    found, folder = published
    model = minidiff.load(folder)
    model.save(tmp_path / "ours")
    write.save_diffusers(model, tmp_path / "theirs")
    for place in ("ours", "theirs"):
        again = minidiff.load(tmp_path / place)
        assert again.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())
        assert (again.schedule, again.text.config) == (model.schedule, model.text.config)
        if model.text.t5 is not None:
            assert again.text.t5.vocabulary == model.text.t5.vocabulary
    absent = {"text_encoder_3": None, "tokenizer_3": None} if model.text.t5 is None else {}
    opened = type(found).from_pretrained(tmp_path / "theirs", **absent)
    opened.set_progress_bar_config(disable=True)
    assert (theirs(opened, 1.0, 2) - theirs(found, 1.0, 2)).abs().max() < 1e-5


def test_a_single_file_holds_the_same(published, tmp_path):
    _, folder = published
    model, file = minidiff.load(folder), tmp_path / "one.safetensors"
    if model.text.t5 is not None:
        with pytest.warns(UserWarning, match="keep tokenizer_3/|the transformer alone"):
            write.save_compvis(model, file)
    else:
        write.save_compvis(model, file)
    if type(model.text) is FluxText:
        with pytest.raises(UserError, match=r"no VAE and no text encoders; name a diffusers"):
            minidiff.load(file)
        again = minidiff.load(file, vae=folder, text=folder)
    elif model.text.t5 is not None:
        with pytest.warns(UserWarning, match=r"tokenizer.json is missing: .* T5 is left out"):
            assert minidiff.load(file).text.t5 is None
        (tmp_path / "tokenizer_3").mkdir()
        words = folder / "tokenizer_3/tokenizer.json"
        (tmp_path / "tokenizer_3/tokenizer.json").write_text(words.read_text())
        again = minidiff.load(file)
    else:
        again = minidiff.load(file)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())
    assert (again.schedule, again.size) == (model.schedule, model.size)


def test_pictures_and_edits_of_prompts(published):
    """The whole way of `generate`, and from an image on; a size that is no multiple is refused."""
    _, folder = published
    model = minidiff.load(folder)
    config = SampleConfig(steps=2, size=Size(48, 64))
    assert pipeline.generate(model, [PROMPT, ""], config).shape == (2, 3, 48, 64)
    edit = Edit(torch.zeros(1, 3, 48, 64), 0.5)
    assert pipeline.generate(model, [PROMPT], config, edit=edit).shape == (1, 3, 48, 64)
    if type(model.text) is FluxText:
        with pytest.raises(UserError, match=r"FLUX\.1 is told its guidance in one"):
            pipeline.generate(model, [PROMPT], replace(config, negative="a dog"))
    with pytest.raises(UserError, match="size 40 is not divisible by 16"):
        pipeline.generate(model, [PROMPT], SampleConfig(steps=1, size=Size(40, 40)))


@pytest.mark.parametrize("kind, layout", [("sd3", 0), ("dev", 0), ("dev", 1)])
def test_a_lora_is_diffusers(tmp_path, kind, layout):
    """Of kohya's files they read FLUX.1's, and single blocks at the published width alone."""
    found, folder = saved(kind, tmp_path)
    model, file = minidiff.load(folder), tmp_path / "lora.safetensors"
    before = ours(model, 1.0, 2)
    lora.add(model.unet.joint if layout else model.unet, rank=2, alpha=4)
    for layer in lora.adapted(model.unet).values():
        torch.nn.init.normal_(layer.lora.B, std=0.3)
    changed = ours(model, 1.0, 2)
    lora_files.save(model, file, ["diffusers", "kohya"][layout])
    again = minidiff.load(folder)
    lora_files.load(again, file)
    found.load_lora_weights(str(tmp_path), weight_name=file.name)
    assert (changed - before).abs().max() > 0.01
    assert (ours(again, 1.0, 2) - changed).abs().max() < 1e-5
    assert (theirs(found, 1.0, 2) - changed).abs().max() < 1e-4


def test_an_estimate_of_a_finetune_reads_prompts(tmp_path):
    """It builds the text encoders anew, of tensors without numbers; the vocabulary must come along."""
    model = minidiff.load(saved("schnell", tmp_path)[1])
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert estimate._twin(model.text).encode([PROMPT]).context.shape == (1, 256, 224)


# Traps: each loads without complaint, and draws something else.


@pytest.mark.parametrize("trap", ["pooled", "norm", "shift", "spacing", "length"])
def test_a_trap_is_seen(tmp_path, monkeypatch, trap):
    found, folder = saved("sd3-t5", tmp_path)
    model = minidiff.load(folder)
    if trap == "pooled":  # of the wrong encoder: L's and G's change places
        encode = SD3Text.encode
        turned = lambda self, prompts: replace(  # noqa: E731
            encode(self, prompts), pooled=encode(self, prompts).pooled.roll(64, dims=1)
        )
        monkeypatch.setattr(SD3Text, "encode", turned)
    elif trap == "norm":  # the final LayerNorm kept
        model.text.clip_g.config = replace(model.text.clip_g.config, penultimate=False)
    elif trap == "shift":  # of the latents, forgotten
        model.vae.config = replace(model.vae.config, latent_shift=0.0)
    elif trap == "spacing":  # shifted once
        model.spacing = "trailing"
    else:  # T5's padding, which is attended to
        model.text.config = replace(model.text.config, length=77)
    assert difference(model, found, 1.0) > 1e-3


def test_the_guidance_that_flux_is_told_is_seen(tmp_path):
    found, folder = saved("dev", tmp_path)
    model = minidiff.load(folder)
    assert model.guidance == 3.5
    assert (ours(model, 4.0, 2) - theirs(found, 1.0, 2)).abs().max() > 1e-3


# Names, from headers alone.

MEMBERS = {
    "Stable Diffusion 3 medium": (mmdit.sd3_medium, names_flow.SD3, "2.08 G"),
    "Stable Diffusion 3.5 medium": (mmdit.sd35_medium, names_flow.SD3, "2.47 G"),
    "Stable Diffusion 3.5 large, or its turbo": (mmdit.sd35_large, names_flow.SD3, "8.15 G"),
    "FLUX.1-dev": (mmdit.flux_dev, names_flow.FLUX, "11.9 G"),
    "FLUX.1-schnell": (mmdit.flux_schnell, names_flow.FLUX, "11.9 G"),
}


def write_header(file, shapes: dict, dtype: str = "BF16") -> None:
    """A safetensors file of these shapes whose numbers take no room on the disk."""
    listed, place = {}, 0
    for name, shape in shapes.items():
        end = place + math.prod(shape) * files.BYTES[dtype]
        listed[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(listed).encode()
    with open(file, "wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + place)


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_inspect_names_a_transformer_alone(tmp_path, name, prefix):
    build, layout, parameters = MEMBERS[name]
    with torch.device("meta"):
        state = names_flow.write(build().state_dict(), layout)
    shapes = {prefix + key: tuple(value.shape) for key, value in state.items()}
    write_header(tmp_path / "one.safetensors", shapes)
    rows = inspect(tmp_path / "one.safetensors")
    found = dict(rows)
    assert found["version"] == name and found["transformer"].startswith(parameters)
    assert found["transformer, missing keys"] == found["transformer, extra keys"] == "none"
    assert "no VAE and no text encoders" in found["cannot"]


def test_files_of_other_programs_say_why(tmp_path):
    name, file = "double_blocks.0.img_attn.qkv.weight", tmp_path / "one.safetensors"
    for mark, why in ((".quant_state.bitsandbytes__nf4", "4 bits"), (".scale_weight", "8 bits")):
        write_header(file, {name: (6, 2), name + mark: (3,)})
        found = dict(inspect(file))
        assert found["version"] == "FLUX.1" and why in found["cannot"]
        with pytest.raises(UserError, match=why):
            minidiff.load(file)
    (tmp_path / "one.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"quantized \(GGUF\), for other programs"):
        minidiff.load(tmp_path / "one.gguf")


def test_a_spiece_model_says_what_makes_a_tokenizer_json(tmp_path):
    _, folder = saved("sd3-t5", tmp_path)
    (folder / "tokenizer_3/tokenizer.json").unlink()
    (folder / "tokenizer_3/spiece.model").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"spiece.model is not read here; transformers makes"):
        assert minidiff.load(folder).text.t5 is None


def test_flux_without_a_vocabulary_is_refused(tmp_path):
    _, folder = saved("dev", tmp_path)
    (folder / "tokenizer_2/tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer_2/tokenizer.json is missing"):
        minidiff.load(folder)


def test_a_transformer_alone_takes_the_rest_from_a_folder(tmp_path):
    found, folder = saved("schnell", tmp_path)
    model = minidiff.load(folder / "transformer", vae=folder / "vae", text=folder)
    assert difference(model, found, 1.0, 2) < 1e-4
    assert flow_models.family_of(folder / "transformer") is flow_models.FLUX
