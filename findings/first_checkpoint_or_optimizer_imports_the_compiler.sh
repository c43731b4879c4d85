#!/usr/bin/env bash
# torch 2.14.1, torch.utils.checkpoint.checkpoint(use_reentrant=False) and the constructors of torch.optim (Linux).
# Expected: neither has to do with torch.compile, and neither costs much beyond what it computes.
# Seen: whichever comes first in a process imports torch._dynamo. That takes seconds, and about 150 MB stay in use.
# Why it matters: what recomputing the layer saves is measured in a fresh process for each variant. On a CPU the import
#   can be larger than the graphs saved, so that recomputation seems to need more memory, and the first step is slow.
# Instead: import torch._dynamo before measuring. Scripts that import torchvision or torch_geometric already do so.
# Source: _disable_dynamo in torch/_compile.py imports it in the first call of a decorated function. Among these are
#   checkpoint in torch/utils/checkpoint.py and Optimizer.add_param_group in torch/optim/optimizer.py.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q torch==2.14.1
cd "$tmp"
cat > first.py <<'EOF'
import sys, time
import torch
from torch.utils.checkpoint import checkpoint


def resident():
    """Resident memory in MB."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("VmRSS:")) / 1024


what, warm, p = sys.argv[1], "warm" in sys.argv, torch.nn.Parameter(torch.ones(10))
if warm:
    import torch._dynamo
p.exp().sum().backward()                                                    # autograd is warm
calls = {"checkpoint": lambda: checkpoint(torch.exp, p, use_reentrant=False).sum().backward(),
         "optimizer": lambda: torch.optim.SGD([p], lr=0.1), "plain": lambda: p.exp().sum().backward()}
for turn in "first", "second":
    there, before, start = "torch._dynamo" in sys.modules, resident(), time.perf_counter()
    calls[what]()
    seconds, now = time.perf_counter() - start, "torch._dynamo" in sys.modules
    print(f"{what:<10} {'warm' if warm else 'cold'} {turn:<6} call: {seconds:8.4f} s {resident() - before:6.1f} MB, "
          f"imports torch._dynamo: {now and not there}")
EOF
"$tmp/venv/bin/python" -W ignore -c 'import torch; print("torch", torch.__version__)'
echo "expected: no first call imports torch._dynamo, all cost far below 0.1 s and 10 MB"
for what in plain checkpoint optimizer "checkpoint warm" "optimizer warm"; do
    "$tmp/venv/bin/python" -W ignore first.py $what
done | tee seen.txt
awk '{ large = $1 != "plain" && $2 == "cold" && $3 == "first"
       if (($NF == "True") != large || ($7 > 40) != large) bad = 1 }
     END { if (NR != 10 || bad) { print "CHANGED: the first call no longer imports torch._dynamo as stated"; exit 1 }
           print "as stated: the first checkpoint or optimizer imports torch._dynamo" }' seen.txt
