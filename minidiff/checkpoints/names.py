"""Our parameter names and the published ones, as short tables. Each table is all there is to one layout, and reads both ways.

A row pairs a piece of a published name with the piece of ours that stands in its place; pieces begin and end at dots, {} is a number.
Rows are applied from the top to come to our names, and from the bottom, turned round, to come back. None in place of ours: a tensor
with this piece in its name is dropped on purpose.
"""

import re
from collections.abc import Sequence
from typing import TypeVar

from minidiff.errors import UserError

Table = list[tuple[str, str | None]]
T = TypeVar("T")


def _pattern(piece: str) -> re.Pattern[str]:
    return re.compile(r"(?<![^.])" + re.escape(piece).replace(r"\{\}", r"(\d+)") + r"(?![^.])")


def _renamed(state: dict[str, T], table: Table) -> dict[str, T]:
    dropped = [_pattern(old) for old, new in table if new is None]
    rows = []
    for old, new in table:
        if new is not None:
            for number in range(1, new.count("{}") + 1):
                new = new.replace("{}", rf"\g<{number}>", 1)
            rows.append((_pattern(old), new))
    result, meant = {}, {}
    for name, value in state.items():
        if any(pattern.search(name) for pattern in dropped):
            continue
        new = name
        for pattern, replacement in rows:
            new = pattern.sub(replacement, new)
        if new in result:
            raise UserError(
                f'"{name}" and "{meant[new]}" both mean "{new}"; a checkpoint holds one of the two.'
            )
        result[new], meant[new] = value, name
    return result


def to_ours(state: dict[str, T], table: Table) -> dict[str, T]:
    """The same tensors under our names. Two with one name are an error that names them."""
    return _renamed(state, table)


def to_published(state: dict[str, T], table: Table) -> dict[str, T]:
    """The same tensors under the published names."""
    return _renamed(
        state, [(ours, published) for published, ours in reversed(table) if ours is not None]
    )


# Networks of diffusers' layout.

_ATTENTION: Table = [("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "out")]
_TRANSFORMER: Table = [
    *_ATTENTION,
    ("transformer_blocks", "blocks"),
    ("attn1", "self_attention"),
    ("attn2", "cross_attention"),
    ("ff.net.0.proj", "ff.up"),
    ("ff.net.2", "ff.down"),
]

UNET_DIFFUSERS: Table = [  # UNet2DConditionModel
    *_TRANSFORMER,
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "skip"),
    ("time_emb_proj", "time"),
    ("down_blocks.{}.downsamplers.0", "encoder.{}.resample"),
    ("down_blocks.{}.resnets", "encoder.{}.residual"),
    ("down_blocks.{}.attentions", "encoder.{}.attention"),
    ("mid_block.resnets", "middle.residual"),
    ("mid_block.attentions", "middle.attention"),
    ("up_blocks.{}.upsamplers.0", "decoder.{}.resample"),
    ("up_blocks.{}.resnets", "decoder.{}.residual"),
    ("up_blocks.{}.attentions", "decoder.{}.attention"),
    (
        "time_embedding.linear_1",
        "time.0",
    ),  # below time_emb_proj: on the way back "time.0" must go first
    ("time_embedding.linear_2", "time.2"),
]

VAE_DIFFUSERS: Table = [  # AutoencoderKL
    *_ATTENTION,
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "skip"),
    ("quant_conv", "quant"),
    ("post_quant_conv", "post_quant"),
    ("mid_block.resnets.0", "middle.first"),
    ("mid_block.resnets.1", "middle.second"),
    ("mid_block.attentions.0.group_norm", "middle.norm"),
    ("mid_block.attentions.0", "middle.attention"),
    ("encoder.down_blocks.{}.downsamplers.0", "encoder.levels.{}.resample"),
    ("encoder.down_blocks.{}.resnets", "encoder.levels.{}.residual"),
    ("decoder.up_blocks.{}.upsamplers.0", "decoder.levels.{}.resample"),
    ("decoder.up_blocks.{}.resnets", "decoder.levels.{}.residual"),
]
VAE_OLD_ATTENTION: Table = [
    ("query", "to_q"),
    ("key", "to_k"),
    ("value", "to_v"),
    ("proj_attn", "to_out.0"),
]  # until diffusers 0.18

CLIP_TRANSFORMERS: Table = [  # CLIPTextModel; files of before and after its prefix "text_model" went
    ("position_ids", None),  # 0, 1, ..., 76
    ("text_projection", None),  # of use to the contrastive loss only
    ("logit_scale", None),
    ("embeddings.token_embedding", "token_embedding"),
    ("embeddings.position_embedding", "position_embedding"),
    ("encoder.layers", "blocks"),
    ("self_attn.q_proj", "attention.q"),
    ("self_attn.k_proj", "attention.k"),
    ("self_attn.v_proj", "attention.v"),
    ("self_attn.out_proj", "attention.out"),
    ("layer_norm1", "norm1"),
    ("layer_norm2", "norm2"),
    ("mlp.fc1", "up"),
    ("mlp.fc2", "down"),
    ("final_layer_norm", "norm_out"),
]

# Networks of CompVis's layout, the single file. Its U-Net numbers its layers in the order in which they run.


