"""The launcher: dry runs print what is executed; manifests and scripts are what clusters accept."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from tpu import launch

REPOSITORY = Path(__file__).resolve().parents[2]
CLOUD = ["--project", "my-project", "--zone", "us-west4-a", "--name", "judge"]
SCORE = ["--", "--gin_file=configs/score/ask_llm.gin", "--gin.CORPUS=gs://b/my corpus"]
TRAIN = ["--", "--gin_file=configs/pretrain/t5_base_c4.gin", "--gin.OUTPUT=gs://b/run"]

# A stand-in for the cloud commands: it records its calls and answers from a list; the last answer
# is repeated.
FAKE = """#!/usr/bin/env python3
import json, os, pathlib, sys
here = pathlib.Path(os.environ["FAKE_CLOUD"])
name = pathlib.Path(sys.argv[0]).name
with (here / "calls").open("a") as calls:
    calls.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
for verb in ("describe", "cat "):
    if any(verb in argument for argument in sys.argv):
        file = here / verb.strip()
        first, *rest = json.loads(file.read_text())
        file.write_text(json.dumps(rest or [first]))
        if first == "fails":
            sys.exit(255)
        print(first)
"""


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """Put recording stand-ins for gcloud, kubectl, ... on PATH; yield a reader of their calls."""
    for name in ("gcloud", "kubectl", "docker", "git", "sbatch", "squeue", "scancel"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(FAKE)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_CLOUD", str(tmp_path))
    monkeypatch.setattr(launch, "REPOSITORY", tmp_path)
    monkeypatch.setattr(launch, "_POLL_SECONDS", 0)
    monkeypatch.setattr(launch, "_ATTEMPTS", 3)
    (tmp_path / ".git").mkdir()
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    answers(tmp_path, describe=["ACTIVE"], cat=["done"])

    def calls() -> list[list[str]]:
        file = tmp_path / "calls"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    return calls


def answers(tmp_path, **lists):
    for verb, lines in lists.items():
        (tmp_path / verb).write_text(json.dumps(lines))


def commands(printed: str) -> list[list[str]]:
    """Return the commands in the output of a dry run."""
    lines = [line.removeprefix("$ ") for line in printed.splitlines() if line.startswith("$ ")]
    return [shlex.split(line.partition("    # until it prints")[0]) for line in lines]


JOBS = [
    ["queued-resource", "--stage", "setup", *CLOUD, "--topology", "v5e:16x16", "--spot"],
    ["queued-resource", "--stage", "setup", *CLOUD, "--slices", "3", "--reserved"],
    ["queued-resource", "--stage", "score", *CLOUD, "--slices", "3", "--watch", *SCORE],
    ["queued-resource", "--stage", "train", *CLOUD, "--topology", "v5p:4x4x4", *TRAIN],
    ["queued-resource", "--stage", "status", *CLOUD],
    ["queued-resource", "--stage", "logs", *CLOUD],
    ["queued-resource", "--stage", "delete", *CLOUD],
]
for stage in launch.STAGES:
    gke = ["jobset", "--stage", stage, *CLOUD, "--cluster", "c", "--image", "r/winnow:1"]
    job = ["slurm", "--stage", stage, "--name", "judge", "--partition", "gpu", "--nodes", "4"]
    tail = {"score": SCORE, "train": TRAIN}.get(stage, [])
    JOBS.append([*gke, "--slices", "2", *tail])
    if stage not in ("setup", "logs"):  # those run bash on this machine
        JOBS.append([*job, "--directory", "/shared/winnow", *tail])


@pytest.mark.parametrize("job", JOBS, ids=lambda job: "-".join(job[:3:2]))
def test_a_dry_run_prints_what_is_executed(job, cloud, capsys, tmp_path):
    assert launch.main(job) == 0
    printed = capsys.readouterr().out
    assert cloud() == [] and not (tmp_path / "runs").exists()

    split = job.index("--") if "--" in job else len(job)
    assert launch.main([*job[:split], "--yes", *job[split:]]) == 0
    assert cloud() == commands(printed)
    for file in (tmp_path / "runs").rglob("*.*") if (tmp_path / "runs").exists() else ():
        shown = "".join(f"    {line}\n".rstrip(" ") for line in file.read_text().splitlines())
        assert re.sub(r" +\n", "\n", shown) in re.sub(r" +\n", "\n", printed)


def test_workers_of_scoring_share_all_shards_between_them(cloud):
    launch.main(["queued-resource", "--stage", "score", *CLOUD, "--slices", "3", "--yes", *SCORE])
    started = [call for call in cloud() if "worker.sh" in call[-1]]
    assert [call[5] for call in started] == ["judge-0", "judge-1", "judge-2"]
    for index, call in enumerate(started):
        inner = shlex.split(call[-1].rpartition("(setsid ")[2])
        assert f"--gin.Score.worker={index}" in inner and "--gin.Score.workers=3" in inner
        assert "--gin.CORPUS=gs://b/my corpus" in inner  # a space survives two shells
        assert "--distributed" not in inner


def test_a_preempted_resource_is_replaced(cloud, tmp_path):
    answers(tmp_path, describe=["SUSPENDED", "WAITING_FOR_RESOURCES", "ACTIVE"])
    answers(tmp_path, cat=["running", "done"])
    job = ["queued-resource", "--stage", "train", *CLOUD, "--watch", "--delete_when_done", "--yes"]
    assert launch.main([*job, *TRAIN]) == 0
    known = ("create", "delete", "describe", "worker.sh", "setup.sh", "cat", "git")

    def word(call):
        return next(w for w in known if any(w in argument for argument in reversed(call)))

    words = [word(call) for call in cloud()]
    again = ["delete", "create", "describe", "describe", "git", "setup.sh", "setup.sh", "worker.sh"]
    assert words == ["worker.sh", "describe", *again, "cat", "describe", "cat", "delete"]


def test_queries_that_fail_for_a_while_are_retried(cloud, tmp_path):
    answers(tmp_path, describe=["ACTIVE", "fails", "ACTIVE"], cat=["fails", "running", "done"])
    job = ["queued-resource", "--stage", "train", *CLOUD, "--watch", "--yes"]
    assert launch.main([*job, *TRAIN]) == 0
    assert not any("create" in call for call in cloud())


def test_a_failed_worker_is_reported(cloud, tmp_path, capsys):
    answers(tmp_path, cat=["done\nfailed 1"])
    job = ["queued-resource", "--stage", "train", *CLOUD, "--watch", "--yes"]
    assert launch.main([*job, *TRAIN]) == 1
    assert "1 of 2 workers failed 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (["--topology", "v5e:16"], "sides"),
        (["--topology", "v5e:3x5"], "no such v5e slice; there are 1x1, 2x2"),
        (["--topology", "v6e:4x2"], "no such v6e slice"),
        (["--topology", "v5p:4x4x6"], "multiples of 4"),
        (["--delete_when_done"], "--watch"),
        (["--topology", "v7:2x2"], "v5e"),
        (["--spot", "--reserved"], "--reserved"),
        (["--name", "Judge_1"], "--name"),
        (["--topology", "v5e:4x4", "--slices", "2"], "one host"),
        (["--project", ""], "--project"),
        (["--yes", "--dry_run"], "--dry_run"),
    ],
)
def test_wrong_settings_are_refused(change, word, cloud, capsys):
    job = ["queued-resource", "--stage", "score", *CLOUD, "--yes", *change, *SCORE]
    assert launch.main(job) == 2
    printed = capsys.readouterr()
    assert word in printed.err and printed.out == ""
    assert cloud() == []


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--gin_file=configs/score/ask_lm.gin"], "did you mean configs/score/ask_llm.gin?"),
        (["--gin.MODEL=google/flan-t5-xl"], "requires a --gin_file"),
        (["--gin_file=configs/score/ask_llm.gin", "runs/out"], "'runs/out'"),
        ([], "arguments after --"),
    ],
)
@pytest.mark.parametrize("launcher", ["queued-resource", "jobset", "slurm"])
def test_wrong_arguments_of_the_program_are_refused(launcher, arguments, word, cloud, capsys):
    own = ["--cluster", "c", "--image", "i", "--partition", "gpu", "--directory", "/w"]
    assert launch.main([launcher, "--stage", "score", *CLOUD, *own, "--", *arguments]) == 2
    printed = capsys.readouterr()
    assert word in printed.err and printed.out == ""


def test_only_a_checkout_can_be_installed_on_machines(cloud, capsys, tmp_path):
    (tmp_path / ".git").rmdir()
    assert launch.main(["queued-resource", "--stage", "setup", *CLOUD]) == 2
    assert "not a git checkout" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# Manifests and scripts

FIELDS = {  # of jobset.x-k8s.io/v1alpha2 and batch/v1, as far as they are used
    "jobset": {"apiVersion", "kind", "metadata", "spec"},
    "spec": {"failurePolicy", "replicatedJobs"},
    "failurePolicy": {"maxRestarts", "rules"},
    "replicatedJob": {"name", "replicas", "template"},
    "job": {"completionMode", "parallelism", "completions", "backoffLimit",
            "backoffLimitPerIndex", "podFailurePolicy", "template"},
    "pod": {"restartPolicy", "terminationGracePeriodSeconds", "serviceAccountName",
            "nodeSelector", "tolerations", "containers"},
    "container": {"name", "image", "workingDir", "command", "args", "ports", "resources"},
}  # fmt: skip


@pytest.mark.parametrize("topology", ["v5e:2x4", "v5e:16x16", "v5p:4x4x4"])
@pytest.mark.parametrize("stage", ["score", "train"])
@pytest.mark.parametrize("spot", [True, False])
def test_a_jobset_has_only_fields_of_its_schema(stage, topology, spot):
    slices = 3 if stage == "train" or topology == "v5e:2x4" else 1
    settings = launch.Settings(
        launcher="jobset", stage=stage, project="p", zone="z", cluster="c", image="i",
        topology=topology, slices=slices, spot=spot, arguments=("--gin_file=x", "--gin.A=it's"),
    )  # fmt: skip
    jobset = yaml.safe_load(launch.jobset_yaml(settings))
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    for kind, value in {
        "jobset": jobset, "spec": jobset["spec"], "failurePolicy": jobset["spec"]["failurePolicy"],
        "replicatedJob": replicated, "job": job, "pod": pod, "container": container,
    }.items():  # fmt: skip
        assert set(value) <= FIELDS[kind], kind

    # There are as many pods as the slices have hosts.
    pods = replicated["replicas"] * job["parallelism"]
    assert pods == slices * settings.shape.hosts and job["parallelism"] == job["completions"]
    assert pod["restartPolicy"] == "Never"  # required by the pod failure policy
    assert ("tolerations" in pod) == spot
    codes, disruption = job["podFailurePolicy"]["rules"]
    assert codes["onExitCodes"]["values"] == [75]
    assert codes["onExitCodes"]["containerName"] == container["name"]
    assert disruption["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    if settings.apart:  # workers are restarted one by one
        assert codes["action"] == disruption["action"] == "Ignore"
    else:  # all are restarted, which is not counted
        assert codes["action"] == disruption["action"] == "FailJob"
        (rule,) = jobset["spec"]["failurePolicy"]["rules"]
        assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
        assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]

    # The container's shell runs the program with its arguments, and the index of an independent
    # worker.
    said = container["args"][0].replace("exec python", "printf '%s\\n'")
    shell = subprocess.run(
        [*container["command"], said], env=os.environ | {"JOB_COMPLETION_INDEX": "2"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = shell.stdout.splitlines()
    assert {"--gin_file=x", "--gin.A=it's"} <= set(lines)
    assert ("--gin.Score.worker=2" in lines) == settings.apart
    assert ("--distributed" in lines) != settings.apart


@pytest.mark.parametrize("stage", ["score", "train"])
@pytest.mark.parametrize(
    ("code", "restarts", "requeued"), [(0, 0, False), (75, 99, True), (1, 3, True), (1, 10, False)]
)
def test_a_stopped_slurm_job_is_requeued(stage, code, restarts, requeued, tmp_path):
    """Runs the batch script itself, with stand-ins for srun and scontrol."""
    settings = launch.Settings(
        launcher="slurm", stage=stage, partition="gpu", directory=str(tmp_path), nodes=4,
        arguments=("--gin_file=x",),
    )  # fmt: skip
    script = tmp_path / "job.sbatch"
    script.write_text(launch.sbatch(settings))
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    options = re.findall(r"^#SBATCH (--[^= \n]+)", script.read_text(), re.MULTILINE)
    assert len(options) == len(set(options)) and ("--array" in options) == settings.apart
    (tmp_path / "srun").write_text(f'#!/bin/bash\necho "$@" >{tmp_path}/ran\nexit {code}\n')
    (tmp_path / "scontrol").write_text(f'#!/bin/bash\necho "$@" >{tmp_path}/asked\n')
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "8", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2",
             "SLURM_JOB_NODELIST": "n[1-4]", "SLURM_RESTART_COUNT": str(restarts)}  # fmt: skip
    environment = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True)
    asked = tmp_path / "asked"
    assert asked.exists() == requeued
    if requeued:
        assert asked.read_text().split() == ["requeue", "7_2" if settings.apart else "8"]
    assert done.returncode == (0 if requeued else code)
    ran = (tmp_path / "ran").read_text().split()
    assert ("--gin.Score.worker=2" in ran and "--gin.Score.workers=4" in ran) == settings.apart


def test_templates_are_filled_and_scripts_parse():
    for script in (REPOSITORY / "tpu").rglob("*.sh"):
        assert subprocess.run(["bash", "-n", script]).returncode == 0, script
    with pytest.raises(launch.LaunchError, match="python"):
        launch.render("setup.sh", {"extra": "tpu"}, set())
    filled = launch.render("setup.sh", {"extra": "tpu", "python": "3.12"}, set())
    assert "{{" not in filled and "only:" not in filled


# --------------------------------------------------------------------------------------------------
# The worker's loop


def worker(tmp_path, body: str, failures: int = 2) -> subprocess.Popen:
    script = tmp_path / "stage.sh"
    script.write_text(f"#!/bin/bash\necho run >>{tmp_path}/runs\n{body}\n")
    loop = REPOSITORY / "tpu" / "worker.sh"
    return subprocess.Popen(
        ["bash", loop, "stage", str(failures), "bash", script],
        cwd=tmp_path,
        env=os.environ | {"WINNOW_RESTART_SECONDS": "0"},
    )


def runs(tmp_path) -> int:
    return len((tmp_path / "runs").read_text().splitlines())


def status(tmp_path) -> str:
    return (tmp_path / "logs" / "stage.status").read_text().strip()


def test_exit_code_75_is_restarted_without_limit(tmp_path):
    count = f"$(wc -l <{tmp_path}/runs)"
    assert worker(tmp_path, f'[ "{count}" -lt 6 ] && exit 75; exit 0', failures=0).wait(20) == 0
    assert (runs(tmp_path), status(tmp_path)) == (6, "done")


def test_failures_are_counted(tmp_path):
    assert worker(tmp_path, "exit 3", failures=2).wait(20) == 3
    assert (runs(tmp_path), status(tmp_path)) == (3, "failed 3")


def test_a_signal_is_forwarded_and_ends_the_loop(tmp_path):
    process = worker(
        tmp_path, "trap 'sleep 0.3; echo saved; exit 75' TERM; touch armed; sleep 30 & wait"
    )
    while not (tmp_path / "armed").exists():
        time.sleep(0.02)
    process.terminate()
    assert process.wait(20) == 75
    assert (runs(tmp_path), status(tmp_path)) == (1, "failed 75")
    assert "saved" in (tmp_path / "logs" / "stage.log").read_text()


def test_a_second_worker_of_the_same_name_refuses_to_start(tmp_path):
    first = worker(tmp_path, "sleep 5")
    while not (tmp_path / "runs").exists():
        time.sleep(0.02)
    assert worker(tmp_path, "exit 0").wait(20) == 1
    assert first.wait(20) == 0
    assert runs(tmp_path) == 1
