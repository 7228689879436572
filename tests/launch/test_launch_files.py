"""Scripts pass shellcheck, and the YAML files their schemas."""

import string
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = sorted(
    str(path.relative_to(LAUNCH)) for path in LAUNCH.rglob("*") if path.suffix in (".sh", ".sbatch")
)
SHELLCHECK = Path(sys.executable).parent / "shellcheck"


def check(*arguments, text=None):
    return subprocess.run(
        [SHELLCHECK, *arguments], cwd=LAUNCH.parent, input=text, capture_output=True, text=True
    )


def test_all_scripts_pass_shellcheck():
    done = check("--external-sources", *(f"launch/{name}" for name in SCRIPTS))
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("part", ["setup", "run"])
def test_the_scripts_inside_skypilot_pass_shellcheck(part):
    text = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())[part]
    # Their variables come from outside, and launch/setup.sh was checked above.
    done = check("--shell=bash", "--exclude=SC1091,SC2153", "-", text=text)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_begin_with_what_they_are_for_and_stop_at_errors(name):
    text = (LAUNCH / name).read_text()
    if text.startswith("#!"):
        assert text.startswith("#!/usr/bin/env bash\n# ")
        assert "\nset -euo pipefail\n" in text
    else:
        assert "# Sourced by" in text


NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}
COUNT = {"type": "integer", "minimum": 1}
POD = {
    "type": "object",
    "required": ["containers", "restartPolicy"],
    "properties": {
        "restartPolicy": {"const": "Never"},  # a podFailurePolicy allows no other
        "nodeSelector": {"type": "object", "additionalProperties": {"type": "string"}},
        "tolerations": {"type": "array", "items": {"required": ["key", "operator"]}},
        "containers": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["name", "image", "command", "args", "resources"],
                "properties": {
                    "command": {"type": "array", "items": {"type": "string"}},
                    "args": {"type": "array", "items": {"type": "string"}},
                    "resources": {"properties": {"limits": {"properties": {"google.com/tpu": COUNT}}}},
                },
            },
        },
    },
}
JOB = {
    "type": "object",
    "additionalProperties": False,
    "required": ["template"],
    "properties": {
        "completionMode": {"const": "Indexed"},  # podFailurePolicy and stable host names need it
        "parallelism": COUNT,
        "completions": COUNT,
        "backoffLimit": {"type": "integer", "minimum": 0},
        "podFailurePolicy": {
            "properties": {
                "rules": {
                    "items": {
                        "required": ["action"],
                        "properties": {"action": {"enum": ["FailJob", "FailIndex", "Ignore", "Count"]}},
                    }
                }
            }
        },
        "template": {"type": "object", "required": ["spec"], "properties": {"spec": POD}},
    },
}
# The part of the JobSet resource definition (jobset.x-k8s.io, v1alpha2) that the manifest uses.
JOBSET = {
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": {"type": "object", "required": ["name"], "properties": {"name": NAME}},
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["replicatedJobs"],
            "properties": {
                "failurePolicy": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "maxRestarts": {"type": "integer", "minimum": 1},
                        "restartStrategy": {"enum": ["Recreate", "BlockingRecreate"]},
                        "rules": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "additionalProperties": False,
                                "required": ["action", "name"],
                                "properties": {
                                    "action": {
                                        "enum": [
                                            "FailJobSet",
                                            "RestartJobSet",
                                            "RestartJobSetAndIgnoreMaxRestarts",
                                        ]
                                    },
                                    "name": {"pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
                                    "onJobFailureReasons": {"type": "array", "items": {"type": "string"}},
                                    "targetReplicatedJobs": {"type": "array", "items": {"type": "string"}},
                                },
                            },
                        },
                    },
                },
                "replicatedJobs": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "additionalProperties": False,
                        "required": ["name", "template"],
                        "properties": {
                            "name": NAME,
                            "replicas": COUNT,
                            "template": {
                                "type": "object",
                                "required": ["spec"],
                                "properties": {"spec": JOB},
                            },
                        },
                    },
                },
            },
        },
    },
}
# The part of SkyPilot's task schema that the file uses.
SKYPILOT = {
    "type": "object",
    "additionalProperties": False,
    "required": ["resources", "run"],
    "properties": {
        "name": {"type": "string"},
        "workdir": {"type": "string"},
        "num_nodes": COUNT,
        "setup": {"type": "string"},
        "run": {"type": "string"},
        "envs": {
            "type": "object",
            "propertyNames": {"pattern": "^[a-zA-Z_][a-zA-Z0-9_]*$"},
            "additionalProperties": {"type": ["string", "null"]},
        },
        "resources": {
            "type": "object",
            "additionalProperties": False,
            "required": ["accelerators", "use_spot", "job_recovery"],
            "properties": {
                "accelerators": {"type": "string"},
                "use_spot": {"const": True},
                "job_recovery": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "strategy": {"type": "string"},
                        "max_restarts_on_errors": {"type": "integer", "minimum": 0},
                        "recover_on_exit_codes": {
                            "type": "array",
                            "contains": {"const": 75},
                            "items": {"type": "integer", "minimum": 0, "maximum": 255},
                        },
                    },
                },
            },
        },
        "file_mounts": {
            "type": "object",
            "additionalProperties": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "name": {"type": "string"},
                    "source": {"type": "string"},
                    "store": {"type": "string"},
                    "mode": {"enum": ["MOUNT", "COPY", "MOUNT_CACHED"]},
                },
            },
        },
    },
}


def test_the_jobset_is_one():
    values = {
        "NAME": "run",
        "IMAGE": "us-docker.pkg.dev/my/repo/diffjax:1",
        "ACCELERATOR": "tpu-v5p-slice",
        "TOPOLOGY": "8x8x8",
        "HOSTS": "128",
        "CHIPS": "4",
        "SLICES": "2",
        "CLAIM": "runs",
        "MAX_RESTARTS": "100",
        "ARGUMENTS": '["--config=configs/quickstart.py", "--workdir=/shared/a: b"]',
    }
    jobset = yaml.safe_load(string.Template((LAUNCH / "gke" / "jobset.yaml").read_text()).substitute(values))
    jsonschema.validate(jobset, JOBSET)
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    names = [
        rule["onExitCodes"]["containerName"]
        for rule in jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    ]
    assert names == [pod["containers"][0]["name"]]


def test_the_skypilot_task_is_one():
    jsonschema.validate(yaml.safe_load((LAUNCH / "skypilot.yaml").read_text()), SKYPILOT)
