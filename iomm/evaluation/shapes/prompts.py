"""Prompts of the shapes world: GenEval's six categories, and what no pair shows.

    category       example                                 what has to be there
    single_object  a photo of a star                       the shape
    two_object     a photo of a star and a circle          both shapes
    counting       a photo of three stars                  exactly as many, and nothing unclear
    colors         a photo of a red star                   a shape of the colour
    position       a photo of a star above a circle        both, the first there from the second
    color_attr     a photo of a red star and a blue cross  both, each of its colour

Two sets of combinations are held out, so that a score can tell composition from memory: kinds, which are
(shape, colour), and relations, which are (shape, relation, shape). Every shape, colour and relation occurs in
pairs, but in other combinations. A relation and its mirror image (a star left of a circle; a circle right of
a star) are one.
"""

import functools
import itertools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from iomm.evaluation.shapes.relations import OPPOSITE, RELATIONS, Relation
from iomm.evaluation.shapes.scene import COLOURS, SHAPES

Category = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]
Split = Literal["seen", "heldout_kind", "heldout_relation"]
CATEGORIES: tuple[Category, ...] = (
    "single_object",
    "two_object",
    "counting",
    "colors",
    "position",
    "color_attr",
)
# The categories whose prompts can name what is held out.
SPLITS: dict[Split, tuple[Category, ...]] = {
    "seen": CATEGORIES,
    "heldout_kind": ("colors", "color_attr"),
    "heldout_relation": ("position",),
}
NUMBERS = {2: "two", 3: "three", 4: "four"}
HELDOUT_KINDS = frozenset((SHAPES[i % len(SHAPES)], colour) for i, colour in enumerate(COLOURS))
_HELDOUT_RELATIONS = frozenset(
    (SHAPES[i], relation, SHAPES[(i + step) % len(SHAPES)])
    for i in range(len(SHAPES))
    for step, relation in ((1, "left of"), (2, "above"))
)
FRAMES = (
    "a photo of {}",
    "{}",
    "a picture of {}",
    "an image of {}",
    "a drawing of {}",
    "an image showing {}",
    "{} on a plain background",
    "a simple picture of {}",
)
_RELATION_WORDS: dict[Relation, tuple[str, ...]] = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above",),
    "below": ("below", "under"),
}


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Things of one kind that a prompt asks for; colour None: any."""

    shape: str
    colour: str | None = None
    count: int = 1


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What has to be true of a picture. `relation` is that of the first wanted thing to the second."""

    category: Category
    wanted: tuple[Wanted, ...]
    relation: Relation | None = None


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A text and what has to be true of its picture."""

    text: str
    facts: Facts
    split: Split = "seen"

    def metadata(self) -> dict[str, Any]:
        """The prompt as a line of GenEval's `evaluation_metadata.jsonl`, with the split."""
        target, *others = reversed(self.facts.wanted)  # what a relation points to stands first
        include = [_include(target), *map(_include, others)]
        if self.facts.relation is not None:
            include[1]["position"] = [self.facts.relation, 0]
        line: dict[str, Any] = {"tag": self.facts.category, "include": include}
        if self.facts.category == "counting":
            line["exclude"] = [{"class": target.shape, "count": target.count + 1}]
        return {**line, "prompt": self.text, "split": self.split}


def _include(wanted: Wanted) -> dict[str, Any]:
    colour = {} if wanted.colour is None else {"color": wanted.colour}
    return {"class": wanted.shape, "count": wanted.count, **colour}


def is_heldout_relation(first: str, relation: Relation, second: str) -> bool:
    """Whether no pair shows `first` there from `second`."""
    if relation in ("right of", "below"):
        first, relation, second = second, OPPOSITE[relation], first
    return (first, relation, second) in _HELDOUT_RELATIONS


