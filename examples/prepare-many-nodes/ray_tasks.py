"""Prepare data in Ray tasks, here in 64 parts on a core each: `python ray_tasks.py 64 --data-path chats.jsonl …`."""

import subprocess
import sys

import ray


@ray.remote(num_cpus=1, max_retries=3)
def prepare(part: int, count: int, flags: list[str]) -> None:
    command = [sys.executable, "-m", "t5tune", "prepare", "--shard", f"{part}/{count}", "--num-workers", "1", *flags]
    subprocess.run(command, check=True)


ray.init()
count, flags = int(sys.argv[1]), sys.argv[2:]
ray.get([prepare.remote(part, count, flags) for part in range(count)])
