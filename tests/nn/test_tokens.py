import pytest
import torch

from stdit.nn.tokens import patchify, token_grid, unpatchify


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 2, 4), (1, 1, 1)])
def test_patches_unfold_and_fold_without_loss(patch):
    x = torch.randn(2, 3, 4, 8, 8)
    tokens = patchify(x, patch)
    assert tokens.shape == (2, 4 // patch[0], 64 // (patch[1] * patch[2]), 3 * patch[0] * patch[1] * patch[2])
    channels_last = tokens.unflatten(-1, (3, -1)).transpose(-1, -2).flatten(-2)
    assert torch.equal(unpatchify(channels_last, patch, 8 // patch[1]), x)


def test_the_patch_embedding_equals_a_convolution():
    from stdit.nn.embedders import PatchEmbed

    embed = PatchEmbed((2, 2, 4), 3, 16)
    x = torch.randn(2, 3, 4, 8, 8)
    kernel = embed.proj.weight.unflatten(1, (3, 2, 2, 4))
    expected = torch.nn.functional.conv3d(x, kernel, embed.proj.bias, stride=(2, 2, 4))
    torch.testing.assert_close(embed(x), expected.flatten(3).permute(0, 2, 3, 1))


def test_a_size_that_does_not_divide_is_refused_with_one_that_does():
    with pytest.raises(ValueError, match=r"latent height=7 does not divide into patches of 2 .* Use 8"):
        token_grid((1, 7, 8), (1, 2, 2))
