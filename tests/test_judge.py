"""The judge's two roads: blind sheets and back, and an endpoint on the loopback interface that misbehaves as each test says."""

import contextlib
import email.utils
import json
import math
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from blm_core.config import ConfigError
from blm_core.evidence import judge, sheets
from blm_core.evidence.__main__ import main
from blm_core.evidence.judge import Endpoint, Judge, JudgeError, parse_answer
from blm_core.evidence.judge import endpoint_from_environment as from_environment
from blm_core.evidence.ratings import Rating, RatingsError, read_ratings
from blm_core.evidence.sheets import Form, comparable, items, pairs, read_marks

KEY = "not-a-real-key-83c1"
MARKS = {"grammar": 7, "creativity": 5, "consistency": 6.5, "plot": 4, "age": "6-7"}
ANSWER = {"a": MARKS, "b": MARKS | {"plot": 3}, "preferred": "a"}
USAGE = {"prompt_tokens": 400, "completion_tokens": 60}


def lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def recordings(tmp_path):
    """Five prompts that two models answered, one of them twice, and a third model's answers to four."""
    ours, theirs = [], []
    for i in range(5):
        prompt = f"A snail of {i} years met a bright"
        for sample in range(2 if i == 0 else 1):
            ours.append({"prompt": prompt, "completion": f" moth. They drew {i + sample} maps. They slept."})
            ours[-1] |= {"model": "blm", "revision": "r1"}
            theirs.append({"id": f"x{i}", "model": "rival", "prompt": prompt, "completion": f"kettle, number {i}{sample}."})
            theirs[-1] |= {"kind": "story"} if i else {"group": "factual"}
        if i < 4:
            theirs[-1] |= {"peer_model": "peer", "peer_completion": f"stone number {i}."}
    return lines(tmp_path / "ours.jsonl", ours), lines(tmp_path / "theirs.jsonl", theirs)


@pytest.fixture
def sheet(recordings):
    return items(pairs(*recordings)[0], seed=3)


def filled(sheet, better="moth"):
    """Marks as a rater would return them who likes whatever holds `better`."""
    for item in sheet:
        good = [better in text for text in item.texts]
        yield {
            "id": item.id,
            "a": MARKS | {"plot": 9 if good[0] else 2},
            "b": MARKS | {"plot": 9 if good[1] else 2},
            "preferred": "tie" if good[0] == good[1] else "a" if good[0] else "b",
        }


# Pairs


def test_every_completion_is_paired_with_ours_on_its_prompt_sample_by_sample(recordings):
    found, alone = pairs(*recordings)
    assert len([pair for pair in found if pair.models == ("blm", "rival")]) == 6
    assert len([pair for pair in found if pair.models == ("blm", "peer")]) == 4
    assert sorted(pair.sample for pair in found if pair.prompt.startswith("A snail of 0")) == [0, 0, 1]
    assert alone == {"rival": 0, "peer": 0}


def test_a_prompt_has_one_name_however_it_is_written(recordings):
    found, _ = pairs(*recordings)
    assert found[0].prompt_id == sheets.prompt_id("A snail of 0\n years met  a bright") != sheets.prompt_id("A snail of")


def test_completions_without_a_partner_are_counted(recordings, tmp_path):
    kept = [json.loads(line) for line in recordings[0].read_text().splitlines()][2:]
    found, alone = pairs(lines(tmp_path / "fewer.jsonl", kept), recordings[1])
    assert (len(found), alone) == (7, {"rival": 2, "peer": 1})


def test_recordings_that_cannot_be_compared_are_refused(recordings, tmp_path):
    ours, theirs = recordings
    with pytest.raises(ValueError, match="no prompt in common"):
        pairs(lines(tmp_path / "other.jsonl", [{"model": "m", "prompt": "Elsewhere", "completion": "x"}]), theirs)
    with pytest.raises(ValueError, match="stands in both"):
        pairs(ours, ours)
    with pytest.raises(ValueError, match="one model, found rival, peer"):
        pairs(theirs, ours)
    with pytest.raises(ValueError, match="record q7: prompt, model and completion must be texts"):
        pairs(ours, lines(tmp_path / "bad.jsonl", [{"id": "q7", "prompt": "A", "completion": "b"}]))
    theirs.write_text(theirs.read_text()[:-20])
    with pytest.raises(ValueError, match="line 6 is not valid JSON"):
        pairs(ours, theirs)


