"""Launches Winnow: TPU VMs by queued resources, JobSets on GKE, Slurm jobs on GPU clusters.

    python -m tpu.launch queued-resource --stage setup --name judge --project P --zone Z \\
        --topology v5e:2x4 --slices 8 --spot
    python -m tpu.launch queued-resource --stage score ... -- \\
        --gin_file=configs/score/ask_llm.gin --gin.MODEL=google/flan-t5-xl \\
        --gin.CORPUS=gs://B/c4/corpus --gin.OUTPUT=gs://B/c4/ask_llm
    python -m tpu.launch jobset --stage train ... -- --gin_file=configs/pretrain/t5_base_c4.gin ...
    python -m tpu.launch slurm --stage train ... -- --gin_file=...

Prints what it would do, every command and file in full. With --yes it does just that. tpu/README.md
leads from a project to a running job.

Stages: setup (machines and programs), score, train; then status, logs, and delete, which ends what
costs money. What follows `--` is given to `python -m pruning score` or to `python train.py`.

Choices
- Whatever is stopped starts again: a worker on exit code 75 (stopped in good order) at once, on
  other codes a few times; a preempted machine with `--watch` or by the cluster. The program goes on
  from its shards or its checkpoint: starting anew is all that a launcher has to do.
- Scoring wants no communication: with slices of one host each is a worker of its own, which takes
  the shards with its number and whose end disturbs nobody. Such slices are also the easiest to get.
- Training, and scoring on one slice of several hosts, joins all processes (`--distributed`): one of
  them ending ends all, and all start again.
- Templates and scripts are files (tpu/templates, tpu/worker.sh), to be read and changed. The lines
  ending in "# only: X" stay where X holds.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tpu.chips import Topology, TopologyError

REPOSITORY = Path(__file__).resolve().parent.parent
TEMPLATES = Path(__file__).resolve().parent / "templates"
STAGES = ("setup", "score", "train", "status", "logs", "delete")
PYTHON = "3.12"
JOBSET_RELEASE = "https://github.com/kubernetes-sigs/jobset/releases/download/v0.8.0/manifests.yaml"
_LOST = ("SUSPENDED", "SUSPENDING", "FAILED")  # states of a queued resource that never come back
_POLL_SECONDS = 30
_PATIENCE = 20  # failures in a row of asking how things stand


class LaunchError(ValueError):
    """Settings that launch nothing; the message says what to change."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What the launchers need to know. Each uses some of it.

    Attributes:
      launcher, stage: what is to be done.
      name: of the machines and the job; lower-case letters, digits and "-".
      project: of the cloud.
      zone: of the machines; for jobset the cluster's zone or region.
      topology: of a slice, such as "v5e:16x16".
      slices: how many.
      spot: cheaper machines that may be taken away.
      reserved: machines of your reservation.
      runtime: software version of TPU VMs; "" takes the chip's usual.
      cluster: of GKE.
      image: of the containers, with its registry.
      service_account: of Kubernetes, which may read and write the bucket.
      partition: of Slurm.
      account: of Slurm.
      time: limit, as Slurm writes it; the job goes on after it, in the queue again.
      nodes: machines; in scoring each is a worker of its own.
      gpus: of a machine.
      directory: the repository on the cluster's shared file system.
      failures: how often a worker may fail by itself.
      watch: stay, tell how the job stands, and get new machines for preempted ones.
      delete_when_done: with `watch`: give the machines back at the end.
      arguments: of the program.
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
            raise LaunchError("--slices, --nodes and --gpus are at least 1")
        if self.spot and self.reserved:
            raise LaunchError("--spot or --reserved, not both")
        needed = {
            "queued-resource": ("project", "zone"),
            "jobset": ("project", "zone", "cluster", "image"),
            "slurm": ("partition", "directory"),
        }[self.launcher]
        if missing := [f"--{name}" for name in needed if not getattr(self, name)]:
            raise LaunchError(f"{self.launcher} wants {', '.join(missing)}")
        if self.stage in ("score", "train") and not self.arguments:
            raise LaunchError(f"--stage {self.stage} wants the program's arguments after --")
        if self.launcher != "slurm":
            Topology.parse(self.topology)
            if self.stage == "score" and self.slices > 1 and self.shape.hosts > 1:
                raise LaunchError(
                    f"scoring on several slices wants slices of one host: {self.topology} has "
                    f"{self.shape.hosts}. Give --topology {self.shape.kind}:"
                    f"{'2x4' if self.shape.chip.dimensions == 2 else '2x2x1'} and more --slices."
                )

    @property
    def shape(self) -> Topology:
        return Topology.parse(self.topology)

    @property
    def nodes_of_slices(self) -> list[str]:
        """Names of the TPU VM nodes, one a slice."""
        return [self.name] if self.slices == 1 else [f"{self.name}-{i}" for i in range(self.slices)]

    @property
    def apart(self) -> bool:
        """Whether workers run by themselves, each with a number."""
        if self.stage != "score":
            return False
        return self.launcher == "slurm" or self.shape.hosts == 1


