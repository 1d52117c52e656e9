import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import save_blm, save_gpt2

from blm_core import config
from blm_core.evidence import compare
from blm_core.evidence.compare import (
    BLM,
    Recorded,
    TransformersModel,
    UnavailableError,
    bits_line,
    load,
    opponent,
    record,
    score_stories,
    scored_elsewhere,
)
from blm_core.evidence.prompts import Prompt
from blm_core.evidence.recording import RecordingError
from blm_core.generate import Sampling

GREEDY = Sampling(temperature=0, max_tokens=12)
SHORT = Sampling(temperature=1.0, top_p=0.9, max_tokens=6, seed=3)
PROMPTS = [Prompt("one", "story", "the fox"), Prompt("two", "factual", "a hen went to the hill", ("hill",))]
STORIES = ["the fox saw the hen.", "a hen went to the hill. the fox saw it.", "Grün ist der Hügel."]


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory):
    return save_gpt2(tmp_path_factory.mktemp("models") / "gpt2-tiny")


@pytest.fixture(scope="session")
def blm_folder(tmp_path_factory, tokenizer):
    return save_blm(tmp_path_factory.mktemp("models") / "blm", tokenizer)


@pytest.fixture(scope="session")
def gpt2(gpt2_folder):
    return TransformersModel(str(gpt2_folder), "cpu")


@pytest.fixture(scope="session")
def blm(blm_folder):
    return BLM(blm_folder, "cpu")


@pytest.fixture(params=["blm", "gpt2"])
def model(request):
    return request.getfixturevalue(request.param)


def token_logprobs(model, tokens: list[int]) -> np.ndarray:
    """log p of every token behind the first, from one plain forward pass."""
    with torch.no_grad():
        out = model.model(torch.tensor([tokens]))
    logits = out if isinstance(out, torch.Tensor) else out.logits
    return logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].double().numpy()


def test_the_logprob_of_a_continuation_is_the_sum_over_its_tokens(model):
    prompt, continuation = "the fox", " saw the hen."
    tokens, before = model.encode(prompt + continuation), model.encode(prompt)
    assert tokens[: len(before)] == before
    expected = token_logprobs(model, tokens)[len(before) - 1 :].sum()
    assert model.logprob([prompt], [continuation]) == pytest.approx([expected], abs=1e-4)


def test_a_token_across_the_boundary_is_scored_as_the_difference_of_whole_texts(gpt2):
    prompt, continuation = "the f", "ox"
    tokens, before = gpt2.encode(prompt + continuation), gpt2.encode(prompt)
    assert tokens[: len(before)] != before
    expected = token_logprobs(gpt2, tokens).sum() - token_logprobs(gpt2, before).sum()
    assert gpt2.logprob([prompt], [continuation]) == pytest.approx([expected], abs=1e-4)


def test_a_continuation_in_two_pieces_costs_what_it_costs_in_one(model):
    whole = model.logprob(["the"], [" fox saw a hen."])
    pieces = model.logprob(["the", "the fox sa"], [" fox sa", "w a hen."])
    assert pieces.sum() == pytest.approx(whole[0], abs=1e-3)


def test_logprobs_do_not_depend_on_what_else_is_asked(model):
    together = model.logprob(["the fox", "a hen", "the fox"], [" saw it.", " went to the hill. the fox saw it.", " went"])
    alone = [model.logprob([p], [c])[0] for p, c in (("the fox", " saw it."), ("the fox", " went"))]
    assert together[[0, 2]] == pytest.approx(alone, abs=1e-4)


def test_an_empty_prompt_leaves_the_logprob_of_the_text(model):
    assert model.logprob([""], [STORIES[0]]) == pytest.approx(-model.story_bits(STORIES[:1]) * math.log(2))


def test_a_text_beyond_the_context_is_refused_and_not_cut(model):
    prompt = ""
    while model.fits(prompt + " a"):
        prompt += " a"
    model.logprob([prompt[:-2]], [" a"])
    with pytest.raises(ValueError, match=r"do not fit into the context of .* \(64\)"):
        model.logprob([prompt], [" a"])


def test_a_prompt_that_leaves_no_room_is_refused(model):
    prompt = " a" * 200
    with pytest.raises(ValueError, match=r"leaves no room in the context of .* \(64\)"):
        model.complete(["the fox", prompt], GREEDY)


