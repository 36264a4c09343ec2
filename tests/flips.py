"""Every operator, comparison and number of the mathematical files, flipped one at a time.

    python -m tests.flips [FILE ...] [--sample N] [--results FILE] [--again] [--learn]

A flip is one change of the source: + for -, * for /, < for <=, == for !=, a sign dropped, a whole
number one larger, any other number doubled. The tests that belong to the file are run against it;
one that fails kills the flip. What is left was computed, and no test noticed.

Not flipped: annotations, messages (f-strings and what is raised), and what flips_equivalent.json
lists, with the reason why no test can tell the difference.

A parent process imports the libraries once and forks a child for each flip. The child imports
minidiff with the changed source in its place, under the hooks of conftest.py, and runs the tests:
first those that killed flips of the same function before (flips_first.json), then the fast ones.
Results are appended to a file, and a run that was stopped goes on.
"""

import argparse
import gc
import hashlib
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.places import ROOT, Flip, flips, source

SEED = "minidiff"
EQUIVALENT, FIRST = (
    Path(__file__).with_name(f"flips_{name}.json") for name in ("equivalent", "first")
)
TESTS = {  # the mathematical files, and the tests that belong to each
    "ddpm.py": ["test_ddpm.py"],
    "schedules.py": ["test_schedules.py"],
    "denoiser.py": ["test_denoiser.py"],
    "losses.py": ["test_denoiser.py"],
    "guidance.py": ["test_denoiser.py"],
    "steps.py": ["test_samplers.py"],
    "samplers.py": ["test_samplers.py"],
    "layers.py": ["test_networks.py"],
    "unet.py": ["test_networks.py"],
    "vae.py": ["test_networks.py"],
    "text.py": ["test_text.py"],
    "latent_diffusion.py": ["test_latent_diffusion.py"],
    "methods/ddim_inversion.py": ["test_samplers.py"],
    "methods/distill.py": ["methods/test_distill.py"],
    "methods/editing.py": ["methods/test_editing.py"],
    "methods/exact.py": ["methods/test_exact.py"],
    "methods/inversion.py": ["finetuning/test_dreambooth.py", "parity/test_inversion.py"],
    "methods/likelihood.py": ["methods/test_likelihood.py"],
    "methods/lora.py": ["methods/test_lora.py"],
    "methods/thresholding.py": ["test_denoiser.py"],
    "evaluation/metrics.py": ["evaluation/test_metrics.py"],
    "training/muon.py": ["training/test_muon.py"],
}
LIBRARIES = """torch torchvision numpy scipy.linalg scipy.stats PIL.Image matplotlib.pyplot tqdm tyro
    einops jaxtyping beartype safetensors.torch huggingface_hub open_clip diffusers transformers
    diffusers.schedulers diffusers.models diffusers.pipelines.stable_diffusion transformers.models.clip
    peft torch_fidelity torchmetrics.image.fid torchmetrics.image.kid pytest hypothesis xdist""".split()
PATIENCE = 20.0, 5.0  # seconds for one test, and so many times what it takes without a flip
MEMORY = 8 * 2**30  # bytes more than the parent's

# The list of flips.


def equivalent() -> dict[str, str]:
    """Reasons by place, of flips that no test can notice; each must be the place of a flip."""
    reasons = json.loads(EQUIVALENT.read_text(encoding="utf-8")) if EQUIVALENT.exists() else {}
    places = {flip.place for file in TESTS for flip in flips(file)}
    if lost := set(reasons) - places:
        raise ValueError(f"{EQUIVALENT.name}: no such flip: {'; '.join(sorted(lost))}")
    return reasons


def drawn(all_flips: list[Flip], count: int) -> list[Flip]:
    """A sample that changes little when the source does: the smallest hashes."""
    return sorted(
        all_flips, key=lambda flip: hashlib.sha256(f"{SEED} {flip.place}".encode()).digest()
    )[:count]


# One flip, in a child process.


