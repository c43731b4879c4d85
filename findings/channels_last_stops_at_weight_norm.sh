#!/usr/bin/env bash
# torch 2.14.1, nn.utils.parametrizations.weight_norm on nn.Conv2d, as in MDEQ's layer.
# Expected: model.to(memory_format=torch.channels_last) gives its convolutions channels_last kernels.
# Seen: the stored direction (original1) is channels_last, the kernel computed from it never is, although v * (g / |v|)
#   written out keeps the format. If the images are not channels_last, a plain convolution returns channels_last, and
#   a weight-normed one does not. DistributedDataParallel then warns that the strides of a 1x1 kernel's gradient
#   are not those of its parameter. It gives no such warning for a plain 1x1 convolution.
# Why it matters: a solver calls the layer tens of times, and what is timed as channels_last is a mixture.
# Instead: convert the images too. The warning is harmless: both strides of a 1x1 kernel mean the same order in memory.
# Source: _WeightNorm in torch/nn/utils/parametrizations.py calls torch._weight_norm, whose result is contiguous.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q torch==2.14.1
cd "$tmp"
"$tmp/venv/bin/python" -W ignore - <<'EOF'
import os, sys, warnings
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

print("torch", torch.__version__)
last = torch.channels_last
torch.set_warn_always(True)                                                 # else once per process
torch.distributed.init_process_group("gloo", init_method=f"file://{os.getcwd()}/store", rank=0, world_size=1)


def conv(normed, size):
    layer = nn.Conv2d(8, 16, size, padding=size // 2)
    return (weight_norm(layer) if normed else layer).to(memory_format=last)


def warned(normed, size):
    """Whether DDP warns about strides in a step with channels_last images."""
    layer = nn.parallel.DistributedDataParallel(conv(normed, size))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer(torch.randn(4, 8, 6, 6).to(memory_format=last)).square().sum().backward()
    return any("Grad strides do not match" in str(w.message) for w in caught)


plain, normed = conv(False, 3), conv(True, 3)
g, v = normed.parametrizations.weight.original0, normed.parametrizations.weight.original1
by_hand = v * (g / v.square().sum((1, 2, 3), keepdim=True).sqrt())
assert torch.allclose(by_hand, normed.weight)
images = torch.randn(4, 8, 6, 6)
formats = [x.is_contiguous(memory_format=last)
           for x in (plain.weight, v, by_hand, normed.weight, plain(images), normed(images))]
warns = [warned(False, 1), warned(True, 3), warned(True, 1)]
torch.distributed.destroy_process_group()

print("channels_last expected: all True")
print("seen: plain kernel {}, original1 {}, v * (g / |v|) {}, weight-normed kernel {}, output of the plain layer {}, "
      "of the weight-normed one {}".format(*formats))
print("DDP's warning of strides expected: nowhere")
print("seen: plain 1x1 {}, weight-normed 3x3 {}, weight-normed 1x1 {}".format(*warns))
if (formats, warns) != ([True, True, True, False, True, False], [False, False, True]):
    sys.exit("CHANGED: weight_norm no longer loses channels_last as stated")
print("as stated: weight_norm loses channels_last, and DDP warns of its 1x1 kernels")
EOF
