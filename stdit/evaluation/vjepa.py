"""Features of clips by V-JEPA 2, a video encoder of transformers, from a local folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stdit.files import read_json
from stdit.weights import check_fits, refuse_code

# Of ImageNet, by which all of its weights were trained.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class VideoEncoder(NamedTuple):
    """An encoder from pixels (B, 3, F, H, W) in [-1, 1] to features (B, D), and what it is called."""

    name: str
    run: Callable[[Tensor], Tensor]


def load_vjepa2(path: str) -> VideoEncoder:
    """Load the folder of a V-JEPA 2: its mean token, or the output of its attentive pooler if it was trained to classify.

    Assran et al., "V-JEPA 2". Frames are resized and cropped as its own processor does, which would need torchvision.
    Raises ValueError if it cannot be loaded; nothing is downloaded, and code in the folder is never run.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"vjepa2={path!r} is no folder; give that of a V-JEPA 2 of transformers.")
    try:
        import transformers
    except ImportError as error:
        raise ValueError("features vjepa2=FOLDER need transformers: pip install 'stdit[transformers]'.") from error
    what = f"vjepa2={path!r}"
    refuse_code(folder, what, "V-JEPA 2")
    found = read_json(folder / "config.json")
    if found.get("model_type") != "vjepa2":
        raise ValueError(f"{what} is a {found.get('model_type')!r}; give the folder of a V-JEPA 2.")
    classifies = "VJEPA2ForVideoClassification" in (found.get("architectures") or ())
    cls: Any = transformers.VJEPA2ForVideoClassification if classifies else transformers.VJEPA2Model
    only: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}
    try:
        config = transformers.VJEPA2Config.from_pretrained(folder, local_files_only=True)
        check_fits(folder, lambda: cls(config))
        model, report = cls.from_pretrained(folder, output_loading_info=True, dtype=torch.float32, **only)
    except OSError as error:
        raise ValueError(f"{what} cannot be loaded ({' '.join(str(error).split())[:200]}).") from error
    if report["missing_keys"] or report["mismatched_keys"]:
        lacking = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        raise ValueError(f"{what} lacks {len(lacking)} weights, such as {lacking[0]!r}; download it again.")
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    model = model.eval().to(device)

    @torch.no_grad()
    def run(pixels: Tensor) -> Tensor:
        frames = prepare(pixels.to(device).float(), config.crop_size, config.tubelet_size)
        encoder = model.vjepa2 if classifies else model
        tokens = encoder(frames, skip_predictor=True).last_hidden_state
        return (model.pooler(tokens) if classifies else tokens.mean(1)).cpu()

    pooled = "its attentive pooler" if classifies else "its mean token"
    size = f"{config.num_hidden_layers} layers of width {config.hidden_size}, {config.crop_size} px"
    return VideoEncoder(f"V-JEPA 2 in {folder.name} ({size}), {pooled}", run)


def prepare(pixels: Tensor, side: int, tubelet: int) -> Tensor:
    """(B, 3, F, H, W) in [-1, 1] -> frames (B, F', 3, side, side) as V-JEPA 2 takes them.

    The shorter side becomes 8/7 of `side`, whose centre is cropped; the last frame is repeated to whole tubelets.
    """
    frames = torch.cat([pixels, pixels[:, :, -1:].expand(-1, -1, -pixels.shape[2] % tubelet, -1, -1)], dim=2).transpose(
        1, 2
    )
    height, width = frames.shape[3:]
    shorter = int(side * 256 / 224)
    if height <= width:
        size = shorter, int(shorter * width / height)
    else:
        size = int(shorter * height / width), shorter
    flat = F.interpolate((frames.flatten(0, 1) + 1) / 2, size, mode="bilinear", antialias=True).clamp(0, 1)
    top, left = round((size[0] - side) / 2), round((size[1] - side) / 2)
    flat = flat[:, :, top : top + side, left : left + side]
    mean, std = (torch.tensor(values, device=flat.device)[:, None, None] for values in (_MEAN, _STD))
    return ((flat - mean) / std).unflatten(0, frames.shape[:2])
