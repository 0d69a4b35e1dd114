"""Captions of clips by a vision-language model of transformers, from a local folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from stdit.weights import check_fits, refuse_code

PROMPT = (
    "These are frames of one video, in order. Describe in one or two plain sentences what is seen, how it moves, and how the "
    "camera moves."
)


class Captioner:
    """A model that answers about pictures, of any class of transformers that does ("image-text-to-text").

    folder: its weights as safetensors, its processor and its chat template, all local; code in it is never run.
    Raises ValueError if it cannot be loaded.
    """

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu"):
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(
                f"--model {str(folder)!r} is no folder; give that of a vision-language model of transformers."
            )
        try:
            import transformers
        except ImportError as error:
            raise ValueError("captions need transformers: pip install 'stdit[transformers]'.") from error
        kinds: Any = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        loader: Any = transformers.AutoModelForImageTextToText
        refuse_code(folder, f"the model {str(folder)!r}", "a vision-language model")
        only: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
        try:
            config = transformers.AutoConfig.from_pretrained(folder, **only)
            if type(config) not in kinds:
                raise ValueError(
                    f"{config.model_type!r} answers no questions about pictures; use one such as Qwen2.5-VL"
                )
            check_fits(folder, lambda: loader.from_config(config))
            dtype = torch.float32 if torch.device(device).type == "cpu" else "auto"
            model = loader.from_pretrained(folder, use_safetensors=True, dtype=dtype, **only)
            self.processor: Any = transformers.AutoProcessor.from_pretrained(folder, **only)
        except (OSError, ValueError, ImportError) as error:
            said = " ".join(str(error).split())[:300].rstrip(".")
            if "torchvision" in said.lower():
                said = "its processor needs torchvision, with which stdit does not work; use a model without, such as LLaVA"
            raise ValueError(f"the model {str(folder)!r} cannot be loaded ({said}).") from error
        if not getattr(self.processor, "chat_template", None):
            raise ValueError(f"{str(folder)!r} has no chat template; use a model that was trained on instructions.")
        self.model = model.eval().to(device)

    @torch.no_grad()
    def __call__(self, frames: Sequence[np.ndarray], prompt: str = PROMPT, max_tokens: int = 200) -> str:
        """The most likely answer about frames (H, W, 3) uint8 of a clip, in one line."""
        pictures = [{"type": "image", "image": Image.fromarray(frame)} for frame in frames]
        messages = [{"role": "user", "content": [*pictures, {"type": "text", "text": prompt}]}]
        inputs = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device, dtype=self.model.dtype)
        made = self.model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
        answer = made[:, inputs["input_ids"].shape[1] :]
        return " ".join(self.processor.batch_decode(answer, skip_special_tokens=True)[0].split())