class Watch:
    """A pytest plugin: chooses and orders tests, limits each one's time, notes what failed."""

    def __init__(self, only: list[str] | None, seconds: dict[str, float]):
        self.only, self.seconds, self.failed = only, seconds, ""
        self.took: dict[str, float] = defaultdict(float)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.only is not None:
            items[:] = [item for item in items if item.nodeid in self.only]
        items.sort(key=lambda item: self.seconds.get(item.nodeid, 0.0))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failed = self.failed or f"import of {report.nodeid}"

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        least, times = PATIENCE
        signal.setitimer(signal.ITIMER_REAL, least + times * self.seconds.get(item.nodeid, 0.0))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.took[report.nodeid] += report.duration
        if report.failed:
            self.failed = self.failed or report.nodeid


class Ended(NamedTuple):
    outcome: str  # killed, survived, timed out
    by: str = ""
    seconds: dict[str, float] = {}  # noqa: RUF012 (of each test, where none failed)


class Changed:
    """An importer of one module, from the changed source; all else is as the hooks would have it."""

    def __init__(self, flip: Flip):
        self.name, self.source = (
            f"minidiff.{flip.file[:-3].replace('/', '.')}",
            source(flip).encode(),
        )

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        for finder in sys.meta_path:
            spec = finder.find_spec(name, path, target) if finder is not self else None
            if spec is not None:
                spec.loader.get_code = partial(self.code, spec)
                return spec

    def code(self, spec, _):
        return spec.loader.source_to_code(self.source, spec.origin)


def child(flip: Flip | None, files: list[str], watch: Watch, folder: Path) -> None:
    """Run the tests against the flip; what came of it goes to folder/ended. Never returns."""
    os.setsid()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # nobody listens: it ends the process
    signal.setitimer(signal.ITIMER_REAL, 60)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(null, stream)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
    if pages:
        limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    importlib.import_module("tests.conftest")  # the hooks come first, then the flip in front
    if flip is not None:
        sys.meta_path.insert(0, Changed(flip))
    options = "-x -q --tb=no --assert=plain -p no:cacheprovider -p no:faulthandler -p no:xdist"
    base = f"--basetemp={folder / 'tmp'}"
    code = pytest.main([*options.split(), base, *(f"tests/{f}" for f in files)], [watch])
    outcome = "survived" if code in (0, 5) else "killed"
    ended = Ended(outcome, watch.failed or f"exit code {int(code)}", dict(watch.took))
    (folder / "ended").write_text(json.dumps(ended), encoding="utf-8")


def run(flip: Flip | None, files: list[str], watch: Watch) -> Ended:
    """Fork a child for the flip and wait for it."""
    folder = Path(tempfile.mkdtemp(prefix="minidiff-flips-"))
    process = os.fork()
    if process == 0:
        try:
            child(flip, files, watch, folder)
        finally:
            os._exit(0)
    try:
        _, status = os.waitpid(process, 0)
        if os.WIFSIGNALED(status):
            name = signal.Signals(os.WTERMSIG(status)).name
            return Ended("timed out" if name == "SIGALRM" else "killed", name)
        if not (folder / "ended").exists():
            return Ended("killed", "the test process ended")
        return Ended(*json.loads((folder / "ended").read_text(encoding="utf-8")))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Tests:
    """The tests of each file: first those that killed flips of the same function."""

    def __init__(self) -> None:
        known = json.loads(FIRST.read_text(encoding="utf-8")) if FIRST.exists() else {}
        self.first: dict[str, list[str]] = defaultdict(list, known)
        self.seconds: dict[str, dict[str, float]] = {}

    def judge(self, flip: Flip) -> Ended:
        key = f"{flip.file}: {flip.function}"
        if first := self.first[key]:
            files = sorted({name.split("::")[0].removeprefix("tests/") for name in first})
            ended = run(flip, [f for f in files if (ROOT / "tests" / f).exists()], Watch(first, {}))
            if ended.outcome != "survived":
                return ended
        ended = run(flip, TESTS[flip.file], Watch(None, self.without(flip.file)))
        if ended.outcome == "killed" and "::" in ended.by:
            self.first[key] = [*first, ended.by]
        return ended

    def without(self, file: str) -> dict[str, float]:
        """The seconds that each test takes without a flip; all must pass."""
        files = TESTS[file]
        key = " ".join(files)
        if key not in self.seconds:
            ended = run(None, files, Watch(None, {}))
            if ended.outcome != "survived":
                raise RuntimeError(f"without a flip: {ended.outcome} by {ended.by}")
            self.seconds[key] = ended.seconds
        return self.seconds[key]


