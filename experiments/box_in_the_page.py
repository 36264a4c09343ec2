"""The model in the box draws inside of one HTML file: no server, no network, no Python.

    pip install -e '.[onnx]'
    python experiments/box_in_the_page.py [--model out/mine]

A minute. Exports the text encoder, the U-Net and the VAE's decoder to ONNX, compares each with
PyTorch, and writes box_in_the_page.html: the three graphs, onnxruntime-web (npm fetches it, once)
and the tokenizer's table, with box_in_the_page.js beside them. There a seed is the same noise as
in `minidiff generate`, so the page draws the same picture: docs/draw_in_the_page.md.
"""

import base64
import gzip
import hashlib
import html
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

import minidiff
from minidiff.cli.options import EXAMPLE, MODEL
from minidiff.cli.script import run
from minidiff.data.world import World
from minidiff.errors import UserError
from minidiff.figures.curves import write
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.options.sampling import SampleConfig
from minidiff.recipes.quickstart import COLOURS, SHAPES
from minidiff.samplers import by_name, times_of
from minidiff.schedules import Discrete
from minidiff.text import CLIPText, tokenizer
from minidiff.training import atomic
from minidiff.training.progress import write_results
from minidiff.vae import VAE

RUNTIME, RUNTIME_SHA256 = (
    "onnxruntime-web@1.30.0",
    "d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71",
)
# of the package: the JavaScript with everything in it, and the smallest WebAssembly
JAVASCRIPT, WASM = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"
SAMPLERS = ("ddpm", "ddim")  # what box_in_the_page.js has: DDIM's step with eta 1 and 0
MOST_STEPS, MOST_PARAMETERS = 100, 100_000_000
OUTPUTS = ("box_in_the_page.html",)  # beside results.json


def main(
    model: Path = MODEL,
    runtime: Path | None = None,
    out: Path = Path("out/box_in_the_page"),
) -> None:
    """Put a small model of ours into one HTML file that draws.

    Args:
        model: box, or a model folder with a VAE, CLIP's text encoder and a U-Net.
        runtime: the npm package onnxruntime-web as a .tgz file. Default: npm fetches it.
        out: folder for everything written.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package)
    loaded = minidiff.load(model).eval()
    check(loaded)
    parts = runtime_files(runtime)
    results = {"model": str(model), "runtime": RUNTIME, "page_megabytes": 0.0}
    with torch.no_grad():
        for name, (module, inputs) in graphs(loaded).items():
            start = time.perf_counter()
            parts[name] = export(module, inputs)
            error = difference(parts[name], module, inputs)
            results[name] = {
                "megabytes": len(parts[name]) / 1e6,
                "largest_difference_from_torch": error,
                "seconds": round(time.perf_counter() - start, 1),
            }
            print(f"{name}: {len(parts[name]) / 1e6:.2f} MB, differs from torch by {error:.1e}")
    parts["merges"] = merges()
    parts["settings"] = json.dumps(settings(loaded, model)).encode()
    path = out / OUTPUTS[0]
    text = page(parts, loaded, model)
    results["page_megabytes"] = round(len(text) / 1e6, 2)
    print(write(path, text, {".html"}))
    print(write_results(out, **results))
    print(f"{results['page_megabytes']} MB; open it in a browser.")


def require(package: str) -> None:
    """Raise a UserError that says how to install a package of the extra `onnx`."""
    import importlib.util

    if importlib.util.find_spec(package) is None:
        raise UserError(f"{package} is not installed; run: pip install 'minidiff[onnx]'")


def check(model: LatentDiffusion) -> None:
    """Raise a UserError for a model that box_in_the_page.js cannot sample from."""
    schedule = model.schedule
    if not (isinstance(model.text, CLIPText) and isinstance(model.vae, VAE)):
        raise UserError("the page draws with models that have a text encoder and a VAE.")
    count = sum(p.numel() for p in model.parameters())
    if count > MOST_PARAMETERS:
        most = f"a page holds at most {MOST_PARAMETERS / 1e6:.0f} M"
        raise UserError(f"this model has {count / 1e6:.0f} M parameters; {most}.")
    if model.text.config.added:
        raise UserError("this model has words of its own, which the page's tokenizer does not.")
    if not isinstance(schedule, Discrete) or model.denoiser.target not in ("eps", "x0", "v"):
        raise UserError('the page draws with discrete schedules, and the targets "eps", "x0", "v".')
    if model.blank(1, SampleConfig()).numel() % 16:
        raise UserError("the page's noise comes in sixteens; this model's latents do not.")
    if model.sampler not in SAMPLERS:
        raise UserError(f"the page has the samplers {', '.join(SAMPLERS)}, not {model.sampler}.")


# The three networks as graphs.


class Decoder(nn.Module):
    """The VAE's way from scaled latents to an image, as a module of its own."""

    def __init__(self, vae: VAE):
        super().__init__()
        self.vae = vae

    def forward(self, latents: Float[Tensor, "B Z h w"]) -> Float[Tensor, "B C H W"]:
        return self.vae.decode(latents)


def graphs(model: LatentDiffusion) -> dict[str, tuple[nn.Module, dict[str, Tensor]]]:
    """Each network with an example of its inputs; two of each, the empty prompt and a prompt."""
    x = torch.randn(2, *model.blank(1, SampleConfig())[0].shape)
    tokens = model.text.tokens(["", EXAMPLE])
    unet = {"x": x, "t": torch.tensor([999.0, 99.0]), "context": model.text(tokens)}
    return {
        "text": (model.text, {"tokens": tokens}),
        "unet": (model.unet, unet),
        "decoder": (Decoder(model.vae), {"latents": x}),
    }


