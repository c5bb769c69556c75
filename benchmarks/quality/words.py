"""Models of words: skip-gram, and the next word from the words before it."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.quality import data
from benchmarks.quality.model import (
    SPLITS,
    Batches,
    Model,
    Params,
    apply,
    choice_loss,
    click_loss,
    layer,
    normal,
)


@functools.cache
def word_counts() -> np.ndarray:
    """How often each word is in the training text."""
    text = data.text()
    return np.bincount(text.training.ravel(), minlength=len(text.words))


def drawn_words(rng: np.random.Generator, power: float, size: tuple[int, ...]) -> np.ndarray:
    """int32 words, drawn in proportion to a power of their counts."""
    total = np.cumsum(word_counts().astype(np.float64) ** power)
    return np.searchsorted(total, rng.random(size) * total[-1], side="right").astype(np.int32)


class SkipGram(Model):
    """Distinguishes the words around a word from drawn words.

    Mikolov et al., arXiv:1310.4546: frequent words are left out at random, and wrong answers are
    drawn in proportion to the counts to the power of 3/4. The metric `neighbours`, for some of the
    frequent words: of a word's ten nearest by the rows' cosine, the share that is among its fifty
    nearest by counts (positive pointwise mutual information with the words around them).
    """

    name = "skip-gram"
    data = "text"
    tables = ("word", "around")
    metrics = ("loss", "neighbours")
    window = 3
    subsampling = 1e-3
    pairs = 8192
    frequent, probed = 2000, 250

    def init(self, key: jax.Array) -> Params:
        words = len(data.text().words)
        first = jax.random.uniform(key, (words, self.width), minval=-0.5, maxval=0.5)
        return {"word": first / self.width, "around": jnp.zeros((words, self.width))}

    def drawn_pairs(
        self, rng: np.random.Generator, blocks: np.ndarray, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """`count` words, and a word near each; none is unknown."""
        share = word_counts() / word_counts().sum()
        probability = np.sqrt(self.subsampling / share.clip(1e-12)).clip(0, 1)
        probability[0] = 0
        flat = blocks.ravel()
        words, around = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
        while sum(map(len, words)) < count:
            at = np.flatnonzero(rng.random(len(flat)) < probability[flat])
            offset = rng.integers(1, self.window + 1, len(at)) * rng.choice([-1, 1], len(at))
            place = at % blocks.shape[1] + offset
            inside = (place >= 0) & (place < blocks.shape[1])
            at, near = at[inside], (at + offset)[inside]
            is_drawn = rng.random(len(at)) < probability[flat[near]]
            order = rng.permutation(np.flatnonzero(is_drawn))
            words.append(flat[at[order]])
            around.append(flat[near[order]])
        return np.concatenate(words)[:count], np.concatenate(around)[:count]

    def batches(self, seed: int) -> Batches:
        """Words, and candidates for a word near each, the right one first."""
        rng = np.random.default_rng(seed)
        pairs = self.drawn_pairs(rng, data.text().training, math.prod(self.batches_shape))
        words, around = (x.reshape(self.batches_shape) for x in pairs)
        others = drawn_words(rng, 0.75, (*self.batches_shape, self.num_negatives))
        return words, np.concatenate([around[..., None], others], -1)

    def examples(self, split: str) -> tuple[np.ndarray, ...]:
        rng = np.random.default_rng(SPLITS.index(split))
        words, around = self.drawn_pairs(rng, data.held_out()[SPLITS.index(split)], self.pairs)
        others = drawn_words(rng, 0.75, (self.pairs, self.num_negatives))
        return words, np.concatenate([around[:, None], others], 1)

    def reads(self, split: str) -> np.ndarray:
        return word_counts()[self.held_out[split][0]]

    def score(self, params: Params, words: Any, around: Any) -> jax.Array:
        return jnp.einsum("nd,nkd->nk", params["word"][words], params["around"][around])

    def loss(self, params: Params, batch: Any) -> jax.Array:
        return click_loss(self.score(params, *batch))

    def evaluate(self, params: Params, *examples: Any) -> dict[str, jax.Array]:
        scores = self.score(params, *examples)
        right, wrong = jax.nn.softplus(-scores[:, 0]), jax.nn.softplus(scores[:, 1:])
        rows = params["word"][1 : self.frequent + 1]
        rows = rows / jnp.sqrt(jnp.sum(rows * rows, 1, keepdims=True) + 1e-30)
        probes, near = self.counted_neighbours
        cosines = (rows[probes] @ rows.T).at[jnp.arange(len(probes)), probes].set(-jnp.inf)
        _, nearest = jax.lax.top_k(cosines, 10)
        shares = jnp.take_along_axis(jnp.asarray(near), nearest, 1).mean(1)
        # A row that is not finite has no neighbours.
        shares = jnp.where(jnp.isfinite(cosines.max(1)), shares, jnp.nan)
        return {"loss": right + wrong.sum(1), "neighbours": shares}

    @functools.cached_property
    def counted_neighbours(self) -> tuple[np.ndarray, np.ndarray]:
        """The probed words, and for each, which frequent words are near; index i is word i + 1."""
        words, counts = self.frequent, np.zeros((self.frequent + 1,) * 2)
        blocks = np.where(data.text().training <= words, data.text().training, 0)
        for offset in range(1, self.window + 1):
            pairs = blocks[:, :-offset].ravel().astype(np.int64) * (words + 1)
            pairs += blocks[:, offset:].ravel()
            counts += np.bincount(pairs, minlength=counts.size).reshape(counts.shape)
        counts = (counts + counts.T)[1:, 1:]
        total = counts.sum(1).clip(1)
        ratio = counts * counts.sum() / (total[:, None] * total)
        information = np.log(ratio.clip(1.0))
        unit = information / np.linalg.norm(information, axis=1, keepdims=True).clip(1e-12)
        probes = np.linspace(50, words - 1, min(self.probed, words - 50)).astype(np.int32)
        cosines = unit[probes] @ unit.T
        cosines[np.arange(len(probes)), probes] = -1
        near = np.zeros(cosines.shape, np.float32)
        fifty = np.argpartition(-cosines, 50, axis=1)[:, :50]
        np.put_along_axis(near, fifty, 1.0, axis=1)
        return probes, near


class NextWord(Model):
    """The next word from the four before it: one hidden layer, a softmax over all words.

    After Bengio et al. (2003). Training compares the right word with words that are drawn by their
    counts, the same ones for a whole batch. The metric is the loss of the full softmax.
    """

    name = "next word"
    data = "text"
    tables = ("word", "output")
    metrics = ("loss",)
    window, hidden, windows = 4, 32, 1024

    def init(self, key: jax.Array) -> Params:
        word, first, second = jax.random.split(key, 3)
        counts = word_counts() + 0.5
        kernel = np.zeros((len(counts), self.width + 1))
        kernel[:, -1] = np.log(counts / counts.sum())
        return {
            # The last row is that of the padding before a block.
            "word": normal(word, 0.1, len(counts) + 1, self.width),
            "hidden": layer(first, self.window * self.width, self.hidden),
            "projection": layer(second, self.hidden, self.width),
            # The last column is the bias.
            "output": jnp.asarray(kernel),
        }

    def drawn_windows(
        self, rng: np.random.Generator, blocks: np.ndarray, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        windows = data.training.Windows(blocks, self.window, data.text().boundary)
        return windows.at(windows.starts[rng.permutation(len(windows.starts))[:count]])

    def batches(self, seed: int) -> Batches:
        """The words before, the next word, and the drawn words."""
        rng = np.random.default_rng(seed)
        before, word = self.drawn_windows(rng, data.text().training, math.prod(self.batches_shape))
        drawn = drawn_words(rng, 1.0, (self.epochs, self.steps, self.num_negatives))
        before = before.reshape(*self.batches_shape, self.window)
        return before, word.reshape(self.batches_shape), drawn

    def features(self, params: Params, before: Any) -> jax.Array:
        x = params["word"][before].reshape(len(before), -1)
        x = apply(params["projection"], jax.nn.gelu(apply(params["hidden"], x)))
        return jnp.concatenate([x, jnp.ones((len(x), 1))], 1)

    def loss(self, params: Params, batch: Any) -> jax.Array:
        before, word, drawn = batch
        x = self.features(params, before)
        counts = word_counts()
        expected = jnp.asarray(np.log(self.num_negatives * counts.clip(1) / counts.sum()), x.dtype)
        right = jnp.sum(x * params["output"][word], 1) - expected[word]
        others = x @ params["output"][drawn].T - expected[drawn]
        others = jnp.where(drawn == word[:, None], -jnp.inf, others)
        scores = jnp.concatenate([right[:, None], others], 1)
        return choice_loss(scores)

    def examples(self, split: str) -> tuple[np.ndarray, ...]:
        rng = np.random.default_rng(SPLITS.index(split))
        return self.drawn_windows(rng, data.held_out()[SPLITS.index(split)], self.windows)

    def reads(self, split: str) -> np.ndarray:
        return word_counts()[self.held_out[split][1]]

    def evaluate(self, params: Params, *examples: Any) -> dict[str, jax.Array]:
        before, word = examples
        logits = self.features(params, before) @ params["output"].T
        right = jnp.take_along_axis(logits, word[:, None], 1)[:, 0]
        return {"loss": jax.nn.logsumexp(logits, axis=1) - right}
