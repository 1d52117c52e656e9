"""Does a model know how a story goes? Its last sentence against those of other stories, its order against a shuffled one.

The choice of endings follows the Story Cloze test (Mostafazadeh et al., 2016), with three wrong endings for one right one,
taken from other held-out stories, so that no text has to be written for it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from blm_core.clean import words
from blm_core.evaluate import mean_interval, paired_difference, paired_interval, verdict
from blm_core.evidence.compare import ComparedModel

CHOICES = 4  # endings per story, one of them true
LENGTH_TOLERANCE = 0.25  # a wrong ending's bytes differ from the true one's by at most this share
MIN_WORDS = 4  # of an ending; "The end." tells nothing
# A full stop behind these ends no sentence.
TITLES = re.compile(r"(?:^|[\s\"'(])(?:Mr|Mrs|Ms|Dr|St)\.$")
# `"Stop!" Tom cried.` is one sentence: a few words and a verb of speech belong to the quotation before them.
SPEECH = re.compile(
    r"(?:[\w']+ ){1,3}(?:said|asked|answered|replied|cried|called|shouted|yelled|whispered|exclaimed|laughed|added|thought)\b"
)
STOP = re.compile(r"[.!?]+(?P<close>[\"')\u201d\u2019]*)(?P<gap>\s+|$)")


def sentences(text: str) -> list[str]:
    """The sentences of `text` with the white space behind them; joined, they are the text again.

    A sentence ends at `.`, `!` or `?`, with the quotation marks that close there, and at every newline. No sentence ends
    inside a quotation; one that is never closed ends with its paragraph.
    """
    found = []
    for paragraph in re.findall(r"[^\n]*\n\s*|[^\n]+$", text):
        start = 0
        for stop in STOP.finditer(paragraph):
            inside, after = paragraph[: stop.end("close")], paragraph[stop.end() :]
            if inside.count('"') % 2 or inside.count("\u201c") > inside.count("\u201d") or TITLES.search(inside):
                continue
            if stop["close"] and (after[:1].islower() or (not stop[0].startswith(".") and SPEECH.match(after))):
                continue
            found.append(paragraph[start : stop.end()])
            start = stop.end()
        if start < len(paragraph):
            found.append(paragraph[start:])
    return found


@dataclass(frozen=True)
class EndingItem:
    """A story without its last sentence, and four endings. Each ending begins with the story's own white space."""

    story: int  # index of the story
    beginning: str
    endings: tuple[str, ...]
    truth: int  # index of the true ending


def ending_items(stories: list[str], seed: int = 0, limit: int | None = None) -> tuple[list[EndingItem], dict[str, int]]:
    """One item per story that yields one, in the stories' order, and how many do not, by reason.

    Wrong endings are drawn at random among the last sentences of other stories whose bytes differ by at most a quarter. A
    closing "The end." is left off; endings have at least four words. `limit` items are made at most.
    """
    rng = np.random.default_rng(seed)
    parts = [_without_the_end(sentences(story.strip())) for story in stories]
    last = [part[-1].strip() if part else "" for part in parts]
    said = [" ".join(words(ending)) for ending in last]  # endings that differ in case or punctuation are the same
    usable = np.array([len(part) > 1 and len(key.split()) >= MIN_WORDS for part, key in zip(parts, said, strict=True)])
    sizes = np.array([len(ending.encode()) for ending in last])
    counts = {"no ending of four words": int((~usable).sum()), "no other endings of that length": 0}
    items: list[EndingItem] = []
    for i, part in enumerate(parts):
        if not usable[i] or len(items) == limit:
            continue
        near = np.flatnonzero(usable & (abs(sizes - sizes[i]) <= LENGTH_TOLERANCE * sizes[i]))
        wrong: dict[str, str] = {}
        for j in rng.permutation(near):
            if said[j] != said[i]:
                wrong.setdefault(said[j], last[j])
            if len(wrong) == CHOICES - 1:
                break
        if len(wrong) < CHOICES - 1:
            counts["no other endings of that length"] += 1
            continue
        beginning = "".join(part[:-1])
        text = beginning.rstrip()
        endings, truth = [*wrong.values()], int(rng.integers(CHOICES))
        endings.insert(truth, last[i])
        items.append(EndingItem(i, text, tuple(beginning[len(text) :] + ending for ending in endings), truth))
    return items, counts


def fitted(items: list[EndingItem], models: Sequence[ComparedModel]) -> tuple[list[EndingItem], int]:
    """The items with first sentences left off until every ending fits into the context of all `models`; and of how many.

    All models then read the same text. Raises ValueError where even the ending alone does not fit.
    """
    done, shortened = [], 0
    for item in items:
        rest = sentences(item.beginning)
        while not all(model.fits("".join(rest) + ending) for model in models for ending in item.endings):
            if not rest:
                raise ValueError(f"an ending of story {item.story} is longer than the context of a model.")
            rest = rest[1:]
        beginning = "".join(rest)
        shortened += beginning != item.beginning
        done.append(EndingItem(item.story, beginning, item.endings, item.truth))
    return done, shortened


