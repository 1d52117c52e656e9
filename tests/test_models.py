"""Models under comparison: one interface for ours and those of transformers, recordings that go on after a break."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_models import save_blm, save_gpt2

from blm_core import config
from blm_core.evidence import models
from blm_core.evidence.models import Prompt, load, read_prompts, record, score_stories
from blm_core.files import read_json_lines
from blm_core.generate import Sampling

GREEDY = Sampling(temperature=0, max_tokens=12)
SHORT = Sampling(temperature=1.0, top_p=0.9, max_tokens=6, seed=3)
PROMPTS = [Prompt("one", "story", "the fox"), Prompt("two", "factual", "a hen went to the hill")]
STORIES = ["the fox saw the hen.", "a hen went to the hill. the fox saw it.", "Grün ist der Hügel."]


@pytest.fixture(scope="module")
def both(tmp_path_factory, tokenizer):
    home = tmp_path_factory.mktemp("models")
    return load(save_blm(home / "blm", tokenizer), "cpu"), load(save_gpt2(home / "gpt2-tiny"), "cpu")


@pytest.fixture(params=[0, 1], ids=["blm", "gpt2"])
def model(request, both):
    return both[request.param]


@pytest.fixture
def gpt2(both):
    return both[1]


@torch.no_grad()
def test_bits_of_a_story_are_those_of_one_plain_forward_pass(model):
    for story, bits in zip(STORIES, model.story_bits(STORIES), strict=True):
        tokens = model.encode(story)
        out = model.model(torch.tensor([tokens]))
        logits = out if isinstance(out, torch.Tensor) else out.logits
        nats = logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None]).sum()
        assert bits == pytest.approx(-float(nats) / math.log(2), rel=1e-5)


def test_a_text_depends_on_seed_number_and_prompt_alone(model, monkeypatch):
    prompts = ["the", "a hen went to the hill. the fox saw", *["the fox"] * 6]
    texts = model.complete(prompts, SHORT)
    assert model.complete(prompts[::-1], SHORT, numbers=[5, 4, 3, 2, 1, 0, 0, 0]) == texts[::-1]
    assert model.complete(prompts, replace(SHORT, seed=4)) != texts
    monkeypatch.setattr(model, "batch_size", 3)
    assert model.complete(prompts, SHORT) == texts
    assert model.complete(prompts, Sampling(1.0, 1, 1.0, 12, seed=5)) == model.complete(prompts, GREEDY)
    with pytest.raises(ValueError, match=r"a prompt of \d+ tokens leaves no room in the .*context of .*64"):
        model.complete(["the fox", "the fox " * 64], GREEDY)


def test_the_likeliest_tokens_are_those_that_transformers_itself_chooses_and_their_text_is_left_as_it_is(gpt2):
    tokens = torch.tensor([gpt2.encode("a hen went")])
    theirs = gpt2.model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=0
    )
    written = gpt2.tokenizer.decode(theirs[0, tokens.shape[1] :], skip_special_tokens=True)
    assert gpt2.complete(["a hen went"], GREEDY) == [written]
    assert gpt2.tokenizer.decode(gpt2.encode("a hen .")[1:]) == "a hen ."


def test_a_model_is_named_by_its_weights_and_one_that_is_not_there_refused_with_the_way_to_get_it(both, tmp_path, monkeypatch):
    assert load(save_gpt2(tmp_path / "gpt2-tiny"), "cpu").settings() == both[1].settings()
    assert [model.name for model in both] == ["BLM", "gpt2-tiny"]
    assert len({model.revision for model in both}) == 2
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for loading in (lambda: load(tmp_path / "nothing"), lambda: models.opponent(config.load("smoke"))):
        with pytest.raises(models.UnavailableError, match="BLM_GPT2XL"):
            loading()


def test_a_recording_says_all_that_is_needed_to_make_it_again_and_nothing_is_recorded_twice(model, tmp_path):
    out = tmp_path / "out.jsonl"
    few = record(model, PROMPTS, out, SHORT, samples=1)
    lines = record(model, PROMPTS, out, SHORT, samples=2)
    assert lines[:2] == few == record(model, PROMPTS, out, SHORT, samples=1)
    assert lines == list(read_json_lines(out))
    last = lines[3]
    assert [last[name] for name in (*Prompt._fields, "sample")] == [*PROMPTS[1], 1]
    assert last["sampling"] == {"temperature": 1.0, "top_k": 0, "top_p": 0.9, "max_tokens": 6, "seed": 3}
    assert (last["model"], last["revision"]) == (model.name, model.revision)
    assert {"blm_core", "torch", "numpy"} <= set(last["versions"])
    assert model.complete([last["prompt"]], SHORT, [last["sample"]]) == [last["completion"]]


def test_a_recording_cut_in_half_is_continued_and_one_of_something_else_or_broken_is_refused(gpt2, tmp_path, monkeypatch):
    monkeypatch.setattr(gpt2, "batch_size", 1)
    out = tmp_path / "out.jsonl"
    whole = record(gpt2, PROMPTS, out, SHORT, samples=2)
    before = out.read_bytes()
    for cut in (before[:-150], b'{"id": "o'):
        out.write_bytes(cut)
        assert record(gpt2, PROMPTS, out, SHORT, samples=2) == whole == list(read_json_lines(out))
    with pytest.raises(ValueError, match=r"recorded with sampling = .*1\.0.* now it is .*0\.5"):
        record(gpt2, PROMPTS, out, replace(SHORT, temperature=0.5))
    with pytest.raises(ValueError, match="recorded with prompt = 'the fox', now it is 'the hen'"):
        record(gpt2, [Prompt("one", "story", "the hen")], out, SHORT)
    assert out.read_bytes() == before
    out.write_bytes(before[50:])
    with pytest.raises(ValueError, match="line 1 is not valid JSON"):
        record(gpt2, PROMPTS, out, SHORT)


def test_scores_are_kept_without_the_text_and_never_made_twice(gpt2, tmp_path):
    out = tmp_path / "bits.jsonl"
    score_stories(gpt2, STORIES[:2], out)
    before = out.read_text()
    assert score_stories(gpt2, STORIES, out) == pytest.approx(gpt2.story_bits(STORIES), abs=1e-4)
    assert out.read_text().startswith(before)
    assert "fox" not in out.read_text()
    assert list(read_json_lines(out))[2]["bytes"] == len(STORIES[2].encode())
    with pytest.raises(ValueError, match="recorded with story"):
        score_stories(gpt2, STORIES[::-1], out)


def test_prompts_are_our_own_or_those_of_a_file_that_holds_some(tmp_path):
    assert len({prompt.prompt for prompt in read_prompts()}) == 66
    path = tmp_path / "mine.json"
    path.write_text('[{"id": "a", "group": "story", "prompt": "A goose went"}]')
    assert read_prompts(str(path)) == [Prompt("a", "story", "A goose went")]
    for content in ("not json", '[{"id": 1}]', '["A goose went"]'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"mine\.json"):
            read_prompts(str(path))
