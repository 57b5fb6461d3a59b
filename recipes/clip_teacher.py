"""CLIP zero-shot as a network of grokd's: a teacher, or the biased model, that nobody trained.

    python recipes/clip_teacher.py --clip openai/clip-vit-base-patch32 --save clip.safetensors \
        --class landbird "landbird" sparrow warbler --class waterbird "waterbird" gull duck

Classes are given in the order that the data have them (Data.class_names), with keywords as for
recipes/clip_attributes.py. The file holds CLIP's image tower as trunk and, as head, the text
embeddings times CLIP's logit scale, without bias; CLIP's input size and normalisation stand in its
metadata. In a recipe, with the architecture that the program prints:

    Teachers(1, arch=("clip:...",), weights=("clip.safetensors",), train=Train(epochs=0))

Without training, its ERM version is CLIP zero-shot (students of it: dfr_share=0), its DFR version
has a head refitted on the balanced part of validation. As the biased model:

    BiasModel(kind="erm", arch="clip:...", weights="clip.safetensors", train=Train(epochs=0))

`python grokd.py eval RECIPE --models clip.safetensors` scores the file as it is. Images are cut as
the recipe's Data say and resized to CLIP's size, bilinearly; CLIP's own preparation is bicubic.

Needs the extra `sd` (transformers) to write the file; grokd loads it without. Not run by us with
real weights: none were at hand.
"""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from clip_attributes import TEMPLATES, load_clip, parse_values, text_directions
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import grokd  # noqa: E402
from grokd import Problem  # noqa: E402

# Names of transformers, and those of grokd.CLIPTower.
RENAMED = (
    (r"^embeddings\.patch_embedding\.", "conv."),
    (r"^embeddings\.position_embedding\.weight", "positions"),
    (r"^embeddings\.class_embedding", "class_embedding"),
    (r"^pre_layrnorm\.", "ln_pre."),
    (r"^post_layernorm\.", "ln_post."),
    (r"\.layer_norm(\d)\.", r".norm\1."),
    (r"\.mlp\.fc(\d)\.", r".linear\1."),
)


def architecture(config: Any) -> str:
    """The image tower's sizes as the name of an architecture."""
    vision = config.vision_config
    if vision.layer_norm_eps != 1e-5:
        raise Problem(f"CLIP's layer_norm_eps is {vision.layer_norm_eps}: only 1e-5 is known.")
    pairs = {"width": vision.hidden_size, "layers": vision.num_hidden_layers,
             "patch": vision.patch_size, "size": vision.image_size, "dim": config.projection_dim}
    if vision.num_attention_heads * 64 != vision.hidden_size:
        pairs["heads"] = vision.num_attention_heads
    if vision.intermediate_size != 4 * vision.hidden_size:
        pairs["mlp"] = vision.intermediate_size
    if vision.hidden_act != "quick_gelu":
        pairs["activation"] = vision.hidden_act
    return "clip:" + ",".join(f"{name}={value}" for name, value in pairs.items())


def tower_state(clip: Any) -> dict[str, Tensor]:
    """The image tower's weights under the names of grokd.CLIPTower."""
    state: dict[str, Tensor] = {"projection.weight": clip.visual_projection.weight}
    attention: dict[str, dict[str, Tensor]] = {}
    for key, value in clip.vision_model.state_dict().items():
        name = key
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        if match := re.fullmatch(r"(.+\.self_attn\.)([qkv])_proj\.(weight|bias)", name):
            attention.setdefault(f"{match[1]}in_proj_{match[3]}", {})[match[2]] = value
        elif not name.endswith("position_ids"):  # a buffer of old versions
            state[name] = value
    return state | {name: torch.cat([parts[k] for k in "qkv"]) for name, parts in attention.items()}


def zero_shot(source: str, keywords: Mapping[str, list[str]], templates: tuple[str, ...]
              ) -> grokd.Classifier:
    """CLIP as a classifier of images [B, 3, S, S] in 0..1: logits are its cosines with the classes'
    texts times its logit scale."""
    clip, tokenizer, processor = load_clip(source)
    input = grokd.Input(clip.config.vision_config.image_size, tuple(processor.image_mean),
                        tuple(processor.image_std))
    model = grokd.Classifier(architecture(clip.config), len(keywords), input)
    directions = text_directions(clip, tokenizer, [*keywords.values()], templates)
    head = {"fc.weight": clip.logit_scale.exp() * directions, "fc.bias": torch.zeros(len(keywords))}
    model.load_plain(tower_state(clip) | head, source)
    return model.eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", required=True, help="folder or hub id")
    parser.add_argument("--class", dest="classes", nargs="+", action="append", required=True,
                        metavar=("NAME", "KEYWORD"), help="a class and its keywords; two or more")
    parser.add_argument("--template", nargs="+", default=TEMPLATES, help="texts, {} the keyword")
    parser.add_argument("--save", type=Path, required=True, help="file, .safetensors")
    args = parser.parse_args()
    keywords = parse_values(args.classes)
    if args.save.suffix != ".safetensors" or args.save.exists():
        raise Problem(f"--save {args.save}: give a new file whose name ends in .safetensors.")
    model = zero_shot(args.clip, keywords, args.template)
    description = {
        "arch": model.arch,
        "class_names": json.dumps([*keywords]),
        "input": json.dumps(dataclasses.asdict(model.input)),
        "trunk": grokd.trunk_key(model),
        "grokd": grokd.__version__,
    }
    grokd.write_file(args.save, grokd.weights_file(model.plain_state(), description))
    print(f"{args.save}: CLIP {args.clip}, {' or '.join(keywords)}. In a recipe:",
          f'    arch=("{model.arch}",), weights=("{args.save}",)', sep="\n")


if __name__ == "__main__":
    grokd.in_one_line(main)
