"""The transformers of SD3 and FLUX.1 in published files, read both ways; for tables see names.py.

Where ours differ from the files by more than names:

    q, k, v     one matrix in Stability's and Black Forest Labs' files; in FLUX's single blocks, of
                q, k, v and the MLP's first layer
    halves      of the last modulations: shift, scale; in diffusers' files scale, shift
    patches     channel, row, column; at the end of SD3: row, column, channel. FLUX's first layer is
                linear, ours the same as a convolution
"""

import math
import re
from typing import NamedTuple

from minidiff.checkpoints import sizes
from minidiff.checkpoints.names import Table, _table, to_ours, to_published
from minidiff.errors import UserError

State = dict  # by name: Tensor or Stored
PATCH = 2  # side of a patch; a linear first layer does not tell it
ENDS = re.compile(r"modulation_out\.|joint\.\d+\.text\.modulation\.")


class Layout(NamedTuple):
    """Whose names, and of which of the two."""

    table: Table
    flux: bool
    diffusers: bool


# On the way back rows are taken from the bottom.
_DIFFUSERS = _table("""
    norm_out.linear modulation_out,  proj_out patch_out,  context_embedder text_in,
    to_q q,  to_k k,  to_v v,  to_out.0 out,
    time_text_embed.timestep_embedder time,
    time_text_embed.text_embedder     pooled,
    time_text_embed.guidance_embedder guidance,
    time.linear_1     time.0,      time.linear_2     time.2,
    pooled.linear_1   pooled.0,    pooled.linear_2   pooled.2,
    guidance.linear_1 guidance.0,  guidance.linear_2 guidance.2,
    transformer_blocks.{}.attn.add_q_proj       joint.{}.text.attention.q,
    transformer_blocks.{}.attn.add_k_proj       joint.{}.text.attention.k,
    transformer_blocks.{}.attn.add_v_proj       joint.{}.text.attention.v,
    transformer_blocks.{}.attn.to_add_out       joint.{}.text.attention.out,
    transformer_blocks.{}.attn.norm_added_q     joint.{}.text.attention.norm_q,
    transformer_blocks.{}.attn.norm_added_k     joint.{}.text.attention.norm_k,
    transformer_blocks.{}.norm1_context.linear  joint.{}.text.modulation,
    transformer_blocks.{}.ff_context.net.0.proj joint.{}.text.up,
    transformer_blocks.{}.ff_context.net.2      joint.{}.text.down,
    transformer_blocks.{}.attn                  joint.{}.image.attention,
    transformer_blocks.{}.attn2                 joint.{}.image.dual,
    transformer_blocks.{}.norm1.linear          joint.{}.image.modulation,
    transformer_blocks.{}.ff.net.0.proj         joint.{}.image.up,
    transformer_blocks.{}.ff.net.2              joint.{}.image.down,
    single_transformer_blocks.{}.attn           single.{}.attention,
    single_transformer_blocks.{}.norm.linear    single.{}.modulation,
    single_transformer_blocks.{}.proj_mlp       single.{}.up,
    single_transformer_blocks.{}.patch_out      single.{}.down
""")
_STABILITY = _table("""
    pos_embed table,  x_embedder.proj patch_in,  context_embedder text_in,
    t_embedder.mlp time,  y_embedder.mlp pooled,
    final_layer.linear patch_out,  final_layer.adaLN_modulation.1 modulation_out,
    joint_blocks.{}.context_block joint.{}.text,
    joint_blocks.{}.x_block       joint.{}.image,
    adaLN_modulation.1 modulation,  mlp.fc1 up,  mlp.fc2 down,
    attn attention,  attn2 dual,  proj out,  ln_q norm_q,  ln_k norm_k
""")
_BLACK_FOREST_LABS = _table("""
    img_in patch_in,  txt_in text_in,
    final_layer.linear patch_out,  final_layer.adaLN_modulation.1 modulation_out,
    time_in     time,      time.in_layer     time.0,      time.out_layer     time.2,
    vector_in   pooled,    pooled.in_layer   pooled.0,    pooled.out_layer   pooled.2,
    guidance_in guidance,  guidance.in_layer guidance.0,  guidance.out_layer guidance.2,
    double_blocks.{}.txt_mod.lin    joint.{}.text.modulation,
    double_blocks.{}.txt_mlp.0      joint.{}.text.up,
    double_blocks.{}.txt_mlp.2      joint.{}.text.down,
    double_blocks.{}.txt_attn       joint.{}.text.attention,
    double_blocks.{}.img_mod.lin    joint.{}.image.modulation,
    double_blocks.{}.img_mlp.0      joint.{}.image.up,
    double_blocks.{}.img_mlp.2      joint.{}.image.down,
    double_blocks.{}.img_attn       joint.{}.image.attention,
    single_blocks.{}.modulation.lin single.{}.modulation,
    single_blocks.{}.linear1        single.{}.attention.qkv_up,
    single_blocks.{}.linear2        single.{}.down,
    single_blocks.{}.norm           single.{}.attention.norm,
    norm.query_norm.scale norm_q.weight,  norm.key_norm.scale norm_k.weight,  proj out
""")
SD3 = Layout(_STABILITY, flux=False, diffusers=False)
FLUX = Layout(_BLACK_FOREST_LABS, flux=True, diffusers=False)
SD3_DIFFUSERS = Layout(
    _table("pos_embed.pos_embed table, pos_embed.proj patch_in") + _DIFFUSERS, False, True
)
FLUX_DIFFUSERS = Layout(_table("x_embedder patch_in") + _DIFFUSERS, True, True)
MARKS = {
    "joint_blocks.": SD3,
    "double_blocks.": FLUX,
    "pos_embed.proj.": SD3_DIFFUSERS,
    "x_embedder.": FLUX_DIFFUSERS,
}


