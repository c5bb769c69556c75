"""Real text as batches of word numbers, the held-out split, and two models that count words.

A text is cut into blocks of consecutive tokens, some of which, at equal distances, are held out.
The vocabulary, the counts and the training come from the other blocks alone.
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

# In tokens: a block, the shortest text, and the held-out part of a long text.
_BLOCK, _SHORTEST, _HELD_OUT = 1024, 2_000, 65_536

# Folders that are left out: installed packages, tests (many installations lack them), encodings
# (tables of numbers), and the documentation's topics, which are read as text, not as source.
_LEFT_OUT = re.compile(r"(site|dist)-packages|(idle_)?tests?|encodings|pydoc_data")


# --- reading --------------------------------------------------------------------------------------


def installation() -> tuple[str, list[str]]:
    """A description, and the documentation and library sources of the running Python."""
    library = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(library).as_posix() for path in library.rglob("*.py"))
    paths = [library / name for name in names if not any(map(_LEFT_OUT.fullmatch, name.split("/")))]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    if not texts:
        raise UserError("this Python comes without its library's sources: give files with --text")
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions package the topics separately
        topics = {}
    texts[:0] = [topics[name] for name in sorted(topics)]
    what = f"the documentation and library sources of Python {platform.python_version()}"
    return f"{what}, {len(topics)} topics and {len(paths)} files", texts


def read_files(paths: Sequence[str]) -> tuple[str, list[str]]:
    """A description, and the texts of the user's files, which must be UTF-8."""
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

    description: str  # for people
    words: tuple[str, ...]  # most frequent first after `UNKNOWN`, which has the number 0
    training: np.ndarray  # int32 [blocks, tokens]
    held_out: np.ndarray  # int32 [blocks, tokens], nowhere among the training blocks

    @property
    def boundary(self) -> int:
        """The number that pads the context of a block's first words."""
        return len(self.words)

    def __str__(self) -> str:
        trained, held_out = self.training.size, self.held_out.size
        sizes = f"{trained:,} tokens to train on, {held_out:,} held out, {len(self.words):,} words"
        return f"text: {self.description}\n      {sizes}"

    def digest(self) -> str:
        """A hash of the words and numbers, which are all that a model sees of a text."""
        digest = hashlib.sha256("\n".join(self.words).encode())
        for part in (self.training, self.held_out):
            digest.update(repr(part.shape).encode() + part.astype("<i4").tobytes())
        return digest.hexdigest()


def read(files: Sequence[str], most_words: int) -> Text:
    """The text of some files, or of this Python's installation."""
    return make_text(*(read_files(files) if files else installation()), most_words)


def make_text(description: str, texts: Sequence[str], most_words: int) -> Text:
    """A text whose words are the most frequent that occur at least twice in training.

    One block in 16 is held out; of a long text fewer, about 65,536 tokens.
    """
    tokens = [word for text in texts for word in split_words(text)]
    if len(tokens) < _SHORTEST:
        raise UserError(
            f"the text is too small: {len(tokens):,} tokens, at least {_SHORTEST:,} are needed"
        )
    size = min(_BLOCK, len(tokens) // 32)
    blocks = [tokens[i : i + size] for i in range(0, len(tokens) - size + 1, size)]
    interval = max(16, round(len(tokens) / _HELD_OUT))
    held_out = blocks[interval // 2 :: interval]
    del blocks[interval // 2 :: interval]

    counts = Counter(word for block in blocks for word in block)
    known = sorted((-count, word) for word, count in counts.items() if count > 1)
    words = (UNKNOWN, *(word for _, word in known[: most_words - 1]))
    number = {word: i for i, word in enumerate(words)}

    def numbered(part: list[list[str]]) -> np.ndarray:
        return np.array([[number.get(word, 0) for word in block] for block in part], np.int32)

    return Text(description, words, numbered(blocks), numbered(held_out))


# --- batches --------------------------------------------------------------------------------------


class Windows:
    """The windows of blocks, one for each token: the token, and the `width` tokens before it.

    No window reaches into another block: before a block there are boundary numbers.
    """

    def __init__(self, blocks: np.ndarray, width: int, boundary: int):
        padded = np.pad(blocks.astype(np.int32), ((0, 0), (width, 0)), constant_values=boundary)
        self.windows = np.lib.stride_tricks.sliding_window_view(padded, width + 1, axis=1)
        self.starts = np.arange(blocks.size, dtype=np.int32)  # the number of each window

    def at(self, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The contexts, int32[n, width], and the words to predict, of windows given by number."""
        tokens = self.windows[np.unravel_index(starts, self.windows.shape[:2])]
        return tokens[:, :-1], tokens[:, -1]


class Batches:
    """Batches of windows, in an order that depends only on the seed.

    Every window comes once in an epoch; a batch may extend over two epochs.
    """

    def __init__(self, windows: Windows, size: int, seed: int):
        self.windows, self.size = windows, size
        self.order = functools.lru_cache(maxsize=2)(
            lambda epoch: np.random.default_rng((seed, epoch)).permutation(windows.starts)
        )

    def at(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """A step's batch, as `Windows.at` returns it."""
        windows = len(self.windows.starts)
        epoch, place = np.divmod(np.arange(self.size) + step * self.size, windows)
        starts = np.empty(self.size, np.int32)
        for e in np.unique(epoch).tolist():
            starts[epoch == e] = self.order(e)[place[epoch == e]]
        return self.windows.at(starts)


# --- models that count ----------------------------------------------------------------------------


def unigram(text: Text) -> np.ndarray:
    """The probability of each word: its frequency, with half a count added."""
    counts = np.bincount(text.training.ravel(), minlength=len(text.words)) + 0.5
    return counts / counts.sum()


def _pairs(blocks: np.ndarray, boundary: int) -> tuple[np.ndarray, np.ndarray]:
    """For every token of blocks, the token before it and the token itself."""
    before = np.pad(blocks[:, :-1], ((0, 0), (1, 0)), constant_values=boundary)
    return before.ravel().astype(np.int64), blocks.ravel().astype(np.int64)


class Bigram:
    """Interpolated Kneser-Ney: counts of pairs, and of the different words that each word follows.

    The count of each seen pair is reduced by `discount`. The probability that this frees goes to
    all words, in proportion to the number of different words that each follows.
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
        """The probability of each word after the word before it."""
        key = before * self.words + word
        at = np.minimum(np.searchsorted(self.keys, key), len(self.keys) - 1)
        count = np.where(self.keys[at] == key, self.counts[at], 0)
        kept = np.maximum(count - self.discount, 0.0)
        freed = self.discount * self.followers[before] * self.any_context[word]
        total = self.total[before]
        return np.where(total > 0, (kept + freed) / np.maximum(total, 1), self.any_context[word])


def counted_losses(text: Text) -> dict[str, float]:
    """The held-out losses of both models: the mean of -log probability, in nats a token."""
    bigram = Bigram(text.training, len(text.words))
    probabilities = {
        "unigram": unigram(text)[text.held_out],
        "bigram": bigram.probability(*_pairs(text.held_out, text.boundary)),
    }
    return {name: float(-np.log(x).mean()) for name, x in probabilities.items()}
