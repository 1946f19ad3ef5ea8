"""Launcher of Winnow's jobs on TPU VMs (queued resources), GKE (JobSet) and Slurm clusters.

    python -m tpu.launch queued-resource --stage setup --name judge --project P --zone Z \\
        --topology v5e:2x4 --slices 8 --spot
    python -m tpu.launch queued-resource --stage score ... -- \\
        --gin_file=configs/score/ask_llm.gin --gin.MODEL=google/flan-t5-xl \\
        --gin.CORPUS=gs://B/c4/corpus --gin.OUTPUT=gs://B/c4/ask_llm
    python -m tpu.launch jobset --stage train ... -- --gin_file=configs/pretrain/t5_base_c4.gin ...
    python -m tpu.launch slurm --stage train ... -- --gin_file=...

Prints every command and file in full and changes nothing; with --yes it executes them.
tpu/README.md is a guide from a project to a running job.

Stages: setup (machines and installation), score, train, status, logs, and delete, which removes
everything that costs money. Arguments after `--` are passed to `python -m pruning score` or to
`python train.py`.

Choices
- Stopped jobs are restarted: workers with exit code 75 (stopped on request) at once, with other
  codes a limited number of times; preempted machines by `--watch` or by the cluster. The programs
  resume from their shards or checkpoints, so the launcher has no state of its own.
- Scoring needs no communication. With slices of one host each slice is a worker of its own, takes
  the shards of its index, and is restarted independently. Such slices are also the easiest to get.
- Training, and scoring on one slice of several hosts, runs as one job of all processes
  (`--distributed`): if one process ends, all end and all are restarted.
- Templates and scripts are plain files (tpu/templates, tpu/worker.sh). A line that ends in
  "# only: FLAG" is kept if FLAG applies.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from models.terminal import say
from tpu.chips import Topology, TopologyError

REPOSITORY = Path(__file__).resolve().parent.parent
TEMPLATES = Path(__file__).resolve().parent / "templates"
STAGES = ("setup", "score", "train", "status", "logs", "delete")
PYTHON = "3.12"
JOBSET_RELEASE = "https://github.com/kubernetes-sigs/jobset/releases/download/v0.8.0/manifests.yaml"
_LOST = ("SUSPENDED", "SUSPENDING", "FAILED")  # final states of a queued resource
_POLL_SECONDS = 30
_ATTEMPTS = 20  # of a query, in a row, before the launcher gives up


class LaunchError(ValueError):
    """Settings that cannot be launched, or a command that failed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of all launchers; each uses some of them.

    Attributes:
      launcher, stage: which launcher, and what it does.
      name: prefix of machines and jobs; lower-case letters, digits and "-".
      project: Google Cloud project.
      zone: zone of the machines; for jobset the zone or region of the cluster.
      topology: topology of a slice, such as "v5e:16x16".
      slices: number of slices.
      spot: use spot machines, which are cheaper and may be preempted.
      reserved: use machines of a reservation.
      runtime: software version of the TPU VMs; "" selects the default of the chip.
      cluster: name of the GKE cluster.
      image: container image with its registry.
      service_account: Kubernetes service account with access to the bucket.
      partition: Slurm partition.
      account: Slurm account.
      time: Slurm time limit; after it the job is requeued and continues.
      nodes: number of nodes; in scoring each is a worker of its own.
      gpus: GPUs per node.
      directory: path of the repository on the shared file system of the cluster.
      failures: number of failures of a worker after which it is not restarted.
      watch: keep running, report the state, and replace preempted machines.
      delete_when_done: with `watch`, delete the machines when the job is done.
      arguments: arguments of the program.
    """

    launcher: str
    stage: str
    name: str = "winnow"
    project: str = ""
    zone: str = ""
    topology: str = "v5e:2x4"
    slices: int = 1
    spot: bool = False
    reserved: bool = False
    runtime: str = ""
    cluster: str = ""
    image: str = ""
    service_account: str = "default"
    partition: str = ""
    account: str = ""
    time: str = "24:00:00"
    nodes: int = 1
    gpus: int = 8
    directory: str = ""
    failures: int = 10
    watch: bool = False
    delete_when_done: bool = False
    arguments: tuple[str, ...] = ()

    def __post_init__(self):
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", self.name):
            raise LaunchError(f"--name {self.name!r}: lower-case letters, digits and -, up to 40")
        if self.slices < 1 or self.nodes < 1 or self.gpus < 1:
            raise LaunchError("--slices, --nodes and --gpus must be at least 1")
        if self.failures < 0:
            raise LaunchError(f"--failures {self.failures}: must be 0 or more")
        if self.spot and self.reserved:
            raise LaunchError("give --spot or --reserved, not both")
        if self.delete_when_done and not self.watch:
            raise LaunchError("--delete_when_done requires --watch")
        needed = {
            "queued-resource": ("project", "zone"),
            "jobset": ("project", "zone", "cluster", "image"),
            "slurm": ("partition", "directory"),
        }[self.launcher]
        if missing := [f"--{name}" for name in needed if not getattr(self, name)]:
            raise LaunchError(f"{self.launcher} requires {', '.join(missing)}")
        if self.stage in ("score", "train") and not self.arguments:
            raise LaunchError(f"--stage {self.stage} requires the program's arguments after --")
        if self.launcher != "slurm":
            Topology.parse(self.topology)
            if self.stage == "score" and self.slices > 1 and self.shape.hosts > 1:
                raise LaunchError(
                    f"scoring on several slices requires slices of one host: {self.topology} has "
                    f"{self.shape.hosts}. Give --topology {self.shape.kind}:"
                    f"{'2x4' if self.shape.chip.dimensions == 2 else '2x2x1'} and more --slices."
                )

    @property
    def shape(self) -> Topology:
        return Topology.parse(self.topology)

    @property
    def nodes_of_slices(self) -> list[str]:
        """Names of the TPU VM nodes, one per slice."""
        return [self.name] if self.slices == 1 else [f"{self.name}-{i}" for i in range(self.slices)]

    @property
    def apart(self) -> bool:
        """True if workers run independently, each with an index."""
        if self.stage != "score":
            return False
        return self.launcher == "slurm" or self.shape.hosts == 1


def check_program(settings: Settings) -> None:
    """Raise LaunchError if there is no program to launch, or its arguments cannot be right.

    Checks that this is a clone, the form of the arguments, and that configuration files exist:
    relative paths are looked up in the repository, which is what the machines get a copy of.
    """
    if settings.stage in ("setup", "score", "train") and not (REPOSITORY / ".git").exists():
        raise LaunchError(
            f"{REPOSITORY} is not a git checkout: launch from a clone of the repository, whose "
            "committed state is what the machines get"
        )
    if settings.stage not in ("score", "train"):
        return
    names = [
        value
        for argument in settings.arguments
        for flag, equals, value in (argument.partition("="),)
        if flag == "--gin_file" and equals
    ]
    for argument in settings.arguments:
        if not argument.startswith("--"):
            raise LaunchError(f"{argument!r} after --: arguments are written --NAME=VALUE")
    if not names:
        raise LaunchError(f"--stage {settings.stage} requires a --gin_file=... after --")
    for name in names:
        if "://" in name or (REPOSITORY / name).is_file():
            continue
        known = [str(f.relative_to(REPOSITORY)) for f in (REPOSITORY / "configs").rglob("*.gin")]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise LaunchError(f"--gin_file={name}: no such file in {REPOSITORY}{hint}")


# --------------------------------------------------------------------------------------------------
# Execution and dry runs


class Executor:
    """Execution of commands and writing of files."""

    def write(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        self._print(f"wrote {path}")

    def run(self, *command: str) -> None:
        """Run a command. Raises LaunchError if it fails."""
        self._print(f"$ {shlex.join(command)}")
        self._check(subprocess.run(command, cwd=REPOSITORY), command)

    def query(self, *command: str, assume: str) -> str:
        """Return the output of a command; a dry run returns `assume`.

        Failures are retried, because machines may be restarting and networks slow.

        Raises:
          LaunchError: _ATTEMPTS attempts in a row failed.
        """
        for _ in range(_ATTEMPTS):
            done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
            if done.returncode == 0 or done.stdout.strip():
                return done.stdout.strip()
            self.wait(_POLL_SECONDS)
        self._check(done, command)
        return ""

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)

    @staticmethod
    def _check(done: subprocess.CompletedProcess, command: Sequence[str]) -> None:
        if done.returncode:
            raise LaunchError(f"exit status {done.returncode} of: {shlex.join(command)}")

    @staticmethod
    def _print(line: str) -> None:
        say(line)


class DryRun(Executor):
    """Printing of the same commands and files, without any effect."""

    def write(self, path: Path, text: str) -> None:
        self._print(f"# writes {path}:")
        self._print("".join(f"    {line}\n" for line in text.splitlines()).rstrip("\n"))

    def run(self, *command: str) -> None:
        self._print(f"$ {shlex.join(command)}")

    def query(self, *command: str, assume: str) -> str:
        self._print(f"$ {shlex.join(command)}    # until it prints {assume}")
        return assume

    def wait(self, seconds: float) -> None:
        pass


def render(template: str, values: dict[str, object], flags: set[str]) -> str:
    """Return a template with {{names}} filled in, without lines whose "# only: FLAG" is unset.

    Raises:
      LaunchError: a name in the template is missing from `values`.
    """
    lines = []
    for line in (TEMPLATES / template).read_text().splitlines():
        kept, _, flag = line.partition("  # only: ")
        if not flag or flag in flags:
            lines.append(kept)

    def value(match: re.Match) -> str:
        if match[1] not in values:
            raise LaunchError(f"{template}: no value for {match[1]!r}")
        return str(values[match[1]])

    return re.sub(r"\{\{(\w+)\}\}", value, "\n".join(lines)) + "\n"


def program(settings: Settings, python: str, index: str | None) -> str:
    """Return the shell command of a stage.

    Args:
      index: shell text of the worker's index; None if the processes form one job.
    """
    arguments = list(settings.arguments)
    if settings.stage == "train":
        command = [python, "train.py", "--distributed", *arguments]
    elif index is None:
        command = [python, "-m", "pruning", "score", "--distributed", *arguments]
    else:
        workers = settings.nodes if settings.launcher == "slurm" else settings.slices
        command = [python, "-m", "pruning", "score", *arguments]
        command += [f"--gin.Score.workers={workers}"]
        return f"{shlex.join(command)} --gin.Score.worker={index}"
    return shlex.join(command)


# --------------------------------------------------------------------------------------------------
# TPU VMs, by queued resources

_RESOURCES = ("gcloud", "compute", "tpus", "queued-resources")
_VM = ("gcloud", "compute", "tpus", "tpu-vm")


class QueuedResource:
    """A queued resource with its TPU VMs: one node per slice."""

    def __init__(self, settings: Settings, executor: Executor):
        self._settings, self._executor = settings, executor
        self._place = ("--project", settings.project, "--zone", settings.zone)
        self._nodes = settings.nodes_of_slices

    def run(self) -> int:
        """Execute the stage; return the exit status."""
        settings = self._settings
        if settings.stage == "setup":
            self._create()
            self._install()
        elif settings.stage in ("score", "train"):
            self._start()
            if settings.watch:
                return self._watch()
        elif settings.stage == "status":
            self._executor.run(*_RESOURCES, "describe", settings.name, *self._place)
            for node in self._nodes:
                self._on(node, "tail -n 1 winnow/logs/*.status winnow/logs/*.log")
        elif settings.stage == "logs":
            self._on(self._nodes[0], "tail -n 100 -f winnow/logs/*.log", worker="0")
        else:
            self._delete()
        return 0

    def _create(self) -> None:
        """Request the machines and wait until they are there."""
        settings, shape = self._settings, self._settings.shape
        nodes = ["--node-id", settings.name]
        if settings.slices > 1:
            nodes = ["--node-count", str(settings.slices), "--node-prefix", settings.name]
        pricing = ["--spot"] if settings.spot else ["--reserved"] if settings.reserved else []
        runtime = settings.runtime or shape.chip.runtime
        kind = ["--accelerator-type", shape.accelerator_type, "--runtime-version", runtime]
        self._executor.run(
            *_RESOURCES, "create", settings.name, *self._place, *kind, *nodes, *pricing, "--quiet"
        )
        while (state := self._state()) != "ACTIVE":
            if state in _LOST:
                raise LaunchError(
                    f"{settings.name} is {state}: run --stage delete, then --stage setup"
                )
            self._executor.wait(_POLL_SECONDS)

    def _install(self) -> None:
        """Copy the committed state of the repository to all machines and install it there."""
        files = Path("runs") / "launch" / self._settings.name
        archive, script = files / "winnow.tar.gz", files / "setup.sh"
        text = render("setup.sh", {"python": PYTHON, "extra": "tpu"}, set())
        self._executor.write(REPOSITORY / script, text)
        self._executor.run(
            "git", "archive", "--format=tar.gz", f"--output={archive}", "HEAD"
        )  # fmt: skip
        for node in self._nodes:
            self._executor.run(
                *_VM, "scp", str(archive), str(script), f"{node}:", *self._place, "--worker=all"
            )
            self._on(node, "bash setup.sh")

    def _start(self) -> None:
        """Start the worker loop on every machine, in the background."""
        settings, stage = self._settings, self._settings.stage
        for index, node in enumerate(self._nodes):
            command = program(settings, ".venv/bin/python", str(index) if settings.apart else None)
            # The status of an earlier worker is cleared, unless that worker is still running.
            reset = f"flock -n logs/{stage}.lock -c 'echo starting >logs/{stage}.status'"
            loop = f"bash tpu/worker.sh {stage} {settings.failures} {command}"
            start = f"(setsid {loop} </dev/null >/dev/null 2>&1 &)"
            self._on(node, f"cd winnow && mkdir -p logs && {{ {reset}; {start}; }}")

    def _delete(self) -> None:
        self._executor.run(
            *_RESOURCES, "delete", self._settings.name, *self._place, "--force", "--quiet"
        )

    def _watch(self) -> int:
        """Wait for all workers, replacing lost machines; return the exit status."""
        while True:
            if (state := self._state()) in _LOST:
                say(f"{self._settings.name} is {state}: replacing the machines")
                self._delete()
                self._create()
                self._install()
                self._start()
            statuses = self._worker_statuses()
            if all(status == "done" for status in statuses):
                if self._settings.delete_when_done:
                    self._delete()
                return 0
            if failed := [status for status in statuses if status.startswith("failed")]:
                say(f"{len(failed)} of {len(statuses)} workers {failed[0]}: see --stage logs")
                return 1
            self._executor.wait(_POLL_SECONDS)

    def _worker_statuses(self) -> list[str]:
        """Return a status per worker: "running", "done", "failed CODE", "unknown" or "lost"."""
        command = f"cat winnow/logs/{self._settings.stage}.status || echo unknown"
        statuses = []
        for node in self._nodes:
            try:
                answer = self._executor.query(*self._ssh(node, command), assume="done")
            except LaunchError:
                if self._state() not in _LOST:
                    raise
                answer = "lost"
            statuses += answer.splitlines()
        return statuses

    def _state(self) -> str:
        """Return the state of the queued resource, such as "ACTIVE"."""
        arguments = ["describe", self._settings.name, *self._place, "--format=value(state.state)"]
        return self._executor.query(*_RESOURCES, *arguments, assume="ACTIVE")

    def _on(self, node: str, command: str, worker: str = "all") -> None:
        self._executor.run(*self._ssh(node, command, worker))

    def _ssh(self, node: str, command: str, worker: str = "all") -> list[str]:
        return [
            *_VM, "ssh", node, *self._place, f"--worker={worker}", f"--command={command}",
        ]  # fmt: skip


def queued_resource(settings: Settings, executor: Executor) -> int:
    """Execute a stage on TPU VMs; return the exit status."""
    return QueuedResource(settings, executor).run()


# --------------------------------------------------------------------------------------------------
# JobSets on GKE


def jobset(settings: Settings, executor: Executor) -> int:
    """Execute a stage on GKE; return the exit status."""
    jobs = [f"{settings.name}-{stage}" for stage in ("score", "train")]
    pods = f"jobset.sigs.k8s.io/jobset-name in ({','.join(jobs)})"
    if settings.stage == "setup":
        _set_up_cluster(settings, executor)
    elif settings.stage in ("score", "train"):
        job = f"{settings.name}-{settings.stage}"
        file = Path("runs") / "launch" / settings.name / f"{settings.stage}.yaml"
        executor.write(REPOSITORY / file, jobset_yaml(settings))
        executor.run("kubectl", "delete", "jobset", job, "--ignore-not-found", "--wait")
        executor.run("kubectl", "apply", "-f", str(file))
        if settings.watch:
            done = "--for=condition=Completed"
            executor.run("kubectl", "wait", done, f"jobset/{job}", "--timeout=-1s")
    elif settings.stage == "status":
        executor.run("kubectl", "get", "jobset", *jobs, "--ignore-not-found")
        executor.run("kubectl", "get", "pods", "-l", pods, "-o", "wide")
    elif settings.stage == "logs":
        executor.run(
            "kubectl", "logs", "-l", pods, "--prefix", "--follow", "--tail=100",
            "--max-log-requests=100",
        )  # fmt: skip
    else:
        executor.run("kubectl", "delete", "jobset", *jobs, "--ignore-not-found")
        for pool in _node_pools(settings):
            executor.run(
                "gcloud", "container", "node-pools", "delete", pool, "--cluster",
                settings.cluster, "--project", settings.project, "--location", settings.zone,
                "--quiet",
            )  # fmt: skip
    return 0


def _node_pools(settings: Settings) -> dict[str, int]:
    """Return the node pools and their numbers of nodes.

    A slice of several hosts is a pool of its own; slices of one host share one pool.
    """
    if settings.shape.hosts == 1:
        return {settings.name: settings.slices}
    return dict.fromkeys(settings.nodes_of_slices, settings.shape.hosts)


def _set_up_cluster(settings: Settings, executor: Executor) -> None:
    """Create the node pools, install JobSet, and build and push the image."""
    shape = settings.shape
    gcloud = ["gcloud", "container"]
    place = ["--project", settings.project, "--location", settings.zone]
    machine = f"{shape.chip.machine}-{shape.chips_of_a_host}t"
    topology = ["--tpu-topology", shape.grid] if shape.hosts > 1 else []
    pricing = ["--spot"] if settings.spot else []
    for pool, count in _node_pools(settings).items():
        executor.run(
            *gcloud, "node-pools", "create", pool, "--cluster", settings.cluster, *place,
            "--machine-type", machine, "--num-nodes", str(count), *topology, *pricing, "--quiet",
        )  # fmt: skip
    executor.run(*gcloud, "clusters", "get-credentials", settings.cluster, *place)
    executor.run("kubectl", "apply", "--server-side", "-f", JOBSET_RELEASE)
    dockerfile = "tpu/templates/Dockerfile"
    executor.run("docker", "build", "--file", dockerfile, "--tag", settings.image, ".")
    executor.run("docker", "push", settings.image)


def jobset_yaml(settings: Settings) -> str:
    """Return the JobSet manifest."""
    shape = settings.shape
    flags = {"apart" if settings.apart else "together"}
    flags |= {"spot"} if settings.spot else set()
    flags |= {"several_hosts"} if shape.hosts > 1 else set()
    index = "$JOB_COMPLETION_INDEX" if settings.apart else None
    values = {
        "name": settings.name,
        "stage": settings.stage,
        "topology": settings.topology,
        "slices": settings.slices,
        "hosts": shape.hosts,
        "failures": settings.failures,
        "service_account": settings.service_account,
        "gke_accelerator": shape.chip.gke,
        "grid": shape.grid,
        "image": settings.image,
        "command": program(settings, "python", index),
        "chips_per_host": shape.chips_of_a_host,
    }
    return render("jobset.yaml", values, flags)


# --------------------------------------------------------------------------------------------------
# Slurm


def slurm(settings: Settings, executor: Executor) -> int:
    """Execute a stage on a Slurm cluster; return the exit status."""
    if settings.stage == "setup":
        install = "test -x .venv/bin/python || python3 -m venv .venv; "
        install += ".venv/bin/python -m pip install --quiet --editable '.[gpu]'; mkdir -p logs"
        executor.run("bash", "-c", f"set -e; cd {shlex.quote(settings.directory)}; {install}")
    elif settings.stage in ("score", "train"):
        file = Path("runs") / "launch" / settings.name / f"{settings.stage}.sbatch"
        executor.write(REPOSITORY / file, sbatch(settings))
        executor.run("sbatch", *(["--wait"] if settings.watch else []), str(file))
    elif settings.stage == "status":
        jobs = f"--name={settings.name}-score,{settings.name}-train"
        executor.run("squeue", "--me", jobs, "--long")
    elif settings.stage == "logs":
        log = f"{shlex.quote(settings.directory)}/logs/{settings.name}-*.log"
        executor.run("bash", "-c", f"tail -n 100 -F {log}")
    else:
        executor.run("scancel", "--me", f"--name={settings.name}-score")
        executor.run("scancel", "--me", f"--name={settings.name}-train")
    return 0


def sbatch(settings: Settings) -> str:
    """Return the batch script."""
    flags = {"apart" if settings.apart else "together"}
    flags |= {"account"} if settings.account else set()
    index = "$SLURM_ARRAY_TASK_ID" if settings.apart else None
    values = dataclasses.asdict(settings) | {
        "last": settings.nodes - 1,
        "command": program(settings, ".venv/bin/python", index),
    }
    return render("slurm.sbatch", values, flags)


# --------------------------------------------------------------------------------------------------
# Command line

LAUNCHERS: dict[str, Callable[[Settings, Executor], int]] = {
    "queued-resource": queued_resource,
    "jobset": jobset,
    "slurm": slurm,
}


def parser() -> argparse.ArgumentParser:
    """Return the parser; the help of options is the docstring of `Settings`."""
    made = argparse.ArgumentParser(
        prog="python -m tpu.launch",
        usage="%(prog)s LAUNCHER --stage STAGE [options] [-- arguments of the program]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("launcher", choices=LAUNCHERS)
    made.add_argument("--stage", choices=STAGES, required=True)
    made.add_argument("--yes", action="store_true", help="execute; without it, print only")
    made.add_argument("--dry_run", action="store_true", help="print only (the default)")
    attribute = re.compile(r"^      ([\w, ]+): ([^\n]+(?:\n        [^\n]+)*)", re.MULTILINE)
    described = attribute.findall(Settings.__doc__ or "")
    help_of = {name: text for names, text in described for name in names.split(", ")}
    for field in dataclasses.fields(Settings):
        if field.name in ("launcher", "stage", "arguments"):
            continue
        text = re.sub(r"\s+", " ", help_of[field.name])
        if isinstance(field.default, bool):
            made.add_argument(f"--{field.name}", action="store_true", help=text)
        else:
            made.add_argument(
                f"--{field.name}",
                type=type(field.default),
                default=field.default,
                help=f"{text} [{field.default}]" if field.default else text,
            )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    split = arguments.index("--") if "--" in arguments else len(arguments)
    given = vars(parser().parse_args(arguments[:split]))
    yes, dry_run = given.pop("yes"), given.pop("dry_run")
    try:
        if yes and dry_run:
            raise LaunchError("give --yes or --dry_run, not both")
        settings = Settings(**given, arguments=tuple(arguments[split + 1 :]))
        check_program(settings)
        status = LAUNCHERS[settings.launcher](settings, Executor() if yes else DryRun())
    except (LaunchError, TopologyError) as error:
        say(f"error: {error}", error=True)
        return 2
    except KeyboardInterrupt:
        say("interrupted: jobs on the machines go on; see --stage status", error=True)
        return 130
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if not yes:
        say("# nothing was executed; add --yes to execute")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
