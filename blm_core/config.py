"""Presets: everything that a run may vary, as frozen dataclasses.

- One preset is chosen by `BLM_PRESET`, else by the machine: `a100` on a large GPU, else `smoke`.
- Single values are overridden by `section.key=value`, on the command line or in `BLM_OVERRIDES`.
- Unknown keys and impossible combinations are refused by name.
- `BLM_ARCHIVE` and `BLM_VALIDATION` name other stories, `BLM_BUILD` the folder written to.
"""

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

ROOT = Path(__file__).resolve().parent.parent
HUB = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/"
ARCHIVE_URL = HUB + "TinyStories_all_data.tar.gz"
VALIDATION_URL = HUB + "TinyStoriesV2-GPT4-valid.txt"
GPU_BYTES = 39e9  # an A100 has 40 or 80 GB
SAMPLE = "sample"  # the embedded sample, packed into an archive and then treated like any other


class ConfigError(ValueError):
    """A preset, a key or a combination of values that cannot work."""


def _require(holds: bool, key: str, found, wanted: str) -> None:
    if not holds:
        raise ConfigError(f"{key} = {found!r} cannot be used: it must be {wanted}.")


def _within(config, interval: str, *names: str) -> None:
    """Require the named values to lie in an interval such as "[0, 1)"."""
    low, high = map(float, interval[1:-1].split(","))
    for name in names:
        found = getattr(config, name)
        inside = low <= found <= high and (found != low or interval[0] == "[") and (found != high or interval[-1] == "]")
        _require(inside, f"{config.section}.{name}", found, f"in {interval}")


def _one_of(config, **choices: tuple[str, ...]) -> None:
    for name, values in choices.items():
        _require(getattr(config, name) in values, f"{config.section}.{name}", getattr(config, name), " or ".join(values))


def build() -> Path:
    """The folder that everything is written to: `BLM_BUILD`, or `build/` where that is unset or empty."""
    return Path(os.environ.get("BLM_BUILD") or ROOT / "build")


@dataclass(frozen=True)
class DataConfig:
    """Where stories come from and which are kept."""

    section: ClassVar[str] = "data"
    archive: str = ARCHIVE_URL  # URL, local file, or "sample"
    validation_file: str = VALIDATION_URL  # official validation stories, URL or local file; "" for none
    min_characters: int = 100
    validation_share: float = 0.01  # of the archive's stories, chosen by a hash of the story
    near_duplicate: float = 0.5  # Jaccard similarity of 4-word shingles from which two stories count as one

    def __post_init__(self):
        _within(self, "(0, 1)", "validation_share")
        _within(self, "(0, 1]", "near_duplicate")
        _within(self, "[1, inf)", "min_characters")


