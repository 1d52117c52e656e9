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
from collections import Counter, namedtuple
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from blm_core.checkpoint import load_model
from blm_core.clean import normalise
from blm_core.config import ROOT, ConfigError
from blm_core.evaluate import Interval, difference_interval, mean_interval, paired_difference, verdict
from blm_core.evidence.text import measure
from blm_core.files import read_json, read_json_lines, sha256, text_sha256, write_json, write_json_lines, written_aside
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


def cut(text: str, limit: float = math.inf) -> str:
    """`text` up to its last full stop within `limit` words, at least its first sentence; all of it where there is no stop."""
    ends = [match.end() for match in SENTENCE_END.finditer(text)] or [len(text)]
    return text[: max((end for end in ends if len(text[:end].split()) <= limit), default=ends[0])]


def treated(text: str) -> str:
    """One line in ASCII typography, case kept, cut after the last full stop."""
    return cut(" ".join(normalise(text).split()))


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
    """Completions by the model in `release`: for each (arm, prompts, n) `n` of each prompt; `revision` names the weights."""
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


def recorded(data: Path, *names: str) -> list[dict]:
    """Other models' recorded completions in the files called `names`."""
    return [record for name in names for record in read_json_lines(data / f"{name}.jsonl")]


def recorded_marks(data: Path) -> dict[str, dict]:
    """ChatGPT's marks for consistency and fluency, 0 to 10, of the texts of elexunix/dl2-bhw1, by the text's id."""
    return {
        r["id"]: {"consistency": r["judge_consistency"], "fluency": r["judge_fluency"]}
        for r in recorded(data, "once_upon_a_time", "peers")
        if r["id"].startswith("elex-") and "judge_consistency" in r
    }


def arms(data: Path, valid: Path, own: Sequence[dict]) -> dict[str, list[Text]]:
    """The six arms of measure 1, treated and cut to GPT2-XL's lengths."""
    once = recorded(data, "once_upon_a_time", "peers")
    found = {
        arm: [Text(r["id"], arm, treated(r["prompt"] + r["completion"])) for r in once if r["id"].startswith(start)]
        for arm, start in {XL: "elex-gpt2xl-", "ChatGPT": "elex-chatgpt-", "329 M peer": "elex-my-"}.items()
    }
    stories = [treated(story) for story in valid.read_text(encoding="utf-8").split("<|endoftext|>")]
    found["real"] = [
        Text(f"{valid.stem}-{i}", "real", story)
        for i, story in enumerate(stories)
        if story.startswith(BEGINNING) and len(story.split()) >= SHORTEST
    ]
    for arm in DECODINGS:
        ours = [r for r in own if r["arm"] == arm and r["prompt"] == "once"]
        found[arm] = [Text(r["id"], arm, treated(BEGINNING + r["completion"])) for r in ours]
    short = {arm: len(texts) for arm, texts in found.items() if len(texts) < TEXTS}
    if short:
        raise ValueError(f"every arm needs {TEXTS} texts, found {short}.")
    return {arm: match_lengths(texts[:TEXTS], found[XL][:TEXTS]) for arm, texts in found.items()}


def measures(texts: dict[str, list[Text]]) -> dict[str, dict[str, list]]:
    """The measures of `text.measure` of every text of every arm; None where one is not defined."""
    found = {arm: measure([t.text for t in own]) for arm, own in texts.items()}
    return {
        arm: {name: [None if math.isnan(x) else round(float(x), 6) for x in values] for name, values in own.items()}
        for arm, own in found.items()
    }


def longer_openings(data: Path) -> dict[str, dict]:
    """GPT2-XL's completions of longer openings with at least SHORTEST words, by id."""
    records = recorded(data, "published_completions", "published_completions_2")
    longer = [r for r in records if len(r["prompt"].split()) > len(BEGINNING.split()) + 2]
    return {r["id"]: r for r in longer if len(r["completion"].split()) >= SHORTEST}


