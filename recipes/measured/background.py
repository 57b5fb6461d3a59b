"""Do students of the digits look at the background, whose colour gives the answer away?

    python grokd.py run digits --seeds 0 1 2 3 4
    python recipes/measured/background.py [--run runs/digits] [--save FILE.json]

Of every test image the class activation map of the student's answer (grokd.class_maps): which share
of what speaks for the answer lies on the background, a pixel counting as such by what it lacks to
the white of a digit. A map without any preference has the background's own share, which stands
beside it. Mean over images, mean ± standard deviation over seeds.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import grokd  # noqa: E402


def background_of(recipe: grokd.Recipe) -> torch.Tensor:
    """How much of every pixel is background: [N, S, S] for the rows of the recipe, 1 all of it."""
    assert recipe.data.reader
    grey = load_digits().images / 16
    module = sys.modules["recipe_digits"]
    order = grokd.permutation(len(grey), 0)
    tested = order[module.NUM_TRAIN + module.NUM_VAL :]
    pictures = [
        grokd.decode(np.repeat(np.rint(255 * grey[i])[..., None], 3, -1).astype(np.uint8),
                     recipe.data.size, "squash")
        for i in tested for _ in range(2)  # under both colours
    ]
    return 1 - torch.from_numpy(np.stack(pictures))[:, 0] / 255


def share(model: grokd.Classifier, images: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
    """Share [N] of what speaks for a model's answers that lies on the background."""
    maps = grokd.class_maps(model, images)
    assert maps is not None
    with torch.no_grad():
        answers = model(images).argmax(-1)
    evidence = maps[torch.arange(len(maps)), answers][:, None].clamp(min=0)
    evidence = F.interpolate(evidence, images.shape[-2:], mode="bilinear")[:, 0]
    return (evidence * background).sum((1, 2)) / evidence.sum((1, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/digits"))
    parser.add_argument("--save", type=Path, help="write the table as JSON")
    args = parser.parse_args()
    about, recipe = grokd.origin(), grokd.load_recipe("digits")
    store = grokd.open_store(recipe.data, ".")
    indices, background = store.split("test"), background_of(recipe)
    images = store.view(indices, torch.device("cpu"))
    groups = store.groups[indices]
    rows = []
    for name in recipe.students:
        paths = sorted((args.run / "students" / name).glob("seed*/model.safetensors"))
        found = [share(grokd.load_model(path), images, background) for path in paths]
        parts = [groups >= 0, *(groups == g for g in range(len(store.group_names)))]
        cells = [grokd.mean_cell([100 * float(each[at].mean()) for each in found]) for at in parts]
        rows.append([name, str(len(paths)), *cells])
    area = [100 * float(background[at].mean()) for at in parts]
    rows.append(["the background's own share", "", *(f"{value:.1f}" for value in area)])
    header = ["", "models", "all", *store.group_names]
    print(grokd.table(header, rows))
    if args.save:
        record = {"about": about, "header": header, "rows": rows}
        args.save.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
