"""Stand-ins for SLURM's commands, as far as submitit and a job use them: one machine, every job starts at once.

`install(folder)` writes sbatch, srun, sacct, scancel and scontrol into a folder for PATH; the state of jobs lies in
`folder/jobs/<id>/`: the script, the process numbers of its tasks, and ``state`` as sacct shows it.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = ("sbatch", "srun", "sacct", "scancel", "scontrol")


def install(folder: Path) -> Path:
    """Write the commands; returns the folder that has to stand first in PATH."""
    programs = folder / "bin"
    (folder / "jobs").mkdir(parents=True)
    programs.mkdir()
    for name in COMMANDS:
        program = programs / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {folder} {name} "$@"\n')
        program.chmod(0o755)
    return programs


def job_ids(folder: Path) -> list[str]:
    """Of all jobs that were submitted; an array's have an underscore."""
    return sorted(path.name for path in (folder / "jobs").iterdir())


def sbatch(folder: Path, script: str) -> None:
    number = 1 + len({name.split("_")[0] for name in job_ids(folder)})
    text = Path(script).read_text()
    array = re.search(r"^#SBATCH --array=0-(\d+)", text, re.MULTILINE)
    names = [f"{number}_{task}" for task in range(int(array.group(1)) + 1)] if array else [str(number)]
    for name in names:
        job = folder / "jobs" / name
        job.mkdir()
        (job / "script").write_text(text)
        start(folder, name)
    print(f"Submitted batch job {number}")


def start(folder: Path, name: str) -> None:
    """Run a job's script in the background; its state follows."""
    job, (number, *task) = folder / "jobs" / name, name.split("_")
    (job / "state").write_text("RUNNING")
    environment = os.environ | {
        "SLURM_JOB_ID": number,
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_NTASKS": "1",
        "JOB": str(job),
    }
    for variable in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        environment.pop(variable, None)
    if task:
        environment |= {"SLURM_ARRAY_JOB_ID": number, "SLURM_ARRAY_TASK_ID": task[0]}
    code = """bash "$JOB/script"; code=$?
        grep -q REQUEUED "$JOB/state" || echo $code >"$JOB/code"
        echo $code >"$JOB/ended"
    """
    nothing = subprocess.DEVNULL  # sbatch's caller waits until nobody holds its output any more
    subprocess.Popen(
        ["bash", "-c", code], env=environment, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True
    )


def srun(folder: Path, *words: str) -> None:
    """The task of a job: its output goes where the options say."""
    words, files = list(words), {}
    while words[0].startswith("--"):
        option = words.pop(0)
        if option in ("--output", "--error"):
            files[option] = words.pop(0)
    task = os.environ.get("SLURM_ARRAY_TASK_ID", "")
    for marker, value in (
        ("%A", os.environ["SLURM_JOB_ID"]),
        ("%a", task),
        ("%j", os.environ["SLURM_JOB_ID"]),
        ("%t", "0"),
    ):
        files = {option: file.replace(marker, value) for option, file in files.items()}
    with open(files["--output"], "a") as output, open(files["--error"], "a") as errors:
        environment = os.environ | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
        process = subprocess.Popen(words, stdout=output, stderr=errors, env=environment)
        Path(os.environ["JOB"], "pid").write_text(str(process.pid))
        sys.exit(process.wait())


def sacct(folder: Path, *words: str) -> None:
    print("JobID|State|NodeList")
    for name in job_ids(folder):
        job = folder / "jobs" / name
        state = (job / "state").read_text()
        if (job / "code").exists():
            state = "COMPLETED" if (job / "code").read_text().strip() == "0" else "FAILED"
        print(f"{name}|{state}|node0")


def scancel(folder: Path, name: str, *words: str) -> None:
    number = (
        getattr(signal, words[-1] if words[-1].startswith("SIG") else f"SIG{words[-1]}") if words else signal.SIGTERM
    )
    os.kill(int((folder / "jobs" / name / "pid").read_text()), number)


def scontrol(folder: Path, action: str, name: str) -> None:
    """`requeue`: as SLURM does, the job begins again once it has ended."""
    job = folder / "jobs" / name
    (job / "state").write_text("REQUEUED")
    if os.fork():
        return
    os.setsid()
    while not (job / "ended").exists():
        time.sleep(0.05)
    (job / "ended").unlink()
    start(folder, name)


if __name__ == "__main__":
    globals()[sys.argv[2]](Path(sys.argv[1]), *sys.argv[3:])
