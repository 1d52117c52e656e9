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
from pathlib import Path
from typing import NamedTuple

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
OF_A_TEXT = {"kind": ("child", "other", "none"), **dict.fromkeys(CRITERIA, range(11)), "ends": ("yes", "no")}
OF_A_PAIR = dict.fromkeys(QUESTIONS, ("a", "b", "tie"))
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

# ---- Texts


class Text(NamedTuple):
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
        found[i] = texts[i]._replace(text=cut(texts[i].text, limit))
    return found


def same_length(*texts: Text) -> tuple[Text, ...]:
    """Texts of one item, all cut to the words of the shortest."""
    limit = min(t.n_words for t in texts)
    return tuple(t._replace(text=cut(t.text, limit)) for t in texts)


def on_one_prompt(name: str, prompt: str, *written: tuple[str, str, str]) -> tuple[Text, ...]:
    """(source, arm, completion) of one prompt, whose id is `name`, as texts of one length."""
    texts = []
    for source, arm, completion in written:
        glue = "" if prompt[-1:].isspace() or completion[:1] in " ,.;:!?'\n" else " "
        texts.append(Text(source, arm, treated(prompt + glue + completion), name))
    return same_length(*texts)


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


def arms(data: Path, valid: Path, own: Sequence[dict]) -> dict[str, list[Text]]:
    """The six arms of measure 1, treated and cut to GPT2-XL's lengths."""
    once, found = recorded(data, "once_upon_a_time", "peers"), {}
    for arm, start in {XL: "elex-gpt2xl-", "ChatGPT": "elex-chatgpt-", "329 M peer": "elex-my-"}.items():
        found[arm] = [Text(r["id"], arm, treated(r["prompt"] + r["completion"])) for r in once if r["id"].startswith(start)]
    stories = map(treated, valid.read_text(encoding="utf-8").split("<|endoftext|>"))
    real = [Text(f"{valid.stem}-{i}", "real", story) for i, story in enumerate(stories) if story.startswith(BEGINNING)]
    found["real"] = [t for t in real if t.n_words >= SHORTEST]
    for arm in DECODINGS:
        ours = [r for r in own if r["arm"] == arm and r["prompt"] == "once"]
        found[arm] = [Text(r["id"], arm, treated(BEGINNING + r["completion"])) for r in ours]
    if short := {arm: len(texts) for arm, texts in found.items() if len(texts) < TEXTS}:
        raise ValueError(f"every arm needs {TEXTS} texts, found {short}.")
    return {arm: match_lengths(texts[:TEXTS], found[XL][:TEXTS]) for arm, texts in found.items()}


def measures(texts: dict[str, list[Text]]) -> dict[str, dict[str, list]]:
    """The measures of `text.measure` of every text of every arm; None where one is not defined."""
    found = {arm: measure([t.text for t in own]) for arm, own in texts.items()}
    return {
        arm: {name: [None if math.isnan(x) else round(float(x), 6) for x in values] for name, values in own.items()}
        for arm, own in found.items()
    }


# ---- Sheets