def test_prompts_too_long_are_named_before_anything_is_recorded(model, tmp_path):
    prompts = [*PROMPTS, Prompt("endless", "story", " a" * 200)]
    with pytest.raises(ValueError, match=r"1 of 3 prompts leave no room .*: endless"):
        record(model, prompts, tmp_path / "out.jsonl", SHORT)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_prompt_is_completed_alike_alone_and_in_a_batch_of_longer_ones(model):
    prompts = ["the", "a hen went to the hill. the fox saw", "the fox saw the hen"]
    together = model.complete(prompts, GREEDY)
    assert together == [model.complete([prompt], GREEDY)[0] for prompt in prompts]
    assert len({row[0].text for row in together}) == 3


def test_the_likeliest_tokens_are_those_that_transformers_itself_chooses(gpt2):
    tokens = torch.tensor([gpt2.encode("a hen went")])
    theirs = gpt2.model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=0
    )
    assert gpt2.draw(tokens.tolist(), GREEDY)[0] == theirs[0, tokens.shape[1] :].tolist()


def test_both_models_sample_by_the_same_rules(model):
    likeliest = model.complete(["the fox"], GREEDY)
    assert model.complete(["the fox"], Sampling(1.0, 1, 1.0, 12, seed=5)) == likeliest
    assert model.complete(["the fox"], Sampling(1.0, 0, 1e-9, 12, seed=5)) == likeliest
    assert model.complete(["the fox"], Sampling(1.0, 0, 1.0, 12, seed=5)) != likeliest


def test_several_completions_of_a_prompt_differ_and_a_seed_repeats_them(model):
    first = model.complete(["the fox", "a hen"], replace(SHORT, top_p=1.0), n=20)
    assert [len(row) for row in first] == [20, 20]
    assert len({completion.text for row in first for completion in row}) > 20
    assert model.complete(["the fox", "a hen"], replace(SHORT, top_p=1.0), n=20) == first


def test_a_completion_says_what_ended_it(model):
    (limited,) = model.complete(["the fox"], replace(GREEDY, max_tokens=3))[0]
    assert (limited.tokens, limited.stopped) == (3, "max_tokens")
    hot = Sampling(temperature=3.0, top_p=1.0, max_tokens=0)
    completions = model.complete(["the fox"], hot, n=48)[0]
    assert {completion.stopped for completion in completions} == {"end of text", "context"}
    room = model.seq_len - len(model.encode("the fox"))
    assert all((completion.tokens == room) == (completion.stopped == "context") for completion in completions)


def test_half_precision_scores_nearly_the_same(gpt2_folder, gpt2):
    half = TransformersModel(str(gpt2_folder), "cpu", torch.bfloat16)
    assert half.dtype == "bfloat16"
    assert half.story_bits(STORIES) == pytest.approx(gpt2.story_bits(STORIES), rel=0.05)
    assert half.complete(["the fox"], GREEDY)[0][0].tokens == 12


def test_a_model_is_named_by_its_weights_and_not_by_its_place(gpt2, blm, gpt2_folder, blm_folder, tmp_path):
    assert gpt2.name == "gpt2-tiny"
    moved = gpt2_folder.rename(tmp_path / "gpt2-tiny")
    try:
        assert TransformersModel(str(moved), "cpu").settings() == gpt2.settings()
    finally:
        moved.rename(gpt2_folder)
    assert len(blm.revision) == 16
    assert blm.revision != gpt2.revision


def test_load_knows_a_blm_from_a_model_of_transformers(gpt2_folder, blm_folder):
    assert isinstance(load(blm_folder), BLM)
    assert isinstance(load(gpt2_folder), TransformersModel)


def test_a_model_that_is_not_there_is_refused_with_the_way_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UnavailableError, match="BLM_GPT2XL"):
        load(tmp_path / "nothing")
    with pytest.raises(UnavailableError, match="BLM_GPT2XL"):
        opponent(config.load("smoke"))


def test_the_opponent_is_the_model_that_the_environment_names(gpt2_folder, monkeypatch):
    monkeypatch.setenv("BLM_GPT2XL", str(gpt2_folder))
    assert opponent(config.load("smoke")).name == "gpt2-tiny"


def test_transformers_is_not_imported_before_a_model_of_it_is_loaded():
    code = "import sys, blm_core.compare, blm_core.endings, blm_core.cost; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=config.ROOT).returncode == 0


