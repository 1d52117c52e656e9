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

from blm_core.checkpoint import load_model
from blm_core.config import ROOT
from blm_core.evaluate import score
from blm_core.evidence import page
from blm_core.generate import Sampling, complete

RELEASE = ROOT / "release"
REPORT = ROOT / "_report" / "index.html"
NODE = shutil.which("node")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
with_node = pytest.mark.skipif(NODE is None, reason="node was not found: install Debian's nodejs to test the page's engine")
with_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium was not found: install it to test the page in a browser")

HEADS = [{"name": "a head with a name", "layer": 2, "head": 1, "what": "It looks at something."}]
COMMON = ["Once", "upon", "a", "little", "girl", "said", "don't", "Tom's", "123", "4096", "...", "ball", "mummy", "xylograph"]
RARE = [*"\n\t\r\0\"'?!\u2018\u2019\u201c\u201d\u2013\u2026\u00a0\u2581\ufeff\u00e9\u00df", "e\u0301", "漢字", "שלום"]
RARE += ["😀", "👩‍👧", "🏳️‍🌈", "\n\n", "\r\n", "  ", "   ", "<|endoftext|>", "<0x41>", "<unk>"]


@pytest.fixture
def release():
    """The released model and vocabulary, its matrices rounded as in the page."""
    model, tokenizer = load_model(RELEASE)
    for weight in model.parameters():
        if weight.ndim == 2:
            values, scales = page.quantised(weight.data)
            weight.data = values * scales[:, None]
    return model, tokenizer


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """Runs a JavaScript function of the packed release, a value from Python and what engine.js exports."""
    folder = tmp_path_factory.mktemp("engine")
    (folder / "packed.txt").write_text(page.pack(*load_model(RELEASE), HEADS))
    script = f"""
        const engine = require({json.dumps(str(page.SOURCES / "engine.js"))}), fs = require("fs");
        const read = (name) => fs.readFileSync({json.dumps(str(folder))} + "/" + name, "utf8");
        engine.Model.load(read("packed.txt")).then(async (model) =>
            console.log(JSON.stringify(await (%s)(model, JSON.parse(read("given.json")), engine))));
    """

    def run(function: str, given):
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


def browse(path: Path, folder: Path, width: int, height: int, script: str) -> dict:
    """What `script` returns inside the page in `path`, on a screen of this size and without a network.

    The page stands in a frame of that size, `script` at its end. Chromium logs what a page says on its console, and the result
    has to be the first of it.
    """
    driver = f"""<script>(async () => {{
        const blm = document.getElementById("blm");
        const find = (selector) => blm.querySelector(selector), all = (selector) => [...blm.querySelectorAll(selector)];
        const until = async (condition) => {{
            do await new Promise((done) => setTimeout(done, 100)); while (!condition());
        }};
        const written = () => !find(".story.writing") && all(".word").length > 5;
        const write = async (button) => {{ find(button).click(); await until(written); return find(".story").innerText; }};
        {script}
    }})().then((result) => console.log("RESULT" + JSON.stringify(result) + "END"));</script>"""
    (folder / "page.html").write_text(path.read_text() + driver)
    (folder / "frame.html").write_text(f'<iframe src="page.html" style="border: 0; width: {width}px; height: {height}px">')
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--window-size=1400,1000"]
    flags += ["--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}"]
    command = ["timeout", "240", CHROMIUM, *flags, (folder / "frame.html").as_uri()]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as chromium:
        said = next((line for line in chromium.stderr if "CONSOLE" in line), "nothing")
        chromium.terminate()
    result = re.search("RESULT(.*)END", said)
    assert result, f"the page said: {said}"
    return json.loads(result[1])


def test_rounding_costs_less_than_a_hundredth_of_the_bits_and_ten_million_parameters_take_ten_megabytes(release, site):
    exact, tokenizer = load_model(RELEASE)
    stories = complete(exact, tokenizer, [page.BEGINNING] * 8, Sampling(temperature=1.0, top_p=1.0, max_tokens=200))
    bits = [score(model, tokenizer, stories)[0].bits_per_byte for model in (exact, release[0])]
    assert 0 < abs(bits[1] / bits[0] - 1) < 0.01
    assert site.stat().st_size <= max(10e6, sum(weight.numel() for weight in exact.parameters()))


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
def test_engine_gives_the_logits_of_pytorch_with_all_heads_and_without_one_and_its_greedy_tokens(engine, release):
    model, tokenizer = release
    tokens = [tokenizer.eot, *tokenizer.encode('One day, a fox found a red kite. "Is this yours?" he asked the hen.\nThe')]
    whole, without, found = engine(
        """(model, tokens, { choose }) => {
            const read = () => tokens.map((token, at) => [...model.step(token, at)]);
            const whole = read(), off = model.off.add("1.2"), without = read();
            off.clear();
            let logits = read().at(-1);
            for (let i = 0; i < 200; i++) {
                tokens.push(choose(logits, { temperature: 0, topP: 1 }, 0));
                logits = model.step(tokens.at(-1), tokens.length - 1);
            }
            return [whole, without, tokens];
        }""",
        tokens,
    )
    with torch.no_grad():
        expected = model(torch.tensor([found[:-1]]))[0]
        first, width = 2 * model.config.d_head, model.config.d_head
        model.model["layers"][1].self_attn.o_proj.weight[:, first : first + width] = 0
        expected_without = model(torch.tensor([tokens]))[0]
    assert (torch.tensor(whole) - expected[: len(tokens)]).abs().max() < 1e-3
    assert (torch.tensor(without) - expected_without).abs().max() < 1e-3
    assert len(found) == len(tokens) + 200
    assert found[len(tokens) :] == expected.argmax(-1).tolist()[len(tokens) - 1 :]


