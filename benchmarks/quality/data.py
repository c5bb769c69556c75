"""The data: MovieLens-100k with its knowledge graph, and the text of `benchmarks.train`.

Nothing is downloaded, and the repository has none of these data. The files of MovieLens are read
from where pip put them; `recbole` itself is never imported.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.train import data as training
from benchmarks.train.options import UserError

FOLDER = "recbole/dataset_example/ml-100k"
MISSING = (
    "MovieLens-100k is not installed: pip install --no-deps recbole==1.2.1 (2 MB; only its data "
    "files are read)"
)
# The SHA-256 of each file in recbole 1.2.1.
HASHES = {
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.kg": "200a0636fa07c218119a42e5bac7aa3e26e3665a6f919c1b22909bd412b14779",
}

# The size of the text's vocabulary.
WORDS = 8_000


# --- reading --------------------------------------------------------------------------------------


def path(name: str) -> Path:
    """The path of a file of MovieLens.

    Raises:
      UserError: it is not installed.
    """
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("recbole") or ():
            if file.as_posix() == f"{FOLDER}/{name}":
                return Path(str(file.locate()))
    raise UserError(MISSING)


def lines(name: str) -> list[list[str]]:
    """The fields of each line but the first, which has their names.

    Raises:
      UserError: the file is not installed, or is not that of recbole 1.2.1.
    """
    content = path(name).read_bytes()
    if (digest := hashlib.sha256(content).hexdigest()) != HASHES[name]:
        raise UserError(
            f"{name}: not the file of recbole 1.2.1 (SHA-256 {digest}, expected {HASHES[name]}): "
            "pip install --no-deps recbole==1.2.1"
        )
    return [line.split("\t") for line in content.decode().splitlines()[1:]]


def numbered(names: list[str]) -> tuple[np.ndarray, int]:
    """The int32 number of each name, in sorted order, and how many different names there are."""
    distinct, numbers = np.unique(np.array(names), return_inverse=True)
    return numbers.astype(np.int32).ravel(), len(distinct)


# --- ratings --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ratings:
    """The ratings of items by users, split for each user by time.

    The last rating of each user is for the test, the one before it for validation, and all others
    are for training. Other users' training ratings may be later than a user's test rating. A user's
    ratings in the same second are in the order of the item's number.
    """

    users: int  # the number of users
    items: int
    training: np.ndarray  # int32[n, 2], user and item, by user and then by time
    times: np.ndarray  # int64[n], of the training ratings, in seconds
    validation: np.ndarray  # int32[users, 2], user and item, as is the test
    test: np.ndarray
    held_out_times: np.ndarray  # int64[users, 2], of validation and test
    negatives: np.ndarray  # int32[users, 99], items that the user never rated

    @functools.cached_property
    def rated(self) -> np.ndarray:
        """bool[users, items], whether the user rated the item in training."""
        rated = np.zeros((self.users, self.items), bool)
        rated[self.training[:, 0], self.training[:, 1]] = True
        return rated

    @functools.cached_property
    def item_counts(self) -> np.ndarray:
        """int[items], how often each item was rated in training."""
        return np.bincount(self.training[:, 1], minlength=self.items)

    def unrated(self, rng: np.random.Generator, users: np.ndarray, count: int) -> np.ndarray:
        """int32[*users.shape, count], random items that these users did not rate in training.

        A user may rate such an item later, which is not known in training.
        """
        users = np.broadcast_to(users[..., None], (*users.shape, count))
        items = rng.integers(self.items, size=users.shape, dtype=np.int32)
        while (wrong := self.rated[users, items]).any():
            items[wrong] = rng.integers(self.items, size=int(wrong.sum()), dtype=np.int32)
        return items

    def before(self, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The items that a user rated before, oldest first, padded in front with `self.items`.

        Returns:
          int32[n, width] before each training rating, and int32[users, width] before each rating of
          the validation and of the test.
        """
        windows, validation, test = [], [], []
        for user in range(self.users):
            own = self.training[self.training[:, 0] == user, 1]
            ids = np.concatenate([own, self.validation[user, 1:]])
            padded = np.concatenate([np.full(width, self.items, np.int32), ids])
            all_windows = np.lib.stride_tricks.sliding_window_view(padded, width)
            windows.append(all_windows[: len(own)])
            validation.append(all_windows[len(own)])
            test.append(all_windows[len(own) + 1])
        return np.concatenate(windows), np.array(validation), np.array(test)


@functools.cache
def ratings() -> Ratings:
    """MovieLens-100k: 943 users, 1,682 items, 100,000 ratings."""
    fields = lines("ml-100k.inter")
    users, items = (numbered([line[i] for line in fields])[0] for i in (0, 1))
    return split_ratings(users, items, np.array([int(line[3]) for line in fields]))


