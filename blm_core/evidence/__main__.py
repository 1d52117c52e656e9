"""Command line of experiments, comparison and publishing: `python -m blm_core.evidence COMMAND --help`."""

import argparse
import math
import os
import re
import sys
from collections import Counter
from pathlib import Path

from blm_core.__main__ import carry_out, preset_arguments, preset_of
from blm_core.config import ROOT, ConfigError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m blm_core.evidence", description="Experiments, comparison and publishing.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run, text: str, preset: bool = False) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        if preset:
            preset_arguments(sub)
        return sub

    study = command("study", _study, "Carry out experiments; finished runs are kept.")
    study.add_argument("names", nargs="*", help="which studies (default: all)")
    variables = command("variables", _variables, "Write _variables.yml for the report from a preset's results.", preset=True)
    variables.add_argument("--folder", type=Path, default=ROOT)
    command("publish", _publish, "Put executed notebooks, figures, run and model where they are committed.", preset=True)

    bench = command("bench", _bench, "Measure how fast this machine trains, encodes and samples.")
    bench.add_argument("--presets", help="with commas between them (default: all that fit the machine)")
    bench.add_argument("--device", default="auto")
    bench.add_argument("--out", type=Path, help="default: runs/bench/DEVICE.json")
    bench.add_argument("--quick", action="store_true", help="seconds instead of minutes; the figures are rough")

    rehearse = command("rehearse", _rehearse, "Ten minutes on the device that decide a long run, and its plan.", preset=True)
    rehearse.add_argument("--device", default="auto")
    rehearse.add_argument("--steps", type=int, default=200, help="of each of three learning rates")
    rehearse.add_argument("--price-per-hour", type=float, default=2.0)
    rehearse.add_argument("--out", type=Path, help="where to write the figures (default: runs/bench/rehearsal-DEVICE.json)")

    record = command("record", _record, "Write a model's completions of prompts to a JSON-lines file; continues a broken one.")
    record.add_argument("--model", required=True, help="folder of a model, or what transformers loads by that name")
    record.add_argument("--prompts", default="own", help='"own", "authors", or a file (.json, .yaml, .jsonl)')
    record.add_argument("--out", type=Path, required=True)
    record.add_argument("--samples", type=int, default=3, help="completions of each prompt")
    record.add_argument("--temperature", type=float, default=0.8)
    record.add_argument("--top-k", type=int, default=0)
    record.add_argument("--top-p", type=float, default=0.95)
    record.add_argument("--max-tokens", type=int, default=200)
    record.add_argument("--seed", type=int, default=1)

    score = command("score", _score, "Write bits of every story under a model to a JSON-lines file; continues a broken one.")
    score.add_argument("--model", required=True, help="folder of a model, or what transformers loads by that name")
    score.add_argument("--text", type=Path, required=True, help="stories with <|endoftext|> between them")
    score.add_argument("--normalise", action="store_true", help="repair and fold the text first, as for training")
    score.add_argument("--stories", type=int, help="only the first so many")
    score.add_argument("--out", type=Path, required=True)

    cost = command("cost", _cost, "Measure size, memory and speed of a model and its opponent by turns; minutes with GPT2-XL.")
    cost.add_argument("--model", type=Path, default=ROOT / "release", help="folder of a model (default: release/)")
    cost.add_argument("--opponent", help="folder or hub name for transformers (default: BLM_GPT2XL, else gpt2-xl)")
    cost.add_argument("--random", action="store_true", help="the opponent's architecture with random weights")
    cost.add_argument("--prefill", type=int, default=96, help="tokens read at once")
    cost.add_argument("--generated", type=int, default=32, help="tokens written one by one")
    cost.add_argument("--repeats", type=int, default=3)
    cost.add_argument("--threads", type=int, default=0)
    cost.add_argument("--out", type=Path, required=True)
    for sub in (record, score):
        sub.add_argument("--device", default="auto")
    cost.add_argument("--device", default="cpu")
    for sub in (record, score, cost):
        sub.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of transformers' weights")

    judge = command("judge", _judge, "Blind ratings: write sheets (--export), take marks in (--import), or ask an endpoint.")
    way = judge.add_mutually_exclusive_group(required=True)
    way.add_argument("--export", type=Path, metavar="FILE", help="write the sheet: Markdown, or JSON lines for .jsonl")
    way.add_argument("--import", type=Path, nargs="+", metavar="FILE", dest="marks", help="read returned marks, JSON lines")
    way.add_argument("--endpoint", action="store_true", help="ask BLM_JUDGE_URL for BLM_JUDGE_MODEL; key in BLM_JUDGE_KEY")
    judge.add_argument("--key", type=Path, help="which text is whose: written by --export, read by --import")
    judge.add_argument("--ours", type=Path, help="recorded completions of one model, JSON lines")
    judge.add_argument("--theirs", type=Path, help="recorded completions to compare with (default: BLM_RECORDED)")
    judge.add_argument("--seed", type=int, default=1, help="of the shuffle")
    judge.add_argument("--parts", action="store_true", help="write two sheets, FILE-1 and FILE-2, one for each order")
    judge.add_argument("--keep-case", action="store_true", help="do not put texts into lower case")
    judge.add_argument("--cut", default="sentences", help="sentences (default), words or none: how lengths are made equal")
    judge.add_argument("--rater", default="", help="a name for whoever rates, which becomes a file name")
    judge.add_argument("--out", type=Path, help="folder for the ratings")
    judge.add_argument("--price-in", type=float, default=0.0, help="per million tokens asked")
    judge.add_argument("--price-out", type=float, default=0.0, help="per million tokens answered")
    judge.add_argument("--ceiling", type=float, default=math.inf, help="spend no more than this")
    judge.add_argument("--requests-per-minute", type=float, default=60.0)
    judge.add_argument("--max-tokens", type=int, default=1000, help="of an answer")

    return carry_out(parser, arguments)


