"""The training loop, for any `Trainee`, through Accelerate: resumable, and equal on any number of processes.

The folder of results appears whole, at the end. Until then everything lies in a checkpoint folder keyed by
what the result depends on; the same command goes on from the newest checkpoint there.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, LoggerType
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from moa.baselines.prior import Prior
from moa.files import write_atomically
from moa.hashing import code_hash, file_hash, model_hash
from moa.machine import check_device, libraries, peak_gpu_memory, peak_memory
from moa.methods import ModelSource, Subject
from moa.training import checkpoint
from moa.training.checkpoint import Checkpoint
from moa.training.config import TrainConfig
from moa.training.dataset import Records, arrow_copies, batches, keyed_seed
from moa.training.operational import OPERATIONAL
from moa.training.trainee import Trainee
from moa.training.validation import ValidationGrid

LOSSES = ("loss", "loss_masked", "loss_router", "loss_object")
SCRATCH = "records"  # folder beside a run's checkpoints: records in a form that can be memory-mapped
LOG_COLUMNS = ("step", *LOSSES, "lr", "grad_norm", "seconds")


@dataclass
class Progress:
    """How far a run is; JSON-able, and part of every checkpoint."""

    step: int = 0  # optimizer steps done
    seconds: float = 0.0  # of these steps; what a kill took back does not count
    peak: int = 0  # resident memory, bytes, the most of any process that has trained
    gpu_peak: int = 0  # memory of its GPU, likewise
    rows: list[dict[str, float]] = field(default_factory=list)  # of log.csv
    sums: dict[str, float] = field(default_factory=dict)  # since the last row
    count: int = 0  # steps in `sums`
    began_with: str = ""  # the checkpoint that `--resume` named; "" when the run stands on its config alone


def run_key(config: TrainConfig, kind: str, records: Sequence[Path], code: str) -> str:
    """Names the checkpoint folder: settings with the device, records, models, code, libraries."""
    settings = {k: v for k, v in asdict(config).items() if k not in OPERATIONAL}
    models = [_fingerprint(config.prior), _fingerprint(config.image_encoder)]
    data = [file_hash(Path(path)) for path in records]
    return checkpoint.key(
        settings=settings, kind=kind, records=data, models=models, code=code, libraries=libraries()
    )


def code_of(name: str) -> str:
    """Hash of the code that trains `name`: another code does not go on from this one's checkpoints."""
    return code_hash(f"moa.training.{name}")


def _fingerprint(source: ModelSource) -> str:
    folder = Path(source.id)
    return model_hash(folder) if folder.exists() else f"{source.id}@{source.revision}"


