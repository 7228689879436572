# shellcheck shell=bash
# Sourced by tpu_vm.sh and tpu_pod.sh; the latter's header says what the variables are. They define
#   ready              the state in which the machines can be used
#   state              prints the state, or nothing if there is no such resource
#   create, remove     make and delete the machines
#   copy FILE          copies FILE into the home folder of every host
#   on_every_host CMD  runs CMD on every host, and ends with the exit code of one that failed

: "${ready:?}"
interrupted=75 # the program saved and left because of a signal
lost_connection=255

describe() { # RESOURCE FORMAT: of $NAME; prints nothing if there is none, and fails if that cannot be told
  local errors
  errors=$(mktemp)
  if ! gcloud compute tpus "$1" describe "$NAME" --zone="$ZONE" --format="$2" 2>"$errors" &&
    ! grep -q NOT_FOUND "$errors"; then
    cat "$errors" >&2
    rm "$errors"
    return 1
  fi
  rm "$errors"
}

bring_up() { # waits until the machines are ready; those that were preempted are replaced
  local now created=
  while true; do
    now=$(state)
    case $now in
      "$ready") return ;;
      "")
        echo "Creating $NAME."
        create
        created=yes
        ;;
      PREEMPTED | TERMINATED | SUSPENDED)
        echo "$NAME is $now; deleting it, to create it again."
        remove
        ;;
      FAILED)
        if [[ -n $created ]]; then
          echo "error: $NAME was created and is FAILED; see gcloud compute tpus queued-resources describe $NAME." >&2
          return 1
        fi
        remove
        ;;
      STOPPED)
        gcloud compute tpus tpu-vm start "$NAME" --zone="$ZONE"
        ;;
      *)
        echo "$NAME is $now; waiting."
        sleep "${POLL_SECONDS:-30}"
        ;;
    esac
  done
}

run_once() { # CODE ARGUMENTS: copies the code, sets up, and runs the program or goes on following it
  local command
  copy "$1" || return "$lost_connection"
  shift
  # Code is not replaced below a program that runs.
  # shellcheck disable=SC2016
  command='mkdir -p diffjax && cd diffjax &&
{ { [ -e run.pid ] && kill -0 "$(cat run.pid)" 2>/dev/null; } || tar -xzf ../diffjax.tgz; } &&'
  command+=$(printf ' %q' env "EXTRAS=${EXTRAS:-tpu}" "PREPARE=${PREPARE:-}" bash launch/worker.sh "$@")
  on_every_host "$command"
}

run_to_the_end() { # ARGUMENTS of the program
  local folder code now restarts=0
  folder=$(mktemp -d)
  git archive --format=tar.gz --output="$folder/diffjax.tgz" HEAD
  while true; do
    bring_up
    code=0
    run_once "$folder/diffjax.tgz" "$@" || code=$?
    if ((code == 0)); then
      break
    fi
    sleep "${POLL_SECONDS:-30}" # a preemption may be seen by the program before it shows in the state
    now=$(state)
    if [[ $now == "$ready" && $code != "$interrupted" && $code != "$lost_connection" ]]; then
      echo "error: the program ended with exit code $code, and $NAME is still $now. The same command goes on." >&2
      return "$code"
    fi
    if ((++restarts > ${MAX_RESTARTS:-100})); then
      echo "error: $NAME was lost $restarts times. The same command goes on." >&2
      return "$code"
    fi
    echo "The program ended with exit code $code, and $NAME is ${now:-gone}: going on (restart $restarts)."
  done
  rm -r "$folder"
  if [[ -n ${DELETE:-} ]]; then
    remove
  else
    echo "Done. $NAME is still there, and costs money; DELETE=yes deletes it at the end."
  fi
}