def _study(args) -> None:
    from blm_core.evidence import studies

    for name in args.names or [each.name for each in studies.STUDIES]:
        studies.run(studies.find(name))


def _variables(args) -> None:
    from blm_core.evidence import publish

    publish.write_variables(preset_of(args), args.folder)


def _publish(args) -> None:
    from blm_core.evidence import publish
    from blm_core.evidence.card import write_card

    preset = preset_of(args)
    publish.publish(preset)
    write_card(preset, ROOT / "release")


def _bench(args) -> None:
    from blm_core.evidence import speed

    names = args.presets.split(",") if args.presets else None
    result = speed.bench(names, args.device, speed.QUICK if args.quick else None)
    path = speed.save(result, args.out)
    print(speed.tables(result))
    print(f"\nwritten to {path}")


def _rehearse(args) -> None:
    from blm_core.evidence import rehearsal, speed

    result = rehearsal.rehearse(preset_of(args), args.device, args.steps)
    print(rehearsal.plan(result, args.price_per_hour))
    print(f"\nwritten to {speed.save(result, args.out)}")


def _record(args) -> None:
    import torch

    from blm_core.evidence.compare import load, record
    from blm_core.evidence.prompts import read_prompts
    from blm_core.generate import Sampling

    if args.samples < 1:
        raise ConfigError(f"--samples {args.samples} must be at least 1.")
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.max_tokens, args.seed)
    prompts = read_prompts(args.prompts)
    model = load(args.model, args.device, getattr(torch, args.dtype))
    lines = record(model, prompts, args.out, sampling, args.samples)
    stopped = Counter(line["stopped"] for line in lines)
    print(f"{args.out}: {len(lines)} completions of {len(prompts)} prompts by {model.name}, stopped by {dict(stopped)}")


