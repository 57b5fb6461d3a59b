"""grokd: group-robust knowledge distillation, one script.

A classifier trained on photographs learns shortcuts ("water, so waterbird"), and a small student
distilled from it learns them worse. grokd distils a student from an ensemble of debiased teachers
and weights every teacher, for every sample, by how far its pull on the student departs from that
of a deliberately biased model (AGRE-KD, Kenfack et al., TMLR 2025, arXiv 2411.14984).

    python grokd.py run                           # the embedded digits, everything, CPU, minutes
    python grokd.py run RECIPE                    # the same for recipes/RECIPE.py or any path
    python grokd.py teachers RECIPE               # stage by stage ...
    python grokd.py bias-model RECIPE
    python grokd.py distill RECIPE --student agre --tau 8
    python grokd.py augment RECIPE                # images on which the student is wrong (ConfiG)
    python grokd.py eval RECIPE
    python grokd.py eval RECIPE --models a.safetensors b.safetensors
    accelerate launch grokd.py run RECIPE         # the same, on several GPUs

Every command takes --help, which shows the recipe's values. To begin with images of your own,
copy recipes/folder.py. Results stand under runs/RECIPE/ (--out changes it): models as
safetensors with torchvision's own keys, report.md, results.json, and TensorBoard logs.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import csv
import dataclasses
import difflib
import errno
import fcntl
import functools
import graphlib
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
import traceback
import types
import typing
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, is_dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import tqdm
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

# torchvision, scikit-learn, TensorBoard and matplotlib are imported where they are used:
# each costs seconds, and --help or a mistyped flag should not have to wait for them.

__version__ = "0.1.0"

# A recipe's `from grokd import ...` must find this module, not load a second copy of it.
sys.modules.setdefault("grokd", sys.modules[__name__])

class Problem(Exception):
    """A mistake the user can mend: printed as one line, without a traceback."""

# ---- Recipe types --------------------------------------------------------------------------------

@dataclass(frozen=True)
class Range:
    """Bounds of a number in a recipe, both included; checked by `check`, which tyro does not do."""

    low: float = -math.inf
    high: float = math.inf

Share = Annotated[float, Range(0, 1)]
NotNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(1e-12)]
Natural = Annotated[int, Range(0)]
Count = Annotated[int, Range(1)]
Triple = tuple[float, float, float]
FLAT = tyro.conf.arg(name="")  # a nested section whose flags carry no prefix

IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
SPLITS = ("train", "val", "test")

class Row(NamedTuple):
    """One image of a data set, as a reader returns it."""

    image: Path | np.ndarray  # a file, or a uint8 array [H, W] or [H, W, 3]
    label: int  # core class y, 0..C-1
    attribute: int  # spurious attribute a, 0..A-1; 0 everywhere if not known
    split: str  # "train", "val" or "test"

@dataclass(frozen=True)
class Data:
    """A data set: where it is, how its images are stored, cropped and split."""

    # Table of the images, relative to --root. One row an image; its columns are named below.
    metadata: str = "metadata.csv"
    image_column: str = "image"  # Column with the image file, relative to the folder of the table.
    label_column: str = "label"  # Column with the class: 0, 1, ... or names.
    # Column with the spurious attribute: 0, 1, ... or names. Empty if you have none: groups are
    # then classes, and DFR balances classes only (CB-LLR).
    attribute_column: str = "attribute"
    split_column: str = "split"  # Column that says which split an image belongs to.
    # What that column says for training, validation and test.
    split_codes: tuple[str, str, str] = ("train", "val", "test")
    # A function of the recipe's file, root -> iterable of Row, for data without such a table.
    reader: tyro.conf.Suppress[Callable[[Path], Sequence[Row]] | None] = None
    # Names of the classes; if the table's column holds names, these give them their order.
    class_names: tuple[str, ...] = ()
    attribute_names: tuple[str, ...] = ()  # Names of the attribute's values, likewise.
    # What is scored: every pair of class and attribute, or two groups, aligned (the attribute
    # bears the class's number, as a digit its own colour) and conflicting.
    groups: Literal["pairs", "aligned"] = "pairs"
    # Side in pixels of the square that each image is stored as. About 1.14 times `crop`.
    size: Count = 256
    # squash: resize to size x size (Waterbirds' evaluation). shorter_side: resize the shorter
    # side, then cut the centre (ImageNet's).
    geometry: Literal["squash", "shorter_side"] = "squash"
    # Side in pixels of what is cut from the stored square: the centre in evaluation.
    crop: Count = 224
    # Train on random crops (RandomResizedCrop); evaluation always takes the centre.
    random_crop: bool = True
    # Least and greatest share of the stored square's area in a random crop.
    crop_scale: tuple[Share, Share] = (0.7, 1.0)
    # Least and greatest ratio of its width to its height.
    crop_ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    # Train on random horizontal flips. Switch off where left and right matter (digits, text).
    flip: bool = True
    # Share of validation, by group, that refits heads (DFR); the rest may choose epochs.
    reweighting: Annotated[float, Range(0.01, 1)] = 0.5
    # Folder of decoded images and cached targets, shared by all recipes. A disk of the machine
    # itself is fastest.
    store: str = "runs/store"
    # Largest store of decoded images; beyond it files stay encoded and are decoded when needed,
    # which costs processor time in every epoch.
    max_store_gb: NotNegative = 50.0
    # Most disk space for cached targets; the oldest go first. With all views of a training in the
    # cache, further students do not pay for the teachers.
    cache_gb: NotNegative = 20.0

@dataclass(frozen=True)
class Input:
    """What a network is fed. Weights that carry their own normalisation override mean and std."""

    # Side in pixels the crop is resized to for this network; 0 leaves it as it is.
    input_size: Natural = 0
    # Mean per channel that is subtracted from pixels in 0..1. ImageNet's suits most weights.
    mean: Triple = IMAGENET_MEAN
    # Standard deviation per channel that the rest is divided by.
    std: tuple[Positive, Positive, Positive] = IMAGENET_STD

@dataclass(frozen=True)
class Train:
    """How one network is trained."""

    # Passes over the training set. More if the loss is still falling at the end.
    epochs: Natural = 100
    batch_size: Count = 32  # Images a step, over all processes.
    # Images at once; lower it if memory runs out (batch norm then sees fewer). 0: all.
    micro_batch: Natural = 0
    # Peak learning rate. Lower it if the loss jumps, raise it if it falls slowly.
    lr: NotNegative = 1e-3
    # Learning rate over the steps, after the warm-up: cosine falls to 0 at the end.
    schedule: Literal["constant", "cosine"] = "constant"
    # Epochs over which the learning rate rises from 0. A few help transformers.
    warmup_epochs: NotNegative = 0.0
    # SGD is what the papers use for ResNets; transformers want AdamW, with a lower lr.
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: Share = 0.9  # Of SGD; AdamW keeps its own.
    weight_decay: NotNegative = 1e-3  # Raise it if training accuracy is far above validation's.
    # Distinct augmentations of the training set; epoch e uses e mod num_views. 0: new every epoch.
    num_views: Natural = 0
    # Draws the augmentations. Seeds share it, so that frozen teachers can be asked only once.
    view_seed: Natural = 0
    # Train on mixed images: cutmix pastes a box of another one (Yun 2019), mixup blends two (Zhang
    # 2018, Beta(.2, .2)). Teachers are asked about the mixture, so their answers are not cached.
    mix: Literal["none", "cutmix", "mixup"] = "none"
    # Compile the network (torch.compile). It takes a while at the start: for long trainings.
    compile: bool = False
    # Keep the last weights, or those best by worst-group accuracy on the selection part.
    select: Literal["last", "best"] = "last"
    # Save a checkpoint at least this often; every epoch ends with one too.
    checkpoint_minutes: Positive = 5.0

@dataclass(frozen=True)
class DFR:
    """Deep feature reweighting: the last layer refitted on group-balanced held-out data."""

    # l1: the mean of logistic regressions on balanced subsets (Kirichenko). sgd: balanced
    # sampling (LaBonte; AGRE-KD's teachers). auto: l1 for two classes, else sgd.
    method: Literal["auto", "l1", "sgd"] = "auto"
    # l1: refits that are averaged; one alone costs about a point (second-hand figure).
    num_refits: Count = 20
    # l1: inverse penalties tried on one half of the reweighting part, judged on the other.
    penalties: tuple[Positive, ...] = (1.0, 0.7, 0.3, 0.1, 0.07, 0.03, 0.01)
    epochs: Count = 100  # sgd: passes over the reweighting part.

@dataclass(frozen=True)
class Teachers:
    """The ensemble: networks trained alike but for seed or architecture, then refitted (DFR)."""

    # Teachers in the ensemble. AGRE-KD: 10, and 5 in its ablations. Cost grows in proportion.
    num_teachers: Count = 5
    # Architecture, by torchvision's name or one of cnn2, resnet8, resnet8_gn (16 to 32 pixels).
    # Several are dealt out in turn.
    arch: tuple[str, ...] = ("resnet50",)
    # Initial weights: random, a name of torchvision's (DEFAULT, IMAGENET1K_V2 ...) or a file of
    # yours (.safetensors, .pth). Several are dealt out in turn. With --epochs 0 they stay.
    weights: tuple[str, ...] = ("DEFAULT",)
    seed: Natural = 0  # Seed of the first teacher; teacher i has seed + i.
    dfr: DFR = DFR()  # How heads are refitted.
    input: Annotated[Input, FLAT] = Input()
    train: Annotated[Train, FLAT] = Train()

    def network(self, i: int) -> tuple[str, str]:
        """Architecture and initial weights of teacher i."""
        return self.arch[i % len(self.arch)], self.weights[i % len(self.weights)]

@dataclass(frozen=True)
class BiasModel:
    """The model to depart from: it has learnt the shortcut, and no head of it is refitted."""

    # teacher: the network a teacher was before DFR (AGRE-KD's choice, and free). erm: one trained
    # for the purpose. early-stopped: the same, cut short. gce: generalised cross-entropy, which
    # amplifies the bias.
    kind: Literal["teacher", "erm", "early-stopped", "gce"] = "teacher"
    teacher: Natural = 0  # teacher: which one.
    q: Annotated[float, Range(1e-3, 1)] = 0.7  # gce: exponent q of (1 - p_y^q) / q.
    stop_after: Count = 1  # early-stopped: epochs after which training stops.
    arch: str = "resnet50"  # Architecture. AGRE-KD found the choice to matter little.
    # Initial weights: random, a name of torchvision's, or a file of yours.
    weights: str = "DEFAULT"
    seed: Natural = 0  # Seed of its training.
    input: Annotated[Input, FLAT] = Input()
    train: Annotated[Train, FLAT] = Train()

@dataclass(frozen=True)
class Distill:
    """One student and how it learns."""

    # Weights of the teachers. agre: by departure from the biased model. average: equal (AVER).
    # random: one teacher a batch. ae-kd: their gradients' least common norm, once a batch. eb-kd:
    # by certainty. ca-mkd: by agreement with the label. one-hot: no teachers, labels only.
    weighting: Literal["agre", "average", "random", "ae-kd", "eb-kd", "ca-mkd", "one-hot"] = "agre"
    alpha: Share = 1.0  # Share of the distillation loss; the rest is cross-entropy with the labels.
    # Temperature of the softmax. AGRE-KD's accuracy grows slowly with it, from 1 to 10.
    tau: Annotated[float, Range(1e-3, 1e3)] = 4.0
    # agre: gradients compared, per sample with respect to the logits (equals the last layer, no
    # backward pass) or all parameters (C backward passes), or once per batch over all parameters.
    space: Literal["logits", "parameters", "batch"] = "logits"
    # agre: compare directions (cosine) rather than gradients; without it accuracy falls.
    normalise: bool = True
    # agre: a sample on which no teacher departs counts all teachers alike, or is left out.
    zero: Literal["uniform", "drop"] = "uniform"
    shrink: Share = 0.0  # agre: W <- (1 - shrink) W + shrink, from agre (0) to average (1).
    # Weighted mean of losses (for this loss: of softened probabilities), or loss to the weighted
    # mean of logits.
    combine: Literal["losses", "logits"] = "losses"
    # Weight of feature distillation, for each of `layers`; 0 costs nothing. Try .25 to 1 on pooled,
    # less on layers; around 1000 for attention, .8 for contrastive.
    gamma: tuple[NotNegative, ...] = (0.0,)
    # Layers compared: layer1 ... layer4 (last output at stride 4, 8, 16, 32; small networks' own
    # stages), pooled, or paths of modules; STUDENT=TEACHER where the two differ.
    layers: tuple[str, ...] = ("pooled",)
    # Distance of features: squared, through a linear adapter (a middle layer: FitNets); between
    # attention maps (Zagoruyko 2017); or InfoNCE of 128-d projections within the batch.
    feature_loss: Literal["mse", "attention", "contrastive"] = "mse"
    # mse: teachers count alike, by departure from the biased model, or samples by the teachers'
    # disagreement, or dimensions by their agreement.
    feature_weights: Literal["uniform", "agre", "disagree", "agree"] = "uniform"
    # agre: compare gradients with respect to the student's feature, or to the adapted one. auto:
    # adapted where teachers share an adapter.
    feature_space: Literal["auto", "student", "adapted"] = "auto"
    # One adapter a layer, or one for each teacher. auto: shared between teachers of equal widths
    # that began with the same pretrained weights, whose channels correspond.
    adapters: Literal["auto", "shared", "per-teacher"] = "auto"
    feature_dropout: Annotated[float, Range(0, 0.99)] = 0.0  # mse: channels left out, both sides.
    # Head of the finished student: its own, or one refitted by DFR as the teachers' are.
    head: Literal["own", "dfr"] = "own"
    num_teachers: Natural = 0  # Teachers used, the first ones; 0: all.
    # Share of them with a DFR head, the first ones; the others are plain ERM.
    dfr_share: Share = 1.0
    # Architecture, by torchvision's name or one of cnn2, resnet8, resnet8_gn (16 to 32 pixels).
    arch: str = "resnet18"
    # Initial weights: random, a name of torchvision's, or a file of yours.
    weights: str = "DEFAULT"
    augmented: str = ""  # Train on this set of generated images too.
    # Generated images an epoch as a share of the training images; 0: each of them once.
    augmented_ratio: NotNegative = 0.0
    start: str = ""  # Go on from the student of this name, rather than from `weights`.
    # Show rare images more often, as often as the commonest: groups, classes, or within each class
    # the smaller of two clusters of a helper's loss histories (TAB, Espinosa Zarlenga 2024).
    rebalance: Literal["none", "groups", "classes", "tab"] = "none"
    # tab: a one-hot student that was trained on the same images; empty: the biased model.
    helper: str = ""
    dfr: DFR = DFR()  # How a head is refitted, with head dfr.
    input: Annotated[Input, FLAT] = Input()
    train: Annotated[Train, FLAT] = Train(schedule="cosine", weight_decay=1e-4)

@dataclass(frozen=True)
class Diffusion:
    """The generator that `augment` trains where a set names none: a DDPM of pixels (Ho et al. 2020)
    that predicts v (Salimans and Ho 2022) on the cosine schedule (Nichol and Dhariwal 2021)."""

    # Passes over the training images. More if generated images look like noise.
    epochs: Natural = 300
    batch_size: Count = 64
    lr: Positive = 1e-3  # Of AdamW; falls to 0 on a cosine.
    widths: tuple[Count, ...] = (64, 128, 128)  # Channels at full, half, quarter ... resolution.
    num_timesteps: Count = 1000  # Noise levels.
    class_conditional: bool = True  # Tell the generator the class.
    ema: Share = 0.999  # Decay of the moving average of weights, which is what is kept.
    seed: Natural = 0  # Of weights and noise.

@dataclass(frozen=True)
class Augment:
    """One set of images on which the teachers are sure and a student is wrong (ConfiG)."""

    student: str = "average"  # The student whose mistakes are sought, seed by seed.
    # Guide the generator by teachers and student. False: its plain images, to compare with.
    guided: bool = True
    like: str = ""  # Not guided: one image for each that this guided set accepted.
    # Folder or hub id of a diffusers pipeline: UNet2DModel on pixels, Stable Diffusion 1.x, 2.x or
    # SD-Turbo. Empty: one trained here (section diffusion).
    generator: str = ""
    scheduler: str = "DDIMScheduler"  # By diffusers' name; empty: the pipeline's own.
    steps: Annotated[int, Range(1, 50)] = 6  # Denoising steps after the latent.
    # Noise put on the source image; 1: start from noise alone. Little keeps layout and colours.
    strength: Annotated[float, Range(0.01, 1)] = 0.67
    prompt: str = "a photo of a {}"  # Stable Diffusion: text for a class.
    guidance_scale: NotNegative = 1.0  # Stable Diffusion: classifier-free guidance; 1: none.
    # What is maximised over latents, of teachers' t_y and student's f_y: t^gamma + (1 - f)^gamma,
    # log t + log(1 - f), or the sum of logit margins.
    objective: Literal["power", "log", "margin"] = "power"
    gamma: Positive = 1.0  # power; with 2 (second-hand) it starts on a plateau.
    # normalised: steps of a fixed share of the latent's norm along the gradient. nesterov: ReNO's.
    optimizer: Literal["normalised", "adam", "nesterov"] = "normalised"
    step_size: Positive = 0.1  # Try .05 for adam, 5 for nesterov.
    iterations: Natural = 30  # Most steps for an image.
    # Latent's norm: kept, drawn to a Gaussian's (ReNO, weight .01), or free.
    norm: Literal["keep", "regularise", "free"] = "keep"
    cutouts: Natural = 0  # Random crops shown to the networks in guidance, beside the image.
    noise: NotNegative = 0.0  # Standard deviation of noise added to what they are shown.
    min_teacher: Share = 0.8  # Least confidence of the teachers' mean in the class.
    max_student: Share = 0.5  # Greatest confidence of the student in it.
    # Share of validation images whose denoising loss passes as real; 1: not judged.
    realism: Share = 0.95
    # Training images to start from, by the student's confidence f_y (least-certain: max p).
    sources: Literal["least-confident", "least-certain", "most-confident", "misclassified",
                     "all"] = "least-confident"
    share: Share = 0.5  # Share of the training images taken.
    count: Natural = 0  # How many are taken; 0: the share.
    balanced: bool = False  # As many of each class.
    in_flight: Count = 64  # Images optimised together; fewer if memory runs out.

@dataclass(frozen=True)
class Eval:
    """What is measured."""

    # Images that are scored. Choose settings on selection (validation that no head was fitted
    # on), report test.
    split: Literal["train", "val", "selection", "test"] = "test"
    # Student whose WGA the others' are compared with, seed by seed; none if empty.
    baseline: str = ""
    # How well a linear model on each layer tells label and attribute (validation). Takes a while.
    probes: bool = False

@dataclass(frozen=True)
class Recipe:
    """One experiment. Copy a file of recipes/ and edit it."""

    data: Data
    teachers: Teachers = Teachers()
    bias_model: BiasModel = BiasModel()
    # Students by name: an ablation is a dict of them.
    students: Mapping[str, Distill] = field(default_factory=lambda: {"agre": Distill()})
    # Sets of generated images by name, which students may train on.
    augments: Mapping[str, Augment] = field(default_factory=dict)
    diffusion: Diffusion = Diffusion()
    eval: Eval = Eval()
    seeds: tuple[Natural, ...] = (0, 1, 2)  # Every student is trained once with each of these.
    root: str = "."  # Folder of the data.
    # Figures printed beside the measured ones: row of the report -> column -> per cent.
    published: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

@dataclass(frozen=True)
class Common:
    """Flags of every command."""

    root: str = "."  # Folder of the data.
    out: str = "runs/<recipe>"  # Folder of the results.
    seeds: tuple[Natural, ...] = (0, 1, 2)  # Seeds of the students.
    # Arithmetic. launch: what `accelerate launch --mixed_precision` says, else float32.
    precision: Literal["launch", "float32", "bfloat16", "float16", "float64"] = "launch"
    # With several processes: each trains whole models, or all share the batches of one. auto:
    # models where there are more of them than processes.
    parallel: Literal["auto", "models", "data"] = "auto"
    # Make again what was made with other settings (deletes it), or even with the same.
    redo: bool = False
    # Insist on going on from a checkpoint: an error where there is none. (Checkpoints are used
    # without it too.)
    resume: bool = False

def check(value: Any, hint: Any, name: str, told: str = "") -> None:
    """Raise Problem unless `value` has the type `hint` and lies in its Range, sections included."""
    told = told or _in_words(hint)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        check(value, args[0], name, told)
        right = all(r.low <= value <= r.high for r in args[1:] if isinstance(r, Range))
    elif origin is Literal:
        right = value in args
    elif origin is types.UnionType:  # of a function and None, the one union in use
        right = value is None or callable(value)
    elif hint is float:
        right = type(value) in (int, float) and not math.isnan(value)
    else:
        right = isinstance(value, origin or hint) and (hint is bool or not isinstance(value, bool))
    if right and origin is tuple:
        kinds = [args[0]] * len(value) if args[-1] is ... else args
        right = len(kinds) == len(value)
        for i, (item, kind) in enumerate(zip(value, kinds, strict=False)):
            check(item, kind, f"{name}[{i}]")
    if not right:
        raise Problem(f"{name} = {value!r}: must be {told}.")
    if is_dataclass(hint):
        for key, kind in typing.get_type_hints(hint, include_extras=True).items():
            check(getattr(value, key), kind, f"{name}.{key}")
    elif origin is Mapping:
        for key, item in value.items():
            check(key, args[0], f"a name in {name}")
            check(item, args[1], f"{name}[{key!r}]")

def _in_words(hint: Any) -> str:
    """A type, for error lines."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        bounds = next((rule for rule in args[1:] if isinstance(rule, Range)), Range())
        limits = f" at least {bounds.low:g}" * (bounds.low > -math.inf)
        limits += f" and at most {bounds.high:g}" * (bounds.high < math.inf)
        return _in_words(args[0]) + limits
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is tuple:
        return f"a tuple of {'' if args[-1] is ... else f'{len(args)} times '}{_in_words(args[0])}"
    names = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))

def dependencies(students: Mapping[str, Distill],
                 sets: Mapping[str, Augment]) -> graphlib.TopologicalSorter[str]:
    """What each student and each set of images needs to be there before."""
    needs = {key: {s.start, s.helper, s.augmented} for key, s in students.items()}
    needs |= {key: {a.student, a.like} for key, a in sets.items()}
    return graphlib.TopologicalSorter({k: v & needs.keys() for k, v in needs.items()})