# --------------------------------------------------------------------------------------------------
# Doing, or saying what would be done


class Doer:
    """Runs commands and writes files."""

    def write(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        self._say(f"wrote {path}")

    def run(self, *command: str) -> None:
        """Raises LaunchError where it fails."""
        self._say(f"$ {shlex.join(command)}")
        self._checked(subprocess.run(command, cwd=REPOSITORY), command)

    def ask(self, *command: str, assume: str) -> str:
        """What a command prints; `assume` is what a dry run goes on with.

        Asking may fail for a while: a machine is being taken away, a network is slow.

        Raises LaunchError where it fails _PATIENCE times in a row.
        """
        for _ in range(_PATIENCE):
            asked = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
            if asked.returncode == 0 or asked.stdout.strip():
                return asked.stdout.strip()
            self.wait(_POLL_SECONDS)
        self._checked(asked, command)
        return ""

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)

    @staticmethod
    def _checked(done: subprocess.CompletedProcess, command: Sequence[str]) -> None:
        if done.returncode:
            raise LaunchError(f"status {done.returncode} of: {shlex.join(command)}")

    @staticmethod
    def _say(line: str) -> None:
        print(line, flush=True)


class Teller(Doer):
    """Prints the same commands and files, and touches nothing."""

    def write(self, path: Path, text: str) -> None:
        self._say(f"# writes {path}:")
        self._say("".join(f"    {line}\n" for line in text.splitlines()).rstrip("\n"))

    def run(self, *command: str) -> None:
        self._say(f"$ {shlex.join(command)}")

    def ask(self, *command: str, assume: str) -> str:
        self._say(f"$ {shlex.join(command)}    # until it says {assume}")
        return assume

    def wait(self, seconds: float) -> None:
        pass


def render(template: str, values: dict[str, object], flags: set[str]) -> str:
    """Fills {{names}} in and keeps the lines marked "# only: FLAG" of the given flags.

    Raises:
      LaunchError: a name that the template has and `values` lacks.
    """
    lines = []
    for line in (TEMPLATES / template).read_text().splitlines():
        kept, _, flag = line.partition("  # only: ")
        if not flag or flag in flags:
            lines.append(kept)

    def value(match: re.Match) -> str:
        if match[1] not in values:
            raise LaunchError(f"{template}: nothing known of {match[1]!r}")
        return str(values[match[1]])

    return re.sub(r"\{\{(\w+)\}\}", value, "\n".join(lines)) + "\n"


def program(settings: Settings, python: str, index: str | None) -> str:
    """The shell command of a stage. `index`: shell text of the worker's number, if it has one."""
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


