"""report.py's page in Chromium, as a file and with `--watch`: what it draws, keeps in its address, and asks for."""

import contextlib
import http.client
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from wandb.proto.wandb_internal_pb2 import Record

import report
from harness import system
from harness.directory import output_directory
from harness.errors import UserError
from reporting import charts as chart_data
from reporting import runs
from reporting.journal import Journal
from reporting.wandb_log import WandbLog
from tests import forking
from tests.conftest import REPO, clean_environment
from tests.pages import (
    EVIL,
    charts,
    check_console_and_requests,
    choose,
    curves,
    opened,
    shown,
    wait_until,
)
from tests.test_report import make_run

WIDE, PHONE = 1400, 420
ROWS = [
    {"step": 100, "epoch": 1, "train/loss_step": 1.0, "lr": 0.1},
    {"step": 200, "epoch": 1, "train/loss_step": 0.0, "lr": 0.1, "valid/loss": 0.6},
    {"step": 300, "epoch": 2, "train/loss_step": 4.0, "lr": 0.1},
    {"step": 400, "epoch": 2, "train/loss_step": 2.0, "lr": 0.1, "valid/loss": 0.5},
]


def write_run(path: Path, rows: list[dict], figures: dict | None = None, **config: Any) -> Path:
    """Write the files of a run; one without `figures` has not finished."""
    path.mkdir(parents=True)
    config = {"monitor": "valid/loss", "metrics": {"loss": "min"}, "batch_size": 100} | config
    (path / "config.json").write_text(json.dumps(config))
    append(path, rows)
    if figures is not None:
        (path / "metrics.json").write_text(json.dumps(figures))
    return path


def append(run: Path, rows: list[dict]) -> None:
    with (run / "history.jsonl").open("a") as journal:
        journal.write("".join(json.dumps(row) + "\n" for row in rows))


def replace_journal(run: Path, rows: list[dict]) -> None:
    """As a resumed run does."""
    new = run / "new"
    new.write_text("".join(json.dumps(row) + "\n" for row in rows))
    new.replace(run / "history.jsonl")


