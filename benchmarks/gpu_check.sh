#!/usr/bin/env bash
# Does it work on a GPU? The environment, the tests that take a device, and a short training of each algorithm.
#
#   bash benchmarks/gpu_check.sh                      three minutes on a GPU and 16 cores
#   bash benchmarks/gpu_check.sh cpu logs fixture     without a GPU; only tests whose name has this in it, no trainings
#
# Writes a log of each test file and training below the directory of logs (gpu-check); exit status 1 if one failed. What
# falls back to the plain path fails here. PYTHON names another Python than `python`, LIMIT other seconds than 175.
set -u
cd "$(dirname "$0")/.."
device=${1:-cuda} logs=${2:-gpu-check} only=${3:-}
python=${PYTHON:-python}
strict=(-W "error:compilation failed" -W "error:recording failed")
mkdir -p "$logs"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 OMP_NUM_THREADS=2 TORCHINDUCTOR_COMPILE_THREADS=2
limit=${LIMIT:-175} # seconds of all of it: what still runs then has failed

{
    [ "$device" = cpu ] || nvidia-smi
    git rev-parse HEAD 2>/dev/null
    nproc
    "$python" - <<'END'
import platform, sys
import ale_py, cv2, gymnasium, numpy, torch
print("Python", sys.version.split()[0], platform.machine())
for module in (torch, numpy, gymnasium, ale_py, cv2):
    print(module.__name__, module.__version__)
print("CUDA", torch.version.cuda, "cuDNN", torch.backends.cudnn.version())
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")
END
} 2>&1 | tee "$logs/environment.log"

# A name and a command, which runs in a process of its own; as many side by side as there are cores.
one() {
    local name=$1 started=$SECONDS status
    shift
    timeout -k 5 "$((SECONDS < limit ? limit - SECONDS : 1))" "$@" >"$logs/$name.log" 2>&1
    status=$?
    case $name in test_*) [ $status -ne 5 ] || status=0 ;; esac # no test has that in its name
    echo "$name: status $status after $((SECONDS - started)) s: $(grep -v '^[[:space:]]*$' "$logs/$name.log" | tail -n 1)"
    return $status
}

processes=() status=0
run() {
    while [ "$(jobs -rp | wc -l)" -ge "$(nproc)" ]; do sleep 0.2; done
    one "$@" &
    processes+=($!)
}

tests() { # a file, and a word that its tests have in their names
    run "test_$1_$2" "$python" "${strict[@]}" -m pytest "tests/test_$1.py" --device "$device" -q -p no:cacheprovider \
        --durations=5 -k "$2${only:+ and $only}"
}

# The longest first.
for number in 7 6 5 1 4 0 2 3; do
    tests resume "config$number"
done
for file in gpu compiled ppo_update dqn_update ppo_train dqn_train evaluate_and_plots pictures config_and_cli; do
    tests "$file" test
done
if [ -z "$only" ]; then
    for_all=(--device "$device" --final-games 0 --compile)
    short=(--num-envs 8 --total-timesteps 20480)
    run train_q "$python" train_q.py --num-episodes 300 --run-dir "$logs/q" --device "$device"
    run train_dqn "$python" "${strict[@]}" train_dqn.py --total-timesteps 3000 --run-dir "$logs/dqn" "${for_all[@]}"
    run train_dqn_pong "$python" "${strict[@]}" train_dqn.py --env-id PongNoFrameskip-v4 --total-timesteps 4000 \
        --train-frequency 4 --batch-size 32 --buffer-size 4000 --eval-frequency none --run-dir "$logs/dqn-pong" "${for_all[@]}"
    run train_ppo "$python" "${strict[@]}" train_ppo.py "${short[@]}" --run-dir "$logs/ppo" "${for_all[@]}"
    run train_ppo_float32 "$python" "${strict[@]}" train_ppo.py "${short[@]}" --precision float32 \
        --run-dir "$logs/ppo-float32" "${for_all[@]}"
fi
for process in "${processes[@]}"; do
    wait "$process" || status=1
done
echo "everything: status $status"
exit $status