def _score(args) -> None:
    import torch

    from blm_core.data import read_stories
    from blm_core.evidence.compare import bits_line, load, score_stories

    stories = read_stories(args.text, args.normalise)[: args.stories]
    model = load(args.model, args.device, getattr(torch, args.dtype))
    line = bits_line(stories, score_stories(model, stories, args.out))
    value, low, high = line["ours"]
    print(f"{line['stories']:,} stories, {line['bytes']:,} bytes")
    print(f"{value:.4f} bits per byte [{low:.4f}, {high:.4f}] 95 % bootstrap")


def _cost(args) -> None:
    from blm_core.evidence.publish import markdown_table
    from blm_core.evidence.speed import CostSettings, cost_table, measure_cost
    from blm_core.files import write_json

    settings = CostSettings(
        args.prefill, args.generated, args.repeats, device=args.device, dtype=args.dtype, threads=args.threads
    )
    opponent = args.opponent or os.environ.get("BLM_GPT2XL") or "gpt2-xl"
    result = measure_cost(args.model, opponent, settings, args.random)
    write_json(args.out, result)
    print(markdown_table(*cost_table(result)))


def _judge(args) -> int:
    from blm_core.evidence import sheets

    _needs(args, "key" if not args.endpoint else "out", "out" if args.marks else "", "rater" if args.marks else "")
    if args.marks:
        ratings = sheets.read_marks(args.marks, args.key, args.rater)
        print(f"{sheets.save(args.out, args.rater, ratings)}: {len(ratings)} ratings")
        return 0
    _needs(args, "ours")
    form = sheets.Form(not args.keep_case, args.cut)
    pairs, alone = sheets.pairs(args.ours, args.theirs or "", form)
    items = sheets.items(pairs, args.seed)
    for model, count in alone.items():
        print(f"{model}: {sum(model in pair.models for pair in pairs)} pairs, {count} completions without a partner")
    if args.endpoint:
        return _ask(args, items, form)
    sheets.write_key(args.key, items, form, args.seed, sheets.revision(args.ours))
    for part in (1, 2) if args.parts else (0,):
        path = args.export.with_stem(f"{args.export.stem}-{part}") if part else args.export
        sheets.write_sheet(path, [item for item in items if part in (0, item.part)], form)
        print(path)
    return 0


def _ask(args, items, form) -> int:
    from blm_core.evidence import judge, sheets
    from blm_core.evidence.ratings import write_ratings
    from blm_core.files import write_json

    endpoint = judge.endpoint_from_environment(
        price_in=args.price_in,
        price_out=args.price_out,
        ceiling=args.ceiling,
        requests_per_minute=args.requests_per_minute,
        max_tokens=args.max_tokens,
    )
    rater = args.rater or re.sub("[^A-Za-z0-9._-]+", "-", endpoint.model).strip("-.")
    outcome = judge.Judge(endpoint, Path(os.environ.get("BLM_BUILD", ROOT / "build")) / "judge", form).rate(items, rater)
    print(f"{len(outcome.ratings)} of {len(items)} items rated: {outcome.asked} answers bought, {outcome.reused} in the cache")
    print(f"{len(outcome.refused)} without a usable answer, {len(outcome.left)} left; {outcome.spent:.4f} spent in all")
    for name, reasons in outcome.refused.items():
        print(f"{name}: {' | '.join(reasons)}", file=sys.stderr)
    partial = args.out / f"{rater}.part.jsonl"
    if outcome.stopped:
        write_ratings(partial, outcome.ratings)
        print(f"stopped: {outcome.stopped} So far: {partial}", file=sys.stderr)
        return 1
    print(sheets.save(args.out, rater, outcome.ratings))
    partial.unlink(missing_ok=True)
    # Reasons may quote the judge, who may quote the texts; the file is to be published.
    counts = {name: len(reasons) for name, reasons in outcome.refused.items()}
    write_json(args.out / f"{rater}.outcome.json", outcome.as_dict() | {"refused": counts})
    return 0


def _needs(args, *names: str) -> None:
    missing = [f"--{name}" for name in names if name and not getattr(args, name)]
    if missing:
        raise ConfigError(f"{', '.join(missing)} must be given too.")


if __name__ == "__main__":
    sys.exit(main())