@dataclass(frozen=True)
class TokenizerConfig:
    """The sentencepiece vocabulary."""

    section: ClassVar[str] = "tokenizer"
    vocab_size: int = 4096
    max_stories: int = 200_000  # stories that the vocabulary is learned from
    sweep: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)  # vocabulary sizes compared in 02_tokenizer
    # Copies of the data set separate paragraphs by one newline or by two. Cleaning keeps one; this share of the
    # training stories is written with two, so that the model meets both.
    blank_line_share: float = 0.125

    def __post_init__(self):
        _within(self, "[300, 65536]", "vocab_size")  # from the 256 bytes and some pieces to what 16 bits can name
        _within(self, "[1, inf)", "max_stories")
        _within(self, "[0, 1]", "blank_line_share")


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Llama family."""

    section: ClassVar[str] = "model"
    vocab_size: int = 4096
    n_layers: int = 6
    d_model: int = 256
    n_heads: int = 4
    n_kv_heads: int = 2
    d_ff: int = 704
    seq_len: int = 512
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5
    dropout: float = 0.0
    init_std: float = 0.02
    # Ablations: each of these can be GPT-2's instead. Only the first values can be saved as a Llama checkpoint.
    norm: str = "rms"  # or "layer"
    position: str = "rope"  # or "learned"
    feed_forward: str = "swiglu"  # or "gelu"

    @property
    def is_llama(self) -> bool:
        return (self.norm, self.position, self.feed_forward) == ("rms", "rope", "swiglu")

    @property
    def d_head(self) -> int:
        return self.d_model // self.n_heads

    def __post_init__(self):
        _within(self, "[1, inf)", "n_layers", "d_model", "n_heads", "n_kv_heads", "d_ff", "seq_len", "vocab_size")
        _require(self.d_model % self.n_heads == 0, "model.n_heads", self.n_heads, f"a divisor of d_model ({self.d_model})")
        _require(
            self.n_heads % self.n_kv_heads == 0, "model.n_kv_heads", self.n_kv_heads, f"a divisor of n_heads ({self.n_heads})"
        )
        _require(self.d_head % 2 == 0, "model.n_heads", self.n_heads, f"such that the head size ({self.d_head}) is even")
        _within(self, "[0, 1)", "dropout")
        _within(self, "(0, inf)", "rope_base", "norm_eps", "init_std")
        _one_of(self, norm=("rms", "layer"), position=("rope", "learned"), feed_forward=("swiglu", "gelu"))


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Steps and tokens count the whole batch of all processes."""

    section: ClassVar[str] = "train"
    seed: int = 1
    steps: int = 1000
    batch_size: int = 32  # windows of `seq_len` tokens per step
    micro_batch_size: int = 32  # windows per forward pass and process
    max_stories: int = 0  # train on the first so many stories only; 0 takes all
    isolate_stories: bool = True  # forbid attention between the stories of a window
    optimizer: str = "muon"  # for the matrices of the blocks, AdamW for the rest; or "adamw" for all
    learning_rate: float = 1e-3
    schedule: str = "cosine"  # or "wsd": warm-up, stable, decay
    warmup_steps: int = 200
    decay_share: float = 0.2  # of the steps, for "wsd"
    final_learning_rate: float = 0.0  # share of the peak that is left at the end
    beta1: float = 0.9
    beta2: float = 0.95
    momentum: float = 0.95  # of Muon
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    teacher_weight: float = 0.0  # share of the loss that asks for the mean prediction of the preset's teachers
    device: str = "auto"  # cuda if there is one, else cpu
    dtype: str = "auto"  # of autocast: bfloat16, or float32 for none; auto is bfloat16 where the device multiplies it fast
    compile: bool = False
    eval_every: int = 400  # steps
    eval_stories: int = 400
    log_every: int = 10  # steps
    checkpoint_minutes: float = 5.0
    wandb: bool = False

    def __post_init__(self):
        _one_of(self, schedule=("cosine", "wsd"), dtype=("auto", "bfloat16", "float32"), optimizer=("muon", "adamw"))
        _within(self, "[1, inf)", "steps", "batch_size", "micro_batch_size", "eval_every", "eval_stories", "log_every")
        size, warmup = self.micro_batch_size, self.warmup_steps
        _require(self.batch_size % size == 0, "train.micro_batch_size", size, f"a divisor of batch_size ({self.batch_size})")
        _require(0 <= warmup < self.steps, "train.warmup_steps", warmup, f"below steps ({self.steps})")
        _within(self, "[0, 1)", "beta1", "beta2", "momentum")
        _within(self, "[0, 1]", "final_learning_rate", "teacher_weight")
        _within(self, "(0, 1)", "learning_rate")
        _within(self, "(0, 1]", "decay_share")
        _within(self, "[0, inf)", "max_stories", "weight_decay", "checkpoint_minutes")
        _within(self, "(0, inf]", "max_grad_norm")


