"""A command of grokd on several processes, one of which is killed (kill -9) at a certain place.

This file is a program too, see `Herd`: it has everything imported, and forks the processes, so that
many cases take little time.
"""

import atexit
import errno
import fcntl
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from PIL import Image  # noqa: E402

import grokd  # noqa: E402

BUILDING, KILLED = Path("building"), Path("killed")  # these files say when
SPENT = Path("spent")  # seconds of the processor


def change(owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    """Put a function in the place of another one."""
    setattr(owner, name, wrap(getattr(owner, name)))


def kill_at(owner: Any, name: str, due: Callable[..., bool]) -> None:
    """Let a call of a function end this process where it is due."""

    def wrap(function: Any) -> Any:
        def wrapped(*args: Any, **more: Any) -> Any:
            if due(*args, **more):
                KILLED.write_text(str(time.time()))
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **more)

        return wrapped

    change(owner, name, wrap)


def call(number: int) -> Callable[..., bool]:
    """Is it the call of that number?"""
    numbers = iter(range(1, 1_000_000))
    return lambda *args, **more: next(numbers) == number


def in_store() -> None:
    """While the store is built, for which the others wait: see `wait_for_builder`."""

    def wrap(build_store: Any) -> Any:
        def build(*args: Any) -> None:
            BUILDING.touch()
            build_store(*args)

        return build

    change(grokd, "build_store", wrap)
    kill_at(grokd, "stored_form", call(10))


def wait_for_builder() -> None:
    """Let another process be the one that builds the store."""

    def wrap(open_store: Any) -> Any:
        def wait(*args: Any) -> Any:
            while not BUILDING.exists():
                time.sleep(0.01)
            return open_store(*args)

        return wait

    change(grokd, "open_store", wrap)


def in_evaluation() -> None:
    """Not in the validations of training, which predict too."""

    def wrap(logits_of: Any) -> Any:
        def logits(*args: Any) -> Any:
            kill_at(grokd, "predict", call(3))
            return logits_of(*args)

        return logits

    change(grokd, "logits_of", wrap)


def second_epoch(training: grokd.Training, *args: Any) -> bool:
    """The first epoch ended with a checkpoint."""
    return training.progress.step == training.steps_per_epoch + 1


def at_a_moment() -> None:
    """After so many seconds of the processor, whatever is at work then; one that ends before says
    how many it took."""

    def watch() -> None:
        while time.process_time() < float(os.environ["KILLED_AFTER"]):
            time.sleep(0.002)
        KILLED.write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    atexit.register(lambda: SPENT.write_text(str(time.process_time())))


PLACES: dict[str, Callable[[], None]] = {
    "store": in_store,
    "training": lambda: kill_at(grokd.Training, "step", second_epoch),
    "target cache": lambda: kill_at(grokd.Targets, "_values", call(2)),
    "head": lambda: kill_at(grokd, "dfr_l1", call(1)),
    "images": lambda: kill_at(Image, "fromarray", call(2)),
    "evaluation": in_evaluation,
    "moment": at_a_moment,
}


def without_locks() -> None:
    """On a network file system that has none."""

    def flock(file: Any, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    change(fcntl, "flock", lambda function: flock)


def stale() -> None:
    """On a process that sees none of what is finished or begun, as a network disk's cache may have
    it, unless it is sure to be there."""
    missing = grokd.State.MISSING
    change(grokd.Context, "require", lambda function: lambda self, artefact: artefact.path)
    change(grokd.Artefact, "standing", lambda function: lambda self: grokd.Standing(
        missing, self.path))
    change(grokd, "newest_checkpoint", lambda function: lambda folder: None)
    change(grokd, "read_records", lambda function: lambda folder: [])


def alone() -> None:
    """The first process is the only one that begins."""
    grokd.GATHERING = timedelta(seconds=3)
    if os.environ["RANK"] != "0":
        sys.exit()


FAULTS: dict[str, Callable[[], None]] = {
    "no locks": without_locks, "stale": stale, "alone": alone,
}


class Request(NamedTuple):
    """What is to be run; {rank} in args is the rank."""

    folder: str
    processes: int
    args: list[str]
    place: str = ""  # where a process is killed, or what is wrong on it
    rank: int = -1  # which; -1: all
    environment: Mapping[str, str] = {}


class Ended(NamedTuple):
    """How the processes ended: exit codes, and what each wrote."""

    codes: list[int]
    printed: list[str]
    errors: list[str]
    seconds: float  # from the kill, or the start, to the last one's end

    def lines(self, rank: int) -> list[str]:
        """What a process said of errors, without torch's and Python's warnings."""
        return [line for line in self.errors[rank].splitlines()
                if line.startswith(("error", "Traceback", "interrupted"))]


class Herd:
    """Runs commands on several processes that no launcher supervises, each as if on a node of its
    own: processes that are forked by a program that has torch imported."""

    def __init__(self) -> None:
        self.program = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, folder: Path, processes: int, *args: str, **more: Any) -> Ended:
        request = Request(str(folder), processes, list(args), **more)
        assert self.program.stdin and self.program.stdout
        print(json.dumps(request), file=self.program.stdin, flush=True)
        return Ended(*json.loads(self.program.stdout.readline()))

    def close(self) -> None:
        assert self.program.stdin
        self.program.stdin.close()
        self.program.wait()


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("localhost", 0))
        return int(opened.getsockname()[1])