def test_form_hides_case_white_space_and_typography():
    ours = " \u201cHello ,\u201d it said.\n\n\nNobody  came."
    theirs = '"hello,"it said. nobody came.'
    assert comparable("The goat looked up.", ours, theirs, Form()) == ('"hello," it said. nobody came.',) * 2


def test_a_prompts_end_that_a_recording_repeats_is_dropped():
    prompt = "The goat looked at the old lighthouse"
    assert comparable(prompt, "old lighthouse and left.", " and left.", Form()) == ("and left.", "and left.")


def test_quotes_are_read_from_where_the_prompt_left_off():
    prompt = 'The goat said, "I would like'
    assert comparable(prompt, 'some hay."the cow said,"no."', "x", Form(cut="none"))[0] == 'some hay." the cow said, "no."'
    assert comparable('The goat said, "', '"Hay!"', "Hay!", Form(cut="none")) == ('hay!"', "hay!")


LONG = "A cat sat. It ate fish. It went to sleep in the sun."


@pytest.mark.parametrize(
    ("cut", "other", "expected"),
    [
        # An unfinished last sentence goes; of the five words left, six are closer than three.
        ("sentences", "Dogs ran over the hills. Then they", ("A cat sat. It ate fish.", "Dogs ran over the hills.")),
        ("sentences", "No.", ("A cat sat.", "No.")),
        ("words", "Dogs ran over the hills.", ("A cat sat. It ate", "Dogs ran over the hills.")),
        ("none", "Dogs ran over the hills. Then", (LONG, "Dogs ran over the hills. Then")),
    ],
)
def test_the_longer_text_is_cut_to_the_shorter(cut, other, expected):
    form = Form(lower_case=False, cut=cut)
    assert comparable("", LONG, other, form) == expected
    assert comparable("", other, LONG, form) == expected[::-1]


def test_an_unfinished_text_is_kept_where_it_is_all_there_is():
    a, b = comparable("", "the goat is better than", "The goat. The cow.", Form())
    assert (a, b) == ("the goat is better than", "the goat. the cow.")
    assert comparable("", "", "Hay.", Form())[0] == sheets.NOTHING


def test_an_unknown_cut_is_refused():
    with pytest.raises(ConfigError, match="sentences, words, none"):
        Form(cut="letters")


# Sheets


def test_each_pair_stands_in_both_orders_far_apart_and_each_model_is_a_as_often(sheet):
    places = {}
    for i, item in enumerate(sheet):
        places.setdefault(item.pair.id, []).append((i, item.models, item.texts, item.part))
    assert len(places) == 10
    for (i, models, texts, part), (j, turned, turned_texts, other_part) in places.values():
        assert (models, texts) == (turned[::-1], turned_texts[::-1])
        assert (part, other_part) == (1, 2)
        assert j - i > len(places) // 2
    for part in (1, 2):
        assert sum(item.models[0] == "blm" for item in sheet if item.part == part) == 5


def test_a_seed_gives_the_same_sheet_and_another_one_other_ids(recordings, sheet):
    found, _ = pairs(*recordings)
    assert items(found, 3) == sheet
    assert not {item.id for item in items(found, 4)} & {item.id for item in sheet}


@pytest.mark.parametrize("name", ["sheet.md", "sheet.jsonl"])
def test_a_sheet_shows_all_texts_and_no_model(sheet, tmp_path, name):
    sheets.write_sheet(tmp_path / name, sheet, Form())
    text = (tmp_path / name).read_text()
    assert "rival" not in text
    assert "peer" not in text
    assert "blm" not in text
    for item in sheet:
        assert item.id in text
        assert all(part in text for part in item.texts)


def test_a_key_holds_no_text(sheet, tmp_path):
    sheets.write_key(tmp_path / "key.json", sheet, Form(), 3)
    text = (tmp_path / "key.json").read_text()
    assert "moth" not in text
    assert "snail" not in text
    assert "kettle" not in text


def test_another_sheets_key_is_not_overwritten(recordings, sheet, tmp_path):
    sheets.write_key(tmp_path / "key.json", sheet, Form(), 3)
    sheets.write_key(tmp_path / "key.json", sheet, Form(), 3)
    with pytest.raises(RatingsError, match="not this sheet's key"):
        sheets.write_key(tmp_path / "key.json", items(pairs(*recordings)[0], 4), Form(), 4)


