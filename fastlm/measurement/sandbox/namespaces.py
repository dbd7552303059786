"""Makes the isolation itself, by Linux system calls: namespaces, then a file system of a few read-only folders.

Runs by path in a fresh interpreter, standard library only, and ends in `supervisor.supervise`. Works for
root and for any user where the kernel lets users make namespaces (`man 7 user_namespaces`), so that no
capability that is used here reaches beyond the new user namespace.

Notable: root maps every user it has, and the program becomes nobody, because the kernel does not limit
the number of root's processes; another user maps only itself. The new root is an empty tmpfs with the
given paths bound read-only (`mount_setattr`, Linux 5.12, the one call that reaches mounts below them). Left out:
/proc, which programs do without and which a container may not mount.
"""

import ctypes
import os
import sys
from typing import NoReturn

import limits
from supervisor import call, die_with_parent, supervise

_CLONE = {
    "mount": 0x20000,
    "uts": 0x4000000,
    "ipc": 0x8000000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "net": 0x40000000,
}
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 0x2, 0x4, 0x1000, 0x4000, 0x40000
_MNT_DETACH = 2
_SYS_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE = 442, -100, 0x8000
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID = 0x1, 0x2


def enter_namespaces() -> None:
    """Moves this process to namespaces of its own, as a user that owns them."""
    root = os.geteuid() == 0
    ready, signal_ready = os.pipe()
    process = os.getpid()
    # Several users can be mapped only by a process that stays outside.
    outside = os.fork()
    if outside == 0:
        os.close(signal_ready)  # or reading would not end when the other side fails
        if os.read(ready, 1):
            _map_users(process, root)
            os._exit(0)
        os._exit(1)
    call("unshare", sum(_CLONE.values()))
    os.write(signal_ready, b".")
    if os.waitpid(outside, 0)[1] != 0:
        raise OSError("users could not be mapped")
    os.close(ready)
    os.close(signal_ready)
    if root:
        os.setgroups([])
    # A namespace made inside would bring capabilities back, and mounts without limit.
    _write("/proc/sys/user/max_user_namespaces", "0")


def _map_users(process: int, root: bool) -> None:
    users, groups = (_identity("uid"), _identity("gid")) if root else (_only(os.geteuid()), _only(os.getegid()))
    if not root:  # without this, users may not map groups
        _write(f"/proc/{process}/setgroups", "deny")
    _write(f"/proc/{process}/gid_map", groups)
    _write(f"/proc/{process}/uid_map", users)


def _identity(kind: str) -> str:
    with open(f"/proc/self/{kind}_map") as ranges:
        return "".join("{0} {0} {2}\n".format(*line.split()) for line in ranges)


def _only(number: int) -> str:
    return f"{limits.NOBODY} {number} 1"


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def replace_root(paths: list[str]) -> None:
    """Makes a root that holds `paths`, read-only, a few devices, and one writable folder."""
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", limits.FOLDER, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=0755,size=1m")
    os.mkdir(f"{limits.FOLDER}/.old")
    call("pivot_root", limits.FOLDER.encode(), f"{limits.FOLDER}/.old".encode())
    os.chdir("/")
    os.mkdir(limits.FOLDER)
    # Before the paths, because one of them may lie below it.
    room = f"mode=1777,size={limits.FOLDER_BYTES},nr_inodes={limits.FOLDER_FILES}"
    _mount("tmpfs", limits.FOLDER, "tmpfs", _MS_NOSUID | _MS_NODEV, room)
    for path in (*paths, *limits.DEVICES):
        _show(path)
    call("umount2", b"/.old", _MNT_DETACH)
    os.rmdir("/.old")
    _set_attributes("/", _AT_RECURSIVE, _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID, 0)
    _set_attributes(limits.FOLDER, 0, 0, _MOUNT_ATTR_RDONLY)


def _show(path: str) -> None:
    old = f"/.old{path}"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.islink(old):
        os.symlink(os.readlink(old), path)
        return
    if os.path.isdir(old):
        os.makedirs(path, exist_ok=True)
    else:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    _mount(old, path, None, _MS_BIND | _MS_REC)


def _mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    try:
        call("mount", source.encode(), target.encode(), kind and kind.encode(), flags, data.encode())
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} ({target})") from None


def _set_attributes(path: str, flags: int, add: int, clear: int) -> None:
    attributes = (ctypes.c_uint64 * 4)(add, clear, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    call("syscall", ctypes.c_long(_SYS_MOUNT_SETATTR), _AT_FDCWD, path.encode(), flags, attributes, size)


def main(arguments: list[str]) -> NoReturn:
    """Entry point: bytes of memory, seconds of CPU, and the paths to show; exits as the supervisor does."""
    memory_bytes, cpu_seconds, *paths = arguments
    die_with_parent()
    os.umask(0o022)  # nobody has to be able to pass through the folders that are made here
    _write("/proc/self/oom_score_adj", "1000")  # should memory run out, then not for the machine's other work
    try:
        enter_namespaces()
        replace_root(paths)
    except OSError as error:
        sys.exit(error.strerror or str(error))
    watched = os.fork()
    if watched == 0:
        supervise(int(memory_bytes), int(cpu_seconds))
    status = os.waitstatus_to_exitcode(os.waitpid(watched, 0)[1])
    os._exit(status if status >= limits.EXITED else 1)
