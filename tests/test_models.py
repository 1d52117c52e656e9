"""Models under comparison: one interface for ours and those of transformers, recordings that go on after a break."""

import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import save_blm, save_gpt2

from blm_core import config
from blm_core.evidence.models import (
    Prompt,
    PromptError,
    RecordingError,
    UnavailableError,
    load,
    opponent,
    read_lines,
    read_prompts,
    record,
    score_stories,
)
from blm_core.generate import Sampling

GREEDY = Sampling(temperature=0, max_tokens=12)
SHORT = Sampling(temperature=1.0, top_p=0.9, max_tokens=6, seed=3)
PROMPTS = [Prompt("one", "story", "the fox"), Prompt("two", "factual", "a hen went to the hill")]
STORIES = ["the fox saw the hen.", "a hen went to the hill. the fox saw it.", "Grün ist der Hügel."]


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory):
    return save_gpt2(tmp_path_factory.mktemp("models") / "gpt2-tiny")


@pytest.fixture(scope="session")
def blm_folder(tmp_path_factory, tokenizer):
    return save_blm(tmp_path_factory.mktemp("models") / "blm", tokenizer)


@pytest.fixture(scope="session")
def gpt2(gpt2_folder):
    return load(gpt2_folder, "cpu")


@pytest.fixture(scope="session")
def blm(blm_folder):
    return load(blm_folder, "cpu")


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
    pieces = model.logprob([prompt, prompt + " sa"], [" sa", "w the hen."])  # across the boundary of a token
    assert pieces.sum() == pytest.approx(expected, abs=1e-3)


def test_a_text_beyond_the_context_is_refused_and_not_cut(model):
    prompt = ""
    while model.fits(prompt + " a"):
        prompt += " a"
    model.logprob([prompt[:-2]], [" a"])
    with pytest.raises(ValueError, match=r"does not fit into the context of .* \(64\)"):
        model.logprob([prompt], [" a"])
    with pytest.raises(ValueError, match=r"leaves no room in the context of .* \(64\)"):
        model.complete(["the fox", prompt], GREEDY)


def test_a_prompt_is_completed_alike_alone_and_in_a_batch_of_longer_ones(model):
    prompts = ["the", "a hen went to the hill. the fox saw", "the fox saw the hen"]
    for sampling in (GREEDY, SHORT):
        together = model.complete(prompts, sampling)
        assert together == [model.complete([prompt], sampling)[0] for prompt in prompts]
        assert len({each.text for each in together}) == 3
    likeliest = model.complete(prompts, GREEDY)
    assert model.complete(prompts, Sampling(1.0, 1, 1.0, 12, seed=5)) == likeliest
    assert model.complete(prompts, Sampling(1.0, 0, 1e-9, 12, seed=5)) == likeliest


def test_the_likeliest_tokens_are_those_that_transformers_itself_chooses_and_their_text_is_left_as_it_is(gpt2):
    tokens = torch.tensor([gpt2.encode("a hen went")])
    theirs = gpt2.model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=0
    )
    assert gpt2.draw(tokens.tolist(), GREEDY, [0])[0] == theirs[0, tokens.shape[1] :].tolist()
    assert gpt2.tokenizer.decode(gpt2.encode("a hen .")[1:]) == "a hen ."


def test_a_completion_says_what_ended_it(model):
    (limited,) = model.complete(["the fox"], replace(GREEDY, max_tokens=3))
    assert (limited.tokens, limited.stopped) == (3, "max_tokens")
    hot = Sampling(temperature=3.0, top_p=1.0, max_tokens=0)
    completions = model.complete(["the fox"] * 48, hot)
    assert {completion.stopped for completion in completions} == {"end of text", "context"}
    room = model.seq_len - len(model.encode("the fox"))
    assert all((completion.tokens == room) == (completion.stopped == "context") for completion in completions)


def test_a_model_is_loaded_by_what_its_folder_holds_and_named_by_its_weights(gpt2, blm, gpt2_folder, tmp_path):
    shutil.copytree(gpt2_folder, tmp_path / "gpt2-tiny")
    assert load(tmp_path / "gpt2-tiny", "cpu").settings() == gpt2.settings()
    assert (blm.name, gpt2.name) == ("BLM", "gpt2-tiny")
    assert len(blm.revision) == len(gpt2.revision) == 16
    assert blm.revision != gpt2.revision


def test_a_model_that_is_not_there_is_refused_with_the_way_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UnavailableError, match="BLM_GPT2XL"):
        load(tmp_path / "nothing")
    with pytest.raises(UnavailableError, match="BLM_GPT2XL"):
        opponent(config.load("smoke"))


