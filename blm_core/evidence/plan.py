"""From the speed of an accelerator to a plan: what models of several sizes cost to train, and which fit the budget.

The speed is that of the preset `a100` in a benchmark of an accelerator. Other sizes are taken to reach as many FLOP/s, and
their rows say so. Without such a benchmark the speed is assumed, and every row says that.
"""

from dataclasses import dataclass
from pathlib import Path

from blm_core.config import PRESETS, ConfigError, ModelConfig
from blm_core.evidence.bench import BENCHMARKS, read
from blm_core.hardware import PEAK_FLOPS
from blm_core.model import flops_per_token, parameter_counts

TOKENS_PER_PARAMETER = 20  # compute-optimal by Hoffmann et al. 2022
ASSUMED_MFU = 0.45


@dataclass(frozen=True)
class Budget:
    """What may be spent on one accelerator."""

    hours: float = 15.0
    price_per_hour: float = 2.0
    watts: float = 400.0

    def __post_init__(self):
        for name, value in vars(self).items():
            if not value > 0:
                raise ConfigError(f"{name} = {value} cannot be used: it must be above 0.")


@dataclass(frozen=True)
class Speed:
    """Tokens per second of the preset `a100`, where they come from and on which device."""

    tokens_per_second: float
    measured: bool
    device: str

    @property
    def flops_per_second(self) -> float:
        return self.tokens_per_second * flops_per_token(PRESETS["a100"].model)


@dataclass(frozen=True)
class Row:
    """One model trained on so many tokens."""

    model: ModelConfig
    preset: bool  # whether it is the shape of the preset `a100`
    parameters: int
    tokens: float
    tokens_per_second: float
    speed: str  # "measured", "scaled" from the measured row, or "assumed"
    hours: float
    kwh: float
    price: float
    fits: bool
    tokens_in_budget: float


def _shape(n_layers: int, n_heads: int, n_kv_heads: int, d_ff: int) -> ModelConfig:
    return ModelConfig(8192, n_layers, 64 * n_heads, n_heads, n_kv_heads, d_ff)  # heads of 64, as in most Llamas


# Layers, heads, key/value heads, width of the feed-forward layer: 8/3 of the model's width, or a little more.
SHAPES = (
    _shape(9, 3, 1, 512),
    _shape(8, 4, 2, 704),
    _shape(10, 6, 2, 1024),
    _shape(10, 8, 4, 1408),
    PRESETS["a100"].model,
    _shape(12, 12, 4, 2048),
    _shape(14, 15, 5, 2560),
    _shape(16, 18, 6, 3072),
    _shape(17, 21, 7, 3584),
)


def find_speed(folder: Path = BENCHMARKS) -> Speed:
    """The measured speed in `folder`: that of an A100 if there is one, else of the accelerator measured last; else assumed."""
    found = []
    for path in sorted(Path(folder).glob("*.json")):
        result = read(path)
        speed = _measured(result)
        if speed:
            found.append(("A100" in speed.device, result["date"], speed))
    return max(found, key=lambda each: each[:2])[2] if found else assumed()


def read_speed(path: Path) -> Speed:
    """The speed in one benchmark. Raises ConfigError where it holds no accelerator's for the preset `a100`."""
    speed = _measured(read(path))
    if speed is None:
        raise ConfigError(
            f"{path} holds no tokens per second of an accelerator for the preset a100. Measure them on one with "
            "`python -m blm_core.evidence bench --presets a100`."
        )
    return speed


def assumed() -> Speed:
    """An A100 at ASSUMED_MFU."""
    rate = ASSUMED_MFU * PEAK_FLOPS["A100"] / flops_per_token(PRESETS["a100"].model)
    return Speed(rate, False, f"A100, assumed MFU of {ASSUMED_MFU} of {PEAK_FLOPS['A100'] / 1e12:.0f} TFLOP/s")


def _measured(result: dict) -> Speed | None:
    rates = [row["tokens_per_second"] for row in result["training"] if row["preset"] == "a100" and "not_measured" not in row]
    if result["device_type"] == "cpu" or not rates:
        return None
    return Speed(max(rates), True, result["device"])


def plan(speed: Speed, budget: Budget | None = None) -> list[Row]:
    """A row for each of SHAPES at 20 tokens per parameter, and the preset `a100` again with the tokens it is set to."""
    budget = budget or Budget()
    preset = PRESETS["a100"]
    rows = []
    for model in SHAPES:
        count = parameter_counts(model)["total"]
        rows.append(_row(model, TOKENS_PER_PARAMETER * count, speed, budget))
        if model == preset.model:
            rows.append(_row(model, preset.train.steps * preset.tokens_per_step, speed, budget))
    return rows


def _row(model: ModelConfig, tokens: float, speed: Speed, budget: Budget) -> Row:
    is_preset = model == PRESETS["a100"].model
    rate = speed.flops_per_second / flops_per_token(model)
    hours = tokens / rate / 3600
    return Row(
        model=model,
        preset=is_preset,
        parameters=parameter_counts(model)["total"],
        tokens=tokens,
        tokens_per_second=rate,
        speed="assumed" if not speed.measured else "measured" if is_preset else "scaled",
        hours=hours,
        kwh=hours * budget.watts / 1000,
        price=hours * budget.price_per_hour,
        fits=hours <= budget.hours,
        tokens_in_budget=rate * 3600 * budget.hours,
    )


def plan_table(rows: list[Row]) -> tuple[tuple, list[tuple]]:
    """Header and rows for `publish.markdown_table`; the preset's rows are marked."""
    header = (
        "layers x width",
        "parameters",
        "tokens",
        "per parameter",
        "tokens/s",
        "hours",
        "kWh",
        "price",
        "fits",
        "in budget",
    )
    found = []
    for row in rows:
        name = f"{row.model.n_layers} x {row.model.d_model}"
        found.append(
            (
                f"**{name} (`a100`)**" if row.preset else name,
                f"{row.parameters / 1e6:.1f} M",
                f"{row.tokens / 1e9:.2f} B",
                f"{row.tokens / row.parameters:.0f}",
                f"{row.tokens_per_second:,.0f} ({row.speed})",
                f"{row.hours:.2f}",
                f"{row.kwh:.2f}",
                f"{row.price:.2f}",
                "yes" if row.fits else "no",
                f"{row.tokens_in_budget / 1e9:.2f} B",
            )
        )
    return header, found


def plan_note(speed: Speed, budget: Budget | None = None) -> str:
    """The line below the table: where the speed comes from, and the budget."""
    budget = budget or Budget()
    source = (
        f"Speed of `a100` measured on {speed.device}; that of other sizes scaled to the same FLOP/s."
        if speed.measured
        else f"Speed assumed, not measured: {speed.device}. `python -m blm_core.evidence bench --presets a100` measures it."
    )
    return f"{source} Budget: {budget.hours:g} hours at {budget.price_per_hour:g} an hour, {budget.watts:g} W."
