"""A run goes on with the same batches in another process, wherever it was cut and however many hosts there are."""

import contextlib
import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxlm import data
from jaxlm.stages import Stage

COUNT = 60


def batches_of(path: Path, share: tuple[Sequence[int], int] = ((0,), 1)) -> data.Batches:
    """Two corpora, three stages, two augmentations, packed."""
    corpora = {"train": data.open_corpus(path), "heldout": data.open_corpus(path, "heldout")}
    stages = [
        Stage([16], 256, until_tokens=256 * 20, weights={"train": 1, "heldout": 1}),
        Stage([16, 32], 512, until_tokens=256 * 20 + 512 * 20),
        Stage([16, 64], 512, weights={"train": 3, "heldout": 1}, window=16),
    ]
    plan = data.make_plan({name: corpus.lengths for name, corpus in corpora.items()}, stages, data.best_fit, seed=5)
    augment = [data.FillInTheMiddle(0.5, 258, 259, 260), data.TokenDropout(0.1, 0)]
    return data.Batches(corpora, plan, COUNT, augment, share=share)


def digests(batches: data.Batches, start: int, count: int) -> list[list[str]]:
    """Of every row of every batch that is given from `start` on."""
    found: list[list[str]] = []
    with contextlib.closing(data.iterate(batches, start=start)) as given:
        for batch in given:
            arrays = [np.ascontiguousarray(x) for x in batch.values() if isinstance(x, np.ndarray)]
            rows = zip(*arrays, strict=True)
            found.append([hashlib.sha256(b"".join(x.tobytes() for x in row)).hexdigest() for row in rows])
            if len(found) == count:
                break
        assert given.get_state() == {"next_index": start + len(found)}
    return found


def test_a_fresh_process_goes_on_with_the_same_batches_on_any_number_of_hosts(corpus_path: Path) -> None:
    straight = digests(batches_of(corpus_path), 0, COUNT)
    assert len({row for rows in straight for row in rows}) > 100
    cuts = sorted(np.random.default_rng(0).integers(1, COUNT, 6).tolist())
    command = [sys.executable, __file__, str(corpus_path), json.dumps(cuts)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == straight[cuts[0] :]


def in_turns(path: Path, cuts: Sequence[int]) -> list[list[str]]:
    """From each cut to the next with another number of hosts, 8, 4, 2, 1 and again."""
    found: list[list[str]] = []
    for turn, (cut, end) in enumerate(zip(cuts, [*cuts[1:], COUNT], strict=True)):
        hosts = 8 >> turn % 4
        shares = [digests(batches_of(path, ((k,), hosts)), cut, end - cut) for k in range(hosts) if end > cut]
        found += [[row for host in batch for row in host] for batch in zip(*shares, strict=True)]
    return found


if __name__ == "__main__":
    print(json.dumps(in_turns(Path(sys.argv[1]), json.loads(sys.argv[2]))))