def ladder_prompts(data: Path) -> dict[str, dict[str, dict]]:
    """The first 40 story prompts by SHA-256, each with its records by model (TinyStories-1M, -8M, -28M)."""
    found: dict[str, dict[str, dict]] = {}
    for r in recorded(data, "peers"):
        if r["id"].startswith("tinyscalelab") and r["kind"] == "story":
            found.setdefault(r["prompt"], {}).setdefault(r["model"], r)
    whole = [prompt for prompt, by_model in found.items() if len(by_model) == len(RUNGS)]
    return {prompt: found[prompt] for prompt in sorted(whole, key=text_sha256)[:40]}


def on_one_prompt(prompt: str, name: str, records: Sequence[tuple[str, str, dict]]) -> tuple[Text, ...]:
    """Prompt and completion of each (source, arm, record), all cut to one length; `name` is the prompt's id."""
    texts = []
    for source, arm, record in records:
        completion = record["completion"]
        glue = "" if prompt[-1:].isspace() or completion[:1] in " ,.;:!?'\n" else " "
        texts.append(Text(source, arm, treated(prompt + glue + completion), name))
    return same_length(*texts)


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


def key_entry(texts: Sequence[Text]) -> dict:
    """Whose the text or the two texts of an item are, without their words."""
    a, *b = ({"source": t.source, "arm": t.arm, "words": t.n_words, "sha256": text_sha256(t.text)[:16]} for t in texts)
    return {"a": a, "b": b[0], "prompt": texts[0].prompt} if b else a


def write_sheets(folder: Path, sheets: dict[str, dict[str, Sequence[Text]]]) -> None:
    """Write each sheet for each of its raters, who need nothing beside it."""
    (folder / "answers").mkdir(parents=True, exist_ok=True)
    alone, pairs = re.findall(r"# Rubric: .*?\n\n(.*?)\nAnswer: `(.*?)`\n", RUBRIC.read_text(encoding="utf-8"), re.DOTALL)
    for name, items in sheets.items():
        task, example = pairs if name.startswith("pairs") else alone
        labels = ("A: ", "B: ") if name.startswith("pairs") else ("",)
        shown = {i: "\n\n".join(x + t.text for x, t in zip(labels, texts, strict=True)) for i, texts in items.items()}
        for rater in RATERS[name[:-2]]:
            head = (
                f"# {len(items)} items to judge\n\n{task}\nWrite one line of JSON for each item, in the order of the sheet and "
                f"for all {len(items)} of them, to {folder / 'answers' / f'{name}-{rater}.jsonl'}. A line looks like this:\n\n"
                f"    {example}\n\nRead every text to its end before you judge it, and judge yourself, not by a program. "
                "Use nothing but this sheet.\n"
            )
            with written_aside(folder / f"{name}-{rater}.md") as aside:
                aside.write_text("\n".join([head, *(f"## {i}\n\n{text}\n" for i, text in shown.items())]), encoding="utf-8")


