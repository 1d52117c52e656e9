"""The command line as a reader meets it: what is printed where, and one clear line for every mistake."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import save_blm

from blm_core import __main__ as cli
from blm_core import config, train
from blm_core.checkpoint import load_state
from blm_core.evidence import __main__ as evidence
from blm_core.evidence.publish import record
from blm_core.files import read_json

TINY = [
    *("model.n_layers=2", "model.d_model=16", "model.n_heads=2", "model.n_kv_heads=1", "model.d_ff=32", "model.seq_len=32"),
    *("train.batch_size=4", "train.micro_batch_size=4", "train.warmup_steps=1", "train.dtype=float32"),
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
        of_evidence = arguments[0] in ("study", "variables", "publish", "judge")
        code = (evidence if of_evidence else cli).main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return command


def refused(result: tuple[int, str, str], *named: str) -> None:
    code, out, error = result
    assert (code, out, len(error.strip().splitlines())) == (1, "", 1)
    assert error.startswith("python -m blm_core")
    assert not [name for name in named if name not in error]


def test_one_story_begins_with_the_prompt_and_the_same_seed_repeats_it(blm, model):
    texts = [blm("generate", "--model", model, "--prompt", "One day", "--seed", seed) for seed in (1, 1, 2)]
    assert all(code == 0 and out.startswith("One day") and out.endswith("\n") for code, out, _ in texts)
    assert texts[0] == texts[1] != texts[2]
    greedy = blm("generate", "--model", model, "--prompt", "One day", "--temperature", 0)
    assert greedy == blm("generate", "--model", model, "--prompt", "One day", "--top-k", 1, "--seed", 9)


def test_a_story_is_printed_as_it_is_written(model, monkeypatch):
    pieces = []
    monkeypatch.setattr("builtins.print", lambda text="", end="\n", flush=False: pieces.append((text, end, flush)))
    assert cli.main(["generate", "--model", str(model), "--prompt", "One day", "--max-tokens", "20"]) == 0
    assert pieces[0] == ("One day", "", True)
    assert len(pieces) > 5
    assert all(end == "" and flush for _, end, flush in pieces[:-1])


def test_several_stories_are_numbered_and_differ_and_can_be_repeated(blm, model):
    arguments = ["generate", "--model", model, "--prompt", "One day", "--n", 3, "--seed", 4, "--max-tokens", 20]
    code, out, _ = blm(*arguments)
    start, *stories = re.split(r"--- [123] ---\n", out)
    assert (code, start, len(set(stories))) == (0, "", 3)
    assert all(story.startswith("One day") for story in stories)
    assert blm(*arguments)[1] == out


def test_the_beginning_is_read_from_a_pipe_or_a_file_unless_it_is_given(blm, model, tmp_path, monkeypatch):
    told = blm("generate", "--model", model, "--prompt", "One day\nLily", "--max-tokens", 9)
    (tmp_path / "beginning.txt").write_text("One day\nLily\n")
    reading, writing = os.pipe()
    os.write(writing, b"One day\nLily\n")
    os.close(writing)
    for source in (reading, tmp_path / "beginning.txt"):
        with open(source) as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            assert blm("generate", "--model", model, "--max-tokens", 9) == told
    with open(os.devnull) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert blm("generate", "--model", model, "--max-tokens", 9)[1].startswith(cli.BEGINNING)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--temperature", "-1"), "temperature = -1.0"),
        (("--temperature", "nan"), "temperature = nan"),
        (("--top-p", "0"), "top_p = 0.0"),
        (("--top-k", "-3"), "top_k = -3"),
        (("--n", "0"), "--n 0"),
        (("--prompt", "word " * 100), "context of 64"),
    ],
)
def test_settings_of_sampling_that_make_no_sense_are_refused_in_one_line(blm, model, arguments, named):
    code, _, error = blm("generate", "--model", model, "--prompt", "One day", *arguments)
    assert (code, len(error.strip().splitlines())) == (1, 1)
    assert named in error


@pytest.mark.parametrize("command", [("generate",), ("evaluate", "--text", "story.txt")])
def test_a_folder_without_a_model_is_named_with_what_is_missing(blm, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    Path("story.txt").write_text("One day a fox slept.")
    refused(blm(*command, "--model", tmp_path / "none"), str(tmp_path / "none"), "model.safetensors", "Train one")


def test_an_evaluation_says_the_same_to_programs_and_to_people_and_can_repair_the_text(blm, model, tmp_path):
    (tmp_path / "two.txt").write_text("A fox saw a hen.\n<|endoftext|>\n\u201cA fox,\u201d said the hen.\n<|endoftext|>\n")
    command = ["evaluate", "--text", tmp_path / "two.txt", "--model", model]
    found = json.loads(blm(*command, "--json")[1])
    assert found.keys() >= {"stories", "bytes", "tokens", "bits_per_byte", "low", "high", "model", "normalised"}
    assert (found["stories"], found["model"], found["normalised"]) == (2, str(model), False)
    assert found["bytes"] == len("A fox saw a hen.\u201cA fox,\u201d said the hen.".encode())
    assert found["low"] <= found["bits_per_byte"] <= found["high"]
    code, out, _ = blm(*command)
    assert code == 0
    assert f"2 stories, {found['bytes']} bytes" in out
    assert f"{found['bits_per_byte']:.4f} bits per byte [{found['low']:.4f}, {found['high']:.4f}]" in out
    repaired = json.loads(blm(*command, "--json", "--normalise")[1])
    assert (repaired["bytes"], repaired["normalised"]) == (len('A fox saw a hen."A fox," said the hen.'), True)


@pytest.mark.parametrize("content", [None, "", "<|endoftext|>\n"], ids=["no file", "empty", "no story"])
def test_a_text_without_stories_is_refused_in_one_line(blm, model, tmp_path, content):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_text(content)
    refused(blm("evaluate", "--text", path, "--model", model), str(path) if content is None else "no story")


def test_a_preset_is_printed_with_its_overrides(blm):
    code, out, _ = blm("config", "--preset", "smoke", "train.steps=7", "train.warmup_steps=2", "model.vocab_size=400")
    assert code == 0
    found = json.loads(out)
    assert (found["name"], found["train"]["steps"], found["train"]["warmup_steps"]) == ("smoke", 7, 2)
    assert found["tokenizer"]["vocab_size"] == found["model"]["vocab_size"] == 400
    assert found["model"]["d_model"] == config.load("smoke").model.d_model


@pytest.mark.parametrize("command", ["config", "train", "summary", "variables", "publish"])
def test_an_unknown_key_or_preset_is_refused_by_name_by_every_command_that_takes_settings(blm, command):
    refused(blm(command, "--preset", "smoke", "train.colour=red"), "train.colour=red", "train.steps")
    refused(blm(command, "--preset", "huge"), "'huge'", "smoke, study, cpu, distilled, a100")


def test_what_a_command_still_needs_is_named(blm, own_build, tmp_path):
    refused(blm("study", "colour"), "'colour'", "optimizer")
    refused(blm("summary", "--preset", "smoke"), str(own_build), "run the notebooks first")
    refused(blm("variables", "--preset", "smoke", "--folder", tmp_path), "holds no results")
    refused(blm("publish", "--preset", "smoke"), "01_data.ipynb is missing")
    refused(blm("judge", tmp_path, "--make"), "--valid")
    refused(blm("judge", tmp_path, "--make", "--valid", tmp_path), "BLM_RECORDED")
    refused(blm("judge", tmp_path, "--import", "--rater", "somebody"), "--date")


def test_training_prints_its_summary_is_found_when_asked_again_and_can_be_read_by_people(blm, own_build, tmp_path):
    settings = ["--preset", "smoke", *TINY, "train.steps=3"]
    code, out, _ = blm("train", *settings)
    data, run = read_json(own_build / "data" / "manifest.json"), read_json(own_build / "run" / "summary.json")
    assert (code, json.loads(out)) == (0, run)
    assert blm("train", *settings)[:2] == (0, out)
    refused(blm("train", *settings, "train.seed=5"), "train.seed: 1 there, 5 here")

    record(config.load("smoke"), "samples", story="One day a fox slept.")
    code, out, _ = blm("summary", *settings)
    lines = {line[:12].strip(): line[13:] for line in out.splitlines()}
    assert (code, lines["preset"], lines["a story"]) == (0, "smoke", "One day a fox slept.")
    assert f"{data['read']:,} read" in lines["stories"]
    assert f"{run['tokens']:,} trained on" in lines["tokens"]
    assert f"{run['validation_bits_per_byte']:.3f} bits per byte" in lines["validation"]
    assert lines["run"].startswith(str(own_build / "run"))
    assert blm("variables", *settings, "--folder", tmp_path)[0] == 0
    assert '  story: "One day a fox slept."' in (tmp_path / "_variables.yml").read_text().splitlines()


def test_a_run_that_diverges_ends_in_one_clear_line(blm, own_build):
    absurd = ["train.steps=9", "train.learning_rate=0.9", "train.weight_decay=1e25", "train.warmup_steps=0"]
    code, _, error = blm("train", "--preset", "smoke", *TINY, *absurd)
    assert code == 1
    assert "Lower train.learning_rate" in error.splitlines()[-1]
    assert "Traceback" not in error


def test_sigterm_from_outside_saves_the_run_and_says_where(own_build):
    log, checkpoint = own_build / "run" / "metrics.jsonl", own_build / "run" / "checkpoint.pt"
    command = [sys.executable, "-m", "blm_core", "train", "--preset", "smoke", *TINY, "train.steps=1000000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=config.ROOT, env=dict(os.environ)) as process:
        for _ in process.stderr:  # the progress bar moves on with every step
            if log.exists() and log.read_text():
                process.send_signal(signal.SIGTERM)
                break
        error = process.stderr.read()
    assert process.returncode == 1
    step = load_state(checkpoint)["step"]
    assert f"stopped by SIGTERM after step {step}; {checkpoint} continues from there." in error
    assert "Traceback" not in error
    assert train.metrics(own_build / "run")[0][-1]["step"] == step
