"""Our parameter names and the published ones, as short tables of rules. Every table is all there is to one layout.

A rule rewrites a piece of a dotted name, from the published side to ours. Rules are applied in order, each to the whole name; `None`
drops a tensor on purpose. Renaming is strict: two tensors with one name, or a name that does not fit, is an error that names it.
"""
import re

from torch import Tensor

Rules = list[tuple[str, str | None]]


def rename(state: dict[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """Published names to ours."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        ours: str | None = name
        for pattern, replacement in rules:
            if replacement is None:
                ours = None if re.search(pattern, ours) else ours
            else:
                ours = re.sub(pattern, replacement, ours)
            if ours is None:
                break
        if ours is None:
            continue
        if ours in renamed:
            raise KeyError(f'"{name}" and another tensor are both renamed to "{ours}"')
        renamed[ours] = tensor
    return renamed


RESIDUAL: Rules = [(r"\btime_emb_proj\b", "time"), (r"\bconv_shortcut\b", "skip"), (r"\bconv_norm_out\b", "norm_out")]
ATTENTION: Rules = [(r"\bto_([qkv])\b", r"\1"), (r"\bto_out\.0\b", "out")]

UNET_DIFFUSERS: Rules = [  # diffusers' UNet2DConditionModel
    *RESIDUAL,
    *ATTENTION,
    (r"^time_embedding\.linear_1\b", "time.0"),
    (r"^time_embedding\.linear_2\b", "time.2"),
    (r"^down_blocks\b", "encoder"),
    (r"^mid_block\b", "middle"),
    (r"^up_blocks\b", "decoder"),
    (r"\b(down|up)samplers\.0\b", "resample"),
    (r"\bresnets\b", "residual"),
    (r"\battentions\b", "attention"),
    (r"\btransformer_blocks\b", "blocks"),
    (r"\battn1\b", "self_attention"),
    (r"\battn2\b", "cross_attention"),
    (r"\bff\.net\.0\.proj\b", "ff.up"),
    (r"\bff\.net\.2\b", "ff.down"),
]

VAE_DIFFUSERS: Rules = [  # diffusers' AutoencoderKL, with its old names for the attention too
    *RESIDUAL,
    *ATTENTION,
    (r"\bquery\b", "q"),
    (r"\bkey\b", "k"),
    (r"\bvalue\b", "v"),
    (r"\bproj_attn\b", "out"),
    (r"^quant_conv\b", "quant"),
    (r"^post_quant_conv\b", "post_quant"),
    (r"\bmid_block\.resnets\.0\b", "middle.first"),
    (r"\bmid_block\.resnets\.1\b", "middle.second"),
    (r"\bmid_block\.attentions\.0\.group_norm\b", "middle.norm"),
    (r"\bmid_block\.attentions\.0\b", "middle.attention"),
    (r"\b(down|up)_blocks\b", "levels"),
    (r"\bresnets\b", "residual"),
    (r"\b(down|up)samplers\.0\b", "resample"),
]

CLIP_TRANSFORMERS: Rules = [  # transformers' CLIPTextModel, before and after its prefix went
    (r"^text_model\.", ""),
    (r"position_ids$", None),
    (r"^embeddings\.(token|position)_embedding\b", r"\1_embedding"),
    (r"^encoder\.layers\b", "blocks"),
    (r"\bself_attn\.([qkv])_proj\b", r"attention.\1"),
    (r"\bself_attn\.out_proj\b", "attention.out"),
    (r"\blayer_norm(\d)\b", r"norm\1"),
    (r"\bmlp\.fc1\b", "up"),
    (r"\bmlp\.fc2\b", "down"),
    (r"^final_layer_norm\b", "norm_out"),
]
