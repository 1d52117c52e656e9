"""Blind sheets: two models' completions of one beginning, to be marked by somebody who does not know whose they are.

- Pairs are brought to one form, so that nothing but the writing tells them apart, and shown in both orders.
- The key, which text is whose, lies in a file of its own.
- Marks come back from a person or a language model and become `ratings.Rating`; `judge` asks an endpoint item by item.
"""

import hashlib
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from blm_core.clean import CLOSED, normalise
from blm_core.config import ConfigError
from blm_core.evidence.compare import recorded
from blm_core.evidence.ratings import AGES, CRITERIA, Rating, RatingsError, check_marks, read_ratings, write_ratings
from blm_core.evidence.text import sentences
from blm_core.files import read_json, write_json, written_aside

CUTS = {
    "sentences": "the longer one cut behind the sentence with which it comes closest to the length of the shorter",
    "words": "the longer one cut to as many words as the shorter has",
    "none": "neither cut",
}
NOTHING = "(no text)"
OVERLAP = 8  # characters of the prompt's end that a completion must repeat at its start to be taken for a slip

RUBRIC = f"""\
You see the beginning of a text for small children and two ways, A and B, in which it goes on. Judge only what was written to
go on, not the beginning.

Give A and B a mark from 0 (worst) to 10 (best) for each of
- grammar: is it correct English?
- creativity: is there something of its own in it?
- consistency: does it fit the beginning, in facts, persons, tone and sense?
- plot: does what happens make sense and lead somewhere, as far as its length allows?
and the age of a child who would write like this: {", ".join(AGES)}.

Then say which of the two goes on better as a whole: a, b, or tie where neither does. Which one is shown first means nothing.
"""
ANSWER = (
    '{"a": {"grammar": 0, "creativity": 0, "consistency": 0, "plot": 0, "age": "4-5"}, '
    '"b": {"grammar": 0, "creativity": 0, "consistency": 0, "plot": 0, "age": "4-5"}, "preferred": "tie"}'
)


@dataclass(frozen=True)
class Form:
    """How both texts of a pair are made comparable.

    `lower_case`: published GPT2-XL text is partly lower-cased, which would betray it. `cut`: the longer text is cut at the
    end of that sentence with which it comes closest to the words of the shorter (sentences), after as many words as the
    shorter has (words), or not at all (none). With sentences, a last one that does not close is dropped first.
    """

    lower_case: bool = True
    cut: str = "sentences"

    def __post_init__(self):
        if self.cut not in CUTS:
            raise ConfigError(f"cut = {self.cut!r} must be one of {', '.join(CUTS)}.")

    @property
    def task(self) -> str:
        """The rubric, and what was done to the texts."""
        case = ", put into lower case" if self.lower_case else ""
        return (
            f"{RUBRIC}\nBoth were brought to one form: white space and quotes tidied{case}, {CUTS[self.cut]}. Do not hold "
            "this against a text, nor that it stops before the end of the story."
        )


@dataclass(frozen=True)
class Pair:
    """Two models' texts behind one prompt, in their final form."""

    prompt: str
    models: tuple[str, str]
    texts: tuple[str, str]
    sample: int = 0  # of several pairs of the same prompt
    kind: str = ""  # of the prompt, such as "story" or "factual", where the recording says it

    @property
    def id(self) -> str:
        return hashed([self.prompt, *self.models, *self.texts, self.sample])

    @property
    def prompt_id(self) -> str:
        return prompt_id(self.prompt)


@dataclass(frozen=True)
class Item:
    """A pair in one order; `part` 1 holds every pair once, part 2 the other orders."""

    id: str
    part: int
    pair: Pair
    swapped: bool

    @property
    def models(self) -> tuple[str, str]:
        return self.pair.models[::-1] if self.swapped else self.pair.models

    @property
    def texts(self) -> tuple[str, str]:
        return self.pair.texts[::-1] if self.swapped else self.pair.texts

    def rating(self, rater: str, answer: dict) -> Rating:
        return _rating(self.id, self.pair.id, self.pair.prompt_id, rater, *self.models, answer, self.pair.kind)


