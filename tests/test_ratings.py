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


def answer(name: str, kind: str = "child", mark: int = 7, ends: str = "yes") -> dict:
    return {"id": name, "kind": kind, "grammar": mark, "consistency": mark, "plot": mark, "ends": ends}


def test_texts_become_one_line_of_whole_sentences_within_a_limit():
    text = "Wub  sang.\n\n\u201cLouder!\u201d said Mr. Ploo.\nThen Mr. Ploo and"
    assert ratings.treated(text) == 'Wub sang. "Louder!" said Mr. Ploo.'
    assert ratings.treated("no end at all") == "no end at all"
    cuts = {limit: ratings.cut("Wub sang. Ploo slept all day. Then it rained.", limit) for limit in (1, 5, 6)}
    assert cuts == {1: "Wub sang.", 5: "Wub sang.", 6: "Wub sang. Ploo slept all day."}


def test_no_text_is_longer_than_its_rank_in_the_yardstick():
    long, short = (
        [Text(f"{i}", "ours", " ".join([f"Number {i}.", *[SENTENCE] * (n + i % 3)])) for i in range(9)] for n in (12, 5)
    )
    matched = ratings.match_lengths(long, short)
    assert [t.source for t in matched] == [t.source for t in long]
    assert all(a <= b for a, b in zip(sorted(t.n_words for t in matched), sorted(t.n_words for t in short), strict=True))


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
    home = tmp_path_factory.mktemp("trial")

    def record(name: str, prompt: str, **more) -> dict:
        return {"id": name, "prompt": prompt, "completion": f" {' '.join([SENTENCE] * 9)}", **more}

    marks = {"judge_consistency": 6, "judge_fluency": 7}
    once = [record(f"elex-{who}-{i}", ratings.BEGINNING, **marks) for who in ("gpt2xl", "chatgpt", "my") for i in range(6)]
    ladder = [record(f"tinyscalelab-{i}", f"Story {i}", model=m, kind="story") for i in range(6) for m in RUNGS]
    openings = [record(f"longer-{i}", f"On day {i} a tall blue goat met") for i in range(2)]
    files = {"once_upon_a_time": once, "peers": ladder, "published_completions": openings, "published_completions_2": []}
    for name, lines in files.items():
        write_json_lines(home / "recorded" / f"{name}.jsonl", lines)
    real = [f"{ratings.BEGINNING} Wub {i} sang. {' '.join([SENTENCE] * 9)}\n" for i in range(7)]
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


def test_sheets_hold_all_items_of_the_key_and_name_no_arm(made):
    sheets = {path.stem: path.read_text() for path in made.sheets.glob("*.md")}
    assert len(sheets) == 12 * 2 + 3 + 3 + 5 * 2
    for name, text in sheets.items():
        assert re.findall("## (.*)", text) == list(made.key[name[:-3]])
        assert str(made.sheets / "answers" / f"{name}.jsonl") in text
        assert not re.search("GPT|BLM|elex|TinyStories|tinyscalelab|longer-|valid-", text)
    assert SENTENCE not in str(made.key)


def test_pairs_have_one_length_and_a_repeated_text_stands_in_two_sheets(made):
    places = {}
    for name, items in made.key.items():
        for item in items.values():
            if "a" in item:
                assert min(item["a"]["words"], item["b"]["words"]) >= 40
                assert abs(item["a"]["words"] - item["b"]["words"]) <= 11
            elif name.startswith("alone"):
                places.setdefault(item["source"], []).append(name)
    assert sorted(len(set(names)) for names in places.values()) == [1] * 24 + [2] * 12
    assert sum(map(len, places.values())) == 24 + 2 * 12


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
    assert [len(found.arm(arm)) for arm in ARMS] == [6] * 6
    assert len(found.rungs()) == 6
    assert found.noise() | {"texts": 12, "grammar": 0, "same kind": 1} == found.noise()
    # Measure 1 needs both raters, and the mean of their marks, 4 and 6.
    assert (found.share(SAME).value, found.share(SAME, 5.5).value, found.share(XL).value) == (1, 0, pytest.approx(5 / 6))
    assert found.lines()[0].value == pytest.approx(100 / 6)
    # Pairs count in both orders; the fair fight leaves out the text that is no story.
    bare, fair, longer = found.groups().values()
    first = [float(p.orders[1][0] == "a") for p in bare]  # where the BLM stands first on sheets b
    assert [p.points("child") for p in bare] == [(1.0, x) for x in first]
    assert [p.points("text") for p in bare] == [(0.5, x) for x in first]
    assert {p.xl for p in bare} - {p.xl for p in fair} <= {"elex-gpt2xl-0"}
    assert {p.xl for p in longer} <= {"longer-0", "longer-1"}
    on_a = sum(p.orders[0][0] == "a" for p in found.pairs) / len(found.pairs)
    assert found.position_pull().value == pytest.approx((1 + on_a) / 2)
    # Raters agree on the kind and differ in their marks, which follow the order of other people's.
    agreement = found.agreement()
    assert agreement["kind, kappa"] == 1
    assert 0 < agreement["plot, alpha"] < 1
    marks = {"elex-gpt2xl-0": 2, "elex-gpt2xl-1": 8, "elex-chatgpt-0": 9}
    validity = found.validity({i: {"consistency": m, "fluency": 10 - m} for i, m in marks.items()})
    assert validity["texts"] == 3
    assert validity["consistency"] > 0.8 > -0.8 > validity["fluency"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"grammar": 11}, "not one of 0, 1"),
        ({"plot": 6.0}, "not one of 0, 1"),
        ({"plot": [True]}, "not one of 0, 1"),
        ({"kind": "poem"}, "not one of 'child'"),
        ({"id": ["x-1"]}, "not on the sheet"),
        ({"id": "x-2"}, "answered 2 times"),
        ({"remark": ""}, "has the fields"),
    ],
)
def test_an_answer_that_is_not_as_asked_is_named(change, said):
    key = {"x-1": {"arm": XL}, "x-2": {"arm": XL}}
    assert problems([answer("x-1"), answer("x-2")], key) == []
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
    asked = []

    def reply(request):
        asked.append(json.loads(request.body)["messages"][0]["content"])
        names = [line[3:] for line in asked[0].splitlines() if line.startswith("## ")]
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
    with pytest.raises(ValueError, match=r"alone01-r1.*APIConnectionError"):
        ratings.ask(sheets)
    monkeypatch.setenv("BLM_JUDGE_URL", f"{loopback.address}/v1")
    for _ in range(2):
        ratings.ask(sheets)
    assert [headers["authorization"] for headers in loopback.asked] == ["Bearer secret"]
    assert "## alone01-01" in asked[0]
    take_in(sheets, evidence, "m", "1 May")


def test_the_committed_marks_are_whole_and_give_the_figures_that_were_reported():
    key = read_json(EVIDENCE / "key.json")
    for name, note in read_json(EVIDENCE / "ratings" / "sheets.json").items():
        lines = list(read_json_lines(EVIDENCE / "ratings" / f"{name}.jsonl"))
        assert problems(lines, key[name[:-3]]) == [], name
        assert note["items"] == len(lines)
    assert [round(line.value, 1) for line in Ratings(EVIDENCE).lines()[:2]] == [15.3, 50.0]
    earlier = ratings.earlier_by_kind(EVIDENCE)
    assert {kind: round(earlier[kind]["rate"].value, 3) for kind in ("all", "story")} == {"all": 0.288, "story": 0.594}
