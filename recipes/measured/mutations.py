"""Deliberate faults of grokd.py, and whether the tests notice them.

    python recipes/measured/mutations.py                    # all, one after the other
    python recipes/measured/mutations.py "cache key: seed"  # some, by name: nothing is recorded

Each fault is put into a copy of the repository in a temporary folder, and the tests that must fail
are run there. Written is recipes/measured/mutations.json.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import grokd  # noqa: E402

RECORD = Path(__file__).with_suffix(".json")


class Fault(NamedTuple):
    """A text of grokd.py, which stands there once, and the wrong one in its place."""

    name: str
    old: str
    new: str
    tests: str  # pytest's arguments


FAULTS = [
    # Settings
    Fault(
        "conditions do not follow from each other",
        "_fulfils(getattr(section, name), condition) and matters(section, name)",
        "_fulfils(getattr(section, name), condition)",
        "tests/test_source.py -k conditions",
    ),
    Fault(
        "any value but: that value",
        "return value != condition.value",
        "return value == condition.value",
        "tests/test_source.py -k new_field",
    ),
    # Random streams
    Fault(
        "another hash",
        "np.uint64(0xBF58476D1CE4E5B9)",
        "np.uint64(0xBF58476D1CE4E5B8)",
        "tests/test_data.py -k splitmix64",
    ),
    Fault(
        "another stream of flips",
        "    FLIP = 99",
        "    FLIP = 98",
        "tests/test_data.py -k crop_and_flip",
    ),
    # AGRE and the other weightings
    Fault(
        "agre: twice the weight",
        "weights = (u * k_u).sum(-1) / 2",
        "weights = (u * k_u).sum(-1)",
        "tests/test_weights.py -k closed_form",
    ),
    Fault(
        "agre: weights of a tenth are nil",
        "torch.where(weights < 1e-5, 0, weights)",
        "torch.where(weights < 1e-1, 0, weights)",
        "tests/test_weights.py -k 'closed_form or down_to_the_floor'",
    ),
    Fault(
        "distillation: tau, not its square",
        "return tau**2 * F.kl_div(",
        "return tau * F.kl_div(",
        "tests/test_weights.py -k slow_formula",
    ),
    Fault(
        "shrinking adds",
        "return (1 - shrink) * weights + shrink",
        "return weights + shrink",
        "tests/test_weights.py -k slow_formula",
    ),
    Fault(
        "gce without its divisor",
        "return (1 - torch.exp(-q * cross_entropy(logits, labels))) / q",
        "return 1 - torch.exp(-q * cross_entropy(logits, labels))",
        "tests/test_weights.py -k gce",
    ),
    Fault(
        "departure keeps teachers without skill",
        "if 3 * skill[t] >= max(skill)",
        "if 3 * skill[t] >= 0",
        "tests/test_departure.py -k 'formula or without_skill'",
    ),
    Fault(
        "departure keeps teachers below the gap",
        "if max(falls, default=0) <= departure_gap:",
        "if True:",
        "tests/test_departure.py -k 'formula or left_out'",
    ),
    Fault(
        "departure divides at the first gap, not the greatest",
        "count = falls.index(max(falls)) + 1",
        "count = [fall > departure_gap for fall in falls].index(True) + 1",
        "tests/test_departure.py -k 'above_a_gap or gap_do_not_count'",
    ),
    Fault(
        "departure trusts a bad teacher that departs most",
        "if 3 * own >= 2 * others:",
        "if True:",
        "tests/test_departure.py -k alone_above",
    ),
    Fault(
        "merit counts where a teacher is wrong",
        "counted = counted + torch.where(right, gap, 0).sum(1)",
        "counted = counted + gap.sum(1)",
        "tests/test_departure.py -k 'formula or left_out'",
    ),
    # Feature distillation
    Fault(
        "attention of absolute values",
        "F.normalize(features.square().mean(1).flatten(1), dim=1)",
        "F.normalize(features.abs().mean(1).flatten(1), dim=1)",
        "tests/test_features.py -k attention",
    ),
    Fault(
        "contrastive: another temperature",
        "student @ teacher.T / 0.07",
        "student @ teacher.T / 0.1",
        "tests/test_features.py -k contrastive",
    ),
    Fault(
        "a teacher's own parent counts",
        "                weights[t] = 0\n",
        "                weights[t] = 1\n",
        "tests/test_features.py -k own_parent",
    ),
    # Rivals
    Fault(
        "an image shown in vain counts",
        "if self.in_vain:",
        "if False:",
        "tests/test_device.py -k in_vain",
    ),
    Fault(
        "group DRO: a share falls to nothing",
        "q.clamp(min=SMALLEST_SHARE)",
        "q",
        "tests/test_rivals.py -k huge_losses",
    ),
    Fault(
        "dedier: never weighed anew",
        "        self.job.after_epoch(epoch)\n",
        "",
        "tests/test_rivals.py -k weighs_anew",
    ),
    Fault(
        "dedier: a readout that does not learn",
        "of_block[batch]).mean().backward()\n                    optimizer.step()",
        "of_block[batch]).mean().backward()",
        "tests/test_rivals.py -k literally",
    ),
    Fault(
        "dedier: earlier weights stay",
        "samples.weights.copy_(weights)",
        "samples.weights.copy_(torch.maximum(samples.weights, weights))",
        "tests/test_rivals.py -k weighs_anew",
    ),
    Fault(
        "dedier: the margin itself",
        "torch.exp(beta * margins**alpha)",
        "torch.exp(beta * margins)",
        "tests/test_rivals.py -k by_hand",
    ),
    # Head refitting
    Fault(
        "subsets are not balanced",
        "    size = min(map(len, members))\n",
        "    size = max(map(len, members))\n",
        "tests/test_dfr.py",
    ),
    Fault(
        "draws are not balanced",
        "cumulative = np.cumsum(1 / sizes[cells])",
        "cumulative = np.cumsum(np.ones(len(cells)))",
        "tests/test_dfr.py",
    ),
    Fault(
        "inferred groups: right is wrong",
        "return 2 * labels + (logits.argmax(-1).numpy() != labels)",
        "return 2 * labels + (logits.argmax(-1).numpy() == labels)",
        "tests/test_inferred.py -k inferred_cells",
    ),
    # Scores
    Fault(
        "worst group: the mean",
        '"wga": float(accuracy.min()),',
        '"wga": float(accuracy.mean()),',
        "tests/test_metrics.py",
    ),
    Fault(
        "adjusted mean without shares",
        "shares = train_counts[present].astype(float)",
        "shares = np.ones(int(present.sum()))",
        "tests/test_metrics.py",
    ),
    Fault(
        "ties of votes by number",
        "return (votes + 0.5 * probability).argmax(-1).numpy()",
        "return votes.argmax(-1).numpy()",
        "tests/test_metrics.py -k vote",
    ),
    # Basics
    Fault(
        "files are written in place",
        'part = path.with_name(f"{path.name}.part{os.getpid()}")',
        "part = path",
        "tests/test_trust.py -k keeps_the_old_file",
    ),
    Fault(
        "locks are shared",
        "fcntl.flock(file, fcntl.LOCK_EX |",
        "fcntl.flock(file, fcntl.LOCK_SH |",
        "tests/test_runs.py -k left_alone",
    ),
    Fault(
        "notes without a checksum",
        "if checksum not in (None, digest(content)):",
        "if checksum == 0:",
        "tests/test_trust.py -k every_byte",
    ),
    Fault(
        "states without a checksum",
        "if digest(content).encode() != end:",
        "if not end:",
        "tests/test_trust.py -k every_byte",
    ),
    # Data
    Fault(
        "a last batch of one image",
        "if cuts and n - cuts[-1] == 1 and batch_size > 1:",
        "if cuts and n - cuts[-1] == 2 and batch_size > 1:",
        "tests/test_trust.py -k joins_the_one_before",
    ),
    Fault(
        "store: blocks are not checked",
        "if place not in self.checked and zlib.crc32(content) != self.checksums[place]:",
        "if place < 0:",
        "tests/test_data.py -k damaged",
    ),
    Fault(
        "store: changed images are not seen",
        "return [str(image.absolute()), stat.st_size, stat.st_mtime_ns]",
        "return [str(image.absolute())]",
        "tests/test_data.py -k changed_image",
    ),
    Fault(
        "unknown attributes are 0",
        "return [int(value or -1) for value in values]",
        "return [int(value or 0) for value in values]",
        "tests/test_inferred.py -k may_lack",
    ),
    Fault(
        "16 bits are cut off",
        "(np.asarray(image) // 256).astype(np.uint8)",
        "np.asarray(image).clip(max=255).astype(np.uint8)",
        "tests/test_trust.py -k sixteen",
    ),
    Fault(
        "fewer images refit heads",
        "count = math.ceil(self.data.reweighting * len(members))",
        "count = math.floor(self.data.reweighting * len(members))",
        "tests/test_trust.py -k odd_image",
    ),
    # Models
    Fault(
        "no division by std",
        "(images.to(self.head.weight.dtype) - self.mean) / self.std)",
        "images.to(self.head.weight.dtype) - self.mean)",
        "tests/test_models.py -k 'plain_torchvision_network and resnet18'",
    ),
    Fault(
        "weights of NaN are taken",
        "    if all_finite(state.values()):\n        return\n",
        "    if state:\n        return\n",
        "tests/test_trust.py -k any_weights",
    ),
    Fault(
        "trunks that differ in normalisation share answers",
        "[model.arch, dataclasses.asdict(model.input)]",
        "[model.arch]",
        "tests/test_foreign.py -k its_own_images",
    ),
    Fault(
        "weights files without a checksum",
        'return metadata.pop("checksum") == digest([header, metadata], data)',
        'return bool(metadata.pop("checksum"))',
        "tests/test_trust.py -k every_byte",
    ),
    # Target cache
    Fault(
        "cache key: seed",
        '{**settings, "seed": seed, "precision": runtime.precision}',
        '{**settings, "precision": runtime.precision}',
        "tests/test_cache.py -k files_of_their_own",
    ),
    Fault(
        "cache key: precision",
        '{**settings, "seed": seed, "precision": runtime.precision}',
        '{**settings, "seed": seed}',
        "tests/test_trust.py -k another_precision",
    ),
    Fault(
        "cache key: head",
        "CachedFile(m, digest(trunk, identity, *head), row)",
        "CachedFile(m, digest(trunk, identity), row)",
        "tests/test_cache.py -k files_of_their_own",
    ),
    Fault(
        "cache: blocks are not checked",
        "if zlib.crc32(rows[first : first + BLOCK].tobytes()) != checksum:",
        "if not checksum:",
        "tests/test_trust.py -k changed_answer",
    ),
    # Artefacts
    Fault(
        "fingerprint without parents",
        "return digest(dict(self.settings), self._parent_fingerprints())",
        "return digest(dict(self.settings))",
        "tests/test_runs.py -k changed_teacher",
    ),
    Fault(
        "fingerprint with inert fields",
        "counts = setting.active and Mark.INERT not in setting.marks",
        "counts = setting.active",
        "tests/test_runs.py -k checkpoint_frequency",
    ),
    Fault(
        "files by name alone",
        'return f"{Path(path).name} {digest(contents)}"',
        "return Path(path).name",
        "tests/test_augment.py -k folder_contains",
    ),
    Fault(
        "folders are not checked",
        "if not file.is_file() or file_digest(file) != expected:",
        "if not file.is_file():",
        "tests/test_trust.py -k 'finished_run and (image or table)'",
    ),
    # Fit
    Fault(
        "resume without the optimiser",
        '            self.optimizer.load_state_dict(state["optimizer"])\n',
        "",
        "tests/test_runs.py -k 'killed_command and teachers'",
    ),
    Fault(
        "resume without the losses' end",
        "os.truncate(folder / LOSSES, 4 * num_epochs * num_images)",
        "pass",
        "tests/test_runs.py -k appended_cut",
    ),
    Fault(
        "loss that is not finite",
        "        if not math.isfinite(loss):\n",
        "        if loss is None:\n",
        "tests/test_runs.py -k not_finite",
    ),
    Fault(
        "weights that are not finite",
        "if not all_finite(self.model.state_dict().values()):",
        "if not self.model.state_dict():",
        "tests/test_trust.py -k weights_that_are_not_finite",
    ),
    Fault(
        "the cosine does not fall",
        "0.5 * (1 + math.cos(math.pi *",
        "0.5 * (1 + math.cos(0 *",
        "tests/test_trust.py -k learning_rate",
    ),
    # Stages
    Fault(
        "one head carries over to the next",
        "        model.head.load_state_dict(learnt_head)\n",
        "",
        "tests/test_trust.py -k heads_of_one_network",
    ),
    Fault(
        "rebalanced by class, not by group",
        "return rebalanced(store, store.cells[train], everywhere)",
        "return rebalanced(store, labels, everywhere)",
        "tests/test_trust.py -k rebalanced",
    ),
    Fault(
        "one class alone is not said",
        "len({*predicted}) == 1 < len(",
        "len({*predicted}) < 1 < len(",
        "tests/test_trust.py -k one_class",
    ),
    # Generated images
    Fault(
        "guidance without its exponent",
        "return (exponent * log_t).exp(),",
        "return log_t.exp(),",
        "tests/test_augment.py -k terms_equal",
    ),
    Fault(
        "images that the student gets right pass",
        "(verdict.student <= settings.max_student)",
        "(verdict.student <= 1)",
        "tests/test_augment.py -k guidance_raises",
    ),
    Fault(
        "steps down the gradient",
        "step = size * z.norm() * gradient / gradient.norm()",
        "step = -size * z.norm() * gradient / gradient.norm()",
        "tests/test_augment.py -k guidance_raises",
    ),
    Fault(
        "records without a checksum",
        "if checksum in (None, digest(record)):",
        "if record:",
        "tests/test_trust.py -k damaged_record",
    ),
    # Pages
    Fault(
        "the best group is called the worst",
        "names[int(np.nanargmin(accuracy))]",
        "names[int(np.nanargmax(accuracy))]",
        "tests/test_report.py -k hundred_columns",
    ),
    # Report
    Fault(
        "shipped by the test set",
        '    labels = ctx.store.labels[ctx.store.split("selection")]\n',
        '    labels = ctx.store.labels[ctx.store.split("test")]\n',
        "tests/test_departure.py -k student_to_ship",
    ),
    Fault(
        "ties go to the best",
        "key=lambda name: (costs[name], -means[name])",
        "key=lambda name: -means[name]",
        "tests/test_departure.py -k 'shipped or ties'",
    ),
    # Export
    Fault(
        "every file answers as the network does",
        'file["relative_delta"] <= MAX_DELTA',
        "MAX_DELTA > 0",
        "tests/test_export.py -k 'wrong_exporter or files_of_floats'",
    ),
    # Checks
    Fault(
        "no upper bounds",
        "limit.low <= value <= limit.high",
        "limit.low <= value",
        "tests/test_cli.py -k mistaken_recipes",
    ),
    Fault(
        "NaN is a number",
        "return type(value) in (int, float) and not math.isnan(value)",
        "return type(value) in (int, float)",
        "tests/test_cli.py -k mistaken_recipes",
    ),
    # Dry run
    Fault(
        "steps are not counted",
        "        stage.steps += steps\n",
        "        stage.steps += 1\n",
        "tests/test_dry_run.py -k foretells",
    ),
    # Command line
    Fault(
        "problems end with status 0",
        '        sys.exit(f"error: {problem}")\n',
        '        print(f"error: {problem}", file=sys.stderr)\n',
        "tests/test_cli.py -k exit_status",
    ),
    Fault(
        "recipes may end the program",
        "except (Exception, SystemExit) as error:",
        "except Exception as error:",
        "tests/test_trust.py -k ends_the_program",
    ),
    Fault(
        "processes may differ",
        "if changes := differences(settings_of_first, settings):",
        "if changes := differences(settings, settings):",
        "tests/test_processes.py -k cannot_work_together",
    ),
]


def is_caught(fault: Fault, folder: Path) -> tuple[bool, float]:
    """Do the tests fail in a copy of the repository with the fault? And the seconds they took."""
    source = ROOT / "grokd.py"
    text = source.read_text()
    if text.count(fault.old) != 1:
        sys.exit(f"{fault.name}: its text stands {text.count(fault.old)} times in grokd.py")
    (folder / "grokd.py").write_text(text.replace(fault.old, fault.new))
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-x", *shlex.split(fault.tests)]
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):  # 1: tests failed; else none ran, or pytest itself did not
        sys.exit(f"{fault.name}: {fault.tests} does not run:\n{done.stdout[-2000:]}")
    return done.returncode == 1, time.monotonic() - began


def main() -> None:
    names = sys.argv[1:]
    chosen = [fault for fault in FAULTS if not names or fault.name in names]
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "grokd"
        left_out = (".git", ".venv", "runs", "__pycache__", ".*_cache", "*.egg-info")
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*left_out))
        for fault in chosen:
            caught, seconds = is_caught(fault, folder)
            rows.append([fault.name, fault.tests, "yes" if caught else "no", f"{seconds:.0f} s"])
            print(*rows[-1], sep=" | ", flush=True)
    if not names:
        about = grokd.origin(1) | {"command": "python recipes/measured/mutations.py"}
        results = {"about": about, "header": ["fault", "tests", "caught", "time"], "rows": rows}
        RECORD.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
