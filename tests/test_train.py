"""Training: the same loss curve however it is cut, killed or shared, and errors that say where a run stands."""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from blm_core import config, pipeline, train
from blm_core.checkpoint import CheckpointError, load_model, load_state, save_model, save_state
from blm_core.config import ConfigError, Preset
from blm_core.files import read_json, write_json
from blm_core.model import LanguageModel
from blm_core.optimizer import learning_rate
from blm_core.train import DivergedError, RunError

TINY = [
    *("model.n_layers=2", "model.d_model=16", "model.n_heads=2", "model.n_kv_heads=1", "model.d_ff=32", "model.seq_len=32"),
    *("train.steps=12", "train.batch_size=8", "train.micro_batch_size=8", "train.warmup_steps=3", "train.dtype=float32"),
    *("train.log_every=2", "train.eval_every=6", "train.eval_stories=2"),
]
EVERYTHING = ["model.dropout=0.2", "train.micro_batch_size=4"]
ABLATION = ["model.norm=layer", "model.position=learned", "model.feed_forward=gelu"]
MEASURED = ("tokens_per_second", "memory_gb", "power_w", "mfu")  # differ from run to run


def tiny(smoke: Preset, *settings: str) -> Preset:
    return config.override(smoke, [*TINY, *settings])


@pytest.fixture(scope="module")
def run(smoke, tokenizer):
    """Train the tiny model with some settings in a folder."""

    def carry_out(folder: Path, *settings: str, keep_model: bool = True) -> dict:
        return train.train(tiny(smoke, *settings), smoke.folder / "tokens", tokenizer, folder, keep_model)

    return carry_out


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """The folder of a run with some settings that nothing interrupted, made once."""

    @functools.cache
    def made(*settings: str) -> Path:
        folder = tmp_path_factory.mktemp("whole")
        run(folder, *settings)
        return folder

    return made


