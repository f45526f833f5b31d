"""The command line: run, plan, eval, report, difficulty, signal, answers, serve-oracle, list, cite, doctor.
Each command imports the large libraries that it needs, so the others start fast.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Annotated

import typer

from reflux import __version__

app = typer.Typer(
    help="On-policy distillation: a student learns from a teacher on its own answers. "
    "Start with: reflux run quickstart",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Recipe = Annotated[
    str, typer.Argument(help="A shipped recipe (see: reflux list recipes) or the path of a .toml file.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Changes, as key.path=value, for example learner.lr=1e-3.")
]
Out = Annotated[
    Path | None,
    typer.Option("--out", help="The run directory; by default runs/RECIPE, with a number if it exists."),
]


@app.command("run")
def run_(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Out = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a run from its last checkpoint.")
    ] = False,
) -> None:
    """Train a student as a recipe describes."""
    from reflux.cli.run import run_recipe

    run_recipe(recipe, overrides or [], out, resume)


@app.command()
def plan(recipe: Recipe, overrides: Overrides = None) -> None:
    """Check a recipe and print what would run, without loading weights."""
    from reflux.cli.show import show_plan

    show_plan(recipe, overrides or [])


@app.command("eval")
def eval_(
    model: Annotated[
        str,
        typer.Argument(
            help="A run directory, a folder in Hugging Face format, a GGUF file, a hub id, or reflux:teacher."
        ),
    ],
    task: Annotated[
        str | None,
        typer.Option("--task", help="The kind of a task, for example gsm8k; by default the run's task."),
    ] = None,
    problems: Annotated[int, typer.Option("--problems", min=1)] = 500,
    samples: Annotated[
        int,
        typer.Option("--samples", min=0, help="Sampled answers per problem, in addition to the greedy one."),
    ] = 0,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", min=1, help="Limit of an answer; by default the run's limit, or 512."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Task or sampler settings, for example task.path=data.jsonl."),
    ] = None,
) -> None:
    """Accuracy of a model on a task, with intervals."""
    from reflux.cli.evaluate import evaluate_model

    evaluate_model(model, task, problems, samples, max_tokens, overrides or [])


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """Write report.html for a run, as one self-contained page."""
    from reflux.cli.show import write_report

    write_report(run)


@app.command("list")
def list_(
    group: Annotated[str, typer.Argument(help="recipes, tasks, samplers, teachers, credit, ...")] = "",
    module: Annotated[
        str, typer.Option("--module", help="Your own package: list its parts instead of the shipped parts.")
    ] = "",
) -> None:
    """List recipes and parts, one line each."""
    from reflux.cli.show import list_parts

    list_parts(group, module)


@app.command()
def cite(recipe: Recipe, overrides: Overrides = None) -> None:
    """Print the BibTeX entries of the methods that a recipe uses."""
    from reflux.cli.show import show_citations

    show_citations(recipe, overrides or [])


@app.command()
def doctor(recipe: Recipe, overrides: Overrides = None) -> None:
    """Load the models of a recipe and check tokenizers, end tokens, teachers and disk space, and that the
    sampler and the learner give the same log-probs.
    """
    from reflux.cli.examine import show_findings

    show_findings(recipe, overrides or [])


@app.command()
def difficulty(
    recipe: Recipe,
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Answers per training prompt.")] = 8,
    prompts: Annotated[
        int,
        typer.Option(
            "--prompts", min=0, help="Number of prompts; by default all, or 512 if the task has no end."
        ),
    ] = 0,
    temperature: Annotated[float, typer.Option("--temperature", min=0.01)] = 1.0,
    top_p: Annotated[float, typer.Option("--top-p", min=0.01, max=1.0)] = 0.95,
    cap: Annotated[int, typer.Option("--cap", min=1, help="The most copies of a prompt.")] = 8,
    out: Annotated[
        Path | None, typer.Option("--out", help="The output folder; by default runs/RECIPE-difficulty.")
    ] = None,
) -> None:
    """Measure how hard the training prompts are for the student, and write a balanced prompt file."""
    from reflux.cli.difficulty import balance_prompts

    balance_prompts(recipe, overrides or [], samples, prompts, (temperature, top_p), cap, out)


@app.command()
def signal(
    recipe: Recipe,
    overrides: Overrides = None,
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples",
            min=2,
            help="Attempts per prompt; by default the recipe's group_size, or 8 if that is 1.",
        ),
    ] = None,
    prompts: Annotated[int, typer.Option("--prompts", min=1, help="Number of training prompts.")] = 64,
    out: Annotated[
        Path | None, typer.Option("--out", help="The output folder; by default runs/RECIPE-signal.")
    ] = None,
) -> None:
    """Measure how well rewards and teachers rank the student's attempts, against the task's verifier, before
    training: AUC, and pairs of a right and a wrong attempt at one prompt. The student's own log-prob and the
    length are the controls.
    """
    from reflux.cli.rank_signals import rank_signals

    rank_signals(recipe, overrides or [], samples, prompts, out)


@app.command()
def answers(
    recipe: Recipe,
    overrides: Overrides = None,
    prompts: Annotated[
        int, typer.Option("--prompts", min=0, help="Number of prompts; by default all of the run.")
    ] = 0,
) -> None:
    """Ask a teacher once for answers to the training prompts of a recipe with the task `answered`."""
    from reflux.cli.fill_answers import fill_answers

    fill_answers(recipe, overrides or [], prompts)


@app.command("serve-oracle")
def serve_oracle_(
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="Settings, as key=value, for example faults.busy=0.2 task.kind=chains."),
    ] = None,
    host: Annotated[str, typer.Option("--host")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: a free port.")] = 8008,
) -> None:
    """Serve the rules of an arithmetic task over OpenAI's chat protocol, in place of a language model."""
    from reflux.cli.oracle import serve_oracle

    serve_oracle(settings or [], host, port)


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if show:
        typer.echo(f"reflux {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line. An error that the user can correct is printed as a sentence, with
    exit code 2. Any other exception is a bug and shows its traceback.
    """
    from reflux.errors import RefluxError

    for stream in (sys.stdout, sys.stderr):
        # A model or a data file may write characters that the terminal does not have.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except RefluxError as error:
        typer.secho(f"reflux: {error}", err=True, fg="red")
        raise SystemExit(2) from None
    except OSError as error:
        import errno

        # A full disk, or a quota that is used up.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        typer.secho(
            "reflux: the disk is full. What was saved before is intact. Free some space, then continue with "
            "--resume.",
            err=True,
            fg="red",
        )
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
