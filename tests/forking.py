"""Runs without the imports: a server, started once, has done them and forks a child for each run of a script.

Users start a new interpreter, and so does `Popen` here unless `forkable` says that a child does the same. The server is
a process of its own, because a child would miss the threads of the tests' process.
"""

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import inspect
import json
import os
import re
import runpy
import secrets
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import types
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REPO = Path(__file__).parent.parent
WANDB = Path(sys.executable).with_name("wandb")  # W&B's command line
# Read by nothing while it is imported, or heeded by `become`. Any other variable may be: OMP_*, HF_*, CUDA_*, LC_*,
# PYTHON* ...
HARMLESS = re.compile(
    r"WANDB_\w+|PYTEST_\w+|\w+_proxy|PATH|NETRC|CI|CUBLAS_WORKSPACE_CONFIG|RAYON_NUM_THREADS|TMPDIR"
    r"|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_\w+|TORCHELASTIC_\w+|TORCH_NCCL_\w+"  # torchrun's
    r"|PYTHONIOENCODING|SEED|KILL|KILL_AT|RAISES"  # of a sweep's trials, and of programs in the tests
)
TORCHRUN = ["-m", "torch.distributed.run"]
HOME = "/proc/self/cwd"  # the server's: paths that imports derive from it become those of a child
ADOPT = 36  # PR_SET_CHILD_SUBREAPER
# Imported by the server: what the scripts import, and what they load on their way.
MODULES = """
train_mnist train_cola sweep_offline torch.distributed.launcher.api wandb.cli.cli wandb.sdk.launch.inputs.internal
PIL.PngImagePlugin multiprocessing.pool requests sympy.tensor.tensor
opentelemetry.exporter.otlp.proto.http.metric_exporter opentelemetry.exporter.otlp.proto.http._log_exporter
onnxscript.optimizer onnxscript.function_libs.torch_lib.ops onnxscript.rewriter.onnx_fusions
torch._functorch.aot_autograd torch._inductor.sizevars torch.export._trace torch.onnx._internal.exporter._compat
torch.onnx._internal.exporter._torchlib.ops torch.utils.serialization.config
""".split()