def ending_scores(model: ComparedModel, items: list[EndingItem]) -> np.ndarray:
    """Log-probability of every ending in nats per byte of the ending (n, 4)."""
    prompts = [item.beginning for item in items for _ in item.endings]
    endings = [ending for item in items for ending in item.endings]
    nats = model.logprob(prompts, endings)
    return (nats / [len(ending.encode()) for ending in endings]).reshape(len(items), CHOICES)


def chosen_rightly(scores: ArrayLike, truth: ArrayLike) -> np.ndarray:
    """1 where the true ending is the likeliest (n,); where k endings are equally likely, 1 / k if it is one of them."""
    scores = np.asarray(scores, dtype=np.float64)
    best = scores == scores.max(1, keepdims=True)
    return best[np.arange(len(scores)), np.asarray(truth)] / best.sum(1)


def shuffled(stories: list[str], seed: int = 0) -> tuple[list[str], list[int]]:
    """Stories with their sentences in another order, and the indices of those of at least two different sentences.

    White space between the sentences stays where it is, so that both orders have the same bytes.
    """
    rng = np.random.default_rng(seed)
    texts, kept = [], []
    for i, story in enumerate(stories):
        parts = sentences(story.strip())
        bare = [part.rstrip() for part in parts]
        if len(set(bare)) < 2:
            continue
        gaps = [part[len(sentence) :] for part, sentence in zip(parts, bare, strict=True)]
        order = bare
        while order == bare:
            order = [bare[j] for j in rng.permutation(len(bare))]
        texts.append("".join(sentence + gap for sentence, gap in zip(order, gaps, strict=True)))
        kept.append(i)
    return texts, kept


def ending_line(
    stories: list[str], ours: ComparedModel, theirs: ComparedModel | None = None, limit: int | None = None, seed: int = 0
) -> dict:
    """Line 3, first half: how often each model finds the true ending likeliest per byte, with intervals over stories.

    `ours`, `theirs` and `difference` are intervals of accuracy, `above_chance` the verdict of ours against 25 %, `verdict`
    ours against theirs ("not run" without them). `items`, `left_out` by reason and `shortened` say what was counted.
    Raises ValueError where no story yields an item.
    """
    items, left_out = ending_items(stories, seed, limit)
    if not items:
        raise ValueError(f"none of {len(stories)} stories yields endings to choose from: {left_out}.")
    items, shortened = fitted(items, [model for model in (ours, theirs) if model])
    truth = [item.truth for item in items]
    right = [chosen_rightly(ending_scores(model, items), truth) for model in (ours, theirs) if model]
    line = {"items": len(items), "left_out": left_out, "shortened": shortened, "chance": 1 / CHOICES}
    return line | _choice(right, 1 / CHOICES)


def order_line(
    stories: list[str], ours: ComparedModel, theirs: ComparedModel | None = None, limit: int | None = None, seed: int = 0
) -> dict:
    """Line 3, second half: how often each model finds the true order of sentences likelier than a shuffled one.

    As `ending_line`, chance 50 %; `bits` holds, per model, the bits per byte that the true order saves. Raises ValueError
    where no story has two sentences.
    """
    texts, kept = shuffled(stories, seed)
    left_out = len(stories) - len(kept)
    texts, kept = texts[:limit], kept[:limit]
    if not kept:
        raise ValueError(f"none of {len(stories)} stories has two different sentences.")
    true = [stories[i].strip() for i in kept]
    sizes = [len(story.encode()) for story in true]
    right, saved = [], {}
    for name, model in (("ours", ours), ("theirs", theirs)):
        if model:
            bits = model.story_bits(true + texts)
            straight, mixed = bits[: len(true)], bits[len(true) :]
            right.append((straight < mixed) + 0.5 * (straight == mixed))
            saved[name] = paired_interval(mixed, straight, sizes)
    line = {"items": len(kept), "left_out": left_out, "chance": 0.5, "bits": saved}
    return line | _choice(right, 0.5)


def _without_the_end(parts: list[str]) -> list[str]:
    return parts[:-1] if parts and words(parts[-1]) == ["the", "end"] else parts


def _choice(right: list[np.ndarray], chance: float) -> dict:
    ours = mean_interval(right[0])
    line = {"ours": ours, "above_chance": verdict(ours.low - chance, ours.high - chance, better="higher")}
    if len(right) == 1:
        return line | {"theirs": None, "difference": None, "verdict": "not run"}
    difference = paired_difference(*right)
    return line | {
        "theirs": mean_interval(right[1]),
        "difference": difference,
        "verdict": verdict(difference.low, difference.high, better="higher"),
    }
