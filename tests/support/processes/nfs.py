"""Locks as on NFS, seen from a machine whose files others lock too."""

import errno
import fcntl
import os
import stat

_flock = fcntl.flock


def lock_as_on_nfs() -> None:
    """From here on, `fcntl.flock` behaves as on NFS in this process."""
    fcntl.flock = flock_on_nfs


def flock_on_nfs(descriptor: int, operation: int) -> None:
    """Lock a file; locks of folders aren't seen by other machines, and an exclusive lock needs a file open for writing.

    See flock(2). Linux has no operation for locks of NFS folders, so it locks them on this machine alone.
    """
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        return
    is_writable = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
    if operation & fcntl.LOCK_EX and not is_writable:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    _flock(descriptor, operation)


def lock_nothing() -> None:
    """From here on, `fcntl.flock` fails as on a file system without locks."""
    fcntl.flock = _fail


def _fail(descriptor: int, operation: int) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
