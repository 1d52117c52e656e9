import json
from collections import Counter

import pytest

from blm_core.evidence.prompts import GROUPS, Prompt, PromptError, answered, read_prompts, yaml_list


def test_there_are_sixty_own_prompts_or_more_in_four_groups():
    prompts = read_prompts("own")
    groups = Counter(prompt.group for prompt in prompts)
    assert len(prompts) >= 60
    assert set(groups) == set(GROUPS)
    assert min(groups.values()) >= 15


def test_every_own_prompt_that_asks_something_says_what_answers_it():
    for prompt in read_prompts("own"):
        assert bool(prompt.answer) == (prompt.group != "story"), prompt
        assert prompt.text == prompt.text.strip()


def test_an_answer_counts_as_a_whole_word_whatever_its_case():
    prompt = Prompt("p", "factual", "It had turned into", ("ice",))
    assert answered(prompt, " Ice!") is True
    assert answered(prompt, " nice cream") is False


def test_an_answer_has_to_come_soon():
    prompt = Prompt("p", "factual", "It had turned into", ("ice",))
    assert answered(prompt, " so" * 24 + " ice") is True
    assert answered(prompt, " so" * 25 + " ice") is False


def test_nothing_is_said_of_prompts_that_ask_nothing():
    assert answered(Prompt("p", "story", "A goose"), " swam.") is None


def test_yaml_lists_keep_paragraphs_quotes_and_trailing_spaces():
    text = "---\n- |-\n  The goose\n\n    swam \n  off: away\n\n# a remark\n- |\n  kept\n- 'it''s'\n- \"a\\tb\"\n- plain text\n"
    assert yaml_list(text) == ["The goose\n\n  swam \noff: away", "kept\n", "it's", "a\tb", "plain text"]


@pytest.mark.parametrize("text", ["key: value\n", "- [a, b]\n", "- key: value\n", "- |-\n  a\nb\n", '- "\\q"\n'])
def test_yaml_that_is_not_a_list_of_strings_is_refused_by_line(text):
    with pytest.raises(PromptError, match="line"):
        yaml_list(text)


def test_the_authors_prompts_are_read_from_the_file_that_the_environment_names(tmp_path, monkeypatch):
    path = tmp_path / "theirs.yaml"
    path.write_text("---\n- |-\n  A goose went\n- |-\n  A hen went\n")
    monkeypatch.setenv("BLM_AUTHORS_PROMPTS", str(path))
    assert [prompt.text for prompt in read_prompts("authors")] == ["A goose went", "A hen went"]


def test_prompts_of_recorded_completions_are_taken_once_and_texts_without_a_prompt_not_at_all(tmp_path):
    path = tmp_path / "recorded.jsonl"
    records = [
        {"id": "a", "kind": "story", "prompt": "A goose", "completion": " swam"},
        {"id": "b", "kind": "story", "prompt": "A goose", "completion": " flew"},
        {"id": "c", "kind": "story", "text": "A hen."},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert read_prompts(path) == [Prompt("a", "story", "A goose")]


@pytest.mark.parametrize(
    "content",
    ["not json", "[]", '[{"id": 1}]', '[{"id": 1, "group": "story", "prompt": " "}]', '["text"]', "{}"],
)
def test_a_file_that_holds_no_prompts_is_refused_by_name(tmp_path, content):
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(PromptError, match=r"mine\.json"):
        read_prompts(path)


def test_two_prompts_under_one_id_are_refused(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps([{"id": 1, "group": "story", "prompt": text} for text in ("one", "two")]))
    with pytest.raises(PromptError, match="an id of its own"):
        read_prompts(path)