def split_ratings(users: np.ndarray, items: np.ndarray, times: np.ndarray) -> Ratings:
    """Splits ratings; each user needs three, and no user rates an item twice."""
    num_users, num_items = int(users.max()) + 1, int(items.max()) + 1
    order = np.lexsort((items, times, users))
    pairs = np.stack([users[order], items[order]], 1).astype(np.int32)
    times = times[order].astype(np.int64)
    last = np.searchsorted(pairs[:, 0], np.arange(num_users), side="right") - 1
    is_trained = np.ones(len(pairs), bool)
    is_trained[last] = is_trained[last - 1] = False
    is_rated = np.zeros((num_users, num_items), bool)
    is_rated[pairs[:, 0], pairs[:, 1]] = True
    rng = np.random.default_rng(0)
    unrated = [rng.permutation(np.flatnonzero(~of_user))[:99] for of_user in is_rated]
    negatives = np.array(unrated, np.int32)
    return Ratings(
        *(num_users, num_items, pairs[is_trained], times[is_trained]),
        *(pairs[last - 1], pairs[last], np.stack([times[last - 1], times[last]], 1), negatives),
    )


# --- a knowledge graph ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Graph:
    """Facts about the films of MovieLens: (head, relation, tail).

    The graph has many facts twice, as "film, directed by, person" and "person, directed, film". So
    all facts about a pair of entities are in one part of the split. All entities of the validation
    and the test are in training.
    """

    entities: int  # the number of entities
    relations: int
    training: np.ndarray  # int32[n, 3], as are validation and test
    validation: np.ndarray
    test: np.ndarray

    @functools.cached_property
    def entity_counts(self) -> np.ndarray:
        """int[entities], how often each is in the facts of training."""
        return np.bincount(self.training[:, [0, 2]].ravel(), minlength=self.entities)


@functools.cache
def graph() -> Graph:
    """The graph of RecBole: 91,631 facts about 34,628 entities of Freebase."""
    fields = lines("ml-100k.kg")
    ends, entities = numbered([line[i] for i in (0, 2) for line in fields])
    relation, relations = numbered([line[1] for line in fields])
    head, tail = ends.reshape(2, -1)
    return split_facts(np.stack([head, relation, tail], 1), entities, relations)


def split_facts(facts: np.ndarray, entities: int, relations: int) -> Graph:
    """Splits facts by pairs of entities at random: 5% for validation and 5% for the test."""
    pairs = np.sort(facts[:, [0, 2]].astype(np.int64), axis=1) @ np.array([entities, 1])
    _, pair = np.unique(pairs, return_inverse=True)
    draw = np.random.default_rng(0).integers(20, size=int(pair.max()) + 1)[pair.ravel()]
    training = facts[draw >= 2]
    known = np.zeros(entities, bool)
    known[training[:, [0, 2]]] = True
    is_known = known[facts[:, 0]] & known[facts[:, 2]]
    return Graph(
        *(entities, relations, training),
        *(facts[(draw == x) & is_known] for x in (0, 1)),
    )


# --- text -----------------------------------------------------------------------------------------


@functools.cache
def text() -> training.Text:
    """The text of `benchmarks.train`: documentation and library sources of the running Python."""
    return training.read([], WORDS)


@functools.cache
def held_out() -> tuple[np.ndarray, np.ndarray]:
    """The held-out blocks of the text for validation, and for the test."""
    blocks = text().held_out
    return blocks[0::2], blocks[1::2]


# --- about ----------------------------------------------------------------------------------------


def about() -> dict[str, dict[str, str | int]]:
    """Versions, hashes and counts of all data, for the results."""
    r, g, words = ratings(), graph(), text()
    recbole = f"recbole {importlib.metadata.version('recbole')}"

    def parts(of: Ratings | Graph) -> dict[str, int]:
        return {part: len(getattr(of, part)) for part in ("training", "validation", "test")}

    return {
        "ratings": {
            "from": f"{recbole}, ml-100k.inter",
            "sha256": HASHES["ml-100k.inter"],
            "users": r.users,
            "items": r.items,
            "ratings": sum(parts(r).values()),
            **parts(r),
        },
        "knowledge graph": {
            "from": f"{recbole}, ml-100k.kg",
            "sha256": HASHES["ml-100k.kg"],
            "entities": g.entities,
            "relations": g.relations,
            **parts(g),
        },
        "text": {
            "from": words.description,
            "sha256": words.digest(),
            "words": len(words.words),
            "training": words.training.size,
            "validation": held_out()[0].size,
            "test": held_out()[1].size,
        },
    }
