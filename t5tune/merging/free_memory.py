"""How much memory this process may still take, before anything heavy is imported."""

from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Bytes that the machine and the container's limit leave."""
    import psutil

    available = int(psutil.virtual_memory().available)
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        cached = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())["inactive_file"]
    except (OSError, KeyError, ValueError):
        return available
    return available if limit == "max" else min(available, int(limit) - int(used) + int(cached))