def make(release: Path, data: Path, valid: Path, folder: Path, evidence: Path) -> None:
    """Write all sheets to `folder`, and our texts, the key and numbers of all texts to `evidence`.

    Raises ValueError where `evidence` holds the key of other sheets, or marks without a key: they would lose their meaning.
    """
    longer, ladder = longer_openings(data), ladder_prompts(data)
    openings = {name: record["prompt"] for name, record in longer.items()}
    rungs = {next(iter(by_model.values()))["id"]: prompt for prompt, by_model in ladder.items()}
    once = {"once": BEGINNING}
    own = write_own(release, [(SAME, once, TEXTS), (OWN, once, TEXTS), (SAME, openings, 1), (OWN, rungs, 1)])
    ours = {(r["arm"], r["prompt"]): (r["id"], r["arm"], r) for r in own}
    texts = arms(data, valid, own)

    drawn = list(texts[SAME])
    random.Random(2).shuffle(drawn)
    pairs = [(same_length(*pair), 0) for pair in zip(drawn, texts[XL], strict=True)]
    for name, prompt in openings.items():
        pairs.append((on_one_prompt(prompt, name, [ours[SAME, name], (name, XL, longer[name])]), len(prompt.split())))
    pairs = [pair for pair, given in pairs if min(t.n_words for t in pair) - given >= SHORTEST]
    swap = random.Random(4)
    first = [pair if swap.random() < 0.5 else pair[::-1] for pair in pairs]

    rows = []  # the four texts of a prompt of the ladder stand in one sheet
    for name, prompt in rungs.items():
        theirs = [(f"{model}/{r['id']}", model, r) for model, r in ladder[prompt].items()]
        rows.append(on_one_prompt(prompt, name, [*theirs, ours[OWN, name]]))
    steps = [[(t,) for row in rows[i::5] for t in row] for i in range(5)]
    for i, sheet in enumerate(steps):
        random.Random(f"ladder/{i}").shuffle(sheet)

    kinds = {
        "alone": in_sheets([(t,) for arm in texts.values() for t in arm], 12, 12, seed=3),
        "pairs-a": in_sheets(first, 3, 6, seed=5),
        "pairs-b": in_sheets([pair[::-1] for pair in first], 3, 6, seed=6),
        "ladder": steps,
    }
    named = {f"{kind}{n:02d}": sheet for kind, sheets in kinds.items() for n, sheet in enumerate(sheets, 1)}
    sheets = {name: {f"{name}-{i:02d}": item for i, item in enumerate(sheet, 1)} for name, sheet in named.items()}
    key = {name: {i: key_entry(item) for i, item in items.items()} for name, items in sheets.items()}
    marks = evidence / "ratings" / "sheets.json"
    if read_json(evidence / "key.json", {} if marks.exists() else key) != key:
        raise ValueError(f"{evidence} holds the key or the marks of other sheets. Name another folder, or move both away.")
    write_sheets(folder, sheets)
    write_json(evidence / "key.json", key)
    write_json(evidence / "measures.json", measures(texts))
    write_json(evidence / "chatgpt_marks.json", recorded_marks(data))
    write_json_lines(evidence / "blm_texts.jsonl", own)


def problems(answers: Sequence[dict], key: dict) -> list[str]:
    """What is wrong with the answers to a sheet, of which `key` is the part of the key; nothing where they are whole."""
    fields = {"id", *(QUESTIONS if all("a" in item for item in key.values()) else ("kind", "ends", *CRITERIA))}
    counts = Counter(str(answer.get("id")) for answer in answers)
    found = [f"{name} is answered {counts[name]} times" for name in key if counts[name] != 1]
    found += [f"{name!r} is not on the sheet" for name in counts if name not in key]
    for answer in answers:
        if answer.keys() != fields:
            found.append(f"{answer.get('id')} has the fields {', '.join(sorted(answer))}, not {', '.join(sorted(fields))}")
        for name in answer.keys() & ANSWERS.keys():
            known = list(map(repr, ANSWERS[name]))  # as text, since 6.0 and True are no marks
            if repr(answer[name]) not in known:
                found.append(f"{answer.get('id')}: {name} is {answer[name]!r}, not one of {', '.join(known)}")
    return found


def take_in(folder: Path, evidence: Path, rater: str, date: str) -> None:
    """Copy every whole answer of `folder` to `evidence`/ratings, and note rater, date and the sheet's SHA-256 in sheets.json.

    Raises ValueError for a sheet that is not in the key or was taken before with other marks, for lines that are no JSON,
    and at the end for the sheets that lack answers, with what is wrong.
    """
    key, taken, left = read_json(evidence / "key.json", {}), evidence / "ratings", []
    noted = read_json(taken / "sheets.json", {})
    for sheet in sorted(folder.glob("*.md")):
        name, answers, target = sheet.stem, folder / "answers" / f"{sheet.stem}.jsonl", taken / f"{sheet.stem}.jsonl"
        if name[:-3] not in key:
            raise ValueError(f"{sheet} is not in {evidence / 'key.json'}.")
        lines = list(read_json_lines(answers)) if answers.exists() else []
        if wrong := problems(lines, key[name[:-3]]):
            left.append(f"{name}: {'; '.join(wrong[:3])}")
            continue
        lines.sort(key=lambda line: line["id"])
        if not target.exists():
            write_json_lines(target, lines)
            noted[name] = {"rater": rater, "date": date, "items": len(lines), "sha256": sha256(sheet)}
            write_json(taken / "sheets.json", dict(sorted(noted.items())))
        elif list(read_json_lines(target)) != lines:
            raise ValueError(f"{target} holds other marks. A sheet is taken once; move the file to take it anew.")
    if left:
        raise ValueError(f"{len(left)} sheets were not taken.\n" + "\n".join(left))


