"""Prepare data in Ray tasks, here in 64 parts on a core each. All nodes must see the files under these paths.

python examples/prepare-many-nodes/ray_tasks.py 64 --data-path /shared/chats.jsonl --output-dir /shared/cache …
"""

import subprocess
import sys

import ray


# by itself, Ray repeats tasks whose worker was lost, but not those whose t5tune failed or was killed
@ray.remote(num_cpus=1, max_retries=3, retry_exceptions=True)
def prepare(part: int, count: int, flags: list[str]) -> None:
    command = [sys.executable, "-m", "t5tune", "prepare", "--shard", f"{part}/{count}", "--num-workers", "1", *flags]
    subprocess.run(command, check=True)


ray.init()
count, flags = int(sys.argv[1]), sys.argv[2:]
parts = [prepare.remote(part, count, flags) for part in range(count)]
ray.wait(parts, num_returns=count)  # the first error would end this process, and with it all parts
ray.get(parts)
