"""Blind ratings: the arms' texts, sheets for raters, their answers, and what follows from them by the committed protocol.

- Texts of all arms get one treatment and matching lengths, so that nothing but the writing tells them apart.
- A sheet is one Markdown file: the rubric, numbered texts, how to answer. The key, which text is whose, lies elsewhere.
- Sheets hold other people's texts and stay out of the repository; key, rubric and marks hold none.
- Sheets are answered by anybody, or by an OpenAI-compatible server (`ask`). An answer is taken whole or not at all.
"""

import json
import math
import os
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np

from blm_core import files
from blm_core.checkpoint import load_model
from blm_core.clean import normalise
from blm_core.config import ConfigError
from blm_core.evaluate import Interval, difference_interval, mean_interval, paired_difference, verdict
from blm_core.evidence.models import read_lines
from blm_core.evidence.text import measure
from blm_core.files import read_json, write_json, written_aside
from blm_core.generate import Sampling, complete

BEGINNING = "Once upon a time"
SHORTEST = 40  # words; a shorter text shows too little to be compared
SENTENCE_END = re.compile(r"(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)[.!?][\"')]*(?= |$)")
CRITERIA = ("grammar", "consistency", "plot")
ANSWERS = {"kind": ("child", "other", "none"), "ends": ("yes", "no"), "child": ("a", "b", "tie"), "text": ("a", "b", "tie")}
XL, SAME, OWN = "GPT2-XL", "BLM, same decoding", "BLM, own decoding"
ARMS = (XL, SAME, OWN, "ChatGPT", "329 M peer", "real")
# Millions of parameters with embeddings, from the published shapes (50,257 pieces, 8 layers of width 64, 256 and 512).
RUNGS = {"TinyStories-1M": 3.7, "TinyStories-8M": 19.7, "TinyStories-28M": 52.0}
DECODINGS = {
    SAME: Sampling(temperature=1.0, top_k=50, top_p=1.0, seed=1),
    OWN: Sampling(temperature=0.8, top_k=0, top_p=0.95, seed=1),
}
COHERENT = 5  # mean mark for consistency from which on a story for a small child counts

SCALE = """\
Marks are whole numbers from 0 to 10:
- grammar: 0 not English; 3 many errors; 5 an error in every third or fourth sentence; 8 one error; 10 none.
- consistency: does it hang together in persons, things, facts and sense? 0 words without a thread; 3 one can tell who it is about, but
  sentences often contradict or do not follow from one another; 5 one thread from the first sentence to the last, with a slip or two; 8 no
  slip; 10 everything belongs together.
- plot: 0 nothing happens; 3 things happen without reason; 5 a wish or a problem and something that comes of it; 8 it leads
  from a beginning over a turn to an outcome; 10 so well that one would tell it again.
"""  # noqa: E501
ALONE = f"""\
Below are texts, each on its own. Some stop early because they were cut at a length; hold only what is there against a text. Judge
each by itself; texts of one kind may come in any number. Give for each
- kind: "child" for a story told for a small child (3 to 6 years), "other" for another story (for older readers, a tale of somebody's
  life, a novel), "none" for what is not a story (news, essay, advertisement, forum, instructions, ...);
- grammar, consistency, plot: marks as below, also where it is not a story;
- ends: "yes" if it comes to an end of its own, "no" if it stops midway.

{SCALE}"""  # noqa: E501
ALONE_ANSWER = '{"id": "...", "kind": "child", "grammar": 0, "consistency": 0, "plot": 0, "ends": "no"}'
PAIRS = """\
Below are pairs of texts, A and B. Some stop early because they were cut at a length; do not hold that against them. Which one stands
first means nothing. Answer for each pair two questions:
- child: which would you read to a small child (3 to 6 years)? "a", "b" or "tie";
- text: which is better as text, whatever its kind: better written, making more sense? "a", "b" or "tie".
Use "tie" only where you really cannot tell.
"""  # noqa: E501
PAIRS_ANSWER = '{"id": "...", "child": "a", "text": "tie"}'


class RatingsError(ValueError):
    """A sheet, key or answer is broken."""


@dataclass(frozen=True)
class Text:
    """A treated text of one arm. `source` names it in its recording; `prompt` is the id of a longer beginning, else ""."""

    source: str
    arm: str
    text: str
    prompt: str = ""

    @property
    def n_words(self) -> int:
        return len(self.text.split())