def ask(folder: Path) -> None:
    """Let the server BLM_JUDGE_URL answer every sheet of `folder` without an answer, each in a conversation of its own.

    Raises ConfigError where the server is not named, and ValueError where it does not answer.
    """
    from openai import OpenAI, OpenAIError

    url, model, key = map(os.environ.get, ("BLM_JUDGE_URL", "BLM_JUDGE_MODEL", "BLM_JUDGE_KEY"))
    if not url or not model:
        raise ConfigError("BLM_JUDGE_URL (such as http://localhost:8080/v1) and BLM_JUDGE_MODEL must be set.")
    client = OpenAI(base_url=url, api_key=key or "none")
    for sheet in sorted(folder.glob("*.md")):
        target = folder / "answers" / f"{sheet.stem}.jsonl"
        if target.exists():
            continue
        text = "Answer with the lines of JSON, in this conversation, and nothing else.\n\n" + sheet.read_text(encoding="utf-8")
        try:
            reply = client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], temperature=0)
        except OpenAIError as error:
            raise ValueError(f"{url} did not answer {sheet.name}: {type(error).__name__}: {error}") from error
        lines = [line.strip() for line in (reply.choices[0].message.content or "").splitlines()]
        with written_aside(target) as aside:
            aside.write_text("".join(f"{line}\n" for line in lines if line.startswith("{")), encoding="utf-8")


@dataclass(frozen=True)
class Rated:
    """A text and its two raters' answers, r1's first."""

    source: str
    arm: str
    sheet: str
    answers: tuple[dict, dict]

    def mark(self, *criteria: str) -> float:
        """The mean over both raters, and over several criteria where they are given."""
        return float(np.mean([sum(answer[name] for answer in self.answers) / 2 for name in criteria]))

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

    def points(self, question: str) -> tuple[float, float]:
        """Of the BLM in each order: 1 for a win, 0.5 for a tie."""
        return tuple(_points(answer[question], side) for side, answer in self.orders)


def win_rate(pairs: Sequence[Pair], question: str) -> Interval:
    """The BLM's share of wins, over pairs that count with the mean of both orders."""
    return mean_interval([sum(p.points(question)) / 2 for p in pairs])


# One line of evidence: `value` with its interval, in `unit` ("points of 100", "marks"); right of 0 speaks for the BLM.
Line = namedtuple("Line", "name value low high verdict n unit")


