"""Sweep files offline and with W&B's own engine, PyPI's `sweeps`: the same verdicts, cells, values and early stops."""

import json
import math
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import optuna
import pytest
import yaml

import report
import sweep_offline
from harness.errors import UserError
from offline_sweep import file, trials
from offline_sweep import study as sweep_study
from offline_sweep.file import notes, read_sweep
from offline_sweep.parameters import suggest
from tests.conftest import REPO, clean_environment
from tests.test_sweeps import read_lines, run_search, start_search, trial_rows

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
METRIC = {"name": "score", "goal": "maximize"}
SEARCH = {"program": "objective.py", "method": "random", "metric": METRIC}


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """A directory with objective.py, which stands in for a training script."""
    shutil.copy(REPO / "tests/objective.py", tmp_path)
    return tmp_path


def written(content: dict, directory: Path) -> Path:
    """A sweep file with this content."""
    path = directory / "s.yaml"
    path.write_text(yaml.dump(content, allow_unicode=True), encoding="utf-8")
    return path


def search_over(parameter: dict, method: str = "random", **keys) -> dict:
    """The content of a file that searches one parameter, x."""
    return SEARCH | {"method": method, "parameters": {"x": parameter}} | keys


ACCEPTED = {
    "no metric": {"method": "grid", "parameters": {"x": {"values": [1, 2]}}},
    "no metric, random": {"method": "random", "parameters": {"x": {"min": 1, "max": 2}}},
    "float eta": search_over({"min": 0, "max": 1.0}, early_terminate={"type": "hyperband", "min_iter": 3, "eta": 2.5}),
    "s 0": search_over({"min": 0, "max": 1.0}, early_terminate={"type": "hyperband", "max_iter": 27, "s": 0}),
    "strict": search_over({"value": 1}, early_terminate={"type": "hyperband", "min_iter": 1, "strict": False}),
    "target": search_over({"value": None}, metric=METRIC | {"target": 0.95}),
    "impute": search_over({"min": 0.0, "max": 1}, "bayes", metric=METRIC | {"impute": "latest"}),
    "others": search_over({"value": 1}, controller={"type": "cloud"}, apiVersion="1", description="d", kind="sweep"),
    "null values": search_over({"values": [None, "LSTM"]}, "grid"),
    "nested": search_over({"parameters": {"lr": {"values": [0.1, 0.01]}, "b": {"value": 3}}}, "grid"),
    "int and float": search_over({"min": 0, "max": 0.5}),
    "probabilities": search_over({"values": [None, 0.1], "probabilities": [0.6, 0.4]}),
    "q in a grid": search_over({"distribution": "q_uniform", "min": 1, "max": 10, "q": 4}, "grid"),
    "log_uniform": search_over({"distribution": "log_uniform", "min": 0.00001, "max": 0.1}),
    "run_cap": search_over({"value": 1}, run_cap=3),
    "a command": search_over({"value": 1}, command=["python3", "train.py", 1]),
}  # fmt: skip
for _kind in ("normal", "log_normal", "q_normal", "q_log_normal", "beta", "q_beta"):
    ACCEPTED[_kind] = search_over({"distribution": _kind})
for _kind in ("q_log_uniform_values", "q_log_uniform", "inv_log_uniform", "inv_log_uniform_values"):
    ACCEPTED[_kind] = search_over({"distribution": _kind, "min": 1, "max": 5})
