"""Write down what a protocol asks for: a shard of requests.

Entry point, called by `python -m moa plan`:

    run(protocol, subjects, split, kind, shard, shards, output)
"""

from __future__ import annotations

from pathlib import Path

from moa.data.subjects import read_subjects
from moa.evaluation import samples
from moa.evaluation.protocol import load, requests


def run(protocol: Path, subjects: Path, split: str, kind: str, shard: int, shards: int, output: Path) -> None:
    """Write the rows of shard `shard`, 0 ≤ shard < shards, of what `protocol` asks for, in equal parts.

    Raises:
        ValueError: an unknown split, kind or shard, or a subject without photo.
    """
    if not 0 <= shard < shards:
        raise ValueError(
            f"shard {shard} is outside 0..{shards - 1}; see the configuration's key shards.{kind}"
        )
    people = list(read_subjects(subjects).values())
    rows = sorted(requests(load(protocol), people, kind, split), key=samples.sort_key)
    first, last = (len(rows) * n // shards for n in (shard, shard + 1))
    samples.write(output, rows[first:last], samples.REQUEST)
