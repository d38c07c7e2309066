"""Sweeps: the real `wandb sweep` and `wandb agent` against a fake server, and the same files without a server."""

import csv
import html
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
import pytest
import torch
import yaml
from optuna.trial import TrialState

import sweep_offline
import train_cola
from harness.errors import UserError
from offline_sweep import file as sweep_file
from offline_sweep import study as sweep_study
from offline_sweep import trials
from offline_sweep.parameters import optuna_distribution, suggest
from reporting.sweep import show_sweep
from tests import forking, killing
from tests.conftest import REPO, clean_environment
from tests.wandb_server import WandbServer, serving

SMALL = {
    "train_file": str(killing.SHORT),
    "valid_file": str(killing.SHORT),
    "model": "scratch",
    "epochs": 2,
}
PROMPT = {"WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1"}  # W&B sends rows every second, not every 15
GRID = """
program: objective.py
method: grid
metric: {name: score, goal: maximize}
parameters:
  x: {values: [1, 2, 3, 4]}
  y: {min: -2, max: 0}
  seconds: {value: 0.5}
  epochs: {value: 3}
"""
CELLS = [f"{x} {y}" for x in (1, 2, 3, 4) for y in (-2, -1, 0)]


# ------------------------------------------------------------------------------------------------ with W&B


