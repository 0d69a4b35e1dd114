"""LoRAs in a model and in files: they change what they should, can be turned off without a trace, and fit peft's reading."""

import copy
import json
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stdit.hub import LORA_FILE
from stdit.model.lora import base_fingerprint, load_lora, lora_tensors, save_lora, split_strength
from stdit.model.stdit import STDiT
from stdit.nn.low_rank import adapters_of, add_lora, lora_names, merge_lora, remove_lora, set_lora_strength

X = (torch.arange(512.0).sin().view(1, 4, 2, 8, 8), torch.tensor([300.0]), torch.tensor([1]))


@pytest.fixture
def model(tiny_model):
    return tiny_model(learn_sigma=False)


def adapted(model, name="a", seed=0, **options):
    """A copy of a model with a LoRA whose B is not zero."""
    model = copy.deepcopy(model)
    add_lora(model, name, rank=4, seed=seed, **options)
    for number, (_, one) in enumerate(adapters_of(model, name)):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        torch.nn.init.normal_(one.lora_B.weight, std=0.2, generator=generator)
    return model


@torch.no_grad()
def test_a_new_lora_changes_nothing_and_depends_on_seed_and_layer_alone(model):
    fresh = copy.deepcopy(model)
    add_lora(fresh, "a", rank=4, seed=3)
    assert torch.equal(fresh(*X), model(*X))
    torch.rand(7)  # no draw of the global generator counts
    again, other = copy.deepcopy(model), copy.deepcopy(model)
    add_lora(again, "a", rank=4, seed=3, layers=r"blocks\.1\.mlp\.fc2")
    add_lora(other, "a", rank=4, seed=4)
    key = "blocks.1.mlp.fc2.lora_A.weight"
    assert torch.equal(lora_tensors(again, "a")[key], lora_tensors(fresh, "a")[key])
    assert not torch.equal(lora_tensors(other, "a")[key], lora_tensors(fresh, "a")[key])
    assert list(lora_tensors(again, "a")) == [key, key.replace("_A", "_B")]


@torch.no_grad()
def test_a_lora_that_is_off_or_removed_leaves_the_outputs_of_the_base_bit_for_bit(model):
    base, changed = model(*X), adapted(model)
    assert (changed(*X) - base).norm() > 0.01 * base.norm()
    set_lora_strength(changed, "a", 0)
    assert torch.equal(changed(*X), base)
    set_lora_strength(changed, "a", 1)
    remove_lora(changed)
    assert torch.equal(changed(*X), base) and changed.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(changed.parameters(), model.parameters(), strict=True))


@torch.no_grad()
def test_several_add_up_by_their_strengths_and_merging_them_keeps_the_outputs(model, tmp_path):
    for number, name in enumerate("ab"):
        save_lora(adapted(model, name, seed=number), name, tmp_path / name)
    both = copy.deepcopy(model)
    names = [load_lora(both, tmp_path / "a", 0.5), load_lora(both, tmp_path / "b" / LORA_FILE, -2.0)]
    assert lora_names(both) == names
    weight = model.blocks[0].mlp.fc1.weight
    pairs = [dict(adapters_of(both, name))["blocks.0.mlp.fc1"] for name in names]
    wanted = weight + sum(s * p.lora_B.weight @ p.lora_A.weight for s, p in zip((0.5, -2.0), pairs, strict=True))
    before = both(*X)
    merge_lora(both)
    torch.testing.assert_close(both.blocks[0].mlp.fc1.weight, wanted)
    torch.testing.assert_close(both(*X), before, atol=1e-5, rtol=1e-4)
    both.save_pretrained(tmp_path / "merged")
    assert torch.equal(STDiT.from_pretrained(tmp_path / "merged")(*X), both(*X))


@torch.no_grad()
def test_peft_reads_what_is_written_and_the_other_way_round(model, tmp_path):
    peft = pytest.importorskip("peft")
    ours = adapted(model, alpha=8)
    save_lora(ours, "a", tmp_path / "ours")
    theirs = copy.deepcopy(model)
    theirs.load_lora_adapter(tmp_path / "ours")
    torch.testing.assert_close(theirs(*X), ours(*X), atol=1e-5, rtol=1e-4)
    written = copy.deepcopy(model)
    written.add_adapter(
        peft.LoraConfig(r=4, lora_alpha=6, target_modules=r"blocks\.\d+\.attn\.proj", init_lora_weights=False)
    )
    written.save_lora_adapter(tmp_path / "theirs")
    read = copy.deepcopy(model)
    load_lora(read, tmp_path / "theirs")
    torch.testing.assert_close(read(*X), written(*X), atol=1e-5, rtol=1e-4)


def change(path, edit):
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        info = file.metadata()
    edit(tensors, info)
    save_file(tensors, path, metadata=info)


