"""How fast does training go on a GPU? benchmarks/train.py's ways, all on one GPU.

    python benchmarks/gpu.py                                     # Flan-T5-large's shape, in bf16
    python benchmarks/gpu.py --size google/flan-t5-xl --longest 2048 --tokens 32768

Every way sees one GPU alone: the first of CUDA_VISIBLE_DEVICES, or of the machine where that isn't set. Prints one JSON
line, with the GPU's name. Time is that of the wall, with the GPU idle at both ends; memory is what torch allocated
there. Without a GPU it says so and ends with 2.
"""

import json
import sys

import torch
from sides import one_gpu
from train import compare, parser_of, run_way


def main() -> None:
    assert __doc__ is not None
    parser = parser_of(__doc__)
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
            "gpu": one_gpu()["CUDA_VISIBLE_DEVICES"],
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