REFUSED = {
    "metric of bayes": ({"method": "bayes", "parameters": {"x": {"min": 1, "max": 2}}}, "metric"),
    "metric of early_terminate": (
        {"method": "random", "parameters": {"x": {"min": 1, "max": 2}},
         "early_terminate": {"type": "hyperband", "min_iter": 1}}, "metric"),
    "s alone": (search_over({"value": 1}, early_terminate={"type": "hyperband", "s": 2}), "early_terminate"),
    "eta": (search_over({"value": 1}, early_terminate={"type": "hyperband", "min_iter": 1, "eta": 1}), "early_terminate.eta"),
    "min_iter": (search_over({"value": 1}, early_terminate={"type": "hyperband", "min_iter": 0}), "early_terminate.min_iter"),
    "target": (search_over({"value": 1}, metric=METRIC | {"target": "high"}), "metric.target"),
    "impute": (search_over({"value": 1}, metric=METRIC | {"impute": "mean"}), "metric.impute"),
    "a number as name": (search_over({"value": 1}, name=3), "name"),
    "controller": (search_over({"value": 1}, controller={"type": "x"}), "controller.type"),
    "unknown key": (search_over({"value": 1}, metod="grid"), "metod"),
    "custom": (search_over({"value": 1}, "custom"), "method"),
    "equal limits": (search_over({"min": 1, "max": 1}), "parameters.x: min"),
    "text": (search_over({"min": "1e-4", "max": "1e-2"}), "parameters.x: min"),
    "q of uniform": (search_over({"distribution": "uniform", "min": 0, "max": 1, "q": 1}), "parameters.x: q"),
    "q 0": (search_over({"distribution": "q_beta", "q": 0}), "parameters.x: q"),
    "sigma": (search_over({"distribution": "normal", "sigma": -1}), "parameters.x: sigma"),
    "log of 0": (search_over({"distribution": "log_uniform_values", "min": 0, "max": 1}), "parameters.x: min"),
    "float int_uniform": (search_over({"distribution": "int_uniform", "min": 0.5, "max": 2}), "parameters.x: min"),
    "huge exponent": (search_over({"distribution": "log_uniform", "min": 0, "max": 1000}), "parameters.x"),
    "sum": (search_over({"values": [1, 2], "probabilities": [0.5, 0.4]}), "parameters.x: probabilities"),
    "one probability": (search_over({"values": [1, 2], "probabilities": [1.0]}), "parameters.x: probabilities"),
    "a negative one": (search_over({"values": [1, 2], "probabilities": [-1, 2]}), "parameters.x: probabilities"),
    "of categorical": (
        search_over({"distribution": "categorical", "values": [1, 2], "probabilities": [0.5, 0.5]}),
        "parameters.x: probabilities"),
    "probabilities in a grid": (search_over({"values": [1, 2], "probabilities": [0.5, 0.5]}, "grid"), "parameters.x"),
    "normal in a grid": (search_over({"distribution": "normal"}, "grid"), "parameters.x: distribution"),
    "constant": (search_over({"distribution": "constant"}), "parameters.x: value"),
    "both": (search_over({"value": 1, "min": 0}), "parameters.x: min"),
    "no values": (search_over({"values": []}), "parameters.x: values"),
    "max alone": (search_over({"max": 1}), "parameters.x: min"),
    "a name": (SEARCH | {"parameters": {"a b": {"value": 1}}}, "parameters.a b"),
    "nothing": (SEARCH | {"parameters": {}}, "parameters"),
    "nested": (search_over({"parameters": {"a": {"min": 1}}}), "parameters.x: parameters.a: max"),
}  # fmt: skip


def engine_accepts(content: dict) -> bool:
    """Whether W&B's engine takes a file and suggests finite values; a deprecated distribution is only a warning."""
    pytest.importorskip("sweeps", reason="W&B's engine: pip install --no-deps sweeps==0.3.0")
    from sweeps import next_runs
    from sweeps.config import schema_violations_from_proposed_config
    from sweeps.hyperband_stopping import hyperband_baseline_validate_and_fill

    violations = schema_violations_from_proposed_config(content)
    if any("specify base-e exponents" not in violation for violation in violations):
        return False
    try:
        random.seed(0)
        count = 1 if content["method"] == "bayes" else 20
        runs = [run for run in next_runs(content, [], n=count) if run]
        if "early_terminate" in content:
            hyperband_baseline_validate_and_fill(content)
    except Exception:
        return False
    values = [value["value"] for run in runs for value in run.config.values()]
    return all(math.isfinite(value) for value in values if isinstance(value, float))


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_wandb_accepts_is_accepted(name, tmp_path):
    """A third of 42 files that W&B runs was refused."""
    assert engine_accepts(ACCEPTED[name])
    assert read_sweep(written(ACCEPTED[name], tmp_path)).parameters


@pytest.mark.parametrize("name", REFUSED)
def test_what_wandb_refuses_is_refused_with_the_key(name, tmp_path):
    content, key = REFUSED[name]
    assert not engine_accepts(content)
    with pytest.raises(UserError) as error:
        read_sweep(written(content, tmp_path))
    assert str(error.value).startswith(f"{tmp_path}/s.yaml: {key}"), error.value
    assert "\n" not in str(error.value)


GRIDS = [
    {"wd": {"values": [0.05, 0.00005, 0.00005]}},  # trained 0.00005 twice
    {"a": {"values": [1, 1.0, True, "1", None, [1, 2], {"b": 1}]}},
    {"a": {"parameters": {"x": {"values": [1, 2]}, "y": {"min": -1, "max": 1}}}, "b": {"value": 0}},
    {"q": {"distribution": "q_uniform", "min": 1, "max": 10, "q": 4}, "c": {"values": ["x", "y"]}},
    {"q": {"distribution": "q_uniform", "min": 0.5, "max": 1, "q": 0.1}},
]


