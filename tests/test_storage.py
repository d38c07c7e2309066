"""Sweeps over PostgreSQL, with a real server that stops, restarts and drops connections."""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import REPO, clean_environment
from tests.test_sweeps import CELLS, GRID, read_lines, start_search

PASSWORD = "s3cret"


def find_programs() -> Path | None:
    """The directory of PostgreSQL's programs: on PATH, as Debian installs them, or from the package pgserver."""
    found = [Path(program).parent for program in filter(None, [shutil.which("initdb")])]
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    if package := importlib.util.find_spec("pgserver"):
        found.append(Path(package.origin).parent / "pginstall/bin")
    return next((directory for directory in found if (directory / "pg_ctl").exists()), None)


@pytest.fixture(scope="module")
def server() -> Iterator[Callable[[str], str]]:
    """A function that starts, stops or restarts a server, and returns the URL of its database."""
    programs = find_programs()
    if not programs:
        pytest.skip(
            "needs a PostgreSQL server: apt-get install postgresql, or pip install pgserver"
        )
    with tempfile.TemporaryDirectory() as name, socket.socket() as probe:
        directory = Path(name)
        root = os.geteuid() == 0  # as which the server does not run
        options = {
            "cwd": directory,
            "check": True,
            "stdout": subprocess.DEVNULL,
            "stderr": subprocess.DEVNULL,
        }
        if root:
            options["user"] = "nobody"
            shutil.chown(directory, "nobody")
        (directory / "password").write_text(PASSWORD)
        (directory / "password").chmod(0o644)
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        authentication = ["-A", "scram-sha-256", "-U", "me", "--pwfile", directory / "password"]
        subprocess.run([programs / "initdb", "-D", directory / "data", *authentication], **options)
        settings = f"-p {port} -k {directory} -c fsync=off -c listen_addresses=127.0.0.1"

        def control(action: str) -> str:
            command = [
                programs / "pg_ctl",
                "-D",
                directory / "data",
                "-o",
                settings,
                "-m",
                "fast",
                "-w",
                action,
            ]
            subprocess.run(command, **options)
            return f"postgresql://me:{PASSWORD}@127.0.0.1:{port}/postgres"

        probe.close()
        control("start")
        yield control
        control("stop")


def start_searches(
    directory: Path, count: int, url: str, sweep: str
) -> tuple[list[Path], list[subprocess.Popen]]:
    """Searches in directories of their own, each with a run at work."""
    places, processes = [directory / str(number) for number in range(count)], []
    for place in places:
        place.mkdir()
        shutil.copy(REPO / "tests/objective.py", place)
        processes.append(start_search(place, sweep, "--storage", url))
    deadline = time.monotonic() + 60
    while not all(read_lines(place / "starts.txt") for place in places):
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.05)
    return places, processes


def test_searches_outlive_failures_of_their_database(server, tmp_path):
    """Three searches run every cell once while it drops connections, is stopped for ten seconds, and restarts."""
    import psycopg

    url = server("restart")
    places, processes = start_searches(tmp_path, 3, url, GRID.replace("0.5", "3"))
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
        )
    time.sleep(1)
    server("stop")
    time.sleep(10)
    server("start")
    time.sleep(2)
    server("restart")
    for process in processes:
        out = process.communicate(timeout=100)[0]
        assert process.returncode == 0 and "Traceback" not in out and PASSWORD not in out, out
        assert 1 <= out.count("the storage does not answer (") <= 2, (
            out
        )  # a line for each time that it was away
    assert sorted(line for place in places for line in read_lines(place / "visits.txt")) == sorted(
        CELLS
    )
    assert sum(len(read_lines(place / "starts.txt")) for place in places) == len(CELLS)


def test_a_search_without_its_database_can_be_stopped_and_gives_up(server, tmp_path):
    url = server("restart")
    sweep = GRID.replace("0.5", "3") + "name: stopped\n"
    (place,), (process,) = start_searches(tmp_path, 1, url, sweep)
    server("stop")
    time.sleep(4)
    process.send_signal(signal.SIGTERM)
    out = process.communicate(timeout=100)[0]
    assert process.returncode == 143 and "Traceback" not in out, out
    assert [line[:20] for line in out.splitlines()] == [
        "the storage does not",
        "Stopping the runs; t",
    ]

    server("start")
    program = f"import sys; sys.path.insert(0, {str(REPO)!r}); import sweep_offline\n"
    program += "from offline_sweep import study; study.PATIENCE = 2.0; sweep_offline.run_script(lambda: sweep_offline.main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "s.yaml", "--storage", url]
    process = subprocess.Popen(
        command,
        cwd=place,
        env=clean_environment(place),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while len(read_lines(place / "starts.txt")) < 2:
        time.sleep(0.05)
    server("stop")
    out = process.communicate(timeout=100)[0]
    server("start")
    assert process.returncode == 1 and "Traceback" not in out and PASSWORD not in out, out
    assert "error: the storage does not answer (" in out.splitlines()[-1]
    assert out.splitlines()[-1].endswith("; the same command goes on with the search")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ((PASSWORD, "wr0ng"), "password authentication failed"),
        (("127.0.0.1", "no.such.host.invalid"), "no.such.host.invalid"),
        (("@", "@ss@"), "***@127.0.0.1"),
        (("PORT", "silent"), "timeout"),
    ],
    ids=["password", "host", "odd password", "silent host"],
)
def test_an_unusable_database_is_one_line_within_seconds(change, expected, server, tmp_path):
    (tmp_path / "s.yaml").write_text(GRID)
    shutil.copy(REPO / "tests/objective.py", tmp_path)
    url = server("restart")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never answers
        if change[0] == "PORT":
            url = f"postgresql://me:{PASSWORD}@127.0.0.1:{silent.getsockname()[1]}/postgres"
        started = time.monotonic()
        process = start_search(tmp_path, GRID, "--storage", url.replace(*change))
        (line,) = process.communicate(timeout=100)[0].splitlines()
    assert time.monotonic() - started < 60
    assert process.returncode == 2 and expected in line
    assert not any(secret in line for secret in (PASSWORD, "wr0ng", "@ss"))
    assert not (tmp_path / "runs/sweep-s/trials.csv").exists()


def test_a_missing_driver_is_named(tmp_path):
    (tmp_path / "s.yaml").write_text(GRID)
    shutil.copy(REPO / "tests/objective.py", tmp_path)
    program = f"import sys; sys.path.insert(0, {str(REPO)!r}); sys.modules['psycopg'] = None; import sweep_offline\n"
    program += "sweep_offline.run_script(lambda: sweep_offline.main(sys.argv[1:]))"
    command = [
        sys.executable,
        "-c",
        program,
        "s.yaml",
        "--storage",
        "postgresql://me:s3cret@localhost/x",
    ]
    done = subprocess.run(
        command, cwd=tmp_path, env=clean_environment(tmp_path), capture_output=True, text=True
    )
    (line,) = done.stderr.splitlines()
    assert (
        done.returncode == 2
        and "no driver psycopg; requirements-sweep.txt has" in line
        and PASSWORD not in line
    )