def make_accelerator(config: TrainConfig, logs: Path | None = None) -> Accelerator:
    """Accelerate's state for this process: device and mixed precision; accumulation is the loop's own.

    `logs` is the folder of trackers that write files. Raises ValueError if the config's device or a tracker
    is not there: Accelerate by itself would take another device, and leave the tracker out.
    """
    check_device(config.device)
    check_trackers(config.trackers)
    return Accelerator(
        cpu=config.device == "cpu",
        mixed_precision=config.precision,
        log_with=list(config.trackers) or None,
        project_dir=logs,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


def check_trackers(names: Sequence[str]) -> None:
    """Raises ValueError for a tracker that Accelerate does not know or that is not installed."""
    installed = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(f"trackers: unknown {name!r}; Accelerate has {', '.join(LOGGER_TYPE_TO_CLASS)}")
        if name in LoggerType.list() and name not in installed:
            raise ValueError(f"trackers: {name} is not installed; run `pip install {name}`, or leave it out")


class Trainer:
    """One run: a trainee, its data, its optimizer and how far it is."""

    def __init__(
        self,
        trainee: Trainee,
        data: Records,
        folder: Path,
        accelerator: Accelerator,
        grid: ValidationGrid | None,
        resume: str = "latest",
    ) -> None:
        """`resume`: what to begin with, as `checkpoint.find` has it."""
        self.resumed = resume
        self.trainee, self.data, self.folder, self.accelerator = trainee, data, folder, accelerator
        self.config, self.grid = trainee.config, grid
        self.parameters = trainee.trained()
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=self.config.lr, weight_decay=self.config.weight_decay, fused=True
        )
        self.average = {n: p.detach().clone() for n, p in self.parameters.items()} if self.config.ema else {}
        self.progress = Progress()
        self.saved_at = time.monotonic()

    # --- Checkpoints ---

    def resume(self) -> None:
        """Go on from the checkpoint that was asked for, if there is one; see `checkpoint.find`.

        What this run's folder holds of later steps goes.
        """
        found = checkpoint.find(self.folder, self.resumed)
        if found is not None:
            self._restore(checkpoint.load(found))
        if self.resumed == "latest":
            return
        self.accelerator.wait_for_everyone()  # all have read
        if self.accelerator.is_main_process:
            checkpoint.rewind(self.folder, self.progress.step)
        if found is not None and not checkpoint.inside(found, self.folder):
            self.progress.began_with = str(found)
            self.save()

    def _restore(self, found: Checkpoint) -> None:
        """Raises ValueError if the checkpoint has other parameters, or more steps than the config."""
        self._check(found)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(found.weights[name])
        for name, value in self.average.items():
            value.copy_((found.average or found.weights)[name])
        checkpoint.restore_optimizer(self.optimizer, found.optimizer)
        self.progress = Progress(step=found.step, **found.state["progress"])
        if found.state.get("scaler") and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(found.state["scaler"])

    def _check(self, found: Checkpoint) -> None:
        shapes, own = ({n: v.shape for n, v in x.items()} for x in (found.weights, self.parameters))
        if shapes != own:
            name = min(n for n in shapes.keys() | own.keys() if shapes.get(n) != own.get(n))
            raise ValueError(
                f"--resume {self.resumed}: the checkpoint has other parameters ({name}: {shapes.get(name)} "
                f"there, {own.get(name)} here); train with the models and settings that it was made with"
            )
        if found.step > self.config.steps:
            raise ValueError(
                f"--resume {self.resumed}: the checkpoint has {found.step} steps, the config's `steps` is "
                f"{self.config.steps}; raise it"
            )

    def save(self) -> None:
        """Write a checkpoint; on the main process only."""
        if not self.accelerator.is_main_process:
            return
        self._note_peaks()
        progress = {k: v for k, v in asdict(self.progress).items() if k != "step"}
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None
        checkpoint.save(
            self.folder,
            Checkpoint(
                step=self.progress.step,
                weights=dict(self.parameters),
                average=self.average,
                optimizer=checkpoint.optimizer_tensors(self.optimizer),
                state={"progress": progress, "scaler": scaler},
            ),
            self.config.checkpoints_kept,
        )
        self.saved_at = time.monotonic()

    def _note_peaks(self) -> None:
        self.progress.peak = max(self.progress.peak, peak_memory())
        self.progress.gpu_peak = max(self.progress.gpu_peak, peak_gpu_memory())

    # --- Steps ---

    def train(self) -> None:
        """Run until `config.steps`."""
        self.resume()
        self._start_trackers()
        model, optimizer = self.accelerator.prepare(self.trainee, self.optimizer)
        first, config = self.progress.step, self.config
        parts = batches(self.data, first, self.accelerator.num_processes, self.accelerator.process_index)
        bar = tqdm(
            total=config.steps, initial=first, desc=f"train {self.trainee.name}", unit="step",
            disable=not self.accelerator.is_local_main_process, mininterval=5,
        )  # fmt: skip
        with bar:
            for _ in range(first, config.steps):
                started = time.monotonic()
                values = self._step(model, optimizer, parts)
                self.progress.seconds += time.monotonic() - started
                self._account(values)
                bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
                bar.update()
                self._milestones()

    def _step(self, model: torch.nn.Module, optimizer: Any, parts: Iterator[Any]) -> dict[str, float]:
        """One optimizer step; returns its losses over all processes, and the gradient's norm.

        Raises FloatingPointError when one of them is no number, before it reaches the weights.
        """
        config, sums = self.config, torch.zeros(len(LOSSES))
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate(self.progress.step)
        for part in range(config.accumulation):
            batch = next(parts).to(self.accelerator.device)
            last = part == config.accumulation - 1
            with nullcontext() if last else self.accelerator.no_sync(model):
                losses = model(batch)
                self.accelerator.backward(losses["loss"] / config.accumulation)
            sums += torch.stack([losses[k].detach().float().cpu() for k in LOSSES]) / config.accumulation
        norm = float(self.accelerator.clip_grad_norm_(list(self.parameters.values()), config.clip))
        means = self.accelerator.reduce(sums.to(self.accelerator.device), "mean").tolist()
        values = dict(zip(LOSSES, means, strict=True)) | {"grad_norm": norm}
        self._check_finite("loss", values["loss"])
        self._update(optimizer, norm)
        optimizer.zero_grad()
        self._average()
        return values

    def _update(self, optimizer: Any, norm: float) -> None:
        """The optimizer's step. Without a finite gradient there is none, but for one that the scaler skips.

        Whether it did shows in its scale: a fused optimizer is called all the same, and skips by itself.
        """
        scaler = self.accelerator.scaler
        if math.isfinite(norm) or scaler is None:
            self._check_finite("gradient's norm", norm)
            optimizer.step()
            return
        scale = scaler.get_scale()
        optimizer.step()
        if scaler.get_scale() >= scale:
            self._check_finite("gradient's norm", norm)

    def _check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the {what} is {value} at step {self.progress.step}: lower `lr` or change `precision`"
            )

    @torch.no_grad()
    def _average(self) -> None:
        if self.average:
            torch._foreach_lerp_(
                list(self.average.values()), list(self.parameters.values()), 1 - self.config.ema
            )

    def _account(self, values: Mapping[str, float]) -> None:
        """Count a step, and add a row to the log when one is due."""
        progress, config = self.progress, self.config
        progress.sums = {k: progress.sums.get(k, 0.0) + v for k, v in values.items()}
        progress.count += 1
        progress.step += 1
        if progress.step % config.log_every == 0 or progress.step == config.steps:
            means = {k: v / progress.count for k, v in progress.sums.items()}
            row = {"step": progress.step, "lr": config.learning_rate(progress.step - 1), **means}
            progress.rows.append(row | {"seconds": round(progress.seconds, 3)})
            self.accelerator.log({k: v for k, v in progress.rows[-1].items() if k != "step"}, progress.step)
            progress.sums, progress.count = {}, 0

    def _milestones(self) -> None:
        """Grid first, then checkpoint: a run that goes on from a checkpoint draws no grid of before it."""
        step, config = self.progress.step, self.config
        if config.validate_every and (step % config.validate_every == 0 or step == config.steps):
            self.validate()
        late = time.monotonic() - self.saved_at > config.checkpoint_seconds
        if late or step % config.checkpoint_every == 0 or step == config.steps:
            self.save()

    # --- Trackers ---

    def _start_trackers(self) -> None:
        """Hand the trackers the settings; a resumed run takes back what TensorBoard has of later steps."""
        if not self.config.trackers:
            return
        settings = {k: v if isinstance(v, int | float) else str(v) for k, v in asdict(self.config).items()}
        options = {"tensorboard": {"purge_step": self.progress.step + 1}}
        self.accelerator.init_trackers(self.trainee.name, settings, options)

    def _track_grid(self, image: Image.Image) -> None:
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"validation": np.asarray(image)[None]}, self.progress.step, **layout)

    # --- Results ---

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the `with` block the trainee holds the weights to save: running means, if there are any."""
        kept = {n: p.detach().clone() for n, p in self.parameters.items()} if self.average else {}
        try:
            _assign(self.parameters, self.average)
            yield
        finally:
            _assign(self.parameters, kept)

    def validate(self) -> None:
        """Draw the validation grid of this step, unless it is there already."""
        path = self.folder / "grids" / f"step-{self.progress.step:06d}.png"
        if self.grid is None or not self.accelerator.is_main_process or path.exists():
            return
        with self.averaged(), self.accelerator.autocast():
            image = self.grid.draw(self.trainee.method(self.config.validation_sampling))
        write_atomically(path, lambda part: image.save(part, format="PNG"))
        self._track_grid(image)

    def finish(self, output: Path) -> None:
        """Put weights, log, settings and grids into `output`, which appears at once; drop the checkpoints."""
        part = output.with_name(f".{output.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        with self.averaged():
            self.trainee.save(part)
        write_log(part / "log.csv", self.progress.rows)
        self._note_peaks()
        about = {
            "method": self.trainee.name,
            "config": asdict(self.config),
            "trained_parameters": sum(p.numel() for p in self.parameters.values()),
            "seconds": round(self.progress.seconds, 3),
            "peak_memory_bytes": self.progress.peak,
            "peak_gpu_bytes": self.progress.gpu_peak,
            "processes": self.accelerator.num_processes,
            "began_with": self.progress.began_with,
        }
        (part / "train.json").write_text(json.dumps(about, indent=1, sort_keys=True) + "\n")
        for grid in sorted((self.folder / "grids").glob("step-*.png")):
            shutil.copy(grid, part / grid.name)
        checkpoint.replace_folder(part, output)


@torch.no_grad()
def _assign(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        parameters[name].copy_(value)


def write_log(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """log.csv: nine significant digits, which a 32-bit float needs."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(LOG_COLUMNS)
        writer.writerows([f"{row[c]:.9g}" for c in LOG_COLUMNS] for row in rows)


