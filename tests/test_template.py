"""Copies of train_mnist.py, changed as their owners change them: exact after a kill, or one clear line."""

import ast
import contextlib
import dataclasses
import difflib
import json
import math
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import wandb
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau
from torch.utils.data import DataLoader

import train_mnist
from harness import distributed, options
from harness.checkpoints import Checkpoints
from harness.errors import UserError
from harness.options import option
from harness.progress import Best, Meter, Progress, as_text
from harness.script import StopRequests
from harness.session import open_session
from tests import forking, killing
from tests.conftest import REPO, clean_environment

# Epochs of 22 batches, of which the last is shorter.
ARGUMENTS = f"{killing.DIGITS} --valid_size 1000 --slice 6 --epochs 3 --batch_size 31 --checkpoint_every 3 --watch off".split()
IMAGES = len(range(0, 4000, 6))  # for training
KILL = """            checkpoints.end_batch()
            if os.environ.get("KILL_AT") == str(progress.batch):
                os.kill(os.getpid(), 9)
"""
BATCHES = "        batches = order.split(settings.batch_size)\n"
PROGRESS = "held_out=len(data.valid.labels))"
STEP = """            distributed.sum_gradients(model)
            optimizer.step()
            optimizer.zero_grad()
"""
RANDPERM = "torch.randperm(len(train_set.labels))"
# What is replaced in the copy, and by what.
VARIANTS = {
    "drop_last": {
        BATCHES: BATCHES
        + "        batches = batches[: len(train_set.labels) // settings.batch_size]\n",
        PROGRESS: "held_out=len(data.valid.labels), "
        "batches=len(data.train.labels) // settings.batch_size)",
    },
    "a number of batches of its own in each epoch": {
        BATCHES: "        batches = order.tensor_split([9, 7, 11][epoch - 1])\n",
        PROGRESS: "held_out=len(data.valid.labels), batches=[9, 7, 11])",
    },
    "gradients accumulated over batches": {
        STEP: "            if progress.batch % 2 == 0:\n"
        + "".join(f"    {line}\n" for line in STEP.splitlines())
    },
    "its own dataset option is gone": {
        """    dataset: str = option(
        "auto",
        "auto: MNIST, or built-in digits if it is not available",
        placeholder="auto",
        choices=("auto", "mnist", "fashion_mnist", "kmnist", "synthetic"),
    )
""": "",
        "load_digits(settings.dataset,": 'load_digits("synthetic",',
    },
    "the wrong name of a metric": {'"loss": "min",\n': ""},
}


def copy(directory: Path, changes: dict[str, str]) -> Path:
    """A changed copy of train_mnist.py that also kills itself after the batch KILL_AT."""
    text = (REPO / "train_mnist.py").read_text()
    end = "            checkpoints.end_batch()\n"
    for before, after in {
        end: KILL,
        "import dataclasses\n": "import dataclasses\nimport os\n",
    }.items():
        assert text.count(before) == 1
        text = text.replace(before, after)
    for before, after in changes.items():
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    script = directory / "train_copy.py"
    script.write_text(text)
    return script


def run(script: Path, cwd: Path, *arguments: str, **environment: str) -> SimpleNamespace:
    cwd.mkdir(exist_ok=True)
    done = forking.run(
        [sys.executable, script, *arguments, "--output_dir", "out"],
        cwd=cwd,
        env=clean_environment(cwd, PYTHONPATH=str(REPO), **environment),
        text=True,
        timeout=300,
    )
    assert "Traceback" not in done.stderr or environment.get("RAISES"), done.stderr
    return SimpleNamespace(status=done.returncode, out=done.stdout, err=done.stderr)


