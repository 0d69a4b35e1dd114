"""Milliseconds of one attention call of the quickstart: 80 tokens of 160 numbers, 4 heads, qk_norm, sincos+rope_3d, forward only.

    PYTHONPATH=CHECKOUT python dev/attention_call.py old|new [clips] [threads]

`old`: a checkout of 6f3ba47, before positions were made once per forward pass; compare the two by turns.
"""

import sys
import time

import torch

which, clips, threads = sys.argv[1], int((sys.argv[2:] or [1])[0]), int((sys.argv[3:] or [1])[0])
torch.set_num_threads(threads)
if which == "old":
    from stdit.nn.attention import Attention
    from stdit.nn.layout import Dense

    attention, extra = Attention(160, 4, "joint", True, "attention_rotary_3d"), Dense((5, 4, 4))
else:
    from stdit.nn.attention import Attention
    from stdit.nn.config import BlockConfig
    from stdit.nn.context import make_context
    from stdit.nn.layout import DenseLayout
    from stdit.nn.modulation import Condition

    config, axis = BlockConfig(160, 4, qk_norm=True), ("joint", "sincos+rope_3d")
    attention = Attention(config, *axis)
    extra = make_context(config, [axis], Condition(torch.zeros(clips, 1, 1, 160)), DenseLayout((5, 4, 4)))
tokens, seconds = torch.randn(clips, 5, 16, 160), []
with torch.no_grad():
    for call in range(220):
        began = time.perf_counter()
        attention(tokens, extra)
        if call >= 20:
            seconds.append(time.perf_counter() - began)
print(f"{1e3 * sorted(seconds)[len(seconds) // 2]:.3f} ms")
