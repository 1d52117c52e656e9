"""Blind ratings: the arms' texts, sheets for raters, their answers, and what follows from them by the committed protocol.

- Texts of all arms get one treatment and matching lengths, so that nothing but the writing tells them apart.
- A sheet is one Markdown file: the rubric, numbered texts, how to answer. The key, which text is whose, lies elsewhere.
- Sheets hold other people's texts and stay out of the repository; key, rubric and marks hold none.
- Sheets are answered by anybody, or by an OpenAI-compatible server (`ask`). An answer is taken whole or not at all.
"""

import math
import os
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from blm_core.checkpoint import load_model
from blm_core.clean import normalise
from blm_core.config import ROOT, ConfigError
from blm_core.evaluate import Interval, difference_interval, mean_interval, paired_difference, verdict
from blm_core.evidence.models import read_lines
from blm_core.evidence.text import measure
from blm_core.files import read_json, sha256, text_sha256, write_json, write_json_lines, written_aside
from blm_core.generate import Sampling, complete

BEGINNING = "Once upon a time"
SHORTEST = 40  # words; a shorter text shows too little to be compared
TEXTS = 72  # of each arm
SENTENCE_END = re.compile(r"(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)[.!?][\"')]*(?= |$)")
RUBRIC = ROOT / "runs" / "evidence" / "rubric.md"
CRITERIA, QUESTIONS = ("grammar", "consistency", "plot"), ("child", "text")
ANSWERS = {
    **dict.fromkeys(CRITERIA, range(11)),
    **dict.fromkeys(QUESTIONS, ("a", "b", "tie")),
    "kind": ("child", "other", "none"),
    "ends": ("yes", "no"),
}
RATERS = {"alone": ("r1", "r2"), "pairs-a": ("r1",), "pairs-b": ("r2",), "ladder": ("r1", "r2")}  # by kind of sheet
XL, SAME, OWN = "GPT2-XL", "BLM, same decoding", "BLM, own decoding"
ARMS = (XL, SAME, OWN, "ChatGPT", "329 M peer", "real")
# Millions of parameters with embeddings, from the published shapes (50,257 pieces, 8 layers of width 64, 256 and 512).
RUNGS = {"TinyStories-1M": 3.7, "TinyStories-8M": 19.7, "TinyStories-28M": 52.0}
DECODINGS = {
    SAME: Sampling(temperature=1.0, top_k=50, top_p=1.0, seed=1),
    OWN: Sampling(temperature=0.8, top_k=0, top_p=0.95, seed=1),
}
COHERENT = 5  # mean mark for consistency from which on a story for a small child counts
NOTHING = Interval(math.nan, math.nan, math.nan)


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
    return text[: max((end for end in ends if len(text[:end].split()) <= limit), default=ends[0])]


def match_lengths(texts: Sequence[Text], yardstick: Sequence[Text]) -> list[Text]:
    """`texts`, the n-th longest cut to the words of the n-th longest of `yardstick`, in the order given."""
    found, order = list(texts), sorted(range(len(texts)), key=lambda i: -texts[i].n_words)
    for limit, i in zip(sorted((t.n_words for t in yardstick), reverse=True), order, strict=True):
        found[i] = replace(texts[i], text=cut(texts[i].text, limit))
    return found


def same_length(*texts: Text) -> tuple[Text, ...]:
    """Texts on one beginning, all cut to the words of the shortest."""
    limit = min(t.n_words for t in texts)
    return tuple(replace(t, text=cut(t.text, limit)) for t in texts)


def write_own(release: Path, wanted: Sequence[tuple[str, dict[str, str], int]]) -> list[dict]:
    """Completions by the model in `release`, without the prompts: for each (arm, prompts, n) `n` of each prompt.

    The arm decides the decoding; `revision` names the weights.
    """
    (model, tokenizer), revision = load_model(release), sha256(release / "model.safetensors")[:16]
    found = []
    for arm, prompts, n in wanted:
        names = [(name, i) for name in prompts for i in range(n)]
        texts = complete(model, tokenizer, [prompts[name] for name, _ in names], DECODINGS[arm])
        found += [
            {"id": f"{arm}/{name}/{i}", "arm": arm, "prompt": name, "sample": i, "completion": text, "revision": revision}
            for (name, i), text in zip(names, texts, strict=True)
        ]
    return found


def recorded(data: Path) -> list[dict]:
    """Other models' recorded completions of BEGINNING."""
    return read_lines(data / "once_upon_a_time.jsonl") + read_lines(data / "peers.jsonl")


