"""What a folder's scheduler says, in the form of the published files, is what samples: pictures beside diffusers'.

A user there writes `pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)`, and each class takes its own
defaults where the file is silent, as every file before July 2023 is of the spacing of times. Pictures in [0, 1], after 20 steps,
from the same unit noise scaled as theirs; 1e-4, as in test_pipeline.
"""

import json
import shutil

import pytest
import torch

import minidiff
from minidiff.checkpoints import schedulers, write
from minidiff.errors import UserError
from minidiff.options.sampling import SampleConfig

LEVELS = 2  # of the U-Net: what is compared here does not depend on them
diffusers = pytest.importorskip("diffusers")
PROMPT, LATENTS = (
    "a red square",
    torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5)),
)
COMMON = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
PUBLISHED = {  # scheduler_config.json of Stable Diffusion 1.5, 2-base and 2.1
    "sd1": {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0"} | COMMON,
    "sd2": {"_class_name": "PNDMScheduler", "_diffusers_version": "0.8.0"}
    | COMMON
    | {"prediction_type": "epsilon"},
    "sd2-v": {"_class_name": "DDIMScheduler", "_diffusers_version": "0.8.0"}
    | COMMON
    | {"prediction_type": "v_prediction"},
}
CLASSES = {ours: theirs for theirs, ours in schedulers.SAMPLERS.items()}
DEFAULTS = ["ddim", "pndm", "euler", "euler_ancestral", "heun", "dpmpp_2m", "unipc"]
END = {"content": "<|endoftext|>", "lstrip": False, "normalized": True, "single_word": False}


def named(folder, settings):
    """Give a folder these scheduler settings, and the class in its index."""
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", settings["_class_name"]]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def published(pipeline, tmp_path_factory):
    """The folder in the form on the Hub: scheduler and tokenizer files of 2022, and its kind."""
    kind = "sd2" if pipeline[0].unet.config.use_linear_projection else "sd1"
    kind += "-v" if pipeline[0].scheduler.config.prediction_type == "v_prediction" else ""
    folder = tmp_path_factory.mktemp("published") / kind
    shutil.copytree(pipeline[1], folder)
    named(folder, PUBLISHED[kind])
    tokenizer = folder / "tokenizer"
    clip = write.tokenizer_files(49407, 77)
    for name in ("vocab.json", "merges.txt"):
        (tokenizer / name).write_text(clip[name], encoding="utf-8")
    (tokenizer / "tokenizer.json").unlink(missing_ok=True)
    pad = "<|endoftext|>" if kind == "sd1" else "!"  # the other file of SD 2.x says the end token
    special = {"bos_token": "<|startoftext|>", "eos_token": END, "unk_token": END, "pad_token": pad}
    config = json.loads(clip["tokenizer_config.json"]) | {"pad_token": "<|endoftext|>"}
    (tokenizer / "special_tokens_map.json").write_text(json.dumps(special))
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    return folder, kind


@pytest.fixture(scope="module")
def loaded(published):
    """What is in the folder, read once by each; and its kind."""
    return minidiff.load(published[0]), pipe_of(published[0]), published[1]


@pytest.fixture
def folder(published, tmp_path):
    """A copy of it that a test may change."""
    return shutil.copytree(published[0], tmp_path / "folder")


def pipe_of(folder, sampler=None):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe if sampler is None else with_sampler(pipe, sampler)


def with_sampler(pipe, sampler):
    """As their users exchange it: a pipeline of the same networks with another scheduler."""
    scheduler = getattr(diffusers, CLASSES[sampler]).from_config(pipe.scheduler.config)
    pipe = type(pipe)(**pipe.components | {"scheduler": scheduler}, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def theirs(pipe, steps=20, guidance=1.0):
    return pipe(
        PROMPT,
        latents=LATENTS.clone(),
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
    ).images


def ours(model, pipe, steps=20, guidance=1.0, sampler=None, spacing=None):
    """Noise of new steps as torch draws it for one generator, as theirs; x_T scaled as theirs:
    Euler and Heun begin at sigma eps in place of eps, where sigma^2 is below 1 by alpha^2."""
    scale, generator = 1.0, torch.Generator().manual_seed(3)
    if hasattr(pipe.scheduler, "sigmas") and pipe.scheduler.init_noise_sigma != 1:
        most = pipe.scheduler.sigmas.max()
        scale = (pipe.scheduler.init_noise_sigma / (most**2 + 1) ** 0.5).item()
    config = SampleConfig(sampler=sampler, spacing=spacing)
    *_, last = model.sample(
        [PROMPT],
        steps,
        guidance,
        lambda x: torch.randn(x.shape, generator=generator),
        x_T=scale * LATENTS,
        config=config,
    )
    return model.decode(last.x0).clamp(-1, 1) / 2 + 0.5


def gap(a, b):
    assert b.std() > 0.02
    return (a - b).abs().max().item()


@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("sampler", DEFAULTS)
def test_each_sampler_under_its_own_defaults(loaded, sampler, guidance):
    model, pipe, kind = loaded
    if kind == "sd2-v" and sampler == "pndm":
        pytest.skip(
            "diffusers' PNDM averages v before it turns it into eps; the paper averages eps"
        )
    pipe = with_sampler(pipe, sampler)
    found = ours(model, pipe, guidance=guidance, sampler=sampler)
    assert gap(found, theirs(pipe, guidance=guidance)) < 1e-4


def test_the_folders_own_sampler(loaded):
    """minidiff generate, and pipe(), with nothing said."""
    model, pipe, kind = loaded
    assert model.sampler == ("ddim" if kind == "sd2-v" else "pndm")
    assert gap(ours(model, pipe, guidance=7.5), theirs(pipe, guidance=7.5)) < 1e-4


@pytest.mark.parametrize("pipeline", ["sd1"], indirect=True)
@pytest.mark.parametrize("steps", [1, 7, 30, 51])
@pytest.mark.parametrize("sampler", ["ddim", "pndm", "euler", "dpmpp_2m", "unipc"])
def test_leading_steps_that_do_not_divide_1000(folder, published, sampler, steps):
    named(folder, PUBLISHED["sd1"] | {"timestep_spacing": "leading"})
    model, pipe = minidiff.load(folder), pipe_of(folder, sampler)
    assert model.spacing == "leading"
    assert gap(ours(model, pipe, steps, sampler=sampler), theirs(pipe, steps)) < 1e-4


BETAS = (torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2 * 0.7).tolist()


@pytest.mark.parametrize("pipeline", ["sd1", "sd2-v"], indirect=True)
@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m"])
@pytest.mark.parametrize(
    "settings",
    [
        {"trained_betas": BETAS},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    ],
    ids=["trained", "cosine", "zero-snr"],
)
def test_the_schedule_of_the_folder(folder, published, sampler, settings, tmp_path):
    zero = "rescale_betas_zero_snr" in settings
    if published[1] == "sd1" and zero:
        pytest.skip("eps says nothing of x0 where nothing of it is left")
    named(folder, PUBLISHED[published[1]] | {"_class_name": CLASSES[sampler]} | settings)
    model, pipe = minidiff.load(folder), pipe_of(folder)
    # Their Euler and DPM-Solver put 2^-24 in place of alpha_bar_T = 0, and read alpha_bar from
    # float32 sums, where cosine's last one is 2e-9.
    rough = sampler != "ddim" and (zero or "beta_schedule" in settings)
    assert gap(ours(model, pipe), theirs(pipe)) < (1e-3 if rough else 1e-4)
    model.save(tmp_path / "ours")
    back = minidiff.load(tmp_path / "ours")
    assert (back.schedule, back.sampler, back.spacing) == (model.schedule, sampler, model.spacing)
    again = minidiff.load(write.save_diffusers(model, tmp_path / "theirs"))
    assert (again.schedule, again.sampler, again.spacing) == (
        model.schedule,
        sampler,
        model.spacing,
    )
    with pytest.raises(UserError, match=r"a single file cannot say .*(betas|zero_)"):
        write.save_compvis(model, tmp_path / "m.safetensors")


@pytest.mark.parametrize("pipeline", ["sd2-v"], indirect=True)
@pytest.mark.parametrize("sampler, tolerance", [
    ("euler", 1e-4),
    ("heun", 1e-4),
    ("dpmpp_2m", 1e-2),  # theirs shows the network the nearest whole time
    ("unipc", 1e-2),
    ("ddim", 1e-4),  # theirs knows no karras
])  # fmt: skip
def test_karras(folder, published, sampler, tolerance):
    named(
        folder,
        PUBLISHED["sd2-v"] | {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True},
    )
    model, pipe = minidiff.load(folder), pipe_of(folder, sampler)
    assert (model.sampler, model.spacing) == ("euler", "karras")
    assert gap(ours(model, pipe, sampler=sampler), theirs(pipe)) < tolerance


@pytest.mark.parametrize("pipeline", ["sd1"], indirect=True)
@pytest.mark.parametrize(
    "settings, note",
    [
        ({"_class_name": "LMSDiscreteScheduler"}, "LMSDiscreteScheduler is not known here; ddim"),
        ({"thresholding": True}, "thresholding True of its scheduler is not followed"),
        ({"use_beta_sigmas": True}, "use_beta_sigmas True of its scheduler is not followed"),
        ({"solver_order": 3}, "solver_order 3 of its scheduler is not followed"),
        ({"steps_offset": 0}, "steps_offset 0 of its scheduler is not followed"),
    ],
)
def test_what_is_not_followed_is_said(folder, published, settings, note):
    named(folder, PUBLISHED["sd1"] | settings)
    with pytest.warns(UserWarning, match=note):
        minidiff.load(folder)


@pytest.mark.parametrize("pipeline", ["sd1"], indirect=True)
@pytest.mark.parametrize(
    "settings, why",
    [
        ({"timestep_spacing": "leeding"}, "timestep_spacing is 'leeding'; there is None, leading"),
        ({"trained_betas": [0.5, 2.0]}, "folder: its scheduler: betas must be T = 1000 numbers"),
        ({"beta_schedule": "spiral"}, "beta_schedule is 'spiral'; there is linear"),
    ],
)
def test_what_is_no_schedule_is_refused(folder, published, settings, why):
    named(folder, PUBLISHED["sd1"] | settings)
    with pytest.raises(UserError, match=why):
        minidiff.load(folder)


def test_lcm_starts_at_pure_noise_whatever_the_spacing(published):
    model = minidiff.load(published[0])
    for model.spacing in (None, "leading", "karras"):
        first = next(iter(model.sample([PROMPT], 4, config=SampleConfig(sampler="lcm"))))
        assert first.t == 1000


@pytest.mark.parametrize("pipeline", ["sd1"], indirect=True)
def test_a_single_file_samples_by_each_samplers_defaults(published, tmp_path):
    folder = minidiff.load(published[0])
    with pytest.warns(UserWarning, match="does not say its own sampler, pndm; name it"):
        file = write.save_compvis(folder, tmp_path / "m.safetensors")
    model = minidiff.load(file)
    assert (model.sampler, model.spacing, model.schedule) == ("ddim", None, folder.schedule)
