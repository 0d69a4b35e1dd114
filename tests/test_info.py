import json
import subprocess
import sys

import pytest

from stdit.hub import LORA_FILE
from stdit.model.lora import save_lora
from stdit.model.stdit import STDiT
from stdit.nn.low_rank import add_lora
from stdit.recipes import info
from stdit.recipes.entry import child_environment
from stdit.sampling.pipeline import STDiTPipeline
from stdit.sampling.scheduler import STDiTScheduler
from stdit.vae import load_vae


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = STDiT(
        in_channels=16, depth=1, hidden_size=32, num_heads=2, sample_size=(2, 4, 4), num_classes=2,
        class_names=["a cat", "a dog"], learn_sigma=False,
    )  # fmt: skip
    pipe = STDiTPipeline(model, load_vae("tiny"), STDiTScheduler("flow"), num_frames=5, height=32, width=32, fps=6)
    pipe.save_pretrained(tmp_path / "models/pets")
    return tmp_path / "models/pets"


def test_models_are_listed_with_their_clips_and_labels(folder, capsys):
    assert info.main([]) == 0
    said = capsys.readouterr().out
    assert "models/pets" in said and "5 frames of 32 x 32 at 6 fps" in said and "a cat, a dog" in said
    assert info.main(["models/pets", "--labels"]) == 0
    assert capsys.readouterr().out == "a cat\na dog\n"


def test_the_guide_and_the_shift_of_a_model_are_described(folder, capsys):
    pipe = STDiTPipeline.from_pretrained(folder)
    pipe.register_modules(
        guide=STDiT.from_pretrained(folder / "transformer"), scheduler=STDiTScheduler("flow", shift=4.0)
    )
    pipe.save_pretrained(folder)
    assert info.main(["models/pets"]) == 0
    said = capsys.readouterr().out
    assert "flow, shift 4\n" in said and "an earlier state, which guidance leads away from (--guider auto" in said


def test_a_lora_is_listed_with_its_model_and_the_command_that_uses_it(folder, capsys):
    model = STDiT.from_pretrained(folder)
    add_lora(model, "mine", rank=2)
    save_lora(model, "mine", folder.parent / "mine", {"base": "models/pets"})
    assert info.main([]) == 0
    said = capsys.readouterr().out
    assert "models/mine\n" in said and "models/pets\n" in said and "of models/pets, rank 2" in said
    assert "stdit sample --model models/pets --lora models/mine\n" in said
    (folder.parent / "mine" / LORA_FILE).write_bytes(b"cut")
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        info.main(["models/mine"])


def test_a_model_is_described_without_torch(folder):
    code = "import sys; from stdit.recipes import cli; cli.main(['info']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], env=child_environment(), check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("file", ["model_index.json", "transformer/config.json"])
@pytest.mark.parametrize(
    "content", ["[]", "{", '{"num_frames": "x", "fps": [], "extra_conditions": 3, "num_classes": {}}']
)
def test_settings_that_are_none_of_a_model_are_one_line(folder, file, content):
    (folder / file).write_text(content)
    try:
        info.main(["models/pets"])
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(json.loads(content), dict)


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="there is no model under models; train one"):
        info.main([])
    with pytest.raises(ValueError, match="holds no model"):
        info.main(["nothing"])
    with pytest.raises(ValueError, match="--labels needs a model"):
        info.main(["--labels"])


def test_an_unknown_label_is_answered_before_torch_is_imported(folder):
    code = (
        "import sys; from stdit.recipes import cli; code = cli.main(['sample', '--class-label', 'a cow']);"
        "assert code == 1 and 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=child_environment(), capture_output=True, text=True, check=True
    )
    assert "class label 'a cow' is unknown. Choose one of: a cat, a dog." in done.stderr
