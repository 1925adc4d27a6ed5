"""A stand-in for `python`: processes that other programs start (torchrun its workers, bash torchrun) come from a
process with torch imported, in milliseconds.

`python -u script.py argv…` or `python -m module argv…` is then a small client in the place of the interpreter. It
hands its arguments, folder, environment, streams and network namespace to a server, which forks the program. The two
live and die together: signals to the client reach the program, its end is the client's, and kill -9 of the client is
the program's end too, with all that it started.
"""

import atexit
import ctypes
import json
import os
import runpy
import select
import shlex
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import current_process, parent_process
from pathlib import Path

from tests.helpers import _context, descendants

CLIENT = """
import json, os, signal, socket, sys
names = ("user", "net")
server = socket.socket(socket.AF_UNIX)
server.connect({path!r})
spaces = [os.stat("/proc/self/ns/" + n).st_ino for n in names]
told = json.dumps([os.getpid(), sys.argv[1:], os.getcwd(), dict(os.environ), spaces]).encode()
fds = [0, 1, 2, *(os.open("/proc/self/ns/" + n, os.O_RDONLY) for n in names)]
socket.send_fds(server, [len(told).to_bytes(4, "big")], fds)
server.sendall(told)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, frame: server.send(bytes([number])))
code = int(server.recv(16) or -9)
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if code != -9 else None
    os.kill(os.getpid(), -code)
os._exit(code)
"""


@contextmanager
def forked_python(folder: Path) -> Iterator[Path]:
    """The stand-in's path; it works inside this block."""
    path = folder / "python"
    (folder / "client.py").write_text(CLIENT.format(path=str(folder / "socket")))
    path.write_text(
        f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -IS {shlex.quote(str(folder / "client.py"))} "$@"\n'
    )
    path.chmod(0o755)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "socket"))
    listener.listen(16)
    server = _context.Process(target=_serve, args=(listener,), daemon=True)
    server.start()
    listener.close()
    try:
        yield path
    finally:
        server.kill()
        server.join()


def program(python: Path, pid: int) -> int:
    """The process that does a client's work."""
    return int((python.parent / f"{pid}.program").read_text())


def _serve(listener: socket.socket) -> None:
    """Fork a keeper for each client."""
    parent, folder = parent_process(), Path(listener.getsockname()).parent
    assert parent is not None
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        ready, _, _ = select.select([listener, parent.sentinel], [], [])
        if parent.sentinel in ready:
            return
        client, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            with suppress(OSError):  # a client that is gone
                _keep(client, folder)
            os._exit(0)
        client.close()


def _keep(client: socket.socket, folder: Path) -> None:
    """Fork the program, hand it what its client gets, tell the client its end.

    Where the client ends first, so does the program, with all that it started.
    """
    size, fds, _, _ = socket.recv_fds(client, 4, 8)
    told = b""
    while len(told) < int.from_bytes(size, "big"):
        part = client.recv(1 << 16)
        if not part:
            return
        told += part
    number, argv, cwd, environ, namespaces = json.loads(told)
    pid = os.fork()
    if pid == 0:
        client.close()
        _become(argv, cwd, environ, namespaces, fds)
    (folder / f".{number}").write_text(str(pid))
    (folder / f".{number}").rename(folder / f"{number}.program")
    for fd in fds:
        os.close(fd)
    end = os.pidfd_open(pid)
    while True:
        ready, _, _ = select.select([client, end], [], [])
        if end in ready:
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            client.sendall(str(code).encode())
            return
        signals = b""
        with suppress(ConnectionResetError):
            signals = client.recv(16)
        if not signals:
            for each in [*descendants(pid), pid]:
                with suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)
            return
        for s in signals:
            os.kill(pid, s)


def _become(argv: list[str], cwd: str, environ: dict[str, str], namespaces: list[int], fds: list[int]) -> None:
    """Be `python argv…`; does not return."""
    code: object = 1
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        for name, inode, fd in zip(("user", "net"), namespaces, fds[3:], strict=True):
            if os.stat(f"/proc/self/ns/{name}").st_ino != inode and libc.setns(fd, 0):
                raise OSError(ctypes.get_errno(), f"setns: {name}")
        for target, fd in enumerate(fds[:3]):
            os.dup2(fd, target)
        for fd in fds:
            os.close(fd)
        sys.stdin, sys.stdout, sys.stderr = (open(i, m, buffering=1, closefd=False) for i, m in enumerate("rww"))  # noqa: SIM115 - as long as it lives
        current_process()._config["daemon"] = False  # type: ignore[attr-defined] - unlike the server, it may have children
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(environ)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        while argv[0] in ("-u", "-W", "-B"):
            argv = argv[2 if argv[0] == "-W" else 1 :]
        if argv[0] == "-m":
            sys.argv = argv[1:]
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = argv
            runpy.run_path(argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
        code = 0 if code is None else code if isinstance(code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        with suppress(BaseException):
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            sys.stdout.flush()
        os._exit(code if isinstance(code, int) else 1)
