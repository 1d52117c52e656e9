"""Blind ratings: one treatment for all texts, sheets that give nothing away, answers taken whole, figures by the protocol."""

import json
import re
from pathlib import Path

import pytest
from tiny_models import save_blm

from blm_core.config import ROOT, ConfigError
from blm_core.evidence import ratings
from blm_core.evidence.__main__ import main
from blm_core.evidence.ratings import ARMS, RUNGS, SAME, XL, Ratings, RatingsError, Text, problems, take_in
from blm_core.files import read_json, sha256, write_json, write_json_lines

SENTENCE = "The green kite of Wub went over nine hills again today."  # 11 words
EVIDENCE = ROOT / "runs" / "evidence"


def texts_of(arm: str, n: int, sentences: int) -> list[Text]:
    return [Text(f"{arm}-{i}", arm, " ".join([f"Number {i} is {arm}.", *[SENTENCE] * (sentences + i % 3)])) for i in range(n)]


def answer(name: str, kind: str = "child", mark: int = 7, ends: str = "yes") -> dict:
    return {"id": name, "kind": kind, "grammar": mark, "consistency": mark, "plot": mark, "ends": ends}


def test_texts_become_one_line_that_ends_with_a_sentence():
    text = "Wub  sang.\n\n\u201cLouder!\u201d said Mr. Ploo.\nThen Mr. Ploo and"
    assert ratings.treated(text) == 'Wub sang. "Louder!" said Mr. Ploo.'
    assert ratings.treated("no end at all") == "no end at all"


@pytest.mark.parametrize(("limit", "expected"), [(1, "Wub sang."), (5, "Wub sang."), (6, "Wub sang. Ploo slept all day.")])
def test_a_cut_keeps_whole_sentences_within_the_limit_and_at_least_one(limit, expected):
    assert ratings.cut("Wub sang. Ploo slept all day. Then it rained.", limit) == expected


def test_no_text_is_longer_than_its_rank_in_the_yardstick():
    long, short = texts_of("ours", 9, 12), texts_of("theirs", 9, 5)
    matched = ratings.match_lengths(long, short)
    assert [t.source for t in matched] == [t.source for t in long]
    assert all(a <= b for a, b in zip(sorted(t.n_words for t in matched), sorted(t.n_words for t in short), strict=True))


def test_pairs_have_one_length_and_none_is_short():
    pairs = ratings.random_pairs(texts_of("ours", 9, 9), texts_of("theirs", 9, 3), seed=1)
    assert len({a.source for a, _ in pairs}) == len(pairs) == 6
    assert min(t.n_words for pair in pairs for t in pair) >= 40
    assert all(abs(a.n_words - b.n_words) <= 11 for a, b in pairs)


def test_repeated_texts_stand_in_two_sheets_and_never_twice_in_one():
    texts = texts_of("ours", 30, 4)
    sheets = ratings.in_sheets(texts, 4, 6, seed=1)
    counts = [sum(t in sheet for sheet in sheets) for t in texts]
    assert min(map(len, sheets)) >= 30 // 4
    assert (counts.count(2), counts.count(1)) == (6, 24)
    with pytest.raises(RatingsError, match="twice"):
        ratings.numbered("pairs-a", [[(texts[0], texts[1])] * 2])


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """Recordings of other models, few of each, and a file of real stories."""
    monkeypatch.setattr(ratings, "TEXTS", 6)

    def record(name: str, prompt: str, **more) -> dict:
        return {"id": name, "prompt": prompt, "completion": f" {' '.join([SENTENCE] * 9)}", **more}

    marks = {"judge_consistency": 6, "judge_fluency": 7}
    once = [record(f"elex-{who}-{i}", ratings.BEGINNING, **marks) for who in ("gpt2xl", "chatgpt", "my") for i in range(6)]
    ladder = [record(f"tinyscalelab-{i}", f"Story {i}", model=m, kind="story") for i in range(6) for m in RUNGS]
    openings = [record(f"longer-{i}", f"On day {i} a tall blue goat met") for i in range(2)]
    files = {"once_upon_a_time": once, "peers": ladder, "published_completions": openings, "published_completions_2": []}
    for name, lines in files.items():
        write_json_lines(tmp_path / "recorded" / f"{name}.jsonl", lines)
    real = [f"{ratings.BEGINNING} Wub {i} sang. {' '.join([SENTENCE] * 9)}\n" for i in range(7)]
    (tmp_path / "valid.txt").write_text("<|endoftext|>".join(real))
    monkeypatch.setenv("BLM_RECORDED", str(tmp_path / "recorded"))
    return tmp_path / "valid.txt"