KEY = "transformer.blocks.0.mlp.fc1.lora_"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t, i: t.pop(f"{KEY}B.weight"), "has no lora_A and lora_B of one rank for blocks.0.mlp.fc1"),
        (lambda t, i: t.update({f"{KEY}A.weight": torch.zeros(3, 32)}), "has no lora_A and lora_B of one rank"),
        (lambda t, i: t.update({f"{KEY}A.weight": torch.zeros(4, 7)}), "is a LoRA of another model"),
        (lambda t, i: t.update({f"{KEY}magnitude_vector": torch.ones(4)}), "which is no part of a plain LoRA"),
        (lambda t, i: t.update({f"{KEY}A.weight": torch.full((4, 32), torch.inf)}), "are not finite"),
        (lambda t, i: i.update(lora_adapter_metadata="[1]"), "that are no JSON object"),
        (lambda t, i: i.update(lora_adapter_metadata='{"transformer.lora_alpha": "x"}'), "alpha=x for"),
        (lambda t, i: i.update(lora_adapter_metadata='{"transformer.use_dora": true}'), "is a DoRA"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_lora_of_the_model_is_refused_in_one_line(model, tmp_path, edit, message):
    path = save_lora(adapted(model), "a", tmp_path)
    change(path, edit)
    with pytest.raises(ValueError, match=message) as found:
        load_lora(model, tmp_path)
    assert "\n" not in str(found.value) and lora_names(model) == []


def test_other_weights_of_the_same_shapes_are_warned_of(model, tmp_path):
    save_lora(adapted(model), "a", tmp_path, {"base": "models/x", "base_fingerprint": base_fingerprint(model)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_lora(copy.deepcopy(model), tmp_path)
    other = copy.deepcopy(model)
    torch.nn.init.normal_(other.blocks[0].mlp.fc1.weight)
    with pytest.warns(UserWarning, match=r"was trained on other weights \(models/x\)"):
        load_lora(other, tmp_path)


def test_a_file_may_have_any_name(model, tmp_path):
    path = save_lora(adapted(model), "a", tmp_path)
    names = ["train", "half", "type", "values", "training", "_modules", "v1.0", "train_2"]
    for name in names:
        load_lora(model, path.rename(tmp_path / f"{name}.safetensors"))
        path = tmp_path / f"{name}.safetensors"
    assert len(set(lora_names(model))) == len(names)


def test_a_lora_may_have_a_name_with_signs(model, tmp_path):
    path, base = save_lora(adapted(model), "a", tmp_path), base_fingerprint(model)
    assert load_lora(model, path, name="my-lora") == "my-lora"
    assert lora_names(model) == ["my-lora"] and base_fingerprint(model) == base


def test_alphas_of_single_layers_and_rank_stabilised_loras_are_read(model, tmp_path):
    path = save_lora(adapted(model), "a", tmp_path)
    change(path, lambda t, i: (t.update({"transformer.blocks.0.mlp.fc1.alpha": torch.tensor(2.0)}), i.clear()))
    load_lora(model, path, name="one")
    scales = {key: one.scale for key, one in adapters_of(model, "one")}
    assert scales["blocks.0.mlp.fc1"] == 0.5 and scales["blocks.1.mlp.fc1"] == 1.0
    settings = {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.use_rslora": True}
    change(
        path,
        lambda t, i: (
            t.pop("transformer.blocks.0.mlp.fc1.alpha"),
            i.update(lora_adapter_metadata=json.dumps(settings)),
        ),
    )
    load_lora(model, path, name="two")
    assert {one.scale for _, one in adapters_of(model, "two")} == {4.0}


def test_a_path_and_its_strength_are_told_apart(tmp_path):
    (tmp_path / "odd:0.5").touch()
    (tmp_path / "a").touch()
    assert split_strength(f"{tmp_path}/a:0.5") == (f"{tmp_path}/a", 0.5)
    assert split_strength(f"{tmp_path}/odd:0.5") == (f"{tmp_path}/odd:0.5", 1.0)
    assert split_strength(f"{tmp_path}/a:-1e-1")[1] == -0.1
    with pytest.raises(ValueError, match="'much' is no number; write PATH:SCALE"):
        split_strength(f"{tmp_path}/a:much")


def test_a_model_that_carries_a_lora_is_not_saved_as_one_that_could_not_be_loaded(model, tmp_path):
    with pytest.raises(ValueError, match="carries the LoRA 'a'; add it to the weights with merge_lora"):
        adapted(model).save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 4, "layers": "nothing"}, "matches no linear layer"),
        ({"rank": 4, "layers": "("}, "is no regular expression"),
        ({"rank": 33}, "a LoRA of rank 33 is wider than blocks.0.attn.qkv, which has 32"),
    ],
)
def test_a_lora_that_no_layer_can_have_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        add_lora(model, "a", **options)
    assert lora_names(model) == []


@torch.no_grad()
def test_compiled_blocks_have_the_outputs_of_their_loras(model):
    plain = adapted(model)
    compiled = copy.deepcopy(plain)
    compiled.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*X), plain(*X))
    torch._dynamo.reset()
