"""What the scripts ask of gcloud, srun, scontrol and kubectl, which are stand-ins here."""

import os
import shlex
import subprocess

import pytest
import yaml

TPU = {"NAME": "run", "ZONE": "us-west4-a", "ACCELERATOR": "v5litepod-256", "RUNTIME": "v2-alpha-tpuv5-lite"}
PROGRAM = ("--config=configs/quickstart.py", "--workdir=/mnt/run", "--config.data.name=two words")
ABSENT = ["", "ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource was not found", 1]
SCRIPTS = {"tpu_pod.sh": ("queued-resources", "ACTIVE"), "tpu_vm.sh": ("tpu-vm", "READY")}


def state(name):
    return [f"{name}\n", "", 0]


def asked(clone):
    """The verbs of gcloud, in order, such as "describe create"."""
    return " ".join(call[4] for call in clone.calls() if call[0] == "gcloud")


def call_of(clone, verb):
    return next(call for call in clone.calls() if verb in call)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_slice_is_created_set_up_and_run(clone, script):
    resource, ready = SCRIPTS[script]
    clone.answer(describe=[ABSENT, state("CREATING"), state(ready)])
    done = clone.run(script, *PROGRAM, **TPU, CREATE_FLAGS="--spot --internal-ips", SSH_FLAGS="--internal-ip")
    assert done.returncode == 0, done.stderr
    assert asked(clone) == "describe create describe describe scp ssh"
    for call in clone.calls()[1:]:
        assert call[:4] == ["gcloud", "compute", "tpus", resource]
        assert "--zone=us-west4-a" in call
        assert "run" in call or "run:" in call
    assert {"--accelerator-type=v5litepod-256", "--spot", "--internal-ips"} <= set(call_of(clone, "create"))
    assert {"--worker=all", "--internal-ip"} <= set(call_of(clone, "scp")) & set(call_of(clone, "ssh"))
    assert "Done. run is still there" in done.stdout


def test_a_pod_is_a_queued_resource_with_one_node_or_several(clone):
    clone.answer(describe=[ABSENT, state("ACTIVE")] * 2)
    assert clone.run("tpu_pod.sh", **TPU).returncode == 0
    assert clone.run("tpu_pod.sh", **TPU, SLICES="4").returncode == 0
    one, several = (call for call in clone.calls() if "create" in call)
    assert {"--node-id=run", "--runtime-version=v2-alpha-tpuv5-lite"} <= set(one)
    assert {"--node-count=4", "--node-prefix=run"} <= set(several)
    assert "--node-id=run" not in several
    # All hosts at once: in batches of 64, which is gcloud's default, a larger slice would wait for ever.
    assert {"--node=all", "--worker=all", "--batch-size=all"} <= set(call_of(clone, "ssh"))


def test_the_hosts_get_the_code_and_the_whole_command(clone, tmp_path):
    """The command that goes over ssh is run, in a home folder with a worker.sh that reports."""
    prepare = "sudo mount -t nfs 10.0.0.2:/runs '/mnt/my runs'"
    clone.answer(describe=[state("READY")])
    assert clone.run("tpu_vm.sh", *PROGRAM, **TPU, PREPARE=prepare).returncode == 0
    (archive,) = (call for call in clone.calls() if call[0] == "git")
    assert archive[1:3] == ["archive", "--format=tar.gz"]
    assert archive[-1] == "HEAD"
    copied = call_of(clone, "scp")[5]
    assert archive[3] == f"--output={copied}"

    home, code = tmp_path / "home", tmp_path / "code" / "launch"
    home.mkdir()
    code.mkdir(parents=True)
    (code / "worker.sh").write_text('printf "%s\\n" "$EXTRAS" "$PREPARE" "$@"')
    subprocess.run(["tar", "-czf", home / "diffjax.tgz", "-C", code.parent, "launch"], check=True)
    (command,) = (word for word in call_of(clone, "ssh") if word.startswith("--command="))
    command = command.removeprefix("--command=")
    said = subprocess.run(["bash", "-c", command], cwd=home, capture_output=True, text=True, check=True)
    assert said.stdout.splitlines() == ["tpu", prepare, *PROGRAM]

    # While a program runs there, its code stays as it is.
    (home / "diffjax" / "run.pid").write_text(str(os.getpid()))
    (home / "diffjax" / "launch" / "worker.sh").write_text("echo old")
    said = subprocess.run(["bash", "-c", command], cwd=home, capture_output=True, text=True, check=True)
    assert said.stdout == "old\n"


