#!/usr/bin/env bash
# Runs the measurements for a GPU, the most valuable first.  Every figure becomes a line of OUT/results.md.
#
#     tests/gpu_list.sh OUT [DATA]      # DATA: images for the rows of Table 1, as --data of mdeq_cifar.py
#
# To go on, call it again with the same OUT.  It skips the items that log.txt calls finished (to repeat one, delete
# its line), and continues a training from its checkpoint.  No failure ends the list.  Variables:
#     LIMIT=540          the whole call ends before this many seconds have passed
#     ITEMS="bench row6" runs only these, in this order (row 6 takes all the time that is left)
#     ROW_FLAGS=...      flags for the rows of Table 1, instead of --cuda-graph (--compile may differ in a later call)
#     DATA2=FOLDER       when row 6 is done, evaluates it on these images, too (in train/ and test/, as in DATA)
#     COMMIT=...         the commit's name, if there is no git
#     PYTHON=python3     the interpreter
#     DRY=1              takes tiny sizes, and no flag that needs a GPU
#     SHOW=1             only prints the commands
set -u
[ $# -ge 1 ] || { sed -n '2,4p' "$0" >&2; exit 2; }
OUT=$(realpath -m "$1") DATA=${2:+$(realpath -m "$2")} DATA2=${DATA2:+$(realpath -m "$DATA2")}
LIMIT=${LIMIT:-540} DRY=${DRY:+1} SHOW=${SHOW:-} PYTHON=${PYTHON:-python3} ROW_FLAGS=${ROW_FLAGS---cuda-graph}
declare -A model=([tiny]="mdeq_cifar.py --batch-size 128" [transformer]="deq_wikitext.py --batch-size 14"
                  [small]="mdeq_imagenet.py --batch-size 16" [small128]="mdeq_imagenet.py --batch-size 128")
if [ "$DRY" ]; then
    few="--max-iter 2 --backward-max-iter 2 --k 1" DATA=toy DATA2=${DATA2:+toy}
    ROW_FLAGS="--epochs 20 --train-size 40 --test-size 20 --batch-size 8 $few"
    model=([tiny]="mdeq_cifar.py --data toy --batch-size 8 $few"
           [transformer]="deq_wikitext.py --data toy --d-model 32 --d-inner 32 --batch-size 2 --segment 8 $few"
           [small]="mdeq_imagenet.py --data toy --crop 32 --channels 8 8 --head-channels 2 2 --batch-size 4 $few")
fi
cd "$(dirname "$0")/.." && mkdir -p "$OUT" || exit 2
log=$OUT/log.txt child='' exact="--grad implicit --dropout 0.25 --backward-solver"
export PYTHONUNBUFFERED=1
trap 'kill $child 2> /dev/null; wait $child; echo "stopped: call again to go on" | tee -a "$log"; exit 143' TERM INT

finished() { grep -qsx "finished: $1" "$log"; }
line() { echo "| \`$label\` | $(tr '|' '/' <<< "$1") | $where |" | tee -a "$OUT/results.md"; }

# How the figures are found in what a command has printed, one a line.
last() { grep . | tail -n 1; }
marked() { sed -n 's/^figure: //p'; }
upg() { awk '/^upg|^P.* UPG/ {name = $0; sub(/  +.*/, "", name)
                              print name ": " $(NF - 4) " ms per step, peak " $(NF - 3) " GB"}'; }
accuracy() {    # the latest one, and the median of the log's times of a step
    local text=$(cat) ms
    ms=$(grep -o 'ms per step [0-9.]*' <<< "$text" | sort -n -k 4 | awk '{x[NR] = $4} END {print x[int((NR + 1) / 2)]}')
    grep 'test accuracy' <<< "$text" | tail -n 1 | sed "s/\$/${ms:+; $ms ms per step}/"
}

run() {         # NAME SECONDS READ COMMAND...: READ is one of the above; 9999 seconds: all that are left
    local name=$1 own=$2 read=$3 seconds=$((LIMIT - SECONDS - 25)) begin said code figure
    shift 3
    case $1 in -c) label="profile: ${*:3}" ;; -m) label="python $*" ;; *) label=$* ;; esac
    [ ! "$SHOW" ] || { echo "$label"; return; }
    ! finished "$name" || return 0
    [ $seconds -ge 15 ] || { echo "no time is left for $name"; return; }
    [ $seconds -lt "$own" ] || seconds=$own
    echo "--- $name, at second $SECONDS, at most $seconds s" | tee -a "$log"
    begin=$(wc -c < "$log")
    timeout -k 20 $seconds "$PYTHON" "$@" >> "$log" 2>&1 &      # behind: in front, bash answers no signal
    child=$!
    wait $child
    code=$? said=$(tail -c +$((begin + 1)) "$log" | tr -d '\0')
    rm -f "$OUT"/*/.lock "$OUT"/*/*.previous                    # as only a few files come back
    grep -q '^done: ' <<< "$said" && code=0                     # even if the limit came at that moment
    case $code in
        0) while read -r figure; do line "$figure"; done < <($read <<< "$said" | grep . || echo "no figure") ;;
        124 | 137) line "not finished in $seconds s: $($read <<< "$said" | last || last <<< "$said")"
                   [ $seconds = "$own" ] || return ;;           # it was the end of the call: next time again
        *) line "failed with exit code $code: $(last <<< "$said")"
           [ "$own" != 9999 ] || return ;;
    esac
    echo "finished: $name" >> "$log"
}