def recorded_marks(data: Path) -> dict[str, dict]:
    """ChatGPT's marks for consistency and fluency, 0 to 10, of the texts of elexunix/dl2-bhw1, by the text's id."""
    marked = [r for r in recorded(data) if r["id"].startswith("elex-") and "judge_consistency" in r]
    return {r["id"]: {"consistency": r["judge_consistency"], "fluency": r["judge_fluency"]} for r in marked}


def arms(data: Path, valid: Path, own: Sequence[dict]) -> dict[str, list[Text]]:
    """The six arms of measure 1, treated and cut to GPT2-XL's lengths."""
    found = {
        arm: [Text(r["id"], arm, treated(r["prompt"] + r["completion"])) for r in recorded(data) if r["id"].startswith(start)]
        for arm, start in {XL: "elex-gpt2xl-", "ChatGPT": "elex-chatgpt-", "329 M peer": "elex-my-"}.items()
    }
    stories = (treated(s) for s in valid.read_text(encoding="utf-8").split("<|endoftext|>"))
    real = [(i, s) for i, s in enumerate(stories) if s.startswith(BEGINNING) and len(s.split()) >= SHORTEST]
    found["real"] = [Text(f"{valid.stem}-{i}", "real", s) for i, s in real]
    for arm in DECODINGS:
        once = [r for r in own if r["arm"] == arm and r["prompt"] == "once"]
        found[arm] = [Text(r["id"], arm, treated(BEGINNING + r["completion"])) for r in once]
    short = {arm: len(texts) for arm, texts in found.items() if len(texts) < TEXTS}
    if short:
        raise RatingsError(f"every arm needs {TEXTS} texts, found {short}.")
    return {arm: match_lengths(texts[:TEXTS], found[XL][:TEXTS]) for arm, texts in found.items()}


def measures(texts: dict[str, list[Text]]) -> dict[str, dict[str, list]]:
    """The measures of `text.measure` of every text of every arm; None where one is not defined."""
    found = {arm: measure([t.text for t in own]) for arm, own in texts.items()}
    return {
        arm: {name: [None if math.isnan(x) else round(float(x), 6) for x in values] for name, values in own.items()}
        for arm, own in found.items()
    }


def random_pairs(ours: Sequence[Text], theirs: Sequence[Text], seed: int) -> list[tuple[Text, Text]]:
    """Each of `theirs` with one of `ours` drawn without replacement, cut to one length; pairs under SHORTEST words fall out."""
    shuffled = list(ours)
    random.Random(seed).shuffle(shuffled)
    pairs = [same_length(*pair) for pair in zip(shuffled, theirs, strict=True)]
    return [pair for pair in pairs if min(t.n_words for t in pair) >= SHORTEST]


def longer_openings(data: Path) -> dict[str, dict]:
    """GPT2-XL's completions of longer openings with at least SHORTEST words, by id."""
    records = read_lines(data / "published_completions.jsonl") + read_lines(data / "published_completions_2.jsonl")
    longer = [r for r in records if len(r["prompt"].split()) > len(BEGINNING.split()) + 2]
    return {r["id"]: r for r in longer if len(r["completion"].split()) >= SHORTEST}


def ladder_prompts(data: Path) -> dict[str, dict[str, dict]]:
    """The first 40 story prompts by SHA-256, each with its records by model (TinyStories-1M, -8M, -28M)."""
    found: dict[str, dict[str, dict]] = {}
    for r in read_lines(data / "peers.jsonl"):
        if r["id"].startswith("tinyscalelab") and r["kind"] == "story":
            found.setdefault(r["prompt"], {}).setdefault(r["model"], r)
    whole = [prompt for prompt, by_model in found.items() if len(by_model) == len(RUNGS)]
    return {prompt: found[prompt] for prompt in sorted(whole, key=lambda p: text_sha256(p))[:40]}


def joined(prompt: str, completion: str) -> str:
    """The prompt and what follows, with a space between where neither has one."""
    glue = "" if not completion or completion[0] in " ,.;:!?'\n" or prompt[-1:].isspace() else " "
    return prompt + glue + completion


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