@dataclass(frozen=True)
class Preset:
    """All of it under one name."""

    name: str
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    samples: int = 8  # stories sampled per figure or table
    # Models to learn from, trained first: each a set of overrides of this preset, such as "train.seed=2 model.d_model=512".
    teachers: tuple[str, ...] = ()
    opponent: str = "gpt2-xl"  # hub name or folder, overruled by `BLM_GPT2XL`; "" for none

    def __post_init__(self):
        _require(self.samples >= 1, "samples", self.samples, "at least 1")
        learned, size, weight = self.tokenizer.vocab_size, self.model.vocab_size, self.train.teacher_weight
        _require(size == learned, "model.vocab_size", size, f"equal to tokenizer.vocab_size ({learned})")
        _require(bool(self.teachers) == (weight > 0), "train.teacher_weight", weight, "above 0 with teachers, and 0 without")

    def teacher(self, number: int) -> "Preset":
        """The preset of teacher `number`, from 0."""
        alone = dataclasses.replace(self, teachers=(), train=dataclasses.replace(self.train, teacher_weight=0.0))
        return override(alone, self.teachers[number].split())

    @property
    def tokens_per_step(self) -> int:
        return self.train.batch_size * self.model.seq_len

    @property
    def folder(self) -> Path:
        """Where this preset writes; ignored by git."""
        return build() / self.name


SMOKE = Preset(
    name="smoke",
    data=DataConfig(archive=SAMPLE, validation_file="", validation_share=0.1),
    tokenizer=TokenizerConfig(vocab_size=512, sweep=(320, 512, 1024)),
    model=ModelConfig(vocab_size=512, n_layers=2, d_model=64, n_heads=4, n_kv_heads=2, d_ff=176, seq_len=128),
    train=TrainConfig(
        steps=150,
        batch_size=16,
        micro_batch_size=16,
        isolate_stories=False,
        learning_rate=4e-3,
        warmup_steps=15,
        final_learning_rate=0.1,
        eval_every=50,
        eval_stories=20,
    ),
    samples=2,
    opponent="",
)
# The proxy that the experiments of 04_train vary: a minute and a half on two cores.
STUDY = Preset(
    name="study",
    tokenizer=TokenizerConfig(vocab_size=2048, sweep=(2048,)),
    model=ModelConfig(vocab_size=2048, n_layers=4, d_model=96, n_heads=3, n_kv_heads=3, d_ff=256),
    train=TrainConfig(
        steps=250, batch_size=8, micro_batch_size=8, learning_rate=1.6e-2, warmup_steps=25, eval_every=125, eval_stories=200
    ),
    opponent="",
)
# 4,400 steps of 8,192 tokens are 36 M tokens, some eight epochs of the stories at hand, so dropout pays: two to three
# hours on two cores that multiply bfloat16.
CPU = Preset(
    name="cpu",
    model=ModelConfig(n_layers=8, d_model=256, n_heads=4, n_kv_heads=2, d_ff=704, dropout=0.1),
    train=TrainConfig(steps=4400, batch_size=16, micro_batch_size=8, learning_rate=8e-3, compile=True),
)
# Text is scarce and a GPU is fast: four wider models with other seeds learn it first, and the model learns from their
# mean prediction beside the text itself. Minutes on an H200.
DISTILLED = Preset(
    name="distilled",
    model=ModelConfig(n_layers=12, d_model=256, n_heads=4, n_kv_heads=2, d_ff=704, dropout=0.1),
    train=TrainConfig(steps=4800, learning_rate=6e-3, teacher_weight=0.7, compile=True),
    teachers=tuple(
        f"train.seed={seed} train.steps=3600 train.learning_rate={rate} train.weight_decay={decay} model.dropout={dropout} "
        "model.n_layers=8 model.d_model=384 model.n_heads=6 model.n_kv_heads=3 model.d_ff=1056"
        for seed, rate, decay, dropout in ((2, 3e-3, 0.3, 0.15), (3, 4e-3, 0.1, 0.2), (4, 4e-3, 0.3, 0.1), (5, 6e-3, 0.2, 0.15))
    ),
)
# 20,000 steps of 524,288 tokens are 10.5 B tokens; the reasoning stands in 04_train.
A100 = Preset(
    name="a100",
    tokenizer=TokenizerConfig(vocab_size=8192, max_stories=500_000, sweep=(2048, 4096, 8192, 16_384, 32_768)),
    model=ModelConfig(vocab_size=8192, n_layers=12, d_model=576, n_heads=9, n_kv_heads=3, d_ff=1536),
    train=TrainConfig(
        steps=20_000,
        batch_size=1024,
        micro_batch_size=128,
        learning_rate=4e-3,
        warmup_steps=500,
        dtype="bfloat16",
        compile=True,
        eval_every=500,
        eval_stories=2000,
    ),
)
PRESETS = {preset.name: preset for preset in (SMOKE, STUDY, CPU, DISTILLED, A100)}