# All of them.


def outcomes(chosen: list[Flip], results: Path, again: bool = False) -> dict[str, tuple[str, str]]:
    """Outcome and killer by place, of these flips; those in the results file are not run again."""
    rows = map(
        json.loads, results.read_text(encoding="utf-8").splitlines() if results.exists() else ()
    )
    known = {place: (outcome, by) for place, outcome, by in rows}
    for name in LIBRARIES:
        try:
            importlib.import_module(name)
        except ImportError:  # an oracle that is not installed; its tests skip
            continue
    sys.modules["torch"].set_num_threads(1)
    gc.freeze()
    tests = Tests()
    for flip in chosen:
        if flip.place in known and not (again and known[flip.place][0] != "killed"):
            continue
        began = time.perf_counter()
        ended = tests.judge(flip)
        known[flip.place] = ended.outcome, ended.by
        with results.open("a", encoding="utf-8") as log:
            log.write(json.dumps([flip.place, ended.outcome, ended.by]) + "\n")
        seconds = time.perf_counter() - began
        print(f"{ended.outcome:9} {seconds:5.1f} s  {flip.place[:200]}  {ended.by}", flush=True)
    return {flip.place: known[flip.place] for flip in chosen}


def table(chosen: list[Flip], ended: dict[str, tuple[str, str]], reasons: dict[str, str]) -> str:
    lines = [
        "| file | places | tried | killed | survived | timed out | equivalent |",
        "|" + " --- |" * 7,
    ]
    total: Counter[str] = Counter()
    for file in TESTS:
        counts = Counter(ended[flip.place][0] for flip in chosen if flip.file == file)
        places = [flip.place for flip in flips(file)]
        counts["places"], counts["tried"] = len(places), sum(counts.values())
        counts["equivalent"] = sum(place in reasons for place in places)
        total += counts
        if counts["tried"]:
            lines.append(row(file, counts))
    return "\n".join([*lines, row("all", total)])


def row(name: str, counts: Counter[str]) -> str:
    columns = ("places", "tried", "killed", "survived", "timed out", "equivalent")
    return f"| {name} | " + " | ".join(str(counts[column]) for column in columns) + " |"


def learn(ended: dict[str, tuple[str, str]]) -> None:
    """Write down, for each function, the tests that kill most of its flips."""
    killers: dict[str, Counter[str]] = defaultdict(Counter)
    for place, (_, by) in ended.items():
        if "::" in by and not by.startswith("import"):
            killers[": ".join(place.split(": ")[:2])][by] += 1
    first = {
        key: [by for by, _ in counts.most_common(8)] for key, counts in sorted(killers.items())
    }
    FIRST.write_text(json.dumps(first, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parse = argparse.ArgumentParser(
        prog="python -m tests.flips", description=__doc__.split("\n")[0]
    )
    parse.add_argument("files", nargs="*", help=f"of {', '.join(TESTS)}; default: all")
    parse.add_argument("--sample", type=int, help="so many of them all; default: all")
    parse.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / "flips.jsonl")
    parse.add_argument("--again", action="store_true", help="run survivors and time-outs again")
    parse.add_argument("--learn", action="store_true", help=f"write {FIRST.name} from the results")
    args = parse.parse_args()
    os.chdir(ROOT)
    reasons, chosen = equivalent(), [flip for file in args.files or TESTS for flip in flips(file)]
    chosen = [flip for flip in chosen if flip.place not in reasons]
    if args.sample:
        chosen = drawn(chosen, args.sample)
    ended = outcomes(chosen, args.results, args.again)
    for place, (outcome, by) in ended.items():
        if outcome != "killed":
            print(f"{outcome}: {place}  {by}")
    print(table(chosen, ended, reasons))
    if args.learn:
        learn(ended)


if __name__ == "__main__":
    main()