def unet_compvis(attention: Sequence[bool] = (True, True, True, False), blocks: int = 2) -> Table:
    """UNetModel; `attention` says which levels have transformers, finest first, and `blocks` is the residual blocks a level."""
    levels, layers, k = len(attention), [("input_blocks.0.0", "conv_in")], 1
    for level in range(levels):
        for i in range(blocks):
            layers += [
                (f"input_blocks.{k}.0", f"encoder.{level}.residual.{i}"),
                (f"input_blocks.{k}.1", f"encoder.{level}.attention.{i}"),
            ]
            k += 1
        if level < levels - 1:
            layers.append((f"input_blocks.{k}.0.op", f"encoder.{level}.resample.conv"))
            k += 1
    layers += [
        ("middle_block.0", "middle.residual.0"),
        ("middle_block.1", "middle.attention.0"),
        ("middle_block.2", "middle.residual.1"),
    ]
    for k in range(levels * (blocks + 1)):
        level, i = divmod(k, blocks + 1)
        transformer = attention[levels - 1 - level]
        layers.append((f"output_blocks.{k}.0", f"decoder.{level}.residual.{i}"))
        if transformer:
            layers.append((f"output_blocks.{k}.1", f"decoder.{level}.attention.{i}"))
        if (
            i == blocks and level < levels - 1
        ):  # halving has a number of its own; doubling stands behind the last transformer, or in its place
            layers.append(
                (f"output_blocks.{k}.{1 + transformer}.conv", f"decoder.{level}.resample.conv")
            )
    return [
        *layers,
        (
            "time_embed",
            "time",
        ),  # above the residual blocks' "time": on the way back theirs must go first
        ("residual.{}.in_layers.0", "residual.{}.norm1"),
        ("residual.{}.in_layers.2", "residual.{}.conv1"),
        ("residual.{}.emb_layers.1", "residual.{}.time"),
        ("residual.{}.out_layers.0", "residual.{}.norm2"),
        ("residual.{}.out_layers.3", "residual.{}.conv2"),
        ("residual.{}.skip_connection", "residual.{}.skip"),
        ("out.0", "norm_out"),
        ("out.2", "conv_out"),
        *_TRANSFORMER,
    ]


def vae_compvis(levels: int = 4) -> Table:
    """AutoencoderKL of so many levels. Its attention is made of 1x1 convolutions: the same numbers, two axes more."""
    decoder: Table = []
    for level in range(levels):  # numbered from the finest, though it runs from the coarsest
        decoder.append(
            (f"decoder.up.{levels - 1 - level}.block", f"decoder.levels.{level}.residual")
        )
        decoder.append(
            (f"decoder.up.{levels - 1 - level}.upsample", f"decoder.levels.{level}.resample")
        )
    return [
        ("encoder.down.{}.block", "encoder.levels.{}.residual"),
        ("encoder.down.{}.downsample", "encoder.levels.{}.resample"),
        *decoder,
        ("mid.block_1", "middle.first"),
        ("mid.block_2", "middle.second"),
        ("mid.attn_1.norm", "middle.norm"),
        ("mid.attn_1", "middle.attention"),
        ("middle.attention.proj_out", "middle.attention.out"),
        ("nin_shortcut", "skip"),
        ("quant_conv", "quant"),
        ("post_quant_conv", "post_quant"),
    ]


CLIP_OPEN: Table = [  # open_clip's text tower, also in SD 2.x's single file. It keeps q, k and v in one matrix (see layouts)
    ("attn_mask", None),
    ("text_projection", None),
    ("logit_scale", None),
    ("positional_embedding", "position_embedding.weight"),
    ("transformer.resblocks", "blocks"),
    ("ln_1", "norm1"),
    ("ln_2", "norm2"),
    ("attn.out_proj", "attention.out"),
    ("attn.in_proj_weight", "attention.qkv.weight"),
    ("attn.in_proj_bias", "attention.qkv.bias"),
    ("mlp.c_fc", "up"),
    ("mlp.c_proj", "down"),
    ("ln_final", "norm_out"),
]

COMPVIS_DROPPED: Table = [  # beside the three networks: the noise levels as buffers, averages (see layouts), and what only training needs
    *(
        (piece, None)
        for piece in (
            "betas",
            "alphas_cumprod",
            "alphas_cumprod_prev",
            "sqrt_alphas_cumprod",
            "sqrt_one_minus_alphas_cumprod",
        )
    ),
    *(
        (piece, None)
        for piece in (
            "log_one_minus_alphas_cumprod",
            "sqrt_recip_alphas_cumprod",
            "sqrt_recipm1_alphas_cumprod",
            "logvar",
        )
    ),
    *(
        (piece, None)
        for piece in (
            "posterior_variance",
            "posterior_log_variance_clipped",
            "posterior_mean_coef1",
            "posterior_mean_coef2",
        )
    ),
    *(
        (piece, None)
        for piece in (
            "lvlb_weights",
            "model_ema",
            "loss",
            "scale_factor",
            "cond_stage_model.logit_scale",
        )
    ),
]

# Low-rank weights. Which layer, and which half: A and down are the same, and so are B and up.

LORA = re.compile(
    r"(?P<layer>.+?)"
    r"(?:(?:\.lora_|[._]lora\.|\.lora_linear_layer\.)(?P<half>A|B|down|up)(?:\.default(?:_\d+)?)?\.weight|(?:[._]lora)?\.(?P<alpha>alpha))"
)
LORA_OLD: Table = [  # until diffusers 0.22 they belonged to the attention, not to its layers
    *((f"processor.to_{piece}", f"to_{piece}") for piece in "qkv"),
    ("processor.to_out", "to_out.0"),
    *((f"self_attn.to_{piece}", f"self_attn.{piece}_proj") for piece in "qkv"),
    ("self_attn.to_out", "self_attn.out_proj"),
]
