"""Compare the training speed on one GPU: the ways of benchmarks/train.py.

    python benchmarks/gpu.py                                     # the shape of Flan-T5-large, in bf16
    python benchmarks/gpu.py --size google/flan-t5-xl --longest 2048 --tokens 32768

Every way sees only one GPU: the first of CUDA_VISIBLE_DEVICES, or of the machine if that isn't set. Prints one JSON
line with the GPU's name. Time is wall time, synchronized with the GPU at both ends; memory is what torch allocated on
the GPU. Without a GPU, prints an error and exits with code 2.
"""

import json
import sys

import torch
from sides import select_one_gpu
from train import build_parser, compare, run_way


def main() -> None:
    assert __doc__ is not None
    parser = build_parser(__doc__)
    parser.set_defaults(size="google/flan-t5-large", dtype="bfloat16", tokens=16384, steps=20, on_gpu=True)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu.py: this machine has no GPU that torch can use; benchmarks/train.py runs on CPUs", file=sys.stderr)
        sys.exit(2)
    if options.way:
        result = run_way(options)
    else:
        result = {
            **compare(options, {}),
            "card": torch.cuda.get_device_name(0),
            "gpu": select_one_gpu()["CUDA_VISIBLE_DEVICES"],
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
