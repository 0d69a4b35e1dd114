"""Previews of a run: the processes share out what is sampled, so that none waits for another, and the main one writes it."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from stdit.progress import Progress
from stdit.training.background import reason_of


@dataclass
class Previews:
    """What a run shows of its model.

    count: how many parts it has, such as clips. sample: of (model, numbers of parts) those parts, of any kind that can be sent to
    another process. write: of (all parts in order, step) the files of clips and pictures that it wrote, by name.
    """

    count: int
    sample: Callable[[Any, Sequence[int]], list]
    write: Callable[[list, int], Mapping[str, Path]]
    at_end: bool = False  # also after the last step

    def numbers(self, accelerator: Accelerator) -> range:
        """The parts that this process samples."""
        return range(accelerator.process_index, self.count, accelerator.num_processes)

    def sample_together(self, whole: Callable[[], Any], step: int, accelerator: Accelerator) -> list | None:
        """All parts, in order; all processes must call it. whole: gives the model to sample from, in all of them.

        If that fails in some process, for example because of the memory it takes, None: it is said, and the run goes on.
        """
        mine, failed = [], ""
        try:
            model, numbers = whole(), self.numbers(accelerator)
            mine = self.sample(model, numbers) if numbers else []
        except Exception as error:  # of any kind: the other processes wait for this one below
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            failed = reason_of(error)
        parts: dict[int, Any] = {}
        for process in range(min(self.count, accelerator.num_processes)):  # one at a time: a clip takes megabytes
            sent = [(mine, failed)]
            if accelerator.num_processes > 1:
                broadcast_object_list(sent, from_process=process)
            found, reason = sent[0]
            failed = failed or reason
            parts |= zip(range(process, self.count, accelerator.num_processes), found, strict=False)
        if not failed:
            return [parts[number] for number in range(self.count)]
        if accelerator.is_main_process:
            Progress.write(
                f"the preview of step {step} failed ({failed}); training goes on. Lower train.samples if memory ran out, or "
                "set train.preview_every higher than train.steps.",
                file=sys.stderr,
            )
        return None