def prompt_id(prompt: str) -> str:
    """The hash that names a prompt in keys and ratings, however its white space and typography are written."""
    return hashed(_tidy(prompt))


def read_completions(path: Path) -> dict[str, dict[str, list[str]]]:
    """Completions by model and prompt, from JSON lines with `model`, `prompt`, `completion`.

    A record's `peer_completion` by `peer_model` is a completion too. Raises as `compare.recorded`, and ValueError naming a
    record in which one of these is not a text.
    """
    found: dict = defaultdict(lambda: defaultdict(list))
    for record in recorded(path):
        for prefix in ("", "peer_") if record.get("peer_completion") is not None else ("",):
            prompt, model, completion = record["prompt"], record.get(f"{prefix}model"), record[f"{prefix}completion"]
            if not all(isinstance(value, str) for value in (prompt, model, completion)):
                raise ValueError(
                    f"{path}, record {record.get('id')}: prompt, {prefix}model and {prefix}completion must be texts."
                )
            found[model][prompt].append(completion)
    return {model: dict(prompts) for model, prompts in found.items()}


def pairs(ours: Path, theirs: Path, form: Form | None = None) -> tuple[list[Pair], dict[str, int]]:
    """Every completion of a model in `theirs` with one of `ours` on the same prompt, sample by sample, in their form.

    The second value counts the completions of each model that have no partner. Raises ValueError where the files have no
    prompt in common, or a model stands in both, or `ours` holds more than one.
    """
    form = form or Form()
    our_models, their_models = read_completions(ours), read_completions(theirs)
    if len(our_models) != 1:
        raise ValueError(f"{ours} must hold completions of one model, found {', '.join(our_models) or 'none'}.")
    ((our_model, our_texts),) = our_models.items()
    if our_model in their_models:
        raise ValueError(f"{our_model} stands in both {ours} and {theirs}; a model cannot be compared with itself.")
    kinds = {record["prompt"]: record.get("kind") or record.get("group") or "" for record in recorded(theirs)}
    found, alone = [], {}
    for model, texts in their_models.items():
        before = len(found)
        for prompt, samples in texts.items():
            for sample, (own, other) in enumerate(zip(our_texts.get(prompt, []), samples, strict=False)):
                shown = _tidy(prompt)
                found.append(Pair(shown, (our_model, model), comparable(shown, own, other, form), sample, kinds[prompt]))
        alone[model] = sum(map(len, texts.values())) - (len(found) - before)
    if not found:
        raise ValueError(f"{ours} and {theirs} have no prompt in common.")
    return found, alone


def comparable(prompt: str, a: str, b: str, form: Form) -> tuple[str, str]:
    """Both texts on one line, in the same typography, case and length."""
    a, b = (_one_line(prompt, text) for text in (a, b))
    if form.lower_case:
        a, b = a.lower(), b.lower()
    if form.cut == "sentences":
        whole = [_whole(prompt, text) for text in (a, b)]
        shorter = min(sum(len(sentence.split()) for sentence in own) for own in whole)
        a, b = (_closest(own, shorter) for own in whole)
    elif form.cut == "words":
        shorter = max(1, min(len(a.split()), len(b.split())))
        a, b = (" ".join(text.split()[:shorter]) for text in (a, b))
    return a or NOTHING, b or NOTHING


def items(pairs: Sequence[Pair], seed: int) -> list[Item]:
    """Every pair in both orders, shuffled: at least half of all pairs stand between the two, and A is each model as often.

    Ids tell nothing and differ between sheets.
    """
    if len({pair.id for pair in pairs}) < len(pairs):
        raise ValueError("a pair is given twice.")
    rng = random.Random(seed)
    order = list(pairs)
    rng.shuffle(order)
    swapped = [bool(i % 2) for i in range(len(order))]
    rng.shuffle(swapped)
    first = list(zip(order, swapped, strict=True))
    half = len(first) // 2
    second = []
    for quarter in (first[:half], first[half:]):  # what came early comes early again
        turned = [(pair, not swap) for pair, swap in quarter]
        rng.shuffle(turned)
        second += turned
    sheet = hashed([seed, *(pair.id for pair in order)])
    return [
        Item(f"{i:03d}-{hashed([sheet, i])[:6]}", part, pair, swap)
        for i, (part, (pair, swap)) in enumerate([*((1, own) for own in first), *((2, own) for own in second)], 1)
    ]


