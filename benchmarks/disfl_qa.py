"""Convert Disfl-QA (Gupta et al. 2021) to ShareGPT conversations: a disfluent question, then the fluent one as target.

python benchmarks/disfl_qa.py disfl-qa.train.json train.jsonl
"""

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("input", type=Path, help="a JSON file of the dataset")
    parser.add_argument("output", type=Path, help="a JSONL file")
    options = parser.parse_args()
    pairs = json.loads(options.input.read_text(encoding="utf-8"))
    with open(options.output, "w", encoding="utf-8") as file:
        for key, pair in pairs.items():
            turns = [{"from": "human", "value": pair["disfluent"]}, {"from": "gpt", "value": pair["original"]}]
            file.write(json.dumps({"id": key, "conversations": turns}, ensure_ascii=False) + "\n")
    print(f"{len(pairs)} conversations in {options.output}")


if __name__ == "__main__":
    main()