def treated(text: str) -> str:
    """One line in ASCII typography, case kept, cut after the last full stop (the whole line where there is none)."""
    line = " ".join(normalise(text).split())
    ends = [match.end() for match in SENTENCE_END.finditer(line)]
    return line[: ends[-1]] if ends else line


def cut(text: str, limit: int) -> str:
    """`text` up to its last full stop within `limit` words, at least its first sentence."""
    ends = [match.end() for match in SENTENCE_END.finditer(text)] or [len(text)]
    within = [end for end in ends if len(text[:end].split()) <= limit]
    return text[: within[-1] if within else ends[0]]


def match_lengths(texts: Sequence[Text], yardstick: Sequence[Text]) -> list[Text]:
    """`texts`, the n-th longest cut to the words of the n-th longest of `yardstick`, in the order given."""
    limits = sorted((t.n_words for t in yardstick), reverse=True)
    order = sorted(range(len(texts)), key=lambda i: -texts[i].n_words)
    found = list(texts)
    for limit, i in zip(limits, order, strict=True):
        t = texts[i]
        found[i] = Text(t.source, t.arm, cut(t.text, limit), t.prompt)
    return found


def write_own(folder: Path, prompts: dict[str, str], n: int, sampling: Sampling, arm: str) -> list[dict]:
    """`n` completions of each prompt by the model in `folder`, as records without the prompts; `revision` names its weights."""
    model, tokenizer = load_model(folder)
    texts = complete(model, tokenizer, [prompt for prompt in prompts.values() for _ in range(n)], sampling)
    names, revision = [(name, i) for name in prompts for i in range(n)], files.sha256(folder / "model.safetensors")[:16]
    return [
        {"id": f"{arm}/{name}/{i}", "arm": arm, "prompt": name, "sample": i, "completion": text, "revision": revision}
        for (name, i), text in zip(names, texts, strict=True)
    ]