def wandb(*arguments: str, cwd: Path, server: WandbServer) -> str:
    """The output of W&B's command line, called in a directory with the scripts and packages of a clone."""
    for path in [*REPO.glob("*.py"), REPO / "harness", REPO / "tasks"]:
        if not (cwd / path.name).exists():
            (cwd / path.name).symlink_to(path)
    environment = clean_environment(cwd, **server.environment(), **PROMPT)
    environment["PATH"] = (
        f"{Path(sys.executable).parent}:{environment['PATH']}"  # the agent starts "python"
    )
    program = "import sys, wandb.wandb_agent, wandb.cli.cli\nwandb.wandb_agent.Agent.POLL_INTERVAL = 1\n"  # not 5 seconds
    program += "sys.exit(wandb.cli.cli.cli())"  # as the command `wandb` does
    command = [sys.executable, "-c", program, *arguments]
    done = forking.run(
        command, cwd=cwd, env=environment, stderr=subprocess.STDOUT, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_wandb_sweep_and_wandb_agent(tmp_path):
    with serving() as server:
        assert "wandb agent tester/cola/sweep1" in wandb(
            "sweep", str(REPO / "sweep.yaml"), cwd=tmp_path, server=server
        )
        assert yaml.safe_load(server.sweep_file) == yaml.safe_load(
            (REPO / "sweep.yaml").read_text()
        )
        server.trials = [
            SMALL | {"learning_rate": 0.002, "batch_size": 8},
            SMALL | {"learning_rate": "5e-4", "batch_size": 16.0, "watch": "off"},
            SMALL | {"epochs": 9999, "batch_size": 1},
        ]
        server.to_stop = {"run0": 25}
        out = wandb("agent", "tester/cola/sweep1", cwd=tmp_path, server=server)
    assert "Traceback" not in out and "Ignoring" not in out
    assert (
        out.count("stopped by the sweep at step ") == out.count(", saved. To go on: python ") == 1
    )
    expected = {"run2": (0.002, 8), "run1": (0.0005, 16), "run0": (0.001, 1)}
    assert server.runs.keys() == expected.keys()
    for run_id, (learning_rate, batch_size) in expected.items():
        config = json.loads((tmp_path / f"runs/cola-{run_id}/config.json").read_text())
        assert (config["learning_rate"], config["batch_size"]) == (learning_rate, batch_size)
        assert (server.runs[run_id]["exit"], server.runs[run_id]["states"]) == (0, ["complete"])
        epoch_rows = [row for row in server.rows(run_id) if "train/loss_epoch" in row]
        assert len(epoch_rows) == config["epochs"] or run_id == "run0"
        assert len(epoch_rows) >= 2 and all("valid/mcc" in row for row in epoch_rows)
    stopped = tmp_path / "runs/cola-run0"
    assert not (stopped / "metrics.json").exists()
    assert torch.load(stopped / "checkpoint.pt", weights_only=True)["position"]["batch"] > 0


def test_the_python_way(tmp_path):
    """Five runs in one process: the server stops the third; the others give the same results as separate processes."""
    program = f"""
import json, sys
sys.path.insert(0, {str(REPO)!r})
import wandb, yaml
import train_cola
from wandb.agents import pyagent

pyagent.Agent.HEARTBEAT_SLEEP_SECONDS = 1
sweep_id = wandb.sweep(yaml.safe_load(open({str(REPO / "sweep.yaml")!r})), project="cola")
results, loads, load = [], [], train_cola.load
train_cola.load = lambda session: loads.append(session.settings.seed) or load(session)
wandb.agent(sweep_id, function=lambda: results.append(train_cola.main([])), count=5, project="cola", entity="tester")
json.dump([results, loads], open("results.json", "w"))
"""
    trials = [
        SMALL | {"learning_rate": 0.002, "batch_size": 8},
        SMALL | {"seed": 7},
        SMALL | {"epochs": 9999, "batch_size": 1},
        SMALL | {"learning_rate": "5e-4", "batch_size": 16.0},
        SMALL | {"dataset": "synthetic", "train_file": None, "valid_file": None, "max_steps": 5},
    ]
    with serving() as server:
        server.trials, server.to_stop = list(trials), {"run2": 3}
        environment = clean_environment(tmp_path, **server.environment(), **PROMPT)
        done = forking.run(
            [sys.executable, "-c", program], cwd=tmp_path, env=environment, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert {run["exit"] for run in server.runs.values()} == {0}
    assert "Traceback" not in done.stderr and "!!" not in done.stderr
    results, loads = json.loads((tmp_path / "results.json").read_text())
    assert loads == [
        trial.get("seed", 42) for trial in trials
    ]  # once each, with the final settings
    assert (
        len(results) == 5
        and results[2] == {}
        and not (tmp_path / "runs/cola-run2/metrics.json").exists()
    )

    def differing_results(number: int) -> list[str]:
        arguments = [f"--{name}={value}" for name, value in trials[number].items()]
        command = [
            sys.executable,
            REPO / "train_cola.py",
            *arguments,
            "--wandb=disabled",
            f"--output_dir=alone{number}",
        ]
        process = forking.run(command, cwd=tmp_path, env=clean_environment(tmp_path))
        assert process.returncode == 0, process.stderr
        swept_dir = tmp_path / f"runs/cola-run{4 - number}"
        assert results[number] == json.loads((swept_dir / "metrics.json").read_text())
        swept, alone = killing.outcome(swept_dir), killing.outcome(tmp_path / f"alone{number}")
        return [name for name in alone if not killing.same(alone[name], swept[name])]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(differing_results, (0, 1, 3, 4))) == [[], [], [], []]


# --------------------------------------------------------------------------------------------- without a server


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """A directory with objective.py, which stands in for a training script."""
    shutil.copy(REPO / "tests/objective.py", tmp_path)
    return tmp_path


def start_search(cwd: Path, sweep: str, *options: str) -> subprocess.Popen:
    """Start sweep_offline.py on a sweep file with this content."""
    (cwd / "s.yaml").write_text(sweep)
    return forking.Popen(
        [sys.executable, REPO / "sweep_offline.py", "s.yaml", *options],
        cwd=cwd,
        env=clean_environment(cwd),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_search(cwd: Path, sweep: str, *options: str, status: int = 0) -> str:
    """Run sweep_offline.py, check its exit status, and return its output."""
    process = start_search(cwd, sweep, *options)
    out = process.communicate(timeout=200)[0]
    assert process.returncode == status and "Traceback" not in out, out
    return out


def read_lines(file: Path) -> list[str]:
    """The lines of a file; none if it does not exist."""
    return file.read_text().splitlines() if file.exists() else []


def trial_rows(cwd: Path) -> list[dict[str, str]]:
    """The rows of trials.csv."""
    with (cwd / "runs/sweep-s/trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_grid_that_is_killed_twice_visits_every_cell_once(workdir):
    rng = random.Random(0)
    for _ in range(2):
        seen = len(read_lines(workdir / "starts.txt"))
        process = start_search(workdir, GRID, "--jobs", "2")
        while len(read_lines(workdir / "starts.txt")) < seen + 3:
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        process.communicate()
    assert len(read_lines(workdir / "visits.txt")) < len(CELLS)
    out = run_search(workdir, GRID, "--jobs", "2")
    assert sorted(read_lines(workdir / "visits.txt")) == sorted(CELLS)
    assert (
        "12 complete" in out and [row["state"] for row in trial_rows(workdir)] == ["complete"] * 12
    )
    assert "12 complete" in run_search(workdir, GRID)
    assert len(read_lines(workdir / "visits.txt")) == 12


def test_processes_that_share_a_storage_never_run_a_cell_twice(workdir):
    processes = [start_search(workdir, GRID, "--storage", "sqlite:///shared.db") for _ in range(3)]
    out = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], out
    assert sorted(read_lines(workdir / "visits.txt")) == sorted(CELLS)
    assert len(read_lines(workdir / "starts.txt")) == len(CELLS)
    seen = [text.partition("the best:")[0].count(": complete") for text in out]
    assert sum(seen) == len(CELLS)


def test_starts_at_the_same_time(workdir):
    sweep = GRID.replace("0.5", "0").replace("[1, 2, 3, 4]", "[1]")
    processes = [start_search(workdir, sweep) for _ in range(4)]
    out = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4 and "Traceback" not in "".join(
        out
    ), out
    assert sorted(read_lines(workdir / "visits.txt")) == sorted(CELLS[:3])


def test_ctrl_c_stops_runs_that_can_be_resumed(workdir):
    slow = GRID.replace("0.5", "6").replace("epochs: {value: 3}", "epochs: {value: 6}")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        seen = len(read_lines(workdir / "starts.txt"))
        process = start_search(workdir, slow, "--count", "2", "--jobs", "2")
        while len(read_lines(workdir / "starts.txt")) < seen + 2:
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(1.5)
        if number == signal.SIGUSR1:  # as Slurm warns
            killing.signal_step(process, number)
        else:
            process.send_signal(number)
        out = process.communicate(timeout=100)[0]
        assert process.returncode == 128 + number and "the same command resumes them" in out, out
        assert (
            subprocess.run(
                ["pgrep", "-f", f"objective.py.*{workdir}"], capture_output=True
            ).returncode
            == 1
        )
    out = run_search(workdir, slow, "--count", "2", "--jobs", "2")
    assert "2 complete" in out and len(read_lines(workdir / "visits.txt")) == 2
    assert len(read_lines(workdir / "starts.txt")) == 8
    assert all(row["epochs_done"] == "6" for row in trial_rows(workdir))


def test_parameters_and_results_have_different_columns(workdir):
    """A sweep over `epochs` had two columns of that name; a parameter may be called like any other column."""
    sweep = GRID[: GRID.index("parameters:")]
    sweep += "parameters: {epochs: {values: [1, 5]}, error: {values: [high]}}\n"
    sweep += "command: ['${interpreter}', '${program}', '--epochs=2']\n"
    run_search(workdir, sweep)
    text = (workdir / "runs/sweep-s/trials.csv").read_text()
    header = "trial,state,score,epochs,parameters.error,epochs_done,error,output_dir"
    assert text.splitlines()[0] == header
    found = [tuple(row.values())[:-1] for row in trial_rows(workdir)]
    assert found == [
        ("0", "complete", "-10.0", "1", "high", "2", ""),
        ("1", "complete", "-10.0", "5", "high", "2", ""),
    ]


def test_failing_trials_are_recorded_and_the_search_goes_on(workdir):
    out = run_search(workdir, GRID.replace("seconds: {value: 0.5}", "fail: {value: odd}"))
    assert "6 complete, 6 fail" in out
    failed = [row for row in trial_rows(workdir) if row["state"] == "fail"]
    assert {row["error"] for row in failed} == {
        "objective.py: error: x is 1",
        "objective.py: error: x is 3",
    }


def test_three_failures_at_the_start_end_the_search(workdir):
    out = run_search(
        workdir, GRID.replace("seconds: {value: 0.5}", "fail: {value: true}"), status=1
    )
    assert out.splitlines()[-1].startswith(
        "sweep_offline.py: error: the first 3 trials failed; last error: objective.py:"
    )
    assert out.count(": fail,") == 3


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        ("nan", "score is nan"),
        ("other", "the run has no metric score"),
        ("stop", "exit status 143"),  # it is stopped, but not by the search
    ],
)
def test_a_run_without_a_valid_metric_fails(failure, error, workdir):
    sweep = GRID.replace("seconds: {value: 0.5}", f"fail: {{value: {failure}}}").replace(
        "[1, 2, 3, 4]", "[1]"
    )
    hyperband = "early_terminate: {type: hyperband, min_iter: 1, max_iter: 3}\nparameters:"
    out = run_search(workdir, sweep.replace("parameters:", hyperband), "--count", "2", status=1)
    assert (
        f"sweep_offline.py: error: no trial completed; last error: {error} (runs/sweep-s/"
        in out.splitlines()[-1]
    )
    assert [row["error"] for row in trial_rows(workdir)] == [error] * 2 and "2 fail" in out
    assert len(read_lines(workdir / "starts.txt")) == 2