def make(release: Path, data: Path, valid: Path, folder: Path, evidence: Path) -> None:
    """Write all sheets to `folder`, and our texts, the key and numbers of all texts to `evidence`.

    Raises ValueError where `evidence` holds the key of other sheets, or marks without a key: they would lose their meaning.
    """
    published = recorded(data, "published_completions", "published_completions_2")
    published = [r for r in published if len(r["prompt"].split()) > 6 and len(r["completion"].split()) >= SHORTEST]
    openings, theirs = ({r["id"]: r[name] for r in published} for name in ("prompt", "completion"))
    ladder: dict[str, dict[str, dict]] = {}  # by prompt and model
    for r in recorded(data, "peers"):
        if r["id"].startswith("tinyscalelab") and r["kind"] == "story":
            ladder.setdefault(r["prompt"], {}).setdefault(r["model"], r)
    whole = [prompt for prompt, of in ladder.items() if len(of) == len(RUNGS)]
    rungs = {next(iter(ladder[prompt].values()))["id"]: prompt for prompt in sorted(whole, key=text_sha256)[:40]}
    once = {"once": BEGINNING}
    own = write_own(release, [(SAME, once, TEXTS), (OWN, once, TEXTS), (SAME, openings, 1), (OWN, rungs, 1)])
    ours = {(r["arm"], r["prompt"]): (r["id"], r["arm"], r["completion"]) for r in own}
    texts = arms(data, valid, own)

    drawn = list(texts[SAME])
    random.Random(2).shuffle(drawn)
    pairs = [same_length(*pair) for pair in zip(drawn, texts[XL], strict=True)]
    for name, prompt in openings.items():
        pairs.append(on_one_prompt(name, prompt, ours[SAME, name], (name, XL, theirs[name])))
    own_words = [min(t.n_words for t in pair) - len(openings.get(pair[0].prompt, "").split()) for pair in pairs]
    pairs = [pair for pair, n_words in zip(pairs, own_words, strict=True) if n_words >= SHORTEST]
    swap = random.Random(4)
    pairs = [pair if swap.random() < 0.5 else pair[::-1] for pair in pairs]

    rows = []
    for name, prompt in rungs.items():
        peers = [(f"{model}/{r['id']}", model, r["completion"]) for model, r in ladder[prompt].items()]
        rows.append(on_one_prompt(name, prompt, *peers, ours[OWN, name]))
    steps = [[(t,) for row in rows[i::5] for t in row] for i in range(5)]  # the texts of a prompt stand in one sheet
    for i, sheet in enumerate(steps):
        random.Random(f"ladder/{i}").shuffle(sheet)

    sheets = {
        "alone": in_sheets([(t,) for arm in texts.values() for t in arm], 12, 12, seed=3),
        "pairs-a": in_sheets(pairs, 3, 6, seed=5),
        "pairs-b": in_sheets([pair[::-1] for pair in pairs], 3, 6, seed=6),
        "ladder": steps,
    }
    named = {f"{kind}{n:02d}": sheet for kind, of in sheets.items() for n, sheet in enumerate(of, 1)}
    items = {name: {f"{name}-{i:02d}": item for i, item in enumerate(sheet, 1)} for name, sheet in named.items()}
    key = {name: {i: key_entry(*item) for i, item in of.items()} for name, of in items.items()}
    marks = evidence / "ratings" / "sheets.json"
    if read_json(evidence / "key.json", {} if marks.exists() else key) != key:
        raise ValueError(f"{evidence} holds the key or the marks of other sheets. Name another folder, or move both away.")
    write_sheets(folder, items)
    write_json(evidence / "key.json", key)
    write_json(evidence / "measures.json", measures(texts))
    write_json(evidence / "chatgpt_marks.json", recorded_marks(data))
    write_json_lines(evidence / "blm_texts.jsonl", own)


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


def key_entry(*texts: Text) -> dict:
    """Whose the text or the two texts of an item are, without their words."""
    a, *b = ({"source": t.source, "arm": t.arm, "words": t.n_words, "sha256": text_sha256(t.text)[:16]} for t in texts)
    return {"a": a, "b": b[0], "prompt": texts[0].prompt} if b else a


def write_sheets(folder: Path, sheets: dict[str, dict[str, Sequence[Text]]]) -> None:
    """Write each sheet for each of its raters, who need nothing beside it."""
    (folder / "answers").mkdir(parents=True, exist_ok=True)
    alone, pairs = re.findall(r"# Rubric: .*?\n\n(.*?)\nAnswer: `(.*?)`\n", RUBRIC.read_text(encoding="utf-8"), re.DOTALL)
    for name, items in sheets.items():
        (task, example), labels = (pairs, ("A: ", "B: ")) if name.startswith("pairs") else (alone, ("",))
        texts = {i: "\n\n".join(label + t.text for label, t in zip(labels, item, strict=True)) for i, item in items.items()}
        shown = [f"## {i}\n\n{text}\n" for i, text in texts.items()]
        for rater in RATERS[name[:-2]]:
            head = (
                f"# {len(items)} items to judge\n\n{task}\nWrite one line of JSON for each item, in the order of the sheet and "
                f"for all {len(items)} of them, to {folder / 'answers' / f'{name}-{rater}.jsonl'}. A line looks like this:\n\n"
                f"    {example}\n\nRead every text to its end before you judge it, and judge yourself, not by a program. "
                "Use nothing but this sheet.\n"
            )
            (folder / f"{name}-{rater}.md").write_text("\n".join([head, *shown]), encoding="utf-8")


