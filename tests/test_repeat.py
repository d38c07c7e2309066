"""From one run to the next: more epochs, the same settings again, weights of another run, what config.json remembers."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_mnist
from harness import session
from harness.device import restoring_globals
from harness.errors import Stopped, UserError
from harness.options import given_options, option, parse
from tests import forking, killing
from tests.conftest import call, clean_environment
from tests.wandb_server import serving

SMALL = "--dataset synthetic --slice 40 --batch_size 64 --watch off --log_every 2".split()


def train(cwd: Path, *arguments: object, expected: int = 0, script: str = "train_mnist.py") -> str:
    done = call(script, *arguments, cwd=cwd)
    assert done.status == expected, done.err
    return done.out if expected == 0 else done.err


def history(directory: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (directory / "history.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in killing.TIMINGS} for row in rows]


def same_run(a: Path, b: Path) -> bool:
    files = ("model.pt", "predictions.csv")
    same = [(a / file).read_bytes() == (b / file).read_bytes() for file in files]
    return all(same) and history(a) == history(b)


@pytest.fixture(scope="module")
def cwd(tmp_path_factory) -> Path:
    """With a run of two epochs in two, and one of four in four."""
    cwd = tmp_path_factory.mktemp("repeat")
    constant = [*SMALL, "--schedule", "constant"]
    train(cwd, *constant, "--epochs", 2, "--output_dir", "two", "--id", "same")
    train(cwd, *constant, "--epochs", 4, "--output_dir", "four", "--wandb", "disabled")
    return cwd


def test_more_epochs_are_as_if_asked_for_from_the_start(cwd):
    """Any other number of epochs was refused."""
    out = train(cwd, "--output_dir", "two", "--resume", "--epochs", 4)
    assert "--epochs was 2, is 4." in out and "Resuming two at epoch 2" in out
    assert "The learning rate was 0.005, and is 0.005 in a schedule of" in out
    assert same_run(cwd / "two", cwd / "four")
    assert "is finished" in train(cwd, "--output_dir", "two", "--resume")
    fewer = train(cwd, "--output_dir", "two", "--resume", "--epochs", 3, expected=2)
    assert "--epochs was 4, is 3" in fewer
    assert (cwd / "two/metrics.json").exists()
    # The last line named the last of the two folders only, and `wandb sync` of that the last rows.
    *_, last = out.splitlines()
    command = re.search(r"wandb (sync( wandb/offline-run-\S+-same){2})$", last)[1]
    with serving() as server:
        environment = clean_environment(cwd) | server.environment()
        done = forking.run([forking.WANDB, *command.split()], cwd=cwd, env=environment, text=True)
        assert done.returncode == 0, done.stderr
        steps = [row["_step"] for row in server.rows("same")]
    assert steps == [row["step"] for row in history(cwd / "four")]


def test_a_longer_cycle(tmp_path):
    """OneCycleLR refuses to step beyond the end that its checkpoint has."""
    shared = [*SMALL, "--wandb", "disabled"]
    train(tmp_path, *shared, "--epochs", 2, "--output_dir", "two")
    train(tmp_path, *shared, "--epochs", 4, "--output_dir", "four")
    out = train(tmp_path, "--output_dir", "two", "--resume", "--epochs", 4)
    grown, straight = (
        [row["train/learning_rate"] for row in history(tmp_path / name)] for name in ("two", "four")
    )
    half = len(grown) // 2
    assert len(grown) == len(straight) and grown[half:] == straight[half:]
    assert grown[:half] != straight[:half]
    before, now = re.search(r"learning rate was (\S+), and is (\S+) in a sch", out).groups()
    assert float(before) < 0.0002 < float(now)


def test_more_epochs_after_patience_was_over(tmp_path):
    """At a learning rate of almost nothing the loss does not improve beyond rounding."""
    arguments = [*SMALL, "--schedule", "constant", "--learning_rate", "1e-30", "--patience", 2]
    arguments += ["--wandb", "disabled", "--output_dir", "out"]
    train(tmp_path, *arguments, "--epochs", 9)
    assert history(tmp_path / "out")[-1]["epoch"] == 3
    train(tmp_path, "--output_dir", "out", "--resume", "--epochs", 10)
    assert history(tmp_path / "out")[-1]["epoch"] == 5


def test_a_copied_directory_does_not_mix_with_its_original(cwd, monkeypatch):
    """Both went on under one id: W&B had rows of the one in place of the other's."""
    monkeypatch.chdir(cwd)
    train(cwd, *SMALL, "--max_steps", 2, "--wandb", "offline", "--output_dir", "original")
    shutil.copytree("original", "copied")
    more = ["--resume", "--max_steps", 3]
    error = train(cwd, "--output_dir", "copied", *more, expected=2)
    assert "--resume: copied is a copy of original, and W&B would mix the two" in error
    train(cwd, "--output_dir", "original", *more)  # a copy may be a backup
    shutil.rmtree("original")
    train(cwd, "--output_dir", "copied", *more)  # as if it had been moved


