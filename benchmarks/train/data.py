"""Real text as batches of word numbers, the held-out split, and two models that count words.

A text is cut into blocks of consecutive tokens, of which every so many is held out. What is
learned, the vocabulary and the counts included, comes from the other blocks alone.
"""

import functools
import hashlib
import importlib
import platform
import re
import sysconfig
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.train.options import UserError

UNKNOWN = "<unk>"

# A word, identifier or number, or a run of one punctuation mark.
_TOKEN = re.compile(r"\w+|([^\w\s])\1*")

_BLOCK = 1024
_FEWEST = 2_000
_HELD_OUT = 65_536

# Other people's packages, tests (many installations lack them), tables of numbers, and the
# documentation's topics, which are read as text rather than as source.
_LEFT_OUT = re.compile(r"(site|dist)-packages|(idle_)?tests?|encodings|pydoc_data")


# --- reading --------------------------------------------------------------------------------------


def installation() -> tuple[str, list[str]]:
    """What the text is, and the documentation and library sources of the running Python."""
    library = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(library).as_posix() for path in library.rglob("*.py"))
    paths = [library / name for name in names if not any(map(_LEFT_OUT.fullmatch, name.split("/")))]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    if not texts:
        raise UserError("this Python comes without its library's sources: give files with --text")
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions package it apart
        topics = {}
    texts[:0] = [topics[name] for name in sorted(topics)]
    what = f"the documentation and library sources of Python {platform.python_version()}"
    return f"{what}, {len(topics)} topics and {len(paths)} files", texts


def read_files(paths: Sequence[str]) -> tuple[str, list[str]]:
    """What the text is, and the user's files, which must hold UTF-8 text."""
    texts = []
    for path in paths:
        try:
            text = Path(path).read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}: not UTF-8 text (byte 0x{error.object[error.start]:02x} at offset "
                f"{error.start:,})"
            ) from None
        if not text.strip():
            raise UserError(f"{path}: no text in this file")
        texts.append(text)
    names = ", ".join(Path(path).name for path in paths[:3])
    more = f" and {len(paths) - 3} more" if paths[3:] else ""
    return f"{names}{more}", texts


def split_words(text: str) -> list[str]:
    """The tokens of a text, in order.

    >>> split_words('if x_1 == "a":  # 42!!')
    ['if', 'x_1', '==', '"', 'a', '"', ':', '#', '42', '!!']
    """
    return [match.group() for match in _TOKEN.finditer(text)]


# --- a text as numbers ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """Tokens as numbers, in blocks."""

    description: str  # what the text is, for people
    words: tuple[str, ...]  # most frequent first after `UNKNOWN`, which has the number 0
    training: np.ndarray  # int32 [blocks, tokens]
    held_out: np.ndarray  # int32 [blocks, tokens], nowhere among the training blocks

    @property
    def boundary(self) -> int:
        """The number that stands for what is before a block."""
        return len(self.words)

    def __str__(self) -> str:
        trained, held_out = self.training.size, self.held_out.size
        sizes = f"{trained:,} tokens to train on, {held_out:,} held out, {len(self.words):,} words"
        return f"text: {self.description}\n      {sizes}"

    def digest(self) -> str:
        """The same for two texts if and only if a model sees the same in both."""
        digest = hashlib.sha256("\n".join(self.words).encode())
        for part in (self.training, self.held_out):
            digest.update(repr(part.shape).encode() + part.astype("<i4").tobytes())
        return digest.hexdigest()


def read(files: Sequence[str], most_words: int) -> Text:
    """The text of some files, or of this Python's installation."""
    return make_text(*(read_files(files) if files else installation()), most_words)


