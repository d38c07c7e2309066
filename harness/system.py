"""What differs between Windows and other systems: locks, signals, groups of processes, quoting."""

import _thread
import contextlib
import os
import shlex
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, TextIO

WINDOWS = os.name == "nt"
LOCK_FILE = ".lock"  # in a directory that is locked, on Windows only
STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM]
if WINDOWS:
    STOP_SIGNALS.append(signal.SIGBREAK)  # Ctrl-Break
    ALARM = signal.SIGABRT  # stands in for SIGALRM
    STOP, KILL = signal.CTRL_BREAK_EVENT, signal.SIGTERM
    signal_group = os.kill  # kills the process, unless the signal is CTRL_BREAK_EVENT
    shell_command = subprocess.list2cmdline
else:
    import fcntl

    ALARM = signal.SIGALRM
    STOP, KILL = signal.SIGTERM, signal.SIGKILL
    for warning in (signal.SIGUSR1, signal.SIGHUP):  # Slurm's, and a terminal's when it closes
        if signal.getsignal(warning) != signal.SIG_IGN:  # as it is under nohup
            STOP_SIGNALS.append(warning)
    signal_group = os.killpg
    shell_command = shlex.join
_timers: list[threading.Timer] = []  # on Windows, those that may still interrupt


def lock(path: Path) -> int:
    """Lock a file, which may be new, or a directory; returns a descriptor that holds the lock.

    The lock ends with the last process that has it. Raises `BlockingIOError` if another one has.
    """
    if WINDOWS:
        return _create_unless_open(path / LOCK_FILE if path.is_dir() else path)
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:  # a file system without locks
        return descriptor
    # Meanwhile, another process may have removed the directory, and created it again.
    if not path.exists() or not os.path.samestat(os.fstat(descriptor), path.stat()):
        os.close(descriptor)
        raise BlockingIOError
    return descriptor


def _create_unless_open(path: Path) -> int:
    try:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)  # Windows refuses that while a process has the file open
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    except OSError:
        if path.exists():
            raise BlockingIOError from None
        raise


def unlock(directory: Path, descriptor: int) -> None:
    """End the lock of a directory."""
    os.close(descriptor)
    if WINDOWS:
        with contextlib.suppress(OSError):  # another process uses it, or it is not empty
            os.remove(directory / LOCK_FILE)
            os.rmdir(directory)


def replace(source: Path, target: Path) -> None:
    """`os.replace`; wait up to a second while Windows refuses it: a program has the file open."""
    for _ in range(20):
        with contextlib.suppress(PermissionError):
            return os.replace(source, target)
        time.sleep(0.05)
    os.replace(source, target)


def interrupt_after(seconds: float) -> None:
    """Send `ALARM` to the main thread after `seconds`, or, if 0, no more."""
    if not WINDOWS:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        return
    while _timers:
        _timers.pop().cancel()
    if seconds:
        _timers.append(threading.Timer(seconds, _thread.interrupt_main, [ALARM]))
        _timers[0].start()


def group_options(lock_file: TextIO) -> dict[str, Any]:
    """Arguments of `Popen` for a process that Ctrl-C does not reach, and that keeps a lock."""
    if WINDOWS:  # which passes on no other file than the standard ones
        return {"stdin": lock_file, "creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    descriptors = [lock_file.fileno()]
    return {"stdin": subprocess.DEVNULL, "start_new_session": True, "pass_fds": descriptors}
