"""The model card of a release: what the model is, what it was made from, what it scores, and where it ends."""

import json
from pathlib import Path

from blm_core.checkpoint import load_model
from blm_core.config import ROOT, Preset
from blm_core.files import read_json, written_aside
from blm_core.generate import Sampling, complete
from blm_core.model import LanguageModel
from blm_core.tokenizer import Tokenizer

PROMPT = "Once upon a time"
SAMPLES = 10

CARD = """---
language: en
license: cdla-sharing-1.0
library_name: transformers
pipeline_tag: text-generation
---

# BLM, a boutique language model

A decoder of the Llama family with {parameters} parameters that writes short stories for small children. It was trained from
scratch with the preset `{preset}` of the project that this folder belongs to.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("release"), AutoModelForCausalLM.from_pretrained("release")
print(tokenizer.decode(model.generate(**tokenizer("{prompt}", return_tensors="pt"), max_new_tokens=200)[0]))
```

Without transformers: `python -m blm_core generate --prompt "{prompt}"`.

## Data

{stories} stories, {megabytes} MB, of the TinyStories data set (Eldan and Li 2023; its card names the licence
CDLA-Sharing-1.0), cleaned and split as `notebooks/01_data.ipynb` shows. Validation stories were never trained on.

## Recipe

{layers} layers of width {width}, {heads} query heads on {kv_heads} key/value heads, context {context}, {pieces} pieces.
{tokens} tokens in {steps} steps ({epochs} epochs), {optimizer}, learning rate {learning_rate:g}, weight decay {decay:g},
dropout {dropout:g}; {minutes} minutes on {device}, PyTorch {torch}, {dtype}. All settings: `runs/{preset}/config.json`.

## Scores

{bits} bits per byte on {scored} stories ({split}), each scored alone, 95 % bootstrap interval over stories [{low}, {high}];
their text was normalised as for training. {evaluated}`notebooks/05_compare_gpt2xl.ipynb` holds the comparison with GPT2-XL.

## Limits

It knows the world of its stories and nothing else: no facts, no instructions, no other language, nothing longer than its
context of {context} tokens. It loses track of who holds what, and its endings can come from nowhere. Nobody has checked
what it may say that a child should not read.

## Ten samples, not picked

The first ten after "{prompt}", temperature {temperature:g}, top-p {top_p:g}, seed {seed}.

{samples}
"""


def write_card(preset: Preset, release: Path) -> None:
    """Write `README.md` into the folder of the released model of `preset`, whose notebooks have been executed."""
    with written_aside(release / "README.md") as aside:
        aside.write_text(model_card(preset, *load_model(release)), encoding="utf-8")


def model_card(preset: Preset, model: LanguageModel, tokenizer: Tokenizer) -> str:
    """The card in Markdown, from what the notebooks of `preset` have recorded."""
    results, sampling = read_json(preset.folder / "results.json"), Sampling()
    evaluated = evaluations(ROOT / "runs" / preset.name / "evaluate.jsonl")
    data, shape, run, compared = (results[name] for name in ("data", "model", "train", "compare"))
    texts = complete(model, tokenizer, [PROMPT] * SAMPLES, sampling)
    samples = [" ".join(f"{PROMPT}{text}".split()) for text in texts]
    return CARD.format(
        parameters=shape["parameters"],
        preset=preset.name,
        prompt=PROMPT,
        stories=data["train_stories"],
        megabytes=data["train_megabytes"],
        **{name: shape[name] for name in ("layers", "width", "heads", "kv_heads", "context")},
        pieces=results["tokenizer"]["pieces"],
        **{name: run[name] for name in ("tokens", "steps", "epochs", "minutes", "device", "torch", "dtype")},
        optimizer="Muon and AdamW" if preset.train.optimizer == "muon" else "AdamW",
        learning_rate=preset.train.learning_rate,
        decay=preset.train.weight_decay,
        dropout=preset.model.dropout,
        bits=compared["bits_per_byte"],
        scored=compared["stories"],
        split=compared["split"],
        evaluated=f"As it stands in the files, by `evaluate`: {'; '.join(evaluated)}. " if evaluated else "",
        low=compared["low"],
        high=compared["high"],
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
        samples="\n".join(f"{number}. {text}" for number, text in enumerate(samples, 1)),
    )


def evaluations(path: Path) -> list[str]:
    """What `python -m blm_core evaluate --json` printed into `path`, a line for each text; none where there is no such file."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [f"{x['text']} {x['bits_per_byte']:.3f} [{x['low']:.3f}, {x['high']:.3f}], {x['stories']:,} stories" for x in lines]