def run(
    config: TrainConfig,
    trainee: Callable[[TrainConfig, str], Trainee],
    name: str,
    records: Sequence[Path],
    subjects: Sequence[Subject],
    output: Path,
    checkpoints: Path | None = None,
    resume: str = "latest",
    keep_checkpoints: bool = False,
) -> None:
    """Train from records to a folder of results.

    Args:
        config: settings.
        trainee: what to train; made from the config and a device, its chance following `config.seed`.
        name: of what is trained, and of its module in `moa.training`.
        records: shards of training records.
        subjects: for the validation grid.
        output: folder to make; replaced when it is there.
        checkpoints: folder of checkpoint folders; by default `.checkpoints` beside `output`'s parent.
        resume: `latest` goes on from the newest checkpoint of the same training, or begins it; `none` begins
            anew; the path of a checkpoint goes on from that one, whatever settings it was made with.
        keep_checkpoints: leave the last ones where they are, for another training to go on from.

    Raises:
        RuntimeError: another process trains the same.
        ValueError, FileNotFoundError: broken records, models or settings; the message says what to do.
    """
    config = config.on_this_machine()
    accelerator = make_accelerator(config, output.with_name(f"{output.name}-trackers"))
    config.part_size(accelerator.num_processes)
    root = checkpoints or output.parent.parent / ".checkpoints"
    folder = root / f"{output.name}-{run_key(config, name, records, code_of(name))}"
    folder, resume = checkpoint.own_folder(folder, resume)
    with checkpoint.locked(folder) if accelerator.is_main_process else nullcontext():
        accelerator.wait_for_everyone()
        trainer = build(config, trainee, records, folder, accelerator, subjects, resume)
        trainer.train()
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            trainer.finish(output)
            shutil.rmtree(folder / SCRATCH if keep_checkpoints else folder, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def build(
    config: TrainConfig,
    kind: Callable[[TrainConfig, str], Trainee],
    records: Sequence[Path],
    folder: Path,
    accelerator: Accelerator,
    subjects: Sequence[Subject],
    resume: str = "latest",
) -> Trainer:
    """Everything of a run, ready to train."""
    with torch.random.fork_rng():
        torch.manual_seed(keyed_seed(config.seed, "initial weights"))
        trainee = kind(config, str(accelerator.device))
    sizes, scratch = trainee.prior.sizes(trainee.crop_side()), folder / SCRATCH
    if not config.cache:
        with accelerator.main_process_first():  # the others find the copies
            arrow_copies(records, scratch)
    data = Records(records, config, sizes, trainee.prior.find_tokens, scratch)
    if config.cache:
        trainee.prior.fill(data)
    grid = None
    if config.validate_every and config.validation_prompts and subjects and accelerator.is_main_process:
        grid = ValidationGrid(subjects[: config.validation_subjects], config.validation_prompts, config.seed)
        with accelerator.autocast():
            grid.prepare(Prior(trainee.prior.pipe, config.validation_sampling))
    return Trainer(trainee, data, folder, accelerator, grid, resume)