def numbered(kind: str, sheets: Sequence[Sequence]) -> dict[str, dict]:
    """The sheets of a set by name, each with its items by id: Texts or pairs of them. No item stands in a sheet twice."""
    found = {}
    for number, sheet in enumerate(sheets, 1):
        name = f"{kind}{number:02d}"
        if len(set(sheet)) < len(sheet):
            raise RatingsError(f"sheet {name} holds an item twice.")
        found[name] = {f"{name}-{i:02d}": item for i, item in enumerate(sheet, 1)}
    return found


def key_entry(item: Text | tuple[Text, Text]) -> dict:
    """Whose an item is, without its text."""
    if isinstance(item, tuple):
        return {"a": key_entry(item[0]), "b": key_entry(item[1]), "prompt": item[0].prompt}
    digest = text_sha256(item.text)[:16]
    return {"source": item.source, "arm": item.arm, "words": item.n_words, "sha256": digest}


def write_sheets(folder: Path, sheets: dict[str, dict]) -> None:
    """Write each sheet for each of its raters, who need nothing beside it, and TASKS.txt: all sheets and where answers go."""
    (folder / "answers").mkdir(parents=True, exist_ok=True)
    alone, pairs = re.findall(r"# Rubric: .*?\n\n(.*?)\nAnswer: `(.*?)`\n", RUBRIC.read_text(encoding="utf-8"), re.DOTALL)
    tasks = []
    for name, items in sheets.items():
        task, example = pairs if name.startswith("pairs") else alone
        shown = {
            i: f"A: {item[0].text}\n\nB: {item[1].text}" if isinstance(item, tuple) else item.text for i, item in items.items()
        }
        for rater in RATERS[name[:-2]]:
            path, answers = folder / f"{name}-{rater}.md", folder / "answers" / f"{name}-{rater}.jsonl"
            head = (
                f"# {len(items)} items to judge\n\n{task}\nWrite one line of JSON for each item, in the order of the sheet and "
                f"for all {len(items)} of them, to {answers}. A line looks like this:\n\n    {example}\n\n"
                "Read every text to its end before you judge it, and judge yourself, not by a program. "
                "Use nothing but this sheet.\n"
            )
            with written_aside(path) as aside:
                aside.write_text("\n".join([head, *(f"## {i}\n\n{text}\n" for i, text in shown.items())]), encoding="utf-8")
            tasks.append(f"{path} {answers}\n")
    (folder / "TASKS.txt").write_text("".join(tasks))


def make(release: Path, data: Path, valid: Path, folder: Path, evidence: Path) -> dict:
    """Write our texts, the key and numbers of all texts to `evidence`, all sheets and TASKS.txt to `folder`; items by set.

    Raises RatingsError where `evidence` holds the key of other sheets, or marks without a key: they would lose their meaning.
    """
    longer, ladder = longer_openings(data), ladder_prompts(data)
    rungs = {next(iter(by_model.values()))["id"]: prompt for prompt, by_model in ladder.items()}
    once = {"once": BEGINNING}
    openings = {name: r["prompt"] for name, r in longer.items()}
    own = write_own(release, [(SAME, once, TEXTS), (OWN, once, TEXTS), (SAME, openings, 1), (OWN, rungs, 1)])
    ours = {(r["arm"], r["prompt"]): r for r in own}
    texts = arms(data, valid, own)

    pairs = random_pairs(texts[SAME], texts[XL], seed=2)
    bare = len(pairs)
    for name, prompt in openings.items():
        both = {SAME: ours[SAME, name], XL: longer[name]}
        pair = same_length(*(Text(r["id"], arm, treated(joined(prompt, r["completion"])), name) for arm, r in both.items()))
        if min(t.n_words for t in pair) - len(prompt.split()) >= SHORTEST:
            pairs.append(pair)
    swap = random.Random(4)
    first = [pair if swap.random() < 0.5 else pair[::-1] for pair in pairs]

    rows = []
    for name, prompt in rungs.items():
        four = [(f"{model}/{r['id']}", model, r) for model, r in ladder[prompt].items()]
        four.append((ours[OWN, name]["id"], OWN, ours[OWN, name]))
        rows.append(same_length(*(Text(i, arm, treated(joined(prompt, r["completion"])), name) for i, arm, r in four)))
    steps = [[t for row in rows[i::5] for t in row] for i in range(5)]
    for i, sheet in enumerate(steps):
        random.Random(f"ladder/{i}").shuffle(sheet)

    sheets = numbered("alone", in_sheets([t for arm in texts.values() for t in arm], 12, 12, seed=3))
    sheets |= numbered("pairs-a", in_sheets(first, 3, 6, seed=5))
    sheets |= numbered("pairs-b", in_sheets([pair[::-1] for pair in first], 3, 6, seed=6))
    sheets |= numbered("ladder", steps)
    key = {name: {i: key_entry(item) for i, item in items.items()} for name, items in sheets.items()}
    marks = evidence / "ratings" / "sheets.json"
    if read_json(evidence / "key.json", {} if marks.exists() else key) != key:
        raise RatingsError(f"{evidence} holds the key or the marks of other sheets. Name another folder, or move both away.")
    write_sheets(folder, sheets)
    write_json(evidence / "key.json", key)
    (evidence / "rubric.md").write_text(RUBRIC.read_text(encoding="utf-8"), encoding="utf-8")
    write_json(evidence / "measures.json", measures(texts))
    write_json(evidence / "chatgpt_marks.json", recorded_marks(data))
    write_json_lines(evidence / "blm_texts.jsonl", own)
    counts = {"bare pairs": bare, "longer pairs": len(pairs) - bare, "ladder": len(rows) * 4}
    return {"texts": {arm: len(of) for arm, of in texts.items()}, **counts}


