"""What a fine-tune writes: a model, a LoRA, a word's vector, at its end and of its best step. All in this file."""
import shutil
from pathlib import Path

from safetensors import SafetensorError

from minidiff import atomic, inversion, latent_diffusion, lora
from minidiff.errors import UserError
from minidiff.latent_diffusion import LatentDiffusion


def kept(out: Path, step: int) -> Path:
    return out / f"best_step_{step}"


def keep(model: LatentDiffusion, method: str, out: Path, word: inversion.Word | None, step: int, steps: int) -> None:
    """The weights that the recorder's advice goes back to, the best so far, in a folder of their own; the last step's are in OUT anyway."""
    if step < steps:
        kept(out, step).mkdir(parents=True, exist_ok=True)
        write(model, method, kept(out, step), word)
    for older in set(out.glob("best_step_*")) - {kept(out, step)}:
        if foreign(older) is None:
            shutil.rmtree(older)


def foreign(path: Path) -> Path | None:
    """What in path is not what keep() writes; see atomic.Stranger."""
    if path.is_symlink() or not path.is_dir() or not path.name.removeprefix("best_step_").isdecimal():
        return path
    owners = {"model": latent_diffusion.foreign, "lora.safetensors": atomic.unsigned, "embedding.safetensors": atomic.unsigned}
    strangers = (owners.get(entry.name, lambda path: path)(entry) for entry in sorted(path.iterdir()))
    return next((stranger for stranger in strangers if stranger is not None), None)


def write(model: LatentDiffusion, method: str, out: Path, word: inversion.Word | None) -> None:
    """OUT/model; or OUT/lora.safetensors, OUT/embedding.safetensors or both. What cannot be written now can be later: the last checkpoint has it."""
    place = out / ("model" if method == "full" else f"{'lora' if method == 'lora' else 'embedding'}.safetensors")
    if word is not None:
        inversion.put_in(model.text, word.word, word.vector.detach())
    try:
        if method == "full":
            model.save(place)
            return
        if method == "lora":
            with atomic.write(place, atomic.unsigned) as new:
                lora.save(model, new)
        if word is not None:
            place = inversion.save(word.word, word.vector, out / "embedding.safetensors")
    except (OSError, SafetensorError) as error:
        said = str(error).splitlines()[0]
        raise UserError(f"{place} could not be written ({said}). The training is kept: make room, and write it with --resume.") from error
