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
from blm_core.evaluate import score
from blm_core.evidence import page
from blm_core.generate import Sampling, complete

RELEASE = ROOT / "release"
REPORT = ROOT / "_report" / "index.html"
NODE = shutil.which("node")
with_node = pytest.mark.skipif(NODE is None, reason="node was not found: install Debian's nodejs to test the page's engine")
with_chromium = pytest.mark.skipif(PROGRAM is None, reason="chromium was not found: install it to test the page in a browser")
screens = pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])

HEADS = [{"name": "a head with a name", "layer": 2, "head": 1, "what": "It looks at something."}]
STORY = "!document.querySelector('#blm .story.writing') && document.querySelectorAll('#blm .word').length > 5"
TEXT = "document.querySelector('#blm .story').innerText"
CHOICES = "[...document.querySelectorAll('#blm .others .choice')].map((line) => line.textContent)"
COMMON = ["Once", "upon", "a", "little", "girl", "said", "don't", "Tom's", "123", "4096", "...", "ball", "mummy", "xylograph"]
RARE = [*"\n\t\r\0\"'?!\u2018\u2019\u201c\u201d\u2013\u2026\u00a0\u2581\ufeff\u00e9\u00df", "e\u0301", "漢字", "שלום"]
RARE += ["😀", "👩‍👧", "🏳️‍🌈", "\n\n", "\r\n", "  ", "   ", "<|endoftext|>", "<0x41>", "<unk>"]


@pytest.fixture
def release():
    """The released model and vocabulary, its matrices rounded as in the page."""
    model, tokenizer = load_model(RELEASE)
    return page.rounded(model), tokenizer


@pytest.fixture(scope="module")
def packed() -> str:
    return page.pack(RELEASE, HEADS)


@pytest.fixture(scope="module")
def engine(tmp_path_factory, packed):
    """Runs a JavaScript function of the packed release, a value from Python and what engine.js exports."""
    folder = tmp_path_factory.mktemp("engine")
    (folder / "packed.txt").write_text(packed)
    script = f"""
        const engine = require({json.dumps(str(page.SOURCES / "engine.js"))}), fs = require("fs");
        const read = (name) => fs.readFileSync({json.dumps(str(folder))} + "/" + name, "utf8");
        engine.Model.load(read("packed.txt")).then(async (model) =>
            console.log(JSON.stringify(await (%s)(model, JSON.parse(read("given.json")), engine))));
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
        <title>Report</title><body><div id="blm-still">{still}</div><a href="#head-2-1">a head</a>
        {(folder / "page.html").read_text()}</body></html>"""
    (folder / "index.html").write_text(html)
    return folder / "index.html"


@pytest.fixture
def browser(site, tmp_path):
    with Chromium(tmp_path / "profile") as chromium:
        chromium.open(site.as_uri())
        yield chromium
        assert chromium.complaints() == []
        assert chromium.requests() == [site.as_uri()]


def written(browser, button: str = ".write") -> str:
    """The story that stands there after a click on `button`."""
    browser.click(f"#blm {button}")
    browser.wait(STORY)
    return browser.run(TEXT)


def logits_of(model, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens]))[0]


def test_rounding_moves_a_weight_by_half_a_step_at_most_and_costs_less_than_a_hundredth_of_the_bits(release):
    exact, tokenizer = load_model(RELEASE)
    for name, weight in exact.named_parameters():
        step = weight.abs().amax(-1, keepdim=True) / page.LARGEST
        assert weight.ndim == 1 or ((weight - release[0].get_parameter(name)).abs() <= step * 0.501).all()
    stories = complete(exact, tokenizer, [page.BEGINNING] * 8, Sampling(temperature=1.0, top_p=1.0, max_tokens=200))
    bits = [score(model, tokenizer, stories)[0].bits_per_byte for model in (exact, release[0])]
    assert 0 < abs(bits[1] / bits[0] - 1) < 0.01


def test_model_in_the_page_takes_at_most_ten_megabytes_for_ten_million_parameters(site):
    parameters = sum(weight.numel() for weight in load_model(RELEASE)[0].parameters())
    assert site.stat().st_size <= max(10e6, parameters)