def offline_values(content: dict, directory: Path, count: int) -> list[dict]:
    """The parameters of so many trials, as a program gets them."""
    sweep = read_sweep(written(content, directory))
    study = optuna.create_study(direction=sweep.metric.goal)
    found = []
    for number in range(count):
        study.sampler = sweep_study.sampler(sweep, number)
        random.seed(number)
        trial = study.ask()
        values = {
            name: suggest(trial, name, parameter) for name, parameter in sweep.searched().items()
        }
        found.append(trials.trial_arguments(sweep, values))
        study.tell(trial, 0.0)
    return found


def engine_values(content: dict, count: int) -> list[dict]:
    """The parameters of so many trials of W&B's engine; fewer if its grid ends before."""
    from sweeps import next_runs

    random.seed(0)
    runs = next_runs(content, [], n=count)
    return [
        {name: value["value"] for name, value in run.config.items()}
        for run in runs
        if run is not None
    ]


def as_text(values: dict) -> str:
    rounded = json.loads(json.dumps(values), parse_float=lambda text: round(float(text), 9))
    return json.dumps(rounded, sort_keys=True)


@pytest.mark.parametrize("parameters", GRIDS)
def test_a_grid_has_wandbs_cells(parameters, tmp_path):
    pytest.importorskip("sweeps", reason="W&B's engine is not installed")
    content = {"method": "grid", "parameters": parameters}
    expected = engine_values(content, 100)
    count = sweep_study.count_trials(read_sweep(written(content, tmp_path)), None)
    found = offline_values(content, tmp_path, count)
    assert len(found) == len(expected)
    assert Counter(map(as_text, found)) == Counter(map(as_text, expected))


DRAWN = [
    {"min": 1, "max": 4},
    {"min": 0, "max": 0.5},
    {"distribution": "q_uniform", "min": 1, "max": 10, "q": 4},  # was 4 or 8, and never 0
    {"distribution": "q_uniform", "min": 0.0, "max": 1.0, "q": 0.25},
    {"distribution": "log_uniform", "min": -9, "max": -2},
    {"distribution": "log_uniform_values", "min": 0.0001, "max": 0.1},
    {"distribution": "inv_log_uniform", "min": 1, "max": 5},
    {"distribution": "inv_log_uniform_values", "min": 1, "max": 50},
    {"distribution": "q_log_uniform", "min": 0, "max": 4, "q": 3},
    {"distribution": "q_log_uniform_values", "min": 32, "max": 256, "q": 8},
    {"distribution": "normal", "mu": 1.0, "sigma": 0.4},
    {"distribution": "q_normal", "mu": 10, "sigma": 5, "q": 2},
    {"distribution": "log_normal", "mu": -2, "sigma": 0.5},
    {"distribution": "q_log_normal", "mu": 3},
    {"distribution": "beta", "a": 2, "b": 0.5},
    {"distribution": "q_beta", "a": 2, "b": 3, "q": 0.2},
    {"values": [1, 2, 3], "probabilities": [0.6, 0.1, 0.3]},
    {"values": [1, 2, 2]},
]


@pytest.mark.parametrize(
    "parameter", DRAWN, ids=lambda parameter: " ".join(map(str, parameter.values()))
)
def test_values_have_wandbs_distribution(parameter, tmp_path):
    """A Kolmogorov-Smirnov test with 1,000 values each can't tell them apart."""
    pytest.importorskip("sweeps", reason="W&B's engine is not installed")
    from scipy import stats

    content = search_over(parameter)
    found = [values["x"] for values in offline_values(content, tmp_path, 1000)]
    expected = [round(float(values["x"]), 12) for values in engine_values(content, 1000)]
    assert stats.ks_2samp([round(value, 12) for value in found], expected).pvalue > 0.001
    steps = {round(value, 9) for value in expected}
    if len(steps) < 10:
        assert {round(value, 9) for value in found} == steps
        assert {type(value) for value in found} <= {int, float}


# ------------------------------------------------------------------------------------------------ early stops


def simulated_histories(seed: int) -> list[list[float]]:
    """The metric of 300 runs, with 15 epochs each."""
    rng = random.Random(seed)
    histories = []
    for _ in range(300):
        level = rng.gauss(0, 1)
        histories.append([level - 1 / epoch + rng.gauss(0, 0.3) for epoch in range(1, 16)])
    return histories


