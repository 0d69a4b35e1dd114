"""LoRA adapters of a pipeline: loaded in diffusers' format, weighted, switched off, merged and taken out again."""

import json

import pytest
import torch
from conftest import fill
from safetensors.torch import load_file, save_file

from stdit.sampling.pipeline import STDiTPipeline
from stdit.sampling.scheduler import STDiTScheduler
from stdit.vae import TinyVAE

pytest.importorskip("peft", reason="LoRA adapters need peft, which is not installed")
FAST = {"num_inference_steps": 2, "progress": False, "precision": "fp32", "guidance_scale": 1.0}
LAYERS = {"blocks.0.attn.qkv": (32, 96), "blocks.1.mlp.fc1": (32, 128)}


@pytest.fixture
def make(tiny_model):
    def build(guided: bool = False) -> STDiTPipeline:
        arguments = {"in_channels": 16, "num_classes": 3, "learn_sigma": False}
        guide = fill(tiny_model(**arguments), 0.01) if guided else None
        torch.manual_seed(0)  # the same VAE every time
        vae = fill(TinyVAE(encoder_widths=(8, 8), decoder_widths=(8, 8, 8)))
        scheduler = STDiTScheduler("flow", learn_sigma=False)
        return STDiTPipeline(tiny_model(**arguments), vae, scheduler, 5, 16, 16, guide=guide)

    return build


@pytest.fixture
def pipe(make):
    return make()


def adapter(seed: int, rank: int = 4, prefix: str = "transformer.") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, (width_in, width_out) in LAYERS.items():
        found[f"{prefix}{name}.lora_A.weight"] = torch.randn(rank, width_in, generator=generator) * 0.3
        found[f"{prefix}{name}.lora_B.weight"] = torch.randn(width_out, rank, generator=generator) * 0.3
    return found


def added(pipe: STDiTPipeline, *scaled: tuple[float, dict[str, torch.Tensor]]) -> torch.Tensor:
    """The clip of the model whose weights have B A of each adapter added, times a scale; the model stays as it was."""
    before = {key: value.clone() for key, value in pipe.transformer.state_dict().items()}
    layers = dict(pipe.transformer.named_modules())
    with torch.no_grad():
        for scale, tensors in scaled:
            for name in LAYERS:
                a, b = (tensors[f"transformer.{name}.lora_{kind}.weight"] for kind in "AB")
                layers[name].weight += scale * b @ a
    clips = pipe(1, **FAST)
    pipe.transformer.load_state_dict(before)
    return clips


def test_a_file_a_folder_and_a_state_dict_load_the_same_adapter(make, tmp_path):
    tensors = adapter(1)
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    save_file(tensors, tmp_path / "mine.safetensors")
    save_file(adapter(1, prefix=""), tmp_path / "bare.safetensors")  # as a model saves it, not a pipeline
    expected = added(make(), (1.0, tensors))
    sources = [
        ((tmp_path,), {}), ((tmp_path / "mine.safetensors",), {}), ((tensors,), {}),
        ((str(tmp_path),), {"weight_name": "bare.safetensors"}),
    ]  # fmt: skip
    for source, more in sources:
        pipe = make()
        pipe.load_lora_weights(*source, adapter_name="mine", **more)
        assert pipe.get_active_adapters() == ["mine"]
        torch.testing.assert_close(pipe(1, **FAST), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["train", "keys", "to"])
def test_an_adapter_name_that_a_model_uses_itself_is_refused_before_anything_is_changed(pipe, name):
    with pytest.raises(ValueError, match=f"adapter_name is '{name}', .*; give another"):
        pipe.load_lora_weights(adapter(1), adapter_name=name)
    assert pipe.get_list_adapters() == {}
    pipe.load_lora_weights(adapter(1), adapter_name="mine")


