"""The model in the page: the JavaScript engine against PyTorch and sentencepiece, and the page in a real browser."""

import json
import random
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest
import torch
from chromium import PROGRAM, Chromium

from blm_core.checkpoint import load_model
from blm_core.config import ROOT
from blm_core.evidence import page
from blm_core.generate import Sampling, complete

RELEASE = ROOT / "release"
NODE = shutil.which("node")
with_node = pytest.mark.skipif(NODE is None, reason="node was not found: install Debian's nodejs to test the page's engine")
with_chromium = pytest.mark.skipif(PROGRAM is None, reason="chromium was not found: install it to test the page in a browser")

HEADS = [{"name": "a head with a name", "layer": 2, "head": 1, "what": "It looks at something."}]
STORY = "!document.querySelector('#blm .story.writing') && document.querySelectorAll('#blm .word').length > 5"
TEXT = "document.querySelector('#blm .story').innerText"
COMMON = ["Once", "upon", "a", "little", "girl", "said", "don't", "Tom's", "123", "4096", "...", "ball", "mummy", "xylograph"]
RARE = [*"\n\t\r\0\"'?!\u2018\u2019\u201c\u201d\u2013\u2026\u00a0\u2581\ufeff\u00e9\u00df", "e\u0301", "漢字", "שלום"]
RARE += ["😀", "👩‍👧", "🏳️‍🌈", "\n\n", "\r\n", "  ", "   ", "<|endoftext|>", "<0x41>", "<unk>"]


