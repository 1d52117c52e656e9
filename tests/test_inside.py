"""What is read inside the model is what the model really did, and the figures made of it are right."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tiny_models import save_blm

from blm_core import data
from blm_core.checkpoint import load_model
from blm_core.config import ModelConfig
from blm_core.evaluate import story_bits
from blm_core.evidence import inside
from blm_core.evidence.inside import CLASSES, Survey
from blm_core.model import LanguageModel

STORY = (
    'Ottilie ran to the two ponds. "Where is the frog?" she asked Bertil. Bertil did not know. They sat by the school, '
    "and Ottilie sang. I think The frog heard it.\n"
    'Then they went home. "Good frog," said Ottilie.'
)
FIRST, SECOND = slice(0, None, 2), slice(1, None, 2)


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory) -> LanguageModel:
    return load_model(save_blm(tmp_path_factory.mktemp("model"), tokenizer, seq_len=160))[0]


@pytest.fixture(scope="module")
def stories(smoke) -> list[str]:
    return list(data.read_split(smoke.folder / "data", "validation"))[:6]


def tokens_of(config: ModelConfig, n: int = 20) -> np.ndarray:
    return np.random.default_rng(0).integers(0, config.vocab_size, n)


@pytest.mark.parametrize("variant", [{}, {"position": "learned", "norm": "layer", "feed_forward": "gelu"}, {"n_kv_heads": 4}])
def test_recomputed_attention_gives_what_the_model_s_own_attention_gave(tiny, variant):
    model = LanguageModel(dataclasses.replace(tiny, init_std=0.3, **variant), seed=2).eval()
    values, mixed = [], []
    for block in model.model["layers"]:
        block.self_attn.v_proj.register_forward_hook(lambda module, inputs, output: values.append(output[0]))
        block.self_attn.o_proj.register_forward_hook(lambda module, inputs, output: mixed.append(inputs[0][0]))
    attention = inside.trace(model, tokens_of(model.config)).attention
    assert attention.shape == (2, 4, 20, 20)
    assert not attention.triu(1).any()
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 4, 20))
    for layer in range(2):
        v = values[layer].unflatten(-1, (-1, model.config.d_head)).transpose(0, 1)  # (K, T, D)
        v = v.repeat_interleave(4 // len(v), dim=0)
        torch.testing.assert_close((attention[layer] @ v).transpose(0, 1).flatten(1), mixed[layer], atol=1e-5, rtol=1e-4)


def test_neurons_and_residual_stream_are_those_of_the_blocks_and_the_last_lens_is_the_model_s_own_answer(model):
    tokens = tokens_of(model.config)
    seen = inside.trace(model, tokens)
    said = inside.lens(model, seen.residual)
    with torch.no_grad():
        for layer, block in enumerate(model.model["layers"]):
            between = block.post_attention_layernorm(seen.residual[layer + 1] - block.mlp.down_proj(seen.hidden[layer]))
            expected = F.silu(block.mlp.gate_proj(between)) * block.mlp.up_proj(between)
            torch.testing.assert_close(seen.hidden[layer], expected, atol=1e-4, rtol=1e-3)
        expected = model(torch.from_numpy(tokens)[None])[0].log_softmax(-1)
    torch.testing.assert_close(seen.residual[0], model.model["embed_tokens"].weight[tokens])
    torch.testing.assert_close(said[-1], expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(said[-2], expected, atol=0.1)


def test_looking_inside_leaves_no_hook_behind_even_after_an_error(tiny):
    model = LanguageModel(tiny, seed=1).eval()
    inside.trace(model, tokens_of(tiny))
    with pytest.raises(ValueError, match="context"):
        inside.trace(model, tokens_of(tiny, tiny.seq_len + 1))
    assert not any(module._forward_hooks for module in model.modules())


def test_pieces_of_a_reading_join_to_the_text_and_single_ones_are_shown_as_beginning_or_continuation(tokenizer):
    for text in (STORY, " two  spaces\n\n and lines\n"):
        assert "".join(inside.read(tokenizer, text, seq_len=10_000).pieces) == text
    reading = inside.read(tokenizer, "A café, \u2581 and ✨.", seq_len=10_000)
    assert len(reading.pieces) == len(reading.tokens) == len(reading.word) == len(reading.opener)
    assert len(inside.read(tokenizer, STORY, seq_len=5).pieces) == 5
    texts = {inside.shown(tokenizer, token) for token in range(len(tokenizer))}
    assert {"(end)", "(newline)"} <= texts
    assert any(text.startswith("-") and text[1:].isalpha() for text in texts)


def words_with(reading, member: np.ndarray) -> list[str]:
    """The words that the chosen tokens are part of, each whole."""
    chosen = dict.fromkeys(reading.word[member & (reading.word >= 0)])
    return ["".join(p for p, w in zip(reading.pieces, reading.word, strict=True) if w == word).strip() for word in chosen]


def test_names_places_and_speech_are_found_by_the_rules(tokenizer):
    reading = inside.read(tokenizer, STORY, seq_len=10_000)
    names = words_with(reading, reading.members("names"))
    # Bertil and Ottilie count where they begin a sentence too; "Where", "They", "I", "Then" and "Good" never do.
    assert names == ["Ottilie", "Bertil", "Bertil", "Ottilie", "The", "Ottilie"]
    assert words_with(reading, reading.repeated_names()) == ["Bertil", "Ottilie", "Ottilie"]
    assert words_with(reading, reading.members("places")) == ["ponds", "school", "home"]
    assert words_with(reading, reading.members("speech")) == ["Where", "is", "the", "frog", "Good", "frog"]
    openers = set(reading.opener[reading.members("speech")])
    assert [reading.pieces[i].strip() for i in openers] == ['"'] * 2
    assert (reading.quote == 0).sum() == 4
    assert not inside.read(tokenizer, "It rained.", seq_len=10).repeated_names().any()


def reading_of(tokens, word, name, quote, opener) -> inside.Reading:
    columns = [np.array(c) for c in (word, name, [-1] * len(tokens), quote, opener)]
    return inside.Reading(np.array(tokens), [""] * len(tokens), *columns)


def test_kinds_of_looking_on_a_reading_made_by_hand():
    # The name A in two pieces, an opening mark, a word, the first piece of A again, a closing mark.
    reading = reading_of(
        [9, 1, 2, 5, 7, 1, 5],
        [-1, 0, 0, -1, 1, 2, -1],
        [-1, 0, 0, -1, -1, 0, -1],
        [-1, -1, -1, 0, -1, -1, 0],
        [-1] * 4 + [3, 3, -1],
    )
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


def test_heads_that_look_at_all_tokens_alike_give_every_kind_its_even_share(tokenizer, model, stories):
    blind = LanguageModel(model.config, seed=3).eval()
    with torch.no_grad():
        for block in blind.model["layers"]:
            block.self_attn.q_proj.weight.zero_()
    found = inside.survey(blind, tokenizer, stories)
    for kind in ("the start token", "the token before", "the same token, earlier", "quotation marks", "names"):
        *_, attention, evenly = inside.strongest_head(found, kind, slice(None), slice(None))
        assert attention.value == pytest.approx(evenly, rel=1e-4)
        assert attention.low <= attention.value <= attention.high


def test_survey_counts_the_model_s_own_loss_at_the_last_layer(tokenizer, model, stories):
    found = inside.survey(model, tokenizer, stories)
    readings = [np.array([tokenizer.eot, *tokenizer.encode(story)][: model.config.seq_len]) for story in stories]
    bits = story_bits(model, readings, model.config.seq_len, model.device)
    assert found.predicted.tolist() == [len(reading) - 1 for reading in readings]
    assert found.lens[:, 0, -1].tolist() == found.predicted.tolist()  # the last layer confirms itself
    assert (found.lens[:, 0, 0] < found.predicted).all()
    assert found.lens[:, 1, -1] == pytest.approx(-bits * math.log(2), rel=1e-4)
    costs = inside.costs(model, found.readings)  # of repeated names, hits, and of all else
    assert costs[:, [0, 2]].sum(1) == pytest.approx(bits, rel=1e-5)
    assert (costs[:, 1] <= [reading.repeated_names().sum() for reading in found.readings]).all()
    assert found.auc.shape == (len(stories), len(CLASSES), 2, model.config.d_ff)


@pytest.mark.parametrize(
    ("values", "member", "expected"),
    [
        ([1, 2, 3, 4], [0, 0, 1, 1], 1.0),
        ([1, 2, 3, 4], [0, 1, 0, 1], 0.75),
        ([5, 5, 5, 5, 5], [0, 1, 0, 1, 1], 0.5),
        ([1, 2, 2, 3], [0, 0, 1, 1], 0.875),  # four pairs: three won, one tied
        ([1, 2, 3], [1, 1, 1], math.nan),
        ([1, 2, 3], [0, 0, 0], math.nan),
    ],
)
def test_auc_counts_the_pairs_that_are_in_order(values, member, expected):
    values = np.array(values, dtype=np.float32)
    found = inside.auc(np.stack([values, -values], 1)[:, None], np.array(member, dtype=bool))
    np.testing.assert_allclose(found, [[expected, 1 - expected]])


def survey_of(**fields) -> Survey:
    """A survey in which only some fields are filled in."""
    return Survey(**dict.fromkeys((f.name for f in dataclasses.fields(Survey)), None) | fields)


def test_heads_and_neurons_are_chosen_on_some_stories_and_reported_on_others():
    looked = np.zeros((4, 1, 2, 3))
    looked[FIRST, 0, 1, 2], looked[SECOND, 0, 1, 2], looked[SECOND, 0, 0, 0] = 8, 2, 9
    found = survey_of(kinds=("names",), looked=looked, queries=np.full((4, 1), 10), evenly=np.full((4, 1), 0.5))
    layer, head, attention, evenly = inside.strongest_head(found, "names", FIRST, SECOND)
    assert (layer, head, attention.value, evenly) == (1, 2, pytest.approx(0.2), pytest.approx(0.05))

    auc = np.full((6, 3, 2, 4), 0.5)
    auc[FIRST, 0, 1, 2], auc[SECOND, 0, 1, 2] = 0.1, 0.3  # falls, and less so where it was not chosen
    auc[SECOND, 0, 0, 0] = 0.99
    auc[1] = np.nan  # a story without a token of the class
    layer, neuron, sign, tells = inside.clearest_neuron(survey_of(auc=auc), "names", FIRST, SECOND)
    assert (layer, neuron, sign, tells.value) == (1, 2, -1, pytest.approx(0.7))


def test_spelling_alone_tells_tokens_that_are_always_of_the_class_and_no_others():
    # Token 3 is of the class, token 4 is so half the time, token 5 never; token 6 is not met while learning.
    readings = [
        reading_of(tokens, [0] * 4, name, [-1] * 4, [-1] * 4)
        for tokens, name in (([3, 4, 4, 5], [0, 0, -1, -1]), ([3, 6, 5, 5], [0, 0, -1, -1]))
    ]
    # Shares in the second story: 1, 0, 0, 0: of four pairs two are won and two tied.
    assert inside.spelling(survey_of(readings=readings), "names", FIRST, SECOND).value == pytest.approx(0.75)


def test_a_head_that_is_switched_off_writes_nothing_and_all_others_what_they_wrote(tiny):
    model = LanguageModel(dataclasses.replace(tiny, init_std=0.3), seed=2).eval()
    tokens, size, mixed = torch.from_numpy(tokens_of(tiny))[None], tiny.d_head, []
    before = model(tokens)
    projection = model.model["layers"][1].self_attn.o_proj
    projection.register_forward_hook(lambda module, inputs, output: mixed.append(inputs[0][0].detach()))
    model(tokens)
    with inside.switched_off(model, 1, 2):
        off = model(tokens)
    assert not mixed[1][:, 2 * size : 3 * size].any()
    torch.testing.assert_close(mixed[1][:, : 2 * size], mixed[0][:, : 2 * size])
    assert not torch.allclose(off, before, atol=0.01)
    torch.testing.assert_close(model(tokens), before)


def test_a_drawn_text_keeps_every_word_whole_and_every_token_on_its_shade(tokenizer):
    reading = inside.read(tokenizer, STORY, seq_len=10_000)
    shades = np.linspace(0, 1, len(reading.pieces))
    ax = Figure().subplots()
    inside.draw_tokens(ax, reading.pieces, shades, width=40, underlined=3)
    lines = {}
    for text in ax.texts:
        x, y = text.get_position()
        lines[y] = lines.get(y, "").ljust(int(x)) + text.get_text()
    assert " ".join(lines.values()).split() == STORY.split()
    assert all(len(line) <= 40 for line in lines.values())
    grid = ax.images[0].get_array()
    assert grid.shape == (len(lines), 40)
    for text, shade in zip(ax.texts, shades, strict=True):
        x, y = text.get_position()
        if text.get_text().strip():
            assert grid[int(y), int(x)] == pytest.approx(shade)
    assert len(ax.lines) == 1