def offline_stops(content: dict, histories: list[list[float]]) -> list[int]:
    """For each run of a search, the number of epochs after which it is stopped; all if it is not."""
    rules = file.EarlyTerminate(**content["early_terminate"])
    pruner = sweep_study.HyperbandPruner(rules)
    study = optuna.create_study(direction="maximize", pruner=pruner)
    epochs = []
    for history in histories:
        trial = study.ask()
        for epoch, value in enumerate(history, start=1):
            trial.report(value, epoch)
            if trial.should_prune():
                break
        study.tell(trial, history[epoch - 1])
        epochs.append(epoch)
    return epochs


def engine_stops(content: dict, histories: list[list[float]], asked: set[int]) -> list[int]:
    """The same from W&B's engine, which is slow: it is asked where it may stop a run."""
    from sweeps import RunState, SweepRun, stop_runs

    runs = []
    for history in histories:
        run = SweepRun(name=str(len(runs)), state=RunState.running)
        runs.append(run)
        for epoch, value in enumerate(history, start=1):
            run.history.append({"score": value})
            if epoch in asked and stop_runs(content, runs):
                break
        run.state = RunState.finished
    return [len(run.history) for run in runs]


RULES = [
    ({"min_iter": 3}, {1, 3, 4, 9, 10}),
    ({"min_iter": 1, "eta": 2.5, "strict": False}, {1, 2, 3, 6, 15}),
    ({"max_iter": 12, "s": 2, "eta": 2}, {2, 3, 4, 6, 12}),
]


@pytest.mark.parametrize(("rules", "asked"), RULES, ids=str)
def test_early_stops_are_wandbs(rules, asked):
    """Nine in ten were, with Optuna's successive halving; of its Hyperband, a third."""
    pytest.importorskip("sweeps", reason="W&B's engine is not installed")
    content = search_over({"value": 1}, early_terminate={"type": "hyperband", **rules})
    histories = simulated_histories(0)
    found = offline_stops(content, histories)
    assert found == engine_stops(content, histories, asked)
    assert len(Counter(found)) > 2


def test_rungs_worked_by_hand():
    """eta 2: 5 goes on, 4 as one of the best 1 + 2 // 2, 6, 5.5 as one of the best 1 + 4 // 2; 4.9 is fourth of five."""
    by_hand = [[5, 5], [4, 4], [6, 6], [5.5, 5.5], [4.9, 4.9]]
    content = search_over(
        {"value": 1}, early_terminate={"type": "hyperband", "min_iter": 1, "eta": 2}
    )
    assert offline_stops(content, by_hand) == [2, 2, 2, 2, 1]
    nothing = {"type": "hyperband", "max_iter": 27, "s": 0}  # stopped after 27 epochs
    assert file.EarlyTerminate(**nothing).rungs() == []
    assert file.EarlyTerminate(type="hyperband", max_iter=27, s=2).rungs() == [3, 9]


# ----------------------------------------------------------------------------------------------- what users see


def test_a_search_without_a_metric(workdir):
    """It was refused. No trial is the best; the report has no pictures of the metric."""
    sweep = "program: objective.py\nmethod: grid\nparameters: {x: {values: [1, 2]}}\n"
    out = run_search(workdir, sweep)
    assert "trial 1: complete | x=2\n2 complete; all trials: runs/sweep-s/trials.csv\n" in out
    assert "best" not in out
    assert trial_rows(workdir)[0]["unranked"] == ""  # no value
    report.main([str(workdir / "runs/sweep-s"), "--output", str(workdir / "r.html")])
    assert "2 trials: 2 complete" in (workdir / "r.html").read_text(encoding="utf-8")


def test_the_target_ends_the_search_and_a_resumed_one(workdir):
    sweep = """
program: objective.py
method: grid
metric: {name: score, goal: maximize, target: -1.5}
parameters: {x: {values: [1, 2, 3, 4]}, y: {value: -1}}
"""
    for _ in range(2):
        out = run_search(workdir, sweep)
        assert "metric.target is reached: no more trials." in out and "2 complete" in out
        assert read_lines(workdir / "visits.txt") == ["1 -1", "2 -1"]


def test_lines_at_the_start(tmp_path):
    """What W&B warns of, and what only W&B does."""
    content = search_over({"distribution": "log_uniform", "min": 0.00001, "max": 0.1})
    (line,) = notes(read_sweep(written(content, tmp_path)))
    assert (
        line == "x: min and max of log_uniform are exponents of e; log_uniform_values takes values"
    )
    content = SEARCH | {"method": "bayes", "metric": METRIC | {"impute": "best"}}
    content["parameters"] = {"a": {"distribution": "normal"}, "b": {"min": 0, "max": 1.5}}
    lines = notes(read_sweep(written(content, tmp_path)))
    assert [line.split(":")[0] for line in lines] == ["a", "metric.impute"]
    content["metric"] = {"name": "valid/acc"}
    *_, line = notes(read_sweep(written(content | {"method": "random"}, tmp_path)))
    assert line == "metric: no goal, so valid/acc is minimized, as W&B does"


