"""The training run as Lightning sees it. Imported only when a run starts, since Lightning takes seconds to import."""

import io
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from saccade.data import Augment, ImageData, normalize
from saccade.errors import DivergedError
from saccade.training.batches import Batch, Batches, make_loader, mix, num_images
from saccade.training.checkpoint import load_pickled, write_whole
from saccade.training.evaluate import at_least_float32, check_logits, judge
from saccade.training.recipe import learning_rate, parameter_groups
from saccade.training.settings import TrainSettings

__all__ = ["AverageWeights", "Course", "Report", "WholeFiles"]

_CHECK_EVERY = 25  # steps between looks at the losses, since each look waits for the GPU

Report = Callable[[dict[str, Any]], None]


class Course(LightningModule):
    """Train `model`, validate it after each epoch, save everything to `last`, then report the epoch.

    All randomness of a step follows from (seed, epoch, step, process), so a run that goes on from `last` takes the same
    steps as one that was never stopped.
    """

    def __init__(
        self, model: nn.Module, data: ImageData, settings: TrainSettings, last: Path, report: Report | None
    ) -> None:
        super().__init__()
        self.model = model
        self.augment = Augment(settings.augment, data.image_size, mean=data.mean, std=data.std)
        self.data, self.settings, self.last, self.report = data, settings, last, report
        self.history: list[dict[str, Any]] = []

    def train_dataloader(self) -> DataLoader[Batch]:
        return self._load(self.data.train, self.settings.seed)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._load(self.data.val, None)

    def _load(self, dataset: Dataset, seed: int | None) -> DataLoader[Batch]:
        rank, world = self.trainer.global_rank, self.trainer.world_size
        count = num_images(dataset)
        return make_loader(dataset, Batches(count, self.settings.batch_size, rank=rank, world=world, seed=seed))

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            fully_shard(self.model, mesh=self.trainer.strategy.device_mesh["data_parallel"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        fused = self.trainer.precision != "16-mixed"  # fused AdamW unscales float16 gradients after they were clipped
        groups = parameter_groups(self.model, self.settings.weight_decay)
        return torch.optim.AdamW(groups, lr=self.settings.learning_rate, fused=fused)

    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        if self.settings.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)

    def on_train_epoch_start(self) -> None:
        self._started = time.perf_counter()
        self._losses: list[Tensor] = []

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self._rate(batch_idx)
        # torch.manual_seed would also note down, at half a millisecond a step, what to do should a GPU appear
        seed = torch.default_generator.manual_seed if self.device.type == "cpu" else torch.manual_seed
        seed(mix(self.settings.seed, self.current_epoch, batch_idx, self.global_rank))

    def _rate(self, batch_idx: int) -> float:
        return learning_rate(self.settings, self.current_epoch * self._steps + batch_idx, self._steps)

    @property
    def _steps(self) -> int:
        return int(self.trainer.num_training_batches)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits = self._classify(batch)
        smoothing = self.settings.label_smoothing
        loss = cross_entropy(at_least_float32(logits), batch.labels, label_smoothing=smoothing) * batch.share
        self._losses.append(loss.detach())
        return loss

    def _classify(self, batch: Batch) -> Tensor:
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):  # half precision would misplace pixels
            images = self.augment(normalize(batch.images, self.data.mean, self.data.std))
        logits = self.model(images)
        check_logits(logits, len(images), len(self.data.classes))
        return logits

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if (batch_idx + 1) % _CHECK_EVERY and batch_idx + 1 < self._steps:
            return
        bad = (~torch.stack(self._losses).isfinite()).nonzero().flatten().tolist()
        if self.trainer.strategy.reduce_boolean_decision(bool(bad), all=False):  # all processes stop together
            step = bad[0] if bad else batch_idx
            raise self._diverged("training", f"step {step + 1} of {self._steps}, learning rate {self._rate(step):.3g}")

    def _diverged(self, which: str, place: str) -> DivergedError:
        settings = self.settings
        advice = [f"learning_rate={settings.learning_rate / 3:.2g} (it was {settings.learning_rate:g})"]
        if not 0 < settings.clip_norm <= 1:
            advice.append(f"clip_norm=1 (it was {settings.clip_norm:g})")
        if self.trainer.precision != "32-true":
            advice.append(f"precision='32' (it was {self.trainer.precision})")
        return DivergedError(
            f"the {which} loss became NaN or infinite in epoch {self.current_epoch + 1} of {settings.epochs}, {place}: "
            f"start anew in another folder with {', '.join(advice)}, or a longer warm-up"
        )

    def on_validation_epoch_start(self) -> None:
        kinds = (torch.long, torch.long, torch.float)
        self._found = [torch.zeros(len(self.data.val), dtype=kind, device=self.device) for kind in kinds]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        for table, values in zip(self._found, judge(self._classify(batch), batch.labels)):
            table[batch.indices] = values.to(table.dtype)

    def on_validation_epoch_end(self) -> None:
        # each image was seen by one process and is zero in the others
        self._found = [self.trainer.strategy.reduce(table, reduce_op="sum").cpu() for table in self._found]

    def on_train_epoch_end(self) -> None:
        _, correct, losses = self._found
        before = self.history[-1]["seconds"] if self.history else 0.0
        row = {
            "epoch": self.current_epoch,
            "train_loss": self.trainer.strategy.reduce(torch.stack(self._losses).mean(), reduce_op="mean").item(),
            "val_loss": losses.mean().item(),
            "val_accuracy": correct.double().mean().item(),
            "seconds": before + time.perf_counter() - self._started,
        }
        if not math.isfinite(row["val_loss"]):
            raise self._diverged("validation", "after its last step")
        self.history.append(row)
        self.trainer.save_checkpoint(self.last)
        if self.report and self.trainer.is_global_zero:
            self.report({**row, "epochs": self.settings.epochs})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        predicted, correct, _ = self._found
        checkpoint["saccade"] = {"history": self.history, "predicted": predicted, "correct": correct.bool()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.history = checkpoint["saccade"]["history"]


class AverageWeights(Callback):
    """Keep an exponential moving average of the weights, put it in their place for validation, and save it as well.

    Running statistics are averaged like weights. Integer buffers are not, since an average would break a table of
    indices (Lightning's own callback does that), nor are buffers with infinities, such as masks.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._loaded: dict[str, Any] | None = None

    def on_load_checkpoint(self, trainer: Any, course: Any, checkpoint: dict[str, Any]) -> None:
        self._loaded = checkpoint["average"]

    def on_train_start(self, trainer: Any, course: Any) -> None:
        floats = [buffer for buffer in course.model.buffers() if buffer.is_floating_point()]
        self._tensors = [*course.model.parameters(), *(buffer for buffer in floats if buffer.isfinite().all())]
        self._average = [weight.clone() for weight in self._weights()]
        if self._loaded is not None:
            set_model_state_dict(course, self._loaded, options=StateDictOptions(full_state_dict=True))
            self._swap(course.model)
            self._loaded = None

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        steps = trainer.global_step
        decay = min(self.decay, (1 + steps) / (10 + steps))
        torch._foreach_lerp_(self._average, self._weights(), 1 - decay)

    def on_validation_start(self, trainer: Any, course: Any) -> None:
        self._swap(course.model)

    def on_validation_end(self, trainer: Any, course: Any) -> None:
        self._swap(course.model)

    def on_save_checkpoint(self, trainer: Any, course: Any, checkpoint: dict[str, Any]) -> None:
        self._swap(course.model)
        state = trainer.strategy.lightning_module_state_dict()
        checkpoint["average"] = {name: tensor.cpu().clone() for name, tensor in state.items()}
        self._swap(course.model)

    def _weights(self) -> list[Tensor]:
        tensors = [tensor.detach() for tensor in self._tensors]
        return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]

    def _swap(self, model: nn.Module) -> None:
        if isinstance(model, FSDPModule):
            model.reshard()  # throws away gathered weights, which the next step would use once more
        weights = self._weights()
        kept = [weight.clone() for weight in weights]
        torch._foreach_copy_(weights, self._average)
        torch._foreach_copy_(self._average, kept)


class WholeFiles(TorchCheckpointIO):
    """Write Lightning's checkpoints whole or not at all, and read them without running code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_whole(Path(path), buffer.getvalue())

    def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> dict[str, Any]:
        return load_pickled(Path(path))
