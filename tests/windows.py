"""Windows for the modules of this project: what they import lacks what Windows lacks, and refuses what it refuses.

`python windows.py SCRIPT` runs a script so; torch, wandb and the standard library keep what they have. Files that some
process has open can't be replaced or removed, text files without an encoding are in a Korean one, with CRLF. SIGUSR2
stands for Ctrl-Break.
"""

import builtins
import ctypes
import fcntl
import glob
import multiprocessing
import os
import pathlib
import runpy
import signal
import subprocess
import sys
from types import ModuleType, SimpleNamespace

REPO = str(pathlib.Path(__file__).resolve().parent.parent)
BREAK = signal.SIGUSR2
OTHER_DRIVE = os.sep + "drive_d" + os.sep
ABSENT = {  # as a Windows of Python 3.13 has it
    "os": "fork forkpty register_at_fork killpg getpgid setsid getuid geteuid sched_getaffinity sysconf uname mkfifo "
    "O_DIRECTORY O_NOFOLLOW O_CLOEXEC O_NONBLOCK fchmod fchown chown posix_spawn wait3 wait4 WIFEXITED statvfs",
    "signal": "SIGALRM SIGKILL SIGCHLD SIGHUP SIGUSR1 SIGUSR2 SIGPIPE SIGSTOP SIGTSTP SIGQUIT ITIMER_REAL setitimer "
    "getitimer alarm pause pthread_sigmask pthread_kill sigwait siginterrupt SIG_BLOCK SIG_SETMASK",
}
NO_MODULES = ("fcntl", "grp", "pwd", "resource", "syslog", "termios", "pty", "tty", "posix")
SIGNALS = {
    signal.SIGABRT,
    signal.SIGFPE,
    signal.SIGILL,
    signal.SIGINT,
    signal.SIGSEGV,
    signal.SIGTERM,
}


class Proxy(ModuleType):
    """A module with other attributes, and without some."""

    def __init__(self, module: ModuleType, **changes):
        super().__init__(module.__name__)
        self._module = module
        self._absent = ABSENT.get(module.__name__, "").split()
        self.__dict__.update(changes)

    def __getattr__(self, name: str):
        if name in self._absent:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(self._module, name)


def in_use(path) -> bool:
    """Whether a process has a file, or one in a directory, open or mapped."""
    path = os.path.realpath(path)
    for link in glob.glob("/proc/[0-9]*/fd/*"):
        try:
            if (os.readlink(link) + "/").startswith(path + "/"):
                return True
        except OSError:
            pass
    with open("/proc/self/maps") as maps:
        return any(path in line for line in maps)


def refuse(path) -> None:
    raise PermissionError(13, "Permission denied", str(path))


def open_descriptor(path, flags, *mode):
    if os.path.isdir(path):
        refuse(path)
    return os.open(path, flags, *mode)


def fsync(descriptor) -> None:
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(9, "Bad file descriptor")
    os.fsync(descriptor)


def remove(path) -> None:
    if in_use(path):
        refuse(path)
    os.remove(path)


def replace(source, target) -> None:
    if in_use(source) or in_use(target):
        refuse(target)
    os.replace(source, target)


def relpath(path, start=os.curdir) -> str:
    if OTHER_DRIVE in os.path.abspath(path) and OTHER_DRIVE not in os.path.abspath(start):
        raise ValueError("path is on mount 'D:', start on mount 'C:'")
    return os.path.relpath(path, start)


def handle(number, handler):
    if number not in SIGNALS | {BREAK}:
        raise ValueError("invalid signal value")
    return signal.signal(number, handler)


class Popen(subprocess.Popen):
    """In the words of Windows: new groups by a flag, no other files than the standard ones, no SIGTERM."""

    def __init__(self, command, creationflags=0, pass_fds=(), start_new_session=False, **options):
        assert not pass_fds, "pass_fds not supported on Windows."
        super().__init__(command, start_new_session=creationflags == 0x200, **options)


def kill(pid: int, number) -> None:
    if number == "break":
        os.killpg(pid, BREAK)
    else:  # TerminateProcess
        os.kill(pid, signal.SIGKILL)


def load_library(name, *arguments):
    if name is None:
        raise TypeError("argument of type 'NoneType' is not a container or iterable")
    return ctypes.CDLL(name, *arguments)


KERNEL = SimpleNamespace(SetConsoleCtrlHandler=lambda handler, added: True)
PROXIES = {
    "os": Proxy(
        os, name="nt", open=open_descriptor, kill=kill, fsync=fsync, remove=remove, unlink=remove, replace=replace, rename=replace,
        path=Proxy(os.path, relpath=relpath),
    ),
    "signal": Proxy(signal, signal=handle, SIGBREAK=BREAK, CTRL_BREAK_EVENT="break"),
    "subprocess": Proxy(subprocess, Popen=Popen, CREATE_NEW_PROCESS_GROUP=0x200),
    "ctypes": Proxy(ctypes, CDLL=load_library, windll=SimpleNamespace(kernel32=KERNEL)),
}  # fmt: skip


def ours(level: int) -> bool:
    """Whether a module of the project, but not this one, is the caller of the caller."""
    file = sys._getframe(level + 1).f_globals.get("__file__") or ""
    return os.path.abspath(file).startswith(REPO) and not file.endswith("windows.py")


def import_as_on_windows(name, scope=None, *arguments, **options):
    file = (scope or {}).get("__file__") or ""
    if not os.path.abspath(file).startswith(REPO) or file.endswith("windows.py"):
        return import_module(name, scope, *arguments, **options)
    if name in NO_MODULES:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return PROXIES.get(name) or import_module(name, scope, *arguments, **options)


def with_defaults(function):
    """A function that opens a text file, with the defaults of Windows for callers in the project."""

    def opening(*arguments, **options):
        if ours(1):
            mode = options.get("mode", "r")
            if function.__name__ == "open" and len(arguments) > 1:
                mode = arguments[1]
            writes = function.__name__ == "write_text" or set(mode) & set("wax+")
            positional = {"read_text": 1, "write_text": 2}.get(function.__name__, 3) < len(
                arguments
            )
            if "b" not in mode and not positional:
                options["encoding"] = options.get("encoding") or "cp949"
                if writes and options.get("newline") is None:
                    options["newline"] = "\r\n"
        return function(*arguments, **options)

    return opening


if __name__ == "__main__":
    multiprocessing.set_start_method("fork")  # so that workers live in the imitation, too
    import_module = builtins.__import__
    builtins.__import__ = import_as_on_windows
    builtins.open = with_defaults(builtins.open)
    for method in ("open", "read_text", "write_text"):
        setattr(pathlib.Path, method, with_defaults(getattr(pathlib.Path, method)))
    script, *sys.argv = sys.argv
    sys.argv[0] = os.path.abspath(sys.argv[0])
    sys.path[:1] = [os.path.dirname(sys.argv[0]), REPO]
    runpy.run_path(sys.argv[0], run_name="__main__")