def test_a_recording_says_all_that_is_needed_to_make_it_again(model, tmp_path):
    lines = record(model, PROMPTS, tmp_path / "out.jsonl", SHORT, samples=2)
    assert lines == [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(line["id"], line["sample"]) for line in lines] == [("one", 0), ("one", 1), ("two", 0), ("two", 1)]
    first = lines[0]
    assert first["sampling"] == {"temperature": 1.0, "top_k": 0, "top_p": 0.9, "max_tokens": 6, "seed": 3}
    assert (first["prompt"], first["group"], first["model"]) == ("the fox", "story", model.name)
    assert first["revision"] == model.revision
    assert first["seconds"] > 0
    assert {"blm_core", "torch", "numpy"} <= set(first["versions"])
    batch = [prompt.text for prompt in PROMPTS for _ in range(2)]
    again = model.complete(batch, replace(SHORT, seed=first["seed"]))
    assert [completion.text for (completion,) in again] == [line["completion"] for line in lines]


def test_nothing_is_recorded_twice(model, tmp_path):
    out = tmp_path / "out.jsonl"
    few = record(model, PROMPTS[:1], out, SHORT, samples=2)
    more = record(model, PROMPTS, out, SHORT, samples=3)
    before = out.read_bytes()
    assert more[:2] == few  # with their times
    assert record(model, PROMPTS, out, SHORT, samples=3) == more
    assert out.read_bytes() == before
    assert len(before.splitlines()) == 6


def test_a_recording_cut_in_half_is_continued_and_the_loss_reported(gpt2, tmp_path, monkeypatch):
    monkeypatch.setattr(gpt2, "batch_size", 1)
    out = tmp_path / "out.jsonl"
    whole = record(gpt2, PROMPTS, out, SHORT, samples=2)
    raw = out.read_bytes()
    cut = raw[: len(raw) - 150]
    out.write_bytes(cut)
    with pytest.warns(UserWarning, match="bytes of a half-written record"):
        continued = record(gpt2, PROMPTS, out, SHORT, samples=2)
    kept = cut.count(b"\n")
    assert 0 < kept < 4
    assert continued[:kept] == whole[:kept]
    assert [line["completion"] for line in continued] == [line["completion"] for line in whole]
    assert len(out.read_bytes().splitlines()) == 4


@pytest.mark.parametrize(
    ("sampling", "named"),
    [
        (replace(SHORT, temperature=0.5), r"sampling\.temperature = 1\.0, now it is 0\.5"),
        (replace(SHORT, seed=4), r"sampling\.seed"),
    ],
)
def test_a_recording_with_other_settings_is_refused_by_name(gpt2, tmp_path, sampling, named):
    record(gpt2, PROMPTS, tmp_path / "out.jsonl", SHORT, samples=1)
    before = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(RecordingError, match=named):
        record(gpt2, PROMPTS, tmp_path / "out.jsonl", sampling, samples=1)
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_a_recording_of_another_model_is_refused_by_name(gpt2, blm, tmp_path):
    record(gpt2, PROMPTS, tmp_path / "out.jsonl", SHORT, samples=1)
    with pytest.raises(RecordingError, match="model = 'gpt2-tiny', now it is 'BLM'"):
        record(blm, PROMPTS, tmp_path / "out.jsonl", SHORT, samples=1)


def test_another_prompt_under_a_recorded_id_is_refused(gpt2, tmp_path):
    record(gpt2, PROMPTS, tmp_path / "out.jsonl", SHORT, samples=1)
    with pytest.raises(RecordingError, match="another prompt under the id one"):
        record(gpt2, [Prompt("one", "story", "the hen")], tmp_path / "out.jsonl", SHORT, samples=1)


def test_a_line_broken_in_the_middle_is_refused_by_number(gpt2, tmp_path):
    out = tmp_path / "out.jsonl"
    record(gpt2, PROMPTS, out, SHORT, samples=1)
    first, second = out.read_text().splitlines()
    out.write_text(f"{first[:50]}\n{second}\n")
    with pytest.raises(RecordingError, match="line 1 is not valid JSON"):
        record(gpt2, PROMPTS, out, SHORT, samples=1)


