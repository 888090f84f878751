"""The six recipes in miniature: pre-training on images or on pairs, then fine-tuning on images, pairs or
both, scored on the shapes world.

    python tools/recipes.py                       what is missing of the six, two seeds (`make recipes`)
    python tools/recipes.py --set ablation        raw condition, + residual query adapter, + mask
    python tools/recipes.py --set mask --set mix  sweeps of the mask ratio and the mix ratio
    python tools/recipes.py --set mllm            the six, with the MLLM in runs/recipes/mllm
    python tools/recipes.py --only-table          table and figure of what there is

Runs that share a first stage share its run. Every run is a process of its own on one core, `--jobs` at a
time. Stop it at any moment (Ctrl-C or SIGTERM): each run saves, and the same command goes on from there.
Everything is kept under runs/recipes; the table and the figure go to examples/recipes.
"""

import argparse
import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from iomm.config import Config
from iomm.presets import MIX_RATIO, Stream, recipe

ROOT = Path(__file__).resolve().parents[1]
First = Literal["image", "pair"]
IMAGES, PAIRS = 20_000, 4_000  # unlabeled images; the fixed set of pairs
IMAGES_PER_PROMPT = 4
SETS = ("recipes", "ablation", "mask", "mix", "mllm")
OTHER_MLLM = ROOT / "runs" / "recipes" / "mllm"
MASK_RATIOS = (0.0, 0.25, 0.45, 0.65, 0.85, 0.95)
MIX_RATIOS = (0.1, 0.3, 0.5, 0.7, 0.9)
LOOK_EVERY_S = 2.0


@dataclass(frozen=True)
class Run:
    """One training run: a stage of a recipe, changed by settings. A run with an origin waits for it."""

    first: First
    second: Stream | None
    seed: int
    label: str = ""  # of a variant; empty: the recipe itself
    settings: tuple[str, ...] = ()  # as of `iomm train --set`

    @property
    def origin(self) -> "Run | None":
        """The first stage that this second stage starts from, which has the same settings but the mix."""
        if self.second is None:
            return None
        settings = tuple(s for s in self.settings if not s.startswith("data.mix_ratio"))
        return Run(self.first, None, self.seed, self.label if settings else "", settings)

    def config(self, root: Path = ROOT) -> Config:
        config = recipe(self.first, self.second, root, seed=self.seed).override(list(self.settings))
        if not self.label:
            return config
        train = config.train
        if (origin := self.origin) is not None:
            train = dataclasses.replace(train, init_from=str(origin.config(root).run_dir))
        return dataclasses.replace(config, name=f"{config.name}-{self.label}", train=train)


def six(seeds: int) -> list[Run]:
    """The second stages of the six recipes."""
    return [Run(a, b, s) for s in range(seeds) for a in get_args(First) for b in get_args(Stream)]


def ablation(seeds: int) -> list[Run]:
    """image+mix with the condition built up part by part, as the paper's ablation."""
    raw = ("condition.queries=0", "condition.condition_tokens=all", "condition.mask_ratio=0.0")
    steps = (("raw", raw), ("rqa", ("condition.mask_ratio=0.0",)), ("", ()))
    return [Run("image", "mix", s, label, settings) for s in range(seeds) for label, settings in steps]


def mask_sweep(seeds: int) -> list[Run]:
    """image+mix at several mask ratios of both stages."""
    return [
        Run("image", "mix", s, f"mask{ratio}", (f"condition.mask_ratio={ratio}",))
        for s in range(seeds)
        for ratio in MASK_RATIOS
    ]


def mix_sweep(seeds: int) -> list[Run]:
    """image+mix at several mix ratios of the second stage. At the recipe's own it is the recipe's run."""
    variants = [
        (f"mix{r}", (f"data.mix_ratio={r}",)) if r != MIX_RATIO["mix"] else ("", ()) for r in MIX_RATIOS
    ]
    return [Run("image", "mix", s, label, settings) for s in range(seeds) for label, settings in variants]


def other_mllm(seeds: int) -> list[Run]:
    """The six recipes, conditioned by the MLLM in `OTHER_MLLM`."""
    settings = (f"mllm.path={OTHER_MLLM}",)
    return [Run(run.first, run.second, run.seed, "mllm", settings) for run in six(seeds)]


