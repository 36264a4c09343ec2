"""The transformers of SD3 and FLUX.1 over tensors by their published names, in the published order, in as few words as a test needs.

Written from the published description, not copied: no class, no minidiff. SD3's image tokens come before its text; FLUX's text first.
"""

import math

import torch
import torch.nn.functional as F


def sines(t, dim=256):
    k = torch.arange(dim // 2, dtype=t.dtype)
    angles = t[:, None] * torch.exp(-math.log(10000) * k / (dim // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def linear(s, name, x):
    return F.linear(x, s[f"{name}.weight"], s[f"{name}.bias"])


def two(s, first, second, x):
    return linear(s, second, F.silu(linear(s, first, x)))


def norm(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def split(qkv, heads, head):
    """(B, N, 3 h d) to three of (B, h, N, d)."""
    return qkv.unflatten(-1, (3, heads, head)).permute(2, 0, 3, 1, 4)


def rms(x, weight):
    return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def mix(q, k, v):
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def gelu(x):
    return F.gelu(x, approximate="tanh")


def sd3(s, x, t, context, pooled, heads):
    batch, _, height, width = x.shape
    dim, head = len(s["context_embedder.bias"]), len(s["context_embedder.bias"]) // heads
    blocks = 1 + max(int(name.split(".")[1]) for name in s if name.startswith("joint_blocks"))
    c = F.silu(
        two(s, "t_embedder.mlp.0", "t_embedder.mlp.2", sines(1000 * t))
        + two(s, "y_embedder.mlp.0", "y_embedder.mlp.2", pooled)
    )
    h, w, side = height // 2, width // 2, math.isqrt(s["pos_embed"].shape[1])
    top, left = (side - h) // 2, (side - w) // 2
    table = s["pos_embed"].view(1, side, side, dim)[:, top : top + h, left : left + w]
    x = F.conv2d(x, s["x_embedder.proj.weight"], s["x_embedder.proj.bias"], stride=2)
    x = x.flatten(2).transpose(1, 2) + table.reshape(1, h * w, dim)
    y = linear(s, "context_embedder", context)

    def qkv(name, tokens):
        q, k, v = split(linear(s, f"{name}.qkv", tokens), heads, head)
        if f"{name}.ln_q.weight" in s:
            q, k = rms(q, s[f"{name}.ln_q.weight"]), rms(k, s[f"{name}.ln_k.weight"])
        return q, k, v

    for k in range(blocks):
        image, text = f"joint_blocks.{k}.x_block", f"joint_blocks.{k}.context_block"
        mx = linear(s, f"{image}.adaLN_modulation.1", c).split(dim, dim=1)
        my = linear(s, f"{text}.adaLN_modulation.1", c).split(dim, dim=1)
        both = zip(
            qkv(f"{image}.attn", norm(x, mx[0], mx[1])),
            qkv(f"{text}.attn", norm(y, my[0], my[1])),
            strict=True,
        )
        ax, ay = mix(*(torch.cat(each, dim=2) for each in both)).split([h * w, y.shape[1]], dim=1)
        second = 0
        if len(mx) == 9:
            own = mix(*qkv(f"{image}.attn2", norm(x, mx[6], mx[7])))
            second = mx[8][:, None] * linear(s, f"{image}.attn2.proj", own)
        x = x + mx[2][:, None] * linear(s, f"{image}.attn.proj", ax) + second
        hidden = gelu(linear(s, f"{image}.mlp.fc1", norm(x, mx[3], mx[4])))
        x = x + mx[5][:, None] * linear(s, f"{image}.mlp.fc2", hidden)
        if k < blocks - 1:
            y = y + my[2][:, None] * linear(s, f"{text}.attn.proj", ay)
            hidden = gelu(linear(s, f"{text}.mlp.fc1", norm(y, my[3], my[4])))
            y = y + my[5][:, None] * linear(s, f"{text}.mlp.fc2", hidden)
    shift, scale = linear(s, "final_layer.adaLN_modulation.1", c).split(dim, dim=1)
    x = linear(s, "final_layer.linear", norm(x, shift, scale))
    x = x.view(batch, h, w, 2, 2, -1)  # row, column, channel
    return torch.einsum("nhwpqc->nchpwq", x).reshape(batch, -1, height, width)


def turned(x, ids, axes):
    """Each axis of a head turned by its position; pairs are neighbours."""
    parts, start = [], 0
    for k, dim in enumerate(axes):
        frequencies = 10000.0 ** (-torch.arange(0, dim, 2, dtype=x.dtype) / dim)
        turn = torch.polar(torch.ones((), dtype=x.dtype), ids[:, k, None].to(x.dtype) * frequencies)
        pairs = torch.view_as_complex(
            x[..., start : start + dim].unflatten(-1, (-1, 2)).contiguous()
        )
        parts.append(torch.view_as_real(pairs * turn).flatten(-2))
        start += dim
    return torch.cat(parts, dim=-1)


def flux(s, x, t, context, pooled, heads, axes, guidance=None):
    batch, channels, height, width = x.shape
    dim, h, w = len(s["txt_in.bias"]), height // 2, width // 2
    head, length = dim // heads, context.shape[1]
    vec = two(s, "time_in.in_layer", "time_in.out_layer", sines(1000 * t))
    if "guidance_in.in_layer.weight" in s:
        vec = vec + two(s, "guidance_in.in_layer", "guidance_in.out_layer", sines(1000 * guidance))
    vec = F.silu(vec + two(s, "vector_in.in_layer", "vector_in.out_layer", pooled))
    packed = x.view(batch, channels, h, 2, w, 2).permute(0, 2, 4, 1, 3, 5)  # channel, row, column
    img, txt = linear(s, "img_in", packed.reshape(batch, h * w, -1)), linear(s, "txt_in", context)
    ids = torch.zeros(length + h * w, 3)
    ids[length:, 1], ids[length:, 2] = (
        torch.arange(h).repeat_interleave(w),
        torch.arange(w).repeat(h),
    )

    def attention(q, k, v):
        return mix(turned(q, ids, axes), turned(k, ids, axes), v)

    def normed(q, k, name):
        scales = (s[f"{name}.norm.{which}_norm.scale"] for which in ("query", "key"))
        return tuple(rms(each, scale) for each, scale in zip((q, k), scales, strict=True))

    for k in range(1 + max(int(n.split(".")[1]) for n in s if n.startswith("double_blocks"))):
        at, streams, qkvs, mods = f"double_blocks.{k}", {"txt": txt, "img": img}, [], {}
        for name, tokens in streams.items():
            mods[name] = linear(s, f"{at}.{name}_mod.lin", vec).split(dim, dim=1)
            inside = norm(tokens, *mods[name][:2])
            q, key, v = split(linear(s, f"{at}.{name}_attn.qkv", inside), heads, head)
            qkvs.append((*normed(q, key, f"{at}.{name}_attn"), v))
        joint = attention(*(torch.cat(each, dim=2) for each in zip(*qkvs, strict=True)))
        for (name, tokens), a in zip(
            streams.items(), joint.split([length, h * w], dim=1), strict=True
        ):
            m = mods[name]
            tokens = tokens + m[2][:, None] * linear(s, f"{at}.{name}_attn.proj", a)
            hidden = gelu(linear(s, f"{at}.{name}_mlp.0", norm(tokens, m[3], m[4])))
            streams[name] = tokens + m[5][:, None] * linear(s, f"{at}.{name}_mlp.2", hidden)
        txt, img = streams["txt"], streams["img"]
    x = torch.cat([txt, img], dim=1)
    for k in range(1 + max(int(n.split(".")[1]) for n in s if n.startswith("single_blocks"))):
        at = f"single_blocks.{k}"
        shift, scale, gate = linear(s, f"{at}.modulation.lin", vec).split(dim, dim=1)
        qkv, up = linear(s, f"{at}.linear1", norm(x, shift, scale)).split([3 * dim, 4 * dim], dim=2)
        q, key, v = split(qkv, heads, head)
        a = attention(*normed(q, key, at), v)
        x = x + gate[:, None] * linear(s, f"{at}.linear2", torch.cat([a, gelu(up)], dim=2))
    shift, scale = linear(s, "final_layer.adaLN_modulation.1", vec).split(dim, dim=1)
    x = linear(s, "final_layer.linear", norm(x[:, length:], shift, scale))
    x = x.view(batch, h, w, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(batch, -1, height, width)