def queued_resource(settings: Settings, doer: Doer) -> int:
    place = ["--project", settings.project, "--zone", settings.zone]
    resources = ["gcloud", "compute", "tpus", "queued-resources"]
    vm = ["gcloud", "compute", "tpus", "tpu-vm"]
    nodes = settings.nodes_of_slices

    def on(node: str, command: str, worker: str = "all") -> list[str]:
        return [*vm, "ssh", node, *place, f"--worker={worker}", f"--command={command}"]

    def state() -> str:
        wanted = ["describe", settings.name, *place, "--format=value(state.state)"]
        return doer.ask(*resources, *wanted, assume="ACTIVE")

    def create() -> None:
        shape = settings.shape
        which = ["--node-id", settings.name]
        if settings.slices > 1:
            which = ["--node-count", str(settings.slices), "--node-prefix", settings.name]
        paid = ["--spot"] if settings.spot else ["--reserved"] if settings.reserved else []
        runtime = settings.runtime or shape.chip.runtime
        kind = ["--accelerator-type", shape.accelerator_type, "--runtime-version", runtime]
        doer.run(*resources, "create", settings.name, *place, *kind, *which, *paid, "--quiet")
        while (now := state()) != "ACTIVE":
            if now in _LOST:
                raise LaunchError(f"{settings.name} is {now}: --stage delete, and set it up again")
            doer.wait(_POLL_SECONDS)

    def install() -> None:
        kept = Path("runs") / "launch" / settings.name
        archive, script = kept / "winnow.tar.gz", kept / "setup.sh"
        doer.write(
            REPOSITORY / script, render("setup.sh", {"python": PYTHON, "extra": "tpu"}, set())
        )
        doer.run("git", "archive", "--format=tar.gz", f"--output={archive}", "HEAD")
        for node in nodes:
            doer.run(*vm, "scp", str(archive), str(script), f"{node}:", *place, "--worker=all")
            doer.run(*on(node, "bash setup.sh"))

    def start() -> None:
        for index, node in enumerate(nodes):
            command = program(settings, ".venv/bin/python", str(index) if settings.apart else None)
            stage = settings.stage
            # Unless one is running, what the last worker left as its status is wiped out.
            fresh = f"flock -n logs/{stage}.lock -c 'echo starting >logs/{stage}.status'"
            loop = f"bash tpu/worker.sh {stage} {settings.failures} {command}"
            start = f"(setsid {loop} </dev/null >/dev/null 2>&1 &)"
            doer.run(*on(node, f"cd winnow && mkdir -p logs && {{ {fresh}; {start}; }}"))

    def delete() -> None:
        doer.run(*resources, "delete", settings.name, *place, "--force", "--quiet")

    def watch() -> int:
        """Until all workers are done. Returns the exit status."""
        said = f"cat winnow/logs/{settings.stage}.status || echo unknown"
        while True:
            if (now := state()) in _LOST:
                print(f"{settings.name} is {now}: getting new machines", flush=True)
                delete()
                create()
                install()
                start()
            answers = []
            for node in nodes:
                try:
                    answers.append(doer.ask(*on(node, said), assume="done"))
                except LaunchError:
                    if state() not in _LOST:
                        raise
                    answers.append("lost")
            lines = [line for answer in answers for line in answer.splitlines()]
            if all(line == "done" for line in lines):
                if settings.delete_when_done:
                    delete()
                return 0
            if failed := [line for line in lines if line.startswith("failed")]:
                print(f"{len(failed)} of {len(lines)} workers {failed[0]}: see --stage logs")
                return 1
            doer.wait(_POLL_SECONDS)

    if settings.stage == "setup":
        create()
        install()
    elif settings.stage in ("score", "train"):
        start()
        if settings.watch:
            return watch()
    elif settings.stage == "status":
        doer.run(*resources, "describe", settings.name, *place)
        for node in nodes:
            doer.run(*on(node, "tail -n 1 winnow/logs/*.status winnow/logs/*.log"))
    elif settings.stage == "logs":
        doer.run(*on(nodes[0], "tail -n 100 -f winnow/logs/*.log", worker="0"))
    else:
        delete()
    return 0


# --------------------------------------------------------------------------------------------------
# JobSets on GKE