def write_sheet(path: Path, items: Sequence[Item], form: Form) -> None:
    """The blind sheet: JSON lines where `path` ends in .jsonl (the first line says what to do), else Markdown."""
    path = Path(path)
    task = f"{form.task}\n\nAnswer with one line of JSON for each item and nothing else, like this:\n\n"
    task += '{"id": "…", ' + ANSWER[1:]
    if path.suffix == ".jsonl":
        rows = [{"task": task}] + [
            {"id": item.id, "beginning": item.pair.prompt, "a": item.texts[0], "b": item.texts[1]} for item in items
        ]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        parts = [f"# Which goes on better? {len(items)} items\n\n{task}\n"]
        for item in items:
            a, b = item.texts
            parts.append(f"## {item.id}\n\nBeginning: {item.pair.prompt}\n\nA: {a}\n\nB: {b}\n")
        text = "\n".join(parts)
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def revision(path: Path) -> str:
    """The revision of the model whose completions `path` holds; "" where the records do not say it, or say several."""
    found = {record.get("revision") for record in recorded(path)}
    return (found.pop() or "") if len(found) == 1 else ""


def write_key(path: Path, items: Sequence[Item], form: Form, seed: int, revision: str = "") -> None:
    """Which text is whose: ids, models and numbers, no text, so that it can be published with the marks.

    `revision` is that of our model, by which it can be told later whether the marks are still those of the same one.

    Raises RatingsError where `path` is another sheet's key: without it that sheet's marks would be worthless.
    """
    key = {
        "seed": seed,
        "revision": revision,
        "form": asdict(form),
        "items": {
            item.id: {
                "part": item.part,
                "pair": item.pair.id,
                "prompt": item.pair.prompt_id,
                "kind": item.pair.kind,
                "a": item.models[0],
                "b": item.models[1],
                "words": [len(text.split()) for text in item.texts],
            }
            for item in items
        },
    }
    if Path(path).exists() and read_json(path) != key:
        raise RatingsError(f"{path} exists and is not this sheet's key. Name another file, or move it away.")
    write_json(path, key)


def read_marks(marks: Iterable[Path], key: Path, rater: str) -> list[Rating]:
    """The ratings that returned `marks` and the `key` make together.

    All or nothing: raises RatingsError naming every broken line and every id that is missing, foreign, doubled or has
    marks that cannot be.
    """
    known = read_json(key)
    if not isinstance(known, dict) or not isinstance(known.get("items"), dict):
        raise RatingsError(f"{key} is not the key of a sheet.")
    known = known["items"]
    problems, seen, found = [], defaultdict(list), []
    for path in marks:
        for number, record in _lines(path, problems):
            name = record.pop("id", None)
            if not isinstance(name, str):
                problems.append(f"{path}, line {number} has no id")
                continue
            seen[name].append(f"{Path(path).name}:{number}")
            if name not in known:
                continue
            wrong = check_marks(record)
            if wrong:
                problems.append(f"{name}: {'; '.join(wrong)}")
            else:
                own = known[name]
                found.append(_rating(name, own["pair"], own["prompt"], rater, own["a"], own["b"], record, own["kind"]))
    for what, ids in (
        ("marked more than once", [f"{name} ({', '.join(places)})" for name, places in seen.items() if len(places) > 1]),
        ("not on this sheet", [name for name in seen if name not in known]),
        ("without marks", [name for name in known if name not in seen]),
    ):
        if ids:
            problems.append(f"{what}: {', '.join(ids)}")
    if problems:
        raise RatingsError(f"the marks of {rater} were not taken in, nothing was written.\n" + "\n".join(problems))
    place = {name: i for i, name in enumerate(known)}
    return sorted(found, key=lambda rating: place[rating.id])