def test_another_runs_settings_as_defaults(cwd):
    train(cwd, "--config", "four/config.json", "--output_dir", "again")
    assert same_run(cwd / "again", cwd / "four")
    (cwd / "own.yaml").write_text("epochs: 1\nlearning_rate: 1e-3\nkernels: [4, 8]\n")
    own = ["--config", "own.yaml", *SMALL, "--wandb", "disabled", "--output_dir", "own"]
    train(cwd, *own, "--learning_rate", 0.002)
    config = json.loads((cwd / "own/config.json").read_text())
    found = [config[name] for name in ("epochs", "learning_rate", "kernels")]
    assert found == [1, 0.002, [4, 8]]
    for content, problem in {
        "epoch: 1": "does not fit this script: epoch: no such option; did you mean epochs?",
        "epochs: [1": "can't be read: while parsing",
        "epochs: many": "does not fit this script: epochs: must be a whole number",
        "- epochs": "can't be read: it holds no options",  # "'list' object has no attribute 'get'"
        "": "can't be read: it holds no options",
        "watch: yes": "does not fit this script: watch: must be one of off, gradients, parameters, all; got True",
        "name: yes": "does not fit this script: name: must be text, got True: put it in quotes",
        "tags: {a: 1}": "does not fit this script: tags: must be text, got {'a': 1}: put it in quotes",
    }.items():
        (cwd / "x.yaml").write_text(content)
        err = train(cwd, "--config", "x.yaml", expected=2)
        assert f"--config: x.yaml {problem}" in err and err.count("\n") == 1
    assert "can't be read" in train(cwd, "--config", "missing.json", expected=2)
    other = train(cwd, "--config", "own/config.json", expected=2, script="train_cola.py")
    assert "--config: own/config.json does not fit this script" in other
    # Its options happen to be valid: they were taken.
    other = train(cwd, "--config", "four/config.json", expected=2, script="train_cola.py")
    assert "the run in four is of another script" in other


@pytest.mark.quick
def test_a_file_of_ones_own_is_a_request(tmp_path, monkeypatch):
    """Its output directory and --wandb online were ignored, and a run to resume had the last word."""
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text("\ufeffoutput_dir: out\nwandb: online\nwatch: off\nepochs: 3\n")
    arguments = ["--config", "own.yaml", "--seed", "7"]
    settings = parse(train_mnist.Settings, arguments)
    assert (settings.output_dir, settings.wandb, settings.seed) == ("out", "online", 7)
    assert settings.watch == "off"  # refused: YAML takes it for false
    config = dataclasses.asdict(settings) | {"epochs": 2, "batch_size": 8, "id": "a"}
    Path("out").mkdir()
    # Of an older version, too, which wrote no task_name, and was refused.
    Path("out/config.json").write_text(json.dumps(config | {"metrics": {}, "run_token": "b"}))
    resumed = parse(train_mnist.Settings, [*arguments, "--resume"])
    assert (resumed.epochs, resumed.batch_size, resumed.id) == (3, 8, "a")
    another = parse(train_mnist.Settings, ["--config", "out/config.json"])
    assert (another.epochs, another.output_dir, another.id) == (2, None, None)
    assert another.wandb == "auto"  # the machine may have no network


@pytest.mark.quick
def test_a_command_repeats_values_that_begin_with_a_dash():
    """argparse took them for options: "expected one argument"."""
    tags = ["--tags=-x", "--tags=b c"]
    given = ["--name=-1", "--notes=--not an option", *tags, "--output_dir=-o", "--save_code"]
    settings = parse(train_mnist.Settings, [*given, "--deterministic", "no", "--kernels", "4", "8"])
    again = given_options(settings)
    assert parse(train_mnist.Settings, again) == settings
    assert "--notes=--not an option" in again and settings.tags == ["-x", "b c"]