def export(module: nn.Module, inputs: dict[str, Tensor]) -> bytes:
    """The ONNX graph of a network, for a batch of any size."""
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about itself
        program = torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=["output"],
            dynamic_shapes=tuple({0: batch} for _ in inputs),
            dynamo=True,
            verbose=False,
        )
    graph = program.model_proto
    for node in graph.graph.node:  # where in the source it came from, with this machine's paths
        del node.metadata_props[:]
    del graph.metadata_props[:], graph.graph.metadata_props[:]
    halve(graph)
    return graph.SerializeToString()


def halve(graph) -> None:
    """Store the weights of a graph in float16 where that loses nothing, as the box's own files do;
    a Cast in front of each makes it float32 again, so what is computed stays the same."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for tensor in graph.graph.initializer:
        weights = numpy_helper.to_array(tensor)
        if weights.dtype != np.float32 or weights.size < 64:
            continue
        with np.errstate(over="ignore"):
            half = weights.astype(np.float16)
        if np.array_equal(half.astype(np.float32), weights):
            name = tensor.name
            tensor.CopyFrom(numpy_helper.from_array(half, f"{name}_half"))
            casts.append(helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *graph.graph.node]
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)


def difference(graph: bytes, module: nn.Module, inputs: dict[str, Tensor]) -> float:
    """The largest difference between onnxruntime's output and torch's, of the batch and of its
    second example alone, relative to the largest output."""
    import onnxruntime

    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    errors = []
    for rows in (slice(0, 2), slice(1, 2)):
        some = {name: value[rows] for name, value in inputs.items()}
        ours = module(*some.values())
        theirs = session.run(None, {name: value.numpy() for name, value in some.items()})[0]
        errors.append((torch.from_numpy(theirs) - ours).abs().max() / ours.abs().max())
    return max(errors).item()


# The page.


def runtime_files(package: Path | None) -> dict[str, bytes]:
    """onnxruntime-web's JavaScript and WebAssembly, out of the npm package of our version."""
    with tempfile.TemporaryDirectory() as folder:
        package = package or fetched(Path(folder))
        if hashlib.sha256(package.read_bytes()).hexdigest() != RUNTIME_SHA256:
            raise UserError(f"{package} is not {RUNTIME}; get it with: npm pack {RUNTIME}")
        with tarfile.open(package) as tar:
            return {
                "javascript": tar.extractfile(f"package/dist/{JAVASCRIPT}").read(),
                "wasm": tar.extractfile(f"package/dist/{WASM}").read(),
            }


def fetched(folder: Path) -> Path:
    """The package, from npm."""
    if shutil.which("npm") is None:
        raise UserError(
            f"npm is not installed; install Node.js, or get {RUNTIME} elsewhere with "
            f"`npm pack {RUNTIME}` and name the file with --runtime."
        )
    command = ["npm", "pack", "--silent", RUNTIME]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise UserError(f"npm did not fetch {RUNTIME}: {lines[-1]}")
    return next(folder.glob("*.tgz"))


def merges() -> bytes:
    """The pairs that CLIP's tokenizer merges, a line each, in order."""
    ranks = tokenizer().bpe_ranks
    return "\n".join(" ".join(pair) for pair in sorted(ranks, key=ranks.get)).encode()


def settings(model: LatentDiffusion, path: Path) -> dict[str, object]:
    """What box_in_the_page.js has to know of a model, and the words that the box knows."""
    text, schedule = model.text.config, model.schedule
    config, step = SampleConfig(), by_name(model.sampler)
    spacing, is_box = model.spacing_of(step, config), path == MODEL
    times = [
        times_of(schedule, steps, spacing, step).tolist() for steps in range(1, MOST_STEPS + 1)
    ]
    if any(t != int(t) for t in times[-1]):
        raise UserError(f'the page steps at whole times; the spacing "{spacing}" has others.')
    return {
        "model": None if is_box else path.name,
        "tokens": {"length": text.context_length, "pad": text.pad},
        "latents": list(model.blank(1, config)[0].shape),
        "target": model.denoiser.target,
        "alpha_bar": schedule.alpha_bar.tolist(),
        "final": schedule.final,
        "times": times,
        "steps": config.steps,
        "guidance": model.guidance,
        "sampler": model.sampler,
        "words": sorted(World(model.size, SHAPES, COLOURS).vocabulary()) if is_box else None,
    }


def packed(data: bytes) -> str:
    """gzip, then base64: what a browser can undo alone, and what no letter of can end a script."""
    file = io.BytesIO()
    with gzip.GzipFile(fileobj=file, mode="wb", mtime=0) as zipped:  # same bytes on any day
        zipped.write(data)
    return base64.b64encode(file.getvalue()).decode()


def page(parts: dict[str, bytes], model: LatentDiffusion, path: Path) -> bytes:
    """The HTML file: the template, the script, and the parts that it unpacks."""
    here = Path(__file__)
    data = "\n".join(
        f'<script type="text/plain" id="{name}">{packed(part)}</script>'
        for name, part in parts.items()
    )
    fields: Sequence[tuple[str, str]] = (
        ("<!-- signature -->", atomic.SIGNATURE),
        ("<!-- model -->", html.escape(path.name)),
        ("<!-- prompt -->", html.escape(EXAMPLE)),
        ("<!-- data -->", data),
        ("/* box_in_the_page.js */", here.with_suffix(".js").read_text(encoding="utf-8")),
    )
    text = here.with_suffix(".html").read_text(encoding="utf-8")
    for mark, value in fields:
        text = text.replace(mark, value)
    return text.encode()


if __name__ == "__main__":
    run(main, OUTPUTS)
