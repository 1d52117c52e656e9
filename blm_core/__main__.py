"""Command line: `python -m blm_core COMMAND --help`."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from blm_core import config as configuration
from blm_core import pipeline
from blm_core.checkpoint import load_model
from blm_core.config import PRESETS, ROOT, ConfigError, Preset
from blm_core.data import read_stories
from blm_core.evaluate import score
from blm_core.files import read_json
from blm_core.generate import Sampling, complete, stream
from blm_core.hardware import find_device

FACTS = (  # of all that the notebooks record
    *("data.read", "data.kept", "tokenizer.pieces", "model.parameters", "train.tokens", "train.minutes"),
    *("train.device", "train.bits_per_byte", "samples.story"),
)


def main(arguments: list[str] | None = None) -> int:
    parser, command = command_line("python -m blm_core", "BLM: a boutique language model.")
    command("train", _train, "Prepare what is missing and train; an interrupted run is continued.", preset=True)
    command("config", _config, "Print a preset with its overrides.", preset=True)
    command("summary", _summary, "Print what a run of the notebooks found.", preset=True)

    generate = command("generate", _generate, "Write stories.")
    generate.add_argument("--prompt", default="Once upon a time", help="the beginning (default: %(default)r)")
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
            sub.add_argument("--preset", help=f"{', '.join(PRESETS)} (default: BLM_PRESET, else what fits the machine)")
            sub.add_argument("settings", nargs="*", metavar="section.key=value", help="e.g. train.steps=2000")
        return sub

    return parser, command


def sampling_arguments(parser: argparse.ArgumentParser, max_tokens: int = 0) -> None:
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--max-tokens", type=int, default=max_tokens, help="new tokens; 0 fills the context")
    parser.add_argument("--seed", type=int, default=1)


def sampling_of(args) -> Sampling:
    return Sampling(args.temperature, args.top_k, args.top_p, args.max_tokens, args.seed)


def preset_of(args) -> Preset:
    return configuration.load(args.preset, args.settings)


def carry_out(parser: argparse.ArgumentParser, arguments: list[str] | None) -> int:
    """Run the command; a user's mistake or a broken file ends in one line instead of a traceback."""
    args = parser.parse_args(arguments)
    try:
        return args.run(args) or 0
    except (RuntimeError, ValueError, OSError, KeyboardInterrupt) as error:
        if isinstance(error, RuntimeError) and not type(error).__module__.startswith("blm_core"):
            raise  # PyTorch's own, which needs its traceback
        print(f"{parser.prog} {args.command}: {error or 'stopped'}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 1


def _train(args) -> None:
    summary = pipeline.run(preset_of(args))
    if summary:  # of several processes the first alone has one
        print(json.dumps(summary, indent=1))


def _config(args) -> None:
    print(json.dumps(configuration.to_dict(preset_of(args)), indent=1))


def _summary(args) -> None:
    folder = preset_of(args).folder
    results = read_json(folder / "results.json")
    if not results:
        raise ConfigError(f"{folder} holds no results; run the notebooks first.")
    for fact in FACTS:
        section, name = fact.split(".")
        print(f"{fact:<20} {results.get(section, {}).get(name, 'not recorded yet')}")
    print(f"all of it in {folder / 'results.json'}, notebooks in {folder / 'notebooks'}, model in {folder / 'run' / 'model'}")


def _generate(args) -> None:
    if args.n < 1:
        raise ConfigError(f"--n {args.n} must be at least 1.")
    sampling, (model, tokenizer) = sampling_of(args), load_model(args.model, find_device(args.device))
    if args.n > 1:
        for i, text in enumerate(complete(model, tokenizer, [args.prompt] * args.n, sampling), 1):
            print(f"--- {i} ---\n{args.prompt}{text}")
        return
    print(args.prompt, end="", flush=True)
    for text in stream(model, tokenizer, args.prompt, sampling):
        print(text, end="", flush=True)
    print()


def _evaluate(args) -> None:
    stories = read_stories(args.text, args.normalise)
    model, tokenizer = load_model(args.model, find_device(args.device))
    result = score(model, tokenizer, stories)[0]._asdict()
    result |= {"text": args.text.name, "model": str(args.model), "normalised": args.normalise}
    if args.json:
        print(json.dumps({key: None if value != value else value for key, value in result.items()}))  # JSON has no NaN
    else:
        print(f"{result['stories']:,} stories, {result['bytes']:,} bytes, {result['tokens']:,} tokens")
        interval = f"[{result['low']:.4f}, {result['high']:.4f}] 95 % bootstrap"
        if len(stories) == 1:
            interval = "(one story: no interval)"
        print(f"{result['bits_per_byte']:.4f} bits per byte {interval}")


if __name__ == "__main__":
    sys.exit(main())
