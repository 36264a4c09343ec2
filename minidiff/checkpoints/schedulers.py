"""scheduler_config.json of a diffusers folder: the noise schedule, the target, the sampler and the
spacing of its times, read and written. Without torch.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from minidiff.errors import UserError

if TYPE_CHECKING:
    from minidiff.latent_diffusion import LatentDiffusion

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
SAMPLERS = {  # by diffusers' class
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "PNDMScheduler": "pndm",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "HeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "UniPCMultistepScheduler": "unipc",
    "LCMScheduler": "lcm",
}
SDE = "sde-dpmsolver++"  # the algorithm_type of dpmpp_2m_sde
USUAL = {  # settings of a scheduler that are not read, and the values that change nothing
    "algorithm_type": ("dpmsolver++", SDE),
    "euler_at_final": (False,),
    "final_sigmas_type": ("zero",),
    "interpolation_type": ("linear",),
    "lower_order_final": (True,),
    "sigma_max": (None,),
    "sigma_min": (None,),
    "skip_prk_steps": (True,),
    "solver_order": (2,),
    "solver_type": ("midpoint", "bh2"),
    "steps_offset": (1,),
    "thresholding": (False,),
    "timestep_type": ("discrete",),
    "use_beta_sigmas": (False,),
    "use_exponential_sigmas": (False,),
    "use_flow_sigmas": (False,),
    "use_lu_lambdas": (False,),
}
SPACINGS = (None, "leading", "trailing", "linspace")


@dataclass
class Scheduler:
    """What the file says."""

    schedule: dict  # the arguments of schedules.Discrete
    target: str
    sampler: str
    spacing: str | None  # None: the default of the class that samples
    notes: list[str]  # what is not followed


def read(settings: dict) -> Scheduler:
    prediction = settings.get("prediction_type", "epsilon")
    betas, spacing = settings.get("beta_schedule", "linear"), settings.get("timestep_spacing")
    for key, value, allowed in (
        ("prediction_type", prediction, PREDICTIONS),
        ("beta_schedule", betas, BETAS),
        ("timestep_spacing", spacing, SPACINGS),
    ):
        if value not in allowed:
            expected = ", ".join(map(str, allowed))
            raise UserError(f"scheduler_config.json: {key} is {value!r}; there is {expected}.")
    kind = str(settings.get("_class_name", "DDIMScheduler"))
    clean = settings.get("set_alpha_to_one", kind != "PNDMScheduler")
    schedule = dict(
        betas=tuple(map(float, settings.get("trained_betas") or ())) or BETAS[betas],
        T=int(settings.get("num_train_timesteps", 1000)),
        beta_1=float(settings.get("beta_start", 1e-4)),
        beta_T=float(settings.get("beta_end", 0.02)),
        zero_terminal_snr=bool(settings.get("rescale_betas_zero_snr", False)),
        final=0 if clean else 1,
    )
    sampler = SAMPLERS.get(kind, "ddim")
    if sampler == "dpmpp_2m" and settings.get("algorithm_type") == SDE:
        sampler = "dpmpp_2m_sde"
    ignored = [key for key, usual in USUAL.items() if settings.get(key, usual[0]) not in usual]
    notes = [f"{key} {settings[key]!r} of its scheduler is not followed" for key in ignored]
    if kind not in SAMPLERS:
        notes.append(f"its sampler {kind} is not known here; ddim stands in")
    if settings.get("use_karras_sigmas"):
        if spacing in ("leading", "trailing"):
            notes.append(f"of karras and {spacing} spacing, karras is followed")
        spacing = "karras"
    return Scheduler(schedule, PREDICTIONS[prediction], sampler, spacing, notes)


def strange(model: "LatentDiffusion") -> list[str]:
    """What of the model the file has no word for."""
    schedule, reasons = model.schedule, []
    if type(schedule).__name__ != "Discrete" or _betas(schedule.betas) is None:
        name = getattr(schedule, "betas", type(schedule).__name__)
        reasons.append(f"the schedule {name}")
    if model.spacing not in (*SPACINGS, "karras"):
        reasons.append(f"the spacing {model.spacing}")
    if model.denoiser.target not in PREDICTIONS.values():
        reasons.append(f"the target {model.denoiser.target}")
    return reasons


def written(model: "LatentDiffusion") -> dict:
    """scheduler_config.json of a model in which nothing is strange."""
    schedule, spacing = model.schedule, model.spacing
    target = next(theirs for theirs, ours in PREDICTIONS.items() if ours == model.denoiser.target)
    config = (
        dict(_class_name=kind_of(model.sampler), clip_sample=False, steps_offset=1)
        | _betas(schedule.betas)
        | dict(num_train_timesteps=schedule.T, prediction_type=target)
        | dict(beta_start=schedule.beta_1, beta_end=schedule.beta_T)
        | dict(set_alpha_to_one=schedule.final == 0, skip_prk_steps=True)
        | dict(rescale_betas_zero_snr=schedule.zero_terminal_snr)
    )
    if model.sampler == "dpmpp_2m_sde":
        config["algorithm_type"] = SDE
    if spacing == "karras":
        config["use_karras_sigmas"] = True
    elif spacing is not None:
        config["timestep_spacing"] = spacing
    return config


def kind_of(sampler: str) -> str:
    """diffusers' class of a sampler."""
    sampler = sampler.removesuffix("_sde")
    return next(theirs for theirs, ours in SAMPLERS.items() if ours == sampler)


def _betas(betas: str | tuple[float, ...]) -> dict | None:
    """Betas in diffusers' words; None: it has none for them."""
    if not isinstance(betas, str):
        return dict(beta_schedule="linear", trained_betas=list(betas))
    published = [theirs for theirs, ours in BETAS.items() if ours == betas]
    return dict(beta_schedule=published[0]) if published else None