MAKE: dict[str, Callable[[int], list[Run]]] = dict(
    zip(SETS, (six, ablation, mask_sweep, mix_sweep, other_mllm), strict=True)
)


class Bench:
    """Runs processes until every wanted run is trained and scored.

    Args:
        root: of the repository; tests have their own.
        extra: settings of every run, such as `train.steps=4`.
        evaluate: further arguments of `iomm evaluate shapes`.
    """

    def __init__(self, root: Path, extra: Sequence[str] = (), evaluate: Sequence[str] = ()) -> None:
        self.root, self.extra, self.evaluate = root, tuple(extra), tuple(evaluate)
        self.folder = root / "runs" / "recipes"

    def config(self, run: Run) -> Config:
        return run.config(self.root).override(list(self.extra))

    def command(self, name: str) -> str:
        """The command that makes a set's table, but for the number of processes at a time."""
        extra = "".join(f" --train-set {setting}" for setting in self.extra)
        return f"python tools/recipes.py --set {name}{extra}"

    def trained(self, run: Run) -> bool:
        """Whether a run has made all of its steps.

        Raises:
            RuntimeError: it was finished at another length; its learning rate has followed that one.
        """
        config = self.config(run)
        file = config.run_dir / "run_state.json"
        state = json.loads(file.read_text()) if file.is_file() else {}
        if state.get("state") != "done":
            return False
        if state["step"] != config.train.steps:
            raise RuntimeError(
                f"{config.name} was trained for {state['step']} steps, now it has {config.train.steps}. Move "
                f"{config.run_dir} and {self.score_file(run).parent} away to train it anew."
            )
        return True

    def score_file(self, run: Run) -> Path:
        return self.folder / "scores" / self.config(run).name / "scores.json"

    def score(self, run: Run) -> dict[str, Any] | None:
        """What `iomm evaluate shapes` found; None if it has not run yet."""
        file = self.score_file(run)
        return json.loads(file.read_text()) if file.is_file() else None

    def config_file(self, run: Run) -> Path:
        return self.folder / "configs" / f"{self.name(run)}.py"

    def write_config(self, run: Run) -> None:
        self.config_file(run).parent.mkdir(parents=True, exist_ok=True)
        settings = self.config(run).to_dict()
        self.config_file(run).write_text(
            "from iomm.config import Config\n\n\n"
            f"def config() -> Config:\n    return Config.from_dict({settings!r})\n"
        )

    def next_command(self, run: Run) -> list[str] | None:
        """What has to be done next for a run; None if it is trained and scored."""
        python = [sys.executable, "-m", "iomm.cli"]
        if not self.trained(run):
            return [*python, "train", str(self.config_file(run))]
        if run.second is None or self.score(run) is not None:
            return None
        out = self.score_file(run).parent
        return [*python, "evaluate", "shapes", str(self.config(run).run_dir), "-o", str(out), *self.evaluate]

    def make_shards(self, images: int, pairs: int) -> None:
        """The shards of the shapes world, once."""
        if (self.folder / "shapes" / "done").is_file():
            return
        out = self.folder / "shapes"
        command = ["shapes", "make", str(out), "--images", str(images), "--pairs", str(pairs), "--seed", "0"]
        subprocess.run([sys.executable, "-m", "iomm.cli", *command], check=True)
        (out / "done").touch()

    def work(self, wanted: Sequence[Run], jobs: int, say: Callable[[str], None]) -> None:
        """Do what is missing, first stages before those that need them.

        Raises:
            RuntimeError: a process failed; the message has its log. The others were asked to save and stop.
            KeyboardInterrupt: passed on, after the processes have saved.
        """
        left = list(dict.fromkeys([o for run in wanted if (o := run.origin)] + list(wanted)))
        running: dict[Run, subprocess.Popen[bytes]] = {}
        done: dict[Run, list[str]] = {}  # the last command of each run that ended well
        try:
            while left or running:
                for run, process in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[run]
                    if process.returncode:
                        last = self.log(run).read_text(errors="replace").strip().splitlines()[-1:]
                        raise RuntimeError(f"{self.name(run)} failed: see {self.log(run)}: {' '.join(last)}")
                    if done.get(run) == self.next_command(run) is not None:
                        raise RuntimeError(
                            f"{self.name(run)} is as before its last command: see {self.log(run)}"
                        )
                    say(f"{self.name(run)}: {self.state(run)}")
                left = [run for run in left if run in running or self.next_command(run) is not None]
                ready = [
                    run
                    for run in left
                    if run not in running and (run.origin is None or self.trained(run.origin))
                ]
                for run in ready[: jobs - len(running)]:
                    running[run], done[run] = self.start(run)
                    say(f"{self.name(run)}: {self.state(run)}")
                if running:
                    time.sleep(LOOK_EVERY_S)
        finally:
            for process in running.values():
                process.send_signal(signal.SIGTERM)
            for process in running.values():
                process.wait()

    def start(self, run: Run) -> "tuple[subprocess.Popen[bytes], list[str]]":
        command = self.next_command(run)
        assert command is not None
        if not self.trained(run):
            self.write_config(run)
        self.log(run).parent.mkdir(parents=True, exist_ok=True)
        with self.log(run).open("ab") as log:
            # A session of its own: Ctrl-C reaches this program alone, which then asks each run to save.
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        return process, command

    def name(self, run: Run) -> str:
        return self.config(run).name

    def log(self, run: Run) -> Path:
        return self.folder / "logs" / f"{self.name(run)}.log"

    def state(self, run: Run) -> str:
        """In a word: what is done, or what is being done."""
        if not self.trained(run):
            return f"training {self.config(run).train.steps} steps, log {self.log(run)}"
        if run.second is None:
            return "trained"
        score = self.score(run)
        return "trained, being scored" if score is None else f"scored {overall(score):.3f}"


