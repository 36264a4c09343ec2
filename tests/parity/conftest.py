"""A whole Stable Diffusion of the true layout and little weight, for comparisons with diffusers' pipelines."""

import pytest
import torch

from minidiff.checkpoints import write

from . import oracles


@pytest.fixture(autouse=True)
def oracles_that_work(request):
    """Where the oracles do not fit each other every comparison says so, rather than a difference of numbers."""
    if "test_oracles" not in request.node.nodeid and oracles.complaint() is not None:
        pytest.fail(f"not minidiff: {oracles.complaint()}", pytrace=False)


@pytest.fixture(scope="module", params=["sd1", "sd2", "sd2-v"])
def pipeline(request, tmp_path_factory):
    """A StableDiffusionPipeline of the true layout and little weight, with SD's published scheduler
    settings; and its folder. A module whose tests sample, whatever the network, says LEVELS = 2:
    its U-Net has two levels in place of four, and a block each in place of two."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    from .test_networks import randomized

    second = request.param.startswith("sd2")
    levels = getattr(request.module, "LEVELS", 4)
    widths, heads = ((64, 64, 128, 128), (1, 1, 2, 2)) if second else ((32, 64, 64, 64), (8,) * 4)
    if levels == 2:
        widths, heads = widths[1:3], heads[1:3]
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=widths,
        layers_per_block=levels // 2,
        down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        cross_attention_dim=64,
        attention_head_dim=heads if second else 8,
        use_linear_projection=second,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=64,
    )
    config = transformers.CLIPTextConfig(
        vocab_size=49408,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=1,
        projection_dim=64,
        hidden_act="gelu" if second else "quick_gelu",
        bos_token_id=49406,
        eos_token_id=49407,
    )
    folder = tmp_path_factory.mktemp(request.param)
    for name, content in write.tokenizer_files(0 if second else 49407, 77).items():
        (folder / name).write_text(content, encoding="utf-8")
    found = diffusers.StableDiffusionPipeline(
        vae=randomized(vae, torch.float32),
        text_encoder=randomized(transformers.CLIPTextModel(config), torch.float32),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder),
        unet=randomized(unet, torch.float32),
        scheduler=diffusers.DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type="v_prediction" if request.param == "sd2-v" else "epsilon",
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    found.set_progress_bar_config(disable=True)
    found.save_pretrained(folder / "model")
    return found, folder / "model"
