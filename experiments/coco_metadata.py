"""COCO's pictures and annotation files to a captioned folder: the pictures, and a metadata.jsonl with a line for each.

    python experiments/coco_metadata.py --annotations captions_val2017.json --images val2017 --out coco [--contains apple bowl]

A line holds file_name, text (the first of the picture's captions in the file's order), captions (all of them) and the picture's license as the
file names it. Pictures without captions and captions without pictures are counted and left out.
"""
import json
import shutil
from pathlib import Path

from minidiff.data.folder import pictures_in
from minidiff.errors import UserError
from minidiff.script import run


def main(annotations: tuple[Path, ...], images: Path, out: Path, contains: tuple[str, ...] = ()) -> None:
    """Write a captioned folder.

    Args:
        annotations: COCO caption files, such as captions_val2017.json.
        images: the folder of pictures.
        out: the captioned folder to write.
        contains: keep only pictures of which some caption has one of these words.
    """
    # Collect captions and licenses by file name, over all annotation files.
    captions: dict[str, list[str]] = {}
    licenses: dict[str, str] = {}
    for path in annotations:
        try:
            whole = json.loads(path.read_text(encoding="utf-8"))
            names = {image["id"]: image["file_name"] for image in whole["images"]}
            urls = {license["id"]: license["url"] for license in whole.get("licenses", [])}
            for image in whole["images"]:
                licenses[image["file_name"]] = urls.get(image.get("license"), "unknown")
            for annotation in whole["annotations"]:
                captions.setdefault(names[annotation["image_id"]], []).append(" ".join(annotation["caption"].split()))
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{path}: not a COCO caption file ({reason}); it needs images, and annotations with captions") from None

    # Copy what has both a picture and a caption.
    pictures = {path.name: path for path in pictures_in(images)}
    words = {word.lower() for word in contains}
    kept = [name for name in pictures if any(not words or words & set(caption.lower().strip(".").split()) for caption in captions.get(name, []))]
    if not kept:
        raise UserError(f"{images}: none of {len(pictures)} pictures has a caption to keep; the file names must be those in the annotations")
    (out / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for name in kept:
        shutil.copyfile(pictures[name], out / "images" / name)
        line = {"file_name": f"images/{name}", "text": captions[name][0], "captions": captions[name], "license": licenses[name]}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    (out / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    print(out / "metadata.jsonl")
    silent, unseen = len(pictures.keys() - captions.keys()), len(captions.keys() - pictures.keys())
    print(f"{len(kept)} pictures; left out: {silent} pictures without captions, {unseen} captioned pictures that are not in {images}")


if __name__ == "__main__":
    run(main)
