"""The command line as a reader meets it: what is printed where, and one clear line for every mistake."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import save_blm

from blm_core import __main__ as cli
from blm_core import config
from blm_core.checkpoint import load_state
from blm_core.evidence import __main__ as evidence
from blm_core.evidence.publish import record
from blm_core.files import read_json

TINY = [
    *("--preset", "smoke", "model.n_layers=2", "model.d_model=16", "model.n_heads=2", "model.n_kv_heads=1", "model.d_ff=32"),
    *("model.seq_len=32", "train.batch_size=4", "train.micro_batch_size=4", "train.warmup_steps=1", "train.dtype=float32"),
    *("train.log_every=1", "train.eval_every=1000", "train.eval_stories=2"),
]


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory) -> Path:
    return save_blm(tmp_path_factory.mktemp("model"), tokenizer, seq_len=64)


@pytest.fixture
def own_build(smoke, tmp_path, monkeypatch) -> Path:
    """A folder of this test's own with the stories, vocabulary and tokens of `smoke`."""
    target = tmp_path / "build" / "smoke"
    shutil.copytree(smoke.folder, target, ignore=shutil.ignore_patterns("run", "notebooks", "results.json"))
    monkeypatch.setenv("BLM_BUILD", str(tmp_path / "build"))
    return target


@pytest.fixture
def blm(capsys):
    """Run a command: exit status, standard output, standard error."""

    def command(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        of_evidence = arguments[0] in ("variables", "publish", "judge", "cost")
        code = (evidence if of_evidence else cli).main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return command


def refused(result: tuple[int, str, str], *named: str) -> None:
    code, out, error = result
    assert (code, out, len(error.strip().splitlines())) == (1, "", 1)
    assert error.startswith("python -m blm_core")
    assert not [name for name in named if name not in error]


def test_stories_begin_with_the_prompt_are_numbered_and_the_same_seed_repeats_them(blm, model):
    one = ["generate", "--model", model, "--prompt", "One day", "--max-tokens", 20]
    texts = [blm(*one, "--seed", seed) for seed in (1, 1, 2)]
    assert all(code == 0 and out.startswith("One day") and out.endswith("\n") for code, out, _ in texts)
    assert texts[0] == texts[1] != texts[2]
    assert blm(*one, "--temperature", 0) == blm(*one, "--top-k", 1, "--seed", 9)  # greedy
    start, *stories = re.split(r"--- [123] ---\n", blm(*one, "--n", 3)[1])
    assert (start, len(set(stories)), {story[:7] for story in stories}) == ("", 3, {"One day"})


def test_an_evaluation_says_the_same_to_programs_and_to_people_and_can_repair_the_text(blm, model, tmp_path):
    text = tmp_path / "two.txt"
    text.write_text("A fox saw a hen.\n<|endoftext|>\n\u201cA fox,\u201d said the hen.\n<|endoftext|>\n")
    command = ["evaluate", "--text", text, "--model", model]
    found = json.loads(blm(*command, "--json")[1])
    assert (found["stories"], found["bytes"]) == (2, len("A fox saw a hen.\u201cA fox,\u201d said the hen.".encode()))
    code, out, _ = blm(*command)
    assert code == 0
    assert f"{found['bits_per_byte']:.4f} bits per byte [{found['low']:.4f}, {found['high']:.4f}]" in out
    assert json.loads(blm(*command, "--json", "--normalise")[1])["bytes"] == len('A fox saw a hen."A fox," said the hen.')
    text.write_text("<|endoftext|>\n")
    refused(blm(*command), "no story")
    text.unlink()
    refused(blm(*command), str(text))


def test_a_wrong_argument_or_what_a_command_still_needs_is_named(blm, own_build, model, tmp_path, monkeypatch):
    for command in ("config", "train", "summary", "variables", "publish"):
        refused(blm(command, "--preset", "smoke", "train.colour=red"), "train.colour=red", "train.steps")
    refused(blm("config", "--preset", "huge"), "'huge'", "smoke, study, cpu, distilled, a100")
    refused(blm("generate", "--n", 0), "--n 0")
    refused(blm("generate", "--device", "gpu"), "'gpu' cannot be used")
    refused(blm("generate", "--top-p", 0), "top_p = 0.0")
    refused(blm("generate", "--model", tmp_path / "none"), str(tmp_path / "none"), "model.safetensors", "Train one")
    refused(blm("summary", "--preset", "smoke"), str(own_build), "run the notebooks first")
    refused(blm("variables", "--preset", "smoke", "--folder", tmp_path), "holds no results")
    refused(blm("publish", "--preset", "smoke"), "01_data.ipynb is missing")
    refused(blm("judge", tmp_path, "--make"), "--valid")
    refused(blm("judge", tmp_path, "--import", "--rater", "somebody"), "--date")
    monkeypatch.setenv("BLM_GPT2XL", str(tmp_path))  # holds no model, and random weights were not asked for
    refused(blm("cost", "--model", model, "--out", tmp_path / "cost.json"), str(tmp_path), "BLM_GPT2XL")


def test_settings_can_be_printed_followed_and_their_results_found_again(blm, own_build, tmp_path):
    settings = [*TINY, "train.steps=3"]
    found = json.loads(blm("config", *settings)[1])
    assert (found["name"], found["train"]["steps"], found["model"]["d_model"]) == ("smoke", 3, 16)
    code, out, _ = blm("train", *settings)
    assert (code, json.loads(out)) == (0, read_json(own_build / "run" / "summary.json"))
    refused(blm("train", *settings, "train.seed=5"), "train.seed: 1 there, 5 here")
    record(config.load("smoke"), "samples", story="One day a fox slept.")
    out = blm("summary", *settings)[1]
    assert "samples.story        One day a fox slept." in out.splitlines()
    assert str(own_build / "run" / "model") in out
    assert blm("variables", *settings, "--folder", tmp_path)[0] == 0
    assert '  story: "One day a fox slept."' in (tmp_path / "_variables.yml").read_text().splitlines()


def test_sigterm_from_outside_saves_the_run_and_says_where(own_build):
    log, checkpoint = own_build / "run" / "metrics.jsonl", own_build / "run" / "checkpoint.pt"
    command = [sys.executable, "-m", "blm_core", "train", *TINY, "train.steps=1000000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=config.ROOT) as process:
        for _ in process.stderr:  # the progress bar moves on with every step
            if log.exists() and log.read_text():
                process.send_signal(signal.SIGTERM)
                break
        error = process.stderr.read()
    assert process.returncode == 1
    assert f"stopped by SIGTERM after step {load_state(checkpoint)['step']}; {checkpoint} continues from there." in error
    assert "Traceback" not in error