class Server:
    """Starts with the first run, and ends with the process of the tests."""

    def __init__(self, environment: Mapping[str, str]):
        self.environment = {
            name: value for name, value in environment.items() if not HARMLESS.fullmatch(name)
        }
        self.environment |= {
            "HOME": HOME,
            "PATH": os.environ["PATH"],
            "PYTHONDONTWRITEBYTECODE": "1",
            "CUDA_VISIBLE_DEVICES": "",  # a child of a process that has asked CUDA can't use it
        }
        self.address, self.lock = "", threading.Lock()

    def listen(self) -> tuple[socket.socket, socket.socket]:
        """What the server listens to, and what it lives as long as."""
        self.address = f"\0forking-{secrets.token_hex(8)}"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(self.address)
        listener.listen()
        self.lifeline, theirs = socket.socketpair()
        return listener, theirs

    def start(self) -> None:
        # For temporary files of libraries, and the bytecode of what the children import, who may outlive it.
        self.directory = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        listener, lifeline = self.listen()
        with listener, lifeline:
            numbers = listener.fileno(), lifeline.fileno()
            self.process = subprocess.Popen(
                [sys.executable, __file__, self.directory.name, *map(str, numbers)],
                env={**self.environment, "TMPDIR": self.directory.name},
                pass_fds=numbers,
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,  # no file: the streams of a child must not seek
                stderr=subprocess.STDOUT,
            )
            self.process.returncode = 0  # nobody waits for it

    def fork(self, request: dict[str, Any], files: list[int]) -> int:
        """The id of the new process, which is a child of this one."""
        prctl = ctypes.CDLL(None).prctl
        with self.lock:
            prctl(ADOPT, 1)
            try:
                with contextlib.suppress(OSError, ValueError):
                    return self.ask(request, files)
                self.start()  # the first time, or it has died
                return self.ask(request, files)
            finally:
                prctl(ADOPT, 0)

    def ask(self, request: dict[str, Any], files: list[int]) -> int:
        """Raises `OSError` or `ValueError` if the server does not run, or dies."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect(self.address)
            socket.send_fds(connection, [json.dumps(request).encode()], files)
            return int(connection.recv(100))


SERVERS: dict[str | None, Server] = {}  # by OMP_NUM_THREADS


def remember_environment() -> None:
    """Servers start with the variables that are set now."""
    for threads in {os.environ.get("OMP_NUM_THREADS"), "1"}:
        SERVERS[threads] = Server(os.environ | ({"OMP_NUM_THREADS": threads} if threads else {}))


remember_environment()


def python_command(given: dict[str, Any]) -> list[str]:
    """The command in the arguments of `Popen`, without an `env` that finds this interpreter."""
    command, path = [*map(str, given["args"])], (given["env"] or {}).get("PATH")
    if command[0] == "/usr/bin/env" and shutil.which(command[1], path=path) == sys.executable:
        return [sys.executable, *command[2:]]
    return command


def server_for(given: dict[str, Any]) -> Server | None:
    """The server whose child is the same as a new process, from the arguments of `Popen`; None if there is none.

    A child has the interpreter, the imports and the variables of the server, and is at home where it starts. So a
    process that may use a GPU is a new one.
    """
    command, environment, cwd = (
        python_command(given),
        given["env"],
        str(given["cwd"] or os.getcwd()),
    )
    if (
        sys.platform != "linux"
        or not environment
        or given["preexec_fn"]
        or not "".join(command).isascii()
    ):
        return None
    first = [*command[command[1:2] == ["-u"] :], ""][1]
    script = (
        first.endswith(".py") and Path(first).name != "objective.py"
    )  # which imports next to nothing
    runs = first == "-c" or script or command[1:3] == TORCHRUN
    if command[0] != str(WANDB) and not (command[0] == sys.executable and runs):
        return None
    server = SERVERS.get(environment.get("OMP_NUM_THREADS"))
    before = (server.environment if server else {}) | {"HOME": cwd}
    if environment.get("PYTHONPATH") == str(REPO):  # nothing there is run at the start
        before["PYTHONPATH"] = str(REPO)
    changed = {name for name, _ in before.items() ^ environment.items()}
    return server if all(map(HARMLESS.fullmatch, changed)) else None


class Popen(subprocess.Popen):
    """`subprocess.Popen`, whose child may have been forked by a server."""

    signature = inspect.signature(subprocess.Popen._execute_child)

    def _execute_child(self, *arguments: Any) -> None:  # which starts the process
        given = self.signature.bind(self, *arguments).arguments
        server = server_for(given)
        if server is None:
            super()._execute_child(*arguments)
            return
        command = python_command(given)
        pipes = [
            given[name]
            for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        ]
        streams = [
            number if pipe == -1 else pipe
            for number, pipe in enumerate((pipes[0], pipes[3], pipes[5]))
        ]
        request = {
            "arguments": command[1:] if command[0] == sys.executable else command,
            "cwd": str(given["cwd"] or os.getcwd()),
            "environment": dict(given["env"]),
            "passed": [*given["pass_fds"]],
        }
        self.pid, self._child_created = server.fork(request, [*streams, *given["pass_fds"]]), True
        self._close_pipe_fds(*pipes)


def run(
    command: list[Any], popen: type = Popen, timeout: float | None = None, **options: Any
) -> subprocess.CompletedProcess:
    """`subprocess.run`, by default with that `Popen`; captures both streams by default."""
    with popen(
        command, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


# ---------------------------------------------------------------------------------------------- in the server


def do_imports() -> dict[str, str]:
    """Import all that scripts need, as they do it; returns the variables which that sets."""
    import tqdm

    os.environ |= {
        "GOMP_SPINCOUNT": "1000",
        "OTEL_SDK_DISABLED": "true",
    }  # as harness/script.py does
    before = dict(os.environ)
    gc.disable()
    sys.path[0] = str(REPO)
    for name in MODULES:
        with contextlib.suppress(ImportError):  # another version has no such module
            importlib.import_module(name)
    tqdm.tqdm.set_lock(
        threading.RLock()
    )  # all children would share the default one, which a killed child may hold
    with contextlib.suppress(ImportError, AttributeError):
        remember_what_is_installed()
    for name, module in [
        *sys.modules.items()
    ]:  # a child imports the project's own modules, from where it finds them
        if name != "__main__" and str(getattr(module, "__file__", "")).startswith(f"{REPO}/"):
            del sys.modules[name]
    for registered in getattr(weakref.finalize, "_registry", ()):
        registered.atexit = False  # torch has thousands, which take a child a while at its exit
    gc.collect()
    gc.freeze()
    return {name: value for name, value in os.environ.items() if before.get(name) != value}


def remember_what_is_installed() -> None:
    """Compute once what W&B and the ONNX exporter compute in each run, from the installed libraries alone."""
    import torch._export.utils
    import tqdm
    import transformers
    import wandb.util
    from torch.onnx._internal.exporter import _registration

    packages = [*wandb.util.working_set()]
    wandb.util.working_set = lambda: packages
    operators = functools.cache(_registration.ONNXRegistry.from_torchlib)
    _registration.ONNXRegistry.from_torchlib = staticmethod(operators)
    train_mnist, interval = sys.modules["train_mnist"], tqdm.tqdm.monitor_interval
    tqdm.tqdm.monitor_interval = 0  # no thread, which a child would miss
    with (
        tempfile.TemporaryDirectory() as directory
    ):  # the first export and the first save of a process take longer
        model = train_mnist.ConvNet([1, 1]).eval()
        images = sys.modules["torch"].zeros(2, 1, 28, 28)
        train_mnist.files.write_onnx(Path(directory, "model.onnx"), model, "logits", images=images)
        bert = transformers.BertConfig(
            vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1
        )
        transformers.BertForSequenceClassification(bert).save_pretrained(directory)
    torch._export.utils._materialize_cpp_cia_ops = lambda: None  # done by that export
    tqdm.tqdm.monitor_interval = interval


def name_process(name: str) -> None:
    Path("/proc/self/comm").write_text(name)


def serve(listener: socket.socket, lifeline: socket.socket) -> dict[str, Any]:
    """Fork for each request; returns the request, in the child."""
    name_process("forking")
    while True:
        ready, *_ = select.select([listener, lifeline], [], [])
        if lifeline in ready:
            os._exit(0)
        connection, _ = listener.accept()
        message, files, *_ = socket.recv_fds(connection, 1 << 20, 9)
        if not message:  # the one that asked has been killed
            connection.close()
            continue
        request = json.loads(message)
        passed = request.pop("passed")
        reading, writing = os.pipe()
        between = os.fork()
        if not between:  # a process that ends at once, so that the one that asked adopts its child
            import fcntl  # not on Windows, which starts no server

            child = os.fork()
            if child:
                os.write(writing, str(child).encode())
                os._exit(0)
            for opened in (connection, listener, lifeline):
                opened.close()
            apart = [
                fcntl.fcntl(file, fcntl.F_DUPFD, 500) for file in files
            ]  # from the numbers that they get
            for number in (reading, writing, *files):
                os.close(number)
            for file, number in zip(apart, [0, 1, 2, *passed]):
                os.dup2(file, number)
                os.close(file)
            return request
        os.waitpid(between, 0)
        with contextlib.suppress(OSError):  # the same
            connection.send(os.read(reading, 100))
        connection.close()
        for number in (reading, writing, *files):
            os.close(number)


def fork_children(environment: dict[str, str]) -> None:
    """Let the Python processes that this one starts be forked too, by a server of its own, which is a child of it."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    server = SERVERS[environment.get("OMP_NUM_THREADS")] = Server(environment)
    listener, lifeline = server.listen()
    if not os.fork():
        server.lifeline.close()
        become(**serve(listener, lifeline), imported={})
        sys.exit()
    subprocess.Popen = subprocess_handler.Popen = Popen
    listener.close()
    lifeline.close()