class Ratings:
    """The committed marks of `evidence`: `alone` and `ladder` by text, `pairs` by pair.

    What stands in two sheets counts with the first of them; `repeated` and `repeated_pairs` hold both answers. Raises
    ValueError where a sheet is not rated.
    """

    def __init__(self, evidence: Path):
        key, self.noted = read_json(evidence / "key.json", {}), read_json(evidence / "ratings" / "sheets.json", {})
        wanted = {f"{sheet}-{rater}" for sheet in key for rater in RATERS[sheet[:-2]]}
        if not wanted or wanted - self.noted.keys():
            raise ValueError(f"{evidence}: {len(wanted & self.noted.keys())} of {len(wanted)} sheets are rated.")
        texts: list[Rated] = []
        twice: dict[str, list] = {}
        pairs: dict[tuple, dict[str, list]] = {}  # by both texts; then by order, in one sheet or two
        for sheet, items in key.items():
            files = [evidence / "ratings" / f"{sheet}-{rater}.jsonl" for rater in RATERS[sheet[:-2]]]
            by_rater = [{answer["id"]: answer for answer in read_json_lines(file)} for file in files]
            for name, item in items.items():
                answers = tuple(of[name] for of in by_rater)
                if "a" in item:
                    side, other = "ab" if item["a"]["arm"] == SAME else "ba"
                    both = item[side]["source"], item[other]["source"], item["prompt"]
                    pairs.setdefault(both, {}).setdefault(sheet[:-2], []).append((side, *answers))
                else:
                    texts.append(Rated(item["source"], item["arm"], sheet, answers))
                    twice.setdefault(item["source"], []).append(answers)
        # This order of the texts is the one that the committed intervals were drawn in.
        once = list({t.source: t for t in sorted(texts, key=lambda t: t.sheet, reverse=True)}.values())[::-1]
        self.alone, self.ladder = ([t for t in once if t.sheet.startswith(kind)] for kind in ("alone", "ladder"))
        self.pairs = [Pair(*both, (of["pairs-a"][0], of["pairs-b"][0])) for both, of in pairs.items()]
        self.repeated = [answers for answers in twice.values() if len(answers) == 2]
        self.repeated_pairs = [given for of in pairs.values() for given in of.values() if len(given) == 2]

    def arm(self, name: str) -> list[Rated]:
        return [t for t in self.alone if t.arm == name]

    def share(self, arm: str, threshold: float = COHERENT) -> Interval:
        """The share of an arm's texts that count under measure 1."""
        return mean_interval([t.counts(threshold) for t in self.arm(arm)])

    def share_difference(self, threshold: float = COHERENT, arm: str = SAME) -> Interval:
        """Measure 1: the share of `arm` minus GPT2-XL's, each resampled by its own texts."""
        return difference_interval(*([t.counts(threshold) for t in self.arm(a)] for a in (arm, XL)))

    def groups(self) -> dict[str, list[Pair]]:
        """The pairs by beginning; in the fair fight those of the first whose GPT2-XL text both raters called a story."""
        stories = {t.source for t in self.arm(XL) if t.a_story}
        bare = [p for p in self.pairs if not p.prompt]
        fair, longer = [p for p in bare if p.xl in stories], [p for p in self.pairs if p.prompt]
        return {BEGINNING: bare, "the fair fight": fair, "longer openings": longer}

    def rungs(self) -> dict[str, dict[str, Rated]]:
        """The ladder's texts by prompt and arm."""
        found: dict[str, dict[str, Rated]] = {}
        for t in self.ladder:
            found.setdefault(t.source.split("/")[1], {})[t.arm] = t
        return found

    def lines(self) -> list[Line]:
        """All lines that the raters decide, the two primaries first."""
        found: list[Line] = []

        def add(name: str, gap: Sequence[float], n: int, unit: str = "points of 100") -> None:
            scale = 100 if unit == "points of 100" else 1
            found.append(Line(name, *(scale * end for end in gap), verdict(*gap[1:], "higher"), n, unit))

        def add_wins(name: str, group: str, question: str) -> None:
            pairs = self.groups()[group]
            add(name, [end - 0.5 for end in win_rate(pairs, question)], len(pairs))

        add("1 stories that hang together, BLM minus GPT2-XL", self.share_difference(), len(self.arm(SAME)))
        add_wins("2 which would you read to a child?", BEGINNING, "child")
        add_wins("better as text, whatever its kind", BEGINNING, "text")
        add_wins("fair fight: read to a child", "the fair fight", "child")
        add_wins("fair fight: better as text", "the fair fight", "text")
        add_wins("longer openings: read to a child", "longer openings", "child")
        add_wins("longer openings: better as text", "longer openings", "text")
        add("stories that hang together, own decoding", self.share_difference(arm=OWN), len(self.arm(OWN)))
        for criterion in CRITERIA:
            both = [[t.mark(criterion) for t in self.arm(arm)] for arm in (SAME, XL)]
            add(f"{criterion}, BLM minus GPT2-XL", difference_interval(*both), len(both[0]), "marks")
            found[-1] = found[-1]._replace(verdict="no decision")  # the protocol reports mean marks without one
        rungs = self.rungs().values()
        for rung in RUNGS:
            both = [[of[arm].mark(*CRITERIA) for of in rungs] for arm in (OWN, rung)]
            add(f"mean mark, BLM minus {rung}", paired_difference(*both), len(rungs), "marks")
        return found

    def outcome(self) -> str:
        """The claim by the protocol's rule: "made", "refuted", "undecided", or "not made" where the instrument fails."""
        first, second = (line.verdict for line in self.lines()[:2])
        if "loses" in (first, second):
            return "refuted"
        if self.share("real").value < 0.5:
            return "not made"
        return "made" if first == second == "wins" else "undecided"

    def agreement(self) -> dict[str, float]:
        """Cohen's kappa of kind, end and both preferences (the two orders), Krippendorff's alpha of the marks (interval)."""
        from krippendorff import alpha
        from sklearn.metrics import cohen_kappa_score

        def both(name: str) -> np.ndarray:  # (2, texts)
            return np.array([[answer[name] for answer in t.answers] for t in self.alone + self.ladder]).T

        found = {f"{name}, kappa": cohen_kappa_score(*both(name)) for name in ("kind", "ends")}
        found |= {f"{name}, alpha": alpha(both(name).astype(float), level_of_measurement="interval") for name in CRITERIA}
        for name in QUESTIONS:
            orders = np.array([p.points(name) for p in self.pairs]).T.astype(str)
            found[f"{name}, kappa of the two orders"] = cohen_kappa_score(*orders)
        return {name: float(value) for name, value in found.items()}

    def noise(self) -> dict[str, float]:
        """Texts and pairs that stand in two sheets: mean distance of their marks, and how often the answers are the same."""
        answers = [both for first, second in self.repeated for both in zip(first, second, strict=True)]
        found = {name: np.mean([abs(x[name] - y[name]) for x, y in answers]) for name in CRITERIA}
        found["same kind"] = np.mean([x["kind"] == y["kind"] for x, y in answers])
        found["same preference"] = np.mean([x["child"] == y["child"] for (_, x), (_, y) in self.repeated_pairs])
        return {"texts": len(self.repeated), "pairs": len(self.repeated_pairs), **{k: float(v) for k, v in found.items()}}

    def position_pull(self) -> Interval:
        """How often the text shown first is read to a child, over both orders; 0.5 is no pull."""
        return mean_interval([np.mean([_points(answer["child"], "a") for _, answer in p.orders]) for p in self.pairs])

    def validity(self, marks: dict[str, dict]) -> dict[str, float]:
        """Spearman's correlation of the mean marks with ChatGPT's recorded ones: consistency, and fluency with grammar."""
        from scipy.stats import spearmanr

        texts = [t for t in self.alone if t.source in marks]
        found: dict[str, float] = {"texts": len(texts)}
        for theirs, ours in (("consistency", "consistency"), ("fluency", "grammar")):
            found[theirs] = float(spearmanr([t.mark(ours) for t in texts], [marks[t.source][theirs] for t in texts]).statistic)
        return found


