"""Blind ratings: one treatment for all texts, sheets that give nothing away, answers taken whole, figures by the protocol."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from blm_core.config import ROOT, ConfigError
from blm_core.evidence.ratings import (
    ALONE,
    ALONE_ANSWER,
    ARMS,
    OWN,
    PAIRS,
    PAIRS_ANSWER,
    SAME,
    XL,
    Ratings,
    RatingsError,
    Text,
    ask,
    cut,
    earlier_by_kind,
    in_sheets,
    match_lengths,
    problems,
    random_pairs,
    take_in,
    treated,
    write_sheets,
)
from blm_core.files import read_json, sha256, write_json

SENTENCE = "The green kite of Wub went over nine hills again today."  # 11 words


def made(arm: str, n: int, sentences: int) -> list[Text]:
    return [Text(f"{arm}-{i}", arm, " ".join([f"Number {i} is {arm}.", *[SENTENCE] * (sentences + i % 3)])) for i in range(n)]


def test_texts_become_one_line_that_ends_with_a_sentence():
    assert (
        treated("Wub  sang.\n\n\u201cLouder!\u201d said Mr. Ploo.\nThen Mr. Ploo and") == 'Wub sang. "Louder!" said Mr. Ploo.'
    )
    assert treated("no end at all") == "no end at all"


@pytest.mark.parametrize(("limit", "expected"), [(1, "Wub sang."), (5, "Wub sang."), (6, "Wub sang. Ploo slept all day.")])
def test_a_cut_keeps_whole_sentences_within_the_limit_and_at_least_one(limit, expected):
    assert cut("Wub sang. Ploo slept all day. Then it rained.", limit) == expected


def test_no_text_is_longer_than_its_rank_in_the_yardstick():
    long, short = made("ours", 9, 12), made("theirs", 9, 5)
    matched = match_lengths(long, short)
    assert [t.source for t in matched] == [t.source for t in long]
    assert all(a <= b for a, b in zip(sorted(t.n_words for t in matched), sorted(t.n_words for t in short), strict=True))


def test_pairs_have_one_length_and_none_is_short():
    ours, theirs = made("ours", 9, 9), made("theirs", 9, 3)
    pairs = random_pairs(ours, theirs, seed=1)
    assert len(pairs) == 6
    assert min(t.n_words for pair in pairs for t in pair) >= 40
    assert all(abs(a.n_words - b.n_words) <= 11 for a, b in pairs)
    assert len({a.source for a, _ in pairs}) == len(pairs)


def test_repeated_texts_stand_in_two_sheets():
    texts = made("ours", 30, 4)
    sheets = in_sheets(texts, 4, 6, seed=1)
    assert sorted(len(s) for s in sheets)[0] >= 30 // 4
    counts = [sum(t in sheet for sheet in sheets) for t in texts]
    assert counts.count(2) == 6
    assert counts.count(1) == 24


def test_sheets_name_no_arm_and_keys_hold_no_text(tmp_path):
    texts = [Text(f"s{i}", "the hidden arm", f"{SENTENCE} {i}.") for i in range(6)]
    key, tasks = write_sheets(tmp_path, "alone", [texts[:3], texts[3:]], ("r1", "r2"), ALONE, ALONE_ANSWER)
    assert len(tasks) == 4
    assert set(key) == {"alone01", "alone02"}
    sheet = (tmp_path / "alone01-r1.md").read_text()
    assert sheet.count(SENTENCE) == 3
    assert "hidden arm" not in sheet
    assert "s0" not in sheet
    assert str(tmp_path / "answers" / "alone01-r1.jsonl") in sheet
    assert "Wub" not in str(key)
    assert key["alone02"]["alone02-01"]["source"] == "s3"


def test_an_item_twice_in_one_sheet_is_refused(tmp_path):
    text = made("ours", 1, 4)[0]
    with pytest.raises(RatingsError, match="twice"):
        write_sheets(tmp_path, "pairs", [[(text, text), (text, text)]], ("r1",), PAIRS, PAIRS_ANSWER)


def answer(name: str, kind: str = "child", mark: int = 7, **more) -> dict:
    return {"id": name, "kind": kind, "grammar": mark, "consistency": mark, "plot": mark, "ends": "yes"} | more


@pytest.fixture
def rated(tmp_path):
    """Two texts of each arm alone and a pair in both orders, answered: GPT2-XL tells a story in its second text only."""
    texts = [Text(f"{arm}/{i}", arm, f"{SENTENCE} {arm} {i}.") for arm in ARMS for i in range(2)]
    bare = [(Text(f"{SAME}/{i}", SAME, SENTENCE * 4), Text(f"{XL}/{i}", XL, SENTENCE * 4)) for i in range(2)]
    sheets, evidence = tmp_path / "sheets", tmp_path / "evidence"
    key, _ = write_sheets(sheets, "alone", [texts], ("r1", "r2"), ALONE, ALONE_ANSWER)
    for order, rater, pairs in (("a", "r1", bare), ("b", "r2", [pair[::-1] for pair in bare])):
        key |= write_sheets(sheets, f"pairs-{order}", [pairs], (rater,), PAIRS, PAIRS_ANSWER)[0]
    evidence.mkdir()
    write_json(evidence / "key.json", key)
    for rater in ("r1", "r2"):
        lines = [
            answer(i, "none", 1, ends="no") if e["source"] == f"{XL}/0" else answer(i, "child", 4 if rater == "r1" else 6)
            for i, e in key["alone01"].items()
        ]
        put(sheets, f"alone01-{rater}", lines)
    # The BLM stands first on sheet a and second on b. The rater of a likes it in both pairs, that of b in the first.
    put(sheets, "pairs-a01-r1", [{"id": f"pairs-a01-0{i}", "child": "a", "text": "tie"} for i in (1, 2)])
    put(sheets, "pairs-b01-r2", [{"id": f"pairs-b01-0{i}", "child": "ba"[i - 1], "text": "a"} for i in (1, 2)])
    return sheets, evidence


def put(sheets, name, lines):
    (sheets / "answers" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_whole_answers_are_taken_with_the_hash_of_their_sheet(rated):
    sheets, evidence = rated
    assert take_in(sheets, evidence, "a reader", "1 May") == {}
    noted = read_json(evidence / "ratings" / "sheets.json")["alone01-r2"]
    assert noted == {"rater": "a reader", "date": "1 May", "items": 12, "sha256": sha256(sheets / "alone01-r2.md")}
    found = Ratings(evidence)
    assert found.sheets == (4, 4)
    assert len(found.alone) == 12


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"grammar": 11}, "no whole number"),
        ({"plot": 6.5}, "no whole number"),
        ({"plot": True}, "no whole number"),
        ({"kind": "poem"}, "not one of"),
        ({"id": "alone01-99"}, "not on the sheet"),
        ({"id": "x-2"}, "answered 2 times"),
        ({"remark": ""}, "has the fields"),
    ],
)
def test_an_answer_that_is_not_as_asked_is_named(change, said):
    key = {"x-1": {"arm": XL}, "x-2": {"arm": XL}}
    assert problems([answer("x-1"), answer("x-2")], key) == []
    assert any(said in problem for problem in problems([answer("x-1") | change, answer("x-2")], key))


def test_a_sheet_that_lacks_one_answer_is_not_taken(rated):
    sheets, evidence = rated
    path = sheets / "answers" / "alone01-r2.jsonl"
    path.write_text(path.read_text().rstrip("\n").rsplit("\n", 1)[0])
    left = take_in(sheets, evidence, "a reader", "1 May")
    assert set(left) == {"alone01-r2"}
    assert "alone01-12 is missing" in left["alone01-r2"]
    found = Ratings(evidence)
    assert found.sheets == (3, 4)
    assert found.alone == []
    assert found.lines()[0].verdict == "not rated yet"


def test_a_sheet_is_not_taken_twice_with_other_marks(rated):
    sheets, evidence = rated
    take_in(sheets, evidence, "a reader", "1 May")
    path = sheets / "answers" / "alone01-r1.jsonl"
    path.write_text(path.read_text().replace('"plot": 4', '"plot": 5'))
    with pytest.raises(RatingsError, match="other marks"):
        take_in(sheets, evidence, "a reader", "1 May")


def test_measure_1_needs_both_raters_and_the_mean_of_their_marks(rated):
    take_in(*rated, "a reader", "1 May")
    found = Ratings(rated[1])
    assert found.share(SAME).value == 1  # marks 4 and 6: their mean is enough
    assert found.share(SAME, 5.5).value == 0
    assert found.share(XL).value == 0.5
    first = found.lines()[0]
    assert first.value == 50
    assert first.verdict == "undecided"


def test_pairs_count_both_orders_and_the_fair_fight_only_stories(rated):
    take_in(*rated, "a reader", "1 May")
    found = Ratings(rated[1])
    by_source = {p.blm: p for p in found.bare_pairs()}
    assert by_source[f"{SAME}/0"].points == {"child": (1.0, 1.0), "text": (0.5, 0.0)}
    assert by_source[f"{SAME}/1"].points == {"child": (1.0, 0.0), "text": (0.5, 0.0)}
    assert found.position_pull().value == 0.75
    assert [p.xl for p in found.fair_pairs()] == [f"{XL}/1"]
    assert {line.name: line.value for line in found.lines()}["2 which would you read to a child?"] == 25


def test_raters_who_agree_on_the_kind_have_kappa_1_and_alpha_sees_the_marks_apart(rated):
    take_in(*rated, "a reader", "1 May")
    agreement = Ratings(rated[1]).agreement()
    assert agreement["kind, kappa"] == 1
    assert 0 < agreement["plot, alpha"] < 1


def test_validity_follows_the_order_of_other_peoples_marks(rated):
    take_in(*rated, "a reader", "1 May")
    marks = {f"{XL}/0": 2, f"{XL}/1": 8, "ChatGPT/0": 9}
    found = Ratings(rated[1]).validity({i: {"consistency": m, "fluency": 10 - m} for i, m in marks.items()})
    assert found["texts"] == 3
    assert found["consistency"] > 0.8
    assert found["fluency"] < -0.8


@pytest.fixture
def server():
    """An OpenAI-compatible server that answers every item of a sheet, and remembers what it was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.headers["Authorization"], body))
            names = [line[3:] for line in body["messages"][0]["content"].splitlines() if line.startswith("## ")]
            content = "Here they are:\n" + "\n".join(json.dumps(answer(name)) for name in names)
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
            reply = json.dumps(
                {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
            ).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_):
            pass

    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}/v1", asked
    httpd.shutdown()
    httpd.server_close()