@pytest.mark.quick
def test_the_last_line_quotes_a_path(tmp_path, monkeypatch):
    """`wandb leet` had two arguments."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my runs/wandb/offline-run-1"
    wandb_run = SimpleNamespace(disabled=False, dir=str(folder / "files"))
    run = SimpleNamespace(wandb=wandb_run, online=False, earlier_logs=[])
    line = session._where_to_look(run, Path("out"))
    (look,) = re.findall(r"look at it: (.*) \| upload", line) or [None]
    assert look in (None, "wandb leet 'my runs/wandb/offline-run-1'")  # None: before W&B 0.28
    # --append: before W&B 0.29
    assert re.search(r"upload it: wandb sync (--append )?'my runs/wandb/offline-run-1'$", line)


@pytest.mark.quick
def test_a_signal_amid_imports_ends_in_a_line(monkeypatch):
    """It left torch half imported; restoring its settings then failed with a traceback."""

    def broken(_: bool) -> None:
        raise AttributeError("module 'torch._dynamo' has no attribute 'utils'")

    with pytest.raises(Stopped), restoring_globals():
        monkeypatch.setattr(torch, "use_deterministic_algorithms", broken)
        raise Stopped("SIGTERM", 143)


def test_config_tells_how_it_was_made(cwd):
    config = json.loads((cwd / "four/config.json").read_text())
    arguments = config["command"].split("train_mnist.py ")[1].split()
    train(cwd, *arguments[1:], "--output_dir", "repeated")  # without its own --output_dir
    assert arguments[0] == "--output_dir=four" and same_run(cwd / "repeated", cwd / "four")
    assert config["watch_every"] is None  # `--config` would take another run's, of other batches
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [-+]\d{4}", config["date"])
    assert config["host"] and re.fullmatch(
        r"[0-9a-f]{40}(-modified)?|None", str(config["git_commit"])
    )
    assert config["versions"]["python"].startswith("3.")


def test_other_versions_and_changed_code_are_named(cwd):
    shutil.copytree(cwd / "four", cwd / "moved")
    file = cwd / "moved/config.json"
    config = json.loads(file.read_text())
    config["versions"]["torch"] = "2.0.1"
    config["code"]["viz.py"] = "0"
    file.write_text(json.dumps(config))
    (cwd / "moved/metrics.json").unlink()
    out = train(cwd, "--output_dir", "moved", "--resume", "--wandb", "disabled")
    expected = r"The run goes on with a changed viz.py, torch \S+ instead of 2.0.1: results may"
    assert re.search(expected, out)
    kept = json.loads(file.read_text())
    assert kept["versions"]["torch"] == "2.0.1"
    assert kept["resumed"][0]["versions"]["torch"] != "2.0.1"
    assert kept["resumed"][0]["code"]["viz.py"] != "0"


def test_a_name_for_a_finished_run_is_not_ignored_in_silence(cwd):
    command = ["--output_dir", "four", "--resume", "--wandb", "disabled"]
    assert "changes nothing" not in train(cwd, *command)
    assert "--name changes nothing in a finished run." in train(cwd, *command, "--name", "new")


def test_what_a_kill_at_the_first_write_leaves_is_cleared(cwd):
    (cwd / "left").mkdir()
    (cwd / "left/.config.json.999999.unfinished").write_text('{"epo')
    train(cwd, *SMALL, "--epochs", 1, "--output_dir", "left", "--wandb", "disabled")
    assert not list((cwd / "left").glob(".config*"))


def test_weights_of_another_run(cwd):
    """With a learning rate of almost nothing they are those of the new run."""
    weights = torch.load(cwd / "four/model.pt")
    still = [*SMALL, "--epochs", 1, "--learning_rate", "1e-30", "--wandb", "disabled"]
    for number, source in enumerate(("four", "four/model.pt")):
        train(cwd, *still, "--init_from", source, "--output_dir", f"from{number}")
        started = torch.load(cwd / f"from{number}/model.pt")
        assert all(torch.equal(started[name], weights[name]) for name in weights)
    for source, problem in {"four/config.json": "", "missing": "No such file"}.items():
        err = train(cwd, *still, "--init_from", source, expected=2)
        assert "does not hold the weights of this model" in err and problem in err
    err = train(cwd, *still, "--init_from", "four", "--kernels", 2, 3, expected=2)
    assert "size mismatch" in err and err.count("\n") == 1


def test_the_model_of_another_cola_run(references, tmp_path):
    from safetensors.torch import load_file

    before = references["train_cola.py"].out
    arguments = killing.ARGUMENTS["train_cola.py"].replace("--model scratch", "").split()
    arguments += ["--epochs", 1, "--learning_rate", "1e-30", "--weight_decay", 0]
    arguments += ["--wandb", "disabled", "--init_from"]
    train(tmp_path, *arguments, before, "--output_dir", "out", script="train_cola.py")
    old, new = (load_file(path / "model/model.safetensors") for path in (before, tmp_path / "out"))
    assert all(new[name].equal(old[name]) for name in old)
    err = train(tmp_path, *arguments, "missing", expected=2, script="train_cola.py")
    assert "--init_from missing: there is no missing/model" in err
    both = [*arguments, before, "--model", "scratch"]
    assert "exclude each other" in train(tmp_path, *both, expected=2, script="train_cola.py")


def test_an_explicit_none_is_not_ignored_on_resuming(cwd):
    """Only an option that declares it has a placeholder; for any other, the run's value was kept in silence."""
    parts = [*SMALL, "--epochs", 1, "--micro_batch_size", 16, "--wandb", "disabled"]
    train(cwd, *parts, "--output_dir", "parts")
    command = ["--output_dir", "parts", "--resume", "--wandb", "disabled"]
    err = train(cwd, *command, "--micro_batch_size", "None", expected=2)
    assert "--micro_batch_size was 16, is None" in err
    assert "is finished" in train(cwd, *command, "--device", "auto")


@pytest.mark.quick
def test_an_option_can_not_have_a_name_that_config_json_uses():
    """`--config` took the machine's name for the option, and a resumed run was refused."""

    @dataclasses.dataclass(frozen=True)
    class Settings(train_mnist.Settings):
        host: str = option("localhost", "of the database")

    with pytest.raises(UserError, match="host: config"):
        parse(Settings, [])
