"""Measure how much memory this process may still use, without importing anything heavy."""

from pathlib import Path

CGROUP_FOLDER = Path("/sys/fs/cgroup")


def get_free_memory() -> int:
    """Return the bytes that are free on the machine and within the container's limit."""
    import psutil

    available = int(psutil.virtual_memory().available)
    try:
        # cgroup v2; memory of inactive files is page cache, which Linux can reclaim
        limit, used = ((CGROUP_FOLDER / name).read_text().strip() for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (CGROUP_FOLDER / "memory.stat").read_text().splitlines())
        cached = statistics["inactive_file"]
    except (OSError, KeyError, ValueError):
        return available
    return available if limit == "max" else min(available, int(limit) - int(used) + int(cached))
