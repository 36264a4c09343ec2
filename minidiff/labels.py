"""Conditions that are not text, with the text tower's two methods: class labels, and none at all."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minidiff.errors import UserError


class ClassLabels(nn.Module):
    """A class as a sequence of length one. The condition "" is the null class."""

    def __init__(self, classes: list[str], dim: int):
        super().__init__()
        self.numbers = {"classes": classes, "dim": dim}
        self.dim, self.index = dim, {name: i for i, name in enumerate([*classes, ""])}
        self.embedding = nn.Embedding(len(classes) + 1, dim)

    def encode(self, prompts: list[str]) -> Float[Tensor, "B 1 D"]:
        """One vector for each class name."""
        unknown = next((p for p in prompts if p not in self.index), None)
        if unknown is not None:
            raise UserError(
                f'this model knows no class "{unknown}"; it knows {", ".join(list(self.index)[:-1])}.'
            )
        return self.embedding(
            torch.tensor([self.index[p] for p in prompts], device=self.embedding.weight.device)
        )[:, None]

    def null(self, batch: int) -> Float[Tensor, "B 1 D"]:
        """The null class: what guidance steers away from."""
        return self.encode([""] * batch)


class Unconditional(nn.Module):
    """No condition: prompts only say how many pictures there are."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers, self.dim = {}, None

    def encode(self, prompts: list[str]) -> None:
        return None

    def null(self, batch: int) -> None:
        return None