@with_node
def test_engine_gives_the_ids_of_sentencepiece_on_a_thousand_texts_and_the_texts_back(engine, release):
    draw = random.Random(1)
    words = [word + space for word in COMMON * 3 + RARE for space in ("", " ", " ")]
    texts = ["".join(draw.choices(words, k=draw.randint(1, 40))) for _ in range(1000)]
    ids, again = engine(
        """(model, texts) => {
            const ids = texts.map((text) => model.encode(text));
            return [ids, ids.map((tokens) => model.decode(tokens))];
        }""",
        texts,
    )
    assert ids == [release[1].encode(text) for text in texts]
    assert again == texts


@with_node
@pytest.mark.parametrize("off", [None, (1, 2)])
def test_engine_gives_the_logits_of_pytorch_with_all_heads_and_without_one_also_where_it_reads_again(engine, release, off):
    model, tokenizer = release
    text = 'One day, a fox found a red kite. "Is this yours?" he asked the hen.\nThe hen shook her head and said, "No."'
    tokens = [tokenizer.eot, *tokenizer.encode(text)]
    if off:
        layer, first = off[0], off[1] * model.config.d_head
        model.model["layers"][layer].self_attn.o_proj.weight.data[:, first : first + model.config.d_head] = 0
    found = engine(
        """(model, [tokens, off]) => {
            if (off) model.off.add(off.join("."));
            [tokens[0], 9, 8, 7].forEach((token, at) => model.step(token, at)); // these positions hold other words first
            return tokens.map((token, at) => [...model.step(token, at)]);
        }""",
        [tokens, off],
    )
    assert (torch.tensor(found) - logits_of(model, tokens)).abs().max() < 1e-3


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
    behind = found[len(tokens) :]
    assert behind == logits_of(model, found[:-1]).argmax(-1).tolist()[len(tokens) - 1 :]
    story = complete(model, tokenizer, [beginning], Sampling(temperature=0, max_tokens=200))[0]
    assert tokenizer.decode(behind[: behind.index(tokenizer.eot)] if tokenizer.eot in behind else behind) == story


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
def test_engine_says_that_damaged_weights_cannot_be_unpacked(engine):
    assert (
        engine("(_, base64, { Model }) => Model.load(base64).then(() => 'loaded', () => 'refused')", "QUJD" * 1000) == "refused"
    )


@with_chromium
@screens
def test_page_writes_a_story_tells_it_aloud_and_goes_on_from_another_word(browser, width, height):
    browser.resize(width, height)
    browser.run(
        """window.shown = [];
        new MutationObserver(() => shown.push(document.querySelector("#blm progress").value))
            .observe(document.querySelector("#blm .bar"), { attributes: true, subtree: true }); 0"""
    )
    story = written(browser)
    assert story.startswith(page.BEGINNING)
    assert len(story.split()) > 20
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("document.getElementById('blm-still').hidden")
    unpacked = browser.run("shown")
    assert unpacked == sorted(unpacked)
    assert unpacked[0] < 1 == unpacked[-1]
    assert len(set(unpacked)) >= 3
    assert not browser.run("document.querySelector('#blm .bar').checkVisibility()")
    spoken = browser.run("[...document.querySelectorAll('#blm [aria-live=polite]')].map((one) => one.textContent).join('')")
    words = "[...document.querySelectorAll('#blm .word')].map((word) => word.textContent)"
    shown = browser.run(words.replace(".word'", ".word:not(.mark)'"))
    assert "".join(spoken.split()) == "".join(shown).removeprefix("Onceuponatime")

    before = browser.run(words)
    browser.click("#blm .word:nth-of-type(9)")
    browser.wait(CHOICES + ".length === 5")
    assert all("%" in line for line in browser.run(CHOICES))
    box = browser.run("(({left, right}) => [left, right])(document.querySelector('#blm .others').getBoundingClientRect())")
    assert 0 <= box[0] < box[1] <= width
    word = browser.run("document.querySelector('#blm .others .choice b').textContent")
    browser.click("#blm .others .choice")
    browser.wait(STORY)
    after = browser.run(words)
    assert after[:8] == before[:8]
    assert after[8].startswith(word)


@with_chromium
@screens
@pytest.mark.skipif(not REPORT.exists(), reason="the report was not rendered: make report")
def test_first_screen_of_the_report_holds_the_model_which_tells_a_story_without_a_network(tmp_path, width, height):
    with Chromium(tmp_path / "profile", width, height) as browser:
        browser.open(REPORT.as_uri())
        names = ("textarea", ".write", "[name=temperature]", "[name=seed]")
        ends = [f"document.querySelector('#blm {name}').getBoundingClientRect().bottom" for name in names]
        assert all(0 < browser.run(end) < height for end in ends)
        assert browser.run("document.querySelectorAll('#TOC a').length") > 5
        assert written(browser).startswith(page.BEGINNING)
        assert browser.run("document.documentElement.scrollWidth") <= width
        assert browser.complaints() == []
        assert [url for url in browser.requests() if not url.startswith("data:")] == [REPORT.as_uri()]