def test_transformers_is_not_imported_before_a_model_of_it_is_loaded():
    code = "import sys, blm_core.evidence.models, blm_core.evidence.text; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=config.ROOT).returncode == 0


def test_a_recording_says_all_that_is_needed_to_make_it_again_and_nothing_is_recorded_twice(model, tmp_path):
    out = tmp_path / "out.jsonl"
    few = record(model, PROMPTS[:1], out, SHORT, samples=1)
    lines = record(model, PROMPTS, out, SHORT, samples=2)
    assert lines[:1] == few  # with their times
    assert lines == read_lines(out)
    assert [(line["id"], line["sample"]) for line in lines] == [("one", 0), ("one", 1), ("two", 0), ("two", 1)]
    first = lines[0]
    assert first["sampling"] == {"temperature": 1.0, "top_k": 0, "top_p": 0.9, "max_tokens": 6, "seed": 3}
    assert (first["prompt"], first["group"], first["model"]) == ("the fox", "story", model.name)
    assert first["revision"] == model.revision
    assert first["seconds"] > 0
    assert {"blm_core", "torch", "numpy"} <= set(first["versions"])
    (again,) = model.complete([lines[3]["prompt"]], SHORT, [lines[3]["sample"]])
    assert again.text == lines[3]["completion"]
    before = out.read_bytes()
    assert record(model, PROMPTS, out, SHORT, samples=2) == lines
    assert out.read_bytes() == before


def test_a_recording_cut_in_half_is_continued_and_the_loss_reported(gpt2, tmp_path, monkeypatch):
    monkeypatch.setattr(gpt2, "batch_size", 1)
    out = tmp_path / "out.jsonl"
    whole = record(gpt2, PROMPTS, out, SHORT, samples=2)
    cut = out.read_bytes()[:-150]
    out.write_bytes(cut)
    with pytest.warns(UserWarning, match="bytes of a half-written record"):
        continued = record(gpt2, PROMPTS, out, SHORT, samples=2)
    kept = cut.count(b"\n")
    assert 0 < kept < 4
    assert continued[:kept] == whole[:kept]
    assert [line["completion"] for line in continued] == [line["completion"] for line in whole]
    assert len(out.read_bytes().splitlines()) == 4


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sampling": replace(SHORT, temperature=0.5)}, r"recorded with sampling = .*1\.0.* now it is .*0\.5"),
        ({"sampling": replace(SHORT, seed=4)}, "recorded with sampling"),
        ({"prompts": [Prompt("one", "story", "the hen")]}, "another prompt under the id one"),
        ({"broken": True}, "line 1 is not valid JSON"),
    ],
)
def test_a_recording_of_something_else_or_broken_in_the_middle_is_refused_and_left_as_it_is(gpt2, tmp_path, change, named):
    out = tmp_path / "out.jsonl"
    record(gpt2, PROMPTS, out, SHORT, samples=1)
    if change.pop("broken", False):
        first, second = out.read_text().splitlines()
        out.write_text(f"{first[:50]}\n{second}\n")
    before = out.read_bytes()
    with pytest.raises(RecordingError, match=named):
        record(gpt2, out=out, samples=1, **{"prompts": PROMPTS, "sampling": SHORT} | change)
    assert out.read_bytes() == before


def test_scores_are_kept_without_the_text_and_never_made_twice(gpt2, tmp_path):
    out = tmp_path / "bits.jsonl"
    score_stories(gpt2, STORIES[:2], out)
    before = out.read_text()
    assert score_stories(gpt2, STORIES, out) == pytest.approx(gpt2.story_bits(STORIES), abs=1e-4)
    assert out.read_text().startswith(before)
    assert "fox" not in out.read_text()
    assert read_lines(out)[2]["bytes"] == len(STORIES[2].encode())


def test_prompts_are_our_own_or_the_authors(tmp_path, monkeypatch):
    (tmp_path / "theirs.yaml").write_text("---\n- |-\n  A goose went\n- A hen went\n")
    monkeypatch.setenv("BLM_AUTHORS_PROMPTS", str(tmp_path / "theirs.yaml"))
    assert len({prompt.text for prompt in read_prompts("own")}) == 66
    assert [prompt.text for prompt in read_prompts("authors")] == ["A goose went", "A hen went"]


@pytest.mark.parametrize("content", ["not json", "[]", '[{"id": 1}]', '[{"id": 1, "group": "story", "prompt": " "}]', "{}"])
def test_a_file_that_holds_no_prompts_is_refused_by_name(tmp_path, content):
    (tmp_path / "mine.json").write_text(content)
    with pytest.raises(PromptError, match=r"mine\.json"):
        read_prompts(tmp_path / "mine.json")