@pytest.mark.parametrize(
    "name",
    [
        "drop_last",
        "a number of batches of its own in each epoch",
        "gradients accumulated over batches",
    ],
)
def test_a_changed_copy_is_exact_after_kills(name, tmp_path):
    script = copy(tmp_path, VARIANTS[name])
    whole = run(script, tmp_path / "whole", *ARGUMENTS)
    assert whole.status == 0, whole.err
    for batch in ("5", "17"):  # in the middle of epochs; after the first, an odd number of batches
        killed = run(script, tmp_path / "killed", *ARGUMENTS, "--resume", KILL_AT=batch)
        assert killed.status == -9, killed.err
    resumed = run(script, tmp_path / "killed", *ARGUMENTS, "--resume")
    assert resumed.status == 0 and "Resuming out at epoch" in resumed.out
    assert killing.differences(tmp_path / "whole/out", tmp_path / "killed/out") == []
    position = killing.outcome(tmp_path / "whole/out")["checkpoint.pt"]["position"]
    expected = {
        "drop_last": (3 * 21, 3 * 21 * 31),
        "a number of batches of its own in each epoch": (27, 3 * IMAGES),
        "gradients accumulated over batches": (3 * 22, 3 * IMAGES),
    }
    assert (position["batch"], position["step"]) == expected[name]


def test_a_copy_without_a_dataset_option(tmp_path):
    script = copy(tmp_path, VARIANTS["its own dataset option is gone"])
    arguments = [*"--slice 100 --epochs 2 --batch_size 32 --watch off".split()]
    assert run(script, tmp_path / "run", *arguments, KILL_AT="3").status == -9
    done = run(script, tmp_path / "run", *arguments, "--resume")
    assert done.status == 0 and "Resuming" in done.out
    assert json.loads((tmp_path / "run/out/config.json").read_text())["dataset"] == "synthetic"


def test_a_metric_without_a_direction_is_an_error_before_training(tmp_path):
    script = copy(tmp_path, VARIANTS["the wrong name of a metric"])
    done = run(script, tmp_path / "run", *ARGUMENTS, RAISES="yes")  # the default is valid/loss
    assert done.status == 1
    assert "valid/loss: declare whether it is best at its 'min' or 'max'" in done.err
    assert "epoch 1" not in done.out
    done = run(script, tmp_path / "run", *ARGUMENTS, "--monitor", "valid/rmse")
    assert done.status == 2 and "--monitor: must be one of valid/acc, " in done.err


@pytest.mark.quick
@pytest.mark.parametrize(("direction", "best_epoch"), [("min", 3), ("max", 1)])
def test_the_declared_direction_decides(direction, best_epoch):
    best = Best("valid/mae", {"mae": direction})
    model = nn.Linear(1, 1)
    for epoch, value in enumerate((0.69, 0.34, 0.29), start=1):
        best.offer(epoch, {"valid/mae": value}, model)
    assert best.epoch == best_epoch


@pytest.mark.quick
def test_epochs_without_validation_are_not_the_best():
    best = Best("valid/depth/mae", {"depth/mae": "min", "mae": "max"})
    model = nn.Linear(1, 1)
    values = [None, 0.7, None, 0.4, None, 0.5]
    for epoch, value in enumerate(values, start=1):
        best.offer(epoch, {} if value is None else {"valid/depth/mae": value}, model)
    assert (best.epoch, best.score) == (4, (0.4, 0.0))


@pytest.mark.quick
def test_results_without_their_prefix_are_an_error():
    """Before, they counted as no validation: the last model was kept, whatever its value."""
    best = Best("valid/mae", {"mae": "min"})
    with pytest.raises(UserError, match=r"--monitor valid/mae: there are mae$"):
        best.offer(1, {"mae": 0.5, "r2": 0.1}, nn.Linear(1, 1))


@pytest.mark.quick
def test_of_equal_epochs_the_one_with_the_lowest_loss_is_kept():
    """Before, the first one: with mcc at 0.0 throughout, that was epoch 1."""
    best = Best("valid/mcc", {"mcc": "max", "loss": "min"})
    model = nn.Linear(1, 1)
    improved = []
    for epoch, loss in enumerate((0.9, 0.7, 0.7, 0.8), start=1):
        improved.append(best.offer(epoch, {"valid/mcc": 0.0, "valid/loss": loss}, model))
    assert improved == [True, True, False, False]
    resumed = Best("valid/mcc", {"mcc": "max"})
    resumed.load_state_dict(best.state_dict())
    assert not resumed.offer(5, {"valid/mcc": 0.0, "valid/loss": 0.7}, model)
    assert not resumed.offer(6, {"valid/mcc": -0.1, "valid/loss": 0.1}, model)
    assert resumed.offer(7, {"valid/mcc": 0.1, "valid/loss": 5.0}, model)