@with_chromium
def test_still_story_stands_there_without_a_script(site, tmp_path):
    with Chromium(tmp_path / "profile") as chromium:
        chromium.call("Emulation.setScriptExecutionDisabled", value=True)
        chromium.open(site.as_uri())
        visible = "['blm-still', 'blm'].map((id) => document.getElementById(id).checkVisibility())"
        assert chromium.run(visible) == [True, False]


@with_chromium
def test_seed_decides_the_story_the_last_of_several_wishes_is_fulfilled_and_a_story_can_be_stopped(browser):
    first, second = written(browser), written(browser, ".another")
    browser.run("document.querySelector('#blm [name=seed]').value = 1")
    assert written(browser) == first != second
    browser.run("for (let i = 0; i < 3; i++) document.querySelector('#blm .another').click()")
    browser.wait(STORY)
    hurried = browser.run(TEXT)
    assert browser.run("document.querySelector('#blm [name=seed]').value") == "4"
    assert written(browser) == hurried
    browser.click("#blm .write")
    browser.wait("document.querySelectorAll('#blm .word').length > 12")
    assert len(written(browser)) < len(hurried)


@with_chromium
def test_keyboard_alone_writes_a_story_and_goes_on_from_another_word(browser):
    def focused(selector):
        return browser.run(f"document.activeElement.matches({json.dumps(selector)})")

    def press(*keys):
        for key in keys:
            browser.press(key)
        return browser.run("(({offsetTop, offsetLeft}) => [offsetTop, offsetLeft])(document.activeElement)")

    def tab_to(selector):
        for _ in range(20):
            browser.press("Tab")
            if focused(selector):
                break

    tab_to("#blm .write")
    press("Enter")
    browser.wait(STORY)
    tab_to("#blm .word")
    first, below = press("Home"), press("ArrowRight", "ArrowDown")
    assert below[0] > first[0] + 10
    assert below[1] >= first[1]
    assert press("ArrowUp")[0] == pytest.approx(first[0], abs=5)  # bold and plain words of a line differ by a little
    for last in ("Escape", "ArrowDown"):
        assert focused("#blm .word")
        press("Enter")
        browser.wait("document.activeElement.matches('#blm .choice')")
        press(last)
    word = browser.run("document.activeElement.querySelector('b').textContent")
    press("Enter")
    browser.wait(STORY)
    browser.wait("document.activeElement.matches('#blm .word.given')")
    assert browser.run("document.activeElement.textContent") == word


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
    before = browser.run(TEXT)
    browser.click("#blm .switch")
    browser.wait("document.querySelector('#blm .before:not([hidden])') && " + STORY)
    assert browser.run(TEXT) != before
    assert "2.1 is off" in browser.run("document.querySelector('#blm .status').textContent")


def test_committed_story_is_the_released_model_s_first_shaded_by_its_surprise(tmp_path):
    model, tokenizer = load_model(RELEASE)
    html, typst = (ROOT / "figures" / "story.md").read_text().split("```{=typst}")
    shown = re.findall(r'( ?)<span style="background:rgb\(214 96 40 / ([\d.]+)\)">(.*?)</span>', html, re.DOTALL)
    text = unescape("".join(space + word for space, _, word in shown))
    shades = [min(1, bits / page.SURPRISE) * page.SHADE for _, bits in page.surprises(model, tokenizer, text)]
    assert [float(shade) for _, shade, _ in shown] == pytest.approx(shades, abs=0.02)
    assert len(shown) == typst.count("#highlight") + typst.count("#linebreak")

    page.write_story(RELEASE, tmp_path / "story.md")
    fresh = (tmp_path / "story.md").read_text().split('<div class="blm-paper">')[1].split("</div>")[0]
    first = page.BEGINNING + complete(model, tokenizer, [page.BEGINNING], Sampling())[0]
    assert unescape(re.sub("<.*?>", "", fresh)) == first
    assert text.startswith(page.BEGINNING)