# ---- Answers


def problems(answers: Sequence[dict], key: dict) -> list[str]:
    """What is wrong with the answers to a sheet, of which `key` is the part of the key; nothing where they are whole."""
    asked = OF_A_PAIR if all("a" in item for item in key.values()) else OF_A_TEXT
    counts = Counter(str(answer.get("id")) for answer in answers)
    found = [f"{name} is answered {counts[name]} times" for name in key if counts[name] != 1]
    found += [f"{name!r} is not on the sheet" for name in counts if name not in key]
    for answer in answers:
        found += [f"{answer.get('id')}: nobody asked for {name}" for name in answer if name not in ("id", *asked)]
        for name, choices in asked.items():
            known = list(map(repr, choices))  # as text, since 6.0 and True are no marks
            if repr(answer.get(name)) not in known:
                found.append(f"{answer.get('id')}: {name} is {answer.get(name)!r}, not one of {', '.join(known)}")
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
        if target.exists() and list(read_json_lines(target)) != lines:
            raise ValueError(f"{target} holds other marks. A sheet is taken once; move the file to take it anew.")
        if name not in noted:
            write_json_lines(target, lines)
            noted[name] = {"rater": rater, "date": date, "items": len(lines), "sha256": sha256(sheet)}
            write_json(taken / "sheets.json", dict(sorted(noted.items())))
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


# ---- What follows from the answers


class Rated(NamedTuple):
    """A text and its two raters' answers, r1's first."""

    source: str
    arm: str
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


class Pair(NamedTuple):
    """Two texts, the BLM's and `xl` of GPT2-XL: for each of the two orders, the BLM's side ("a" or "b") and the answer."""

    xl: str
    prompt: str
    orders: tuple[tuple[str, dict], tuple[str, dict]]

    def points(self, question: str) -> tuple[float, float]:
        """Of the BLM in each order: 1 for a win, 0.5 for a tie."""
        return tuple(points(answer[question], side) for side, answer in self.orders)


def points(preferred: str, side: str) -> float:
    return 0.5 if preferred == "tie" else float(preferred == side)


def win_rate(pairs: Sequence[Pair], question: str) -> Interval:
    """The BLM's share of wins, over pairs that count with the mean of both orders."""
    return mean_interval([sum(p.points(question)) / 2 for p in pairs])


# One line of evidence: `value` with its interval, in `unit` ("points of 100", "marks"); right of 0 speaks for the BLM.
Line = namedtuple("Line", "name value low high verdict n unit")


def line(name: str, gap: Sequence[float], n: int, unit: str = "points of 100") -> Line:
    scale = 100 if unit == "points of 100" else 1
    return Line(name, *(scale * end for end in gap), verdict(*gap[1:], "higher"), n, unit)


