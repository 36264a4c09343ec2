"""Copies of captioned pictures in which one named colour is another, and so is its word.

"A large white bowl of many green apples": what is near green in the picture becomes red, and so
does the word. From a hundred pictures a network learns a caption as a whole, for nothing in them
shows which word stands for what; here one word changes, and one colour with it. No mask and no
label is needed: the caption names the colour, and the colour finds its pixels. And shortened
captions, in which words that tell pictures apart stand among words that do not.
"""

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor

from minidiff.data.folder import to_model, to_uint8

# hues from 0 to 255, of the pixels that a word names: from, to, and the one that it is painted in
HUES = {
    "red": (244, 10, 0),
    "orange": (11, 26, 18),
    "yellow": (27, 37, 34),
    "green": (38, 118, 75),
    "blue": (119, 180, 155),
    "purple": (181, 215, 197),
    "pink": (216, 243, 230),
}
PAINTS = ("red", "yellow", "green", "blue", "purple")
WHITE, GRAY = "white", 60  # white is above WHITE_VALUE and below GRAY in saturation
WHITE_VALUE, DARK = 90, 30
LEAST, MOST = 0.04, 0.7  # of the picture: less is a stray pixel, more is the light it was taken in
STRONG = 170  # saturation of what was white


def hsv_of(image: UInt8[Tensor, "3 S S"]) -> UInt8[np.ndarray, "S S 3"]:
    return np.array(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("HSV"))


def named_by(word: str, hsv: UInt8[np.ndarray, "S S 3"]) -> Bool[np.ndarray, "S S"]:
    """The pixels that a colour word names."""
    hue, saturation, value = np.moveaxis(hsv, 2, 0)
    if word == WHITE:
        return (saturation < GRAY) & (value > WHITE_VALUE)
    low, high, _ = HUES[word]
    within = (hue >= low) & (hue <= high) if low < high else (hue >= low) | (hue <= high)
    return within & (saturation >= GRAY) & (value > DARK)


def painted(
    hsv: UInt8[np.ndarray, "S S 3"], where: Bool[np.ndarray, "S S"], word: str, to: str
) -> UInt8[np.ndarray, "S S 3"]:
    """The picture with these pixels in another colour, as light or dark as they were."""
    copy = hsv.copy()
    copy[where, 0] = HUES[to][2]
    if word == WHITE:
        copy[where, 1] = STRONG
    return copy


def colours_in(caption: str) -> list[str]:
    words = re.findall(r"[a-z]+", caption.lower())
    return [word for word in (*HUES, WHITE) if words.count(word) == 1]


def said(caption: str, changes: dict[str, str]) -> str:
    for word, to in changes.items():
        caption = re.sub(rf"\b{word}\b", to, caption, flags=re.IGNORECASE)
    return caption


def words_of(caption: str) -> list[str]:
    return caption.rstrip(". ").split()


def common_words(pictures: list[list[str]], least: int = 3) -> list[str]:
    """Words, but colours, in the captions of at least so many pictures: they call none of them."""
    own = [{word.lower() for text in texts for word in words_of(text)} for texts in pictures]
    count = Counter(word for words in own for word in words if not colours_in(word))
    return sorted(word for word, pictures_with in count.items() if pictures_with >= least)


def fewer_words(
    captions: list[str], count: int, seed: int, common: Sequence[str] = ()
) -> list[str]:
    """The captions, and `count` more in which each word but a colour is there half of the time, with
    up to three common words, in any order: so one word that no other picture has is enough to call
    it, wherever it stands."""
    rng, more = random.Random(f"words {seed}"), []
    for k in range(count):
        words = words_of(captions[k % len(captions)])
        rest = [word for word in words if rng.random() < 0.5 or colours_in(word)]
        if rest:
            rest += rng.sample(common, min(rng.randrange(4), len(common)))
            rng.shuffle(rest)
            more.append(" ".join(rest))
    return [*captions, *more]


def copies(
    image: Float[Tensor, "3 S S"], captions: list[str], count: int, seed: int
) -> Iterator[tuple[Float[Tensor, "3 S S"], list[str]]]:
    """At most `count` copies, each with all captions that name what changed in it. Of the colours
    that the captions name, one or all change."""
    rng, hsv = random.Random(f"recolour {seed}"), hsv_of(to_uint8(image))
    masks = {
        word: named_by(word, hsv) for word in {c for text in captions for c in colours_in(text)}
    }
    words = sorted(word for word, mask in masks.items() if LEAST <= mask.mean() <= MOST)
    done = set()
    for k in range(8 * count if words else 0):
        some = words if k % 2 else [words[k // 2 % len(words)]]
        changes = {word: rng.choice([c for c in PAINTS if c != word]) for word in some}
        texts = [said(text, changes) for text in captions if set(some) <= set(colours_in(text))]
        key = tuple(sorted(changes.items()))
        if len(done) == count or not texts or key in done:
            continue
        done.add(key)
        copy = hsv
        for word, to in changes.items():
            copy = painted(copy, masks[word], word, to)
        rgb = np.array(Image.fromarray(copy, "HSV").convert("RGB"))
        yield to_model(torch.from_numpy(rgb).permute(2, 0, 1)), texts
