"""Write the pictures of README and docs that models make: docs/gallery/*.webp, docs/few-steps.png and docs/grounds.png.

python dev/make_gallery.py [quickstart] [tasks] [room]     from the models of these names
python dev/make_gallery.py few_steps                       from quickstart and quickstart_few
python dev/make_gallery.py grounds                         from quickstart
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from stdit import STDiTPipeline
from stdit.data.video_write import to_uint8
from stdit.evaluation.held_out import held_out
from stdit.evaluation.operations import mark_generated
from stdit.evaluation.shapes import measure_shape
from stdit.pixels import to_float
from stdit.rng import keyed_rng
from stdit.worlds.environments import environment_of
from stdit.worlds.policies import make_policy
from stdit.worlds.record import read_info

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "gallery"
SCALE = 2  # screen pixels of a pixel


def tile(clips: list[np.ndarray], columns: int, gap: int = 4) -> np.ndarray:
    """Clips (F, H, W, 3) of one size beside each other, on white; shorter ones begin anew."""
    frames = max(map(len, clips))
    clips = [clip[np.arange(frames) % len(clip)].repeat(SCALE, 1).repeat(SCALE, 2) for clip in clips]
    clips = [np.pad(clip, ((0, 0), (gap, 0), (gap, 0), (0, 0)), constant_values=255) for clip in clips]
    rows = [np.concatenate(clips[i : i + columns], 2) for i in range(0, len(clips), columns)]
    return np.concatenate(rows, 1)


def write(name: str, frames: np.ndarray, fps: float) -> None:
    """Write an animated WebP that loops, and stands still for a moment at its end."""
    FOLDER.mkdir(exist_ok=True)
    pictures = [Image.fromarray(frame) for frame in frames]
    durations = [round(1000 / fps)] * (len(pictures) - 1) + [600]
    path = FOLDER / f"{name}.webp"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0, quality=70, method=6)
    print(f"{path}: {len(frames)} frames, {path.stat().st_size / 1000:.0f} kB")


def quickstart() -> None:
    """A clip of every class."""
    pipe = STDiTPipeline.from_pretrained("models/quickstart")
    clips = pipe(class_labels=list(range(12)), seed=1, progress=False)
    write("quickstart", tile([to_uint8(clip) for clip in clips], 6), pipe.config.fps)


def tasks() -> None:
    """Extended, connected, looped and animated clips, with a line above what was generated."""
    pipe = STDiTPipeline.from_pretrained("models/quickstart")
    data = held_out(4, pipe.config.num_frames, "straight", pipe.config.height, seed=3)
    first, names, options = data.pixels, data.class_names, {"progress": False}
    results = [
        (pipe.extend(first[:1, :, :5], after=12, class_labels=names[0], **options), slice(5, None)),
        (pipe.connect(first[1:2, :, :5], first[1:2, :, 13:], 8, names[1], **options), slice(5, 13)),
        (pipe.loop(first[2:3, :, :9], 8, names[2], **options), slice(9, None)),
        (pipe.animate(first[3:4, :, 0], class_labels=names[3], **options), slice(1, None)),
    ]
    clips = []
    for clip, new in results:
        generated = torch.zeros(clip.shape[2], dtype=torch.bool)
        generated[new] = True
        clips.append(mark_generated(to_uint8(clip[0]), generated))
    write("tasks", tile(clips, 4), pipe.config.fps)


def few_steps() -> None:
    """First and last frame of a clip of every class, of the same noise, in more and more evaluations."""
    few, teacher = (STDiTPipeline.from_pretrained(f"models/{name}") for name in ("quickstart_few", "quickstart"))
    labels, margin, rows = list(range(12)), 60, []
    # The flow map has learnt guidance, and four of its steps are best shifted (README). The teacher's 30 steps take 55
    # evaluations, since those at the levels that are not guided take one.
    for evaluations, pipe, steps, shift in ((1, few, 1, None), (2, few, 2, None), (4, few, 4, 6.0), (8, few, 8, None),
                                            (55, teacher, 30, None)):  # fmt: skip
        clips = pipe(class_labels=labels, seed=1, num_inference_steps=steps, shift=shift, progress=False)
        frames = np.concatenate([to_uint8(clip)[[0, -1]] for clip in clips])
        row = np.pad(frames, ((0, 0), (0, 4), (0, 2), (0, 0)), constant_values=255)
        picture = Image.fromarray(np.pad(np.concatenate(row, 1), ((0, 0), (margin, 0), (0, 0)), constant_values=255))
        ImageDraw.Draw(picture).text((4, picture.height // 2 - 8), f"{evaluations} eval.", fill="black")
        rows.append(np.asarray(picture))
    path = FOLDER.parent / "few-steps.png"
    Image.fromarray(np.concatenate(rows)).save(path)
    print(path)


def grounds(count: int = 8, side: int = 24, enlarged: int = 4) -> None:
    """Plain ground of clips of the model, enlarged to the nearest pixel; below, with ten times the contrast."""
    pipe = STDiTPipeline.from_pretrained("models/quickstart")
    clips = pipe(class_labels=list(range(count)), seed=1, progress=False)
    patches = [farthest_corner(to_uint8(clip), side).repeat(enlarged, 0).repeat(enlarged, 1) for clip in clips]
    stretched = []
    for patch in patches:
        middle = np.median(patch, axis=(0, 1))
        stretched.append(np.clip(128 + 10 * (patch - middle), 0, 255).astype(np.uint8))
    rows = [np.concatenate([np.pad(p, ((0, 4), (0, 4), (0, 0)), constant_values=255) for p in row], 1)
            for row in (patches, stretched)]  # fmt: skip
    path = FOLDER.parent / "grounds.png"
    Image.fromarray(np.concatenate(rows)).save(path)
    print(path)


def farthest_corner(clip: np.ndarray, side: int) -> np.ndarray:
    """The corner (side, side, 3) of the frame of a clip (F, H, W, 3) uint8 that is farthest from the object."""
    height, width = clip.shape[1:3]
    corners = [(y, x) for y in (0, height - side) for x in (0, width - side)]
    middles = np.array([(x + side / 2, y + side / 2) for y, x in corners])
    distances = np.linalg.norm(measure_shape(clip).centers[:, None] - middles, axis=-1)
    frame, corner = np.unravel_index(distances.argmax(), distances.shape)
    y, x = corners[corner]
    return clip[frame, y : y + side, x : x + side]


def room(actions: int = 24, worlds: int = 4) -> None:
    """Dreams above the truth, under the same actions."""
    pipe = STDiTPipeline.from_pretrained("models/room")
    space = pipe.transformer.conditioners["actions"].space
    columns = []
    for seed in range(worlds):
        env = environment_of(space.environment)
        policy, rng = make_policy("sticky", env.space)(), keyed_rng("sample", seed)
        size = (pipe.config.height, pipe.config.width)
        observation, info = env.reset(3_000_000 + seed)
        true = [env.picture(size)]
        label = read_info(info, space.environment["label"], env)
        world = pipe.world(to_float(true[0][None])[None], label, seed=seed, num_inference_steps=6)
        dreamed = [true[0][None]]
        for _ in range(actions):
            action = policy(observation, info, rng)
            steps = list(env.act(action, world.group, size))
            observation, info = steps[-1].observation, steps[-1].info
            true += [step.picture for step in steps]
            dreamed.append(to_uint8(world.step(action)[0]))
        columns.append((np.concatenate(dreamed), np.stack(true)))
        env.env.close()
    write("room", tile([dream for dream, _ in columns] + [truth for _, truth in columns], worlds), pipe.config.fps)


if __name__ == "__main__":
    wanted = sys.argv[1:] or ["quickstart", "tasks", "room"]
    for make in (quickstart, tasks, room, few_steps, grounds):
        if make.__name__ in wanted:
            make()
