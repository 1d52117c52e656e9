"""What a run says while it trains: lines of JSON, and tensorboard or wandb where asked for."""

import contextlib
import json
from pathlib import Path

from blm_core.config import ConfigError, TrainConfig
from blm_core.files import written_aside


class RunLog:
    """`metrics.jsonl`, and tensorboard or wandb where asked for. Lines after the checkpoint are dropped on a restart."""

    def __init__(self, folder: Path, step: int, config: TrainConfig):
        path = folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        # a line that a kill cut in half belongs to a step that is repeated
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        with written_aside(path) as aside:
            aside.write_text("".join(line + "\n" for line in kept))
        self._board = self._wandb = None
        if config.tensorboard:
            with _needed("tensorboard"):
                from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step)
        if config.wandb:
            with _needed("wandb"):
                import wandb

            self._wandb = wandb.init(project="blm", dir=str(folder), name=folder.name, resume="allow", id=folder.name)
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 - open as long as the run

    def write(self, **values) -> None:
        self._file.write(json.dumps(values) + "\n")
        numbers = {k: v for k, v in values.items() if v is not None and k != "step"}
        if self._board:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, values["step"])
        if self._wandb:
            self._wandb.log(numbers, step=values["step"])

    def close(self) -> None:
        self._file.close()
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()


@contextlib.contextmanager
def _needed(package: str):
    """Raises ConfigError that names `package` where an import in the block fails."""
    try:
        yield
    except ImportError as error:
        raise ConfigError(
            f"train.{package}=true cannot be followed: {error}. Install the package {package}, or leave the setting out."
        ) from error


def metrics(folder: Path) -> tuple[list[dict], list[dict]]:
    """The lines of `metrics.jsonl`: those of training, those of validation."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [x for x in lines if "loss" in x], [x for x in lines if "validation_bits_per_byte" in x]
