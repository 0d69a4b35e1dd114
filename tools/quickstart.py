"""The first command: draw moving shapes, encode them, train a video diffusion transformer, sample clips.

    make quickstart          (python tools/quickstart.py once the package is installed)

Run again, it keeps what is there and goes on where it stopped.
"""

import argparse
import sys
import time

import cache_latents
import make_shapes
import train

from stdit.precision import native_bf16

CONFIG = "configs/quickstart.yaml"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for tools/train.py")
    parser.add_argument("--num-clips", type=int, default=2400)
    args = parser.parse_args(argv)
    began = time.time()
    if not native_bf16():
        print("This CPU has no bfloat16 instructions: training runs in float32, at about two thirds of the speed.")
    print("1/3  drawing clips of moving shapes")
    make_shapes.main(["--output", "data/shapes", "--num-clips", str(args.num_clips)])
    print("2/3  encoding them with the tiny VAE")
    clips = ["data.root=data/shapes", "data.manifest=data/shapes/manifest.jsonl", "data.source=videos"]
    cache_latents.main([CONFIG, *clips, "--output", "data/shapes_latents"])
    print("3/3  training; samples appear in output/quickstart/samples as it goes")
    code = train.run([CONFIG, *args.overrides])
    if code == 0:
        print(
            f"done in {(time.time() - began) / 60:.1f} minutes. Look at output/quickstart/samples/contact_sheet.png, then try:"
        )
        print(
            '  .venv/bin/python tools/sample_video.py --model models/quickstart --class-label "triangle up" --frames 25 --guidance 3 --seed 1 --gif'
        )
    return code


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(str(error))
