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
from blm_core.model import LanguageModel

RELEASE = ROOT / "release"
REPORT = ROOT / "_report" / "index.html"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# Run behind engine.js by node, in a folder with the packed model and what a test gives.
ENGINE = """
    const engine = require(process.argv[1]), read = (name) => require("fs").readFileSync(name, "utf8");
    const { texts, tokens } = JSON.parse(read("given.json"));
    engine.Model.load(read("packed.txt")).then((model) => {
        const ids = texts.map((text) => model.encode(text)), again = ids.map((tokens) => model.decode(tokens));
        const logits = () => tokens.map((token, at) => [...model.step(token, at)]);
        const whole = logits(), off = model.off.add("1.2"), without = logits();
        off.clear();
        const greedy = [...tokens];
        let last = logits().at(-1);
        for (let i = 0; i < 200; i++) {
            greedy.push(engine.choose(last, { temperature: 0, topP: 1 }, 0));
            last = model.step(greedy.at(-1), greedy.length - 1);
        }
        console.log(JSON.stringify({ ids, again, whole, without, greedy }));
    });
"""
# Run at the end of the page by Chromium.
BROWSER = """<script>(async () => {
    const blm = document.getElementById("blm"), find = (selector) => blm.querySelector(selector);
    const all = (selector) => [...blm.querySelectorAll(selector)], words = () => all(".word").map((word) => word.textContent);
    const until = async (condition) => { do await new Promise((done) => setTimeout(done, 100)); while (!condition()); };
    const write = async (button) => {
        find(button).click();
        await until(() => !find(".story.writing") && all(".word").length > 5);
        return find(".story").innerText;
    };
    const bottoms = ["textarea", ".write", "[name=seed]"].map((name) => find(name).getBoundingClientRect().bottom);
    const other = await write(".another");
    find("[name=seed]").value = 1;
    const story = await write(".write"), before = words();
    find("[name=seed]").value = 1;
    const again = await write(".write");
    all(".word")[8].click();
    await until(() => all(".others .choice").length === 5);
    const { left, right } = find(".others").getBoundingClientRect(), choice = find(".others b").textContent;
    await write(".others .choice");
    const after = words(), still = document.getElementById("blm-still").checkVisibility();
    const width = document.documentElement.scrollWidth;
    find("[value=attention]").click();
    all(".word")[14].click();
    await until(() => all(".looked .choice").length > 0);
    const heads = all("[name=head] option").map((option) => option.textContent);
    const shares = all(".word").map((word) => parseFloat(word.style.getPropertyValue("--shade")) ** 2);
    const asked = performance.getEntriesByType("resource").map(({ name }) => name);
    return { bottoms, other, story, before, again, left, right, choice, after, still, width, heads, shares, asked };
})().then((result) => console.log("RESULT" + JSON.stringify(result) + "END"));</script>"""

HEADS = [{"name": "a head with a name", "layer": 2, "head": 1, "what": "It looks at something."}]
COMMON = ["Once", "upon", "a", "little", "girl", "said", "don't", "Tom's", "123", "4096", "...", "mummy", "xylograph"]
RARE = [*"\n\t\r\0\"'?!\u2018\u2019\u201c\u201d\u2013\u2026\u00a0\u2581\ufeff\u00e9\u00df", "e\u0301", "漢字", "שלום", "👩‍👧"]
RARE += ["\n\n", "\r\n", "   ", "<|endoftext|>", "<0x41>", "<unk>"]


@pytest.fixture
def rounded() -> LanguageModel:
    """The released model, its matrices rounded as in the page."""
    model, _ = load_model(RELEASE)
    for weight in model.parameters():
        if weight.ndim == 2:
            values, scales = page.quantised(weight.data)
            weight.data = values * scales[:, None]
    return model


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The fragment as the report includes it: behind the still story, at the end of a page."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "heads.json").write_text(json.dumps(HEADS))
    page.write_page(RELEASE, folder, folder / "heads.json")
    html = f"""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
        <title>Report</title><body><div id="blm-still">a story</div>
        {(folder / "page.html").read_text()}</body></html>"""
    (folder / "index.html").write_text(html)
    return folder / "index.html"


def test_rounding_costs_less_than_a_hundredth_of_the_bits_and_ten_million_parameters_take_ten_megabytes(rounded, site):
    exact, tokenizer = load_model(RELEASE)
    stories = complete(exact, tokenizer, [page.BEGINNING] * 8, Sampling(temperature=1.0, top_p=1.0, max_tokens=200))
    bits = [score(model, tokenizer, stories)[0].bits_per_byte for model in (exact, rounded)]
    assert 0 < abs(bits[1] / bits[0] - 1) < 0.01
    assert site.stat().st_size <= max(10e6, sum(weight.numel() for weight in exact.parameters()))