def curve(folder: Path) -> list[dict]:
    """All that the run logged and that is not a measurement of the machine."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in train.metrics(folder)[0]]


@contextlib.contextmanager
def signal_in_step(number: int, which: int = signal.SIGTERM):
    """Send a signal to this process at the beginning of its step `number`."""
    real, calls = train._step, []

    def step(*args):
        calls.append(None)
        if len(calls) == number:
            signal.raise_signal(which)
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_step", step)
        yield


def interrupted(run, folder: Path, *settings: str, step: int, **options) -> None:
    with signal_in_step(step), pytest.raises(SystemExit):
        run(folder, *settings, **options)


def test_a_run_writes_metrics_a_model_and_a_summary(run, smoke, tmp_path):
    summary = run(tmp_path)
    training, evaluated = train.metrics(tmp_path)
    assert [line["step"] for line in training] == [2, 4, 6, 8, 10, 12]
    assert [line["step"] for line in evaluated] == [6, 12]
    for line in training:
        assert line.keys() == {"step", "tokens", "loss", "learning_rate", "gradient_norm", *MEASURED}
        assert line["tokens"] == line["step"] * 8 * 32
        assert line["learning_rate"] == learning_rate(line["step"] - 1, tiny(smoke).train)
        assert line["gradient_norm"] > 0
        assert line["tokens_per_second"] > 0
        assert line["memory_gb"] > 0
        if not torch.cuda.is_available():
            assert line["mfu"] is None  # nobody states a processor's peak
            assert line["power_w"] is None
    for line in evaluated:
        assert line.keys() == {"step", "tokens", "validation_bits_per_byte", "low", "high"}
        assert 0 < line["low"] <= line["validation_bits_per_byte"] <= line["high"]
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]
    assert summary == read_json(tmp_path / "summary.json")
    assert (summary["steps"], summary["tokens"], summary["processes"]) == (12, 12 * 8 * 32, 1)
    assert summary["loss"] == losses(tmp_path)[-1]
    assert summary["validation_bits_per_byte"] == evaluated[-1]["validation_bits_per_byte"]
    assert (summary["torch"], summary["dtype"], summary["validation_split"]) == (torch.__version__, "float32", "validation")
    model, _ = load_model(tmp_path / "model")
    assert model.config == tiny(smoke).model


@pytest.mark.parametrize("size", [4, 1])
def test_the_loss_curve_is_the_same_whatever_the_micro_batch(whole, size):
    assert losses(whole(f"train.micro_batch_size={size}")) == pytest.approx(losses(whole()), rel=1e-5)


def test_the_gradient_is_that_of_the_mean_loss_over_all_tokens_of_a_step(run, smoke, tmp_path):
    settings = ["train.micro_batch_size=2", "train.steps=1", "train.log_every=1", "train.warmup_steps=0"]
    preset = tiny(smoke, *settings)
    run(tmp_path, *settings, keep_model=False)
    stories = train.TokenStories(smoke.folder / "tokens", "train")
    batch = train.Batches(stories, 32, 8, preset.train.seed).batch(0)
    model = LanguageModel(preset.model, preset.train.seed)
    loss = model(batch[:, 0], batch[:, 1])
    loss.backward()
    norm = torch.stack([weight.grad.norm() for weight in model.parameters()]).norm()
    line = train.metrics(tmp_path)[0][0]
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert line["gradient_norm"] == pytest.approx(float(norm), rel=1e-4)


@pytest.mark.parametrize(
    "setting", ["train.dtype=bfloat16", "train.isolate_stories=true", "train.schedule=wsd", "train.optimizer=adamw"]
)
def test_other_ways_to_train_learn_too(whole, setting):
    found = losses(whole(setting))
    assert found[-1] < found[0]
    weights = load_state(whole(setting) / "checkpoint.pt")["model"].values()
    assert {weight.dtype for weight in weights} == {torch.float32}


def test_an_ablation_is_trained_without_its_model_and_refused_before_the_first_step_with_it(run, smoke, tokenizer, tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.norm='layer'"):
        run(tmp_path / "kept", *ABLATION)
    assert not (tmp_path / "kept").exists()
    summary = run(tmp_path / "run", *ABLATION, keep_model=False)
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json", "metrics.jsonl", "summary.json"]
    assert run(tmp_path / "run", *ABLATION, keep_model=False) == summary
    with pytest.raises(CheckpointError, match="Llama family"):
        save_model(tmp_path / "model", LanguageModel(tiny(smoke, *ABLATION).model), tokenizer)


def test_a_finished_run_is_loaded_and_not_repeated(run, whole):
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in whole().rglob("*") if path.is_file()}
    assert run(whole()) == read_json(whole() / "summary.json")
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in whole().rglob("*") if path.is_file()} == before


def test_another_configuration_or_other_stories_in_the_same_folder_are_refused_by_what_differs(run, smoke, tokenizer, tmp_path):
    folder = tmp_path / "run"
    interrupted(run, folder, step=1)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(RunError, match=r"model\.d_ff: 32 there, 48 here; train\.optimizer: 'muon' there, 'adamw' here"):
        run(folder, "train.optimizer=adamw", "model.d_ff=48")
    shutil.copytree(smoke.folder / "tokens", tmp_path / "tokens")
    manifest = read_json(tmp_path / "tokens" / "manifest.json")
    manifest["tokens"]["train"] += 1
    write_json(tmp_path / "tokens" / "manifest.json", manifest)
    with pytest.raises(RunError, match=r"data\.tokens"):
        train.train(tiny(smoke), tmp_path / "tokens", tokenizer, folder)
    with pytest.raises(RunError, match="02_tokenizer"):
        train.train(tiny(smoke), tmp_path / "none", tokenizer, folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_what_does_not_change_the_result_may_change_when_a_run_goes_on(run, whole, tmp_path):
    interrupted(run, tmp_path, step=5)
    run(tmp_path, "train.micro_batch_size=2", "train.checkpoint_minutes=0", "train.device=cpu")
    assert losses(tmp_path) == pytest.approx(losses(whole()), rel=1e-5)


@pytest.mark.parametrize("step", [1, 5, 6], ids=["first step", "between two log lines", "step of a log line"])
def test_sigterm_saves_and_says_where_and_the_run_goes_on_bit_for_bit(run, whole, step, tmp_path):
    handler, checkpoint = signal.getsignal(signal.SIGTERM), tmp_path / "checkpoint.pt"
    with signal_in_step(step), pytest.raises(SystemExit) as stopped:
        run(tmp_path, *EVERYTHING)
    assert str(stopped.value) == f"stopped by SIGTERM after step {step}; {checkpoint} continues from there."
    assert signal.getsignal(signal.SIGTERM) == handler
    assert load_state(checkpoint)["step"] == step
    summary = run(tmp_path, *EVERYTHING)
    assert curve(tmp_path) == curve(whole(*EVERYTHING))
    assert weights(tmp_path) == weights(whole(*EVERYTHING))
    assert [stretch["from_step"] for stretch in summary["stretches"]] == [0, step]
    for stretch in summary["stretches"]:  # what each part of the run was computed with
        found = (stretch["device"], stretch["torch"], stretch["dtype"])
        assert found == (summary["device"], torch.__version__, "float32")


def test_ctrl_c_saves_like_sigterm_and_the_run_goes_on_bit_for_bit(run, whole, tmp_path):
    with signal_in_step(5, signal.SIGINT), pytest.raises(KeyboardInterrupt, match="stopped by Ctrl-C after step 5"):
        run(tmp_path)
    run(tmp_path)
    assert curve(tmp_path) == curve(whole())


def test_a_checkpoint_of_a_gpu_goes_on_without_its_fused_kernel(run, whole, tmp_path):
    interrupted(run, tmp_path, "train.device=cpu", step=5)
    path = tmp_path / "checkpoint.pt"
    state = load_state(path)
    for group in state["optimizers"][-1]["param_groups"]:
        group["fused"] = True  # as AdamW writes it on CUDA
    save_state(path, state)
    run(tmp_path, "train.device=cpu")
    assert curve(tmp_path) == curve(whole("train.device=cpu"))
    assert not any(group["fused"] for group in load_state(path)["optimizers"][-1]["param_groups"])


def test_speed_is_that_of_training_also_after_an_evaluation_between_two_log_lines(run, tmp_path, monkeypatch):
    step, score, seconds = train._step, train.score, []

    def slow_step(*args):
        began = time.perf_counter()
        time.sleep(0.05)
        result = step(*args)
        seconds.append(time.perf_counter() - began)
        return result

    def slow_score(*args):
        time.sleep(0.5)
        return score(*args)

    monkeypatch.setattr(train, "_step", slow_step)
    monkeypatch.setattr(train, "score", slow_score)
    run(tmp_path, "train.log_every=4", "train.eval_every=3")
    for number, line in enumerate(train.metrics(tmp_path)[0]):
        fastest = 4 * 8 * 32 / sum(seconds[4 * number : 4 * number + 4])
        assert 0.7 * fastest < line["tokens_per_second"] <= fastest


def test_sigterm_in_the_last_step_lets_the_run_finish(run, tmp_path):
    with signal_in_step(12):
        assert run(tmp_path)["steps"] == 12


PREPARED = """
import itertools, json, os, signal, sys, threading, warnings
from pathlib import Path
import torch
from blm_core import config, train
from blm_core.tokenizer import Tokenizer

