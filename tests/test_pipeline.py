"""From prompts to images: seeds, batches, masks, the bar, and who is blamed."""

import inspect

import pytest
import torch
from tqdm import tqdm

from minidiff import pipeline
from minidiff.data.folder import to_uint8
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.methods.editing import Edit
from minidiff.options.sampling import SampleConfig
from minidiff.samplers import SAMPLERS, Normal, by_name

from .test_latent_diffusion import PROMPTS, model

# Noise.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_example_has_numbers_of_its_own(dtype):
    """The same alone and in a batch, draw after draw, and those of torch.randn from that seed."""
    x = torch.empty(64, 4, 2, 2, dtype=dtype)
    whole = Normal.seeded(3, range(64))
    draws = [whole(x) for _ in range(3)]
    for k in (0, 7, 63):
        alone = Normal.seeded(3, [k])
        assert all(torch.equal(draw[k : k + 1], alone(x[:1])) for draw in draws)
    generator = torch.Generator().manual_seed(11)
    expected = torch.randn(4, 2, 2, generator=torch.Generator().manual_seed(11)).to(dtype)
    assert torch.equal(Normal([generator])(x[:1])[0], expected)
    flat = torch.stack(draws).double().flatten(2).transpose(0, 1).flatten(1)
    apart = torch.cdist(flat, flat).fill_diagonal_(torch.inf)
    assert apart.min() > 3  # of two examples, sqrt(2 x 48) = 9.8 on average
    with pytest.raises(ValueError, match="noise for 64 examples, asked for 2"):
        whole(x[:2])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_equal_generators_give_equal_images(sampler):
    """Also where the caller made the step; and another seed gives others."""
    diffusion = model(target="v")

    def latents(seed):
        generator = torch.Generator().manual_seed(seed)
        return list(diffusion.sample(PROMPTS, 4, generator=generator, step=by_name(sampler)))[-1].x

    first = latents(0)
    torch.manual_seed(99)  # torch's own generator has no part in it
    state = torch.get_rng_state()
    assert torch.equal(latents(0), first) and torch.equal(torch.get_rng_state(), state)
    assert (latents(1) - first).abs().max() > 0.01


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_is_the_same_alone_and_in_any_batch(sampler):
    """Up to the order of additions in a batched matrix product: one byte of 255."""
    diffusion, config = model(target="v"), SampleConfig(3, sampler=sampler, seed=5)
    prompts = [PROMPTS[k % 2] for k in range(64)]
    whole = pipeline.generate(diffusion, prompts, config, batch=64)
    assert (whole[1:] - whole[:-1]).abs().amax((1, 2, 3)).min() > 0.01
    few = pipeline.generate(diffusion, prompts, config, batch=7)
    assert (few - whole).abs().max() < 1 / 255
    for k in (0, 1, 6, 7, 62, 63):
        alone = pipeline.generate(diffusion, [prompts[k]], config, batch=1, first=k)
        assert (alone - whole[k]).abs().max() < 1 / 255


# A mask.


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_what_is_outside_the_mask_stays_to_the_bit(strength):
    """In a mask that does not end where a latent does, for every image of every batch."""
    diffusion, image = model(target="v"), torch.rand(1, 3, 16, 16) * 2 - 1
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 3:, :9] = 1
    edit, outside = Edit(image, strength, mask), (mask == 0).expand(5, 3, -1, -1)
    images = pipeline.generate(diffusion, PROMPTS[:1] * 5, SampleConfig(4), batch=2, edit=edit)
    given = image.expand(5, -1, -1, -1)
    assert torch.equal(images[outside], given[outside])
    assert torch.equal(to_uint8(images)[outside], to_uint8(given)[outside])
    assert (images - given)[~outside].abs().mean() > 0.05


# The bar, and the caller's mistakes.


@pytest.mark.parametrize("strength", [None, 1.0, 0.6, 0.29, 0.01])
@pytest.mark.parametrize("sampler", ["ddim", "heun"])
def test_the_bar_ends_at_its_end(strength, sampler, monkeypatch):
    ends = []

    class Bar(tqdm):
        def close(self):
            ends.append((self.n, self.total))
            super().close()

    monkeypatch.setattr(pipeline, "tqdm", Bar)
    edit = None if strength is None else Edit(torch.zeros(1, 3, 16, 16), strength)
    config = SampleConfig(7, sampler=sampler)
    pipeline.generate(model(), PROMPTS[:1] * 5, config, batch=2, edit=edit, progress=True)
    assert ends[0][0] == ends[0][1] > 0


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_times_given_by_the_caller_are_all_visited(spacing):
    """Whatever the config says of steps and of their spacing."""
    times = torch.tensor([900.0, 700.0, 333.25, 20.0, 5.0, 0.0], dtype=torch.float64)
    frames = model().sample(PROMPTS, times, config=SampleConfig(25, spacing=spacing))
    assert [frame.t for frame in frames] == times.tolist()


def test_an_unknown_keyword_is_blamed_on_the_function_that_was_called():
    for function in (pipeline.draw, pipeline.generate, LatentDiffusion.sample):
        bare = inspect.unwrap(function)  # the checks of shapes, which tests add, name none
        with pytest.raises(TypeError, match=rf"{function.__name__}\(\) got .* 'guidence'"):
            bare(model(), ["x"], guidence=3)