def test_adapters_are_weighted_and_without_them_the_model_is_the_old_one_bit_for_bit(pipe):
    first, second = adapter(1), adapter(2, rank=2)
    plain = pipe(1, **FAST)
    both = added(pipe, (0.5, first), (-1.5, second))
    pipe.load_lora_weights(first, adapter_name="first")
    pipe.load_lora_weights(second, adapter_name="second")
    pipe.set_adapters(["first", "second"], adapter_weights=[0.5, -1.5])
    torch.testing.assert_close(pipe(1, **FAST), both, atol=1e-4, rtol=1e-4)
    pipe.disable_lora()
    assert torch.equal(pipe(1, **FAST), plain)
    pipe.enable_lora()
    torch.testing.assert_close(pipe(1, **FAST), both, atol=1e-4, rtol=1e-4)
    pipe.delete_adapters("second")
    assert pipe.get_list_adapters() == {"transformer": ["first"]}
    pipe.unload_lora_weights()
    assert torch.equal(pipe(1, **FAST), plain) and pipe.get_list_adapters() == {}


def test_a_fused_adapter_is_in_the_weights_and_comes_out_again(pipe, tmp_path):
    tensors = adapter(1)
    plain, expected = pipe(1, **FAST), added(pipe, (0.7, tensors))
    pipe.load_lora_weights(tensors, adapter_name="mine")
    pipe.set_adapters(["mine"], adapter_weights=[1.4])
    pipe.fuse_lora(lora_scale=0.5)
    torch.testing.assert_close(pipe(1, **FAST), expected, atol=1e-4, rtol=1e-4)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(pipe(1, **FAST), plain, atol=1e-4, rtol=1e-4)
    pipe.load_lora_weights(tensors, adapter_name="again")
    with pytest.raises(
        ValueError, match="has LoRA adapters .again., which are no part of a saved one; call unload_lora_weights"
    ):
        pipe.save_pretrained(tmp_path)
    pipe.fuse_lora(lora_scale=0.7)
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path)
    torch.testing.assert_close(STDiTPipeline.from_pretrained(tmp_path)(1, **FAST), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("guided", [False, True])
def test_what_is_fused_comes_out_at_its_scale_or_stays_in_the_weights_whatever_is_called_between(make, guided):
    pipe, tensors = make(guided), adapter(1)
    more = {"guidance_scale": 2.0} if guided else {}
    plain = pipe(1, **{**FAST, **more})
    pipe.load_lora_weights(tensors, adapter_name="x")
    pipe.set_adapters("x", 1.4)
    before = pipe(1, **{**FAST, **more})
    refused = [
        lambda: pipe.set_adapters("x", 0.3), lambda: pipe.load_lora_weights(adapter(2), adapter_name="z"),
        lambda: pipe.fuse_lora(lora_scale=0.3), pipe.disable_lora, lambda: pipe.delete_adapters("x"),
    ]  # fmt: skip
    for scale in (0.5, 0.3):  # a second time at another scale
        pipe.fuse_lora(lora_scale=scale)
        fused = pipe(1, **{**FAST, **more})
        assert pipe.num_fused_loras == 1 and not torch.allclose(fused, before, atol=1e-3)
        if not guided:
            torch.testing.assert_close(fused, added(make(), (1.4 * scale, tensors)), atol=1e-4, rtol=1e-4)
        for call in refused:
            with pytest.raises(
                ValueError, match="x is fused; call unfuse_lora first, or unload_lora_weights to keep it"
            ):
                call()
        assert torch.equal(pipe(1, **{**FAST, **more}), fused)
        pipe.unfuse_lora()
        torch.testing.assert_close(pipe(1, **{**FAST, **more}), before, atol=1e-4, rtol=1e-4)
    pipe.set_adapters("x", 0.3)
    pipe.unload_lora_weights()
    torch.testing.assert_close(pipe(1, **{**FAST, **more}), plain, atol=1e-4, rtol=1e-4)
    pipe.load_lora_weights(tensors, adapter_name="x")
    pipe.fuse_lora(lora_scale=0.5)
    fused = pipe(1, **{**FAST, **more})
    pipe.unload_lora_weights()
    assert pipe.num_fused_loras == 0 and torch.equal(pipe(1, **{**FAST, **more}), fused)
    pipe.load_lora_weights(adapter(2), adapter_name="z")
    pipe.unload_lora_weights()
    assert torch.equal(pipe(1, **{**FAST, **more}), fused)


def test_an_adapter_is_also_put_into_the_guide(make):
    guided, tensors = make(guided=True), adapter(1)
    plain = guided.guide.blocks[0].attn.qkv(torch.ones(1, 32))
    guided.load_lora_weights(tensors, adapter_name="mine")
    assert set(guided.get_list_adapters()) == {"transformer", "guide"}
    assert not torch.equal(guided.guide.blocks[0].attn.qkv(torch.ones(1, 32)), plain)
    guided.unload_lora_weights()
    assert torch.equal(guided.guide.blocks[0].attn.qkv(torch.ones(1, 32)), plain)


def test_what_is_saved_keeps_its_alpha_and_loads_again(pipe, make, tmp_path):
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=list(LAYERS))
    pipe.transformer.add_adapter(config, "mine")
    with torch.no_grad():
        for name, value in pipe.transformer.named_parameters():
            if "lora_" in name:
                value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(5)) * 0.2)
    layers = peft.get_peft_model_state_dict(pipe.transformer, adapter_name="mine")
    pipe.save_lora_weights(tmp_path, layers, transformer_lora_adapter_metadata=config.to_dict())
    assert all(
        name.startswith("transformer.blocks.") for name in load_file(tmp_path / "pytorch_lora_weights.safetensors")
    )
    again = make()
    again.load_lora_weights(tmp_path)
    assert again.transformer.peft_config[again.get_active_adapters()[0]].lora_alpha == 12
    torch.testing.assert_close(again(1, **FAST), pipe(1, **FAST), atol=1e-5, rtol=1e-5)