class Ratings:
    """The committed marks of `evidence`. Raises ValueError where a sheet is not rated.

    `by_arm` holds the texts that were rated alone, `rungs` those of the ladder by prompt and arm, `groups` the `pairs` by
    beginning. What stands in two sheets counts with the first; `repeated` and `repeated_pairs` hold both answers.
    """

    def __init__(self, evidence: Path):
        key, self.noted = read_json(evidence / "key.json", {}), read_json(evidence / "ratings" / "sheets.json", {})
        wanted = {f"{sheet}-{rater}" for sheet in key for rater in RATERS[sheet[:-2]]}
        if not wanted or wanted - self.noted.keys():
            raise ValueError(f"{evidence}: {len(wanted & self.noted.keys())} of {len(wanted)} sheets are rated.")
        texts: dict[str, dict[str, list[Rated]]] = {"alone": {}, "ladder": {}}
        pairs: dict[tuple, dict[str, list]] = {}  # by both texts; then by order, in one sheet or two
        for sheet, items in key.items():
            kind = sheet[:-2]
            files = [evidence / "ratings" / f"{sheet}-{rater}.jsonl" for rater in RATERS[kind]]
            by_rater = [{answer["id"]: answer for answer in read_json_lines(file)} for file in files]
            answers = {name: tuple(of[name] for of in by_rater) for name in items}
            if kind in texts:
                # Backwards, and a repeated text at its last place: in this order the committed intervals were drawn.
                for name, item in reversed(items.items()):
                    before = texts[kind].pop(item["source"], [])
                    texts[kind][item["source"]] = [*before, Rated(item["source"], item["arm"], answers[name])]
                continue
            for name, item in items.items():
                side, other = "ab" if item["a"]["arm"] == SAME else "ba"
                both = item[side]["source"], item[other]["source"], item["prompt"]
                pairs.setdefault(both, {}).setdefault(kind, []).append((side, *answers[name]))
        alone, ladder = ([given[0] for given in of.values()] for of in texts.values())
        self.texts = alone + ladder
        self.by_arm = {arm: [t for t in alone if t.arm == arm] for arm in ARMS}
        self.rungs: dict[str, dict[str, Rated]] = {}
        for t in ladder:
            self.rungs.setdefault(t.source.split("/")[1], {})[t.arm] = t
        self.pairs = [Pair(xl, prompt, (of["pairs-a"][0], of["pairs-b"][0])) for (_, xl, prompt), of in pairs.items()]
        self.repeated = [[t.answers for t in given] for given in texts["alone"].values() if len(given) == 2]
        self.repeated_pairs = [given for of in pairs.values() for given in of.values() if len(given) == 2]
        bare, stories = [p for p in self.pairs if not p.prompt], {t.source for t in self.by_arm[XL] if t.a_story}
        fair = [p for p in bare if p.xl in stories]  # both raters called GPT2-XL's text a story
        self.groups = {BEGINNING: bare, "the fair fight": fair, "longer openings": [p for p in self.pairs if p.prompt]}

    def share(self, arm: str, threshold: float = COHERENT) -> Interval:
        """The share of an arm's texts that count under measure 1."""
        return mean_interval([t.counts(threshold) for t in self.by_arm[arm]])

    def share_difference(self, threshold: float = COHERENT, arm: str = SAME) -> Interval:
        """Measure 1: the share of `arm` minus GPT2-XL's, each resampled by its own texts."""
        return difference_interval(*([t.counts(threshold) for t in self.by_arm[a]] for a in (arm, XL)))

    def lines(self) -> list[Line]:
        """All lines that the raters decide, the two primaries first."""
        n = {arm: len(texts) for arm, texts in self.by_arm.items()}
        found = [line("1 stories that hang together, BLM minus GPT2-XL", self.share_difference(), n[SAME])]
        for name, group, question in (
            ("2 which would you read to a child?", BEGINNING, "child"),
            ("better as text, whatever its kind", BEGINNING, "text"),
            ("fair fight: read to a child", "the fair fight", "child"),
            ("fair fight: better as text", "the fair fight", "text"),
            ("longer openings: read to a child", "longer openings", "child"),
            ("longer openings: better as text", "longer openings", "text"),
        ):
            pairs = self.groups[group]
            found.append(line(name, [end - 0.5 for end in win_rate(pairs, question)], len(pairs)))
        found.append(line("stories that hang together, own decoding", self.share_difference(arm=OWN), n[OWN]))
        for criterion in CRITERIA:  # the protocol reports mean marks without a decision
            gap = difference_interval(*([t.mark(criterion) for t in self.by_arm[arm]] for arm in (SAME, XL)))
            marks = line(f"{criterion}, BLM minus GPT2-XL", gap, n[SAME], "marks")
            found.append(marks._replace(verdict="no decision"))
        for rung in RUNGS:
            gap = paired_difference(*([of[arm].mark(*CRITERIA) for of in self.rungs.values()] for arm in (OWN, rung)))
            found.append(line(f"mean mark, BLM minus {rung}", gap, len(self.rungs), "marks"))
        return found


def outcome(first: str, second: str, real: float) -> str:
    """The claim by the protocol's rule, from the verdicts of both primaries and the share of real stories that count.

    "made", "refuted", "undecided", or "not made" where the raters are too strict for the rule.
    """
    if "loses" in (first, second):
        return "refuted"
    if real < 0.5:
        return "not made"
    return "made" if first == second == "wins" else "undecided"
