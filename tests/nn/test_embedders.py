import torch

from stdit.nn.embedders import TimestepEmbedder


def test_a_thousand_timesteps_have_different_embeddings_in_bfloat16():
    embedder = TimestepEmbedder(64).to(torch.bfloat16)
    seen = []
    embedder.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    embedder(torch.arange(1000.0))
    assert len(torch.unique(seen[0], dim=0)) == 1000


def test_timesteps_of_any_shape_embed_alike():
    embedder = TimestepEmbedder(32)
    levels = torch.rand(2, 3) * 1000
    torch.testing.assert_close(embedder(levels)[1, 2], embedder(levels[1, 2]))