def in_sheets(items: Sequence, n_sheets: int, twice: int, seed: int) -> list[list]:
    """Shuffled items over sheets of like size; the first `twice` of the shuffled ones stand in the sheet half-way on too."""
    order = list(items)
    random.Random(seed).shuffle(order)
    sheets = [order[i::n_sheets] for i in range(n_sheets)]
    for i, item in enumerate(order[:twice]):
        sheets[(i + n_sheets // 2) % n_sheets].append(item)
    for i, sheet in enumerate(sheets):
        random.Random(f"{seed}/{i}").shuffle(sheet)
    return sheets


def sheet_text(task: str, example: str, shown: dict[str, str], answers: str) -> str:
    """A sheet that needs nothing beside it."""
    head = (
        f"# {len(shown)} items to judge\n\n{task}\nWrite one line of JSON for each item, in the order of the sheet and for all "
        f"{len(shown)} of them, to {answers}. A line looks like this:\n\n    {example}\n\n"
        "Read every text to its end before you judge it, and judge yourself, not by a program. Use nothing but this sheet.\n"
    )
    return "\n".join([head, *(f"## {name}\n\n{text}\n" for name, text in shown.items())])


def write_sheets(
    folder: Path, name: str, sheets: Sequence[Sequence], raters: Sequence[str], task: str, example: str
) -> tuple[dict, list[str]]:
    """Write one Markdown file for each sheet and rater; the key's part and one task line for each.

    An item is a Text or a pair of Texts. Raises RatingsError if a sheet holds an item twice.
    """
    key, tasks = {}, []
    for number, sheet in enumerate(sheets, 1):
        sheet_name = f"{name}{number:02d}"
        items = {f"{sheet_name}-{i:02d}": item for i, item in enumerate(sheet, 1)}
        if len(set(items.values())) < len(items):
            raise RatingsError(f"sheet {sheet_name} holds an item twice.")
        shown = {
            i: item.text if isinstance(item, Text) else f"A: {item[0].text}\n\nB: {item[1].text}" for i, item in items.items()
        }
        key[sheet_name] = {i: _entry(item) for i, item in items.items()}
        for rater in raters:
            path, answers = folder / f"{sheet_name}-{rater}.md", folder / "answers" / f"{sheet_name}-{rater}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            answers.parent.mkdir(exist_ok=True)
            with written_aside(path) as aside:
                aside.write_text(sheet_text(task, example, shown, str(answers)), encoding="utf-8")
            tasks.append(f"{path} {answers}")
    return key, tasks


def _entry(item) -> dict:
    if isinstance(item, Text):
        return {
            "source": item.source,
            "arm": item.arm,
            "words": item.n_words,
            "sha256": sha256(item.text.encode()).hexdigest()[:16],
        }
    return {"a": _entry(item[0]), "b": _entry(item[1]), "prompt": item[0].prompt}


def arms(data: Path, valid: Path, own: Sequence[dict], n: int = 72) -> dict[str, list[Text]]:
    """The six arms of measure 1, treated and cut to GPT2-XL's lengths."""
    once = read_lines(data / "once_upon_a_time.jsonl") + read_lines(data / "peers.jsonl")
    recorded = {XL: "elex-gpt2xl-", "ChatGPT": "elex-chatgpt-", "329 M peer": "elex-my-"}
    found = {
        arm: [Text(r["id"], arm, treated(r["prompt"] + r["completion"])) for r in once if r["id"].startswith(start)][:n]
        for arm, start in recorded.items()
    }
    stories = (treated(s) for s in valid.read_text(encoding="utf-8").split("<|endoftext|>"))
    real = [(i, s) for i, s in enumerate(stories) if s.startswith(BEGINNING) and len(s.split()) >= SHORTEST]
    found["real"] = [Text(f"{valid.stem}-{i}", "real", s) for i, s in real[:n]]
    for arm in DECODINGS:
        found[arm] = [
            Text(r["id"], arm, treated(BEGINNING + r["completion"])) for r in own if r["arm"] == arm and r["prompt"] == "once"
        ][:n]
    short = {arm: len(texts) for arm, texts in found.items() if len(texts) < n}
    if short:
        raise RatingsError(f"every arm needs {n} texts, found {short}.")
    return {arm: match_lengths(texts, found[XL]) for arm, texts in found.items()}


def recorded_marks(data: Path) -> dict[str, dict]:
    """ChatGPT's marks for consistency and fluency, 0 to 10, of the texts of elexunix/dl2-bhw1, by the text's id."""
    records = read_lines(data / "once_upon_a_time.jsonl") + read_lines(data / "peers.jsonl")
    marked = [r for r in records if r["id"].startswith("elex-") and "judge_consistency" in r]
    return {r["id"]: {"consistency": r["judge_consistency"], "fluency": r["judge_fluency"]} for r in marked}


def measures(texts: dict[str, list[Text]]) -> dict[str, dict[str, list]]:
    """The measures of `text.measure` of every text of every arm; None where one is not defined."""
    found = {arm: measure([t.text for t in own]) for arm, own in texts.items()}
    return {
        arm: {name: [None if math.isnan(x) else round(float(x), 6) for x in values] for name, values in own.items()}
        for arm, own in found.items()
    }


def same_length(texts: Sequence[Text]) -> list[Text]:
    """Texts on one beginning, all cut to the words of the shortest."""
    limit = min(t.n_words for t in texts)
    return [Text(t.source, t.arm, cut(t.text, limit), t.prompt) for t in texts]


def random_pairs(ours: Sequence[Text], theirs: Sequence[Text], seed: int) -> list[tuple[Text, Text]]:
    """Each of `theirs` with one of `ours` drawn without replacement, cut to one length; pairs under SHORTEST words fall out."""
    shuffled = list(ours)
    random.Random(seed).shuffle(shuffled)
    pairs = [tuple(same_length(pair)) for pair in zip(shuffled, theirs, strict=True)]
    return [pair for pair in pairs if min(t.n_words for t in pair) >= SHORTEST]


def longer_openings(data: Path) -> dict[str, dict]:
    """GPT2-XL's completions of longer openings with at least SHORTEST words, by id."""
    records = read_lines(data / "published_completions.jsonl") + read_lines(data / "published_completions_2.jsonl")
    return {
        r["id"]: r
        for r in records
        if len(r["completion"].split()) >= SHORTEST and len(r["prompt"].split()) > len(BEGINNING.split()) + 2
    }


def ladder_prompts(data: Path, n: int = 40) -> dict[str, dict[str, dict]]:
    """The first `n` story prompts by SHA-256, each with its records by model (TinyStories-1M, -8M, -28M)."""
    found: dict[str, dict[str, dict]] = {}
    for r in read_lines(data / "peers.jsonl"):
        if r["id"].startswith("tinyscalelab") and r["kind"] == "story":
            found.setdefault(r["prompt"], {}).setdefault(r["model"], r)
    whole = [prompt for prompt, own in found.items() if len(own) == 3]
    return {prompt: found[prompt] for prompt in sorted(whole, key=lambda p: sha256(p.encode()).hexdigest())[:n]}


def joined(prompt: str, completion: str) -> str:
    """The prompt and what follows, with a space between where neither has one."""
    glue = "" if not completion or completion[0] in " ,.;:!?'\n" or prompt[-1:].isspace() else " "
    return prompt + glue + completion


def make(release: Path, data: Path, valid: Path, folder: Path, evidence: Path) -> dict:
    """Write our texts, the key and numbers of all texts to `evidence`, all sheets and TASKS.txt to `folder`; items by set.

    Raises RatingsError where `evidence` holds the key of other sheets: marks given on them would lose their meaning.
    """
    longer, ladder = longer_openings(data), ladder_prompts(data)
    same, mild = ((arm, DECODINGS[arm]) for arm in (SAME, OWN))
    own = [r for arm, sampling in (same, mild) for r in write_own(release, {"once": BEGINNING}, 72, sampling, arm)]
    own += write_own(release, {name: r["prompt"] for name, r in longer.items()}, 1, same[1], same[0])
    rungs = {next(iter(of.values()))["id"]: prompt for prompt, of in ladder.items()}
    own += write_own(release, rungs, 1, mild[1], mild[0])
    ours = {(r["arm"], r["prompt"]): r for r in own}

    texts = arms(data, valid, own)
    alone = in_sheets([t for arm in texts.values() for t in arm], 12, 12, seed=3)

    pairs = random_pairs(texts[same[0]], texts[XL], seed=2)
    bare = len(pairs)
    for name, r in longer.items():
        mine = ours[same[0], name]
        pair = same_length(
            [
                Text(mine["id"], same[0], treated(joined(r["prompt"], mine["completion"])), name),
                Text(name, XL, treated(joined(r["prompt"], r["completion"])), name),
            ]
        )
        if all(len(t.text.split()) - len(r["prompt"].split()) >= SHORTEST for t in pair):
            pairs.append(tuple(pair))
    swap = random.Random(4)
    first = [pair if swap.random() < 0.5 else pair[::-1] for pair in pairs]
    orders = {"a": first, "b": [pair[::-1] for pair in first]}

    rows = []
    for name, prompt in rungs.items():
        mine = ours[mild[0], name]
        four = [
            Text(f"{r['model']}/{r['id']}", model, treated(joined(prompt, r["completion"])), name)
            for model, r in ladder[prompt].items()
        ]
        four.append(Text(mine["id"], mild[0], treated(joined(prompt, mine["completion"])), name))
        rows.append(same_length(four))
    steps = [[t for row in rows[i::5] for t in row] for i in range(5)]
    for i, sheet in enumerate(steps):
        random.Random(f"ladder/{i}").shuffle(sheet)

    key, tasks = {}, []
    for name, sheets, raters, task, example in (
        ("alone", alone, ("r1", "r2"), ALONE, ALONE_ANSWER),
        ("pairs-a", in_sheets(orders["a"], 3, 6, seed=5), ("r1",), PAIRS, PAIRS_ANSWER),
        ("pairs-b", in_sheets(orders["b"], 3, 6, seed=6), ("r2",), PAIRS, PAIRS_ANSWER),
        ("ladder", steps, ("r1", "r2"), ALONE, ALONE_ANSWER),
    ):
        own_key, own_tasks = write_sheets(folder, name, sheets, raters, task, example)
        key |= own_key
        tasks += own_tasks
    if (evidence / "key.json").exists() and read_json(evidence / "key.json") != key:
        raise RatingsError(f"{evidence / 'key.json'} is the key of other sheets. Name another folder, or move it away.")
    write_json(evidence / "key.json", key)
    (evidence / "rubric.md").write_text(
        f"# Rubric: texts alone, and the ladder\n\n{ALONE}\nAnswer: `{ALONE_ANSWER}`\n\n"
        f"# Rubric: pairs\n\n{PAIRS}\nAnswer: `{PAIRS_ANSWER}`\n"
    )
    write_json(evidence / "measures.json", measures(texts))
    write_json(evidence / "chatgpt_marks.json", recorded_marks(data))
    (evidence / "blm_texts.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in own))
    (folder / "TASKS.txt").write_text("\n".join(tasks) + "\n")
    return {
        "texts": {a: len(t) for a, t in texts.items()},
        "bare pairs": bare,
        "longer pairs": len(pairs) - bare,
        "ladder": len(rows) * 4,
    }


# ---- Answers


def problems(answers: Sequence[dict], key: dict) -> list[str]:
    """What is wrong with the answers to a sheet, of which `key` is the part of the key; nothing where they are whole."""
    fields = {"child", "text"} if all("a" in item for item in key.values()) else {"kind", "ends", *CRITERIA}
    counts = Counter(answer.get("id") for answer in answers)
    found = [f"{name} is missing" for name in key if not counts[name]]
    found += [f"{name} is answered {n} times" for name, n in counts.items() if n > 1]
    found += [f"{name!r} is not on the sheet" for name in counts if name not in key]
    for answer in answers:
        if set(answer) != {"id", *fields}:
            found.append(f"{answer.get('id')} has the fields {', '.join(sorted(answer))}")
        for name in fields & set(answer):
            value = answer[name]
            if name in CRITERIA and (type(value) is not int or not 0 <= value <= 10):
                found.append(f"{answer.get('id')}: {name} is {value!r}, no whole number from 0 to 10")
            if name in ANSWERS and value not in ANSWERS[name]:
                found.append(f"{answer.get('id')}: {name} is {value!r}, not one of {', '.join(ANSWERS[name])}")
    return found


def take_in(folder: Path, evidence: Path, rater: str, date: str) -> dict[str, str]:
    """Copy every whole answer of `folder` to `evidence`/ratings, and note rater, date and the sheet's SHA-256 in sheets.json.

    Returns for each sheet that was not taken the reason, for a broken one its first three problems. Raises RatingsError for
    a sheet that was taken before with other marks.
    """
    key, left = read_json(evidence / "key.json"), {}
    noted = read_json(evidence / "ratings" / "sheets.json", {})
    for sheet in sorted(folder.glob("*.md")):
        answers, name = folder / "answers" / f"{sheet.stem}.jsonl", sheet.stem
        if not answers.is_file():
            left[name] = "not answered"
            continue
        try:
            lines = read_lines(answers)
            wrong = problems(lines, key[name.rsplit("-", 1)[0]])
        except (ValueError, AttributeError, TypeError) as error:
            wrong = [f"no lines of JSON objects ({error})"]
        if wrong:
            left[name] = "; ".join(wrong[:3])
            continue
        text = "".join(json.dumps(line) + "\n" for line in sorted(lines, key=lambda line: line["id"]))
        target = evidence / "ratings" / f"{name}.jsonl"
        if target.exists() and target.read_text() != text:
            raise RatingsError(
                f"{target} holds other marks of the same sheet. A sheet is taken once; move the file to take it anew."
            )
        target.parent.mkdir(exist_ok=True)
        with written_aside(target) as aside:
            aside.write_text(text)
        noted[name] = {"rater": rater, "date": date, "items": len(lines), "sha256": files.sha256(sheet)}
    write_json(evidence / "ratings" / "sheets.json", dict(sorted(noted.items())))
    return left


def ask(folder: Path) -> dict[str, str]:
    """Let the server BLM_JUDGE_URL answer every sheet of `folder` that has no answer; what went wrong, by sheet.

    The model is BLM_JUDGE_MODEL, the key BLM_JUDGE_KEY. Each sheet is one conversation. Lines that are no JSON objects are
    left out; whether the answer is whole, `take_in` says. Raises ConfigError where the server is not named.
    """
    from openai import OpenAI, OpenAIError

    url, model = os.environ.get("BLM_JUDGE_URL"), os.environ.get("BLM_JUDGE_MODEL")
    if not url or not model:
        raise ConfigError("BLM_JUDGE_URL (such as http://localhost:8080/v1) and BLM_JUDGE_MODEL must be set.")
    client, failed = OpenAI(base_url=url, api_key=os.environ.get("BLM_JUDGE_KEY") or "none"), {}
    for sheet in sorted(folder.glob("*.md")):
        target = folder / "answers" / f"{sheet.stem}.jsonl"
        if target.exists():
            continue
        question = "Answer with the lines of JSON, in this conversation, and nothing else.\n\n" + sheet.read_text(
            encoding="utf-8"
        )
        try:
            reply = client.chat.completions.create(model=model, messages=[{"role": "user", "content": question}], temperature=0)
        except OpenAIError as error:
            failed[sheet.stem] = f"{type(error).__name__}: {error}"
            continue
        lines = [line.strip() for line in (reply.choices[0].message.content or "").splitlines() if line.strip().startswith("{")]
        target.parent.mkdir(exist_ok=True)
        with written_aside(target) as aside:
            aside.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return failed


# ---- What follows


@dataclass(frozen=True)
class Rated:
    """A text and its two raters' answers, r1's first."""

    source: str
    arm: str
    sheet: str
    answers: tuple[dict, dict]

    def mark(self, criterion: str) -> float:
        return sum(answer[criterion] for answer in self.answers) / 2

    @property
    def for_a_child(self) -> bool:
        return all(answer["kind"] == "child" for answer in self.answers)

    @property
    def a_story(self) -> bool:
        return all(answer["kind"] != "none" for answer in self.answers)

    def counts(self, threshold: float = COHERENT) -> bool:
        """Measure 1: both call it a story for a small child, and it hangs together."""
        return self.for_a_child and self.mark("consistency") >= threshold


@dataclass(frozen=True)
class Pair:
    """Points (1 win, 0.5 tie) of the BLM in each order of a pair, by question; `first`: of the text that was shown first."""

    blm: str
    xl: str
    prompt: str
    sheets: tuple[str, str]
    points: dict[str, tuple[float, float]]
    first: dict[str, tuple[float, float]]

    def value(self, question: str) -> float:
        return sum(self.points[question]) / 2


@dataclass(frozen=True)
class Line:
    """One line of evidence: `value` with its interval, in `unit` ("points of 100", "marks"); right of 0 speaks for the BLM."""

    name: str
    value: float
    low: float
    high: float
    verdict: str
    n: int
    unit: str


class Ratings:
    """The committed marks of `evidence`, by text and by pair.

    What stands in two sheets counts with the first of them; `repeated` holds both. Texts that two raters have not
    answered, and pairs without both orders, are left out: `sheets` says how many sheets there are and how many were rated.
    """

    def __init__(self, evidence: Path):
        key = read_json(evidence / "key.json")
        self.noted = read_json(evidence / "ratings" / "sheets.json", {})
        given: dict[tuple[str, str], dict] = {}
        for name in self.noted:
            sheet, rater = name.rsplit("-", 1)
            for answer in read_lines(evidence / "ratings" / f"{name}.jsonl"):
                given[answer["id"], rater] = answer
        wanted = [f"{s}-{r}" for s in key for r in (("r1", "r2") if "pairs" not in s else ("r1",) if "-a" in s else ("r2",))]
        self.sheets = (len(self.noted), len(wanted))
        texts, pairs = [], {}
        for sheet, items in key.items():
            for name, item in items.items():
                if "a" in item:
                    rater = "r1" if sheet.startswith("pairs-a") else "r2"
                    if (name, rater) in given:
                        side = "a" if item["a"]["arm"] == SAME else "b"
                        both = item[side]["source"], item["b" if side == "a" else "a"]["source"], item["prompt"]
                        pairs.setdefault(both, {}).setdefault(sheet[:7], []).append((sheet, side, given[name, rater]))
                elif (name, "r1") in given and (name, "r2") in given:
                    texts.append(Rated(item["source"], item["arm"], sheet, (given[name, "r1"], given[name, "r2"])))
        self.alone = _first([t for t in texts if t.sheet.startswith("alone")])
        self.ladder = _first([t for t in texts if t.sheet.startswith("ladder")])
        self.pairs = [_pair(both, orders) for both, orders in pairs.items() if len(orders) == 2]
        self.repeated = _repeated(texts)
        self.repeated_pairs = [
            tuple(answer for _, _, answer in seen[:2]) for of in pairs.values() for seen in of.values() if len(seen) > 1
        ]

    def arm(self, name: str) -> list[Rated]:
        return [t for t in self.alone if t.arm == name]

    def share(self, arm: str, threshold: float = COHERENT) -> Interval:
        """The share of an arm's texts that count under measure 1."""
        return _mean([t.counts(threshold) for t in self.arm(arm)])

    def share_difference(self, threshold: float = COHERENT, arm: str = SAME) -> Interval:
        """Measure 1: the share of `arm` minus GPT2-XL's, each resampled by its own texts."""
        return _difference(*([t.counts(threshold) for t in self.arm(a)] for a in (arm, XL)))

    def bare_pairs(self) -> list[Pair]:
        return [p for p in self.pairs if not p.prompt]

    def fair_pairs(self) -> list[Pair]:
        """The bare pairs whose GPT2-XL text both raters called a story of either kind."""
        stories = {t.source for t in self.arm(XL) if t.a_story}
        return [p for p in self.bare_pairs() if p.xl in stories]

    def longer_pairs(self) -> list[Pair]:
        return [p for p in self.pairs if p.prompt]

    def rungs(self) -> dict[str, dict[str, Rated]]:
        """The ladder's prompts whose four texts were rated: by prompt and arm."""
        found: dict[str, dict[str, Rated]] = {}
        for t in self.ladder:
            found.setdefault(t.source.split("/")[1], {})[t.arm] = t
        return {prompt: of for prompt, of in found.items() if len(of) == len(RUNGS) + 1}

    def lines(self) -> list[Line]:
        """All lines that the raters decide, the two primaries first."""
        found = [_line("1 stories that hang together, BLM minus GPT2-XL", self.share_difference(), len(self.arm(SAME)))]
        found.append(_win("2 which would you read to a child?", self.bare_pairs(), "child"))
        found.append(_win("better as text, whatever its kind", self.bare_pairs(), "text"))
        found.append(_win("fair fight: read to a child", self.fair_pairs(), "child"))
        found.append(_win("fair fight: better as text", self.fair_pairs(), "text"))
        found.append(_win("longer openings: read to a child", self.longer_pairs(), "child"))
        found.append(_win("longer openings: better as text", self.longer_pairs(), "text"))
        found.append(_line("stories that hang together, own decoding", self.share_difference(arm=OWN), len(self.arm(OWN))))
        for criterion in CRITERIA:
            both = [[t.mark(criterion) for t in self.arm(arm)] for arm in (SAME, XL)]
            marks = _line(f"{criterion}, BLM minus GPT2-XL", _difference(*both), len(both[0]), "marks")
            found.append(replace(marks, verdict="no decision"))  # the protocol reports mean marks without one
        rungs = self.rungs().values()
        for rung in RUNGS:
            both = [[np.mean([of[arm].mark(c) for c in CRITERIA]) for of in rungs] for arm in (OWN, rung)]
            gap = paired_difference(*both) if both[0] else NOTHING
            found.append(_line(f"mean mark, BLM minus {rung}", gap, len(both[0]), "marks"))
        return found

    def outcome(self) -> str:
        """The claim by the protocol's rule: "made", "refuted", "undecided", or "not made" where the instrument fails."""
        first, second = (line.verdict for line in self.lines()[:2])
        if "loses" in (first, second):
            return "refuted"
        if not self.share("real").value >= 0.5:
            return "not made"
        return "made" if first == second == "wins" else "undecided"

    def agreement(self) -> dict[str, float]:
        """Cohen's kappa of kind, end and both preferences (the two orders), Krippendorff's alpha of the marks (interval)."""
        import krippendorff
        from sklearn.metrics import cohen_kappa_score

        texts = self.alone + self.ladder
        found = {}
        for name in ("kind", "ends"):
            found[f"{name}, kappa"] = float(
                cohen_kappa_score(*zip(*[[a[name] for a in t.answers] for t in texts], strict=True))
            )
        for name in CRITERIA:
            marks = np.array([[a[name] for a in t.answers] for t in texts], dtype=float).T
            found[f"{name}, alpha"] = float(krippendorff.alpha(reliability_data=marks, level_of_measurement="interval"))
        for name in ("child", "text"):
            both = zip(*[[str(points) for points in p.points[name]] for p in self.pairs], strict=True)
            found[f"{name}, kappa of the two orders"] = float(cohen_kappa_score(*both))
        return found

    def noise(self) -> dict[str, float]:
        """Texts and pairs that stand in two sheets: mean distance of their marks, and how often the answers are the same."""
        found = {"texts": len(self.repeated), "pairs": len(self.repeated_pairs)}
        for name in CRITERIA:
            found[name] = _average([abs(x[name] - y[name]) for a, b in self.repeated for x, y in zip(a, b, strict=True)])
        found["same kind"] = _average([x["kind"] == y["kind"] for a, b in self.repeated for x, y in zip(a, b, strict=True)])
        found["same preference"] = _average([x["child"] == y["child"] for x, y in self.repeated_pairs])
        return found

    def position_pull(self, question: str = "child") -> Interval:
        """How often the text shown first is preferred, over both orders; 0.5 is no pull."""
        return _mean([np.mean(p.first[question]) for p in self.pairs])

    def validity(self, marks: dict[str, dict]) -> dict[str, float]:
        """Spearman's correlation of the mean marks with ChatGPT's recorded ones: consistency, and fluency with grammar."""
        from scipy.stats import spearmanr

        texts = [t for t in self.alone if t.source in marks]
        found: dict[str, float] = {"texts": len(texts)}
        for theirs, ours in (("consistency", "consistency"), ("fluency", "grammar")):
            both = [(t.mark(ours), marks[t.source][theirs]) for t in texts]
            found[theirs] = float(spearmanr(*zip(*both, strict=True)).statistic) if len(both) > 2 else math.nan
        return found


NOTHING = Interval(math.nan, math.nan, math.nan)


def _first(texts: Sequence[Rated]) -> list[Rated]:
    return list({t.source: t for t in sorted(texts, key=lambda t: t.sheet, reverse=True)}.values())[::-1]


def _repeated(texts: Sequence[Rated]) -> list[tuple[tuple[dict, dict], tuple[dict, dict]]]:
    seen: dict[tuple[str, str], list] = {}
    for t in texts:
        seen.setdefault((t.source, t.sheet[:5]), []).append(t.answers)
    return [tuple(both[:2]) for both in seen.values() if len(both) > 1]


def _pair(both: tuple[str, str, str], orders: dict[str, list]) -> Pair:
    a, b = (min(orders[order], key=lambda seen: seen[0]) for order in ("pairs-a", "pairs-b"))
    points, first = {}, {}
    for question in ("child", "text"):
        points[question] = tuple(_points(answer[question], side) for _, side, answer in (a, b))
        first[question] = tuple(_points(answer[question], "a") for *_, answer in (a, b))
    return Pair(*both, (a[0], b[0]), points, first)


def _points(preferred: str, side: str) -> float:
    return 0.5 if preferred == "tie" else float(preferred == side)


def _mean(values: Sequence[float]) -> Interval:
    return mean_interval(values) if len(values) else NOTHING


def _average(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def _difference(a: Sequence[float], b: Sequence[float]) -> Interval:
    return difference_interval(a, b) if len(a) and len(b) else NOTHING


def _line(name: str, gap: Interval, n: int, unit: str = "points of 100") -> Line:
    scale = 100 if unit == "points of 100" else 1
    result = verdict(gap.low, gap.high, "higher") if n else "not rated yet"
    return Line(name, scale * gap.value, scale * gap.low, scale * gap.high, result, n, unit)


def _win(name: str, pairs: Sequence[Pair], question: str) -> Line:
    """The share of wins minus one half."""
    rate = _mean([p.value(question) for p in pairs])
    return _line(name, Interval(rate.value - 0.5, rate.low - 0.5, rate.high - 0.5), len(pairs))


# ---- Earlier marks: facts, reasoning, tracking


def earlier_by_kind(evidence: Path, other: str = "gpt2-xl") -> dict[str, dict]:
    """Preferences of an earlier trial over `other` by kind of beginning, and "all": prompts, wins, ties, losses, rate.

    They were given to the release before this one, of 3.2 M parameters (revision in key1.json). The rate is the mean
    over prompts of each prompt's mean, a tie counting one half, with its interval over prompts.
    """
    marks = [m for path in sorted((evidence / "ratings").glob("shuffle-*.jsonl")) for m in read_lines(path)]
    marks = [m for m in marks if {m["first"], m["second"]} == {"BLM", other}]
    found = {}
    for kind in ("all", *sorted({m["kind"] for m in marks})):
        prompts: dict[str, list[float]] = {}
        for m in marks:
            if kind in ("all", m["kind"]):
                winner = {"first": m["first"], "second": m["second"]}.get(m["preferred"])
                prompts.setdefault(m["prompt"], []).append(0.5 if winner is None else float(winner == "BLM"))
        points = [p for own in prompts.values() for p in own]
        found[kind] = {
            "prompts": len(prompts),
            "wins": points.count(1.0),
            "ties": points.count(0.5),
            "losses": points.count(0.0),
        }
        found[kind]["rate"] = _mean([float(np.mean(prompts[prompt])) for prompt in sorted(prompts)])
    return found
