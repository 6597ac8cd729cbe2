"""The table of `benchmarks.quality`, also of measurements that several processes shared.

Where one machine has many cores, each process takes a share of the prompts and measures all rows on them:

    for i in $(seq 0 15); do
        python -m benchmarks.quality CHECKPOINT --world signs --device cuda --share $i/16 --raw DIR/$i.json &
    done
    wait; python -m benchmarks.quality_table DIR/*.json --markdown FILE

Tokens a second are then those of one process among them.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from .tally import Tally

_HEADS = ("all right", "right", "pictures", "turbo")  # the first of these that a row has is its score
_HEADER = ("| | right | rounds | tokens/s | by part |", "|---|---|---|---|---|")


def score(tally: Tally) -> tuple[str, float, tuple[float, float]]:
    """What a row is about, its share in per cent, and the interval of that."""
    figures = tally.figures()
    head = next(key for key in _HEADS if key in figures)
    return head, figures[head], tally.interval(head)


def row(name: str, tally: Tally) -> str:
    """A row's line. It says of how many judgements, so that a process whose file is missing is missed."""
    found, (head, share, (low, high)) = tally.figures(), score(tally)
    parts = ", ".join(f"{k} {v:.0f}" for k, v in found.items() if k not in (head, "rounds", "tokens/s"))
    speed = [f"{found[key]:.1f}" if key in found else "" for key in ("rounds", "tokens/s")]
    between = f"{low:.0f} to {high:.0f} in 95 %, of {len(tally.right[head])}"
    return f"| {name} | {share:.1f} | {speed[0]} | {speed[1]} | {between}; {parts} |"


def table(said: str, lines: Iterable[str]) -> str:
    """Lines with what is said of them and the names of the columns."""
    return "\n".join([said, "", *_HEADER, *lines]) + "\n"


def merged(files: Iterable[Path]) -> Iterator[tuple[str, Tally]]:
    """The rows of several files that `quality --raw` wrote, each of all its shares, in the order of the files."""
    rows: dict[str, Tally] = {}
    for file in files:
        for name, raw in json.loads(file.read_text()).items():
            rows.setdefault(name, Tally()).add_raw(raw)
    yield from rows.items()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path, nargs="+", help="files that quality --raw wrote")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there too")
    options = parser.parse_args()
    text = table("Per cent right of held-out prompts, by pixels and texts.", (row(*one) for one in merged(options.raw)))
    print(text, end="")
    if options.markdown:
        options.markdown.write_text(text)


if __name__ == "__main__":
    main()
