"""How fast this machine trains, encodes and samples, measured in one sitting, kept as JSON and shown as tables.

A figure that this machine cannot give has `not_measured`, why, and `command`, which fills it elsewhere.
"""

import dataclasses
import re
from datetime import UTC, datetime
from pathlib import Path

import torch

from blm_core import config as configuration
from blm_core.config import ROOT, ConfigError
from blm_core.evidence.bench_ratios import bench_encoding, bench_loops, bench_optimizers, bench_sampling
from blm_core.evidence.bench_training import MOST_FLOPS_ON_CPU, PARTS, Effort, bench_preset
from blm_core.evidence.models import versions
from blm_core.evidence.publish import markdown_table
from blm_core.files import read_json, write_json
from blm_core.hardware import device_name, fast_bfloat16
from blm_core.model import flops_per_token

BENCHMARKS = ROOT / "runs" / "bench"
MFU_FORMULA = "tokens per second x (6 N + 12 L H D T) / peak FLOP/s (PaLM, appendix B; N counts the matrices)"
NOT_MEASURED = "not measured"


def bench(names: list[str] | None = None, device: str = "auto", effort: Effort | None = None) -> dict:
    """Everything, for the presets called `names` (default: all), as plain values for JSON. Under four minutes on two cores.

    Raises ConfigError for an unknown preset.
    """
    effort = effort or Effort()
    presets = [configuration.load(name) for name in names or configuration.PRESETS]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    where, cpu = torch.device(device), torch.device("cpu")
    training = [row for preset in presets for row in bench_preset(preset, where, effort)]
    if where.type == "cpu" and all(preset.name != "a100" for preset in presets):
        training += bench_preset(configuration.PRESETS["a100"], where, effort)
    small = [preset for preset in presets if flops_per_token(preset.model) * preset.tokens_per_step <= MOST_FLOPS_ON_CPU]
    ratios = []
    if small:
        shape = max(small, key=lambda preset: flops_per_token(preset.model))
        ratios += [bench_loops(shape, effort), bench_optimizers(shape, effort), bench_encoding(effort)]
        ratios += bench_sampling(shape, effort)
    if not fast_bfloat16(cpu):
        ratios.append(
            {
                "question": "training in bfloat16, CPU",
                "target": "1.5",
                "not_measured": "this CPU has no bfloat16 instructions",
                "command": "python -m blm_core.evidence bench --presets cpu",
            }
        )
    return {
        "device": device_name(where),
        "device_type": where.type,
        "cpu": device_name(cpu),
        "versions": versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "effort": dataclasses.asdict(effort),
        "mfu_formula": MFU_FORMULA,
        "training": training,
        "ratios": ratios,
    }


def default_path(result: dict) -> Path:
    """Where the benchmarks are kept, one for each device."""
    name = re.sub(r"[^a-z0-9]+", "-", result["device"].lower()).strip("-")
    return BENCHMARKS / f"{name}.json"


def save(result: dict, path: Path | None = None) -> Path:
    """Write `result` to `path` (default: named by the device); where it lies."""
    path = Path(path or default_path(result))
    write_json(path, result)
    return path


def read(path: Path) -> dict:
    """What `save` wrote. Raises ConfigError where `path` holds anything else."""
    result = read_json(path)
    if not isinstance(result, dict) or not {"device", "device_type", "training", "ratios"} <= set(result):
        raise ConfigError(f"{path} holds no benchmark. Make one with `python -m blm_core.evidence bench --out {path}`.")
    return result


def tables(result: dict) -> str:
    """`result` in Markdown: the machine, a table of training and one of ratios, then what is missing and how to get it."""
    software = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    parts = [
        f"{result['device']}" + (f"; CPU: {result['cpu']}" if result["cpu"] != result["device"] else ""),
        f"{software}; {result['date']}",
        markdown_table(*training_table(result)),
        f"MFU = {result['mfu_formula']}.",
        markdown_table(*ratio_table(result)),
        "By turns; median, and in brackets the lowest and the highest.",
    ]
    parts += [f"- {row['question']}: {row['note']}" for row in result["ratios"] if "note" in row]
    missing = [
        f"- {row.get('question') or row['preset']}: {NOT_MEASURED}, {row['not_measured']}; `{row['command']}`"
        for row in result["training"] + result["ratios"]
        if "not_measured" in row
    ]
    unread = {row["energy_unread"] for row in result["training"] if row.get("energy_unread")}
    parts += missing + [f"- energy: {NOT_MEASURED}, {why}" for why in sorted(unread)]
    micro = [row for row in result["training"] if row.get("micro_batches")]
    for row in micro:
        sizes = (
            f"{found['micro_batch_size']}: {_number(found['tokens_per_second'], 'out of memory')}"
            for found in row["micro_batches"]
        )
        parts.append(f"- {row['preset']}, tokens/s by micro-batch: {', '.join(sizes)}")
    return re.sub(r"(?m)^(- .*)\n\n(?=- )", r"\1\n", "\n\n".join(parts))


def training_table(result: dict) -> tuple[tuple, list[tuple]]:
    """Header and rows of training: one row per preset and mode."""
    shares = tuple(f"{part}, %" for part in PARTS)
    header = ("preset", "parameters", "mode", "tokens/s", "TFLOP/s", "MFU", *shares, "memory, GB", "W", "mJ/token")
    rows = []
    for row in result["training"]:
        first = (f"`{row['preset']}`", f"{row['parameters'] / 1e6:.2f} M")
        if "not_measured" in row:
            rows.append((*first, row.get("mode", ""), *[NOT_MEASURED] * (len(header) - 3)))
            continue
        mode = f"{row['mode']}, {row['dtype']}, {row['micro_batch_size']} x {row['seq_len']}"
        energy = row["joules_per_token"]
        rows.append(
            (
                *first,
                mode + (", random tokens" if row["tokens"] == "random" else ""),
                f"{row['tokens_per_second']:,}",
                f"{row['tflops']:.3g}",
                _number(row["mfu"]),
                *(f"{100 * row['shares'][part]:.1f}" for part in PARTS),
                _number(row["memory_gb"]),
                _number(row["watts"]),
                _number(energy and 1000 * energy),
            )
        )
    return header, rows


def ratio_table(result: dict) -> tuple[tuple, list[tuple]]:
    """Header and rows of the ratios: what was measured by turns, both sides, and the target."""
    rows = []
    for row in result["ratios"]:
        if "not_measured" in row:
            rows.append((row["question"], *[NOT_MEASURED] * 4, row.get("target", "")))
            continue
        a, b = (f"{row[side]['name']}: {_interval(row[side])}" for side in ("a", "b"))
        rows.append((row["question"], row["unit"], a, b, _interval(row["ratio"]), row["target"]))
    return ("what", "unit", "A", "B", "A / B", "target"), rows


def _interval(spread: dict) -> str:
    return f"{_number(spread['median'])} [{_number(spread['low'])}, {_number(spread['high'])}]"


def _number(value: float | None, absent: str = NOT_MEASURED) -> str:
    if value is None:
        return absent
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
