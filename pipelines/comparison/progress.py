"""How far a comparison is: which model of how many, which of its stages, the time gone and about how much is left."""

import sys
import time

from tqdm import tqdm


class Progress:
    """Lines on standard error at each stage, and on a terminal a bar that counts within it.

    Args:
        steps: {stage: steps of it}, for stages that count their steps.
        in_words: {stage: its name for people}.
        seconds: {stage: seconds that it took in each of earlier runs}, for the estimate.
    """

    def __init__(
        self, *, steps: dict[str, int], in_words: dict[str, str], seconds: dict[str, list[float]] | None = None
    ):
        self.steps, self.in_words = steps, in_words
        self.seconds = {stage: list(values) for stage, values in (seconds or {}).items()}

    def start(self, missing: list[tuple[str, list[str]]]) -> None:
        """Args: missing: for each model its title and the stages to run."""
        self.began = time.monotonic()
        self.count, self.current = len(missing), None
        # number of the model, its title, stage; those not begun yet
        self.plan = [(number, title, stage) for number, (title, stages) in enumerate(missing) for stage in stages]
        ready = sum(not stages for _, stages in missing)
        self.say(
            f"{self.count} model{'s' if self.count != 1 else ''}, {ready} of them ready, "
            f"{len(self.plan)} stage{'s' if len(self.plan) != 1 else ''} to run"
        )
        self.bar = tqdm(
            total=len(self.plan),
            disable=None,
            dynamic_ncols=True,
            bar_format="{desc} |{bar:20}| {postfix}",
        )

    def begin(self, number: int, title: str, stage: str, step: int = 0) -> None:
        """A stage that nobody had foreseen may begin too: one of a model whose tokenizer has just changed.

        Args:
            step: where it goes on, of an earlier run that was stopped.
        """
        self.current = (number, title, stage)
        self.plan = [item for item in self.plan if item != self.current]
        self.stage_began, self.first_step, self.done_steps = time.monotonic(), step, step
        self.say(f"{self.headline()}, {self.times()}")
        self._show()

    def at(self, step: int) -> None:
        """The stage is at `step`, 0 where it does not count."""
        if step < self.first_step:  # it went back to its last state, or began anew
            self.first_step = step
        self.done_steps = step
        self._show()

    def end(self, well: bool) -> None:
        _, _, stage = self.current
        if well and (seconds := self.stage_seconds()) is not None:
            self.seconds.setdefault(stage, []).append(seconds)
        self.current = None
        self.bar.update(1)

    def stage_seconds(self) -> float | None:
        """About what all of the present stage takes, from the part that ran now; None where nothing did."""
        gone, done = time.monotonic() - self.stage_began, self.done_steps - self.first_step
        stage = self.current[2]
        if stage not in self.steps or self.first_step == 0:
            return gone
        return gone * self.steps[stage] / done if done else None

    def drop(self, number: int) -> None:
        """The rest of a model is not to be run."""
        self.plan = [item for item in self.plan if item[0] != number]

    def close(self) -> None:
        self.bar.close()

    def headline(self) -> str:
        number, title, stage = self.current
        return f"[{number + 1}/{self.count}] {title}: {self.in_words[stage]}"

    def times(self) -> str:
        left = self.seconds_left()
        gone = duration(time.monotonic() - self.began)
        return f"{gone} gone" + ("" if left is None else f", about {duration(left)} left")

    def seconds_left(self) -> float | None:
        """From the mean time of each kind of stage, or of all where a kind is new; None while nothing is known."""
        known = [value for values in self.seconds.values() for value in values]
        rest = 0.0
        if self.current is not None:
            stage, gone = self.current[2], time.monotonic() - self.stage_began
            steps, done = self.steps.get(stage, 0), self.done_steps - self.first_step
            if steps and done > 0:
                known = [*known, gone / done * steps]
                rest = gone / done * max(0, steps - self.done_steps)
            elif known:
                to_do = 1 - min(1.0, self.first_step / steps) if steps else 1.0
                rest = max(0.0, self._mean(stage, known) * to_do - gone)
        if not known:
            return None
        return rest + sum(self._mean(stage, known) for _, _, stage in self.plan)

    def _mean(self, stage: str, known: list[float]) -> float:
        values = self.seconds.get(stage) or known
        return sum(values) / len(values)

    def say(self, line: str) -> None:
        tqdm.write(line, file=sys.stderr)

    def _show(self) -> None:
        stage = self.current[2]
        steps = f", step {self.done_steps:,} of {self.steps[stage]:,}" if stage in self.steps else ""
        self.bar.set_description_str(self.headline() + steps, refresh=False)
        self.bar.set_postfix_str(self.times())


def duration(seconds: float) -> str:
    """45 s, 3 min 20 s, 2 h 5 min."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes} min {seconds} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
