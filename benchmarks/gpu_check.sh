#!/usr/bin/env bash
# Test and measure on a bare machine with a GPU, Python, PyTorch, torchvision and Triton.
#
#   benchmarks/gpu_check.sh --pack wheels [3.12]       with a network: lay the wheels aside, for this Python
#   benchmarks/gpu_check.sh --wheels wheels --out DIR  on the machine: everything, in at most 8 minutes
#   benchmarks/gpu_check.sh --quick --device cpu       a try of it without a GPU, in this environment
#
# Nothing is fetched on the machine. Each part has its own limit of time, and all share the 8 minutes.
# A part that fails does not stop the others. DIR (work_dirs/gpu_check) gets their output and the
# results of the benchmarks, as `make bench` writes them. PYTHON names another Python than python3.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
wheels="" out=$root/work_dirs/gpu_check device=cuda quick="" failed=""

# Detectron2 in Python with what it imports, and pytest. PyTorch, torchvision and Triton are there.
pure=(fvcore iopath yacs portalocker termcolor tabulate cloudpickle omegaconf hydra-core
      antlr4-python3-runtime tqdm packaging pytest iniconfig pluggy pygments)
compiled=(pyyaml pycocotools pillow numpy)

pack() {
    local version=${2:-3.12} python=.venv/bin/python folder
    [ -x "$root/$python" ] || { echo "error: make setup comes first: $python is missing" >&2; exit 2; }
    mkdir -p "$1" && folder=$(cd "$1" && pwd) && cd "$root" || exit 2
    $python -m pip wheel --quiet --no-deps -c constraints.txt -w "$folder" "${pure[@]}" packaging/detectron2 &&
        $python -m pip download --quiet --no-deps -c constraints.txt -d "$folder" --only-binary :all: \
            --python-version "$version" --platform manylinux_2_28_x86_64 \
            --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 "${compiled[@]}" &&
        echo "laid $(ls "$folder" | wc -l) wheels ($(du -sh "$folder" | cut -f1)) into $folder"
    exit
}

usage() { sed -n '2,11s/^# \{0,1\}//p' "$0"; }

while [ $# -gt 0 ]; do
    case $1 in
        --pack) [ $# -gt 1 ] || { usage >&2; exit 2; }; pack "${@:2}" ;;
        --wheels | --out | --device)
            [ $# -gt 1 ] || { echo "error: $1 needs a value" >&2; exit 2; }
            printf -v "${1#--}" %s "$2"; shift ;;
        --quick) quick=--quick ;;
        -h | --help) usage; exit ;;
        *) echo "error: unknown argument $1" >&2; usage >&2; exit 2 ;;
    esac
    shift
done
options=${quick:---repetitions 5}
mkdir -p "$out"
out=$(cd "$out" && pwd)
python=${PYTHON:-python3}
if [ -n "$wheels" ]; then
    [ -d "$wheels" ] || { echo "error: --wheels $wheels: there is no such folder" >&2; exit 2; }
    wheels=$(cd "$wheels" && pwd)
    # Beside the machine's own packages, wherever these are
    "$python" -m pip install --quiet --no-index --no-deps --upgrade --target "$out/site" "$wheels"/*.whl || exit 2
    PYTHONPATH=$out/site${PYTHONPATH:+:$PYTHONPATH}
fi
cd "$root" || exit 2
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} MPLBACKEND=Agg

# part NAME SECONDS COMMAND…
part() {
    local name=$1 start=$SECONDS left=$((470 - SECONDS))
    local limit=$(($2 < left ? $2 : left > 1 ? left : 1))
    shift 2
    timeout --kill-after 5 "$limit" "$@" >"$out/$name.log" 2>&1
    local status=$?
    case $status in 124 | 137) echo "stopped after $limit s" >>"$out/$name.log" ;; esac
    [ $status = 0 ] || failed="$failed $name"
    echo "== $name: exit $status after $((SECONDS - start)) s"
    tail -n 25 "$out/$name.log"
}

part machine 60 "$python" -c "
import sys, torch
print('Python', sys.version.split()[0], 'torch', torch.__version__)
print(torch.cuda.get_device_properties(0) if '$device' != 'cpu' else 'on the CPU')"
part tests 150 "$python" -m pytest -q -p no:cacheprovider tests/core/test_triplet_cuda.py \
    tests/core/test_triplet_choice.py -k "gpu or graph or bits or choice or kernels"
part choice 60 "$python" -c "
import logging, time, torch
logging.basicConfig(level=logging.INFO, format='%(message)s')
from plugin_core import TripletAttention
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    start = time.perf_counter()
    TripletAttention().to('$device')(torch.randn(2, 256, 50, 76, device='$device').to(dtype))
    print(dtype, f'{time.perf_counter() - start:.2f} s')"
part blocks 120 "$python" benchmarks/run.py --device "$device" $options --out "$out" \
    --only triplet_attention ida batchformer registry
part detectors 210 "$python" benchmarks/run.py --device "$device" $options --out "$out" \
    --only detector_step
echo "wrote $out in $SECONDS s"
[ -z "$failed" ] || { echo "failed:$failed" >&2; exit 1; }