def make_text(description: str, texts: Sequence[str], most_words: int) -> Text:
    """Numbers the words of texts: the most frequent that occur at least twice in training.

    Held out is one block in 16, of a long text fewer: about 65,536 tokens.
    """
    tokens = [word for text in texts for word in split_words(text)]
    if len(tokens) < _FEWEST:
        raise UserError(
            f"the text is too small: {len(tokens):,} tokens, at least {_FEWEST:,} are needed"
        )
    size = min(_BLOCK, len(tokens) // 32)
    blocks = [tokens[i : i + size] for i in range(0, len(tokens) - size + 1, size)]
    every = max(16, round(len(tokens) / _HELD_OUT))
    held_out = blocks[every // 2 :: every]
    del blocks[every // 2 :: every]

    counts = Counter(word for block in blocks for word in block)
    known = sorted((-count, word) for word, count in counts.items() if count > 1)
    words = (UNKNOWN, *(word for _, word in known[: most_words - 1]))
    number = {word: i for i, word in enumerate(words)}

    def numbered(part: list[list[str]]) -> np.ndarray:
        return np.array([[number.get(word, 0) for word in block] for block in part], np.int32)

    return Text(description, words, numbered(blocks), numbered(held_out))


# --- batches --------------------------------------------------------------------------------------


class Windows:
    """The windows of blocks, one for each token: it, and as many before it as the width says.

    None reaches into another block; the boundary's number stands for what is before a block.
    """

    def __init__(self, blocks: np.ndarray, width: int, boundary: int):
        padded = np.pad(blocks.astype(np.int32), ((0, 0), (width, 0)), constant_values=boundary)
        self.windows = np.lib.stride_tricks.sliding_window_view(padded, width + 1, axis=1)
        self.starts = np.arange(blocks.size, dtype=np.int32)  # the number of each window

    def at(self, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of windows by number, the words before, int32[n, width], and those to predict."""
        tokens = self.windows[np.unravel_index(starts, self.windows.shape[:2])]
        return tokens[:, :-1], tokens[:, -1]


class Batches:
    """Batches of windows in an order that depends on nothing but the seed and the step.

    Every window comes once an epoch; a batch may lie across two.
    """

    def __init__(self, windows: Windows, size: int, seed: int):
        self.windows, self.size = windows, size

        @functools.lru_cache(maxsize=2)
        def order(epoch: int) -> np.ndarray:
            return np.random.default_rng((seed, epoch)).permutation(windows.starts)

        self.order = order

    def at(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """A step's batch, as of `Windows.at`."""
        windows = len(self.windows.starts)
        epoch, place = np.divmod(np.arange(self.size) + step * self.size, windows)
        starts = np.empty(self.size, np.int32)
        for e in np.unique(epoch).tolist():
            starts[epoch == e] = self.order(e)[place[epoch == e]]
        return self.windows.at(starts)


# --- models that count ----------------------------------------------------------------------------


def unigram(text: Text) -> np.ndarray:
    """The probability of each word by its frequency, half a count added to each."""
    counts = np.bincount(text.training.ravel(), minlength=len(text.words)) + 0.5
    return counts / counts.sum()


def _pairs(blocks: np.ndarray, boundary: int) -> tuple[np.ndarray, np.ndarray]:
    """Every token of blocks with the one before it."""
    before = np.pad(blocks[:, :-1], ((0, 0), (1, 0)), constant_values=boundary)
    return before.ravel().astype(np.int64), blocks.ravel().astype(np.int64)


class Bigram:
    """Interpolated Kneser-Ney: what followed a word, and how many words each word followed.

    The seen pairs give up `discount` of a count each; that share goes to all words in the
    proportion of the different words that they were seen after.
    """

    def __init__(self, blocks: np.ndarray, words: int):
        self.words = words
        before, word = _pairs(blocks, words)
        self.keys, self.counts = np.unique(before * words + word, return_counts=True)
        first, second = np.divmod(self.keys, words)
        self.total = np.bincount(first, self.counts, minlength=words + 1)
        self.followers = np.bincount(first, minlength=words + 1)
        preceders = np.bincount(second, minlength=words) + 0.5
        self.any_context = preceders / preceders.sum()
        once, twice = np.sum(self.counts == 1), np.sum(self.counts == 2)
        self.discount = once / max(once + 2 * twice, 1)

    def probability(self, before: np.ndarray, word: np.ndarray) -> np.ndarray:
        """Of each word after the one before it."""
        key = before * self.words + word
        at = np.minimum(np.searchsorted(self.keys, key), len(self.keys) - 1)
        count = np.where(self.keys[at] == key, self.counts[at], 0)
        spared = np.maximum(count - self.discount, 0.0)
        freed = self.discount * self.followers[before] * self.any_context[word]
        total = self.total[before]
        return np.where(total > 0, (spared + freed) / np.maximum(total, 1), self.any_context[word])


def counted_losses(text: Text) -> dict[str, float]:
    """The held-out losses of both models: mean of -log probability, in nats a token."""
    bigram = Bigram(text.training, len(text.words))
    of_pairs = bigram.probability(*_pairs(text.held_out, text.boundary))
    of_words = unigram(text)[text.held_out]
    return {
        "unigram": float(-np.log(of_words).mean()),
        "bigram": float(-np.log(of_pairs).mean()),
    }