def become(
    arguments: list[str], cwd: str, environment: dict[str, str], imported: dict[str, str]
) -> None:
    """Do what `python *arguments` does, in this process."""
    name_process("python")
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(imported | environment)
    tempfile.tempdir = None  # TMPDIR may be another one
    if media := sys.modules.get(
        "wandb.sdk.data_types._private"
    ):  # or the first child to end would remove it for all
        media.MEDIA_TMP.name = tempfile.mkdtemp("wandb-media")
        atexit.unregister(
            shutil.rmtree
        )  # of the parent's, if this is a run of torchrun or of a sweep
        atexit.register(shutil.rmtree, media.MEDIA_TMP.name, ignore_errors=True)
    # Not replaced: W&B captures what it found on import.
    encoding = environment.get("PYTHONIOENCODING")
    sys.stdout.reconfigure(encoding=encoding, line_buffering=os.isatty(1))
    if arguments[0] == "-u":  # as torchrun starts Python
        arguments = arguments[1:]
        sys.stdout.reconfigure(write_through=True)
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    name, sys.argv, sys.orig_argv = arguments[0], arguments, [sys.executable, *arguments]
    if name == "-m":
        sys.path[0], sys.argv = cwd, arguments[1:]
    elif name == "-c":
        program, sys.argv = arguments[1], ["-c", *arguments[2:]]
        sys.path[0], name = "", "<string>"
    else:
        sys.path[0] = str(Path(name).resolve().parent)
        program, main.__file__ = Path(name).read_text(), name
    if (
        arguments[:2] == TORCHRUN
        or Path(name).name == "sweep_offline.py"
        or sys.argv[1:2] == ["agent"]
    ):
        fork_children(environment)
    if arguments[:2] == TORCHRUN:
        runpy.run_module(TORCHRUN[1], run_name="__main__", alter_sys=True)
        return
    sys.path[1:1] = filter(None, [environment.get("PYTHONPATH")])
    gc.enable()
    exec(compile(program, name, "exec"), main.__dict__)


if __name__ == "__main__":
    variables = do_imports()
    _, sys.pycache_prefix, *numbers = sys.argv
    sys.dont_write_bytecode = False
    sockets = (socket.socket(fileno=int(number)) for number in numbers)
    status: Any = None
    try:
        become(**serve(*sockets), imported=variables)
    except SystemExit as ended:
        status = ended.code
    if isinstance(status, str):
        print(status, file=sys.stderr)
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(
        1 if isinstance(status, str) else status or 0
    )  # libraries that were imported needlessly would complain
