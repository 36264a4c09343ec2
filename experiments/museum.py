"""The bug museum: twenty famous bugs of diffusion code, each a switch, and its picture beside the
right one.

    python experiments/museum.py [--bugs causal,seeds]

A minute on one thread. A bug is a piece of the library's own code with something wrong in its
place. What shows it is drawn twice from the same noise, without and with the bug. Writes NAME.png
for each bug, museum.png with all of them, and results.json. To have a bug in a program of yours:

    with museum.switched_on(museum.BUGS["causal"]):
        ...
"""

from pathlib import Path

import museum_pictures as pictures
from switches import Bug, Change, gallery, names_of, switched_on

from minidiff.cli.script import run
from minidiff.training.progress import write_results

__all__ = ["BUGS", "main", "switched_on"]

BUGS = {
    "value_range": Bug(
        "Images in [0, 1]",
        "Images are given to the VAE in [0, 1], and it expects [-1, 1].",
        "Everything is pale, and black comes out grey. Print `images.min()`: it must be near -1.",
        "tests/data/test_folder.py::test_every_byte_survives_the_round_trip",
        pictures.through_vae,
        (
            Change(
                "minidiff.data.folder:to_model",
                "images.float() / 127.5 - 1",
                "images.float() / 255",
            ),
        ),
    ),
    "bgr": Bug(
        "RGB and BGR exchanged",
        "Images are read in the order blue, green, red, as OpenCV gives them.",
        "Red and blue change places; green, white and black stay. A model trained so draws blue "
        'for "red". Look at one training image as the model gets it.',
        "tests/data/test_folder.py::test_palette_with_transparency",
        pictures.loaded,
        (
            Change(
                "minidiff.data.folder:load_image",
                "np.array(image)",
                "np.array(image)[..., ::-1].copy()",
            ),
        ),
    ),
    "mask_on_white": Bug(
        "A mask read on white",
        "The transparent part of a mask is filled with white, and white means: draw anew.",
        "The whole image changes, not only what was painted over. Print `mask.mean()`: it is 1.",
        "tests/methods/test_editing.py::test_masks_on_transparency",
        pictures.inpainted,
        (Change("minidiff.cli.generate:mask_of", 'background="black"', 'background="white"'),),
    ),
    "padding": Bug(
        "The wrong padding token",
        "Prompts are padded with token 0, and the model was trained with the end token.",
        "No error, all shapes are right, and the images are bad or fit the prompt less. Compare "
        "token ids with the published tokenizer's, padding included.",
        "tests/test_text.py::test_padding",
        pictures.samples,
        (Change("minidiff.text:CLIPText.tokens", "[self.pad] *", "[0] *"),),
    ),
    "quick_gelu": Bug(
        "Gelu in place of QuickGELU",
        "The text encoder computes the exact gelu, and its weights were trained with QuickGELU.",
        "You do not see it. Compare the encoder's output with the published one's in float64.",
        "tests/test_text.py::test_quick_gelu_formula",
        pictures.activation,
        (Change("minidiff.text:quick_gelu", "x * torch.sigmoid(1.702 * x)", "F.gelu(x)"),),
    ),
    "causal": Bug(
        "No causal mask",
        "Each token of the text encoder attends to all others, and it was trained to attend to "
        "earlier ones only.",
        "The objects are there, but sizes, colours and places go to the wrong ones. Change the "
        "last word of a prompt: the vectors before it must stay the same.",
        "tests/test_text.py::test_a_later_word_never_changes_an_earlier_vector",
        pictures.samples,
        (Change("minidiff.text:Block.forward", "causal=True", "causal=False"),),
    ),
    "beta": Bug(
        "Beta in place of its root",
        "The noise of a step is multiplied by its variance beta, not by its standard deviation.",
        "The forward chain fades to grey, not to noise. Give it data of variance 1: "
        "`x_t.std()` must stay 1.",
        "tests/test_ddpm.py::test_forward_chain_composed_equals_closed_form",
        pictures.noised,
        (
            Change(
                "minidiff.ddpm:DDPM.q_step",
                "_like(beta.sqrt(), x) * eps",
                "_like(beta, x) * eps",
            ),
        ),
    ),
    "off_by_one": Bug(
        "t off by one",
        "The table of alpha_bar starts at the clean image, and is read as if it started one step "
        "later.",
        "The loss looks fine, and fine grain stays on the samples, because the last step removes "
        "nothing. Noise an image with known noise, and solve for the image again.",
        "tests/test_ddpm.py::test_predict_x0_inverts_q_sample",
        pictures.reverse_chain,
        (
            Change(
                "minidiff.ddpm:DDPM.predict_x0",
                "self.alpha_bar[t.cpu()]",
                "self.alpha_bar[t.cpu() - 1]",
            ),
        ),
    ),
    "min_snr": Bug(
        "Min-SNR of eps for v",
        "The min-SNR weight is divided by SNR, as for eps; for v it must be divided by SNR + 1.",
        "The weight does not fall to 0 towards pure noise; with a zero terminal SNR it is NaN. "
        "Plot the weight over t.",
        "tests/test_denoiser.py::test_min_snr_published_forms",
        pictures.min_snr_weights,
        (
            Change(
                "minidiff.denoiser:Denoiser.loss",
                "snr_weight * (sigma / (alpha * b - sigma * a)) ** 2",
                "snr_weight / self.schedule.snr(t)",
            ),
        ),
    ),
    "never_dropped": Bug(
        "The condition is never dropped",
        "Training never hides the caption, so the empty prompt is not learnt, and guidance "
        "steers away from anything at all.",
        "Without guidance all is well, and with it samples are bent or burnt. Draw with "
        "guidance 0: it must give samples of the whole data.",
        "tests/test_latent_diffusion.py::test_condition_dropout",
        pictures.guided_points,
        (
            Change(
                "minidiff.latent_diffusion:LatentDiffusion.latent_loss",
                "torch.rand(len(captions)) < self.dropout",
                "torch.rand(len(captions)) < 0",
            ),
        ),
    ),
    "ema": Bug(
        "The average is never updated",
        "Samples are drawn with the moving average of the weights, and nothing ever updates it.",
        "The loss falls and the samples stay noise. Compare the average with the weights of "
        "step 0: they must differ.",
        "tests/test_train.py::test_every_step_of_a_run_moves_the_average",
        pictures.guided_points,
        (Change("minidiff.train:train", "ema.update(step + 1)", "pass"),),
    ),
    "v_as_eps": Bug(
        "v read as eps",
        "The network predicts v, and its output is taken for the noise.",
        "Coloured blotches with a hint of the subject, often far too dark or bright. Read the "
        "target from the model's settings, never from its name.",
        "tests/test_denoiser.py::test_every_row_gives_back_x0_and_eps",
        pictures.predicts_v,
        (Change("minidiff.denoiser:Denoiser._row", "TARGETS[self.target]", 'TARGETS["eps"]'),),
    ),
    "other_schedule": Bug(
        "Another schedule than in training",
        "The sampler takes its steps on the linear schedule, and the model was trained on the "
        "cosine one.",
        "A pattern of noise that no number of steps removes. Print alpha_bar at five times in "
        "training and in sampling.",
        "tests/parity/test_pipeline.py::test_text_to_image",
        pictures.samples,
        (
            Change(
                "minidiff.latent_diffusion:LatentDiffusion.sample",
                "sample(denoise, self.schedule,",
                "sample(denoise, schedules.linear(),",
            ),
        ),
    ),
    "last_noise": Bug(
        "Noise at the last step",
        "An ancestral step adds noise of the variance that it removed, and so does the last one.",
        "Grain or clouds on plain areas, more of them with fewer steps. The last step must give "
        "the same image whatever its noise.",
        "tests/test_ddpm.py::test_general_sampler_equals_the_literal_chain",
        pictures.few_steps,
        (
            Change(
                "minidiff.steps:DDIM.__call__",
                "self.eta * (sigma_s / sigma_t) * removed.sqrt()",
                "self.eta * removed.sqrt()",
            ),
        ),
    ),
    "seeds": Bug(
        "Seeds ignored",
        "The seed makes a generator, and the noise is drawn from another one.",
        "The same command gives another image each time. Draw twice, and compare bytes.",
        "tests/test_pipeline.py::test_equal_generators_give_equal_images",
        pictures.one_seed,
        (Change("minidiff.samplers:Normal.__call__", "generator=g, ", ""),),
    ),
    "three_channels": Bug(
        "Guidance on three channels",
        "Guidance is applied to the first three channels, as if latents were RGB; they have four.",
        "Raising the guidance changes less than it should, or shifts colours. Compare each channel "
        "with and without guidance.",
        "tests/test_latent_diffusion.py::test_guidance",
        pictures.strongly_guided_points,
        (
            Change(
                "minidiff.guidance:Guided.__call__",
                "*(a + g * (b - a) for",
                "*(torch.cat([(a + g * (b - a))[:, :3], b[:, 3:]], 1) for",
            ),
        ),
    ),
    "swapped": Bug(
        "The halves of guidance exchanged",
        "The batch holds the empty prompt first, and its result is taken for the prompt's.",
        "Clean images of anything but what was asked, and more guidance makes it worse.",
        "tests/test_denoiser.py::test_guidance_formula_and_special_scales",
        pictures.samples,
        (
            Change(
                "minidiff.guidance:Guided._pair",
                "self.null, self.context",
                "self.context, self.null",
            ),
        ),
    ),
    "latent_scale": Bug(
        "The latent scale is missing",
        "Latents are decoded without dividing by the latent scale, 0.18215 for Stable Diffusion.",
        "Right shapes, weak and tinted colours. Encode and decode a photograph: it must come back.",
        "tests/parity/test_networks.py::test_vae_equals_diffusers",
        pictures.samples,
        (Change("minidiff.vae:VAE.decode", "latents / self.latent_scale", "latents"),),
    ),
    "fp16_vae": Bug(
        "A VAE in fp16",
        "The decoder computes in fp16, whose largest number is 65,504, and nobody looks for NaN.",
        "Black images, some or all. Check `latents.isfinite()` and `images.isfinite()`; decode in "
        "bf16 or fp32.",
        "tests/methods/test_editing.py::test_where_nan_began",
        pictures.large_activations,
        (
            Change(
                "minidiff.vae:VAE.decode",
                "self.decoder(self.post_quant(z))",
                'torch.autocast("cpu", torch.float16)(self.decoder)(self.post_quant(z))',
            ),
            Change("minidiff.pipeline:draw", "not images.isfinite().all()", "False"),
        ),
    ),
    "lora_alpha": Bug(
        "The alpha of a LoRA is lost",
        "The change of a LoRA is not multiplied by alpha / rank, here 1/8.",
        "Burnt or broken images that become right at a scale of alpha / rank. Compare with the "
        "program that trained it, at scale 1.",
        "tests/methods/test_lora.py::test_the_equation",
        pictures.hearts,
        (
            Change(
                "minidiff.methods.lora:LoRA.factor",
                "self.scale * self.alpha / len(self.A)",
                "self.scale",
            ),
        ),
    ),
}
OUTPUTS = ("museum.png", *(f"{name}.png" for name in BUGS))  # beside results.json


def main(bugs: str = ",".join(BUGS), out: Path = Path("out/museum")) -> None:
    """Draw each bug beside what is right.

    Args:
        bugs: names with commas.
        out: folder for everything written.
    """
    names = names_of(bugs, BUGS)
    print(f"{len(names)} bugs: about {3 * len(names)} s on one thread")
    differences = gallery(names, BUGS, out / "museum.png")
    print(write_results(out, mean_difference=differences))


if __name__ == "__main__":
    run(main, OUTPUTS)
