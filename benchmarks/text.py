"""Real text as numbers, split honestly, and the two models that count words.

A text is cut into blocks of consecutive tokens, of which every so many is held out. What is
learned, the vocabulary and the counts included, comes from the other blocks alone.
"""

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

__all__ = [
    "UNKNOWN",
    "Bigram",
    "Complaint",
    "Text",
    "installation",
    "make_text",
    "read_files",
    "split_words",
    "tuned_bigram",
    "unigram",
]

UNKNOWN = "<unk>"

# A word, identifier or number, or a run of one punctuation mark.
_TOKEN = re.compile(r"\w+|([^\w\s])\1*")

_BLOCK = 1024
_FEWEST = 2_000
_HELD_OUT = 65_536

# Other people's packages, tests (many installations lack them), tables of numbers, and the
# documentation's topics, which are read as text rather than as source.
_LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
    "__pycache__",
}


class Complaint(Exception):
    """What is wrong with what the user gave, in one line."""


# --- reading --------------------------------------------------------------------------------------


def installation() -> tuple[str, list[str]]:
    """What the text is, and the documentation and library sources of the running Python."""
    library = Path(sysconfig.get_path("stdlib"))
    paths = [p for p in library.rglob("*.py") if _LEFT_OUT.isdisjoint(p.relative_to(library).parts)]
    texts = [
        p.read_text(encoding="utf-8", errors="replace")
        for p in sorted(paths, key=lambda p: p.relative_to(library).as_posix())
    ]
    if not texts:
        raise Complaint("this Python comes without its library's sources: give files with --text")
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions package it apart
        topics = {}
    texts[:0] = [topics[name] for name in sorted(topics)]
    return (
        f"the documentation and library sources of Python {platform.python_version()}, "
        f"{len(topics)} topics and {len(paths)} files, {_size(texts)}",
        texts,
    )


def read_files(paths: Sequence[str]) -> tuple[str, list[str]]:
    """What the text is, and the user's files, which must hold UTF-8 text."""
    texts = []
    for path in paths:
        try:
            text = Path(path).read_bytes().decode("utf-8-sig")
        except OSError as error:
            raise Complaint(f"{path}: {error.strerror or error}") from None
        except UnicodeDecodeError as error:
            raise Complaint(
                f"{path}: not UTF-8 text (byte 0x{error.object[error.start]:02x} at offset "
                f"{error.start:,})"
            ) from None
        if not text.strip():
            raise Complaint(f"{path}: no text in this file")
        texts.append(text)
    names = ", ".join(Path(path).name for path in paths[:3])
    more = f" and {len(paths) - 3} more" if paths[3:] else ""
    return f"{names}{more}, {_size(texts)}", texts


def _size(texts: list[str]) -> str:
    size = sum(map(len, texts))
    return f"{size / 1e6:.1f} million characters" if size >= 1e6 else f"{size:,} characters"


def split_words(text: str) -> list[str]:
    """The tokens of a text, in order.

    >>> split_words('if x_1 == "a":  # 42!!')
    ['if', 'x_1', '==', '"', 'a', '"', ':', '#', '42', '!!']
    """
    return [match.group() for match in _TOKEN.finditer(text)]


# --- a text as numbers ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """Tokens as numbers, in blocks.

    Attributes:
      description: what the text is, for people.
      words: the vocabulary, most frequent first after `UNKNOWN`, which has the number 0.
      training: int32 [blocks, tokens].
      held_out: int32 [blocks, tokens], nowhere among the training blocks.
    """

    description: str
    words: tuple[str, ...]
    training: np.ndarray
    held_out: np.ndarray

    @property
    def boundary(self) -> int:
        """The number that stands for what is before a block."""
        return len(self.words)

    def digest(self) -> str:
        """The same for two texts if and only if a model sees the same in both."""
        digest = hashlib.sha256("\n".join(self.words).encode())
        for part in (self.training, self.held_out):
            digest.update(repr(part.shape).encode() + part.astype("<i4").tobytes())
        return digest.hexdigest()


def make_text(description: str, texts: Sequence[str], most_words: int) -> Text:
    """Numbers the words of texts: the most frequent that occur at least twice in training.

    Held out is one block in 16, of a long text fewer: about 65,536 tokens.
    """
    tokens = [word for text in texts for word in split_words(text)]
    if len(tokens) < _FEWEST:
        raise Complaint(
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


# --- models that count ----------------------------------------------------------------------------


def unigram(text: Text, blocks: np.ndarray | None = None) -> np.ndarray:
    """The probability of each word by its frequency, half a count added to each."""
    seen = text.training if blocks is None else blocks
    counts = np.bincount(seen.ravel(), minlength=len(text.words)) + 0.5
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

    def __init__(self, text: Text, blocks: np.ndarray, discount: float = 0.75):
        self.discount = discount
        self.words = words = len(text.words)
        before, word = _pairs(blocks, text.boundary)
        self.keys, self.counts = np.unique(before * words + word, return_counts=True)
        first, second = np.divmod(self.keys, words)
        self.total = np.bincount(first, self.counts, minlength=words + 1)
        self.followers = np.bincount(first, minlength=words + 1)
        preceders = np.bincount(second, minlength=words) + 0.5
        self.any_context = preceders / preceders.sum()

    def probability(self, before: np.ndarray, word: np.ndarray) -> np.ndarray:
        """Of each word after the one before it."""
        key = before * self.words + word
        at = np.minimum(np.searchsorted(self.keys, key), len(self.keys) - 1)
        count = np.where(self.keys[at] == key, self.counts[at], 0)
        spared = np.maximum(count - self.discount, 0.0)
        freed = self.discount * self.followers[before] * self.any_context[word]
        total = self.total[before]
        return np.where(total > 0, (spared + freed) / np.maximum(total, 1), self.any_context[word])

    def loss(self, blocks: np.ndarray) -> float:
        """Mean of -log probability over the tokens of blocks, in nats."""
        return float(-np.log(self.probability(*_pairs(blocks, self.words))).mean())


def tuned_bigram(text: Text) -> Bigram:
    """The bigram of the training blocks, its discount tuned on some that it did not count."""
    aside = np.arange(len(text.training)) % 16 == 5
    trial = Bigram(text, text.training[~aside])

    def loss(discount: float) -> float:
        trial.discount = discount
        return trial.loss(text.training[aside])

    return Bigram(text, text.training, min(np.arange(0.1, 1.0, 0.05).tolist(), key=loss))
