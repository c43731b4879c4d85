#!/usr/bin/env bash
# torchdeq 0.1.0, VariationalDropout1d, 2d, 3d and VariationalDropToken1d, 2d, 3d.
# Expected: VariationalDropout2d(p) on (B, C, H, W) drops whole channels as nn.Dropout2d does. Its documentation says
#   token_first "Default: False" and "otherwise expect (B, D, H, W)".
# What happens: the default in the code is True, so the last dimension is taken for the features. Whole image columns
#   are 0, in all channels at once, and no channel is. VariationalDropToken2d drops (channel, row) pairs, not pixels.
# Why it matters: image models are trained with another perturbation than they report. No error is raised.
# Do instead: pass token_first=False for images.
# Source: torchdeq/dropout.py of 0.1.0, the docstrings and the signatures.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.14.1 torchdeq==0.1.0 numpy==2.4.6 >&2
"$work/venv/bin/python" - <<'PY'
import sys
from importlib.metadata import version

import torch
from torchdeq.dropout import VariationalDropout2d, VariationalDropToken2d

print("torch", version("torch"), " torchdeq", version("torchdeq"))
x = torch.ones(2, 16, 8, 8)                     # images, channels first


def dropped(layer):
    """Whole channels, whole columns and whole pixels (through all channels) that are 0."""
    torch.manual_seed(0)
    gone = layer.train()(x) == 0
    return gone.all(3).all(2).sum().item(), gone.all(2).all(1).sum().item(), gone.all(1).sum().item()


rows = {
    "nn.Dropout2d(0.5)": torch.nn.Dropout2d(0.5),
    "VariationalDropout2d(0.5)": VariationalDropout2d(0.5),
    "VariationalDropout2d(0.5, token_first=False)": VariationalDropout2d(0.5, token_first=False),
    "VariationalDropToken2d(0.5)": VariationalDropToken2d(0.5),
    "VariationalDropToken2d(0.5, token_first=False)": VariationalDropToken2d(0.5, token_first=False),
}
seen = {name: dropped(layer) for name, layer in rows.items()}
for name, (channels, columns, pixels) in seen.items():
    print(f"{name:47} channels {channels:2} of 32, columns {columns:2} of 16, pixels {pixels:2} of 128")
stated = "Default: False" in VariationalDropout2d.__doc__
print("expected: rows 2 and 3 agree, rows 4 and 5 too, as the documentation says False is the default:", stated)
default, asked = seen["VariationalDropout2d(0.5)"], seen["VariationalDropout2d(0.5, token_first=False)"]
token, asked_token = seen["VariationalDropToken2d(0.5)"], seen["VariationalDropToken2d(0.5, token_first=False)"]
if stated and default[0] == 0 and default[1] > 0 and asked[0] > 0 and asked[1] == 0 \
        and token[2] == 0 and asked_token[2] > 0:
    print("seen: by default columns are dropped and no channel is")
else:
    sys.exit("CHANGED: torchdeq's 2-D dropout or what it says of its default has changed")
PY
