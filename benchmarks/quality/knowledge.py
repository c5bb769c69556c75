"""A model of a knowledge graph."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.quality import data
from benchmarks.quality.model import (
    PARTS,
    Batches,
    Params,
    Ranker,
    choice_loss,
    drawn_rows,
    normal,
)


class DistMult(Ranker):
    """The product of head, relation and tail, summed; the right tail or head among drawn ones.

    Yang et al., arXiv:1412.6575.
    """

    name = "DistMult"
    data = "knowledge graph"
    tables = ("entity",)
    metrics = ("MRR", "HR@10")

    def init(self, key: jax.Array) -> Params:
        entity, relation = jax.random.split(key)
        graph = data.graph()
        return {
            "entity": normal(entity, 0.3, graph.entities, self.width),
            "relation": normal(relation, 0.3, graph.relations, self.width),
        }

    def batches(self, seed: int) -> Batches:
        """Entities that are given, relations, and entities to choose from, the right one first."""
        graph, rng = data.graph(), np.random.default_rng(seed)
        facts = graph.training[drawn_rows(rng, len(graph.training), self.size)]
        is_tail = rng.random(self.size) < 0.5
        given, asked = (np.where(is_tail, facts[..., i], facts[..., 2 - i]) for i in (0, 2))
        others = rng.integers(graph.entities, size=(*self.size, self.drawn), dtype=np.int32)
        return given, facts[..., 1], np.concatenate([asked[..., None], others], -1)

    def examples(self, part: str) -> tuple[np.ndarray, ...]:
        graph = data.graph()
        facts = getattr(graph, part)
        known = np.flatnonzero(graph.entity_counts).astype(np.int32)
        rng = np.random.default_rng(PARTS.index(part))
        others = rng.choice(known, (len(facts), 99))
        # A fact with a drawn entity may be true; such an entity is drawn again.
        every = np.concatenate([graph.training, graph.validation, graph.test]).astype(np.int64)
        shape = (graph.entities, graph.relations, graph.entities)
        right = np.ravel_multi_index(tuple(every.T), shape)

        def among_right() -> np.ndarray:
            asked = np.broadcast_arrays(facts[:, :1], facts[:, 1:2], others)
            return np.isin(np.ravel_multi_index(tuple(asked), shape), right)

        while (is_right := among_right()).any():
            others[is_right] = rng.choice(known, int(is_right.sum()))
        return facts[:, 0], facts[:, 1], np.concatenate([facts[:, 2:], others], 1)

    def reads(self, part: str) -> np.ndarray:
        graph = data.graph()
        return graph.entity_counts[getattr(graph, part)[:, [0, 2]]].min(1)

    def score(self, params: Params, given: Any, relations: Any, asked: Any) -> jax.Array:
        one = params["entity"][given] * params["relation"][relations]
        return jnp.einsum("nd,nkd->nk", one, params["entity"][asked])

    def loss(self, params: Params, batch: Any) -> jax.Array:
        return choice_loss(self.score(params, *batch))