def made_up(
    tmp_path: Path, batch_size: int = 4, epochs: int = 2, **options: int
) -> SimpleNamespace:
    settings = train_mnist.Settings(
        batch_size=batch_size, epochs=epochs, output_dir=str(tmp_path), **options
    )
    config = {"metrics": {"loss": "min"}}
    return SimpleNamespace(settings=settings, config=config, run=None, exits=ExitStack())


@pytest.mark.quick
@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (torch.arange(10).split(5), "has 2 batches, but Progress was told of 3"),
        (list(torch.arange(8).split(2)), "has 4 batches, but Progress was told of 3"),
        (DataLoader(torch.arange(10), batch_size=4), "a DataLoader is for load_batches"),
        (iter(torch.arange(10).split(4)), "expected a list of batches"),
    ],
)
def test_batches_that_could_not_be_resumed_are_refused(batches, message, tmp_path):
    progress = Progress(made_up(tmp_path), examples=10, held_out=1)
    with pytest.raises(ValueError, match=message):
        next(progress.remaining(batches))


@pytest.mark.quick
@pytest.mark.parametrize("batches", [[3], [3, 3, 3], 0, [3, 0]])
def test_a_number_of_batches_for_each_epoch(batches, tmp_path):
    with pytest.raises(ValueError, match="a number of batches for each epoch"):
        Progress(made_up(tmp_path), examples=10, held_out=1, batches=batches)


@pytest.mark.quick
def test_another_number_of_batches_on_resuming_is_an_error(tmp_path):
    state = Progress(made_up(tmp_path), 10, 1, batches=[4, 5]).state_dict()
    with pytest.raises(ValueError, match="epoch 1 had 4 batches"):
        Progress(made_up(tmp_path), 10, 1, batches=[3, 5]).load_state_dict(state)


@pytest.mark.quick
def test_batches_that_do_not_follow_from_seed_and_epoch_are_an_error(tmp_path):
    """Before, a resumed run saw some examples twice and others never, and said nothing."""
    order = np.random.default_rng(0).permutation(12)
    for kind in (torch.from_numpy, np.ndarray.tolist, list):
        batches = kind(order)
        batches = [batches[start : start + 4] for start in (0, 4, 8)]
        session = made_up(tmp_path)
        session.run = SimpleNamespace(log=lambda *_, **__: None)
        progress = Progress(session, 12, 1)
        next(progress.remaining(batches))
        resumed = Progress(session, 12, 1)
        resumed.load_state_dict(progress.state_dict())
        assert len(resumed.left(batches[::-1])) == 2  # an older checkpoint does not have them
        resumed.indices = as_text(progress.indices)
        assert len(resumed.left(batches)) == 2
        with pytest.raises(ValueError, match="the batches of epoch 1 differ between"):
            resumed.left(batches[::-1])


def test_a_global_generators_batches_are_an_error_before_training(tmp_path):
    """Before, only in a resumed run."""
    script = copy(tmp_path, {"shuffled(len(train_set.labels), settings.seed, epoch)": RANDPERM})
    done = run(script, tmp_path / "run", *ARGUMENTS, RAISES="yes")
    assert done.status == 1
    assert "ValueError: random numbers are drawn between restore_or_begin and the first" in done.err
    assert "epoch 1:" not in done.out


@pytest.mark.quick
def test_ranks_with_other_batches_are_an_error(tmp_path, monkeypatch):
    """Before, each of two processes trained on its half of another shuffling."""
    progress = Progress(made_up(tmp_path), 12, 1)
    batches = torch.arange(12).split(4)
    monkeypatch.setattr(distributed, "gather", lambda own: [own, own])
    progress.left(batches)
    monkeypatch.setattr(distributed, "gather", lambda own: [own, "[11, 3, 5, 0]"])
    with pytest.raises(ValueError, match="the batches of epoch 1 differ between processes"):
        progress.left(batches)