class Server:
    """A `report.py --watch`, in a group of processes as a terminal's."""

    def __init__(self, directory: Path, *arguments: object, **environment: str):
        command = [sys.executable, REPO / "report.py", directory, "--watch", *arguments]
        self.errors = directory.with_name("stderr.txt").open("w+")
        self.process = subprocess.Popen(
            list(map(str, command)),
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            start_new_session=True,
            cwd=directory.parent,
            env=clean_environment(directory.parent, **environment),
        )
        line = self.process.stdout.readline()
        match = re.fullmatch(r"The page: (http://\S+) \(until Ctrl-C\)\n", line)
        assert match, line + self.stderr()
        self.address = match[1]

    def stderr(self) -> str:
        self.errors.seek(0)
        return self.errors.read()

    def post(self, body: bytes) -> bytes:
        request = urllib.request.Request(self.address, data=body, method="POST")
        return urllib.request.urlopen(request, timeout=20).read()

    def ask(self, *metrics: str, after: dict | None = None) -> dict:
        """What is new of some metrics, as page.js asks for it."""
        curves = {metric: (after or {}).get(metric, {}) for metric in metrics}
        question = {"sections": {}, "curves": curves}
        return json.loads(self.post(json.dumps(question).encode()))

    def interrupt(self) -> tuple[int, float]:
        """The status and the seconds after Ctrl-C in the terminal."""
        begin = time.monotonic()
        os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(20), time.monotonic() - begin

    def seconds(self) -> float:
        """How long it has computed: other tests do not count."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()
        self.errors.close()


@pytest.fixture
def serve() -> Iterator[Any]:
    """Starts servers, which end with the test."""
    with contextlib.ExitStack() as stack:

        def start(*arguments: object, **environment: str) -> Server:
            server = Server(*arguments, **environment)
            stack.callback(server.end)
            return server

        yield start


@pytest.fixture
def resize(browser) -> Iterator[Any]:
    """Sets the width of the window."""

    def to(width: int) -> None:
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 700}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    to(WIDE)
    yield to
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def static_page(directory: Path) -> Path:
    page = directory.with_name("report.html")
    report.main([str(directory), "--output", str(page)])
    return page


def curve(browser: Any, chart: str, run: str, dash: str = "solid") -> tuple[list, list]:
    """x and y of the one curve of a run; of none, nothing."""
    found = [c for c in curves(browser, chart) if (c["name"], c["dash"]) == (run, dash)]
    assert len(found) <= 1
    return (found[0]["x"], found[0]["y"]) if found else ([], [])


def text(browser: Any, selector: str) -> str:
    return browser.execute_script(
        "return document.querySelector(arguments[0]).textContent", selector
    )


def layout(browser: Any, chart: str) -> dict:
    script = """const panel = [...document.querySelectorAll('#panels > div')]
        .find(panel => panel.dataset.name === arguments[0]), {xaxis, yaxis} = panel.layout;
        return {x: xaxis.type, y: yaxis.type, title: xaxis.title.text, range: xaxis.range}"""
    return browser.execute_script(script, chart)


def legend(browser: Any, run: str) -> tuple[Any, Any]:
    """The checkbox and the button of a run."""
    script = """const entry = [...document.querySelectorAll('#legend li')]
        .find(entry => entry.querySelector('label').textContent === arguments[0]);
        return [entry.querySelector('input'), entry.querySelector('button')]"""
    return tuple(browser.execute_script(script, run))


def picture(browser: Any) -> dict:
    """All that is drawn and chosen."""
    names = charts(browser)
    script = """return {legend: document.querySelector('#legend').textContent,
        boxes: [...document.querySelectorAll('#legend input')].map(box => box.checked),
        table: document.querySelector('#tables table').textContent,
        form: [...document.forms[0].elements].map(({type, value, checked}) => [type, value, checked])}"""
    drawn = {name: (layout(browser, name), curves(browser, name)) for name in names}
    return {"charts": names, "drawn": drawn, **browser.execute_script(script)}


# ------------------------------------------------------------------------------------------ what is drawn


@pytest.fixture
def four_runs(tmp_path) -> Path:
    """Two that have finished, one that counts epochs from 0, one in its second epoch, one in its first."""
    from_0 = [row | {"epoch": row["epoch"] - 1} for row in ROWS]
    write_run(tmp_path / "runs/alpha", ROWS, {"valid/loss": 0.5}, learning_rate=1)
    write_run(tmp_path / "runs/zero", from_0, {"valid/loss": 0.75}, learning_rate=2)
    write_run(tmp_path / "runs/second", ROWS[:3], learning_rate=3)
    write_run(tmp_path / "runs/first", ROWS[:2], learning_rate=4)
    return tmp_path / "runs"


def test_smoothing_is_that_worked_out_by_hand(browser, resize, four_runs):
    opened(browser, static_page(four_runs))
    assert curve(browser, "loss", "alpha", "dot") == ([100, 200, 300, 400], [1, 0, 4, 2])
    choose(browser, smoothing=0.5)
    x, y = curve(browser, "loss", "alpha", "dot")
    assert x == [100, 200, 300, 400]
    # The newest value weighs 1/2, the one before 1/4 and so on; divided by the sum of the weights.
    third = (4 / 2 + 0 / 4 + 1 / 8) / (7 / 8)
    fourth = (2 / 2 + 4 / 4 + 0 / 8 + 1 / 16) / (15 / 16)
    assert y == pytest.approx([1, 1 / 3, third, fourth], rel=1e-12)
    faint = browser.execute_script(
        "return document.querySelector('#panels > div').data"
        ".filter(trace => trace.opacity < 1 && trace.line.dash === 'dot').map(trace => [...trace.y])"
    )
    assert [1, 0, 4, 2] in faint
    choose(browser, smoothing=0)
    assert curve(browser, "loss", "alpha", "dot")[1] == [1, 0, 4, 2]


def test_thinned_points_weigh_what_they_stand_for(browser, resize, tmp_path):
    values = np.random.default_rng(0).normal(size=3000).round(3)
    rows = [{"step": i + 1, "train/loss": value} for i, value in enumerate(values)]
    write_run(tmp_path / "runs/a", rows)
    opened(browser, str(static_page(tmp_path / "runs").as_uri()) + "#smoothing=0.9")
    x, y = curve(browser, "loss", "a")
    assert x == list(range(3, 3001, 3))
    total = weight = 0.0
    expected = []
    for mean in values.reshape(1000, 3).mean(1):
        total = 0.9**3 * total + (1 - 0.9**3) * mean
        weight = 0.9**3 * weight + (1 - 0.9**3)
        expected.append(total / weight)
    assert y == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_a_mean_counts_runs_with_other_steps(browser, resize, tmp_path):
    """It was of equal steps only, which two seeds of train_cola.py and two folds rarely have."""
    steps = {"a": [100, 200, 300], "b": [110, 210, 310], "c": [100, 200]}  # c stopped early
    values = {"a": [1, 2, 3], "b": [3, 5, 7], "c": [5, 5]}
    for seed, name in enumerate(steps):
        rows = [{"step": x, "train/loss": y} for x, y in zip(steps[name], values[name])]
        figures = {"valid/loss": 1 + seed}
        write_run(tmp_path / "runs" / name, rows, figures, seed=seed)
    opened(browser, static_page(tmp_path / "runs").as_uri() + "#each=false")
    script = """const {x, y, customdata} = document.querySelector('#panels > div').data
        .find(trace => trace.customdata); return [[...x], [...y], [...customdata]]"""
    x, y, spread = browser.execute_script(script)
    assert x == [110, 210, 310]  # b goes furthest
    # At 110, a has a tenth of its way from 1 to 2 behind it. Its end is near enough to 310, that of c to 210.
    at_each = [(1.1, 3, 5), (2.1, 5, 5), (3, 7)]
    assert y == pytest.approx([statistics.mean(at) for at in at_each])
    for (sd, count), at in zip(spread, at_each, strict=True):
        assert (sd, count) == (pytest.approx(statistics.stdev(at)), len(at))


def test_x_axes(browser, resize, four_runs):
    opened(browser, static_page(four_runs))
    assert text(browser, "#remark") == ""
    choose(browser, x="epochs")
    # An epoch that goes on counts as long as the one before; the length of the first is not known yet.
    assert curve(browser, "loss", "alpha", "dot")[0] == [0.5, 1, 1.5, 2]
    assert curve(browser, "loss", "zero", "dot")[0] == [0.5, 1, 1.5, 2]
    assert curve(browser, "loss", "zero", "solid")[0] == [1, 2]
    assert curve(browser, "loss", "second", "dot")[0] == [0.5, 1, 1.5]
    assert text(browser, "#remark") == "epochs are not known of first."
    assert layout(browser, "loss")["title"] == "epochs"
    choose(browser, x="batches")
    assert curve(browser, "loss", "first", "dot")[0] == [1, 2]
    choose(browser, x="minutes")
    assert text(browser, "#remark").startswith("minutes are not known of ")
    assert {c["name"] for c in curves(browser) if c["x"]} == set()
    choose(browser, x="examples", logX=True, logY=True)
    assert layout(browser, "loss")["x"] == layout(browser, "loss")["y"] == "log"
    assert layout(browser, "loss")["title"] == "examples seen"


def test_the_step_0_is_batch_0(browser, resize, tmp_path):
    """A figure before training was left out."""
    write_run(tmp_path / "runs/a", [{"step": 0, "valid/loss": 2.0}, {"step": 100, "valid/loss": 1}])
    opened(browser, static_page(tmp_path / "runs").as_uri() + "#x=batches")
    assert curve(browser, "loss", "a") == ([0, 1], [2, 1])


def test_minutes_and_system_metrics_are_those_of_wandb(browser, resize, tmp_path):
    """A run of two processes: where none was alive, there is a gap."""
    program = """
