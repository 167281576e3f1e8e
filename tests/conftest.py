"""Strict numerics, eight simulated devices, one compile cache for all tests, and samples of large matrices of cases."""

import collections
import os
import sys
from collections.abc import Generator
from pathlib import Path

import jax
import jaxtyping
import pytest

from jaxlm import data

os.environ.setdefault("NPROC", "64")  # threads, in which devices wait for each other: with too few, for ever
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


GOLDEN_RATIO = (1 + 5**0.5) / 2


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test that is `sampled(n)` one in n cases isn't slow, and at least one: which, depends on Python's version.

    Steps of the golden ratio meet all values of each parameter, however many it has.
    """
    cases = collections.defaultdict[str, list[pytest.Item]](list)
    for item in items:
        if item.get_closest_marker("sampled") and not item.get_closest_marker("slow"):
            cases[item.nodeid.partition("[")[0]].append(item)
    for own in cases.values():
        marker = own[0].get_closest_marker("sampled")
        assert marker is not None
        places = [(i + sys.version_info.minor) * GOLDEN_RATIO % 1 for i in range(len(own))]
        for item, place in zip(own, places, strict=True):
            if place >= 1 / marker.args[0] and place > min(places):
                item.add_marker(pytest.mark.slow)


@pytest.fixture
def unchecked_types() -> Generator[None]:
    """As users have it: the tests' check of annotations would be the first to refuse what isn't of the type."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


WORDS = b"the quick brown fox jumps over the lazy dog while seven wizards make toxic brew of jade and onyx ".split()


@pytest.fixture(scope="session")
def corpus_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 60 short documents of bytes, a fifth of them held out."""
    texts = [b" ".join(WORDS[(7 * i + j * j) % len(WORDS)] for j in range(3 + i % 40)) for i in range(60)]
    path = tmp_path_factory.mktemp("corpus") / "words"
    documents = (data.Document(f"{i}.txt", text) for i, text in enumerate(texts))
    data.write_corpus(path, documents, data.ByteTokenizer(), heldout=0.2)
    return path


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 80 files of a few hundred bytes."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(80):
        (folder / f"{i}.txt").write_text("".join(f"{i * j % 17} times {j} " for j in range(i % 30 + 5)))
    return folder