def test_a_lora_of_another_model_is_refused_before_anything_is_changed(make, tmp_path):
    pipe = make(guided=True)
    plain = pipe(1, **FAST)
    other = {name.replace("blocks.1", "blocks.7"): value for name, value in adapter(1).items()}
    wide = {name: value.repeat(1, 2) if "lora_A" in name else value for name, value in adapter(1).items()}
    nan = {name: value * torch.nan for name, value in adapter(1).items()}
    cases = {
        "other": (other, "is a LoRA of another model: this one has no layer 'blocks.7.mlp.fc1'"),
        "wide": (wide, r"is a LoRA of another model: blocks.0.attn.qkv.lora_A.weight is \(4, 64\), but the layer is"),
        "nan": (nan, "has numbers that are not finite"),
        "weights": ({"blocks.0.attn.qkv.weight": torch.zeros(96, 32)}, "is no LoRA"),
    }
    for name, (tensors, message) in cases.items():
        save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / f"{name}.safetensors")
        for source in (tmp_path / f"{name}.safetensors", tensors):
            with pytest.raises(ValueError, match=message) as error:
                pipe.load_lora_weights(source)
            assert "\n" not in str(error.value)
    arrays = {name: value.numpy() for name, value in adapter(1).items()}
    with pytest.raises(ValueError, match="lora_A.weight of the LoRA is a ndarray; give a dict of tensors"):
        pipe.load_lora_weights(arrays)
    for name in ("a.b", "", 3):
        with pytest.raises(ValueError, match="adapter_name is .*; give a text without a point"):
            pipe.load_lora_weights(adapter(1), adapter_name=name)
    (tmp_path / "output").mkdir()
    with pytest.raises(ValueError, match="has no pytorch_lora_weights.safetensors; give the file of the LoRA"):
        pipe.load_lora_weights(tmp_path / "output")
    with pytest.raises(ValueError, match="LoRA 'models/none' is not a folder"):
        pipe.load_lora_weights("models/none")
    assert pipe.get_list_adapters() == {} and torch.equal(pipe(1, **FAST), plain)


def test_the_metadata_of_a_file_scales_the_adapter(pipe, tmp_path):
    tensors = adapter(1)
    described = {"transformer.r": 4, "transformer.lora_alpha": 2.0, "transformer.target_modules": list(LAYERS)}
    save_file(tensors, tmp_path / "half.safetensors", metadata={"lora_adapter_metadata": json.dumps(described)})
    expected = added(pipe, (0.5, tensors))
    pipe.load_lora_weights(tmp_path / "half.safetensors")
    torch.testing.assert_close(pipe(1, **FAST), expected, atol=1e-4, rtol=1e-4)