def test_sheets_are_made_answered_and_taken_in_and_name_no_arm(recorded, tokenizer, tmp_path, capsys):
    release, sheets, evidence = save_blm(tmp_path / "release", tokenizer, 256), tmp_path / "sheets", tmp_path / "evidence"
    judge = ["judge", str(sheets), "--evidence", str(evidence)]
    make = [*judge, "--make", "--model", str(release), "--valid", str(recorded)]
    assert main(make) == 0
    key = read_json(evidence / "key.json")
    tasks = [line.split() for line in (sheets / "TASKS.txt").read_text().splitlines()]
    assert len(tasks) == len(list(sheets.glob("*.md"))) == 12 * 2 + 3 + 3 + 5 * 2
    for sheet, answers in tasks:
        items, text = key[Path(sheet).stem[:-3]], Path(sheet).read_text()
        assert re.findall("## (.*)", text) == list(items)
        assert answers in text
        assert not re.search("GPT|BLM|elex|TinyStories|tinyscalelab|longer-|valid-", text)
        pair = {"child": "a", "text": "tie"}
        lines = [{"id": i, **pair} if "a" in item else answer(i) for i, item in items.items()]
        write_json_lines(answers, lines)
    assert SENTENCE not in str(key)
    assert main([*judge, "--import", "--rater", "a reader", "--date", "1 May"]) == 0
    rated = Ratings(evidence)
    assert rated.sheets == (40, 40)
    assert [len(rated.arm(arm)) for arm in ARMS] == [6] * 6
    assert len(rated.rungs()) == 6
    assert {bool(pair.prompt) for pair in rated.pairs} == {True, False}
    assert rated.noise()["texts"] == 12
    # Sheets with other texts do not replace those that the marks belong to, with their key or without.
    before = (sheets / "alone01-r1.md").read_text()
    recorded.write_text(recorded.read_text().replace("Wub", "Ploo"))
    for _ in range(2):
        assert main(make) == 1
        assert "the marks of other sheets" in capsys.readouterr().err
        assert (sheets / "alone01-r1.md").read_text() == before
        (evidence / "key.json").unlink(missing_ok=True)


@pytest.fixture
def rated(tmp_path):
    """Two texts of each arm alone and a pair in both orders, answered: GPT2-XL tells a story in its second text only."""
    texts = [Text(f"{arm}/{i}", arm, f"{SENTENCE} {arm} {i}.") for arm in ARMS for i in range(2)]
    bare = [(Text(f"{SAME}/{i}", SAME, SENTENCE * 4), Text(f"{XL}/{i}", XL, SENTENCE * 4)) for i in range(2)]
    sheets, evidence = tmp_path / "sheets", tmp_path / "evidence"
    made = {"alone": texts, "pairs-a": bare, "pairs-b": [pair[::-1] for pair in bare]}
    made = {name: items for kind, sheet in made.items() for name, items in ratings.numbered(kind, [sheet]).items()}
    ratings.write_sheets(sheets, made)
    write_json(
        evidence / "key.json", {name: {i: ratings.key_entry(x) for i, x in items.items()} for name, items in made.items()}
    )
    for rater, mark in (("r1", 4), ("r2", 6)):
        none = [i for i, t in made["alone01"].items() if t.source == f"{XL}/0"]
        lines = [answer(i, "none", 1, "no") if i in none else answer(i, "child", mark) for i in made["alone01"]]
        write_json_lines(sheets / "answers" / f"alone01-{rater}.jsonl", lines)
    # The BLM stands first on sheet a and second on b. The rater of a likes it in both pairs, that of b in the first.
    for sheet, child, text in (("pairs-a01-r1", "aa", "tie"), ("pairs-b01-r2", "ba", "a")):
        lines = [{"id": f"{sheet[:-3]}-0{i}", "child": side, "text": text} for i, side in enumerate(child, 1)]
        write_json_lines(sheets / "answers" / f"{sheet}.jsonl", lines)
    return sheets, evidence


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"grammar": 11}, "not one of 0, 1"),
        ({"plot": 6.0}, "not one of 0, 1"),
        ({"plot": True}, "not one of 0, 1"),
        ({"plot": [7]}, "not one of 0, 1"),
        ({"kind": "poem"}, "not one of child"),
        ({"id": "alone01-99"}, "not on the sheet"),
        ({"id": ["x-1"]}, "not on the sheet"),
        ({"id": "x-2"}, "answered 2 times"),
        ({"remark": ""}, "has the fields"),
    ],
)
def test_an_answer_that_is_not_as_asked_is_named(change, said):
    key = {"x-1": {"arm": XL}, "x-2": {"arm": XL}}
    assert problems([answer("x-1"), answer("x-2")], key) == []
    assert any(said in problem for problem in problems([answer("x-1") | change, answer("x-2")], key))


