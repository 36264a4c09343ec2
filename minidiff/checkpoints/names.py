"""Our parameter names and the published ones, as short tables: one for each layout, read both ways.

A row pairs a piece of a published name with our piece for it; pieces begin and end at dots, {} is a
number. Rows are applied from the top to get our names, and from the bottom, turned round, to get
the published ones. None: a tensor with this piece in its name is dropped on purpose.
"""

import re
from collections.abc import Sequence
from typing import TypeVar

from minidiff.errors import UserError

Table = list[tuple[str, str | None]]
T = TypeVar("T")


def _table(rows: str) -> Table:
    """Rows of two words, with commas between them; "-" means None."""
    pairs = [row.split() for row in rows.split(",")]
    return [(published, None if ours == "-" else ours) for published, ours in pairs]


def _pattern(piece: str) -> re.Pattern[str]:
    return re.compile(r"(?<![^.])" + re.escape(piece).replace(r"\{\}", r"(\d+)") + r"(?![^.])")


def to_ours(state: dict[str, T], table: Table) -> dict[str, T]:
    """The same tensors under our names. Two with one name are an error that names them."""
    numbers = (r"\g<1>", r"\g<2>")  # the k-th {} is the k-th number of the other piece
    rows = [(_pattern(old), new and new.format(*numbers)) for old, new in table]
    renamed: dict[str, T] = {}
    originals: dict[str, str] = {}
    for original, value in state.items():
        if any(new is None and pattern.search(original) for pattern, new in rows):
            continue
        name = original
        for pattern, new in rows:
            name = name if new is None else pattern.sub(new, name)
        if name in renamed:
            both = f'"{original}" and "{originals[name]}" both mean "{name}"'
            raise UserError(f"{both}; a checkpoint holds one of the two.")
        renamed[name], originals[name] = value, original
    return renamed


def to_published(state: dict[str, T], table: Table) -> dict[str, T]:
    """The same tensors under the published names."""
    back = [(ours, published) for published, ours in reversed(table) if ours is not None]
    return to_ours(state, back)


# Networks of diffusers' layout.

_ATTENTION = _table("to_q q, to_k k, to_v v, to_out.0 out")
_TRANSFORMER = _ATTENTION + _table("""
    transformer_blocks blocks,  attn1 self_attention,  attn2 cross_attention,
    ff.net.0.proj      ff.up,   ff.net.2 ff.down
""")

# UNet2DConditionModel. On the way back, from the bottom, "time.0" must go before "time".
UNET_DIFFUSERS = _TRANSFORMER + _table("""
    conv_norm_out                 norm_out,
    conv_shortcut                 skip,
    time_emb_proj                 time,
    down_blocks.{}.downsamplers.0 encoder.{}.resample,
    down_blocks.{}.resnets        encoder.{}.residual,
    down_blocks.{}.attentions     encoder.{}.attention,
    mid_block.resnets             middle.residual,
    mid_block.attentions          middle.attention,
    up_blocks.{}.upsamplers.0     decoder.{}.resample,
    up_blocks.{}.resnets          decoder.{}.residual,
    up_blocks.{}.attentions       decoder.{}.attention,
    time_embedding.linear_1       time.0,
    time_embedding.linear_2       time.2,
    add_embedding.linear_1        add.0,
    add_embedding.linear_2        add.2
""")
# AutoencoderKL, and its attention until diffusers 0.18.
VAE_DIFFUSERS = _ATTENTION + _table("""
    conv_norm_out norm_out,  conv_shortcut skip,  quant_conv quant,  post_quant_conv post_quant,
    mid_block.resnets.0                   middle.first,
    mid_block.resnets.1                   middle.second,
    mid_block.attentions.0.group_norm     middle.norm,
    mid_block.attentions.0                middle.attention,
    encoder.down_blocks.{}.downsamplers.0 encoder.levels.{}.resample,
    encoder.down_blocks.{}.resnets        encoder.levels.{}.residual,
    decoder.up_blocks.{}.upsamplers.0     decoder.levels.{}.resample,
    decoder.up_blocks.{}.resnets          decoder.levels.{}.residual
""")
VAE_OLD_ATTENTION = _table("query to_q, key to_k, value to_v, proj_attn to_out.0")
# CLIPTextModel, with and without its prefix "text_model". Only the contrastive loss uses the scale;
# the positions are 0, 1, ..., 76. Only SDXL's second keeps its projection (see parts).
CLIP_TRANSFORMERS = _table("""
    position_ids -,  logit_scale -,  text_projection projection,
    embeddings.token_embedding    token_embedding,
    embeddings.position_embedding position_embedding,
    encoder.layers     blocks,
    self_attn.q_proj   attention.q,
    self_attn.k_proj   attention.k,
    self_attn.v_proj   attention.v,
    self_attn.out_proj attention.out,
    layer_norm1 norm1,  layer_norm2 norm2,  mlp.fc1 up,  mlp.fc2 down,  final_layer_norm norm_out
""")

# Networks of CompVis's layout, the single file. Its U-Net numbers its layers in the order of use.


