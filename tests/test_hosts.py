"""torchrun over two hosts, each a network namespace with a name, an address and a directory of its own."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import forking, killing, test_parallel
from tests.conftest import clean_environment

SCRIPT = "train_mnist.py"
# What `ip netns exec NAME unshare --uts` does, and then torchrun, in a process that has the imports done.
ON_HOST = f"""
import ctypes, os, runpy, socket, subprocess, sys
name, host, *sys.argv[1:] = sys.argv[1:]
libc = ctypes.CDLL(None, use_errno=True)
NETWORK, FILES, NAMES = 0x40000000, 0x20000, 0x4000000  # CLONE_NEWNET, CLONE_NEWNS, CLONE_NEWUTS
with open(f"/run/netns/{{name}}") as namespace:
    failed = libc.setns(namespace.fileno(), NETWORK) or libc.unshare(FILES | NAMES)
if failed:
    raise OSError(ctypes.get_errno(), "no namespace")
subprocess.run(["mount", "--make-rslave", "/"], check=True)
for file in ("hosts", "resolv.conf"):
    subprocess.run(["mount", "--bind", f"/etc/netns/{{name}}/{{file}}", f"/etc/{{file}}"], check=True)
socket.sethostname(host)
os.environ["GLOO_SOCKET_IFNAME"] = "v0"
sys.path.insert(0, {str(killing.REPO)!r})
from tests import forking
forking.fork_children(dict(os.environ))
runpy.run_module("torch.distributed.run", run_name="__main__", alter_sys=True)
"""


class Hosts:
    """Two namespaces, joined by a link; `dirs` are the hosts' directories."""

    def __init__(self, directory: Path):
        self.names = [f"t{os.getpid()}-{number}" for number in (0, 1)]
        self.dirs = [directory / "host0", directory / "host1"]

    def create(self) -> None:
        """Raises `CalledProcessError` or `OSError` if namespaces are not allowed."""
        for name, cwd in zip(self.names, self.dirs):
            ip("netns", "add", name)
            files = Path(
                "/etc/netns", name
            )  # the hosts find each other's names without a name server
            files.mkdir(parents=True)
            (files / "hosts").write_text("127.0.0.1 localhost\n10.77.0.1 host0\n10.77.0.2 host1\n")
            (files / "resolv.conf").touch()
            cwd.mkdir()
        ip(
            *f"link add v0 netns {self.names[0]} type veth peer name v0 netns {self.names[1]}".split()
        )
        for number, name in enumerate(self.names, 1):
            ip("-n", name, *f"address add 10.77.0.{number}/24 dev v0".split())
            for device in ("lo", "v0"):
                ip("-n", name, "link", "set", device, "up")

    def start(
        self, *more: str, ranks: tuple[int, int] = (0, 1), restarts: int = 0
    ) -> list[subprocess.Popen]:
        """Start the run that `killing` defines with one process on each host; `ranks` are the hosts'."""
        started = []
        for host, (name, cwd) in enumerate(zip(self.names, self.dirs)):
            launcher = f"--nnodes 2 --node-rank {ranks[host]} --master-addr 10.77.0.{ranks.index(0) + 1}".split()
            launcher += [
                "--master-port",
                "29511",
                "--max-restarts",
                str(restarts),
                killing.REPO / SCRIPT,
            ]
            arguments = [
                *killing.ARGUMENTS[SCRIPT].split(),
                "--output_dir",
                "out",
                "--id",
                "same",
                *more,
            ]
            started.append(
                forking.Popen(
                    [sys.executable, "-c", ON_HOST, name, f"host{host}", *launcher, *arguments],
                    cwd=cwd,
                    env=clean_environment(cwd, OMP_NUM_THREADS="1"),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
        return started

    def processes(self, name: str) -> list[int]:
        return [int(pid) for pid in ip("netns", "pids", name).split()]

    def remove(self) -> None:
        for name in self.names:
            with contextlib.suppress(subprocess.CalledProcessError):
                for pid in self.processes(name):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                ip("netns", "delete", name)
            shutil.rmtree(f"/etc/netns/{name}", ignore_errors=True)


def ip(*arguments: str) -> str:
    """The output of iproute2's command."""
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    if not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("needs ip (iproute2) and unshare, for network namespaces")
    hosts = Hosts(tmp_path)
    try:
        hosts.create()
    except (subprocess.CalledProcessError, OSError) as error:
        hosts.remove()
        pytest.skip(
            f"network namespaces are not allowed here: {getattr(error, 'stderr', None) or error}"
        )
    yield hosts
    hosts.remove()


def ends(processes: list[subprocess.Popen], seconds: float) -> tuple[list[int], list[str]]:
    """The exit statuses and the output of both hosts, which end within `seconds`."""
    deadline = time.monotonic() + seconds
    printed = [
        process.communicate(timeout=max(0.1, deadline - time.monotonic()))[0].decode()
        for process in processes
    ]
    return [process.returncode for process in processes], printed


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of two processes on one host."""
    return test_parallel.uninterrupted(tmp_path_factory, SCRIPT).out


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_is_restarted_on_both_hosts(victim, hosts, reference):
    processes = hosts.start("--resume", restarts=1)
    test_parallel.wait_for_rows(hosts.dirs[0], 5)
    worker = test_parallel.workers(processes[victim])[0]
    os.kill(worker, signal.SIGKILL)
    statuses, printed = ends(processes, 60)
    assert statuses == [0, 0], printed
    assert "Resuming out at epoch" in printed[0]
    assert (victim == 1) == ("process 1: stopped by a communication failure" not in printed[1])
    assert killing.differences(reference, hosts.dirs[0] / "out") == []
    assert not (hosts.dirs[1] / "out").exists()


def test_what_ends_a_run_ends_it_on_both_hosts(hosts):
    """SIGTERM on one host, a resume whose checkpoint is on the other one, and a link that is cut for good."""
    processes = hosts.start("--epochs", "99", restarts=1)
    test_parallel.wait_for_rows(hosts.dirs[0], 5)
    os.kill(processes[1].pid, signal.SIGTERM)
    statuses, printed = ends(processes, 20)
    assert 0 not in statuses and "stopped by a signal to another process at step" in printed[0], (
        printed
    )
    assert "process 1: stopped by SIGTERM at step" in printed[1]
    step = torch.load(hosts.dirs[0] / "out/checkpoint.pt", weights_only=True)["position"]["step"]

    statuses, printed = ends(hosts.start("--epochs", "99", "--resume", ranks=(1, 0)), 40)
    assert (
        0 not in statuses
        and "the checkpoint of out is on host0, and host1, which has process 0" in printed[1]
    )
    assert not (hosts.dirs[1] / "out").exists()

    processes = hosts.start("--epochs", "99", "--resume", "--peer_timeout", "8", restarts=1)
    test_parallel.wait_for_rows(hosts.dirs[0], step // (48 * 4) + 5)
    ip(*f"-n {hosts.names[0]} link set v0 down".split())
    statuses, printed = ends(processes, 30)
    assert 0 not in statuses, printed
    for text in printed:
        assert (
            "stopped by a communication failure between processes (Timed out waiting 8000ms" in text
        )
        assert (
            "--peer_timeout is the limit). To go on: on every host, torchrun with the same options"
            in text
        )