def problems(answers: Sequence[dict], key: dict) -> list[str]:
    """What is wrong with the answers to a sheet, of which `key` is the part of the key; nothing where they are whole."""
    fields = set(QUESTIONS) if all("a" in item for item in key.values()) else {"kind", "ends", *CRITERIA}
    counts = Counter(str(answer.get("id")) for answer in answers)
    found = [f"{name} is missing" for name in key if not counts[name]]
    found += [f"{name} is answered {n} times" for name, n in counts.items() if n > 1]
    found += [f"{name!r} is not on the sheet" for name in counts if name not in key]
    for answer in answers:
        if set(answer) != {"id", *fields}:
            found.append(f"{answer.get('id')} has the fields {', '.join(sorted(answer))}")
        for name in fields & set(answer):
            if type(answer[name]) not in (int, str) or answer[name] not in ANSWERS[name]:
                known = ", ".join(map(str, ANSWERS[name]))
                found.append(f"{answer.get('id')}: {name} is {answer[name]!r}, not one of {known}")
    return found


def take_in(folder: Path, evidence: Path, rater: str, date: str) -> dict[str, str]:
    """Copy every whole answer of `folder` to `evidence`/ratings, and note rater, date and the sheet's SHA-256 in sheets.json.

    What was taken before stays as it is. Returns the reason for each sheet that was not taken, for a broken one its first
    three problems. Raises RatingsError for a sheet that was taken before with other marks.
    """
    key, noted = read_json(evidence / "key.json", {}), read_json(evidence / "ratings" / "sheets.json", {})
    left = {}
    for sheet in sorted(folder.glob("*.md")):
        name, target = sheet.stem, evidence / "ratings" / f"{sheet.stem}.jsonl"
        try:
            lines = read_lines(folder / "answers" / f"{name}.jsonl")
            wrong = problems(lines, key[name.rsplit("-", 1)[0]])
        except FileNotFoundError:
            wrong = ["not answered"]
        except KeyError:
            wrong = [f"the sheet is not in {evidence / 'key.json'}"]
        except ValueError as error:
            wrong = [f"no lines of JSON objects ({error})"]
        if wrong:
            left[name] = "; ".join(wrong[:3])
            continue
        lines.sort(key=lambda line: line["id"])
        if target.exists():
            if read_lines(target) != lines:
                raise RatingsError(f"{target} holds other marks. A sheet is taken once; move the file to take it anew.")
            continue
        write_json_lines(target, lines)
        noted[name] = {"rater": rater, "date": date, "items": len(lines), "sha256": sha256(sheet)}
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
        text = "Answer with the lines of JSON, in this conversation, and nothing else.\n\n" + sheet.read_text(encoding="utf-8")
        try:
            reply = client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], temperature=0)
        except OpenAIError as error:
            failed[sheet.stem] = f"{type(error).__name__}: {error}"
            continue
        lines = [line.strip() for line in (reply.choices[0].message.content or "").splitlines()]
        with written_aside(target) as aside:
            aside.write_text("".join(f"{line}\n" for line in lines if line.startswith("{")), encoding="utf-8")
    return failed


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
    """A text of the BLM and one of GPT2-XL: for each of the two orders, the BLM's side ("a" or "b") and the answer."""

    blm: str
    xl: str
    prompt: str
    orders: tuple[tuple[str, dict], tuple[str, dict]]

    @property
    def points(self) -> dict[str, tuple[float, float]]:
        """By question, of the BLM in each order: 1 for a win, 0.5 for a tie."""
        return {question: tuple(_points(answer[question], side) for side, answer in self.orders) for question in QUESTIONS}

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
    answered, and pairs without both orders, are left out: `sheets` says how many sheets were rated and how many there are.
    """

    def __init__(self, evidence: Path):
        key = read_json(evidence / "key.json")
        self.noted = read_json(evidence / "ratings" / "sheets.json", {})
        self.sheets = (len(self.noted), sum(len(RATERS[sheet[:-2]]) for sheet in key))
        given = {name: {a["id"]: a for a in read_lines(evidence / "ratings" / f"{name}.jsonl")} for name in self.noted}
        texts: list[Rated] = []
        pairs: dict[tuple[str, str, str], dict[str, list]] = {}  # by both texts and order, each in one sheet or two
        for sheet, items in key.items():
            by_rater = [given.get(f"{sheet}-{rater}", {}) for rater in RATERS[sheet[:-2]]]
            for name, item in items.items():
                answers = tuple(of[name] for of in by_rater if name in of)
                if len(answers) < len(by_rater):
                    continue
                if "a" not in item:
                    texts.append(Rated(item["source"], item["arm"], sheet, answers))
                    continue
                side, other = "ab" if item["a"]["arm"] == SAME else "ba"
                both = item[side]["source"], item[other]["source"], item["prompt"]
                pairs.setdefault(both, {}).setdefault(sheet[:-2], []).append((side, *answers))
        once = list({t.source: t for t in sorted(texts, key=lambda t: t.sheet, reverse=True)}.values())[::-1]
        self.alone, self.ladder = ([t for t in once if t.sheet.startswith(kind)] for kind in ("alone", "ladder"))
        self.pairs = [Pair(*both, (of["pairs-a"][0], of["pairs-b"][0])) for both, of in pairs.items() if len(of) == 2]
        seen: dict[str, list] = {}
        for t in texts:
            seen.setdefault(t.source, []).append(t.answers)
        self.repeated = [answers for answers in seen.values() if len(answers) == 2]
        self.repeated_pairs = [
            [answer for _, answer in twice] for of in pairs.values() for twice in of.values() if len(twice) == 2
        ]

    def arm(self, name: str) -> list[Rated]:
        return [t for t in self.alone if t.arm == name]

    def share(self, arm: str, threshold: float = COHERENT) -> Interval:
        """The share of an arm's texts that count under measure 1."""
        return _interval(mean_interval, [t.counts(threshold) for t in self.arm(arm)])

    def share_difference(self, threshold: float = COHERENT, arm: str = SAME) -> Interval:
        """Measure 1: the share of `arm` minus GPT2-XL's, each resampled by its own texts."""
        return _interval(difference_interval, *([t.counts(threshold) for t in self.arm(a)] for a in (arm, XL)))

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
        found = [
            _line("1 stories that hang together, BLM minus GPT2-XL", self.share_difference(), len(self.arm(SAME))),
            _win("2 which would you read to a child?", self.bare_pairs(), "child"),
            _win("better as text, whatever its kind", self.bare_pairs(), "text"),
            _win("fair fight: read to a child", self.fair_pairs(), "child"),
            _win("fair fight: better as text", self.fair_pairs(), "text"),
            _win("longer openings: read to a child", self.longer_pairs(), "child"),
            _win("longer openings: better as text", self.longer_pairs(), "text"),
            _line("stories that hang together, own decoding", self.share_difference(arm=OWN), len(self.arm(OWN))),
        ]
        for criterion in CRITERIA:
            both = [[t.mark(criterion) for t in self.arm(arm)] for arm in (SAME, XL)]
            marks = _line(f"{criterion}, BLM minus GPT2-XL", _interval(difference_interval, *both), len(both[0]), "marks")
            found.append(replace(marks, verdict="no decision"))  # the protocol reports mean marks without one
        rungs = self.rungs().values()
        for rung in RUNGS:
            both = [[np.mean([of[arm].mark(c) for c in CRITERIA]) for of in rungs] for arm in (OWN, rung)]
            gap = _interval(paired_difference, *both)
            found.append(_line(f"mean mark, BLM minus {rung}", gap, len(rungs), "marks"))
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
        from krippendorff import alpha
        from sklearn.metrics import cohen_kappa_score

        given = [t.answers for t in self.alone + self.ladder]
        both = {name: np.array([[answer[name] for answer in of] for of in given]).T for name in ("kind", "ends", *CRITERIA)}
        points = {name: np.array([p.points[name] for p in self.pairs]).T.astype(str) for name in QUESTIONS}
        found = {f"{name}, kappa": cohen_kappa_score(*both[name]) for name in ("kind", "ends")}
        found |= {f"{name}, alpha": alpha(both[name].astype(float), level_of_measurement="interval") for name in CRITERIA}
        found |= {f"{name}, kappa of the two orders": cohen_kappa_score(*points[name]) for name in QUESTIONS}
        return {name: float(value) for name, value in found.items()}

    def noise(self) -> dict[str, float]:
        """Texts and pairs that stand in two sheets: mean distance of their marks, and how often the answers are the same."""
        answers = [both for first, second in self.repeated for both in zip(first, second, strict=True)]
        found = {name: [abs(x[name] - y[name]) for x, y in answers] for name in CRITERIA}
        found["same kind"] = [x["kind"] == y["kind"] for x, y in answers]
        found["same preference"] = [x["child"] == y["child"] for x, y in self.repeated_pairs]
        means = {name: float(np.mean(values)) if values else math.nan for name, values in found.items()}
        return {"texts": len(self.repeated), "pairs": len(self.repeated_pairs), **means}

    def position_pull(self, question: str = "child") -> Interval:
        """How often the text shown first is preferred, over both orders; 0.5 is no pull."""
        first = [[_points(answer[question], "a") for _, answer in p.orders] for p in self.pairs]
        return _interval(mean_interval, [np.mean(both) for both in first])

    def validity(self, marks: dict[str, dict]) -> dict[str, float]:
        """Spearman's correlation of the mean marks with ChatGPT's recorded ones: consistency, and fluency with grammar."""
        from scipy.stats import spearmanr

        texts = [t for t in self.alone if t.source in marks]
        found: dict[str, float] = {"texts": len(texts)}
        for theirs, ours in (("consistency", "consistency"), ("fluency", "grammar")):
            both = [t.mark(ours) for t in texts], [marks[t.source][theirs] for t in texts]
            found[theirs] = float(spearmanr(*both).statistic) if len(texts) > 2 else math.nan
        return found