def test_the_files_of_another_program_fail_its_trial_only(workdir):
    """Rows that are no JSON, no text or no numbers, and a value that no float holds."""
    sweep = GRID.replace("seconds: {value: 0.5}", "fail: {values: [garbage, no]}").replace(
        "[1, 2, 3, 4]", "[1]"
    )
    assert "3 complete, 3 fail" in run_search(workdir, sweep)
    assert {row["error"] for row in trial_rows(workdir) if row["state"] == "fail"} == {
        f"score is {10**400}"
    }


def test_a_directory_that_is_gone_or_damaged_ends_in_one_line(workdir):
    """Removed under way, and a damaged database."""
    (workdir / "gone.py").write_text("import shutil\nshutil.rmtree('runs')\n")
    out = run_search(workdir, GRID.replace("objective.py", "gone.py"), "--count", "2", status=1)
    assert "the storage does not answer" in out.splitlines()[-1] and "Traceback" not in out
    shutil.rmtree(workdir / "runs", ignore_errors=True)
    (workdir / "runs/sweep-s").mkdir(parents=True)
    (workdir / "runs/sweep-s/study.db").write_bytes(b"no database" * 1000)
    out = run_search(workdir, GRID, "--count", "1", status=2)
    assert out.splitlines()[-1].endswith("file is not a database")


