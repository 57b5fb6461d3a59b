"""CLIP writes the attribute column of a metadata.csv: zero-shot, from keywords.

    python recipes/clip_attributes.py FOLDER/metadata.csv --clip openai/clip-vit-base-patch32 \
        --value land forest "bamboo forest" field --value water ocean lake river

Writes FOLDER/metadata-clip.csv (--save names another file beside the table), in which the images
without an attribute have got one; all other cells are as they were. A recipe reads it with
Data(metadata="metadata-clip.csv"). On the images that have an attribute CLIP's answers are compared
with it, value by value: without such images nobody knows how good the column is. --replace writes
its answers there too.

A value is what the column is to hold, followed by keywords for it (its own name if there are none).
Each keyword stands in each template; the text embeddings, of unit length, are averaged over both
and brought to unit length again (Radford et al. 2021, zero-shot ensembles; averaging over keywords
too is ours). The image's embedding is compared with them, and the nearest value counts.

Needs the extra `sd` (transformers), and CLIP as a folder (save_pretrained) or a hub id. Not run by
us with real weights: none were at hand.
"""

import argparse
import csv
import io
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import grokd  # noqa: E402
from grokd import Problem  # noqa: E402

TEMPLATES = ("a photo of a {}.", "a photo of the {}.", "a picture of a {}.", "{}.")


def load_clip(source: str) -> tuple[Any, Any, Any]:
    """CLIP, its tokenizer and its image processor, from a folder or the hub; frozen."""
    try:
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer, logging
    except ImportError as error:
        raise Problem("CLIP needs the package transformers: install grokd with its extra sd "
                      "(uv sync --extra sd).") from error
    logging.disable_progress_bar()
    try:
        loaded: Any = CLIPModel.from_pretrained(source, output_loading_info=True)
        parts = [kind.from_pretrained(source) for kind in (CLIPTokenizer, CLIPImageProcessor)]
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise Problem(f"CLIP {source} could not be loaded ({reason}): give a folder with model, "
                      "tokenizer and image processor, or a hub id with a network.") from error
    clip, info = loaded
    if missing := sorted(info["missing_keys"]):  # transformers would leave them random
        raise Problem(f"{source} is not a whole CLIP: {len(missing)} of its weights are missing, "
                      f"{missing[0]} for one.")
    return clip.eval().requires_grad_(False), *parts


def text_directions(
    clip: Any, tokenizer: Any, keywords: Sequence[Sequence[str]], templates: Sequence[str]
) -> Tensor:
    """Mean text embedding of each list of keywords in all templates, of unit length: [V, d]."""
    if not all("{}" in template for template in templates):
        raise Problem(f"Templates {templates}: each needs {{}} where the keyword goes.")
    directions = []
    for words in keywords:
        texts = [template.replace("{}", word) for template in templates for word in words]
        tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            encoded = clip.text_model(**tokens.to(clip.device)).pooler_output
            embeddings = F.normalize(clip.text_projection(encoded), dim=-1)  # [texts, d]
        directions.append(F.normalize(embeddings.mean(0), dim=0))
    return torch.stack(directions)