@pytest.mark.quick
def test_forgetting_to_end_a_batch_is_an_error(tmp_path):
    """Before, the run saved no checkpoint after its first, heeded no signal, and said nothing."""
    session = made_up(tmp_path)
    session.run = SimpleNamespace(log=lambda *_, **__: None)
    batches = Progress(session, 10, 1).remaining(torch.arange(10).split(4))
    next(batches)
    with pytest.raises(ValueError, match=r"call checkpoints\.end_batch"):
        next(batches)


@pytest.mark.quick
def test_two_iterators_of_batches_at_a_time_are_an_error(tmp_path):
    """Before, the second one was a batch ahead of the first, and its error was about something else."""
    session = made_up(tmp_path)
    session.run = SimpleNamespace(log=lambda *_, **__: None)
    progress = Progress(session, 10, 1)
    batches = torch.arange(10).split(4)
    with pytest.raises(ValueError, match="use one `load_batches` or `remaining` at a time"):
        next(zip(progress.remaining(batches), progress.remaining(batches)))


@pytest.mark.quick
@pytest.mark.parametrize("batches", [1, 2])
def test_an_epoch_that_is_left_early_is_an_error(batches, tmp_path):
    """Before, the next epochs had only as many batches, their last ones."""
    session = made_up(tmp_path)
    session.run = SimpleNamespace(log=lambda *_, **__: None)
    session.stop_requests = StopRequests(timeout=1)
    progress = Progress(session, 10, 1)  # 3 batches
    with pytest.raises(ValueError, match="epoch 1 was left before its last batch had ended"):
        for _ in progress.epochs():
            # Beside a shorter loader: `zip` begins another batch before it ends.
            for _ in zip(progress.remaining(torch.arange(10).split(4)), range(batches)):
                progress.batch_ended = True


@pytest.mark.quick
def test_what_an_optimizer_changes_must_be_saved(tmp_path):
    """Before, a temperature, a second model or an optimizer began anew in a resumed run."""
    model, critic, temperature = nn.Linear(1, 1), nn.Linear(1, 1), nn.Parameter(torch.ones(()))
    progress = Progress(made_up(tmp_path), 10, 1)
    optimizer = torch.optim.Adam([*model.parameters(), temperature])
    critic_optimizer = torch.optim.Adam(critic.parameters())
    save = partial(Checkpoints, progress, [], Meter(), model=model)
    with pytest.raises(ValueError, match="each model that an optimizer trains"):
        save(optimizer=optimizer)
    save(optimizer=optimizer, temperature=nn.ParameterList([temperature]))
    with pytest.raises(ValueError, match="each model that an optimizer trains"):
        save(critic_optimizer=critic_optimizer)
    save(critic_optimizer=critic_optimizer, critic=critic)
    with pytest.raises(ValueError, match="the optimizer of each schedule"):
        save(schedule=ReduceLROnPlateau(critic_optimizer), critic=critic)


@pytest.mark.quick
def test_an_optimizer_that_steps_must_be_saved(tmp_path):
    """Before, the second optimizer of a copy began anew in a resumed run, in silence."""
    model, critic, other = nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1)
    optimizers = [torch.optim.Adam(each.parameters()) for each in (model, critic, other)]
    for each in (model, critic, other):
        each(torch.ones(1, 1)).backward()
    session = made_up(tmp_path)
    progress = Progress(session, 10, 1)
    with session.exits:
        Checkpoints(progress, [], Meter(), model=model, critic=critic, optimizer=optimizers[0])
        before = critic.weight.item()
        optimizers[0].step()
        with pytest.raises(ValueError, match="each optimizer of its models"):
            optimizers[1].step()
        assert critic.weight.item() == before
        optimizers[2].step()  # of a model that is none of the checkpoint's
    optimizers[1].step()  # after the run
    assert critic.weight.item() != before