def overall(score: dict[str, Any]) -> float:
    """The mean of the six categories over the seen split's prompts."""
    return score["splits"]["seen"]["overall"]["mean"]


def main(argv: Sequence[str] | None = None) -> int:
    """0; 130 if it was stopped, 1 if a run failed."""
    sys.path.insert(0, str(ROOT))  # where this file is run by its path
    from tools.recipes_table import write_results

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", action="append", choices=SETS, help="what to run (default: recipes)")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--train-set", action="append", default=[], metavar="A.B=VALUE", help="for every run")
    parser.add_argument(
        "--evaluate", default="", metavar="'OPTIONS'", help="more of `iomm evaluate shapes`, as one word"
    )
    parser.add_argument("--only-table", action="store_true", help="run nothing")
    arguments = parser.parse_args(argv)
    evaluate = ["--images-per-prompt", str(IMAGES_PER_PROMPT), *shlex.split(arguments.evaluate)]
    bench = Bench(ROOT, arguments.train_set, evaluate)

    def say(line: str) -> None:
        sys.stdout.write(f"{time.strftime('%H:%M:%S')}  {line}\n")
        sys.stdout.flush()

    for number in (signal.SIGINT, signal.SIGTERM):  # also where the shell that started this ignores Ctrl-C
        signal.signal(number, signal.default_int_handler)
    sets = arguments.set or ["recipes"]
    if not arguments.only_table:
        if "mllm" in sets and not (OTHER_MLLM / "model.safetensors").is_file():
            parser.error(
                f"--set mllm needs a tiny MLLM in {OTHER_MLLM}, which has none. To train one (45 min): "
                "python -m examples.tiny.train_mllm --aligned --init examples/tiny/mllm --keep last "
                f"--steps 2200 --vision-steps 4000 --out {OTHER_MLLM.relative_to(ROOT)}"
            )
        try:
            bench.make_shards(arguments.images, PAIRS)
            bench.work([run for name in sets for run in MAKE[name](arguments.seeds)], arguments.jobs, say)
        except KeyboardInterrupt:
            say("stopped; every run has saved. The same command goes on from there.")
            return 130
        except RuntimeError as error:
            say(str(error))
            return 1
    for name in sets:
        say(f"written: {write_results(bench, name, MAKE[name](arguments.seeds))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
