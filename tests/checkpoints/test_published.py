"""Files in the form in which they were published, which today's libraries no longer write."""

import json
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

import minidiff
from minidiff.checkpoints import hub, write
from minidiff.checkpoints.inspect import inspect
from minidiff.errors import UserError


def added(content):
    return {"content": content, "lstrip": False, "normalized": True, "rstrip": False}


@pytest.mark.parametrize("padding", ["!", added("!")], ids=["text", "object"])
def test_sd_2_pads_with_what_the_map_of_special_tokens_says(sd, tmp_path, padding):
    """tokenizer_config.json of SD 2.x names the end token; transformers goes by the other file."""
    folder = write.save_diffusers(sd(second=True), tmp_path / "sd2")
    special = {name: added("<|endoftext|>") for name in ("eos_token", "unk_token")}
    config = {"pad_token": "<|endoftext|>", "model_max_length": 77}
    tokenizer = folder / "tokenizer"
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    (tokenizer / "special_tokens_map.json").write_text(json.dumps(special | {"pad_token": padding}))
    assert minidiff.load(folder).text.pad == 0
    (tokenizer / "special_tokens_map.json").write_text(json.dumps(special))
    assert minidiff.load(folder).text.pad == 49407


def test_the_hub_is_asked_for_the_tokens(sd, tmp_path):
    assert {"*/special_tokens_map.json", "*/added_tokens.json"} <= set(hub.SETTINGS)


@pytest.mark.parametrize("form", ["added_tokens.json", "tokenizer_config.json", "tokenizer.json"])
def test_words_added_to_a_tokenizer_are_read(sd, tmp_path, form):
    """As textual_inversion.py saves a whole pipeline."""
    folder = write.save_diffusers(sd(), tmp_path / "sd")
    file = folder / "tokenizer" / form
    if form == "added_tokens.json":
        file.write_text(json.dumps({"<cat-toy>": 49408}))
    elif form == "tokenizer.json":
        file.write_text(json.dumps({"added_tokens": [{"id": 49408, **added("<cat-toy>")}]}))
    else:
        decoder = {"49407": added("<|endoftext|>"), "49408": added("<cat-toy>")}
        config = json.loads(file.read_text()) | {"added_tokens_decoder": decoder}
        file.write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=r'the tokenizer\'s own word "<cat-toy>" has no vector'):
        minidiff.load(folder)
    assert any("<cat-toy>" in text for _, text in inspect(folder))
    state = load_file(folder / "text_encoder/model.safetensors")
    (name,) = (name for name in state if name.endswith("token_embedding.weight"))
    state[name] = torch.cat([state[name], torch.ones(1, 64)])
    save_file(state, folder / "text_encoder/model.safetensors")
    text = minidiff.load(folder).text
    assert text.ids("a <Cat-Toy>s") == (*text.ids("a"), 49408, *text.ids("s"))


@pytest.mark.parametrize("part", ["vae", "unet"])
def test_a_part_in_a_folder_of_its_own(sd, tmp_path, part):
    """As sd-vae-ft-mse is, and as checkpoint-500/unet of a training."""
    model, other = sd(), sd()
    torch.nn.init.constant_(other.vae.quant.bias, 3.0)
    torch.nn.init.constant_(other.unet.conv_in.bias, 3.0)
    whole = write.save_diffusers(model, tmp_path / "sd")
    folder = write.save_diffusers(other, tmp_path / "other") / part
    loaded = minidiff.load(whole, **{part: folder})
    assert (loaded.vae.quant.bias == 3).all() == (part == "vae")
    assert (loaded.unet.conv_in.bias == 3).all() == (part == "unet")
    (folder / "config.json").write_text('{"norm_num_groups": "many", "block_out_channels": 7}')
    with pytest.raises(UserError, match=rf"{part}.*(is damaged|has such sizes)"):
        minidiff.load(whole, **{part: folder})


@pytest.mark.filterwarnings("error")
def test_a_tokenizer_without_words_of_its_own_is_not_warned_of(sd, tmp_path):
    folder = write.save_diffusers(sd(), tmp_path / "sd")
    file = folder / "tokenizer" / "tokenizer_config.json"
    decoder = {"49406": added("<|startoftext|>"), "49407": added("<|endoftext|>")}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"added_tokens_decoder": decoder}))
    minidiff.load(folder)


def test_a_training_checkpoint_of_lightning(sd, tmp_path, monkeypatch):
    """sd-v1-4.ckpt: beside the tensors a class of pytorch_lightning is the key of a dictionary."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    for module in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    callback = type("ModelCheckpoint", (), {"__module__": name})
    sys.modules[name].ModelCheckpoint = callback
    single = write.save_compvis(sd(), tmp_path / "one.safetensors")
    content = {
        "epoch": 4,
        "global_step": 470000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": load_file(single),
        "callbacks": {callback: {"monitor": None, "best_model_score": None, "dirpath": "/fsx/x"}},
        "optimizer_states": [],
    }
    torch.save(content, tmp_path / "sd-v1-4.ckpt")
    monkeypatch.undo()
    model = minidiff.load(tmp_path / "sd-v1-4.ckpt")
    assert torch.equal(model.unet.conv_in.bias, minidiff.load(single).unet.conv_in.bias)
    assert "pytorch_lightning" not in sys.modules