@pytest.mark.quick
def test_gradients_of_one_rank_alone_are_an_error(tmp_path, monkeypatch):
    """Before, the ranks' weights went apart in silence."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "gather", lambda own: [own, own])
    monkeypatch.setattr(distributed, "sum_over_ranks", lambda *_: None)
    Checkpoints(Progress(made_up(tmp_path), 10, 1), [], Meter(), model=model, optimizer=optimizer)
    model(torch.ones(3, 2)).sum().backward()
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match=r"call distributed\.sum_gradients"):
        optimizer.step()
    assert torch.equal(model.weight, before)
    distributed.sum_gradients(model)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), before - 0.1 * 3)


@pytest.mark.quick
def test_an_epochs_mean_counts_the_batches_after_its_last_row():
    """Before, they counted in the first row of the next epoch, and in its mean."""
    meter = Meter()
    meter.add(2, loss=2.0)
    assert meter.take_row() == {"loss": 1.0}
    meter.add(6, loss=18.0)
    assert meter.take_epoch() == {"loss": 2.5}
    meter.add(1, loss=7.0)
    assert meter.take_row() == meter.take_epoch() == {"loss": 7.0}


@dataclasses.dataclass(kw_only=True, frozen=True)
class Settings(options.SharedSettings):
    monitor: str = option("valid/loss", "metric that selects the best model")


def learning_rates(directory: Path, names: list[str], *arguments: str) -> list[float]:
    """Those of a run of 4 batches an epoch, whose `names` are given to Checkpoints in this order."""
    command = ["--batch_size", "5", "--wandb", "disabled", "--output_dir", str(directory)]
    rates = []
    with open_session(options.parse(Settings, [*command, *arguments]), "rates", {}) as session:
        progress = Progress(session, 20, held_out=0)
        session.start(partial(wandb.init, project="rates"))
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        schedule = CosineAnnealingLR(optimizer, progress.total_batches)
        things = {"optimizer": optimizer, "schedule": schedule}
        stateful = {name: things[name] for name in names}
        checkpoints = Checkpoints(progress, [], Meter(), model=model, **stateful)
        checkpoints.restore_or_begin()
        for _ in progress.epochs():
            for _ in progress.remaining(torch.arange(20).split(5)):
                optimizer.step()
                rates.append(optimizer.param_groups[0]["lr"])
                schedule.step()
                checkpoints.end_batch()
    return rates


@contextlib.contextmanager
def training(directory: Path, *arguments: str, **models: nn.Module) -> Iterator[tuple]:
    """Progress and checkpoints of a new or resumed run of 2 epochs of 4 batches."""
    command = ["--batch_size", "5", "--epochs", "2", "--checkpoint_every", "1", *arguments]
    command += ["--wandb", "disabled", "--output_dir", str(directory)]
    with open_session(options.parse(Settings, command), "toy", {}) as session:
        progress = Progress(session, 20, held_out=0)
        session.start(partial(wandb.init, project="toy"))
        checkpoints = Checkpoints(progress, [], Meter(), **models)
        checkpoints.restore_or_begin()
        yield progress, checkpoints


def test_the_mode_of_a_model_is_restored(tmp_path):
    """Before, a teacher that its evaluation had left in eval() dropped out again in a resumed run."""
    seen = []
    for arguments in ((), ("--resume",)):
        model, teacher = nn.Linear(1, 1), nn.Linear(1, 1)
        with (
            contextlib.suppress(InterruptedError),
            training(tmp_path / "out", *arguments, model=model, teacher=teacher) as run,
        ):
            progress, checkpoints = run
            for _ in progress.epochs():
                model.train()
                for _ in progress.remaining(torch.arange(20).split(5)):
                    seen.append((model.training, teacher.training, teacher.weight.requires_grad))
                    checkpoints.end_batch()
                    if progress.batch == 6 and not arguments:
                        raise InterruptedError
                model.eval()
                teacher.eval().requires_grad_(False)
    assert seen == 4 * [(True, True, True)] + 4 * [(True, False, False)]


def test_what_is_frozen_goes_by_names(tmp_path):
    """Before, a new ReLU shifted what is frozen: the resumed run trained a weight that was not."""
    layers = [nn.Linear(1, 1).requires_grad_(False), nn.Linear(1, 1)]
    with training(tmp_path / "out", model=nn.ModuleDict({"a": layers[0], "b": layers[1]})):
        pass
    layers = [nn.Linear(1, 1), nn.Linear(1, 1)]
    model = nn.ModuleDict({"new": nn.ReLU(), "a": layers[0], "b": layers[1]})
    with training(tmp_path / "out", "--resume", model=model):
        trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert trained == ["b.weight", "b.bias"]


@pytest.mark.parametrize("place", ["before the epochs", "in the first epoch"])
def test_random_numbers_before_the_first_batch_are_an_error(place, tmp_path):
    """Before, a resumed run drew others there, such as another fixed noise, and others ever after."""
    with (
        pytest.raises(ValueError, match="drawn between restore_or_begin and the first batch"),
        training(tmp_path / "out", model=nn.Linear(1, 1)) as (progress, _),
    ):
        if place == "before the epochs":
            torch.randn(2)
        for _ in progress.epochs():
            iter(DataLoader(torch.arange(20)))  # draws a seed for its workers
            next(progress.remaining(torch.arange(20).split(5)))


@pytest.mark.parametrize("names", [["optimizer", "schedule"], ["schedule", "optimizer"]])
def test_more_epochs_whatever_comes_first(names, tmp_path):
    """Before, a schedule that was named before its optimizer went on with a learning rate of 0."""
    learning_rates(tmp_path / "out", names, "--epochs", "2")
    rates = learning_rates(tmp_path / "out", names, "--resume", "--epochs", "3")
    expected = [(1 + math.cos(math.pi * batch / 12)) / 2 for batch in range(8, 12)]
    assert rates == pytest.approx(expected)


def test_forgetting_to_restore_is_an_error(tmp_path, monkeypatch):
    """Training began anew, and its rows were lost: none of them was written before `load_state_dict`."""
    monkeypatch.chdir(tmp_path)
    arguments = f"{killing.DIGITS} --slice 40 --valid_size 1000 --batch_size 16 --wandb disabled --output_dir out"
    train_mnist.main([*arguments.split(), "--max_steps", "1"])
    before = Path("out/checkpoint.pt").read_bytes()
    monkeypatch.setattr(Checkpoints, "restore_or_begin", lambda _: None)
    with pytest.raises(ValueError, match=r"call checkpoints\.restore_or_begin"):
        train_mnist.main([*arguments.split(), "--max_steps", "2", "--resume"])
    assert Path("out/checkpoint.pt").read_bytes() == before


def test_parts_of_a_batch_give_its_gradient(tmp_path):
    """With SGD-like steps the weights agree up to rounding, whatever the size of the parts."""
    digits = f"{killing.DIGITS} --valid_size 1000 --slice 10 --epochs 1"
    arguments = f"{digits} --batch_size 32 --watch off --precision fp32".split()
    arguments += ["--schedule", "constant", "--learning_rate", "1e-4"]
    outs = []
    for more in ([], *(["--micro_batch_size", size] for size in ("1", "7", "32", "1000"))):
        cwd = tmp_path / f"run{len(outs)}"
        done = run(REPO / "train_mnist.py", cwd, *arguments, *more)
        assert done.status == 0, done.err
        outs.append(killing.outcome(cwd / "out"))
    whole, *others = outs
    for parts in others:
        for row, same_row in zip(whole["history.jsonl"], parts["history.jsonl"], strict=True):
            assert row == pytest.approx(same_row, rel=1e-3, abs=1e-3)
        assert whole["checkpoint.pt"]["position"] == parts["checkpoint.pt"]["position"]


def function_lines(path: Path) -> dict[str, list[str]]:
    text = path.read_text()
    lines = text.splitlines()
    functions = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    return {
        node.name: [line for line in lines[node.lineno - 1 : node.end_lineno] if line.strip()]
        for node in functions
        if node.name in ("train", "conclude", "main")
    }


@pytest.mark.quick
def test_the_page_counts_the_lines_that_differ():
    """Before, by a method that could not be repeated."""
    page = (REPO / "docs/template.md").read_text()
    template = function_lines(REPO / "train_mnist.py")
    sizes = [len(lines) for lines in template.values()]
    assert sorted(sizes) == sorted(map(int, re.findall(r"\((\d+)(?: lines)?\)", page)))
    for name in ("train_lm", "train_tabular", "train_images"):
        counts = []
        for function, after in function_lines(REPO / f"examples/{name}.py").items():
            before = template[function]
            codes = difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
            counts.append(sum(max(b - a, d - c) for tag, a, b, c, d in codes if tag != "equal"))
        assert f"| `{name}.py` | {counts[0]} | {counts[1]} | {counts[2]} |" in page, counts
