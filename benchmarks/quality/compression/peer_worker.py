"""Compress LoRA folders by another package, in an environment that has it, and write what comes back; see peers.py.

    python peer_worker.py vlora-dev|lorashare NUMBERS OUT FOLDER …

OUT/<place>.safetensors holds the factors of the folder at that place in the list, OUT/facts.json what was stored.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "peers"))

from fleet_compressors import lorashare, vlora
from safetensors.torch import save_file

TOO_FEW = 3  # exit status: the package has no size as small


def main(package: str, most: str, out: str, *folders: str) -> None:
    facts, again = {"vlora-dev": vlora, "lorashare": lorashare}[package](list(folders), int(most))
    if facts["components"] < 1 or facts["numbers"] > int(most):
        print(f"its least size is {facts['numbers']} numbers, more than {most}", file=sys.stderr)
        raise SystemExit(TOO_FEW)
    for place, folder in enumerate(folders):
        factors = {key: value.float().contiguous() for key, value in again(folder).items()}
        save_file(factors, Path(out, f"{place}.safetensors"))
    Path(out, "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