def test_a_server_answers_the_same_sheets(server, tmp_path, monkeypatch):
    url, asked = server
    sheets = [[Text(f"s{i}", OWN, f"{SENTENCE} {i}.") for i in range(3)]]
    key, _ = write_sheets(tmp_path, "alone", sheets, ("r1", "r2"), ALONE, ALONE_ANSWER)
    write_json(tmp_path / "evidence" / "key.json", key)
    with pytest.raises(ConfigError, match="BLM_JUDGE_URL"):
        ask(tmp_path)
    for name, value in {"URL": url, "MODEL": "m", "KEY": "secret"}.items():
        monkeypatch.setenv(f"BLM_JUDGE_{name}", value)
    assert ask(tmp_path) == {}
    assert len(asked) == 2
    assert asked[0][0] == "Bearer secret"
    assert SENTENCE in asked[0][1]["messages"][0]["content"]
    assert take_in(tmp_path, tmp_path / "evidence", "m", "1 May") == {}
    ask(tmp_path)
    assert len(asked) == 2


def test_a_server_that_is_not_there_is_named(tmp_path, monkeypatch):
    write_sheets(tmp_path, "alone", [[Text("s", OWN, SENTENCE)]], ("r1",), ALONE, ALONE_ANSWER)
    monkeypatch.setenv("BLM_JUDGE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("BLM_JUDGE_MODEL", "m")
    assert "APIConnectionError" in ask(tmp_path)["alone01-r1"]


def test_the_committed_marks_are_whole_and_in_range():
    evidence = ROOT / "runs" / "evidence"
    key, noted = read_json(evidence / "key.json"), read_json(evidence / "ratings" / "sheets.json", {})
    for name, note in noted.items():
        lines = [json.loads(line) for line in (evidence / "ratings" / f"{name}.jsonl").read_text().splitlines()]
        assert problems(lines, key[name.rsplit("-", 1)[0]]) == [], name
        assert note["items"] == len(lines)


def test_the_earlier_marks_give_the_figures_that_were_reported():
    found = earlier_by_kind(ROOT / "runs" / "evidence")
    assert found["all"]["rate"].value == pytest.approx(0.288, abs=5e-4)
    assert found["story"]["rate"].value == pytest.approx(0.594, abs=5e-4)
