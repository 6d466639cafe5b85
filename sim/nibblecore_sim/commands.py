"""The command that simulation adds to ``nibblecore``: ``fuzz``."""

import typer

from nibblecore.cli.console import JSON_OPTION, OUT, print_json, progress, table
from nibblecore.errors import NibbleError


def register(app: typer.Typer) -> None:
    """Add the commands; called by ``nibblecore`` when this package is installed."""
    app.command("fuzz")(fuzz)


def fuzz(
    count: int = typer.Option(200, "--count", "-n", min=1, help="Random networks."),
    seed: int = typer.Option(1, "--seed", "-s", min=0, help="First seed; one per network, upwards."),
    arch: list[str] = typer.Option(
        [], "--arch", "-a", help="Core; give it several times to spread the cases. Default: three made for fuzzing."
    ),
    on: str = typer.Option("rtl", "--on", help="rtl, or golden to leave the simulation out."),
    as_json: bool = JSON_OPTION,
) -> None:
    """Run random networks through compiler, golden model and RTL, and demand equal integers."""
    from .fuzz import FUZZ_ARCHS, Summary, find_arch, timed
    from .fuzz import fuzz as run
    from .transport import SimTransport

    if on not in ("rtl", "golden"):
        raise NibbleError(f"--on must be rtl or golden, not {on!r}")
    cores = [find_arch(name) for name in arch] or list(FUZZ_ARCHS.values())
    summary = Summary()
    cases = run(cores, count=count, seed=seed, open_rtl=SimTransport if on == "rtl" else None)
    with progress(as_json) as bar:
        task = bar.add_task("fuzzing", total=count)
        for case in timed(cases, summary):
            bar.advance(task)
            if case.mismatch:
                bar.console.print(f"[red]seed {case.seed} on {case.arch}: {case.mismatch}", highlight=False)
    if as_json:
        print_json(
            {
                "cases": summary.cases,
                "refused": summary.refused,
                "mismatches": len(summary.mismatches),
                "failing": [{"arch": c.arch, "seed": c.seed, "mismatch": c.mismatch} for c in summary.mismatches],
                "simulated_cycles": summary.cycles,
                "seconds": round(summary.seconds, 1),
                "seed": seed,
                "archs": [a.name for a in cores],
            }
        )
    else:
        result = table(
            "random networks: integer graph = golden model" + (" = RTL" if on == "rtl" else ""), "what", "count>"
        )
        result.add_row("cases", str(summary.cases))
        result.add_row("refused by the compiler, with a reason", str(summary.refused))
        result.add_row("simulated cycles", f"{summary.cycles:,}")
        result.add_row("seconds", f"{summary.seconds:.0f}")
        result.add_row(
            "[bold]mismatches", f"[bold {'red' if summary.mismatches else 'green'}]{len(summary.mismatches)}"
        )
        OUT.print(result)
    if summary.mismatches:
        raise typer.Exit(1)