def test_recorded_text_answers_with_what_was_recorded(gpt2, tmp_path):
    lines = record(gpt2, PROMPTS, tmp_path / "out.jsonl", SHORT, samples=2)
    found = Recorded(tmp_path / "out.jsonl")
    assert (found.name, found.revision, found.prompts) == (gpt2.name, gpt2.revision, [prompt.text for prompt in PROMPTS])
    answers = found.complete([PROMPTS[1].text], n=2)
    assert [completion.text for completion in answers[0]] == [line["completion"] for line in lines[2:]]
    with pytest.raises(UnavailableError, match="2 of 3 completions"):
        found.complete([PROMPTS[1].text], n=3)


def test_recorded_text_cannot_be_scored(tmp_path, gpt2):
    record(gpt2, PROMPTS, tmp_path / "out.jsonl", SHORT, samples=1)
    found = Recorded(tmp_path / "out.jsonl")
    with pytest.raises(UnavailableError, match="not scored"):
        found.story_bits(STORIES)
    with pytest.raises(UnavailableError, match="not scored"):
        found.logprob(["the"], [" fox"])


def test_a_file_of_several_models_asks_which(tmp_path):
    path = tmp_path / "two.jsonl"
    records = [{"prompt": "the", "completion": f" {name}", "model": name} for name in ("hen", "fox")]
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"text": "no prompt"}\n')
    with pytest.raises(UnavailableError, match=r"\['fox', 'hen'\]; name one"):
        Recorded(path)
    assert Recorded(path, "fox").complete(["the"])[0][0].text == " fox"


def test_a_recording_that_is_missing_or_cut_is_refused(tmp_path):
    with pytest.raises(UnavailableError, match="BLM_RECORDED"):
        Recorded()
    (tmp_path / "cut.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "comp')
    with pytest.raises(RecordingError, match="line 2 is not valid JSON"):
        Recorded(tmp_path / "cut.jsonl")


def test_scores_are_kept_without_the_text_and_never_made_twice(gpt2, tmp_path):
    out = tmp_path / "bits.jsonl"
    first = score_stories(gpt2, STORIES[:2], out)
    before = out.read_text()
    assert score_stories(gpt2, STORIES, out) == pytest.approx(gpt2.story_bits(STORIES), abs=1e-4)
    assert out.read_text().startswith(before)
    assert "fox" not in out.read_text()
    assert json.loads(out.read_text().splitlines()[2])["bytes"] == len(STORIES[2].encode())
    bits, known, name = scored_elsewhere(out, ["unknown", STORIES[1], STORIES[0]])
    assert (known, name) == ([1, 2], "gpt2-tiny")
    assert bits.tolist() == first[::-1].tolist()


def test_scores_of_another_model_or_of_no_story_are_refused(gpt2, blm, tmp_path):
    score_stories(gpt2, STORIES[:1], tmp_path / "bits.jsonl")
    with pytest.raises(RecordingError, match="model"):
        score_stories(blm, STORIES, tmp_path / "bits.jsonl")
    with pytest.raises(UnavailableError, match="none of these 1 stories"):
        scored_elsewhere(tmp_path / "bits.jsonl", ["unknown"])
    with pytest.raises(UnavailableError, match="none of these 1 stories"):
        scored_elsewhere(tmp_path / "missing.jsonl", ["unknown"])


def test_bits_per_byte_count_bytes_and_not_characters():
    line = bits_line(["abcd", "üü"], [4, 4], [8, 16])  # four bytes each
    assert (line["bytes"], line["ours"].value, line["theirs"].value) == (8, 1.0, 3.0)
    assert line["difference"].value == -2.0
    assert line["wins"] == (1.0, 1.0, 1.0)
    assert line["verdict"] == "wins"


def test_a_model_that_needs_more_bits_loses_and_ties_count_half():
    line = bits_line(["abcd"] * 3, [8, 8, 4], [4, 4, 4])
    assert line["wins"].value == pytest.approx(1 / 6)
    assert bits_line(["abcd"] * 9, [8] * 9, [4, 5, 6] * 3)["verdict"] == "loses"
    assert line["verdict"] == "undecided"


def test_without_an_opponent_the_line_was_not_run():
    line = bits_line(STORIES, [10, 20, 30])
    assert (line["verdict"], line["theirs"], line["wins"]) == ("not run", None, None)


def test_the_published_perplexity_is_so_many_bits_per_character():
    assert compare.published_bits_per_character() == pytest.approx(0.592, abs=0.0006)