@with_chromium
@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
@pytest.mark.parametrize("rendered", [False, True], ids=["fragment", "report"])
def test_first_screen_holds_the_model_which_tells_a_story_and_goes_on_from_another_word_without_a_network(
    site, tmp_path, rendered, width, height
):
    if rendered and not REPORT.exists():
        pytest.skip("the report was not rendered: make report")
    script = """
        const bottom = (name) => find(name).getBoundingClientRect().bottom;
        const bottoms = ["textarea", ".write", "[name=temperature]", "[name=seed]"].map(bottom);
        const words = () => all(".word").map((word) => word.textContent);
        const story = await write(".write"), before = words();
        all(".word")[8].click();
        await until(() => all(".others .choice").length === 5);
        const { left, right } = find(".others").getBoundingClientRect(), other = find(".others b").textContent;
        await write(".others .choice");
        const still = document.getElementById("blm-still").checkVisibility(), width = document.documentElement.scrollWidth;
        const asked = performance.getEntriesByType("resource").map(({ name }) => name);
        return { bottoms, story, before, left, right, other, after: words(), still, width, asked };
    """
    found = browse(REPORT if rendered else site, tmp_path, width, height, script)
    assert all(0 < bottom < height for bottom in found["bottoms"])
    assert found["story"].startswith(page.BEGINNING)
    assert len(found["story"].split()) > 20
    assert not found["still"]
    assert 0 <= found["left"] < found["right"] <= width
    assert found["width"] <= width
    assert found["after"][:8] == found["before"][:8]
    assert found["after"][8].startswith(found["other"])
    assert found["asked"] == []


@with_chromium
def test_seed_decides_the_story_a_link_opens_its_head_and_without_that_head_the_story_is_another(site, tmp_path):
    script = """
        const first = await write(".write"), second = await write(".another");
        find("[name=seed]").value = 1;
        const again = await write(".write");
        document.querySelector("a[href='#head-2-1']").click();
        await until(() => blm.classList.contains("attention"));
        const head = find("[name=head]").selectedOptions[0].textContent, what = find(".what").textContent;
        all(".word")[14].click();
        await until(() => all(".looked .choice").length > 0);
        const shares = all(".word").map((word) => parseFloat(word.style.getPropertyValue("--shade")) ** 2);
        find(".switch").click();
        await until(() => find(".before:not([hidden])") && written());
        return { first, second, again, head, what, shares, without: find(".story").innerText };
    """
    found = browse(site, tmp_path, 1280, 800, script)
    assert found["first"] == found["again"] != found["second"]
    assert (found["head"], found["what"]) == ("2.1 a head with a name", HEADS[0]["what"])
    assert sum(found["shares"]) == pytest.approx(1, abs=0.02)  # its attention falls on the word and those before it
    assert not any(found["shares"][15:])
    assert found["without"] != found["first"]


def test_committed_story_is_the_released_model_s_first_shaded_by_its_surprise(tmp_path):
    model, tokenizer = load_model(RELEASE)
    page.write_story(RELEASE, tmp_path / "story.md")
    texts, shades = [], []
    for path in (ROOT / "figures" / "story.md", tmp_path / "story.md"):
        html, typst = path.read_text().split("```{=typst}")
        shown = re.findall(r'( ?)<span style="background:rgb\(214 96 40 / ([\d.]+)\)">(.*?)</span>', html, re.DOTALL)
        texts.append(unescape("".join(space + word for space, _, word in shown)))
        shades.append([float(shade) for _, shade, _ in shown])
        assert len(shown) == typst.count("#highlight") + typst.count("#linebreak")
    assert texts[0].startswith(page.BEGINNING)
    assert texts[1] == page.BEGINNING + complete(model, tokenizer, [page.BEGINNING], Sampling())[0]
    expected = [min(1, bits / page.SURPRISE) * page.SHADE for _, bits in page.surprises(model, tokenizer, texts[0])]
    assert shades[0] == pytest.approx(expected, abs=0.02)
