"""Blind ratings: the arms' texts, sheets for raters, keys.

- Texts of all arms get one treatment and matching lengths, so that nothing but the writing tells them apart.
- A sheet is one Markdown file: the rubric, numbered texts, how to answer. The key, which text is whose, lies elsewhere.
- Sheets hold other people's texts and stay out of the repository; key, rubric and marks hold none.
"""

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from blm_core.checkpoint import load_model
from blm_core.clean import normalise
from blm_core.files import read_json, write_json, written_aside
from blm_core.generate import Sampling, complete

BEGINNING = "Once upon a time"
SHORTEST = 40  # words; a shorter text shows too little to be compared
DECODINGS = {
    "BLM, same decoding": Sampling(temperature=1.0, top_k=50, top_p=1.0, seed=1),
    "BLM, own decoding": Sampling(temperature=0.8, top_k=0, top_p=0.95, seed=1),
}
SENTENCE_END = re.compile(r"(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)[.!?][\"')]*(?= |$)")
KINDS = ("child", "other", "none")

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


def read_lines(path: Path) -> list[dict]:
    """The records of a file of JSON lines."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]


def treated(text: str) -> str:
    """One line in ASCII typography, case kept, cut after the last full stop (the whole line where there is none)."""
    line = " ".join(normalise(text)[0].split())
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
    """`n` completions of each prompt by the model in `folder`, as records without the prompts."""
    model, tokenizer = load_model(folder)
    texts = complete(model, tokenizer, [prompt for prompt in prompts.values() for _ in range(n)], sampling)
    names = [(name, i) for name in prompts for i in range(n)]
    return [
        {"id": f"{arm}/{name}/{i}", "arm": arm, "prompt": name, "sample": i, "completion": text}
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
    recorded = {"GPT2-XL": "elex-gpt2xl-", "ChatGPT": "elex-chatgpt-", "329 M peer": "elex-my-"}
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
    return {arm: match_lengths(texts, found["GPT2-XL"]) for arm, texts in found.items()}


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
    """Write our texts and the key to `evidence`, all sheets and TASKS.txt to `folder`; the number of items per set.

    Raises RatingsError where `evidence` holds the key of other sheets: marks given on them would lose their meaning.
    """
    longer, ladder = longer_openings(data), ladder_prompts(data)
    same, mild = DECODINGS.items()
    own = [r for arm, sampling in (same, mild) for r in write_own(release, {"once": BEGINNING}, 72, sampling, arm)]
    own += write_own(release, {name: r["prompt"] for name, r in longer.items()}, 1, same[1], same[0])
    rungs = {next(iter(of.values()))["id"]: prompt for prompt, of in ladder.items()}
    own += write_own(release, rungs, 1, mild[1], mild[0])
    ours = {(r["arm"], r["prompt"]): r for r in own}

    texts = arms(data, valid, own)
    alone = in_sheets([t for arm in texts.values() for t in arm], 12, 12, seed=3)

    pairs = random_pairs(texts[same[0]], texts["GPT2-XL"], seed=2)
    bare = len(pairs)
    for name, r in longer.items():
        mine = ours[same[0], name]
        pair = same_length(
            [
                Text(mine["id"], same[0], treated(joined(r["prompt"], mine["completion"])), name),
                Text(name, "GPT2-XL", treated(joined(r["prompt"], r["completion"])), name),
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
    (evidence / "blm_texts.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in own))
    (folder / "TASKS.txt").write_text("\n".join(tasks) + "\n")
    return {
        "texts": {a: len(t) for a, t in texts.items()},
        "bare pairs": bare,
        "longer pairs": len(pairs) - bare,
        "ladder": len(rows) * 4,
    }
