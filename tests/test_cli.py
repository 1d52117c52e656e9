"""The command line as a reader meets it: what is printed where, and one clear line for every mistake."""

import json
import os
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
from blm_core.files import read_json, write_json

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
        of_evidence = arguments[0] in ("study", "variables", "publish")
        code = (evidence if of_evidence else cli).main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return command


def refused(result: tuple[int, str, str], *named: str) -> None:
    code, out, error = result
    assert code == 1
    assert out == ""
    assert error.startswith("python -m blm_core")
    assert len(error.strip().splitlines()) == 1
    for name in named:
        assert name in error


def test_one_story_begins_with_the_prompt_and_the_same_seed_repeats_it(blm, model):
    texts = [blm("generate", "--model", model, "--prompt", "One day", "--seed", seed) for seed in (1, 1, 2)]
    assert all(code == 0 and out.startswith("One day") and out.endswith("\n") for code, out, _ in texts)
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


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
    assert code == 0
    assert [line for line in out.splitlines() if line.startswith("---")] == ["--- 1 ---", "--- 2 ---", "--- 3 ---"]
    stories = [part.split("---\n", 1)[1] for part in out.split("--- ")[1:]]
    assert all(story.startswith("One day") for story in stories)
    assert len(set(stories)) == 3
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


def test_temperature_zero_and_one_token_are_the_same_choice(blm, model):
    greedy = blm("generate", "--model", model, "--prompt", "One day", "--temperature", 0)
    assert greedy == blm("generate", "--model", model, "--prompt", "One day", "--top-k", 1, "--seed", 9)


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
    assert code == 1
    assert len(error.strip().splitlines()) == 1
    assert named in error


@pytest.mark.parametrize("command", [("generate",), ("evaluate", "--text", "story.txt")])
def test_a_folder_without_a_model_is_named_with_what_is_missing(blm, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    Path("story.txt").write_text("One day a fox slept.")
    refused(blm(*command, "--model", tmp_path / "none"), str(tmp_path / "none"), "model.safetensors", "Train one")


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "stories.txt"
    path.write_text("A fox saw a hen.\n<|endoftext|>\nThe hen saw the fox, and ran.\n<|endoftext|>\n", encoding="utf-8")
    return path


def test_an_evaluation_is_one_line_of_json_with_every_field(blm, model, text):
    code, out, _ = blm("evaluate", "--text", text, "--model", model, "--json")
    assert code == 0
    found = json.loads(out)
    fields = {"stories", "bytes", "tokens", "bits_per_byte", "low", "high", "model", "normalised"}
    assert found.keys() >= fields
    assert found["stories"] == 2
    assert found["bytes"] == len("A fox saw a hen.") + len("The hen saw the fox, and ran.")
    assert found["low"] <= found["bits_per_byte"] <= found["high"]
    assert found["model"] == str(model)
    assert found["normalised"] is False


def test_an_evaluation_can_be_read_by_people_and_says_the_same(blm, model, text):
    found = json.loads(blm("evaluate", "--text", text, "--model", model, "--json")[1])
    code, out, _ = blm("evaluate", "--text", text, "--model", model)
    assert code == 0
    assert f"2 stories, {found['bytes']} bytes" in out
    assert f"{found['bits_per_byte']:.4f} bits per byte [{found['low']:.4f}, {found['high']:.4f}]" in out


def test_a_text_can_be_repaired_before_it_is_scored(blm, model, tmp_path):
    path = tmp_path / "curly.txt"
    path.write_text("\u201cA fox,\u201d said the hen.", encoding="utf-8")
    found = json.loads(blm("evaluate", "--text", path, "--model", model, "--json", "--normalise")[1])
    assert found["bytes"] == len('"A fox," said the hen.')
    assert found["normalised"] is True


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
def test_an_unknown_key_is_refused_by_name_by_every_command_that_takes_settings(blm, command):
    refused(blm(command, "--preset", "smoke", "train.colour=red"), "train.colour=red", "train.steps")


def test_an_unknown_preset_and_an_unknown_study_are_refused_with_the_known_ones(blm):
    refused(blm("config", "--preset", "huge"), "'huge'", "smoke, study, cpu, a100")
    refused(blm("study", "colour"), "'colour'", "optimizer")


def test_training_prints_its_summary_and_is_found_when_asked_again(blm, own_build):
    arguments = ["train", "--preset", "smoke", *TINY, "train.steps=3"]
    code, out, _ = blm(*arguments)
    assert code == 0
    assert json.loads(out) == read_json(own_build / "run" / "summary.json")
    assert blm(*arguments)[:2] == (0, out)
    refused(blm(*arguments, "train.seed=5"), "train.seed: 1 there, 5 here")


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


def test_a_summary_names_data_training_and_places(blm, own_build):
    refused(blm("summary", "--preset", "smoke"), str(own_build), "run the notebooks first")
    assert blm("train", "--preset", "smoke", *TINY, "train.steps=3")[0] == 0
    settings = ["--preset", "smoke", *TINY]
    code, out, _ = blm("summary", *settings)
    assert code == 0
    lines = {line[:12].strip(): line[13:] for line in out.splitlines()}
    data, run = read_json(own_build / "data" / "manifest.json"), read_json(own_build / "run" / "summary.json")
    assert lines["preset"] == "smoke"
    assert f"{data['read']:,} read" in lines["stories"]
    assert f"{run['tokens']:,} trained on" in lines["tokens"]
    assert f"{run['validation_bits_per_byte']:.3f} bits per byte" in lines["validation"]
    assert lines["run"].startswith(str(own_build / "run"))
    record(config.load("smoke"), "samples", story="One day a fox slept.")
    assert "a story      One day a fox slept." in blm("summary", *settings)[1].splitlines()


def test_variables_are_written_where_asked_and_refused_without_results(blm, own_build, tmp_path):
    refused(blm("variables", "--preset", "smoke", "--folder", tmp_path), "holds no results")
    record(config.load("smoke"), "model", parameters="1,000")
    assert blm("variables", "--preset", "smoke", "--folder", tmp_path)[0] == 0
    assert '  parameters: "1,000"' in (tmp_path / "_variables.yml").read_text().splitlines()


def test_a_notebook_that_was_not_executed_is_not_published(blm, own_build):
    refused(blm("publish", "--preset", "smoke"), "01_data.ipynb is missing")
    for path in sorted((config.ROOT / "notebooks").glob("*.ipynb")):
        notebook = read_json(path)
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                cell["execution_count"], cell["outputs"] = None, []
        write_json(own_build / "notebooks" / path.name, notebook)
    refused(blm("publish", "--preset", "smoke"), "01_data.ipynb was not executed from top to bottom")
