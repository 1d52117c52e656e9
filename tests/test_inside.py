"""What is read inside the model is what the model really did, and the figures made of it are right."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from blm_core import data
from blm_core.evaluate import story_bits
from blm_core.evidence import inside
from blm_core.model import LanguageModel

STORY = (
    'Ottilie ran to the two ponds. "Where is the frog?" she asked Bertil. Bertil did not know. They sat by the school, '
    "and Ottilie sang. I think The frog heard it.\n"
    'Then they went home. "Good frog," said Ottilie.'
)
TOKENS = np.random.default_rng(0).integers(0, 300, 20)


def model_of(tiny, **changes) -> LanguageModel:
    return LanguageModel(dataclasses.replace(tiny, init_std=0.3, **changes), seed=2).eval()


@pytest.mark.parametrize("variant", [{}, {"position": "learned", "norm": "layer", "feed_forward": "gelu"}, {"n_kv_heads": 4}])
def test_attention_is_what_the_model_attended_to_and_the_last_lens_what_it_predicted(tiny, variant):
    model = model_of(tiny, **variant)
    values, mixed = [], []
    for block in model.model["layers"]:
        block.self_attn.v_proj.register_forward_hook(lambda module, inputs, output: values.append(output[0]))
        block.self_attn.o_proj.register_forward_hook(lambda module, inputs, output: mixed.append(inputs[0][0]))
    attention, residual = inside.trace(model, TOKENS)
    for layer in range(2):
        v = values[layer].unflatten(-1, (-1, tiny.d_head)).transpose(0, 1)  # (K, T, D)
        v = v.repeat_interleave(4 // len(v), dim=0)
        torch.testing.assert_close((attention[layer] @ v).transpose(0, 1).flatten(1), mixed[layer], atol=1e-5, rtol=1e-4)
    said = inside.lens(model, residual)
    assert said.shape == (3, 20, 300)
    predicted = model(torch.from_numpy(TOKENS)[None])[0].log_softmax(-1)
    torch.testing.assert_close(said[-1], predicted, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(said[-2], predicted, atol=0.1)


def test_a_head_that_is_switched_off_writes_nothing_and_all_others_what_they_wrote(tiny):
    model, tokens, size, mixed = model_of(tiny), torch.from_numpy(TOKENS)[None], tiny.d_head, []
    before = model(tokens)
    projection = model.model["layers"][1].self_attn.o_proj
    projection.register_forward_hook(lambda module, inputs, output: mixed.append(inputs[0][0].detach()))
    model(tokens)
    with inside.switched_off(model, 1, 2):
        off = model(tokens)
    assert not mixed[1][:, 2 * size : 3 * size].any()
    for others in (slice(2 * size), slice(3 * size, None)):
        torch.testing.assert_close(mixed[1][:, others], mixed[0][:, others])
    assert not torch.allclose(off, before, atol=0.01)
    torch.testing.assert_close(model(tokens), before)


def test_names_and_speech_are_found_by_the_rules(tokenizer):
    reading = inside.read(tokenizer, STORY, seq_len=10_000)
    assert "".join(reading.pieces) == STORY

    def words_with(member: np.ndarray) -> list[str]:
        """The words that the chosen tokens are part of, each whole."""
        chosen = dict.fromkeys(reading.word[member & (reading.word >= 0)])
        return ["".join(p for p, w in zip(reading.pieces, reading.word, strict=True) if w == one).strip() for one in chosen]

    # Bertil and Ottilie count where they begin a sentence too; "Where", "They", "I", "Then" and "Good" never do.
    assert words_with(reading.name >= 0) == ["Ottilie", "Bertil", "Bertil", "Ottilie", "The", "Ottilie"]
    assert words_with(reading.repeated_names()) == ["Bertil", "Ottilie", "Ottilie"]
    assert words_with(reading.opener >= 0) == ["Where", "is", "the", "frog", "Good", "frog"]
    openers = set(reading.opener[reading.opener >= 0])
    assert [reading.pieces[i].strip() for i in openers] == ['"'] * 2
    assert not inside.read(tokenizer, "It rained.", seq_len=10).repeated_names().any()


def test_a_long_or_strange_text_is_cut_to_the_context_and_tokens_are_shown_as_beginning_or_continuation(tokenizer):
    assert len(inside.read(tokenizer, STORY, seq_len=5).pieces) == 5
    strange = inside.read(tokenizer, "A café, \u2581 and ✨.", seq_len=10_000)
    assert len(strange.pieces) == len(strange.tokens) == len(strange.word) == len(strange.opener)
    texts = {inside.shown(tokenizer, token) for token in range(len(tokenizer))}
    assert {"(end)", "(newline)"} <= texts
    assert any(text.startswith("-") and text[1:].isalpha() for text in texts)


def test_kinds_of_looking_on_a_reading_made_by_hand():
    # The name A in two pieces, an opening mark, a word, the first piece of A again, a closing mark.
    tokens, pieces = np.array([9, 1, 2, 5, 7, 1, 5]), ["", "A", "b", ' "', "c", " A", '"']
    word, name = np.array([-1, 0, 0, -1, 1, 2, -1]), np.array([-1, 0, 0, -1, -1, 0, -1])
    reading = inside.Reading(tokens, pieces, word, name, opener=np.array([-1] * 4 + [3, 3, -1]))
    expected = {
        "the start token": {(q, 0) for q in range(1, 7)},
        "the token itself": {(q, q) for q in range(1, 7)},
        "the token before": {(q, q - 1) for q in range(1, 7)},
        "the same token, earlier": {(5, 1), (6, 3)},
        "what followed the same token": {(5, 2), (6, 4)},
        "names": {(3, 1), (3, 2), (4, 1), (4, 2), (5, 1), (5, 2), (6, 1), (6, 2), (6, 5)},
        "the same name, earlier": {(5, 1), (5, 2)},
        "earlier uses of the name that comes next": {(4, 1), (4, 2)},
        "quotation marks": {(4, 3), (5, 3), (6, 3)},
        "the mark that opened the speech": {(4, 3), (5, 3)},
    }
    assert {kind: set(map(tuple, np.argwhere(mask))) for kind, mask in inside.looks(reading).items()} == expected


def test_a_survey_counts_the_model_s_own_loss_and_heads_that_look_at_all_tokens_alike_get_an_even_share(smoke, tokenizer, tiny):
    model = model_of(tiny, vocab_size=len(tokenizer), seq_len=160)
    with torch.no_grad():
        for block in model.model["layers"]:
            block.self_attn.q_proj.weight.zero_()
    found = inside.survey(model, tokenizer, list(data.read_split(smoke.folder / "data", "validation"))[:6])
    for kind in ("the start token", "the token before", "the same token, earlier", "quotation marks", "names"):
        *_, attention, evenly = inside.strongest_head(found, kind, slice(None), slice(None))
        assert attention.value == pytest.approx(evenly, rel=1e-4)
    bits = story_bits(model, [reading.tokens for reading in found.readings], 160, model.device)
    assert found.lens[:, 0, -1].tolist() == found.predicted.tolist()  # the last layer confirms itself
    assert found.lens[:, 1, -1] == pytest.approx(-bits * math.log(2), rel=1e-4)
    costs = inside.costs(model, found.readings)  # of repeated names, hits, and of all else
    assert costs[:, [0, 2]].sum(1) == pytest.approx(bits, rel=1e-5)


def test_the_strongest_head_is_chosen_on_one_half_of_the_stories_and_reported_on_the_other():
    first, second = slice(0, None, 2), slice(1, None, 2)
    looked = np.zeros((4, 1, 2, 3))
    looked[first, 0, 1, 2], looked[second, 0, 1, 2], looked[second, 0, 0, 0] = 4, 2, 9
    evenly, queries = np.full((4, 1), 0.5), np.full((4, 1), 10)
    found = inside.Survey(("names",), [], looked, evenly, queries, lens=None, predicted=None)
    layer, head, attention, evenly = inside.strongest_head(found, "names", first, second)
    assert (layer, head, attention.value, evenly) == (1, 2, pytest.approx(0.2), pytest.approx(0.05))


def test_a_drawn_text_keeps_every_word_whole_and_every_token_on_its_shade(tokenizer):
    pieces = inside.read(tokenizer, STORY, seq_len=10_000).pieces
    ax, shades, lines = Figure().subplots(), np.linspace(0, 1, len(pieces)), {}
    inside.draw_tokens(ax, pieces, shades, underlined=3)
    grid = ax.images[0].get_array()
    for text, shade in zip(ax.texts, shades, strict=True):
        x, y = text.get_position()
        lines[y] = lines.get(y, "").ljust(int(x)) + text.get_text()
        assert not text.get_text().strip() or grid[int(y), int(x)] == pytest.approx(shade)
    assert " ".join(lines.values()).split() == STORY.split()
    assert grid.shape == (len(lines), 84)
    assert all(line == line.lstrip() and len(line) <= 84 for line in lines.values())