def test_marks_come_back_as_ratings_of_the_models(sheet, tmp_path):
    key = tmp_path / "key.json"
    sheets.write_key(key, sheet, Form(), 3)
    returned = list(filled(sheet))[::-1]  # in any order, in two files
    one, two = lines(tmp_path / "one.jsonl", returned[:7]), lines(tmp_path / "two.jsonl", returned[7:])
    found = read_marks([one, two], key, "reader-1")
    assert {rating.winner for rating in found} == {"blm"}
    assert all({r.first: r.first_marks, r.second: r.second_marks}["blm"]["plot"] == 9 for r in found)
    assert [rating.id for rating in found] == [item.id for item in sheet]
    assert [rating.kind for rating in found] == ["factual" if " 0 " in item.pair.prompt else "story" for item in sheet]
    path = sheets.save(tmp_path / "out", "reader-1", found)
    assert read_ratings(path) == found
    assert "moth" not in path.read_text()
    sheets.save(tmp_path / "out", "reader-1", found)
    with pytest.raises(RatingsError, match="holds other ratings"):
        sheets.save(tmp_path / "out", "reader-1", found[1:])
    assert read_ratings(path) == found
    with pytest.raises(RatingsError, match="names a file"):
        sheets.save(tmp_path / "out", "../reader", found)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: m.pop(4), "without marks: {id}"),
        (lambda m: m.append(m[4]), r"marked more than once: {id} \(marks.jsonl:5, marks.jsonl:21\)"),
        (lambda m: m.append(m[4] | {"id": "999-abcdef"}), "not on this sheet: 999-abcdef"),
        (lambda m: m[4].update(a=MARKS | {"plot": 11}), "{id}: a.plot is 11, not between 0 and 10"),
        (lambda m: m[4].update(a=MARKS | {"plot": -0.5}), "{id}: a.plot is -0.5, not between 0 and 10"),
        (lambda m: m[4].update(b=MARKS | {"plot": "7"}), "{id}: b.plot is '7', not a number"),
        (lambda m: m[4].update(b=MARKS | {"plot": True}), "{id}: b.plot is True, not a number"),
        (lambda m: m[4].update(b=MARKS | {"plot": math.nan}), "line 5 is not valid JSON .NaN is no mark"),
        (lambda m: m[4].update(b=MARKS | {"age": "old"}), "{id}: b.age is 'old', not one of"),
        (lambda m: m[4].update(b={k: v for k, v in MARKS.items() if k != "plot"}), "{id}: b lacks plot"),
        (lambda m: m[4].update(b=[1, 2]), r"{id}: b is \[1, 2\], not an object"),
        (lambda m: m[4].update(preferred="c"), "{id}: preferred is 'c'"),
        (lambda m: m[4].update(comment="nice"), "{id}: the answer has 'comment'"),
        (lambda m: m[4].pop("id"), "marks.jsonl, line 5 has no id"),
    ],
)
def test_marks_that_cannot_be_are_named_and_nothing_is_taken_in(sheet, tmp_path, spoil, message):
    key = tmp_path / "key.json"
    sheets.write_key(key, sheet, Form(), 3)
    marks = list(filled(sheet))
    spoil(marks)
    with pytest.raises(RatingsError, match=message.replace("{id}", sheet[4].id)):
        read_marks([lines(tmp_path / "marks.jsonl", marks)], key, "reader")


def test_all_that_is_wrong_with_marks_is_said_at_once(sheet, tmp_path):
    key = tmp_path / "key.json"
    sheets.write_key(key, sheet, Form(), 3)
    path = lines(tmp_path / "marks.jsonl", [*filled(sheet)][:-2])
    path.write_text(path.read_text() + "```\n[3]\n")
    with pytest.raises(RatingsError) as error:
        read_marks([path], key, "reader")
    for part in ("line 19 is not valid JSON", "line 20 is not an object", sheet[-1].id, sheet[-2].id):
        assert part in str(error.value)


def test_a_file_that_is_no_key_is_refused(sheet, tmp_path):
    with pytest.raises(RatingsError, match="is not the key of a sheet"):
        read_marks([lines(tmp_path / "marks.jsonl", filled(sheet))], tmp_path / "marks.jsonl", "reader")


# Answers


