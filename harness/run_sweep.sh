# shellcheck shell=bash
# What run_sweep_ook.sh and run_sweep_ojo.sh share. They set NODE, the device's name, and DEVICE,
# what `docker run` needs for its GPU, and call main in the folder that becomes /app.

usage() {
  cat <<END
./run_sweep_$NODE.sh jax | pytorch | both | help

Builds the image, creates the sweep of sweep_config.json for this device and backend, starts an
agent in the container and prints the address of the sweep's page.

WANDB_API_KEY, WANDB_ENTITY   from the environment, else from .env
WANDB_PROJECT                 likewise; default keras3_edge_baseline
WANDB_BASE_URL                likewise; a server of one's own
COUNT=n      end after n trials (default: when the sweep is done or stopped; LOCAL=1: 20)
SWEEP_ID=id  join a sweep, as printed by the machine that created it. Its trials bear that machine's
             node_name; whose they are stands in their records' device.node_name
LOCAL=1      no account: sweep.py in the container
DRY_RUN=1    print the commands only

Exit codes: 0 done; 1 for some backend the build, the sweep or all its trials failed; 2 bad usage,
no key, no Docker; 130 Ctrl-C.
END
}

refuse() {
  echo "run_sweep_$NODE.sh: error: $*" >&2
  exit 2
}

# Export variables that are not set from .env, which is read, not run, as python-dotenv reads it:
# NAME=value, maybe quoted, maybe with a comment behind it.
read_env() {
  local name value
  for name in "$@"; do
    if [ -z "${!name:-}" ] && [ -f .env ]; then
      value=$(sed -nE "s/^\s*(export\s+)?$name\s*=\s*([^\r]*).*/\2/p" .env | tail -n 1 |
        sed -E -e "s/^'([^']*)'.*/\1/;t" -e 's/^"([^"]*)".*/\1/;t' -e 's/\s+#.*//' -e 's/\s+$//')
      if [ -n "$value" ]; then export "$name=$value"; fi
    fi
  done
}

# Run a command, which DRY_RUN=1 prints instead.
run() {
  if [ -n "${DRY_RUN:-}" ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# in_container IMAGE COMMAND...: as the mounted folder's owner (with sudo that is not this user), who
# can write nothing but that and /tmp. The key goes by stdin: neither a list of processes nor
# `docker inspect` shows it.
in_container() {
  run docker run --rm --init --interactive "${DEVICE[@]}" --hostname "$NODE" \
    --user "$(stat -c %u:%g .)" --read-only --tmpfs /tmp:exec --cap-drop ALL \
    --security-opt no-new-privileges -v "$PWD:/app" ${WANDB_API_KEY:+-e KEY_ON_STDIN=1} \
    -e WANDB_ENTITY -e WANDB_PROJECT -e WANDB_BASE_URL "$@" <<<"${WANDB_API_KEY:-}"
}

count_ok() {
  if [ -f results.jsonl ]; then
    awk '/"status": "ok"/ { n++ } END { print n + 0 }' results.jsonl
  else
    echo 0
  fi
}

# sweep_one jax|pytorch: RESULT is what came of it. Returns 1 where that is nothing.
sweep_one() {
  local image="vit:$NODE-$1" backend=${1/pytorch/torch} file=".cache/sweep-$NODE-$1.yaml"
  local site=${WANDB_BASE_URL:-https://wandb.ai} output page id ok
  RESULT="the image was not built"
  run docker build -f "Dockerfile.$NODE.$1" -t "$image" . || return 1
  if [ -n "${LOCAL:-}" ]; then
    RESULT="sweep.py failed"
    in_container "$image" python sweep.py --backend "$backend" --count "${COUNT:-20}" || return 1
    RESULT="done"
    return 0
  fi
  id=${SWEEP_ID:-}
  if [ -z "$id" ]; then
    RESULT="the sweep was not created"
    in_container "$image" python -m harness.sweep_file "$NODE" "$backend" "$file" || return 1
    set -- wandb sweep --entity "$WANDB_ENTITY" --project "$WANDB_PROJECT" "$file"
    if [ -n "${DRY_RUN:-}" ]; then
      in_container "$image" "$@"
      id=SWEEP_ID
    else
      output=$(in_container "$image" "$@" 2>&1) || { echo "$output" >&2 && return 1; }
      id=$(sed -nE 's/.*wandb agent ([[:alnum:]_./-]+).*/\1/p' <<<"$output")
      if [ -z "$id" ]; then echo "$output" >&2 && return 1; fi
    fi
  fi
  id=${id##*/}
  page=$(sed -nE 's/.*View sweep at: *(\S+).*/\1/p' <<<"${output:-}")
  RESULT=${page:-${site/\/\/api./\/\/}/$WANDB_ENTITY/$WANDB_PROJECT/sweeps/$id}
  echo "$NODE $backend: $RESULT (to join: SWEEP_ID=$id)"
  ok=$(count_ok)
  in_container "$image" wandb agent ${COUNT:+--count "$COUNT"} \
    "$WANDB_ENTITY/$WANDB_PROJECT/$id" || { RESULT="the agent failed: $RESULT" && return 1; }
  # An agent whose trials all failed ends as if all were well; each good one left a record.
  if [ -z "${DRY_RUN:-}" ] && [ "$(count_ok)" -le "$ok" ]; then
    RESULT="no trial ended well: $RESULT"
    return 1
  fi
}

main() {
  local frameworks framework name code=0 lines=()
  case ${1:-} in
    jax | pytorch) frameworks=("$1") ;;
    both) frameworks=(jax pytorch) ;;
    help | -h | --help) usage && exit 0 ;;
    *) refuse "expected jax, pytorch, both or help, got '${1:-}'" ;;
  esac
  if [ $# -gt 1 ]; then refuse "expected one word, got '$*': what else there is stands in help"; fi
  if ! [[ ${COUNT:-1} =~ ^[1-9][0-9]*$ ]]; then refuse "COUNT: expected 1 or more, got $COUNT"; fi
  if [ -n "${SWEEP_ID:-}" ] && [ "$1" = both ]; then
    refuse "SWEEP_ID: a sweep is of one backend: expected jax or pytorch with it, got both"
  fi
  read_env WANDB_API_KEY WANDB_ENTITY WANDB_PROJECT WANDB_BASE_URL
  export WANDB_PROJECT=${WANDB_PROJECT:-keras3_edge_baseline}
  for name in WANDB_API_KEY WANDB_ENTITY; do
    if [ -z "${LOCAL:-}" ] && [ -z "${!name:-}" ]; then
      refuse "$name is not set: write it into .env (the key is at https://wandb.ai/authorize)," \
        "or without an account: LOCAL=1 ./run_sweep_$NODE.sh $1"
    fi
  done
  if ! command -v docker >/dev/null; then
    refuse "docker is not here: see https://docs.docker.com/engine/install"
  fi
  trap 'exit 130' INT
  for framework in "${frameworks[@]}"; do
    if sweep_one "$framework"; then
      lines+=("$framework: $RESULT")
    else
      lines+=("$framework: failed: $RESULT") code=1
    fi
  done
  printf '%s\n' "${lines[@]}"
  exit "$code"
}