def check_recipe(recipe: Recipe, name: str, original: Recipe | None = None) -> None:
    """Raise Problem for a value of wrong type or range, or values that exclude each other.

    Students and sets may refer to those of `original`, the recipe before some were picked.
    """
    check(recipe, Recipe, name)
    data, teachers, bias_model = recipe.data, recipe.teachers, recipe.bias_model
    trains = {f"students[{key!r}]": student.train for key, student in recipe.students.items()}
    trains |= {"teachers": teachers.train, "bias_model": bias_model.train}

    def refuse(wrong: bool, told: str) -> None:
        if wrong:
            raise Problem(f"{name}: {told}.")

    refuse(data.crop > data.size,
           f"data.crop = {data.crop} is larger than data.size = {data.size}")
    refuse(not recipe.seeds or not recipe.students, "needs at least one seed and one student")
    refuse(recipe.eval.probes and data.reweighting == 1,
           "eval.probes are scored on the selection part: data.reweighting = 1 leaves none")
    for key, train in trains.items():
        refuse(train.select == "best" and data.reweighting == 1,
               f"{key}.select = 'best' needs a selection part: data.reweighting = 1 leaves none")
    refuse(bias_model.kind == "teacher" and bias_model.teacher >= teachers.num_teachers,
           f"bias_model.teacher = {bias_model.teacher}, but there are {teachers.num_teachers} "
           "teachers, counted from 0")
    students, sets = ({**getattr(original or recipe, kind), **getattr(recipe, kind)}
                      for kind in ("students", "augments"))
    references = [(f"students[{key!r}].{item}", getattr(student, item), known)
                  for key, student in recipe.students.items()
                  for item, known in (("start", students), ("helper", students),
                                      ("augmented", sets))]
    references += [(f"augments[{key!r}].{item}", getattr(section, item), known)
                   for key, section in recipe.augments.items()
                   for item, known in (("student", students), ("like", sets))]
    for place, value, known in references:
        refuse(bool(value) and value not in known,
               f"{place} = {value!r} names nothing{suggest(value, [*known]) if value else ''}")
    try:
        dependencies(students, sets).prepare()
    except graphlib.CycleError as error:
        refuse(True, f"{', '.join(sorted({*error.args[1]}))} wait for each other: see start, "
                     "helper and augmented of the students, student and like of the sets")
    for key, section in recipe.augments.items():
        refuse(key in recipe.students, f"{key!r} names a student and a set of images")
        refuse(not re.fullmatch(r"\w[\w.+=,-]*", key),
               f"set {key!r}: letters, digits and . _ + = , - make a name")
        refuse(bool(section.like) and section.guided,
               f"augments[{key!r}]: like belongs to guided = False")
    for key, student in recipe.students.items():
        refuse(not re.fullmatch(r"\w[\w.+=,-]*", key),
               f"student {key!r}: letters, digits and . _ + = , - make a name")
        refuse(student.num_teachers > teachers.num_teachers,
               f"students[{key!r}].num_teachers = {student.num_teachers}, but there are "
               f"{teachers.num_teachers} teachers")
        whole = (student.weighting, student.space) == ("agre", "batch")
        whole = whole or student.weighting == "ae-kd"
        plain, kind = student.feature_loss == "mse", student.feature_weights
        if student.weighting != "one-hot" and any(student.gamma):
            whole = whole or kind == "disagree" or student.feature_loss == "contrastive"
            refuse(len(student.gamma) != len(student.layers),
                   f"students[{key!r}] has {len(student.layers)} layers and {len(student.gamma)} "
                   "values of gamma: give one for each layer")
            refuse(not plain and (kind != "uniform" or student.feature_dropout > 0),
                   f"students[{key!r}]: feature_weights and feature_dropout belong to "
                   "feature_loss = 'mse'")
            refuse(kind in ("agree", "disagree") and
                   (student.num_teachers or teachers.num_teachers) < 2,
                   f"students[{key!r}].feature_weights = {kind!r} needs at least 2 teachers")
        refuse(whole and 0 < student.train.micro_batch < student.train.batch_size,
               f"students[{key!r}]: ae-kd, space = 'batch', disagree and contrastive work on whole "
               "batches, not on micro-batches: set micro_batch = 0")

# ---- Basics: hashes, files, processes ------------------------------------------------------------