def test_names_that_differ_have_directories_that_differ(workdir):
    quick = GRID.replace("0.5", "0")
    for name in ("a b", "a-b", "日本", "中国"):
        run_search(workdir, f"name: {name}\n{quick}", "--count", "1")
    assert (
        len(list((workdir / "runs").iterdir()))
        == len(list((workdir / "runs").glob("sweep-*/trials.csv")))
        == 4
    )


def test_the_order_of_the_parameters_does_not_matter(workdir):
    first, second = "x: {values: [1, 2, 3, 4]}", "y: {min: -2, max: 0}"
    quick = GRID.replace("0.5", "0")
    run_search(workdir, quick, "--count", "5")
    reordered = quick.replace(first, "X").replace(second, first).replace("X", second)
    # Whoever reads trials.csv meanwhile, or writes it too, as the tasks of an array do, has a whole file.
    with (workdir / "runs/sweep-s/trials.csv").open() as before:
        out = run_search(workdir, reordered)
        assert len(before.readlines()) == 1 + 5
    assert sorted(read_lines(workdir / "visits.txt")) == sorted(CELLS)
    best = trial_rows(workdir)[0]
    assert (best["x"], best["y"]) == ("3", "-1")
    shown = f"the best:\ntrial {best['trial']}: complete, score 0.0000 | y=-1 x=3\n"
    assert shown in out


def test_directories_on_one_machine_that_share_a_storage(workdir):
    """Each resumes only its own runs, since only it has their files."""
    other = workdir / "other"
    other.mkdir()
    shutil.copy(workdir / "objective.py", other)
    sweep, storage = GRID.replace("[1, 2, 3, 4]", "[1, 2]"), f"sqlite:///{workdir}/shared.db"
    processes = [start_search(cwd, sweep, "--storage", storage) for cwd in (workdir, other)]
    out = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], out
    assert sorted(read_lines(workdir / "visits.txt") + read_lines(other / "visits.txt")) == sorted(
        CELLS[:6]
    )
    assert "6 complete" in run_search(workdir, sweep, "--storage", storage)


def test_a_directory_that_comes_back_elsewhere_resumes_its_trial(workdir):
    """As in a pod with another name: its files tell whose trials it has."""
    place, sweep, storage = (
        workdir / "before",
        GRID.replace("0.5", "3"),
        f"sqlite:///{workdir}/shared.db",
    )
    place.mkdir()
    shutil.copy(workdir / "objective.py", place)
    process = start_search(place, sweep, "--storage", storage, "--count", "1")
    while not read_lines(place / "starts.txt"):
        time.sleep(0.02)
    process.terminate()
    process.communicate()
    place = place.rename(workdir / "after")
    assert "1 complete" in run_search(place, sweep, "--storage", storage, "--count", "1")
    assert len(read_lines(place / "starts.txt")) == 2 and len(read_lines(place / "visits.txt")) == 1