folder, tokens, vocabulary, settings = sys.argv[1:]
torch.set_num_threads(1)
preset, tokenizer = config.override(config.load("smoke"), json.loads(settings)), Tokenizer(Path(vocabulary))

def run(folder):
    train.train(preset, Path(tokens), tokenizer, Path(folder))
"""


@pytest.fixture
def process(smoke, tokenizer, tmp_path):
    """Carry out code in a process of its own, or in two as torchrun starts them: `run(folder)` trains there."""

    def carry_out(code: str, folder: Path, *settings: str, two: bool = False, **environment: str):
        script, command = tmp_path / "script.py", [sys.executable]
        script.write_text(PREPARED + code)
        if two:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            command += ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={port}"]
        command += [script, folder, smoke.folder / "tokens", tokenizer.path, json.dumps([*TINY, *settings])]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(config.ROOT), **environment}
        return subprocess.run(command, capture_output=True, text=True, timeout=1200, env=environment)

    return carry_out


KILLED = """
weight = torch.nn.Parameter(torch.zeros(2))
weight.grad = torch.zeros(2)
torch.optim.AdamW([weight], fused=False).step()  # what PyTorch imports at the first step is imported once, before the forks
results = open(os.dup(1), "w", buffering=1)

def outcome(name, file_event=0):
    # of a run that dies at its `file_event`-th opening, renaming or removing of one of its files
    target = Path(folder) / name
    pid = os.fork()
    if pid == 0:
        count = itertools.count(1)
        def watch(event, args):
            if event in ("open", "os.rename", "os.remove") and str(target) in str(args) and next(count) == file_event:
                os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(watch)
        run(target)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

print(outcome("whole"), file=results)
for file_event in itertools.count(1):
    code = outcome("killed", file_event)
    print(code, file=results)
    if code == 0:
        break
