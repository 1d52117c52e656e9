"""Command line of experiments, comparison and publishing: `python -m blm_core.evidence COMMAND --help`."""

import os
import sys
from pathlib import Path

from blm_core.__main__ import carry_out, command_line, preset_of, sampling_arguments, sampling_of
from blm_core.config import ROOT, ConfigError
from blm_core.data import read_stories
from blm_core.evaluate import ratio_interval
from blm_core.evidence import export, models, publish, ratings, rehearsal, speed
from blm_core.files import write_json


def main(arguments: list[str] | None = None) -> int:
    parser, command = command_line("python -m blm_core.evidence", "Experiments, comparison and publishing.")

    variables = command("variables", _variables, "Write _variables.yml for the report from a preset's results.", preset=True)
    variables.add_argument("--folder", type=Path, default=ROOT)
    command("publish", _publish, "Put executed notebooks, figures, run and model where they are committed.", preset=True)
    gguf = command("export", _export, "Write the model as one GGUF file, for llama.cpp.")
    gguf.add_argument("--gguf", type=Path, required=True, metavar="FILE")
    gguf.add_argument("--dtype", default="f16", choices=("f32", "f16", "bf16", "q8_0"), help="of matrices (default: f16)")

    bench = command("bench", _bench, "Measure how fast this machine trains, encodes and samples.")
    bench.add_argument("--presets", help="with commas between them (default: cpu, on a GPU a100)")
    bench.add_argument("--out", type=Path, help="default: runs/bench/DEVICE.json")
    bench.add_argument("--quick", action="store_true", help="seconds instead of minutes; the figures are rough")
    rehearse = command("rehearse", _rehearse, "Plan a long run from ten minutes of it, into runs/bench/.", preset=True)
    rehearse.add_argument("--price-per-hour", type=float, default=2.0)
    record = command("record", _record, "Write a model's completions of prompts to a JSON-lines file; continues a broken one.")
    record.add_argument("--prompts", default="own", help='"own", or a JSON file like ours')
    record.add_argument("--samples", type=int, default=3, help="completions of each prompt")
    sampling_arguments(record, max_tokens=200)
    score = command("score", _score, "Write bits of every story under a model to a JSON-lines file; continues a broken one.")
    score.add_argument("--text", type=Path, required=True, help="stories with <|endoftext|> between them")
    score.add_argument("--normalise", action="store_true", help="fold typography and white space first")
    cost = command("cost", _cost, "Measure size and speed of a model and its opponent by turns; minutes with GPT2-XL.")
    opponent = 'folder or hub name, or "random" for GPT2-XL\'s shape with random weights (default: BLM_GPT2XL, else gpt2-xl)'
    cost.add_argument("--opponent", default=os.environ.get("BLM_GPT2XL") or "gpt2-xl", help=opponent)

    judge = command("judge", _judge, "Blind ratings: write sheets, let a server answer them, take the answers in.")
    judge.add_argument("folder", type=Path, help="of the sheets; answers lie in its folder answers/")
    way = judge.add_mutually_exclusive_group(required=True)
    way.add_argument("--make", action="store_true", help="write the sheets, and key and our texts to --evidence")
    way.add_argument("--endpoint", action="store_true", help="ask BLM_JUDGE_URL for BLM_JUDGE_MODEL; key in BLM_JUDGE_KEY")
    way.add_argument("--import", action="store_true", dest="take", help="take whole answers into --evidence")
    judge.add_argument("--evidence", type=Path, default=ROOT / "runs" / "evidence", help="default: runs/evidence/")
    judge.add_argument("--valid", type=Path, help="real stories, the official validation file, for --make")
    judge.add_argument("--rater", help="who answered, for --import")
    judge.add_argument("--date", help="of the answers, for --import")

    for sub in (record, score):
        sub.add_argument("--model", required=True, help="folder of a model, or what transformers loads by that name")
    for sub in (gguf, cost, judge):
        sub.add_argument("--model", type=Path, default=ROOT / "release", help="folder of our model (default: release/)")
    for sub in (record, score, cost):
        sub.add_argument("--out", type=Path, required=True)
    for sub in (bench, rehearse, record, score, cost):
        sub.add_argument("--device", default="cpu" if sub is cost else "auto")
    return carry_out(parser, arguments)


def _variables(args) -> None:
    publish.write_variables(preset_of(args), args.folder)


def _publish(args) -> None:
    publish.publish(preset_of(args))


def _export(args) -> None:
    export.export_gguf(args.model, args.gguf, args.dtype)
    print(f"{args.gguf}: {args.gguf.stat().st_size / 1e6:.1f} MB")


def _bench(args) -> None:
    names = args.presets.split(",") if args.presets else None
    result = speed.bench(names, args.device, args.quick)
    for table in (speed.training_table(result), speed.ratio_table(result)):
        print(f"{publish.markdown_table(*table)}\n")
    print(f"written to {speed.save(result, args.out)}")


def _rehearse(args) -> None:
    result = rehearsal.rehearse(preset_of(args), args.device)
    print(rehearsal.plan(result, args.price_per_hour))
    print(f"\nwritten to {speed.save(result)}")


def _record(args) -> None:
    prompts = models.read_prompts(args.prompts)
    model = models.load(args.model, args.device)
    lines = models.record(model, prompts, args.out, sampling_of(args), args.samples)
    print(f"{args.out}: {len(lines)} completions of {len(prompts)} prompts by {model.name}")


def _score(args) -> None:
    stories = read_stories(args.text, args.normalise)
    model = models.load(args.model, args.device)
    sizes = [len(story.encode()) for story in stories]
    value, low, high = ratio_interval(models.score_stories(model, stories, args.out), sizes)
    print(f"{len(stories):,} stories, {value:.4f} bits per byte [{low:.4f}, {high:.4f}] 95 % bootstrap")


def _cost(args) -> None:
    opponent = models.GPT2_XL if args.opponent == "random" else args.opponent
    result = speed.measure_cost(args.model, opponent, args.device)
    write_json(args.out, result)
    print(publish.markdown_table(*speed.ratio_table(result)))


def _judge(args) -> None:
    for name in ("valid",) if args.make else ("rater", "date") if args.take else ():
        if not getattr(args, name):
            raise ConfigError(f"--{name} must be given too.")
    if args.make:
        if not os.environ.get("BLM_RECORDED"):
            raise ConfigError("BLM_RECORDED must name the folder of other models' recorded texts.")
        ratings.make(args.model, Path(os.environ["BLM_RECORDED"]), args.valid, args.folder, args.evidence)
    elif args.take:
        ratings.take_in(args.folder, args.evidence, args.rater, args.date)
    else:
        ratings.ask(args.folder)


if __name__ == "__main__":
    sys.exit(main())
