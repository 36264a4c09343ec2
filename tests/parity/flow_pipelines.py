"""diffusers' pipelines of SD 3 and FLUX.1 with true layouts, published settings and little weight."""

import diffusers
import tokenizers
import torch
import transformers

from minidiff.checkpoints import write

from .test_networks import randomized

WIDTH_T5 = 224


def small_vocabulary() -> str:
    """A SentencePiece vocabulary of letters and a few words, as tokenizer.json has it."""
    letters = [(letter, -6.0) for letter in "▁abcdefghijklmnopqrstuvwxyz!5"]
    words = [("▁a", -2.0), ("▁cat", -3.0), ("▁red", -3.0), ("▁on", -3.0), ("s", -4.0)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += words + [each for each in letters if each[0] not in dict(words)]
    found = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, unk_id=2))
    found.normalizer = tokenizers.normalizers.NFKC()
    found.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    found.decoder = tokenizers.decoders.Metaspace()
    found.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return found.to_str()


def clip(width: int, projected: bool, activation: str) -> torch.nn.Module:
    config = transformers.CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=width // 64,
        projection_dim=width,
        hidden_act=activation,
        bos_token_id=49406,
        eos_token_id=49407,
    )
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return randomized(kind(config), torch.float32)


def clip_tokenizer(folder, pad: int) -> transformers.CLIPTokenizer:
    folder.mkdir(parents=True)
    for name, content in write.tokenizer_files(pad, 77).items():
        (folder / name).write_text(content, encoding="utf-8")
    return transformers.CLIPTokenizer.from_pretrained(folder)


def t5_encoder() -> torch.nn.Module:
    config = transformers.T5Config(
        d_model=WIDTH_T5,
        d_kv=8,
        d_ff=40,
        num_layers=2,
        num_heads=4,
        vocab_size=64,
        feed_forward_proj="gated-gelu",
    )
    return randomized(transformers.T5EncoderModel(config), torch.float32)


def t5_tokenizer() -> transformers.PreTrainedTokenizerFast:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(small_vocabulary()),
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def vae(scale: float, shift: float) -> torch.nn.Module:
    found = diffusers.AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=16,
        sample_size=64,
        scaling_factor=scale,
        shift_factor=shift,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return randomized(found, torch.float32)


def sd3(folder, t5: bool = False, medium35: bool = False) -> diffusers.StableDiffusion3Pipeline:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        num_layers=3,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=WIDTH_T5,
        caption_projection_dim=128,
        pooled_projection_dim=64 + 128,
        out_channels=16,
        pos_embed_max_size=12,
        dual_attention_layers=(0, 1) if medium35 else (),
        qk_norm="rms_norm" if medium35 else None,
    )
    clip_l = clip(64, True, "quick_gelu")
    clip_l.text_projection.weight.data = torch.eye(64)  # as published
    found = diffusers.StableDiffusion3Pipeline(
        transformer=randomized(transformer, torch.float32),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(1.5305, 0.0609),
        text_encoder=clip_l,
        tokenizer=clip_tokenizer(folder / "l", 49407),
        text_encoder_2=clip(128, True, "gelu"),
        tokenizer_2=clip_tokenizer(folder / "g", 0),
        text_encoder_3=t5_encoder() if t5 else None,
        tokenizer_3=t5_tokenizer() if t5 else None,
    )
    return _saved(found, folder)


def flux(folder, dev: bool = True) -> diffusers.FluxPipeline:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=WIDTH_T5,
        pooled_projection_dim=64,
        guidance_embeds=dev,
        axes_dims_rope=(4, 14, 14),
    )
    dynamic = dict(shift=3.0, use_dynamic_shifting=True) if dev else dict(shift=1.0)
    found = diffusers.FluxPipeline(
        transformer=randomized(transformer, torch.float32),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**dynamic),
        vae=vae(0.3611, 0.1159),
        text_encoder=clip(64, False, "quick_gelu"),
        tokenizer=clip_tokenizer(folder / "l", 49407),
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
    )
    return _saved(found, folder)


def _saved(pipeline, folder):
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder / "model")
    return pipeline
