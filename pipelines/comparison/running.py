"""Trains and evaluates what a comparison lacks, by the project's own scripts, each stage as a process with its log.

What is finished is remembered in records/NAME.json of the comparison's folder: for each stage the options that it was
made with, the content of what it started from, and that of what it left. A stage whose three are unchanged is skipped.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.checkpoint import weights_of
from pipelines.comparison.entries import Entry
from pipelines.comparison.progress import Progress
from pipelines.config import differences, read_yaml
from pipelines.files import read_json, sha256_file, write_json_atomic
from pipelines.launch import LAUNCHED_BY
from pipelines.pipeline_index import INDEX_NAME
from pipelines.runs import save_config
from pipelines.training_config import FREE_TO_CHANGE
from pipelines.two_stage import Pipeline

# A run may go on for longer than it was first told to, but the end of its learning rate's schedule stays where it was
FREE = tuple(name for name in FREE_TO_CHANGE if name != "training.total_steps")
TOKENIZER = "tokenizer/model.safetensors"
PRIOR = "prior/model.safetensors"
RESULT = "evaluation.json"
STAGES = ("stage_one", "stage_two", "evaluation")
IN_WORDS = {"stage_one": "stage one", "stage_two": "stage two", "evaluation": "evaluation"}
# Options of evaluate.py that do not change what is measured
NOT_MEASURED_BY = ("cache", "device")
POLL_SECONDS = 0.5
# As the scripts, their parser and the interpreter end
ERROR = r"(?:[\w.-]+: )?error: (?P<ours>.+)|(?P<exception>[\w.]*(?:Error|Exception|Interrupt)(?:: .*)?)"


@dataclass(frozen=True)
class Member:
    """One row of the table: a model of the entries file, or a run folder that was there before.

    name: unique; title: what people read; folder: the run; entry: None for a run folder.
    """

    name: str
    title: str
    folder: Path
    entry: Entry | None


@dataclass(frozen=True)
class Failure:
    """Why a member has no row. title: the member's; stage: in which it failed; log: all that was said, if anything."""

    title: str
    stage: str
    reason: str
    log: Path | None