@pytest.mark.skipif(shutil.which("node") is None, reason="node was not found: install nodejs to test the page's engine")
def test_engine_gives_the_ids_and_texts_of_sentencepiece_and_the_logits_and_greedy_tokens_of_pytorch(rounded, tmp_path):
    exact, tokenizer = load_model(RELEASE)
    draw = random.Random(1)
    words = [word + space for word in COMMON * 3 + RARE for space in ("", " ", " ")]
    texts = ["".join(draw.choices(words, k=draw.randint(1, 40))) for _ in range(1000)]
    tokens = [tokenizer.eot, *tokenizer.encode('One day, a fox found a red kite. "Is this yours?" he asked the hen.\nThe')]
    (tmp_path / "packed.txt").write_text(page.pack(exact, tokenizer, HEADS))
    (tmp_path / "given.json").write_text(json.dumps({"texts": texts, "tokens": tokens}))
    command = ["node", "-e", ENGINE, page.SOURCES / "engine.js"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ids"] == [tokenizer.encode(text) for text in texts]
    assert found["again"] == texts
    with torch.no_grad():
        whole = rounded(torch.tensor([found["greedy"][:-1]]))[0]
        first, width = 2 * rounded.config.d_head, rounded.config.d_head
        rounded.model["layers"][1].self_attn.o_proj.weight[:, first : first + width] = 0
        without = rounded(torch.tensor([tokens]))[0]
    assert (torch.tensor(found["whole"]) - whole[: len(tokens)]).abs().max() < 1e-3
    assert (torch.tensor(found["without"]) - without).abs().max() < 1e-3
    assert found["greedy"][len(tokens) :] == whole.argmax(-1).tolist()[len(tokens) - 1 :]


@pytest.mark.skipif(CHROMIUM is None, reason="chromium was not found: install it to test the page in a browser")
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("rendered", [False, True], ids=["fragment", "report"])
def test_page_tells_a_story_goes_on_from_another_word_and_shows_a_head_without_a_network(site, tmp_path, rendered, width):
    if rendered and not REPORT.exists():
        pytest.skip("the report was not rendered: make report")
    (tmp_path / "page.html").write_text((REPORT if rendered else site).read_text() + BROWSER)
    (tmp_path / "frame.html").write_text(f'<iframe src="page.html" style="border: 0; width: {width}px; height: 800px">')
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--window-size=1400,1000"]
    flags += ["--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}"]
    command = ["timeout", "240", CHROMIUM, *flags, (tmp_path / "frame.html").as_uri()]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as chromium:
        said = next((line for line in chromium.stderr if "CONSOLE" in line), "nothing")  # the first that the page says
        chromium.terminate()
    result = re.search("RESULT(.*)END", said)
    assert result, f"the page said: {said}"
    found = json.loads(result[1])
    assert all(0 < bottom < 800 for bottom in found["bottoms"])  # on the first screen
    assert found["story"].startswith(page.BEGINNING)
    assert found["story"] == found["again"] != found["other"]  # the seed decides
    assert not found["still"]
    assert found["after"][:8] == found["before"][:8]
    assert found["after"][8].startswith(found["choice"])
    assert 0 <= found["left"] < found["right"] <= width
    assert found["width"] <= width
    assert rendered or "2.1 a head with a name" in found["heads"]
    assert sum(found["shares"][:15]) == pytest.approx(1, abs=0.02)  # the head's attention falls on the word and those before it
    assert not any(found["shares"][15:])
    assert found["asked"] == []


def test_committed_story_is_shaded_by_the_surprise_of_the_released_model():
    html = (ROOT / "figures" / "story.md").read_text().split("```{=typst}")[0]
    shown = re.findall(r'( ?)<span style="background:rgb\(214 96 40 / ([\d.]+)\)">(.*?)</span>', html, re.DOTALL)
    text = unescape("".join(space + word for space, _, word in shown))
    assert text.startswith(page.BEGINNING)
    expected = [min(1, bits / page.SURPRISE) * page.SHADE for _, bits in page.surprises(*load_model(RELEASE), text)]
    assert [float(shade) for _, shade, _ in shown] == pytest.approx(expected, abs=0.02)