def article(words: str) -> str:
    """`a red circle`, `an orange star`."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural(words: str) -> str:
    """`red circles`, `crosses`."""
    return f"{words}{'es' if words.endswith('s') else 's'}"


def noun(wanted: Wanted) -> str:
    """`a red circle`, `three crosses`."""
    words = wanted.shape if wanted.colour is None else f"{wanted.colour} {wanted.shape}"
    return article(words) if wanted.count == 1 else f"{NUMBERS[wanted.count]} {plural(words)}"


def texts(facts: Facts) -> list[str]:
    """All wordings of the facts."""
    nouns = [noun(wanted) for wanted in facts.wanted]
    links = ("and",) if facts.relation is None else _RELATION_WORDS[facts.relation]
    return [frame.format(f" {link} ".join(nouns)) for frame in FRAMES for link in links]


@functools.cache
def all_facts(category: Category, split: Split = "seen") -> tuple[Facts, ...]:
    """Everything that prompts of a category and split can ask for.

    Raises:
        ValueError: prompts of the category cannot name what the split holds out.
    """
    if category not in SPLITS[split]:
        raise ValueError(
            f"prompts of {category} name nothing that {split} holds out. Its categories are "
            f"{', '.join(SPLITS[split])}."
        )
    return tuple(facts for facts in _every(category) if _split_of(facts) == split)


def _every(category: Category) -> list[Facts]:
    kinds = list(itertools.product(SHAPES, COLOURS))
    two = list(itertools.permutations(SHAPES, 2))
    found: list[tuple[tuple[Wanted, ...], Relation | None]]
    match category:
        case "single_object":
            found = [((Wanted(shape=shape),), None) for shape in SHAPES]
        case "two_object":
            found = [((Wanted(shape=a), Wanted(shape=b)), None) for a, b in two]
        case "counting":
            found = [((Wanted(shape=shape, count=n),), None) for shape in SHAPES for n in NUMBERS]
        case "colors":
            found = [((Wanted(shape=shape, colour=colour),), None) for shape, colour in kinds]
        case "position":
            found = [((Wanted(shape=a), Wanted(shape=b)), r) for a, b in two for r in RELATIONS]
        case "color_attr":
            found = [
                ((Wanted(shape=a, colour=c), Wanted(shape=b, colour=d)), None)
                for (a, c), (b, d) in itertools.permutations(kinds, 2)
                if a != b and c != d
            ]
    return [Facts(category=category, wanted=wanted, relation=relation) for wanted, relation in found]


def _split_of(facts: Facts) -> Split:
    if any((wanted.shape, wanted.colour) in HELDOUT_KINDS for wanted in facts.wanted):
        return "heldout_kind"
    if facts.relation is not None:
        first, second = facts.wanted
        if is_heldout_relation(first.shape, facts.relation, second.shape):
            return "heldout_relation"
    return "seen"


def benchmark(per_category: int = 40, *, seed: int = 0) -> list[Prompt]:
    """The benchmark's prompts, all different: `per_category` in each category of each split.

    What is asked for is dealt as evenly as its number allows; (seed, category, split) settles the order and
    the wordings.

    Raises:
        ValueError: some category has fewer different prompts.
    """
    prompts: list[Prompt] = []
    for s, (split, categories) in enumerate(SPLITS.items()):
        for category in categories:
            stream = (s << 8) + CATEGORIES.index(category)
            rng = np.random.Generator(np.random.Philox(key=[seed, stream]))
            prompts += _deal(category, split, per_category, rng)
    return prompts


def _deal(category: Category, split: Split, number: int, rng: np.random.Generator) -> list[Prompt]:
    facts = all_facts(category, split)
    most = sum(len(texts(one)) for one in facts)
    if not 1 <= number <= most:
        raise ValueError(
            f"{number} prompts of {category} ({split}) were asked for; there are {most} different ones. Ask "
            "for at least 1 and at most as many."
        )
    stacks = [(one, rng.permutation(texts(one)).tolist()) for one in facts]
    order = rng.permutation(len(stacks)).tolist()
    prompts: list[Prompt] = []
    while len(prompts) < number:
        for k in order:
            one, left = stacks[k]
            if left and len(prompts) < number:
                prompts.append(Prompt(text=left.pop(), facts=one, split=split))
    return prompts
