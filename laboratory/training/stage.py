"""The loop that all training stages share: budget, learning rate, EMA, logs, and checkpoints that resume exactly.

All randomness of a step follows from (seed, stage, step). If the budget counts steps, an interrupted and continued run
therefore gives exactly the weights of an uninterrupted one.
"""

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lightforcing.lightforcing_core.files.output import whole_file

from .recipe import TrainingRecipe

WARM_UP = 50  # steps until the full learning rate
DECAY_FROM = 0.6  # share of the budget from which on the learning rate falls to 0
EMA = 0.999

StepLoss = Callable[[int], tuple[Tensor, Mapping[str, Tensor]]]
OnStep = Callable[[str, int, Mapping[str, float]], None]


class Paused(Exception):
    """The deadline has passed; everything is saved, and the same command continues from here."""


@dataclass(frozen=True)
class Session:
    """One call of the training.

    folder: holds checkpoints, logs and results. device: computes. on_step: called as on_step(stage, step, values).
    deadline: the moment, on time.monotonic's clock, at which a stage saves and raises Paused.
    """

    folder: Path
    device: torch.device
    on_step: OnStep | None = None
    deadline: float | None = None


def step_generator(seed: int, stage: str, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The random numbers of one step."""
    digest = hashlib.blake2b(f"{seed}/{stage}/{step}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def autocast(recipe: TrainingRecipe, device: torch.device) -> torch.autocast:
    """bfloat16 for the heavy operations, always on a GPU, on a CPU if the recipe says so."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" or recipe.bfloat16)


class Stage:
    """One stage's state: the module that learns, its moving average, the optimiser, and the number of steps done.

    Continues from `name`.pt in the session's folder if that exists. minutes: None counts steps alone.
    """

    def __init__(
        self,
        session: Session,
        name: str,
        module: nn.Module,
        *,
        rate: float,
        steps: int,
        minutes: float | None = None,
        save_every: int,
    ) -> None:
        self.session, self.name, self.module = session, name, module
        self.steps, self.minutes, self.save_every, self.rate = steps, minutes, save_every, rate
        self.ema = copy.deepcopy(module).requires_grad_(False)
        self.step, self.seconds, self.done = 0, 0.0, False
        self.optimiser = torch.optim.AdamW(module.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01)
        if self._file.exists():
            self._load()

    @property
    def _file(self) -> Path:
        return self.session.folder / f"{self.name}.pt"

    @property
    def _log(self) -> Path:
        return self.session.folder / f"{self.name}.jsonl"

    def run(self, step_loss: StepLoss) -> nn.Module:
        """Train to the end of the budget; `step_loss(step)` gives the loss and values to log. Returns the average."""
        self._cut_log()
        deadline, on_step = self.session.deadline, self.session.on_step
        began = time.monotonic() - self.seconds
        with self._log.open("a", encoding="utf-8") as log:
            while not self.done:
                for group in self.optimiser.param_groups:
                    group["lr"] = self.rate * self._rate_now()
                loss, values = step_loss(self.step)
                if not torch.isfinite(loss):
                    raise RuntimeError(f"{self.name}: the loss of step {self.step} is {loss.item()}; lower the rate")
                self.optimiser.zero_grad(set_to_none=True)
                loss.backward()
                norm = nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
                self.optimiser.step()
                self._average()
                self.step += 1
                self.seconds = time.monotonic() - began
                self.done = self.progress >= 1.0
                numbers = {key: value.item() for key, value in {"loss": loss, **values, "norm": norm}.items()}
                log.write(json.dumps({"step": self.step, "seconds": round(self.seconds, 2), **numbers}) + "\n")
                pauses = not self.done and deadline is not None and time.monotonic() > deadline
                if self.done or pauses or self.step % self.save_every == 0:
                    log.flush()
                    self._save()
                if on_step is not None:
                    on_step(self.name, self.step, numbers)
                if pauses:
                    raise Paused(f"{self.name} paused after step {self.step}; the same command continues from there")
        return self.ema

    @property
    def progress(self) -> float:
        """The share of the budget that is spent."""
        spent = self.step / self.steps
        return spent if self.minutes is None else max(spent, self.seconds / (60 * self.minutes))

    def _rate_now(self) -> float:
        falling = max(0.0, (self.progress - DECAY_FROM) / (1 - DECAY_FROM))
        return min(1.0, (self.step + 1) / WARM_UP) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, falling))))

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(EMA, (1 + self.step) / (10 + self.step))
        ours = list(self.module.parameters())
        torch._foreach_lerp_(list(self.ema.parameters()), ours, 1 - decay)

    def _save(self) -> None:
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "done": self.done,
            "module": self.module.state_dict(),
            "ema": self.ema.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }
        with whole_file(self._file) as partial:
            torch.save(state, partial)

    def _load(self) -> None:
        state = torch.load(self._file, map_location=next(self.module.parameters()).device, weights_only=True)
        self.step, self.seconds, self.done = state["step"], state["seconds"], state["done"]
        self.module.load_state_dict(state["module"])
        self.ema.load_state_dict(state["ema"])
        self.optimiser.load_state_dict(state["optimiser"])

    def _cut_log(self) -> None:
        """Drop the lines that an interrupted run logged after its last checkpoint."""
        if self._log.exists():
            lines = self._log.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= self.step]
            with whole_file(self._log) as partial:
                partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
