"""Names of version 0.1.0 stay importable for one version, through one table, with one warning each."""

import importlib
import re
import subprocess
import sys
import warnings

import pytest
from media import SHARED

from stdit import STDiT, legacy
from stdit.config import Config, load_typed

# Names that scripts for version 0.1.0 import, by module.
IMPORTED = {
    "stdit": ["STDiT", "STDiTPipeline", "load_vae"],
    "stdit.config": ["Config", "load_typed", "to_plain"],
    "stdit.data.cached": ["CachedLatents"],
    "stdit.data.config": ["DataConfig"],
    "stdit.data.datasets": ["VideoClips", "build_dataset", "read_picture", "window"],
    "stdit.data.inputs": ["read_input", "read_mask"],
    "stdit.data.loader": ["KeyedSamples"],
    "stdit.data.manifest": ["IMAGE_SUFFIXES", "Row", "Table", "VIDEO_SUFFIXES", "read_manifest", "scan_folder"],
    "stdit.data.order": ["Buckets", "Packs", "Uniform"],
    "stdit.data.video_io": ["VideoError", "VideoReader", "_to_array"],
    "stdit.data.video_write": ["write_video"],
    "stdit.keys": ["keyed_rng"],
    "stdit.model.stdit": ["STDiT"],
    "stdit.nn.attention": ["AxialAttnProcessor", "explicit_attention"],
    "stdit.nn.embedders": ["TimestepEmbedder"],
    "stdit.sampling.pipeline": ["STDiTPipeline", "_label"],
    "stdit.sampling.plan": ["Schedule"],
    "stdit.sampling.rollout": [],
    "stdit.sampling.sampler": ["Sampler"],
    "stdit.sampling.scheduler": ["STDiTScheduler"],
    "stdit.text": ["CaptionCache", "Pretrained", "Words", "load_text_encoder"],
    "stdit.training.fit": ["Stopped", "Trainer", "diffusion_losses", "to_latents"],
    "stdit.training.results": ["build_pipeline"],
    "stdit.training.state": [
        "_hash_and_sync", "flatten_optimizer", "list_checkpoints", "load_checkpoint", "restore_optimizer", "save_checkpoint",
    ],
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*is now called")
@pytest.mark.parametrize("module", IMPORTED)
def test_every_name_of_the_old_version_is_importable(module):
    found = importlib.import_module(module)
    for name in IMPORTED[module]:
        assert getattr(found, name) is not None


@pytest.mark.filterwarnings("ignore:.*is now called")
def test_all_imports_of_version_0_1_scripts_work():
    cases = SHARED.parent / "cases"
    if not cases.is_dir():
        pytest.skip("../shared/cases is not on this machine")
    pattern = re.compile(r"from (stdit[\w.]*) import ([\w, ]+)|import (stdit[\w.]*) as")
    for path in sorted(cases.rglob("*.py")):
        for module, names, alone in pattern.findall(path.read_text()):
            found = importlib.import_module(module or alone)
            for name in filter(None, re.split(r",\s*", names)):
                short = name.split(" as ")[0].strip()
                assert hasattr(found, short) or importlib.import_module(f"{found.__name__}.{short}"), (
                    f"{path.name}: {name}"
                )


def test_an_old_module_path_warns_once_at_the_line_that_imports_it():
    code = "import warnings; warnings.simplefilter('always'); import stdit.keys; import stdit.keys; print(stdit.keys.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "stdit.rng"
    assert done.stderr.count("<string>:1: UserWarning: 'stdit.keys' is now called 'stdit.rng'") == 1


def test_old_keys_and_values_of_configs_are_read_with_one_warning_that_names_the_new(monkeypatch):
    monkeypatch.setattr(legacy, "_warned", set())
    old = ["model.time_entry=rotary_3d", "model.causal=true", "objective.scheme=teacher", "objective.known_noise=0.5"]
    with pytest.warns(UserWarning, match="is now called") as caught:
        config = load_typed(Config, "configs/quickstart.yaml", old)
    assert (config.model.position_encoding, config.objective.mask_strategy) == ("rope_3d", "teacher_forcing")
    assert config.objective.cond_noise_max == 0.5
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == len(set(texts))
    assert any("'model.time_entry' is now called 'model.position_encoding'" in text for text in texts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        load_typed(Config, "configs/quickstart.yaml", old)


def test_old_keywords_of_the_model_are_accepted(monkeypatch):
    monkeypatch.setattr(legacy, "_warned", set())
    with pytest.warns(UserWarning, match="time_mlp"):
        model = STDiT(depth=1, hidden_size=32, num_heads=4, time_mlp=False, gelu="none")
    assert model.config.timestep_mlp is False and model.config.activation == "gelu"
