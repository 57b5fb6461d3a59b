"""grokd: group-robust knowledge distillation, one script.

A classifier trained on photographs learns shortcuts ("water, so waterbird"), and a small student
distilled from it learns them worse. grokd distils a student from an ensemble of debiased teachers
and weights every teacher, for every sample, by how far its pull on the student departs from that
of a deliberately biased model (AGRE-KD, Kenfack et al., TMLR 2025, arXiv 2411.14984).

    python grokd.py run                           # the embedded digits, everything, CPU, minutes
    python grokd.py run RECIPE                    # the same for recipes/RECIPE.py or any path
    python grokd.py run RECIPE --dry-run          # what that would make, and its cost
    python grokd.py teachers RECIPE               # stage by stage ...
    python grokd.py bias-model RECIPE
    python grokd.py distill RECIPE --student agre --tau 8
    python grokd.py augment RECIPE                # images on which the student is wrong (ConfiG)
    python grokd.py eval RECIPE
    python grokd.py eval RECIPE --models a.safetensors b.safetensors
    python grokd.py export RECIPE                 # the student to ship, as files that need no grokd
    accelerate launch grokd.py run RECIPE         # the same, on several GPUs

Every command takes --help, which shows the recipe's values. To begin with images of your own,
copy recipes/folder.py. Results stand under runs/RECIPE/ (--out changes it): models as
safetensors with torchvision's own keys, report.md, results.json, and TensorBoard logs.

Map of this file; a section uses those above it, never one below:

    Settings                         what a recipe says, and when each field matters
    Random streams                   hashes from which every random draw comes
    AGRE and the other weightings    how much each teacher counts: the heart of the method
    Feature distillation             the same for intermediate layers
    Rivals                           weights of samples; SimKD: a student under its teacher's head
    Head refitting                   DFR: the last layer fitted anew on balanced data
    Scores                           accuracy by group
    Basics                           files, locks, tables, figures, processes
    Data                             rows, the store of decoded images, views, order
    Models                           networks as trunk and head, weights files, layers, prediction
    Target cache                     what frozen networks answer, computed once
    Artefacts                        every file that is made: identity, state, one way to make it
    Fit                              the one training loop
    Stages                           teachers, biased model, students
    Generated images                 a diffusion generator, guided by teachers and student (ConfiG)
    Pages                            what results.json looks like: tables, figures, one web page
    Report                           eval: scores of everything made, which student to ship
    Export                           a network as files for others, checked, with a card
    Checks                           values of a recipe that are wrong or exclude each other
    Dry run                          what `run` would make, and what it would cost
    Command line                     recipes, flags, commands
"""

from __future__ import annotations

import ast
import base64
import contextlib
import copy
import csv
import dataclasses
import difflib
import enum
import errno
import fcntl
import functools
import gc
import graphlib
import hashlib
import html
import importlib.metadata
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import pickle
import platform
import re
import resource
import secrets
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import types
import typing
import unittest.mock
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, is_dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import (
    broadcast,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
    tqdm,
)
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

# torchvision, scikit-learn, TensorBoard and matplotlib are imported where they are used:
# each costs seconds, and --help or a mistyped flag should not have to wait for them.

__version__ = "0.1.0"

# A recipe's `from grokd import ...` must find this module, not load a second copy of it.
sys.modules.setdefault("grokd", sys.modules[__name__])


# ---- Settings ------------------------------------------------------------------------------------


class Problem(Exception):
    """A mistake the user can mend: printed as one line, without a traceback."""

    def __init__(self, text: str) -> None:
        super().__init__(" ".join(text.splitlines()))  # names of files may hold any sign


@dataclass(frozen=True)
class Range:
    """Bounds of a number in a recipe, both included; checked by `check`, which tyro does not do."""

    low: float = -math.inf
    high: float = math.inf


class Not(NamedTuple):
    """A condition of `When`: any value but this one."""

    value: Any


class When:
    """Marks a field that matters only where another field of its section has a certain value.

    When(kind="gce"), When(method=("auto", "l1")), When(weighting=Not("one-hot")), or a function
    of the value: When(gamma=any). Of several conditions in one marker one must hold, of several
    markers all. The condition on a field that does not matter itself does not hold.

    Fingerprints, names of outputs, and warnings of flags without effect follow from it.
    """

    def __init__(self, **conditions: Any) -> None:
        self.conditions = conditions

    def holds(self, section: Any) -> bool:
        """Does one of the conditions hold for the values of `section`?"""
        return any(
            _fulfils(getattr(section, name), condition) and matters(section, name)
            for name, condition in self.conditions.items()
        )

    def __str__(self) -> str:
        words = [f"{name} {_condition(value)}" for name, value in self.conditions.items()]
        return " or ".join(words)


class Needs(When):
    """As When, but any value other than the field's default is refused where it does not hold."""


def _fulfils(value: Any, condition: Any) -> bool:
    if isinstance(condition, Not):
        return value != condition.value
    if isinstance(condition, tuple):
        return any(_fulfils(value, each) for each in condition)
    if callable(condition):
        return bool(condition(value))
    return value == condition


def _condition(condition: Any) -> str:
    """A condition, for messages."""
    if isinstance(condition, Not):
        return f"other than {condition.value}"
    if isinstance(condition, tuple):
        return " or ".join(map(_condition, condition))
    if condition is callable:
        return "a function"
    if condition in (any, bool):
        return "given"
    return "empty" if condition == "" else str(condition)


class Mark(enum.Enum):
    """What else a field says of itself."""

    INERT = enum.auto()  # it does not decide what is made, only how
    HEAD = enum.auto()  # it decides the head alone: networks are trained once for all its values
    CONTENT = enum.auto()  # it may name a file or folder: what counts is what that contains
    CURVE = enum.auto()  # students that differ in it alone are drawn as a curve
    FILLED = enum.auto()  # a tuple that must not be empty
    ADDED = enum.auto()  # younger than finished files: its default leaves fingerprints as they were


class Names(NamedTuple):
    """Marks a field that names a student or a set of images of the recipe."""

    kind: Literal["students", "augments"]


Share = Annotated[float, Range(0, 1)]
NotNegative = Annotated[float, Range(0)]
Rate = Annotated[float, Range(0, 1e30)]  # what float32 holds
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
    attribute: int  # spurious attribute a, 0..A-1; -1: unknown, in training; all 0: no labels
    split: str  # "train", "val" or "test"


@dataclass(frozen=True)
class Data:
    """A data set: where it is, how its images are stored, cropped and split.

    What the table says enters fingerprints as it was read, so the fields that name it are inert.
    """

    # Table of the images, relative to --root. One row an image; its columns are named below.
    metadata: Annotated[str, Mark.INERT] = "metadata.csv"
    # Column with the image file, relative to the folder of the table.
    image_column: Annotated[str, Mark.INERT] = "image"
    # Column with the class: 0, 1, ... or names.
    label_column: Annotated[str, Mark.INERT] = "label"
    # Column with the spurious attribute: 0, 1, ... or names; training images may leave it empty.
    # Without such a column give "": groups are then classes, and DFR balances classes only
    # (CB-LLR), or groups that it infers.
    attribute_column: Annotated[str, Mark.INERT] = "attribute"
    # Column that says which split an image belongs to.
    split_column: Annotated[str, Mark.INERT] = "split"
    # What that column says for training, validation and test.
    split_codes: Annotated[tuple[str, str, str], Mark.INERT] = ("train", "val", "test")
    # A function of the recipe's file, root -> iterable of Row, for data without such a table.
    reader: Annotated[
        tyro.conf.Suppress[Callable[[Path], Sequence[Row]] | None], Mark.INERT
    ] = None
    # Names of the classes; if the table's column holds names, these give them their order. Empty:
    # the column's own in sorted order, or class 0, class 1 ...
    class_names: Annotated[tuple[str, ...], Mark.INERT] = ()
    # Names of the attribute's values, likewise.
    attribute_names: Annotated[tuple[str, ...], Mark.INERT] = ()
    # What is scored: every pair of class and attribute, or two groups, aligned (the attribute
    # bears the class's number, as a digit its own colour) and conflicting.
    groups: Annotated[Literal["pairs", "aligned"], Mark.INERT] = "pairs"
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
    crop_scale: Annotated[tuple[Share, Share], When(random_crop=True)] = (0.7, 1.0)
    # Least and greatest ratio of its width to its height.
    crop_ratio: Annotated[tuple[Positive, Positive], When(random_crop=True)] = (3 / 4, 4 / 3)
    # Train on random horizontal flips. Switch off where left and right matter (digits, text).
    flip: bool = True
    # Share of validation, by group, that refits heads (DFR); the rest may choose epochs.
    reweighting: Annotated[float, Range(0.01, 1)] = 0.5
    # Folder of decoded images and cached targets, shared by all recipes. A disk of the machine
    # itself is fastest.
    store: Annotated[str, Mark.INERT] = "runs/store"
    # Largest store of decoded images; beyond it files stay encoded and are decoded when needed,
    # which costs processor time in every epoch.
    max_store_gb: Annotated[NotNegative, Mark.INERT] = 50.0
    # Most disk space for cached targets; the oldest go first. With all views of a training in the
    # cache, further students do not pay for the teachers.
    cache_gb: Annotated[NotNegative, Mark.INERT] = 20.0


@dataclass(frozen=True)
class Input:
    """What a network is fed. Weights that carry their own normalisation override mean and std;
    timm's also say a size, which counts where none is given here."""

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
    lr: Rate = 1e-3
    # Learning rate over the steps, after the warm-up: cosine falls to 0 at the end.
    schedule: Literal["constant", "cosine"] = "constant"
    # Epochs over which the learning rate rises from 0. A few help transformers.
    warmup_epochs: NotNegative = 0.0
    # SGD is what the papers use for ResNets; transformers want AdamW, with a lower lr.
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: Share = 0.9  # Of SGD, that which refits heads too; AdamW keeps its own.
    weight_decay: Rate = 1e-3  # Raise it if training accuracy is far above validation's.
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
    checkpoint_minutes: Annotated[Positive, Mark.INERT] = 5.0


BALANCED = When(method=Not("afr"))
AFR = When(method="afr")


@dataclass(frozen=True)
class DFR:
    """Deep feature reweighting: the last layer refitted on group-balanced held-out data."""

    # l1: the mean of logistic regressions on balanced subsets (Kirichenko). sgd: balanced
    # sampling (LaBonte; AGRE-KD's teachers). auto: l1 for two classes, else sgd. afr: the learnt
    # head moved towards what it gets wrong, without groups (AFR, Qiu 2023).
    method: Literal["auto", "l1", "sgd", "afr"] = "auto"
    # What is balanced. known: class and attribute, as the data say. Without attributes: inferred,
    # class and whether the biased model is right (uLA); eiil, class and a split of the biased
    # model's logits (EIIL, Creager 2021).
    groups: Annotated[Literal["known", "inferred", "eiil"], BALANCED, Mark.ADDED] = "known"
    # l1: refits that are averaged; one alone costs about a point (second-hand figure).
    num_refits: Annotated[Count, When(method=("auto", "l1"))] = 20
    # l1: inverse penalties tried on one half of the reweighting part, judged on the other.
    penalties: Annotated[tuple[Positive, ...], When(method=("auto", "l1")), Mark.FILLED] = (
        1.0, 0.7, 0.3, 0.1, 0.07, 0.03, 0.01,
    )
    # sgd: passes over the reweighting part.
    epochs: Annotated[Count, When(method=("auto", "sgd"))] = 100
    # afr: how much more an image counts whose label has a low probability. Published: 4 to 20 for
    # Waterbirds, 1 to 3 for CelebA, chosen with group labels. On the digits 4 is too much.
    gamma: Annotated[NotNegative, AFR] = 2.0
    # afr: weight of the squared distance from the learnt head. Published: 0 to .3.
    regularisation: Annotated[NotNegative, AFR] = 0.1
    lr: Annotated[Rate, AFR] = 0.01  # afr: learning rate. Published: .01 and .02.
    steps: Annotated[Count, AFR] = 500  # afr: of gradient descent. Published: 500 and 1,000.

    @property
    def infers_groups(self) -> bool:
        """Does it balance groups that the biased model tells apart?"""
        return self.method != "afr" and self.groups != "known"


@dataclass(frozen=True)
class Teachers:
    """The ensemble: networks trained alike but for seed or architecture, then refitted (DFR)."""

    # Teachers in the ensemble. AGRE-KD: 10, and 5 in its ablations. Cost grows in proportion.
    num_teachers: Annotated[Count, Mark.INERT] = 5
    # Architecture, by torchvision's name, by timm's (timm:convnextv2_tiny; needs the extra timm),
    # one of cnn2, resnet8, resnet8_gn (16 to 32 pixels), or clip:..., as recipes/clip_teacher.py
    # prints it. Several are dealt out in turn.
    arch: Annotated[tuple[str, ...], Mark.FILLED] = ("resnet50",)
    # Initial weights: random, DEFAULT (torchvision's or timm's), another name of torchvision's
    # (IMAGENET1K_V2) or a file of yours (.safetensors, .pth). Several are dealt out in turn. With
    # --epochs 0 they stay.
    weights: Annotated[tuple[str, ...], Mark.CONTENT, Mark.FILLED] = ("DEFAULT",)
    # Teachers that are finished, by number: their weights stay, only their heads are refitted. The
    # classes of such a file are those of the data, in their order.
    finished: Annotated[tuple[Natural, ...], Mark.INERT] = ()
    seed: Natural = 0  # Seed of the first teacher; teacher i has seed + i.
    dfr: Annotated[DFR, Mark.HEAD] = DFR()  # How heads are refitted.
    input: Annotated[Input, FLAT] = Input()
    train: Annotated[Train, FLAT] = Train()

    def of(self, i: int) -> Teachers:
        """The section of teacher i alone: its architecture, initial weights and seed."""
        arch = self.arch[i % len(self.arch)]
        weights = self.weights[i % len(self.weights)]
        train = replace(self.train, epochs=0) if i in self.finished else self.train
        return replace(self, arch=(arch,), weights=(weights,), seed=self.seed + i, train=train)


@dataclass(frozen=True)
class BiasModel:
    """The model to depart from: it has learnt the shortcut, and no head of it is refitted."""

    # teacher: the network a teacher was before DFR (AGRE-KD's choice, and free). erm: one trained
    # for the purpose. early-stopped: the same, cut short. gce: generalised cross-entropy, which
    # amplifies the bias.
    kind: Literal["teacher", "erm", "early-stopped", "gce"] = "teacher"
    teacher: Annotated[Natural, When(kind="teacher")] = 0  # teacher: which one.
    # teacher: several, whose mean logits a student departs from (a descendant of AGRE-KD's code).
    # Empty: that one alone.
    teachers: Annotated[tuple[Natural, ...], When(kind="teacher")] = ()
    # gce: exponent q of (1 - p_y^q) / q.
    q: Annotated[float, Range(1e-3, 1), When(kind="gce")] = 0.7
    # early-stopped: epochs after which training stops.
    stop_after: Annotated[Count, When(kind="early-stopped")] = 1
    # Architecture, as a teacher's. AGRE-KD found the choice to matter little.
    arch: Annotated[str, When(kind=Not("teacher"))] = "resnet50"
    # Initial weights: random, DEFAULT (torchvision's or timm's), another name of torchvision's, or
    # a file of yours.
    weights: Annotated[str, Mark.CONTENT, When(kind=Not("teacher"))] = "DEFAULT"
    seed: Annotated[Natural, When(kind=Not("teacher"))] = 0  # Seed of its training.
    input: Annotated[Input, FLAT, When(kind=Not("teacher"))] = Input()
    train: Annotated[Train, FLAT, When(kind=Not("teacher"))] = Train()


WeightingName = Literal[
    "agre", "departure", "average", "random", "ae-kd", "eb-kd", "ca-mkd", "one-hot"
]
# A weighting of a recipe's own, see `Weigh`, can stand in the recipe but not on the command line.
NAMED_ON_COMMAND_LINE = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="{" + ",".join(typing.get_args(WeightingName)) + "}",
    instance_from_str=lambda texts: texts[0],
    is_instance=lambda value: isinstance(value, str) or callable(value),
    str_from_instance=lambda value: [getattr(value, "__name__", value)],
    choices=typing.get_args(WeightingName),
)
TAUGHT = When(weighting=Not("one-hot"))
KD = When(loss="kd")
WITH_FEATURES = When(gamma=any)


@dataclass(frozen=True)
class Distill:
    """One student and how it learns."""

    # Weights of the teachers. agre: sample by sample, by how far a pull departs from the biased
    # model's. departure: those alike whose answers to the training images depart from the biased
    # model's, the others not at all (ours). average: equal (AVER). random: one teacher a batch.
    # ae-kd: their gradients' least common norm, once a batch. eb-kd: by certainty. ca-mkd: by
    # agreement with the label. one-hot: no teachers, labels only. A recipe may give a function of
    # its own.
    weighting: Annotated[
        WeightingName | Callable[[Tensor, Ensemble, Batch], Tensor], NAMED_ON_COMMAND_LINE
    ] = "agre"
    # What is distilled. kd: softened answers. simkd: the last map, through a projector to a
    # teacher's width, under that teacher's head; no labels (SimKD, Chen 2022; with sample_weights
    # jtt DeTT, Lee 2023). It takes weighting average: mean map and head of teachers that began with
    # the same pretrained weights, of others the first teacher alone (ours).
    loss: Annotated[Literal["kd", "simkd"], Mark.ADDED] = "kd"
    # Share of the distillation loss; the rest is cross-entropy with the labels.
    alpha: Annotated[Share, TAUGHT, KD, Mark.CURVE] = 1.0
    # Temperature of the softmax. AGRE-KD's accuracy grows slowly with it, from 1 to 10.
    tau: Annotated[float, Range(1e-3, 1e3), TAUGHT, KD, Mark.CURVE] = 4.0
    # Weights of samples: a factor on the distillation loss of each, not on labels or features. jtt:
    # more for what the biased model gets wrong (JTT, Liu 2021). dedier: more for what a readout of
    # the student's layer1 is sure of and gets wrong, anew after each epoch (DeDiER, 2310.18590).
    # group-dro: more for groups of great loss (Sagawa 2020); needs attributes in training.
    sample_weights: Annotated[
        Literal["none", "jtt", "dedier", "group-dro"], TAUGHT, Mark.ADDED
    ] = "none"
    # jtt: the factor. Published for labels: 100 (Waterbirds), 50 (CelebA, DeTT). Soft targets ask
    # for less: try 5 to 20 (ours). Lower lr if the loss jumps or stays high: steps grow with it.
    upweight: Annotated[NotNegative, When(sample_weights="jtt"), Mark.CURVE] = 20.0
    # dedier: alpha of exp(beta margin^alpha). Published: .05 (Waterbirds), .1 (CelebA).
    readout_alpha: Annotated[NotNegative, When(sample_weights="dedier"), Mark.CURVE] = 0.05
    # dedier: beta. Published, at tau 3: 4 (Waterbirds), 3.5 (CelebA). As for upweight: lower lr, or
    # this, if the loss stays high.
    readout_beta: Annotated[NotNegative, When(sample_weights="dedier"), Mark.CURVE] = 4.0
    # group-dro: step size eta of the groups' shares. Raise it if the worst group stays behind.
    dro_step: Annotated[NotNegative, When(sample_weights="group-dro"), Mark.CURVE] = 0.01
    # agre: gradients compared, per sample with respect to the logits (equals the last layer, no
    # backward pass) or all parameters (C backward passes), or once per batch over all parameters.
    space: Annotated[Literal["logits", "parameters", "batch"], When(weighting="agre")] = "logits"
    # agre: compare directions (cosine) rather than gradients; without it accuracy falls.
    normalise: Annotated[bool, When(weighting="agre")] = True
    # agre: a sample on which no teacher departs counts all teachers alike, or is left out.
    zero: Annotated[
        Literal["uniform", "drop"], When(weighting=("agre", callable), feature_weights="agre")
    ] = "uniform"
    # agre: W <- (1 - shrink) W + shrink, from agre (0) to average (1).
    shrink: Annotated[
        Share, When(weighting="agre", feature_weights="agre"), Mark.CURVE
    ] = 0.0
    # departure: teachers below the greatest gap in departure do not count, if it is more than this
    # factor (ours; see `departing`). Lower it if biased teachers are kept, raise it if good ones
    # are not.
    departure_gap: Annotated[
        float, Range(1), When(weighting=("departure", callable)), Mark.CURVE
    ] = 2.5
    # Weighted mean of losses (for this loss: of softened probabilities), or loss to the weighted
    # mean of logits.
    combine: Annotated[Literal["losses", "logits"], TAUGHT, KD] = "losses"
    # Weight of feature distillation, for each of `layers`; 0 costs nothing. Try .25 to 1 on pooled,
    # less on layers; around 1000 for attention, .8 for contrastive.
    gamma: Annotated[tuple[NotNegative, ...], TAUGHT, KD, Mark.CURVE] = (0.0,)
    # agre: a sample's mean weight multiplies its label's loss too (a descendant of AGRE-KD's code).
    weigh_labels: Annotated[bool, When(weighting="agre"), When(alpha=Not(1.0))] = False
    # Layers compared: layer1 ... layer4 (last output at stride 4, 8, 16, 32; small networks' own
    # stages), pooled, or paths of modules; STUDENT=TEACHER where the two differ.
    layers: Annotated[tuple[str, ...], WITH_FEATURES] = ("pooled",)
    # Distance of features: squared, through a linear adapter (a middle layer: FitNets); between
    # attention maps (Zagoruyko 2017); or InfoNCE of 128-d projections within the batch.
    feature_loss: Annotated[Literal["mse", "attention", "contrastive"], WITH_FEATURES] = "mse"
    # mse: teachers count alike, by departure from the biased model, or samples by the teachers'
    # disagreement, or dimensions by their agreement.
    feature_weights: Annotated[
        Literal["uniform", "agre", "disagree", "agree"], WITH_FEATURES, Needs(feature_loss="mse")
    ] = "uniform"
    # agre: compare gradients with respect to the student's feature, or to the adapted one. auto:
    # adapted where teachers share an adapter.
    feature_space: Annotated[
        Literal["auto", "student", "adapted"], When(feature_weights="agre")
    ] = "auto"
    # One adapter a layer, or one for each teacher. auto: shared between teachers of equal widths
    # that began with the same pretrained weights, whose channels correspond.
    adapters: Annotated[Literal["auto", "shared", "per-teacher"], When(feature_loss="mse")] = "auto"
    # mse: channels left out, both sides.
    feature_dropout: Annotated[
        float, Range(0, 0.99), WITH_FEATURES, Needs(feature_loss="mse")
    ] = 0.0
    # Head of the finished student: its own, or one refitted by DFR as the teachers' are.
    head: Annotated[Literal["own", "dfr"], Mark.HEAD] = "own"
    # Teachers used, the first ones; 0: all.
    num_teachers: Annotated[Natural, TAUGHT, Mark.CURVE] = 0
    # Share of them with a DFR head, the first ones; the others are plain ERM.
    dfr_share: Annotated[Share, TAUGHT, Mark.CURVE] = 1.0
    # Architecture, by torchvision's name, by timm's (timm:convnextv2_tiny; needs the extra timm) or
    # one of cnn2, resnet8, resnet8_gn (16 to 32 pixels).
    arch: str = "resnet18"
    # Initial weights: random, DEFAULT (torchvision's or timm's), another name of torchvision's, or
    # a file of yours.
    weights: Annotated[str, Mark.CONTENT, When(start="")] = "DEFAULT"
    # Train on this set of generated images too.
    augmented: Annotated[str, Names("augments")] = ""
    # Generated images an epoch as a share of the training images; 0: each of them once.
    augmented_ratio: Annotated[NotNegative, When(augmented=bool)] = 0.0
    # Go on from the student of this name, rather than from `weights`.
    start: Annotated[str, Names("students")] = ""
    # Show rare images more often, as often as the commonest: groups, classes, or within each class
    # the smaller of two clusters of a helper's loss histories (TAB, Espinosa Zarlenga 2024).
    rebalance: Literal["none", "groups", "classes", "tab"] = "none"
    # tab: a one-hot student that was trained on the same images; empty: the biased model.
    helper: Annotated[str, Names("students"), When(rebalance="tab")] = ""
    # How a head is refitted, with head dfr.
    dfr: Annotated[DFR, Mark.HEAD, When(head="dfr")] = DFR()
    input: Annotated[Input, FLAT] = Input()
    train: Annotated[Train, FLAT] = Train(schedule="cosine", weight_decay=1e-4)

    @property
    def weighting_name(self) -> str:
        """The weighting as tables and file names have it."""
        return getattr(self.weighting, "__name__", str(self.weighting))

    @property
    def has_teachers(self) -> bool:
        return self.weighting != "one-hot"

    @property
    def has_features(self) -> bool:
        """Does it distil features?"""
        return self.has_teachers and self.loss == "kd" and any(self.gamma)

    @property
    def weighs_samples(self) -> bool:
        """Does it weigh the samples?"""
        return self.has_teachers and self.sample_weights != "none"

    @property
    def has_biased(self) -> bool:
        """Does it compare its teachers, or the labels, with the biased model? A recipe's own
        weighting may."""
        by_features = self.has_features and self.feature_weights == "agre"
        by_samples = self.weighs_samples and self.sample_weights == "jtt"
        by_weighting = self.weighting in ("agre", "departure") or callable(self.weighting)
        return by_weighting or by_features or by_samples

    @property
    def infers_groups(self) -> bool:
        """Does its head need the biased model?"""
        return self.head == "dfr" and self.dfr.infers_groups

    @property
    def has_departures(self) -> bool:
        """Does its weighting know the teachers' departures? A recipe's own may."""
        return self.weighting == "departure" or callable(self.weighting)

    @property
    def in_batch_space(self) -> bool:
        """Does it compare its teachers' gradients of a whole batch?"""
        return self.weighting == "agre" and self.space == "batch"

    @property
    def keeps_graph(self) -> bool:
        """Does its weighting go through the student's graph, before the loss? One's own may."""
        return self.in_batch_space or callable(self.weighting)

    @property
    def needs_whole_batches(self) -> bool:
        """Does a loss of it depend on the batch as a whole?"""
        by_gradients = self.weighting == "ae-kd" or self.in_batch_space
        by_features = self.feature_weights == "disagree" or self.feature_loss == "contrastive"
        by_groups = self.weighs_samples and self.sample_weights == "group-dro"
        return by_gradients or (self.has_features and by_features) or by_groups


@dataclass(frozen=True)
class Diffusion:
    """The generator that `augment` trains where a set names none: a DDPM of pixels (Ho et al. 2020)
    that predicts v (Salimans and Ho 2022) on the cosine schedule (Nichol and Dhariwal 2021)."""

    # Passes over the training images. More if generated images look like noise.
    epochs: Natural = 300
    batch_size: Count = 64  # Images a step, over all processes.
    lr: Positive = 1e-3  # Of AdamW; falls to 0 on a cosine.
    # Channels at full, half, quarter ... resolution.
    widths: Annotated[tuple[Count, ...], Mark.FILLED] = (64, 128, 128)
    num_timesteps: Count = 1000  # Noise levels.
    class_conditional: bool = True  # Tell the generator the class.
    ema: Share = 0.999  # Decay of the moving average of weights, which is what is kept.
    seed: Natural = 0  # Of weights and noise.
    # Images at once; lower it if memory runs out. 0: all.
    micro_batch: Annotated[Natural, Mark.INERT] = 0
    # Save a checkpoint at least this often.
    checkpoint_minutes: Annotated[Positive, Mark.INERT] = 1.0


GUIDED = When(guided=True)
OWN_SOURCES = When(guided=True, like="")


@dataclass(frozen=True)
class Augment:
    """One set of images on which the teachers are sure and a student is wrong (ConfiG)."""

    # The student whose mistakes are sought, seed by seed.
    student: Annotated[str, Names("students")] = "average"
    # Guide the generator by teachers and student. False: its plain images, to compare with.
    guided: bool = True
    # Not guided: one image for each that this guided set accepted.
    like: Annotated[str, Names("augments"), Needs(guided=False)] = ""
    # Folder or hub id of a diffusers pipeline: UNet2DModel on pixels, Stable Diffusion 1.x, 2.x or
    # SD-Turbo. Empty: one trained here (section diffusion).
    generator: Annotated[str, Mark.CONTENT] = ""
    scheduler: str = "DDIMScheduler"  # By diffusers' name; empty: the pipeline's own.
    steps: Annotated[int, Range(1, 50)] = 6  # Denoising steps after the latent.
    # Noise put on the source image; 1: start from noise alone. Little keeps layout and colours.
    strength: Annotated[float, Range(0.01, 1)] = 0.67
    prompt: str = "a photo of a {}"  # Stable Diffusion: text for a class.
    # Stable Diffusion: classifier-free guidance; 1 or less: none, as diffusers has it.
    guidance_scale: NotNegative = 1.0
    # What is maximised over latents, of teachers' t_y and student's f_y: t^exponent +
    # (1 - f)^exponent, log t + log(1 - f), or the sum of logit margins.
    objective: Annotated[Literal["power", "log", "margin"], GUIDED] = "power"
    # power; with 2 (second-hand) it starts on a plateau.
    exponent: Annotated[Positive, When(objective="power")] = 1.0
    # normalised: steps of a fixed share of the latent's norm along the gradient. nesterov: ReNO's.
    optimizer: Annotated[Literal["normalised", "adam", "nesterov"], GUIDED] = "normalised"
    step_size: Annotated[Positive, GUIDED] = 0.1  # Try .05 for adam, 5 for nesterov.
    iterations: Annotated[Natural, GUIDED] = 30  # Most steps for an image.
    # Latent's norm: kept, drawn to a Gaussian's (ReNO, weight .01), or free.
    norm: Annotated[Literal["keep", "regularise", "free"], GUIDED] = "keep"
    # Random crops shown to the networks in guidance, beside the image.
    cutouts: Annotated[Natural, GUIDED] = 0
    # Standard deviation of noise added to what they are shown.
    noise: Annotated[NotNegative, GUIDED] = 0.0
    # Least confidence of the teachers' mean in the class.
    min_teacher: Annotated[Share, GUIDED] = 0.8
    max_student: Annotated[Share, GUIDED] = 0.5  # Greatest confidence of the student in it.
    # Share of validation images whose denoising loss passes as real; 1: not judged.
    realism: Share = 0.95
    # Training images to start from, by the student's confidence f_y (least-certain: max p).
    sources: Annotated[
        Literal["least-confident", "least-certain", "most-confident", "misclassified", "all"],
        OWN_SOURCES,
    ] = "least-confident"
    # Share of the training images taken; of the misclassified all are.
    share: Annotated[
        Share, When(sources=("least-confident", "least-certain", "most-confident"))
    ] = 0.5
    count: Annotated[Natural, OWN_SOURCES] = 0  # How many are taken; 0: the share.
    balanced: Annotated[bool, OWN_SOURCES] = False  # As many of each class.
    in_flight: Annotated[Count, Mark.INERT] = 64  # Images optimised together.
    # Of these, how many pass through the networks at once; fewer if memory runs out. 0: as many as
    # it holds by an estimate, which is printed.
    micro_batch: Annotated[Natural, Mark.INERT] = 0


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
    # Students' error taken apart, agreement with their teachers, weights of these by group, and
    # features that tell groups apart, with a sheet of images. Takes a while.
    analysis: bool = False


@dataclass(frozen=True)
class Export:
    """What is shipped: a finished network, as files that need no grokd."""

    # The student, by name; empty: the one that the report recommends. Of its seeds the one is taken
    # that has the best worst-group accuracy on the selection part.
    student: Annotated[str, Mark.INERT, When(model="")] = ""
    # A weights file of grokd's that is written instead of a student.
    model: Annotated[str, Mark.CONTENT] = ""
    # safetensors: weights with torchvision's keys. onnx: a graph, for onnxruntime. pt2: a program
    # of torch.export. onnx and int8 need the extra export.
    format: tuple[Literal["safetensors", "onnx", "pt2"], ...] = ("safetensors", "onnx", "pt2")
    int8: bool = False  # Write a graph of 8-bit integers too, model.int8.onnx.
    # int8: validation images that set its ranges, the same number of every group that has so many.
    calibration: Annotated[Count, When(int8=True)] = 256
    # int8: points of worst-group accuracy that it may lose; with more nothing is written.
    max_wga_loss: Annotated[NotNegative, When(int8=True)] = 2.0
    # Test images on which every file is compared with the network; 0: all.
    num_images: Natural = 0


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
    export: Export = Export()
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
    # Arithmetic. launch: what `accelerate launch --mixed_precision` says, else float32. On NVIDIA
    # GPUs float32 means TF32 in convolutions, float32 in matrix products; bfloat16 is faster still.
    precision: Literal["launch", "float32", "bfloat16", "float16", "float64"] = "launch"
    # With several processes: each trains whole models, or all share the batches of one. auto:
    # models where there are more of them than processes.
    parallel: Literal["auto", "models", "data"] = "auto"
    # Make again what was made with other settings (deletes it), or even with the same.
    redo: bool = False
    # Insist on going on: an error where nothing of the command was begun. (What was begun is gone
    # on with anyway.)
    resume: bool = False


class Setting(NamedTuple):
    """A field of a section, or of a section within it."""

    name: str  # as a flag has it, dotted; sections marked FLAT add no prefix
    value: Any
    default: Any
    marks: frozenset[Mark]
    active: bool  # does it matter, given the values of the others?
    needs: tuple[Needs, ...]  # of these, which do not hold
    whens: tuple[When, ...]  # likewise
    names: str  # "students" or "augments", if it names one


@functools.cache
def hints_of(kind: Any) -> dict[str, Any]:
    """The types of a section's fields, with their markers."""
    return typing.get_type_hints(kind, include_extras=True)


def markers(hint: Any, kind: Any) -> list[Any]:
    """Markers of one kind on a field's type."""
    found = typing.get_args(hint)[1:] if typing.get_origin(hint) is Annotated else ()
    return [marker for marker in found if isinstance(marker, kind)]


def matters(section: Any, name: str) -> bool:
    """Does a field matter, given the values of the others?"""
    kind: Any = type(section)
    return all(when.holds(section) for when in markers(hints_of(kind)[name], When))


def settings_in(section: Any, prefix: str = "", outer: Setting | None = None) -> Iterator[Setting]:
    """Every field of a section, those of sections within it included."""
    kind: Any = type(section)
    for item in dataclasses.fields(section):
        hint, value = hints_of(kind)[item.name], getattr(section, item.name)
        flat = FLAT in typing.get_args(hint)
        name = prefix if flat else f"{prefix}.{item.name}".removeprefix(".")
        failing = [when for when in markers(hint, When) if not when.holds(section)]
        setting = Setting(
            name, value, item.default,
            marks=frozenset(markers(hint, Mark)) | (outer.marks if outer else set()),
            active=not failing and (outer is None or outer.active),
            needs=tuple(when for when in failing if isinstance(when, Needs)),
            whens=tuple(failing) or (outer.whens if outer else ()),
            names=next((marker.kind for marker in markers(hint, Names)), ""),
        )
        if is_dataclass(value):
            yield from settings_in(value, name, setting)
        else:
            yield setting


def plain(value: Any) -> Any:
    """A setting as JSON holds it: tuples as lists, functions by name."""
    if isinstance(value, tuple):
        return [plain(each) for each in value]
    return getattr(value, "__name__", repr(value)) if callable(value) else value


def flatten(section: Any) -> dict[str, Any]:
    """A section as {flag name: plain value}, whether the values matter or not."""
    return {setting.name: plain(setting.value) for setting in settings_in(section)}


# ---- Random streams ------------------------------------------------------------------------------


class Stream:
    """Names of random streams: keys that keep draws for different purposes apart.

    Their values stay as they are: every published figure rests on them.
    """

    AREA = 0  # of a random crop; ten tries, AREA + 0 to 9
    RATIO = 10  # likewise
    LEFT = 20
    TOP = 21
    FLIP = 99
    HALVES = 0  # DFR: the halves on which the penalty is chosen,
    FIRST_HALF = 1  # the balanced part of the first one,
    REFIT = 2  # the subset of each refit,
    DRAWS = 3  # and the draws of balanced sampling
    SPLIT = 4  # where EIIL's split begins
    TEACHER = 1  # the one teacher of a batch
    ADAPTERS = 7  # initial weights
    DROPOUT = 8  # channels left out of feature distillation
    READOUT = 11  # initial weights and order of DeDiER's readout
    GUIDANCE = 5  # noise shown to the networks in guidance
    DIFFUSION = 6  # noise of the generator's training,
    LEVEL = 7  # and its levels
    REALISM = 9  # noise of the realism test


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


def noise_like(shape: Sequence[int], dtype: torch.dtype, *keys: int) -> Tensor:
    """Normal noise, a function of the keys alone."""
    source = torch.Generator().manual_seed(seed_of(*keys))
    return torch.randn(tuple(shape), generator=source, dtype=dtype)


# ---- AGRE and the other weightings ---------------------------------------------------------------


class Ensemble(NamedTuple):
    """What frozen networks answer to a batch."""

    teachers: Tensor  # logits [M, b, C]
    biased: Tensor | None  # logits [b, C], if the student compares its teachers with it
    departures: Departures | None = None  # of the teachers, over the whole training set


@dataclass(frozen=True)
class Batch:
    """What a loss sees of one step: this process's part of a total batch."""

    settings: Any  # the section of what is trained, of a student Distill
    model: nn.Module
    images: Tensor  # [b, 3, crop, crop] in 0..1
    labels: Tensor  # [b], or of mixed images [b, C]
    positions: np.ndarray  # [b], places in the training set
    total: int  # samples of the total batch
    step: int
    seed: int
    runtime: Runtime
    # Logits [b, C] with gradient, of a generator its prediction; empty before the forward pass.
    output: Tensor = field(default_factory=lambda: torch.empty(0))
    first: int = 0  # place of the first image in this process's share of the total batch

    def mean(self, part: Tensor) -> Tensor:
        """This process's sum over samples as the mean over the total batch."""
        if self.in_vain:
            part = torch.zeros_like(part)
        return self.runtime.sum(part) / self.total

    @property
    def in_vain(self) -> bool:
        """Whether this process shows an image that is not of the batch, to keep step with others:
        there are more processes than images."""
        return self.runtime.rank >= self.total


# The loss of each sample [b], with figures to log, of shape [..., b]; they are averaged over the
# epoch.
Losses = Callable[[Batch], tuple[Tensor, dict[str, Tensor]]]
# A weighting: the student's logits [b, C], what its teachers answer, the batch -> float64 [M, b],
# without gradient. Only ratios between the teachers of a sample count.
Weigh = Callable[[Tensor, Ensemble, Batch], Tensor]
# Weights [b] of a batch's samples, from the batch and its distillation losses [b].
WeighSamples = Callable[[Batch, Tensor], Tensor]

# float32 logits may be finite and so large that their differences are not; nothing real is
# anywhere near, and beyond this bound every softmax is one-hot already.
LARGEST_LOGIT = 1e15


def bounded_logits(logits: Tensor) -> Tensor:
    return logits.clamp(-LARGEST_LOGIT, LARGEST_LOGIT)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Per-sample cross-entropy [B] of logits [B, C] with labels [B], or shares of them [B, C]."""
    return F.cross_entropy(logits, labels, reduction="none")


def gce(logits: Tensor, labels: Tensor, q: float) -> Tensor:
    """Generalised cross-entropy (1 - p_y^q) / q per sample [B] (Zhang 2018; LfF, Nam 2020)."""
    return (1 - torch.exp(-q * cross_entropy(logits, labels))) / q


def kd_losses(student: Tensor, teachers: Tensor, tau: float) -> Tensor:
    """tau^2 KL(p_t || p_s) per teacher and sample (Hinton 2015; AGRE-KD's l_t).

    student [B, C], teachers [..., B, C] (logits) -> [..., B].
    """
    log_p = F.log_softmax(bounded_logits(student) / tau, -1)
    p = F.softmax(bounded_logits(teachers) / tau, -1)
    return tau**2 * F.kl_div(log_p.expand_as(p), p, reduction="none").sum(-1)


def logit_gradients(student: Tensor, teachers: Tensor, tau: float) -> Tensor:
    """p_s - p_t in float64: the gradient of `kd_losses` with respect to the logits, over tau."""
    p_s = F.softmax(bounded_logits(student.detach().double()) / tau, -1)
    p_t = F.softmax(bounded_logits(teachers.detach().double()) / tau, -1)
    return p_s - p_t


def agre(student: Tensor, ensemble: Ensemble, batch: Batch) -> Tensor:
    """AGRE-KD's weights in the space that the student's settings name (Kenfack et al. 2025)."""
    settings, teachers, biased = batch.settings, ensemble.teachers, ensemble.biased
    assert biased is not None
    if settings.space == "batch":
        parameters = [*trained_parameters(batch.model).values()]
        targets = torch.cat([teachers, biased[None]])
        if batch.in_vain:  # it asks for nothing, and gives its share of what others ask for
            targets = student.detach().expand_as(targets)
        weights = batch_weights(
            student, targets, parameters, settings.tau, settings.normalise,
            lambda part: batch.runtime.sum(part) / batch.total, batch.runtime.largest,
        )
        return weights[:, None].expand(teachers.shape[:2])
    gram = None
    if settings.space == "parameters":
        student, gram = logit_gram(batch.model, batch.images)
    return agre_weights(student, teachers, biased, settings.tau, settings.normalise, gram)


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
    k_t, k_b = d_t, d_b
    if gram is not None:
        k_t = torch.einsum("mbc,bcd->mbd", d_t, gram.double())
        k_b = torch.einsum("bc,bcd->bd", d_b, gram.double())
    if not normalise:
        return (1 - tau**2 * (k_t * d_b).sum(-1)).clamp(min=0)
    square_t = (k_t * d_t).sum(-1)
    square_b = (k_b * d_b).sum(-1)
    nil = (d_t.norm(dim=-1) < 1e-6) | (d_b.norm(dim=-1) < 1e-6)
    nil |= (square_t <= 0) | (square_b <= 0)
    # 1 - cos = |u_t - u_b|^2 / 2 keeps its digits where the two nearly agree.
    scale_t = torch.where(nil, 1, square_t).rsqrt().unsqueeze(-1)
    scale_b = torch.where(square_b > 0, square_b, 1).rsqrt().unsqueeze(-1)
    u = d_t * scale_t - d_b * scale_b
    k_u = k_t * scale_t - k_b * scale_b
    weights = (u * k_u).sum(-1) / 2
    return floored(weights, nil)


def floored(weights: Tensor, nil: Tensor) -> Tensor:
    """AGRE weights within [0, 2]: under 1e-5 they count as 0, and where a gradient is nil as 1."""
    weights = torch.where(weights < 1e-5, 0, weights)
    return torch.where(nil, 1, weights.clamp(max=2))


def trained_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that are trained, without the adapters of feature distillation."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not name.startswith("adapters.")
    }


def logit_gram(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Per-sample logits [B, C] and K = J J^T [B, C, C] over all parameters, in eval mode.

    J [C, P] is the Jacobian of a sample's logits with respect to the parameters, batch norm on its
    running statistics: C backward passes per sample, whatever the number of teachers.
    """
    was_training = model.training
    model.eval()
    parameters = {name: value.detach() for name, value in trained_parameters(model).items()}
    rest = {k: v.detach() for k, v in model.named_parameters() if k not in parameters}
    rest |= dict(model.named_buffers())

    def logits(parameters: dict[str, Tensor], image: Tensor) -> tuple[Tensor, Tensor]:
        output = torch.func.functional_call(model, (parameters, rest), (image[None],))[0]
        return output, output.detach()

    jacobian = torch.func.vmap(torch.func.jacrev(logits, has_aux=True), in_dims=(None, 0))
    size = sum(value.numel() for value in parameters.values()) * typing.cast(Any, model).num_classes
    chunk = max(1, 2**27 // size)  # Jacobians of at most half a gigabyte in float32
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
    student: Tensor, targets: Tensor, parameters: Sequence[Tensor], tau: float, normalise: bool,
    mean: Callable[[Tensor], Tensor], largest: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Tensor:
    """One AGRE weight per teacher and batch [M], from gradients of the batch mean.

    What the course project did, floor .01 included: W = max(.01, 1 - cos), over all `parameters`.
    The student's logits [B, C] must carry the graph; targets [M + 1, B, C] are the teachers' logits
    and, last, the biased model's. `mean` makes a process's sum the batch's mean, `largest` takes
    the greatest over processes.
    """
    directions = (tau * logit_gradients(student, targets, tau)).to(student.dtype)
    sizes = largest(directions.abs().amax((1, 2))).tolist()
    *g_t, g_b = (
        mean(gradient_along(student, parameters, direction, size, largest)).double()
        for direction, size in zip(directions, sizes, strict=True)
    )
    inner = torch.stack([g @ g_b for g in g_t])
    if normalise:
        norms = torch.stack([g.norm() * g_b.norm() for g in g_t])
        inner = torch.where(norms > 0, inner / norms.clamp(min=1e-300), 0)
    return (1 - inner).clamp(min=0.01)


def gradient_along(
    student: Tensor, parameters: Sequence[Tensor], direction: Tensor, size: float,
    largest: Callable[[Tensor], Tensor],
) -> Tensor:
    """Gradient [P] of sum(student * direction), of networks that compute in float16 too.

    There what is below 6e-8 vanishes. As a loss scaler does, the direction, of that size, is
    enlarged before and the gradient divided after, by a power of two, which changes no bit in
    float32; less where that is too much. Processes must do it alike, as `largest` tells them: batch
    norm over all of them adds up gradients on their way, and waits for all.
    """
    exponent = max(math.frexp(size)[1], -100)
    gradient = torch.zeros(0)
    for enlarged in (10, 5, 0):
        scale = 2.0 ** (enlarged - exponent)
        parts = torch.autograd.grad(student, parameters, scale * direction, retain_graph=True)
        gradient = torch.cat([part.flatten() for part in parts]) / scale
        if not largest((~torch.isfinite(gradient)).any().float()):
            break
    return gradient


class Departures(NamedTuple):
    """How far each teacher is from the biased model, [M] in float64 (ours)."""

    distance: Tensor  # mean of |p_t - p_b|^2, in 0..2
    disputed: Tensor  # the same, of images of which the two name different classes; nan if none
    accuracy: Tensor  # share of images that the teacher gets right
    skill: Tensor  # of held-out images, see `skill_of`
    merit: Tensor  # departure where it is right, times skill; for weightings of a recipe's own
    weights: Tensor  # of `departure`, shares that sum to 1


def skill_of(predicted: Tensor, labels: Tensor) -> Tensor:
    """Mean recall of the classes above chance, 0..1 [M], of classes predicted [M, N] (ours); 1
    where fewer than two classes could tell."""
    if len(labels.unique()) < 2:
        return torch.ones(len(predicted), dtype=torch.float64)
    recalls = [(predicted[:, labels == y] == y).double().mean(1) for y in labels.unique()]
    chance = 1 / len(recalls)
    return ((torch.stack(recalls).mean(0) - chance) / (1 - chance)).clamp(min=0)


def measure_departures(
    blocks: Iterator[tuple[Tensor, Tensor, Tensor]], skill: Tensor, departure_gap: float
) -> Departures:
    """Departure of teachers from the biased model, over blocks of logits and labels (ours).

    A block: teachers [M, b, C], biased [b, C], labels [b]. Departure is the mean of
    |softmax(z_t) - softmax(z_b)|^2 at temperature 1. Those that `departing` names count alike: in
    proportion to departure good teachers of the digits got weights from .12 to .46, where equal
    ones were better.
    """
    distance = counted = disputed = disputes = hits = torch.zeros(())
    total = 0
    for teachers, biased, labels in blocks:
        p_t = F.softmax(bounded_logits(teachers.double()), -1)
        p_b = F.softmax(bounded_logits(biased.double()), -1)
        gap = (p_t - p_b).square().sum(-1)  # [M, b]
        right = teachers.argmax(-1) == labels
        differs = teachers.argmax(-1) != biased.argmax(-1)
        distance = distance + gap.sum(1)
        counted = counted + torch.where(right, gap, 0).sum(1)
        disputed = disputed + torch.where(differs, gap, 0).sum(1)
        disputes = disputes + differs.sum(1)
        hits = hits + right.sum(1)
        total += len(labels)
    distance, skill = distance / total, skill.to(counted)
    merit = counted / total * skill
    kept = departing(distance.tolist(), skill.tolist(), departure_gap)
    shares = torch.zeros_like(distance)
    shares[kept] = 1 / len(kept)
    return Departures(distance, disputed / disputes, hits / total, skill, merit, shares)


# Departures below it, differences of .03 in probability (root mean square), are noise (ours).
SMALLEST_DEPARTURE = 1e-3


def departing(distance: list[float], skill: list[float], departure_gap: float) -> list[int]:
    """The teachers that are not as biased as the biased model, by departure and skill [M] (ours).

    One of less than a third of the greatest skill is left out: it departs by being wrong. The
    others are ranked by departure and divided where it falls by the greatest factor, if that is
    more than `departure_gap`: those above count, those below are as biased as the biased model. If
    those above have less than two thirds of the mean skill of those below, they depart by being
    wrong, too, and the others alone are divided.
    """
    ranked = sorted(range(len(distance)), key=lambda t: -distance[t])
    ranked = [t for t in ranked if 3 * skill[t] >= max(skill)]
    while True:
        sizes = [max(distance[t], SMALLEST_DEPARTURE) for t in ranked]
        falls = [above / below for above, below in itertools.pairwise(sizes)]
        if max(falls, default=0) <= departure_gap:
            return ranked
        count = falls.index(max(falls)) + 1
        above, below = ranked[:count], ranked[count:]
        own, others = (statistics.fmean(skill[t] for t in part) for part in (above, below))
        if 3 * own >= 2 * others:
            return above
        ranked = below


def as_biased(found: Departures, departure_gap: float) -> Tensor:
    """Which teachers [M] are as biased as the biased model: those left out that depart from it more
    than `departure_gap` times less than any that counts (ours)."""
    kept = found.weights > 0
    return ~kept & (found.distance * departure_gap < found.distance[kept].min())


def departure(student: Tensor, ensemble: Ensemble, batch: Batch) -> Tensor:
    """The teachers that depart from the biased model alike, the others not at all (ours).

    It needs no group label: teachers that are as biased as the biased model hardly depart from it.
    """
    assert ensemble.departures is not None
    return ensemble.departures.weights[:, None].expand(ensemble.teachers.shape[:2])


def average(student: Tensor, ensemble: Ensemble, batch: Batch) -> Tensor:
    """All teachers alike: AVER."""
    shape = ensemble.teachers.shape[:2]
    return torch.ones(shape, dtype=torch.float64, device=student.device)


def random_teacher(student: Tensor, ensemble: Ensemble, batch: Batch) -> Tensor:
    """One teacher a batch, drawn at random: the paper's Random."""
    draw = hash_bits(batch.seed, Stream.TEACHER, batch.step)[0]
    weights = torch.zeros_like(average(student, ensemble, batch))
    weights[int(draw % np.uint64(len(weights)))] = 1
    return weights


def ae_kd(student: Tensor, ensemble: Ensemble, batch: Batch) -> Tensor:
    """AE-KD's weights, one a teacher for the whole batch (Du 2020)."""
    weights = ae_kd_weights(student, ensemble.teachers, batch.settings.tau, batch.mean)
    return weights[:, None].expand(ensemble.teachers.shape[:2])


def ae_kd_weights(
    student: Tensor, teachers: Tensor, tau: float, mean: Callable[[Tensor], Tensor]
) -> Tensor:
    """AE-KD's weights [M]: min |sum_t alpha_t g_t|^2, sum alpha = 1, 0 <= alpha <= .6 (Du 2020).

    g_t is the batch's mean gradient of l_t with respect to the logits, over all processes (student
    [B, C], teachers [M, B, C], `mean` as for batch_weights). The authors' code solves it by a
    one-class SVM on the Gram matrix, which stops at its start once gradients are small and needs
    millions of steps where several mixtures are near 0: `least_norm_weights`, the matrix scaled to
    unit trace, and 1e-6 on its diagonal are ours.
    """
    gradients = mean(tau * logit_gradients(student, teachers, tau).sum(1))  # [M, C]
    gram, count = (gradients @ gradients.T).cpu().numpy(), len(teachers)
    if count * 0.6 <= 1 or not np.trace(gram) > 0:
        return torch.full((count,), 1 / count, dtype=torch.float64, device=student.device)
    alpha = least_norm_weights(gram / np.trace(gram) + 1e-6 * np.eye(count), 0.6)
    return torch.from_numpy(alpha).to(student.device)


def least_norm_weights(gram: np.ndarray, most: float) -> np.ndarray:
    """argmin of a G a over sum a = 1, 0 <= a <= most, of a positive definite G [M, M].

    A primal active-set method (Nocedal and Wright 2006, Algorithm 16.3): some weights stand at a
    bound, the free ones go to their minimum or to the first bound on the way.
    """
    count = len(gram)
    weights, free = np.full(count, 1 / count), np.full(count, True)
    for _ in range(20 * count):  # it ends after about M rounds; rounding cannot make it go round
        fixed = gram[np.ix_(free, ~free)] @ weights[~free]
        ones = np.ones(free.sum())
        u, v = np.linalg.solve(gram[np.ix_(free, free)], np.stack([ones, fixed], 1)).T
        multiplier = (1 - weights[~free].sum() + v.sum()) / u.sum()
        step = multiplier * u - v - weights[free]
        room = np.where(step > 0, most - weights[free], weights[free])
        reach = np.divide(room, np.abs(step), out=np.full(len(step), np.inf), where=step != 0)
        first = reach.argmin()
        weights[free] += min(1, reach[first]) * step
        if reach[first] < 1:
            blocked = np.flatnonzero(free)[first]
            weights[blocked], free[blocked] = most if step[first] > 0 else 0, False
            continue
        pull = gram @ weights - multiplier  # falling below 0 at weight 0, above it at `most`
        gain = np.where(free, 0, np.where(weights > 0, pull, -pull))
        if gain.max() <= 1e-12:
            break
        free[gain.argmax()] = True
    return weights


def eb_kd(student: Tensor, ensemble: Ensemble, batch: Batch) -> Tensor:
    """EB-KD's weights: by certainty (Kwon 2020)."""
    return eb_kd_weights(ensemble.teachers)


def eb_kd_weights(teachers: Tensor) -> Tensor:
    """EB-KD's weights (1 - H_t / sum H) / (M - 1) [M, B], H the entropy (Kwon 2020), of [M, B, C],
    up to the constant. Without any entropy, and for a single teacher, all are alike."""
    log_p = F.log_softmax(bounded_logits(teachers.double()), -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    total = entropy.sum(0)
    if len(teachers) == 1:
        return torch.ones_like(entropy)
    return torch.where(total > 0, 1 - entropy / total.clamp(min=1e-300), 1)


def ca_mkd(student: Tensor, ensemble: Ensemble, batch: Batch) -> Tensor:
    """CA-MKD's weights: by agreement with the label (Zhang 2022)."""
    return ca_mkd_weights(ensemble.teachers, batch.labels)


def ca_mkd_weights(teachers: Tensor, labels: Tensor) -> Tensor:
    """CA-MKD's weights (1 - softmax_t(CE_t)) / (M - 1) [M, B] (Zhang 2022), up to the constant.

    teachers [M, B, C], labels [B]. A single teacher has weight 1."""
    logits = bounded_logits(teachers.double())
    losses = torch.stack([cross_entropy(each, labels) for each in logits])
    if len(teachers) == 1:
        return torch.ones_like(losses)
    return 1 - losses.softmax(0)


WEIGHTINGS: dict[str, Weigh] = {
    "agre": agre,
    "departure": departure,
    "average": average,
    "random": random_teacher,
    "ae-kd": ae_kd,
    "eb-kd": eb_kd,
    "ca-mkd": ca_mkd,
}


def shrunk(weights: Tensor, shrink: float) -> Tensor:
    """Weights drawn towards 1, equal ones, by a share `shrink` (ours)."""
    return (1 - shrink) * weights + shrink


def teacher_shares(weights: Tensor, zero: str = "uniform") -> Tensor:
    """Weights [M, B] as shares that sum to 1 over teachers; all 0 for a dropped sample."""
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
    losses = kd_losses(student, mean, tau)
    return torch.where(shares.sum(0) > 0, losses, 0)


def distillation(
    answers: Callable[[Batch], Ensemble], features: Losses | None = None,
    weigh_samples: WeighSamples | None = None,
) -> Losses:
    """(1 - alpha) CE + alpha wKD + features, with the student's weighting of the teachers.

    `answers` gives what the frozen networks say of a batch; `features`, the loss of the layers,
    looks at the student's pass that has just been; `weigh_samples` gives factors on wKD alone.
    """

    def losses(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        settings, logits = batch.settings, batch.output
        extra, figures = features(batch) if features else (0.0, {})
        ensemble = answers(batch)
        weigh = WEIGHTINGS.get(settings.weighting, settings.weighting)
        weights = weigh(logits, ensemble, batch)  # [M, b]
        if settings.weighting == "agre":
            weights = shrunk(weights, settings.shrink)
        shares = teacher_shares(weights, settings.zero)
        distilled = weighted_kd(logits, ensemble.teachers, shares, settings.tau, settings.combine)
        if weigh_samples:
            distilled = weigh_samples(batch, distilled.detach()).to(distilled) * distilled
        labelled = cross_entropy(logits, batch.labels)
        figures |= {
            "cross_entropy": labelled,
            "distillation": distilled,
            "weight": weights,
            "zero_weight_share": (weights.sum(0) == 0).double(),
        }
        if settings.alpha == 1:  # labels that are not used must not meet extreme logits
            return distilled + extra, figures
        if settings.weigh_labels and settings.weighting == "agre":
            labelled = weights.mean(0).to(labelled) * labelled
        return (1 - settings.alpha) * labelled + settings.alpha * distilled + extra, figures

    return losses


def label_losses(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy with the labels: ERM."""
    return cross_entropy(batch.output, batch.labels), {}


def gce_losses(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Generalised cross-entropy, which amplifies the bias; q is the biased model's setting."""
    return gce(batch.output, batch.labels, batch.settings.q), {}


# ---- Feature distillation ------------------------------------------------------------------------


class Layer(NamedTuple):
    """A pair of layers that are compared."""

    name: str  # as the recipe has it
    student: str
    teacher: str
    gamma: float


def compared_layers(settings: Distill) -> list[Layer]:
    """The layers of a student whose weight is not 0."""
    layers = []
    for name, gamma in zip(settings.layers, settings.gamma, strict=True):
        student, _, teacher = name.partition("=")
        if gamma:
            layers.append(Layer(name, student, teacher or student, gamma))
    return layers


@dataclass(frozen=True)
class FrozenFeatures:
    """Features of the frozen networks: the teachers', then the biased model's if it is there."""

    num_teachers: int
    # By the teachers' layer, the channels of every network; 0 where the biased model lacks it.
    widths: Mapping[str, list[int]]
    # By the teachers' layer, a map [b, d, h, w] of every network, None where it lacks the layer.
    maps: Callable[[Batch], Mapping[str, list[Tensor | None]]]
    twins: Sequence[bool]  # [M], has a teacher the biased model's trunk?
    pretrained: bool  # did all teachers begin with the same pretrained weights?


class Compared(NamedTuple):
    """One layer of a batch, every map averaged down to the smallest: [b, d, h, w]."""

    student: Tensor
    teachers: list[Tensor]
    biased: Tensor | None


class FeatureLoss:
    """sum_l gamma_l L_l [b]: a student's layers against its teachers'.

    mse: mean((A f_s - f_T)^2), f_T the weighted mean of the teachers' features with a shared
    adapter, else the weighted mean of each one's distance. A is a 1 x 1 convolution without bias.
    Left open by the AGRE-KD paper; the weights of features are this project's.
    """

    def __init__(self, settings: Distill, frozen: FrozenFeatures, seed: int) -> None:
        self.settings, self.frozen, self.seed = settings, frozen, seed
        self.layers = compared_layers(settings)
        self.shared: list[bool] = []  # by layer: have all teachers one adapter?
        self.student_maps: Mapping[str, Tensor] = {}

    def attach(self, model: nn.Module, maps: Mapping[str, Tensor], widths: Mapping[str, int]
               ) -> None:
        """Look at the student's layers, and give it the adapters as parameters to be trained.

        `maps` are filled by each forward pass, name -> [b, d, h, w]; `widths` are their channels.
        """
        self.student_maps = maps
        torch.manual_seed(seed_of(self.seed, Stream.ADAPTERS))
        model.adapters = nn.ModuleList()
        self.shared = []
        for layer in self.layers:
            pairs, shared = self._adapter_widths(layer, widths[layer.student])
            convolutions = [nn.Conv2d(*pair, 1, bias=False) for pair in pairs]
            model.adapters.append(nn.ModuleList(convolutions))
            self.shared.append(shared)

    def _adapter_widths(self, layer: Layer, student: int) -> tuple[list[tuple[int, int]], bool]:
        """Channels in and out of each adapter of a layer, and whether teachers share theirs."""
        settings = self.settings
        widths = self.frozen.widths[layer.teacher]
        teachers = widths[: self.frozen.num_teachers]
        biased = widths[-1] if len(widths) > len(teachers) else 0
        equal = len(set(teachers)) == 1
        shared = settings.adapters == "shared" and settings.feature_loss == "mse"
        if settings.adapters == "auto":
            shared = equal and self.frozen.pretrained
        alike = settings.feature_weights in ("agree", "disagree") or settings.feature_dropout > 0
        by_biased = settings.feature_weights == "agre"
        if by_biased and settings.feature_space == "adapted":
            refused = len({width for width in widths if width}) > 1
        else:
            refused = (shared or alike) and not equal
        if refused:
            raise Problem(
                f"layer {layer.name}: the networks have {', '.join(map(str, widths))} channels, "
                "where adapters = shared, feature_space = adapted, feature_dropout, and "
                "feature_weights agree and disagree need equally many."
            )
        if settings.feature_loss == "attention":
            if "pooled" in (layer.student, layer.teacher):
                raise Problem("Attention transfer compares maps: pooled is none.")
            return [], shared
        if settings.feature_loss == "contrastive":
            return [(width, 128) for width in (student, *teachers)], shared
        pairs = [(student, width) for width in (teachers[:1] if shared else teachers)]
        fits_shared = shared and len(set(widths)) == 1
        if by_biased and biased and not fits_shared:
            pairs.append((student, biased))  # an adapter of the biased model's own
        return pairs, shared

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses [b], after the student's forward pass, with figures to log."""
        student_maps, dtype = dict(self.student_maps), batch.output.dtype
        for name, image in student_maps.items():
            assert len(image) == len(batch.images), (
                f"{name}: the map of {len(image)} images, not of the batch's {len(batch.images)}"
            )
        frozen_maps = self.frozen.maps(batch)
        total = torch.zeros_like(batch.output[:, 0])
        figures: dict[str, Tensor] = {}
        with torch.autocast(batch.images.device.type, enabled=False):
            for i, layer in enumerate(self.layers):
                compared = self._compare(
                    student_maps[layer.student], frozen_maps[layer.teacher], dtype
                )
                loss, adapter_loss = self._loss(batch, i, compared)
                figures[f"feature {layer.name}"] = loss
                total = total + layer.gamma * loss + adapter_loss
        return total, figures

    def _compare(
        self, student: Tensor, frozen: Sequence[Tensor | None], dtype: torch.dtype
    ) -> Compared:
        count = self.frozen.num_teachers
        maps = [student, *(each for each in frozen if each is not None)]
        side = min(each.shape[-1] for each in maps)
        pooled = [F.adaptive_avg_pool2d(each.to(dtype), side) for each in maps]
        biased = pooled[count + 1] if len(pooled) > count + 1 else None
        return Compared(pooled[0], pooled[1 : count + 1], biased)

    def _loss(self, batch: Batch, i: int, compared: Compared) -> tuple[Tensor, Tensor | float]:
        """Loss [b] of layer i, and that of an adapter which the biased model has of its own."""
        adapters = typing.cast(Any, batch.model.adapters)[i]
        if self.settings.feature_loss == "attention":
            return attention_loss(compared), 0.0
        if self.settings.feature_loss == "contrastive":
            return contrastive_loss(compared, adapters, batch), 0.0
        return self._squared(batch, i, compared, adapters)

    def _squared(
        self, batch: Batch, i: int, compared: Compared, adapters: Any
    ) -> tuple[Tensor, Tensor | float]:
        student, teachers, biased = compared
        count = 1 if self.shared[i] else len(teachers)
        adapted = [adapter(student) for adapter in adapters[:count]]
        weights = student.new_ones(len(teachers), len(student))
        adapter_loss: Tensor | float = 0.0
        if self.settings.feature_weights == "agre" and biased is not None:
            adapted_b = adapters[-1](student.detach())
            if len(adapters) > count:
                adapter_loss = (adapted_b - biased).square().mean((1, 2, 3))
            weights = self._weights(compared, adapted, adapted_b.detach(), adapters)
        weights = shrunk(weights, self.settings.shrink)
        shares = teacher_shares(weights, self.settings.zero)
        elements = self._elements(batch, i, teachers)
        if self.shared[i]:
            mean = (shares[:, :, None, None, None] * torch.stack(teachers)).sum(0)
            teachers = [mean.to(student)]
            shares = shares.sum(0, keepdim=True) > 0
        distances = torch.stack([
            (elements * (image - f).square()).mean((1, 2, 3))
            for image, f in zip(adapted, teachers, strict=True)
        ])
        return (shares * distances).sum(0), adapter_loss

    def _weights(
        self, compared: Compared, adapted: Sequence[Tensor], adapted_b: Tensor, adapters: Any
    ) -> Tensor:
        """AGRE weights [M, b] of a layer."""
        _, teachers, biased = compared
        assert biased is not None
        space = self.settings.feature_space
        if space == "auto":
            space = "adapted" if len(adapters) == 1 else "student"
        matrices = None
        if space == "student":
            used = (*adapters[: len(adapted)], adapters[-1])
            matrices = [adapter.weight.detach() for adapter in used]
        detached = [image.detach() for image in adapted]
        weights = feature_agre(detached, teachers, adapted_b, biased, matrices)
        # A teacher whose parent is the biased model has its very features: their pulls are one.
        for t, is_twin in enumerate(self.frozen.twins):
            if is_twin:
                weights[t] = 0
        return weights

    def _elements(self, batch: Batch, i: int, teachers: Sequence[Tensor]) -> Tensor:
        """Weights of samples, channels and positions, to be broadcast to [b, d, h, w]."""
        elements = teachers[0].new_ones(())
        if self.settings.feature_weights == "agree":
            elements = agreement(torch.stack([*teachers]))
        elif self.settings.feature_weights == "disagree":
            elements = disagreement(torch.stack([*teachers]))
            elements = elements / batch.mean(elements.sum()).clamp(min=1e-30)
        if self.settings.feature_dropout:
            channels = np.arange(teachers[0].shape[1])
            draws = hash_uniform(self.seed, Stream.DROPOUT, batch.step, i, channels)
            kept = batch.runtime.upload(draws >= self.settings.feature_dropout).to(teachers[0])
            elements = elements * kept[:, None, None] / (1 - self.settings.feature_dropout)
        return elements


def feature_agre(
    adapted: Sequence[Tensor], teachers: Sequence[Tensor], adapted_b: Tensor, biased: Tensor,
    adapters: Sequence[Tensor] | None = None,
) -> Tensor:
    """AGRE weights [M, b] of a layer: 1 - cos of the pulls A_t f_s - f_t and A_b f_s - f_b (ours).

    adapted: A_t f_s for each teacher, or one for all; every map [b, d, h, w]. With `adapters`
    [d_t, d_s, 1, 1] (those, then b's), of gradients with respect to f_s: A^T (A f_s - f). 1 where a
    pull is nil (under 1e-6 of the norm of f).
    """
    images = [*adapted] * (len(teachers) // len(adapted)) + [adapted_b]
    features = [*teachers, biased]
    pulls = [image - f for image, f in zip(images, features, strict=True)]
    nil = torch.stack([
        pull.flatten(1).norm(dim=1) < 1e-6 * f.flatten(1).norm(dim=1)
        for pull, f in zip(pulls, features, strict=True)
    ])
    if adapters is not None:
        *matrices, matrix_b = adapters
        matrices = [*matrices] * (len(teachers) // len(matrices)) + [matrix_b]
        pulls = [F.conv_transpose2d(pull, a) for pull, a in zip(pulls, matrices, strict=True)]
    *directions, direction_b = (F.normalize(pull.flatten(1), dim=1, eps=1e-30) for pull in pulls)
    weights = torch.stack([(each - direction_b).square().sum(1) / 2 for each in directions])
    return floored(weights, nil[:-1] | nil[-1])


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


def attention_loss(compared: Compared) -> Tensor:
    """Mean squared distance of attention maps [b], averaged over teachers (Zagoruyko 2017)."""
    q = attention(compared.student)
    losses = [(q - attention(f)).square().mean(1) for f in compared.teachers]
    return torch.stack(losses).mean(0)


def contrastive_loss(compared: Compared, adapters: Any, batch: Batch) -> Tensor:
    """In-batch InfoNCE of 128-d projections [b], averaged over teachers."""
    unit = []
    maps = [compared.student, *compared.teachers]
    for adapter, features in zip(adapters, maps, strict=True):
        pooled = F.adaptive_avg_pool2d(features, 1)
        unit.append(F.normalize(adapter(pooled).flatten(1), dim=1))
    student, *teachers = unit
    losses = [info_nce(student, *gather_rows(each, batch)) for each in teachers]
    return torch.stack(losses).mean(0)


def info_nce(student: Tensor, teacher: Tensor, first: int = 0) -> Tensor:
    """-log exp(s_i t_i / .07) / sum_j exp(s_i t_j / .07), [b], of unit vectors [b, k] and [B, k].

    `first` is the place of the student's first sample in the teacher's whole batch."""
    places = torch.arange(len(student), device=student.device) + first
    return cross_entropy(student @ teacher.T / 0.07, places.clamp(max=len(teacher) - 1))


def gather_rows(rows: Tensor, batch: Batch) -> tuple[Tensor, int]:
    """Rows [b, k] of all processes that share the batch, with gradient, and the place of this
    process's first one among them."""
    world, rank = batch.runtime.world, batch.runtime.rank
    if world == 1:
        return rows, 0
    from torch.distributed.nn import functional as collective

    counts = [len(range(r, batch.total, world)) for r in range(world)]  # batch[rank::world]
    padded = F.pad(rows, (0, 0, 0, counts[0] - len(rows)))
    parts = collective.all_gather(padded)
    kept = [part[:count] for part, count in zip(parts, counts, strict=True)]
    return torch.cat(kept), sum(counts[:rank])


# ---- Rivals --------------------------------------------------------------------------------------


class SampleWeights(nn.Module):
    """Weights of training samples, a buffer [N] that travels with the student and its checkpoints.

    jtt: `upweight` for what the biased model gets wrong, else 1, throughout (the second stage of
    JTT, Liu et al. 2021, on the distillation loss). dedier: those of `readout_weights`, set anew
    after each epoch; 1 in the first. Weights are not normalised: a batch's step grows with them.
    """

    weights: Tensor

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.register_buffer("weights", weights)

    def forward(self, batch: Batch, losses: Tensor) -> Tensor:
        """Weights [b] of a batch's samples."""
        return self.weights[batch.runtime.upload(batch.positions)]


SMALLEST_SHARE = 1e-30  # of a group that training has, by Group DRO (ours)


class GroupShares(nn.Module):
    """Group DRO (Sagawa et al. 2020, algorithm 1) on the distillation loss, as weights of samples.

    Shares q [G] sum to 1, are equal at first over the groups that training has, and travel with
    the student. On each batch q_g <- q_g exp(eta l_g), with l_g the mean distillation loss of its
    samples of group g, over all processes; then the loss is sum_g q_g l_g. Groups that a batch
    lacks keep their share, so those present keep their sum (ours: in the authors' code a group
    without samples has loss 0, and shrinks).
    """

    q: Tensor
    groups: Tensor

    def __init__(self, groups: Tensor, num_groups: int, eta: float) -> None:
        """`groups` [N] of the training samples, all known."""
        super().__init__()
        self.eta = eta
        present = (torch.bincount(groups, minlength=num_groups) > 0).float()
        self.register_buffer("q", present / present.sum())
        self.register_buffer("groups", groups, persistent=False)

    def forward(self, batch: Batch, losses: Tensor) -> Tensor:
        """Weights q_g B / n_g [b] of a batch's samples, n_g of them of group g; q goes on."""
        groups = self.groups[batch.runtime.upload(batch.positions)]
        one_hot = (groups[:, None] == torch.arange(len(self.q), device=groups.device)).double()
        if batch.in_vain:
            one_hot = torch.zeros_like(one_hot)
        counts, sums = batch.runtime.sum(torch.stack([one_hot.sum(0), one_hot.T @ losses.double()]))
        present = counts > 0
        q = self.q.double()
        means = sums / counts.clamp(min=1)
        highest = torch.where(present, means, -math.inf).max()  # it cancels, and exp stays finite
        grown = torch.where(present, q * torch.exp(self.eta * (means - highest)), 0)
        q = torch.where(present, grown * (torch.where(present, q, 0).sum() / grown.sum()), q)
        # A share that fell to 0 would stay there, and a batch of its group alone has no other.
        q = torch.where(self.q > 0, q.clamp(min=SMALLEST_SHARE), q)
        self.q.copy_(q)
        return (q * batch.total / counts.clamp(min=1))[groups]


class Readout(nn.Sequential):
    """DeDiER's readout of a map [b, s, h, w]: two 3 x 3 convolutions to 2 s, pooled, linear."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__(
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, num_classes),
        )


def readout_weights(logits: Tensor, labels: Tensor, alpha: float, beta: float) -> Tensor:
    """DeDiER's weights [N] of a readout's logits [N, C]: exp(beta m^alpha) where it is wrong, else
    1 (2310.18590).

    The margin m is |p_0 - p_1|; of more classes the greatest probability less the next (ours).
    """
    greatest = logits.double().softmax(-1).topk(2).values
    margins = greatest[:, 0] - greatest[:, 1]
    return torch.where(logits.argmax(-1) == labels, 1, torch.exp(beta * margins**alpha))


class Projection(NamedTuple):
    """Where a student's projector stands, and its sizes: what its file says of it."""

    layer: str  # path of the module of the plain network whose map it takes
    width: int  # channels of that map,
    side: int  # averaged down to so many pixels a side
    features: int  # what it puts out, and the head multiplies


def build_projector(projection: Projection) -> nn.Sequential:
    """SimKD's projector (Chen et al. 2022): a map [b, s, h, w] -> features [b, t], in standard
    layers alone; the last but two puts out the map that is compared."""
    narrow, features = projection.features // 2, projection.features
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(projection.side),
        nn.Conv2d(projection.width, narrow, 1, bias=False), nn.BatchNorm2d(narrow), nn.ReLU(),
        nn.Conv2d(narrow, narrow, 3, padding=1, bias=False), nn.BatchNorm2d(narrow), nn.ReLU(),
        nn.Conv2d(narrow, features, 1, bias=False), nn.BatchNorm2d(features), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )


def simkd(
    layer: Layer, frozen: FrozenFeatures, student_maps: Mapping[str, Tensor],
    weigh_samples: WeighSamples | None = None,
) -> Losses:
    """w_i mean |P(f_s) - f_t|^2 per sample: last maps alone, neither logits nor labels.

    f_t is the mean over the teachers, averaged down to the projected map. SimKD: Chen et al. 2022;
    with weights w DeTT: Lee et al. 2023. `student_maps` are filled by each forward pass.
    """

    def losses(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        projected = student_maps[layer.student].to(batch.output.dtype)
        maps = frozen.maps(batch)[layer.teacher][: frozen.num_teachers]
        side = projected.shape[-1]
        pooled = [F.adaptive_avg_pool2d(f.to(projected), side) for f in maps if f is not None]
        distances = (projected - torch.stack(pooled).mean(0)).square().mean((1, 2, 3))
        if weigh_samples:
            distances = weigh_samples(batch, distances.detach()).to(distances) * distances
        return distances, {"distillation": distances}

    return losses


# ---- Head refitting ------------------------------------------------------------------------------


def balanced_subset(cells: np.ndarray, *keys: int) -> np.ndarray:
    """Random places in `cells`: of each cell as many as the smallest has."""
    order = permutation(len(cells), *keys)
    members = [order[cells[order] == cell] for cell in np.unique(cells)]
    size = min(map(len, members))
    return np.sort(np.concatenate([each[:size] for each in members]))


def halves_of_cells(cells: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random halves of the places in `cells`, drawn within every cell (ours: both hold each)."""
    order = permutation(len(cells), seed, Stream.HALVES)
    first, second = [], []
    for cell in np.unique(cells):
        members = order[cells[order] == cell]
        middle = (len(members) + 1) // 2
        first.append(members[:middle])
        second.append(members[middle:])
    return np.sort(np.concatenate(first)), np.sort(np.concatenate(second))


def worst_group(correct: np.ndarray, groups: np.ndarray) -> float:
    """Smallest accuracy of a group, over the groups present."""
    return min(float(correct[groups == group].mean()) for group in np.unique(groups))


def dfr_l1(
    features: np.ndarray, labels: np.ndarray, cells: np.ndarray, settings: DFR, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """DFR on validation (Kirichenko 2023): mean of l1 logistic regressions on balanced subsets.

    features [N, d], labels [N], cells [N] (what is balanced) -> weight [C, d], bias [C], to be
    applied to the raw features. The penalty is chosen by worst-group accuracy: fitted on one
    random half of every cell, cut to the smallest, judged on the other half. Then one scaler for
    all samples, as in Izmailov's code. Two classes: liblinear, rows are half the logit each way;
    more: multinomial (saga).
    """
    from sklearn.preprocessing import StandardScaler

    features = features.astype(np.float64)
    penalty = settings.penalties[0]
    if len(settings.penalties) > 1:
        penalty = choose_penalty(features, labels, cells, settings, seed)
    scaler = StandardScaler().fit(features)
    scaled = scaler.transform(features)
    weights, biases = [], []
    for refit in range(settings.num_refits):
        subset = balanced_subset(cells, seed, Stream.REFIT, refit)
        model = l1_regression(scaled[subset], labels[subset], penalty, seed)
        weights.append(model.coef_)
        biases.append(model.intercept_)
    weight = np.mean(weights, 0) / scaler.scale_
    bias = np.mean(biases, 0) - weight @ scaler.mean_
    if len(weight) == 1:
        weight = np.stack([-weight[0], weight[0]]) / 2
        bias = np.stack([-bias[0], bias[0]]) / 2
    return weight, bias


def choose_penalty(
    features: np.ndarray, labels: np.ndarray, cells: np.ndarray, settings: DFR, seed: int
) -> float:
    """The inverse penalty with the best worst-group accuracy on a half that was not fitted."""
    from sklearn.preprocessing import StandardScaler

    first, second = halves_of_cells(cells, seed)
    subset = first[balanced_subset(cells[first], seed, Stream.FIRST_HALF)]
    scaler = StandardScaler().fit(features[subset])
    scores = []
    for penalty in settings.penalties:
        scaled = scaler.transform(features[subset])
        model = l1_regression(scaled, labels[subset], penalty, seed)
        correct = model.predict(scaler.transform(features[second])) == labels[second]
        scores.append(worst_group(correct, cells[second]))
    return settings.penalties[int(np.argmax(scores))]


def l1_regression(x: np.ndarray, y: np.ndarray, penalty: float, seed: int) -> Any:
    """A fitted l1 logistic regression of scikit-learn's; `penalty` is inverse."""
    from sklearn.linear_model import LogisticRegression

    solver = "liblinear" if len(np.unique(y)) == 2 else "saga"
    model = LogisticRegression(
        solver=solver, l1_ratio=1, C=penalty, random_state=seed % 2**32, max_iter=5000
    )
    return model.fit(x, y)


def dfr_sgd(
    features: np.ndarray, labels: np.ndarray, cells: np.ndarray, num_classes: int, settings: DFR,
    train: Train, seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Last-layer retraining (LaBonte 2023; AGRE-KD's teachers): fresh head, balanced batches.

    features [N, d], labels [N], cells [N] (what is balanced) -> weight [C, d], bias [C]. SGD at
    the ERM learning rate held constant, with its momentum, weight decay and batch size; N samples
    an epoch, drawn with replacement and weight 1 / n_cell.
    """
    x = torch.from_numpy(features.astype(np.float32))
    y = torch.from_numpy(labels)
    torch.manual_seed(seed)
    head = nn.Linear(x.shape[1], num_classes)
    optimizer = torch.optim.SGD(
        head.parameters(), train.lr, train.momentum, weight_decay=train.weight_decay
    )
    sizes = np.bincount(cells)
    cumulative = np.cumsum(1 / sizes[cells])
    for epoch in range(settings.epochs):
        draws = hash_uniform(seed, Stream.DRAWS, epoch, np.arange(len(y))) * cumulative[-1]
        order = np.searchsorted(cumulative, draws, "right")
        order = np.minimum(order, len(y) - 1)
        for batch in torch.from_numpy(order).split(train.batch_size):
            optimizer.zero_grad()
            F.cross_entropy(head(x[batch]), y[batch]).backward()
            optimizer.step()
    return head.weight.detach().numpy(), head.bias.detach().numpy()


def afr_head(
    features: np.ndarray, labels: np.ndarray, weight: np.ndarray, bias: np.ndarray, settings: DFR
) -> tuple[np.ndarray, np.ndarray]:
    """Automatic feature reweighting (AFR, Qiu 2023), from the learnt head, without groups.

    features [N, d], labels [N], weight [C, d], bias [C] -> weight, bias. Full-batch gradient
    descent on sum_i mu_i CE_i + regularisation |theta - theta_0|^2, gradient norm clipped at 1,
    with mu_i proportional to exp(-gamma p_y(x_i)) / n_y under the learnt head. The paper holds out
    a fifth of training for it; here it is the reweighting part (ours).
    """
    x, y = torch.from_numpy(features.astype(np.float64)), torch.from_numpy(labels)
    start = [torch.from_numpy(each.astype(np.float64)) for each in (weight, bias)]
    theta = [each.clone().requires_grad_() for each in start]
    confidence = F.linear(x, *start).softmax(-1).gather(1, y[:, None])[:, 0]
    mu = torch.exp(-settings.gamma * confidence) / torch.bincount(y)[y]
    mu /= mu.sum()
    optimizer = torch.optim.SGD(theta, settings.lr)
    for _ in range(settings.steps):
        optimizer.zero_grad()
        distance = sum((a - b).square().sum() for a, b in zip(theta, start, strict=True))
        losses = cross_entropy(F.linear(x, *theta), y)
        ((mu * losses).sum() + settings.regularisation * distance).backward()
        nn.utils.clip_grad_norm_(theta, 1.0)
        optimizer.step()
    weight, bias = (each.detach().numpy() for each in theta)
    return weight, bias


def infer_cells(logits: Tensor, labels: np.ndarray, groups: str) -> np.ndarray:
    """Cells [N] of class and pseudo-attribute, 2 y + a, from the biased model's logits [N, C].

    inferred: a is 1 where the biased model is wrong (the groups by which uLA chooses models).
    eiil: a as `eiil_split` has it, within each class.
    """
    if groups == "inferred":
        return 2 * labels + (logits.argmax(-1).numpy() != labels)
    attribute = np.zeros(len(labels), np.int64)
    for y in np.unique(labels):
        members = labels == y
        attribute[members] = eiil_split(logits[members], labels[members], int(y))
    return 2 * labels + attribute


EIIL_STEPS, EIIL_LR = 1000, 0.01  # ours; they let Adam go some ten times a draw's deviation


def eiil_split(logits: Tensor, labels: np.ndarray, seed: int) -> np.ndarray:
    """EIIL's two environments [N] of logits [N, C] (Creager 2021): where invariance fails most.

    With g_i = sum_c (p_c - y_c) z_c, the gradient of cross-entropy with respect to a factor on the
    logits at 1, Adam maximises ((mean s g)^2 + (mean (1 - s) g)^2) / 2 over s = sigmoid(w), w_0
    normal. The maximum is reached where s tells the signs of g apart: with two classes right from
    wrong. Where g is so small that Adam stands still, the draw of w_0 decides.
    """
    z = logits.double()
    g = ((z.softmax(-1) - F.one_hot(torch.from_numpy(labels), z.shape[1])) * z).sum(-1)
    w = noise_like(g.shape, torch.float64, seed, Stream.SPLIT).requires_grad_()
    optimizer = torch.optim.Adam([w], EIIL_LR, maximize=True)
    for _ in range(EIIL_STEPS):
        optimizer.zero_grad()
        s = w.sigmoid()
        (((s * g).mean() ** 2 + ((1 - s) * g).mean() ** 2) / 2).backward()
        optimizer.step()
    return (w.detach() > 0).numpy().astype(np.int64)


LEAST_IN_CELL = 4  # images that an inferred group must have (ours)


def small_cells(cells: np.ndarray, class_names: Sequence[str]) -> str:
    """Inferred cells [N] that hold too few images to go by: "3 of cat, ..."; empty if none is."""
    sizes = np.bincount(cells, minlength=2 * len(class_names)).reshape(-1, 2).min(1)
    named = zip(sizes.tolist(), class_names, strict=True)
    return ", ".join(f"{size} of {name}" for size, name in named if size < LEAST_IN_CELL)


# ---- Scores --------------------------------------------------------------------------------------

COLUMNS = {
    "wga": "WGA", "mean": "mean", "group_mean": "group mean", "adjusted_mean": "adjusted mean",
}
INFERRED_COLUMNS = {
    "wga_inferred": "WGA (inferred)", "selection_wga_inferred": "selection WGA (inferred)",
}


def shown_columns(scores: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The columns in which one of the scores has a figure."""
    every = [*scores]
    return {
        key: title for key, title in {**COLUMNS, **INFERRED_COLUMNS}.items()
        if any(each.get(key) is not None for each in every)
    }


def group_scores(
    correct: np.ndarray, groups: np.ndarray, train_counts: np.ndarray
) -> dict[str, Any]:
    """Accuracies, in per cent, of predictions that are right (True) or wrong, by group.

    mean: over samples. group_mean: over groups. adjusted_mean: groups weighted by their share of
    training (what the DFR papers print), alike where training has none of those scored, None where
    no group of training is known. wga: the worst group. Groups without samples are None and left
    out of every average.
    """
    sizes = np.bincount(groups, minlength=len(train_counts))
    hits = np.bincount(groups, weights=correct, minlength=len(train_counts))
    present = sizes > 0
    everywhere = 100 * hits / np.maximum(sizes, 1)
    accuracy = everywhere[present]
    shares = train_counts[present].astype(float)
    if not shares.sum():
        shares = np.ones_like(shares)
    adjusted = float((accuracy * shares).sum() / shares.sum())
    return {
        "wga": float(accuracy.min()),
        "mean": float(100 * np.mean(correct)),
        "group_mean": float(accuracy.mean()),
        "adjusted_mean": adjusted if train_counts.any() else None,
        "groups": [float(x) if n else None for x, n in zip(everywhere, sizes, strict=True)],
    }


def error_parts(
    student: Mapping[str, Tensor], teachers: Mapping[str, Tensor], labels: Mapping[str, Tensor],
    groups: np.ndarray, num_groups: int,
) -> dict[str, Any]:
    """A student's error taken apart, in nats (after ConfiG, Popp et al. 2025; a reconstruction of
    ours, with labels for the true conditional).

    Logits [N, C] of the student and [M, N, C] of its teachers, and labels [N], of "train" and of
    the "scored" images; `groups` [N] of the latter. risk_kd: cross-entropy of the student to the
    teachers' mean probabilities, on train; risk_train and risk_scored: to labels. omega =
    risk_scored - risk_train; psi = risk_train - risk_kd; None without teachers. group_gaps: what
    omega is for each group alone, None for one without images.
    """
    losses = {
        part: cross_entropy(bounded_logits(student[part].double()), labels[part]) for part in labels
    }
    risk_train, risk_scored = (float(losses[part].mean()) for part in ("train", "scored"))
    risk_kd = None
    if len(teachers["train"]):
        targets = bounded_logits(teachers["train"].double()).softmax(-1).mean(0)
        risk_kd = float(cross_entropy(bounded_logits(student["train"].double()), targets).mean())
    gaps = []
    for group in range(num_groups):
        members = losses["scored"][torch.from_numpy(groups == group)]
        gaps.append(float(members.mean()) - risk_train if len(members) else None)
    return {
        "risk_kd": risk_kd,
        "risk_train": risk_train,
        "risk_scored": risk_scored,
        "omega": risk_scored - risk_train,
        "psi": None if risk_kd is None else risk_train - risk_kd,
        "group_gaps": gaps,
    }


def by_group(values: np.ndarray, groups: np.ndarray, num_groups: int) -> list[float | None]:
    """Mean of values [N] over each group; None for one without samples."""
    present = [groups == group for group in range(num_groups)]
    return [float(values[of].mean()) if of.any() else None for of in present]


def divergences(one: np.ndarray, other: np.ndarray, bins: int = 20) -> np.ndarray:
    """Symmetrised Kullback-Leibler divergence KL(p || q) + KL(q || p) of each dimension [d], in
    nats, between histograms of features [N, d] and [K, d]: edges are shared, and every bin is
    given one image more (ours)."""
    found = np.zeros(one.shape[1])
    for i, (a, b) in enumerate(zip(one.T, other.T, strict=True)):
        both = np.concatenate([a, b])
        edges = np.linspace(both.min(), both.max(), bins + 1)
        if edges[0] < edges[-1]:
            p, q = (np.histogram(each, edges)[0] + 1.0 for each in (a, b))
            p, q = p / p.sum(), q / q.sum()
            found[i] = ((p - q) * np.log(p / q)).sum()
    return found


def telling_features(
    features: np.ndarray, labels: np.ndarray, attributes: np.ndarray, top: int
) -> dict[tuple[int, int], list[tuple[int, float]]]:
    """For every group (y, a), the dimensions of features [N, d] by which it differs most from the
    other groups of its class, with the mean of these divergences: of the dimensions that are
    larger on average in the group than in the rest of its class, `top` at most."""
    found = {}
    for y in np.unique(labels):
        of_class = np.unique(attributes[labels == y])
        inside = {a: features[(labels == y) & (attributes == a)] for a in of_class.tolist()}
        for a, own in inside.items():
            others = [each for b, each in inside.items() if b != a]
            if others:
                divergence = np.mean([divergences(own, each) for each in others], 0)
                excited = own.mean(0) > np.concatenate(others).mean(0)
                order = np.argsort(-np.where(excited, divergence, -1), kind="stable")
                kept = [int(i) for i in order[:top] if excited[i]]
                found[int(y), a] = [(i, float(divergence[i])) for i in kept]
    return found


def majority_vote(logits: Tensor) -> np.ndarray:
    """Class most of the models [M, N, C] name, [N]; ties go to the higher mean probability."""
    votes = F.one_hot(logits.argmax(-1), logits.shape[-1]).sum(0)
    probability = logits.float().softmax(-1).mean(0)
    return (votes + 0.5 * probability).argmax(-1).numpy()


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (ddof = 1; None for a single value)."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return float(np.mean(values)), deviation


def score_cells(scores: Mapping[str, Any], columns: Iterable[str]) -> list[str]:
    """One model's averages and group accuracies, for a table."""
    values = [scores.get(key) for key in columns] + scores["groups"]
    return ["–" if value is None else f"{value:.1f}" for value in values]


# ---- Basics --------------------------------------------------------------------------------------


def digest(*parts: Any) -> str:
    """16 hexadecimal digits that identify the parts (bytes, or anything JSON can hold)."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode())
        sha.update(b"\0")
    return sha.hexdigest()[:16]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """"lr 0.1 → 0.2, ..." for the values that differ; empty if none do."""
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(
        f"{name} {old.get(name, 'nothing')} → {new.get(name, 'nothing')}" for name in names
    )


def suggest(word: str, choices: Sequence[str]) -> str:
    """"; did you mean ...?" where one of the choices is close."""
    close = difflib.get_close_matches(word, choices, 3)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f": known are {', '.join(choices)}"


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
        raise Problem(
            f"{path} could not be written ({error.strerror}): make room there, or choose another "
            "folder with --out; the same command then goes on from where it was."
        ) from error


def clear_parts(folder: Path) -> None:
    """Delete what `write_file` had half written when it was killed. For who holds the lock."""
    for path in folder.iterdir():
        if re.fullmatch(r"\.part\d+", path.suffix):
            path.unlink()


def with_checksum(description: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says of itself, with a digest of it: see `read_json`."""
    return {**description, "checksum": digest(dict(description))}


def read_json(path: Path) -> dict[str, Any]:
    """An object that `with_checksum` was written of, or an older one without a checksum. Raises
    Problem for a file that is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
        checksum = content.pop("checksum", None)
        if checksum not in (None, digest(content)):
            raise ValueError("its checksum does not fit")
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable(path, error) from error
    return content


def unreadable(path: Path, error: Exception) -> Problem:
    """What is said of a damaged file of ours."""
    return Problem(
        f"{path} cannot be read ({error}): if it is damaged, delete it and make it again."
    )


SEAL = b"\ngrokd "  # stands before the digest that ends a sealed file


def sealed(content: bytes) -> bytes:
    """The content with a digest of it behind; readers of zip files pass over that."""
    return content + SEAL + digest(content).encode()


def read_state(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What torch saved in a sealed file, or in an older one without a seal. Raises Problem for one
    that is damaged."""
    try:
        content = path.read_bytes()
        head, mark, end = content.rpartition(SEAL)
        if mark and len(end) == 16:
            content = head
            if digest(content).encode() != end:
                raise ValueError("its checksum does not fit")
        return torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    except Exception as error:  # pickle's, zipfile's and torch's own, without a common base
        raise unreadable(path, ValueError(str(error).partition("\n")[0])) from error


@functools.cache
def warn_of_locks(reason: str) -> None:
    """Once a process."""
    print(
        f"warning: the file system has no locks ({reason}): let no two commands write to one "
        "folder at a time.", flush=True,
    )


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[bool]:
    """Hold a lock between processes of this machine; it ends with the process, however it ends.

    Gives whether it is held: some network file systems have none, which is warned about. Raises
    Problem if another process holds it and `wait` is False.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            raise Problem(
                f"{path.parent} is being written by another run ({file.read().strip()}): wait for "
                "it, stop it, or write elsewhere with --out."
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            warn_of_locks(os.strerror(error.errno))
            yield False
            return
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield True


def progress_bar(items: Any = None, label: str = "", **more: Any) -> Any:
    """A progress bar: on terminals only, and for the first process."""
    hidden = not sys.stderr.isatty() or int(os.environ.get("RANK", 0)) > 0
    return tqdm(
        items, desc=label, disable=hidden, leave=False, dynamic_ncols=True,
        main_process_only=False, **more,
    )


def say(*lines: str) -> None:
    """Print on the first process only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*lines, sep="\n", flush=True)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An aligned Markdown table: the first column to the left, the others to the right."""
    cells = [[cell.replace("|", r"\|") for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = [row[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "| " + " | ".join(padded) + " |"

    dashes = ["-" * (widths[0] + 2)] + ["-" * (width + 1) + ":" for width in widths[1:]]
    rule = "|" + "|".join(dashes) + "|"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


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


def now(device: torch.device) -> float:
    """Seconds, when the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def slices(count: int, size: int) -> list[slice]:
    """Parts of 0..count-1, of `size` each but for the last; 0: one part."""
    size = size or max(1, count)
    return [slice(start, start + size) for start in range(0, count, size)]


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host such that copying it to the device waits for nothing: copies from any
    other memory wait until the GPU has done all that it was given."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def upload(array: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """An array of the host on the device, without a wait."""
    return pinned(torch.as_tensor(array), device).to(device, non_blocking=True)


# Settings by which accelerate would change the loss or the way of training: values that leave
# both as they are, and what to use instead.
PLAIN_LAUNCH = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        ("", "1"), "it would divide the loss; for batches that do not fit, set micro_batch"
    ),
    "ACCELERATE_MIXED_PRECISION": (("", "no", "bf16", "fp16"), "use no, bf16 or fp16"),
    "ACCELERATE_DYNAMO_BACKEND": (("", "no"), "use --compile of grokd"),
} | {
    f"ACCELERATE_USE_{name}": (("", "0", "false", "no"), "use accelerate launch --multi_gpu")
    for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG")
}


def set_gpu_arithmetic(precision: str) -> str:
    """Set what torch leaves to defaults on NVIDIA GPUs, and put it in words.

    TF32, with float32's range and 10 bits after the point, makes convolutions several times
    faster. Matrix products are the heads and small networks, where its digits would be missed.
    cuDNN's benchmark would choose algorithms by their time, and some of its algorithms add up in
    the order in which threads come, so that two runs of one command, or one that was killed and
    went on, would differ in bits.
    """
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    if precision == "float64":
        return "float64; cudnn.deterministic, no benchmark"
    mixed = "" if precision == "float32" else f"{precision} by autocast, else "
    return f"{mixed}float32, TF32 in convolutions alone; cudnn.deterministic, no benchmark"


def check_launch(environment: Mapping[str, str]) -> None:
    """Raise Problem for a setting of the launcher that would change the training."""
    for name, (plain_values, instead) in PLAIN_LAUNCH.items():
        value = environment.get(name, "")
        if value.lower() not in plain_values:
            raise Problem(f"{name} is {value} in the environment, which grokd does not follow: "
                          f"{instead}, or unset it.")


class Watch:
    """Ends this process when another one of its command has ended: it would else wait for it, in
    a collective or, where each trains models of its own, after hours at the next barrier.

    Every process holds a connection to the first, which the system closes when a process ends,
    however it ends; probes find a machine that went silent. What is read until then are the last
    words of the other side: none if it was killed. The first process ends with any other, and all
    with the first.
    """

    FINISHED = "finished"
    KILLED = (
        "another process of this command has ended (what it printed, if anything, says why): the "
        "same command, given again, goes on from where it was."
    )
    # Seconds until a silent machine is probed, between probes, and how many may stay unanswered.
    PROBES = ((socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 5))

    def __init__(self, accelerator: Accelerator) -> None:
        self.ending = threading.Lock()  # taken once, by the thread that ends this process
        self.peers: list[socket.socket] = []
        try:
            self._connect(accelerator.process_index, accelerator.num_processes)
        except OSError as error:
            print(f"warning: processes cannot watch each other ({error}): if one ends, stop the "
                  "others by hand.", flush=True)
        for peer in self.peers:
            peer.settimeout(None)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in self.PROBES:
                peer.setsockopt(socket.IPPROTO_TCP, option, value)
            threading.Thread(target=self._listen, args=[peer], daemon=True).start()

    def _connect(self, rank: int, world: int) -> None:
        """The first process opens a port and tells it to the others, with a token to know them."""
        if rank > 0:
            port, token = broadcast_object_list([0, b""])
            host = os.environ.get("MASTER_ADDR", "localhost")
            peer = socket.create_connection((host, port), timeout=30)
            peer.sendall(token)
            self.peers.append(peer)
            return
        token = secrets.token_bytes(16)
        with socket.create_server(("", 0), backlog=world) as server:
            server.settimeout(30)
            broadcast_object_list([server.getsockname()[1], token])
            while len(self.peers) < world - 1:
                peer, _ = server.accept()
                peer.settimeout(30)
                if peer.recv(len(token), socket.MSG_WAITALL) == token:
                    self.peers.append(peer)

    def _listen(self, peer: socket.socket) -> None:
        """Read the last words of a process; end this one unless it had finished."""
        words = b""
        with contextlib.suppress(OSError):
            while part := peer.recv(4096):
                words += part
        if words.decode() != self.FINISHED:
            problem = words.decode() or self.KILLED
            self.tell(problem)
            print(f"error: {problem}", file=sys.stderr, flush=True)
            os._exit(1)  # the main thread may wait for the process that has ended

    def tell(self, words: str) -> None:
        """The last words of this process. Returns to the thread that comes first, and to no other:
        the first one ends the process."""
        self.ending.acquire()
        for peer in self.peers:
            with contextlib.suppress(OSError):
                peer.sendall(words.encode())
                peer.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def late_termination() -> Iterator[None]:
    """Within it SIGTERM ends this process a second later. A launcher sends it as soon as it sees
    that another process has ended, and what the watch says of that should come first. A thread
    waits for it, since the main one may stand in a collective."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def end() -> None:
        while number := os.read(reading, 1):
            if number[0] == signal.SIGTERM:
                time.sleep(1)
                os._exit(128 + signal.SIGTERM)
        os.close(reading)

    handler = signal.signal(signal.SIGTERM, lambda *signal_and_frame: None)
    before = signal.set_wakeup_fd(writing)
    threading.Thread(target=end, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGTERM, handler)
        os.close(writing)


@contextlib.contextmanager
def watched(accelerator: Accelerator) -> Iterator[None]:
    """While the work of a command lasts, end it on all processes if one of them ends before."""
    if accelerator.num_processes == 1:
        yield
        return
    watch = Watch(accelerator)
    with late_termination():
        try:
            yield
        except Problem as problem:
            watch.tell(str(problem))
            raise
        except BaseException as error:
            if isinstance(error, RuntimeError):
                # So a collective fails when another process ends, which the watch says in one line.
                time.sleep(2)
            watch.tell("")
            raise
        watch.tell(watch.FINISHED)


GATHERING = timedelta(minutes=10)  # all processes begin at about the same time
WAITING = timedelta(days=7)  # for a barrier: others may train a model or build a store meanwhile


# A GPU's step on fewer images takes as long, about: what starts its kernels does (an estimate).
FASTEST_BATCH = 16
# What a GPU may ask for in a second: a ResNet-18 on an H100 learns some 10,000 images of 224 pixels
# (stored as 256), and larger ones more slowly.
ASKED_IMAGES, ASKED_BYTES = 10_000, 2e9
# What one thread gathers in a second from a slow disk. Here it was 0.5e9 to 1.0e9, from memory 6 to
# 18 times that (recipes/measured/data_path.json and its history): a thread too many costs little.
GATHERED_BYTES = 0.6e9


@dataclass(frozen=True)
class Runtime:
    """Devices, processes and arithmetic, from accelerate."""

    accelerator: Accelerator
    precision: str  # float32, bfloat16, float16 (both autocast) or float64
    shared: bool = False  # do the processes share the batches of one training?
    # State of float16's loss scaler before any training; one scaler serves the whole process.
    new_scaler: Mapping[str, Any] = field(default_factory=dict)
    local_world: int = 0  # processes on this node, as the launcher says; 0: it does not

    @staticmethod
    def start(precision: str) -> Runtime:
        check_launch(os.environ)
        # accelerate writes a 1 there on CPUs where the launcher wrote nothing.
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 0))
        mixed = {"float32": "no", "float64": "no", "bfloat16": "bf16", "float16": "fp16"}
        gathering = InitProcessGroupKwargs(timeout=GATHERING)
        try:
            accelerator = Accelerator(
                mixed_precision=mixed.get(precision), kwargs_handlers=[gathering]
            )
        except ValueError as error:
            raise Problem(f"--precision {precision}: {error}") from error
        except torch.distributed.DistError as error:
            raise Problem(
                f"{os.environ.get('WORLD_SIZE')} processes are to work together, and some did not "
                f"come within {GATHERING.seconds} s ({str(error).splitlines()[0]}): start all of "
                "them, with the same MASTER_ADDR and MASTER_PORT."
            ) from error
        except NotImplementedError as error:  # what these GPUs and their driver cannot do together
            raise Problem(" ".join(str(error).split())) from error
        if accelerator.num_processes > 1:
            distributed: Any = torch.distributed.distributed_c10d
            # The second is its name in older torch.
            (getattr(distributed, "set_timeout", None) or distributed._set_pg_timeout)(WAITING)
        if precision == "launch":
            names = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
            precision = names.get(accelerator.mixed_precision, "")
        if not precision:
            raise Problem(f"Mixed precision {accelerator.mixed_precision} is not supported.")
        if precision == "float16" and accelerator.device.type == "cpu":
            # accelerate computes in float32 there, without a word; torch knows better.
            accelerator.native_amp = True
            accelerator.scaler = torch.amp.GradScaler("cpu")
        arithmetic = set_gpu_arithmetic(precision)
        if accelerator.device.type == "cuda":
            say(f"{torch.cuda.get_device_name(accelerator.device)}: {arithmetic}")
        scaler = accelerator.scaler
        new_scaler = scaler.state_dict() if scaler else {}
        return Runtime(accelerator, precision, new_scaler=new_scaler, local_world=local_world)

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

    def on_node(self) -> tuple[int, int]:
        """Place among the processes of this node that share one training, and their number.

        All of them must ask: where the launcher does not say it, they tell each other their hosts.
        """
        if self.world == 1:
            return 0, 1
        if self.local_world:
            return self.accelerator.local_process_index, self.local_world
        hosts = gather_object([socket.gethostname()])
        return hosts[: self.rank].count(hosts[self.rank]), hosts.count(hosts[self.rank])

    def together(self) -> Runtime:
        """The same for work that all processes share."""
        return replace(self, shared=self.accelerator.num_processes > 1)

    def alone(self) -> Runtime:
        """The same for work that each process does for itself."""
        return replace(self, shared=False)

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        return self.accelerator.autocast()

    def upload(self, array: np.ndarray | Tensor) -> Tensor:
        """An array of the host on the device, without a wait."""
        return upload(array, self.device)

    def num_readers(self, image_bytes: int) -> int:
        """Threads that read batches ahead: as many as a GPU may need, and no more than the cores
        that are there for each process of the node. They change no bit, only the speed.

        One on a CPU, whose cores the network has a better use for."""
        if self.device.type == "cpu":
            return 1
        asked = min(ASKED_IMAGES * image_bytes, ASKED_BYTES)
        cores = len(os.sched_getaffinity(0))
        share = cores // (self.local_world or self.accelerator.num_processes)
        return max(1, min(math.ceil(asked / GATHERED_BYTES), share))

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the processes that share one training."""
        return self.accelerator.reduce(tensor, "sum") if self.world > 1 else tensor

    def any(self, flag: bool) -> bool:
        """Is the flag raised on any of them?"""
        if self.world == 1:
            return flag
        return bool(self.sum(torch.tensor(int(flag), device=self.device)))

    def largest(self, tensor: Tensor) -> Tensor:
        """Greatest values on any of them."""
        if self.world > 1:
            torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
        return tensor

    def align(self, model: nn.Module) -> None:
        """Give all of them the first one's buffers, such as batch norm's statistics."""
        if self.world > 1:
            broadcast([*model.buffers()])

    def first(self, function: Callable[[], Any]) -> Any:
        """What the first of them finds, for all; a Problem of it stops all."""
        if self.world == 1:
            return function()
        answer: list[Any] = [None, ""]
        if self.rank == 0:
            try:
                answer[0] = function()
            except Problem as problem:
                answer[1] = str(problem)
        broadcast_object_list(answer)
        if answer[1]:
            raise Problem(answer[1])
        return answer[0]

    def wait(self) -> None:
        """Wait for the processes that share one training: files of the first are then there."""
        if self.world > 1:
            self.accelerator.wait_for_everyone()

    def plan(
        self, jobs: Sequence[Any], parallel: str, batch_size: int
    ) -> tuple[Runtime, list[Any]]:
        """How to train several models: the runtime to use and this process's share of the jobs.

        Whole models in parallel need no communication. Batches are shared where models are fewer
        than processes and their parts, a model after the other, are shorter than a whole batch.
        """
        processes = self.accelerator.num_processes
        part = max(batch_size / processes, FASTEST_BATCH)
        shorter = len(jobs) == 1 or len(jobs) * part < batch_size
        if parallel == "data" or (parallel == "auto" and len(jobs) <= processes and shorter):
            return self.together(), list(jobs)
        return self.alone(), list(jobs[self.accelerator.process_index :: processes])


# ---- Data ----------------------------------------------------------------------------------------


def read_rows(data: Data, root: str) -> list[Row]:
    """Rows of the data set, see `read_data`."""
    return read_data(data, root)[1]


def read_data(data: Data, root: str) -> tuple[Data, list[Row]]:
    """Rows of the data set, from the recipe's reader or the metadata table; before them `data`,
    named by the table's words where the recipe gives no names.

    Raises Problem for a missing table, column or image, and for an unknown split code.
    """
    if data.reader is not None:
        return data, rows_of_reader(data.reader, Path(root))
    path = Path(root) / data.metadata
    records = read_table(path, data)
    files = [path.parent / record[data.image_column] for record in records]
    if absent := [str(file) for file in files if not is_image_file(file)]:
        raise Problem(
            f"{len(absent)} of the {len(files)} images that {path} names do not exist: "
            + ", ".join(absent)
        )
    labels = column_codes(path, data.label_column, records, data.class_names)
    attributes = [0] * len(records)
    if data.attribute_column:
        attributes = column_codes(path, data.attribute_column, records, data.attribute_names)
    splits = [SPLITS[data.split_codes.index(record[data.split_column])] for record in records]
    rows = [Row(*values) for values in zip(files, labels, attributes, splits, strict=True)]
    return with_names(data, records), rows


def rows_of_reader(reader: Callable[[Path], Iterable[Row]], root: Path) -> list[Row]:
    """What a recipe's reader returns; raises Problem, with the place, for an error in it."""
    try:
        return list(reader(root))
    except Problem:
        raise
    except Exception as error:  # the recipe's own code
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise Problem(
            f"The recipe's reader failed ({place.filename}, line {place.lineno}): {reason}."
        ) from error


def is_image_file(path: Path) -> bool:
    """Is there a file? Names that no file system takes are none."""
    try:
        return path.is_file()
    except OSError:
        return False


def read_table(path: Path, data: Data) -> list[dict[str, str]]:
    """The records of metadata.csv, with nothing missing in the columns that are needed."""
    if not path.is_file():
        raise Problem(f"{path} does not exist: give the folder of the data with --root.")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            records = list(reader)
            present = list(reader.fieldnames or [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise Problem(f"{path} is no table of text in UTF-8 ({error}): save it as CSV.") from error
    needed = [data.image_column, data.label_column, data.split_column]
    if data.attribute_column:
        needed.append(data.attribute_column)
    for column in needed:
        if column not in present:
            raise Problem(
                f"{path} has no column {column!r}; it has {', '.join(map(repr, present))}: name "
                "yours in the recipe's Data (image_column, label_column ...)."
            )
        if present.count(column) > 1:
            raise Problem(f"{path} has several columns {column!r}: leave one of them.")
    if not records:
        raise Problem(f"{path} has no rows.")
    for line, record in enumerate(records, 2):
        missing = [column for column in needed if record[column] in (None, "")]
        is_training = record[data.split_column] == data.split_codes[0]
        if missing == [data.attribute_column] and not is_training:
            raise Problem(
                f"{path}, line {line}: {data.attribute_column!r} is missing, which only training "
                "images may lack: fill it in for validation and test, or set attribute_column = '' "
                "to do without (groups can be inferred, see DFR.groups)."
            )
        if missing and missing != [data.attribute_column]:
            raise Problem(f"{path}, line {line}: a value of {', '.join(needed)} is missing.")
        if record[data.split_column] not in data.split_codes:
            raise Problem(
                f"{path}, line {line}: column {data.split_column!r} holds "
                f"{record[data.split_column]!r}, but Data.split_codes are "
                f"{', '.join(data.split_codes)} (training, validation, test)."
            )
    return records


def with_names(data: Data, records: Sequence[Mapping[str, str]]) -> Data:
    """The same data, named by the words of the table where the recipe gives no names."""
    classes, attributes = data.class_names, data.attribute_names
    classes = classes or tuple(column_words(data.label_column, records))
    if data.attribute_column:
        attributes = attributes or tuple(column_words(data.attribute_column, records))
    return replace(data, class_names=classes, attribute_names=attributes)


def column_words(column: str, records: Sequence[Mapping[str, str]]) -> list[str]:
    """The words a column holds, sorted; none if it holds numbers."""
    words = sorted({record[column] or "" for record in records} - {""})
    is_numbered = all(word.isdecimal() and len(word) < 10 for word in words)  # longer: names
    return [] if is_numbered else words


def column_codes(
    path: Path, column: str, records: Sequence[Mapping[str, str]], names: tuple[str, ...]
) -> list[int]:
    """The numbers a column holds, or the places of its words in `names` (else in sorted order);
    -1 for what it leaves empty."""
    values = [record[column] or "" for record in records]
    words = column_words(column, records)
    if not words:
        return [int(value or -1) for value in values]
    order = list(names) or words
    for line, value in enumerate(values, 2):
        if value and value not in order:
            raise Problem(
                f"{path}, row {line}: column {column!r} holds {value!r}, which is not one of "
                f"{', '.join(order)}."
            )
    return [order.index(value) if value else -1 for value in values]


def decode(source: Path | np.ndarray | io.BytesIO, size: int, geometry: str) -> np.ndarray:
    """Decode an image and fit it to the stored square: uint8 [3, size, size]."""
    image: Image.Image
    if isinstance(source, np.ndarray):
        image = Image.fromarray(source)
    else:
        with Image.open(source) as file:
            image = ImageOps.exif_transpose(file)
    image = eight_bits(image).convert("RGB")
    box = None
    if geometry == "shorter_side":
        side = min(image.size)
        left = (image.width - side) / 2
        top = (image.height - side) / 2
        box = (left, top, left + side, top + side)
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return np.asarray(image).transpose(2, 0, 1)


def eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16 bits with the upper 8 of them, where Pillow would cut off at 255. Raises
    ValueError for one whose range of values is not known."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    if image.mode in ("I", "F"):
        low, high = typing.cast(tuple[float, float], image.getextrema())
        if not (low >= 0 and high <= 255 and (image.mode == "I" or high > 1)):
            raise ValueError(f"values from {low:g} to {high:g}: save it with 8 or 16 bits")
    return image


class Stored(NamedTuple):
    """Stored images and how they become a view; on a machine with a GPU in pinned memory."""

    raw: Tensor  # uint8 [B, 3, S, S]
    transform: Tensor | None = None  # float32 [B, 2, 3], see crop_transforms; None: the centre
    flips: Tensor | None = None  # bool [B], centres that are mirrored; None: none is


BLOCK = 256  # images per checksum, and per step of a prediction
THREADS = ThreadPoolExecutor(os.cpu_count())  # decode images


@dataclass
class Store:
    """A data set, decoded once into a memory-mapped uint8 array [N, 3, S, S].

    Beyond max_store_gb: the encoded files one after the other, decoded by threads when read.

    Scored are groups; heads are refitted on balanced cells, the pairs of class and attribute.
    Groups are the cells, or two: aligned and conflicting.
    """

    data: Data
    folder: Path
    images: np.ndarray  # uint8 [N, 3, S, S], or the bytes of all files
    offsets: list[int]  # where each file begins and the last one ends; empty if decoded
    checksums: list[int]  # CRC-32 of each BLOCK of images, or of each file
    labels: np.ndarray  # int64 [N]
    attributes: np.ndarray  # int64 [N], -1 where it is unknown, in training
    splits: np.ndarray  # int8 [N], places in SPLITS
    checked: set[int] = field(default_factory=set)
    extra: np.ndarray | None = None  # uint8 [K, 3, S, S], generated images behind those stored

    def __post_init__(self) -> None:
        self._name_classes_and_groups()
        self._divide()
        # Without attributes, refitting a head balances classes only.
        self.refit_name = "DFR" if self.num_attributes > 1 else "CB-LLR"
        # What the pixels are, wherever the files lie: moving a data set changes nothing.
        self.fingerprint = digest(
            self.checksums, self.labels.tolist(), self.attributes.tolist(), self.splits.tolist()
        )

    def _name_classes_and_groups(self) -> None:
        aligned = self.data.groups == "aligned"
        class_names, attribute_names = self.data.class_names, self.data.attribute_names
        if not (self.data.reader or self.data.attribute_column):
            attribute_names = ()  # of a recipe that had attributes before
            if aligned:
                raise Problem("groups = aligned tells by the attributes: set attribute_column.")
        if aligned:
            attribute_names = ("aligned", "conflicting")
            conflicting = (self.attributes != self.labels).astype(np.int64)
            self.attributes = np.where(self.attributes < 0, -1, conflicting)
        self.num_classes = max(int(self.labels.max()) + 1, len(class_names))
        self.num_attributes = max(int(self.attributes.max()) + 1, len(attribute_names))
        class_names = class_names or tuple(f"class {y}" for y in range(self.num_classes))
        attribute_names = attribute_names or tuple(
            f"attribute {a}" for a in range(self.num_attributes)
        )
        for kind, names, count in (("class_names", class_names, self.num_classes),
                                   ("attribute_names", attribute_names, self.num_attributes)):
            if len(names) != count:
                raise Problem(f"Data.{kind} has {len(names)} names, but the data have {count}.")
        self.class_names = class_names
        cells = self.labels * self.num_attributes + self.attributes
        self.cells = np.where(self.attributes < 0, -1, cells)
        self.cell_names = [*class_names]
        if self.num_attributes > 1:
            self.cell_names = [f"{y}, {a}" for y in class_names for a in attribute_names]
        self.groups = self.attributes if aligned else self.cells
        self.group_names = [*attribute_names] if aligned else self.cell_names

    def _divide(self) -> None:
        """Splits and the two parts of validation, drawn within every cell, alike for all seeds."""
        self.parts = {name: np.flatnonzero(self.splits == i) for i, name in enumerate(SPLITS)}
        val = self.parts["val"]
        refitting = []
        for cell in range(len(self.cell_names)):
            members = val[self.cells[val] == cell]
            count = math.ceil(self.data.reweighting * len(members))
            refitting.append(members[permutation(len(members), cell)][:count])
        self.parts["reweighting"] = np.sort(np.concatenate(refitting))
        self.parts["selection"] = np.setdiff1d(val, self.parts["reweighting"])
        self.sizes = {name: self._group_sizes(part) for name, part in self.parts.items()}

    def _group_sizes(self, part: np.ndarray) -> np.ndarray:
        groups = self.groups[part]
        if groups.min(initial=0) < 0:
            return np.zeros(len(self.group_names), np.int64)
        return np.bincount(groups, minlength=len(self.group_names))

    @property
    def num_unknown(self) -> int:
        """Training images whose attribute is unknown."""
        return int((self.attributes < 0).sum())

    def split(self, name: str) -> np.ndarray:
        """Indices of a split; `reweighting` and `selection` are the two parts of validation."""
        return self.parts[name]

    def counts(self, name: str) -> np.ndarray:
        """Images per group of a split: int64 [G]. None is counted where one is unknown."""
        return self.sizes[name]

    def raw(self, indices: np.ndarray) -> np.ndarray:
        """Stored images, uint8 [B, 3, S, S]. Checksums are verified when first read."""
        return self.gather(indices, torch.device("cpu")).numpy()

    def gather(self, indices: np.ndarray, device: torch.device) -> Tensor:
        """The same for a device: what a GPU is to have is written to pinned memory at once."""
        shape = (len(indices), 3, self.data.size, self.data.size)
        if device.type == "cuda":
            images = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        else:
            # Of fresh memory numpy asks for larger pages than torch, which are got faster.
            images = torch.from_numpy(np.empty(shape, np.uint8))
        array = images.numpy()
        if self.extra is None:
            self._stored(indices, array)
            return images
        num_stored = len(self.labels) - len(self.extra)
        stored = indices < num_stored
        array[~stored] = self.extra[indices[~stored] - num_stored]
        if stored.any():
            array[stored] = self._stored(indices[stored])
        return images

    def _stored(self, indices: np.ndarray, images: np.ndarray | None = None) -> np.ndarray:
        if self.offsets:
            return np.stack([*THREADS.map(self._decoded, indices.tolist())], out=images)
        for block in set((indices // BLOCK).tolist()) - self.checked:
            first = block * BLOCK
            self._check(block, self.images[first : first + BLOCK].tobytes())
        # clip: to raise, numpy would first gather elsewhere.
        return np.take(self.images, indices, 0, images, "clip")

    def _decoded(self, i: int) -> np.ndarray:
        content = self.images[self.offsets[i] : self.offsets[i + 1]].tobytes()
        self._check(i, content)
        return decode(io.BytesIO(content), self.data.size, self.data.geometry)

    def _check(self, place: int, content: bytes) -> None:
        if place not in self.checked and zlib.crc32(content) != self.checksums[place]:
            raise Problem(f"{self.folder} is damaged (block {place}): delete it and run again.")
        self.checked.add(place)

    def view(
        self, indices: np.ndarray, device: torch.device, view: int | None = None, seed: int = 0
    ) -> Tensor:
        """Images as networks see them: float32 [B, 3, crop, crop] in 0..1, not normalised.

        view None is the evaluation view, the centre; otherwise the augmentation of image i is a
        function of (seed, view, i) alone.
        """
        return self.show(self.read(indices, device, view, seed), device)

    def read(
        self, indices: np.ndarray, device: torch.device, view: int | None = None, seed: int = 0
    ) -> Stored:
        """The host's part of `view`, for a thread ahead."""
        flips, transform = None, None
        if view is not None and self.data.flip:
            flips = random_flips(seed, view, indices)
        if view is not None and self.data.random_crop:
            boxes = random_boxes(seed, view, indices, self.data)
            transform = pinned(crop_transforms(boxes, flips, self.data.size), device)
            flips = None
        raw = self.gather(indices, device)
        if flips is None or not flips.any():
            return Stored(raw, transform)
        return Stored(raw, transform, pinned(torch.from_numpy(flips), device))

    def show(self, stored: Stored, device: torch.device) -> Tensor:
        """The device's part of `view`."""
        raw, transform, flips = (
            each if each is None else each.to(device, non_blocking=True) for each in stored
        )
        assert raw is not None
        if transform is not None:
            images = crop_boxes(raw, transform, self.data.crop)
        else:
            start = (self.data.size - self.data.crop) // 2
            middle = slice(start, start + self.data.crop)
            images = raw[:, :, middle, middle].float() / 255
            if flips is not None:
                images = torch.where(flips[:, None, None, None], images.flip(3), images)
        return images.contiguous(memory_format=torch.channels_last)


def random_flips(seed: int, view: int, indices: np.ndarray) -> np.ndarray:
    """Which images [B] are mirrored in a view."""
    return hash_uniform(seed, view, indices, Stream.FLIP) < 0.5


def flip_some(images: Tensor, flips: np.ndarray) -> Tensor:
    """Images [B, 3, S, S], those of `flips` [B] mirrored."""
    if not flips.any():
        return images
    chosen = upload(flips, images.device)
    return torch.where(chosen[:, None, None, None], images.flip(3), images)


def random_boxes(seed: int, view: int, indices: np.ndarray, data: Data) -> np.ndarray:
    """RandomResizedCrop's boxes (left, top, width, height) in stored pixels: int64 [B, 4].

    torchvision's distribution: ten tries at an area and an aspect ratio, then the whole square.
    """
    size, tries = data.size, np.arange(10)
    keys = (seed, view, indices[:, None])
    low, high = data.crop_scale
    area = (low + (high - low) * hash_uniform(*keys, Stream.AREA + tries)) * size**2  # [B, 10]
    low, high = np.log(data.crop_ratio)
    ratio = np.exp(low + (high - low) * hash_uniform(*keys, Stream.RATIO + tries))
    width = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    height = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (width >= 1) & (width <= size) & (height >= 1) & (height <= size)
    rows, first = np.arange(len(indices)), fits.argmax(1)
    width = np.where(fits.any(1), width[rows, first], size)
    height = np.where(fits.any(1), height[rows, first], size)
    left = hash_uniform(seed, view, indices, Stream.LEFT) * (size - width + 1)
    top = hash_uniform(seed, view, indices, Stream.TOP) * (size - height + 1)
    return np.stack([left.astype(np.int64), top.astype(np.int64), width, height], 1)


def crop_transforms(boxes: np.ndarray, flips: np.ndarray | None, size: int) -> Tensor:
    """Boxes [B, 4], mirrored where `flips` [B] says so, as affine maps float32 [B, 2, 3] from the
    output to the stored square, both in -1..1."""
    left, top, width, height = boxes.T
    theta = np.zeros((len(boxes), 2, 3), np.float32)
    theta[:, 0, 0] = width / size
    if flips is not None:
        theta[flips, 0, 0] *= -1
    theta[:, 1, 1] = height / size
    theta[:, 0, 2] = (2 * left + width) / size - 1
    theta[:, 1, 2] = (2 * top + height) / size - 1
    return torch.from_numpy(theta)


def crop_boxes(raw: Tensor, transform: Tensor, crop: int) -> Tensor:
    """Boxes of stored images uint8 [B, 3, S, S], resized: [B, 3, crop, crop]."""
    # affine_grid is a matrix product: under autocast teachers would see other crops than the
    # student, by half a pixel.
    with torch.autocast(raw.device.type, enabled=False):
        grid = F.affine_grid(transform, [len(raw), 3, crop, crop], align_corners=False)
        images = F.grid_sample(raw.float() / 255, grid, padding_mode="border", align_corners=False)
    return images.clamp_(0, 1)


def enlarge(store: Store, images: np.ndarray, labels: np.ndarray, ratio: float) -> Store:
    """The store with images [K, 3, S, S] added to its training split, each once, or with a `ratio`
    so many as that share of the training images, drawn at random, repeated where there are fewer.
    Their groups are unknown: no figure counts them."""
    union, train = copy.copy(store), store.split("train")
    unknown = np.full(len(labels), -1)
    union.extra = images
    union.labels = np.concatenate([store.labels, labels])
    union.cells = np.concatenate([store.cells, unknown])
    union.groups = np.concatenate([store.groups, unknown])
    drawn, count = np.arange(len(labels)), len(labels)
    if ratio:  # a set's order is that of its sources
        drawn, count = permutation(len(labels), 0), max(1, round(ratio * len(train)))
    added = len(store.labels) + drawn[np.arange(count) % len(labels)]
    union.parts = {**store.parts, "train": np.concatenate([train, added])}
    content = [zlib.crc32(images.tobytes()), labels.tolist(), ratio]
    if ratio:
        content.append("drawn at random")
    union.fingerprint = digest(store.fingerprint, content)
    return union


def rebalanced(store: Store, clusters: np.ndarray, within: np.ndarray) -> Store:
    """The store with training images repeated until every cluster [N] is as large as the largest of
    those that share a value of `within` [N]; negative clusters stay as they are."""
    train = store.split("train")
    places = [np.arange(len(train))]
    for outer in np.unique(within):
        inside = within == outer
        members = [
            np.flatnonzero(inside & (clusters == cluster))
            for cluster in np.unique(clusters[inside & (clusters >= 0)])
        ]
        for each in members:
            missing = max(map(len, members)) - len(each)
            shuffled = each[permutation(len(each), 0)]
            places.append(shuffled[np.arange(missing) % len(each)])
    balanced = copy.copy(store)
    balanced.parts = {**store.parts, "train": train[np.concatenate(places)]}
    balanced.fingerprint = digest(store.fingerprint, balanced.parts["train"].tolist())
    return balanced


def loss_clusters(losses: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """TAB's clusters [N]: k-means with k = 2 within each class on loss histories [epochs, N]."""
    from sklearn.cluster import KMeans

    clusters = np.zeros(len(labels), np.int64)
    for y in np.unique(labels):
        members = labels == y
        clusters[members] = 2 * y
        if members.sum() > 1:
            means = KMeans(2, n_init=10, random_state=seed % 2**32)
            clusters[members] += means.fit(losses.T[members].astype(float)).labels_
    return clusters


def open_store(data: Data, root: str) -> Store:
    """Build the store of a data set, or find the one built before; check the groups."""
    data, rows = checked_data(data, root)
    encoded = is_encoded(rows, data)
    folder = store_folder(rows, data)
    with locked(folder.with_suffix(".lock"), wait=True) as alone:
        is_there = (folder / "manifest.json").is_file()
        if read_manifest(rows, data, folder) is None:
            if alone or is_there:
                shutil.rmtree(folder, ignore_errors=True)
            if alone:  # on this machine: what was begun here is of processes that were killed
                for part in folder.parent.glob(f"{folder.name}.part-{socket.gethostname()}-*"):
                    shutil.rmtree(part)
            build_store(rows, data, folder, encoded)
    return stored_rows(rows, data, folder)


def checked_rows(data: Data, root: str) -> list[Row]:
    """Rows of the data set, see `checked_data`."""
    return checked_data(data, root)[1]


def checked_data(data: Data, root: str) -> tuple[Data, list[Row]]:
    """What `read_data` finds; raises Problem for values that mean nothing."""
    data, rows = read_data(data, root)
    source = "The recipe's reader" if data.reader else str(Path(root) / data.metadata)
    if not rows:
        raise Problem(f"{source} gives no images.")
    for row in rows:
        if not is_row(row):
            shown = textwrap.shorten(repr(row), 200)
            raise Problem(f"{source} gives {shown}: see grokd.Row for what it means.")
        if max(row.label, row.attribute) >= len(rows):  # every class and attribute needs images
            raise Problem(
                f"{source} gives class {row.label} and attribute {row.attribute}, and only "
                f"{len(rows)} images: number both from 0, or name them."
            )
    return data, rows


def is_row(row: Any) -> bool:
    """Does it mean an image?"""
    if not isinstance(row, Row) or row.split not in SPLITS:
        return False
    if not isinstance(row.image, Path | np.ndarray):
        return False
    if not all(isinstance(number, int | np.integer) for number in (row.label, row.attribute)):
        return False
    return row.label >= 0 and row.attribute >= (-1 if row.split == "train" else 0)


def is_encoded(rows: Sequence[Row], data: Data) -> bool:
    """Are there too many images to be stored decoded?"""
    return store_bytes(len(rows), data.size) > data.max_store_gb * 1e9


def store_folder(rows: Sequence[Row], data: Data) -> Path:
    """Where the store of these rows stands, or would."""
    form = "encoded" if is_encoded(rows, data) else [data.size, data.geometry]
    return Path(data.store) / digest([image_identity(row.image) for row in rows], form)


def stored_rows(rows: Sequence[Row], data: Data, folder: Path) -> Store:
    """The store in `folder`; without one, the same without images, of which to ask for numbers."""
    manifest = read_manifest(rows, data, folder)
    images: np.ndarray = np.zeros((0, 3, data.size, data.size), np.uint8)
    if manifest:
        images = np.memmap(folder / "images.u8", np.uint8, "r")
        if not manifest["offsets"]:
            images = images.reshape(len(rows), 3, data.size, data.size)
    else:
        manifest = {"offsets": [], "checksums": []}
    store = Store(
        data, folder, images, **manifest,
        labels=np.array([row.label for row in rows], np.int64),
        attributes=np.array([row.attribute for row in rows], np.int64),
        splits=np.array([SPLITS.index(row.split) for row in rows], np.int8),
    )
    check_groups(store)
    return store


def read_manifest(rows: Sequence[Row], data: Data, folder: Path) -> dict[str, Any] | None:
    """What the store in `folder` says of itself; None, with a warning if it is damaged, where it is
    to be built. Blocks of images are checked as they are read."""
    path, images = folder / "manifest.json", folder / "images.u8"
    if not path.is_file():
        return None
    try:
        manifest = read_json(path)
        offsets, size = manifest["offsets"], images.stat().st_size
        if size != (offsets[-1] if offsets else store_bytes(len(rows), data.size)):
            raise ValueError(f"images.u8 has {size:,} bytes")
    except (Problem, OSError, KeyError, ValueError) as error:
        say(f"warning: {folder} is damaged, so it is built anew ({error})")
        return None
    return manifest


def image_identity(image: Path | np.ndarray) -> Any:
    """What tells an image from another without decoding it."""
    if isinstance(image, np.ndarray):
        return [str(image.dtype), image.shape, zlib.crc32(image.tobytes())]
    try:
        stat = image.stat()
    except (OSError, ValueError) as error:
        raise Problem(f"The image {image} is not there: {error}.") from error
    return [str(image.absolute()), stat.st_size, stat.st_mtime_ns]


def check_groups(store: Store) -> None:
    """Raise Problem for a split, a class of training or a cell of refitting without images."""
    for name in SPLITS:
        if not len(store.split(name)):
            raise Problem(f"The data have no {name} images: every split is needed.")
    trained = set(store.labels[store.split("train")].tolist())
    if store.num_classes < 2:
        raise Problem(f"All images are of one class, {store.class_names[0]}: there is nothing to "
                      "tell apart.")
    if absent := [name for y, name in enumerate(store.class_names) if y not in trained]:
        raise Problem(f"No training image of {', '.join(absent)}: each class needs some.")
    refitted = set(store.cells[store.split("reweighting")].tolist())
    if absent := [name for cell, name in enumerate(store.cell_names) if cell not in refitted]:
        raise Problem(
            f"No image of group {'; '.join(absent)} in the part of validation that refits heads: "
            "add some, or set attribute_column = '' to balance classes only."
        )


def store_bytes(num_images: int, size: int) -> int:
    """Size of a store of decoded images."""
    return 3 * size**2 * num_images


def stored_form(row: Row, data: Data, encoded: bool) -> bytes:
    """What is stored of an image; it is decoded in any case, to know that it can be."""
    decoded = decode(row.image, data.size, data.geometry)
    if not encoded:
        return decoded.tobytes()
    if isinstance(row.image, Path):
        return row.image.read_bytes()
    buffer = io.BytesIO()
    Image.fromarray(row.image).save(buffer, "png")
    return buffer.getvalue()


def stored_bytes(rows: Sequence[Row], data: Data, encoded: bool) -> int:
    """What a store of these rows takes on disk."""
    one = store_bytes(1, data.size)
    if not encoded:
        return one * len(rows)
    return sum(row.image.stat().st_size if isinstance(row.image, Path) else one for row in rows)


def announce_store(rows: Sequence[Row], data: Data, folder: Path, encoded: bool) -> None:
    """Say what a store will take; raise Problem if the disk cannot hold it."""
    total = stored_bytes(rows, data, encoded)
    free = shutil.disk_usage(folder.parent).free
    doing = "Packing" if encoded else "Decoding"
    say(f"{doing} {len(rows):,} images into {folder}: {total / 1e9:.2f} GB, {free / 1e9:.0f} free")
    if total > free:
        raise Problem(
            f"{folder} needs {total / 1e9:.1f} GB, {free / 1e9:.1f} are free: make room, lower "
            "Data.size, or name another disk as Data.store."
        )


def build_store(rows: list[Row], data: Data, folder: Path, encoded: bool) -> None:
    """Decode every image into `folder`, in parallel; the folder appears only when complete.

    Another process may have come first, where locks do not hold; its folder is as good.
    """
    part = folder.with_suffix(f".part-{socket.gethostname()}-{os.getpid()}")
    failures = list[str]()
    part.mkdir(parents=True, exist_ok=True)
    announce_store(rows, data, folder, encoded)

    def load(i: int) -> bytes:
        try:
            return stored_form(rows[i], data, encoded)
        except Exception as error:  # Pillow's plug-ins raise what they like
            source = rows[i].image
            failures.append(f"{source if isinstance(source, Path) else f'image {i}'} ({error})")
            return b""

    offsets, checksums = [0], list[int]()
    with open(part / "images.u8", "wb") as file:
        for start in progress_bar(range(0, len(rows), BLOCK), "store"):
            block = list(THREADS.map(load, range(start, min(start + BLOCK, len(rows)))))
            file.write(b"".join(block))
            if encoded:
                offsets += [offsets[-1] + end for end in itertools.accumulate(map(len, block))]
                checksums += map(zlib.crc32, block)
            else:
                checksums.append(zlib.crc32(b"".join(block)))
    if failures:
        shutil.rmtree(part)
        raise Problem(f"{len(failures)} images cannot be read: " + ", ".join(sorted(failures)))
    manifest = {"offsets": offsets if encoded else [], "checksums": checksums}
    (part / "manifest.json").write_text(json.dumps(with_checksum(manifest)))
    try:
        part.rename(folder)
    except OSError:
        if not (folder / "manifest.json").is_file():
            raise
        shutil.rmtree(part)


def prefetch(
    items: Sequence[Any], load: Callable[[Any], Any], num_threads: int = 1
) -> Iterator[tuple[Any, Any]]:
    """Each item with load(item), in order; threads load ahead, one item more than there are
    threads."""
    count = num_threads + 1
    with ThreadPoolExecutor(num_threads) as threads:
        ahead = [threads.submit(load, item) for item in items[:count]]
        for i, item in enumerate(items):
            if i + count < len(items):
                ahead.append(threads.submit(load, items[i + count]))
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
    "cnn2": CNN2,
    "resnet8": ResNet8,
    "resnet8_gn": lambda num_classes: ResNet8(num_classes, lambda width: nn.GroupNorm(8, width)),
}
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # GoogLeNet's and Inception's extra heads: unused
WEIGHTS_FILES = (".safetensors", ".pth", ".pt", ".tar", ".ckpt", ".bin")
# Keys of torchvision's own DenseNet weights, which it renames as it loads them.
OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")


class CLIPSizes(NamedTuple):
    """Sizes of a CLIP's image tower."""

    width: int
    layers: int
    patch: int  # side of a patch, in pixels
    size: int  # side of an image
    dim: int  # of the embeddings
    heads: int = 0  # 0: one for each 64 of the width
    mlp: int = 0  # width of a block's hidden layer; 0: four times the width
    activation: str = "quick_gelu"  # OpenAI's, or gelu


def clip_sizes(arch: str) -> CLIPSizes:
    """The sizes that an architecture's name holds: clip:width=768,layers=12,patch=32,..."""
    try:
        values: dict[str, Any] = {}
        for part in arch.removeprefix("clip:").split(","):
            name, value = part.split("=")
            values[name] = value if name == "activation" else int(value)
        sizes = CLIPSizes(**values)
        heads, mlp = sizes.heads or sizes.width // 64, sizes.mlp or 4 * sizes.width
        if sizes.width % heads or sizes.activation not in ("quick_gelu", "gelu"):
            raise ValueError
    except (TypeError, ValueError, ZeroDivisionError):
        raise Problem(
            f"Architecture {arch!r}: after clip: stand {', '.join(CLIPSizes._fields)} as "
            "recipes/clip_teacher.py prints them."
        ) from None
    return sizes._replace(heads=heads, mlp=mlp)


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's activation."""
    return x * torch.sigmoid(1.702 * x)


class CLIPTower(nn.Module):
    """CLIP's image tower (Radford et al. 2021) under a linear head: [B, 3, S, S] -> [B, C].

    Features are embeddings of unit length, so that a head of text embeddings times CLIP's logit
    scale classifies as CLIP does.
    """

    def __init__(self, sizes: CLIPSizes, num_classes: int) -> None:
        super().__init__()
        width, self.image_size = sizes.width, sizes.size
        self.conv = nn.Conv2d(3, width, sizes.patch, sizes.patch, bias=False)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        num_tokens = (sizes.size // sizes.patch) ** 2 + 1
        self.positions = nn.Parameter(width**-0.5 * torch.randn(num_tokens, width))
        self.ln_pre = nn.LayerNorm(width)
        activation = F.gelu if sizes.activation == "gelu" else quick_gelu
        block = nn.TransformerEncoderLayer(
            width, sizes.heads, sizes.mlp, 0.0, activation, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(block, sizes.layers, enable_nested_tensor=False)
        self.ln_post = nn.LayerNorm(width)
        self.projection = nn.Linear(width, sizes.dim, bias=False)
        self.fc = nn.Linear(sizes.dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.conv(images).flatten(2).mT  # [B, P, width]
        token = self.class_embedding.expand(patches.shape[0], 1, -1)
        tokens = torch.cat([token, patches], 1) + self.positions
        encoded = self.encoder(self.ln_pre(tokens))[:, 0]
        embeddings = self.projection(self.ln_post(encoded)).to(self.positions.dtype)
        return self.fc(F.normalize(embeddings, dim=-1))


OF_TRAINING = ("adapters.", "samples.")  # what a student has in training only


class Classifier(nn.Module):
    """A network with its normalisation, as a trunk (image -> features) and a linear head. A SimKD
    student's features are what a projector makes of the trunk's last map, see `project`.

    forward: images [B, 3, crop, crop] in 0..1 -> logits [B, C], in the head's own precision even
    under autocast. Raises Problem for an unknown architecture or one without a linear last layer.
    """

    projector: nn.Sequential
    last_map: Tensor  # [B, d, h, w] of the forward pass, where there is a projector

    def __init__(self, arch: str, num_classes: int, input: Input) -> None:
        super().__init__()
        self.arch, self.num_classes, self.input = arch, num_classes, input
        self.folded_from = ""  # see fold
        self.projection: Projection | None = None
        self.trunk = plain_network(arch, num_classes)
        self.fixed_side = fixed_side(self.trunk)
        self.head_path = find_head(self.trunk)
        head = dict(self.trunk.named_modules()).get(self.head_path)
        if not isinstance(head, nn.Linear) or head.bias is None:
            raise Problem(f"{arch} does not end in a linear layer with a bias: choose another.")
        self.head = head
        self.trunk.set_submodule(self.head_path, nn.Identity())
        for name, parameter in self.trunk.named_parameters():
            if name.startswith(AUXILIARY):
                parameter.requires_grad_(False)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(input.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(input.std)[:, None, None], persistent=False)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate pooled features [B, d]: what the head multiplies."""
        images = resized(images, self.input.input_size)
        fixed = self.fixed_side
        if fixed and fixed != images.shape[-1]:
            raise Problem(
                f"{self.arch} takes {fixed} pixels, not {images.shape[-1]}: set input_size = "
                f"{fixed}."
            )
        output = self.trunk((images.to(self.head.weight.dtype) - self.mean) / self.std)
        if self.projection:
            return self.projector(self.last_map)
        return output if isinstance(output, Tensor) else output.logits  # GoogLeNet, Inception

    def classify(self, features: Tensor) -> Tensor:
        """Logits [B, C] of features, outside autocast."""
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features.to(self.head.weight.dtype))

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.features(images))

    def project(self, projection: Projection) -> None:
        """Put a new projector, and a new head of its width, behind a map of the trunk.

        What the trunk does with that map itself counts no more."""
        self.projection, self.projector = projection, build_projector(projection)
        self.head = nn.Linear(projection.features, self.num_classes)
        self.trunk.get_submodule(projection.layer).register_forward_hook(self._keep_map)

    def _keep_map(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.last_map = as_map(output)

    def plain_state(self) -> dict[str, Tensor]:
        """State dict with the keys of the plain network, on the CPU, and a projector's."""
        state = {
            key.removeprefix("trunk."): value
            for key, value in self.state_dict().items()
            if not key.startswith(OF_TRAINING)
        }
        for name in ("weight", "bias"):
            state[f"{self.head_path}.{name}"] = state.pop(f"head.{name}")
        return {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}

    def load_plain(self, state: Mapping[str, Tensor], source: str, any_head: bool = False) -> bool:
        """Load such a state dict, strictly; returns whether its head was loaded.

        With `any_head` it may be another's: keys under a prefix, a head that is missing or for
        other classes. The head is then left as it was.
        """
        state, present = dict(state), self.plain_state()
        fits = True
        if any_head:
            state = without_prefix(state, [*present], source)
            heads = (f"{self.head_path}.", *AUXILIARY)
            left = {key: value for key, value in present.items() if key.startswith(heads)}
            fits = all(key in state for key in left if not key.startswith(AUXILIARY))
            fits &= all(state[key].shape == left[key].shape for key in left if key in state)
            if not fits:
                state = {key: value for key, value in state.items() if not key.startswith(heads)}
            state = {**left, **state}
        check_finite(state, source)
        prefix = f"{self.head_path}."
        nested = {}
        for key, value in state.items():
            outer = f"trunk.{key}"
            if key.startswith(prefix):
                outer = f"head.{key.removeprefix(prefix)}"
            elif self.projection and key.startswith("projector."):
                outer = key
            nested[outer] = value
        try:
            self.load_state_dict(nested)
        except RuntimeError as error:
            reason = " ".join(str(error).split()).partition(": ")[2]
            raise Problem(f"{source} does not fit {self.arch}: {reason[:200]} ...") from error
        return fits


def resized(images: Tensor, side: int) -> Tensor:
    """Images [B, 3, S, S] at the side that a network takes; 0: as they are."""
    if not side or side == images.shape[-1]:
        return images
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True)


def plain_network(arch: str, num_classes: int) -> nn.Module:
    """The network as torchvision, timm or we have it, with random weights of torch's generator."""
    if arch in SMALL:
        return SMALL[arch](num_classes)
    if arch.startswith("clip:"):
        return CLIPTower(clip_sizes(arch), num_classes)
    if arch.startswith(TIMM):
        return import_timm(arch).create_model(timm_name(arch), num_classes=num_classes)
    from torchvision import models

    choices = [*SMALL, *models.list_models(module=models)]
    if arch not in choices:
        raise Problem(f"Unknown architecture {arch!r}{suggest(arch, choices)}")
    extra = {"init_weights": True} if arch in ("googlenet", "inception_v3") else {}
    return models.get_model(arch, weights=None, num_classes=num_classes, **extra)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Is every number of them finite? The device is waited for once."""
    flags = [tensor.isfinite().all() for tensor in tensors if tensor.is_floating_point()]
    return bool(torch.stack(flags).all()) if flags else True


def check_finite(state: Mapping[str, Tensor], source: str) -> None:
    """Raise Problem for weights that are not finite: every answer of them would be."""
    if all_finite(state.values()):
        return
    bad = [name for name, value in state.items() if not all_finite([value])]
    raise Problem(
        f"{source} holds values that are not finite ({', '.join(bad)[:200]}): its training has "
        "diverged or it is damaged, so make it again or name another file."
    )


def find_head(network: nn.Module) -> str:
    """Path of the layer that puts out the logits: the one that timm names, else the last linear
    one. Empty if there is none, or if timm names several."""
    if config := timm_config(network):
        path = config.get("classifier")
        return path if isinstance(path, str) else ""
    linear = [
        name for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear) and not name.startswith(AUXILIARY)
    ]
    return linear[-1] if linear else ""


def fixed_side(network: nn.Module) -> int:
    """Side of the only images that a network takes, such as a vision transformer; 0: any."""
    if config := timm_config(network):
        return config["input_size"][-1] if config.get("fixed_input_size") else 0
    return getattr(network, "image_size", 0)


TIMM = "timm:"  # stands before the names of timm's networks


def import_timm(arch: str) -> Any:
    """The package, an extra of ours; raises Problem if it is missing."""
    try:
        import timm
    except ImportError as error:
        raise Problem(
            f"{arch} needs the package timm: install grokd with its extra timm (uv sync --extra "
            "timm)."
        ) from error
    return timm


def timm_name(arch: str) -> str:
    """timm's own name of a network, a tag included; raises Problem if it has none of that name."""
    timm, name = import_timm(arch), arch.removeprefix(TIMM)
    base, _, tag = name.partition(".")
    choices = timm.list_models()
    if base in choices:
        choices = timm.list_models(f"{base}.*", pretrained=True) if tag else [name]
    if name in choices:
        return name
    close = difflib.get_close_matches(name, choices, 3, 0) or [base]
    raise Problem(f"timm has no {name!r}; did you mean {' or '.join(TIMM + c for c in close)}?")


def timm_config(network: nn.Module) -> dict[str, Any]:
    """What timm says of a network of its own: size of images, path of the head; else empty."""
    return getattr(network, "pretrained_cfg", {})


def timm_input(arch: str, weights: str, input: Input) -> Input:
    """What a network of timm's is fed: with weights, normalisation and size of its data config,
    unless the recipe gives a size. Random ones have only a size, where they take no other.

    The size is that of training, a few test at a larger one; crop share and interpolation are ours.
    """
    timm = import_timm(arch)
    network = timm.get_pretrained_cfg(timm_name(arch)).to_dict()
    config = timm.data.resolve_data_config(pretrained_cfg=network)
    side = config["input_size"][-1]
    if weights == "random":
        fixed = side if network["fixed_input_size"] else 0
        return replace(input, input_size=input.input_size or fixed)
    return Input(input.input_size or side, tuple(config["mean"]), tuple(config["std"]))


def timm_weights(arch: str, name: str) -> Mapping[str, Tensor]:
    """The weights that timm has for a network, fetched if need be."""
    timm, network = import_timm(arch), timm_name(arch)
    if name != "DEFAULT":
        raise Problem(
            f"{arch} has no weights {name!r}: give DEFAULT, random or a file. A tag of timm's "
            "stands in the architecture (timm:resnet50.a1_in1k)."
        )
    if not timm.is_model_pretrained(network):
        raise Problem(f"timm has no weights for {arch}: give random or a file.")
    try:
        return timm.create_model(network, pretrained=True).state_dict()
    except (OSError, RuntimeError) as error:
        raise unfetched(arch, name, error) from error


def unfetched(arch: str, name: str, error: Exception) -> Problem:
    """What is said where weights are not at hand and cannot be downloaded."""
    reason = str(error).partition("\n")[0]
    return Problem(
        f"The weights {name} of {arch} could not be fetched ({reason}): save them to a file "
        "elsewhere and name it as weights, or use weights random."
    )


def build_model(
    arch: str, weights: str, num_classes: int, input: Input, seed: int, as_it_is: str = ""
) -> Classifier:
    """A classifier with its initial weights: random, torchvision's or timm's, or from a file.

    Weights without a head for these classes keep their trunk and get a fresh one; a Problem if the
    network is to be used `as_it_is`, where this says by what.
    """
    torch.manual_seed(seed)
    if arch.startswith(TIMM):
        input = timm_input(arch, weights, input)
    if weights == "random":
        return Classifier(arch, num_classes, input)
    state: Mapping[str, Tensor]
    projection = None
    if Path(weights).suffix in WEIGHTS_FILES:
        state, metadata = read_weights(Path(weights))
        if "input" in metadata:
            stored = stored_input(metadata)
            input = replace(stored, input_size=input.input_size or stored.input_size)
        projection = stored_projection(metadata)
    elif arch.startswith(TIMM):
        state = timm_weights(arch, weights)
    else:
        plain_network(arch, num_classes)  # names the architecture, if that is what is wrong
        state, mean, std = torchvision_weights(arch, weights)
        input = replace(input, mean=mean, std=std)
    model = Classifier(arch, num_classes, input)
    if projection:
        model.project(projection)
    if not model.load_plain(state, weights, any_head=True):
        if as_it_is:
            raise Problem(
                f"{weights} has no head for {num_classes} classes, and {as_it_is} as it is: name a "
                "file with such a head, or train it (epochs)."
            )
        warn_of_head(Path(weights).absolute(), weights, num_classes, arch)
    return model


@functools.cache
def warn_of_head(path: Path, weights: str, num_classes: int, arch: str) -> None:
    """Once a process: several networks may begin with a file's weights."""
    say(f"warning: {weights} has no head for {num_classes} classes: {arch}'s is random")


def without_prefix(
    state: Mapping[str, Tensor], present: Sequence[str], source: str
) -> dict[str, Tensor]:
    """A state dict under the keys of a plain network, `present`: what wrappers put before them
    (module., model., backbone. ...) is cut off, whatever it is, and what lies elsewhere left out.
    """
    state = {OLD_DENSENET.sub(r"\1\2", key): value for key, value in state.items()}
    ends = [key for key in state if key.endswith(f".{present[0]}")]
    prefixes = ["", *sorted(key.removesuffix(present[0]) for key in ends)]
    prefix = max(prefixes, key=lambda prefix: sum(prefix + key in state for key in present))
    outside = [key for key in state if not key.startswith(prefix)]
    if outside:
        more = ", ..." if len(outside) > 3 else ""
        say(f"{source}: left out is what is not under {prefix} ({', '.join(outside[:3])}{more})")
    return {k.removeprefix(prefix): value for k, value in state.items() if k.startswith(prefix)}


def torchvision_weights(arch: str, name: str) -> tuple[Mapping[str, Tensor], Triple, Triple]:
    """torchvision's weights by name, fetched if need be, and their mean and std."""
    from torchvision import models

    if arch in SMALL or arch.startswith("clip:"):
        raise Problem(f"{arch} has no weights {name!r}: use random, or a file of yours.")
    choices = models.get_model_weights(arch)
    if name not in choices.__members__:
        hint = suggest(name, ["random", *choices.__members__])
        raise Problem(f"{arch} has no weights {name!r}{hint}")
    try:
        state = choices[name].get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise unfetched(arch, name, error) from error
    transforms = choices[name].transforms()
    mean, std = tuple(transforms.mean), tuple(transforms.std)
    if arch in ("googlenet", "inception_v3"):  # torchvision's transform_input, said directly
        mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    return state, mean, std


def require_file(path: Path) -> None:
    """Raise Problem if there is no such file."""
    if not path.is_file():
        raise Problem(f"{path} is not there: give the path of a file, seen from {Path.cwd()}.")


def weights_file(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file whose metadata hold a checksum of it all; its bytes depend on its content
    alone, where the library writes metadata in an order that changes from run to run."""
    header, data = split_weights(save(dict(state)))
    header["__metadata__"] = {**metadata, "checksum": digest([header, dict(metadata)], data)}
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of eight bytes
    return len(text).to_bytes(8, "little") + text + data


def split_weights(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file and the bytes of its tensors."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


@functools.cache
def checksum_fits(path: Path, size: int, changed: int) -> bool:
    """Is a safetensors file of ours as it was written? Read once, unless size or time change."""
    header, data = split_weights(path.read_bytes())
    metadata = header.pop("__metadata__")
    return metadata.pop("checksum") == digest([header, metadata], data)


def read_metadata(path: Path) -> dict[str, str]:
    """Metadata of a safetensors file, or a JSON file; raises Problem if it is neither, cannot be
    read, or is not as its checksum says (older files have none)."""
    require_file(path)
    if path.suffix == ".json":
        return read_json(path)
    if path.suffix != ".safetensors":
        raise Problem(f"{path} was not written by grokd: its models end in .safetensors.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        stat = path.stat()
        whole = "checksum" not in metadata or checksum_fits(path, stat.st_size, stat.st_mtime_ns)
        if not whole:
            raise ValueError("its checksum does not fit")
    except (SafetensorError, OSError, ValueError) as error:
        raise unreadable(path, error) from error
    metadata.pop("checksum", None)
    return metadata


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """State dict and metadata of a weights file (.safetensors, or .pth without pickled code)."""
    require_file(path)
    if path.suffix == ".safetensors":
        metadata = read_metadata(path)
        try:
            return load_file(path), metadata
        except SafetensorError as error:
            raise unreadable(path, error) from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's, zipfile's and torch's own, without a common base
        reason = str(error).partition("\n")[0]
        if isinstance(error, pickle.UnpicklingError):  # torch's text advises to trust the file
            reason = "it is damaged, or holds pickled code, which is not run"
        raise Problem(
            f"{path} cannot be read ({reason}): it must exist and hold a state_dict() alone."
        ) from error
    return inner_state(content, path), {}


def inner_state(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in what a training program saved: all of it, or under state_dict or model."""
    while isinstance(content, Mapping):
        parts = [content.get(key) for key in ("state_dict", "model")]
        inner = next((part for part in parts if isinstance(part, Mapping)), None)
        if inner is None:
            break
        content = inner
    entries = content if isinstance(content, Mapping) else {}
    tensors = {str(key): value for key, value in entries.items() if isinstance(value, Tensor)}
    if not tensors:
        keys = ", ".join(map(str, entries))[:200] or "something else"
        raise Problem(
            f"{path} holds no state dict, alone or under state_dict or model, but {keys}."
        )
    return tensors


def stored_input(metadata: Mapping[str, str]) -> Input:
    """What a model of grokd's was fed."""
    stored = json.loads(metadata["input"])
    return Input(stored["input_size"], tuple(stored["mean"]), tuple(stored["std"]))


def stored_projection(metadata: Mapping[str, str]) -> Projection | None:
    """The projector of a SimKD student of grokd's; other networks have none."""
    return Projection(**json.loads(metadata["projector"])) if "projector" in metadata else None


def load_model(
    path: Path, device: torch.device | str = "cpu", store: Store | None = None
) -> Classifier:
    """A model of grokd's from its path alone, in eval mode, frozen; for the classes of `store`."""
    state, metadata = read_weights(path)
    if "arch" not in metadata:
        raise Problem(f"{path} was not written by grokd: its metadata names no architecture.")
    num_classes = len(json.loads(metadata["class_names"]))
    if store and num_classes != store.num_classes:
        raise Problem(f"{path} has {num_classes} classes, the data have {store.num_classes}.")
    model = Classifier(metadata["arch"], num_classes, stored_input(metadata))
    if projection := stored_projection(metadata):
        model.project(projection)
    model.to(next(value.dtype for value in state.values() if value.is_floating_point()))
    model.load_plain(state, str(path))
    return model.to(device).eval().requires_grad_(False)


def fold(model: Classifier) -> Classifier:
    """The same frozen function, faster: batch norm folded into convolutions, channels last."""
    from torch.fx.experimental.optimization import fuse

    if model.folded_from:
        return model
    model.folded_from = trunk_key(model)
    if model.projection:  # fused modules have no hooks
        return model.to(memory_format=torch.channels_last)
    # A trunk that does more with sizes than to pass them on stays as it is.
    with contextlib.suppress(torch.fx.proxy.TraceError, RuntimeError, TypeError):
        trunk = fuse(model.trunk)
        if all(constant.ndim < 5 for constant in trunk.buffers()):  # else not channels last
            model.trunk = trunk
    return model.to(memory_format=torch.channels_last)


def trunk_key(model: Classifier) -> str:
    """Identifies a trunk by content: models that differ only in the head share it."""
    if model.folded_from:
        return model.folded_from
    state = model.trunk.state_dict()
    description: list[Any] = [model.arch, dataclasses.asdict(model.input)]
    if model.projection:
        state |= model.projector.state_dict(prefix="projector.")
        description.append(model.projection)
    return digest(description, *(value.cpu().numpy().tobytes() for value in state.values()))


LAYERS = ("layer1", "layer2", "layer3", "layer4")


def layer_paths(model: Classifier, side: int) -> dict[str, str]:
    """Paths of the modules that put out layer1, layer2 ... and pooled, for images of side `side`.

    Stages of that name if the network has them; of a vision transformer the blocks at 1/4, 1/2, 3/4
    and all of its depth; else the last outputs of blocks at stride 4, 8, 16, 32, found by a pass.
    A SimKD student has `projected` too: the map that is compared.
    """
    trunk, paths = model.trunk, dict[str, str]()
    place = "blocks" if hasattr(trunk, "num_prefix_tokens") else "encoder.layers"  # timm's, or not
    blocks = dict(trunk.named_modules()).get(place)
    if isinstance(blocks, nn.Module):
        names = [f"trunk.{place}.{name}" for name, _ in blocks.named_children()]
        for k, layer in enumerate(LAYERS, 1):
            paths[layer] = names[math.ceil(len(names) * k / 4) - 1]
    elif hasattr(trunk, "layer4") or model.arch in SMALL:
        for name, _ in trunk.named_children():
            if re.fullmatch(r"layer\d", name):
                paths[name] = f"trunk.{name}"
    else:
        paths = layers_by_stride(model, side)
    paths = dict(sorted(paths.items()))
    if model.projection:
        return paths | {"projected": "projector.9", "pooled": "projector"}
    return paths | {"pooled": "trunk"}


def last_layer(model: Classifier, side: int) -> str:
    """The name of the deepest layer that puts out a map."""
    layers = [name for name in layer_paths(model, side) if name.startswith("layer")]
    return layers[-1]


def layers_by_stride(model: Classifier, side: int) -> dict[str, str]:
    """Paths of the last outputs at stride 4, 8, 16, 32, of those modules that put out maps; where
    timm lists its network's, of those."""
    paths: dict[str, str] = {}
    listed, of_list = timm_layers(model.trunk), dict[str, str]()
    seen = model.input.input_size or side  # by the network

    def note(path: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            return
        if path in listed:
            of_list[listed[path]] = path
        if output.ndim != 4:
            return
        height, width = as_map(output).shape[-2:]
        if height != width:  # an attention's heads
            return
        stride = seen / width
        layer = f"layer{round(math.log2(stride)) - 1}"
        # The shallowest: a block's output, not the expansion inside the next block.
        if layer in LAYERS and path.count(".") <= paths.get(layer, path).count("."):
            paths[layer] = path

    hooks = [
        module.register_forward_hook(functools.partial(note, path))
        for path, module in model.named_modules()
        if path.startswith("trunk.")
    ]
    look(model, side)
    for hook in hooks:
        hook.remove()
    return paths | of_list


def timm_layers(network: nn.Module) -> dict[str, str]:
    """Of a network of timm's, the paths that it lists at stride 4 to 32 -> layer1 to layer4."""
    listed = getattr(network, "feature_info", []) if timm_config(network) else []
    layers = {
        f"trunk.{entry['module']}": f"layer{round(math.log2(entry['reduction'])) - 1}"
        for entry in listed
    }
    return {path: layer for path, layer in layers.items() if layer in LAYERS}


def look(model: Classifier, side: int) -> None:
    """Let one black image go by, for the hooks."""
    mode = model.training
    with torch.no_grad():
        model.eval().features(torch.zeros(1, 3, side, side, device=model.mean.device))
    model.train(mode)


def as_map(output: Any) -> Tensor:
    """A layer's output as [B, d, h, w]: transformers' tokens as a grid, vectors as 1 x 1."""
    if not isinstance(output, Tensor):
        output = output.logits  # GoogLeNet, Inception
    if output.ndim == 3:  # [B, tokens, d], the class token first
        side = math.isqrt(output.shape[1])
        return output[:, -side * side :].mT.unflatten(-1, (side, side))
    if output.ndim == 4 and output.shape[2] != output.shape[3]:  # channels last, as Swin's
        return output.permute(0, 3, 1, 2)
    return output if output.ndim == 4 else output[:, :, None, None]


class Tap:
    """Outputs of layers, kept as a forward pass goes by: name -> [B, d, h, w], pooled [B, d, 1, 1].

    Names are those of `layer_paths` or paths of modules in the trunk. Raises Problem for others,
    unless they are not `required`.
    """

    def __init__(
        self, model: Classifier, names: Sequence[str], side: int, required: bool = True
    ) -> None:
        self.maps: dict[str, Tensor] = {}
        self.handles: list[Any] = []
        paths, modules = layer_paths(model, side), dict(model.named_modules())
        for name in names:
            path = paths.get(name, f"trunk.{name}")
            if path in modules:
                hook = functools.partial(self._keep, name)
                self.handles.append(modules[path].register_forward_hook(hook))
            elif required:
                raise Problem(
                    f"{model.arch} has no layer {name!r}: it has {', '.join(paths)}, and every "
                    "module's path is one too."
                )
            else:
                say(
                    f"The biased model ({model.arch}) has no layer {name}: there teachers count "
                    "alike."
                )
        look(model, side)
        if mute := [name for name in names if required and name not in self.maps]:
            raise Problem(f"{model.arch}: {', '.join(mute)} gives no map that can be compared.")
        self.widths = {name: output.shape[1] for name, output in self.maps.items()}

    def _keep(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        output = getattr(output, "logits", output)  # GoogLeNet, Inception
        if isinstance(output, Tensor) and 2 <= output.ndim <= 4:
            self.maps[name] = as_map(output)

    def remove(self) -> None:
        """Look no more; the maps of the last pass stay."""
        for handle in self.handles:
            handle.remove()


def extract(
    trunks: Mapping[str, Classifier], store: Store, indices: np.ndarray, runtime: Runtime,
    view: int | None = None, seed: int = 0, blocks: Sequence[int] | None = None,
) -> Iterator[tuple[int, slice, dict[str, Tensor]]]:
    """The one prediction loop: features [b, d] of every trunk, by blocks of consecutive images.

    Blocks are the same for any number of processes; each yields its share, or those it names. Where
    memory does not hold a block it goes through the networks in parts, unless hooks are to see it.
    """
    if blocks is None:
        blocks = range(math.ceil(len(indices) / BLOCK))[runtime.rank :: runtime.world]

    def load(block: int) -> tuple[slice, Stored]:
        part = slice(block * BLOCK, min((block + 1) * BLOCK, len(indices)))
        return part, store.read(indices[part], runtime.device, view, seed)

    ahead: Any = prefetch(blocks, load, runtime.num_readers(store_bytes(1, store.data.size)))
    if len(blocks) > 20:
        ahead = progress_bar(ahead, "predict", total=len(blocks))

    def compute(images: Tensor, size: int) -> dict[str, Tensor]:
        return {
            key: torch.cat([model.features(images[part]) for part in slices(len(images), size)])
            for key, model in trunks.items()
        }

    size = min(BLOCK, len(indices))
    modules = itertools.chain.from_iterable(model.modules() for model in trunks.values())
    whole = any(module._forward_hooks for module in modules)
    for block, (part, stored) in ahead:
        images = store.show(stored, runtime.device)
        work = functools.partial(compute, images)
        with torch.no_grad():
            features, size = (work(0), size) if whole else by_fewer(work, size)
            yield block, part, features


def by_fewer(work: Callable[[int], Any], size: int) -> tuple[Any, int]:
    """work(size), or if a GPU's memory does not hold so many samples at a time, of half as many,
    and so on; and how many it was."""
    while True:
        try:
            return work(size), size
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        # Here, where the error no longer holds the tensors that there was no room for.
        size //= 2
        say(f"memory: full, so {size} samples at a time from now on")
        torch.cuda.empty_cache()


def predict(
    models: Sequence[Classifier], store: Store, indices: np.ndarray, runtime: Runtime
) -> Tensor:
    """Logits [M, N, C] of models in evaluation, on the CPU. A trunk that is shared runs once."""
    keys = [trunk_key(model) for model in models] if len(models) > 1 else [""]
    logits = torch.zeros(len(models), len(indices), models[0].num_classes, dtype=runtime.dtype)
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    with runtime.autocast():
        trunks = dict(zip(keys, models, strict=True))
        for _, part, features in extract(trunks, store, indices, runtime):
            for m, model in enumerate(models):
                logits[m, part] = model.classify(features[keys[m]]).to(logits)
    for model, mode in zip(models, modes, strict=True):
        model.train(mode)
    return runtime.sum(logits.to(runtime.device)).cpu()


def choosing_part(store: Store) -> np.ndarray:
    """The selection part of validation, or all of it where no part is left."""
    indices = store.split("selection")
    return indices if len(indices) else store.split("val")


def validate(
    model: Classifier, store: Store, runtime: Runtime, finished: str = ""
) -> dict[str, Any]:
    """Group scores on the selection part of validation (all of it where no part is left). Of a
    finished model, by name, it is said if it names one class alone."""
    indices = choosing_part(store)
    predicted = predict([model], store, indices, runtime)[0].argmax(-1).numpy()
    if finished and len({*predicted}) == 1 < len({*store.labels[indices]}):
        say(
            f"warning: {finished} answers {store.class_names[predicted[0]]!r} to every validation "
            "image, so its worst group has 0 %: lower its lr if the loss jumped, train it longer "
            "or raise lr if the loss hardly fell, and look at the labels."
        )
    correct = predicted == store.labels[indices]
    return group_scores(correct, store.groups[indices], store.counts("train"))


def refit_name(settings: DFR, store: Store) -> str:
    """What a refitted head is called: by what it balances."""
    if settings.method == "afr":
        return "AFR"
    if not settings.infers_groups:
        return store.refit_name
    return "DFR, EIIL groups" if settings.groups == "eiil" else "DFR, inferred groups"


def refit_head(
    model: Classifier, store: Store, settings: DFR, train: Train, seed: int, runtime: Runtime,
    cells: np.ndarray | None = None,
) -> None:
    """Replace the head by one fitted on the reweighting part, in evaluation view and float32.

    Balanced are `cells` of that part, or those that the store knows."""
    indices = store.split("reweighting")
    model.eval()
    features = torch.zeros(len(indices), model.head.in_features, dtype=runtime.dtype)
    for _, part, extracted in extract({"": model}, store, indices, runtime):
        features[part] = extracted[""].to(features)
    embedded = runtime.sum(features.to(runtime.device)).cpu().numpy()
    labels = store.labels[indices]
    cells = store.cells[indices] if cells is None else cells
    method = settings.method
    if method == "auto":
        method = "l1" if store.num_classes == 2 else "sgd"
    if method == "afr":
        learnt_weight, learnt_bias = (
            each.detach().cpu().numpy() for each in (model.head.weight, model.head.bias)
        )
        weight, bias = afr_head(embedded, labels, learnt_weight, learnt_bias, settings)
    elif method == "l1":
        smallest = np.bincount(cells).min()
        if smallest < 2 and len(settings.penalties) > 1:
            raise Problem(
                "DFR chooses its penalty on halves of the reweighting part, and a group has only "
                f"{smallest} image there: raise Data.reweighting, or give one value as penalties."
            )
        weight, bias = dfr_l1(embedded, labels, cells, settings, seed)
    else:
        weight, bias = dfr_sgd(embedded, labels, cells, store.num_classes, settings, train, seed)
    with torch.no_grad():
        model.head.weight.copy_(torch.from_numpy(weight))
        model.head.bias.copy_(torch.from_numpy(bias))


# ---- Target cache --------------------------------------------------------------------------------


class CachedFile(NamedTuple):
    """What the cache holds of one network: a name, and the type of an image's row."""

    model: int  # place among the models
    name: str
    row: np.dtype


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

    def __init__(
        self, models: Sequence[Classifier], num_teachers: int, store: Store,
        settings: Mapping[str, Any], runtime: Runtime, seed: int, pooled: bool = False,
    ) -> None:
        self.num_teachers, self.store, self.runtime, self.seed = num_teachers, store, runtime, seed
        self.indices = store.split("train")
        self.trunk_keys = [trunk_key(model) for model in models]
        self.models = [fold(model) for model in models]
        self.folder = Path(store.data.store) / "targets"
        self.files: list[CachedFile] = []  # logits of all models, then features of all trunks
        dtype = np.float64 if runtime.dtype == torch.float64 else np.float32
        identity = {**settings, "seed": seed, "precision": runtime.precision}
        for m, (model, trunk) in enumerate(zip(models, self.trunk_keys, strict=True)):
            head = [value.cpu().numpy().tobytes() for value in model.head.state_dict().values()]
            row = np.dtype((dtype, model.num_classes))
            self.files.append(CachedFile(m, digest(trunk, identity, *head), row))
        for trunk in dict.fromkeys(self.trunk_keys if pooled else []):
            m = self.trunk_keys.index(trunk)
            row = np.dtype((np.float16, models[m].head.in_features))
            self.files.append(CachedFile(m, digest(trunk, identity, "pooled"), row))
        self.current: list[np.ndarray] = []  # rows of each file, for the view at work
        self.departures: Departures | None = None  # where a weighting wants them, see `measure`

    def _open(self, file: CachedFile, view: int) -> tuple[np.ndarray, np.ndarray]:
        """Checksums [blocks] and rows [N, ...] of a file, made if need be."""
        path, rows = self.folder / f"{file.name}-{view}", len(self.indices)
        num_blocks = math.ceil(rows / BLOCK)
        try:
            # Not for appending: where the file system cannot allocate, the C library writes zeros
            # itself, and refuses to on files opened so.
            with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as opened:
                # A full disk is found here: a map could only crash.
                os.posix_fallocate(opened.fileno(), 0, target_bytes(rows, file.row.itemsize))
        except OSError as error:
            raise Problem(
                f"{path} could not be written ({error.strerror}): make room, or name another disk "
                "as Data.store."
            ) from error
        sums = np.memmap(path, np.uint32, "r+", shape=(num_blocks,))
        shape = (rows, *file.row.shape)
        return sums, np.memmap(path, file.row.base, "r+", 4 * num_blocks, shape)

    def prepare(self, view: int) -> None:
        """Make the logits of `view` current, computing what the cache does not hold."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = locked(self.folder / "lock", wait=True)
        place, count = self.runtime.on_node()
        with lock if self.runtime.rank == 0 else contextlib.nullcontext():
            self.runtime.wait()
            opened = [self._open(file, view) for file in self.files]
            missing = self._missing_blocks(opened)
            self.runtime.wait()  # all have looked before any writes
            self._fill(opened, missing, view, sorted(missing)[place::count])
            self.runtime.wait()
            self._check_filled(opened, missing)
            self.current = [rows for _, rows in opened]
            if missing and place == 0:
                self._shrink({f"{file.name}-{view}" for file in self.files})

    def _missing_blocks(
        self, opened: Sequence[tuple[np.ndarray, np.ndarray]]
    ) -> dict[int, list[int]]:
        """By block, the places of the files that lack it."""
        missing: dict[int, list[int]] = {}
        damaged = set[str]()
        for i, (sums, rows) in enumerate(opened):
            for block, checksum in enumerate(sums):
                first = block * BLOCK
                if zlib.crc32(rows[first : first + BLOCK].tobytes()) != checksum:
                    missing.setdefault(block, []).append(i)
                    if checksum:  # written last
                        damaged.add(self.files[i].name)
        if damaged:
            say(f"warning: {self.folder}: damaged answers are computed again: {sorted(damaged)}")
        return missing

    def _fill(
        self, opened: Sequence[tuple[np.ndarray, np.ndarray]], missing: Mapping[int, list[int]],
        view: int, share: Sequence[int],
    ) -> None:
        """Compute this process's share of the missing blocks. Every node fills a cache, be it one
        of its own; where nodes share one, they write the same."""
        needed = sorted({self.files[i].model for places in missing.values() for i in places})
        trunks = {self.trunk_keys[m]: self.models[m] for m in needed}
        with self.runtime.autocast():
            for block, part, features in extract(
                trunks, self.store, self.indices, self.runtime, view, self.seed, share
            ):
                for i in missing[block]:
                    sums, rows = opened[i]
                    rows[part] = self._values(i, features).cpu().numpy()
                    sums[block] = zlib.crc32(rows[part].tobytes())

    def _check_filled(
        self, opened: Sequence[tuple[np.ndarray, np.ndarray]], missing: Mapping[int, list[int]]
    ) -> None:
        """Raise Problem on all processes if a block that was missing is so still on one of them:
        its logits would be zeros."""
        still = False
        for block, places in missing.items():
            first = block * BLOCK
            for sums, rows in (opened[i] for i in places):
                still |= zlib.crc32(rows[first : first + BLOCK].tobytes()) != sums[block]
        if self.runtime.any(still):
            raise Problem(
                f"{self.folder}: targets of some images were computed by no process of their node: "
                "set LOCAL_WORLD_SIZE to the number of processes on each node, as torchrun and "
                "accelerate launch do."
            )

    def _values(self, i: int, features: Mapping[str, Tensor]) -> Tensor:
        """What file i holds of images with these features."""
        m = self.files[i].model
        of_trunk = features[self.trunk_keys[m]]
        if i < len(self.models):
            return self.models[m].classify(of_trunk)
        return of_trunk.float().clamp(-65504, 65504)  # what float16 can hold

    def _shrink(self, keep: set[str]) -> None:
        """Delete the oldest files until the cache fits, but for those in use."""
        files: list[tuple[float, int, Path]] = []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # nodes may share the folder
                stat = path.stat()
                files.append((stat.st_mtime, stat.st_size, path))
        files = [file for file in files if file[2].name != "lock"]
        excess = sum(size for _, size, _ in files) - int(self.store.data.cache_gb * 1e9)
        for _, size, path in sorted(files):
            if excess > 0 and path.name not in keep:
                excess -= size
                path.unlink(missing_ok=True)

    def answer(self, batch: Batch) -> Ensemble:
        """What the networks say of a batch; mixed images, which no cache can hold, are asked about.

        The models are the teachers, then the biased ones if the student compares with them."""
        mixed = batch.settings.train.mix != "none"
        logits = self.ask(batch.images) if mixed else self.logits(batch.positions)
        return Ensemble(*self._divide(logits), self.departures)

    def _divide(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits of the teachers, and the mean of the biased models' if there are any."""
        teachers, biased = logits[: self.num_teachers], logits[self.num_teachers :]
        if len(biased) > 1:
            return teachers, biased.mean(0)
        return teachers, biased[0] if len(biased) else None

    def measure(self, departure_gap: float) -> Departures:
        """The teachers' departures from the biased model, over the first view of the training
        images, and their skill on the selection part of validation (all of it where no part is
        left)."""
        self.prepare(0)
        labels = torch.from_numpy(self.store.labels)
        held_out = choosing_part(self.store)
        answers = predict(self.models[: self.num_teachers], self.store, held_out, self.runtime)
        skill = skill_of(answers.argmax(-1), labels[held_out])

        def blocks() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            for start in range(0, len(self.indices), BLOCK):
                positions = np.arange(start, min(start + BLOCK, len(self.indices)))
                teachers, biased = self._divide(self.logits(positions))
                assert biased is not None
                of_block = labels[self.indices[positions]]
                yield teachers, biased, upload(of_block, teachers.device)

        return measure_departures(blocks(), skill, departure_gap)

    def wrong(self) -> Tensor:
        """Which images [N] the biased model gets wrong, by its answers to the first view of the
        training images, on the device."""
        self.prepare(0)
        wrong = []
        for start in range(0, len(self.indices), BLOCK):
            positions = np.arange(start, min(start + BLOCK, len(self.indices)))
            _, biased = self._divide(self.logits(positions))
            assert biased is not None
            labels = torch.from_numpy(self.store.labels[self.indices[positions]])
            wrong.append(biased.argmax(-1) != upload(labels, biased.device))
        return torch.cat(wrong)

    def logits(self, positions: np.ndarray) -> Tensor:
        """Logits [M, b, C] of places in the training set, on the device."""
        chosen = [logits[positions] for logits in self.current[: len(self.models)]]
        return self.runtime.upload(np.stack(chosen))

    def ask(self, images: Tensor) -> Tensor:
        """Logits [M, b, C] of images that no cache can hold."""
        trunks = dict(zip(self.trunk_keys, self.models, strict=True))
        with torch.no_grad(), self.runtime.autocast():  # as the cache's answers
            features = {key: model.features(images) for key, model in trunks.items()}
            logits = [
                model.classify(features[key])
                for model, key in zip(self.models, self.trunk_keys, strict=True)
            ]
        return torch.stack(logits)

    def pooled(self, positions: np.ndarray) -> list[Tensor]:
        """Features [b, d, 1, 1] of each model for places in the training set."""
        by_trunk = {
            self.trunk_keys[file.model]: rows
            for file, rows in zip(self.files, self.current, strict=True)
        }  # a trunk's features come after its logits
        features = []
        for key in self.trunk_keys:
            rows = self.runtime.upload(by_trunk[key][positions].astype(np.float32))
            features.append(rows[:, :, None, None])
        return features


def frozen_features(
    settings: Distill, targets: Targets, networks: Mapping[str, Classifier], pretrained: bool
) -> FrozenFeatures:
    """Layers of the frozen networks: pooled ones from the cache, maps from `networks`, one of each
    trunk, that run beside the student. A trunk that is not among them has no maps."""
    side, num_teachers = targets.store.data.crop, targets.num_teachers
    names = list(dict.fromkeys(layer.teacher for layer in compared_layers(settings)))
    mixed = settings.train.mix != "none"  # no cache knows mixed images
    online = [name for name in names if networks and (name != "pooled" or mixed)]
    keys = targets.trunk_keys
    taps = {
        key: Tap(network, online, side, required=key in keys[:num_teachers])
        for key, network in networks.items()
    }
    widths = {}
    for name in names:
        widths[name] = [model.head.in_features for model in targets.models]
        if name in online:
            widths[name] = [taps[key].widths.get(name, 0) if key in taps else 0 for key in keys]

    def maps(batch: Batch) -> Mapping[str, list[Tensor | None]]:
        with torch.no_grad(), targets.runtime.autocast():
            for network in networks.values():
                network.features(batch.images)
        found: dict[str, list[Tensor | None]] = {}
        for name in names:
            if name in online:
                found[name] = [taps[key].maps.get(name) if key in taps else None for key in keys]
            else:
                found[name] = [*targets.pooled(batch.positions)]
        return found

    twins = [key == keys[-1] and len(keys) > num_teachers for key in keys[:num_teachers]]
    return FrozenFeatures(num_teachers, widths, maps, twins, pretrained)


# ---- Artefacts -----------------------------------------------------------------------------------


class State(enum.Enum):
    """How an artefact stands on disk."""

    MISSING = "is missing"
    PARTIAL = "is not finished"
    FINISHED = "is finished"
    FOREIGN = "was made with other settings"


class Standing(NamedTuple):
    """The state of an artefact, and of a foreign one the file that says so and what differs."""

    state: State
    path: Path
    changes: str = ""

    def __str__(self) -> str:
        changes = f" (old → new): {self.changes}" if self.changes else ""
        return f"{self.path} {self.state.value}{changes}"


@dataclass(frozen=True, eq=False)
class Artefact:
    """A file to be made, with everything that decides its content: settings, data, parents.

    Finished: `path` says the same fingerprint. Partial: `work`, a folder beside it, does. Foreign:
    one of the two says another.
    """

    name: str  # its path below the run folder, without suffix
    path: Path
    command: str  # that makes it
    settings: Mapping[str, Any]
    parents: Mapping[str, Artefact]
    owns_folder: bool = False  # does it have a folder of its own, `path` being a note in it?
    stays: bool = False  # does what stands of it stay until another takes its place?

    @functools.cached_property
    def fingerprint(self) -> str:
        return digest(dict(self.settings), self._parent_fingerprints())

    @property
    def identity(self) -> dict[str, str]:
        """What a file says of itself, to be recognised."""
        return {
            "fingerprint": self.fingerprint,
            "settings": json.dumps(dict(self.settings)),
            "parents": json.dumps(self._parent_fingerprints()),
        }

    @property
    def work(self) -> Path:
        """Folder of what is begun: checkpoints."""
        return self.path.with_suffix(".partial")

    def _parent_fingerprints(self) -> dict[str, str]:
        return {name: parent.fingerprint for name, parent in self.parents.items()}

    def standing(self) -> Standing:
        """How it stands on disk."""
        begun = self.work / "begun.json"
        for path, state in ((self.path, State.FINISHED), (begun, State.PARTIAL)):
            if path.is_file():
                metadata = read_metadata(path)
                if metadata.get("fingerprint") == self.fingerprint:
                    return Standing(state, self.path)
                return Standing(State.FOREIGN, path, self._changes(metadata))
        return Standing(State.MISSING, self.path)

    def _changes(self, metadata: Mapping[str, str]) -> str:
        """What differs from the artefact that a file says it is."""
        old = json.loads(metadata.get("settings", "{}"))
        parents = json.loads(metadata.get("parents", "{}"))
        old |= {f"parent {name}": fingerprint for name, fingerprint in parents.items()}
        new = {f"parent {name}": value for name, value in self._parent_fingerprints().items()}
        return differences(old, {**self.settings, **new})

    def remove(self) -> None:
        """Delete what stands of it, finished or begun."""
        if not self.stays:
            self.path.unlink(missing_ok=True)
        shutil.rmtree(self.work, ignore_errors=True)
        for path in self.strays():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def strays(self) -> list[Path]:
        """What lies in its folder beside the note, if the folder is its own."""
        if not self.owns_folder:
            return []
        vouched = (".lock", self.path.name, self.work.name)
        return [path for path in self.path.parent.glob("*") if path.name not in vouched]

    def begin(self) -> None:
        """Note beside it that it is begun; what was begun with other settings goes."""
        begun = self.work / "begun.json"
        if begun.is_file() and read_metadata(begun).get("fingerprint") == self.fingerprint:
            return
        shutil.rmtree(self.work, ignore_errors=True)
        write_file(begun, json.dumps(with_checksum(self.identity)))

    def write_note(self, files: Iterable[Path]) -> None:
        """The note that a folder is complete, with digests of the files that it vouches for."""
        folder = self.path.parent
        digests = {str(file.relative_to(folder)): file_digest(file) for file in sorted(files)}
        note = self.identity | {"files": json.dumps(digests)}
        write_file(self.path, json.dumps(with_checksum(note)))


def settings_of(section: Any, prefix: str = "", head: bool | None = None) -> dict[str, Any]:
    """The settings of a section that decide what it makes, as JSON holds them.

    `head` picks those that decide the head alone (True), or all others (False).
    """
    chosen = {}
    for setting in settings_in(section, prefix):
        counts = setting.active and Mark.INERT not in setting.marks
        if Mark.ADDED in setting.marks:
            counts &= setting.value != setting.default
        if counts and head in (None, Mark.HEAD in setting.marks):
            chosen[setting.name] = identity_of(setting)
    return chosen


def identity_of(setting: Setting) -> Any:
    """The value of a setting for a fingerprint: files by content, functions by source too."""
    if Mark.CONTENT in setting.marks:
        if isinstance(setting.value, tuple):
            return [identify(path) for path in setting.value]
        return identify(setting.value)
    if callable(setting.value):
        try:
            source = inspect.getsource(setting.value)
        except (OSError, TypeError):
            source = repr(setting.value)
        return f"{plain(setting.value)} {digest(source)}"
    return plain(setting.value)


@functools.cache
def identify(path: str) -> str:
    """A file or folder by name and content, wherever it lies; any other text as it is."""
    if not path or not Path(path).exists():
        return path
    files = [Path(path)] if Path(path).is_file() else sorted(Path(path).rglob("*"))
    contents = [[file.name, file_digest(file)] for file in files if file.is_file()]
    return f"{Path(path).name} {digest(contents)}"


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read in parts."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_files(note: Path) -> None:
    """Raise Problem for a file that a note vouches for, and that is gone or has changed since."""
    for name, expected in json.loads(read_metadata(note).get("files", "{}")).items():
        file = note.parent / name
        if not file.is_file() or file_digest(file) != expected:
            raise Problem(
                f"{file} is gone or has changed since it was made: bring it back, or make "
                f"everything in {note.parent} again with --redo."
            )


def began_alike(teachers: Teachers) -> bool:
    """Did all teachers begin with the same pretrained weights? Then their channels correspond."""
    alike = len({*teachers.arch}) == len({*teachers.weights}) == 1
    return alike and "random" not in teachers.weights


@dataclass(frozen=True, eq=False)
class Context:
    """One command at work: a recipe, its data, and where its artefacts stand.

    Identities come from `store`, the plain data, whatever else a student is trained on.
    """

    name: str  # the recipe, as typed
    recipe: Recipe  # its students and sets are those picked
    store: Store
    out: Path
    runtime: Runtime
    common: Common
    makes: Sequence[str]  # the commands at work; what others made is taken as it was made
    students: Mapping[str, Distill]  # all that others may refer to
    sets: Mapping[str, Augment]
    remade: set[Path] = field(default_factory=set)  # with --redo, each once a command
    loaded: dict[str, Classifier] = field(default_factory=dict)  # frozen networks, by fingerprint

    @functools.cached_property
    def data_settings(self) -> dict[str, Any]:
        """What models depend on of the data: the images themselves, and how they are cropped."""
        return settings_of(self.recipe.data, "data") | {"data": self.store.fingerprint}

    def _artefact(
        self, name: str, command: str, settings: Mapping[str, Any], parents: Sequence[Artefact],
        note: bool = False,
    ) -> Artefact:
        """An artefact below the run folder: a weights file, or the note in a folder of its own."""
        path = self.out / (f"{name}.json" if note else f"{name}.safetensors")
        precision = self.runtime.precision
        if command not in self.makes and path.is_file():
            made = json.loads(read_metadata(path).get("settings", "{}"))
            precision = made.get("precision", precision)
        settings = {**settings, **self.data_settings, "precision": precision}
        by_name = {parent.name: parent for parent in parents}
        return Artefact(name, path, command, settings, by_name, owns_folder=note)

    def teacher(self, i: int, head: str) -> Artefact:
        """Teacher i before (erm) or after (dfr) its head is refitted."""
        section = self.recipe.teachers.of(i)
        erm = self._artefact(f"teachers/{i}/erm", "teachers", settings_of(section, head=False), [])
        if head == "erm":
            return erm
        parents = [erm, *self.biased()] if section.dfr.infers_groups else [erm]
        return self._artefact(f"teachers/{i}/dfr", "teachers", settings_of(section), parents)

    def teachers(self, head: str) -> list[Artefact]:
        """The whole ensemble."""
        return [self.teacher(i, head) for i in range(self.recipe.teachers.num_teachers)]

    def bias(self) -> Artefact:
        """The biased model."""
        section, name = self.recipe.bias_model, "bias-model/model"
        if section.kind != "teacher":
            return self._artefact(name, "bias-model", settings_of(section), [])
        parent = self.teacher(section.teacher, "erm")  # of which it is a copy
        path = self.out / f"{name}.safetensors"
        return Artefact(name, path, "bias-model", settings_of(section), {parent.name: parent})

    def biased(self) -> list[Artefact]:
        """What students depart from: the biased model, or several, whose mean logits count."""
        section = self.recipe.bias_model
        if section.kind == "teacher":
            return [self.teacher(i, "erm") for i in section.teachers or (section.teacher,)]
        return [self.bias()]

    def ensemble(self, student: Distill) -> list[Artefact]:
        """A student's teachers, those with a DFR head first; SimKD's as far as their maps can be
        averaged."""
        if not student.has_teachers:
            return []
        count = student.num_teachers or self.recipe.teachers.num_teachers
        num_refitted = round(student.dfr_share * count)
        if student.loss == "simkd" and not began_alike(self.recipe.teachers):
            count = 1
        return [self.teacher(i, "dfr" if i < num_refitted else "erm") for i in range(count)]

    def student(self, name: str, seed: int) -> Artefact:
        """A student."""
        student = self.students[name]
        parents = self.ensemble(student)
        if student.has_biased or student.infers_groups:
            parents += self.biased()
        if student.augmented:
            parents.append(self.image_set(student.augmented, seed))
        if student.start:
            parents.append(self.student(student.start, seed))
        if student.rebalance == "tab":
            parents.append(self.helper(student, seed))
        settings = settings_of(student) | {"seed": seed}
        return self._artefact(f"students/{name}/seed{seed}/model", "distill", settings, parents)

    def helper(self, student: Distill, seed: int) -> Artefact:
        """The model whose loss histories TAB clusters."""
        return self.student(student.helper, seed) if student.helper else self.bias()

    def generator(self) -> Artefact:
        """The recipe's own generator: a note beside its folder of a pipeline."""
        settings = settings_of(self.recipe.diffusion)
        return self._artefact("generator/done", "augment", settings, [], note=True)

    def image_set(self, name: str, seed: int) -> Artefact:
        """A set of generated images: the note that is written when it is complete."""
        section = self.sets[name]
        parents = [*self.teachers("dfr"), self.student(section.student, seed)]
        if not section.generator:
            parents.append(self.generator())
        if section.like:
            parents.append(self.image_set(section.like, seed))
        settings = settings_of(section) | {"seed": seed}
        if section.generator:  # Stable Diffusion is told them
            settings["class_names"] = list(self.store.class_names)
        return self._artefact(
            f"augmented/{name}/seed{seed}/done", "augment", settings, parents, note=True
        )

    def described(self, name: str) -> Artefact:
        """An artefact by its name: as the recipe describes it, else as its file does."""
        kind, first, *rest = name.split("/")
        if kind == "teachers":
            return self.teacher(int(first), rest[0])
        if kind == "bias-model":
            return self.bias()
        if kind == "generator":
            return self.generator()
        seed = int(rest[0].removeprefix("seed"))
        if kind == "students" and first in self.students:
            return self.student(first, seed)
        if kind == "augmented" and first in self.sets:
            return self.image_set(first, seed)
        return self._as_it_says(name, note=kind == "augmented")

    def _as_it_says(self, name: str, note: bool) -> Artefact:
        """A student or set made with flags: its own settings, data and parents as they are now."""
        path = self.out / (f"{name}.json" if note else f"{name}.safetensors")
        metadata = read_metadata(path) if path.is_file() else {}
        settings = json.loads(metadata.get("settings", "{}")) | self.data_settings
        parents = {each: self.described(each) for each in json.loads(metadata.get("parents", "{}"))}
        command = "augment" if note else "distill"
        return Artefact(name, path, command, settings, parents, owns_folder=note)

    def network(self, artefact: Artefact) -> Classifier:
        """A frozen network of an earlier stage, loaded once a command."""
        if artefact.fingerprint not in self.loaded:
            path = self.require(artefact)
            self.loaded[artefact.fingerprint] = load_model(path, self.runtime.device, self.store)
        return self.loaded[artefact.fingerprint]

    def require(self, artefact: Artefact) -> Path:
        """The path of a finished artefact, or a Problem that names the command that makes it."""
        standing = artefact.standing()
        if standing.state != State.FINISHED:
            redo = " --redo" if standing.state == State.FOREIGN else ""
            raise Problem(
                f"{standing}. Make it with `python grokd.py {artefact.command} {self.name}{redo}` "
                "and the same --root and --out; what you changed by flags belongs in the recipe."
            )
        return artefact.path

    def pending(self, artefacts: Sequence[Artefact]) -> list[int]:
        """Places of those that are still to be made. Raises Problem for foreign ones.

        With --redo foreign ones are deleted, and finished ones too, once a command.
        """
        places = []
        for i, artefact in enumerate(artefacts):
            if self.due(artefact):
                if artefact.standing().state != State.PARTIAL:
                    artefact.remove()
                places.append(i)
            self.remade.add(artefact.path)
        return places

    def due(self, artefact: Artefact) -> bool:
        """Is it still to be made? Raises Problem for a foreign one, but with --redo."""
        standing = artefact.standing()
        redo = self.common.redo and artefact.path not in self.remade
        if standing.state == State.FOREIGN and not redo:
            raise Problem(f"{standing}. Keep both with --out DIR, or make it again with --redo.")
        strays = artefact.strays() if standing.state == State.MISSING else []
        if strays and not redo:
            raise Problem(
                f"{strays[0].parent} holds {strays[0].name} and nothing that says from where: "
                "move it away, or delete it with --redo."
            )
        return redo or standing.state != State.FINISHED


def make(
    artefacts: Sequence[Artefact], build: Callable[[list[Artefact]], None], ctx: Context,
    runtime: Runtime,
) -> None:
    """Build those of `artefacts` that do not stand as described: the one way anything is made.

    They come of one piece of work, whose checkpoints stand beside the first. `build` gets those
    that are to be made and writes them. Their folders are locked meanwhile. All processes that
    share `runtime` take part; the first one decides.
    """
    work = artefacts[0].work
    with contextlib.ExitStack() as locks:

        def begin() -> list[int]:
            for folder in dict.fromkeys(artefact.path.parent for artefact in artefacts):
                if locks.enter_context(locked(folder / ".lock")):
                    clear_parts(folder)
            places = ctx.pending(artefacts)
            if places:
                artefacts[0].begin()
            return places

        if places := runtime.first(begin):
            build([artefacts[i] for i in places])
        runtime.wait()
        if runtime.rank == 0:
            shutil.rmtree(work, ignore_errors=True)


def save_model(model: Classifier, artefact: Artefact, ctx: Context, scores: Any) -> None:
    """Write a finished model: torchvision's keys, and metadata to load, compare and cite it."""
    description = artefact.identity | {
        "arch": model.arch,
        "class_names": json.dumps(ctx.store.class_names),
        "input": json.dumps(dataclasses.asdict(model.input)),
        "trunk": trunk_key(model),
        "metrics": json.dumps(scores),
        "recipe": ctx.name,
        "grokd": __version__,
    }
    if model.projection:
        description["projector"] = json.dumps(model.projection._asdict())
    write_file(artefact.path, weights_file(model.plain_state(), description))


# ---- Fit -----------------------------------------------------------------------------------------


def nothing(number: int) -> None:
    """Nothing is to be done."""


def show_images(network: nn.Module, batch: Batch) -> Tensor:
    """The forward pass of a classifier: logits [b, C]."""
    return network(batch.images)


@dataclass
class Job:
    """A network to train, and all that `fit` needs to know of it."""

    artefact: Artefact  # its name; checkpoints stand in its folder of work
    model: nn.Module
    settings: Any  # its section of the recipe, for the losses
    train: Train
    store: Store  # whose training split is learnt
    seed: int
    losses: Losses
    # Before the epochs of a view.
    prepare: Callable[[int], None] = nothing
    # After an epoch, by its number from 0, before its checkpoint.
    after_epoch: Callable[[int], None] = nothing
    # Images as the network sees them, from (indices, stored images, view); None: the store's view.
    view: Callable[[np.ndarray, Tensor, int], Tensor] | None = None
    # The network's output, from what else is known of the batch; under autocast.
    forward: Callable[[nn.Module, Batch], Tensor] = show_images
    # Scores at the end of an epoch.
    validate: Callable[[], dict[str, Any]] = dict
    average: Any = None  # a moving average of the weights (diffusers' EMAModel), to be kept up
    clip: float = 0.0  # greatest norm of a gradient; 0: any
    stop_after: int = 0  # epochs, of those that the learning rate is planned for; 0: all

    @property
    def num_epochs(self) -> int:
        return min(self.train.epochs, self.stop_after or self.train.epochs)


@dataclass
class Progress:
    """How far a run has come: with model and optimiser, all that its checkpoints hold."""

    current: Tensor  # [N], per-sample training loss as seen, for the epoch at work
    step: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)  # figures of the epoch at work
    history: list[dict[str, Any]] = field(default_factory=list)  # figures of finished epochs
    best: dict[str, Any] = field(default_factory=dict)  # weights to keep, with select="best"


def fit(job: Job, runtime: Runtime) -> Progress:
    """Train a network in place, from its newest checkpoint if there is one.

    Everything random is a function of (seed, step), so a killed run goes on with the bits it would
    have had. Raises Problem on a loss that is not finite.
    """
    training = Training(job, runtime)
    training.restore()
    progress = training.progress
    with training.reporting():
        for epoch in range(progress.step // training.steps_per_epoch, job.num_epochs):
            view = training.view_of(epoch)
            job.prepare(view)
            for batch, parts in training.batches(epoch):
                training.step(view, len(batch), parts)
                training.check_loss()
                training.save_if_late()
            training.end_epoch(epoch)
    runtime.accelerator.free_memory()
    if progress.best:
        training.model.load_state_dict(progress.best["model"])
    return progress


SMALLEST_SCALE = 2.0**-10  # of float16's losses: it begins with 2^16


class Part(NamedTuple):
    """A micro-batch, read ahead."""

    places: np.ndarray  # [b], in the training set
    first: int  # of these in the process's share of the batch
    learnt: bool  # if not, it only keeps the process in step with the others
    stored: Stored  # the images
    labels: Tensor  # int64 [b]
    at: Tensor  # int64 [b], the places as a tensor


def micro_batches(
    batch: np.ndarray, rank: int, world: int, size: int
) -> list[tuple[np.ndarray, bool]]:
    """A process's share of a total batch in parts of at most `size` (0: one part), each with
    whether it is learnt from.

    Every process has as many, since batch norm over processes waits for all. A share that is a
    part short has its last one halved; where that cannot be, an image is shown in vain.
    """
    # Contiguous: what is not is copied to a GPU by way of memory that is not pinned.
    share, largest = np.ascontiguousarray(batch[rank::world]), len(batch[::world])
    size = size or largest
    count = math.ceil(largest / size)
    parts = [share[first : first + size] for first in range(0, len(share), size)]
    if parts and size > 1 and len(parts) < count:
        parts[-1:] = np.array_split(parts[-1], 2)
    in_vain = [(batch[:1], False)] * (count - len(parts))
    return [(places, True) for places in parts] + in_vain


class Training:
    """A training at work: the network as it is wrapped, its optimiser, progress and files."""

    def __init__(self, job: Job, runtime: Runtime) -> None:
        self.job, self.runtime, self.train = job, runtime, job.train
        self.indices = job.store.split("train")
        self.steps_per_epoch = len(self._epoch(0))
        self.model = job.model.to(runtime.device, runtime.dtype).train()
        if runtime.world > 1 and runtime.device.type == "cuda":
            self.model = with_synchronised_norms(self.model)
        self.network = self.model
        if runtime.world > 1:
            # Not accelerate's prepare_model: it puts autocast into the network's own forward pass,
            # which `logit_gram` must run without.
            self.network = nn.parallel.DistributedDataParallel(self.model)
        if self.train.compile:
            # Else it would reuse what it made of a network of this architecture without taps,
            # whose maps would then stay those of the first look.
            torch.compiler.reset()
            # What one backward pass may overwrite, a second one through the graph would miss.
            keeps_graph = getattr(job.settings, "keeps_graph", False)
            torch._functorch.config.donated_buffer = not keeps_graph
            self.network = typing.cast(nn.Module, torch.compile(self.network))
        self.optimizer = build_optimizer(self.model, self.train, runtime)
        self.scaler = runtime.accelerator.scaler  # of float16, else None
        self.progress = Progress(torch.zeros(len(self.indices), device=runtime.device))
        self.began = self.saved = self.told = time.monotonic()
        self.first_step = 0
        self.board: Any = None
        self.bar: Any = None

    # What a run consists of

    def _epoch(self, epoch: int) -> list[np.ndarray]:
        """Places in the training set of each total batch."""
        return epoch_batches(len(self.indices), self.train.batch_size, self.job.seed, epoch)

    def view_of(self, epoch: int) -> int:
        """The augmentations of an epoch."""
        data = self.job.store.data
        if not (data.random_crop or data.flip):  # all views are one
            return 0
        return epoch % self.train.num_views if self.train.num_views else epoch

    def batches(self, epoch: int) -> Iterator[tuple[np.ndarray, list[Part]]]:
        """What is left of an epoch: total batches, with this process's micro-batches, ahead."""
        done = self.progress.step - epoch * self.steps_per_epoch
        return self._ahead(self.view_of(epoch), self._epoch(epoch)[done:])

    def _ahead(
        self, view: int, batches: Sequence[np.ndarray]
    ) -> Iterator[tuple[np.ndarray, list[Part]]]:
        """Batches of a view, with this process's micro-batches, which are read ahead."""
        readers = self.runtime.num_readers(store_bytes(1, self.job.store.data.size))
        return prefetch(batches, functools.partial(self._read, view), readers)

    def _read(self, view: int, batch: np.ndarray) -> list[Part]:
        """This process's micro-batches: all that a step would else have to wait for."""
        store, device = self.job.store, self.runtime.device
        rank, world = self.runtime.rank, self.runtime.world
        parts: list[Part] = []
        for places, learnt in micro_batches(batch, rank, world, self.train.micro_batch):
            first = sum(len(part.places) for part in parts) if learnt else 0
            indices = self.indices[places]
            if self.job.view:
                stored = Stored(store.gather(indices, device))
            else:
                stored = store.read(indices, device, view, self.train.view_seed)
            labels = pinned(torch.from_numpy(store.labels[indices]), device)
            at = pinned(torch.from_numpy(places), device)
            parts.append(Part(places, first, learnt, stored, labels, at))
        return parts

    # One step

    def step(self, view: int, total: int, parts: Sequence[Part]) -> None:
        """Learn from one batch of `total` images, of which this process has `parts`."""
        rate = learning_rate(self.train, self.progress.step, self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._backward(view, total, parts)
        if self.job.clip:
            self.runtime.accelerator.clip_grad_norm_(self.model.parameters(), self.job.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.job.average:
            self.job.average.step(self.model.parameters())
        self.progress.step += 1
        if self.bar is not None:
            self.bar.update()

    def _backward(self, view: int, total: int, parts: Sequence[Part]) -> None:
        """The gradients of a batch, summed over the processes with its last micro-batch."""
        for number, part in enumerate(parts):
            is_last = number == len(parts) - 1
            no_sync = self.runtime.accelerator.no_sync(self.network)
            with contextlib.nullcontext() if is_last else no_sync:
                torch.manual_seed(
                    seed_of(self.job.seed, self.progress.step, self.runtime.rank, number)
                )
                self._accumulate(view, total, part)

    def _accumulate(self, view: int, total: int, part: Part) -> None:
        """Add the gradients and figures of a micro-batch."""
        job, runtime, progress = self.job, self.runtime, self.progress
        places = part.places
        images, labels = self._inputs(view, part)
        if self.board and progress.step == 0:
            self.board.add_images("images", images[:16], 0)
        batch = Batch(
            job.settings, self.model, images, labels, places, total, progress.step, job.seed,
            runtime, first=part.first,
        )
        with runtime.autocast():
            output = job.forward(self.network, batch)
        per_sample, figures = job.losses(replace(batch, output=output))
        # DDP averages over processes, hence their number.
        loss = per_sample.sum() * (runtime.world / total)
        runtime.accelerator.backward(loss if part.learnt else 0 * loss)
        if part.learnt:
            at = part.at.to(runtime.device, non_blocking=True)
            progress.current[at] = per_sample.detach().to(progress.current)
        for name, value in (figures | {"loss": per_sample}).items():
            figure = value.detach().double().sum(-1)
            if not part.learnt:  # every process must have every sum, to add them up
                figure = torch.zeros_like(figure)
            progress.sums[name] = progress.sums.get(name, 0) + figure

    def _inputs(self, view: int, part: Part) -> tuple[Tensor, Tensor]:
        """Images and labels of a micro-batch, mixed if the recipe says so."""
        store, device = self.job.store, self.runtime.device
        if self.job.view:
            images = self.job.view(self.indices[part.places], part.stored.raw, view)
        else:
            images = store.show(part.stored, device)
        labels = part.labels.to(device, non_blocking=True)
        if self.train.mix == "none":
            return images, labels
        from torchvision.transforms import v2

        mixer = v2.CutMix(alpha=1.0, num_classes=store.num_classes)
        if self.train.mix == "mixup":
            mixer = v2.MixUp(alpha=0.2, num_classes=store.num_classes)
        return mixer(images, labels)  # labels are shares now, [b, C]

    # Checks and checkpoints

    @property
    def at_check(self) -> bool:
        """Now and then, at the same steps on every process: a GPU is waited for."""
        step = self.progress.step
        return step % 20 == 0 or step % self.steps_per_epoch == 0

    def check_loss(self) -> None:
        """Raise Problem, on all processes, if the sum of losses is not finite, or float16 skips
        every step."""
        if not self.at_check:
            return
        name, step = self.job.artefact.name, self.progress.step
        loss = self.runtime.sum(self.progress.sums["loss"]).item()
        if not math.isfinite(loss):
            raise Problem(f"{name}: the loss is {loss} by step {step:,}: lower its lr.")
        # A step with infinite gradients is skipped, and the scale halved: that is no harm unless
        # it goes on.
        if self.scaler and self.scaler.get_scale() < SMALLEST_SCALE:
            raise Problem(
                f"{name}: gradients are not finite in float16 by step {step:,}, however small the "
                "scale of the loss: lower its lr, or use --precision bfloat16."
            )

    def save_if_late(self) -> None:
        """A checkpoint within an epoch, if the last one is `checkpoint_minutes` old.

        Not after its last step: a run that went on from there would miss the epoch's end."""
        if self.progress.step % self.steps_per_epoch == 0:
            return
        late = time.monotonic() - self.saved > 60 * self.train.checkpoint_minutes
        if self.runtime.world > 1:
            late = self.at_check and self.runtime.any(late)
        if late:
            self.save()

    def _losses_checksum(self, progress: Progress) -> int:
        """Of the finished epochs' losses, which stand in a file of their own."""
        size = 4 * len(progress.history) * len(self.indices)
        return losses_checksum(self.job.artefact.work, size)

    def usable_checkpoint(self) -> Path | None:
        """The newest checkpoint; damaged ones, or those whose losses are, are deleted."""
        work = self.job.artefact.work
        while newest := newest_checkpoint(work):
            try:
                state = load_checkpoint(newest)
                if "losses" not in state:  # of an older version
                    return newest
                if state["losses"] == self._losses_checksum(Progress(**state["progress"])):
                    return newest
                reason = f"{work / LOSSES} does not fit to {newest.name}"
            except Problem as problem:
                reason = str(problem).partition(": if it is damaged")[0]
            print(f"warning: {reason}, so the training begins before it", flush=True)
            shutil.rmtree(newest)
        return None

    def save(self) -> None:
        """Write a checkpoint. From then on the first process holds the sums of all. Raises Problem
        for weights that are not finite: the last checkpoint stays."""
        progress, runtime = self.progress, self.runtime
        if not all_finite(self.model.state_dict().values()):
            raise Problem(
                f"{self.job.artefact.name}: the weights are not finite after step "
                f"{progress.step:,}: lower its lr."
            )
        progress.sums = {name: runtime.sum(v) for name, v in sorted(progress.sums.items())}
        progress.current = runtime.sum(progress.current)
        if runtime.rank == 0:
            state = {
                "threads": torch.get_num_threads(),
                "progress": vars(progress),
                "losses": self._losses_checksum(progress),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "average": self.job.average.state_dict() if self.job.average else {},
                "scaler": self.scaler.state_dict() if self.scaler else {},
            }
            save_checkpoint(self.job.artefact.work, progress.step, state)
        else:
            progress.sums = {name: torch.zeros_like(v) for name, v in progress.sums.items()}
            progress.current = torch.zeros_like(progress.current)
        self.saved = time.monotonic()

    def restore(self) -> None:
        """Go on from the newest checkpoint, if there is one: the first process says which."""
        newest = self.runtime.first(self.usable_checkpoint)
        state = load_checkpoint(newest) if newest else None
        if state and self.runtime.world > 1:
            self._settle_buckets(state["progress"]["step"] // self.steps_per_epoch)
        if self.scaler:  # one for the whole process: it must not know of networks before
            self.scaler.load_state_dict(state["scaler"] if state else self.runtime.new_scaler)
        if state:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.job.average:
                self.job.average.load_state_dict(state["average"])
                self.job.average.to(self.runtime.device)
            for name, value in state["progress"].items():
                setattr(self.progress, name, value)
            self._say_where(state["threads"])
        self.first_step = self.progress.step
        device, held = self.runtime.device, float(self.runtime.rank == 0)
        self.progress.current = self.progress.current.to(device) * held
        self.progress.sums = {k: v.to(device) * held for k, v in self.progress.sums.items()}
        if self.runtime.rank == 0:
            finished = self.progress.step // self.steps_per_epoch
            cut_losses(self.job.artefact.work, finished, len(self.indices))

    def _settle_buckets(self, epoch: int) -> None:
        """A backward pass in vain, of a batch of the epoch that goes on.

        After its first one DDP arranges the gradients anew, and their places decide in which order
        those of three processes or more are added: the run that was killed had that behind it.
        """
        if epoch < self.job.num_epochs:
            view, batch = self.view_of(epoch), self._epoch(epoch)[0]
            self.job.prepare(view)
            self._backward(view, len(batch), self._read(view, batch))
            self.optimizer.zero_grad(set_to_none=True)

    def _say_where(self, threads: int) -> None:
        now = torch.get_num_threads()
        note = "" if threads == now else f"; {threads} threads then, {now} now: bits may differ"
        total = self.job.num_epochs * self.steps_per_epoch
        name = self.job.artefact.name
        print(f"{name}: goes on at step {self.progress.step:,} of {total:,}{note}", flush=True)

    # The end of an epoch

    def end_epoch(self, epoch: int) -> None:
        """Validate, record and log; write a checkpoint, of short epochs one in ten seconds."""
        progress, runtime = self.progress, self.runtime
        sums = {name: runtime.sum(value) for name, value in sorted(progress.sums.items())}
        losses = runtime.sum(progress.current)
        if runtime.rank == 0:
            append_losses(self.job.artefact.work, losses)
        progress.sums, progress.current = {}, torch.zeros_like(progress.current)
        # On CPUs each process has its own batch norm. What is scored, and refitted after the last
        # epoch, must be what is saved; DDP does the same before the next step.
        runtime.align(self.model)
        scores = self.job.validate()
        self.job.after_epoch(epoch)
        self.model.train()
        entry: dict[str, Any] = {"epoch": epoch + 1, "step": progress.step}
        entry["lr"] = self.optimizer.param_groups[0]["lr"]
        entry |= {name: (value / len(self.indices)).tolist() for name, value in sums.items()}
        entry |= scores
        progress.history.append(entry)
        if self.train.select == "best" and scores["wga"] > progress.best.get("wga", -1):
            weights = {k: v.detach().cpu().clone() for k, v in self.model.state_dict().items()}
            progress.best = {"wga": scores["wga"], "epoch": epoch + 1, "model": weights}
        self._log(entry)
        is_last = epoch + 1 == self.job.num_epochs
        late = time.monotonic() - self.saved > min(10, 60 * self.train.checkpoint_minutes)
        if is_last or runtime.any(late):
            self.save()

    # Reporting

    LINE_SECONDS = 5  # between lines

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """A progress bar and TensorBoard while the training is at work."""
        from torch.utils.tensorboard import SummaryWriter

        total = self.job.num_epochs * self.steps_per_epoch
        self.bar = progress_bar(
            label=self.job.artefact.name, total=total, initial=self.progress.step
        )
        with contextlib.ExitStack() as stack:
            stack.callback(self.bar.close)
            if self.runtime.rank == 0 and self.job.num_epochs:
                folder = self.job.artefact.path.parent / "tensorboard"
                writer = SummaryWriter(folder, purge_step=self.progress.step)
                self.board = stack.enter_context(writer)
            self.began = self.saved = self.told = time.monotonic()
            yield
            if self.board:
                log_settings(self.board, self.job.artefact.settings, self.progress.history[-1])

    def _log(self, entry: Mapping[str, Any]) -> None:
        if self.board:
            images = (self.progress.step - self.first_step) * self.train.batch_size
            speed = images / (time.monotonic() - self.began)
            log_epoch(self.board, entry, self.job.store.group_names, speed)
        shown = {"loss": f"{entry['loss']:.3f}"}
        if "wga" in entry:
            shown["WGA"] = f"{entry['wga']:.1f}"
        self.bar.set_postfix(shown, refresh=False)
        goes_on = entry["epoch"] < self.job.num_epochs  # else another line follows at once
        late = time.monotonic() - self.told > self.LINE_SECONDS
        if self.runtime.rank == 0 and goes_on and late:
            self.told = time.monotonic()
            self.bar.write(self._line(entry, shown))
            sys.stdout.flush()

    def _line(self, entry: Mapping[str, Any], shown: Mapping[str, str]) -> str:
        """An epoch's figures, and the time left at the speed so far."""
        done = self.progress.step - self.first_step
        left = (self.job.num_epochs * self.steps_per_epoch - self.progress.step) / done
        left *= time.monotonic() - self.began
        figures = ", ".join(f"{name} {value:>6}" for name, value in shown.items())
        width = len(str(self.job.num_epochs))
        return (
            f"{self.job.artefact.name}: epoch {entry['epoch']:{width}} of {self.job.num_epochs}, "
            f"{figures}, {timedelta(seconds=round(left))} left"
        )


def learning_rate(train: Train, step: int, steps_per_epoch: int) -> float:
    """Learning rate of a step (from 0), a plain function: linear warm-up, then the schedule."""
    warmup, total = train.warmup_epochs * steps_per_epoch, train.epochs * steps_per_epoch
    if step < warmup:
        return train.lr * (step + 1) / (warmup + 1)
    if train.schedule == "constant":
        return train.lr
    return train.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def with_synchronised_norms(model: nn.Module) -> nn.Module:
    """The model with batch norm over all processes; taps on such layers stay.

    torch's own waits for the GPU in each such layer (it leaves out processes without images, which
    here have one to show), and its graph breaks under --compile: little is gained by it there.
    """
    hooks = {
        name: [*module._forward_hooks.values()]
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    }
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    arch = str(getattr(model, "arch", ""))
    if arch.startswith(TIMM):  # some of its norms hold an activation
        convert = import_timm(arch).layers.convert_sync_batchnorm
    model = convert(model)
    for name, each in hooks.items():
        for hook in each:  # they belong to the modules that were replaced
            model.get_submodule(name).register_forward_hook(hook)
    return model


def build_optimizer(model: nn.Module, train: Train, runtime: Runtime) -> Any:
    """SGD or AdamW over what is trained, prepared by accelerate (loss scaling in float16)."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer: torch.optim.Optimizer
    if train.optimizer == "adamw":
        optimizer = torch.optim.AdamW(parameters, train.lr, weight_decay=train.weight_decay)
    else:
        optimizer = torch.optim.SGD(
            parameters, train.lr, train.momentum, weight_decay=train.weight_decay
        )
    return runtime.accelerator.prepare_optimizer(optimizer)


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any]) -> None:
    """Write a checkpoint folder under a temporary name, rename it, then drop older ones."""
    final, part = folder / f"{step:09d}", folder / f"{step:09d}.part"
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    shutil.rmtree(part, ignore_errors=True)
    write_file(part / "state.pt", sealed(buffer.getvalue()))
    shutil.rmtree(final, ignore_errors=True)
    part.rename(final)
    for old in folder.glob("[0-9]*"):
        if old != final:
            shutil.rmtree(old)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    complete = sorted(path for path in folder.glob("[0-9]*") if path.suffix != ".part")
    return complete[-1] if complete else None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint holds."""
    return read_state(path / "state.pt")


LOSSES = "losses.f32"  # beside the checkpoints: a row of N numbers for each finished epoch


def append_losses(folder: Path, losses: Tensor) -> None:
    """Add the per-sample losses [N] of a finished epoch."""
    path = folder / LOSSES
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            file.write(losses.float().cpu().numpy().tobytes())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise Problem(
            f"{path} could not be written ({error.strerror}): make room there, or choose another "
            "folder with --out; the same command then goes on from where it was."
        ) from error


def cut_losses(folder: Path, num_epochs: int, num_images: int) -> None:
    """Leave the losses of the first epochs: those that the checkpoint knows to be finished."""
    if (folder / LOSSES).is_file():
        os.truncate(folder / LOSSES, 4 * num_epochs * num_images)


def losses_checksum(folder: Path, size: int) -> int:
    """CRC-32 of the first `size` bytes of the file of losses."""
    if not (folder / LOSSES).is_file():
        return 0
    with open(folder / LOSSES, "rb") as file:
        return zlib.crc32(file.read(size))


def read_losses(folder: Path, num_images: int) -> Tensor:
    """Per-sample losses [epochs, N] of the finished epochs."""
    if not (folder / LOSSES).is_file():
        return torch.zeros(0, num_images)
    return torch.from_numpy(np.fromfile(folder / LOSSES, np.float32).reshape(-1, num_images))


def log_epoch(board: Any, entry: Mapping[str, Any], names: Sequence[str], speed: float) -> None:
    """One epoch's figures to TensorBoard."""
    figures = {"charts/lr": entry["lr"], "charts/images_per_second": speed}
    for name, value in entry.items():
        if name in ("loss", "cross_entropy", "distillation") or name.startswith("feature "):
            figures[f"losses/{name}"] = value
    for i, weight in enumerate(entry.get("weight", [])):
        figures[f"weights/teacher{i}"] = weight
    figures["weights/zero_share"] = entry.get("zero_weight_share")
    for key in COLUMNS:
        figures[f"validation/{key}"] = entry.get(key)
    for name, accuracy in zip(names, entry.get("groups", []), strict=False):
        figures[f"validation_groups/{name}"] = accuracy
    for name, value in figures.items():
        if value is not None:
            board.add_scalar(name, value, entry["step"])


def log_settings(board: Any, settings: Mapping[str, Any], last: Mapping[str, Any]) -> None:
    """The settings as a table, and as hyperparameters beside the last figures, in the same run."""
    from torch.utils.tensorboard.summary import hparams

    texts = {name: str(value) for name, value in settings.items()}
    board.add_text("settings", table(["setting", "value"], [*texts.items()]))
    known = [key for key in (*COLUMNS, "loss") if last.get(key) is not None]
    final = {f"final/{key}": last[key] for key in known}
    for summary in hparams(texts, final):
        board.file_writer.add_summary(summary)


# ---- Stages --------------------------------------------------------------------------------------


def train_network(
    job: Job, outputs: Mapping[Artefact, DFR | None], ctx: Context, runtime: Runtime
) -> None:
    """Fit a classifier, then write it to each of `outputs`, under its own or a refitted head."""
    model = typing.cast(Classifier, job.model)
    if runtime.rank == 0:
        count = sum(parameter.numel() for parameter in model.parameters())
        print(
            f"{job.artefact.name}: {model.arch}, {count:,} parameters, {job.num_epochs} "
            f"epoch{'s' * (job.num_epochs != 1)} of {len(job.store.split('train')):,} images, "
            f"{job.train.batch_size} a step",
            flush=True,
        )
    began = time.monotonic()
    progress = fit(job, runtime)
    learnt_head = {key: value.clone() for key, value in model.head.state_dict().items()}
    for artefact, dfr in outputs.items():
        model.head.load_state_dict(learnt_head)
        if dfr:
            cells = balanced_cells(dfr, ctx, runtime)
            refit_head(model, ctx.store, dfr, job.train, job.seed, runtime, cells)
        scores = validate(model, ctx.store, runtime, artefact.name)
        if runtime.rank == 0:
            write_history(artefact, job, progress, scores)
            save_model(model, artefact, ctx, scores)
            print(
                f"{artefact.name}: validation WGA {scores['wga']:.1f} %, group mean "
                f"{scores['group_mean']:.1f} %, {time.monotonic() - began:.0f} s",
                flush=True,
            )
    runtime.wait()


def classifier_job(job: Job, ctx: Context, runtime: Runtime) -> Job:
    """A classifier's job with what all of them have: memory format, and scores of an epoch."""
    model = typing.cast(Classifier, job.model)
    # What convolutions like best, on CPUs as on GPUs.
    model.to(memory_format=torch.channels_last)
    job.validate = functools.partial(validate, model, ctx.store, runtime)
    return job


def write_history(artefact: Artefact, job: Job, progress: Progress, scores: Any) -> None:
    """Figures of every epoch, and the training loss of every sample in every epoch."""
    history = {
        "epochs": progress.history, "best_epoch": progress.best.get("epoch"), "final": scores,
    }
    losses = read_losses(job.artefact.work, len(job.store.split("train")))
    write_file(beside(artefact.path, ".history.json"), json.dumps(history, indent=1))
    content = weights_file({"losses": losses}, {})
    write_file(beside(artefact.path, ".losses.safetensors"), content)


def beside(path: Path, suffix: str) -> Path:
    """A model's other files: model.safetensors -> model.history.json."""
    return path.with_name(path.stem + suffix)


def gone(path: Path, model: Path) -> Problem:
    """What is said where a file beside a model is missing or damaged."""
    return Problem(
        f"{path} is gone or damaged: delete {model} as well; the same command then makes both."
    )


def infer_groups(groups: str, part: str, ctx: Context, runtime: Runtime) -> np.ndarray:
    """Cells of a part of the data, inferred from the biased model (the mean of several's logits).

    Its networks are loaded anew: others may have been folded, which changes the last bits."""
    indices = ctx.store.split(part)
    models = [load_model(ctx.require(each), runtime.device, ctx.store) for each in ctx.biased()]
    logits = predict(models, ctx.store, indices, runtime).mean(0)
    return infer_cells(logits, ctx.store.labels[indices], groups)


def balanced_cells(dfr: DFR, ctx: Context, runtime: Runtime) -> np.ndarray | None:
    """What a head is balanced over on the reweighting part, if it is inferred; else None.

    Raises Problem where a class has too few images on which the biased model is right or wrong.
    """
    if not dfr.infers_groups:
        return None
    cells = infer_groups(dfr.groups, "reweighting", ctx, runtime)
    if small := small_cells(cells, ctx.store.class_names):
        raise Problem(
            f"dfr.groups = {dfr.groups!r}: the smaller inferred group of a class has too few "
            f"images in the part of validation that refits heads ({small}; {LEAST_IN_CELL} are "
            "needed): the biased model fits nearly all. Hold out images it was not trained on, "
            "raise Data.reweighting, or take a biased model that fits less: bias_model.kind = "
            "'early-stopped' or 'gce'."
        )
    return cells


def run_teachers(ctx: Context) -> None:
    """Train the teachers (ERM), then refit their heads (DFR); print both by group."""
    count, bias_model = ctx.recipe.teachers.num_teachers, ctx.recipe.bias_model
    waits = ctx.recipe.teachers.dfr.infers_groups  # heads do, for the biased model
    makes_biased = "bias-model" in ctx.makes
    if waits and not makes_biased and bias_model.kind != "teacher":
        ctx.require(ctx.bias())  # said before the training
    runtime, places = ctx.runtime.plan(
        range(count), ctx.common.parallel, ctx.recipe.teachers.train.batch_size
    )
    for i in places:
        train_teacher(i, ctx, runtime)
        if not waits:
            refit_teacher(i, ctx, runtime)
    ctx.runtime.accelerator.wait_for_everyone()
    if waits:
        if makes_biased:
            run_bias_model(ctx)
        for i in places:
            refit_teacher(i, ctx, runtime)
        ctx.runtime.accelerator.wait_for_everyone()
    scores = {}
    refitted = refit_name(ctx.recipe.teachers.dfr, ctx.store)
    for i in range(count):
        arch = ctx.recipe.teachers.of(i).arch[0]
        for head, name in (("erm", "ERM"), ("dfr", refitted)):
            metadata = read_metadata(ctx.teacher(i, head).path)
            scores[f"{i} {arch} {name}"] = json.loads(metadata["metrics"])
    columns = shown_columns(scores.values())
    rows = [[name, *score_cells(each, columns)] for name, each in scores.items()]
    alone = ctx.store.data.reweighting < 1
    part = "selection part" if alone else "on which heads were fitted"
    header = ["teacher", *columns.values(), *ctx.store.group_names]
    say(f"\nTeachers, validation ({part}), per cent:", table(header, rows), "")
    if "distill" not in ctx.makes:  # which prints it too
        print_departures(ctx)
        if ensembles_of(ctx) and not all_finished(ctx.biased(), ctx):
            say("`bias-model` makes the biased model, and shows how far they depart from it.")


def train_teacher(i: int, ctx: Context, runtime: Runtime) -> None:
    """Teacher i, trained on the labels."""
    artefact = ctx.teacher(i, "erm")

    def build(missing: list[Artefact]) -> None:
        train_network(teacher_job(i, ctx, runtime), {artefact: None}, ctx, runtime)

    make([artefact], build, ctx, runtime)


def teacher_job(i: int, ctx: Context, runtime: Runtime) -> Job:
    """The training of teacher i."""
    section, store, artefact = ctx.recipe.teachers.of(i), ctx.store, ctx.teacher(i, "erm")
    users = [] if section.train.epochs else users_of(artefact, ctx)
    model = build_model(
        section.arch[0], section.weights[0], store.num_classes, section.input, section.seed,
        f"{', '.join(users)} would use teacher {i}" if users else "",
    )
    job = Job(artefact, model, section, section.train, store, section.seed, label_losses)
    return classifier_job(job, ctx, runtime)


def refit_teacher(i: int, ctx: Context, runtime: Runtime) -> None:
    """Teacher i under a head refitted on balanced data."""
    section, artefact = ctx.recipe.teachers.of(i), ctx.teacher(i, "dfr")

    def build(missing: list[Artefact]) -> None:
        model = load_model(ctx.teacher(i, "erm").path, runtime.device)
        cells = balanced_cells(section.dfr, ctx, runtime)
        refit_head(model, ctx.store, section.dfr, section.train, section.seed, runtime, cells)
        scores = validate(model, ctx.store, runtime, artefact.name)
        if runtime.rank == 0:
            save_model(model, artefact, ctx, scores)

    make([artefact], build, ctx, runtime)


def run_bias_model(ctx: Context) -> None:
    """Train the biased model, or take a teacher's ERM parent."""
    section, artefact = ctx.recipe.bias_model, ctx.bias()
    runtime, jobs = ctx.runtime.plan([artefact], ctx.common.parallel, section.train.batch_size)

    def build(missing: list[Artefact]) -> None:
        if section.kind == "teacher":
            if runtime.rank == 0:
                copy_parent(artefact, ctx)
            return
        train_network(bias_job(ctx, runtime), {artefact: None}, ctx, runtime)

    if section.kind == "teacher":
        ctx.require(ctx.teacher(section.teacher, "erm"))
    for _ in jobs:
        make([artefact], build, ctx, runtime)
    ctx.runtime.accelerator.wait_for_everyone()
    if "distill" not in ctx.makes:
        print_departures(ctx)


def bias_job(ctx: Context, runtime: Runtime) -> Job:
    """The training of a biased model that is no teacher's."""
    section, store = ctx.recipe.bias_model, ctx.store
    model = build_model(
        section.arch, section.weights, store.num_classes, section.input, section.seed,
        "" if section.train.epochs else "students would depart from this network",
    )
    losses = gce_losses if section.kind == "gce" else label_losses
    job = Job(ctx.bias(), model, section, section.train, store, section.seed, losses)
    if section.kind == "early-stopped":
        job.stop_after = section.stop_after
    return classifier_job(job, ctx, runtime)


def copy_parent(artefact: Artefact, ctx: Context) -> None:
    """Write the biased model as a copy of a teacher before its head was refitted."""
    parent, = artefact.parents.values()
    for suffix in (".history.json", ".losses.safetensors"):
        source = beside(parent.path, suffix)
        if not source.is_file():
            raise gone(source, parent.path)
        write_file(beside(artefact.path, suffix), source.read_bytes())
    metrics = json.loads(read_metadata(parent.path)["metrics"])
    save_model(load_model(parent.path), artefact, ctx, metrics)
    teacher = ctx.recipe.bias_model.teacher
    say(f"bias-model: teacher {teacher} before its head was refitted")


def run_distill(ctx: Context) -> None:
    """Train every student with every seed; those that differ only in the head are trained once."""
    for name in ctx.recipe.students:
        for parent in ctx.student(name, ctx.recipe.seeds[0]).parents.values():
            if parent.command in ("teachers", "bias-model"):
                ctx.require(parent)
    batch_size = min(student.train.batch_size for student in ctx.recipe.students.values())
    runtime, jobs = ctx.runtime.plan(
        students_alike(ctx.recipe), ctx.common.parallel, batch_size
    )
    print_departures(ctx)
    for seed, names in jobs:
        distill(names, seed, ctx, runtime)
    ctx.runtime.accelerator.wait_for_everyone()


def students_alike(recipe: Recipe) -> list[tuple[int, list[str]]]:
    """The networks to be trained: each with its seed and its students, which differ in the head."""
    alike: dict[tuple[str, int], list[str]] = {}
    for seed in recipe.seeds:
        for name, student in recipe.students.items():
            network = json.dumps(settings_of(student, head=False))
            alike.setdefault((network, seed), []).append(name)
    return [(seed, names) for (_, seed), names in alike.items()]


def distill(names: Sequence[str], seed: int, ctx: Context, runtime: Runtime) -> None:
    """One network and its students, `names`, which differ in the head alone."""
    students = {ctx.student(name, seed): ctx.students[name] for name in names}
    first, student = next(iter(students.items()))

    def build(missing: list[Artefact]) -> None:
        store = training_store(student, seed, ctx)
        weights = student.weights
        if student.start:
            weights = str(ctx.require(ctx.student(student.start, seed)))
        kept = [name for name in names if ctx.students[name].head == "own"]
        model = build_model(
            student.arch, weights, store.num_classes, student.input, seed,
            f"{', '.join(kept)} would be it" if kept and not student.train.epochs else "",
        )
        job = student_job(Job(first, model, student, student.train, store, seed, label_losses),
                          ctx, runtime)
        outputs = {
            artefact: students[artefact].dfr if students[artefact].head == "dfr" else None
            for artefact in missing
        }
        train_network(job, outputs, ctx, runtime)

    make([*students], build, ctx, runtime)


def student_job(job: Job, ctx: Context, runtime: Runtime) -> Job:
    """A student's job, with what its teachers have to say."""
    student, model = job.settings, typing.cast(Classifier, job.model)
    if model.projection:
        freeze_beyond_map(model, ctx.store.data.crop)
    if student.has_teachers:
        targets = frozen_targets(student, job.store, ctx, runtime)
        if student.has_departures:
            targets.departures = targets.measure(student.departure_gap)
        samples = sample_weights(job, targets, runtime) if student.weighs_samples else None
        if student.loss == "simkd":
            job.losses = projected_loss(job, targets, samples, ctx)
            return classifier_job(job, ctx, runtime)
        features = feature_loss(job, targets, ctx) if student.has_features else None
        job.losses = distillation(targets.answer, features, samples)
        if student.train.mix == "none":
            job.prepare = targets.prepare
    return classifier_job(job, ctx, runtime)


def frozen_networks(student: Distill, ctx: Context) -> list[Artefact]:
    """What a student learns from: its teachers, then the biased model if it is compared with."""
    return ctx.ensemble(student) + (ctx.biased() if student.has_biased else [])


def users_of(network: Artefact, ctx: Context) -> list[str]:
    """The students that learn from a network, or compare with it, under the head it has."""
    return [
        name for name, student in ctx.students.items()
        if network.path in [artefact.path for artefact in frozen_networks(student, ctx)]
    ]


def frozen_targets(student: Distill, store: Store, ctx: Context, runtime: Runtime) -> Targets:
    """The answers of a student's teachers and biased model to the images of `store`."""
    models = [ctx.network(artefact) for artefact in frozen_networks(student, ctx)]
    num_teachers = len(ctx.ensemble(student))
    settings = ctx.data_settings | {"data": store.fingerprint}
    seed = student.train.view_seed
    return Targets(models, num_teachers, store, settings, runtime, seed, student.has_features)


def teacher_rows(ctx: Context, student: Distill) -> list[dict[str, Any]]:
    """Each of a student's teachers with its departure from the biased model, on training images.

    All processes take part.
    """
    compared = replace(student, weighting="departure", gamma=(0.0,))
    targets = frozen_targets(compared, ctx.store, ctx, ctx.runtime.together())
    found = targets.measure(student.departure_gap)
    biased = as_biased(found, student.departure_gap)
    rows = []
    for i, artefact in enumerate(ctx.ensemble(student)):
        disputed = float(found.disputed[i])
        rows.append({
            "name": artefact.name,
            "departure": float(found.distance[i]),
            "disputed": None if math.isnan(disputed) else disputed,
            "accuracy": 100 * float(found.accuracy[i]),
            "skill": float(found.skill[i]),
            "weight": float(found.weights[i]),
            "biased": bool(biased[i]),
        })
    return rows


def ensembles_of(ctx: Context) -> dict[tuple[str, ...], list[str]]:
    """The different ensembles that the recipe's students learn from, with those students."""
    ensembles: dict[tuple[str, ...], list[str]] = {}
    for name, student in ctx.recipe.students.items():
        if student.has_teachers:
            teachers = tuple(artefact.name for artefact in ctx.ensemble(student))
            ensembles.setdefault(teachers, []).append(name)
    return ensembles


def all_finished(artefacts: Sequence[Artefact], ctx: Context) -> bool:
    """Are they all there? The first process looks, for all."""
    return ctx.runtime.together().first(
        lambda: all(artefact.standing().state == State.FINISHED for artefact in artefacts)
    )


def describe_ensembles(ctx: Context) -> list[dict[str, Any]]:
    """For each ensemble the students that learn from it, and its teachers, if all there is."""
    described = []
    for names in ensembles_of(ctx).values():
        students = [ctx.students[name] for name in names]
        student = next((each for each in students if each.has_departures), students[0])
        needed = ctx.ensemble(student) + ctx.biased()
        if all_finished(needed, ctx):
            described.append({"students": names, "teachers": teacher_rows(ctx, student)})
    return described


def departure_table(teachers: Sequence[Mapping[str, Any]]) -> str:
    """The teachers of an ensemble, and which of them are as biased as the biased model."""
    lines = []
    for row in teachers:
        disputed = "–" if row["disputed"] is None else f"{row['disputed']:.4f}"
        cells = [row["name"], f"{row['departure']:.4f}", disputed, f"{row['accuracy']:.1f}"]
        note = "" if row["weight"] else "too often wrong"
        if row["biased"]:
            note = "as biased as the biased model"
        lines.append([*cells, f"{row['skill']:.2f}", f"{row['weight']:.3f}", note])
    header = ["teacher", "departure", "where they disagree", "accuracy", "skill", "weight", ""]
    return table(header, lines)


def print_departures(ctx: Context) -> None:
    """The teachers that students are about to learn from, as far as they and the biased model are
    there."""
    for ensemble in describe_ensembles(ctx):
        say(
            "\nTeachers' departure from the biased model, training images (weight: of departure):",
            departure_table(ensemble["teachers"]), "",
        )


def sample_weights(
    job: Job, targets: Targets, runtime: Runtime
) -> SampleWeights | GroupShares:
    """The weights of a student's samples, which become a part of its network while it trains."""
    student, model, store = job.settings, typing.cast(Classifier, job.model), job.store
    train = store.split("train")
    samples: SampleWeights | GroupShares
    if student.sample_weights == "group-dro":
        groups = torch.from_numpy(store.groups[train])
        samples = GroupShares(groups, len(store.group_names), student.dro_step)
    elif student.sample_weights == "jtt":
        wrong = targets.wrong()
        if not wrong.any():
            say(
                f"warning: {job.artefact.name}: the biased model gets every training image right, "
                "so sample_weights = 'jtt' weighs all alike: stop it early (bias_model.kind = "
                "'early-stopped')."
            )
        samples = SampleWeights(torch.where(wrong, student.upweight, 1.0))
    else:
        samples = SampleWeights(torch.ones(len(train)))
        tap = Tap(model, ["layer1"], store.data.crop)

        def after_epoch(epoch: int) -> None:
            if epoch + 1 < job.num_epochs:
                weights = weights_by_readout(job, tap, seed_of(job.seed, Stream.READOUT, epoch),
                                             runtime)
                samples.weights.copy_(weights)

        job.after_epoch = after_epoch
    model.samples = samples
    return samples


READOUT_LR = 1e-3  # of Adam (ours; the paper's is not known to us)


def weights_by_readout(job: Job, tap: Tap, seed: int, runtime: Runtime) -> Tensor:
    """DeDiER's weights [N] of the training images, by a fresh readout of what `tap` sees of
    layer1, trained on their labels for one epoch (2310.18590).

    The student is in eval mode and stays as it is. Readout and weights are by the evaluation view
    (ours). Every process trains one; the first one's counts, since without a GPU each has batch
    norm statistics of its own.
    """
    student, store, model = job.settings, job.store, typing.cast(Classifier, job.model)
    indices = store.split("train")
    labels = torch.from_numpy(store.labels[indices]).to(runtime.device)
    order = permutation(len(indices), seed)
    everything = range(math.ceil(len(indices) / BLOCK))
    torch.manual_seed(seed)
    readout = Readout(tap.widths["layer1"], store.num_classes).to(runtime.device, runtime.dtype)
    optimizer = torch.optim.Adam(readout.parameters(), READOUT_LR)

    def read(places: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        """Maps of training images in eval mode, and their labels, by blocks."""
        blocks = extract({"": model}, store, indices[places], runtime, blocks=everything)
        for _, part, _ in blocks:
            yield tap.maps["layer1"].to(runtime.dtype), labels[places[part]]

    model.eval()
    with runtime.autocast():
        for maps, of_block in read(order):
            with torch.autocast(runtime.device.type, enabled=False), torch.enable_grad():
                for first in range(0, len(maps), job.train.batch_size):
                    batch = slice(first, first + job.train.batch_size)
                    optimizer.zero_grad()
                    cross_entropy(readout(maps[batch]), of_block[batch]).mean().backward()
                    optimizer.step()
        logits = []
        for maps, _ in read(np.arange(len(indices))):
            with torch.autocast(runtime.device.type, enabled=False):
                logits.append(readout(maps))
    weights = readout_weights(
        torch.cat(logits), labels, student.readout_alpha, student.readout_beta
    )
    return runtime.sum(weights * float(runtime.rank == 0))


def unfolded(
    artefacts: Sequence[Artefact], keys: Sequence[str], targets: Targets, ctx: Context
) -> dict[str, Classifier]:
    """Frozen networks by the key of their trunk, whose layers can be looked at: folding leaves no
    modules to tap."""
    networks: dict[str, Classifier] = {}
    for key, artefact in zip(keys, artefacts, strict=True):
        if key not in networks:
            networks[key] = load_model(artefact.path, targets.runtime.device, ctx.store)
    return networks


def projected_loss(
    job: Job, targets: Targets, samples: WeighSamples | None, ctx: Context
) -> Losses:
    """SimKD: the student gets a projector, and its teachers' mean head, which stays as it is."""
    student, model, side = job.settings, typing.cast(Classifier, job.model), ctx.store.data.crop
    artefacts, count = ctx.ensemble(student), targets.num_teachers
    keys = targets.trunk_keys[:count]
    networks = unfolded(artefacts, keys, targets, ctx)
    if count < (student.num_teachers or ctx.recipe.teachers.num_teachers):
        say(
            f"{job.artefact.name}: learns from {artefacts[0].name} alone, since teachers that did "
            "not begin with the same pretrained weights have no channels in common."
        )
    layer = last_layer(networks[keys[0]], side)
    for key, artefact in zip(keys, artefacts, strict=True):
        seen = pooled_map(networks[key], layer, side, artefact)
    add_projector(model, side, seen, job.seed)
    tap = Tap(model, ["projected"], side)
    heads = [network.head for network in targets.models[:count]]
    for name in ("weight", "bias"):
        mean = torch.stack([getattr(head, name) for head in heads]).mean(0)
        setattr(model.head, name, nn.Parameter(mean, requires_grad=False))
    compared = replace(student, gamma=(1.0,), layers=(f"projected={layer}",))
    frozen = frozen_features(compared, targets, networks, pretrained=True)
    pair, = compared_layers(compared)
    return simkd(pair, frozen, tap.maps, samples)


def pooled_map(network: Classifier, layer: str, side: int, artefact: Artefact) -> Tensor:
    """What a teacher's last layer puts out of a black image, [1, t, h, w]. Raises Problem unless
    its mean is what the head multiplies: a projector could not stand in for it."""
    tap = Tap(network, [layer, "pooled"], side)
    tap.remove()
    found, pooled = tap.maps[layer], tap.maps["pooled"]
    mean = F.adaptive_avg_pool2d(found, 1)
    if mean.shape != pooled.shape or not torch.allclose(mean, pooled, rtol=1e-3, atol=1e-4):
        raise Problem(
            f"{artefact.name}: the head of {network.arch} multiplies something else than the mean "
            f"of its last map ({layer}), so loss = 'simkd' cannot learn from it: take a residual "
            "network, or loss = 'kd'."
        )
    return found


def add_projector(model: Classifier, side: int, teacher: Tensor, seed: int) -> None:
    """Put a projector to the channels of a teacher's map [1, t, h, w] behind a student's last one,
    unless it has such a one already. The larger map is averaged down to the smaller."""
    layer = last_layer(model, side)
    tap = Tap(model, [layer], side)
    tap.remove()
    own = tap.maps[layer]
    projection = Projection(
        layer_paths(model, side)[layer].removeprefix("trunk."), own.shape[1],
        min(own.shape[-1], teacher.shape[-1]), teacher.shape[1],
    )
    if model.projection != projection:
        torch.manual_seed(seed_of(seed, Stream.ADAPTERS))
        model.project(projection)
        freeze_beyond_map(model, side)


def freeze_beyond_map(model: Classifier, side: int) -> None:
    """What of a trunk does not reach the map that its projector takes is not trained: no gradient
    would come."""
    model.eval()(torch.zeros(1, 3, side, side, device=model.mean.device))
    parameters = [each for each in model.trunk.parameters() if each.requires_grad]
    gradients = torch.autograd.grad(model.last_map.sum(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)


def feature_loss(job: Job, targets: Targets, ctx: Context) -> FeatureLoss:
    """The loss of a student's layers; its network is tapped and gets its adapters."""
    student, model = job.settings, typing.cast(Classifier, job.model)
    layers = compared_layers(student)
    networks: dict[str, Classifier] = {}
    if student.train.mix != "none" or any(layer.teacher != "pooled" for layer in layers):
        artefacts = ctx.ensemble(student)
        if student.feature_weights == "agre":
            artefacts = frozen_networks(student, ctx)
        networks = unfolded(artefacts, targets.trunk_keys[: len(artefacts)], targets, ctx)
    frozen = frozen_features(student, targets, networks, began_alike(ctx.recipe.teachers))
    tap = Tap(model, [layer.student for layer in layers], ctx.store.data.crop)
    features = FeatureLoss(student, frozen, job.seed)
    features.attach(model, tap.maps, tap.widths)
    return features


def training_store(student: Distill, seed: int, ctx: Context) -> Store:
    """The data a student is trained on: with generated images, rebalanced."""
    store = ctx.store
    if student.augmented:
        note = ctx.require(ctx.image_set(student.augmented, seed))
        check_files(note)
        store = with_images(store, note.parent, student.augmented_ratio)
    train = store.split("train")
    labels, everywhere = store.labels[train], np.zeros(len(train), np.int64)
    if student.rebalance == "groups":
        return rebalanced(store, store.cells[train], everywhere)
    if student.rebalance == "classes":
        return rebalanced(store, labels, everywhere)
    if student.rebalance == "tab":
        path = ctx.require(ctx.helper(student, seed))
        source = beside(path, ".losses.safetensors")
        try:
            losses = read_weights(source)[0]["losses"].numpy()
        except Problem as problem:
            raise gone(source, path) from problem
        if not len(losses):
            raise Problem(
                f"{path} was taken as it is, not trained, and has no losses that TAB could "
                "cluster: name a student as `helper`, or train the biased model."
            )
        if losses.shape[1] != len(train):
            raise Problem(
                f"{path} was trained on {losses.shape[1]:,} images, the student that it helps sees "
                f"{len(train):,}: name a helper with the same `augmented` and no rebalance."
            )
        return rebalanced(store, loss_clusters(losses, labels, seed), labels)
    return store


def with_images(store: Store, folder: Path, ratio: float) -> Store:
    """The store with a set of generated images added to its training split."""
    with open(folder / "metadata.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    size, geometry = store.data.size, store.data.geometry
    images = np.stack([decode(folder / row["image"], size, geometry) for row in rows])
    labels = np.array([int(row["label"]) for row in rows])
    return enlarge(store, images, labels, ratio)


# ---- Generated images ----------------------------------------------------------------------------


class Generator:
    """A differentiable map from latents and classes to images, on a diffusers pipeline.

    Pixel-space UNet2DModel, with classes or without, or Stable Diffusion with a prompt for each
    class. Everything about a sample is a function of its key. Raises Problem for other pipelines.
    """

    LEVELS = (0.1, 0.3, 0.5)  # noise levels of the realism test, as shares of all timesteps

    def __init__(
        self, source: str, settings: Augment, class_names: Sequence[str], size: int,
        runtime: Runtime,
    ) -> None:
        self.settings, self.size, self.device = settings, size, runtime.device
        self.dtype, self.evaluations = runtime.dtype, 0
        self.micro_batch = 0  # samples that pass through a network at once; 0: all
        half = {"bfloat16": torch.bfloat16, "float16": torch.float16}
        self.network_dtype = half.get(runtime.precision, runtime.dtype)
        pipeline = load_pipeline(source)
        check_pipeline(source, pipeline, len(class_names))
        self.unet = self._frozen(pipeline.unet, self.network_dtype)
        self.side = int(self.unet.config.sample_size)
        self.vae: Any = None
        self.scale, self.text = 1.0, None
        if hasattr(pipeline, "vae"):
            self._add_text_and_latents(pipeline, class_names)
        self._set_schedule(pipeline.scheduler)

    def _frozen(self, network: nn.Module, dtype: torch.dtype) -> Any:
        return network.to(self.device, dtype).eval().requires_grad_(False)

    def _add_text_and_latents(self, pipeline: Any, class_names: Sequence[str]) -> None:
        """Stable Diffusion's autoencoder, and what its text encoder says of each class."""
        # Its activations pass float16's 65504, but for versions that say otherwise.
        overflows = pipeline.vae.config.get("force_upcast", True)
        keep_in_single = overflows and self.network_dtype == torch.float16
        dtype = torch.float32 if keep_in_single else self.network_dtype
        self.vae = self._frozen(pipeline.vae, dtype)
        self.scale = pipeline.vae.config.scaling_factor
        self.side *= 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
        prompts = [self.settings.prompt.replace("{}", name) for name in class_names]
        prompts.append("")  # without guidance
        tokens = pipeline.tokenizer(
            prompts, padding="max_length", truncation=True,
            max_length=pipeline.tokenizer.model_max_length, return_tensors="pt",
        )
        encoder = self._frozen(pipeline.text_encoder, self.network_dtype)
        self.text = encoder(tokens.input_ids.to(self.device))[0]

    def _set_schedule(self, scheduler: Any) -> None:
        """The timesteps of a sample, and the scheduler that puts noise on images."""
        diffusers = import_diffusers()
        wanted = self.settings.scheduler or type(scheduler).__name__
        kind: Any = getattr(diffusers, wanted, None)
        is_scheduler = isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)
        if not (is_scheduler and hasattr(kind, "add_noise")):
            raise Problem(f"diffusers has no scheduler {wanted!r} for images.")
        # DDIM and DDPM clip to pixels' -1..1 unless the configuration says otherwise, and that of
        # another scheduler need not. Latents lie beyond.
        clipping: dict[str, bool] = {}
        if self.vae is not None:
            clipping = {"clip_sample": False, "thresholding": False}
        if clipping or wanted != type(scheduler).__name__:
            scheduler = kind.from_config(scheduler.config, **clipping)
        self.scheduler = scheduler
        self.noising = diffusers.DDPMScheduler.from_config(scheduler.config)
        steps, strength = self.settings.steps, self.settings.strength
        self.total = math.ceil(steps / strength)
        self.first = self.total - steps
        if self.total > len(self.noising.timesteps):
            raise Problem(
                f"{steps} steps at strength {strength} are more than the generator's "
                f"{len(self.noising.timesteps)} timesteps."
            )
        self._check_schedule()

    def _check_schedule(self) -> None:
        """Can a sample start in the middle of the scheduler's steps, and do they exist?"""
        name, last = type(self.scheduler).__name__, len(self.noising.timesteps) - 1
        try:
            self.restart()
        except ValueError as error:
            reason = str(error).strip().splitlines()[0]
            raise Problem(
                f"{name} refuses {self.total} steps ({reason}): choose fewer steps, more strength, "
                "or another scheduler."
            ) from error
        lowest, highest = (float(t) for t in self.scheduler.timesteps.aminmax())
        if lowest < 0 or highest > last:
            end = f"down to {lowest:.0f}" if lowest < 0 else f"up to {highest:.0f}"
            raise Problem(
                f"{self.settings.steps} steps at strength {self.settings.strength} are "
                f"{self.total} in all, which {name} places on timesteps {end}, outside the "
                f"generator's 0 to {last}: choose steps or strength a little different."
            )
        if len(self.scheduler.timesteps) != self.total or getattr(self.scheduler, "order", 1) > 1:
            raise Problem(
                f"{name} asks the network more than once in some steps, so a sample cannot start "
                "between them: choose DDIMScheduler, EulerDiscreteScheduler or "
                "DPMSolverMultistepScheduler."
            )

    def restart(self) -> None:
        """Bring the scheduler to the first step of a sample. Many count the steps they have taken,
        and put that step's noise on images too."""
        self.scheduler.set_timesteps(self.total, device=self.device)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(self.first)

    def sample_needs(self) -> dict[str, Need]:
        """What one sample's gradient needs in the UNet, and in the decoder. They come in turns."""
        config, empty = self.unet.config, functools.partial(torch.empty, device="meta")
        shape = (1, config.in_channels, config.sample_size, config.sample_size)
        x = empty(shape, dtype=self.unet.dtype, requires_grad=True)
        more: dict[str, Tensor] = {}
        if self.text is not None:
            more["encoder_hidden_states"] = self.text[:1].to("meta")
        elif config.num_class_embeds:
            more["class_labels"] = empty(1, dtype=torch.int64)
        passes = 2 if self.text is not None and self.settings.guidance_scale > 1 else 1
        unet = gradient_need(self.unet, x, empty(1, dtype=torch.int64), **more)
        parts = {"UNet": unet._replace(bytes=passes * unet.bytes)}
        if self.vae is not None:
            z = empty(shape, dtype=self.vae.dtype, requires_grad=True)
            parts["decoder"] = gradient_need(self.vae.decoder, z)
        return parts

    def denoise(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """The network's prediction at timesteps t [b] for classes [b]."""
        x, more = x.to(self.unet.dtype), {}
        if self.text is not None:
            more["encoder_hidden_states"] = self.text[labels]
        elif self.unet.config.num_class_embeds:
            more["class_labels"] = labels
        prediction = self.unet(x, t, **more).sample
        if self.text is not None and self.settings.guidance_scale > 1:
            more["encoder_hidden_states"] = self.text[torch.full_like(labels, -1)]
            plain = self.unet(x, t, **more).sample
            prediction = plain + self.settings.guidance_scale * (prediction - plain)
        return prediction.to(self.dtype)

    def latents(self, raw: np.ndarray) -> Tensor:
        """Stored images, uint8 [b, 3, S, S], as the generator's clean latents."""
        x = upload(raw, self.device).to(self.dtype) / 127.5 - 1
        if x.shape[-1] != self.side:
            x = F.interpolate(x, (self.side, self.side), mode="bilinear", antialias=True)
        if self.vae is None:
            return x
        with torch.no_grad():
            return self.by_slices(self.encode, x)

    def encode(self, images: Tensor) -> Tensor:
        """Latents of images in -1..1, by the autoencoder."""
        encoded = self.vae.encode(images.to(self.vae.dtype)).latent_dist.mode()
        return self.scale * encoded.to(images.dtype)

    def decode(self, z: Tensor) -> Tensor:
        """Images in -1..1 of latents, by the autoencoder."""
        return self.vae.decode((z / self.scale).to(self.vae.dtype)).sample.to(self.dtype)

    def by_slices(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """function(*tensors), some samples at a time. For the gradient each slice is computed anew,
        so memory holds the activations of one slice in one network."""
        from torch.utils.checkpoint import checkpoint

        parts = [
            checkpoint(
                function, *(tensor[part] for tensor in tensors), use_reentrant=False,
                preserve_rng_state=False,  # nothing is random in them; reading it waits for a GPU
            )
            for part in slices(len(tensors[0]), self.micro_batch)
        ]
        return torch.cat(parts)

    def begin(self, raw: np.ndarray, *key: int) -> Tensor:
        """The latent to start from, [1, ...], of one stored image [1, 3, S, S]."""
        clean = self.latents(raw)
        noise = upload(noise_like(clean.shape, self.dtype, *key), self.device)
        if self.settings.strength == 1:
            return noise * self.scheduler.init_noise_sigma
        self.restart()
        return self.scheduler.add_noise(clean, noise, self.scheduler.timesteps[self.first][None])

    def images(self, z: Tensor, labels: Tensor, keys: Sequence[int]) -> Tensor:
        """Images [b, 3, S, S] in 0..1 of latents [b, ...] and classes [b]."""
        self.restart()
        more = {}
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            more["generator"] = [torch.Generator(self.device).manual_seed(key) for key in keys]
        for t in self.scheduler.timesteps[self.first :]:
            scaled = self.scheduler.scale_model_input(z, t)
            prediction = self.by_slices(self.denoise, scaled, t.expand(len(z)), labels)
            z = self.scheduler.step(prediction, t, z, **more).prev_sample
        self.evaluations += len(labels) * self.settings.steps
        if self.vae is not None:
            z = self.by_slices(self.decode, z)
        images = (z / 2 + 0.5).clamp(0, 1)
        if self.side != self.size:
            images = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        return images

    def require_finite(self, values: Tensor, name: str) -> None:
        """Raises Problem: what is no number must pass neither as an image nor as a step."""
        if not torch.isfinite(values).all():
            precision = str(self.network_dtype).removeprefix("torch.")
            raise Problem(
                f"The generator's {name} are not finite in {precision} networks: use --precision "
                "bfloat16 or float32, or a smaller step_size."
            )

    def realism(self, raw: np.ndarray, labels: Tensor) -> Tensor:
        """Mean denoising loss [b] of stored images over a few noise levels: lower is more real."""
        clean, losses = self.latents(raw), []
        for level in self.LEVELS:
            step = int(level * len(self.noising.timesteps))
            t = torch.full((1,), step, device=self.device)
            noise = noise_like(clean.shape[1:], self.dtype, Stream.REALISM, step)
            noise = upload(noise, self.device).expand_as(clean)
            target = noise
            if self.noising.config.prediction_type == "v_prediction":
                target = self.noising.get_velocity(clean, noise, t)
            elif self.noising.config.prediction_type == "sample":
                target = clean
            with torch.no_grad():
                noisy = self.noising.add_noise(clean, noise, t)
                prediction = self.by_slices(self.denoise, noisy, t.expand(len(clean)), labels)
            losses.append((prediction - target).square().flatten(1).mean(1))
        self.evaluations += len(labels) * len(self.LEVELS)
        return torch.stack(losses).mean(0)


class FusedAttention(torch.autograd.Function):
    """Attention's shapes, and what its fused kernels keep: not the weights of all pairs."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, output)
        return output


class FuseAttention(torch.overrides.TorchFunctionMode):
    """Within it, attention is FusedAttention."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is F.scaled_dot_product_attention:
            return FusedAttention.apply(*args[:3])
        return function(*args, **(kwargs or {}))


# Backward's own tensors, as a share of what forward keeps for it.
BACKWARD = 0.1


class Need(NamedTuple):
    """What a gradient asks of memory."""

    bytes: int
    elements: int  # of its largest tensor


def gradient_need(network: nn.Module, x: Tensor, *more: Any, **named: Any) -> Need:
    """What the gradient of network(x, ...) by x needs, an estimate from shapes alone: x and the
    others are meta tensors, and nothing is computed."""
    state = itertools.chain(network.named_parameters(), network.named_buffers())
    shapes = {name: tensor.detach().to("meta") for name, tensor in state}
    kept: dict[int, torch.UntypedStorage] = {}
    elements: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata], elements[storage._cdata] = storage, tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), FuseAttention():
        torch.func.functional_call(network, shapes, (x, *more), named)
    for tensor in shapes.values():
        kept.pop(tensor.untyped_storage()._cdata, None)
    total = sum(storage.nbytes() for storage in kept.values())
    return Need(round((1 + BACKWARD) * total), max(elements[which] for which in kept))


def free_bytes(device: torch.device) -> int:
    """Memory that tensors can still take: a GPU's, else all of the machine's."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def guidance_needs(generator: Generator, judge: Judge) -> dict[str, Need]:
    """What the gradient of one image needs in each network. They come in turns."""
    networks = []
    for model in (*judge.teachers, judge.student):
        side = model.input.input_size or judge.crop
        image = torch.empty((1, 3, side, side), dtype=model.head.weight.dtype, device="meta")
        networks.append(gradient_need(model.trunk, image.requires_grad_()))
    together = (1 + judge.settings.cutouts) * sum(need.bytes for need in networks)
    largest = max(need.elements for need in networks)
    return generator.sample_needs() | {"teachers and student": Need(together, largest)}


# Some of torch's kernels refuse larger tensors, of those that Stable Diffusion's decoder needs the
# gradient of nearest upsampling: 32 images of 512 pixels have one.
MOST_ELEMENTS = 2**31 - 1


def fit_memory(generator: Generator, judge: Judge, before: int = 0) -> None:
    """Choose how many samples pass through generator and judge at once, and say what they need:
    without guidance less than the gradient that is reckoned with. If it fits, as many as `before`,
    in a run that was killed: last digits show it. Raises Problem if memory does not hold the
    gradient of one image."""
    if generator.device.type == "cuda":  # a training before may have left its network in cycles
        gc.collect()
        torch.cuda.empty_cache()
    settings, parts = judge.settings, guidance_needs(generator, judge)
    need, free = max(part.bytes for part in parts.values()), free_bytes(generator.device)
    listed = ", ".join(f"{name} {part.bytes / 2**30:.2f}" for name, part in parts.items())
    if settings.guided and need > free:
        raise Problem(
            f"Guiding one image needs {need / 2**30:.2f} GiB of memory ({listed}), of which "
            f"{free / 2**30:.2f} are free: take a lower precision, smaller images, fewer cutouts, "
            "or smaller networks."
        )
    fits = int(0.8 * free / need)  # the rest: latents, images, what the allocator loses
    most = MOST_ELEMENTS // max(part.elements for part in parts.values())
    chosen = settings.micro_batch or (before if 0 < before <= fits else fits)
    size = max(1, min(chosen, most, settings.in_flight))
    generator.micro_batch = judge.micro_batch = size
    what = "the gradient of an image" if settings.guided else "an image, at most"
    say(
        f"memory: {need / 2**30:.2f} GiB for {what} ({listed}), {size} of "
        f"{settings.in_flight} in flight at a time: {size * need / 2**30:.1f} of "
        f"{free / 2**30:.1f} GiB"
    )


def import_diffusers() -> Any:
    """The package, silenced."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    return diffusers


def load_pipeline(source: str) -> Any:
    """A diffusers pipeline of a kind that can be guided; raises Problem for any other."""
    diffusers = import_diffusers()
    try:
        name = diffusers.DiffusionPipeline.load_config(source)["_class_name"]
        if name not in ("DDPMPipeline", "DDIMPipeline", "StableDiffusionPipeline"):
            raise Problem(
                f"Generator {source} is a {name}: it must be Stable Diffusion 1.x, 2.x or "
                "SD-Turbo, or a DDPMPipeline of a UNet2DModel."
            )
        extra: dict[str, Any] = {}
        if name == "StableDiffusionPipeline":
            if not importlib.util.find_spec("transformers"):
                raise Problem(
                    f"Generator {source} needs the package transformers: install grokd with its "
                    "extra sd (uv sync --extra sd)."
                )
            extra = {"safety_checker": None, "requires_safety_checker": False}
        load = functools.partial(getattr(diffusers, name).from_pretrained, source, **extra)
        try:
            return load()
        except OSError:
            with contextlib.suppress(OSError, ValueError):
                return load(variant="fp16")  # the weights that many hold alone
            raise
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise Problem(
            f"Generator {source} could not be loaded ({reason}): give a folder with a diffusers "
            "pipeline, or a hub id with a network."
        ) from error


def check_pipeline(source: str, pipeline: Any, num_classes: int) -> None:
    """Raise Problem for a network that takes or gives something else than a `Generator` does."""
    config, has_text = pipeline.unet.config, hasattr(pipeline, "vae")
    channels = pipeline.vae.config.latent_channels if has_text else 3
    if {config.in_channels, config.out_channels} != {channels}:
        raise Problem(
            f"Generator {source}: its UNet takes {config.in_channels} channels and gives "
            f"{config.out_channels}, not {channels} and {channels}: take one of colour images "
            "that learns no variance, and is told of no mask or second image."
        )
    embedding, classes = config.class_embed_type, config.num_class_embeds
    if embedding or (has_text and classes):
        raise Problem(
            f"Generator {source}: its UNet wants an embedding of classes "
            f"({embedding or classes}) that cannot be given: take one without."
        )
    if classes and classes < num_classes:
        raise Problem(
            f"Generator {source} knows {classes} classes, the data have {num_classes}: take one "
            "that was trained on these classes, in their order, or one without classes."
        )


def guidance(
    teachers: Tensor, student: Tensor, labels: Tensor, objective: str, exponent: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The two terms of J, [b] each: teachers' (logits [M, b, C]) and student's ([b, C]).

    power: t^exponent and (1 - f)^exponent (second-hand: 2); log: log t, log(1 - f); margin: the
    class's logit above the best other one, averaged over teachers, and its negative for the
    student. t is the mean of the teachers' softmax at tau 1.
    """
    place = labels[:, None]
    is_label = F.one_hot(labels, student.shape[-1]).bool()
    if objective == "margin":
        margins = []
        for logits in (*teachers, student):
            best_other = logits.masked_fill(is_label, -math.inf).amax(1)
            margins.append(logits.gather(1, place)[:, 0] - best_other)
        return torch.stack(margins[:-1]).mean(0), -margins[-1]
    log_t = torch.logsumexp(teachers.log_softmax(-1), 0) - math.log(len(teachers))  # [b, C]
    log_t = log_t.gather(1, place)[:, 0]
    log_not_f = student.log_softmax(-1).masked_fill(is_label, -math.inf).logsumexp(1)
    if objective == "log":
        return log_t, log_not_f
    return (exponent * log_t).exp(), (exponent * log_not_f).exp()


class Verdict(NamedTuple):
    """What teachers and student say of images, [b] each."""

    teacher: Tensor  # mean confidence t_y in the class
    student: Tensor  # confidence f_y
    score: Tensor  # J
    right: Tensor  # is the class what the teachers' mean names?


class Judge:
    """Teachers, student and realism threshold: what guides the generator, and what it must pass.

    It computes in float32 under every precision, so that what passes does not depend on it. Beside
    a diffusion model that costs little: five ResNet-50 at 224 pixels, with the gradient, are .08
    TFLOP, one pass of Stable Diffusion's UNet at 512 pixels is .8 without it (counted by torch).
    """

    def __init__(
        self, teachers: Sequence[Classifier], student: Classifier, store: Store, settings: Augment
    ) -> None:
        self.teachers, self.student, self.settings = teachers, student, settings
        self.threshold, self.crop = math.inf, store.data.crop
        self.micro_batch = 0  # samples whose gradient is taken at once; 0: all

    def logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Teachers' [M, b, C] and student's [b, C] logits of images [b, 3, S, S] in 0..1."""
        start = (images.shape[-1] - self.crop) // 2
        middle = slice(start, start + self.crop)
        images = images[:, :, middle, middle]
        return torch.stack([model(images) for model in self.teachers]), self.student(images)

    def terms(self, teachers: Tensor, student: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The two terms of J, [b] each, of logits."""
        settings = self.settings
        return guidance(teachers, student, labels, settings.objective, settings.exponent)

    def scores(self, raw: np.ndarray, labels: Tensor) -> Verdict:
        """What the networks say of stored images."""
        with torch.no_grad():
            weight = self.student.head.weight
            images = upload(raw, weight.device).to(weight.dtype) / 255
            teachers, student = self.logits(images)
        of_t, of_f = self.terms(teachers, student, labels)
        t, f, place = teachers.softmax(-1).mean(0), student.softmax(-1), labels[:, None]
        return Verdict(
            t.gather(1, place)[:, 0], f.gather(1, place)[:, 0], of_t + of_f, t.argmax(1) == labels
        )

    def gradient(
        self, images: Tensor, labels: Tensor, keys: Sequence[int], iterations: Sequence[int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """dJ/dimages, and each sample's terms and their gradients' norms; cutouts and noise are
        functions of key and iteration."""
        parts = [
            self._gradient(images[part], labels[part], keys[part], iterations[part])
            for part in slices(len(images), self.micro_batch)
        ]
        figures = {name: torch.cat([of_part[name] for _, of_part in parts]) for name in parts[0][1]}
        return torch.cat([gradient for gradient, _ in parts]), figures

    def _gradient(
        self, images: Tensor, labels: Tensor, keys: Sequence[int], iterations: Sequence[int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        shown = images.detach().to(self.student.head.weight.dtype).requires_grad_()
        views = [shown]
        for cut in range(self.settings.cutouts):
            views.append(cutouts(shown, cut, keys, iterations))
        terms = []
        for number, view in enumerate(views):
            if self.settings.noise:
                noise = [
                    noise_like(view.shape[1:], view.dtype, key, i, number, Stream.GUIDANCE)
                    for key, i in zip(keys, iterations, strict=True)
                ]
                view = view + self.settings.noise * upload(torch.stack(noise), view.device)
            terms.append(torch.stack(self.terms(*self.logits(view), labels)))
        of_t, of_f = torch.stack(terms).mean(0)  # [b] each
        gradient_t = torch.autograd.grad(of_t.sum(), shown, retain_graph=True)[0]
        gradient_f = torch.autograd.grad(of_f.sum(), shown)[0]
        figures = {
            "teacher_term": of_t.detach(),
            "student_term": of_f.detach(),
            "teacher_gradient": gradient_t.flatten(1).norm(dim=1),
            "student_gradient": gradient_f.flatten(1).norm(dim=1),
        }
        return gradient_t + gradient_f, figures


def cutouts(
    images: Tensor, number: int, keys: Sequence[int], iterations: Sequence[int]
) -> Tensor:
    """A random square of each image [b, 3, S, S], resized to S: functions of key and iteration."""
    from torchvision.transforms.v2.functional import resized_crop

    size, cut = images.shape[-1], []
    for n, (key, iteration) in enumerate(zip(keys, iterations, strict=True)):
        u, v, w = hash_uniform(key, iteration, number, np.arange(3))
        side = round(size * (0.6 + 0.4 * u))
        left = int(v * (size - side + 1))
        top = int(w * (size - side + 1))
        cut.append(resized_crop(
            images[n : n + 1], top, left, side, side, [size, size], antialias=True
        ))
    return torch.cat(cut)


@dataclass
class Sample:
    """One image on its way."""

    source: int  # place in the store
    key: int
    label: int
    z: Tensor  # [...]
    norm: float  # of the first latent
    moments: list[Tensor]  # of the optimiser
    iteration: int = 0
    judged: int = 0  # realism tests so far
    before: tuple[float, float] = (0.0, 0.0)  # confidences of teachers and student at first
    best: dict[str, Any] = field(default_factory=dict)


class Flight:
    """The samples on their way in one process and the sources to come, kept on disk: which samples
    pass through the networks together shows in their last digits."""

    def __init__(
        self, sources: Sequence[int], path: Path | None = None, recorded: Sequence[int] = (),
        micro_batch: int = 0,
    ) -> None:
        self.queue = list(sources)[::-1]
        self.samples: list[Sample] = []
        self.path, self.micro_batch = path, micro_batch
        self.recorded = set(recorded)  # sources that a killed run has finished
        self.saved = -math.inf

    def save_if_late(self) -> None:
        """Once a minute. What is recorded meanwhile a killed run makes again, and does not
        record again."""
        if self.path is None or time.monotonic() - self.saved < 60:
            return
        samples = []
        for sample in self.samples:
            best = sample.best | {"image": torch.from_numpy(sample.best["image"])}
            samples.append(vars(sample) | {"best": best})
        buffer = io.BytesIO()
        state = {"queue": self.queue, "samples": samples, "micro_batch": self.micro_batch}
        torch.save(state, buffer)
        write_file(self.path, sealed(buffer.getvalue()))
        self.saved = time.monotonic()

    def restore(self, device: torch.device) -> None:
        """Go on from what was saved."""
        assert self.path
        state = read_state(self.path, device)
        self.queue = state["queue"]
        for values in state["samples"]:
            values["best"]["image"] = values["best"]["image"].cpu().numpy()
            self.samples.append(Sample(**values))


def climb(sample: Sample, gradient: Tensor, settings: Augment) -> None:
    """One step of a sample's latent up its gradient."""
    z, size = sample.z, settings.step_size
    if settings.norm == "regularise":  # ReNO: .01 (|z|^2 / 2 - (d - 1) log |z|), to be minimised
        gradient = gradient - 0.01 * (z - (z.numel() - 1) * z / z.square().sum())
    first, second = sample.moments
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


def generate(
    generator: Generator, judge: Judge, store: Store, sources: Sequence[int] | Flight, seed: int,
    log: Callable[[dict[str, Any]], None] = lambda figures: None,
) -> Iterator[dict[str, Any]]:
    """A record for every source, as soon as it passes or its budget is spent; its `image` is uint8
    [3, S, S]. Samples in flight go on together, and a new one takes the place of each that leaves.

    A sample passes with its first iterate whose 8-bit image has argmax t = y, t_y >= min_teacher,
    f_y <= max_student and a denoising loss within the threshold. Not guided: the first iterate.
    """
    settings = judge.settings
    under_way = sources if isinstance(sources, Flight) else Flight(sources)
    queue, flight = under_way.queue, under_way.samples
    while queue or flight:
        under_way.save_if_late()
        while queue and len(flight) < settings.in_flight:
            flight.append(launch(queue.pop(), generator, store, seed))
        seen, under_way.micro_batch = by_fewer(
            functools.partial(observe, flight, generator, judge),
            generator.micro_batch or len(flight),
        )
        for n, sample in enumerate(flight):
            keep_best(sample, seen.raw[n], seen.verdicts[n])
            if not seen.done[n]:
                climb(sample, seen.gradient[n], settings)
                sample.iteration += 1
        log({name: float(value.mean()) for name, value in seen.figures.items()})
        for sample, over in zip(flight, seen.done, strict=True):
            if over:
                counts = {"seed": seed, "steps": sample.iteration, "judged": sample.judged}
                yield sample.best | counts
        flight[:] = [sample for sample, over in zip(flight, seen.done, strict=True) if not over]


class Observation(NamedTuple):
    """What networks make of b samples."""

    raw: np.ndarray  # their images, uint8 [b, 3, S, S]
    verdicts: list[list[float]]  # of each: does it pass, t_y, f_y, J, denoising loss or nan
    done: list[bool]  # [b]
    gradient: Tensor  # dJ/dz [b, ...]; empty if all are done
    figures: dict[str, Tensor]  # [b] each


def observe(
    samples: Sequence[Sample], generator: Generator, judge: Judge, size: int
) -> Observation:
    """Images of the samples, what they pass, and where to go on, `size` samples at a time. It
    changes no sample."""
    generator.micro_batch = judge.micro_batch = size
    settings, keys = judge.settings, [sample.key for sample in samples]
    labels = upload(np.array([sample.label for sample in samples]), generator.device)
    z = torch.stack([sample.z for sample in samples])
    with torch.set_grad_enabled(settings.guided and settings.iterations > 0):
        z.requires_grad_(torch.is_grad_enabled())
        images = generator.images(z, labels, keys)
    generator.require_finite(images, "images")
    raw = (images.detach() * 255).round().to(torch.uint8).cpu().numpy()
    verdicts = assess(raw, labels, generator, judge)
    iterations = [sample.iteration for sample in samples]
    done = [
        bool(passed) or iteration >= settings.iterations
        for (passed, *_), iteration in zip(verdicts, iterations, strict=True)
    ]
    if all(done):
        return Observation(raw, verdicts, done, torch.empty(0), {})
    upward, figures = judge.gradient(images, labels, keys, iterations)
    gradient = latent_gradient(images, z, upward)
    generator.require_finite(gradient, "gradients")
    return Observation(raw, verdicts, done, gradient, figures)


def latent_gradient(images: Tensor, z: Tensor, upward: Tensor) -> Tensor:
    """dJ/dz of dJ/dimages, [b, ...] each.

    float16 holds nothing below 6e-8, so each sample's gradient goes through the generator with a
    norm near 1. The factor is a power of two: it changes no bit of what float32 can hold.
    """
    norms = upward.double().flatten(1).norm(dim=1)
    scale = torch.ldexp(torch.ones_like(norms), -torch.frexp(norms).exponent)[:, None, None, None]
    gradient = torch.autograd.grad(images, z, (upward * scale).to(images))[0]
    return (gradient / scale).to(z)


def launch(source: int, generator: Generator, store: Store, seed: int) -> Sample:
    """A sample at its start."""
    key = seed_of(seed, source)
    z = generator.begin(store.raw(np.array([source])), key)[0]
    moments = [torch.zeros_like(z), torch.zeros_like(z)]
    return Sample(source, key, int(store.labels[source]), z, float(z.norm()), moments)


def assess(
    raw: np.ndarray, labels: Tensor, generator: Generator, judge: Judge
) -> list[list[float]]:
    """The verdicts of an `Observation` on images as 8 bits hold them, uint8 [b, 3, S, S]."""
    settings = judge.settings
    verdict = judge.scores(raw, labels)
    passes = verdict.right
    passes &= (verdict.teacher >= settings.min_teacher) & (verdict.student <= settings.max_student)
    passes |= not settings.guided
    realism = torch.full_like(verdict.teacher, math.nan)
    if settings.realism < 1 and passes.any():
        chosen = passes.cpu().numpy()
        realism[passes] = generator.realism(raw[chosen], labels[passes]).to(realism)
        if settings.guided:
            passes &= ~(realism > judge.threshold)
    columns = (passes, verdict.teacher, verdict.student, verdict.score, realism)
    return torch.stack([column.double() for column in columns], 1).tolist()


def keep_best(sample: Sample, raw: np.ndarray, verdict: Sequence[float]) -> None:
    """Note a sample's image and its verdict, if it is the best so far."""
    passed, teacher, student, score, realism = verdict
    if sample.iteration == 0:
        sample.before = teacher, student
    if not math.isnan(realism):
        sample.judged += 1
    if passed or sample.iteration == 0 or score > sample.best["score"]:
        sample.best = {
            "score": score,
            "accepted": bool(passed),
            "source": sample.source,
            "label": sample.label,
            "iterations": sample.iteration,
            "teacher_before": sample.before[0],
            "student_before": sample.before[1],
            "teacher": teacher,
            "student": student,
            "realism": realism,
            "image": raw.copy(),
        }


def pick_sources(settings: Augment, probabilities: Tensor, labels: np.ndarray) -> np.ndarray:
    """Places in the training set [K] to start from, by the student's softmax [N, C]."""
    p = probabilities.double().numpy()
    certainty = p[np.arange(len(labels)), labels]
    if settings.sources == "least-certain":
        certainty = p.max(1)
    order = np.argsort(certainty, kind="stable")
    if settings.sources == "most-confident":
        order = order[::-1]
    elif settings.sources == "misclassified":
        order = order[p.argmax(1)[order] != labels[order]]
    count = round(settings.share * len(labels))
    if settings.sources in ("all", "misclassified"):
        count = len(order)
    count = settings.count or count
    if settings.balanced:
        members = [order[labels[order] == y] for y in np.unique(labels)]
        return np.concatenate([each[: count // len(members)] for each in members])
    return order[:count]


def train_generator(ctx: Context, runtime: Runtime) -> Path:
    """The recipe's generator, a DDPM of the stored training images: the folder of a diffusers
    pipeline."""
    artefact = ctx.generator()
    folder = artefact.path.with_name("pipeline")

    def build(missing: list[Artefact]) -> None:
        diffusers = import_diffusers()
        job = diffusion_job(artefact, ctx, runtime)
        unet: Any = job.model
        count = sum(parameter.numel() for parameter in unet.parameters())
        say(
            f"generator: UNet of {count:,} parameters, {job.train.epochs} epochs of "
            f"{len(ctx.store.split('train')):,} images of {ctx.store.data.size} pixels"
        )
        began = time.monotonic()
        progress = fit(job, runtime)
        job.average.copy_to(unet.parameters())
        if runtime.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            scheduler = diffusion_scheduler(ctx.recipe.diffusion)
            pipeline = diffusers.DDPMPipeline(unet, scheduler)
            try:
                pipeline.save_pretrained(folder)
            except SafetensorError as error:
                raise Problem(
                    f"{folder} could not be written ({error}): make room there, or choose another "
                    "folder with --out; the same command then goes on from where it was."
                ) from error
            artefact.write_note(path for path in folder.rglob("*") if path.is_file())
            loss = progress.history[-1]["loss"] if progress.history else math.nan
            say(f"generator: denoising loss {loss:.4f}, {time.monotonic() - began:.0f} s")

    make([artefact], build, ctx, runtime)
    check_files(artefact.path)
    return folder


def diffusion_scheduler(section: Diffusion) -> Any:
    """Predicts v on the cosine schedule; trailing: few steps must start from noise alone."""
    return import_diffusers().DDPMScheduler(
        section.num_timesteps, prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2",
        timestep_spacing="trailing",
    )


def diffusion_job(artefact: Artefact, ctx: Context, runtime: Runtime) -> Job:
    """What the generator learns: to denoise the whole stored squares."""
    from diffusers.training_utils import EMAModel

    section, store = ctx.recipe.diffusion, ctx.store
    scheduler = diffusion_scheduler(section)

    def view(indices: np.ndarray, raw: Tensor, epoch: int) -> Tensor:
        images = raw.to(runtime.device, non_blocking=True)
        if not store.data.flip:
            return images
        return flip_some(images, random_flips(section.seed, epoch, indices))

    def noised(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Images in -1..1, noise and levels, functions of the step and the place in its batch."""
        x = batch.images.to(runtime.dtype) / 127.5 - 1
        noise = noise_like(
            (batch.total, *x.shape[1:]), x.dtype, batch.seed, batch.step, Stream.DIFFUSION
        )
        places = np.arange(batch.total)[runtime.rank % batch.total :: runtime.world]
        places = places[batch.first : batch.first + len(x)]
        level = hash_uniform(batch.seed, batch.step, Stream.LEVEL, places)
        t = (level * section.num_timesteps).astype(np.int64)
        return x, runtime.upload(noise[places]), runtime.upload(t)

    kept: list[Tensor] = []  # what was noised, from the forward pass to the losses

    def forward(network: nn.Module, batch: Batch) -> Tensor:
        x, noise, t = kept[:] = noised(batch)
        labels = batch.labels if section.class_conditional else None
        return network(scheduler.add_noise(x, noise, t), t, labels).sample

    def losses(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        target = scheduler.get_velocity(*kept)
        squares = F.mse_loss(batch.output.to(target), target, reduction="none")
        return squares.flatten(1).mean(1), {}

    train = Train(
        section.epochs, section.batch_size, section.micro_batch, section.lr, "cosine",
        optimizer="adamw", weight_decay=0.01, checkpoint_minutes=section.checkpoint_minutes,
    )
    unet = diffusion_network(section, store).to(runtime.device, runtime.dtype)
    on_gpu = runtime.device.type == "cuda"  # where an operation for each weight would be slow
    return Job(
        artefact, unet, section, train, store, section.seed, losses, view=view, forward=forward,
        average=EMAModel(unet.parameters(), section.ema, foreach=on_gpu), clip=1.0,
    )


def diffusion_network(section: Diffusion, store: Store) -> nn.Module:
    """A UNet of the stored size, randomly initialised."""
    widths = section.widths
    multiple = 2 ** (len(widths) - 1)
    if store.data.size % multiple:
        raise Problem(
            f"diffusion.widths has {len(widths)} levels, so Data.size must be a multiple of "
            f"{multiple}, not {store.data.size}."
        )
    torch.manual_seed(section.seed)
    return import_diffusers().UNet2DModel(
        store.data.size, block_out_channels=widths, layers_per_block=1,
        norm_num_groups=math.gcd(*widths, 32),
        down_block_types=("DownBlock2D",) * (len(widths) - 1) + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (len(widths) - 1),
        num_class_embeds=store.num_classes if section.class_conditional else None,
    )


def run_augment(ctx: Context) -> None:
    """Make every set of images of the recipe, for every seed; all processes share each set."""
    runtime = ctx.runtime.together()
    for seed, (name, settings) in itertools.product(ctx.recipe.seeds, ctx.recipe.augments.items()):
        artefact = ctx.image_set(name, seed)

        def build(
            missing: list[Artefact], settings: Augment = settings, seed: int = seed
        ) -> None:
            make_set(settings, missing[0], seed, ctx, runtime)

        make([artefact], build, ctx, runtime)
    ctx.runtime.accelerator.wait_for_everyone()


def make_set(
    settings: Augment, artefact: Artefact, seed: int, ctx: Context, runtime: Runtime
) -> None:
    """Generate one set: PNGs as they are accepted, a line for each source in records-*.jsonl, at
    the end metadata.csv and sheet.png. What a killed run had recorded stays."""
    store, folder = ctx.store, artefact.path.parent
    judge = appoint_judge(settings, seed, ctx, runtime)
    source = settings.generator or str(train_generator(ctx, runtime))
    generator = Generator(source, settings, store.class_names, store.data.size, runtime)
    fit_memory(generator, judge, micro_batch_before(artefact, runtime))
    if settings.realism < 1:
        judge.threshold = calibrate(generator, store, settings.realism)
    sources = sources_of(settings, seed, judge, ctx, runtime)
    recorded = runtime.first(lambda: recorded_sources(folder))
    remaining = [int(i) for i in sources if i not in recorded]
    say(f"{artefact.name}: {len(sources):,} sources, {len(remaining):,} to do")
    began = time.monotonic()
    flight = begin_flight(artefact, remaining, recorded, generator.micro_batch, runtime)
    accepted = generate_files(folder, generator, judge, store, flight, seed, runtime.rank)
    spent = generator.evaluations / max(1, accepted)
    runtime.wait()
    runtime.first(lambda: finish_set(artefact, generator, store, source, seed))
    records = read_records(folder)
    count = sum(record["accepted"] for record in records)
    say(
        f"{artefact.name}: {count:,} of {len(records):,} accepted, {spent:,.0f} UNet evaluations "
        f"each, {time.monotonic() - began:.0f} s"
    )


def flight_paths(artefact: Artefact, runtime: Runtime) -> list[Path]:
    """Where each process keeps what is on its way in it."""
    return [artefact.work / f"flight-{rank}-of-{runtime.world}.pt" for rank in range(runtime.world)]


def micro_batch_before(artefact: Artefact, runtime: Runtime) -> int:
    """How many samples passed at once in this process when a run was killed; 0: there was none."""
    with contextlib.suppress(Problem):
        return read_state(flight_paths(artefact, runtime)[runtime.rank]).get("micro_batch", 0)
    return 0


def begin_flight(
    artefact: Artefact, remaining: Sequence[int], recorded: Sequence[int], micro_batch: int,
    runtime: Runtime,
) -> Flight:
    """This process's share of the sources, or what was on its way in it when a run was killed, if
    that had as many processes."""
    paths = flight_paths(artefact, runtime)

    def is_kept() -> bool:
        with contextlib.suppress(Problem):  # none, or a damaged one
            states = [read_state(path) for path in paths]
            under_way = {sample["source"] for state in states for sample in state["samples"]}
            under_way.update(*(state["queue"] for state in states))
            if under_way >= set(remaining):  # else a record was damaged
                return True
        for path in artefact.work.glob("flight-*"):
            path.unlink()
        return False

    share = remaining[runtime.rank :: runtime.world]
    flight = Flight(share, paths[runtime.rank], recorded, micro_batch)
    if runtime.first(is_kept):
        flight.restore(runtime.device)
    else:
        flight.save_if_late()
    runtime.wait()  # all shares are kept before anything is recorded
    return flight


def appoint_judge(settings: Augment, seed: int, ctx: Context, runtime: Runtime) -> Judge:
    """All refitted teachers, and the student whose mistakes are sought."""

    def network(artefact: Artefact) -> Classifier:
        return fold(load_model(ctx.require(artefact), runtime.device, ctx.store))

    teachers = [network(artefact) for artefact in ctx.teachers("dfr")]
    student = network(ctx.student(settings.student, seed))
    return Judge(teachers, student, ctx.store, settings)


def sources_of(
    settings: Augment, seed: int, judge: Judge, ctx: Context, runtime: Runtime
) -> np.ndarray:
    """Places in the store of the images to start from."""
    if settings.like:
        records = read_records(ctx.image_set(settings.like, seed).path.parent)
        return np.array([r["source"] for r in records if r["accepted"]], np.int64)
    train = ctx.store.split("train")
    logits = predict([judge.student], ctx.store, train, runtime)[0]
    return train[pick_sources(settings, logits.softmax(-1), ctx.store.labels[train])]


def generate_files(
    folder: Path, generator: Generator, judge: Judge, store: Store, flight: Flight, seed: int,
    rank: int,
) -> int:
    """Write a PNG and a record for each source, as they come; returns how many were accepted."""
    from torch.utils.tensorboard import SummaryWriter

    accepted = finished = 0
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        board = stack.enter_context(SummaryWriter(folder / "tensorboard" / str(rank)))
        file = stack.enter_context(open(folder / f"records-{rank}.jsonl", "a"))
        total = len(flight.queue) + len(flight.samples)
        bar = stack.enter_context(progress_bar(label=folder.parent.name, total=total))
        if file.tell():
            file.write("\n")  # a kill may have cut the last line

        def log(figures: dict[str, Any]) -> None:
            minutes = (time.monotonic() - began) / 60
            rates = {
                "acceptance": accepted / max(1, finished),
                "unet_evaluations_per_minute": generator.evaluations / minutes,
                "images_per_minute": accepted / minutes,
            }
            for name, value in (figures | rates).items():
                board.add_scalar(f"augment/{name}", value, generator.evaluations)

        for record in generate(generator, judge, store, flight, seed, log):
            bar.update()
            if record["source"] in flight.recorded:
                continue
            content = io.BytesIO()
            Image.fromarray(record.pop("image").transpose(1, 2, 0)).save(content, "png")
            prefix = "" if record["accepted"] else "rejected-"
            record["image"] = f"{prefix}{record['source']}.png"
            write_file(folder / record["image"], content.getvalue())
            record["digest"] = digest(content.getvalue())
            file.write(json.dumps(with_checksum(record)) + "\n")
            file.flush()
            finished += 1
            accepted += record["accepted"]
            bar.set_postfix(accepted=accepted, refresh=False)
    return accepted


def finish_set(
    artefact: Artefact, generator: Generator, store: Store, source: str, seed: int
) -> None:
    """Write the table of accepted images, the sheet, and the note that the set is complete."""
    folder = artefact.path.parent
    records = sorted(read_records(folder), key=lambda record: record["source"])
    accepted = [record for record in records if record["accepted"]]
    if not accepted:
        raise Problem(
            f"{folder}: none of {len(records)} sources gave an image that passes: raise "
            "iterations, step_size or max_student, lower min_teacher, or train the generator "
            "longer."
        )
    columns = [
        "image", "label", "split", "source", "seed", "iterations", "teacher_before",
        "student_before", "teacher", "student", "realism", "generator", "settings",
    ]
    common = {"split": "train", "generator": source, "settings": artefact.fingerprint}
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows({**record, **common} for record in accepted)
    write_file(folder / "metadata.csv", text.getvalue())
    write_file(folder / "sheet.png", draw_sheet(folder, records, generator, store, seed))
    images = [folder / record["image"] for record in accepted]
    artefact.write_note([folder / "metadata.csv", *images])


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Every whole line of records-*.jsonl, of each source the last; a kill may have cut a line, and
    one that its checksum does not fit (older ones have none) counts as little."""
    records: dict[int, dict[str, Any]] = {}
    for path in sorted(folder.glob("records-*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):
                record = dict(json.loads(line))
                checksum = record.pop("checksum", None)
                if checksum in (None, digest(record)):
                    records[record["source"]] = record
    return [*records.values()]


def recorded_sources(folder: Path) -> list[int]:
    """The sources whose images are there as they were recorded; others are made again."""
    sources = []
    for record in read_records(folder):
        path = folder / record["image"]
        if not path.is_file():
            continue
        if record.get("digest") in (None, digest(path.read_bytes())):
            sources.append(record["source"])
    return sources


def calibrate(generator: Generator, store: Store, share: float) -> float:
    """Denoising loss that `share` of validation passes; infinite if under 80 % of a group do."""
    losses: dict[str, np.ndarray] = {}
    val = store.split("val")
    for cell, name in enumerate(store.cell_names):
        members = val[store.cells[val] == cell][:64]
        if len(members):
            labels = upload(store.labels[members], generator.device)
            losses[name] = generator.realism(store.raw(members), labels).cpu().numpy()
    threshold = float(np.quantile(np.concatenate([*losses.values()]), share))
    rates = {name: float((loss <= threshold).mean()) for name, loss in losses.items()}
    passing = ", ".join(f"{name} {100 * rate:.0f} %" for name, rate in rates.items())
    if min(rates.values()) >= 0.8:
        say(f"realism: validation images that pass: {passing}")
        return threshold
    say(
        f"realism: validation images that pass: {passing}; under 80 % in a group, so it is "
        "reported and nothing is rejected"
    )
    return math.inf


def draw_sheet(
    folder: Path, records: Sequence[Mapping[str, Any]], generator: Generator, store: Store,
    seed: int,
) -> bytes:
    """Source, start and result of the best, the median and rejected samples (PNG)."""
    ranked = sorted(records, key=lambda record: -record["score"])
    accepted = [record for record in ranked if record["accepted"]]
    rejected = [record for record in ranked if not record["accepted"]]
    middle = max(3, len(accepted) // 2 - 1)
    chosen = [("best", record) for record in accepted[:3]]
    chosen += [("median", record) for record in accepted[middle : middle + 3]]
    chosen += [("rejected", record) for record in rejected[:3]]
    figure, pyplot = new_figure()
    figure.set_size_inches(1.5 * len(chosen), 5.2)
    axes = figure.subplots(3, len(chosen), squeeze=False)
    for column, (kind, record) in enumerate(chosen):
        key = seed_of(seed, record["source"])
        raw = store.raw(np.array([record["source"]]))
        labels = torch.tensor([record["label"]], device=generator.device)
        with torch.no_grad():
            start = generator.images(generator.begin(raw, key), labels, [key])[0].cpu()
        result = np.asarray(Image.open(folder / record["image"]))
        shown = [raw[0].transpose(1, 2, 0), start.permute(1, 2, 0).float().numpy(), result]
        texts = [
            f"{kind}\n{store.class_names[record['label']]}",
            f"t {record['teacher_before']:.2f}  f {record['student_before']:.2f}",
            f"t {record['teacher']:.2f}  f {record['student']:.2f}",
        ]
        for axis, image, text in zip(axes[:, column], shown, texts, strict=True):
            axis.imshow(image, interpolation="nearest")
            axis.set_title(text, fontsize=8)
            axis.set_xticks([])
            axis.set_yticks([])
    for axis, name in zip(axes[:, 0], ("source", "start", "result"), strict=True):
        axis.set_ylabel(name)
    return png(figure, pyplot)


# ---- Pages ---------------------------------------------------------------------------------------


def write_report(results: Mapping[str, Any], out: Path, suffix: str = "") -> None:
    """Write results.json, report.md, report.html and figures; print the summary."""
    write_file(out / f"results{suffix}.json", json.dumps(results, indent=1) + "\n")
    for name, draw in FIGURES.items():
        if name == "groups" or results.get(name):
            write_file(out / f"{name}{suffix}.png", draw(results))
    text = report(results, suffix)
    write_file(out / f"report{suffix}.md", text)
    write_file(out / f"report{suffix}.html", web_page(text, out))
    say(
        "", terminal_summary(results), "",
        f"All of it: {out}/report{suffix}.html, also report{suffix}.md and results{suffix}.json",
    )


def report(results: Mapping[str, Any], suffix: str = "") -> str:
    """results.json as Markdown, what matters most first; pictures are named as write_report and
    others wrote them."""
    about = results["about"]
    parts = [f"# {about['recipe']}: accuracy by group, {about['split']} images, per cent"]
    if results["choice"].get("ship"):
        parts += ["## Ship this one", choice_text(results)]
    parts += no_choice_texts(results) + headroom_texts(results)
    parts += ["## Accuracy", *accuracy_parts(results), f"![Accuracy by group](groups{suffix}.png)"]
    if results["left_out"]:
        parts += ["## Left out", "\n".join(f"- {line}" for line in results["left_out"])]
    parts += size_parts(results, suffix)
    if results.get("ensembles"):
        parts += ensemble_parts(results)
    if results.get("training"):
        parts += [
            "## Training", "Loss on the training images and WGA on the selection part, by epoch; "
            "mean over models.",
            f"![Training curves](training{suffix}.png)",
        ]
    if results["curves"]:
        parts += ["## Ablations", f"![WGA against settings](curves{suffix}.png)"]
    if results["probes"]:
        parts += [
            "## Linear probes",
            "Group mean, in per cent, of a logistic regression on a layer's mean over positions: "
            "fitted on group-balanced images of validation, scored on others.",
            probe_table(results["probes"]),
        ]
    if results.get("analysis"):
        parts += analysis_parts(results)
    parts += sheet_parts(results)
    parts += mistake_parts(results)
    return "\n\n".join([*parts, *detail_parts(results)]) + "\n"


def accuracy_parts(results: Mapping[str, Any]) -> list[str]:
    """What is shown, and a row per kind of model."""
    split, groups = results["about"]["split"], results["groups"]
    least = min(group["images"] for group in groups if group["images"])
    adjusted = "; adjusted mean: groups weighted by their share of the training images"
    if groups[0]["train_images"] is None:
        adjusted = ""
    parts = [
        "Mean ± sample standard deviation over models. WGA: worst-group accuracy; mean: over "
        f"images; group mean: over groups{adjusted}. One image of the smallest group is "
        f"{100 / least:.3f} points of its accuracy.",
        summary_table(results),
    ]
    if note := inferred_text(results.get("inferred")):
        parts.append(note)
    empty = [
        (f"Groups without {split} images, left out of every figure", "images"),
        ("Groups without training images", "train_images"),
    ]
    for words, key in empty:
        absent = [group["name"] for group in groups if group[key] == 0]
        if absent:
            parts.append(f"{words}: {'; '.join(absent)}.")
    return parts


def detail_parts(results: Mapping[str, Any]) -> list[str]:
    """Sizes of the groups, every model, and where it all comes from."""
    about, groups = results["about"], results["groups"]
    names = [group["name"] for group in groups]
    sizes = [
        [g["name"], *("–" if g[key] is None else str(g[key]) for key in ("images", "train_images"))]
        for g in groups
    ]
    members = [member for row in results["rows"] for member in row["members"]]
    columns = shown_columns(members)
    single = [[member["name"], *score_cells(member, columns)] for member in members]
    student_seeds = ", ".join(map(str, about["seeds"]))
    teacher_seeds = ", ".join(map(str, about["teacher_seeds"]))
    return [
        "## Groups", table(["group", about["split"], "train"], sizes),
        "## Every model", table(["model", *columns.values(), *names], single),
        f"`{about['command']}`, {about['date']}, commit {about['commit']}, {about['hardware']}, "
        f"{about['versions']}; student seeds {student_seeds}, teacher seeds {teacher_seeds}.",
    ]


WIDTH = 100  # of what a terminal is shown


def terminal_summary(results: Mapping[str, Any]) -> str:
    """What a terminal is shown of results.json, at most 100 columns wide."""
    about, names = results["about"], [group["name"] for group in results["groups"]]
    images = sum(group["images"] for group in results["groups"])
    keys = [key for key in ("wga", "wga_inferred", "mean", "group_mean")
            if any(key in member for row in results["rows"] for member in row["members"])]
    header = ["", "models", *({**COLUMNS, **INFERRED_COLUMNS}[key] for key in keys), "worst group"]
    rows = []
    for row in results["rows"]:
        members = row["members"]
        accuracy = group_means(members)
        worst = shorten(names[int(np.nanargmin(accuracy))], 24)
        figures = [mean_cell([member.get(key) for member in members]) for key in keys]
        rows.append([row["name"], str(len(members)), *figures, worst])
    spare = WIDTH - len(table(header, [["", *row[1:]] for row in rows]).partition("\n")[0])
    # `table` writes a bar in a name as two characters.
    rows = [[shorten(row[0], max(8, spare - row[0].count("|"))), *row[1:]] for row in rows]
    texts = [
        f"{about['recipe']}: accuracy of {images:,} {about['split']} images, per cent, mean ± "
        "sample standard deviation over models",
        table(header, rows),
    ]
    if results["choice"].get("ship"):
        chosen = choice_text(results).replace("**", "").replace("\n\n", " ")
        texts.append(f"Ship this one: {chosen}")
    texts += no_choice_texts(results) + headroom_texts(results)
    if left_out := results["left_out"]:
        texts.append(f"Left out: {len(left_out)} models, as the report says, such as {left_out[0]}")
    return "\n\n".join(
        text if text.startswith("|") else textwrap.fill(text, WIDTH) for text in texts
    )


def group_means(members: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Accuracy of every group, mean over models; NaN for groups without images."""
    accuracy = [[np.nan if a is None else a for a in member["groups"]] for member in members]
    return np.mean(accuracy, 0)


INFERRED = {
    "inferred": "its class and whether the biased model is right",
    "eiil": "its class and EIIL's split of the biased model's logits",
}


def inferred_text(inferred: Mapping[str, str] | None) -> str:
    """What inferred groups are, or why there are none; empty where nobody asks for them."""
    if not inferred or not inferred["groups"]:
        return ""
    if inferred["note"]:
        return f"No figure by inferred groups: {inferred['note']}."
    return (
        f"WGA (inferred): no attribute is used; an image's group is {INFERRED[inferred['groups']]}."
    )


def size_parts(results: Mapping[str, Any], suffix: str) -> list[str]:
    """How large and how fast each kind of model is, beside its worst group."""
    if not results.get("sizes"):
        return []
    header = ["", "architecture", "parameters", "MFLOP an image", "ms an image", "WGA"]
    rows = [
        [
            row["name"], row["arch"], f"{row['parameters']:,}", f"{row['mflop']:,.1f}",
            f"{row['ms']:.3f}", mean_cell(wga_of(row["models"], results)),
        ]
        for row in results["sizes"]["rows"]
    ]
    sizes = results["sizes"]
    return [
        "## Sizes",
        f"Forward passes of {sizes['batch']} images of {sizes['side']} pixels at a time, "
        f"{sizes['device']}.",
        table(header, rows),
        f"![WGA against parameters](sizes{suffix}.png)",
    ]


def wga_of(models: Iterable[str], results: Mapping[str, Any]) -> list[float]:
    """WGA of models by name."""
    every = {member["name"]: member["wga"] for row in results["rows"] for member in row["members"]}
    return [every[name] for name in models]


def sheet_parts(results: Mapping[str, Any]) -> list[str]:
    """The generated images."""
    parts = ["## Generated images"] if results.get("sheets") else []
    for sheet in results.get("sheets", []):
        parts += [f"{sheet['name']}:", f"![Images of {sheet['name']}]({sheet['file']})"]
    return parts


def mistake_parts(results: Mapping[str, Any]) -> list[str]:
    """Where two students look in images which one of them gets wrong."""
    found = results.get("mistakes")
    if not found:
        return []
    split, (plain, *others) = results["about"]["split"], found["students"]
    text = (
        f"The {split} images of every group that {plain} is surest about and gets wrong, and what "
        "speaks for each student's answer: class activation maps (Zhou et al. 2016), the head's "
        "weights, less their mean over classes, times the last feature map."
    )
    if others:
        text += f" Right of them the same images by {others[0]}."
    for name in found["without_map"]:
        text += f" {name} has none: its head does not read a mean over positions."
    return ["## Where it looks", text, "![Mistakes](mistakes.png)"]


def choice_text(results: Mapping[str, Any]) -> str:
    """Which student to ship, why, and the next one."""
    choice, split = results["choice"], results["about"]["split"]
    members = {row["name"]: row["members"] for row in results["rows"]}

    def figures(name: str) -> str:
        mean, std = choice["wga"][name]
        selected = f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f}"
        scored = mean_cell([member["wga"] for member in members[name]])
        average = mean_cell([member["mean"] for member in members[name]])
        return f"selection WGA {selected}; {split}: WGA {scored}, mean {average}"

    groups = {
        "known": "",
        "classes": " over classes (there is neither an attribute nor an inferred group)",
        **{key: f" over inferred groups ({words})" for key, words in INFERRED.items()},
    }
    ship, runner_up = choice["ship"], choice["runner_up"]
    seeds = [seed.removeprefix("seed") for seed in choice["seeds"]]
    of_seeds = f"paired over seeds {', '.join(seeds)}" if len(seeds) > 1 else f"seed {seeds[0]}"
    text = (
        f"**{ship}** ({figures(ship)}). Runner-up: {runner_up} ({figures(runner_up)}).\n\n"
        f"Chosen by worst-group accuracy{groups[choice.get('by', 'known')]} on the selection part, "
        f"{choice['images']} validation images that refitted no head, {of_seeds}; never on "
        "test."
    )
    if len(choice["tied"]) > 1:
        text += f" {tie_text(choice)}"
    if choice["left_out"]:
        text += f" Not compared, since they lack some seed: {', '.join(choice['left_out'])}."
    return text


def tie_text(choice: Mapping[str, Any]) -> str:
    """Which students are tied with the best, and what decided between them."""
    ship, networks = choice["ship"], choice["networks"]
    others = [name for name in choice["tied"] if name != ship]
    margin = "standard error" if len(choice["seeds"]) > 1 else "image of the smallest group"
    text = f"No more than one {margin} below the best: {', '.join([ship, *others])}; "
    fewest, dearest = networks[ship], max(others, key=lambda name: networks[name])
    alike = [name for name in others if networks[name] == fewest]
    if len(alike) == len(others):
        return f"{text}each needs as many networks before it ({fewest}), and it has the best mean."
    text += f"of these it needs the fewest networks before it ({fewest}; {dearest}: "
    text += f"{networks[dearest]})"
    if alike:
        text += f", as many as {', '.join(alike)}, and the best mean of those"
    return f"{text}."


def no_choice_texts(results: Mapping[str, Any]) -> list[str]:
    """Why none of several students is recommended, if that is so."""
    why = results["choice"].get("why_none")
    return [f"No student is recommended: {why}."] if why else []


def headroom_texts(results: Mapping[str, Any]) -> list[str]:
    """What averaging the teachers loses, of every ensemble of which that is known."""
    texts = []
    for ensemble in results.get("ensembles", []):
        if room := ensemble.get("headroom"):
            difference = room["teachers"] - room["average"]
            loss = f"loses {difference:.1f} points" if difference > 0 else "loses nothing"
            texts.append(
                f"Headroom: the teachers' WGA, by the weights of departure, is "
                f"{room['teachers']:.1f}, that of {room['student']} {room['average']:.1f}: "
                f"averaging them {loss}."
            )
    return texts


def ensemble_parts(results: Mapping[str, Any]) -> list[str]:
    """The teachers of every ensemble."""
    parts = [
        "## Teachers",
        "Departure: mean squared distance of a teacher's answers from the biased model's, over "
        "the training images, and over those of which the two disagree; weight: the share that "
        "the weighting `departure` gives.",
    ]
    for ensemble in results["ensembles"]:
        parts.append(f"Of {', '.join(ensemble['students'])}:")
        parts.append(departure_table(ensemble["teachers"]))
    return parts


def analysis_parts(results: Mapping[str, Any]) -> list[str]:
    """What Eval.analysis found, as Markdown."""
    split = results["about"]["split"]
    names = [group["name"] for group in results["groups"]]
    parts = [
        "## Students taken apart",
        f"Cross-entropy in nats: to the teachers' mean answer on train (R_KD), to labels on train "
        f"(R*) and on {split} (R). Ω = R − R*, the gap to images not trained on; Ψ = R* − R_KD, "
        "what the teachers' answers differ from labels; Ω by group: the gap of that group alone.",
        error_table(results["analysis"], names),
    ]
    taught = [row for row in results["analysis"] if "weights" in row["members"][0]]
    if taught:
        parts += [
            f"Agreement with the teachers' mean answer, per cent of {split} images:",
            agreement_table(taught, names),
            "Mean weight of each teacher for the finished student, by group, and the images, in "
            "per cent, of which no teacher has any:",
            weight_table(taught, names),
        ]
    if any(row["members"][0]["features"] for row in results["analysis"]):
        parts += [
            "Pooled dimensions that tell a group from the others of its class (first seed): "
            "symmetrised KL divergence of their histograms, their means in the group and "
            "elsewhere in the class, and their weight in the head for the class, less that for "
            f"others. The images that excite them most: {feature_sheet('STUDENT')}.",
            feature_table(results["analysis"]),
        ]
    return parts


def summary_table(results: Mapping[str, Any]) -> str:
    """The table of results.json: a row per kind of model, mean ± std over its members."""
    baseline = results["about"].get("baseline")
    against = {}
    for row in results["rows"]:
        if row["name"] == baseline:
            against = wga_by_seed(row)
    published = {key for row in results["rows"] for key in row["published"]}
    published_columns = [key for key in COLUMNS if key in published]
    names = [group["name"] for group in results["groups"]]
    columns = shown_columns(member for row in results["rows"] for member in row["members"])
    header = ["", "models", *columns.values(), *names]
    if against:
        header.append(f"WGA − {baseline}'s")
    header += [f"published {COLUMNS[key]}" for key in published_columns]
    lines = []
    for row in results["rows"]:
        members = row["members"]
        line = [row["name"], str(len(members))]
        line += [mean_cell([member.get(key) for member in members]) for key in columns]
        line += [mean_cell([m["groups"][g] for m in members]) for g in range(len(names))]
        if against:
            paired = [wga - against[s] for s, wga in wga_by_seed(row).items() if s in against]
            line.append(mean_cell(paired))
        line += [published_cell(row["published"], key) for key in published_columns]
        lines.append(line)
    return table(header, lines)


def wga_by_seed(row: Mapping[str, Any]) -> dict[str, float]:
    """WGA of a row's students by seed: seed0 -> 90.0."""
    return {Path(member["name"]).parent.name: member["wga"] for member in row["members"]}


def mean_cell(values: Sequence[float | None]) -> str:
    """Mean ± std of the values that are there, for a table."""
    present = [value for value in values if value is not None]
    if not present:
        return "–"
    mean, std = spread(present)
    return f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f}"


def published_cell(figures: Mapping[str, float], key: str) -> str:
    """A published figure, with its deviation if that is published too."""
    if key not in figures:
        return "–"
    std = figures.get(f"{key}_std")
    return f"{figures[key]:g}" + (f" ± {std:g}" if std else "")


def number_cell(values: Sequence[float | None]) -> str:
    """Mean of the values that are there, to three places."""
    present = [value for value in values if value is not None]
    return f"{np.mean(present):.3f}" if present else "–"


def error_table(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """A line a student: its error taken apart."""
    keys = ("risk_kd", "risk_train", "risk_scored", "omega", "psi")
    lines = []
    for row in rows:
        errors = [member["error"] for member in row["members"]]
        cells = [number_cell([each[key] for each in errors]) for key in keys]
        cells += [number_cell([e["group_gaps"][g] for e in errors]) for g in range(len(names))]
        lines.append([row["name"], *cells])
    header = ["", "R_KD", "R*", "R", "Ω", "Ψ", *(f"Ω, {name}" for name in names)]
    return table(header, lines)


def agreement_table(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """A line a student: agreement with its teachers, over all images and by group."""
    lines = []
    for row in rows:
        members = row["members"]
        cells = [mean_cell([member["agreement"] for member in members])]
        for g in range(len(names)):
            cells.append(mean_cell([member["agreement_groups"][g] for member in members]))
        lines.append([row["name"], *cells])
    return table(["", "all", *names], lines)


def weight_table(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """A line for each teacher of each student, and for images without a weight."""
    lines = []
    for row in rows:
        members, groups = row["members"], range(len(names))
        for t, teacher in enumerate(members[0]["teachers"]):
            cells = [number_cell([m["weights"][t][g] for m in members]) for g in groups]
            lines.append([f"{row['name']}: {teacher}", *cells])
        cells = [mean_cell([m["zero_weight"][g] for m in members]) for g in groups]
        lines.append([f"{row['name']}: no weight, %", *cells])
    return table(["", *names], lines)


def feature_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each dimension that tells a group from others, by student."""
    lines = []
    for row in rows:
        for found in row["members"][0]["features"]:
            keys = ("divergence", "mean", "mean_elsewhere", "weight")
            figures = [f"{found[key]:.3f}" for key in keys]
            lines.append([row["name"], found["group"], str(found["dimension"]), *figures])
    header = ["", "group", "dimension", "divergence", "mean", "elsewhere", "head weight"]
    return table(header, lines)


def probe_table(probes: Sequence[Mapping[str, Any]]) -> str:
    """A row per kind of model, a column per layer and target."""
    header = sorted({name for row in probes for name in row["scores"]})
    lines = []
    for row in probes:
        values = [row["scores"].get(name) for name in header]
        cells = ["–" if value is None else f"{value:.1f}" for value in values]
        lines.append([row["name"], *cells])
    return table(["", *header], lines)


def feature_sheet(student: str) -> str:
    """File name of a student's sheet."""
    return f"features-{student}.png"


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff;
       max-width: 68rem; margin: 0 auto; padding: 1rem; overflow-wrap: break-word }}
h1 {{ font-size: 1.5rem }}  h2 {{ font-size: 1.2rem; margin-top: 2rem }}
img {{ max-width: 100%; height: auto }}
.table {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums }}
th, td {{ padding: .2rem .5rem; border-bottom: 1px solid #ddd; white-space: nowrap }}
th:first-child, td:first-child {{ position: sticky; left: 0; background: #fff }}
th {{ border-bottom: 2px solid #888; vertical-align: bottom }}
@media print {{ body {{ max-width: none; font-size: 10pt }}  table {{ font-size: 6.5pt }}
  th, td {{ white-space: normal; padding: .1rem .25rem }}  img, tr {{ break-inside: avoid }}
  h2, h2 + p {{ break-after: avoid }} }}
</style></head><body>
{body}
</body></html>
"""


def web_page(text: str, folder: Path) -> str:
    """A report in Markdown as one HTML file, its pictures, which stand in `folder`, inside.

    Names come from data: HTML in them stays text, and the page may load and run nothing.
    """
    from markdown import Markdown

    converter = Markdown(extensions=["tables"])
    converter.preprocessors.deregister("html_block")
    converter.inlinePatterns.deregister("html")
    body = converter.convert(text)
    body = body.replace("<table>", '<div class="table"><table>')
    body = body.replace("</table>", "</table></div>")

    def inside(match: re.Match[str]) -> str:
        path = (folder / html.unescape(match[1])).resolve()
        if path.suffix != ".png" or folder.resolve() not in path.parents or not path.is_file():
            return 'src=""'
        return f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"'

    body = re.sub(r'src="([^"]*)"', inside, body)
    title = html.escape(text.partition("\n")[0].removeprefix("# "))
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return PAGE.format(policy=policy, title=title, body=body)


# Figures are told apart without colour, too.
MARKERS = "osD^vP*Xph"
LINES = ("-", "--", "-.", ":")


def legend_columns(names: Sequence[str], inches: float) -> int:
    """How many columns of a legend of these names fit beside each other."""
    longest = max(map(len, names), default=1)
    return max(1, min(3, len(names), int(inches / (0.075 * longest + 0.5))))


def draw_groups(results: Mapping[str, Any]) -> bytes:
    """Figure of results.json (PNG): accuracy of every group, and the worst marked, by row."""
    figure, pyplot = new_figure()
    rows = results["rows"]
    names = [shorten(group["name"], 60) for group in results["groups"]]
    listed = len(names) <= len(MARKERS)
    columns = legend_columns(names, 7)
    legend_lines = math.ceil((len(names) + 1) / columns) if listed else 1
    figure.set_size_inches(8, 1.0 + 0.2 * legend_lines + 0.36 * len(rows))
    axes = figure.subplots()
    colours = pyplot.get_cmap("tab10" if listed else "viridis", max(len(names), 10))
    places = np.arange(len(rows))
    wga = [spread([member["wga"] for member in row["members"]]) for row in rows]
    axes.barh(
        places, [mean for mean, _ in wga], xerr=[std or 0 for _, std in wga], height=0.62,
        color="0.85", error_kw={"ecolor": "0.45", "capsize": 3}, label="worst group (mean ± std)",
    )
    accuracy = np.stack([group_means(row["members"]) for row in rows])
    for g, name in enumerate(names):
        spots = places + 0.4 * ((g + 0.5) / len(names) - 0.5)  # none hides another
        axes.scatter(
            accuracy[:, g], spots, s=28, color=colours(g), zorder=3,
            marker=MARKERS[g % len(MARKERS)] if listed else "|", label=name if listed else None,
        )
    axes.set_yticks(places, [shorten(row["name"], 48) for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 101)
    axes.set_xlabel(f"accuracy, % of {results['about']['split']} images of the group")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=columns, frameon=False, fontsize=9)
    return png(figure, pyplot)


def draw_curves(results: Mapping[str, Any]) -> bytes:
    """Figure of results.json (PNG): WGA against each setting that students differ in."""
    figure, pyplot = new_figure()
    members = {row["name"]: row["members"] for row in results["rows"]}
    names = list(dict.fromkeys(curve["field"] for curve in results["curves"]))
    of_name = {name: [c for c in results["curves"] if c["field"] == name] for name in names}
    columns = min(3, len(names))
    lines = math.ceil(len(names) / columns)
    legend_lines = max(map(len, of_name.values()))
    figure.set_size_inches(max(5.0, 3.8 * columns), (2.8 + 0.2 * legend_lines) * lines)
    axes = figure.subplots(lines, columns, sharey=True, squeeze=False).flatten()
    for axis in axes[len(names) :]:
        axis.remove()
    for axis, name in zip(axes, names, strict=False):
        for i, curve in enumerate(of_name[name]):
            points = [
                (x, *spread([member["wga"] for member in members[student]]))
                for x, student in curve["points"]
                if student in members
            ]
            if points:
                x, mean, std = zip(*points, strict=True)
                axis.errorbar(
                    x, mean, [each or 0 for each in std], capsize=3, label=wrap(curve["label"], 44),
                    marker=MARKERS[i % len(MARKERS)], linestyle=LINES[i % len(LINES)],
                )
        axis.set_xlabel(name)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(
            loc="upper left", bbox_to_anchor=(0, -0.2), frameon=False, fontsize=8,
        )
    figure.supylabel(f"WGA, % of {results['about']['split']} images (mean ± std)", fontsize=10)
    return png(figure, pyplot)


def draw_training(results: Mapping[str, Any]) -> bytes:
    """Figure of results.json (PNG): loss and WGA by epoch, a line for each kind of model."""
    figure, pyplot = new_figure()
    rows = [row | {"name": shorten(row["name"], 40)} for row in results["training"]]
    columns = legend_columns([row["name"] for row in rows], 9)
    figure.set_size_inches(10, 3.6 + 0.2 * math.ceil(len(rows) / columns))
    loss, wga = figure.subplots(1, 2)
    for i, row in enumerate(rows):
        style = {
            "color": f"C{i % 10}", "linestyle": LINES[i // 3 % len(LINES)],
            "marker": MARKERS[i % len(MARKERS)], "markevery": 0.1, "markersize": 4,
        }
        epochs = np.arange(1, len(row["loss"]) + 1)
        loss.plot(epochs, row["loss"], label=row["name"], **style)
        wga.plot(epochs, row["wga"], **style)
    loss.set_yscale("log")
    loss.set_ylabel("training loss")
    wga.set_ylabel("WGA, % of the selection part")
    for axis in (loss, wga):
        axis.set_xlabel("epoch")
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    return png(figure, pyplot)


def draw_sizes(results: Mapping[str, Any]) -> bytes:
    """Figure of results.json (PNG): WGA against parameters, a sign for each architecture."""
    figure, pyplot = new_figure()
    by_arch: dict[str, list[Mapping[str, Any]]] = {}
    for row in results["sizes"]["rows"]:
        by_arch.setdefault(shorten(row["arch"], 40), []).append(row)
    columns = legend_columns([*by_arch], 5)
    figure.set_size_inches(6, 3.2 + 0.2 * math.ceil(len(by_arch) / columns))
    axes = figure.subplots()
    for i, (arch, rows) in enumerate(by_arch.items()):
        axes.scatter(
            [row["parameters"] for row in rows],
            [np.mean(wga_of(row["models"], results)) for row in rows],
            label=arch, marker=MARKERS[i % len(MARKERS)], alpha=0.7,
        )
    axes.set_xscale("log")
    axes.set_xlabel("parameters")
    axes.set_ylabel(f"WGA, % of {results['about']['split']} images")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=columns, frameon=False, fontsize=8)
    return png(figure, pyplot)


FIGURES = {
    "groups": draw_groups, "sizes": draw_sizes, "training": draw_training, "curves": draw_curves,
}


def wrap(text: str, width: int) -> str:
    """A text in lines of a width, no word longer than it."""
    return "\n".join(textwrap.wrap(text, width)) or text


def shorten(name: str, length: int) -> str:
    """A name cut in the middle if it is too long."""
    if len(name) <= length:
        return name
    half = (length - 3) // 2
    return f"{name[:half]} … {name[-half:]}"


# ---- Report --------------------------------------------------------------------------------------


class Scored(NamedTuple):
    """A model to be scored: the row of the report it belongs to, its own name, its file."""

    row: str
    name: str
    path: Path


def find_models(ctx: Context) -> tuple[list[Scored], list[str]]:
    """Every model of the run directory that stands as it should, and the others.

    Students made with flags are not in the recipe: they count if their data and all they were made
    from are as they are now.
    """
    expected = [("teachers, ERM", artefact) for artefact in ctx.teachers("erm")]
    refitted = refit_name(ctx.recipe.teachers.dfr, ctx.store)
    expected += [(f"teachers, {refitted}", each) for each in ctx.teachers("dfr")]
    expected.append(("biased model", ctx.bias()))
    for name, seeds in seeds_found(ctx).items():
        for seed in sorted(seeds):
            expected.append((name, ctx.described(f"students/{name}/seed{seed}/model")))
    models, left_out = [], []
    for row, artefact in expected:
        standing = artefact.standing()
        if standing.state == State.FINISHED:
            models.append(Scored(row, artefact.name, artefact.path))
        else:
            left_out.append(str(standing))
    return models, left_out


def seeds_found(ctx: Context) -> dict[str, set[int]]:
    """Students of the recipe with its seeds, then others on disk, with the seeds found there."""
    seeds = {name: set(ctx.recipe.seeds) for name in ctx.recipe.students}
    others: dict[str, set[int]] = {}
    for path in sorted((ctx.out / "students").glob("*/seed*/model.safetensors")):
        name, number = path.parent.parent.name, path.parent.name.removeprefix("seed")
        if number.isdecimal():
            where = seeds if name in seeds else others
            where.setdefault(name, set()).add(int(number))
    return seeds | others


def run_eval(ctx: Context, paths: Sequence[Path] = ()) -> None:
    """Score every model found, or those named, by group; write results.json, report.md, figure."""
    models, left_out = [Scored(str(path), str(path), path) for path in paths], list[str]()
    if not paths:
        models, left_out = ctx.runtime.together().first(lambda: find_models(ctx))
    if not models:
        raise Problem(
            f"{ctx.out} holds no model of this recipe: train them with `python grokd.py run "
            f"{ctx.name}`. Left out: {'; '.join(left_out[:3])} ..."
        )
    by_trunk = trunks_of(models)
    split: str = ctx.recipe.eval.split
    logits = {split: logits_of(by_trunk, ctx, split)}
    rows = score_rows(models, logits[split], ctx)
    inferred = inferred_parts(ctx)
    if "selection" in {*inferred.cells} - {*logits}:
        logits["selection"] = logits_of(by_trunk, ctx, "selection")
    add_inferred(rows, logits, inferred, ctx)
    ensembles = [] if paths else describe_ensembles(ctx)
    for ensemble in ensembles:
        ensemble["headroom"] = headroom(ensemble, rows, ctx)
    results = describe_run(ctx) | {
        "rows": [
            {"name": name, "published": ctx.recipe.published.get(name, {}), "members": members}
            for name, members in rows.items()
        ],
        "left_out": left_out,
        "inferred": {"groups": inferred.groups, "note": inferred.note},
        "ensembles": ensembles,
        "choice": {} if paths else choose_student(models, inferred, ctx),
        "curves": curves(ctx.recipe),
        "probes": [],
        "analysis": [],
    }
    if ctx.recipe.eval.analysis and not paths:
        results["analysis"] = analyse(models, ctx)
    if ctx.runtime.accelerator.is_main_process:
        if ctx.recipe.eval.probes:
            results["probes"] = probe_models(ctx, by_trunk)
        results["sizes"] = describe_sizes(models, ctx)
        results["training"] = training_curves(models, results["choice"])
        if not paths:
            results["sheets"] = find_sheets(ctx)
            results["mistakes"] = show_mistakes(models, logits[split], results["choice"], ctx)
        write_report(results, ctx.out, "-models" if paths else "")
    ctx.runtime.accelerator.wait_for_everyone()


def trunks_of(models: Iterable[Scored]) -> dict[str, list[Scored]]:
    """Models by trunk: versions of a network with other heads run together."""
    by_trunk: dict[str, list[Scored]] = {}
    for model in models:
        trunk = read_metadata(model.path).get("trunk", str(model.path))
        by_trunk.setdefault(trunk, []).append(model)
    return by_trunk


def logits_of(
    by_trunk: Mapping[str, Sequence[Scored]], ctx: Context, split: str
) -> dict[Scored, Tensor]:
    """Logits [N, C] of every model for the images of a split."""
    runtime, store = ctx.runtime.together(), ctx.store
    indices = store.split(split)
    logits: dict[Scored, Tensor] = {}
    for members in progress_bar([*by_trunk.values()], "eval"):
        loaded = [load_model(model.path, runtime.device, store) for model in members]
        logits |= zip(members, predict(loaded, store, indices, runtime), strict=True)
    return logits


def score_rows(
    models: Sequence[Scored], logits: Mapping[Scored, Tensor], ctx: Context
) -> dict[str, list[dict[str, Any]]]:
    """Scores of every model by row of the report, with a row for each vote of models."""
    store = ctx.store
    indices = store.split(ctx.recipe.eval.split)
    labels, groups = store.labels[indices], store.groups[indices]

    def scores(name: str, predicted: np.ndarray) -> dict[str, Any]:
        correct = predicted == labels
        return {"name": name} | group_scores(correct, groups, store.counts("train"))

    refitted = refit_name(ctx.recipe.teachers.dfr, store)
    votes = {f"teachers, {refitted}": f"teachers' vote, {refitted}"}
    for name, student in ctx.recipe.students.items():
        if not student.has_teachers:
            votes[name] = f"deep ensemble of {name}"
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in dict.fromkeys(model.row for model in models):
        members = [model for model in models if model.row == row]
        rows[row] = [scores(model.name, logits[model].argmax(-1).numpy()) for model in members]
        if row in votes and len(members) > 1:
            vote = majority_vote(torch.stack([logits[model] for model in members]))
            rows[votes[row]] = [scores(votes[row], vote)]
    return rows


class Inferred(NamedTuple):
    """Groups of evaluation images that the biased model tells apart."""

    groups: str  # how they are inferred; empty: they are not
    cells: Mapping[str, np.ndarray]  # cells by part of the data: selection, and what is scored
    note: str = ""  # why there are none


def inferred_parts(ctx: Context) -> Inferred:
    """The inferred groups that scores are given by: as heads use them, or where attributes are
    unknown. All processes take part."""
    recipe, store = ctx.recipe, ctx.store
    settings = [recipe.teachers.dfr]
    settings += [student.dfr for student in recipe.students.values() if student.head == "dfr"]
    used = [dfr.groups for dfr in settings if dfr.infers_groups]
    if not used and store.num_attributes > 1:
        return Inferred("", {})
    groups = used[0] if used else "inferred"
    if not all_finished(ctx.biased(), ctx):
        return Inferred(groups, {}, "the biased model is not there")
    cells: dict[str, np.ndarray] = {}
    for part in dict.fromkeys((recipe.eval.split, "selection")):
        if len(store.split(part)):
            cells[part] = infer_groups(groups, part, ctx, ctx.runtime.together())
            if small := small_cells(cells[part], store.class_names):
                note = f"the smaller inferred group of a class has few images of {part}: {small}"
                return Inferred(groups, {}, note)
    return Inferred(groups, cells)


def add_inferred(
    rows: Mapping[str, Sequence[dict[str, Any]]],
    logits: Mapping[str, Mapping[Scored, Tensor]], inferred: Inferred, ctx: Context,
) -> None:
    """Give every model its worst-group accuracy over inferred groups."""
    members = {member["name"]: member for each in rows.values() for member in each}
    for part, cells in inferred.cells.items():
        key = "wga_inferred" if part == ctx.recipe.eval.split else "selection_wga_inferred"
        labels = ctx.store.labels[ctx.store.split(part)]
        for model, answers in logits[part].items():
            correct = answers.argmax(-1).numpy() == labels
            members[model.name][key] = 100 * worst_group(correct, cells)


def headroom(
    ensemble: Mapping[str, Any], rows: Mapping[str, Sequence[Mapping[str, Any]]], ctx: Context
) -> dict[str, Any]:
    """What averaging loses: WGA of the teachers that depart, and of AVER's student (ours).

    The teachers' is the mean by the weights of `departure`, so that biased ones do not count.
    Empty if no student of it is plain AVER, or if groups are classes, for want of an attribute.
    """
    if ctx.store.num_attributes == 1:
        return {}
    weights = [teacher["weight"] for teacher in ensemble["teachers"]]
    wga = {member["name"]: member["wga"] for members in rows.values() for member in members}
    teachers = [wga.get(teacher["name"]) for teacher in ensemble["teachers"]]
    for name in ensemble["students"]:
        student = ctx.students[name]
        plain_average = replace(
            student, weighting="average", loss="kd", sample_weights="none", gamma=(0.0,), head="own"
        )
        students = [member["wga"] for member in rows.get(name, [])]
        present = [each for each in teachers if each is not None]
        if student == plain_average and students and len(present) == len(teachers):
            weighted = float(np.average(present, weights=weights))
            return {"student": name, "teachers": weighted, "average": float(np.mean(students))}
    return {}


def choose_student(
    models: Sequence[Scored], inferred: Inferred, ctx: Context
) -> dict[str, Any]:
    """The student to ship and the runner-up, by worst-group accuracy on the selection part, the
    validation images that refitted no head, of students that have all seeds of the run. Otherwise
    `why_none` alone; empty with less than two students.

    Without attributes groups are the inferred ones, or classes where there are none of these.
    """
    students, left_out = students_of_all_seeds(models, ctx)
    rows = {model.row for model in students}
    if len(rows) + len(left_out) < 2:
        return {}
    num_images = len(ctx.store.split("selection"))
    if not num_images:
        return {"why_none": "no validation image is left that refitted no head (Data.reweighting)"}
    if len(rows) < 2:
        seeds, others = ", ".join(map(str, ctx.recipe.seeds)), ", ".join(left_out)
        why = f"fewer than two have all seeds of the run ({seeds}); some are lacking of {others}"
        return {"why_none": why}
    groups, by = selection_groups(inferred, ctx)
    wga = selection_wga(students, groups, ctx)
    costs = {model.row: len(networks_behind(ctx.described(model.name))) for model in students}
    sizes = np.bincount(groups)
    chosen = rank_students(wga, costs, 100 / sizes[sizes > 0].min())
    return {**chosen, "left_out": left_out, "images": num_images, "by": by}


def students_of_all_seeds(
    models: Sequence[Scored], ctx: Context
) -> tuple[list[Scored], list[str]]:
    """The students that have all seeds of the run, with these alone, and the names of the others.

    Those on disk with other seeds would leave fewer, or none, over which to pair the rest.
    """
    folders = {f"seed{seed}" for seed in ctx.recipe.seeds}
    by_row: dict[str, list[Scored]] = {}
    for model in models:
        if model.name.startswith("students/"):
            of_row = by_row.setdefault(model.row, [])
            if model.path.parent.name in folders:
                of_row.append(model)
    left_out = [row for row, of_row in by_row.items() if len(of_row) < len(folders)]
    students = [
        model for row, of_row in by_row.items() if row not in left_out for model in of_row
    ]
    return students, left_out


def selection_groups(inferred: Inferred, ctx: Context) -> tuple[np.ndarray, str]:
    """Groups [N] of the selection part by which students are chosen, and of what kind they are."""
    groups = ctx.store.groups[ctx.store.split("selection")]
    if ctx.store.num_attributes > 1:
        return groups, "known"
    by = inferred.groups if inferred.cells else "classes"
    return inferred.cells.get("selection", groups), by


def selection_wga(
    students: Sequence[Scored], groups: np.ndarray, ctx: Context
) -> dict[str, dict[str, float]]:
    """WGA of students on the selection part, in per cent: row -> seed0 -> 90.0."""
    logits = logits_of(trunks_of(students), ctx, "selection")
    labels = ctx.store.labels[ctx.store.split("selection")]
    wga: dict[str, dict[str, float]] = {}
    for model in students:
        correct = logits[model].argmax(-1).numpy() == labels
        seed = model.path.parent.name
        wga.setdefault(model.row, {})[seed] = 100 * worst_group(correct, groups)
    return wga


def networks_behind(artefact: Artefact) -> set[str]:
    """The networks that had to be trained before an artefact: sets of images are none, nor are
    refitted heads, copies, and what was given finished."""
    names: set[str] = set()
    for parent in artefact.parents.values():
        is_set = parent.name.startswith("augmented/")
        is_refitted = parent.name.endswith("/dfr")
        is_copy = parent.name.startswith("bias-model/") and parent.parents
        if not (is_set or is_refitted or is_copy) and parent.settings["epochs"]:
            names.add(parent.name)
        names |= networks_behind(parent)
    return names


def rank_students(
    wga: Mapping[str, Mapping[str, float]], costs: Mapping[str, int], one_image: float
) -> dict[str, Any]:
    """The student to ship and the next one, of WGA by student and seed, in per cent (ours).

    The best mean over the seeds, which all have; students whose paired difference to it is within
    one standard error are tied with it (with one seed: within `one_image` of the smallest group),
    and the one that needs the fewest networks is taken.
    """
    seeds = [*next(iter(wga.values()))]
    means = {name: float(np.mean([values[s] for s in seeds])) for name, values in wga.items()}

    def is_tied(best: str, other: str) -> bool:
        differences = [wga[best][s] - wga[other][s] for s in seeds]
        error = one_image
        if len(seeds) > 1:
            error = float(np.std(differences, ddof=1)) / math.sqrt(len(seeds))
        return float(np.mean(differences)) <= error

    def first(names: Sequence[str]) -> tuple[str, list[str]]:
        best = max(names, key=lambda name: means[name])
        tied = [name for name in names if is_tied(best, name)]
        return min(tied, key=lambda name: (costs[name], -means[name])), tied

    ship, tied = first([*wga])
    runner_up, _ = first([name for name in wga if name != ship])
    return {
        "ship": ship, "runner_up": runner_up, "tied": tied, "seeds": seeds, "networks": costs,
        "wga": {name: spread([wga[name][s] for s in seeds]) for name in wga},
    }


def describe_run(ctx: Context) -> dict[str, Any]:
    """What results.json says of a run and its groups."""
    recipe, store = ctx.recipe, ctx.store
    count = recipe.teachers.num_teachers
    about: dict[str, Any] = {
        "recipe": ctx.name,
        "split": recipe.eval.split,
        "seeds": recipe.seeds,
        "baseline": recipe.eval.baseline,
        "teacher_seeds": [recipe.teachers.of(i).seed for i in range(count)],
    }
    sizes = zip(
        store.group_names, store.counts(recipe.eval.split), store.counts("train"), strict=True
    )
    groups = [
        {
            "name": name,
            "images": int(scored),
            "train_images": None if store.num_unknown else int(trained),
        }
        for name, scored, trained in sizes
    ]
    made = origin(ctx.runtime.accelerator.num_processes, ctx.runtime.device.type)
    return {"about": made | about, "groups": groups}


def probe_models(ctx: Context, by_trunk: Mapping[str, Sequence[Scored]]) -> list[dict[str, Any]]:
    """Accuracy in per cent of linear probes on every layer, for label and attribute, mean over the
    trunks of each kind of model. Features are meaned over positions, fits group-balanced."""
    store, scores = ctx.store, dict[str, dict[str, list[float]]]()
    for members in progress_bar([*by_trunk.values()], "probes"):
        row = scores.setdefault(members[0].row, {})
        model = load_model(members[0].path, ctx.runtime.device, store)
        fitted, fitted_at = layer_features(model, "reweighting", ctx)
        judged, judged_at = layer_features(model, "selection", ctx)
        for layer in fitted:
            for kind, target in (("label", store.labels), ("attribute", store.attributes)):
                y = target[fitted_at]
                if len(set(y)) > 1:
                    right = probe(fitted[layer], y, judged[layer]) == target[judged_at]
                    row.setdefault(f"{layer}: {kind}", []).append(100 * float(right.mean()))
    return [
        {"name": name, "scores": {key: float(np.mean(values)) for key, values in row.items()}}
        for name, row in scores.items()
    ]


def layer_features(
    model: Classifier, part: str, ctx: Context
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Features [n, d] of every layer, meaned over positions, of a balanced subset of a part; and
    which images these are."""
    store, side = ctx.store, ctx.store.data.crop
    tap = Tap(model, [*layer_paths(model, side)], side)
    indices, rows = store.split(part), []
    for _ in extract({"": model}, store, indices, ctx.runtime):
        rows.append({name: value.mean((2, 3)).cpu().numpy() for name, value in tap.maps.items()})
    kept = balanced_subset(store.cells[indices], 0)
    features = {name: np.concatenate([row[name] for row in rows])[kept] for name in tap.maps}
    return features, indices[kept]


def probe(x: np.ndarray, y: np.ndarray, others: np.ndarray) -> np.ndarray:
    """What a logistic regression fitted on (x, y) says of other features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return model.fit(x, y).predict(others)


SIZE_BATCH, SIZE_REPEATS = 8, 5


def describe_sizes(models: Sequence[Scored], ctx: Context) -> dict[str, Any]:
    """Parameters, million operations and milliseconds of an image, for each kind of model and
    architecture; on the device at work, in the weights' precision."""
    device, side = ctx.runtime.device, ctx.store.data.crop
    images = torch.rand(SIZE_BATCH, 3, side, side, device=device)
    timed: dict[tuple[str, Input, Projection | None], dict[str, float]] = {}
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for model in models:
        arch = read_metadata(model.path)["arch"]
        if (model.row, arch) in rows:
            rows[model.row, arch]["models"].append(model.name)
            continue
        network = load_model(model.path, device, ctx.store)
        key = arch, network.input, network.projection
        if key not in timed:
            timed[key] = measure_size(network, images)
        rows[model.row, arch] = {"name": model.row, "arch": arch, "models": [model.name]}
        rows[model.row, arch] |= timed[key]
    where = f"{device.type} with {torch.get_num_threads()} thread(s)"
    if device.type == "cuda":
        where = torch.cuda.get_device_name()
    return {"device": where, "side": side, "batch": SIZE_BATCH, "rows": [*rows.values()]}


def measure_size(network: Classifier, images: Tensor) -> dict[str, float]:
    """What a network's forward pass costs: parameters, and an image's operations and time."""
    from torch.utils.flop_counter import FlopCounterMode

    times = []
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            network(images)
        for _ in range(SIZE_REPEATS):
            began = now(images.device)
            network(images)
            times.append(now(images.device) - began)
    return {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "mflop": counter.get_total_flops() / 1e6 / len(images),
        "ms": 1000 * float(np.median(times)) / len(images),
    }


MOST_CURVES = 12  # that a figure can tell apart


def training_curves(
    models: Sequence[Scored], choice: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Loss and validation WGA by epoch, mean over the models of a row, of rows that were trained;
    the recommended ones first."""
    first = [choice[key] for key in ("ship", "runner_up") if key in choice]
    found = []
    for row in dict.fromkeys([*first, *(model.row for model in models)]):
        paths = [model.path for model in models if model.row == row]
        histories = [each for each in map(read_history, paths) if each]
        if histories and all("wga" in epoch for epochs in histories for epoch in epochs):
            shortest = min(map(len, histories))
            found.append({"name": row} | {
                key: np.mean([[e[key] for e in each[:shortest]] for each in histories], 0).tolist()
                for key in ("loss", "wga")
            })
    return found[:MOST_CURVES]


def read_history(path: Path) -> list[dict[str, Any]]:
    """Figures of a model's epochs; none if it was not trained, or their file is damaged."""
    file = beside(path, ".history.json")
    try:
        return read_json(file)["epochs"] if file.is_file() else []
    except (Problem, KeyError):
        say(f"warning: {file} cannot be read: its training curves are left out.")
        return []


def find_sheets(ctx: Context) -> list[dict[str, str]]:
    """The pictures of generated images that stand in the run directory, of the first seed."""
    sheets = []
    for name in ctx.sets:
        path = ctx.image_set(name, ctx.recipe.seeds[0]).path.parent / "sheet.png"
        if path.is_file():
            sheets.append({"name": name, "file": str(path.relative_to(ctx.out))})
    return sheets


# Where students look


def last_map(model: Classifier, images: Tensor) -> Tensor | None:
    """The map [B, d, h, w] that the head reads, meaned over positions or over the cells of a grid;
    None if there is none, as where a norm stands between, or in transformers."""
    outputs: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, inputs, output: outputs.update({path: output})

    hooks = [module.register_forward_hook(keep(path)) for path, module in model.named_modules()]
    with torch.no_grad():
        features = model.features(images)
    for hook in hooks:
        hook.remove()
    found, largest = None, 1
    for output in outputs.values():
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[-1] > largest:
            grid = math.isqrt(features.shape[1] // output.shape[1])
            if grid and output.shape[-1] % grid == 0 and output.shape[-2] == output.shape[-1]:
                pooled = F.adaptive_avg_pool2d(output, grid).flatten(1)
                if pooled.shape == features.shape and torch.allclose(pooled, features, atol=1e-5):
                    found, largest = output, output.shape[-1]
    return found


def class_maps(model: Classifier, images: Tensor) -> Tensor | None:
    """Class activation maps [B, C, h, w] (Zhou et al. 2016): what every position of the last
    feature map adds to the logits, less the mean over classes, which changes no probability (ours).
    Their sum over positions is the logits without bias, so centred. None where the head reads
    something else."""
    features, weight = last_map(model, images), model.head.weight.detach()
    if features is None:
        return None
    grid = math.isqrt(weight.shape[1] // features.shape[1])
    times = features.shape[-1] // grid
    cells = (weight - weight.mean(0)).unflatten(1, (-1, grid, grid)) / times**2
    by_position = cells.repeat_interleave(times, 2).repeat_interleave(times, 3)
    return torch.einsum("bdhw,cdhw->bchw", features.to(weight), by_position)


MISTAKES, MOST_GROUPS = 3, 12  # images of a group; groups, the worst first


def show_mistakes(
    models: Sequence[Scored], logits: Mapping[Scored, Tensor], choice: Mapping[str, Any],
    ctx: Context,
) -> dict[str, Any]:
    """The images of every group that a plain student is surest about and gets wrong; draws where it
    and the recommended student look in them. Empty without students or without mistakes."""
    by_row: dict[str, Scored] = {}
    for model in models:
        if model.name.startswith("students/"):  # those made with flags too
            by_row.setdefault(model.row, model)
    if not by_row:
        return {}
    plain = plain_student(by_row, ctx)
    looked_at = [by_row[name] for name in dict.fromkeys([plain, choice.get("ship", plain)])]
    store, indices = ctx.store, ctx.store.split(ctx.recipe.eval.split)
    sure, answers = logits[by_row[plain]].double().softmax(-1).max(-1)
    wrong = answers.numpy() != store.labels[indices]
    groups = store.groups[indices]
    share = {g: wrong[groups == g].mean() for g in set(groups[wrong].tolist())}
    found = []
    for g in sorted(share, key=lambda g: -share[g])[:MOST_GROUPS]:
        places = np.flatnonzero(wrong & (groups == g))
        surest = places[np.argsort(-sure.numpy()[places], kind="stable")][:MISTAKES]
        found.append({"name": store.group_names[g], "images": indices[surest].tolist()})
    if not found:
        return {}
    results: dict[str, Any] = {"students": [model.row for model in looked_at], "groups": found}
    drawn, results["without_map"] = draw_mistakes(results, looked_at, ctx)
    write_file(ctx.out / "mistakes.png", drawn)
    return results


def plain_student(by_row: Mapping[str, Scored], ctx: Context) -> str:
    """The first student that learns from labels alone and keeps its head; else the first one."""
    for name in by_row:
        student = ctx.students.get(name)
        if student and not student.has_teachers and student.head == "own":
            return name
    return next(iter(by_row))


def draw_mistakes(
    found: Mapping[str, Any], students: Sequence[Scored], ctx: Context
) -> tuple[bytes, list[str]]:
    """Images of results.json's mistakes, beside each the map of every student's answer (PNG); and
    the students that have no map."""
    store, device = ctx.store, ctx.runtime.device
    networks = [load_model(model.path, device, store) for model in students]
    panels = 1 + len(networks)
    figure, pyplot = new_figure()
    figure.set_size_inches(1.25 * panels * MISTAKES + 1.6, 1.6 * len(found["groups"]))
    axes = figure.subplots(len(found["groups"]), panels * MISTAKES, squeeze=False)
    without_map: list[str] = []
    for line, group in zip(axes, found["groups"], strict=True):
        for axis in line:
            axis.set_axis_off()
        line[0].text(
            -0.1, 0.5, wrap(shorten(group["name"], 40), 16), fontsize=8, ha="right", va="center",
            transform=line[0].transAxes,
        )
        at = np.array(group["images"])
        images = store.view(at, device)
        for k, i in enumerate(at):
            axis = line[k * panels]
            axis.imshow(images[k].permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
            axis.set_title(shorten(store.class_names[store.labels[i]], 16), fontsize=7)
        for s, (model, network) in enumerate(zip(students, networks, strict=True), 1):
            with torch.no_grad():
                sure, answers = network(images).double().softmax(-1).max(-1)
            maps = class_maps(network, images)
            if maps is None and model.row not in without_map:
                without_map.append(model.row)
            for k, answer in enumerate(answers.tolist()):
                axis = line[k * panels + s]
                if maps is not None:
                    show_map(axis, images[k], maps[k, answer])
                says = f"{shorten(store.class_names[answer], 12)} {100 * sure[k]:.0f} %"
                axis.set_title(f"{shorten(model.row, 16)}\n{says}", fontsize=7)
    return png(figure, pyplot), without_map


def show_map(axis: Any, image: Tensor, evidence: Tensor) -> None:
    """What speaks for a class, [h, w], laid over an image [3, S, S] in grey."""
    positive = F.interpolate(
        evidence[None, None].clamp(min=0), image.shape[-2:], mode="bilinear"
    )[0, 0].cpu().numpy()
    grey = image.mean(0).cpu().numpy()
    axis.imshow(grey, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.imshow(positive, cmap="inferno", alpha=0.6, interpolation="nearest")


def analyse(models: Sequence[Scored], ctx: Context) -> list[dict[str, Any]]:
    """What Eval.analysis adds for each of the recipe's students, seed by seed. All processes take
    part. Students whose teachers are not there as they were are left out."""
    split: str = ctx.recipe.eval.split
    parents: dict[str, list[Artefact]] = {}
    for model in models:
        if model.row in ctx.students and model.name.startswith("students/"):
            frozen = frozen_networks(ctx.students[model.row], ctx)
            if all_finished(frozen, ctx):
                parents[model.name] = frozen
    students = [model for model in models if model.name in parents]
    needed = {each.name: each.path for artefacts in parents.values() for each in artefacts}
    networks = [Scored(name, name, path) for name, path in needed.items()]
    logits: dict[str, dict[str, Tensor]] = {}
    for part in dict.fromkeys(("train", split)):
        answers = logits_of(trunks_of([*students, *networks]), ctx, part)
        logits[part] = {model.name: each for model, each in answers.items()}
    rows: dict[str, list[dict[str, Any]]] = {}
    for model in progress_bar(students, "analysis"):
        count = len(ctx.ensemble(ctx.students[model.row]))
        names = [artefact.name for artefact in parents[model.name]]
        chosen = {
            part: torch.stack([each[name] for name in names]) if names else torch.zeros(0)
            for part, each in logits.items()
        }
        own = {part: each[model.name] for part, each in logits.items()}
        found = {"name": model.name} | describe_student(own, chosen, count, ctx)
        if count:
            found |= {"teachers": names[:count]} | describe_weights(model, chosen[split], ctx)
        if model.row not in rows:
            found["features"] = describe_features(model, ctx)
        rows.setdefault(model.row, []).append(found)
    return [{"name": row, "members": members} for row, members in rows.items()]


def describe_student(
    own: Mapping[str, Tensor], frozen: Mapping[str, Tensor], num_teachers: int, ctx: Context
) -> dict[str, Any]:
    """A student's error taken apart, and the share of images, in per cent, to which it gives the
    answer of its teachers' mean probabilities, over all images and by group."""
    store, split = ctx.store, ctx.recipe.eval.split
    parts = {"train": "train", "scored": split}
    labels = {key: torch.from_numpy(store.labels[store.split(p)]) for key, p in parts.items()}
    student = {key: own[part] for key, part in parts.items()}
    teachers = {key: frozen[part][:num_teachers] for key, part in parts.items()}
    groups, count = store.groups[store.split(split)], len(store.group_names)
    found: dict[str, Any] = {"error": error_parts(student, teachers, labels, groups, count)}
    if num_teachers:
        taught = teachers["scored"].double().softmax(-1).mean(0).argmax(-1)
        agrees = 100.0 * (taught == student["scored"].argmax(-1)).numpy()
        found["agreement"] = float(agrees.mean())
        found["agreement_groups"] = by_group(agrees, groups, count)
    return found


def describe_weights(model: Scored, frozen: Tensor, ctx: Context) -> dict[str, Any]:
    """The mean weight of each teacher by group that a student's weighting gives once the student is
    finished, and the share of images, in per cent, of which no teacher has any."""
    store, student = ctx.store, ctx.students[model.row]
    indices, count = store.split(ctx.recipe.eval.split), len(store.group_names)
    weights = finished_weights(model, frozen, ctx).numpy()  # [M, N]
    groups = store.groups[indices]
    idle = 100.0 * (weights.sum(0) == 0)
    return {
        "weighting": student.weighting_name,
        "weights": [by_group(each, groups, count) for each in weights],
        "zero_weight": by_group(idle, groups, count),
    }


def finished_weights(model: Scored, frozen: Tensor, ctx: Context) -> Tensor:
    """What a student's weighting says of its teachers for the scored images, float64 [M, N], from
    logits [M + biased ones, N, C] of the frozen networks; in batches as in training, where it
    looks at a batch as a whole."""
    store, student = ctx.store, ctx.students[model.row]
    device, runtime = ctx.runtime.device, ctx.runtime.alone()
    indices, count = store.split(ctx.recipe.eval.split), len(ctx.ensemble(student))
    departures = None
    if student.has_departures:
        targets = frozen_targets(student, store, ctx, ctx.runtime.together())
        departures = targets.measure(student.departure_gap)
    biased = frozen[count:].mean(0) if len(frozen) > count else None
    network = load_model(model.path, device, store).requires_grad_(True)
    weighting: Any = student.weighting
    weigh: Weigh = WEIGHTINGS.get(weighting, weighting)
    found = torch.zeros(count, len(indices), dtype=torch.float64)
    batches = epoch_batches(len(indices), student.train.batch_size, 0, 0)
    for step, places in enumerate(batches):
        images, at = store.view(indices[places], device), torch.from_numpy(places)
        output = network(images)
        labels = runtime.upload(store.labels[indices[places]])
        batch = Batch(
            student, network, images, labels, places, len(places), step, 0, runtime, output
        )
        answers = Ensemble(
            frozen[:count, at].to(device), None if biased is None else biased[at].to(device),
            departures,
        )
        found[:, at] = weigh(output, answers, batch).detach().double().cpu()
    return found


TOP_FEATURES, EXCITED_IMAGES = 3, 8


def describe_features(model: Scored, ctx: Context) -> list[dict[str, Any]]:
    """The pooled dimensions of a network that tell the groups of a class apart, with their head
    weights (of the group's class, less the mean of the others'), and a sheet of the images that
    excite them most. Empty without attributes."""
    store = ctx.store
    if store.num_attributes == 1:
        return []
    indices = store.split(ctx.recipe.eval.split)
    network = load_model(model.path, ctx.runtime.device, store)
    blocks = extract({"": network}, store, indices, ctx.runtime.alone())
    features = torch.cat([found[""].float().cpu() for _, _, found in blocks]).numpy()
    labels, attributes = store.labels[indices], store.attributes[indices]
    weight = network.head.weight.detach().double().cpu().numpy()
    rows = []
    for (y, a), dimensions in telling_features(features, labels, attributes, TOP_FEATURES).items():
        of_class = labels == y
        for i, divergence in dimensions:
            column = features[:, i]
            rows.append({
                "group": store.cell_names[y * store.num_attributes + a],
                "dimension": i,
                "divergence": divergence,
                "mean": float(column[of_class & (attributes == a)].mean()),
                "mean_elsewhere": float(column[of_class & (attributes != a)].mean()),
                "weight": float(weight[y, i] - np.delete(weight[:, i], y).mean()),
                "images": [int(k) for k in indices[np.argsort(-column)[:EXCITED_IMAGES]]],
            })
    if ctx.runtime.accelerator.is_main_process and rows:
        write_file(ctx.out / feature_sheet(model.row), draw_features(rows, store))
    return rows


def draw_features(rows: Sequence[Mapping[str, Any]], store: Store) -> bytes:
    """The images that excite each dimension most (PNG): a line a dimension."""
    figure, pyplot = new_figure()
    figure.set_size_inches(1.1 * EXCITED_IMAGES + 2, 1.25 * len(rows))
    axes = figure.subplots(len(rows), EXCITED_IMAGES, squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        for axis in line:
            axis.set_axis_off()
        for axis, i in zip(line, row["images"], strict=False):
            axis.imshow(store.raw(np.array([i]))[0].transpose(1, 2, 0), interpolation="nearest")
            axis.set_title(shorten(store.class_names[store.labels[i]], 14), fontsize=7)
        text = f"{row['group']}\ndimension {row['dimension']}"
        line[0].text(-0.2, 0.5, text, fontsize=8, ha="right", va="center",
                     transform=line[0].transAxes)
    return png(figure, pyplot)


def curves(recipe: Recipe) -> list[dict[str, Any]]:
    """Students that differ in one number alone: {field, label, points: [value, student]}."""
    lines: list[dict[str, Any]] = []
    for setting in settings_in(Distill()):
        if Mark.CURVE in setting.marks:
            lines += curves_over(setting, recipe)
    return lines


def curves_over(setting: Setting, recipe: Recipe) -> list[dict[str, Any]]:
    """Curves over one setting. Students in which it is off (gamma 0) begin every line whose other
    settings they share; settings that matter only where it is on tell the lines apart."""
    lines: dict[tuple[str, str], dict[float, str]] = {}
    labels: dict[tuple[str, str], str] = {}
    for name, student in recipe.students.items():
        values = settings_of(student)
        value = values.pop(setting.name, None)
        if isinstance(value, list):  # of one layer
            value = value[0] if len(value) == 1 else None
        if setting.name == "num_teachers" and value == 0:
            value = recipe.teachers.num_teachers
        if value is None:
            continue
        off = settings_of(replace(student, **{setting.name: setting.default}))
        shared = {key: each for key, each in values.items() if key in off}
        special = {key: each for key, each in values.items() if key not in off}
        line = json.dumps(shared), json.dumps(special) if special else ""
        lines.setdefault(line, {})[value] = name
        labels[line] = student.weighting_name
        if special:
            labels[line] += f", features {student.feature_weights}"
    curves = {}
    for (shared_text, special_text), points in lines.items():
        if special_text:
            points = points | lines.get((shared_text, ""), {})
        if len(points) > 2:
            curves[shared_text, special_text] = sorted(points.items())
    described = []
    for (shared_text, special_text), drawn in curves.items():
        label = labels[shared_text, special_text]
        for key, value in json.loads(shared_text).items():
            others = {json.dumps(json.loads(other).get(key, value)) for other, _ in curves}
            if key != "weighting" and len(others) > 1:  # what else tells the lines apart
                label += f", {key} {value}"
        described.append({"field": setting.name, "label": label, "points": drawn})
    return described


def processor_name() -> str:
    """The name of this machine's CPU."""
    with contextlib.suppress(OSError):
        if cpu := re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()):
            return cpu[1]
    return platform.processor() or platform.machine()


def origin(processes: int = 1, device: str = "") -> dict[str, str]:
    """Where figures come from: command, date, commit, machine, versions. They were computed on a
    `device` (cpu, cuda); without a name on that of accelerate's choice."""
    folder = str(Path(__file__).parent)
    describe = ["git", "-C", folder, "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(describe, capture_output=True, text=True, check=True)
        commit = done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or not a clone
        commit = f"grokd {__version__}"
    if not device and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = torch.cuda.get_device_name() if device == "cuda" else processor_name()
    versions = f"grokd {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    script = Path(sys.argv[0])
    script = Path(script.name) if script.is_absolute() else script
    return {
        "command": shlex.join(["python", str(script), *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "versions": versions,
        "hardware": f"{machine}, {processes} process(es) of {torch.get_num_threads()} threads",
    }


# ---- Export --------------------------------------------------------------------------------------

FILES = {
    "safetensors": "model.safetensors",
    "onnx": "model.onnx",
    "pt2": "model.pt2",
    "int8": "model.int8.onnx",
}
PACKAGES = ("onnx", "onnxscript", "onnxruntime")  # the extra export
OPSET = 18  # of ONNX: the first that resizes with antialiasing
LARGEST_ONNX = 2e9  # bytes of weights; beyond it a graph is not one file
# Bounds of the files of floats, ours: greatest difference of a logit as a share of the greatest
# logit, and share of images of another class, at least one: two logits may be nearly equal.
MAX_DELTA, MAX_CHANGED = 1e-3, 1e-3
CHECKED_AT_ONCE = 32  # images
TIMED_IMAGES, TIMED_SECONDS = 30, 2.0  # at most
# torchvision's networks that timm has under the same name, with the same keys.
SHARED_WITH_TIMM = re.compile(r"(wide_)?resnex?t\d+\w*|densenet\d+")

# Networks whose last output a projector takes otherwise than as it is, see as_map.
OTHER_MAPS = (TIMM, "vit_", "swin_")

PYTORCH = {"format": "pt"}  # other readers of safetensors ask for it
# What a graph says of itself, of the metadata of the weights, and of its input.
KEPT_METADATA = ("arch", "class_names", "fingerprint", "recipe")
INPUT = "RGB images in 0..1; normalisation is inside"

Answer = Callable[[Tensor], Tensor]  # images [B, 3, crop, crop] in 0..1 -> logits [B, C]


class Graph(nn.Module):
    """What the graphs compute: images [B, 3, crop, crop], float32 in 0..1 -> logits [B, C].

    Normalisation is inside, and resizing where the network takes another size. It has no region of
    autocast, which not every exporter knows.
    """

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.head(self.model.features(images))


class Source(NamedTuple):
    """The network that is exported."""

    name: str  # of its folder
    path: Path  # of its weights
    parents: list[Artefact]  # the student; none for a file


def run_export(ctx: Context) -> None:
    """Write a finished network as files that need no grokd, in a folder that appears when all of
    them are checked. The first process writes, the others wait."""
    settings, runtime = ctx.recipe.export, ctx.runtime.together()
    check_formats(settings)
    source = source_to_export(ctx)
    artefact = Artefact(
        f"export/{source.name}", ctx.out / "export" / f"{source.name}.json", "export",
        settings_of(settings) | ctx.data_settings, {each.name: each for each in source.parents},
        stays=True,
    )
    runtime.first(lambda: look_at_place(artefact, ctx))

    def write() -> None:
        try:
            write_folder(artefact, source, ctx)
        except Problem:
            shutil.rmtree(artefact.work)  # nothing to go on from: the remedy is another flag
            raise

    make([artefact], lambda _: runtime.first(write), ctx, runtime)
    say(f"{source.path} as files for others, with a card: {folder_of(artefact)}")


def folder_of(artefact: Artefact) -> Path:
    """The folder of an export; its note stands beside it."""
    return artefact.path.with_name(artefact.path.name.removesuffix(".json"))


def check_formats(settings: Export) -> None:
    """Raise Problem if there is nothing to write, or a package is missing."""
    kinds = kinds_of(settings)
    if not kinds:
        raise Problem("--format names no file: give safetensors, onnx or pt2.")
    absent = [name for name in PACKAGES if not importlib.util.find_spec(name)]
    if absent and {"onnx", "int8"} & {*kinds}:
        raise Problem(
            f"ONNX needs the packages {', '.join(absent)}: install grokd with its extra export (uv "
            "sync --extra export), or go without (--format safetensors pt2)."
        )


def kinds_of(settings: Export) -> list[str]:
    """The files to write, in the order of FILES."""
    wanted = {*settings.format} | ({"int8"} if settings.int8 else set())
    return [kind for kind in FILES if kind in wanted]


def source_to_export(ctx: Context) -> Source:
    """The file that is named, or a student. All processes take part."""
    model = ctx.recipe.export.model
    if not model:
        artefact = student_to_export(ctx)
        return Source(artefact.name.split("/")[1], artefact.path, [artefact])
    path, out = Path(model).resolve(), ctx.out.resolve()
    inside = path.relative_to(out) if path.is_relative_to(out) else Path(path.name)
    return Source("-".join(inside.with_suffix("").parts), Path(model), [])


def student_to_export(ctx: Context) -> Artefact:
    """The student that is named or recommended, of its seeds the best on the selection part."""
    models, left_out = ctx.runtime.together().first(lambda: find_models(ctx))
    folders = [f"seed{seed}" for seed in ctx.recipe.seeds]
    students = [
        model for model in models
        if model.name.startswith("students/") and model.path.parent.name in folders
    ]
    names, name = list(dict.fromkeys(model.row for model in students)), ctx.recipe.export.student
    which = f"seeds {', '.join(map(str, ctx.recipe.seeds))}"
    if not students:
        raise Problem(
            f"{ctx.out} holds no finished student ({which}): train them with `python grokd.py run "
            f"{ctx.name}`, or name a file with --model."
        )
    if name not in (*names, ""):
        stale = [line for line in left_out if f"/students/{name}/" in line]
        hint = f": {stale[0]}. Train it with distill" if stale else suggest(name, names)
        raise Problem(f"{ctx.out} holds no finished student {name!r} ({which}){hint}.")
    has_selection = len(ctx.store.split("selection")) > 0
    inferred = Inferred("", {})
    if has_selection and ctx.store.num_attributes == 1:
        inferred = inferred_parts(ctx)
    if not name and len(names) > 1:
        choice = choose_student(students, inferred, ctx)
        if "why_none" in choice:
            raise Problem(
                f"No student is recommended: {choice['why_none']}. Name one with --student: "
                f"{', '.join(names)}."
            )
        name = choice["ship"]
    members = [model for model in students if model.row == (name or names[0])]
    best = members[0]
    if has_selection and len(members) > 1:
        wga = selection_wga(members, selection_groups(inferred, ctx)[0], ctx)[best.row]
        best = max(members, key=lambda model: wga[model.path.parent.name])
    return ctx.described(best.name)


def look_at_place(artefact: Artefact, ctx: Context) -> None:
    """Forget an export that was moved away; raise Problem for a folder that nothing speaks for."""
    folder = folder_of(artefact)
    if not folder.is_dir():
        artefact.path.unlink(missing_ok=True)
    elif artefact.standing().state == State.MISSING and not ctx.common.redo:
        raise Problem(
            f"{folder} is there, and nothing says from where: move it away, or replace it with "
            "--redo."
        )


def write_folder(artefact: Artefact, source: Source, ctx: Context) -> None:
    """Write all files beside their place, check them, and move them there; raises Problem, and
    leaves what stood there, if one of them does not answer as the network does."""
    folder, new, old = folder_of(artefact), artefact.work / "new", artefact.work / "old"
    for each in (new, old):
        shutil.rmtree(each, ignore_errors=True)
    settings, began = ctx.recipe.export, time.monotonic()
    model = load_model(source.path, store=ctx.store).float()
    write_models(model, source, new, ctx)
    indices = checked_images(settings, ctx.store)
    reference = load_model(source.path, store=ctx.store)  # in its own precision
    figures = compare_files(new, model, reference, indices, ctx)
    for kind in kinds_of(settings):
        if fault := fault_of(kind, figures, len(indices), settings):
            raise Problem(fault)
    about = describe_export(source, model, figures, indices, ctx)
    write_file(new / "config.json", json.dumps(about, indent=1) + "\n")
    write_file(new / "README.md", card(about))
    if folder.is_dir():
        folder.rename(old)
    write_file(artefact.path, json.dumps(with_checksum(artefact.identity)))
    new.rename(folder)
    say(format_table(about), f"Took {time.monotonic() - began:.0f} s")


def write_models(model: Classifier, source: Source, folder: Path, ctx: Context) -> None:
    """Write the network, float32 on the CPU, in every format that is wanted."""
    kinds = kinds_of(ctx.recipe.export)
    metadata = read_metadata(source.path)
    if "safetensors" in kinds:
        weights = weights_file(model.plain_state(), metadata | PYTORCH)
        write_file(folder / FILES["safetensors"], weights)
    if kinds == ["safetensors"]:
        return
    crop = ctx.store.data.crop
    # An example of one image would fix the size of batches.
    example, batch = torch.zeros(2, 3, crop, crop), torch.export.Dim("batch")
    with exporting("pt2", model.arch):
        program = torch.export.export(
            Graph(model).eval(), (example,), dynamic_shapes={"images": {0: batch}}
        )
    if "pt2" in kinds:
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        write_file(folder / FILES["pt2"], buffer.getbuffer())
    if {"onnx", "int8"} & {*kinds}:
        graph = onnx_bytes(program, model, metadata)
        if "onnx" in kinds:
            write_file(folder / FILES["onnx"], graph)
        if "int8" in kinds:
            write_int8(graph, folder / FILES["int8"], model, ctx)


@contextlib.contextmanager
def exporting(kind: str, arch: str) -> Iterator[None]:
    """What a library's exporter raises, in one line."""
    try:
        with warnings.catch_warnings():  # of the map that a SimKD student keeps as it computes
            warnings.filterwarnings("ignore", "The tensor attribute .*last_map was assigned")
            yield
    except Exception as error:  # without a common base
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise Problem(
            f"{kind}: {arch} could not be written ({reason}): go without it (--format, --int8), or "
            "use another version of torch or of the packages of the extra export."
        ) from error


def onnx_bytes(program: Any, model: Classifier, metadata: Mapping[str, str]) -> bytes:
    """A program of torch.export as an ONNX file, whole: input images, output logits."""
    size = sum(value.nbytes for value in model.state_dict().values())
    if size > LARGEST_ONNX:
        raise Problem(
            f"onnx: {model.arch} has {size / 1e9:.1f} GB of weights, and a file of ONNX holds "
            "less than 2: leave it out (--format safetensors pt2)."
        )
    import onnx

    kept = {key: value for key, value in metadata.items() if key in KEPT_METADATA}
    with exporting("onnx", model.arch):
        exported: Any = torch.onnx.export(
            program, dynamo=True, input_names=["images"], output_names=["logits"],
            dynamic_shapes={"images": {0: "batch"}}, opset_version=OPSET, verbose=False,
        )
        graph = exported.model_proto
        onnx.helper.set_model_props(graph, {**kept, "input": INPUT})
        onnx.checker.check_model(graph)
        return graph.SerializeToString()


def write_int8(graph: bytes, path: Path, model: Classifier, ctx: Context) -> None:
    """Quantise a graph statically (onnxruntime): QDQ, signed, weights per channel, ranges of
    activations by their extremes over validation images. Normalisation layers stay in floats."""
    from onnxruntime import quantization
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    every = sorted({*QDQRegistry, *QLinearOpsRegistry})  # onnxruntime's own choice
    images = calibration_images(ctx.recipe.export, ctx.store)
    cpu = torch.device("cpu")

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.parts = iter(slices(len(images), CHECKED_AT_ONCE))

        def get_next(self) -> dict[str, np.ndarray] | None:
            part = next(self.parts, None)
            if part is None:
                return None
            return {"images": ctx.store.view(images[part], cpu).contiguous().numpy()}

    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        names = [str(Path(folder) / name) for name in ("float.onnx", "prepared.onnx", "int8.onnx")]
        Path(names[0]).write_bytes(graph)
        with exporting("int8", model.arch):
            # Its symbolic shapes fail on some graphs, and serve those of images of any size.
            quantization.quant_pre_process(*names[:2], skip_symbolic_shape=True)
            quantization.quantize_static(
                *names[1:], Reader(), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
                op_types_to_quantize=[op for op in every if "Normalization" not in op],
                activation_type=quantization.QuantType.QInt8,
                weight_type=quantization.QuantType.QInt8,
            )
        write_file(path, Path(names[2]).read_bytes())


def calibration_images(settings: Export, store: Store) -> np.ndarray:
    """Validation images that set int8's ranges: of every cell the same share, or all it has."""
    val = store.split("val")
    order = val[permutation(len(val), 0)]
    cells = np.unique(store.cells[val])
    share = max(1, settings.calibration // len(cells))
    return np.sort(np.concatenate([order[store.cells[order] == cell][:share] for cell in cells]))


def checked_images(settings: Export, store: Store) -> np.ndarray:
    """The test images on which files are compared: all, or so many at random."""
    test = store.split("test")
    if not settings.num_images:
        return test
    return np.sort(test[permutation(len(test), 0)][: settings.num_images])


def open_file(kind: str, folder: Path, model: Classifier, threads: int) -> Answer:
    """A file as its users run it, read anew; `threads` are those of onnxruntime."""
    path = folder / FILES[kind]
    if kind == "safetensors":
        return open_plain(path, model)
    if kind == "pt2":
        return torch.export.load(path).module()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def open_plain(path: Path, model: Classifier) -> Answer:
    """Weights in the plain network of their library, strictly, normalised beside it; under SimKD's
    projector, which no library has, as grokd reads them."""
    if model.projection:
        return load_model(path)
    network = plain_network(model.arch, model.num_classes)
    network.load_state_dict(load_file(path))
    network.eval()
    mean, std = (torch.tensor(each)[:, None, None] for each in (model.input.mean, model.input.std))
    side = model.input.input_size
    return lambda images: network((resized(images, side) - mean) / std)


@torch.no_grad()
def compare_files(
    folder: Path, model: Classifier, reference: Classifier, indices: np.ndarray, ctx: Context
) -> dict[str, dict[str, Any]]:
    """Figures of every file, and first of the network itself, `grokd`: scores by group, greatest
    difference of a logit and agreement with the network, megabytes, milliseconds an image."""
    store, cpu = ctx.store, torch.device("cpu")
    kinds = kinds_of(ctx.recipe.export)
    answers: dict[str, Answer] = {"grokd": reference}
    answers |= {kind: open_file(kind, folder, model, torch.get_num_threads()) for kind in kinds}
    outputs: dict[str, list[Tensor]] = {kind: [] for kind in answers}
    parts = slices(len(indices), CHECKED_AT_ONCE)
    ahead = prefetch(parts, lambda part: store.view(indices[part], cpu).contiguous())
    for _, images in progress_bar(ahead, "check", total=len(parts)):
        for kind, answer in answers.items():
            outputs[kind].append(answer(images).double())
    logits = {kind: torch.cat(each) for kind, each in outputs.items()}
    image = store.view(indices[:1], cpu).contiguous()
    figures = {}
    for kind, answer in answers.items():
        figures[kind] = compare(logits[kind], logits["grokd"], store, indices)
        if kind in kinds:
            path = folder / FILES[kind]
            figures[kind] |= {"file": path.name, "mb": path.stat().st_size / 1e6}
            answer = open_file(kind, folder, model, threads=1)
        figures[kind]["ms"] = milliseconds(answer, image)
    return figures


def compare(
    logits: Tensor, reference: Tensor, store: Store, indices: np.ndarray
) -> dict[str, Any]:
    """Scores by group of logits [N, C], and how far they are from the network's."""
    answers = logits.argmax(-1).numpy()
    correct = answers == store.labels[indices]
    delta, agrees = (logits - reference).abs().max(), answers == reference.argmax(-1).numpy()
    return group_scores(correct, store.groups[indices], store.counts("train")) | {
        "max_delta": float(delta),
        "relative_delta": float(delta / reference.abs().max().clamp_min(1e-30)),
        "changed": int((~agrees).sum()),
        "agreement": float(100 * agrees.mean()),
    }


def milliseconds(answer: Answer, image: Tensor) -> float:
    """Time of one image [1, 3, crop, crop] on one thread: the least of several, since what else the
    machine does only adds to it."""
    threads, times = torch.get_num_threads(), list[float]()
    torch.set_num_threads(1)
    try:
        answer(image)  # the first one sets things up
        began = time.perf_counter()
        while len(times) < TIMED_IMAGES and time.perf_counter() - began < TIMED_SECONDS:
            start = time.perf_counter()
            answer(image)
            times.append(1000 * (time.perf_counter() - start))
    finally:
        torch.set_num_threads(threads)
    return min(times)


def fault_of(
    kind: str, figures: Mapping[str, Mapping[str, Any]], num_images: int, settings: Export
) -> str:
    """Why a file is not to be shipped; empty if it is as it should be."""
    file, network = figures[kind], figures["grokd"]
    if kind == "int8":
        loss = network["wga"] - file["wga"]
        if loss <= settings.max_wga_loss:
            return ""
        return (
            f"int8: the worst group's accuracy would fall by {loss:.1f} points, from "
            f"{network['wga']:.1f} to {file['wga']:.1f}: nothing is written. Go without "
            "--int8, calibrate on more images (--calibration), or allow it (--max-wga-loss "
            f"{math.ceil(loss)})."
        )
    is_near = file["relative_delta"] <= MAX_DELTA  # False for one that is not finite
    if is_near and file["changed"] <= max(1, MAX_CHANGED * num_images):
        return ""
    return (
        f"{kind}: {file['file']} does not answer as the network does: greatest difference of a "
        f"logit {file['max_delta']:.3g} ({file['relative_delta']:.2g} of the greatest one, allowed "
        f"{MAX_DELTA:g}), the same class for {file['agreement']:.2f} % of {num_images} test images "
        f"(asked {100 - 100 * MAX_CHANGED:g}): nothing is written. Leave it out (--format), or use "
        "another version of what wrote it."
    )


def describe_export(
    source: Source, model: Classifier, figures: Mapping[str, Any], indices: np.ndarray,
    ctx: Context,
) -> dict[str, Any]:
    """What config.json says: network, input, figures, origin; in timm's layout where timm has the
    network with these keys."""
    store, data, metadata = ctx.store, ctx.store.data, read_metadata(source.path)
    settings, projector = ctx.recipe.export, None
    if model.projection:
        projector = model.projection._asdict() | {"head": model.head_path}
    counts = {part: store.counts(part).tolist() for part in SPLITS}
    if store.num_unknown:
        counts["train"] = [None] * len(store.group_names)
    packages = ("torch", "torchvision", *PACKAGES)
    return timm_layout(model, data) | {
        "name": source.name,
        "arch": model.arch,
        "num_classes": model.num_classes,
        "num_features": model.head.in_features,
        "projector": projector,
        "label_names": list(store.class_names),
        "input": {
            "name": "images", "shape": ["batch", 3, data.crop, data.crop], "dtype": "float32",
            "range": [0, 1], "channels": "RGB",
        },
        "resize": {"size": data.size, "geometry": data.geometry, "filter": "bilinear",
                   "crop": data.crop, "input_size": model.input.input_size or data.crop},
        "mean": list(model.input.mean),
        "std": list(model.input.std),
        "normalisation": "inside all but model.safetensors",
        "opset": OPSET,
        "recipe": ctx.name,
        "settings": json.loads(metadata.get("settings", "{}")),
        "fingerprint": metadata.get("fingerprint", ""),
        "data": store.fingerprint,
        "groups": [
            {"name": name} | {part: each[g] for part, each in counts.items()}
            for g, name in enumerate(store.group_names)
        ],
        "checked_images": len(indices),
        "calibration_images": len(calibration_images(settings, store)) if settings.int8 else 0,
        "formats": dict(figures),
        "made": origin(ctx.runtime.accelerator.num_processes, "cpu"),  # files are run there
        "packages": {
            name: importlib.metadata.version(name)
            for name in packages if importlib.util.find_spec(name)
        },
    }


def is_of_timm(arch: str) -> bool:
    """Has timm the network, under keys like ours?"""
    return arch.startswith(TIMM) or SHARED_WITH_TIMM.fullmatch(arch) is not None


def timm_layout(model: Classifier, data: Data) -> dict[str, Any]:
    """What timm.create_model("local-dir:FOLDER") and timm's transforms read; empty where timm does
    not have the network."""
    if not is_of_timm(model.arch) or model.projection:
        return {}
    side = model.input.input_size or data.crop
    return {
        "architecture": model.arch.removeprefix(TIMM).partition(".")[0],
        "pretrained_cfg": {
            "num_classes": model.num_classes,
            "input_size": [3, side, side],
            "fixed_input_size": model.fixed_side > 0,
            "interpolation": "bilinear",
            "crop_pct": data.crop / data.size,
            "crop_mode": "squash" if data.geometry == "squash" else "center",
            "mean": list(model.input.mean),
            "std": list(model.input.std),
            "classifier": model.head_path,
        },
    }


def format_table(about: Mapping[str, Any]) -> str:
    """Every file of config.json: size, speed, difference from the network, scores by group."""
    figures = about["formats"]
    columns = shown_columns(figures.values())
    header = ["file", "MB", "ms", "max Δ logit", "same class", *columns.values()]
    rows = []
    for each in figures.values():
        has_file = "file" in each
        rows.append([
            each["file"] if has_file else "the network in PyTorch",
            f"{each['mb']:.2f}" if has_file else "–",
            f"{each['ms']:.2f}",
            f"{each['max_delta']:.1e}" if has_file else "–",
            f"{each['agreement']:.2f}" if has_file else "–",
            *score_cells(each, columns),
        ])
    return table([*header, *(group["name"] for group in about["groups"])], rows)


def card(about: Mapping[str, Any]) -> str:
    """config.json as a model card, with a header for the hub."""
    scores, made = about["formats"]["grokd"], about["made"]
    kinds = [kind for kind in FILES if kind in about["formats"]]
    checked, tested = about["checked_images"], sum(group["test"] for group in about["groups"])
    processor = made["hardware"].rpartition(", ")[0]  # without processes and threads
    sizes = [
        [group["name"], *("–" if group[part] is None else str(group[part]) for part in SPLITS)]
        for group in about["groups"]
    ]
    parts = [
        card_header(about),
        f"# {about['name']}",
        f"{about['arch']}, an image classifier of {about['num_classes']} classes "
        f"({', '.join(about['label_names'])}), from grokd's recipe {about['recipe']}. Worst-group "
        f"accuracy (WGA) **{scores['wga']:.1f} %**, mean {scores['mean']:.1f} %, on {checked:,} of "
        f"{tested:,} test images. The worst group is the worst of those below.",
        format_table(about),
        "Accuracies in per cent. Each file was read anew and compared with the network on "
        f"{checked:,} test images: greatest difference of a logit, and per cent of images of the "
        f"same class. Of a file of floats no logit may differ by more than {MAX_DELTA:g} of the "
        f"greatest one, nor the class of more than {100 * MAX_CHANGED:g} % of the images (at least "
        f"one). ms: least time of one image at a time, on one thread of {processor}.",
    ]
    if "int8" in kinds:
        parts.append(
            f"{FILES['int8']}: static quantisation by onnxruntime (QDQ, per channel), calibrated "
            f"on {about['calibration_images']} validation images, balanced by group."
        )
    parts += ["## Use", use_text(about)]
    parts += [f"{FILES[kind]}:\n\n{snippet(kind, about)}" for kind in kinds if kind != "int8"]
    parts += [
        "## Data", table(["group", *SPLITS], sizes),
        "## Settings", settings_text(about),
        "## Licence",
        "None is chosen here. It depends on the data and on the weights that training began with: "
        "add `license:` to the header before you publish.",
        f"`{made['command']}`, {made['date']}, commit {made['commit']}, {made['versions']}, "
        + ", ".join(f"{name} {version}" for name, version in about["packages"].items())
        + f"; ONNX opset {about['opset']}; fingerprint {about['fingerprint'] or 'none'}.",
    ]
    return "\n\n".join(parts) + "\n"


def card_header(about: Mapping[str, Any]) -> str:
    """The YAML header that the hub reads; JSON is YAML."""
    scores = about["formats"]["grokd"]
    metrics = [
        {"type": "accuracy", "name": name, "value": round(scores[key], 2)}
        for key, name in (("wga", "worst-group accuracy"), ("mean", "accuracy"))
    ]
    result = {
        "task": {"type": "image-classification"},
        "dataset": {"type": about["recipe"], "name": about["recipe"], "split": "test"},
        "metrics": metrics,
    }
    tags = ["image-classification", "knowledge-distillation", "group-robustness", "grokd"]
    if "onnx" in about["formats"]:
        tags.append("onnx")
    header: dict[str, Any] = {
        "library_name": "timm" if "architecture" in about else "pytorch",
        "pipeline_tag": "image-classification",
        "tags": tags,
        "metrics": ["accuracy"],
        "model-index": [{"name": about["name"], "results": [result]}],
    }
    lines = ["---", "# license: yours to choose, see below"]
    lines += [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in header.items()]
    return "\n".join([*lines, "---"])


def use_text(about: Mapping[str, Any]) -> str:
    """How images come in, and which libraries know the weights."""
    resize, crop = about["resize"], about["resize"]["crop"]
    shape = f"[batch, 3, {crop}, {crop}]"
    side = resize["input_size"]
    fitting = "" if side == crop else f" and resizing to the {side} pixels of the network"
    way = (
        f"resized to {resize['size']} x {resize['size']}" if resize["geometry"] == "squash"
        else f"its centre square resized to {resize['size']}"
    )
    if "architecture" in about:
        keys = 'timm reads the folder: `timm.create_model("local-dir:FOLDER", pretrained=True)`.'
    elif snippet_network(about):
        keys = "timm does not have this network under these keys, so it cannot read the folder."
    else:
        keys = (
            f"{about['arch']}{' under a projector' * bool(about['projector'])} is a network of "
            f"grokd's own: {FILES['safetensors']} needs grokd, the graphs do not."
        )
    return (
        f"Input `images`: float32 {shape}, RGB in 0..1; an image is {way} (bilinear), then the "
        f"centre of {crop} x {crop} cut. Output `logits`: [batch, {about['num_classes']}]. "
        f"Normalisation (mean {about['mean']}, standard deviation {about['std']}){fitting} is "
        f"inside the graphs; with {FILES['safetensors']} it is yours. {keys}"
    )


def snippet_network(about: Mapping[str, Any]) -> list[str]:
    """Lines that build the plain network and load it; empty for a network of grokd's own."""
    arch, projector = about["arch"], about["projector"]
    if arch in SMALL or arch.startswith("clip:"):
        return []
    if projector and arch.startswith(OTHER_MAPS):
        return []
    if arch.startswith(TIMM):
        return ['network = timm.create_model("local-dir:.", pretrained=True)']
    name, classes = json.dumps(arch), about["num_classes"]
    lines = [
        f"network = torchvision.models.get_model({name}, num_classes={classes})",
        f'weights = load_file("{FILES["safetensors"]}")',
    ]
    if projector:
        lines += snippet_projector(projector, classes)
    return [*lines, "network.load_state_dict(weights)"]


def snippet_projector(projector: Mapping[str, Any], num_classes: int) -> list[str]:
    """Lines that put the projector of `build_projector` beside the network, with its head, and keep
    the map that it takes."""
    narrow, wide, path = projector["features"] // 2, projector["features"], projector["head"]
    after = f"nn.BatchNorm2d({narrow}), nn.ReLU(),"
    return [
        "network.projector = nn.Sequential(",
        f"    nn.AdaptiveAvgPool2d({projector['side']}),",
        f"    nn.Conv2d({projector['width']}, {narrow}, 1, bias=False), {after}",
        f"    nn.Conv2d({narrow}, {narrow}, 3, padding=1, bias=False), {after}",
        f"    nn.Conv2d({narrow}, {wide}, 1, bias=False), nn.BatchNorm2d({wide}), nn.ReLU(),",
        "    nn.AdaptiveAvgPool2d(1), nn.Flatten(),",
        ")",
        f'network.set_submodule("{path}", nn.Identity())',
        f"head, maps = nn.Linear({wide}, {num_classes}), []",
        f'of_head = {{key: weights.pop("{path}." + key) for key in ("weight", "bias")}}',
        "head.load_state_dict(of_head)",
        f'layer = network.get_submodule("{projector["layer"]}")',
        "layer.register_forward_hook(lambda module, images, output: maps.append(output))",
    ]


def snippet(kind: str, about: Mapping[str, Any]) -> str:
    """Python that classifies image.png with a file and without grokd, in the folder of the card."""
    resize, size, crop = about["resize"], about["resize"]["size"], about["resize"]["crop"]
    network = snippet_network(about)
    if kind == "safetensors" and not network:
        return "No library but grokd has this network."
    packages = {
        "onnx": "onnxruntime",
        "pt2": "torch",
        "safetensors": "timm, torch" if about["arch"].startswith(TIMM) else "torch, torchvision",
    }
    lines = [f"import json, numpy as np, {packages[kind]}", "from PIL import Image, ImageOps"]
    if kind == "safetensors" and not about["arch"].startswith(TIMM):
        lines.append("from safetensors.torch import load_file")
        if about["projector"]:
            lines.append("from torch import nn")
    lines.append('image = ImageOps.exif_transpose(Image.open("image.png")).convert("RGB")')
    fit = f"image.resize(({size}, {size})" if resize["geometry"] == "squash" else (
        f"ImageOps.fit(image, ({size}, {size})")
    start = (size - crop) // 2
    cut = f".crop(({start}, {start}, {start + crop}, {start + crop}))" if crop < size else ""
    lines.append(f"image = {fit}, Image.Resampling.BILINEAR){cut}")
    lines.append("images = np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 255")
    if kind == "onnx":
        lines += [
            f'session = onnxruntime.InferenceSession("{FILES["onnx"]}")',
            'logits = session.run(None, {"images": images})[0]',
        ]
    else:
        lines.append("images = torch.from_numpy(images)")
    if kind == "pt2":
        lines.append(f'logits = torch.export.load("{FILES["pt2"]}").module()(images)')
    if kind == "safetensors":
        side = resize["input_size"]
        if side != crop:
            lines.append(
                f"images = torch.nn.functional.interpolate(images, ({side}, {side}), "
                'mode="bilinear", antialias=True)'
            )
        mean, std = (f"torch.tensor({about[key]}).view(3, 1, 1)" for key in ("mean", "std"))
        lines += [*network, f"logits = network.eval()((images - {mean}) / {std})"]
        if about["projector"]:
            lines.append("logits = head(network.projector(maps[0]))  # not the network's own")
    lines.append('print(json.load(open("config.json"))["label_names"][int(logits[0].argmax())])')
    return "\n".join(["```python", *lines, "```"])


def settings_text(about: Mapping[str, Any]) -> str:
    """The settings that made the network, one a line."""
    lines = [f"{name} = {json.dumps(value)}" for name, value in about["settings"].items()]
    return "\n".join(["```", *(lines or ["not known"]), "```"])


# ---- Checks --------------------------------------------------------------------------------------


def check(value: Any, hint: Any, name: str, words: str = "") -> None:
    """Raise Problem unless `value` has the type `hint` and lies in its Range, sections included."""
    words = words or in_words(hint)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        check(value, args[0], name, words)
        fits = all(limit.low <= value <= limit.high for limit in markers(hint, Range))
        fits &= Mark.FILLED not in args or len(value) > 0
    elif origin in (types.UnionType, typing.Union):
        fits = any(_is_a(value, kind) for kind in args)
    else:
        fits = _is_a(value, hint)
    if fits and origin is tuple:
        kinds = [args[0]] * len(value) if args[-1] is ... else args
        fits = len(kinds) == len(value)
        for i, (item, kind) in enumerate(zip(value, kinds, strict=False)):
            check(item, kind, f"{name}[{i}]")
    if not fits:
        raise Problem(f"{name} = {value!r}: must be {words}.")
    if is_dataclass(hint):
        for key, kind in hints_of(typing.cast(Any, hint)).items():
            check(getattr(value, key), kind, f"{name}.{key}")
    elif origin is Mapping:
        for key, item in value.items():
            check(key, args[0], f"a name in {name}")
            check(item, args[1], f"{name}[{key!r}]")


def _is_a(value: Any, hint: Any) -> bool:
    """Is a value of a type, containers' contents aside? True is no number, 1 is a float."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        return isinstance(value, str) and value in typing.get_args(hint)
    if type(value) is int and abs(value) >= 2**63:  # no tensor holds it
        return False
    if hint is float:
        return type(value) in (int, float) and not math.isnan(value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, origin or hint)


def in_words(hint: Any) -> str:
    """A type, for error lines."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        limits = next(iter(markers(hint, Range)), Range())
        words = in_words(args[0])
        if limits.low > -math.inf:
            words += f" at least {limits.low:g}"
        if limits.high < math.inf:
            words += f" and at most {limits.high:g}"
        if Mark.FILLED in args:
            words += ", one or more"
        return words
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(in_words, args))
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is tuple:
        times = "" if args[-1] is ... else f"{len(args)} times "
        return f"a tuple of {times}{in_words(args[0])}"
    if origin is not None and origin is not Mapping:
        return "a function"
    names = {int: "a whole number", float: "a number", str: "a text", bool: "True or False",
             type(None): "None"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def dependencies(
    students: Mapping[str, Distill], sets: Mapping[str, Augment]
) -> graphlib.TopologicalSorter[str]:
    """What each student and each set of images needs to be there before."""
    named = {
        key: {s.value for s in settings_in(section) if s.names and s.active and s.value}
        for key, section in {**students, **sets}.items()
    }
    return graphlib.TopologicalSorter({key: found & named.keys() for key, found in named.items()})


def check_recipe(recipe: Recipe, name: str, original: Recipe | None = None) -> None:
    """Raise Problem for a value of wrong type or range, or values that exclude each other.

    Students and sets may refer to those of `original`, the recipe before some were picked.
    """
    check(recipe, Recipe, name)
    data, teachers, bias_model = recipe.data, recipe.teachers, recipe.bias_model
    if data.crop > data.size:
        raise Problem(f"{name}: data.crop = {data.crop} is larger than data.size = {data.size}.")
    if not recipe.seeds or not recipe.students:
        raise Problem(f"{name}: needs at least one seed and one student.")
    for i in (bias_model.teacher, *bias_model.teachers) if bias_model.kind == "teacher" else ():
        if i >= teachers.num_teachers:
            raise Problem(
                f"{name}: bias_model.teacher = {i}, but there are {teachers.num_teachers} "
                "teachers, counted from 0."
            )
    for i in teachers.finished:
        if i >= teachers.num_teachers:
            raise Problem(
                f"{name}: teachers.finished names {i}, but there are {teachers.num_teachers} "
                "teachers, counted from 0."
            )
    for key in recipe.students.keys() & recipe.augments.keys():
        raise Problem(f"{name}: {key!r} names a student and a set of images.")
    original = original or recipe
    students = {**original.students, **recipe.students}
    check_references(
        recipe, name, students=students, augments={**original.augments, **recipe.augments}
    )
    check_compared(recipe, name, students)
    check_helpers(recipe, name, students)
    for place, section in sections_of(recipe):
        for setting in settings_in(section):
            outside = not setting.active and setting.value != setting.default
            if outside and len(setting.needs) == len(setting.whens):
                needed = " and ".join(map(str, setting.needs))
                raise Problem(f"{name}: {place}: {setting.name} belongs to {needed}.")
    for key, student in recipe.students.items():
        check_student(student, f"{name}: students[{key!r}]", teachers, bias_model)


def sections_of(recipe: Recipe) -> Iterator[tuple[str, Distill | Augment]]:
    """Students and sets of a recipe, with their place in it."""
    for key, student in recipe.students.items():
        yield f"students[{key!r}]", student
    for key, images in recipe.augments.items():
        yield f"augments[{key!r}]", images


def check_attributes(recipe: Recipe, store: Store) -> None:
    """Raise Problem for what needs the attribute of every training image, where some have none."""
    for key, student in recipe.students.items():
        by_groups = student.weighs_samples and student.sample_weights == "group-dro"
        if by_groups and (store.num_unknown or store.num_attributes == 1):
            raise Problem(
                f"students[{key!r}].sample_weights = 'group-dro' needs the attribute of every "
                "training image: use 'jtt' or 'dedier', which need none."
            )
    if not store.num_unknown:
        return
    lacking = f"needs the attribute of every training image, and {store.num_unknown:,} have none"
    for key, student in recipe.students.items():
        if student.rebalance == "groups":
            raise Problem(
                f"students[{key!r}].rebalance = 'groups' {lacking}: use 'classes' or 'tab'."
            )
    if recipe.eval.split == "train":
        raise Problem(f"eval.split = 'train' {lacking}: score val, selection or test.")


def check_selection(recipe: Recipe, store: Store) -> None:
    """Raise Problem for what needs a selection part, where all of validation refits heads; warn of
    groups that are not in it."""
    if len(store.split("selection")):
        sizes = zip(store.group_names, store.counts("selection"), strict=True)
        if absent := [name for name, count in sizes if not count]:
            say(
                f"warning: the selection part has no image of group {'; '.join(absent)}, so what "
                "is chosen by it is chosen by the other groups: add validation images, or lower "
                "Data.reweighting."
            )
        return
    trains = {f"students[{key!r}]": student.train for key, student in recipe.students.items()}
    trains |= {"teachers": recipe.teachers.train, "bias_model": recipe.bias_model.train}
    needing = [
        f"{place}.select = 'best'" for place, train in trains.items() if train.select == "best"
    ]
    if recipe.eval.split == "selection":
        needing.append("eval.split = 'selection'")
    if recipe.eval.probes:
        needing.append("eval.probes")
    if needing:
        raise Problem(
            f"{needing[0]} needs a selection part: of {len(store.split('val')):,} validation "
            f"images data.reweighting = {recipe.data.reweighting:g} leaves none; lower it, or add "
            "validation images."
        )


def check_references(
    recipe: Recipe, name: str, students: Mapping[str, Distill], augments: Mapping[str, Augment]
) -> None:
    """Raise Problem for bad names of students and sets, names of nothing, and circles."""
    for kind, keys in (("student", recipe.students), ("set", recipe.augments)):
        for key in keys:
            if not re.fullmatch(r"\w[\w.+=,~-]*", key):
                raise Problem(
                    f"{name}: {kind} {key!r}: letters, digits and . _ + = , ~ - make a name."
                )
    for place, section in sections_of(recipe):
        for setting in settings_in(section):
            choices = students if setting.names == "students" else augments
            required = bool(setting.value or setting.default)
            if setting.names and required and setting.value not in choices:
                hint = suggest(setting.value, [*choices])
                raise Problem(
                    f"{name}: {place}.{setting.name} = {setting.value!r} names nothing{hint}."
                )
    try:
        dependencies(students, augments).prepare()
    except graphlib.CycleError as error:
        circle = ", ".join(sorted({*error.args[1]}))
        raise Problem(
            f"{name}: {circle} wait for each other: see start, helper and augmented of the "
            "students, student and like of the sets."
        ) from None


def check_compared(recipe: Recipe, name: str, students: Mapping[str, Distill]) -> None:
    """Raise Problem for a baseline that is no student, with or without what flags set, and for
    published columns that no report has. Published rows are free: a variant of a recipe may keep
    those of students that it dropped."""
    baseline, columns = recipe.eval.baseline, list(COLUMNS)
    if baseline and not {baseline, baseline.partition("+")[0]} & students.keys():
        hint = suggest(baseline, [*students])
        raise Problem(f"{name}: eval.baseline = {baseline!r} names no student{hint}.")
    for row, figures in recipe.published.items():
        for column in figures:
            if column.removesuffix("_std") not in columns:
                hint = suggest(column, columns)
                raise Problem(f"{name}: published[{row!r}] has a column {column!r}{hint}.")


def check_helpers(recipe: Recipe, name: str, students: Mapping[str, Distill]) -> None:
    """Raise Problem for a helper whose losses are not of the images that a student is shown."""
    for key, student in recipe.students.items():
        if student.rebalance != "tab" or not student.helper:
            continue
        helper = students[student.helper]
        seen, shown = (
            (each.augmented, each.augmented_ratio if each.augmented else 0.0)
            for each in (helper, student)
        )
        if helper.rebalance != "none" or seen != shown:
            place = f"{name}: students[{key!r}]"
            raise Problem(
                f"{place}.helper = {student.helper!r} learns from other images, so its losses say "
                f"nothing of this student's: name one with augmented = {student.augmented!r}, the "
                "same augmented_ratio and rebalance = 'none'."
            )


def check_student(
    student: Distill, place: str, teachers: Teachers, bias_model: BiasModel
) -> None:
    """Raise Problem for values of a student that exclude each other."""
    if student.num_teachers > teachers.num_teachers:
        raise Problem(
            f"{place}.num_teachers = {student.num_teachers}, but there are "
            f"{teachers.num_teachers} teachers."
        )
    if student.has_features:
        if len(student.gamma) != len(student.layers):
            raise Problem(
                f"{place} has {len(student.layers)} layers and {len(student.gamma)} values of "
                "gamma: give one for each layer."
            )
        if student.feature_weights == "agre" and len(bias_model.teachers) > 1:
            raise Problem(
                f"{place}.feature_weights = 'agre' compares features, which several biased models "
                "do not share: name one as bias_model.teacher."
            )
        compared = student.feature_weights in ("agree", "disagree")
        if compared and (student.num_teachers or teachers.num_teachers) < 2:
            raise Problem(
                f"{place}.feature_weights = {student.feature_weights!r} needs at least 2 teachers."
            )
    if student.loss == "simkd" and student.weighting != "average":
        raise Problem(
            f"{place}.loss = 'simkd' compares maps, not answers that could be weighed teacher by "
            "teacher: set weighting = 'average'."
        )
    if student.weighs_samples:
        check_sample_weights(student, place)
    micro = 0 < student.train.micro_batch < student.train.batch_size
    if micro and student.needs_whole_batches:
        raise Problem(
            f"{place}: ae-kd, space = 'batch', disagree, contrastive and group-dro work on whole "
            "batches, not on micro-batches: set micro_batch = 0."
        )


def check_sample_weights(student: Distill, place: str) -> None:
    """Raise Problem for weights of samples where these have no label or group of their own."""
    if student.train.mix != "none":
        raise Problem(
            f"{place}.sample_weights = {student.sample_weights!r} weighs single images, and mix = "
            f"{student.train.mix!r} shows mixtures: set mix = 'none'."
        )
    if student.sample_weights == "group-dro" and student.augmented:
        raise Problem(
            f"{place}.sample_weights = 'group-dro' needs the group of every image, and generated "
            f"ones (augmented = {student.augmented!r}) have none: use 'jtt' or 'dedier'."
        )


# ---- Dry run -------------------------------------------------------------------------------------

# A kind of step is timed for so many seconds at least, after so many steps, which are slower.
PROBE_SECONDS, WARM_UP = 1.5, 3
# Only trained networks could tell, so it is a guess: this share of a guided set's sources pass,
# halfway through their iterations (ours; on the digits 51 and 64 % do).
ACCEPTED = 0.5
MISTAKEN = 0.1  # likewise: a student gets this share of its training images wrong (ours)


@dataclass
class Stage:
    """A line of the table: what is to be made, and what it costs."""

    name: str
    to_make: int = 0
    finished: int = 0
    images: int = 0  # of the largest epoch; of a store, a cache or a set all of them
    epochs: int = 0  # of the longest training
    steps: int = 0  # of all trainings together
    disk: float = 0.0  # bytes that stay
    seconds: float = 0.0

    def cells(self) -> list[str]:
        counts = (self.to_make, self.finished, self.images, self.epochs, self.steps)
        numbers = [f"{count:,}" if count else "" for count in counts]
        disk = in_bytes(self.disk) if self.disk else ""
        return [self.name, *numbers, disk, in_time(self.seconds)]


class Pace(NamedTuple):
    """What one kind of training costs, as measured; times in seconds, sizes in bytes."""

    setup: float  # before the first steady step
    step: float
    epoch: float  # the end of one, validation aside
    save: float  # a checkpoint
    finish: float  # writing the network
    predict: float  # an image
    review: float  # an image, in what else follows an epoch
    checkpoint: int
    weights: int  # the network's file
    log: int  # of TensorBoard before the first epoch ends
    history: int  # of an epoch, losses of the samples aside
    path: Path  # the network, trained for some steps


class Course(NamedTuple):
    """How much of a kind of training is to be done."""

    train: Train
    num_images: int
    num_epochs: int
    work: Path  # where its checkpoints are, if it was begun


class SetPace(NamedTuple):
    """What one kind of generated images costs, as measured; times in seconds."""

    setup: float
    first: float  # an image's first iterate, and writing it
    iteration: float  # each further one
    disk: float  # bytes of an image and its record


def in_bytes(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"


def in_time(seconds: float) -> str:
    return f"{seconds / 3600:,.2f} h" if seconds >= 1800 else f"{seconds:,.1f} s"


def folder_bytes(folder: Path) -> int:
    """What the files below a folder hold."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def counted_store(data: Data, root: str) -> Store:
    """The store if it was built before, else what the rows tell of it."""
    data, rows = checked_data(data, root)
    return stored_rows(rows, data, store_folder(rows, data))


def few_rows(rows: Sequence[Row], num_train: int) -> list[Row]:
    """Rows to measure with: of training evenly of the classes, else of the groups."""
    chosen: list[Row] = []
    for split, wanted in (("train", num_train), ("val", 2 * BLOCK), ("test", BLOCK // 4)):
        ranked: list[tuple[int, Row]] = []
        seen: dict[Any, int] = {}
        for row in rows:
            if row.split == split:
                kind = row.label if split == "train" else (row.label, row.attribute)
                seen[kind] = seen.get(kind, 0) + 1
                ranked.append((seen[kind], row))
        ranked.sort(key=lambda pair: pair[0])
        chosen += [row for _, row in ranked[: max(wanted, 8 * len(seen))]]
    return chosen


def first_block(store: Store) -> np.ndarray:
    """As many images as are predicted at once, of whatever split: that decides the memory."""
    return np.arange(min(BLOCK, len(store.labels)))


def trial_context(ctx: Context, folder: Path) -> Context:
    """The same command on a few images, with a store and results of its own in `folder`."""
    recipe = ctx.recipe
    trains = [recipe.teachers.train, recipe.bias_model.train]
    trains += [student.train for student in recipe.students.values()]
    batches = [train.batch_size for train in trains]
    if any(not images.generator for images in recipe.augments.values()):
        batches.append(recipe.diffusion.batch_size)
    rows = checked_rows(recipe.data, recipe.root)
    least = BLOCK if ctx.runtime.device.type == "cuda" else 64  # slow processors ask no more
    few = few_rows(rows, max(2 * max(batches), least))
    largest = 0.0 if is_encoded(rows, recipe.data) else recipe.data.max_store_gb
    data = replace(
        ctx.store.data, reader=lambda root: few, store=str(folder / "store"), max_store_gb=largest
    )
    return replace(
        ctx, recipe=replace(recipe, data=data), store=open_store(data, recipe.root),
        out=folder / "out", runtime=ctx.runtime.alone(), common=replace(ctx.common, redo=False),
        loaded={}, remade=set(),
    )


def kind_of(section: Any, *more: Any) -> str:
    """Tells apart trainings that cost differently: by settings, without those that change neither
    time nor memory of a step. Of numbers that draw curves it matters whether they are 0."""
    train = replace(
        section.train, epochs=1, lr=0.0, schedule="constant", warmup_epochs=0.0, momentum=0.0,
        weight_decay=0.0, num_views=0, view_seed=0,
    )
    changes: dict[str, Any] = {"train": train}
    if isinstance(section, Distill):
        changes |= {"augmented": "", "start": "", "rebalance": "none", "weights": "", "alpha": 1.0}
    elif isinstance(section, Teachers):
        changes |= {"seed": 0, "weights": ()}
    values = settings_of(replace(section, **changes), head=False)
    for setting in settings_in(section):
        if setting.name in values and Mark.CURVE in setting.marks:
            numbers = setting.value if isinstance(setting.value, tuple) else (setting.value,)
            values[setting.name] = [number > 0 for number in numbers]
    return digest(values, *more)


def timed_epoch(training: Training, seconds: float) -> tuple[float, float]:
    """Seconds of a step and of an epoch's end, having trained for `seconds` at least."""
    job, device, count = training.job, training.runtime.device, 0
    first = training._epoch(0)
    full = [batch for batch in first if len(batch) == len(first[0])]
    batches = full * math.ceil(1000 / len(full))
    training.steps_per_epoch = len(batches)  # `check_loss` waits for a GPU no more than in the run
    job.prepare(0)
    began = now(device)
    for batch, parts in training._ahead(0, batches):
        training.step(0, len(batch), parts)
        training.check_loss()
        count += 1
        if count >= WARM_UP and time.perf_counter() - began >= seconds:
            break
    trained = now(device)
    training.saved = time.monotonic()  # a checkpoint is timed by itself
    job.prepare(0)
    training.end_epoch(0)
    training.board.flush()
    return (trained - began) / count, now(device) - trained


def measure_training(build: Callable[[], Job], ctx: Context) -> Pace:
    """Train a network for some steps as `fit` does, end two epochs, and write it."""
    runtime, device = ctx.runtime, ctx.runtime.device
    began = now(device)
    job = build()
    job.train = replace(job.train, epochs=1000)  # none that ends here is the last
    job.stop_after = 0
    training = Training(job, runtime)
    training.restore()
    artefact, network = job.artefact, job.model
    board = artefact.path.parent / "tensorboard"
    with training.reporting():
        timed_epoch(training, 0.0)
        warm, logged = now(device) - began, folder_bytes(board)
        step, epoch = timed_epoch(training, PROBE_SECONDS)
        history = folder_bytes(board) - logged
        began = now(device)
        training.save()
        save = now(device) - began
    checkpoint = sum(folder_bytes(path) for path in artefact.work.glob("[0-9]*"))
    runtime.accelerator.free_memory()
    predict_time = finish = 0.0
    if isinstance(network, Classifier):
        began, indices = now(device), first_block(job.store)
        predict([network], job.store, indices, runtime)
        predict_time = (now(device) - began) / len(indices)
        began = now(device)
        write_history(artefact, job, training.progress, {})
        save_model(network, artefact, ctx, {})
        finish = now(device) - began
        history += len(json.dumps(training.progress.history[-1], indent=1))
    began, count = now(device), len(job.store.split("train"))
    job.after_epoch(0)
    review = (now(device) - began) / count
    seen = len(choosing_part(job.store)) * predict_time + count * review
    between = max(0.0, epoch - seen)
    setup = max(0.0, warm - WARM_UP * step - epoch)
    weights = artefact.path.stat().st_size if artefact.path.is_file() else 0
    shutil.rmtree(artefact.work)
    return Pace(
        setup, step, between, save, finish, predict_time, review, checkpoint, weights,
        max(0, 2 * logged - folder_bytes(board)), history, artefact.path,
    )


def measure_set(
    settings: Augment, artefact: Artefact, seed: int, ctx: Context, source: str
) -> SetPace:
    """Generate a few images with few iterations and with more, which no network accepts; then some
    that are all accepted, to finish the set."""
    runtime, store, device = ctx.runtime, ctx.store, ctx.runtime.device
    began = now(device)
    judge = appoint_judge(settings, seed, ctx, runtime)
    generator = Generator(source, settings, store.class_names, store.data.size, runtime)
    fit_memory(generator, judge)
    if settings.realism < 1:
        judge.threshold = calibrate(generator, store, settings.realism)
    setup = now(device) - began
    sources = store.split("train")[: generator.micro_batch].tolist()
    folder, times = artefact.path.parent, list[float]()
    folder.mkdir(parents=True)
    # The first warms up, on a GPU with as many samples: its libraries choose kernels by shapes.
    warming = sources if device.type == "cuda" else sources[:1]
    for iterations, chosen in ((1, warming), (0, sources), (2, sources)):
        judge.settings = replace(settings, iterations=iterations, max_student=0.0)
        began = now(device)
        generate_files(folder, generator, judge, store, Flight(chosen), seed, 0)
        times.append((now(device) - began) / len(chosen))
    record = folder_bytes(folder) - sum(path.stat().st_size for path in folder.glob("*.png"))
    judge.settings = replace(settings, guided=False)
    generate_files(folder, generator, judge, store, Flight(sources[:16]), seed, 0)
    began = now(device)
    finish_set(artefact, generator, store, source, seed)
    setup += now(device) - began
    # Untrained generators make noise, which PNG cannot compress; images of the data are alike.
    image = png_bytes(store.raw(np.array(sources[:32])))
    _, first, third = times
    record_bytes = record / (len(warming) + 2 * len(sources))
    return SetPace(setup, first, (third - first) / 2, image + record_bytes)


def png_bytes(raw: np.ndarray) -> float:
    """Mean size of images uint8 [B, 3, S, S] as PNG files."""
    sizes = []
    for image in raw:
        content = io.BytesIO()
        Image.fromarray(image.transpose(1, 2, 0)).save(content, "png")
        sizes.append(content.tell())
    return float(np.mean(sizes))


class DryRun:
    """What `run` would do, counted from the recipe, and timed with stand-ins on a few images."""

    def __init__(self, ctx: Context, folder: Path) -> None:
        self.ctx, self.store, self.recipe = ctx, ctx.store, ctx.recipe
        self.is_built = (ctx.store.folder / "manifest.json").is_file()
        self.stages: dict[str, Stage] = {}
        self.paces: dict[str, Pace] = {}
        self.set_paces: dict[str, SetPace] = {}
        self.seconds: dict[str, float] = {}  # of other work, by what it is
        self.checkpoint = 0  # bytes, of the largest training
        self.growth: dict[str, float] = {}  # bytes of memory that a few images do not show
        began = time.perf_counter()
        self.trial = trial_context(ctx, folder)
        self.decoding = (time.perf_counter() - began) / len(self.trial.store.labels)
        self.warm_up()

    def warm_up(self) -> None:
        """Do once what takes long the first time only, imports above all. That is what a run has to
        do too, so the processor time of the process till then is the time of its start."""
        trial, store = self.trial, self.trial.store
        model = build_model("cnn2", "random", store.num_classes, Input(), 0)
        path = trial.out / "warm-up" / "model.safetensors"
        train, section = Train(epochs=1), self.recipe.teachers
        job = Job(
            Artefact("warm-up", path, "", {}, {}), model, section, train, store, 0, label_losses
        )
        fit(classifier_job(job, trial, trial.runtime), trial.runtime)
        refit_head(model, store, replace(section.dfr, num_refits=1), train, 0, trial.runtime)
        png(*new_figure())
        if self.recipe.augments:
            import_diffusers()
        self.stage("start").seconds = time.process_time()

    def stage(self, name: str) -> Stage:
        return self.stages.setdefault(name, Stage(name))

    def grow(self, cause: str, count: float) -> None:
        """Note the most bytes of memory that something takes."""
        self.growth[cause] = max(count, self.growth.get(cause, 0))

    def is_due(self, artefact: Artefact) -> bool:
        """Is it to be made? Without a store nothing can be recognised."""
        return not self.is_built or self.ctx.due(artefact)

    def timed(self, what: str, function: Callable[[], Any]) -> float:
        """Seconds of a piece of work, measured once."""
        if what not in self.seconds:
            began = now(self.trial.runtime.device)
            function()
            self.seconds[what] = now(self.trial.runtime.device) - began
        return self.seconds[what]

    # Networks that stand in for those of the run

    def pace(self, kind: str, build: Callable[[], Job]) -> Pace:
        """What a kind of training costs."""
        if kind not in self.paces:
            self.paces[kind] = measure_training(build, self.trial)
        return self.paces[kind]

    def teacher_pace(self, i: int) -> Pace:
        trial = self.trial
        kind = kind_of(self.recipe.teachers.of(i))
        return self.pace(kind, lambda: teacher_job(i, trial, trial.runtime))

    def bias_pace(self) -> Pace:
        section, trial = self.recipe.bias_model, self.trial
        if section.kind == "teacher":
            return self.teacher_pace(section.teacher)
        return self.pace("bias-model", lambda: bias_job(trial, trial.runtime))

    def student_pace(self, name: str) -> Pace:
        """What training a student costs, on the plain images."""
        student, trial, seed = self.ctx.students[name], self.trial, self.recipe.seeds[0]

        def build() -> Job:
            plain = replace(student, augmented="", start="", rebalance="none")
            weights = "random" if student.start else student.weights
            num_classes = trial.store.num_classes
            model = build_model(student.arch, weights, num_classes, student.input, seed)
            artefact, store = trial.student(name, seed), trial.store
            job = Job(artefact, model, plain, student.train, store, seed, label_losses)
            return student_job(job, trial, trial.runtime)

        kind = self.student_kind(name)
        if kind not in self.paces and student.has_teachers:
            self.stand_in(frozen_networks(student, trial))
            targets = frozen_targets(student, trial.store, trial, trial.runtime)
            targets.prepare(0)  # once for all students, so it is no student's set-up
        return self.pace(kind, build)

    def student_kind(self, name: str) -> str:
        """Students whose training costs alike, the number and kinds of their teachers included."""
        student = self.ctx.students[name]
        frozen = frozen_networks(student, self.trial)
        return kind_of(student, len(frozen), sorted({self.network(each)[0] for each in frozen}))

    def network(self, artefact: Artefact) -> tuple[str, Input]:
        """The architecture of a teacher or the biased model, and what it is fed."""
        kind, number, *_ = artefact.name.split("/")
        if kind == "bias-model":
            return self.recipe.bias_model.arch, self.recipe.bias_model.input
        teacher = self.recipe.teachers.of(int(number))
        return teacher.arch[0], teacher.input

    def stand_in(self, artefacts: Sequence[Artefact]) -> None:
        """Write networks in place of those that the run makes, each with a trunk of its own."""
        for artefact in artefacts:
            if artefact.path.is_file():
                continue
            kind, name, *_ = artefact.name.split("/")
            number = 0
            if kind == "teachers":
                number = int(name)
                pace = self.teacher_pace(number)
            elif kind == "students":
                pace = self.student_pace(name)
            else:
                pace = self.bias_pace()
            model = load_model(pace.path)
            with torch.no_grad():
                next(model.trunk.parameters()).mul_(1 + number / 1000)
            save_model(model, artefact, self.trial, {})

    # Stages

    def count(self) -> None:
        """All stages, in the order of the run."""
        if not self.is_built:
            self.count_store()
        self.count_teachers()
        self.count_bias_model()
        self.count_students()
        self.count_targets()
        self.count_sets()
        self.count_evaluation()

    def count_store(self) -> None:
        recipe = self.recipe
        rows = checked_rows(recipe.data, recipe.root)
        stage = self.stage("image store")
        stage.to_make, stage.images = 1, len(rows)
        stage.disk = stored_bytes(rows, recipe.data, is_encoded(rows, recipe.data))
        stage.seconds = self.decoding * len(rows)

    @property
    def num_validated(self) -> int:
        """Images that `validate` predicts."""
        return len(choosing_part(self.store))

    def count_training(self, stage: Stage, pace: Pace, course: Course) -> None:
        """A training, or the rest of one that was begun."""
        train, num_images, num_epochs, work = course
        per_epoch = len(epoch_batches(num_images, train.batch_size, 0, 0))
        saved = [int(path.name) for path in work.glob("[0-9]*") if not path.suffix]
        steps = max(0, num_epochs * per_epoch - max(saved, default=0))
        epoch = pace.epoch + self.num_validated * pace.predict + num_images * pace.review
        seconds = pace.setup + steps * (pace.step + epoch / per_epoch)
        limit = 60 * train.checkpoint_minutes
        between_saves = min(limit, max(min(10, limit), per_epoch * pace.step + epoch))
        seconds += (1 + seconds / between_saves) * pace.save
        losses = 4 * num_images * num_epochs
        stage.images = max(stage.images, num_images)
        stage.epochs = max(stage.epochs, num_epochs)
        stage.steps += steps
        stage.seconds += seconds
        stage.disk += pace.log
        self.checkpoint = max(self.checkpoint, 2 * pace.checkpoint + losses)
        self.grow("losses", 2 * losses)

    def count_files(self, stage: Stage, pace: Pace, course: Course) -> None:
        """A finished network's files, and its last validation."""
        stage.disk += pace.weights
        stage.disk += course.num_epochs * (pace.history + 4 * course.num_images)
        stage.seconds += pace.finish + self.num_validated * pace.predict

    def count_teachers(self) -> None:
        section, num_images = self.recipe.teachers, len(self.store.split("train"))
        for i in range(section.num_teachers):
            arch = section.of(i).arch[0]
            stage, artefact = self.stage(f"teachers {arch}"), self.ctx.teacher(i, "erm")
            heads = self.stage(f"{refit_name(section.dfr, self.store)} heads")
            head = self.ctx.teacher(i, "dfr")
            if self.is_due(artefact):
                pace, train = self.teacher_pace(i), section.of(i).train
                stage.to_make += 1
                course = Course(train, num_images, train.epochs, artefact.work)
                self.count_training(stage, pace, course)
                self.count_files(stage, pace, course)
            else:
                stage.finished += 1
            if self.is_due(head):
                pace = self.teacher_pace(i)
                heads.to_make += 1
                heads.images = len(self.store.split("reweighting"))
                heads.disk += pace.weights
                heads.seconds += pace.finish + self.refit_seconds(pace, section)
            else:
                heads.finished += 1

    def refit_seconds(self, pace: Pace, section: Teachers | Distill) -> float:
        """Refitting a head: features of the reweighting part, and fits, whose time goes with the
        images they see: of l1 balanced subsets, of SGD all."""
        trial, what = self.trial, digest("refit", str(pace.path), settings_of(section.dfr))
        model = load_model(pace.path, trial.runtime.device)
        seconds = self.timed(what, lambda: refit_head(
            model, trial.store, section.dfr, section.train, 0, trial.runtime
        ))
        sizes = []
        for store in (self.store, trial.store):
            part = store.split("reweighting")
            cells = np.bincount(store.cells[part])
            by_l1 = section.dfr.method == "l1"
            by_l1 |= section.dfr.method == "auto" and store.num_classes == 2
            sizes.append((len(part), len(cells) * int(cells.min()) if by_l1 else len(part)))
        (num_images, num_fitted), (num_few, few_fitted) = sizes
        fits = max(0.0, seconds - num_few * pace.predict)
        predictions = (num_images + self.num_validated) * pace.predict
        return predictions + fits * num_fitted / few_fitted

    def count_bias_model(self) -> None:
        section, artefact = self.recipe.bias_model, self.ctx.bias()
        is_copy, teachers = section.kind == "teacher", self.recipe.teachers
        stage = self.stage("biased model (a copy)" if is_copy else "biased model")
        if not self.is_due(artefact):
            stage.finished = 1
            return
        pace, num_images = self.bias_pace(), len(self.store.split("train"))
        stage.to_make = 1
        train = teachers.of(section.teacher).train if is_copy else section.train
        epochs = train.epochs
        if section.kind == "early-stopped":
            epochs = min(section.stop_after, epochs)
        course = Course(train, num_images, epochs, artefact.work)
        if not is_copy:
            self.count_training(stage, pace, course)
        self.count_files(stage, pace, course)

    def count_students(self) -> None:
        shown: dict[str, list[str]] = {}  # students of each kind
        for seed, names in students_alike(self.recipe):
            artefacts = [self.ctx.student(name, seed) for name in names]
            due = [name for name, each in zip(names, artefacts, strict=True) if self.is_due(each)]
            student, kind = self.ctx.students[names[0]], self.student_kind(names[0])
            kinds = shown.setdefault(kind, [])
            kinds += [name for name in names if name not in kinds]
            stage = self.stage(f"students {kind}")
            stage.name = "students " + shorten(", ".join(kinds), 50)
            stage.finished += len(names) - len(due)
            if not due:
                continue
            pace = self.student_pace(names[0])
            num_images = self.num_training(student, seed)
            course = Course(student.train, num_images, student.train.epochs, artefacts[0].work)
            stage.to_make += len(due)
            self.count_training(stage, pace, course)
            for name in due:
                self.count_files(stage, pace, course)
                if self.ctx.students[name].head == "dfr":
                    stage.seconds += self.refit_seconds(pace, self.ctx.students[name])

    def num_training(self, student: Distill, seed: int) -> int:
        """Images that a student learns from. TAB's clusters are taken to be the groups."""
        store = self.store
        train = store.split("train")
        count, everywhere = len(train), np.zeros_like(train)
        if student.rebalance == "groups":
            count = len(rebalanced(store, store.cells[train], everywhere).split("train"))
        elif student.rebalance == "classes":
            count = len(rebalanced(store, store.labels[train], everywhere).split("train"))
        elif student.rebalance == "tab":
            balanced = rebalanced(store, store.cells[train], store.labels[train])
            count = len(balanced.split("train"))
        if student.augmented_ratio and student.augmented:
            return count + round(student.augmented_ratio * len(train))
        return count + (self.num_accepted(student.augmented, seed) if student.augmented else 0)

    def num_sources(self, name: str, seed: int) -> int:
        """Images that a set starts from."""
        settings, train = self.ctx.sets[name], self.store.split("train")
        if settings.like:
            return self.num_accepted(settings.like, seed)
        labels = self.store.labels[train]
        answers = labels.copy()
        answers[:: round(1 / MISTAKEN)] += 1
        num_classes = self.store.num_classes
        guess = F.one_hot(torch.from_numpy(answers % num_classes), num_classes)
        return len(pick_sources(settings, guess, labels))

    def num_accepted(self, name: str, seed: int) -> int:
        """Images of a set, or as many as are to be expected."""
        artefact, settings = self.ctx.image_set(name, seed), self.ctx.sets[name]
        if self.is_built and artefact.standing().state == State.FINISHED:
            return sum(record["accepted"] for record in read_records(artefact.path.parent))
        return round(self.num_sources(name, seed) * (ACCEPTED if settings.guided else 1))

    def count_targets(self) -> None:
        """What teachers are asked, and what the cache holds of it, its limit included."""
        stage = self.stage("teachers' answers (cache)")
        cached: dict[Any, int] = {}
        trunks: set[str] = set()
        total, limit = 0, self.recipe.data.cache_gb * 1e9
        for seed, names in students_alike(self.recipe):
            student = self.ctx.students[names[0]]
            due = any(self.is_due(self.ctx.student(name, seed)) for name in names)
            if not due or not student.has_teachers or student.train.mix != "none":
                continue
            num_images, rows = self.num_training(student, seed), self.cached_rows(student)
            more = (student.augmented, student.augmented_ratio, student.rebalance, student.helper)
            plain = not student.augmented and student.rebalance == "none"
            images = (*more, student.train.view_seed, 0 if plain else seed)
            for view in self.views(student):
                files = {(name, view, images): num_images * row for name, row in rows.items()}
                missing = {file: size for file, size in files.items() if file not in cached}
                asked = sorted({str(Path(name).parent) for name, *_ in missing})
                trunks |= {*asked}
                stage.images += num_images * len(asked)
                stage.seconds += num_images * sum(map(self.ask_seconds, asked))
                cached |= missing
                total += sum(missing.values())
                for file in [*cached]:  # the oldest first
                    if total > limit and file not in files:
                        total -= cached.pop(file)
                stage.disk = max(stage.disk, total)
                self.grow("answers", sum(files.values()))
        stage.to_make = len(trunks)

    def views(self, student: Distill) -> list[int]:
        """The augmentations of which a student asks for its teachers' answers."""
        data, train = self.recipe.data, student.train
        if student.loss == "simkd":  # only jtt asks, for the first
            return [0] if student.has_biased else []
        if not (data.random_crop or data.flip):
            return [0]
        return [*range(min(train.epochs, train.num_views or train.epochs))]

    def cached_rows(self, student: Distill) -> dict[str, int]:
        """Files that the cache holds for a student, with their bytes an image."""
        self.stand_in(frozen := frozen_networks(student, self.trial))
        size = 8 if self.trial.runtime.dtype == torch.float64 else 4
        rows = {artefact.name: size * self.store.num_classes for artefact in frozen}
        if student.has_features:
            for artefact in frozen:
                pooled = 2 * self.trial.network(artefact).head.in_features
                rows[str(Path(artefact.name).with_name("pooled"))] = pooled
        return rows

    def ask_seconds(self, folder: str) -> float:
        """One image, asked of the network whose files stand in a folder."""
        name = f"{folder}/model" if folder == "bias-model" else f"{folder}/erm"
        trial, artefact = self.trial, self.trial.described(name)
        self.stand_in([artefact])
        model = trial.network(artefact)
        settings = trial.data_settings | {"asked": "to measure"}
        targets = Targets([model], 1, trial.store, settings, trial.runtime, 0)
        what = digest("ask", model.arch, dataclasses.asdict(model.input))
        if what not in self.seconds:
            targets.prepare(0)  # warms up
        return self.timed(what, lambda: targets.prepare(1)) / len(targets.indices)

    def count_sets(self) -> None:
        """Generated images, and the generator where one is trained."""
        num_train, own = len(self.store.split("train")), False
        for seed, (name, settings) in itertools.product(
            self.recipe.seeds, self.recipe.augments.items()
        ):
            stage, sources = self.stage(f"images {name}"), self.num_sources(name, seed)
            if not self.is_due(self.ctx.image_set(name, seed)):
                stage.finished += 1
                continue
            own |= not settings.generator
            pace, rounds = self.set_pace(name, seed), 1.0
            if settings.guided and settings.iterations:
                rounds = max(1.0, (1 - ACCEPTED / 2) * (settings.iterations + 1))
            stage.to_make += 1
            stage.images += sources
            stage.steps += round(sources * rounds)
            stage.disk += sources * pace.disk
            stage.seconds += pace.setup + sources * (pace.first + (rounds - 1) * pace.iteration)
            if not settings.like:
                stage.seconds += num_train * self.student_pace(settings.student).predict
            extra = self.num_accepted(name, seed) * store_bytes(1, self.store.data.size)
            self.grow("images", extra)
        if own:
            self.count_generator()

    def set_pace(self, name: str, seed: int) -> SetPace:
        """What a set costs, measured once for all seeds."""
        if name not in self.set_paces:
            settings, trial = self.ctx.sets[name], self.trial
            self.stand_in([*trial.teachers("dfr"), trial.student(settings.student, seed)])
            began = time.process_time()
            untrained = replace(trial.recipe, diffusion=replace(trial.recipe.diffusion, epochs=0))
            source = settings.generator or str(
                train_generator(replace(trial, recipe=untrained), trial.runtime)
            )
            load_pipeline(source)  # the first time it imports much
            self.stage("start").seconds += time.process_time() - began
            artefact = trial.image_set(name, seed)
            self.set_paces[name] = measure_set(settings, artefact, seed, trial, source)
        return self.set_paces[name]

    def count_generator(self) -> None:
        section, artefact = self.recipe.diffusion, self.ctx.generator()
        stage, trial = self.stage("generator"), self.trial
        if not self.is_due(artefact):
            stage.finished = 1
            return
        pace = self.pace(
            "generator", lambda: diffusion_job(trial.generator(), trial, trial.runtime)
        )
        num_images = len(self.store.split("train"))
        train = Train(
            section.epochs, section.batch_size, checkpoint_minutes=section.checkpoint_minutes
        )
        stage.to_make = 1
        self.count_training(stage, pace, Course(train, num_images, section.epochs, artefact.work))
        stage.disk += folder_bytes(trial.generator().path.with_name("pipeline"))
        stage.disk += section.epochs * pace.history

    def predict_seconds(self, arch: str, input: Input) -> float:
        """Predicting one image."""
        trial, what = self.trial, digest("predict", arch, dataclasses.asdict(input))
        indices = first_block(trial.store)
        if what not in self.seconds:
            model = build_model(arch, "random", trial.store.num_classes, input, 0)
            model.to(trial.runtime.device, trial.runtime.dtype)
            predict([model], trial.store, indices[:64], trial.runtime)  # warms up
            self.timed(what, lambda: predict([model], trial.store, indices, trial.runtime))
        return self.seconds[what] / len(indices)

    def count_evaluation(self) -> None:
        """Predictions of every network, and what the report takes whatever their number."""
        trial, recipe, store = self.trial, self.recipe, self.store
        teachers = [recipe.teachers.of(i) for i in range(recipe.teachers.num_teachers)]
        trunks = [(section.arch[0], section.input) for section in teachers]
        if recipe.bias_model.kind != "teacher":
            trunks.append((recipe.bias_model.arch, recipe.bias_model.input))
        alone = []  # students, to choose one
        for _, names in students_alike(recipe):
            student = (self.ctx.students[names[0]].arch, self.ctx.students[names[0]].input)
            trunks.append(student)
            alone += [student for _ in names]
        stage = self.stage("evaluation")
        stage.to_make, stage.images = len(trunks), len(store.split(recipe.eval.split))
        self.stand_in([trial.teacher(0, "erm")])
        without_probes = replace(trial.recipe, eval=replace(recipe.eval, probes=False))
        plain = replace(trial, recipe=without_probes)
        stage.seconds = self.timed("report", lambda: run_eval(plain))
        stage.seconds += stage.images * sum(self.predict_seconds(*trunk) for trunk in trunks)
        stage.seconds += len(store.split("selection")) * sum(
            self.predict_seconds(*student) for student in alone
        )
        stage.disk = sum(path.stat().st_size for path in trial.out.glob("*") if path.is_file())
        if recipe.eval.probes:
            path = trial.teacher(0, "erm").path
            scored = {"": [Scored("", "", path)]}
            seconds = self.timed("probes", lambda: probe_models(trial, scored))
            few, every = (len(each.split("val")) for each in (trial.store, store))
            stage.seconds += seconds * len(trunks) * every / few
        if recipe.eval.analysis:
            stage.seconds += self.analysis_seconds()

    def analysis_seconds(self) -> float:
        """Eval.analysis: the training and the scored images, of students and the networks that they
        learnt from; then the scored ones again, as a row's features and in a student's batches."""
        recipe, store = self.recipe, self.store
        num_scored = len(store.split(recipe.eval.split))
        networks: dict[str, tuple[str, Input]] = {}
        for seed, names in students_alike(recipe):
            student = self.ctx.students[names[0]]
            networks[f"{names[0]}, {seed}"] = student.arch, student.input
            for frozen in frozen_networks(student, self.trial):
                networks[str(Path(frozen.name).parent)] = self.network(frozen)
        parts = {"train", recipe.eval.split}
        num_images = sum(len(store.split(part)) for part in parts)
        seconds = num_images * sum(self.predict_seconds(*each) for each in networks.values())
        for name, student in recipe.students.items():
            seconds += num_scored * self.predict_seconds(student.arch, student.input)
            if student.has_teachers:
                image = self.student_pace(name).step / student.train.batch_size
                seconds += len(recipe.seeds) * num_scored * image
        return seconds

    # What is printed

    @property
    def total_seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages.values())

    def memory(self) -> int:
        """Peak bytes: what was measured, and what grows with the data."""
        rows = checked_rows(self.recipe.data, self.recipe.root)
        mapped = stored_bytes(rows, self.recipe.data, is_encoded(rows, self.recipe.data))
        few = store_bytes(len(self.trial.store.labels), self.store.data.size)
        measured = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return round(measured + max(0, mapped - few) + sum(self.growth.values()))

    def disk_lines(self) -> list[str]:
        """What is written where, with a warning where it does not fit."""
        below_store = ("image store", "teachers' answers (cache)")
        stored = sum(self.stages[name].disk for name in below_store if name in self.stages)
        made = sum(stage.disk for stage in self.stages.values()) - stored
        places = [(self.ctx.out, made + self.checkpoint, "--out"),
                  (Path(self.recipe.data.store), stored, "Data.store")]
        lines = []
        for folder, count, flag in places:
            existing = next(path for path in (folder.absolute(), *folder.absolute().parents)
                            if path.exists())
            free = shutil.disk_usage(existing).free
            lines.append(f"Disk: {in_bytes(count)} below {folder}, {in_bytes(free)} free.")
            if count > free:
                lines.append(f"warning: {folder} has too little room: make some, or name another "
                             f"disk as {flag}.")
        lines[0] += f" Checkpoints of it: at most {in_bytes(self.checkpoint)} at a time."
        return lines

    def text(self) -> str:
        """The table, and what it comes to."""
        ctx, device = self.ctx, self.trial.runtime.device
        header = ["stage", "to make", "finished", "images", "epochs", "steps", "disk", "time"]
        rows = [stage.cells() for stage in self.stages.values()]
        title = f"\nDry run of {ctx.name}: nothing is made in {ctx.out}.\n"
        lines = [title, table(header, rows), ""]
        if not self.is_built:
            lines.append(
                "The image store is not built yet, so what is finished cannot be told: all counts."
            )
        if any(name.startswith("images ") for name in self.stages):
            lines.append(
                f"Guessed: of a guided set's sources {100 * ACCEPTED:.0f} % pass, halfway through "
                "their iterations."
            )
        if any(each.sources == "misclassified" for each in self.recipe.augments.values()):
            lines.append(
                f"Guessed: a student gets {100 * MISTAKEN:.0f} % of the training images wrong, "
                "from which a set of its mistakes begins."
            )
        lines += self.disk_lines()
        memory = f"{self.memory() / 2**30:.2f} GiB of memory"
        if device.type == "cuda":
            memory += f", {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB on the GPU"
        seconds = self.total_seconds
        lines.append(
            f"Would take {seconds:.0f} s ({seconds / 3600:.2f} hours), at most {memory}: estimated "
            f"from steps measured here, {ctx.runtime.precision} on one {device.type} process."
        )
        return "\n".join(lines)


def dry_run(ctx: Context) -> DryRun:
    """Count and time what `run` would do; prints it, and writes in a temporary folder only."""
    if ctx.runtime.accelerator.num_processes > 1:
        raise Problem("--dry-run measures one process: start it with `python grokd.py run`.")
    with tempfile.TemporaryDirectory(prefix="grokd-") as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            plan = DryRun(ctx, Path(folder))
            plan.count()
        say(plan.text())
    return plan


# ---- Command line --------------------------------------------------------------------------------

COMMANDS = {
    "teachers": "train the teachers and refit their heads on balanced data (DFR)",
    "bias-model": "train the deliberately biased model, or take a teacher's parent",
    "distill": "train the students",
    "augment": "generate images on which the teachers are sure and a student is wrong",
    "eval": "score everything found, by group, and write the report",
    "run": "all of the above in order",
    "export": "write a finished student, checked, as files that need no grokd",
}
STUDENTS = (
    "Students to train, by name; all if none is named. A flag that changes a student shows in its "
    "output's name. Values shown here are the first one's."
)
SETS = "Sets to make, by name; all if none is named. Otherwise as for --student of distill."
MODELS = "Score just these weights files of grokd's, whichever recipe or run they are of."
DRY_RUN = (
    "Make nothing: count what is to be made, its disk space, memory and hours. Every kind of step "
    "is timed for some seconds on a few images, on this device, in a temporary folder. One process "
    "only."
)


def overview() -> str:
    """What `--help` prints."""
    lines = [(__doc__ or "").partition("\nMap of this file")[0].strip(), "", "Commands:"]
    lines += [f"  {name:<12}{text}" for name, text in COMMANDS.items()]
    recipes, programs = list[str](), list[str]()
    for path in recipe_files():
        try:
            source = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # what is wrong with it is said when it is called
        first_line = (ast.get_docstring(source) or "").partition("\n")[0]
        kind = recipes if defines_recipe(source) else programs
        kind.append(f"  {path.stem:<24}{first_line}")
    lines += ["", "Recipes:", *recipes, "", "Programs beside them (python recipes/NAME.py --help):"]
    return "\n".join([*lines, *programs])


def defines_recipe(source: ast.Module) -> bool:
    """Does a file of recipes/ define a recipe? The others are programs."""
    assignments = (node for node in source.body if isinstance(node, ast.Assign | ast.AnnAssign))
    names = (name for node in assignments for name in ast.walk(node) if isinstance(name, ast.Name))
    return any(name.id == "recipe" and isinstance(name.ctx, ast.Store) for name in names)


def recipe_files() -> list[Path]:
    """Recipes that have a bare name: those of ./recipes, then those beside this file."""
    folders = [Path("recipes"), Path(__file__).parent / "recipes"]
    files = {path.stem: path for folder in reversed(folders) for path in folder.glob("*.py")}
    return [files[name] for name in sorted(files)]


def load_recipe(name: str) -> Recipe:
    """The recipe of a file, by path or by bare name; of several in `recipes`, NAME:WHICH."""
    by_name = {path.stem: path for path in recipe_files()}
    file, _, variant = name.partition(":")
    path = Path(file) if Path(file).is_file() else by_name.get(file)
    if path is None:
        raise Problem(f"Unknown recipe {file!r}{suggest(file, [*by_name])}")
    module = import_file(path)
    variants = getattr(module, "recipes", {})
    if variant and not (isinstance(variants, Mapping) and variant in variants):
        raise Problem(f"{path} has no recipe {variant!r}{suggest(variant, [*variants])}")
    recipe = variants[variant] if variant else getattr(module, "recipe", None)
    if not isinstance(recipe, Recipe):
        raise Problem(
            f"{path} defines no `recipe = Recipe(...)`: if it is a program, call it by itself."
        )
    check_recipe(recipe, path.name)
    return recipe


def import_file(path: Path) -> types.ModuleType:
    """Run a recipe's file as a module; recipes beside it can be imported by it."""
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    if not (spec and spec.loader):
        raise Problem(f"{path} is no recipe: its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.parent.resolve()))
    writes_bytecode = sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # it would hide an edit of the same second and length
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        line = next((f.lineno for f in reversed(frames) if f.filename == str(path)), None)
        line = getattr(error, "lineno", line)
        reason = " ".join(str(error).split())
        raise Problem(f"{path}, line {line}: {type(error).__name__}: {reason}.") from error
    finally:
        sys.path.pop(0)
        sys.dont_write_bytecode = writes_bytecode
    return module


@contextlib.contextmanager
def parsing_sources_once() -> Iterator[None]:
    """Up to Python 3.12, `inspect` parses a whole file for each class in it whose comments tyro
    shows: a fifth of a second, for each class and each student."""
    with unittest.mock.patch.object(ast, "parse", functools.cache(ast.parse)):
        yield


def parse(kind: Any, default: Any, args: Sequence[str], prog: str, description: str) -> Any:
    """tyro, with its boxed errors said in one line."""
    boxed = io.StringIO()
    is_first = int(os.environ.get("RANK", 0)) == 0
    try:
        with contextlib.redirect_stderr(boxed):
            return tyro.cli(
                kind, default=default, args=args, prog=prog, description=description,
                console_outputs=is_first,
            )
    except SystemExit as end:
        if end.code in (0, None):
            raise
        lines = [line.strip(" │") for line in boxed.getvalue().splitlines()]
        lines = [line for line in lines if line and not set(line) & set("╭╰")]
        rule = next((i for i, line in enumerate(lines) if not line.strip("─")), len(lines))
        message = " ".join(lines[:rule]).rstrip(".")
        meant = lines[rule:] if "Perhaps you meant:" in lines else []
        near = [line.split()[0].rstrip(",") for line in meant if line.startswith("--")]
        # A stage's own command has its flags without its name: --alpha for --distill.alpha.
        shorter = {
            arg: f"--{arg.partition('.')[2]}"
            for arg in args if arg.startswith("--") and "." in arg and arg in message
        }
        if shorter and not near:
            with contextlib.suppress(Problem):
                parse(kind, default, [shorter.get(a, a) for a in args], prog, description)
                near = [flag.partition("=")[0] for flag in shorter.values()]
        if near:
            message += f"; did you mean {' or '.join(dict.fromkeys(near))}?"
        raise Problem(f"{message} (see {prog} --help).") from None


def default_out(name: str) -> str:
    """Where results of a recipe stand unless --out says otherwise."""
    file, _, variant = name.partition(":")
    parts = [Path(file).name.removesuffix(".py"), variant]
    return f"runs/{'-'.join(part for part in parts if part)}"


class Own(NamedTuple):
    """Flags that one command alone has."""

    models: tuple[Path, ...] = ()  # of eval
    dry_run: bool = False  # of run


class Choice(NamedTuple):
    """A part of the recipe that holds many sections by name, of which a command picks some."""

    part: str  # of the recipe
    flag: str  # that picks
    section: str  # of flags
    help: str


CHOICES = {
    "distill": Choice("students", "student", "distill", STUDENTS),
    "run": Choice("students", "student", "distill", STUDENTS),
    "augment": Choice("augments", "set", "augment", SETS),
}


def flag_sections(command: str) -> dict[str, Any]:
    """Sections whose fields are flags of a command; run's carry the section's name."""
    kinds: dict[str, Any] = {
        "data": Data, "teachers": Teachers, "bias_model": BiasModel, "distill": Distill,
        "diffusion": Diffusion, "eval": Eval,
    }
    if command == "run":
        return kinds
    if command == "augment":
        return {"augment": Annotated[Augment, FLAT], "diffusion": Diffusion}
    if command == "export":
        return {"export": Annotated[Export, FLAT]}
    key = command.replace("-", "_")
    return {key: Annotated[kinds[key], FLAT]}


class Flags:
    """The command line of one command: what tyro parses, with a recipe's values as defaults."""

    def __init__(self, command: str, recipe: Recipe, name: str, args: Sequence[str]) -> None:
        self.recipe, self.choice = recipe, CHOICES.get(command)
        self.prog = f"grokd.py {command} {name}"
        self.text = f"{COMMANDS[command].capitalize()}. "
        self.text += f"Values shown are those of the recipe {name}."
        self.common = Common(recipe.root, default_out(name), recipe.seeds)
        self.args = [part for arg in args for part in self._split(arg)]
        self.kinds = flag_sections(command)
        options: list[Any] = [*self.kinds.items(), ("common", Annotated[Common, FLAT])]
        if self.choice:
            names = Annotated[tuple[str, ...], tyro.conf.arg(help=self.choice.help)]
            options.append((self.choice.flag, names, field(default=())))
            self.text += f" Its {self.choice.flag}s: {', '.join(self.every)}."
        if command == "eval":
            paths = Annotated[tuple[Path, ...], tyro.conf.arg(help=MODELS)]
            options.append(("models", paths, field(default=())))
        if command == "run":
            switch = Annotated[bool, tyro.conf.arg(help=DRY_RUN)]
            options.append(("dry_run", switch, field(default=False)))
        self.type: Any = dataclasses.make_dataclass("Flags", options, frozen=True)

    def _split(self, arg: str) -> list[str]:
        """--student=NAME as --student NAME: their values are read before tyro parses."""
        if self.choice and arg.startswith(f"--{self.choice.flag}="):
            return arg.split("=", 1)
        return [arg]

    @property
    def every(self) -> Mapping[str, Any]:
        """The students or sets to pick from."""
        return getattr(self.recipe, self.choice.part) if self.choice else {}

    def picked(self) -> list[str]:
        """Names after --student or --set, all if there are none.

        Their values are the defaults that tyro shows, so they are read before it parses."""
        assert self.choice
        flag = f"--{self.choice.flag}"
        if flag not in self.args:
            return [*self.every]
        last = len(self.args) - self.args[::-1].index(flag)  # the last one counts, as in tyro
        names = list(itertools.takewhile(lambda arg: not arg.startswith("-"), self.args[last:]))
        for name in names:
            if name not in self.every:
                hint = suggest(name, [*self.every])
                raise Problem(f"Unknown {self.choice.flag} {name!r}{hint}")
        return names or [*self.every]

    def change_each(self) -> bool:
        """Does a flag concern the students or sets? If not, there is no need to parse for each."""
        if not self.choice:
            return False
        prefix = "" if FLAT in typing.get_args(self.kinds[self.choice.section]) else "distill"
        options = {arg.partition("=")[0].replace("_", "-") for arg in self.args}
        options = {re.sub(r"(--|\.)no-", r"\1", option) for option in options}
        section = next(iter(self.every.values()))
        names = (setting.name.replace("_", "-") for setting in settings_in(section, prefix))
        return any(f"--{name}" in options for name in names)

    def parse(self, name: str = "") -> tuple[Any, Any]:
        """Defaults, with the values of one student or set, and the flags on top of them."""
        sections = {
            key: self.every[name] if name and self.choice and key == self.choice.section
            else getattr(self.recipe, key)
            for key in self.kinds
        }
        default = self.type(**sections, common=self.common)
        return default, parse(self.type, default, self.args, self.prog, self.text)


@parsing_sources_once()
def apply_flags(
    command: str, recipe: Recipe, name: str, args: Sequence[str]
) -> tuple[Recipe, Common, Own]:
    """The recipe with the command line's flags on top, the common flags, and the command's own."""
    flags = Flags(command, recipe, name, args)
    if flags.choice and not flags.every:
        raise Problem(f"The recipe {name} names no {flags.choice.part}.")
    names = flags.picked() if flags.choice else [""]
    default, given = flags.parse(names[0])
    if changes := differences(flatten(default), flatten(given)):
        say(f"Flags over the recipe: {changes}")
    check(given.common, Common, "flags")
    changed = {
        key: getattr(given, key) for key in flags.kinds
        if not flags.choice or key != flags.choice.section
    }
    for key, section in changed.items():
        warn_without_effect([(getattr(recipe, key), section)], key)
    new_names: dict[str, str] = {}
    if flags.choice:
        pairs = [(flags.every[each], flags.every[each]) for each in names]
        if flags.change_each():
            section = flags.choice.section
            parsed = [flags.parse(each) for each in names]
            pairs = [tuple(getattr(each, section) for each in pair) for pair in parsed]
        warn_without_effect(pairs, ", ".join(names))
        new_names = {
            name: changed_name(name, *pair) for name, pair in zip(names, pairs, strict=True)
        }
        changed[flags.choice.part] = {
            new_names[name]: after for name, (_, after) in zip(names, pairs, strict=True)
        }
    common = given.common
    new = replace(recipe, **changed, root=common.root, seeds=common.seeds)
    new = replace(
        new,
        students={key: renamed(each, new_names) for key, each in new.students.items()},
        augments={key: renamed(each, new_names) for key, each in new.augments.items()},
    )
    check_recipe(new, "flags", recipe)
    own = Own(getattr(given, "models", ()), getattr(given, "dry_run", False))
    return new, common, own


def altered(before: Any, after: Any) -> list[Setting]:
    """The settings of a section that flags have changed."""
    old = flatten(before)
    return [s for s in settings_in(after) if old[s.name] != plain(s.value)]


def warn_without_effect(pairs: Sequence[tuple[Any, Any]], where: str) -> None:
    """Say which flags change nothing in any of the sections (before, after)."""
    idle: dict[str, Setting] = {}
    for before, after in pairs:
        for setting in altered(before, after):
            idle.setdefault(setting.name, setting)
    for _, after in pairs:
        for setting in settings_in(after):
            if setting.active:
                idle.pop(setting.name, None)
    for setting in idle.values():
        needed = " and ".join(map(str, setting.whens))
        say(f"warning: {setting.name} has no effect on {where}: it belongs to {needed}.")


LONGEST_NAME = 80


def changed_name(name: str, before: Any, after: Any) -> str:
    """The name of a student or set that flags changed: with what they set, as far as it matters;
    the rest of a long one as a hash."""
    parts = [name]
    for setting in altered(before, after):
        if setting.active and Mark.INERT not in setting.marks:
            value = setting.value
            each = [plain(v) for v in (value if isinstance(value, tuple) else (value,))]
            parts.append(f"{setting.name}={','.join(map(str, each))}")
    new = re.sub(r"[^\w.+=,-]+", "_", "+".join(parts))
    if len(new) <= LONGEST_NAME:
        return new
    return f"{new[: LONGEST_NAME - 9]}~{digest(new)[:8]}"


def renamed(section: Any, new_names: Mapping[str, str]) -> Any:
    """A student or set that refers to others by their new names."""
    names = {
        setting.name: new_names[setting.value]
        for setting in settings_in(section)
        if setting.names and setting.value in new_names
    }
    return replace(section, **names)


def check_generators(recipe: Recipe, out: Path) -> None:
    """Raise Problem for a generator's folder that is not there, unless its sets are complete."""
    for name, images in recipe.augments.items():
        notes = [out / "augmented" / name / f"seed{seed}" / "done.json" for seed in recipe.seeds]
        is_folder = images.generator.count("/") > 1  # a hub id has one slash at most
        absent = is_folder and not Path(images.generator).is_dir()
        if absent and not all(note.is_file() for note in notes):
            raise Problem(
                f"augments[{name!r}].generator: there is no folder {images.generator}: name one "
                "with a diffusers pipeline, or first run the recipe that makes it."
            )


def check_resume(ctx: Context) -> None:
    """Raise Problem if nothing that the command makes is finished or begun."""
    artefacts = []
    if "teachers" in ctx.makes:
        artefacts += ctx.teachers("erm")
    if "bias-model" in ctx.makes:
        artefacts.append(ctx.bias())
    for seed in ctx.recipe.seeds:
        if "distill" in ctx.makes:
            artefacts += [ctx.student(name, seed) for name in ctx.recipe.students]
        if "augment" in ctx.makes:
            artefacts += [ctx.image_set(name, seed) for name in ctx.recipe.augments]
    if all(artefact.standing().state == State.MISSING for artefact in artefacts):
        raise Problem(f"--resume: nothing of it was begun in {ctx.out}: start without the flag.")


def agreed_settings(ctx: Context) -> dict[str, Any]:
    """What all processes of a command must have alike: data, recipe and flags."""
    recipe, common = ctx.recipe, ctx.common
    sections = [("teachers", recipe.teachers), ("bias-model", recipe.bias_model)]
    sections += [("diffusion", recipe.diffusion), ("eval", recipe.eval)]
    sections += [("export", recipe.export)]
    sections += [*recipe.students.items(), *recipe.augments.items()]
    settings = {
        f"{name}: {key}": value
        for name, section in sections for key, value in flatten(section).items()
    }
    settings |= {key: getattr(common, key) for key in ("seeds", "parallel", "redo")}
    return settings | {"makes": ctx.makes, "precision": ctx.runtime.precision} | ctx.data_settings


def check_processes(ctx: Context) -> None:
    """Raise Problem, on all processes, if one has other data, settings or results than the first.

    A disk of each node will do for Data.store, but not for --out, through which models pass.
    """
    runtime = ctx.runtime.together()
    if runtime.world == 1:
        return
    settings = agreed_settings(ctx)

    def show() -> tuple[str, dict[str, Any]]:
        name = f".process-{secrets.token_hex(4)}"
        write_file(ctx.out / name, "")
        return name, settings

    name, settings_of_first = runtime.first(show)
    told = ""
    if changes := differences(settings_of_first, settings):
        told = f"differs from the first one (→): {textwrap.shorten(changes, 300)}. Start all alike."
    elif not (ctx.out / name).is_file():
        told = (
            f"does not see in {ctx.out} what the first one wrote: models pass through that folder, "
            "so name one as --out that all nodes share. Data.store may be a disk of each node."
        )
    answers = gather_object([told])
    runtime.first((ctx.out / name).unlink)  # before any of them ends
    for process, answer in enumerate(answers):
        if answer:
            raise Problem(f"Process {process} {answer}")


def run_stages(ctx: Context) -> None:
    """Distil students and make sets of images, in the order in which they need each other."""
    students = ctx.recipe.students if "distill" in ctx.makes else {}
    sets = ctx.recipe.augments if "augment" in ctx.makes else {}
    order = dependencies(students, sets)
    order.prepare()
    while ready := order.get_ready():
        recipe = replace(
            ctx.recipe,
            students={name: students[name] for name in students if name in ready},
            augments={name: sets[name] for name in sets if name in ready},
        )
        step = replace(ctx, recipe=recipe)
        if recipe.students:
            run_distill(step)
        run_augment(step)
        order.done(*ready)


def command_line(argv: Sequence[str]) -> None:
    """Find command and recipe, apply flags, do the work."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        say(overview())
        return
    command = argv[0]
    if command not in COMMANDS:
        raise Problem(f"Unknown command {command!r}{suggest(command, [*COMMANDS])}")
    is_named = len(argv) > 1 and not argv[1].startswith("-")
    name, args = (argv[1], argv[2:]) if is_named else ("digits", argv[1:])
    loaded = load_recipe(name)
    recipe, common, own = apply_flags(command, loaded, name, args)
    if command in ("augment", "run"):
        check_generators(recipe, Path(common.out))
    began = time.monotonic()
    runtime = Runtime.start(common.precision)
    with watched(runtime.accelerator):
        find_store = counted_store if own.dry_run else open_store
        store = find_store(recipe.data, recipe.root)
        check_attributes(recipe, store)
        check_selection(recipe, store)
        makes = ["teachers", "bias-model", "distill", "augment"] if command == "run" else [command]
        ctx = Context(
            name, recipe, store, Path(common.out), runtime, common, makes,
            students={**loaded.students, **recipe.students},
            sets={**loaded.augments, **recipe.augments},
        )
        if own.dry_run:
            dry_run(ctx)
            return
        check_processes(ctx)
        if common.resume and command not in ("eval", "export"):
            check_resume(ctx)
        work(command, ctx, own.models)
    memory = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB of memory"
    if torch.cuda.is_available():
        memory += f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB on the GPU"
    say(f"Took {time.monotonic() - began:.0f} s, at most {memory}.")
    if command in NEXT and not own.models:
        say(f"Next: {next_command(command, name, loaded, common)}")
    runtime.accelerator.end_training()


NEXT = {
    "teachers": "bias-model", "bias-model": "distill", "distill": "eval", "augment": "distill",
    "eval": "export", "run": "export",
}


def next_command(command: str, name: str, recipe: Recipe, common: Common) -> str:
    """What to type when a command is done, with the flags that differ from the recipe as it is."""
    words = ["python", "grokd.py", NEXT[command], name]
    defaults = Common(recipe.root, default_out(name), recipe.seeds)
    for flag in ("root", "out", "precision"):
        if getattr(common, flag) != getattr(defaults, flag):
            words += [f"--{flag}", getattr(common, flag)]
    if common.seeds != defaults.seeds:
        words += ["--seeds", *map(str, common.seeds)]
    return shlex.join(words)


def work(command: str, ctx: Context, models: Sequence[Path]) -> None:
    """The stages of a command."""
    if command not in ("eval", "export"):
        say(banner(ctx), "", group_table(ctx.store), "")
    if command in ("teachers", "run"):
        run_teachers(ctx)
    if command in ("bias-model", "run"):
        run_bias_model(ctx)
    if command in ("distill", "augment", "run"):
        run_stages(ctx)
    if command in ("eval", "run"):
        run_eval(ctx, models)
    if command == "export":
        run_export(ctx)


def banner(ctx: Context) -> str:
    """What computes, how, and where to: one line."""
    runtime, device = ctx.runtime, ctx.runtime.device
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    if runtime.accelerator.num_processes > 1:
        name += f", {runtime.accelerator.num_processes} processes"
    threads = torch.get_num_threads()
    return (
        f"{ctx.name} on {name}, {runtime.precision}, {threads} thread{'s' * (threads > 1)}; results"
        f" in {ctx.out}, images and the teachers' answers in {ctx.store.folder.parent}"
    )


def group_table(store: Store) -> str:
    """Images of every group in every part of the data."""
    counts = [store.counts(part) for part in ("train", "reweighting", "selection", "test")]
    rows = []
    for g, group in enumerate(store.group_names):
        rows.append([group, *(str(count[g]) for count in counts)])
        if store.num_unknown:
            rows[g][1] = "–"
    if store.num_unknown:
        rows.append(["attribute unknown", str(store.num_unknown), *"–––"])
    header = ["group", "train", "val: reweighting", "val: selection", "test"]
    return table(header, rows)


def in_one_line(work: Callable[[], None]) -> None:
    """Do the work; problems become one line and exit status 1. For programs of recipes/ too."""
    try:
        work()
    except Problem as problem:
        sys.exit(f"error: {problem}")
    except BrokenPipeError:  # as in `--help | head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # files that libraries write
            sys.exit(
                f"error: {error.filename or 'A file'} could not be written ({error.strerror}): "
                "make room; the same command then goes on from where it was."
            )
        if not error.filename:
            raise
        sys.exit(
            f"error: {error.filename}: {error.strerror}: mend that, or choose other folders with "
            "--out and Data.store; the same command then goes on from where it was."
        )
    except torch.OutOfMemoryError as error:
        # What is full and what was asked for, without the allocator's figures and advice.
        told = ". ".join(str(error).splitlines()[0].split(". ")[:2])
        sys.exit(
            f"error: {told}: set a smaller --micro-batch (in recipes: micro_batch, also of "
            "diffusion and of each set of images), or --precision bfloat16, or free memory there. "
            "Checkpoints are kept: the same command goes on from where it was."
        )
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on from the last checkpoint")


def main() -> None:
    """Entry point."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a sign that the terminal has not ends no run
            stream.reconfigure(errors="replace")
    in_one_line(lambda: command_line(sys.argv[1:]))


if __name__ == "__main__":
    main()
