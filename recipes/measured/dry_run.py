"""Does `run --dry-run` foretell what a run takes? Both, as processes of their own:

    python recipes/measured/dry_run.py "digits --seeds 0" [digits_augment ...] [--save FILE]

Each argument is a recipe with its flags. Store and results are made anew in a temporary folder, so
that the run starts from nothing; time is that of the whole process, memory its greatest resident
set, disk what stands there afterwards.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import grokd  # noqa: E402

EXPECTED = re.compile(r"Would take (\d+) s .*, at most ([\d.]+) GiB of memory")
DISK = re.compile(r"^Disk: ([\d.,]+) (MB|GB) below", re.MULTILINE)
CHECKPOINTS = re.compile(r"Checkpoints of it: at most ([\d.,]+) (MB|GB)")
HEADER = ["recipe", "", "expected", "measured", "expected / measured"]


class Cost(NamedTuple):
    seconds: float
    gibibytes: float  # of memory
    megabytes: float  # of disk


def process(args: list[str]) -> tuple[str, float, float]:
    """What grokd printed, its seconds and the greatest GiB of memory that it held."""
    began = time.monotonic()
    command = [sys.executable, str(ROOT / "grokd.py"), *args]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout
        printed = started.stdout.read()
        _, status, usage = os.wait4(started.pid, 0)
        started.returncode = os.waitstatus_to_exitcode(status)
    if started.returncode:
        raise SystemExit(f"{shlex.join(command)} ended with {started.returncode}:\n{printed}")
    return printed, time.monotonic() - began, usage.ru_maxrss / 2**20


def megabytes(number: str, unit: str) -> float:
    return float(number.replace(",", "")) * {"MB": 1, "GB": 1000}[unit]


def foretold(printed: str) -> Cost:
    """What a dry run said, checkpoints not counted, which are gone in the end."""
    said, checkpoints = EXPECTED.search(printed), CHECKPOINTS.search(printed)
    assert said and checkpoints
    disk = sum(megabytes(*each) for each in DISK.findall(printed))
    return Cost(float(said[1]), float(said[2]), disk - megabytes(*checkpoints.groups()))


def compare(recipe: str) -> list[list[str]]:
    """Rows for one recipe."""
    with tempfile.TemporaryDirectory() as folder:
        places = ["--out", f"{folder}/out", "--data.store", f"{folder}/store"]
        args = ["run", *shlex.split(recipe), *places]
        printed, spent, _ = process([*args, "--dry-run"])
        print(printed, f"The dry run took {spent:.0f} s.", sep="\n", flush=True)
        expected = foretold(printed)
        printed, seconds, memory = process(args)
        measured = Cost(seconds, memory, grokd.folder_bytes(Path(folder)) / 1e6)
    rows = []
    for name, one, other in zip(("s", "GiB of memory", "MB of disk"), expected, measured,
                                strict=True):
        rows.append([recipe, name, f"{one:.2f}", f"{other:.2f}", f"{one / other:.2f}"])
    rows.append([recipe, "s, the dry run itself", "", f"{spent:.2f}", ""])
    print(grokd.table(HEADER, rows), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="+", metavar="RECIPE", help="with its flags, quoted")
    parser.add_argument("--save", type=Path, help="write the table as JSON")
    args = parser.parse_args()
    about = grokd.origin()
    rows = [row for recipe in args.recipes for row in compare(recipe)]
    if args.save:
        results = {"about": about, "header": HEADER, "rows": rows}
        args.save.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
