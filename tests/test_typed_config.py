"""Configs of strangers and mistyped ones end in one line, before anything is loaded."""

import time

import pytest

from stdit.config import Config, load_typed, to_plain
from stdit.training.vae import VAEConfig


@pytest.fixture
def load(tmp_path, monkeypatch):
    """A function of a YAML text and overrides -> Config."""
    monkeypatch.setenv("SECRET", "s3cr3t")

    def load_text(text: str = "name: t", *overrides: str, schema: type = Config):
        file = tmp_path / "t.yaml"
        file.write_text(text, errors="surrogatepass")
        return load_typed(schema, file, overrides)

    return load_text


def refusal(load, *given: str, **options) -> str:
    with pytest.raises(ValueError, match=".") as caught:
        load(*given, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "text",
    [
        "name: '${oc.env:SECRET}'",
        "model: {axes: ['${oc.env:SECRET}']}",
        "data: {sizes: [['${oc.env:SECRET}', 8, 8]]}",
        "model: {extra_conditions: {camera: {a: [{b: 'x${oc.env:SECRET}'}]}}}",
        "init_from: {restart: [x_embedder, '${name}']}",
    ],
)
def test_no_interpolation_is_resolved_anywhere(load, text):
    message = refusal(load, text)
    assert "interpolation" in message and "s3cr3t" not in message


@pytest.mark.parametrize(
    "override", ["model.axes=['${oc.env:SECRET}']", "name=a${oc.env:SECRET}", "${oc.env:SECRET}=1"]
)
def test_no_interpolation_is_resolved_in_an_override(load, override):
    message = refusal(load, "name: t", override)
    assert "interpolation" in message and "s3cr3t" not in message


def test_deep_and_large_yaml_is_refused_in_no_time(load):
    began = time.monotonic()
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n"
    bomb += "".join(
        f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    )
    for text in ("a: " + "[" * 50_000, "a: " + "{a: " * 20_000, "- " * 30_000, bomb):
        assert "levels" in refusal(load, text)
    for override in ("name=" + "[" * 50_000, ".".join("a" * 5000) + "=1", "a" + "[0]" * 5000 + "=1"):
        refusal(load, "name: t", override)
    assert "bytes" in refusal(load, "#" * 1_000_001)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1e400", "nan", "inf"])
def test_every_number_of_a_config_must_be_finite(load, value):
    for schema in (Config, VAEConfig):
        for section, keys in to_plain(schema()).items():
            for key in (
                [name for name, default in keys.items() if isinstance(default, float)] if isinstance(keys, dict) else ()
            ):
                assert f"{section}.{key} must be" in refusal(load, "name: t", f"{section}.{key}={value}", schema=schema)
    assert "prefix must be" in refusal(load, "name: t", f"objective.mask_probs={{prefix: {value}}}")
    assert "fps must be" in refusal(load, "name: t", f"data.fps={value}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.guidance=-1", "train.guidance must be >= 0, got -1.0"),
        ("train.ema_decay=1.0", "train.ema_decay must be in [0, 1), got 1.0"),
        ("data.max_bad_fraction=-1", "data.max_bad_fraction must be in [0, 1]"),
        ("data.fps=0", "data.fps must be > 0 or null, got 0.0"),
        ("model.mlp_ratio=-1", "model.mlp_ratio must be > 0"),
        ("model.patch_size=[0,2,2]", "model.patch_size must be >= 1"),
        ("model.patch_size=[1,2]", "model.patch_size=[1, 2] is not [frames, rows, columns]"),
        ("model.micro_conditions=[fps,fps]", "names one number twice"),
        ("model.caption_axes=[spatial]", "there is no text.encoder"),
        ("objective.shift_tokens=-1", "objective.shift_tokens must be >= 0"),
        ("seed=-1", "seed must be in [0, 4294967295]"),
        ("train.optimizer=adam", "Did you mean 'adamw'?"),
        ("data.source=shape", "Did you mean 'shapes'?"),
        ("train.stps=1", "train.stps: Unknown key 'stps'. Did you mean 'steps'?"),
        ("model.axes=joint", "model.axes must be a list"),
        ("model.axes[0]=joint", "model.axes must be a list"),
        ("data.sizes=[17,64,64]", "data.sizes[0] must be a list"),
        ("train=5", "train must be a mapping of keys to values, got 5"),
        ("train.steps=many", "train.steps must be a whole number, got 'many'"),
        ("train.steps=null", "train.steps must be a whole number, got null"),
        ("data.flip=2", "data.flip must be true or false"),
        ("model.gradient_checkpointing=selectiv", "model.gradient_checkpointing must be true or false, or selective"),
        ("model.gradient_checkpointing=null", "model.gradient_checkpointing must be true or false, or selective"),
        ("name=???", "name must be text, got '???'"),
        ("objective.mask_probs=[1]", "objective.mask_probs must be a mapping"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_its_key_and_what_it_should_be(load, override, message):
    assert message in refusal(load, "name: t", override)


@pytest.mark.parametrize("value", ["[null]", "[[1]]", "[x, y]", "{a: 1}"])
def test_overrides_of_one_key_that_contradict_each_other_are_refused(load, value):
    for first, second in (("data.sizes[0][0]=1", "data.sizes="), ("model.axes.prefix=1", "model=")):
        refusal(load, "name: t", first, second + value)
        refusal(load, "name: t", second + value, first)


def test_what_is_right_is_read_as_before(load):
    config = load(
        "name: 5\ntrain: {lr: 1e-4, steps: '7'}\nobjective: {mask_strategy: mixed}",
        "data.fps=24", "data.flip=yes", "model.depth=null", "objective.mask_probs={prefix: 0.5}", "model.window=null",
    )  # fmt: skip
    assert (config.name, config.train.lr, config.train.steps, config.data.fps) == ("5", 1e-4, 7, 24.0)
    assert config.data.flip is True and config.model.depth is None
    assert config.objective.mask_probs["prefix"] == 0.5 and "shared" in config.objective.mask_probs


def test_checkpointing_is_true_false_or_selective_and_old_files_read_as_before(load):
    key = "model.gradient_checkpointing"
    values = [load(f"model: {{gradient_checkpointing: {text}}}") for text in ("true", "false", "selective")]
    values += [load("name: t"), load("name: t", f"{key}=true"), load("name: t", f"{key}=selective")]
    assert [config.model.gradient_checkpointing for config in values] == [
        True, False, "selective", False, True, "selective",
    ]  # fmt: skip
    assert to_plain(values[2])["model"]["gradient_checkpointing"] == "selective"
    assert "train.compile=true" in refusal(load, "name: t", f"{key}=selective", "train.compile=true")