CANT_START = {
    "program: must be an existing script, not None": {},
    "program: must be an existing script, not 'missing.py'": {"program": "missing.py"},
    "command: can't be started: missing-trainer '${args}'": {
        "command": ["missing-trainer", "${args}"]
    },
    "command: can't be started: '${env}' A=1 '${envvar:SECRET}'": {
        "command": ["${env}", "A=1", "${envvar:SECRET}"]
    },
    "command: unknown macro ${arg}; must be one of args, ": {"command": ["python3", "${arg}"]},
}


@pytest.mark.parametrize("expected", CANT_START)
def test_a_command_that_cant_be_started(expected, tmp_path, monkeypatch):
    """Found before the first trial; the value of a variable is not shown."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECRET", "hush")
    content = {"method": "grid", "parameters": {"x": {"value": 1}}} | CANT_START[expected]
    written(content, tmp_path)
    with pytest.raises(UserError) as error:
        sweep_offline.main(["s.yaml"])
    assert str(error.value).startswith(expected) and error.value.status == 2
    assert not (tmp_path / "runs").exists()


def test_files_are_utf_8_in_any_locale(workdir):
    """Comments, values, trials.csv; and `${envvar:X}` is not shown. The locale's ASCII can't write Korean."""
    (workdir / "s.yaml").write_text(
        """
# 하이퍼파라미터
command: [python, objective.py, --fail, "${envvar:SECRET}", "${args_append_hydra}"]
method: grid
metric: {name: score}
parameters: {x: {value: 1}, label: {values: [긍정]}}
""".replace('"${args_append_hydra}"', "--x=1"),
        encoding="utf-8",
    )
    environment = clean_environment(
        workdir, SECRET="hush", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0"
    )
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    command = [sys.executable, REPO / "sweep_offline.py", "s.yaml"]
    done = subprocess.run(command, cwd=workdir, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    line = done.stdout.splitlines()[-1]
    # Without an args macro, the values are in the trial's file only.
    assert line.startswith("to repeat the best run: WANDB_SWEEP_PARAM_PATH=runs/sweep-s/")
    assert line.endswith(".yaml python objective.py --fail '${envvar:SECRET}' --x=1")
    assert "hush" not in done.stdout
    table = workdir / "runs/sweep-s/trials.csv"
    assert "긍정" in table.read_text(encoding="utf-8")
    (found,) = (workdir / "runs/sweep-s").glob("*.json")
    assert json.loads(found.read_text(encoding="utf-8")) == {"x": 1, "label": "긍정"}


def test_a_resumed_trial_keeps_values_that_optuna_did_not_draw(workdir):
    """They are drawn once, and recorded."""
    sweep = """
program: objective.py
method: random
metric: {name: score, goal: maximize}
parameters:
  x: {distribution: q_normal, mu: 100, sigma: 50}
  y: {values: [1, 2, 3, 4, 5, 6, 7, 8], probabilities: [0.1, 0.2, 0.1, 0.2, 0.1, 0.1, 0.1, 0.1]}
  seconds: {value: 3}
"""
    process = start_search(workdir, sweep, "--count", "1")
    while not read_lines(workdir / "starts.txt"):
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()
    process.communicate(timeout=100)
    assert "1 complete" in run_search(workdir, sweep, "--count", "1")
    first, second = read_lines(workdir / "starts.txt")
    assert first == second
    row = trial_rows(workdir)[0]
    assert first.split()[:2] == [row["x"], row["y"]]


def test_every_macro_is_the_agents(tmp_path):
    """What W&B's agent passes, except that its JSON file is elsewhere."""
    content = search_over({"value": True}, command=["python3", "${args_json_file}"])
    sweep = read_sweep(written(content, tmp_path))
    arguments = {"x": True, "n": None, "o": {"a": 1}}
    forms = {
        "${args_no_equals}": ["--x", "True", "--n", "None", "--o", "{'a': 1}"],
        "${args_append_hydra}": ["+x=True", "+n=None", "+o={'a': 1}"],
        "${args_override_hydra}": ["++x=True", "++n=None", "++o={'a': 1}"],
        "${args_json_file}": ["a.json"],
        "${HOME}/x": ["${HOME}/x"],
    }
    for macro, words in forms.items():
        sweep.command = [macro]
        assert trials.trial_command(sweep, arguments, "a.json") == words