@dataclass
class Runner:
    """Brings members up to date.

    Args:
        output: folder of the comparison.
        scripts: folder of train_tokenizer.py, train_prior.py and evaluate.py.
        evaluation: options of evaluate.py, the same for all members.
        data_source: --data.* of where the files of the entries' data are, which evaluate.py is told anew.
    """

    output: Path
    scripts: Path
    evaluation: dict
    data_source: dict = field(default_factory=dict)

    def run(self, members: Sequence[Member], progress: Progress) -> dict[str, Failure]:
        """Trains and evaluates, one after another; returns what failed, by name of the member.

        Raises:
            ValueError: a folder holds a model of other options, or a damaged one; nothing is trained then.
        """
        self.check_folders(members)
        failures: dict[str, Failure] = {}
        progress.start([(member.title, self.missing(member)) for member in members])
        for number, member in enumerate(members):
            owner = member.entry.tokenizer_of if member.entry else None
            if owner in failures and failures[owner].stage == "stage_one":
                reason = f"it shares the tokenizer of '{owner}', which failed"
                failures[member.name] = Failure(member.title, "stage_one", reason, None)
                progress.drop(number)
                continue
            for stage in self.missing(member):
                progress.begin(number, member.title, stage, step=_steps_done(_log_of(member, stage)))
                failure = self._run_stage(member, stage, progress)
                progress.end(failure is None)
                if failure is not None:
                    failures[member.name] = failure
                    progress.say(f"{member.title} failed: {failure.reason} (log: {failure.log})")
                    progress.drop(number)
                    break
        progress.close()
        return failures

    def check_folders(self, members: Sequence[Member]) -> None:
        """Raises ValueError where a folder holds a model of other options than its entry's, with each difference."""
        complaints = []
        for member in members:
            if member.entry is None:
                continue
            for stage in ("stage_one", "stage_two"):
                wanted, path = getattr(member.entry, stage), member.folder / stage / "config.yaml"
                if path.is_file():
                    found = read_yaml(path)
                    if wanted is None:
                        complaints.append(
                            f"'{member.name}' has a second stage in {member.folder}, but none in its entry"
                        )
                        continue
                    changed = differences({name: found.get(name) for name in wanted}, wanted)
                    listed = [f"{name}: {a} -> {b}" for name, (a, b) in changed.items() if name not in FREE]
                    if listed:
                        complaints.append(f"'{member.name}', {IN_WORDS[stage]} ({'; '.join(listed)})")
        if complaints:
            raise ValueError(
                f"{self.output} holds models that were trained with other options: {'; '.join(complaints)}. Give the "
                "old values, or another name or --output, or remove the folders of these models in "
                f"{self.output / 'models'}"
            )

    def missing(self, member: Member) -> list[str]:
        """The stages to run: the first that is not up to date, and those after it."""
        stages = [stage for stage in STAGES if self._applies(member, stage)]
        for position, stage in enumerate(stages):
            if not self._is_current(member, stage):
                return stages[position:]
        return []

    def seconds(self, members: Sequence[Member]) -> dict[str, list[float]]:
        """{stage: seconds that it took for each member of which that is known}."""
        records = [self.record(member) for member in members]
        known = {stage: [record[stage]["seconds"] for record in records if stage in record] for stage in STAGES}
        return {stage: [seconds for seconds in values if seconds is not None] for stage, values in known.items()}

    # What is finished
    # --------------------------------------------------------------------------------------------

    @staticmethod
    def _applies(member: Member, stage: str) -> bool:
        if member.entry is None:
            return stage == "evaluation"
        if stage == "stage_one":
            return member.entry.tokenizer_of is None
        return stage == "evaluation" or member.entry.stage_two is not None

    def _is_current(self, member: Member, stage: str) -> bool:
        made = self._made(member, stage)
        if not made.is_file():
            return False
        if member.entry is None:  # others may have evaluated it with more care; it counts if it is of these weights
            return _is_of_these_weights(made, member.folder)
        record = self.record(member).get(stage)
        return record is not None and record["of"] == self._of(member, stage) and record["made"] == sha256_file(made)

    def _made(self, member: Member, stage: str) -> Path:
        return member.folder / {"stage_one": TOKENIZER, "stage_two": PRIOR, "evaluation": RESULT}[stage]

    def _of(self, member: Member, stage: str) -> dict:
        """What a stage's outcome depends on."""
        if stage == "evaluation":
            weights = {name: member.folder / name for name in (TOKENIZER, PRIOR)}
            inputs = {name: sha256_file(path) for name, path in weights.items() if path.is_file()}
            return {"options": {k: v for k, v in self.evaluation.items() if k not in NOT_MEASURED_BY}, "inputs": inputs}
        recipe = getattr(member.entry, stage)
        options = {section: dict(values) if isinstance(values, dict) else values for section, values in recipe.items()}
        for name in FREE:
            section, _, option = name.partition(".")
            options.get(section, {}).pop(option, None)
        if stage == "stage_one":
            return {"options": options, "inputs": {}}
        tokenizer = training_folder(member, "stage_one") / TOKENIZER
        return {"options": options, "inputs": {TOKENIZER: sha256_file(tokenizer) if tokenizer.is_file() else None}}

    def record(self, member: Member) -> dict:
        path = self._record_path(member)
        return read_json(path) if path.is_file() else {}

    def _record_path(self, member: Member) -> Path:
        return self.output / "records" / f"{member.name}.json"

    # Running
    # --------------------------------------------------------------------------------------------

    def _run_stage(self, member: Member, stage: str, progress: Progress) -> Failure | None:
        log = self.output / "logs" / f"{member.name}-{stage}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = self._command(member, stage)
        with log.open("ab") as file:
            begin = file.tell()
            file.write(f"$ {' '.join(command)}\n".encode())
            file.flush()
            status = self._wait(command, file, lambda: progress.at(_steps_done(_log_of(member, stage))))
        if status != 0:
            said = log.read_bytes()[begin:].decode(errors="replace")
            return Failure(member.title, stage, _why(status, said), log)
        if not self._made(member, stage).is_file():
            return Failure(member.title, stage, f"it ended well, but left no {self._made(member, stage)}", log)
        entry = {"of": self._of(member, stage), "made": sha256_file(self._made(member, stage)),
                 "seconds": progress.stage_seconds()}  # fmt: skip
        self._record_path(member).parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(self._record_path(member), self.record(member) | {stage: entry})
        return None

    def _command(self, member: Member, stage: str) -> list[str]:
        if stage == "evaluation":
            script, options = "evaluate", ["--run", str(member.folder)]
            if member.entry is not None:  # all its numbers are to be of these options, or they might not compare
                options += ["--keep", "false"]
            source = {} if member.entry is None else self.data_source
            for name, value in (self.evaluation | source).items():
                if value is not None:
                    options += [f"--{name}", _as_argument(value)]
        else:
            recipe = self.output / "recipes" / f"{member.name}-{stage}.yaml"
            save_config(recipe, getattr(member.entry, stage))
            options = ["--config", str(recipe), "--output", str(member.folder)]
            script = "train_tokenizer"
            if stage == "stage_two":
                script, options = "train_prior", [*options, "--run", str(training_folder(member, "stage_one"))]
        return [sys.executable, str(self.scripts / f"{script}.py"), *options]

    @staticmethod
    def _wait(command: list[str], file, look) -> int:
        """Exit status. A signal to stop is passed on, and this process ends when the other has saved its state."""
        told = {**os.environ, LAUNCHED_BY: str(os.getpid())}
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=told)

        def stop(number, frame):
            raise SystemExit(128 + number)

        old = signal.signal(signal.SIGTERM, stop)
        try:
            while True:
                try:
                    return process.wait(timeout=POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    look()
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait()
            signal.signal(signal.SIGTERM, old)


def members_of(entries: Sequence[Entry], runs: Sequence[str], output: Path) -> list[Member]:
    """Models of the entries file, then run folders.

    Raises:
        ValueError: a run folder that is no finished pipeline, or two members of one name.
    """
    members = [Member(entry.name, entry.title, output / "models" / entry.name, entry) for entry in entries]
    for run in map(Path, runs):
        if not (run / INDEX_NAME).is_file():
            raise ValueError(f"{run} has no {INDEX_NAME}; is it a run folder, and did its training finish?")
        members.append(Member(run.resolve().name, run.resolve().name, run, None))
    names = [member.name.lower() for member in members]
    for member in members:
        if names.count(member.name.lower()) > 1:
            raise ValueError(f"two of the models to compare are named '{member.name}'; rename one of the folders")
    return members


def training_folder(member: Member, stage: str) -> Path:
    """The run in which a stage was trained: another member's for a tokenizer that is shared."""
    owner = member.entry.tokenizer_of if member.entry else None
    return member.folder.parent / owner if owner and stage == "stage_one" else member.folder


def _is_of_these_weights(result: Path, run: Path) -> bool:
    """Whether a result was measured of the models in a run folder. One of an earlier version only has its time."""
    measured = read_json(result).get("weights")
    if measured is None:
        weights = [run / name for name in (TOKENIZER, PRIOR)]
        return all(result.stat().st_mtime >= path.stat().st_mtime for path in weights if path.is_file())
    return measured == weights_of(Pipeline.from_pretrained(run))


def _as_argument(value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)


def _log_of(member: Member, stage: str) -> Path:
    return member.folder / stage / "log.jsonl"


def _steps_done(log: Path) -> int:
    """The last step that a log tells of, 0 without one."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 4096))
            steps = re.findall(rb'^{"step": (\d+),', file.read(), re.MULTILINE)
    except OSError:
        return 0
    return int(steps[-1]) if steps else 0


def _why(status: int, said: str) -> str:
    """Why a process failed: by a signal, with its last error, or else its status; a line of progress is no reason."""
    if status < 0:
        hint = " (out of memory?)" if -status == signal.SIGKILL else ""
        return f"it was killed by signal {-status}{hint}"
    errors = [match for line in said.splitlines() if (match := re.fullmatch(ERROR, line.strip()))]
    return (errors[-1]["ours"] or errors[-1]["exception"]) if errors else f"it ended with status {status}"