@pytest.fixture(scope="module")
def release():
    """The released model and vocabulary, its matrices rounded to eight bits."""
    model, tokenizer = load_model(RELEASE)
    return page.round_to_eight_bits(model), tokenizer


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """Runs a JavaScript expression, in which `model` is the packed release and `given` a value from Python."""
    folder = tmp_path_factory.mktemp("engine")
    (folder / "packed.txt").write_text(page.pack(RELEASE, HEADS))
    script = f"""
        const engine = require({json.dumps(str(page.SOURCES / "engine.js"))}), fs = require("fs");
        const given = JSON.parse(fs.readFileSync({json.dumps(str(folder / "given.json"))}, "utf8"));
        const packed = fs.readFileSync({json.dumps(str(folder / "packed.txt"))}, "latin1");
        engine.Model.load(packed).then((model) => console.log(JSON.stringify((%s)(model, given, engine))));
    """

    def run(function: str, given=None):
        (folder / "given.json").write_text(json.dumps(given))
        done = subprocess.run([NODE, "-e", script % function], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The fragment as the report includes it: behind the still story, at the end of a page."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "heads.json").write_text(json.dumps(HEADS))
    page.write_page(RELEASE, folder, folder / "heads.json")
    still = (ROOT / "figures" / "story.md").read_text().split("```")[1].removeprefix("{=html}")
    html = f"""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
        <title>Report</title><body>{still}<a href="#head-2-1">a head</a>{(folder / "page.html").read_text()}</body></html>"""
    (folder / "index.html").write_text(html)
    return folder / "index.html"


@pytest.fixture
def browser(site, tmp_path):
    with Chromium(tmp_path / "profile") as chromium:
        chromium.open(site.as_uri())
        yield chromium
        assert chromium.complaints() == []
        assert chromium.requests() == [site.as_uri()]


@pytest.fixture
def rendered(tmp_path):
    report = ROOT / "_report" / "index.html"
    if not report.exists():
        pytest.skip("the report was not rendered: make report")
    with Chromium(tmp_path / "profile") as chromium:
        chromium.open(report.as_uri())
        yield chromium


def made_up_texts(count: int) -> list[str]:
    draw = random.Random(1)
    words = COMMON * 3 + RARE
    return ["".join(draw.choice(words) + draw.choice(["", " ", " "]) for _ in range(draw.randint(1, 40))) for _ in range(count)]


def test_eight_bits_are_at_most_half_a_step_off(release):
    exact, _ = load_model(RELEASE)
    for name, weight in exact.named_parameters():
        rounded = release[0].get_parameter(name)
        step = weight.abs().amax(-1, keepdim=True) / 127
        assert weight.ndim == 1 or ((weight - rounded).abs() <= step * 0.501).all()


def test_eight_bits_cost_less_than_a_hundredth_of_the_bits(release):
    rounded, tokenizer = release
    exact, _ = load_model(RELEASE)
    stories = complete(exact, tokenizer, ["Once upon a time"] * 8, Sampling(temperature=1.0, top_p=1.0, max_tokens=200))
    losses = [sum(loss_of(model, tokenizer, story) for story in stories) for model in (exact, rounded)]
    assert losses[0] != losses[1]
    assert losses[1] / losses[0] == pytest.approx(1, abs=0.01)


@torch.no_grad()
def loss_of(model, tokenizer, story: str) -> float:
    tokens = torch.tensor([[tokenizer.eot, *tokenizer.encode(story)]])
    return float(model(tokens[:, :-1], targets=tokens[:, 1:])) * (tokens.shape[1] - 1)


def test_packed_model_takes_at_most_ten_megabytes_for_seven_million_parameters():
    parameters = sum(weight.numel() for weight in load_model(RELEASE)[0].parameters())
    assert len(page.pack(RELEASE, [])) <= 10e6 / 7e6 * parameters


@with_node
def test_engine_gives_the_ids_of_sentencepiece_on_a_thousand_texts(engine, release):
    texts = made_up_texts(1000)
    assert engine("(model, texts) => texts.map((text) => model.encode(text))", texts) == [release[1].encode(t) for t in texts]


@with_node
def test_engine_gives_back_the_text_that_it_encoded(engine):
    texts = made_up_texts(200)
    assert engine("(model, texts) => texts.map((text) => model.decode(model.encode(text)))", texts) == texts


@with_node
def test_engine_gives_the_logits_of_pytorch(engine, release):
    model, tokenizer = release
    text = 'One day, a fox found a red kite. "Is this yours?" he asked the hen.\nThe hen shook her head and said, "No."'
    tokens = [tokenizer.eot, *tokenizer.encode(text)]
    with torch.no_grad():
        expected = model(torch.tensor([tokens]))[0]
    found = engine("(model, tokens) => tokens.map((token, at) => [...model.step(token, at)])", tokens)
    assert (torch.tensor(found) - expected).abs().max() < 1e-3


@with_node
def test_engine_reads_a_position_again_as_it_did_before(engine, release):
    tokens = [release[1].eot, *release[1].encode("The dog ran to the big tree.")]
    first, again = engine(
        """(model, tokens) => {
            const first = tokens.map((token, at) => [...model.step(token, at)]).at(-1);
            [9, 8, 7].forEach((token, i) => model.step(token, 3 + i));
            return [first, tokens.slice(3).map((token, i) => [...model.step(token, 3 + i)]).at(-1)];
        }""",
        tokens,
    )
    assert first == again


@with_node
@pytest.mark.parametrize("beginning", ["Once upon a time", "The cat"])
def test_engine_writes_the_greedy_text_of_pytorch(engine, release, beginning):
    model, tokenizer = release
    tokens = [tokenizer.eot, *tokenizer.encode(beginning)]
    found = engine(
        """(model, tokens, { choose }) => {
            const greedy = { temperature: 0, topP: 1 };
            tokens.slice(0, -1).forEach((token, at) => model.step(token, at));
            for (let i = 0; i < 200; i++) tokens.push(choose(model.step(tokens.at(-1), tokens.length - 1), greedy, 0));
            return tokens;
        }""",
        tokens,
    )
    with torch.no_grad():
        expected = model(torch.tensor([found[:-1]]))[0].argmax(-1).tolist()
    assert found[len(tokens) :] == expected[len(tokens) - 1 :]
    story = complete(model, tokenizer, [beginning], Sampling(temperature=0, max_tokens=200))[0]
    written = found[len(tokens) :]
    assert tokenizer.decode(written[: written.index(tokenizer.eot)] if tokenizer.eot in written else written) == story


@with_node
def test_engine_without_a_head_gives_what_pytorch_gives_without_it(engine, release):
    _, tokenizer = release
    model = page.round_to_eight_bits(load_model(RELEASE)[0])
    layer, head, size = 1, 2, model.config.d_head
    with torch.no_grad():
        model.model["layers"][layer].self_attn.o_proj.weight[:, head * size : (head + 1) * size] = 0
        tokens = [tokenizer.eot, *tokenizer.encode("The boy saw a big red bus.")]
        expected = model(torch.tensor([tokens]))[0, -1]
    found = engine(
        "(model, tokens) => (model.off.add('1.2'), tokens.map((token, at) => [...model.step(token, at)]).at(-1))", tokens
    )
    assert (torch.tensor(found) - expected).abs().max() < 1e-3


@with_node
def test_engine_draws_tokens_as_often_as_their_probabilities_say_and_none_beyond_top_p(engine):
    drawn = engine(
        """(model, logits, { choose, random }) => Array.from({ length: 20000 }, (_, at) =>
            choose(Float32Array.from(logits), { temperature: 1, topP: 0.9 }, random(7, at)))""",
        [float(torch.tensor(p).log()) for p in (0.5, 0.3, 0.15, 0.05)],
    )
    shares = torch.bincount(torch.tensor(drawn), minlength=4) / len(drawn)
    assert shares.tolist() == pytest.approx([0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0], abs=0.015)
    assert shares[3] == 0


@with_node
def test_engine_says_that_damaged_weights_cannot_be_unpacked():
    script = f"""
        const {{ Model }} = require({json.dumps(str(page.SOURCES / "engine.js"))});
        Model.load("{"QUJD" * 1000}").then(() => console.log("loaded"), () => console.log("refused"));
    """
    done = subprocess.run([NODE, "-e", script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "refused\n"


@with_chromium
@pytest.mark.parametrize("width", [1280, 390])
def test_page_writes_a_story_and_offers_other_words(browser, width):
    browser.resize(width, 844)
    browser.click("#blm .write")
    browser.wait(STORY)
    story = browser.run(TEXT)
    assert story.startswith("Once upon a time")
    assert len(story.split()) > 20
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("document.getElementById('blm-still').hidden")

    browser.click("#blm .word:nth-of-type(9)")
    browser.wait("document.querySelectorAll('#blm .others .choice').length === 5")
    shown = browser.run("[...document.querySelectorAll('#blm .others .choice')].map((line) => line.textContent)")
    assert all("%" in line for line in shown)
    box = browser.run("(({left, right}) => [left, right])(document.querySelector('#blm .others').getBoundingClientRect())")
    assert box[0] >= 0
    assert box[1] <= width
    word = browser.run("document.querySelector('#blm .others .choice b').textContent")
    before = browser.run("[...document.querySelectorAll('#blm .word')].slice(0, 8).map((word) => word.textContent)")
    browser.click("#blm .others .choice")
    browser.wait(STORY)
    after = browser.run("[...document.querySelectorAll('#blm .word')].map((word) => word.textContent)")
    assert after[:8] == before
    assert after[8].startswith(word)


@with_chromium
@pytest.mark.parametrize("width", [1280, 390])
def test_rendered_report_tells_a_story_without_a_network(rendered, width):
    rendered.resize(width, 844)
    rendered.click("#blm .write")
    rendered.wait(STORY)
    assert rendered.run(TEXT).startswith("Once upon a time")
    assert rendered.run("document.documentElement.scrollWidth") <= width
    assert rendered.complaints() == []
    assert [url for url in rendered.requests() if not url.startswith("data:")] == [(ROOT / "_report/index.html").as_uri()]


@with_chromium
def test_still_story_stands_there_without_a_script(site, tmp_path):
    with Chromium(tmp_path / "profile") as chromium:
        chromium.call("Emulation.setScriptExecutionDisabled", value=True)
        chromium.open(site.as_uri())
        shown = "[...document.querySelectorAll('#blm-still, #blm')].map((one) => one.checkVisibility())"
        assert sorted(chromium.run(shown)) == [False, True]
        assert chromium.run("document.getElementById('blm-still').checkVisibility()")


@with_chromium
def test_unpacking_shows_how_far_it_is(browser):
    browser.run(
        """window.shown = [];
        new MutationObserver(() => shown.push(document.querySelector("#blm progress").value))
            .observe(document.querySelector("#blm .bar"), { attributes: true, subtree: true }); 0"""
    )
    browser.click("#blm .write")
    browser.wait(STORY)
    shown = browser.run("shown")
    assert shown == sorted(shown)
    assert shown[0] < 1 == shown[-1]
    assert len(set(shown)) >= 3
    assert not browser.run("document.querySelector('#blm .bar').checkVisibility()")


@with_chromium
def test_same_seed_gives_the_same_story_and_another_seed_another(browser):
    def story():
        browser.wait(STORY)
        return browser.run(TEXT)

    browser.click("#blm .write")
    first = story()
    browser.click("#blm .another")
    second = story()
    browser.run("document.querySelector('#blm [name=seed]').value = 1")
    browser.click("#blm .write")
    assert (story() == first, second == first) == (True, False)


@with_chromium
def test_of_several_wishes_in_a_row_the_last_is_fulfilled(browser):
    browser.run("for (let i = 0; i < 3; i++) document.querySelector('#blm .another').click()")
    browser.wait(STORY)
    hurried = browser.run(TEXT)
    browser.click("#blm .write")
    browser.wait(STORY)
    assert browser.run("document.querySelector('#blm [name=seed]').value") == "4"
    assert browser.run(TEXT) == hurried


@with_chromium
def test_story_stops_when_asked_to_and_its_words_can_be_opened(browser):
    browser.click("#blm .write")
    browser.wait("document.querySelectorAll('#blm .word').length > 12")
    browser.click("#blm .write")
    browser.wait(STORY)
    assert "the end" not in browser.run(
        "[...document.querySelectorAll('#blm .word')].map((one) => one.getAttribute('aria-label'))"
    )
    browser.click("#blm .word:nth-of-type(10)")
    browser.wait("document.querySelectorAll('#blm .others .choice').length === 5")


@with_chromium
def test_keyboard_alone_writes_a_story_and_goes_on_from_another_word(browser):
    def focused(selector):
        return browser.run(f"document.activeElement.matches({json.dumps(selector)})")

    for _ in range(9):
        browser.press("Tab")
        if focused("#blm .write"):
            break
    browser.press("Enter")
    browser.wait(STORY)
    for _ in range(12):
        browser.press("Tab")
        if focused("#blm .word"):
            break
    place = "(({offsetTop, offsetLeft}) => [offsetTop, offsetLeft])(document.activeElement)"
    browser.press("Home")
    first = browser.run(place)
    browser.press("ArrowRight")
    browser.press("ArrowDown")
    below = browser.run(place)
    assert below[0] > first[0] + 10
    assert below[1] >= first[1]
    browser.press("ArrowUp")
    assert browser.run(place)[0] == pytest.approx(first[0], abs=5)  # bold and plain words of a line differ by a little
    assert focused("#blm .word")
    browser.press("Enter")
    browser.wait("document.activeElement.matches('#blm .choice')")
    browser.press("Escape")
    assert focused("#blm .word.chosen, #blm .word")
    browser.press("Enter")
    browser.wait("document.activeElement.matches('#blm .choice')")
    browser.press("ArrowDown")
    word = browser.run("document.activeElement.querySelector('b').textContent")
    browser.press("Enter")
    browser.wait(STORY)
    browser.wait("document.activeElement.matches('#blm .word.given')")
    assert browser.run("document.activeElement.textContent") == word


@with_chromium
def test_story_is_announced_sentence_by_sentence(browser):
    browser.click("#blm .write")
    browser.wait(STORY)
    spoken = browser.run("[...document.querySelectorAll('#blm [aria-live=polite]')].map((one) => one.textContent).join('')")
    shown = browser.run("[...document.querySelectorAll('#blm .word:not(.mark)')].map((one) => one.textContent).join('')")
    assert "".join(spoken.split()) == "".join(shown.split()).removeprefix("Onceuponatime")


@with_chromium
def test_link_opens_its_head_and_switching_it_off_writes_another_story(browser):
    browser.click("a[href='#head-2-1']")
    browser.wait("document.getElementById('blm').classList.contains('attention') && " + STORY)
    assert browser.run("document.querySelector('#blm [name=head]').selectedOptions[0].textContent") == "2.1 a head with a name"
    assert browser.run("document.querySelector('#blm .what').textContent") == HEADS[0]["what"]
    browser.click("#blm .word:nth-of-type(15)")
    browser.wait("document.querySelectorAll('#blm .looked .choice').length > 0")
    shares = browser.run(
        "[...document.querySelectorAll('#blm .word')].map((one) => parseFloat(one.style.getPropertyValue('--shade')) ** 2)"
    )
    assert sum(shares) == pytest.approx(1, abs=0.02)
    assert not any(shares[15:])
    browser.click("#blm [value=surprise]")
    browser.click("a[href='#head-2-1']")
    browser.wait("document.getElementById('blm').classList.contains('attention')")
    before = browser.run(TEXT)
    browser.click("#blm .switch")
    browser.wait("document.querySelector('#blm .before:not([hidden])') && " + STORY)
    assert browser.run(TEXT) != before
    assert "2.1 is off" in browser.run("document.querySelector('#blm .status').textContent")


@with_chromium
def test_text_is_readable_on_the_darkest_shade(browser):
    browser.click("#blm .write")
    browser.wait(STORY)
    for view in ("surprise", "attention"):
        browser.run(f"document.querySelector('#blm [value={view}]').click()")
        colours = browser.run(
            """(() => {
                const word = document.querySelector("#blm .word:nth-of-type(4)");
                word.style.setProperty("--shade", 1);
                const style = getComputedStyle(word);
                return [style.color, style.backgroundColor].map((colour) => colour.match(/[\\d.]+/g).map(Number));
            })()"""
        )
        assert contrast(*colours) >= 4.5


def contrast(text: list[float], background: list[float]) -> float:
    """The ratio of WCAG 2 between a colour and a half-transparent one on white."""
    alpha = background[3]
    colours = (text[:3], [255 - (255 - value) * alpha for value in background[:3]])
    linear = [[(v / 255 / 12.92) if v <= 10 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in colour] for colour in colours]
    light = sorted(0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in linear)
    return (light[1] + 0.05) / (light[0] + 0.05)


def test_committed_story_is_shaded_by_the_surprise_of_the_released_model():
    html, typst = (ROOT / "figures" / "story.md").read_text().split("```{=typst}")
    shown = re.findall(r'( ?)<span style="background:rgb\(214 96 40 / ([\d.]+)\)">(.*?)</span>', html, re.DOTALL)
    text = unescape("".join(space + word for space, _, word in shown))
    assert text.startswith(page.BEGINNING)
    expected = page.surprises(*load_model(RELEASE), text)
    shades = [min(1, bits / page.SURPRISE) * page.SHADE for _, bits in expected]
    assert [float(shade) for _, shade, _ in shown] == pytest.approx(shades, abs=0.02)
    assert len(shown) == typst.count("#highlight") + typst.count("#linebreak")


def test_story_is_the_first_that_the_model_writes(tmp_path):
    model, tokenizer = load_model(RELEASE)
    page.write_story(RELEASE, tmp_path / "story.md")
    text = page.BEGINNING + complete(model, tokenizer, [page.BEGINNING], Sampling())[0]
    html = (tmp_path / "story.md").read_text().split('<div id="blm-still">')[1].split("</div>")[0]
    assert unescape(re.sub("<.*?>", "", html)) == text