def test_the_direction_the_threads_the_group_and_the_best_command(workdir, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    out = run_search(workdir, GRID.replace("maximize", "minimize"), "--count", "4", "--jobs", "2")
    best = trial_rows(workdir)[0]
    assert (best["x"], best["y"], best["score"]) == ("1", "-2", "-5.0")
    assert (
        "to repeat the best run: python objective.py --x=1 --y=-2 --seconds=0.5 --epochs=3" in out
    )
    threads = (
        max(1, len(os.sched_getaffinity(0)) // 2)
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() // 2
    )
    assert {tuple(line.split()[2:]) for line in read_lines(workdir / "starts.txt")} == {
        (str(threads), "s")
    }


THREE = """
program: objective.py
method: random
metric: {name: score, goal: maximize}
parameters: {a: {min: 0.0, max: 1.0}, b: {min: 0.0, max: 1.0}, c: {min: 0.0, max: 1.0}}
"""


def recorded_search(cwd: Path, sweep: str, count: int, state: TrialState) -> optuna.Study:
    """Record trials as if a search had run them; the value is 3a + b."""
    (cwd / "s.yaml").write_text(sweep)
    parsed = sweep_file.read_sweep(Path("s.yaml"))
    parsed.directory.mkdir(parents=True)
    study, _ = sweep_study.open_study(parsed, f"sqlite:///{parsed.directory}/study.db")
    study.sampler = sweep_study.sampler(parsed, 0)
    for number in range(count):
        trial = study.ask()
        for name, parameter in parsed.searched().items():
            suggest(trial, name, parameter)
        for name, value in {
            "parameters": trial.params,
            "lock": "r",
            "run": f"r-{number}",
        }.items():
            trial.set_user_attr(name, value)
        complete = state == TrialState.COMPLETE
        study.tell(
            trial, 3 * trial.params["a"] + trial.params["b"] if complete else None, state=state
        )
    return study


def test_importances_of_a_known_function(workdir, monkeypatch):
    """The variance of 3a + b + 0c is nine tenths a's and one tenth b's; fewer than 20 trials can't tell."""
    monkeypatch.chdir(workdir)
    for count in (19, 100):
        study = recorded_search(workdir, THREE, count, TrialState.COMPLETE)
        figures = re.findall(r'data-figure="(.*?)"', show_sweep(study))
        assert len(figures) == (3 if count == 19 else 4)
        shutil.rmtree(workdir / "runs")
    (bars,) = json.loads(html.unescape(figures[3]))["data"]
    shares = dict(zip(bars["y"], bars["x"]))
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["a"] == pytest.approx(0.9, abs=0.1) and shares["b"] == pytest.approx(0.1, abs=0.1)
    assert shares["c"] < 0.05
    # It was 0, whatever the parameter did.
    normal = THREE.replace("a: {min: 0.0, max: 1.0}", "a: {distribution: normal}")
    study = recorded_search(workdir, normal, 20, TrialState.COMPLETE)
    assert show_sweep(study).count("data-figure") == 3


def test_a_search_without_a_complete_trial_fails(workdir, monkeypatch):
    monkeypatch.chdir(workdir)
    recorded_search(workdir, THREE, 3, TrialState.PRUNED)
    out = run_search(workdir, THREE, "--count", "3", status=1)
    assert out.splitlines()[-1] == "sweep_offline.py: error: no trial completed; all were pruned"
    assert "3 pruned" in out


@pytest.mark.parametrize("command", ["", "command: ['${interpreter}', '${program}']"])
def test_parameters_reach_a_program_that_reads_wandb_config(command, workdir):
    """As with W&B's agent, whether the command passes arguments or not."""
    (workdir / "reads_config.py").write_text(
        """
import argparse, json, pathlib
import wandb
parser = argparse.ArgumentParser()
parser.add_argument("--output_dir", type=pathlib.Path)
options, _ = parser.parse_known_args()
run = wandb.init(config={"lr": 0.5, "o": None})
options.output_dir.mkdir()
score = run.config.lr + run.config.o["b"][0]
(options.output_dir / "metrics.json").write_text(json.dumps({"score": score}))
"""
    )
    sweep = f"""
program: reads_config.py
method: grid
metric: {{name: score}}
{command}
parameters:
  lr: {{values: [0.1, 0.00001]}}
  o: {{parameters: {{a: {{value: 2021-01-01}}, b: {{values: [[1, 2]]}}}}}}
"""
    run_search(workdir, sweep, "--jobs", "2")
    assert [row["score"] for row in trial_rows(workdir)] == ["1.00001", "1.1"]


def test_hyperband_prunes_with_sigterm_and_keeps_the_results(workdir):
    """A program that ended with status 0, as the scripts do under W&B's agent, had failed."""
    sweep = (
        GRID.replace("epochs: {value: 3}", "epochs: {value: 9}\n  fail: {value: quiet}")
        .replace("0.5", "1")
        .replace("grid", "random")
        .replace(
            "parameters:",
            "early_terminate: {type: hyperband, min_iter: 1, max_iter: 9, eta: 3}\nparameters:",
        )
    )
    out = run_search(
        workdir,
        sweep.replace("{values: [1, 2, 3, 4]}", "{min: -50.0, max: 50.0}"),
        "--count",
        "12",
    )
    pruned = [row for row in trial_rows(workdir) if row["state"] == "pruned"]
    assert pruned and f"{len(pruned)} pruned" in out and "fail," not in out
    for row in pruned:
        assert 0 < len(read_lines(workdir / row["output_dir"] / "history.jsonl")) < 9
    best = max(float(row["score"]) for row in trial_rows(workdir) if row["state"] == "complete")
    assert best >= max(float(row["score"]) for row in pruned)


def test_bayes_finds_a_better_best_than_random(workdir, monkeypatch):
    """Compares medians over ten seeds, on a function with its maximum, 0, at x = 3 and y = -1."""
    monkeypatch.chdir(workdir)
    (workdir / "s.yaml").write_text(
        "program: objective.py\nmethod: bayes\nmetric: {name: score, goal: maximize}\n"
        "parameters: {x: {min: -10.0, max: 10.0}, y: {min: -10.0, max: 10.0}}"
    )
    best: dict[str, list[float]] = {"bayes": [], "random": []}
    for seed in range(10):
        for method, values in best.items():
            sweep = sweep_file.read_sweep(Path("s.yaml"))
            sweep.method = method
            study = optuna.create_study(direction=sweep.metric.goal)
            for number in range(20):
                study.sampler = sweep_study.sampler(sweep, seed * 100 + number)
                trial = study.ask()
                x, y = (
                    suggest(trial, name, parameter) for name, parameter in sweep.searched().items()
                )
                study.tell(trial, -((x - 3) ** 2) - (y + 1) ** 2)
            values.append(study.best_value)
    assert statistics.median(best["bayes"]) > statistics.median(best["random"])


def test_trials_of_train_cola_are_synced_as_one_group(tmp_path):
    parameters = {name: {"value": value} for name, value in SMALL.items()} | {
        "batch_size": {"values": [16, 60]}
    }
    sweep = {"program": str(REPO / "train_cola.py"), "method": "grid", "name": "s", "project": "p",
             "metric": {"name": "valid/mcc", "goal": "maximize"}, "parameters": parameters}  # fmt: skip
    assert "2 complete" in run_search(tmp_path, yaml.dump(sweep), "--jobs", "2")
    with serving() as server:
        command = killing.sync_command(tmp_path)
        assert (
            forking.run(
                command, cwd=tmp_path, env=clean_environment(tmp_path, **server.environment())
            ).returncode
            == 0
        )
    assert {run["group"] for run in server.runs.values()} == {"s"} and len(server.runs) == 2
    assert {row["output_dir"] for row in trial_rows(tmp_path)} == {
        f"runs/sweep-s/{run}" for run in server.runs
    }
    for row in trial_rows(tmp_path):
        figures = json.loads((tmp_path / row["output_dir"] / "metrics.json").read_text())
        assert figures["valid/mcc"] == float(row["valid/mcc"])


# ------------------------------------------------------------------------------------------------ the sweep file


def test_the_project_s_sweep_file():
    sweep = sweep_file.read_sweep(REPO / "sweep.yaml")
    assert (sweep.program, sweep.method, sweep.metric.name, sweep.metric.goal) == (
        "train_cola.py", "bayes", "valid/mcc", "maximize",
    )  # fmt: skip
    defaults = train_cola.Settings()
    for name, parameter in sweep.searched().items():
        value = getattr(defaults, name)
        distribution = optuna_distribution(parameter)
        assert distribution._contains(
            distribution.to_internal_repr(1e-3 if value is None else value)
        ), name


def test_values_of_a_list(workdir, monkeypatch):
    """As the file has them: no text for a list, and true is not 1."""
    monkeypatch.chdir(workdir)
    values = [1, "a", None, 2.5, [16, 32], True]
    sweep = {"program": "objective.py", "method": "grid", "parameters": {"p": {"values": values}}}
    (workdir / "s.yaml").write_text(yaml.dump(sweep))
    parsed = sweep_file.read_sweep(Path("s.yaml"))
    study = optuna.create_study(sampler=sweep_study.sampler(parsed, 0))
    assert [suggest(study.ask(), "p", parsed.parameters["p"]) for _ in values] == values
    assert study.trials[5].params["p"] == "true"


def test_lists_are_passed_as_wandb_passes_them(workdir, monkeypatch):
    monkeypatch.chdir(workdir)
    nested = "  kernels: {values: [[16, 32], [32, 64]]}\n  o: {parameters: {a: {values: [[1], [2]]}}}\n  seconds:"
    (workdir / "s.yaml").write_text(GRID.replace("  seconds:", nested))
    sweep = sweep_file.read_sweep(Path("s.yaml"))
    searched = {"x": 1, "y": 0, "kernels": [16, 32], "o/a": [2]}
    arguments = trials.trial_arguments(sweep, searched)
    assert {"--kernels=[16, 32]", "--o={'a': [2]}"} <= set(
        trials.trial_command(sweep, arguments, "x.json")
    )
    sweep.command = ["${program}", "${args_json}"]
    assert json.loads(trials.trial_command(sweep, arguments, "x.json")[1])["kernels"] == [16, 32]


def test_nested_parameters_are_passed_as_wandb_passes_them(workdir, monkeypatch):
    monkeypatch.chdir(workdir)
    (workdir / "s.yaml").write_text(
        GRID.replace(
            "  seconds:", "  o: {parameters: {a: {value: 1}, b: {values: [2]}}}\n  seconds:"
        )
    )
    sweep = sweep_file.read_sweep(Path("s.yaml"))
    arguments = trials.trial_arguments(sweep, {"x": 1, "y": 0, "o/b": 2})
    command = trials.trial_command(sweep, arguments, "x.json")
    assert (
        command[:3] == ["/usr/bin/env", sys.executable, "objective.py"]
        and "--o={'a': 1, 'b': 2}" in command
    )


MACROS = {
    "${args}": ["--flag=True", "--g=False", "--n=3", "--o={'a': 1}"],
    "${args_no_hyphens}": ["flag=True", "g=False", "n=3", "o={'a': 1}"],
    "${args_no_boolean_flags}": ["--flag", "--n=3", "--o={'a': 1}"],
    "${args_json}": ['{"flag": true, "g": false, "n": 3, "o": {"a": 1}}'],
    "${env}": ["/usr/bin/env"],
    "${interpreter}": [sys.executable],
    "${program}": ["objective.py"],
    "--home=${envvar:SOME_DIR}/x": ["--home=/data/x"],
    "${envvar:UNSET_NAME}": ["UNSET_NAME"],
    "plain": ["plain"],
}


def test_macros_of_the_command(workdir, monkeypatch):
    monkeypatch.chdir(workdir)
    monkeypatch.setenv("SOME_DIR", "/data")
    values = "parameters: {flag: {value: true}, g: {value: false}, n: {values: [3]}, o: {parameters: {a: {value: 1}}}}"
    (workdir / "s.yaml").write_text(GRID[: GRID.index("parameters:")] + values)
    sweep = sweep_file.read_sweep(Path("s.yaml"))
    arguments = trials.trial_arguments(sweep, {"n": 3})
    for macro, words in MACROS.items():
        sweep.command = [macro]
        assert trials.trial_command(sweep, arguments, "x.json") == words
        shown = trials.trial_command(sweep, arguments, "x.json", is_shown=True)
        differing = {"${env}": [], "${interpreter}": ["python"]}
        assert shown == ([macro] if "envvar" in macro else differing.get(macro, words))


MISTAKES = {
    "program": ("program: objective.py", "", "program: must be an existing script, not None"),
    "program file": ("objective.py", "missing.py", "program: must be an existing script, not 'missing.py'"),
    "method": ("method: grid", "", "method: Field required"),
    "unknown method": ("grid", "gird", "method: Input should be 'grid', 'random' or 'bayes', got 'gird'"),
    "unknown key": ("method:", "metod: grid\nmethod:", "metod: Extra inputs are not permitted, got 'grid'"),
    "metric is a string": ("{name: score, goal: maximize}", "score", "metric: Input should be a valid dictionary"),
    "metric without a name": ("name: score, ", "", "metric.name: Field required"),
    "goal": ("maximize", "maximise", "metric.goal: Input should be 'minimize' or 'maximize', got 'maximise'"),
    "taken": ("parameters:", "parameters:\n  output_dir: {values: [a, b]}", "parameters: output_dir is set by the search itself"),
    "no parameters": (GRID[GRID.index("parameters:") :], "parameters: {}", "parameters: Dictionary should have at least 1"),
    "parameters are a list": (GRID[GRID.index("parameters:") :], "parameters: [x]", "parameters: Input should be a valid dict"),
    "parameter is a number": ("{values: [1, 2, 3, 4]}", "3", "parameters.x: must be a name without spaces and /, with a mapping"),
    "values are not a list": ("[1, 2, 3, 4]", "3", "parameters.x: values: Input should be a valid list, got 3"),
    "no values": ("[1, 2, 3, 4]", "[]", "parameters.x: values: List should have at least 1 item"),
    "misspelt key": ("values", "valeus", "parameters.x: min: Field required, got {'valeus': [1, 2, 3, 4]"),
    "extra key": ("{min: -2, max: 0}", "{min: -2, max: 0, q: 1}", "parameters.y: q: only q_int_uniform has it"),
    "min alone": (", max: 0", "", "parameters.y: max: Field required"),
    "min above max": ("min: -2", "min: 2", "parameters.y: min: must be below max, got 2"),
    "a string": ("{min: -2, max: 0}", "{min: 1e-4, max: 1e-2, distribution: q_uniform}", "write 0.0001"),
    "not finite": ("{min: -2, max: 0}", "{min: 0.0, max: .inf, distribution: q_uniform}", "y: max: Input should be a finite"),
    "infinite grid": ("{min: -2, max: 0}", "{min: 0.0, max: 1.0}", "parameters.y: distribution: a grid can't visit every value"),
    "unknown kind": ("{min: -2, max: 0}", "{distribution: unifrom, min: 0, max: 1}", "must be one of constant"),
    "early": ("parameters:", "early_terminate: {type: median}\nparameters:", "early_terminate.type: Input should be 'hyperband'"),
    "no min_iter": ("parameters:", "early_terminate: {type: hyperband}\nparameters:", "early_terminate: needs min_iter, or"),
    "eta is text": ("parameters:", "early_terminate: {type: hyperband, min_iter: 1, eta: two}\nparameters:", "early_terminate.eta: "),
    "command": ("parameters:", "command: python\nparameters:", "command: Input should be a valid list, got 'python'"),
    "run_cap": ("parameters:", "run_cap: many\nparameters:", "run_cap: Input should be a valid integer, got 'many'"),
    "no option name": ("  x:", "  a/b:", "parameters.a/b: must be a name without spaces and /"),
    "distribution is a list": ("{min: -2, max: 0}", "{distribution: [uniform], min: 0, max: 1}", "distribution: must"),
    "an invalid date": ("{values: [1, 2, 3, 4]}", "{value: 2021-13-45}", "s.yaml: month must be in 1..12"),
    "recursive": ("{values: [1, 2, 3, 4]}", "&p {parameters: {a: *p}}", "Circular reference detected"),
    "huge": ("{min: -2, max: 0}", f"{{distribution: q_uniform, min: 0, max: {'9' * 400}}}", "y: max: Input should be"),
    "a NUL in the program": ("objective.py", '"a\\0"', "program: must be an existing script, not 'a\\x00'"),
    "not YAML": ("parameters:", "parameters: {", "s.yaml: while parsing a flow mapping"),
    "empty": (GRID, "", "the file: Input should be a valid dictionary"),
    "a list": (GRID, "- a\n", "the file: Input should be a valid dictionary"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_file_is_named_in_one_line(mistake, workdir, monkeypatch):
    monkeypatch.chdir(workdir)
    before, after, expected = MISTAKES[mistake]
    assert before in GRID
    (workdir / "s.yaml").write_text(GRID.replace(before, after))
    with pytest.raises(UserError) as error:
        sweep_offline.main(["s.yaml"])
    assert expected in str(error.value) and "\n" not in str(error.value) and error.value.status == 2
    assert not (workdir / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("missing.yaml", "missing.yaml: [Errno 2] No such file"),
        ("s.yaml --count 0", "--count: must be at least 1, got '0'"),
        ("s.yaml --storage nonsense", "--storage nonsense: "),
        ("r.yaml", "method random never ends by itself; give --count"),
        ("--count 3 s.yaml", "--count: [Errno 2] No such file"),
        ("s.yaml --cuont 3", "unknown option --cuont; did you mean --count?"),
    ],
)
def test_mistakes_on_the_command_line(arguments, expected, workdir):
    (workdir / "s.yaml").write_text(GRID)
    (workdir / "r.yaml").write_text(GRID.replace("grid", "random"))
    done = forking.run(
        [sys.executable, REPO / "sweep_offline.py", *arguments.split()],
        cwd=workdir,
        env=clean_environment(workdir),
        text=True,
    )
    assert done.returncode == 2 and expected in done.stderr and done.stderr.count("\n") == 1


def test_another_file_of_the_same_name_is_refused(workdir):
    run_search(workdir, GRID, "--count", "1")
    out = run_search(workdir, GRID.replace("[1, 2, 3, 4]", "[1, 2]"), "--count", "2", status=2)
    assert "the sweep 's' was started with different parameters" in out.splitlines()[-1]
    assert Counter(row["state"] for row in trial_rows(workdir)) == {"complete": 1}


@pytest.mark.parametrize(
    "arguments", [["a\nb.yaml"], ["s.yaml", "--storage", "a\nb"], ["s.yaml", "--a\nb"]]
)
def test_a_line_break_does_not_split_the_error(arguments, workdir):
    (workdir / "s.yaml").write_text(GRID)
    command = [sys.executable, REPO / "sweep_offline.py", *arguments]
    done = forking.run(command, cwd=workdir, env=clean_environment(workdir), text=True)
    assert done.returncode == 2 and re.fullmatch(r"sweep_offline.py: error: .*a b.*\n", done.stderr)


def test_errors_do_not_show_a_password(workdir):
    for url in ("postgresql://me:p@ss:word@localhost:1/x", "nonsense://me:p@ss:word@localhost/x"):
        line = run_search(workdir, GRID, "--storage", url, status=2).splitlines()[-1]
        assert (
            ":***@localhost" in line
            and "ss" not in line.replace("sweep", "")
            and "word" not in line
        ), line


def test_a_sweep_can_be_resumed_when_its_command_is_mended(workdir):
    """A program that can't be started, or an unknown macro, doesn't make the name unusable."""
    quick = GRID.replace("0.5", "0").replace("[1, 2, 3, 4]", "[1]")
    command = "command: [{}, '${{program}}', '${{args}}']\nparameters:"
    broken = workdir / "broken"
    broken.write_text("neither a binary nor a script with #!")
    broken.chmod(0o755)
    for program, error in (
        ("pyhton", "can't be started: pyhton '${program}' '${args}'"),
        ("./broken", "Exec format error"),
        ("'${prog}'", "unknown macro ${prog}; must be one of args, "),
        ("'${envvar:home}'", "unknown macro ${envvar:home}"),
        ('"a\\0"', "can't be started: 'a"),
    ):
        sweep = quick.replace("parameters:", command.format(program))
        assert f"error: command: {error}" in run_search(workdir, sweep, status=2).splitlines()[-1]
    assert "3 complete" in run_search(
        workdir, quick.replace("parameters:", command.format(sys.executable))
    )
    assert sorted(read_lines(workdir / "visits.txt")) == sorted(CELLS[:3])


def test_a_huge_grid_with_a_count(workdir):
    sweep = (
        GRID.replace("0.5", "0")
        .replace("[1, 2, 3, 4]", "[1]")
        .replace("min: -2", "min: -1000000000000")
    )
    assert "2 complete" in run_search(workdir, sweep, "--count", "2")
    assert [line.split()[1] for line in read_lines(workdir / "visits.txt")] == ["-1e+12"] * 2


@pytest.mark.parametrize(
    ("visible", "expected"), [(None, {"0", "1"}), ("3, GPU-5", {"3", "GPU-5"}), ("", {""})]
)
def test_parallel_runs_are_dealt_out_to_the_gpus(visible, expected, workdir, monkeypatch):
    """Each of the two runs at work has its own GPU."""
    fake = workdir / "bin/nvidia-smi"
    fake.parent.mkdir()
    fake.write_text(
        "#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-a)'\necho 'GPU 1: NVIDIA H200 (UUID: GPU-b)'\n"
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    run_search(workdir, GRID, "--jobs", "2", "--count", "2")
    gpus = read_lines(workdir / "gpus.txt")
    assert len(gpus) == 2 and set(gpus) == expected
