"""The released model inside the report's HTML: rounded weights, engine and interface in one fragment.

- Every matrix is kept as whole numbers of a byte with one float32 scale a row; gains of norms stay float32
- Everything is one zlib stream in base64, inside a script element: a page opened as a file may not fetch anything
- The stream codes a byte by how often it occurs, so that fewer levels make a smaller page
- `page/engine.js` unpacks and runs it, `page/page.js` is the interface
"""

import base64
import html
import json
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from blm_core.checkpoint import load_model
from blm_core.config import ROOT
from blm_core.files import read_json
from blm_core.generate import Sampling, complete
from blm_core.model import LanguageModel
from blm_core.tokenizer import SPACE_MARK, Tokenizer

SOURCES = Path(__file__).parent / "page"
BEGINNING = "Once upon a time"
LARGEST = 43  # matrices become whole numbers from -43 to 43; with more, ten million parameters would take over 10 MB
SURPRISE, SHADE = 8, 0.75  # bits at which a word is shaded darkest, and how dark, as in page.js and page.css
CONFIG = ("vocab_size", "n_layers", "d_model", "n_heads", "n_kv_heads", "d_head", "d_ff", "seq_len", "rope_base", "norm_eps")


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`weight` (rows, columns) as int8 and the float32 scale of each row (rows,); their product is at most half a step off."""
    scales = weight.abs().amax(1).clamp(min=1e-12) / LARGEST
    return torch.round(weight / scales[:, None]).to(torch.int8), scales


def pack(model: LanguageModel, tokenizer: Tokenizer, heads: list[dict]) -> str:
    """The model as base64; the layout is read by the constructor of `Model` in engine.js."""
    tensors, numbers, whole = [], [], []
    for name, weight in model.state_dict().items():
        values, floats = quantised(weight) if weight.ndim == 2 else (None, weight)
        tensors.append({"name": name, "rows": len(weight), "columns": 0 if values is None else weight.shape[1]})
        numbers.append(floats.numpy().astype("<f4").tobytes())
        whole.append(b"" if values is None else values.numpy().tobytes())
    pieces = [tokenizer.piece(i) for i in range(len(tokenizer))]
    header = {
        "config": {name: getattr(model.config, name) for name in CONFIG},
        "vocabulary": {  # null for pieces that no text can spell
            "pieces": [piece if tokenizer.is_normal(i) or piece == "\n" else None for i, piece in enumerate(pieces)],
            "scores": [tokenizer.score(i) for i in range(len(tokenizer))],
            "bytes": [pieces.index(f"<0x{byte:02X}>") for byte in range(256)],
            "eot": tokenizer.eot,
        },
        "sampling": {"temperature": Sampling().temperature, "topP": Sampling().top_p},
        "heads": heads,
        "tensors": tensors,
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 4)  # float32 numbers begin at a multiple of four
    return base64.b64encode(zlib.compress(struct.pack("<I", len(text)) + text + b"".join(numbers + whole), 9)).decode()


@torch.no_grad()
def surprises(model: LanguageModel, tokenizer: Tokenizer, text: str) -> list[tuple[str, float]]:
    """Each token of `text`, as text, and the bits by which it surprised `model`, as far as its context reaches."""
    tokens = torch.tensor([tokenizer.eot, *tokenizer.encode(text)][: model.config.seq_len + 1])
    bits = -model(tokens[None, :-1])[0].log_softmax(-1).gather(1, tokens[1:, None]).squeeze(1) / math.log(2)
    texts = [tokenizer.piece(token).replace(SPACE_MARK, " ") for token in tokens[1:]]
    return list(zip(texts, bits.tolist(), strict=True))


def still(words: list[tuple[str, float]]) -> str:
    """`words` and their surprise as Markdown for Quarto: shaded text for HTML without a script, and for the PDF."""
    spans, marked = [], []
    for text, bits in words:
        shade = min(1.0, bits / SURPRISE) * SHADE
        style = f"background:rgb(214 96 40 / {shade:.2f})"
        spans.append(" " * text.startswith(" ") + f'<span style="{style}">{html.escape(text.lstrip(" "))}</span>')
        # Typst's highlight has no opacity on white paper, so that the shade is mixed here.
        colour = "#" + "".join(f"{round(255 - (255 - c) * shade):02x}" for c in (214, 96, 40))
        quoted = json.dumps(text, ensure_ascii=False)
        marked.append("#linebreak()" if text == "\n" else f'#highlight(fill: rgb("{colour}"))[#text({quoted})]')
    return f"""```{{=html}}
<div class="blm-paper">{"".join(spans)}</div>
```

```{{=typst}}
#block(inset: (left: 1em, y: 0.5em))[{"".join(marked)}]
```
"""


def write_page(release: Path, out: Path, heads: Path = ROOT / "figures" / "heads.json") -> None:
    """Write `out/page.html`, the fragment that the report includes: the model in `release` and the interface to it.

    `heads` may hold what the inside view found: a list of {"name", "layer", "head", "what"}, counted from 1 as in the report.
    """
    style, markup, engine, page = ((SOURCES / n).read_text("utf-8") for n in ("page.css", "page.html", "engine.js", "page.js"))
    model, tokenizer = load_model(release)
    millions = f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.1f}"
    parts = [
        f"<style>\n{style}</style>",
        markup.replace("{temperature}", str(Sampling().temperature)).replace("{parameters}", millions),
        f'<script type="text/plain" id="blm-model">{pack(model, tokenizer, read_json(heads, []))}</script>',
        f"<script>\n(() => {{\n{engine}\n{page}\n}})();\n</script>",
    ]
    out.mkdir(parents=True, exist_ok=True)
    (out / "page.html").write_text("\n".join(parts) + "\n", encoding="utf-8")


def write_story(release: Path, path: Path) -> None:
    """Write the first story of the model in `release`, shaded, to `path`: what stands where no script runs, and in the PDF.

    The file is committed, as Quarto looks for what a text includes before anything can be made.
    """
    model, tokenizer = load_model(release)
    text = BEGINNING + complete(model, tokenizer, [BEGINNING], Sampling())[0]
    path.write_text(still(surprises(model, tokenizer, text)), encoding="utf-8")


if __name__ == "__main__":
    write_page(ROOT / "release", ROOT / "_page")
