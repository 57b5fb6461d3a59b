"""Fixtures: the shared data, a tiny data set of files, and grokd as a process."""

import csv
import json
import os

# Two workers on two cores: before torch is imported, and for all processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("GROKD_DATA", ROOT / "../shared/data"))

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--no-skips", action="store_true", help="fail on skipped tests where the data are present"
    )
    parser.addoption("--record", default="", help="file for what kills of single processes did")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, Any]:
    report = yield
    excused = item.get_closest_marker("gpu") or item.get_closest_marker("slow")
    if report.skipped and item.config.getoption("--no-skips") and DATA.is_dir() and not excused:
        report.outcome = "failed"
        report.longrepr = f"skipped, with the data present: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Folder of the shared real data."""
    if not DATA.is_dir():
        pytest.skip(f"no data at {DATA}: set GROKD_DATA")
    return DATA.resolve()


@pytest.fixture(scope="session")
def grokd_process() -> Run:
    """grokd.py as a process: grokd_process(*args, cwd=..., check=True)."""

    def run(*args: str, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "grokd.py"), *map(str, args)]
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
        if check:
            assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run


RECIPE = '''"""A tiny experiment, for tests."""
from grokd import BiasModel, DFR, Data, Distill, Eval, Recipe, Teachers, Train

train = Train(epochs=2, batch_size=8, lr=0.01)
dfr = DFR(num_refits=2, penalties=(1.0,))
student = Distill(arch="cnn2", weights="random", train=train, dfr=dfr)
recipe = Recipe(
    data=Data(size=20, crop=16, attribute_column="place", store="store"),
    teachers=Teachers(2, ("cnn2", "resnet8"), ("random",), dfr=dfr, train=train),
    bias_model=BiasModel(arch="cnn2", weights="random", train=train),
    students={
        "one-hot": Distill("one-hot", arch="cnn2", weights="random", train=train, dfr=dfr),
        "one-hot-dfr": Distill(
            "one-hot", arch="cnn2", weights="random", train=train, dfr=dfr, head="dfr"
        ),
        "agre": student,
    },
    seeds=(0, 1),
)
'''


# Behind RECIPE: two sets of generated images; the students `kd` and others are the tests' own.
SETS_OF_IMAGES = '''
import grokd

kd = grokd.replace(student, weighting="average")
recipe = grokd.replace(
    recipe, seeds=(0,), diffusion=grokd.Diffusion(epochs=2, widths=(8, 16), num_timesteps=50),
    data=grokd.replace(recipe.data, size=16, crop=12),
    augments={
        "config": grokd.Augment(student="kd", steps=2, iterations=3, min_teacher=0.0,
                                max_student=1.0, in_flight=4),
        "plain": grokd.Augment(student="kd", steps=2, guided=False, like="config"),
    },
)
'''


def write_images(folder: Path, per_group: int = 4, splits: tuple[str, ...] = ()) -> Path:
    """Small PNGs of two classes and two places, with metadata.csv, and a recipe tiny.py."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    rows = []
    for split in splits or ("train", "val", "test"):
        for label in (0, 1):
            for place in (0, 1):
                for k in range(per_group):
                    name = f"{split}{label}{place}{k}.png"
                    pixels = random.integers(0, 120, (24, 30, 3))
                    pixels[8:16, 8:16] += 120 * label
                    pixels[:, :, 2 * place] += 80
                    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name)
                    rows.append([name, label, place, split])
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([["image", "label", "place", "split"], *rows])
    (folder / "tiny.py").write_text(RECIPE)
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with the tiny data set and its recipe."""
    return write_images(tmp_path / "images")


@pytest.fixture(scope="session")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random class-conditional DDPM on 8 pixels, saved as diffusers does."""
    import torch
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, num_class_embeds=2,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"))
    folder = tmp_path_factory.mktemp("pixels")
    pipeline: Any = DDPMPipeline(unet, DDPMScheduler(100))
    pipeline.save_pretrained(folder)
    return str(folder)


def save_stable_diffusion(folder: Path, scheduler: Any, **unet_fields: Any) -> str:
    """A tiny random Stable Diffusion of the real classes: 16 pixels, 8 x 8 latents."""
    import torch
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    words = [chr(c) for c in range(97, 123)]
    vocabulary = [*words, *(w + "</w>" for w in words), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"),
                              model_max_length=16)
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=16, projection_dim=16,
        bos_token_id=len(vocabulary) - 2, eos_token_id=len(vocabulary) - 1))
    unet = UNet2DConditionModel(**{
        "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1,
        "norm_num_groups": 4, "cross_attention_dim": 16, "attention_head_dim": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), **unet_fields})
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
                        down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2)
    pipeline: Any = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipeline.save_pretrained(folder / "pipeline")
    return str(folder / "pipeline")


@pytest.fixture(scope="session")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random Stable Diffusion with DDIM."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    return save_stable_diffusion(tmp_path_factory.mktemp("sd"), scheduler)