row() {         # NAME FLAGS...: a row of Table 1; when it is done, only its metrics are kept, but all of row 6
    [ "$DATA" ] || { echo "$1 needs DATA"; return; }
    run "$1" 9999 accuracy mdeq_cifar.py --data "$DATA" --out "$OUT/$1" --resume auto "${@:2}" $ROW_FLAGS
    if [ "$1" != row6 ] && [ -d "$OUT/$1" ] && finished "$1"; then
        cat "$OUT/$1/metrics.jsonl" >> "$OUT/metrics.jsonl" && rm -r "${OUT:?}/$1"
    fi
}

# The script's own --benchmark, but for `benchmark` itself: what is here takes the UPG row alone.
PROFILE=$(cat <<'END_OF_PYTHON'
import importlib, json, statistics, sys, tempfile, torch
from common import clock
from torch.utils.flop_counter import FlopCounterMode
module, flags, gpu, flops = importlib.import_module(sys.argv[1][:-3]), sys.argv[2:], torch.cuda.is_available(), 0
def measure(rows, finish, process, **_):
    global flops
    forward = next(rows[name] for name in rows if "upg" in name.lower())
    def step():
        began = clock(process.device)
        forward().backward()
        finish()
        return clock(process.device) - began
    if not flops:                                   # in the first turn, as nothing is seen in a CUDA graph
        with FlopCounterMode(display=False) as counter:
            step()
        flops = counter.get_total_flops()
    seconds = statistics.median([step() for _ in range(8)][3:])
    with torch.profiler.profile() as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(folder + "/trace.json")
        events = json.load(open(folder + "/trace.json"))["traceEvents"]
    kernels = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == ("kernel" if gpu else "cpu_op"))
    busy = end = 0.0                                # microseconds in which at least one kernel runs
    for a, b in kernels:
        busy, end = busy + max(0.0, b - max(a, end)), max(end, b)
    print(f"figure: UPG{' as CUDA graphs' * ('--cuda-graph' in args)}: {1e3 * seconds:.1f} ms per step, of which "
          f"{busy / 1e3:.1f} ({busy / seconds / 1e4:.0f} %) in {len(kernels)} {'kernels' if gpu else 'operators'} of the "
          f"{process.device.type}; {flops / 1e12:.4g} TFLOP, {flops / seconds / 1e12:.3g} TFLOP/s", flush=True)
module.benchmark = measure
eager = [flag.replace("--cuda-graph", "--no-cuda-graph") for flag in flags]
for args in (eager, flags)[:1 + (eager != flags)]:
    module.main(module.parse_args([*args, "--benchmark"]))
END_OF_PYTHON
)

if [ ! "$SHOW" ]; then
    where=$("$PYTHON" -c 'from common import *
print("{device}, torch {torch}, commit {commit}".format(**describe_run(init_process())))')
    where=${where% *}\ ${COMMIT:-${where##* }}
    case $DRY$where in " "* | CPU*) echo "there is no GPU, and DRY=1 is not set: $where" >&2; exit 2 ;; esac
    head='| command | figure | device, torch, commit |\n|---|---|---|\n'
    [ -e "$OUT/results.md" ] || printf "$head" > "$OUT/results.md"
fi
for item in ${ITEMS:-tests row6 eval bench profile row7 row5 row5-gmres row2 row2-gmres}; do
    case $item in
        tests) run tests 120 last -m pytest tests/test_gpu.py -x -q ;;
        row6) row row6 ;;
        eval) if [ "${DATA2:-}" ] && { [ "$SHOW" ] || finished row6; }; then
                  run eval 120 accuracy mdeq_cifar.py --eval --resume "$OUT/row6/checkpoint.pt" --data "$DATA2"
              fi ;;
        bench) for more in no-cuda-graph cuda-graph "cuda-graph --compile" "cuda-graph --amp"; do
                   for name in tiny transformer small small128; do
                       flags=--$more
                       case $DRY$name in transformer | 1*) flags=${more/#*cuda-graph/} ;; esac    # it has no graphs
                       case $DRY$name$flags in 1small*compile | 1small128*) continue ;; esac      # takes minutes
                       [ "$flags$more" != cuda-graph ] || continue                                # done already
                       run "bench $name$flags" 150 upg ${model[$name]} --benchmark $flags
                   done
               done ;;
        profile) for name in tiny small small128 transformer; do
                     case $DRY$name in 1small128) continue ;; transformer | 1*) flags= ;; *) flags=--cuda-graph ;; esac
                     run "profile $name" 100 marked -c "$PROFILE" ${model[$name]} $flags
                 done ;;
        row7) row row7 --grad npg ;;
        row5) row row5 $exact broyden ;;
        row5-gmres) row row5-gmres $exact gmres ;;
        row2) row row2 $exact broyden --optimizer adam ;;
        row2-gmres) row row2-gmres $exact gmres --optimizer adam ;;
        *) echo "ITEMS: there is no $item" >&2 ;;
    esac
done
echo "the list ends at second $SECONDS; the results are in $OUT/results.md"
