"""The models of the suite and their sizes, which are smaller than in their papers."""

from benchmarks.quality.model import Model
from benchmarks.quality.rankers import DistMult, MatrixFactorisation, NeuMF, Sequence, TwoTowers
from benchmarks.quality.words import NextWord, SkipGram

MODELS: tuple[Model, ...] = (
    MatrixFactorisation(epochs=6, steps=1500, batch=64),
    NeuMF(epochs=4, steps=1500, batch=64, width=8),
    TwoTowers(epochs=6, steps=766, batch=128),
    Sequence(epochs=4, steps=766, batch=128),
    DistMult(epochs=4, steps=500, batch=256),
    SkipGram(epochs=3, steps=1000, batch=256, num_negatives=5),
    NextWord(epochs=3, steps=1000, batch=256, num_negatives=256),
)
