#!/usr/bin/env bash
# Fig. 3: UPG and NPG over lam and k, by 30 runs of mdeq_cifar.py, one after the other, in OUT/GRAD-LAM-K.
#
#     assets/fig3.sh OUT [flags of mdeq_cifar.py]             # such as runs/fig3 --data toy --epochs 2
#     python assets/figures.py fig3 OUT assets/fig3.png       # the table and the picture, also of fewer runs
#
# Ctrl-C or SIGTERM saves the run and ends the loop.  The same command continues it.  A finished run then only
# starts and ends, and a diverged run is left as it is.  PYTHON=... chooses another interpreter.
set -u
script="$(dirname "$0")/../mdeq_cifar.py"

if [ $# -eq 0 ] || [ "${1#-}" != "$1" ]; then
    echo "usage: $0 OUT [flags of mdeq_cifar.py]" >&2
    exit 2
fi
out=$1
shift
for flag in "$@"; do
    case $flag in
        --grad | --lam | --k | --out | --resume | --grad=* | --lam=* | --k=* | --out=* | --resume=*)
            echo "error: fig3.sh sets ${flag%%=*} itself: leave it out" >&2
            exit 2 ;;
    esac
done

stopped=
stop() {                # ${!:-} is the process of the latest run
    stopped=1
    kill -TERM "${!:-}" 2>/dev/null || exit 0
}
trap stop INT TERM

for grad in upg npg; do
    for lam in 0.3 0.5 1.0; do
        for k in 1 3 5 9 15; do
            run="$out/$grad-$lam-$k"
            if grep -qs '"event": "broken"' "$run/metrics.jsonl"; then
                echo "$run has diverged before"
                continue
            fi
            "${PYTHON:-python}" "$script" "$@" --grad $grad --lam $lam --k $k --out "$run" --resume auto &
            child=$!
            code=0
            # Runs in the background, as bash handles signals only between commands.  A signal ends `wait`.
            while wait $child || code=$?; kill -0 $child 2>/dev/null; do code=0; done
            if [ -n "$stopped" ]; then
                echo "stopped in $run: continue with the same command"
                exit 0
            elif grep -qs '"event": "broken"' "$run/metrics.jsonl"; then
                echo "$run has diverged"
            elif [ $code -ne 0 ]; then
                echo "error: $run has ended with exit code $code" >&2
                exit $code
            fi
        done
    done
done
echo "all runs are done; now: python $(dirname "$0")/figures.py fig3 $out PICTURE.png"
