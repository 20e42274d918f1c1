"""The command ``m2mkd``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.pipeline.stopping import EXIT_REQUEUE, Stopped, handle_stop_signals

# Commands that train: asked to stop, they save first.
_TRAINING = ("run", "distill", "train", "step")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 where it succeeded, 2 after an error that the user can mend, 75 where it was asked to stop and has saved (the
        same command goes on), 130 after an interrupt.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes positional arguments only up to the first option; overrides may stand behind one as well.
    if rest and (not hasattr(options, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    options.line = shlex.join(["m2mkd", *arguments])
    try:
        with handle_stop_signals() if options.subcommand in _TRAINING else nullcontext():
            options.command(options)
    except Stopped as stop:
        print(f"m2mkd: stopped: {stop}; the same command goes on from there", file=sys.stderr)
        return EXIT_REQUEUE
    except M2MKDError as error:
        print(f"m2mkd: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("m2mkd: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def _run(options: argparse.Namespace) -> None:
    from m2mkd_fast.pipeline.run import run
    from m2mkd_fast.report import write_report

    folder = run(_config(options), command=options.line, **_launching(options))
    report = write_report(folder)
    _print_summary(folder)
    print(f"report: {report}")


def _distill(options: argparse.Namespace) -> None:
    from m2mkd_fast.pipeline.run import run

    wanted = None if options.slot is None else set(options.slot)
    run(
        _config(options),
        command=options.line,
        only=lambda step: step.arm == "m2mkd" and step.phase == "m2mKD" and (wanted is None or step.slot in wanted),
        **_launching(options),
    )


def _train(options: argparse.Namespace) -> None:
    from m2mkd_fast.pipeline.config import ARMS
    from m2mkd_fast.pipeline.run import run

    config = _config(options)
    if options.arm not in config.arms:
        raise UnknownNameError("arm", options.arm, config.arms if options.arm in ARMS else ARMS)
    folder = run(config, only=lambda step: step.arm == options.arm, command=options.line, **_launching(options))
    _print_summary(folder)


def _step(options: argparse.Namespace) -> None:
    from m2mkd_fast.pipeline.one_step import run_one_step
    from m2mkd_fast.pipeline.progress import ProgressDisplay

    with ProgressDisplay() as progress:
        run_one_step(Path(options.run), options.name, options.overrides, progress)


def _split(options: argparse.Namespace) -> None:
    if options.check is not None:
        _check_split(options)
        return
    if options.config is None:
        raise M2MKDError("m2mkd split needs a configuration, or --check to survey timm's architectures")
    for name in ("all", "output", "write"):
        if getattr(options, name):
            raise M2MKDError(f"--{name} belongs to the survey of timm's architectures; give --check as well")
    import torch
    from rich.console import Console
    from rich.table import Table

    from m2mkd_fast.data import eval_batches
    from m2mkd_fast.modules.split import verify_split
    from m2mkd_fast.pipeline.workbench import Workbench

    config = _config(options)
    bench = Workbench(config, config.folder)
    model, chain = bench.teacher()
    images, _ = next(iter(eval_batches(bench.train_split, 4)))
    with torch.no_grad():
        verify_split(model.eval(), chain.eval(), images)
    table = Table(title=f"{config.teacher.model} in {len(chain)} modules; composed, they equal it bit for bit")
    for heading in ("slot", "units", "parameters", "after it"):
        table.add_column(heading, justify="right")
    for i, module in enumerate(chain):
        parameters = sum(parameter.numel() for parameter in module.parameters())
        after = "logits" if module.out_cut is None else str(module.out_cut)
        table.add_row(str(i), str(module.depth), f"{parameters:,}", after)
    Console().print(table)


def _check_split(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from m2mkd_fast.interop import split_survey

    if options.config is not None:
        raise M2MKDError(f"--check surveys timm's architectures and reads no configuration; leave out {options.config}")
    console = Console()
    findings = []
    for finding, count in split_survey.survey(options.check, options.all, options.output):
        findings.append((finding, count))
        console.print(
            f"{finding.family}: {finding.architecture}: {finding.evaluation}", highlight=False, soft_wrap=True
        )
    table = Table(title=split_survey.share(findings, options.all))
    for heading in split_survey.HEADINGS:
        table.add_column(heading, overflow="fold")  # a narrow terminal wraps names instead of cutting them
    for finding in findings:
        table.add_row(*split_survey.cells(*finding))
    console.print(table)
    if options.write is not None:
        split_survey.write_markdown(options.write, findings, options.all, options.line)
        console.print(options.write, soft_wrap=True)


def _eval(options: argparse.Namespace) -> None:
    bench = _finished(options.run)
    for name, value in bench.accuracies(bench.step_model(options.step)).items():
        print(f"{options.step} {name.replace('_', ' ')}: {value:.2f} %")


def _watch(options: argparse.Namespace) -> None:
    from m2mkd_fast.pipeline.watch import watch

    watch(options.run, once=options.once, interval=options.interval)


def _prune(options: argparse.Namespace) -> None:
    from dataclasses import asdict

    import torch
    from rich.console import Console
    from rich.table import Table

    from m2mkd_fast.data import eval_batches
    from m2mkd_fast.pipeline.environment import environment
    from m2mkd_fast.pipeline.pruning import pruning_frontier
    from m2mkd_fast.report import write_frontier

    bench = _finished(options.run)
    model = bench.step_model(options.step).to(bench.execution.accelerator.device)
    test = bench.dataset.splits["test"]
    images, _ = next(iter(eval_batches(test, options.batch_size)))
    batches = eval_batches(test, 256)
    points = pruning_frontier(
        model, batches, options.keep, keep_inputs=options.keep_inputs, latency_images=images, rounds=options.rounds
    )
    title = f"Mediators removed from {options.step}, batch {len(images)}"
    table = Table(title=title)
    for heading in ("keep", "mediators", "inputs", "accuracy (%)", "latency (ms)", "speedup"):
        table.add_column(heading, justify="right")
    for point in points:
        latency, speedup = f"{point.latency_ms:.2f}", f"{point.speedup:.2f}"
        counts = str(point.keep), str(point.mediators), str(point.inputs)
        table.add_row(*counts, f"{point.accuracy:.2f}", latency, speedup)
    Console().print(table)
    facts = {"title": title, "step": options.step, "batch_size": len(images), "threads": torch.get_num_threads()}
    for path in write_frontier(Path(options.run), [asdict(point) for point in points], facts | environment()):
        print(path)


def _report(options: argparse.Namespace) -> None:
    from m2mkd_fast.report import write_report

    if len(options.run) > 1 and options.output is None:
        raise M2MKDError("a report on several runs belongs to none of their folders; name one with --output FOLDER")
    print(f"report: {write_report(options.run, options.output)}")
    for folder in options.run:
        _print_summary(Path(folder))


def _convert(options: argparse.Namespace) -> None:
    from omegaconf import OmegaConf

    from m2mkd_fast.interop.convert import convert

    for text in options.option:
        if "=" not in text:
            raise M2MKDError(f"--option {text!r} is no key=value; give for example --option num_heads=12")
    settings = OmegaConf.to_container(OmegaConf.from_dotlist(options.option))
    print("\n".join(convert(options.source, options.target, options.to, settings).lines()))


def _push(options: argparse.Namespace) -> None:
    from m2mkd_fast.interop.hub import push_to_hub, run_provenance

    model = _whole_model(_finished(options.run), options.step)
    provenance = run_provenance(options.run, options.step)
    done = push_to_hub(
        model, options.repo, private=options.private or None, dry_run=options.dry_run, provenance=provenance
    )
    print(f"written, not sent: {done}" if options.dry_run else f"hf-hub:{options.repo}@{done}")


def _export(options: argparse.Namespace) -> None:
    from m2mkd_fast.data import eval_batches
    from m2mkd_fast.interop.export import export

    bench = _finished(options.run)
    images, _ = next(iter(eval_batches(bench.dataset.splits["test"], options.batch or 1)))
    model = _whole_model(bench, options.step)
    print(export(model, options.output, images, format=options.format, dynamic_batch=options.batch is None))


def _whole_model(bench, step: str):
    """What a finished step made; of a teacher not the chain of its modules, but the model that they are cut from."""
    result = bench.result(step)
    if result is None or result["phase"] not in ("teacher", "FT"):
        return bench.step_model(step)
    model, chain = bench.teacher()
    bench.load(chain, step)
    return model


def _info(options: argparse.Namespace) -> None:
    from m2mkd_fast.info import main as info

    info([])


def _finished(run: str):
    """The tools of a run that is there already."""
    from m2mkd_fast.pipeline.config import load_config
    from m2mkd_fast.pipeline.workbench import Workbench

    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise M2MKDError(f"{run} is no run folder (it has no config.yaml); make one with m2mkd run CONFIG")
    return Workbench(load_config(path), Path(run))


def _share(text: str) -> float | int:
    """A number of latents where there is no decimal point, else a fraction."""
    return int(text) if text.lstrip("-").isdigit() else float(text)


def _launching(options: argparse.Namespace) -> dict:
    """Where the steps are done, as arguments of :func:`m2mkd_fast.pipeline.run.run`."""
    from omegaconf import OmegaConf

    for text in options.slurm:
        if "=" not in text:
            raise M2MKDError(f"--slurm {text!r} is no key=value; give for example --slurm partition=gpu time=60")
    names = ("jobs", "launcher", "retries", "processes", "nodes")
    slurm = OmegaConf.to_container(OmegaConf.from_dotlist(options.slurm))
    return {name: getattr(options, name) for name in names} | {"slurm": slurm}


def _config(options: argparse.Namespace):
    from m2mkd_fast.pipeline.config import load_config

    return load_config(options.config, options.overrides)


def _print_summary(folder: Path) -> None:
    from rich.console import Console

    from m2mkd_fast.report import summary_table

    Console().print(summary_table(folder))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="m2mkd", description="Module-to-module distillation of vision models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="subcommand")

    def command(name: str, function, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=function)
        return sub

    def configured(sub: argparse.ArgumentParser, jobs: bool = True, optional: bool = False) -> argparse.ArgumentParser:
        text = "YAML file, for example configs/digits_vmoe.yaml"
        sub.add_argument("config", metavar="CONFIG", nargs="?" if optional else None, help=text)
        sub.add_argument("overrides", metavar="key=value", nargs="*", help="for example pair.train.steps=100 seed=1")
        if jobs:
            launching(sub)
        return sub

    def launching(sub: argparse.ArgumentParser) -> None:
        text = "steps at a time (default: one for each GPU, one without; with slurm all that are ready)"
        sub.add_argument("--jobs", type=int, metavar="N", help=text)
        text = "local: this machine's processes; torchrun: a process group for each step; slurm: a job for each step"
        sub.add_argument("--launcher", default="local", metavar="NAME", help=text)
        text = "how often a step whose process died is begun again (default 2)"
        sub.add_argument("--retries", type=int, default=2, metavar="N", help=text)
        text = "of a step, on each node (torchrun, slurm; default 1)"
        sub.add_argument("--processes", type=int, default=1, metavar="P", help=text)
        sub.add_argument("--nodes", type=int, default=1, metavar="M", help="of a step (slurm; default 1)")
        text = (
            "of submitit or sbatch, for example partition=gpu time=60 gpus_per_node=1; cluster=local without a cluster"
        )
        sub.add_argument("--slurm", nargs="+", action="extend", default=[], metavar="key=value", help=text)

    configured(command("run", _run, "Do everything a configuration asks for, and write the report."))
    sub = command("split", _split, "Take the teacher apart, prove it, and show the parts; or survey timm.")
    configured(sub, jobs=False, optional=True)
    text = "instead, show which of timm's families and architectures that match (default: all) can be split"
    sub.add_argument("--check", nargs="?", const="*", metavar="PATTERN", help=text)
    sub.add_argument("--all", action="store_true", help="check every architecture, not the smallest of each family")
    text = "JSON lines; what is in it is not checked again, so that a long survey goes on where it stopped"
    sub.add_argument("--output", metavar="FILE", help=text)
    sub.add_argument("--write", metavar="FILE", help="write the table as Markdown")
    sub = configured(command("distill", _distill, "Distil the student's modules, and do what that needs."))
    sub.add_argument("--slot", type=int, action="append", metavar="I", help="only this slot; may be repeated")
    sub = configured(command("train", _train, "Train one arm to its end, and do what that needs."))
    sub.add_argument("--arm", default="m2mkd", help="m2mkd, task, distill or scratch (default m2mkd)")
    sub = command(
        "step", _step, "Do one step of a run, as the launchers do, or wait until another process has done it."
    )
    sub.add_argument("run", metavar="RUN", help="run folder; m2mkd run makes one")
    sub.add_argument("name", metavar="NAME", help="for example m2mkd/pair1")
    text = "keys that may differ between two starts, for example device=cpu"
    sub.add_argument("overrides", metavar="key=value", nargs="*", help=text)
    sub = command("watch", _watch, "Show how far a run is, from any terminal on any machine that sees its folder.")
    sub.add_argument("run", metavar="RUN", help="run folder")
    sub.add_argument("--once", action="store_true", help="look once, and end")
    sub.add_argument("--interval", type=float, default=2.0, metavar="S", help="seconds between looks (default 2)")
    sub = command("eval", _eval, "Evaluate what a step of a run made.")
    sub.add_argument("run", metavar="RUN", help="run folder")
    sub.add_argument("--step", default="m2mkd/e2e", help="for example teacher, meta, scratch/e2e (default m2mkd/e2e)")
    sub = command("prune", _prune, "Show a circuit's accuracy and latency without its least connected latents.")
    sub.add_argument("run", metavar="RUN", help="run folder; gets pruning.json and pruning.png")
    sub.add_argument("--step", default="m2mkd/e2e", help="a step that made a circuit (default m2mkd/e2e)")
    text = "mediators to keep, each a fraction (0.25) or a number (16)"
    sub.add_argument("--keep", type=_share, nargs="+", default=[1.0, 0.75, 0.5, 0.25, 0.125], metavar="K", help=text)
    sub.add_argument("--keep-inputs", type=_share, default=1.0, metavar="K", help="input latents to keep (default 1.0)")
    sub.add_argument("--batch-size", type=int, default=1, metavar="N", help="images a timed pass (default 1)")
    sub.add_argument("--rounds", type=int, default=20, metavar="N", help="timed passes (default 20)")
    sub = command("report", _report, "Write the report of a run, or of several that differ in their seed.")
    sub.add_argument("run", metavar="RUN", nargs="+", help="run folder")
    sub.add_argument("--output", metavar="FOLDER", help="where the report goes (default: the run folder)")
    sub = command("convert", _convert, "Read a released checkpoint (m2mKD, Deep Incubation, NAC, V-MoE), or write one.")
    sub.add_argument("source", metavar="IN", help="a .pth, .npz or .safetensors file, or a folder of save_pretrained")
    sub.add_argument("target", metavar="OUT", help="a folder, or a file that ends in .safetensors or .npz")
    text = "ours: a folder for create_model, or a file; published: as the checkpoints are released (default ours)"
    sub.add_argument("--to", choices=("ours", "published"), default="ours", help=text)
    text = "what weights do not show, for example num_heads=12 top_k=2; or divided_depths=[3,3,3,3]"
    sub.add_argument("--option", metavar="key=value", nargs="+", action="extend", default=[], help=text)
    sub = command("push", _push, "Put a step's model on the Hugging Face Hub, with its model card.")
    sub.add_argument("run", metavar="RUN", help="run folder")
    sub.add_argument("--step", default="m2mkd/e2e", help="for example teacher, scratch/e2e (default m2mkd/e2e)")
    sub.add_argument("--repo", required=True, metavar="OWNER/NAME", help="is made where it does not exist")
    sub.add_argument("--private", action="store_true", help="a new repository is private")
    sub.add_argument("--dry-run", metavar="FOLDER", help="write what would be uploaded there, and send nothing")
    sub = command("export", _export, "Write a step's model as an ONNX or torch.export file, and check the file.")
    sub.add_argument("run", metavar="RUN", help="run folder")
    sub.add_argument("output", metavar="OUT", help="for example student.onnx or student.pt2")
    sub.add_argument("--step", default="m2mkd/e2e", help="for example teacher, scratch/e2e (default m2mkd/e2e)")
    sub.add_argument("--format", choices=("onnx", "pt2"), help="default: what the name of OUT ends in")
    sub.add_argument("--batch", type=int, metavar="N", help="a file for exactly N images (default: any number)")
    command("info", _info, "Show what was built, what will run, and why not.")
    return parser


if __name__ == "__main__":
    sys.exit(main())
