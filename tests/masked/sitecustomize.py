"""Makes this interpreter poorer, for children of tests: MASKED names modules that cannot be imported here; with
FOREIGN=1 the standard library lacks what only Unix or Linux has, as on Windows."""
import os
import select
import socket
import sys

UNIX_MODULES = ("fcntl", "grp", "pwd", "resource", "syslog", "termios", "tty", "pty", "_posixshmem", "_posixsubprocess")
UNIX_NAMES = {
    os: ("memfd_create", "geteuid", "getuid", "getegid", "getgid", "getgrouplist", "chown", "fchmod", "fchown", "fork",
         "posix_fallocate", "fdatasync", "sched_getaffinity", "sched_setaffinity", "pidfd_open", "O_CLOEXEC", "mkfifo",
         "wait4", "killpg", "getpgid", "setsid", "statvfs"),
    socket: ("AF_UNIX", "SOCK_SEQPACKET", "SOCK_NONBLOCK", "SOCK_CLOEXEC", "SCM_RIGHTS", "send_fds", "recv_fds"),
    select: ("epoll", "EPOLLIN"),
}  # fmt: skip

masked = os.environ.get("MASKED", "").split()
if os.environ.get("FOREIGN"):
    import asyncio.selector_events  # noqa: F401  the standard library chooses by platform, not by what is there
    import functools
    import selectors
    import signal
    import subprocess  # noqa: F401

    selectors.DefaultSelector = selectors.SelectSelector
    socket.socketpair = functools.partial(socket.socketpair, socket.AF_UNIX)  # asyncio wakes itself up by one
    masked += UNIX_MODULES
    for module, names in UNIX_NAMES.items():
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    def no_such_file(event, arguments):
        if event in ("open", "os.listdir", "os.scandir") and str(arguments[0]).startswith(("/proc", "/sys")):
            raise FileNotFoundError(f"only Linux has {arguments[0]}")

    sys.addaudithook(no_such_file)
    for name in ("SIGKILL", "SIGHUP", "SIGUSR1", "pthread_sigmask", "pidfd_send_signal"):
        delattr(signal, name)
for name in masked:
    for loaded in [each for each in sys.modules if each == name or each.startswith(f"{name}.")]:
        del sys.modules[loaded]
    sys.modules[name] = None