def test_a_whole_sheet_is_taken_once_with_its_hash_and_one_that_lacks_an_answer_is_not(rated):
    sheets, evidence = rated
    path = sheets / "answers" / "alone01-r2.jsonl"
    whole = path.read_text()
    path.write_text(whole.rstrip("\n").rsplit("\n", 1)[0])
    assert take_in(sheets, evidence, "a reader", "1 May") == {"alone01-r2": "alone01-12 is missing"}
    found = Ratings(evidence)
    assert found.sheets == (3, 4)
    assert found.alone == []
    assert found.lines()[0].verdict == "not rated yet"

    path.write_text(whole)
    assert take_in(sheets, evidence, "another", "2 May") == {}
    noted = read_json(evidence / "ratings" / "sheets.json")
    assert noted["alone01-r2"] == {"rater": "another", "date": "2 May", "items": 12, "sha256": sha256(sheets / "alone01-r2.md")}
    assert noted["alone01-r1"]["rater"] == "a reader"
    path.write_text(whole.replace('"plot": 6', '"plot": 5'))
    with pytest.raises(RatingsError, match="other marks"):
        take_in(sheets, evidence, "a reader", "1 May")


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda sheets, evidence: (sheets / "answers" / "alone01-r1.jsonl").unlink(), "not answered"),
        (lambda sheets, evidence: (sheets / "answers" / "alone01-r1.jsonl").write_text("7 of 10\n"), "no lines of JSON"),
        (lambda sheets, evidence: write_json(evidence / "key.json", {}), "not in"),
    ],
)
def test_a_sheet_that_cannot_be_taken_is_named_with_the_reason(rated, spoil, why):
    spoil(*rated)
    assert why in take_in(*rated, "a reader", "1 May")["alone01-r1"]


def test_figures_follow_the_protocol(rated):
    take_in(*rated, "a reader", "1 May")
    found = Ratings(rated[1])
    # Measure 1 needs both raters, and the mean of their marks, 4 and 6.
    assert (found.share(SAME).value, found.share(SAME, 5.5).value, found.share(XL).value) == (1, 0, 0.5)
    assert (found.lines()[0].value, found.lines()[0].verdict) == (50, "undecided")
    # Pairs count in both orders, the fair fight only GPT2-XL's stories.
    points = {p.blm: p.points for p in found.bare_pairs()}
    assert points[f"{SAME}/0"] == {"child": (1.0, 1.0), "text": (0.5, 0.0)}
    assert points[f"{SAME}/1"] == {"child": (1.0, 0.0), "text": (0.5, 0.0)}
    assert found.position_pull().value == 0.75
    assert [p.xl for p in found.fair_pairs()] == [f"{XL}/1"]
    assert {line.name: line.value for line in found.lines()}["2 which would you read to a child?"] == 25
    # Raters agree on the kind and differ in their marks, which follow the order of other people's.
    agreement = found.agreement()
    assert agreement["kind, kappa"] == 1
    assert 0 < agreement["plot, alpha"] < 1
    marks = {f"{XL}/0": 2, f"{XL}/1": 8, "ChatGPT/0": 9}
    validity = found.validity({i: {"consistency": m, "fluency": 10 - m} for i, m in marks.items()})
    assert validity["texts"] == 3
    assert validity["consistency"] > 0.8
    assert validity["fluency"] < -0.8


def test_a_server_answers_the_sheets_that_have_no_answer_and_one_that_is_not_there_is_named(rated, loopback, monkeypatch):
    sheets, evidence = rated
    (sheets / "answers" / "alone01-r1.jsonl").unlink()
    asked = []

    def reply(request):
        asked.append(json.loads(request.body))
        names = [line[3:] for line in asked[0]["messages"][0]["content"].splitlines() if line.startswith("## ")]
        content = "Here they are:\n" + "\n".join(json.dumps(answer(name)) for name in names)
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
        body = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
        request.begin(200, {"Content-Type": "application/json"})
        request.wfile.write(json.dumps(body).encode())

    loopback.answers = [reply]
    with pytest.raises(ConfigError, match="BLM_JUDGE_URL"):
        ratings.ask(sheets)
    for name, value in {"URL": "http://127.0.0.1:9/v1", "MODEL": "m", "KEY": "secret"}.items():
        monkeypatch.setenv(f"BLM_JUDGE_{name}", value)
    assert "APIConnectionError" in ratings.ask(sheets)["alone01-r1"]
    monkeypatch.setenv("BLM_JUDGE_URL", f"{loopback.address}/v1")
    assert ratings.ask(sheets) == ratings.ask(sheets) == {}
    assert [headers["authorization"] for headers in loopback.asked] == ["Bearer secret"]
    assert SENTENCE in asked[0]["messages"][0]["content"]
    assert take_in(sheets, evidence, "m", "1 May") == {}


def test_the_committed_marks_are_whole_and_in_range():
    key, noted = read_json(EVIDENCE / "key.json"), read_json(EVIDENCE / "ratings" / "sheets.json", {})
    for name, note in noted.items():
        lines = [json.loads(line) for line in (EVIDENCE / "ratings" / f"{name}.jsonl").read_text().splitlines()]
        assert problems(lines, key[name.rsplit("-", 1)[0]]) == [], name
        assert note["items"] == len(lines)


@pytest.mark.parametrize(("kind", "rate"), [("all", 0.288), ("story", 0.594)])
def test_the_earlier_marks_give_the_figures_that_were_reported(kind, rate):
    assert ratings.earlier_by_kind(EVIDENCE)[kind]["rate"].value == pytest.approx(rate, abs=5e-4)