"""


def test_a_run_killed_at_any_moment_repeats_the_loss_curve_bit_for_bit(process, tmp_path):
    done = process(KILLED, tmp_path, *EVERYTHING, "train.checkpoint_minutes=0")
    assert done.returncode == 0, done.stderr
    whole, *killed, last = map(int, done.stdout.split())
    assert (whole, last) == (0, 0)
    assert set(killed) == {-signal.SIGKILL}  # at every change to a file of the run, one after the other
    assert len(killed) > 10
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    assert not list((tmp_path / "killed").glob(".*.tmp"))


STOPPED_IN_STEP_3 = """
real, calls = train._step, []

def step(*args):
    calls.append(None)
    if len(calls) == 3 and os.environ["RANK"] == "0":
        handler, arrived = signal.getsignal(signal.SIGTERM), threading.Event()
        signal.signal(signal.SIGTERM, lambda *signalled: (handler(*signalled), arrived.set()))
        os.kill(os.getppid(), signal.SIGTERM)  # torchrun hands it on to every process, whatever its step
        assert arrived.wait(60)
    return real(*args)

train._step = step
run(folder)
"""


def test_two_processes_give_the_loss_curve_of_one_though_sigterm_stopped_them_in_between(run, process, tmp_path):
    settings = ["train.micro_batch_size=2"]
    run(tmp_path / "one", *settings)
    stopped = process(STOPPED_IN_STEP_3, tmp_path / "two", *settings, two=True)
    assert stopped.returncode != 0
    assert f"{tmp_path / 'two' / 'checkpoint.pt'} continues from there" in stopped.stderr
    assert 2 < load_state(tmp_path / "two" / "checkpoint.pt")["step"] < 12
    finished = process("run(folder)", tmp_path / "two", *settings, two=True)
    assert finished.returncode == 0, finished.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    for one, two in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-2)
    assert read_json(tmp_path / "two" / "summary.json")["processes"] == 2


def test_micro_batches_that_do_not_divide_the_share_of_a_process_are_refused(smoke, tokenizer, tmp_path):
    here = train.Processes(rank=0, world_size=2, device=torch.device("cpu"))
    with pytest.raises(ConfigError, match="2 processes with micro-batches of 8"):
        train._run(tiny(smoke), smoke.folder / "tokens", tokenizer, tmp_path, True, (), here, [])


def test_a_loss_that_is_not_finite_stops_the_run_with_step_rate_and_checkpoint(run, tmp_path):
    absurd = ["train.learning_rate=0.9", "train.weight_decay=1e25", "train.warmup_steps=0", "train.log_every=1"]
    with pytest.raises(DivergedError, match=r"in step [2-4] at learning rate \d\.\d\de-01; last good checkpoint: none yet"):
        run(tmp_path / "late", *absurd)
    with pytest.raises(DivergedError) as stopped:
        run(tmp_path / "early", *absurd, "train.checkpoint_minutes=0")
    assert f"last good checkpoint: {tmp_path / 'early' / 'checkpoint.pt'}" in str(stopped.value)
    state = load_state(tmp_path / "early" / "checkpoint.pt")
    assert f"in step {state['step'] + 1} " in str(stopped.value)
    assert all(torch.isfinite(weight).all() for weight in state["model"].values())
    assert all("NaN" not in line for line in (tmp_path / "early" / "metrics.jsonl").read_text().splitlines())


def test_a_full_disk_leaves_the_old_checkpoint_whole_and_the_run_goes_on_when_there_is_room(run, whole, small_disk):
    interrupted(run, small_disk / "run", step=5)
    checkpoint = small_disk / "run" / "checkpoint.pt"
    before = checkpoint.read_bytes()
    filler = small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - len(before) // 2))
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt could not be written: .*No space left on device"):
        run(small_disk / "run", "train.checkpoint_minutes=0")
    assert checkpoint.read_bytes() == before
    assert not list(checkpoint.parent.glob(".*.tmp"))
    filler.unlink()
    run(small_disk / "run")
    assert curve(small_disk / "run") == curve(whole())


def test_what_a_killed_process_left_behind_is_removed(run, tmp_path):
    interrupted(run, tmp_path, step=3)
    (tmp_path / ".checkpoint.pt.123.tmp").write_bytes(b"half a checkpoint")
    with open(tmp_path / "metrics.jsonl", "a") as log:
        log.write('{"step": 4, "tokens": 10')
    run(tmp_path)
    assert not list(tmp_path.glob(".*.tmp"))
    assert [line["step"] for line in train.metrics(tmp_path)[0]] == [2, 4, 6, 8, 10, 12]


def test_a_checkpoint_that_is_not_one_is_refused_and_not_overwritten(run, tmp_path):
    interrupted(run, tmp_path, step=3)
    (tmp_path / "checkpoint.pt").write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt is not a training state"):
        run(tmp_path)
    assert (tmp_path / "checkpoint.pt").read_bytes() == b"no checkpoint"


@pytest.mark.skipif(torch.__version__ < "2.2", reason="PyTorch 2.1 takes minutes to notice that there is no compiler")
def test_without_a_compiler_training_warns_and_goes_on(run, process, tmp_path):
    settings = ["train.steps=2", "train.warmup_steps=0", "train.device=cpu"]
    run(tmp_path / "plain", *settings)
    without = {"CXX": "/no/compiler", "CC": "/no/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = process("run(folder)", tmp_path / "compiled", *settings, "train.compile=true", **without)
    assert done.returncode == 0, done.stderr
    assert "torch.compile does not work here, training goes on without it" in done.stderr
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


def test_compiled_steps_give_the_losses_of_eager_ones(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    settings = ["model.n_layers=1", "train.isolate_stories=true", "train.steps=2", "train.warmup_steps=0", "train.log_every=1"]
    run(tmp_path / "eager", *settings)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        run(tmp_path / "compiled", *settings, "train.compile=true")
    assert not [w for w in warned if "torch.compile does not work" in str(w.message)]
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="compilation works on this GPU")
def test_a_compilation_that_fails_on_a_gpu_stops_the_run_and_names_the_setting(smoke):
    preset = tiny(smoke)
    with pytest.raises(RunError, match=r"(?s)torch.compile failed on cuda: .*Set train.compile=false"):
        train._compiled(LanguageModel(preset.model), preset, torch.device("cuda"))


def test_wandb_has_a_run_of_its_own_for_every_run_of_this_project(run, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("one", "two"):
        run(tmp_path / name / "run", "train.wandb=true")
    files = [path for name in ("one", "two") for path in (tmp_path / name / "run").glob("wandb/offline-run-*/run-*.wandb")]
    assert len({path.name for path in files}) == 2
    assert all(path.name.startswith("run-smoke-") for path in files)
    assert all(b"validation_bits_per_byte" in path.read_bytes() for path in files)


def test_a_tracker_that_is_asked_for_and_not_installed_is_named(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises ImportError
    with pytest.raises(ConfigError, match=r"train\.wandb=true.*Install the package wandb"):
        run(tmp_path, "train.wandb=true")
    assert run(tmp_path)["steps"] == 12


# ---- Teachers


def test_teachers_are_trained_first_and_a_finished_run_asks_for_none_of_their_weights(smoke, tmp_path, monkeypatch):
    shutil.copytree(smoke.folder, tmp_path / "smoke")
    monkeypatch.setenv("BLM_BUILD", str(tmp_path))
    teachers = "train.seed=2 model.d_model=24,train.seed=3 train.steps=10"
    preset = tiny(smoke, f"teachers={teachers}", "train.teacher_weight=0.5")
    summary = pipeline.run(preset)
    made = preset.folder / "teachers"
    assert [read_json(made / str(i) / "config.json")["model"]["d_model"] for i in (0, 1)] == [24, 16]
    assert [read_json(made / str(i) / "summary.json")["steps"] for i in (0, 1)] == [12, 10]
    assert len(read_json(preset.folder / "run" / "config.json")["data"]["teachers"]) == 2
    for i in (0, 1):
        shutil.rmtree(made / str(i) / "model")
    assert pipeline.run(preset) == summary
    shutil.rmtree(preset.folder / "run")
    alone = pipeline.run(dataclasses.replace(preset, teachers=(), train=tiny(smoke).train))
    assert alone["loss"] != summary["loss"]


def test_a_weight_of_teachers_without_teachers_is_refused(smoke):
    with pytest.raises(ConfigError, match=r"train.teacher_weight = 0.5 .* above 0 with teachers, and 0 without"):
        tiny(smoke, "train.teacher_weight=0.5")


def test_several_processes_with_teachers_are_refused_before_anything_is_done(smoke, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="has teachers, which one process trains: start it without torchrun"):
        pipeline.run(tiny(smoke, "teachers=train.seed=2", "train.teacher_weight=0.5"))
