"""A program whose training logs random rows, for tests of the tracked run; the seed is SEED.

It is killed at the KILL-th call of `run.log`, counted over the whole program. Each batch draws what
it logs from the seed and its step alone, so that a resumed run repeats it.
"""

import dataclasses
import os
import random
import signal
from functools import partial

import numpy as np
import torch
import wandb
from torch import nn

from harness import options, script
from harness.checkpoints import Checkpoints
from harness.options import option
from harness.progress import Meter, Progress
from harness.session import open_session
from harness.tracking import Run, logs_to_wandb

EXAMPLES, BATCH = 60, 5


@dataclasses.dataclass(kw_only=True, frozen=True)
class Settings(options.SharedSettings):
    monitor: str = option("valid/loss", "metric that selects the best model")


class Script:
    """Calls `run.log`, counts the calls, and dies at one of them."""

    def __init__(self, run: Run):
        self.run, self.calls = run, 0
        self.kill = int(os.environ.get("KILL", -1))

    def log(self, *arguments: object, **options: object) -> None:
        self.calls += 1
        if self.calls == self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        self.run.log(*arguments, **options)

    def refused(self, *arguments: object, **options: object) -> None:
        """A call that raises, and changes nothing."""
        before = self.run.rows
        try:
            self.log(*arguments, **options)
        except ValueError as error:
            assert "run.log in logging_rows.py:" in str(error), error
            assert self.run.rows == before
        else:
            raise AssertionError(f"not refused: {arguments} {options}")


@logs_to_wandb
def log_media(run: Run, log: Script, rng: random.Random) -> None:
    values = [rng.random() for _ in range(8)]
    image = np.full((4, 4), rng.randrange(256), np.uint8)
    log.log({"histogram": wandb.Histogram(values), "image": wandb.Image(image)})


def log_randomly(log: Script, step: int, rng: random.Random) -> None:
    """One batch: rows begin explicitly or not, with repeats, mistakes, media and commits."""
    run, value = log.run, rng.random()
    if rng.random() < 0.3:
        log.log({"first": value, "text": "a"}, step=step)
    else:
        log.log({}, step=step)
    assert run.step == step
    for name in rng.sample("abcde", rng.randrange(4)):
        number = rng.choice([rng.random(), rng.randrange(9), float("nan"), rng.random() > 0.5])
        kind = rng.choice([lambda x: x, np.float64, torch.tensor])
        log.log({name: kind(number)})
        log.log({name: kind(number)}, step=step)  # the same value again
        log.refused({name: 99, "other": 1})
    log.refused({"a": 1}, step=step - 1)
    log.refused({"step": 1})
    log.refused({"_runtime": 1})
    if rng.random() < 0.4:
        log_media(run, log, rng)
    if rng.random() < 0.2:
        tensor = torch.tensor(value)
        log.log({"changing": tensor})
        tensor.zero_()  # what was logged stays
    if rng.random() < 0.2:
        wandb.run.log({"plain": value}, commit=False)
        run.wandb.log({"plain wandb": value})
    if rng.random() < 0.3:
        log.log({"last": value}, commit=True)
        log.refused({"late": value})
        log.refused({"late": value}, step=step)


def main() -> None:
    with open_session(options.parse(Settings), "rows", {}) as session:
        if session.finished:
            return
        progress = Progress(session, EXAMPLES, held_out=0)
        run = session.start(partial(wandb.init, project="rows", config=session.config))
        log, model, meter = Script(run), nn.Linear(1, 1), Meter()
        log.log({"before": 1.0})
        progress_data = torch.arange(EXAMPLES)
        checkpoints = Checkpoints(progress, progress_data, meter, model=model)
        checkpoints.restore_or_begin()
        for epoch in progress.epochs():
            for _ in progress.remaining(progress_data.split(session.settings.batch_size)):
                rng = random.Random(f"{os.environ['SEED']} {progress.step}")
                log_randomly(log, progress.step, rng)
                if session.settings.watch != "off" and rng.random() < 0.3:
                    run.wandb._log({"gradients/w": rng.random()}, commit=False)  # as run.watch does
                checkpoints.end_batch()
            if not run._ended:
                log.log({"epoch": epoch, "valid/loss": 1 / epoch})
        session.metrics = {"rows": len(run.rows)}


if __name__ == "__main__":
    script.run_script(main)