def become(request: Request, rank: int, port: int) -> None:
    """Make of this process one of those that run the command."""
    os.chdir(request.folder)
    os.environ.update(ACCELERATE_USE_CPU="true", **request.environment)
    if request.processes > 1:
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(request.processes), LOCAL_RANK="0",
            LOCAL_WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT=str(port))
    for number, name in ((1, "out"), (2, "err")):
        opened = os.open(f"{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, number)
    prepare(request.place, rank, request.rank, [arg.format(rank=rank) for arg in request.args])


def prepare(place: str, rank: int, chosen: int, args: list[str]) -> None:
    """A command, and a kill or something else that is wrong on the chosen process."""
    sys.argv = [str(ROOT / "grokd.py"), *args]
    grokd.BLOCK = 4  # several blocks of few images
    if place and chosen in (rank, -1):
        (PLACES | FAULTS)[place]()
    elif place == "store":
        wait_for_builder()


def wait_for(children: list[int], folder: Path, limit: float = 200) -> Ended:
    """Wait for the processes; those that hang are killed in the end, and have -1 as exit code."""
    began = time.time()
    codes: dict[int, int] = {}
    last = began
    while len(codes) < len(children) and time.time() < began + limit:
        for rank, child in enumerate(children):
            if rank not in codes:
                found, status = os.waitpid(child, os.WNOHANG)
                if found:
                    codes[rank] = os.waitstatus_to_exitcode(status)
                    last = time.time()
        time.sleep(0.01)
    for rank, child in enumerate(children):
        if rank not in codes:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    killed = float((folder / KILLED).read_text()) if (folder / KILLED).exists() else began
    ranks = range(len(children))
    printed, errors = (
        [(folder / f"{name}{rank}").read_text() for rank in ranks] for name in ("out", "err"))
    return Ended([codes.get(rank, -1) for rank in ranks], printed, errors, last - killed)


def serve() -> bool:
    """Run what is asked for, line by line; True in a forked process, which then runs its part."""
    for line in sys.stdin:
        request = Request(*json.loads(line))
        folder, port, children = Path(request.folder), free_port(), []
        for name in (BUILDING, KILLED):
            (folder / name).unlink(missing_ok=True)
        for rank in range(request.processes):
            child = os.fork()
            if not child:
                become(request, rank, port)
                return True
            children.append(child)
        print(json.dumps(wait_for(children, folder)), flush=True)
    gc.unfreeze()
    return False


if __name__ == "__main__" and sys.argv[1:]:  # under a launcher: PLACE RANK COMMAND RECIPE ...
    place, chosen, *args = sys.argv[1:]
    prepare(place, int(os.environ["RANK"]), int(chosen), args)
    grokd.main()
elif __name__ == "__main__":
    import diffusers.training_utils  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import sklearn.linear_model  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    import torchvision.transforms.v2  # noqa: F401

    grokd.apply_flags("run", grokd.load_recipe("digits"), "digits", [])  # reads comments for help
    gc.collect()
    gc.freeze()  # what forked processes share need not be searched by each
    if serve():
        grokd.main()