def save(folder: Path, rater: str, ratings: Sequence[Rating]) -> Path:
    """Write `folder/RATER.jsonl`. Raises RatingsError where it holds other ratings already, or the name is no file name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", rater):
        raise RatingsError(f"rater {rater!r}: use letters, digits, dots and hyphens, as it names a file.")
    path = Path(folder) / f"{rater}.jsonl"
    if path.exists() and read_ratings(path) != list(ratings):
        raise RatingsError(f"{path} holds other ratings by {rater}. Name this rater differently, or move the file away.")
    write_ratings(path, ratings)
    return path


def no_doubles(found: list[tuple]) -> dict:
    value = dict(found)
    if len(value) < len(found):
        raise ValueError("a name stands twice in an object")
    return value


def no_constants(name: str) -> float:
    raise ValueError(f"{name} is no mark")


def _rating(name: str, pair: str, prompt: str, rater: str, first: str, second: str, answer: dict, kind: str) -> Rating:
    preferred = {"a": "first", "b": "second", "tie": "tie"}[answer["preferred"]]
    a, b = ({name: marks[name] for name in (*CRITERIA, "age")} for marks in (answer["a"], answer["b"]))
    return Rating(name, pair, prompt, rater, first, second, a, b, preferred, kind)


def _lines(path: Path, problems: list[str]) -> Iterator[tuple[int, dict]]:
    """The objects of a file of marks with their line numbers; what is wrong with other lines is added to `problems`."""
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line, object_pairs_hook=no_doubles, parse_constant=no_constants)
        except ValueError as error:
            problems.append(f"{path}, line {number} is not valid JSON ({error})")
            continue
        if isinstance(record, dict):
            yield number, record
        else:
            problems.append(f"{path}, line {number} is not an object but {line[:40]!r}")


def _tidy(text: str) -> str:
    return " ".join(normalise(text)[0].split())


def _one_line(prompt: str, text: str) -> str:
    """`text` in ASCII typography on one line, without what its recording added to it.

    A beginning that repeats the prompt's end is dropped, white space before punctuation too, and a double quote glued
    between words gets its space on the side that its place in the quotation tells.
    """
    text = _tidy(text)
    for size in range(min(len(prompt), len(text)), OVERLAP - 1, -1):
        if prompt.endswith(text[:size]):
            text = text[size:].lstrip()
            break
    if prompt.count('"') % 2 and prompt.endswith('"'):
        text = text.removeprefix('"')
    text = re.sub(r"\s+([.,!?;:])", r"\1", text)
    parts, inside = text.split('"'), prompt.count('"') % 2 == 1
    line = parts[0]
    for part in parts[1:]:
        opening = not inside
        if line and part and not line[-1].isspace() and not part[0].isspace():
            if opening and (line[-1].isalnum() or line[-1] in ".,!?;:"):
                line += " "
            elif not opening and part[0].isalnum():
                part = f" {part}"
        line += f'"{part}'
        inside = opening
    return line.strip()


def _whole(prompt: str, text: str) -> list[str]:
    """The sentences of `text`, without a last one that does not close, unless it is the only one."""
    spoken = '"' if prompt.count('"') % 2 else ""  # the prompt left a quotation open
    found = [sentence.strip() for sentence in sentences(spoken + text)]
    if spoken:
        found[0] = found[0].removeprefix(spoken).lstrip()
    return found[:-1] if len(found) > 1 and not CLOSED.search(found[-1]) else found


def _closest(sentences: list[str], words: int) -> str:
    """The first of `sentences`, at least one, that together come closest to so many words."""
    starts = [" ".join(sentences[:n]) for n in range(1, len(sentences) + 1)]
    return min(starts, key=lambda text: abs(len(text.split()) - words), default="")


def hashed(value: object, digits: int = 12) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:digits]