def layout_of(state: State) -> Layout:
    """Whose names a transformer's tensors have."""
    for mark, layout in MARKS.items():
        if any(name.startswith(mark) for name in state):
            return layout
    first = min(state, default="none")
    raise UserError(f'no transformer of SD3 or FLUX.1; its first tensor is "{first}".')


def read(state: State, layout: Layout) -> State:
    """The same tensors under our names and in our order."""
    ours: State = {}
    for name, value in to_ours(state, layout.table).items():
        if ".qkv." in name:
            for letter, piece in zip("qkv", value.chunk(3), strict=True):
                ours[name.replace(".qkv.", f".{letter}.")] = piece
        elif ".attention.qkv_up." in name:
            width = value.shape[0] // 7
            *qkv, up = value.split((width, width, width, 4 * width))
            ours[name.replace(".attention.qkv_up.", ".up.")] = up
            for letter, piece in zip("qkv", qkv, strict=True):
                ours[name.replace(".qkv_up.", f".{letter}.")] = piece
        else:
            ours[name] = value
    return _ordered(ours, layout, reading=True)


def write(state: State, layout: Layout) -> State:
    """The inverse of read; of tensors alone."""
    import torch

    state = _ordered(state, layout, reading=False)
    for name in list(state) if not layout.diffusers else ():
        if ".q." not in name:
            continue
        joined, fused = [state.pop(name.replace(".q.", f".{letter}.")) for letter in "qkv"], "qkv"
        if name.startswith("single."):
            joined.append(state.pop(name.replace(".attention.q.", ".up.")))
            fused = "qkv_up"
        state[name.replace(".q.", f".{fused}.")] = torch.cat(joined)
    return to_published(state, layout.table)


def fused(layer: str) -> str:
    """Our name of the fused layer that a layer's rows stand in, or the layer's own."""
    layer = re.sub(r"^(single\.\d+)\.(attention\.[qkv]|up)$", r"\1.attention.qkv_up", layer)
    return re.sub(r"\.[qkv]$", ".qkv", layer)


def _ordered(state: State, layout: Layout, reading: bool) -> State:
    """Halves, patches and the first layer in our order, or in the file's."""
    state, width = dict(state), state["text_in.bias"].shape[0]
    for name, value in state.items():
        rows, *inner = value.shape
        if layout.diffusers and ENDS.match(name) and rows == 2 * width:
            state[name] = value.roll(width, 0)
        elif name.startswith("patch_out.") and not layout.flux:
            places = (PATCH**2, rows // PATCH**2) if reading else (rows // PATCH**2, PATCH**2)
            state[name] = value.reshape(*places, *inner).transpose(0, 1).reshape(rows, *inner)
        elif name == "patch_in.weight" and layout.flux:
            shape = (inner[0] // PATCH**2, PATCH, PATCH) if reading else (math.prod(inner),)
            state[name] = value.reshape(rows, *shape)
    return state


def config(state: State) -> dict:
    """The arguments of MMDiTConfig, from tensors under our names. A head's size is that of its
    norms, or 64 (SD3); the axes of rotary positions are in FLUX.1's proportions."""
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    width, context_dim = sizes._shape(shapes, "text_in.weight", 2)
    _, in_channels, patch, _ = sizes._shape(shapes, "patch_in.weight", 4)
    joint = sizes._count(shapes, "joint")
    norm = shapes.get("joint.0.image.attention.norm_q.weight")
    head = norm[0] if norm else 64
    table = shapes.get("table")
    return dict(
        width=width,
        joint=joint,
        heads=width // head,
        context_dim=context_dim,
        pooled_dim=shapes.get("pooled.0.weight", (0, None))[1],
        in_channels=in_channels,
        out_channels=sizes._shape(shapes, "patch_out.weight", 2)[0] // patch**2,
        patch=patch,
        single=sizes._count(shapes, "single"),
        dual=sum(f"joint.{k}.image.dual.q.weight" in shapes for k in range(joint)),
        qk_norm=norm is not None,
        table=math.isqrt(table[1]) if table else None,
        axes=None if table else (head // 8, 7 * head // 16, 7 * head // 16),
        guidance="guidance.0.weight" in shapes,
    )
