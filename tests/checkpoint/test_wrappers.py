"""Prefixes of wrappers, and tables rounded to half precision."""

import pytest
import torch
from safetensors.torch import save_file

from stdit.checkpoint.files import read_weights
from stdit.checkpoint.keymaps import pop_sincos_table, square_pos_embed
from stdit.checkpoint.wrappers import unwrapped

PLAIN = {"x_embedder.proj.weight": torch.ones(2), "blocks.0.attn.qkv.weight": torch.zeros(3)}


def prefixed(prefix: str) -> dict:
    return {prefix + key: value.clone() for key, value in PLAIN.items()}


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "model.module.model.", "net."]
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_prefixes_of_wrappers_come_off_in_every_kind_of_file(prefix, suffix, tmp_path):
    file = tmp_path / f"weights{suffix}"
    (torch.save if suffix == ".pt" else save_file)(prefixed(prefix), file)
    assert set(read_weights(file).tensors) == set(PLAIN)


def test_names_inside_a_model_stay_and_averages_beside_weights_are_chosen():
    assert set(unwrapped({"blocks.0._orig_mod.attn.qkv.weight": torch.ones(1), "model.a": torch.ones(1)})) == {
        "blocks.0.attn.qkv.weight",
        "model.a",
    }
    both = {
        **prefixed("model."),
        **{key: value + 1 for key, value in prefixed("ema.").items()},
        "ema.n_averaged": torch.ones(1),
    }
    assert unwrapped(both, "ema")["x_embedder.proj.weight"][0] == 2
    assert unwrapped(both, "model")["x_embedder.proj.weight"][0] == 1
    assert set(unwrapped({**prefixed("module."), "n_averaged": torch.ones(1)})) == set(PLAIN)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_table_rounded_to_half_precision_is_known_and_a_learned_one_is_not(dtype):
    table = square_pos_embed(16, 32)[None]
    pop_sincos_table({"pos_embed": table.to(dtype).float()}, "pos_embed", square_pos_embed)
    for learned in (table + 0.004 * torch.randn(table.shape), (table + 0.1).to(dtype).float()):
        with pytest.raises(ValueError, match="not the sin-cos table"):
            pop_sincos_table({"pos_embed": learned}, "pos_embed", square_pos_embed)