def _points(preferred: str, side: str) -> float:
    return 0.5 if preferred == "tie" else float(preferred == side)


def earlier_by_kind(evidence: Path) -> dict[str, dict]:
    """Preferences of an earlier trial over GPT2-XL by kind of beginning, and "all": prompts, wins, ties, losses, rate.

    They were given to the first release, of 3.2 M parameters. The rate is the mean over prompts of each prompt's mean, a
    tie counting one half, with its interval over prompts.
    """
    given = [mark for path in sorted((evidence / "ratings").glob("shuffle-*.jsonl")) for mark in read_json_lines(path)]
    given = [mark for mark in given if {mark["first"], mark["second"]} == {"BLM", "gpt2-xl"}]
    found = {}
    for kind in ("all", *sorted({mark["kind"] for mark in given})):
        marks = [mark for mark in given if kind in ("all", mark["kind"])]
        points = [_points(mark["preferred"], "first" if mark["first"] == "BLM" else "second") for mark in marks]
        prompts = np.array([mark["prompt"] for mark in marks])
        rate = mean_interval([np.mean(np.array(points)[prompts == prompt]) for prompt in sorted(set(prompts))])
        counts = {"wins": points.count(1), "ties": points.count(0.5), "losses": points.count(0)}
        found[kind] = {"prompts": len(set(prompts)), **counts, "rate": rate}
    return found