def unet_compvis(attention: Sequence[bool] = (True, True, True, False), blocks: int = 2) -> Table:
    """UNetModel. attention: which levels have transformers, finest first. blocks: the residual
    blocks of a level."""
    levels, layers, k = len(attention), [("input_blocks.0.0", "conv_in")], 1
    for level in range(levels):
        for i in range(blocks):
            layers.append((f"input_blocks.{k}.0", f"encoder.{level}.residual.{i}"))
            layers.append((f"input_blocks.{k}.1", f"encoder.{level}.attention.{i}"))
            k += 1
        if level < levels - 1:
            layers.append((f"input_blocks.{k}.0.op", f"encoder.{level}.resample.conv"))
            k += 1
    layers += _table("""
        middle_block.0 middle.residual.0,
        middle_block.1 middle.attention.0,
        middle_block.2 middle.residual.1
    """)
    for k in range(levels * (blocks + 1)):
        level, i = divmod(k, blocks + 1)
        transformer = attention[levels - 1 - level]
        layers.append((f"output_blocks.{k}.0", f"decoder.{level}.residual.{i}"))
        if transformer:
            layers.append((f"output_blocks.{k}.1", f"decoder.{level}.attention.{i}"))
        # Halving has a number of its own; doubling follows the last transformer, or replaces it.
        if i == blocks and level < levels - 1:
            up = f"output_blocks.{k}.{1 + transformer}.conv"
            layers.append((up, f"decoder.{level}.resample.conv"))
    # On the way back the residual blocks' "time" must go before "time_embed".
    rest = _table("""
        time_embed time,  label_emb.0 add,  out.0 norm_out,  out.2 conv_out,
        residual.{}.in_layers.0     residual.{}.norm1,
        residual.{}.in_layers.2     residual.{}.conv1,
        residual.{}.emb_layers.1    residual.{}.time,
        residual.{}.out_layers.0    residual.{}.norm2,
        residual.{}.out_layers.3    residual.{}.conv2,
        residual.{}.skip_connection residual.{}.skip
    """)
    return layers + rest + _TRANSFORMER


def vae_compvis(levels: int = 4) -> Table:
    """AutoencoderKL of so many levels. Its attention is made of 1x1 convolutions: two axes more."""
    decoder: Table = []
    for level in range(levels):  # numbered from the finest, though it runs from the coarsest
        up = f"decoder.up.{levels - 1 - level}"
        decoder.append((f"{up}.block", f"decoder.levels.{level}.residual"))
        decoder.append((f"{up}.upsample", f"decoder.levels.{level}.resample"))
    return decoder + _table("""
        encoder.down.{}.block      encoder.levels.{}.residual,
        encoder.down.{}.downsample encoder.levels.{}.resample,
        mid.block_1 middle.first,  mid.block_2 middle.second,
        mid.attn_1.norm            middle.norm,
        mid.attn_1                 middle.attention,
        middle.attention.proj_out  middle.attention.out,
        nin_shortcut skip,  quant_conv quant,  post_quant_conv post_quant
    """)


# open_clip's text encoder, also in SD 2.x's and SDXL's single files. q, k and v are one matrix, and
# the projection is transposed (see parts).
CLIP_OPEN = _table("""
    attn_mask -,  logit_scale -,  text_projection projection.weight,
    positional_embedding   position_embedding.weight,
    transformer.resblocks  blocks,
    attn.out_proj          attention.out,
    attn.in_proj_weight    attention.qkv.weight,
    attn.in_proj_bias      attention.qkv.bias,
    ln_1 norm1,  ln_2 norm2,  mlp.c_fc up,  mlp.c_proj down,  ln_final norm_out
""")

# T5EncoderModel, in folders and single files alike. Its embeddings have two names.
T5 = _table("""
    encoder.embed_tokens -,  shared token_embedding,
    encoder.block.0.layer.0.SelfAttention.relative_attention_bias distance_bias,
    encoder.block blocks,    encoder.final_layer_norm norm_out,
    layer.0.layer_norm norm1,
    layer.0.SelfAttention.q q,  layer.0.SelfAttention.k k,
    layer.0.SelfAttention.v v,  layer.0.SelfAttention.o out,
    layer.1.layer_norm norm2,
    layer.1.DenseReluDense.wi_0 gate,  layer.1.DenseReluDense.wi_1 up,
    layer.1.DenseReluDense.wo   down
""")

# Beside the three networks: the noise schedule as buffers, averages (see layouts), and what only
# training needs.
_BUFFERS = """
    betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod
    log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod logvar
    posterior_variance posterior_log_variance_clipped posterior_mean_coef1 posterior_mean_coef2
    lvlb_weights model_ema loss scale_factor cond_stage_model.logit_scale denoiser v_pred ztsnr
"""
COMPVIS_DROPPED: Table = [(piece, None) for piece in _BUFFERS.split()]

# Low-rank weights. Which layer, and which half: A and down are the same, and so are B and up.

LORA = re.compile(
    r"(?P<layer>.+?)"
    r"(?:(?:\.lora_|[._]lora\.|\.lora_linear_layer\.)(?P<half>A|B|down|up|mid)"
    r"(?:\.default(?:_\d+)?)?\.weight|(?:[._]lora)?\.(?P<alpha>alpha))"
)
# Until diffusers 0.22 they belonged to the attention, not to its layers.
LORA_OLD = _table("""
    processor.to_q    to_q,              processor.to_k    to_k,
    processor.to_v    to_v,              processor.to_out  to_out.0,
    self_attn.to_q    self_attn.q_proj,  self_attn.to_k    self_attn.k_proj,
    self_attn.to_v    self_attn.v_proj,  self_attn.to_out  self_attn.out_proj
""")