@pytest.mark.parametrize(("script", "gone"), [("tpu_pod.sh", "SUSPENDED"), ("tpu_vm.sh", "PREEMPTED")])
def test_after_a_preemption_the_slice_is_made_again_and_the_run_goes_on(clone, script, gone):
    ready = SCRIPTS[script][1]
    clone.answer(
        describe=[state(ready), state("SUSPENDING"), state("SUSPENDING"), state(gone), ABSENT, state(ready)],
        ssh=[["", "", 134], ["", "", 0]],
    )
    done = clone.run(script, *PROGRAM, **TPU)
    assert done.returncode == 0, done.stderr
    assert asked(clone) == (
        "describe scp ssh describe describe describe delete describe create describe scp ssh"
    )
    first, second = (call for call in clone.calls() if "ssh" in call)
    assert first == second
    assert "--quiet" in call_of(clone, "delete")
    if script == "tpu_pod.sh":
        assert "--force" in call_of(clone, "delete")


def test_the_same_command_goes_on_where_the_script_was_stopped(clone):
    """The queued resource was preempted while nobody looked."""
    clone.answer(describe=[state("SUSPENDED"), ABSENT, state("WAITING_FOR_RESOURCES"), state("ACTIVE")])
    assert clone.run("tpu_pod.sh", *PROGRAM, **TPU).returncode == 0
    assert asked(clone) == "describe delete describe create describe describe scp ssh"


@pytest.mark.parametrize(("code", "runs"), [(75, 2), (255, 2), (2, 1), (1, 1)])
def test_what_ended_on_machines_that_are_there_is_run_again_only_if_it_was_interrupted(clone, code, runs):
    clone.answer(describe=[state("ACTIVE")] * 3, ssh=[["", "", code], ["", "", 0]])
    done = clone.run("tpu_pod.sh", *PROGRAM, **TPU)
    assert done.returncode == (0 if runs == 2 else code)
    assert asked(clone).count("ssh") == runs
    if runs == 1:
        assert "the same command goes on" in done.stderr.lower()


def test_the_number_of_restarts_is_limited(clone):
    clone.answer(describe=[state("ACTIVE")] * 9, ssh=[["", "", 75]] * 9)
    done = clone.run("tpu_pod.sh", **TPU, MAX_RESTARTS="2")
    assert done.returncode == 75
    assert asked(clone).count("ssh") == 3


def test_a_slice_is_deleted_at_the_end_if_that_is_asked_for(clone):
    clone.answer(describe=[state("ACTIVE")])
    assert clone.run("tpu_pod.sh", **TPU, DELETE="yes").returncode == 0
    assert asked(clone).endswith(" ssh delete")


def test_an_answer_that_is_not_understood_creates_nothing(clone):
    clone.answer(describe=[["", "ERROR: (gcloud) PERMISSION_DENIED: no", 1]])
    done = clone.run("tpu_pod.sh", **TPU)
    assert done.returncode == 1
    assert "PERMISSION_DENIED" in done.stderr
    assert asked(clone) == "describe"


def test_a_request_that_fails_is_an_error_and_an_old_one_is_replaced(clone):
    clone.answer(describe=[state("FAILED"), ABSENT, state("FAILED")])
    done = clone.run("tpu_pod.sh", **TPU)
    assert done.returncode == 1
    assert "run was created and is FAILED" in done.stderr
    assert asked(clone) == "describe delete describe create describe"


GKE = {
    "NAME": "run",
    "IMAGE": "image",
    "ACCELERATOR": "tpu-v5-lite-podslice",
    "TOPOLOGY": "16x16",
    "CLAIM": "c",
}