def settings(preset: Preset) -> dict:
    """Every key that `override` knows, with its value."""
    known = {}
    for name, part in vars(preset).items():
        if dataclasses.is_dataclass(part):
            known |= {f"{name}.{key}": value for key, value in vars(part).items()}
        elif name != "name":
            known[name] = part
    return known


def override(preset: Preset, assignments: list[str]) -> Preset:
    """A preset with `section.key=value` applied.

    Setting `tokenizer.vocab_size` or `model.vocab_size` sets both. All assignments are applied before the result is checked,
    so that values that only fit together can be changed together. Raises ConfigError.
    """
    known, changed = settings(preset), {}
    for assignment in assignments:
        key, equals, text = map(str.strip, assignment.partition("="))
        if not equals or key not in known:
            raise ConfigError(f"unknown setting {assignment!r}; use section.key=value with one of: {', '.join(known)}")
        for same in ("tokenizer.vocab_size", "model.vocab_size") if key.endswith(".vocab_size") else (key,):
            section, _, name = same.rpartition(".")
            changed.setdefault(section, {})[name] = _parse(text, known[key], key)
    plain = changed.pop("", {})
    parts = {section: dataclasses.replace(getattr(preset, section), **values) for section, values in changed.items()}
    return dataclasses.replace(preset, **parts, **plain)


def _parse(text: str, example, key: str):
    """`text` as the type of the value that it replaces."""
    try:
        if isinstance(example, bool):
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if isinstance(example, tuple):
            return tuple(type(example[0] if example else "")(item) for item in text.split(",") if item)
        return type(example)(text)
    except (KeyError, ValueError):
        raise ConfigError(f"{key} = {text!r} cannot be read as {type(example).__name__} (now {example!r}).") from None


def chosen() -> tuple[str, str]:
    """The name of the preset that `load` takes on this machine, and why: BLM_PRESET, else what fits the GPU."""
    if named := os.environ.get("BLM_PRESET"):
        return named, f"BLM_PRESET is {named}"
    import torch  # not above: the processes that clean stories import this module and need no PyTorch

    if not torch.cuda.is_available():
        return "smoke", "BLM_PRESET is not set and there is no GPU"
    gpu = torch.cuda.get_device_properties(0)
    found = f"BLM_PRESET is not set and the GPU is {gpu.name}, {gpu.total_memory / 1e9:.0f} GB"
    if gpu.major >= 8 and gpu.total_memory >= GPU_BYTES:  # Ampere and later multiply bfloat16
        return "a100", found
    return "smoke", f"{found}; a100 needs bfloat16 and {GPU_BYTES / 1e9:.0f} GB"


def introduce(preset: Preset) -> str:
    """What the first cell of a notebook prints: the preset, why it was taken, and how to take another."""
    others = ", ".join(name for name in PRESETS if name != preset.name)
    return (
        f"Preset {preset.name}: {chosen()[1]}.\n"
        f"To take another ({others}), set BLM_PRESET before Jupyter starts, "
        f"or write %env BLM_PRESET={'cpu' if preset.name != 'cpu' else 'smoke'} in a cell above this one."
    )


def load(name: str | None = None, overrides: list[str] | None = None) -> Preset:
    """The preset `name` (or the one that `chosen` names) with the environment's and the given overrides applied."""
    name = name or chosen()[0]
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; BLM_PRESET may be one of: {', '.join(PRESETS)}")
    places = {"data.archive": "BLM_ARCHIVE", "data.validation_file": "BLM_VALIDATION"}
    if name == "smoke":  # always the embedded sample: it has to run the same everywhere
        places = {}
    named = [f"{key}={os.environ[variable]}" for key, variable in places.items() if os.environ.get(variable)]
    return override(PRESETS[name], [*named, *os.environ.get("BLM_OVERRIDES", "").split(), *(overrides or [])])


def to_dict(config) -> dict:
    """A configuration as plain values, for JSON."""
    return dataclasses.asdict(config)