def jobset(settings: Settings, doer: Doer) -> int:
    shape, job = settings.shape, f"{settings.name}-{settings.stage}"
    chips = min(shape.chips, 8 if shape.hosts == 1 else shape.chip.chips_per_host)
    machine = {
        "v5e": f"ct5lp-hightpu-{chips}t",
        "v5p": f"ct5p-hightpu-{chips}t",
        "v6e": f"ct6e-standard-{chips}t",
    }[shape.kind]

    def set_up() -> None:
        gcloud = ["gcloud", "container"]
        place = ["--project", settings.project, "--location", settings.zone]
        pools = [(settings.name, settings.slices)]  # of single hosts: one pool has them all
        several = []
        if shape.hosts > 1:
            pools = [(node, shape.hosts) for node in settings.nodes_of_slices]
            several = ["--tpu-topology", shape.grid]
        paid = ["--spot"] if settings.spot else []
        for pool, count in pools:
            doer.run(
                *gcloud, "node-pools", "create", pool, "--cluster", settings.cluster, *place,
                "--machine-type", machine, "--num-nodes", str(count), *several, *paid, "--quiet",
            )  # fmt: skip
        doer.run(*gcloud, "clusters", "get-credentials", settings.cluster, *place)
        doer.run("kubectl", "apply", "--server-side", "-f", JOBSET_RELEASE)
        recipe = "tpu/templates/Dockerfile"
        doer.run("docker", "build", "--file", recipe, "--tag", settings.image, ".")
        doer.run("docker", "push", settings.image)

    if settings.stage == "setup":
        set_up()
    elif settings.stage in ("score", "train"):
        file = Path("runs") / "launch" / settings.name / f"{settings.stage}.yaml"
        doer.write(REPOSITORY / file, jobset_yaml(settings, chips))
        doer.run("kubectl", "delete", "jobset", job, "--ignore-not-found", "--wait")
        doer.run("kubectl", "apply", "-f", str(file))
        if settings.watch:
            done = "--for=condition=Completed"
            doer.run("kubectl", "wait", done, f"jobset/{job}", "--timeout=-1s")
    else:
        jobs = [f"{settings.name}-{stage}" for stage in ("score", "train")]
        label = f"jobset.sigs.k8s.io/jobset-name in ({','.join(jobs)})"
        if settings.stage == "status":
            doer.run("kubectl", "get", "jobset", *jobs, "--ignore-not-found")
            doer.run("kubectl", "get", "pods", "-l", label, "-o", "wide")
        elif settings.stage == "logs":
            doer.run(
                "kubectl", "logs", "-l", label, "--prefix", "--follow", "--tail=100",
                "--max-log-requests=100",
            )  # fmt: skip
        else:
            doer.run("kubectl", "delete", "jobset", *jobs, "--ignore-not-found")
            pools = settings.nodes_of_slices if shape.hosts > 1 else [settings.name]
            for pool in pools:
                doer.run(
                    "gcloud", "container", "node-pools", "delete", pool, "--cluster",
                    settings.cluster, "--project", settings.project, "--location", settings.zone,
                    "--quiet",
                )  # fmt: skip
    return 0


def jobset_yaml(settings: Settings, chips_per_host: int) -> str:
    """The manifest."""
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
        "chips_per_host": chips_per_host,
    }
    return render("jobset.yaml", values, flags)


# --------------------------------------------------------------------------------------------------
# Slurm


def slurm(settings: Settings, doer: Doer) -> int:
    if settings.stage == "setup":
        install = "test -x .venv/bin/python || python3 -m venv .venv; "
        install += ".venv/bin/python -m pip install --quiet --editable '.[gpu]'; mkdir -p logs"
        doer.run("bash", "-c", f"set -e; cd {shlex.quote(settings.directory)}; {install}")
    elif settings.stage in ("score", "train"):
        file = Path("runs") / "launch" / settings.name / f"{settings.stage}.sbatch"
        doer.write(REPOSITORY / file, sbatch(settings))
        doer.run("sbatch", *(["--wait"] if settings.watch else []), str(file))
    else:
        jobs = f"--name={settings.name}-score,{settings.name}-train"
        if settings.stage == "status":
            doer.run("squeue", "--me", jobs, "--long")
        elif settings.stage == "delete":
            doer.run("scancel", "--me", f"--name={settings.name}-score")
            doer.run("scancel", "--me", f"--name={settings.name}-train")
        else:
            log = f"{shlex.quote(settings.directory)}/logs/{settings.name}-*.log"
            doer.run("bash", "-c", f"tail -n 100 -F {log}")
    return 0


def sbatch(settings: Settings) -> str:
    """The batch script."""
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

LAUNCHERS: dict[str, Callable[[Settings, Doer], int]] = {
    "queued-resource": queued_resource,
    "jobset": jobset,
    "slurm": slurm,
}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m tpu.launch",
        usage="%(prog)s LAUNCHER --stage STAGE [options] [-- the program's arguments]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("launcher", choices=LAUNCHERS)
    made.add_argument("--stage", choices=STAGES, required=True)
    made.add_argument("--yes", action="store_true", help="do it; otherwise it is only printed")
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
    """Returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    split = arguments.index("--") if "--" in arguments else len(arguments)
    given = vars(parser().parse_args(arguments[:split]))
    yes, dry_run = given.pop("yes"), given.pop("dry_run")
    try:
        if yes and dry_run:
            raise LaunchError("--yes or --dry_run, not both")
        settings = Settings(**given, arguments=tuple(arguments[split + 1 :]))
        status = LAUNCHERS[settings.launcher](settings, Doer() if yes else Teller())
    except (LaunchError, TopologyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: what runs on the machines goes on; see --stage status", file=sys.stderr)
        return 130
    if not yes:
        print("# nothing was done; add --yes to do it")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