def test_the_one_object_with_marks_is_found_in_what_a_model_says():
    doubt = f"<think>Maybe {json.dumps(ANSWER | {'preferred': 'b'})}?</think>"
    assert parse_answer(f"{doubt}Here {{you}} are:\n```json\n{json.dumps(ANSWER)}\n```") == ANSWER


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("I cannot help with that.", "no JSON object"),
        ("", "no JSON object"),
        (json.dumps(ANSWER)[:-9], "not valid JSON"),
        (json.dumps(ANSWER).replace("4", "NaN", 1), "NaN is no mark"),
        (json.dumps(ANSWER).replace('"age"', '"plot": 9, "age"', 1), "a name stands twice"),
        (json.dumps(ANSWER) + json.dumps(ANSWER | {"preferred": "b"}), "2 different sets"),
        ("<think>" + json.dumps(ANSWER), "no JSON object"),
        (json.dumps({"preferred": "a"}), "the answer lacks a, b"),
    ],
)
def test_an_answer_that_cannot_be_used_is_refused_with_its_reason(text, reason):
    with pytest.raises(RatingsError, match=reason):
        parse_answer(text)


# Endpoint


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = {"path": self.path, "at": time.monotonic(), "body": body, "key": self.headers.get("Authorization")}
        self.server.asked.append(asked)
        answers = self.server.answers
        with contextlib.suppress(ConnectionError):
            answers[min(len(self.server.asked), len(answers)) - 1](self, body["messages"][0]["content"])

    def reply(self, body: str | bytes, status: int = 200, stated: int | None = None, **headers) -> None:
        body = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for name, value in ({"Content-Length": stated or len(body), "Connection": "close"} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    """Gives its `answers` one per request, the last one again and again, and remembers what it was `asked`."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.asked, self.over = [says()], [], threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


def says(content=None, usage=USAGE, **message):
    """A sound reply: `content`, or the marks of a judge who likes moths."""

    def answer(request, question):
        a, b = re.search(r"\nA: (.*)\n\nB: (.*)\n", question).groups()
        good = "moth" in a, "moth" in b
        liked = ANSWER | {"preferred": "tie" if good[0] == good[1] else "a" if good[0] else "b"}
        text = f"Here it is: {json.dumps(liked)}" if content is None else content
        reply = {"choices": [{"message": {"content": text, **message}, "finish_reason": "stop"}], "usage": usage}
        request.reply(json.dumps(reply))

    return answer


def status(code, body="", **headers):
    return lambda request, _: request.reply(body, code, **headers)


def raw(body, stated=None):
    return lambda request, _: request.reply(body, stated=stated)


def never(request, _):
    request.server.over.wait(30)


def dropped(request, _):
    request.close_connection = True


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(judge, "BACKOFF", 0.001)
    monkeypatch.setattr(judge, "TIMEOUT", (5, 5))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("BLM_JUDGE_KEY", KEY)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


def asker(server, folder, **settings):
    return Judge(Endpoint(server.url, "judge-1", **{"requests_per_minute": 1e9} | settings), folder / "cache")


def test_an_endpoint_rates_every_item_and_keeps_to_the_interface(server, sheet, tmp_path):
    outcome = asker(server, tmp_path).rate(sheet)
    assert [rating.id for rating in outcome.ratings] == [item.id for item in sheet]
    assert {rating.winner for rating in outcome.ratings} == {"blm"}
    assert {rating.rater for rating in outcome.ratings} == {"judge-1"}
    assert (outcome.asked, outcome.reused, outcome.refused, outcome.left) == (20, 0, {}, [])
    first = server.asked[0]
    assert (first["path"], first["key"], first["body"]["model"]) == ("/v1/chat/completions", f"Bearer {KEY}", "judge-1")
    assert sheet[0].pair.prompt in first["body"]["messages"][0]["content"]
    assert "lower case" in first["body"]["messages"][0]["content"]


def test_both_roads_give_the_same_format(server, sheet, tmp_path):
    asked = asker(server, tmp_path).rate(sheet, "same").ratings
    key = tmp_path / "key.json"
    sheets.write_key(key, sheet, Form(), 3)
    side = {"first": "a", "second": "b", "tie": "tie"}
    marks = [{"id": r.id, "a": r.first_marks, "b": r.second_marks, "preferred": side[r.preferred]} for r in asked]
    assert read_marks([lines(tmp_path / "marks.jsonl", marks)], key, "same") == asked
    assert all(isinstance(rating, Rating) for rating in asked)


def test_a_rerun_costs_nothing_and_gives_the_same(server, sheet, tmp_path):
    first = asker(server, tmp_path, price_in=1, price_out=2).rate(sheet)
    again = asker(server, tmp_path, price_in=1, price_out=2).rate(sheet)
    assert (again.asked, again.reused, again.spent) == (0, 20, first.spent)
    assert again.ratings == first.ratings
    assert len(server.asked) == 20


@pytest.mark.parametrize(
    "trouble",
    [
        status(429),
        status(500),
        status(503, "gone for lunch"),
        status(408),
        dropped,
        raw("{ not JSON"),
        raw('{"choices": []}'),
        raw('{"error": {"message": "overloaded"}}'),
        raw("[]"),
        raw('{"choices": [{"mess', stated=5000),
    ],
    ids=["429", "500", "503", "408", "dropped", "not JSON", "no choices", "error", "list", "truncated"],
)
def test_a_server_in_trouble_is_asked_again(server, sheet, tmp_path, trouble):
    server.answers = [trouble, trouble, says()]
    outcome = asker(server, tmp_path).rate(sheet[:2])
    assert (len(outcome.ratings), outcome.asked, len(server.asked)) == (2, 2, 4)


def test_a_server_that_does_not_answer_in_time_is_asked_again(server, sheet, tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "TIMEOUT", (5, 0.2))
    server.answers = [never, says()]
    outcome = asker(server, tmp_path, price_in=1, price_out=1).rate(sheet[:1])
    assert (len(outcome.ratings), len(server.asked)) == (1, 2)
    assert outcome.spent > (400 + 60) / 1e6  # what was not answered may have been billed


def test_the_wait_that_a_server_asks_for_is_kept(server, sheet, tmp_path):
    server.answers = [status(429, Retry_After="0.4"), says()]
    asker(server, tmp_path).rate(sheet[:1])
    assert server.asked[1]["at"] - server.asked[0]["at"] >= 0.4


def test_retry_after_is_read_as_seconds_or_date_and_bounded():
    assert judge._wait("3") == 3
    assert 50 < judge._wait(email.utils.formatdate(time.time() + 60, usegmt=True)) <= 61
    assert judge._wait("99999") == judge.LONGEST_WAIT
    assert [judge._wait(text) for text in ("", "soon", "-5", "nan")] == [0, 0, 0, 0]


def test_requests_are_spaced_by_the_rate_limit(server, sheet, tmp_path):
    asker(server, tmp_path, requests_per_minute=300).rate(sheet[:3])
    gaps = [b["at"] - a["at"] for a, b in zip(server.asked, server.asked[1:], strict=False)]
    assert min(gaps) > 0.15


def test_nonsense_and_refusals_are_asked_again_then_counted_and_never_guessed(server, sheet, tmp_path):
    server.answers = [says("I would rather not."), says(None, refusal="no"), says('{"a": 1}'), says(""), says(json.dumps([7]))]
    outcome = asker(server, tmp_path, asks=3).rate(sheet[:2])
    assert [rating.id for rating in outcome.ratings] == [sheet[0].id]
    assert list(outcome.refused) == [sheet[1].id]
    assert [reason.split(" ")[0] for reason in outcome.refused[sheet[1].id]] == ["the", "it", "it"]
    assert len(server.asked) == 5
    assert "could not be used: it holds no JSON object" in server.asked[1]["body"]["messages"][0]["content"]


def test_refused_answers_are_paid_once_too(server, sheet, tmp_path):
    server.answers = [says("no")]
    first = asker(server, tmp_path).rate(sheet[:2])
    again = asker(server, tmp_path).rate(sheet[:2])
    assert len(server.asked) == first.asked == 6
    assert (again.asked, again.refused) == (0, first.refused)


def test_content_that_is_no_text_is_a_refusal(server, sheet, tmp_path):
    server.answers = [raw(json.dumps({"choices": [{"message": {"content": None, "refusal": "no"}}]}))]
    assert list(asker(server, tmp_path, asks=2).rate(sheet[:1]).refused) == [sheet[0].id]
    assert len(server.asked) == 2


def test_a_server_that_stays_broken_ends_the_run_and_what_was_answered_is_kept(server, sheet, tmp_path):
    server.answers = [says(), says(), status(500)]
    outcome = asker(server, tmp_path, attempts=3).rate(sheet)
    assert len(outcome.ratings) == 2
    assert outcome.left == [item.id for item in sheet[2:]]
    assert "no answer in 3 attempts (last: HTTP status 500)" in outcome.stopped
    assert len(server.asked) == 5
    server.answers = [says()]
    again = asker(server, tmp_path).rate(sheet)
    assert (len(again.ratings), again.reused, again.asked) == (20, 2, 18)


def test_a_price_ceiling_is_never_exceeded_and_holds_over_runs(server, sheet, tmp_path):
    price = {"price_in": 100.0, "price_out": 500.0, "max_tokens": 100}
    one = Endpoint(server.url, "m", **price).cost(400, 60)
    ceiling = 0.9
    outcome = asker(server, tmp_path, ceiling=ceiling, **price).rate(sheet)
    assert 0 < len(outcome.ratings) < len(sheet)
    assert outcome.spent == pytest.approx(len(outcome.ratings) * one)
    assert outcome.spent <= ceiling
    assert "Raise the ceiling" in outcome.stopped
    assert len(outcome.ratings) + len(outcome.left) == len(sheet)
    asked = len(server.asked)
    again = asker(server, tmp_path, ceiling=ceiling, **price).rate(sheet)
    assert (len(server.asked), again.ratings, again.spent) == (asked, outcome.ratings, outcome.spent)
    rest = asker(server, tmp_path, ceiling=100, **price).rate(sheet)
    assert (len(rest.ratings), rest.reused) == (len(sheet), len(outcome.ratings))


def test_an_answer_without_stated_usage_counts_as_the_dearest(server, sheet, tmp_path):
    server.answers = [says(usage=None)]
    outcome = asker(server, tmp_path, price_in=0, price_out=10, max_tokens=100).rate(sheet[:1])
    assert outcome.spent == pytest.approx(100 * 10 / 1e6)


def test_an_answer_cut_off_on_its_way_counts_as_the_dearest(server, sheet, tmp_path):
    server.answers = [raw('{"choices": [{"mess', stated=5000), status(500), says()]
    outcome = asker(server, tmp_path, price_in=0, price_out=10, max_tokens=100).rate(sheet[:1])
    assert outcome.spent == pytest.approx((100 + 60) * 10 / 1e6)


def test_a_wrong_key_is_an_error_that_does_not_repeat_the_servers_words(server, sheet, tmp_path):
    server.answers = [status(401, f"no such key: {KEY}")]
    outcome = asker(server, tmp_path).rate(sheet)
    assert "HTTP status 401" in outcome.stopped
    assert KEY not in outcome.stopped
    assert len(server.asked) == 1


def test_the_key_is_stored_nowhere(server, sheet, tmp_path, caplog, capsys):
    caplog.set_level(0)
    server.answers = [status(500, KEY), says()]
    asking = asker(server, tmp_path)
    outcome = asking.rate(sheet[:2])
    captured = capsys.readouterr()
    written = "".join(path.read_text() for path in tmp_path.rglob("*.json*"))
    for text in (repr(asking.endpoint), repr(vars(asking)), repr(outcome), caplog.text, captured.out, captured.err, written):
        assert KEY not in text


def test_a_redirect_is_not_followed_with_the_key(server, sheet, tmp_path):
    server.answers = [status(307, Location=server.url + "/elsewhere/chat/completions")]
    outcome = asker(server, tmp_path).rate(sheet[:1])
    assert "HTTP status 307" in outcome.stopped
    assert len(server.asked) == 1


def test_a_server_that_needs_no_key_gets_none(server, sheet, tmp_path, monkeypatch):
    monkeypatch.delenv("BLM_JUDGE_KEY")
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login someone password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    asker(server, tmp_path).rate(sheet[:1])
    assert server.asked[0]["key"] is None


def test_a_key_with_a_line_break_is_refused_unseen(server, sheet, tmp_path, monkeypatch):
    monkeypatch.setenv("BLM_JUDGE_KEY", "half\nkey")
    outcome = asker(server, tmp_path).rate(sheet[:1])
    assert "BLM_JUDGE_KEY holds characters" in outcome.stopped
    assert "half" not in outcome.stopped
    assert not server.asked


def test_a_network_that_is_down_is_named_and_costs_nothing(sheet, tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "BACKOFF", 0.001)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as closed:
        port = closed.server_port
    asking = Judge(Endpoint(f"http://127.0.0.1:{port}", "m", price_in=1, attempts=2), tmp_path / "cache")
    outcome = asking.rate(sheet)
    assert "no answer in 2 attempts (last: no connection" in outcome.stopped
    assert (outcome.spent, outcome.ratings, len(outcome.left)) == (0, [], 20)


def test_an_account_that_cannot_be_read_is_not_taken_for_empty(server, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "account.json").write_text("{")
    with pytest.raises(JudgeError, match="not known what was spent"):
        asker(server, tmp_path)


def test_the_endpoint_comes_from_the_environment(monkeypatch):
    for name in ("BLM_JUDGE_URL", "BLM_JUDGE_MODEL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="BLM_JUDGE_URL"):
        from_environment()
    monkeypatch.setenv("BLM_JUDGE_URL", "http://localhost:8080/v1")
    with pytest.raises(ConfigError, match="BLM_JUDGE_MODEL"):
        from_environment()
    monkeypatch.setenv("BLM_JUDGE_MODEL", "some-model")
    assert from_environment(price_in=2).price_in == 2
    with pytest.raises(ConfigError, match="needs the prices"):
        from_environment(ceiling=5)


# Commands


def run(*arguments):
    return main(["judge", *map(str, arguments)])


def test_sheets_go_out_and_come_back_by_command(recordings, tmp_path, capsys):
    ours, theirs = recordings
    key, out = tmp_path / "key.json", tmp_path / "out"
    given = ("--key", key, "--ours", ours, "--theirs", theirs, "--seed", 3)
    assert run("--export", tmp_path / "s.jsonl", *given) == 0
    assert "rival: 6 pairs, 0 completions without a partner" in capsys.readouterr().out
    assert run("--export", tmp_path / "s.jsonl", *given, "--parts") == 0
    assert json.loads(key.read_text())["revision"] == "r1"
    rows = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()[1:]]
    parts = [(tmp_path / f"s-{part}.jsonl").read_text().splitlines()[1:] for part in (1, 2)]
    assert [json.loads(line) for part in parts for line in part] == rows
    marks = [{"id": row["id"], "a": MARKS, "b": MARKS, "preferred": "a" if "moth" in row["a"] else "b"} for row in rows]
    one, two = lines(tmp_path / "one.jsonl", marks[:10]), lines(tmp_path / "two.jsonl", marks[10:])
    assert run("--import", one, "--key", key, "--rater", "r", "--out", out) == 1
    assert f"without marks: {marks[10]['id']}" in capsys.readouterr().err
    assert not out.exists()
    assert run("--import", one, two, "--key", key, "--rater", "r", "--out", out) == 0
    assert {rating.winner for rating in read_ratings(out / "r.jsonl")} == {"blm"}
    assert run("--export", tmp_path / "s.jsonl", *given[:-1], 4) == 1
    assert "not this sheet's key" in capsys.readouterr().err
    assert run("--import", one) == 1
    assert "--key, --out, --rater must be given" in capsys.readouterr().err


def test_an_endpoint_is_asked_by_command_and_goes_on_where_it_stopped(recordings, server, tmp_path, monkeypatch, capsys):
    for name, value in (("URL", server.url), ("MODEL", "org/judge 1")):
        monkeypatch.setenv(f"BLM_JUDGE_{name}", value)
    monkeypatch.setenv("BLM_BUILD", str(tmp_path / "build"))
    out = tmp_path / "out"
    given = ("--endpoint", "--ours", recordings[0], "--theirs", recordings[1], "--out", out, "--requests-per-minute", 1e9)
    server.answers = [says("no")] * 3 + [says()] * 4 + [status(403)]
    assert run(*given) == 1
    assert "HTTP status 403" in capsys.readouterr().err
    assert len(read_ratings(out / "org-judge-1.part.jsonl")) == 4
    server.answers = [says()]
    assert run(*given) == 0
    assert len(read_ratings(out / "org-judge-1.jsonl")) == 19
    assert not (out / "org-judge-1.part.jsonl").exists()
    outcome = json.loads((out / "org-judge-1.outcome.json").read_text())
    assert list(outcome["refused"].values()) == [3]
    assert (outcome["asked"], outcome["reused"], outcome["left"]) == (15, 7, [])
    assert run(*given) == 0