@pytest.mark.parametrize(
    ("script", "variables"), [("tpu_vm.sh", TPU), ("tpu_pod.sh", TPU), ("gke/submit.sh", GKE)]
)
def test_what_is_missing_is_named_before_anything_is_asked(clone, script, variables):
    for name in variables:
        done = clone.run(script, **{key: value for key, value in variables.items() if key != name})
        assert done.returncode != 0
        assert f"{name}: is to be" in done.stderr
    assert clone.calls() == []


def test_slurm_starts_the_program_with_srun(clone):
    done = clone.run("slurm.sbatch", *PROGRAM, SLURM_SUBMIT_DIR=str(clone.folder), SLURM_JOB_ID="7")
    assert done.returncode == 0, done.stderr
    (call,) = clone.calls()
    assert call[0] == "srun"
    assert call[-3 - len(PROGRAM) :] == [".venv/bin/python", "-m", "diffjax.main", *PROGRAM]


@pytest.mark.parametrize(("code", "again"), [(75, True), (2, False), (1, False)])
def test_slurm_puts_an_interrupted_job_back_into_the_queue(clone, code, again):
    clone.answer(srun=[["", "", code]])
    done = clone.run("slurm.sbatch", SLURM_SUBMIT_DIR=str(clone.folder), SLURM_JOB_ID="7")
    assert done.returncode == code
    assert (["scontrol", "requeue", "7"] in clone.calls()) == again


def test_slurm_is_told_to_requeue_and_to_signal_before_the_limit(clone):
    text = (clone.folder / "launch" / "slurm.sbatch").read_text()
    head = text[: text.index("set -euo")]  # sbatch reads no further than the first command
    assert {"--requeue", "--signal=TERM@120", "--open-mode=append"} <= {
        line.removeprefix("#SBATCH ") for line in head.splitlines()
    }
    done = clone.run("slurm.sbatch", SLURM_SUBMIT_DIR=str(clone.tools), SLURM_JOB_ID="7")
    assert done.returncode == 2
    assert "is not the clone" in done.stderr


@pytest.mark.parametrize("ended", ["", "Failed", "Completed"])
def test_a_jobset_that_has_ended_is_replaced_and_one_that_runs_is_left(clone, ended):
    clone.answer(get=[[ended, "", 0]])
    done = clone.run("gke/submit.sh", *PROGRAM, **GKE, SLICES="2")
    assert done.returncode == 0, done.stderr
    verbs = [call[1] for call in clone.calls()]
    assert verbs == (["get", "delete", "apply"] if ended else ["get", "apply"])
    (slices,) = yaml.safe_load(clone.given()[0])["spec"]["replicatedJobs"]
    assert slices["replicas"] == 2
    job = slices["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 64  # 16 x 16 chips, 4 a host
    (container,) = job["template"]["spec"]["containers"]
    assert container["args"] == list(PROGRAM)
    assert container["image"] == "image"


@pytest.mark.parametrize("nodes", [1, 3])
def test_skypilot_runs_the_program_once_on_every_node(clone, nodes):
    clone.python('echo "$JAX_COORDINATOR_ADDRESS,$JAX_NUM_PROCESSES,$JAX_PROCESS_ID"; printf "%s\\n" "$@"')
    task = yaml.safe_load((clone.folder / "launch" / "skypilot.yaml").read_text())
    done = subprocess.run(
        ["bash", "-c", task["run"]],
        cwd=clone.folder,
        env=clone.environment(
            **{key: value or "" for key, value in task["envs"].items()}
            | {"CONFIG": "configs/x.py", "ARGUMENTS": "--config.steps=5 --config.seed=1"},
            SKYPILOT_NUM_NODES=str(nodes),
            SKYPILOT_NODE_RANK=str(nodes - 1),
            SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2\n10.0.0.3",
        ),
        capture_output=True,
        text=True,
        check=True,
    )
    meeting, *words = done.stdout.splitlines()
    assert meeting == (",," if nodes == 1 else "10.0.0.1:8476,3,2")
    assert words == shlex.split(
        "-m diffjax.main --config=configs/x.py --workdir=/runs/x --config.steps=5 --config.seed=1"
    )