def _points(preferred: str, side: str) -> float:
    return 0.5 if preferred == "tie" else float(preferred == side)


def _interval(of, *values: Sequence[float]) -> Interval:
    return of(*values) if all(map(len, values)) else NOTHING


def _line(name: str, gap: Interval, n: int, unit: str = "points of 100") -> Line:
    scale = 100 if unit == "points of 100" else 1
    result = verdict(gap.low, gap.high, "higher") if n else "not rated yet"
    return Line(name, *(scale * end for end in gap), result, n, unit)


def _win(name: str, pairs: Sequence[Pair], question: str) -> Line:
    """The share of wins minus one half."""
    rate = _interval(mean_interval, [p.value(question) for p in pairs])
    return _line(name, Interval(*(end - 0.5 for end in rate)), len(pairs))


def earlier_by_kind(evidence: Path) -> dict[str, dict]:
    """Preferences of an earlier trial over GPT2-XL by kind of beginning, and "all": prompts, wins, ties, losses, rate.

    They were given to the release before this one, of 3.2 M parameters (revision in key1.json). The rate is the mean
    over prompts of each prompt's mean, a tie counting one half, with its interval over prompts.
    """
    marks = [m for path in sorted((evidence / "ratings").glob("shuffle-*.jsonl")) for m in read_lines(path)]
    marks = [m for m in marks if {m["first"], m["second"]} == {"BLM", "gpt2-xl"}]
    found = {}
    for kind in ("all", *sorted({m["kind"] for m in marks})):
        prompts: dict[str, list[float]] = {}
        for m in marks:
            if kind in ("all", m["kind"]):
                side = "first" if m["first"] == "BLM" else "second"
                prompts.setdefault(m["prompt"], []).append(_points(m["preferred"], side))
        points = [p for of in prompts.values() for p in of]
        counts = {name: points.count(value) for name, value in (("wins", 1.0), ("ties", 0.5), ("losses", 0.0))}
        rate = _interval(mean_interval, [float(np.mean(prompts[prompt])) for prompt in sorted(prompts)])
        found[kind] = {"prompts": len(prompts), **counts, "rate": rate}
    return found
