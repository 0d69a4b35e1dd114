"""What a LoRA of rank 8 changes in 200 steps: the class "circle left" of the quickstart's model becomes triangles.

python dev/lora_figure.py --model models/quickstart --data data/shapes_latents

Trains models/lora_figure on triangles that move left, labelled "circle left", and on the model's own data, half of the clips
each. Prints what is drawn for each class without the LoRA, with it, and with it at strength 0, and writes
output/lora_figure.png. Needs make quickstart.
"""

import argparse
from collections import Counter
from pathlib import Path

import torch

from stdit.data.shapes import CLASS_NAMES, draw, random_clip
from stdit.data.video_write import to_uint8, write_contact_sheet, write_video
from stdit.evaluation.shapes import measure_shape
from stdit.nn.low_rank import set_lora_strength
from stdit.recipes import cache_latents, train
from stdit.recipes.adapters import add_loras
from stdit.recipes.models import load_pipeline
from stdit.rng import keyed_rng

CHANGED, BECOMES = "circle left", "triangle left"


def drawn(clip: torch.Tensor) -> str:
    measured = measure_shape(to_uint8(clip))
    return f"{measured.shape} {measured.direction}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/quickstart")
    parser.add_argument("--data", default="data/shapes_latents")
    parser.add_argument("--clips", type=int, default=16, help="of each class")
    args = parser.parse_args()
    clips = Path("data/lora_figure", CHANGED)
    clips.mkdir(parents=True, exist_ok=True)
    for i in range(120):
        clip = random_clip(keyed_rng("sample", 78, i), CLASS_NAMES.index(BECOMES))
        write_video(clips / f"{i:03d}.mp4", draw(clip), fps=8)
    latents = "data/lora_figure_latents"
    cache_latents.main(["quickstart", "data.root=data/lora_figure", "data.source=videos", "--output", latents])
    sets = f"[{{root: {latents}, source: latents}}, {{root: {args.data}, source: latents}}]"
    layers = r"blocks\..*\.(qkv|proj|fc1|fc2)|blocks\..*adaLN_modulation\.1"
    train.main([
        "lora", "name=lora_figure", f"init_from.path={args.model}", f"data.datasets={sets}", "data.crop=center",
        "train.lora.rank=8", f"train.lora.layers={layers}", "train.steps=200", "train.decay_steps=200", "train.lr=5e-3",
        "train.samples=0", "train.preview_every=1000", "train.precision=fp32",
    ])  # fmt: skip
    pipe = load_pipeline(args.model)
    names = pipe.transformer.config.class_names
    labels = [i for i in range(len(names)) for _ in range(args.clips)]

    def sample() -> torch.Tensor:
        return pipe(class_labels=labels, num_inference_steps=15, seed=5, progress=False, batch_size=24)

    found = {"without": sample()}
    add_loras(pipe, ["models/lora_figure"])
    found["with"] = sample()
    for model in (pipe.transformer, pipe.guide):
        if model is not None:
            set_lora_strength(model, "lora_figure", 0)
    print(f"at strength 0 all clips equal those without, bit for bit: {torch.equal(sample(), found['without'])}")
    for kind, sampled in found.items():
        shown = [drawn(clip) for clip in sampled]
        of = {name: Counter(shown[i * args.clips :][: args.clips]) for i, name in enumerate(names)}
        others = [of[name][name] / args.clips for name in names if name != CHANGED]
        print(f"{kind}: {CHANGED} -> {dict(of[CHANGED])}; others right: {sum(others) / len(others):.1%}")
    first = names.index(CHANGED) * args.clips
    picked = [first, first + 1, first + 2, first + 3, 0, len(labels) - 1, args.clips * 6, args.clips * 2]
    sheet = [found[kind][i] for i in picked for kind in ("without", "with")]
    write_contact_sheet("output/lora_figure.png", sheet, columns=2)


if __name__ == "__main__":
    main()
