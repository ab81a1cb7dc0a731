"""How fast does training go on a GPU? benchmarks/train.py's ways, on the first one of this machine.

    python benchmarks/gpu.py                                     # Flan-T5-large's shape, in bf16
    python benchmarks/gpu.py --size google/flan-t5-xl --longest 2048 --tokens 32768

Prints one JSON line, with the card's name. Time is that of the wall, with the GPU idle at both ends; memory is what
torch allocated there. Without a GPU it says so and ends with 2.
"""

import json
import sys

import torch
from train import compare, parser_of, run_way


def main() -> None:
    assert __doc__ is not None
    parser = parser_of(__doc__)
    parser.set_defaults(size="google/flan-t5-large", dtype="bfloat16", tokens=16384, steps=20, on_gpu=True)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu.py: this machine has no GPU that torch can use; benchmarks/train.py runs on CPUs", file=sys.stderr)
        sys.exit(2)
    result = run_way(options) if options.way else {"card": torch.cuda.get_device_name(0), **compare(options, {})}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
