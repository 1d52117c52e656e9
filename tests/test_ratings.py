"""Blind ratings: one treatment for all texts, sheets that give nothing away, answers taken whole, figures by the protocol."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
from tiny_models import save_blm

from blm_core.config import ROOT, ConfigError
from blm_core.evidence import ratings
from blm_core.evidence.__main__ import main
from blm_core.evidence.ratings import ARMS, RUNGS, SAME, XL, Ratings, Text, problems, take_in
from blm_core.files import read_json, read_json_lines, sha256, write_json_lines

SENTENCE = "The green kite of Wub went over nine hills again today."  # 11 words
EVIDENCE = ROOT / "runs" / "evidence"


def test_texts_become_one_line_of_whole_sentences_within_a_limit_and_no_arm_is_longer_than_the_yardstick():
    text = "Wub  sang.\n\n\u201cLouder!\u201d said Mr. Ploo.\nThen Mr. Ploo and"
    assert ratings.treated(text) == 'Wub sang. "Louder!" said Mr. Ploo.'
    assert ratings.treated("no end at all") == "no end at all"
    cuts = {limit: ratings.cut("Wub sang. Ploo slept all day. Then it rained.", limit) for limit in (1, 5, 6)}
    assert cuts == {1: "Wub sang.", 5: "Wub sang.", 6: "Wub sang. Ploo slept all day."}
    # No text is longer than its rank in the yardstick.
    long, short = ([Text(f"{i}", "ours", " ".join([SENTENCE] * (n + i % 3))) for i in range(9)] for n in (12, 5))
    matched = ratings.match_lengths(long, short)
    assert [t.source for t in matched] == [t.source for t in long]
    assert sorted(t.n_words for t in matched) == sorted(t.n_words for t in short)


def answer(name: str, kind: str = "child", mark: int = 7, ends: str = "yes") -> dict:
    return {"id": name, "kind": kind, "grammar": mark, "consistency": mark, "plot": mark, "ends": ends}


def answered(name: str, item: dict, rater: str) -> dict:
    """GPT2-XL's first text is no story, ChatGPT's are good. On sheets a the BLM wins or ties, on sheets b what stands first."""
    if "a" in item:
        blm = "a" if item["a"]["arm"] == SAME else "b"
        return {"id": name, "child": blm, "text": "tie"} if rater == "r1" else {"id": name, "child": "a", "text": "a"}
    if item["source"] == "elex-gpt2xl-0":
        return answer(name, "none", 1, "no")
    return answer(name, mark={"r1": 4, "r2": 6}[rater] + 3 * (item["arm"] == "ChatGPT"))


@pytest.fixture(scope="module")
def made(tokenizer, tmp_path_factory):
    """A small trial, made from recordings of other models and a file of real stories, and answered."""
    home, told = tmp_path_factory.mktemp("trial"), " ".join([SENTENCE] * 9)
    once = [{"id": f"elex-{who}-{i}", "prompt": ratings.BEGINNING} for who in ("gpt2xl", "chatgpt", "my") for i in range(6)]
    ladder = [{"id": f"tinyscalelab-{i}", "prompt": f"Story {i}", "model": m, "kind": "story"} for i in range(6) for m in RUNGS]
    openings = [{"id": f"longer-{i}", "prompt": f"On day {i} a tall blue goat met"} for i in range(2)]
    files = {"once_upon_a_time": once, "peers": ladder, "published_completions": openings, "published_completions_2": []}
    for name, lines in files.items():
        write_json_lines(home / "recorded" / f"{name}.jsonl", [line | {"completion": f" {told}"} for line in lines])
    real = [f"{ratings.BEGINNING} Wub {i} sang. {told}\n" for i in range(7)]
    (home / "valid.txt").write_text("<|endoftext|>".join(real))
    release, sheets, evidence = save_blm(home / "release", tokenizer, 256), home / "sheets", home / "evidence"
    options = ["--model", str(release), "--valid", str(home / "valid.txt")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ratings, "TEXTS", 6)
        patch.setenv("BLM_RECORDED", str(home / "recorded"))
        assert main(["judge", str(sheets), "--evidence", str(evidence), "--make", *options]) == 0
        key = read_json(evidence / "key.json")
        for name, items in key.items():
            for rater in ratings.RATERS[name[:-2]]:
                lines = [answered(i, item, rater) for i, item in items.items()]
                write_json_lines(sheets / "answers" / f"{name}-{rater}.jsonl", lines)
        yield SimpleNamespace(key=key, sheets=sheets, evidence=evidence, options=options, valid=home / "valid.txt")


@pytest.fixture
def trial(made, tmp_path):
    """The folders of the sheets and of the evidence, copied for one test."""
    return [shutil.copytree(folder, tmp_path / folder.name) for folder in (made.sheets, made.evidence)]


def test_sheets_hold_all_items_of_the_key_name_no_arm_and_pair_texts_of_one_length(made):
    sheets = {path.stem: path.read_text() for path in made.sheets.glob("*.md")}
    assert len(sheets) == 12 * 2 + 3 + 3 + 5 * 2
    for name, text in sheets.items():
        assert re.findall("## (.*)", text) == list(made.key[name[:-3]])
        assert str(made.sheets / "answers" / f"{name}.jsonl") in text
        assert not re.search("GPT|BLM|elex|TinyStories|tinyscalelab|longer-|valid-", text)
    assert SENTENCE not in str(made.key)
    pairs = [item for name, items in made.key.items() for item in items.values() if name.startswith("pairs")]
    assert all(min(p[side]["words"] for side in "ab") >= 40 and abs(p["a"]["words"] - p["b"]["words"]) <= 11 for p in pairs)
    alone = [{item["source"] for item in items.values()} for name, items in made.key.items() if name.startswith("alone")]
    sources = set.union(*alone)
    assert sorted(sum(source in sheet for sheet in alone) for source in sources) == [1] * 24 + [2] * 12


def test_sheets_with_other_texts_do_not_replace_those_that_were_rated(made, trial, capsys):
    sheets, evidence = trial
    judge = ["judge", str(sheets), "--evidence", str(evidence)]
    assert main([*judge, "--import", "--rater", "a reader", "--date", "1 May"]) == 0
    before = (sheets / "alone01-r1.md").read_text()
    made.valid.write_text(made.valid.read_text().replace("Wub", "Ploo"))
    for _ in range(2):  # with the key, and without
        assert main([*judge, "--make", *made.options]) == 1
        assert "the marks of other sheets" in capsys.readouterr().err
        assert (sheets / "alone01-r1.md").read_text() == before
        (evidence / "key.json").unlink(missing_ok=True)


def test_figures_follow_the_protocol(trial):
    take_in(*trial, "a reader", "1 May")
    found = Ratings(trial[1])
    assert [len(found.by_arm[arm]) for arm in ARMS] == [6] * 6
    assert (len(found.rungs), len(found.repeated)) == (6, 12)
    # Measure 1 needs both raters, and the mean of their marks, 4 and 6.
    assert (found.share(SAME).value, found.share(SAME, 5.5).value, found.share(XL).value) == (1, 0, pytest.approx(5 / 6))
    assert found.lines()[0].value == pytest.approx(100 / 6)
    # Pairs count in both orders; the fair fight leaves out the text that is no story.
    bare, fair, longer = found.groups.values()
    first = [float(p.orders[1][0] == "a") for p in bare]  # where the BLM stands first on sheets b
    assert [p.points("child") for p in bare] == [(1.0, x) for x in first]
    assert [p.points("text") for p in bare] == [(0.5, x) for x in first]
    assert {p.xl for p in bare} - {p.xl for p in fair} <= {"elex-gpt2xl-0"}
    assert {p.xl for p in longer} <= {"longer-0", "longer-1"}
    # The claim is made only where both measures are won and enough real stories count.
    cases = [("wins", "wins", 0.5), ("wins", "wins", 0.4), ("wins", "undecided", 0.9), ("wins", "loses", 0.4)]
    assert [ratings.outcome(*case) for case in cases] == ["made", "not made", "undecided", "refuted"]


def test_an_answer_that_is_not_as_asked_is_named():
    key = {"x-1": {"arm": XL}, "x-2": {"arm": XL}}
    assert problems([answer("x-1"), answer("x-2")], key) == []
    for said, changes in {
        "not one of 0, 1": [{"grammar": 11}, {"plot": 6.0}, {"plot": [True]}],
        "not one of 'child'": [{"kind": "poem"}],
        "not on the sheet": [{"id": ["x-1"]}],
        "answered 2 times": [{"id": "x-2"}],
        "nobody asked for remark": [{"remark": ""}],
    }.items():
        for change in changes:
            assert any(said in problem for problem in problems([answer("x-1") | change, answer("x-2")], key))


def test_a_sheet_is_taken_whole_or_not_at_all_and_only_once(trial):
    sheets, evidence = trial
    path = sheets / "answers" / "alone01-r2.jsonl"
    whole = path.read_text()
    path.write_text(whole.rstrip("\n").rsplit("\n", 1)[0])
    (sheets / "answers" / "alone02-r1.jsonl").unlink()
    with pytest.raises(ValueError, match=r"(?s)2 sheets.*alone01-r2: alone01-\d\d is answered 0 times.*alone02-r1: "):
        take_in(sheets, evidence, "a reader", "1 May")
    with pytest.raises(ValueError, match="38 of 40 sheets are rated"):
        Ratings(evidence)

    path.write_text(whole)
    (sheets / "answers" / "alone02-r1.jsonl").write_text("7 of 10\n")
    with pytest.raises(ValueError, match=r"alone02-r1\.jsonl, line 1 is not valid JSON"):
        take_in(sheets, evidence, "another", "2 May")
    noted, lines = read_json(evidence / "ratings" / "sheets.json"), len(whole.splitlines())
    assert noted["alone01-r1"]["rater"] == "a reader"
    digest = sha256(sheets / "alone01-r2.md")
    assert noted["alone01-r2"] == {"rater": "another", "date": "2 May", "items": lines, "sha256": digest}
    path.write_text(whole.replace('"plot": 6', '"plot": 5'))
    with pytest.raises(ValueError, match="other marks"):
        take_in(sheets, evidence, "a reader", "1 May")
    (evidence / "key.json").unlink()
    with pytest.raises(ValueError, match=r"not in .*key\.json"):
        take_in(sheets, evidence, "a reader", "1 May")


def test_a_server_answers_the_sheets_that_have_no_answer_and_one_that_is_not_there_is_named(trial, loopback, monkeypatch):
    sheets, evidence = trial
    (sheets / "answers" / "alone01-r1.jsonl").unlink()

    def reply(request):
        asked = json.loads(request.body)["messages"][0]["content"]
        lines = [json.dumps(answer(name)) for name in re.findall("## (.*)", asked)]
        message = {"role": "assistant", "content": "\n".join(["Here they are:", *lines])}
        body = {
            "id": "1",
            "object": "chat.completion",
            "created": 1,
            "model": "m",
            "choices": [{"index": 0, "message": message}],
        }
        request.begin(200, {"Content-Type": "application/json"})
        request.wfile.write(json.dumps(body).encode())

    loopback.answers = [reply]
    with pytest.raises(ConfigError, match="BLM_JUDGE_URL"):
        ratings.ask(sheets)
    for name, value in {"URL": "http://127.0.0.1:9/v1", "MODEL": "m", "KEY": "secret"}.items():
        monkeypatch.setenv(f"BLM_JUDGE_{name}", value)
    with pytest.raises(ValueError, match=r"alone01-r1.*APIConnectionError"):
        ratings.ask(sheets)
    monkeypatch.setenv("BLM_JUDGE_URL", f"{loopback.address}/v1")
    for _ in range(2):
        ratings.ask(sheets)
    assert [headers["authorization"] for headers in loopback.asked] == ["Bearer secret"]
    take_in(sheets, evidence, "m", "1 May")


def test_the_committed_marks_are_whole_and_give_the_figures_that_were_reported():
    key = read_json(EVIDENCE / "key.json")
    for name, note in read_json(EVIDENCE / "ratings" / "sheets.json").items():
        lines = list(read_json_lines(EVIDENCE / "ratings" / f"{name}.jsonl"))
        assert problems(lines, key[name[:-3]]) == [], name
        assert note["items"] == len(lines)
    assert [round(line.value, 1) for line in Ratings(EVIDENCE).lines()[:2]] == [15.3, 50.0]