def parse_values(values: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """--value NAME KEYWORD ... as keywords by name; without keywords the name is one."""
    keywords = {name: words or [name] for name, *words in values}
    if len(keywords) < 2 or len(keywords) < len(values):
        raise Problem(f"{', '.join(name for name, *_ in values)}: give two or more values, each "
                      "once.")
    return keywords


def read_table(path: Path, image_column: str) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows of the table. Raises Problem for missing columns, cells and files."""
    if not path.is_file():
        raise Problem(f"{path} does not exist.")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows, columns = list(reader), list(reader.fieldnames or [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise Problem(f"{path} is no table of text in UTF-8 ({error}): save it as CSV.") from error
    if image_column not in columns:
        raise Problem(f"{path} has no column {image_column!r}; it has "
                      f"{', '.join(map(repr, columns))}: name it with --image-column.")
    if not rows:
        raise Problem(f"{path} has no rows.")
    for line, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise Problem(f"{path}, row {line}: not as many cells as the {len(columns)} columns.")
    missing = [row[image_column] for row in rows if not (path.parent / row[image_column]).is_file()]
    if missing:
        raise Problem(f"{len(missing):,} of the {len(rows):,} images that {path} names do not "
                      f"exist: {', '.join(missing[:3])} ...")
    return columns, rows


def open_image(path: Path) -> Image.Image:
    """An image, upright, in RGB."""
    try:
        with Image.open(path) as file:
            return ImageOps.exif_transpose(file).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Problem(f"{path} cannot be read ({error}).") from error


def nearest(
    clip: Any, processor: Any, directions: Tensor, paths: Sequence[Path], batch_size: int,
    runtime: grokd.Runtime,
) -> Iterator[np.ndarray]:
    """Places of the nearest directions, batch by batch; images are decoded by threads ahead."""
    starts = range(0, len(paths), batch_size)

    def load(start: int) -> Tensor:
        images = list(grokd.THREADS.map(open_image, paths[start : start + batch_size]))
        return processor(images=images, return_tensors="pt")["pixel_values"]

    for _, pixels in grokd.progress_bar(grokd.prefetch(starts, load), "CLIP", total=len(starts)):
        with torch.no_grad(), runtime.autocast():
            encoded = clip.vision_model(pixels.to(runtime.device, runtime.dtype)).pooler_output
            embeddings = clip.visual_projection(encoded)
        similarity = F.normalize(embeddings.to(directions), dim=-1) @ directions.T  # [b, V]
        yield similarity.argmax(-1).cpu().numpy()


def agreement(known: Sequence[str], answers: Sequence[str], names: Sequence[str]) -> str:
    """For each value of the column, how often CLIP says which."""
    if not known:
        return "The table has no attribute to compare CLIP's answers with."
    share = 100 * np.mean(np.array(known) == np.array(answers))
    told = f"CLIP agrees with {share:.1f} % of the {len(known):,} attributes in the table:"
    lines = []
    for name in names:
        said = [answer for value, answer in zip(known, answers, strict=True) if value == name]
        right = f"{100 * said.count(name) / len(said):.1f}" if said else "–"
        lines.append([name, right, *(str(said.count(other)) for other in names)])
    header = ["in the table", "agreement, %", *(f"CLIP: {name}" for name in names)]
    return f"{told}\n{grokd.table(header, lines)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metadata", type=Path, help="the table; images are relative to its folder")
    parser.add_argument("--clip", required=True, help="folder or hub id")
    parser.add_argument("--value", nargs="+", action="append", required=True,
                        metavar=("NAME", "KEYWORD"), help="a value and its keywords; two or more")
    parser.add_argument("--template", nargs="+", default=TEMPLATES, help="texts, {} the keyword")
    parser.add_argument("--save", type=Path, help="new file beside the table")
    parser.add_argument("--image-column", default="image")
    parser.add_argument("--attribute-column", default="attribute", help="added if it is not there")
    parser.add_argument("--replace", action="store_true", help="attributes that are there, too")
    parser.add_argument("--batch-size", type=int, default=64, help="images at once")
    parser.add_argument("--precision", default="float32",
                        choices=("float32", "bfloat16", "float16", "float64"))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu"),
                        help="auto: a GPU if there is one, that of CUDA_VISIBLE_DEVICES")
    write_attributes(parser.parse_args())


def write_attributes(args: argparse.Namespace) -> None:
    """Do what the flags say."""
    keywords, column = parse_values(args.value), args.attribute_column
    names = [*keywords]
    target = args.save or args.metadata.with_name(f"{args.metadata.stem}-clip.csv")
    if target.resolve().parent != args.metadata.resolve().parent:
        raise Problem(f"--save {target}: image files are relative to the table, so it must lie in "
                      f"{args.metadata.parent}.")
    if args.batch_size < 1:
        raise Problem(f"--batch-size {args.batch_size}: at least 1.")
    if target.exists():
        raise Problem(f"{target} exists: delete it, or name another file with --save.")
    columns, rows = read_table(args.metadata, args.image_column)
    known = [row.get(column, "") for row in rows]
    for line, value in enumerate(known, 2):
        if value and value not in keywords:
            raise Problem(f"{args.metadata}, row {line}: column {column!r} holds {value!r}, which "
                          f"is none of the values {', '.join(names)}.")
    clip, tokenizer, processor = load_clip(args.clip)
    if args.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    runtime = grokd.Runtime.start(args.precision)
    clip.to(runtime.device, runtime.dtype)
    directions = text_directions(clip, tokenizer, [*keywords.values()], args.template)
    paths = [args.metadata.parent / row[args.image_column] for row in rows]
    found = nearest(clip, processor, directions, paths, args.batch_size, runtime)
    answers = [names[place] for place in np.concatenate([*found])]
    labelled = [i for i, value in enumerate(known) if value]
    print(agreement([known[i] for i in labelled], [answers[i] for i in labelled], names))
    for row, answer in zip(rows, answers, strict=True):
        if args.replace or not row.get(column):
            row[column] = answer
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*dict.fromkeys([*columns, column])])
    writer.writeheader()
    writer.writerows(rows)
    grokd.write_file(target, text.getvalue())
    written = len(rows) if args.replace else len(rows) - len(labelled)
    print(f"{target}: {written:,} of {len(rows):,} attributes are CLIP's")


if __name__ == "__main__":
    grokd.in_one_line(main)
