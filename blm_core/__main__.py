"""Command line: `python -m blm_core COMMAND --help`."""

import argparse
import json
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

from blm_core import config as configuration
from blm_core.config import ROOT, ConfigError, Preset
from blm_core.files import read_json

BEGINNING = "Once upon a time"


def main(arguments: list[str] | None = None) -> int:
    parser, command = command_line("python -m blm_core", "BLM: a boutique language model.")
    command("train", _train, "Prepare what is missing and train; an interrupted run is continued.", preset=True)
    command("config", _config, "Print a preset with its overrides.", preset=True)
    command("summary", _summary, "Print what a run of the notebooks found.", preset=True)

    generate = command("generate", _generate, "Write stories.")
    generate.add_argument("--prompt", help=f"the beginning (default: standard input if piped, else {BEGINNING!r})")
    generate.add_argument("--n", type=int, default=1, help="how many stories")
    sampling_arguments(generate)

    evaluate = command("evaluate", _evaluate, "Print bits per byte of a text, <|endoftext|> between stories.")
    evaluate.add_argument("--text", type=Path, required=True)
    evaluate.add_argument("--normalise", action="store_true", help="fold typography and white space first")
    evaluate.add_argument("--json", action="store_true")
    for sub in (generate, evaluate):
        sub.add_argument("--model", type=Path, default=ROOT / "release", help="folder of a model (default: release/)")
        sub.add_argument("--device", default="cpu")

    return carry_out(parser, arguments)


def command_line(prog: str, text: str) -> tuple[argparse.ArgumentParser, Callable[..., argparse.ArgumentParser]]:
    """A parser, and a function that adds a command to it: its name, what runs it, its help, whether it takes a preset."""
    parser = argparse.ArgumentParser(prog=prog, description=text)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable, text: str, preset: bool = False) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        if preset:
            sub.add_argument("--preset", help="smoke, cpu, distilled or a100 (default: BLM_PRESET, else what fits the machine)")
            sub.add_argument("settings", nargs="*", metavar="section.key=value", help="e.g. train.steps=2000")
        return sub

    return parser, command


def sampling_arguments(parser: argparse.ArgumentParser, max_tokens: int = 0) -> None:
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--max-tokens", type=int, default=max_tokens, help="new tokens; 0 fills the context")
    parser.add_argument("--seed", type=int, default=1)


def sampling_of(args):
    from blm_core.generate import Sampling

    return Sampling(args.temperature, args.top_k, args.top_p, args.max_tokens, args.seed)


def preset_of(args) -> Preset:
    return configuration.load(args.preset, args.settings)


def carry_out(parser: argparse.ArgumentParser, arguments: list[str] | None) -> int:
    """Run the command; a user's mistake or a broken file ends in one line instead of a traceback."""
    args = parser.parse_args(arguments)
    try:
        return args.run(args) or 0
    except (RuntimeError, ValueError, OSError) as error:
        if type(error).__module__.startswith("blm_core") or isinstance(error, OSError | ValueError):
            print(f"{parser.prog} {args.command}: {error}", file=sys.stderr)
            return 1
        raise
    except KeyboardInterrupt as stopped:
        print(f"{parser.prog} {args.command}: {stopped or 'stopped'}", file=sys.stderr)
        return 130


def _train(args) -> None:
    from blm_core import pipeline

    summary = pipeline.run(preset_of(args))
    if summary:  # of several processes the first alone has one
        print(json.dumps(summary, indent=1))


def _config(args) -> None:
    print(json.dumps(configuration.to_dict(preset_of(args)), indent=1))


def _generate(args) -> None:
    from blm_core.checkpoint import load_model
    from blm_core.generate import complete, stream

    if args.n < 1:
        raise ConfigError(f"--n {args.n} must be at least 1.")
    sampling = sampling_of(args)
    model, tokenizer = load_model(args.model, args.device)
    prompt = _piped() if args.prompt is None else args.prompt
    if args.n == 1:
        print(prompt, end="", flush=True)
        for text in stream(model, tokenizer, prompt, sampling):
            print(text, end="", flush=True)
        print()
        return
    for i, text in enumerate(complete(model, tokenizer, [prompt] * args.n, sampling), 1):
        print(f"--- {i} ---\n{prompt}{text}")


def _piped() -> str:
    """Standard input without its last newline where it is a pipe or a file, else BEGINNING."""
    kind = os.fstat(sys.stdin.fileno()).st_mode
    if stat.S_ISFIFO(kind) or stat.S_ISREG(kind):
        return sys.stdin.read().removesuffix("\n")
    return BEGINNING


def _evaluate(args) -> None:
    from blm_core.checkpoint import load_model
    from blm_core.data import read_stories
    from blm_core.evaluate import score

    stories = read_stories(args.text, args.normalise)
    model, tokenizer = load_model(args.model, args.device)
    result = score(model, tokenizer, stories)[0].as_dict()
    result |= {"text": args.text.name, "model": str(args.model), "normalised": args.normalise}
    if args.json:
        print(json.dumps({key: None if value != value else value for key, value in result.items()}))  # JSON has no NaN
    else:
        print(f"{result['stories']:,} stories, {result['bytes']:,} bytes, {result['tokens']:,} tokens")
        print(f"{result['bits_per_byte']:.4f} bits per byte [{result['low']:.4f}, {result['high']:.4f}] 95 % bootstrap")


def _summary(args) -> None:
    from blm_core.model import parameter_counts
    from blm_core.train import RunError

    preset = preset_of(args)
    folder = preset.folder
    data, tokens, run = (read_json(folder / p) for p in ("data/manifest.json", "tokens/manifest.json", "run/summary.json"))
    if not (data and tokens and run):
        raise RunError(f"{folder} holds no finished run; run the notebooks first.")
    dropped = {reason: count for reason, count in data["drops"].items() if count}
    facts = {
        "preset": preset.name,
        "stories": f"{data['read']:,} read, {sum(data['stories'].values()):,} kept {data['stories']}",
        "dropped": f"{sum(dropped.values()):,} {dropped}",
        "tokens": f"{tokens['tokens']['train']:,} at hand, {run['tokens']:,} trained on ({run['epochs']:.1f} epochs)",
        "parameters": f"{parameter_counts(preset.model)['total']:,}",
        "validation": f"{run['validation_bits_per_byte']:.3f} bits per byte ({run['validation_split']})",
        "training": f"{run['seconds']:,.0f} s on {run['device']}, PyTorch {run['torch']}",
        "a story": read_json(folder / "results.json", {}).get("samples", {}).get("story", ""),
        "notebooks": folder / "notebooks",
        "run": f"{folder / 'run'} (model in model/)",
    }
    for name, fact in facts.items():
        print(f"{name:<12} {fact}")


if __name__ == "__main__":
    sys.exit(main())