def hash_bits(*keys: int | np.ndarray) -> np.ndarray:
    """Counter-based 64-bit hash of integers, broadcast: splitmix64's finaliser, chained.

    The same on every machine, process and library version: views, orders and seeds rest on it.
    """
    state = np.zeros(1, np.uint64)
    for key in keys:
        state = (state ^ np.asarray(key).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state

def hash_uniform(*keys: int | np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1), a function of the integers alone."""
    return (hash_bits(*keys) >> np.uint64(11)).astype(np.float64) / 2.0**53

def seed_of(*keys: int) -> int:
    """A seed for torch, a function of the keys alone."""
    return int(hash_bits(*keys)[0] >> np.uint64(1))

def permutation(n: int, *keys: int) -> np.ndarray:
    """A random order of 0..n-1, a function of the keys alone."""
    return np.argsort(hash_bits(*keys, np.arange(n)), kind="stable")

def digest(*parts: Any) -> str:
    """16 hexadecimal digits that identify the parts (bytes, or anything JSON can hold)."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode())
        sha.update(b"\0")
    return sha.hexdigest()[:16]

def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """A section as {flag name: plain value}; sections without a prefix of their own add none."""
    if not is_dataclass(value):
        return {prefix: list(value) if isinstance(value, tuple) else value}
    flat: dict[str, Any] = {}
    for item in fields(value):
        name = "" if item.name in ("train", "input", "common", "section") else item.name
        joined = ".".join(part for part in (prefix, name) if part)
        flat |= flatten(getattr(value, item.name), joined)
    return flat

def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """"lr 0.1 → 0.2, ..." for the values that differ; empty if none do."""
    names = [k for k in {**old, **new} if old.get(k) != new.get(k)]
    return ", ".join(f"{k} {old.get(k, 'nothing')} → {new.get(k, 'nothing')}" for k in names)

def write_file(path: Path, content: bytes | memoryview | str) -> None:
    """Write a file whole or not at all. Raises Problem if the disk is full or not writable."""
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise Problem(f"{path} could not be written ({error.strerror}): make room there, or choose "
                      "another folder with --out; the same command then goes on from where it "
                      "was.") from error

@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold a lock between processes of this machine; it ends with the process, however it ends.

    Raises Problem if another process holds it and `wait` is False.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            raise Problem(f"{path.parent} is being written by another run ({file.read().strip()}): "
                          "wait for it, stop it, or write elsewhere with --out.") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield

def progress(items: Any = None, label: str = "", **more: Any) -> Any:
    """A progress bar: on terminals only, and for the first process."""
    hidden = not sys.stderr.isatty() or int(os.environ.get("RANK", 0)) > 0
    return tqdm(items, desc=label, disable=hidden, leave=False, dynamic_ncols=True,
                main_process_only=False, **more)

def say(*lines: str) -> None:
    """Print on the first process only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*lines, sep="\n", flush=True)

@dataclass(frozen=True)
class Runtime:
    """Devices, processes and arithmetic, from accelerate."""

    accelerator: Accelerator
    precision: str  # float32, bfloat16, float16 (both autocast) or float64
    shared: bool = False  # do the processes share the batches of one training?

    @staticmethod
    def start(precision: str) -> Runtime:
        mixed = {"float32": "no", "float64": "no", "bfloat16": "bf16", "float16": "fp16"}
        patience = InitProcessGroupKwargs(timeout=timedelta(days=7))  # ranks wait for stores
        try:
            accelerator = Accelerator(
                mixed_precision=mixed.get(precision), kwargs_handlers=[patience]
            )
        except ValueError as error:
            raise Problem(f"--precision {precision}: {error}") from error
        if precision == "launch":
            names = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
            precision = names.get(accelerator.mixed_precision, "")
        if not precision:
            raise Problem(f"Mixed precision {accelerator.mixed_precision} is not supported.")
        return Runtime(accelerator, precision)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.precision == "float64" else torch.float32

    @property
    def rank(self) -> int:
        """Place of this process among those that share one training."""
        return self.accelerator.process_index if self.shared else 0

    @property
    def world(self) -> int:
        return self.accelerator.num_processes if self.shared else 1

    @property
    def on_node(self) -> tuple[int, int]:
        """Place among the processes of this node that share one training, and their number."""
        count = int(os.environ.get("LOCAL_WORLD_SIZE", self.world))
        return (self.accelerator.local_process_index, count) if self.world > 1 else (0, 1)

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        return self.accelerator.autocast()

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the processes that share one training."""
        return self.accelerator.reduce(tensor, "sum") if self.world > 1 else tensor

    def wait(self) -> None:
        """Wait for the processes that share one training: files of the first are then there."""
        if self.world > 1:
            self.accelerator.wait_for_everyone()

    def plan(self, jobs: Sequence[Any], parallel: str) -> tuple[Runtime, list[Any]]:
        """How to train several models: the runtime to use and this process's share of the jobs."""
        processes = self.accelerator.num_processes
        # More models than processes: whole models in parallel need no communication.
        shared = parallel == "data" or (parallel == "auto" and len(jobs) <= processes)
        runtime = replace(self, shared=shared and processes > 1)
        own = jobs if runtime.shared else jobs[self.accelerator.process_index :: processes]
        return runtime, list(own)

# ---- Data: rows, store, views, order -------------------------------------------------------------

def _codes(column: str, values: list[str], names: tuple[str, ...], table: Path) -> list[int]:
    """The numbers a column holds, or the places of its words in `names` (else in sorted order)."""
    if all(value.isdecimal() for value in values):
        return [int(value) for value in values]
    order = list(names) or sorted(set(values))
    for row, value in enumerate(values):
        if value not in order:
            raise Problem(f"{table}, row {row + 2}: column {column!r} holds {value!r}, which is "
                          f"not one of {', '.join(order)}.")
    return [order.index(value) for value in values]

def read_rows(data: Data, root: str) -> list[Row]:
    """Rows of the data set, from the recipe's reader or the metadata table.

    Raises Problem for a missing table, column or image, and for an unknown split code.
    """
    if data.reader is not None:
        return list(data.reader(Path(root)))
    table = Path(root) / data.metadata
    if not table.is_file():
        raise Problem(f"{table} does not exist: give the folder of the data with --root.")
    with open(table, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        records = list(reader)
        present = reader.fieldnames or []
    wanted = [data.image_column, data.label_column, data.split_column]
    wanted += [data.attribute_column] if data.attribute_column else []
    for column in wanted:
        if column not in present:
            raise Problem(f"{table} has no column {column!r}; it has "
                          f"{', '.join(map(repr, present))}: name yours in the recipe's Data "
                          "(image_column, label_column ...).")
    if not records:
        raise Problem(f"{table} has no rows.")
    for line, record in enumerate(records, 2):
        if any(record[column] in (None, "") for column in wanted):
            raise Problem(f"{table}, line {line}: a value of {', '.join(wanted)} is missing.")
        if record[data.split_column] not in data.split_codes:
            raise Problem(f"{table}, line {line}: column {data.split_column!r} holds "
                          f"{record[data.split_column]!r}, but Data.split_codes are "
                          f"{', '.join(data.split_codes)} (training, validation, test).")
    files = [table.parent / record[data.image_column] for record in records]
    if absent := [str(file) for file in files if not file.is_file()]:
        raise Problem(f"{len(absent)} of the {len(files)} images that {table} names do not exist: "
                      + ", ".join(absent))
    column = data.label_column
    labels = _codes(column, [r[column] for r in records], data.class_names, table)
    attributes = [0] * len(records)
    if column := data.attribute_column:
        attributes = _codes(column, [r[column] for r in records], data.attribute_names, table)
    splits = [SPLITS[data.split_codes.index(r[data.split_column])] for r in records]
    return [Row(*row) for row in zip(files, labels, attributes, splits, strict=True)]

def decode(source: Path | np.ndarray | io.BytesIO, size: int, geometry: str) -> np.ndarray:
    """Decode an image and fit it to the stored square: uint8 [3, size, size]."""
    image: Image.Image
    if isinstance(source, np.ndarray):
        image = Image.fromarray(source)
    else:
        with Image.open(source) as file:
            image = ImageOps.exif_transpose(file)
    image = image.convert("RGB")
    box = None
    if geometry == "shorter_side":
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = (left, top, left + side, top + side)
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return np.asarray(image).transpose(2, 0, 1)

BLOCK = 256  # images per checksum, and per step of a prediction
THREADS = ThreadPoolExecutor(os.cpu_count())  # decode images

@dataclass
class Store:
    """A data set, decoded once into a memory-mapped uint8 array [N, 3, S, S].

    Beyond max_store_gb: the encoded files one after the other, decoded by threads when read.
    """

    data: Data
    folder: Path
    images: np.ndarray  # uint8 [N, 3, S, S], or the bytes of all files
    offsets: list[int]  # where each file begins and the last one ends; empty if decoded
    checksums: list[int]  # CRC-32 of each BLOCK of images, or of each file
    labels: np.ndarray  # int64 [N]
    attributes: np.ndarray  # int64 [N]
    splits: np.ndarray  # int8 [N], places in SPLITS
    checked: set[int] = field(default_factory=set)
    extra: np.ndarray | None = None  # uint8 [K, 3, S, S], generated images behind those stored

    def __post_init__(self) -> None:
        names, attributes = self.data.class_names, self.data.attribute_names
        if self.data.groups == "aligned":
            attributes = ("aligned", "conflicting")
            self.attributes = (self.attributes != self.labels).astype(np.int64)
        self.num_classes = max(int(self.labels.max()) + 1, len(names))
        self.num_attributes = max(int(self.attributes.max()) + 1, len(attributes))
        self.class_names = names or tuple(f"class {y}" for y in range(self.num_classes))
        attributes = attributes or tuple(f"attribute {a}" for a in range(self.num_attributes))
        for kind, given, needed in (("class_names", self.class_names, self.num_classes),
                                    ("attribute_names", attributes, self.num_attributes)):
            if len(given) != needed:
                raise Problem(f"Data.{kind} has {len(given)} names, but the data have {needed}.")
        # Heads are refitted on balanced cells; groups, what is scored, may be fewer.
        self.cells = self.labels * self.num_attributes + self.attributes
        self.cell_names = [f"{y}, {a}" if self.num_attributes > 1 else y
                           for y in self.class_names
                           for a in attributes]
        aligned = self.data.groups == "aligned"
        self.groups = self.attributes if aligned else self.cells
        self.group_names = list(attributes) if aligned else self.cell_names
        self.parts = {name: np.flatnonzero(self.splits == i) for i, name in enumerate(SPLITS)}
        val, refit = self.parts["val"], []
        for cell in range(len(self.cell_names)):
            members = val[self.cells[val] == cell]
            share = math.ceil(self.data.reweighting * len(members))
            refit.append(members[permutation(len(members), cell)][:share])
        self.parts["reweighting"] = np.sort(np.concatenate(refit))
        self.parts["selection"] = np.setdiff1d(val, self.parts["reweighting"])
        self.sizes = {name: np.bincount(self.groups[part], minlength=len(self.group_names))
                      for name, part in self.parts.items()}
        # Without attributes, refitting a head balances classes only.
        self.head_name = "DFR" if self.num_attributes > 1 else "CB-LLR"
        # What the pixels are, wherever the files lie: moving a data set changes nothing.
        self.fingerprint = digest(
            self.checksums, self.labels.tolist(), self.attributes.tolist(), self.splits.tolist()
        )

    def split(self, name: str) -> np.ndarray:
        """Indices of a split; `reweighting` and `selection` are the two parts of validation.

        The parts are drawn within every group, alike for all seeds (METHODS: stratified).
        """
        return self.parts[name]

    def counts(self, name: str) -> np.ndarray:
        """Images per group of a split: int64 [G]."""
        return self.sizes[name]

    def raw(self, indices: np.ndarray) -> np.ndarray:
        """Stored images, uint8 [B, 3, S, S]. Checksums are verified when first read."""
        own = len(self.labels) - (0 if self.extra is None else len(self.extra))
        if self.extra is not None and (indices >= own).any():
            images = self.extra[np.maximum(indices - own, 0)]
            images[indices < own] = self.raw(indices[indices < own])
            return images
        if self.offsets:
            return np.stack(list(THREADS.map(self._decoded, indices.tolist())))
        for block in set((indices // BLOCK).tolist()) - self.checked:
            self._check(block, self.images[block * BLOCK :][:BLOCK].tobytes())
        return self.images[indices]

    def _decoded(self, i: int) -> np.ndarray:
        content = self.images[self.offsets[i] : self.offsets[i + 1]].tobytes()
        self._check(i, content)
        return decode(io.BytesIO(content), self.data.size, self.data.geometry)

    def _check(self, place: int, content: bytes) -> None:
        if place not in self.checked and zlib.crc32(content) != self.checksums[place]:
            raise Problem(f"{self.folder} is damaged (block {place}): delete it and run again.")
        self.checked.add(place)

    def view(
        self, indices: np.ndarray, device: torch.device, view: int | None = None, seed: int = 0,
        raw: Tensor | None = None,
    ) -> Tensor:
        """Images as networks see them: float32 [B, 3, crop, crop] in 0..1, not normalised.

        view None is the evaluation view, the centre; otherwise the augmentation of image i is a
        function of (seed, view, i) alone. `raw` are the stored images, if they are at hand.
        """
        data, size = self.data, self.data.size
        batch = torch.from_numpy(self.raw(indices)) if raw is None else raw
        batch = batch.to(device, non_blocking=True)
        flips = np.zeros(len(indices), bool)
        if view is not None and data.flip:
            flips = hash_uniform(seed, view, indices, 99) < 0.5
        if view is None or not data.random_crop:
            start = (size - data.crop) // 2
            images = batch[:, :, start : start + data.crop, start : start + data.crop].float() / 255
            if flips.any():
                flip = torch.from_numpy(flips).to(device)[:, None, None, None]
                images = torch.where(flip, images.flip(3), images)
            return images.contiguous(memory_format=torch.channels_last)
        left, top, width, height = random_boxes(seed, view, indices, data).T
        theta = np.zeros((len(indices), 2, 3), np.float32)  # output -> stored square, in -1..1
        theta[:, 0, 0] = width / size * np.where(flips, -1, 1)
        theta[:, 1, 1] = height / size
        theta[:, 0, 2] = (2 * left + width) / size - 1
        theta[:, 1, 2] = (2 * top + height) / size - 1
        shape = [len(indices), 3, data.crop, data.crop]
        grid = F.affine_grid(torch.from_numpy(theta).to(device), shape, align_corners=False)
        images = F.grid_sample(
            batch.float() / 255, grid, padding_mode="border", align_corners=False
        )
        return images.clamp_(0, 1).contiguous(memory_format=torch.channels_last)

def enlarge(store: Store, images: np.ndarray, labels: np.ndarray, ratio: float) -> Store:
    """The store with images [K, 3, S, S] added to its training split, each once, or repeated to a
    `ratio` of the training images. Their groups are not known: no figure counts them."""
    union, count, train = copy.copy(store), len(store.labels), store.split("train")
    union.extra, union.labels = images, np.concatenate([store.labels, labels])
    unknown = np.full(len(labels), -1)
    union.cells = np.concatenate([store.cells, unknown])
    union.groups = np.concatenate([store.groups, unknown])
    shown = np.arange(round(ratio * len(train)) or len(labels)) % len(labels)
    union.parts = {**store.parts, "train": np.concatenate([train, count + shown])}
    told = [zlib.crc32(images.tobytes()), labels.tolist(), ratio]
    union.fingerprint = digest(store.fingerprint, told)
    return union

def rebalanced(store: Store, clusters: np.ndarray, within: np.ndarray) -> Store:
    """The store with training images repeated until every cluster [N] is as large as the largest of
    those that share a value of `within` [N]; negative clusters stay as they are."""
    train, repeats = store.split("train"), list[np.ndarray]()
    for outer in np.unique(within):
        members = [np.flatnonzero((within == outer) & (clusters == c))
                   for c in np.unique(clusters[(within == outer) & (clusters >= 0)])]
        for places in members:
            missing = max(map(len, members)) - len(places)
            repeats.append(places[permutation(len(places), 0)][np.arange(missing) % len(places)])
    balanced = copy.copy(store)
    balanced.parts = {**store.parts, "train": train[np.concatenate([np.arange(len(train)),
                                                                    *repeats])]}
    balanced.fingerprint = digest(store.fingerprint, balanced.parts["train"].tolist())
    return balanced

def loss_clusters(losses: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """TAB's clusters [N]: k-means with k = 2 within each class on loss histories [epochs, N]."""
    from sklearn.cluster import KMeans

    clusters = np.zeros(len(labels), np.int64)
    for y in np.unique(labels):
        means = KMeans(2, n_init=10, random_state=seed).fit(losses.T[labels == y].astype(float))
        clusters[labels == y] = 2 * y + means.labels_
    return clusters

def random_boxes(seed: int, view: int, indices: np.ndarray, data: Data) -> np.ndarray:
    """RandomResizedCrop's boxes (left, top, width, height) in stored pixels: int64 [B, 4].

    torchvision's distribution: ten tries at an area and an aspect ratio, then the whole square.
    """
    size, tries = data.size, np.arange(10)
    keys = (seed, view, indices[:, None])
    low, high = data.crop_scale
    area = (low + (high - low) * hash_uniform(*keys, tries)) * size**2  # [B, 10]
    bounds = np.log(data.crop_ratio)
    ratio = np.exp(bounds[0] + (bounds[1] - bounds[0]) * hash_uniform(*keys, 10 + tries))
    width = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    height = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (width >= 1) & (width <= size) & (height >= 1) & (height <= size)
    rows, first = np.arange(len(indices)), fits.argmax(1)
    width = np.where(fits.any(1), width[rows, first], size)
    height = np.where(fits.any(1), height[rows, first], size)
    left = (hash_uniform(seed, view, indices, 20) * (size - width + 1)).astype(np.int64)
    top = (hash_uniform(seed, view, indices, 21) * (size - height + 1)).astype(np.int64)
    return np.stack([left, top, width, height], 1)

def open_store(data: Data, root: str) -> Store:
    """Build the store of a data set, or find the one built before; check the groups."""
    rows = read_rows(data, root)
    if not rows:
        raise Problem("The recipe's reader returned no images.")
    for row in rows:
        if row.split not in SPLITS or row.label < 0 or row.attribute < 0:
            raise Problem(f"The recipe's reader returned {row!r}: see grokd.Row for what it means.")

    def identity(image: Path | np.ndarray) -> Any:
        if isinstance(image, np.ndarray):
            return [str(image.dtype), image.shape, zlib.crc32(image.tobytes())]
        stat = image.stat()
        return [str(image.absolute()), stat.st_size, stat.st_mtime_ns]

    encoded = store_bytes(len(rows), data.size) > data.max_store_gb * 1e9
    form = "encoded" if encoded else [data.size, data.geometry]
    key = digest([identity(row.image) for row in rows], form)
    folder = Path(data.store) / key
    with locked(folder.with_suffix(".lock"), wait=True):
        if not (folder / "manifest.json").is_file():
            build_store(rows, data, folder, encoded)
    manifest = json.loads((folder / "manifest.json").read_text())
    images: np.ndarray = np.memmap(folder / "images.u8", np.uint8, "r")
    if not manifest["offsets"]:
        images = images.reshape(len(rows), 3, data.size, data.size)
    labels = np.array([row.label for row in rows], np.int64)
    attributes = np.array([row.attribute for row in rows], np.int64)
    splits = np.array([SPLITS.index(row.split) for row in rows], np.int8)
    store = Store(data, folder, images, **manifest, labels=labels, attributes=attributes,
                  splits=splits)
    for name in SPLITS:
        if not len(store.split(name)):
            raise Problem(f"The data have no {name} images: every split is needed.")
    present = np.bincount(labels[store.split("train")], minlength=store.num_classes)
    if absent := [n for n, c in zip(store.class_names, present, strict=True) if not c]:
        raise Problem(f"No training image of {', '.join(absent)}: each class needs some.")
    cells = set(store.cells[store.split("reweighting")].tolist())
    if absent := [name for cell, name in enumerate(store.cell_names) if cell not in cells]:
        raise Problem(f"No image of group {'; '.join(absent)} in the part of validation that "
                      "refits heads: add some, or set attribute_column = '' to balance classes "
                      "only.")
    return store

def store_bytes(num_images: int, size: int) -> int:
    """Size of a store of decoded images."""
    return 3 * size**2 * num_images

def build_store(rows: list[Row], data: Data, folder: Path, encoded: bool) -> None:
    """Decode every image into `folder`, in parallel; the folder appears only when complete."""
    part, failures = folder.with_suffix(".part"), list[str]()
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)

    def load(i: int) -> bytes:  # what is stored of an image; it is decoded in any case
        source = rows[i].image
        try:
            decoded = decode(source, data.size, data.geometry)
            if encoded and isinstance(source, Path):
                return source.read_bytes()
            if encoded:
                buffer = io.BytesIO()
                Image.fromarray(np.asarray(source)).save(buffer, "png")
                return buffer.getvalue()
            return decoded.tobytes()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            failures.append(f"{source if isinstance(source, Path) else f'image {i}'} ({error})")
            return b""

    total = store_bytes(len(rows), data.size)
    if encoded:
        one = store_bytes(1, data.size)
        total = sum(r.image.stat().st_size if isinstance(r.image, Path) else one for r in rows)
    free, form = shutil.disk_usage(part).free, "Packing" if encoded else "Decoding"
    say(f"{form} {len(rows):,} images into {folder}: {total / 1e9:.2f} GB, {free / 1e9:.0f} free")
    if total > free:
        raise Problem(f"{folder} needs {total / 1e9:.1f} GB, {free / 1e9:.1f} are free: make room, "
                      "lower Data.size, or name another disk as Data.store.")
    offsets, checksums = [0], list[int]()
    with open(part / "images.u8", "wb") as file:
        bar = progress(range(0, len(rows), BLOCK), "store")
        for start in bar:
            block = list(THREADS.map(load, range(start, min(start + BLOCK, len(rows)))))
            file.write(b"".join(block))
            offsets += [offsets[-1] + total for total in itertools.accumulate(map(len, block))]
            checksums += map(zlib.crc32, block) if encoded else [zlib.crc32(b"".join(block))]
    if failures:
        shutil.rmtree(part)
        raise Problem(f"{len(failures)} images cannot be read: " + ", ".join(sorted(failures)))
    manifest = {"offsets": offsets if encoded else [], "checksums": checksums}
    (part / "manifest.json").write_text(json.dumps(manifest))
    part.rename(folder)

def prefetch(items: Sequence[Any], load: Callable[[Any], Any]) -> Iterator[tuple[Any, Any]]:
    """Each item with load(item), which a thread of its own computes two items ahead."""
    with ThreadPoolExecutor(1) as thread:
        ahead = [thread.submit(load, item) for item in items[:2]]
        for i, item in enumerate(items):
            if i + 2 < len(items):
                ahead.append(thread.submit(load, items[i + 2]))
            yield item, ahead.pop(0).result()

def epoch_batches(n: int, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Positions 0..n-1 in the order of an epoch, cut into total batches.

    A last batch of one sample joins the one before: batch norm has no variance to measure on it.
    """
    order = permutation(n, seed, epoch)
    cuts = list(range(batch_size, n, batch_size))
    if cuts and n - cuts[-1] == 1 and batch_size > 1:
        cuts.pop()
    return np.split(order, cuts)

# ---- Models --------------------------------------------------------------------------------------

class CNN2(nn.Sequential):
    """Two convolutions and a linear layer, for images of 16 to 32 pixels; no batch norm.

    The AGRE-KD paper's student on Coloured MNIST is "a 2-convolution CNN"; the widths are ours.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.layer2 = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.fc = nn.Linear(64 * 16, num_classes)

class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al. 2016, basic block)."""

    def __init__(self, width_in: int, width: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        stride = 1 if width_in == width else 2
        self.body = nn.Sequential(
            nn.Conv2d(width_in, width, 3, stride, 1, bias=False), norm(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False), norm(width),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride == 2:
            convolution = nn.Conv2d(width_in, width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, norm(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))

class ResNet8(nn.Sequential):
    """A residual network of three blocks (16, 32, 64 wide) for images of 16 to 32 pixels."""

    def __init__(self, num_classes: int, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.stem = nn.Sequential(stem, norm(16), nn.ReLU())
        self.layer1 = ResidualBlock(16, 16, norm)
        self.layer2 = ResidualBlock(16, 32, norm)
        self.layer3 = ResidualBlock(32, 64, norm)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(64, num_classes)

SMALL: dict[str, Callable[[int], nn.Module]] = {
    "cnn2": CNN2, "resnet8": ResNet8,
    "resnet8_gn": lambda num_classes: ResNet8(num_classes, lambda width: nn.GroupNorm(8, width)),
}

class Classifier(nn.Module):
    """A network with its normalisation, as a trunk (image -> features) and a linear head.

    forward: images [B, 3, crop, crop] in 0..1 -> logits [B, C], in the head's own precision even
    under autocast. Raises Problem for an unknown architecture or one without a linear last layer.
    """

    def __init__(self, arch: str, num_classes: int, input: Input) -> None:
        super().__init__()
        self.arch, self.num_classes, self.input = arch, num_classes, input
        self.folded_from = ""  # see fold
        self.trunk = _network(arch, num_classes)
        linear = [name for name, layer in self.trunk.named_modules()
                  if isinstance(layer, nn.Linear) and not name.startswith(AUXILIARY)]
        self.head_name = linear[-1] if linear else ""
        head = self.trunk.get_submodule(self.head_name) if self.head_name else None
        if not isinstance(head, nn.Linear) or head.bias is None:
            raise Problem(f"{arch} does not end in a linear layer with a bias: choose another.")
        self.head = head
        self.trunk.set_submodule(self.head_name, nn.Identity())
        for name, parameter in self.trunk.named_parameters():
            if name.startswith(AUXILIARY):
                parameter.requires_grad_(False)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(input.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(input.std)[:, None, None], persistent=False)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate pooled features [B, d]: what the head multiplies."""
        side = self.input.input_size
        if side and side != images.shape[-1]:
            images = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
        fixed = getattr(self.trunk, "image_size", images.shape[-1])  # vision transformers
        if fixed != images.shape[-1]:
            raise Problem(f"{self.arch} takes {fixed} pixels, not {images.shape[-1]}: set "
                          f"input_size = {fixed}.")
        output = self.trunk((images.to(self.head.weight.dtype) - self.mean) / self.std)
        return output if isinstance(output, Tensor) else output.logits  # GoogLeNet, Inception

    def classify(self, features: Tensor) -> Tensor:
        """Logits [B, C] of features, outside autocast."""
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features.to(self.head.weight.dtype))

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.features(images))

    def own_parameters(self) -> dict[str, Tensor]:
        """Parameters that are trained, without the adapters of feature distillation."""
        return {k: v for k, v in self.named_parameters()
                if v.requires_grad and not k.startswith("adapters.")}

    def plain_state(self) -> dict[str, Tensor]:
        """State dict with the keys of the plain network, on the CPU."""
        state = {k.removeprefix("trunk."): v for k, v in self.state_dict().items()
                 if not k.startswith("adapters.")}
        for name in ("weight", "bias"):
            state[f"{self.head_name}.{name}"] = state.pop(f"head.{name}")
        return {k: v.detach().cpu().contiguous().clone() for k, v in state.items()}

    def load_plain(self, state: Mapping[str, Tensor], source: str, any_head: bool = False) -> bool:
        """Load such a state dict, strictly. With `any_head`, a classification layer for another
        number of classes is left as it was; returns whether the head was loaded."""
        own, state = self.plain_state(), dict(state)
        layers = (f"{self.head_name}.", *AUXILIARY)
        fits = all(
            state[k].shape == own[k].shape for k in own if k.startswith(layers) and k in state
        )
        if not fits and any_head:
            state |= {k: own[k] for k in own if k.startswith(layers) and k in state}
        head = f"{self.head_name}."
        nested = {f"head.{k.removeprefix(head)}" if k.startswith(head) else f"trunk.{k}": v
                  for k, v in state.items()}
        try:
            self.load_state_dict(nested)
        except RuntimeError as error:
            told = " ".join(str(error).split()).partition(": ")[2]
            raise Problem(f"{source} does not fit {self.arch}: {told[:200]} ...") from error
        return fits

AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # GoogLeNet's and Inception's extra heads: unused

def _network(arch: str, num_classes: int) -> nn.Module:
    """The plain network, randomly initialised from torch's generator."""
    if arch in SMALL:
        return SMALL[arch](num_classes)
    from torchvision import models

    known = [*SMALL, *models.list_models(module=models)]
    if arch not in known:
        raise Problem(f"Unknown architecture {arch!r}{suggest(arch, known)}")
    extra = {"init_weights": True} if arch in ("googlenet", "inception_v3") else {}
    return models.get_model(arch, weights=None, num_classes=num_classes, **extra)

def suggest(word: str, known: Sequence[str]) -> str:
    """ "; did you mean ...?" where something known is close."""
    close = difflib.get_close_matches(word, known, 3)
    return f"; did you mean {' or '.join(close)}?" if close else f": known are {', '.join(known)}"

def build_model(arch: str, weights: str, num_classes: int, input: Input, seed: int) -> Classifier:
    """A classifier with its initial weights: random, torchvision's by name, or from a file.

    Weights for another number of classes keep their trunk and get a fresh head.
    """
    torch.manual_seed(seed)
    if weights == "random":
        return Classifier(arch, num_classes, input)
    state: Mapping[str, Tensor]
    if Path(weights).suffix in (".safetensors", ".pth", ".pt"):
        state, metadata = read_weights(Path(weights))
        if "input" in metadata:
            own = stored_input(metadata)
            input = replace(own, input_size=input.input_size or own.input_size)
    else:
        from torchvision import models

        _network(arch, num_classes)  # names the architecture, if that is what is wrong
        if arch in SMALL:
            raise Problem(f"{arch} has no weights {weights!r}: use random, or a file of yours.")
        known = models.get_model_weights(arch)
        if weights not in known.__members__:
            hint = suggest(weights, ["random", *known.__members__])
            raise Problem(f"{arch} has no weights {weights!r}{hint}")
        try:
            state = known[weights].get_state_dict(progress=True, check_hash=True)
        except (OSError, RuntimeError) as error:
            raise Problem(f"The weights {weights} of {arch} could not be fetched ({error}): save "
                          "them to a file elsewhere and name it as weights, or use weights "
                          "random.") from error
        transforms = known[weights].transforms()
        mean, std = tuple(transforms.mean), tuple(transforms.std)
        if arch in ("googlenet", "inception_v3"):  # torchvision's transform_input, said directly
            mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
        input = replace(input, mean=mean, std=std)
    model = Classifier(arch, num_classes, input)
    if not model.load_plain(state, weights, any_head=True):
        say(f"{weights}: its head is for other classes, so {arch} starts with a random one")
    return model

def read_metadata(path: Path) -> dict[str, str]:
    """Metadata of a safetensors file, or a JSON file; raises Problem if it cannot be read."""
    try:
        if path.suffix == ".json":
            return json.loads(path.read_text())
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise Problem(f"{path} cannot be read ({error}): if it is damaged, delete it and make it "
                      "again.") from error

def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """State dict and metadata of a weights file (.safetensors, or .pth without pickled code)."""
    if path.suffix == ".safetensors":
        metadata = read_metadata(path)
        return load_file(path), metadata
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's, zipfile's and torch's own, without a common base
        raise Problem(f"{path} cannot be read ({str(error).splitlines()[0]}): it must exist and "
                      "hold a state_dict() alone.") from error
    return state.get("state_dict", state), {}

def stored_input(metadata: Mapping[str, str]) -> Input:
    """What a model of grokd's was fed."""
    stored = json.loads(metadata["input"])
    return Input(stored["input_size"], tuple(stored["mean"]), tuple(stored["std"]))

def load_model(path: Path, device: torch.device | str = "cpu",
               store: Store | None = None) -> Classifier:
    """A model of grokd's from its path alone, in eval mode, frozen; for the classes of `store`."""
    state, metadata = read_weights(path)
    if "arch" not in metadata:
        raise Problem(f"{path} was not written by grokd: its metadata names no architecture.")
    input, num_classes = stored_input(metadata), len(json.loads(metadata["class_names"]))
    if store and num_classes != store.num_classes:
        raise Problem(f"{path} has {num_classes} classes, the data have {store.num_classes}.")
    model = Classifier(metadata["arch"], num_classes, input)
    model.to(next(v.dtype for v in state.values() if v.is_floating_point()))
    model.load_plain(state, str(path))
    return model.to(device).eval().requires_grad_(False)

def fold(model: Classifier) -> Classifier:
    """The same frozen function, faster: batch norm folded into convolutions, channels last."""
    from torch.fx.experimental.optimization import fuse

    if model.folded_from:
        return model
    model.folded_from = trunk_key(model)
    with contextlib.suppress(torch.fx.proxy.TraceError):  # a trunk with control flow stays as it is
        model.trunk = fuse(model.trunk)
    return model.to(memory_format=torch.channels_last)

def trunk_key(model: Classifier) -> str:
    """Identifies a trunk by content: models that differ only in the head share it."""
    if model.folded_from:
        return model.folded_from
    state = model.trunk.state_dict()
    told = [model.arch, dataclasses.asdict(model.input)]
    return digest(told, *(v.cpu().numpy().tobytes() for v in state.values()))

LAYERS = ("layer1", "layer2", "layer3", "layer4")

def layer_paths(model: Classifier, side: int) -> dict[str, str]:
    """Paths of the modules that put out layer1, layer2 ... and pooled, for images of side `side`.

    Stages of that name if the network has them; of a vision transformer the blocks at 1/4, 1/2, 3/4
    and all of its depth; else the last outputs of blocks at stride 4, 8, 16, 32, found by a pass.
    """
    trunk, paths = model.trunk, dict[str, str]()
    blocks = getattr(getattr(trunk, "encoder", None), "layers", None)
    if isinstance(blocks, nn.Module):
        names = [f"trunk.encoder.layers.{name}" for name, _ in blocks.named_children()]
        paths = {n: names[math.ceil(len(names) * k / 4) - 1] for k, n in enumerate(LAYERS, 1)}
    elif hasattr(trunk, "layer1"):
        paths = {n: f"trunk.{n}" for n, _ in trunk.named_children() if re.fullmatch(r"layer\d", n)}
    else:
        def note(path: str, module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4:
                name = f"layer{round(math.log2(side / as_map(output).shape[-1])) - 1}"
                # The shallowest: a block's output, not the expansion inside the next block.
                if name in LAYERS and path.count(".") <= paths.get(name, path).count("."):
                    paths[name] = path

        hooks = [module.register_forward_hook(functools.partial(note, path))
                 for path, module in model.named_modules() if path.startswith("trunk.")]
        look(model, side)
        for hook in hooks:
            hook.remove()
    return dict(sorted(paths.items())) | {"pooled": "trunk"}

def look(model: Classifier, side: int) -> None:
    """Let one black image go by, for the hooks."""
    mode = model.training
    with torch.no_grad():
        model.eval().features(torch.zeros(1, 3, side, side, device=model.mean.device))
    model.train(mode)

def as_map(output: Any) -> Tensor:
    """A layer's output as [B, d, h, w]: transformers' tokens as a grid, vectors as 1 x 1."""
    output = output if isinstance(output, Tensor) else output.logits  # GoogLeNet, Inception
    if output.ndim == 3:  # [B, tokens, d], the class token first
        side = math.isqrt(output.shape[1])
        output = output[:, -side * side :].mT.unflatten(-1, (side, side))
    elif output.ndim == 4 and output.shape[2] != output.shape[3]:  # channels last, as Swin's
        output = output.permute(0, 3, 1, 2)
    return output if output.ndim == 4 else output[:, :, None, None]

class Tap:
    """Outputs of layers, kept as a forward pass goes by: name -> [B, d, h, w], pooled [B, d, 1, 1].

    Names are those of `layer_paths` or paths of modules in the trunk. Raises Problem for others.
    """

    def __init__(self, model: Classifier, names: Sequence[str], side: int,
                 required: bool = True) -> None:
        self.maps: dict[str, Tensor] = {}
        known, modules = layer_paths(model, side), dict(model.named_modules())
        for name in names:
            path = known.get(name, f"trunk.{name}")
            if path not in modules:
                if not required:
                    say(f"The biased model ({model.arch}) has no layer {name}: there teachers "
                        "count alike.")
                    continue
                raise Problem(f"{model.arch} has no layer {name!r}: it has {', '.join(known)}, and "
                              "every module's path is one too.")
            modules[path].register_forward_hook(functools.partial(self._keep, name))
        look(model, side)
        self.widths = {name: output.shape[1] for name, output in self.maps.items()}

    def _keep(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        self.maps[name] = as_map(output)

def encode(
    trunks: Mapping[str, Classifier], store: Store, indices: np.ndarray, runtime: Runtime,
    view: int | None = None, seed: int = 0, own: Sequence[int] | None = None,
) -> Iterator[tuple[int, slice, dict[str, Tensor]]]:
    """The one prediction loop: features [b, d] of every trunk, by blocks of consecutive images.

    Blocks are the same for any number of processes; each yields its share, or those it names.
    """
    if own is None:
        own = range(math.ceil(len(indices) / BLOCK))[runtime.rank :: runtime.world]
    for block in progress(own, "predict") if len(own) > 20 else own:
        part = slice(block * BLOCK, min((block + 1) * BLOCK, len(indices)))
        images = store.view(indices[part], runtime.device, view, seed)
        with torch.no_grad():
            yield block, part, {key: model.features(images) for key, model in trunks.items()}

def predict(models: Sequence[Classifier], store: Store, indices: np.ndarray,
            runtime: Runtime) -> Tensor:
    """Logits [M, N, C] of models in evaluation, on the CPU. A trunk that is shared runs once."""
    keys = [trunk_key(model) if len(models) > 1 else "" for model in models]
    logits = torch.zeros(len(models), len(indices), models[0].num_classes, dtype=runtime.dtype)
    modes = [(model, model.training) for model in models]
    for model in models:
        model.eval()
    with runtime.autocast():
        trunks = dict(zip(keys, models, strict=True))
        for _, part, features in encode(trunks, store, indices, runtime):
            for m, model in enumerate(models):
                logits[m, part] = model.classify(features[keys[m]]).to(logits)
    for model, mode in modes:
        model.train(mode)
    return runtime.sum(logits.to(runtime.device)).cpu()

def target_bytes(rows: int, row_bytes: int) -> int:
    """Size of the cached targets of one model and view, checksums included."""
    return 4 * math.ceil(rows / BLOCK) + row_bytes * rows

class Targets:
    """Logits of frozen models for every training image of a view, kept on disk.

    A file per model and view: CRC-32 of each block, then float32 (or float64) [N, C]. Its name is
    a function of trunk, head, images, cropping, view seed and precision, its content besides of
    the block alone, so it does not matter which student asked first, or whether one was killed. A
    block that is missing or damaged is computed, from features in full precision. With `pooled`
    also the features, float16 [N, d], a file per trunk and view.
    """

    def __init__(self, models: Sequence[Classifier], num_teachers: int, store: Store,
                 settings: Mapping[str, Any], runtime: Runtime, seed: int,
                 pooled: bool = False) -> None:
        self.num_teachers, self.store, self.runtime, self.seed = num_teachers, store, runtime, seed
        self.indices = store.split("train")
        self.trunk_keys = [trunk_key(model) for model in models]
        self.models = [fold(model) for model in models]
        self.folder = Path(store.data.store) / "targets"
        dtype = np.float64 if runtime.dtype == torch.float64 else np.float32
        told = {**settings, "seed": seed, "precision": runtime.precision}
        self.files: list[tuple[int, str, np.dtype]] = []  # model, name, row; logits of all first
        for m, (model, trunk) in enumerate(zip(models, self.trunk_keys, strict=True)):
            head = [v.cpu().numpy().tobytes() for v in model.head.state_dict().values()]
            row = np.dtype((dtype, model.num_classes))
            self.files.append((m, digest(trunk, told, *head), row))
        for trunk in dict.fromkeys(self.trunk_keys if pooled else []):
            m = self.trunk_keys.index(trunk)
            row = np.dtype((np.float16, models[m].head.in_features))
            self.files.append((m, digest(trunk, told, "pooled"), row))
        self.current: list[np.ndarray] = []  # [N, C] of each model, then [N, d] of each trunk

    def _open(self, name: str, row: np.dtype, view: int) -> tuple[np.ndarray, np.ndarray]:
        """Checksums [blocks] and rows [N, ...] of a file, made if need be."""
        path, rows = self.folder / f"{name}-{view}", len(self.indices)
        num_blocks = math.ceil(rows / BLOCK)
        try:
            with open(path, "ab") as file:  # a full disk is found here: a map could only crash
                os.posix_fallocate(file.fileno(), 0, target_bytes(rows, row.itemsize))
        except OSError as error:
            raise Problem(f"{path} could not be written ({error.strerror}): make room, or name "
                          "another disk as Data.store.") from error
        sums = np.memmap(path, np.uint32, "r+", shape=(num_blocks,))
        return sums, np.memmap(path, row.base, "r+", 4 * num_blocks, (rows, *row.shape))

    def prepare(self, view: int) -> None:
        """Make the logits of `view` current, computing what the cache does not hold."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = locked(self.folder / "lock", wait=True)
        with lock if self.runtime.rank == 0 else contextlib.nullcontext():
            self.runtime.wait()
            files = [self._open(name, row, view) for _, name, row in self.files]
            missing: dict[int, list[int]] = {}  # block -> files
            for i, (sums, rows) in enumerate(files):
                for block, known in enumerate(sums):
                    if zlib.crc32(rows[block * BLOCK :][:BLOCK].tobytes()) != known:
                        missing.setdefault(block, []).append(i)
            self.runtime.wait()  # all have looked before any writes
            needed = sorted({self.files[i][0] for absent in missing.values() for i in absent})
            trunks = {self.trunk_keys[m]: self.models[m] for m in needed}
            rank, count = self.runtime.on_node  # every node has a cache of its own
            with self.runtime.autocast():
                for block, part, features in encode(trunks, self.store, self.indices, self.runtime,
                                                    view, self.seed, sorted(missing)[rank::count]):
                    for i in missing[block]:
                        m, (sums, rows) = self.files[i][0], files[i]
                        values = features[self.trunk_keys[m]]
                        if i < len(self.models):
                            values = self.models[m].classify(values)
                        else:  # within what float16 can hold
                            values = values.float().clamp(-65504, 65504)
                        rows[part] = values.cpu().numpy()
                        sums[block] = zlib.crc32(rows[part].tobytes())
            self.runtime.wait()
            self.current = [rows for _, rows in files]
            if missing and self.runtime.rank == 0:
                self._shrink({f"{name}-{view}" for _, name, _ in self.files})

    def _shrink(self, keep: set[str]) -> None:
        """Delete the oldest files until the cache fits, but for those in use."""
        files = sorted((path for path in self.folder.iterdir() if path.name not in keep | {"lock"}),
                       key=lambda path: path.stat().st_mtime)
        excess = sum(path.stat().st_size for path in self.folder.iterdir())
        excess -= int(self.store.data.cache_gb * 1e9)
        for path in files:
            if excess <= 0:
                break
            excess -= path.stat().st_size
            path.unlink()

    def logits(self, positions: np.ndarray) -> Tensor:
        """Logits [M, b, C] of places in the training set, on the device."""
        chosen = np.stack([logits[positions] for logits in self.current[: len(self.models)]])
        return torch.from_numpy(chosen).to(self.runtime.device, non_blocking=True)

    def ask(self, images: Tensor) -> Tensor:
        """Logits [M, b, C] of images that no cache can hold."""
        with torch.no_grad():
            trunks = dict(zip(self.trunk_keys, self.models, strict=True))
            features = {key: model.features(images) for key, model in trunks.items()}
            return torch.stack([model.classify(features[key]) for model, key
                                in zip(self.models, self.trunk_keys, strict=True)])

    def pooled(self, positions: np.ndarray) -> list[Tensor]:
        """Features [b, d, 1, 1] of each model for places in the training set."""
        known = {self.trunk_keys[m]: rows for (m, _, _), rows
                 in zip(self.files, self.current, strict=True)}  # a trunk's features come last
        return [torch.from_numpy(known[key][positions].astype(np.float32))[:, :, None, None]
                .to(self.runtime.device, non_blocking=True) for key in self.trunk_keys]

# ---- Objectives: losses, AGRE weights ------------------------------------------------------------

# float32 logits may be finite and so large that their differences are not; nothing real is
# anywhere near, and beyond this bound every softmax is one-hot already.
LARGEST_LOGIT = 1e15

def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Per-sample cross-entropy [B] of logits [B, C] with labels [B], or shares of them [B, C]."""
    return F.cross_entropy(logits, labels, reduction="none")

def gce(logits: Tensor, labels: Tensor, q: float) -> Tensor:
    """Generalised cross-entropy (1 - p_y^q) / q per sample [B] (Zhang 2018; LfF, Nam 2020)."""
    return (1 - torch.exp(-q * cross_entropy(logits, labels))) / q

def kd_losses(student: Tensor, targets: Tensor, tau: float) -> Tensor:
    """tau^2 KL(p_t || p_s) per teacher and sample (Hinton 2015; AGRE-KD's l_t).

    student [B, C], targets [..., B, C] (logits) -> [..., B].
    """
    log_p = F.log_softmax(student.clamp(-LARGEST_LOGIT, LARGEST_LOGIT) / tau, -1)
    p = F.softmax(targets.clamp(-LARGEST_LOGIT, LARGEST_LOGIT) / tau, -1)
    return tau**2 * F.kl_div(log_p.expand_as(p), p, reduction="none").sum(-1)

def logit_gradients(student: Tensor, targets: Tensor, tau: float) -> Tensor:
    """p_s - p_t in float64: the gradient of `kd_losses` with respect to the logits, over tau."""
    bound = LARGEST_LOGIT
    p_s = F.softmax(student.detach().double().clamp(-bound, bound) / tau, -1)
    return p_s - F.softmax(targets.detach().double().clamp(-bound, bound) / tau, -1)

def agre_weights(
    student: Tensor, teachers: Tensor, biased: Tensor, tau: float, normalise: bool = True,
    gram: Tensor | None = None,
) -> Tensor:
    """AGRE-KD's weights W_t = 1 - cos(grad l_t, grad l_b), per teacher and sample.

    student [B, C], teachers [M, B, C], biased [B, C] (logits) -> float64 [M, B] in [0, 2], no
    gradient. Not normalised: W_t = max(0, 1 - <grad l_t, grad l_b>).

    Gradients are those with respect to the logits; since the last layer's are their outer product
    with [h; 1], its cosines are the same. `gram` K = J J^T [B, C, C], with J the Jacobian of the
    logits, gives those with respect to all parameters: <grad l_t, grad l_b> = d_t^T K d_b.

    Where p_s is within 1e-6 of p_t or p_b a gradient is nil and the cosine 0 by definition. Values
    under 1e-5 count as 0 (two teachers on the same side of two classes are exactly parallel).
    Source: Kenfack et al. 2025, equations for W_t; closed form and numerics are ours.
    """
    d_t = logit_gradients(student, teachers, tau)  # [M, B, C]
    d_b = logit_gradients(student, biased, tau)  # [B, C]
    if gram is None:
        k_t, k_b = d_t, d_b
    else:
        k_t = torch.einsum("mbc,bcd->mbd", d_t, gram.double())
        k_b = torch.einsum("bc,bcd->bd", d_b, gram.double())
    if not normalise:
        return (1 - tau**2 * (k_t * d_b).sum(-1)).clamp(min=0)
    square_t, square_b = (k_t * d_t).sum(-1), (k_b * d_b).sum(-1)
    nil = (d_t.norm(dim=-1) < 1e-6) | (d_b.norm(dim=-1) < 1e-6)
    nil |= (square_t <= 0) | (square_b <= 0)
    # 1 - cos = |u_t - u_b|^2 / 2 keeps its digits where the two nearly agree.
    scale_t = torch.where(nil, 1, square_t).rsqrt().unsqueeze(-1)
    scale_b = torch.where(square_b > 0, square_b, 1).rsqrt().unsqueeze(-1)
    u, k_u = d_t * scale_t - d_b * scale_b, k_t * scale_t - k_b * scale_b
    weights = (u * k_u).sum(-1) / 2
    return bounded(weights, nil)

def bounded(weights: Tensor, nil: Tensor) -> Tensor:
    """AGRE weights within [0, 2]: under 1e-5 they count as 0, and where a gradient is nil as 1."""
    return torch.where(nil, 1, torch.where(weights < 1e-5, 0, weights).clamp(max=2))

def ae_kd_weights(student: Tensor, teachers: Tensor, tau: float, total: int,
                  reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """AE-KD's weights [M]: min |sum_t alpha_t g_t|^2, sum alpha = 1, 0 <= alpha <= .6 (Du 2020).

    g_t is the batch's mean gradient of l_t with respect to the logits, over all processes (student
    [B, C], teachers [M, B, C], `total` and `reduce` as for batch_weights). As in the authors' code,
    by a one-class SVM on the Gram matrix, nu = 1 / (.6 M); scaling the matrix to unit trace and
    adding 1e-6 to its diagonal is ours: the solver else stops at its start once gradients shrink.
    """
    from sklearn.svm import OneClassSVM

    gradients = reduce(tau * logit_gradients(student, teachers, tau).sum(1)) / total  # [M, C]
    gram, count = (gradients @ gradients.T).cpu().numpy(), len(teachers)
    if count * 0.6 <= 1 or not np.trace(gram) > 0:
        return torch.full((count,), 1 / count, dtype=torch.float64, device=student.device)
    gram = gram / np.trace(gram) + 1e-6 * np.eye(count)
    svm = OneClassSVM(kernel="precomputed", nu=1 / (0.6 * count), tol=1e-12).fit(gram)
    alpha = np.zeros(count)
    alpha[svm.support_] = svm.dual_coef_[0]
    return torch.from_numpy(alpha / alpha.sum()).to(student.device)

def eb_kd_weights(teachers: Tensor) -> Tensor:
    """EB-KD's weights (1 - H_t / sum H) / (M - 1) [M, B], H the entropy (Kwon 2020), of [M, B, C].

    Without any entropy, and for a single teacher, all are alike."""
    log_p = F.log_softmax(teachers.double().clamp(-LARGEST_LOGIT, LARGEST_LOGIT), -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    total = entropy.sum(0)
    return torch.where((total > 0) & (len(teachers) > 1), 1 - entropy / total.clamp(min=1e-300), 1)

def ca_mkd_weights(teachers: Tensor, labels: Tensor) -> Tensor:
    """CA-MKD's weights (1 - softmax_t(CE_t)) / (M - 1) [M, B] (Zhang 2022), up to the constant.

    teachers [M, B, C], labels [B]. A single teacher has weight 1."""
    logits = teachers.double().clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
    losses = torch.stack([cross_entropy(each, labels) for each in logits])
    return 1 - losses.softmax(0) if len(teachers) > 1 else torch.ones_like(losses)

def teacher_shares(weights: Tensor, zero: str = "uniform", shrink: float = 0.0) -> Tensor:
    """Weights [M, B] as shares that sum to 1 over teachers; all 0 for a dropped sample."""
    weights = (1 - shrink) * weights + shrink
    total = weights.sum(0)
    fallback = 1 / len(weights) if zero == "uniform" else 0.0
    return torch.where(total > 0, weights / torch.where(total > 0, total, 1), fallback)

def weighted_kd(
    student: Tensor, teachers: Tensor, shares: Tensor, tau: float, combine: str = "losses"
) -> Tensor:
    """Distillation loss per sample [B]: sum_t share_t l_t, or l of the weighted mean of logits.

    student [B, C], teachers [M, B, C], shares [M, B]. A sample whose shares are 0 loses nothing.
    """
    shares = shares.to(student.dtype)
    if combine == "losses":
        return (shares * kd_losses(student, teachers, tau)).sum(0)
    mean = (shares.unsqueeze(-1) * teachers).sum(0)
    return kd_losses(student, mean, tau) * (shares.sum(0) > 0)

def logit_gram(model: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Per-sample logits [B, C] and K = J J^T [B, C, C] over all parameters, in eval mode.

    J [C, P] is the Jacobian of a sample's logits with respect to the parameters, batch norm on its
    running statistics: C backward passes per sample, whatever the number of teachers.
    """
    was_training = model.training
    model.eval()
    parameters = {k: v.detach() for k, v in model.own_parameters().items()}
    rest = {k: v.detach() for k, v in model.named_parameters() if k not in parameters}
    rest |= dict(model.named_buffers())

    def logits(parameters: dict[str, Tensor], image: Tensor) -> tuple[Tensor, Tensor]:
        output = torch.func.functional_call(model, (parameters, rest), (image[None],))[0]
        return output, output.detach()

    size = sum(v.numel() for v in parameters.values()) * model.num_classes
    chunk = max(1, 2**27 // size)  # Jacobians of at most half a gigabyte in float32
    jacobian = torch.func.vmap(torch.func.jacrev(logits, has_aux=True), in_dims=(None, 0))
    outputs, grams = [], []
    for part in images.split(chunk):
        with torch.autocast(images.device.type, enabled=False):
            blocks, output = jacobian(parameters, part)
        flat = [block.flatten(2).double() for block in blocks.values()]  # [b, C, P_i]
        grams.append(sum(j @ j.mT for j in flat))
        outputs.append(output)
    model.train(was_training)
    return torch.cat(outputs), torch.cat(grams)

def batch_weights(
    logits: Tensor, teachers: Tensor, biased: Tensor, parameters: Sequence[Tensor], tau: float,
    normalise: bool, total: int, reduce: Callable[[Tensor], Tensor],
) -> Tensor:
    """One weight per teacher and batch [M], from gradients over all parameters of the batch mean.

    What the course project did, floor .01 included: W = max(.01, 1 - cos). `logits` must carry
    the graph; `total` is the batch over all processes, whose gradients `reduce` adds up.
    """
    gradients = []
    for target in [*teachers, biased]:
        direction = (tau * logit_gradients(logits, target, tau) / total).to(logits.dtype)
        parts = torch.autograd.grad(logits, parameters, direction, retain_graph=True)
        gradients.append(reduce(torch.cat([part.flatten() for part in parts])).double())
    *g_t, g_b = gradients
    inner = torch.stack([g @ g_b for g in g_t])
    if normalise:
        norms = torch.stack([g.norm() * g_b.norm() for g in g_t])
        inner = torch.where(norms > 0, inner / norms.clamp(min=1e-300), 0)
    return (1 - inner).clamp(min=0.01)

class Batch(NamedTuple):
    """What an objective sees of one step: this process's part of a total batch."""

    model: Classifier
    images: Tensor  # [b, 3, crop, crop] in 0..1
    logits: Tensor  # [b, C], with gradient
    labels: Tensor  # [b], or of mixed images [b, C]
    positions: np.ndarray  # [b], places in the training set
    total: int  # samples of the total batch
    step: int
    runtime: Runtime

@dataclass(frozen=True)
class Objective:
    """Per-sample losses [b] with figures to log, and what to prepare before a view is trained on.

    A figure of one value per sample has shape [..., b]; it is averaged over the epoch.
    """

    losses: Callable[[Batch], tuple[Tensor, dict[str, Tensor]]]
    prepare: Callable[[int], None] = lambda view: None
    attach: Callable[[Classifier], None] = lambda model: None  # before the network is trained

def erm_objective() -> Objective:
    return Objective(lambda batch: (cross_entropy(batch.logits, batch.labels), {}))

def gce_objective(q: float) -> Objective:
    return Objective(lambda batch: (gce(batch.logits, batch.labels, q), {}))

# ---- Feature distillation ------------------------------------------------------------------------

class FeatureLoss:
    """sum_l gamma_l L_l [b]: a student's layers against its teachers' (METHODS 6).

    mse: mean((A f_s - f_T)^2), f_T the weighted mean of the teachers' features with a shared
    adapter, else the weighted mean of each one's distance. A is a 1 x 1 convolution without bias.
    Larger maps are averaged down to the smallest. pooled comes from the target cache, maps from
    `networks`, one of each trunk, that run beside the student.
    """

    def __init__(self, settings: Distill, targets: Targets, networks: Mapping[str, Classifier],
                 pretrained: bool, seed: int) -> None:
        self.settings, self.targets, self.networks, self.seed = settings, targets, networks, seed
        self.pretrained, self.side = pretrained, targets.store.data.crop
        self.layers: list[tuple[str, str, str, float]] = []  # name, student's, teachers', gamma
        for name, gamma in zip(settings.layers, settings.gamma, strict=True):
            own, _, other = name.partition("=")
            self.layers += [(name, own, other or own, gamma)] if gamma else []
        others = [other for _, _, other, _ in self.layers]
        self.online = [name for name in others if networks and
                       (name != "pooled" or settings.train.mix != "none")]
        needed = targets.trunk_keys[: targets.num_teachers]
        self.taps = {key: Tap(network, self.online, self.side, key in needed)
                     for key, network in networks.items()}

    def attach(self, model: Classifier) -> None:
        """Tap the student, and give it the adapters as parameters that are trained with it."""
        settings, count = self.settings, self.targets.num_teachers
        self.tap = Tap(model, [own for _, own, _, _ in self.layers], self.side)
        torch.manual_seed(seed_of(self.seed, 7))
        model.adapters = nn.ModuleList()
        self.shared: list[bool] = []
        for name, own, other, _ in self.layers:
            widths = [model.head.in_features for model in self.targets.models]
            if other in self.online:
                widths = [self.taps[k].widths.get(other, 0) for k in self.targets.trunk_keys]
            teachers, equal = widths[:count], len(set(widths[:count])) == 1
            shared = settings.adapters == "shared"
            shared = shared or (settings.adapters == "auto" and equal and self.pretrained)
            strict = shared or settings.feature_weights in ("agree", "disagree")
            if settings.feature_weights == "agre" and settings.feature_space == "adapted":
                strict, equal = True, len({width for width in widths if width}) == 1
            if strict and not equal:
                raise Problem(f"layer {name}: the networks have {', '.join(map(str, widths))} "
                              "channels, where adapters = shared, feature_space = adapted and "
                              "feature_weights agree and disagree need equally many.")
            pairs = [(self.tap.widths[own], width) for width in teachers[: 1 if shared else None]]
            if settings.feature_weights == "agre" and len(widths) > count and widths[-1]:
                pairs += [(pairs[0][0], widths[-1])] * (not (shared and len(set(widths)) == 1))
            if settings.feature_loss == "attention":
                pairs = []
                if "pooled" in (own, other):
                    raise Problem("Attention transfer compares maps: pooled is none.")
            elif settings.feature_loss == "contrastive":
                pairs = [(width, 128) for width in (self.tap.widths[own], *teachers)]
            convolutions = [nn.Conv2d(*pair, 1, bias=False) for pair in pairs]
            model.adapters.append(nn.ModuleList(convolutions))
            self.shared.append(shared)

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses [b], after the student's forward pass, with figures to log."""
        maps, figures, dtype = dict(self.tap.maps), dict[str, Tensor](), batch.logits.dtype
        with torch.no_grad():
            for network in self.networks.values():
                network.features(batch.images)
        pooled = []
        if any(other not in self.online for _, _, other, _ in self.layers):
            pooled = self.targets.pooled(batch.positions)
        total = torch.zeros_like(batch.logits[:, 0])
        with torch.autocast(batch.images.device.type, enabled=False):
            for i, (name, own, other, gamma) in enumerate(self.layers):
                found = pooled if other not in self.online else [
                    self.taps[key].maps.get(other) for key in self.targets.trunk_keys]
                known = [maps[own], *(f for f in found if f is not None)]
                side = min(f.shape[-1] for f in known)
                student, *features = (F.adaptive_avg_pool2d(f.to(dtype), side) for f in known)
                teachers = features[: self.targets.num_teachers]
                biased = features[len(teachers)] if len(features) > len(teachers) else None
                loss, own_loss = self._distance(batch, i, student, teachers, biased)
                figures[f"feature {name}"] = loss
                total = total + gamma * loss + own_loss
        return total, figures

    def _distance(self, batch: Batch, i: int, student: Tensor, teachers: list[Tensor],
                  biased: Tensor | None) -> tuple[Tensor, Tensor | float]:
        """Loss [b] of layer i, and that of an adapter which the biased model has of its own."""
        settings, adapters = self.settings, typing.cast(Any, batch.model.adapters)[i]
        if settings.feature_loss == "attention":
            q = attention(student)
            return torch.stack([(q - attention(f)).square().mean(1) for f in teachers]).mean(0), 0.0
        if settings.feature_loss == "contrastive":
            s, *t = (F.normalize(adapter(F.adaptive_avg_pool2d(f, 1)).flatten(1), dim=1)
                     for adapter, f in zip(adapters, [student, *teachers], strict=True))
            return torch.stack([info_nce(s, *gather_rows(each, batch)) for each in t]).mean(0), 0.0
        count = 1 if self.shared[i] else len(teachers)
        adapted = [adapter(student) for adapter in adapters[:count]]
        weights, own_loss = torch.ones(len(teachers), len(student)).to(student), 0.0
        if settings.feature_weights == "agre" and biased is not None:
            adapter_b = adapters[-1]
            adapted_b = adapter_b(student.detach())
            if len(adapters) > count:
                own_loss = (adapted_b - biased).square().mean((1, 2, 3))
            space = settings.feature_space
            kept = None if space == "adapted" or (space == "auto" and len(adapters) == 1) else [
                adapter.weight.detach() for adapter in (*adapters[:count], adapter_b)]
            weights = feature_agre([f.detach() for f in adapted], teachers, adapted_b.detach(),
                                   biased, kept)
            keys = self.targets.trunk_keys
            same = torch.tensor([key == keys[-1] for key in keys[: len(teachers)]])
            weights[same.to(weights.device)] = 0  # b's own features, whatever the adapters
        shares = teacher_shares(weights, settings.zero, settings.shrink)
        elements = torch.ones(()).to(student)
        if settings.feature_weights == "agree":
            elements = agreement(torch.stack(teachers))
        elif settings.feature_weights == "disagree":
            elements = disagreement(torch.stack(teachers))
            mean = batch.runtime.sum(elements.sum()) / batch.total
            elements = elements / mean.clamp(min=1e-30)
        if settings.feature_dropout:
            draws = hash_uniform(self.seed, 8, batch.step, i, np.arange(adapted[0].shape[1]))
            kept_channels = torch.from_numpy(draws >= settings.feature_dropout).to(student)
            elements = elements * kept_channels[:, None, None] / (1 - settings.feature_dropout)
        if self.shared[i]:
            target = (shares[:, :, None, None, None] * torch.stack(teachers)).sum(0)
            teachers, shares = [target.to(student)], shares.sum(0, keepdim=True) > 0
        distances = torch.stack([(elements * (a - f).square()).mean((1, 2, 3))
                                 for a, f in zip(adapted, teachers, strict=True)])
        return (shares * distances).sum(0), own_loss

def feature_agre(adapted: Sequence[Tensor], teachers: Sequence[Tensor], adapted_b: Tensor,
                 biased: Tensor, adapters: Sequence[Tensor] | None = None) -> Tensor:
    """AGRE weights [M, b] of a layer: 1 - cos of the pulls A_t f_s - f_t and A_b f_s - f_b (ours).

    adapted: A_t f_s for each teacher, or one for all; every map [b, d, h, w]. With `adapters`
    [d_t, d_s, 1, 1] (those, then b's), of gradients with respect to f_s: A^T (A f_s - f). 1 where a
    pull is nil (under 1e-6 of the norm of f).
    """
    adapted = [*adapted] * (len(teachers) // len(adapted))
    pulls = [a - f for a, f in zip([*adapted, adapted_b], [*teachers, biased], strict=True)]
    *nil, nil_b = (pull.flatten(1).norm(dim=1) < 1e-6 * f.flatten(1).norm(dim=1)
                   for pull, f in zip(pulls, [*teachers, biased], strict=True))
    if adapters is not None:
        matrices = [*adapters[:-1]] * (len(teachers) // (len(adapters) - 1)) + [adapters[-1]]
        pulls = [F.conv_transpose2d(pull, a) for pull, a in zip(pulls, matrices, strict=True)]
    *u, u_b = (F.normalize(pull.flatten(1), dim=1, eps=1e-30) for pull in pulls)
    weights = torch.stack([(each - u_b).square().sum(1) / 2 for each in u])
    return bounded(weights, torch.stack(nil) | nil_b)

def disagreement(features: Tensor) -> Tensor:
    """Variance over teachers of [M, b, d, h, w], meaned over dimensions: a weight per sample
    [b, 1, 1, 1], to be divided by its mean over the batch (the course project's text)."""
    return features.var(0).mean((1, 2, 3), keepdim=True)

def agreement(features: Tensor) -> Tensor:
    """1 / (variance over teachers + 1e-6) of [M, b, d, h, w]: weights [b, d, h, w], of mean 1 in
    each sample (the course project's code)."""
    weights = 1 / (features.var(0) + 1e-6)
    return weights / weights.mean((1, 2, 3), keepdim=True)

def attention(features: Tensor) -> Tensor:
    """Attention map vec(mean_c F^2) / |.|_2, [b, h w] of [b, d, h, w] (Zagoruyko 2017)."""
    return F.normalize(features.square().mean(1).flatten(1), dim=1)

def info_nce(student: Tensor, teacher: Tensor, first: int = 0) -> Tensor:
    """-log exp(s_i t_i / .07) / sum_j exp(s_i t_j / .07), [b], of unit vectors [b, k] and [B, k].

    `first` is the place of the student's first sample in the teacher's whole batch."""
    places = torch.arange(len(student), device=student.device) + first
    return cross_entropy(student @ teacher.T / 0.07, places.clamp(max=len(teacher) - 1))

def gather_rows(rows: Tensor, batch: Batch) -> tuple[Tensor, int]:
    """Rows [b, k] of all processes that share the batch, with gradient; where one's own begin."""
    world, rank = batch.runtime.world, batch.runtime.rank
    if world == 1:
        return rows, 0
    from torch.distributed.nn import functional as collective

    counts = [len(range(r, batch.total, world)) for r in range(world)]  # batch[rank::world]
    parts = collective.all_gather(F.pad(rows, (0, 0, 0, counts[0] - len(rows))))
    return torch.cat([p[:n] for p, n in zip(parts, counts, strict=True)]), sum(counts[:rank])

def distill_objective(settings: Distill, targets: Targets, seed: int,
                      features: FeatureLoss | None = None) -> Objective:
    """(1 - alpha) CE + alpha wKD + features, with the student's weighting of the teachers."""

    def losses(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        logits, tau = batch.logits, settings.tau
        extra, figures = features(batch) if features else (0.0, {})  # before other passes
        mixed = settings.train.mix != "none"
        current = targets.ask(batch.images) if mixed else targets.logits(batch.positions)
        teachers, biased = current[: targets.num_teachers], current[-1]  # [M, b, C], [b, C]
        weights = torch.ones(teachers.shape[:2], dtype=torch.float64, device=logits.device)
        if settings.weighting == "random":
            chosen = int(hash_bits(seed, 1, batch.step)[0] % np.uint64(len(teachers)))
            weights = torch.zeros_like(weights)
            weights[chosen] = 1
        elif settings.weighting == "ae-kd":
            row = ae_kd_weights(logits, teachers, tau, batch.total, batch.runtime.sum)
            weights = row[:, None].expand_as(weights)
        elif settings.weighting == "eb-kd":
            weights = eb_kd_weights(teachers)
        elif settings.weighting == "ca-mkd":
            weights = ca_mkd_weights(teachers, batch.labels)
        elif settings.weighting == "agre" and settings.space == "batch":
            parameters = [*batch.model.own_parameters().values()]
            row = batch_weights(logits, teachers, biased, parameters, tau, settings.normalise,
                                batch.total, batch.runtime.sum)
            weights = row[:, None].expand_as(weights)
        elif settings.weighting == "agre":
            reference, gram = logits, None
            if settings.space == "parameters":
                reference, gram = logit_gram(batch.model, batch.images)
            weights = agre_weights(reference, teachers, biased, tau, settings.normalise, gram)
        shrink = settings.shrink if settings.weighting == "agre" else 0.0
        shares = teacher_shares(weights, settings.zero, shrink)
        distilled = weighted_kd(logits, teachers, shares, tau, settings.combine)
        labelled = cross_entropy(logits, batch.labels)
        figures |= {"cross_entropy": labelled, "distillation": distilled}
        if settings.weighting not in ("average", "random"):
            figures |= {"weight": weights, "zero_weight_share": (weights.sum(0) == 0).double()}
        if settings.alpha == 1:  # labels that are not used must not meet extreme logits
            return distilled + extra, figures
        return (1 - settings.alpha) * labelled + settings.alpha * distilled + extra, figures

    prepare = targets.prepare if settings.train.mix == "none" else lambda view: None
    return Objective(losses, prepare, features.attach if features else lambda model: None)

# ---- Generator and guided generation (ConfiG) ----------------------------------------------------

def noise_like(shape: Sequence[int], dtype: torch.dtype, *keys: int) -> Tensor:
    """Normal noise, a function of the keys alone."""
    source = torch.Generator().manual_seed(seed_of(*keys))
    return torch.randn(tuple(shape), generator=source, dtype=dtype)

class Generator:
    """A differentiable map from latents and classes to images, on a diffusers pipeline.

    Pixel-space UNet2DModel, with classes or without, or Stable Diffusion with a prompt for each
    class. Everything about a sample is a function of its key. Raises Problem for other pipelines.
    """

    LEVELS = (0.1, 0.3, 0.5)  # noise levels of the realism test, as shares of all timesteps

    def __init__(self, source: str, settings: Augment, class_names: Sequence[str], size: int,
                 runtime: Runtime) -> None:
        import diffusers

        diffusers.utils.logging.set_verbosity_error()
        diffusers.utils.logging.disable_progress_bar()
        self.settings, self.size, self.device = settings, size, runtime.device
        self.dtype, self.evaluations = runtime.dtype, 0
        half = {"bfloat16": torch.bfloat16, "float16": torch.float16}

        def ready(network: nn.Module) -> Any:  # frozen, in the generator's own precision
            dtype = half.get(runtime.precision, runtime.dtype)
            return network.to(runtime.device, dtype).eval().requires_grad_(False)

        try:
            name = diffusers.DiffusionPipeline.load_config(source)["_class_name"]
            if name not in ("DDPMPipeline", "DDIMPipeline", "StableDiffusionPipeline"):
                raise Problem(f"Generator {source} is a {name}: it must be Stable Diffusion 1.x, "
                              "2.x or SD-Turbo, or a DDPMPipeline of a UNet2DModel.")
            latent, extra = name == "StableDiffusionPipeline", {}
            if latent:
                if not importlib.util.find_spec("transformers"):
                    raise Problem(f"Generator {source} needs the package transformers: install "
                                  "grokd with its extra sd (uv sync --extra sd).")
                extra = {"safety_checker": None, "requires_safety_checker": False}
            pipe = getattr(diffusers, name).from_pretrained(source, **extra)
        except (OSError, ValueError) as error:
            told = str(error).strip().splitlines()[0]
            raise Problem(f"Generator {source} could not be loaded ({told}): give a folder with a "
                          "diffusers pipeline, or a hub id with a network.") from error
        kind = pipe.scheduler
        if settings.scheduler and settings.scheduler != type(kind).__name__:
            if not hasattr(diffusers, settings.scheduler):
                raise Problem(f"diffusers has no scheduler {settings.scheduler!r}.")
            kind = getattr(diffusers, settings.scheduler).from_config(kind.config)
        self.scheduler, self.noising = kind, diffusers.DDPMScheduler.from_config(kind.config)
        self.unet = ready(pipe.unet)
        side, self.scale, self.text = int(self.unet.config.sample_size), 1.0, None
        self.vae = ready(pipe.vae) if latent else None
        if latent:
            self.scale = pipe.vae.config.scaling_factor
            side *= 2 ** (len(pipe.vae.config.block_out_channels) - 1)
            prompts = [*(settings.prompt.format(name) for name in class_names), ""]
            tokens = pipe.tokenizer(prompts, padding="max_length", truncation=True,
                                    max_length=pipe.tokenizer.model_max_length,
                                    return_tensors="pt")
            self.text = ready(pipe.text_encoder)(tokens.input_ids.to(self.device))[0]
        self.side = side
        total = math.ceil(settings.steps / settings.strength)
        if total > len(self.noising.timesteps):
            raise Problem(f"{settings.steps} steps at strength {settings.strength} are more than "
                          f"the generator's {len(self.noising.timesteps)} timesteps.")
        self.scheduler.set_timesteps(total, device=self.device)
        self.total, self.first = total, total - settings.steps

    def predict(self, x: Tensor, t: Any, labels: Tensor) -> Tensor:
        """The network's prediction at timestep t (or one per sample), for classes [b]."""
        x, more = x.to(self.unet.dtype), {}
        if self.text is not None:
            more["encoder_hidden_states"] = self.text[labels]
        elif self.unet.config.num_class_embeds:
            more["class_labels"] = labels
        out = self.unet(x, t, **more).sample
        if self.text is not None and self.settings.guidance_scale != 1:
            more["encoder_hidden_states"] = self.text[torch.full_like(labels, -1)]
            plain = self.unet(x, t, **more).sample
            out = plain + self.settings.guidance_scale * (out - plain)
        return out.to(self.dtype)

    def encode(self, raw: np.ndarray) -> Tensor:
        """Stored images, uint8 [b, 3, S, S], as the generator's clean latents."""
        x = torch.from_numpy(raw).to(self.device, self.dtype) / 127.5 - 1
        if x.shape[-1] != self.side:
            x = F.interpolate(x, (self.side, self.side), mode="bilinear", antialias=True)
        if self.vae is None:
            return x
        with torch.no_grad():
            return self.scale * self.vae.encode(x.to(self.vae.dtype)).latent_dist.mode().to(x.dtype)

    def begin(self, raw: np.ndarray, *key: int) -> Tensor:
        """The latent to start from, [1, ...], of one stored image [1, 3, S, S]."""
        clean = self.encode(raw)
        noise = noise_like(clean.shape, self.dtype, *key).to(self.device)
        if self.settings.strength == 1:
            return noise * self.scheduler.init_noise_sigma
        return self.scheduler.add_noise(clean, noise, self.scheduler.timesteps[self.first][None])

    def images(self, z: Tensor, labels: Tensor, keys: Sequence[int]) -> Tensor:
        """Images [b, 3, S, S] in 0..1 of latents [b, ...] and classes [b]; each step is
        checkpointed, so memory does not grow with their number."""
        from torch.utils.checkpoint import checkpoint

        self.scheduler.set_timesteps(self.total, device=self.device)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(self.first)
        more = {}
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            more["generator"] = [torch.Generator(self.device).manual_seed(key) for key in keys]
        for t in self.scheduler.timesteps[self.first :]:
            scaled = self.scheduler.scale_model_input(z, t)
            noise = checkpoint(self.predict, scaled, t, labels, use_reentrant=False)
            z = self.scheduler.step(noise, t, z, **more).prev_sample
        self.evaluations += len(labels) * self.settings.steps
        if self.vae is not None:
            z = self.vae.decode((z / self.scale).to(self.vae.dtype)).sample.to(self.dtype)
        images = (z / 2 + 0.5).clamp(0, 1)
        if self.side != self.size:
            images = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        return images

    def realism(self, raw: np.ndarray, labels: Tensor) -> Tensor:
        """Mean denoising loss [b] of stored images over a few noise levels: lower is more real."""
        clean, losses = self.encode(raw), []
        for level in self.LEVELS:
            t = torch.tensor([int(level * len(self.noising.timesteps))], device=self.device)
            noise = noise_like(clean.shape[1:], self.dtype, 9, int(t)).to(self.device)
            noise = noise.expand_as(clean)
            target = noise
            if self.noising.config.prediction_type == "v_prediction":
                target = self.noising.get_velocity(clean, noise, t)
            elif self.noising.config.prediction_type == "sample":
                target = clean
            with torch.no_grad():
                noisy = self.noising.add_noise(clean, noise, t)
                out = self.predict(noisy, t.expand(len(clean)), labels)
            losses.append((out - target).square().flatten(1).mean(1))
        self.evaluations += len(labels) * len(self.LEVELS)
        return torch.stack(losses).mean(0)

def guidance(teachers: Tensor, student: Tensor, labels: Tensor, objective: str,
             gamma: float = 1.0) -> tuple[Tensor, Tensor]:
    """The two terms of J, [b] each: teachers' (logits [M, b, C]) and student's ([b, C]).

    power: t^gamma and (1 - f)^gamma (second-hand: gamma 2); log: log t, log(1 - f); margin: the
    class's logit above the best other one, averaged over teachers, and its negative for the
    student. t is the mean of the teachers' softmax at tau 1.
    """
    place = labels[:, None]
    log_t = torch.logsumexp(teachers.log_softmax(-1), 0) - math.log(len(teachers))  # [b, C]
    log_f, others = student.log_softmax(-1), ~F.one_hot(labels, student.shape[-1]).bool()
    if objective == "margin":
        margins = [z.gather(1, place)[:, 0] - z.masked_fill(~others, -math.inf).amax(1)
                   for z in (*teachers, student)]
        return torch.stack(margins[:-1]).mean(0), -margins[-1]
    t = log_t.gather(1, place)[:, 0]
    not_f = log_f.masked_fill(~others, -math.inf).logsumexp(1)
    return (t, not_f) if objective == "log" else ((gamma * t).exp(), (gamma * not_f).exp())

class Judge:
    """Teachers, student and realism threshold: what guides the generator, and what it must pass."""

    def __init__(self, teachers: Sequence[Classifier], student: Classifier, store: Store,
                 settings: Augment) -> None:
        self.teachers, self.student, self.settings = teachers, student, settings
        self.threshold, self.crop = math.inf, store.data.crop

    def logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Teachers' [M, b, C] and student's [b, C] logits of images [b, 3, S, S] in 0..1."""
        start = (images.shape[-1] - self.crop) // 2
        images = images[:, :, start : start + self.crop, start : start + self.crop]
        return torch.stack([model(images) for model in self.teachers]), self.student(images)

    def scores(self, raw: np.ndarray, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of stored images, [b] each: t_y, f_y, J, and whether the teachers' argmax is right."""
        with torch.no_grad():
            images = torch.from_numpy(raw).to(self.student.head.weight) / 255
            teachers, student = self.logits(images)
        terms = guidance(teachers, student, labels, self.settings.objective, self.settings.gamma)
        t, f, place = teachers.softmax(-1).mean(0), student.softmax(-1), labels[:, None]
        right = t.argmax(1) == labels
        return t.gather(1, place)[:, 0], f.gather(1, place)[:, 0], terms[0] + terms[1], right

    def gradient(self, images: Tensor, labels: Tensor, keys: Sequence[int],
                 iterations: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """dJ/dimages, and each sample's terms and their gradients' norms; cutouts and noise are
        functions of key and iteration."""
        from torchvision.transforms.v2.functional import resized_crop

        settings, size = self.settings, images.shape[-1]
        shown = images.detach().to(self.student.head.weight.dtype).requires_grad_()
        views = [shown]
        for cut in range(settings.cutouts):
            draws = [hash_uniform(key, i, cut, np.arange(3)) for key, i
                     in zip(keys, iterations, strict=True)]
            sides = [round(size * (0.6 + 0.4 * u)) for u, _, _ in draws]
            corners = [(int(v * (size - s + 1)), int(w * (size - s + 1))) for s, (_, v, w)
                       in zip(sides, draws, strict=True)]
            views.append(torch.cat([
                resized_crop(shown[n : n + 1], y, x, s, s, [size, size], antialias=True)
                for n, (s, (x, y)) in enumerate(zip(sides, corners, strict=True))]))
        terms = []
        for number, view in enumerate(views):
            if settings.noise:
                noise = [noise_like(view.shape[1:], view.dtype, key, i, number, 5)
                         for key, i in zip(keys, iterations, strict=True)]
                view = view + settings.noise * torch.stack(noise).to(view.device)
            found = self.logits(view)
            terms.append(torch.stack(guidance(*found, labels, settings.objective, settings.gamma)))
        mean = torch.stack(terms).mean(0)  # [2, b]
        of_t = torch.autograd.grad(mean[0].sum(), shown, retain_graph=True)[0]
        of_f = torch.autograd.grad(mean[1].sum(), shown)[0]
        figures = {"teacher_term": mean[0].detach(), "student_term": mean[1].detach(),
                   "teacher_gradient": of_t.flatten(1).norm(dim=1),
                   "student_gradient": of_f.flatten(1).norm(dim=1)}
        return of_t + of_f, figures

@dataclass
class Sample:
    """One image on its way."""

    source: int  # place in the store
    key: int
    label: int
    z: Tensor  # [...]
    norm: float  # of the first latent
    state: list[Tensor]  # the optimiser's moments
    iteration: int = 0
    judged: int = 0  # realism tests so far
    before: tuple[float, float] = (0.0, 0.0)  # confidences of teachers and student at first
    best: dict[str, Any] = field(default_factory=dict)

def climb(sample: Sample, gradient: Tensor, settings: Augment) -> None:
    """One step of a sample's latent up its gradient."""
    z, size = sample.z, settings.step_size
    if settings.norm == "regularise":  # ReNO: .01 (|z|^2 / 2 - (d - 1) log |z|), to be minimised
        gradient = gradient - 0.01 * (z - (z.numel() - 1) * z / z.square().sum())
    first, second = sample.state
    if settings.optimizer == "adam":
        first.mul_(0.9).add_(0.1 * gradient)
        second.mul_(0.999).add_(0.001 * gradient.square())
        t = sample.iteration + 1
        step = size * (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
    elif settings.optimizer == "nesterov":  # momentum .9, gradient norm at most .1
        gradient = gradient * (0.1 / gradient.norm().clamp(min=0.1))
        first.mul_(0.9).add_(gradient)
        step = size * (gradient + 0.9 * first)
    else:
        step = size * z.norm() * gradient / gradient.norm().clamp(min=1e-12)
    z = z + step
    sample.z = z * (sample.norm / z.norm()) if settings.norm == "keep" else z

def generate(generator: Generator, judge: Judge, store: Store, sources: Sequence[int], seed: int,
             log: Callable[[dict[str, Any]], None] = lambda figures: None
             ) -> Iterator[dict[str, Any]]:
    """A record for every source, as soon as it passes or its budget is spent; its `image` is uint8
    [3, S, S]. Samples in flight go on together, and a new one takes the place of each that leaves.

    A sample passes with its first iterate whose 8-bit image has argmax t = y, t_y >= min_teacher,
    f_y <= max_student and a denoising loss within the threshold. Not guided: the first iterate.
    """
    settings, queue, flight = judge.settings, list(sources)[::-1], list[Sample]()
    while queue or flight:
        while queue and len(flight) < settings.in_flight:
            source = queue.pop()
            key = seed_of(seed, source)
            z = generator.begin(store.raw(np.array([source])), key)[0]
            flight.append(Sample(source, key, int(store.labels[source]), z, float(z.norm()),
                                 [torch.zeros_like(z), torch.zeros_like(z)]))
        keys, rounds = [s.key for s in flight], [s.iteration for s in flight]
        labels = torch.tensor([s.label for s in flight], device=generator.device)
        z = torch.stack([s.z for s in flight])
        with torch.set_grad_enabled(settings.guided and settings.iterations > 0):
            z.requires_grad_(torch.is_grad_enabled())
            images = generator.images(z, labels, keys)
        raw = (images.detach() * 255).round().to(torch.uint8).cpu().numpy()
        t, f, score, passes = judge.scores(raw, labels)
        passes &= (t >= settings.min_teacher) & (f <= settings.max_student)
        passes |= not settings.guided
        loss = torch.full_like(t, math.nan)
        if settings.realism < 1 and passes.any():
            loss[passes] = generator.realism(raw[passes.cpu().numpy()], labels[passes]).to(loss)
            if settings.guided:
                passes &= ~(loss > judge.threshold)
        rows = torch.stack([v.double() for v in (passes, t, f, score, loss)], 1).tolist()
        for n, (sample, (passed, t_y, f_y, j, real)) in enumerate(zip(flight, rows, strict=True)):
            sample.before = (t_y, f_y) if not sample.iteration else sample.before
            sample.judged += not math.isnan(real)
            if passed or sample.iteration == 0 or j > sample.best["score"]:
                sample.best = {
                    "score": j, "accepted": bool(passed), "source": sample.source,
                    "label": sample.label, "seed": seed, "iterations": sample.iteration,
                    "teacher_before": sample.before[0], "student_before": sample.before[1],
                    "teacher": t_y, "student": f_y, "realism": real, "image": raw[n].copy()}
        done = [bool(s.best["accepted"]) or s.iteration >= settings.iterations for s in flight]
        figures: dict[str, Any] = {}
        if not all(done):
            upward, figures = judge.gradient(images, labels, keys, rounds)
            gradient = torch.autograd.grad(images, z, upward.to(images))[0]
            for sample, own, over in zip(flight, gradient, done, strict=True):
                if not over:
                    climb(sample, own, settings)
                    sample.iteration += 1
        log({k: float(v.mean()) for k, v in figures.items()})
        for sample, over in zip(flight, done, strict=True):
            if over:
                yield sample.best | {"steps": sample.iteration, "judged": sample.judged}
        flight = [s for s, over in zip(flight, done, strict=True) if not over]

def pick_sources(settings: Augment, probabilities: Tensor, labels: np.ndarray) -> np.ndarray:
    """Places in the training set [K] to start from, by the student's softmax [N, C]."""
    p = probabilities.double().numpy()
    own = p[np.arange(len(labels)), labels]
    order = np.argsort(p.max(1) if settings.sources == "least-certain" else own, kind="stable")
    if settings.sources == "most-confident":
        order = order[::-1]
    elif settings.sources == "misclassified":
        order = order[p.argmax(1)[order] != labels[order]]
    count = settings.count or round(settings.share * len(labels))
    if settings.sources in ("all", "misclassified"):
        count = settings.count or len(order)
    if settings.balanced:
        each = [order[labels[order] == y] for y in np.unique(labels)]
        return np.concatenate([members[: count // len(each)] for members in each])
    return order[:count]

# ---- Head refitting (DFR) ------------------------------------------------------------------------

def balanced_subset(groups: np.ndarray, *keys: int) -> np.ndarray:
    """Random places in `groups`: of each group as many as the smallest has."""
    order = permutation(len(groups), *keys)
    members = [order[groups[order] == g] for g in np.unique(groups)]
    size = min(map(len, members))
    return np.sort(np.concatenate([m[:size] for m in members]))

def worst_group(correct: np.ndarray, groups: np.ndarray) -> float:
    """Smallest accuracy of a group, over the groups present."""
    return min(float(correct[groups == g].mean()) for g in np.unique(groups))

def dfr_l1(
    features: np.ndarray, labels: np.ndarray, groups: np.ndarray, settings: DFR, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """DFR on validation (Kirichenko 2023): mean of l1 logistic regressions on balanced subsets.

    features [N, d], labels [N], groups [N] -> weight [C, d], bias [C], to be applied to the raw
    features. The penalty is chosen by worst-group accuracy: fitted on one random half of every
    group, cut to the smallest, judged on the other half. Then one scaler for all samples, as in
    Izmailov's code. Two classes: liblinear, rows are half the logit each way; more: multinomial
    (saga). Halving within groups, so that both halves hold each, is ours.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    features = features.astype(np.float64)
    solver = "liblinear" if len(np.unique(labels)) == 2 else "saga"

    def fitted(x: np.ndarray, y: np.ndarray, penalty: float) -> LogisticRegression:
        model = LogisticRegression(
            solver=solver, l1_ratio=1, C=penalty, random_state=seed, max_iter=5000
        )
        return model.fit(x, y)

    order = permutation(len(groups), seed, 0)
    halves: list[list[np.ndarray]] = [[], []]
    for g in np.unique(groups):
        members = order[groups[order] == g]
        halves[0].append(members[: (len(members) + 1) // 2])
        halves[1].append(members[(len(members) + 1) // 2 :])
    first, second = (np.sort(np.concatenate(half)) for half in halves)
    penalty = settings.penalties[0]
    if len(settings.penalties) > 1:
        subset = first[balanced_subset(groups[first], seed, 1)]
        scaler = StandardScaler().fit(features[subset])
        scores = []
        for candidate in settings.penalties:
            model = fitted(scaler.transform(features[subset]), labels[subset], candidate)
            correct = model.predict(scaler.transform(features[second])) == labels[second]
            scores.append(worst_group(correct, groups[second]))
        penalty = settings.penalties[int(np.argmax(scores))]
    scaler = StandardScaler().fit(features)
    scaled = scaler.transform(features)
    weights, biases = [], []
    for refit in range(settings.num_refits):
        subset = balanced_subset(groups, seed, 2, refit)
        model = fitted(scaled[subset], labels[subset], penalty)
        weights.append(model.coef_)
        biases.append(model.intercept_)
    weight = np.mean(weights, 0) / scaler.scale_
    bias = np.mean(biases, 0) - weight @ scaler.mean_
    if len(weight) == 1:
        weight, bias = np.stack([-weight[0], weight[0]]) / 2, np.stack([-bias[0], bias[0]]) / 2
    return weight, bias

def dfr_sgd(
    features: np.ndarray, labels: np.ndarray, groups: np.ndarray, num_classes: int, settings: DFR,
    train: Train, seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Last-layer retraining (LaBonte 2023; AGRE-KD's teachers): fresh head, group-balanced batches.

    features [N, d], labels [N], groups [N] -> weight [C, d], bias [C]. SGD at the ERM learning
    rate held constant, with its momentum, weight decay and batch size; N samples an epoch, drawn
    with replacement and weight 1 / n_g.
    """
    x, y = torch.from_numpy(features.astype(np.float32)), torch.from_numpy(labels)
    torch.manual_seed(seed)
    head = nn.Linear(x.shape[1], num_classes)
    optimizer = torch.optim.SGD(
        head.parameters(), train.lr, train.momentum, weight_decay=train.weight_decay
    )
    sizes = np.bincount(groups)
    cumulative = np.cumsum(1 / sizes[groups])
    for epoch in range(settings.epochs):
        draws = hash_uniform(seed, 3, epoch, np.arange(len(y))) * cumulative[-1]
        order = np.minimum(np.searchsorted(cumulative, draws, "right"), len(y) - 1)
        for batch in torch.from_numpy(order).split(train.batch_size):
            optimizer.zero_grad()
            F.cross_entropy(head(x[batch]), y[batch]).backward()
            optimizer.step()
    return head.weight.detach().numpy(), head.bias.detach().numpy()

def refit_head(
    model: Classifier, store: Store, settings: DFR, train: Train, seed: int, runtime: Runtime
) -> None:
    """Replace the head by one fitted on the reweighting part, in evaluation view and float32."""
    indices = store.split("reweighting")
    model.eval()
    features = torch.zeros(len(indices), model.head.in_features, dtype=runtime.dtype)
    for _, part, found in encode({"": model}, store, indices, runtime):
        features[part] = found[""].to(features)
    embedded = runtime.sum(features.to(runtime.device)).cpu().numpy()
    labels, groups = store.labels[indices], store.cells[indices]
    method = settings.method
    if method == "auto":
        method = "l1" if store.num_classes == 2 else "sgd"
    if method == "l1":
        if (smallest := np.bincount(groups).min()) < 2 and len(settings.penalties) > 1:
            raise Problem("DFR chooses its penalty on halves of the reweighting part, and a group "
                          f"has only {smallest} image there: raise Data.reweighting, or give one "
                          "value as penalties.")
        weight, bias = dfr_l1(embedded, labels, groups, settings, seed)
    else:
        weight, bias = dfr_sgd(embedded, labels, groups, store.num_classes, settings, train, seed)
    with torch.no_grad():
        model.head.weight.copy_(torch.from_numpy(weight))
        model.head.bias.copy_(torch.from_numpy(bias))

# ---- Metrics and tables --------------------------------------------------------------------------

def group_scores(
    correct: np.ndarray, groups: np.ndarray, train_counts: np.ndarray
) -> dict[str, Any]:
    """Accuracies, in per cent, of predictions that are right (True) or wrong, by group.

    mean: over samples. group_mean: over groups. adjusted_mean: groups weighted by their share of
    training (what the DFR papers print). wga: the worst group. Groups without samples are None
    and left out of every average.
    """
    sizes = np.bincount(groups, minlength=len(train_counts))
    hits = np.bincount(groups, weights=correct, minlength=len(train_counts))
    present = sizes > 0
    accuracy = 100 * hits[present] / sizes[present]
    shares = train_counts[present].astype(float)
    shares = shares if shares.sum() else np.ones_like(shares)
    by_group: list[float | None] = [None] * len(sizes)
    for g, value in zip(np.flatnonzero(present), accuracy, strict=True):
        by_group[g] = float(value)
    return {"wga": float(accuracy.min()), "mean": float(100 * np.mean(correct)),
            "group_mean": float(accuracy.mean()),
            "adjusted_mean": float((accuracy * shares).sum() / shares.sum()), "groups": by_group}

def majority_vote(logits: Tensor) -> np.ndarray:
    """Class most of the models [M, N, C] name, [N]; ties go to the higher mean probability."""
    votes = F.one_hot(logits.argmax(-1), logits.shape[-1]).sum(0)
    return (votes + 0.5 * logits.float().softmax(-1).mean(0)).argmax(-1).numpy()

def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (ddof = 1; None for a single value)."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None

def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An aligned Markdown table: the first column to the left, the others to the right."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = [row[0].ljust(widths[0])]
        padded += [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2)] + ["-" * (w + 1) + ":" for w in widths[1:]]) + "|"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])

COLUMNS = {"wga": "WGA", "mean": "mean", "group_mean": "group mean",
           "adjusted_mean": "adjusted mean"}

def score_cells(scores: Mapping[str, Any]) -> list[str]:
    """One model's averages and group accuracies, for a table."""
    values = [*(scores[key] for key in COLUMNS), *scores["groups"]]
    return ["–" if value is None else f"{value:.1f}" for value in values]

def summary_table(results: Mapping[str, Any]) -> str:
    """The table of results.json: a row per kind of model, mean ± std over its members."""

    def cell(values: Sequence[float | None]) -> str:
        known = [v for v in values if v is not None]
        if not known:
            return "–"
        mean, std = spread(known)
        return f"{mean:.1f}" + (f" ± {std:.1f}" if std is not None else "")

    baseline = results["about"].get("baseline")
    against = {Path(m["name"]).parent.name: m["wga"] for row in results["rows"]
               for m in row["members"] if row["name"] == baseline}
    published = {k for row in results["rows"] for k in row["published"]}
    columns = [k for k in COLUMNS if k in published]
    names = [group["name"] for group in results["groups"]]
    header = ["", "models", *COLUMNS.values(), *names]
    header += [f"WGA − {baseline}'s"] * bool(against)
    header += [f"published {COLUMNS[k]}" for k in columns]
    rows = []
    for row in results["rows"]:
        members = row["members"]
        line = [row["name"], str(len(members))]
        line += [cell([m[k] for m in members]) for k in COLUMNS]
        line += [cell([m["groups"][g] for m in members]) for g in range(len(names))]
        if against:  # paired by seed
            seeds = {Path(m["name"]).parent.name: m["wga"] for m in members}
            line.append(cell([v - against[k] for k, v in seeds.items() if k in against]))
        for k in columns:
            value, std = row["published"].get(k), row["published"].get(f"{k}_std")
            line.append("–" if value is None else f"{value:g}" + (f" ± {std:g}" if std else ""))
        rows.append(line)
    return table(header, rows)

# ---- Run directory: artefacts, checkpoints -------------------------------------------------------

@dataclass(frozen=True, eq=False)
class Artefact:
    """A file to be made, with everything that decides its content: settings, data, parents."""

    path: Path
    settings: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        return digest(self.settings)

    @property
    def identity(self) -> dict[str, str]:
        """What a file says of itself, to be recognised: fingerprint, and the settings as JSON."""
        return {"fingerprint": self.fingerprint, "settings": json.dumps(dict(self.settings))}

    def mismatch(self) -> str:
        """Empty if the file stands as described, else what is wrong with it."""
        if not self.path.is_file():
            return "is missing"
        metadata = read_metadata(self.path)
        if metadata.get("fingerprint") == self.fingerprint:
            return ""
        return changed(json.loads(metadata.get("settings", "{}")), self.settings)

def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What to say of a file made with other settings."""
    return f"was made with other settings (old → new): {differences(old, new)}"

@dataclass(frozen=True)
class Context:
    """One command at work: a recipe, its data, and where its artefacts stand."""

    name: str  # the recipe, as typed
    recipe: Recipe
    store: Store
    out: Path
    runtime: Runtime
    common: Common
    makes: Sequence[str]  # the stages that the command makes; others are as they were made
    known: Mapping[str, Distill]  # students and sets that others may refer to
    known_sets: Mapping[str, Augment]

    def data_settings(self) -> dict[str, Any]:
        """What models depend on of the data: the images themselves, and how they are cropped."""
        kept = ["size", "geometry", "crop", "random_crop", "crop_scale", "crop_ratio", "flip"]
        flat = flatten(self.recipe.data, "data")
        settings = {f"data.{key}": flat[f"data.{key}"] for key in [*kept, "reweighting"]}
        return settings | {"data": self.store.fingerprint}

    def _artefact(self, path: str, settings: dict[str, Any], **own: Any) -> Artefact:
        settings = {k: v for k, v in settings.items() if k != "checkpoint_minutes"} | own
        if "weights" in settings:
            settings["weights"] = identify(settings["weights"])
        file, precision = self.out / path, self.runtime.precision
        if path.split("/")[0] not in self.makes and file.is_file():
            made = json.loads(read_metadata(file).get("settings", "{}"))
            precision = made.get("precision", precision)
        return Artefact(file, settings | self.data_settings() | {"precision": precision})

    def teacher(self, i: int) -> tuple[Artefact, Artefact]:
        """Teacher i before and after its head is refitted."""
        section = self.recipe.teachers
        arch, weights = section.network(i)
        settings = flatten(section)
        del settings["num_teachers"]
        dfr = {k: settings.pop(k) for k in [*settings] if k.startswith("dfr.")}
        erm = self._artefact(f"teachers/{i}/erm.safetensors", settings, arch=arch, weights=weights,
                             seed=section.seed + i)
        parent = {f"parent teachers/{i}/erm": erm.fingerprint}
        settings = {**erm.settings, **dfr, **parent}
        return erm, Artefact(erm.path.with_name("dfr.safetensors"), settings)

    def bias(self) -> Artefact:
        """The biased model."""
        section, path = self.recipe.bias_model, "bias-model/model.safetensors"
        if section.kind == "teacher":
            parent = self.teacher(section.teacher)[0].fingerprint
            name = f"parent teachers/{section.teacher}/erm"
            return Artefact(self.out / path, {"kind": "teacher", name: parent})
        unused = {"erm": ["q", "stop_after"], "early-stopped": ["q"], "gce": ["stop_after"]}
        unused_here = ["teacher", *unused[section.kind]]
        settings = {k: v for k, v in flatten(section).items() if k not in unused_here}
        return self._artefact(path, settings)

    def student(self, name: str, seed: int) -> Artefact:
        """A student of the recipe."""
        student = self.recipe.students.get(name) or self.known[name]
        parents = {f"parent {key}": a.fingerprint for key, a in self.ensemble(student)}
        if student.augmented:
            parents["parent images"] = self.augmented(student.augmented, seed).fingerprint
        if student.start:
            parents["parent start"] = self.student(student.start, seed).fingerprint
        if student.rebalance == "tab":
            parents["parent helper"] = self.helper(student, seed).fingerprint
        path = f"students/{name}/seed{seed}/model.safetensors"
        return self._artefact(path, relevant(student), seed=seed, **parents)

    def helper(self, student: Distill, seed: int) -> Artefact:
        """The model whose loss histories TAB clusters."""
        return self.student(student.helper, seed) if student.helper else self.bias()

    def generator(self) -> Artefact:
        """The recipe's own generator: a note beside its folder of a pipeline."""
        return self._artefact("generator/done.json", flatten(self.recipe.diffusion))

    def augmented(self, name: str, seed: int) -> Artefact:
        """A set of generated images: the note that is written when it is complete."""
        section = self.recipe.augments.get(name) or self.known_sets[name]
        settings = {k: v for k, v in flatten(section).items() if k != "in_flight"}
        parents = {f"parent teachers/{i}/dfr": self.teacher(i)[1].fingerprint
                   for i in range(self.recipe.teachers.num_teachers)}
        parents["parent student"] = self.student(section.student, seed).fingerprint
        if not section.generator:
            parents["parent generator"] = self.generator().fingerprint
        if section.like:
            parents["parent like"] = self.augmented(section.like, seed).fingerprint
        path = f"augmented/{name}/seed{seed}/done.json"
        return self._artefact(path, settings, seed=seed, **parents)

    def training_store(self, student: Distill, seed: int) -> Store:
        """The data a student is trained on: with generated images, rebalanced."""
        store = self.store
        if student.augmented:
            done = self.require(self.augmented(student.augmented, seed), "augment")
            with open(done.with_name("metadata.csv"), newline="") as file:
                rows = list(csv.DictReader(file))
            size, geometry = store.data.size, store.data.geometry
            images = [decode(done.with_name(row["image"]), size, geometry) for row in rows]
            labels = np.array([int(row["label"]) for row in rows])
            store = enlarge(store, np.stack(images), labels, student.augmented_ratio)
        train = store.split("train")
        labels, within = store.labels[train], np.zeros(len(train), np.int64)
        if student.rebalance == "groups":
            return rebalanced(store, store.cells[train], within)
        if student.rebalance == "classes":
            return rebalanced(store, labels, within)
        if student.rebalance == "tab":
            path = self.require(self.helper(student, seed), "distill")
            losses = load_file(path.with_name("model.losses.safetensors"))["losses"].numpy()
            if losses.shape[1] != len(train) or not len(losses):
                raise Problem(f"{path} was trained on {losses.shape[1]:,} images, the student that "
                              f"it helps sees {len(train):,}: name a helper with the same "
                              "`augmented` and no rebalance.")
            return rebalanced(store, loss_clusters(losses, labels, seed), labels)
        return store

    def ensemble(self, student: Distill) -> list[tuple[str, Artefact]]:
        """What a student learns from: its teachers, DFR ones first, then the biased model."""
        if student.weighting == "one-hot":
            return []
        num_teachers = student.num_teachers or self.recipe.teachers.num_teachers
        num_dfr = round(student.dfr_share * num_teachers)
        used = [self.teacher(i)[i < num_dfr] for i in range(num_teachers)]
        used += [self.bias()] if self.needs_bias(student) else []
        return [(self.label(artefact), artefact) for artefact in used]

    @staticmethod
    def needs_bias(student: Distill) -> bool:
        """Does a student compare its teachers with the biased model?"""
        by_features = any(student.gamma) and student.feature_weights == "agre"
        return student.weighting == "agre" or (by_features and student.weighting != "one-hot")

    def label(self, artefact: Artefact) -> str:
        """An artefact's name in messages: its path below the run directory."""
        return str(artefact.path.relative_to(self.out).with_suffix(""))

    def finished(self, artefact: Artefact) -> bool:
        """Does the file stand as described? Raises Problem if it was made with other settings.

        With --redo what stands is deleted first, whatever it was made with.
        """
        problem = artefact.mismatch()
        if self.common.redo:
            artefact.path.unlink(missing_ok=True)
        elif problem not in ("", "is missing"):
            raise Problem(f"{artefact.path} {problem}. Keep both with --out DIR, or make it again "
                          "with --redo.")
        return not problem and not self.common.redo

    def require(self, artefact: Artefact, command: str) -> Path:
        """The path of a finished artefact of an earlier command, or a Problem that names it."""
        if problem := artefact.mismatch():
            redo = " --redo" * (problem != "is missing")
            raise Problem(f"{artefact.path} {problem}. Make it with `python grokd.py {command} "
                          f"{self.name}{redo}` and the same --root and --out; what you changed by "
                          "flags belongs in the recipe.")
        return artefact.path

FEATURES = ("layers", "feature_loss", "feature_weights", "feature_space", "adapters",
            "feature_dropout")  # settings that matter only with gamma

def relevant(student: Distill) -> dict[str, Any]:
    """The settings that decide what a student becomes: a one-hot student has no temperature."""
    unused = [f"dfr.{item.name}" for item in fields(DFR)] if student.head == "own" else []
    if student.weighting == "one-hot":
        unused += ["alpha", "tau", "combine", "num_teachers", "dfr_share"]
    if student.weighting == "one-hot" or not any(student.gamma):
        unused += ["gamma", *FEATURES]
    unused += ["augmented_ratio"] * (not student.augmented)
    unused += ["helper"] * (student.rebalance != "tab")
    if student.weighting != "agre":
        unused += ["space", "normalise"] + ["zero", "shrink"] * (not Context.needs_bias(student))
    return {k: v for k, v in flatten(student).items() if k not in unused}

@functools.cache
def identify(weights: str) -> str:
    """Initial weights by content if they are a file, else by name."""
    path = Path(weights)
    return f"{weights} {digest(path.read_bytes())}" if path.is_file() else weights

def save_model(model: Classifier, artefact: Artefact, ctx: Context, scores: Any) -> None:
    """Write a finished model: torchvision's keys, and metadata to load, compare and cite it."""
    described = {
        "arch": model.arch, "class_names": ctx.store.class_names, "trunk": trunk_key(model),
        "input": dataclasses.asdict(model.input), "settings": dict(artefact.settings),
        "fingerprint": artefact.fingerprint, "metrics": scores, "recipe": ctx.name,
        "grokd": __version__,
    }
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in described.items()}
    write_file(artefact.path, save(model.plain_state(), texts))

def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any]) -> None:
    """Write a checkpoint folder under a temporary name, rename it, then drop older ones."""
    final, part = folder / f"{step:09d}", folder / f"{step:09d}.part"
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    shutil.rmtree(part, ignore_errors=True)
    write_file(part / "state.pt", buffer.getbuffer())
    shutil.rmtree(final, ignore_errors=True)
    part.rename(final)
    for old in folder.iterdir():
        if old != final:
            shutil.rmtree(old)

def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest complete checkpoint, or None."""
    complete = sorted(path for path in folder.glob("*") if path.suffix != ".part")
    if not complete:
        return None
    return torch.load(complete[-1] / "state.pt", map_location="cpu", weights_only=True)

# ---- Fit: one training loop for teachers, biased model and students ------------------------------

def learning_rate(train: Train, step: int, steps_per_epoch: int) -> float:
    """Learning rate of a step (from 0), a plain function: linear warm-up, then the schedule."""
    warmup, total = train.warmup_epochs * steps_per_epoch, train.epochs * steps_per_epoch
    if step < warmup:
        return train.lr * (step + 1) / (warmup + 1)
    if train.schedule == "constant":
        return train.lr
    return train.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

def validate(model: Classifier, store: Store, runtime: Runtime) -> dict[str, Any]:
    """Group scores on the selection part of validation (all of it where no part is left)."""
    indices = store.split("selection")
    indices = indices if len(indices) else store.split("val")
    predicted = predict([model], store, indices, runtime)[0].argmax(-1).numpy()
    correct = predicted == store.labels[indices]
    return group_scores(correct, store.groups[indices], store.counts("train"))

@dataclass
class Progress:
    """How far a run has come: with model and optimiser, all that its checkpoints hold."""

    losses: Tensor  # [epochs, N], per-sample training loss as seen, for finished epochs
    current: Tensor  # [N], the same for the epoch at work
    step: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)  # figures of the epoch at work
    history: list[dict[str, Any]] = field(default_factory=list)  # figures of finished epochs
    best: dict[str, Any] = field(default_factory=dict)  # weights to keep, with select="best"

def fit(model: Classifier, objective: Objective, train: Train, artefact: Artefact, ctx: Context,
        runtime: Runtime, seed: int, stop_after: int | None = None) -> Progress:
    """Train `model` in place, from the newest checkpoint of `artefact` if there is one.

    Everything random is a function of (seed, step), so a killed run goes on with the bits it would
    have had. Raises Problem on a loss that is not finite.
    """
    store, device, label = ctx.store, runtime.device, ctx.label(artefact)
    indices = store.split("train")
    num_epochs = min(train.epochs, stop_after or train.epochs)
    steps_per_epoch = len(epoch_batches(len(indices), train.batch_size, seed, 0))
    num_steps = num_epochs * steps_per_epoch
    model.to(memory_format=torch.channels_last)  # what convolutions like best, on CPUs as on GPUs
    model.to(device, runtime.dtype).train()
    network: nn.Module = model
    if runtime.world > 1:
        if device.type == "cuda":
            model = typing.cast(Classifier, nn.SyncBatchNorm.convert_sync_batchnorm(model))
        network = runtime.accelerator.prepare_model(model)
    network = typing.cast(nn.Module, torch.compile(network)) if train.compile else network
    optimizer = build_optimizer(model, train, runtime)
    # Losses are kept in full for any number of epochs: 4 bytes per image and epoch.
    run = Progress(torch.zeros(num_epochs, len(indices)), torch.zeros(len(indices)))
    folder = artefact.path.parent / "checkpoints"
    state = load_checkpoint(folder)
    if state and state["fingerprint"] != artefact.fingerprint:
        if not ctx.common.redo:
            told = changed(json.loads(state["settings"]), artefact.settings)
            raise Problem(f"{folder} {told}. Keep it with --out DIR, or start again with --redo.")
        state = None
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        run, threads = Progress(**state["run"]), torch.get_num_threads()
        note = f"; {state['threads']} threads then, {threads} now: bits may differ"
        note *= state["threads"] != threads
        print(f"{label}: goes on at step {run.step:,} of {num_steps:,}{note}", flush=True)
    elif ctx.common.resume:
        raise Problem(f"--resume: {folder} holds no checkpoint: start without the flag.")
    held = float(runtime.rank == 0)
    run.current = run.current.to(device) * held
    run.sums = {k: v.to(device) * held for k, v in run.sums.items()}

    def gather(batch: np.ndarray) -> list[tuple[np.ndarray, Tensor]]:
        own = batch[runtime.rank :: runtime.world]
        own = own if len(own) else batch[:1]
        micro, found = train.micro_batch or len(own), []
        for first in range(0, len(own), micro):
            raw = torch.from_numpy(store.raw(indices[own[first : first + micro]]))
            raw = raw.pin_memory() if device.type == "cuda" else raw
            found.append((own[first : first + micro], raw))
        return found

    def checkpoint() -> float:
        run.sums = {k: runtime.sum(v) for k, v in sorted(run.sums.items())}
        run.current = runtime.sum(run.current)
        if runtime.rank:  # from here on the first process holds what all have seen
            run.sums = {k: torch.zeros_like(v) for k, v in run.sums.items()}
            run.current = torch.zeros_like(run.current)
        else:
            described = {**artefact.identity, "threads": torch.get_num_threads(), "run": vars(run),
                         "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save_checkpoint(folder, run.step, described)
        return time.monotonic()

    from torch.utils.tensorboard import SummaryWriter

    began, first_step, saved = time.monotonic(), run.step, time.monotonic()
    bar = progress(label=label, total=num_steps, initial=run.step)
    with contextlib.ExitStack() as stack:
        board = None
        if runtime.rank == 0 and num_epochs:
            logs = artefact.path.parent / "tensorboard"
            board = stack.enter_context(SummaryWriter(logs, purge_step=run.step))
        for epoch in range(run.step // steps_per_epoch, num_epochs):
            view = 0
            if store.data.random_crop or store.data.flip:  # otherwise all views are one
                view = epoch % train.num_views if train.num_views else epoch
            objective.prepare(view)
            batches = epoch_batches(len(indices), train.batch_size, seed, epoch)
            for batch, parts in prefetch(batches[run.step - epoch * steps_per_epoch :], gather):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(train, run.step, steps_per_epoch)
                images = accumulate(model, network, objective, train, len(batch), parts, run, store,
                                    view, seed, runtime)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                if board and run.step == 0:
                    board.add_images("images", images[:16], 0)
                run.step += 1
                bar.update()
                check_now = run.step % 20 == 0 or run.step % steps_per_epoch == 0  # a GPU waits
                if check_now and not torch.isfinite(run.sums["loss"]):
                    raise Problem(f"{label}: the loss is {run.sums['loss'].item()} by step "
                                  f"{run.step:,}: lower lr.")
                late = time.monotonic() - saved > 60 * train.checkpoint_minutes
                if runtime.world > 1:  # all or none, now and then
                    late = check_now and bool(runtime.sum(torch.tensor(late + 0, device=device)))
                if late:
                    saved = checkpoint()
            sums = {k: runtime.sum(v) for k, v in sorted(run.sums.items())}
            run.losses[epoch] = runtime.sum(run.current).cpu()
            run.sums, run.current = {}, torch.zeros_like(run.current)
            scores = validate(model, store, runtime)
            model.train()
            entry = {"epoch": epoch + 1, "step": run.step, "lr": optimizer.param_groups[0]["lr"]}
            entry |= {k: (v / len(indices)).tolist() for k, v in sums.items()} | scores
            run.history.append(entry)
            if train.select == "best" and scores["wga"] > run.best.get("wga", -1):
                weights = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
                run.best = {"wga": scores["wga"], "epoch": epoch + 1, "model": weights}
            if board:
                images_seen = (run.step - first_step) * train.batch_size
                speed = images_seen / (time.monotonic() - began)
                log_epoch(board, entry, store.group_names, speed)
            bar.set_postfix(loss=f"{entry['loss']:.3f}", WGA=f"{scores['wga']:.1f}", refresh=False)
            saved = checkpoint()
        if board:
            log_settings(board, artefact.settings, run.history[-1])
    bar.close()
    runtime.accelerator.free_memory()
    if run.best:
        model.load_state_dict(run.best["model"])
    return run

def accumulate(model: Classifier, network: nn.Module, objective: Objective, train: Train,
               total: int, parts: list[tuple[np.ndarray, Tensor]], run: Progress, store: Store,
               view: int, seed: int, runtime: Runtime) -> Tensor:
    """Gradients of one batch of `total` images, of which this process has `parts` (micro-batches:
    places in the training set, stored images). Adds to `run`; returns the images last seen."""
    indices, device = store.split("train"), runtime.device
    for number, (places, raw) in enumerate(parts):
        torch.manual_seed(seed_of(seed, run.step, runtime.rank, number))
        images = store.view(indices[places], device, view, train.view_seed, raw)
        labels = torch.from_numpy(store.labels[indices[places]]).to(device)
        if train.mix != "none":
            from torchvision.transforms import v2

            mixer, alpha = (v2.CutMix, 1.0) if train.mix == "cutmix" else (v2.MixUp, 0.2)
            # From here on labels are shares, [b, C].
            images, labels = mixer(alpha=alpha, num_classes=store.num_classes)(images, labels)
        last = number == len(parts) - 1
        with contextlib.nullcontext() if last else runtime.accelerator.no_sync(network):
            with runtime.autocast():
                logits = network(images)
            per_sample, figures = objective.losses(
                Batch(model, images, logits, labels, places, total, run.step, runtime))
            # DDP averages over processes, hence their number.
            loss = per_sample.sum() * (runtime.world / total)
            counts = total > runtime.rank  # else: a sample that only keeps the process in step
            runtime.accelerator.backward(loss * counts)
        if counts:
            run.current[torch.from_numpy(places).to(device)] = per_sample.detach().to(run.current)
            for name, value in (figures | {"loss": per_sample}).items():
                run.sums[name] = run.sums.get(name, 0) + value.detach().double().sum(-1)
    return images

def build_optimizer(model: Classifier, train: Train, runtime: Runtime) -> Any:
    """SGD or AdamW over what is trained, prepared by accelerate (loss scaling in float16)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer = torch.optim.SGD(
        parameters, train.lr, train.momentum, weight_decay=train.weight_decay)
    if train.optimizer == "adamw":
        optimizer = torch.optim.AdamW(parameters, train.lr, weight_decay=train.weight_decay)
    return runtime.accelerator.prepare_optimizer(optimizer)

def log_epoch(board: Any, entry: Mapping[str, Any], names: Sequence[str], speed: float) -> None:
    """One epoch's figures to TensorBoard."""
    figures = {"charts/lr": entry["lr"], "charts/images_per_second": speed}
    figures |= {f"losses/{k}": v for k, v in entry.items()
                if k in ("loss", "cross_entropy", "distillation") or k.startswith("feature ")}
    figures |= {f"weights/teacher{i}": w for i, w in enumerate(entry.get("weight", []))}
    figures |= {"weights/zero_share": entry.get("zero_weight_share")}
    figures |= {f"validation/{k}": entry[k] for k in COLUMNS}
    figures |= {f"validation_groups/{n}": a for n, a in zip(names, entry["groups"], strict=True)}
    for name, value in figures.items():
        if value is not None:
            board.add_scalar(name, value, entry["step"])

def log_settings(board: Any, settings: Mapping[str, Any], last: Mapping[str, Any]) -> None:
    """The settings as a table, and as hyperparameters beside the last figures, in the same run."""
    from torch.utils.tensorboard.summary import hparams

    texts = {k: str(v) for k, v in settings.items()}
    board.add_text("settings", table(["setting", "value"], [*texts.items()]))
    for summary in hparams(texts, {f"final/{k}": last[k] for k in (*COLUMNS, "loss")}):
        board.file_writer.add_summary(summary)

# ---- Commands ------------------------------------------------------------------------------------

@contextlib.contextmanager
def making(artefacts: Sequence[Artefact], runtime: Runtime) -> Iterator[None]:
    """Hold the locks of the folders in which artefacts are made."""
    with contextlib.ExitStack() as locks:
        if runtime.rank == 0:
            for artefact in artefacts:
                locks.enter_context(locked(artefact.path.parent / ".lock"))
        yield
        runtime.wait()

def train_and_save(section: Teachers | BiasModel | Distill, arch: str, weights: str,
                   objective: Objective, artefact: Artefact,
                   targets: Mapping[Artefact, DFR | None], ctx: Context, runtime: Runtime,
                   seed: int, stop_after: int | None = None) -> None:
    """Build and fit a network, then write it to each of `targets`, under its own or a DFR head.

    `artefact` holds the checkpoints until all are written.
    """
    train, store = section.train, ctx.store
    model = build_model(arch, weights, store.num_classes, section.input, seed)
    objective.attach(model)
    if runtime.rank == 0:
        count = sum(p.numel() for p in model.parameters())
        print(f"{ctx.label(artefact)}: {arch}, {count:,} parameters, {train.epochs} epochs of "
              f"{len(store.split('train')):,} images, {train.batch_size} a step", flush=True)
    began = time.monotonic()
    run = fit(model, objective, train, artefact, ctx, runtime, seed, stop_after)
    own_head = {k: v.clone() for k, v in model.head.state_dict().items()}
    for target, dfr in targets.items():
        model.head.load_state_dict(own_head)
        if dfr:
            refit_head(model, store, dfr, train, seed, runtime)
        scores = validate(model, store, runtime)
        if runtime.rank == 0:
            history = {"epochs": run.history, "best_epoch": run.best.get("epoch"), "final": scores}
            stem = target.path.with_suffix("")
            write_file(Path(f"{stem}.history.json"), json.dumps(history, indent=1))
            write_file(Path(f"{stem}.losses.safetensors"), save({"losses": run.losses}))
            save_model(model, target, ctx, scores)
            print(f"{ctx.label(target)}: validation WGA {scores['wga']:.1f} %, group mean "
                  f"{scores['group_mean']:.1f} %, {time.monotonic() - began:.0f} s", flush=True)
    if runtime.rank == 0:
        shutil.rmtree(artefact.path.parent / "checkpoints", ignore_errors=True)
    runtime.wait()

def run_teachers(ctx: Context) -> None:
    """Train the teachers (ERM), then refit their heads (DFR); print both by group."""
    section, store, rows = ctx.recipe.teachers, ctx.store, []
    runtime, jobs = ctx.runtime.plan(range(section.num_teachers), ctx.common.parallel)
    for i in jobs:
        erm, dfr = ctx.teacher(i)
        seed = section.seed + i
        with making([erm], runtime):
            if not ctx.finished(erm):
                train_and_save(section, *section.network(i), erm_objective(), erm, {erm: None},
                               ctx, runtime, seed)
            if not ctx.finished(dfr):
                model = load_model(erm.path, runtime.device)
                refit_head(model, store, section.dfr, section.train, seed, runtime)
                scores = validate(model, store, runtime)
                if runtime.rank == 0:
                    save_model(model, dfr, ctx, scores)
    ctx.runtime.accelerator.wait_for_everyone()
    for i in range(section.num_teachers):
        for artefact, head in zip(ctx.teacher(i), ("ERM", store.head_name), strict=True):
            scores = json.loads(read_metadata(artefact.path)["metrics"])
            rows.append([f"{i} {artefact.settings['arch']} {head}", *score_cells(scores)])
    part = "selection part" if store.data.reweighting < 1 else "on which heads were fitted"
    header = ["teacher", *COLUMNS.values(), *store.group_names]
    say(f"\nTeachers, validation ({part}), per cent:", table(header, rows), "")

def run_bias_model(ctx: Context) -> None:
    """Train the biased model, or take a teacher's ERM parent."""
    section, artefact = ctx.recipe.bias_model, ctx.bias()
    runtime, jobs = ctx.runtime.plan([artefact], ctx.common.parallel)
    for _ in jobs:
        with making([artefact], runtime):
            if ctx.finished(artefact):
                continue
            if section.kind == "teacher":
                parent = ctx.require(ctx.teacher(section.teacher)[0], "teachers")
                if runtime.rank == 0:
                    for end in (".history.json", ".losses.safetensors"):
                        copy = artefact.path.with_name("model" + end)
                        write_file(copy, parent.with_name("erm" + end).read_bytes())
                    metrics = json.loads(read_metadata(parent)["metrics"])
                    save_model(load_model(parent), artefact, ctx, metrics)
                    say(f"bias-model: teacher {section.teacher} before its head was refitted")
                continue
            objective = gce_objective(section.q) if section.kind == "gce" else erm_objective()
            stop_after = section.stop_after if section.kind == "early-stopped" else None
            train_and_save(section, section.arch, section.weights, objective, artefact,
                           {artefact: None}, ctx, runtime, section.seed, stop_after)
    ctx.runtime.accelerator.wait_for_everyone()

def run_distill(ctx: Context) -> None:
    """Train every student with every seed; those that differ only in the head are trained once."""
    jobs: dict[tuple[str, int], list[str]] = {}
    for seed in ctx.recipe.seeds:
        for name, student in ctx.recipe.students.items():
            alike = json.dumps(relevant(replace(student, head="own")))
            jobs.setdefault((alike, seed), []).append(name)
    for student in ctx.recipe.students.values():
        for name, artefact in ctx.ensemble(student):
            ctx.require(artefact, "bias-model" if name.startswith("bias") else "teachers")
    runtime, own_jobs = ctx.runtime.plan([*jobs.items()], ctx.common.parallel)
    frozen: dict[str, Classifier] = {}
    for (_, seed), names in own_jobs:
        students = {ctx.student(name, seed): ctx.recipe.students[name] for name in names}
        with making([*students], runtime):
            targets = {a: s.dfr if s.head == "dfr" else None for a, s in students.items()
                       if not ctx.finished(a)}
            if targets:
                first, student = next(iter(students.items()))
                own = replace(ctx, store=ctx.training_store(student, seed))
                weights = student.weights
                if student.start:
                    weights = str(ctx.require(ctx.student(student.start, seed), "distill"))
                objective = prepare_objective(own, student, runtime, frozen, seed)
                train_and_save(student, student.arch, weights, objective, first, targets, own,
                               runtime, seed)
    ctx.runtime.accelerator.wait_for_everyone()

def prepare_objective(ctx: Context, student: Distill, runtime: Runtime,
                      frozen: dict[str, Classifier], seed: int) -> Objective:
    """What a student learns; `frozen` are the networks loaded so far, by fingerprint."""
    ensemble = ctx.ensemble(student)
    if not ensemble:
        return erm_objective()
    for _, artefact in ensemble:
        if artefact.fingerprint not in frozen:
            frozen[artefact.fingerprint] = load_model(artefact.path, runtime.device, ctx.store)
    num_teachers = len(ensemble) - ctx.needs_bias(student)
    layers = [layer for layer, gamma in zip(student.layers, student.gamma, strict=True) if gamma]
    targets = Targets([frozen[artefact.fingerprint] for _, artefact in ensemble], num_teachers,
                      ctx.store, ctx.data_settings(), runtime, student.train.view_seed,
                      bool(layers))
    if not layers:
        return distill_objective(student, targets, seed)
    networks = {}
    if student.train.mix != "none" or any(not layer.endswith("pooled") for layer in layers):
        for key, (_, artefact) in zip(targets.trunk_keys, ensemble, strict=True):
            if key not in networks:  # unfolded: folding leaves no modules to tap
                networks[key] = load_model(artefact.path, runtime.device, ctx.store)
    teachers = ctx.recipe.teachers
    pretrained = len(set(teachers.weights)) == 1 and teachers.weights[0] != "random"
    features = FeatureLoss(student, targets, networks, pretrained, seed)
    return distill_objective(student, targets, seed, features)

def train_generator(ctx: Context) -> Path:
    """The recipe's generator, a DDPM of the stored training images (one process trains it): the
    folder of a diffusers pipeline."""
    artefact, section, store = ctx.generator(), ctx.recipe.diffusion, ctx.store
    folder = artefact.path.with_name("pipeline")
    with making([artefact], replace(ctx.runtime, shared=ctx.runtime.accelerator.num_processes > 1)):
        if ctx.finished(artefact) or not ctx.runtime.accelerator.is_main_process:
            return folder
        from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
        from diffusers.training_utils import EMAModel

        widths, device, indices = section.widths, ctx.runtime.device, store.split("train")
        if store.data.size % 2 ** (len(widths) - 1):
            raise Problem(f"diffusion.widths has {len(widths)} levels, so Data.size must be a "
                          f"multiple of {2 ** (len(widths) - 1)}, not {store.data.size}.")
        torch.manual_seed(section.seed)
        unet: Any = UNet2DModel(
            store.data.size, block_out_channels=widths, layers_per_block=1,
            norm_num_groups=math.gcd(*widths, 32),
            down_block_types=("DownBlock2D",) * (len(widths) - 1) + ("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (len(widths) - 1),
            num_class_embeds=store.num_classes if section.class_conditional else None)
        unet.to(device)
        scheduler: Any = DDPMScheduler(  # trailing: few steps must start from noise alone
            section.num_timesteps, prediction_type="v_prediction",
            beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing")
        train = Train(section.epochs, section.batch_size, lr=section.lr, schedule="cosine",
                      optimizer="adamw", weight_decay=0.01)
        accelerator, optimizer = ctx.runtime.accelerator, build_optimizer(unet, train, ctx.runtime)
        ema = EMAModel(unet.parameters(), section.ema)
        steps = len(epoch_batches(len(indices), section.batch_size, section.seed, 0))
        step, mean = 0, 0.0
        checkpoints = artefact.path.parent / "checkpoints"
        if (state := load_checkpoint(checkpoints)) and state["fingerprint"] == artefact.fingerprint:
            unet.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            ema.load_state_dict(state["ema"])
            ema.to(device)
            step = state["step"]
        began = saved = time.monotonic()
        bar = progress(label="generator", total=section.epochs * steps, initial=step)
        say(f"generator: UNet of {sum(p.numel() for p in unet.parameters()):,} parameters, "
            f"{section.epochs} epochs of {len(indices):,} images of {store.data.size} pixels")
        for epoch in range(step // steps, section.epochs):
            batches = epoch_batches(len(indices), section.batch_size, section.seed, epoch)
            for batch in batches[step - epoch * steps :]:
                optimizer.param_groups[0]["lr"] = learning_rate(train, step, steps)
                x = torch.from_numpy(store.raw(indices[batch])).to(device) / 127.5 - 1
                if store.data.flip:
                    flips = hash_uniform(section.seed, epoch, indices[batch], 99) < 0.5
                    x = torch.where(torch.from_numpy(flips).to(device)[:, None, None, None],
                                    x.flip(3), x)
                noise = noise_like(x.shape, x.dtype, section.seed, step, 6).to(device)
                level = hash_uniform(section.seed, step, 7, np.arange(len(x)))
                t = torch.from_numpy((level * section.num_timesteps).astype(np.int64)).to(device)
                labels = torch.from_numpy(store.labels[indices[batch]]).to(device)
                with ctx.runtime.autocast():
                    out = unet(scheduler.add_noise(x, noise, t), t,
                               labels if section.class_conditional else None).sample
                loss = F.mse_loss(out.float(), scheduler.get_velocity(x, noise, t))
                optimizer.zero_grad()
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(unet.parameters(), 1.0)
                optimizer.step()
                ema.step(unet.parameters())
                step += 1
                mean += (loss.item() - mean) / min(step, 100)
                if not math.isfinite(mean):
                    raise Problem(f"generator: the loss is {loss.item()} at step {step:,}: lower "
                                  "diffusion.lr.")
                bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
                bar.update()
            if time.monotonic() - saved > 60:
                save_checkpoint(checkpoints, step, {
                    "fingerprint": artefact.fingerprint, "step": step, "ema": ema.state_dict(),
                    "model": unet.state_dict(), "optimizer": optimizer.state_dict()})
                saved = time.monotonic()
        bar.close()
        ema.copy_to(unet.parameters())
        shutil.rmtree(folder, ignore_errors=True)
        pipeline: Any = DDPMPipeline(unet, scheduler)
        pipeline.save_pretrained(folder)
        write_file(artefact.path, json.dumps(artefact.identity))
        shutil.rmtree(checkpoints, ignore_errors=True)
        say(f"generator: denoising loss {mean:.4f}, {time.monotonic() - began:.0f} s")
    return folder

def run_augment(ctx: Context) -> None:
    """Make every set of images of the recipe, for every seed; all processes share each set."""
    runtime = replace(ctx.runtime, shared=ctx.runtime.accelerator.num_processes > 1)
    for seed, (name, settings) in itertools.product(ctx.recipe.seeds, ctx.recipe.augments.items()):
        artefact = ctx.augmented(name, seed)
        with making([artefact], runtime):
            if not ctx.finished(artefact):
                make_set(replace(ctx, runtime=runtime), settings, artefact, seed)
    ctx.runtime.accelerator.wait_for_everyone()

def make_set(ctx: Context, settings: Augment, artefact: Artefact, seed: int) -> None:
    """Generate one set: PNGs as they are accepted, a line for each source in records-*.jsonl, at
    the end metadata.csv and sheet.png. What a killed run had recorded is not made again."""
    runtime, store, folder = ctx.runtime, ctx.store, artefact.path.parent
    begun = folder / "begun.json"
    if begun.is_file() and read_metadata(begun)["fingerprint"] != artefact.fingerprint:
        old = json.loads(read_metadata(begun)["settings"])
        if not ctx.common.redo:
            raise Problem(f"{folder} {changed(old, artefact.settings)}. Keep it with --out DIR, or "
                          "start again with --redo.")
    runtime.wait()
    if runtime.rank == 0 and (ctx.common.redo or not begun.is_file()):
        for path in [*folder.glob("records-*.jsonl"), *folder.glob("*.png")]:
            path.unlink()
        write_file(begun, json.dumps(artefact.identity))
    source = settings.generator or str(train_generator(ctx))
    runtime.wait()
    generator = Generator(source, settings, store.class_names, store.data.size, runtime)
    teachers = [fold(load_model(ctx.require(ctx.teacher(i)[1], "teachers"), runtime.device, store))
                for i in range(ctx.recipe.teachers.num_teachers)]
    wanted = ctx.require(ctx.student(settings.student, seed), "distill")
    student = fold(load_model(wanted, runtime.device, store))
    judge = Judge(teachers, student, store, settings)
    if settings.realism < 1:
        judge.threshold = calibrate(generator, store, settings.realism)
    train = store.split("train")
    if settings.like:
        accepted = read_records(ctx.augmented(settings.like, seed).path.parent)
        sources = np.array([r["source"] for r in accepted if r["accepted"]], np.int64)
    else:
        probabilities = predict([student], store, train, replace(runtime, shared=False))[0]
        sources = train[pick_sources(settings, probabilities.softmax(-1), store.labels[train])]
    known = {record["source"] for record in read_records(folder)}
    runtime.wait()  # all have read before any writes
    todo = [int(i) for i in sources if i not in known][runtime.rank :: runtime.world]
    say(f"{ctx.label(artefact)}: {len(sources):,} sources, {len(sources) - len(known):,} to do")
    began, count = time.monotonic(), dict[bool, int]()
    bar = progress(label=str(folder.parent.name), total=len(todo))
    from torch.utils.tensorboard import SummaryWriter

    with contextlib.ExitStack() as stack:
        board = stack.enter_context(SummaryWriter(folder / "tensorboard" / str(runtime.rank)))
        file = stack.enter_context(open(folder / f"records-{runtime.rank}.jsonl", "a"))

        def log(figures: dict[str, Any]) -> None:
            minutes, finished = (time.monotonic() - began) / 60, sum(count.values())
            figures |= {"acceptance": count.get(True, 0) / max(1, finished),
                        "unet_evaluations_per_minute": generator.evaluations / minutes,
                        "images_per_minute": count.get(True, 0) / minutes}
            for key, value in figures.items():
                board.add_scalar(f"augment/{key}", value, generator.evaluations)

        for record in generate(generator, judge, store, todo, seed, log):
            image, good = Image.fromarray(record.pop("image").transpose(1, 2, 0)), io.BytesIO()
            image.save(good, "png")
            prefix = "" if record["accepted"] else "rejected-"
            record["image"] = f"{prefix}{record['source']}.png"
            write_file(folder / record["image"], good.getvalue())
            file.write(json.dumps(record) + "\n")
            file.flush()
            count[record["accepted"]] = count.get(record["accepted"], 0) + 1
            bar.set_postfix(accepted=count.get(True, 0), refresh=False)
            bar.update()
    bar.close()
    runtime.wait()
    if runtime.rank == 0:
        records = sorted(read_records(folder), key=lambda record: record["source"])
        accepted = [r for r in records if r["accepted"]]
        if not accepted:
            raise Problem(f"{folder}: none of {len(records)} sources gave an image that passes: "
                          "raise iterations, step_size or max_student, lower min_teacher, or train "
                          "the generator longer.")
        table_file = io.StringIO(newline="")
        columns = ["image", "label", "split", "source", "seed", "iterations", "teacher_before",
                   "student_before", "teacher", "student", "realism", "generator", "settings"]
        writer = csv.DictWriter(table_file, columns, extrasaction="ignore")
        writer.writeheader()
        common = {"split": "train", "generator": source, "settings": artefact.fingerprint}
        writer.writerows({**record, **common} for record in accepted)
        write_file(folder / "metadata.csv", table_file.getvalue())
        write_file(folder / "sheet.png", draw_sheet(folder, records, generator, store, seed))
        write_file(artefact.path, json.dumps(artefact.identity))
        spent = generator.evaluations / max(1, count.get(True, 0))
        say(f"{ctx.label(artefact)}: {len(accepted):,} of {len(records):,} accepted, {spent:,.0f} "
            f"UNet evaluations each, {time.monotonic() - began:.0f} s")
    runtime.wait()

def read_records(folder: Path) -> list[dict[str, Any]]:
    """Every whole line of records-*.jsonl; a kill may have cut the last one."""
    records = []
    for path in sorted(folder.glob("records-*.jsonl")):
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                records.append(json.loads(line))
    return records

def calibrate(generator: Generator, store: Store, share: float) -> float:
    """Denoising loss that `share` of validation passes; infinite if under 80 % of a group do."""
    losses, groups = [], []
    for cell in range(len(store.cell_names)):
        val = store.split("val")
        members = val[store.cells[val] == cell][:64]
        if len(members):
            labels = torch.from_numpy(store.labels[members]).to(generator.device)
            losses.append(generator.realism(store.raw(members), labels).cpu().numpy())
            groups.append(store.cell_names[cell])
    threshold = float(np.quantile(np.concatenate(losses), share))
    rates = {name: float((loss <= threshold).mean()) for name, loss
             in zip(groups, losses, strict=True)}
    told = ", ".join(f"{name} {100 * rate:.0f} %" for name, rate in rates.items())
    reject = min(rates.values()) >= 0.8
    note = "" if reject else "; under 80 % in a group, so it is reported and nothing is rejected"
    say(f"realism: validation images that pass: {told}{note}")
    return threshold if reject else math.inf

def draw_sheet(folder: Path, records: Sequence[Mapping[str, Any]], generator: Generator,
               store: Store, seed: int) -> bytes:
    """Source, start and result of the best, the median and rejected samples (PNG)."""
    accepted = sorted((r for r in records if r["accepted"]), key=lambda r: -r["score"])
    rejected = sorted((r for r in records if not r["accepted"]), key=lambda r: -r["score"])
    middle = max(0, len(accepted) // 2 - 1)
    chosen = [("best", r) for r in accepted[:3]]
    chosen += [("median", r) for r in accepted[max(middle, 3) : max(middle, 3) + 3]]
    chosen += [("rejected", r) for r in rejected[:3]]
    figure, pyplot = new_figure()
    figure.set_size_inches(1.5 * len(chosen), 5.2)
    axes = figure.subplots(3, len(chosen), squeeze=False)
    for column, (kind, record) in enumerate(chosen):
        key = seed_of(seed, record["source"])
        raw = store.raw(np.array([record["source"]]))
        with torch.no_grad():
            labels = torch.tensor([record["label"]], device=generator.device)
            start = generator.images(generator.begin(raw, key), labels, [key])[0].cpu()
        result = np.asarray(Image.open(folder / record["image"]))
        shown = [raw[0].transpose(1, 2, 0), start.permute(1, 2, 0).float().numpy(), result]
        texts = [f"{kind}\n{store.class_names[record['label']]}",
                 f"t {record['teacher_before']:.2f}  f {record['student_before']:.2f}",
                 f"t {record['teacher']:.2f}  f {record['student']:.2f}"]
        for row, (image, text) in enumerate(zip(shown, texts, strict=True)):
            axes[row, column].imshow(image, interpolation="nearest")
            axes[row, column].set_title(text, fontsize=8)
            axes[row, column].set_xticks([])
            axes[row, column].set_yticks([])
    for row, name in enumerate(("source", "start", "result")):
        axes[row, 0].set_ylabel(name)
    return png(figure, pyplot)

def run_stages(ctx: Context, students: Mapping[str, Distill], sets: Mapping[str, Augment]) -> None:
    """Distil students and make sets of images, in the order in which they need each other."""
    known = replace(ctx, known={**ctx.known, **students}, known_sets={**ctx.known_sets, **sets})
    order = dependencies(students, sets)
    order.prepare()
    while ready := order.get_ready():
        recipe = replace(ctx.recipe, students={k: s for k, s in students.items() if k in ready},
                         augments={k: a for k, a in sets.items() if k in ready})
        run_distill(replace(known, recipe=recipe))
        run_augment(replace(known, recipe=recipe))
        order.done(*ready)

class Found(NamedTuple):
    """A model to be scored: the row of the report it belongs to, its own name, its file."""

    row: str
    name: str
    path: Path

def find_models(ctx: Context) -> tuple[list[Found], list[str]]:
    """Every model of the run directory that stands as the recipe describes it, and the others.

    Students made with flags are not in the recipe: they count if data and parents are as now.
    """
    pairs = [ctx.teacher(i) for i in range(ctx.recipe.teachers.num_teachers)]
    heads = ("ERM", ctx.store.head_name)
    expected = [(f"teachers, {head}", pair[k]) for k, head in enumerate(heads) for pair in pairs]
    expected.append(("biased model", ctx.bias()))
    now = ctx.data_settings() | {f"parent {ctx.label(a)}": a.fingerprint for _, a in expected}
    seeds = {name: set(ctx.recipe.seeds) for name in ctx.recipe.students}
    for path in (ctx.out / "students").glob("*/seed*/model.safetensors"):
        if (number := path.parent.name.removeprefix("seed")).isdecimal():
            seeds.setdefault(path.parent.parent.name, set()).add(int(number))
    for name in [*ctx.recipe.students, *sorted(seeds.keys() - ctx.recipe.students.keys())]:
        for seed in sorted(seeds[name]):
            if name in ctx.recipe.students:
                expected.append((name, ctx.student(name, seed)))
            else:
                path = ctx.out / "students" / name / f"seed{seed}" / "model.safetensors"
                old = json.loads(read_metadata(path).get("settings", "{}"))
                inputs = {k for k in old if k.startswith(("parent teachers", "parent bias"))}
                inputs |= ctx.data_settings().keys()
                settings = {k: v for k, v in old.items() if k not in inputs}
                settings |= {k: now.get(k) for k in inputs}
                expected.append((name, Artefact(path, settings)))
    found, left_out = [], []
    for row, artefact in expected:
        if problem := artefact.mismatch():
            left_out.append(f"{artefact.path} {problem}")
        else:
            found.append(Found(row, ctx.label(artefact), artefact.path))
    return found, left_out

def run_eval(ctx: Context, models: Sequence[Path] = ()) -> None:
    """Score every model found, or those named, by group; write results.json, report.md, figure."""
    store, split, end = ctx.store, ctx.recipe.eval.split, "-models" if models else ""
    found, left_out = [Found(str(path), str(path), path) for path in models], list[str]()
    if not models:
        found, left_out = find_models(ctx)
    if not found:
        raise Problem(f"{ctx.out} holds no model of this recipe: train them with `python grokd.py "
                      f"run {ctx.name}`. Left out: {'; '.join(left_out[:3])} ...")
    runtime = replace(ctx.runtime, shared=ctx.runtime.accelerator.num_processes > 1)
    indices = store.split(split)
    labels, groups = store.labels[indices], store.groups[indices]
    train_counts = store.counts("train")
    by_trunk: dict[str, list[Found]] = {}  # versions of a network with other heads run together
    for model in found:
        trunk = read_metadata(model.path).get("trunk", str(model.path))
        by_trunk.setdefault(trunk, []).append(model)
    logits: dict[Found, Tensor] = {}  # [N, C]
    for members in progress([*by_trunk.values()], "eval"):
        loaded = [load_model(model.path, runtime.device, store) for model in members]
        logits |= zip(members, predict(loaded, store, indices, runtime), strict=True)

    rows: dict[str, list[dict[str, Any]]] = {}
    votes = {f"teachers, {store.head_name}": f"teachers' vote, {store.head_name}"}
    votes |= {name: f"deep ensemble of {name}" for name, student in ctx.recipe.students.items()
              if student.weighting == "one-hot"}
    for row in dict.fromkeys(model.row for model in found):
        members = [model for model in found if model.row == row]
        predicted = {model.name: logits[model].argmax(-1).numpy() for model in members}
        rows[row] = [{"name": name} | group_scores(p == labels, groups, train_counts)
                     for name, p in predicted.items()]
        if row in votes and len(members) > 1:
            vote = majority_vote(torch.stack([logits[model] for model in members]))
            scores = group_scores(vote == labels, groups, train_counts)
            rows[votes[row]] = [{"name": votes[row]} | scores]
    results = {
        "about": origin(ctx.runtime.accelerator.num_processes) | {
            "recipe": ctx.name, "split": split, "seeds": ctx.recipe.seeds,
            "baseline": ctx.recipe.eval.baseline,
            "teacher_seeds": [ctx.recipe.teachers.seed + i
                              for i in range(ctx.recipe.teachers.num_teachers)]},
        "groups": [{"name": name, "images": int(n), "train_images": int(t)} for name, n, t
                   in zip(store.group_names, store.counts(split), train_counts, strict=True)],
        "rows": [{"name": name, "published": ctx.recipe.published.get(name, {}), "members": members}
                 for name, members in rows.items()],
        "left_out": left_out,
        "curves": curves(ctx.recipe),
        "probes": [],
    }
    if ctx.runtime.accelerator.is_main_process:
        if ctx.recipe.eval.probes:
            results["probes"] = probe_models(ctx, by_trunk)
        if results["curves"]:
            write_file(ctx.out / f"curves{end}.png", draw_curves(results))
        write_file(ctx.out / f"results{end}.json", json.dumps(results, indent=1) + "\n")
        write_file(ctx.out / f"report{end}.md", report(results))
        write_file(ctx.out / f"groups{end}.png", draw_groups(results))
        say(report(results), f"Written: report{end}.md, results{end}.json and groups{end}.png in "
            f"{ctx.out}")
    ctx.runtime.accelerator.wait_for_everyone()

def probe_models(ctx: Context, by_trunk: Mapping[str, Sequence[Found]]) -> list[dict[str, Any]]:
    """Accuracy in per cent of linear probes on every layer, for label and attribute, mean over the
    trunks of each kind of model. Features are meaned over positions, fits group-balanced."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    store, scores = ctx.store, dict[str, dict[str, list[float]]]()
    for members in progress([*by_trunk.values()], "probes"):
        model = load_model(members[0].path, ctx.runtime.device, store)
        tap = Tap(model, [*layer_paths(model, store.data.crop)], store.data.crop)
        parts = []
        for part in ("reweighting", "selection"):
            indices, rows = store.split(part), []
            for _ in encode({"": model}, store, indices, ctx.runtime):
                rows.append({k: v.mean((2, 3)).cpu().numpy() for k, v in tap.maps.items()})
            kept = balanced_subset(store.cells[indices], 0)
            features = {k: np.concatenate([row[k] for row in rows])[kept] for k in tap.maps}
            parts.append((features, indices[kept]))
        (fitted, first), (judged, second) = parts
        for layer, x in fitted.items():
            for kind, target in (("label", store.labels), ("attribute", store.attributes)):
                if len(set(target[first])) > 1:
                    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
                    right = probe.fit(x, target[first]).predict(judged[layer]) == target[second]
                    row = scores.setdefault(members[0].row, {})
                    row.setdefault(f"{layer}: {kind}", []).append(100 * float(right.mean()))
    return [{"name": name, "scores": {probe: float(np.mean(values)) for probe, values
                                      in row.items()}} for name, row in scores.items()]

def curves(recipe: Recipe) -> list[dict[str, Any]]:
    """Students that differ in one number alone: {field, label, points: [value, student]}."""
    found = []
    for key in ("tau", "alpha", "gamma", "shrink", "num_teachers", "dfr_share"):
        lines: dict[tuple[str, str], dict[float, str]] = {}
        for name, student in recipe.students.items():
            rest = flatten(student)
            value = rest.pop(key)
            if key == "gamma":  # of one layer; students without features begin every line
                value = value[0] if len(value) == 1 else None
                features = {k: rest.pop(k) for k in FEATURES}
            value = recipe.teachers.num_teachers if (key, value) == ("num_teachers", 0) else value
            if value is not None and student.weighting != "one-hot":
                kind = json.dumps(features) if key == "gamma" and value else ""
                lines.setdefault((json.dumps(rest), kind), {})[value] = name
        for (rest_text, kind), points in lines.items():
            points |= lines.get((rest_text, ""), {}) if kind else {}
            label = json.loads(rest_text)["weighting"]
            label += f", features {json.loads(kind)['feature_weights']}" if kind else ""
            if len(points) > 2:
                found.append({"field": key, "label": label, "points": sorted(points.items())})
    return found

def draw_curves(results: Mapping[str, Any]) -> bytes:
    """Figure of results.json (PNG): WGA against each setting that students differ in."""
    figure, pyplot = new_figure()
    found, rows = results["curves"], {row["name"]: row["members"] for row in results["rows"]}
    fields_ = list(dict.fromkeys(curve["field"] for curve in found))
    columns = min(3, len(fields_))
    lines = math.ceil(len(fields_) / columns)
    figure.set_size_inches(max(5.0, 3.4 * columns), 3.0 * lines)
    axes = figure.subplots(lines, columns, sharey=True, squeeze=False).flatten()
    for axis in axes[len(fields_) :]:
        axis.remove()
    for axis, key in zip(axes, fields_, strict=False):
        for curve in (curve for curve in found if curve["field"] == key):
            points = [(x, *spread([m["wga"] for m in rows[name]])) for x, name in curve["points"]
                      if name in rows]
            axis.errorbar([x for x, _, _ in points], [mean for _, mean, _ in points],
                          [std or 0 for *_, std in points], marker="o", capsize=3,
                          label=curve["label"])
        axis.set_xlabel(key)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    figure.supylabel(f"WGA, % of {results['about']['split']} images (mean ± std)")
    return png(figure, pyplot)

def new_figure() -> tuple[Any, Any]:
    """A matplotlib figure, and pyplot, without a window."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.figure(layout="constrained"), pyplot

def png(figure: Any, pyplot: Any) -> bytes:
    """A finished figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    pyplot.close(figure)
    return buffer.getvalue()

def origin(processes: int = 1) -> dict[str, str]:
    """Where figures come from: command, date, commit, machine, versions."""
    here = str(Path(__file__).parent)
    asked = ["git", "-C", here, "describe", "--always", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or not a clone
        commit = f"grokd {__version__}"
    machine = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        if named := re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()):
            machine = named[1]
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    versions = f"grokd {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    script = Path(sys.argv[0])
    script = Path(script.name) if script.is_absolute() else script
    return {"command": " ".join(["python", str(script), *sys.argv[1:]]),
            "date": time.strftime("%Y-%m-%d"), "commit": commit, "versions": versions,
            "hardware": f"{machine}, {processes} process(es) of {torch.get_num_threads()} threads"}

def report(results: Mapping[str, Any]) -> str:
    """results.json as Markdown: summary, groups, every model, what was left out."""
    facts, groups = results["about"], results["groups"]
    split, names = facts["split"], [group["name"] for group in groups]
    sizes = [[g["name"], str(g["images"]), str(g["train_images"])] for g in groups]
    least = min(g["images"] for g in groups if g["images"])
    single = [[m["name"], *score_cells(m)] for row in results["rows"] for m in row["members"]]
    empty = [(f"Groups without {split} images, left out of every figure", "images"),
             ("Groups without training images", "train_images")]
    notes = [f"{told}: {'; '.join(g['name'] for g in groups if not g[key])}."
             for told, key in empty if not all(g[key] for g in groups)]
    probes = []
    if results["probes"]:
        header = sorted({name for row in results["probes"] for name in row["scores"]})
        lines = [[row["name"], *("–" if (v := row["scores"].get(name)) is None else f"{v:.1f}"
                                 for name in header)] for row in results["probes"]]
        probes = ["## Linear probes", "Group mean, in per cent, of a logistic regression on a "
                  "layer's mean over positions: fitted on group-balanced images of validation, "
                  "scored on others.", table(["", *header], lines)]
    parts = [
        f"# {facts['recipe']}: accuracy by group, {split} images, per cent",
        "Mean ± sample standard deviation over models. WGA: worst-group accuracy; mean: over "
        "images; group mean: over groups; adjusted mean: groups weighted by their share of the "
        f"training images. One image of the smallest group is {100 / least:.3f} points of its "
        "accuracy.",
        summary_table(results), *probes, "## Groups", table(["group", split, "train"], sizes),
        *notes,
        "## Every model", table(["model", *COLUMNS.values(), *names], single),
    ]
    if results["left_out"]:
        parts += ["## Left out", "\n".join(f"- {line}" for line in results["left_out"])]
    seeds = [", ".join(map(str, facts[key])) for key in ("seeds", "teacher_seeds")]
    parts += [f"`{facts['command']}`, {facts['date']}, commit {facts['commit']}, "
              f"{facts['hardware']}, {facts['versions']}; student seeds {seeds[0]}, teacher seeds "
              f"{seeds[1]}."]
    return "\n\n".join(parts) + "\n"

def draw_groups(results: Mapping[str, Any]) -> bytes:
    """Figure of results.json (PNG): accuracy of every group, and the worst marked, by row."""
    figure, pyplot = new_figure()
    rows, names = results["rows"], [group["name"] for group in results["groups"]]
    figure.set_size_inches(8, 1.6 + 0.36 * len(rows))
    axes = figure.subplots()
    colours = pyplot.get_cmap("tab10" if len(names) <= 10 else "viridis", max(len(names), 10))
    places = range(len(rows))
    wga = [spread([m["wga"] for m in row["members"]]) for row in rows]
    axes.barh(places, [mean for mean, _ in wga], xerr=[std or 0 for _, std in wga], height=0.62,
              color="0.85", error_kw={"ecolor": "0.45", "capsize": 3},
              label="worst group (mean ± std)")
    for g, name in enumerate(names):
        values = [np.mean([np.nan if (a := m["groups"][g]) is None else a for m in row["members"]])
                  for row in rows]
        spots = np.array(places) + 0.4 * ((g + 0.5) / len(names) - 0.5)  # none hides another
        axes.scatter(values, spots, s=28, color=colours(g), zorder=3,
                     label=name if len(names) <= 10 else None)
    axes.set_yticks(places, [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 101)
    axes.set_xlabel(f"accuracy, % of {results['about']['split']} images of the group")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return png(figure, pyplot)

# ---- Command line --------------------------------------------------------------------------------

COMMANDS = {
    "teachers": "train the teachers and refit their heads on balanced data (DFR)",
    "bias-model": "train the deliberately biased model, or take a teacher's parent",
    "distill": "train the students",
    "augment": "generate images on which the teachers are sure and a student is wrong",
    "eval": "score everything found, by group, and write the report",
    "run": "all of the above in order",
}
STUDENTS = ("Students to train, by name; all if none is named. A flag that changes a student shows "
            "in its output's name. Values shown here are the first one's.")
SETS = "Sets to make, by name; all if none is named. Otherwise as for --student of distill."
MODELS = "Score just these files, whoever made them."

def overview() -> str:
    """What `--help` prints."""
    lines = [(__doc__ or "").strip(), "", "Commands:"]
    lines += [f"  {name:<12}{text}" for name, text in COMMANDS.items()] + ["", "Recipes:"]
    for path in recipe_files():
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        lines.append(f"  {path.stem:<24}{doc.splitlines()[0] if doc else ''}")
    return "\n".join(lines)

def recipe_files() -> list[Path]:
    """Recipes that have a bare name: those of ./recipes, then those beside this file."""
    folders = [Path("recipes"), Path(__file__).parent / "recipes"]
    files = {path.stem: path for folder in reversed(folders) for path in folder.glob("*.py")}
    return [files[name] for name in sorted(files)]

def load_recipe(name: str) -> Recipe:
    """The recipe of a file, by path or by bare name; of several in `recipes`, NAME:WHICH."""
    known = {path.stem: path for path in recipe_files()}
    file, _, variant = name.partition(":")
    path = Path(file) if Path(file).is_file() else known.get(file)
    if path is None:
        raise Problem(f"Unknown recipe {file!r}{suggest(file, [*known])}")
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.parent.resolve()))  # recipes may build on each other
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        line = next((f.lineno for f in reversed(frames) if f.filename == str(path)), None)
        line = getattr(error, "lineno", line)
        raise Problem(f"{path}, line {line}: {type(error).__name__}: {error}.") from error
    finally:
        sys.path.pop(0)
    variants = getattr(module, "recipes", {})
    if variant and variant not in variants:
        raise Problem(f"{path} has no recipe {variant!r}{suggest(variant, [*variants])}")
    recipe = variants[variant] if variant else getattr(module, "recipe", None)
    if not isinstance(recipe, Recipe):
        raise Problem(f"{path} defines no `recipe = Recipe(...)`.")
    check_recipe(recipe, path.name)
    return recipe

def parse(kind: Any, default: Any, args: Sequence[str], prog: str, description: str) -> Any:
    """tyro, with its boxed errors said in one line."""
    boxed = io.StringIO()
    first = int(os.environ.get("RANK", 0)) == 0
    try:
        with contextlib.redirect_stderr(boxed):
            return tyro.cli(kind, default=default, args=args, prog=prog, description=description,
                            console_outputs=first)
    except SystemExit as end:
        if end.code in (0, None):
            raise
        text = [line.strip(" │") for line in boxed.getvalue().splitlines()]
        text = [line for line in text if line and not set(line) & set("╭╰")]
        rule = next((i for i, line in enumerate(text) if not line.strip("─")), len(text))
        near = [line.split()[0] for line in text[rule:] if line.startswith("--")]
        told = " ".join(text[:rule]).rstrip(".")
        if near and "Perhaps you meant:" in text:
            told += f"; did you mean {' or '.join(dict.fromkeys(near))}?"
        raise Problem(f"{told} (see {prog} --help).") from None

def apply_flags(command: str, recipe: Recipe, name: str,
                args: Sequence[str]) -> tuple[Recipe, Common, tuple[Path, ...]]:
    """The recipe with the command line's flags on top, the common flags, and eval's --models."""
    prog = f"grokd.py {command} {name}"
    text = f"{COMMANDS[command].capitalize()}. Values shown are those of the recipe {name}."
    common = Common(recipe.root, f"runs/{Path(name).stem.replace(':', '-')}", recipe.seeds)
    # Which sections have flags; run's carry the section's name.
    kinds: dict[str, Any] = {"data": Data, "teachers": Teachers, "bias_model": BiasModel,
                             "distill": Distill, "diffusion": Diffusion, "eval": Eval}
    if command == "augment":
        kinds = {"augment": Annotated[Augment, FLAT], "diffusion": Diffusion}
    elif command != "run":
        key = command.replace("-", "_")
        kinds = {key: Annotated[kinds[key], FLAT]}
    options: list[Any] = [*kinds.items(), ("common", Annotated[Common, FLAT])]
    # One section of many: students (distill, run) or sets (augment), all or those picked by name.
    many, flag, told = {"distill": ("students", "student", STUDENTS),
                        "run": ("students", "student", STUDENTS),
                        "augment": ("augments", "set", SETS)}.get(command, ("", "", ""))
    section, names = "augment" if flag == "set" else "distill", [""]
    if many:
        every: Mapping[str, Any] = getattr(recipe, many)
        text += f" Its {flag}s: {', '.join(every)}."
        if not every:
            raise Problem(f"The recipe {name} names no {many}.")
        kind: Any = Annotated[tuple[str, ...], tyro.conf.arg(help=told)]
        options.append((flag, kind, field(default=())))
        # Their values are the defaults that tyro shows, so their names are read before it parses.
        picked = [*every]
        if f"--{flag}" in args:
            picked = list(args[args.index(f"--{flag}") + 1 :])
        names = picked[: next((i for i, a in enumerate(picked) if a.startswith("-")), None)]
    if command == "eval":
        kind = Annotated[tuple[Path, ...], tyro.conf.arg(help=MODELS)]
        options.append(("models", kind, field(default=())))
    flags_type: Any = dataclasses.make_dataclass("Flags", options, frozen=True)
    changed_names: dict[str, str] = {}
    found: dict[str, Any] = {}
    for i, each in enumerate(names):
        if many and each not in every:
            raise Problem(f"Unknown {flag} {each!r}{suggest(each, [*every])}")
        sections = {k: every[each] if k == section and many else getattr(recipe, k) for k in kinds}
        default = flags_type(**sections, common=common)
        flags = parse(flags_type, default, args, prog, text)
        if i == 0 and (told := differences(flatten(default), flatten(flags))):
            say(f"Flags over the recipe: {told}")
        if many:
            before, after = (relevant(x) if isinstance(x, Distill) else flatten(x)
                             for x in (every[each], getattr(flags, section)))
            altered = [f"{k}={v}" for k, v in after.items() if before.get(k) != v]
            new = re.sub(r"[^\w.+=,-]+", "_", "+".join([each, *altered]))
            found[new], changed_names[each] = getattr(flags, section), new
    kept = {k: getattr(flags, k) for k in kinds if k != section}
    kept |= {many: found} if many else {}
    common = flags.common
    check(common, Common, "flags")
    original, recipe = recipe, replace(recipe, **kept, root=common.root, seeds=common.seeds)

    def renamed(value: Any, *names: str) -> Any:  # what refers to a section finds its new name
        new = {n: changed_names.get(getattr(value, n), getattr(value, n)) for n in names}
        return replace(value, **new)

    recipe = replace(
        recipe, students={k: renamed(v, "start", "helper") for k, v in recipe.students.items()},
        augments={k: renamed(v, "student", "like") for k, v in recipe.augments.items()})
    check_recipe(recipe, "flags", original)
    return recipe, common, getattr(flags, "models", ())

def command_line(argv: Sequence[str]) -> None:
    """Find command and recipe, apply flags, do the work."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        say(overview())
        return
    command = argv[0]
    if command not in COMMANDS:
        raise Problem(f"Unknown command {command!r}{suggest(command, [*COMMANDS])}")
    named = len(argv) > 1 and not argv[1].startswith("-")
    name, args = (argv[1], argv[2:]) if named else ("digits", argv[1:])
    loaded = load_recipe(name)
    recipe, common, models = apply_flags(command, loaded, name, args)
    for key, images in recipe.augments.items() if command in ("augment", "run") else ():
        where, sets = images.generator, Path(common.out, "augmented", key)
        made = all((sets / f"seed{seed}" / "done.json").is_file() for seed in recipe.seeds)
        if where.count("/") > 1 and not (made or Path(where).is_dir()):  # a hub id has one at most
            raise Problem(f"augments[{key!r}].generator: there is no folder {where}: name one with "
                          "a diffusers pipeline, or first run the recipe that makes it.")
    began = time.monotonic()
    runtime = Runtime.start(common.precision)
    store = open_store(recipe.data, recipe.root)
    makes = {"run": ["teachers", "bias-model", "students", "augmented", "generator"], "eval": [],
             "distill": ["students"], "augment": ["augmented", "generator"]}
    ctx = Context(name, recipe, store, Path(common.out), runtime, common,
                  makes.get(command, [command]), loaded.students, loaded.augments)
    if command != "eval":
        counts = [store.counts(part) for part in ("train", "reweighting", "selection", "test")]
        rows = [[group, *(str(c[g]) for c in counts)] for g, group in enumerate(store.group_names)]
        header = ["group", "train", "val: reweighting", "val: selection", "test"]
        say("", table(header, rows), "")
    if command in ("teachers", "run"):
        run_teachers(ctx)
    if command in ("bias-model", "run"):
        run_bias_model(ctx)
    if command in ("distill", "augment", "run"):
        run_stages(ctx, recipe.students if command != "augment" else {},
                   recipe.augments if command != "distill" else {})
    if command in ("eval", "run"):
        run_eval(ctx, models)
    memory = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB of memory"
    if torch.cuda.is_available():
        memory += f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB on the GPU"
    say(f"Took {time.monotonic() - began:.0f} s, at most {memory}.")
    runtime.accelerator.end_training()

def main() -> None:
    """Entry point: problems become one line and exit status 1."""
    try:
        command_line(sys.argv[1:])
    except Problem as problem:
        sys.exit(f"error: {problem}")
    except OSError as error:  # from files that libraries write
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        sys.exit(f"error: {error.filename or 'A file'} could not be written ({error.strerror}): "
                 "make room; the same command then goes on from where it was.")
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on from the last checkpoint")

if __name__ == "__main__":
    main()