import sys, time, wandb
first = int(sys.argv[1])
settings = wandb.Settings(mode="offline", x_stats_sampling_interval=0.1, console="off")
run = wandb.init(project="p", id="i", resume="allow", settings=settings, config={"run_token": "t"})
for step in range(first, first + 3):
    run.log({"valid/loss": 1.0, "step": step}, step=step)
    time.sleep(0.2)
run.finish()
"""
    log = WandbLog(tmp_path / "runs/a")
    for first in (1, 4):
        command = [sys.executable, "-c", program, first]
        done = forking.run(
            list(map(str, command)), cwd=tmp_path, env=clean_environment(tmp_path), text=True
        )
        assert done.returncode == 0, done.stderr
        log.read({"id": "i", "run_token": "t"})  # as it grows
        time.sleep(1)
    rows = [{"step": step, "valid/loss": 1 / step} for step in range(1, 7)]
    write_run(tmp_path / "runs/a", rows, {"valid/loss": 1 / 6}, id="i", run_token="t")
    whole = WandbLog(tmp_path / "runs/a")
    whole.read({"id": "i", "run_token": "t"})
    assert log.processes == whole.processes and len(log.processes) == 2
    assert log.columns.keys() == whole.columns.keys() > {"minutes", "system/memory_percent"}
    for name, column in whole.columns.items():
        assert np.array_equal(log.columns[name], column)
    opened(browser, static_page(tmp_path / "runs").as_uri() + "#x=minutes")
    x, y = curve(browser, "loss", "a")
    assert y == [1, 0.5, pytest.approx(1 / 3, rel=1e-5), None, *map(pytest.approx, y[4:])]
    assert x[0] == pytest.approx(0, abs=0.001) and x[3] is None and len(x) == 7
    steps = np.diff([minute for minute in x if minute is not None]) * 60
    assert 0.1 < np.mean([*steps[:2], *steps[3:]]) < 10
    assert min(steps) > 0 and steps[2] > 1
    assert text(browser, "#remark") == ""
    choose(browser, charts="^system/")
    wait_until(lambda: charts(browser))
    assert len(charts(browser)) >= 3
    gaps = 0
    for name in charts(browser):
        x, y = curve(browser, name, "a")
        minutes = [minute for minute in x if minute is not None]
        assert minutes == sorted(minutes) and minutes[-1] < 1
        gaps += None in y
    assert gaps
    choose(browser, x="examples")
    assert layout(browser, charts(browser)[0])["title"] == "minutes"


def test_filters_and_charts(browser, resize, four_runs):
    opened(browser, static_page(four_runs))
    assert charts(browser) == ["loss"]
    choose(browser, together=False)
    assert charts(browser) == ["valid/loss", "train/loss_step"]
    choose(browser, charts="^(lr|valid.*)$")
    assert charts(browser) == ["valid/loss", "lr"]
    for hostile in ("(", "[", "<img src=x onerror=alert(1)>", "'\"", "\\"):
        choose(browser, charts=hostile, runs=hostile)
        assert charts(browser) == [] and shown(browser) == []
    choose(browser, charts="LR", runs="alpha|ZERO")
    assert charts(browser) == ["lr"]
    assert set(shown(browser)) == {"alpha", "zero"}
    assert "first" not in text(browser, "#legend")
    assert len(browser.find_elements("css selector", "#tables tbody tr")) == 4
    check_console_and_requests(browser, browser.current_url)


@pytest.mark.parametrize("width", [WIDE, PHONE])
def test_the_address_keeps_the_picture(browser, resize, four_runs, width):
    resize(width)
    opened(browser, static_page(four_runs))
    first = picture(browser)
    choose(browser, charts="loss|lr", runs="a|e|i", smoothing=0.6, logX=True, logY=True, x="epochs")
    choose(browser, together=False)
    legend(browser, "second")[0].click()
    legend(browser, "alpha")[1].click()
    chosen = picture(browser)
    names = {c["name"] for c in curves(browser) if c["x"]}
    assert names == {"alpha", "zero"}  # not "second", which is hidden, nor "first"
    # The figures of the table are 0.5 and 0.75, and of those under way 0.6 each.
    cells = [cell.text for cell in browser.find_elements("css selector", "#tables tbody td.number")]
    assert {"0.75 (+0.250)", "0.6 (+0.100)", "0.5"} <= set(cells)
    address = browser.current_url
    opened(browser, address)
    assert picture(browser) == chosen != first
    legend(browser, "second")[0].click()
    legend(browser, "alpha")[1].click()
    choose(browser, charts="", runs="", smoothing=0, logX=False, logY=False, x="examples")
    choose(browser, together=True)
    assert picture(browser) == first
    assert browser.current_url.rstrip("#") == address.split("#")[0]


def test_values_in_the_address_that_no_control_has(browser, resize, four_runs):
    page = static_page(four_runs).as_uri()
    opened(browser, page)
    first = curves(browser)
    opened(browser, page + "#smoothing=-7&x=furlongs&constructor=1&__proto__=2&logX=1&hide=nobody")
    assert curves(browser) == first
    opened(browser, page + "#smoothing=1")  # 0 / 0
    assert None not in curve(browser, "loss", "alpha", "dot")[1]


# A name of every object in JavaScript made the page fail.
ODD_NAMES = [EVIL, "constructor", "__proto__", "toString", "a\nb", "\"'`${1}", "%{x} <b>"]


def test_hostile_names_stay_text(browser, resize, tmp_path):
    # Their groups have names, too: of the settings that differ.
    for seed, (number, name) in itertools.product((1, 2), enumerate(ODD_NAMES)):
        rows = [
            {"step": step, "valid/loss": number + step, f"valid/{name}": step, name: seed}
            for step in (1, 2)
        ]
        figures = {"valid/loss": number, f"valid/{name}": 1}
        directory = f"{number}" if seed > 1 else name.replace("/", "|")
        write_run(
            tmp_path / "runs" / directory,
            rows,
            figures,
            metrics={"loss": "min", name: "min"},
            name=name if seed > 1 else None,
            seed=seed,
            setting=name,
            batch_size=name,
        )
    page = static_page(tmp_path / "runs").as_uri()
    opened(browser, page + "#each=true")
    shown_names = [name.replace("\n", "\\n") for name in ODD_NAMES]
    expected = {name.replace("/", "|") for name in shown_names}
    expected |= {f"{name} ({number})" for number, name in enumerate(shown_names)}
    assert {"loss", "constructor", "__proto__", "a\nb"} <= set(charts(browser))
    script = """return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)"""
    labels = browser.execute_script(script, "#legend label")
    cells = browser.execute_script(script, "#tables td:first-child")
    assert expected < set(labels) and expected == set(cells)
    groups = [label for label in labels if label.endswith(" (n = 2)")]
    assert len(groups) == len(ODD_NAMES) and any(EVIL in group for group in groups)
    choose(browser, x="batches")
    remark = text(browser, "#remark")
    assert EVIL in remark and "\"'`${1}" in remark
    legend(browser, f"{EVIL} (0)")[1].click()
    assert browser.execute_script(script, "tr.pinned td:first-child") == [f"{EVIL} (0)"]
    choose(browser, together=False, charts=".")
    titles = browser.execute_script(script, "#panels .gtitle")
    assert len(titles) >= 14
    assert "constructor" in titles and "toString" in titles and "%{x} <b>" in titles
    assert browser.find_elements("css selector", "img[src=x], #panels b") == []
    assert browser.title == "14 runs"
    check_console_and_requests(browser, page)


def test_numbers_that_json_does_not_have(browser, resize, tmp_path):
    """The page could not be read: they are no JSON."""
    rows = [{"step": i, "valid/loss": 1.7e308, "nan": math.nan} for i in range(1, 2001)]
    write_run(tmp_path / "runs/a", rows, {"valid/loss": math.inf}, batch_size=math.nan)
    opened(browser, static_page(tmp_path / "runs").as_uri() + "#charts=.")
    assert charts(browser) == ["loss", "nan"]
    assert max(curve(browser, "loss", "a")[1]) > 1e308


def test_charts_are_downloaded_with_their_legend(browser, resize, tmp_path):
    for seed in (1, 2):
        write_run(tmp_path / f"runs/run & {seed}", ROWS, {"valid/loss": seed}, seed=seed)
    opened(browser, static_page(tmp_path / "runs"))
    target = tmp_path / "downloads"
    target.mkdir()
    where = {"behavior": "allow", "downloadPath": str(target)}
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", where)
    for button in browser.find_elements("css selector", "#panels .modebar-btn"):
        browser.execute_script(
            "arguments[0].dispatchEvent(new MouseEvent('click', {bubbles: true}))", button
        )
    wait_until(lambda: {"loss.png", "loss.svg"} == {file.name for file in target.iterdir()})
    svg = (target / "loss.svg").read_text()
    drawn = re.findall(r"<text class=\"legendtext\"[^>]*>(.*?)</text>", svg)
    group = "all but seed and fold alike (n = 2)"
    assert drawn == ["run &amp; 1", "run &amp; 2", group]  # once, though in training and validation
    size = browser.execute_script(
        "const {clientWidth, clientHeight} = document.querySelector('#panels > div');"
        "return [clientWidth, clientHeight]"
    )
    with Image.open(target / "loss.png") as image:
        assert image.size == (2 * size[0], 2 * (size[1] + 3 * 20))  # room for the names
        assert len(image.convert("RGB").getcolors(1 << 20)) > 10
    check_console_and_requests(browser, browser.current_url)


def test_both_widths(browser, resize, tmp_path):
    long = "a-name-without-any-place-to-break-it-" * 5
    for seed in (1, 2, 3):
        make_run(tmp_path / f"runs/{seed}{long}"[:200], seed=seed, sentence=long, examples=30)
    page = static_page(tmp_path / "runs").as_uri() + "#together=false"
    boxes = """return [...document.querySelectorAll('#panels > div, #legend')]
        .map(e => e.getBoundingClientRect()).map(({x, y, width, bottom}) => ({x, y, width, bottom}))"""
    for width, columns in ((WIDE, 2), (PHONE, 1)):
        resize(width)
        opened(browser, page)
        assert browser.execute_script("return document.scrollingElement.scrollWidth") <= width
        *panels, under = browser.execute_script(boxes)
        assert len(panels) == 4 and len({panel["x"] for panel in panels}) == columns
        assert all(380 <= panel["width"] <= width for panel in panels)
        assert under["y"] >= max(panel["bottom"] for panel in panels)
        drawn = browser.execute_script(
            "return [...document.querySelectorAll('#panels .main-svg')].map(e => e.clientWidth)"
        )
        assert max(drawn) <= panels[0]["width"] + 1


# ------------------------------------------------------------------------------------------ while runs go on


def test_updates_arrive(browser, resize, serve, tmp_path):
    directory = tmp_path / "runs"
    going = write_run(directory / "going", ROWS[:2], learning_rate=1)
    make_run(directory / "done", learning_rate=2)
    server = serve(directory)
    opened(browser, server.address)
    wait_until(lambda: set(shown(browser)) == {"going", "done"})
    assert curve(browser, "loss", "going", "dot") == ([100, 200], [1, 0])

    # Only new points are sent, and they show in the chart and in the table.
    before = server.ask("valid/loss", "train/loss_step")
    lasts = {
        name: {run: [len(points), None] for run, points in by_run.items()}
        for name, by_run in before["curves"].items()
    }
    append(going, ROWS[2:])
    wait_until(lambda: curve(browser, "loss", "going", "dot")[0] == [100, 200, 300, 400])
    assert curve(browser, "loss", "going") == ([200, 400], [0.6, 0.5])
    wait_until(lambda: "at step 400" in text(browser, "#tables"))
    news = server.ask("valid/loss", "train/loss_step", after=lasts)
    assert news["curves"] == {
        "valid/loss": {str(going): [[400, 0.5]]},
        "train/loss_step": {str(going): [[300, 4], [400, 2]]},
    }
    checksums = {name: checksum for name, (checksum, _) in news["sections"].items()}
    question = {"sections": checksums, "curves": {}}
    assert json.loads(server.post(json.dumps(question).encode()))["sections"] == {}

    choose(browser, x="epochs")  # their ends are asked for
    wait_until(lambda: curve(browser, "loss", "going", "dot")[0] == [0.5, 1, 1.5, 2])
    choose(browser, x="examples")

    # A row of which the first half is written, then the rest, then one without its end.
    with (going / "history.jsonl").open("a") as journal:
        for part, steps in (
            ('{"step": 500, "train/loss', [100, 200, 300, 400]),
            ('_step": 5}\n{"step": 600, "train/loss_step": 6}', [100, 200, 300, 400, 500, 600]),
            ('\n{"step": 700, "train/loss_step": 7}\n', [100, 200, 300, 400, 500, 600, 700]),
        ):
            journal.write(part)
            journal.flush()
            time.sleep(2.5)  # longer than the server takes to look again
            wait_until(lambda steps=steps: curve(browser, "loss", "going", "dot")[0] == steps)
    assert "can't be read" not in text(browser, "#tables")

    # Only figures that are not finite: page.js looked for the last point of none.
    append(going, [{"step": 700, "valid/nan": math.nan, "valid/loss": 0.4}])
    # A run begins, with what is no number in JSON.
    write_run(directory / "new", ROWS[:1], batch_size=math.nan)
    wait_until(lambda: "new" in shown(browser))
    choose(browser, charts="nan|loss")
    wait_until(lambda: "nan" in charts(browser))
    append(going, [{"step": 800, "valid/nan": math.nan, "valid/loss": 0.3}])
    wait_until(lambda: curve(browser, "loss", "going")[0] == [200, 400, 700, 800])
    assert "No answer" not in text(browser, "#state")

    # Two questions at once do not bring the same points twice.
    append(going, [{"step": 900, "train/loss_step": 9}])
    time.sleep(2.5)
    for _ in range(5):
        choose(browser, charts="lr|loss")
        choose(browser, charts="acc|loss")
    choose(browser, charts="")
    time.sleep(1)
    steps = curve(browser, "loss", "going", "dot")[0]
    assert steps == sorted(set(steps)) and steps[-1] == 900

    # A resumed run cuts the journal; another program may do so in place.
    replace_journal(going, [*ROWS[:2], {"step": 250, "train/loss_step": 8.0}])
    wait_until(lambda: curve(browser, "loss", "going", "dot") == ([100, 200, 250], [1, 0, 8]))
    (going / "history.jsonl").write_text('{"step": 60, "train/loss_step": 3.5}\n')
    wait_until(lambda: curve(browser, "loss", "going", "dot") == ([60], [3.5]))

    # A keyboard stays where it is, though the page is refreshed.
    legend(browser, "done")[0].click()
    browser.execute_script("arguments[0].focus()", legend(browser, "done")[0])
    time.sleep(2.5)
    assert browser.execute_script("return document.activeElement.closest('#legend') !== null")
    legend(browser, "done")[0].click()

    # A run that finishes is compared.
    append(going, [{"step": 1000, "epoch": 1, "valid/loss": 0.2, "valid/acc": 0.5}])
    assert "Not compared: " not in text(browser, "#analysis") or "done" in text(
        browser, "#analysis"
    )
    for name in ("predictions.csv", "metrics.json"):
        shutil.copy(directory / "done" / name, going)
    wait_until(lambda: "The best by valid/loss" in text(browser, "#analysis"), 30)
    assert "McNemar" in text(browser, "#analysis")

    # The address keeps what is chosen here, too.
    choose(browser, charts="acc|loss", smoothing=0.3, logY=True)
    legend(browser, "done")[1].click()
    legend(browser, "new")[0].click()
    chosen = picture(browser)
    opened(browser, browser.current_url)
    wait_until(lambda: picture(browser) == chosen)
    legend(browser, "new")[0].click()

    # Directories disappear, at last all of them: the page shows what it had.
    shutil.rmtree(directory / "new")
    wait_until(lambda: "new" not in shown(browser))
    shutil.rmtree(directory)
    time.sleep(3)
    assert set(shown(browser)) == {"going", "done"} and "No answer" not in text(browser, "#state")
    make_run(directory / "another")
    wait_until(lambda: set(shown(browser)) == {"another"})
    check_console_and_requests(browser, server.address)

    status, seconds = server.interrupt()
    assert (status, server.stderr()) == (0, "") and seconds < 15
    wait_until(lambda: "No answer from report.py" in text(browser, "#state"))
    assert set(shown(browser)) == {"another"}
    browser.get("about:blank")
    browser.get_log("browser")  # the refused connections


def status_of(server: Server, address: str, **headers: str) -> tuple[int, int]:
    """What GET and POST are answered."""
    statuses = []
    for data in (None, b'{"sections": {}, "curves": {}}'):
        request = urllib.request.Request(address, data=data, headers=headers)
        try:
            statuses.append(urllib.request.urlopen(request, timeout=20).status)
        except urllib.error.HTTPError as error:
            statuses.append(error.code)
    return tuple(statuses)


def children(tasks: Path) -> int:
    """How many processes the threads of one have started."""
    return sum(len(file.read_text().split()) for file in tasks.glob("*/children"))


def test_only_those_who_may_are_answered(serve, tmp_path):
    """Two servers of the same runs, the second for other machines; Ctrl-C ends both in the middle of comparisons."""
    for seed in (1, 2):
        make_run(tmp_path / f"runs/{seed}", seed=seed)
    own = serve(tmp_path / "runs")
    (tmp_path / "stderr.txt").rename(tmp_path / "stderr of the first.txt")
    others = serve(tmp_path / "runs", "--host", "0.0.0.0")
    address, token = others.address.split("?token=")
    port = int(re.search(r":(\d+)/", address)[1])
    assert socket.gethostname() in address and len(token) >= 16
    local = f"http://127.0.0.1:{port}/"
    assert status_of(others, f"{local}?token={token}") == (200, 200)
    for wrong in ("", "?token=", "?token=x", f"?token={token}x", "?token=é", f"?other={token}"):
        assert status_of(others, urllib.parse.quote(local + wrong, safe=":/?=")) == (403, 403)

    port = int(re.search(r":(\d+)/", own.address)[1])
    assert own.address == f"http://127.0.0.1:{port}/"
    assert status_of(own, own.address) == (200, 200)
    assert status_of(own, own.address, Host=f"localhost:{port}") == (200, 200)
    for foreign in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "[", ""):
        assert status_of(own, own.address, Host=foreign) == (403, 403)
    with pytest.raises(UserError, match=f"--port {port}: .*in use") as caught:
        report.main([str(tmp_path / "runs"), "--watch", "--port", str(port)])
    assert caught.value.status == 2

    # Questions that make no sense, and connections that end in the middle of one.
    for body in (b"", b"{", b"[]", b"null", b"{}", b'{"sections": 1, "curves": {}}', b"[" * 9999,
                 b'{"sections": {}, "curves": {"valid/loss": 3}}',
                 b'{"sections": 1, "curves": {}}'):  # fmt: skip
        with pytest.raises((http.client.HTTPException, urllib.error.URLError)):
            own.post(body)
    for length in ("x", None):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.putrequest("POST", "/")
        if length:
            connection.putheader("Content-Length", length)
        connection.endheaders()
        with pytest.raises(http.client.HTTPException):
            connection.getresponse()
        connection.close()
    for part in (b"POST / HTTP/1.0\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{", b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n"):  # fmt: skip
        with socket.create_connection(("127.0.0.1", port)) as connection:
            linger = np.array([1, 0], np.int32).tobytes()  # ends with a reset
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            connection.sendall(part)
            time.sleep(0.1)
    assert status_of(own, own.address) == (200, 200)
    for server in (own, others):
        tasks = Path(f"/proc/{server.process.pid}/task")
        wait_until(lambda tasks=tasks: children(tasks) >= 2)  # it compares
        status, seconds = server.interrupt()
        assert (status, server.stderr()) == (0, "") and seconds < 15


def test_long_curves(browser, resize, serve, tmp_path):
    """10 runs of 20,000 rows, one with a spike and a dip: quick, small, and in full when zoomed in."""
    values = np.random.default_rng(0).normal(size=20_000).round(4)
    values[12_345], values[12_400] = 50.0, -50.0
    for number in range(10):
        rows = [
            {"step": 128 * (i + 1), "epoch": i // 2000 + 1, "train/loss_step": value, "lr": 0.1}
            for i, value in enumerate(values.tolist())
        ]
        write_run(tmp_path / f"runs/r{number}", rows)
    server = serve(tmp_path / "runs")
    urllib.request.urlopen(server.address).read()
    first = server.ask("train/loss_step", "lr", "epoch")
    assert server.seconds() < 5  # 3 s on a machine that does nothing else
    assert {len(points) for points in first["curves"]["train/loss_step"].values()} == {1000}

    opened(browser, server.address)
    wait_until(lambda: len(shown(browser)) == 10)
    x, y = curve(browser, "loss", "r3")
    assert max(y) == 50 and min(y) == -50 and len(y) == 2000
    low, high = 128 * 12_300, 128 * 12_500
    zoom = """return Plotly.relayout(document.querySelector('#panels > div'), arguments[0])"""
    browser.execute_script(zoom, {"xaxis.range[0]": low, "xaxis.range[1]": high})
    steps = [128 * (i + 1) for i in range(12_299, 12_500)]

    def inside() -> list[tuple[float, float]]:
        points = zip(*curve(browser, "loss", "r3"))
        return [(at, value) for at, value in points if low <= at <= high]

    expected = [(step, values[step // 128 - 1]) for step in steps]
    wait_until(lambda: inside() == expected)
    time.sleep(2.5)  # a refresh
    assert inside() == expected and layout(browser, "loss")["range"] == [low, high]
    browser.execute_script(zoom, {"xaxis.autorange": True})
    wait_until(lambda: len(curve(browser, "loss", "r3")[1]) == 2000)
    assert curve(browser, "loss", "r3") == (x, y)

    lasts = {"train/loss_step": {str(tmp_path / f"runs/r{i}"): [20_000, None] for i in range(10)}}
    for i in range(10):
        append(tmp_path / f"runs/r{i}", [{"step": 128 * 20_001, "train/loss_step": float(i)}])
    wait_until(lambda: curve(browser, "loss", "r9")[1][-1] == 9)
    begin = server.seconds()
    news = server.ask("train/loss_step", after=lasts)
    assert server.seconds() - begin < 1
    assert [points for points in news["curves"]["train/loss_step"].values()] == [
        [[128 * 20_001, i]] for i in map(float, range(10))
    ]
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    assert int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) < 500_000
    libraries = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "libtorch" not in libraries
    check_console_and_requests(browser, server.address)


@pytest.mark.quick
def test_a_journal_is_read_as_it_grows(tmp_path):
    path = tmp_path / "history.jsonl"
    journal = Journal(path)
    journal.read()  # there is none yet
    assert journal.columns == {}
    content = b"".join(b'{"step": %d, "a": %d}\n' % (i, i * i) for i in range(1, 40))
    with path.open("wb") as file:
        for i in range(0, len(content), 7):
            file.write(content[i : i + 7])
            file.flush()
            journal.read()
            complete = content[: i + 7].count(b"}")
            steps = journal.columns["a"][:, 0].tolist() if journal.columns else []
            assert steps == list(range(1, complete + 1)) and journal.unreadable == 0
    assert (journal.lines, journal.ends_early, journal.last_step) == (39, False, 39)
    with path.open("ab") as file:
        file.write(b'no JSON\n\n{"step": 50, "a": 1}\n')
    journal.read()
    assert journal.unreadable == 1 and journal.columns["a"][-1].tolist() == [50, 1]


@pytest.mark.quick
def test_a_page_that_looks_at_a_run_does_not_stop_it(tmp_path):
    """It tries the lock of each run that has not finished: one that began just then was refused."""
    path = tmp_path / "run"
    path.mkdir()
    config = {"id": "a", "output_dir": "", "resume": ""}
    for resume in (False, True):
        looking = threading.Timer(0.03, system.unlock, (path, system.lock(path)))
        looking.start()
        with output_directory(path, resume, config):
            assert runs.is_locked(path)
        looking.join()
    lock = system.lock(path)  # by another process, so to speak
    with pytest.raises(UserError, match="another process is using it"):
        output_directory(path, True, config).__enter__()
    system.unlock(path, lock)
    assert not runs.is_locked(path)


@pytest.mark.quick
def test_another_journal_under_the_same_name_is_read_anew(tmp_path):
    """A file that is removed and written again often has the same inode: its rows followed the old ones."""
    path = tmp_path / "history.jsonl"
    journal = Journal(path)
    for content in ('{"step": 1, "a": 1}\n', '{"step": 2, "a": 7}\n{"step": 3, "a": 8}\n'):
        path.write_text(content)
        journal.read()
    assert journal.columns["a"].tolist() == [[2, 7], [3, 8]]


@pytest.mark.quick
def test_curves_are_asked_for_by_rows(tmp_path):
    """Rows of equal or falling steps never came; beside short curves, zooming did not bring all rows."""
    steps = [10, 20, 5, 20]
    run = write_run(tmp_path / "a", [{"step": step, "x": 1.0 * i} for i, step in enumerate(steps)])
    found = runs.find_runs([tmp_path])
    after = chart_data.curves(found, {"x": {str(run): [2, None]}, "lr": {}})
    assert after == {"x": {str(run): [[5, 2], [20, 3]]}, "lr": {}}
    assert chart_data.curves(found, {"x": {str(run): [1, 3]}})["x"][str(run)] == [[20, 1], [5, 2]]
    append(run, [{"step": 30, "x": math.nan}, {"step": 40, "x": 4.0}])
    (known,) = runs.find_runs([tmp_path], found)
    assert chart_data.curves([known], {"x": {str(run): [4, None]}})["x"][str(run)] == [[40, 4]]


@pytest.mark.quick
def test_runs_that_are_gone_do_not_hold_up_the_others(tmp_path):
    paths = [write_run(tmp_path / name, ROWS[:1]) for name in "ab"]
    known = runs.find_runs(paths)
    shutil.rmtree(paths[0])
    append(paths[1], ROWS[1:2])
    (run,) = runs.find_runs(paths, known)
    assert run.journal.last_step == ROWS[1]["step"]
    with pytest.raises(UserError, match="No such file"):
        runs.find_runs(paths)
    shutil.rmtree(paths[1])
    with pytest.raises(UserError, match="no runs are left"):
        runs.find_runs(paths, known)


@pytest.mark.quick
@pytest.mark.parametrize("damage", ["text", "directory", "not a record"])
def test_a_damaged_log_of_wandb_does_not_stop_the_report(damage, tmp_path):
    """It was a traceback."""
    run = write_run(tmp_path / "runs/a", ROWS, id="abc")
    log = tmp_path / "wandb/offline-run-20260101_000000-abc/run-abc.wandb"
    log.parent.mkdir(parents=True)
    if damage == "directory":
        log.mkdir()
    else:
        record = Record()
        record.history.step.num = 1
        item = record.history.item.add()
        item.nested_key.append("_timestamp")
        item.value_json = "text"
        data = record.SerializeToString() if damage == "text" else b"\xff\xff\xff"
        header = struct.pack("<IHB", zlib.crc32(data, zlib.crc32(b"\x01")), len(data), 1)
        log.write_bytes(b":W&B\x00\x00\x00"[:7] + header + data)
    (run / "x.png").mkdir()  # no picture, and none was needed
    static_page(run.parent)
